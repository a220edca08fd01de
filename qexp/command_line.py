"""What a command line says to Hydra: its options, its overrides, where configs are looked up."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from qexp.errors import ConfigError


class Parser(argparse.ArgumentParser):
    """argparse with our one-line errors."""

    def error(self, message: str) -> Any:
        raise ConfigError(f"qexp: {message}. Try: {self.prog} --help")


class Line(NamedTuple):
    """A command line behind the command's name."""

    options: argparse.Namespace  # Hydra's own
    words: list[str]  # all of it with the options first, as Hydra wants it
    overrides: list[str]

    @property
    def is_dry(self) -> bool:
        """Whether it asks for a plan alone."""
        said = [o.partition("=")[2] for o in self.overrides if re.match(r"\+*dry_run=", o)]
        return bool(said) and said[-1].lower() in ("true", "1", "yes")  # the last one counts


def parse(argv: Sequence[str]) -> Line:
    """Read `argv` as Hydra will.

    Raises:
        ConfigError: an unknown option, or a folder of configs that is none.
    """
    from hydra._internal.utils import get_args_parser

    parser = get_args_parser()

    def refuse(message: str) -> Any:
        raise ConfigError(f"qexp: {message}. Try: qexp COMMAND --hydra-help")

    parser.error = refuse  # type: ignore[method-assign]
    known, rest = parser.parse_known_args(list(argv))
    ours = (word for word in rest if word[:1] == "~" or ("=" in word and word[0] != "-"))
    overrides = [*known.overrides, *ours]
    unknown = [word for word in rest if word not in overrides]
    if unknown:
        refuse(f"unknown option {unknown[0]}")
    options = list(argv)
    for word in overrides:
        options.remove(word)
    if (path := known.config_path) is not None and not path.startswith("pkg://"):
        if not os.path.isdir(path):
            refuse(f"no folder '{path}' (--config-path)")
        known.config_path = os.path.abspath(path)  # Hydra would look beside our own source
        options += ["--config-path", known.config_path]
    return Line(known, [*options, *overrides], overrides)


def refuse_shadowed(extra: str, ours: Path) -> None:
    """Raise a ConfigError for a file of `--config-dir` that Hydra would pass over for one of ours.

    Args:
        extra: the user's folder of configs.
        ours: the folder that is searched first.
    """
    for path in sorted(ours.rglob("*.yaml")):
        mine = Path(extra) / path.relative_to(ours)
        if mine.is_file() and mine.read_bytes() != path.read_bytes():
            raise ConfigError(
                f"config: {mine} would be passed over: {path} has the same name and is found "
                "first. Give yours another name."
            )


def searchpath(extra: str | None) -> list[str]:
    """The override that adds the folder of `--config-dir` where Hydra is called by ourselves."""
    if not extra:
        return []
    quoted = str(Path(extra).resolve()).replace("'", "\\'")
    return [f"hydra.searchpath=['file://{quoted}']"]
