"""Optimizer groups, the learning rate as a function of the step, averages of weights and norms."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from qexp.models.load import load_tensors_
from qexp.quant.convert import quantizer_parameters
from qexp.recipes.settings import Settings


def make_optimizer(
    model: nn.Module,
    *,
    optimizer: str,
    lr: float,
    momentum: float,
    weight_decay: float,
    quantizer_lr: float | None,
    quantizer_weight_decay: float,
) -> torch.optim.Optimizer:
    """SGD or AdamW with two groups: the network's parameters, and the quantizers'.

    Quantizers that say how they are trained (`lr_scale`, `decay`) have groups of their own. Every
    parameter that needs a gradient is in exactly one group; each group keeps its peak learning
    rate as `peak_lr`.
    """
    ours = quantizer_parameters(model)
    mine = {id(p) for group in ours.values() for p in group}
    theirs = [p for p in model.parameters() if p.requires_grad and id(p) not in mine]
    groups = [{"params": theirs, "lr": lr, "peak_lr": lr, "weight_decay": weight_decay}]
    for (lr_scale, decay), parameters in ours.items():
        rate = lr_scale * (lr if quantizer_lr is None else quantizer_lr)
        groups.append(
            {
                "params": parameters,
                "lr": rate,
                "peak_lr": rate,
                "weight_decay": quantizer_weight_decay if decay is None else decay,
            }
        )
    if optimizer == "adamw":
        return torch.optim.AdamW(groups, foreach=True)
    return torch.optim.SGD(groups, momentum=momentum, foreach=True)


def lr_factor(
    step: int, steps: int, *, schedule: str, warmup: int, milestones: Sequence[float]
) -> float:
    """Learning rate at `step` of `steps`, as a fraction of the peak.

    Args:
        schedule: `cosine` or `linear` to 0 over all steps after warm-up, `step`, `constant`.
        warmup: steps of linear warm-up.
        milestones: for `step`: fractions of the training where the rate falls to a tenth.
    """
    if step < warmup:
        return (step + 1) / warmup
    t = (step - warmup) / max(1, steps - warmup)
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * t))
    if schedule == "linear":
        return 1 - t
    if schedule == "step":
        return 0.1 ** sum(step >= m * steps for m in milestones)
    return 1.0


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> float:
    """Set every group to `factor` of its peak; returns the weights' learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
    return optimizer.param_groups[0]["lr"]


def restore_(optimizer: torch.optim.Optimizer, saved: dict) -> None:
    """Load a saved state into `optimizer`, which keeps the peak rates that it was made with."""
    peaks = [group["peak_lr"] for group in optimizer.param_groups]
    optimizer.load_state_dict(saved)
    for group, peak in zip(optimizer.param_groups, peaks, strict=True):
        group["peak_lr"] = peak


def carry_momentum(old: torch.optim.Optimizer, new: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Keep the momentum of every parameter that both optimizers have."""
    for group in new.param_groups:
        for parameter in group["params"]:
            if parameter in old.state:
                new.state[parameter] = old.state[parameter]
    return new


@torch.no_grad()
def reestimate_bn_(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], images: int) -> None:
    """Replace batch norm statistics by those of one batch of about `images` training images.

    One batch, not the average over many: its statistics are what its own forward pass used, so the
    network in eval mode is the one that was measured. Averages belong to no forward pass: probably
    a value that many inputs share (a flat background) and that lies at a border between two codes
    then falls to another side than in training. N2UQ at W2A2 on the embedded data, seed 2: 75.95
    from running averages (results/fashion_methods), 86.50 from one batch (results/fashion_bn); the
    checkpoint of the first with an average over the same 4,000 images: 77.75, not kept.

    The images are augmented as in training: on CIFAR-10 plain ones cost three points (not kept).
    The rest of the network, quantizers included, stays in eval mode: nothing else adapts.
    """
    found: list[Tensor] = []
    for x, _ in batches:
        found.append(x)
        if sum(len(part) for part in found) >= images:
            break
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [m.momentum for m in norms]
    model.eval()
    for norm in norms:
        norm.momentum = 1.0
        norm.train()
    model(torch.cat(found))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def optimizer_of(model: nn.Module, s: Settings) -> torch.optim.Optimizer:
    """The optimizer that a recipe's settings ask for."""
    return make_optimizer(
        model,
        optimizer=s.optimizer,
        lr=s.lr,
        momentum=s.momentum,
        weight_decay=s.weight_decay,
        quantizer_lr=s.quantizer_lr,
        quantizer_weight_decay=s.quantizer_weight_decay,
    )


class WeightAverage:
    """Exponential moving average of a network's state: avg <- decay * avg + (1-decay) * now.

    Buffers that are not floating point (counters), or not finite (masks), are copied. Warm start:
    the decay at step t is min(decay, (1+t)/(10+t)), as in torchvision's and timm's references.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.step = 0
        self.state = {k: v.detach().clone() for k, v in model.state_dict().items()}
        floating = [(k, v) for k, v in self.state.items() if v.is_floating_point()]
        self.floating = [k for k, v in floating if bool(v.isfinite().all())]

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the average towards the network's present state."""
        decay = min(self.decay, (1 + self.step) / (10 + self.step))
        self.step += 1
        now = model.state_dict()
        torch._foreach_lerp_(  # pyright: ignore[reportPrivateImportUsage]
            [self.state[k] for k in self.floating], [now[k] for k in self.floating], 1 - decay
        )
        for k in self.state.keys() - set(self.floating):
            self.state[k].copy_(now[k])

    @contextmanager
    def applied(self, model: nn.Module, *, keep: bool = False) -> Iterator[None]:
        """Give `model` the averaged state inside the block; `keep` what the block changes of it."""
        now = {k: v.detach().clone() for k, v in model.state_dict().items()}
        load_tensors_(model, self.state)
        try:
            yield
            if keep:
                self.state = {k: v.detach().clone() for k, v in model.state_dict().items()}
        finally:
            load_tensors_(model, now)

    def state_dict(self) -> dict[str, Tensor | int | dict[str, Tensor]]:
        """For the checkpoint."""
        return {"step": self.step, "state": self.state}

    def load_state_dict(self, saved: dict) -> None:
        """From the checkpoint."""
        self.step = saved["step"]
        for k, v in saved["state"].items():
            self.state[k].copy_(v)
