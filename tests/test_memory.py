"""How much memory a piece of work takes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from qexp.runner.memory import Peak

CPU = torch.device("cpu")
MB = 2**20

linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux starts its mark anew")


@linux
def test_a_small_piece_of_work_after_a_large_one_has_its_own_peak() -> None:
    rises = []
    for size in (256, 32):
        peak = Peak(CPU)
        torch.ones(size * MB // 4)
        rises.append(peak.rise())
    assert rises[0] == pytest.approx(256 * MB, rel=0.1)
    assert rises[1] == pytest.approx(32 * MB, rel=0.3)


def test_a_system_that_cannot_start_the_mark_anew_gives_no_number(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*given: Any, **more: Any) -> Any:
        raise PermissionError

    monkeypatch.setattr(Path, "write_text", refuse)
    assert Peak(CPU).rise() is None
