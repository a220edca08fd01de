"""Run folders, read from the disk for `qexp report`. Imports no torch.

A run folder holds `result.json` or `status.json`. Folders written today hold both, beside
config.yaml, metrics.jsonl and layers.csv; committed results may hold result.json and config.yaml
only. What is missing or unreadable becomes a run with an error, never a run that is left out.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from qexp.errors import ConfigError
from qexp.figure import number
from qexp.runner.folder import (
    NOT_IDENTITY,
    RESULT,
    STATUS,
    is_float_quantizer,
    read_json,
    read_status,
)

CHECKPOINTS = "checkpoints.json"  # beside committed results: hashes of the weights
AT_REST = 3  # epochs, the last among them, in which a parameter did not move
SCALES_OUTPUT = ".output_scale"  # N2UQ's, of no effect before a batch norm: older runs told of it
LAYER_NUMBERS = ("w_bits", "a_bits", "size_bytes")
MAPPINGS = ("protocol", "bits", "health")  # fields of result.json that are read into
UNIFORM = (None, "float", "uniform", "progressive")  # policies that end at one width for all
# Two runs that differ in these keys only are the same experiment with another seed or place.
NOT_EXPERIMENT = (*(key.rpartition(".")[2] for key in NOT_IDENTITY), "seed", "root", "save")
# Of a config, what tells rows of one protocol apart; and what of it is named elsewhere.
VARIANT = ("quantizer", "bitwidth", "model", "dataset")
NAMED = ("quantizer.name", "model.name", "model.checkpoint", "dataset.name", "dataset.workers")


@dataclass(frozen=True)
class RunRecord:
    """One run as its folder tells it.

    Attributes:
        state: done, failed, interrupted, running or dead.
        error: one line; empty for a done run.
        result: result.json; empty for a run that did not get there.
        config: config.yaml, resolved; empty when it is not there.
    """

    folder: Path
    state: str
    error: str
    result: Mapping[str, Any]
    config: Mapping[str, Any]

    @property
    def done(self) -> bool:
        return self.state == "done"

    @property
    def dataset(self) -> str:
        return str(self.result.get("dataset") or at(self.config, "dataset", "name") or "unknown")

    @property
    def model(self) -> str:
        return str(self.result.get("model") or at(self.config, "model", "name") or "unknown")

    @property
    def method(self) -> str:
        named = self.config.get("method") or at(self.config, "quantizer", "name")
        return str(self.result.get("method") or named or "unknown")

    @property
    def recipe(self) -> str:
        named = self.result.get("recipe") or at(self.config, "recipe", "name")
        return str(named or "unknown")

    @property
    def policy(self) -> str | None:
        return self.result.get("policy") or at(self.config, "bitwidth", "name")

    @property
    def uniform(self) -> bool:
        """Whether all inner layers end at one width."""
        return self.policy in UNIFORM

    @property
    def is_float(self) -> bool:
        return self.method == "fp32" or self.width("weight") == self.width("act") == 32

    def width(self, operand: str) -> float | None:
        """Nominal bits of `weight` or `act`; of a mixed run, the measured average by parameter
        (weights) or by layer (inputs), to two digits."""
        bits = at(self.result, "bits", "weight_by_param" if operand == "weight" else "act_by_layer")
        nominal = self.result.get("w_bits" if operand == "weight" else "a_bits")
        for value in (nominal, at(self.config, "bitwidth", operand), self.config.get("bits")):
            if self.uniform and isinstance(value, (int, float)):
                return float(value)
        return None if bits is None else round(float(bits), 2)

    @property
    def seed(self) -> Any:
        return self.result.get("seed", self.config.get("seed"))

    @property
    def commits(self) -> list[str]:
        """Of the code; several of a run that was resumed by another."""
        found = self.result.get("commits") or [self.result.get("commit")]
        return [str(commit).partition(" ")[0] for commit in found if commit]

    @property
    def protocol(self) -> dict[str, Any]:
        """The protocol with nested keys as `distill.weight`."""
        return dict(flatten(self.result.get("protocol") or {}))

    @property
    def protocol_hash(self) -> str:
        return str(self.result.get("protocol_hash") or "")

    @cached_property
    def variant(self) -> dict[str, Any]:
        """What tells two runs of one protocol apart: options of quantizer, policy, network, data.

        The name itself is `method`: `quantizer=asq quantizer/weight=lsq` and `quantizer=asq_lsq`
        are the method lsq+asq, though one config still says asq.
        """
        own = {k: self.config[k] for k in VARIANT if isinstance(self.config.get(k), Mapping)}
        if is_float_quantizer(own.get("quantizer", {})):
            own.pop("bitwidth", None)
        leaves = ((k, v) for k, v in flatten(own) if k not in NAMED)
        found = {k: v for k, v in leaves if k.rpartition(".")[2] not in NOT_EXPERIMENT}
        drawn = at(self.config, "bitwidth", "seed")  # of a random allocation
        if drawn is not None and drawn != self.config.get("seed"):
            found["bitwidth.seed"] = drawn
        if table := self.result.get("bits_table"):
            found["bitwidth.file"] = str(table)[:8]
        return found

    @cached_property
    def experiment(self) -> str:
        """Hash of the config without seed and place; empty without a config."""
        if not self.config:
            return ""
        kept = {k: v for k, v in flatten(self.config) if not _is_place(k)}
        return hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()

    @cached_property
    def weights_sha256(self) -> list[str]:
        """Of the network it left, as `float_sha256` of runs that start from it has it."""
        kept = read_json(self.folder / CHECKPOINTS)
        found = [self.result.get("weights_sha256"), kept.get("last.pt"), kept.get("best.pt")]
        return [str(sha256) for sha256 in found if sha256]

    def layers(self) -> list[dict[str, str]]:
        """Rows of layers.csv without those that are damaged; none when it is not there."""
        path = self.folder / "layers.csv"
        if not path.is_file():
            return []
        with path.open(newline="", errors="replace") as file:
            return [row for row in csv.DictReader(file) if _is_whole(row)]

    def epochs(self) -> list[dict[str, Any]]:
        """The epochs of metrics.jsonl, each once (a resumed run repeats none), in order."""
        found = self._events("epoch")
        return [found[epoch] for epoch in sorted(found)]

    @cached_property
    def at_rest(self) -> list[str]:
        """Quantizers with a parameter that the last epoch did not move, nor two others.

        Near the end of a schedule a step may round to nothing: one epoch or two tell little.
        """
        found, last = self._events("stuck"), max(self._events("epoch"), default=None)
        told = [event.get("parameters") for event in found.values()]
        listed = [names for names in told if isinstance(names, list)]
        times = Counter(str(name) for names in listed for name in names)
        now = (found.get(last) or {}).get("parameters") if last is not None else None
        held = [str(name) for name in now or () if times[str(name)] >= AT_REST]
        held = [name for name in held if not name.endswith(SCALES_OUTPUT)]
        return sorted({re.sub(r"(_quantizer)\..*", r"\1", name) for name in held})

    def _events(self, kind: str) -> dict[int, dict[str, Any]]:
        """The last of a kind that metrics.jsonl has of each epoch."""
        found: dict[int, dict[str, Any]] = {}
        path = self.folder / "metrics.jsonl"
        for line in path.read_text(errors="replace").splitlines() if path.is_file() else ():
            try:
                event = json.loads(line)
            except ValueError:
                continue  # the line a killed run was writing
            if not isinstance(event, dict):
                continue
            if event.get("event") == kind and isinstance(event.get("epoch"), int):
                found[event["epoch"]] = event
        return found


def read_runs(roots: Sequence[Path]) -> list[RunRecord]:
    """Every run folder at or below `roots`, each once, in the order of their paths.

    Raises:
        ConfigError: a root that does not exist or is a file.
    """
    found: dict[Path, RunRecord] = {}
    visited: set[Path] = set()  # links are followed, each folder once
    for root in roots:
        if not root.is_dir():
            why = "is a file" if root.exists() else "does not exist"
            raise ConfigError(
                f"report: folder '{root}' {why}. Give folders of runs: qexp report DIR"
            )
        for place, folders, files in os.walk(root, followlinks=True):
            folder, real = Path(place), Path(place).resolve()
            folders[:] = [] if real in visited else sorted(f for f in folders if f[0] != ".")
            if real not in visited and (STATUS in files or RESULT in files):
                found[real] = read_run(folder)
            visited.add(real)
    return list(found.values())


def read_run(folder: Path) -> RunRecord:
    """One run folder, whatever state it is in."""
    result = read_json(folder / RESULT)
    status = read_status(folder) if (folder / STATUS).is_file() else {"state": "done"}
    state = str(status.get("state"))
    error = str(status.get("error") or "")
    if state == "done" and (wrong := _wrong(result)):
        state, there = "failed", (folder / RESULT).is_file()
        error = f"{RESULT} {wrong if there else 'is missing'}"
        result = {k: v for k, v in result.items() if k not in MAPPINGS}
    elif state != "done":
        result = {}
        error = error or {"running": "not finished yet", "dead": "its process is gone"}.get(
            state, ""
        )
    return RunRecord(folder, state, error, result, _read_config(folder / "config.yaml"))


def _wrong(result: Mapping[str, Any]) -> str:
    """What keeps a result from being shown; empty for a sound one."""
    if not _finite(top1 := result.get("top1")):
        return "holds no finite top1"
    if not 0 <= float(top1 or 0) <= 100:
        return "holds no top1 in percent"
    if not isinstance(result.get("seed"), (int, str, type(None))):
        return "holds no number under 'seed'"
    for key in MAPPINGS:
        if not isinstance(result.get(key) or {}, Mapping):
            return f"holds no mapping under '{key}'"
    for key, value in (result.get("bits") or {}).items():
        if value is not None and not _finite(value):
            return f"holds no number under 'bits.{key}'"
    return ""


def _finite(value: Any) -> bool:
    if isinstance(value, int):  # one of more digits than a float has is none either
        return not isinstance(value, bool) and abs(value) < 2**1000
    return isinstance(value, float) and math.isfinite(value)


def _is_whole(row: Mapping[str | None, Any]) -> bool:
    """Whether a line of layers.csv has its cells, and numbers where they are drawn."""
    if None in row or None in row.values():
        return False
    try:
        return all(math.isfinite(number(row.get(k)) or 0.0) for k in LAYER_NUMBERS)
    except ValueError:
        return False


def _read_config(path: Path) -> dict[str, Any]:
    """The resolved config; empty when it is missing or unreadable."""
    import yaml  # OmegaConf's parser without OmegaConf: it has no interpolations, and C is faster

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        config = yaml.load(path.read_bytes(), loader)
    except (OSError, yaml.YAMLError):
        return {}
    return {str(k): v for k, v in config.items()} if isinstance(config, dict) else {}


def _is_place(key: str) -> bool:
    parts = key.split(".")
    return parts[0] in NOT_EXPERIMENT or parts[-1] in NOT_EXPERIMENT


def flatten(tree: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """`(a.b, value)` for every leaf; lists are leaves."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def at(tree: Mapping[str, Any], *path: str) -> Any:
    """The value at a path of keys; None where there is none."""
    node: Any = tree
    for key in path:
        node = node.get(key) if isinstance(node, Mapping) else None
    return node
