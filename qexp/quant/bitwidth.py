"""Bit-width policies: who gets how many bits.

A policy is built from its YAML and asked once, before the layer swap:

    assign(layers, **context) -> {layer name: Bits(weight, act)}

It names every layer; `Bits(32, 32)` leaves a layer in float. `needs_data` says whether `assign`
must be given the float model and calibration images. The first and the last layer follow one rule
in all policies, so that a comparison cannot hide an advantage there:

    first_last: 8      W8A8 (the first layer's input is the image); an operand that the policy
                       keeps in float elsewhere stays in float there too
    first_last: fp32   both operands in float
    first_last: same   no exception: as the policy says
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from qexp.quant.convert import Bits
from qexp.quant.trace import Layer

FirstLast = Literal[8, "8", "fp32", "same"]


def check_bits(bits: object, what: str = "bits") -> int:
    """`bits` if it is a width a quantizer can have (1 to 16) or 32, float.

    Raises:
        ValueError: otherwise.
    """
    if not isinstance(bits, int) or isinstance(bits, bool) or not (1 <= bits <= 16 or bits == 32):
        raise ValueError(f"{what} must be an integer from 1 to 16, or 32 for float; got {bits!r}")
    return bits


def check_first_last(rule: FirstLast) -> FirstLast:
    """`rule`, with 8 as an integer.

    Raises:
        ValueError: if it is none of 8, fp32, same.
    """
    if str(rule) not in ("8", "fp32", "same"):
        raise ValueError(f"first_last must be 8, fp32 or same; got {rule!r}")
    return 8 if str(rule) == "8" else rule


def layer_bits(layer: Layer, own: Bits, rule: FirstLast) -> Bits:
    """The bits of a layer for which the policy says `own`, under the first_last rule."""
    if layer.position == "inner" or rule == "same":
        return own
    if rule == "fp32":
        return Bits(32, 32)
    return Bits(8 if own.weight < 32 else 32, 8 if own.act < 32 else 32)


class Uniform:
    """The same bits everywhere.

    Args:
        weight, act: bits of the two operands, 1 to 16, or 32 for float.
        first_last: rule of the first and last layer (module docstring).
    """

    needs_data = False

    def __init__(self, weight: int, act: int, first_last: FirstLast = 8) -> None:
        self.own = Bits(check_bits(weight, "weight bits"), check_bits(act, "activation bits"))
        self.first_last: FirstLast = check_first_last(first_last)

    def assign(self, layers: Sequence[Layer], **context: Any) -> dict[str, Bits]:
        """Bits by layer name."""
        return {layer.name: layer_bits(layer, self.own, self.first_last) for layer in layers}
