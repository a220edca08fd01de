"""The canvas that all figures share: panels, labels, one legend, one way to save. No window."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS = 4
DPI = 130
SMALL = 8  # points
# Okabe and Ito's palette: distinct for colour-blind readers, and in grey.
BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#8a8a8a"
PALETTE = (BLUE, RED, GREEN, ORANGE, "#CC79A7", "#56B4E9", "#5a3d8a", "#7a5c2e", "#000000")


def panels(
    count: int, *, columns: int = COLUMNS, width: float = 3.1, height: float = 2.15
) -> tuple[Figure, list[Axes]]:
    """A figure of `count` equal panels, `width` x `height` inches each; no window, no backend."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    columns = max(1, min(columns, count))
    rows = max(1, -(-count // columns))
    style: dict[Any, Any] = {
        "font.size": SMALL,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with rc_context(style):
        size = (max(width * columns, 4.5), height * rows + 0.7)
        figure = Figure(figsize=size, layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False)
    axes: list[Axes] = list(grid.flat)
    for unused in axes[count:]:
        unused.remove()
    return figure, axes[:count]


def label(figure: Figure, axes: Sequence[Axes], x: str, y: str) -> None:
    """Labels at the lowest panel of each column, and once at the left."""
    for axis in axes[-COLUMNS:]:
        axis.set_xlabel(x)
    figure.supylabel(y, fontsize=SMALL)


def legend(figure: Figure, *entries: tuple[Any, str, str]) -> None:
    """One legend for all panels, below them."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = []
    for style, color, label in entries:
        if style == "fill":
            handles.append(Patch(color=color, alpha=0.5, label=label))
        elif style in ("^", "|", "o"):
            handles.append(Line2D([], [], color=color, marker=style, linestyle="", label=label))
        else:
            handles.append(Line2D([], [], color=color, linestyle=style, label=label))
    columns = len(handles) if figure.get_figwidth() > 8 else 2
    figure.legend(
        handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=SMALL
    )


def save(
    figure: Figure, path: Path | IO[bytes], title: str, note: str = "", **save_as: Any
) -> None:
    """Write `figure` with a title and a note below it; the path's ending is the format, or
    `format=` of `save_as` for a stream."""
    title_(figure, title, note)
    figure.savefig(path, dpi=DPI, **save_as)


def title_(figure: Figure, title: str, note: str = "") -> None:
    """A title, broken into lines that fit the figure, and a note below it."""
    letters = int(figure.get_figwidth() * 72 / (0.55 * (SMALL + 1)))
    lines = [line for text in (title, note) for line in textwrap.wrap(text, letters)]
    figure.suptitle("\n".join(lines), fontsize=SMALL + 1)


def flat(values: Any) -> np.ndarray:
    """A float array of one axis, of the finite values; a single zero when there is none."""
    every = array(values).ravel()
    finite = every[np.isfinite(every)]
    return finite if finite.size else np.zeros(1)


def span(values: np.ndarray) -> tuple[float, float]:
    """Where nearly all of `values` lie: 0.05th to 99.95th percentile, never empty."""
    low, high = np.percentile(values, [0.05, 99.95])
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def array(values: Any) -> np.ndarray:
    """A float array of what may be a tensor on any device, without importing torch."""
    if hasattr(values, "detach"):
        values = values.detach().float().cpu().numpy()
    return np.asarray(values, dtype=float)


def number(value: Any) -> float | None:
    """A CSV cell or a number as float; None for what is empty or missing."""
    return None if value is None or value == "" else float(value)
