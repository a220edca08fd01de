"""The command line of `qexp bench`, in the words of `qexp train`. Imports nothing heavy.

    quantizer=lsq,asq        ->  quantizers=[lsq,asq]           one job that compares, not a sweep
    quantizer/weight=apot    ->  overrides=['quantizer/weight=apot']
    model.width=0.5          ->  overrides=['model.width=0.5']

A key of the bench cannot be called like a config group, hence the plurals. A key with a dot or a
slash is of the training config that the bench composes for each quantizer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

PLURAL = {"quantizer": "quantizers", "model": "models"}


def translate(argv: Sequence[str]) -> list[str]:
    """`argv` as the bench's primary config takes it; a sweep (-m) stays as it is."""
    if {"-m", "--multirun"} & set(argv):
        return list(argv)
    inner = [word for word in argv if re.match(r"\w+[./][\w./@]*=", word) and not _hydra(word)]
    words = [_as_list(word) for word in argv if word not in inner]
    if inner:
        quoted = ",".join("'" + word.replace("'", r"\'") + "'" for word in inner)
        words.append(f"overrides=[{quoted}]")
    return words


def _hydra(word: str) -> bool:
    return word.startswith(("hydra.", "hydra/"))


def _as_list(word: str) -> str:
    key, equals, value = word.partition("=")
    if not equals or word.startswith("-"):
        return word
    listed = re.fullmatch(r"[\w.-]+(,[\w.-]+)+", value)
    return f"{PLURAL.get(key, key)}={f'[{value}]' if listed else value}"
