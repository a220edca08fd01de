"""Fixtures: the real `qexp`, called in this process from an empty folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import standin
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig

from qexp import cli


class Said(NamedTuple):
    """What a command returned and wrote."""

    code: int
    out: str
    err: str


Qexp = Callable[..., Said]


@pytest.fixture(autouse=True)
def kernels_compile_at_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests use small tensors, which `compile=kernels` would otherwise run eagerly."""
    monkeypatch.setattr("qexp.quant.functional.SMALL", 0)


@pytest.fixture(autouse=True)
def the_machine_is_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """What else runs beside the tests is none of their business."""
    monkeypatch.setattr("qexp.runner.idle.idle_cores", lambda: None)


@pytest.fixture
def qexp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Qexp:
    """Call `qexp` as a shell would: `qexp("train", "bits=4") -> (code, out, err)`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QEXP_COMMAND", "")  # restored afterwards: main sets it
    monkeypatch.delenv("QEXP_TRACEBACK", raising=False)
    standin.seen.clear()

    def call(*argv: str) -> Said:
        GlobalHydra.instance().clear()
        code = cli.main(argv)
        HydraConfig.instance().cfg = None  # else the next check names this one
        out, err = capsys.readouterr()
        return Said(code, out, err)

    return call


@pytest.fixture
def tiny(qexp: Qexp, tmp_path: Path) -> Qexp:
    """`qexp train` with the stand-in recipe: `tiny("bits=4")`."""
    standin.write_configs(tmp_path / "conf")

    def call(*argv: str) -> Said:
        return qexp("train", "--config-dir", "conf", *standin.TINY, *argv)

    return call
