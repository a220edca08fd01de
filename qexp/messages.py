"""Hydra's and OmegaConf's exceptions as one line each, in the words of the command line."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qexp.errors import ConfigError, did_you_mean
from qexp.signature import unknown_key

COMPOSITION = (HydraException, OmegaConfBaseException)


class Source(NamedTuple):
    """Where a command line's config comes from."""

    folder: Path
    name: str
    overrides: Sequence[str]
    extra: str | None = None  # --config-dir


def explain(error: Exception, source: Source) -> str:
    """What to print for an error of composition (`COMPOSITION`)."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        return _choice(error, source.folder)
    text = str(error)
    match = re.match(r"Could not override '([^']+)'", text)
    if match:
        return _key(match[1], source)
    if isinstance(error, OverrideParseException):
        key, equals, value = str(error.override).partition("=")
        hint = f"Quote the value: \"{key}='{value}'\"" if equals and value else "Write key=value."
        return f"config: cannot read the override '{error.override}'. {hint}"
    cause = error.__cause__
    detail = str(cause).splitlines()[0] if isinstance(cause, OmegaConfBaseException) else ""
    line = "; ".join(part.strip() for part in text.splitlines() if part.strip())
    return f"config: {line}{f' ({detail})' if detail and detail not in line else ''}"


def _choice(error: MissingConfigException, config_path: Path) -> str:
    group, _, name = str(error.missing_cfg_file).rpartition("/")
    if not group:
        return f"config: no primary config '{name}' in {config_path}."
    options = list(error.options or [])
    if not options:
        return f"config: no group '{group}' (for '{group}={name}') in {config_path}."
    return (
        f"config: {group} '{name}' not found. Options: {', '.join(sorted(options))}."
        + did_you_mean(name, options)
    )


def _key(key: str, source: Source) -> str:
    """The line about an unknown key, with the keys of the deepest node that does exist."""
    others = [o for o in source.overrides if o.partition("=")[0].lstrip("+~") != key]
    node = cfg = _composed(source._replace(overrides=others))
    path = key.replace("/", ".").partition("@")[0].split(".")
    depth = 0
    while depth < len(path) - 1 and isinstance(node.get(path[depth]), DictConfig):
        node, depth = node[path[depth]], depth + 1
    known = [str(k) for k in node if not str(k).startswith("_") and k != "hydra"]
    return unknown_key(".".join(path[: depth + 1]), known, _owner(cfg, path[:depth], source.name))


def _owner(cfg: DictConfig, path: Sequence[str], config_name: str) -> str:
    if not path:
        return config_name
    choices = OmegaConf.select(cfg, "hydra.runtime.choices")
    return str(choices.get("/".join(path)) or path[-1])


def _composed(source: Source) -> DictConfig:
    """The config without the key that stopped it; without any override if others are wrong too."""
    from hydra import compose, initialize_config_dir

    GlobalHydra.instance().clear()
    path = [f"hydra.searchpath=[file://{Path(source.extra).resolve()}]"] if source.extra else []
    with initialize_config_dir(str(source.folder), version_base="1.3"):
        for kept in (source.overrides, []):
            try:
                cfg = compose(source.name, [*kept, *path], return_hydra_config=True)
            except COMPOSITION:
                continue
            OmegaConf.set_struct(cfg, False)
            return cfg
    raise ConfigError(f"config: '{source.name}' in {source.folder} cannot be composed.")
