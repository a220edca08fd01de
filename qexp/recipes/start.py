"""Where training starts: the float network, its top-1, and the teacher."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from qexp.errors import ConfigError
from qexp.models.digest import file_sha256, weights_sha256
from qexp.models.load import WEIGHTS_NAME, load_weights, weights_file
from qexp.quant.fold import fold_bn_
from qexp.recipes.baseline import float_checkpoint, trained_checkpoint
from qexp.recipes.build import is_float, is_untrained, make_model, trains
from qexp.recipes.evaluate import evaluate
from qexp.recipes.handover import checkpoint_file, load_folded, read_ptq
from qexp.recipes.settings import Settings
from qexp.runner.checkpoint import rng_state, set_rng_state
from qexp.runner.distributed import led
from qexp.runner.folder import run_config
from qexp.runner.run import Run

_SCORED: dict[str, float] = {}  # top-1 by file, network, data and device

# Unclipped, 40 steps of a folded ResNet-20 at W4A4 went well at a rate of 0.001 and ended at chance
# at 0.01 (by hand, not kept).
UNCLIPPED_LR = 0.001


@dataclass
class FloatStart:
    """The float network a run starts from.

    Attributes:
        top1: its top-1 on the test split in percent, measured in this run; None if untrained.
        sha256: of its weights (`weights_sha256`); None from random weights.
        source: path, absolute once it is loaded, or weights name.
        teacher: a frozen copy for distillation, or None.
        teacher_sha256: of the weights in the file that is the teacher, or None.
        file_sha256: of the bytes of `source`, or None.
        ptq: the checkpoint of the post-training run that it comes from, or None.
        folded: its batch norms are folded.
        val_seen: it may have been trained on the images that are held out here.
    """

    model: nn.Module
    top1: float | None
    sha256: str | None
    source: str | None
    teacher: nn.Module | None
    ptq: Mapping[str, Any] | None = None
    folded: bool = False
    teacher_sha256: str | None = None
    file_sha256: str | None = None
    val_seen: bool = False

    def record(self) -> dict[str, Any]:
        """What the checkpoint keeps."""
        keys = ("top1", "sha256", "source", "teacher_sha256", "file_sha256", "folded", "val_seen")
        return {key: getattr(self, key) for key in keys}


def check_teacher(cfg: DictConfig) -> None:
    """Refuse to learn from the float network where that has random weights, or is no such one.

    Raises:
        ConfigError: the teacher is the float network, which is random or of another kind.
    """
    distill = cfg.recipe.get("distill") or {}
    by_float = distill.get("weight", 0) > 0 and distill.get("teacher", "float") == "float"
    if by_float and distill.get("model"):
        raise ConfigError(
            "config: recipe.distill.model is another network than the one this run starts from. "
            "Set recipe.distill.teacher=FILE, its weights."
        )
    if by_float and is_untrained(cfg):
        raise ConfigError(
            "config: recipe.distill.teacher=float is a network with random weights here. Set "
            "recipe.distill.teacher=FILE, or model.checkpoint=auto with recipe.from_scratch=false."
        )


def check_from_ptq(cfg: DictConfig, source: str | None) -> None:
    """Refuse a post-training run as the start of a run that needs a float network.

    Raises:
        ConfigError: this run reconstructs, or learns from the float network that is not kept.
    """
    if not trains(cfg.recipe):
        raise ConfigError(
            f"config: model.checkpoint={source} is itself a post-training run. Give the float "
            "network it started from, or train on with recipe=qat."
        )
    distill = cfg.recipe.get("distill") or {}
    if distill.get("weight", 0) > 0 and distill.get("teacher", "float") == "float":
        raise ConfigError(
            "config: recipe.distill.teacher=float: a post-training run keeps no float network. "
            "Set recipe.distill.teacher=FILE."
        )


def float_start(
    cfg: DictConfig,
    s: Settings,
    dataset: Any,
    run: Run,
    device: torch.device,
    saved: Mapping[str, Any] | None,
    *,
    begun: Mapping[str, Any] | None = None,
) -> FloatStart:
    """Build the float network and load its weights; when resuming, only what is still needed.

    Args:
        saved: the checkpoint of a training run that is resumed.
        begun: the record in the checkpoint of a run that is resumed and needs all of its start.

    Raises:
        ConfigError: a file that a resumed run began with and still needs is not that file any more.
    """
    check_teacher(cfg)
    model = make_model(cfg, dataset, device)
    if s.channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    spec = cfg.model.get("checkpoint")
    spec = None if s.from_scratch or spec == "none" else spec
    start = FloatStart(model, None, None, spec, None)
    begun = begun if saved is None else saved["start"]
    taught = s.distill.weight > 0 and s.distill.teacher == "float"
    contents = dataset.protocol().get("contents")
    if begun is not None:
        needed = saved is None or taught
        start.source = _as_begun(cfg, begun, contents) if needed else begun["source"]
    elif spec == "auto":
        before = rng_state()
        start.source = led(lambda: str(float_checkpoint(cfg, run, contents)))
        set_rng_state(before)  # whether the baseline had to be trained changes nothing that follows
    elif spec is not None:
        start.source = checkpoint_file(spec)
    if saved is None and start.source is not None:
        _load(cfg, start, dataset, run)
    if begun is not None:
        start.sha256, start.file_sha256 = begun["sha256"], begun.get("file_sha256")
    if saved is not None:
        start.top1, start.folded = saved["start"]["top1"], bool(saved.get("folded"))
        start.val_seen = saved["start"].get("val_seen", False)
        if start.folded:
            fold_bn_(model)
    if start.folded:
        check_from_ptq(cfg, start.source)
    elif saved is not None and taught and start.source is not None:
        load_weights(model, cfg.model._target_, start.source)
    start.teacher_sha256 = _teacher_sha256(cfg, s, begun)
    if s.distill.weight > 0:
        start.teacher = _teacher(cfg, s, model, dataset, device)
    if is_float(cfg) and start.source is None:
        run.info("float network: from random weights")
        given = cfg.model.get("checkpoint")
        if given not in (None, "auto", "none"):
            run.warn(f"model.checkpoint={given} is not used. To train it on: recipe=qat")
    return start


def _as_begun(cfg: DictConfig, begun: Mapping[str, Any], contents: str | None) -> str | None:
    """The file that a resumed run began with, where it is now: folders may have moved together.

    Raises:
        ConfigError: it is nowhere, or holds other weights.
    """
    source, spec = begun["source"], cfg.model.get("checkpoint")
    if source is None or (WEIGHTS_NAME.fullmatch(source) and not Path(source).exists()):
        return source
    if not Path(source).is_file():
        here = trained_checkpoint(cfg, contents) if spec == "auto" else checkpoint_file(spec)
        source = here or source
    _check_unchanged(source, begun["sha256"])
    return source


def replaced_file(cfg: DictConfig, protocol: Mapping[str, Any]) -> str | None:
    """The file of the start or of the teacher that is another now than for a run with `protocol`.

    None where there is none: one that is gone, or whose hash is not known, is taken for the same.
    """
    recipe, spec, files = cfg.recipe, cfg.model.get("checkpoint"), {}
    if spec not in (None, "auto", "none") and not recipe.get("from_scratch"):
        files[checkpoint_file(spec)] = protocol.get("float_sha256")
    distill = recipe.get("distill") or {}
    if distill.get("weight", 0) > 0 and distill.get("teacher", "float") != "float":
        files[distill["teacher"]] = (protocol.get("distill") or {}).get("teacher")
    for file, sha256 in files.items():
        if sha256 and Path(file).is_file() and sha256 not in _hashes(file):
            return file
    return None


def _hashes(source: str) -> tuple[str, str]:
    about = Path(source).stat()
    return _hashed(source, about.st_mtime_ns, about.st_size)


@lru_cache(maxsize=8)  # for the jobs of a sweep
def _hashed(source: str, modified: int, size: int) -> tuple[str, str]:
    # Of a run's checkpoint, too, earlier versions noted the hash of the file.
    return weights_sha256(Path(source)), file_sha256(Path(source))


def _check_unchanged(source: str, sha256: str) -> None:
    if not Path(source).is_file() or sha256 not in _hashes(source):
        raise ConfigError(
            f"resume: {source} is no longer the file this run began with. Put it back, or start "
            "a new run."
        )


def _teacher_sha256(cfg: DictConfig, s: Settings, begun: Mapping[str, Any] | None) -> str | None:
    """What identifies the teacher's weights where they are of a file.

    Raises:
        ConfigError: a resumed run had another teacher.
    """
    teacher = s.distill.teacher
    if teacher != "float" and s.distill.weight > 0:
        teacher = str(weights_file(teacher_target(cfg), teacher))
    if teacher == "float" or not Path(teacher).is_file():
        return None
    known = begun.get("teacher_sha256") if begun is not None else None
    if known is None:
        return weights_sha256(Path(teacher))
    if s.distill.weight > 0:
        _check_unchanged(teacher, known)
    return known


def _load(cfg: DictConfig, start: FloatStart, dataset: Any, run: Run) -> None:
    """Load `start.source`, a float network or a post-training run, and know its float top-1."""
    assert start.source is not None
    if (path := Path(start.source)).is_file():
        start.source, start.file_sha256 = str(path.absolute()), file_sha256(path)
    start.ptq = read_ptq(start.source)
    if dataset.has_val and not _held_out_alike(cfg, Path(start.source).parent):
        start.val_seen = True
        run.warn(
            f"{start.source} is of no run that held the same images out: it may have been trained "
            "on those that dataset.val_fraction keeps for validation"
        )
    if start.ptq is None:
        start.sha256 = load_weights(start.model, cfg.model._target_, start.source)
        start.top1 = _top1(cfg, start.model, start.sha256, dataset)
        run.info(f"float network: top-1 {start.top1:.2f} ({start.source})")
        return
    start.sha256 = load_folded(start.model, start.ptq, start.source)
    start.folded, start.top1 = True, start.ptq["start"]["top1"]
    known = "unknown" if start.top1 is None else f"{start.top1:.2f}"
    run.info(
        f"start: post-training run, top-1 {start.ptq['top1']:.2f}, "
        f"of a float network with {known} ({start.source})"
    )
    if cfg.recipe.get("grad_clip", 0) is None and cfg.recipe.lr > UNCLIPPED_LR:
        run.warn(
            f"no batch norm is left to hold a step of recipe.lr={cfg.recipe.lr} back; training may "
            "fall to chance. Use recipe=qat_after_ptq, with an experiment (whose rate it leaves) "
            "recipe.lr=0.003 recipe.grad_clip=1.0"
        )


def _held_out_alike(cfg: DictConfig, folder: Path) -> bool:
    """Whether the run in `folder` trained on the images that this one trains on."""
    try:
        own = run_config(folder, "run").dataset
    except ConfigError:
        return False
    keys = ("name", "val_fraction", "subset")
    return all(own.get(key) == cfg.dataset.get(key) for key in keys)


def _top1(cfg: DictConfig, model: nn.Module, sha256: str | None, dataset: Any) -> float:
    """Top-1 of the float network on the test split, scored once for all jobs of a sweep."""
    network = OmegaConf.to_container(cfg.model, resolve=True)
    key = repr((sha256, network, OmegaConf.to_container(cfg.dataset, resolve=True), cfg.device))
    if key not in _SCORED:
        _SCORED[key] = evaluate(model, dataset.eval_batches("test")).top1
    return _SCORED[key]


def _teacher(
    cfg: DictConfig, s: Settings, model: nn.Module, dataset: Any, device: torch.device
) -> nn.Module:
    teacher = copy.deepcopy(model)
    if s.distill.teacher != "float":
        teacher = make_model(cfg, dataset, device, s.distill.model)
        load_weights(teacher, teacher_target(cfg), s.distill.teacher)
    return teacher.eval().requires_grad_(False)


def teacher_target(cfg: DictConfig) -> str:
    """`_target_` of the teacher's network."""
    own = (cfg.recipe.get("distill") or {}).get("model")
    return str((own or cfg.model)._target_)
