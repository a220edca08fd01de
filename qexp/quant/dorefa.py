"""DoReFa weights and activations, PACT activations.

DoReFa: S. Zhou, Y. Wu, Z. Ni, X. Zhou, H. Wen, Y. Zou. "DoReFa-Net: Training Low Bitwidth
Convolutional Neural Networks with Low Bitwidth Gradients." 2016, arXiv 1606.06160.
PACT: J. Choi, Z. Wang, S. Venkataramani, P. I.-J. Chuang, V. Srinivasan, K. Gopalakrishnan. "PACT:
Parameterized Clipping Activation for Quantized Neural Networks." 2018, arXiv 1805.06085.

The idea of DoReFa: squash the weights by tanh, normalise them to [-1, 1], and spread 2^b uniform
levels over that range; clip activations to [0, 1]. The idea of PACT: learn where to clip.

DoReFa weights, n = 2^b - 1:
    t = tanh(w) / max|tanh(w)|,   w_hat = c * (2 * round((t + 1) / 2 * n) / n - 1)
    dL/dw = dL/dw_hat * c * (1 - tanh(w)^2) / max|tanh(w)|
    c = 1 in the paper. 2^b levels, symmetric, no zero: the grid (code + 1/2) * 2c / n.
DoReFa activations:
    x_hat = clip * round(clamp(x / clip, 0, 1) * n) / n,   clip = 1 in the paper
    dL/dx = e where 0 <= x <= clip, else 0
PACT activations:
    y = clamp(x, 0, alpha),   x_hat = round(y * n / alpha) * alpha / n
    dL/dx     = e where 0 <= x < alpha, else 0
    dL/dalpha = sum e * [x >= alpha]: nothing from inside the range, no gradient scale
    The paper adds an L2 penalty on alpha to the loss, as large as that of the weights (2e-4 on
    CIFAR-10; so in distiller and in KwangHoonAn/PACT): `decay`, of alpha alone, or
    `recipe.quantizer_weight_decay`, of all that quantizers learn. Neither is on by default.
`quantizer=pact` is PACT activations with DoReFa weights, as in the PACT paper.

Initialisation. alpha and clip from the step of least squared error on a batch of training inputs
(`init: mse`); `init: paper` sets alpha = 6 or clip = 1.

Departs from the papers:
 1. `rescale: rms` (default) sets c = rms(w) / rms(levels of w), a constant in backward, so that a
    trained float network's layer keeps its output's size: with c = 1 weights grow to |w| = 1 and
    every layer after it starts from garbage; batch norm hides it in training from scratch only.
    `rescale: max`: c = max|tanh(w)|. `rescale: none`: the paper.
 2. max|tanh(w)| is a constant in backward, as in the common PyTorch code; the released TensorFlow
    code differentiates it (one weight of the layer gets another gradient).
 3. Signed inputs: the clip is [-alpha, alpha], codes in [-qmax, qmax], qmax = 2^(b-1) - 1, and
    dL/dalpha = sum e * ([x >= alpha] - [x <= -alpha]). The papers quantize after ReLU only.
 4. `init: mse`. alpha = 6 fits training from scratch with a penalty that shrinks it; on a trained
    network at 2 bits its step of 2 rounds most inputs to zero.
 5. alpha and clip are kept >= n * 1.2e-7 in the forward; alpha's gradient passes the guard.
 6. No penalty on alpha by default (above). From `mse` it is small beside the clip's own gradient:
    ResNet-20, W2A2, first 30 steps, 2e-4 * alpha is 1.6e-4 to 4.7e-4, the mean of dL/dalpha -0.18
    to 0.003, its deviation 0.06 to 0.3 (by hand, not kept). After ten epochs W2A2 has 86.60 with
    it, 86.21 without (results/cifar10_qat_short, seed 0).
 7. At 1 bit the released DoReFa code has sign(w) * mean|w| with the identity as gradient; here it
    is the formula above.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from qexp.quant.calibrate import mse_scale
from qexp.quant.functional import (
    MIN_SCALE,
    dequantize,
    fake_quantize,
    from_rows,
    in_order_of,
    kernel,
    midpoints,
    operands,
    quantize,
    sum_to,
)
from qexp.quant.quantizer import Quantizer, refuse_one_signed_bit

PACT_ALPHA = 6.0  # MQBench's statement of the paper's initial clip
DOREFA_CLIP = 1.0


class DoReFaWeight(Quantizer):
    """DoReFa weights: tanh, normalised, 2^b uniform levels without zero, per tensor.

    The scale c is computed from the weight at each forward and kept, for `levels` and `decode`.

    Args:
        rescale: what c is: `rms`, `max`, or `none` (paper); see the module docstring.
    """

    scale: Tensor

    def __init__(
        self,
        bits: int,
        *,
        signed: bool = True,
        shape: Sequence[int] = (),
        rescale: Literal["rms", "max", "none"] = "rms",
    ) -> None:
        super().__init__(bits, signed=signed, shape=shape)
        self.rescale = rescale
        self.steps = 2**bits - 1  # n
        self.register_buffer("scale", torch.tensor(1.0))

    def calibrate(self, x: Tensor) -> None:
        """Take the scale of the weights."""
        self.scale.copy_(self.context(x))
        self.calibrated.fill_(True)

    def context(self, x: Tensor) -> Tensor:
        """The scale c, []."""
        w = x.detach().float()
        if self.rescale == "none":
            return torch.ones_like(self.scale)
        if self.rescale == "max":
            return w.tanh().abs().amax().clamp_min(MIN_SCALE)
        unit = (self.codes(x) + 0.5) * (2 / self.steps)  # no zero level: its rms is >= 1/n
        return (w.square().mean() / unit.square().mean()).sqrt().clamp_min(MIN_SCALE)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.context(x)
        self.scale.copy_(scale)
        squashed = x.float().tanh()
        bound = squashed.detach().abs().amax().clamp_min(MIN_SCALE)
        through = squashed * (scale / bound)  # c * t, whose gradient w_hat takes
        x_hat = self.decode(self.codes(x), scale)
        return (x_hat + (through - through.detach())).to(x.dtype)

    def codes(self, x: Tensor) -> Tensor:
        squashed = x.detach().float().tanh()
        t = squashed / squashed.abs().amax().clamp_min(MIN_SCALE)
        return ((t + 1) * (self.steps / 2)).round().to(torch.int32) + self.qmin

    def decode(self, codes: Tensor, context: Tensor | None = None) -> Tensor:
        # With k = code - qmin: c * (2 k / n - 1) = (code + 1/2) * 2 c / n.
        scale = self.scale if context is None else context
        return (codes + 0.5) * (scale * (2 / self.steps))

    def levels(self) -> Tensor:
        codes = torch.arange(self.qmin, self.qmax + 1, device=self.scale.device)
        return self.decode(codes).view(1, -1)

    def thresholds(self) -> Tensor:
        return midpoints(self.levels()[0])

    def extra_bytes(self) -> int:
        return 4


def _clip_range(bits: int, signed: bool, name: str) -> tuple[int, int]:
    """Codes of a clip to [0, alpha], or to [-alpha, alpha] for signed inputs."""
    refuse_one_signed_bit(name, bits, signed)
    if not signed:
        return 0, 2**bits - 1
    return -(2 ** (bits - 1) - 1), 2 ** (bits - 1) - 1


class DoReFaActivation(Quantizer):
    """DoReFa activations: uniform levels on [0, clip], nothing learned.

    Args:
        init: `mse`, or `paper` (clip = 1).
    """

    scale: Tensor  # clip / qmax

    def __init__(
        self,
        bits: int,
        *,
        signed: bool = True,
        shape: Sequence[int] = (),
        init: Literal["mse", "paper"] = "mse",
    ) -> None:
        super().__init__(bits, signed=signed, shape=shape)
        self.qmin, self.qmax = _clip_range(bits, signed, "DoReFa")
        self.init = init
        self.register_buffer("scale", torch.tensor(DOREFA_CLIP / self.qmax))

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        """Set the clip from a batch of inputs [N, ...]."""
        if self.init == "mse":
            self.scale.copy_(mse_scale(x, self.qmin, self.qmax))
        else:
            self.scale.fill_(DOREFA_CLIP / self.qmax)
        self.calibrated.fill_(True)

    def forward(self, x: Tensor) -> Tensor:
        return fake_quantize(x, self.scale, self.qmin, self.qmax)

    def codes(self, x: Tensor) -> Tensor:
        return quantize(x, self.scale, self.qmin, self.qmax)

    def decode(self, codes: Tensor, context: Tensor | None = None) -> Tensor:
        return dequantize(codes, self.scale)

    def levels(self) -> Tensor:
        return (torch.arange(self.qmin, self.qmax + 1, device=self.scale.device) * self.scale)[None]

    def thresholds(self) -> Tensor:
        return midpoints(self.levels()[0])

    def extra_bytes(self) -> int:
        return 4


@kernel
def _pact_forward(x: Tensor, scale: Tensor, qmin: int, qmax: int) -> Tensor:
    # x [1, M], scale [1, 1]
    return ((x.float() / scale).round().clamp(qmin, qmax) * scale).to(x.dtype)


@kernel
def _pact_backward(grad: Tensor, x: Tensor, alpha: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    # grad, x [1, M]; alpha [1, 1]
    z, zero = x.float(), torch.zeros_like(grad)
    low = -alpha if signed else torch.zeros_like(alpha)
    above, below = z >= alpha, (z <= low) if signed else (z < low)
    # dL/dx = e * [inside]                                                    [1, M]
    grad_x = torch.where(above | below, zero, grad)
    # dL/dalpha = sum e * ([x >= alpha] - [x <= -alpha])                      [1, 1]
    pushed = torch.where(above, grad, torch.where(below, -grad, zero) if signed else zero)
    return grad_x, sum_to(pushed.float(), alpha)


def _pact_step(alpha: Tensor, qmax: int) -> Tensor:
    # By a tensor: CUDA takes a number's reciprocal and multiplies, another last bit than the CPU.
    return (alpha / torch.full_like(alpha, qmax)).clamp_min(MIN_SCALE)


class _PACT(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: Tensor, qmin: int, qmax: int) -> Tensor:
        ctx.save_for_backward(x, alpha)
        ctx.signed = qmin < 0
        rows, scale = operands(x, _pact_step(alpha, qmax))
        return from_rows(_pact_forward(rows, scale, qmin, qmax), x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, alpha = ctx.saved_tensors
        rows, clip = operands(x, alpha)
        grad, _ = operands(in_order_of(grads[0], x), alpha)
        grad_x, grad_alpha = _pact_backward(grad, rows, clip, ctx.signed)
        return from_rows(grad_x, x), grad_alpha.view(()), None, None  # the bounds are constants


class PACT(Quantizer):
    """PACT activations: uniform levels on [0, alpha] with a learned clip alpha.

    Args:
        init: `mse`, or `paper` (alpha = 6).
        decay: weight decay of alpha, the gradient of decay / 2 * alpha^2; None: the recipe's.
    """

    def __init__(
        self,
        bits: int,
        *,
        signed: bool = True,
        shape: Sequence[int] = (),
        init: Literal["mse", "paper"] = "mse",
        decay: float | None = None,
    ) -> None:
        super().__init__(bits, signed=signed, shape=shape)
        self.train_with(decay=decay)
        self.qmin, self.qmax = _clip_range(bits, signed, "PACT")
        self.init = init
        self.alpha = nn.Parameter(torch.tensor(PACT_ALPHA))

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        """Set the clip from a batch of inputs [N, ...]."""
        if self.init == "mse":
            self.alpha.copy_(mse_scale(x, self.qmin, self.qmax) * self.qmax)
        else:
            self.alpha.fill_(PACT_ALPHA)
        self.calibrated.fill_(True)

    def step(self) -> Tensor:
        """The step of the clip's levels, []."""
        return _pact_step(self.alpha.detach(), self.qmax)

    def forward(self, x: Tensor) -> Tensor:
        return _PACT.apply(x, self.alpha, self.qmin, self.qmax)  # type: ignore[return-value]

    def codes(self, x: Tensor) -> Tensor:
        return quantize(x, self.step(), self.qmin, self.qmax)

    def decode(self, codes: Tensor, context: Tensor | None = None) -> Tensor:
        return dequantize(codes, self.step())

    def levels(self) -> Tensor:
        return (torch.arange(self.qmin, self.qmax + 1, device=self.alpha.device) * self.step())[
            None
        ]

    def thresholds(self) -> Tensor:
        return midpoints(self.levels()[0])

    def health(self) -> dict[str, Tensor]:
        return {"clamped_steps": (self.alpha.detach() <= MIN_SCALE * self.qmax).sum()}
