"""Draw README's figure from `results/`: every method at every width, trained and after training.

    python scripts/plot_results.py            draws it anew where it is not what results/ say
    python scripts/plot_results.py --check    exits 1 instead

The figure's metadata holds the points that it was drawn from (`Points`), so that a test can tell
whether they are still those of `results/`, whatever program drew it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from qexp.figure import BLUE, GREY, ORANGE, RED, legend, panels, save
from qexp.report.runs import read_runs
from qexp.report.tables import make_tables

FIGURE = Path("docs/cifar10.png")
# Folder below results/, and the words above its panel.
SHOWN = {
    "cifar10_qat_short": "trained, ten epochs",
    "ptq_cifar10_quick": "after training, 512 images",
}
WIDTHS = {"W2A2": RED, "W3A3": ORANGE, "W4A4": BLUE}
LOWEST = {"cifar10_qat_short": 85.5, "ptq_cifar10_quick": 72.0}  # percent; what is below is told
# Rows with an option set that are drawn too, and the name they have there.
NAMED = {"aquant [quantizer.reconstruct.borders=both]": "aquant, borders\nlearned twice"}
POINTS = "Points"


class Dot(NamedTuple):
    """One cell of a table: mean top-1 in percent over `n` seeds, and their deviation."""

    table: str
    method: str
    bits: str
    top1: float
    std: float | None
    n: int


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="draw nothing, compare")
    parser.add_argument("--root", type=Path, default=Path(__file__).parents[1])
    given = parser.parse_args(argv)
    path = given.root / FIGURE
    floats, dots = read(given.root)
    if drawn_from(path) == text_of(floats, dots):
        print(f"{FIGURE}: as results/ say")
        return 0
    if given.check:
        print(f"plot_results: {FIGURE} differs from results/. Run: make table", file=sys.stderr)
        return 1
    draw(path, floats, dots)
    print(f"{FIGURE}: {len(dots)} points, drawn")
    return 0


def read(root: Path) -> tuple[dict[str, float], list[Dot]]:
    """`({table: top-1 of the float start}, points)` of methods without options, and of `NAMED`."""
    floats, dots = {}, []
    for name in SHOWN:
        tables = make_tables(read_runs([root / "results" / name]), [])
        table = max(tables, key=lambda t: len(t.rows))  # others are of another protocol
        rows = [
            r
            for r in table.rows
            if r.bits in WIDTHS and (not r.options or r.name in NAMED) and r.top1
        ]
        start = rows[0].stat("fp32_top1")
        assert start is not None
        floats[name] = round(start.mean, 2)
        for row in rows:
            found = row.top1
            assert found is not None
            std = None if found.std is None else round(found.std, 2)
            dots.append(Dot(name, row.name, row.bits, round(found.mean, 2), std, found.n))
    return floats, dots


def text_of(floats: dict[str, float], dots: Sequence[Dot]) -> str:
    """The points as one line of JSON."""
    return json.dumps([floats, sorted(map(list, dots), key=lambda dot: dot[:3])])


def drawn_from(path: Path) -> str:
    """What `text_of` gave when the figure was drawn; empty if there is none."""
    from PIL import Image

    if not path.is_file():
        return ""
    with Image.open(path) as image:
        return str(image.info.get(POINTS, ""))


def draw(path: Path, floats: dict[str, float], dots: Sequence[Dot]) -> None:
    """One panel a table: a row a method, best at the lowest width on top, a colour a width."""
    figure, axes = panels(len(SHOWN), columns=len(SHOWN), width=4.2, height=3.3)
    for axis, (table, words) in zip(axes, SHOWN.items(), strict=True):
        own = [dot for dot in dots if dot.table == table]
        at_lowest = {dot.method: dot.top1 for dot in own if dot.bits == next(iter(WIDTHS))}
        methods = sorted(at_lowest, key=lambda name: at_lowest[name])
        low = LOWEST[table]
        for bits, color in WIDTHS.items():
            some = [dot for dot in own if dot.bits == bits and dot.method in at_lowest]
            for dot in some:
                y = methods.index(dot.method)
                if dot.top1 < low:
                    axis.annotate(
                        f"{dot.top1:.0f}", (low, y), xytext=(4, -2), textcoords="offset points",
                        fontsize=7, color=color,
                    )  # fmt: skip
                    axis.plot([low], [y], marker="<", color=color, markersize=4, clip_on=False)
                    continue
                axis.errorbar(
                    dot.top1, y, xerr=dot.std, fmt="o", color=color, markersize=4.5, capsize=2,
                    markerfacecolor=color if dot.n > 1 else "white",
                )  # fmt: skip
        axis.axvline(floats[table], color=GREY, linewidth=0.8, linestyle="--")
        axis.set_yticks(range(len(methods)), [NAMED.get(name, name) for name in methods])
        axis.set_xlim(low, floats[table] + 0.5)
        axis.grid(axis="x", color="#e5e5e5", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.set_xlabel("top-1, percent")
        axis.set_title(words, fontsize=8)
    entries = [("o", color, bits) for bits, color in WIDTHS.items()]
    legend(figure, *entries, ("--", GREY, "float start"))
    title = "CIFAR-10, ResNet-20: mean and deviation over seeds, last epoch"
    note = "Open circles are one seed: less than a point apart, they are not ranked."
    save(figure, path, title, note, metadata={POINTS: text_of(floats, dots)})


if __name__ == "__main__":
    sys.exit(main())
