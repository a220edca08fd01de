"""Weights as small integers: w_o = step_o * sum_p factor_p * plane_p, planes of 8 bits.

    affine               one plane of (code - zero), or of 2 code + 1 for grids without zero;
                         two where that needs more than 8 bits
    levels j / n, n<128  one plane (POT, APoT, POST of base 2)
    powers of sqrt 2     two: even and odd powers, which are powers of two, and factors 1, 1/sqrt 2
    any other levels     three digits to the base 256 of level / largest level, in units of
                         1 / (127 * 2^16): each level within 2^-24 of the largest one, which is
                         what float32 would do to a sum of them

The planes' sums of products are exact integers; `factor` and `step` are applied to the sums.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from qexp.errors import ConfigError
from qexp.export.coding import Coding

UNIT = 127 * 2**16  # of the three digits
EXACT = 2.0**-23  # relative: what float32 does to a level
SMALLEST_SHIFT = 2**-6  # a power of two below it would not fit 8 bits beside 1


@dataclass(frozen=True)
class Weight:
    """A layer's weight as the file has it.

    Attributes:
        how: its coding; codes: integers in [qmin, qmax], [C_out, C_in / groups, kh, kw].
        parts: scale, zero, gain, codebook by name, rows first.
    """

    how: Coding
    codes: Tensor
    parts: Mapping[str, Tensor]

    @property
    def index(self) -> Tensor:
        """Codes counted from 0, int64."""
        return self.codes.long() - self.how.qmin

    def step(self) -> Tensor:
        """What multiplies the levels of an output channel, float32 [C_out]."""
        step = self.parts.get("scale", torch.ones(1))
        if "gain" in self.parts:
            step = step * self.parts["gain"]
        return step.expand(self.codes.shape[0])

    def levels(self) -> Tensor:
        """Levels in units of `step`, float32 [1 or C_out, L]: integers if the form is affine."""
        if self.how.form == "codebook":
            return self.parts["codebook"]
        if self.how.form == "table":
            return torch.tensor([self.how.grid])
        codes = torch.arange(self.how.levels)[None] + self.how.qmin
        return codes - self.zero().reshape(-1, 1) + self.how.offset

    def zero(self) -> Tensor:
        """Zero points, int64 [1 or C_out]."""
        return self.parts.get("zero", torch.zeros(1)).long()


@dataclass(frozen=True)
class Planes:
    """See the module docstring. Shape: planes int8 [P, C_out, ...]; step float32 [C_out]."""

    planes: Tensor
    factors: tuple[float, ...]
    step: Tensor


def planes(weight: Weight) -> Planes:
    """The weight as planes of 8-bit integers.

    Raises:
        ConfigError: an affine grid that is off the integers by other than a half.
    """
    step = weight.step()
    if weight.how.form == "affine":
        whole = weight.codes.long() - weight.zero().reshape(-1, *[1] * (weight.codes.dim() - 1))
        if weight.how.offset:
            if weight.how.offset != 0.5:
                raise ConfigError("engine: a grid has an offset other than 1/2.")
            whole, step = 2 * whole + 1, step / 2
        parts = [(digit, 256.0**i) for i, digit in enumerate(_digits(whole))]
        return _stacked(parts, step)
    levels = weight.levels().double()
    top = levels.abs().amax(1, keepdim=True)
    top = torch.where(top > 0, top, 1.0)
    row = weight.index.flatten(1)
    parts = [
        (whole.expand(len(row), -1).gather(1, row).reshape(weight.codes.shape), factor)
        for whole, factor in _as_integers(levels / top)
    ]
    return _stacked(parts, step * top[:, 0].float())


def _stacked(parts: list[tuple[Tensor, float]], step: Tensor) -> Planes:
    stack = torch.stack([whole for whole, _ in parts])
    return Planes(stack.to(torch.int8), tuple(factor for _, factor in parts), step)


def _as_integers(unit: Tensor) -> list[tuple[Tensor, float]]:
    """`(integers of 8 bits, factor)` whose sum is `unit` [R, L], float64 in [-1, 1]."""
    for n in range(1, 128):
        whole = (unit * n).round()
        if bool(((unit * n - whole).abs() <= EXACT * whole.abs()).all()):
            return [(whole.long(), 1 / n)]
    return powers_of_sqrt2(unit) or [
        (digit, 256.0**i / UNIT) for i, digit in enumerate(_digits((unit * UNIT).round().long()))
    ]


def powers_of_sqrt2(unit: Tensor) -> list[tuple[Tensor, float]] | None:
    """Even and odd powers of `unit` = +-sqrt(2)^-e, as integers and factors; None of others."""
    size = unit.abs()
    e = (-2 * size.log2()).round()  # infinite where unit is 0
    power = torch.where(size > 0, 2 ** (-e / 2), 0.0)
    if bool(((size - power).abs() > EXACT * size).any()):
        return None
    found = []
    for odd in (0, 1):
        shift = torch.where((size > 0) & (e % 2 == odd), 2 ** (-(e - odd) / 2), 0.0)
        least = shift[shift > 0].min().item() if bool((shift > 0).any()) else 1.0
        if least < SMALLEST_SHIFT:
            return None
        found.append(((unit.sign() * shift / least).round().long(), least * 0.5 ** (odd / 2)))
    return found


def _digits(whole: Tensor) -> list[Tensor]:
    """Digits to the base 256, from -128 to 127, lowest first, of integers."""
    found = []
    while not found or bool((whole != 0).any()):
        digit = (whole + 128) % 256 - 128
        found.append(digit)
        whole = (whole - digit) // 256
    return found
