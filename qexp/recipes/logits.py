"""What a network must give: logits, one row an image and one column a class.

Asked of the passes that precheck.py makes anyway, and of one in training mode, where networks with
auxiliary heads give more than that.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.func import functional_call

from qexp.errors import ConfigError, QexpError, one_line
from qexp.recipes import build

IMAGES = 2  # batch norm needs more than one value a channel to train on


@contextmanager
def giving_logits(cfg: DictConfig, model: nn.Module, classes: int) -> Iterator[None]:
    """Look at what each forward pass of `model` gives inside the block.

    Raises:
        ConfigError: in the pass, if it is not one tensor [N, classes].
    """

    def check(module: nn.Module, images: tuple[Tensor, ...], output: Any) -> None:
        expected = (len(images[0]), classes)
        if isinstance(output, Tensor) and output.shape == expected:
            return
        kind = type(output).__name__
        given = f"shape {list(output.shape)}" if isinstance(output, Tensor) else f"type {kind}"
        head = "The last layer needs num_classes outputs"
        if not isinstance(output, Tensor):
            head = "Return the logits alone"
            if module.training:
                head += ", without auxiliary heads (torchvision: +model.aux_logits=false)"
        mode = "training" if module.training else "evaluation"
        raise ConfigError(
            f"config: {_name(cfg)} gives an output of {given} in {mode} mode, not logits of shape "
            f"{list(expected)}. {head}."
        )

    handle = model.register_forward_hook(check)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def run_in_training_mode(cfg: DictConfig, model: nn.Module, input_shape: Sequence[int]) -> None:
    """One pass on noise; the buffers (batch norm's statistics) stay as they are.

    Args:
        input_shape: [C, H, W] of one image.

    Raises:
        ConfigError: the network fails.
    """
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    noise = torch.randn(IMAGES, *input_shape)
    was_training = model.training
    try:
        functional_call(model.train(), buffers, noise)
    except QexpError:
        raise
    except Exception as error:  # a network may be anyone's
        shape = "x".join(map(str, input_shape))
        heads = getattr(model, "aux_logits", False) is True  # torchvision's GoogLeNet, Inception
        raise ConfigError(
            f"config: {_name(cfg)} cannot be trained on {IMAGES} images of {shape}: "
            f"{one_line(error)}.{' Leave out its other heads: +model.aux_logits=false' * heads}"
        ) from error
    finally:
        model.train(was_training)


def trained(cfg: DictConfig) -> bool:
    """Whether the run trains the network, or a float baseline of it."""
    return build.trains(cfg.recipe) or cfg.model.get("checkpoint") == "auto"


def _name(cfg: DictConfig) -> str:
    return f"model={cfg.model.get('name', cfg.model._target_)}"
