"""Top-1 of a network on a split, and `qexp eval`: the same for a finished run."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from qexp.errors import CheckpointError, ConfigError
from qexp.quant.convert import frozen_weights


class Score(NamedTuple):
    """Top-1 and mean cross-entropy on a split, and how fast it went."""

    top1: float  # percent
    loss: float  # nats
    images_per_s: float


@torch.no_grad()
def evaluate(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], *, amp: bool = False
) -> Score:
    """Score `model` in eval mode; weights are quantized once. One host sync, at the end."""
    was_training = model.training
    model.eval()
    correct = loss = None
    images, start = 0, time.perf_counter()
    with frozen_weights(model):
        for x, y in batches:
            with torch.autocast(x.device.type, torch.bfloat16, enabled=amp):
                logits = model(x).float()
            hit, nats = (logits.argmax(1) == y).sum(), F.cross_entropy(logits, y, reduction="sum")
            correct = hit if correct is None else correct + hit
            loss = nats if loss is None else loss + nats
            images += len(y)
    model.train(was_training)
    if correct is None or loss is None:
        raise ConfigError("eval: the split holds no images.")
    top1, nats = 100 * correct.item() / images, loss.item() / images
    return Score(top1, nats, images / (time.perf_counter() - start))


def evaluate_run(cfg: DictConfig) -> dict[str, Any]:
    """`qexp eval run=FOLDER [split=test]`: rebuild a run's network and score it.

    Returns what was measured; prints nothing.
    """
    from qexp.recipes.build import load_run

    if not cfg.get("run"):
        raise ConfigError("eval: no run given. Try: qexp eval run=outputs/.../<run folder>")
    folder = Path(cfg.run)
    if not (folder / "config.yaml").is_file():
        raise CheckpointError(f"eval: '{folder}' is not a run folder. List runs with: qexp ls")
    model, dataset, trained = load_run(folder, cfg.get("checkpoint", "last.pt"), cfg.device)
    score = evaluate(model, dataset.eval_batches(cfg.split), amp=bool(trained.recipe.amp))
    return {
        "run": str(folder),
        "checkpoint": cfg.get("checkpoint", "last.pt"),
        "split": cfg.split,
        "top1": score.top1,
        "loss": score.loss,
        "images_per_s": score.images_per_s,
        "dataset": OmegaConf.select(trained, "dataset.name"),
    }
