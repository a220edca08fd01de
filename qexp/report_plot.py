"""Figures of tables of runs: accuracy against cost, learning curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from qexp.figure import GREY, PALETTE, SMALL, panels, save

MARKERS = "osD^vP*X"


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
    """Test top-1 (percent) of one run over its epochs; runs of one name share a colour."""

    name: str
    bits: str
    epochs: Sequence[int]
    top1: Sequence[float]


def front(points: Sequence[Point]) -> list[Point]:
    """The points that no other one beats: none is both cheaper and at least as accurate."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda p: (p.cost, -p.top1)):
        if not kept or point.top1 > kept[-1].top1:
            kept.append(point)
    return kept


def pareto(
    charts: Mapping[str, Sequence[Point]], path: Path | IO[bytes], title: str = "", **save_as: Any
) -> None:
    """Mean top-1 against each cost, one panel a cost, the Pareto front as a line.

    Args:
        charts: by the label of the cost's axis, with its unit.
        path: where to; its ending is the format.
        title: above the figure.
        save_as: `format="png"` when `path` is a stream.
    """
    figure, axes = panels(len(charts), columns=2, width=5.0, height=3.8)
    looks = _looks(p.name for points in charts.values() for p in points)
    for axis, (cost, points) in zip(axes, charts.items(), strict=True):
        best = front(points)
        axis.plot([p.cost for p in best], [p.top1 for p in best], color=GREY, lw=1, zorder=1)
        for name, (color, marker) in looks.items():
            own = [p for p in points if p.name == name]
            if not own:
                continue
            axis.errorbar(
                [p.cost for p in own],
                [p.top1 for p in own],
                yerr=[p.std or 0.0 for p in own],
                fmt=marker,
                color=color,
                ms=5,
                elinewidth=0.8,
                label=name,
            )
        for point in best:
            axis.annotate(
                point.bits, (point.cost, point.top1), textcoords="offset points", xytext=(-4, 5),
                ha="right", fontsize=SMALL - 1.5, color="#444444",
            )  # fmt: skip
        axis.margins(x=0.12, y=0.1)
        axis.set(xlabel=cost, ylabel="top-1, last epoch [%]")
        axis.grid(alpha=0.25)
    _side_legend(figure, axes[0])
    save(figure, path, title, "grey: Pareto front; bars: deviation over seeds", **save_as)


def learning(
    curves: Sequence[Curve], path: Path | IO[bytes], title: str = "", **save_as: Any
) -> None:
    """Test top-1 over epochs, one panel for each bit-width, one thin line a run."""
    widths = list(dict.fromkeys(curve.bits for curve in curves))
    figure, axes = panels(len(widths), width=3.2, height=2.9)
    looks = _looks(curve.name for curve in curves)
    named: dict[str, Any] = {}
    for axis, bits in zip(axes, widths, strict=True):
        for curve in (c for c in curves if c.bits == bits):
            mark = "o" if len(curve.epochs) < 4 else None
            color = looks[curve.name][0]
            (line,) = axis.plot(curve.epochs, curve.top1, color=color, lw=1, marker=mark, ms=3)
            named.setdefault(curve.name, line)
        axis.set_title(bits, fontsize=SMALL)
        axis.set_xlabel("epoch")
        axis.locator_params(axis="x", integer=True)
        axis.grid(alpha=0.25)
    figure.supylabel("test top-1 [%]", fontsize=SMALL)
    figure.legend(
        list(named.values()), list(named), loc="outside right center", frameon=False, fontsize=SMALL
    )
    save(figure, path, title, **save_as)


def _looks(names: Any) -> dict[str, tuple[str, str]]:
    """Colour and marker of each name, the same in every figure of a table; float is grey."""
    quantized = [name for name in dict.fromkeys(names) if name != "fp32"]
    looks = {
        name: (PALETTE[i % len(PALETTE)], MARKERS[(i // len(PALETTE) + i) % len(MARKERS)])
        for i, name in enumerate(sorted(quantized))
    }
    return {**looks, "fp32": (GREY, "o")}


def _side_legend(figure: Any, axis: Any) -> None:
    handles, names = axis.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right center", frameon=False, fontsize=SMALL)
