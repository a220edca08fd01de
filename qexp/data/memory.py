"""Small images: all of them as uint8 on the device, augmented there in batches.

CIFAR-10 is 184 MB as uint8, so no worker, queue or copy stands between the images and a step.
A data set is a subclass that says how to `read` its images; everything else is here.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qexp.data.augment import crop_flip, draw_crops, normalise, pad_images, per_channel
from qexp.data.sampling import (
    SPLIT_SEED,
    choose_images,
    choose_split,
    epoch_order,
    split_train,
    step_slice,
    steps_in_epoch,
)
from qexp.errors import ConfigError, DataError


class Images(NamedTuple):
    """What a data set reads: images uint8 [N, C, H, W], labels int64 [N] in [0, classes).

    `classes` are the labels' names, in their order; empty where nobody gave them any.
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: tuple[str, ...] = ()


def contents(images: Images) -> str:
    """Twelve hex digits of all pixels and labels: a name and a place do not say what is in them.

    Raises:
        DataError: they are not what `Images` says.
    """
    digest = hashlib.sha256()
    for tensor, dtype, axes in zip(
        images[:4], (torch.uint8, torch.int64) * 2, (4, 1) * 2, strict=True
    ):
        if tensor.dtype != dtype or tensor.dim() != axes:
            raise DataError(
                f"data: read() must give images uint8 [N, C, H, W] and labels int64 [N]; got "
                f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}."
            )
        digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()[:12]


@dataclass(kw_only=True)
class InMemory(ABC):
    """A data set that lives on the device.

    Args:
        name: the word in reports.
        mean, std: per channel, of pixels in [0, 1].
        pad: pixels of black border a random crop may reach into; 0 for no crop.
        flip: mirror half of the training images.
        val_fraction: share of the training images held out as split `val`.
        subset: train on so many images only, drawn stratified; None for all.
        device: where the images live.
        batch_size: images per step and process.
        seed: of order and augmentation.
        rank, world_size: this process among those that share each epoch.

    Raises:
        ConfigError: a value out of range, or that asks for more images than there are.
        DataError: images missing or damaged.
    """

    name: str
    mean: Sequence[float]
    std: Sequence[float]
    pad: int
    flip: bool
    val_fraction: float = 0.0
    subset: int | None = None
    device: str | torch.device = "cpu"
    batch_size: int = 128
    seed: int = 0
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.pad, bool) or not isinstance(self.pad, int) or self.pad < 0:
            raise ConfigError(
                f"config: dataset.pad={self.pad} is not a whole number of pixels >= 0."
            )
        images = self.read()
        self._contents = None if type(self).__module__.startswith("qexp.") else contents(images)
        channels, self._height, self._width = images.train_images.shape[1:]
        self.input_shape = (channels, self._height, self._width)
        self.num_classes = int(images.train_labels.max()) + 1
        self.class_names = images.classes
        self._mean = per_channel("mean", self.mean, channels, self.name).to(self.device)
        self._std = per_channel("std", self.std, channels, self.name).to(self.device)
        train, val = split_train(images.train_labels, self.val_fraction, self.subset)
        self.train_size, self._val_size, self.has_val = len(train), len(val), len(val) > 0
        self.steps_per_epoch = steps_in_epoch(self.train_size, self.batch_size, self.world_size)
        on = self.device
        self._padded = pad_images(images.train_images[train], self.pad).to(on)
        self._labels = images.train_labels[train].to(on)
        self._splits = {"test": (images.test_images.to(on), images.test_labels.to(on))}
        if self.has_val:
            held_out = images.train_images[val].to(on), images.train_labels[val].to(on)
            self._splits["val"] = held_out
        inner = self._padded[
            :, :, self.pad : self.pad + self._height, self.pad : self.pad + self._width
        ]
        self._splits["train"] = (inner, self._labels)  # a view of the padded images

    @abstractmethod
    def read(self) -> Images:
        """All images and labels, on the CPU."""

    def protocol(self) -> dict[str, Any]:
        """What was done to the images, for result.json."""
        return {
            "dataset": self.name,
            **({"contents": self._contents} if self._contents else {}),
            "train_images": self.train_size,
            "val_images": self._val_size,
            "test_images": len(self._splits["test"][1]),
            "subset": self.subset,
            "split_seed": SPLIT_SEED,
            "augmentation": {"crop_pad": self.pad, "flip": self.flip},
            "mean": [float(v) for v in self.mean],
            "std": [float(v) for v in self.std],
        }

    def train_batches(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Augmented batches of an epoch from step `start` on: a function of (seed, epoch, step).

        Shape: x [B, C, H, W] float32, y [B] int64.
        """
        order = epoch_order(self.train_size, self.seed, epoch).to(self.device)
        crops = draw_crops(self.train_size, self.pad, self.flip, self.seed, epoch).to(self.device)
        for step in range(start, self.steps_per_epoch):
            part = step_slice(step, self.batch_size, self.rank, self.world_size)
            index = order[part]
            x = crop_flip(self._padded, index, crops[part], self._height, self._width)
            yield normalise(x, self._mean, self._std), self._labels[index]

    def eval_batches(self, split: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Every image of `test`, `val` or `train` once, not augmented; this process's share.

        Shape: x [B, C, H, W] float32, y [B] int64.
        """
        images, labels = choose_split(self._splits, split, self.name)
        images, labels = images[self.rank :: self.world_size], labels[self.rank :: self.world_size]
        for i in range(0, len(labels), self.batch_size):
            part = slice(i, i + self.batch_size)
            yield normalise(images[part], self._mean, self._std), labels[part]

    def calibration_images(self, n: int, seed: int, *, augment: bool = False) -> Tensor:
        """n different training images; the same for every process.

        Args:
            augment: crop and mirror each at random, once.

        Shape: [n, C, H, W] float32.
        """
        if not augment:
            return self.labelled_images(n, seed)[0]
        chosen = choose_images(self.train_size, n, seed).to(self.device)
        crops = draw_crops(n, self.pad, self.flip, seed, 0).to(self.device)
        x = crop_flip(self._padded, chosen, crops, self._height, self._width)
        return normalise(x, self._mean, self._std)

    def labelled_images(self, n: int, seed: int) -> tuple[Tensor, Tensor]:
        """As `calibration_images`, with their labels [n]."""
        chosen = choose_images(self.train_size, n, seed).to(self.device)
        images, labels = self._splits["train"]
        return normalise(images[chosen], self._mean, self._std), labels[chosen]
