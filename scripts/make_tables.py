"""Rebuild the result tables of README.md and docs/results.md from `results/`.

    python scripts/make_tables.py            rewrites both
    python scripts/make_tables.py --check    exits 1 when one is not what results/ say

A table lies between `<!-- table:NAME -->` and `<!-- /table -->` and shows the runs below
`results/NAME/`: a row a method, a column a bit-width, one table a protocol. With `full` after the
name it has the columns of `qexp report` instead. `results/NAME/command.txt` holds the command that
made the runs. Every number links to its run's folder; what was not run says `missing`, mixed widths
that were not `n/a`. With `against METHOD` after the name it shows the differences from that row, as
`qexp report --against`, where two seeds or more have both.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qexp.errors import QexpError
from qexp.report import against
from qexp.report.cells import cited, show
from qexp.report.markdown import markdown, markdown_row
from qexp.report.papers import Paper, read_papers
from qexp.report.protocols import is_start, value_of, varying
from qexp.report.rows import Row, Table
from qexp.report.runs import read_runs
from qexp.report.tables import make_tables

MARK = re.compile(
    r"<!-- table:(?P<name>[\w./-]+)(?P<form> full| against \S+)? -->\n.*?<!-- /table -->",
    re.DOTALL,
)
# Of the protocol, what a reader of the README needs; its hash stands for all of it.
TOLD = ("start", "recipe", "epochs", "batch_size", "optimizer", "lr", "schedule", "amp", "images",
        "iterations", "first_last", "distill.weight", "bn_reestimate")  # fmt: skip
COUNTED = re.compile(r"([^:]+): (\d+)(?: in \d+ runs)?")  # a flag that is a sum
MISSING = "missing"
MIXED = "mixed"  # column of the rows without one width
PAGES = ("README.md", "docs/results.md")


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    parser.add_argument("--root", type=Path, default=Path(__file__).parents[1])
    given = parser.parse_args(argv)
    stale = 0
    try:
        others = [name for name in PAGES[1:] if (given.root / name).is_file()]
        for page in (given.root / name for name in (PAGES[0], *others)):
            old = page.read_text()
            new = rebuild(old, given.root, page.parent)
            name = page.relative_to(given.root)
            if new == old:
                print(f"{name}: {len(MARK.findall(new))} tables")
            elif given.check:
                stale = 1
                print(
                    f"make_tables: {name} differs from results/. Run: make table", file=sys.stderr
                )
            else:
                page.write_text(new)
                print(f"{name}: {len(MARK.findall(new))} tables, rewritten")
    except (OSError, QexpError) as error:
        print(f"make_tables: {error}", file=sys.stderr)
        return 1
    return stale


def rebuild(text: str, root: Path, start: Path | None = None) -> str:
    """`text` with every marked table made anew from `root/results`.

    Args:
        start: the folder of the page, from which links lead; `root` if None.
    """
    papers = read_papers(root / "results" / "papers.csv")

    def table(match: re.Match[str]) -> str:
        form = match["form"] or ""
        body = render(root, match["name"], papers, start or root, form.strip())
        return f"<!-- table:{match['name']}{form} -->\n{body}\n<!-- /table -->"

    return MARK.sub(table, text)


def render(root: Path, name: str, papers: Sequence[Paper], start: Path, form: str = "") -> str:
    """The Markdown of one marked table; `form` is empty, `full`, or `against METHOD`."""
    folder = root / "results" / name
    tables = make_tables(read_runs([folder]), papers)
    if form == "full":
        return markdown(tables, beside=start).strip()
    if form:
        base = form.partition(" ")[2]
        against.check_known(tables, base)
        return "\n\n".join(found for table in tables if (found := seed_by_seed(table, base)))
    apart = [key for key in varying(tables) if key not in (*TOLD, "act_sample")]
    parts = [pivot(table, start, apart) for table in tables]
    command = folder / "command.txt"
    if command.is_file():
        parts.append(f"Made by:\n\n```\n{command.read_text().strip()}\n```")
    return "\n\n".join(parts)


def pivot(table: Table, start: Path, apart: Sequence[str] = ()) -> str:
    """Methods down, bit-widths across, with the float networks and the protocol above.

    Args:
        apart: keys of the protocol in which the tables of one folder differ.
    """
    quantized = [row for row in table.rows if not row.first.is_float] or table.rows
    widths = sorted(dict.fromkeys(map(column, quantized)), key=MIXED.__eq__)  # MIXED is the last
    names = sorted({row.name for row in quantized})
    papers = [row for row in quantized if row.paper]
    head = ["method", *widths, *(["published"] if papers else [])]
    lines = [headline(table, start, apart), "", markdown_row(head), "|" + " --- |" * len(head)]
    for name in names:
        own = [row for row in quantized if row.name == name]
        cells = ("; ".join(cell(r, start) for r in own if column(r) == w) for w in widths)
        absent = ("n/a" if w == MIXED else MISSING for w in widths)
        texts = [text or none for text, none in zip(cells, absent, strict=True)]
        quoted = "; ".join(f"{r.bits} {r.paper.top1:g}" for r in own if r.paper)
        lines.append(markdown_row([name, *texts, *([quoted or "n/a"] if papers else [])]))
    notes = dict.fromkeys(f"{row.first.method} {row.bits} {cited(row.paper)}" for row in papers)
    if notes:
        lines += ["", f"Published: {'; '.join(notes)}."]
    shown = [row for row in table.rows if row in quantized or not is_start(row, table.protocol)]
    if flags := flagged(shown):
        lines += ["", "Flags:", "", *flags]
    if len(table.commits) > 1:
        lines += ["", f"Code at {len(table.commits)} commits: {', '.join(table.commits)}."]
    return "\n".join(lines)


def seed_by_seed(table: Table, base: str) -> str:
    """The differences from row `base` that have an interval; empty where none has."""
    made = [c for c in against.compare(table, base) if c.interval]
    if not made:
        return ""
    note = f"**{table.subject}**, protocol `{table.protocol_hash}`, against {base}. {against.NOTE}"
    columns = [markdown_row(against.COLUMNS), "|" + " --- |" * len(against.COLUMNS)]
    return "\n".join([note, "", *columns, *(markdown_row(against.cells(c)) for c in made)])


def flagged(rows: Sequence[Row]) -> list[str]:
    """`* 2 commits: adq W4A4; lsq W3A3, W2A2`, a line a flag; what was counted stands at its cell.

    Protocols are left out, a table holds but one.
    """
    found: dict[str, dict[str, list[str]]] = {}
    for row in rows:
        for flag in row.flags:
            if flag.startswith("protocol differs"):
                continue
            counted = COUNTED.fullmatch(flag)
            kind, number = counted.groups() if counted else (flag, "")
            cells = found.setdefault(kind, {}).setdefault(row.name, [])
            cells.append(f"{row.bits} {number}".strip())
    return [
        f"* {kind}: " + "; ".join(f"{name} {', '.join(cells)}" for name, cells in of.items())
        for kind, of in found.items()
    ]


def headline(table: Table, start: Path, apart: Sequence[str] = ()) -> str:
    """`cifar10, resnet20: 10 epochs, ...; float start 91.73; float trained on 92.00 ± 0.10.`"""
    told = ", ".join(f"{key} {table.protocol[key]}" for key in TOLD if key in table.protocol)
    told += "".join(f", {key} {value_of(table.protocol, key)}" for key in apart)
    starts = [row.stat("fp32_top1") for row in table.rows if not row.first.is_float]
    lows = [stat.low for stat in starts if stat]
    highs = [stat.high for stat in starts if stat]
    if any(not row.first.is_float and row.counted for row in table.rows):
        told += f", calibrated on {sampled(table.protocol)}"
    parts = [f"**{table.subject}** (protocol `{table.protocol_hash or 'unknown'}`): {told}"]
    if lows:
        same = f"{min(lows):.2f}" == f"{max(highs):.2f}"
        parts.append(f"float start {min(lows):.2f}" + ("" if same else f" to {max(highs):.2f}"))
    controls = [
        cell(row, start)
        for row in table.rows
        if row.first.is_float and not is_start(row, table.protocol)
    ]
    if controls and lows:
        parts.append(f"float trained with the same schedule {', '.join(controls)}")
    return "; ".join(parts) + ". Top-1 in percent, last epoch, mean ± deviation over linked seeds."


def sampled(protocol: Mapping[str, Any]) -> str:
    """Which elements of the calibration images set activation steps."""
    how = value_of(protocol, "act_sample")
    return {"random": "random elements", "stride": "elements at a stride"}[how]


def column(row: Row) -> str:
    """`W4A4`, or MIXED for a row without one width."""
    return row.bits if row.first.uniform else MIXED


def cell(row: Row, start: Path) -> str:
    """The number, linked to its run; of several seeds, each seed is linked."""
    width = "" if row.first.uniform else f"{row.bits}: "
    if not row.top1:
        run = row.first
        return f"{width}[{run.state}]({_link(run.folder, start)})"
    links = [f"[{r.seed}]({_link(r.folder, start)})" for r in row.counted]
    if len(links) == 1:
        text = f"[{show(row.top1)}]({_link(row.first.folder, start)})"
    else:
        text = f"{show(row.top1)} <sub>{' '.join(links)}</sub>"
    lost = f" ({len(row.unfinished)} more not done)" if row.unfinished else ""
    return f"{width}{text}{lost}"


def _link(folder: Path, start: Path) -> str:
    return Path(os.path.relpath(folder, start)).as_posix()


if __name__ == "__main__":
    sys.exit(main())
