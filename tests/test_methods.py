"""Every method through the runner: it composes, trains, learns, and stays within its bits."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from compose import tiny
from omegaconf import OmegaConf
from torch import nn

from qexp.config import configs_dir
from qexp.quant.convert import Bits, calibrate_, quantize_, quantizers
from qexp.quant.trace import trace
from qexp.recipes import build
from qexp.recipes.qat import qat
from qexp.report.shipped import shipped
from qexp.runner.run import open_run


def trained_methods() -> list[str]:
    """Quantizers whose recipe is training, from the configs themselves."""
    names = sorted(p.stem for p in (configs_dir() / "quantizer").glob("*.yaml"))
    trained = (n for n in names if "quantizer.reconstruct.granularity" not in shipped(n))
    return [n for n in trained if "quantizer.weight._target_" in shipped(n)]  # fp32 has none


METHODS = trained_methods()
HARD = "dataset.noise=96"  # the float network must leave something to learn
# Its name says that it holds 2^b + 1 levels.
OVERFULL = {"post_released"}


@pytest.fixture(scope="module")
def float_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("float")
    cfg = tiny(out, "quantizer=fp32", "recipe.epochs=4", "recipe.batch_size=16", HARD)
    cfg.recipe.plots = False
    with open_run(Path(cfg.folder), cfg) as run:
        run.finish(qat(cfg, run))
    return run.dir / "last.pt"


def test_the_methods_are_found() -> None:
    assert {"lsq", "lsqplus"} <= set(METHODS)
    assert {"lsq", "adaround", "none"} <= set(WEIGHTS)
    assert {"lsq", "aquant", "none"} <= set(ACTS)


@pytest.mark.parametrize("method", METHODS)
def test_method_learns_within_its_bits(tmp_path: Path, float_run: Path, method: str) -> None:
    cfg = tiny(
        tmp_path, f"quantizer={method}", "bits=3", f"model.checkpoint={float_run}",
        "recipe.epochs=8", HARD,
    )  # fmt: skip
    with open_run(Path(cfg.folder), cfg) as run:
        result = qat(cfg, run)
        run.finish(result)
    losses = [row["loss"] for row in _epochs(run.dir)]
    assert min(losses[-2:]) < losses[0], f"the loss did not fall: {losses}"
    rows = list(csv.DictReader((run.dir / "layers.csv").read_text().splitlines()))
    for row in rows:
        levels, bits = int(row["levels_used"]), float(row["w_bits"])
        assert levels <= 2 ** math.ceil(bits), row
        if method not in OVERFULL:
            assert bits in (3, 8), row
    assert result["size_bytes"] < result["fp32_bytes"]


def _epochs(folder: Path) -> list[dict[str, float]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if r["event"] == "epoch"]


def quantizer_nodes(role: str) -> dict[str, Any]:
    """Every configs/quantizer/<role>/*.yaml by its name, read."""
    folder = configs_dir() / "quantizer" / role
    return {path.stem: OmegaConf.load(path) for path in sorted(folder.glob("*.yaml"))}


WEIGHTS, ACTS = quantizer_nodes("weight"), quantizer_nodes("act")


def three_layers() -> nn.Sequential:
    """Convolutions of signed and of unsigned inputs, and a linear layer."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Conv2d(4, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Flatten(), nn.Linear(54, 5),
    )  # fmt: skip


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("weight", WEIGHTS)
def test_any_weight_quantizer_goes_with_any_input_quantizer(weight: str, act: str) -> None:
    # Those of post-training methods too: their borders and roundings learn wherever they stand.
    torch.manual_seed(0)
    model, x = three_layers(), torch.randn(6, 3, 8, 8)
    cfg = {"quantizer": {"weight": WEIGHTS[weight], "act": ACTS[act]}, "bitwidth": {}}
    layers = trace(model, (3, 8, 8))
    bits = {layer.name: Bits(4, 4) for layer in layers}
    quantize_(model, layers, bits, **build.factories(OmegaConf.create(cfg)))
    calibrate_(model, x)
    made = quantizers(model)
    assert len(made) == 3 * (weight != "none") + 3 * (act != "none")
    assert all(q.bits == 4 and bool(q.calibrated) for q in made.values())
    y = model.train()(x)
    y.square().sum().backward()
    assert y.isfinite().all()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    assert model[0].weight.grad.any()  # through all quantizers there are
    with torch.no_grad():
        assert model.eval()(x).isfinite().all()


def test_progressive_bits_end_at_the_last_stage(tmp_path: Path, float_run: Path) -> None:
    cfg = tiny(
        tmp_path, "bits=2", "bitwidth=progressive", f"model.checkpoint={float_run}",
        "recipe.epochs=8",
    )  # fmt: skip
    with open_run(Path(cfg.folder), cfg) as run:
        result = qat(cfg, run)
        run.finish(result)
    assert result["bits"]["weight_by_param"] == 2
    assert [row["bits"] for row in _epochs(run.dir)] == [8, 4, 4, 2, 2, 2, 2, 2]


def test_sensitivity_stays_in_its_budget_and_reports_three_averages(
    tmp_path: Path, float_run: Path
) -> None:
    saved = tmp_path / "bits.yaml"
    options = [f"model.checkpoint={float_run}", "recipe.epochs=1"]
    policy = [
        "bitwidth=sensitivity",
        "bitwidth.budget=3",
        "bitwidth.probes=2",
        "bitwidth.images=16",
    ]
    cfg = tiny(tmp_path / "a", *options, *policy, f"bitwidth.save={saved}")
    with open_run(Path(cfg.folder), cfg) as run:
        first = qat(cfg, run)
        run.finish(first)
    assert first["bits"]["weight_by_param"] <= 3
    assert {"weight_by_layer", "weight_with_outer", "act_by_layer"} <= first["bits"].keys()
    again = tiny(tmp_path / "b", *options, "bitwidth=pattern", f"bitwidth.file={saved}")
    with open_run(Path(again.folder), again) as run:
        second = qat(again, run)
        run.finish(second)
    assert second["bits"] == first["bits"]


def test_a_trained_run_is_restored_without_calibrating(tmp_path: Path, float_run: Path) -> None:
    cfg = tiny(tmp_path, "quantizer=lsq", f"model.checkpoint={float_run}", "recipe.epochs=1")
    with open_run(Path(cfg.folder), cfg) as run:
        run.finish(qat(cfg, run))
    model, dataset, _ = build.load_run(run.dir, "last.pt", "cpu")
    saved = torch.load(run.dir / "last.pt", weights_only=True)["model"]
    assert all(torch.equal(v, saved[k]) for k, v in model.state_dict().items())
    model.eval()(next(iter(dataset.eval_batches("test")))[0])
    assert all(torch.equal(v, saved[k]) for k, v in model.state_dict().items())
