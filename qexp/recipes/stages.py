"""Widths that change while training (`bitwidth=progressive`): each stage, from one to the next."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from omegaconf import DictConfig
from torch import Tensor

from qexp.errors import ConfigError
from qexp.quant.bitwidth import Progressive
from qexp.quant.rebits import rebits_
from qexp.recipes import build
from qexp.recipes.saving import quantize_inputs_again_
from qexp.runner.run import Run


def no_best() -> dict[str, Any]:
    """The best epoch before there is one. One at other widths is none: it is of another network."""
    return {"selected": -1.0, "top1": -1.0, "epoch": -1}


def refuse_wider(network: build.Network, epoch: int, epochs: int) -> None:
    """Refuse a longer schedule whose stages, fractions of all epochs, would give back bits.

    Args:
        network: with the widths that training has come to.
        epoch: finished ones; epochs: of the longer schedule.

    Raises:
        ConfigError: a layer would have more bits than it has.
    """
    if not isinstance(network.policy, Progressive):
        return
    then = network.policy.assign(network.layers, epoch=epoch, epochs=epochs)
    for name, now in network.bits.items():
        if any(wider > width for wider, width in zip(then.get(name, now), now, strict=True)):
            raise ConfigError(
                f"resume: with recipe.epochs={epochs} layer '{name}' would go back from "
                f"{tuple(now)} to {tuple(then[name])} bits: stages end at fractions of all epochs. "
                "Give fewer epochs, or start a new run."
            )


def change_bits_(
    cfg: DictConfig,
    network: build.Network,
    forward: Callable[[Tensor], Tensor],
    images: Tensor,
    epoch: int,
    epochs: int,
    run: Run,
) -> bool:
    """Give the layers the widths of this epoch; whether they are others than before.

    Args:
        forward: what trains; the network itself unless it is compiled whole.
        images: that new quantizers are calibrated on.
    """
    policy = network.policy
    if not isinstance(policy, Progressive):
        return False
    bits = dict(policy.assign(network.layers, epoch=epoch, epochs=epochs))
    if bits == network.bits:
        return False
    rebits_(network.model, network.layers, bits, **build.factories(cfg), images=images)
    if forward is network.model:
        quantize_inputs_again_(network.model, cfg.get("saved", "all"))
    network.bits = bits
    run.info(f"epoch {epoch + 1:03d}: bits are now {policy.bits_at(epoch, epochs)}")
    return True
