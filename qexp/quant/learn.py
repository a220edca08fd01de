"""The optimisation inside a reconstruction: one unit, Adam, random minibatches (reconstruct.py)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from qexp.quant.adaround import AdaRound
from qexp.quant.drop import dropping, mix
from qexp.quant.modules import QuantLayer
from qexp.quant.plan import Method, Pass, Schedule

MARKS = 20  # points of a unit's trace


def unit_quantizers(layers: Sequence[QuantLayer]) -> Iterator[nn.Module]:
    """Weight and activation quantizers of some layers."""
    for layer in layers:
        yield layer.weight_quantizer
        yield layer.act_quantizer


def beta_at(progress: float, beta: Sequence[float], warmup: float) -> float | None:
    """Exponent of the regulariser at a progress in [0, 1): None during warm-up, then linear."""
    if progress < warmup:
        return None
    return beta[0] + (beta[1] - beta[0]) * (progress - warmup) / (1 - warmup)


def channels_of(y: Tensor, last: nn.Module) -> int:
    """Channels of a unit's output, whose last layer is `last`.

    Shape: y [N, C, H, W], tokens [N, T, C], [N, C], or [N, H, W, C], which the layer's own
    number of channels tells from the first.
    """
    own: Tensor = last.weight  # type: ignore[assignment]
    at_end = y.shape[1] != len(own) == y.shape[-1]
    return y.shape[-1] if y.dim() == 3 or at_end else y.shape[1]


def output_error(
    y_hat: Tensor, y: Tensor, p: float, channels: int, weight: Tensor | None = None
) -> Tensor:
    """sum over channels of |y_hat - y|^p, averaged over images and positions, []."""
    error = (y_hat - y).square() if p == 2.0 else (y_hat - y).abs().pow(p)
    if weight is not None:
        error = error * weight
    return error.sum() * (channels / y.numel())


def learn(
    run: Callable[[Tensor], Tensor],
    layers: Sequence[QuantLayer],
    groups: Mapping[str, list[nn.Parameter]],
    arrays: tuple[Tensor, Tensor, Tensor],
    channels: int,
    fisher: Tensor | None,
    sweep: Pass,
    method: Method,
    schedule: Schedule,
    seed: int,
    tick: Callable[[int], object],
) -> dict[str, list[float]]:
    """The optimisation of one unit: Adam on |run(x) - y|^p and the rounding's regulariser.

    Args:
        run: the unit, quantized, from its input to its output.
        layers: quantized layers of the unit.
        groups: what is learned, by the name that `sweep.lr` has a rate for.
        arrays: of all images [n, ...]: the unit's input in the quantized network, its input and
            its output in the float one.
        channels: of the output, over which the error is summed.
        fisher: weight of each element of the output's error [n, ...]; None: 1.
        sweep: the pass that this is: rounding, or steps.
        seed: of the minibatches and of what is dropped.
        tick: called after each iteration.

    Returns:
        Its trace at `MARKS` equal parts: the mean reconstruction `loss` of the part, and the share
        of the rounding variables that is `decided` at its end (none: empty).
    """
    device = next(iter(groups.values()))[0].device
    draw = torch.Generator().manual_seed(seed)
    dice = torch.Generator(device).manual_seed(seed + 1)
    x_hat, x_float, y = arrays
    if sweep.name == "steps" and method.step_inputs == "float":
        x_hat = x_float
    rounding = [q for q in unit_quantizers(layers) if isinstance(q, AdaRound)]
    soft = rounding if "rounding" in groups else []
    optimizer = torch.optim.Adam(
        [{"params": ps, "lr": sweep.lr[name], "name": name} for name, ps in groups.items()],
        fused=True,
    )
    # The images of all iterations at once, on the devices that hold them: a GPU never waits.
    index = torch.randint(len(y), (sweep.iterations, schedule.minibatch), generator=draw)
    chosen = {a.device: index.to(a.device) for a in (*arrays, fisher) if a is not None}

    def drawn(array: Tensor, i: int) -> Tensor:
        return array.index_select(0, chosen[array.device][i]).to(device, non_blocking=True)

    losses = torch.zeros(sweep.iterations, device=device)
    decided: list[Tensor] = []
    ends = part_ends(sweep.iterations)
    drop = method.drop if sweep.inputs and sweep.name == "rounding" else 0.0
    with dropping([la.act_quantizer for la in layers if la.act_enabled], drop, dice):
        for q in soft:
            q.soft = True
        for i in range(sweep.iterations):
            progress = i / sweep.iterations
            for group in optimizer.param_groups:
                if group["name"] != "rounding":
                    cosine = 0.5 * (1 + math.cos(math.pi * progress))
                    group["lr"] = sweep.lr[group["name"]] * cosine
            x = drawn(x_hat, i)
            if method.mix > 0 and sweep.name == "rounding":
                x = mix(drawn(x_float, i), x, method.mix, dice)
            weight = None if fisher is None else drawn(fisher, i)
            error = output_error(run(x), drawn(y, i), sweep.p, channels, weight)
            beta = beta_at(progress, schedule.beta, schedule.warmup) if soft else None
            loss = error
            if beta is not None:
                loss = error + schedule.penalty * torch.stack([q.penalty(beta) for q in soft]).sum()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            losses[i] = error.detach()
            if i + 1 in ends and rounding:
                decided.append(_decided(rounding))
            tick(i)
        for q in soft:
            q.soft = False
    parts = losses.tensor_split(ends[:-1])
    return {
        "loss": torch.stack([part.mean() for part in parts]).tolist(),
        "decided": [float(share) for share in decided],
    }


def part_ends(iterations: int) -> list[int]:
    """After how many iterations the parts of a trace end."""
    return sorted({-(-iterations * k // MARKS) for k in range(1, MARKS + 1)})


@torch.no_grad()
def _decided(rounding: Sequence[AdaRound]) -> Tensor:
    """Share of the rounding variables that are at 0 or 1, []."""
    undecided = torch.stack([q.undecided() for q in rounding]).sum()
    return 1 - undecided / sum(q.rounding.numel() for q in rounding)
