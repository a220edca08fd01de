"""Compose a training config in a test, without the command line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf, open_dict

from qexp.config import configs_dir
from qexp.recipes import outcome

# A ResNet-8 of width 4 on 32 made images of 8x8: a step takes milliseconds.
TINY = (
    "dataset=synthetic",
    "dataset.image_size=8",
    "dataset.train_images=48",
    "dataset.test_images=32",
    "dataset.classes=4",
    "model=resnet8",
    "model.width=0.25",
    "recipe.batch_size=16",
    "recipe.calibration_images=16",
    "recipe.plots=false",
    "float.batch_size=16",
    "float.epochs=2",
    "float.plots=false",
    "device=cpu",
    "compile=off",
)

# The same for post-training quantization, a few iterations a unit.
TINY_PTQ = (
    *(word for word in TINY if not word.startswith("recipe.")),
    "model.checkpoint=null",
    "recipe.images=24",
    "recipe.act_images=16",
    "recipe.held_out=16",
    "recipe.batch_size=16",
    "recipe.minibatch=8",
    "recipe.iterations=4",
    "recipe.step_iterations=3",
    "recipe.plots=false",
)


def tiny(out: Path, *overrides: str, base: Sequence[str] = TINY) -> DictConfig:
    """The tiny training config with `overrides`, resolved, its folder under `out`."""
    with initialize_config_dir(str(configs_dir()), version_base="1.3"):
        cfg = compose("train", overrides=[*base, f"out={out}", *overrides])
    with open_dict(cfg):
        cfg.folder = str(out / "run")
    plain = OmegaConf.create(OmegaConf.to_container(cfg, resolve=True))
    assert isinstance(plain, DictConfig)
    return plain


@contextmanager
def stopped_in_epoch(epoch: int) -> Iterator[None]:
    """Inside, training is interrupted, as by Ctrl-C, when it has come through this epoch.

    The checkpoint is that of the epoch before.
    """
    logged = outcome.log_epoch

    def stop(*given: Any, **more: Any) -> bool:
        if given[2]["epoch"] == epoch:
            raise KeyboardInterrupt
        return logged(*given, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(outcome, "log_epoch", stop)
        with pytest.raises(KeyboardInterrupt):
            yield
