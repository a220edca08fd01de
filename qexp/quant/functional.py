"""The verbs of quantization, as pure functions of tensors.

Uniform grid:         x_int = clip(round(x / scale), qmin, qmax),   x_hat = x_int * scale
Straight-through:     d round(v)/dv := 1, so the gradient passes where x is not clipped.
Learned step (LSQ):   dx_hat/dscale = x_int - [not clipped] * x / scale   (Esser et al. 2020, eq. 3)
Arbitrary grid:       `midpoints` of sorted levels are its borders (search: cells.py, project.py).

Layout of a fused call. Every quantizer here shares one scale per *row*: one row for the whole
tensor, one per output channel of a weight [C_out, ...], or one per sample of an activation
[N, ...]. `as_rows` views the tensor as [rows, elements] in its own memory order (contiguous or
channels_last), so an elementwise kernel sees two dimensions whatever the layer is, and
`torch.compile` builds it once for all layers. When the whole network is compiled the kernels keep
the tensor's own shape instead (`operands`): the compiler chooses each layer's memory order after
it has traced the views, and a view in the other order would turn every read into a gather.

Memory. The fused functions save `x` and the scale, nothing else, and recompute the codes in
backward: `x` is what the preceding ReLU already saved, so a quantized layer keeps one tensor
(its own output, which the convolution saves) more than a float one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor

# The smallest step: the float32 machine epsilon. Below it x / scale overflows for ordinary x.
MIN_SCALE = 1.1920929e-07

# ---------------------------------------------------------------------------------------------
# Compiled elementwise kernels

_compiled = False

# Elements below which a kernel runs eagerly even so: calling a compiled function costs more than
# fusing saves. Most weights of small networks are below.
SMALL = 1 << 14

# Variants of one function that may be compiled, where dynamo's own limit is 8: of a kernel, one for
# each dtype, one row or many, with autocast and without; of a bench's forward, one a network.
VARIANTS = 64


def compile_kernels(enabled: bool) -> None:
    """Run every `@kernel` function through `torch.compile` (True) or eagerly (False)."""
    global _compiled
    _compiled = enabled


@cache
def vector_width() -> dict[str, Any]:
    """Options for the compiler: as many bits a CPU vector as it would choose, but by number.

    Torch finds a graph that it compiled before on the disk, made perhaps on another processor or
    under ATEN_CPU_CAPABILITY, and its search key has the options, not the processor. Loops over 8
    numbers, compiled again for vectors of 16, write behind the ends of their tensors.
    """
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    return {"cpp.simdlen": pick_vec_isa().bit_width()}


def kernels_compiled() -> bool:
    """Whether `@kernel` functions run compiled."""
    return _compiled


def kernel(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Mark an elementwise function of [rows, elements] tensors that is worth fusing.

    Its first argument is the large tensor. Inside a whole-model `torch.compile` the plain
    function is traced, so nothing nests.
    """
    compiled: Callable[..., Any] | None = None

    @wraps(fn)
    def run(*args: Any) -> Any:
        nonlocal compiled
        if not _compiled or torch.compiler.is_compiling() or args[0].numel() < SMALL:
            return fn(*args)
        if compiled is None:
            compiled = torch.compile(fn, dynamic=True, fullgraph=True, options=vector_width())
        if torch._dynamo.config.recompile_limit < VARIANTS:
            # Asked each time: a GPU's backward runs in a thread with settings of its own.
            torch._dynamo.config.recompile_limit = VARIANTS
        # A kernel sees values, not the graph: dynamo would look for the .grad of a view's base.
        return compiled(*(a.detach() if isinstance(a, Tensor) else a for a in args))

    return run


# ---------------------------------------------------------------------------------------------
# Ranges, straight-through, layout


def integer_range(bits: int, signed: bool) -> tuple[int, int]:
    """`(qmin, qmax)`: [-2^(b-1), 2^(b-1)-1] if signed, else [0, 2^b-1]."""
    if signed:
        return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    return 0, 2**bits - 1


def round_ste(x: Tensor) -> Tensor:
    """Round half to even; the gradient is the identity (straight-through)."""
    return x + (x.round() - x).detach()


class _ScaleGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, g: float) -> Tensor:
        ctx.g = g
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.g, None  # g is a constant


def scale_grad(x: Tensor, g: float) -> Tensor:
    """`x` forward, `g * dL/dx` backward."""
    return _ScaleGrad.apply(x, g)  # type: ignore[return-value]


def is_channels_last(x: Tensor) -> bool:
    return (
        x.dim() == 4
        and not x.is_contiguous()
        and x.is_contiguous(memory_format=torch.channels_last)
    )


def as_rows(x: Tensor, rows: int) -> Tensor:
    """View `x` [N, ...] as [rows, elements] in memory order; `rows` is 1 or N."""
    if is_channels_last(x):
        x = x.permute(0, 2, 3, 1)  # [N, C, H, W] -> [N, H, W, C], contiguous
    return x.reshape(rows, x.numel() // max(rows, 1))  # -1 would be ambiguous with no rows


def from_rows(y: Tensor, like: Tensor) -> Tensor:
    """Undo `as_rows`: [rows, elements] -> the shape and memory format of `like`."""
    if y.shape == like.shape:
        return y
    if is_channels_last(like):
        n, c, h, w = like.shape
        return y.reshape(n, h, w, c).permute(0, 3, 1, 2)
    return y.reshape(like.shape)


def operands(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """`x` and its `scale` as a kernel takes them; `from_rows` undoes it.

    Shape: x [N, ...], scale [] or [N, 1, ...] -> [rows, elements] and [rows, 1]; while a whole
    network is compiled, x as it is and scale with as many dimensions (module docstring).
    """
    if torch.compiler.is_compiling():
        return x, scale.reshape(-1, *[1] * (x.dim() - 1))
    rows = scale.numel()
    return as_rows(x, rows), scale.reshape(rows, 1)


def in_order_of(grad: Tensor, x: Tensor) -> Tensor:
    """`grad` in the order in which `as_rows` takes `x`: a gradient may arrive in another one."""
    if torch.compiler.is_compiling() or grad.stride() == x.stride():
        return grad  # the compiler sees to it
    if is_channels_last(x):
        return grad.contiguous(memory_format=torch.channels_last)
    return grad.contiguous()  # also where x is a part of a channels-last tensor: as_rows copies it


def sum_to(t: Tensor, scale: Tensor) -> Tensor:
    """Sum `t` over the axes that `scale` broadcasts along. Shape: operands; result as scale."""
    axes = [i for i, size in enumerate(scale.shape) if size == 1]
    return t.sum(axes, keepdim=True)


# ---------------------------------------------------------------------------------------------
# Uniform grids


def quantize(x: Tensor, scale: Tensor, qmin: int, qmax: int) -> Tensor:
    """Codes `clip(round(x / scale), qmin, qmax)` as int32.

    Shape: x [N, ...]; scale [] or broadcastable to x; codes as x. Computed in float32.
    """
    return (x.float() / scale).round_().clamp_(qmin, qmax).to(torch.int32)


def dequantize(codes: Tensor, scale: Tensor) -> Tensor:
    """`codes * scale` in the dtype of `scale`."""
    return codes.to(scale.dtype) * scale


@kernel
def _uniform_forward(x: Tensor, scale: Tensor, qmin: int, qmax: int) -> Tensor:
    # x [R, M], scale [R, 1] float32 (see `operands`)
    x_int = (x.float() / scale).round_().clamp_(qmin, qmax)
    return x_int.mul_(scale).to(x.dtype)


@kernel
def _uniform_backward(
    grad: Tensor, x: Tensor, scale: Tensor, qmin: int, qmax: int
) -> tuple[Tensor, Tensor]:
    # grad, x [R, M]; scale [R, 1]
    z = x.float() / scale
    clipped = z.clamp(qmin, qmax)
    inside = clipped == z
    # dL/dx = e * [inside]                                                    [R, M]
    grad_x = torch.where(inside, grad, 0.0)
    # dL/dscale = sum e * (x_int - [inside] * z)                              [R, 1]
    t = clipped.round_().sub_(torch.where(inside, z, 0.0))
    return grad_x, sum_to(t.mul_(grad), scale)


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, qmin: int, qmax: int, g: float) -> Tensor:
        ctx.save_for_backward(x, scale)
        ctx.qmin, ctx.qmax, ctx.g = qmin, qmax, g
        # The guard is straight-through: a step pushed below MIN_SCALE still gets its gradient.
        rows, step = operands(x, scale.clamp_min(MIN_SCALE))
        return from_rows(_uniform_forward(rows, step, qmin, qmax), x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        x, scale = ctx.saved_tensors
        rows, step = operands(x, scale.clamp_min(MIN_SCALE))
        grad, _ = operands(in_order_of(grads[0], x), scale)
        grad_x, grad_scale = _uniform_backward(grad, rows, step, ctx.qmin, ctx.qmax)
        grad_scale = (grad_scale * ctx.g).reshape(scale.shape).to(scale.dtype)
        return from_rows(grad_x, x), grad_scale, None, None, None  # bounds and g are constants


def fake_quantize(
    x: Tensor, scale: Tensor, qmin: int, qmax: int, grad_scale: float = 1.0
) -> Tensor:
    """Quantize and dequantize on a uniform grid, differentiable in `x` and `scale`.

    Shape: x [N, ...]; scale [] (one row), or [N, 1, ...] (one per row of x); result as x.
    `grad_scale` multiplies dL/dscale (LSQ section 2.2). Source: LSQ eq. 1-3, 5.
    """
    return _FakeQuantize.apply(x, scale, qmin, qmax, grad_scale)  # type: ignore[return-value]


# ---------------------------------------------------------------------------------------------
# Arbitrary grids


def midpoints(levels: Tensor) -> Tensor:
    """Decision thresholds of sorted `levels` [..., L]: the L-1 midpoints [..., L-1]."""
    return (levels[..., 1:] + levels[..., :-1]) / 2
