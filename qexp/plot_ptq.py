"""Figures of a post-training run: what reconstruction gained, and how rounding was decided."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qexp.figure import BLUE, GREEN, GREY, ORANGE, SMALL, label, legend, panels, save

MAX_PANELS = 24


def draw(units: Sequence[Mapping[str, Any]], folder: Path, title: str) -> None:
    """All figures that the rows of a run's units have data for, into `folder`."""
    if units:
        reconstruction(units, folder / "reconstruction.png", f"{title}: error of each unit")
        rounding(units, folder / "rounding.png", f"{title}: learning of each unit")


def reconstruction(units: Sequence[Mapping[str, Any]], path: Path, title: str = "") -> None:
    """Held-out error of each unit before and after it is learned, and what is decided.

    Args:
        units: in order, as `reconstruct_unit` returns them: `unit`, `pass`, `error_before`,
            `error` (relative), `converged` (share, or None).
        path: where to; its ending is the format.
        title: above the figure.
    """
    width = max(5.5, 0.42 * len(units) + 1.8)
    figure, (top, foot) = panels(2, columns=1, width=width, height=2.3)
    place = np.arange(len(units))
    for key, color, shift, name in (
        ("error_before", GREY, -0.2, "before it is learned"),
        ("error", BLUE, 0.2, "after"),
    ):
        heights = [max(float(row[key]), 1e-8) for row in units]
        top.bar(place + shift, heights, width=0.4, color=color, label=name)
    top.set_yscale("log")
    top.set(ylabel="|y - y_float|^2 / |y_float|^2")
    top.set_xticks(place, [""] * len(units))
    top.legend(frameon=False, fontsize=SMALL, ncols=2, loc="lower left", bbox_to_anchor=(0, 1))
    shares = [100 * (row["converged"] or 0.0) * (row["pass"] == "rounding") for row in units]
    bars = foot.bar(place, shares, width=0.7, color=GREEN)
    foot.bar_label(bars, [f"{v:.0f}" if v else "" for v in shares], fontsize=6, padding=1)
    foot.set(ylabel="roundings decided, %", ylim=(0, 108))
    foot.set_xticks(place, [_name(row) for row in units], rotation=90)
    top.set_xlim(foot.get_xlim())
    save(figure, path, title or "Error of each unit", "on held-out images")


def rounding(units: Sequence[Mapping[str, Any]], path: Path, title: str = "") -> None:
    """Loss and decided roundings of each unit over its iterations.

    Args:
        units: as for `reconstruction`, with `trace`: `loss` and `decided` at equal parts.
        path, title: as there.
    """
    every = max(1, -(-len(units) // MAX_PANELS))
    shown = units[::every]
    figure, axes = panels(len(shown))
    for axis, row in zip(axes, shown, strict=True):
        loss, decided = (np.asarray(row["trace"][k], float) for k in ("loss", "decided"))
        progress = row["iterations"] * np.arange(1, len(loss) + 1) / len(loss)
        axis.plot(progress, loss / max(float(loss.max()), 1e-30), color=ORANGE, linewidth=1.2)
        if row["pass"] == "rounding" and len(decided):
            axis.plot(progress, decided, color=GREEN, linewidth=1.2)
        axis.set_title(_name(row), fontsize=SMALL)
        axis.set_ylim(0, 1.05)
        axis.grid(alpha=0.25)
    label(figure, axes, "iteration", "share")
    legend(
        figure,
        ("-", ORANGE, "reconstruction loss / its largest value"),
        ("-", GREEN, "roundings at 0 or 1"),
    )
    note = "" if every == 1 else f"{len(shown)} of {len(units)} units"
    save(figure, path, title or "Learning of each unit", note)


def _name(row: Mapping[str, Any]) -> str:
    return str(row["unit"]) + (" (after)" if row["pass"] == "steps" else "")
