"""What a quantized network does to real inputs: operands, codes, clip rates, steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qexp.quant.convert import quant_layers
from qexp.runner.run import Run

# {layer: {"weight" | "act": (x, codes, qmin, qmax)}}
Observed = dict[str, dict[str, tuple[Tensor, Tensor, int, int]]]


@torch.no_grad()
def log_quantizers(run: Run, model: nn.Module, images: Tensor, epoch: int) -> None:
    """TensorBoard: steps, clip rates and weight histograms of every layer, from one batch."""
    layers = quant_layers(model)
    for name, operands in observe(model, images).items():
        layer = layers[name]
        for kind, q in (("weight", layer.weight_quantizer), ("act", layer.act_quantizer)):
            scale = getattr(q, "scale", None)
            if isinstance(scale, Tensor):
                run.scalar(f"scale/{name}.{kind}", scale.float().mean().item(), epoch)
        for kind, (x, codes, low, high) in operands.items():
            at_bound = ((codes == low) | (codes == high)).float().mean().item()
            run.scalar(f"at_bound/{name}.{kind}", at_bound, epoch)
            run.histogram(f"{kind}/{name}", x.flatten()[:: max(1, x.numel() // 20000)], epoch)


@torch.no_grad()
def observe(model: nn.Module, images: Tensor) -> Observed:
    """Each layer's operands on `images`."""
    seen: Observed = {}
    handles = []

    def hook(name: str) -> Any:
        def record(module: Any, inputs: tuple[Tensor, ...]) -> None:
            wq, aq = module.weight_quantizer, module.act_quantizer
            seen[name] = {}
            if wq.bits < 32:
                codes = wq.codes(module.weight)
                seen[name]["weight"] = (module.weight.detach(), codes, wq.qmin, wq.qmax)
            if aq.bits < 32 and not aq.on_columns:
                x = inputs[0].detach()
                seen[name]["act"] = (x, aq.codes(x), aq.qmin, aq.qmax)

        return record

    for name, module in quant_layers(model).items():
        handles.append(module.register_forward_pre_hook(hook(name)))
    was_training = model.training
    model.eval()(images)
    model.train(was_training)
    for handle in handles:
        handle.remove()
    return seen
