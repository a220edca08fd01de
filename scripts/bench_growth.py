"""How a training step grows with batch, width, layers and levels: CPU time and memory kept.

    python scripts/bench_growth.py results/bench_growth [--compile kernels] [--threads 1]

One thing grows at a time from a ResNet-8 of width 1, 32 images of 32x32, 4 bits. Networks take
turns, float among them; a point is the median CPU time of a step (GPU: wall). Printed are the
slopes of time and of memory in a log-log plot: 1 is linear growth. Against bits, which are the
logarithm of the levels, 1 is logarithmic growth in the levels. Writes growth.csv and growth.png.
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from torch import nn

from qexp.bench.step import Contender, make_step, take_turns
from qexp.config import configs_dir
from qexp.figure import PALETTE, legend, panels, save
from qexp.models.resnet import ResNet
from qexp.quant.convert import calibrate_
from qexp.recipes import build
from qexp.runner.device import keep_memory, pick_device, set_threads

BASE = {"batch": 32, "width": 1.0, "depth": 8, "bits": 4}
GROWS: dict[str, tuple[float, ...]] = {
    "batch": (16, 32, 64),
    "width": (0.5, 1.0, 2.0),
    "depth": (8, 14, 20),
    "bits": (2, 4, 6, 8),
}
NAMES = {"cpu_ms": "CPU", "wall_ms": "wall"}
QUANTIZERS = ("lsq", "asq", "post", "apot", "adq", "n2uq")
WARMUP = 2
GRAPHS = 64  # compiled kernels of all sizes and quantizers; dynamo's own limit is 8


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--compile", choices=("off", "kernels"), default="off")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quantizers", nargs="+", default=QUANTIZERS)
    given = parser.parse_args(argv)
    set_threads(given.threads)
    if given.device == "cpu":
        keep_memory()
    rows: list[dict[str, Any]] = []
    for what, values in GROWS.items():
        for value in values:
            rows += point(what, value, given)
        print(slopes(what, [r for r in rows if r["grows"] == what]), flush=True)
    given.out.mkdir(parents=True, exist_ok=True)
    with (given.out / "growth.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    draw(given.out / "growth.png", rows, f"{given.device}, compile={given.compile}")


def point(what: str, value: float, given: argparse.Namespace) -> list[dict[str, Any]]:
    """A step of every network at one size."""
    size = {**BASE, what: value}
    device = pick_device(given.device)
    torch.manual_seed(0)
    images = torch.randn(int(size["batch"]), 3, 32, 32, device=device)
    labels = torch.randint(10, (len(images),), device=device)
    networks = {"fp32": network("fp32", size, device)}
    for name in given.quantizers:
        networks[name] = network(name, size, device)
        calibrate_(networks[name], images)
    contenders = [
        Contender(name, net, make_step(net, given.compile, images, labels, torch.float32))
        for name, net in networks.items()
    ]
    with torch._dynamo.config.patch(recompile_limit=GRAPHS):
        take_turns(contenders, given.repeats, WARMUP, device)
    return [
        {
            "grows": what,
            "value": value,
            "quantizer": c.name,
            "device": device.type,
            "cpu_ms": 1e3 * statistics.median(c.cpu_s),
            "wall_ms": 1e3 * statistics.median(c.wall_s),
            "kept_bytes": c.saved_bytes,
        }
        for c in contenders
    ]


def network(quantizer: str, size: dict[str, float], device: torch.device) -> nn.Module:
    """The ResNet of this size, quantized as `qexp train` would."""
    model = ResNet(depth=int(size["depth"]), num_classes=10, width=size["width"]).to(device)
    return build.make_network(config(quantizer, int(size["bits"])), model, (3, 32, 32)).model


@cache
def config(quantizer: str, bits: int) -> DictConfig:
    """What `qexp train` composes."""
    with initialize_config_dir(str(configs_dir()), version_base="1.3"):
        return compose("train", [f"quantizer={quantizer}", f"bits={bits}"])


def slopes(what: str, rows: Sequence[dict[str, Any]]) -> str:
    """The growth of each network between its first and last point, as exponents."""
    lines, names = [], list(dict.fromkeys(r["quantizer"] for r in rows))
    for key, name in ((time_key(rows), NAMES[time_key(rows)] + " time"), ("kept_bytes", "memory")):
        parts = [f"{q} {exponent(rows, q, key):.2f}" for q in names]
        lines.append(f"{what:6s} exponent of the step's {name}: " + ", ".join(parts))
    return "\n".join(lines)


def exponent(rows: Sequence[dict[str, Any]], quantizer: str, key: str) -> float:
    """b of `key` ~ value**b from the first point to the last."""
    mine = [r for r in rows if r["quantizer"] == quantizer]
    first, last = mine[0], mine[-1]
    return math.log(last[key] / first[key]) / math.log(last["value"] / first["value"])


def time_key(rows: Sequence[dict[str, Any]]) -> str:
    """CPU time, which other work on the machine does not lengthen; on a GPU wall time."""
    return "cpu_ms" if rows[0]["device"] == "cpu" else "wall_ms"


def draw(path: Path, rows: Sequence[dict[str, Any]], note: str) -> None:
    """Time above, memory below; one column for each thing that grows."""
    figure, axes = panels(2 * len(GROWS))
    names = list(dict.fromkeys(r["quantizer"] for r in rows))
    for i, key in enumerate((time_key(rows), "kept_bytes")):
        for axis, what in zip(axes[i * len(GROWS) :], GROWS, strict=False):
            for name, color in zip(names, PALETTE, strict=False):
                mine = [r for r in rows if r["grows"] == what and r["quantizer"] == name]
                unit = 1 if key in NAMES else 1 / 2**20
                axis.plot([r["value"] for r in mine], [r[key] * unit for r in mine], color=color)
            if what != "bits":
                axis.set_xscale("log", base=2)
                axis.set_yscale("log", base=2)
            axis.set_ylim(*((0, None) if what == "bits" else (None, None)))
            axis.set_xlabel(what)
            axis.set_ylabel(f"{NAMES[key]} ms a step" if key in NAMES else "MB kept for backward")
    legend(figure, *(("-", color, name) for name, color in zip(names, PALETTE, strict=False)))
    base = ", ".join(f"{k} {v:g}" for k, v in BASE.items())
    save(figure, path, "Growth of a training step", f"ResNet, from {base}; {note}")


if __name__ == "__main__":
    main()
