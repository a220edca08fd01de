"""The PNG files of a run, drawn from its network: where weights, inputs and levels ended up.

Everything a picture needs from before training is kept small (at most `KEPT` weights a layer), so
that it fits into the checkpoint and a resumed run draws the same pictures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from qexp import plot
from qexp.config import run_name
from qexp.quant.calibrate import sample
from qexp.quant.convert import quant_layers
from qexp.quant.quantizer import Quantizer
from qexp.recipes.observe import observe
from qexp.runner.run import Run

KEPT = 8192  # weights of a layer, or values of its input, drawn at random
DRAWN_LEVELS = 32  # a codebook with more levels than this is not followed over the epochs

Before = dict[str, dict[str, Tensor]]


@torch.no_grad()
def weights(model: nn.Module) -> Before:
    """A sample of each layer's weights and its levels, on the CPU."""
    return {
        name: {
            "values": _sample(layer.weight),
            "levels": layer.weight_quantizer.levels().cpu().clone(),
        }
        for name, layer in quant_layers(model).items()
        if layer.weight_quantizer.bits < 32
    }


@torch.no_grad()
def codebooks(model: nn.Module) -> dict[str, list[float]]:
    """Levels of every per-tensor weight grid, if any of them is not uniform: those may drift.

    All of them, since a codebook of three levels may be uniform by chance, in one epoch or more.
    """
    found, drifting = {}, False
    for name, layer in quant_layers(model).items():
        quantizer = layer.weight_quantizer
        if quantizer.bits >= 32 or quantizer.num_levels > DRAWN_LEVELS:
            continue
        levels = quantizer.levels().detach().float().cpu()
        levels = levels.reshape(-1, levels.shape[-1])
        gaps = levels[0].diff()
        if len(levels) == 1:
            found[name] = levels[0].tolist()
            drifting |= not torch.allclose(gaps, gaps[:1].expand_as(gaps), rtol=1e-3)
    return found if drifting else {}


@torch.no_grad()
def draw(
    run: Run,
    cfg: DictConfig,
    model: nn.Module,
    before: Mapping[str, Mapping[str, Tensor]],
    images: Tensor,
    history: Sequence[Mapping[str, Any]],
) -> None:
    """Write every picture that a trained network has something for, into the run's folder."""
    plot.curves(history, run.dir / "curves.png", title(cfg))
    draw_operands(run, cfg, model, images, before)
    start = {name: old["levels"].flatten().tolist() for name, old in before.items()}
    _draw_codebooks(run, start, history, title(cfg))


@torch.no_grad()
def draw_operands(
    run: Run,
    cfg: DictConfig,
    model: nn.Module,
    images: Tensor,
    before: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> None:
    """Weights and inputs of each layer with levels and thresholds, and factors of samples.

    Args:
        before: of `weights`; None where weights were rounded and not trained.
    """
    layers = quant_layers(model)
    if not layers:
        return
    items = [
        plot.WeightPlot(
            name,
            None if before is None else before[name]["values"],
            _sample(layer.weight),
            None if before is None else before[name]["levels"],
            layer.weight_quantizer.levels().cpu(),
            layer.weight_quantizer.bits,
        )
        for name, layer in layers.items()
        if layer.weight_quantizer.bits < 32 and (before is None or name in before)
    ]
    if items:
        plot.weight_levels(items, run.dir / "weights.png", title(cfg))
    acts: list[plot.ActivationPlot] = []
    factors: list[plot.FactorPlot] = []

    def look(name: str, kind: str, x: Tensor, quantizer: Quantizer) -> None:
        if kind != "weight":
            with suppress(NotImplementedError):  # a class may have no thresholds
                acts.append(_activation(name, quantizer, x))
            if (context := quantizer.context(x)) is not None:
                factors.append(plot.FactorPlot(name, context.flatten().cpu()))

    observe(model, images, look)
    if acts:
        plot.activation_thresholds(acts, run.dir / "activations.png", title(cfg))
    if factors:
        plot.factors(factors, run.dir / "factors.png", title(cfg))


def title(cfg: DictConfig) -> str:
    """`cifar10-resnet20, asq-w4a4`: above every picture of a run."""
    return f"{cfg.dataset.name}-{cfg.model.name}, {run_name(_root_=cfg)}"


def _activation(name: str, quantizer: Quantizer, x: Tensor) -> plot.ActivationPlot:
    levels = quantizer.levels().cpu()
    if (factor := quantizer.context(x)) is not None:  # its borders are those of a factor of 1
        name, x = f"{name}, x / factor", x.float() / factor
    return plot.ActivationPlot(
        name, _sample(x), quantizer.thresholds().cpu(), levels.reshape(-1), quantizer.bits
    )


def _draw_codebooks(
    run: Run,
    start: Mapping[str, Sequence[float]],
    history: Sequence[Mapping[str, Any]],
    title: str,
) -> None:
    """The levels of `history`'s epochs, from epoch 0 on: where calibration had put them."""
    books = [(row["epoch"], row["codebooks"]) for row in history if row.get("codebooks")]
    if not books:
        return
    items = []
    for name, levels in books[0][1].items():
        rows = [
            (e, b[name]) for e, b in [(0, start), *books] if len(b.get(name, ())) == len(levels)
        ]
        epochs, path = zip(*rows, strict=True)
        items.append(plot.TrajectoryPlot(name, torch.tensor(epochs), torch.tensor(path)))
    plot.codebook_trajectories(items, run.dir / "codebooks.png", title)


def _sample(x: Tensor) -> Tensor:
    return sample(x, KEPT).cpu().clone()  # a view would train on
