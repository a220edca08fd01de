"""The command line, as Hydra has read it. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

BEGUN_WITH = ".hydra/overrides.yaml"


def task_overrides() -> list[str]:
    """What the command line set, as it was typed; Hydra's own keys left out."""
    from hydra.core.hydra_config import HydraConfig

    if not HydraConfig.initialized():
        return []
    typed: Any = OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False)
    return list(typed)


def outvoted() -> Iterator[str]:
    """A line for each choice on the command line whose keys `experiment` set otherwise.

    The experiment comes last in the defaults list, so that of `experiment=table recipe=mine` what
    the table says of the recipe wins over the recipe that was asked for. Choices that the
    experiment sweeps over itself are its own affair.
    """
    from hydra import compose
    from hydra.core.hydra_config import HydraConfig
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    words = [o.partition("=") for o in task_overrides()]
    name = next((value for key, _, value in words if key == "experiment"), None)
    if name in (None, "null"):
        return
    hydra = HydraConfig.get()
    groups = {str(group) for group in hydra.runtime.choices} - set(hydra.sweeper.params or {})
    chosen = [(key, value) for key, _, value in words if key in groups and key != "experiment"]
    if not chosen:
        return
    typed = task_overrides()
    try:
        found = compose(hydra.job.config_name, typed)
        alone = compose(hydra.job.config_name, [o for o in typed if o != f"experiment={name}"])
    except (HydraException, OmegaConfBaseException):
        return  # a key that the experiment alone has: nothing to compare with
    for group, option in chosen:
        node = group.rpartition("@")[2].replace("/", ".")
        ours, theirs = _leaves(found, node), _leaves(alone, node)
        changed = [f"{k}={v} (not {theirs[k]})" for k, v in ours.items() if theirs.get(k, v) != v]
        if changed:
            yield f"experiment={name} sets over {group}={option}: {', '.join(changed)}"


def _leaves(cfg: DictConfig, node: str) -> dict[str, Any]:
    """Values below a node as they are written, by their dotted names."""
    found: dict[str, Any] = {}

    def walk(value: Any, name: str) -> None:
        if isinstance(value, Mapping):
            for key, item in value.items():
                walk(item, f"{name}.{key}")
        else:
            found[name] = value

    section = OmegaConf.select(cfg, node)
    if isinstance(section, DictConfig):
        walk(OmegaConf.to_container(section, resolve=False), node)
    return found


def typed(path: Path) -> list[str]:
    """The overrides that a file of a run's folder keeps; none where it is missing or damaged."""
    try:
        return [str(o) for o in OmegaConf.load(path)]
    except Exception:  # no file; yaml and OmegaConf raise their own kinds
        return []


def folder_override(folder: Path) -> str:
    """`folder='...'`, with the quotes in it, and backslashes before them, escaped for Hydra."""
    text = re.sub(r"(\\*)('|$)", lambda m: m[1] * 2 + m[2].replace("'", "\\'"), str(folder))
    return f"folder='{text}'"


def without_ours(overrides: Sequence[str]) -> list[str]:
    """Those that a user typed: `qexp resume` gives two itself."""
    return [o for o in overrides if o.partition("=")[0] not in ("folder", "dry_run")]


def all_overrides(folder: Path, resumed: str) -> list[str]:
    """What a resumed run was begun with, then what its resumes were given (file `resumed`)."""
    begun, later = typed(folder / BEGUN_WITH), typed(folder / resumed)
    return [*begun, *(o for o in later if o not in begun)]
