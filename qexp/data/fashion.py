"""Fashion-MNIST (arXiv:1708.07747): the embedded tenth of it, and the official one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from qexp.data.card import Card
from qexp.data.memory import Images, InMemory
from qexp.data.torchvision_files import read_torchvision

MINI = Path(__file__).with_name("fashion_mini.npz")
CLASSES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker",
           "Bag", "Ankle boot")  # fmt: skip


@dataclass(kw_only=True)
class FashionMini(InMemory):
    """8,000 training and 2,000 test images of Fashion-MNIST, inside this package.

    Drawn stratified from all 70,000: not the official split, so not comparable with published
    Fashion-MNIST numbers. Licence: fashion_mini.LICENSE.txt.
    """

    def read(self) -> Images:
        with np.load(MINI) as arrays:
            parts = {key: torch.from_numpy(arrays[key]) for key in arrays}
        return Images(
            parts["train_images"][:, None],
            parts["train_labels"].long(),
            parts["test_images"][:, None],
            parts["test_labels"].long(),
            CLASSES,
        )


@dataclass(kw_only=True)
class FashionMNIST(InMemory):
    """The official 60,000 and 10,000 images.

    Args:
        root: folder that holds `FashionMNIST/raw`.
        download: fetch it when it is not there.
    """

    root: str
    download: bool = False
    card: ClassVar[Card] = Card(10, (1, 28, 28), 60_000)

    def read(self) -> Images:
        from torchvision import datasets

        train, test = read_torchvision(
            datasets.FashionMNIST, "Fashion-MNIST", self.root, self.download, "FashionMNIST/raw"
        )
        return Images(*_tensors(train), *_tensors(test), CLASSES)


def _tensors(part: Any) -> tuple[Tensor, Tensor]:
    return part.data[:, None], part.targets.long()
