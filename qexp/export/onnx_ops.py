"""What the modules, functions and methods of float networks become in ONNX.

Those of the CNNs of torchvision.models, beside the quantized layers (`onnx_network.py`) and what
depends on a tensor's shape (`onnx_shapes.py`).
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops.stochastic_depth import StochasticDepth, stochastic_depth

from qexp.export.onnx_graph import Graph
from qexp.export.onnx_shapes import pair, unknown

LOWEST = torch.finfo(torch.float32).min


# ---------------------------------------------------------------------------------------------
# Element by element


def _relu(graph: Graph, x: str, inplace: bool = False) -> str:
    return graph.op("Relu", x)


def _relu6(graph: Graph, x: str, inplace: bool = False) -> str:
    # Not Clip: onnxruntime fuses that with a 4-bit QuantizeLinear, and fails.
    return graph.op("Min", graph.op("Relu", x), graph.constant(6.0))


def _leaky_relu(graph: Graph, x: str, negative_slope: float = 0.01, inplace: bool = False) -> str:
    return graph.op("LeakyRelu", x, alpha=negative_slope)


def _sigmoid(graph: Graph, x: str) -> str:
    return graph.op("Sigmoid", x)


def _silu(graph: Graph, x: str, inplace: bool = False) -> str:
    return graph.op("Mul", x, graph.op("Sigmoid", x))


def _hardsigmoid(graph: Graph, x: str, inplace: bool = False) -> str:
    return graph.op("HardSigmoid", x, alpha=1 / 6, beta=0.5)


def _hardswish(graph: Graph, x: str, inplace: bool = False) -> str:
    return graph.op("HardSwish", x)


def _gelu(graph: Graph, x: str, approximate: str = "none") -> str:
    return graph.op("Gelu", x, approximate=approximate)


def _dropout(
    graph: Graph, x: str, p: float = 0.5, training: bool = False, inplace: bool = False
) -> str:
    if training:
        raise unknown("a dropout that is left on")
    return x


def _depth(graph: Graph, x: str, p: float, mode: str, training: bool = False) -> str:
    return _dropout(graph, x, p, training)


def _operand(value: str | Tensor | float) -> str | Tensor | float:
    if isinstance(value, str):
        return value
    return value.float() if isinstance(value, Tensor) else float(value)


def _binary(kind: str) -> Callable[..., str]:
    return lambda graph, x, y: graph.op(kind, _operand(x), _operand(y))


def _unary(kind: str) -> Callable[..., str]:
    return lambda graph, x: graph.op(kind, x)


def _clamp(graph: Graph, x: str, min: float | None = None, max: float | None = None) -> str:
    # Not Clip: onnxruntime fuses that with a 4-bit QuantizeLinear, and fails.
    x = x if min is None else graph.op("Max", x, _operand(min))
    return x if max is None else graph.op("Min", x, _operand(max))


# ---------------------------------------------------------------------------------------------
# Means


def _reduced(kind: str) -> Callable[..., str]:
    def reduce(graph: Graph, x: str, dim: Any, keepdim: bool = False) -> str:
        axes = [dim] if isinstance(dim, int) else list(dim)
        return graph.op(kind, x, axes, keepdims=int(keepdim))

    return reduce


def _normalize(
    graph: Graph, x: str, p: float = 2.0, dim: int = 1, eps: float = 1e-12, out: None = None
) -> str:
    if p != 2:
        raise unknown(f"normalize with p={p}")
    norm = graph.op("ReduceL2", x, [dim], keepdims=1)
    return graph.op("Div", x, graph.op("Max", norm, float(eps)))


# ---------------------------------------------------------------------------------------------
# Pools and norms


def _max_pool(
    graph: Graph,
    x: str,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> str:
    if return_indices:
        raise unknown("max_pool2d with indices")
    return graph.op(
        "MaxPool",
        x,
        **_window(kernel_size, stride, padding, ceil_mode),
        dilations=pair(dilation),
    )


def _avg_pool(
    graph: Graph,
    x: str,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> str:
    if divisor_override is not None or (ceil_mode and count_include_pad and any(pair(padding))):
        raise unknown("avg_pool2d with this divisor")
    window = _window(kernel_size, stride, padding, ceil_mode)
    return graph.op("AveragePool", x, **window, count_include_pad=int(count_include_pad))


def _window(kernel: Any, stride: Any, padding: Any, ceil_mode: bool) -> dict[str, Any]:
    strides = pair(kernel if stride is None else stride)
    sizes = {"kernel_shape": pair(kernel), "strides": strides, "pads": pair(padding) * 2}
    return sizes | {"ceil_mode": int(ceil_mode)}


def adaptive_pool(graph: Graph, x: str, output_size: Any) -> str:
    """An adaptive average pool of x [N, C, H, W] to planes of `output_size`."""
    plane: list[Any] = list(graph.sizes(x)[-2:])
    wanted = [n if w is None else w for n, w in zip(plane, pair(output_size), strict=True)]
    if wanted == [1, 1]:
        return graph.op("GlobalAveragePool", x)
    if wanted == plane:
        return x
    if all(n % w == 0 for n, w in zip(plane, wanted, strict=True)):
        kernel = [n // w for n, w in zip(plane, wanted, strict=True)]
        return graph.op("AveragePool", x, kernel_shape=kernel, strides=kernel)
    rows, columns = (_means(n, w) for n, w in zip(plane, wanted, strict=True))
    return graph.op("MatMul", graph.op("MatMul", rows, x), columns.T)


def _means(size: int, wanted: int) -> Tensor:
    """[wanted, size]: row i takes the mean from floor(i size / wanted) to ceil((i + 1) ...)."""
    means = torch.zeros(wanted, size)
    for i in range(wanted):
        start, stop = i * size // wanted, -(-(i + 1) * size // wanted)
        means[i, start:stop] = 1 / (stop - start)
    return means


def anchored(graph: Graph, x: str) -> str:
    """`x`, behind an operation that it stays behind.

    onnxruntime moves a QuantizeLinear to before a pool or a permutation, and has neither for
    4-bit integers: it then refuses the file.
    """
    if not x.startswith(("maxpool_", "transpose_", "slice_")):
        return x
    anchor = graph.op("Max", x, graph.constant(LOWEST))
    graph.shapes[anchor] = graph.sizes(x)
    return anchor


def apart(graph: Graph, w: str) -> str:
    """The weight `w` behind an operation that keeps it float32.

    onnxruntime takes a DequantizeLinear and the product that reads it as one: MatMulNBits, which
    rounds the float operand to 8 bits, 32 values together (accuracy level 4, its default); and
    between quantized inputs and outputs, where no bias stands apart, QLinearConv.
    """
    if not w.startswith("dequantizelinear_"):
        return w
    return graph.op("Max", w, graph.constant(LOWEST))


def _layer_norm(
    graph: Graph, x: str, normalized_shape: Any, weight: Any = None, bias: Any = None, eps=1e-5
) -> str:
    gain = graph.constant(torch.ones(tuple(normalized_shape))) if weight is None else weight
    operands = [x, gain] if bias is None else [x, gain, bias]
    axis = -len(tuple(normalized_shape))
    return graph.op("LayerNormalization", *operands, axis=axis, epsilon=eps)


def _batch_norm(graph: Graph, norm: Any, x: str) -> str:
    """A packed batch norm: a product and a sum per channel."""
    gain, bias = (t.reshape(-1, 1, 1) for t in (norm.weight, norm.bias))
    return graph.op("Add", graph.op("Mul", x, graph.constant(gain)), graph.constant(bias))


def _norm(graph: Graph, norm: nn.LayerNorm, x: str) -> str:
    weight, bias = (None if t is None else graph.constant(t) for t in (norm.weight, norm.bias))
    return _layer_norm(graph, x, norm.normalized_shape, weight, bias, norm.eps)


def _max_pool_of(graph: Graph, m: nn.MaxPool2d, x: str) -> str:
    window = (m.kernel_size, m.stride, m.padding, m.dilation, m.ceil_mode, m.return_indices)
    return _max_pool(graph, x, *window)


def _avg_pool_of(graph: Graph, m: nn.AvgPool2d, x: str) -> str:
    window = (m.kernel_size, m.stride, m.padding, m.ceil_mode, m.count_include_pad)
    return _avg_pool(graph, x, *window, m.divisor_override)


MODULES: dict[type[nn.Module], Callable[[Graph, Any, str], str]] = {
    nn.BatchNorm2d: _batch_norm,
    nn.LayerNorm: _norm,
    nn.Identity: lambda graph, m, x: x,
    nn.Dropout: lambda graph, m, x: x,
    nn.Dropout2d: lambda graph, m, x: x,
    StochasticDepth: lambda graph, m, x: x,
    nn.ReLU: lambda graph, m, x: _relu(graph, x),
    nn.ReLU6: lambda graph, m, x: _relu6(graph, x),
    nn.LeakyReLU: lambda graph, m, x: _leaky_relu(graph, x, m.negative_slope),
    nn.Sigmoid: lambda graph, m, x: _sigmoid(graph, x),
    nn.SiLU: lambda graph, m, x: _silu(graph, x),
    nn.Hardsigmoid: lambda graph, m, x: _hardsigmoid(graph, x),
    nn.Hardswish: lambda graph, m, x: _hardswish(graph, x),
    nn.GELU: lambda graph, m, x: _gelu(graph, x, m.approximate),
    nn.MaxPool2d: _max_pool_of,
    nn.AvgPool2d: _avg_pool_of,
    nn.AdaptiveAvgPool2d: lambda graph, m, x: adaptive_pool(graph, x, m.output_size),
    nn.Tanh: lambda graph, m, x: graph.op("Tanh", x),
}

CALLS: dict[Any, Callable[..., str]] = {
    F.relu: _relu,
    torch.relu: _relu,
    "relu": _relu,
    F.relu6: _relu6,
    F.leaky_relu: _leaky_relu,
    torch.sigmoid: _sigmoid,
    "sigmoid": _sigmoid,
    F.silu: _silu,
    F.hardsigmoid: _hardsigmoid,
    F.hardswish: _hardswish,
    F.gelu: _gelu,
    F.dropout: _dropout,
    stochastic_depth: _depth,
    **dict.fromkeys((operator.add, operator.iadd, torch.add, "add"), _binary("Add")),
    **dict.fromkeys((operator.sub, operator.isub, torch.sub, "sub"), _binary("Sub")),
    **dict.fromkeys((operator.mul, operator.imul, torch.mul, "mul"), _binary("Mul")),
    **dict.fromkeys((operator.truediv, operator.itruediv, torch.div, "div"), _binary("Div")),
    **dict.fromkeys((operator.pow, torch.pow, "pow"), _binary("Pow")),
    **dict.fromkeys((operator.neg, torch.neg, "neg"), _unary("Neg")),
    **dict.fromkeys((torch.exp, "exp"), _unary("Exp")),
    **dict.fromkeys((torch.log, "log"), _unary("Log")),
    **dict.fromkeys((torch.sqrt, "sqrt"), _unary("Sqrt")),
    **dict.fromkeys((torch.abs, "abs"), _unary("Abs")),
    **dict.fromkeys((torch.tanh, F.tanh, "tanh"), _unary("Tanh")),
    **dict.fromkeys((torch.clamp, "clamp", torch.clip, "clip"), _clamp),
    **dict.fromkeys((torch.clamp_min, "clamp_min"), _clamp),
    **dict.fromkeys((torch.mean, "mean"), _reduced("ReduceMean")),
    **dict.fromkeys((torch.sum, "sum"), _reduced("ReduceSum")),
    **dict.fromkeys((torch.amax, "amax"), _reduced("ReduceMax")),
    F.normalize: _normalize,
    F.max_pool2d: _max_pool,
    F.avg_pool2d: _avg_pool,
    F.adaptive_avg_pool2d: adaptive_pool,
    F.layer_norm: _layer_norm,
}
