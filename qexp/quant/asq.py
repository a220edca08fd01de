"""Adaptive step size activations.

ASQ: W. Zhou, Z. Yu, X. Liu, J. Yang, R. Xiao, T. Wang, C. Tang, J. Lv. "Precision Neural Network
Quantization via Learnable Adaptive Modules." arXiv 2504.17263, and the authors' released code.

The idea: the range of a layer's input differs from image to image, so its step should too. A small
network, the adapter, looks at the channel means of each sample and returns one factor for it, which
multiplies LSQ's learned step.

Forward.  Sample n is row n of x [N, ...]: an image (a window where a network moves those into N).
    beta_n = factor(x_n),   s_n = scale * beta_n,   z = x_n / s_n
    x_int  = clip(round(z), qmin, qmax),   x_hat = x_int * s_n

Adapter (`factor: relu`, as released).  Means over space (tokens, windows) in float32, [N, C], then
    Linear(C, C // reduction), ReLU, Linear(., 1), ReLU   where C >= 2 * reduction (the inner ReLU
                                                          leaky by `leak`, 0 as released),
    Linear(C, 1), ReLU                                    below that,
    and beta_n >= 1e-8. The last weight starts from N(0, 0.01^2), its bias where beta = 1.
    Others replace the last ReLU: `softplus`, which has no zero, and `exp` (exp(clip(., -1, 1))),
    which has none either but no gradient beyond the clip: it can stop there (`constant_factors`);
    `statistics`, no adapter: mean|x_n| over its running mean; `frozen`: beta = 1, which is LSQ.

Gradients, e = dL/dx_hat, t = x_int - z inside [qmin, qmax], qmin below, qmax above.
    G_n        = sum over sample n of e * t
    dL/dscale  = g * sum_n G_n * beta_n,      g = 1 / sqrt(N * qmax)
    dL/dbeta_n = G_n * scale                  (no g, unless `scale_factor_grad`)
    dL/dx      = e * [inside] + the adapter's path through the means
    `dequantize: plain` is x_hat = x_int * scale, a reading that one review prints and that the
    released code contradicts: dL/dscale = g * sum e * t,  dL/dbeta_n = -sum e * [inside] * z *
    scale / beta_n,  dL/dx = e * [inside] / beta_n + the adapter's path. An ablation.

Initialisation.  scale = 2 * mean|x| / sqrt(qmax) on training images (LSQ), taken at beta = 1; the
config starts from the least squared error instead (`init: mse`), as that of LSQ does (lsq.py).

Two deaths of an adapter, both counted by `health` over the last training batch. Where the last
ReLU gives 0, beta_n = 1e-8, the sample saturates and the adapter gets no gradient from it
(`dead_samples`; `dead_layers` where all are). Where no hidden unit is above 0, beta_n is the last
bias, the same for every sample: all but that bias get no gradient, and ASQ is LSQ with a factor
(`constant_factors`). The second one happens: of the ten-epoch runs of results/cifar10_qat_short,
that at W4A4 (from the third epoch on) and one of three at W3A3 end so in layer1.0.conv1, four
hidden units. With `leak: 0.01`, a hundredth of what is below 0 passes, which cannot die: 0.27 less
at W4A4, 0.26 more at W3A3, that seed.

What the adapter buys (results/cifar10_qat_short: CIFAR-10, ten epochs, three seeds) over LSQ, with
POST weights: +0.48 (deviation 0.60) at W2A2, +0.04 (0.09) at W3A3, which three seeds do not tell
from nothing. One seed at W2A2: 0.34 above LSQ's step under POST weights, 0.33 below under LSQ's;
after three epochs (cifar10_qat_rungs, cifar10_qat_brief) 1.41 above and 0.88 below.

Departs from the paper and code:
 1. N counts the features of one sample (`count: sample`), as our LSQ; the code's N counts the batch
    too (`count: tensor`).
 2. scale * beta is kept >= 1.2e-7 in the forward; gradients pass that guard. The code clamps
    |scale| alone, so that a step below zero comes back as large as it was (here it stays at the
    guard until its gradient lifts it), and calibrates on one batch of the validation split.
 3. The code starts the adapters of Linear layers from the framework's default; here beta = 1.
 4. `statistics` is ours: a control without learned parameters, constant in backward.
 5. The code's weight decay, 1e-4, acts on step and adapter as on the weights, and so on the bias
    that holds beta at 1: `recipe.quantizer_weight_decay`, 0 by default.
Unknown: the paper's first and last layers (the code keeps them in float) and its result tables.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qexp.quant.calibrate import mse_scale
from qexp.quant.functional import (
    MIN_SCALE,
    dequantize,
    fake_quantize,
    is_channels_last,
    quantize,
    scale_grad,
)
from qexp.quant.lsq import Count, grad_scale, lsq_scale
from qexp.quant.quantizer import Quantizer, refuse_one_signed_bit

MIN_FACTOR = 1e-8  # the released clamp: a dead sample's factor
MOMENTUM = 0.1  # of the running mean|x| of `factor: statistics`, as batch norm's

Factor = Literal["relu", "softplus", "exp", "statistics", "frozen"]

# The last bias that makes the factor 1 when the rest of the adapter gives 0.
_UNIT_BIAS = {"relu": 1.0, "softplus": math.log(math.e - 1), "exp": 0.0}


def _adapter(channels: int, reduction: int, bias: float, leak: float) -> nn.Sequential:
    """[N, C] -> [N, 1] before the last nonlinearity; starts at `bias`."""
    if channels >= 2 * reduction:
        hidden = channels // reduction
        last = nn.Linear(hidden, 1)
        inner = nn.LeakyReLU(leak) if leak else nn.ReLU()
        net = nn.Sequential(nn.Linear(channels, hidden), inner, last)
    else:
        last = nn.Linear(channels, 1)
        net = nn.Sequential(last)
    nn.init.normal_(last.weight, std=0.01)
    nn.init.constant_(last.bias, bias)
    return net


def _at_least_float32(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


class _ChannelMeans(torch.autograd.Function):
    """Mean over `dims` in float32 (float64 of float64).

    Its gradient goes back as a view, but in bfloat16 and channels_last, where the sum with a view
    that repeats 16 channels is not vectorised: 2.6 ms of a core for [128, 16, 32, 32], 0.5 with a
    tensor, 6 % of ResNet-20's step with `compile=kernels` (by hand, not kept).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, dims: list[int]) -> Tensor:
        mean = x.mean(dim=dims, dtype=_at_least_float32(x))
        ctx.shape, ctx.dims, ctx.dtype = x.shape, dims, x.dtype
        ctx.full = x.element_size() == 2 and is_channels_last(x)
        ctx.count = x.numel() // max(mean.numel(), 1)
        return mean

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad = (grads[0] / ctx.count).to(ctx.dtype)  # dL/dx = dL/dmean / count, broadcast
        for d in ctx.dims:
            grad = grad.unsqueeze(d)
        grad = grad.expand(ctx.shape)
        if ctx.full:
            grad = grad.contiguous(memory_format=torch.channels_last)
        return grad, None  # dims are constants


class ASQ(Quantizer):
    """Uniform activation quantizer whose learned step is scaled per sample.

    Args:
        factor: where a sample's factor comes from (module docstring).
        reduction: the adapter's hidden width is channels // reduction.
        leak: slope of its hidden units below 0, in [0, 1).
        count: what N of the gradient scale counts, `sample` or `tensor` (with the batch).
        scale_factor_grad: multiply dL/dbeta by g as well.
        dequantize: `scaled` (x_int * scale * beta) or `plain` (x_int * scale).
        init: `lsq` (released) or `mse`, for the step.
    """

    carried = ("adapter", "mean_abs")  # of the input; a new width's step is taken behind them

    dead_samples: Tensor
    dead_layer: Tensor
    constant_factor: Tensor
    mean_abs: Tensor

    def __init__(
        self,
        bits: int,
        *,
        signed: bool = True,
        shape: Sequence[int] = (),
        factor: Factor = "relu",
        reduction: int = 4,
        leak: float = 0.0,
        count: Count = "sample",
        scale_factor_grad: bool = False,
        dequantize: Literal["scaled", "plain"] = "scaled",
        init: Literal["lsq", "mse"] = "lsq",
    ) -> None:
        super().__init__(bits, signed=signed, shape=shape)
        known = (*_UNIT_BIAS, "statistics", "frozen")
        if factor not in known:
            raise ValueError(f"factor must be one of {', '.join(known)}, got {factor!r}")
        if dequantize not in ("scaled", "plain"):
            raise ValueError(f"dequantize must be scaled or plain, got {dequantize!r}")
        if not 0 <= leak < 1:
            raise ValueError(f"leak must be in [0, 1), got {leak!r}")
        if reduction < 1:
            raise ValueError(f"reduction must be at least 1, got {reduction!r}")
        refuse_one_signed_bit("ASQ", bits, signed)
        if not shape:
            raise ValueError("ASQ needs the shape [C, kh, kw] or [C] of the layer's input")
        self.factor: Factor = factor
        self.leak, self.reduction = leak, reduction
        self.count: Count = count
        self.scale_factor_grad = scale_factor_grad
        self.dequantize, self.init = dequantize, init
        self.by_sample = factor != "frozen"
        self.replays = factor != "statistics"  # whose running mean moves in each forward
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.adapter = (
            _adapter(shape[0], reduction, _UNIT_BIAS[factor], leak)
            if factor in _UNIT_BIAS
            else None
        )
        self.register_buffer("dead_samples", torch.tensor(0))  # of the last training batch
        self.register_buffer("dead_layer", torch.tensor(False))
        # Not in checkpoints: every training batch sets it, and those of old have none.
        self.register_buffer("constant_factor", torch.tensor(False), persistent=False)
        self.register_buffer("mean_abs", torch.tensor(1.0))  # running mean|x| (`statistics`)

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        """Set the step, and the running mean|x|, from a batch of inputs [N, ...].

        At the start as if beta were 1, as the released code; behind an adapter that has been
        trained at other bits, from x / beta of the samples whose factor is alive.
        """
        if self.continues and self.by_sample:
            beta = self.factors(x)
            alive = (beta > MIN_FACTOR).flatten()
            x = (x.float() / beta)[alive] if alive.any() else x
        if self.init == "mse":
            self.scale.copy_(mse_scale(x, self.qmin, self.qmax))
        else:
            self.scale.copy_(lsq_scale(x, self.qmax, per_row=False))
        self.mean_abs.copy_(x.detach().float().abs().mean().clamp_min(MIN_SCALE))
        self.calibrated.fill_(True)

    def _means(self, x: Tensor) -> Tensor:
        """What the adapter sees: [N, C, H, W] or [N, ..., C] -> [N, C] float32 (float64)."""
        if len(self.shape) > 1:
            return _ChannelMeans.apply(x, [2, 3])  # type: ignore[return-value]
        if x.dim() == 2:
            return x.to(_at_least_float32(x))
        return _ChannelMeans.apply(x, list(range(1, x.dim() - 1)))  # type: ignore[return-value]

    def _learned_factor(self, x: Tensor) -> Tensor:
        assert self.adapter is not None
        with torch.autocast(x.device.type, enabled=False):  # the adapter stays float32
            y = self.adapter(self._means(x))[:, 0]  # [N]
        if self.factor == "relu":
            return F.relu(y)
        return F.softplus(y) if self.factor == "softplus" else y.clamp(-1, 1).exp()

    def factors(self, x: Tensor) -> Tensor:
        """beta [N, 1, ...] float32 for x [N, ...]; [1, 1, ...] when frozen."""
        if self.factor == "frozen":
            return torch.ones([1] * x.dim(), device=x.device)
        if self.factor == "statistics":
            means = x.detach().abs().flatten(1).mean(1, dtype=_at_least_float32(x))
            beta = means / self.mean_abs
        else:
            beta = self._learned_factor(x)
        return beta.clamp_min(MIN_FACTOR).view(-1, *[1] * (x.dim() - 1))

    @torch.no_grad()
    def _record(self, x: Tensor, beta: Tensor) -> None:
        """Counts for `health` and the running mean|x|, from a training batch."""
        dead = beta <= MIN_FACTOR
        self.dead_samples.copy_(dead.sum())
        self.dead_layer.copy_(dead.all())
        if self.adapter is not None and len(beta) > 1:
            self.constant_factor.copy_((beta == beta[:1]).all() & ~dead.all())
        if self.factor == "statistics":
            mean = (beta.mean() * self.mean_abs).clamp_min(MIN_SCALE)  # mean|x| of the batch
            self.mean_abs.lerp_(mean, MOMENTUM)

    def forward(self, x: Tensor) -> Tensor:
        beta = self.factors(x)
        if self.training and len(x):
            self._record(x, beta)
        g = grad_scale(x, 1, self.qmax, self.count)
        if self.scale_factor_grad:
            beta = scale_grad(beta, g)
        scale = scale_grad(self.scale, g)
        if self.dequantize == "plain":
            shrunk = x.to(_at_least_float32(x)) / beta
            return fake_quantize(shrunk, scale, self.qmin, self.qmax).to(x.dtype)
        return fake_quantize(x, scale * beta, self.qmin, self.qmax)  # s_n = scale * beta_n

    def codes(self, x: Tensor) -> Tensor:
        beta = self.factors(x)
        if self.dequantize == "plain":
            return quantize(x.float() / beta, self.scale.clamp_min(MIN_SCALE), self.qmin, self.qmax)
        return quantize(x, (self.scale * beta).clamp_min(MIN_SCALE), self.qmin, self.qmax)

    def context(self, x: Tensor) -> Tensor:
        """The factor of each sample, [N, 1, ...]."""
        return self.factors(x)

    def decode(self, codes: Tensor, context: Tensor | None = None) -> Tensor:
        """Shape: codes [N, ...]; context the factors that `context(x)` gave, [N, 1, ...]."""
        scale = self.scale
        if context is not None and self.dequantize == "scaled":
            scale = scale * context
        return dequantize(codes, scale.clamp_min(MIN_SCALE))

    def levels(self) -> Tensor:
        """The grid of a sample whose factor is 1, [1, L]."""
        grid = torch.arange(self.qmin, self.qmax + 1, device=self.scale.device)
        return (grid * self.scale.detach().clamp_min(MIN_SCALE)).view(1, -1)

    def thresholds(self) -> Tensor:
        levels = self.levels()[0]
        return (levels[1:] + levels[:-1]) / 2

    def extra_bytes(self) -> int:
        return super().extra_bytes() + (4 if self.factor == "statistics" else 0)  # mean_abs

    @property
    def kind(self) -> str:
        # What the adapter and the step mean depends on these, their shapes do not.
        factor = "" if self.factor == "relu" else f" factor={self.factor}"
        return super().kind + factor + ("" if self.dequantize == "scaled" else " dequantize=plain")

    def health(self) -> dict[str, Tensor]:
        return {
            "clamped_steps": (self.scale.detach() <= MIN_SCALE).sum(),
            "dead_samples": self.dead_samples,
            "dead_layers": self.dead_layer.long(),
            "constant_factors": self.constant_factor.long(),
        }
