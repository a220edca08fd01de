"""Inputs as integers: what an activation quantizer decides, before anything multiplies it.

    x_hat = step * x_int + offset,   x_int an integer with the zero point taken off

step is [] or one for each sample, [N, 1, ...] (ASQ); offset is LSQ+'s. x_int is a float32 tensor
of integers, decided by the arithmetic of the quantizer's own forward, so that ties fall alike.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qexp.errors import ConfigError
from qexp.quant.additive import APoTActivation
from qexp.quant.aquant import AQuant
from qexp.quant.asq import ASQ
from qexp.quant.dorefa import PACT, DoReFaActivation
from qexp.quant.functional import MIN_SCALE
from qexp.quant.lsq import LSQ, LSQPlus
from qexp.quant.n2uq import N2UQ
from qexp.quant.nearest import Nearest
from qexp.quant.quantizer import Quantizer

LARGEST = (1 << 16) - 1  # x_int of APoT's inputs


class Integers(NamedTuple):
    """An input as `step * x_int + offset`. Shape: x_int as the input; step [] or [N, 1, ...]."""

    x_int: Tensor
    step: Tensor
    offset: Tensor | None = None


def integers(quantizer: Quantizer, x: Tensor) -> Integers:
    """The integers of a layer's input, or of its im2col columns (AQuant rows)."""
    return SOURCES[type(quantizer)](quantizer, x)


def span(quantizer: Quantizer) -> tuple[int, int]:
    """Smallest and largest x_int there can be."""
    if isinstance(quantizer, APoTActivation):
        levels = quantizer.whole()
        return int(levels[0]), int(levels[-1])
    zero = int(getattr(quantizer, "zero", torch.tensor(0)))
    return quantizer.qmin - zero, quantizer.qmax - zero


def step_of(q: Any) -> Tensor:
    """The step of an input, [] (of a sample whose factor is 1)."""
    if isinstance(q, N2UQ):
        return q.grid()[1]
    if isinstance(q, APoTActivation):  # 1 is the largest level
        return q.scale.clamp_min(MIN_SCALE) / q.whole()[-1]
    if isinstance(q, PACT):
        return q.step()
    return q.scale.clamp_min(MIN_SCALE)


def check_known(quantizer: Quantizer, name: str) -> None:
    """Raise a ConfigError unless the layer's input has an integer form here."""
    if type(quantizer) not in SOURCES:
        raise ConfigError(
            f"engine: layer '{name}' has inputs of {type(quantizer).__name__}, which only "
            "engine=float runs."
        )
    if isinstance(quantizer, APoTActivation) and quantizer.whole()[-1] > LARGEST:
        raise ConfigError(
            f"engine: layer '{name}' has {quantizer.bits}-bit inputs on powers of two, integers of "
            "more than 16 bits, which only engine=float runs."
        )


def _rounded(q: Quantizer, x: Tensor, step: Tensor) -> Tensor:
    return (x.float() / step).round_().clamp_(q.qmin, q.qmax)  # half to even


def _uniform(q: Any, x: Tensor) -> Integers:
    step = step_of(q)
    return Integers(_rounded(q, x, step), step)


def _lsqplus(q: Any, x: Tensor) -> Integers:
    step = step_of(q)
    return Integers(_rounded(q, x - q.offset, step), step, q.offset)


def _asq(q: Any, x: Tensor) -> Integers:
    beta = q.factors(x)
    if q.dequantize == "plain":
        return _uniform(q, x / beta)
    step = (q.scale * beta).clamp_min(MIN_SCALE)
    return Integers(_rounded(q, x, step), step if step.numel() > 1 else step.reshape(()))


def _nearest(q: Any, x: Tensor) -> Integers:
    step = step_of(q)
    code = (x.float() / step).add_(0.5).floor_().add_(q.zero).clamp_(q.qmin, q.qmax)
    return Integers(code.sub_(q.zero), step)


def _n2uq(q: Any, x: Tensor) -> Integers:
    return Integers(q.codes(x).float(), step_of(q))  # thresholds learned, levels uniform


def _apot(q: Any, x: Tensor) -> Integers:
    return Integers(q.whole()[q.codes(x).long() - q.qmin], step_of(q))


def _aquant(q: Any, x: Tensor) -> Integers:
    # floor(u + 1 - B(u)), the border B where the quantizer keeps it
    return Integers(q.codes(x).float().sub_(q.zero), step_of(q))


SOURCES: dict[type[Quantizer], Callable[[Any, Tensor], Integers]] = {
    LSQ: _uniform,
    LSQPlus: _lsqplus,
    ASQ: _asq,
    DoReFaActivation: _uniform,
    PACT: _uniform,
    Nearest: _nearest,
    N2UQ: _n2uq,
    APoTActivation: _apot,
    AQuant: _aquant,
}
