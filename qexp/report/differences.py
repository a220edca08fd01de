"""A figure of differences from one method: a panel for each width, an interval for each row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from qexp.figure import GREY, SMALL, panels, save
from qexp.report.plot import Look, Point, floor

ROW = 0.2  # inches


@dataclass(frozen=True)
class Difference:
    """Top-1 of one row over the base's, points; the interval is None for one seed."""

    name: str
    bits: str
    mean: float
    interval: tuple[float, float] | None = None


def differences(
    rows: Sequence[Difference],
    path: Path | IO[bytes],
    title: str = "",
    *,
    drawn: Mapping[str, Look],
    **save_as: Any,
) -> None:
    """Differences at each width, the best on top; hollow without an interval.

    The axis shows the means: an interval of two seeds, often twenty times as wide, is cut, and a
    few rows far below the others (`plot.floor`) stand at the border as a number.

    Args:
        path: where to; its ending is the format.
        title: above the figure.
        drawn: the look of each name.
        save_as: `format="png"` when `path` is a stream.
    """
    widths = list(dict.fromkeys(row.bits for row in rows))
    most = max(sum(row.bits == width for row in rows) for width in widths)
    columns = min(3, len(widths))
    figure, axes = panels(
        len(widths), columns=columns, width=12.0 / max(2, columns), height=1.0 + ROW * most
    )
    for axis, width in zip(axes, widths, strict=True):
        own = sorted((row for row in rows if row.bits == width), key=lambda row: row.mean)
        low, high = _range(own)
        axis.axvline(0, color=GREY, lw=1)
        for place, row in enumerate(own):
            look = drawn[row.name]
            if row.mean < low:
                text = f" \N{LEFTWARDS ARROW} {row.mean:+.1f}"
                axis.text(low, place, text, color=look.color, fontsize=SMALL, va="center")
                continue
            fill = look.color if row.interval else "white"
            axis.plot(
                row.mean, place, look.marker, color=look.color, ms=5, markerfacecolor=fill, zorder=3
            )
            if row.interval:
                axis.plot(row.interval, (place, place), color=look.color, lw=1.2)
        axis.set_xlim(low, high)
        axis.set_yticks(range(len(own)), [row.name.replace("quantizer.", "") for row in own])
        axis.set_ylim(-0.7, most - 0.3)
        axis.set_title(width, fontsize=SMALL + 1)
        axis.set_xlabel("points of top-1")
        axis.grid(alpha=0.25, axis="x")
    note = (
        "lines: 95 % intervals, cut where they leave the panel; hollow: none; arrows: further "
        "left, at the number"
    )
    save(figure, path, title, note, **save_as)


def _range(rows: Sequence[Difference]) -> tuple[float, float]:
    """The means but those far below, and 0; on either side as much again for the intervals."""
    least = floor([Point(row.name, row.bits, 0.0, row.mean) for row in rows])
    shown = [row for row in rows if least is None or row.mean >= least]
    means = [0.0, *(row.mean for row in shown)]
    ends = [end for row in shown for end in row.interval or ()]
    low, high = min(means), max(means)
    room = max(high - low, 0.2)
    reach = max(low - room, min([*ends, low])), min(high + room, max([*ends, high]))
    return reach[0] - 0.08 * room, reach[1] + 0.08 * room
