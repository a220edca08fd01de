"""One product after the other, exactly: what the fast engines are compared with.

affine             sum_k (code_k - zero) * x_k, in int64
powers of sqrt 2   sum_k sign_k (x_k << shift_k) into one accumulator for even powers and one
                   for odd ones, in int64; the odd one is multiplied once, by 1 / sqrt 2
other levels       sum_k T[code_k, x_k], T the table of all 2^(W + A) products, in float64,
                   where each product is exact and so are sums of up to 2^20 of them, as long
                   as the levels lie within 2^-8 of each other; the last bit of 53 else
"""

from __future__ import annotations

import torch
from torch import Tensor

from qexp.engine.table import check_size
from qexp.engine.weight import Weight
from qexp.engine.window import Window, patches


class Reference:
    """A layer's multiplication (module docstring).

    Args:
        weight: as the file has it.
        window: of the convolution.
        low, high: smallest and largest x_int.
    """

    def __init__(self, weight: Weight, window: Window, low: int, high: int) -> None:
        self.weight, self.window = weight, window
        self.low, self.high = low, high
        self.step = weight.step().double()
        if weight.how.form != "affine" and self._exponents() is None:
            outputs = len(weight.codes) // window.groups
            check_size(weight.how.levels, outputs * (high - low + 1))

    def __call__(self, x_int: Tensor, step: Tensor) -> Tensor:
        """[N, C_in, H, W] integers -> step * conv(x_int, w), float32 [N, C_out, H', W']."""
        n, groups = x_int.shape[0], self.window.groups
        columns = patches(x_int.long(), self.window)  # [N, C_in, window, P]
        rows = columns.reshape(n, groups, -1, columns.shape[3])  # [N, G, K, P]
        sums = torch.stack(
            [
                torch.cat([self._sum(group, rows[i, group]) for group in range(groups)])
                for i in range(n)
            ]
        )
        y = sums * self.step[:, None] * step.double().reshape(-1, 1, 1)
        height, width = self.window.size(*x_int.shape[2:])
        return y.float().reshape(n, -1, height, width)

    def _sum(self, group: int, x: Tensor) -> Tensor:
        """x int64 [K, P] -> float64 [outputs of the group, P]."""
        outputs = len(self.weight.codes) // self.window.groups
        own = slice(group * outputs, (group + 1) * outputs)
        how, index = self.weight.how, self.weight.index[own].flatten(1)  # [O, K]
        levels = self.weight.levels()
        levels = levels[own] if len(levels) > 1 else levels.expand(outputs, -1)  # [O, L]
        if how.form == "affine":
            return by_integers(levels.gather(1, index), x)
        exponent = self._exponents()
        if exponent is not None:
            return by_shifts(levels[0].sign().long()[index], exponent[index], x)
        return by_table(levels, index, x, self.low, self.high)

    def _exponents(self) -> Tensor | None:
        grid = self.weight.how.grid
        return exponents(torch.tensor(grid)) if grid else None


def by_integers(w: Tensor, x: Tensor) -> Tensor:
    """sum_k w_ok x_kp. Shape: w [O, K] of integers and halves, x int64 [K, P]."""
    twice = (2 * w).long()
    sums = torch.zeros(w.shape[0], x.shape[1], dtype=torch.int64)
    for k in range(x.shape[0]):
        sums += twice[:, k, None] * x[k]
    return sums.double() / 2


def exponents(grid: Tensor) -> Tensor | None:
    """e of levels +-sqrt(2)^-e (0 for the level 0), int64 [L]; None if they are others."""
    size = grid.double().abs()
    e = (-2 * size.log2()).round()
    power = torch.where(size > 0, 2 ** (-e / 2), 0.0)
    if bool(((size - power).abs() > 2**-23 * size).any()):
        return None
    e = torch.where(size > 0, e, 0.0).long()
    return e if int(e.max()) < 60 else None  # beyond, 63 bits do not hold the shifts


def by_shifts(sign: Tensor, exponent: Tensor, x: Tensor) -> Tensor:
    """sum_k sign_k sqrt(2)^-e_k x_k by shifts. Shape: sign, exponent [O, K]; x int64 [K, P]."""
    odd = exponent % 2
    most = int((exponent // 2).max())  # sums are in units of 2^-most
    sums = torch.zeros(2, sign.shape[0], x.shape[1], dtype=torch.int64)  # even, odd
    for k in range(x.shape[0]):
        shifted = sign[:, k, None] * (x[k] << (most - exponent[:, k, None] // 2))
        sums[0] += shifted * (1 - odd[:, k, None])
        sums[1] += shifted * odd[:, k, None]
    even_sum, odd_sum = sums.double()
    return (even_sum + odd_sum * 0.5**0.5) / 2**most


def by_table(levels: Tensor, index: Tensor, x: Tensor, low: int, high: int) -> Tensor:
    """sum_k T[index_ok, x_kp]. Shape: levels [O, L]; index [O, K]; x int64 [K, P]."""
    products = levels.double()[:, :, None] * torch.arange(low, high + 1)  # T: [O, L, A]
    sums = torch.zeros(index.shape[0], x.shape[1], dtype=torch.float64)
    output = torch.arange(index.shape[0])[:, None]
    for k in range(x.shape[0]):
        sums += products[output, index[:, k, None], x[k] - low]
    return sums
