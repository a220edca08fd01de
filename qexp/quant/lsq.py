"""Learned step size quantization.

LSQ: S. K. Esser, J. L. McKinstry, D. Bablani, R. Appuswamy, D. S. Modha. "Learned Step Size
Quantization." ICLR 2020, arXiv 1902.08153.
LSQ+: Y. Bhalgat, J. Lee, M. Nagel, T. Blankevoort, N. Kwak. "LSQ+: Improving low-bit quantization
through learnable offsets and better initialization." CVPR-W 2020, arXiv 2004.09576.

The idea: the step between two levels is a parameter, trained with the weights, with the gradient
that the rounding's straight-through estimate gives it; a heuristic factor g keeps that gradient in
balance with the weights'.

Forward (eq. 1-2).  z = x / scale,  x_int = clip(round(z), qmin, qmax),  x_hat = x_int * scale.
    Weights and signed inputs: qmin = -2^(b-1), qmax = 2^(b-1)-1. Inputs after ReLU: 0, 2^b-1.

Gradients (eq. 3, 5), e = dL/dx_hat.
    dL/dx     = e        where qmin <= z <= qmax, else 0
    dL/dscale = g * sum e * t,    t = x_int - z inside, qmin below, qmax above
    g = 1 / sqrt(N * qmax)        (section 2.2)
    N: number of weights of the layer, or number of features of the activation. "Features" read as
    *per sample* is `count: sample`, the default for activations; many codes count the batch too
    (`count: tensor`), which makes g smaller by sqrt(batch), the micro-batch of one process: with
    `recipe.accumulate=4` g is twice that of one batch. Per channel, N is the count of one row.

Initialisation.  scale = 2 * mean|x| / sqrt(qmax), from the float weights and from the first batch
    (`init: lsq`); `init: mse` minimises the squared error instead and is what the configs use: at
    2 bits the steps of the paper's rule, which clip 8 % of a ResNet-20's inputs (by hand, not
    kept), do not recover within ten epochs. CIFAR-10, ten epochs, one seed each: W2A2 88.53 with
    mse (bfloat16; results/cifar10_qat_short), 61.60 with lsq (float32; results/cifar10_lsq_init).

LSQ+ adds a learned offset to activations that are not one-sided (Swish):
    x_int = clip(round((x - offset) / scale), qmin, qmax),  x_hat = x_int * scale + offset
    dL/doffset = g * sum e * [clipped];  (scale, offset) start from the MSE over a small batch.
    Codes are unsigned: the offset carries the sign. Weights are symmetric without offset.

Departs from the papers:
 1. scale is kept >= 1.2e-7 in the forward; its gradient passes the guard. The paper has none.
 2. `per_channel: true` (weights) is not in LSQ. It is the control that ASQ's own code uses.
 3. Signed values of 1 bit are refused: Qn = -1 and Qp = 0 leave no positive level.
 4. The configs start from the squared error (above), except for the first and last layer's 8 bits.
    There the error's step is five times smaller than the paper's (by hand), inputs that outgrow
    it are clipped, and a clipped input moves the ceiling qmax * scale by qmax^1.5: at lr 0.05 the
    last layer's input step fell below zero within 30 steps and the network stood at chance for an
    epoch (11.26 on CIFAR-10 at W2A2, against 75.60 after 120 steps from the paper's step; not
    kept).
 5. LSQ+ weights start from the MSE too, instead of max|mean +- 3 std| / 2^(b-1).
 6. The paper's weight decay falls with the bits, 1e-4 at 4 and 8, 0.5e-4 at 3, 0.25e-4 at 2; our
    tables have one for all (`recipe.weight_decay`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from qexp.quant.calibrate import mse_range, mse_scale
from qexp.quant.functional import (
    MIN_SCALE,
    dequantize,
    fake_quantize,
    from_rows,
    in_order_of,
    integer_range,
    kernel,
    operands,
    quantize,
    sum_to,
)
from qexp.quant.quantizer import Quantizer, refuse_one_signed_bit

Count = Literal["tensor", "sample"]


def grad_scale(x: Tensor, rows: int, qmax: int, count: Count, samples_axis: int = 0) -> float:
    """g = 1 / sqrt(N * qmax) (LSQ section 2.2), N = elements a row, or a sample of it."""
    n = features(x, samples_axis) if count == "sample" else x.numel() // rows
    return 1.0 / math.sqrt(max(n, 1) * max(qmax, 1))  # no elements: any g


def features(x: Tensor, samples_axis: int = 0) -> int:
    """Elements of a sample."""
    return math.prod(x.shape[:samples_axis]) * math.prod(x.shape[samples_axis + 1 :])


def lsq_scale(x: Tensor, qmax: int, per_row: bool) -> Tensor:
    """2 * mean|x| / sqrt(qmax) (LSQ section 2.1), [] or [N, 1, ...]."""
    dims = list(range(1, x.dim())) if per_row else list(range(x.dim()))
    mean = x.detach().float().abs().mean(dim=dims, keepdim=per_row)
    return (2 * mean / math.sqrt(max(qmax, 1))).clamp_min(MIN_SCALE)


class LSQ(Quantizer):
    """Uniform quantizer with a learned step, for weights or activations.

    Args:
        per_channel: one step per output channel (weights only).
        count: what N of the gradient scale counts, `tensor` (weights) or `sample` (activations).
        init: `lsq` (paper) or `mse`.
    """

    def __init__(
        self,
        bits: int,
        *,
        signed: bool = True,
        shape: Sequence[int] = (),
        per_channel: bool = False,
        count: Count = "tensor",
        init: Literal["lsq", "mse"] = "lsq",
    ) -> None:
        super().__init__(bits, signed=signed, shape=shape)
        refuse_one_signed_bit("LSQ", bits, signed)
        self.per_channel = per_channel
        self.count: Count = count
        self.init = init
        self.scale = nn.Parameter(
            torch.ones(shape[0], *[1] * (len(shape) - 1)) if per_channel else torch.tensor(1.0)
        )

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        """Set the step from the weights [C_out, ...] or a batch of inputs [N, ...]."""
        if self.init == "mse":
            scale = mse_scale(x, self.qmin, self.qmax, per_row=self.per_channel)
        else:
            scale = lsq_scale(x, self.qmax, self.per_channel)
        self.scale.copy_(scale)
        self.calibrated.fill_(True)

    def forward(self, x: Tensor) -> Tensor:
        g = grad_scale(x, self.scale.numel(), self.qmax, self.count, self.samples_axis)
        return fake_quantize(x, self.scale, self.qmin, self.qmax, g)  # eq. 1-3

    def codes(self, x: Tensor) -> Tensor:
        return quantize(x, self.scale.clamp_min(MIN_SCALE), self.qmin, self.qmax)  # eq. 1

    def decode(self, codes: Tensor, context: Tensor | None = None) -> Tensor:
        return dequantize(codes, self.scale.clamp_min(MIN_SCALE))  # eq. 2

    def levels(self) -> Tensor:
        grid = torch.arange(self.qmin, self.qmax + 1, device=self.scale.device)
        return grid * self.scale.detach().reshape(-1, 1).clamp_min(MIN_SCALE)  # [C_out or 1, L]

    def thresholds(self) -> Tensor:
        levels = self.levels()[0]
        return (levels[1:] + levels[:-1]) / 2

    def health(self) -> dict[str, Tensor]:
        return {"clamped_steps": (self.scale.detach() <= MIN_SCALE).sum()}


@kernel
def _offset_forward(x: Tensor, scale: Tensor, offset: Tensor, qmin: int, qmax: int) -> Tensor:
    # x [R, M]; scale, offset [R, 1] float32 (see `operands`)
    x_int = ((x.float() - offset) / scale).round_().clamp_(qmin, qmax)
    return x_int.mul_(scale).add_(offset).to(x.dtype)


@kernel
def _offset_backward(
    grad: Tensor, x: Tensor, scale: Tensor, offset: Tensor, qmin: int, qmax: int
) -> tuple[Tensor, Tensor, Tensor]:
    # grad, x [R, M]; scale, offset [R, 1]
    z = (x.float() - offset) / scale
    clipped = z.clamp(qmin, qmax)
    inside = clipped == z
    grad_x = torch.where(inside, grad, 0.0)
    t = clipped.round_().sub_(torch.where(inside, z, 0.0))
    # dL/doffset = sum e * [clipped]                                          [R, 1]
    outside = torch.where(inside, 0.0, grad.float())
    return grad_x, sum_to(t.mul_(grad), scale), sum_to(outside, offset)


class _OffsetQuantize(torch.autograd.Function):
    """Saves x itself, which the operation before keeps anyway, and not what is left of it."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, offset: Tensor, qmin: int, qmax: int, g: float
    ) -> Tensor:
        ctx.save_for_backward(x, scale, offset)
        ctx.qmin, ctx.qmax, ctx.g = qmin, qmax, g
        rows, step = operands(x, scale.clamp_min(MIN_SCALE))
        return from_rows(_offset_forward(rows, step, offset.reshape_as(step), qmin, qmax), x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        x, scale, offset = ctx.saved_tensors
        rows, step = operands(x, scale.clamp_min(MIN_SCALE))
        grad, _ = operands(in_order_of(grads[0], x), scale)
        given = (grad, rows, step, offset.reshape_as(step), ctx.qmin, ctx.qmax)
        grad_x, *sums = _offset_backward(*given)
        grad_scale, grad_offset = ((s * ctx.g).reshape(scale.shape).to(scale.dtype) for s in sums)
        return from_rows(grad_x, x), grad_scale, grad_offset, None, None, None


class LSQPlus(Quantizer):
    """LSQ+ activations: learned step and learned offset, unsigned codes.

    Args:
        count: what N of the gradient scale counts (see `LSQ`).
    """

    def __init__(
        self,
        bits: int,
        *,
        signed: bool = True,
        shape: Sequence[int] = (),
        count: Count = "sample",
    ) -> None:
        super().__init__(bits, signed=signed, shape=shape)
        self.qmin, self.qmax = integer_range(bits, signed=False)  # the offset carries the sign
        self.count: Count = count
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.offset = nn.Parameter(torch.tensor(0.0))

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        """Set step and offset to the range [lo, hi] of least squared error."""
        scale, low = mse_range(x, self.qmax, one_sided=not self.signed)
        self.scale.copy_(scale)
        self.offset.copy_(low)
        self.calibrated.fill_(True)

    def forward(self, x: Tensor) -> Tensor:
        g = grad_scale(x, 1, self.qmax, self.count, self.samples_axis)
        given = (self.scale, self.offset, self.qmin, self.qmax, g)
        return _OffsetQuantize.apply(x, *given)  # type: ignore[return-value]

    def codes(self, x: Tensor) -> Tensor:
        shifted = x.float() - self.offset
        return quantize(shifted, self.scale.clamp_min(MIN_SCALE), self.qmin, self.qmax)

    def decode(self, codes: Tensor, context: Tensor | None = None) -> Tensor:
        return dequantize(codes, self.scale.clamp_min(MIN_SCALE)) + self.offset

    def levels(self) -> Tensor:
        grid = torch.arange(self.qmin, self.qmax + 1, device=self.scale.device)
        return (grid * self.scale.detach().clamp_min(MIN_SCALE) + self.offset.detach()).view(1, -1)

    def thresholds(self) -> Tensor:
        levels = self.levels()[0]
        return (levels[1:] + levels[:-1]) / 2

    def health(self) -> dict[str, Tensor]:
        return {"clamped_steps": (self.scale.detach() <= MIN_SCALE).sum()}
