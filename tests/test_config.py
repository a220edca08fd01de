"""Every YAML composes and fits what it names; a wrong value is told before anything is built."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
import standin
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, ListConfig, OmegaConf

from qexp.config import check, configs_dir, run_name
from qexp.errors import ConfigError
from qexp.schema import Outer, Train
from qexp.signature import says

CONFIGS = Path(__file__).parent.parent / "configs"
GROUPS = ("dataset", "model", "recipe", "bitwidth", "quantizer", "experiment")
CHOICES = [f"{g}={p.stem}" for g in GROUPS for p in sorted((CONFIGS / g).glob("*.yaml"))]
EXPERIMENTS = sorted((CONFIGS / "experiment").glob("*.yaml"))
PARTS = [
    f"quantizer/{side}={path.stem}"
    for side in ("weight", "act", "outer")
    for path in sorted((CONFIGS / "quantizer" / side).glob("*.yaml"))
]


def composed(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose("train", list(overrides))


@pytest.mark.parametrize("choice", [*CHOICES, *PARTS])
def test_a_choice_composes_and_fits_its_target(choice: str) -> None:
    own = ["model._target_=qexp.models.resnet.ResNet", "model.name=mine", "+model.depth=8"]
    check(composed(choice, *(own if choice == "model=custom" else ())), Train)


def test_what_a_custom_model_lacks_is_named_and_its_keywords_are_checked() -> None:
    found = problems(composed("model=custom"), Train)
    assert found == [
        "config: model._target_ has no value. Set model._target_=...",
        "config: model.name has no value. Set model.name=...",
    ]
    own = ["model._target_=qexp.models.resnet.ResNet", "model.name=mine", "+model.dept=8"]
    lines = problems(composed("model=custom", *own), Train)
    assert any("model.dept'" in line and "depth" in line for line in lines)


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda p: p.stem)
def test_every_leaf_of_an_experiment_survives_composition(path: Path) -> None:
    text = OmegaConf.load(path)
    cfg = composed(f"experiment={path.stem}")
    leaves = [leaf for leaf in _leaves(text) if leaf[0].split(".")[0] not in ("defaults", "hydra")]
    assert leaves
    for key, value in leaves:
        assert OmegaConf.select(cfg, key) == value, key


def _leaves(node: Any, path: str = "") -> list[tuple[str, Any]]:
    if isinstance(node, DictConfig):
        return [
            leaf
            for key in node
            for leaf in _leaves(node._get_node(key), f"{path}.{key}" if path else str(key))
        ]
    value = OmegaConf.to_container(node, resolve=False) if isinstance(node, ListConfig) else node
    text = getattr(value, "_value", lambda: value)()
    return [] if isinstance(text, str) and "${" in text else [(path, text)]


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda p: p.stem)
def test_an_experiment_says_what_it_claims_how_it_is_run_and_what_that_costs(path: Path) -> None:
    head = header(path)
    assert head.keys() & {"Claim", "Purpose"}
    assert {"Protocol", "Command", "Cost"} <= head.keys()
    assert re.search(r"\b\d[\d,.]* (h|min|s)\b", head["Cost"])
    runs = [math.prod(len(v) for v in options(c).values()) for c in commands(head["Command"])]
    if sum(runs) > 1:
        said = [int(n) for n in re.findall(r"\b(\d+) runs\b", head["Cost"])]
        assert {runs[0], sum(runs)} & set(said)


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda p: p.stem)
def test_the_commands_of_an_experiment_compose(path: Path) -> None:
    head = header(path)
    assert commands(head["Command"])
    for command in commands("\n".join(head.values())):
        swept = options(command)
        assert f"experiment={path.stem}" in command
        for values in itertools.zip_longest(*swept.values()):  # each value once, not every mix
            words = [
                f"{key}={own[0] if value is None else value}"
                for (key, own), value in zip(swept.items(), values, strict=True)
            ]
            check(composed(*words), Train)


def header(path: Path) -> dict[str, str]:
    """The paragraphs of an experiment's first comment, by the word that each begins with."""
    lines = itertools.takewhile(lambda line: line[0] == "#", path.read_text().splitlines()[1:])
    text = "\n".join(line.removeprefix("#").removeprefix(" ") for line in lines)
    found = re.split(r"^([A-Z][\w ]*):", text, flags=re.MULTILINE)
    return dict(zip(found[1::2], found[2::2], strict=True))


def commands(text: str) -> list[str]:
    """What follows `qexp train`, up to the end of the line or a remark."""
    return re.findall(r"qexp train (.+?)(?=\n|  | \(|$)", text)


def options(command: str) -> dict[str, list[str]]:
    """The values that each key of a command takes, with `-m` those of the experiment's sweep."""
    words = command.split()
    given = dict(word.split("=", 1) for word in words if word != "-m")
    text = OmegaConf.load(CONFIGS / "experiment" / f"{given['experiment']}.yaml")
    sweep = OmegaConf.select(text, "hydra.sweeper.params") if "-m" in words else None
    return {key: str(value).split(",") for key, value in {**(sweep or {}), **given}.items()}


def test_asq_lsq_is_the_pair_in_one_word() -> None:
    word = OmegaConf.to_container(composed("quantizer=asq_lsq").quantizer)
    pair = OmegaConf.to_container(composed("quantizer=asq", "quantizer/weight=lsq").quantizer)
    assert isinstance(word, dict)
    assert isinstance(pair, dict)
    assert word == pair | {"name": "lsq+asq"}  # how a run of the pair is named, below


def test_aquant_twice_is_an_option_of_aquant_in_one_word() -> None:
    word = composed("quantizer=aquant_twice")
    option = composed("quantizer=aquant", "quantizer.reconstruct.borders=both")
    assert (word.quantizer, word.recipe) == (option.quantizer, option.recipe)
    assert word.quantizer.reconstruct.borders == "both"


def test_defaults_have_self_first_and_experiment_last() -> None:
    defaults = [str(d) for d in OmegaConf.load(CONFIGS / "train.yaml").defaults]
    assert defaults[0] == "_self_"
    groups = [d for d in defaults if "override" not in d]
    assert "experiment" in groups[-1]
    order = [i for i, d in enumerate(groups) if "'recipe':" in d or "'quantizer':" in d]
    assert "recipe" in groups[order[0]]
    assert "quantizer" in groups[order[1]]


def test_configs_are_found_beside_the_package() -> None:
    assert configs_dir() == CONFIGS


# Names of folders


@pytest.mark.parametrize(
    ("quantizer", "bitwidth", "name"),
    [
        ({"name": "asq", "weight": 1, "act": 1}, {"weight": 2, "act": 4}, "asq-w2a4"),
        ({"name": "fp32", "weight": None, "act": None}, {"weight": 4, "act": 4}, "fp32"),
        (
            {"name": "lsq", "weight": {"_target_": "qexp.quant.quantizer.Identity"}, "act": 1},
            {"weight": 3, "act": 3},
            "lsq-w32a3",
        ),
        (
            {"name": "lsq", "weight": 1, "act": 1},
            {"name": "sensitivity", "budget": 3.5},
            "lsq-sensitivity3.5",
        ),
        (
            {"name": "lsq", "weight": 1, "act": 1},
            {"name": "sensitivity", "budget": 389324800, "budget_kind": "bops"},
            "lsq-sensitivity389324800bops",
        ),
    ],
)
def test_a_run_is_named_by_method_and_bits(quantizer: dict, bitwidth: dict, name: str) -> None:
    cfg = OmegaConf.create({"quantizer": quantizer, "bitwidth": bitwidth})
    assert run_name(_root_=cfg) == name


# check


def node(**keys: Any) -> DictConfig:
    return OmegaConf.create({"model": {"_target_": "standin.Model", "name": "m", **keys}})


def problems(cfg: DictConfig, schema: type | None = None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        check(cfg, schema)
    return str(caught.value).splitlines()


def test_what_the_program_gives_is_neither_missing_nor_settable() -> None:
    check(node(width=4, checkpoint="auto"))
    assert problems(node(num_classes=3)) == [
        "config: no key 'model.num_classes' (Model has: scales, shortcut, width)."
    ]


def test_all_problems_are_told_at_once() -> None:
    assert problems(node(widht=1, width="wide", shortcut="padd", scales=[1, "x"])) == [
        "config: no key 'model.widht' (Model has: scales, shortcut, width). Did you mean 'width'?",
        "config: model.width must be an integer, got 'wide' (str).",
        "config: model.shortcut must be one of pad, projection, got 'padd' (str).",
        "config: model.scales must be a list, each number or null, got [1, 'x'] (list).",
    ]


def test_the_values_of_a_mapping_are_checked_one_by_one() -> None:
    (line,) = problems(composed("recipe=ptq", "recipe.lr.scale=abc"), Train)
    assert line == "config: recipe.lr.scale must be a number, got 'abc' (str)."


def test_a_target_that_takes_any_keyword_is_checked_for_what_it_needs() -> None:
    cfg = OmegaConf.create({"x": {"_target_": "standin.open_ended", "other": 1}})
    assert problems(cfg) == ["config: x.first is missing. Set x.first=..."]


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("standin.Modle", "no 'Modle' in standin. Did you mean 'Model'?"),
        ("qexp.quant.lsqq.LSQ", "no 'lsqq' in qexp.quant"),
        ("nowhere.LSQ", "No module named 'nowhere'"),
        ("LSQ", "write it as package.module.name"),
    ],
)
def test_a_target_that_does_not_exist_is_named(target: str, reason: str) -> None:
    (line,) = problems(OmegaConf.create({"quantizer": {"act": {"_target_": target}}}))
    assert line.startswith(f"config: quantizer.act._target_ '{target}' cannot be imported: ")
    assert reason in line


def test_a_wrong_value_is_told_once_where_it_was_set() -> None:
    lines = problems(composed("bits=four"), Train)
    assert lines == ["config: bits must be an integer, got 'four' (str)."]


def test_an_interpolation_that_leads_nowhere_is_one_line() -> None:
    lines = problems(composed("model.width=${nix}"), Train)
    assert len(lines) == 1
    assert lines[0].startswith("config: model.width: ")


def test_ranges_of_a_recipe_are_told_under_its_own_path() -> None:
    lines = problems(composed("float.lr=-1", "recipe.epochs=0"), Train)
    assert any(line.startswith("config: float.lr=-1") for line in lines)
    assert any(line.startswith("config: recipe.epochs=0") for line in lines)


@pytest.mark.parametrize(
    ("value", "hint", "words"),
    [
        (1, float, None),
        (1.0, int, "an integer"),
        (True, int, "an integer"),
        (True, float, "a number"),
        (1, bool, "true or false"),
        (None, int | None, None),
        ("x", int | None, "an integer or null"),
        ("8", Literal[8, "8"], None),
        (True, Literal[1], "one of 1"),
        ([1, 2], Sequence[float], None),
        (3, Sequence[float], "a list"),
        ((1, "a"), tuple[int, ...], "a list, each integer"),
        ([1, "a"], tuple[int, str], None),
        ({"a": 1}, dict[str, int], None),
        ("a", dict[str, int], "a mapping"),
        ("data", Path, None),
        ({"weight": 1}, Outer, None),
        (0.5, Outer, "a mapping"),
        (0.5, Outer | None, "a mapping or null"),
        ({"_target_": "x"}, int, None),
        ("anything", Any, None),
        ("anything", standin.Model, None),
    ],
)
def test_a_value_fits_its_annotation(value: Any, hint: Any, words: str | None) -> None:
    assert says(value, hint) == words


def test_without_configs_qexp_asks_to_be_installed_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("qexp.config.PACKAGE", tmp_path / "lib" / "qexp")
    with pytest.raises(ConfigError, match=r"config: no configs beside .*qexp\. Reinstall qexp"):
        configs_dir()
    (tmp_path / "lib" / "qexp" / "configs").mkdir(parents=True)
    (tmp_path / "lib" / "qexp" / "configs" / "train.yaml").touch()
    assert configs_dir() == tmp_path / "lib" / "qexp" / "configs"
