"""Figures of a run: what was learned, and where the levels went.

One function, one figure, one file; the file's ending picks the format (PNG, SVG, PDF). Data comes
in as plain rows, arrays or tensors, gathered by whoever has them; nothing here knows a network, a
quantizer or a run's folder. Figures of tables of runs are in `report/plot.py`.

A figure shows at most `MAX_PANELS` layers, evenly spaced over the depth, and says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qexp.figure import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    RED,
    SMALL,
    array,
    flat,
    label,
    legend,
    number,
    panels,
    save,
    span,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_PANELS = 24
MAX_LINES = 16  # more levels than this are drawn as ticks at the foot of a panel


@dataclass(frozen=True)
class WeightPlot:
    """A layer's weights before and after training. Levels: sorted, [L] or per channel [C, L].

    Where nothing was trained, `before` and `levels_before` are None.
    """

    name: str
    before: Any
    after: Any
    levels_before: Any
    levels_after: Any
    bits: float


@dataclass(frozen=True)
class ActivationPlot:
    """A layer's input: values of any shape; thresholds [L-1] and levels [L], sorted."""

    name: str
    values: Any
    thresholds: Any
    levels: Any
    bits: float


@dataclass(frozen=True)
class FactorPlot:
    """Per-sample factors [N] of an adaptive step."""

    name: str
    factors: Any


@dataclass(frozen=True)
class TrajectoryPlot:
    """A codebook over training: epochs [T], levels [T, L]."""

    name: str
    epochs: Any
    levels: Any


def curves(rows: Sequence[Mapping[str, Any]], path: Path, title: str = "") -> None:
    """Loss, top-1 and learning rate per epoch.

    Args:
        rows: one an epoch: `epoch` and `loss`; where known `top1`, `train_top1`, `val_top1`
            (percent), `test_loss`, `lr`.
        path: where to; its ending is the format.
        title: above the figure.
    """
    figure, axes = panels(3, columns=3, width=4.0, height=3.2)
    lines = (
        (("loss", "train", BLUE), ("test_loss", "test", RED)),
        (("train_top1", "train", BLUE), ("val_top1", "validation", GREEN), ("top1", "test", RED)),
        (("lr", "weights", GREY),),
    )
    labels = ("loss [nats]", "top-1 [%]", "learning rate")
    for axis, keys, name in zip(axes, lines, labels, strict=True):
        for key, split, color in keys:
            points = [(r["epoch"], r[key]) for r in rows if r.get(key) is not None]
            if points:
                mark = "o" if len(points) <= 30 else None
                axis.plot(*zip(*points, strict=True), color=color, label=split, marker=mark, ms=3)
        axis.set(xlabel="epoch", ylabel=name)
        axis.set_title(name.partition(" [")[0], fontsize=SMALL + 1)
        axis.grid(alpha=0.25)
        axis.locator_params(axis="x", integer=True)
        if len(rows) == 1:
            axis.set_xticks([rows[0]["epoch"]])
        if len(axis.lines) > 1:
            axis.legend(frameon=False, fontsize=SMALL)
    axes[2].set_ylim(bottom=0)
    last = [r["top1"] for r in rows if r.get("top1") is not None][-1:]
    if last:
        axes[1].set_title(f"top-1, last epoch: {last[0]:.2f} %", fontsize=SMALL + 1)
    save(figure, path, title)


def weight_levels(items: Sequence[WeightPlot], path: Path, title: str = "") -> None:
    """Histogram of each layer's weights with its levels, before and after training."""
    shown = _evenly(items)
    trained = any(item.before is not None for item in shown)
    figure, axes = panels(len(shown))
    for axis, item in zip(axes, shown, strict=True):
        after = flat(item.after)
        before = after if item.before is None else flat(item.before)
        low, high = span(np.concatenate([before, after]))
        edges = np.linspace(low, high, _bins(after) + 1).tolist()
        axis.hist(before, edges, density=True, color=GREY, alpha=0.45)
        if trained:
            axis.hist(after, edges, density=True, color=BLUE, histtype="step", linewidth=1.1)
            _draw_ticks(axis, item.levels_before, "black", foot=0.88, width=1.2)
        _draw_levels(axis, item.levels_after, ORANGE, "-")
        _frame(axis, f"{item.name}, {item.bits:.3g} bit", low, high)
    label(figure, axes, "weight", "density")
    band = "(band: 10th to 90th percentile over channels)"
    if trained:
        legend(
            figure,
            ("fill", GREY, "weights before training"),
            ("-", BLUE, "after"),
            ("|", "black", "levels before"),
            ("-", ORANGE, f"after {band}"),
        )
    else:
        legend(figure, ("fill", GREY, "weights"), ("-", ORANGE, f"levels {band}"))
    save(figure, path, title or "Weights and their levels", _part(shown, items))


def activation_thresholds(items: Sequence[ActivationPlot], path: Path, title: str = "") -> None:
    """Histogram of each layer's input with the thresholds between its codes, and its levels."""
    shown = _evenly(items)
    figure, axes = panels(len(shown))
    for axis, item in zip(axes, shown, strict=True):
        values, levels = flat(item.values), flat(item.levels)
        low, high = span(values)
        if len(levels) <= MAX_LINES:  # 8 bits often reach far beyond the data
            low, high = min(low, levels.min()), max(high, levels.max())
        edges = np.linspace(low, high, _bins(values) + 1).tolist()
        axis.hist(values, edges, density=True, color=BLUE, alpha=0.55)
        axis.set_yscale("log")  # after ReLU the zeros dwarf everything else
        _draw_levels(axis, item.thresholds, RED, "--")
        if len(levels) <= MAX_LINES:
            foot = np.full(len(levels), 0.03)
            axis.plot(levels, foot, "^", color=ORANGE, ms=4, transform=axis.get_xaxis_transform())
        _frame(axis, f"{item.name}, {item.bits:.3g} bit", low, high)
    label(figure, axes, "input", "density, log scale")
    legend(figure, ("fill", BLUE, "inputs"), ("--", RED, "thresholds"), ("^", ORANGE, "levels"))
    save(figure, path, title or "Inputs, thresholds and levels", _part(shown, items))


def factors(items: Sequence[FactorPlot], path: Path, title: str = "") -> None:
    """Distribution over samples of each layer's step factor; 1 is the plain learned step."""
    figure, (axis,) = panels(1, columns=1, width=max(5.0, 0.42 * len(items) + 1.5), height=4.2)
    axis.axhline(1.0, color=GREY, linestyle="--", linewidth=1)
    axis.boxplot(
        [flat(item.factors) for item in items],
        whis=(1, 99),
        showfliers=False,
        patch_artist=True,
        boxprops={"facecolor": "#cfe3f1", "edgecolor": BLUE},
        medianprops={"color": RED},
        whiskerprops={"color": BLUE},
        capprops={"color": BLUE},
    )
    axis.set_xticks(range(1, len(items) + 1), [item.name for item in items], rotation=90)
    axis.set(ylabel="step factor of a sample")
    axis.grid(axis="y", alpha=0.25)
    note = "box: quartiles; whiskers: 1st to 99th percentile"
    save(figure, path, title or "Adaptive step: factor over samples", note)


def codebook_trajectories(items: Sequence[TrajectoryPlot], path: Path, title: str = "") -> None:
    """Each level of each layer's codebook over the epochs."""
    shown = _evenly(items)
    figure, axes = panels(len(shown))
    for axis, item in zip(axes, shown, strict=True):
        axis.plot(array(item.epochs), array(item.levels), color=BLUE, linewidth=1)
        axis.set_title(item.name, fontsize=SMALL)
        axis.locator_params(axis="x", integer=True)
        axis.grid(alpha=0.25)
    label(figure, axes, "epoch", "level")
    save(figure, path, title or "Codebooks over training", _part(shown, items))


def sensitivity(rows: Sequence[Mapping[str, Any]], path: Path, title: str = "") -> None:
    """Sensitivity (log scale) above, where it was measured, bits below, one column a layer.

    Args:
        rows: in execution order, as in layers.csv: `name`, `w_bits`, `a_bits`, `sensitivity`
            (None or empty where it was not measured); strings are read as numbers.
        path: where to; its ending is the format.
        title: above the figure.
    """
    width = max(5.5, 0.42 * len(rows) + 1.8)
    measured = [number(row.get("sensitivity")) for row in rows]
    known = any(m is not None for m in measured)
    figure, axes = panels(1 + known, columns=1, width=width, height=2.3)
    foot, place = axes[-1], np.arange(len(rows))
    if known:
        _draw_sensitivity(axes[0], measured)
    for key, color, shift, side in (("w_bits", ORANGE, -0.2, "W"), ("a_bits", GREEN, 0.2, "A")):
        bits = [number(row.get(key)) or 0.0 for row in rows]
        bars = foot.bar(place + shift, np.minimum(bits, 8), width=0.4, color=color, label=side)
        foot.bar_label(bars, [f"{b:.3g}" for b in bits], fontsize=6, padding=1)
    foot.set_xticks(place, [str(row["name"]) for row in rows], rotation=90)
    foot.set(ylabel="bits", ylim=(0, 9.5))
    foot.legend(frameon=False, fontsize=SMALL, ncols=2, loc="lower right", bbox_to_anchor=(1, 0.95))
    axes[0].set_xlim(foot.get_xlim())
    wide = any((number(row.get(k)) or 0) > 8 for row in rows for k in ("w_bits", "a_bits"))
    save(figure, path, title or "Sensitivity and bits", "bars end at 8 bit" if wide else "")


def _draw_sensitivity(axis: Axes, measured: Sequence[float | None]) -> None:
    # Marks, not bars: on a log axis the length of a bar says nothing.
    shown = [m if m and 0 < m < np.inf else np.nan for m in measured]
    axis.plot(np.arange(len(shown)), shown, "o", color=BLUE, ms=5)
    if np.isfinite(shown).any():
        axis.set_yscale("log")
    none = [i for i, m in enumerate(measured) if m is not None and m <= 0]
    axis.plot(none, [0.04] * len(none), "v", color=RED, ms=5, transform=axis.get_xaxis_transform())
    axis.grid(alpha=0.25)
    axis.set(ylabel="sensitivity (loss)" + (", red: 0" if none else ""))
    axis.set_xticks(np.arange(len(shown)), [""] * len(shown))


def _draw_levels(axis: Axes, levels: Any, color: str, style: str) -> None:
    """Vertical lines below the top edge's ticks; ticks at the foot when there are too many."""
    rows, middle = _over_channels(levels)
    if len(middle) > MAX_LINES:
        _draw_ticks(axis, levels, color)
        return
    for place in middle:
        axis.axvline(place, ymax=0.87, color=color, linestyle=style, linewidth=0.9)
    if len(rows) > 1 and style == "-":
        for low, high in np.percentile(rows, [10, 90], axis=0).T:
            axis.axvspan(low, high, color=color, alpha=0.1, linewidth=0)


def _draw_ticks(
    axis: Axes, levels: Any, color: str, *, foot: float = 0.0, width: float = 0.6
) -> None:
    """Short strokes from `foot` up, in parts of the axis's height; many are thin."""
    _, middle = _over_channels(levels)
    thin = min(width, 0.6) if len(middle) > MAX_LINES else width
    place = axis.get_xaxis_transform()
    axis.vlines(middle, foot, foot + 0.12, color=color, linewidth=thin, transform=place)


def _over_channels(levels: Any) -> tuple[np.ndarray, np.ndarray]:
    """Levels as [channels, levels], and each one's median over the channels."""
    rows = np.nan_to_num(np.atleast_2d(array(levels)), posinf=0, neginf=0)
    return rows, np.median(rows, axis=0)


def _bins(values: np.ndarray) -> int:
    """Bins of a histogram: few for a small layer, whose counts would be noise."""
    return int(np.clip(np.sqrt(values.size), 20, 80))


def _frame(axis: Axes, title: str, low: float, high: float) -> None:
    """Title, limits with a margin, no ticks on an axis of densities."""
    margin = 0.03 * (high - low)
    axis.set_title(title, fontsize=SMALL)
    axis.set_xlim(low - margin, high + margin)
    axis.set_yticks([])
    axis.minorticks_off()


def _evenly(items: Sequence[Any]) -> Sequence[Any]:
    if len(items) <= MAX_PANELS:
        return items
    return [items[i] for i in np.linspace(0, len(items) - 1, MAX_PANELS).round().astype(int)]


def _part(shown: Sequence[Any], items: Sequence[Any]) -> str:
    return "" if len(shown) == len(items) else f"{len(shown)} of {len(items)} layers"
