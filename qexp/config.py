"""Finding the configs, and checking a composed one before anything is built.

`check(cfg, schema)` looks at every value once and raises one ConfigError with all that is wrong,
one line each. There is one mechanism for all of it: a mapping is compared with a signature, key by
key, type by type. The signature is

  * for the top level, a dataclass of `schema` (`Train`, `Eval`);
  * for a node with `_target_`, that of the class or function it names;
  * for a recipe, the dataclass `Settings` of its module, whose `check()` holds the ranges.

So a YAML never needs a second description of itself, and a user's own quantizer, named by its
`_target_`, is checked like ours. Resolving targets imports torch; `--help`, `--cfg` and completion
never come here.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qexp.errors import ConfigError, did_you_mean
from qexp.gpu_slots import gpu_of_job, jobs_at_once
from qexp.ranges import unrepresentable, unusable
from qexp.runner.overrides import task_overrides
from qexp.signature import Signature, against, is_node, members, missing_keys, type_hints

PACKAGE = Path(__file__).parent

# Arguments that the program gives when it builds a node: absent from the YAML, and not settable.
GIVEN = {
    "quantizer": {"bits", "signed", "shape"},
    "dataset": {"device", "batch_size", "seed", "rank", "world_size"},
    "model": {"num_classes", "in_channels"},
}
# Keys of a group's own node that are not arguments of its target.
RESERVED = {"model": {"name", "checkpoint"}}
# Groups whose target is a function of the whole config, with its keys in its module's `Settings`.
RECIPES = {"recipe", "float"}
MARKERS = {"_target_", "_partial_", "_convert_", "_recursive_", "_args_"}


def configs_dir() -> Path:
    """The folder of configs: beside the package in a checkout, inside it when installed (P1)."""
    for folder in (PACKAGE / "configs", PACKAGE.parent / "configs"):
        if (folder / "train.yaml").is_file():
            return folder
    raise ConfigError(f"config: no configs beside {PACKAGE}. Reinstall qexp.")


def run_name(*, _root_: DictConfig) -> str:
    """`asq-w4a4`, `lsq+asq-w2a4`, `fp32`: the resolver `${run_name:}` of a run's folder.

    What is missing is `None` here: `check` tells of it. A quantizer whose parts were chosen on the
    command line is named by them, not by the method they replace. A policy that mixes widths has
    its name and budget instead of the widths.
    """
    quantizer, policy = _root_.get("quantizer") or {}, _root_.get("bitwidth") or {}
    if quantizer.get("weight") is None and quantizer.get("act") is None:
        return str(quantizer.get("name"))
    name = mixed_name(quantizer) or str(quantizer.get("name"))
    if policy.get("name") not in (None, "uniform"):
        budget, kind = policy.get("budget"), policy.get("budget_kind", "average_bits")
        if budget is None:
            return f"{name}-{policy.get('name')}"
        size = f"{budget:g}" if kind == "average_bits" else f"{budget:.15g}{kind}"
        return f"{name}-{policy.get('name')}{size}"
    sides = ("weight", "act")
    w, a = (32 if "Identity" in str(quantizer.get(k)) else policy.get(k) for k in sides)
    return f"{name}-w{w}a{a}"


def mixed_name(quantizer: Mapping[Any, Any]) -> str | None:
    """`weight+act` when the command line replaced a part of the chosen method; `method+part` for
    a method that reconstructs, of which more than its parts remains."""
    from hydra.core.hydra_config import HydraConfig

    if not HydraConfig.initialized():
        return None
    keys = {override.partition("=")[0] for override in task_overrides()}
    parts = ("quantizer/weight", "quantizer/act")
    if not keys & {*parts}:
        return None
    choices = HydraConfig.get().runtime.choices
    if quantizer.get("reconstruct"):
        return "+".join([choices["quantizer"], *(choices[part] for part in parts if part in keys)])
    return f"{choices['quantizer/weight']}+{choices['quantizer/act']}"


OmegaConf.register_new_resolver("run_name", run_name, replace=True)
OmegaConf.register_new_resolver(  # an `out` of none is refused by each job
    "sweeps_dir", lambda out: f"{out or 'outputs'}/sweeps", replace=True
)
OmegaConf.register_new_resolver("gpu_of_job", gpu_of_job, replace=True)
OmegaConf.register_new_resolver("jobs_at_once", jobs_at_once, replace=True)


def check(cfg: DictConfig, schema: type | None = None) -> None:
    """Check `cfg` against `schema` and every `_target_` in it against its signature.

    Raises:
        ConfigError: one line per problem, all of them.
    """
    problems = list(_unresolvable(cfg))
    if not problems:
        plain: Any = OmegaConf.to_container(cfg, resolve=True)
        if schema is not None:
            problems += against(plain, Signature.of_dataclass(schema), "")
        problems += unusable(plain)
        wrong = {line.split()[1] for line in problems}  # `bits` of "config: bits must be ..."
        for path, node in _targets(plain):
            problems += [
                line
                for line in _check_node(path, node, cfg)
                if _source(cfg, line.split()[1]) not in wrong  # said once, where it was set
            ]
        told = tuple(line.split()[1].partition("=")[0] + "." for line in problems)
        problems += [
            line
            for line in unrepresentable(plain)
            if not f"{_source(cfg, line.split()[1])}.".startswith(told)
        ]
    if problems:
        raise ConfigError("\n".join(dict.fromkeys(problems)))
    _whole_floats_(cfg, OmegaConf.to_container(cfg, resolve=True))


# ---------------------------------------------------------------------------------------------
# Nodes


def _targets(node: Any, path: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    if isinstance(node, Mapping):
        if "_target_" in node:
            yield path, node
        for key, value in node.items():
            yield from _targets(value, f"{path}.{key}" if path else str(key))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from _targets(value, f"{path}.{index}")


def _whole_floats_(cfg: DictConfig, plain: Any) -> None:
    """Write `0` as 0.0 where a float is meant, in place: hashes of configs tell them apart."""
    for path, node in _targets(plain):
        target = _imported(str(node["_target_"]))
        settings = getattr(sys.modules.get(target.__module__), "Settings", None)
        recipe = path.partition(".")[0] in RECIPES and settings is not None
        hints = type_hints(settings if recipe else target)
        leaves = [(f"{path}.{key}", value, hints.get(key)) for key, value in node.items()]
        for name, value, hint in [*leaves]:
            if isinstance(value, Mapping) and is_node(hint):  # recipe.distill
                below = type_hints(hint)
                leaves += [(f"{name}.{k}", v, below.get(k)) for k, v in value.items()]
        for name, value, hint in leaves:
            if type(value) is int and float in members(hint) and int not in members(hint):
                OmegaConf.update(cfg, name, float(value))


def _check_node(path: str, node: Mapping[str, Any], cfg: DictConfig) -> list[str]:
    group = path.partition(".")[0]
    whole = path == group
    if path.endswith(".distill.model"):  # a section of its own, of a teacher
        group, whole = "model", True
    try:
        target = _imported(str(node["_target_"]))
    except Exception as error:  # whatever importing the user's module raises
        reason = " ".join(str(error).split())
        return [f"config: {path}._target_ '{node['_target_']}' cannot be imported: {reason}"]
    keys = {k: v for k, v in node.items() if k not in MARKERS}
    if group in RECIPES:
        settings = getattr(sys.modules.get(target.__module__), "Settings", None)
        return _check_settings(settings, node, keys, path) if settings else []
    signature = Signature.of_callable(target).without(GIVEN.get(group, set()))
    if whole:  # the group's own node: `name` is for folders and tables
        ours = RESERVED.get(group, set()) | {"name"}
        keys = {k: v for k, v in keys.items() if k not in ours or k in signature.hints}
    if node.get("_partial_"):
        signature.required = set()
    return list(against(keys, signature, path, _owner(path, node)))


def _imported(name: str) -> Any:
    """The object that a dotted name stands for; raises (Hydra's own look-up logs instead)."""
    parts = name.split(".")
    if len(parts) < 2 or not all(parts):
        raise ConfigError("write it as package.module.name")
    found: Any = importlib.import_module(parts[0])
    for index, part in enumerate(parts[1:], 1):
        if not hasattr(found, part) and inspect.ismodule(found):
            try:
                importlib.import_module(".".join(parts[: index + 1]))
            except ModuleNotFoundError as error:
                if error.name != ".".join(parts[: index + 1]):
                    raise  # something that the module itself needs
                names = [n for n in vars(found) if not n.startswith("_")]
                raise ConfigError(
                    f"no '{part}' in {found.__name__}.{did_you_mean(part, names)}"
                ) from error
        found = getattr(found, part)
    return found


def _check_settings(
    settings: Any, node: Mapping[str, Any], keys: Mapping[str, Any], path: str
) -> list[str]:
    problems = list(against(keys, Signature.of_dataclass(settings), path))
    if problems:
        return problems
    try:
        settings.of(OmegaConf.create(dict(node))).check()
    except ConfigError as error:
        return str(error).replace("config: recipe.", f"config: {path}.").splitlines()
    return []


def _owner(path: str, node: Mapping[str, Any]) -> str:
    """What the user calls this node: the choice that filled it, else its target's name."""
    from hydra.core.hydra_config import HydraConfig

    if HydraConfig.initialized():
        choice = HydraConfig.get().runtime.choices.get(path.replace(".", "/"))
        if choice:
            return str(choice)
    return str(node["_target_"]).rpartition(".")[2]


def _source(cfg: DictConfig, path: str) -> str:
    """The top-level key that the value at `path` is a copy of (`${bits}`), or the path itself."""
    parent, _, key = path.rpartition(".")
    node = OmegaConf.select(cfg, parent) if parent else cfg
    if isinstance(node, DictConfig) and key in node and OmegaConf.is_interpolation(node, key):
        return str(OmegaConf.to_container(node, resolve=False)[key])[2:-1]  # type: ignore[index]
    return path


def _unresolvable(cfg: DictConfig) -> Iterator[str]:
    """A line for each mandatory value that is missing, or when an interpolation leads nowhere."""
    missing = sorted(missing_keys(OmegaConf.to_container(cfg, resolve=False)))
    for key in missing:
        yield f"config: {key} has no value. Set {key}=..."
    if missing:
        return
    try:
        OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        key, cause = getattr(error, "full_key", None) or "?", error.__context__
        while cause is not None and not isinstance(cause, ConfigError):  # of a resolver of ours
            cause = cause.__cause__ or cause.__context__
        if cause is not None:
            yield str(cause)
            return
        yield f"config: {key}: {str(error).splitlines()[0]}. Set {key}=..."
