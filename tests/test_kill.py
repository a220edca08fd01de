"""kill -9 at random moments, again and again: the resumed run ends as the uninterrupted one."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from compose import TINY

from qexp.runner import checkpoint

KILLS = 20
OPTIONS = (*TINY, "recipe.epochs=400", "recipe.save_every=1")
MAIN = "import sys; from qexp.cli import main; sys.exit(main(sys.argv[1:]))"


def start(*arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", MAIN, *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_twenty_kills_change_nothing(tmp_path: Path) -> None:
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    assert start("train", *OPTIONS, f"out={tmp_path}", f"folder={whole}").wait() == 0

    # One checkpoint a step: many kills fall into a save. A kill before the first checkpoint
    # starts the run again from its beginning, which is a resume too.
    random.seed(0)
    process = start("train", *OPTIONS, f"out={tmp_path}", f"folder={folder}")
    kills = 0
    while kills < KILLS:
        wait_for(folder / "last.pt", process)
        time.sleep(random.uniform(0, 0.6))
        if process.poll() is not None:
            break  # it finished between two kills
        process.kill()
        process.wait()
        kills += 1
        checkpoint.load(folder / "last.pt")  # whatever the moment, the file is whole
        process = start("resume", str(folder))
        seen = (folder / "last.pt").stat().st_mtime_ns
        while process.poll() is None and (folder / "last.pt").stat().st_mtime_ns == seen:
            time.sleep(0.02)  # let it get on by at least a step
    assert kills == KILLS, "the run is too short for the kills: raise recipe.epochs"
    assert process.wait() == 0

    a, b = checkpoint.load(whole / "last.pt"), checkpoint.load(folder / "last.pt")
    assert all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"])
    assert all(
        x[key] == y[key]
        for x, y in zip(a["history"], b["history"], strict=True)
        for key in ("loss", "top1", "lr")
    )
    top1 = [json.loads((f / "result.json").read_text())["top1"] for f in (whole, folder)]
    assert top1[0] == top1[1]


def wait_for(path: Path, process: subprocess.Popen[bytes]) -> None:
    while not path.exists():
        assert process.poll() is None, "the run ended before its first checkpoint"
        time.sleep(0.05)
