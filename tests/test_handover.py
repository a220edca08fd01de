"""Training that starts from a post-training run."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compose import TINY, tiny
from hydra.utils import get_method
from omegaconf import DictConfig

from qexp.errors import CheckpointError, ConfigError
from qexp.quant.asq import ASQ
from qexp.quant.convert import quant_layers
from qexp.quant.nearest import Nearest
from qexp.quant.power import APoT
from qexp.recipes import build
from qexp.recipes.evaluate import evaluate_run
from qexp.recipes.handover import _copy, _fits
from qexp.recipes.start import _top1
from qexp.runner import checkpoint
from qexp.runner.run import open_run

PTQ = (
    "recipe.images=24",
    "recipe.act_images=16",
    "recipe.held_out=16",
    "recipe.minibatch=8",
    "recipe.iterations=12",
    "recipe.lr.rounding=0.3",
)
# A rate that moves no float32 weight.
STILL = ("recipe=qat", "recipe.epochs=1", "recipe.lr=1e-15", "recipe.weight_decay=0")
ONLY_QAT = ("recipe.calibration_images",)


def done(cfg: DictConfig, *, resume: bool = False) -> tuple[dict[str, Any], Path]:
    with open_run(Path(cfg.folder), cfg, resume=resume) as run:
        result = get_method(cfg.recipe._target_)(cfg, run)
        run.finish(result)
    return result, run.dir


@pytest.fixture(scope="module")
def ptq_runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A finished run of QDrop and of AQuant from one trained float network."""
    out = tmp_path_factory.mktemp("ptq")
    _, start = done(tiny(out / "fp32", "quantizer=fp32", "recipe=float", "recipe.epochs=2"))
    return {method: post_trained(out / method, method, start) for method in ("qdrop", "aquant")}


def post_trained(out: Path, method: str, start: Path, *more: str) -> Path:
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    from qexp.config import configs_dir

    common = [o for o in TINY if not o.startswith(ONLY_QAT)]
    own = [f"quantizer={method}", "bits=2", f"model.checkpoint={start}/last.pt", *PTQ, *more]
    with initialize_config_dir(str(configs_dir()), version_base="1.3"):
        cfg = compose("train", overrides=[*common, *own, f"out={out}", f"folder={out}/run"])
    plain = OmegaConf.create(OmegaConf.to_container(cfg, resolve=True))
    assert isinstance(plain, DictConfig)
    return done(plain)[1]


def logits(folder: Path) -> torch.Tensor:
    model, dataset, _ = build.load_run(folder, "last.pt", "cpu")
    with torch.no_grad():
        return torch.cat([model.eval()(x) for x, _ in dataset.eval_batches("test")])


def test_a_start_without_batch_norm_is_trained_with_care_or_warned_of(
    tmp_path: Path, ptq_runs: dict[str, Path]
) -> None:
    start = f"model.checkpoint={ptq_runs['qdrop']}"
    own = ("quantizer=nearest", "bits=2", "recipe.epochs=2", start)
    _, folder = done(tiny(tmp_path / "plain", "recipe=qat", *own))
    assert "Use recipe=qat_after_ptq" in (folder / "train.log").read_text()
    cfg = tiny(tmp_path / "after", "recipe=qat_after_ptq", *own)
    assert cfg.recipe.grad_clip == 1.0
    result, folder = done(cfg)
    assert "recipe=qat_after_ptq" not in (folder / "train.log").read_text()
    assert result["protocol"]["grad_clip"] == 1.0
    assert result["protocol"]["start"] == "post-training run"
    losses = [line["loss"] for line in events(folder, "epoch")]
    assert losses[1] < losses[0]


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["event"] == kind]


@pytest.mark.parametrize("quantizer", ["nearest", "qdrop"])
def test_training_starts_as_the_post_training_run_ended_bit_for_bit(
    tmp_path: Path, ptq_runs: dict[str, Path], quantizer: str
) -> None:
    before = ptq_runs["qdrop"]
    cfg = tiny(tmp_path, f"quantizer={quantizer}", *STILL, f"model.checkpoint={before}", "bits=2")
    result, folder = done(cfg)
    assert torch.equal(logits(folder), logits(before))
    start = checkpoint.load(before / "last.pt")["start"]
    assert result["fp32_top1"] == start["top1"] is not None
    log = (folder / "train.log").read_text()
    assert "16 quantizers take over the state" in log
    assert "may fall to chance" not in log  # at this rate
    node = {"run": str(folder), "checkpoint": "best.pt", "split": "test", "device": "cpu"}
    assert evaluate_run(DictConfig(node))["top1"] == result["top1"]


def test_borders_are_trained_on_from_where_they_were(
    tmp_path: Path, ptq_runs: dict[str, Path]
) -> None:
    before = ptq_runs["aquant"]
    start = f"model.checkpoint={before}/last.pt"
    _, still = done(tiny(tmp_path / "still", "quantizer=aquant", *STILL, start, "bits=2"))
    assert torch.equal(logits(still), logits(before))
    trained = ("recipe=qat", "recipe.epochs=1", "recipe.lr=0.05")
    _, folder = done(tiny(tmp_path / "on", "quantizer=aquant", *trained, start, "bits=2"))
    a, b = (
        checkpoint.load(before / "last.pt")["model"],
        checkpoint.load(folder / "last.pt")["model"],
    )
    borders = [k for k in a if k.endswith(".border")]
    assert borders
    assert all(not torch.equal(a[k], b[k]) for k in borders)


@pytest.mark.parametrize(("quantizer", "bits"), [("lsq", 2), ("nearest", 3)])
def test_another_kind_or_width_is_calibrated_anew_and_told(
    tmp_path: Path, ptq_runs: dict[str, Path], quantizer: str, bits: int
) -> None:
    start = f"model.checkpoint={ptq_runs['qdrop']}"
    _, folder = done(tiny(tmp_path, f"quantizer={quantizer}", *STILL, start, f"bits={bits}"))
    kept = {"lsq": 0, "nearest": 4}[quantizer]  # first and last layer keep 8 bit
    line = f"{kept} quantizers take over the state of the post-training run; {16 - kept} of"
    assert line in (folder / "train.log").read_text()
    model, _, _ = build.load_run(folder, "last.pt", "cpu")
    assert all(bool(layer.weight_quantizer.calibrated) for layer in quant_layers(model).values())


def test_a_grid_of_other_options_is_calibrated_anew(
    tmp_path: Path, ptq_runs: dict[str, Path]
) -> None:
    start = f"model.checkpoint={ptq_runs['qdrop']}/last.pt"
    words = ("quantizer=nearest", "bits=2", *STILL, start)
    parts = ("quantizer.act", "quantizer.weight", "quantizer.outer.act", "quantizer.outer.weight")
    _, folder = done(tiny(tmp_path / "symmetric", *words, *(f"{p}.symmetric=true" for p in parts)))
    model, _, _ = build.load_run(folder, "last.pt", "cpu")
    for layer in quant_layers(model).values():
        for quantizer in (layer.weight_quantizer, layer.act_quantizer):
            assert not quantizer.zero.any()
    assert (
        " of another kind, width or grid are calibrated anew" in (folder / "train.log").read_text()
    )


def test_a_step_for_each_channel_takes_nothing_over_from_one_for_all() -> None:
    w = torch.randn(4, 3, 3, 3)
    one, each = Nearest(4, shape=w.shape), Nearest(4, shape=w.shape, per_channel=True)
    one.calibrate(w)
    for into, of in ((one, each), (each, one)):
        before = copy.deepcopy(into.state_dict())
        assert not _copy(into, of.state_dict(), w)
        assert all(torch.equal(into.state_dict()[k], v) for k, v in before.items())
    again = Nearest(4, shape=w.shape)
    assert _copy(again, one.state_dict(), w)
    assert torch.equal(again.scale, one.scale)


def test_a_float_network_is_scored_anew_on_other_images(tmp_path: Path) -> None:
    model = torch.nn.Identity()
    x = torch.eye(4)

    class Images:
        def __init__(self, right: int) -> None:
            self.labels = torch.tensor([i if i < right else (i + 1) % 4 for i in range(4)])

        def eval_batches(self, split: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
            return [(x, self.labels)]

    cfgs = [tiny(tmp_path, f"dataset.test_images={n}") for n in (16, 24)]
    found = [_top1(cfg, model, "x", Images(2 + i)) for i, cfg in enumerate(cfgs)]
    assert found == [50.0, 75.0]
    assert _top1(cfgs[0], model, "x", Images(4)) == 50.0  # once for all jobs of a sweep


@pytest.mark.parametrize("additive", [True, False])
def test_levels_that_are_constants_are_those_of_the_options(
    tmp_path: Path, ptq_runs: dict[str, Path], additive: bool
) -> None:
    float_start = ptq_runs["qdrop"].parents[1] / "fp32" / "run"
    before = post_trained(tmp_path / "apot", "apot", float_start, "recipe=ptq", "bits=4")
    start = f"model.checkpoint={before}/last.pt"
    more = (f"quantizer.weight.additive={additive}", "bits=4", *STILL, start)
    _, folder = done(tiny(tmp_path / "on", "quantizer=apot", *more))
    model, _, _ = build.load_run(folder, "last.pt", "cpu")
    grid = model.get_submodule("layer1.0.conv1.weight_quantizer").grid
    fresh = APoT(4, shape=(4, 4, 3, 3), additive=additive).grid
    assert torch.equal(grid, fresh)
    old = checkpoint.load(before / "last.pt")["model"]["layer1.0.conv1.weight_quantizer.grid"]
    assert torch.equal(old, fresh) == additive


def test_training_from_a_post_training_run_resumes_bit_for_bit(
    tmp_path: Path, ptq_runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    common = ("quantizer=nearest", "recipe=qat", "recipe.epochs=2", "bits=2")
    start = f"model.checkpoint={ptq_runs['qdrop']}"
    _, whole = done(tiny(tmp_path / "whole", *common, start))
    stopped = tiny(tmp_path / "stopped", *common, start)
    real = checkpoint.save

    def save_then_stop(path: Path, state: dict[str, Any]) -> None:
        real(path, state)
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save", save_then_stop)
    with pytest.raises(KeyboardInterrupt):
        done(stopped)
    monkeypatch.setattr(checkpoint, "save", real)
    _, folder = done(stopped, resume=True)
    a, b = (checkpoint.load(run / "last.pt")["model"] for run in (whole, folder))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_an_adapter_is_not_taken_over_by_another_kind_of_factor() -> None:
    def asq(**own: Any) -> ASQ:
        return ASQ(4, signed=False, shape=(8, 3, 3), **own)

    assert _fits(asq(), asq().kind)
    for own in ({"factor": "softplus"}, {"factor": "exp"}, {"dequantize": "plain"}):
        assert asq().state_dict().keys() == asq(**own).state_dict().keys()  # nothing else tells
        assert not _fits(asq(**own), asq().kind)


def test_what_cannot_be_a_start_is_refused(tmp_path: Path, ptq_runs: dict[str, Path]) -> None:
    run = ptq_runs["qdrop"]
    with pytest.raises(ConfigError, match="itself a post-training run"):
        post_trained(tmp_path / "again", "qdrop", run)
    distilled = ("recipe=qat", "recipe.distill.weight=0.5", f"model.checkpoint={run}")
    with pytest.raises(ConfigError, match="keeps no float network"):
        done(tiny(tmp_path / "distilled", "quantizer=nearest", *distilled))
    state = checkpoint.load(run / "last.pt")
    del state["float"]
    checkpoint.save(tmp_path / "part.pt", state)
    part = ("recipe=qat", f"model.checkpoint={tmp_path}/part.pt")
    with pytest.raises(CheckpointError, match="has not finished"):
        done(tiny(tmp_path / "part", "quantizer=nearest", *part))
    with pytest.raises(CheckpointError, match="does not fit the model"):
        done(
            tiny(
                tmp_path / "wide",
                "quantizer=nearest",
                *STILL,
                f"model.checkpoint={run}",
                "model.width=0.5",
            )
        )
