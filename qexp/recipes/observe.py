"""What a quantized network does to real inputs: operands, clip rates, steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qexp.quant.convert import quant_layers
from qexp.quant.quantizer import Quantizer
from qexp.quant.trace import evaluated
from qexp.runner.run import Run

OBSERVED_IMAGES = 64  # that clip rates, histograms and pictures look at

# Called with a layer's name, "weight" or "act", that operand, and its quantizer. "columns" in place
# of "act": the input before im2col, of a quantizer that sees the columns.
Look = Callable[[str, str, Tensor, Quantizer], None]


@torch.no_grad()
def log_quantizers(run: Run, model: nn.Module, images: Tensor, epoch: int) -> None:
    """TensorBoard: steps, clip rates and weight histograms of every layer, from one batch."""
    for name, layer in quant_layers(model).items():
        for kind, q in (("weight", layer.weight_quantizer), ("act", layer.act_quantizer)):
            scale = getattr(q, "scale", None)
            if isinstance(scale, Tensor):
                run.scalar(f"scale/{name}.{kind}", scale.float().mean().item(), epoch)

    def log(name: str, kind: str, x: Tensor, q: Quantizer) -> None:
        if kind == "columns":
            return
        codes = q.codes(x)
        at_bound = ((codes == q.qmin) | (codes == q.qmax)).float().mean().item()
        run.scalar(f"at_bound/{name}.{kind}", at_bound, epoch)
        run.histogram(f"{kind}/{name}", x.flatten()[:: max(1, x.numel() // 20000)], epoch)

    observe(model, images, log)


@torch.no_grad()
def observe(model: nn.Module, images: Tensor, look: Look) -> None:
    """Show `look` each layer's quantized operands on `images`, one after the other.

    Nothing of them is kept: all inputs of a network together can be larger than a training step.
    """
    handles = []

    def hook(name: str) -> Any:
        def record(module: Any, inputs: tuple[Tensor, ...]) -> None:
            wq, aq = module.weight_quantizer, module.act_quantizer
            if wq.bits < 32:
                look(name, "weight", module.weight.detach(), wq)
            if aq.bits < 32:
                look(name, "columns" if aq.on_columns else "act", inputs[0].detach(), aq)

        return record

    for name, module in quant_layers(model).items():
        handles.append(module.register_forward_pre_hook(hook(name)))
    with evaluated(model, handles):
        model(images)
