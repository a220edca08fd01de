"""What the modules, functions and methods of float networks become in ONNX.

Those of the CNNs of torchvision.models, beside the quantized layers (`onnx_network.py`) and what
depends on a tensor's shape (`onnx_shapes.py`).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops.stochastic_depth import StochasticDepth, stochastic_depth

from qexp.export.onnx_graph import Graph
from qexp.export.onnx_shapes import pair, unknown, view

LOWEST = torch.finfo(torch.float32).min
FAR = 2**31 - 1  # the end of a slice that has none


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


def _operand(graph: Graph, value: str | float) -> str:
    return value if isinstance(value, str) else graph.constant(float(value))


def _add(graph: Graph, x: str | float, y: str | float) -> str:
    return graph.op("Add", _operand(graph, x), _operand(graph, y))


def _mul(graph: Graph, x: str | float, y: str | float) -> str:
    return graph.op("Mul", _operand(graph, x), _operand(graph, y))


# ---------------------------------------------------------------------------------------------
# Shapes


def _flatten(graph: Graph, x: str, start_dim: int = 0, end_dim: int = -1) -> str:
    if (start_dim, end_dim) != (1, -1):
        raise unknown(f"flatten from dimension {start_dim} to {end_dim}")
    return graph.op("Flatten", x)


def _mean(graph: Graph, x: str, dim: Any, keepdim: bool = False) -> str:
    axes = graph.constant([dim] if isinstance(dim, int) else list(dim))
    return graph.op("ReduceMean", x, axes, keepdims=int(keepdim))


def _permute(graph: Graph, x: str, *dims: Any) -> str:
    return graph.op("Transpose", x, perm=list(dims[0] if len(dims) == 1 else dims))


def _cat(graph: Graph, tensors: Sequence[str], dim: int = 0) -> str:
    return graph.op("Concat", *tensors, axis=dim)


def _pad(graph: Graph, x: str, pad: Any, mode: str = "constant", value: float = 0.0) -> str:
    if mode != "constant" or len(pad) != 6:
        raise unknown(f"pad {pad} of mode {mode}")
    left, right, top, bottom, before, after = pad  # last dimension first
    sizes = [0, before, top, left, 0, after, bottom, right]
    return graph.op("Pad", x, graph.constant(sizes), graph.constant(float(value or 0.0)))


def _slice(graph: Graph, x: str, index: Any) -> str:
    parts = index if isinstance(index, tuple) else (index,)
    whole = [type(p) is int for p in parts]
    if whole[0] or not all(w or isinstance(p, slice) for w, p in zip(whole, parts, strict=True)):
        raise unknown(f"index {index}")
    parts = [slice(p, p + 1 or FAR) if w else p for w, p in zip(whole, parts, strict=True)]
    lists = (
        [p.start or 0 for p in parts],
        [FAR if p.stop is None else p.stop for p in parts],
        list(range(len(parts))),
        [p.step or 1 for p in parts],
    )
    x = graph.op("Slice", x, *(graph.constant(v) for v in lists))
    axes = [axis for axis, w in enumerate(whole) if w]
    return graph.op("Squeeze", x, graph.constant(axes)) if axes else x


def _unsqueeze(graph: Graph, x: str, dim: int) -> str:
    return graph.op("Unsqueeze", x, graph.constant([dim]))


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


def anchored(graph: Graph, x: str) -> str:
    """`x`, behind an operation that it stays behind.

    onnxruntime moves a QuantizeLinear to before a pool or a permutation, and has neither for
    4-bit integers: it then refuses the file.
    """
    if not x.startswith(("maxpool_", "transpose_", "slice_")):
        return x
    return graph.op("Max", x, graph.constant(LOWEST))


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
    nn.Flatten: lambda graph, m, x: _flatten(graph, x, m.start_dim, m.end_dim),
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
    operator.add: _add,
    operator.iadd: _add,
    torch.add: _add,
    "add": _add,
    operator.mul: _mul,
    operator.imul: _mul,
    torch.mul: _mul,
    "mul": _mul,
    torch.flatten: _flatten,
    "flatten": _flatten,
    torch.permute: _permute,
    "permute": _permute,
    torch.reshape: view,
    "reshape": view,
    "view": view,
    "contiguous": lambda graph, x: x,
    torch.cat: _cat,
    "mean": _mean,
    torch.mean: _mean,
    F.max_pool2d: _max_pool,
    F.avg_pool2d: _avg_pool,
    F.layer_norm: _layer_norm,
    F.pad: _pad,
    operator.getitem: _slice,
    torch.unsqueeze: _unsqueeze,
    "unsqueeze": _unsqueeze,
}
