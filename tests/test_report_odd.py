"""`qexp report` on folders that are odd, damaged or unlike: nothing is mixed, nothing is lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_report import PROTOCOL, make_run, report, rows

from qexp.errors import ConfigError, RunError
from qexp.report.command import main
from qexp.report.papers import COLUMNS, read_papers


def configure(folder: Path, **changes: Any) -> None:
    """Replace parts of a run's config.yaml."""
    path = folder / "config.yaml"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_networks_and_data_of_one_name_are_told_apart_by_their_options(tmp_path, capsys) -> None:
    widths = {0: {"name": "resnet20", "width": 1.0}, 1: {"name": "resnet20", "width": 2.0}}
    noises = {2: {"name": "cifar10", "noise": 1}, 3: {"name": "cifar10", "noise": 32}}
    for seed in range(6):
        folder = make_run(tmp_path, f"run{seed}", seed=seed)
        model, data = widths.get(seed, widths[0]), noises.get(seed, noises[3])
        configure(folder, model=model, dataset=data)
    found = {row["method"]: row["seeds"] for row in rows(capsys, tmp_path)}
    assert found == {
        "lsq": "0 3 4 5",
        "lsq [model.width=2.0]": "1",
        "lsq [dataset.noise=1]": "2",
    }


def test_another_checkpoint_path_or_number_of_workers_is_no_other_row(tmp_path, capsys) -> None:
    for seed in (0, 1):
        folder = make_run(tmp_path, f"run{seed}", seed=seed)
        model = {"name": "resnet20", "checkpoint": f"/home/{seed}/float.pt"}
        configure(folder, model=model, dataset={"name": "cifar10", "workers": seed})
    assert [row["n"] for row in rows(capsys, tmp_path)] == ["2"]


@pytest.mark.parametrize(
    ("key", "value", "flag"),
    [
        ("max_steps", 10, "stopped after 10 steps"),
        ("subset", 500, "trained on 500 images"),
        ("segments", [{"epochs": 20}], "resumed with other settings"),
    ],
)
def test_a_cut_protocol_is_flagged_in_a_row_alone(tmp_path, capsys, key, value, flag) -> None:
    make_run(tmp_path, "a", protocol={**PROTOCOL, key: value})
    (row,) = rows(capsys, tmp_path)
    assert flag in row["flags"]


def test_a_drop_that_some_seeds_lack_is_flagged_and_not_compared(tmp_path, capsys) -> None:
    papers = tmp_path / "papers.csv"
    values = {"method": "lsq", "model": "resnet20", "dataset": "cifar10", "w_bits": "4",
              "a_bits": "4", "policy": "uniform", "top1": "90", "float_top1": "92",
              "kind": "paper", "verified": "yes", "source": "x"}  # fmt: skip
    papers.write_text(f"{','.join(COLUMNS)}\n{','.join(values.get(c, '') for c in COLUMNS)}\n")
    make_run(tmp_path, "a", seed=0)
    make_run(tmp_path, "b", seed=1, fp32_top1=None, drop=None)
    (row,) = rows(capsys, tmp_path, "--papers", str(papers))
    assert "drop known of 1 of 2 seeds" in row["flags"]
    assert (row["difference"], row["drop_difference"]) == ("1.0", "")


def test_a_mixed_row_has_the_mean_of_its_seeds_widths_and_says_how_they_spread(
    tmp_path, capsys
) -> None:
    for seed, weight in ((0, 2.81), (1, 3.51)):
        bits = {"weight_by_param": weight, "act_by_layer": 3.0}
        folder = make_run(tmp_path, f"run{seed}", seed=seed, policy="sensitivity", bits=3)
        path = folder / "result.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "bits": bits}))
    (row,) = rows(capsys, tmp_path)
    assert (row["bits"], row["w_bits"]) == ("W3.16A3 sensitivity", "3.16")
    assert "weight bits of 2.81 to 3.51" in row["flags"]


def test_runs_without_protocol_config_commit_or_seed_are_flagged_and_all_count(
    tmp_path, capsys
) -> None:
    make_run(tmp_path, "a", protocol={}, commit=None)
    path = tmp_path / "a/result.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "protocol": {}}))
    (row,) = rows(capsys, tmp_path / "a")
    assert "no commit recorded" in row["flags"]
    assert "no protocol recorded" in row["flags"]
    for name, top1 in (("b/0", 90.0), ("b/1", 92.0)):
        make_run(tmp_path, name, top1=top1, seed=None)
        (tmp_path / name / "config.yaml").unlink()
    (row,) = rows(capsys, tmp_path / "b")
    assert (row["n"], row["top1_mean"]) == ("2", "91.0")
    assert "no config: options unknown" in row["flags"]


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"protocol": "oops"}, "result.json holds no mapping under 'protocol'"),
        ({"health": [1]}, "result.json holds no mapping under 'health'"),
        ({"bits": {"weight_by_param": "two"}}, "result.json holds no number under 'bits.weight_"),
        ({"top1": 10**400}, "result.json holds no finite top1"),
        ({"top1": 1e308}, "result.json holds no top1 in percent"),
    ],
)
def test_a_field_of_another_kind_fails_one_run_and_not_the_report(
    tmp_path, capsys, fields, line
) -> None:
    make_run(tmp_path, "sound", seed=0)
    folder = make_run(tmp_path, "odd", seed=1)
    path = folder / "result.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    (row,) = rows(capsys, tmp_path)
    assert row["n"] == "1"
    assert f"seed 1 failed: {line}" in row["flags"]


def test_a_result_without_end_and_a_seed_that_is_none_fail_one_run(tmp_path, capsys) -> None:
    make_run(tmp_path, "sound")
    deep, odd = make_run(tmp_path, "deep", seed=1), make_run(tmp_path, "odd", seed=2)
    (deep / "result.json").write_text("[" * 100_000)
    told = json.loads((odd / "result.json").read_text())
    (odd / "result.json").write_text(json.dumps({**told, "seed": [2]}))
    with (deep / "metrics.jsonl").open("a") as file:
        file.write("[1, 2]\n")
    (row,) = rows(capsys, tmp_path)
    assert row["n"] == "1"
    assert "seed 1 failed: result.json holds no finite top1" in row["flags"]
    assert "seed [2] failed: result.json holds no number under 'seed'" in row["flags"]
    assert main([str(tmp_path), "--format", "html", "--out", str(tmp_path / "page.html")]) == 0


def test_runs_without_a_protocol_are_one_row_only_if_their_configs_agree(tmp_path, capsys) -> None:
    for seed, epochs in enumerate((10, 10, 3)):
        folder = make_run(tmp_path, str(seed), seed=seed, protocol={"epochs": epochs})
        told = json.loads((folder / "result.json").read_text())
        (folder / "result.json").write_text(
            json.dumps({**told, "protocol": None, "protocol_hash": None})
        )
    assert sorted(row["n"] for row in rows(capsys, tmp_path)) == ["1", "2"]


def test_a_count_that_is_null_is_none(tmp_path, capsys) -> None:
    make_run(tmp_path, "a", health={"clamped_steps": {"conv1": None, "fc": 2}, "other": None})
    (row,) = rows(capsys, tmp_path)
    assert row["flags"] == "clamped steps: 2"


def test_counts_of_several_runs_say_that_they_are_sums(tmp_path, capsys) -> None:
    for seed in (0, 1):
        make_run(tmp_path, f"run{seed}", seed=seed, health={"clamped_steps": {"conv1": 2}})
    (row,) = rows(capsys, tmp_path)
    assert row["flags"] == "clamped steps: 4 in 2 runs"


def test_linked_folders_are_read_and_a_circle_ends(tmp_path, capsys) -> None:
    make_run(tmp_path / "elsewhere", "a", seed=3)
    root = tmp_path / "root"
    root.mkdir()
    (root / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/back").symlink_to(root)
    assert [row["seeds"] for row in rows(capsys, root)] == ["3"]


def test_a_written_report_is_utf8_whole_or_the_old_one(tmp_path, monkeypatch, capsys) -> None:
    make_run(tmp_path, "a", method="lsq \N{GREEK SMALL LETTER BETA}\ud800")
    out = tmp_path / "report.md"
    out.write_text("old")
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", _full_disk)
        full = r"report: cannot write '.*report\.md': .*No space left.* Choose another --out\."
        with pytest.raises(RunError, match=full):
            main([str(tmp_path), "--out", str(out)])
    assert out.read_text() == "old"
    assert report(capsys, str(tmp_path), "--out", str(out)) == ""
    assert "lsq \N{GREEK SMALL LETTER BETA}\\ud800" in out.read_text(encoding="utf-8")


def _full_disk(*_: Any) -> None:
    raise OSError(28, "No space left on device")


def test_options_may_stand_between_folders(tmp_path, capsys) -> None:
    for name in "ab":
        make_run(tmp_path / name, "run", seed=ord(name))
    text = report(capsys, str(tmp_path / "a"), "--format", "csv", str(tmp_path / "b"))
    assert "97 98" in text


def test_names_with_marks_of_html_and_markdown_stay_text_and_links_work(tmp_path, capsys) -> None:
    folder = make_run(tmp_path, "a # ?%41", method="<b>|x", dataset="<i>\nd")
    page, text = report(capsys, str(tmp_path), "--format", "html"), report(capsys, str(tmp_path))
    assert "a%20%23%20%3F%2541/result.json" in page
    assert folder.name not in page.replace("a # ?%41:", "")
    assert "<i>" not in page
    assert "<i>" not in text
    assert "&lt;b>\\|x" in text


def test_several_commits_of_a_table_are_named_below_it(tmp_path, capsys) -> None:
    make_run(tmp_path, "a", method="lsq", commit="a" * 40)
    make_run(tmp_path, "b", method="asq", commit="b" * 40)
    assert "Code at aaaaaaaaaa, bbbbbbbbbb (2 of them)." in report(capsys, str(tmp_path))


def test_a_resumed_run_counts_all_its_commits(tmp_path, capsys) -> None:
    make_run(tmp_path, "a", commit="b" * 40, commits=["a" * 40 + " (dirty)", "b" * 40])
    (row,) = rows(capsys, tmp_path)
    assert row["flags"] == "2 commits"
    assert row["commits"] == f"{'a' * 40} {'b' * 40}"


@pytest.mark.parametrize(
    ("column", "value"),
    [("epochs", "90-120"), ("kind", "Paper"), ("verified", "maybe"), ("policy", "fixed")],
)
def test_a_mark_that_is_none_is_named_with_its_line(tmp_path: Path, column, value) -> None:
    values = {"method": "lsq", "top1": "90", "kind": "paper", "verified": "yes",
              "policy": "uniform", column: value}  # fmt: skip
    path = tmp_path / "papers.csv"
    path.write_text(f"{','.join(COLUMNS)}\n{','.join(values.get(c, '') for c in COLUMNS)}\n")
    with pytest.raises(ConfigError, match=f"papers.csv, line 2: {column} '{value}'"):
        read_papers(path)
