"""From a composed config to objects: data, float network, quantized network.

Each function takes the whole config and reads the nodes it names; nothing below this package
sees a config object.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from qexp.errors import CheckpointError, ConfigError, DataError, QexpError, one_line, origin
from qexp.models.build import build_model
from qexp.models.digest import averaged
from qexp.models.load import load_tensors_
from qexp.models.opened import open_attention_
from qexp.quant.bitwidth import Policy, Progressive
from qexp.quant.convert import Bits, Swap, quantize_
from qexp.quant.plan import Method
from qexp.quant.trace import Layer, trace
from qexp.recipes.absent import check_class_names, without_images
from qexp.recipes.signs import load_run_state, with_signs
from qexp.runner.device import pick_device
from qexp.runner.distributed import world
from qexp.runner.folder import run_config


@dataclass
class Network:
    """A network on its way: float, then quantized in place."""

    model: nn.Module
    layers: list[Layer]
    policy: Policy | None  # None for a float run
    bits: dict[str, Bits]
    swaps: list[Swap]
    sensitivity: dict[str, float] = field(default_factory=dict)  # by layer, if the policy has it


def make_dataset(cfg: DictConfig, device: torch.device) -> Any:
    """The data set of `cfg.dataset`, on `device`, in batches of `cfg.recipe.batch_size`.

    Raises:
        QexpError: what it refuses itself; a ConfigError for whatever else its class raises.
    """
    try:
        return instantiate(
            cfg.dataset,
            _convert_="all",
            device=device,
            batch_size=cfg.recipe.batch_size,
            seed=cfg.seed,
            rank=world().rank,
            world_size=world().size,
        )
    except InstantiationException as error:
        cause = origin(error)
        if isinstance(cause, QexpError):
            raise cause from None
        name = cfg.dataset.get("name", cfg.dataset._target_)
        why = one_line(error.__cause__ or error)
        raise ConfigError(f"config: dataset={name} cannot be built: {why}.") from error


def make_model(
    cfg: DictConfig, dataset: Any, device: torch.device, section: Mapping[str, Any] | None = None
) -> nn.Module:
    """The float network of `cfg.model` with random weights, the projections of attention layers.

    Args:
        section: the network to build instead, as a `model` section (a teacher's).
    """
    node: Any = cfg.model if section is None else section
    if OmegaConf.is_config(node):
        node = OmegaConf.to_container(node, resolve=True)
    model = build_model(node, dataset.num_classes, dataset.input_shape[0])
    open_attention_(model, dataset.input_shape)
    return model.to(device)


def factories(cfg: DictConfig) -> dict[str, Any]:
    """The quantizer factories of `cfg.quantizer`, as keywords of `quantize_`."""
    node = cfg.quantizer
    same = str(cfg.bitwidth.get("first_last", "same")) == "same"
    outer = None if same else node.get("outer")
    return {
        "weight": instantiate(node.weight, _convert_="all"),
        "act": instantiate(node.act, _convert_="all"),
        "outer_weight": instantiate(outer.weight, _convert_="all") if outer else None,
        "outer_act": instantiate(outer.act, _convert_="all") if outer else None,
    }


def is_float(cfg: DictConfig) -> bool:
    """Whether the run quantizes nothing."""
    return cfg.quantizer.get("weight") is None and cfg.quantizer.get("act") is None


def is_untrained(cfg: DictConfig) -> bool:
    """Whether the weights are random when the run begins."""
    given = cfg.model.get("checkpoint")
    return bool(cfg.recipe.get("from_scratch")) or given in (None, "none")


def make_policy(cfg: DictConfig) -> Policy:
    """The bit-width policy.

    Raises:
        ConfigError: a value that it refuses, a file that is not there, or a class that is none.
    """
    try:
        policy = instantiate(cfg.bitwidth, _convert_="all")
    except InstantiationException as error:
        cause = error.__cause__ or error
        detail = f"{cause.strerror}: {cause.filename}" if isinstance(cause, OSError) else cause
        raise ConfigError(f"config: bitwidth={cfg.bitwidth.get('name')}: {detail}.") from error
    if not isinstance(policy, Policy):
        raise ConfigError(
            f"config: bitwidth={cfg.bitwidth.get('name')}: {cfg.bitwidth._target_} is no subclass "
            "of qexp.quant.bitwidth.Policy. Make it one."
        )
    return policy


def make_method(cfg: DictConfig) -> Method:
    """`quantizer.reconstruct`, or plain calibration for a method that has none.

    Raises:
        ConfigError: a value that it refuses.
    """
    node = cfg.quantizer.get("reconstruct")
    try:
        return instantiate(node) if node is not None else Method(granularity="none")
    except InstantiationException as error:
        cause = error.__cause__ or error
        raise ConfigError(f"config: quantizer.reconstruct: {cause}.") from error


@contextmanager
def policy_errors(cfg: DictConfig) -> Iterator[None]:
    """Turn what a policy refuses in the block into one line."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise ConfigError(f"config: bitwidth={cfg.bitwidth.get('name')}: {error}.") from error


def make_network(
    cfg: DictConfig,
    model: nn.Module,
    input_shape: tuple[int, ...],
    *,
    context: Mapping[str, Any] | None = None,
    bits: Mapping[str, Bits] | None = None,
    signed: Mapping[str, bool] | None = None,
) -> Network:
    """Trace `model`, ask the policy for bits, and quantize it in place (uncalibrated).

    Args:
        context: what a policy may need beside the layers (`epoch`, `epochs`, `images`, ...).
        bits: widths already decided (a checkpoint's), instead of asking the policy.
        signed: whether each layer's input is signed, where that is already decided.
    """
    layers = with_signs(trace(model, input_shape), signed or {})
    if is_float(cfg):
        return Network(model, layers, None, {}, [])
    rule = str(cfg.bitwidth.get("first_last", "same"))
    if rule != "same" and all(layer.position != "inner" for layer in layers):
        raise ConfigError(
            f"config: bitwidth={cfg.bitwidth.get('name')} would decide nothing: the model has no "
            "convolution (2-D) or linear layer between its first and its last, for which "
            f"bitwidth.first_last={rule} holds. Set bitwidth.first_last=same."
        )
    policy = make_policy(cfg)
    staged = isinstance(policy, Progressive)
    if staged and not trains(cfg.recipe):
        raise ConfigError(
            f"config: bitwidth={cfg.bitwidth.get('name')} changes widths while training, which "
            f"recipe={cfg.recipe.get('name')} does not. Use bitwidth=uniform, or recipe=qat."
        )
    if cfg.recipe.get("ema") and staged:
        raise ConfigError(
            f"config: recipe.ema={cfg.recipe.ema} would average quantizers of different widths. "
            f"With bitwidth={cfg.bitwidth.get('name')} set recipe.ema=0."
        )
    with policy_errors(cfg):
        chosen = dict(policy.assign(layers, **(context or {})) if bits is None else bits)
    swaps = quantize_(model, layers, chosen, **factories(cfg))
    return Network(model, layers, policy, chosen, swaps, dict(policy.sensitivity_by_layer))


def trains(recipe: Mapping[Any, Any]) -> bool:
    """Whether a recipe trains in epochs; post-training quantization does not."""
    return "epochs" in recipe


def needs_data(cfg: DictConfig) -> bool:
    """Whether the bit-width policy looks at training images."""
    return make_policy(cfg).needs_data


def policy_context(cfg: DictConfig, model: nn.Module, dataset: Any, epochs: int) -> dict[str, Any]:
    """What a bit-width policy may look at: the epoch, and data if it says `needs_data`."""
    context: dict[str, Any] = {"epoch": 0, "epochs": epochs}
    if is_float(cfg) or not needs_data(cfg):
        return context
    images, labels = dataset.labelled_images(cfg.bitwidth.images, cfg.seed)
    return context | {
        "model": model,
        "weight_factory": factories(cfg)["weight"],
        "images": images,
        "labels": labels,
    }


def moved_to(root: str | None, dataset: DictConfig) -> None:
    """Set the folder of a data set's files, in its config; None: they are where it says.

    Raises:
        ConfigError: it has no files.
    """
    if root is None:
        return
    if "root" not in dataset:
        raise ConfigError(
            f"config: dataset.root={root}: {dataset.get('name')} has no files. Leave it out."
        )
    dataset.root = root


def load_run(
    folder: Path,
    name: str,
    device: str,
    area: str = "run",
    root: str | None = None,
    *,
    imageless: bool = False,
) -> tuple[nn.Module, Any, DictConfig]:
    """The trained network of a run folder, its data set and its config.

    Nothing is calibrated: bits, signs and every quantizer's state come from the checkpoint.

    Args:
        area: the command that asks, for its messages.
        root: of the data set's files, where they have moved.
        imageless: where the data set is not here, take its sizes alone (`Absent`).

    Raises:
        ConfigError: no such folder or file.
        CheckpointError: a damaged one, or of other classes than the data set's.
        DataError: images missing or damaged.
    """
    cfg = run_config(folder, area)
    moved_to(root, cfg.dataset)
    target = pick_device(device)
    if not (path := folder / name).is_file():
        here = [n for n in ("last.pt", "best.pt") if (folder / n).is_file()]
        advice = "It is no run's, or a collected result, which keeps no checkpoint."
        if here:
            advice = f"Give checkpoint={' or '.join(here)}."
        raise ConfigError(f"{area}: no file '{path}'. {advice}")
    state = load_run_state(path)
    dataset: Any
    try:
        dataset = make_dataset(cfg, target)
    except DataError as error:
        if not imageless:
            raise
        dataset = without_images(cfg, state, error)
    check_class_names(dataset, state, folder)
    model = restore(cfg, state, dataset, target)
    return model, dataset, cfg


def restore(
    cfg: DictConfig, state: Mapping[str, Any], dataset: Any, device: torch.device
) -> nn.Module:
    """Rebuild the network that `state` (a checkpoint of the runner) holds: what was scored.

    With `recipe.ema` that is the average; only a resumed training needs the weights beside it.
    """
    if not {"model", "bits"} <= set(state):
        raise CheckpointError(
            "checkpoint: it is none of a run (no widths in it). Give last.pt or best.pt of one."
        )
    model = make_model(cfg, dataset, device)
    if state.get("folded"):
        from qexp.quant.fold import fold_bn_

        fold_bn_(model)
    if not is_float(cfg):  # the policy is not asked: a file it was read from may be gone
        bits = {k: Bits(*v) for k, v in state["bits"].items()}
        layers = with_signs(trace(model, dataset.input_shape), state.get("signed", {}))
        quantize_(model, layers, bits, **factories(cfg))
    try:
        load_tensors_(model, averaged(state) or state["model"])
    except RuntimeError as error:
        raise CheckpointError(
            f"checkpoint: its tensors do not fit the network of its own config ({error}). "
            "Was config.yaml edited?"
        ) from error
    return model
