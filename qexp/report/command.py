"""`qexp report [FOLDER ...]`: every run below the folders, over seeds, beside the papers.

Imports no torch. `runs` reads folders, `papers` reads papers.csv, `tables`
groups and computes; this file is the command line and the CSV form, `markdown` the Markdown
and `html` the page with figures.
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qexp.command_line import Parser
from qexp.errors import ConfigError, RunError, did_you_mean
from qexp.report import against
from qexp.report.cells import selected_on
from qexp.report.markdown import markdown
from qexp.report.papers import find_papers
from qexp.report.rows import Row, Table
from qexp.report.runs import read_runs
from qexp.report.tables import GROUPS, make_tables
from qexp.runner.atomic import write_bytes

OPTIONS = ("out", "format", "group", "against", "papers")
FORMATS = ("md", "csv", "html")
EXAMPLES = """\
examples:
  qexp report                                          runs under 'outputs' as Markdown
  qexp report results/cifar10_qat_short --out t.html   one page with figures
  qexp report results/cifar10_qat_short --against lsq  differences seed by seed, with intervals
  qexp report --group dataset,model                    all protocols in one table, flagged
"""


def main(argv: list[str]) -> int:
    """Run `qexp report`; returns the exit code. Raises QexpError for a user's error."""
    given = _parser().parse_intermixed_args(argv)
    _refuse_overrides(given.folders)
    by = _groups(given.group)
    roots = [Path(f) for f in given.folders] or [Path("outputs")]
    runs = read_runs(roots) if given.folders or roots[0].is_dir() else []
    if not runs:
        where = "', '".join(map(str, roots))
        raise RunError(
            f"report: no runs under '{where}'. Train one with: qexp train quantizer=lsq bits=4."
        )
    tables = make_tables(runs, find_papers(Path(given.papers) if given.papers else None), by)
    if given.against is not None:
        against.check_known(tables, given.against)
    form = given.format or _format_of(given.out)
    beside = Path(given.out).parent if given.out else Path()
    if form == "html":
        from qexp.report.html import page

        text = page(tables, beside, given.against)
    elif form == "md":
        text = markdown(tables, given.against, beside)
    else:
        text = to_csv(tables, given.against)
    _deliver(text, given.out)
    return 0


def _parser() -> Parser:
    parser = Parser(
        prog="qexp report",
        description="Tables of runs, one a protocol: mean and deviation over seeds, beside papers.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folders", nargs="*", metavar="FOLDER", help="runs (default: outputs)")
    parser.add_argument("--format", choices=FORMATS, help="default: by --out's ending, else md")
    parser.add_argument("--out", metavar="FILE", help="write there instead of printing")
    parser.add_argument(
        "--group", default="dataset,model,protocol", metavar="KEYS",
        help=f"one table per value of these, comma-separated: {', '.join(GROUPS)}",
    )  # fmt: skip
    parser.add_argument(
        "--against", metavar="METHOD",
        help="compare each row with this one at its bits, seed by seed",
    )  # fmt: skip
    parser.add_argument("--papers", metavar="FILE", help="published numbers (default: shipped)")
    return parser


def _refuse_overrides(folders: Sequence[str]) -> None:
    """Other commands spell options `out=x.html`; here that would be a folder's name."""
    for folder in folders:
        name, equals, value = folder.partition("=")
        if equals and not Path(folder).exists():
            spelled = f"--{name} {value}" if name in OPTIONS else f"--{', --'.join(OPTIONS)}"
            raise ConfigError(
                f"report: '{folder}' is no folder. Options of report begin with two dashes: "
                f"{spelled}." + ("" if name in OPTIONS else did_you_mean(name, OPTIONS))
            )


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
    data = text.encode(errors="backslashreplace")
    if out is None:  # a terminal of another encoding shows what it can
        encoding = sys.stdout.encoding or "utf-8"
        sys.stdout.write(data.decode().encode(encoding, "replace").decode(encoding))
        return
    try:
        path = Path(out).resolve()
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_file():  # a pipe, /dev/stdout
            path.write_bytes(data)
        else:
            write_bytes(path, data)
    except OSError as error:
        raise RunError(
            f"report: cannot write '{out}': {error.strerror}. Choose another --out."
        ) from error


def to_csv(tables: Sequence[Table], base: str | None = None) -> str:
    """One line a row, numbers unrounded, empty where there is none.

    Args:
        base: name of the row that the others are compared with, in columns of their own.
    """
    out = io.StringIO()
    lines = []
    for table in tables:
        beside = {} if base is None else {id(c.row): c for c in against.compare(table, base)}
        for row in table.rows:
            more = {} if base is None else against.csv_fields(beside.get(id(row)), base)
            lines.append(_csv_row(table, row) | more)
    writer = csv.DictWriter(out, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return out.getvalue()


def _csv_row(table: Table, row: Row) -> dict[str, Any]:
    run, top1, split = row.first, row.top1, selected_on(row)
    best = row.stat("top1_best") if split else None
    mean = lambda *path: getattr(row.stat(*path), "mean", None)  # noqa: E731
    return {
        "table": table.title,
        "recipe": run.recipe,
        "dataset": run.dataset,
        "model": run.model,
        "method": row.name,
        "bits": row.bits,
        "w_bits": row.width("weight"),
        "a_bits": row.width("act"),
        "top1_mean": top1 and top1.mean,
        "top1_std": top1 and top1.std,
        "n": top1.n if top1 else 0,
        "top1_worst": top1 and top1.low,
        "top1_best_seed": top1 and top1.high,
        "top1_best_epoch": best and best.mean,
        "best_epoch_selected_on": split if best else None,
        "float_top1": mean("fp32_top1"),
        "drop": mean("drop"),
        "paper_top1": row.paper and row.paper.top1,
        "paper_bits": row.paper and row.paper.bits,
        "paper_float_top1": row.paper and row.paper.float_top1,
        "paper_drop": row.paper and row.paper.drop,
        "paper_source": row.paper and row.paper.cite,
        "paper_kind": row.paper and row.paper.kind,
        "paper_verified": row.paper and row.paper.verified,
        "difference": row.difference,
        "drop_difference": row.drop_difference,
        "w_bits_by_param": mean("bits", "weight_by_param"),
        "w_bits_by_layer": mean("bits", "weight_by_layer"),
        "w_bits_with_outer": mean("bits", "weight_with_outer"),
        "a_bits_by_layer": mean("bits", "act_by_layer"),
        "size_bytes": mean("size_bytes"),
        "bops": mean("bops"),
        "protocol": table.label,
        "protocol_hash": row.protocol_hash,
        "seeds": " ".join(str(r.seed) for r in row.counted),
        "commits": " ".join(sorted({commit for r in row.counted for commit in r.commits})),
        "flags": "; ".join(row.flags),
        "folders": " ".join(str(r.folder) for r in row.runs),
    }  # fmt: skip
