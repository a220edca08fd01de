"""The texts of a report's rows: columns, numbers with their deviation, published numbers."""

from __future__ import annotations

from qexp.report.papers import Paper
from qexp.report.rows import Row, Stat

NONE = "n/a"
COLUMNS = (  # what a reader compares by first: a narrow page shows these without scrolling
    "method", "bits", "top-1, last epoch", "worst to best seed", "published",
    "ours - published: top-1 / drop", "drop", "float", "kB", "W bits: param / layer / all",
    "A bits", "GBOPs", "best epoch", "protocol", "flags",
)  # fmt: skip


def cells(row: Row) -> list[str]:
    """A row's texts, in the order of `COLUMNS`."""
    weights = [row.stat("bits", f"weight_{k}") for k in ("by_param", "by_layer", "with_outer")]
    size, bops = row.stat("size_bytes"), row.stat("bops")
    top1 = row.top1
    states = sorted({run.state for run in row.unfinished})
    return [
        row.name,
        row.bits,
        f"{show(top1)} (n={top1.n})" if top1 else ", ".join(states),
        f"{top1.low:.2f} to {top1.high:.2f}" if top1 and top1.n > 1 else NONE,
        cited(row.paper),
        apart(row),
        show(row.stat("drop")),
        shared(row.stat("fp32_top1")),
        f"{size.mean / 1e3:.1f}" if size else NONE,
        " / ".join(f"{s.mean:.2f}" if s else NONE for s in weights) if any(weights) else NONE,
        shared(row.stat("bits", "act_by_layer")),
        f"{bops.mean / 1e9:.3g}" if bops else NONE,
        best_epoch(row),
        row.protocol_hash or NONE,
        "; ".join(row.flags),
    ]


def apart(row: Row) -> str:
    """`-4.58 / +3.35`: ours minus the published top-1, and ours minus the published drop."""
    known = (row.difference, row.drop_difference)
    if row.difference is None:
        return NONE
    return " / ".join(NONE if value is None else f"{value:+.2f}" for value in known)


def show(stat: Stat | None) -> str:
    """`91.23 ± 0.12`, without the deviation where there is none."""
    if stat is None:
        return NONE
    return f"{stat.mean:.2f}" + ("" if stat.std is None else f" ± {stat.std:.2f}")


def shared(stat: Stat | None) -> str:
    """As `show`; only the number where all seeds have the same one, as of one float start."""
    return f"{stat.mean:.2f}" if stat and stat.low == stat.high else show(stat)


def best_epoch(row: Row) -> str:
    """The best epoch's top-1 and how that epoch was chosen: never to be read as the result."""
    best, split = row.stat("top1_best"), selected_on(row)
    return f"{show(best)} ({split}-selected)" if best and split else NONE


def selected_on(row: Row) -> str:
    """The split on which the best epochs were chosen: `test`, `val`, or both; empty if none was, as
    where nothing was trained."""
    splits = {str(run.result.get("best_selected_on") or "unknown") for run in row.counted}
    return "/".join(sorted(splits - {"none"}))


def cited(paper: Paper | None) -> str:
    """`70.2 (float 70.5; arXiv ...)`; says when it is not the authors' or nobody verified it."""
    if paper is None:
        return NONE
    at = f" at {paper.bits}" if paper.policy == "mixed" else ""
    start = "" if paper.float_top1 is None else f"float {paper.float_top1:g}; "
    who = "; somebody's re-run" if paper.kind == "rerun" else ""
    doubt = {"yes": "", "reported": "; quoted at second hand", "no": "; unverified"}
    return f"{paper.top1:g}{at} ({start}{paper.cite}{who}{doubt[paper.verified]})"
