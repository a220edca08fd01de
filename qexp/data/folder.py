"""Images in folders, one folder per class: ImageNet, or one's own.

    root/train/<class>/*.jpg      root/val/<class>/*.jpg

`val/` is the split `test`, as in every ImageNet table; `val_fraction` holds out a part of `train/`
as the split `val`. Workers decode and cut on the CPU and hand over uint8 pixels, a quarter of the
bytes of floats; normalisation happens on the device.

The random crop of an image is a function of (seed, epoch, its number in the data set), not of the
worker that cuts it, so any number of workers gives the same pixels and a resumed run repeats none.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from qexp.data.augment import normalise, per_channel
from qexp.data.card import Card
from qexp.data.decode import Decoded, Item, check_classes, collate, contents, open_folder
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


@dataclass(kw_only=True)
class Folder:
    """Images in folders, decoded by worker processes.

    Args:
        name: the word in reports.
        root: folder that holds `train/` and `val/`, relative to the current folder.
        classes: expected number of classes; None counts them.
        crop: height and width of the network's input, pixels.
        resize: shorter side before the central crop of evaluation, pixels.
        min_area: smallest share of the image's area that a training crop covers, in (0, 1].
        flip: mirror half of the training images.
        workers: decoding processes, at most one per core; 0 decodes in this one.
        mean, std: per channel, of pixels in [0, 1].
        val_fraction: share of the training images held out as split `val`.
        subset: train on so many images only, drawn stratified; None for all.
        device, batch_size, seed, rank, world_size: as in `memory.InMemory`.

    Raises:
        ConfigError: a value out of range, or that asks for more images than there are.
        DataError: images missing or unreadable.
    """

    name: str
    root: str
    classes: int | None = None
    crop: int = 224
    resize: int = 256
    min_area: float = 0.08
    flip: bool = True
    workers: int = 8
    mean: Sequence[float] = (0.485, 0.456, 0.406)
    std: Sequence[float] = (0.229, 0.224, 0.225)
    val_fraction: float = 0.0
    subset: int | None = None
    device: str | torch.device = "cpu"
    batch_size: int = 128
    seed: int = 0
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.crop <= self.resize:
            raise ConfigError(
                f"config: dataset.crop={self.crop} is not between 1 and dataset.resize="
                f"{self.resize}. Use crop=224 resize=256."
            )
        if not 0 < self.min_area <= 1:
            raise ConfigError(
                f"config: dataset.min_area={self.min_area} is not in (0, 1]. Use 0.08."
            )
        if self.workers < 0:
            raise ConfigError(f"config: dataset.workers={self.workers} is negative. Use 0 or more.")
        self.input_shape = (3, self.crop, self.crop)
        self._mean = per_channel("mean", self.mean, 3, self.name).to(self.device)
        self._std = per_channel("std", self.std, 3, self.name).to(self.device)
        train = open_folder(self.root, "train", self.name)
        test = open_folder(self.root, "val", self.name)
        check_classes(train, test, self.classes, self.root)
        self.num_classes = len(train.classes)
        self.class_names = tuple(train.classes)
        labels = torch.tensor(train.targets)
        self._train, val = split_train(labels, self.val_fraction, self.subset)
        self.train_size, self.has_val = len(self._train), len(val) > 0
        self.steps_per_epoch = steps_in_epoch(self.train_size, self.batch_size, self.world_size)
        self._splits = {"test": (test, torch.arange(len(test))), "train": (train, self._train)}
        if self.has_val:
            self._splits["val"] = (train, val)
        self._random, self._central = self._cuts()

    def _cuts(self) -> tuple[Callable[[Any], Tensor], Callable[[Any], Tensor]]:
        scale = (self.min_area, 1.0)
        random = v2.Compose(
            [
                v2.RandomResizedCrop(self.crop, scale=scale, antialias=True),
                v2.RandomHorizontalFlip(0.5 if self.flip else 0.0),
                v2.PILToTensor(),
            ]
        )
        resize = v2.Resize(self.resize, antialias=True)
        return random, v2.Compose([resize, v2.CenterCrop(self.crop), v2.PILToTensor()])

    def protocol(self) -> dict[str, Any]:
        """What was done to the images, for result.json."""
        return {
            "dataset": self.name,
            "contents": contents(self._splits["train"][0], self._splits["test"][0]),
            "train_images": self.train_size,
            "val_images": len(self._splits["val"][1]) if self.has_val else 0,
            "test_images": len(self._splits["test"][1]),
            "subset": self.subset,
            "split_seed": SPLIT_SEED,
            "augmentation": {
                "random_resized_crop": self.crop,
                "min_area": self.min_area,
                "flip": self.flip,
            },
            "evaluation": {"resize": self.resize, "central_crop": self.crop},
            "mean": [float(v) for v in self.mean],
            "std": [float(v) for v in self.std],
        }

    def _batches(
        self, files: ImageFolder, cut: Callable[[Any], Tensor], batches: Iterable[list[Item]]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        alone = hasattr(os, "sched_getaffinity")  # not on macOS
        cores = len(os.sched_getaffinity(0)) if alone else os.cpu_count() or 1
        on_gpu = torch.device(self.device).type == "cuda"
        loader = DataLoader(
            Decoded(files, cut, self.seed),
            batch_sampler=batches,  # type: ignore[arg-type]
            num_workers=min(self.workers, cores),
            collate_fn=collate,
            pin_memory=on_gpu,
            # The loader draws a base seed even when no item uses it; keep the global stream still.
            generator=torch.Generator().manual_seed(0),
        )
        for batch in loader:
            if isinstance(batch, DataError):
                raise batch
            images, labels = (t.to(self.device, non_blocking=on_gpu) for t in batch)
            yield normalise(images, self._mean, self._std), labels

    def train_batches(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Augmented batches of an epoch from step `start` on: a function of (seed, epoch, step).

        Shape: x [B, 3, crop, crop] float32, y [B] int64.
        """
        order = self._train[epoch_order(self.train_size, self.seed, epoch)]
        parts = (
            order[step_slice(step, self.batch_size, self.rank, self.world_size)].tolist()
            for step in range(start, self.steps_per_epoch)
        )
        batches = ([(i, epoch) for i in part] for part in parts)
        yield from self._batches(self._splits["train"][0], self._random, batches)

    def eval_batches(self, split: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Every image of `test`, `val` or `train` once, centrally cut; this process's share.

        Shape: x [B, 3, crop, crop] float32, y [B] int64.
        """
        files, index = choose_split(self._splits, split, self.name)
        yield from self._central_batches(files, index[self.rank :: self.world_size])

    def _central_batches(
        self, files: ImageFolder, index: Tensor
    ) -> Iterator[tuple[Tensor, Tensor]]:
        parts = index.split(self.batch_size) if len(index) else ()  # split gives one empty part
        yield from self._batches(
            files, self._central, ([(i, 0) for i in p.tolist()] for p in parts)
        )

    def calibration_images(self, n: int, seed: int, *, augment: bool = False) -> Tensor:
        """n different training images, centrally cut; the same for every process.

        Args:
            augment: cut each at random, once, as training's first epoch does.

        Shape: [n, 3, crop, crop] float32.
        """
        if not augment:
            return self.labelled_images(n, seed)[0]
        index = self._train[choose_images(self.train_size, n, seed)]
        parts = ([(i, 0) for i in part.tolist()] for part in index.split(self.batch_size))
        return torch.cat(
            [x for x, _ in self._batches(self._splits["train"][0], self._random, parts)]
        )

    def labelled_images(self, n: int, seed: int) -> tuple[Tensor, Tensor]:
        """As `calibration_images`, with their labels [n]."""
        index = self._train[choose_images(self.train_size, n, seed)]
        batches = list(self._central_batches(self._splits["train"][0], index))
        return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


@dataclass(kw_only=True)
class ImageNet(Folder):
    """ILSVRC 2012, whose published sizes are known before its images are there."""

    card: ClassVar[Card] = Card(1000, (3, 224, 224), 1_281_167)
