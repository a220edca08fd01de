"""The cost line of `dry_run`: steps timed on this machine, as the run would take them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from compose import tiny

from qexp.recipes import plan


def cost_line(tmp_path: Path, *words: str) -> str:
    (line,) = [x for x in plan.plan(tiny(tmp_path, *words)).splitlines() if x.startswith("cost:")]
    return line


def test_cost_is_the_timed_step_times_the_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[int] = []

    def fixed(model: object, shape: tuple[int, ...], batch: int) -> tuple[float, float]:
        threads.append(torch.get_num_threads())
        return 0.5, 2.0**20  # seconds and bytes for an image

    monkeypatch.setattr(plan, "_image_cost", fixed)
    before = torch.get_num_threads()
    line = cost_line(tmp_path, "recipe.epochs=4", "recipe.batch_size=16", "threads=2")
    # 4 epochs of 3 steps of 16 images, and 4 times 32 test images at a third of a step's time
    assert "about 2 min" in line  # 0.5 * (192 + 43) s
    assert f"{1.5 * 16 / 1024:.2f} GB" in line
    assert "2 img/s" in line
    assert threads == [2]  # those of the run
    assert torch.get_num_threads() == before


def test_cost_is_measured_on_the_runs_own_network(tmp_path: Path) -> None:
    line = cost_line(tmp_path, "quantizer=asq")
    assert re.match(r"cost: +about [\d.]+ (s|min|h) and \d\.\d\d GB above an idle", line)
