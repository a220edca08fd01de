"""The generalized straight-through estimator: codes by thresholds, gradients of borders.

Equations and names are those of `n2uq`. Two ways to compute them, chosen by `_one_pass`: torch's
operators, which the compiler fuses but for the sums by segment; and `gste_native`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qexp.quant import gste_native
from qexp.quant.cells import bin_sums, gather, search
from qexp.quant.functional import (
    SMALL,
    from_rows,
    in_order_of,
    kernel,
    kernels_compiled,
    midpoints,
    operands,
)


def gste(x: Tensor, borders: Tensor, step: Tensor, qmin: int) -> Tensor:
    """step * (qmin + #{i: x > midpoint i of borders}), with the gradients of G-STE.

    Shape: x [N, ...], result as x; borders [m + 1], ascending; step [].
    """
    return _GSTE.apply(x, borders, step, qmin)  # type: ignore[return-value]


@kernel
def _forward(x: Tensor, thresholds: Tensor, step: Tensor, qmin: Tensor) -> Tensor:
    # x [R, M] (see `operands`); thresholds [m], step [], qmin [] float32
    return ((search(x.float(), thresholds)[0] + qmin) * step).to(x.dtype)


@kernel
def _backward(
    grad: Tensor, x: Tensor, borders: Tensor, step: Tensor, qmin: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # grad, x [R, M]; borders [m + 1]; step, qmin []
    z, e = x.float(), grad.float()
    m = borders.shape[0] - 1
    # Segment 0..m-1: how many of the m - 1 inner borders lie below z; +inf fills up to 2^b - 1.
    inner = torch.cat([borders[1:-1], borders.new_full((1,), torch.inf)])
    segment, masks = search(z, inner)
    segment = segment.clamp_max(m - 1)  # a NaN sorts last
    left = gather(borders, segment, masks)
    right = gather(torch.cat([borders[1:], borders[-1:]]), segment, masks)
    inside = (z > borders[0]) & (z <= borders[-1])
    length = right - left
    # dL/dx = e * step / l_i                                                  [R, M]
    g = torch.where(inside, e * step / length, torch.zeros_like(z))
    f = torch.where(inside, (z - left) / length, torch.zeros_like(z))
    # dL/dstep = sum e * code, by the threshold of the forward                []
    grad_step = (e * (segment + (z > (right + left) / 2).to(torch.int32) + qmin)).sum()
    # One set of m bins a row: short sums keep float32 exact enough, and atomics apart on a GPU.
    row = torch.arange(z.shape[0], device=z.device, dtype=torch.int32)
    bins = segment + m * row.view(-1, *[1] * (z.dim() - 1))
    return g.to(x.dtype), torch.stack((g, g * f), -1), bins, grad_step


class _GSTE(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, borders: Tensor, step: Tensor, qmin: int) -> Tensor:
        ctx.save_for_backward(x, borders, step)
        ctx.qmin = qmin
        if _one_pass(x, borders):
            return gste_native.gste_forward(x, midpoints(borders), step, qmin)
        low = step.new_full((), qmin)  # a tensor: an integer would compile one kernel for 0
        rows, _ = operands(x, _samples(x))
        return from_rows(_forward(rows, midpoints(borders), step, low), x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, borders, step = ctx.saved_tensors
        m = borders.shape[0] - 1
        if _one_pass(x, borders):
            grad_x, sums = gste_native.gste_backward(grads[0], x, borders, step, ctx.qmin)
            total, weighted, grad_step = sums.to(borders.dtype).split([m, m, 1])
            return grad_x, _grad_borders(total, weighted), grad_step.reshape(()), None
        rows = x.shape[0]
        z, _ = operands(x, _samples(x))
        grad, _ = operands(in_order_of(grads[0], x), _samples(x))
        low = step.new_full((), ctx.qmin)
        grad_x, pairs, bins, grad_step = _backward(grad, z, borders, step, low)
        sums = bin_sums(pairs, bins, rows * m).view(rows, m, 2).sum(0)  # [m, 2]
        return from_rows(grad_x, x), _grad_borders(*sums.unbind(1)), grad_step, None


def _grad_borders(total: Tensor, weighted: Tensor) -> Tensor:
    """dL/db_(i-1) = -sum g (1 - f), dL/db_i = -sum g f.

    Args:
        total: sum g by segment, [m]; weighted: sum g * f, [m].

    Returns:
        [m + 1]
    """
    zero = total.new_zeros(1)
    return torch.cat([weighted - total, zero]) - torch.cat([zero, weighted])


def _one_pass(x: Tensor, borders: Tensor) -> bool:
    """Whether `gste_native` computes: where kernels are compiled, on what it takes."""
    compiled = torch.compiler.is_compiling() or (kernels_compiled() and x.numel() >= SMALL)
    return (
        compiled and borders.dtype == torch.float32 and gste_native.takes(x, borders.shape[0] - 1)
    )


def _samples(x: Tensor) -> Tensor:
    """Stands for a scale a sample, so that `operands` gives a row to each. Shape: [N]."""
    return x.new_empty(()).expand(x.shape[0])
