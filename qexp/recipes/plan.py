"""`dry_run=true`: what a run would do, without doing it. Writes nothing.

The network is built on the CPU with random weights and quantized as the run would; a few training
steps on noise, on the run's own device, give the time (cost.py). A policy that needs data
(sensitivity) is not asked: the layers are shown with the nominal bits. Of one that changes widths
while training the last ones are shown, and a line says when it changes them.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from omegaconf import DictConfig

from qexp.data.card import Card
from qexp.errors import DataError
from qexp.quant.accounting import Account, account
from qexp.quant.bitwidth import Progressive
from qexp.quant.fold import fold_bn_
from qexp.recipes import build
from qexp.recipes.absent import published
from qexp.recipes.cost import reconstruction, training
from qexp.recipes.outcome import stay_in_float
from qexp.recipes.precheck import nominal_bits, precheck, unsaved


def plan(cfg: DictConfig) -> str:
    """The plan as text: a line a layer, totals, steps, estimated time, folder."""
    card = _card(cfg)
    precheck(cfg, card)
    model = build.make_model(cfg, card, torch.device("cpu"))
    reference = None
    if not build.trains(cfg.recipe):
        fold_bn_(model)
        reference = copy.deepcopy(model)
    data_policy = not build.is_float(cfg) and build.needs_data(cfg)
    bits = nominal_bits(cfg, build.trace(model, card.input_shape)) if data_policy else None
    epochs = cfg.recipe.get("epochs", 1)
    context = {"epoch": epochs - 1, "epochs": epochs}  # the widths that it ends with
    shape = card.input_shape
    network = build.make_network(unsaved(cfg), model, shape, context=context, bits=bits)
    cost = account(model, network.layers)
    lines = [f"plan: {cfg.quantizer.name}, {cfg.model.name} on {cfg.dataset.name}", ""]
    lines += _table(cost, network)
    lines += ["", *_totals(cost)]
    if cost.other_weights and not build.is_float(cfg):
        lines.append(f"float:    {stay_in_float(model, cost.other_weights)}")
    if data_policy:
        lines.append(
            f"bits:     nominal; the {cfg.bitwidth.name} policy decides with "
            f"{cfg.bitwidth.images} training images"
        )
    if isinstance(network.policy, Progressive):
        lines.append(
            f"stages:   {_stages([network.policy.bits_at(e, epochs) for e in range(epochs)])}"
        )
    if reference is None:
        lines += training(cfg, card, network.model, network.layers)
    else:
        lines += reconstruction(cfg, card, network.model, reference, network.layers)
    lines.append(f"folder:   {cfg.folder}")
    return "\n".join(lines)


def _stages(bits: Sequence[int]) -> str:
    """`8 bits in epoch 1, 4 in epochs 2 to 4, ...`, from the bits of each epoch."""
    ends = [i for i in range(1, len(bits) + 1) if i == len(bits) or bits[i] != bits[i - 1]]
    parts = []
    for first, last in zip([0, *ends], ends, strict=False):
        span = f"epoch {last}" if last - first == 1 else f"epochs {first + 1} to {last}"
        parts.append(f"{bits[first]} in {span}")
    return "weight bits " + ", ".join(parts) + "; sizes and costs are those of the last"


def _card(cfg: DictConfig) -> Card:
    """From the data itself; where it is absent, from its class's `card` (classes, shape, size)."""
    try:
        dataset = build.make_dataset(cfg, torch.device("cpu"))
    except DataError as error:
        if (known := published(cfg)) is None:
            raise
        print(f"note: {error} The plan uses the data set's published sizes.")
        return known
    test, val = (dataset.protocol().get(f"{split}_images", 0) for split in ("test", "val"))
    return Card(dataset.num_classes, dataset.input_shape, dataset.train_size, test, val)


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
