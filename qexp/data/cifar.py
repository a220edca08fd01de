"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009) from the original python pickles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from qexp.data.card import Card
from qexp.data.memory import Images, InMemory
from qexp.data.torchvision_files import read_torchvision


@dataclass(kw_only=True)
class CIFAR10(InMemory):
    """50,000 training and 10,000 test images, 32x32 RGB, ten classes.

    Args:
        root: folder that holds `cifar-10-batches-py`.
        download: fetch it when it is not there.
    """

    root: str
    download: bool = False
    title: ClassVar[str] = "CIFAR-10"
    card: ClassVar[Card] = Card(10, (3, 32, 32), 50_000)

    def read(self) -> Images:
        from torchvision import datasets

        kind = getattr(datasets, type(self).__name__)
        parts = read_torchvision(kind, self.title, self.root, self.download, kind.base_folder)
        train, test = parts
        return Images(*_tensors(train), *_tensors(test), tuple(train.classes))


def _tensors(part: Any) -> tuple[Tensor, Tensor]:
    pixels = torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous()  # data [N, 32, 32, 3]
    return pixels, torch.tensor(part.targets)


@dataclass(kw_only=True)
class CIFAR100(CIFAR10):
    """The same with a hundred classes.

    Args:
        root: folder that holds `cifar-100-python`.
        download: fetch it when it is not there.
    """

    title: ClassVar[str] = "CIFAR-100"
    card: ClassVar[Card] = Card(100, (3, 32, 32), 50_000)
