"""APoT activations: sums of powers of two under a learned clip; POT's: single powers.

APoT: Y. Li, X. Dong, W. Wang. "Additive Powers-of-Two Quantization: An Efficient Non-uniform
Discretization for Neural Networks." ICLR 2020, arXiv 1909.13144, and the authors' code.

Inputs after ReLU crowd at zero as weights do around it: they get the same kind of levels, without a
sign and with all b bits for the magnitude. At 2 bits these are alpha * {0, 1/4, 1/2, 1}, for POT
(`additive: false`) as well.

Forward.    v = clip(x / alpha, 0, 1),  q = the level nearest to v,  x_hat = alpha * q.

Gradients, e = dL/dx_hat, straight-through the projection.
    dL/dx     = e                where 0 <= x <= alpha, else 0
    dL/dalpha = g * sum e * t,   t = q - x / alpha inside, 1 above, 0 below
    g = 1 (`count: null`, the authors' default), or 1 / sqrt(features) as LSQ's step has it

Initialisation.  `mse`: the clip of least squared error on a batch of training inputs; `paper`:
    alpha = 8 (the authors' CIFAR code; their ImageNet code: 6).

Departs from the authors' code:
 1. `count: sample` by default: the clip's gradient is a sum over all elements, as LSQ's is.
 2. `init: mse`: at 2 bits alpha = 8 rounds most inputs of a trained network to zero.
 3. Signed inputs have the levels of the weights; theirs come after ReLU only.
 4. alpha is kept >= 1.2e-7 in the forward; its gradient passes the guard.
 5. As their ImageNet code: their CIFAR code does not clip the gradient below 0, where no input is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from qexp.quant import grids
from qexp.quant.calibrate import MAX_SAMPLES, sample
from qexp.quant.fixed_grid import FixedGrid
from qexp.quant.functional import MIN_SCALE
from qexp.quant.lsq import Count, features
from qexp.quant.project import mse_clip, project

APOT_ALPHA = 8.0


class APoTActivation(FixedGrid):
    """APoT activations: sums of powers of two on [0, alpha], 2**bits levels, alpha learned.

    Args:
        additive: sums of powers of two; off: single ones (POT), up to 7 bits.
        count: what N of the gradient scale counts, `sample` or `tensor` (see `LSQ`); None: no
            gradient scale (the authors' default).
        init: `mse`, or `paper` (alpha = 8).
        lr_scale, decay: of alpha, see `Quantizer.train_with`.
    """

    of_inputs = True

    def __init__(
        self,
        bits: int,
        *,
        signed: bool = True,
        shape: Sequence[int] = (),
        additive: bool = True,
        count: Count | None = "sample",
        init: Literal["mse", "paper"] = "mse",
        lr_scale: float = 1.0,
        decay: float | None = None,
    ) -> None:
        grids.check_bits("APoTActivation", bits)
        if signed:
            grid = grids.additive(bits) if additive else grids.symmetric(bits, 2.0)
        else:
            grid = grids.sums(bits) if additive else grids.powers(bits)
        super().__init__(
            bits,
            grid,
            signed=signed,
            shape=shape,
            per_channel=False,
            init="mse",
            lr_scale=lr_scale,
            decay=decay,
        )
        self.additive, self.init = additive, init
        self.count: Count | None = count
        if init == "paper":  # a constant: what was learned at another width is a better start
            self.carried = ("scale",)

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        """Set the clip from a batch of inputs [N, ...]."""
        if self.init == "mse":
            clip = mse_clip(sample(x, MAX_SAMPLES)[None], self.grid, False)
            self.scale.copy_(clip.clamp_min(MIN_SCALE).reshape(()))
        else:
            self.scale.fill_(APOT_ALPHA)
        self.calibrated.fill_(True)

    def whole(self) -> Tensor:
        """The levels as integers, each by its code: multiples of the smallest positive one."""
        # Not grid[grid > 0]: how many there are a GPU would have to tell first.
        unit = torch.where(self.grid > 0, self.grid, torch.inf).min()
        return (self.grid / unit).round()

    def forward(self, x: Tensor) -> Tensor:
        g = 1.0
        if self.count is not None:
            n = features(x, self.samples_axis) if self.count == "sample" else x.numel()
            g = max(n, 1) ** -0.5
        return project(x, self.scale, self.grid, g)
