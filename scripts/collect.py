"""Copy runs into `results/`, as they are committed: small text files, no host names.

    python scripts/collect.py results/fashion_methods outputs/fashion_mini-resnet8 [...]

Every run below the given folders is copied to `TABLE/<name>-s<seed>[-k]/`: result.json,
config.yaml, layers.csv, metrics.jsonl, answers.npz, a status.json with its state and error, an
env.json with what numbers may depend on, and a checkpoints.json with the hashes of last.pt and
best.pt, as `float_sha256` of the runs that start from them has it. Weights stay where they are, but
with `--weights` those of last.pt are kept as weights.safetensors: a start for other runs.
A run whose tree differed from its commit, or that has none, is refused: its numbers cannot be
traced. A run that is not done is left out and named.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from qexp.models.digest import weights_sha256
from qexp.models.load import read_state
from qexp.report.runs import read_run
from qexp.runner.answers import ANSWERS
from qexp.runner.folder import RESULT, STATUS, find_runs, read_json, read_status

COPIED = (RESULT, "config.yaml", "layers.csv", "metrics.jsonl", ANSWERS)
CHECKPOINTS = ("last.pt", "best.pt")
WEIGHTS = "weights.safetensors"
ENVIRONMENT = ("commits", "python", "packages", "platform", "cpu", "threads", "gpus", "cuda")


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 1 when a run was refused, 2 when a folder holds none."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("table", type=Path)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--unfinished", action="store_true", help="take failed runs too")
    parser.add_argument("--weights", action="store_true", help="keep the network of last.pt")
    given = parser.parse_args(argv)
    found = {folder: list(find_runs(folder)) for folder in given.folders}
    if empty := [folder for folder, runs in found.items() if not runs]:
        print(f"no runs at or below: {', '.join(map(str, empty))}", file=sys.stderr)
        return 2
    refused = 0
    for run in (run for runs in found.values() for run in runs):
        state = read_run(run).state  # failed, too, where the result is damaged
        if state != "done" and not given.unfinished:
            print(f"left out, {state}: {run}", file=sys.stderr)
        elif why := untraceable(run):
            print(f"refused, {why}: {run}", file=sys.stderr)
            refused += 1
        else:
            target = copy(run, given.table)
            if given.weights:
                keep_weights(run, target)
            print(target)
    return int(bool(refused))


def untraceable(run: Path) -> str:
    """Why nobody could repeat this run; empty where somebody could."""
    told = [read_json(run / name) for name in (RESULT, "env.json")]
    if any(one.get("dirty") for one in told):
        return "uncommitted code"
    known = not told[0] or any(one.get("commit") for one in told)  # a run that failed has no number
    return "" if known else "no commit recorded"


def copy(run: Path, table: Path) -> Path:
    """Copy one run; an identical one that is there already is left alone."""
    name = f"{run.parent.name}-s{read_run(run).seed}"
    target, number = table / name, 1
    while target.exists() and not same(run, target):
        number += 1
        target = table / f"{name}-{number}"
    target.mkdir(parents=True, exist_ok=True)
    for file in COPIED:
        if (run / file).is_file():
            shutil.copyfile(run / file, target / file)
    status = read_status(run)
    kept = {key: status[key] for key in ("state", "error", "identity") if key in status}
    (target / STATUS).write_text(json.dumps(kept, indent=2) + "\n")
    env = read_json(run / "env.json")
    found = {
        "env.json": {key: env[key] for key in ENVIRONMENT if key in env},
        "checkpoints.json": {
            name: weights_sha256(run / name) for name in CHECKPOINTS if (run / name).is_file()
        },
    }
    for file, content in found.items():
        if content:
            (target / file).write_text(json.dumps(content, indent=2) + "\n")
    return target


def keep_weights(run: Path, target: Path) -> None:
    """Write what last.pt gives to a run that starts from it, as `model.checkpoint` reads it."""
    from safetensors.torch import save_file

    network = read_state(run / "last.pt")
    save_file({k: v.contiguous() for k, v in network.items()}, target / WEIGHTS)


def same(run: Path, target: Path) -> bool:
    """Whether `target` was copied from this run: what was copied is equal, and there is some."""
    pairs = [(run / name, target / name) for name in (RESULT, "metrics.jsonl")]
    texts = [tuple(p.read_bytes() if p.is_file() else b"" for p in pair) for pair in pairs]
    return any(mine for mine, _ in texts) and all(mine == theirs for mine, theirs in texts)


if __name__ == "__main__":
    raise SystemExit(main())
