"""What a reconstruction learns (the method), and for how long (the schedule).

          granularity  quantized_inputs  steps   drop  mix
nearest   none
AdaRound  layer        false             fixed   0     0
BRECQ     block        false             after   0     0
QDrop     block        true              joint   0.5   0.5
AQuant    block        true              joint   0.5   0.5    and its borders, joint
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

When = Literal["joint", "after", "both", "fixed"]


@dataclass(frozen=True)
class Method:
    """What is learned, and from what.

    Attributes:
        granularity: parts that are learned one by one: `none`, `layer` or `block`.
        quantized_inputs: activations are quantized while the rounding is learned.
        steps: activation steps are learned with the rounding (`joint`), in a second pass over all
            units (`after`), in `both`, or stay as calibrated (`fixed`).
        step_inputs: what that second pass learns from: a unit's input in the quantized network so
            far (`prefix`), or in the float network (`float`, the released BRECQ).
        borders: the same for what else activation quantizers learn (AQuant).
        drop: probability that an element of a layer's input is left in float.
        mix: probability that an element of a unit's input is the float network's.
        biases: when the layers' biases are learned, in the words of `steps`.
        bias_lr: their rate; 0: they stay.
        network: at the end all of these that are learned at all are learned once more, together,
            from the output of the network.
        fisher: weight the error by the gradient of the network's output (BRECQ eq. 10).
        bias_correction: at the end, set each layer's bias so that its mean output is the float one.
        correction_inputs: while that mean is taken, inputs are `quantized`, or `float`: then what
            the weights alone shift is corrected (bias.py).

    Raises:
        ValueError: a probability outside [0, 1], or a negative rate.
    """

    granularity: Literal["none", "layer", "block"] = "block"
    quantized_inputs: bool = True
    steps: When = "joint"
    step_inputs: Literal["prefix", "float"] = "prefix"
    borders: When = "joint"
    drop: float = 0.5
    mix: float = 0.5
    biases: When = "joint"
    bias_lr: float = 0.0
    network: bool = False
    fisher: bool = False
    bias_correction: bool = False
    correction_inputs: Literal["quantized", "float"] = "quantized"

    def __post_init__(self) -> None:
        for name in ("drop", "mix"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        if not 0 <= self.bias_lr < math.inf:
            raise ValueError(f"bias_lr must be finite and >= 0, got {self.bias_lr}")


@dataclass(frozen=True)
class Schedule:
    """How long and how fast.

    Attributes:
        iterations: minibatches a unit in the first pass.
        step_iterations: in each further pass.
        minibatch: images an iteration.
        lr: Adam's rate by name of parameter (`rounding`, `scale`, `border`, `mixing`).
        step_lr: rate of `scale` in the further passes.
        step_p: exponent of the error in the second pass.
        penalty: factor of the rounding regulariser.
        beta: its exponent, first and last.
        warmup: fraction of the iterations without regulariser.
    """

    iterations: int = 20000
    step_iterations: int = 5000
    minibatch: int = 32
    lr: Mapping[str, float] = field(
        default_factory=lambda: {"rounding": 1e-3, "scale": 4e-5, "border": 1e-3, "mixing": 1e-3}
    )
    step_lr: float = 4e-4
    step_p: float = 2.4
    penalty: float = 0.01
    beta: Sequence[float] = (20.0, 2.0)
    warmup: float = 0.2


class Pass(NamedTuple):
    """One sweep over all units: what it learns, and how.

    Attributes:
        name: `rounding`; `steps`, the second one, whatever it learns; `network`, over all units
            at once.
        learned: names of the parameters.
        inputs: activations are quantized.
        iterations: minibatches a unit.
        lr: rates by name of parameter.
        p: exponent of the error.
    """

    name: str
    learned: frozenset[str]
    inputs: bool
    iterations: int
    lr: Mapping[str, float]
    p: float


def passes(method: Method, schedule: Schedule) -> list[Pass]:
    """The sweeps of a method: none, or the rounding and, where it has some, what is learned after.

    What is `joint` needs quantized inputs, but for biases; without them it moves to the second.
    """
    if method.granularity == "none":
        return []
    others = set(schedule.lr) - {"rounding", "scale"}
    biases = method.biases if method.bias_lr > 0 else "fixed"
    when = {"scale": method.steps, "bias": biases} | dict.fromkeys(others, method.borders)
    early = {k for k, w in when.items() if w in ("joint", "both")}
    joint = early if method.quantized_inputs else early & {"bias"}
    late = {k for k, w in when.items() if w in ("after", "both")} | early - joint
    first = Pass(
        name="rounding",
        learned=frozenset(joint | {"rounding"}),
        inputs=method.quantized_inputs,
        iterations=schedule.iterations,
        lr={**schedule.lr, "bias": method.bias_lr},
        p=2.0,
    )
    second = Pass(
        name="steps",
        learned=frozenset(late),
        inputs=True,
        iterations=schedule.step_iterations,
        lr={**schedule.lr, "scale": schedule.step_lr, "bias": method.bias_lr},
        p=schedule.step_p,
    )
    ever = frozenset(k for k, w in when.items() if w != "fixed") if method.network else frozenset()
    last = second._replace(name="network", learned=ever, p=2.0)
    return [first, *(sweep for sweep in (second, last) if sweep.learned)]
