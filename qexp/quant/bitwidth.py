"""Bit-width policies: who gets how many bits.

A policy is built from its YAML and asked once, before the layer swap:

    assign(layers, **context) -> {layer name: Bits(weight, act)}

It names every layer; `Bits(32, 32)` leaves a layer in float. `needs_data` says whether `assign`
must be given the float model and training images. The first and the last layer follow one rule
in all policies, so that a comparison cannot hide an advantage there:

    first_last: 8      W8A8 (the first layer's input is the image); an operand that the policy
                       keeps in float elsewhere stays in float there too
    first_last: fp32   both operands in float
    first_last: same   no exception: as the policy says

Here are `Policy`, what all of them answer, `Uniform`, `Pattern` and `Progressive`;
`mixed_precision.py` has `Sensitivity`.

A table of bits is written as plain YAML, one line a layer, which `Pattern(file=...)` reads:

    layer1.0.conv1: {weight: 4, act: 4}
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from torch import Tensor, nn

from qexp.quant.convert import Bits, QuantizerFactory
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


def format_bits(bits: Mapping[str, Bits]) -> str:
    """A table of bits as YAML text. Names are quoted: YAML reads a bare `no` or `0` as no text."""
    return "".join(f'"{n}": {{weight: {b.weight}, act: {b.act}}}\n' for n, b in bits.items())


def parse_bits(text: str) -> dict[str, Bits]:
    """The table of bits in `text`; comments and blank lines are skipped.

    Raises:
        ValueError: if a line is not what `format_bits` writes, or a layer comes twice.
    """
    bits: dict[str, Bits] = {}
    for number, line in enumerate(text.splitlines(), 1):
        line = line.split("#")[0].strip()
        if not line:
            continue
        match = re.fullmatch(r"([\"']?)([^\s:\"']+)\1: *\{ *weight: *(\d+), *act: *(\d+) *\}", line)
        if match is None:
            raise ValueError(
                f"line {number}: expected 'layer: {{weight: 4, act: 4}}', got {line!r}"
            )
        if match[2] in bits:
            raise ValueError(f"line {number}: layer '{match[2]}' comes twice")
        bits[match[2]] = Bits(check_bits(int(match[3])), check_bits(int(match[4])))
    return bits


def layer_bits(layer: Layer, own: Bits, rule: FirstLast) -> Bits:
    """The bits of a layer for which the policy says `own`, under the first_last rule."""
    if layer.position == "inner" or rule == "same":
        return own
    if rule == "fp32":
        return Bits(32, 32)
    return Bits(8 if own.weight < 32 else 32, 8 if own.act < 32 else 32)


class Policy:
    """What a policy answers. One of one's own has `assign`, and of the rest what differs.

    Attributes:
        name: of the policy, in results.
        sensitivity_by_layer: Omega of each layer, for layers.csv; empty where nothing is measured.
    """

    name = "policy"
    sensitivity_by_layer: Mapping[str, float] = MappingProxyType({})

    @property
    def needs_data(self) -> bool:
        """Whether `assign` must be given the float model, images and labels."""
        return False

    def assign(self, layers: Sequence[Layer], **context: Any) -> dict[str, Bits]:
        """Bits by layer name."""
        raise NotImplementedError

    def nominal(self, layers: Sequence[Layer], bits: int) -> dict[str, Bits]:
        """Bits to plan with where `assign` needs data; `bits` is the config's."""
        return Uniform(bits, bits).assign(layers)

    def possible(self, layers: Sequence[Layer], epochs: int) -> list[dict[str, Bits]]:
        """Tables that together have every width a layer may get in `epochs`; asked without data."""
        return [] if self.needs_data else [self.assign(layers, epoch=0, epochs=epochs)]

    def check(self, layers: Sequence[Layer], weight_factory: QuantizerFactory) -> None:
        """Find what is wrong without data; writes nothing.

        Raises:
            ValueError: something is.
        """

    def check_metric(self, layers: Sequence[Layer], model: nn.Module, images: Tensor) -> None:
        """Find, on any images [N, C, H, W], what cannot be measured of `model`.

        Raises:
            ValueError: something cannot.
        """


class Uniform(Policy):
    """The same bits everywhere.

    Args:
        weight, act: bits of the two operands, 1 to 16, or 32 for float.
        first_last: rule of the first and last layer (module docstring).
        name: of the policy, in results.
    """

    def __init__(
        self, weight: int, act: int, first_last: FirstLast = 8, name: str = "uniform"
    ) -> None:
        self.name = name
        self.own = Bits(check_bits(weight, "weight bits"), check_bits(act, "activation bits"))
        self.first_last: FirstLast = check_first_last(first_last)

    def assign(self, layers: Sequence[Layer], **context: Any) -> dict[str, Bits]:
        """Bits by layer name."""
        return {layer.name: layer_bits(layer, self.own, self.first_last) for layer in layers}


class Pattern(Policy):
    """Bits by globs on layer names: the first that matches wins, else the default.

    Args:
        weight, act: default bits, for layers that nothing matches.
        patterns: list of `{match: glob, weight: bits, act: bits}`, or a mapping from glob to
            `{weight: bits, act: bits}`; an operand left out keeps the default.
        file: YAML table of bits (module docstring); its names come after `patterns`.
        first_last: rule of the first and last layer.
        name: of the policy, in results.

    Raises:
        ValueError: (also from `assign`) on a glob that matches no layer, with the closest names; on
            one that asks only the first or last layer for what the first_last rule denies it; on
            one of `patterns` whose layers all match earlier ones.
    """

    def __init__(
        self,
        weight: int,
        act: int,
        patterns: Sequence[Mapping[str, Any]] | Mapping[str, Mapping[str, Any]] | None = None,
        file: str | None = None,
        first_last: FirstLast = 8,
        name: str = "pattern",
    ) -> None:
        self.name = name
        self.default = Bits(check_bits(weight, "weight bits"), check_bits(act, "activation bits"))
        self.first_last: FirstLast = check_first_last(first_last)
        if isinstance(patterns, Mapping):
            patterns = [{"match": glob, **entry} for glob, entry in patterns.items()]
        self.entries = [self._entry(entry) for entry in patterns or ()]
        self.typed = len(self.entries)  # of a file any may be overruled
        if file:
            self.entries += parse_bits(Path(file).read_text()).items()

    def _entry(self, entry: Mapping[str, Any]) -> tuple[str, Bits]:
        unknown = set(entry) - {"match", "weight", "act"}
        if unknown or entry.get("match") in (None, ""):
            raise ValueError(f"a pattern has match, weight and act; got {dict(entry)}")
        glob = str(entry["match"])  # a layer of nn.Sequential is named `3`
        return glob, Bits(
            check_bits(entry.get("weight", self.default.weight), f"weight of '{glob}'"),
            check_bits(entry.get("act", self.default.act), f"act of '{glob}'"),
        )

    def assign(self, layers: Sequence[Layer], **context: Any) -> dict[str, Bits]:
        """Bits by layer name."""
        names = [layer.name for layer in layers]
        for i, (glob, own) in enumerate(self.entries):
            matched = [layer for layer in layers if fnmatchcase(layer.name, glob)]
            if not matched:
                close = ", ".join(_closest(glob.partition("*")[0] or glob.strip("*"), names))
                raise ValueError(f"'{glob}' matches no layer; the closest: {close}")
            if all(layer_bits(layer, own, self.first_last) != own for layer in matched):
                raise ValueError(
                    f"'{glob}' matches only the first or last layer, whose bits are decided by "
                    f"first_last={self.first_last}; set first_last=same"
                )
            before = [other for other, _ in self.entries[: min(i, self.typed)]]
            taken = [next((g for g in before if fnmatchcase(x.name, g)), None) for x in matched]
            if i < self.typed and None not in taken:
                raise ValueError(
                    f"'{glob}' changes nothing: '{taken[0]}' before it takes '{matched[0].name}', "
                    "the first match wins; put it first"
                )
        return {
            layer.name: layer_bits(layer, self._own(layer), self.first_last) for layer in layers
        }

    def _own(self, layer: Layer) -> Bits:
        matches = (own for glob, own in self.entries if fnmatchcase(layer.name, glob))
        return next(matches, self.default)


class Progressive(Policy):
    """Bits that change while training, 8 -> 4 -> 2; the quantizers' carried states stay.

    Args:
        stages: list of `{until: when, bits: bits}` in order of time. `until` is an epoch (integer:
            the stage covers epochs 0 to until - 1) or a fraction of all epochs (between 0 and 1);
            the last stage has none. A stage never has fewer bits than the last.
        act: `same` as the weights, or fixed activation bits.
        first_last: rule of the first and last layer.
        name: of the policy, in results.
    """

    def __init__(
        self,
        stages: Sequence[Mapping[str, Any]],
        act: int | Literal["same"] = "same",
        first_last: FirstLast = 8,
        name: str = "progressive",
    ) -> None:
        self.name = name
        self.act = None if act == "same" else check_bits(act, "activation bits")
        self.first_last: FirstLast = check_first_last(first_last)
        if not stages or stages[-1].get("until") is not None:
            raise ValueError("stages needs at least one entry, and the last has no 'until'")
        for stage in stages:
            if unknown := set(stage) - {"until", "bits"}:
                raise ValueError(f"a stage has until and bits; got {', '.join(sorted(unknown))}")
        self.bits = [check_bits(s.get("bits"), "bits of a stage") for s in stages]
        self.until: list[int | float] = [s.get("until", 0) for s in stages[:-1]]
        for until in self.until:
            fraction = isinstance(until, float) and 0 < until < 1
            if not fraction and not (isinstance(until, int) and until >= 1):
                raise ValueError(f"'until' is an epoch (1, 2, ...) or a fraction; got {until!r}")

    def bits_at(self, epoch: int, epochs: int) -> int:
        """Bits in `epoch` (from 0) of a training of `epochs`."""
        ends = [math.floor(u * epochs + 1e-9) if isinstance(u, float) else u for u in self.until]
        if sorted(ends) != ends:
            raise ValueError(f"the stages end at epochs {ends} of {epochs}: not in order of time")
        if ends and ends[-1] >= epochs:
            raise ValueError(
                f"the last stage begins at epoch {ends[-1]} of {epochs}: it is never reached"
            )
        stage = next((i for i, end in enumerate(ends) if epoch < end), len(ends))
        return max(self.bits[stage], self.bits[-1])

    def assign(
        self, layers: Sequence[Layer], *, epoch: int = 0, epochs: int = 1, **context: Any
    ) -> dict[str, Bits]:
        """Bits by layer name in `epoch` (from 0) of `epochs`."""
        bits = self.bits_at(epoch, epochs)
        own = Bits(bits, bits if self.act is None else self.act)
        return {layer.name: layer_bits(layer, own, self.first_last) for layer in layers}

    def possible(self, layers: Sequence[Layer], epochs: int) -> list[dict[str, Bits]]:
        """The tables of all stages."""
        begin = {self.bits_at(epoch, epochs): epoch for epoch in reversed(range(epochs))}
        return [self.assign(layers, epoch=epoch, epochs=epochs) for epoch in begin.values()]


def _closest(start: str, names: Sequence[str], n: int = 3) -> list[str]:
    """The names whose beginnings, about as long as `start`, are most like it."""

    def likeness(name: str) -> float:
        lengths = (len(start) - 1, len(start), len(start) + 1)
        return max(difflib.SequenceMatcher(None, start, name[:k]).ratio() for k in lengths)

    return sorted(names, key=likeness, reverse=True)[:n]
