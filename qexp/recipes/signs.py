"""Whether each layer's input is signed: decided once in a run's life, then kept.

`trace` sees it on noise, with the weights that the network has then: a branch that starts at zero,
or pooled SiLU, can be non-negative with some weights and not with others. A quantizer's integer
bounds follow from it and are in no state_dict. So checkpoints hold `signed`, by layer, and whoever
rebuilds their network takes it from there.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from qexp.errors import CheckpointError
from qexp.quant.trace import Layer
from qexp.runner import checkpoint
from qexp.runner.run import Run


def signs(layers: Iterable[Layer]) -> dict[str, bool]:
    """By layer name: what a checkpoint keeps."""
    return {layer.name: layer.signed for layer in layers}


def with_signs(layers: Iterable[Layer], signed: Mapping[str, bool]) -> list[Layer]:
    """`layers`, each signed as `signed` says; one that it does not name stays as traced."""
    return [replace(layer, signed=signed.get(layer.name, layer.signed)) for layer in layers]


def load_run_state(path: Path) -> dict[str, Any]:
    """A run's checkpoint, with `signed`; from layers.csv beside it where an older one lacks it.

    Raises:
        CheckpointError: as `checkpoint.load`.
    """
    state = checkpoint.load(path)
    return {"signed": _reported(path.with_name("layers.csv")), **state}


def resumed_state(run: Run) -> dict[str, Any] | None:
    """The last.pt that a run goes on from; None of a run that begins, or had none yet.

    Raises:
        CheckpointError: as `checkpoint.load`, or it is of no run.
    """
    path = run.dir / "last.pt"
    if not (run.resumed and path.exists()):
        return None
    state = load_run_state(path)
    if not {"model", "bits", "start"} <= set(state):
        raise CheckpointError(
            f"resume: {path} is no checkpoint of a run. Delete it and the run starts over."
        )
    return state


def warn_clipped(run: Run, layers: Sequence[str]) -> None:
    """Say which layers' inputs, unsigned on noise, are negative on images (`calibrate_`)."""
    if layers:
        first = layers[0] + (", ..." if len(layers) > 1 else "")
        run.warn(
            f"{len(layers)} inputs taken for unsigned have negative values, which become 0: {first}"
        )


def _reported(path: Path) -> dict[str, bool]:
    """The column `signed` of a layers.csv; nothing without one."""
    if not path.is_file():
        return {}
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get("name")]
    return {r["name"]: r["signed"] == "true" for r in rows if r.get("signed") in ("true", "false")}
