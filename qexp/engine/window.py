"""The window of a convolution, and what lies under it. A linear layer has a window of one pixel."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Window:
    """Kernel, stride, padding and dilation, each (height, width), and the number of groups."""

    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the output for an input of this size."""
        sides = zip(
            (height, width), self.kernel, self.stride, self.padding, self.dilation, strict=True
        )
        rows, columns = ((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sides)
        return rows, columns


def patches(x: Tensor, window: Window) -> Tensor:
    """im2col of any dtype: x [N, C, H, W] -> [N, C, kh * kw, H' * W'], zeros around x."""
    (kh, kw), (sh, sw), (dh, dw) = window.kernel, window.stride, window.dilation
    height, width = window.size(x.shape[2], x.shape[3])
    x = F.pad(x, (window.padding[1],) * 2 + (window.padding[0],) * 2)
    shifted = [
        x[:, :, i * dh :, j * dw :][:, :, : height * sh : sh, : width * sw : sw]
        for i in range(kh)
        for j in range(kw)
    ]
    return torch.stack(shifted, 2).flatten(3)
