"""The post-training recipe: its methods, its checkpoints, its result."""

from __future__ import annotations

import copy
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from compose import TINY_PTQ
from compose import tiny as compose_tiny
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf, open_dict

from qexp import config, schema
from qexp.errors import ConfigError, RunError
from qexp.models.resnet import ResNet
from qexp.quant.convert import Bits, quant_layers, quantize_
from qexp.quant.fold import fold_bn_
from qexp.quant.nearest import Nearest
from qexp.quant.trace import trace
from qexp.recipes import build, outcome
from qexp.recipes import ptq as ptq_module
from qexp.recipes import units as units_module
from qexp.recipes.evaluate import evaluate_run
from qexp.recipes.ptq import ptq
from qexp.recipes.ptq_settings import Settings
from qexp.runner import checkpoint
from qexp.runner.answers import ANSWERS, read_right
from qexp.runner.run import open_run

METHODS = ("nearest", "adaround", "brecq", "qdrop", "aquant")


def composed(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(config.configs_dir()), version_base="1.3"):
        return compose("train", overrides=list(overrides))


def tiny(out: Path, *overrides: str) -> DictConfig:
    return compose_tiny(out, *overrides, base=TINY_PTQ)


def quantized(cfg: DictConfig, *, resume: bool = False) -> tuple[dict[str, Any], Path]:
    with open_run(Path(cfg.folder), cfg, resume=resume) as run:
        result = ptq(cfg, run)
        run.finish(result)
    return result, run.dir


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_and_its_checkpoint_gives_its_top1_again(
    tmp_path: Path, method: str
) -> None:
    result, folder = quantized(tiny(tmp_path, f"quantizer={method}", "bits=3"))
    written = json.loads((folder / "result.json").read_text())
    assert written["method"] == method
    assert written["recipe"] == "ptq"
    assert written["w_bits"] == written["a_bits"] == 3
    assert 0 <= written["top1"] <= 100
    units = written["reconstruction"]["units"]
    learned = {"nearest": 0, "adaround": 6, "brecq": 8, "qdrop": 5, "aquant": 5}[method]
    assert len(units) == learned
    for unit in units:
        assert unit["wall_s"] > 0
        assert "rise_bytes" in unit
        assert math.isfinite(unit["error"])
    node = {"run": str(folder), "checkpoint": "last.pt", "split": "test", "device": "cpu"}
    assert evaluate_run(DictConfig(node))["top1"] == result["top1"]
    right, _ = read_right(folder / ANSWERS) or pytest.fail("no answers")
    assert 100 * right.mean() == pytest.approx(result["top1"])


@pytest.mark.parametrize(
    ("method", "at"), [("brecq", 3), ("aquant", 3), ("aquant_twice", 9), ("aquant_twice", 10)]
)
def test_a_run_stopped_between_units_resumes_bit_for_bit(
    tmp_path: Path, method: str, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (f"quantizer={method}", "quantizer.reconstruct.network=true", "bits=2")
    _, whole = quantized(tiny(tmp_path / "whole", *words))
    stopped = tiny(tmp_path / "stopped", *words)
    real, saves = checkpoint.save, []

    def save_twice_then_stop(path: Path, state: dict[str, Any]) -> None:
        real(path, state)
        saves.append(path)
        if len(saves) == at:
            raise KeyboardInterrupt

    monkeypatch.setattr(ptq_module.checkpoint, "save", save_twice_then_stop)
    with pytest.raises(KeyboardInterrupt):
        quantized(stopped)
    monkeypatch.setattr(ptq_module.checkpoint, "save", real)
    result, folder = quantized(stopped, resume=True)
    a, b = checkpoint.load(whole / "last.pt"), checkpoint.load(folder / "last.pt")
    assert a["model"].keys() == b["model"].keys()
    assert all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"])
    assert same(a["units"], b["units"])
    assert a["units"][-1]["unit"] == "network"
    assert result["top1"] == json.loads((whole / "result.json").read_text())["top1"]


def same(a: Any, b: Any) -> bool:
    """Whether two checkpoints hold the same, but for the costs of their units."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        costs = {"wall_s", "rise_bytes"}
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a.keys() - costs)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.mark.parametrize("method", ["nearest", "adaround", "qdrop"])
def test_a_run_stopped_before_its_result_does_not_correct_twice(
    tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (f"quantizer={method}", "bits=2", "quantizer.reconstruct.bias_correction=true")
    whole, folder = quantized(tiny(tmp_path / "whole", *words))
    stopped = tiny(tmp_path / "stopped", *words)

    def stop(*given: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(outcome, "protocol", stop)
        with pytest.raises(KeyboardInterrupt):
            quantized(stopped)
    saved = checkpoint.load(Path(stopped.folder) / "last.pt")
    resumed, place = quantized(stopped, resume=True)
    assert same(checkpoint.load(place / "last.pt"), saved)
    assert same(saved, checkpoint.load(folder / "last.pt"))
    assert len(whole["reconstruction"]["bias_shifts"]) == 8
    for key in ("top1", "health", "protocol_hash"):
        assert resumed[key] == whole[key]
    for key in ("bias_shifts", "fold_error", "worse_than_start"):
        assert resumed["reconstruction"][key] == whole["reconstruction"][key]


def test_a_resume_does_not_go_on_from_another_float_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "w.pt"
    torch.manual_seed(1)
    torch.save(ResNet(8, 4, width=0.25).state_dict(), path)
    mine = path.read_bytes()
    words = ("quantizer=brecq", f"model.checkpoint={path}")
    _, whole = quantized(tiny(tmp_path / "whole", *words))
    cfg = tiny(tmp_path, *words)
    real = checkpoint.save

    def save_then_stop(place: Path, state: dict[str, Any]) -> None:
        real(place, state)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", save_then_stop)
        with pytest.raises(KeyboardInterrupt):
            quantized(cfg)
    torch.manual_seed(2)
    torch.save(ResNet(8, 4, width=0.25).state_dict(), path)
    with pytest.raises(ConfigError, match=r"w\.pt is no longer the file this run began with"):
        quantized(cfg, resume=True)
    path.write_bytes(mine)
    _, folder = quantized(cfg, resume=True)
    assert same(checkpoint.load(folder / "last.pt"), checkpoint.load(whole / "last.pt"))


def test_saved_float_network_rounds_to_the_learned_codes(tmp_path: Path) -> None:
    cfg = tiny(tmp_path, "quantizer=qdrop", "bits=2", "recipe.iterations=20")
    _, folder = quantized(cfg)
    state = checkpoint.load(folder / "last.pt")
    model, dataset, _ = build.load_run(folder, "last.pt", "cpu")
    plain = build.make_model(cfg, dataset, torch.device("cpu"))
    fold_bn_(plain)
    plain.load_state_dict(state["float"])  # strict: the folded network's own names
    codes_moved = 0
    for name, layer in quant_layers(model).items():
        codes = layer.weight_quantizer.codes(layer.weight)
        u = plain.get_parameter(f"{name}.weight") / layer.weight_quantizer.scale
        q = layer.weight_quantizer
        nearest = ((u + 0.5).floor() + q.zero).clamp(q.qmin, q.qmax)
        assert torch.equal(nearest.int(), codes)
        codes_moved += int((plain.get_parameter(f"{name}.weight") != layer.weight).sum())
    assert codes_moved > 0


def test_bias_correction_and_the_fisher_weights_are_options_of_any_method(tmp_path: Path) -> None:
    options = ("quantizer.reconstruct.bias_correction=true", "quantizer.reconstruct.fisher=true")
    result, _ = quantized(tiny(tmp_path, "quantizer=qdrop", *options))
    assert len(result["reconstruction"]["bias_shifts"]) == 8  # every layer
    assert result["reconstruction"]["method"]["bias_correction"] is True


@pytest.mark.parametrize("inputs", ["quantized", "float"])
def test_biases_are_corrected_for_quantized_or_for_float_inputs(
    tmp_path: Path, inputs: str
) -> None:
    seen = []

    def spy(model: torch.nn.Module, *args: Any) -> dict[str, float]:
        seen.append({(la.weight_enabled, la.act_enabled) for la in quant_layers(model).values()})
        return {}

    words = ("quantizer=nearest", "quantizer.reconstruct.bias_correction=true")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ptq_module, "correct_bias_", spy)
        quantized(tiny(tmp_path, *words, f"quantizer.reconstruct.correction_inputs={inputs}"))
    assert seen == [{(True, inputs == "quantized")}]


def test_augmented_calibration_images_are_another_protocol(tmp_path: Path) -> None:
    plain, _ = quantized(tiny(tmp_path / "a", "quantizer=nearest"))
    other, _ = quantized(tiny(tmp_path / "b", "quantizer=nearest", "recipe.augment=true"))
    assert other["protocol"] == {**plain["protocol"], "augment": True}
    assert "augment" not in plain["protocol"]
    assert other["protocol_hash"] != plain["protocol_hash"]


def test_the_rounding_of_the_first_and_last_layer_is_learned_when_asked(tmp_path: Path) -> None:
    learned = {}
    for outer in ("nearest", "adaround"):
        words = ("quantizer=qdrop", "bits=2", f"quantizer/outer={outer}")
        result, _ = quantized(tiny(tmp_path / outer, *words))
        units = {unit["unit"]: unit for unit in result["reconstruction"]["units"]}
        learned[outer] = [units[name]["converged"] is not None for name in ("conv1", "linear")]
    assert learned == {"nearest": [False, False], "adaround": [True, True]}


@pytest.mark.parametrize("late", ["borders", "steps"])
def test_a_second_pass_keeps_what_the_first_has_learned(tmp_path: Path, late: str) -> None:
    words = ("quantizer=aquant", f"quantizer.reconstruct.{late}=after", "recipe.step_lr=0")
    rates = dict.fromkeys(("rounding", "scale", "border", "mixing"), 0.01)
    cfg = tiny(tmp_path, *words, *(f"recipe.lr.{k}={v}" for k, v in rates.items()))
    seen: list[dict[str, torch.Tensor]] = []
    real = units_module.reconstruct_unit

    def spy(model: torch.nn.Module, *args: Any, **more: Any) -> dict[str, Any]:
        seen.append({k: v.clone() for k, v in model.state_dict().items()})
        return real(model, *args, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(units_module, "reconstruct_unit", spy)
        quantized(cfg)
    first, second = seen[1], seen[5]  # after one unit; before the second pass
    own = ".scale" if late == "borders" else ".border"
    learned = [k for k in first if k.endswith(f"act_quantizer{own}") and "layer1.0" in k]
    assert learned
    after_first = seen[2]
    assert all(torch.equal(after_first[k], second[k]) for k in learned)
    assert any(not torch.equal(first[k], second[k]) for k in learned)


def test_what_a_reconstruction_cannot_learn_of_an_input_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("quantizer=qdrop", "quantizer/act=pact", "bits=4")
    quantized(tiny(tmp_path, *words))
    assert "'alpha' of the inputs' quantizers stays as calibrated" in capsys.readouterr().err
    for k, more in enumerate(("+recipe.lr.alpha=0.01", "quantizer.reconstruct.borders=fixed")):
        quantized(tiny(tmp_path / str(k), *words, more))
        assert "stays as calibrated" not in capsys.readouterr().err


def test_what_a_module_inside_an_input_quantizer_has_is_learned_by_its_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("quantizer=qdrop", "quantizer/act=asq", "bits=4")
    quantized(tiny(tmp_path, *words))
    assert "Add +recipe.lr.adapter=0.001 to learn it" in capsys.readouterr().err
    states = []
    for rate in (0.0, 0.01):
        _, folder = quantized(tiny(tmp_path / str(rate), *words, f"+recipe.lr.adapter={rate}"))
        assert "adapter" not in capsys.readouterr().err
        states.append(torch.load(folder / "last.pt", weights_only=True)["model"])
    inside = [name for name in states[0] if ".adapter." in name and name.startswith("layer1")]
    assert inside
    assert any(not torch.equal(states[0][name], states[1][name]) for name in inside)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ("quantizer=qdrop", "quantizer.reconstruct.borders=both"),
            "'steps': no unit has any of b",
        ),
        (
            ("quantizer=adaround", "quantizer/weight=nearest"),
            "'rounding': no unit has any of round",
        ),
    ],
)
def test_a_pass_without_anything_to_learn_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], said: str
) -> None:
    quantized(tiny(tmp_path, *words, "bits=3"))
    assert f"nothing is learned in the pass {said}" in capsys.readouterr().err


@pytest.mark.parametrize("seed", [20261121123456, 2**63 - 1])
def test_every_seed_that_a_config_takes_reconstructs(tmp_path: Path, seed: int) -> None:
    result, _ = quantized(tiny(tmp_path, "quantizer=qdrop", f"seed={seed}"))
    assert result["seed"] == seed


def test_a_unit_is_told_before_it_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill between the two may tell a unit twice, never not at all."""
    told: list[int] = []

    def save(path: Path, content: dict[str, Any]) -> None:
        events = (path.parent / "metrics.jsonl").read_text().splitlines()
        told.append(sum(json.loads(line)["event"] == "unit" for line in events))
        assert told[-1] == sum(bool(row) for row in content["units"])
        kept(path, content)

    kept = checkpoint.save
    monkeypatch.setattr(checkpoint, "save", save)
    quantized(tiny(tmp_path, "quantizer=qdrop"))
    assert told[-1] > 1


def test_a_reconstruction_that_diverges_fails_instead_of_scoring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Settings, "check", lambda s: None)  # a rate that it would refuse
    cfg = tiny(tmp_path, "quantizer=aquant", "recipe.lr.border=1e38")
    with pytest.raises(RunError, match=r"unit '[\w.]+' diverged"):
        quantized(cfg)
    assert json.loads((Path(cfg.folder) / "status.json").read_text())["state"] == "failed"


def test_a_folding_that_changes_the_network_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ptq_module, "fold_bn_", lambda model: model.linear.bias.data.add_(1))
    with pytest.raises(RunError, match=r"folding batch norms changed the logits by .* of the larg"):
        quantized(tiny(tmp_path, "quantizer=nearest"))


def test_a_layer_with_a_forward_of_its_own_is_refused() -> None:
    class Same(torch.nn.Conv2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(torch.nn.functional.pad(x, (0, 1, 0, 1)))

    model = torch.nn.Sequential(Same(3, 4, 3), torch.nn.ReLU(), torch.nn.Conv2d(4, 4, 3))
    layers = trace(model, (3, 8, 8))
    with pytest.raises(ConfigError, match=r"layer '0' is a Same with a forward of its own"):
        quantize_(model, layers, {"0": Bits(4, 4)}, Nearest, Nearest)


def test_a_units_learning_is_traced_and_drawn(tmp_path: Path) -> None:
    more = ("quantizer=brecq", "recipe.iterations=30", "recipe.plots=true")
    result, folder = quantized(tiny(tmp_path, *more))
    events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    units = [event for event in events if event["event"] == "unit"]
    for unit in units:
        parts = 20 if unit["pass"] == "rounding" else 3  # at most one an iteration
        assert len(unit["trace"]["loss"]) == parts
        if unit["converged"] is None:
            assert unit["trace"]["decided"] == []
        else:
            assert len(unit["trace"]["decided"]) == parts
            assert unit["trace"]["decided"][-1] == unit["converged"]
    assert all("trace" not in unit for unit in result["reconstruction"]["units"])
    for name in ("reconstruction.png", "rounding.png", "weights.png", "activations.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")


def test_progress_numbers_the_units_that_learn(tmp_path: Path) -> None:
    cfg = tiny(tmp_path, "quantizer=brecq", "bitwidth.first_last=8", "max_steps=2")
    result, folder = quantized(cfg)
    total = len(result["reconstruction"]["units"])
    assert total == 3 + 5  # the rounding of the blocks, then the steps of every unit
    said = re.findall(r"unit (\d+)/(\d+) ", (folder / "train.log").read_text())
    assert [(int(place), int(of)) for place, of in said] == [(n + 1, 8) for n in range(8)]


def test_biases_are_learned_only_when_asked(tmp_path: Path) -> None:
    moved = {}
    for rate in (0.0, 0.01):
        cfg = tiny(tmp_path / str(rate), "quantizer=qdrop", f"quantizer.reconstruct.bias_lr={rate}")
        _, folder = quantized(cfg)
        moved[rate] = checkpoint.load(folder / "last.pt")["float"]
    biases = [name for name in moved[0.0] if name.endswith(".bias")]
    assert len(biases) == 8
    assert all(not torch.equal(moved[0.0][name], moved[0.01][name]) for name in biases)


def test_max_steps_cuts_every_unit(tmp_path: Path) -> None:
    result, _ = quantized(tiny(tmp_path, "quantizer=qdrop", "max_steps=2"))
    assert {u["iterations"] for u in result["reconstruction"]["units"]} == {2}


# ---------------------------------------------------------------------------------------------
# Configs


@pytest.mark.parametrize("method", METHODS)
def test_a_ptq_method_selects_its_recipe_and_passes_the_check(method: str) -> None:
    cfg = composed(f"quantizer={method}")
    assert cfg.recipe._target_ == "qexp.recipes.ptq.ptq"
    assert cfg.recipe.iterations == 20000
    config.check(cfg, schema.Train)


def test_the_users_recipe_wins_over_the_methods() -> None:
    assert composed("quantizer=qdrop", "recipe=ptq_quick").recipe.name == "ptq_quick"
    assert composed("quantizer=nearest", "recipe=qat").recipe.name == "qat"


def test_an_experiment_may_choose_another_recipe_than_its_method() -> None:
    cfg = composed("experiment=ptq_cifar10_quick")
    assert (cfg.recipe.name, cfg.quantizer.name) == ("ptq_quick", "qdrop")
    cfg = composed("experiment=ptq_cifar10_quick", "quantizer=aquant")
    assert (cfg.recipe.name, cfg.quantizer.name) == ("ptq_quick", "aquant")


LADDER = {
    "c0": ("nearest.Nearest", {}, {"bias_correction": False}),
    "c1": ("nearest.Nearest", {}, {"bias_correction": True}),
    "c1_learned": ("nearest.Nearest", {}, {"bias_lr": 3e-3}),
    "c2": ("aquant.AQuant", {"border": "constant", "per": "channel"}, {"borders": "joint"}),
    "c3": ("aquant.AQuant", {"border": "linear", "init": "closed_form"}, {"borders": "fixed"}),
    "c4": ("aquant.AQuant", {"border": "linear", "per": "row"}, {"borders": "joint"}),
    "c5": ("aquant.AQuant", {"border": "quadratic", "fusion": "none"}, {"borders": "joint"}),
    "c6_window": ("aquant.AQuant", {"fusion": "window"}, {"borders": "joint"}),
    "c6_residual": ("aquant.AQuant", {"fusion": "residual"}, {"borders": "joint"}),
    "c7_channel": ("aquant.AQuant", {"per": "channel"}, {"borders": "joint"}),
    "c7_tensor": ("aquant.AQuant", {"per": "tensor"}, {"borders": "joint"}),
    "c8": ("aquant.AQuant", {"per": "row"}, {"steps": "fixed", "borders": "joint"}),
    "c9": ("aquant.AQuant", {"border": "quadratic", "per": "row"}, {"borders": "both"}),
}


@pytest.mark.parametrize("rung", LADDER)
def test_every_rung_of_the_ladder_is_what_its_name_says(rung: str) -> None:
    act, own, method = LADDER[rung]
    cfg = composed(f"experiment=ptq_ladder_{rung}")
    assert cfg.quantizer.act._target_ == f"qexp.quant.{act}"
    assert own.items() <= cfg.quantizer.act.items()
    assert method.items() <= cfg.quantizer.reconstruct.items()
    assert cfg.recipe._target_ == "qexp.recipes.ptq.ptq"
    assert cfg.quantizer.reconstruct.drop == 0.5


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("recipe.iterations=0", "recipe.iterations=0 is out of range"),
        ("recipe.act_images=2000", "recipe.act_images=2000 is out of range"),
        ("+recipe.epochs=3", "no key 'recipe.epochs'"),
        ("quantizer.reconstruct.granularity=net", "granularity must be one of"),
        ("+quantizer.reconstruct.dropp=0.5", "Did you mean 'drop'"),
        ("quantizer.act.per=pixel", "quantizer.act.per must be one of"),
    ],
)
def test_a_wrong_value_is_refused_before_anything_is_built(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config.check(composed("quantizer=aquant", override), schema.Train)


@pytest.mark.slow
@pytest.mark.timeout(1800)  # the search for the grids of 11 million weights
@pytest.mark.parametrize("model", ["resnet18", "mobilenet_v2"])
@pytest.mark.parametrize("method", ["qdrop", "aquant"])
def test_imagenet_networks_run_through_on_the_cpu(tmp_path: Path, model: str, method: str) -> None:
    small = [o for o in TINY_PTQ if not o.startswith(("dataset.", "model."))]
    cfg = composed(
        *small,
        f"model={model}",
        "model.checkpoint=null",
        f"quantizer={method}",
        "dataset.image_size=224",
        "dataset.train_images=40",
        "dataset.test_images=8",
        "recipe.minibatch=2",
        "recipe.iterations=2",
        "recipe.images=8",
        "recipe.act_images=4",
        "recipe.held_out=4",
        "recipe.batch_size=4",
        "recipe.cache_gb=0.02",
        f"out={tmp_path}",
    )
    with open_dict(cfg):
        cfg.folder = str(tmp_path / "run")
    result, _ = quantized(OmegaConf.create(OmegaConf.to_container(cfg, resolve=True)))  # type: ignore[arg-type]
    units = result["reconstruction"]["units"]
    assert len(units) >= 8
    assert any(u["spilled_bytes"] > 0 for u in units)
    assert (result["reconstruction"]["rise_bytes"] or 0) < 6e9


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux starts its mark anew")
def test_each_units_memory_is_its_own(tmp_path: Path) -> None:
    size = ("dataset.image_size=32", "model.width=1", "dataset.train_images=480")
    cfg = tiny(tmp_path, "quantizer=qdrop", *size, "recipe.images=448", "recipe.iterations=2")
    result, _ = quantized(cfg)
    units = {row["unit"]: row for row in result["reconstruction"]["units"]}
    first, last = units["layer1.0"], units["layer3.0"]
    assert first["rise_bytes"] >= first["cache_bytes"] > 2 * last["cache_bytes"]
    assert last["cache_bytes"] <= last["rise_bytes"] < 0.8 * first["rise_bytes"]
    assert result["reconstruction"]["rise_bytes"] == max(u["rise_bytes"] for u in units.values())


def test_arrays_go_to_disk_before_they_take_the_free_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = []
    for free in (None, 10**12, 100_000):
        monkeypatch.setattr(units_module, "free_bytes", lambda device, free=free: free)
        result, folder = quantized(tiny(tmp_path / str(free), "quantizer=qdrop"))
        rows = result["reconstruction"]["units"]
        kept = max(row["cache_bytes"] - row["spilled_bytes"] for row in rows)
        found.append((kept, checkpoint.load(folder / "last.pt")["model"]))
        assert ("GB on disk" in capsys.readouterr().out) == (free == 100_000)
    assert found[0][0] == found[1][0] > 50_000
    assert 0 < found[2][0] <= 50_000  # half of what is free
    assert same(found[0][1], found[2][1])


def test_the_runs_time_left_is_known_within_its_first_unit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[tuple[str, str]] = []

    class Bar:
        disable = False

        def __init__(self, *, desc: str, **more: Any) -> None:
            self.name = desc

        def set_postfix_str(self, text: str, refresh: bool) -> None:
            said.append((self.name, text))

        def update(self) -> None: ...
        def close(self) -> None: ...

    monkeypatch.setattr(units_module, "tqdm", Bar)
    quantized(tiny(tmp_path, "quantizer=qdrop"))
    assert said[0] == ("conv1", "")
    assert all(re.fullmatch(r"run eta \d+:\d\d", text) for name, text in said[1:4])


def test_the_time_left_is_from_this_units_pace_and_the_work_ahead(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 100.0
    monkeypatch.setattr(units_module.time, "perf_counter", lambda: now)
    clock = units_module.Clock([50, 10, 20, 5, 5], first=1)
    clock.begin(1)
    now += 6  # recording
    assert clock.tick(0, 5) is None
    now += 1
    assert clock.tick(1, 5) == 3 + 30 * 10 / 10  # ten seconds for ten; thirty are ahead
    now += 3
    clock.end(learned=True)
    assert clock.left() == 30
    clock.begin(2)
    now += 20
    assert clock.tick(0, 5) is None
    now += 10
    assert clock.tick(1, 5) == 30 + 10 * (10 + 60) / (10 + 20)
    now += 30
    clock.end(learned=True)
    clock.begin(3)
    clock.end(learned=False)
    assert clock.left() == pytest.approx(5 * 70 / 30)


def test_a_method_without_units_has_no_peak_of_them(tmp_path: Path) -> None:
    assert quantized(tiny(tmp_path, "quantizer=nearest"))[0]["reconstruction"]["rise_bytes"] is None


def test_widths_that_change_while_training_are_refused(tmp_path: Path) -> None:
    cfg = tiny(tmp_path, "quantizer=qdrop", "bitwidth=progressive", "model.checkpoint=none")
    with pytest.raises(ConfigError, match="bitwidth=progressive changes widths while training"):
        quantized(cfg)


class NormFirst(torch.nn.Sequential):
    """DenseNet's order: each batch norm before its convolution."""

    def __init__(self, num_classes: int) -> None:
        kinds = (torch.nn.BatchNorm2d(3), torch.nn.Conv2d(3, 3, 1), torch.nn.ReLU())
        stages = [copy.deepcopy(module) for _ in range(6) for module in kinds]
        last = torch.nn.Linear(3, num_classes)
        super().__init__(*stages, torch.nn.MaxPool2d(8), torch.nn.Flatten(), last)


def test_batch_norms_that_stay_are_one_line_a_reason(tmp_path: Path) -> None:
    cfg = tiny(tmp_path, "quantizer=nearest")
    with open_dict(cfg):
        cfg.model = {"name": "own", "_target_": "test_ptq.NormFirst", "checkpoint": None}
    _, folder = quantized(cfg)
    log = (folder / "train.log").read_text()
    assert "folded 0 of 6 batch norms" in log
    assert log.count("its input is not a convolution") == 1
    assert "6 of 6 batch norms not folded (its input is not a convolution): 0, " in log


@pytest.mark.parametrize("method", ["adaround", "brecq", "qdrop"])
def test_input_steps_are_calibrated_again_once_the_weights_are_learned(
    tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    later: list[list[str]] = []
    real, again = units_module.reconstruct_unit, units_module.Work._calibrate_inputs

    def spy(model: torch.nn.Module, reference: Any, unit: Any, *given: Any, **more: Any) -> Any:
        done.append(given[1].name)
        names = list(quant_layers(model))
        last = max(names.index(name) for name in unit.layers)
        later.append(more["later"])
        assert more["later"] == names[last + 1 :]
        return real(model, reference, unit, *given, **more)

    def calibrated(work: Any, model: torch.nn.Module) -> None:
        done.append("inputs")
        again(work, model)

    monkeypatch.setattr(units_module, "reconstruct_unit", spy)
    monkeypatch.setattr(units_module.Work, "_calibrate_inputs", calibrated)
    quantized(tiny(tmp_path, f"quantizer={method}", "max_steps=1"))
    first = ["rounding"] * (8 if method == "adaround" else 5)
    then = {"adaround": ["inputs"], "brecq": ["inputs", *["steps"] * 5], "qdrop": []}[method]
    assert done == [*first, *then]
    assert later[len(first) - 1] == []


@pytest.mark.parametrize("on", ["float", "prefix"])
def test_steps_are_calibrated_on_float_inputs_or_on_the_quantized_prefix(
    tmp_path: Path, on: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    real = ptq_module.calibrate_

    def spy(model: torch.nn.Module, *given: Any) -> list[str]:
        seen.append({(m.weight_enabled, m.act_enabled) for m in quant_layers(model).values()})
        return real(model, *given)

    monkeypatch.setattr(ptq_module, "calibrate_", spy)
    quantized(tiny(tmp_path, "quantizer=nearest", f"recipe.calibrate_on={on}"))
    assert seen == [{(on == "prefix", on == "prefix")}]


def test_units_that_end_worse_than_they_began_are_named() -> None:
    errors = {"a": (0.2, 0.1), "b": (0.1, 0.2), "c": (0.1, 0.1)}
    rows = [
        {"unit": name, "error_before": before, "error": after, "wall_s": 1.0}
        for name, (before, after) in errors.items()
    ]
    assert units_module.summary([*rows, {}], 0.0, {})["worse_than_start"] == ["b"]
