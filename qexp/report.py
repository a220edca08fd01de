"""`qexp report [FOLDER ...]`: every run below the folders, over seeds, beside the papers.

Imports no torch. `report_runs` reads folders, `report_papers` reads papers.csv, `report_tables`
groups and computes; this file is the command line and the Markdown and CSV forms, `report_html`
the page with figures.
"""

from __future__ import annotations

import argparse
import csv
import io
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qexp.errors import ConfigError, RunError, did_you_mean
from qexp.report_papers import Paper, find_papers
from qexp.report_runs import read_runs
from qexp.report_tables import GROUPS, Row, Stat, Table, make_tables

FORMATS = ("md", "csv", "html")
NONE = "n/a"
COLUMNS = (
    "method", "bits", "top-1, last epoch", "worst to best seed", "best epoch", "float", "drop",
    "published", "ours - published", "W bits: param / layer / all", "A bits", "kB", "GBOPs",
    "protocol", "flags",
)  # fmt: skip
EXAMPLES = """\
examples:
  qexp report                                 runs under 'outputs' as Markdown
  qexp report results/cifar10-qat --out t.html   one page with figures
  qexp report --group dataset,model,protocol  one table per protocol
"""


def main(argv: list[str]) -> int:
    """Run `qexp report`; returns the exit code. Raises QexpError for a user's error."""
    given = _parser().parse_args(argv)
    by = _groups(given.group)
    roots = [Path(f) for f in given.folders] or [Path("outputs")]
    runs = read_runs(roots) if given.folders or roots[0].is_dir() else []
    if not runs:
        where = "', '".join(map(str, roots))
        raise RunError(
            f"report: no runs under '{where}'. Train one with: qexp train quantizer=lsq bits=4."
        )
    tables = make_tables(runs, find_papers(Path(given.papers) if given.papers else None), by)
    form = given.format or _format_of(given.out)
    if form == "html":
        from qexp.report_html import page

        text = page(tables, Path(given.out).parent if given.out else Path())
    else:
        text = {"md": markdown, "csv": to_csv}[form](tables)
    _deliver(text, given.out)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="qexp report",
        description="Tables of runs: mean and deviation over seeds, beside the papers' numbers.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folders", nargs="*", metavar="FOLDER", help="runs (default: outputs)")
    parser.add_argument("--format", choices=FORMATS, help="default: by --out's ending, else md")
    parser.add_argument("--out", metavar="FILE", help="write there instead of printing")
    parser.add_argument(
        "--group", default="dataset,model", metavar="KEYS",
        help=f"one table per value of these, comma-separated: {', '.join(GROUPS)}",
    )  # fmt: skip
    parser.add_argument("--papers", metavar="FILE", help="published numbers (default: shipped)")
    return parser


def _groups(text: str) -> list[str]:
    names = [name for name in text.split(",") if name]
    for name in names:
        if name not in GROUPS:
            raise ConfigError(
                f"report: cannot group by '{name}'. Options: {', '.join(GROUPS)}."
                + did_you_mean(name, GROUPS)
            )
    return names


def _format_of(out: str | None) -> str:
    ending = Path(out).suffix.lstrip(".").lower() if out else "md"
    if ending not in FORMATS:
        raise ConfigError(f"report: '{out}' ends in none of .md, .csv, .html. Give --format.")
    return ending


def _deliver(text: str, out: str | None) -> None:
    if out is None:
        sys.stdout.write(text)
        return
    try:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        Path(out).write_text(text)
    except OSError as error:
        raise RunError(
            f"report: cannot write '{out}': {error.strerror}. Choose another --out."
        ) from error


def markdown(tables: Sequence[Table]) -> str:
    """All tables as GitHub Markdown, with the protocols below each."""
    parts = []
    for table in tables:
        lines = [f"## {table.title}", "", markdown_row(COLUMNS), "|" + " --- |" * len(COLUMNS)]
        lines += [markdown_row(cells(row)) for row in table.rows]
        parts.append("\n".join([*lines, "", *protocol_lines(table)]))
    return "\n\n".join(parts) + "\n"


def markdown_row(texts: Sequence[str]) -> str:
    """One line of a Markdown table."""
    return "| " + " | ".join(_cell(text) for text in texts) + " |"


def _cell(text: str) -> str:
    """Safe inside a Markdown table: an error that quotes `<class 'int'>` is no tag."""
    return re.sub(r"<(?!/?sub>)", "&lt;", text).replace("|", "\\|").replace("\n", " ")


def protocol_lines(table: Table) -> list[str]:
    """The table's protocol in one line, and one line for each that differs."""
    common = " ".join(f"{key}={brief(value)}" for key, value in table.protocol.items())
    lines = [f"Protocol {table.protocol_hash or 'unknown'}: {common or 'no finished run'}."]
    for other, keys in table.others.items():
        changed = ", ".join(
            f"{k}: {brief(theirs)} instead of {brief(ours)}" for k, (ours, theirs) in keys.items()
        )
        lines.append(f"Protocol {other} differs, do not compare: {changed}.")
    lines.append(
        "top-1 in percent on the test split at the last epoch, mean ± sample standard deviation "
        "over n seeds; drop = float - ours."
    )
    return [f"{line}  " for line in lines[:-1]] + lines[-1:]


def brief(value: Any) -> str:
    """A value of a protocol; of a hash, the first digits."""
    text = str(value)
    return text[:8] if len(text) >= 32 and text.isalnum() else text


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
        best_epoch(row),
        shared(row.stat("fp32_top1")),
        show(row.stat("drop")),
        cited(row.paper),
        NONE if row.difference is None else f"{row.difference:+.2f}",
        " / ".join(f"{s.mean:.2f}" if s else NONE for s in weights) if any(weights) else NONE,
        shared(row.stat("bits", "act_by_layer")),
        f"{size.mean / 1e3:.1f}" if size else NONE,
        f"{bops.mean / 1e9:.3g}" if bops else NONE,
        row.protocol_hash or NONE,
        "; ".join(row.flags),
    ]


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
    best = row.stat("top1_best")
    return f"{show(best)} ({selected_on(row)}-selected)" if best else NONE


def selected_on(row: Row) -> str:
    """The split on which the best epochs were chosen: `test`, `val`, or both."""
    splits = {str(run.result.get("best_selected_on") or "unknown") for run in row.counted}
    return "/".join(sorted(splits))


def cited(paper: Paper | None) -> str:
    """`70.2 (float 70.5; arXiv ...)`; says when it is not the authors' or nobody verified it."""
    if paper is None:
        return NONE
    start = "" if paper.float_top1 is None else f"float {paper.float_top1:g}; "
    who = "; somebody's re-run" if paper.kind == "rerun" else ""
    doubt = {"yes": "", "reported": "; quoted at second hand", "no": "; unverified"}
    return f"{paper.top1:g} ({start}{paper.cite}{who}{doubt[paper.verified]})"


def to_csv(tables: Sequence[Table]) -> str:
    """One line a row, numbers unrounded, empty where there is none."""
    out = io.StringIO()
    lines = [_csv_row(table, row) for table in tables for row in table.rows]
    writer = csv.DictWriter(out, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return out.getvalue()


def _csv_row(table: Table, row: Row) -> dict[str, Any]:
    run, top1, best = row.first, row.top1, row.stat("top1_best")
    mean = lambda *path: getattr(row.stat(*path), "mean", None)  # noqa: E731
    return {
        "table": table.title,
        "dataset": run.dataset,
        "model": run.model,
        "method": row.name,
        "bits": row.bits,
        "w_bits": run.width("weight"),
        "a_bits": run.width("act"),
        "top1_mean": top1 and top1.mean,
        "top1_std": top1 and top1.std,
        "n": top1.n if top1 else 0,
        "top1_worst": top1 and top1.low,
        "top1_best_seed": top1 and top1.high,
        "top1_best_epoch": best and best.mean,
        "best_epoch_selected_on": selected_on(row) if best else None,
        "float_top1": mean("fp32_top1"),
        "drop": mean("drop"),
        "paper_top1": row.paper and row.paper.top1,
        "paper_float_top1": row.paper and row.paper.float_top1,
        "paper_source": row.paper and row.paper.cite,
        "paper_kind": row.paper and row.paper.kind,
        "paper_verified": row.paper and row.paper.verified,
        "difference": row.difference,
        "w_bits_by_param": mean("bits", "weight_by_param"),
        "w_bits_by_layer": mean("bits", "weight_by_layer"),
        "w_bits_with_outer": mean("bits", "weight_with_outer"),
        "a_bits_by_layer": mean("bits", "act_by_layer"),
        "size_bytes": mean("size_bytes"),
        "bops": mean("bops"),
        "protocol_hash": row.protocol_hash,
        "seeds": " ".join(str(r.seed) for r in row.counted),
        "commits": " ".join(sorted({str(r.result.get("commit")) for r in row.counted})),
        "flags": "; ".join(row.flags),
        "folders": " ".join(str(r.folder) for r in row.runs),
    }  # fmt: skip
