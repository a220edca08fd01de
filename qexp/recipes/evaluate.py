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

from qexp.errors import ConfigError
from qexp.quant.convert import frozen_weights
from qexp.runner.device import tf32
from qexp.runner.distributed import share_, total
from qexp.runner.folder import run_config


class Score(NamedTuple):
    """Top-1 and mean cross-entropy on a split, and how fast it went."""

    top1: float  # percent
    loss: float  # nats
    images_per_s: float


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> Score:
    """Score `model`, in eval mode and float32 (no TF32). Weights are quantized once; one host sync.

    A network trained under bfloat16 autocast is scored as what it is after it: its export, the
    packed file and every other run are compared in one precision. Where several processes train
    together each scores its share of the split, with the running statistics of process 0.
    """
    was_training = model.training
    model.eval()
    share_(model, buffers_only=True)
    correct = loss = None
    images, start = 0, time.perf_counter()
    with frozen_weights(model), tf32(False):
        for x, y in batches:
            logits = model(x)
            hit, nats = (logits.argmax(1) == y).sum(), F.cross_entropy(logits, y, reduction="sum")
            correct = hit if correct is None else correct + hit
            loss = nats if loss is None else loss + nats
            images += len(y)
    model.train(was_training)
    counts = torch.zeros(3, dtype=torch.float64)
    if correct is not None and loss is not None:
        counts = torch.tensor([correct.item(), loss.item(), images], dtype=torch.float64)
    hits, nats, images = total(counts).tolist()
    if not images:
        raise ConfigError("eval: the split holds no images.")
    top1, nats = 100 * hits / images, nats / images
    return Score(top1, nats, images / (time.perf_counter() - start))


def evaluate_run(cfg: DictConfig) -> dict[str, Any]:
    """`qexp eval run=FOLDER [split=test]`: rebuild a run's network and score it.

    `checkpoint=FILE.safetensors` scores a packed file instead (`qexp export`), with or without the
    run it comes from. Returns what was measured; prints nothing.
    """
    from qexp.recipes.build import load_run

    name = str(cfg.get("checkpoint", "last.pt"))
    if name.endswith(".safetensors"):
        return _evaluate_file(cfg, name)
    if name.endswith(".onnx"):
        raise ConfigError(
            "eval: qexp eval scores no ONNX file, qexp export compares it with the run. Score the "
            "packed file: qexp export run=FOLDER, then checkpoint=model.safetensors."
        )
    if cfg.get("engine", "float") != "float":
        raise ConfigError(
            f"eval: engine={cfg.engine} runs a packed file. Write one with qexp export run=FOLDER, "
            "then add checkpoint=model.safetensors."
        )
    if not cfg.get("run"):
        raise ConfigError("eval: no run given. Try: qexp eval run=outputs/.../<run folder>")
    folder = Path(cfg.run)
    model, dataset, trained = load_run(folder, name, cfg.device, "eval", _root(cfg))
    score = evaluate(model, dataset.eval_batches(cfg.split))
    return _measured(cfg, score, folder, name, OmegaConf.select(trained, "dataset.name"))


def _evaluate_file(cfg: DictConfig, name: str) -> dict[str, Any]:
    from qexp.engine import engine_device
    from qexp.export.command import load_packed

    folder = Path(cfg.run) if cfg.get("run") else None
    if folder is not None:
        run_config(folder, "eval")
    path = Path(name) if folder is None or Path(name).is_file() else folder / name
    engine = cfg.get("engine", "float")
    device = engine_device(engine, cfg.device)
    trust = bool(cfg.get("trust"))
    model, dataset = load_packed(path, folder, device, trust=trust, engine=engine, root=_root(cfg))
    score = evaluate(model, dataset.eval_batches(cfg.split))
    return _measured(cfg, score, path.parent, path.name, dataset.name)


def _root(cfg: DictConfig) -> str | None:
    return OmegaConf.select(cfg, "dataset.root")


def _measured(
    cfg: DictConfig, score: Score, folder: Path, checkpoint: str, dataset: str
) -> dict[str, Any]:
    return {
        "run": str(folder),
        "checkpoint": checkpoint,
        "split": cfg.split,
        "top1": score.top1,
        "loss": score.loss,
        "images_per_s": score.images_per_s,
        "dataset": dataset,
    }
