"""What is found wrong before anything is written: exit 2, one line, no folder, no float network."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compose import TINY, TINY_PTQ, tiny
from conftest import Qexp, Said

from qexp.data.card import Card
from qexp.data.synthetic import Synthetic
from qexp.errors import ConfigError
from qexp.models.resnet import ResNet
from qexp.recipes.logits import giving_logits, run_in_training_mode
from qexp.recipes.plan import plan
from qexp.recipes.precheck import precheck
from qexp.recipes.unused import unused

POLICY = "config: bitwidth="
ONE_BIT = "config: quantizer=lsq: LSQ needs at least 2 bits for signed values"
REFUSED = {
    # the network
    "model.width=0": "config: model.width=0.0 is not positive.",
    "model.depth=3": "config: model.depth=3 is not 6n + 2.",
    "model=mobilenet_v2_cifar model.width=0": "config: model.width=0.0 is not positive.",
    "model.width=1e18": "config: model 'resnet8' cannot be built: ",
    # the data
    "dataset.val_fraction=1": "config: dataset.val_fraction=1.0 is not in [0, 1).",
    "dataset.mean=[0.5]": "config: dataset.mean must have 3 values",
    "dataset.image_size=1000000000": "config: dataset=synthetic cannot be built: RuntimeError: ",
    "dataset.subset=3": "config: recipe.calibration_images=16, there are 3 to train on.",
    "recipe.calibration_images=49": "config: recipe.calibration_images=49, there are 48 to train",
    "recipe.batch_size=1000000": "config: recipe.batch_size=1000000, there are 48 to train on.",
    "recipe.bn_reestimate=49": "config: recipe.bn_reestimate=49, there are 48 to train on.",
    "float.batch_size=49": "config: float.batch_size=49, there are 48 to train on. Lower it.",
    "float.bn_reestimate=49": "config: float.bn_reestimate=49, there are 48 to train on.",
    "dataset.subset=49": "config: 48 training images are left, dataset.subset=49 asks for more.",
    "quantizer=fp32 recipe.batch_size=49": "config: recipe.batch_size=49, there are 48 to train on",
    "bitwidth=sensitivity bitwidth.images=49": "config: bitwidth.images=49, there are 48 to train",
    # the policy
    "bitwidth=pattern bitwidth.patterns=[{match:nix,weight:2}]": f"{POLICY}pattern: 'nix' matches",
    "bitwidth=sensitivity bits=1 bitwidth.images=8": f"{POLICY}sensitivity: the fewest bits cost",
    "quantizer=post_released bitwidth=sensitivity bits=3 bitwidth.images=8": (
        f"{POLICY}sensitivity: POSTReleased has 5 levels at 2 bits, which a budget does not count"
    ),
    "bitwidth=sensitivity bitwidth.candidates=[]": f"{POLICY}sensitivity: *candidates must be",
    "bitwidth=sensitivity bitwidth.candidates=[2,32]": f"{POLICY}sensitivity: *candidates must be",
    "bitwidth=sensitivity bitwidth.probes=0": f"{POLICY}sensitivity: *probes and images must be",
    "bitwidth=sensitivity bitwidth.images=0": f"{POLICY}sensitivity: *probes and images must be",
    "bitwidth=sensitivity bitwidth.images=8 bitwidth.save=nix/bits.yaml": (
        f"{POLICY}sensitivity: save=nix/bits.yaml: there is no folder nix."
    ),
    "bitwidth=progressive bitwidth.stages=[{until:9,bits:8},{until:3,bits:4},{bits:2}]": (
        f"{POLICY}progressive: the stages end at epochs"
    ),
    "bitwidth=progressive bitwidth.stages=[{until:50,bits:8},{bits:2}]": (
        f"{POLICY}progressive: the last stage begins at epoch 50 of 6: it is never reached."
    ),
    "bitwidth=progressive bitwidth.stages=[{until:1,bits:8,act:8},{bits:2}]": (
        f"{POLICY}progressive: a stage has until and bits; got act."
    ),
    "bitwidth=sensitivity bits=8 bitwidth.images=8": (
        f"{POLICY}sensitivity: budget=8 bits a weight is above the largest of candidates [2, 3, 4]"
    ),
    "dataset.classes=1": "config: dataset=synthetic has images of one class: every answer would",
    "quantizer=lsq bits=1": f"{ONE_BIT}, got 1: its",
    # widths of later stages, and of candidates
    "quantizer=lsq bitwidth=progressive bitwidth.stages=[{until:1,bits:4},{bits:1}]": ONE_BIT,
    "quantizer=lsq bitwidth=sensitivity bits=3 bitwidth.candidates=[1,2,3]": (
        f"{POLICY}sensitivity: LSQ needs at least 2 bits for signed values"
    ),
    "quantizer=n2uq bitwidth=sensitivity bits=3 bitwidth.act=12": (
        "config: quantizer=n2uq: thresholds closer than 0.001 are not learned: at most 10 bits"
    ),
    "quantizer=adq bits=1": "config: quantizer=adq: a codebook with zero needs at least 2 bits",
    "bitwidth=pattern bitwidth.patterns=[{match:3,weight:2}]": f"{POLICY}pattern: '3' matches no",
    # the quantizer
    "quantizer=asq quantizer.act.reduction=0": "config: quantizer=asq: reduction must be at least",
    "quantizer=adq quantizer.weight.adapt_until=7": "config: quantizer=adq: adapt_until must be in",
    "quantizer=adq quantizer.weight.dead_after=0": "config: quantizer=adq: dead_after must be at",
    # the teacher
    "recipe.distill.weight=0.5 model.checkpoint=none": "config: recipe.distill.teacher=float is a",
    "recipe.distill.weight=0.5 recipe.from_scratch=true": "config: recipe.distill.teacher=float is",
    # numbers
    "recipe.lr=inf": "config: recipe.lr=inf is out of range: it must be positive, and at most",
    "recipe.lr=1e40": "config: recipe.lr=1*e*40 is out of range: it must be positive, and at most",
    "recipe.grad_clip=inf": "config: recipe.grad_clip=inf is out of range: it must be finite.",
}


def check_refusal(said: Said, expected: str, folder: Path) -> None:
    """One line of a config error, with the parts of `expected`; exit code 2; nothing written."""
    for part in expected.split("*"):
        assert part in said.err
    assert said.err.startswith("config: ")
    assert len(said.err.splitlines()) == 1, said.err
    assert said.code == 2
    assert not list(folder.iterdir())


@pytest.mark.parametrize("words", REFUSED)
def test_what_cannot_run_is_refused_before_anything_is_written(
    qexp: Qexp, tmp_path: Path, words: str
) -> None:
    check_refusal(qexp("train", *TINY, *words.split()), REFUSED[words], tmp_path)


REFUSED_PTQ = {
    "recipe.minibatch=25": "config: recipe.minibatch=25 is out of range: it must be 1 to images.",
    "quantizer.reconstruct.drop=2": "config: quantizer.reconstruct: drop must be in [0, 1], got 2.",
    "quantizer.reconstruct.mix=-1": "config: quantizer.reconstruct: mix must be in [0, 1], got -1.",
    "quantizer.reconstruct.bias_lr=-1": "config: quantizer.reconstruct: bias_lr must be finite and",
    "quantizer.weight.p=0": "config: quantizer=qdrop: p must be positive and finite, got 0.",
    "quantizer.act.p=-1": "config: quantizer=qdrop: p must be positive and finite, got -1.",
    "quantizer.act.percent=500": "config: quantizer=qdrop: percent must be above 0 and at",
    "+recipe.lr.roundng=0.1": "config: no key 'recipe.lr.roundng' (*). Did you mean 'rounding'?",
}


@pytest.mark.parametrize("words", REFUSED_PTQ)
def test_a_reconstruction_without_sense_is_refused_before_anything_is_written(
    qexp: Qexp, tmp_path: Path, words: str
) -> None:
    check_refusal(qexp("train", *TINY_PTQ, "quantizer=qdrop", words), REFUSED_PTQ[words], tmp_path)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("recipe.distill.temperature=4", "recipe.distill.temperature is not used: recipe.distill."),
        ("recipe.milestones=[0.2]", "recipe.milestones is not used: recipe.schedule is cosine"),
        ("sync_bn=true", "sync_bn is not used: there is one process"),
        (
            "recipe.from_scratch=true model.checkpoint=nix.pt",
            "model.checkpoint=nix.pt is not used: recipe.from_scratch is true",
        ),
        ("quantizer=nearest saved=blocks", "saved=blocks is not used: recipe ptq keeps nothing"),
        (
            "quantizer=qdrop quantizer.reconstruct.step_inputs=float",
            "quantizer.reconstruct.step_inputs is not used: there is no second pass",
        ),
        (
            "quantizer=qdrop quantizer.reconstruct.step_inputs=float "
            "quantizer.reconstruct.network=true",
            "quantizer.reconstruct.step_inputs is not used: there is no second pass",
        ),
        (
            "quantizer=nearest quantizer.reconstruct.fisher=true quantizer.reconstruct.steps=after",
            "quantizer.reconstruct.steps, fisher: not used, as quantizer.reconstruct.granularity i",
        ),
        ("quantizer=nearest quantizer.reconstruct.bias_correction=true", ""),
        (
            "quantizer=nearest quantizer.reconstruct.correction_inputs=float",
            "quantizer.reconstruct.correction_inputs is not used: quantizer.reconstruct.bias_corr",
        ),
        (
            "quantizer=adaround quantizer.reconstruct.network=true",
            "quantizer.reconstruct.network is not used: there is nothing to learn there",
        ),
        (
            "quantizer=qdrop quantizer.reconstruct.biases=after",
            "quantizer.reconstruct.biases is not used: quantizer.reconstruct.bias_lr is 0",
        ),
        (
            "quantizer=brecq quantizer.reconstruct.drop=0.5",
            "quantizer.reconstruct.drop is not used: quantizer.reconstruct.quantized_inputs is",
        ),
        (
            "quantizer=qdrop recipe=qat",
            "quantizer.reconstruct is not used: recipe qat trains",
        ),
        (
            "recipe.optimizer=adamw recipe.momentum=0.8",
            "recipe.momentum is not used: recipe.optimizer is adamw",
        ),
        (
            "bitwidth=sensitivity bits=3 bitwidth.metric=fisher bitwidth.probes=9",
            "bitwidth.probes is not used: bitwidth.metric is fisher",
        ),
        (
            "bitwidth=sensitivity bits=3 bitwidth.allocation=random bitwidth.metric=loss",
            "bitwidth.metric is not used: bitwidth.allocation is random",
        ),
        (
            "bitwidth=sensitivity bits=3 bitwidth.metric=size bitwidth.images=64",
            "bitwidth.images is not used: bitwidth.metric is size",
        ),
        (
            "quantizer/weight=codebook quantizer.weight.adaptation=none quantizer.weight.gamma=0.9",
            "quantizer.weight.gamma is not used: quantizer.weight.adaptation is none",
        ),
        (
            "bitwidth=sensitivity bits=3 model.checkpoint=none",
            "bitwidth.metric looks at random weights",
        ),
        ("bitwidth=sensitivity bits=3 model.checkpoint=none bitwidth.metric=size", ""),
        ("bitwidth=sensitivity bits=3 bitwidth.probes=9 bitwidth.images=64", ""),
        ("quantizer/weight=codebook quantizer.weight.gamma=0.9", ""),
        ("quantizer=qdrop quantizer.reconstruct.drop=0.2", ""),
        ("recipe.distill.weight=0.5 recipe.distill.temperature=4", ""),
        ("recipe.schedule=step recipe.milestones=[0.2]", ""),
    ],
)
def test_what_has_no_effect_is_said(tmp_path: Path, words: str, line: str) -> None:
    base = TINY_PTQ if "quantizer=" in words and "recipe=" not in words else TINY
    said = list(unused(tiny(tmp_path, *words.split(), base=base)))
    assert len(said) == bool(line)
    assert all(text.startswith(line) for text in said)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("quantizer=qdrop recipe.step_lr=0.1", "recipe.step_lr=0.1 is not used: there is one pass"),
        ("quantizer=brecq recipe.step_lr=0.1", ""),
        ("quantizer=qdrop +recipe.lr.bias=0.1", ""),
        ("quantizer=nearest recipe.warmup=0.1", "recipe.warmup=0.1 is not used: nothing is recon"),
        (
            "quantizer=qdrop quantizer/outer=adaround bitwidth.first_last=same",
            "quantizer/outer=adaround is not used: bitwidth.first_last is same",
        ),
        ("quantizer=qdrop quantizer/outer=adaround", ""),
    ],
)
def test_what_is_typed_without_effect_is_said(qexp: Qexp, words: str, line: str) -> None:
    own = [w for w in TINY_PTQ if not w.startswith("recipe.step")]
    said = qexp("train", *own, "recipe=ptq", *words.split(), "model.checkpoint=none", "folder=run")
    typed = [w.lstrip("+") for w in words.split() if "lr" in w or "warmup" in w or "outer" in w]
    idle = [text for text in said.err.splitlines() if any(f"{w} is not" in text for w in typed)]
    assert len(idle) == bool(line), said.err
    assert all(text.startswith(f"warning: {line}") for text in idle)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            "recipe=qat_after_ptq",
            "warning: experiment=mine sets over recipe=qat_after_ptq: recipe.lr=0.5 (not 0.003)\n",
        ),
        (
            "quantizer=asq",
            "warning: experiment=mine sets over quantizer=asq: quantizer.act.factor=frozen "
            "(not relu)\n",
        ),
        ("recipe=qat_after_ptq recipe.lr=0.25", ""),  # the command line has the last word
        ("recipe=float recipe.distill.weight=0", ""),  # the same value
        ("bits=4", ""),
        ("-m quantizer=asq", ""),  # what an experiment sweeps over is its own
    ],
)
def test_an_experiment_that_wins_over_a_choice_is_named(
    qexp: Qexp, tmp_path: Path, words: str, said: str
) -> None:
    folder = tmp_path / "conf" / "experiment"
    folder.mkdir(parents=True)
    sweeps = "hydra:\n  sweeper:\n    params:\n      quantizer: lsq\n" if "-m" in words else ""
    act = "quantizer:\n  act:\n    factor: frozen\n" if "asq" in words else ""
    lr = "0.1" if "=float" in words else "0.5"
    text = f"# @package _global_\nrecipe:\n  lr: {lr}\n{act}{sweeps}"
    (folder / "mine.yaml").write_text(text)
    extra = [] if "quantizer" in words else ["quantizer=lsq"]
    got = qexp(
        "train", "--config-dir", "conf", *TINY, "experiment=mine", "dry_run=true",
        "model.checkpoint=none", *extra, *words.split(),
    )  # fmt: skip
    assert got.code == 0
    lines = [line for line in got.err.splitlines(keepends=True) if "experiment=mine" in line]
    assert "".join(lines) == said


def test_sync_bn_of_one_process_is_no_other_protocol_and_is_said(
    qexp: Qexp, tmp_path: Path
) -> None:
    words = ("quantizer=lsq", "model.checkpoint=none", "recipe.epochs=1", "max_steps=1")
    hashes = set()
    for name, more in (("a", "sync_bn=false"), ("b", "sync_bn=true")):
        said = qexp("train", *TINY, *words, more, f"folder={name}")
        assert said.code == 0
        assert ("sync_bn is not used" in said.err) == (name == "b")
        hashes.add(json.loads((tmp_path / name / "result.json").read_text())["protocol_hash"])
    assert len(hashes) == 1


def test_a_dry_run_refuses_what_the_run_would(qexp: Qexp) -> None:
    words = ("bitwidth=pattern", "bitwidth.patterns=[{match:nix,weight:2}]")
    said = qexp("train", *TINY, *words, "dry_run=true")
    assert said.code == 2
    assert "'nix' matches no layer" in said.err


def test_more_images_to_reconstruct_from_than_there_are(qexp: Qexp, tmp_path: Path) -> None:
    said = qexp("train", *TINY_PTQ, "quantizer=nearest", "recipe.held_out=25")
    assert said.err.startswith("config: recipe.images + recipe.held_out=49, there are 48 to train")
    assert not list(tmp_path.iterdir())


def test_a_post_training_run_is_a_start_of_training_and_of_nothing_else(
    qexp: Qexp, tmp_path: Path
) -> None:
    assert qexp("train", *TINY_PTQ, "quantizer=nearest", "folder=ptq").code == 0
    training = ("train", *TINY, "quantizer=nearest", "recipe=qat", "model.checkpoint=ptq")
    refused = {
        ("train", *TINY_PTQ, "quantizer=nearest", "model.checkpoint=ptq"): "is itself a post-train",
        (*training, "model.width=0.5"): "checkpoint: ptq/last.pt does not fit the model: ",
        (*training, "recipe.distill.weight=0.5"): "a post-training run keeps no float network.",
    }
    for words, message in refused.items():
        said = qexp(*words)
        assert message in said.err
        assert said.code == 2
        assert [p.name for p in tmp_path.iterdir()] == ["ptq"]
    said = qexp(*training, "recipe.epochs=1", "folder=trained")
    assert said.code == 0, said.err


def test_a_folder_that_is_used_hides_no_file_that_cannot_be_loaded(
    qexp: Qexp, tmp_path: Path
) -> None:
    assert qexp("train", *TINY, "recipe.epochs=1", "folder=used").code == 0
    (tmp_path / "bad.pt").write_text("no weights")
    said = qexp("train", *TINY, "folder=used", "model.checkpoint=bad.pt")
    assert said.code == 2
    assert "bad.pt" in said.err
    assert not (tmp_path / "used-2").exists()


def test_a_plan_by_sensitivity_has_the_inputs_widths(tmp_path: Path) -> None:
    words = (
        "quantizer=lsq",
        "bitwidth=sensitivity",
        "bits=3",
        "bitwidth.act=8",
        "bitwidth.images=16",
    )
    rows = [line.split() for line in plan(tiny(tmp_path, *words)).splitlines()]
    assert {tuple(row[3:5]) for row in rows if row and row[0].startswith("layer1.")} == {("3", "8")}


def test_a_policy_is_one_of_ours(qexp: Qexp) -> None:
    said = qexp("train", *TINY, "bitwidth._target_=types.SimpleNamespace")
    assert said.code == 2
    assert "types.SimpleNamespace is no subclass of qexp.quant.bitwidth.Policy" in said.err


def test_the_check_draws_no_random_number_and_writes_no_bits(tmp_path: Path) -> None:
    file = tmp_path / "bits.yaml"
    policy = ("bitwidth=sensitivity", "bitwidth.metric=size", f"bitwidth.save={file}")
    before = torch.get_rng_state()
    precheck(tiny(tmp_path, *policy))
    assert torch.equal(torch.get_rng_state(), before)
    assert not file.exists()


def test_processes_that_the_images_do_not_suffice_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "0")
    precheck(tiny(tmp_path, "recipe.batch_size=12"))
    with pytest.raises(
        ConfigError, match="48 training images do not fill one batch of 16 for each"
    ):
        precheck(tiny(tmp_path, "recipe.batch_size=16"))


def test_a_dry_run_takes_no_wrong_subset_for_data_that_are_absent(
    qexp: Qexp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Synthetic, "card", Card(4, (3, 8, 8), 48), raising=False)
    said = qexp("train", *TINY, "dataset.subset=49", "dry_run=true")
    check_refusal(said, REFUSED["dataset.subset=49"], tmp_path)


class NoParameters(torch.nn.Module):
    def __init__(self, num_classes: int) -> None:
        super().__init__()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1)


class Raises(torch.nn.Module):
    def __init__(self, num_classes: int, kind: str = "TypeError") -> None:
        super().__init__()
        self.fc, self.kind = torch.nn.Linear(3, num_classes), kind

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise {"TypeError": TypeError, "ValueError": ValueError, "KeyError": KeyError}[self.kind](
            "two\nlines"
        )


class Gives(torch.nn.Module):
    """A classifier of 4 classes whose output is not always logits."""

    def __init__(self, num_classes: int, output: str) -> None:
        super().__init__()
        outputs = {"more": num_classes + 3, "fewer": num_classes - 1, "one": 1}
        self.norm = torch.nn.BatchNorm2d(3)
        self.hidden = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
        self.fc, self.output = torch.nn.Linear(3, outputs.get(output, num_classes)), output
        self.aux_logits = output == "heads"

    def forward(self, x: torch.Tensor) -> object:
        y = self.fc(self.hidden(self.norm(x).mean((2, 3))))
        given = {
            "tuple": (y, x),
            "dict": {"logits": y},
            "none": None,
            "map": y[:, :, None, None],
            "hard": F.hardsigmoid(y),
            "aux": (y, y) if self.training else y,
        }
        if self.output in ("raises", "heads") and self.training:
            raise KeyError("labels")
        return given.get(self.output, y)


def no_module(num_classes: int) -> dict[str, int]:
    return {"classes": num_classes}


def not_built(num_classes: int) -> None:
    raise KeyError("width")


class Kept(torch.nn.Module):
    """Layers of two names, that its forward takes from a Sequential or a list."""

    def __init__(self, num_classes: int, place: str, padding: str | int = 0) -> None:
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 4, 3)
        self.conv, self.norm = torch.nn.Conv2d(4, 4, 3, padding=padding), torch.nn.BatchNorm2d(4)
        self.fc, self.place = torch.nn.Linear(4, num_classes), place
        self.order = [self.conv, self.norm]
        self.features = torch.nn.Sequential(*self.order)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.stem(x)
        if self.place == "keyword":
            y = self.conv(input=y)
        elif self.place == "list":
            for part in self.order:
                y = part(y)
        else:
            y = self.features(y)
        return self.fc(y.relu().mean((2, 3)))


CUSTOM = {
    "Kept +model.place=list": "model: layer 'conv' is not called as the attribute that it is: the",
    "Kept +model.place=keyword": "model: layer 'conv' is called with its input by keyword. Call it",
    "no_module": "config: model._target_=test_precheck.no_module returns a dict, no nn.Module.",
    "not_built": "config: model 'own' cannot be built: KeyError: 'width'.",
    "NoParameters": "config: model 'own' has no parameters: there is nothing to train or quantize.",
    "Raises": "config: model=own cannot take images of 3x8x8: TypeError: two lines.",
    "Raises +model.kind=ValueError": (
        "of 3x8x8: ValueError: two lines. Set dataset.image_size=... to what it takes, or its own "
        "keyword for their size, such as +model.image_size=8."
    ),
    "Raises +model.kind=KeyError": "of 3x8x8: KeyError: ",
    "Gives +model.output=tuple": "an output of type tuple in evaluation mode, not logits of shape",
    "Gives +model.output=dict": "an output of type dict in evaluation mode, not logits of shape",
    "Gives +model.output=none": "an output of type NoneType in evaluation mode, not logits of sha",
    "Gives +model.output=more": "an output of shape [2, 7] in evaluation mode, not logits of shape",
    "Gives +model.output=fewer": "an output of shape [2, 3] in evaluation mode, not logits of shap",
    "Gives +model.output=one": "an output of shape [2, 1] in evaluation mode, not logits of shape",
    "Gives +model.output=map": "an output of shape [2, 4, 1, 1] in evaluation mode, not logits of",
    "Gives +model.output=raises": "cannot be trained on 2 images of 3x8x8: KeyError: 'labels'.",
    "Gives +model.output=heads": (
        "cannot be trained on 2 images of 3x8x8: KeyError: 'labels'. Leave out its other heads: "
        "+model.aux_logits=false"
    ),
    "Gives +model.output=hard bitwidth=sensitivity bitwidth.images=8": (
        "config: bitwidth=sensitivity: metric=hutchinson takes second derivatives"
    ),
    "Gives +model.output=aux": (
        "config: model=own gives an output of type tuple in training mode, not logits of shape "
        "[2, 4]. Return the logits alone, without auxiliary heads"
    ),
}


def own(base: Sequence[str], name: str, *more: str) -> list[str]:
    """`base` with a network of this file, from random weights."""
    words = [word for word in base if not word.startswith("model")]
    target = f"model._target_=test_precheck.{name}"
    return [*words, "model=custom", target, "+model.name=own", "model.checkpoint=none", *more]


@pytest.mark.parametrize("words", CUSTOM)
def test_what_is_wrong_with_a_network_of_ones_own_is_one_line(
    qexp: Qexp, tmp_path: Path, words: str
) -> None:
    name, *more = words.split()
    said = qexp("train", *own(TINY, name, *more))
    assert CUSTOM[words] in said.err
    assert len(said.err.splitlines()) == 1, said.err
    assert said.code == 2
    assert not list(tmp_path.iterdir())


def test_auxiliary_heads_are_refused_only_where_the_network_is_trained(tmp_path: Path) -> None:
    words = own(TINY_PTQ, "Gives", "+model.output=aux", "quantizer=nearest")
    precheck(tiny(tmp_path, base=words))
    assert "cost:" in plan(tiny(tmp_path, base=words))  # its step is timed in eval mode
    with pytest.raises(ConfigError, match="type tuple in training mode"):
        precheck(tiny(tmp_path, "model.checkpoint=auto", base=words))


def test_a_pass_in_training_mode_leaves_the_network_as_it_was(tmp_path: Path) -> None:
    cfg, model = tiny(tmp_path), ResNet(8, 4, width=0.25).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with giving_logits(cfg, model, 4):
        run_in_training_mode(cfg, model, (3, 8, 8))
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert not model.training


class Normalised(torch.nn.Module):
    """A network whose inner convolution computes its weight in each pass."""

    def __init__(self, num_classes: int, how: str = "weight_norm") -> None:
        super().__init__()
        own = torch.nn.utils if how.startswith("old_") else torch.nn.utils.parametrizations
        inner = torch.nn.Conv2d(4, 4, 3, padding=1)
        with warnings.catch_warnings():  # the older functions are deprecated, and still used
            warnings.simplefilter("ignore", FutureWarning)
            inner = getattr(own, how.removeprefix("old_"))(inner)
        self.stem, self.inner = torch.nn.Conv2d(3, 4, 3), inner
        self.norm, self.fc = torch.nn.BatchNorm2d(4), torch.nn.Linear(4, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.norm(self.inner(self.stem(x))).relu().mean((2, 3)))


@pytest.mark.parametrize(
    "how", ["weight_norm", "spectral_norm", "old_weight_norm", "old_spectral_norm"]
)
@pytest.mark.parametrize("base", [TINY, TINY_PTQ])
def test_a_weight_that_is_computed_in_each_pass_is_refused(
    qexp: Qexp, tmp_path: Path, how: str, base: tuple[str, ...]
) -> None:
    own = ("model=custom", "model._target_=test_precheck.Normalised", "+model.name=own")
    words = [w for w in base if not w.startswith("model")]
    method = "quantizer=lsq" if base is TINY else "quantizer=nearest"
    said = qexp("train", *words, *own, f"+model.how={how}", method)
    assert said.err.startswith("model: layer 'inner' computes its weight in each pass (weight_norm")
    assert len(said.err.splitlines()) == 1, said.err
    assert said.code == 2
    assert not list(tmp_path.iterdir())


class Ends(torch.nn.Module):
    """A first and a last layer, and between them a convolution that is not quantized."""

    def __init__(self, num_classes: int, inner: bool = False) -> None:
        super().__init__()
        self.stem, self.mix = torch.nn.Conv2d(3, 4, 2, 2), torch.nn.Conv1d(4, 4, 1)
        self.inner = torch.nn.Linear(4, 4) if inner else torch.nn.Identity()
        self.fc = torch.nn.Linear(4, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.inner(self.mix(self.stem(x).flatten(2)).mean(2)))


def test_bits_that_reach_no_layer_are_refused(qexp: Qexp, tmp_path: Path) -> None:
    own = ("model=custom", "model._target_=test_precheck.Ends", "+model.name=own")
    words = [*(w for w in TINY if not w.startswith("model")), *own, "quantizer=lsq"]
    said = qexp("train", *words)
    assert said.err.startswith("config: bitwidth=uniform would decide nothing: the model has no ")
    assert len(said.err.splitlines()) == 1, said.err
    assert said.code == 2
    assert not list(tmp_path.iterdir())
    assert qexp("train", *words, "dry_run=true", "bitwidth.first_last=same").code == 0


def test_weights_that_stay_in_float_are_said(qexp: Qexp, tmp_path: Path) -> None:
    own = (
        "model=custom",
        "model._target_=test_precheck.Ends",
        "+model.name=own",
        "+model.inner=true",
    )
    words = [*(w for w in TINY if not w.startswith("model")), *own, "quantizer=lsq"]
    line = "16 weights are in no convolution (2-D) or linear layer that evaluation calls"
    assert line in qexp("train", *words, "dry_run=true").out
    said = qexp("train", *words, "recipe.epochs=1", "model.checkpoint=none", "folder=run")
    assert said.code == 0, said.err
    assert line in (tmp_path / "run" / "train.log").read_text()
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["other_weights"] == {"mix.weight": 16}


class Aided(Ends):
    """As torchvision's GoogLeNet: an auxiliary head, which evaluation does not call."""

    def __init__(self, num_classes: int, aux_logits: bool = True) -> None:
        super().__init__(num_classes, inner=True)
        self.aux_logits = aux_logits
        self.aux = torch.nn.Linear(4, num_classes) if aux_logits else None


@pytest.mark.parametrize("heads", [True, False])
def test_a_plan_says_how_to_leave_out_auxiliary_heads(tmp_path: Path, heads: bool) -> None:
    words = own(TINY_PTQ, "Aided", f"+model.aux_logits={heads}", "quantizer=nearest")
    text = plan(tiny(tmp_path, base=words))
    assert ("mix.weight, aux.weight" in text) == heads
    assert ("+model.aux_logits=false has none" in text) == heads


class Looks(torch.nn.Module):
    """Its forward depends on values."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv, self.fc = torch.nn.Conv2d(3, 4, 3), torch.nn.Linear(4, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        return self.fc((y if y.sum() > 0 else -y).mean((2, 3)))


class Part(torch.nn.Module):
    """A residual block that can be called in unusual ways."""

    def __init__(self, *, pair: bool) -> None:
        super().__init__()
        self.conv, self.pair = torch.nn.Conv2d(4, 4, 3, padding=1), pair

    def forward(self, x: torch.Tensor, skip: torch.Tensor | None = None) -> Any:
        y = self.conv(x) + (x if skip is None else skip)
        return (y, x) if self.pair else y


class Calls(torch.nn.Module):
    """A block that gets or gives more than one tensor, by keyword, or not an image a row."""

    def __init__(self, num_classes: int, how: str) -> None:
        super().__init__()
        self.stem, self.block = torch.nn.Conv2d(3, 4, 3), Part(pair=how == "tuple")
        self.fc, self.how = torch.nn.Linear(4, num_classes), how

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        if self.how == "two":
            x = self.block(x, x)
        elif self.how == "keyword":
            x = self.block(x=x)
        elif self.how == "tuple":
            x, _ = self.block(x)
        else:
            n, c, h, w = x.shape
            halves = x.view(n, c, 2, h // 2, w).transpose(1, 2).reshape(2 * n, c, h // 2, w)
            x = self.block(halves).view(n, 2, c, h // 2, w).transpose(1, 2).reshape(n, c, h, w)
        return self.fc(x.mean((2, 3)))


BY_LAYER = "on its own, from one tensor [N, ...] to one. Use *.reconstruct.granularity=layer."
NOT_AT_ALL = "Use quantizer=nearest, which learns none, or recipe=qat with quantizer=lsq or another"
UNFIT = {
    "Kept +model.place=features +model.padding=same quantizer=aquant": (
        "model: layer 'conv' has padding 'same', and AQuant of*Use quantizer.act.per=channel, or"
    ),
    "Looks": "model: Looks cannot be traced by torch.fx: *recipe=ptq folds batch norms by its*=qat",
    "Calls +model.how=two": f"model: block 'block' takes 2 inputs, and*=qdrop learns it {BY_LAYER}",
    "Calls +model.how=keyword": f"model: block 'block' is called with x=..., and*{BY_LAYER}",
    "Calls +model.how=tuple": f"model: block 'block' gives a tuple, and*{BY_LAYER}",
    "Calls +model.how=halves": f"model: block 'block' sees patches of an image*{NOT_AT_ALL}",
}


@pytest.mark.parametrize("words", UNFIT)
def test_what_a_post_training_method_cannot_take_apart_is_refused_in_one_line(
    qexp: Qexp, tmp_path: Path, words: str
) -> None:
    name, *more = words.split()
    own = ("model=custom", f"model._target_=test_precheck.{name}", "+model.name=own", *more)
    words_ = [w for w in TINY_PTQ if not w.startswith("model")]
    for last in ("dry_run=false", "dry_run=true"):
        method = () if "quantizer=aquant" in more else ("quantizer=qdrop",)
        said = qexp("train", *words_, *method, *own, last)
        for part in UNFIT[words].split("*"):
            assert part in said.err
        assert len(said.err.splitlines()) == 1, said.err
        assert said.code == 2
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("how", ["two", "keyword", "tuple"])
def test_a_block_that_is_called_in_an_unusual_way_is_learned_by_layers(
    qexp: Qexp, tmp_path: Path, how: str
) -> None:
    own = ("model=custom", "model._target_=test_precheck.Calls", "+model.name=own")
    words = [w for w in TINY_PTQ if not w.startswith("model")]
    by_layer = ("quantizer=qdrop", "quantizer.reconstruct.granularity=layer", f"+model.how={how}")
    said = qexp("train", *words, *own, *by_layer, "model.checkpoint=none", "folder=own")
    assert said.code == 0, said.err
    result = json.loads((tmp_path / "own" / "result.json").read_text())
    assert [u["unit"] for u in result["reconstruction"]["units"]] == ["stem", "block.conv", "fc"]


@pytest.mark.parametrize("base", [TINY, TINY_PTQ], ids=["qat", "ptq"])
def test_a_layer_of_two_names_is_quantized_under_both(
    qexp: Qexp, tmp_path: Path, base: tuple[str, ...]
) -> None:
    own = ("model=custom", "model._target_=test_precheck.Kept", "+model.name=own")
    words = [w for w in base if not w.startswith("model")]
    method = ("quantizer=lsq", "recipe.epochs=1") if base is TINY else ("quantizer=qdrop",)
    more = ("+model.place=features", "model.checkpoint=none", "folder=own")
    said = qexp("train", *words, *own, *method, *more)
    assert said.code == 0, said.err
    top1 = json.loads((tmp_path / "own" / "result.json").read_text())["top1"]
    said = qexp("eval", "run=own")
    assert said.code == 0, said.err
    assert f"{top1:.2f}" in said.out
