"""What layers must be like to have a quantized form.

A quantized layer has the parameters of the float one and computes what torch's own layer does. So a
layer with a forward of its own, or with a weight that is computed from other parameters, would
become another one unsaid; and one weight under two quantizers would be stored twice, on two grids.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from qexp.errors import ConfigError
from qexp.quant.modules import QUANT_LAYERS
from qexp.quant.quantizer import Quantizer
from qexp.quant.trace import Layer


def check_layers(model: nn.Module, names: Sequence[str]) -> None:
    """Refuse layers that `quantize_` cannot swap.

    Args:
        names: of the convolutions and linear layers to be quantized, paths in `model`.

    Raises:
        ConfigError: the first of them that has no quantized form.
        ValueError: it is quantized.
    """
    owners: dict[int, str] = {}
    for name in names:
        module = model.get_submodule(name)
        if isinstance(module, QUANT_LAYERS):
            raise ValueError(f"layer '{name}' is already quantized; call unquantize_ first")
        _refuse_computed_weight(name, module)
        _refuse_own_forward(name, module)
        owner = owners.setdefault(id(module.weight), name)
        if owner != name:
            raise ConfigError(
                f"model: layers '{owner}' and '{name}' share one weight, which each would quantize "
                "for itself. Give each its own weight, or leave one in float (bitwidth=pattern)."
            )


def check_padding(name: str, module: nn.Module, act: Quantizer) -> None:
    """Refuse paddings that quantizers of columns do not know: they see it, and take it for zeros.

    Raises:
        ConfigError: another padding than a number of zeros.
    """
    if not (act.on_columns and isinstance(module, nn.Conv2d)):
        return
    if module.padding_mode != "zeros" or isinstance(module.padding, str):
        given = module.padding if module.padding_mode == "zeros" else module.padding_mode
        raise ConfigError(
            f"model: layer '{name}' has padding '{given}', and {type(act).__name__} of each row "
            "needs zeros, given as integers. Use quantizer.act.per=channel, or pad in a module "
            "before the layer (nn.ReflectionPad2d)."
        )


def _refuse_computed_weight(name: str, module: nn.Module) -> None:
    if "weight" not in module._parameters:
        raise ConfigError(
            f"model: layer '{name}' computes its weight in each pass (weight_norm, spectral_norm "
            "or the like), which its quantized form would not. Build the model without that."
        )


def _refuse_own_forward(name: str, module: nn.Module) -> None:
    for kind, methods in ((nn.Conv2d, ("forward", "_conv_forward")), (nn.Linear, ("forward",))):
        if isinstance(module, kind):
            for method in methods:
                if getattr(type(module), method) is not getattr(kind, method):
                    raise ConfigError(
                        f"model: layer '{name}' is a {type(module).__name__} with a {method} of "
                        "its own, which its quantized form would not have. Write it as a module "
                        f"around a torch.nn.{kind.__name__} (padding: nn.ZeroPad2d before it)."
                    )


def check_samples_first(layer: Layer, quantizer: Quantizer) -> None:
    """Refuse a quantizer that looks at each sample where the samples are not the first axis.

    Raises:
        ConfigError: it looks at each sample, and tokens are the first axis.
    """
    if layer.tokens_first and quantizer.by_sample:
        raise ConfigError(
            f"model: layer '{layer.name}' takes its input with tokens before the batch, and "
            f"{type(quantizer).__name__} has a factor for each sample. Build the model with "
            "batch_first=True, or take another quantizer/act."
        )
