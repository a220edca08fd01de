"""The float network that quantization starts from.

`model.checkpoint` is a path, a torchvision weights name, or `auto`. `auto` looks for a finished
float run with the same data set, model and float recipe (`float.*`) and seed 0 under `out`, and
trains one there if there is none; all methods and seeds of a comparison so share one start.
Concurrent jobs wait for the one that trains.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from qexp.runner.folder import read_status
from qexp.runner.run import Run, open_run

FLOAT_SEED = 0


def float_config(cfg: DictConfig) -> DictConfig:
    """The config of the float run that `auto` stands for."""
    sub = OmegaConf.create(OmegaConf.to_container(cfg, resolve=True))
    assert isinstance(sub, DictConfig)
    with open_dict(sub):
        sub.recipe = sub.float
        sub.quantizer = {"name": "fp32", "weight": None, "act": None, "outer": None}
        sub.seed = FLOAT_SEED
        sub.model.checkpoint = None
    return sub


def fingerprint(cfg: DictConfig) -> str:
    """Hash of what makes two float runs the same: data, model, recipe, seed, max_steps."""
    plain: Any = OmegaConf.to_container(cfg, resolve=True)
    plain["model"].pop("checkpoint", None)
    for place in ("root", "download"):
        plain["dataset"].pop(place, None)
    plain["dataset"].pop("workers", None)
    for idle in ("plots", "save_every", "calibration_images"):  # no effect on a float network
        plain["recipe"].pop(idle, None)
    key = {k: plain.get(k) for k in ("dataset", "model", "recipe", "seed", "max_steps")}
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]


def find(folder: Path, wanted: str, states: Sequence[str] = ("done",)) -> Path | None:
    """A float run under `folder` with this fingerprint and a checkpoint, in one of `states`."""
    for status in sorted(folder.glob("**/status.json")):
        run = status.parent
        try:
            if read_status(run).get("state") not in states or not (run / "last.pt").exists():
                continue
            config = OmegaConf.load(run / "config.yaml")
        except (OSError, ValueError, KeyError):
            continue  # a run being written, or not ours
        assert isinstance(config, DictConfig)
        if config.quantizer.get("name") == "fp32" and fingerprint(config) == wanted:
            return run
    return None


def float_checkpoint(cfg: DictConfig, run: Run) -> Path:
    """The `last.pt` of the float run that `auto` stands for; trains it first if need be."""
    from qexp.recipes.qat import qat

    sub = float_config(cfg)
    wanted = fingerprint(sub)
    folder = Path(cfg.out) / f"{cfg.dataset.name}-{cfg.model.name}" / "fp32"
    folder.mkdir(parents=True, exist_ok=True)
    with _lock(folder / f".{wanted}.lock"):
        found = find(folder, wanted)
        if found is None:
            begun = find(folder, wanted, ("dead", "interrupted"))
            known = f"{cfg.dataset.name}-{cfg.model.name}"
            run.info(
                f"float baseline: none yet for {known}, training it"
                if begun is None
                else f"float baseline: {begun} was interrupted, going on with it"
            )
            place = begun or folder / f"auto-{wanted}"
            with open_run(place, sub, resume=begun is not None) as child:
                child.finish(qat(sub, child))
            found = child.dir
        else:
            run.info(f"float baseline: {found}")
    return found / "last.pt"


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
