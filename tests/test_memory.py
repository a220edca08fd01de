"""How much memory a piece of work takes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from qexp.runner.memory import Peak, _group_bytes, free_bytes

CPU = torch.device("cpu")
MB = 2**20

linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux starts its mark anew")


@linux
def test_a_small_piece_of_work_after_a_large_one_has_its_own_peak() -> None:
    if Peak(CPU).rise() is None:
        pytest.skip("this system does not start its mark anew")
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


@linux
def test_free_memory_is_part_of_the_machines() -> None:
    total = int(Path("/proc/meminfo").read_text().split()[1]) * 1024
    free = free_bytes(CPU)
    assert free is not None
    assert 0 < free < total


def test_the_tightest_control_group_counts(tmp_path: Path) -> None:
    def group(path: str, limit: str, used: int, spare: int) -> None:
        folder = tmp_path / path
        folder.mkdir(exist_ok=True)
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"file 7\ninactive_file {spare}\n")

    group("job", "1000", 700, 50)
    group("job/step", "max", 600, 50)
    group("job/step/task", "900", 600, 20)
    named = tmp_path / "cgroup"
    named.write_text("1:cpu:/elsewhere\n0::/job/step/task\n")
    assert list(_group_bytes(named, tmp_path)) == [320, 350]
    assert list(_group_bytes(tmp_path / "absent", tmp_path)) == []
