"""Read a torchvision data set from its folder, with errors that say what to type."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from qexp.errors import DataError


def read_torchvision(kind: Any, title: str, root: str, download: bool, folder: str) -> list[Any]:
    """The training and the test part of a torchvision data set class.

    Args:
        kind: class with the signature (root, train, download).
        title: how people call it.
        root: where its files are, relative to the current folder.
        download: fetch what is not there.
        folder: what it keeps inside `root`.

    Raises:
        DataError: not there, damaged, or not to be fetched.
    """
    place = Path(root) / folder
    if not download and not place.is_dir():
        raise DataError(
            f"data: {title} not found under '{root}'. Set dataset.root=..., or "
            "dataset.download=true, or use dataset=fashion_mini."
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # numpy's word on the align flag in old pickles
            return [kind(root, train=train, download=download) for train in (True, False)]
    except Exception as error:  # md5, pickle, gzip, sockets: each has its own kinds
        reason = str(error).split("\n")[0].split(". ")[0].rstrip(".")[:120]
        if download:
            raise DataError(
                f"data: {title} cannot be downloaded into '{root}' ({reason}). "
                "Check the network and the permissions, or set dataset.root=... to a copy."
            ) from error
        raise DataError(
            f"data: {title} under '{place}' is incomplete or damaged ({reason}). "
            "Delete that folder and unpack it again, or set dataset.download=true."
        ) from error
