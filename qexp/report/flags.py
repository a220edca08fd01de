"""Flags: what a reader must know of a row before comparing it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from qexp.report.papers import NEAR, Paper, matches
from qexp.report.rows import Row
from qexp.report.runs import at

SAME_FLOAT = 0.1  # points: papers print one decimal


def flag_(row: Row, papers: Sequence[Paper]) -> None:
    """Find the row's published number, and append its flags."""
    run = row.first
    distilled = bool(run.protocol.get("distill.weight"))
    found = matches(
        papers,
        method=run.method,
        model=run.model,
        dataset=run.dataset,
        w_bits=row.width("weight"),
        a_bits=row.width("act"),
        mixed=not run.uniform,
        distilled=distilled,
    )
    if found:
        row.paper = found[0]
        row.flags += _unlike(row, found[0], distilled) + _elsewhere(row, found[0], found[1:])
    if row.repeats:
        seeds = sorted({str(r.seed) for r in row.repeats})
        row.flags.append(f"seed {', '.join(seeds)} ran again: the newest counts")
    commits = {commit for r in row.counted for commit in r.commits}
    if len(commits) > 1:
        row.flags.append(f"{len(commits)} commits")
    if any(not r.commits for r in row.counted):
        row.flags.append("no commit recorded")
    if any(r.result.get("dirty") for r in row.counted):
        row.flags.append("uncommitted code")
    if any(not r.result.get("protocol") for r in row.counted):
        row.flags.append("no protocol recorded")
    if any(not r.config for r in row.counted):
        row.flags.append("no config: options unknown")
    row.flags += _cut(run.protocol)
    row.flags += _uneven(row)
    measured, nominal = row.stat("bits", "weight_by_param"), run.width("weight")
    if run.uniform and measured and nominal and measured.mean > nominal + 0.01:
        row.flags.append(f"holds more levels than {nominal:g} bit: {measured.mean:.2f}")
    seeds = f" in {len(row.counted)} runs" if len(row.counted) > 1 else ""
    for kind, count in sorted(_health(row).items()):
        row.flags.append(f"{kind.replace('_', ' ')}: {count}{seeds}")
    for other in row.unfinished:
        row.flags.append(f"seed {other.seed} {other.state}: {other.error or 'no reason recorded'}")


def _cut(protocol: Mapping[str, Any]) -> list[str]:
    """How a protocol departs from what its recipe says."""
    flags = []
    if protocol.get("max_steps") is not None:
        flags.append(f"stopped after {protocol['max_steps']} steps")
    if protocol.get("subset") is not None:
        flags.append(f"trained on {protocol['subset']} images")
    if protocol.get("val_seen"):
        flags.append("its float start may have seen the validation images")
    if protocol.get("segments"):
        flags.append("resumed with other settings")
    return flags


def _uneven(row: Row) -> list[str]:
    """Where the seeds of a row do not say the same things."""
    flags = []
    drop = row.stat("drop")
    if row.top1 and drop and drop.n != row.top1.n:
        flags.append(f"drop known of {drop.n} of {row.top1.n} seeds")
    for operand in ("weight", "act"):
        widths = [w for r in row.counted if (w := r.width(operand)) is not None]
        if widths and max(widths) - min(widths) > NEAR:
            flags.append(f"{operand} bits of {min(widths):g} to {max(widths):g}")
    return flags


def _unlike(row: Row, paper: Paper, distilled: bool) -> list[str]:
    """In what the published number was made otherwise than ours, as far as its source says."""
    flags = []
    if not paper.widths_known:
        flags.append(f"published at {paper.bits}")
    if paper.distillation == ("no" if distilled else "yes"):
        flags.append("paper w/o distillation" if distilled else "paper with distillation")
    if not row.counted:
        return flags
    protocol, start = row.first.protocol, row.stat("fp32_top1")
    epochs, first_last = protocol.get("epochs", 0), str(protocol.get("first_last", ""))
    apart = []
    if paper.epochs and float(paper.epochs) != epochs:
        apart.append(f"{paper.epochs} epochs (ours {epochs})")
    if paper.first_last and first_last and paper.first_last != first_last:
        apart.append(f"first/last {paper.first_last} (ours {first_last})")
    if paper.float_top1 is not None and start and abs(paper.float_top1 - start.mean) > SAME_FLOAT:
        apart.append(f"float {paper.float_top1:g} (ours {start.mean:.2f})")
    unknown = [
        name
        for name, value in (
            ("float", paper.float_top1),
            ("epochs", paper.epochs),
            ("first/last", paper.first_last),
        )
        if value in (None, "")
    ]
    return [
        *flags,
        *([f"published with {', '.join(apart)}"] if apart else []),
        *([f"published with unknown {', '.join(unknown)}"] if unknown else []),
    ]


def _elsewhere(row: Row, shown: Paper, others: Sequence[Paper]) -> list[str]:
    """Re-runs by others that keep first and last layer as ours do, where those shown do not say."""
    ours = str(row.first.protocol.get("first_last", ""))
    if not row.counted or shown.first_last == ours:
        return []
    return [
        f"re-run with first/last {ours}, {p.cite}: {p.top1:g}"
        for p in others
        if p.kind == "rerun" and p.first_last == ours
    ]


def _health(row: Row) -> Counter[str]:
    """Sum over seeds and layers of what `result.health` counted, and of what stopped learning."""
    total: Counter[str] = Counter()
    for run in row.counted:
        fused = at(run.config, "quantizer", "act", "fusion") not in (None, "none")
        health = run.result.get("health") or {}
        told = {name for found in health.values() if isinstance(found, Mapping) for name in found}
        total["quantizers_at_rest"] += len(set(run.at_rest) - told)
        for kind, found in health.items():
            if kind == "borders_at_bound" and fused:
                continue  # older runs counted borders before they are mixed, which rounds nothing
            counts = found.values() if isinstance(found, Mapping) else [found]
            total[kind] += sum(count for count in counts if isinstance(count, int))
    return +total
