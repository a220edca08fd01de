"""The ways to run a network that `qexp bench inference` compares, built and weighed.

packed      the packed file in torch: weights decoded to float, inputs fake-quantized
integer, table, reference, triton     the packed file on an engine of `qexp.engine`
onnx        `format=onnx` in onnxruntime, on the CPU
onnx_int8   `format=onnx_int8` in onnxruntime, on the CPU
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qexp.engine import ENGINES as OF_INTEGERS
from qexp.engine import ON_CPU, engine_device, integer_network
from qexp.errors import ConfigError
from qexp.export.command import require
from qexp.export.network import restore
from qexp.export.packed import Packed, pack_network, to_bytes
from qexp.runner.device import tf32
from qexp.runner.memory import Peak

FLOAT, AGAIN, FLOAT_ONNX = "float", "float again", "float_onnx"
FLOAT_TF32, FLOAT_BF16 = "float_tf32", "float_bf16"

Run = Callable[[Tensor], Tensor]


class Place(NamedTuple):
    """Where engines run: a device, and the threads of the CPU."""

    device: torch.device
    threads: int


class Engine(NamedTuple):
    """A network that is ready to run.

    Attributes:
        file_bytes: of the file it is loaded from.
        peak_bytes: memory that loading it and running one batch added at its highest, of the
            device or, on a CPU, resident; None where it cannot be read.
    """

    name: str
    run: Run
    file_bytes: int
    peak_bytes: int | None


def engines_of(device: torch.device) -> list[str]:
    """What runs on a device, `reference` left out: it takes minutes a batch."""
    if device.type == "cpu":
        return [FLOAT_ONNX, "packed", *(n for n in ON_CPU if n != "reference"), "onnx", "onnx_int8"]
    if device.type == "cuda":
        return [FLOAT_TF32, FLOAT_BF16, "packed", "triton"]
    return [FLOAT_BF16, "packed"]


def check_engine(name: str, device: torch.device) -> None:
    """Raise a ConfigError unless an engine runs on a device."""
    if name == "triton":
        engine_device(name, str(device))
        return
    known = [*engines_of(device), *(["reference", FLOAT_BF16] if device.type == "cpu" else [])]
    if name not in known:
        raise ConfigError(
            f"config: engines={name} does not run on {device}. Use {', '.join(known)}."
        )


def float_engine(
    name: str, net: nn.Module, node: Mapping[str, Any], shape: tuple[int, ...], x: Tensor, at: Place
) -> Engine:
    """The float network: in torch in float32, TF32 or bfloat16, or in onnxruntime.

    Args:
        net: on the device; node: its config.
        shape: [C, H, W] of an image; x: the batch that is run, [N, C, H, W].
    """
    if name == FLOAT_ONNX:
        return build("onnx", pack(net, node, shape), x, at, x)._replace(name=name)
    size = 4 * sum(t.numel() for t in net.state_dict().values() if t.is_floating_point())
    run, peak = _weighed(lambda: _in_torch(net, name), x)
    return Engine(name, run, size // 2 if name == FLOAT_BF16 else size, peak)


def _in_torch(net: nn.Module, name: str) -> Run:
    own: Any = copy.deepcopy(net).eval()
    if name == FLOAT_TF32:
        return lambda x: _tf32(own, x)
    if name != FLOAT_BF16:
        return own
    order = torch.channels_last
    own = own.to(torch.bfloat16, memory_format=order)  # type: ignore[call-overload]
    return lambda x: own(x.to(torch.bfloat16, memory_format=order)).float()


def _tf32(net: nn.Module, x: Tensor) -> Tensor:
    with tf32(True):
        return net(x)


def build(name: str, packed: Packed, x: Tensor, at: Place, images: Tensor) -> Engine:
    """One of ENGINES for a packed network.

    Args:
        x: the batch that is run, [N, C, H, W].
        images: what `onnx_int8` finds its steps from.
    """
    load, size = ENGINES[name](packed, at, images)
    run, peak = _weighed(load, x)
    return Engine(name, run, size, peak)


def pack(network: nn.Module, node: Mapping[str, Any], shape: tuple[int, ...]) -> Packed:
    """A calibrated network, on the CPU, as a file's content; arguments as of `float_engine`."""
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


def _packed(packed: Packed, at: Place, images: Tensor) -> Loaded:
    return lambda: restore(packed, trust=True).to(at.device), len(to_bytes(packed))


def _integers(name: str) -> Callable[[Packed, Place, Tensor], Loaded]:
    def load(packed: Packed, at: Place, images: Tensor) -> Loaded:
        build = partial(integer_network, packed, name, trust=True)
        return lambda: build().to(at.device), len(to_bytes(packed))

    return load


def _onnx(packed: Packed, at: Place, images: Tensor) -> Loaded:
    require("onnx")
    require("onnxruntime")
    from qexp.export.onnx_network import to_onnx

    return _session(to_onnx(packed).SerializeToString(), at)


def _onnx_int8(packed: Packed, at: Place, images: Tensor) -> Loaded:
    require("onnx")
    require("onnxruntime")
    from qexp.export.onnx_int8 import to_onnx_int8

    return _session(to_onnx_int8(packed, images)[0].SerializeToString(), at)


def _session(blob: bytes, at: Place) -> Loaded:
    from qexp.export.runtime import session

    return lambda: session(blob, at.threads), len(blob)


ENGINES: dict[str, Callable[[Packed, Place, Tensor], Loaded]] = {
    "packed": _packed,
    **{name: _integers(name) for name in OF_INTEGERS},
    "onnx": _onnx,
    "onnx_int8": _onnx_int8,
}

# ---------------------------------------------------------------------------------------------
# Memory


@torch.no_grad()
def _weighed(load: Callable[[], Run], x: Tensor) -> tuple[Run, int | None]:
    """`(engine, memory that loading it and one pass added at their highest)`."""
    peak = Peak(x.device)
    run = load()
    run(x)
    return run, peak.rise()
