"""The keys of `qexp bench train`, checked; and how both benches read theirs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from omegaconf import DictConfig, ListConfig

from qexp.errors import ConfigError, did_you_mean

SAVED = ("all", "inputs", "blocks")  # recipes/saving.py
MODES = ("off", "kernels", "model", "graphs")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def fields_of(kind: type, cfg: DictConfig) -> dict[str, Any]:
    """What `cfg` gives the fields of a dataclass; a field that is a list also takes one value."""
    found: dict[str, Any] = {}
    for field in fields(kind):
        value = cfg[field.name]
        if isinstance(value, ListConfig):
            value = list(value)
        elif str(field.type).startswith("list"):
            value = [value]
        found[field.name] = value
    return found


def no_option(key: str, values: Iterable[Any], options: Sequence[str]) -> list[str]:
    """A line for each of `values` that is none of `options`."""
    return [
        f"config: {key}={value} is not an option. Use {', '.join(options)}."
        + did_you_mean(str(value), options)
        for value in values
        if value not in options
    ]


def no_count(settings: Mapping[str, Any]) -> list[str]:
    """A line for each value that must count something, if there is one, and does not."""
    values = [
        (key, value)
        for key in ("batch", "repeats", "warmup", "image_size", "threads")
        for value in (settings[key] if isinstance(settings[key], list) else [settings[key]])
    ]
    return [
        f"config: {key} must be a positive integer, got {value!r}."
        for key, value in values
        if value is not None and (not isinstance(value, int) or value < 1)
    ]


@dataclass(frozen=True)
class Settings:
    """`configs/bench_train.yaml`, checked; what may be a list is one."""

    quantizers: list[str]
    models: list[str]
    compile: list[str]
    dtype: list[str]
    bits: int
    batch: int
    image_size: int | None
    channels_last: bool
    overrides: list[str]
    peers: bool
    saved: str
    repeats: int
    warmup: int
    device: str
    threads: int | None
    seed: int
    out: str

    @classmethod
    def of(cls, cfg: DictConfig) -> Settings:
        """Read the config.

        Raises:
            ConfigError: a value out of range or an unknown choice.
        """
        found = fields_of(cls, cfg)
        found["compile"] = ["off" if mode is False else mode for mode in found["compile"]]  # YAML
        settings = cls(**found)
        settings.check()
        return settings

    def check(self) -> None:
        """Raise a ConfigError with all that is wrong."""
        problems = [
            *no_option("compile", self.compile, MODES),
            *no_option("dtype", self.dtype, tuple(DTYPES)),
            *no_option("saved", [self.saved], SAVED),
        ]
        for key in ("quantizers", "models", "compile", "dtype"):
            if not getattr(self, key):
                problems.append(f"config: {key} is empty. Name at least one.")
        problems += no_count(vars(self))
        if problems:
            raise ConfigError("\n".join(problems))

    def facts(self, threads: int) -> dict[str, Any]:
        """What every row of bench.json says about how it was measured."""
        return {
            "batch": self.batch,
            "bits": self.bits,
            "repeats": self.repeats,
            "threads": threads,
            "channels_last": self.channels_last,
            "saved": self.saved,
            "overrides": self.overrides,
        }
