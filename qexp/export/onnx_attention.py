"""Products of two activations in ONNX, and what attention makes of them."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qexp.export.onnx_graph import Graph
from qexp.export.onnx_shapes import transpose, unknown


def _matmul(graph: Graph, x: Any, y: Any) -> str:
    return graph.op("MatMul", x, y)


def _baddbmm(graph: Graph, x: Any, y: Any, z: Any, *, beta: float = 1, alpha: float = 1) -> str:
    product = graph.op("Mul", graph.op("MatMul", y, z), float(alpha))
    return graph.op("Add", graph.op("Mul", x, float(beta)), product)


def _einsum(graph: Graph, equation: str, *tensors: Any) -> str:
    operands = tensors[0] if isinstance(tensors[0], (tuple, list)) else tensors
    return graph.op("Einsum", *operands, equation=equation.replace(" ", ""))


def _linear(graph: Graph, x: str, weight: Any, bias: Any = None) -> str:
    y = graph.op("MatMul", x, transpose(graph, weight, 0, 1))
    return y if bias is None else graph.op("Add", y, bias)


def _softmax(
    graph: Graph, x: str, dim: int | None = None, _stacklevel: int = 3, dtype: Any = None
) -> str:
    if dim is None:
        raise unknown("softmax without dim")
    return graph.op("Softmax", x, axis=dim)


def _masked_fill(graph: Graph, x: Any, mask: Any, value: Any) -> str:
    return _where(graph, mask, value, x)


def _where(graph: Graph, mask: Any, x: Any, y: Any) -> str:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise unknown("a mask that depends on the image")
    x, y = (v if isinstance(v, (str, Tensor)) else float(v) for v in (x, y))
    return graph.op("Where", mask, x, y)


def _attention(
    graph: Graph,
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> str:
    """softmax(query key^T scale + mask) value, as `F.scaled_dot_product_attention` has it."""
    if dropout_p:
        raise unknown("attention with a dropout that is left on")
    if enable_gqa:
        raise unknown("attention with grouped queries (enable_gqa)")
    length, width = graph.sizes(query)[-2:]
    if not isinstance(width, int):
        raise unknown("attention over the batch")
    if is_causal:
        attn_mask = torch.ones(length, graph.sizes(key)[-2], dtype=torch.bool).tril()  # type: ignore[call-overload]
    query = graph.op("Mul", query, width**-0.5 if scale is None else float(scale))
    scores = graph.op("MatMul", query, transpose(graph, key, -2, -1))
    if isinstance(attn_mask, Tensor):
        seen = attn_mask if attn_mask.dtype == torch.bool else attn_mask > -torch.inf
        if not bool(seen.any(-1).all()):  # torch gives zeros there, Softmax no numbers
            raise unknown("attention with a query that sees no key")
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros(attn_mask.shape).masked_fill(~attn_mask, -torch.inf)
    if attn_mask is not None:
        scores = graph.op("Add", scores, attn_mask)
    return graph.op("MatMul", graph.op("Softmax", scores, axis=-1), value)


MODULES: dict[type[nn.Module], Callable[[Graph, Any, str], str]] = {
    nn.Softmax: lambda graph, m, x: _softmax(graph, x, m.dim),
}
CALLS: dict[Any, Callable[..., str]] = {
    F.scaled_dot_product_attention: _attention,
    **dict.fromkeys((operator.matmul, torch.matmul, "matmul", torch.bmm, "bmm"), _matmul),
    **dict.fromkeys((torch.baddbmm, "baddbmm"), _baddbmm),
    torch.einsum: _einsum,
    F.linear: _linear,
    **dict.fromkeys((F.softmax, torch.softmax, "softmax"), _softmax),
    **dict.fromkeys((torch.masked_fill, "masked_fill"), _masked_fill),
    torch.where: _where,
}
