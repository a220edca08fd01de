"""The commands beside committed results make them: those runs, and no others."""

from __future__ import annotations

import functools
import itertools
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from qexp.config import check, configs_dir
from qexp.report.runs import flatten
from qexp.schema import Train

ROOT = Path(__file__).parents[1]
# What may differ: where a run lay and how fast it went.
FREE = ("folder", "out", "threads", "device", "compile", "dry_run", "force", "sweep", "hydra")
# Jobs of a table's commands that left nothing in it, and why.
MORE = {
    "cifar10_qat_after_ptq": 1,  # the reconstruction that the others train on
    "ptq_cifar10_own": 1,  # the float network
}
# Of an older start, as is said there: today the same takes options that not every method has.
OTHERWISE = {"fashion_lsq_init"}
TABLES = sorted(
    path.parent.name
    for path in (ROOT / "results").glob("*/command.txt")
    if path.parent.name not in OTHERWISE and [*path.parent.glob("*/config.yaml")]
)


def jobs(command: str) -> Iterator[tuple[str, ...]]:
    """The overrides of each job that `qexp train ...` runs."""
    words = shlex.split(command)[2:]
    given = dict(word.split("=", 1) for word in words if word != "-m")
    for experiment in given.get("experiment", "").split(","):
        own = {"experiment": experiment} if experiment else {}
        every = {**(sweep(experiment) if "-m" in words else {}), **given, **own}
        values = (value.split(",") if "-m" in words else [value] for value in every.values())
        for chosen in itertools.product(*values):
            yield tuple(f"{key}={value}" for key, value in zip(every, chosen, strict=True))


def sweep(experiment: str) -> dict[str, str]:
    """What an experiment sweeps by itself."""
    path = configs_dir() / "experiment" / f"{experiment}.yaml"
    found = OmegaConf.select(OmegaConf.load(path), "hydra.sweeper.params") if experiment else None
    return {key: str(value) for key, value in (found or {}).items()}


def config(job: tuple[str, ...]) -> dict[str, Any]:
    """The job's config, flat, without what is free; its seed is put into that of seed 0."""
    seed = next((word.partition("=")[2] for word in job if word.startswith("seed=")), "0")
    plain = _composed(tuple(word for word in job if not word.startswith("seed=")))
    return {**plain, "seed": int(seed), "bitwidth.seed": int(seed)}


@functools.cache
def _composed(overrides: tuple[str, ...]) -> dict[str, Any]:
    with initialize_config_dir(str(configs_dir()), version_base="1.3"):
        cfg = compose("train", overrides=[*overrides, "folder=run"])
    return flat(OmegaConf.to_container(cfg, resolve=True))


def flat(tree: Any) -> dict[str, Any]:
    return {key: value for key, value in flatten(tree) if key.split(".")[0] not in FREE}


def differing(ran: Mapping[str, Any], job: Mapping[str, Any]) -> list[str]:
    """Options of both that differ; those that code since has added are not in what ran."""
    places = ("root", "plots")
    return [
        key
        for key in ran.keys() & job.keys()
        if ran[key] != job[key] and key.split(".")[-1] not in places
    ]


@pytest.mark.parametrize("table", TABLES)
def test_the_commands_of_a_table_make_its_runs_and_no_others(
    table: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QEXP_DATA", "data")
    folder = ROOT / "results" / table
    lines = (folder / "command.txt").read_text().splitlines()
    commands = [line for line in lines if line.startswith("qexp train")]
    todo = [(job, config(job)) for command in commands for job in jobs(command)]
    unmade = []
    for path in sorted(folder.glob("*/config.yaml")):
        ran = flat(yaml.safe_load(path.read_text()))
        fits = [pair for pair in todo if not differing(ran, pair[1])]
        if fits:
            todo.remove(fits[0])
        elif ran["recipe.name"] != "float":  # trained by the way, where checkpoint=auto asks
            near = min((differing(ran, own) for _, own in todo), key=len, default=["all"])
            unmade.append(f"{path.parent.name}: {', '.join(near)}")
    assert unmade == []
    assert len(todo) == MORE.get(table, 0), [" ".join(job) for job, _ in todo]


def test_a_sweep_of_experiments_is_one_of_each_with_its_own_values() -> None:
    found = [*jobs("qexp train -m experiment=ptq_cifar10_quick,smoke bits=4 seed=0,1")]
    assert len(found) == 2 * 6 + 2
    assert ("experiment=smoke", "bits=4", "seed=1") in found
    assert ("seed=1", "bits=4", "quantizer=aquant_twice", "experiment=ptq_cifar10_quick") in found


def shown(page: str) -> list[str]:
    """The `qexp train` lines of a page's code blocks, without their remarks."""
    blocks = (ROOT / page).read_text().split("```")[1::2]
    lines = (line.partition("#")[0].strip() for block in blocks for line in block.splitlines())
    ours = (line for line in lines if line.startswith("qexp train ") and "--config-dir" not in line)
    return list(dict.fromkeys(line for line in ours if "mypackage" not in line))


@pytest.mark.parametrize("page", ["README.md", "docs/results.md"])
def test_every_command_of_a_page_composes(page: str) -> None:
    commands = shown(page)
    assert len(commands) > 20
    for command in commands:
        job, *_ = jobs(command)
        with initialize_config_dir(str(configs_dir()), version_base="1.3"):
            check(compose("train", overrides=list(job)), Train)
