"""What both benches write alike: an aligned table, the line about noise, a folder of files."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qexp.runner.atomic import write_json
from qexp.runner.environment import describe


def aligned(lines: Sequence[Sequence[str]], left: int) -> list[str]:
    """`lines` of cells as text; the first `left` columns to the left, numbers to the right."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return [
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]


def noise(again: Mapping[str, Any]) -> str:
    """The line about the float network that was timed a second time."""
    wall, cpu = abs(again["ratio"] - 1), abs(again["cpu_ratio"] - 1)
    return f"noise: float against itself differs by {wall:.1%} (wall), {cpu:.1%} (CPU)"


def unused(folder: Path) -> Path:
    """`folder`, or where it holds an earlier bench `folder-2`, ..."""
    wanted, number = folder, 1
    while (folder / "bench.json").exists():
        number += 1
        folder = wanted.with_name(f"{wanted.name}-{number}")
    return folder


def write_folder(
    folder: Path,
    rows: Sequence[Mapping[str, Any]],
    draw: Callable[[Path, Any], None],
    *,
    seed: int,
    threads: int,
) -> None:
    """Write bench.json, bench.csv (all fields of all rows), env.json and bench.png.

    Called after each group: a bench that ends early leaves what it measured.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "bench.json", list(rows))
    write_json(folder / "env.json", describe(seed, threads))
    with (folder / "bench.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    draw(folder / "bench.png", rows)


def say_written(folder: Path) -> None:
    """The line about the files."""
    print(f"bench: {folder}/bench.json, bench.csv, bench.png")
