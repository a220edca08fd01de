"""What a float network's layers are, seen by running it once on noise.

One forward pass with hooks gives, for every convolution and linear layer in execution order: its
name, the shapes it sees, its multiply-accumulates, and whether its input is negative somewhere. A
tensor that follows a ReLU (or ReLU6) is non-negative whatever the data, one that follows a batch
norm is not, so noise is enough and no data set is needed. Of the rest (pooled SiLU, a branch whose
gain is zero) noise shows what holds with the weights of the moment: a run keeps the answer with its
checkpoints (recipes/signs.py), and `calibrate_` reports inputs that contradict it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from qexp.errors import ConfigError


@dataclass(frozen=True)
class Layer:
    """One convolution or linear layer of a network.

    Attributes:
        name: its path in the module tree.
        kind: `conv`, `depthwise`, or `linear`.
        weight_shape: [C_out, C_in/groups, kh, kw] or [C_out, C_in].
        field: receptive field [C_in, kh, kw] or [C_in]: the `shape` of its activation quantizer.
        macs: multiply-accumulates for one sample.
        act_shape: its input for one sample, [C_in, H, W] or [..., C_in].
        signed: whether its input has negative values.
        position: `first`, `inner` or `last`, in execution order.
        tokens_first: its input is [tokens, samples, C].
    """

    name: str
    kind: str
    weight_shape: tuple[int, ...]
    field: tuple[int, ...]
    macs: int
    act_shape: tuple[int, ...]
    signed: bool
    position: str
    tokens_first: bool = False

    @property
    def weights(self) -> int:
        """Number of weights."""
        n = 1
        for d in self.weight_shape:
            n *= d
        return n


@contextmanager
def evaluated(model: nn.Module, hooks: Iterable[RemovableHandle] = ()) -> Iterator[None]:
    """`model` in eval mode inside the block; then in the mode it was in, and without `hooks`."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()


@contextmanager
def batch_statistics(model: nn.Module) -> Iterator[None]:
    """Batch norms take mean and variance from the batch inside the block, in eval mode too.

    Their running averages are left out, not changed. With random weights those are still 0 and 1,
    and what the network computes by them is far larger than in training: steps set there round
    all inputs of a ResNet-56's last blocks to 0.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    kept = [(m.running_mean, m.running_var) for m in norms]
    for norm in norms:
        norm.running_mean = norm.running_var = None
    try:
        yield
    finally:
        for norm, (mean, variance) in zip(norms, kept, strict=True):
            norm.running_mean, norm.running_var = mean, variance


@torch.no_grad()
def trace(model: nn.Module, input_shape: Sequence[int], batch: int = 2) -> list[Layer]:
    """The layers of `model` in execution order.

    Args:
        model: a float network.
        input_shape: [C, H, W] of one image.
        batch: images of noise.

    Raises:
        ConfigError: a layer that runs more than once, or is called by keyword.
    """
    seen: dict[str, tuple[nn.Module, Tensor, Tensor]] = {}
    handles = []

    def hook(name: str) -> object:
        def record(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if not inputs:
                raise ConfigError(
                    f"model: layer '{name}' is called with its input by keyword. Call it by "
                    f"position: self.{name}(x)."
                )
            if name in seen:
                raise ConfigError(
                    f"model: layer '{name}' runs more than once in a forward pass. One step for "
                    "both inputs, and the counts of operations, would be wrong. Give each call its "
                    "own layer."
                )
            seen[name] = (module, inputs[0], output)

        return record

    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            handles.append(module.register_forward_hook(hook(name)))  # type: ignore[arg-type]
    parameter = next(model.parameters())
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(batch, *input_shape, generator=generator).to(parameter)
    with evaluated(model, handles):
        model(noise)

    shapes = {name: x.shape for name, (_, x, _) in seen.items()}
    if any(len(shape) == 3 or shape[0] != batch for shape in shapes.values()):
        axes = _batch_axes(model, shapes, noise, generator)
    else:
        axes = dict.fromkeys(shapes, 0)
    layers = []
    for i, (name, (module, x, y)) in enumerate(seen.items()):
        weight: Tensor = module.weight  # type: ignore[assignment]
        if isinstance(module, nn.Conv2d):
            depthwise = module.groups > 1 and module.groups == module.in_channels
            kind = "depthwise" if depthwise else "conv"
            field = (module.in_channels, *module.kernel_size)
        else:
            kind, field = "linear", (weight.shape[1],)
        # Windows of an image may lie in the batch dimension; a table of positions has no batch.
        axis = axes[name]
        samples = 1 if axis is None else batch
        x = x if axis is None else x.movedim(axis, 0)
        windows = len(x) // samples
        position = "first" if i == 0 else "last" if i == len(seen) - 1 else "inner"
        layers.append(
            Layer(
                name=name,
                kind=kind,
                weight_shape=tuple(weight.shape),
                field=tuple(field),
                macs=weight[0].numel() * y.numel() // samples,
                act_shape=tuple(x.shape[1:] if windows == 1 else (windows, *x.shape[1:])),
                signed=bool(x.min() < 0),
                position=position,
                tokens_first=axis == 1 and x.dim() == 3,
            )
        )
    return layers


def _batch_axes(
    model: nn.Module,
    shapes: Mapping[str, Sequence[int]],
    noise: Tensor,
    generator: torch.Generator,
) -> dict[str, int | None]:
    """Which axis of each layer's input grows with the batch; None: none does, it is a table.

    Args:
        shapes: of the inputs, for `noise`.
    """
    found: dict[str, int | None] = {}

    def hook(name: str) -> Callable[..., None]:
        def compare(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            pairs = enumerate(zip(inputs[0].shape, shapes[name], strict=True))
            found[name] = next((i for i, (more, few) in pairs if more != few), None)

        return compare

    more = torch.randn(len(noise) + 1, *noise.shape[1:], generator=generator).to(noise)
    named = dict(model.named_modules())
    with evaluated(model, [named[n].register_forward_pre_hook(hook(n)) for n in shapes]):
        model(more)
    return found
