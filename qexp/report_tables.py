"""Runs grouped into rows, rows into tables; the arithmetic of `qexp report`.

A row is one experiment: the same data set, model, method with its options, bits and protocol; its
runs differ in seed. Every seed counts once (the newest run of it); sample standard deviation, none
for one seed. `top1` is the last epoch's. A run that failed, or has not ended, joins the row whose
config it shares, else it has a row of its own: nothing is left out.

Within a table, rows whose protocol differs from the most common one are flagged, and the keys that
differ are listed. A float row is not asked about `QUANTIZED_ONLY`, and a float network trained from
scratch, where the others are not, is named a start and not compared.
"""

from __future__ import annotations

import math
import re
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from qexp.report_papers import Paper, match
from qexp.report_runs import RunRecord, at
from qexp.report_variants import (
    QUANTIZED_ONLY,
    briefly,
    differences,
    drop_new_options_,
    name_variants,
)

GROUPS = ("dataset", "model", "method", "bits", "recipe", "protocol")


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
        unfinished: failed, interrupted, running and dead runs.
        flags: what a reader must know before comparing.
        options: what tells this row from another one of the same name.
    """

    counted: list[RunRecord]
    repeats: list[RunRecord] = field(default_factory=list)
    unfinished: list[RunRecord] = field(default_factory=list)
    paper: Paper | None = None
    flags: list[str] = field(default_factory=list)
    options: str = ""

    @property
    def first(self) -> RunRecord:
        return (self.counted or self.unfinished)[0]

    @property
    def runs(self) -> list[RunRecord]:
        return self.counted + self.repeats + self.unfinished

    @property
    def name(self) -> str:
        return f"{self.first.method} [{self.options}]" if self.options else self.first.method

    @property
    def bits(self) -> str:
        """`W4A4`; a mixed run has its averages and its policy behind them; `float`."""
        if self.first.is_float:
            return "float"
        w, a = (self.first.width(operand) for operand in ("weight", "act"))
        text = f"W{'?' if w is None else f'{w:g}'}A{'?' if a is None else f'{a:g}'}"
        shown = self.first.policy not in (None, "float", "uniform")
        return f"{text} {self.first.policy}" if shown else text

    def stat(self, *path: str) -> Stat | None:
        """Over the seeds, of the field of result.json at `path`."""
        return Stat.of(at(run.result, *path) for run in self.counted)

    @cached_property
    def top1(self) -> Stat | None:
        return self.stat("top1")

    @property
    def difference(self) -> float | None:
        """Ours minus the paper's, points."""
        return self.top1.mean - self.paper.top1 if self.top1 and self.paper else None

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
        title: what they share, `cifar10, resnet20`.
        protocol: the most common protocol, flat; `protocol_hash` is its hash.
        others: for every other protocol, {key: (this table's value, its value)}.
    """

    title: str
    rows: list[Row]
    protocol: Mapping[str, Any] = field(default_factory=dict)
    protocol_hash: str = ""
    others: dict[str, dict[str, tuple[Any, Any]]] = field(default_factory=dict)


def make_tables(
    runs: Sequence[RunRecord],
    papers: Sequence[Paper],
    by: Sequence[str] = ("dataset", "model"),
) -> list[Table]:
    """Group `runs` into rows, and rows into one table per value of `by` (names of `GROUPS`)."""
    drop_new_options_(runs)
    tables: dict[tuple[str, ...], list[Row]] = {}
    for row in _rows(runs):
        tables.setdefault(tuple(_group(row, name) for name in by), []).append(row)
    made = []
    for key, rows in sorted(tables.items()):
        rows.sort(key=_order)
        table = Table(", ".join(key), rows)
        _compare(table)
        _name_variants(rows)
        for row in rows:
            _flag(row, papers)
        made.append(table)
    return made


def _rows(runs: Sequence[RunRecord]) -> list[Row]:
    groups: dict[tuple[Any, ...], list[RunRecord]] = {}
    key_of: dict[str, tuple[Any, ...]] = {}  # experiment -> key of its finished runs
    for run in runs:
        if run.done:
            key_of.setdefault(run.experiment, _key(run))
            groups.setdefault(_key(run), []).append(run)
    for run in runs:
        if not run.done:
            known = key_of.get(run.experiment) if run.experiment else None
            alone = run.experiment or str(run.folder)  # without a config nothing is known to be one
            key = known or (run.dataset, run.model, run.method, alone)
            groups.setdefault(key, []).append(run)
    return [_row(group) for group in groups.values()]


def _key(run: RunRecord) -> tuple[Any, ...]:
    widths = () if not run.uniform else (run.width("weight"), run.width("act"))
    variant = tuple(sorted((k, str(v)) for k, v in run.variant.items()))
    names = (run.dataset, run.model, run.method, run.policy)
    return (*names, *widths, variant, run.protocol_hash)


def _row(runs: Sequence[RunRecord]) -> Row:
    newest: dict[Any, RunRecord] = {}
    for run in runs:
        if run.done:
            newest[run.seed] = max(newest.get(run.seed, run), run, key=_age)
    counted = sorted(newest.values(), key=lambda r: str(r.seed))
    return Row(
        counted,
        repeats=[r for r in runs if r.done and newest[r.seed] is not r],
        unfinished=[r for r in runs if not r.done],
    )


def _age(run: RunRecord) -> tuple[str, list[tuple[int, str]]]:
    """When it ended; of runs from before that was written, the name, its numbers as numbers."""
    words = re.findall(r"\d+|\D+", run.folder.name)
    parts = [(int(w), "") if w.isdigit() else (-1, w) for w in words]
    return str(run.result.get("finished") or ""), parts


def _group(row: Row, name: str) -> str:
    run = row.first
    values = {
        "bits": row.bits,
        "recipe": str(run.result.get("recipe") or (run.config.get("recipe") or {}).get("name")),
        "protocol": f"protocol {run.protocol_hash or 'unknown'}",
    }
    return values[name] if name in values else str(getattr(run, name))


def _order(row: Row) -> tuple[Any, ...]:
    """Float first, then wide to narrow, then by name."""
    width = row.first.width("weight") or 0.0
    return (not row.first.is_float, -width, row.first.method, row.protocol_hash)


def _compare(table: Table) -> None:
    """Choose the table's protocol, and flag the rows that have another."""
    known = [row for row in table.rows if row.compared()]
    if not known:
        return
    # A quantized row speaks for the table where there is one: it knows `first_last`.
    voters = [row for row in known if not row.first.is_float] or known
    table.protocol_hash = Counter(row.protocol_hash for row in voters).most_common(1)[0][0]
    reference = next(row for row in voters if row.protocol_hash == table.protocol_hash)
    table.protocol = reference.compared()
    for row in known:
        if is_start(row, table.protocol):
            row.flags.append("float start, trained from scratch")
            continue
        differing = differences(table.protocol, row.compared(), is_float=row.first.is_float)
        if differing:
            table.others[row.protocol_hash] = differing
            row.flags.append(f"protocol differs: {', '.join(briefly(differing))}")


def is_start(row: Row, protocol: Mapping[str, Any]) -> bool:
    """Whether this is a float network the others may start from: its recipe differs by design."""
    own = row.first.is_float and row.first.protocol.get("from_scratch")
    return bool(own) and not protocol.get("from_scratch")


def _name_variants(rows: Sequence[Row]) -> None:
    """Tell rows of one method and width apart by the options in which they differ."""
    same: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        same.setdefault((row.first.method, row.bits), []).append(row)
    for group in same.values():
        names = name_variants([row.first.variant for row in group])
        for row, options in zip(group, names, strict=True):
            row.options = options


def _flag(row: Row, papers: Sequence[Paper]) -> None:
    run = row.first
    distilled = bool(run.protocol.get("distill.weight"))
    row.paper = match(
        papers,
        method=run.method,
        model=run.model,
        dataset=run.dataset,
        w_bits=run.width("weight"),
        a_bits=run.width("act"),
        mixed=not run.uniform,
        distilled=distilled,
    )
    if row.paper and row.paper.distillation == ("no" if distilled else "yes"):
        row.flags.append("paper with distillation" if not distilled else "paper w/o distillation")
    if row.repeats:
        seeds = sorted({str(r.seed) for r in row.repeats})
        row.flags.append(f"seed {', '.join(seeds)} ran again: the newest counts")
    commits = {str(r.result.get("commit")) for r in row.counted}
    if len(commits) > 1:
        row.flags.append(f"{len(commits)} commits")
    if any(r.result.get("dirty") for r in row.counted):
        row.flags.append("uncommitted code")
    measured, nominal = row.stat("bits", "weight_by_param"), run.width("weight")
    if run.uniform and measured and nominal and measured.mean > nominal + 0.01:
        row.flags.append(f"holds more levels than {nominal:g} bit: {measured.mean:.2f}")
    for kind, count in sorted(_health(row).items()):
        row.flags.append(f"{kind.replace('_', ' ')}: {count}")
    for other in row.unfinished:
        row.flags.append(f"seed {other.seed} {other.state}: {other.error or 'no reason recorded'}")


def _health(row: Row) -> Counter[str]:
    """Sum over seeds and layers of what `result.health` counted."""
    total: Counter[str] = Counter()
    for run in row.counted:
        for kind, found in (run.result.get("health") or {}).items():
            count = sum(found.values()) if isinstance(found, Mapping) else found
            total[kind] += count if isinstance(count, int) else 0
    return +total
