"""The training recipe: its start, its loop, its checkpoints, its result."""

from __future__ import annotations

import copy
import csv
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compose import TINY, stopped_in_epoch, tiny
from conftest import Qexp
from omegaconf import DictConfig, OmegaConf
from waiting import Watch

from qexp import plot
from qexp.errors import CheckpointError, ConfigError, DataError, RunError
from qexp.models.digest import weights_sha256
from qexp.models.load import load_state
from qexp.models.resnet import ResNet
from qexp.quant.bitwidth import Progressive
from qexp.quant.codebook import Codebook
from qexp.quant.convert import quant_layers
from qexp.quant.dorefa import PACT
from qexp.quant.lsq import LSQ
from qexp.quant.n2uq import N2UQ
from qexp.quant.quantizer import Quantizer
from qexp.quant.trace import Layer
from qexp.recipes import build, outcome, picture
from qexp.recipes import qat as qat_module
from qexp.recipes.build import load_run
from qexp.recipes.evaluate import evaluate, evaluate_run
from qexp.recipes.loss import training_loss
from qexp.recipes.optimize import (
    WeightAverage,
    carry_momentum,
    lr_factor,
    make_optimizer,
    reestimate_bn_,
)
from qexp.recipes.qat import qat
from qexp.recipes.settings import Distill, Settings
from qexp.runner import checkpoint
from qexp.runner.answers import ANSWERS, read_right
from qexp.runner.folder import read_status
from qexp.runner.run import open_run


def train(cfg: DictConfig, *, resume: bool = False) -> tuple[dict[str, Any], Path]:
    with open_run(Path(cfg.folder), cfg, resume=resume) as run:
        result = qat(cfg, run)
        run.finish(result)
    return result, run.dir


def same(a: Any, b: Any) -> bool:
    """Whether two checkpoints' values are equal, tensors bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def epochs(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's epochs."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["event"] == "epoch"]


@pytest.fixture
def float_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One finished float network that the tests of this file start from."""
    out = tmp_path_factory.getbasetemp() / "float"
    found = list(out.glob("**/last.pt"))
    if not found:
        train(tiny(out, "quantizer=fp32", "recipe=float", "recipe.epochs=2"))
        found = list(out.glob("**/last.pt"))
    return found[0]


def test_qat_writes_the_documented_result(tmp_path: Path, float_run: Path) -> None:
    cfg = tiny(tmp_path, f"model.checkpoint={float_run}", "recipe.epochs=2", "recipe.plots=true")
    result, folder = train(cfg)
    written = json.loads((folder / "result.json").read_text())
    expected = {"top1", "top1_best", "fp32_top1", "drop", "bits", "size_bytes", "bops", "protocol"}
    assert expected <= written.keys()
    assert written["drop"] == pytest.approx(written["fp32_top1"] - written["top1"])
    assert written["protocol"]["float_sha256"] == result["protocol"]["float_sha256"]
    assert written["bits"]["weight_by_param"] == 4
    names = {p.name for p in folder.iterdir()}
    assert {"layers.csv", "last.pt", "best.pt", "curves.png", "weights.png"} <= names
    assert any(n.startswith("events.out.tfevents") for n in names)


@pytest.mark.parametrize("extra", [[], ["recipe.ema=0.99", "recipe.lr=0.2"]])
def test_eval_of_a_run_gives_its_last_epoch_again(
    tmp_path: Path, float_run: Path, extra: list[str]
) -> None:
    options = [f"model.checkpoint={float_run}", "recipe.epochs=2", *extra]
    result, folder = train(tiny(tmp_path, *options))
    again = tmp_path / "again.npz"
    node = {"run": str(folder), "checkpoint": "last.pt", "split": "test", "device": "cpu"}
    assert evaluate_run(DictConfig({**node, "answers": str(again)}))["top1"] == result["top1"]
    assert again.read_bytes() == (folder / ANSWERS).read_bytes()
    right, _ = read_right(again) or pytest.fail("no answers")
    for wrong in ("answers.csv", "nowhere/a.npz"):
        with pytest.raises(ConfigError, match=r"is no \.npz file in a folder that exists"):
            evaluate_run(DictConfig({**node, "answers": str(tmp_path / wrong)}))
    assert 100 * right.mean() == pytest.approx(result["top1"])


def test_a_run_in_channels_last_is_scored_so_again(
    tmp_path: Path, float_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [f"model.checkpoint={float_run}", "recipe.epochs=1", "recipe.channels_last=true"]
    result, folder = train(tiny(tmp_path, *options))
    orders = []

    def scored(model: torch.nn.Module, batches: Any) -> Any:
        convs = [p for p in model.parameters() if p.dim() == 4 and p.shape[-1] > 1]
        orders.append([p.is_contiguous(memory_format=torch.channels_last) for p in convs])
        return evaluate(model, batches)

    monkeypatch.setattr("qexp.recipes.evaluate.evaluate", scored)
    node = {"run": str(folder), "checkpoint": "last.pt", "split": "test", "device": "cpu"}
    assert evaluate_run(DictConfig(node))["top1"] == result["top1"]
    assert orders[0]
    assert all(orders[0])


def test_a_test_image_that_cannot_be_read_costs_no_epoch(
    tmp_path: Path, float_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bn = "recipe.bn_reestimate=32"
    options = [f"model.checkpoint={float_run}", "recipe.epochs=1", bn]
    _, whole = train(tiny(tmp_path / "whole", *options))

    def unreadable(*given: Any) -> None:
        raise DataError("data: a.png cannot be read as an image (why). Replace or remove it.")

    stopped = tiny(tmp_path / "stopped", *options)
    kept = rf"\(why\)\. Replace or remove it\. This epoch is kept: qexp resume {stopped.folder}$"
    with monkeypatch.context() as patch:
        patch.setattr(qat_module, "evaluate", unreadable)
        with pytest.raises(DataError, match=kept):
            train(stopped)
    assert read_status(Path(stopped.folder))["state"] == "failed"
    monkeypatch.setattr(qat_module, "training_loss", None)  # no step is trained again
    result, folder = train(stopped, resume=True)
    assert result["images_per_s"] > 0
    assert "did not move" not in (folder / "train.log").read_text()
    a, b = checkpoint.load(whole / "last.pt"), checkpoint.load(folder / "last.pt")
    counted = [key for key in a["model"] if key.endswith("num_batches_tracked")]
    for key in counted:  # batch norm was measured twice
        assert b["model"].pop(key) == a["model"].pop(key) + 1
    timings = {"train_s", "trained", "test_s", "history"}
    assert {k for k in a if k not in timings and not same(a[k], b[k])} == set()
    assert a["history"][0]["top1"] == b["history"][0]["top1"]


@pytest.mark.parametrize("extra", [[], ["recipe.ema=0.9", "recipe.accumulate=2"]])
def test_resume_equals_uninterrupted_run_bit_for_bit(
    tmp_path: Path, float_run: Path, extra: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [f"model.checkpoint={float_run}", "recipe.epochs=3", "recipe.save_every=1", *extra]
    _, whole = train(tiny(tmp_path / "whole", *options))

    stopped, saves = tiny(tmp_path / "stopped", *options), 0
    real = checkpoint.save

    def save_then_die(path: Path, state: dict[str, Any]) -> None:
        nonlocal saves
        real(path, state)
        saves += path.name == "last.pt"
        if saves == 5:  # in the middle of the second epoch
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save", save_then_die)
    with pytest.raises(KeyboardInterrupt):
        train(stopped)
    monkeypatch.setattr(checkpoint, "save", real)
    torch.manual_seed(99)  # a new process has other random state
    _, folder = train(stopped, resume=True)

    a, b = checkpoint.load(whole / "last.pt"), checkpoint.load(folder / "last.pt")
    timings = {"train_s", "trained", "test_s", "history"}
    assert {k for k in a if k not in timings and not same(a[k], b[k])} == set()
    for x, y in zip(a["history"], b["history"], strict=True):
        assert {k: x[k] for k in ("loss", "top1", "lr")} == {
            k: y[k] for k in ("loss", "top1", "lr")
        }


@pytest.mark.parametrize("writes", range(4))
def test_a_kill_between_two_writes_leaves_the_best_network_that_the_result_names(
    tmp_path: Path, float_run: Path, writes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = tiny(tmp_path, f"model.checkpoint={float_run}", "recipe.epochs=2")
    logged, real = outcome.log_epoch, checkpoint.save

    def always_best(*given: Any, **more: Any) -> bool:
        given[2]["best"]["selected"] = -1.0
        return logged(*given, **more)

    def write_or_die(path: Path, state: dict[str, Any]) -> None:
        nonlocal writes
        if writes == 0:
            raise KeyboardInterrupt
        writes -= 1
        real(path, state)

    monkeypatch.setattr(outcome, "log_epoch", always_best)
    monkeypatch.setattr(checkpoint, "save", write_or_die)
    with pytest.raises(KeyboardInterrupt):
        train(cfg)
    monkeypatch.setattr(checkpoint, "save", real)
    result, folder = train(cfg, resume=True)
    last, best = checkpoint.load(folder / "last.pt"), checkpoint.load(folder / "best.pt")
    assert best["epoch"] == result["best_epoch"] == 2
    assert same(best["model"], last["model"])


def test_two_runs_in_one_process_do_not_affect_each_other(tmp_path: Path, float_run: Path) -> None:
    options = [f"model.checkpoint={float_run}", "recipe.epochs=1"]
    alone, _ = train(tiny(tmp_path / "a", *options))
    train(tiny(tmp_path / "b", *options, "bits=2", "compile=kernels", "seed=3", "recipe.amp=true"))
    again, _ = train(tiny(tmp_path / "c", *options))
    assert again["top1"] == alone["top1"]
    first = checkpoint.load(tmp_path / "a" / "run" / "last.pt")["model"]
    third = checkpoint.load(tmp_path / "c" / "run" / "last.pt")["model"]
    assert same(first, third)


def test_auto_trains_one_float_network_and_shares_it(tmp_path: Path) -> None:
    first, _ = train(tiny(tmp_path, "recipe.epochs=1"))
    other, _ = train(tiny(tmp_path, "recipe.epochs=1", "seed=1", "bits=2"))
    assert first["fp32_top1"] == other["fp32_top1"]
    assert first["protocol"]["float_sha256"] == other["protocol"]["float_sha256"]
    assert len(list(tmp_path.glob("**/fp32/*/result.json"))) == 1


def test_a_start_from_a_run_with_an_average_takes_the_average(
    tmp_path: Path, float_run: Path
) -> None:
    options = ["quantizer=fp32", "recipe=float", "recipe.ema=0.99", "recipe.epochs=2"]
    averaged, folder = train(tiny(tmp_path / "float", *options))
    start = [f"model.checkpoint={folder / 'last.pt'}", "recipe.epochs=1"]
    result, _ = train(tiny(tmp_path / "qat", *start))
    assert result["fp32_top1"] == averaged["top1"]


def test_an_average_of_quantizers_that_are_replaced_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"recipe\.ema=0\.9 would average quantizers"):
        train(tiny(tmp_path, "bitwidth=progressive", "recipe.ema=0.9", "model.checkpoint=none"))


def test_a_run_does_not_depend_on_who_trained_its_float_network(tmp_path: Path) -> None:
    options = ["quantizer=asq", "recipe.epochs=1"]
    first, _ = train(tiny(tmp_path, *options))  # trains the float network first
    kept = checkpoint.load(tmp_path / "run" / "last.pt")["model"]
    cfg = tiny(tmp_path, *options)
    cfg.folder = str(tmp_path / "again")
    second, folder = train(cfg)
    assert same(kept, checkpoint.load(folder / "last.pt")["model"])
    assert first["top1"] == second["top1"]


def test_auto_takes_a_float_run_the_user_made(tmp_path: Path) -> None:
    options = ["quantizer=fp32", "recipe.batch_size=16", "recipe.epochs=2", "recipe.plots=false"]
    cfg = tiny(tmp_path, *options)
    cfg.folder = str(tmp_path / "synthetic-resnet8" / "fp32" / "mine")
    _, mine = train(cfg)
    result, _ = train(tiny(tmp_path, "recipe.epochs=1"))
    assert json.loads((mine / "result.json").read_text())["top1"] == result["fp32_top1"]
    assert [p.name for p in mine.parent.iterdir() if p.is_dir()] == ["mine"]


def test_an_interrupted_float_network_is_gone_on_with(
    tmp_path: Path,
) -> None:
    options = ["recipe.epochs=1", "float.epochs=3"]
    with stopped_in_epoch(2):
        train(tiny(tmp_path, *options))
    (folder,) = tmp_path.glob("**/fp32/auto-*")
    assert json.loads((folder / "status.json").read_text())["state"] == "interrupted"
    cfg = tiny(tmp_path, *options)
    cfg.folder = str(tmp_path / "again")
    train(cfg)
    assert "resumed after epoch 1" in (folder / "train.log").read_text()
    assert [f for f in tmp_path.glob("**/fp32/*") if f.is_dir()] == [folder]


def test_a_checkpoint_that_a_float_recipe_does_not_use_is_said(
    tmp_path: Path, float_run: Path, capsys: pytest.CaptureFixture
) -> None:
    options = ["quantizer=fp32", "recipe=float", "recipe.epochs=2"]
    train(tiny(tmp_path, *options, f"model.checkpoint={float_run}"))
    assert f"warning: model.checkpoint={float_run} is not used" in capsys.readouterr().err


def test_stages_that_were_not_reached_are_not_recorded(tmp_path: Path, float_run: Path) -> None:
    options = [f"model.checkpoint={float_run}", "recipe.epochs=4", "max_steps=1"]
    result, _ = train(tiny(tmp_path, *options, "bitwidth=progressive", "bits=2"))
    assert result["w_bits"] == result["bits"]["weight_by_param"] > 2


STAGES = ("bitwidth=progressive", "bitwidth.stages=[{until: 1, bits: 8}, {bits: 2}]", "bits=2")


def test_the_best_epoch_is_one_at_the_last_widths(
    tmp_path: Path, float_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = iter([90.0, 10.0, 20.0, 15.0])
    score = qat_module._score
    monkeypatch.setattr(qat_module, "_score", lambda *of: score(*of)._replace(top1=next(found)))
    options = [f"model.checkpoint={float_run}", "recipe.epochs=4", *STAGES]
    result, folder = train(tiny(tmp_path, *options))
    assert (result["top1_best"], result["best_epoch"], result["top1"]) == (20.0, 3, 15.0)
    assert {b[0] for b in checkpoint.load(folder / "best.pt")["bits"].values()} == {2, 8}


def test_the_width_of_a_run_in_stages_is_that_of_its_inner_layers() -> None:
    layers = [
        Layer(str(i), "linear", (4, 4), (4,), 1, (4,), False, place)
        for i, place in enumerate(("first", "inner", "inner", "last"))
    ]
    policy = Progressive([{"until": 1, "bits": 8}, {"bits": 2}])
    bits = policy.assign(layers, epoch=1, epochs=2)
    network = build.Network(torch.nn.Module(), layers, policy, bits, [])
    assert outcome._nominal(OmegaConf.create(), "weight", network) == 2


@pytest.mark.parametrize("first", [8, 32])
def test_layers_of_a_later_stage_keep_as_little_for_backward(
    tmp_path: Path, float_run: Path, monkeypatch: pytest.MonkeyPatch, first: int
) -> None:
    kept: list[set[bool]] = []
    begin = qat_module._train_epoch

    def look(forward: Any, model: torch.nn.Module, *rest: Any) -> None:
        kept.append({layer.input_again for layer in quant_layers(model).values()})
        begin(forward, model, *rest)

    monkeypatch.setattr(qat_module, "_train_epoch", look)
    stages = f"bitwidth.stages=[{{until: 1, bits: {first}}}, {{bits: 2}}]"
    options = [f"model.checkpoint={float_run}", "recipe.epochs=2", "saved=inputs"]
    train(tiny(tmp_path, *options, "bitwidth=progressive", stages, "bits=2"))
    assert kept[1] == {True}


def test_fair_control_trains_the_float_network_on(tmp_path: Path, float_run: Path) -> None:
    options = ["quantizer=fp32", "recipe=qat", f"model.checkpoint={float_run}", "recipe.epochs=1"]
    options += ["recipe.batch_size=16", "recipe.plots=false", "recipe.calibration_images=16"]
    result, _ = train(tiny(tmp_path, *options))
    assert result["fp32_top1"] is not None
    assert result["w_bits"] == 32
    assert result["recipe"] == "qat"
    assert result["size_bytes"] == result["fp32_bytes"]


def test_steps_of_random_weights_fit_what_training_sees(tmp_path: Path) -> None:
    """Batch norm's averages of 0 and 1 would give steps that no input reaches."""
    scratch = ("recipe.from_scratch=true", "model.depth=56", "max_steps=1", "recipe.lr=1e-9")
    first = ("quantizer=lsq", "quantizer.weight.init=lsq", "quantizer.act.init=lsq")
    _, folder = train(tiny(tmp_path, *scratch, *first))
    model, _, _ = load_run(folder, "last.pt", "cpu")
    layer = quant_layers(model)["layer3.8.conv2"]
    codes: list[torch.Tensor] = []
    layer.register_forward_pre_hook(
        lambda module, inputs: codes.append(module.act_quantizer.codes(inputs[0]))
    )
    model.train()(torch.randn(16, 3, 8, 8))
    assert (codes[0] > 0).float().mean() > 0.3  # behind a ReLU half of them are 0
    assert codes[0].unique().numel() > 8


def test_nan_loss_stops_the_run_naming_step_and_layer(tmp_path: Path, float_run: Path) -> None:
    cfg = tiny(tmp_path, f"model.checkpoint={float_run}", "recipe.lr=1e30", "recipe.epochs=2")
    with pytest.raises(RunError, match=r"run: loss is .* at epoch 1, step \d+, layer '.*' first"):
        train(cfg)
    status = json.loads((Path(cfg.folder) / "status.json").read_text())
    assert status["state"] == "failed"
    assert "recipe.grad_clip" in status["error"]


def test_a_checkpoint_within_an_epoch_is_never_of_a_broken_network(
    tmp_path: Path, float_run: Path
) -> None:
    options = [f"model.checkpoint={float_run}", "recipe.lr=1e30", "recipe.save_every=1"]
    with pytest.raises(RunError, match=r"last\.pt \(epoch 1, step 1\)"):
        train(tiny(tmp_path, *options))
    kept = checkpoint.load(tmp_path / "run" / "last.pt")
    assert (kept["epoch"], kept["step"]) == (0, 1)
    assert all(v.isfinite().all() for v in kept["model"].values() if v.is_floating_point())


@pytest.mark.parametrize("length", [["recipe.epochs=1"], ["recipe.epochs=3", "max_steps=10"]])
def test_the_last_tenth_of_the_steps_has_fixed_codebooks(
    tmp_path: Path, float_run: Path, length: list[str]
) -> None:
    options = ["quantizer=adq", f"model.checkpoint={float_run}", *length]
    seen: list[bool] = []
    with pytest.MonkeyPatch.context() as patch:
        observe = Codebook._observe
        patch.setattr(Codebook, "_observe", lambda q, *a: (seen.append(q.adapting), observe(q, *a)))
        train(tiny(tmp_path, *options, "dataset.train_images=160"))  # ten steps
    per_step = len(seen) // 10
    assert [all(seen[i * per_step : (i + 1) * per_step]) for i in range(10)] == [True] * 9 + [False]


def test_a_codebook_that_is_uniform_by_chance_is_followed_with_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def layer(*levels: float) -> SimpleNamespace:
        grid = SimpleNamespace(bits=2, num_levels=3, levels=lambda: torch.tensor([levels]))
        return SimpleNamespace(weight_quantizer=grid)

    layers = {"a": layer(-1, 0, 1), "b": layer(-1, 0, 2)}
    monkeypatch.setattr(picture, "quant_layers", lambda model: layers)
    assert picture.codebooks(torch.nn.Module()) == {"a": [-1, 0, 1], "b": [-1, 0, 2]}
    del layers["b"]
    assert picture.codebooks(torch.nn.Module()) == {}


def test_an_activation_quantizer_without_thresholds_has_no_panel_and_its_run_ends(
    tmp_path: Path, float_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LSQ, "thresholds", Quantizer.thresholds)
    options = ["quantizer=lsq", f"model.checkpoint={float_run}", "recipe.epochs=1"]
    result, folder = train(tiny(tmp_path, *options, "recipe.plots=true"))
    assert "top1" in result
    assert (folder / "weights.png").is_file()
    assert not (folder / "activations.png").exists()


def test_codebooks_are_drawn_from_where_calibration_put_them(
    tmp_path: Path, float_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[plot.TrajectoryPlot] = []
    monkeypatch.setattr(plot, "codebook_trajectories", lambda items, *rest: drawn.extend(items))
    options = ["quantizer=adq", "bits=3", f"model.checkpoint={float_run}", "recipe.epochs=1"]
    _, folder = train(tiny(tmp_path, *options, "recipe.plots=true"))
    (epoch,) = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()
                if '"event": "epoch"' in x]  # fmt: skip
    assert len(drawn) == 6
    for item in drawn:
        assert item.epochs.tolist() == [0, 1]
        assert item.levels[1].tolist() == pytest.approx(epoch["codebooks"][item.name])
        assert not torch.equal(item.levels[0], item.levels[1])


def test_pictures_are_of_the_start_and_of_the_end_of_the_training(
    tmp_path: Path, float_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: dict[str, list[Any]] = {}
    monkeypatch.setattr(plot, "curves", lambda *given: None)
    for name in ("weight_levels", "activation_thresholds", "factors"):
        monkeypatch.setattr(plot, name, lambda items, *rest, name=name: drawn.update({name: items}))
    options = ["quantizer=asq", "bits=3", f"model.checkpoint={float_run}", "recipe.epochs=1"]
    _, folder = train(tiny(tmp_path, *options, "recipe.plots=true"))
    start, end = (checkpoint.load(path)["model"] for path in (float_run, folder / "last.pt"))
    layers = quant_layers(load_run(folder, "last.pt", "cpu")[0])
    assert [item.name for item in drawn["weight_levels"]] == list(layers)
    for item in drawn["weight_levels"]:
        weight, levels = f"{item.name}.weight", layers[item.name].weight_quantizer.levels()
        assert torch.equal(item.before, start[weight].flatten())
        assert torch.equal(item.after, end[weight].flatten())
        assert not torch.equal(item.before, item.after)
        assert torch.equal(item.levels_after, levels)
        assert not torch.equal(item.levels_before, levels)
        assert item.bits == (3 if item.name.startswith("layer") else 8)
    for item in drawn["activation_thresholds"]:
        quantizer = layers[item.name.removesuffix(", x / factor")].act_quantizer
        assert torch.equal(item.thresholds, quantizer.thresholds().detach())
        assert torch.equal(item.levels, quantizer.levels()[0].detach())
    assert len(drawn["activation_thresholds"]) == len(layers)
    assert [item.name for item in drawn["factors"]] == list(layers)[1:-1]
    assert {len(item.factors) for item in drawn["factors"]} == {16}  # one a calibration image


def test_a_teacher_may_be_another_network(qexp: Qexp, tmp_path: Path) -> None:
    torch.manual_seed(0)
    path = tmp_path / "wide.pt"
    torch.save(ResNet(8, 4, width=0.5).state_dict(), path)
    wide = ("+model@recipe.distill.model=resnet8", "recipe.distill.model.width=0.5")
    own = (*TINY, "quantizer=lsq", "model.checkpoint=none", "recipe.epochs=1", "folder=run")
    taught = (*own, "recipe.distill.weight=0.5", *wide)
    said = qexp("train", *taught)
    assert said.code == 2
    assert "is another network than the one this run starts from" in said.err
    said = qexp("train", *taught, f"recipe.distill.teacher={path}", "dataset.classes=5")
    assert "does not fit the model: checkpoint has 4 classes, dataset has 5" in said.err
    said = qexp("train", *taught, f"recipe.distill.teacher={path}", "recipe.distill.model.widht=1")
    assert "no key 'recipe.distill.model.widht'" in said.err
    assert not Path("run").exists()
    said = qexp("train", *taught, f"recipe.distill.teacher={path}")
    assert said.code == 0, said.err
    known = json.loads(Path("run/result.json").read_text())["protocol"]["distill"]
    assert known["model"]["width"] == 0.5
    assert known["teacher"] == weights_sha256(path)
    alone = qexp("train", *own[:-1], "folder=alone")
    assert alone.code == 0, alone.err
    result = json.loads(Path("alone/result.json").read_text())
    assert set(result["protocol"]["distill"]) == {"weight", "temperature", "teacher"}  # as ever


def test_widths_that_differ_are_left_as_a_table_that_another_run_reads(
    qexp: Qexp, tmp_path: Path
) -> None:
    own = (*TINY, "quantizer=lsq", "model.checkpoint=none", "recipe.epochs=1", "recipe.plots=true")
    random = ("bitwidth=sensitivity", "bitwidth.allocation=random", "bits=3")
    assert qexp("train", *own, *random, "folder=a").code == 0
    table = ("bitwidth=pattern", "bitwidth.file=a/bits.yaml")
    assert qexp("train", *own, *table, "folder=b").code == 0
    a, b = (csv.DictReader(Path(run, "layers.csv").read_text().splitlines()) for run in "ab")
    assert [(r["name"], r["w_bits"], r["a_bits"]) for r in a] == [
        (r["name"], r["w_bits"], r["a_bits"]) for r in b
    ]
    assert Path("a/bits.png").is_file()
    assert qexp("train", *own, "bits=3", "folder=c").code == 0
    assert not list(Path("c").glob("bits.*"))


def test_several_processes_and_synced_norms_are_another_protocol(
    tmp_path: Path, float_run: Path
) -> None:
    cfg = tiny(tmp_path, f"model.checkpoint={float_run}", "recipe.epochs=1")
    result, folder = train(cfg)
    dataset = SimpleNamespace(protocol=dict)
    recipe = {"epochs": 1, "distill": {"weight": 0.5, "teacher": str(folder / "last.pt")}}
    start = {"sha256": "x", "teacher_sha256": weights_sha256(folder / "last.pt")}
    alone = outcome.protocol(cfg, recipe, dataset, start)
    assert len(alone["distill"]["teacher"]) == 64  # a hash, not the place
    assert "processes" not in alone
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(outcome, "world", lambda: SimpleNamespace(size=8))
        cfg.sync_bn = True
        together = outcome.protocol(cfg, recipe, dataset, start)
    assert together == {**alone, "processes": 8, "sync_bn": True}
    assert all("per_channel=" in text for text in result["granularity"]["weight"])


def test_the_warm_up_is_of_epochs_and_the_schedule_of_what_is_left(
    tmp_path: Path, float_run: Path
) -> None:
    options = (f"model.checkpoint={float_run}", "recipe.epochs=2", "recipe.warmup_epochs=1")
    _, folder = train(tiny(tmp_path, *options))
    rates = [row["lr"] for row in epochs(folder)]
    assert rates == pytest.approx([0.01, 0.01 * 0.25])  # of 3 steps each; cos at 2/3 is -1/2


def test_images_right_are_counted_anew_each_epoch(tmp_path: Path, float_run: Path) -> None:
    options = (f"model.checkpoint={float_run}", "recipe.epochs=4", "recipe.lr=1e-9")
    _, folder = train(tiny(tmp_path, *options, "recipe.accumulate=2"))
    rows = epochs(folder)
    assert all(0 < row["train_top1"] <= 100 for row in rows)
    assert rows[-1]["train_top1"] == pytest.approx(rows[0]["train_top1"], abs=20)


@pytest.mark.parametrize("ema", ["0", "0.9"])
def test_batch_norms_are_measured_after_the_last_epoch_alone(
    tmp_path: Path, float_run: Path, monkeypatch: pytest.MonkeyPatch, ema: str
) -> None:
    measured: list[dict[str, torch.Tensor]] = []

    def spy(model: torch.nn.Module, *given: Any) -> None:
        reestimate_bn_(model, *given)
        measured.append(copy.deepcopy(model.state_dict()))

    monkeypatch.setattr(qat_module, "reestimate_bn_", spy)
    options = (f"model.checkpoint={float_run}", "recipe.epochs=2", "recipe.bn_reestimate=32")
    _, folder = train(tiny(tmp_path, *options, f"recipe.ema={ema}"))
    saved = checkpoint.load(folder / "last.pt")
    (state,) = measured
    assert same(saved["average"]["state"] if saved["average"] else saved["model"], state)


def test_the_result_is_of_the_average_that_was_scored(
    tmp_path: Path, float_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[dict[str, torch.Tensor]] = []
    real = outcome.result

    def spy(cfg: DictConfig, run: Any, network: Any, *given: Any, **more: Any) -> dict[str, Any]:
        counted.append(copy.deepcopy(network.model.state_dict()))
        return real(cfg, run, network, *given, **more)

    monkeypatch.setattr(outcome, "result", spy)
    options = (f"model.checkpoint={float_run}", "recipe.epochs=1", "recipe.ema=0.9")
    _, folder = train(tiny(tmp_path, *options))
    saved = checkpoint.load(folder / "last.pt")
    assert same(saved["average"]["state"], counted[0])
    assert not same(saved["model"], counted[0])


def test_max_steps_ends_the_schedule_there(tmp_path: Path, float_run: Path) -> None:
    cfg = tiny(tmp_path, f"model.checkpoint={float_run}", "recipe.epochs=5", "max_steps=4")
    result, folder = train(cfg)
    assert result["epochs"] == 2  # three steps an epoch
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last = [r for r in rows if r["event"] == "epoch"][-1]
    assert last["lr"] == pytest.approx(
        0.01 * lr_factor(3, 4, schedule="cosine", warmup=0, milestones=())
    )


@pytest.mark.parametrize(
    "extra",
    [
        ["recipe.distill.weight=0.5", "recipe.distill.temperature=2.0"],
        ["recipe.amp=true", "recipe.channels_last=true"],
        ["recipe.grad_clip=1.0", "recipe.optimizer=adamw", "recipe.lr=0.001"],
        ["dataset.val_fraction=0.25", "recipe.label_smoothing=0.1", "recipe.warmup_epochs=0.5"],
        ["recipe.bn_reestimate=32", "recipe.schedule=step"],
        ["recipe.bn_reestimate=32", "recipe.ema=0.9"],
        ["quantizer/act=none"],
        ["bitwidth.first_last=same"],
        ["bitwidth.first_last=fp32"],
    ],
    ids=lambda extra: extra[0],
)
def test_every_option_trains_to_a_finite_result(
    tmp_path: Path, float_run: Path, extra: list[str]
) -> None:
    options = [f"model.checkpoint={float_run}", "recipe.epochs=1", *extra]
    result, folder = train(tiny(tmp_path, *options))
    state = checkpoint.load(folder / "last.pt")["model"]
    assert all(bool(torch.isfinite(v).all()) for v in state.values() if v.is_floating_point())
    assert 0 <= result["top1"] <= 100
    if "dataset.val_fraction=0.25" in extra:
        assert result["best_selected_on"] == "val"
        assert result["protocol"]["val_seen"] is True  # `float_run` held nothing out
        assert "it may have been trained on those that" in (folder / "train.log").read_text()


def test_a_float_network_of_the_same_split_has_not_seen_the_held_out_images(tmp_path: Path) -> None:
    options = ["model.checkpoint=auto", "dataset.val_fraction=0.25", "recipe.epochs=1"]
    result, folder = train(tiny(tmp_path, *options))
    assert result["best_selected_on"] == "val"
    assert "val_seen" not in result["protocol"]
    assert "may have been trained on" not in (folder / "train.log").read_text()


def test_accumulation_gives_the_gradient_of_the_whole_batch(
    tmp_path: Path, float_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fixed(norm: torch.nn.BatchNorm2d, x: torch.Tensor) -> torch.Tensor:
        mean, var = norm.running_mean, norm.running_var  # not the batch's: parts are no batch
        return F.batch_norm(x, mean, var, norm.weight, norm.bias, False, 0.0, norm.eps)

    monkeypatch.setattr(torch.nn.BatchNorm2d, "forward", fixed)
    start = checkpoint.load(float_run)["model"]
    moves = []
    for parts in (1, 4):
        options = [f"model.checkpoint={float_run}", "recipe.epochs=1", f"recipe.accumulate={parts}"]
        _, folder = train(tiny(tmp_path / str(parts), *options, "max_steps=1"))
        state = checkpoint.load(folder / "last.pt")["model"]
        moves.append(torch.cat([(state[k] - v).flatten() for k, v in start.items() if "conv" in k]))
    assert moves[0].abs().max() > 0
    torch.testing.assert_close(moves[1], moves[0], rtol=1e-3, atol=1e-3 * float(moves[0].std()))


def test_the_loss_is_cross_entropy_and_the_teachers_logits_by_hand() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 0, 1])
    student, teacher = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
    s = Settings(label_smoothing=0.1, distill=Distill(weight=0.3, temperature=2.0))
    log_p = student(x).log_softmax(1)
    target = torch.full((6, 4), 0.1 / 4).scatter(1, y[:, None], 0.9 + 0.1 / 4)
    entropy = -(target * log_p).sum(1).mean()
    loss, hits = training_loss(student, None, x, y, s)
    torch.testing.assert_close(loss, entropy)
    assert int(hits) == int((log_p.argmax(1) == y).sum())
    q, p = (teacher(x) / 2).softmax(1), (student(x) / 2).softmax(1)
    kl = (q * (q / p).log()).sum(1).mean()
    loss, _ = training_loss(student, teacher, x, y, s)
    torch.testing.assert_close(loss, 0.7 * entropy + 0.3 * 4 * kl)
    loss.backward()
    assert teacher.weight.grad is None


def test_a_step_is_no_longer_than_the_clipped_gradient_allows(
    tmp_path: Path, float_run: Path
) -> None:
    start = checkpoint.load(float_run)["model"]
    options = ["recipe.epochs=1", "max_steps=1", "recipe.lr=0.1", "recipe.weight_decay=0"]
    lengths = []
    for clip in ("null", "0.01"):
        words = (f"model.checkpoint={float_run}", "quantizer=fp32", "recipe=qat")
        cfg = tiny(tmp_path / clip, *words, *options, f"recipe.grad_clip={clip}")
        _, folder = train(cfg)
        state = checkpoint.load(folder / "last.pt")["model"]
        learned = [k for k in start if k.endswith(("weight", "bias"))]
        moved = torch.cat([(state[k] - start[k]).flatten() for k in learned])
        lengths.append(float(moved.norm()))
    assert lengths[0] > 0.002
    assert lengths[1] == pytest.approx(0.1 * 0.01, rel=1e-3)


def test_every_parameter_is_in_exactly_one_group(tmp_path: Path, float_run: Path) -> None:
    from qexp.recipes import build

    cfg = tiny(tmp_path, "quantizer=lsq")
    dataset = build.make_dataset(cfg, torch.device("cpu"))
    model = build.make_model(cfg, dataset, torch.device("cpu"))
    build.make_network(cfg, model, dataset.input_shape)
    optimizer = make_optimizer(
        model,
        optimizer="sgd",
        lr=0.1,
        momentum=0.9,
        weight_decay=1e-4,
        quantizer_lr=0.01,
        quantizer_weight_decay=0.0,
    )
    grouped = [id(p) for g in optimizer.param_groups for p in g["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())
    scales = optimizer.param_groups[1]
    assert len(scales["params"]) == 16  # W and A of eight layers
    assert (scales["lr"], scales["weight_decay"]) == (0.01, 0.0)
    assert [g["momentum"] for g in optimizer.param_groups] == [0.9, 0.9]
    assert optimizer.param_groups[0]["weight_decay"] == 1e-4


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["quantizer=pact", "quantizer.act.decay=0.5"], {(0.04, 0.5): 1}),
        (["quantizer=n2uq", "quantizer.act.lr_scale=0.1"], {(0.004, 0.01): 4}),
        (["quantizer=apot_released"], {(0.02, 1e-4): 1, (0.1, 1e-4): 1}),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_quantizer_that_says_how_it_is_trained_has_a_group_of_its_own(
    tmp_path: Path, overrides: list[str], expected: dict[tuple[float, float], int]
) -> None:
    from qexp.recipes import build

    cfg = tiny(tmp_path, *overrides)
    dataset = build.make_dataset(cfg, torch.device("cpu"))
    model = build.make_model(cfg, dataset, torch.device("cpu"))
    layers = build.make_network(cfg, model, dataset.input_shape).layers
    groups = make_optimizer(
        model,
        optimizer="sgd",
        lr=0.1,
        momentum=0.0,
        weight_decay=1e-3,
        quantizer_lr=0.04,
        quantizer_weight_decay=0.01,
    ).param_groups
    inner = sum(x.position == "inner" for x in layers)
    outer = {(0.04, 0.01): 2 * (len(layers) - inner)}  # the recipe's
    told = {(round(g["lr"], 9), g["weight_decay"]): len(g["params"]) for g in groups[1:]}
    assert told == outer | {key: count * inner for key, count in expected.items()}
    assert all(g["peak_lr"] == g["lr"] for g in groups)


@pytest.mark.parametrize("decay", [-0.1, math.inf, math.nan])
def test_a_decay_that_is_none_is_refused(decay: float) -> None:
    with pytest.raises(ValueError, match="decay must be null"):
        PACT(4, decay=decay)


@pytest.mark.parametrize("rate", [-0.1, math.inf, math.nan])
def test_a_rate_that_is_none_is_refused(rate: float) -> None:
    with pytest.raises(ValueError, match="lr_scale must be at least 0 and finite, got"):
        N2UQ(4, lr_scale=rate)


def test_learning_rate_schedules_match_their_definition() -> None:
    def at(step: int, schedule: str, warmup: int = 0) -> float:
        return lr_factor(step, 100, schedule=schedule, warmup=warmup, milestones=(0.5, 0.75))

    assert at(0, "cosine") == 1
    assert at(50, "cosine") == pytest.approx(0.5)
    assert at(99, "cosine") < 0.001
    assert at(25, "linear") == 0.75
    assert [at(s, "step") for s in (49, 50, 75)] == pytest.approx([1, 0.1, 0.01])
    assert at(0, "cosine", warmup=10) == 0.1
    assert at(9, "constant", warmup=10) == 1
    assert at(10, "cosine", warmup=10) == 1
    assert at(55, "cosine", warmup=10) == pytest.approx(0.5)  # what is left after the warm-up
    assert at(55, "linear", warmup=10) == 0.5


def test_weight_average_of_a_constant_is_the_constant() -> None:
    model = torch.nn.Linear(3, 2)
    average = WeightAverage(model, 0.5)
    with torch.no_grad():
        model.weight.add_(1)
    before = average.state["weight"].clone()
    average.update(model)  # first step: decay min(0.5, 1/10)
    assert torch.allclose(average.state["weight"], 0.1 * before + 0.9 * model.weight)
    for _ in range(60):
        average.update(model)
    assert torch.allclose(average.state["weight"], model.weight, atol=1e-6)
    kept = model.weight.detach().clone()
    for keep in (False, True):
        with average.applied(model, keep=keep), torch.no_grad():
            model.weight.zero_()
        assert torch.equal(model.weight, kept)
        assert bool((average.state["weight"] == 0).all()) is keep


def test_weight_average_copies_counters_and_goes_on_from_its_checkpoint() -> None:
    model = torch.nn.BatchNorm1d(2)
    one, other = WeightAverage(model, 0.9), WeightAverage(model, 0.9)
    for k in range(12):
        model(torch.randn(4, 2))
        one.update(model)
        assert one.state["num_batches_tracked"] == k + 1
        if k == 5:
            other.load_state_dict(copy.deepcopy(one.state_dict()))
        elif k > 5:
            other.update(model)
    assert same(one.state_dict(), other.state_dict())
    # The decay of step t is (1 + t) / (10 + t) at first, and `decay` at most.
    weight = one.state["running_mean"].clone()
    one.update(model)
    decay = 13 / 22
    torch.testing.assert_close(
        one.state["running_mean"], decay * weight + (1 - decay) * model.running_mean
    )


def test_momentum_of_parameters_that_stay_is_kept() -> None:
    stays, goes, comes = (torch.nn.Parameter(torch.ones(2)) for _ in range(3))
    old, new = (torch.optim.SGD([stays, other], lr=0.1, momentum=0.9) for other in (goes, comes))
    (stays.sum() + goes.sum()).backward()
    old.step()
    assert set(carry_momentum(old, new).state) == {stays}
    assert torch.equal(new.state[stays]["momentum_buffer"], torch.ones(2))


def test_reestimated_batch_norm_makes_eval_mode_the_forward_pass_it_was_measured_in() -> None:
    torch.manual_seed(0)
    layers = (torch.nn.Conv2d(1, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Hardtanh(-0.1, 0.1))
    model = torch.nn.Sequential(*layers, torch.nn.Conv2d(4, 2, 3), torch.nn.BatchNorm2d(2))
    norms = [model[1], model[4]]
    batches = [(torch.randn(16, 1, 8, 8) + k, torch.zeros(16)) for k in range(4)]
    reestimate_bn_(model, iter(batches), 40)  # three batches reach 40 images
    x = torch.cat([x for x, _ in batches[:3]])
    found = model.eval()(x)
    model.train()
    torch.testing.assert_close(found, model(x), rtol=1e-2, atol=1e-4)  # variance over n, n - 1
    assert all(norm.momentum == 0.1 for norm in norms)


def test_a_split_without_images_is_not_scored() -> None:
    model = torch.nn.Linear(2, 2).train()
    with pytest.raises(ConfigError, match="eval: the split holds no images"):
        evaluate(model, [])
    assert model.training


def test_training_loop_has_no_host_sync_before_its_check(
    tmp_path: Path, float_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[str] = []
    real_epoch = qat_module._train_epoch

    def watched(*args: Any) -> None:
        with monkeypatch.context() as patch, Watch() as watch:
            patch.setattr(qat_module, "check_finite", lambda *_: None)
            real_epoch(*args)
        waits.extend(watch.waits)

    monkeypatch.setattr(qat_module, "_train_epoch", watched)
    options = ("recipe.grad_clip=1.0", "recipe.accumulate=2", "recipe.ema=0.9")
    train(tiny(tmp_path, f"model.checkpoint={float_run}", "recipe.epochs=1", *options))
    assert waits == []


class Masked(torch.nn.Linear):
    mask: torch.Tensor

    def __init__(self) -> None:
        super().__init__(2, 2)
        self.register_buffer("mask", torch.full((2, 2), float("-inf")).triu(1))


def test_a_mask_of_infinities_is_no_divergence(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), Masked())
    qat_module.check_finite(model, torch.ones(3), epoch=1)
    average = WeightAverage(model, 0.9)
    average.update(model)
    assert torch.equal(average.state["1.mask"], model[1].mask)
    torch.save(model.state_dict(), tmp_path / "x.pt")
    load_state(model, tmp_path / "x.pt")
    model[1].mask[0, 0] = float("nan")
    with pytest.raises(RunError, match="layer '1' first"):
        qat_module.check_finite(model, torch.ones(3), epoch=1)
    torch.save(model.state_dict(), tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"NaN or infinite values \(1.mask\)"):
        load_state(model, tmp_path / "x.pt")


def test_a_weight_that_overflows_at_the_last_step_stops_the_run() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    qat_module.check_finite(model, torch.ones(3), epoch=1)  # all is well
    with torch.no_grad():
        model[1].bias[0] = float("inf")
    with pytest.raises(
        RunError,
        match=r"weights are not finite after epoch 2, step 3, layer '1' first; last .* \(epoch 1\)",
    ):
        qat_module.check_finite(model, torch.ones(3), epoch=1)
    model = torch.nn.Linear(2, 2)
    torch.nn.init.constant_(model.bias, float("inf"))
    with pytest.raises(RunError, match="parameter 'bias' first"):
        qat_module.check_finite(model, torch.ones(3), epoch=1)


def test_the_average_is_of_the_weights_after_the_step(tmp_path: Path, float_run: Path) -> None:
    start = checkpoint.load(float_run)["model"]["conv1.weight"]
    options = (f"model.checkpoint={float_run}", "recipe.epochs=1", "recipe.ema=0.9", "max_steps=1")
    _, folder = train(tiny(tmp_path, *options))
    saved = checkpoint.load(folder / "last.pt")
    now = saved["model"]["conv1.weight"]
    assert not torch.equal(now, start)
    average = saved["average"]["state"]["conv1.weight"]  # the first decay is 1/10
    torch.testing.assert_close(average, 0.1 * start + 0.9 * now, rtol=0, atol=1e-7)


def test_momentum_outlives_a_change_of_widths(
    tmp_path: Path, float_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[bool] = []
    real = qat_module._train_epoch

    def spy(forward: Any, model: Any, dataset: Any, optimizer: Any, *given: Any) -> None:
        kept.append(model.conv1.weight in optimizer.state)
        real(forward, model, dataset, optimizer, *given)

    monkeypatch.setattr(qat_module, "_train_epoch", spy)
    stages = "bitwidth.stages=[{until: 1, bits: 8}, {bits: 2}]"
    words = ("bitwidth=progressive", stages, "bits=2", "quantizer=lsq", "recipe.epochs=2")
    train(tiny(tmp_path, f"model.checkpoint={float_run}", *words))
    assert kept == [False, True]
