"""Projection onto a fixed grid under a learned clip, and the clips to start from.

    v = clip(w / scale, -1, 1),   q = the level of `grid` nearest to v,   w_hat = scale * q

`grid` is sorted and runs from -1 (from 0 for unsigned inputs) to 1, so the nearest level clips by
itself. The fused function saves w and the clip and looks the levels up again in backward;
gradients: see `power.py`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from qexp.quant.calibrate import SEARCH_STEPS
from qexp.quant.cells import gather, level_tables, search
from qexp.quant.functional import (
    MIN_SCALE,
    from_rows,
    in_order_of,
    kernel,
    operands,
    sum_to,
)


@kernel
def _project_forward(w: Tensor, scale: Tensor, levels: Tensor, borders: Tensor) -> Tensor:
    # w [R, M], scale [R, 1] (see `operands`), tables as `level_tables`
    # values outside fall on the end levels
    q = gather(levels, *search(w.float() / scale, borders))
    return (scale * q).to(w.dtype)


@kernel
def _project_backward(
    grad: Tensor, w: Tensor, scale: Tensor, levels: Tensor, borders: Tensor, clip_gradient: bool
) -> tuple[Tensor, Tensor]:
    v = w.float() / scale
    inside = (v >= levels[0]) & (v <= 1)  # levels[0]: -1, or 0
    # dL/dw = e * [inside]                                                    [R, M]
    grad_w = torch.where(inside, grad, torch.zeros_like(grad)) if clip_gradient else grad.clone()
    # dL/dscale = sum e * (q - [inside] * v); q is the end level outside       [R, 1]
    t = gather(levels, *search(v, borders)) - torch.where(inside, v, torch.zeros_like(v))
    return grad_w, sum_to(grad.float() * t, scale)


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, w: Tensor, scale: Tensor, grid: Tensor, g: float, clip_gradient: bool
    ) -> Tensor:
        ctx.save_for_backward(w, scale, grid)
        ctx.g, ctx.clip_gradient = g, clip_gradient
        rows, step = operands(w, scale.clamp_min(MIN_SCALE))
        return from_rows(_project_forward(rows, step, *level_tables(grid)), w)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        w, scale, grid = ctx.saved_tensors
        rows, step = operands(w, scale.clamp_min(MIN_SCALE))
        grad, _ = operands(in_order_of(grads[0], w), scale)
        grad_w, grad_scale = _project_backward(
            grad, rows, step, *level_tables(grid), ctx.clip_gradient
        )
        grad_scale = (grad_scale * ctx.g).reshape(scale.shape).to(scale.dtype)
        return from_rows(grad_w, w), grad_scale, None, None, None  # grid, g, flag are constants


def project(
    w: Tensor, scale: Tensor, grid: Tensor, grad_scale: float = 1.0, clip_gradient: bool = True
) -> Tensor:
    """`scale` times the level of `grid` nearest to w / scale, differentiable in w and scale.

    Shape: w [C_out, ...]; scale [] or [C_out, 1, ...]; grid [L] sorted, from -1 or 0 to 1; result
    as w.
    """
    return _Project.apply(w, scale, grid, grad_scale, clip_gradient)  # type: ignore[return-value]


# ---------------------------------------------------------------------------------------------
# Initial clips


def quantile_clip(w: Tensor, per_row: bool, q: float = 0.99) -> Tensor:
    """The q-quantile of |w|, interpolated, for rows of any length. Result [C_out] or [1]."""
    rows = w.detach().float().abs()
    rows = rows.reshape(w.shape[0], -1) if per_row else rows.reshape(1, -1)
    # torch.quantile refuses more than 2^24 elements: sort instead
    return quantile_of_sorted(rows.sort(dim=1).values, q)


def quantile_of_sorted(ordered: Tensor, q: float) -> Tensor:
    """The q-quantile, interpolated, of rows in ascending order. Shape: [..., M]; result [...]."""
    position = q * (ordered.shape[-1] - 1)
    low = math.floor(position)
    high = min(low + 1, ordered.shape[-1] - 1)
    return torch.lerp(ordered[..., low], ordered[..., high], position - low)


def mse_clip(w: Tensor, grid: Tensor, per_row: bool) -> Tensor:
    """The clip of least sum (w_hat - w)^2 among i/80 of the range. Result [C_out] or [1]."""
    rows = w.detach().float()
    rows = rows.reshape(w.shape[0], -1) if per_row else rows.reshape(1, -1)
    widest = rows.abs().amax(1).clamp_min(MIN_SCALE)
    best, best_error = widest.clone(), torch.full_like(widest, torch.inf)
    tables = level_tables(grid)
    for i in range(1, SEARCH_STEPS + 1):
        clip = (widest * (i / SEARCH_STEPS)).clamp_min(MIN_SCALE)
        w_hat = _project_forward(rows, clip[:, None], *tables)
        error = (w_hat - rows).pow_(2).sum(1)
        best = torch.where(error < best_error, clip, best)
        best_error = torch.minimum(error, best_error)
    return best
