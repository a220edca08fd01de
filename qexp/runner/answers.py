"""What a network answered to each test image, beside its label: `answers.npz`. Imports no torch.

Two runs of one top-1 may be right on other images, and the difference of two depends on how many
images only one of them gets right. A top-1 says neither, ten kilobytes a run do (CIFAR-10).

The file holds `predicted` and `label`, [N] each, classes in the smallest unsigned integers that
hold them, images in the order of the split.
"""

from __future__ import annotations

import io
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from qexp.runner.atomic import write_bytes

ANSWERS = "answers.npz"


def write_answers(path: Path, predicted: np.ndarray, label: np.ndarray) -> None:
    """Replace `path` by answers and labels, [N] each, whole or not at all."""
    out = io.BytesIO()
    np.savez_compressed(out, predicted=_small(predicted), label=_small(label))
    write_bytes(path, out.getvalue())


def read_right(path: Path) -> tuple[np.ndarray, np.ndarray] | None:
    """On which images the answer is right, bool [N], and the labels [N]; None without a sound file.

    A label that is no class of the network is never answered right.
    """
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
            predicted, label = file["predicted"], file["label"]
    except (OSError, ValueError, KeyError, EOFError, BadZipFile):
        return None
    if predicted.shape != label.shape or label.ndim != 1 or not label.size:
        return None
    return predicted == label, label


def _small(values: np.ndarray) -> np.ndarray:
    return values.astype(np.min_scalar_type(int(values.max(initial=0))))
