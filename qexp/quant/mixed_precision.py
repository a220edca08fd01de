"""The bit-width policy that measures: bits by sensitivity, under a budget.

    Omega_l(b)   what layer l at b bits costs in loss                   (sensitivity.py)
    b_1..b_L     of least total Omega whose cost is within the budget   (allocate.py)

As HAWQ-V3 does it, and as ADQ's "sensitivity-informed" allocation is read here, whose definition is
not public. The bits are chosen once, from the float network, before training. The controls at the
same budget are `allocation: uniform` and `allocation: random`, and `metric: size`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from qexp.errors import RunError
from qexp.quant.allocate import BudgetKind, Method, allocate, operand_cost, tied
from qexp.quant.bitwidth import (
    FirstLast,
    Policy,
    check_bits,
    check_first_last,
    format_bits,
    layer_bits,
)
from qexp.quant.convert import Bits, QuantizerFactory
from qexp.quant.sensitivity import (
    Omega,
    check_second_derivatives,
    fisher,
    hutchinson,
    loss_increase,
    size_only,
)
from qexp.quant.trace import Layer

UNITS = {
    "average_bits": "bits a weight",
    "bytes": "bytes of codes, first and last layer included",
    "bops": "BOPs of the whole network",
}


class Sensitivity(Policy):
    """Bits by sensitivity, under a budget (`sensitivity.py` and `allocate.py` have the equations).

    Args:
        budget: in the unit of `budget_kind`.
        budget_kind: `average_bits` per weight, over the layers that get bits here; `bytes` of all
            layers' weight codes, packed, float weights at 4 bytes; `bops` of the whole network.
        candidates: weight bits to choose from.
        metric: `hutchinson`, `fisher`, `loss`, or `size` (needs no data).
        allocation: `ilp`, `greedy`, or the controls `random` and `uniform`.
        tie: give a shortcut's convolution (`allocate.SHORTCUT`: named shortcut, downsample or
            proj) the bits of its block's first one.
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
        if not self.candidates or 32 in self.candidates:
            raise ValueError(f"candidates must be widths from 1 to 16; got {list(candidates)}")
        if budget_kind == "average_bits" and budget > self.candidates[-1]:
            raise ValueError(
                f"budget={budget:g} bits a weight is above the largest of candidates "
                f"{list(self.candidates)}; lower it, or add a width"
            )
        if probes < 1 or images < 1:
            raise ValueError(f"probes and images must be at least 1; got {probes} and {images}")
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
    def sensitivity_by_layer(self) -> dict[str, float]:  # type: ignore[override]
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
        free = self._free(layers)
        if self.allocation in ("ilp", "greedy"):
            self.omega = self._measure(free, model, weight_factory, images, labels)
        chosen = self._allocate(layers, self.allocation)
        fixed = self._fixed(layers)
        bits = {x.name: fixed.get(x.name) or self._pair(chosen[x.name]) for x in layers}
        if self.save:
            Path(self.save).write_text(format_bits(bits))
        return bits

    def nominal(self, layers: Sequence[Layer], bits: int) -> dict[str, Bits]:
        """`bits` for the weights, and what the inputs get beside them."""
        return {x.name: layer_bits(x, self._pair(bits), self.first_last) for x in layers}

    def possible(self, layers: Sequence[Layer], epochs: int) -> list[dict[str, Bits]]:
        """A table for each candidate."""
        return [self.nominal(layers, bits) for bits in self.candidates]

    def check(self, layers: Sequence[Layer], weight_factory: QuantizerFactory) -> None:
        """What can be found wrong without data; writes nothing.

        Raises:
            ValueError: no layer to choose bits for, a budget below the fewest bits, weights whose
                levels do not fit the bits that the budget counts, or no folder to save in.
        """
        self._allocate(layers, "uniform")
        shape = self._free(layers)[0].weight_shape
        for b in self.candidates:
            quantizer = weight_factory(bits=b, signed=True, shape=shape)
            if quantizer.num_levels > 2**b:
                raise ValueError(
                    f"{type(quantizer).__name__} has {quantizer.num_levels} levels at {b} bits, "
                    "which a budget does not count; use bitwidth=uniform or another "
                    "quantizer/weight"
                )
        if self.save and not Path(self.save).parent.is_dir():
            raise ValueError(f"save={self.save}: there is no folder {Path(self.save).parent}")
        if self.save and Path(self.save).is_dir():
            raise ValueError(f"save={self.save} is a folder; give the name of a file")

    def check_metric(self, layers: Sequence[Layer], model: nn.Module, images: Tensor) -> None:
        """What the metric cannot measure of a network, found on any images, [N, C, H, W].

        Raises:
            ValueError: second derivatives that it needs and torch does not have.
        """
        if self.needs_data and self.metric == "hutchinson":
            check_second_derivatives(model, self._free(layers), images)

    def _free(self, layers: Sequence[Layer]) -> list[Layer]:
        free = [x for x in layers if x.position == "inner" or self.first_last == "same"]
        if not free:
            raise ValueError(
                "no layer lies between the first and the last, so there are no bits to choose; use "
                "bitwidth.first_last=same or bitwidth=uniform"
            )
        return free

    def _fixed(self, layers: Sequence[Layer]) -> dict[str, Bits]:
        """The bits of the layers that are not chosen."""
        names, own = {x.name for x in self._free(layers)}, self._pair(self.candidates[0])
        return {x.name: layer_bits(x, own, self.first_last) for x in layers if x.name not in names}

    def _allocate(self, layers: Sequence[Layer], method: Method) -> dict[str, int]:
        """Weight bits of the free layers within the budget."""
        free, fixed = self._free(layers), self._fixed(layers)
        cost = {x.name: {b: self._cost(x, self._pair(b)) for b in self.candidates} for x in free}
        outside, per_weight = 0, sum(x.weights for x in free)
        if self.budget_kind != "average_bits":
            outside = sum(self._cost(x, fixed[x.name]) for x in layers if x.name in fixed)
            per_weight = 1
        # Exactly the decimal that was given: 2.3 * 100 is a float below 230.
        budget = Fraction(str(self.budget)) * per_weight - outside
        least = sum(min(own.values()) for own in cost.values())
        if least > budget:
            fewest = f"{(least + outside) / per_weight:.6g} {UNITS[self.budget_kind]}"
            raise ValueError(
                f"the fewest bits cost {fewest}, more than the budget of {self.budget:.6g}; raise "
                "budget or add a smaller candidate"
            )
        return allocate(
            cost,
            budget,
            omega=self.omega or None,
            groups=tied(free) if self.tie else None,
            method=method,
            seed=self.seed,
        )

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
        given = (model, layers, weight_factory, self.candidates, x, y)
        if self.metric == "hutchinson":
            omega = hutchinson(*given, probes=self.probes, seed=self.seed)
        else:
            omega = (fisher if self.metric == "fisher" else loss_increase)(*given)
        for name, row in omega.items():
            if not all(math.isfinite(value) for value in row.values()):
                raise RunError(
                    f"run: the sensitivity of layer '{name}' is not finite ({self.metric}). Is the "
                    "float network sound? bitwidth.metric=size looks at no data."
                )
        return omega
