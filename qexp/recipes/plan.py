"""`dry_run=true`: what a run would do, without doing it. Writes nothing.

The network is built on the CPU with random weights and quantized as the run would; a few training
steps on noise, on the run's own device, give the time. A policy that needs data (sensitivity) is
not asked: its budget is printed, and the layers are shown with the nominal bits.
"""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from hydra.utils import get_class
from omegaconf import DictConfig
from torch import nn

from qexp.errors import DataError, origin
from qexp.quant.accounting import Account, account
from qexp.quant.bitwidth import Uniform
from qexp.quant.convert import quantizers
from qexp.recipes import build
from qexp.recipes.saving import kept_bytes
from qexp.runner.device import keep_memory, pick_device, set_threads

# Pixel values of the timed steps, about: a batch of CIFAR; a plan must not take minutes.
MEASURED = 128 * 3 * 32 * 32
FEWEST = 8  # images of the timed steps
# A step's memory above the parameters, as a multiple of what it keeps for backward: 1.66 for a
# float ResNet-20 in eager mode, 1.41 for LSQ (results/bench_train).
WORKING = 1.5


class Card(NamedTuple):
    """What a plan needs to know of a data set."""

    num_classes: int
    input_shape: tuple[int, ...]
    train_size: int
    test_size: int


def plan(cfg: DictConfig) -> str:
    """The plan as text: a line a layer, totals, steps, estimated time, folder."""
    card = _card(cfg)
    model = build.make_model(cfg, card, torch.device("cpu"))
    data_policy = not build.is_float(cfg) and build.needs_data(cfg)
    bits = None
    if data_policy:
        layers = build.trace(model, card.input_shape)
        bits = Uniform(cfg.bits, cfg.bits, cfg.bitwidth.first_last).assign(layers)
    context = {"epoch": 0, "epochs": cfg.recipe.get("epochs", 1)}
    network = build.make_network(cfg, model, card.input_shape, context=context, bits=bits)
    for quantizer in quantizers(model).values():
        quantizer.calibrated.fill_(True)  # neither sizes nor times depend on the steps' values
    cost = account(model, network.layers)
    lines = [f"plan: {cfg.quantizer.name}, {cfg.model.name} on {cfg.dataset.name}", ""]
    lines += _table(cost, network)
    lines += ["", *_totals(cost)]
    if data_policy:
        lines.append(
            f"bits:     nominal; the {cfg.bitwidth.name} policy decides with "
            f"{cfg.bitwidth.images} training images"
        )
    lines += _schedule(cfg, card, model)
    lines.append(f"folder:   {cfg.folder}")
    return "\n".join(lines)


def _card(cfg: DictConfig) -> Card:
    """From the data itself; where it is absent, from its class's `card` (classes, shape, size)."""
    try:
        dataset = build.make_dataset(cfg, torch.device("cpu"))
    except Exception as error:  # instantiate wraps what a data set raises
        cause = origin(error)
        if not isinstance(cause, DataError):
            raise
        known = getattr(get_class(cfg.dataset._target_), "card", None)
        if known is None:
            raise
        channels, side, _ = known.input_shape
        side = cfg.dataset.get("crop", side)
        print(f"note: {cause} The plan uses the data set's published sizes.")
        return Card(known.num_classes, (channels, side, side), known.train_size, 0)
    test = dataset.protocol().get("test_images", 0)
    return Card(dataset.num_classes, dataset.input_shape, dataset.train_size, test)


def _table(cost: Account, network: build.Network) -> list[str]:
    layers = {layer.name: layer for layer in network.layers}
    swaps = {swap.layer.name: swap.note for swap in network.swaps}
    head = ("layer", "kind", "shape", "W bits", "A bits", "input", "weights", "bytes", "quantizers")
    rows: list[tuple[str, ...]] = [head]
    for row in cost.layers:
        signed = "signed" if layers[row.name].signed else "unsigned"
        rows.append(
            (
                row.name,
                row.kind,
                "x".join(map(str, row.shape)),
                f"{row.w_bits:.3g}",
                f"{row.a_bits:.3g}",
                signed,
                f"{row.weights:,}",
                f"{row.size_bytes:,}",
                swaps.get(row.name, "float"),
            )
        )
    widths = [max(len(r[i]) for r in rows) for i in range(len(head))]
    return ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in rows]


def _totals(cost: Account) -> list[str]:
    return [
        f"size:     {cost.size_bytes:,} bytes packed ({cost.size_bytes / cost.fp32_bytes:.3f} of "
        f"float's {cost.fp32_bytes:,}); codes alone {cost.ideal_bytes:,}",
        f"bits:     weights {cost.weight_by_param:.3g} by parameter, {cost.weight_by_layer:.3g} by "
        f"layer, {cost.weight_with_outer:.3g} with first, last and float layers; "
        f"activations {cost.act_by_layer:.3g}",
        f"work:     {cost.macs:,} MACs, {cost.bops:,} BOPs an image",
    ]


def _schedule(cfg: DictConfig, card: Card, model: nn.Module) -> list[str]:
    batch = cfg.recipe.get("batch_size", 0)
    epochs = cfg.recipe.get("epochs")
    if not batch or not epochs:
        return []
    per_epoch = max(1, card.train_size // batch)
    steps = epochs * per_epoch if cfg.max_steps is None else min(epochs * per_epoch, cfg.max_steps)
    device = pick_device(cfg.device)
    values = card.input_shape[0] * card.input_shape[1] * card.input_shape[2]
    timed = min(batch, max(FEWEST, MEASURED // values))
    threads = torch.get_num_threads()
    set_threads(cfg.threads)
    try:
        seconds, kept = _image_cost(model.to(device), card.input_shape, timed)
    finally:
        set_threads(threads)
    passes = steps / per_epoch * card.test_size / 3  # a forward pass is a third of a step
    total = seconds * (steps * batch + passes)
    parameters = 4 * sum(p.numel() for p in model.parameters())
    memory = 3 * parameters + WORKING * kept * batch  # with gradients and momentum
    source = "from random weights" if cfg.recipe.get("from_scratch") else cfg.model.checkpoint
    return [
        f"training: {epochs} epochs of {per_epoch} steps of {batch} images, {steps:,} steps; "
        f"start: {source}",
        f"cost:     about {_duration(total)} and {memory / 2**30:.2f} GB above an idle process on "
        f"{device} in eager mode ({1 / seconds:.0f} img/s measured now on noise; with evaluation, "
        "without compilation, loading, and a float baseline that must be trained first)",
    ]


def _image_cost(model: nn.Module, shape: tuple[int, ...], batch: int) -> tuple[float, float]:
    """Seconds of a training step, the faster of two, and bytes it keeps; both for one image."""
    device = next(model.parameters()).device
    if device.type == "cpu":
        keep_memory()  # as the run does
    x: Any = torch.randn(batch, *shape, device=device)
    y = torch.zeros(batch, dtype=torch.int64, device=device)

    def step() -> None:
        F.cross_entropy(model.train()(x), y).backward()

    kept = kept_bytes(model, step)  # and warm
    took = []
    for _ in range(2):
        began = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        took.append(time.perf_counter() - began)
    return min(took) / batch, kept / batch


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
