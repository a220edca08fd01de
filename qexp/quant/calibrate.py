"""Ranges from data: the step of least error.

`mse_scale` and `mse_range` reduce a tensor to the step(s) of a uniform grid, per tensor ([]) or per
row ([N, 1, ...]); `sample` draws what they look at. `mse_scale` searches the clipping ratio on a
grid, as BRECQ (80 steps) and QDrop (100) do; |error|^p with p = 2.4 there, p = 2 here by default.
It needs no gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qexp.quant.functional import MIN_SCALE

SEARCH_STEPS = 80  # candidates between 1/80 of the range and all of it (BRECQ's count)
MAX_SAMPLES = 1 << 20  # elements of an activation that the search looks at: memory, not accuracy


def _rows(x: Tensor, per_row: bool) -> Tensor:
    x = x.detach().float()
    return x.reshape(x.shape[0], -1) if per_row else x.reshape(1, -1)


def _shape_of(x: Tensor, per_row: bool) -> tuple[int, ...]:
    return (x.shape[0], *[1] * (x.dim() - 1)) if per_row else ()


def sample(x: Tensor, most: int) -> Tensor:
    """At most `most` elements of x, float32 [M], whatever its order in memory.

    Drawn at random, the same places for the same number of elements: an even stride would meet
    the same columns or channels of every image, as sizes are powers of two.
    """
    flat = x.detach().reshape(-1)
    if flat.numel() > most:
        generator = torch.Generator().manual_seed(0)
        flat = flat[torch.randint(flat.numel(), (most,), generator=generator).to(x.device)]
    return flat.float()


def _subsample(rows: Tensor) -> Tensor:
    return sample(rows, MAX_SAMPLES)[None] if rows.shape[0] == 1 else rows


def covering_step(low: Tensor, high: Tensor, qmin: int, qmax: int) -> Tensor:
    """The step [R] of a grid without zero point that just reaches [low, high], each [R].

    No wider one is ever useful. A grid without negative levels reaches for no negative value: it
    would waste its levels.
    """
    return torch.maximum(high / max(qmax, 1), low / qmin if qmin < 0 else torch.zeros_like(low))


def mse_scale(x: Tensor, qmin: int, qmax: int, *, p: float = 2.0, per_row: bool = False) -> Tensor:
    """The step that minimises sum |x_hat - x|^p over a grid of clipping ratios.

    Shape: x [N, ...]; result [] or [N, 1, ...].
    """
    rows = _subsample(_rows(x, per_row))
    low, high = rows.amin(1).clamp_max(0), rows.amax(1).clamp_min(0)
    widest = covering_step(low, high, qmin, qmax).clamp_min(MIN_SCALE)
    best_error = torch.full_like(widest, torch.inf)
    best = widest.clone()
    for i in range(1, SEARCH_STEPS + 1):
        scale = (widest * (i / SEARCH_STEPS)).clamp_min(MIN_SCALE)
        x_hat = (rows / scale[:, None]).round_().clamp_(qmin, qmax).mul_(scale[:, None])
        error = x_hat.sub_(rows).abs_().pow_(p).sum(1)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best = torch.where(better, scale, best)
    return best.reshape(_shape_of(x, per_row))


def mse_range(
    x: Tensor, levels_minus_one: int, *, one_sided: bool = False, p: float = 2.0
) -> tuple[Tensor, Tensor]:
    """`(scale, low)` of the affine grid low + [0..levels-1] * scale of least error, per tensor.

    Both ends shrink independently on a coarse grid (the range of x times i/20, j/20).
    """
    rows = _subsample(_rows(x, False))[0]
    low, high = rows.min().clamp_max(0), rows.max().clamp_min(0)
    if one_sided:
        low = torch.zeros_like(low)
    best = (torch.tensor(torch.inf, device=x.device), high, low)
    for i in range(1, 21):
        for j in range(1, 2 if one_sided else 21):
            lo = low * (0.0 if one_sided else j / 20)
            hi = high * (i / 20)
            scale = ((hi - lo) / levels_minus_one).clamp_min(MIN_SCALE)
            x_hat = ((rows - lo) / scale).round_().clamp_(0, levels_minus_one).mul_(scale).add_(lo)
            error = x_hat.sub_(rows).abs_().pow_(p).sum()
            if error < best[0]:
                best = (error, scale, lo)
    return best[1], best[2]
