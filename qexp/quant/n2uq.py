"""Non-uniform-to-uniform quantization: learned thresholds, uniform outputs.

Z. Liu, K.-T. Cheng, D. Huang, E. Xing, Z. Shen. "Nonuniform-to-Uniform Quantization: Towards
Accurate Quantization via Generalized Straight-Through Estimation." CVPR 2022, arXiv 2111.14826.

The idea: where an activation is cut into levels is learned freely, but the levels themselves stay
uniform, so the hardware multiplies integers. The generalized straight-through estimator (G-STE)
makes the thresholds learnable: its backward is the derivative of the expectation of stochastic
rounding, a piecewise linear function through the borders between segments.

Activations, m = 2^b - 1 segments, start s, lengths a_i >= 1e-3, scalings beta1 and beta2:
    z = beta1 * x,   d_0 = s,   d_i = d_(i-1) + a_i,   T_i = d_(i-1) + a_i / 2
    forward    x_hat = Delta * beta2 * #{i: z > T_i},   Delta = 2 / m
    backward   x_hat ~ Delta * beta2 * h(z),   h(z) = sum_i clip((z - d_(i-1)) / a_i, 0, 1)

The code divides the borders by beta1 once, instead of multiplying every x: b_i = d_i / beta1. A
threshold is then the midpoint of two borders, the code of x the index of the nearest border, and
all gradients are those of the borders; autograd of a vector of m + 1 does the rest. With
e = dL/dx_hat, x in segment i of length l_i = b_i - b_(i-1), and f = (x - b_(i-1)) / l_i in (0, 1]:
    dL/dx        = g = e * Delta * beta2 / l_i       (0 outside all segments)
    dL/db_(i-1) -= g * (1 - f),   dL/db_i -= g * f       hence by the chain rule the paper's
        dh/da_i = -(z - d_(i-1)) / a_i^2,   dh/da_j = -1/a_i (j < i),   dh/ds = -1/a_i
    dL/dbeta2    = Delta * sum e * code
Per element that is one search, and one pair (g, g * f) added into the sums of its segment:
O(N log m) time, x is the only tensor saved. Where kernels are compiled, a CPU does forward and
backward in one pass each (`gste_native`), up to 4 bits; torch's operators do it elsewhere.

Initialisation. a_i = Delta, and s, beta1, beta2 such that thresholds and levels are those of the
    uniform quantizer of least squared error on a batch of training inputs (`init: mse`):
    s = qmin * Delta, beta1 = Delta / scale, beta2 = 1 / beta1. `init: paper`: beta1 = beta2 = 1.

Weights (`N2UQWeight`): uniform levels, scaled so that all of them are about equally used
(entropy-preserving), per output channel, mean|w| taken as a constant:
    scale = mean|w| * (2^b - 1) / 2^(b-1),   v = clip(w / scale, -1, 1)
    w_hat = scale * (round((v + 1) * (2^b - 1) / 2) * 2 / (2^b - 1) - 1)       2^b levels, no zero
    dL/dw = dL/dw_hat, no clip mask. The released code has dL/dw_hat / scale (`gradient: released`).

Departs from the paper:
 1. Signed inputs: codes in [-2^(b-1), 2^(b-1) - 1], s < 0, x_hat = Delta * beta2 * code. In the
    paper a learned bias (RPReLU) shifts the inputs, and codes start at 0. Levels stay uniform.
 2. `init: mse`. The paper's s = 0, beta = 1 supposes inputs of about [0, 2].
 3. The gradients of s, a, beta1, beta2 are multiplied by LSQ's 1 / sqrt(features * m): they are
    sums over all elements as LSQ's is, which diverges under SGD without it (LSQ's ablation); Adam,
    the paper's optimizer, does not see a factor. `count: null` leaves them alone.
 4. a, beta1, beta2 are kept positive in the forward and their gradients pass the guard; the
    released code stops the gradient of an a_i below 1e-3, and does not guard beta.
 5. The weight gradient has no factor 1 / scale: constant per channel, invisible to Adam, but under
    SGD it would multiply the learning rate by 1 / scale, another number for each channel.
 6. Neither RPReLU nor the pre-activation order: those are the network's.
 7. s, a, beta1, beta2 learn at the recipe's rate; the authors', under Adam, is a tenth of that of
    the weights (`lr_scale: 0.1`). Under SGD it matters that beta1 = Delta / scale enters a
    threshold's movement twice: where scale < Delta (0.67 at 2 bits), it is slower than LSQ's step.
    After `mse`, ResNet-20 at W2A2, first 30 steps: in 11 layers of 18 no less than half of LSQ's
    under the same weights, in 7 a third to a thirtieth (second convolutions of blocks, with
    scales 0.2 to 0.43); `lr_scale: 10` makes up for it there (by hand, not kept). After ten epochs
    it has 88.51 against 88.16, under ADQ's codebook 87.30 against 86.92 (results/cifar10_qat_short,
    seed 0, where three seeds of ADQ deviate by 0.39): not enough to change a default.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from qexp.quant import gste_native
from qexp.quant.calibrate import mse_scale
from qexp.quant.functional import MIN_SCALE, as_rows, from_rows, midpoints, scale_grad
from qexp.quant.gste import gste
from qexp.quant.lsq import Count, grad_scale
from qexp.quant.quantizer import Quantizer, refuse_one_signed_bit

MIN_SEGMENT = 1e-3  # the paper's lower bound of a_i
MAX_BITS = 10  # beyond, the uniform start has shorter segments


def _at_least(x: Tensor, bound: float) -> Tensor:
    """max(x, bound); the gradient passes the guard."""
    return x.clamp_min(bound).detach() + (x - x.detach())


class N2UQ(Quantizer):
    """N2UQ activations: learned thresholds, uniform levels, G-STE.

    Args:
        count: what N of the gradient scale counts, `sample` or `tensor` (see `LSQ`); None: no
            gradient scale (paper, for Adam).
        init: `mse`, or `paper` (inputs of about [0, 2]).
        lr_scale: rate of s, a, beta1 and beta2, as a multiple of the recipe's (departure 7).
    """

    scales_output = ("output_scale",)

    def __init__(
        self,
        bits: int,
        *,
        signed: bool = True,
        shape: Sequence[int] = (),
        count: Count | None = "sample",
        init: Literal["mse", "paper"] = "mse",
        lr_scale: float = 1.0,
    ) -> None:
        super().__init__(bits, signed=signed, shape=shape)
        refuse_one_signed_bit("N2UQ", bits, signed)
        self.train_with(lr_scale)
        if bits > MAX_BITS:
            raise ValueError(
                f"thresholds closer than {MIN_SEGMENT:g} are not learned: at most "
                f"{MAX_BITS} bits, got {bits}"
            )
        self.count: Count | None = count
        self.init = init
        self.segments = 2**bits - 1  # m
        self.delta = 2 / self.segments
        self.start = nn.Parameter(torch.tensor(self.qmin * self.delta))  # s
        self.lengths = nn.Parameter(torch.full((self.segments,), self.delta))  # a
        self.input_scale = nn.Parameter(torch.tensor(1.0))  # beta1
        self.output_scale = nn.Parameter(torch.tensor(1.0))  # beta2

    @property
    def fuses(self) -> bool:  # type: ignore[override]
        """Torch's sums by segment are slow in a compiled network; `gste_native`'s are not."""
        on_cpu = self.start.device.type == "cpu"
        return on_cpu and self.segments in gste_native.SEGMENTS and gste_native.available()

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        """Start as the uniform quantizer of least squared error. Shape: x [N, ...]."""
        self.start.fill_(self.qmin * self.delta)
        self.lengths.fill_(self.delta)
        paper = self.init == "paper"
        scale = x.new_tensor(self.delta).float() if paper else mse_scale(x, self.qmin, self.qmax)
        self.input_scale.copy_(self.delta / scale)
        self.output_scale.copy_(scale / self.delta)
        self.calibrated.fill_(True)

    def grid(self, g: float = 1.0) -> tuple[Tensor, Tensor]:
        """Borders b_0..b_m in the units of x, [m + 1], and the output step Delta * beta2, []."""
        start, a, beta1, beta2 = (
            scale_grad(p, g)
            for p in (self.start, self.lengths, self.input_scale, self.output_scale)
        )
        ends = start + _at_least(a, MIN_SEGMENT).cumsum(0)
        borders = torch.cat([start.view(1), ends]) / _at_least(beta1, MIN_SCALE)
        return borders, self.delta * _at_least(beta2, MIN_SCALE)

    def forward(self, x: Tensor) -> Tensor:
        g = 1.0
        if self.count is not None:
            g = grad_scale(x, 1, self.segments, self.count, self.samples_axis)
        borders, step = self.grid(g)
        return gste(x, borders, step, self.qmin)

    def codes(self, x: Tensor) -> Tensor:
        rows = as_rows(x.float(), 1)
        return from_rows(torch.bucketize(rows, self.thresholds(), out_int32=True), x) + self.qmin

    def decode(self, codes: Tensor, context: Tensor | None = None) -> Tensor:
        return codes * self.grid()[1].detach()

    def levels(self) -> Tensor:
        step = self.grid()[1].detach()
        return (torch.arange(self.qmin, self.qmax + 1, device=step.device) * step).view(1, -1)

    def thresholds(self) -> Tensor:
        return midpoints(self.grid()[0].detach())

    def health(self) -> dict[str, Tensor]:
        scales = torch.stack([self.input_scale.detach(), self.output_scale.detach()])
        return {
            "clamped_segments": (self.lengths.detach() <= MIN_SEGMENT).sum(),
            "clamped_steps": (scales <= MIN_SCALE).sum(),
        }


class N2UQWeight(Quantizer):
    """N2UQ weights: 2^b uniform levels without zero, scaled by mean|w| per output channel.

    The scale is computed from the weight at each forward and kept, for `levels` and `decode`.

    Args:
        gradient: `identity`, or `released` (divided by the scale, departure 5).
    """

    scale: Tensor

    def __init__(
        self,
        bits: int,
        *,
        signed: bool = True,
        shape: Sequence[int] = (),
        gradient: Literal["identity", "released"] = "identity",
    ) -> None:
        super().__init__(bits, signed=signed, shape=shape)
        self.gradient = gradient
        self.register_buffer("scale", torch.ones(shape[0], *[1] * (len(shape) - 1)))

    def calibrate(self, x: Tensor) -> None:
        """Take the scale of the weights [C_out, ...]."""
        self.scale.copy_(self.context(x))
        self.calibrated.fill_(True)

    def context(self, x: Tensor) -> Tensor:
        """scale = mean|w| * (2^b - 1) / 2^(b-1), [C_out, 1, ...]."""
        dims = list(range(1, x.dim()))
        gamma = (2**self.bits - 1) / 2 ** (self.bits - 1)
        return (gamma * x.detach().float().abs().mean(dims, keepdim=True)).clamp_min(MIN_SCALE)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.context(x)
        self.scale.copy_(scale)
        x_hat = self.decode(self._codes(x, scale), scale).to(x.dtype)
        through = x / scale.to(x.dtype) if self.gradient == "released" else x
        return x_hat + (through - through.detach())

    def codes(self, x: Tensor) -> Tensor:
        return self._codes(x, self.context(x))

    def _codes(self, x: Tensor, scale: Tensor) -> Tensor:
        v = (x.detach().float() / scale).clamp(-1, 1)
        return ((v + 1) * ((2**self.bits - 1) / 2)).round().to(torch.int32) + self.qmin

    def decode(self, codes: Tensor, context: Tensor | None = None) -> Tensor:
        # With k = code - qmin: scale * (2 k / (2^b - 1) - 1) = (code + 1/2) * 2 scale / (2^b - 1).
        scale = self.scale if context is None else context
        return (codes + 0.5) * (scale * (2 / (2**self.bits - 1)))

    def levels(self) -> Tensor:
        codes = torch.arange(self.qmin, self.qmax + 1, device=self.scale.device)
        return self.decode(codes, self.scale.reshape(-1, 1))  # [C_out, L]

    def thresholds(self) -> Tensor:
        return midpoints(self.levels()[0])

    def extra_bytes(self) -> int:
        return 4 * self.scale.numel()
