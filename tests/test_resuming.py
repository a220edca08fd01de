"""What a resumed run may change, and that the change stays visible."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from compose import tiny
from omegaconf import DictConfig

from qexp.errors import ConfigError
from qexp.recipes import qat as qat_module
from qexp.recipes.qat import qat
from qexp.runner.folder import find_done, identity, read_json
from qexp.runner.run import open_run


def train(cfg: DictConfig, *, resume: bool = False) -> dict[str, Any]:
    with open_run(Path(cfg.folder), cfg, resume=resume, label="dorefa+lsq") as run:
        run.finish(qat(cfg, run))
    return read_json(run.dir / "result.json")


START = ("model.checkpoint=none", "recipe.epochs=1")


@pytest.mark.parametrize(
    "change",
    ["bits=2", "seed=7", "recipe.batch_size=8", "recipe.optimizer=adamw", "recipe.ema=0.9",
     "bitwidth.first_last=float", "max_steps=1", "model.width=0.5", "quantizer=lsq"],
)  # fmt: skip
def test_what_is_settled_cannot_change_and_nothing_is_lost(tmp_path: Path, change: str) -> None:
    train(tiny(tmp_path, *START))
    folder = tmp_path / "run"
    before = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}
    with pytest.raises(ConfigError, match=r"resume: .* cannot change from .* Start a new run"):
        train(tiny(tmp_path, *START, change), resume=True)
    assert {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()} == before


def test_a_longer_training_is_told_from_an_uninterrupted_one(tmp_path: Path) -> None:
    train(tiny(tmp_path, *START))
    longer = tiny(tmp_path, *START[:1], "recipe.epochs=2")
    resumed = train(longer, resume=True)
    changed = {"from": {"recipe.epochs": 1}, "to": {"recipe.epochs": 2}}
    assert resumed["protocol"]["segments"] == [changed]
    assert resumed["epochs"] == 2
    whole = tiny(tmp_path, *START[:1], "recipe.epochs=2")
    whole.folder = str(tmp_path / "whole")
    assert train(whole)["protocol_hash"] != resumed["protocol_hash"]
    assert find_done(tmp_path, identity(whole)) == tmp_path / "whole"
    again = train(tiny(tmp_path, *START[:1], "recipe.epochs=3"), resume=True)
    assert [s["to"]["recipe.epochs"] for s in again["protocol"]["segments"]] == [2, 3]


def test_where_and_how_may_change_and_leave_no_mark(tmp_path: Path) -> None:
    first = train(tiny(tmp_path, *START))
    options = ("recipe.save_every=2", "threads=1", "float.epochs=9")
    again = train(tiny(tmp_path, *START, *options), resume=True)
    assert again["protocol_hash"] == first["protocol_hash"]
    assert again["method"] == first["method"] == "dorefa+lsq"  # the label, resumed or not


def test_a_resume_that_fails_before_it_trains_leaves_the_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = train(tiny(tmp_path, *START))

    def broken(*given: Any) -> Any:
        raise OSError("no data")

    folder = tmp_path / "run"
    config = (folder / "config.yaml").read_bytes()
    cfg = tiny(tmp_path, *START[:1], "recipe.epochs=2")
    with monkeypatch.context() as patch:
        patch.setattr("qexp.recipes.build.make_dataset", broken)
        with pytest.raises(OSError, match="no data"):
            train(cfg, resume=True)
    assert json.loads((folder / "result.json").read_text()) == first
    assert read_json(folder / "status.json")["state"] == "done"
    assert (folder / "config.yaml").read_bytes() == config
    resumed = train(cfg, resume=True)
    assert resumed["epochs"] == 2
    assert len(resumed["protocol"]["segments"]) == 1


def test_a_new_rate_is_the_one_that_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    constant = (*START[:1], "recipe.schedule=constant", "recipe.lr=0.01")
    train(tiny(tmp_path, *constant, "recipe.epochs=1"))
    used: list[list[float]] = []
    real = qat_module.set_lr

    def spy(optimizer: Any, factor: float) -> float:
        rate = real(optimizer, factor)
        used.append([group["lr"] for group in optimizer.param_groups])
        return rate

    monkeypatch.setattr(qat_module, "set_lr", spy)
    changes = ("recipe.epochs=2", "recipe.lr=0.003", "recipe.quantizer_lr=0.0001")
    train(tiny(tmp_path, *constant, *changes), resume=True)
    assert used == [[0.003, 0.0001]] * 3
