"""A network without its data set: the sizes that it is built by, from a checkpoint or published."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from hydra.utils import get_class
from omegaconf import DictConfig

from qexp.data.card import Card
from qexp.errors import CheckpointError, DataError


class Absent:
    """A data set whose files are not here: its sizes, and an error for whoever asks for images.

    Attributes:
        num_classes, input_shape, class_names: as of a data set.
        train_size: 0.
    """

    train_size = 0

    def __init__(
        self,
        num_classes: int,
        input_shape: tuple[int, ...],
        error: DataError,
        class_names: tuple[str, ...] = (),
    ) -> None:
        self.num_classes, self.input_shape, self.error = num_classes, input_shape, error
        self.class_names = class_names

    def calibration_images(self, n: int, seed: int) -> NoReturn:
        """Raise the DataError that opening the data set gave."""
        raise self.error


def sizes(dataset: Any) -> dict[str, Any]:
    """What a checkpoint keeps of its data set: [C, H, W], and the classes with their names."""
    return {
        "num_classes": dataset.num_classes,
        "input_shape": list(dataset.input_shape),
        "class_names": list(class_names(dataset)),
    }


def class_names(dataset: Any) -> tuple[str, ...]:
    """Names of the labels, in their order; empty where the data set does not say them."""
    return tuple(getattr(dataset, "class_names", ()))


def check_class_names(dataset: Any, state: Mapping[str, Any], folder: Path) -> None:
    """Refuse a data set whose labels are not those that a checkpoint was trained on.

    Raises:
        CheckpointError: both have names, and they differ.
    """
    kept, here = (state.get("sizes") or {}).get("class_names", []), class_names(dataset)
    if not kept or not here or tuple(kept) == here:
        return
    first = next((i for i, (a, b) in enumerate(zip(kept, here, strict=False)) if a != b), None)
    said = f"{len(here)} instead of {len(kept)}"
    if first is not None:
        said = f"label {first} is '{here[first]}', there it was '{kept[first]}'"
    raise CheckpointError(
        f"checkpoint: {folder} was trained on other classes than the data set has ({said}). "
        "Give its own data: dataset.root=FOLDER"
    )


def without_images(cfg: DictConfig, state: Mapping[str, Any], error: DataError) -> Absent:
    """The data set of a checkpoint, without images.

    Raises:
        DataError: `error`, where neither the checkpoint nor the data set's class knows the sizes.
    """
    if kept := state.get("sizes"):
        names = tuple(kept.get("class_names", ()))
        return Absent(kept["num_classes"], tuple(kept["input_shape"]), error, names)
    if (card := published(cfg)) is None:
        raise error
    return Absent(card.num_classes, card.input_shape, error)


def published(cfg: DictConfig) -> Card | None:
    """The sizes of a data set that its class states, with the config's crop; None: it does not."""
    known: Card | None = getattr(get_class(cfg.dataset._target_), "card", None)
    if known is None:
        return None
    channels, side, _ = known.input_shape
    side = cfg.dataset.get("crop", side)
    return known._replace(input_shape=(channels, side, side))
