"""What `onnx_int8` folds together, and its operands as 8-bit integers."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from qexp.engine.source import step_of
from qexp.engine.weight import Weight, planes
from qexp.export.onnx_graph import Graph
from qexp.export.onnx_inputs import window_of
from qexp.quant.modules import QuantConv2d
from qexp.quant.quantizer import Quantizer

LARGEST_BIAS = 2.0**30  # of 32 bits


class Grid(NamedTuple):
    """A grid of unsigned 8-bit codes: x_hat = (code - zero) * step, codes in [low, high].

    Signed codes are moved up by 128: onnxruntime wants one type at both ends of a convolution.
    """

    step: Tensor
    zero: int
    low: int
    high: int

    @classmethod
    def of(cls, step: Tensor, low: int, high: int, zero: int = 0) -> Grid:
        """The grid of codes from `low` to `high`, signed ones if `low` is negative."""
        up = 128 if low < 0 else 0
        return cls(step, zero + up, low + up, high + up)


def quantized(graph: Graph, x: str, grid: Grid) -> str:
    """The codes of `x`, uint8."""
    codes = graph.op("QuantizeLinear", x, graph.constant(grid.step), _byte(graph, grid.zero))
    if (grid.low, grid.high) == (0, 255):
        return codes
    return graph.op("Clip", codes, _byte(graph, grid.low), _byte(graph, grid.high))


def dequantized(graph: Graph, codes: str, grid: Grid) -> str:
    """x_hat of codes."""
    step, zero = graph.constant(grid.step), _byte(graph, grid.zero)
    return graph.op("DequantizeLinear", codes, step, zero)


def _byte(graph: Graph, value: int) -> str:
    return graph.integers(torch.tensor(value), bits=8, signed=False)


def grid_of(q: Quantizer) -> Grid:
    """An input quantizer's codes as 8-bit integers with a zero point."""
    zero = int(getattr(q, "zero", torch.tensor(0)))
    return Grid.of(step_of(q), q.qmin, q.qmax, zero)


def eight_bits(weight: Weight) -> tuple[Tensor, Tensor, float]:
    """`(int8 [C_out, ...], step [C_out], largest level error)` of a layer's weight."""
    exact = planes(weight)
    if len(exact.planes) == 1:
        return exact.planes[0], exact.step * exact.factors[0], 0.0
    levels, index = weight.levels().double(), weight.index.flatten(1)
    top = levels.abs().amax(1, keepdim=True)
    top = torch.where(top > 0, top, 1.0)
    unit = levels / top  # [R, L]
    count = torch.zeros(len(index), unit.shape[1]).scatter_add_(1, index, torch.ones(index.shape))
    count = count.sum(0, keepdim=True) if len(unit) == 1 else count
    best = torch.full((len(unit), 1), 127.0, dtype=torch.float64)
    least = torch.full((len(unit), 1), torch.inf, dtype=torch.float64)
    for n in range(64, 128):
        error = (((unit * n).round() / n - unit).square() * count).sum(1, keepdim=True)
        best, least = torch.where(error < least, n, best), torch.minimum(error, least)
    whole = (unit * best).round()
    worst = ((whole / best - unit).abs() * (count > 0)).max().item()
    codes = whole.expand(len(index), -1).gather(1, index).reshape(weight.codes.shape)
    return codes.to(torch.int8), weight.step() * (top / best)[:, 0].float(), worst


def fold(
    whole: Tensor, w_step: Tensor, gain: Tensor, bias: Tensor, step: Tensor
) -> tuple[Tensor, Tensor, float]:
    """Weights and steps with the gain in them: steps positive, and no bias beyond 30 bits.

    The third is the largest error of a weight that has no code, -128 with its sign turned, as a
    part of the largest of its channel. (What a bias beyond 30 bits costs is far below that bias.)
    """
    rows = (-1, *[1] * (whole.dim() - 1))
    sign = torch.where(gain < 0, -1, 1).reshape(rows)
    folded = w_step * gain.abs()
    least = bias.abs() / (step * LARGEST_BIAS)
    positive = torch.maximum(folded, least).clamp_min(torch.finfo(torch.float32).tiny)
    exact = whole * sign * (folded / positive).reshape(rows)
    shrunk = exact.round().clamp(-128, 127)
    top = exact.abs().flatten(1).amax(1).clamp_min(torch.finfo(torch.float32).tiny)
    error = ((shrunk - exact.round()).abs().flatten(1).amax(1) / top).max().item()
    return shrunk.to(torch.int8), positive, error


def product(
    graph: Graph, layer: Any, x: str, whole: Tensor, w_step: Tensor, bias: Tensor, step: Tensor
) -> str:
    """A quantized layer of dequantized codes `x`, with a bias in 32 bits."""
    if layer.act_quantizer.on_columns:
        whole = whole.reshape(len(whole), -1, 1, 1)
    stored = graph.integers(whole, bits=8, signed=True)
    conv, zero = isinstance(layer, QuantConv2d), torch.zeros(len(whole), dtype=torch.int8)
    # onnxruntime makes a QGemm only of weights whose zero point is written.
    zeros = [] if conv else [graph.integers(zero, bits=8, signed=True)]
    w = graph.op("DequantizeLinear", stored, graph.constant(w_step), *zeros, axis=0)
    operands = [x, w]
    if bool(bias.any()):
        unit = w_step * step
        codes = graph.integers((bias / unit).round(), bits=32, signed=True)
        operands.append(graph.op("DequantizeLinear", codes, graph.constant(unit), axis=0))
    if not conv:
        return graph.op("Gemm", *operands, transB=1)
    window = window_of(layer)
    if layer.act_quantizer.on_columns:
        window = {"kernel_shape": [1, 1]}
    return graph.op("Conv", *operands, **window, group=layer.groups)


class Chain(NamedTuple):
    """A layer and what can be done in its integers: batch norm and ReLU after it.

    Attributes:
        members: the layer first, then what follows it, nodes that do nothing included.
    """

    norm: fx.Node | None
    relu: fx.Node | None
    six: bool  # ReLU6
    members: tuple[fx.Node, ...]

    @property
    def end(self) -> fx.Node:
        return self.members[-1]


def norm_of(modules: dict[str, Any], chain: Chain) -> tuple[Tensor, Tensor]:
    """Gain and bias of a chain's batch norm, or 1 and 0."""
    if chain.norm is None:
        return torch.ones(1), torch.zeros(1)
    norm = modules[str(chain.norm.target)]
    return norm.weight.detach(), norm.bias.detach()
