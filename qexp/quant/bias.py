"""Bias correction: quantized layers keep the mean output of the float ones.

M. Nagel, M. van Baalen, T. Blankevoort, M. Welling. "Data-Free Quantization Through Weight
Equalization and Bias Correction." ICCV 2019, arXiv 1906.04721, section 4.2; here from calibration
images (their appendix D). For each output channel, bias += E[y_float] - E[y_quantized], layer after
layer, each on the already corrected prefix. It costs nothing at run time and is the control for any
method whose gain may be a shift of means.

The paper corrects what quantized weights shift, and AIMET, the library of its authors' company,
takes the means with activations in float; here they are quantized by default, and what that shifts
is corrected too. `correction_inputs: float` (plan.py) is the paper's way.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qexp.quant.convert import frozen_weights, quant_layers


def channel_mean(y: Tensor, layer: nn.Module) -> Tensor:
    """Mean of each channel of a layer's output -> [C].

    Shape: y [N, C, H, W] of a convolution, [N, ..., C] of a linear layer.
    """
    channels = y.movedim(1, -1) if isinstance(layer, nn.Conv2d) else y
    return channels.float().reshape(-1, channels.shape[-1]).mean(0)


def _shaped(v: Tensor, y: Tensor, layer: nn.Module) -> Tensor:
    return (v[:, None, None] if isinstance(layer, nn.Conv2d) else v).to(y.dtype)


@torch.no_grad()
def correct_bias_(model: nn.Module, reference: nn.Module, images: Tensor) -> dict[str, float]:
    """Correct the bias of every quantized layer that has one, in place, in one forward pass.

    Args:
        model: the quantized network.
        reference: the float network with the same names.
        images: [N, C, H, W], all at once: a layer's mean must be known before the next one runs.

    Returns:
        Largest |shift| by layer.
    """
    means: dict[str, Tensor] = {}
    shifts: dict[str, float] = {}
    handles = []
    layers = {n: m for n, m in quant_layers(model).items() if m.bias is not None}

    def read(name: str) -> object:
        def hook(module: nn.Module, inputs: object, y: Tensor) -> None:
            means[name] = channel_mean(y, module)

        return hook

    def correct(name: str) -> object:
        def hook(module: nn.Module, inputs: object, y: Tensor) -> Tensor:
            shift = means[name] - channel_mean(y, module)
            layers[name].bias.add_(shift)  # type: ignore[union-attr]
            shifts[name] = float(shift.abs().max())
            return y + _shaped(shift, y, module)

        return hook

    for name, layer in layers.items():
        source = reference.get_submodule(name)
        handles.append(source.register_forward_hook(read(name)))  # type: ignore[arg-type]
        handles.append(layer.register_forward_hook(correct(name)))  # type: ignore[arg-type]
    try:
        reference.eval()(images)
        with frozen_weights(model):
            model.eval()(images)
    finally:
        for handle in handles:
            handle.remove()
    return shifts
