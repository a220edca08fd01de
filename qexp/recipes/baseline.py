"""The float network that quantization starts from.

`model.checkpoint` is a path, a torchvision weights name, or `auto`. `auto` looks for a finished
float run with the same data set, model and float recipe (`float.*`) and seed 0 under `out`, and
trains one there if there is none; all methods and seeds of a comparison so share one start.
`max_steps` ends it early too, but a whole one that is there already is taken before. Concurrent
jobs wait for the one that trains. One of its own that was interrupted it goes on with,
as that run was begun; a run that somebody else began it leaves alone.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from qexp.errors import QexpError
from qexp.runner.folder import RESULT, read_config, read_json, read_status, run_config
from qexp.runner.run import Run, open_run

FLOAT_SEED = 0
AUTO = "auto-"  # folders of networks trained here are called so, with their fingerprint


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


def fingerprint(cfg: DictConfig, contents: str | None = None) -> str:
    """Hash of what makes two float runs the same: data, model, recipe, seed, max_steps.

    Args:
        contents: of a data set that is the user's own (`Folder.protocol`): its place says nothing.
    """
    plain: Any = OmegaConf.to_container(cfg, resolve=True)
    plain["model"].pop("checkpoint", None)
    for place in ("root", "download"):
        plain["dataset"].pop(place, None)
    plain["dataset"].pop("workers", None)
    for idle in ("plots", "save_every", "calibration_images"):  # no effect on a float network
        plain["recipe"].pop(idle, None)
    distill = plain["recipe"].get("distill") or {}
    if not distill.get("model"):  # as in runs from before there was the option
        distill.pop("model", None)
    key = {k: plain.get(k) for k in ("dataset", "model", "recipe", "seed", "max_steps")}
    if contents is not None:
        key["contents"] = contents
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]


def find(folder: Path, wanted: str) -> Path | None:
    """A finished float run under `folder` with this fingerprint and a checkpoint.

    One that was resumed with other settings, or trained by several processes, is another network.
    """
    for status in sorted(folder.glob("**/status.json")):
        run = status.parent
        state, protocol = read_status(run), read_json(run / RESULT).get("protocol") or {}
        if state.get("state") != "done" or not (run / "last.pt").exists():
            continue
        if state.get("segments") or protocol.get("processes", 1) > 1:
            continue
        try:
            config = run_config(run, "run")
            own = fingerprint(config, protocol.get("contents"))
        except (QexpError, ValueError, KeyError):
            continue  # a run being written, or not ours
        if config.quantizer.get("name") == "fp32" and own == wanted:
            return run
    return None


def interrupted(folder: Path, wanted: str, contents: str | None = None) -> Path | None:
    """A float network that `auto` began under `folder` and that has not come to its end.

    One that somebody went on with otherwise since is another network.
    """
    for run in sorted(folder.glob(f"{AUTO}{wanted}*")):
        status = read_status(run)
        ended = status.get("state") in ("dead", "interrupted", "failed")
        if not ended or status.get("segments") or not (run / "last.pt").exists():
            continue
        with suppress(QexpError, ValueError, KeyError):  # a damaged config is nobody's
            if fingerprint(run_config(run, "run"), contents) == wanted:
                return run
    return None


def begun_config(run: Path, cfg: DictConfig) -> DictConfig:
    """The config of the begun float run in `run`, to be computed where and how `cfg` says.

    What has no part in a float network, as `bits`, stays as whoever began it had it.
    """
    own = read_config(run / "config.yaml", f"Delete {run}: it is trained again.", "run")
    with open_dict(own):
        own.dataset = cfg.dataset  # they differ in the place at most
        for key in ("device", "compile", "threads"):
            own[key] = cfg[key]
    return own


def float_checkpoint(cfg: DictConfig, run: Run, contents: str | None = None) -> Path:
    """The `last.pt` of the float run that `auto` stands for; trains it first if need be.

    Args:
        contents: see `fingerprint`.
    """
    from qexp.recipes.qat import qat

    sub = float_config(cfg)
    wanted = fingerprint(sub, contents)
    folder = _folder(cfg)
    folder.mkdir(parents=True, exist_ok=True)
    with _lock(folder / f".{wanted}.lock"):
        found = _whole_or_cut(sub, folder, contents)
        if found is not None:
            run.info(f"float baseline: {found}")
            return found / "last.pt"
        begun = interrupted(folder, wanted, contents)
        if begun is None:
            known = f"{cfg.dataset.name}-{cfg.model.name}"
            run.info(f"float baseline: none yet for {known}, training it")
            if cfg.max_steps is not None:
                run.warn(f"max_steps={cfg.max_steps} ends the float baseline early too")
        else:
            run.info(f"float baseline: {begun} was interrupted, going on with it")
            sub = begun_config(begun, sub)
        place = begun or folder / f"{AUTO}{wanted}"
        with open_run(place, sub, resume=begun is not None) as child:
            child.finish(qat(sub, child))
        return child.dir / "last.pt"


def trained_checkpoint(cfg: DictConfig, contents: str | None = None) -> str | None:
    """The `last.pt` of the float run that `auto` stands for; None if none is there and finished.

    Args:
        contents: see `fingerprint`.
    """
    run = _whole_or_cut(float_config(cfg), _folder(cfg), contents)
    return None if run is None else str(run / "last.pt")


def _whole_or_cut(cfg: DictConfig, folder: Path, contents: str | None) -> Path | None:
    """The float run of a config of one, rather one that `max_steps` did not end early."""
    whole = OmegaConf.merge(cfg, {"max_steps": None})
    assert isinstance(whole, DictConfig)
    found = find(folder, fingerprint(whole, contents))
    return found or (None if cfg.max_steps is None else find(folder, fingerprint(cfg, contents)))


def _folder(cfg: DictConfig) -> Path:
    return Path(cfg.out) / f"{cfg.dataset.name}-{cfg.model.name}" / "fp32"


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
