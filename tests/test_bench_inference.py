"""`qexp bench inference`: every engine runs, is weighed, and computes the same."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from conftest import Qexp

from qexp.bench_engines import AGAIN, ENGINES, FLOAT, FLOAT_ONNX

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

SMALL = ("model=resnet8", "model.width=0.25", "image_size=8", "repeats=2", "warmup=1", "threads=1")


def test_all_engines_take_turns_and_compute_the_same(qexp: Qexp, tmp_path: Path) -> None:
    engines = ",".join([FLOAT_ONNX, *ENGINES])
    said = qexp(
        "bench", "inference", *SMALL, "quantizer=post", "batch=1,3", f"engines={engines}",
        "out=bench",
    )  # fmt: skip
    assert said.code == 0, said.err
    rows = json.loads((tmp_path / "bench" / "bench.json").read_text())
    named = {(row["quantizer"], row["engine"], row["batch"]) for row in rows}
    floats = {("", name, batch) for name in (FLOAT, AGAIN, FLOAT_ONNX) for batch in (1, 3)}
    ours = {("post", name, batch) for name in ENGINES for batch in (1, 3)}
    assert named == floats | ours
    for row in rows:
        assert row["latency_ms"] > 0
        assert row["images_per_s"] == pytest.approx(1e3 * row["batch"] / row["latency_ms"])
        assert row["passes"] in (1, 2)
        if row["engine"] == FLOAT:
            assert row["ratio"] == row["cpu_ratio"] == row["file_ratio"] == 1
        if row["quantizer"] and row["engine"] != "onnx_int8":
            assert row["logits_median"] < 1e-4 * row["logits_scale"]
            assert row["file_ratio"] < 1 or row["engine"] == "onnx"  # a small net, a large graph
    with (tmp_path / "bench" / "bench.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(rows)
    assert (tmp_path / "bench" / "bench.png").stat().st_size > 10_000
    assert "resnet8 8x8, batch 3, ratios to float torch" in said.out
    assert "noise: float against itself differs by" in said.out


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("engines=intger", "config: engines=intger is not an option."),
        ("engines=intger", "Did you mean 'integer'?"),
        ("batch=0", "config: batch must be a positive integer, got 0."),
        ("quantizer=lsqq", "Did you mean 'lsq'?"),
    ],
)
def test_wrong_settings_are_named(qexp: Qexp, word: str, message: str) -> None:
    said = qexp("bench", "inference", *SMALL, word)
    assert said.code == 2
    assert message in said.err


def test_help_names_the_engines(qexp: Qexp) -> None:
    said = qexp("bench", "inference", "--help")
    assert said.code == 0
    assert all(f"  {name} " in said.out for name in (FLOAT_ONNX, "packed", "integer", "table"))
