"""Whether a data set of one's own still holds the images that a run began with, or has seen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from omegaconf import DictConfig

from qexp.errors import ConfigError, QexpError
from qexp.recipes.build import make_dataset
from qexp.runner.run import Run


def images_of(dataset: Any) -> dict[str, Any]:
    """What a checkpoint keeps to know the images by: how many train, and what is in them.

    Contents are None of the data sets that come with qexp.
    """
    return {"train": dataset.train_size, "contents": dataset.protocol().get("contents")}


def check_images(dataset: Any, state: Mapping[str, Any], run: Run) -> dict[str, Any]:
    """Refuse to go on with other training images; warn where others have changed.

    Returns:
        `images_of` the data set, which the next checkpoints keep.

    Raises:
        ConfigError: more of them, or fewer: the epochs' order would be another one.
    """
    begun, now = state.get("images"), images_of(dataset)
    if begun is None or begun == now:  # None: of an earlier version
        return now
    if begun["train"] != now["train"]:
        raise ConfigError(
            f"resume: there are {now['train']} training images, the run began with "
            f"{begun['train']}. Put them back, or start a new run."
        )
    run.warn("the images have changed since the run began: its result is of those of now")
    return now


def replaced_images(cfg: DictConfig, protocol: Mapping[str, Any]) -> str:
    """Of whose images a done run with `protocol` saw others; empty where they are the same.

    Images that are gone, and those that come with qexp, are taken for the same.
    """
    known = protocol.get("contents")
    if known is None:
        return ""
    try:
        dataset = make_dataset(cfg, torch.device("cpu"))
    except QexpError:
        return ""
    same = dataset.protocol().get("contents") == known
    return "" if same else f"dataset={cfg.dataset.name}"
