"""The typed form of `configs/recipe/qat.yaml`, with its ranges."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from operator import attrgetter
from typing import Any

from omegaconf import DictConfig, OmegaConf

from qexp.errors import ConfigError, did_you_mean
from qexp.ranges import LARGEST


@dataclass(frozen=True)
class Distill:
    """loss = (1 - weight) * cross-entropy + weight * T^2 * KL(teacher || student).

    `model` is the teacher's, as a `model` section of a config; None: the student's own.
    """

    weight: float = 0.0
    temperature: float = 1.0
    teacher: str = "float"
    model: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Settings:
    """Knobs of the training recipe; the YAML file explains each."""

    name: str = "qat"
    from_scratch: bool = False
    epochs: int = 6
    batch_size: int = 128
    accumulate: int = 1
    optimizer: str = "sgd"
    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 1e-4
    quantizer_lr: float | None = None
    quantizer_weight_decay: float = 0.0
    schedule: str = "cosine"
    warmup_epochs: float = 0.0
    milestones: Sequence[float] = (0.5, 0.75)
    label_smoothing: float = 0.0
    distill: Distill = field(default_factory=Distill)
    ema: float = 0.0
    grad_clip: float | None = None
    amp: bool = False
    channels_last: bool = False
    calibration_images: int = 256
    bn_reestimate: int = 0
    save_every: int = 0
    plots: bool = True

    @classmethod
    def of(cls, node: DictConfig) -> Settings:
        """From the `recipe` node of a composed config; raises ConfigError on unknown keys."""
        values: dict[str, Any] = dict(OmegaConf.to_container(node, resolve=True))  # type: ignore[arg-type]
        values.pop("_target_", None)
        known = {f.name for f in fields(cls)}
        for key in values:
            if key not in known:
                hint = did_you_mean(key, known)
                raise ConfigError(
                    f"config: no key 'recipe.{key}' (has: {', '.join(sorted(known))}).{hint}"
                )
        if isinstance(values.get("distill"), dict):
            values["distill"] = Distill(**values["distill"])
        return cls(**values)

    def check(self) -> None:
        """Raise one ConfigError that lists every value out of range."""
        rules = [
            (self.epochs >= 1, "epochs", "at least 1"),
            (self.batch_size >= 1, "batch_size", "at least 1"),
            (1 <= self.accumulate <= self.batch_size, "accumulate", "1 to batch_size"),
            (self.optimizer in ("sgd", "adamw"), "optimizer", "sgd or adamw"),
            (0 < self.lr <= LARGEST, "lr", f"positive, and at most {LARGEST:g}"),
            (
                self.quantizer_lr is None or 0 <= self.quantizer_lr <= LARGEST,
                "quantizer_lr",
                f"null, or from 0 to {LARGEST:g}",
            ),
            (0 <= self.momentum < 1, "momentum", "in [0, 1)"),
            (self.weight_decay >= 0, "weight_decay", ">= 0"),
            (self.quantizer_weight_decay >= 0, "quantizer_weight_decay", ">= 0"),
            (
                self.schedule in ("cosine", "linear", "step", "constant"),
                "schedule",
                "cosine, linear, step or constant",
            ),
            (
                self.warmup_epochs >= 0 and (self.epochs < 1 or self.warmup_epochs < self.epochs),
                "warmup_epochs",
                "from 0 to below epochs",
            ),
            (all(0 < m < 1 for m in self.milestones), "milestones", "fractions of the training"),
            (0 <= self.label_smoothing < 1, "label_smoothing", "in [0, 1)"),
            (0 <= self.distill.weight <= 1, "distill.weight", "in [0, 1]"),
            (self.distill.temperature > 0, "distill.temperature", "positive"),
            (0 <= self.ema < 1, "ema", "in [0, 1)"),
            (self.grad_clip is None or self.grad_clip > 0, "grad_clip", "null or positive"),
            (self.calibration_images >= 1, "calibration_images", "at least 1"),
            (self.bn_reestimate >= 0, "bn_reestimate", ">= 0"),
            (self.save_every >= 0, "save_every", ">= 0"),
        ]
        refuse_out_of_range(self, rules)


def refuse_out_of_range(settings: Any, rules: Sequence[tuple[bool, str, str]]) -> None:
    """Raise one ConfigError that lists every broken rule `(holds, key, what it must be)`.

    No setting may be infinite or NaN.
    """
    broken = [(key, rule) for holds, key, rule in rules if not holds]
    told = {key for key, _ in broken}
    for name in (f.name for f in fields(settings) if f.name not in told):
        value = getattr(settings, name)
        if isinstance(value, float) and not math.isfinite(value):
            broken.append((name, "finite"))
    if broken:
        raise ConfigError(
            "\n".join(
                f"config: recipe.{key}={attrgetter(key)(settings)} is out of range: it must be "
                f"{rule}."
                for key, rule in broken
            )
        )
