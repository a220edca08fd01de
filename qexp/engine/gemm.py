"""The fast way: planes of 8-bit weights times 8-bit inputs, one integer matrix product a layer.

The convolution becomes a matrix product over im2col in channels-last order, all planes of a weight
(`weight`) side by side, by `torch._int_mm`: int8 times int8 summed in int32, which CPUs with VNNI
do several times faster than float32. Unsigned 8-bit inputs enter less 128, and 128 times the sum
of the weights is added after. Everything up to the sums is exact.

Where that does not serve (grouped convolutions, inputs beyond 8 bits, a CPU on which int8 products
saturate, which is tried out once) the same integers go through torch's own convolution in
float32, exact in any order while all sums stay below 2^24, or float64, below 2^53.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from qexp.engine.weight import Weight, planes
from qexp.engine.window import Window

_int_mm = torch.ops.aten._int_mm.default

PATCH_BYTES = 1 << 22  # of im2col at a time: what a core keeps close


@cache
def int8_products_are_exact() -> bool:
    """Whether `torch._int_mm` adds the largest products of int8 without saturating, here."""
    for a, b in ((127, 127), (-128, 127), (127, -128), (-128, -128)):
        x = torch.full((32, 64), a, dtype=torch.int8)
        w = torch.full((64, 32), b, dtype=torch.int8)
        try:
            if not bool((_int_mm(x, w) == 64 * a * b).all()):
                return False
        except RuntimeError:
            return False
    return True


def largest_sum(rows: int, low: int, high: int, shift: int) -> int:
    """Bound of |sum w * x| and of what a shift adds, codes from `low` to `high`.

    Args:
        rows: largest sum of |w| of an output channel.
    """
    return rows * (max(abs(low - shift), abs(high - shift)) + shift)


class Gemm:
    """A layer's multiplication. Arguments and call as `Reference`."""

    def __init__(self, weight: Weight, window: Window, low: int, high: int) -> None:
        self.window = window
        w = planes(weight)
        self.step, self.factors = w.step, w.factors
        self.shift = 128 if high > 127 else 0
        fits = low - self.shift >= -128 and high - self.shift <= 127
        # The largest sum there can be, of codes that are shifted where a kernel takes int8.
        rows = int(w.planes.long().abs().flatten(2).sum(2).max())
        fits = fits and largest_sum(rows, low, high, self.shift) < 2**31
        if window.groups == 1 and fits and int8_products_are_exact():
            # [P, O, C, kh, kw] -> [kh * kw * C, P * O]
            self.matrix = w.planes.permute(3, 4, 2, 0, 1).flatten(0, 2).flatten(1).contiguous()
            self.added = self.shift * self.matrix.sum(0, dtype=torch.int32)
            self.multiply = self._int8
        else:
            largest = largest_sum(rows, low, high, 0)
            dtype = torch.float32 if largest < 2**24 else torch.float64
            self.kernels = w.planes.to(dtype)
            self.multiply = self._float

    def __call__(self, x_int: Tensor, step: Tensor) -> Tensor:
        """[N, C_in, H, W] integers -> step * conv(x_int, w), float32 [N, C_out, H', W']."""
        return self.multiply(x_int, step.reshape(-1, 1, 1))

    def _int8(self, x_int: Tensor, step: Tensor) -> Tensor:
        x = (x_int.sub(self.shift) if self.shift else x_int).to(torch.int8).permute(0, 2, 3, 1)
        n = len(x)
        rows, columns = self.window.size(x.shape[1], x.shape[2])
        y = torch.empty(n, rows * columns, len(self.step))
        # The steps of a row of `y`, by plane: [1 or N, 1, O].
        scales = [step * (self.step * factor) for factor in self.factors]
        count = max(1, PATCH_BYTES // (rows * columns * self.matrix.shape[0]))
        for i in range(0, n, count):
            part = slice(i, min(i + count, n))
            sums = _int_mm(self._patches(x[part]), self.matrix)
            if self.shift:
                sums += self.added
            planes_of = sums.view(part.stop - i, rows * columns, len(scales), -1).unbind(2)
            for p, (plane, scale) in enumerate(zip(planes_of, scales, strict=True)):
                own = scale[part] if len(scale) > 1 else scale
                if p == 0:
                    torch.mul(plane, own, out=y[part])
                else:
                    y[part] += plane * own
        return y.view(n, rows, columns, y.shape[2]).permute(0, 3, 1, 2)

    def _patches(self, x: Tensor) -> Tensor:
        """int8 [n, H, W, C] -> [n * H' * W', kh * kw * C]."""
        (kh, kw), (sh, sw), (dh, dw) = self.window.kernel, self.window.stride, self.window.dilation
        top, left = self.window.padding
        if top or left:
            x = F.pad(x, (0, 0, left, left, top, top), value=-self.shift)
        rows, columns = (
            (x.shape[1] - dh * (kh - 1) - 1) // sh + 1,
            (x.shape[2] - dw * (kw - 1) - 1) // sw + 1,
        )
        x = x.contiguous()
        n, _, width, channels = x.shape
        of_row, of_image = width * channels, x.shape[1] * width * channels
        view = x.as_strided(
            (n, rows, columns, kh, kw, channels),
            (of_image, sh * of_row, sw * channels, dh * of_row, dw * channels, 1),
        )
        return view.reshape(n * rows * columns, kh * kw * channels)

    def _float(self, x_int: Tensor, step: Tensor) -> Tensor:
        x, w = x_int.to(self.kernels.dtype), self.window
        total: Tensor | None = None
        for kernel, factor in zip(self.kernels, self.factors, strict=True):
            sums = F.conv2d(x, kernel, None, w.stride, w.padding, w.dilation, w.groups) * factor
            total = sums if total is None else total + sums
        assert total is not None
        return (total * (self.step[:, None, None] * step[..., None])).float()
