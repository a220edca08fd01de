"""Flags: what a reader must know of a row before comparing it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from qexp.report_papers import Paper, match
from qexp.report_rows import Row


def flag_(row: Row, papers: Sequence[Paper]) -> None:
    """Find the row's published number, and append its flags."""
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
