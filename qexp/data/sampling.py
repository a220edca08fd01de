"""Which images, in which order: pure functions of seeds, so that nothing has to be saved.

The order of an epoch is a function of (seed, epoch) and the split of the training images a
function of their labels alone. A run resumed at (epoch, step) therefore sees what the
uninterrupted run saw, and every seed of an experiment, the float baseline included, holds out the
same validation images.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor

from qexp.errors import ConfigError

Part = TypeVar("Part")

SPLIT_SEED = 0  # of the hold-out and of `subset`: the same for every run


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from any parts. (seed, epoch) pairs never collide as seed + epoch would."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator(*parts: int | str) -> torch.Generator:
    """A CPU generator seeded with `derive_seed`: the same numbers whatever the device."""
    return torch.Generator().manual_seed(derive_seed(*parts))


def stratified_order(labels: Tensor) -> Tensor:
    """A random order of all images of which every prefix has the classes in proportion.

    Shape: labels [N] -> [N].
    """
    shuffled = torch.randperm(len(labels), generator=generator("split", SPLIT_SEED))
    by_class, order = labels[shuffled].sort(stable=True)
    counts = torch.bincount(by_class)
    first = counts.cumsum(0) - counts  # [C] where each class begins in by_class
    place = torch.arange(len(labels)) - first[by_class]
    key = (place + 0.5) / counts[by_class]  # the k-th of a class of n stands at (k + 1/2) / n
    return shuffled[order[key.argsort(stable=True)]]


def split_train(labels: Tensor, val_fraction: float, subset: int | None) -> tuple[Tensor, Tensor]:
    """Indices of the training and the held-out images, each sorted.

    Args:
        labels: of all training images, [N].
        val_fraction: share held out, in [0, 1).
        subset: how many of the remaining images to keep; None keeps all.

    Raises:
        ConfigError: val_fraction outside [0, 1), subset not a positive integer, no image left, or
            subset larger than what is left.
    """
    if isinstance(val_fraction, (bool, str)) or not 0 <= val_fraction < 1:
        raise ConfigError(
            f"config: dataset.val_fraction={val_fraction} is not in [0, 1). Use 0.1 or 0."
        )
    if subset is not None and (
        isinstance(subset, bool) or not isinstance(subset, int) or subset < 1
    ):
        raise ConfigError(
            f"config: dataset.subset={subset} is not a positive integer. Use null for all images."
        )
    order = stratified_order(labels)
    held_out = round(val_fraction * len(labels))
    left = len(labels) - held_out
    if left < 1:
        raise ConfigError(
            f"config: dataset.val_fraction={val_fraction} holds out all {len(labels)} training "
            "images. Lower it."
        )
    if subset is not None and subset > left:
        raise ConfigError(
            f"config: {left} training images are left, dataset.subset={subset} asks for more. "
            "Lower dataset.subset or dataset.val_fraction."
        )
    train = order[held_out : None if subset is None else held_out + subset]
    return train.sort().values, order[:held_out].sort().values


def steps_in_epoch(train_size: int, batch_size: int, world_size: int) -> int:
    """Optimizer steps of one epoch. The last incomplete batch is dropped.

    A data set smaller than one batch, in a single process, is one smaller batch.

    Raises:
        ConfigError: batch_size is not a positive integer, or one step of all processes takes more
            images than there are.
    """
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ConfigError(
            f"config: a batch size of {batch_size} is not a positive integer. "
            "Use recipe.batch_size=128."
        )
    if world_size > 1 and train_size < batch_size * world_size:
        raise ConfigError(
            f"config: {train_size} training images do not fill one batch of {batch_size} for each "
            f"of {world_size} processes. Lower recipe.batch_size."
        )
    return max(1, train_size // (batch_size * world_size))


def epoch_order(size: int, seed: int, epoch: int) -> Tensor:
    """The order of the training images in one epoch. Shape: [size]."""
    return torch.randperm(size, generator=generator("order", seed, epoch))


def step_slice(step: int, batch_size: int, rank: int, world_size: int) -> slice:
    """The part of an epoch's order that a process takes at a step.

    All processes together take `batch_size * world_size` consecutive images.
    """
    begin = (step * world_size + rank) * batch_size
    return slice(begin, begin + batch_size)


def choose_images(size: int, n: int, seed: int) -> Tensor:
    """Indices of n different training images, for calibration. Shape: [n].

    Raises:
        ConfigError: n is not between 1 and the number of training images.
    """
    if not 1 <= n <= size:
        raise ConfigError(
            f"config: {n} calibration images asked, there are {size} for training. "
            "Lower the number of calibration images."
        )
    return torch.randperm(size, generator=generator("calibrate", seed))[:n]


def choose_split(splits: Mapping[str, Part], split: str, name: str) -> Part:
    """The part of a data set called `split`.

    Raises:
        ConfigError: there is none.
    """
    if split not in splits:
        trained = ", or a run trained with dataset.val_fraction=0.1" if split == "val" else ""
        raise ConfigError(
            f"data: {name} has no split '{split}' (has: {', '.join(splits)}). "
            f"Use split=test{trained}."
        )
    return splits[split]
