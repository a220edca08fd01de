"""Which elements of a unit's output matter to the network's output (BRECQ section 3.3, eq. 10).

The second-order term of the loss at a unit's output is approximated by the diagonal of the Fisher
matrix, the squared gradient of KL(float || quantized) of the logits. As in the released code of
BRECQ the gradient is taken with this unit and everything before it quantized and the rest in float,
and damped: the weight of an element is (1 + |g|)^2.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qexp.quant.blocks import Unit
from qexp.quant.cache import Store
from qexp.quant.convert import quant_layers


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

    def keep(module: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> None:
        kept[:] = [y]

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
            kl = F.kl_div(F.log_softmax(logits, 1), target, reduction="batchmean", log_target=True)
            (grad,) = torch.autograd.grad(kl, kept)
            if array is None:
                array = store.array((len(images), *grad.shape[1:]))
            array[first : first + len(grad)].copy_((1 + grad.abs()).square())
    finally:
        handle.remove()
        for layer, (weight, act) in zip(behind, enabled, strict=True):
            layer.weight_enabled, layer.act_enabled = weight, act
    assert array is not None
    return array
