"""Wrong commands, configs, checkpoints and data: the line each one gets, and the exit code.

Every case is the whole `qexp`, in this process. `*` in an expected line stands for any text;
nothing else may be on stderr, and never a traceback.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import torch
from conftest import Qexp
from PIL import Image

from qexp.runner.folder import owner

ALWAYS = ("device=cpu",)
# A real run of a few steps on made images: what is wrong is met in the run itself.
SMOKE = (
    "train",
    "experiment=smoke",
    "dataset=synthetic",
    "dataset.train_images=256",
    "dataset.test_images=64",
    "dataset.image_size=16",
    *ALWAYS,
)
START = ("recipe.from_scratch=false",)
FOLDER = ("dataset=imagefolder", "dataset.root=images", "dataset.crop=16", "dataset.resize=16")


def matches(said: str, expected: str) -> bool:
    pattern = ".*".join(re.escape(part) for part in expected.split("*"))
    return re.fullmatch(pattern, said.rstrip("\n")) is not None


COMMANDS = {
    "trian": "qexp: unknown command 'trian'. Did you mean 'train'?",
    "zzz": "qexp: unknown command 'zzz'. Run qexp for the list.",
    "bits=4": "qexp: unknown command 'bits=4'. Did you mean 'qexp train bits=4'?",
    "bench": "qexp: say which: qexp bench train or qexp bench inference.",
    "bench trian": "qexp: unknown command 'bench trian'. Use qexp bench train or qexp bench *",
    "train --foo": "qexp: unknown option --foo. Try: qexp COMMAND --hydra-help",
    "train bits": "config: cannot read the override 'bits'. Write key=value.",
    "train lr": "config: cannot read the override 'lr'. Write key=value.",
    "eval outputs/a/b": "config: cannot read the override 'outputs/a/b'. Write run=outputs/a/b.",
    "export outputs/a": "config: cannot read the override 'outputs/a'. Write run=outputs/a.",
    "train outputs/a": "config: cannot read the override 'outputs/a'. Write key=value.",
    "train --config-name tarin": "config: no primary config 'tarin' in *",
    "train --config-dir nix": "config: Additional config directory '*nix' not found",
    "train -m --cfg job": "qexp: Only one of *",
    "train bits=2,4": "config: Ambiguous value for argument 'bits=2,4'; *add --multirun*",
    # unknown keys and choices
    "train bitz=4": "config: no key 'bitz' (train has: *). Did you mean 'bits'?",
    "train model.name=null": "config: model.name must be letters, digits, *; got None.",
    "train quantizer=lsq quantizer.name=a/../b": "config: quantizer.name must be *; got 'a/../b'.",
    "train quantiser=lsq": "config: no key 'quantiser' (*). Did you mean 'quantizer'?",
    "train quantizer=lsq quantizer.weight.inti=lsq": (
        "config: no key 'quantizer.weight.inti' (lsq has: count, init, per_channel). "
        "Did you mean 'init'?"
    ),
    "train quantizer=lsq +quantizer.weight.inti=lsq": (
        "config: no key 'quantizer.weight.inti' (lsq has: count, init, per_channel). "
        "Did you mean 'init'?"
    ),
    "train epochs=3": "config: no key 'epochs' (train has: *). Did you mean 'recipe.epochs'?",
    "train quantizer.bits=4": "config: no key 'quantizer.bits' (*). Did you mean 'bits'?",
    "train first_last=8": "config: no key 'first_last' (*). Did you mean 'bitwidth.first_last'?",
    "train quantizer=LSQ": "config: quantizer 'LSQ' not found. Options: *. Did you mean 'lsq'?",
    "train model=resnet2O": "config: model 'resnet2O' not found. *. Did you mean 'resnet20'?",
    "report --format htm": "qexp: argument --format: invalid choice: 'htm' *report --help",
    "train recipe.epoch=3": "config: no key 'recipe.epoch' (qat has: *). Did you mean 'epochs'?",
    "train quantizer/wieght=lsq": "config: no key 'quantizer.wieght' (*). Did you mean 'weight'?",
    "train quantizer=assq": "config: quantizer 'assq' not found. Options: *. Did you mean 'asq'?",
    "train quantizer@foo=lsq": "config: no group 'quantizer@foo' (*). Did you mean 'quantizer'?",
    "train quantizer/act=lqs": "config: quantizer/act 'lqs' not found. Options: *.*",
    "train experiment=smok": "config: experiment 'smok' not found. Options: *mean 'smoke'?",
    "train dataset=mnist": "config: dataset 'mnist' not found. Options: *fashion_mnist*",
    "train +dataset.flipp=true": "config: no key 'dataset.flipp' (*). Did you mean 'flip'?",
    "train +model.num_classes=5": "config: no key 'model.num_classes' (resnet8 has: *",
    "train ~seed": "config: seed is missing. Set seed=...",
    "train quantizer=lsq +quantizer.bits=2": (
        "config: no key 'quantizer.bits' (quantizer has: act, name, outer, reconstruct, weight)."
    ),
    "train quantizer=lsq +quantizer.outer.bits=2": (
        "config: no key 'quantizer.outer.bits' (outer has: act, weight)."
    ),
    "train +sweep.gpu=2": "config: no key 'sweep.gpu' (sweep has: *). Did you mean 'gpus'?",
    "train ~quantizer": "config: quantizer is missing. Set quantizer=...",
    "train ~quantizer.act": "config: quantizer.act is missing. Set quantizer.act=...",
    "train ~bitwidth": "config: bitwidth is missing. Set bitwidth=...",
    # values
    "train bits=0": "config: bits must be an integer from 1 to 16, or 32 for float; got 0.",
    "train bits=33": "config: bits must be an integer from 1 to 16, or 32 for float; got 33.",
    "train bits=-4": "config: bits must be an integer from 1 to 16, or 32 for float; got -4.",
    "train bits=1.5": "config: bits must be an integer, got 1.5 (float).",
    "train bits=four": "config: bits must be an integer, got 'four' (str).",
    "train bits=true": "config: bits must be an integer, got True (bool).",
    "train bits=null": "config: bits must be an integer, got None (NoneType).",
    "train bitwidth.weight=33": "config: bitwidth.weight must be an integer from 1 to 16, *",
    "train bitwidth.first_last=7": "config: bitwidth.first_last must be one of 8, fp32, same, *",
    "train seed=-1": "config: seed must be from 0 to *; got -1.",
    "train seed=one": "config: seed must be an integer, got 'one' (str).",
    "train max_steps=0": "config: max_steps must be at least 1, or null for no limit; got 0.",
    "train threads=0": "config: threads must be at least 1, or null for all cores; got 0.",
    "train threads=100000": "config: threads must be at most *, got 100000: this machine has *",
    "train sweep.gpus=abc": "config: sweep.gpus must be an integer or null, got 'abc' (str).",
    "train sweep.jobs_per_gpu=-1": "config: sweep.jobs_per_gpu must be at least 1; got -1.",
    "train recipe.distill=0.5": "config: recipe.distill must be a mapping, got 0.5 (float).",
    "train recipe.distill=null": "config: recipe.distill must be a mapping, got None (NoneType).",
    "train quantizer.outer=5": "config: quantizer.outer must be a mapping or null, got 5 (int).",
    "train recipe.lr=${oc.env:NOPE}": "config: recipe.lr: *'NOPE' not found*. Set recipe.lr=...",
    "train model.checkpoint=a\\${b}": "config: model.checkpoint must not hold '${', which a *",
    # numbers, wherever they stand
    "train quantizer=qdrop quantizer.act.p=nan": "config: quantizer.act.p must be finite, got nan.",
    "train quantizer=post quantizer.weight.base=1e300": (
        "config: quantizer.weight.base must be at most 1e+30 in size, got 1e+300."
    ),
    "train recipe.distill.temperature=inf": (
        "config: recipe.distill.temperature must be finite, got inf."
    ),
    "train recipe.weight_decay=1e300": "config: recipe.weight_decay must be at most 1e+30 in *",
    "train quantizer=qdrop recipe.beta=[nan,2]": (
        "config: recipe.beta=[nan, 2] is out of range: it must be two positive numbers, *"
    ),
    "train quantizer=qdrop recipe.lr.rounding=inf": "config: recipe.lr={*} is out of range: *",
    "train quantizer=qdrop recipe.lr.rounding=null": (
        "config: recipe.lr.rounding must be a number, got None (NoneType)."
    ),
    "train quantizer=qdrop recipe.step_lr=-1": (
        "config: recipe.step_lr=-1 is out of range: it must be >= 0."
    ),
    "train quantizer=qdrop recipe.step_p=0": (
        "config: recipe.step_p=0 is out of range: it must be positive."
    ),
    "train bitwidth=sensitivity bitwidth.budget=inf": (
        "config: bitwidth.budget must be finite, got inf."
    ),
    "train dataset.pad=100000000000000000000": (
        "config: dataset.pad must be an integer of at most 64 bits, got 100000000000000000000."
    ),
    "train bits=100000000000000000000": "config: bits must be an integer from 1 to 16, or 32 *",
    "train model.width=1e300": "config: model.width must be at most 1e+30 in size, got 1e+300.",
    "train bitwidth=pattern bitwidth.patterns=[3]": (
        "config: bitwidth.patterns must be a list, each mapping or *, got [3] (list)."
    ),
    "train out=": "config: out is empty. Set out=outputs",
    "train out= folder=": "config: out is empty. Set out=outputs",
    "train folder=": "config: folder is empty. Leave it out, or set folder=outputs/NAME",
    "train quantizer.weight=null": "config: quantizer.weight is null. Use quantizer/weight=none.",
    "train quantizer.act=null": "config: quantizer.act is null. Use quantizer/act=none.",
    "train model.checkpoint=5": "config: model.checkpoint must be a file, *, got 5 (int).",
    "train model.checkpoint=": "config: model.checkpoint is empty. Set model.checkpoint=FILE, *",
    "train compile=yes": "config: compile must be one of off, kernels, model, graphs, auto, got *",
    "train device=gpu": "config: device 'gpu' is none of auto, cpu, cuda, cuda:N, mps.",
    "train device=cuda:99": "config: device=cuda:99, but *",
    "train dry_run=maybe": "config: dry_run must be true or false, got 'maybe' (str).",
    "train recipe.epochs=0": "config: recipe.epochs=0 is out of range: it must be at least 1.",
    "train recipe.warmup_epochs=200": (
        "config: recipe.warmup_epochs=200 is out of range: it must be from 0 to below epochs."
    ),
    "train bitwidth=pattern bitwidth.file=nix": (
        "config: bitwidth.file=nix is no file. Give a table that bitwidth=sensitivity *"
    ),
    "train recipe.ema=1": "config: recipe.ema=1 is out of range: it must be in [0, 1).",
    "train launch=paralel": "config: launch 'paralel' not found. Options: *mean 'parallel'?",
    "train recipe.epochs=ten": "config: recipe.epochs must be an integer, got 'ten' (str).",
    "train recipe.lr=0": "config: recipe.lr=0* is out of range: it must be positive, and at most *",
    "train recipe.optimizer=sdg": "config: recipe.optimizer=sdg is out of range: *",
    "train model.depth=deep": "config: model.depth must be an integer, got 'deep' (str).",
    "train quantizer=lsq quantizer.weight.init=best": (
        "config: quantizer.weight.init must be one of lsq, mse, got 'best' (str)."
    ),
    "train quantizer.act._target_=qexp.quant.lsq.LQS": (
        "config: quantizer.act._target_ 'qexp.quant.lsq.LQS' cannot be imported: *"
        "Did you mean 'LSQ'?"
    ),
    # tools
    "eval": "eval: no run given. *",
    "eval run=x split=tset": "config: split must be one of test, val, train, got 'tset' (str).",
    "export run=x format=onnx adapters=float16": "config: adapters=float16 is for format=packed, *",
    "resume": "qexp: the following arguments are required: run. Try: qexp resume --help",
    "resume nix": "resume: no run 'nix' under 'outputs'. List runs with: qexp ls outputs",
    "ls nix": "ls: no runs under 'nix'. Start one with: qexp train",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_wrong_command_or_config_is_one_line_and_exit_2(
    qexp: Qexp, tmp_path: Path, command: str
) -> None:
    said = qexp(*command.split())
    assert matches(said.err, COMMANDS[command]), said.err
    assert "Traceback" not in said.out + said.err
    assert said.code == 2
    assert not list(tmp_path.iterdir())


def test_two_wrong_keys_are_told_by_the_chosen_config_not_by_the_default(qexp: Qexp) -> None:
    said = qexp("train", "recipe=ptq", "recipe.epochs=2", "recipe.calibration_image=3", "bits=2")
    first, second = said.err.splitlines()
    assert matches(first, "config: no key 'recipe.epochs' (ptq has: *).*")
    assert matches(second, "config: no key 'recipe.calibration_image' (ptq has: *).*")
    assert "calibration_images" not in said.err
    assert said.code == 2


def test_several_mistakes_are_told_at_once(qexp: Qexp) -> None:
    said = qexp("train", "bits=four", "recipe.lr=x", "seed=-1", "+model.dept=3")
    assert said.code == 2
    assert sorted(line.split()[1] for line in said.err.splitlines()) == sorted(
        ["bits", "recipe.lr", "seed", "no"]
    )


# Data and places: exit 1


def image(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 20)).save(path)


def no_data(tmp_path: Path) -> tuple[str, ...]:
    return ("dataset=cifar10",)


def damaged_data(tmp_path: Path) -> tuple[str, ...]:
    (tmp_path / "data" / "cifar-10-batches-py").mkdir(parents=True)
    return ("dataset=cifar10",)


def no_folder(tmp_path: Path) -> tuple[str, ...]:
    return FOLDER


def empty_folder(tmp_path: Path) -> tuple[str, ...]:
    (tmp_path / "images" / "train").mkdir(parents=True)
    return FOLDER


def empty_class(tmp_path: Path) -> tuple[str, ...]:
    for part in ("train", "val"):
        image(tmp_path / "images" / part / "cat" / "1.png")
        (tmp_path / "images" / part / "dog").mkdir()
    return FOLDER


def wrong_class_count(tmp_path: Path) -> tuple[str, ...]:
    for part in ("train", "val"):
        image(tmp_path / "images" / part / "cat" / "1.png")
    return (*FOLDER, "dataset.classes=3")


def unreadable_image(tmp_path: Path) -> tuple[str, ...]:
    for part in ("train", "val"):
        for name in ("cat", "dog"):
            for number in range(4):
                image(tmp_path / "images" / part / name / f"{number}.png")
    for broken in (tmp_path / "images" / "train").rglob("*.png"):
        broken.write_bytes(b"not an image")
    return (*FOLDER, "dataset.workers=0", "recipe.batch_size=4", "recipe.calibration_images=4")


def nan_loss(tmp_path: Path) -> tuple[str, ...]:
    return ("recipe.lr=1e30",)


def file_in_the_way(tmp_path: Path) -> tuple[str, ...]:
    (tmp_path / "outputs").write_text("")
    return ()


def folder_of_another(tmp_path: Path) -> tuple[str, ...]:
    (tmp_path / "locked").mkdir(mode=0o500)
    return ("out=locked/outputs",)


RUNS = {
    no_data: "data: CIFAR-10 not found under 'data'. Set dataset.root=..., or "
    "dataset.download=true, or use dataset=fashion_mini.",
    damaged_data: "data: CIFAR-10 under 'data*' is incomplete or damaged (*). Delete that folder*",
    no_folder: "data: imagefolder not found under 'images': no folder 'train'. Set dataset.root=*",
    empty_folder: "data: 'images/train' is empty: it needs one folder of images per class. *",
    empty_class: "data: class 'dog' has no images in 'images/train'. *",
    wrong_class_count: "data: 1 classes under 'images', dataset.classes=3. *",
    unreadable_image: "data: images/train/*.png cannot be read as an image (*). Replace or *",
    nan_loss: "run: loss is * at epoch 1, step *; no checkpoint yet. Lower recipe.lr or set *",
    file_in_the_way: "run: outputs*: a * file*. Set out=..., then start or resume the run.",
    folder_of_another: "run: locked/outputs: no permission to write. Set out=... to a folder of *",
}


@pytest.mark.parametrize("prepare", RUNS, ids=lambda prepare: prepare.__name__)
def test_bad_data_or_place_is_one_line_and_exit_1(
    qexp: Qexp, tmp_path: Path, prepare: object
) -> None:
    if prepare is folder_of_another and os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    more = prepare(tmp_path)  # type: ignore[operator]
    said = qexp(*_settled(more))
    assert matches(said.err, RUNS[prepare]), said.err  # type: ignore[index]
    assert "Traceback" not in said.out + said.err
    assert said.code == 1
    for status in tmp_path.rglob("status.json"):
        assert json.loads(status.read_text())["state"] == "failed"
        assert "Traceback" in (status.parent / "train.log").read_text()


@pytest.mark.parametrize("place", ["out=/proc/nope", "out=afile", "hydra.sweep.dir=afile"])
def test_a_sweep_where_nothing_can_be_written_is_one_line(
    qexp: Qexp, tmp_path: Path, place: str
) -> None:
    (tmp_path / "afile").touch()
    said = qexp(*SMOKE, "-m", "seed=0,1", place)
    assert matches(said.err, "run: *. Set out=*"), said.err
    assert "Errno" not in said.err
    assert said.code == 1
    assert [p.name for p in tmp_path.iterdir()] == ["afile"]


def _settled(more: tuple[str, ...]) -> list[str]:
    """SMOKE with `more`, which may choose another data set than the synthetic one."""
    if not any(word.startswith("dataset=") for word in more):
        return [*SMOKE, *more]
    return [*(word for word in SMOKE if not word.startswith("dataset")), *more]


def no_checkpoint(tmp_path: Path) -> tuple[str, ...]:
    return (*START, "model.checkpoint=float.pt")


def truncated_checkpoint(tmp_path: Path) -> tuple[str, ...]:
    torch.save({"a": torch.zeros(1000)}, tmp_path / "float.pt")
    whole = (tmp_path / "float.pt").read_bytes()
    (tmp_path / "float.pt").write_bytes(whole[: len(whole) // 2])
    return (*START, "model.checkpoint=float.pt")


def other_model(tmp_path: Path) -> tuple[str, ...]:
    torch.save(torch.nn.Linear(3, 3).state_dict(), tmp_path / "float.pt")
    return (*START, "model.checkpoint=float.pt")


def other_classes(tmp_path: Path) -> tuple[str, ...]:
    from qexp.models.resnet import ResNet

    torch.save(ResNet(num_classes=10, in_channels=3, depth=8).state_dict(), tmp_path / "float.pt")
    return (*START, "model.checkpoint=float.pt", "dataset.classes=7")


def not_finite(tmp_path: Path) -> tuple[str, ...]:
    from qexp.models.resnet import ResNet

    state = ResNet(num_classes=10, in_channels=3, depth=8).state_dict()
    state["conv1.weight"][0] = float("nan")
    torch.save(state, tmp_path / "float.pt")
    return (*START, "model.checkpoint=float.pt")


def folder_without_checkpoint(tmp_path: Path) -> tuple[str, ...]:
    (tmp_path / "float.pt").mkdir()
    return (*START, "model.checkpoint=float.pt")


def empty_file(tmp_path: Path) -> tuple[str, ...]:
    (tmp_path / "float.pt").touch()
    return (*START, "model.checkpoint=float.pt")


def weights_of_another(tmp_path: Path) -> tuple[str, ...]:
    return (*START, "model.checkpoint=IMAGENET1K_V1")


def weights_of_other_classes(tmp_path: Path) -> tuple[str, ...]:
    return (*START, "model=resnet18", "model.checkpoint=IMAGENET1K_V1", "dataset.image_size=32")


def teacher(tmp_path: Path) -> tuple[str, ...]:
    torch.save(torch.nn.Linear(3, 3).state_dict(), tmp_path / "float.pt")
    return ("recipe.distill.teacher=float.pt", "recipe.distill.weight=0.5")


def unknown_weights(tmp_path: Path) -> tuple[str, ...]:
    return (*START, "model=resnet18", "model.checkpoint=IMAGENET1K_V9", "dataset.image_size=32")


CHECKPOINTS = {
    no_checkpoint: "checkpoint: float.pt not found.*",
    truncated_checkpoint: "checkpoint: float.pt is truncated or not a PyTorch state dict (*). *",
    other_model: "checkpoint: float.pt does not fit the model: *missing*unexpected*Set model=*",
    other_classes: "checkpoint: float.pt does not fit the model: checkpoint has 10 classes, "
    "dataset has 7. *",
    not_finite: "checkpoint: float.pt holds NaN or infinite values (conv1.weight). Give one *",
    folder_without_checkpoint: "checkpoint: float.pt is a folder. Give a file in it, such as *",
    empty_file: "checkpoint: float.pt is truncated or not a PyTorch state dict (*). *",
    weights_of_another: "checkpoint: ResNet has no torchvision weights 'IMAGENET1K_V1'. Set *",
    weights_of_other_classes: "checkpoint: IMAGENET1K_V1 has 1000 classes, dataset has 10. *",
    teacher: "config: recipe.distill.teacher: float.pt does not fit the model: *",
    unknown_weights: "checkpoint: torchvision has no weights 'IMAGENET1K_V9' of resnet18 (*",
}


@pytest.mark.parametrize("dry", [False, True], ids=["run", "dry"])
@pytest.mark.parametrize("prepare", CHECKPOINTS, ids=lambda prepare: prepare.__name__)
def test_a_checkpoint_that_cannot_be_loaded_is_one_line_and_nothing_is_written(
    qexp: Qexp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prepare: object, dry: bool
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "float.pt"))  # no weights are here
    more = prepare(tmp_path)  # type: ignore[operator]
    before = sorted(tmp_path.rglob("*"))
    said = qexp(*SMOKE, *more, f"dry_run={dry}")
    assert matches(said.err, CHECKPOINTS[prepare]), said.err  # type: ignore[index]
    assert said.code == 2
    assert sorted(tmp_path.rglob("*")) == before


def test_eval_of_what_is_no_run_or_of_a_damaged_one(qexp: Qexp, tmp_path: Path) -> None:
    for command in ("eval", "export"):
        said = qexp(command, "run=nix")
        assert matches(said.err, f"{command}: 'nix' is not a run folder. *qexp ls")
        assert said.code == 2
    assert qexp(*SMOKE, "folder=outputs/run").code == 0
    said = qexp("eval", "run=outputs/run", "checkpoint=nix.pt", *ALWAYS)
    assert matches(said.err, "eval: no file 'outputs/run/nix.pt'. Give checkpoint=last.pt or *")
    assert said.code == 2
    last = tmp_path / "outputs" / "run" / "last.pt"
    last.write_bytes(last.read_bytes()[:2000])
    said = qexp("eval", "run=outputs/run", *ALWAYS)
    assert said.code == 1
    assert matches(said.err, "checkpoint: 'outputs/run/last.pt' is truncated *2000 bytes*best.pt.")
    (tmp_path / "outputs" / "run" / "config.yaml").write_text("seed: 1")
    for command in ("eval", "export"):
        said = qexp(command, "run=outputs/run")
        assert matches(said.err, f"{command}: outputs/run/config.yaml is damaged. *.hydra*values*")
        assert said.code == 2


def test_eval_names_the_file_and_what_a_split_needs(qexp: Qexp, tmp_path: Path) -> None:
    assert qexp(*SMOKE, "folder=outputs/run").code == 0
    file = tmp_path / "outputs" / "run" / "best.pt"
    said = qexp("eval", "run=outputs/run", f"checkpoint={file}", *ALWAYS)
    assert said.out.rstrip().endswith(f"img/s | {file}")
    said = qexp("eval", "run=outputs/run", "checkpoint=outputs/run/best.pt", *ALWAYS)
    assert said.out.rstrip().endswith(f"img/s | {file}")
    said = qexp("eval", "run=outputs/run", "split=val", *ALWAYS)
    assert matches(said.err, "data: * has no split 'val' (has: test, train). Use split=test, or *")
    assert said.code == 2


def test_resume_of_a_running_run_and_of_one_without_config(qexp: Qexp, tmp_path: Path) -> None:
    run = tmp_path / "outputs" / "x" / "run"
    run.mkdir(parents=True)
    (run / "status.json").write_text(json.dumps({"state": "running", **owner()}))
    assert matches(qexp("resume", "x/run").err, "resume: outputs/x/run is still running (pid *")
    (run / "status.json").write_text(json.dumps({"state": "failed"}))
    said = qexp("resume", "x/run")
    assert matches(said.err, "resume: outputs/x/run has no .hydra/config.yaml. Start a new run.")
    assert said.code == 2


def test_a_missing_part_of_qexp_is_one_line(qexp: Qexp, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "qexp.recipes.evaluate", None)
    said = qexp("eval", "run=x")
    assert said.code == 2
    assert said.err == (
        "qexp: this installation has no qexp.recipes.evaluate.evaluate_run. Reinstall it.\n"
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["bitwidth=pattern", "bitwidth.file=/nonexist"], "bitwidth.file=/nonexist is no file."),
        (
            ["bitwidth=progressive", "bitwidth.stages=[{until: 0.5, bits: 8}]"],
            "config: bitwidth=progressive: ",
        ),
        (["recipe.distill.teacher=/nonexist"], "recipe.distill.teacher=/nonexist is no file"),
    ],
)
def test_what_a_policy_refuses_is_said_before_a_folder_is_made(
    qexp: Qexp, tmp_path: Path, words: list[str], message: str
) -> None:
    said = qexp("train", "dataset=synthetic", *words)
    assert said.code == 2
    assert message in said.err
    assert len(said.err.splitlines()) == 1
    assert not (tmp_path / "outputs").exists()


def test_a_value_that_needs_quotes_gets_them(qexp: Qexp) -> None:
    said = qexp("train", "out=runs/x=y")
    assert "Quote the value: \"out='runs/x=y'\"" in said.err


def test_a_trained_quantized_run_is_no_start(qexp: Qexp, tmp_path: Path) -> None:
    torch.save({"conv1.weight": torch.ones(1), "conv1.act_quantizer.scale": torch.ones(1)}, "x.pt")
    said = qexp("train", "dataset=synthetic", "model=resnet8", "model.checkpoint=x.pt")
    assert "it is of a quantized run. A start is a float network" in said.err
