"""What the composed configs hold at the top: knobs with their types, groups as mappings.

A group with `_target_` is checked against the signature of what it names (`config`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal


@dataclasses.dataclass
class Outer:
    """`configs/quantizer/outer`: what the first and the last layer get."""

    weight: Mapping[str, Any] | None
    act: Mapping[str, Any] | None


@dataclasses.dataclass
class Quantizer:
    """`configs/quantizer`; each part is checked against its own target."""

    name: str
    weight: Mapping[str, Any] | None
    act: Mapping[str, Any] | None
    outer: Outer | None = None
    reconstruct: Mapping[str, Any] | None = None


@dataclasses.dataclass
class Sweep:
    """What `launch=gpus` reads."""

    gpus: int | None = None
    jobs_per_gpu: int = 1


@dataclasses.dataclass
class Train:
    """`configs/train.yaml`: the top-level knobs, typed; the groups are checked on their own."""

    bits: int
    seed: int
    device: str
    compile: Literal["off", "kernels", "model", "graphs", "auto"]
    threads: int | None
    out: str
    folder: str
    dry_run: bool
    force: bool
    max_steps: int | None
    dataset: Mapping[str, Any]
    model: Mapping[str, Any]
    recipe: Mapping[str, Any]
    float: Mapping[str, Any]
    quantizer: Quantizer
    bitwidth: Mapping[str, Any]
    saved: Literal["all", "inputs", "blocks"] = "all"
    sync_bn: bool = False
    sweep: Sweep = dataclasses.field(default_factory=Sweep)


@dataclasses.dataclass
class Place:
    """Where a run's data set lies now: `dataset` of `qexp eval` and `qexp export`."""

    root: str | None = None


@dataclasses.dataclass
class Eval:
    """`configs/eval.yaml`."""

    run: str | None
    checkpoint: str
    split: Literal["test", "val", "train"]
    device: str
    engine: Literal["float", "integer", "table", "reference", "triton"]
    answers: str | None
    trust: bool
    dataset: Place = dataclasses.field(default_factory=Place)
