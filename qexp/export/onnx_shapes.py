"""What moves values without computing with them, in ONNX: views, permutations, slices, joins.

Sizes are those of `Header.input_shape` and become constants of the file; the batch alone stays
open, in whichever dimension it is. So every view is one Reshape to the shape that the network gave,
the batch in it -1.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qexp.errors import ConfigError
from qexp.export.onnx_graph import Graph
from qexp.export.onnx_trace import Batch, Live, Size

FAR = 2**31 - 1  # the end of a slice that has none


def unknown(what: str) -> ConfigError:
    """The error for what has no ONNX form here."""
    return ConfigError(f"export: format=onnx does not know {what}. Use format=packed.")


def pair(value: Any) -> list[int]:
    """[height, width] of what torch takes as one number or two."""
    return [value, value] if isinstance(value, int) else list(value)


# ---------------------------------------------------------------------------------------------
# To a shape that is known: called with the result, `to`


def reshape(graph: Graph, x: str, *_: Any, to: Live, **__: Any) -> str:
    """Whatever gives the elements of `x` another shape."""
    if sum(isinstance(n, Batch) for n in to.sizes) > 1:
        raise unknown("a view with the batch in two dimensions")
    return graph.op("Reshape", x, [n if isinstance(n, int) else -1 for n in to.sizes])


def _expand(graph: Graph, x: str, *_: Any, to: Live, **__: Any) -> str:
    own = graph.sizes(x)
    own = (1,) * (len(to.sizes) - len(own)) + own
    if any(n != m and not isinstance(n, int) for n, m in zip(to.sizes, own, strict=True)):
        raise unknown("one value of an image for the whole batch")
    return graph.op("Expand", x, [n if isinstance(n, int) else 1 for n in to.sizes])


def _parts(
    graph: Graph, x: str, _: Any = None, dim: int = 0, *, to: Sequence[Live], **__: Any
) -> tuple[str, ...]:
    """`chunk` and `split`: slices of the sizes that they gave."""
    axis, start, names = dim % len(graph.sizes(x)), 0, []
    for part in to:
        width = _fixed(part.sizes[axis], "chunks")
        names.append(graph.op("Slice", x, [start], [start + width], [axis]))
        start += width
    return tuple(names)


def _unbind(graph: Graph, x: str, dim: int = 0, *, to: Sequence[Live]) -> tuple[str, ...]:
    axis = dim % len(graph.sizes(x))
    _fixed(graph.sizes(x)[axis], "chunks")
    parts = [graph.op("Slice", x, [i], [i + 1], [axis]) for i in range(len(to))]
    return tuple(graph.op("Squeeze", part, [axis]) for part in parts)


def _index(graph: Graph, x: str, index: Any, *, to: Live) -> str:
    """`x[index]`: integers, slices, None, one list of rows."""
    parts = list(index) if isinstance(index, tuple) else [index]
    parts = [torch.tensor(part) if isinstance(part, list) else part for part in parts]
    sizes = graph.sizes(x)
    taken = sum(part is not None and part is not Ellipsis for part in parts)
    if Ellipsis in [part for part in parts if not isinstance(part, Tensor)]:
        at = next(i for i, part in enumerate(parts) if part is Ellipsis)
        parts[at : at + 1] = [slice(None)] * (len(sizes) - taken)
    cuts: list[tuple[int, int, int, int]] = []
    lists: list[tuple[int, Tensor]] = []
    axis = 0
    for part in parts:
        if part is None:
            continue
        if isinstance(part, Tensor) and part.dtype == torch.int64:
            _fixed(sizes[axis], "rows")
            lists.append((axis, part))
        elif isinstance(part, slice):
            if part != slice(None):
                _fixed(sizes[axis], "a slice")
                cuts.append((part.start or 0, _end(part.stop), axis, part.step or 1))
        elif type(part) is int:
            _fixed(sizes[axis], "an index")
            cuts.append((part, part + 1 or FAR, axis, 1))
        else:
            raise unknown(f"index {index}")
        axis += 1
    if lists:
        if len(lists) > 1 or cuts or None in parts:
            raise unknown(f"index {index}")
        return graph.op("Gather", x, graph.constant(lists[0][1].tolist()), axis=lists[0][0])
    if cuts:
        x = graph.op("Slice", x, *(list(values) for values in zip(*cuts, strict=True)))
    whole = all(isinstance(part, slice) for part in parts)
    return x if whole else reshape(graph, x, to=to)


def _end(stop: int | None) -> int:
    return FAR if stop is None else stop


def _fixed(size: Size, what: str) -> int:
    if not isinstance(size, int):
        raise unknown(f"{what} of the batch")
    return size


# ---------------------------------------------------------------------------------------------
# Permutations and joins


def _permute(graph: Graph, x: str, *dims: Any) -> str:
    order = dims[0] if isinstance(dims[0], (tuple, list)) else dims
    return graph.op("Transpose", x, perm=[d % len(order) for d in order])


def transpose(graph: Graph, x: str | Tensor, dim0: int, dim1: int) -> str:
    """`x` with two dimensions swapped."""
    perm = list(range(len(graph.sizes(x))))
    perm[dim0], perm[dim1] = perm[dim1], perm[dim0]
    return graph.op("Transpose", x, perm=perm)


def _attribute(graph: Graph, x: str, name: str) -> str:
    if name != "mT":
        raise unknown(f"the attribute '{name}' of a tensor")
    return transpose(graph, x, -2, -1)


def _cat(graph: Graph, tensors: Sequence[str], dim: int = 0) -> str:
    return graph.op("Concat", *tensors, axis=dim)


def _stack(graph: Graph, tensors: Sequence[str | Tensor], dim: int = 0) -> str:
    axis = dim % (1 + len(graph.sizes(tensors[0])))
    return graph.op("Concat", *(graph.op("Unsqueeze", t, [axis]) for t in tensors), axis=axis)


def _repeat(graph: Graph, x: str, *counts: Any) -> str:
    times = list(counts[0] if isinstance(counts[0], (tuple, list)) else counts)
    if len(times) != len(graph.sizes(x)):
        raise unknown("repeat with more dimensions than its tensor has")
    return graph.op("Tile", x, times)


def _roll(graph: Graph, x: str, shifts: Any, dims: Any = None) -> str:
    if dims is None:
        raise unknown("roll without dims")
    shifts, dims = ([v] if isinstance(v, int) else v for v in (shifts, dims))
    for shift, dim in zip(shifts, dims, strict=True):
        size = _fixed(graph.sizes(x)[dim], "a roll")
        if start := -shift % size:
            tail = graph.op("Slice", x, [start], [FAR], [dim])
            head = graph.op("Slice", x, [0], [start], [dim])
            sizes, x = graph.sizes(x), graph.op("Concat", tail, head, axis=dim)
            graph.shapes[x] = sizes
    return x


def _pad(graph: Graph, x: str, pad: Any, mode: str = "constant", value: float = 0.0) -> str:
    if mode != "constant":
        raise unknown(f"pad {pad} of mode {mode}")
    if not any(pad):
        return x
    rank = len(graph.sizes(x))
    before, after = [0] * rank, [0] * rank
    for i in range(len(pad) // 2):  # last dimension first
        before[-1 - i], after[-1 - i] = pad[2 * i], pad[2 * i + 1]
    for size, low, high in zip(graph.sizes(x), before, after, strict=True):
        if low or high:
            _fixed(size, "a pad")
    return graph.op("Pad", x, before + after, float(value or 0.0))


def _same(graph: Graph, x: str, *_: Any, **__: Any) -> str:
    return x  # float32, as all values are


RESHAPES = ("reshape", "flatten", "unflatten", "squeeze", "unsqueeze")
RESULTS: dict[Any, Callable[..., Any]] = {  # called with what the node gives, `to`
    **dict.fromkeys(("view", *RESHAPES), reshape),
    **{getattr(torch, name): reshape for name in RESHAPES},
    "expand": _expand,
    "expand_as": _expand,
    torch.chunk: _parts,
    "chunk": _parts,
    torch.split: _parts,
    "split": _parts,
    torch.unbind: _unbind,
    "unbind": _unbind,
    operator.getitem: _index,
}
CALLS: dict[Any, Callable[..., Any]] = {
    getattr: _attribute,
    torch.permute: _permute,
    "permute": _permute,
    torch.cat: _cat,
    torch.concat: _cat,
    torch.stack: _stack,
    "repeat": _repeat,
    torch.roll: _roll,
    "roll": _roll,
    F.pad: _pad,
    **dict.fromkeys((torch.transpose, "transpose", torch.swapaxes, "swapaxes"), transpose),
    **dict.fromkeys((torch.swapdims, "swapdims"), transpose),
    **dict.fromkeys(("contiguous", "clone", "detach", "float", "to", "type_as"), _same),
}
