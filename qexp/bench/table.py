"""What the bench found: rows of bench.json, a table for the console, CSV and a picture."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from qexp.bench.floor import Machine, operands, work
from qexp.bench.output import aligned, noise
from qexp.bench.step import AGAIN, EAGER, Contender, Group
from qexp.figure import BLUE, GREY, PALETTE, SMALL, panels, save
from qexp.recipes.compilation import WHOLE
from qexp.runner.environment import cpu_model

Row = dict[str, Any]


def rows(group: Group, machine: Machine, facts: Mapping[str, Any]) -> list[Row]:
    """One row for each contender but the first, the float network they are compared with.

    Args:
        facts: model, dtype, compile, device, batch, repeats, ...: the same for all.
    """
    floating, *others = group.contenders
    eager = next((c for c in others if c.name == EAGER), floating)
    return [_row(c, floating, eager, group, machine, facts) for c in others]


def _row(
    c: Contender,
    floating: Contender,
    eager: Contender,
    group: Group,
    machine: Machine,
    facts: Mapping[str, Any],
) -> Row:
    step, base = statistics.median(c.wall_s), statistics.median(floating.wall_s)
    cpu, base_cpu = statistics.median(c.cpu_s), statistics.median(floating.cpu_s)
    ratios = [a / b for a, b in zip(c.wall_s, floating.wall_s, strict=True)]
    low, high = _quartiles(ratios)
    itemsize = 2 if facts["dtype"] == "bf16" else 4
    least = work(group.layers, operands(c.model), facts["batch"], itemsize)
    fused = facts["compile"] in WHOLE
    added = 0.0 if fused else least.quantizers_s(machine)
    return {
        "quantizer": c.name,
        **facts,
        "step_ms": 1e3 * step,
        "float_step_ms": 1e3 * base,
        "ratio": step / base,
        "ratio_low": low,  # quartiles of the ratios turn by turn
        "ratio_high": high,
        "cpu_ms": 1e3 * cpu,
        "float_cpu_ms": 1e3 * base_cpu,
        "cpu_ratio": cpu / base_cpu,
        "eager_ratio": step / statistics.median(eager.wall_s),
        "eager_cpu_ratio": cpu / statistics.median(eager.cpu_s),
        "saved_bytes": c.saved_bytes,
        "saved_bytes_ratio": c.saved_bytes / max(1, floating.saved_bytes),
        "peak_bytes": c.peak_bytes,
        "float_peak_bytes": floating.peak_bytes,
        "images_per_s": facts["batch"] / step,
        "warmup_s": c.warmup_s,
        "floor_ms": 1e3 * (least.float_s(machine) + added),
        "floor_ratio": 1 + added / base,
        "flops": least.flops,
        "floor_bytes": least.layer_bytes + (0.0 if fused else least.quantizer_bytes),
        "copy_bytes_per_s": machine.copy_bytes_per_s,
        "flops_per_s": machine.flops_per_s,
    }


def _quartiles(values: Sequence[float]) -> tuple[float, float]:
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


# ---------------------------------------------------------------------------------------------
# Console

HEAD = (
    "quantizer", "step ms", "ratio", "25-75 %", "cpu", "eager", "floor", "floor ms", "saved",
    "peak MB", "img/s", "warm-up s",
)  # fmt: skip


def text(found: Sequence[Row]) -> str:
    """A table of the rows of one group."""
    first = found[0]
    title = (
        f"\n{first['model']} {first['dtype']} compile={first['compile']}: "
        f"float step {first['float_step_ms']:.1f} ms, CPU {first['float_cpu_ms']:.1f} ms"
    )
    lines = [HEAD, *(_cells(row) for row in found)]
    again = next(row for row in found if row["quantizer"] == AGAIN)
    return "\n".join([title, *aligned(lines, left=1), noise(again)])


def _cells(row: Row) -> tuple[str, ...]:
    peak = row["peak_bytes"]
    return (
        row["quantizer"],
        f"{row['step_ms']:.1f}",
        f"{row['ratio']:.3f}",
        f"{row['ratio_low']:.3f}-{row['ratio_high']:.3f}",
        f"{row['cpu_ratio']:.3f}",
        f"{row['eager_ratio']:.3f}",
        f"{row['floor_ratio']:.3f}",
        f"{row['floor_ms']:.1f}",
        f"{row['saved_bytes_ratio']:.3f}",
        "-" if peak is None else f"{peak / 2**20:.0f}",
        f"{row['images_per_s']:.0f}",
        f"{row['warmup_s']:.1f}",
    )


def rates(machine: Machine, dtype: str) -> str:
    """The line about the machine."""
    return (
        f"copy {machine.copy_bytes_per_s / 1e9:.1f} GB/s, "
        f"matrix product {machine.flops_per_s / 1e9:.0f} Gflop/s ({dtype})"
    )


def device_name(device: torch.device) -> str:
    """What the hardware calls itself."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_model()


# ---------------------------------------------------------------------------------------------
# Picture


def draw(path: Path, found: Sequence[Row]) -> None:
    """Ratios to float, one panel for each model, dtype and mode; bars span the quartiles."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in found:
        groups.setdefault((row["model"], row["dtype"], row["compile"]), []).append(row)
    figure, axes = panels(len(groups))
    for axis, (key, members) in zip(axes, groups.items(), strict=True):
        shown = [row for row in members if row["quantizer"] != EAGER]
        places = range(len(shown))
        ratios = [row["ratio"] for row in shown]
        spread = [
            [max(0.0, row["ratio"] - row["ratio_low"]) for row in shown],
            [max(0.0, row["ratio_high"] - row["ratio"]) for row in shown],
        ]
        colors = [GREY if row["quantizer"] == AGAIN else BLUE for row in shown]
        axis.barh(places, ratios, xerr=spread, color=colors, height=0.6)
        axis.plot([row["floor_ratio"] for row in shown], places, "|", color=PALETTE[1], ms=10)
        axis.axvline(1, color=GREY, linewidth=0.8)
        axis.set_yticks(places, [row["quantizer"] for row in shown])
        axis.invert_yaxis()
        axis.set_xlim(left=0)
        axis.set_title(f"{key[0]} {key[1]} compile={key[2]}", fontsize=SMALL)
        axis.set_xlabel("step time / float step time")
    first = found[0]
    note = f"{first['device']}, batch {first['batch']}; red: floor; lines: quartiles"
    save(figure, path, "Cost of a training step against float", note)
