"""The sizes of a data set: what a plan needs to know of it.

Each class has those published, for when its images are not there (the test split as 0).
"""

from __future__ import annotations

from typing import NamedTuple


class Card(NamedTuple):
    """Number of classes, (C, H, W) of an image, numbers of images to train on, of test and val."""

    num_classes: int
    input_shape: tuple[int, int, int]
    train_size: int
    test_size: int = 0
    val_size: int = 0
