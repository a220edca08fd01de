"""The command line, as Hydra has read it. Imports no torch."""

from __future__ import annotations

from typing import Any

from omegaconf import OmegaConf


def task_overrides() -> list[str]:
    """What the command line set, as it was typed; Hydra's own keys left out."""
    from hydra.core.hydra_config import HydraConfig

    if not HydraConfig.initialized():
        return []
    typed: Any = OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False)
    return list(typed)
