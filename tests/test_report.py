"""`qexp report` on synthetic run folders: grouping, statistics, flags, formats, errors."""

from __future__ import annotations

import csv
import io
import json
import re
import statistics
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from qexp.config import configs_dir
from qexp.errors import ConfigError, RunError
from qexp.report.command import EXAMPLES, main
from qexp.report.runs import flatten, read_runs
from qexp.report.shipped import shipped
from qexp.report.tables import make_tables
from qexp.report.variants import name_variants

PROTOCOL = {
    "dataset": "cifar10",
    "model": "resnet20",
    "epochs": 10,
    "lr": 0.01,
    "distill": {"weight": 0.0, "temperature": 1.0},
    "first_last": "8",
    "float_sha256": "f00",
}
LAYERS = """\
name,kind,shape,w_bits,a_bits,signed,levels_used,weights,macs,size_bytes,sqnr_db,sensitivity
conv1,conv,16x3x3x3,8,8,true,250,432,442368,500,40.1,
layer1.0.conv1,conv,16x16x3x3,4,4,false,16,2304,2359296,1200,19.5,0.3
fc,linear,10x64,8,8,false,251,640,640,700,41,
"""


def make_run(
    root: Path,
    name: str,
    *,
    method: str = "lsq",
    bits: int = 4,
    seed: int = 0,
    top1: float | None = 91.0,
    state: str = "done",
    error: str = "",
    quantizer: dict[str, Any] | None = None,
    protocol: dict[str, Any] | None = None,
    **result: Any,
) -> Path:
    """A run folder as the runner leaves it; `result` replaces fields of result.json."""
    folder = root / name
    folder.mkdir(parents=True)
    status = {"state": state, "error": error} if error else {"state": state}
    (folder / "status.json").write_text(json.dumps(status))
    recipe = {"name": "qat", "epochs": (protocol or PROTOCOL).get("epochs")}
    config = {
        "seed": seed,
        "bits": bits,
        "dataset": {"name": "cifar10", "root": f"data{seed}"},
        "model": {"name": "resnet20"},
        "recipe": recipe,
        "quantizer": {"name": method, **(quantizer or {})},
        "bitwidth": {"name": "uniform", "weight": bits, "act": bits, "seed": seed},
    }
    (folder / "config.yaml").write_text(json.dumps(config))  # JSON is YAML
    (folder / "layers.csv").write_text(LAYERS)
    events = [{"event": "epoch", "epoch": e, "loss": 1 / e, "top1": 90 - 20 / e} for e in (1, 2, 3)]
    lines = [json.dumps({"event": "start"}), *map(json.dumps, events), '{"event": "epo']
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    if state == "done":
        fields: dict[str, Any] = {
            "method": method, "dataset": "cifar10", "model": "resnet20", "recipe": "qat",
            "policy": "float" if method == "fp32" else "uniform", "w_bits": bits, "a_bits": bits,
            "bits": {"weight_by_param": float(bits), "weight_by_layer": float(bits),
                     "weight_with_outer": bits + 0.1, "act_by_layer": float(bits)},
            "top1": top1, "top1_best": (top1 or 0) + 0.3, "best_epoch": 7,
            "best_selected_on": "test", "fp32_top1": 91.73, "drop": 91.73 - (top1 or 0),
            "size_bytes": 36000 * bits, "bops": 41e6 * bits * bits, "seed": seed,
            "commit": "abc", "dirty": False, "protocol": protocol or PROTOCOL,
            "protocol_hash": "p" + str((protocol or PROTOCOL).get("epochs")), "health": {},
        }  # fmt: skip
        (folder / "result.json").write_text(json.dumps({**fields, **result}))
    return folder


def report(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(list(argv)) == 0
    return capsys.readouterr().out


def rows(capsys: pytest.CaptureFixture[str], root: Path, *argv: str) -> list[dict[str, str]]:
    text = report(capsys, str(root), "--format", "csv", *argv)
    return list(csv.DictReader(io.StringIO(text)))


def test_another_random_allocation_is_another_row_and_a_float_run_has_no_width(
    tmp_path: Path,
) -> None:
    for name, drawn in (("a", 0), ("b", 5)):
        run = make_run(tmp_path, name)
        config = json.loads((run / "config.yaml").read_text())
        config["bitwidth"] = {"name": "sensitivity", "allocation": "random", "seed": drawn}
        (run / "config.yaml").write_text(json.dumps(config))
    nothing = {"weight": None, "act": None}
    for name, bits in (("c", 4), ("d", 2)):
        make_run(tmp_path, name, method="fp32", bits=bits, quantizer=nothing)
    found = [run.variant for run in read_runs([tmp_path])]
    assert [run.get("bitwidth.seed") for run in found] == [None, 5, None, None]
    assert found[2] == found[3]


def test_seeds_average_to_mean_and_sample_deviation(tmp_path, capsys) -> None:
    values = [90.8, 91.4, 91.1]
    for seed, top1 in enumerate(values):
        make_run(tmp_path, f"lsq/{seed}", seed=seed, top1=top1)
    (row,) = rows(capsys, tmp_path)
    assert float(row["top1_mean"]) == pytest.approx(statistics.mean(values))
    assert float(row["top1_std"]) == pytest.approx(statistics.stdev(values))
    assert (row["n"], row["top1_worst"], row["top1_best_seed"]) == ("3", "90.8", "91.4")
    text = report(capsys, str(tmp_path))
    assert "| 91.10 ± 0.30 (n=3) | 90.80 to 91.40 |" in text
    assert "91.40 ± 0.30 (test-selected)" in text


def test_one_seed_has_no_deviation(tmp_path, capsys) -> None:
    make_run(tmp_path, "a")
    (row,) = rows(capsys, tmp_path)
    assert (row["n"], row["top1_std"]) == ("1", "")
    assert "| 91.00 (n=1) | n/a |" in report(capsys, str(tmp_path))


def test_a_repeated_seed_counts_once_and_the_newest_wins(tmp_path, capsys) -> None:
    make_run(tmp_path, "2026-01", top1=80.0)
    make_run(tmp_path, "2026-02", top1=90.0)
    (row,) = rows(capsys, tmp_path)
    assert (row["n"], row["top1_mean"]) == ("1", "90.0")
    assert "seed 0 ran again: the newest counts" in row["flags"]


def test_another_protocol_is_flagged_with_the_keys_that_differ(tmp_path, capsys) -> None:
    make_run(tmp_path, "a", method="lsq")
    make_run(tmp_path, "b", method="post")
    longer = {**PROTOCOL, "epochs": 60, "distill": {"weight": 0.5, "temperature": 1.0}}
    make_run(tmp_path, "c", method="asq", protocol=longer)
    together = ("--group", "dataset,model")
    text = report(capsys, str(tmp_path), *together)
    assert "Protocol p60 differs, do not compare: epochs: 60 instead of 10" in text
    assert "distill.weight: 0.5 instead of 0.0" in text
    flagged = {row["method"]: row["flags"] for row in rows(capsys, tmp_path, *together)}
    assert flagged["asq"] == "protocol differs: epochs, distill.weight"
    assert flagged["lsq"] == flagged["post"] == ""


def test_a_row_of_another_recipe_is_flagged_by_the_number_of_its_keys(tmp_path, capsys) -> None:
    for seed in (0, 1):
        make_run(tmp_path, f"lsq{seed}", seed=seed)
        make_run(tmp_path, f"pact{seed}", method="pact", seed=seed)
    other = {"dataset": "cifar10", "epochs": 0, **{f"ptq_{k}": k for k in range(12)}}
    make_run(tmp_path, "qdrop", method="qdrop", protocol=other, protocol_hash="other")
    listed = rows(capsys, tmp_path, "--group", "dataset,model")
    (flags,) = [row["flags"] for row in listed if row["method"] == "qdrop"]
    assert "protocol differs: epochs" in flags
    assert "keys that one of them lacks (another recipe)" in flags
    assert "ptq_3" not in flags


def test_a_float_control_is_not_flagged_for_its_first_and_last_layer(tmp_path, capsys) -> None:
    make_run(tmp_path, "a", method="lsq", protocol={**PROTOCOL, "act_sample": "random"})
    control = {**PROTOCOL, "first_last": "float"}
    make_run(tmp_path, "b", method="fp32", bits=32, protocol=control, protocol_hash="other")
    listed = rows(capsys, tmp_path)
    assert [row["bits"] for row in listed] == ["float", "W4A4"]
    assert [row["flags"] for row in listed] == ["", ""]


def test_a_float_start_is_named_so_and_not_compared(tmp_path, capsys) -> None:
    make_run(tmp_path, "a", method="lsq")
    scratch = {**PROTOCOL, "epochs": 200, "from_scratch": True}
    make_run(tmp_path, "b", method="fp32", bits=32, protocol=scratch)
    start, quantized = rows(capsys, tmp_path)
    assert start["flags"] == "float start, trained from scratch"
    assert quantized["flags"] == ""
    assert "do not compare" not in report(capsys, str(tmp_path))


def test_grouping_by_protocol_makes_tables_without_flags(tmp_path, capsys) -> None:
    make_run(tmp_path, "a")
    make_run(tmp_path, "b", protocol={**PROTOCOL, "epochs": 60})
    listed = rows(capsys, tmp_path, "--group", "dataset,protocol")
    assert len({row["table"] for row in listed}) == 2
    assert all(row["flags"] == "" for row in listed)


def test_each_protocol_has_a_table_named_by_what_sets_it_apart(tmp_path, capsys) -> None:
    for i, method in enumerate(("lsq", "pact", "asq")):
        make_run(tmp_path, f"{method}", method=method, seed=i)
    slow = {**PROTOCOL, "lr": 0.002}
    make_run(tmp_path, "slow", protocol=slow, protocol_hash="slow")
    long = {**PROTOCOL, "epochs": 60, "distill": {"weight": 0.5, "temperature": 1.0}}
    make_run(tmp_path, "long", protocol=long)
    ptq = {"dataset": "cifar10", "iterations": 300, "images": 512, "first_last": "8"}
    make_run(tmp_path, "ptq", method="qdrop", recipe="ptq", protocol=ptq, protocol_hash="ptq")
    text = report(capsys, str(tmp_path))
    assert [line for line in text.splitlines() if line.startswith("## ")] == [
        "## Tables",
        "## 1. cifar10, resnet20: ptq, images 512, iterations 300",
        "## 2. cifar10, resnet20: qat, epochs 10, lr 0.01",
        "## 3. cifar10, resnet20: qat, epochs 60, lr 0.01, distill.weight 0.5",
        "## 4. cifar10, resnet20: qat, epochs 10, lr 0.002",
    ]
    assert (
        "2. [cifar10, resnet20: qat, epochs 10, lr 0.01]"
        "(#2-cifar10-resnet20-qat-epochs-10-lr-001): 3 rows, 3 runs" in text
    )
    assert text.count("do not compare") == 1
    assert (  # what differs among the protocols of one recipe, and nothing else
        "cifar10, resnet20, qat: what differs\n\n"
        "| table | protocol | epochs | lr | distill.weight |\n| --- | --- | --- | --- | --- |\n"
        "| 2 | p10 | 10 | 0.01 | 0.0 |\n| 3 | p60 | 60 | 0.01 | 0.5 |\n"
        "| 4 | slow | 10 | 0.002 | 0.0 |\n" in text
    )
    page = report(capsys, str(tmp_path), "--format", "html")
    assert page.count("<h2 id=") == 4
    assert page.count("accuracy against cost") == 4  # each has figures of its own


def test_a_run_of_a_seed_with_another_protocol_by_accident_is_told_apart(tmp_path, capsys) -> None:
    make_run(tmp_path, "a", seed=0)
    make_run(tmp_path, "b", seed=1, protocol={**PROTOCOL, "lr": 0.02}, protocol_hash="other")
    listed = rows(capsys, tmp_path)
    assert [(row["n"], row["protocol"]) for row in listed] == [
        ("1", "qat, epochs 10, lr 0.02"),
        ("1", "qat, epochs 10, lr 0.01"),
    ]
    assert "| table | protocol | lr |" in report(capsys, str(tmp_path))


def test_an_activation_sample_from_before_it_was_recorded_is_named(tmp_path, capsys) -> None:
    make_run(tmp_path, "old")
    new = {**PROTOCOL, "act_sample": "random"}
    make_run(tmp_path, "new", protocol=new, protocol_hash="new")
    assert {row["protocol"] for row in rows(capsys, tmp_path)} == {
        "qat, epochs 10, act_sample stride",
        "qat, epochs 10, act_sample random",
    }


def test_a_run_without_result_joins_the_table_of_its_recipe(tmp_path, capsys) -> None:
    make_run(tmp_path, "a")
    make_run(tmp_path, "long", protocol={**PROTOCOL, "epochs": 60})
    long = {**PROTOCOL, "epochs": 60}
    make_run(tmp_path, "failed", method="asq", state="failed", error="NaN", protocol=long)
    odd = {**PROTOCOL, "epochs": 7}
    make_run(tmp_path, "odd", method="asq", state="failed", error="NaN", protocol=odd)
    tables = {(row["table"], row["method"]) for row in rows(capsys, tmp_path)}
    assert tables == {
        ("cifar10, resnet20: qat, epochs 10", "lsq"),
        ("cifar10, resnet20: qat, epochs 60", "lsq"),
        ("cifar10, resnet20: qat, epochs 60", "asq"),
        ("cifar10, resnet20: qat, epochs 7, no finished run", "asq"),
    }


def test_failed_interrupted_and_dead_runs_stay_in_the_table(tmp_path, capsys) -> None:
    make_run(tmp_path, "a", seed=0)
    make_run(tmp_path, "b", seed=1, state="failed", error="run: loss is NaN at epoch 3, step 120")
    make_run(tmp_path, "c", method="asq", state="interrupted")
    (tmp_path / "c/status.json").write_text('{"state": "running", "pid": 999999999}')
    by_method = {row["method"]: row for row in rows(capsys, tmp_path)}
    assert "seed 1 failed: run: loss is NaN at epoch 3" in by_method["lsq"]["flags"]
    assert by_method["lsq"]["n"] == "1"
    assert by_method["asq"]["n"] == "0"
    assert "| asq | W4A4 |" in report(capsys, str(tmp_path))


def test_a_result_without_a_finite_top1_is_a_failure(tmp_path, capsys) -> None:
    make_run(tmp_path, "a", top1=None)
    (tmp_path / "b").mkdir()
    (tmp_path / "b/result.json").write_text('{"top1": 91')
    make_run(tmp_path, "c", top1=float("nan"), seed=1)
    flags = " ".join(row["flags"] for row in rows(capsys, tmp_path))
    assert flags.count("result.json holds no finite top1") == 3


def test_unfinished_runs_without_a_config_are_not_taken_for_one(tmp_path, capsys) -> None:
    for name in ("lsq-w4a4/1", "asq-w2a2/1"):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / "status.json").write_text(json.dumps({"state": "failed", "error": name}))
    assert [row["flags"] for row in rows(capsys, tmp_path)] == [
        "seed None failed: asq-w2a2/1",
        "seed None failed: lsq-w4a4/1",
    ]


def test_every_row_leads_to_all_its_runs(tmp_path, capsys) -> None:
    runs = tmp_path / "runs"
    for seed, name in enumerate(("a", "b")):
        make_run(runs, name, seed=seed)
    make_run(runs, "c", seed=2, state="failed", error="out of memory")
    for ending in ("md", "html"):
        report(capsys, str(runs), "--out", str(tmp_path / f"page/x.{ending}"))
    text = (tmp_path / "page/x.md").read_text()
    assert "| [0](../runs/a) [1](../runs/b) [failed 2](../runs/c) |" in text
    page = (tmp_path / "page/x.html").read_text()
    table = page.split("<h3>")[0]
    assert (
        '<a href="../runs/b/result.json">1</a> <a href="../runs/c">failed 2</a></sub></td>' in table
    )


def test_an_error_that_quotes_a_class_is_text_in_markdown(tmp_path, capsys) -> None:
    make_run(tmp_path, "a", state="failed", error="got <class 'int'> | worse")
    assert "got &lt;class 'int'> \\| worse" in report(capsys, str(tmp_path))


def test_quantizer_options_tell_rows_of_one_name_apart(tmp_path, capsys) -> None:
    make_run(tmp_path, "a", method="mine", quantizer={"weight": {"per_channel": False}})
    make_run(tmp_path, "b", method="mine", quantizer={"weight": {"per_channel": True}}, seed=1)
    names = sorted(row["method"] for row in rows(capsys, tmp_path))
    assert names == [
        "mine [quantizer.weight.per_channel=False]",
        "mine [quantizer.weight.per_channel=True]",
    ]


def test_a_method_has_one_name_over_all_widths(tmp_path, capsys) -> None:
    for bits in (2, 4):
        make_run(tmp_path, f"mse{bits}", bits=bits, quantizer={"weight": {"init": "mse"}})
    make_run(tmp_path, "lsq2", bits=2, quantizer={"weight": {"init": "lsq"}})  # not at 4 bits
    make_run(tmp_path, "other", bits=4, method="pact")
    listed = {(row["method"], row["bits"]) for row in rows(capsys, tmp_path)}
    assert listed == {
        ("lsq", "W2A2"),
        ("lsq", "W4A4"),
        ("lsq [quantizer.weight.init=lsq]", "W2A2"),
        ("pact", "W4A4"),
    }


def test_an_option_that_a_run_lacks_is_named_by_its_default_or_not_at_all() -> None:
    asq = {"quantizer.act._target_": "qexp.quant.asq.ASQ"}
    mse, lsq = (asq | {"quantizer.act.init": init} for init in ("mse", "lsq"))
    assert name_variants([asq, mse]) == name_variants([lsq, mse]) == ["", "quantizer.act.init=mse"]
    both = [asq, asq | {"quantizer.act.init": "mse"}, asq | {"quantizer.act.init": "lsq"}]
    assert name_variants(both) == ["", "quantizer.act.init=mse", ""]
    elsewhere = {"quantizer.act._target_": "mine.Act"}
    found = name_variants([elsewhere, elsewhere | {"quantizer.act.init": "mse"}, {}])
    assert found == ["", "quantizer.act.init=mse", ""]
    assert "=-" not in " ".join(found)


def test_a_mix_of_parts_and_its_config_in_one_word_are_one_row(tmp_path, capsys) -> None:
    make_run(
        tmp_path, "pair", method="lsq+asq", quantizer={"name": "asq", "weight": {"init": "mse"}}
    )
    make_run(tmp_path, "word", method="lsq+asq", quantizer={"weight": {"init": "mse"}}, seed=1)
    assert [(row["method"], row["n"]) for row in rows(capsys, tmp_path)] == [("lsq+asq", "2")]


def test_variants_are_named_by_what_differs_from_most_and_parts_by_their_class() -> None:
    post = {"quantizer.weight._target_": "qexp.quant.power.POST", "quantizer.weight.levels": "full"}
    variants = [
        post,
        post | {"quantizer.weight.levels": "symmetric"},
        post | {"quantizer.act.factor": "exp"},
        {"quantizer.weight._target_": "qexp.quant.lsq.LSQ", "quantizer.weight.init": "mse"},
    ]
    assert name_variants(variants) == [
        "", "quantizer.weight.levels=symmetric", "quantizer.act.factor=exp", "quantizer.weight=LSQ",
    ]  # fmt: skip
    assert name_variants([{"a.b": 1}, {"a.b": 2}]) == ["a.b=1", "a.b=2"]  # neither is commonest


def test_a_name_alone_is_the_config_that_is_shipped_under_it(tmp_path, capsys) -> None:
    act = {"_target_": "qexp.quant.aquant.AQuant", "tau": 1.0}
    for i, borders in enumerate(("both", "both", "after", "joint")):
        own = {"act": act | {"tau": i + 1.0}, "reconstruct": {"borders": borders}}
        make_run(tmp_path, str(i), method="aquant", quantizer=own)
    both, after = "quantizer.reconstruct.borders=both", "quantizer.reconstruct.borders=after"
    tau = [f"quantizer.act.tau={n}.0" for n in (2, 3, 4)]
    options = [f"[{both}]", f"[{tau[0]}, {both}]", f"[{tau[1]}, {after}]", f"[{tau[2]}]"]
    names = {f"aquant {text}" for text in options}  # without options there is none
    assert {row["method"] for row in rows(capsys, tmp_path)} == names


def test_an_option_that_is_not_shipped_is_named_in_a_row_alone_too(tmp_path, capsys) -> None:
    lsq, none = ({"_target_": f"qexp.quant.lsq.{c}"} for c in ("LSQ", "Other"))
    make_run(tmp_path, "a", quantizer={"weight": lsq | {"init": "lsq"}})
    make_run(tmp_path, "b", bits=2, quantizer={"weight": none | {"init": "own"}})
    names = {row["bits"]: row["method"] for row in rows(capsys, tmp_path)}
    assert names == {
        "W4A4": "lsq [quantizer.weight.init=lsq]",  # shipped with mse
        "W2A2": "lsq [quantizer.weight=Other]",  # whose options the shipped class says nothing of
    }


def test_a_float_start_stands_with_the_runs_that_started_from_it(tmp_path, capsys) -> None:
    scratch = {**PROTOCOL, "epochs": 200, "from_scratch": True, "float_sha256": None}
    for name, sha256, quantized in (("a", "f00", 1), ("b", "f01", 3)):
        made = make_run(
            tmp_path,
            f"{name}/start",
            method="fp32",
            bits=32,
            protocol=scratch,
            top1=90.0 + quantized,
        )
        result = json.loads((made / "result.json").read_text())
        result["protocol_hash"] = f"start {name}"
        if name == "a":
            (made / "checkpoints.json").write_text(json.dumps({"last.pt": sha256}))
        else:
            result["weights_sha256"] = sha256
        (made / "result.json").write_text(json.dumps(result))
        for seed in range(quantized):
            own = {**PROTOCOL, "float_sha256": sha256}
            make_run(tmp_path, f"{name}/{seed}", bits=2 + seed, protocol=own, protocol_hash=sha256)
    tables = make_tables(read_runs([tmp_path]), [])
    held = {
        t.protocol_hash: [row.top1.mean for row in t.rows if row.first.is_float] for t in tables
    }
    assert held == {"f00": [91.0], "f01": [93.0]}
    found = rows(capsys, tmp_path, "--group", "dataset,model")
    flags = {row["top1_mean"]: row["flags"] for row in found if row["method"] == "fp32"}
    assert flags["93.0"] == "float start, trained from scratch"
    assert flags["91.0"].endswith("trained from scratch; these started from another network")


def test_a_float_start_of_nobody_here_has_a_table_of_its_own(tmp_path) -> None:
    scratch = {**PROTOCOL, "epochs": 200, "from_scratch": True, "float_sha256": None}
    make_run(tmp_path, "a", method="fp32", bits=32, protocol=scratch, weights_sha256="f09")
    make_run(tmp_path, "b")
    assert [len(t.rows) for t in make_tables(read_runs([tmp_path]), [])] == [1, 1]


def test_what_a_name_stands_for_is_what_hydra_composes() -> None:
    methods = [path.stem for path in (configs_dir() / "quantizer").glob("*.yaml")]
    assert {"lsq", "aquant_twice", "fp32"} <= {*methods}
    for method in methods:
        with initialize_config_dir(str(configs_dir()), version_base="1.3"):
            cfg = compose("train", overrides=[f"quantizer={method}"])
        whole = OmegaConf.to_container(cfg.quantizer, resolve=True)
        assert shipped(method) == dict(flatten({"quantizer": whole})), method


def test_the_name_of_two_parts_stands_for_both_and_no_other_for_anything() -> None:
    word, parts = shipped("asq_lsq"), shipped("lsq+asq")
    assert parts.items() <= word.items()
    assert {key.split(".")[1] for key in parts} == {"weight", "act"}
    assert shipped("qdrop+apot") == shipped("mine") == shipped("../lsq") == shipped("") == {}
    assert shipped("lsq+asq+lsq") == shipped("lsq+") == {}


def test_an_option_that_is_off_is_no_other_method_than_before_the_option(tmp_path, capsys) -> None:
    make_run(tmp_path, "before", quantizer={"weight": {"init": "mse"}}, top1=90.0)
    make_run(tmp_path, "off", quantizer={"weight": {"init": "mse", "new": 0.0}}, seed=1, top1=92.0)
    make_run(tmp_path, "on", quantizer={"weight": {"init": "mse", "new": 0.1}}, seed=2, top1=80.0)
    found = {row["method"]: (row["n"], float(row["top1_mean"])) for row in rows(capsys, tmp_path)}
    assert found == {
        "lsq": ("2", 91.0),
        "lsq [quantizer.weight.new=0.1]": ("1", 80.0),
    }


def test_an_option_at_its_default_is_no_other_method_and_off_is_where_the_default_is_on(
    tmp_path, capsys
) -> None:
    weight = {"_target_": "qexp.quant.codebook.Codebook", "init": "quantile"}
    act = {"_target_": "qexp.quant.power.APoT"}
    make_run(tmp_path, "before", quantizer={"weight": weight, "act": act}, top1=90.0)
    own = {"weight": weight | {"levels": "symmetric"}, "act": act | {"normalize": False}}
    make_run(tmp_path, "default", quantizer=own, seed=1, top1=92.0)
    own = {"weight": weight | {"levels": "full"}, "act": act | {"normalize": False}}
    make_run(tmp_path, "full", quantizer=own, seed=2, top1=80.0)
    found = {row["n"]: float(row["top1_mean"]) for row in rows(capsys, tmp_path)}
    assert found == {"2": 91.0, "1": 80.0}
    lsq = {"_target_": "qexp.quant.lsq.LSQ"}
    signed = {"weight": lsq | {"signed": False}}  # its default is True: off is another method
    make_run(tmp_path / "on", "before", quantizer={"weight": lsq}, top1=90.0)
    make_run(tmp_path / "on", "off", quantizer=signed, seed=1, top1=80.0)
    assert {row["n"] for row in rows(capsys, tmp_path / "on")} == {"1"}


def test_the_newest_run_of_a_seed_counts_whatever_its_folder_is_called(tmp_path, capsys) -> None:
    make_run(tmp_path, "lsq-w4a4-s0", top1=90.0, finished="2026-01-02T00:00:00Z")
    make_run(tmp_path, "20261231-000000", top1=91.0, finished="2026-01-03T00:00:00Z")
    assert [row["top1_mean"] for row in rows(capsys, tmp_path)] == ["91.0"]
    for name, top1 in (("a-s0", 80.0), ("a-s0-2", 81.0), ("a-s0-10", 82.0)):
        make_run(tmp_path / "old", name, top1=top1)
    assert [row["top1_mean"] for row in rows(capsys, tmp_path / "old")] == ["82.0"]


def test_a_grid_with_too_many_levels_and_uncommitted_code_are_flagged(tmp_path, capsys) -> None:
    over = {"weight_by_param": 2.32, "weight_by_layer": 2.32, "act_by_layer": 2.0}
    make_run(tmp_path, "a", method="post_released", bits=2, dirty=True)
    result = json.loads((tmp_path / "a/result.json").read_text())
    result.update(bits=over, health={"dead_levels": {"conv1.weight_quantizer": 2}})
    (tmp_path / "a/result.json").write_text(json.dumps(result))
    (row,) = rows(capsys, tmp_path)
    assert "holds more levels than 2 bit: 2.32" in row["flags"]
    assert "uncommitted code" in row["flags"]
    assert "dead levels: 2" in row["flags"]


def test_a_quantizer_that_stopped_learning_is_flagged(tmp_path, capsys) -> None:
    names = ["a.act_quantizer.adapter.0.weight", "a.act_quantizer.adapter.0.bias"]
    for method, epochs in (("asq", (2, 4, 5)), ("lsq", (4, 5)), ("pact", (2, 3, 4)), ("apot", ())):
        folder = make_run(tmp_path, method, method=method)
        lines = [{"event": "epoch", "epoch": e + 1, "top1": 90.0} for e in range(5)]
        lines += [{"event": "stuck", "epoch": e, "parameters": names} for e in epochs]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    flags = {row["method"]: row["flags"] for row in rows(capsys, tmp_path)}
    assert "quantizers at rest: 1" in flags["asq"]
    assert not any("at rest" in flags[other] for other in ("lsq", "pact", "apot"))
    folder = tmp_path / "asq"
    told = {"constant_factors": {"a.act_quantizer": 1}}  # said by its own name, once
    result = json.loads((folder / "result.json").read_text()) | {"health": told}
    (folder / "result.json").write_text(json.dumps(result))
    flags = {row["method"]: row["flags"] for row in rows(capsys, tmp_path)}
    assert "constant factors: 1" in flags["asq"]
    assert "at rest" not in flags["asq"]


def test_a_committed_result_needs_neither_status_nor_config(tmp_path, capsys) -> None:
    folder = make_run(tmp_path, "a")
    for name in ("status.json", "config.yaml", "metrics.jsonl", "layers.csv"):
        (folder / name).unlink()
    (row,) = rows(capsys, tmp_path)
    assert (row["method"], row["n"]) == ("lsq", "1")
    assert "<table" in report(capsys, str(tmp_path), "--format", "html")


def test_damaged_lines_of_layers_csv_are_left_out(tmp_path, capsys) -> None:
    folder = make_run(tmp_path, "a")
    head, *sound = LAYERS.splitlines()
    columns = head.split(",")
    broken = sound[0].split(",")
    broken[columns.index("w_bits")] = "4#"
    nan = [*sound[0].split(",")]
    nan[columns.index("size_bytes")] = "nan"
    damaged = [",".join(broken), ",".join(nan), sound[0] + ",7,8", sound[0][:9]]
    (folder / "layers.csv").write_text("\n".join([head, *damaged, *sound]))
    (run,) = read_runs([tmp_path])
    assert len(run.layers()) == len(sound)
    assert '<table class="layers"' in report(capsys, str(tmp_path), "--format", "html")


PAPERS = """\
method,model,dataset,w_bits,a_bits,policy,top1,float_top1,first_last,distillation,epochs,kind,source,table,verified,notes
lsq,resnet20,cifar10,4,4,uniform,90.5,91,8,no,200,rerun,someone/repo,README,yes,
lsq,resnet20,cifar10,4,4,uniform,92.0,,8,no,200,paper,arXiv 1,Table 1,yes,
lsq,resnet20,cifar10,2,2,uniform,88.0,,8,yes,200,paper,arXiv 1,Table 2,no,
"""


def test_the_papers_number_is_shown_for_exactly_the_same_case_only(tmp_path, capsys) -> None:
    papers = tmp_path / "papers.csv"
    papers.write_text(PAPERS)
    for bits in (2, 3, 4):
        make_run(tmp_path, f"w{bits}", bits=bits)
    listed = {r["bits"]: r for r in rows(capsys, tmp_path, "--papers", str(papers))}
    assert listed["W4A4"]["paper_top1"] == "92.0"  # the paper's own before a re-run
    assert float(listed["W4A4"]["difference"]) == pytest.approx(-1.0)
    assert listed["W3A3"]["paper_top1"] == listed["W3A3"]["difference"] == ""
    assert "paper with distillation" in listed["W2A2"]["flags"]
    assert "unverified" in report(capsys, str(tmp_path), "--papers", str(papers))


def test_a_re_run_by_others_is_not_passed_off_as_the_papers(tmp_path, capsys) -> None:
    papers = tmp_path / "papers.csv"
    papers.write_text("".join(PAPERS.splitlines(keepends=True)[:2]))
    make_run(tmp_path, "a")
    (row,) = rows(capsys, tmp_path, "--papers", str(papers))
    assert (row["paper_top1"], row["paper_kind"]) == ("90.5", "rerun")
    text = report(capsys, str(tmp_path), "--papers", str(papers))
    assert "90.5 (float 91; someone/repo, README; somebody's re-run)" in text


MIXED = """\
method,model,dataset,w_bits,a_bits,policy,top1,float_top1,first_last,distillation,epochs,kind,source,table,verified,notes
adq,resnet20,cifar10,2.81,,mixed,90.5,91,,,,paper,arXiv 1,abstract,yes,
lsq,resnet20,cifar10,3,4,mixed,90.0,92.5,8,no,10,paper,arXiv 2,Table 1,yes,
hawq,resnet20,cifar10,,,mixed,90.0,92.5,8,no,10,paper,arXiv 3,,yes,
"""


def mixed_run(root: Path, name: str, w_bits: float, a_bits: float, **fields: Any) -> None:
    own = {"weight_by_param": w_bits, "weight_by_layer": w_bits, "act_by_layer": a_bits}
    make_run(root, name, policy="sensitivity", **fields)
    path = root / name / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"bits": own}))


def test_a_mixed_paper_without_input_bits_is_shown_with_what_it_says(tmp_path, capsys) -> None:
    papers = tmp_path / "papers.csv"
    papers.write_text(MIXED)
    mixed_run(tmp_path, "near", 2.8, 3.4, method="adq")
    mixed_run(tmp_path, "known", 3.01, 3.99, method="lsq")
    mixed_run(tmp_path, "nothing", 5.0, 5.0, method="hawq")
    listed = {row["bits"]: row for row in rows(capsys, tmp_path, "--papers", str(papers))}
    near = listed["W2.8A3.4 sensitivity"]
    assert (near["paper_top1"], near["paper_bits"]) == ("90.5", "W2.81 (inputs unknown)")
    assert near["difference"] == near["drop_difference"] == ""
    assert "published at W2.81 (inputs unknown)" in near["flags"]
    assert float(listed["W3.01A3.99 sensitivity"]["difference"]) == pytest.approx(1.0)
    assert listed["W5A5 sensitivity"]["paper_bits"] == "unknown bits"
    assert listed["W5A5 sensitivity"]["difference"] == ""
    text = report(capsys, str(tmp_path), "--papers", str(papers))
    assert "| 90.5 at W2.81 (inputs unknown) (float 91; arXiv 1, abstract) | n/a |" in text
    mixed_run(tmp_path / "far", "run", 2.5, 3.4, method="adq")
    (far,) = rows(capsys, tmp_path / "far", "--papers", str(papers))
    assert far["paper_top1"] == ""


def test_a_paper_with_another_protocol_is_flagged_and_drops_are_compared(tmp_path, capsys) -> None:
    papers = tmp_path / "papers.csv"
    head, row, *_ = PAPERS.splitlines()
    papers.write_text(f"{head}\n{row.replace(',91,8,', ',92.5,fp32,')}\n")
    make_run(tmp_path, "a", top1=91.0)
    (found,) = rows(capsys, tmp_path, "--papers", str(papers))
    assert found["flags"] == (
        "published with 200 epochs (ours 10), first/last fp32 (ours 8), float 92.5 (ours 91.73)"
    )
    assert float(found["paper_drop"]) == pytest.approx(92.5 - 90.5)
    assert float(found["drop_difference"]) == pytest.approx((91.73 - 91.0) - (92.5 - 90.5))
    assert "| +0.50 / -1.27 |" in report(capsys, str(tmp_path), "--papers", str(papers))
    alike = row.replace(",200,", ",10,").replace(",91,8,", ",91.7,8,")
    papers.write_text(f"{head}\n{alike}\n")
    (found,) = rows(capsys, tmp_path, "--papers", str(papers))
    assert found["flags"] == ""


def test_what_a_paper_does_not_say_is_flagged_beside_a_re_run_that_does(tmp_path, capsys) -> None:
    papers = tmp_path / "papers.csv"
    head, row, *_ = PAPERS.splitlines()
    values = dict(zip(head.split(","), row.split(","), strict=True))
    silent = values | {"kind": "paper", "float_top1": "", "first_last": "", "epochs": ""}
    alike = values | {"top1": "89.5", "kind": "rerun", "source": "somebody", "first_last": "8"}
    other = alike | {"top1": "88.5", "first_last": "fp32"}
    lines = [",".join(v.values()) for v in (silent, alike, other)]
    papers.write_text("\n".join((head, *lines)) + "\n")
    make_run(tmp_path, "a", top1=91.0)
    (found,) = rows(capsys, tmp_path, "--papers", str(papers))
    assert found["paper_top1"] == "90.5"
    assert found["flags"].split("; ") == [
        "published with unknown float, epochs, first/last",
        f"re-run with first/last 8, somebody, {values['table']}: 89.5",
    ]


def test_borders_that_fusion_mixes_are_not_reported_as_counted(tmp_path, capsys) -> None:
    for name, fusion in (("c4", "none"), ("c6", "window")):
        health = {"borders_at_bound": {"conv1": 7}, "clamped_steps": {"conv1": 2}}
        parts = {"act": {"fusion": fusion}}
        make_run(tmp_path, name, method=name, quantizer=parts, health=health)
    flags = [row["flags"] for row in rows(capsys, tmp_path)]
    assert flags == ["borders at bound: 7; clamped steps: 2", "clamped steps: 2"]


def test_a_copy_of_a_run_is_no_second_run_of_its_seed(tmp_path, capsys) -> None:
    make_run(tmp_path, "results/a", finished="2026-01-02T00:00:00Z")
    make_run(tmp_path, "results/copy/a", finished="2026-01-02T00:00:00Z")
    (row,) = rows(capsys, tmp_path)
    assert (row["n"], row["flags"]) == ("1", "")
    assert len(row["folders"].split()) == 2  # both are told
    make_run(tmp_path, "results/b", finished="2026-01-01T00:00:00Z", top1=90.0)
    assert rows(capsys, tmp_path)[0]["flags"] == "seed 0 ran again: the newest counts"


def test_widths_are_ordered_by_weights_then_inputs(tmp_path, capsys) -> None:
    for i, (w, a) in enumerate([(2, 2), (4, 4), (2, 4)]):
        make_run(tmp_path, f"pact{i}", method="pact", w_bits=w, a_bits=a)
        make_run(tmp_path, f"lsq{i}", w_bits=w, a_bits=a)
    assert [f"{row['method']} {row['bits']}" for row in rows(capsys, tmp_path)] == [
        "lsq W4A4", "pact W4A4", "lsq W2A4", "pact W2A4", "lsq W2A2", "pact W2A2",
    ]  # fmt: skip


def test_a_method_that_trains_nothing_has_no_best_epoch(tmp_path, capsys) -> None:
    make_run(tmp_path, "a", method="nearest", best_selected_on="none", best_epoch=None)
    (row,) = rows(capsys, tmp_path)
    assert row["top1_best_epoch"] == row["best_epoch_selected_on"] == ""
    text = report(capsys, str(tmp_path))
    assert "selected" not in text
    head, _, line = [x for x in text.splitlines() if x.startswith("|")][:3]
    assert line.split(" | ")[head.split(" | ").index("best epoch")] == "n/a"


class _Structure(HTMLParser):
    """Checks that every tag closes, and collects what the page would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.fetched += [values[k] or "" for k in ("src",) if k in values]
        self.links += [values["href"] or ""] if tag == "a" else []
        if tag not in ("meta", "img", "br", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_html_page_is_self_contained_and_links_to_each_run(tmp_path, capsys) -> None:
    for seed in (0, 1):
        make_run(tmp_path / "runs", f"a{seed}", seed=seed, top1=91 + seed)
    make_run(tmp_path / "runs", "b", method="<i>", bits=2, state="failed", error="a < b & c")
    out = tmp_path / "page" / "report.html"
    assert report(capsys, str(tmp_path / "runs"), "--out", str(out)) == ""
    text = out.read_text()
    page = _Structure()
    page.feed(text)
    assert page.open == []
    assert page.fetched
    assert all(source.startswith("data:image/") for source in page.fetched)
    assert "&lt;i&gt;" in text
    assert "a &lt; b &amp; c" in text
    local = [link for link in page.links if not link.startswith("#")]
    assert any(link.endswith("a0/result.json") for link in local)
    assert all((out.parent / link).exists() for link in local)


def test_a_wide_table_scrolls_in_its_own_box_and_keeps_its_first_column(tmp_path, capsys) -> None:
    make_run(tmp_path, "a")
    text = report(capsys, str(tmp_path), "--format", "html")
    assert '<div class="wide"><table class="rows">' in text
    assert ".wide { overflow-x: auto; }" in text
    assert ".rows tr > :first-child { position: sticky; left: 0;" in text
    head = text.split("<thead>")[1].split("</thead>")[0]
    first = [cell.split("<")[0] for cell in head.split('">')[1:]][:5]
    assert first == ["method", "bits", "top-1, last epoch", "drop", "float"]  # with nothing empty
    papers = tmp_path / "papers.csv"
    papers.write_text(PAPERS)
    text = report(capsys, str(tmp_path), "--format", "html", "--papers", str(papers))
    assert '<th class="text">published</th>' in text


def test_the_examples_of_the_help_name_folders_that_exist() -> None:
    named = re.findall(r"results/[\w/-]+", EXAMPLES)
    assert named
    assert all((Path(__file__).parents[1] / name).is_dir() for name in named)


def test_the_format_follows_the_files_ending(tmp_path, capsys) -> None:
    make_run(tmp_path / "runs", "a")
    main([str(tmp_path / "runs"), "--out", str(tmp_path / "t.csv")])
    assert (tmp_path / "t.csv").read_text().startswith("table,recipe,dataset,")


def test_no_runs_says_how_to_train_one(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RunError) as error:
        main([])
    assert str(error.value) == (
        "report: no runs under 'outputs'. Train one with: qexp train quantizer=lsq bits=4."
    )


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["nowhere"], "report: folder 'nowhere' does not exist."),
        (
            ["outputs", "out=x.html"],
            "report: 'out=x.html' is no folder. Options of report begin with two dashes: "
            "--out x.html.",
        ),
        (
            ["fromat=md"],
            "report: 'fromat=md' is no folder. Options of report begin with two dashes: "
            "--out, --format, --group, --against, --papers. Did you mean 'format'?",
        ),
        (["--group", "modle"], "report: cannot group by 'modle'."),
        (["--papers", "none.csv"], "report: no file 'none.csv'."),
        (["--out", "table.pdf"], "report: 'table.pdf' ends in none of .md, .csv, .html."),
    ],
)
def test_a_wrong_argument_is_one_line_with_exit_code_2(tmp_path, monkeypatch, argv, line) -> None:
    make_run(tmp_path / "outputs", "a")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as error:
        main(argv)
    assert str(error.value).startswith(line)
    assert "\n" not in str(error.value)


def test_importing_report_loads_no_torch() -> None:
    code = "import qexp.report.command, sys; print({'torch', 'matplotlib'} & set(sys.modules))"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert answer.stdout.strip() == "set()", answer.stderr
