"""The README's own example of a quantizer works as printed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from compose import TINY

import qexp.export.header  # noqa: F401  # before the quantizer, as in a process that only reads
from qexp.cli import main

README = Path(__file__).parents[1] / "README.md"


def block(language: str, number: int = 1) -> str:
    text = README.read_text()
    return text.split(f"```{language}\n")[number].split("```")[0]


def test_a_quantizer_in_one_file_trains_within_its_bits_and_is_packed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    configs = tmp_path / "my_configs" / "quantizer" / "weight"
    configs.mkdir(parents=True)
    (tmp_path / "mine.py").write_text(block("python") + block("python", 2))
    (configs / "ternary.yaml").write_text(block("yaml"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(sys.path))
    command = ["train", "--config-dir", "my_configs", "quantizer=lsq", "quantizer/weight=ternary"]
    assert main([*command, *TINY, "bits=2", "out=runs", "recipe.epochs=1"]) == 0
    (result,) = (tmp_path / "runs").glob("*/*-w2a2/*/result.json")
    assert json.loads(result.read_text())["bits"]["weight_by_param"] == 2
    rows = (result.parent / "layers.csv").read_text().splitlines()
    assert {row.split(",")[6] for row in rows if row.startswith("layer1")} == {"3"}
    capsys.readouterr()
    assert main(["export", f"run={result.parent}"]) == 0
    for words in ((), ("checkpoint=model.safetensors",)):
        assert main(["eval", f"run={result.parent}", "device=cpu", *words]) == 0
    *_, ran, packed = capsys.readouterr().out.splitlines()
    assert ran.split(" | ")[:2] == packed.split(" | ")[:2]
