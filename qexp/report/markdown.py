"""The report as GitHub Markdown: contents, where protocols differ, a table for each protocol."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from qexp.report import against
from qexp.report.cells import COLUMNS, cells
from qexp.report.protocols import Differing, brief, differing
from qexp.report.rows import Row, Table

WARNING = "Rows of different tables ran under different protocols: do not compare them."
RUNS = "runs by seed"
NOTE = (
    "top-1 in percent on the test split at the last epoch, mean ± sample standard deviation over "
    "n seeds; drop = float - ours."
)


def markdown(tables: Sequence[Table], base: str | None = None, beside: Path | None = None) -> str:
    """All tables, with the protocols below each; contents first where there are several.

    Args:
        base: name of the row that the others of each table are compared with.
        beside: the folder it will lie in, from which links lead; the current one if None.
    """
    names = titles(tables)
    parts = [contents(tables)] if len(tables) > 1 else []
    if apart := differing(tables):
        parts += [WARNING, *map(_differing, apart)]
    for table, name in zip(tables, names, strict=True):
        told = [[*cells(row), run_links(row, beside or Path())] for row in table.rows]
        lines = [f"## {plain(name)}", "", *_table((*COLUMNS, RUNS), told)]
        parts.append("\n".join([*lines, "", *map(plain, protocol_lines(table))]))
        if base is not None:
            parts.append(compared(table, base))
    return "\n\n".join([*parts, NOTE]) + "\n"


def compared(table: Table, base: str) -> str:
    """The rows of a table beside its row `base` (`against`)."""
    made = against.compare(table, base)
    shown = [*_table(against.COLUMNS, [against.cells(c) for c in made]), ""] if made else []
    notes = map(plain, against.notes(table, base, made))
    return "\n".join([f"### Against {plain(base)}", "", *shown, *notes])


def titles(tables: Sequence[Table]) -> list[str]:
    """The headings, numbered where there are several."""
    if len(tables) == 1:
        return [tables[0].title]
    return [f"{i}. {table.title}" for i, table in enumerate(tables, start=1)]


def size(table: Table) -> str:
    """`12 rows, 36 runs`."""
    runs = sum(len(row.runs) for row in table.rows)
    words = [(len(table.rows), "row"), (runs, "run")]
    return ", ".join(f"{n} {word}{'' if n == 1 else 's'}" for n, word in words)


def contents(tables: Sequence[Table]) -> str:
    """A numbered list of the headings, linked as GitHub names them."""
    lines = []
    for i, (table, name) in enumerate(zip(tables, titles(tables), strict=True), start=1):
        anchor = re.sub(r"[^\w\- ]", "", name.lower()).replace(" ", "-")
        lines.append(f"{i}. [{plain(table.title)}](#{anchor}): {size(table)}")
    return "\n".join(["## Tables", "", *lines])


def _differing(found: Differing) -> str:
    head, *lines = found.lines()
    return "\n".join([f"{plain(found.subject)}: what differs", "", *_table(head, lines)])


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    return [markdown_row(head), "|" + " --- |" * len(head), *map(markdown_row, lines)]


def markdown_row(texts: Sequence[str]) -> str:
    """One line of a Markdown table."""
    return "| " + " | ".join(_cell(text) for text in texts) + " |"


def _cell(text: str) -> str:
    """Safe inside a Markdown table."""
    return plain(text).replace("|", "\\|")


def plain(text: str) -> str:
    """One line in which nothing is a tag, as in an error that quotes `<class 'int'>`."""
    return " ".join(re.sub(r"<(?!/?sub>)", "&lt;", text).splitlines())


def run_links(row: Row, beside: Path) -> str:
    """`[0](folder) [1](folder)`: each seed's run, with its config and result; `failed 2` of one
    that is not done."""
    named = [(f"{run.seed}", run) for run in row.counted]
    named += [(f"{run.state} {run.seed}", run) for run in row.unfinished]
    return " ".join(f"[{name}]({relative(run.folder, beside)})" for name, run in named)


def relative(path: Path, beside: Path) -> str:
    """A link to `path` in a page that lies in the folder `beside`."""
    return quote(Path(os.path.relpath(path.resolve(), beside.resolve())).as_posix())


def protocol_lines(table: Table) -> list[str]:
    """The table's protocol in one line, and one line for each that differs."""
    common = " ".join(f"{key}={brief(value)}" for key, value in table.protocol.items())
    lines = [f"Protocol {table.protocol_hash or 'unknown'}: {common or 'no finished run'}."]
    for other, keys in table.others.items():
        changed = ", ".join(
            f"{k}: {brief(theirs)} instead of {brief(ours)}" for k, (ours, theirs) in keys.items()
        )
        lines.append(f"Protocol {other} differs, do not compare: {changed}.")
    if table.commits:
        several = f" ({len(table.commits)} of them)" if len(table.commits) > 1 else ""
        lines.append(f"Code at {', '.join(table.commits)}{several}.")
    return [f"{line}  " for line in lines[:-1]] + lines[-1:]
