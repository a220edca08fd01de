"""Files that are either the old one or the new one, never half of one.

The bytes go to a temporary file in the same folder, are forced to the disk, and take the final
name in one step (`os.replace`); the folder is forced too, so that the rename outlives a power cut.
A process killed at any moment leaves the previous file and at most a stray `.name.tmp`, which the
next write of the same name overwrites.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_bytes(path: Path, data: bytes) -> None:
    """Replace `path` by `data`. Raises OSError, with the old file intact."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)  # on a full disk the half file would keep its space
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_json(path: Path, value: Mapping[str, Any] | list[Any]) -> None:
    """Replace `path` by indented JSON. NaN and infinity are written as null: JSON has neither."""
    text = json.dumps(finite(value), indent=2, default=str)
    write_bytes(path, (text + "\n").encode())


def append_line(path: Path, line: str) -> None:
    """Add a line to `path`, in one write: lines of several processes do not mix.

    A line that a kill cut short stays by itself; the new one is whole.
    """
    with open(path, "a") as file:
        file.write(("\n" if torn(path) else "") + line + "\n")


def torn(path: Path) -> bool:
    """Whether the last line of a file was cut short."""
    with open(path, "rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return False
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"


def finite(value: Any) -> Any:
    """`value` with every NaN and infinity in it replaced by None."""
    if isinstance(value, float):
        return value if value - value == 0 else None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value
