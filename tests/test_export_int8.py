"""The int8 variant: integer kernels where it says so, and the error that it says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Qexp
from test_engine import WEIGHTS, weight
from test_export import SHAPE, images, network, packed_of, run_folder
from test_export_onnx import ViT, Windows, quantized, run
from torch import Tensor, nn

from qexp.engine.weight import Weight
from qexp.errors import ConfigError
from qexp.export.coding import Coding
from qexp.export.inputs import KINDS, Kind
from qexp.quant.asq import ASQ
from qexp.quant.convert import Bits, calibrate_, quantize_
from qexp.quant.lsq import LSQ
from qexp.quant.modules import QuantConv2d, QuantLinear
from qexp.quant.quantizer import Quantizer
from qexp.quant.trace import trace

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

from qexp.export.onnx_graph import Graph  # noqa: E402
from qexp.export.onnx_grid import eight_bits, fold, product  # noqa: E402
from qexp.export.onnx_int8 import to_onnx_int8  # noqa: E402
from qexp.export.onnx_network import to_onnx  # noqa: E402
from qexp.export.packed import pack_network  # noqa: E402
from qexp.export.runtime import session  # noqa: E402

__all__ = ["run_folder"]  # a fixture


def kernels(blob: bytes, folder: Path) -> Counter[str]:
    """What onnxruntime makes of a model."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.log_severity_level = 4
    onnxruntime.InferenceSession(blob, options, providers=["CPUExecutionProvider"])
    return Counter(n.op_type for n in onnx.load(options.optimized_model_filepath).graph.node)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("name", WEIGHTS)
def test_the_level_error_is_the_largest_there_is(name: str, bits: int) -> None:
    stored, w_hat = weight(name, bits, (6, 4, 3, 3))
    whole, step, error = eight_bits(stored)
    apart = (whole * step.reshape(-1, 1, 1, 1) - w_hat).abs().flatten(1).amax(1)
    top = (stored.levels().abs().amax(1) * stored.step()).expand(len(apart))  # of each channel
    assert error <= 1 / 128
    assert (apart / top).max().item() == pytest.approx(error, rel=1e-3, abs=1e-6)


def test_uniform_levels_and_powers_of_two_have_no_error() -> None:
    found = {name: eight_bits(weight(name, 4, (4, 4, 1, 1))[0])[2] for name in WEIGHTS}
    exact = {"lsq", "per channel", "zero point", "half", "post 2", "pot", "apot"}
    assert {name for name, error in found.items() if error == 0} == exact


def test_levels_go_to_the_integers_of_least_squared_error_of_the_weights() -> None:
    stored, w_hat = weight("adq per channel", 4, (64, 4, 3, 3))
    whole, step, _ = eight_bits(stored)
    top = stored.levels().abs().amax(1).reshape(-1, 1, 1, 1)
    tried = torch.stack([((w_hat / top * n).round() / n * top) for n in range(64, 128)])
    least = (tried - w_hat).square().sum((2, 3, 4)).amin(0)
    error = (whole * step.reshape(-1, 1, 1, 1) - w_hat).square().sum((1, 2, 3))
    torch.testing.assert_close(error, least, rtol=1e-3, atol=1e-12)


def test_a_level_that_no_weight_has_is_no_error() -> None:
    how = Coding("adq", "codebook", bits=2, width=2, qmin=0, levels=3)
    levels = torch.tensor([[-1.0, 0.1234567, 1.0]])
    codes = torch.tensor([0, 2, 2, 0], dtype=torch.int32).reshape(2, 2, 1, 1)
    whole, step, error = eight_bits(Weight(how, codes, {"codebook": levels}))
    assert error == 0
    assert torch.equal(whole * step.reshape(-1, 1, 1, 1), codes - 1.0)


def test_the_least_code_is_kept_under_a_gain_above_zero() -> None:
    whole = torch.tensor([[-128, 127], [-128, 3]], dtype=torch.int8)
    folded, _, error = fold(
        whole, torch.ones(2), torch.tensor([2.0, 0.5]), torch.zeros(2), torch.tensor(0.1)
    )
    assert torch.equal(folded, whole)
    assert error == 0


def test_a_bias_is_rounded_to_the_nearest_product_of_two_steps() -> None:
    layer = QuantLinear.from_float(nn.Linear(3, 4), LSQ(8), LSQ(8))
    w_step, step = torch.tensor([0.5, 0.5, 0.25, 0.25]), torch.tensor(0.125)
    bias = w_step * step * torch.tensor([7.75, -7.75, 0.25, -3.0])
    graph = Graph()
    product(graph, layer, "x", torch.ones(4, 3, dtype=torch.int8), w_step, bias, step)
    stored = [onnx.numpy_helper.to_array(c) for c in graph.constants.values()]
    assert [c.tolist() for c in stored if c.dtype == "int32"] == [[8, -8, 0, -3]]


def test_a_gain_goes_into_weights_whatever_its_sign() -> None:
    whole = torch.tensor([[3], [-128], [5], [7]], dtype=torch.int8)[:, :, None, None]
    gain, bias = torch.tensor([2.0, -1.0, 0.0, 1e-30]), torch.tensor([1.0, 1.0, 1.0, 1e6])
    folded, step, error = fold(whole, torch.full((4,), 0.1), gain, bias, torch.tensor(0.01))
    assert bool((step > 0).all())
    assert bool((bias / (step * 0.01) <= 2**30 * 1.001).all())
    w = folded[:, 0, 0, 0] * step
    torch.testing.assert_close(w, torch.tensor([0.6, 12.7, 0.0, 0.0]))
    assert error == pytest.approx(1 / 128)  # 128 has no code


@pytest.mark.parametrize("method", ["lsq", "asq+post", "adq", "n2uq", "nearest", "aquant"])
def test_every_convolution_runs_on_integers(method: str, tmp_path: Path) -> None:
    model = network(method, fold=method == "aquant")
    written, report = to_onnx_int8(packed_of(model), images())
    blob = written.SerializeToString()
    convolutions = sum(isinstance(m, QuantConv2d) for m in model.modules())
    assert kernels(blob, tmp_path)["QLinearConv"] == convolutions
    assert report.layers == report.quantized == convolutions + 1
    run = session(blob, 1)
    assert run(images(1)).shape == (1, 10)
    with torch.no_grad():
        ours, theirs = model(images(16)), run(images(16))
    # An untrained network amplifies every rounding; a wrong step or bias would be far off.
    assert (theirs - ours).abs().amax(1).median() < 0.15 * ours.abs().max()


class Line(nn.Sequential):
    """Convolutions in a line: every result but the last is read by one quantizer alone."""

    def __init__(self, num_classes: int = 4) -> None:
        super().__init__(
            nn.Conv2d(3, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.ReLU6(),
            nn.Conv2d(8, 6, 3, stride=2, groups=2),
            nn.BatchNorm2d(6),
            nn.ReLU(inplace=True),
            nn.Conv2d(6, 6, 1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(6, num_classes),
        )


@pytest.mark.parametrize("method", ["lsq", "nearest"])
def test_a_folded_batch_norm_breaks_no_chain(method: str, tmp_path: Path) -> None:
    kept, folded = (
        to_onnx_int8(packed_of(network(method, fold=f)), images()) for f in (False, True)
    )
    assert folded[1].rounded_results == kept[1].rounded_results == 6  # residual sums
    model, x = network(method, fold=True), images(32)
    with torch.no_grad():
        ours, theirs = model(x), run(folded[0], x)
    assert (ours.argmax(1) != theirs.argmax(1)).float().mean() < 0.2


class NamedRelu(nn.Module):
    """A module that is called relu and is none."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.relu = nn.Identity()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.linear = nn.Linear(8, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.flatten(self.pool(self.relu(self.conv(x)))))


def test_a_module_named_relu_is_what_its_class_says() -> None:
    torch.manual_seed(0)
    model = NamedRelu(10).eval()
    layers = trace(model, SHAPE)
    quantize_(model, layers, {layer.name: Bits(8, 8) for layer in layers}, LSQ, LSQ)
    calibrate_(model, images())
    packed = pack_network(
        model, target=f"{__name__}.NamedRelu", keywords={}, num_classes=10, input_shape=SHAPE,
        data={"name": "synthetic", "mean": [0.5] * 3, "std": [0.25] * 3},
    )  # fmt: skip
    with torch.no_grad():
        ours, theirs = model(images()), run(to_onnx_int8(packed, images())[0], images())
    assert (ours - theirs).abs().max() < 0.05 * ours.abs().max()


class Clipped(Quantizer):
    """Inputs of one's own, whose step has no `scale`."""

    def __init__(self, bits: int, *, signed: bool = True, shape: Sequence[int] = ()) -> None:
        super().__init__(bits, signed=signed, shape=shape)
        self.top = nn.Parameter(torch.tensor(1.0))

    def calibrate(self, x: Tensor) -> None:
        self.calibrated.fill_(True)

    def forward(self, x: Tensor) -> Tensor:
        return (x / self.top * self.qmax).round().clamp(self.qmin, self.qmax) * self.top / self.qmax


@pytest.mark.parametrize("write", [to_onnx, to_onnx_int8])
def test_inputs_of_ones_own_are_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, write: Callable[..., Any]
) -> None:
    monkeypatch.setitem(KINDS, "clipped", Kind(Clipped, lambda q: {}, lambda q: ("top",)))
    model = NamedRelu(10).eval()
    layers = trace(model, SHAPE)
    quantize_(model, layers, {layer.name: Bits(8, 8) for layer in layers}, LSQ, Clipped)
    calibrate_(model, images())
    packed = pack_network(
        model, target=f"{__name__}.NamedRelu", keywords={}, num_classes=10, input_shape=SHAPE,
        data={"name": "synthetic", "mean": [0.5] * 3, "std": [0.25] * 3},
    )  # fmt: skip
    with pytest.raises(ConfigError, match="layer 'conv' has inputs of Clipped, which ONNX nodes"):
        write(packed, *([images()] if write is to_onnx_int8 else []))


def test_what_quantizers_read_is_not_rounded_again() -> None:
    torch.manual_seed(3)
    model = Line()
    model(4 * torch.randn(16, 3, 8, 8))
    nn.init.normal_(model[1].weight)  # gains of both signs
    model.eval()
    layers = trace(model, (3, 8, 8))
    quantize_(model, layers, {layer.name: Bits(4, 4) for layer in layers}, LSQ, LSQ)
    x = torch.randn(32, 3, 8, 8)
    calibrate_(model, x)
    packed = pack_network(
        model,
        target="test_export_int8.Line",
        keywords={},
        num_classes=4,
        input_shape=(3, 8, 8),
        data={"name": "synthetic", "mean": [], "std": []},
    )
    written, report = to_onnx_int8(packed, x)
    assert report.rounded_results == 1  # before the average
    step = next(iter(_steps(written)))
    with torch.no_grad():
        ours, theirs = model.eval()(x), session(written.SerializeToString(), 1)(x)
    weights: Any = model[12]
    # Half a step of the last result, as often as not one code of 15 of the linear layer's input.
    bound = (step + weights.act_quantizer.scale) * weights.weight.abs().sum(1).max()
    assert (theirs - ours).abs().max() <= bound


class Ways(nn.Sequential):
    """A chain of layers, and a layer that reads it."""

    def __init__(self, num_classes: int, way: str) -> None:
        chain = {
            "relu6": (nn.ReLU6(),),
            "norm": (nn.BatchNorm2d(8), nn.ReLU()),
            "norm after relu": (nn.ReLU(), nn.BatchNorm2d(8)),
        }[way]
        tail = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes))
        super().__init__(nn.Conv2d(3, 8, 3), *chain, nn.Conv2d(8, 8, 3), nn.ReLU(), *tail)


ASQ_PLAIN = partial(ASQ, dequantize="plain")


@pytest.mark.parametrize(
    ("way", "act"),
    [
        ("relu6", LSQ),
        ("norm", LSQ),
        ("norm after relu", LSQ),
        ("norm", ASQ),
        ("norm", ASQ_PLAIN),
    ],
)
def test_a_chain_in_integers_is_what_its_layers_are_one_by_one(way: str, act: Any) -> None:
    torch.manual_seed(0)
    model, x = Ways(4, way).eval(), 10 * images(32)
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.normal_(norm.weight, std=8.0)
        nn.init.normal_(norm.bias, std=20.0)
    nn.init.normal_(model[0].bias, std=4.0)  # type: ignore[arg-type]
    layers = trace(model, SHAPE)
    quantize_(model, layers, {layer.name: Bits(8, 8) for layer in layers}, LSQ, act)
    calibrate_(model, x)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, ASQ):  # factors away from 1
                module.adapter[-1].bias.fill_(0.5)  # type: ignore[index, union-attr, operator]
            elif isinstance(module, LSQ) and way == "relu6" and not module.signed:
                module.scale.fill_(0.1)  # codes beyond 6
    packed = pack_network(
        model, target=f"{__name__}.Ways", keywords={"way": way}, num_classes=4, input_shape=SHAPE,
        data={"name": "synthetic", "mean": [], "std": []},
    )  # fmt: skip
    with torch.no_grad():
        ours, theirs = model(x), run(to_onnx_int8(packed, x)[0], x)
    assert (theirs - ours).abs().max() < 0.05 * ours.abs().max()


def _steps(written: Any) -> list[torch.Tensor]:
    """Steps of QuantizeLinear, the largest first."""
    constants = {c.name: onnx.numpy_helper.to_array(c) for c in written.graph.initializer}
    names = [n.input[1] for n in written.graph.node if n.op_type == "QuantizeLinear"]
    return sorted((torch.tensor(constants[name]) for name in names), reverse=True)


def test_layers_beyond_eight_bits_stay_as_they_are() -> None:
    model = network("lsq", Bits(4, 10))
    written, report = to_onnx_int8(packed_of(model), images())
    assert report.layers == 2  # first and last
    with torch.no_grad():
        ours, theirs = model(images()), session(written.SerializeToString(), 1)(images())
    assert (theirs - ours).abs().amax(1).median() < 0.05 * ours.abs().max()


def test_the_command_says_what_it_changes(qexp: Qexp, run_folder: Path) -> None:
    said = qexp("export", f"run={run_folder}", "format=onnx_int8")
    assert said.code == 0, said.err
    file = run_folder / "model.int8.onnx"
    assert f"onnx: {file} | {file.stat().st_size:,} bytes" in said.out
    assert "quantized layers in 8-bit integers | largest error of a level " in said.out
    assert "have another top-1" in said.out


@pytest.mark.parametrize("method", ["lsq", "asq+post", "asq_statistics", "n2uq", "aquant"])
@pytest.mark.parametrize("network", [ViT, Windows], ids=lambda cls: cls.__name__)
def test_linear_layers_of_tokens_run_on_integers(
    network: type[nn.Module], method: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model, x = network(num_classes=10).eval(), images(24)
    with torch.no_grad():
        unquantized = model(x)
    written, report = to_onnx_int8(quantized(model, method, 8, images()), images())
    layers = sum(isinstance(m, QuantLinear) for m in model.modules())
    assert kernels(written.SerializeToString(), tmp_path)["QGemm"] == layers
    assert report.layers == report.quantized == layers + 1
    assert run(written, x[:1]).shape == (1, 10)
    with torch.no_grad():
        ours = model(x)
    assert (run(written, x) - ours).norm() < (ours - unquantized).norm()
