"""Checkpoints: written atomically, read with `weights_only`, random state included.

A state is a dict of tensors, numbers, strings, lists and dicts: nothing that `weights_only=True`
refuses, so a checkpoint from anywhere can be opened without running its code.
"""

from __future__ import annotations

import io
import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qexp.errors import CheckpointError
from qexp.runner.atomic import write_bytes


def save(path: Path, state: dict[str, Any]) -> None:
    """Replace `path` by `state`. A process killed at any moment leaves a loadable file."""
    # Through memory: torch's own writer turns "no space left" into an unrelated RuntimeError.
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_bytes(path, buffer.getvalue())


def load(path: Path, map_location: str | torch.device = "cpu") -> dict[str, Any]:
    """The state in `path`.

    Raises:
        CheckpointError: missing, truncated, or not a checkpoint of plain data.
    """
    if not path.is_file():
        raise CheckpointError(f"checkpoint: no file '{path}'. Give an existing .pt file.")
    try:
        state = torch.load(path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"checkpoint: '{path}' is damaged, or holds more than tensors and plain data. "
            "Save its state_dict() with torch.save and load that."
        ) from error
    except Exception as error:  # each reader of torch.load raises its own kinds
        size = path.stat().st_size
        best = path.with_name("best.pt")
        other = f", or take the best epoch's: {best}" if path != best and best.is_file() else ""
        raise CheckpointError(
            f"checkpoint: '{path}' is truncated or not a checkpoint ({size} bytes). "
            f"Copy or download it again{other}."
        ) from error
    if not isinstance(state, dict):
        raise CheckpointError(
            f"checkpoint: '{path}' holds a {type(state).__name__}, not a dict. Save a state_dict()."
        )
    return state


def rng_state() -> dict[str, Any]:
    """Random state of python, numpy, torch and every CUDA device, as plain data."""
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    words = torch.from_numpy(np.asarray(keys, dtype="int64"))  # torch cannot save uint32 arrays
    return {
        "python": [version, list(internal), gauss],
        "numpy": [name, words, position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Put back what `rng_state` returned."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype("uint32"), position, has_gauss, cached))
    torch.set_rng_state(state["torch"].cpu())
    # A checkpoint made elsewhere may know another number of devices: the common ones are set.
    for device, value in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(value.cpu(), device)
