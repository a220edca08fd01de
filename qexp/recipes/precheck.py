"""What can be found wrong before a folder is claimed and a float network is trained.

The data set is opened, and the network is built for it and quantized on the CPU, from weights that
are thrown away. Nothing is written, and the random numbers of the run stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from omegaconf import DictConfig, OmegaConf

from qexp.data.sampling import steps_in_epoch
from qexp.errors import ConfigError
from qexp.quant.bitwidth import Uniform
from qexp.quant.convert import Bits
from qexp.quant.trace import Layer, trace
from qexp.recipes import build
from qexp.recipes.start import check_teacher
from qexp.runner.distributed import launched


class Sizes(Protocol):
    """What is asked of a data set here."""

    @property
    def num_classes(self) -> int: ...
    @property
    def input_shape(self) -> tuple[int, ...]: ...
    @property
    def train_size(self) -> int: ...


def precheck(cfg: DictConfig, data: Sizes | None = None) -> None:
    """Build what the run would build, and throw it away.

    Args:
        data: sizes to go by where the data itself is absent (`dry_run`).

    Raises:
        ConfigError: a value, a policy, a network or a file that cannot be had.
        DataError: images missing or damaged, or fewer than one step of all processes takes.
    """
    if not build.is_float(cfg):
        build.make_policy(cfg)
    teacher = (cfg.recipe.get("distill") or {}).get("teacher", "float")
    if teacher != "float" and not Path(teacher).is_file():
        raise ConfigError(f"config: recipe.distill.teacher={teacher} is no file, nor 'float'.")
    check_teacher(cfg)
    with torch.random.fork_rng(devices=[]):
        cpu = torch.device("cpu")
        sizes: Sizes = build.make_dataset(cfg, cpu) if data is None else data
        model = build.make_model(cfg, sizes, cpu)
        try:
            layers = trace(model, sizes.input_shape)
        except RuntimeError as error:
            shape = "x".join(map(str, sizes.input_shape))
            raise ConfigError(
                f"config: model={cfg.model.name} cannot take images of {shape}: {error}."
            ) from error
        bits = None if build.is_float(cfg) else nominal_bits(cfg, layers)
        context = {"epoch": 0, "epochs": cfg.recipe.get("epochs", 1)}
        try:
            build.make_network(unsaved(cfg), model, sizes.input_shape, context=context, bits=bits)
        except ValueError as error:  # a quantizer that has no such width
            raise ConfigError(f"config: quantizer={cfg.quantizer.name}: {error}.") from error
    if "epochs" in cfg.recipe:
        steps_in_epoch(sizes.train_size, cfg.recipe.batch_size, launched().size)
    _enough_images(cfg, sizes.train_size)


def nominal_bits(cfg: DictConfig, layers: Sequence[Layer]) -> dict[str, Bits] | None:
    """The widths to go by where the policy decides with data: `bits`. None: it can be asked.

    Raises:
        ConfigError: what the policy can refuse without data.
    """
    policy = build.make_policy(cfg)
    if hasattr(policy, "check"):
        with build.policy_errors(cfg):
            policy.check(layers)
    if not policy.needs_data:
        return None
    return Uniform(cfg.bits, cfg.bits, cfg.bitwidth.first_last).assign(layers)


def unsaved(cfg: DictConfig) -> DictConfig:
    """`cfg` with a policy that writes no file."""
    if not cfg.bitwidth.get("save"):
        return cfg
    merged = OmegaConf.merge(cfg, {"bitwidth": {"save": None}})
    assert isinstance(merged, DictConfig)
    return merged


def _enough_images(cfg: DictConfig, size: int) -> None:
    """Refuse to look at more training images than there are."""
    if build.is_float(cfg):
        return
    recipe = cfg.recipe
    asked = {"recipe.calibration_images": recipe.get("calibration_images", 0)}
    if "held_out" in recipe:
        asked["recipe.images + recipe.held_out"] = recipe.images + recipe.held_out
    if build.needs_data(cfg):
        asked["bitwidth.images"] = cfg.bitwidth.get("images", 0)
    for key, count in asked.items():
        if count > size:
            raise ConfigError(f"config: {key}={count}, there are {size} to train on. Lower it.")
