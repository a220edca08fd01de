"""Random replacement of quantized values by float ones while a network is reconstructed.

QDrop (X. Wei et al., ICLR 2022, arXiv 2203.05740): each element of a quantized activation is its
float value with probability `drop`, so that the learned weight rounding fits a flat neighbourhood
of the quantized activations instead of one point. At test time every element is quantized.

The gradient follows the choice: to the quantizer where its value was used, else straight to x. The
mask is a byte an element, compared with drop * 256: drop has a resolution of 1/256.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qexp.quant.functional import kernel


def random_bytes(like: Tensor, generator: torch.Generator) -> Tensor:
    """Uniform bytes of the shape of `like` [...], 8 for one draw of the generator."""
    n = like.numel()
    words = torch.empty(-(-n // 8), dtype=torch.int64, device=like.device)
    words.random_(-(2**63), None, generator=generator)
    return words.view(torch.uint8)[:n].view(like.shape)


# Bytes are compared as floats, and choices made by arithmetic with 0 and 1 (exact here): masks of
# another width than the values, and `where`, keep the loop from being vectorised: 30 times
# slower (by hand, not kept).


@kernel
def mix_forward(x: Tensor, x_hat: Tensor, dice: Tensor, last: int) -> Tensor:
    """x where a byte of `dice` is at most `last`, else x_hat. Shape: all alike."""
    return torch.lerp(x_hat, x, (dice.float() <= last).to(x.dtype))


@kernel
def mix_backward(grad: Tensor, dice: Tensor, last: int) -> tuple[Tensor, Tensor]:
    """The gradients of x and of x_hat in `mix_forward`. Shape: all alike."""
    to_x = grad * (dice.float() <= last).to(grad.dtype)
    return to_x, grad - to_x


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, x_hat: Tensor, dice: Tensor, last: int) -> Tensor:
        ctx.save_for_backward(dice)
        ctx.last = last
        return mix_forward(x, x_hat, dice, last)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, grad_x_hat = mix_backward(grads[0], ctx.saved_tensors[0], ctx.last)
        return grad_x, grad_x_hat, None, None  # the dice are constants


def last_byte(probability: float) -> int:
    """The largest byte that picks the float value; -1: none does."""
    return round(probability * 256) - 1


class Drop(NamedTuple):
    """How a quantizer drops that does it by itself.

    Attributes:
        probability: that an element stays in float.
        generator: of the dice.
    """

    probability: float
    generator: torch.Generator


def mix(x: Tensor, x_hat: Tensor, probability: float, generator: torch.Generator) -> Tensor:
    """Each element from `x` with `probability`, else from `x_hat`. Shape: all alike."""
    last = last_byte(probability)
    if last < 0:
        return x_hat
    return _Mix.apply(x, x_hat, random_bytes(x, generator), last)  # type: ignore[return-value]


@contextmanager
def dropping(
    quantizers: Iterable[nn.Module], probability: float, generator: torch.Generator
) -> Iterator[None]:
    """Inside, every quantizer returns its float input with `probability`, element by element.

    A quantizer with an attribute `drop` is told and does it in its own kernel.
    """

    def hook(module: nn.Module, inputs: tuple[Tensor, ...], x_hat: Tensor) -> Tensor:
        return mix(inputs[0], x_hat, probability, generator)

    dropped = list(quantizers) if probability > 0 else []
    own = [q for q in dropped if hasattr(q, "drop")]
    handles = [q.register_forward_hook(hook) for q in dropped if not hasattr(q, "drop")]
    try:
        for q in own:
            q.drop = Drop(probability, generator)  # type: ignore[assignment]
        yield
    finally:
        for q in own:
            q.drop = None  # type: ignore[assignment]
        for handle in handles:
            handle.remove()
