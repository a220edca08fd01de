"""Learned weight rounding.

M. Nagel, R. A. Amjad, M. van Baalen, C. Louizos, T. Blankevoort. "Up or Down? Adaptive Rounding
for Post-Training Quantization." ICML 2020, arXiv 2004.10568. BRECQ (arXiv 2102.05426) and QDrop
(arXiv 2203.05740) use the same variable; what they change is the loss around it (reconstruct.py).

The idea: nearest is not the best rounding of a weight, because the errors of a layer's weights add
up in its output. Every weight gets a variable V that says whether to round it down or up; V is
learned from the output's error on a few images and driven to a decision by a regulariser.

Forward.  u = w / scale,  h(V) = clip(sigmoid(V) * (ZETA - GAMMA) + GAMMA, 0, 1)       (eq. 23)
    soft (while it is learned):  x_int = clip(floor(u) + h(V)      + zero, qmin, qmax)  (eq. 22)
    hard (always else):          x_int = clip(floor(u) + 1[V >= 0] + zero, qmin, qmax)
    w_hat = (x_int - zero) * scale.  The stretch ZETA = 1.1, GAMMA = -0.1 lets h reach 0 and 1.

Gradients, e = dL/dw_hat, inside = [x_int not clipped].
    dL/dV = e * scale * inside * (ZETA - GAMMA) * sigmoid'(V) where 0 < h < 1, else 0
    dL/dw = e * inside (straight-through; reconstruction does not use it). scale, zero: constant.
    Hard has the gradient of soft.

Regulariser (eq. 24).  f(V) = sum 1 - |2 h(V) - 1|^beta, beta annealed from high (only weights near
    a decision are pushed) to low (all are).

Initialisation.  scale and zero by nearest.py's search; V such that h(V) is the fractional part of
    u. So soft starts as the float weight (clipped) and hard as round-to-nearest, bit for bit.

State: V has the weight's shape and lives in the state_dict, so that a run can stop between blocks.
It is not stored with a finished network: V and w only decide the codes (`extra_bytes`).
`latent` returns the weight nearest to w that rounds to the learned codes: the start of QAT.

Departs from the paper:
 1. Grids are affine per output channel by default, as in BRECQ and QDrop; `symmetric` for AdaRound.
 2. The grid minimises |error|^2.4, as in BRECQ's and QDrop's code; the paper's the squared error
    (`p: 2`).
 3. beta falls linearly, as in those codes. AIMET, the library of the authors' company, lets it fall
    as a cosine, in 15,000 iterations a layer (10,000 from 8 bits on); recipe=ptq has 20,000.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qexp.quant.functional import MIN_SCALE
from qexp.quant.nearest import Estimator, check_estimator, estimate_grid
from qexp.quant.quantizer import Quantizer, refuse_one_signed_bit

ZETA, GAMMA = 1.1, -0.1  # the stretch of the sigmoid (section 4)
DECIDED = 0.01  # a weight counts as decided when h is this close to 0 or 1
# Steps between a latent weight and the border of its code: float32 safety, and for codes far from
# zero, as of 12 bits and more, a share of their number.
MARGIN, FAR = 1e-3, 2.0**-21


class _Floor(torch.autograd.Function):
    """floor with the identity as gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.floor()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


class _Decide(torch.autograd.Function):
    """1[V >= 0] with the gradient of h(V)."""

    @staticmethod
    def forward(ctx: Any, v: Tensor) -> Tensor:
        ctx.save_for_backward(v)
        return (v >= 0).to(v.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        s = ctx.saved_tensors[0].sigmoid()
        h = s * (ZETA - GAMMA) + GAMMA
        slope = (ZETA - GAMMA) * s * (1 - s)
        return torch.where((h > 0) & (h < 1), grads[0] * slope, 0.0)


def rectified_sigmoid(v: Tensor) -> Tensor:
    """h(V) in [0, 1] (eq. 23)."""
    return (v.sigmoid() * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def inverse_rectified_sigmoid(h: Tensor) -> Tensor:
    """The V with h(V) = h, for h in [0, 1]."""
    return -((ZETA - GAMMA) / (h - GAMMA) - 1).log()


class AdaRound(Quantizer):
    """Uniform weights whose rounding is learned.

    Args:
        per_channel: one grid per output channel.
        symmetric: no zero point.
        estimator: how the grid is found, `mse`, `percentile` or `absmax` (nearest.py).
        p: exponent of the error that `mse` minimises.
        percent: share of the elements that `percentile` keeps representable.
    """

    scale: Tensor
    zero: Tensor

    def __init__(
        self,
        bits: int,
        *,
        signed: bool = True,
        shape: Sequence[int] = (),
        per_channel: bool = True,
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
        self.soft = False
        size = (shape[0], *[1] * (len(shape) - 1)) if per_channel else ()
        self.register_buffer("scale", torch.ones(size))
        self.register_buffer("zero", torch.zeros(size))
        self.rounding = nn.Parameter(torch.zeros(tuple(shape)))  # V

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        """Set grid and V from the weights [C_out, ...]."""
        scale, zero = estimate_grid(
            x.detach().float().reshape(x.shape[0] if self.per_channel else 1, -1),
            self.qmin,
            self.qmax,
            fixed_zero=self.symmetric or not self.signed,
            estimator=self.estimator,
            p=self.p,
            percent=self.percent,
        )
        self.scale.copy_(scale.reshape(self.scale.shape))
        self.zero.copy_(zero.reshape(self.zero.shape))
        self.round_nearest(x)
        self.calibrated.fill_(True)

    @torch.no_grad()
    def round_nearest(self, x: Tensor) -> None:
        """Set V so that soft gives the weights [C_out, ...] and hard rounds them to nearest."""
        u = x.float() / self.scale.clamp_min(MIN_SCALE)
        v = inverse_rectified_sigmoid(u - u.floor())
        # The logarithm must not turn a decision of nearest around.
        up = (u + 0.5).floor() > u.floor()
        self.rounding.copy_(torch.where(up, v.clamp_min(0), v.clamp_max(-1e-6)))

    def _x_int(self, x: Tensor, up: Tensor) -> Tensor:
        floor: Tensor = _Floor.apply(x.float() / self.scale.clamp_min(MIN_SCALE))  # type: ignore[assignment]
        x_int = floor + up + self.zero
        # Not x_int.clamp: from torch 2.15 on its gradient is 0 at the outermost codes too.
        inside = (x_int >= self.qmin) & (x_int <= self.qmax)
        return torch.where(inside, x_int, x_int.detach().clamp(self.qmin, self.qmax))

    def forward(self, x: Tensor) -> Tensor:
        v = self.rounding
        up: Tensor = rectified_sigmoid(v) if self.soft else _Decide.apply(v)  # type: ignore[assignment]
        x_int = self._x_int(x, up)  # eq. 22
        return ((x_int - self.zero) * self.scale.clamp_min(MIN_SCALE)).to(x.dtype)

    def codes(self, x: Tensor) -> Tensor:
        return self._x_int(x, (self.rounding.detach() >= 0).float()).to(torch.int32)

    def decode(self, codes: Tensor, context: Tensor | None = None) -> Tensor:
        return (codes.to(self.scale.dtype) - self.zero) * self.scale.clamp_min(MIN_SCALE)

    def levels(self) -> Tensor:
        grid = torch.arange(self.qmin, self.qmax + 1, device=self.scale.device)
        scale = self.scale.reshape(-1, 1).clamp_min(MIN_SCALE)
        return (grid - self.zero.reshape(-1, 1)) * scale  # [C_out or 1, L]

    def penalty(self, beta: float) -> Tensor:
        """f(V) = sum 1 - |2 h(V) - 1|^beta, [] (eq. 24)."""
        return (1 - (2 * rectified_sigmoid(self.rounding) - 1).abs().pow(beta)).sum()

    @torch.no_grad()
    def undecided(self) -> Tensor:
        """How many weights have h away from 0 and 1, [] int64."""
        h = rectified_sigmoid(self.rounding)
        return ((h > DECIDED) & (h < 1 - DECIDED)).sum()

    @torch.no_grad()
    def latent(self, x: Tensor) -> Tensor:
        """The weight nearest to x that round-to-nearest maps to the learned codes. Shape: as x."""
        scale = self.scale.clamp_min(MIN_SCALE)
        codes = self.codes(x).float()
        # The outermost codes take everything beyond them.
        middle = codes - self.zero
        margin = (FAR * middle.abs()).clamp_min(MARGIN)
        low = torch.where(codes > self.qmin, middle - 0.5 + margin, -torch.inf)
        high = torch.where(codes < self.qmax, middle + 0.5 - margin, torch.inf)
        return (torch.clamp(x.float() / scale, low, high) * scale).to(x.dtype)

    def extra_bytes(self) -> int:
        """A float32 step and, where there is one, a zero point of a byte (two above 8 bits)."""
        has_zero = self.signed and not self.symmetric
        return self.scale.numel() * (4 + has_zero * (1 if self.bits <= 8 else 2))

    def health(self) -> dict[str, Tensor]:
        return {"clamped_steps": (self.scale <= MIN_SCALE).sum()}
