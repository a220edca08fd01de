"""From files to uint8 pixels: listing class folders, decoding in worker processes.

What can be wrong with a folder of images is found here and said in one line.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets import ImageFolder

from qexp.data.sampling import derive_seed
from qexp.errors import DataError

Item = tuple[int, int]  # number of an image, epoch


class Decoded(Dataset):
    """Images of a folder as uint8 pixels [3, H, W], with their labels.

    An unreadable image is returned as a DataError: raised, it would leave a worker process as a
    page of traceback.
    """

    def __init__(self, files: ImageFolder, cut: Callable[[Any], Tensor], seed: int) -> None:
        self.files = files
        self.cut = cut
        self.seed = seed

    def __getitem__(self, item: Item) -> tuple[Tensor, int] | DataError:
        index, epoch = item
        path, label = self.files.samples[index]
        kept = torch.get_rng_state()  # of the run, when no worker process stands between
        torch.default_generator.manual_seed(derive_seed("cut", self.seed, epoch, index))
        try:
            return self.cut(load_rgb(path)), label
        except Exception as error:  # PIL raises OSError, SyntaxError, ValueError, struct.error, ...
            reason = str(error).split("\n")[0].replace(f" '{path}'", "").rstrip(".")[:80]
            return DataError(
                f"data: {path} cannot be read as an image ({reason}). Replace or remove it."
            )
        finally:
            torch.set_rng_state(kept)


def load_rgb(path: str) -> Image.Image:
    """The image, as torchvision's loader has it, of at most 8 bits a channel.

    Raises:
        ValueError: more bits, which PIL would cut off: white or black images.
    """
    with open(path, "rb") as file, Image.open(file) as image:
        if image.mode[:1] in ("I", "F"):
            raise ValueError(f"mode {image.mode}: more than 8 bits a channel")
        return image.convert("RGB")


def collate(items: list[tuple[Tensor, int] | DataError]) -> tuple[Tensor, Tensor] | DataError:
    """Stack a batch, or pass on its first unreadable image."""
    for item in items:
        if isinstance(item, DataError):
            return item
    images, labels = zip(*items, strict=True)
    return torch.stack(images), torch.tensor(labels)


def open_folder(root: str, part: str, name: str) -> ImageFolder:
    """List `root/part`, one class per folder.

    Raises:
        DataError: no such folder, no class, or a class without images.
    """
    folder = Path(root) / part
    if not folder.is_dir():
        raise DataError(
            f"data: {name} not found under '{root}': no folder '{part}'. Set dataset.root=... to "
            "the folder that holds train/ and val/, or use dataset=fashion_mini."
        )
    if not any(p.is_dir() for p in folder.iterdir()):
        raise DataError(
            f"data: '{folder}' is empty: it needs one folder of images per class. "
            "Set dataset.root=..., or use dataset=fashion_mini."
        )
    files = ImageFolder(str(folder), allow_empty=True)
    filled = set(files.targets)
    for label, class_name in enumerate(files.classes):
        if label not in filled:
            raise DataError(
                f"data: class '{class_name}' has no images in '{folder}'. "
                "Add some or remove the folder."
            )
    return files


def check_classes(train: ImageFolder, test: ImageFolder, expected: int | None, root: str) -> None:
    """Refuse folders whose class lists differ from each other or from the expected number."""
    if train.classes != test.classes:
        only = sorted(set(train.classes) ^ set(test.classes))
        place = "train" if only[0] in train.classes else "val"
        raise DataError(
            f"data: train/ and val/ under '{root}' have different classes: '{only[0]}' is only in "
            f"{place}/ ({len(only)} differ). Make the folder names equal."
        )
    if expected is not None and len(train.classes) != expected:
        raise DataError(
            f"data: {len(train.classes)} classes under '{root}', dataset.classes={expected}. "
            "Set dataset.classes=null to count them, or dataset.root=..."
        )


def contents(*parts: ImageFolder) -> str:
    """Twelve hex digits of the class names and how many images each has, in every part, and of the
    last part (val/, the smaller one) the names and sizes of the files.

    They tell data sets of one name apart wherever they lie; no image is read.
    """
    counts = [{files.classes[k]: n for k, n in Counter(files.targets).items()} for files in parts]
    places = [Path(path) for path, _ in parts[-1].samples]
    sizes = sorted((f"{p.parent.name}/{p.name}", p.stat().st_size) for p in places)
    told = json.dumps([counts, sizes], sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()[:12]
