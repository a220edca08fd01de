"""`qexp bench inference`: every engine runs, is weighed, and computes the same."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from conftest import Qexp

from qexp.bench.engines import (
    AGAIN,
    ENGINES,
    FLOAT,
    FLOAT_BF16,
    FLOAT_ONNX,
    FLOAT_TF32,
    check_engine,
    engines_of,
)
from qexp.bench.output import unused, write_folder
from qexp.errors import ConfigError

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

SMALL = ("model=resnet8", "model.width=0.25", "image_size=8", "repeats=2", "warmup=1", "threads=1")


FLOATS = (FLOAT_ONNX, FLOAT_BF16)


def test_all_engines_take_turns_and_compute_the_same(
    qexp: Qexp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    engines = ",".join([*FLOATS, *ENGINES])
    said = qexp(
        "bench", "inference", *SMALL, "quantizer=post", "batch=1,3", f"engines={engines}",
        "out=bench",
    )  # fmt: skip
    assert said.code == 0, said.err
    rows = json.loads((tmp_path / "bench" / "bench.json").read_text())
    named = {(row["quantizer"], row["engine"], row["batch"]) for row in rows}
    floats = {("", name, batch) for name in (FLOAT, AGAIN, *FLOATS) for batch in (1, 3)}
    ours = {("post", name, batch) for name in ENGINES for batch in (1, 3)}
    assert named == floats | ours
    for row in rows:
        assert row["latency_ms"] > 0
        assert row["images_per_s"] == pytest.approx(1e3 * row["batch"] / row["latency_ms"])
        assert row["passes"] in (1, 2)
        assert row["on"] == "cpu"
        if row["engine"] == FLOAT_BF16:
            assert row["file_ratio"] == 0.5
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


def test_an_earlier_bench_is_not_written_over(tmp_path: Path) -> None:
    def draw(path: Path, rows: object) -> None:
        path.write_bytes(b"")

    for number in (1, 2, 3):
        write_folder(unused(tmp_path / "b"), [{"x": number}], draw, seed=0, threads=1)
    found = {p.parent.name: json.loads(p.read_text()) for p in tmp_path.glob("*/bench.json")}
    assert found == {"b": [{"x": 1}], "b-2": [{"x": 2}], "b-3": [{"x": 3}]}


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("engines=intger", "config: engines=intger is not an option."),
        ("engines=intger", "Did you mean 'integer'?"),
        ("engines=triton", "engine=triton needs a CUDA device, not cpu"),
        ("device=gpu", "config: device 'gpu' is none of auto, cpu, cuda"),
        ("batch=0", "config: batch must be a positive integer, got 0."),
        ("quantizer=lsqq", "Did you mean 'lsq'?"),
    ],
)
def test_wrong_settings_are_named(qexp: Qexp, word: str, message: str) -> None:
    said = qexp("bench", "inference", *SMALL, word)
    assert said.code == 2
    assert message in said.err


def test_engines_suit_the_device() -> None:
    cpu, gpu, metal = map(torch.device, ("cpu", "cuda:0", "mps"))
    assert engines_of(cpu) == [FLOAT_ONNX, "packed", "integer", "table", "onnx", "onnx_int8"]
    assert engines_of(gpu) == [FLOAT_TF32, FLOAT_BF16, "packed", "triton"]
    assert engines_of(metal) == [FLOAT_BF16, "packed"]
    for device in (cpu, gpu, metal):
        for name in engines_of(device):
            if name != "triton":  # asks torch for the GPU
                check_engine(name, device)
    with pytest.raises(ConfigError, match=f"engines={FLOAT_TF32} does not run on cpu"):
        check_engine(FLOAT_TF32, cpu)
    for name in ("integer", "onnx", FLOAT_ONNX):
        with pytest.raises(ConfigError, match=f"engines={name} does not run on cuda:0"):
            check_engine(name, gpu)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_runs_what_suits_it(qexp: Qexp, tmp_path: Path) -> None:
    said = qexp(
        "bench", "inference", *SMALL, "quantizer=lsq", "batch=4", "device=cuda", "out=bench"
    )
    assert said.code == 0, said.err
    rows = json.loads((tmp_path / "bench" / "bench.json").read_text())
    assert [row["engine"] for row in rows] == [FLOAT, AGAIN, *engines_of(torch.device("cuda"))]
    assert all(row["on"] == "cuda" and row["peak_bytes"] > 0 for row in rows)


def test_help_names_the_engines(qexp: Qexp) -> None:
    said = qexp("bench", "inference", "--help")
    assert said.code == 0
    assert all(f"  {name} " in said.out for name in (FLOAT_ONNX, "packed", "integer", "table"))
