"""Hydra's and OmegaConf's exceptions as one line each, in the words of the command line."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qexp.command_line import searchpath
from qexp.errors import ConfigError, did_you_mean
from qexp.signature import unknown_key

COMPOSITION = (HydraException, OmegaConfBaseException)
FOREIGN = ("hydra.", "float.")  # sections that a misplaced key was hardly meant for
RUN_GIVEN = ("eval", "export")  # configs of commands that take a run's folder as run=FOLDER


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
    if key := _refused(error):
        return _keys(key, source)
    if isinstance(error, OverrideParseException):
        key, equals, value = str(error.override).partition("=")
        hint = f"Quote the value: \"{key}='{value}'\"" if equals and value else "Write key=value."
        if not equals and "/" in key and source.name in RUN_GIVEN:
            hint = f"Write run={key}."
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


def _refused(error: Exception) -> str | None:
    """The key that Hydra could not set, if that is the error."""
    match = re.match(r"Could not override '([^']+)'", str(error))
    return match[1] if match else None


def _keys(key: str, source: Source) -> str:
    """A line about each unknown key, with the keys of the deepest node that does exist."""
    cfg, unknown = _composed(key, source._replace(overrides=_job(key, source)))
    return "\n".join(_key(cfg, unknown_, source.name) for unknown_ in unknown)


def _job(key: str, source: Source) -> Sequence[str]:
    """The overrides of the first job of a sweep that has no `key`; those of a single run."""
    parsed = OverridesParser.create().parse_overrides(list(source.overrides))
    swept = [o for o in parsed if o.is_sweep_override()]
    values = [[f"{o.get_key_element()}={v}" for v in o.sweep_string_iterator()] for o in swept]
    fixed = [str(o.input_line) for o in parsed if o not in swept]
    for chosen in itertools.product(*values) if swept else ():
        try:
            _compose([*fixed, *chosen], source)
        except COMPOSITION as error:
            if _refused(error) == key:
                return [*fixed, *chosen]
    return source.overrides


def _compose(overrides: Sequence[str], source: Source) -> DictConfig:
    from hydra import compose, initialize_config_dir

    GlobalHydra.instance().clear()
    with initialize_config_dir(str(source.folder), version_base="1.3"):
        words = [*overrides, *searchpath(source.extra)]
        return compose(source.name, words, return_hydra_config=True)


def _key(cfg: DictConfig, key: str, config_name: str) -> str:
    if "@" in key:
        choices = OmegaConf.select(cfg, "hydra.runtime.choices")
        groups = sorted(str(group) for group in choices if not str(group).startswith("hydra"))
        return f"config: no group '{key}' ({config_name} has: {', '.join(groups)})." + did_you_mean(
            key, groups
        )
    node, depth = cfg, 0
    path = key.replace("/", ".").split(".")
    while depth < len(path) - 1 and isinstance(node.get(path[depth]), DictConfig):
        node, depth = node[path[depth]], depth + 1
    known = [str(k) for k in node if not str(k).startswith("_") and k != "hydra"]
    line = unknown_key(".".join(path[: depth + 1]), known, _owner(cfg, path[:depth], config_name))
    place = None if did_you_mean(path[depth], known) else _elsewhere(cfg, path[-1])
    return f"{line} Did you mean '{place}'?" if place else line


def _elsewhere(cfg: DictConfig, key: str) -> str | None:
    """The place of a key of that name in the config: the one of fewest steps down."""
    level: list[tuple[str, DictConfig]] = [("", cfg)]
    while level:
        for path, node in level:
            if key in node:
                return f"{path}{key}"
        below = ((f"{path}{k}.", node._get_node(k)) for path, node in level for k in node)
        level = [(p, n) for p, n in below if isinstance(n, DictConfig) and p not in FOREIGN]
    return None


def _owner(cfg: DictConfig, path: Sequence[str], config_name: str) -> str:
    if not path:
        return config_name
    choices = OmegaConf.select(cfg, "hydra.runtime.choices")
    return str(choices.get("/".join(path)) or path[-1])


def _composed(key: str, source: Source) -> tuple[DictConfig, list[str]]:
    """The config without `key` and what else is unknown, and all that was left out.

    Where another error is left, no override is kept.
    """
    kept, unknown = _without(source.overrides, key), [key]
    while True:
        try:
            cfg = _compose(kept, source)
        except COMPOSITION as error:
            another = _refused(error)
            fewer = _without(kept, another) if another else kept
            if not kept:
                break
            if another and len(fewer) < len(kept):
                unknown.append(another)
            kept = fewer if len(fewer) < len(kept) else []
            continue
        OmegaConf.set_struct(cfg, False)
        return cfg, unknown
    raise ConfigError(f"config: '{source.name}' in {source.folder} cannot be composed.")


def _without(overrides: Sequence[str], key: str) -> list[str]:
    return [o for o in overrides if o.partition("=")[0].lstrip("+~") != key]
