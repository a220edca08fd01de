"""The typed form of `configs/recipe/ptq.yaml`, with its ranges."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from omegaconf import DictConfig, OmegaConf

from qexp.errors import ConfigError, did_you_mean
from qexp.quant.plan import Schedule
from qexp.ranges import LARGEST
from qexp.recipes.settings import refuse_out_of_range


@dataclass(frozen=True)
class Settings(Schedule):
    """Knobs of the recipe; the YAML file explains each."""

    name: str = "ptq"
    images: int = 1024
    act_images: int = 256
    held_out: int = 256
    augment: bool = False
    calibrate_on: Literal["float", "prefix"] = "float"
    batch_size: int = 128
    cache_gb: float = 8.0
    plots: bool = True
    lr: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, node: DictConfig) -> Settings:
        """From the recipe section of a config; an unknown key is a ConfigError."""
        values: Any = OmegaConf.to_container(node, resolve=True)
        values.pop("_target_", None)
        known = [f.name for f in fields(cls)]
        for key in values:
            if key not in known:
                raise ConfigError(f"config: no key 'recipe.{key}'.{did_you_mean(key, known)}")
        return cls(**values)

    def check(self) -> None:
        """Raise one ConfigError that lists every value out of range."""
        rules = [
            (self.images >= 1, "images", "at least 1"),
            (1 <= self.act_images <= self.images, "act_images", "1 to images"),
            (self.held_out >= 1, "held_out", "at least 1"),
            (self.batch_size >= 1, "batch_size", "at least 1"),
            (self.iterations >= 1, "iterations", "at least 1"),
            (self.step_iterations >= 1, "step_iterations", "at least 1"),
            (1 <= self.minibatch <= self.images, "minibatch", "1 to images"),
            (all(0 <= rate <= LARGEST for rate in self.lr.values()), "lr", "rates >= 0, finite"),
            ({"rounding", "scale"} <= set(self.lr), "lr", "a mapping with rounding and scale"),
            (self.step_lr >= 0, "step_lr", ">= 0"),
            (self.step_p > 0, "step_p", "positive"),
            (self.penalty >= 0, "penalty", ">= 0"),
            (
                len(self.beta) == 2 and all(beta > 0 for beta in self.beta),
                "beta",
                "two positive numbers, first and last",
            ),
            (0 <= self.warmup < 1, "warmup", "in [0, 1)"),
            (self.cache_gb >= 0, "cache_gb", ">= 0"),
            (self.calibrate_on in ("float", "prefix"), "calibrate_on", "float or prefix"),
        ]
        refuse_out_of_range(self, rules)
