"""Figures: every function writes a readable picture from rows, arrays or tensors."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.patches import Polygon, Rectangle

from qexp import plot, plot_ptq
from qexp.figure import BLUE, GREEN, GREY, ORANGE, RED, array

PNG = b"\x89PNG"


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that are drawn from here on, with their axes."""
    made: list[Any] = []
    for module in (plot, plot_ptq):

        def watched(*given: Any, panels: Any = module.panels, **more: Any) -> Any:
            made.append(panels(*given, **more))
            return made[-1]

        monkeypatch.setattr(module, "panels", watched)
    return made


def _lines(axis: Any, color: str) -> list[Any]:
    return [line for line in axis.lines if to_hex(line.get_color()).upper() == color.upper()]


def _end(outline: Any) -> float:
    """Where a histogram that is an outline ends."""
    return max(x for x, height in outline.get_xy() if height > 0)


def _strokes(axis: Any, color: str) -> list[float]:
    """Where short strokes of this colour stand."""
    found = [c for c in axis.collections if to_hex(c.get_color()[0]).upper() == color.upper()]
    return [segment[0][0] for c in found for segment in c.get_segments()]


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
    places = [out.with_name(f"{name}.png") for name in "waf"]
    plot.weight_levels([plot.WeightPlot("w", w, w, levels, levels, 2)], places[0])
    plot.activation_thresholds([plot.ActivationPlot("a", w, levels[1:], levels, 2)], places[1])
    plot.factors([plot.FactorPlot("f", w)], places[2])
    assert all(place.read_bytes().startswith(PNG) for place in places)


def test_curves_are_of_each_split_over_the_epochs(out: Path, drawn: list[Any]) -> None:
    rows = [
        {"epoch": e, "loss": 3.0 / e, "test_loss": 4.0 / e, "train_top1": 10.0 * e,
         "top1": 20.0 * e + 0.126, "lr": 0.1 / e}
        for e in (1, 2)
    ]  # fmt: skip
    plot.curves(rows, out, title="mine")
    ((figure, (loss, top1, rate)),) = drawn
    found = [
        [(line.get_label(), line.get_ydata().tolist()) for line in axis.lines]
        for axis in (loss, top1)
    ]
    assert found == [
        [("train", [3.0, 1.5]), ("test", [4.0, 2.0])],
        [("train", [10.0, 20.0]), ("test", [20.126, 40.126])],
    ]
    assert rate.lines[0].get_ydata().tolist() == [0.1, 0.05]
    assert all(line.get_xdata().tolist() == [1, 2] for line in loss.lines)
    assert top1.get_title() == "top-1, last epoch: 40.13 %"
    assert figure._suptitle.get_text() == "mine"


def test_weights_and_levels_are_drawn_where_they_are(out: Path, drawn: list[Any]) -> None:
    before, after = torch.linspace(-1, 1, 200), torch.linspace(-1, 3, 200)
    few, many = torch.tensor([-0.5, 0.0, 2.0]), torch.linspace(-1, 3, 255)
    items = [
        plot.WeightPlot("a", before, after, few - 0.1, few, 1.585),
        plot.WeightPlot("b", before, after, few, many, 8),
    ]
    plot.weight_levels(items, out)
    ((figure, (a, b)),) = drawn
    assert [axis.get_title() for axis in (a, b)] == ["a, 1.58 bit", "b, 8 bit"]
    assert [line.get_xdata()[0] for line in _lines(a, ORANGE)] == pytest.approx(few.tolist())
    assert _strokes(a, "#000000") == pytest.approx((few - 0.1).tolist())
    assert not _lines(b, ORANGE)  # ticks in their place
    assert _strokes(b, ORANGE) == pytest.approx(many.tolist())
    bars = [p for p in a.patches if isinstance(p, Rectangle) and p.get_height() > 0]
    (outline,) = (p for p in a.patches if isinstance(p, Polygon))
    assert {to_hex(p.get_facecolor()) for p in bars} == {GREY}
    assert max(p.get_x() for p in bars) < 1  # before
    assert _end(outline) == pytest.approx(3, abs=0.1)  # after
    assert to_hex(outline.get_edgecolor()).upper() == BLUE
    assert figure._suptitle.get_text() == "Weights and their levels"


def test_thresholds_are_dashed_between_the_levels(out: Path, drawn: list[Any]) -> None:
    levels = torch.tensor([0.0, 1.0, 2.0, 4.0])
    borders = torch.tensor([0.5, 1.5, 3.0])
    plot.activation_thresholds([plot.ActivationPlot("x", torch.rand(99), borders, levels, 2)], out)
    ((_, (axis,)),) = drawn
    dashed = _lines(axis, RED)
    assert [line.get_xdata()[0] for line in dashed] == borders.tolist()
    assert {line.get_linestyle() for line in dashed} == {"--"}
    (marks,) = _lines(axis, ORANGE)
    assert (marks.get_xdata().tolist(), marks.get_marker()) == (levels.tolist(), "^")
    low, high = axis.get_xlim()
    assert low < 0 < 4 < high  # all levels are in the panel


def test_factors_and_codebooks_are_drawn_as_they_are(out: Path, drawn: list[Any]) -> None:
    plot.factors([plot.FactorPlot("f", [1.0, 2.0, 9.0]), plot.FactorPlot("g", [0.5] * 3)], out)
    assert out.read_bytes().startswith(PNG)
    plot.codebook_trajectories([plot.TrajectoryPlot("c", [0, 1], [[-1, 0, 1], [-2, 0, 2]])], out)
    (_, (boxes,)), (_, (levels,)) = drawn
    assert [line.get_ydata().tolist() for line in _lines(boxes, RED)] == [[2.0] * 2, [0.5] * 2]
    assert [text.get_text() for text in boxes.get_xticklabels()] == ["f", "g"]
    assert [line.get_ydata().tolist() for line in levels.lines] == [[-1, -2], [0, 0], [1, 2]]
    assert levels.get_title() == "c"


def test_sensitivities_stand_above_the_bits_of_their_layers(out: Path, drawn: list[Any]) -> None:
    rows = [{"name": "a", "w_bits": "2.32", "a_bits": "3", "sensitivity": "0.1"},
            {"name": "b", "w_bits": "32", "a_bits": "32", "sensitivity": ""},
            {"name": "c", "w_bits": "4", "a_bits": "4", "sensitivity": "0.0"}]  # fmt: skip
    plot.sensitivity(rows, out)
    assert out.read_bytes().startswith(PNG)
    ((figure, (top, foot)),) = drawn
    (marks,), (none,) = _lines(top, BLUE), _lines(top, RED)
    assert marks.get_ydata()[0] == 0.1
    assert np.isnan(marks.get_ydata()[1:]).all()
    assert none.get_xdata().tolist() == [2]
    assert top.get_ylabel() == "sensitivity (loss), red: 0"
    widths, inputs = ([bar.get_height() for bar in kind] for kind in foot.containers)
    assert (widths, inputs) == ([2.32, 8, 4], [3, 8, 4])
    assert [text.get_text() for text in foot.texts] == ["2.32", "32", "4", "3", "32", "4"]
    assert [text.get_text() for text in foot.get_xticklabels()] == ["a", "b", "c"]
    assert figure._suptitle.get_text() == "Sensitivity and bits\nbars end at 8 bit"


def _unit(name: str, sweep: str, converged: float | None) -> dict[str, Any]:
    trace = {"loss": [4.0, 2.0, 1.0], "decided": [] if converged is None else [0.2, 0.5, 0.9]}
    return {"unit": name, "pass": sweep, "error_before": 0.4, "error": 0.1, "iterations": 30,
            "converged": converged, "trace": trace}  # fmt: skip


def test_a_reconstructions_figures_have_the_numbers_of_its_units(
    tmp_path: Path, drawn: list[Any]
) -> None:
    plot_ptq.draw([_unit("a", "rounding", 0.9), _unit("a", "steps", None)], tmp_path, "mine")
    assert {path.name for path in tmp_path.iterdir()} == {"reconstruction.png", "rounding.png"}
    (first, (top, foot)), (_, (rounding, steps)) = drawn
    assert first._suptitle.get_text() == "mine: error of each unit\non held-out images"
    assert [[bar.get_height() for bar in kind] for kind in top.containers] == [[0.4] * 2, [0.1] * 2]
    assert [bar.get_height() for bar in foot.containers[0]] == [90, 0]
    assert [text.get_text() for text in foot.get_xticklabels()] == ["a", "a (after)"]
    (loss,), (decided,) = _lines(rounding, ORANGE), _lines(rounding, GREEN)
    assert loss.get_ydata().tolist() == [1, 0.5, 0.25]
    assert loss.get_xdata().tolist() == decided.get_xdata().tolist() == [10, 20, 30]
    assert decided.get_ydata().tolist() == [0.2, 0.5, 0.9]
    assert not _lines(steps, GREEN)
    plot_ptq.draw([], tmp_path / "none", "mine")  # a method that learns nothing
    assert len(drawn) == 2


def test_units_of_a_deep_network_are_shown_in_part(
    out: Path, drawn: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plot_ptq, "MAX_PANELS", 3)
    plot_ptq.rounding([_unit(f"u{i}", "rounding", 1.0) for i in range(7)], out)
    ((figure, axes),) = drawn
    assert [axis.get_title() for axis in axes] == ["u0", "u3", "u6"]
    assert figure._suptitle.get_text().endswith("3 of 7 units")


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
