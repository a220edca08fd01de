"""The look-up table of products, vectorised: T[code of w, code of x] for every weight and input.

For a tile of output positions, the table's rows of each input k are gathered once for all output
channels, [K * L, tile], and output channel o is the sum of the K rows that its codes name
(`embedding_bag`). Nothing is multiplied but by the steps at the end. float32 sums.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qexp.engine.weight import Weight
from qexp.engine.window import Window, patches
from qexp.errors import ConfigError

TILE_BYTES = 1 << 19  # of the gathered rows: about a core's cache
TILE = 16  # positions at least
LARGEST = 1 << 28  # entries of a table: 1 GiB, of float64 2


def check_size(levels: int, columns: int) -> None:
    """Raise a ConfigError for a table that is too large: `columns` entries a level."""
    if levels * columns > LARGEST:
        raise ConfigError(
            f"engine: a layer of {levels:,} levels needs a table of {levels * columns:,} products, "
            f"more than {LARGEST:,}. Use engine=integer."
        )


class Table:
    """A layer's multiplication. Arguments and call as `Reference`."""

    def __init__(self, weight: Weight, window: Window, low: int, high: int) -> None:
        self.window, self.low = window, low
        self.step = weight.step()
        self.outputs = len(weight.codes) // window.groups
        levels = weight.levels()
        self.shared = len(levels) == 1
        self.levels = levels.shape[1]
        index = weight.index.flatten(1)  # [C_out, K]
        check_size(self.levels, max(len(levels) * (high - low + 1), TILE * index.shape[1]))
        # T: [rows, A, L], one row where all output channels have the same levels
        self.products = levels[:, None, :] * torch.arange(low, high + 1)[:, None]
        self.bags = (index + self.levels * torch.arange(index.shape[1])).int()

    def __call__(self, x_int: Tensor, step: Tensor) -> Tensor:
        """[N, C_in, H, W] integers -> step * conv(x_int, w), float32 [N, C_out, H', W']."""
        n, groups = x_int.shape[0], self.window.groups
        columns = patches(x_int, self.window).sub_(self.low).int()
        rows = columns.reshape(n, groups, -1, columns.shape[3])  # [N, G, K, P]
        y = torch.empty(n, len(self.bags), columns.shape[3])
        tile = max(TILE, TILE_BYTES // (4 * self.levels * rows.shape[2]))
        for i in range(n):
            for group in range(groups):
                own = slice(group * self.outputs, (group + 1) * self.outputs)
                for p in range(0, y.shape[2], tile):
                    y[i, own, p : p + tile] = self._sums(rows[i, group, :, p : p + tile], own)
        y *= self.step[:, None] * step.reshape(-1, 1, 1)
        return y.reshape(n, -1, *self.window.size(*x_int.shape[2:]))

    def _sums(self, x: Tensor, own: slice) -> Tensor:
        """x [K, tile] -> [outputs of the group, tile]."""
        if self.shared:
            return self._bag(self.products[0], x, self.bags[own])
        found = [
            self._bag(self.products[o], x, self.bags[o : o + 1]) for o in range(own.start, own.stop)
        ]
        return torch.cat(found)

    @staticmethod
    def _bag(products: Tensor, x: Tensor, bags: Tensor) -> Tensor:
        rows = products[x].transpose(1, 2)  # [K, tile, L] -> [K, L, tile]
        return F.embedding_bag(bags, rows.flatten(0, 1), mode="sum")
