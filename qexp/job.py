"""What Hydra calls for each job: one run, or one job of a sweep.

A job never raises into Hydra, which would print a headline of its own and, in a sweep, tell only
of the first failure at the very end. A single run's error is kept for `cli.main`; a sweep's job
says its error at once, in one line, writes it to the sweep's `jobs.jsonl`, and lets the others go
on.
"""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from qexp import config, schema, sweep
from qexp.errors import ConfigError, origin
from qexp.runner.folder import run_state
from qexp.runner.overrides import outvoted


class Job:
    """A callable for `hydra.main`.

    Args:
        name: of a command of `cli.COMMANDS`.
        resume: continue the run in `cfg.folder` instead of starting one.
    """

    def __init__(self, name: str, *, resume: bool = False) -> None:
        self.name = name
        self.resume = resume
        self.__name__ = name  # hydra.main wraps it like a function
        self._error: BaseException | None = None

    def __call__(self, cfg: DictConfig) -> float | None:
        task = TASKS[self.name] if not self.resume else resume_run
        if sweep.is_sweep():
            return sweep.run_job(task, cfg)
        try:
            task(cfg)
        except Exception as error:
            self._error = error
        return None

    def raise_error(self) -> None:
        """Raise what the single run raised, if it did."""
        if self._error is not None:
            raise self._error


def train(cfg: DictConfig) -> dict[str, Any]:
    """`qexp train`: check, then print the plan (`dry_run`), or do the run if it is not done."""
    config.check(cfg, schema.Train)
    if done := sweep.done(cfg):
        return done
    if cfg.dry_run:
        print(_function("qexp.recipes.plan", "plan")(cfg))
        for line in _warnings(cfg):
            print(f"warning: {line}", file=sys.stderr)
        return {"status": "planned"}
    return _run(cfg, resume=False)


def resume_run(cfg: DictConfig) -> dict[str, Any]:
    """`qexp resume`: the run in `cfg.folder` goes on."""
    config.check(cfg, schema.Train)
    return _run(cfg, resume=True)


# Recipes that several processes can work on together.
TOGETHER = ("qexp.recipes.qat.qat",)


def _run(cfg: DictConfig, *, resume: bool) -> dict[str, Any]:
    from hydra.utils import get_method

    from qexp.recipes.outcome import closing
    from qexp.recipes.precheck import precheck
    from qexp.runner import distributed
    from qexp.runner.device import pick_device, set_threads
    from qexp.runner.idle import crowded
    from qexp.runner.run import open_run

    recipe = get_method(cfg.recipe._target_)
    if distributed.launched().size > 1 and cfg.recipe._target_ not in TOGETHER:
        raise ConfigError(
            f"qexp: recipe {cfg.recipe.name} runs in one process. Start it without torchrun."
        )
    # Now, while nothing is begun: interrupted in the midst of it, no `finally` that needs it works.
    importlib.import_module("torch._dynamo")
    precheck(cfg, resume=resume)
    began = time.perf_counter()
    with distributed.together(cfg.device) as world:
        resume = resume or (world.leads and _take_up(cfg))
        label = config.mixed_name(cfg.quantizer)
        with open_run(Path(cfg.folder), cfg, resume=resume, label=label) as run:
            sweep.began(run.dir)
            threads = set_threads(cfg.threads)  # put back when the run ends
            run.info(f"run: {run.dir}")
            if world.size > 1:
                run.info(f"processes: {world.size}, each {cfg.recipe.batch_size} images a step")
            for line in _warnings(cfg):
                run.warn(line)
            on_cpu = cfg.threads is None and pick_device(cfg.device).type == "cpu"
            if on_cpu and (line := crowded(threads)):
                run.warn(line)
            result = recipe(cfg, run)
            written = run.finish(result)
            if world.leads:
                run.info(closing(written))
    seconds = time.perf_counter() - began
    return {"status": "done", "top1": result.get("top1"), "seconds": seconds, "folder": run.dir}


def _warnings(cfg: DictConfig) -> list[str]:
    """What the command line or the config asks for without effect, a line each."""
    from qexp.recipes.unused import unused

    return [*outvoted(), *unused(cfg)]


def _take_up(cfg: DictConfig) -> bool:
    """Whether torchrun started this command again: then it goes on with the run it began."""
    from omegaconf import open_dict

    from qexp.runner import distributed
    from qexp.runner.folder import find_unfinished, identity

    processes, begun = distributed.world().size, None
    if distributed.restarts():
        begun = find_unfinished(Path(cfg.out), identity(cfg), processes)
    if begun is None:
        return False
    with open_dict(cfg):
        cfg.folder = str(begun)
    return True


def evaluate(cfg: DictConfig) -> dict[str, Any]:
    """`qexp eval`: print a finished run's top-1."""
    config.check(cfg, schema.Eval)
    if cfg.run and not Path(cfg.run, cfg.checkpoint).is_file() and Path(cfg.checkpoint).is_file():
        cfg.checkpoint = str(Path(cfg.checkpoint).resolve())  # `run=R checkpoint=R/last.pt`
    score = _function("qexp.recipes.evaluate", "evaluate_run")(cfg)
    print(
        f"top-1 {score['top1']:.2f} on {score['split']} of {score['dataset']} | "
        f"loss {score['loss']:.4f} | {score['images_per_s']:.0f} img/s | "
        f"{Path(score['run'], score['checkpoint'])}"
    )
    if (state := run_state(Path(score["run"]))) != "done":
        print(f"warning: that run is {state}, not done", file=sys.stderr)
    return {"status": "done", "top1": score["top1"], "folder": score["run"]}


def export(cfg: DictConfig) -> dict[str, Any]:
    """`qexp export`: pack a finished run."""
    config.check(cfg)
    _function("qexp.export", "export")(cfg)
    return {"status": "done"}


def bench_train(cfg: DictConfig) -> dict[str, Any]:
    """`qexp bench train`: time a training step."""
    config.check(cfg)
    _function("qexp.bench.train", "bench_train")(cfg)
    return {"status": "done"}


def bench_inference(cfg: DictConfig) -> dict[str, Any]:
    """`qexp bench inference`: time a forward pass."""
    config.check(cfg)
    _function("qexp.bench.inference", "bench_inference")(cfg)
    return {"status": "done"}


TASKS: dict[str, Callable[[DictConfig], dict[str, Any]]] = {
    "train": train,
    "eval": evaluate,
    "export": export,
    "bench train": bench_train,
    "bench inference": bench_inference,
}


def _function(module: str, name: str) -> Callable[..., Any]:
    """A function of a part of qexp; one line instead of a traceback where that part is absent."""
    try:
        return getattr(importlib.import_module(module), name)
    except (ModuleNotFoundError, AttributeError) as error:
        missing = getattr(error, "name", None)
        if isinstance(error, ModuleNotFoundError) and not str(missing).startswith("qexp"):
            raise ConfigError(
                f"qexp: this needs the package '{missing}'. Try: pip install 'qexp[export]'"
            ) from origin(error)
        raise ConfigError(
            f"qexp: this installation has no {module}.{name}. Reinstall it."
        ) from error
