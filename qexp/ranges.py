"""Values of the right type that cannot be used; `config.check` tells of them."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeGuard

from qexp.errors import ConfigError

# Threads that a config may ask for on any machine: it may come from a larger one.
THREADS = 64

LARGEST = 1e30  # of a number: a float32 with room for what it multiplies

Plain = Mapping[str, Any]


def unusable(plain: Plain) -> Iterator[str]:
    """A line for each such value of a resolved config; types are checked elsewhere."""
    for check in CHECKS:
        yield from check(plain)


def unrepresentable(node: Any, path: str = "") -> Iterator[str]:
    """A line for each value, at any depth, that cannot be kept: a number that float32 or an integer
    of 64 bits cannot hold, a text that the saved config would read as a reference."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield from unrepresentable(value, f"{path}.{key}" if path else str(key))
    elif isinstance(node, list):
        for value in node:
            yield from unrepresentable(value, path)
    elif isinstance(node, float) and not math.isfinite(node):
        yield f"config: {path} must be finite, got {node}."
    elif isinstance(node, float) and abs(node) > LARGEST:
        yield f"config: {path} must be at most {LARGEST:g} in size, got {node:g}."
    elif isinstance(node, str) and "${" in node:
        yield f"config: {path} must not hold '${{', which a saved config takes for a reference."
    elif _is_int(node) and not -(2**63) <= node < 2**63:
        yield f"config: {path} must be an integer of at most 64 bits, got {node}."


def _numbers(plain: Plain) -> Iterator[str]:
    bits, seed, steps = plain.get("bits"), plain.get("seed"), plain.get("max_steps")
    if _is_int(bits) and not _is_width(bits):
        yield f"config: bits must be an integer from 1 to 16, or 32 for float; got {bits}."
    if _is_int(seed) and not 0 <= seed < 2**63:
        yield f"config: seed must be from 0 to 2**63 - 1; got {seed}."
    if _is_int(steps) and steps < 1:
        yield f"config: max_steps must be at least 1, or null for no limit; got {steps}."


def _names(plain: Plain) -> Iterator[str]:
    for group in ("dataset", "model", "quantizer", "bitwidth"):
        node = plain.get(group)
        if not (isinstance(node, Mapping) and "name" in node):
            continue
        name = node["name"]
        if not isinstance(name, str) or not re.fullmatch(r"[\w+-][\w.+-]*", name):
            yield (
                f"config: {group}.name must be letters, digits, '.', '_', '+' and '-', as it names "
                f"folders; got {name!r}."
            )


def _threads(plain: Plain) -> Iterator[str]:
    threads, cores = plain.get("threads"), os.cpu_count() or 1
    most = max(THREADS, 4 * cores)
    if not _is_int(threads):
        return
    if threads < 1:
        yield f"config: threads must be at least 1, or null for all cores; got {threads}."
    if threads > most:
        yield (
            f"config: threads must be at most {most}, got {threads}: this machine has {cores} "
            f"cores. Set threads={cores}, or null for all."
        )


def _compile(plain: Plain) -> Iterator[str]:
    if not isinstance(plain.get("device"), str):
        return
    from qexp.recipes.build import trains
    from qexp.recipes.compilation import refuse_graphs
    from qexp.runner.device import pick_device

    recipe = plain.get("recipe")
    in_parts = None
    if isinstance(recipe, Mapping) and not trains(recipe):
        in_parts = recipe.get("name", "ptq")
    try:
        refuse_graphs(plain.get("compile"), pick_device(plain["device"]), in_parts)
    except ConfigError as error:
        yield str(error)


def _bitwidth(plain: Plain) -> Iterator[str]:
    policy = plain.get("bitwidth")
    if not isinstance(policy, Mapping):
        return
    for side in ("weight", "act"):
        value = policy.get(side)
        if _is_int(value) and value != plain.get("bits") and not _is_width(value):
            yield (
                f"config: bitwidth.{side} must be an integer from 1 to 16, or 32 for float; "
                f"got {value}."
            )
    file = policy.get("file")
    if policy.get("name") == "pattern" and isinstance(file, str) and not Path(file).is_file():
        yield (
            f"config: bitwidth.file={file} is no file. Give a table that bitwidth=sensitivity "
            "bitwidth.save=FILE writes, or null."
        )


def _places(plain: Plain) -> Iterator[str]:
    if plain.get("out") == "":  # would be the root of the file system
        yield "config: out is empty. Set out=outputs"
    elif plain.get("folder") == "":
        yield "config: folder is empty. Leave it out, or set folder=outputs/NAME"


def _quantizer(plain: Plain) -> Iterator[str]:
    quantizer = plain.get("quantizer")
    if isinstance(quantizer, Mapping) and {"weight", "act"} <= set(quantizer):
        none = [part for part in ("weight", "act") if quantizer[part] is None]
        if len(none) == 1:  # both: a float run
            yield f"config: quantizer.{none[0]} is null. Use quantizer/{none[0]}=none."


def _sweep(plain: Plain) -> Iterator[str]:
    sweep = plain.get("sweep")
    for key in ("gpus", "jobs_per_gpu"):
        count = sweep.get(key) if isinstance(sweep, Mapping) else None
        if _is_int(count) and count < 1:
            yield f"config: sweep.{key} must be at least 1; got {count}."


def _adapters(plain: Plain) -> Iterator[str]:
    if plain.get("adapters") == "float16" and plain.get("format") in ("onnx", "onnx_int8"):
        yield (
            f"config: adapters=float16 is for format=packed, format={plain['format']} keeps "
            "float32. Leave adapters out, or set format=packed."
        )


def _model(plain: Plain) -> Iterator[str]:
    model = plain.get("model")
    checkpoint = model.get("checkpoint") if isinstance(model, Mapping) else None
    if checkpoint is not None and not isinstance(checkpoint, str):
        yield (
            "config: model.checkpoint must be a file, a weights name, auto or null, got "
            f"{checkpoint!r} ({type(checkpoint).__name__})."
        )
    elif checkpoint == "":
        yield "config: model.checkpoint is empty. Set model.checkpoint=FILE, auto or null."


def _is_width(bits: int) -> bool:
    return 1 <= bits <= 16 or bits == 32


def _is_int(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)  # true is no number


CHECKS = (
    _numbers,
    _names,
    _threads,
    _compile,
    _bitwidth,
    _places,
    _quantizer,
    _sweep,
    _adapters,
    _model,
)
