"""Rounding with a border, straight through floor: the numerics of aquant.py.

    clip(floor(u) + 1[u - floor(u) >= B], low, high) = clip(floor(u + 1 - B), low, high)

`polynomial_border` fuses the border v = a0 + a1 t + a2 t^2 with quantization, saves only x for
backward and recomputes the rest; with `dice` it drops as well (drop.py): columns are kh*kw times
the image, so that a pass over them is what costs. `border_round` takes any border and has no
gradient; borders of a window that see each other are in window_border.py. The equations are in
aquant.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qexp.quant.drop import mix_backward, mix_forward
from qexp.quant.functional import MIN_SCALE, kernel

# ---------------------------------------------------------------------------------------------
# What the kernels here and in window_border.py are made of


def polynomial(u: Tensor, a: Tensor, span: int) -> Tensor:
    """a0 + a1 t + a2 t^2, t = u / span. Shape: u [A, R, M], a [3, 1, R, 1]."""
    t = u * (1.0 / span)
    return a[0] + t * (a[1] + t * a[2])


def quantized(
    x: Tensor, u: Tensor, raw: Tensor, scale: Tensor, zero: Tensor, qmin: int, qmax: int
) -> Tensor:
    """x_hat as x, for u = x / scale and the border `raw` = 1/2 + v before it is clipped."""
    x_int = ((u + (1 - raw.clamp(0, 1))).floor() + zero).clamp(qmin, qmax)
    return ((x_int - zero) * scale).to(x.dtype)


def passed_on(
    e: Tensor, u: Tensor, raw: Tensor, scale: Tensor, zero: Tensor, qmin: int, qmax: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """e * inside; free; dL/dv = -e * scale * inside * free; e * (x_int - zero). All as u."""
    x_int = (u + (1 - raw.clamp(0, 1))).floor() + zero
    passed = torch.where((x_int >= qmin) & (x_int <= qmax), e, 0.0)
    free = (raw > 0) & (raw < 1)
    down = torch.where(free, -passed * scale, 0.0)
    return passed, free, down, e * (x_int.clamp(qmin, qmax) - zero)


def coefficient_sums(down: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dL/da_k = sum dL/dv * t^k, still by sample. Shape: [A, R, M] -> three of [A, R]."""
    return down.sum(2), (down * t).sum(2), (down * t * t).sum(2)


# ---------------------------------------------------------------------------------------------
# Polynomial borders, fused


@kernel
def _border_forward(
    x: Tensor, scale: Tensor, zero: Tensor, a: Tensor, qmin: int, qmax: int
) -> Tensor:
    # x [A, R, M]; scale, zero [1, 1, 1]; a [3, 1, R, 1]
    u = x.float() / scale
    return quantized(x, u, 0.5 + polynomial(u, a, qmax - qmin), scale, zero, qmin, qmax)


@kernel
def _border_backward(
    grad: Tensor, x: Tensor, scale: Tensor, zero: Tensor, a: Tensor, qmin: int, qmax: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    u = x.float() / scale
    t = u * (1.0 / (qmax - qmin))
    raw = 0.5 + polynomial(u, a, qmax - qmin)
    passed, free, down, of_codes = passed_on(grad.float(), u, raw, scale, zero, qmin, qmax)
    # dL/dx = e * inside * (1 - B'(u))                                    [A, R, M]
    slope = torch.where(free, (a[1] + 2 * t * a[2]) * (1.0 / (qmax - qmin)), 0.0)
    grad_u = passed * (1 - slope)
    # dL/dscale = sum e * (x_int - zero) - e * inside * (1 - B'(u)) * u   [A, R]
    grad_scale = of_codes - grad_u * u
    return grad_u.to(grad.dtype), grad_scale.sum(2), *coefficient_sums(down, t)


@kernel
def _dropped_forward(
    x: Tensor, dice: Tensor, scale: Tensor, zero: Tensor, a: Tensor, qmin: int, qmax: int, last: int
) -> Tensor:
    x_hat = _border_forward(x, scale, zero, a, qmin, qmax)
    return mix_forward(x, x_hat, dice, last)


@kernel
def _dropped_backward(
    grad: Tensor,
    x: Tensor,
    dice: Tensor,
    scale: Tensor,
    zero: Tensor,
    a: Tensor,
    qmin: int,
    qmax: int,
    last: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    to_x, to_x_hat = mix_backward(grad, dice, last)
    grad_x, *sums = _border_backward(to_x_hat, x, scale, zero, a, qmin, qmax)
    return grad_x + to_x, *sums


class _PolynomialBorder(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        a: Tensor,
        zero: Tensor,
        qmin: int,
        qmax: int,
        dice: Tensor | None,
        last: int,
    ) -> Tensor:
        ctx.save_for_backward(x, scale, a, zero, dice)
        ctx.bounds, ctx.last = (qmin, qmax), last
        constants = broadcast(scale, zero, a)
        if dice is None:
            return _border_forward(x, *constants, qmin, qmax)
        return _dropped_forward(x, dice, *constants, qmin, qmax, last)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, a, zero, dice = ctx.saved_tensors
        constants = broadcast(scale, zero, a)
        if dice is None:
            results = _border_backward(grads[0], x, *constants, *ctx.bounds)
        else:
            results = _dropped_backward(grads[0], x, dice, *constants, *ctx.bounds, ctx.last)
        grad_x, grad_scale, *sums = results
        grad_a = torch.stack([s.sum(0) for s in sums[: a.shape[0]]])  # [degree + 1, R]
        # zero, the bounds, the dice and their limit are constants
        return grad_x, grad_scale.sum(), grad_a, None, None, None, None, None


def polynomial_border(
    x: Tensor,
    scale: Tensor,
    a: Tensor,
    zero: Tensor,
    qmin: int,
    qmax: int,
    dice: Tensor | None = None,
    last: int = -1,
) -> Tensor:
    """Fake quantization with B = clip(1/2 + a0 + a1 t + a2 t^2, 0, 1), t = u / (qmax - qmin).

    Elements whose byte of `dice` is at most `last` stay as they are.
    Shape: x, dice [A, R, M]; scale, zero []; a [degree + 1, R]; result as x.
    """
    return _PolynomialBorder.apply(x, scale, a, zero, qmin, qmax, dice, last)  # type: ignore[return-value]


def broadcast(scale: Tensor, zero: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Broadcast to [A, R, M]; missing coefficients are 0, so that one kernel serves all degrees."""
    full = a if a.shape[0] == 3 else torch.cat([a, a.new_zeros(3 - a.shape[0], a.shape[1])])
    step = scale.reshape(1, 1, 1).clamp_min(MIN_SCALE)
    return step, zero.reshape(1, 1, 1), full[:, None, :, None]


# ---------------------------------------------------------------------------------------------
# Any border


def border_round(u: Tensor, border: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """clip(floor(u) + 1[frac(u) >= border], low, high), for borders in [0, 1]. Shape: all alike."""
    return torch.clamp((u + (1 - border)).floor(), low, high)
