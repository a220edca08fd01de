"""ADQ weights: a quantile codebook that follows the weights by a moving average.

ADQ: Jia, Huang, Yu, Hou, Miao, Yang (Chongqing University). 2025, arXiv 2510.19760.

The idea: the levels of a layer's weights are a small codebook, as in vector quantization: started
at quantiles of the negative and of the positive weights with zero between them, then moved online
towards the mean of the weights each level stands for. The activations are `N2UQ`.

Codebook of b bits, m = 2^(b-1) - 1, 2 m + 1 = 2^b - 1 levels c_-m < ... < c_0 = 0 < ... < c_m:
    c_k = quantile({w > 0}, (k - 1/2) / m),   c_-k from {w < 0} likewise,   k = 1..m
    `levels: full` has all 2^b: one more negative level, as LSQ's grid, m + 1 of them instead of m.
Forward:   w_hat = c_k(w),   k(w) = argmin_k |w - c_k|, by search among the midpoints
Gradients: dL/dw = dL/dw_hat, no clip mask (straight-through); the codebook has none.
Adaptation, at each forward in training, from the master weights, S_k = {w: k(w) = k}:
    c_k <- gamma c_k + (1 - gamma) mean(S_k) where S_k is not empty, c_0 = 0
    An online Lloyd-Max: gamma = 0 is one Lloyd sweep. c_k and mean(S_k) lie in the same cell, so
    the levels stay sorted. `form: count` keeps moving counts and sums instead (VQ-VAE):
    n_k <- gamma n_k + (1 - gamma) |S_k|,  t_k <- gamma t_k + (1 - gamma) sum(S_k),  c_k = t_k / n_k
    It stops at the fraction `adapt_until` of the training's steps: the last ones have a fixed grid.
Dead levels: a level without members for `dead_after` forwards moves into the neighbouring cell that
    has more members, to the centroid of the half of it that faces the dead level.

The abstract and a cut review are all of the paper we had. Stated there: quantiles per layer,
positive and negative apart, zero added; adaptation by a moving average; a sensitivity-informed
bit-width per layer (`bitwidth=sensitivity`); distillation. Unknown, and what we chose:
 1. 2^b - 1 levels; quantile positions (k - 1/2) / m; gamma 0.99; the end of adaptation at 0.9.
 2. The form of the average, dead levels, and that each step counts as one iteration (with
    gradient accumulation too: its micro-batches share one quantization of the weights).
 3. One codebook a layer; `per_channel: true` is one an output channel, with its bytes counted.
 4. `init: kmeans` (quantiles, then Lloyd sweeps), `init: uniform` (step of least squared error);
    `adaptation: none`, and `adaptation: gradient`: levels learned, dL/dc_k = g * sum of e over S_k,
    g = 1 / sqrt(weights of a codebook * qmax), as LSQ's.
 5. No commitment loss: a quantizer here returns no loss.

Measured (results/cifar10_qat_rungs: CIFAR-10, W2A2, three epochs, one seed): 82.42 with N2UQ's
thresholds (82.20 with `adaptation: none`, 84.44 with `levels: full`), 84.13 with LSQ's step under
the same weights. N2UQ stays the default, because it is what ADQ is. At 2 bits the default codebook
is ternary. With `full`, ten epochs, one seed (results/cifar10_qat_short): 87.70 against 86.92 at
W2A2, 90.50 against 90.43 at W3A3, 91.09 against 91.13 at W4A4: the fourth level counts, the eighth
and sixteenth do not. `symmetric` stays the default, because it is what the abstract describes. A
gamma of 0.9 gives 84.15 against 82.63 at W2A2 in three epochs (one seed, results/cifar10_ablations)
and 0.45 (0.34) more than 0.99 in ten (three seeds).

Quantiles alone are far from the least squared error, and worse than a uniform grid. Adaptation does
not make up for it in a short training: at W2A2 three epochs give 82.63 from quantiles, 85.65 from
`kmeans`, 85.72 from `uniform` (one seed, results/cifar10_ablations); ten give 86.92, 87.59, 87.37
(seed 0, results/cifar10_qat_short). Quantiles stay the default, because they are the abstract's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from qexp.quant import functional
from qexp.quant.calibrate import mse_scale
from qexp.quant.cells import bin_members, gather, level_tables, search
from qexp.quant.functional import MIN_SCALE, as_rows, from_rows, kernel, midpoints
from qexp.quant.project import quantile_of_sorted
from qexp.quant.quantizer import Quantizer

KMEANS_SWEEPS = 50
QUANTILE_LIMIT = 1 << 24  # elements that torch.quantile takes in every release
MIN_COUNT = 1e-5  # VQ-VAE's guard of t_k / n_k


def quantile_levels(w: Tensor, up: int, down: int) -> Tensor:
    """Codebook [down + 1 + up] of the weights `w` [M]: `down` negative levels, 0, `up` positive.

    A side without weights mirrors the other; without any, levels are MIN_SCALE apart.
    """
    high, low = w[w > 0], -w[w < 0]
    positive = _side(high if high.numel() else low, up)
    negative = _side(low if low.numel() else high, down)
    return torch.cat([-negative.flip(0), w.new_zeros(1), positive])


def _side(w: Tensor, m: int) -> Tensor:
    """m quantiles of positive weights `w` [M], ascending and distinct."""
    steps = torch.arange(m, device=w.device, dtype=w.dtype)
    tiny = (steps + 1) * MIN_SCALE
    found = _quantiles(w, (steps + 0.5) / m) if w.numel() else tiny
    # Equal weights give equal quantiles: levels are kept distinct by a last bit each.
    return torch.maximum(found, tiny) * (1 + tiny)


def _quantiles(w: Tensor, q: Tensor) -> Tensor:
    """`w.quantile(q)`, [K], of any number of weights: some releases refuse more than 2^24."""
    if w.numel() <= QUANTILE_LIMIT:
        return w.quantile(q)
    ordered = w.sort().values
    return torch.stack([quantile_of_sorted(ordered, share) for share in q.tolist()])


@kernel
def _nearest_of(rows: Tensor, levels: Tensor, borders: Tensor, last: int) -> tuple[Tensor, Tensor]:
    # of one codebook: rows [1, M]; tables as `level_tables`; last: the highest half cell
    cell, bits = search(rows, borders)
    level = gather(levels, cell, bits)
    return level, (2 * cell + (rows > level)).clamp_max(last)  # a NaN sorts behind all


class Codebook(Quantizer):
    """Weights on a codebook with zero, adapted to the weights in training.

    Args:
        levels: `symmetric`, 2^b - 1 of them, or `full`, 2^b.
        init: `quantile` (paper), `kmeans`, or `uniform`.
        adaptation: `ema` (paper), `none`, or `gradient`.
        form: of the moving average, `simple` or `count`.
        gamma: its decay a forward, in [0, 1).
        adapt_until: fraction of the training after which the levels stay.
        dead_after: forwards without a member after which a level is moved; None: never.
        per_channel: one codebook per output channel instead of per layer.
    """

    codebook: Tensor  # [R, K] sorted; R = 1 or C_out, K = qmax - qmin + 1
    count: Tensor  # n_k of the `count` form, [R, K]
    idle: Tensor  # forwards since the level last had a member, [R, K]

    def __init__(
        self,
        bits: int,
        *,
        signed: bool = True,
        shape: Sequence[int] = (),
        levels: Literal["symmetric", "full"] = "symmetric",
        init: Literal["quantile", "kmeans", "uniform"] = "quantile",
        adaptation: Literal["ema", "none", "gradient"] = "ema",
        form: Literal["simple", "count"] = "simple",
        gamma: float = 0.99,
        adapt_until: float = 0.9,
        dead_after: int | None = 100,
        per_channel: bool = False,
    ) -> None:
        super().__init__(bits, signed=signed, shape=shape)
        if bits == 1:
            raise ValueError("a codebook with zero needs at least 2 bits, got 1")
        if not 0 <= gamma < 1:
            raise ValueError(f"gamma must be in [0, 1), got {gamma}")
        if not 0 <= adapt_until <= 1:
            raise ValueError(f"adapt_until must be in [0, 1], got {adapt_until}")
        if dead_after is not None and dead_after < 1:
            raise ValueError(f"dead_after must be at least 1, or None for never, got {dead_after}")
        self.init, self.adaptation, self.form = init, adaptation, form
        self.gamma, self.adapt_until, self.dead_after = gamma, adapt_until, dead_after
        self.per_channel, self.level_set = per_channel, levels
        self.adapting = adaptation == "ema"
        self.qmax = 2 ** (bits - 1) - 1
        self.qmin = -self.qmax - (levels == "full")
        self.zero_at = -self.qmin  # index of the level zero
        grid = torch.arange(self.qmin, self.qmax + 1.0).repeat(shape[0] if per_channel else 1, 1)
        if adaptation == "gradient":
            self.codebook = nn.Parameter(grid)
        else:
            self.register_buffer("codebook", grid)
        self.register_buffer("count", torch.zeros_like(grid))
        self.register_buffer("idle", torch.zeros_like(grid, dtype=torch.int32))

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        """Start the codebook from the weights [C_out, ...]."""
        rows = self._rows(x)
        if self.init == "uniform":
            steps = [mse_scale(row, self.qmin, self.qmax) for row in rows]
            grid = torch.arange(self.qmin, self.qmax + 1, device=x.device)
            levels = torch.stack([grid * step for step in steps])
        else:
            levels = torch.stack([quantile_levels(row, self.qmax, -self.qmin) for row in rows])
        self.codebook.copy_(levels)
        for _ in range(KMEANS_SWEEPS if self.init == "kmeans" else 0):
            n, t = self._members(rows, self._nearest(rows)[1]).sum(2).unbind(-1)
            self.codebook.copy_(self._pinned(torch.where(n > 0, t / n, self.codebook)))
        self.count.copy_(self._members(rows, self._nearest(rows)[1]).sum(2)[..., 0])
        self.idle.zero_()
        self.calibrated.fill_(True)

    def progress(self, fraction: float) -> None:
        """Stop adapting from the fraction `adapt_until` of the training on."""
        self.adapting = self.adaptation == "ema" and fraction < self.adapt_until

    # -----------------------------------------------------------------------------------------
    # Forward

    def _rows(self, x: Tensor) -> Tensor:
        return as_rows(x.detach().float(), self.codebook.shape[0])  # [R, M]

    def _nearest(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest level in its row, ties to the lower, and the half cell, [R, M] each.

        A half cell is 2 k, or 2 k + 1 above the level; k from 0 to K - 1.
        """
        levels = self._sorted().detach()
        if levels.shape[0] == 1:
            return _nearest_of(rows, *level_tables(levels[0]), 2 * levels.shape[1] - 1)
        cells = torch.searchsorted(midpoints(levels).contiguous(), rows)
        level = levels.gather(1, cells)
        return level, 2 * cells + (rows > level)

    def _sorted(self) -> Tensor:
        if self.adaptation != "gradient":
            return self.codebook
        # Learned levels may cross: the grid is the sorted one, zero pinned without gradient.
        low, high = self.codebook[:, : self.zero_at], self.codebook[:, self.zero_at + 1 :]
        zero = torch.zeros_like(self.codebook[:, :1])
        parts = [low.sort(1).values.clamp_max(0), zero, high.sort(1).values.clamp_min(0)]
        return torch.cat(parts, 1)

    def forward(self, x: Tensor) -> Tensor:
        rows = self._rows(x)
        level, half = self._nearest(rows)
        if self.adaptation == "gradient":
            g = (rows.shape[1] * max(1, self.qmax)) ** -0.5
            level = functional.scale_grad(self._sorted(), g).gather(1, half.long() // 2)
        w_hat = from_rows(level, x).to(x.dtype)
        if self.training:
            self._observe(rows, half)
        return w_hat + (x - x.detach())  # straight-through, exactly w_hat

    def codes(self, x: Tensor) -> Tensor:
        _, half = self._nearest(self._rows(x))
        return from_rows(half // 2, x).to(torch.int32) + self.qmin

    def decode(self, codes: Tensor, context: Tensor | None = None) -> Tensor:
        cells = as_rows(codes.long() - self.qmin, self.codebook.shape[0])
        return from_rows(self._sorted().gather(1, cells), codes)

    # -----------------------------------------------------------------------------------------
    # Adaptation

    def _members(self, rows: Tensor, half: Tensor) -> Tensor:
        """Number and sum of the members of each half cell, [R, K, 2 halves, (n, t)], float64."""
        r, k = self.codebook.shape
        if r > 1:
            half = half + torch.arange(r, device=rows.device)[:, None] * (2 * k)
        return bin_members(rows, half, 2 * k * r).view(r, k, 2, 2)

    def _pinned(self, levels: Tensor) -> Tensor:
        """Zero in the middle, each side on its side and sorted."""
        zero = torch.zeros_like(levels[:, :1])
        low = levels[:, : self.zero_at].clamp_max(0)
        high = levels[:, self.zero_at + 1 :].clamp_min(0)
        return torch.cat([low.sort(1).values, zero, high.sort(1).values], 1).float()

    @torch.no_grad()
    def _observe(self, rows: Tensor, half: Tensor) -> None:
        """Count members; if adapting, move the levels towards their means."""
        halves = self._members(rows, half)
        n, t = halves.sum(2).unbind(-1)  # [R, K]
        idle = torch.where(n > 0, 0, self.idle + 1)
        if self.adapting:
            levels, count = self.codebook.double(), self.count.double()
            if self.form == "simple":
                moved = self.gamma * levels + (1 - self.gamma) * t / n.clamp_min(1)
                levels = torch.where(n > 0, moved, levels)
            else:
                total = self.gamma * levels * count + (1 - self.gamma) * t
                count = self.gamma * count + (1 - self.gamma) * n
                levels = torch.where(count > MIN_COUNT, total / count, levels)
            if self.dead_after is not None:
                dead = idle >= self.dead_after
                dead[:, self.zero_at] = False  # zero is pinned, not dead
                place, size = _facing_half(halves, levels)
                levels = torch.where(dead, place, levels)
                count = torch.where(dead, size, count)
                idle = torch.where(dead, 0, idle)
            self.codebook.copy_(self._pinned(levels))
            self.count.copy_(count)
        self.idle.copy_(idle)

    # -----------------------------------------------------------------------------------------

    def levels(self) -> Tensor:
        return self._sorted().detach()  # [1 or C_out, K]

    def thresholds(self) -> Tensor:
        return midpoints(self.levels()[0])

    def extra_bytes(self) -> int:
        return 4 * self.codebook.numel()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, levels={self.level_set}"

    def health(self) -> dict[str, Tensor]:
        """Levels without a member at the last forward in training, zero left out; and learned ones
        that crossed zero and are held there, where no gradient reaches them."""
        at, book = self.zero_at, self.codebook.detach()
        idle = torch.cat([self.idle[:, :at], self.idle[:, at + 1 :]], 1)
        found = {"dead_levels": (idle > 0).sum()}
        if self.adaptation == "gradient":
            found["clamped_levels"] = (book[:, :at] > 0).sum() + (book[:, at + 1 :] < 0).sum()
        return found


def _facing_half(halves: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """Where each level would go if dead: a centroid and its members, [R, K] each.

    Of the cells below and above, the one with more members gives its half that faces the level
    (the upper half of the one below); without members there, the level stays.
    Shape: halves [R, K, 2, 2] as `_members`; levels [R, K].
    """
    n = halves.sum(2)[..., 0]
    edge = torch.full_like(n[:, :1], -1)  # no neighbour
    below, above = torch.cat([edge, n[:, :-1]], 1), torch.cat([n[:, 1:], edge], 1)
    outside = torch.zeros_like(halves[:, :1, 0])
    upper_half = torch.cat([outside, halves[:, :-1, 1]], 1)
    lower_half = torch.cat([halves[:, 1:, 0], outside], 1)
    size, total = torch.where((below >= above)[..., None], upper_half, lower_half).unbind(-1)
    return torch.where(size > 0, total / size.clamp_min(1), levels), size
