"""A recipe, a data set and a model that do nothing, so that a run's life can be tested in seconds.

`write_configs(folder)` writes a `--config-dir` that selects them under the name `tiny`.
"""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from omegaconf import DictConfig
from torch import nn

from qexp.errors import ConfigError, DataError

CONFIGS = {
    "dataset/tiny.yaml": "name: d\n_target_: standin.Data\nroot: data\n",
    "model/tiny.yaml": "name: m\n_target_: standin.Model\ncheckpoint: auto\nwidth: 3\n",
    "recipe/tiny.yaml": (
        "_target_: standin.recipe\nname: r\nepochs: 2\nlr: 0.1\nbatch_size: 4\nthen: done\n"
    ),
}
TINY = ("dataset=tiny", "model=tiny", "recipe=tiny", "recipe@float=tiny")

seen: list[DictConfig] = []  # configs the recipe was called with, in this process


@dataclass
class Settings:
    """`then`: how the recipe ends; `bits=N` fails where bits is N."""

    name: str = "r"
    epochs: int = 2
    lr: float = 0.1
    batch_size: int = 4
    then: str = "done"

    @classmethod
    def of(cls, node: DictConfig) -> Settings:
        return cls(**{str(k): v for k, v in node.items() if k != "_target_"})

    def check(self) -> None:
        if self.lr <= 0:
            raise ConfigError(f"config: recipe.lr={self.lr} is out of range: it must be positive.")


def recipe(cfg: DictConfig, run: Any) -> dict[str, Any]:
    """Count epochs in a file; end as `recipe.then` says."""
    seen.append(cfg)
    for epoch in range(1, cfg.recipe.epochs + 1):
        run.event("epoch", epoch=epoch, loss=float("nan"))
    then = cfg.recipe.then
    if then == f"bits={cfg.bits}" or then == "crash":
        raise ZeroDivisionError("division\nby zero")
    if then == "data":
        raise DataError("data: images not found under 'data'. Set dataset.root=...")
    if then == "interrupt":
        raise KeyboardInterrupt
    if then in ("terminate", "kill"):
        os.kill(os.getpid(), signal.SIGTERM if then == "terminate" else signal.SIGKILL)
    return {"top1": 90.0 + cfg.bits / 10, "threads": torch.get_num_threads()}


class Data:
    """Takes what every data set is given."""

    def __init__(
        self,
        name: str,
        root: str = "data",
        *,
        device: Any,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.root = root
        self.num_classes, self.input_shape, self.train_size = 2, (1, 4, 4), 1000


class Model(nn.Module):
    """Takes what every model is given; three linear layers."""

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        width: int = 3,
        shortcut: Literal["pad", "projection"] = "pad",
        scales: tuple[float, ...] | None = None,
    ) -> None:
        super().__init__()
        self.width = width
        layers = (nn.Linear(16 * in_channels, 4), nn.Linear(4, 4), nn.Linear(4, num_classes))
        self.layers = nn.Sequential(nn.Flatten(), *layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def open_ended(first: int, **others: Any) -> None:
    """A target that takes any keyword."""


def write_configs(folder: Path) -> None:
    """Write the `tiny` configs below `folder`."""
    for name, text in CONFIGS.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
