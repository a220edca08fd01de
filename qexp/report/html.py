"""The report as one HTML page: tables, figures, every row's layers and runs. Fetches nothing.

Figures are PNG inside the page. Links lead to the run folders, relative to where the page is
written, so a page committed beside its results keeps working.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from qexp.figure import number
from qexp.report import against
from qexp.report.cells import COLUMNS, NONE, cells
from qexp.report.differences import Difference, differences
from qexp.report.markdown import NOTE, WARNING, protocol_lines, relative, size, titles
from qexp.report.plot import MOST, Curve, Look, Point, learning, looks, pareto
from qexp.report.protocols import Differing, differing
from qexp.report.rows import Row, Table
from qexp.report.runs import RunRecord

TOP1 = "top-1, last epoch"  # the column whose numbers lead to their runs
FILES = ("result.json", "config.yaml", "layers.csv", "train.log")
# What accuracy is drawn against: of result.json, and the factor to the axis' unit.
COSTS = {
    "size [kB]": (("size_bytes",), 1e-3),
    "average weight bits, all layers": (("bits", "weight_with_outer"), 1.0),
    "operations of weight bit x input bit (BOPs) [G]": (("bops",), 1e-9),
}
EMPTY = "A column in which a table has nothing is left out."
STYLE = """
body { font: 13px/1.4 system-ui, sans-serif; color: #1b1b1b; margin: 2rem auto; max-width: 92rem;
       padding: 0 1.5rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .5rem; border-top: 1px solid #ddd; text-align: left;
         vertical-align: top; }
th { border-bottom: 2px solid #555; border-top: 0; font-weight: 600; vertical-align: bottom; }
td.number, th.number { text-align: right; }
td.number, td.bits { white-space: nowrap; }
td.text { min-width: 9rem; max-width: 15rem; overflow-wrap: break-word; }
.rows tr > :first-child { position: sticky; left: 0; background: #fff; }
tr.flags td { border-top: 0; padding-top: 0; color: #a03000; }
tr.failed td, .rows tr.failed > :first-child { background: #fdf1ec; }
.warning { color: #a03000; }
.note { color: #555; font-size: .9em; max-width: 75rem; overflow-wrap: anywhere; }
img { max-width: 100%; height: auto; display: block; margin: 1rem 0; }
details { margin: .3rem 0; } summary { cursor: pointer; }
.layers td { padding: .1rem .6rem; }
.bar { display: inline-block; height: .7em; background: #0072B2; margin-right: .4em; }
.bar.act { background: #009E73; } .bar.size { background: #E69F00; }
"""


def page(tables: Sequence[Table], beside: Path, base: str | None = None) -> str:
    """The whole page.

    Args:
        beside: the folder it will lie in.
        base: name of the row that the others of each table are compared with.
    """
    names = titles(tables)
    index = "".join(
        f'<li><a href="#t{i}">{escape(table.title)}</a>: {size(table)}</li>'
        for i, table in enumerate(tables)
    )
    apart = "".join(_differing(found) for found in differing(tables))
    apart = f'<p class="warning">{WARNING}</p>{apart}' if apart else ""
    sections = zip(tables, names, strict=True)
    body = "".join(_section(t, name, f"t{i}", beside, base) for i, (t, name) in enumerate(sections))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>qexp report</title><style>{STYLE}</style></head><body><h1>qexp report</h1>"
        f'<ol>{index}</ol><p class="note">{escape(NOTE)} {EMPTY}</p>{apart}{body}</body></html>\n'
    )


def _differing(found: Differing) -> str:
    head, *lines = found.lines()
    names = "".join(f"<th>{escape(name)}</th>" for name in head)
    rows = []
    for position, *values in lines:
        link = f'<td><a href="#t{int(position) - 1}">{position}</a></td>'
        rows.append(f"<tr>{link}{''.join(f'<td>{escape(value)}</td>' for value in values)}</tr>")
    return (
        f"<p><b>{escape(found.subject)}</b>: what differs</p>"
        f'<div class="wide"><table><thead><tr>{names}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _section(table: Table, name: str, anchor: str, beside: Path, base: str | None) -> str:
    notes = "<br>".join(escape(line.strip()) for line in protocol_lines(table))
    details = "".join(_details(row, beside) for row in table.rows)
    compared = "" if base is None else _compared(table, base)
    return (
        f'<h2 id="{anchor}">{escape(name)}</h2>'
        f'<div class="wide">{_table(table.rows, beside)}</div><p class="note">{notes}</p>'
        f"{compared}{_figures(table)}<h3>Layers and runs</h3>{details}"
    )


def _compared(table: Table, base: str) -> str:
    """The rows beside the table's row `base`: a figure and its numbers."""
    made = against.compare(table, base)
    kinds = [_kind(name) for name in against.COLUMNS]
    head = _cells("th", kinds, against.COLUMNS)
    lines = "".join(f"<tr>{_cells('td', kinds, against.cells(c))}</tr>" for c in made)
    rows = (
        f'<div class="wide"><table class="rows"><thead><tr>{head}</tr></thead>'
        f"<tbody>{lines}</tbody></table></div>"
    )
    shown = [Difference(c.row.name, c.row.bits, c.top1.mean, c.interval) for c in made if c.top1]
    title = f"{table.title}: top-1 over {base}"
    figure = _image(differences, shown, title, looks(d.name for d in shown)) if shown else ""
    told = "<br>".join(map(escape, against.notes(table, base, made)))
    return (
        f'<h3>Against {escape(base)}</h3>{rows if made else ""}<p class="note">{told}</p>{figure}'
    )


def _cells(tag: str, kinds: Sequence[str], texts: Sequence[str]) -> str:
    cells = zip(kinds, texts, strict=True)
    return "".join(f'<{tag} class="{kind}">{escape(text)}</{tag}>' for kind, text in cells)


def _table(rows: Sequence[Row], beside: Path) -> str:
    """The Markdown table's columns, as far as one row has something in them; flags get a line of
    their own, where they cannot be missed."""
    *texts, flags = zip(*[cells(row) for row in rows], strict=True)
    columns = {n: c for n, c in zip(COLUMNS, texts, strict=False) if {*c} != {NONE}}
    head = "".join(f'<th class="{_kind(name)}">{escape(name)}</th>' for name in columns)
    lines = []
    for i, row in enumerate(rows):
        shown = {name: escape(column[i]) for name, column in columns.items()}
        links = " ".join(_run_link(run, beside) for run in (*row.counted, *row.unfinished))
        shown[TOP1] += f" <sub>{links}</sub>"
        data = "".join(f'<td class="{_kind(n)}">{text}</td>' for n, text in shown.items())
        state = "done" if row.counted else "failed"
        lines.append(f'<tr class="{state}">{data}</tr>')
        if flags[i]:
            rest = f'<td colspan="{len(columns) - 1}">{escape(flags[i])}</td>'
            lines.append(f'<tr class="flags {state}"><td></td>{rest}</tr>')
    return (
        f'<table class="rows"><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table>'
    )


def _run_link(run: RunRecord, beside: Path) -> str:
    name = f"{run.seed}" if run.done else f"{run.state} {run.seed}"
    target = run.folder / "result.json" if run.done else run.folder
    return f'<a href="{escape(relative(target, beside))}">{escape(name)}</a>'


def _kind(column: str) -> str:
    if column in ("method", "published"):
        return "text"
    return "bits" if column == "bits" else "number"


def _figures(table: Table) -> str:
    """Only rows of the table's protocol: a figure has no room for a flag."""
    rows = [row for row in table.rows if row.top1 and row.protocol_hash not in table.others]
    rows, left_out = most_accurate(rows)
    drawn = looks(row.name for row in rows)
    charts = {label: _points(rows, path, unit) for label, (path, unit) in COSTS.items()}
    charts = {label: points for label, points in charts.items() if points}
    curves = [curve for row in rows for run in row.counted for curve in _curve(row, run)]
    parts = []
    for draw, data, what in (
        (pareto, charts, "accuracy against cost"),
        (learning, curves, "learning curves"),
    ):
        if data:
            parts.append(_image(draw, data, f"{table.title}: {what}{left_out}", drawn))
    return "".join(parts)


def most_accurate(rows: Sequence[Row]) -> tuple[list[Row], str]:
    """The rows of as many names as a figure can tell apart, and a note of those left out."""
    best: dict[str, float] = {}
    for row in rows:
        best[row.name] = max(best.get(row.name, 0.0), row.top1.mean if row.top1 else 0.0)
    kept = {*sorted(best, key=lambda name: -best[name])[:MOST], "fp32"}
    left = len(best.keys() - kept)
    note = f" ({len(best) - left} most accurate of {len(best)} methods)" if left else ""
    return [row for row in rows if row.name in kept], note


def _points(rows: Sequence[Row], path: Sequence[str], unit: float) -> list[Point]:
    """The quantized rows; float is far to the right and would press the rest together."""
    points = []
    for row in rows:
        cost, top1 = row.stat(*path), row.top1
        if cost and top1 and not row.first.is_float:
            points.append(Point(row.name, row.bits, cost.mean * unit, top1.mean, top1.std))
    return points


def _curve(row: Row, run: RunRecord) -> list[Curve]:
    epochs = [e for e in run.epochs() if isinstance(e.get("top1"), (int, float))]
    if not epochs:
        return []
    return [Curve(row.name, row.bits, [e["epoch"] for e in epochs], [e["top1"] for e in epochs])]


def _image(draw: Callable[..., None], data: Any, title: str, drawn: Mapping[str, Look]) -> str:
    out = io.BytesIO()
    draw(data, out, title, drawn=drawn, format="png")
    code = base64.b64encode(out.getvalue()).decode()
    return f'<img alt="{escape(title)}" src="data:image/png;base64,{code}">'


def _details(row: Row, beside: Path) -> str:
    """A row's runs with their files, and the layers of the first run that has them."""
    runs = "".join(_run_line(run, beside) for run in row.runs)
    layers = next((rows for rows in (run.layers() for run in row.counted) if rows), [])
    title = f"{row.name}, {row.bits}: {len(row.runs)} run{'s' if len(row.runs) > 1 else ''}"
    return (
        f"<details><summary>{escape(title)}</summary><ul>{runs}</ul>"
        f"{_layer_table(layers) if layers else ''}</details>"
    )


def _run_line(run: RunRecord, beside: Path) -> str:
    files = [
        f'<a href="{escape(relative(run.folder / name, beside))}">{name}</a>'
        for name in FILES
        if (run.folder / name).is_file()
    ]
    top1 = f"top-1 {run.result['top1']:.2f}, " if run.done else ""
    commit = f"commit {str(run.result['commit'])[:10]}, " if run.result.get("commit") else ""
    error = f" {run.error}" if run.error else ""
    told = escape(f"seed {run.seed}: {run.state}{error}, {top1}{commit}")
    return f"<li>{told}{' '.join(files)}</li>"


def _layer_table(rows: Sequence[Mapping[str, str]]) -> str:
    """layers.csv with bars: bits of weights and inputs, bytes, as shares of the largest."""
    bars = {"w_bits": "", "a_bits": " act", "size_bytes": " size"}
    most = {key: max((number(row.get(key)) or 0.0) for row in rows) or 1.0 for key in bars}
    lines = []
    for row in rows:
        data = []
        for key, text in row.items():
            bar = ""
            if key in bars:
                width = 6 * (number(text) or 0.0) / most[key]
                bar = f'<span class="bar{bars[key]}" style="width:{width:.2f}em"></span>'
            data.append(f"<td>{bar}{escape(text or '')}</td>")
        lines.append(f"<tr>{''.join(data)}</tr>")
    head = "".join(f"<th>{escape(name)}</th>" for name in rows[0])
    return (
        f'<div class="wide"><table class="layers"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )
