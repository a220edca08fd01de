"""The bit-width policy that measures: bits by sensitivity, under a budget.

    Omega_l(b)   what layer l at b bits costs in loss                   (sensitivity.py)
    b_1..b_L     of least total Omega whose cost is within the budget   (allocate.py)

As HAWQ-V3 does it, and as ADQ's "sensitivity-informed" allocation is read here, whose definition is
not public. The bits are chosen once, from the float network, before training. The controls at the
same budget are `allocation: uniform` and `allocation: random`, and `metric: size`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from qexp.quant.allocate import BudgetKind, Method, allocate, operand_cost, tied
from qexp.quant.bitwidth import FirstLast, check_bits, check_first_last, format_bits, layer_bits
from qexp.quant.convert import Bits, QuantizerFactory
from qexp.quant.sensitivity import Omega, fisher, hutchinson, loss_increase, size_only
from qexp.quant.trace import Layer


class Sensitivity:
    """Bits by sensitivity, under a budget (`sensitivity.py` and `allocate.py` have the equations).

    Args:
        budget: in the unit of `budget_kind`.
        budget_kind: `average_bits` per weight, over the layers that get bits here; `bytes` of all
            layers' weight codes, packed, float weights at 4 bytes; `bops` of the whole network.
        candidates: weight bits to choose from.
        metric: `hutchinson`, `fisher`, `loss`, or `size` (needs no data).
        allocation: `ilp`, `greedy`, or the controls `random` and `uniform`.
        tie: give a shortcut's convolution the bits of its block's first one.
        act: `same` as the weights, or fixed activation bits.
        first_last: rule of the first and last layer; `same` allocates them too.
        seed: of the probes and of the random allocation.
        probes: Rademacher vectors of Hutchinson's estimate.
        images: how many training images the metric looks at.
        save: file that the bits are written to, for `Pattern`; null: none.
        name: of the policy, in results.

    Attributes:
        omega: Omega_l(b) by layer and bits, after `assign`; empty for the two controls.
    """

    def __init__(
        self,
        budget: float,
        budget_kind: BudgetKind = "average_bits",
        candidates: Sequence[int] = (2, 3, 4),
        metric: Literal["hutchinson", "fisher", "loss", "size"] = "hutchinson",
        allocation: Method = "ilp",
        tie: bool = True,
        act: int | Literal["same"] = "same",
        first_last: FirstLast = 8,
        seed: int = 0,
        probes: int = 50,
        images: int = 512,
        save: str | None = None,
        name: str = "sensitivity",
    ) -> None:
        if metric not in ("hutchinson", "fisher", "loss", "size"):
            raise ValueError(f"metric must be hutchinson, fisher, loss or size; got {metric!r}")
        if budget_kind not in ("average_bits", "bytes", "bops"):
            raise ValueError(
                f"budget_kind must be average_bits, bytes or bops; got {budget_kind!r}"
            )
        self.name, self.budget = name, budget
        self.budget_kind: BudgetKind = budget_kind
        self.candidates = tuple(sorted({check_bits(b, "a candidate") for b in candidates}))
        self.metric, self.tie = metric, tie
        self.allocation: Method = allocation
        self.act = None if act == "same" else check_bits(act, "activation bits")
        self.first_last: FirstLast = check_first_last(first_last)
        self.seed, self.probes, self.images, self.save = seed, probes, images, save
        self.omega: Omega = {}

    @property
    def needs_data(self) -> bool:
        """Whether `assign` needs the float model, images and labels."""
        return self.metric != "size" and self.allocation in ("ilp", "greedy")

    @property
    def sensitivity_by_layer(self) -> dict[str, float]:
        """Omega at the fewest bits, for layers.csv."""
        return {name: row[self.candidates[0]] for name, row in self.omega.items()}

    def assign(
        self,
        layers: Sequence[Layer],
        *,
        model: nn.Module | None = None,
        weight_factory: QuantizerFactory | None = None,
        images: Tensor | None = None,
        labels: Tensor | None = None,
        **context: Any,
    ) -> dict[str, Bits]:
        """Bits by layer name, within the budget.

        Args:
            model: float network in the device and dtype to measure in.
            weight_factory: makes the weight quantizers of the run.
            images, labels: [N, C, H, W], [N]; the first `images` of them are used.
        """
        free = [x for x in layers if x.position == "inner" or self.first_last == "same"]
        if self.allocation in ("ilp", "greedy"):
            self.omega = self._measure(free, model, weight_factory, images, labels)
        cost = {x.name: {b: self._cost(x, self._pair(b)) for b in self.candidates} for x in free}
        fixed = {
            x.name: layer_bits(x, self._pair(self.candidates[0]), self.first_last)
            for x in layers
            if x.name not in cost
        }
        budget = self.budget * sum(x.weights for x in free)
        if self.budget_kind != "average_bits":
            budget = self.budget - sum(
                self._cost(x, fixed[x.name]) for x in layers if x.name in fixed
            )
        chosen = allocate(
            cost,
            budget,
            omega=self.omega or None,
            groups=tied(free) if self.tie else None,
            method=self.allocation,
            seed=self.seed,
        )
        bits = {
            x.name: fixed[x.name] if x.name in fixed else self._pair(chosen[x.name]) for x in layers
        }
        if self.save:
            Path(self.save).write_text(format_bits(bits))
        return bits

    def _pair(self, bits: int) -> Bits:
        return Bits(bits, bits if self.act is None else self.act)

    def _cost(self, layer: Layer, bits: Bits) -> int:
        return operand_cost(layer, bits.weight, bits.act, self.budget_kind)

    def _measure(
        self,
        layers: Sequence[Layer],
        model: nn.Module | None,
        weight_factory: QuantizerFactory | None,
        images: Tensor | None,
        labels: Tensor | None,
    ) -> Omega:
        if self.metric == "size":
            return size_only(layers, self.candidates)
        if model is None or weight_factory is None or images is None or labels is None:
            raise ValueError(
                f"metric={self.metric} needs the float model, its weight quantizer, images and "
                "labels; metric=size needs none"
            )
        x, y = images[: self.images], labels[: self.images]
        if self.metric == "hutchinson":
            return hutchinson(
                model,
                layers,
                weight_factory,
                self.candidates,
                x,
                y,
                probes=self.probes,
                seed=self.seed,
            )
        measure = fisher if self.metric == "fisher" else loss_increase
        return measure(model, layers, weight_factory, self.candidates, x, y)
