"""Figures of the report: fronts, looks, and a layout in which nothing lies over anything else."""

from __future__ import annotations

import io
from typing import Any

import pytest

from qexp.report import plot as report_plot
from qexp.report.html import most_accurate
from qexp.report.plot import MOST, Curve, Point, floor, front, label_front, learning, looks, pareto
from qexp.report.runs import RunRecord
from qexp.report.tables import make_tables

NAMES = [f"method_{i} [quantizer.weight.init=mse, quantizer.act.init=mse]" for i in range(26)]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that are drawn from here on, with their axes."""
    made: list[Any] = []
    panels = report_plot.panels

    def watched(*args: Any, **kwargs: Any) -> Any:
        made.append(panels(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(report_plot, "panels", watched)
    return made


def _points() -> list[Point]:
    return [
        Point(name, f"W{bits}A{bits}", 30.0 * bits + i / 9, 80.0 + 2 * bits - i / 5, 0.2)
        for i, name in enumerate(NAMES)
        for bits in (2, 3, 4)
    ]


def _assert_apart(figure: Any, axes: Any, width: float) -> None:
    """The title above the panels, the legend below them, both inside the figure."""
    figure.draw_without_rendering()
    (legend,) = figure.legends
    box, title = legend.get_window_extent(), figure._suptitle.get_window_extent()
    panel = [axis.get_tightbbox() for axis in axes]
    assert box.y1 <= min(b.y0 for b in panel)
    assert title.y0 >= max(b.y1 for b in panel)
    assert box.y0 >= 0
    assert box.x0 >= 0
    assert box.x1 <= width
    assert title.x1 <= width
    assert all(axis.get_window_extent().height > 150 for axis in axes)  # pixels: not squeezed


def test_the_front_keeps_what_nothing_cheaper_beats() -> None:
    points = [Point("a", "W2A2", 1, 80), Point("b", "W2A2", 1, 82), Point("c", "W3A3", 2, 81),
              Point("d", "W4A4", 3, 90)]  # fmt: skip
    assert [p.name for p in front(points)] == ["b", "d"]


def test_every_name_has_a_look_of_its_own() -> None:
    found = looks(str(i) for i in range(MOST))
    assert len({(look.color, look.line) for look in found.values()}) == MOST + 1  # and float's grey
    assert len({(look.color, look.marker) for look in found.values()}) == MOST + 1
    assert looks(["b", "a"]) == looks(["a", "b", "b"])


def test_legend_and_title_leave_the_panels_of_many_names_free(drawn: list[Any]) -> None:
    out = io.BytesIO()
    title = "cifar10, resnet20: qat, epochs 10, " + ", ".join(f"key_{i} {i}" for i in range(20))
    pareto({"size": _points(), "bits": _points()}, out, title, format="png")
    curves = [Curve(p.name, p.bits, [1, 2, 3], [70, 75, p.top1]) for p in _points()]
    learning(curves, out, title, format="png")
    for figure, axes in drawn:
        _assert_apart(figure, axes, figure.bbox.width)
        assert len(figure.legends[0].get_texts()) == len(NAMES)


def test_labels_of_a_front_do_not_overlap(drawn: list[Any]) -> None:
    near = [Point(f"m{i}", f"W{i}A{i}", 50 + i / 1e3, 80 + i / 1e3) for i in range(2, 9)]
    pareto({"size": [*near, Point("far", "W8A8 policy", 90, 95)]}, io.BytesIO(), format="png")
    ((figure, (axis,)),) = drawn
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in axis.texts]
    assert 2 <= len(boxes) <= 1 + len(report_plot.BESIDE)  # of eight, those that have room
    for i, one in enumerate(boxes):
        assert not any(one.overlaps(other) for other in boxes[:i])


def test_a_few_points_far_below_stand_at_the_border_and_leave_the_others_the_axis(
    drawn: list[Any],
) -> None:
    names = ("adaround", "brecq", "qdrop")
    near = [Point(n, f"W{b}A{b}", 25.0 * b, 80 + 2.5 * b + i) for i, n in enumerate(names)
            for b in (2, 3, 4)]  # fmt: skip
    far = [Point("nearest", "W2A4", 50.0, 18.49, 0.1), Point("nearest", "W2A2", 50.0, 16.79)]
    pareto({"size": [*near, *far]}, io.BytesIO(), format="png")
    ((figure, (axis,)),) = drawn
    low, high = axis.get_ylim()
    tops = [p.top1 for p in near]
    assert high - low < 1.5 * (max(tops) - min(tops))
    assert 18.49 < low < min(tops)
    assert "16.8, 18.5" in [text.get_text() for text in axis.texts]
    assert "hollow" in figure._suptitle.get_text()
    hollow = [line for line in axis.lines if line.get_markerfacecolor() == "white"]
    assert [list(line.get_ydata()) for line in hollow] == [[low], [low]]


def test_the_axis_is_whole_where_many_points_lie_low_or_none_lies_far() -> None:
    even = [Point("a", "W2A2", i, 80.0 + i) for i in range(8)]
    assert floor(even) is None
    assert floor([*even, *(Point("b", "W2A2", i, 10.0) for i in range(8))]) is None
    assert floor(even[:1]) is None
    assert floor([]) is None
    assert floor([*even, Point("b", "W2A2", 1, 10.0)]) == pytest.approx(80 - 0.15 * 7)


def test_a_label_keeps_off_the_marks_of_other_points() -> None:
    figure, (axis,) = report_plot.panels(1)
    axis.plot([0, 1, 2], [0, 1, 2], "o")
    axis.plot([1.1], [1.05], "o")  # where the first place lies
    figure.draw_without_rendering()
    places = ((5, 0, "left"), (-5, 0, "right"))
    report_plot._write(axis, "W2A2", (1, 1), places)
    report_plot._write(axis, "W2A4", (1, 1), places)  # nothing but that is left
    assert [text.get_ha() for text in axis.texts] == ["right", "left"]


def test_a_width_is_labelled_once_at_its_most_accurate_point(drawn: list[Any]) -> None:
    steps = [Point(f"m{i}", "W2A2", 10.0 * i, 80 + i) for i in range(4)]
    pareto({"size": steps}, io.BytesIO(), format="png")
    ((_, (axis,)),) = drawn
    assert [(text.get_text(), text.xy) for text in axis.texts] == [("W2A2", (30.0, 83))]
    assert label_front(axis, []) == ["W2A2"]


def test_seeds_are_one_line_and_a_name_looks_the_same_at_each_width(drawn: list[Any]) -> None:
    curves = [
        Curve(name, bits, [1, 2, 3, 4], [60 + seed, 70, 75, 80 + 2 * seed])
        for name in ("asq", "lsq")
        for bits in ("W2A2", "W4A4")
        for seed in (0, 1)
    ]
    learning(curves, io.BytesIO(), drawn=looks(["adq", "asq", "lsq"]), format="png")
    ((_, axes),) = drawn
    assert [len(axis.lines) for axis in axes] == [2, 2]
    assert list(axes[0].lines[0].get_ydata()) == [60.5, 70, 75, 81]
    colors = [[line.get_color() for line in axis.lines] for axis in axes]
    assert colors[0] == colors[1] == [looks(["adq", "asq", "lsq"])[n].color for n in ("asq", "lsq")]


def test_of_more_names_than_can_be_told_apart_the_most_accurate_are_drawn(tmp_path: Any) -> None:
    runs = []
    for i in range(MOST + 4):
        folder = tmp_path / str(i)
        folder.mkdir()
        runs.append(RunRecord(folder, "done", "", {"method": f"m{i}", "top1": 50.0 + i}, {}))
    (table,) = make_tables(runs, [], by=("dataset",))
    rows, note = most_accurate(table.rows)
    assert note == f" ({MOST} most accurate of {MOST + 4} methods)"
    assert {row.name for row in rows} == {f"m{i}" for i in range(4, MOST + 4)}
    assert most_accurate(rows) == (rows, "")
