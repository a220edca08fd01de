"""What `qexp bench inference` found: rows of bench.json, a table, CSV and a picture."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qexp.bench.engines import AGAIN, FLOAT, FLOAT_ONNX
from qexp.bench.output import aligned, noise
from qexp.figure import BLUE, GREEN, GREY, SMALL, panels, save

if TYPE_CHECKING:
    from qexp.bench.inference import Contender

Row = dict[str, Any]


def rows(contenders: Sequence[Contender], facts: Mapping[str, Any]) -> list[Row]:
    """One row a contender; the first, the float network, is what the ratios are to.

    Args:
        facts: model, batch, bits, threads, device (its name), on (its kind), image_size: the
            same for all.
    """
    floating = contenders[0]
    onnx = next((c for c in contenders if c.engine.name == FLOAT_ONNX), None)
    return [_row(c, floating, onnx, facts) for c in contenders]


def _row(
    c: Contender, floating: Contender, onnx: Contender | None, facts: Mapping[str, Any]
) -> Row:
    wall, cpu = statistics.median(c.wall_s), statistics.median(c.cpu_s)
    base_wall, base_cpu = statistics.median(floating.wall_s), statistics.median(floating.cpu_s)
    apart = c.apart
    return {
        "engine": c.engine.name,
        "quantizer": c.quantizer,
        **facts,
        "latency_ms": 1e3 * wall,
        "cpu_ms": 1e3 * cpu,
        "images_per_s": facts["batch"] / wall,
        "ratio": wall / base_wall,
        "cpu_ratio": cpu / base_cpu,
        "cpu_ratio_to_float_onnx": None if onnx is None else cpu / statistics.median(onnx.cpu_s),
        "passes": len(c.wall_s),
        "peak_bytes": c.engine.peak_bytes,
        "file_bytes": c.engine.file_bytes,
        "file_ratio": c.engine.file_bytes / floating.engine.file_bytes,
        "logits_median": None if apart is None else apart.median,
        "logits_largest": None if apart is None else apart.largest,
        "logits_scale": None if apart is None else apart.scale,
        "other_top1": None if apart is None else apart.other_top1,
        "compared": None if apart is None else apart.images,
    }


HEAD = (
    "quantizer", "engine", "ms", "ratio", "CPU ms", "CPU ratio", "img/s", "peak MB", "file kB",
    "file ratio", "logits apart", "other top-1",
)  # fmt: skip


def text(found: Sequence[Row]) -> str:
    """A table of the rows of one group."""
    first = found[0]
    size = first["image_size"]
    title = f"\n{first['model']} {size}x{size}, batch {first['batch']}, ratios to float torch"
    shown = [row for row in found if row["engine"] != AGAIN]
    lines = [HEAD, *(_cells(row) for row in shown)]
    again = next(row for row in found if row["engine"] == AGAIN)
    return "\n".join([title, *aligned(lines, left=2), noise(again)])


def _cells(row: Row) -> tuple[str, ...]:
    peak, apart = row["peak_bytes"], row["logits_median"]
    return (
        row["quantizer"] or "-",
        row["engine"],
        f"{row['latency_ms']:.2f}",
        f"{row['ratio']:.2f}",
        f"{row['cpu_ms']:.2f}",
        f"{row['cpu_ratio']:.2f}",
        f"{row['images_per_s']:.0f}",
        "-" if peak is None else f"{peak / 2**20:.0f}",
        f"{row['file_bytes'] / 1e3:.0f}",
        f"{row['file_ratio']:.3f}",
        "-" if apart is None else f"{apart:.1e} of {row['logits_scale']:.1f}",
        "-" if apart is None else f"{row['other_top1']} of {row['compared']}",
    )


def draw(path: Path, found: Sequence[Row]) -> None:
    """Time against float, one panel for each model and batch; on a CPU CPU time; logarithmic."""
    on_cpu = found[0]["on"] == "cpu"
    ratio_of = "cpu_ratio" if on_cpu else "ratio"
    groups: dict[tuple[str, int], list[Row]] = {}
    for row in found:
        if row["engine"] != FLOAT:
            groups.setdefault((row["model"], row["batch"]), []).append(row)
    most = max(len(members) for members in groups.values())
    figure, axes = panels(len(groups), columns=2, width=4.6, height=0.6 + 0.17 * most)
    for axis, ((model, batch), members) in zip(axes, groups.items(), strict=True):
        places = range(len(members))
        ratios = [row[ratio_of] for row in members]
        colors = [
            GREY if not row["quantizer"] else GREEN if row["engine"] == "onnx_int8" else BLUE
            for row in members
        ]
        axis.barh(places, ratios, color=colors, height=0.7)
        for place, ratio in zip(places, ratios, strict=True):
            axis.annotate(
                f"{ratio:.2f}", (ratio, place), (2, 0), textcoords="offset points",
                va="center", fontsize=SMALL - 1,
            )  # fmt: skip
        axis.set_xscale("log")
        axis.set_xlim(min(0.1, *ratios) * 0.8, max(ratios) * 1.6)
        axis.axvline(1, color=GREY, linewidth=0.8)
        names = [f"{row['quantizer']} {row['engine']}".strip() for row in members]
        axis.set_yticks(places, names)
        axis.invert_yaxis()
        axis.set_title(f"{model} {members[0]['image_size']} px, batch {batch}", fontsize=SMALL)
        axis.set_xlabel(f"{'CPU time' if on_cpu else 'time'} of a pass / float torch")
    first = found[0]
    where = f"{first['threads']} CPU thread(s)" if on_cpu else first["device"]
    note = f"W{first['bits']}A{first['bits']}, {where}; grey: float; green: not exact"
    save(figure, path, "Cost of a forward pass against float torch", note)
