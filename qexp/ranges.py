"""Values of the right type that cannot be used; `config.check` tells of them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

# Threads that a config may ask for on any machine: it may come from a larger one.
THREADS = 64


def unusable(plain: Mapping[str, Any]) -> Iterator[str]:
    """A line for each such value of a resolved config."""
    threads, cores = plain.get("threads"), os.cpu_count() or 1
    most = max(THREADS, 4 * cores)
    if isinstance(threads, int) and threads > most:
        yield (
            f"config: threads must be at most {most}, got {threads}: this machine has {cores} "
            f"cores. Set threads={cores}, or null for all."
        )
    if plain.get("out") == "":  # would be the root of the file system
        yield "config: out is empty. Set out=outputs"
    if plain.get("folder") == "" and plain.get("out") != "":
        yield "config: folder is empty. Leave it out, or set folder=outputs/NAME"
    quantizer = plain.get("quantizer")
    if isinstance(quantizer, Mapping) and {"weight", "act"} <= set(quantizer):
        none = [part for part in ("weight", "act") if quantizer[part] is None]
        if len(none) == 1:  # both: a float run
            yield f"config: quantizer.{none[0]} is null. Use quantizer/{none[0]}=none."
    policy = plain.get("bitwidth")
    if isinstance(policy, Mapping) and policy.get("name") == "pattern":
        file = policy.get("file")
        if isinstance(file, str) and not Path(file).is_file():
            yield (
                f"config: bitwidth.file={file} is no file. Give a table that bitwidth=sensitivity "
                "bitwidth.save=FILE writes, or null."
            )
    if plain.get("adapters") == "float16" and plain.get("format") in ("onnx", "onnx_int8"):
        yield (
            f"config: adapters=float16 is for format=packed, format={plain['format']} keeps "
            "float32. Leave adapters out, or set format=packed."
        )
    model = plain.get("model")
    checkpoint = model.get("checkpoint") if isinstance(model, Mapping) else None
    if checkpoint is not None and not isinstance(checkpoint, str):
        yield (
            "config: model.checkpoint must be a file, a weights name, auto or null, got "
            f"{checkpoint!r} ({type(checkpoint).__name__})."
        )
    elif checkpoint == "":
        yield "config: model.checkpoint is empty. Set model.checkpoint=FILE, auto or null."
