"""The command line, as Hydra has read it. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

BEGUN_WITH = ".hydra/overrides.yaml"


def task_overrides() -> list[str]:
    """What the command line set, as it was typed; Hydra's own keys left out."""
    from hydra.core.hydra_config import HydraConfig

    if not HydraConfig.initialized():
        return []
    typed: Any = OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False)
    return list(typed)


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
