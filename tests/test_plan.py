"""The cost line of `dry_run`: steps timed on this machine, as the run would take them."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from compose import TINY_PTQ, tiny
from torch import nn

from qexp.quant.convert import Bits, quantize_, quantizers
from qexp.quant.functional import kernels_compiled
from qexp.quant.lsq import LSQ
from qexp.quant.trace import trace
from qexp.recipes import compilation, cost, plan, units
from qexp.recipes.ptq import ptq
from qexp.recipes.qat import qat
from qexp.recipes.settings import Settings
from qexp.runner.memory import Peak
from qexp.runner.run import open_run


def cost_line(tmp_path: Path, *words: str) -> str:
    (line,) = [x for x in plan.plan(tiny(tmp_path, *words)).splitlines() if x.startswith("cost:")]
    return line


def test_cost_is_the_timed_step_times_the_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[int] = []

    def fixed(*step: object) -> tuple[float, float, float]:
        threads.append(torch.get_num_threads())
        return 0.5, 2.0**20, 3 * 2.0**30  # seconds and bytes for an image, bytes for any

    monkeypatch.setattr(cost, "_image_cost", fixed)
    before = torch.get_num_threads()
    line = cost_line(tmp_path, "recipe.epochs=4", "recipe.batch_size=16", "threads=2")
    # 4 epochs of 3 steps of 16 images, and 4 times 32 test images at a third of a step's time
    assert "about 2 min" in line  # 0.5 * (192 + 43) s
    assert f"{1.5 * (3 + 16 / 1024):.2f} GB" in line
    assert "2 img/s" in line
    assert threads == [2]  # those of the run
    assert torch.get_num_threads() == before


def test_what_a_step_keeps_of_its_weights_is_not_multiplied_by_the_batch() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 4096), nn.ReLU(), nn.Linear(4096, 3))
    quantize_(model, trace(model, (3, 4, 4)), {"1": Bits(4, 4), "3": Bits(4, 4)}, LSQ, LSQ)
    for quantizer in quantizers(model).values():
        quantizer.calibrated.fill_(True)
    _, each, fixed = cost._image_cost(model, (3, 4, 4), 8, Settings())
    weights = 4 * (48 * 4096 + 4096 * 3)
    assert weights <= fixed < 1.1 * weights
    _, alike, _ = cost._image_cost(model, (3, 4, 4), 32, Settings())
    assert each == pytest.approx(alike, rel=0.01)


def test_cost_is_measured_on_the_runs_own_network(tmp_path: Path) -> None:
    line = cost_line(tmp_path, "quantizer=asq")
    assert re.match(r"cost: +about [\d.]+ (s|min|h) and \d\.\d\d GB above an idle", line)


def test_a_teachers_pass_is_in_the_cost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "_image_cost", lambda *step: (1.0, 0.0, 0.0))
    words = ("recipe.epochs=1", "recipe.batch_size=16", "recipe.distill.weight=0.5")
    # 48 images and a third more for the teacher; a third of 32 test images
    assert "about 75 s" in cost_line(tmp_path, *words)


def test_the_split_val_and_a_teachers_weights_are_in_the_cost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cost, "_image_cost", lambda *step: (1.0, 0.0, 0.0))
    words = ("recipe.epochs=1", "recipe.batch_size=16", "dataset.val_fraction=0.25")
    assert "about 47 s" in cost_line(tmp_path, *words)  # 32 images; a third of 32 test, 12 val

    def memory(*more: str) -> float:
        (found,) = re.findall(r"([\d.]+) GB", cost_line(tmp_path, *words, "model.width=8", *more))
        return float(found)

    assert memory("recipe.distill.weight=0.5") == pytest.approx(4 / 3 * memory(), abs=0.01)


def test_the_step_is_timed_with_the_runs_arithmetic_and_kernels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Settings, bool]] = []

    def spy(model: nn.Module, shape: object, batch: int, s: Settings) -> tuple[float, ...]:
        seen.append((s, kernels_compiled()))
        assert {type(q).__name__ for q in quantizers(model).values()} == {"ASQ", "POST", "LSQ"}
        return 1.0, 0.0, 0.0

    monkeypatch.setattr(cost, "_image_cost", spy)
    monkeypatch.setattr(cost, "compiler_available", lambda device: (True, "g++"))
    words = ("recipe.amp=true", "recipe.channels_last=true", "compile=kernels")
    assert "with compiled kernels" in cost_line(tmp_path, *words)
    assert "eagerly" in cost_line(tmp_path, "compile=off")
    (first, compiled), (second, eager) = seen
    assert (first.amp, first.channels_last, compiled) == (True, True, True)
    assert (second.amp, second.channels_last, eager) == (False, False, False)
    assert not kernels_compiled()  # as before


def test_the_plan_compiles_what_the_run_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def spy(mode: str, layers: object, images: int, device: object) -> str:
        asked.append(images)
        return "off"

    monkeypatch.setattr(cost, "choose", spy)
    monkeypatch.setattr(compilation, "choose", spy)
    cfg = tiny(tmp_path, "recipe.epochs=2", "model.checkpoint=none", "compile=auto")
    plan.plan(cfg)
    with open_run(Path(cfg.folder), cfg, resume=False) as run:
        run.finish(qat(cfg, run))
    assert asked == [2 * 48, 2 * 48]


def test_the_cost_s_memory_follows_saved_and_accumulate(tmp_path: Path) -> None:
    def gigabytes(*words: str) -> float:
        line = cost_line(tmp_path, "model.width=1", "dataset.image_size=32", *words)
        return float(line.split(" GB")[0].split()[-1])

    words = ("recipe.batch_size=48", "dataset.train_images=96")
    whole = gigabytes(*words)
    assert gigabytes(*words, "saved=inputs") < 0.85 * whole
    assert gigabytes(*words, "recipe.accumulate=4") < 0.4 * whole


def test_cost_of_reconstruction_counts_every_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cost, "_image_cost", lambda *step: (1.0, 0.0, 0.0))
    words = ("quantizer=brecq", "recipe.iterations=20", "recipe.step_iterations=10")
    text = plan.plan(tiny(tmp_path, *words, base=TINY_PTQ))
    # ResNet-8: a first layer, three blocks, a last layer; the outer two have no rounding to learn
    assert "3 units, 20 iterations each (rounding); then 5 units, 10 iterations each (what" in text
    # (20 + 10) * 8 images; a third of 3 + 5 units of 24 + 16 images, and of twice 32 test images
    assert "about 6 min" in text  # 240 + 128 s
    text = plan.plan(tiny(tmp_path, "quantizer=nearest", base=TINY_PTQ))
    assert "learning: none" in text
    assert "about 21 s" in text  # two evaluations


# Units whose inputs and outputs are most of what the run takes.
LARGE = ("quantizer=qdrop", "model.width=1", "dataset.image_size=32", "dataset.train_images=520",
         "recipe.images=320", "recipe.iterations=2", "recipe.held_out=64")  # fmt: skip


def gigabytes(line: str, what: str) -> float:
    return float(line.split(f" GB {what}")[0].split()[-1])


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux starts its mark anew")
def test_the_memory_of_a_reconstruction_is_about_that_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class NoPeak:
        """Units leave the process's mark to the test."""

        def __init__(self, device: object) -> None: ...
        def rise(self) -> None: ...

    def run(*words: str) -> str:
        cfg = tiny(tmp_path, *words, base=TINY_PTQ)
        with open_run(Path(cfg.folder), cfg, resume=False) as run:
            run.finish(ptq(cfg, run))
        return plan.plan(cfg)

    monkeypatch.setattr(units, "Peak", NoPeak)
    run("quantizer=qdrop")  # what is loaded once
    peak = Peak(torch.device("cpu"))
    text = run(*LARGE)
    rise = peak.rise()
    if rise is None:
        pytest.skip("this system does not start its mark anew")
    assert rise / 2.5 < gigabytes(text, "above") * 2**30 < rise * 2.5


def test_what_a_plan_keeps_on_disk_is_not_in_its_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cost, "_image_cost", lambda *step: (1.0, 0.0, 0.0))
    recorded = 3 * 16 * 32 * 32 * 4 * 384 / 2**30  # a block's inputs and output
    whole = plan.plan(tiny(tmp_path, *LARGE, base=TINY_PTQ))
    spilled = plan.plan(tiny(tmp_path, *LARGE, "recipe.cache_gb=0", base=TINY_PTQ))
    assert "on disk" not in whole
    assert gigabytes(spilled, "on disk") == pytest.approx(recorded, abs=0.006)
    kept = gigabytes(whole, "above") - gigabytes(spilled, "above")
    assert kept == pytest.approx(recorded, abs=0.011)  # printed with two digits


def test_a_post_training_plan_has_the_sizes_of_the_run(tmp_path: Path) -> None:
    cfg = tiny(tmp_path, "quantizer=nearest", base=TINY_PTQ)
    text = plan.plan(cfg)
    with open_run(Path(cfg.folder), cfg, resume=False) as run:
        result = ptq(cfg, run)
        run.finish(result)
    assert f"{result['size_bytes']:,} bytes packed" in text  # batch norms are folded in both
    assert f"float's {result['fp32_bytes']:,}" in text


def test_a_plan_of_widths_that_change_shows_the_last_and_names_the_stages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cost, "_image_cost", lambda *step: (1.0, 0.0, 0.0))
    words = ("bitwidth=progressive", "bits=2", "recipe.epochs=10")
    text = plan.plan(tiny(tmp_path, *words))
    assert "bits:     weights 2 by parameter" in text
    assert "stages:   weight bits 8 in epoch 1, 4 in epochs 2 to 4, 2 in epochs 5 to 10;" in text


@pytest.mark.parametrize(
    ("words", "networks"),
    [
        ("recipe.momentum=0.9", 3),  # weights, gradients, momentum
        ("recipe.momentum=0", 2),
        ("recipe.optimizer=adamw", 4),
        ("recipe.ema=0.9 recipe.distill.weight=0.5", 5),
    ],
)
def test_training_holds_weights_gradients_and_what_its_options_add(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, words: str, networks: int
) -> None:
    monkeypatch.setattr(cost, "_timed", lambda *given: cost.Timed(1.0, 0.0, 0.0, "cpu"))
    large = nn.Linear(30_000, 30_000, device="meta")
    card = SimpleNamespace(train_size=48, test_size=32, val_size=0, input_shape=(3, 8, 8))
    cfg = tiny(tmp_path, *words.split())
    line = cost.training(cfg, card, large, [])[1]  # type: ignore[arg-type]
    assert f"{networks * 4 * 30_000 * 30_001 / 2**30:.2f} GB" in line


def test_durations_are_in_the_unit_that_reads_best() -> None:
    found = [cost._duration(s) for s in (89, 120, 5399, 5400, 36_000)]
    assert found == ["89 s", "2 min", "90 min", "1.5 h", "10.0 h"]
