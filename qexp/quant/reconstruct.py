"""Post-training reconstruction: each unit learns to give the float network's output.

AdaRound (arXiv 2004.10568) learns the rounding of one layer, BRECQ (Y. Li et al., ICLR 2021, arXiv
2102.05426) of one residual block, QDrop (X. Wei et al., ICLR 2022, arXiv 2203.05740) of one block
while its activations are quantized and randomly dropped. They are settings of one procedure:

    for each unit, in execution order:
        x_hat   its input from the quantized prefix, for all calibration images
        x, y    its input and output in the float network
        minimise over V (weight rounding), steps and borders, on random minibatches:
            sum_c |unit(mix(x_hat, x)) - y|^p, averaged over images and positions
            + penalty * f(V; beta)                             (adaround.py; none during warm-up)
    V becomes a decision; the next unit sees the result.

              granularity  quantized_inputs  steps   drop  mix
    AdaRound  layer        false             fixed   0     0     weights only, then calibrated steps
    BRECQ     block        false             after   0     0     a second pass learns the steps
    QDrop     block        true              joint   0.5   0.5

After it come, where a method asks for them, a second pass over all units (`after`, `both`: nothing
is dropped or mixed) and one over the network as a single unit (`network`).

Optional Fisher weighting (BRECQ eq. 10): the squared error of each output element is multiplied
with (1 + |g|)^2, g the gradient of KL(float || quantized) of the logits at that element.

Adam; the rate of rounding is constant, those of steps and borders fall as a cosine. Every random
draw comes from generators seeded by (seed, pass, unit): a run that stops between two units
continues bit for bit (on a CPU: a GPU's sums have no fixed order).

Departs from the papers and codes:
 1. The residual sum stays in float (nearest.py, point 3); the last unit's input is not held back.
 2. Images are quantized (8 bits by default) and that step is learned; BRECQ's and QDrop's code
    feed the first layer floats. In BRECQ's the stem's output has 8 bits, so the first block reads
    8; here it reads b. The last layer reads 8 bits as in QDrop's; BRECQ's widens a quantizer that
    its ResNets leave off, so that theirs reads b. First and last layer are learned only if their
    quantizers have something to learn, which with 8-bit `nearest` weights is the step of their
    input. QDrop's code learns the rounding of both, BRECQ's of the last: quantizer/outer=adaround.
 3. The second pass of BRECQ's code sees inputs from the float network, ours from the quantized
    prefix unless `step_inputs: float`. Its minibatches are drawn without replacement, ours (and
    QDrop's) with.
 4. `fisher` is off by default: BRECQ's objective is eq. 10, its released script runs without.
 5. Both codes crop and mirror the calibration images at random, as for training; recipe=ptq does
    with `augment: true`.
 6. BRECQ's code has no block of MNASNet and goes by layers there; here, as in QDrop's, by blocks.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qexp.errors import RunError
from qexp.quant.blocks import Unit
from qexp.quant.cache import Store, record
from qexp.quant.convert import float_operands, frozen_weights, quant_layers
from qexp.quant.fisher import output_weights
from qexp.quant.learn import channels_of, learn
from qexp.quant.modules import QuantLayer
from qexp.quant.plan import Method, Pass, Schedule


class Data(NamedTuple):
    """Calibration images, and held-out ones that errors are reported on; [N, C, H, W]."""

    images: Tensor
    held_out: Tensor


def learned_parameters(
    layers: Sequence[QuantLayer], names: frozenset[str]
) -> dict[str, list[nn.Parameter]]:
    """What a pass learns in a unit, by name (of `adapter.0.weight`: `adapter`).

    A weight's step is never learned.
    """
    found: dict[str, list[nn.Parameter]] = {}
    for layer in layers:
        if "bias" in names and isinstance(layer.bias, nn.Parameter):
            found.setdefault("bias", []).append(layer.bias)
        for quantizer in (layer.weight_quantizer, layer.act_quantizer):
            for path, parameter in quantizer.named_parameters():
                name = path.partition(".")[0]
                if name in names and not (name == "scale" and quantizer is layer.weight_quantizer):
                    found.setdefault(name, []).append(parameter)
    return found


def layers_in(model: nn.Module, unit: Unit) -> list[QuantLayer]:
    """The quantized layers of a unit of `model`."""
    found = quant_layers(model)
    return [found[name] for name in unit.layers if name in found]


def learns(model: nn.Module, unit: Unit, sweep: Pass) -> bool:
    """Whether a unit of `model` has anything to learn in a pass."""
    return bool(learned_parameters(layers_in(model, unit), sweep.learned))


@torch.no_grad()
def relative_error(
    unit: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, batch_size: int, device: torch.device
) -> float:
    """sum |unit(x) - y|^2 / sum y^2 over all images."""
    total, power = torch.zeros((), device=device), torch.zeros((), device=device)
    for first in range(0, len(x), batch_size):
        target = y[first : first + batch_size].to(device)
        # A copy: the unit may work in place, and x is used again.
        out = unit(x[first : first + batch_size].to(device, copy=True))
        total += (out - target).square().sum()
        power += target.square().sum()
    return float(total / power.clamp_min(1e-30))


def reconstruct_unit(
    model: nn.Module,
    reference: nn.Module,
    unit: Unit,
    data: Data,
    sweep: Pass,
    method: Method,
    schedule: Schedule,
    store: Store,
    *,
    later: Sequence[str] = (),
    seed: int = 0,
    batch_size: int = 128,
    tick: Callable[[int], object] = lambda iteration: None,
) -> dict[str, Any]:
    """Learn one unit of `model` in place.

    Args:
        model: quantized, calibrated network, up to this unit already reconstructed.
        reference: the float network.
        sweep: what is learned now: the rounding, or afterwards the steps and what else there is.
        store: of recorded inputs and outputs; emptied first.
        later: names of the layers behind this unit (for the Fisher weights).
        seed: of this unit and pass.
        batch_size: images a forward pass when inputs and outputs are recorded.
        tick: called after each iteration.

    Returns:
        What happened, or {} if the unit has nothing to learn.

    Raises:
        RunError: what was learned, or its loss, is not finite.
    """
    layers = layers_in(model, unit)
    groups = learned_parameters(layers, sweep.learned)
    if not groups:
        return {}
    began = time.perf_counter()
    device = data.images.device
    module, target = model.get_submodule(unit.name), reference.get_submodule(unit.name)
    finish = unit.activation or (lambda y: y)

    def run(x: Tensor) -> Tensor:
        return finish(module(x))

    store.clear()
    with ExitStack() as stack:
        if not sweep.inputs:
            stack.enter_context(float_operands(model, weight=False))
        if sweep.name == "rounding":
            _see_weights(layers)
        arrays = []
        for images in data:
            with frozen_weights(model):
                x_hat, _ = record(model, module, images, batch_size, store, output=False)
            x, y = record(reference, target, images, batch_size, store, output=True)
            assert y is not None
            arrays.append((x_hat, x, _apply(finish, y, batch_size)))
        fisher = None
        if method.fisher and sweep.name != "network":
            fisher = output_weights(model, reference, unit, later, data.images, batch_size, store)
        check = (arrays[1][0], arrays[1][2], batch_size, device)
        before = relative_error(run, *check)
        channels = channels_of(arrays[0][2], reference.get_submodule(unit.layers[-1]))
        learned = (run, layers, groups, arrays[0], channels, fisher)
        fixed = nullcontext() if "rounding" in groups else frozen_weights(model)
        with _trainable(model, groups), fixed:
            trace = learn(*learned, sweep, method, schedule, seed, tick)
        _check_finite(unit, sweep, groups, trace["loss"])
        after = relative_error(run, *check)
    return {
        "unit": unit.title,
        "pass": sweep.name,
        "iterations": sweep.iterations,
        "loss": trace["loss"][-1],
        "error_before": before,
        "error": after,
        "converged": trace["decided"][-1] if trace["decided"] else None,
        "trace": trace,
        "wall_s": time.perf_counter() - began,
        "cache_bytes": store.used + store.spilled,
        "spilled_bytes": store.spilled,
    }


def _check_finite(
    unit: Unit, sweep: Pass, groups: Mapping[str, Sequence[Tensor]], losses: Sequence[float]
) -> None:
    """Stop the run where learning diverged, instead of scoring what is left."""
    bad = [n for n, ps in groups.items() if not all(bool(p.isfinite().all()) for p in ps)]
    if bad or not all(map(math.isfinite, losses)):
        what = f"'{bad[0]}' has values that are not finite" if bad else "its loss is not finite"
        raise RunError(
            f"run: unit '{unit.title}' diverged: {what}. "
            f"Lower {', '.join(_rate(name, sweep) for name in groups)}."
        )


def _rate(name: str, sweep: Pass) -> str:
    """The key of a config that sets the rate of a parameter in a pass."""
    if name == "bias":
        return "quantizer.reconstruct.bias_lr"
    return "recipe.step_lr" if name == "scale" and sweep.name != "rounding" else f"recipe.lr.{name}"


@torch.no_grad()
def _see_weights(layers: Sequence[QuantLayer]) -> None:
    """Let activation quantizers that start from the weights do so."""
    for layer in layers:
        if see := getattr(layer.act_quantizer, "see_weights", None):
            see(layer.weight, layer.quantized_weight())


@torch.no_grad()
def _apply(fn: Callable[[Tensor], Tensor], array: Tensor, batch_size: int) -> Tensor:
    """`fn` on an array in place, batch by batch."""
    for part in array.split(batch_size):
        part.copy_(fn(part))
    return array


@contextmanager
def _trainable(model: nn.Module, groups: Mapping[str, Sequence[nn.Parameter]]) -> Iterator[None]:
    """Only the parameters of `groups` require gradients, inside the block."""
    before = [(p, p.requires_grad) for p in model.parameters()]
    for p, _ in before:
        p.requires_grad_(False)
    for group in groups.values():
        for p in group:
            p.requires_grad_(True)
    try:
        yield
    finally:
        for p, required in before:
            p.requires_grad_(required)
            p.grad = None
