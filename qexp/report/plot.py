"""Figures of tables of runs: accuracy against cost, learning curves.

A name keeps one colour, one marker and one line style in all figures of a table, over all widths:
`looks` gives them out, no two alike. The legend lies below the panels, in room of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path
from typing import IO, Any

from qexp.figure import DPI, GREY, PALETTE, SMALL, panels, title_

MARKERS = "osD^vP*X"
LINES = ("-", "--", ":", "-.")
MOST = len(PALETTE) * len(LINES)  # names that a figure can tell apart
BANDED = 9  # names whose bands over seeds can be told apart
LETTER = 0.62 * SMALL  # width of a letter in points, about
LEGEND_ROW = 0.18  # inches
# Where the label of a point may stand: offset in points, and the side it is aligned to.
BESIDE = ((-5, 4, "right"), (5, -10, "left"), (5, 4, "left"), (-5, -10, "right"))
# The same above the lower border: as near as there is room.
ABOVE = tuple((x, 6 + 9 * row, side) for row in range(8)
              for x, side in ((0, "center"), (5, "left"), (-5, "right")))  # fmt: skip
FEW = 1 / 3  # at most so many of the points may lie below the axis


@dataclass(frozen=True)
class Look:
    """How one name is drawn."""

    color: str
    marker: str
    line: str


@dataclass(frozen=True)
class Point:
    """One row of a table: its cost, its mean top-1 (percent), the deviation over seeds."""

    name: str
    bits: str
    cost: float
    top1: float
    std: float | None = None


@dataclass(frozen=True)
class Curve:
    """Test top-1 (percent) of one run over its epochs; the runs of a name and width are seeds."""

    name: str
    bits: str
    epochs: Sequence[int]
    top1: Sequence[float]


def looks(names: Iterable[str]) -> dict[str, Look]:
    """The look of each name, by the names' order in the alphabet; float is grey."""
    found = {
        name: Look(
            PALETTE[i % len(PALETTE)],
            MARKERS[(i + i // len(PALETTE)) % len(MARKERS)],
            LINES[i // len(PALETTE) % len(LINES)],
        )
        for i, name in enumerate(sorted({*names} - {"fp32"}))
    }
    return {**found, "fp32": Look(GREY, "o", "-")}


def front(points: Sequence[Point]) -> list[Point]:
    """The points that no other one beats: none is both cheaper and at least as accurate."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda p: (p.cost, -p.top1)):
        if not kept or point.top1 > kept[-1].top1:
            kept.append(point)
    return kept


def floor(points: Sequence[Point]) -> float | None:
    """Where the axis of top-1 begins if a few points lie so far below the others that these
    would share less than half of it; None where all have room. In percent."""
    tops = sorted(p.top1 for p in points)
    gaps = [(high - low, i + 1) for i, (low, high) in enumerate(pairwise(tops))]
    widest, below = max(gaps, default=(0.0, 0))
    if not below or 2 * widest <= tops[-1] - tops[0] or below > FEW * len(tops):
        return None
    lows = [p.top1 - (p.std or 0.0) for p in points if p.top1 >= tops[below]]
    return max(min(lows) - 0.15 * (tops[-1] - min(lows)), tops[below - 1])


def pareto(
    charts: Mapping[str, Sequence[Point]],
    path: Path | IO[bytes],
    title: str = "",
    *,
    drawn: Mapping[str, Look] | None = None,
    **save_as: Any,
) -> None:
    """Mean top-1 against each cost, one panel a cost, the Pareto front as a line.

    Points below the `floor` stand hollow at the lower border, with their top-1.

    Args:
        charts: by the label of the cost's axis, with its unit.
        path: where to; its ending is the format.
        title: above the figure.
        drawn: the looks of the names; given out anew if None.
        save_as: `format="png"` when `path` is a stream.
    """
    names = dict.fromkeys(p.name for points in charts.values() for p in points)
    drawn = drawn or looks(names)
    columns = min(3, len(charts))
    figure, axes = panels(len(charts), columns=columns, width=10.8 / max(2, columns), height=3.9)
    handles: dict[str, Any] = {}
    cut = False
    for axis, (cost, points) in zip(axes, charts.items(), strict=True):
        best, low = front(points), floor(points)
        axis.plot([p.cost for p in best], [p.top1 for p in best], color=GREY, lw=1, zorder=1)
        for name in names:
            own = [p for p in points if p.name == name]
            if own:
                handles[name] = axis.errorbar(
                    [p.cost for p in own], [p.top1 for p in own], yerr=[p.std or 0.0 for p in own],
                    fmt=drawn[name].marker, color=drawn[name].color, ms=5, elinewidth=0.8,
                )  # fmt: skip
        axis.margins(x=0.1, y=0.1)
        if low is not None:
            cut = True
            high = max(p.top1 + (p.std or 0.0) for p in points)
            axis.set_ylim(low, high + 0.1 * (high - low))
            _stand_at_border(axis, [p for p in points if p.top1 < low], drawn)
        axis.set(xlabel=cost, ylabel="top-1 [%]")
        axis.grid(alpha=0.25)
    _legend(figure, handles)
    note = "grey: Pareto front; bars: deviation over seeds, none for one"
    title_(figure, title, note + "; hollow: below the axis, at the number beside it" * cut)
    figure.draw_without_rendering()  # places of points are final from here
    for axis, points in zip(axes, charts.values(), strict=True):
        low = axis.get_ylim()[0]
        label_below(axis, [p for p in points if p.top1 < low])
        label_front(axis, [p for p in front(points) if p.top1 >= low])
    figure.savefig(path, dpi=DPI, **save_as)


def _stand_at_border(axis: Any, points: Sequence[Point], drawn: Mapping[str, Look]) -> None:
    """Draw `points`, which lie below the axis, as hollow marks where it begins."""
    low = axis.get_ylim()[0]
    for point in points:
        axis.plot(
            point.cost, low, drawn[point.name].marker, color=drawn[point.name].color, ms=5,
            markerfacecolor="white", clip_on=False, zorder=3,
        )  # fmt: skip


def label_below(axis: Any, points: Sequence[Point]) -> None:
    """Write the top-1 (percent) of `points` above the marks at the lower border."""
    low = axis.get_ylim()[0]
    for cost, same in groupby(sorted(points, key=lambda p: (p.cost, p.top1)), lambda p: p.cost):
        label = ", ".join(f"{p.top1:.1f}" for p in same)
        _write(axis, label, (cost, low), ABOVE)


def label_front(axis: Any, points: Sequence[Point]) -> list[str]:
    """Write the bits beside the best point of each width, where no other label stands.

    Returns:
        all labels of the panel.
    """
    best = {point.bits: point for point in points}  # the last of a width is its most accurate
    for point in sorted(best.values(), key=lambda p: -p.top1):
        _write(axis, point.bits, (point.cost, point.top1), BESIDE)
    return [text.get_text() for text in axis.texts]


def _write(
    axis: Any, text: str, at: tuple[float, float], places: Sequence[tuple[int, int, str]]
) -> None:
    """Write `text` at one of `places` around the point `at`: where no text stands, over as few
    marks as can be, the first of such places; nowhere if there is none."""
    unit = axis.figure.dpi / 72  # pixels in a point
    inside = axis.get_window_extent()
    taken = [t.get_window_extent().extents for t in axis.texts]
    x, y = axis.transData.transform(at)
    marks = [
        mark
        for line in axis.lines
        if line.get_marker() not in ("None", "", None)
        for mark in axis.transData.transform(line.get_xydata())
    ]
    wide, high = LETTER * len(text) * unit, SMALL * unit
    free: list[tuple[int, tuple[int, int, str]]] = []
    for right, up, side in places:
        left = x + right * unit - wide * {"left": 0.0, "center": 0.5, "right": 1.0}[side]
        low = y + up * unit
        box = (left, low, left + wide, low + high)
        if left < inside.x0 or box[2] > inside.x1 or any(_meet(box, b) for b in taken):
            continue
        near = 2 * unit  # what a mark has around its middle
        over = [_meet(box, (mx - near, my - near, mx + near, my + near)) for mx, my in marks]
        free.append((sum(over), (right, up, side)))
    if free:
        _, (right, up, side) = min(free, key=lambda place: place[0])
        axis.annotate(
            text, at, textcoords="offset points", xytext=(right, up), ha=side,
            fontsize=SMALL - 1, color="#444444",
        )  # fmt: skip


def _meet(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def learning(
    curves: Sequence[Curve],
    path: Path | IO[bytes],
    title: str = "",
    *,
    drawn: Mapping[str, Look] | None = None,
    **save_as: Any,
) -> None:
    """Test top-1 over epochs, one panel for each width; the mean over seeds and their span."""
    groups: dict[tuple[str, str], list[Curve]] = {}
    for curve in curves:
        groups.setdefault((curve.bits, curve.name), []).append(curve)
    widths = list(dict.fromkeys(bits for bits, _ in groups))
    drawn = drawn or looks(curve.name for curve in curves)
    columns = len(widths) if len(widths) < 5 else 3
    figure, axes = panels(len(widths), columns=columns, width=10.8 / columns, height=3.6)
    handles: dict[str, Any] = {}
    banded = len(drawn) <= BANDED
    for axis, width in zip(axes, widths, strict=True):
        for (bits, name), own in groups.items():
            if bits != width:
                continue
            epochs = sorted(set.intersection(*(set(curve.epochs) for curve in own)))
            seeds = [[dict(zip(c.epochs, c.top1, strict=True))[e] for e in epochs] for c in own]
            mean = [sum(values) / len(values) for values in zip(*seeds, strict=True)]
            look = drawn[name]
            mark = look.marker if len(epochs) < 4 else None
            (handles[name],) = axis.plot(
                epochs, mean, look.line, color=look.color, lw=1.3, marker=mark, ms=4
            )
            if len(seeds) > 1 and banded:
                low, high = ([f(v) for v in zip(*seeds, strict=True)] for f in (min, max))
                axis.fill_between(epochs, low, high, color=look.color, alpha=0.12, lw=0)
        axis.set_title(width, fontsize=SMALL + 1)
        axis.set_xlabel("epoch")
        axis.locator_params(axis="x", integer=True)
        axis.grid(alpha=0.25)
    figure.supylabel("test top-1 [%]", fontsize=SMALL)
    _legend(figure, handles)
    title_(figure, title, "lines: mean over seeds" + "; bands: least to greatest" * banded)
    figure.savefig(path, dpi=DPI, **save_as)


def _legend(figure: Any, handles: Mapping[str, Any]) -> None:
    """All names below the panels, in as many columns as fit; the figure grows by their rows."""
    names = sorted(handles)
    shown = [name.replace("quantizer.", "") for name in names]
    widest = (max(map(len, shown), default=0) * LETTER + 5 * SMALL) / 72
    columns = max(1, min(len(shown), int(figure.get_figwidth() / widest)))
    figure.set_figheight(figure.get_figheight() + LEGEND_ROW * -(-len(shown) // columns))
    figure.legend(
        [handles[name] for name in names], shown, loc="outside lower center", ncols=columns,
        frameon=False, fontsize=SMALL,
    )  # fmt: skip
