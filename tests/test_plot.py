"""Figures: every function writes a readable picture from rows, arrays or tensors."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from qexp import plot
from qexp.figure import array

PNG = b"\x89PNG"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "figure.png"


def _weights(name: str, bits: int, per_channel: bool) -> plot.WeightPlot:
    w = torch.randn(4, 30)
    levels = torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1)) * 0.5
    levels = levels * torch.rand(4, 1) if per_channel else levels
    return plot.WeightPlot(name, w, w * 1.1, levels, levels * 1.1, bits)


def test_curves_draw_runs_with_and_without_optional_columns(out: Path) -> None:
    plot.curves([{"epoch": 1, "loss": 2.0, "top1": 30.0, "lr": 0.1, "val_top1": None}], out)
    assert out.read_bytes().startswith(PNG)
    plot.curves([{"epoch": e, "loss": 1 / e} for e in (1, 2, 3)], out, title="no accuracy yet")
    assert out.read_bytes().startswith(PNG)


@pytest.mark.parametrize("per_channel", [False, True])
def test_weight_levels_draw_two_and_eight_bit_grids(out: Path, per_channel: bool) -> None:
    plot.weight_levels([_weights("a", 2, per_channel), _weights("b", 8, per_channel)], out)
    assert out.read_bytes().startswith(PNG)


def test_activation_thresholds_accept_a_constant_and_a_sparse_input(out: Path) -> None:
    levels = np.arange(4) * 0.5
    borders = (levels[1:] + levels[:-1]) / 2
    items = [
        plot.ActivationPlot("relu", torch.randn(200).relu(), borders, levels, 2),
        plot.ActivationPlot("constant", np.zeros(50), borders, levels, 2),
    ]
    plot.activation_thresholds(items, out)
    assert out.read_bytes().startswith(PNG)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_a_diverged_or_dead_layer_still_has_a_picture(out: Path, value: float) -> None:
    w, levels = torch.full((4, 9), value), torch.full((3,), value)
    plot.weight_levels([plot.WeightPlot("w", w, w, levels, levels, 2)], out)
    plot.activation_thresholds([plot.ActivationPlot("a", w, levels[1:], levels, 2)], out)
    plot.factors([plot.FactorPlot("f", w)], out)
    assert out.read_bytes().startswith(PNG)


def test_factor_codebook_and_sensitivity_figures_are_written(out: Path) -> None:
    plot.factors([plot.FactorPlot("conv1", 1 + 0.1 * torch.randn(50))], out)
    assert out.read_bytes().startswith(PNG)
    plot.codebook_trajectories([plot.TrajectoryPlot("c", [0, 1], [[-1, 0, 1], [-2, 0, 2]])], out)
    assert out.read_bytes().startswith(PNG)
    rows = [{"name": "a", "w_bits": "2.32", "a_bits": "3", "sensitivity": "0.1"},
            {"name": "b", "w_bits": "32", "a_bits": "32", "sensitivity": ""}]  # fmt: skip
    plot.sensitivity(rows, out)
    assert out.read_bytes().startswith(PNG)


def test_a_deep_network_shows_evenly_spaced_layers_with_both_ends() -> None:
    shown = plot._evenly(list(range(57)))
    assert len(shown) == plot.MAX_PANELS
    assert (shown[0], shown[-1]) == (0, 56)


def test_array_reads_bfloat16_tensors_that_need_gradients() -> None:
    x = torch.ones(3, dtype=torch.bfloat16, requires_grad=True)
    assert array(x).tolist() == [1.0, 1.0, 1.0]


def test_importing_plot_loads_neither_torch_nor_matplotlib() -> None:
    code = "import qexp.plot, sys; print([m for m in ('torch', 'matplotlib') if m in sys.modules])"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert answer.stdout.strip() == "[]", answer.stderr
