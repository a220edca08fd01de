"""Rounding with a border, straight through floor: the numerics of aquant.py.

    clip(floor(u) + 1[u - floor(u) >= B], low, high) = clip(floor(u + 1 - B), low, high)

`polynomial_border` fuses the border v = a0 + a1 t + a2 t^2 with quantization, saves only x for
backward and recomputes the rest; with `dice` it drops as well (drop.py): columns are kh*kw times
the image, so that a pass over them is what costs. `border_round` takes any border and has no
gradient; borders of a window that see each other are in window_border.py. The equations are in
aquant.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from qexp.quant.drop import mix_backward, mix_forward
from qexp.quant.functional import MIN_SCALE, kernel


class Rule(NamedTuple):
    """What a border has besides its coefficients.

    Attributes:
        qmin, qmax: the least and the largest code.
        sigmoid: B = sigmoid(4 v) in place of clip(1/2 + v, 0, 1).
        tau: share of a code's width in which elements move a border; 1: all, straight through.
    """

    qmin: int
    qmax: int
    sigmoid: bool = False
    tau: float = 1.0


# ---------------------------------------------------------------------------------------------
# What the kernels here and in window_border.py are made of


def polynomial(u: Tensor, a: Tensor, span: int) -> Tensor:
    """a0 + a1 t + a2 t^2, t = u / span. Shape: u [A, R, M], a [3, 1, R, 1]."""
    t = u * (1.0 / span)
    return a[0] + t * (a[1] + t * a[2])


def border_of(v: Tensor, sigmoid: bool) -> Tensor:
    """clip(1/2 + v, 0, 1) or sigmoid(4 v): both 1/2 and of slope 1 at v = 0. Shape: as v."""
    return torch.sigmoid(4 * v) if sigmoid else (0.5 + v).clamp(0, 1)


def times_slope(value: Tensor, border: Tensor, sigmoid: bool) -> Tensor:
    """value * dB/dv at B = `border`. Shape: all alike."""
    if sigmoid:
        return value * (4 * border * (1 - border))
    return torch.where((border > 0) & (border < 1), value, 0.0)


def quantized(
    x: Tensor, u: Tensor, border: Tensor, scale: Tensor, zero: Tensor, rule: Rule
) -> Tensor:
    """x_hat as x, for u = x / scale."""
    x_int = ((u + (1 - border)).floor() + zero).clamp(rule.qmin, rule.qmax)
    return ((x_int - zero) * scale).to(x.dtype)


def passed_on(
    e: Tensor, u: Tensor, border: Tensor, scale: Tensor, zero: Tensor, rule: Rule
) -> tuple[Tensor, Tensor, Tensor]:
    """e * inside; dL/dv = dL/dB * dB/dv; e * (x_int - zero). Shape: all as u."""
    qmin, qmax, sigmoid, tau = rule
    shifted = u + (1 - border)
    x_int = shifted.floor() + zero
    passed = torch.where((x_int >= qmin) & (x_int <= qmax), e, 0.0)
    down = -passed * scale
    if tau < 1:
        step = shifted.round()  # between codes step - 1 and step, if both exist
        exists = (step + zero > qmin) & (step + zero <= qmax)
        near = (shifted - step).abs() <= 0.5 * tau
        down = torch.where(exists & near, e * scale * (-1.0 / tau), 0.0)
    return passed, times_slope(down, border, sigmoid), e * (x_int.clamp(qmin, qmax) - zero)


def coefficient_sums(down: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dL/da_k = sum dL/dv * t^k, still by sample. Shape: [A, R, M] -> three of [A, R]."""
    return down.sum(2), (down * t).sum(2), (down * t * t).sum(2)


# ---------------------------------------------------------------------------------------------
# Polynomial borders, fused


@kernel
def _border_forward(x: Tensor, scale: Tensor, zero: Tensor, a: Tensor, rule: Rule) -> Tensor:
    # x [A, R, M]; scale, zero [1, 1, 1]; a [3, 1, R, 1]
    u = x.float() / scale
    border = border_of(polynomial(u, a, rule.qmax - rule.qmin), rule.sigmoid)
    return quantized(x, u, border, scale, zero, rule)


@kernel
def _border_backward(
    grad: Tensor, x: Tensor, scale: Tensor, zero: Tensor, a: Tensor, rule: Rule
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    span = rule.qmax - rule.qmin
    u = x.float() / scale
    t = u * (1.0 / span)
    border = border_of(polynomial(u, a, span), rule.sigmoid)
    passed, down, of_codes = passed_on(grad.float(), u, border, scale, zero, rule)
    # dL/dx = e * inside * (1 - B'(u))                                    [A, R, M]
    slope = times_slope((a[1] + 2 * t * a[2]) * (1.0 / span), border, rule.sigmoid)
    grad_u = passed * (1 - slope)
    # dL/dscale = sum e * (x_int - zero) - e * inside * (1 - B'(u)) * u   [A, R]
    grad_scale = of_codes - grad_u * u
    return grad_u.to(grad.dtype), grad_scale.sum(2), *coefficient_sums(down, t)


@kernel
def _dropped_forward(
    x: Tensor, dice: Tensor, scale: Tensor, zero: Tensor, a: Tensor, rule: Rule, last: int
) -> Tensor:
    x_hat = _border_forward(x, scale, zero, a, rule)
    return mix_forward(x, x_hat, dice, last)


@kernel
def _dropped_backward(
    grad: Tensor,
    x: Tensor,
    dice: Tensor,
    scale: Tensor,
    zero: Tensor,
    a: Tensor,
    rule: Rule,
    last: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    to_x, to_x_hat = mix_backward(grad, dice, last)
    grad_x, *sums = _border_backward(to_x_hat, x, scale, zero, a, rule)
    return grad_x + to_x, *sums


class _PolynomialBorder(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        a: Tensor,
        zero: Tensor,
        rule: Rule,
        dice: Tensor | None,
        last: int,
    ) -> Tensor:
        ctx.save_for_backward(x, scale, a, zero, dice)
        ctx.rule, ctx.last = rule, last
        constants = broadcast(scale, zero, a)
        if dice is None:
            return _border_forward(x, *constants, rule)
        return _dropped_forward(x, dice, *constants, rule, last)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, a, zero, dice = ctx.saved_tensors
        constants = broadcast(scale, zero, a)
        if dice is None:
            results = _border_backward(grads[0], x, *constants, ctx.rule)
        else:
            results = _dropped_backward(grads[0], x, dice, *constants, ctx.rule, ctx.last)
        grad_x, grad_scale, *sums = results
        grad_a = torch.stack([s.sum(0) for s in sums[: a.shape[0]]])  # [degree + 1, R]
        # zero, the rule, the dice and their limit are constants
        return grad_x, grad_scale.sum(), grad_a, None, None, None, None


def polynomial_border(
    x: Tensor,
    scale: Tensor,
    a: Tensor,
    zero: Tensor,
    rule: Rule,
    dice: Tensor | None = None,
    last: int = -1,
) -> Tensor:
    """Fake quantization with the border `rule` makes of a0 + a1 t + a2 t^2, t = u / (qmax - qmin).

    Elements whose byte of `dice` is at most `last` stay as they are.
    Shape: x, dice [A, R, M]; scale, zero []; a [degree + 1, R]; result as x.
    """
    return _PolynomialBorder.apply(x, scale, a, zero, rule, dice, last)  # type: ignore[return-value]


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
