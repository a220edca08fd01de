"""Fixed non-uniform weight grids under a learned clip: POT, POST and APoT.

POT, APoT: Y. Li, X. Dong, W. Wang. "Additive Powers-of-Two Quantization: An Efficient Non-uniform
Discretization for Neural Networks." ICLR 2020, arXiv 1909.13144, and the authors' code.
POST: W. Zhou, Z. Yu, X. Liu, J. Yang, R. Xiao, T. Wang, C. Tang, J. Lv. "Precision Neural Network
Quantization via Learnable Adaptive Modules." arXiv 2504.17263, and the authors' code.

The idea: trained weights crowd around zero, so levels should too. Levels that are powers of two
(POT), of sqrt 2 (POST), or sums of few powers of two (APoT) still multiply by shifts, adds, or a
small table. The level set is fixed (`grids.py`); only the clip that stretches it is learned.

Forward.    v = clip(w / scale, -1, 1),  q = the level nearest to v,  w_hat = scale * q.
    `scale` is the clip (alpha in the papers), one per output channel; ties go to the lower level.

Gradients, e = dL/dw_hat, straight-through the projection ("RCF" in APoT).
    dL/dw     = e                where |w| <= scale, else 0
    dL/dscale = g * sum e * t,   t = q - w / scale inside, sign(w) outside
    g = 1 / sqrt(weights of one row) (ASQ's code, without LSQ's qmax), or 1 (`grad_scale: one`,
    the default of APoT's codes, in units of normalised weights).

Initialisation.  `quantile`: the 0.99 quantile of |w| (ASQ's code). `mse`: the clip of least squared
    error. `three_std` (APoT): 3, in units of the normalised weights.

APoT's normalisation (`normalize: true`): w' = (w - mean(w)) / std(w) over the layer first,
    constants in backward. Here w_hat = std * scale * q: the authors leave the division by std for
    batch norm to absorb. The mean stays out, as theirs does. Like batch norm's, mean and std are
    buffers: each training forward refreshes them, evaluation uses them as they stand, so that the
    levels of a stored network are part of its state.

Departs from the papers and codes:
 1. POST's released grid has 2^b + 1 levels, which b bits cannot number, and its committed base is
    2, not the paper's sqrt 2. `POST` has at most 2^b; the grid as released is `POSTReleased`.
 2. POST `base: auto` is 2 up to 3 bits and sqrt 2 above, `levels: full` uses every code: the legal
    choice of least error, measured in `grids.py`. Trained three epochs at W4A4, one seed, sqrt 2
    has 91.19 and 2 has 90.68 (results/cifar10_ablations). The paper's level set per width is
    unknown.
    Trained (results/cifar10_qat_rungs): full 87.15, symmetric 85.97, no_zero 86.03, `mse` 87.03.
 3. scale is kept >= 1.2e-7 in the forward; its gradient passes the guard.
 4. APoT and POT are per channel like POST, for comparisons at equal granularity; the authors have
    one clip a layer (`per_channel: false`). Normalisation is per layer either way.
 5. APoT does not normalise unless asked: without its mean a trained network is broken until batch
    norm has been trained again, so calibration sets the steps of the activations from broken
    inputs. CIFAR-10 ResNet-20, 91.6 % float, 4-bit weights, float activations, top-1 right after
    calibration, on 1,024 test images: 15.9 % normalised, 90.3 % not (clip by mse; by hand, not
    kept). The authors' form is `quantizer/weight=apot_normalized`.
 6. APoT's CIFAR code does not clip the weight gradient at any width, its ImageNet code at 2 bits
    only: clipped above 2 bits here (`clip_gradient`). The ImageNet code differentiates mean and
    std, the CIFAR code does not. Level sets beyond 5 bits: see `grids`.
 7. The authors' APoT and POT have such levels for activations too (`additive.py`); the configs
    `apot` and `pot` have LSQ's, to compare weights. `quantizer=apot_released` is the authors'
    CIFAR code as a whole, with its rates and its weight decay of the clips; with `additive` off
    for both it is their POT.
 8. `progressive` bits calibrate each clip anew (`rebits.py`). The authors carry it from width to
    width: so do `three_std` here and `paper` for activations, which would else set a constant.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from qexp.quant import grids
from qexp.quant.fixed_grid import FixedGrid, Init
from qexp.quant.functional import MIN_SCALE


def _post_base(base: float | Literal["auto"], bits: int) -> float:
    """2 up to 3 bits, sqrt 2 above, unless given: least error in `grids.py`."""
    if base == "auto":
        return 2.0 if bits <= 3 else grids.SQRT2
    if isinstance(base, str) or not 1 < base < float("inf"):
        raise ValueError(f"base must be 'auto' or a finite number above 1, got {base!r}")
    # The paper's base typed with few digits is the paper's base.
    return grids.SQRT2 if abs(base - grids.SQRT2) < 1e-3 else float(base)


class POST(FixedGrid):
    """Powers of sqrt 2 (or 2), at most 2**bits levels, for weights.

    Args:
        base: ratio of neighbouring levels, a number above 1, or `auto` (by width).
        levels: `full` (2**bits levels), `symmetric` (2**bits - 1), `no_zero` (2**bits).
        per_channel, init: see `FixedGrid`.
    """

    def __init__(
        self,
        bits: int,
        *,
        signed: bool = True,
        shape: Sequence[int] = (),
        base: float | Literal["auto"] = "auto",
        levels: Literal["full", "symmetric", "no_zero"] = "full",
        per_channel: bool = True,
        init: Literal["quantile", "mse"] = "quantile",
    ) -> None:
        grids.check_bits("POST", bits)
        makers = {"full": grids.full, "symmetric": grids.symmetric, "no_zero": grids.no_zero}
        if levels not in makers:
            raise ValueError(f"levels must be one of {', '.join(makers)}, got {levels!r}")
        ratio = _post_base(base, bits)
        super().__init__(
            bits,
            makers[levels](bits, ratio),
            signed=signed,
            shape=shape,
            per_channel=per_channel,
            init=init,
        )
        self.base, self.level_set = ratio, levels

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, levels={self.level_set}"


class POSTReleased(FixedGrid):
    """The grid that ASQ's authors released: 2**bits + 1 levels, charged log2(2**bits + 1) bits.

    Args:
        base: 2 as committed there; sqrt 2 stands beside it in a comment and in the paper.
        per_channel, init: see `FixedGrid`.
    """

    def __init__(
        self,
        bits: int,
        *,
        signed: bool = True,
        shape: Sequence[int] = (),
        base: float = 2.0,
        per_channel: bool = True,
        init: Literal["quantile", "mse"] = "quantile",
    ) -> None:
        grids.check_bits("POSTReleased", bits)
        ratio = _post_base(base, bits)
        grid = grids.released(bits, ratio)
        super().__init__(bits, grid, signed=signed, shape=shape, per_channel=per_channel, init=init)
        self.base = ratio


class POT(FixedGrid):
    """Powers of two, 2**bits - 1 levels, for weights.

    Args:
        per_channel, init: see `FixedGrid`.
    """

    def __init__(
        self,
        bits: int,
        *,
        signed: bool = True,
        shape: Sequence[int] = (),
        per_channel: bool = True,
        init: Literal["quantile", "mse"] = "quantile",
    ) -> None:
        grids.check_bits("POT", bits)
        grid = grids.symmetric(bits, 2.0)
        super().__init__(bits, grid, signed=signed, shape=shape, per_channel=per_channel, init=init)


class APoT(FixedGrid):
    """Sums of powers of two, 2**bits - 1 levels, for weights, normalised first or not.

    Args:
        normalize: subtract the layer's mean and divide by its standard deviation first.
        additive: sums of powers of two; off: single ones, the authors' POT.
        clip_gradient: whether clipped weights get no gradient; None: above 2 bits (departure 6).
        per_channel, init, grad_scale, lr_scale, decay: see `FixedGrid`; `three_std` needs
            `normalize`.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        bits: int,
        *,
        signed: bool = True,
        shape: Sequence[int] = (),
        normalize: bool = False,
        per_channel: bool = True,
        init: Init = "quantile",
        grad_scale: Literal["count", "one"] = "count",
        additive: bool = True,
        clip_gradient: bool | None = None,
        lr_scale: float = 1.0,
        decay: float | None = None,
    ) -> None:
        grids.check_bits("APoT", bits)
        if init == "three_std" and not normalize:
            raise ValueError("init=three_std is in units of normalised weights: set normalize=true")
        super().__init__(
            bits,
            grids.additive(bits) if additive else grids.symmetric(bits, 2.0),
            signed=signed,
            shape=shape,
            per_channel=per_channel,
            init=init,
            grad_scale=grad_scale,
            clip_gradient=bits > 2 if clip_gradient is None else clip_gradient,
            lr_scale=lr_scale,
            decay=decay,
        )
        self.additive = additive
        self.normalize = normalize
        self.register_buffer("mean", torch.tensor(0.0))
        self.register_buffer("std", torch.tensor(1.0))

    @torch.no_grad()
    def _measure(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the layer's weights, [] each, float32."""
        std, mean = torch.std_mean(x.detach().float())
        return mean, std.clamp_min(MIN_SCALE)

    def calibrate(self, x: Tensor) -> None:
        """Set mean, standard deviation and clip from the weights [C_out, ...]."""
        if self.normalize:
            mean, std = self._measure(x)
            self.mean.copy_(mean)
            self.std.copy_(std)
        super().calibrate((x.detach().float() - self.mean) / self.std)

    def forward(self, x: Tensor) -> Tensor:
        if not self.normalize:
            return super().forward(x)
        mean, std = self.mean, self.std
        if self.training:
            mean, std = self._measure(x)
            self.mean.copy_(mean)
            self.std.copy_(std)
        w_hat = super().forward((x.float() - mean) / std) * std
        return w_hat.to(x.dtype)

    def codes(self, x: Tensor) -> Tensor:
        return super().codes((x.float() - self.mean) / self.std)

    def decode(self, codes: Tensor, context: Tensor | None = None) -> Tensor:
        return super().decode(codes) * self.std

    def levels(self) -> Tensor:
        return super().levels() * self.std

    def extra_bytes(self) -> int:
        return super().extra_bytes() + (4 if self.normalize else 0)  # the std; codes hold the mean
