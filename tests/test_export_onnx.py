"""ONNX: the same network in another program, from the same integers."""

from __future__ import annotations

import importlib.util
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from conftest import Qexp
from test_export import METHODS, SHAPE, images, network, packed_of, run_folder
from torch import Tensor, nn
from torchvision.models import swin_transformer

from qexp.errors import ConfigError
from qexp.export.packed import Packed, pack_network
from qexp.models.opened import open_attention_
from qexp.models.resnet import ResNet
from qexp.quant.adaround import AdaRound
from qexp.quant.aquant import AQuant
from qexp.quant.asq import ASQ
from qexp.quant.convert import Bits, calibrate_, quantize_
from qexp.quant.lsq import LSQ
from qexp.quant.nearest import Nearest
from qexp.quant.trace import trace
from qexp.recipes.build import load_run

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

from qexp.export.onnx_graph import Graph  # noqa: E402
from qexp.export.onnx_inputs import _above, quantized_input  # noqa: E402
from qexp.export.onnx_network import to_onnx  # noqa: E402

__all__ = ["run_folder"]  # a fixture


def run(model: Any, x: Tensor) -> Tensor:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return torch.from_numpy(session.run(None, {"images": x.numpy()})[0])


@pytest.mark.parametrize("method", METHODS)
def test_onnxruntime_computes_the_same_logits(method: str) -> None:
    model = network(method, fold=method in ("adaround", "aquant"))
    written = to_onnx(packed_of(model))
    for n in (1, 16):  # the batch is dynamic
        x = images(n)
        with torch.no_grad():
            ours = model(x)
        theirs = run(written, x)
        # Another order of summation may move a value over a border between two codes; then one
        # image differs by a step. Most must not differ at all.
        assert (theirs - ours).abs().amax(1).median() < 1e-4
        assert torch.equal(theirs.argmax(1), ours.argmax(1))


@pytest.mark.parametrize("method", ["lsq", "asq+post", "nearest"])
def test_biases_stay_float_whatever_onnxruntime_fuses(method: str) -> None:
    model = network(method, fold=True)
    with torch.no_grad():
        ours, theirs = model(images(32)), run(to_onnx(packed_of(model)), images(32))
    assert (theirs - ours).abs().amax(1).median() < 1e-5
    assert torch.equal(theirs.argmax(1), ours.argmax(1))


@torch.fx.wrap
def halved(x: Tensor) -> Tensor:
    return x / 2


class InPlace(nn.Module):
    """A network whose forward is `forward(self, conv(x))`."""

    def __init__(self, num_classes: int, way: str) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.linear = nn.Linear(8, num_classes)
        self.flatten = nn.Flatten(1, 2 if way == "flatten rows" else -1)
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if self.way == "relu read again":
            y = nn.functional.relu(y, inplace=True) + y
        elif self.way == "rows and a slice":
            y = y[:, [7, 6, 5, 4, 3, 2, 1, 0], 1:]
        elif self.way == "mean of what is there":
            y = nn.functional.avg_pool2d(y, 3, 2, 1, ceil_mode=True)
        elif self.way == "alpha":
            y = torch.add(y, y, alpha=2)
        elif self.way == "batch view":
            return self.linear(y.view(8, y.size(0), -1).transpose(0, 1).mean(2))
        elif self.way == "batch sum":
            y = y.view(y.shape[0] * 1, 8, -1, 1)
        elif self.way.startswith("flatten"):
            return self.linear(self.flatten(y.mean((2, 3), keepdim=True)).flatten(1))
        elif self.way == "item":
            y = y * y.mean((0, 1, 2, 3)).item()
        elif self.way == "filled":
            y = y + y.new_full((8, 1, 1), y.mean((0, 1, 2, 3)).item())
        elif self.way == "rows of the batch":
            y = y + y[:1]
        elif self.way == "first image":
            y = y + y[0]
        elif self.way == "pairs":
            y = torch.cat([y, y.new_zeros(1, 8, y.size(2), y.size(3))])
        elif self.way == "batch twice":
            rows = y.flatten(1)
            rows = (rows @ rows.mT).view(y.size(0), y.size(0), 1, 1)
            y = y + rows.mean((0, 1))
        elif self.way == "comparison":
            y = y * (y > 0)
        elif self.way == "double":
            y = (y * torch.ones(8, 1, 1, dtype=torch.float64)).float()
        elif self.way == "branch":
            y = y if y.sum() > 0 else -y
        elif self.way == "wrapped":
            y = halved(y)
        elif self.way == "half of the batch":
            y = y * (y.shape[0] // 2)
        elif self.way == "argmax":
            y = y + y.argmax(1, keepdim=True)
        elif self.way == "written method":
            y = y.relu_() + y
        elif self.way == "alone":
            y = nn.functional.relu(y, inplace=True)
        elif self.way == "taxicab":
            y = nn.functional.normalize(y, p=1.0)
        elif self.way == "places":
            y, _ = nn.functional.max_pool2d(y, 2, return_indices=True)
        elif self.way == "roll of all":
            y = y.roll(1)
        elif self.way == "circular":
            y = nn.functional.pad(y, (1, 1, 1, 1), mode="circular")
        elif self.way == "attribute":
            y = y.real
        elif self.way == "more dimensions":
            y = y.repeat(1, 1, 1, 1, 1)[0]
        elif self.way == "by keyword":
            return self.linear(self.flatten(input=y.mean((2, 3), keepdim=True)))
        return self.linear(y.mean((2, 3)))


@pytest.mark.parametrize(
    ("way", "message"),
    [
        ("relu read again", "'relu' changes in place what 'conv' gave"),
        ("rows and a slice", "format=onnx does not know index"),
        ("mean of what is there", "format=onnx does not know avg_pool2d with this divisor"),
        ("alpha", "format=onnx does not know .*alpha"),
        ("item", "what depends on the batch or the image in 'item'"),
        ("filled", "format=onnx does not know .*new_full|in 'item'"),
        ("rows of the batch", "a slice of the batch"),
        ("first image", "an index of the batch"),
        ("pairs", "a size that is no multiple of the batch"),
        ("batch twice", "a view with the batch in two dimensions"),
        ("comparison", "format=onnx does not know gt"),
        ("double", "values of torch.float64 that depend on the image"),
        (
            "branch",
            r"cannot trace the network \(test_export_onnx.py:\d+: symbolically traced .*\). Use",
        ),
        ("wrapped", "format=onnx does not know halved"),
        ("half of the batch", "what depends on the batch or the image in 'floordiv'"),
        ("argmax", "format=onnx does not know argmax"),
        ("written method", "'relu_' changes in place what 'conv' gave"),
        ("taxicab", "format=onnx does not know normalize with p=1.0"),
        ("places", "format=onnx does not know max_pool2d_with_indices"),
        ("roll of all", "format=onnx does not know roll without dims"),
        ("circular", r"format=onnx does not know pad \(1, 1, 1, 1\) of mode circular"),
        ("attribute", "format=onnx does not know the attribute 'real' of a tensor"),
        ("more dimensions", "format=onnx does not know repeat with more dimensions than its tenso"),
        ("by keyword", "format=onnx does not know Flatten but of one input, by position"),
        ("flatten rows", ""),
        ("batch view", ""),
        ("batch sum", ""),
        ("flatten all", ""),
        ("alone", ""),
    ],
)
def test_what_onnx_cannot_say_is_refused(way: str, message: str) -> None:
    torch.manual_seed(0)
    model = InPlace(10, way).eval()
    layers = trace(model, SHAPE)
    quantize_(model, layers, {layer.name: Bits(4, 8) for layer in layers}, LSQ, LSQ)
    calibrate_(model, images())
    packed = _packed(model, f"{__name__}.InPlace", {"way": way})
    if message:
        with pytest.raises(ConfigError, match=message):
            to_onnx(packed)
        return
    with torch.no_grad():
        for n in (3, 16):
            torch.testing.assert_close(run(to_onnx(packed), images(n)), model(images(n)))


MIXED = [Bits(4, 8), Bits(8, 4), Bits(8, 8), Bits(2, 2), Bits(3, 5), Bits(4, 32), Bits(32, 4)]


@pytest.mark.parametrize("widths", MIXED, ids=str)
def test_all_widths_and_float_operands_run(widths: Bits) -> None:
    model = network("lsq", widths)
    with torch.no_grad():
        ours, theirs = model(images()), run(to_onnx(packed_of(model)), images())
    assert (theirs - ours).abs().amax(1).median() < 1e-4


BORDERS = {
    "per channel": {"per": "channel"},
    "per tensor": {"per": "tensor", "border": "linear"},
    "window": {"fusion": "window"},
    "sigmoid": {"squash": "sigmoid"},
    "constant window": {"fusion": "window", "border": "constant"},
}


@pytest.mark.parametrize("keywords", BORDERS.values(), ids=BORDERS.keys())
def test_every_border_runs(keywords: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "border", (AdaRound, partial(AQuant, **keywords)))
    model = network("border")
    with torch.no_grad():
        ours, theirs = model(images()), run(to_onnx(packed_of(model)), images())
    assert (theirs - ours).abs().amax(1).median() < 1e-4


FACTORS = {
    "plain": {"dequantize": "plain"},
    "dead": {"dequantize": "plain", "bias": -9.0},
    "beyond e": {"factor": "exp", "bias": 3.0},
}


@pytest.mark.parametrize("keywords", FACTORS.values(), ids=FACTORS.keys())
def test_every_factor_runs(keywords: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    own = {k: v for k, v in keywords.items() if k != "bias"}
    monkeypatch.setitem(METHODS, "factor", (LSQ, partial(ASQ, **own)))
    model = network("factor")
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, ASQ) and "bias" in keywords:
                module.adapter[-1].bias.fill_(keywords["bias"])  # type: ignore[index, union-attr, operator]
        ours, theirs = model(images()), run(to_onnx(packed_of(model)), images())
    assert (theirs - ours).abs().amax(1).median() < 1e-4


def test_a_tie_goes_up_where_the_quantizer_sends_it() -> None:
    q = Nearest(4)
    q.scale.data.fill_(0.5)
    q.zero.fill_(1)
    x = (torch.arange(-20, 20) + 0.5) * 0.5
    graph = Graph()
    found = evaluated(graph, quantized_input(graph, q, "x", "conv"), x)
    assert torch.equal(found, q(x).detach())


def settled(model: nn.Module, x: Tensor) -> nn.Module:
    """The network in eval mode, with batch norms that have seen `x`."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    model.train()(x)
    return model.eval()


def compared(model: nn.Module, x: Tensor, target: str, bits: int = 4, **keywords: Any) -> Packed:
    """Quantize and compare with onnxruntime; the packed network."""
    layers = trace(model, tuple(x.shape[1:]))
    quantize_(model, layers, {layer.name: Bits(bits, bits) for layer in layers}, LSQ, LSQ)
    calibrate_(model, x)
    packed = pack_network(
        model,
        target=target,
        keywords=keywords,
        num_classes=5,
        input_shape=tuple(x.shape[1:]),
        data={"name": "synthetic", "mean": [0.5] * 3, "std": [0.25] * 3},
    )
    with torch.no_grad():
        ours, theirs = model(x), run(to_onnx(packed), x)
    spread = float(ours.std(0).mean())
    assert spread > 1e-4
    assert (theirs - ours).abs().amax(1).median() < 1e-4 * spread
    return packed


NETWORKS = {
    "resnet18": 32,
    "mobilenet_v2": 32,
    "mnasnet0_5": 32,
    "squeezenet1_1": 48,
    "mobilenet_v3_small": 64,
    "efficientnet_b0": 64,
    "regnet_y_400mf": 32,
    "shufflenet_v2_x0_5": 32,
    "googlenet": 64,
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_torchvision_run(name: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, NETWORKS[name], NETWORKS[name])
    google = {"aux_logits": False, "init_weights": False, "transform_input": True}
    keywords = google if name == "googlenet" else {}
    model = settled(getattr(torchvision.models, name)(num_classes=5, **keywords), x)
    compared(model, x, f"torchvision.models.{name}", **keywords)


def test_eight_bit_integers_move_a_gated_network_less_than_its_quantizers() -> None:
    from qexp.export.onnx_int8 import to_onnx_int8

    torch.manual_seed(0)
    x = torch.randn(8, 3, 64, 64)
    model = settled(torchvision.models.mobilenet_v3_small(num_classes=5), x)
    with torch.no_grad():
        unquantized = model(x)
    packed = compared(model, x, "torchvision.models.mobilenet_v3_small", bits=8)
    written, report = to_onnx_int8(packed, x)
    assert report.layers == report.quantized == 54
    with torch.no_grad():
        ours = model(x)
    assert (run(written, x) - ours).norm() < (ours - unquantized).norm()


class Block(nn.Module):
    """ConvNeXt's: channels last, a Linear over [N, H, W, C], a scale of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(8), nn.Linear(8, 8)
        self.scale = nn.Parameter(torch.full((8, 1, 1), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(self.norm(x.permute(0, 2, 3, 1)))
        return x + self.scale * nn.functional.gelu(y).permute(0, 3, 1, 2)


class Pools(nn.Module):
    """One way after the other in which CNNs pool, gate and join."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.stem, self.block = nn.Conv2d(3, 8, 3, padding=1), Block()
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 8, 1), nn.Hardsigmoid())
        self.pool, self.mean = nn.MaxPool2d(3, 2, 1, ceil_mode=True), nn.AvgPool2d(2, 2)
        self.join, self.quarters = nn.Conv2d(16, 8, 3, padding=1), nn.AdaptiveAvgPool2d((2, None))
        self.tail = nn.Sequential(nn.LeakyReLU(0.1), nn.Dropout(0.5), nn.Flatten())
        self.linear = nn.Linear(8 * 2 * 4, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(torch.relu(self.stem(x)))
        x = self.gate(x) * x * 2.0
        around = nn.functional.avg_pool2d(x, 3, 2, 1, count_include_pad=False)
        x = torch.cat([self.join(torch.cat((self.pool(x)[:, :, :8, 1:], around), 1)), around], 1)
        x = nn.functional.max_pool2d(nn.functional.silu(x)[:, 4:12], 2, stride=2)
        x = nn.functional.pad(nn.functional.dropout(x, 0.5, self.training), (4, 0, 2, 2, 0, 0))
        x = nn.functional.hardswish(x).mul(torch.sigmoid(x[:, :, 3:4, 5:6]))
        return self.linear(self.tail(self.quarters(self.mean(x))))


def test_pools_gates_and_joins_run() -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 3, 16, 16)
    model = Pools(5).eval()
    compared(model, x, f"{__name__}.Pools")


class Last(nn.Module):
    """A convolution, one way to go on from it, and the mean of the plane."""

    def __init__(self, num_classes: int, way: str) -> None:
        super().__init__()
        self.conv, self.way = nn.Conv2d(3, num_classes, 3, padding=1), way
        self.norm = nn.LayerNorm((num_classes, 8, 8), eps=0.25)
        self.mean, self.pool = nn.AvgPool2d(3, 2, 1), nn.MaxPool2d(2, 1, dilation=2)
        self.gelu = nn.GELU("tanh")

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if self.way == "normalize":  # pixels without any length among them
            x = nn.functional.normalize(torch.relu(x), dim=1)
        else:
            x = getattr(self, self.way)(x)
        return x.mean((2, 3))


@pytest.mark.parametrize("way", ["norm", "mean", "pool", "gelu", "normalize"])
def test_operations_run_with_their_options(way: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(8, *SHAPE)
    model = Last(5, way).eval()
    nn.init.normal_(model.norm.weight)
    compared(model, x, f"{__name__}.Last", way=way)


class Sizes(nn.Module):
    """Views, chunks and pools whose sizes come from the image, even and uneven."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.stem, self.next = nn.Conv2d(3, 7, 3, padding=1), nn.Conv2d(3, 6, 1)
        self.uneven, self.larger = nn.AdaptiveAvgPool2d((3, 7)), nn.AdaptiveAvgPool2d(9)
        self.last = nn.Conv2d(6, 4, 1)
        self.row, self.column = nn.Linear(9, 9), nn.Conv2d(4, 4, 1)
        self.linear = nn.Linear(4 * 9 * 9, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        first, middle, rest = torch.relu(self.stem(x)).chunk(3, -3)  # 3, 3 and 1 channels
        x = self.next(first * rest + middle)
        n, c, h, w = x.shape
        x = self.last(torch.transpose(x.view(n, 2, c // 2, h, w), 1, 2).reshape((n, c, h, w)))
        x = self.larger(self.uneven(x.contiguous()))
        x = x + self.row(x[:, :, -1]).unsqueeze(2) + self.column(x[:, :, :, 2].unsqueeze(-1))
        return self.linear(x.view(x.size(0), x.size(1) * 9 * 9))


def test_sizes_of_the_image_become_constants_and_the_batch_stays_open() -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 3, 10, 16)
    model = Sizes(5).eval()
    packed = compared(model, x, f"{__name__}.Sizes")
    with torch.no_grad():
        torch.testing.assert_close(run(to_onnx(packed), x[:3]), model(x[:3]))


def test_an_exported_run_scores_the_same_in_onnxruntime(
    qexp: Qexp, run_folder: Path, capsys: pytest.CaptureFixture
) -> None:
    capsys.readouterr()  # what training said
    said = qexp("export", f"run={run_folder}", "format=onnx")
    assert said.code == 0, said.err
    file = run_folder / "model.onnx"
    assert said.out.startswith(f"onnx: {file} | {file.stat().st_size:,} bytes")
    assert "0 have another top-1" in said.out
    model, dataset, _ = load_run(run_folder, "last.pt", "cpu")
    x, _ = next(iter(dataset.eval_batches("test")))
    with torch.no_grad():
        assert torch.equal(run(onnx.load(file), x).argmax(1), model.eval()(x).argmax(1))


def test_padding_shortcuts_and_odd_widths_run() -> None:
    torch.manual_seed(0)
    model: nn.Module = ResNet(8, 10, width=0.25).eval()
    layers = trace(model, SHAPE)
    quantize_(model, layers, {layer.name: Bits(3, 3) for layer in layers}, LSQ, LSQ)
    calibrate_(model, images())
    packed = _packed(model, "qexp.models.resnet.ResNet", {"depth": 8, "width": 0.25})
    with torch.no_grad():
        torch.testing.assert_close(run(to_onnx(packed), images()), model(images()))


def _packed(model: nn.Module, target: str, keywords: dict[str, Any]) -> Packed:
    return pack_network(
        model,
        target=target,
        keywords=keywords,
        num_classes=10,
        input_shape=SHAPE,
        data={"name": "synthetic", "mean": [0.5] * 3, "std": [0.25] * 3},
    )


def test_the_comparison_of_all_forms_runs_and_finds_them_equal(
    tmp_path: Path, run_folder: Path, capsys: pytest.CaptureFixture
) -> None:
    path = Path(__file__).parents[1] / "scripts" / "check_export.py"
    spec = importlib.util.spec_from_file_location("check_export", path)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    file = tmp_path / "check.json"
    assert script.main([str(file), str(run_folder), "--images", "8", "--slow", "2"]) == 0
    rows = {row["form"]: row for row in json.loads(file.read_text())}
    forms = ["itself", "packed", "integer", "table", "reference", "onnx", "onnx_int8"]
    assert list(rows) == forms
    assert [rows[form]["images"] for form in forms] == [8, 8, 8, 2, 2, 8, 8]
    for form in forms[:-1]:
        assert rows[form]["weights_equal"], form
        assert rows[form]["other_top1"] == rows[form]["other_top1_float64"] == 0, form
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(forms)
    assert script.main([str(file), str(tmp_path / "nowhere")]) == 2
    assert capsys.readouterr().err.startswith("check_export: ")


class Attention(nn.Module):
    """timm's: one projection for queries, keys and values."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.qkv, self.proj, self.heads = (
            nn.Linear(width, 3 * width),
            nn.Linear(width, width),
            heads,
        )

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        n, tokens, width = x.shape
        qkv = self.qkv(x).reshape(n, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, -1).unbind(0)
        y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.proj(y.transpose(1, 2).reshape(n, tokens, width))


class Layer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn, self.gamma = Attention(width, heads), nn.Parameter(torch.full((width,), 0.5))
        hidden = nn.Linear(width, 2 * width)
        self.mlp = nn.Sequential(hidden, nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.gamma * self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """A vision transformer as timm writes it: 4x4 patches, a class token, positions, two layers."""

    def __init__(self, num_classes: int, width: int = 16) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, stride=4)
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.positions = nn.Parameter(torch.randn(1, 1 + 4, width))
        self.layers = nn.Sequential(*(Layer(width, 4) for _ in range(2)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.token.expand(x.shape[0], -1, -1), x), dim=1) + self.positions
        return self.head(self.norm(self.layers(x))[:, 0])


class Expanded(ViT):
    """Its positions are a buffer, for each image of the batch."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        positions = self.positions.detach()
        del self.positions
        self.register_buffer("positions", positions)

    def forward(self, x: Tensor) -> Tensor:
        positions = self.positions.expand(x.shape[0], -1, -1)
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.token.expand(x.shape[0], -1, -1), x), dim=1) + positions
        return self.head(self.norm(self.layers(x))[:, 0])


def quantized(model: nn.Module, method: str, bits: int, x: Tensor, **keywords: Any) -> Packed:
    """Quantize in place by one of METHODS; the packed network."""
    layers = trace(model.eval(), SHAPE)
    widths = {layer.name: Bits(bits, bits) for layer in layers}
    quantize_(model, layers, widths, *METHODS[method], LSQ, LSQ)
    calibrate_(model, x)
    with torch.no_grad():  # adapters and borders away from their neutral start
        for name, parameter in model.named_parameters():
            if "adapter" in name or "border" in name:
                parameter.add_(0.05 * torch.rand_like(parameter))
    return _packed(model.eval(), f"{__name__}.{type(model).__name__}", keywords)


def same_logits(model: nn.Module, written: Any) -> None:
    for n in (1, 24):  # the batch is dynamic
        x = images(n)
        with torch.no_grad():
            ours, theirs = model(x), run(written, x)
        assert theirs.shape == ours.shape
        # As above: most images do not differ at all.
        assert (theirs - ours).abs().amax(1).median() < 1e-4
        assert ours.std() > 0.05


@pytest.mark.parametrize("method", METHODS)
def test_a_vision_transformer_computes_the_same_logits(method: str) -> None:
    torch.manual_seed(0)
    model = ViT(10)
    same_logits(model, to_onnx(quantized(model, method, 4, images())))


def test_a_buffer_may_be_expanded_to_the_batch() -> None:
    torch.manual_seed(0)
    model = Expanded(10)
    same_logits(model, to_onnx(quantized(model, "lsq", 4, images())))


@pytest.mark.parametrize("count", [3, 15, 16, 100, 255])
def test_many_thresholds_are_searched_and_a_value_on_one_is_below(count: int) -> None:
    thresholds = torch.randn(count, generator=torch.Generator().manual_seed(count)).sort().values
    x = torch.cat([thresholds, thresholds.nextafter(torch.tensor(9.0)), torch.tensor([-9.0, 9.0])])
    graph = Graph()
    counted = _above(graph, "x", thresholds, -2.0)
    nodes = len(graph.nodes)
    assert nodes <= 45
    expected = torch.bucketize(x, thresholds) - 2.0  # bucketize: as many as lie below
    assert torch.equal(evaluated(graph, counted, x), expected)


def evaluated(graph: Graph, y: str, x: Tensor) -> Tensor:
    """The value `y` of a graph with the one input `x`, of one dimension."""
    made = onnx.helper.make_graph(
        graph.nodes,
        "values",
        [onnx.helper.make_tensor_value_info("x", 1, [None])],
        [onnx.helper.make_tensor_value_info(y, 1, [None])],
        list(graph.constants.values()),
    )
    model = onnx.helper.make_model(
        made, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10
    )
    session = onnxruntime.InferenceSession(model.SerializeToString())
    (found,) = session.run(None, {"x": x.numpy()})
    return torch.from_numpy(found)


@pytest.mark.parametrize("bits", [2, 3, 8])
@pytest.mark.parametrize("method", ["lsq", "lsq_per_channel", "asq+post", "adq_per_channel"])
def test_a_vision_transformer_runs_at_every_width(method: str, bits: int) -> None:
    torch.manual_seed(0)
    model = ViT(10)
    same_logits(model, to_onnx(quantized(model, method, bits, images())))


@pytest.mark.parametrize(("method", "bits", "width"), [("nearest", 3, 32), ("adaround", 4, 64)])
def test_onnxruntime_rounds_no_input_of_a_linear_layer(method: str, bits: int, width: int) -> None:
    torch.manual_seed(0)
    model = ViT(10, width)
    written = to_onnx(quantized(model, method, bits, images(), width=width))
    same_logits(model, written)
    linear = {name for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    weights = {f"{name}.codes" for name in linear}
    read = {n.output[0] for n in written.graph.node if n.input[0] in weights}
    assert len(read) == len(linear)
    assert {n.op_type for n in written.graph.node if read & set(n.input)} == {"Max"}


class Chain(nn.Module):
    """Convolutions without bias between quantizers, and a parameter named as the graph's output."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.second = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.logits = nn.Parameter(torch.randn(num_classes))
        self.images = nn.Parameter(torch.ones(1))
        self.linear = nn.Linear(8, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.second(torch.relu(self.first(x)))) * self.images
        return self.linear(x.mean((2, 3))) + self.logits


def test_no_product_becomes_one_of_integers_and_names_do_not_clash(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 3, 10, 10)
    packed = compared(Chain(5).eval(), x, f"{__name__}.Chain", bits=8)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "as_it_runs.onnx")
    onnxruntime.InferenceSession(to_onnx(packed).SerializeToString(), options)
    runs = {node.op_type for node in onnx.load(tmp_path / "as_it_runs.onnx").graph.node}
    assert not {name for name in runs if name.startswith("QLinear") or "Integer" in name}


class Windows(nn.Module):
    """Swin's attention by hand: shifted 2x2 windows, a table of positions, a mask of what wraps.

    `cosine`: as in Swin V2.
    """

    def __init__(self, num_classes: int, cosine: bool = False) -> None:
        super().__init__()
        self.patches, self.norm = nn.Conv2d(3, 8, 2, stride=2), nn.LayerNorm(8)
        self.qkv, self.proj, self.cosine = nn.Linear(8, 24), nn.Linear(8, 8), cosine
        self.table = nn.Parameter(torch.randn(9, 2))
        self.scale = nn.Parameter(torch.tensor([[[1.0]], [[9.0]]]))
        rows = torch.stack(torch.meshgrid(torch.arange(2), torch.arange(2), indexing="ij")).flatten(
            1
        )
        apart = rows[:, :, None] - rows[:, None, :] + 1
        self.register_buffer("index", apart[0] * 3 + apart[1], persistent=False)
        self.merge, self.head = nn.Linear(32, 16, bias=False), nn.Linear(16, num_classes)

    def split(self, x: Tensor) -> Tensor:
        n, h, w, c = x.shape
        x = x.view(n, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 2, 4, 5)
        return x.reshape(n * (h // 2) * (w // 2), 4, c)

    def mask(self, x: Tensor, windows: int) -> Tensor:
        """[windows, 1, 4, 4]: pixels that the shift brought together do not see each other."""
        part = nn.functional.pad(
            x.new_zeros(1, x.shape[1] - 1, x.shape[2] - 1, 1), (0, 0, 0, 1), value=1
        )
        part = nn.functional.pad(part, (0, 0, 0, 0, 0, 1), value=2)
        part = self.split(part).view(windows, 4)
        apart = part.unsqueeze(1) != part.unsqueeze(2)
        return torch.zeros(windows, 4, 4).masked_fill(apart, -100.0).unsqueeze(1)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.pad(self.norm(self.patches(x).permute(0, 2, 3, 1)), (0, 0, 0, 1, 0, 1))
        x = nn.functional.pad(x, (0, 0, 0, 1, 0, 1))
        n, h, w, c = x.shape
        rolled = torch.roll(x, shifts=(-1, -1), dims=(1, 2))
        y = self.split(rolled)
        qkv = self.qkv(y).reshape(y.size(0), y.size(1), 3, 2, c // 2).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        if self.cosine:
            q, k = nn.functional.normalize(q, dim=-1), nn.functional.normalize(k, dim=-1)
            scores = q @ k.transpose(-2, -1) * torch.clamp(self.scale, max=2.0).exp()
        else:
            scores = (q * (c // 2) ** -0.5).matmul(k.transpose(-2, -1))
        scores = scores + self.table[self.index.view(-1)].view(4, 4, -1).permute(2, 0, 1)[None]
        windows = (h // 2) * (w // 2)
        scores = scores.view(y.size(0) // windows, windows, 2, 4, 4) + self.mask(x, windows)
        scores = nn.functional.softmax(scores.view(-1, 2, 4, 4), dim=-1)
        y = self.proj(scores.matmul(v).transpose(1, 2).reshape(y.size(0), y.size(1), c))
        y = y.view(n, h // 2, w // 2, 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(n, h, w, c)
        y = x + torch.roll(y, shifts=(1, 1), dims=(1, 2))
        y = y[:, : h - 2, : w - 2, :].contiguous()
        even, odd = y[..., 0::2, :, :], y[..., 1::2, :, :]
        y = torch.cat(
            [even[..., 0::2, :], even[..., 1::2, :], odd[..., 0::2, :], odd[:, :, 1::2]], -1
        )
        return self.head(self.merge(y).mean(dim=(1, 2)))


@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("method", ["lsq", "asq+post", "asq_statistics", "adq", "aquant"])
def test_shifted_windows_compute_the_same_logits(method: str, cosine: bool) -> None:
    torch.manual_seed(0)
    model = Windows(10, cosine)
    same_logits(model, to_onnx(quantized(model, method, 4, images(), cosine=cosine)))


class Lines(nn.Module):
    """Convolutions that are not quantized: of one dimension, and transposed."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.stem, self.up = (
            nn.Conv2d(3, 6, 3, stride=2),
            nn.ConvTranspose2d(6, 4, 3, 2, 1, 1, groups=2),
        )
        self.line = nn.Conv1d(4, 8, 3, padding=2, dilation=2, bias=False)
        self.linear = nn.Linear(8, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.up(torch.relu(self.stem(x))))
        return self.linear(self.line(x.flatten(2)).mean(-1))


def test_transposed_and_one_dimensional_convolutions_run_in_float() -> None:
    torch.manual_seed(0)
    model = Lines(10)
    same_logits(model, to_onnx(quantized(model, "lsq", 4, images())))


class Heads(nn.Module):
    """Attention of the tokens to each other in one of the ways of torch."""

    def __init__(self, num_classes: int, way: str) -> None:
        super().__init__()
        self.patches, self.head = nn.Conv2d(3, 16, 2, stride=2), nn.Linear(16, num_classes)
        self.qkv, self.way, self.kept = nn.Linear(16, 48), way, nn.Parameter(torch.randn(2, 16, 16))

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.patches(x).flatten(2).mT)
        q, k, v = qkv.unflatten(-1, (3, 2, 8)).transpose(1, 3).split(1, dim=2)
        q, k, v = q.squeeze(2), k.squeeze(2), v.squeeze(dim=2)
        attend = nn.functional.scaled_dot_product_attention
        if self.way == "causal":
            y = attend(q, k, v, is_causal=True, scale=0.5)
        elif self.way == "boolean":
            y = attend(q, k, v, torch.eye(16, dtype=torch.bool).roll(1, 0) | (self.kept > 0))
        elif self.way == "float":
            y = attend(q, k, v, attn_mask=self.kept)
        elif self.way == "of the image":
            y = attend(q, k, v, attn_mask=q.mean(-1, keepdim=True) * self.kept)
        elif self.way == "blind":
            y = attend(q, k, v, torch.ones(16, 16, dtype=torch.bool).tril(-1))
        elif self.way == "dropout":
            y = attend(q, k, v, dropout_p=0.1)
        elif self.way == "grouped":
            y = attend(q, k[:, :1], v[:, :1], enable_gqa=True)
        elif self.way == "bare":
            y = nn.functional.softmax(q @ k.mT) @ v
        elif self.way == "batch":
            y = attend(*(t.permute(1, 2, 3, 0) for t in (q, k, v))).permute(3, 0, 1, 2)
        elif self.way == "flat":
            q, k, v = (t.reshape(-1, 16, 8) for t in (q, k, v))
            scores = torch.baddbmm(self.kept.repeat(x.shape[0], 1, 1), q, k.mT, alpha=0.3)
            y = torch.bmm(scores.softmax(dim=-1), v).view(x.shape[0], 2, 16, 8)
        else:
            weights = torch.einsum("n h t d, n h s d -> n h t s", q / 3, k).softmax(-1)
            y = torch.einsum("nhts,nhsd->nhtd", weights.masked_fill(self.kept > 1, 0.0), v)
        y = torch.stack((y, -y.abs()), dim=2).sum(2).swapaxes(1, 2)
        return self.head(y.flatten(-2)[..., 1:, :].mean(1))


@pytest.mark.parametrize("way", ["causal", "boolean", "float", "of the image", "flat", "einsum"])
def test_every_way_of_attending_computes_the_same_logits(way: str) -> None:
    torch.manual_seed(0)
    model = Heads(10, way)
    same_logits(model, to_onnx(quantized(model, "lsq", 8, images(), way=way)))


@pytest.mark.parametrize(
    ("way", "message"),
    [
        ("blind", "attention with a query that sees no key"),
        ("dropout", "attention with a dropout that is left on"),
        ("grouped", r"attention with grouped queries \(enable_gqa\)"),
        ("batch", "attention over the batch"),
        pytest.param(
            "bare",
            "softmax without dim",
            marks=pytest.mark.filterwarnings("ignore:Implicit dimension"),
        ),
    ],
)
def test_attention_that_onnx_has_not_is_refused_by_name(way: str, message: str) -> None:
    torch.manual_seed(0)
    packed = quantized(Heads(10, way), "lsq", 8, images(), way=way)
    with pytest.raises(ConfigError, match=f"^export: format=onnx does not know {message}. Use"):
        to_onnx(packed)


class Moves(nn.Module):
    """Tokens [N, 16, 6] that are moved before a quantized layer reads them."""

    def __init__(self, num_classes: int, way: str) -> None:
        super().__init__()
        self.patches, self.linear = nn.Conv2d(3, 6, 2, stride=2), nn.Linear(6, num_classes)
        self.rows = nn.Parameter(torch.randn(3, 6))
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        n, tokens, width = x.shape
        if self.way == "roll":
            x = x.roll((3, -1), (1, 2))
        elif self.way == "rows":
            x = x[:, torch.arange(tokens, device=x.device).flip(0)[::3]]
        elif self.way == "list":
            x = x[..., [5, 0, 1, 2, -3, 4]]
        elif self.way == "steps":
            x = x[:, None, 1:-2:3, :][:, 0]
        elif self.way == "one":
            x = x[:, -1].unsqueeze(1)
        elif self.way == "axis":
            x = torch.cat((x[..., None, 1:4][..., 0, :], x[..., 3:]), -1)
        elif self.way == "stack":
            x = torch.stack(x.unbind(2)[::-1], -1)
        elif self.way == "sizes":
            x = torch.cat(x.split([tokens // 4, tokens - tokens // 4], 1)[::-1], 1)
        elif self.way == "expand":
            x = x.mean(1, keepdim=True).expand(-1, 3, -1)
        elif self.way == "repeat":
            x = x.repeat(1, 2, 1)
        elif self.way == "pad":
            x = nn.functional.pad(x, (0, 0, 2, 1), value=0.5)
        elif self.way == "batch second":
            x = x.permute(1, 0, -1).contiguous().clone().transpose(0, 1).type_as(x)
        elif self.way == "batch of tokens":
            x = x.reshape(-1, width)[:, None].to(x.device).view(n, tokens, width)
        elif self.way == "of each image":
            x = torch.cat((x, self.rows.unsqueeze(0).repeat(n, 1, 1), x.new_ones(n, 1, width)), 1)
        elif self.way == "positions":
            at = torch.arange(tokens, dtype=torch.float32)[:, None] * torch.linspace(0, 1, width)
            x = x + torch.stack((at.sin(), at.cos())).sum(0)
        elif self.way == "windows":
            masks = torch.tensor([[0.0], [1.0]]).repeat(n, 1).unsqueeze(1)
            x = (x.reshape(n * 2, tokens // 2, width) * masks).view(n, tokens, width)
        else:
            x = torch.where(torch.eye(tokens, width) > 0, -x.exp(), (x - 1) / 2).clamp(-3, 0.5) ** 2
        return self.linear(x).amax(1)


WAYS = (
    *("roll", "rows", "list", "steps", "one", "axis", "stack", "sizes", "expand", "repeat", "pad"),
    *("batch second", "batch of tokens", "of each image", "positions", "windows", "elements"),
)


@pytest.mark.parametrize("way", WAYS)
def test_tokens_can_be_moved_before_a_quantizer_of_four_bits(way: str) -> None:
    torch.manual_seed(0)
    model = Moves(10, way)
    same_logits(model, to_onnx(quantized(model, "lsq", 4, images(), way=way)))


SMALL = {"num_heads": 2, "hidden_dim": 16, "mlp_dim": 32}
SWIN = {"patch_size": [2, 2], "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 2]}
TRANSFORMERS = {
    "vit": partial(torchvision.models.VisionTransformer, 16, 4, 2, **SMALL),
    "swin": partial(torchvision.models.SwinTransformer, **SWIN, window_size=[3, 3]),
    "swin v2": partial(
        torchvision.models.SwinTransformer,
        **SWIN,
        window_size=[4, 4],
        block=swin_transformer.SwinTransformerBlockV2,
        downsample_layer=swin_transformer.PatchMergingV2,
    ),
    "maxvit": partial(
        torchvision.models.MaxVit,
        input_size=(16, 16),
        stem_channels=8,
        partition_size=2,
        block_channels=[8, 16],
        block_layers=[1, 1],
        head_dim=4,
        stochastic_depth_prob=0.2,
    ),
}


def transformer(num_classes: int, kind: str) -> nn.Module:
    return TRANSFORMERS[kind](num_classes=num_classes)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers_of_torchvision_run(name: str, bits: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 3, 16, 16)
    model = transformer(5, name).eval()
    open_attention_(model, (3, 16, 16))
    for parameter in model.parameters():
        if parameter.dim() == 1 or parameter.abs().max() == 0:  # of the head, zero
            nn.init.normal_(parameter, 0.5, 0.2)
        elif name in ("maxvit", "swin v2"):  # their own are too small to tell images apart
            nn.init.normal_(parameter, std=0.2)
    compared(settled(model, x), x, f"{__name__}.transformer", bits, kind=name)
