"""ONNX: the same network in another program, from the same integers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_export import METHODS, SHAPE, images, network, packed_of
from torch import Tensor, nn

from qexp.export.packed import Packed, pack_network
from qexp.models.resnet import ResNet
from qexp.quant.convert import Bits, calibrate_, quantize_
from qexp.quant.lsq import LSQ
from qexp.quant.trace import trace

pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

from qexp.export.onnx_network import to_onnx  # noqa: E402


def run(model: Any, x: Tensor) -> Tensor:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return torch.from_numpy(session.run(None, {"images": x.numpy()})[0])


@pytest.mark.parametrize("method", [m for m in METHODS if m[:2] != "aq" and m != "adaround"])
def test_onnxruntime_computes_the_same_logits(method: str) -> None:
    model = network(method, fold=method == "adaround")
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


@pytest.mark.parametrize("widths", [Bits(4, 8), Bits(8, 4)])
def test_mixed_widths_run(widths: Bits) -> None:
    model = network("lsq", widths)
    with torch.no_grad():
        ours, theirs = model(images()), run(to_onnx(packed_of(model)), images())
    assert (theirs - ours).abs().amax(1).median() < 1e-4


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
