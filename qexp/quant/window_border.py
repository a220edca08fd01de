"""Borders of a window's rows that see each other: `fusion: window` and `residual` of aquant.py.

    v' = M p,   p = a0 + a1 t + a2 t^2                       (window)
    v' = a0 + a1 t + a2 t^2 + M p,   p = u - floor(u + 1/2)  (residual; p is a constant)

Three passes forward, around the small products with M [C, window, window]: features p, the product,
rounding; backward one more and the two products of M's own. Drops as border.py does. The features
are computed again in backward; kept are x, M p and the dice. The equations are in aquant.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qexp.quant.border import (
    Rule,
    border_of,
    broadcast,
    coefficient_sums,
    passed_on,
    polynomial,
    quantized,
)
from qexp.quant.drop import mix_backward, mix_forward
from qexp.quant.functional import kernel


@kernel
def _features(x: Tensor, scale: Tensor, a: Tensor, span: int, window: bool) -> Tensor:
    # x [A, R, M]; scale [1, 1, 1]; a [3, 1, R, 1]
    u = x.float() / scale
    return polynomial(u, a, span) if window else u - (u + 0.5).floor()


def _border(u: Tensor, product: Tensor, a: Tensor, rule: Rule, window: bool) -> Tensor:
    """B of v'."""
    v = product if window else polynomial(u, a, rule.qmax - rule.qmin) + product
    return border_of(v, rule.sigmoid)


@kernel
def _forward(
    x: Tensor,
    product: Tensor,
    dice: Tensor | None,
    scale: Tensor,
    zero: Tensor,
    a: Tensor,
    rule: Rule,
    last: int,
    window: bool,
) -> Tensor:
    u = x.float() / scale
    border = _border(u, product, a, rule, window)
    x_hat = quantized(x, u, border, scale, zero, rule)
    return x_hat if dice is None else mix_forward(x, x_hat, dice, last)


@kernel
def _backward(
    grad: Tensor,
    x: Tensor,
    product: Tensor,
    dice: Tensor | None,
    scale: Tensor,
    zero: Tensor,
    a: Tensor,
    rule: Rule,
    last: int,
    window: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    to_x, e = None, grad.float()
    if dice is not None:
        to_x, e = mix_backward(e, dice, last)
    u = x.float() / scale
    border = _border(u, product, a, rule, window)
    passed, down, of_codes = passed_on(e, u, border, scale, zero, rule)
    # What reaches x past the border, dropped elements included           [A, R, M]
    straight = passed if to_x is None else passed + to_x
    return down, straight, (of_codes - passed * u).sum(2)


@kernel
def _polynomial_backward(
    down: Tensor, x: Tensor, straight: Tensor, scale: Tensor, a: Tensor, span: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    # down: dL/dv of v = a0 + a1 t + a2 t^2                               [A, R, M]
    u = x.float() / scale
    t = u * (1.0 / span)
    through = down * ((a[1] + 2 * t * a[2]) * (1.0 / span)) / scale  # dL/dx by the border
    grad_x = (straight + through).to(x.dtype)
    return grad_x, -(through * u).sum(2), *coefficient_sums(down, t)


def mixed(mixing: Tensor, rows: Tensor) -> Tensor:
    """M p. Shape: mixing [C, window, window], rows [A, C * window, M]; result as rows."""
    windows = rows.reshape(rows.shape[0], *mixing.shape[:2], rows.shape[2])
    with torch.autocast(rows.device.type, enabled=False):  # borders are float32, as u is
        return torch.matmul(mixing, windows).reshape(rows.shape)


class _WindowBorder(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        a: Tensor,
        mixing: Tensor,
        zero: Tensor,
        rule: Rule,
        window: bool,
        dice: Tensor | None,
        last: int,
    ) -> Tensor:
        step, offset, full = broadcast(scale, zero, a)
        product = mixed(mixing, _features(x, step, full, rule.qmax - rule.qmin, window))
        ctx.save_for_backward(x, scale, a, mixing, zero, product, dice)
        ctx.numbers = (rule, last, window)
        return _forward(x, product, dice, step, offset, full, *ctx.numbers)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, a, mixing, zero, product, dice = ctx.saved_tensors
        rule, _, window = ctx.numbers
        step, offset, full = broadcast(scale, zero, a)
        down, straight, of_codes = _backward(
            grads[0], x, product, dice, step, offset, full, *ctx.numbers
        )
        features = _features(x, step, full, rule.qmax - rule.qmin, window)
        by_window = (x.shape[0], *mixing.shape[:2], x.shape[2])  # [A, C, window, M]
        grad_mixing = torch.matmul(
            down.reshape(by_window), features.reshape(by_window).transpose(2, 3)
        ).sum(0)
        of_v = mixed(mixing.transpose(1, 2), down) if window else down
        grad_x, of_borders, *sums = _polynomial_backward(
            of_v, x, straight, step, full, rule.qmax - rule.qmin
        )
        grad_a = torch.stack([s.sum(0) for s in sums[: a.shape[0]]])  # [degree + 1, R]
        grad_scale = of_codes.sum() + of_borders.sum()
        # zero, rule, fusion, dice and their limit are constants
        return grad_x, grad_scale, grad_a, grad_mixing, None, None, None, None, None


def window_border(
    x: Tensor,
    scale: Tensor,
    a: Tensor,
    mixing: Tensor,
    zero: Tensor,
    rule: Rule,
    window: bool,
    dice: Tensor | None = None,
    last: int = -1,
) -> Tensor:
    """Fake quantization with the border that `rule` makes of v' (module docstring).

    Elements whose byte of `dice` is at most `last` stay as they are.
    Shape: x, dice [A, R, M]; scale, zero []; a [degree + 1, R]; mixing [C, R / C, R / C]; as x.
    """
    return _WindowBorder.apply(x, scale, a, mixing, zero, rule, window, dice, last)  # type: ignore[return-value]
