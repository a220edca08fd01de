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
from qexp.runner.answers import write_answers
from qexp.runner.device import tf32
from qexp.runner.distributed import share_, total, world
from qexp.runner.folder import run_config


class Score(NamedTuple):
    """Top-1 and mean cross-entropy on a split, how fast it went, and each answer."""

    top1: float  # percent
    loss: float  # nats
    images_per_s: float
    answers: Tensor | None = None  # [2, N] int64 on the CPU: predicted class, label


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> Score:
    """Score `model`, in eval mode and float32 (no TF32). Weights are quantized once; no host sync
    before the last batch.

    A network trained under bfloat16 autocast is scored as what it is after it: its export, the
    packed file and every other run are compared in one precision. Where several processes train
    together each scores its share of the split, with the running statistics of process 0.
    """
    was_training = model.training
    model.eval()
    share_(model, buffers_only=True)
    loss = None
    answers: list[Tensor] = []
    start = time.perf_counter()
    with frozen_weights(model), tf32(False):
        for x, y in batches:
            logits = model(x)
            nats = F.cross_entropy(logits, y, reduction="sum")
            loss = nats if loss is None else loss + nats
            answers.append(torch.stack((logits.argmax(1), y)))
    model.train(was_training)
    own = torch.cat(answers, 1).cpu() if answers else torch.zeros(2, 0, dtype=torch.int64)
    counts = torch.tensor([0.0 if loss is None else loss.item(), own.shape[1]], dtype=torch.float64)
    nats, images = total(counts).tolist()
    if not images:
        raise ConfigError("eval: the split holds no images.")
    every = _of_all(own, int(images))
    hits = int((every[0] == every[1]).sum())
    return Score(100 * hits / images, nats / images, images / (time.perf_counter() - start), every)


def _of_all(own: Tensor, images: int) -> Tensor:
    """The answers of all processes in the order of the split; process r scored r, r + size, ..."""
    every = torch.zeros(2, images, dtype=torch.int64)
    every[:, world().rank :: world().size] = own
    return total(every)


def evaluate_run(cfg: DictConfig) -> dict[str, Any]:
    """`qexp eval run=FOLDER [split=test]`: rebuild a run's network and score it.

    `checkpoint=FILE.safetensors` scores a packed file instead (`qexp export`), with or without the
    run it comes from. Returns what was measured; prints nothing.
    """
    from qexp.recipes.build import load_run

    _check_answers(cfg.get("answers"))
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
    if OmegaConf.select(trained, "recipe.channels_last"):
        # As the run scored itself: in another memory order sums round otherwise, and inputs on a
        # border fall to the other side (0.01 to 0.02 points of CIFAR-10's 10,000 images).
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    score = _scored(cfg, model, dataset)
    return _measured(cfg, score, folder, name, OmegaConf.select(trained, "dataset.name"))


def _evaluate_file(cfg: DictConfig, name: str) -> dict[str, Any]:
    from qexp.engine import engine_device
    from qexp.export.command import load_packed

    folder = Path(cfg.run) if cfg.get("run") else None
    if folder is not None:
        run_config(folder, "eval")
    own = None if folder is None else folder / name
    path = own if own and (own.is_file() or not Path(name).is_file()) else Path(name)
    engine = cfg.get("engine", "float")
    device = engine_device(engine, cfg.device)
    trust = bool(cfg.get("trust"))
    model, dataset = load_packed(path, folder, device, trust=trust, engine=engine, root=_root(cfg))
    score = _scored(cfg, model, dataset)
    return _measured(cfg, score, path.parent, path.name, dataset.name)


def _scored(cfg: DictConfig, model: nn.Module, dataset: Any) -> Score:
    """The score; with `answers=FILE` that file is written."""
    score = evaluate(model, dataset.eval_batches(cfg.split))
    if cfg.get("answers"):
        save_answers(Path(cfg.answers), score)
    return score


def _check_answers(answers: str | None) -> None:
    """Refuse a file that could not be written, before anything is scored."""
    if answers and (Path(answers).suffix != ".npz" or not Path(answers).parent.is_dir()):
        raise ConfigError(f"eval: answers={answers} is no .npz file in a folder that exists.")


def save_answers(path: Path, score: Score) -> None:
    """Write what the network answered to each image (`runner/answers.py`)."""
    assert score.answers is not None
    write_answers(path, *score.answers.numpy())


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
