"""`qexp bench train`: its command line, what it writes, and what it counts."""

from __future__ import annotations

import csv
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Qexp
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from torch import nn

from qexp.bench import step as bench_step
from qexp.bench import table
from qexp.bench import train as bench
from qexp.bench.floor import Machine, measure_machine, operands, work
from qexp.bench.peers import Peer
from qexp.bench.settings import Settings
from qexp.bench.step import AGAIN, Contender, Group, make_step, take_turns
from qexp.bench.words import translate
from qexp.config import configs_dir
from qexp.models.resnet import ResNet
from qexp.quant.convert import Bits, quantize_
from qexp.quant.lsq import LSQ
from qexp.quant.trace import trace
from qexp.recipes.saving import kept_bytes

TINY = (
    "model=resnet8",
    "model.width=0.25",
    "image_size=8",
    "batch=4",
    "repeats=2",
    "warmup=1",
    "threads=1",
    "device=cpu",
    "out=bench",
)
FIELDS = (
    "quantizer", "model", "batch", "dtype", "compile", "device", "step_ms", "float_step_ms",
    "ratio", "saved_bytes_ratio", "peak_bytes", "images_per_s", "repeats",
)  # fmt: skip


def compose_bench(*words: str) -> DictConfig:
    with initialize_config_dir(str(configs_dir()), version_base="1.3"):
        return compose("bench_train", [*words, "out=bench"])


@pytest.fixture(autouse=True)
def quick_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine's rates are not what is tested, and take a second to measure."""
    monkeypatch.setattr("qexp.bench.train.measure_machine", lambda device, dtype: Machine(1e9, 1e9))


def test_bench_writes_a_row_for_every_quantizer_and_the_control(qexp: Qexp) -> None:
    done = qexp("bench", "train", "quantizer=lsq,asq", "compile=off", "peers=true", *TINY)
    assert done.code == 0, done.err
    rows = json.loads(Path("bench/bench.json").read_text())
    assert [r["quantizer"] for r in rows[:5]] == ["fp32 again", "lsq", "asq", "aten", "composed"]
    for row in rows:
        assert set(FIELDS) <= set(row)
        assert row["step_ms"] > 0
        assert row["ratio"] == pytest.approx(row["step_ms"] / row["float_step_ms"])
        assert row["images_per_s"] == pytest.approx(4e3 / row["step_ms"])
        assert row["quantizer"] in done.out
    again, lsq, *_ = rows
    assert again["saved_bytes_ratio"] == 1
    assert 1 < lsq["saved_bytes_ratio"] < 2
    assert again["floor_ratio"] == 1 < lsq["floor_ratio"]
    with open("bench/bench.csv", newline="") as file:
        assert [r["quantizer"] for r in csv.DictReader(file)] == [r["quantizer"] for r in rows]
    assert Path("bench/bench.png").stat().st_size > 0
    assert json.loads(Path("bench/env.json").read_text())["threads"] == 1


def test_a_bench_that_ends_early_leaves_what_it_measured(
    qexp: Qexp, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = bench._group

    def fails(s: Settings, model: str, dtype: torch.dtype, *more: Any) -> Any:
        if dtype == torch.bfloat16:
            raise KeyboardInterrupt
        return group(s, model, dtype, *more)

    monkeypatch.setattr(bench, "_group", fails)
    assert qexp("bench", "train", "dtype=fp32,bf16", "compile=off", *TINY).code == 130
    rows = json.loads(Path("bench/bench.json").read_text())
    assert [(r["quantizer"], r["dtype"]) for r in rows] == [("fp32 again", "fp32"), ("lsq", "fp32")]


def test_a_bench_of_several_groups_has_one_folder(qexp: Qexp) -> None:
    for folder in ("bench", "bench-2"):
        done = qexp("bench", "train", "dtype=fp32,bf16", "compile=off", *TINY)
        assert done.code == 0, done.err
        assert done.out.endswith(f"bench: {folder}/bench.json, bench.csv, bench.png\n")
        assert len(json.loads(Path(folder, "bench.json").read_text())) == 4
    assert not Path("bench-3").exists()


def test_peers_are_quantized_whatever_the_first_quantizer_is(qexp: Qexp) -> None:
    words = ("quantizer=fp32,lsq", "bitwidth.weight=3", "compile=off", "peers=true")
    done = qexp("bench", "train", *words, *TINY)
    assert done.code == 0, done.err
    rows = {r["quantizer"]: r for r in json.loads(Path("bench/bench.json").read_text())}
    assert rows["fp32"]["saved_bytes_ratio"] == rows["fp32"]["floor_ratio"] == 1
    for peer in ("aten", "composed"):
        assert rows[peer]["saved_bytes_ratio"] > 1.05
        assert rows[peer]["floor_ratio"] == pytest.approx(rows["lsq"]["floor_ratio"])


def test_peers_have_the_benchs_widths_and_first_and_last_layer() -> None:
    settings = Settings.of(compose_bench("quantizers=[fp32]", "bits=3"))
    layers = trace(ResNet(depth=8, num_classes=4, width=0.25), (3, 8, 8))
    widths = bench._widths(settings, "resnet8", layers)
    names = [layer.name for layer in layers]
    assert [widths[n] for n in names] == [(8, 8), *[(3, 3)] * (len(names) - 2), (8, 8)]
    more = "overrides=['bitwidth.weight=2','bitwidth.first_last=fp32']"
    settings = Settings.of(compose_bench("quantizers=[fp32]", "bits=3", more))
    widths = bench._widths(settings, "resnet8", layers)
    assert [widths[n] for n in names] == [(32, 32), *[(2, 3)] * (len(names) - 2), (32, 32)]


def test_peers_that_would_quantize_nothing_are_refused(qexp: Qexp) -> None:
    words = ("bits=32", "bitwidth.first_last=fp32", "quantizer=fp32", "peers=true", "compile=off")
    done = qexp("bench", "train", *words, *TINY)
    assert done.code == 2
    assert done.err.startswith("config: peers=true, but at these widths 'aten' quantizes nothing.")
    assert len(done.err.splitlines()) == 1
    assert not Path("bench").exists()


def test_peers_run_eagerly_beside_compiled_kernels_and_not_beside_compiled_networks(
    qexp: Qexp, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed: list[tuple[bool, str]] = []

    def make(model: nn.Module, mode: str, *_: Any) -> Any:
        timed.append((any(isinstance(m, Peer) for m in model.modules()), mode))
        return lambda: sum(p.sum() for p in model.parameters()).backward()  # type: ignore[union-attr]

    monkeypatch.setattr("qexp.bench.train.make_step", make)
    done = qexp("bench", "train", "compile=kernels,model", "peers=true", *TINY)
    assert done.code == 0, done.err
    assert {mode for peer, mode in timed if peer} == {"off"}
    rows = json.loads(Path("bench/bench.json").read_text())
    assert {r["compile"] for r in rows if r["quantizer"] == "composed"} == {"kernels"}
    assert "peers: run eagerly" in done.out
    assert "peers: none beside compile=model" in done.out


def test_bench_of_a_sequence_of_dtypes_and_parts(qexp: Qexp) -> None:
    done = qexp("bench", "train", "dtype=fp32,bf16", "quantizer/weight=apot", "compile=off", *TINY)
    assert done.code == 0, done.err
    rows = json.loads(Path("bench/bench.json").read_text())
    assert [(r["dtype"], r["quantizer"]) for r in rows if r["quantizer"] != "fp32 again"] == [
        ("fp32", "lsq"),
        ("bf16", "lsq"),
    ]
    assert rows[0]["overrides"] == ["model.width=0.25", "quantizer/weight=apot"][::-1]


def test_bench_goes_on_eagerly_without_a_compiler(
    qexp: Qexp, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qexp.bench.train.compiler_available", lambda device: (False, "no C++"))
    done = qexp("bench", "train", "compile=model,kernels", *TINY)
    assert done.code == 0
    assert "no C++" in done.out
    rows = json.loads(Path("bench/bench.json").read_text())
    assert {row["compile"] for row in rows} == {"off"}


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("quantizer=lsqq",), "config: quantizer 'lsqq' not found."),
        (("model=resnet21",), "config: model 'resnet21' not found."),
        (
            ("compile=kernel",),
            "config: compile=kernel is not an option. Use off, kernels, model, graphs.",
        ),
        (("compile=graphs", "device=cpu"), "config: compile=graphs replays CUDA graphs, and the"),
        (("dtype=fp16",), "config: dtype=fp16 is not an option. Use fp32, bf16."),
        (("quantizers=[]",), "config: quantizers is empty. Name at least one."),
        (("batch=0",), "config: batch must be a positive integer, got 0."),
        (("bits=0",), "config: bits must be"),
        (("model.widht=2",), "config: no key 'model.widht'"),
        (("quantizers=lsq", "repeat=3"), "config: no key 'repeat'"),
    ],
)
def test_bench_refuses_in_one_line(qexp: Qexp, words: tuple[str, ...], line: str) -> None:
    done = qexp("bench", "train", *words)
    assert done.code == 2
    assert done.err.startswith(line)
    assert len(done.err.splitlines()) == 1


def test_bench_words_are_those_of_train() -> None:
    argv = ["quantizer=lsq,asq", "model=resnet20", "quantizer/act=asq", "model.width=2", "batch=8"]
    assert translate(argv) == [
        "quantizers=[lsq,asq]",
        "models=resnet20",
        "batch=8",
        "overrides=['quantizer/act=asq','model.width=2']",
    ]
    assert translate(["-m", "quantizer=lsq,asq"]) == ["-m", "quantizer=lsq,asq"]
    assert translate(["hydra.job.name=x", "out=a/b"]) == ["hydra.job.name=x", "out=a/b"]


# ---------------------------------------------------------------------------------------------
# What is counted


def linear(n: int = 16) -> tuple[nn.Module, torch.Tensor]:
    return nn.Sequential(nn.Linear(n, n, bias=False), nn.ReLU()), torch.ones(8, n)


def test_saved_bytes_count_each_storage_once_and_no_parameter() -> None:
    net, x = linear()

    def step() -> None:
        net(x).sum().backward()

    # the linear layer keeps x, the ReLU its result; the weight is a parameter
    assert kept_bytes(net, step) == 4 * 2 * x.numel()


def test_contenders_take_turns_and_keep_no_neighbour(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_step, "kept_bytes", lambda model, step: 0)
    monkeypatch.setattr(bench_step, "peak_bytes", lambda contender, device: None)
    order: list[str] = []
    contenders = [
        Contender(name, nn.Identity(), lambda name=name: order.append(name)) for name in "abc"
    ]
    take_turns(contenders, repeats=60, warmup=1, device=torch.device("cpu"))
    turns = ["".join(order[i : i + 3]) for i in range(3, len(order), 3)]  # without the warm-up
    assert all(sorted(turn) == ["a", "b", "c"] for turn in turns)
    assert all(turns.count(order) > 3 for order in ("abc", "acb", "bac", "bca", "cab", "cba"))
    assert all(len(c.wall_s) == len(c.cpu_s) == 60 for c in contenders)


def test_floor_of_a_network_by_hand() -> None:
    # 1x1 image: conv 3 -> 4 (3x3, padded), mean, linear 4 -> 2
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.Flatten(), nn.Linear(4, 2, bias=False)
    )
    layers = trace(net, (3, 1, 1))
    floor = work(layers, {"2": (True, True)}, batch=10, itemsize=4)
    assert floor.flops == 10 * (2 * 2 * 108 + 3 * 2 * 8)
    first = 4 * 10 * (2 * 3 + 2 * 4) + 12 * 108
    last = 4 * 10 * (3 * 4 + 2 * 2) + 12 * 8
    assert floor.layer_bytes == first + last
    assert floor.quantizer_bytes == 5 * 4 * (10 * 4 + 8)
    weights_alone = work(layers, {"2": (True, False)}, batch=10, itemsize=4)
    assert weights_alone.quantizer_bytes == 5 * 4 * 8
    machine = Machine(copy_bytes_per_s=1e3, flops_per_s=1e9)
    assert floor.float_s(machine) == floor.layer_bytes / 1e3


def test_a_row_is_of_medians_and_its_spread_of_turns() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 4))
    layers = trace(model, (3, 2, 2))
    times = {"fp32": [1.0, 2.0, 4.0, 2.0], AGAIN: [1.0, 2.2, 4.0, 2.2], "lsq": [4.0, 4.0, 4.0, 6.0]}
    contenders = [
        Contender(name, model, lambda: None, wall, [2 * t for t in wall], 0.5, 8 + len(name))
        for name, wall in times.items()
    ]
    facts = {"model": "m", "dtype": "bf16", "compile": "off", "batch": 8}
    machine = Machine(copy_bytes_per_s=1e9, flops_per_s=1e3)
    again, lsq = rows = table.rows(Group(layers, contenders), machine, facts)
    assert [row["quantizer"] for row in rows] == [AGAIN, "lsq"]
    assert (lsq["step_ms"], lsq["float_step_ms"], lsq["ratio"]) == (4000, 2000, 2)
    assert (lsq["ratio_low"], lsq["ratio_high"]) == (1.75, 3.25)  # of 1, 2, 3 and 4
    assert (lsq["cpu_ms"], lsq["cpu_ratio"], lsq["eager_ratio"]) == (8000, 2, 2)
    assert (lsq["saved_bytes_ratio"], lsq["images_per_s"]) == (11 / 12, 2)
    assert lsq["floor_ms"] == pytest.approx(1e3 * 8 * 2 * 2 * 48 / 1e3)  # nothing before it learns
    assert again["ratio"] == pytest.approx(1.1)
    text = table.text(rows)
    assert "m bf16 compile=off: float step 2000.0 ms, CPU 4000.0 ms" in text
    (line,) = (line for line in text.splitlines() if line.startswith("lsq"))
    assert line.split()[:5] == ["lsq", "4000.0", "2.000", "1.750-3.250", "2.000"]
    assert text.endswith("float against itself differs by 10.0% (wall), 10.0% (CPU)")


def test_a_step_trains_every_parameter() -> None:
    net = ResNet(depth=8, num_classes=4, width=0.25)
    before = [p.detach().clone() for p in net.parameters()]
    x, y = torch.randn(4, 3, 8, 8), torch.randint(4, (4,))
    make_step(net, "off", x, y, torch.float32)()
    assert not any(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


def test_an_operand_that_is_not_quantized_costs_no_traffic() -> None:
    model = ResNet(depth=8, num_classes=4, width=0.25)
    layers = trace(model, (3, 8, 8))
    make = {"weight": LSQ, "act": LSQ}
    quantize_(model, layers, {layer.name: Bits(4, 32) for layer in layers}, **make)
    assert set(operands(model).values()) == {(True, False)}
    floor = work(layers, operands(model), batch=2, itemsize=4)
    assert floor.quantizer_bytes == 5 * 4 * sum(layer.weights for layer in layers)


def test_the_machines_rates_are_of_what_was_copied_and_multiplied(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    copied: list[int] = []
    real = torch.Tensor.copy_

    def slow(self: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        copied.append(source.nbytes)
        time.sleep(0.02)
        return real(self, source)

    monkeypatch.setattr("qexp.bench.floor.COPY_BYTES", {"cpu": (1 << 16, 2)})
    monkeypatch.setattr("qexp.bench.floor.MATRIX", {"cpu": 64})
    monkeypatch.setattr(torch.Tensor, "copy_", slow)
    machine = measure_machine(torch.device("cpu"), torch.float32)
    assert set(copied) == {1 << 16}
    assert 1e6 < machine.copy_bytes_per_s < 2 * (1 << 16) / 0.02  # read and written
    assert machine.flops_per_s > 0
