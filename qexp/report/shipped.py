"""What a method's name alone stands for: the options of its config as it is shipped."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from qexp.config import configs_dir
from qexp.report.runs import flatten


@cache
def shipped(method: str) -> Mapping[str, Any]:
    """Options of `quantizer=METHOD`, or of the parts of `WEIGHT+ACT`, as `quantizer.weight.init`.

    Empty for a name that is no config of ours.
    """
    folder = configs_dir() / "quantizer"
    weight, _, act = method.partition("+")
    if method in _choices(folder):
        tree = _read(folder, method)
    elif weight in _choices(folder / "weight") and act in _choices(folder / "act"):
        tree = {"weight": _read(folder / "weight", weight), "act": _read(folder / "act", act)}
    else:
        tree = {}
    return dict(flatten({"quantizer": tree}))


def _choices(folder: Path) -> set[str]:
    return {file.stem for file in folder.glob("*.yaml")}


def _read(folder: Path, choice: str) -> dict[str, Any]:
    """A config under those of its defaults list that are in its own folder or below."""
    own = yaml.safe_load((folder / f"{choice}.yaml").read_text())
    tree: dict[str, Any] = {}
    for entry in own.pop("defaults", []):
        if isinstance(entry, Mapping):
            for group, below in entry.items():
                if not group.startswith("override "):
                    tree[group] = _read(folder / group, below)
        elif entry != "_self_":
            tree = _merged(tree, _read(folder, entry))
    return _merged(tree, own)


def _merged(below: dict[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    both = {k: v for k, v in above.items() if isinstance(v, Mapping) and k in below}
    return {**below, **above, **{k: _merged(below[k], v) for k, v in both.items()}}
