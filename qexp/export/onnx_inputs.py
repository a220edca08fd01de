"""Quantized inputs as ONNX nodes, float32: what a runtime makes of them is its affair.

lsq of 4 or 8 bits QuantizeLinear, DequantizeLinear, where the weight is one too and no wider:
                   onnxruntime requantizes a float weight it finds beside a quantized input, and
                   has no kernel for uint4 times int8
others             Div, Round, Clip, Mul
asq                the same, the step of each sample from the adapter's own nodes
n2uq               the number of thresholds below x, times the step
apot               the number of midpoints below x / clip, Gather from the levels
aquant             floor(u + 1 - B(u)); per row on im2col columns (`columns`)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qexp.errors import ConfigError
from qexp.export.onnx_graph import Graph
from qexp.quant.additive import APoTActivation
from qexp.quant.aquant import AQuant
from qexp.quant.asq import ASQ, MIN_FACTOR
from qexp.quant.dorefa import PACT, DoReFaActivation
from qexp.quant.functional import MIN_SCALE, midpoints
from qexp.quant.lsq import LSQ, LSQPlus
from qexp.quant.n2uq import N2UQ
from qexp.quant.nearest import Nearest
from qexp.quant.quantizer import Identity, Quantizer

# Thresholds up to which a comparison with each is faster in onnxruntime than a search, whose later
# steps gather one for each element: 18 and 28 ms for 15 (2 M elements, one thread), 281 and 58 for
# 255, whose 18 layers in a ResNet-20 would take minutes to load (by hand, not kept).
FEW = 15


def quantized_input(
    graph: Graph, quantizer: Quantizer, x: str, name: str, weight_bits: int = 0
) -> str:
    """x_hat of the value `x`.

    Args:
        weight_bits: `onnx_weights.standard_bits` of the layer.

    Raises:
        ConfigError: a quantizer that has no ONNX form.
    """
    check_input(quantizer, name)
    standard = quantizer.bits in (4, 8) and 0 < weight_bits <= quantizer.bits
    if standard and type(quantizer) is LSQ:
        return _standard(graph, quantizer, x)
    return INPUTS[type(quantizer)](graph, quantizer, x)


def check_input(quantizer: Quantizer, name: str) -> None:
    """Refuse the inputs of layer `name` if they have no ONNX form.

    Raises:
        ConfigError: the quantizer has none.
    """
    if type(quantizer) not in INPUTS:
        raise ConfigError(
            f"export: layer '{name}' has inputs of {type(quantizer).__name__}, which ONNX nodes "
            "are not written for. Use format=packed."
        )


def _standard(graph: Graph, q: LSQ, x: str) -> str:
    step = graph.constant(q.scale.clamp_min(MIN_SCALE))
    zero = graph.integers(torch.tensor(0), bits=q.bits, signed=q.signed)
    return graph.op("DequantizeLinear", graph.op("QuantizeLinear", x, step, zero), step, zero)


def _uniform(graph: Graph, q: Quantizer, x: str, scale: Tensor) -> str:
    return _explicit(graph, q, x, graph.constant(scale))


def _explicit(graph: Graph, q: Quantizer, x: str, step: str) -> str:
    """clip(round(x / step), qmin, qmax) * step."""
    rounded = graph.op("Round", graph.op("Div", x, step))
    bounds = (graph.constant(float(q.qmin)), graph.constant(float(q.qmax)))
    return graph.op("Mul", graph.op("Clip", rounded, *bounds), step)


def _lsq(graph: Graph, q: Any, x: str) -> str:
    return _uniform(graph, q, x, q.scale.clamp_min(MIN_SCALE))


def _pact(graph: Graph, q: Any, x: str) -> str:
    return _uniform(graph, q, x, q.step())


def _lsqplus(graph: Graph, q: Any, x: str) -> str:
    offset = graph.constant(q.offset)
    return graph.op("Add", _lsq(graph, q, graph.op("Sub", x, offset)), offset)


def _nearest(graph: Graph, q: Any, x: str) -> str:
    step, zero = graph.constant(q.scale.clamp_min(MIN_SCALE)), graph.constant(q.zero)
    half = graph.op("Add", graph.op("Div", x, step), graph.constant(0.5))
    x_int = graph.op("Add", graph.op("Floor", half), zero)
    bounds = (graph.constant(float(q.qmin)), graph.constant(float(q.qmax)))
    return graph.op("Mul", graph.op("Sub", graph.op("Clip", x_int, *bounds), zero), step)


def _asq(graph: Graph, q: Any, x: str) -> str:
    beta = factor(graph, q, x)
    if beta is None:
        return _uniform(graph, q, x, q.scale.clamp_min(MIN_SCALE))
    if q.dequantize == "plain":
        return _uniform(graph, q, graph.op("Div", x, beta), q.scale.clamp_min(MIN_SCALE))
    scaled = graph.op("Mul", beta, graph.constant(q.scale))
    return _explicit(graph, q, x, graph.op("Max", scaled, graph.constant(MIN_SCALE)))


def factor(graph: Graph, q: Any, x: str) -> str | None:
    """ASQ's beta of each sample, [N, 1, ...] as x [N, ...]; None if it is 1."""
    if q.factor == "frozen":
        return None
    rank = 4 if len(q.shape) > 1 else len(graph.sizes(x))
    beta = graph.op("Max", _factor(graph, q, x, rank), graph.constant(MIN_FACTOR))
    return beta if rank == 2 else graph.op("Reshape", beta, [-1, *[1] * (rank - 1)])


def _factor(graph: Graph, q: Any, x: str, rank: int) -> str:
    """[N, 1] before the lower bound."""
    if q.adapter is None:  # statistics: mean|x_n| over the running mean
        mean = graph.op("ReduceMean", graph.op("Abs", x), list(range(1, rank)), keepdims=0)
        return graph.op("Reshape", graph.op("Div", mean, graph.constant(q.mean_abs)), [-1, 1])
    space = [2, 3] if len(q.shape) > 1 else list(range(1, rank - 1))  # or tokens
    means = graph.op("ReduceMean", x, space, keepdims=0) if space else x
    for module in q.adapter:
        if isinstance(module, nn.Linear):
            constants = (graph.constant(module.weight), graph.constant(module.bias))
            means = graph.op("Gemm", means, *constants, transB=1)
        elif isinstance(module, nn.LeakyReLU):
            means = graph.op("LeakyRelu", means, alpha=module.negative_slope)
        else:
            means = graph.op("Relu", means)
    if q.factor == "relu":
        return graph.op("Relu", means)
    if q.factor == "softplus":
        return graph.op("Softplus", means)
    bounds = (graph.constant(-1.0), graph.constant(1.0))
    return graph.op("Exp", graph.op("Clip", means, *bounds))


def _n2uq(graph: Graph, q: Any, x: str) -> str:
    count = _above(graph, x, q.thresholds(), float(q.qmin))
    return graph.op("Mul", count, graph.constant(q.grid()[1]))


def _above(graph: Graph, x: str, thresholds: Tensor, start: float) -> str:
    """`start` and the number of ascending `thresholds` [m] that x is above, float32."""
    if len(thresholds) > FEW:
        index = graph.op("Cast", _searched(graph, x, thresholds), to=1)
        return graph.op("Add", index, graph.constant(start))
    # One comparison a threshold: a sum of m tensors, not one tensor with m times the elements.
    count = graph.constant(start)
    for threshold in thresholds:
        above = graph.op("Greater", x, graph.constant(threshold))
        count = graph.op("Add", graph.op("Cast", above, to=1), count)
    return count


def _searched(graph: Graph, x: str, thresholds: Tensor) -> str:
    """The number of thresholds below x as int32, by halves: a bit of it for each comparison."""
    bits = len(thresholds).bit_length()
    table = thresholds.new_full((2**bits - 1,), torch.inf)
    table[: len(thresholds)] = thresholds
    index = ""
    for bit in reversed(range(bits)):
        halves = table[2**bit - 1 :: 2 ** (bit + 1)]
        half = graph.op("Gather", graph.constant(halves), index) if index else None
        above = graph.op("Greater", x, half or graph.constant(halves[0]))
        one = graph.op("Cast", above, to=6)
        twice = graph.op("Add", index, index) if index else None
        index = graph.op("Add", twice, one) if twice else one
    return index


def _apot(graph: Graph, q: Any, x: str) -> str:
    clip = graph.constant(q.scale.clamp_min(MIN_SCALE))
    code = _above(graph, graph.op("Div", x, clip), midpoints(q.grid), 0.0)
    levels = graph.op("Gather", graph.constant(q.grid), graph.op("Cast", code, to=6))  # int32
    return graph.op("Mul", levels, clip)


def columns(graph: Graph, conv: nn.Conv2d, x: str) -> str:
    """im2col of a convolution's input, [N, C_in * kh * kw, H', W'], values bit for bit.

    A convolution of each channel with the windows' unit vectors: ONNX has no im2col.
    """
    channels, window = conv.in_channels, conv.kernel_size[0] * conv.kernel_size[1]
    unit = torch.eye(window).reshape(window, 1, *conv.kernel_size).repeat(channels, 1, 1, 1)
    return graph.op("Conv", x, graph.constant(unit), **window_of(conv), group=channels)


def window_of(conv: nn.Conv1d | nn.Conv2d | nn.ConvTranspose2d) -> dict[str, list[int]]:
    """Kernel, strides, pads and dilations as a Conv node has them."""
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        raise ConfigError(
            f"export: format=onnx does not know padding={conv.padding}, {conv.padding_mode}. "
            "Use format=packed."
        )
    return {
        "kernel_shape": list(conv.kernel_size),
        "strides": list(conv.stride),
        "pads": list(conv.padding) * 2,
        "dilations": list(conv.dilation),
    }


def _aquant(graph: Graph, q: Any, x: str) -> str:
    rows = (1, -1, 1, 1) if len(q.shape) > 1 else (1, -1)  # of [N, R, H, W] or [N, R]
    step, zero = graph.constant(q.scale.clamp_min(MIN_SCALE)), graph.constant(q.zero)
    u = graph.op("Div", x, step)
    t = graph.op("Mul", u, graph.constant(1.0 / (q.qmax - q.qmin)))
    coefficients = [graph.constant(a.reshape(rows)) for a in q.border]
    v = coefficients.pop()
    while coefficients:
        v = graph.op("Add", coefficients.pop(), graph.op("Mul", t, v))
    if q.fusion != "none":
        v = _fused(graph, q, u, v)
    if q.squash == "sigmoid":
        border = graph.op("Sigmoid", graph.op("Mul", graph.constant(4.0), v))
    else:
        half = graph.op("Add", graph.constant(0.5), v)
        border = graph.op("Clip", half, graph.constant(0.0), graph.constant(1.0))
    up = graph.op("Add", u, graph.op("Sub", graph.constant(1.0), border))
    x_int = graph.op("Add", graph.op("Floor", up), zero)
    bounds = (graph.constant(float(q.qmin)), graph.constant(float(q.qmax)))
    return graph.op("Mul", graph.op("Sub", graph.op("Clip", x_int, *bounds), zero), step)


def _fused(graph: Graph, q: Any, u: str, v: str) -> str:
    """v' of a window's rows, which see each other through `mixing` [C, window, window]."""
    feature = v if q.fusion == "window" else graph.op("Sub", u, _nearest_integer(graph, u))
    if len(q.shape) == 1:  # a linear layer: windows of one row
        mixed = graph.op("Mul", feature, graph.constant(q.mixing.reshape(1, -1)))
    else:
        if q.border.shape[0] == 1 and q.fusion == "window":  # a constant: one value a row, no map
            feature = graph.op("Add", feature, graph.op("Mul", u, graph.constant(0.0)))
        kernel = graph.constant(q.mixing.reshape(-1, q.window, 1, 1))
        mixed = graph.op("Conv", feature, kernel, kernel_shape=[1, 1], group=q.shape[0])
    return mixed if q.fusion == "window" else graph.op("Add", v, mixed)


def _nearest_integer(graph: Graph, u: str) -> str:
    return graph.op("Floor", graph.op("Add", u, graph.constant(0.5)))


def _identity(graph: Graph, q: Any, x: str) -> str:
    return x


INPUTS: dict[type[Quantizer], Callable[[Graph, Any, str], str]] = {
    Identity: _identity,
    LSQ: _lsq,
    LSQPlus: _lsqplus,
    DoReFaActivation: _lsq,
    PACT: _pact,
    Nearest: _nearest,
    ASQ: _asq,
    N2UQ: _n2uq,
    APoTActivation: _apot,
    AQuant: _aquant,
}
