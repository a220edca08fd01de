"""results/papers.csv: complete rows, honest marks; and the README's tables made from results/."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from qexp.errors import ConfigError
from qexp.models.digest import network_sha256, weights_sha256
from qexp.report.papers import COLUMNS, KINDS, VERIFIED, matches, read_papers

ROOT = Path(__file__).parents[1]
CSV = ROOT / "results" / "papers.csv"
PAPERS = read_papers(CSV)
OURS = {path.stem for path in (ROOT / "configs" / "quantizer").glob("*.yaml")}
# Names a paper's method must not be spelled by where we have a config of that method.
OTHER_SPELLINGS = {"lsq+": "lsqplus", "lsq_plus": "lsqplus", "dorefa-net": "dorefa"}


def _where(paper: Any) -> tuple[Any, ...]:
    return (paper.method, paper.model, paper.w_bits, paper.a_bits, paper.source)


def test_every_row_has_a_source_and_known_marks() -> None:
    assert len(PAPERS) > 100
    for paper in PAPERS:
        assert paper.method, _where(paper)
        assert paper.model, _where(paper)
        assert paper.source, _where(paper)
        assert paper.dataset in ("imagenet", "cifar10"), _where(paper)
        assert paper.kind in KINDS, _where(paper)
        assert paper.verified in VERIFIED, _where(paper)
        assert paper.policy in ("uniform", "mixed"), _where(paper)
        assert paper.distillation in ("yes", "no", ""), _where(paper)
        assert paper.first_last in ("8", "fp32", "same", ""), _where(paper)
        assert paper.epochs == "" or int(paper.epochs) > 0, _where(paper)


def test_accuracies_are_percent_and_no_row_appears_twice() -> None:
    for paper in PAPERS:
        assert 1 < paper.top1 < 100, _where(paper)
        assert paper.float_top1 is None or 50 < paper.float_top1 < 100, _where(paper)
    keys = [(*_where(p), p.policy, p.distillation, p.table, p.dataset, p.kind) for p in PAPERS]
    assert len(keys) == len(set(keys))


def test_a_number_nobody_could_confirm_says_so() -> None:
    doubtful = {(p.method, p.dataset) for p in PAPERS if p.verified == "no"}
    assert doubtful == {("lcq", "cifar10"), ("brecq", "imagenet")}
    assert all("memory" in p.notes for p in PAPERS if p.verified == "no")


def test_what_was_read_in_the_source_does_not_leave_its_table_open() -> None:
    assert not [_where(p) for p in PAPERS if p.verified == "yes" and " or " in p.table]


def test_asq_has_no_absolute_number_because_none_is_known() -> None:
    assert not [p for p in PAPERS if p.method == "asq"]


def test_methods_are_named_as_our_configs_are() -> None:
    named = {paper.method for paper in PAPERS}
    assert not named & set(OTHER_SPELLINGS)
    for method in named:
        close = method.replace("-", "").replace("_", "").replace("+", "plus")
        assert method in OURS or close not in OURS, f"{method} is config {close}"


def test_every_published_case_of_the_apot_readme_is_found_by_its_key() -> None:
    case: dict[str, Any] = {"dataset": "cifar10", "mixed": False, "distilled": False}
    (found,) = matches(PAPERS, method="apot", model="resnet20", w_bits=4.0, a_bits=4.0, **case)
    assert (found.top1, found.float_top1, found.verified) == (92.45, 92.96, "yes")
    case_of_theirs = {"method": "apot_released", "model": "resnet20", **case}
    assert matches(PAPERS, w_bits=4.0, a_bits=4.0, **case_of_theirs) == [found]
    case["model"] = "resnet20"
    assert not matches(PAPERS, method="apot", w_bits=8.0, a_bits=8.0, **case)
    assert not matches(PAPERS, method="fp32", w_bits=32.0, a_bits=32.0, **case)


def test_a_mixed_average_never_matches_a_uniform_width() -> None:
    case: dict[str, Any] = {"method": "lsq", "model": "resnet18", "dataset": "imagenet"}
    widths: dict[str, Any] = {"w_bits": 3.0, "a_bits": 3.0, "distilled": False}
    assert not matches(PAPERS, **case, **widths, mixed=True)
    assert matches(PAPERS, **case, **widths, mixed=False)


@pytest.mark.parametrize(
    ("cell", "line"), [("abc", "top1 'abc' is no number"), ("", "top1 is empty")]
)
def test_a_bad_cell_is_named_with_its_line(tmp_path: Path, cell: str, line: str) -> None:
    values = {"method": "lsq", "w_bits": "4", "a_bits": "4", "top1": cell}
    row = ",".join(values.get(column, "") for column in COLUMNS)
    path = tmp_path / "papers.csv"
    path.write_text(f"{','.join(COLUMNS)}\n{row}\n")
    with pytest.raises(ConfigError, match=rf"papers.csv, line 2: {line}"):
        read_papers(path)


def test_a_table_of_papers_without_a_column_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "papers.csv"
    path.write_text(",".join(c for c in COLUMNS if c not in ("top1", "table")) + "\n")
    with pytest.raises(ConfigError, match=r"papers.csv lacks the columns top1, table\."):
        read_papers(path)


def _script(name: str = "make_tables") -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / f"scripts/{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", _script().PAGES)
def test_the_tables_of_pages_are_what_results_say(page: str) -> None:
    path = ROOT / page
    text = path.read_text()
    assert "<!-- table:" in text
    assert _script().rebuild(text, ROOT, path.parent) == text, "run: make table"


def _result(root: Path, name: str, seed: int, **fields: Any) -> None:
    folder = root / "results" / "demo" / name
    folder.mkdir(parents=True)
    result = {
        "method": "pact", "dataset": "cifar10", "model": "resnet20", "policy": "uniform",
        "w_bits": 4, "a_bits": 4, "top1": 90.0 + seed, "fp32_top1": 91.73, "seed": seed,
        "protocol": {"epochs": 10}, "protocol_hash": "aaaa", "commit": "c0",
    }  # fmt: skip
    (folder / "result.json").write_text(json.dumps({**result, **fields}))
    (folder / "config.yaml").write_text(f"seed: {seed}\n")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A README with a stale table, and results of two methods, two protocols, one failure."""
    for seed in (0, 1):
        _result(tmp_path, f"a{seed}", seed)
    _result(tmp_path, "b", 0, method="lsq", w_bits=2, a_bits=2, top1=85.5)
    _result(tmp_path, "c", 0, protocol={"epochs": 60}, protocol_hash="bbbb", top1=92.0)
    control = {"method": "fp32", "policy": "float", "w_bits": 32, "a_bits": 32, "top1": 92.3}
    _result(tmp_path, "d", 0, **control)
    (tmp_path / "results/demo/command.txt").write_text("qexp train -m experiment=demo\n")
    (tmp_path / "results/papers.csv").write_text(CSV.read_text())
    (tmp_path / "README.md").write_text("# x\n<!-- table:demo -->\nold\n<!-- /table -->\nend\n")
    return tmp_path


def test_make_tables_check_fails_until_the_readme_is_rebuilt(project: Path) -> None:
    script = _script()
    assert script.main(["--check", "--root", str(project)]) == 1
    assert script.main(["--root", str(project)]) == 0
    assert script.main(["--check", "--root", str(project)]) == 0
    text = (project / "README.md").read_text()
    assert text.startswith("# x\n<!-- table:demo -->\n")
    assert text.endswith("<!-- /table -->\nend\n")
    (project / "results/demo/b/result.json").unlink()
    assert script.main(["--check", "--root", str(project)]) == 1


def test_the_figure_was_drawn_from_what_results_say() -> None:
    assert _script("plot_results").main(["--check"]) == 0, "run: make table"


def test_the_figure_is_drawn_anew_where_a_number_moved(tmp_path: Path) -> None:
    script = _script("plot_results")
    (tmp_path / "docs").mkdir()
    for name in script.SHOWN:
        shutil.copytree(ROOT / "results" / name, tmp_path / "results" / name)
    assert script.main(["--check", "--root", str(tmp_path)]) == 1
    assert script.main(["--root", str(tmp_path)]) == 0
    assert script.main(["--check", "--root", str(tmp_path)]) == 0
    path = tmp_path / "results/cifar10_qat_short/lsq-w4a4-s0/result.json"
    result = json.loads(path.read_text())
    path.write_text(json.dumps(result | {"top1": result["top1"] + 0.1}))
    assert script.main(["--check", "--root", str(tmp_path)]) == 1
    floats, dots = script.read(tmp_path)
    (moved,) = (d for d in dots if (d.method, d.bits) == ("lsq", "W4A4"))
    assert (moved.top1, moved.std, moved.n) == (round(result["top1"] + 0.1, 2), None, 1)
    assert set(floats.values()) == {91.73}
    assert len({(d.table, d.method, d.bits) for d in dots}) == len(dots)
    path.write_text(json.dumps(result | {"protocol_hash": "00000000"}))  # one of another protocol
    assert len(script.read(tmp_path)[1]) == len(dots) - 1


def test_links_lead_from_the_folder_of_the_page(project: Path) -> None:
    page = project / "docs/results.md"
    page.parent.mkdir()
    page.write_text((project / "README.md").read_text())
    assert _script().main(["--check", "--root", str(project)]) == 1
    assert _script().main(["--root", str(project)]) == 0
    assert "[85.50](../results/demo/b)" in page.read_text()
    assert _script().main(["--check", "--root", str(project)]) == 0


def test_a_table_of_float_networks_alone_has_its_numbers(project: Path) -> None:
    for name in ("a0", "a1", "b", "c"):
        (project / f"results/demo/{name}/result.json").unlink()
    text = _script().rebuild((project / "README.md").read_text(), project)
    assert "| fp32 | [92.30](results/demo/d) |" in text


def test_mixed_widths_stand_last_and_are_asked_of_no_other_method(project: Path) -> None:
    widths = {"bits": {"weight_by_param": 3.0, "act_by_layer": 3.44}}
    _result(project, "m", 0, method="lsq", policy="sensitivity", top1=88.0, **widths)
    text = _script().rebuild((project / "README.md").read_text(), project)
    assert "| method | W4A4 | W2A2 | mixed | published |" in text
    assert "| lsq | missing | [85.50](results/demo/b) | W3A3.44 sensitivity: [88.00]" in text
    assert "[1](results/demo/a1)</sub> | missing | n/a |" in text


def test_readme_tables_split_protocols_and_link_every_number(project: Path) -> None:
    text = _script().rebuild((project / "README.md").read_text(), project)
    assert "protocol `aaaa`): epochs 10" in text
    assert "protocol `bbbb`): epochs 60" in text
    assert "90.50 ± 0.71 <sub>[0](results/demo/a0) [1](results/demo/a1)</sub>" in text
    assert "| lsq | missing | [85.50](results/demo/b) |" in text
    assert "float trained with the same schedule [92.30](results/demo/d)" in text
    assert "W4A4 90.8" in text  # PACT's own number
    assert "Published: pact W4A4 90.8 (" in text  # and where it stands
    assert "quoted at second hand" in text
    assert "Made by:\n\n```\nqexp train -m experiment=demo\n```" in text


def test_a_table_keeps_the_flags_of_its_rows(project: Path) -> None:
    bits = {"weight_by_param": 2.32, "act_by_layer": 2.0}
    _result(project, "e", 0, method="post_released", w_bits=2, a_bits=2, bits=bits, commit="x")
    _result(project, "f", 1, method="post_released", w_bits=2, a_bits=2, bits=bits, commit="y")
    text = _script().rebuild((project / "README.md").read_text(), project)
    assert "* 2 commits: post_released W2A2\n* holds more levels than 2 bit: 2.32: post_rel" in text


def test_a_float_control_keeps_its_flags(project: Path) -> None:
    again = {"method": "fp32", "policy": "float", "w_bits": 32, "a_bits": 32, "top1": 80.0}
    _result(project, "d2", 0, **again, commit="c1", finished="2026-01-01")
    text = _script().rebuild((project / "README.md").read_text(), project)
    assert "Flags:\n\n* seed 0 ran again: the newest counts: fp32 float\n" in text
    assert "Code at 2 commits: c0, c1." in text


def test_what_was_counted_stands_at_its_cell(project: Path) -> None:
    counted = {"health": {"clamped_steps": {"conv1": 2, "conv2": 1}}}
    for name in ("a0", "a1"):
        path = project / "results/demo" / name / "result.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | counted))
    text = _script().rebuild((project / "README.md").read_text(), project)
    assert "* clamped steps: pact W4A4 6\n" in text


def test_tables_of_one_folder_say_in_what_they_differ(project: Path) -> None:
    decay = {"protocol": {"epochs": 10, "weight_decay": 0.01}, "protocol_hash": "cccc"}
    _result(project, "e", 0, method="lsq", **decay)
    text = _script().rebuild((project / "README.md").read_text(), project)
    assert "(protocol `cccc`): epochs 10, weight_decay 0.01, calibrated" in text
    assert "(protocol `aaaa`): epochs 10, weight_decay -, calibrated" in text


def test_a_table_says_how_its_runs_were_calibrated(project: Path) -> None:
    text = _script().rebuild((project / "README.md").read_text(), project)
    assert text.count("calibrated on elements at a stride") == 2
    for name in ("a0", "a1", "b"):
        path = project / "results/demo" / name / "result.json"
        result = json.loads(path.read_text())
        path.write_text(json.dumps(result | {"protocol": {"epochs": 10, "act_sample": "random"}}))
    text = _script().rebuild((project / "README.md").read_text(), project)
    assert text.count("calibrated on random elements") == 1
    assert "float trained with the same schedule [92.30](results/demo/d)" in text


def test_a_run_is_collected_once_finished_or_not(tmp_path: Path) -> None:
    collect, table = _script("collect"), tmp_path / "results/demo"
    for number, (state, seed) in enumerate((("done", 0), ("failed", 1), ("failed", 1))):
        run = tmp_path / f"outputs/lsq-w4a4/{number}"
        run.mkdir(parents=True)
        (run / "status.json").write_text(json.dumps({"state": state}))
        (run / "config.yaml").write_text(f"seed: {seed}\n")
        (run / "metrics.jsonl").write_text(f"{number}\n")
        if state == "done":
            told = {"top1": 90.0, "seed": seed, "commit": "c0"}
            (run / "result.json").write_text(json.dumps(told))
    words = [str(table), str(tmp_path / "outputs"), "--unfinished"]
    for _ in range(2):
        assert collect.main(words) == 0
    names = ["lsq-w4a4-s0", "lsq-w4a4-s1", "lsq-w4a4-s1-2"]
    assert sorted(path.name for path in table.iterdir()) == names
    (tmp_path / "outputs/lsq-w4a4/1/env.json").write_text('{"dirty": true}')
    assert collect.main(words) == 1  # a failed run of code that no commit holds is refused too


def test_a_run_whose_result_is_damaged_is_not_collected(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "outputs/lsq-w4a4/0"
    run.mkdir(parents=True)
    (run / "status.json").write_text('{"state": "done"}')
    (run / "result.json").write_text('{"top1": 90.0, "se')
    _script("collect").main([str(tmp_path / "results/demo"), str(tmp_path / "outputs")])
    assert f"left out, failed: {run}" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


def test_what_is_not_collected_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    collect, table = _script("collect"), tmp_path / "results/demo"
    for number, (state, told) in enumerate((("failed", {}), ("done", {"top1": 90.0, "seed": 0}))):
        run = tmp_path / f"outputs/{number}"
        run.mkdir(parents=True)
        (run / "status.json").write_text(json.dumps({"state": state}))
        (run / "result.json").write_text(json.dumps(told))
    assert collect.main([str(table), str(tmp_path / "outputs")]) == 1
    error = capsys.readouterr().err
    assert f"left out, failed: {tmp_path / 'outputs/0'}" in error
    assert f"refused, no commit recorded: {tmp_path / 'outputs/1'}" in error
    assert collect.main([str(table), str(tmp_path / "nowhere")]) == 2
    assert f"no runs at or below: {tmp_path / 'nowhere'}" in capsys.readouterr().err
    assert not table.exists()


def test_a_collected_run_keeps_what_it_ran_on_and_the_hash_of_its_weights(tmp_path: Path) -> None:
    collect, run = _script("collect"), tmp_path / "outputs/fp32/1"
    run.mkdir(parents=True)
    (run / "status.json").write_text('{"state": "done"}')
    (run / "result.json").write_text('{"top1": 90.0, "seed": 0, "commit": "c0"}')
    env = {"cwd": "/home/me", "command": "qexp train", "packages": {"torch": "2.9"}, "threads": 1}
    (run / "env.json").write_text(json.dumps(env))
    weights = {"weight": torch.ones(2)}
    torch.save({"model": weights, "bits": None, "start": {}, "time": 1.0}, run / "last.pt")
    assert collect.main([str(tmp_path / "results/demo"), str(run)]) == 0
    kept = tmp_path / "results/demo/fp32-s0"
    assert json.loads((kept / "checkpoints.json").read_text()) == {
        "last.pt": network_sha256(weights)
    }
    told = json.loads((kept / "env.json").read_text())
    assert told == {"packages": {"torch": "2.9"}, "threads": 1}
    assert not (kept / "weights.safetensors").exists()
    assert collect.main([str(tmp_path / "results/demo"), str(run), "--weights"]) == 0
    assert weights_sha256(kept / "weights.safetensors") == network_sha256(weights)
