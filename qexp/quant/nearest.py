"""Calibrated round-to-nearest, the lowest rung of post-training quantization.

No single paper: the form is that of the baselines in AdaRound (Nagel et al., ICML 2020, arXiv
2004.10568), BRECQ (Li et al., ICLR 2021, arXiv 2102.05426) and QDrop (Wei et al., ICLR 2022, arXiv
2203.05740), whose rungs above it (adaround.py, aquant.py) start from exactly this grid.

Forward.  u = x / scale,  x_int = clip(floor(u + 1/2) + zero, qmin, qmax),
          x_hat = (x_int - zero) * scale,     zero an integer in [qmin, qmax].

    floor(u + 1/2), not round half to even: the family's rounding is floor(u + 1 - border), see
    aquant.py, and nearest is its border 1/2, bit for bit, ties included.

Grid.  Weights: one (scale, zero) per output channel. Inputs: one pair per layer; zero = 0 for
    inputs without negative values, and for `symmetric: true`. Affine grids contain 0 exactly.

Calibration (`estimator`).
    mse         scale and zero of least sum |x_hat - x|^p over a grid: 80 widths of the range
                (BRECQ's count) times 5 zero points around the one that the range suggests; p = 2.4
    percentile  `percent` of the elements are representable (both tails alike)
    absmax      all of them are

Gradients, e = dL/dx_hat, inside = [x_int was not clipped].  Only used when the step is learned
    (BRECQ's and QDrop's activations; training on after PTQ), or to pass e to the layers before.
    dL/dx     = e * inside
    dL/dscale = g * sum e * ((x_int - zero) - inside * u),   g = 1 / sqrt(N * (qmax - qmin))
    N: elements that share the step, of the whole micro-batch for inputs (LSQ's default: one
    sample). Adam, which PTQ uses, does not see g; SGD does (LSQ section 2.2). zero is not learned.

Departs from the papers:
 1. The zero-point search looks at 5 zero points for each width. QDrop's looks at all of them
    (16 at 4 bits, for 100 widths: 4 times the time), BRECQ's at the one that the clipped range
    suggests. On three layers of ResNet-20 at 2, 3 and 4 bits the error that is minimised is at
    most 0.04 % above QDrop's and 0.2 to 1.8 % below BRECQ's (by hand, not kept).
 2. An activation's `mse` and `percentile` see at most 2^18 of its elements, drawn at random.
 3. Inputs are quantized where a layer reads them, so a residual sum stays in float; in the
    released BRECQ and QDrop the sum itself is quantized.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from qexp.quant.calibrate import covering_step, sample
from qexp.quant.functional import (
    MIN_SCALE,
    from_rows,
    in_order_of,
    kernel,
    operands,
    sum_to,
)
from qexp.quant.quantizer import Quantizer, refuse_one_signed_bit

WIDTHS = 80  # candidate ranges, from 1/80 of the data's to all of it
ZEROS = 2  # zero points tried on either side of the natural one
ACT_SAMPLES = 1 << 18  # elements of an activation that the search looks at

Estimator = Literal["mse", "percentile", "absmax"]

# ---------------------------------------------------------------------------------------------
# The grid from data


def affine_grid(low: Tensor, high: Tensor, qmin: int, qmax: int) -> tuple[Tensor, Tensor]:
    """`(scale, zero)` of the grid over [low, high], each [R]; low <= 0 <= high."""
    scale = ((high - low) / (qmax - qmin)).clamp_min(MIN_SCALE)
    return scale, (qmin - (low / scale)).round().clamp(qmin, qmax)


def search_grid(
    rows: Tensor, qmin: int, qmax: int, *, fixed_zero: bool, p: float
) -> tuple[Tensor, Tensor]:
    """`(scale, zero)` [R] of least sum |x_hat - x|^p for each row. Shape: rows [R, M]."""
    low, high = rows.amin(1).clamp_max(0), rows.amax(1).clamp_min(0)
    if fixed_zero:
        widest = covering_step(low, high, qmin, qmax)
        shifts: Sequence[int] = (0,)
        natural = torch.zeros_like(low)
    else:
        widest = (high - low) / (qmax - qmin)
        shifts = range(-ZEROS, ZEROS + 1)
        natural = (qmin - low / widest.clamp_min(MIN_SCALE)).round()
    widest = widest.clamp_min(MIN_SCALE)
    best_error = torch.full_like(widest, torch.inf)
    best, best_zero = widest.clone(), natural.clamp(qmin, qmax) if not fixed_zero else natural
    for i in range(1, WIDTHS + 1):
        scale = (widest * (i / WIDTHS)).clamp_min(MIN_SCALE)
        u = (rows / scale[:, None]).add_(0.5).floor_()
        for shift in shifts:
            zero = natural if fixed_zero else (natural + shift).clamp(qmin, qmax)
            x_int = torch.clamp(u, (qmin - zero)[:, None], (qmax - zero)[:, None])
            error = x_int.mul_(scale[:, None]).sub_(rows).abs_().pow_(p).sum(1)
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best = torch.where(better, scale, best)
            best_zero = torch.where(better, zero, best_zero)
    return best, best_zero


def check_estimator(p: float, percent: float) -> None:
    """Raise a ValueError for an exponent or a share that no grid can be estimated with."""
    if not 0 < p < math.inf:
        raise ValueError(f"p must be positive and finite, got {p}")
    if not 0 < percent <= 100:
        raise ValueError(f"percent must be above 0 and at most 100, got {percent}")


def percentile_range(rows: Tensor, percent: float) -> tuple[Tensor, Tensor]:
    """`(low, high)` [R] that leave (100 - percent) / 2 of the elements out at either end."""
    m = rows.shape[1]
    k = max(1, min(m, round(m * (50 + percent / 2) / 100)))
    high = rows.kthvalue(k, dim=1).values.clamp_min(0)
    low = rows.kthvalue(m + 1 - k, dim=1).values.clamp_max(0)
    return low, high


def estimate_grid(
    rows: Tensor,
    qmin: int,
    qmax: int,
    *,
    fixed_zero: bool,
    estimator: Estimator,
    p: float,
    percent: float,
) -> tuple[Tensor, Tensor]:
    """`(scale, zero)` [R] of the rows' grid. Shape: rows [R, M]."""
    if estimator == "mse":
        return search_grid(rows, qmin, qmax, fixed_zero=fixed_zero, p=p)
    if estimator == "percentile":
        low, high = percentile_range(rows, percent)
    elif estimator == "absmax":
        low, high = rows.amin(1).clamp_max(0), rows.amax(1).clamp_min(0)
    else:
        raise ValueError(f"estimator must be mse, percentile or absmax, got {estimator!r}")
    if fixed_zero:
        scale = covering_step(low, high, qmin, qmax).clamp_min(MIN_SCALE)
        return scale, torch.zeros_like(scale)
    return affine_grid(low, high, qmin, qmax)


def activation_sample(x: Tensor, estimator: Estimator) -> Tensor:
    """What an estimate looks at of an activation, float32 [1, M]: for `absmax` its two ends, else
    at most ACT_SAMPLES elements, drawn at random."""
    if estimator == "absmax":
        return torch.stack(x.detach().aminmax()).float()[None]
    return sample(x, ACT_SAMPLES)[None]


# ---------------------------------------------------------------------------------------------
# Fake quantization


@kernel
def _nearest_forward(x: Tensor, scale: Tensor, zero: Tensor, qmin: int, qmax: int) -> Tensor:
    # x [R, M]; scale, zero [R, 1]
    x_int = ((x.float() / scale + 0.5).floor() + zero).clamp(qmin, qmax)
    return ((x_int - zero) * scale).to(x.dtype)


@kernel
def _nearest_backward(
    grad: Tensor, x: Tensor, scale: Tensor, zero: Tensor, qmin: int, qmax: int
) -> tuple[Tensor, Tensor]:
    u = x.float() / scale
    x_int = (u + 0.5).floor() + zero
    inside = (x_int >= qmin) & (x_int <= qmax)
    # dL/dx = e * inside                                                      [R, M]
    grad_x = torch.where(inside, grad, torch.zeros_like(grad))
    # dL/dscale = sum e * ((x_int - zero) - inside * u)                       [R, 1]
    t = x_int.clamp(qmin, qmax) - zero - torch.where(inside, u, torch.zeros_like(u))
    return grad_x, sum_to(grad.float() * t, scale)


class _Nearest(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, zero: Tensor, qmin: int, qmax: int, g: float
    ) -> Tensor:
        ctx.save_for_backward(x, scale, zero)
        ctx.qmin, ctx.qmax, ctx.g = qmin, qmax, g
        rows, step = operands(x, scale.clamp_min(MIN_SCALE))
        y = _nearest_forward(rows, step, operands(x, zero)[1], qmin, qmax)
        return from_rows(y, x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, zero = ctx.saved_tensors
        rows, step = operands(x, scale.clamp_min(MIN_SCALE))
        grad, _ = operands(in_order_of(grads[0], x), scale)
        grad_x, grad_scale = _nearest_backward(
            grad, rows, step, operands(x, zero)[1], ctx.qmin, ctx.qmax
        )
        # zero, the bounds and g are constants
        return (
            from_rows(grad_x, x),
            (grad_scale * ctx.g).reshape(scale.shape),
            None,
            None,
            None,
            None,
        )


def nearest(x: Tensor, scale: Tensor, zero: Tensor, qmin: int, qmax: int, g: float = 1.0) -> Tensor:
    """Quantize and dequantize on an affine grid, differentiable in x and scale.

    Shape: x [N, ...]; scale, zero [] or [N, 1, ...]; result as x. `g` multiplies dL/dscale.
    """
    return _Nearest.apply(x, scale, zero, qmin, qmax, g)  # type: ignore[return-value]


class Nearest(Quantizer):
    """Uniform affine quantizer with a calibrated step, for weights or activations.

    Args:
        per_channel: one grid per output channel (weights only).
        symmetric: no zero point. Unsigned inputs never have one.
        estimator: `mse`, `percentile` or `absmax`.
        p: exponent of the error that `mse` minimises.
        percent: share of the elements that `percentile` keeps representable.
    """

    zero: Tensor

    def __init__(
        self,
        bits: int,
        *,
        signed: bool = True,
        shape: Sequence[int] = (),
        per_channel: bool = False,
        symmetric: bool = False,
        estimator: Estimator = "mse",
        p: float = 2.4,
        percent: float = 99.9,
    ) -> None:
        super().__init__(bits, signed=signed, shape=shape)
        refuse_one_signed_bit(f"symmetric {type(self).__name__}", bits, signed and symmetric)
        check_estimator(p, percent)
        self.per_channel = per_channel
        self.symmetric = symmetric
        self.estimator: Estimator = estimator
        self.p = p
        self.percent = percent
        size = (shape[0], *[1] * (len(shape) - 1)) if per_channel else ()
        self.scale = nn.Parameter(torch.ones(size))
        self.register_buffer("zero", torch.zeros(size))

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        """Set the grid from the weights [C_out, ...] or a batch of inputs [N, ...]."""
        if self.per_channel:
            rows = x.detach().float().reshape(x.shape[0], -1)
        elif tuple(x.shape) == self.shape:  # weights, all of them
            rows = x.detach().float().reshape(1, -1)
        else:
            rows = activation_sample(x, self.estimator)
        scale, zero = estimate_grid(
            rows,
            self.qmin,
            self.qmax,
            fixed_zero=self.symmetric or not self.signed,
            estimator=self.estimator,
            p=self.p,
            percent=self.percent,
        )
        self.scale.copy_(scale.reshape(self.scale.shape))
        self.zero.copy_(zero.reshape(self.zero.shape))
        self.calibrated.fill_(True)

    def forward(self, x: Tensor) -> Tensor:
        elements = max(x.numel() // self.scale.numel(), 1)
        g = 1.0 / math.sqrt(elements * (self.qmax - self.qmin))
        return nearest(x, self.scale, self.zero, self.qmin, self.qmax, g)

    def codes(self, x: Tensor) -> Tensor:
        u = x.float() / self.scale.clamp_min(MIN_SCALE)
        x_int = ((u + 0.5).floor() + self.zero).clamp(self.qmin, self.qmax)
        return x_int.to(torch.int32)

    def decode(self, codes: Tensor, context: Tensor | None = None) -> Tensor:
        return (codes.to(self.scale.dtype) - self.zero) * self.scale.clamp_min(MIN_SCALE)

    def levels(self) -> Tensor:
        grid = torch.arange(self.qmin, self.qmax + 1, device=self.scale.device)
        scale = self.scale.detach().reshape(-1, 1).clamp_min(MIN_SCALE)
        return (grid - self.zero.reshape(-1, 1)) * scale  # [C_out or 1, L]

    def thresholds(self) -> Tensor:
        levels = self.levels()[0]
        return (levels[1:] + levels[:-1]) / 2

    def extra_bytes(self) -> int:
        """A float32 step and, where there is one, a zero point of a byte (two above 8 bits)."""
        has_zero = self.signed and not self.symmetric
        return self.scale.numel() * (4 + has_zero * (1 if self.bits <= 8 else 2))

    def health(self) -> dict[str, Tensor]:
        return {"clamped_steps": (self.scale.detach() <= MIN_SCALE).sum()}
