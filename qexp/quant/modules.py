"""A convolution and a linear layer whose operands are quantized.

    y = conv(act_quantizer(x), weight_quantizer(weight)) + bias

The parameters are those of the float layer, under the same names, so that a float checkpoint
loads and `unquantize_` gives the float layer back. Inputs are quantized, not outputs: a layer's
bits are those of the two operands it multiplies.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qexp.quant.columns import columns, columns_size
from qexp.quant.quantizer import Quantizer

if TYPE_CHECKING:
    from typing_extensions import Self


# Who counts what is kept (`saving.kept_bytes`): autograd asks the innermost hooks alone.
KEPT: ContextVar[Callable[[Tensor], Any] | None] = ContextVar("kept", default=None)


class QuantizedOperands:
    """What a quantized convolution and a quantized linear layer share."""

    weight: Tensor
    weight_quantizer: Quantizer
    act_quantizer: Quantizer
    weight_enabled: bool = True
    act_enabled: bool = True
    w_hat: Tensor | None = None  # the quantized weight, while `frozen_weights` holds it
    shared: Tensor | None = None  # what `shared_weights` lends to `w_hat`
    input_again: bool = False  # backward quantizes the input again, instead of keeping it (`lean`)

    @classmethod
    def from_float(
        cls, layer: nn.Module, weight_quantizer: Quantizer, act_quantizer: Quantizer
    ) -> Self:
        """Wrap a float layer, sharing its parameters."""
        self = cls.__new__(cls)
        self.__dict__ = {**layer.__dict__}
        self.__dict__["_modules"] = {**layer._modules}
        self.__dict__["_parameters"] = {**layer._parameters}
        self.weight_quantizer = weight_quantizer
        self.act_quantizer = act_quantizer
        return self

    def quantized_weight(self) -> Tensor:
        """The weight that multiplies: quantized, frozen, or (disabled) the float one."""
        if not self.weight_enabled:
            return self.weight
        return self.weight_quantizer(self.weight) if self.w_hat is None else self.w_hat

    def lean(self, x: Tensor, x_hat: Tensor) -> AbstractContextManager[Any]:
        """While the layer multiplies: what autograd keeps of it.

        With `input_again` that is the float input x, which stays in memory anyway (its quantizer
        and the ReLU before it need it), and x_hat is computed from it again in backward.
        """
        if not self.input_again or x_hat is x:
            return nullcontext()
        quantizer, x = self.act_quantizer, x.detach()
        place, dtype, shape = x_hat.data_ptr(), x_hat.dtype, x_hat.shape

        def pack(t: Tensor) -> Tensor | None:
            if t.data_ptr() == place and t.dtype == dtype and t.shape == shape:
                return None
            if (count := KEPT.get()) is not None:
                count(t)
            return t

        @torch.no_grad()
        def unpack(kept: Tensor | None) -> Tensor:
            if kept is not None:
                return kept
            training, quantizer.training = quantizer.training, False
            try:
                return quantizer(x)
            finally:
                quantizer.training = training

        return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


class QuantConv2d(QuantizedOperands, nn.Conv2d):
    """`nn.Conv2d` with quantized operands. Shape: x [N, C_in, H, W] -> [N, C_out, H', W']."""

    def forward(self, input: Tensor) -> Tensor:
        x, weight = input, self.quantized_weight()
        if not self.act_enabled:
            return self._conv_forward(x, weight, self.bias)
        if self.act_quantizer.on_columns:
            return self._conv_columns(x, weight)
        x_hat = self.act_quantizer(x)
        with self.lean(x, x_hat):
            return self._conv_forward(x_hat, weight, self.bias)

    def _conv_columns(self, x: Tensor, weight: Tensor) -> Tensor:
        """The same convolution with every im2col element quantized on its own (AQuant rows)."""
        if self.padding_mode != "zeros" or isinstance(self.padding, str):
            raise ValueError("column quantizers need zero padding given as integers")
        window = (self.kernel_size, self.dilation, self.padding, self.stride)
        taken = self.act_quantizer(columns(x, *window))  # type: ignore[arg-type]
        n, k, length = taken.shape
        grouped = taken.view(n, self.groups, k // self.groups, length)
        rows = weight.reshape(self.groups, self.out_channels // self.groups, -1).to(taken.dtype)
        # A batched product, not einsum, whose gradient of the rows is many times slower on a CPU.
        out = torch.matmul(rows, grouped).reshape(n, self.out_channels, length)
        if self.bias is not None:
            out = out + self.bias.to(out.dtype)[:, None]
        size = columns_size((x.shape[2], x.shape[3]), *window)  # type: ignore[arg-type]
        return out.view(n, self.out_channels, *size)


class QuantLinear(QuantizedOperands, nn.Linear):
    """`nn.Linear` with quantized operands. Shape: x [N, ..., C_in] -> [N, ..., C_out]."""

    def forward(self, input: Tensor) -> Tensor:
        x_hat = self.act_quantizer(input) if self.act_enabled else input
        weight = self.quantized_weight()
        with self.lean(input, x_hat):
            return F.linear(x_hat, weight, self.bias)


QuantLayer = QuantConv2d | QuantLinear
QUANT_LAYERS = (QuantConv2d, QuantLinear)


def leave_fast_path_(model: nn.Module) -> None:
    """Make torch's encoder layers call the quantized layers in them.

    In eval mode without gradients `nn.TransformerEncoderLayer` reads `linear1.weight` and
    `linear2.weight` itself, in one fused kernel, and calls neither layer.
    """
    for module in model.modules():
        quantized = any(isinstance(child, QUANT_LAYERS) for child in module.children())
        if quantized and isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0  # torch: an activation that the kernel lacks
