"""Packed files: the same network, at the size that the accounting says, from nobody trusted."""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Qexp
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torchvision.models import MaxVit

from qexp.config import configs_dir
from qexp.engine.network import integer_network
from qexp.errors import CheckpointError, ConfigError, DataError
from qexp.export import bits, inputs
from qexp.export.coding import CODERS, decode, encode
from qexp.export.command import _named_dataset
from qexp.export.header import FormatError, parse
from qexp.export.network import allowed, restore
from qexp.export.packed import Packed, pack_network, read, to_bytes, write
from qexp.models.resnet import ResNet
from qexp.quant.accounting import account
from qexp.quant.adaround import AdaRound
from qexp.quant.additive import APoTActivation
from qexp.quant.aquant import AQuant
from qexp.quant.asq import ASQ
from qexp.quant.codebook import Codebook
from qexp.quant.convert import Bits, calibrate_, quant_layers, quantize_
from qexp.quant.dorefa import PACT, DoReFaActivation, DoReFaWeight
from qexp.quant.fold import fold_bn_
from qexp.quant.lsq import LSQ, LSQPlus
from qexp.quant.n2uq import N2UQ, N2UQWeight
from qexp.quant.nearest import Nearest
from qexp.quant.power import POST, POT, APoT, POSTReleased
from qexp.quant.trace import trace
from qexp.recipes.absent import without_images
from qexp.runner import checkpoint
from qexp.runner.atomic import write_bytes

pytest.importorskip("safetensors")

SHAPE = (3, 8, 8)
MODEL = {"depth": 8, "shortcut": "projection", "width": 0.5}
TARGET = "qexp.models.resnet.ResNet"

METHODS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "lsq": (LSQ, LSQ),
    "lsq_per_channel": (partial(LSQ, per_channel=True), LSQPlus),
    "asq+post": (POST, ASQ),
    "asq_exp+pot": (POT, partial(ASQ, factor="exp", reduction=2)),
    "asq_leak": (LSQ, partial(ASQ, leak=0.01, reduction=2)),
    "asq_statistics": (LSQ, partial(ASQ, factor="statistics")),
    "post_released": (POSTReleased, LSQ),
    "apot": (partial(APoT, normalize=True), LSQ),
    "apot_act": (APoT, APoTActivation),
    "pot_act": (POT, partial(APoTActivation, additive=False)),
    "adq": (Codebook, N2UQ),
    "adq_per_channel": (partial(Codebook, per_channel=True), N2UQ),
    "adq_full": (partial(Codebook, levels="full"), LSQ),
    "n2uq": (N2UQWeight, N2UQ),
    "dorefa": (DoReFaWeight, DoReFaActivation),
    "pact": (DoReFaWeight, PACT),
    "nearest": (partial(Nearest, per_channel=True), Nearest),
    "adaround": (AdaRound, partial(Nearest, symmetric=True)),
    "aquant": (AdaRound, AQuant),
    "aquant_sigmoid": (AdaRound, partial(AQuant, squash="sigmoid")),
    "aquant_fusion": (AdaRound, partial(AQuant, per="row", fusion="residual", border="linear")),
}


def images(n: int = 16) -> Tensor:
    return torch.randn(n, *SHAPE, generator=torch.Generator().manual_seed(1))


def network(method: str, widths: Bits | None = None, *, fold: bool = False) -> nn.Module:
    """A calibrated ResNet-8 with batch norms that do something, 4 bits, 8 at the ends."""
    return copy.deepcopy(_network(METHODS[method], widths, fold))


@cache
def _network(factories: Any, widths: Bits | None, fold: bool) -> nn.Module:
    torch.manual_seed(0)
    model = ResNet(num_classes=10, **MODEL)  # type: ignore[arg-type]
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.bias)
    model(images())
    model.eval()
    if fold:
        fold_bn_(model)
    layers = trace(model, SHAPE)
    weight, act = factories
    chosen = {layer.name: widths or Bits(4, 4) for layer in layers}
    chosen[layers[0].name] = chosen[layers[-1].name] = Bits(8, 8)
    quantize_(model, layers, chosen, weight, act, LSQ, LSQ)
    calibrate_(model, images())
    with torch.no_grad():  # adapters and borders away from their neutral start
        for name, parameter in model.named_parameters():
            if "adapter" in name or "border" in name:
                parameter.add_(0.05 * torch.rand_like(parameter))
    return model.eval()


def packed_of(model: nn.Module, **keywords: Any) -> Packed:
    return pack_network(
        model,
        target=TARGET,
        keywords=MODEL,
        num_classes=10,
        input_shape=SHAPE,
        data={"name": "synthetic", "mean": [0.5] * 3, "std": [0.25] * 3},
        **keywords,
    )


def through_a_file(model: nn.Module, folder: Path) -> nn.Module:
    write(packed_of(model), folder / "x.safetensors")
    return restore(read(folder / "x.safetensors"))


# Bits


@pytest.mark.parametrize("width", [1, 2, 3, 4, 5, 8, 13, 16])
def test_codes_survive_packing_at_every_width(width: int) -> None:
    codes = torch.randint(0, 2**width, (3, 7))
    data = bits.pack(codes, width)
    assert data.numel() == -(-21 * width // 8)
    assert torch.equal(bits.unpack(data, width, 21), codes.reshape(-1).int())
    if 21 * width % 8:
        data[-1] |= 0x80
        with pytest.raises(ValueError, match="behind the last code are not zero"):
            bits.unpack(data, width, 21)


def test_the_first_code_is_in_the_low_bits() -> None:
    assert bits.pack(torch.tensor([1, 2, 3]), 4).tolist() == [0x21, 0x03]
    assert bits.pack(torch.tensor([7, 0, 1]), 3).tolist() == [0b01000111, 0]


def test_codes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="do not fit 2 bits"):
        bits.pack(torch.tensor([4]), 2)


# The same network


@pytest.mark.parametrize("method", METHODS)
def test_a_reloaded_network_is_the_same_bit_for_bit(method: str, tmp_path: Path) -> None:
    model = network(method, fold="aquant" in method or method == "adaround")
    again = through_a_file(model, tmp_path)
    for name, layer in quant_layers(model).items():
        assert torch.equal(quant_layers(again)[name].weight, layer.quantized_weight()), name
    x = images(8)
    with torch.no_grad():
        assert torch.equal(again(x), model(x))
        channels_last = x.to(memory_format=torch.channels_last)
        assert torch.equal(again(channels_last), model(channels_last))


@pytest.mark.parametrize("widths", [Bits(2, 2), Bits(3, 5), Bits(4, 32), Bits(32, 4)])
def test_widths_and_float_operands_survive(widths: Bits, tmp_path: Path) -> None:
    model = network("lsq", widths)
    again = through_a_file(model, tmp_path)
    with torch.no_grad():
        assert torch.equal(again(images(4)), model(images(4)))


def test_a_float_network_survives(tmp_path: Path) -> None:
    model = ResNet(num_classes=10, **MODEL).eval()  # type: ignore[arg-type]
    again = through_a_file(model, tmp_path)
    with torch.no_grad():
        assert torch.equal(again(images(4)), model(images(4)))


def test_adapters_in_float16_are_rounded_and_nothing_else(tmp_path: Path) -> None:
    model = network("asq+post")
    packed = packed_of(model, adapters=torch.float16)
    write(packed, tmp_path / "x.safetensors")
    again = restore(read(tmp_path / "x.safetensors"))
    ours = model.state_dict()
    for name, value in again.state_dict().items():
        if ".adapter." in name:
            assert torch.equal(value, ours[name].half().float()), name
    full = packed_of(model)
    halved = {n: t for n, t in packed.tensors.items() if n.endswith(".a.adapter")}
    assert len(halved) == len(packed.header.layers) - 2  # first and last have none
    assert all(t.numel() * 2 == t.numel() * t.element_size() for t in halved.values())
    kept = set(packed.tensors) - set(halved)
    assert all(torch.equal(packed.tensors[name], full.tensors[name]) for name in kept)


def test_only_an_adapter_may_be_float16(tmp_path: Path) -> None:
    packed = packed_of(network("lsq"))
    bias = packed.tensors["linear.bias"].half()
    write(Packed(packed.header, {**packed.tensors, "linear.bias": bias}), tmp_path / "x")
    with pytest.raises(CheckpointError, match=r"'linear.bias' is torch\.float16"):
        read(tmp_path / "x")


def test_packing_leaves_the_network_as_it_was() -> None:
    model = network("adq")
    before = copy.deepcopy(model.state_dict())
    packed_of(model)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


# Size


@pytest.mark.parametrize("method", METHODS)
def test_the_tensors_are_as_large_as_the_accounting_says(method: str) -> None:
    model = network(method, fold="aquant" in method)
    packed = packed_of(model)
    data = sum(t.numel() * t.element_size() for t in packed.tensors.values())
    counted = account(model, trace(model, SHAPE)).size_bytes
    # The accounting counts a batch norm as four vectors, the file has two.
    norms = sum(t.numel() // 2 for n, t in packed.tensors.items() if n.endswith(".affine"))
    assert data == counted - 8 * norms


def test_codes_take_their_true_width() -> None:
    packed = packed_of(network("lsq", Bits(3, 4)))
    for entry in packed.header.layers[1:-1]:
        count = torch.Size(entry.shape).numel()
        assert packed.tensors[f"{entry.name}.w.codes"].numel() == -(-count * 3 // 8)


# Refusals


@pytest.mark.parametrize(("width", "dtype"), [(8, torch.int8), (9, torch.int16)])
def test_a_zero_point_takes_the_bytes_it_is_charged(width: int, dtype: torch.dtype) -> None:
    w = torch.randn(6, 4, 3, 3) + 0.5
    q = Nearest(width, shape=w.shape, per_channel=True)
    q.calibrate(w)
    _, _, parts = encode(q, w, "conv")
    assert parts["zero"].dtype == dtype
    assert sum(t.numel() * t.element_size() for t in parts.values()) == q.extra_bytes()


@pytest.mark.parametrize(("width", "dtype"), [(8, torch.int8), (9, torch.int16)])
def test_a_zero_point_of_inputs_is_read_back_from_end_to_end(
    width: int, dtype: torch.dtype
) -> None:
    q = Nearest(width, shape=(3,))
    for zero in (q.qmin, 1, q.qmax):
        q.zero.fill_(zero)
        entry, tensors = inputs.describe(q, "linear")
        assert tensors["zero"].dtype == dtype
        again = inputs.make(entry, (3,))
        assert inputs.state(entry, again, tensors)["zero"] == zero


def test_an_adapter_beyond_float16_is_refused_by_the_name_of_its_layer() -> None:
    q = ASQ(4, shape=(8, 3, 3))
    with torch.no_grad():
        next(q.parameters()).fill_(1.0)
        q.adapter[-1].bias.fill_(1e5)  # type: ignore[index, union-attr, operator]
    inputs.describe(q, "conv")
    with pytest.raises(ConfigError, match=r"the adapter of layer 'conv' is beyond torch\.float16"):
        inputs.describe(q, "conv", torch.float16)


def test_a_step_below_its_bound_is_stored_as_it_is_used() -> None:
    w = torch.randn(6, 4, 3, 3)
    q = LSQ(4, shape=w.shape)
    q.scale.data.fill_(-1.0)
    coding, codes, parts = encode(q, w, "conv")
    assert torch.equal(decode(coding, codes, parts), q(w))
    assert parts["scale"] > 0


def test_a_quantizer_that_does_not_keep_to_its_form_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Shifted(LSQ):
        def codes(self, x: Tensor) -> Tensor:
            return super().codes(x) - 1

    monkeypatch.setitem(CODERS, Shifted, CODERS[LSQ])
    w = torch.randn(6, 4, 3, 3)
    q = Shifted(4, shape=w.shape)
    q.calibrate(w)
    with pytest.raises(ConfigError, match="layer 'conv' differs from Shifted's"):
        encode(q, w, "conv")


def test_an_unknown_quantizer_is_named() -> None:
    class Mine(LSQ):
        pass

    model = network("lsq")
    layer: Any = model.get_submodule("linear")
    layer.weight_quantizer.__class__ = Mine
    with pytest.raises(ConfigError, match="layer 'linear' has weights of Mine, which has no"):
        packed_of(model)


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "torch.hub.load",
        "qexp.models.load.fetch_weights",
        "qexp.models.resnet.F.relu",
        "torchvision.models.get_model",
        "torchvision.models._api.get_model",
        "torchvision.models.resnet",
    ],
)
def test_only_models_may_be_named(target: str, tmp_path: Path) -> None:
    assert not allowed(target)
    packed = packed_of(network("lsq"))
    with pytest.raises(ConfigError, match="neither of qexp nor a classifier"):
        restore(Packed(parse(changed(packed, target=target)), packed.tensors))


def test_classifiers_of_torchvision_may_be_named() -> None:
    assert allowed("torchvision.models.resnet18")
    assert allowed("torchvision.models.mobilenet_v2")
    assert not allowed("torchvision.models.detection.fasterrcnn_resnet50_fpn")


def changed(packed: Packed, **fields: Any) -> str:
    return json.dumps({**json.loads(packed.header.to_json()), **fields})


HOSTILE: dict[str, tuple[dict[str, Any], str]] = {
    "version": ({"version": 2}, "it is of version 2, this qexp reads 1"),
    "format": ({"format": "other"}, "it has no qexp-packed header"),
    "true is no version": ({"version": True}, "it is of version True, this qexp reads 1"),
    "extra field": ({"surprise": 1}, "its header must have the fields data, "),
    "classes": ({"num_classes": 10**12}, "num_classes must be an integer from 1 to 65536"),
    "negative": ({"num_classes": -1}, "num_classes must be an integer from 1 to 65536"),
    "image": ({"input_shape": [3, 10**9, 8]}, "input_shape must be an integer from 1 to 65536"),
    "plane": ({"input_shape": [3, 8]}, "input_shape must have 3 dimensions"),
    "depth": ({"keywords": {"depth": 10**9}}, "keywords.depth must be from -1000 to 1000"),
    "width": ({"keywords": {"depth": 8, "width": 1e30}}, "keywords.width must be from -1000 to"),
    "nested": ({"keywords": {"depth": {"_target_": "os.system"}}}, "keywords.depth must be a num"),
    "unknown keyword": ({"keywords": {"depth": 8, "dept": 8}}, "has no keyword 'dept'"),
    "weights": ({"keywords": {"depth": 8, "weights": "DEFAULT"}}, "would load weights that no run"),
    "pretrained": (
        {"target": "torchvision.models.resnet18", "keywords": {"pretrained": True}},
        "would load weights that no run records",
    ),
    "number": ({"keywords": {"depth": 8, "width": 1001}}, "keywords.width must be from -1000 to"),
    "list": ({"keywords": {"depth": [8]}}, "the model cannot be built"),
    "no object": ({"keywords": [8]}, "keywords must be an object"),
    "layers": (
        {"layers": [{"name": "../../x", "shape": [4, 4], "weight": None, "input": None}]},
        "the model has no layer '../../x'",
    ),
    "shape": (
        {"layers": [{"name": "linear", "shape": [65536] * 4, "weight": 0, "input": 0}]},
        "shape must have at most 1099511627776 elements",
    ),
    "another shape": (
        {"layers": [{"name": "linear", "shape": [10, 33], "weight": None, "input": None}]},
        "layer 'linear' of the model has another shape",
    ),
    "index": (
        {"layers": [{"name": "linear", "shape": [10, 32], "weight": 99, "input": 0}]},
        "layer 'linear' has an index beyond its list",
    ),
    "bool index": (
        {"layers": [{"name": "linear", "shape": [10, 32], "weight": True, "input": 0}]},
        "weight must be an integer from 0 to 10000",
    ),
    "norms": ({"norms": ["bn1", "bn1"]}, "it names a layer twice"),
    "a norm that is a layer": ({"norms": ["conv1"]}, "it names a layer twice"),
    "no such norm": ({"norms": ["bn9"]}, "the model has no batch norm 'bn9'"),
    "kind": (
        {"inputs": [{"kind": "os", "bits": 4, "signed": True, "keywords": {}}]},
        "it has inputs of an unknown kind",
    ),
    "bits": (
        {"inputs": [{"kind": "lsq", "bits": 64, "signed": True, "keywords": {}}]},
        "bits must be an integer from 1 to 16",
    ),
    "sign": (
        {"inputs": [{"kind": "lsq", "bits": 4, "signed": 1, "keywords": {}}]},
        "signed must be true or false",
    ),
    "no weights": ({"weights": []}, "layer 'conv1' has an index beyond its list"),
    "nameless": ({"target": ""}, "target must be a name"),
    "no list": ({"layers": {}}, "layers must be a list of at most 10000 items"),
}


@pytest.mark.parametrize(("fields", "message"), HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_header_is_refused(fields: dict[str, Any], message: str) -> None:
    packed = packed_of(network("lsq"))
    with pytest.raises(FormatError) as error:
        restore(Packed(parse(changed(packed, **fields)), packed.tensors))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["{", "[" * 10**5, '{"format": NaN}', '{"format": -Infinity}'])
def test_a_header_that_is_not_json_is_refused(text: str) -> None:
    with pytest.raises(FormatError, match="its header is not JSON"):
        parse(text)


@pytest.mark.parametrize(
    ("coding", "message"),
    [
        ({"form": "pickle"}, "it has weights of an unknown form"),
        ({"grid": (0.0, 1.0)}, "it has a grid of another length than its levels"),
        ({"form": "table"}, "it has a grid of another length than its levels"),
        ({"offset": "1"}, "offset must be a number"),
    ],
)
def test_a_coding_that_is_none_is_refused(coding: dict[str, Any], message: str) -> None:
    header = packed_of(network("lsq")).header
    wrong = replace(header, weights=(replace(header.weights[0], **coding), *header.weights[1:]))
    with pytest.raises(FormatError, match=message):
        parse(wrong.to_json())


def test_an_index_one_beyond_its_list_is_refused() -> None:
    header = packed_of(network("lsq")).header
    for beyond in ({"weight": len(header.weights)}, {"input": len(header.inputs)}):
        first = replace(header.layers[0], **beyond)
        with pytest.raises(FormatError, match="has an index beyond its list"):
            parse(replace(header, layers=(first, *header.layers[1:])).to_json())


def test_more_levels_than_codes_of_their_width_are_refused() -> None:
    header = packed_of(network("lsq")).header
    first = replace(header.weights[0], levels=2 ** header.weights[0].width + 1)
    with pytest.raises(FormatError, match="levels must be an integer from 1 to 256"):
        parse(replace(header, weights=(first, *header.weights[1:])).to_json())


CODES = "conv1.w.codes"
MISFITS: dict[str, tuple[dict[str, Any], str]] = {
    "missing": ({"linear.bias": None}, "the model has a tensor the file lacks, 'linear.bias'"),
    "extra": ({"surprise": torch.zeros(1)}, "the model has no place for 'surprise'"),
    "norm": ({"bn1.affine": torch.zeros(2, 1000)}, "batch norm 'bn1' has no gain and bias of its"),
    "shape": ({"linear.bias": torch.zeros(3)}, "tensor 'linear.bias' has shape [3]"),
    "codes": ({CODES: lambda t: t[:-1]}, "layer 'conv1': 215 bytes cannot hold 216 codes of 8 bit"),
    "no codes": ({CODES: None}, "layer 'conv1' has no codes"),
    "floats": ({CODES: lambda t: t.float()}, "layer 'conv1' has no codes"),
    "dtype": (
        {"conv1.w.scale": torch.tensor([1], dtype=torch.int8)},
        "conv1.w.scale is torch.int8",
    ),
    "long": ({"conv1.w.scale": torch.ones(3)}, "tensor conv1.w.scale has shape [3]"),
    "scalar": ({"conv1.w.scale": torch.tensor(1.0)}, "tensor conv1.w.scale has shape []"),
    "form": ({"conv1.w.gain": torch.ones(1)}, "layer 'conv1' has other tensors than its form"),
    "input": ({"conv1.a.scale": None}, "(an input of kind lsq has scale)"),
}


@pytest.mark.parametrize(("change", "message"), MISFITS.values(), ids=MISFITS.keys())
def test_tensors_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    packed = packed_of(network("lsq"))
    tensors = dict(packed.tensors)
    for name, value in change.items():
        made = value(tensors[name]) if callable(value) and value is not None else value
        tensors = {k: t for k, t in {**tensors, name: made}.items() if t is not None}
    with pytest.raises(FormatError) as error:
        restore(Packed(packed.header, tensors))
    assert message in str(error.value)


@pytest.mark.parametrize("zero", [torch.tensor(0.5), torch.tensor(100, dtype=torch.int8)])
def test_a_zero_point_that_is_none_is_refused(zero: Tensor) -> None:
    torch.manual_seed(0)
    model = ResNet(num_classes=10, **MODEL).eval()  # type: ignore[arg-type]
    layers = trace(model, SHAPE)
    chosen = {layer.name: Bits(4, 4) for layer in layers}
    quantize_(model, layers, chosen, LSQ, Nearest, LSQ, Nearest)
    calibrate_(model, images())
    packed = packed_of(model)
    name = next(n for n in packed.tensors if n.endswith(".a.zero"))
    with pytest.raises(FormatError, match="zero point"):
        restore(Packed(packed.header, {**packed.tensors, name: zero}))


def test_a_zero_point_of_weights_is_of_signed_integers() -> None:
    packed = packed_of(network("nearest"))
    name = next(n for n in packed.tensors if n.endswith(".w.zero"))
    zero = packed.tensors[name].abs().to(torch.uint8)
    with pytest.raises(FormatError, match=r"\.w\.zero is torch\.uint8"):
        restore(Packed(packed.header, {**packed.tensors, name: zero}))


def test_more_bits_than_the_levels_take_are_refused() -> None:
    header = packed_of(network("lsq")).header
    first = header.weights[0]
    wider = replace(header, weights=(replace(first, width=first.width + 1), *header.weights[1:]))
    with pytest.raises(FormatError, match=r"codes of 256 levels take 8 bits, not 9"):
        parse(wider.to_json())


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("scale", -1.0, "scale is negative"),
        ("zero", -9.0, "zero is outside -8 to 7"),
        ("zero", 8.0, "zero is outside -8 to 7"),
    ],
)
def test_a_step_or_a_zero_point_that_no_quantizer_has_is_refused(
    key: str, value: float, message: str
) -> None:
    packed = packed_of(network("nearest"))
    name = f"layer1.0.conv1.w.{key}"
    wrong = packed.tensors[name].clone()
    wrong[-1] = value
    with pytest.raises(FormatError, match=message):
        restore(Packed(packed.header, {**packed.tensors, name: wrong}))


def test_a_bias_of_another_size_is_refused_where_the_bare_model_has_none() -> None:
    packed = packed_of(network("lsq", fold=True))
    assert packed.tensors["conv1.bias"].shape == (8,)
    wrong = {**packed.tensors, "conv1.bias": torch.zeros(1)}
    with pytest.raises(FormatError, match=r"'conv1\.bias'"):
        restore(Packed(packed.header, wrong))


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_a_tensor_that_is_not_finite_is_refused(value: float, tmp_path: Path) -> None:
    packed = packed_of(network("lsq"))
    bias = packed.tensors["linear.bias"].clone()
    bias[3] = value
    write(Packed(packed.header, {**packed.tensors, "linear.bias": bias}), tmp_path / "x")
    with pytest.raises(CheckpointError, match=r"tensor 'linear\.bias' is not finite"):
        read(tmp_path / "x")


class Grouped(nn.Module):
    """A convolution of groups, whose input's quantizer sees all channels."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8, eps=0.25)
        self.conv, self.fc = nn.Conv2d(8, 8, 3, groups=4), nn.Linear(8, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(torch.relu(self.norm(self.stem(x)))).mean((2, 3)))


@pytest.mark.parametrize("method", ["asq+post", "aquant"])
def test_groups_and_the_epsilon_of_a_norm_survive(method: str) -> None:
    torch.manual_seed(0)
    model: Any = Grouped(10).eval()
    nn.init.normal_(model.norm.running_mean)
    layers = trace(model, SHAPE)
    quantize_(model, layers, {layer.name: Bits(4, 4) for layer in layers}, *METHODS[method])
    calibrate_(model, images())
    packed = packed_of(model)
    text = changed(packed, target=f"{__name__}.Grouped", keywords={})
    restored = restore(Packed(parse(text), packed.tensors), trust=True)
    with torch.no_grad():
        assert torch.equal(restored(images()), model(images()))


def test_a_users_model_may_have_lists_and_larger_numbers() -> None:
    packed = packed_of(network("lsq"))
    keywords = {"hidden": 2048, "layers": [2, 2], "stages": [[6, 24], [6, 32]], "name": "a"}
    header = parse(changed(packed, target="mine.Net", keywords=keywords))
    assert header.keywords == keywords
    for wrong in ({"hidden": 10**9}, {"layers": [10**9]}, {"layers": [[[[2]]]]}, {"a": {"b": 1}}):
        with pytest.raises(FormatError, match="keywords"):
            parse(changed(packed, target="mine.Net", keywords=wrong))


class Constants(nn.Module):
    """A network that multiplies by what its constructor made and no state holds."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, num_classes)
        self.register_buffer("shrink", 0.5 * torch.ones(1, 4, 1, 1), persistent=False)
        self.thrice = torch.full((4,), 3.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc((self.conv(x) * self.shrink).mean((2, 3)) * self.thrice)


def test_a_trusted_model_keeps_the_constants_of_its_constructor() -> None:
    torch.manual_seed(0)
    model = Constants(10).eval()
    layers = trace(model, SHAPE)
    quantize_(model, layers, {layer.name: Bits(4, 4) for layer in layers}, LSQ, LSQ)
    calibrate_(model, images())
    text = changed(packed_of(model), target=f"{__name__}.Constants", keywords={})
    restored = restore(Packed(parse(text), packed_of(model).tensors), trust=True)
    with torch.no_grad():
        assert torch.equal(restored(images()), model(images()))


@pytest.mark.parametrize("target", ["torchvision.models.maxvit_t", "torchvision.models.MaxVit"])
def test_a_model_of_torchvision_may_have_lists(target: str) -> None:
    packed = packed_of(network("lsq"))
    keywords = {"input_size": [224, 224], "inverted_residual_setting": [[1, 16, 1, 1], [6, 24, 2]]}
    assert parse(changed(packed, target=target, keywords=keywords)).keywords == keywords
    large = {"target": target, "keywords": {"mlp_dim": 3072}}
    if allowed(target):  # built without the user's word
        with pytest.raises(FormatError, match=r"keywords\.mlp_dim must be from -1000 to 1000"):
            parse(changed(packed, **large))
        with pytest.raises(FormatError, match=r"keywords\.depths must have at most 100 items"):
            parse(changed(packed, target=target, keywords={"depths": [[2] * 20] * 6}))
    else:
        assert parse(changed(packed, **large)).keywords == {"mlp_dim": 3072}


class Buffers(nn.Module):
    """A network whose state holds tensors of every type."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, num_classes)
        self.register_buffer("order", torch.tensor([3, 0, 2, 1]))
        self.register_buffer("kept", torch.tensor([True, True, False, True]))
        self.register_buffer("small", torch.tensor([-3, 1, 2, 1], dtype=torch.int8))
        self.register_buffer("count", torch.tensor(2**20 + 1, dtype=torch.int32))
        self.register_buffer("third", torch.full((4,), 1 / 3, dtype=torch.float64))
        self.register_buffer("halves", torch.tensor([0.5, 0.25, 1, 3], dtype=torch.bfloat16))

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x).mean((2, 3))[:, self.order] * self.kept * self.small / self.count
        return self.fc((y.double() * self.third).float() * self.halves.float())


def packed_buffers() -> tuple[nn.Module, Packed]:
    """The network with other values than its constructor's, and its file."""
    torch.manual_seed(0)
    model: Any = Buffers(10).eval()
    layers = trace(model, SHAPE)
    quantize_(model, layers, {layer.name: Bits(4, 4) for layer in layers}, LSQ, LSQ)
    calibrate_(model, images())
    model.order.copy_(torch.tensor([1, 2, 3, 0]))
    packed = packed_of(model)
    text = changed(packed, target=f"{__name__}.Buffers", keywords={})
    return model, Packed(parse(text), packed.tensors)


def test_buffers_survive_in_their_own_type(tmp_path: Path) -> None:
    model, packed = packed_buffers()
    write(packed, tmp_path / "x.safetensors")
    restored = restore(read(tmp_path / "x.safetensors"), trust=True)
    for name, value in model.named_buffers(recurse=False):
        again = restored.get_buffer(name)
        assert torch.equal(again, value), name
        assert again.dtype == (torch.float32 if name == "halves" else value.dtype), name
    with torch.no_grad():
        assert torch.equal(restored(images()), model(images()))
    data = sum(t.numel() * t.element_size() for t in packed.tensors.values())
    assert data == account(model, trace(model, SHAPE)).size_bytes


def test_a_file_of_before_has_a_float64_buffer_as_float32() -> None:
    _, packed = packed_buffers()
    packed.tensors["third"] = packed.tensors["third"].float()  # type: ignore[index]
    assert restore(packed, trust=True).get_buffer("third").dtype == torch.float32


@pytest.mark.parametrize(
    "name", ["order", "kept", "halves", "fc.bias", "fc.w.scale", "conv.a.scale"]
)
@pytest.mark.parametrize("dtype", [torch.int32, torch.float64])
def test_a_tensor_of_another_type_is_refused(name: str, dtype: torch.dtype) -> None:
    _, packed = packed_buffers()
    packed.tensors[name] = packed.tensors[name].to(dtype)  # type: ignore[index]
    with pytest.raises(FormatError, match=rf"{name}'? is {dtype}"):
        restore(packed, trust=True)


def test_state_that_no_file_has_a_place_for_is_named() -> None:
    model = network("lsq")
    model.register_buffer("phase", torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(ConfigError, match=r"'phase' is torch\.complex64, which no file"):
        packed_of(model)


def maxvit(num_classes: int) -> MaxVit:
    sizes: Any = {"input_size": (32, 32), "stem_channels": 8, "partition_size": 2, "head_dim": 4}
    blocks: Any = {"block_channels": [8, 16], "block_layers": [1, 1], "stochastic_depth_prob": 0.0}
    return MaxVit(**sizes, **blocks, num_classes=num_classes)


def test_a_maxvit_is_packed_and_built_again_without_storage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model, x = maxvit(10).eval(), torch.randn(4, 3, 32, 32)
    layers = trace(model, (3, 32, 32))
    quantize_(model, layers, {layer.name: Bits(4, 4) for layer in layers}, LSQ, ASQ)
    calibrate_(model, x)
    target = f"{__name__}.maxvit"
    monkeypatch.setattr("qexp.export.header.OURS", {target})
    data = {"name": "synthetic", "mean": [0.5] * 3, "std": [0.25] * 3}
    shape = (3, 32, 32)
    packed = pack_network(
        model, target=target, keywords={}, num_classes=10, input_shape=shape, data=data
    )
    write(packed, tmp_path / "x.safetensors")
    again = restore(read(tmp_path / "x.safetensors"))
    indices = {n: b for n, b in model.named_buffers() if n.endswith("relative_position_index")}
    assert len(indices) == 4
    assert all(torch.equal(again.get_buffer(n), b) for n, b in indices.items())
    with torch.no_grad():
        assert torch.equal(again(x), model(x))
    stored = sum(t.numel() * t.element_size() for t in packed.tensors.values())
    norms = sum(t.numel() // 2 for n, t in packed.tensors.items() if n.endswith(".affine"))
    assert stored == account(model, layers).size_bytes - 8 * norms


class TwoNames(nn.Module):
    """A network that holds a layer and its norm under two names, and calls them by either."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.stem, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, num_classes)
        self.conv, self.norm = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
        self.body = nn.Sequential(self.conv, self.norm, nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(self.stem(x)).mean((2, 3)))


@pytest.mark.parametrize("fold", [False, True])
def test_a_layer_of_two_names_is_packed_once_and_restored_under_both(fold: bool) -> None:
    torch.manual_seed(0)
    model = TwoNames(10).eval()
    if fold:
        fold_bn_(model)
    layers = trace(model, SHAPE)
    quantize_(model, layers, {layer.name: Bits(4, 4) for layer in layers}, LSQ, LSQ)
    calibrate_(model, images())
    packed = packed_of(model)
    text = changed(packed, target=f"{__name__}.TwoNames", keywords={})
    restored = restore(Packed(parse(text), packed.tensors), trust=True)
    integers: Any = integer_network(Packed(parse(text), packed.tensors), trust=True)
    assert restored.body[0] is restored.conv  # type: ignore[index]
    assert integers.body[0] is integers.conv  # what forward calls multiplies integers
    with torch.no_grad():
        assert torch.equal(restored(images()), model(images()))


def test_a_code_beyond_the_levels_is_refused() -> None:
    packed = packed_of(network("adq"))  # 15 levels in 4 bits
    name = next(e.name for e in packed.header.layers[1:])
    codes = packed.tensors[f"{name}.w.codes"]
    with pytest.raises(FormatError, match="codes beyond its levels"):
        restore(Packed(packed.header, {**packed.tensors, f"{name}.w.codes": codes | 0xFF}))


def test_damage_is_seen_before_anything_is_built(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write(packed_of(network("lsq")), path)
    blob = bytearray(path.read_bytes())
    blob[-7] ^= 1
    path.write_bytes(bytes(blob))
    with pytest.raises(CheckpointError, match=r"are not those that were written \(sha256\)"):
        read(path)
    path.write_bytes(bytes(blob[: len(blob) // 2]))
    with pytest.raises(CheckpointError, match="it is truncated or not a safetensors file"):
        read(path)


def rewritten(blob: bytes, entries: dict[str, Any]) -> bytes:
    """The file with another safetensors JSON."""
    length = int.from_bytes(blob[:8], "little")
    head = json.dumps(entries).encode()
    head += b" " * (-len(head) % 8)
    return len(head).to_bytes(8, "little") + head + blob[8 + length :]


def test_the_digest_is_of_header_names_and_tensors(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write(packed_of(network("lsq")), path)
    blob = path.read_bytes()
    length = int.from_bytes(blob[:8], "little")
    entries = json.loads(blob[8 : 8 + length])
    metadata = entries.pop("__metadata__")
    own = hashlib.sha256(metadata["qexp"].encode())
    for name in sorted(entries, key=lambda n: (*entries[n]["data_offsets"], n)):
        shape = str(entries[name]["shape"]).replace(" ", "")
        own.update(f"{name} {entries[name]['dtype']} {shape}\n".encode())
    own.update(blob[8 + length :])
    assert metadata["sha256"] == own.hexdigest()


def test_a_file_whose_tensors_changed_their_names_is_refused(tmp_path: Path) -> None:
    """Two of equal length: the bytes are all there, but not of these layers."""
    path = tmp_path / "x.safetensors"
    write(packed_of(network("lsq")), path)
    blob = path.read_bytes()
    entries = json.loads(blob[8 : 8 + int.from_bytes(blob[:8], "little")])
    a, b = "layer1.0.conv1.w.codes", "layer1.0.conv2.w.codes"
    assert entries[a]["shape"] == entries[b]["shape"]
    entries[a], entries[b] = entries[b], entries[a]
    path.write_bytes(rewritten(blob, entries))
    with pytest.raises(CheckpointError, match=r"are not those that were written \(sha256\)"):
        read(path)


def test_a_file_signed_without_names_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    packed = packed_of(network("lsq"))
    write(packed, path)
    blob = path.read_bytes()
    length = int.from_bytes(blob[:8], "little")
    entries = json.loads(blob[8 : 8 + length])
    text = entries["__metadata__"]["qexp"]
    old = hashlib.sha256(text.encode() + blob[8 + length :]).hexdigest()
    path.write_bytes(rewritten(blob, {**entries, "__metadata__": {"qexp": text, "sha256": old}}))
    assert read(path).tensors.keys() == packed.tensors.keys()


def test_a_model_that_is_not_installed_is_no_fault_of_the_file(tmp_path: Path) -> None:
    packed = packed_of(network("lsq"))
    own = Packed(replace(packed.header, target="not_installed_here.Net"), packed.tensors)
    with pytest.raises(ConfigError, match="Install the package or run from the folder that holds"):
        restore(own, trust=True)


def test_the_tensors_of_a_file_begin_at_a_multiple_of_eight() -> None:
    packed = packed_of(network("lsq"))
    for n in range(1, 9):
        header = replace(packed.header, data={**packed.header.data, "name": "x" * n})
        blob = to_bytes(Packed(header, packed.tensors))
        assert int.from_bytes(blob[:8], "little") % 8 == 0


# Commands


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A finished tiny run: one step of training."""
    import compose

    from qexp.recipes.qat import qat
    from qexp.runner.run import open_run

    overrides = ("quantizer=asq", "max_steps=1", "model.checkpoint=none", "recipe.epochs=1")
    cfg = compose.tiny(tmp_path, *overrides)
    with open_run(Path(cfg.folder), cfg) as run:
        run.finish(qat(cfg, run))
    return Path(cfg.folder)


def test_a_model_of_ones_own_is_scored_with_the_users_word_alone(qexp: Qexp) -> None:
    import compose

    words = [word for word in compose.TINY if not word.startswith("model")]
    own = ("model=custom", f"model._target_={__name__}.Grouped", "model.name=own")
    more = ("model.checkpoint=none", "quantizer=lsq", "max_steps=1", "folder=run")
    assert qexp("train", *words, *own, *more).code == 0
    said = qexp("export", "run=run")
    line = f"packed: {__name__}.Grouped is your own model: qexp eval needs trust=true\n"
    assert (said.code, line in said.out) == (0, True)
    ran = qexp("eval", "run=run", "device=cpu").out.split(" | ")
    for engine in ("float", "integer"):
        file = ("eval", "run=run", "checkpoint=model.safetensors", f"engine={engine}", "device=cpu")
        said = qexp(*file)
        assert (said.code, said.out) == (2, "")
        assert said.err.endswith("If you trust it: trust=true\n")
        assert qexp(*file, "trust=true").out.split(" | ")[0] == ran[0]


def test_a_network_that_no_file_can_describe_is_refused() -> None:
    model = network("lsq")
    line = (
        r"cannot be described in a file: keywords\.width must be .*Write a function that builds it"
    )
    with pytest.raises(ConfigError, match=line):
        pack_network(
            model,
            target=TARGET,
            keywords={"depth": 8, "width": 1e30},
            num_classes=10,
            input_shape=SHAPE,
            data={"name": "synthetic", "mean": [0.5] * 3, "std": [0.25] * 3},
        )
    model.get_submodule("bn1").running_mean = None  # type: ignore[assignment]
    with pytest.raises(ConfigError, match="batch norm 'bn1' has no running statistics"):
        packed_of(model)


@pytest.mark.parametrize("metadata", [{}, {"qexp": "{}"}, {"qexp": "["}])
def test_a_safetensors_file_of_others_is_no_packed_file(
    tmp_path: Path, metadata: dict[str, str]
) -> None:
    from safetensors.torch import save_file

    save_file({"weight": torch.ones(2)}, tmp_path / "x.safetensors", metadata or None)
    why = (
        "its header is not JSON" if metadata.get("qexp") == "[" else "it has no qexp-packed header"
    )
    with pytest.raises(CheckpointError, match=f"that can be read: {why}. Export it again."):
        read(tmp_path / "x.safetensors")


def test_what_float16_adapters_change_is_said(qexp: Qexp, run_folder: Path) -> None:
    said = qexp("export", f"run={run_folder}", "adapters=float16")
    assert said.code == 0, said.err
    assert "packed: adapters in float16: on " in said.out
    assert "have another top-1" in said.out


def test_an_exported_run_evaluates_to_the_same_top1(
    qexp: Qexp, run_folder: Path, capsys: pytest.CaptureFixture
) -> None:
    capsys.readouterr()  # what training said
    said = qexp("export", f"run={run_folder}")
    assert said.code == 0, said.err
    file = run_folder / "model.safetensors"
    assert said.out.startswith(f"packed: {file} | {file.stat().st_size:,} bytes")
    ran = qexp("eval", f"run={run_folder}", "device=cpu").out.split(" | ")
    said = qexp("eval", f"run={run_folder}", f"checkpoint={file}", "device=cpu")
    assert said.code == 0, said.err
    assert ran[:2] == said.out.split(" | ")[:2]
    alone = qexp("eval", f"checkpoint={file}", "device=cpu")  # synthetic, but of other sizes
    assert alone.code == 1
    assert "Give the run it was trained in: run=FOLDER" in alone.err
    assert alone.err.startswith("warning: images of 'synthetic' depend on settings")


def test_a_file_away_from_its_run_is_scored_without_a_word_about_a_run(
    qexp: Qexp, run_folder: Path, tmp_path: Path
) -> None:
    assert qexp("export", f"run={run_folder}").code == 0
    file = (run_folder / "model.safetensors").rename(tmp_path / "x.safetensors")
    said = qexp("eval", f"run={run_folder}", f"checkpoint={file}", "device=cpu")
    assert (said.code, said.err) == (0, "")


def test_the_score_of_a_run_that_is_not_done_says_so(qexp: Qexp, run_folder: Path) -> None:
    (run_folder / "status.json").write_text('{"state": "interrupted"}')
    said = qexp("eval", f"run={run_folder}", "device=cpu")
    assert (said.code, said.err) == (0, "warning: that run is interrupted, not done\n")


def test_a_run_without_its_status_is_exported(qexp: Qexp, run_folder: Path) -> None:
    (run_folder / "status.json").unlink()
    said = qexp("export", f"run={run_folder}")
    assert (said.code, said.err) == (0, "")


def test_a_run_of_another_normalisation_does_not_score_a_file(
    qexp: Qexp, run_folder: Path, tmp_path: Path
) -> None:
    assert qexp("export", f"run={run_folder}").code == 0
    packed = read(run_folder / "model.safetensors")
    data = {**packed.header.data, "std": [0.5] * 3}
    write(Packed(replace(packed.header, data=data), packed.tensors), tmp_path / "x.safetensors")
    said = qexp("eval", f"run={run_folder}", f"checkpoint={tmp_path}/x.safetensors", "device=cpu")
    assert said.code == 1
    assert "is for images of another std than" in said.err
    assert said.err.count("\n") == 1


def test_a_file_that_cannot_be_written_is_one_line_and_leaves_nothing(
    qexp: Qexp, run_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "x.safetensors").mkdir()
    said = qexp("export", f"run={run_folder}", f"file={tmp_path}/x.safetensors")
    assert said.code == 2
    assert said.err.startswith("export: file must be a name in a folder that exists")
    said = qexp("export", f"run={run_folder}", "file=/proc/x.safetensors")
    assert said.code == 1
    assert said.err.startswith("export: '/proc/x.safetensors' cannot be written (")
    assert said.err.endswith("Set file=... to another place.\n")
    with pytest.raises(IsADirectoryError):
        write_bytes(tmp_path / "x.safetensors", b"")
    assert not list(tmp_path.glob(".*.tmp"))


def _on_images(run_folder: Path, root: Path, dataset: str = "imagefolder", **keywords: Any) -> None:
    """Let a run's config say that its images are files below `root`."""
    path = run_folder / "config.yaml"
    node = OmegaConf.load(path)
    node.dataset = OmegaConf.load(configs_dir() / "dataset" / f"{dataset}.yaml")
    node.dataset.update(root=str(root), **keywords)
    OmegaConf.save(node, path)


SMALL = {"crop": 8, "resize": 12, "workers": 0}


def test_the_data_set_of_a_run_may_have_moved(qexp: Qexp, run_folder: Path, tmp_path: Path) -> None:
    from test_image_folder import write_folder

    write_folder(tmp_path / "moved", classes=("a", "b", "c", "d"))
    _on_images(run_folder, tmp_path / "gone", **SMALL)
    said = qexp("eval", f"run={run_folder}", "device=cpu")
    assert "Set dataset.root=..." in said.err
    moved = f"dataset.root={tmp_path / 'moved'}"
    for arguments in (
        ("export", f"run={run_folder}", moved),
        ("eval", f"run={run_folder}", "device=cpu", moved),
        ("eval", f"run={run_folder}", "checkpoint=model.safetensors", "device=cpu", moved),
    ):
        said = qexp(*arguments)
        assert (said.code, said.err) == (0, ""), arguments


def test_a_runs_own_file_is_scored_not_its_namesake_here(
    qexp: Qexp, run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert qexp("export", f"run={run_folder}").code == 0
    (tmp_path / "model.safetensors").write_bytes(b"another's")
    monkeypatch.chdir(tmp_path)
    words = ("eval", f"run={run_folder}", "device=cpu")
    assert qexp(*words, "checkpoint=model.safetensors").code == 0
    (run_folder / "model.safetensors").unlink()  # now it can only be the one here
    said = qexp(*words, "checkpoint=model.safetensors")
    assert "model.safetensors' is not a packed" in said.err


@pytest.mark.parametrize("name", ["last.pt", "best.pt"])
def test_a_network_is_packed_without_its_images(
    qexp: Qexp, run_folder: Path, tmp_path: Path, name: str
) -> None:
    assert qexp("export", f"run={run_folder}", f"checkpoint={name}").code == 0
    file = run_folder / {"last.pt": "model.safetensors", "best.pt": "best.safetensors"}[name]
    expected = read(file)
    file.unlink()
    _on_images(run_folder, tmp_path / "gone", **SMALL)
    node = OmegaConf.load(run_folder / "config.yaml")
    node.dataset.update(name="synthetic", mean=[0.5] * 3, std=[0.25] * 3)  # as in the first file
    OmegaConf.save(node, run_folder / "config.yaml")
    for word in ("adapters=float16", "format=onnx_int8"):  # look at images
        said = qexp("export", f"run={run_folder}", f"checkpoint={name}", word)
        assert said.code == 1
        assert said.err.startswith("data: synthetic not found under ")
        assert not list(run_folder.glob("*.onnx")) + list(run_folder.glob("*.safetensors"))
    said = qexp("export", f"run={run_folder}", f"checkpoint={name}", "format=onnx")
    assert said.out.startswith("onnx: not compared with the run, for lack of its images\n")
    said = qexp("export", f"run={run_folder}", f"checkpoint={name}")
    assert (said.code, said.err) == (0, "")
    again = read(file)
    assert again.header == replace(expected.header, data=expected.header.data | {"resize": 12})
    torch.testing.assert_close(again.tensors, expected.tensors, rtol=0, atol=0)


def test_images_are_asked_for_where_neither_checkpoint_nor_class_know_the_sizes(
    qexp: Qexp, run_folder: Path, tmp_path: Path
) -> None:
    path = run_folder / "last.pt"
    state = checkpoint.load(path)
    sizes = {"num_classes": 4, "input_shape": [3, 8, 8], "class_names": []}
    assert state.pop("sizes") == sizes
    checkpoint.save(path, state)
    _on_images(run_folder, tmp_path / "gone", **SMALL)
    said = qexp("export", f"run={run_folder}")
    assert (said.code, said.err.startswith("data: ")) == (1, True)
    cfg = OmegaConf.create({"dataset": {"_target_": "qexp.data.folder.ImageNet", "crop": 64}})
    assert isinstance(cfg, DictConfig)
    known = without_images(cfg, {}, DataError("data: gone"))
    assert (known.num_classes, known.input_shape) == (1000, (3, 64, 64))


PHOTOS = ("a", "b", "c", "d")


def _photos(run_folder: Path, root: Path) -> None:
    """A run that was trained on photographs of these classes, which lie in `root`."""
    from test_image_folder import write_folder

    write_folder(root, classes=PHOTOS)
    _on_images(run_folder, root, **SMALL)
    for name in ("last.pt", "best.pt"):
        state = checkpoint.load(run_folder / name)
        state["sizes"]["class_names"] = list(PHOTOS)
        checkpoint.save(run_folder / name, state)


def test_a_file_says_how_a_photograph_is_cut_and_what_its_label_is_called(
    qexp: Qexp, run_folder: Path, tmp_path: Path
) -> None:
    _photos(run_folder, tmp_path / "photos")
    assert qexp("export", f"run={run_folder}").code == 0
    data = read(run_folder / "model.safetensors").header.data
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    wanted = {"name": "imagefolder", "mean": mean, "std": std, "resize": 12, "classes": [*PHOTOS]}
    assert data == wanted
    onnx = pytest.importorskip("onnx")
    assert qexp("export", f"run={run_folder}", "format=onnx").code == 0
    props = onnx.load(run_folder / "model.onnx").metadata_props
    assert {p.key: json.loads(p.value) for p in props} == wanted
    (tmp_path / "photos").rename(tmp_path / "gone")
    assert qexp("export", f"run={run_folder}", f"file={tmp_path}/x.safetensors").code == 0
    assert read(tmp_path / "x.safetensors").header.data == wanted


def test_labels_of_other_classes_are_not_scored(
    qexp: Qexp, run_folder: Path, tmp_path: Path
) -> None:
    _photos(run_folder, tmp_path / "photos")
    assert qexp("export", f"run={run_folder}").code == 0
    file = ("eval", f"run={run_folder}", f"checkpoint={run_folder}/model.safetensors", "device=cpu")
    assert qexp(*file).code == 0
    for part in ("train", "val"):
        (tmp_path / "photos" / part / "d").rename(tmp_path / "photos" / part / "b2")
    said = qexp(*file)
    assert (said.code, said.err.count("\n")) == (1, 1)
    assert "is for images of another list of classes than" in said.err
    said = qexp("eval", f"run={run_folder}", "device=cpu")
    assert (said.code, said.err.count("\n")) == (1, 1)
    assert "(label 2 is 'b2', there it was 'c')" in said.err
    assert qexp("export", f"run={run_folder}").err.startswith("checkpoint: ")


def test_a_file_alone_is_scored_on_images_cut_as_it_says(tmp_path: Path) -> None:
    from test_image_folder import write_folder

    write_folder(tmp_path)
    data = {"name": "imagefolder", "mean": [0.5] * 3, "std": [0.25] * 3, "resize": 300}
    assert _named_dataset(data, torch.device("cpu"), str(tmp_path)).resize == 300
    del data["resize"]
    assert _named_dataset(data, torch.device("cpu"), str(tmp_path)).resize == 256
    with pytest.raises(CheckpointError, match="the file's mean is not that of 'imagefolder'"):
        _named_dataset({**data, "mean": [0.5]}, torch.device("cpu"), str(tmp_path))
    with pytest.raises(CheckpointError, match="trained on 'mine', which is not one of qexp's data"):
        _named_dataset({**data, "name": "mine"}, torch.device("cpu"), None)


def test_a_run_of_another_resize_does_not_score_a_file(
    qexp: Qexp, run_folder: Path, tmp_path: Path
) -> None:
    _photos(run_folder, tmp_path / "photos")
    assert qexp("export", f"run={run_folder}").code == 0
    alone = ("eval", f"checkpoint={run_folder}/model.safetensors", "device=cpu")
    node = OmegaConf.load(run_folder / "config.yaml")
    node.dataset.resize = 16
    OmegaConf.save(node, run_folder / "config.yaml")
    said = qexp(*alone, f"run={run_folder}")
    assert (said.code, "is for images of another resize than" in said.err) == (1, True)


def test_two_files_of_a_network_are_the_same_bytes(tmp_path: Path) -> None:
    packed = packed_of(network("lsq"))
    assert len({to_bytes(packed) for _ in range(20)}) == 1
    blob = to_bytes(packed)
    length = int.from_bytes(blob[:8], "little")
    assert length % 8 == 0
    assert [*json.loads(blob[8 : 8 + length])["__metadata__"]] == ["qexp", "sha256"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"classes": ["a"] * 9}, "it names another number of classes than it has"),
        ({"classes": ["a\n"] * 10}, "a class must be a name"),
        ({"classes": "abcdefghij"}, "classes must be a list"),
        ({"resize": 0}, "resize must be an integer from 1"),
        ({"crop": 8}, "its data must have the fields"),
        ({"std": [1.0, 0.0, 1.0]}, "std must be above 0"),
        ({"std": [1.0]}, "its std is not one number for each channel of an image"),
        ({"mean": [0.5] * 4}, "its mean is not one number for each channel of an image"),
        ({"mean": [0.5, 0.5, 1e39]}, "mean is out of the range of float32"),
    ],
)
def test_a_header_with_odd_data_is_refused(change: dict, message: str) -> None:
    header = packed_of(network("lsq")).header
    text = replace(header, data={**header.data, **change}).to_json()
    with pytest.raises(FormatError, match=message):
        parse(text)


@pytest.mark.parametrize("name", ["New\u00a0York", "گربه\u200cها", "\N{WOMAN}\u200d\N{ROCKET}"])
def test_classes_are_named_in_any_script(name: str) -> None:
    header = packed_of(network("lsq")).header
    names = [name, *"bcdefghij"]
    text = replace(header, data={**header.data, "classes": names}).to_json()
    assert parse(text).data["classes"] == names


def test_wide_layers_and_small_adapters_are_described(tmp_path: Path) -> None:
    header = packed_of(network("asq+post")).header
    wide = replace(header.layers[-1], shape=(10, 81_920))
    inputs = [replace(i, keywords={**i.keywords, "reduction": 1100}) for i in header.inputs]
    text = replace(header, layers=(*header.layers[:-1], wide), inputs=tuple(inputs)).to_json()
    assert parse(text).layers[-1].shape == (10, 81_920)
    huge = replace(header.layers[-1], shape=(2**30, 2**30))
    with pytest.raises(FormatError, match="shape must have at most"):
        parse(replace(header, layers=(huge,)).to_json())


def test_a_data_set_without_files_has_no_place(qexp: Qexp, run_folder: Path) -> None:
    said = qexp("eval", f"run={run_folder}", "dataset.root=x", "device=cpu")
    assert said.code == 2
    assert said.err == "config: dataset.root=x: synthetic has no files. Leave it out.\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "export: no run given."),
        (("run=nowhere",), "export: 'nowhere' is not a run folder."),
        (("run=x", "format=zip"), "config: format must be"),
        (("run=x", "formt=packed"), "config: no key 'formt'"),
    ],
)
def test_wrong_arguments_are_one_line(qexp: Qexp, arguments: tuple[str, ...], message: str) -> None:
    said = qexp("export", *arguments)
    assert said.code in (1, 2)
    assert message in said.err
    assert said.err.count("\n") == 1


def test_an_onnx_file_is_not_scored(qexp: Qexp) -> None:
    said = qexp("eval", "run=x", "checkpoint=model.onnx")
    assert said.code == 2
    assert said.err.startswith("eval: qexp eval scores no ONNX file")


def test_a_missing_package_is_named(qexp: Qexp, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    hidden = lambda name, *a: None if name == "safetensors" else find(name, *a)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", hidden)
    monkeypatch.delitem(sys.modules, "safetensors", raising=False)
    said = qexp("export", "run=x")
    assert said.code == 2
    assert "needs the package 'safetensors'. Try: pip install 'qexp[export]'" in said.err


def test_a_file_that_is_none_is_one_line(qexp: Qexp, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"\x80\x04pickle")
    said = qexp("eval", "checkpoint=x.safetensors", "device=cpu")
    assert said.code == 1
    assert said.err == (
        "export: 'x.safetensors' is not a packed model that can be read: it is truncated or not a "
        "safetensors file. Export it again.\n"
    )


class Encoder(nn.Module):
    """Pixels as tokens, through torch's own encoder layer."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 4, 4)
        self.encoder = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True)
        self.fc = nn.Linear(16, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.encoder(self.patch(x).flatten(2).transpose(1, 2)).mean(1))


def test_torchs_encoder_layer_calls_its_quantized_layers_without_gradients_too() -> None:
    torch.manual_seed(0)
    model = Encoder(10).eval()
    layers = trace(model, SHAPE)
    assert [layer.name for layer in layers][1:3] == ["encoder.linear1", "encoder.linear2"]
    with torch.no_grad():
        exact = model(images())
        quantize_(model, layers, {layer.name: Bits(2, 2) for layer in layers[1:3]}, LSQ, LSQ)
        calibrate_(model, images())
        scored = model(images())
    expected = model(images().requires_grad_())
    assert not torch.allclose(exact, expected, atol=0.01)
    torch.testing.assert_close(scored, expected, atol=1e-6, rtol=1e-6)
    own = {"target": "test_export.Encoder", "keywords": {}, "num_classes": 10}
    packed = pack_network(
        model,
        input_shape=SHAPE,
        data={"name": "synthetic", "mean": [0.5] * 3, "std": [0.25] * 3},
        **own,  # type: ignore[arg-type]
    )
    for again in (restore(packed, trust=True), integer_network(packed, trust=True)):
        with torch.no_grad():
            torch.testing.assert_close(again(images()), expected, atol=1e-5, rtol=1e-5)
