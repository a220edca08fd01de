"""Keys of a config reach what they name: each changes the value it says, and that one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from compose import TINY_PTQ, tiny
from conftest import Qexp
from omegaconf import DictConfig

from qexp.recipes.ptq import ptq
from qexp.recipes.qat import qat
from qexp.runner import checkpoint
from qexp.runner.run import open_run


def finished(cfg: DictConfig, recipe: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """`(result, checkpoint)` of a run."""
    with open_run(Path(cfg.folder), cfg, resume=False) as run:
        result = recipe(cfg, run)
        run.finish(result)
    return result, checkpoint.load(Path(cfg.folder) / "last.pt")


def trained(out: Path, *words: str) -> tuple[dict[str, Any], dict[str, Any]]:
    base = ("model.checkpoint=none", "recipe.epochs=1", "quantizer=lsq")
    return finished(tiny(out, *base, *words), qat)


def calibrated(out: Path, *words: str) -> tuple[dict[str, Any], dict[str, Any]]:
    return finished(tiny(out, *words, base=TINY_PTQ), ptq)


def test_optimizer_groups(tmp_path: Path) -> None:
    words = ("recipe.lr=0.02", "recipe.quantizer_lr=0.003", "recipe.quantizer_weight_decay=0.01",
             "recipe.momentum=0.5", "recipe.weight_decay=0.002")  # fmt: skip
    _, state = trained(tmp_path, *words)
    groups = state["optimizer"]["param_groups"]
    assert {g["momentum"] for g in groups} == {0.5}
    assert [(g["peak_lr"], g["weight_decay"]) for g in groups] == [(0.02, 0.002), (0.003, 0.01)]


@pytest.mark.parametrize(
    ("words", "last"),
    [
        (("recipe.schedule=constant",), 1.0),
        (("recipe.schedule=linear",), 1 / 6),
        (("recipe.schedule=step", "recipe.milestones=[0.3,0.9]"), 0.1),
    ],
    ids=lambda v: str(v[0]) if isinstance(v, tuple) else "",
)
def test_schedule_of_the_last_of_six_steps(
    tmp_path: Path, words: tuple[str, ...], last: float
) -> None:
    _, state = trained(tmp_path, "recipe.epochs=2", "recipe.lr=0.02", *words)
    assert state["optimizer"]["param_groups"][0]["lr"] == pytest.approx(0.02 * last)


def test_the_regulariser_decides_and_its_warmup_delays(tmp_path: Path) -> None:
    words = ("quantizer=adaround", "recipe.iterations=60", "recipe.lr.rounding=0.1")
    shares = []
    for number, own in enumerate(("penalty=0", "penalty=1", "warmup=0.95", "beta=[2,2]")):
        more = () if own.startswith("penalty") else ("recipe.penalty=1",)
        result, _ = calibrated(tmp_path / str(number), *words, *more, f"recipe.{own}")
        units = result["reconstruction"]["units"]
        shares.append(sum(unit["converged"] for unit in units) / len(units))
    none, full, late, steady = shares
    assert full > late > none
    assert steady != full


def test_calibration_on_the_prefix_and_the_second_pass(tmp_path: Path) -> None:
    steps = {}
    for place in ("float", "prefix"):
        words = ("quantizer=nearest", "bits=2", f"recipe.calibrate_on={place}")
        _, state = calibrated(tmp_path / place, *words)
        steps[place] = state["model"]["layer3.0.conv2.act_quantizer.scale"]
    assert not torch.equal(steps["float"], steps["prefix"])
    last = {}
    for number, own in enumerate(("step_lr=0", "step_lr=0.01", "step_p=1")):
        words = ("quantizer=brecq", "bits=2", f"recipe.{own}")
        _, state = calibrated(tmp_path / str(number), *words)
        last[own] = state["model"]["layer1.0.conv2.act_quantizer.scale"]
    assert len({float(v) for v in last.values()}) == 3


def test_candidates_of_a_sensitivity_policy(tmp_path: Path) -> None:
    words = ("bitwidth=sensitivity", "bitwidth.metric=size", "bitwidth.candidates=[3,5]", "bits=4")
    _, state = trained(tmp_path, *words)
    inner = [tuple(v) for k, v in state["bits"].items() if k not in ("conv1", "linear")]
    assert {w for w, _ in inner} == {3, 5}


def test_splits_that_eval_scores(tmp_path: Path, qexp: Qexp) -> None:
    cfg = tiny(tmp_path, "model.checkpoint=none", "recipe.epochs=1", "dataset.val_fraction=0.25")
    finished(cfg, qat)
    losses = set()
    for split in ("test", "val", "train"):
        done = qexp("eval", f"run={cfg.folder}", f"split={split}", "device=cpu")
        assert done.code == 0, done.err
        assert f"{split} of synthetic" in done.out
        losses.add(done.out.rpartition("| loss ")[2].split()[0])
    assert len(losses) == 3


def test_a_run_is_scored_without_the_file_its_widths_came_from(tmp_path: Path, qexp: Qexp) -> None:
    widths = tmp_path / "bits.yaml"
    words = ("model.checkpoint=none", "recipe.epochs=1", "bitwidth=sensitivity", "bits=4")
    first = tiny(tmp_path / "a", *words, "bitwidth.metric=size", f"bitwidth.save={widths}")
    finished(first, qat)
    second = tiny(tmp_path / "b", *words[:2], "bitwidth=pattern", f"bitwidth.file={widths}")
    finished(second, qat)
    widths.unlink()
    done = qexp("eval", f"run={second.folder}", "device=cpu")
    assert done.code == 0, done.err
    assert "test of synthetic" in done.out
