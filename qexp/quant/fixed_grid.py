"""What POT, POST and APoT share: the nearest level of a fixed grid under a learned clip.

Equations and gradients are those of `power`; the grids are in `grids`, the projection in `project`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from qexp.quant.functional import MIN_SCALE, midpoints
from qexp.quant.project import mse_clip, project, quantile_clip
from qexp.quant.quantizer import Quantizer

THREE_STD = 3.0  # APoT's initial clip, in standard deviations

Init = Literal["quantile", "mse", "three_std"]


class FixedGrid(Quantizer):
    """Nearest level of a fixed grid in [-1, 1] under a learned clip: what the methods share.

    Args:
        grid: [L] sorted levels, from -1 to 1, or from 0 to 1 where nothing is negative.
        per_channel: one clip per output channel, else one per layer.
        init, grad_scale: see `power`.
        clip_gradient: whether clipped weights get no gradient.
        lr_scale, decay: of the clip, see `Quantizer.train_with`.
    """

    grid: Tensor
    of_inputs = False  # whether it quantizes activations, whose grid may start at 0

    def __init__(
        self,
        bits: int,
        grid: Tensor,
        *,
        signed: bool,
        shape: Sequence[int],
        per_channel: bool,
        init: Init,
        grad_scale: Literal["count", "one"] = "count",
        clip_gradient: bool = True,
        lr_scale: float = 1.0,
        decay: float | None = None,
    ) -> None:
        super().__init__(bits, signed=signed, shape=shape)
        self.train_with(lr_scale, decay)
        if not (signed or self.of_inputs):
            raise ValueError(f"{type(self).__name__} quantizes weights, which are signed")
        if init not in ("quantile", "mse", "three_std"):
            raise ValueError(f"init must be quantile or mse (APoT: or three_std), got {init!r}")
        # Code 0 is the level at (symmetric, full, released) or next above zero (no_zero).
        self.qmin = -(grid.numel() // 2) if signed else 0
        self.qmax = self.qmin + grid.numel() - 1
        self.per_channel = per_channel
        self.init: str = init
        if init == "three_std":  # a constant: what was learned at another width is a better start
            self.carried = ("scale",)
        self.grad_scale = grad_scale
        self.clip_gradient = clip_gradient
        self.register_buffer("grid", grid)
        self.scale = nn.Parameter(
            torch.ones(shape[0], *[1] * (len(shape) - 1)) if per_channel else torch.tensor(1.0)
        )

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        """Set the clip from the weights [C_out, ...]."""
        if self.init == "mse":
            clip = mse_clip(x, self.grid, self.per_channel)
        elif self.init == "quantile":
            clip = quantile_clip(x, self.per_channel)
        else:
            clip = torch.full((self.scale.numel(),), THREE_STD)
        self.scale.copy_(clip.clamp_min(MIN_SCALE).reshape(self.scale.shape))
        self.calibrated.fill_(True)

    def forward(self, x: Tensor) -> Tensor:
        g = 1.0 if self.grad_scale == "one" else (x.numel() / self.scale.numel()) ** -0.5
        return project(x, self.scale, self.grid, g, self.clip_gradient)

    def codes(self, x: Tensor) -> Tensor:
        v = x.float() / self.scale.clamp_min(MIN_SCALE)
        return (torch.bucketize(v.contiguous(), midpoints(self.grid)) + self.qmin).to(torch.int32)

    def decode(self, codes: Tensor, context: Tensor | None = None) -> Tensor:
        return self.scale.clamp_min(MIN_SCALE) * self.grid[codes.long() - self.qmin]

    def levels(self) -> Tensor:
        return self.scale.detach().clamp_min(MIN_SCALE).reshape(-1, 1) * self.grid  # [C_out|1, L]

    def thresholds(self) -> Tensor:
        return midpoints(self.levels()[0])

    def health(self) -> dict[str, Tensor]:
        return {"clamped_steps": (self.scale.detach() <= MIN_SCALE).sum()}
