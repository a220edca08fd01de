"""Training that starts from a post-training run: its folded network and its grids.

A PTQ run's finished `last.pt` holds `float`, the folded network with each weight moved to where
round-to-nearest gives its learned code, and the state of every quantizer. Training starts from
both: batch norms are folded into the fresh network and `float` loaded; a quantizer of the same
kind, width and grid takes its state over, any other is calibrated anew.

AdaRound's learned decisions are in the weights of `float`. So `nearest` weights take over its grid
and are its codes, bit for bit; AdaRound itself takes the grid and decides anew, to the same codes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qexp.errors import CheckpointError, quoted
from qexp.models.digest import weights_sha256
from qexp.models.load import describe_difference, load_tensors_
from qexp.quant.adaround import AdaRound
from qexp.quant.convert import Bits, quant_layers
from qexp.quant.fold import fold_bn_
from qexp.quant.quantizer import Quantizer
from qexp.recipes.signs import load_run_state
from qexp.runner.run import Run

STAND_IN = {"AdaRound": ("AdaRound", "Nearest")}  # what takes a kind's grid over, beside itself


def checkpoint_file(source: str) -> str:
    """`source`, or the `last.pt` in it if it is a run's folder."""
    last = Path(source) / "last.pt"
    return str(last) if last.is_file() else source


def read_ptq(source: str) -> dict[str, Any] | None:
    """The checkpoint of a PTQ run; None if `source` is anything else.

    Raises:
        CheckpointError: of a PTQ run that has not finished.
    """
    path = Path(source)
    if not path.is_file():
        return None
    try:
        state = load_run_state(path)
    except CheckpointError:
        return None  # whoever loads it as a float network says what is wrong
    if not state.get("folded") or "units" not in state:
        return None
    if "float" not in state:
        raise CheckpointError(
            f"checkpoint: {path} is of a post-training run that has not finished. "
            f"Type: qexp resume {quoted(path.parent)}"
        )
    return state


def load_folded(model: nn.Module, state: Mapping[str, Any], source: str) -> str:
    """Fold the batch norms of `model` and load `state["float"]`; returns its `weights_sha256`."""
    fold_bn_(model)
    if difference := describe_difference(model, state["float"]):
        raise CheckpointError(f"checkpoint: {source} does not fit the model: {difference}")
    load_tensors_(model, state["float"])
    return weights_sha256(Path(source))


@torch.no_grad()
def take_over_(
    model: nn.Module, bits: Mapping[str, Bits], state: Mapping[str, Any] | None, run: Run
) -> None:
    """Give quantizers the state of those of a PTQ run where kind, width and shapes agree."""
    if state is None:
        return
    taken = left = 0
    for name, layer in quant_layers(model).items():
        before = state["bits"].get(name, (32, 32))
        for part, k in (("weight_quantizer", 0), ("act_quantizer", 1)):
            quantizer: Quantizer = getattr(layer, part)
            if before[k] == 32 or bits[name][k] == 32:
                continue
            kind = state["kinds"].get(f"{name}.{part}")
            fits = before[k] == bits[name][k] and _fits(quantizer, kind)
            if fits and _copy(quantizer, _own(state["model"], f"{name}.{part}."), layer.weight):
                taken += 1
            else:
                left += 1
    rest = f"; {left} of another kind, width or grid are calibrated anew" if left else ""
    run.info(f"start: {taken} quantizers take over the state of the post-training run{rest}")


def _fits(quantizer: Quantizer, kind: str | None) -> bool:
    return kind is not None and quantizer.kind in STAND_IN.get(kind, (kind,))


def _own(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def _copy(quantizer: Quantizer, state: Mapping[str, Tensor], weight: Tensor) -> bool:
    """Copy all of a quantizer's state, or nothing."""
    ours = {k: v for k, v in quantizer.state_dict().items() if k != "rounding"}
    if any(k not in state or state[k].shape != v.shape for k, v in ours.items()):
        return False
    if getattr(quantizer, "symmetric", False) and state["zero"].any():
        return False  # it has no zero point, in a file neither
    if "grid" in ours and not torch.equal(ours["grid"], state["grid"].to(ours["grid"])):
        return False  # constants, of other options
    quantizer.load_state_dict({k: state[k] for k in ours}, strict=False)
    if isinstance(quantizer, AdaRound):
        quantizer.round_nearest(weight)
    return True
