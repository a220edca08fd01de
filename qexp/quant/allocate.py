"""Bits under a budget: which layer gets how many, given Omega_l(b) and a cost.

    minimise  sum_l Omega_l(b_l)    subject to    sum_l cost_l(b_l) <= budget         (HAWQ-V3)

  ilp      the optimum: one binary variable for each layer and candidate, by `scipy.optimize.milp`
  greedy   from the fewest bits up, the next candidate always to the layer with the largest fall of
           Omega for its cost, until nothing that helps fits
  random   control at the same budget: from the fewest bits up, the next candidate to a layer drawn
           at random, until nothing fits
  uniform  control: the most bits that all layers can have alike

Layers that must agree form a group and count as one. A shortcut's convolution is tied to the first
convolution of its block: both read the same tensor, so one quantized input can serve both.

Costs are integers and the budget is compared exactly: no allocation ever exceeds it.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Literal, NamedTuple

from qexp.quant.trace import Layer

Cost = Mapping[str, Mapping[int, int]]  # by layer name and bits
BudgetKind = Literal["average_bits", "bytes", "bops"]
Method = Literal["ilp", "greedy", "random", "uniform"]

# torchvision ResNet `layer2.0.downsample.0` and RegNet `block1-0.proj.0`; ours `shortcut`.
SHORTCUT = re.compile(r"(?P<block>.+)\.(downsample(\..+)?|shortcut(\..+)?|proj\.0)")


def operand_cost(layer: Layer, w_bits: int, a_bits: int, kind: BudgetKind) -> int:
    """What a layer takes of the budget: weight bits, bytes of packed codes, or BOPs."""
    if kind == "average_bits":
        return layer.weights * w_bits
    if kind == "bytes":
        return math.ceil(layer.weights * w_bits / 8)
    return layer.macs * w_bits * a_bits


def tied(layers: Sequence[Layer]) -> list[tuple[str, ...]]:
    """Groups of layers that get the same bits, in execution order, singletons included."""
    by_name = {layer.name: SHORTCUT.fullmatch(layer.name) for layer in layers}
    partner: dict[str, str] = {}
    for name, match in by_name.items():
        if match is None:
            continue
        siblings = (
            n for n, m in by_name.items() if m is None and n.startswith(match["block"] + ".")
        )
        first = next(siblings, None)
        if first is not None:
            partner[name] = first
    shortcuts: dict[str, list[str]] = {}
    for name, first in partner.items():
        shortcuts.setdefault(first, []).append(name)
    return [(n, *shortcuts.get(n, ())) for n in by_name if n not in partner]


class _Choice(NamedTuple):
    """A group of layers and what each of its candidates costs and harms, fewest bits first."""

    names: tuple[str, ...]
    bits: tuple[int, ...]
    cost: tuple[int, ...]
    omega: tuple[float, ...]


def allocate(
    cost: Cost,
    budget: float | Fraction,
    *,
    omega: Mapping[str, Mapping[int, float]] | None = None,
    groups: Sequence[Sequence[str]] | None = None,
    method: Method = "ilp",
    seed: int = 0,
) -> dict[str, int]:
    """Bits by layer name.

    Args:
        cost: of every layer at every candidate, in the budget's unit.
        omega: harm of the same; `random` and `uniform` do not read it.
        groups: layers that get the same bits, every layer in exactly one; default: each alone.
        seed: of `random`.

    Raises:
        ValueError: if the fewest bits already exceed the budget.
    """
    choices = []
    for group in groups if groups is not None else [(name,) for name in cost]:
        bits = tuple(sorted(cost[group[0]]))
        total = tuple(sum(cost[n][b] for n in group) for b in bits)
        harm = tuple(sum(omega[n][b] for n in group) if omega else 0.0 for b in bits)
        choices.append(_Choice(tuple(group), bits, total, harm))
    least = sum(c.cost[0] for c in choices)
    limit = math.floor(budget)
    if least > limit:
        raise ValueError(
            f"the fewest bits cost {least}, more than the budget of {limit}; raise budget or add a "
            "smaller candidate"
        )
    if method == "ilp":
        picked = _ilp(choices, limit)
    elif method == "greedy":
        picked = _greedy(choices, limit)
    elif method == "random":
        picked = _random(choices, limit, seed)
    elif method == "uniform":
        picked = _uniform(choices, limit)
    else:
        raise ValueError(f"allocation must be ilp, greedy, random or uniform; got {method!r}")
    return {n: c.bits[k] for c, k in zip(choices, picked, strict=True) for n in c.names}


def _ilp(choices: Sequence[_Choice], limit: int) -> list[int]:
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp

    owner = np.repeat(np.arange(len(choices)), [len(c.bits) for c in choices])
    cost = np.array([v for c in choices for v in c.cost], dtype=np.int64)
    harm = np.array([v - min(c.omega) for c in choices for v in c.omega])
    # The solver's tolerances are absolute (1e-6): small integer costs, harms up to 1e4.
    unit = max(1, int(np.gcd.reduce(cost)))
    harm *= 1e4 / (harm.max() or 1.0)
    one_each = (owner == np.arange(len(choices))[:, None]).astype(float)
    room = limit // unit
    while True:
        solution = milp(
            harm,
            integrality=np.ones(len(cost)),
            bounds=Bounds(0, 1),
            constraints=[
                LinearConstraint(one_each, 1, 1),
                LinearConstraint((cost // unit)[None].astype(float), -np.inf, room),
            ],
            options={"mip_rel_gap": 0.0},
        )
        if solution.x is None:
            raise RuntimeError(f"the integer programme was not solved: {solution.message}")
        picked = [int(np.argmax(solution.x[owner == i])) for i in range(len(choices))]
        excess = sum(c.cost[k] for c, k in zip(choices, picked, strict=True)) - limit
        if excess <= 0:
            return picked
        room -= math.ceil(excess / unit)  # rounding let it slip over the edge: ask for less


def _greedy(choices: Sequence[_Choice], limit: int) -> list[int]:
    picked = [0] * len(choices)
    room = limit - sum(c.cost[0] for c in choices)
    while True:
        best, best_rate = None, 0.0
        for i, (c, k) in enumerate(zip(choices, picked, strict=True)):
            if k + 1 == len(c.bits) or c.cost[k + 1] - c.cost[k] > room:
                continue
            rate = (c.omega[k] - c.omega[k + 1]) / max(1, c.cost[k + 1] - c.cost[k])
            if rate > best_rate:
                best, best_rate = i, rate
        if best is None:
            return picked
        c, k = choices[best], picked[best]
        room -= c.cost[k + 1] - c.cost[k]
        picked[best] += 1


def _random(choices: Sequence[_Choice], limit: int, seed: int) -> list[int]:
    draw = random.Random(seed)
    picked = [0] * len(choices)
    room = limit - sum(c.cost[0] for c in choices)
    while True:
        fits = [
            i
            for i, (c, k) in enumerate(zip(choices, picked, strict=True))
            if k + 1 < len(c.bits) and c.cost[k + 1] - c.cost[k] <= room
        ]
        if not fits:
            return picked
        i = draw.choice(fits)
        room -= choices[i].cost[picked[i] + 1] - choices[i].cost[picked[i]]
        picked[i] += 1


def _uniform(choices: Sequence[_Choice], limit: int) -> list[int]:
    best = 0
    for k in range(min(len(c.bits) for c in choices)):
        if sum(c.cost[k] for c in choices) <= limit:
            best = k
    return [best] * len(choices)
