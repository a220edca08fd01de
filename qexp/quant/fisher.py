"""Which elements of a unit's output matter to the network's output (BRECQ section 3.3, eq. 10).

The second-order term of the loss at a unit's output is approximated by the diagonal of the Fisher
matrix, the squared gradient of KL(float || quantized) of the logits. As in the released code of
BRECQ the gradient is taken with this unit and everything before it quantized and the rest in float,
and damped: the weight of an element is (1 + |g|)^2. g is of the mean over 32 images, the batch
there, whatever the batch here: the damping makes that matter. It is taken where the error is: after
a ReLU or ReLU6 that follows the unit, also where that is 0, and before any other activation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qexp.quant.blocks import Unit
from qexp.quant.cache import Store
from qexp.quant.convert import quant_layers

IMAGES = 32  # that the released code takes the mean over


def output_weights(
    model: nn.Module,
    reference: nn.Module,
    unit: Unit,
    later: Sequence[str],
    images: Tensor,
    batch_size: int,
    store: Store,
) -> Tensor:
    """(1 + |g|)^2 for each output element of `unit`, for all images.

    Shape: images [N, C, H, W]; result [N, ...] as the unit's output.
    """
    kept: list[Tensor] = []

    def keep(module: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> Tensor:
        # An activation that reads its own output again changes nothing; a hair inside its range
        # it passes the gradient of every element.
        out = y if unit.activation is None else _inside(unit.activation, y)
        kept[:] = [out]
        return out.clone()  # an activation in place would put its own result into `out`

    behind = [layer for name, layer in quant_layers(model).items() if name in set(later)]
    enabled = [(layer.weight_enabled, layer.act_enabled) for layer in behind]
    for layer in behind:
        layer.weight_enabled = layer.act_enabled = False
    handle = model.get_submodule(unit.name).register_forward_hook(keep)
    array: Tensor | None = None
    try:
        for first in range(0, len(images), batch_size):
            x = images[first : first + batch_size].detach().requires_grad_()
            logits = model.eval()(x)
            with torch.no_grad():
                target = F.log_softmax(reference.eval()(x), 1)
            kl = F.kl_div(F.log_softmax(logits, 1), target, reduction="sum", log_target=True)
            (grad,) = torch.autograd.grad(kl / IMAGES, kept)
            if array is None:
                array = store.array((len(images), *grad.shape[1:]))
            array[first : first + len(grad)].copy_((1 + grad.abs()).square())
    finally:
        handle.remove()
        for layer, (weight, act) in zip(behind, enabled, strict=True):
            layer.weight_enabled, layer.act_enabled = weight, act
    assert array is not None
    return array


def _inside(activation: Callable[[Tensor], Tensor], y: Tensor) -> Tensor:
    """`activation(y)`, moved off the bounds of ReLU and ReLU6 by the least that keeps gradients."""
    top = activation(y.new_full((1,), torch.inf))
    below = torch.nextafter(top, torch.zeros_like(top)) if bool(top.isfinite()) else top
    return torch.minimum(activation(y).clamp_min(torch.finfo(y.dtype).tiny), below)
