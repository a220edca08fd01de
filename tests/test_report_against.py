"""`qexp report --against`: differences seed by seed, their intervals, and what is not compared."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from qexp.errors import ConfigError
from qexp.report.against import COLUMNS, cells, compare, csv_fields, probability, without_base
from qexp.report.command import main
from qexp.report.differences import Difference, differences
from qexp.report.plot import looks
from qexp.report.rows import Table
from qexp.report.runs import read_runs
from qexp.report.tables import make_tables
from qexp.runner.answers import ANSWERS, read_right, write_answers
from tests.test_report import PROTOCOL, make_run

LSQ = (90.1, 90.7, 90.2)
ASQ = (91.0, 91.2, 90.3)


def table(root: Path, *by: str) -> Table:
    (made,) = make_tables(read_runs([root]), [], by or ("dataset", "model", "protocol"))
    return made


def seeds(
    root: Path, method: str, tops: Sequence[float], *, first: int = 0, bits: int = 4, **more: Any
) -> None:
    for seed, top1 in enumerate(tops, start=first):
        name = f"{method}-w{bits}-s{seed}"
        make_run(root, name, method=method, bits=bits, seed=seed, top1=top1, **more)


def test_differences_are_taken_seed_by_seed_with_students_t_for_pairs(tmp_path: Path) -> None:
    seeds(tmp_path, "lsq", LSQ)
    seeds(tmp_path, "asq", ASQ, size_bytes=216_000)
    (made,) = compare(table(tmp_path), "lsq")
    expected = stats.ttest_rel(ASQ, LSQ)
    low, high = expected.confidence_interval(0.95)
    assert (made.row.name, made.base.name, made.seeds, made.above) == ("asq", "lsq", [0, 1, 2], 3)
    assert made.top1 is not None
    assert made.top1.mean == pytest.approx((0.9 + 0.5 + 0.1) / 3)
    assert made.top1.std == pytest.approx(0.4)
    assert made.p == pytest.approx(expected.pvalue)
    assert made.interval == pytest.approx((low, high))
    assert made.ratio("size_bytes") == pytest.approx(216 / 144)
    assert made.ratio("bops") == 1


def test_only_seeds_that_both_have_count(tmp_path: Path) -> None:
    seeds(tmp_path, "lsq", (90.0, 91.0, 92.0))
    seeds(tmp_path, "asq", (92.5, 92.0, 60.0), first=1)
    seeds(tmp_path, "pact", (95.0,), first=7)
    asq, pact = compare(table(tmp_path), "lsq")
    assert asq.seeds == [1, 2]
    assert asq.top1 is not None
    assert (asq.top1.mean, asq.top1.n, asq.above) == (0.75, 2, 1)
    assert (pact.top1, pact.seeds, pact.p, pact.above) == (None, [], None, 0)


def test_one_seed_or_equal_differences_have_neither_interval_nor_p(tmp_path: Path) -> None:
    seeds(tmp_path, "lsq", LSQ)
    seeds(tmp_path, "asq", (91.0,))
    seeds(tmp_path, "pact", LSQ)
    for made in compare(table(tmp_path), "lsq"):
        assert made.top1 is not None
        assert (made.interval, made.p, made.p_holm) == (None, None, None)


def test_holms_rule_allows_for_all_methods_at_the_same_bits(tmp_path: Path) -> None:
    seeds(tmp_path, "lsq", LSQ)
    seeds(tmp_path, "lsq", LSQ, bits=2)
    seeds(tmp_path, "asq", ASQ, bits=2)
    for i, spread in enumerate((0.01, 0.1, 0.3, 1.0)):
        seeds(tmp_path, f"m{i}", [top1 + 0.4 + spread * s for s, top1 in enumerate(LSQ)])
    every = compare(table(tmp_path), "lsq")
    (other,) = (c for c in every if c.row.bits == "W2A2")
    assert other.p_holm == other.p
    made = sorted((c for c in every if c.row.bits == "W4A4"), key=lambda c: c.p or 1.0)
    p = [c.p for c in made]
    assert all(value is not None for value in p)
    least, second, third, worst = (value or 0.0 for value in p)
    expected = [4 * least]
    expected.append(max(expected[-1], 3 * second))
    expected.append(max(expected[-1], 2 * third))
    expected.append(max(expected[-1], worst))
    assert [c.p_holm for c in made] == pytest.approx([min(1.0, value) for value in expected])


def test_other_widths_protocols_and_unfinished_runs_are_not_compared(tmp_path: Path) -> None:
    seeds(tmp_path, "lsq", LSQ)
    seeds(tmp_path, "asq", ASQ, bits=2)
    seeds(tmp_path, "adq", ASQ)
    make_run(tmp_path, "dead", method="pact", state="failed", error="loss is nan")
    longer = {**PROTOCOL, "epochs": 60}
    seeds(tmp_path, "n2uq", (93.0,), protocol=longer)
    whole = table(tmp_path, "dataset", "model")
    made = compare(whole, "lsq")
    assert [c.row.name for c in made] == ["adq"]
    other = tmp_path / "other"
    seeds(other, "lsq", ASQ, model="resnet56")
    both = table(tmp_path, "dataset")
    (adq,) = (c for c in compare(both, "lsq") if c.row.name == "adq")
    assert adq.base.first.model == "resnet20"
    assert sorted(without_base(whole, "lsq", compare(whole, "lsq"))) == [
        "asq W2A2",
        "n2uq W4A4",
        "pact W4A4",
    ]


def test_a_float_control_stands_beside_all_widths_and_a_start_beside_none(tmp_path: Path) -> None:
    seeds(tmp_path, "lsq", LSQ)
    seeds(tmp_path, "lsq", ASQ, bits=2)
    seeds(tmp_path, "fp32", (91.6, 91.8, 91.7), bits=32)
    made = compare(table(tmp_path), "fp32")
    assert [(c.row.bits, c.base.name) for c in made] == [("W4A4", "fp32"), ("W2A2", "fp32")]
    start = tmp_path / "start"
    seeds(start, "lsq", LSQ)
    seeds(start, "fp32", (92.0,), bits=32, protocol={**PROTOCOL, "from_scratch": True})
    assert compare(table(start), "fp32") == []


def test_a_run_without_protocol_or_config_is_no_base_and_in_no_comparison(tmp_path: Path) -> None:
    seeds(tmp_path, "lsq", LSQ)
    seeds(tmp_path, "asq", ASQ)
    lost = make_run(tmp_path, "lost", quantizer={"weight": {"per_channel": True}}, seed=7)
    (lost / "config.yaml").unlink()
    unknown = make_run(tmp_path, "unknown", method="adq")
    told = json.loads((unknown / "result.json").read_text())
    (unknown / "result.json").write_text(json.dumps({**told, "protocol": {}, "protocol_hash": ""}))
    made = compare(table(tmp_path, "dataset", "model"), "lsq")
    assert [(c.row.name, c.base.counted[0].seed) for c in made if c.seeds] == [("asq", 0)]
    assert "adq" not in {c.row.name for c in made}


def test_differences_that_are_all_the_same_have_neither_interval_nor_p(tmp_path: Path) -> None:
    seeds(tmp_path, "lsq", (88.0, 88.1, 88.2))
    seeds(tmp_path, "asq", (88.1, 88.2, 88.3))  # 0.1 each, but for the last bit of a float
    seeds(tmp_path, "adq", (88.0, 88.1, 88.2))
    first, second = compare(table(tmp_path), "lsq")
    assert {first.row.name: first.above, second.row.name: second.above} == {"asq": 3, "adq": 0}
    for made in (first, second):
        assert (made.interval, made.p, made.p_holm) == (None, None, None)


def answer(folder: Path, right: np.ndarray, labels: np.ndarray) -> None:
    write_answers(folder / ANSWERS, np.where(right, labels, labels + 1), labels)


def test_the_deviation_over_images_is_mcnemars_of_one_seed_and_falls_with_more(
    tmp_path: Path,
) -> None:
    draw = np.random.default_rng(0)
    labels = draw.integers(0, 10, 2000)
    tops: dict[str, list[np.ndarray]] = {"lsq": [], "asq": []}
    for seed in range(3):
        for method, share in (("lsq", 0.90), ("asq", 0.92)):
            right = draw.random(2000) < share
            tops[method].append(right)
            name = f"{method}-{seed}"
            folder = make_run(
                tmp_path, name, method=method, seed=seed, top1=100 * float(right.mean())
            )
            answer(folder, right, labels)
    (made,) = compare(table(tmp_path), "lsq")
    apart = np.mean([a.astype(int) - b for a, b in zip(tops["asq"], tops["lsq"], strict=True)], 0)
    assert made.over_images == pytest.approx(100 * apart.std(ddof=1) / 2000**0.5)
    assert made.top1 is not None
    assert made.top1.mean == pytest.approx(100 * apart.mean())
    (tmp_path / "lsq-0" / ANSWERS).unlink()  # of two seeds then
    two = np.mean(
        [a.astype(int) - b for a, b in zip(tops["asq"], tops["lsq"], strict=True)][1:], axis=0
    )
    assert made.answered == made.seeds
    (made,) = compare(table(tmp_path), "lsq")
    assert made.over_images == pytest.approx(100 * two.std(ddof=1) / 2000**0.5)
    assert made.seeds == [0, 1, 2]
    assert made.answered == [1, 2]
    assert cells(made)[COLUMNS.index("over images")].endswith(" of 1 2")
    one = tmp_path / "one"
    for method in ("lsq", "asq"):
        top1 = 100 * float(tops[method][0].mean())
        answer(make_run(one, method, method=method, top1=top1), tops[method][0], labels)
    (single,) = compare(table(one), "lsq")
    ours, theirs = tops["asq"][0], tops["lsq"][0]
    only, other = int((ours & ~theirs).sum()), int((theirs & ~ours).sum())
    q, d = (only + other) / 2000, (only - other) / 2000
    assert single.over_images == pytest.approx(100 * ((q - d * d) / 1999) ** 0.5)


def test_answers_that_are_missing_or_of_other_images_or_another_top1_are_not_used(
    tmp_path: Path,
) -> None:
    labels = np.arange(100) % 10
    right = np.arange(100) >= 9  # 91 %
    base = make_run(tmp_path, "lsq", method="lsq")
    ours = make_run(tmp_path, "asq", method="asq")

    def over_images() -> float | None:
        (made,) = compare(table(tmp_path), "lsq")
        return made.over_images

    answer(base, right, labels)
    assert over_images() is None  # of the other none
    answer(ours, np.roll(right, 3), labels)
    assert over_images() == pytest.approx(100 * (6 / 99) ** 0.5 / 10)
    answer(ours, np.roll(right, 3), labels[::-1])
    assert over_images() is None
    answer(ours, np.arange(100) >= 8, labels)  # 92 %, and result.json says 91
    assert over_images() is None
    (ours / ANSWERS).write_bytes((base / ANSWERS).read_bytes()[:100])
    assert read_right(ours / ANSWERS) is None
    assert over_images() is None


def test_answers_take_a_byte_each_and_are_replaced_whole(tmp_path: Path) -> None:
    labels = np.arange(300) % 300
    write_answers(tmp_path / ANSWERS, labels % 10, labels % 10)
    with np.load(tmp_path / ANSWERS) as file:
        assert (file["predicted"].dtype, file["label"].dtype) == (np.uint8, np.uint8)
    write_answers(tmp_path / ANSWERS, labels, labels[::-1])
    with np.load(tmp_path / ANSWERS) as file:
        assert file["label"].dtype == np.uint16
        assert (file["predicted"] == labels).all()


def test_each_form_shows_them_and_the_csv_is_as_before_without(tmp_path, capsys) -> None:
    seeds(tmp_path, "lsq", LSQ)
    seeds(tmp_path, "asq", ASQ)
    assert main([str(tmp_path), "--against", "lsq"]) == 0
    text = capsys.readouterr().out
    assert "### Against lsq" in text
    line = next(line for line in text.splitlines() if "0 1 2" in line)
    assert line.startswith("| asq | W4A4 | +0.50 ± 0.40 | -0.49 to +1.49 | 0.16 | 0.16 | 3 of 3 |")
    assert main([str(tmp_path), "--against", "lsq", "--format", "csv"]) == 0
    with_base = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert main([str(tmp_path), "--format", "csv"]) == 0
    without = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert without == [{k: row[k] for k in without[0]} for row in with_base]
    asq, lsq = sorted(with_base, key=lambda row: row["method"])
    assert float(asq["against_difference"]) == pytest.approx(0.5)
    assert (asq["against"], asq["against_seeds"], asq["against_above"]) == ("lsq", "0 1 2", "3")
    assert {v for k, v in lsq.items() if k.startswith("against")} == {""}
    out = tmp_path / "page.html"
    assert main([str(tmp_path), "--against", "lsq", "--out", str(out)]) == 0
    page = out.read_text()
    assert "<h3>Against lsq</h3>" in page
    assert "top-1 over lsq" in page  # the figure's name
    assert "+0.50 ± 0.40" in page


def test_an_unknown_base_is_named_with_what_there_is(tmp_path: Path) -> None:
    seeds(tmp_path, "lsq", LSQ)
    with pytest.raises(ConfigError, match=r"no finished row is called 'lqs'.*Did you mean 'lsq'"):
        main([str(tmp_path), "--against", "lqs"])


def test_a_row_far_below_stands_at_the_border_and_leaves_the_others_the_axis(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.figure import Figure

    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: drawn.append(self))
    rows = [
        Difference("asq", "W2A2", 0.5, (-0.1, 30.0)),
        Difference("adq", "W2A2", -0.4, (-0.9, 0.1)),
        Difference("pact", "W2A2", -0.2),
        Difference("nearest", "W2A2", -66.5, (-70.0, -63.0)),
    ]
    differences(rows, tmp_path / "a.png", drawn=looks(row.name for row in rows))
    (axis,) = drawn[0].axes
    low, high = axis.get_xlim()
    assert -3 < low < -0.9
    assert 0.5 < high < 3  # the interval to 30 is cut
    assert [text.get_text().split()[-1] for text in axis.texts] == ["-66.5"]
    names = [label.get_text() for label in axis.get_yticklabels()]
    assert names == ["nearest", "adq", "pact", "asq"]  # upwards
    hollow = [line for line in axis.lines if line.get_markerfacecolor() == "white"]
    assert len(hollow) == 1


def test_the_interval_s_ends_and_both_p_stand_in_their_own_columns(tmp_path: Path) -> None:
    seeds(tmp_path, "lsq", LSQ)
    seeds(tmp_path, "asq", ASQ)
    seeds(tmp_path, "adq", [top1 + 0.4 + 0.05 * s for s, top1 in enumerate(LSQ)])
    for made in compare(table(tmp_path), "lsq"):
        assert made.interval is not None
        assert made.p is not None
        texts, fields = dict(zip(COLUMNS, cells(made), strict=True)), csv_fields(made, "lsq")
        assert (fields["against_low"], fields["against_high"]) == made.interval
        assert made.interval[0] < made.interval[1]
        assert (fields["against_p"], fields["against_p_holm"]) == (made.p, made.p_holm)
        assert texts["p"] == probability(made.p)
        assert texts["p, Holm"] == probability(made.p_holm)
        if made.row.name == "adq":
            assert texts["p"] != texts["p, Holm"]
            assert made.p_holm == 2 * made.p


def test_a_probability_has_two_digits_that_count() -> None:
    found = [probability(p) for p in (None, 0.00099, 0.001, 0.0062, 0.01, 0.304, 1.0)]
    assert found == [probability(None), "<0.001", "0.001", "0.006", "0.01", "0.30", "1.00"]
