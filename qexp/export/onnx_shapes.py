"""What depends on a tensor's shape, in ONNX: sizes, views, chunks, adaptive pools.

Sizes are those of `Header.input_shape` and become constants of the file; the batch alone stays
open. So `x.view(x.size(0), groups, x.size(1) // groups, ...)` is one Reshape, and arithmetic with
the batch has no form here.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from qexp.errors import ConfigError
from qexp.export.onnx_graph import Graph

BATCH = object()  # the size that is open; nothing can be computed from it
ON_SIZES = {operator.getitem, operator.add, operator.sub, operator.mul, operator.floordiv}


def unknown(what: str) -> ConfigError:
    """The error for what has no ONNX form here."""
    return ConfigError(f"export: format=onnx does not know {what}. Use format=packed.")


def pair(value: Any) -> list[int]:
    """[height, width] of what torch takes as one number or two."""
    return [value, value] if isinstance(value, int) else list(value)


def _size(graph: Graph, x: str, dim: int | None = None, *, size: Sequence[int]) -> Any:
    sizes = (BATCH, *size)
    return sizes if dim is None else sizes[dim]


def _attribute(graph: Graph, x: str, name: str, *, size: Sequence[int]) -> Any:
    if name != "shape":
        raise unknown(f"the attribute '{name}' of a tensor")
    return _size(graph, x, size=size)


def on_sizes(target: Any, operands: Sequence[Any]) -> bool:
    """Whether a function only picks from sizes or chunks, or computes with sizes."""
    return target in ON_SIZES and not any(isinstance(value, str) for value in operands)


def computed(target: Callable[..., Any], graph: Graph, *operands: Any) -> Any:
    """What such a function gives."""
    return target(*operands)


def view(graph: Graph, x: str, *shape: Any) -> str:
    """`x.view` and `x.reshape`; a batch that is named stays the first dimension."""
    sizes = list(shape[0] if isinstance(shape[0], (tuple, list)) else shape)
    if sizes[0] is BATCH:
        sizes[0] = 0  # as it is
    if not all(isinstance(n, int) for n in sizes):
        raise unknown("a view with the batch behind the first dimension")
    return graph.op("Reshape", x, graph.constant(sizes))


def _transpose(graph: Graph, x: str, dim0: int, dim1: int, *, size: Sequence[int]) -> str:
    perm = list(range(1 + len(size)))
    perm[dim0], perm[dim1] = perm[dim1], perm[dim0]
    return graph.op("Transpose", x, perm=perm)


def _chunk(
    graph: Graph, x: str, chunks: int, dim: int = 0, *, size: Sequence[int]
) -> tuple[str, ...]:
    axis = dim % (1 + len(size))
    if axis == 0:
        raise unknown("chunks of the batch")
    width = -(-size[axis - 1] // chunks)  # the last one may be smaller
    starts = range(0, size[axis - 1], width)
    return tuple(
        graph.op("Slice", x, *(graph.constant([n]) for n in (start, start + width, axis)))
        for start in starts
    )


def adaptive_pool(graph: Graph, x: str, output_size: Any, *, size: Sequence[int]) -> str:
    """An adaptive average pool of x [N, *size] to planes of `output_size`."""
    plane = list(size[-2:])
    wanted = [n if w is None else w for n, w in zip(plane, pair(output_size), strict=True)]
    if wanted == [1, 1]:
        return graph.op("GlobalAveragePool", x)
    if wanted == plane:
        return x
    if all(n % w == 0 for n, w in zip(plane, wanted, strict=True)):
        kernel = [n // w for n, w in zip(plane, wanted, strict=True)]
        return graph.op("AveragePool", x, kernel_shape=kernel, strides=kernel)
    rows, columns = (_means(n, w) for n, w in zip(plane, wanted, strict=True))
    x = graph.op("MatMul", graph.constant(rows), x)
    return graph.op("MatMul", x, graph.constant(columns.T))


def _means(size: int, wanted: int) -> torch.Tensor:
    """[wanted, size]: row i takes the mean from floor(i size / wanted) to ceil((i + 1) ...)."""
    means = torch.zeros(wanted, size)
    for i in range(wanted):
        start, stop = i * size // wanted, -(-(i + 1) * size // wanted)
        means[i, start:stop] = 1 / (stop - start)
    return means


CALLS: dict[Any, Callable[..., Any]] = {  # called with the `size` of their first input
    "size": _size,
    getattr: _attribute,
    F.adaptive_avg_pool2d: adaptive_pool,
    torch.chunk: _chunk,
    "chunk": _chunk,
    torch.transpose: _transpose,
    "transpose": _transpose,
}
