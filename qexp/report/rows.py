"""What a report is made of: statistics over seeds, rows of runs, tables of rows."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from qexp.report.papers import Paper
from qexp.report.runs import RunRecord, at
from qexp.report.variants import QUANTIZED_ONLY


@dataclass(frozen=True)
class Stat:
    """Mean of n numbers, their sample standard deviation (None for one), least and greatest."""

    mean: float
    std: float | None
    n: int
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[Any]) -> Stat | None:
        """None of no numbers; what is not a finite number is left out."""
        known = [float(v) for v in values if isinstance(v, (int, float)) and math.isfinite(v)]
        if not known:
            return None
        std = statistics.stdev(known) if len(known) > 1 else None
        return cls(statistics.fmean(known), std, len(known), min(known), max(known))


@dataclass
class Row:
    """One experiment over its seeds.

    Attributes:
        counted: one done run per seed, the newest.
        repeats: older done runs of a seed that is counted already.
        copies: runs whose result is that of a counted one, as of a folder that was copied.
        unfinished: failed, interrupted, running and dead runs.
        flags: what a reader must know before comparing.
        options: what tells this row from another one of the same name.
    """

    counted: list[RunRecord]
    repeats: list[RunRecord] = field(default_factory=list)
    copies: list[RunRecord] = field(default_factory=list)
    unfinished: list[RunRecord] = field(default_factory=list)
    paper: Paper | None = None
    flags: list[str] = field(default_factory=list)
    options: str = ""

    @property
    def first(self) -> RunRecord:
        return (self.counted or self.unfinished)[0]

    @property
    def runs(self) -> list[RunRecord]:
        return self.counted + self.repeats + self.copies + self.unfinished

    @property
    def name(self) -> str:
        return f"{self.first.method} [{self.options}]" if self.options else self.first.method

    @property
    def bits(self) -> str:
        """`W4A4`; a mixed run has its averages and its policy behind them; `float`."""
        if self.first.is_float:
            return "float"
        w, a = (self.width(operand) for operand in ("weight", "act"))
        text = f"W{'?' if w is None else f'{w:g}'}A{'?' if a is None else f'{a:g}'}"
        shown = self.first.policy not in (None, "float", "uniform")
        return f"{text} {self.first.policy}" if shown else text

    def width(self, operand: str) -> float | None:
        """Bits of `weight` or `act`; of a mixed row the mean over its seeds, to two digits."""
        if self.first.uniform:
            return self.first.width(operand)
        mean = Stat.of(run.width(operand) for run in self.counted or self.unfinished)
        return None if mean is None else round(mean.mean, 2)

    def stat(self, *path: str) -> Stat | None:
        """Over the seeds, of the field of result.json at `path`."""
        return Stat.of(at(run.result, *path) for run in self.counted)

    @cached_property
    def top1(self) -> Stat | None:
        return self.stat("top1")

    @property
    def difference(self) -> float | None:
        """Ours minus the paper's, points; None where the paper does not say both widths."""
        if self.top1 is None or self.paper is None or not self.paper.widths_known:
            return None
        return self.top1.mean - self.paper.top1

    @property
    def drop_difference(self) -> float | None:
        """Our drop from float minus the paper's, points: each against its own float network.

        None where it is not known of every seed.
        """
        ours, theirs = self.stat("drop"), self.paper and self.paper.drop
        if self.top1 is None or self.difference is None or ours is None or theirs is None:
            return None
        if ours.n != self.top1.n:
            return None
        return ours.mean - theirs

    @property
    def protocol_hash(self) -> str:
        return self.first.protocol_hash

    def compared(self) -> dict[str, Any]:
        """The protocol as far as this row has one; empty without a finished run."""
        if not self.counted:
            return {}
        skip = QUANTIZED_ONLY if self.first.is_float else ()
        return {k: v for k, v in self.first.protocol.items() if k not in skip}


@dataclass
class Table:
    """Rows that are shown together.

    Attributes:
        subject: what they share, `cifar10, resnet20`.
        recipe: the name of their recipe.
        label: their protocol in words, `qat, epochs 10`; empty unless tables are by protocol.
        protocol: the most common protocol, flat; `protocol_hash` is its hash.
        others: for every other protocol, {key: (this table's value, its value)}.
    """

    subject: str
    rows: list[Row]
    recipe: str = ""
    label: str = ""
    protocol: Mapping[str, Any] = field(default_factory=dict)
    protocol_hash: str = ""
    others: dict[str, dict[str, tuple[Any, Any]]] = field(default_factory=dict)

    @property
    def commits(self) -> list[str]:
        """Of the runs that count, each once, ten digits."""
        found = (commit for row in self.rows for run in row.counted for commit in run.commits)
        return sorted({commit[:10] for commit in found})

    @property
    def title(self) -> str:
        """`cifar10, resnet20: qat, epochs 10`."""
        return ": ".join(filter(None, (self.subject, self.label)))
