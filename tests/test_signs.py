"""Whether an input is signed: as it was when the run began, whatever the weights are later."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from compose import TINY, TINY_PTQ, stopped_in_epoch, tiny
from hydra.utils import get_method
from omegaconf import DictConfig
from torch import Tensor, nn

from qexp.quant.bitwidth import Uniform
from qexp.quant.convert import calibrate_, quant_layers, quantize_
from qexp.quant.lsq import LSQ
from qexp.quant.trace import trace
from qexp.recipes.build import load_run
from qexp.recipes.evaluate import evaluate_run
from qexp.recipes.signs import load_run_state
from qexp.runner import checkpoint
from qexp.runner.run import open_run

SIGNED = {"stem": True, "branch": False, "mid": True, "fc": False}


class ZeroBranch(nn.Module):
    """`mid` reads ReLU + alpha * branch: never negative before alpha has left zero."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.branch = nn.Conv2d(4, 4, 3, padding=1)
        self.alpha = nn.Parameter(torch.zeros(()))
        self.mid = nn.Conv2d(4, 4, 3, padding=1)
        self.fc = nn.Linear(4, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = x + self.alpha * self.branch(x)
        return self.fc(self.mid(x).relu().mean((2, 3)))


def started(out: Path, *words: str, base: Sequence[str] = TINY) -> DictConfig:
    """A run of `ZeroBranch` from trained weights, whose alpha is 2."""
    torch.manual_seed(0)
    model = ZeroBranch(4)
    with torch.no_grad():
        model.alpha.fill_(2.0)
    torch.save(model.state_dict(), out / "float.pt")
    own = ("model=custom", "model._target_=test_signs.ZeroBranch", "+model.name=branch")
    kept = [word for word in base if not word.startswith("model")]
    return tiny(out, f"model.checkpoint={out}/float.pt", *words, base=[*kept, *own])


def done(cfg: DictConfig, *, resume: bool = False) -> tuple[dict[str, Any], Path]:
    with open_run(Path(cfg.folder), cfg, resume=resume) as run:
        result = get_method(cfg.recipe._target_)(cfg, run)
        run.finish(result)
    return result, run.dir


def reported(folder: Path) -> dict[str, bool]:
    with (folder / "layers.csv").open(newline="") as file:
        return {row["name"]: row["signed"] == "true" for row in csv.DictReader(file)}


def rebuilt(folder: Path, name: str = "last.pt") -> dict[str, bool]:
    model, _, _ = load_run(folder, name, "cpu")
    return {name: layer.act_quantizer.signed for name, layer in quant_layers(model).items()}


QAT = ("quantizer=lsq", "bits=3", "recipe.epochs=2")


def test_a_run_is_rebuilt_with_the_signs_it_was_trained_with(tmp_path: Path) -> None:
    result, folder = done(started(tmp_path, *QAT))
    assert rebuilt(folder) == rebuilt(folder, "best.pt") == reported(folder) == SIGNED
    node = {"run": str(folder), "checkpoint": "last.pt", "split": "test", "device": "cpu"}
    assert evaluate_run(DictConfig(node))["loss"] == pytest.approx(last_loss(folder), abs=1e-6)
    assert evaluate_run(DictConfig(node))["top1"] == result["top1"]


def last_loss(folder: Path) -> float:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line["test_loss"] for line in lines if line["event"] == "epoch"][-1]


def test_a_resumed_run_keeps_its_signs(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    _, whole = done(started(tmp_path / "a", *QAT))
    cfg = started(tmp_path / "b", *QAT)
    with stopped_in_epoch(2):
        done(cfg)
    _, folder = done(cfg, resume=True)
    assert reported(folder) == SIGNED
    a, b = (checkpoint.load(run / "last.pt")["model"] for run in (whole, folder))
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_training_after_post_training_starts_with_its_signs(tmp_path: Path) -> None:
    _, ptq = done(started(tmp_path, "quantizer=nearest", base=TINY_PTQ))
    assert rebuilt(ptq) == SIGNED
    state = checkpoint.load(ptq / "last.pt")
    state["float"]["alpha"].zero_()  # with these weights nothing would be seen
    checkpoint.save(ptq / "last.pt", state)
    words = (*QAT, "recipe=qat", f"model.checkpoint={ptq}")
    cfg = started(tmp_path, *words)
    cfg.folder = str(tmp_path / "trained")
    _, folder = done(cfg)
    assert reported(folder) == SIGNED


def test_a_checkpoint_without_signs_takes_those_of_layers_csv(tmp_path: Path) -> None:
    _, folder = done(started(tmp_path, *QAT))
    state = checkpoint.load(folder / "last.pt")
    assert state.pop("signed") == SIGNED
    checkpoint.save(folder / "last.pt", state)
    assert load_run_state(folder / "last.pt")["signed"] == SIGNED
    assert rebuilt(folder) == SIGNED
    (folder / "layers.csv").unlink()  # nothing is known: as the random weights happen to be
    assert rebuilt(folder) == SIGNED | {"mid": False}


def test_calibration_names_unsigned_inputs_that_are_negative() -> None:
    torch.manual_seed(0)
    model = ZeroBranch(4)
    layers = trace(model, (3, 8, 8))
    quantize_(model, layers, Uniform(3, 3).assign(layers), LSQ, LSQ)
    images = torch.randn(4, 3, 8, 8)
    assert calibrate_(model, images) == []
    with torch.no_grad():
        model.alpha.fill_(2.0)
    assert calibrate_(model, images) == ["mid"]
