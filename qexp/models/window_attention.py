"""Swin's attention, whose two linear layers are called.

torchvision's `ShiftedWindowAttention` reads the weights of its linear layers in one function.
`WindowAttention` has the same parameters and gives the same, by calls:

    x in windows, shifted cyclically;  q, k, v = qkv(x) in three parts
    V1  y = proj(softmax(q k^T / sqrt(D) + bias[position] + mask) v)
    V2  y = proj(softmax(cos(q, k) min(exp(s), 100) + 16 sigmoid(mlp(position)) + mask) v)

Z. Liu et al., "Swin Transformer", arXiv 2103.14030, and "Swin Transformer V2", 2111.09883. Windows
have a dimension of their own, not that of the batch: a row of what the layers see is an image. V2's
keys have no bias, so its queries and values have theirs outside `qkv`, as in the authors' code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qexp.models.attention import linear, plain_attributes, thirds

OUTSIDE = -100.0  # added between tokens that only a shift has brought together
MAX_LOGIT_SCALE = math.log(100.0)


class WindowAttention(nn.Module):
    """torchvision's `ShiftedWindowAttention`, V1 or V2, for one size of images.

    Args:
        source: gives up its parameters.
        grid: height and width of the input, in tokens.
    """

    window_size: Sequence[int]
    shift_size: Sequence[int]
    num_heads: int
    attention_dropout: float
    dropout: float
    qkv: nn.Linear
    proj: nn.Linear
    relative_position_index: Tensor
    rows: Tensor
    columns: Tensor
    relative_position_bias_table: Tensor  # V1
    logit_scale: Tensor  # V2, as what follows
    cpb_mlp: nn.Sequential
    relative_coords_table: Tensor

    def __init__(self, source: Any, grid: tuple[int, int]) -> None:
        super().__init__()
        self.__dict__.update(plain_attributes(source))
        self._parameters.update(source._parameters)  # the table of V1, the scale of V2
        self._modules.update(source._modules)  # qkv, proj, cpb_mlp of V2
        self.q_bias: nn.Parameter | None = None
        self.v_bias: nn.Parameter | None = None
        for name, buffer in source._buffers.items():  # the index follows from the window's size
            self.register_buffer(name, buffer, persistent=name != "relative_position_index")
        self.cosine = "logit_scale" in source._parameters  # V2
        if self.cosine and source.qkv.bias is not None:
            self.q_bias, _, self.v_bias = thirds(source.qkv.bias)
            self.qkv = linear(source.qkv.weight, None)
        self.scale = (source.qkv.in_features // source.num_heads) ** -0.5
        self.grid = grid
        sizes = list(zip(grid, source.window_size, strict=True))
        self.windows = tuple(-(-side // window) for side, window in sizes)
        self.pad = tuple(-side % window for side, window in sizes)
        shifts = zip(self.windows, source.shift_size, strict=True)
        self.shift = tuple(shift if count > 1 else 0 for count, shift in shifts)
        for axis, name in enumerate(("rows", "columns")):
            self.register_buffer(name, self._regions(axis), persistent=False)

    def _regions(self, axis: int) -> Tensor:
        """By row or column after the shift, which part of the image it is of: 0, 1 or 2, [side]."""
        window, shift = self.window_size[axis], self.shift[axis]
        side = self.windows[axis] * window
        at = torch.arange(side)
        last, wrapped = (at >= side - window).float(), (at >= side - shift).float()
        return last + wrapped if shift else torch.zeros(side)

    def forward(self, x: Tensor) -> Tensor:
        """Shape: x [N, H, W, C] -> the same."""
        if any(self.pad):
            x = F.pad(x, (0, 0, 0, self.pad[1], 0, self.pad[0]))
        if any(self.shift):
            x = torch.roll(x, shifts=(-self.shift[0], -self.shift[1]), dims=(1, 2))
        q, k, v = self.qkv(self._split(x)).chunk(3, -1)  # each [N, windows, T, C]
        if self.q_bias is not None and self.v_bias is not None:
            q, v = q + self.q_bias, v + self.v_bias
        y = self._attend(self._heads(q), self._heads(k), self._heads(v))
        y = self.proj(y.transpose(2, 3).flatten(3))  # [N, windows, T, C]
        y = self._joined(F.dropout(y, self.dropout, self.training))
        if any(self.shift):
            y = torch.roll(y, shifts=self.shift, dims=(1, 2))
        return y[:, : self.grid[0], : self.grid[1]] if any(self.pad) else y

    def _split(self, x: Tensor) -> Tensor:
        """[N, H, W, C] -> [N, windows, T, C]"""
        (rows, columns), (height, width) = self.windows, self.window_size
        x = x.unflatten(2, (columns, width)).unflatten(1, (rows, height))
        return x.permute(0, 1, 3, 2, 4, 5).flatten(3, 4).flatten(1, 2)

    def _joined(self, y: Tensor) -> Tensor:
        """[N, windows, T, C] -> [N, H, W, C]"""
        y = y.unflatten(2, tuple(self.window_size)).unflatten(1, self.windows)
        return y.permute(0, 1, 3, 2, 4, 5).flatten(3, 4).flatten(1, 2)

    def _heads(self, x: Tensor) -> Tensor:
        """[N, windows, T, C] -> [N, windows, heads, T, D]"""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(2, 3)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.cosine:
            scale = self.logit_scale.clamp(max=MAX_LOGIT_SCALE).exp()  # [heads, 1, 1]
            scores = (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(3, 4)) * scale
        else:
            scores = (q * self.scale) @ k.transpose(3, 4)  # [N, windows, heads, T, T]
        scores = scores + self._position_bias()
        if any(self.shift):
            scores = scores + self._mask()
        return F.dropout(scores.softmax(-1), self.attention_dropout, self.training) @ v

    def _position_bias(self) -> Tensor:
        """[heads, T, T]"""
        tokens = self.window_size[0] * self.window_size[1]
        table = self.relative_position_bias_table if not self.cosine else self._computed_table()
        return table[self.relative_position_index].unflatten(0, (tokens, tokens)).permute(2, 0, 1)

    def _computed_table(self) -> Tensor:
        """[positions, heads] of V2"""
        return 16 * self.cpb_mlp(self.relative_coords_table).flatten(0, 2).sigmoid()

    def _mask(self) -> Tensor:
        """[windows, 1, T, T]"""
        region = 3 * self.rows.unsqueeze(1) + self.columns  # [H, W]
        region = self._split(region.unsqueeze(0).unsqueeze(-1)).flatten(0, 1)  # [windows, T, 1]
        apart = (region - region.transpose(1, 2)).abs().clamp(max=1.0)
        return (OUTSIDE * apart).unsqueeze(1)

    def own_names(self, state: dict[str, Any], prefix: str) -> None:
        """Rename the tensors of the module it stands for, in place; its index is computed."""
        state.pop(f"{prefix}relative_position_index", None)
        if self.q_bias is not None and (old := f"{prefix}qkv.bias") in state:
            q_bias, _, v_bias = state.pop(old).chunk(3)
            state |= {f"{prefix}q_bias": q_bias, f"{prefix}v_bias": v_bias}
