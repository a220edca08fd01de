"""What a run will take, from a few steps timed on this machine: the cost line of `dry_run`.

A step is timed on noise with the run's own network, loss, arithmetic, device and threads, and with
compiled kernels where the run compiles anything (a whole compiled network is faster still, but
takes a minute to make). From it:

    training         epochs * steps * batch images, and an epoch's forward pass of the splits test
                     and val
    reconstruction   iterations * minibatch images through the network, a pass (each unit that
                     learns does its share, by operations); each unit records its input and output,
                     once in the float network and once in the quantized one, half of it deep on
                     average; two evaluations

A forward pass is taken as a third of a step. To the memory belong the images that live on the
device. That of a reconstruction is of both networks, the images, what is recorded of the largest
unit, and either one of its steps or a forward pass of many images. Loading, compilation, the search
for first steps, and a float baseline that must be trained first are not in it; the line says so.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from hydra.utils import get_class
from omegaconf import DictConfig
from torch import nn

from qexp.data.card import Card
from qexp.data.memory import InMemory
from qexp.quant.blocks import Unit, find_units
from qexp.quant.convert import quantizers
from qexp.quant.functional import compile_kernels
from qexp.quant.plan import passes
from qexp.quant.reconstruct import learns
from qexp.quant.trace import Layer
from qexp.recipes import build
from qexp.recipes.compilation import choose
from qexp.recipes.loss import training_loss
from qexp.recipes.ptq_settings import Settings as Reconstruction
from qexp.recipes.saving import kept_bytes, save_less_
from qexp.recipes.settings import Settings
from qexp.recipes.units import cache_bytes, parts_of
from qexp.runner.device import (
    compiler_available,
    keep_memory,
    pick_device,
    set_threads,
    synchronize,
)

# Pixel values of the timed steps, about: a batch of CIFAR; a plan must not take minutes.
MEASURED = 128 * 3 * 32 * 32
FEWEST = 8  # images of the timed steps
# A step's memory above the parameters, as a multiple of what it keeps for backward: 1.5 to 1.9 for
# a float ResNet-20 in eager mode, 1.45 to 1.8 for LSQ (results/bench_train, peak and saved bytes).
WORKING = 1.5
# A unit's step, the same: above its share of what the network keeps come mixed and dropped inputs,
# and the copies that quantizers make. 7.2 for QDrop's first block of a ResNet-8, eagerly.
LEARNING = 7
# A forward pass's memory as a multiple of its widest layer's input and output: both stay while the
# next activation is made, and a quantizer has copies of its input.
FORWARD = 2
# A pass in words.
LEARNED = {
    "rounding": "rounding",
    "steps": "what is learned after it",
    "network": "from the network's output",
}
LEFT_OUT = "compilation, loading, and a float baseline that must be trained first"


class Timed(NamedTuple):
    """A step on this machine, and how it was run.

    Attributes:
        seconds: for one image.
        kept: bytes kept for backward of one image; fixed: of any number (quantized weights).
    """

    seconds: float
    kept: float
    fixed: float
    how: str

    def bytes(self, images: float) -> float:
        """Kept by a step of so many images."""
        return self.fixed + self.kept * images


def training(cfg: DictConfig, card: Card, model: nn.Module, layers: Sequence[Layer]) -> list[str]:
    """The lines of a plan that say how long training takes, and its memory."""
    s = Settings.of(cfg.recipe)
    s.check()
    per_epoch = max(1, card.train_size // s.batch_size)
    steps = s.epochs * per_epoch
    steps = steps if cfg.max_steps is None else min(steps, cfg.max_steps)
    mode = choose(cfg.compile, layers, steps * s.batch_size, pick_device(cfg.device))
    cost = _timed(cfg, card, model.train(), s.batch_size // s.accumulate, mode, s)
    work, weights = _teacher(cfg, card, s, layers)
    images = steps * s.batch_size * (1 + work / 3)  # its forward pass is a third of a step too
    images += steps / per_epoch * (card.test_size + card.val_size) / 3
    parameters = 4 * sum(p.numel() for p in model.parameters())
    memory = (_networks(s) + weights) * parameters + _data_bytes(cfg, card)
    memory += WORKING * cost.bytes(s.batch_size / s.accumulate)
    source = "from random weights" if s.from_scratch else cfg.model.checkpoint
    return [
        f"training: {s.epochs} epochs of {per_epoch} steps of {s.batch_size} images, {steps:,} "
        f"steps; start: {source}",
        f"cost:     about {_duration(cost.seconds * images)} and {memory / 2**30:.2f} GB above an "
        f"idle process on {cost.how} ({1 / cost.seconds:.0f} img/s measured now on noise; with "
        f"evaluation, without {LEFT_OUT})",
    ]


def _data_bytes(cfg: DictConfig, card: Card) -> int:
    """Of a data set that lives on the device: images as bytes, those of training padded, labels."""
    if not issubclass(get_class(cfg.dataset._target_), InMemory):
        return 0
    channels, height, width = card.input_shape
    border, label = 2 * int(cfg.dataset.get("pad", 0)), 8
    padded = channels * (height + border) * (width + border) + label
    plain = channels * height * width + label
    return card.train_size * padded + (card.test_size + card.val_size) * plain


def _networks(s: Settings) -> int:
    """How many times a training holds as many numbers as there are weights.

    Weights and gradients, the optimizer's moments, the average.
    """
    moments = 2 if s.optimizer == "adamw" else int(s.momentum > 0)
    return 2 + moments + (s.ema > 0)


def _teacher(
    cfg: DictConfig, card: Card, s: Settings, layers: Sequence[Layer]
) -> tuple[float, float]:
    """A teacher's operations and weights, as multiples of the trained network's."""
    if s.distill.weight == 0:
        return 0.0, 0.0
    if s.distill.model is None:
        return 1.0, 1.0
    other = build.make_model(cfg, card, torch.device("cpu"), s.distill.model)
    theirs = build.trace(other, card.input_shape)
    work, weights = ([getattr(x, key) for x in layers] for key in ("macs", "weights"))
    return (
        sum(layer.macs for layer in theirs) / sum(work),
        sum(layer.weights for layer in theirs) / sum(weights),
    )


def reconstruction(
    cfg: DictConfig, card: Card, model: nn.Module, reference: nn.Module, layers: Sequence[Layer]
) -> list[str]:
    """The lines of a plan that say how long calibration and reconstruction take.

    Args:
        model: the quantized network.
        reference: the float network, batch norms folded.
        layers: its layers in execution order.
    """
    s = Reconstruction.of(cfg.recipe)
    s.check()
    method = build.make_method(cfg)
    limit = s.iterations + s.step_iterations if cfg.max_steps is None else cfg.max_steps
    sweeps = [p._replace(iterations=min(p.iterations, limit)) for p in passes(method, s)]
    names = [layer.name for layer in layers]
    parts = []
    if method.granularity != "none":
        parts = find_units(reference, names, method.granularity)
    jobs = [[unit for unit in parts_of(parts, p) if learns(model, unit, p)] for p in sweeps]
    learned, units = [len(job) for job in jobs], [unit for job in jobs for unit in job]
    device = pick_device(cfg.device)
    mode = choose(cfg.compile, layers, 3 * s.iterations * s.minibatch, device)
    recorded, widest, share = _values(reference, units, names, card.input_shape)
    mode = mode if sweeps else "off"
    cost = _timed(cfg, card, model.eval(), s.minibatch, mode, Settings())
    macs = {layer.name: layer.macs for layer in layers}
    shares = [
        sum(macs[n] for unit in job for n in unit.layers) / sum(macs.values()) for job in jobs
    ]
    images = sum(p.iterations * k for p, k in zip(sweeps, shares, strict=True)) * s.minibatch
    recorded *= 4 * (s.images + s.held_out)
    cache = min(recorded, cache_bytes(s, device))
    numbers = sum(p.numel() for net in (model, reference) for p in net.parameters())
    numbers += (s.images + s.held_out) * prod(card.input_shape)
    forward = FORWARD * 4 * widest * max(s.batch_size, s.act_images)
    step = LEARNING * share * cost.bytes(s.minibatch)
    memory = 4 * numbers + cache + max(forward, step) + _data_bytes(cfg, card)
    disk = f", {(recorded - cache) / 2**30:.2f} GB on disk" if recorded > cache else ""
    images += sum(learned) * (s.images + s.held_out) / 3 + 2 * card.test_size / 3
    work = [
        f"{n} unit{'s' * (n != 1)}, {p.iterations:,} iterations each ({LEARNED[p.name]})"
        for n, p in zip(learned, sweeps, strict=True)
    ]
    return [
        f"images:   {s.images} for reconstruction, {s.act_images} for activation steps; "
        f"start: {cfg.model.checkpoint}",
        f"learning: {'; then '.join(work) or 'none'}",
        f"cost:     about {_duration(cost.seconds * images)} and {memory / 2**30:.2f} GB above an "
        f"idle process{disk} on {cost.how} ({1 / cost.seconds:.0f} img/s forward and backward "
        f"measured now on noise; with two evaluations, without the search for steps, {LEFT_OUT})",
    ]


@torch.no_grad()
def _values(
    reference: nn.Module, units: Sequence[Unit], layers: Sequence[str], shape: tuple[int, ...]
) -> tuple[int, int, float]:
    """Numbers of an image: most that are recorded of a unit, and most in and out of a layer.

    Recorded are a unit's input, from the float and the quantized network, and its float output.
    The third is the largest share of a unit in all that goes in and out of layers.
    """
    sizes: dict[str, tuple[int, int]] = {}
    handles = []
    for name in {*(unit.name for unit in units), *layers}:

        def hook(module: nn.Module, inputs: Any, y: torch.Tensor, name: str = name) -> None:
            sizes[name] = inputs[0].numel(), y.numel()

        handles.append(reference.get_submodule(name).register_forward_hook(hook))
    device = next(reference.parameters()).device
    reference.eval()(torch.zeros(1, *shape, device=device))
    for handle in handles:
        handle.remove()
    recorded = max((2 * sizes[unit.name][0] + sizes[unit.name][1] for unit in units), default=0)
    through = {name: sum(sizes[name]) for name in layers}
    largest = max((sum(through[name] for name in unit.layers) for unit in units), default=0)
    return recorded, max(through.values()), largest / sum(through.values())


def _timed(
    cfg: DictConfig, card: Card, model: nn.Module, batch: int, mode: str, s: Settings
) -> Timed:
    """Time steps of a network on the run's device, with its threads and its kind of kernels."""
    device = pick_device(cfg.device)
    values = card.input_shape[0] * card.input_shape[1] * card.input_shape[2]
    # A few images keep a CPU as busy as a batch does; a GPU they leave idle.
    size = batch if device.type == "cuda" else min(batch, max(FEWEST, MEASURED // values))
    for quantizer in quantizers(model).values():
        quantizer.calibrated.fill_(True)  # times do not depend on the steps' values
    kernels = mode != "off" and compiler_available(device)[0]
    threads = torch.get_num_threads()
    set_threads(cfg.threads)
    try:
        compile_kernels(kernels)
        save_less_(model.to(device), cfg.saved)
        seconds, kept, fixed = _image_cost(model, card.input_shape, size, s)
    finally:
        compile_kernels(False)
        set_threads(threads)
    return Timed(
        seconds, kept, fixed, f"{device} {'with compiled kernels' if kernels else 'eagerly'}"
    )


def _image_cost(
    model: nn.Module, shape: tuple[int, ...], batch: int, s: Settings
) -> tuple[float, float, float]:
    """Seconds forward and backward of an image, the faster of two; bytes kept of it, and of any."""
    device = next(model.parameters()).device
    if device.type == "cpu":
        keep_memory()  # as the run does
    if s.channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x: Any = torch.randn(batch, *shape, device=device)
    y = torch.zeros(batch, dtype=torch.int64, device=device)

    def step(n: int = batch) -> None:
        loss, _ = training_loss(model, None, x[:n], y[:n], s)
        loss.backward()

    step()  # compiles
    kept, half = kept_bytes(model, step), batch // 2
    each = kept / batch
    if half > 1:  # batch norm wants two
        each = (kept - kept_bytes(model, lambda: step(half))) / (batch - half)
    took = []
    for _ in range(2):
        synchronize(device)
        began = time.perf_counter()
        step()
        synchronize(device)
        took.append(time.perf_counter() - began)
    return min(took) / batch, each, max(0.0, kept - each * batch)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
