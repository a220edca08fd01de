"""Training steps that take turns, and what each of them costs.

A `Contender` is a network with its own optimizer and one way to run it. `take_turns` runs one
step of each, again and again, in one process: whatever else the machine does hits all of them
alike. The order is another each turn, so that none always follows the same neighbour.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qexp.bench.floor import in_turn
from qexp.quant.functional import compile_kernels
from qexp.quant.trace import Layer
from qexp.recipes.compilation import WHOLE, compiled, thin
from qexp.recipes.saving import kept_bytes, save_less_
from qexp.runner.device import synchronize
from qexp.runner.memory import Peak

LEARNING_RATE = 1e-4  # small: the images are noise, and no step may diverge


# Names of the float networks that take turns with the quantized ones.
FLOAT, AGAIN, EAGER = "fp32", "fp32 again", "fp32 eager"


@dataclass
class Contender:
    """What is timed.

    Attributes:
        name: of its quantizer.
        step: one training step: forward, cross-entropy, backward, SGD with momentum.
        wall_s, cpu_s: of each timed step; CPU seconds of all threads together.
        warmup_s: of the untimed first steps, compiling included.
        replayed: steps replay CUDA graphs, whose memory is taken once and for all.
    """

    name: str
    model: nn.Module
    step: Callable[[], None]
    wall_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    warmup_s: float = 0.0
    saved_bytes: int = 0
    peak_bytes: int | None = None
    replayed: bool = False


class Group(NamedTuple):
    """Contenders that take turns, the float network first, and the layers they share."""

    layers: list[Layer]
    contenders: list[Contender]


def make_step(
    model: nn.Module,
    mode: str,
    images: Tensor,
    labels: Tensor,
    dtype: torch.dtype,
    saved: str = "all",
    layers: Sequence[Layer] = (),
) -> Callable[[], None]:
    """One training step of `model` on a batch that stays the same."""
    forward: Callable[[Tensor], Tensor] = model
    if mode in WHOLE:
        graphs, half = mode == "graphs", dtype == torch.bfloat16 and thin(layers)
        forward = compiled(
            model, images.device, saved, graphs=graphs, half_width=half, dynamic=False
        )
    else:
        save_less_(model, saved)
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE, momentum=0.9, foreach=True)
    device, amp = images.device.type, dtype == torch.bfloat16

    def step() -> None:
        compile_kernels(mode == "kernels")
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=amp):
            loss = F.cross_entropy(forward(images), labels)
        loss.backward()
        optimizer.step()

    return step


def take_turns(
    contenders: Sequence[Contender], repeats: int, warmup: int, device: torch.device
) -> None:
    """Fill in what each contender's step costs."""
    for contender in contenders:
        began = time.perf_counter()
        for _ in range(warmup):
            contender.step()
        synchronize(device)
        contender.warmup_s = time.perf_counter() - began
    gc.collect()
    gc.disable()  # a collection would be charged to whoever is running
    try:
        for turn in range(repeats):
            for contender in in_turn(contenders, turn):
                _timed(contender, device)
    finally:
        gc.enable()
    for contender in contenders:
        contender.saved_bytes = kept_bytes(contender.model, contender.step)
        contender.peak_bytes = None if contender.replayed else peak_bytes(contender, device)
    compile_kernels(False)


def _timed(contender: Contender, device: torch.device) -> None:
    synchronize(device)
    wall, cpu = time.perf_counter(), time.process_time()
    contender.step()
    synchronize(device)
    contender.wall_s.append(time.perf_counter() - wall)
    contender.cpu_s.append(time.process_time() - cpu)


# ---------------------------------------------------------------------------------------------
# Memory


def peak_bytes(contender: Contender, device: torch.device) -> int | None:
    """What a step needs above what is allocated before it; None where it cannot be read."""
    peak = Peak(device)
    contender.step()
    return peak.rise()
