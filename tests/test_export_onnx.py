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

from qexp.errors import ConfigError
from qexp.export.packed import Packed, pack_network
from qexp.models.resnet import ResNet
from qexp.quant.adaround import AdaRound
from qexp.quant.aquant import AQuant
from qexp.quant.convert import Bits, calibrate_, quantize_
from qexp.quant.lsq import LSQ
from qexp.quant.trace import trace
from qexp.recipes.build import load_run

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

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
        elif self.way == "alpha":
            y = torch.add(y, y, alpha=2)
        elif self.way == "batch view":
            return self.linear(y.view(8, y.size(0), -1).transpose(0, 1).mean(2))
        elif self.way == "batch sum":
            y = y.view(y.shape[0] * 1, 8, -1, 1)
        elif self.way.startswith("flatten"):
            return self.linear(self.flatten(y.mean((2, 3), keepdim=True)).flatten(1))
        elif self.way == "alone":
            y = nn.functional.relu(y, inplace=True)
        return self.linear(y.mean((2, 3)))


@pytest.mark.parametrize(
    ("way", "message"),
    [
        ("relu read again", "'relu' changes in place what 'conv' gave"),
        ("alpha", "format=onnx does not know .*alpha"),
        ("flatten rows", "format=onnx does not know flatten from dimension 1 to 2"),
        ("batch view", "does not know a view with the batch behind the first dimension"),
        ("batch sum", "format=onnx does not know .*mul"),
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
        torch.testing.assert_close(run(to_onnx(packed), images()), model(images()))


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
    "constant window": {"fusion": "window", "border": "constant"},
}


@pytest.mark.parametrize("keywords", BORDERS.values(), ids=BORDERS.keys())
def test_every_border_runs(keywords: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "border", (AdaRound, partial(AQuant, **keywords)))
    model = network("border")
    with torch.no_grad():
        ours, theirs = model(images()), run(to_onnx(packed_of(model)), images())
    assert (theirs - ours).abs().amax(1).median() < 1e-4


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
