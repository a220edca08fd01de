"""Activations whose rounding border is a function of the activation.

Z. Li, C. Guo, Z. Zhu, Y. Zhou, Y. Qiu, X. Gao, J. Leng, M. Guo. "Efficient Activation Quantization
via Adaptive Rounding Border for Post-Training Quantization" (AQuant), arXiv 2208.11945.

The idea: learned rounding of weights lowers the error of a layer's output; activations are known
only at run time, so instead of a decision each gets a border: round up from B(u), not from 1/2.

Forward.  u = x / scale,  t = u / (qmax - qmin),  v = a0 + a1 t + a2 t^2,  B = clip(1/2 + v, 0, 1)
    x_int = clip(floor(u) + 1[u - floor(u) >= B] + zero, qmin, qmax)
          = clip(floor(u + 1 - B) + zero, qmin, qmax)      the cheap form: an offset before floor
    x_hat = (x_int - zero) * scale.    B = 1/2 is round-to-nearest (nearest.py), bit for bit.

Who shares a border (`per`).  row: one function for each (input channel, kernel position), the same
    for all output channels and positions; the same pixel may round differently in each window, so
    inputs are quantized after im2col. (And dropped there in a reconstruction: each window has its
    own mask, where QDrop's pixel has one.) channel: one for each input channel, one quantized
    tensor as usual. tensor: one for all.

`border`.  constant (a0), linear (a0, a1), quadratic (a0, a1, a2).

`fusion`, rows only: the k*k rows of one input channel in a window see each other through a learned
    matrix M [C, k*k, k*k].
    none      v as above
    window    v'_i = sum_j M_ij v_j,            M starts as the identity
    residual  v'_i = v_i + sum_j M_ij e_j,      e_j = u_j - floor(u_j + 1/2) the nearest errors of
              the window: the global term, whose exact form needs all rows. `see_weights` starts it
              at M_ij = -G_ij / (2 G_ii), j != i, with G = w_hat^T w_hat summed over outputs: half
              the closed form, as all rows correct the same error at once. G_ii is taken as 1.2e-7
              at least: rows of smaller weights (ResNet-20 folded at 2 bits: 68) start nearer to 0.

`squash`.  clip as above, or sigmoid: B = sigmoid(4 v), of the same value and slope at v = 0, which
    never reaches a bound; then free is 4 B (1 - B) below.

Closed form (`init: closed_form`).  The u that minimises sum_o (w_hat_oi q - w_oi u)^2 rounds at
    B_i(u) = 1/2 + (1 - rho_i) u,   rho_i = <w_hat_i, w_i> / |w_hat_i|^2, i.e. a1 = (1 - rho_i) *
    (qmax - qmin), a0 = a2 = 0. It needs no data. `init: zero` starts as nearest.

Gradients, e = dL/dx_hat, inside = [x_int not clipped], free = [0 < 1/2 + v < 1].
    dL/dB     = -e * scale * inside
    dL/da_k   = sum dL/dB * free * t^k                                 over samples and positions
    dL/dx     = e * inside * (1 - B'(u)),   B'(u) = free * (a1 + 2 a2 t) / (qmax - qmin)
    dL/dscale = sum e * ((x_int - zero) - inside * (1 - B'(u)) * u)
    The hard forward is differentiated straight through floor: as if every input moved with B.
`tau` < 1 counts for dL/dB only those that a step of the border can round otherwise:
    dL/dB     = -e * scale / tau * near,   near = [|u + 1 - B - k| <= tau / 2, k the integer next to
    it, if k - 1 and k are codes]: the derivative of a staircase whose steps are tau wide. Inputs of
    0, half of what a ReLU gives, move nothing then; straight through they do.

State counted in the size: one float32 step, the coefficients, M.

Measured here (docs/results.md: ResNet-20, CIFAR-10, 300 iterations a block, three seeds; points
over QDrop and their deviation). Learned with the rounding (`quantizer.reconstruct.borders=joint`):
W2A2 +1.35 (0.71), W2A4 +0.14 (0.33), W3A3 -0.08 (0.75), W4A4 -0.01 (0.20). At W2A2 the closed form,
not learned, has +1.10 (1.19), a border per channel +0.75 (0.44), per tensor -0.06 (1.04); fusion
adds nothing to rows, and 2000 iterations leave +0.56 (0.48). Rows nearly double the bytes of 2-bit
weights; an iteration takes twice as long. Learned with the rounding and once more after it, on the
quantized network and without drops (`both`, half as many iterations more): W2A2 +3.10 (0.92), W2A4
+0.65 (0.37), W3A3 +0.51 (0.45), W4A4 +0.34 (0.08), on every seed; QDrop's steps learned twice -0.33
(0.62) at W2A2, its biases too +1.11 (0.54), a constant border per row twice +2.12 (0.93). Once more
from the network's output (`network`) they gain 0.24 (0.07), QDrop no less. `quantizer=aquant_twice`
is `both`; `aquant` stays `joint`, in QDrop's iterations, and the ladder is made of it. The 60.31
that the paper gives for ResNet-18 is not checked.

Departs from the paper: its function, granularity, initialisation, rates and tables are in no text
we could read, and no code was released. All above is our reading of the three abstracts; the
closed forms are our derivation. Inputs with negative values get a zero point; t keeps its sign.
Not built: a tau that narrows while the border is learned, and soft steps in forward.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from qexp.quant.border import Rule, border_of, border_round, polynomial_border
from qexp.quant.drop import Drop, last_byte, random_bytes
from qexp.quant.functional import MIN_SCALE, as_rows, from_rows
from qexp.quant.nearest import Estimator, activation_sample, check_estimator, estimate_grid
from qexp.quant.quantizer import Quantizer
from qexp.quant.window_border import mixed, window_border

DEGREE = {"constant": 0, "linear": 1, "quadratic": 2}
GRID = 64  # points of [0, 1) per code at which a border is looked at for health and plots


class AQuant(Quantizer):
    """Uniform activations with a learned step and a border function.

    Args:
        border: `constant`, `linear` or `quadratic`.
        per: who shares a border: `row`, `channel` or `tensor`.
        fusion: `none`, `window` or `residual`; the last two need `per: row`.
        init: `closed_form` (from the weights, see `see_weights`) or `zero`.
        squash: `clip` or `sigmoid`: how v becomes a border in [0, 1].
        tau: share of a code's width around a border whose elements move it; 1: all move it.
        estimator, p, percent: how the step is found (nearest.py).
    """

    zero: Tensor

    def __init__(
        self,
        bits: int,
        *,
        signed: bool = True,
        shape: Sequence[int] = (),
        border: Literal["constant", "linear", "quadratic"] = "quadratic",
        per: Literal["row", "channel", "tensor"] = "row",
        fusion: Literal["none", "window", "residual"] = "none",
        init: Literal["closed_form", "zero"] = "closed_form",
        squash: Literal["clip", "sigmoid"] = "clip",
        tau: float = 1.0,
        estimator: Estimator = "mse",
        p: float = 2.4,
        percent: float = 99.9,
    ) -> None:
        super().__init__(bits, signed=signed, shape=shape)
        check_estimator(p, percent)
        _check("border", border, tuple(DEGREE))
        _check("per", per, ("row", "channel", "tensor"))
        _check("fusion", fusion, ("none", "window", "residual"))
        _check("init", init, ("closed_form", "zero"))
        _check("squash", squash, ("clip", "sigmoid"))
        if not 0 < tau <= 1:
            raise ValueError(f"tau must be above 0 and at most 1, got {tau}")
        if fusion != "none" and per != "row":
            raise ValueError(f"fusion={fusion} needs per=row, got per={per}")
        self.per, self.fusion, self.init = per, fusion, init
        self.squash, self.tau = squash, float(tau)
        self.drop: Drop | None = None  # set while a network is reconstructed
        self.estimator: Estimator = estimator
        self.p, self.percent = p, percent
        channels = self.shape[0] if self.shape else 1
        self.window = 1  # rows of one input channel
        for size in self.shape[1:]:
            self.window *= size
        # A linear layer has one row a channel and needs no im2col.
        self.on_columns = per == "row" and len(self.shape) == 3
        rows = {"row": channels * self.window, "channel": channels, "tensor": 1}[per]
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.register_buffer("zero", torch.tensor(0.0))
        self.border = nn.Parameter(torch.zeros(DEGREE[border] + 1, rows))  # a0, a1, a2
        if fusion != "none":
            start = torch.eye(self.window) if fusion == "window" else torch.zeros(self.window)
            self.mixing = nn.Parameter(start.expand(channels, self.window, self.window).clone())

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        """Set the step from a batch of inputs [N, ...], before im2col: as Nearest, and so QDrop."""
        scale, zero = estimate_grid(
            activation_sample(x, self.estimator),
            self.qmin,
            self.qmax,
            fixed_zero=not self.signed,
            estimator=self.estimator,
            p=self.p,
            percent=self.percent,
        )
        self.scale.copy_(scale[0])
        self.zero.copy_(zero[0])
        self.calibrated.fill_(True)

    @torch.no_grad()
    def see_weights(self, weight: Tensor, w_hat: Tensor) -> None:
        """Start the border from the layer's weights and their quantized values.

        Shape: both [C_out, C_in / groups, kh, kw] or [C_out, C_in].
        """
        if self.init == "zero":
            return
        w, v = _by_row(weight, self.shape), _by_row(w_hat, self.shape)  # [C_out/g, C_in, window]
        dims = {"row": (0,), "channel": (0, 2), "tensor": (0, 1, 2)}[self.per]
        power = v.square().sum(dims)
        rho = torch.where(power > 0, (v * w).sum(dims) / power.clamp_min(MIN_SCALE**2), 1.0)
        if self.border.shape[0] > 1:
            self.border[1] = (1 - rho).reshape(-1) * (self.qmax - self.qmin)
        if self.fusion == "residual":
            gram = torch.einsum("oci,ocj->cij", v, v)
            own = gram.diagonal(dim1=1, dim2=2).clamp_min(MIN_SCALE)  # G_ii      [C, window]
            self.mixing.copy_(-gram / (2 * own[:, :, None]))
            self.mixing.diagonal(dim1=1, dim2=2).zero_()

    def _view(self, x: Tensor) -> Tensor:
        """[A, R, M]: R rows of borders in the middle, in x's memory order."""
        if self.per == "tensor":
            return as_rows(x, 1)[None]
        if len(self.shape) == 1:  # linear: channels come last
            return x.reshape(-1, x.shape[-1], 1)
        if x.dim() == 4 and not x.is_contiguous():
            return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1], 1)  # [N*H*W, C, 1]
        return x.reshape(*x.shape[:2], math.prod(x.shape[2:]))

    def _unview(self, y: Tensor, like: Tensor) -> Tensor:
        """Undo `_view`: [A, R, M] -> the shape and memory format of `like`."""
        if self.per == "tensor":
            return from_rows(y[0], like)
        if len(self.shape) != 1 and like.dim() == 4 and not like.is_contiguous():
            n, c, h, w = like.shape
            return y.reshape(n, h, w, c).permute(0, 3, 1, 2)
        return y.reshape(like.shape)

    def borders(self, u: Tensor) -> Tensor:
        """B for u = x / scale, differentiable. Shape: [A, R, M]."""
        t = u * (1.0 / (self.qmax - self.qmin))
        v = self.border[-1][:, None]
        for row in self.border[:-1].flip(0):
            v = row[:, None] + t * v
        if self.fusion != "none":
            v = v.expand_as(u)
            feature = v if self.fusion == "window" else (u - (u + 0.5).floor()).detach()
            product = mixed(self.mixing, feature)
            v = product if self.fusion == "window" else v + product
        return border_of(v, self.rule.sigmoid)

    @property
    def rule(self) -> Rule:
        return Rule(self.qmin, self.qmax, self.squash == "sigmoid", self.tau)

    def _integers(self, x: Tensor) -> Tensor:
        """x_int - zero for x [A, R, M]."""
        u = x.float() / self.scale.clamp_min(MIN_SCALE)
        return border_round(u, self.borders(u), self.qmin - self.zero, self.qmax - self.zero)

    def forward(self, x: Tensor) -> Tensor:
        view = self._view(x)
        dice, last = None, -1
        if self.drop is not None:
            dice = random_bytes(view, self.drop.generator)
            last = last_byte(self.drop.probability)
        given = (self.zero, self.rule)
        if self.fusion == "none":
            x_hat = polynomial_border(view, self.scale, self.border, *given, dice, last)
        else:
            fusion = (self.mixing, *given, self.fusion == "window")
            x_hat = window_border(view, self.scale, self.border, *fusion, dice, last)
        return self._unview(x_hat, x)

    @torch.no_grad()
    def codes(self, x: Tensor) -> Tensor:
        return self._unview((self._integers(self._view(x)) + self.zero).to(torch.int32), x)

    def decode(self, codes: Tensor, context: Tensor | None = None) -> Tensor:
        return (codes.to(self.scale.dtype) - self.zero) * self.scale.clamp_min(MIN_SCALE)

    def _borders(self) -> tuple[Tensor, Tensor]:
        """`(u, B)` on a grid of all representable u, [G] and [R, G]; without fusion."""
        steps = self.qmax - self.qmin
        u = torch.arange(steps * GRID, device=self.zero.device) / GRID + (self.qmin - self.zero)
        t = (u / steps)[None]
        a = [row[:, None] for row in self.border.detach()] + [torch.zeros_like(t)] * 2
        return u, border_of(a[0] + t * (a[1] + t * a[2]), self.rule.sigmoid)

    def levels(self) -> Tensor:
        codes = torch.arange(self.qmin, self.qmax + 1, device=self.zero.device)
        return self.decode(codes).detach().reshape(1, -1)

    def thresholds(self) -> Tensor:
        """Borders between codes in units of x, [L-1]: of the average row, without fusion."""
        u, border = self._borders()
        mean = border.mean(0).reshape(-1, GRID)  # [L-1, GRID]
        frac = (u - u.floor()).reshape(-1, GRID)
        up = torch.cat([frac >= mean, torch.ones_like(mean[:, :1], dtype=torch.bool)], 1)
        first = up.int().argmax(1) / GRID  # of each code: where rounding up begins
        return (u.reshape(-1, GRID)[:, 0] + first) * self.scale.detach().clamp_min(MIN_SCALE)

    def extra_bytes(self) -> int:
        """Step, coefficients, mixing (float32) and, for signed inputs, a zero point."""
        return super().extra_bytes() + self.signed * (1 if self.bits <= 8 else 2)

    def health(self) -> dict[str, Tensor]:
        """Under `fusion` a border is another for each window: those at a bound are not counted."""
        found = {"clamped_steps": (self.scale.detach() <= MIN_SCALE).sum()}
        if self.fusion == "none":
            _, border = self._borders()
            found["borders_at_bound"] = ((border <= 0) | (border >= 1)).any(1).sum()
        return found

    @property
    def kind(self) -> str:
        # What `mixing` and the coefficients mean depends on these, their shapes do not.
        fusion = "" if self.fusion == "none" else f" fusion={self.fusion}"
        return super().kind + fusion + ("" if self.squash == "clip" else f" squash={self.squash}")

    def extra_repr(self) -> str:
        kind = {1: "constant", 2: "linear", 3: "quadratic"}[self.border.shape[0]]
        return f"{super().extra_repr()}, {kind} per {self.per}, fusion={self.fusion}"


def _by_row(weight: Tensor, shape: tuple[int, ...]) -> Tensor:
    """[C_out, C_in/g, ...] -> [C_out/g, C_in, window]: what each input row is multiplied with."""
    groups = shape[0] // weight.shape[1]
    w = weight.detach().float().reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
    return w.transpose(0, 1).reshape(w.shape[1], shape[0], -1)


def _check(name: str, value: str, options: Sequence[str]) -> None:
    if value not in options:
        raise ValueError(f"{name} must be one of {', '.join(options)}, got {value!r}")
