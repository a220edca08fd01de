"""What a training step must cost on this machine at least, from two measured rates.

    compute = flops / matrix rate        memory = bytes / copy bandwidth
    floor   = max(compute, memory) + bytes of the quantizers / copy bandwidth

Counted are the operations and the compulsory traffic of the convolutions and linear layers: in
forward their input is read and their output written; in backward the output's gradient and the
input are read and the input's gradient written. Backward costs twice forward; the first layer
needs no gradient of its input. Batch norm, ReLU and the optimizer are left out, so a float step
stays above its floor.

A quantizer that runs by itself (eager or as a kernel) reads x and writes x_hat, then reads x and
the gradient and writes a gradient: five tensors of the size of each quantized operand. Compiled
with the network it can be fused into its neighbours, which costs no traffic: floor ratio 1.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn

from qexp.quant.convert import quant_layers
from qexp.quant.quantizer import Identity
from qexp.quant.trace import Layer
from qexp.runner.device import synchronize

T = TypeVar("T")
# Bytes of the copied tensor, beyond every cache, and copies a timing: launching one on a GPU takes
# as long as copying some megabytes.
COPY_BYTES = {"cpu": (1 << 26, 1), "cuda": (1 << 30, 10)}
MATRIX = {"cpu": 1024, "cuda": 8192}  # rows of the square matrices
TRIES = 10


@dataclass(frozen=True)
class Machine:
    """What was measured: bytes/s read and written by a copy, flops/s of a matrix product."""

    copy_bytes_per_s: float
    flops_per_s: float


@dataclass(frozen=True)
class Floor:
    """Compulsory work of one step: flops, bytes of the layers, bytes of separate quantizers."""

    flops: float
    layer_bytes: float
    quantizer_bytes: float

    def float_s(self, machine: Machine) -> float:
        """Seconds of the float step."""
        compute = self.flops / machine.flops_per_s
        return max(compute, self.layer_bytes / machine.copy_bytes_per_s)

    def quantizers_s(self, machine: Machine) -> float:
        """Seconds that quantizers add when nothing is fused with them."""
        return self.quantizer_bytes / machine.copy_bytes_per_s


def operands(model: nn.Module) -> dict[str, tuple[bool, bool]]:
    """Whether each quantized layer's weight and input are quantized, by name."""
    return {
        name: (
            not isinstance(layer.weight_quantizer, Identity),
            not isinstance(layer.act_quantizer, Identity),
        )
        for name, layer in quant_layers(model).items()
    }


def work(
    layers: Sequence[Layer], quantized: Mapping[str, tuple[bool, bool]], batch: int, itemsize: int
) -> Floor:
    """The floor of a step.

    Args:
        layers: of the float network.
        quantized: by layer, whether its weight and its input are (`operands`).
        itemsize: bytes of an activation's element.
    """
    flops = layer_bytes = quantizer_bytes = 0.0
    for layer in layers:
        x = batch * _product(layer.act_shape)
        y = batch * layer.macs * layer.weight_shape[0] / layer.weights
        first = layer.position == "first"
        flops += 2 * layer.macs * batch * (2 if first else 3)
        layer_bytes += itemsize * (x + y + y + x + (0 if first else x)) + 12 * layer.weights
        weight, act = quantized.get(layer.name, (False, False))
        quantizer_bytes += 5 * (act * itemsize * x + weight * 4 * layer.weights)
    return Floor(flops, layer_bytes, quantizer_bytes)


def _product(shape: Sequence[int]) -> int:
    n = 1
    for d in shape:
        n *= d
    return n


def measure_machine(device: torch.device, dtype: torch.dtype) -> Machine:
    """Copy bandwidth and matrix rate of `device`, each the best of ten."""
    size, times = COPY_BYTES.get(device.type, COPY_BYTES["cpu"])
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    copied = least_seconds(lambda: [target.copy_(source) for _ in range(times)], device) / times
    n = MATRIX.get(device.type, 1024)
    a = torch.randn(n, n, device=device, dtype=dtype)
    b = torch.randn(n, n, device=device, dtype=dtype)
    multiplied = least_seconds(lambda: a @ b, device)
    return Machine(2 * size / copied, 2 * n**3 / multiplied)


def least_seconds(operation: Callable[[], object], device: torch.device) -> float:
    """Wall time of `operation` until `device` has done it, the least of ten tries."""
    times = []
    for _ in range(TRIES):
        synchronize(device)
        began = time.perf_counter()
        operation()
        synchronize(device)
        times.append(time.perf_counter() - began)
    return min(times)


def in_turn(items: Sequence[T], turn: int) -> list[T]:
    """Another order each turn, the same in every process: nobody keeps a neighbour."""
    return random.Random(turn).sample(items, len(items))
