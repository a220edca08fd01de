"""What identifies weights: of a run's checkpoint its network, of a pickled file its bytes.

A run's checkpoint also holds times, paths and random state, in which two runs that trained the
same network differ. A safetensors file holds tensors alone and is known by them, so that a network
is the same start in either.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

RUN = {"model", "bits", "start"}  # in every last.pt and best.pt, and in nobody else's file


def file_sha256(path: Path) -> str:
    """Hash of a file, hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read_file(path: Path) -> Any:
    """What a file of weights holds, on the CPU; it cannot run code.

    Raises:
        ImportError: a safetensors file, and no package to read it.
        OSError: the file cannot be read; and whatever the readers raise of a damaged one.
    """
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def is_packed(path: Path) -> bool:
    """Whether a safetensors file that `read_file` has read is one of `qexp export`."""
    if path.suffix != ".safetensors":
        return False
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return "qexp" in (file.metadata() or {})


def network_sha256(state: Mapping[str, Tensor]) -> str:
    """Hash of the names, types, shapes and bytes of tensors, in whatever order; hexadecimal."""
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def weights_sha256(path: Path) -> str:
    """Hash of the network that a run's checkpoint gives to the next run, or of a safetensors file's
    tensors; else of the file.

    A post-training run gives its folded float network and its quantizers.

    Raises:
        OSError: the file cannot be read.
    """
    try:
        content = read_file(path)
    except Exception:  # zip, pickle, and storage readers each raise their own kinds
        return file_sha256(path)
    if path.suffix == ".safetensors":
        return network_sha256(content)
    if not isinstance(content, Mapping) or not set(content) >= RUN:
        return file_sha256(path)
    network = averaged(content) or content["model"]
    if "float" in content:
        network = {**network, **{f"float.{k}": v for k, v in content["float"].items()}}
    return network_sha256(network)


def averaged(content: Any) -> Mapping[str, Tensor] | None:
    """The weight average in a checkpoint of the runner (`recipe.ema`), if it has one."""
    average = content.get("average") if isinstance(content, Mapping) else None
    state = average.get("state") if isinstance(average, Mapping) else None
    return state if isinstance(state, Mapping) and state else None
