"""From the `model` section of a config to a network.

`_target_` names any callable that takes `num_classes` and returns an `nn.Module`: a class of this
package, a torchvision builder, or the user's own `package.module.name`. The remaining keys are its
keywords; `name` and `checkpoint` belong to the bench.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from torch import nn
from torch.nn.parameter import UninitializedParameter

from qexp.errors import ConfigError, QexpError, did_you_mean, one_line, reason

FOREIGN_WEIGHTS = {"weights", "weights_backbone", "pretrained", "pretrained_backbone"}
RESERVED = {"_target_", "name", "checkpoint"}


def resolve(target: str) -> Callable[..., Any]:
    """The callable that a dotted path names.

    Raises:
        ConfigError: the module cannot be imported or has no such name.
    """
    module_name, _, attribute = target.rpartition(".")
    if not module_name:
        raise ConfigError(f"config: model._target_={target!r} is not package.module.name.")
    try:
        module = import_module(module_name)
    except ImportError as error:
        raise ConfigError(
            f"config: model._target_={target!r} cannot be imported ({error}). "
            "Install the package or run from the folder that holds it."
        ) from error
    if not callable(found := getattr(module, attribute, None)):
        hint = did_you_mean(attribute, (n for n, value in vars(module).items() if callable(value)))
        raise ConfigError(f"config: {module_name} has no model '{attribute}'.{hint}")
    return found


def build_model(model: Mapping[str, Any], num_classes: int, in_channels: int) -> nn.Module:
    """Build the network of a config for a data set.

    Args:
        model: the `model` section: `_target_` and its keywords.
        num_classes: outputs of the network.
        in_channels: channels of the images; given to the target if it has such a keyword.

    Returns:
        The network on the CPU, in training mode, with no in-place activation: hooks may keep what
        they see.

    Raises:
        ConfigError: unknown target or keyword, a target that only takes RGB images, or one that
            makes no network with parameters.
    """
    name = model.get("name", model["_target_"])
    target = resolve(model["_target_"])
    keywords = {k: v for k, v in model.items() if k not in RESERVED}
    for key in FOREIGN_WEIGHTS & set(keywords):
        value = keywords[key]
        if value not in (None, False):
            instead = value if isinstance(value, str) else "IMAGENET1K_V1"
            raise ConfigError(
                f"config: model.{key}={value} would load weights that no run records. Use "
                f"model.checkpoint={instead}."
            )
    keywords["num_classes"] = num_classes
    try:
        parameters = inspect.signature(target).parameters
    except ValueError as error:  # of some builtins
        raise ConfigError(f"config: model._target_={model['_target_']} is no network.") from error
    if "in_channels" in parameters:
        keywords["in_channels"] = in_channels
    elif in_channels != 3:
        raise ConfigError(
            f"config: model '{name}' takes images of 3 channels, the data set has {in_channels}. "
            f"Give {model['_target_']} a keyword in_channels, or use model=resnet8."
        )
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    if "num_classes" not in parameters and not open_ended:
        raise ConfigError(
            f"config: {model['_target_']} does not take num_classes, the number of outputs. "
            "Give it that keyword, or name a function that passes it on."
        )
    for key in keywords:
        if key not in parameters and not open_ended:
            hint = did_you_mean(key, parameters)
            raise ConfigError(f"config: {model['_target_']} has no keyword '{key}'.{hint}")
    try:
        network = target(**keywords)
    except QexpError:
        raise
    except Exception as error:  # a target may be anyone's
        text = reason(error) if isinstance(error, (TypeError, ValueError)) else one_line(error)
        raise ConfigError(f"config: model '{name}' cannot be built: {text}.") from error
    if not isinstance(network, nn.Module):
        raise ConfigError(
            f"config: model._target_={model['_target_']} returns a {type(network).__name__}, no "
            "nn.Module. Name a class or function that makes a network."
        )
    if any(isinstance(p, UninitializedParameter) for p in network.parameters()):
        raise ConfigError(
            f"config: model '{name}' has lazy layers, whose sizes follow from the first image. "
            "Give them their sizes."
        )
    if next(network.parameters(), None) is None:
        raise ConfigError(
            f"config: model '{name}' has no parameters: there is nothing to train or quantize. "
            "Set model=... to another one."
        )
    module: Any
    for module in network.modules():
        if hasattr(module, "inplace"):
            module.inplace = False  # an in-place ReLU would change what a hook has kept
    return network
