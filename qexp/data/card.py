"""The published sizes of a data set: enough for a plan when its images are not there."""

from __future__ import annotations

from typing import NamedTuple


class Card(NamedTuple):
    """Number of classes, (C, H, W) of an image, number of training images."""

    num_classes: int
    input_shape: tuple[int, int, int]
    train_size: int
