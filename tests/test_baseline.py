"""Which float network `model.checkpoint=auto` stands for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from compose import stopped_in_epoch, tiny
from omegaconf import DictConfig, OmegaConf, open_dict

from qexp.recipes.baseline import (
    AUTO,
    find,
    fingerprint,
    float_config,
    interrupted,
    trained_checkpoint,
)
from qexp.recipes.qat import qat
from qexp.runner.run import open_run


def train(cfg: DictConfig) -> dict[str, Any]:
    with open_run(Path(cfg.folder), cfg) as run:
        run.finish(result := qat(cfg, run))
    return result


def float_run(
    place: Path,
    cfg: DictConfig,
    state: str = "done",
    protocol: dict[str, Any] | None = None,
    **status: Any,
) -> Path:
    """What a float run leaves behind, without its weights."""
    place.mkdir(parents=True)
    (place / "last.pt").touch()
    (place / "config.yaml").write_text(OmegaConf.to_yaml(cfg))
    (place / "status.json").write_text(json.dumps({"state": state, **status}))
    if state == "done":
        (place / "result.json").write_text(json.dumps({"protocol": protocol or {}}))
    return place


def test_a_resumed_run_and_one_of_several_processes_are_no_baseline(tmp_path: Path) -> None:
    cfg = float_config(tiny(tmp_path))
    wanted = fingerprint(cfg)
    segment = {"from": {"recipe.lr": 0.1}, "to": {"recipe.lr": 0.5}}
    float_run(tmp_path / "a", cfg, segments=[segment], protocol={"segments": [segment]})
    float_run(tmp_path / "b", cfg, protocol={"processes": 2})
    assert find(tmp_path, wanted) is None
    plain = float_run(tmp_path / "c", cfg)
    assert find(tmp_path, wanted) == plain


def test_a_quantized_run_of_the_same_recipe_is_no_baseline(tmp_path: Path) -> None:
    cfg = float_config(tiny(tmp_path))
    with open_dict(cfg):
        cfg.quantizer = tiny(tmp_path, "quantizer=lsq").quantizer
    float_run(tmp_path / "a", cfg)
    assert find(tmp_path, fingerprint(cfg)) is None


def test_a_baseline_is_told_by_what_it_computes_not_by_where_and_how_fast(tmp_path: Path) -> None:
    def of(*words: str) -> str:
        return fingerprint(float_config(tiny(tmp_path, *words)))

    same = ("float.plots=true", "float.save_every=7", "seed=5", "bits=2")
    assert {of(word) for word in same} == {of()}
    others = ("max_steps=3", "float.epochs=3", "dataset.classes=5", "model.width=0.5")
    assert len({of(), *map(of, others)}) == 5


def test_a_quick_look_starts_from_a_whole_network_where_there_is_one(tmp_path: Path) -> None:
    whole, quick = tiny(tmp_path), tiny(tmp_path, "max_steps=3")
    place = Path(whole.out) / f"{whole.dataset.name}-{whole.model.name}" / "fp32"
    assert trained_checkpoint(quick) is None
    cut = float_run(place / "cut", float_config(quick))
    assert trained_checkpoint(quick) == str(cut / "last.pt")
    assert trained_checkpoint(whole) is None
    trained = float_run(place / "whole", float_config(whole))
    assert trained_checkpoint(quick) == trained_checkpoint(whole) == str(trained / "last.pt")


def test_a_baseline_that_max_steps_ends_early_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tiny(tmp_path, "max_steps=1"))
    assert "warning: max_steps=1 ends the float baseline early too" in capsys.readouterr().err


@pytest.mark.parametrize("state", ["dead", "interrupted", "failed", "running", "done"])
def test_a_baseline_that_has_come_to_no_end_is_gone_on_with(tmp_path: Path, state: str) -> None:
    cfg = float_config(tiny(tmp_path))
    wanted = fingerprint(cfg)
    mine = float_run(tmp_path / f"{AUTO}{wanted}", cfg, state)
    over = state in ("dead", "interrupted", "failed")
    assert interrupted(tmp_path, wanted) == (mine if over else None)


def test_a_baseline_that_was_gone_on_with_otherwise_is_left_alone(tmp_path: Path) -> None:
    cfg, longer = float_config(tiny(tmp_path)), float_config(tiny(tmp_path, "float.epochs=9"))
    wanted = fingerprint(cfg)
    segment = {"from": {"recipe.epochs": 2}, "to": {"recipe.epochs": 9}}
    float_run(tmp_path / f"{AUTO}{wanted}", longer, "interrupted")
    float_run(tmp_path / f"{AUTO}{wanted}-2", cfg, "interrupted", segments=[segment])
    assert interrupted(tmp_path, wanted) is None
    mine = float_run(tmp_path / f"{AUTO}{wanted}-3", cfg, "interrupted")
    assert interrupted(tmp_path, wanted) == mine


def test_a_run_whose_config_is_damaged_is_passed_over(tmp_path: Path) -> None:
    cfg = float_config(tiny(tmp_path))
    wanted = fingerprint(cfg)
    for name, text in (("a", "{:::"), ("b", "- 1"), ("c", "")):
        (float_run(tmp_path / name, cfg) / "config.yaml").write_text(text)
    assert find(tmp_path, wanted) is None
    whole = float_run(tmp_path / "d", cfg)
    assert find(tmp_path, wanted) == whole


def test_folders_of_other_images_have_other_baselines(tmp_path: Path) -> None:
    cfg = float_config(tiny(tmp_path))
    assert len({fingerprint(cfg, "cats"), fingerprint(cfg, "dogs"), fingerprint(cfg)}) == 3
    run = float_run(tmp_path / "a", cfg, protocol={"contents": "cats"})
    assert find(tmp_path, fingerprint(cfg, "cats")) == run
    assert find(tmp_path, fingerprint(cfg, "dogs")) is None
    assert find(tmp_path, fingerprint(cfg)) is None


def test_a_float_run_that_somebody_else_began_is_left_alone(tmp_path: Path) -> None:
    cfg = float_config(tiny(tmp_path))
    wanted = fingerprint(cfg)
    float_run(tmp_path / "20260101", cfg, "interrupted")
    assert find(tmp_path, wanted) is None
    assert interrupted(tmp_path, wanted) is None
    mine = float_run(tmp_path / f"{AUTO}{wanted}-2", cfg, "interrupted")
    assert interrupted(tmp_path, wanted) == mine


def test_an_interrupted_baseline_serves_runs_of_other_methods_and_widths(
    tmp_path: Path,
) -> None:
    options = ["recipe.epochs=1", "float.epochs=2"]
    with stopped_in_epoch(2):
        train(tiny(tmp_path, *options))
    (folder,) = tmp_path.glob("**/fp32/auto-*")
    other = ("bits=3", "bitwidth=progressive", "quantizer=lsq", "float.plots=true")
    cfg = tiny(tmp_path, *options, *other)
    cfg.folder = str(tmp_path / "other")
    assert train(cfg)["fp32_top1"] is not None
    assert "resumed after epoch 1" in (folder / "train.log").read_text()
    status = json.loads((folder / "status.json").read_text())
    assert (status["state"], status.get("segments")) == ("done", None)


def test_runs_from_baselines_trained_apart_or_resumed_have_one_protocol(tmp_path: Path) -> None:
    options = ["recipe.epochs=1", "float.epochs=2"]
    with stopped_in_epoch(2):
        train(tiny(tmp_path / "resumed", *options))
    results = [train(tiny(tmp_path / name, *options)) for name in ("resumed", "whole")]
    files = [path.read_bytes() for path in tmp_path.glob("*/*/fp32/*/last.pt")]
    assert len(set(files)) == 2
    assert results[0]["protocol"] == results[1]["protocol"]
