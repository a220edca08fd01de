"""The ways to run a network that `qexp bench inference` compares, built and weighed.

packed      the packed file in torch: weights decoded to float, inputs fake-quantized
integer, table, reference     the packed file on an engine of `qexp.engine`
onnx        `format=onnx` in onnxruntime
onnx_int8   `format=onnx_int8` in onnxruntime
"""

from __future__ import annotations

import copy
import ctypes
import gc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qexp.engine import ON_CPU, integer_network
from qexp.export.command import require
from qexp.export.network import restore
from qexp.export.packed import Packed, pack_network, to_bytes

FLOAT, AGAIN, FLOAT_ONNX = "float", "float again", "float_onnx"

Run = Callable[[Tensor], Tensor]


class Engine(NamedTuple):
    """A network that is ready to run.

    Attributes:
        file_bytes: of the file it is loaded from.
        peak_bytes: resident memory that loading it and running one batch added at its highest;
            None where it cannot be read.
    """

    name: str
    run: Run
    file_bytes: int
    peak_bytes: int | None


def float_engine(
    name: str,
    net: nn.Module,
    node: Mapping[str, Any],
    shape: tuple[int, ...],
    x: Tensor,
    threads: int,
) -> Engine:
    """The float network, in torch or (FLOAT_ONNX) in onnxruntime."""
    if name == FLOAT_ONNX:
        return build("onnx", net, node, shape, x, threads, x)._replace(name=name)
    size = 4 * sum(t.numel() for t in net.state_dict().values() if t.is_floating_point())
    run, peak = _weighed(lambda: copy.deepcopy(net).eval(), x)
    return Engine(name, run, size, peak)


def build(
    name: str,
    network: nn.Module,
    node: Mapping[str, Any],
    shape: tuple[int, ...],
    x: Tensor,
    threads: int,
    images: Tensor,
) -> Engine:
    """One of ENGINES for a calibrated network.

    Args:
        node: the model's config, for the file.
        shape: [C, H, W] of an image; x: the batch that is run, [N, C, H, W].
        images: what `onnx_int8` finds its steps from.
    """
    packed = _pack(network, node, shape)
    load, size = ENGINES[name](packed, threads, images)
    run, peak = _weighed(load, x)
    return Engine(name, run, size, peak)


def _pack(network: nn.Module, node: Mapping[str, Any], shape: tuple[int, ...]) -> Packed:
    with torch.no_grad():
        classes = network(torch.zeros(1, *shape)).shape[1]
    return pack_network(
        network,
        target=node["_target_"],
        keywords={k: v for k, v in node.items() if k not in ("_target_", "name", "checkpoint")},
        num_classes=classes,
        input_shape=shape,
        data={"name": "noise", "mean": [], "std": []},
    )


Loaded = tuple[Callable[[], Run], int]


def _packed(packed: Packed, threads: int, images: Tensor) -> Loaded:
    return lambda: restore(packed, trust=True), len(to_bytes(packed))


def _integers(name: str) -> Callable[[Packed, int, Tensor], Loaded]:
    def load(packed: Packed, threads: int, images: Tensor) -> Loaded:
        return lambda: integer_network(packed, name, trust=True), len(to_bytes(packed))

    return load


def _onnx(packed: Packed, threads: int, images: Tensor) -> Loaded:
    require("onnx")
    require("onnxruntime")
    from qexp.export.onnx_network import to_onnx

    return _session(to_onnx(packed).SerializeToString(), threads)


def _onnx_int8(packed: Packed, threads: int, images: Tensor) -> Loaded:
    require("onnx")
    require("onnxruntime")
    from qexp.export.onnx_int8 import to_onnx_int8

    return _session(to_onnx_int8(packed, images)[0].SerializeToString(), threads)


def _session(blob: bytes, threads: int) -> Loaded:
    from qexp.export.runtime import session

    return lambda: session(blob, threads), len(blob)


ENGINES: dict[str, Callable[[Packed, int, Tensor], Loaded]] = {
    "packed": _packed,
    **{name: _integers(name) for name in ON_CPU},
    "onnx": _onnx,
    "onnx_int8": _onnx_int8,
}

# ---------------------------------------------------------------------------------------------
# Memory


@torch.no_grad()
def _weighed(load: Callable[[], Run], x: Tensor) -> tuple[Run, int | None]:
    """`(engine, resident memory that loading it and one pass added at their highest)`."""
    gc.collect()
    before = _restart_mark()
    run = load()
    run(x)
    return run, None if before is None else _memory("VmHWM") - before


def _restart_mark() -> int | None:
    """Resident bytes now, from which on the high-water mark counts; None if not Linux, glibc."""
    try:
        ctypes.CDLL(None).malloc_trim(0)  # hand freed memory back, so that all of it is seen again
        Path("/proc/self/clear_refs").write_text("5")
        return _memory("VmRSS")
    except (OSError, AttributeError, KeyError):
        return None


def _memory(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    found = dict(line.split(":", 1) for line in lines if ":" in line)
    return int(found[name].split()[0]) * 1024  # kB
