"""Other bits for a network in the middle of its training.

A quantizer's bits are fixed when it is built, because its state has its final shape from then on.
So changing them replaces it: a fresh quantizer at the new bits is calibrated, its step from the
weights as they are now or from training images, as at the start; and it takes over from the old one
every state tensor whose name begins with a prefix in its class's `carried` and whose shape is
unchanged. Steps, levels, thresholds and clips belong to a width and are not carried: the clip of
least squared error of rectified normal numbers is 4.2 deviations at 8 bits and 1.95 at 2, so that a
learned 8-bit clip is a bad start at 2 bits, for POST, APoT and PACT as for LSQ. An adapter that
maps a sample's statistics to a factor is carried, the step taken behind it, and so is a clip that
would else start at a constant (`three_std` and `paper` of APoT, whose authors carry it). A
quantizer whose bits stay is not touched.

The network's own parameters are the same objects as before, the quantizers' are new ones: an
optimizer that holds the old has to be given the new.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from qexp.quant.convert import (
    Bits,
    QuantizerFactory,
    calibrate_,
    make_quantizers,
    quant_layers,
    quantize_,
)
from qexp.quant.quantizer import Quantizer
from qexp.quant.trace import Layer


def rebits_(
    model: nn.Module,
    layers: Sequence[Layer],
    bits: Mapping[str, Bits],
    weight: QuantizerFactory,
    act: QuantizerFactory,
    outer_weight: QuantizerFactory | None = None,
    outer_act: QuantizerFactory | None = None,
    *,
    images: Tensor,
) -> list[str]:
    """Give the layers the widths `bits`, in place; a layer it does not name stays as it is.

    Args:
        model: a network after `quantize_`, trained or not, wholly calibrated.
        layers, bits, weight, act, outer_weight, outer_act: as in `quantize_`.
        images: [N, C, H, W] normalised training images, which calibrate the new quantizers.

    Returns:
        The names of the quantizers that are new, `layer1.0.conv1.act_quantizer`.
    """
    factories = (weight, act, outer_weight, outer_act)
    replaced: dict[str, Quantizer | None] = {}
    for layer in layers:
        module, widths = quant_layers(model).get(layer.name), bits.get(layer.name)
        if widths is None:
            continue
        if module is None:  # in float until now
            swaps = quantize_(model, [layer], bits, *factories)
            operands = ("weight_quantizer", "act_quantizer") if swaps[0].bits else ()
            replaced.update({f"{layer.name}.{operand}": None for operand in operands})
            continue
        fresh_w, fresh_a = make_quantizers(layer, widths, *factories)
        for operand, fresh in (("weight_quantizer", fresh_w), ("act_quantizer", fresh_a)):
            current: Quantizer = getattr(module, operand)
            if current.bits != fresh.bits:
                setattr(module, operand, fresh.to(module.weight.device).train(module.training))
                replaced[f"{layer.name}.{operand}"] = current
    before = {model.get_submodule(n): old for n, old in replaced.items() if old is not None}

    def carry(fresh: nn.Module) -> None:
        if fresh in before:
            _carry_(fresh, before[fresh])  # type: ignore[arg-type]

    for quantizer in before:
        carry(quantizer)  # a step is taken behind a carried adapter
    if replaced:
        calibrate_(model, images, fresh_only=True, settle=carry)
    return list(replaced)


@torch.no_grad()
def _carry_(fresh: Quantizer, old: Quantizer) -> None:
    """Copy the carried state of `old` into `fresh`, where name and shape agree."""
    if type(fresh) is not type(old) or not fresh.carried:
        return
    fresh.continues = True
    before = old.state_dict()
    for name, tensor in fresh.state_dict().items():
        if name.startswith(fresh.carried) and name in before and before[name].shape == tensor.shape:
            tensor.copy_(before[name])
