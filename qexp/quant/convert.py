"""Float network -> quantized network and back. The only place that replaces modules.

`quantize_` swaps every layer that `bits` names for its quantized twin, sharing the parameters;
`calibrate_` runs one batch through the network and sets every quantizer from what it sees, each
layer from the already quantized prefix; `unquantize_` gives the float network back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from qexp.quant.check import check_layers, check_padding, check_samples_first
from qexp.quant.modules import (
    QUANT_LAYERS,
    QuantConv2d,
    QuantizedOperands,
    QuantLayer,
    QuantLinear,
    leave_fast_path_,
)
from qexp.quant.quantizer import Identity, Quantizer
from qexp.quant.trace import Layer, batch_statistics, evaluated


class Bits(NamedTuple):
    """Widths of a layer's two operands; 32 leaves that operand in float."""

    weight: int
    act: int


class QuantizerFactory(Protocol):
    """What `quantize_` calls to make a quantizer: a class, or a partial of one."""

    def __call__(self, bits: int, *, signed: bool, shape: Sequence[int]) -> Quantizer: ...


class Swap(NamedTuple):
    """What `quantize_` did to one layer, or why it did nothing."""

    layer: Layer
    bits: Bits | None
    note: str


def quantize_(
    model: nn.Module,
    layers: Sequence[Layer],
    bits: Mapping[str, Bits],
    weight: QuantizerFactory,
    act: QuantizerFactory,
    outer_weight: QuantizerFactory | None = None,
    outer_act: QuantizerFactory | None = None,
) -> list[Swap]:
    """Swap the layers that `bits` names for quantized ones, in place.

    Args:
        model: the float network that `layers` was traced from.
        layers: `trace(model, ...)`.
        bits: widths by layer name; a layer it does not name stays float.
        weight, act: make the quantizers of a layer.
        outer_weight, outer_act: make those of the first and last layer, when a comparison fixes
            them to one kind for all methods (8-bit LSQ); default: as the others.

    Returns:
        One `Swap` a layer, in execution order: what was done, what was skipped.

    Raises:
        ConfigError: of a layer that has no quantized form (`check_layers`); `model` is as it was.
    """
    check_layers(model, [x.name for x in layers if bits.get(x.name, (32, 32)) != (32, 32)])
    report = []
    twins: dict[str, QuantLayer] = {}  # all of them first: one that is refused changes nothing
    for layer in layers:
        widths = bits.get(layer.name)
        if widths is None or widths == (32, 32):
            report.append(Swap(layer, None, "left in float by the bit-width policy"))
            continue
        module = model.get_submodule(layer.name)
        wq, aq = make_quantizers(layer, widths, weight, act, outer_weight, outer_act)
        check_padding(layer.name, module, aq)
        if isinstance(module, nn.Conv2d):
            twins[layer.name] = QuantConv2d.from_float(module, wq, aq)
        elif isinstance(module, nn.Linear):
            twins[layer.name] = QuantLinear.from_float(module, wq, aq)
        else:
            raise ValueError(f"layer '{layer.name}' is a {type(module).__name__}")
        twins[layer.name].to(module.weight.device)
        report.append(Swap(layer, widths, type(wq).__name__ + " / " + type(aq).__name__))
    for name, twin in twins.items():
        replace_(model, name, twin)
    leave_fast_path_(model)
    return report


def make_quantizers(
    layer: Layer,
    bits: Bits,
    weight: QuantizerFactory,
    act: QuantizerFactory,
    outer_weight: QuantizerFactory | None = None,
    outer_act: QuantizerFactory | None = None,
) -> tuple[Quantizer, Quantizer]:
    """A layer's weight and activation quantizer, uncalibrated; arguments as in `quantize_`."""
    outer = layer.position != "inner"
    make_w = outer_weight if outer and outer_weight is not None else weight
    make_a = outer_act if outer and outer_act is not None else act
    wq = (
        make_w(bits=bits.weight, signed=True, shape=layer.weight_shape)
        if bits.weight < 32
        else Identity(shape=layer.weight_shape)
    )
    aq = (
        make_a(bits=bits.act, signed=layer.signed, shape=layer.field)
        if bits.act < 32
        else Identity(signed=layer.signed, shape=layer.field)
    )
    check_samples_first(layer, aq)
    aq.samples_axis = int(layer.tokens_first)
    return wq, aq


def unquantize_(model: nn.Module) -> nn.Module:
    """Turn every quantized layer back into the float one it came from, in place."""
    for name, module in list(quant_layers(model).items()):
        twin: nn.Module = (nn.Conv2d if isinstance(module, QuantConv2d) else nn.Linear).__new__(
            nn.Conv2d if isinstance(module, QuantConv2d) else nn.Linear
        )
        twin.__dict__ = {k: v for k, v in module.__dict__.items() if k not in _OWN}
        twin._modules = {k: v for k, v in module._modules.items() if k not in _OWN}
        twin._parameters = {**module._parameters}
        replace_(model, name, twin)
    return model


_OWN = set(QuantizedOperands.__annotations__) - {"weight"}


def replace_(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` in the place of the one called `name`, under every name that it has."""
    old = model.get_submodule(name)
    for parent in list(model.modules()):
        for child, found in list(parent._modules.items()):
            if found is old:
                setattr(parent, child, module)


def second_names(model: nn.Module) -> dict[str, str]:
    """The first name of a module that has several, by each of its others."""
    first: dict[int, str] = {}
    found = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if first.setdefault(id(module), name) != name:
            found[name] = first[id(module)]
    return found


def quant_layers(model: nn.Module) -> dict[str, QuantLayer]:
    """Quantized layers by name, in module order."""
    return {n: m for n, m in model.named_modules() if isinstance(m, QUANT_LAYERS)}


def quantizers(model: nn.Module) -> dict[str, Quantizer]:
    """All quantizers by name (`layer1.0.conv1.act_quantizer`), float operands left out."""
    return {
        n: m
        for n, m in model.named_modules()
        if isinstance(m, Quantizer) and not isinstance(m, Identity)
    }


@torch.no_grad()
def calibrate_(
    model: nn.Module,
    images: Tensor,
    *,
    fresh_only: bool = False,
    untrained: bool = False,
    settle: Callable[[Quantizer], None] = lambda quantizer: None,
) -> list[str]:
    """Set every quantizer: weights from themselves, inputs from one batch of images.

    Each layer sees the output of the already quantized layers before it. Batch norm statistics
    stay as they are.

    Args:
        model: a network with quantized layers.
        images: [N, C, H, W], normalised, from the training split.
        fresh_only: leave quantizers that are calibrated as they are.
        untrained: the weights are random: batch norms go by `images`, as in the first step.
        settle: called with each quantizer that is set, before layers behind it see its outputs.

    Returns:
        The layers whose unsigned input quantizer saw negative values, which it makes zero.
    """
    handles, negative = [], []

    def set_input(name: str, module: QuantLayer, inputs: tuple[Tensor, ...]) -> None:
        quantizer, x = module.act_quantizer, inputs[0]
        if fresh_only and bool(quantizer.calibrated):
            return
        if not (quantizer.signed or isinstance(quantizer, Identity)) and bool(x.min() < 0):
            negative.append(name)
        quantizer.calibrate(x)
        settle(quantizer)
        see_weights = getattr(quantizer, "see_weights", None)
        if see_weights is not None:  # a start from the weights; reconstruction does it anew
            see_weights(module.weight, module.weight_quantizer(module.weight))

    for name, module in quant_layers(model).items():
        if not (fresh_only and bool(module.weight_quantizer.calibrated)):
            module.weight_quantizer.calibrate(module.weight)
            settle(module.weight_quantizer)
        handles.append(module.register_forward_pre_hook(partial(set_input, name)))
    with evaluated(model, handles), batch_statistics(model) if untrained else nullcontext():
        model(images)
    return negative


def check_calibrated(model: nn.Module) -> None:
    """Raise if a quantizer was never calibrated, with the names."""
    missing = [n for n, q in quantizers(model).items() if not bool(q.calibrated)]
    if missing:
        raise ValueError(
            f"{len(missing)} quantizers are not calibrated ({', '.join(missing[:3])}, ...). "
            "Call calibrate_(model, images) or load a checkpoint first"
        )


@contextmanager
def float_operands(model: nn.Module, *, weight: bool = True, act: bool = True) -> Iterator[None]:
    """Run the network with its weights and / or inputs in float, inside the block."""
    layers = list(quant_layers(model).values())
    before = [(m.weight_enabled, m.act_enabled) for m in layers]
    for module in layers:
        module.weight_enabled = module.weight_enabled and not weight
        module.act_enabled = module.act_enabled and not act
    try:
        yield
    finally:
        for module, (w, a) in zip(layers, before, strict=True):
            module.weight_enabled, module.act_enabled = w, a


@contextmanager
def frozen_weights(model: nn.Module) -> Iterator[None]:
    """Quantize each weight once for the whole block: for evaluation, no gradients."""
    layers = list(quant_layers(model).values())
    with torch.no_grad():
        for module in layers:
            module.w_hat = module.quantized_weight().detach()  # a float weight is a Parameter
    try:
        yield
    finally:
        for module in layers:
            module.w_hat = None


@contextmanager
def shared_weights(model: nn.Module) -> Iterator[None]:
    """Quantize each weight once for several micro-batches, inside the block.

    Their backwards add up the gradient of the quantized weight; at the end of the block it goes
    on, once, through the quantizer into the weight. The shared tensor of a layer is the same one
    each time: CUDA graphs are recorded for its address.
    """
    layers = list(quant_layers(model).values())
    made = [m.quantized_weight() for m in layers]
    for module, w_hat in zip(layers, made, strict=True):
        module.w_hat = module.shared = _like(module.shared, w_hat.detach())
    try:
        yield
        taken = [(w, m.w_hat) for w, m in zip(made, layers, strict=True)]
        used = [(w, leaf.grad) for w, leaf in taken if leaf is not None and leaf.grad is not None]
        torch.autograd.backward([w for w, _ in used], [g for _, g in used])
    finally:
        for module in layers:
            module.w_hat = None


def _like(leaf: Tensor | None, value: Tensor) -> Tensor:
    """A leaf that holds `value`: the given one, if it can."""
    if leaf is None or leaf.device != value.device or leaf.dtype != value.dtype:
        return value.clone().requires_grad_()
    leaf.grad = None
    with torch.no_grad():
        return leaf.copy_(value)


def quantizer_parameters(model: nn.Module) -> dict[tuple[float, float | None], list[nn.Parameter]]:
    """Every learned quantizer parameter once, by its quantizer's `lr_scale` and `decay`."""
    found: dict[tuple[float, float | None], list[nn.Parameter]] = {}
    seen: set[int] = set()
    for quantizer in quantizers(model).values():
        for parameter in quantizer.parameters():
            if id(parameter) not in seen:
                found.setdefault((quantizer.lr_scale, quantizer.decay), []).append(parameter)
            seen.add(id(parameter))
    return found
