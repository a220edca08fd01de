"""Runs grouped into rows, rows into tables; the arithmetic of `qexp report`.

A row is one experiment: the same data set, model, method with its options, bits and protocol; its
runs differ in seed. Every seed counts once (the newest run of it); sample standard deviation, none
for one seed. `top1` is the last epoch's. A run that failed, or has not ended, joins the row whose
config it shares, else it has a row of its own: nothing is left out.

A table holds one protocol unless `by` asks otherwise (`protocols`). Where it does, rows with
another protocol than the most common one are flagged, and the keys that differ are listed. A float
row is not asked about `QUANTIZED_ONLY`, and a float network trained from scratch, where the others
are not, is named a start and not compared.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from qexp.report.flags import flag_
from qexp.report.papers import Paper
from qexp.report.protocols import is_start, label_, place, recipe_of, started, told_protocol
from qexp.report.rows import Row, Table
from qexp.report.runs import RunRecord
from qexp.report.shipped import shipped
from qexp.report.variants import briefly, differences, drop_new_options_, name_variants

GROUPS = ("dataset", "model", "method", "bits", "recipe", "protocol")


def make_tables(
    runs: Sequence[RunRecord],
    papers: Sequence[Paper],
    by: Sequence[str] = ("dataset", "model", "protocol"),
) -> list[Table]:
    """Group `runs` into rows, and rows into one table per value of `by` (names of `GROUPS`)."""
    drop_new_options_(runs)
    rows = _rows(runs)
    homes = place(rows) if "protocol" in by else [""] * len(rows)
    grouped: dict[tuple[str, ...], list[Row]] = {}
    for row, home in zip(rows, homes, strict=True):
        names = [_group(row, name) for name in by if name != "protocol"]
        grouped.setdefault((", ".join(names), home), []).append(row)
    made = []
    for (subject, _), own in grouped.items():
        own.sort(key=_order)
        table = Table(subject, own, recipe_of(own))
        _compare(table)
        _name_variants(own)
        for row in own:
            flag_(row, papers)
        made.append(table)
    made.sort(key=lambda t: (t.subject, t.recipe, -len(t.rows), t.protocol_hash))
    if "protocol" in by:
        label_(made)
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
    return (*names, *widths, variant, run.protocol_hash or told_protocol(run))


def _row(runs: Sequence[RunRecord]) -> Row:
    newest: dict[Any, RunRecord] = {}
    for run in runs:
        if run.done:
            newest[_draw(run)] = max(newest.get(_draw(run), run), run, key=_age)
    counted = sorted(newest.values(), key=lambda r: str(r.seed))
    again = [r for r in runs if r.done and newest[_draw(r)] is not r]
    return Row(
        counted,
        repeats=[r for r in again if r.result != newest[_draw(r)].result],
        copies=[r for r in again if r.result == newest[_draw(r)].result],
        unfinished=[r for r in runs if not r.done],
    )


def _draw(run: RunRecord) -> Any:
    """The seed; of a run that recorded none the folder: it stands for no other one."""
    return str(run.folder) if run.seed is None else run.seed


def _age(run: RunRecord) -> tuple[str, list[tuple[int, str]]]:
    """When it ended; of runs from before that was written, the name, its numbers as numbers."""
    words = re.findall(r"\d+|\D+", run.folder.name)
    parts = [(int(w), "") if w.isdigit() else (-1, w) for w in words]
    return str(run.result.get("finished") or ""), parts


def _group(row: Row, name: str) -> str:
    run = row.first
    values = {
        "bits": row.bits,
        "recipe": run.recipe,
    }
    return values[name] if name in values else str(getattr(run, name))


def _order(row: Row) -> tuple[Any, ...]:
    """Float first, then wide to narrow, then by name."""
    w, a = (row.first.width(operand) or 0.0 for operand in ("weight", "act"))
    return (not row.first.is_float, -w, -a, row.first.method, row.protocol_hash)


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
            known_not = started(row, table.protocol) is False
            other = "; these started from another network" if known_not else ""
            row.flags.append(f"float start, trained from scratch{other}")
            continue
        differing = differences(table.protocol, row.compared(), is_float=row.first.is_float)
        if differing:
            table.others[row.protocol_hash] = differing
            row.flags.append(f"protocol differs: {', '.join(briefly(differing))}")


def _name_variants(rows: Sequence[Row]) -> None:
    """Tell the rows of a method apart by its options, the same way at each width.

    A policy's options are named only where rows of one name and width are left. Options of the
    network and of its data come last: they are mostly the same.
    """
    methods: dict[str, list[Row]] = {}
    for row in rows:
        methods.setdefault(row.first.method, []).append(row)
    for group in methods.values():
        for part in ("quantizer.", "model.", "dataset."):
            _name(group, part)
    same: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        same.setdefault((row.name, row.bits), []).append(row)
    for group in same.values():
        _name(group, "bitwidth.")


def _name(rows: Sequence[Row], part: str) -> None:
    own = [{k: v for k, v in r.first.variant.items() if k.startswith(part)} for r in rows]
    names = name_variants(own, shipped(rows[0].first.method))
    for row, options in zip(rows, names, strict=True):
        row.options = ", ".join(filter(None, (row.options, options)))
