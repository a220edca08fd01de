"""A packed file as a network whose quantized layers multiply integers."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qexp.engine.gemm import Gemm
from qexp.engine.reference import Reference
from qexp.engine.source import check_known, integers, span
from qexp.engine.table import Table
from qexp.engine.weight import Weight
from qexp.engine.window import Window
from qexp.errors import ConfigError
from qexp.export.header import LayerEntry
from qexp.export.network import restore
from qexp.export.packed import Packed
from qexp.quant.convert import replace_
from qexp.quant.modules import QuantConv2d, QuantLayer
from qexp.quant.quantizer import Quantizer
from qexp.runner.device import pick_device


class Multiply(Protocol):
    """What an engine does for one layer."""

    def __call__(self, x_int: Tensor, step: Tensor) -> Tensor: ...


def _packed_gemm(weight: Weight, window: Window, low: int, high: int) -> Multiply:
    from qexp.engine.packed_gemm import PackedGemm  # imports triton

    return PackedGemm(weight, window, low, high)


ENGINES: dict[str, Callable[[Weight, Window, int, int], Multiply]] = {
    "integer": Gemm,
    "table": Table,
    "reference": Reference,
    "triton": _packed_gemm,
}
ON_CPU = ("integer", "table", "reference")


def engine_device(engine: str, asked: str) -> torch.device:
    """Where a packed file runs: `float` where asked, engines on the CPU, `triton` on a GPU.

    Raises:
        ConfigError: no such device, or none that the engine runs on.
    """
    if engine in ON_CPU:
        return torch.device("cpu")
    device = pick_device(asked)
    if engine != "triton":
        return device
    if importlib.util.find_spec("triton") is None:
        raise ConfigError(
            "engine: engine=triton needs the package triton, which comes with torch for CUDA. Use "
            "engine=integer."
        )
    from qexp.engine.packed_gemm import interpreted

    if device.type != "cuda" and not interpreted():
        raise ConfigError(
            f"engine: engine=triton needs a CUDA device, not {device.type}. Use engine=integer, or "
            "set TRITON_INTERPRET=1 to try its kernel on the CPU, slowly."
        )
    return device


SIZES = (
    "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups",
    "padding_mode", "in_features", "out_features",
)  # fmt: skip


class IntegerLayer(nn.Module):
    """A convolution or a linear layer: integers of the input, their sums, one rescale.

    Args:
        layer: as `restore` made it, for its geometry, bias and input quantizer.
        weight: codes of its weight.
        engine: one of `ENGINES`.
    """

    def __init__(self, layer: QuantLayer, weight: Weight, engine: str) -> None:
        super().__init__()
        self.act_quantizer: Quantizer = layer.act_quantizer
        self.bias = layer.bias
        self.conv = isinstance(layer, QuantConv2d)
        for key in SIZES:  # a model may read its layers'
            if hasattr(layer, key):
                setattr(self, key, getattr(layer, key))
        self.unfold: Window | None = None
        if isinstance(layer, QuantConv2d):
            padding: Any = layer.padding  # a pair, unless given as a word
            if isinstance(padding, str) or layer.padding_mode != "zeros":
                raise ConfigError("engine: convolutions need zero padding given as integers.")
            sizes: Any = (layer.kernel_size, layer.stride, padding, layer.dilation)
            window = Window(*sizes, groups=layer.groups)
        else:
            window = Window()
        codes = weight.codes.reshape(*weight.codes.shape[:2], *window.kernel)
        if self.act_quantizer.on_columns:  # quantized after im2col: what follows sees one pixel
            self.unfold = window
            window = Window(groups=window.groups)
            codes = codes.reshape(len(codes), -1, 1, 1)
        shaped = Weight(weight.how, codes, weight.parts)
        self.window = window
        self.multiply = ENGINES[engine](shaped, window, *span(self.act_quantizer))
        self.offset_weight: Tensor | None
        has_offset = getattr(self.act_quantizer, "offset", None) is not None
        of_offset = layer.weight.detach().reshape(codes.shape) if has_offset else None
        self.register_buffer("offset_weight", of_offset, persistent=False)

    @property
    def weight(self) -> Tensor:
        """Is not there, in float.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            "engine: the model's forward reads the weight of a layer, of which an engine has the "
            "integers alone. Use engine=float."
        )

    def extra_repr(self) -> str:
        return type(self.multiply).__name__

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Shape: x [N, C_in, H, W] -> [N, C_out, H', W'], or [N, ..., C_in] -> [N, ..., C_out]."""
        size = None
        if self.unfold is not None:
            w = self.unfold
            size = w.size(x.shape[2], x.shape[3])
            x = F.unfold(x, w.kernel, w.dilation, w.padding, w.stride)  # [N, K, P]
        x_int, step, offset = integers(self.act_quantizer, x)
        if self.conv:
            image = x_int if size is None else x_int.unflatten(2, size)
        else:  # tokens, or none, are pixels
            pixels = math.prod(x_int.shape[1:-1])
            image = x_int.movedim(-1, 1).reshape(len(x_int), x_int.shape[-1], 1, pixels)
        y = self.multiply(image, step)
        if offset is not None:
            y = y + self._of_offset(image, offset)
        if self.bias is not None:
            y = y + self.bias[:, None, None]
        if self.conv:
            return y
        return y.flatten(2).transpose(1, 2).reshape(*x_int.shape[:-1], y.shape[1])

    def _of_offset(self, image: Tensor, offset: Tensor) -> Tensor:
        """conv(offset, w): not a constant, as no offset is added to the zeros around an image."""
        assert self.offset_weight is not None
        w, ones = self.window, torch.ones_like(image[:1], dtype=torch.float64)
        weight = self.offset_weight.double()  # a GPU would take float32 as TF32
        sums = F.conv2d(ones, weight, None, w.stride, w.padding, w.dilation, w.groups)
        return offset * sums.float()


@torch.no_grad()
def integer_network(packed: Packed, engine: str = "integer", *, trust: bool = False) -> nn.Module:
    """The network of a packed file, its layers run by one of `ENGINES`; on the CPU as yet.

    Layers with a float operand, and everything between layers, are as `restore` makes them.

    Raises:
        CheckpointError, FormatError: as `restore`.
        ConfigError: a quantizer that the engines do not know.
    """
    model = restore(packed, trust=trust)
    for entry in packed.header.layers:
        if entry.weight is None or entry.input is None:
            continue
        layer: Any = model.get_submodule(entry.name)
        check_known(layer.act_quantizer, entry.name)
        swapped = IntegerLayer(layer, weight_of(packed, entry), engine).eval()
        replace_(model, entry.name, swapped)
    return model


def weight_of(packed: Packed, entry: LayerEntry) -> Weight:
    """A quantized layer's weight as the engines take it."""
    assert entry.weight is not None
    parts = {k: v for k, v in packed.part(f"{entry.name}.w").items() if k != "codes"}
    return Weight(packed.header.weights[entry.weight], packed.codes(entry), parts)
