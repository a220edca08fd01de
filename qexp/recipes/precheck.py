"""What can be found wrong before a folder is claimed and a float network is trained.

The data set is opened, and the network is built for it and quantized on the CPU, from weights that
are thrown away; files of weights are read and compared with it. Nothing is written, and the random
numbers of the run stay as they are.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from qexp.data.sampling import steps_in_epoch
from qexp.errors import CheckpointError, ConfigError, QexpError, one_line
from qexp.models.load import WEIGHTS_NAME, check_weights
from qexp.quant.convert import Bits, float_operands, make_quantizers, quant_layers
from qexp.quant.plan import Schedule
from qexp.quant.trace import Layer, trace
from qexp.recipes import build
from qexp.recipes.handover import checkpoint_file, load_folded, read_ptq
from qexp.recipes.logits import giving_logits, run_in_training_mode, trained
from qexp.recipes.start import check_from_ptq, check_teacher, teacher_target
from qexp.recipes.units import check_units
from qexp.runner.distributed import launched
from qexp.runner.resuming import CHECKPOINT
from qexp.signature import unknown_key

FLOAT = Bits(32, 32)


class Sizes(Protocol):
    """What is asked of a data set here."""

    @property
    def num_classes(self) -> int: ...
    @property
    def input_shape(self) -> tuple[int, ...]: ...
    @property
    def train_size(self) -> int: ...


def precheck(cfg: DictConfig, data: Sizes | None = None, *, resume: bool = False) -> None:
    """Build what the run would build, and throw it away.

    Args:
        data: sizes to go by where the data itself is absent (`dry_run`).
        resume: the run in `cfg.folder` goes on: what one that has begun started from is not looked
            at, its file may be gone.

    Raises:
        ConfigError: a value, a policy, a network or a file that cannot be had.
        DataError: images missing or damaged.
    """
    if not build.is_float(cfg):
        build.make_policy(cfg)
        build.make_method(cfg)
    teacher = (cfg.recipe.get("distill") or {}).get("teacher", "float")
    if teacher != "float" and not (Path(teacher).is_file() or WEIGHTS_NAME.fullmatch(teacher)):
        raise ConfigError(
            f"config: recipe.distill.teacher={teacher} is no file, no name of published weights, "
            "nor 'float'."
        )
    check_teacher(cfg)
    with torch.random.fork_rng(devices=[]):
        cpu = torch.device("cpu")
        sizes: Sizes = build.make_dataset(cfg, cpu) if data is None else data
        if sizes.num_classes < 2:
            raise ConfigError(
                f"config: dataset={cfg.dataset.name} has images of one class: every answer would "
                "be right. Give it a second one."
            )
        model = build.make_model(cfg, sizes, cpu)
        try:
            with giving_logits(cfg, model, sizes.num_classes):
                layers = trace(model, sizes.input_shape)
                if trained(cfg):
                    run_in_training_mode(cfg, model, sizes.input_shape)
        except QexpError:
            raise
        except Exception as error:  # a network may be anyone's
            shape = "x".join(map(str, sizes.input_shape))
            known = isinstance(error, RuntimeError)  # torch's own
            reason = " ".join(str(error).split()) if known else one_line(error)
            raise ConfigError(
                f"config: model={cfg.model.get('name', cfg.model._target_)} cannot take images of "
                f"{shape}: {reason}. {_other_size(cfg, sizes.input_shape)}"
            ) from error
        begun = resume and (Path(cfg.folder) / CHECKPOINT).is_file()
        if not begun:
            check_files(cfg, model)
        check_teacher_weights(cfg, model, sizes)
        if not build.trains(cfg.recipe):
            check_units(cfg, model, layers, sizes.input_shape)
        bits = None if build.is_float(cfg) else nominal_bits(cfg, layers)
        check_metric(cfg, model, layers, sizes.input_shape)
        context = {"epoch": 0, "epochs": cfg.recipe.get("epochs", 1)}
        with _width_errors(cfg):
            build.make_network(unsaved(cfg), model, sizes.input_shape, context=context, bits=bits)
        if not build.is_float(cfg):
            check_widths(cfg, layers)
        _rates(cfg, model)
        _check_quantized_layers_run(model, sizes.input_shape)
    if build.trains(cfg.recipe):
        steps_in_epoch(sizes.train_size, cfg.recipe.batch_size, launched().size)
    _enough_images(cfg, sizes.train_size, begun)


def _other_size(cfg: DictConfig, input_shape: Sequence[int]) -> str:
    """What to set where images and network may differ in size."""
    key = next((key for key in ("image_size", "crop") if key in cfg.dataset), None)
    own = f"its own keyword for their size, such as +model.image_size={input_shape[-1]}"
    if key is None:
        return f"Set model=... to one for them, or {own}."
    return f"Set dataset.{key}=... to what it takes, or {own}."


@torch.no_grad()
def _check_quantized_layers_run(model: nn.Module, input_shape: Sequence[int]) -> None:
    """Refuse a network whose forward still calls a float layer that was swapped."""
    called: set[nn.Module] = set()  # a swapped layer's float twin has the same hooks
    layers = quant_layers(model)
    for layer in layers.values():
        layer.register_forward_pre_hook(lambda module, inputs: called.add(module))
    with float_operands(model):
        model.eval()(torch.zeros(2, *input_shape).to(next(model.parameters())))
    if missing := [name for name, layer in layers.items() if layer not in called]:
        raise ConfigError(
            f"model: layer '{missing[0]}' is not called as the attribute that it is: the network "
            "keeps it in a list or a variable of its own too, which quantization does not change. "
            f"Call self.{missing[0]}, or keep it in an nn.ModuleList."
        )


def check_files(cfg: DictConfig, model: nn.Module) -> None:
    """Refuse a checkpoint to start from that `model` cannot take.

    Raises:
        ConfigError: the file is missing, damaged, or of another network.
    """
    spec = cfg.model.get("checkpoint")
    if not (cfg.recipe.get("from_scratch") or spec in (None, "none", "auto")):
        with _said_as_config():
            _check_start(cfg, model, checkpoint_file(spec))


def check_teacher_weights(cfg: DictConfig, model: nn.Module, sizes: Sizes) -> None:
    """Refuse a teacher's file that its network cannot take: `model`, or one of its own.

    Raises:
        ConfigError: the file does not fit, or its network cannot take the images.
    """
    distill = cfg.recipe.get("distill") or {}
    if distill.get("weight", 0) == 0 or distill.get("teacher", "float") == "float":
        return
    if section := distill.get("model"):
        model = build.make_model(cfg, sizes, torch.device("cpu"), section)
        try:
            with torch.no_grad():
                given = tuple(model.eval()(torch.zeros(2, *sizes.input_shape)).shape)
        except Exception as error:  # a network may be anyone's
            raise ConfigError(
                f"config: recipe.distill.model={section.get('name', section._target_)} cannot take "
                f"images of {'x'.join(map(str, sizes.input_shape))}: {one_line(error)}. Give it "
                "another network."
            ) from error
        if given != (2, sizes.num_classes):
            raise ConfigError(
                f"config: recipe.distill.model gives {list(given)} for 2 images, not "
                f"[2, {sizes.num_classes}]. Give it a network that classifies."
            )
    with _said_as_config("config: recipe.distill.teacher: "):
        check_weights(model, teacher_target(cfg), distill["teacher"])


def _check_start(cfg: DictConfig, model: nn.Module, source: str) -> None:
    ptq = read_ptq(source)
    if ptq is None:
        check_weights(model, cfg.model._target_, source)
    else:
        check_from_ptq(cfg, source)
        load_folded(copy.deepcopy(model), ptq, source)


@contextmanager
def _said_as_config(area: str = "checkpoint: ") -> Iterator[None]:
    """Nothing has been written yet: a wrong file is a wrong value."""
    try:
        yield
    except CheckpointError as error:
        raise ConfigError(str(error).replace("checkpoint: ", area, 1)) from error


def nominal_bits(cfg: DictConfig, layers: Sequence[Layer]) -> dict[str, Bits] | None:
    """The widths to go by where the policy decides with data: `bits`. None: it can be asked.

    Raises:
        ConfigError: what the policy can refuse without data.
    """
    policy = build.make_policy(cfg)
    with build.policy_errors(cfg):
        policy.check(layers, build.factories(cfg)["weight"])
        return policy.nominal(layers, cfg.bits) if policy.needs_data else None


def check_widths(cfg: DictConfig, layers: Sequence[Layer]) -> None:
    """Refuse widths that a layer may come to, in a later stage or as a candidate, and that its
    quantizers do not have.

    Raises:
        ConfigError: the first of them.
    """
    policy, factories = build.make_policy(cfg), build.factories(cfg)
    with build.policy_errors(cfg):
        tables = policy.possible(layers, cfg.recipe.get("epochs", 1))
    for table in tables:
        for layer in layers:
            if table.get(layer.name, FLOAT) != FLOAT:
                with _width_errors(cfg):
                    make_quantizers(layer, table[layer.name], **factories)


@contextmanager
def _width_errors(cfg: DictConfig) -> Iterator[None]:
    """Turn what a quantizer says of a width into one line."""
    try:
        yield
    except ValueError as error:
        raise ConfigError(f"config: quantizer={cfg.quantizer.name}: {error}.") from error


def check_metric(
    cfg: DictConfig, model: nn.Module, layers: Sequence[Layer], input_shape: tuple[int, ...]
) -> None:
    """Refuse a policy whose metric cannot be had of `model`.

    Raises:
        ConfigError: second derivatives that the metric needs and torch does not have.
    """
    if build.is_float(cfg):
        return
    policy = build.make_policy(cfg)
    with build.policy_errors(cfg):
        policy.check_metric(layers, model, torch.randn(1, *input_shape))


def unsaved(cfg: DictConfig) -> DictConfig:
    """`cfg` with a policy that writes no file."""
    if not cfg.bitwidth.get("save"):
        return cfg
    merged = OmegaConf.merge(cfg, {"bitwidth": {"save": None}})
    assert isinstance(merged, DictConfig)
    return merged


def _rates(cfg: DictConfig, model: nn.Module) -> None:
    """Refuse a rate of reconstruction for what no quantizer of `model` has."""
    if build.is_float(cfg) or build.trains(cfg.recipe):
        return
    inputs = (layer.act_quantizer for layer in quant_layers(model).values())
    known = set(Schedule().lr) | {name for q in inputs for name, _ in q.named_parameters()}
    unknown = [key for key in cfg.recipe.get("lr", {}) if key not in known]
    if unknown:
        raise ConfigError(
            "\n".join(unknown_key(f"recipe.lr.{key}", sorted(known)) for key in unknown)
        )


def _enough_images(cfg: DictConfig, size: int, begun: bool) -> None:
    """Refuse to look at more training images than there are."""
    recipe, quantized = cfg.recipe, not build.is_float(cfg)
    asked = {}
    if quantized:
        asked["recipe.calibration_images"] = recipe.get("calibration_images", 0)
    if quantized and "held_out" in recipe:
        asked["recipe.images + recipe.held_out"] = recipe.images + recipe.held_out
    if quantized and build.needs_data(cfg):
        asked["bitwidth.images"] = cfg.bitwidth.get("images", 0)
    if build.trains(recipe):
        asked["recipe.batch_size"] = recipe.batch_size
        asked["recipe.bn_reestimate"] = recipe.get("bn_reestimate", 0)
    auto = cfg.model.get("checkpoint") == "auto" and not recipe.get("from_scratch")
    if auto and not begun:
        asked["float.batch_size"] = cfg.float.batch_size
        asked["float.bn_reestimate"] = cfg.float.get("bn_reestimate", 0)
    for key, count in asked.items():
        if count > size:
            raise ConfigError(f"config: {key}={count}, there are {size} to train on. Lower it.")
