"""Cells of a sorted grid: which one an element falls in, and sums of values by cell.

A non-uniform quantizer asks two things of every element, forward and backward: its cell between
sorted borders, and a contribution to that cell's sum (the gradient of a threshold, the mean of a
codebook's members). Both are one pass, O(log cells) and O(1) an element, whatever the number of
cells; neither builds a table of elements x cells.

The search runs as `torch.bucketize` in eager mode. In a compiled CPU kernel that is scalar code
with unpredictable branches, so the same binary search is written without them, one comparison a
bit; a border is picked from a table of up to 2^SELECT_DEPTH entries by a tree of selects, one SIMD
instruction each, from a larger one by a gather. Measured for 2 M elements at 4 bits, one thread:
26 ms bucketize, 7 ms gathers, 1.3 ms selects (by hand, not kept).
"""

from __future__ import annotations

import torch
from torch import Tensor

from qexp.quant.functional import midpoints

SELECT_DEPTH = 4


def _select(table: Tensor, masks: list[Tensor]) -> Tensor:
    """`table[i]` where the bits of i are `masks`, most significant first; table [2^len(masks)]."""
    if not masks:
        return table[0]
    half = table.shape[0] // 2
    return torch.where(masks[0], _select(table[half:], masks[1:]), _select(table[:half], masks[1:]))


def gather(table: Tensor, index: Tensor, masks: list[Tensor]) -> Tensor:
    """`table[index]`, for the `(index, masks)` that `search` returned.

    Shape: table [2^k] with the k of the search; index any; result as index.
    """
    if 0 < len(masks) <= SELECT_DEPTH:
        return _select(table, masks)
    return table.index_select(0, index.reshape(-1)).view(index.shape)


def search(x: Tensor, table: Tensor) -> tuple[Tensor, list[Tensor]]:
    """`#{i: x > table[i]}` as int32; inside a compiled kernel also the bits of that number.

    Shape: x any; table [2^k - 1], sorted ascending; result as x.
    """
    if not torch.compiler.is_compiling():
        return torch.bucketize(x.contiguous(), table, out_int32=True), []
    index = torch.zeros_like(x, dtype=torch.int32)
    masks: list[Tensor] = []
    for bit in reversed(range(table.shape[0].bit_length())):
        candidates = table[2**bit - 1 :: 2 ** (bit + 1)]  # [2^len(masks)]
        masks.append(x > (gather(candidates, index, masks) if masks else candidates[0]))
        index = 2 * index + masks[-1].to(torch.int32)
    return index, masks


def level_tables(grid: Tensor) -> tuple[Tensor, Tensor]:
    """The levels [2^k] and the borders between them [2^k - 1], for `gather` and `search`.

    Filled up with the last level, behind borders that nothing passes. Shape: grid [L], sorted.
    """
    size = grid.numel()
    missing = (1 << (size - 1).bit_length()) - size
    levels = torch.cat([grid, grid[-1:].expand(missing)])
    return levels, torch.cat([midpoints(grid), grid.new_full((missing,), torch.inf)])


@torch.library.custom_op("qexp::bin_sums", mutates_args=())
def bin_sums(pairs: Tensor, index: Tensor, bins: int) -> Tensor:
    """Sum pairs of values by bin: out[k] = sum of the pairs whose index is k.

    One scatter for both: a pair is added as one complex number. Opaque to the compiler, whose own
    scatter on CPU is an atomic addition in no fixed order; this one is deterministic there.
    Shape: pairs [..., 2] float32 or float64, contiguous; index [...] int32 or int64; [bins, 2].
    """
    values = torch.view_as_complex(pairs).reshape(-1)
    sums = values.new_zeros(bins).index_add_(0, index.reshape(-1), values)
    return torch.view_as_real(sums)


@torch.library.register_fake("qexp::bin_sums")
def _(pairs: Tensor, index: Tensor, bins: int) -> Tensor:
    return pairs.new_empty(bins, 2)


@torch.library.custom_op("qexp::bin_members", mutates_args=())
def bin_members(values: Tensor, index: Tensor, bins: int) -> Tensor:
    """Number and sum, in float64, of the values in each bin; opaque to the compiler as `bin_sums`.

    Two scatters of numbers: one of complex float64 numbers takes six times as long on a CPU.
    Shape: values [...] float32; index [...] int32 or int64; result [bins, 2].
    """
    values, index = values.reshape(-1), index.reshape(-1)
    if values.device.type == "cpu":
        count = torch.bincount(index, minlength=bins).double()
    else:  # where bincount would wait for the device
        ones = torch.ones_like(values, dtype=torch.float64)
        count = ones.new_zeros(bins).index_add_(0, index, ones)
    total = count.new_zeros(bins).index_add_(0, index, values.double())
    return torch.stack((count, total), 1)


@torch.library.register_fake("qexp::bin_members")
def _(values: Tensor, index: Tensor, bins: int) -> Tensor:
    return values.new_empty(bins, 2, dtype=torch.float64)
