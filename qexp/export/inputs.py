"""Activation quantizers in a file: a fixed table of kinds, their keywords, their tensors.

Inputs are quantized at run time, so a file holds what the quantizer needs for that, under the
quantizer's own names; docs/format.md has each kind's equations. Buffers that only training reads
are left out. ASQ's adapter is one vector, `adapter`: its parameters in order, row by row. A file
may hold it in float16, which is read back as float32: the one choice here that is not exact.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qexp.errors import ConfigError
from qexp.quant.additive import APoTActivation
from qexp.quant.aquant import DEGREE, AQuant
from qexp.quant.asq import ASQ
from qexp.quant.dorefa import PACT, DoReFaActivation
from qexp.quant.lsq import LSQ, LSQPlus
from qexp.quant.n2uq import N2UQ
from qexp.quant.nearest import Nearest
from qexp.quant.quantizer import Quantizer

ADAPTER = "adapter"  # the only name that may be stored in ADAPTER_DTYPES
ADAPTER_DTYPES = {"float32": torch.float32, "float16": torch.float16}


@dataclass(frozen=True)
class Input:
    """An activation quantizer without its tensors: what the layers of a network share."""

    kind: str
    bits: int
    signed: bool
    keywords: Mapping[str, Any] = field(default_factory=dict)


class Kind(NamedTuple):
    """A class, the keywords that inference needs, and the state names that are stored."""

    cls: type[Quantizer]
    keywords: Callable[[Any], dict[str, Any]]
    stored: Callable[[Any], tuple[str, ...]]


def _asq_keywords(q: ASQ) -> dict[str, Any]:
    keywords = {"factor": q.factor, "dequantize": q.dequantize}
    if q.adapter is None:
        return keywords
    channels = q.shape[0]
    # Any reduction that gives the same hidden width; none of them: a single layer.
    hidden = len(q.adapter[0].bias) if len(q.adapter) > 1 else 1  # type: ignore[arg-type]
    leak = {"leak": q.leak} if q.leak and len(q.adapter) > 1 else {}
    return keywords | {"reduction": channels // hidden} | leak


def _asq_stored(q: ASQ) -> tuple[str, ...]:
    adapter = () if q.adapter is None else (ADAPTER,)
    return ("scale", *adapter, *(("mean_abs",) if q.factor == "statistics" else ()))


def _aquant_keywords(q: AQuant) -> dict[str, Any]:
    border = {degree + 1: name for name, degree in DEGREE.items()}[q.border.shape[0]]
    squash = {"squash": q.squash} if q.squash != "clip" else {}
    return {"border": border, "per": q.per, "fusion": q.fusion} | squash


def _aquant_stored(q: AQuant) -> tuple[str, ...]:
    zero = ("zero",) if q.signed else ()
    return ("scale", *zero, "border", *(("mixing",) if q.fusion != "none" else ()))


def _no_keywords(q: Quantizer) -> dict[str, Any]:
    return {}


def _just(*names: str) -> Callable[[Any], tuple[str, ...]]:
    return lambda q: names


KINDS: dict[str, Kind] = {
    "lsq": Kind(LSQ, _no_keywords, _just("scale")),
    "lsqplus": Kind(LSQPlus, _no_keywords, _just("scale", "offset")),
    "asq": Kind(ASQ, _asq_keywords, _asq_stored),
    "n2uq": Kind(N2UQ, _no_keywords, _just("start", "lengths", "input_scale", "output_scale")),
    "pact": Kind(PACT, _no_keywords, _just("alpha")),
    "dorefa": Kind(DoReFaActivation, _no_keywords, _just("scale")),
    "apot": Kind(APoTActivation, lambda q: {"additive": q.additive}, _just("scale")),
    "nearest": Kind(
        Nearest,
        lambda q: {"symmetric": q.symmetric},
        lambda q: ("scale", "zero") if q.signed and not q.symmetric else ("scale",),
    ),
    "aquant": Kind(AQuant, _aquant_keywords, _aquant_stored),
}


def describe(
    quantizer: Quantizer, name: str, adapters: torch.dtype = torch.float32
) -> tuple[Input, dict[str, Tensor]]:
    """`(input, tensors)` of a calibrated activation quantizer, adapters in a dtype of their own.

    Raises:
        ConfigError: its class has no packed form.
    """
    for word, kind in KINDS.items():
        if type(quantizer) is kind.cls:
            keywords = kind.keywords(quantizer)
            state = _flat(quantizer)
            tensors = {n: _stored(n, state[n], quantizer.bits) for n in kind.stored(quantizer)}
            if ADAPTER in tensors:
                tensors[ADAPTER] = tensors[ADAPTER].to(adapters)
                if not bool(tensors[ADAPTER].isfinite().all()):
                    raise ConfigError(
                        f"export: the adapter of layer '{name}' is beyond {adapters}. Use "
                        "adapters=float32."
                    )
            return Input(word, quantizer.bits, quantizer.signed, keywords), tensors
    raise ConfigError(
        f"export: layer '{name}' has inputs of {type(quantizer).__name__}, which has no packed "
        "form. Add it to qexp.export.inputs.KINDS."
    )


def _flat(quantizer: Quantizer) -> dict[str, Tensor]:
    """The quantizer's state, its adapter as one vector."""
    state = quantizer.state_dict()
    if isinstance(quantizer, ASQ) and quantizer.adapter is not None:
        parameters = quantizer.adapter.parameters()
        state[ADAPTER] = nn.utils.parameters_to_vector(parameters).detach()
    return state


def _apart(adapter: nn.Module, vector: Tensor) -> dict[str, Tensor]:
    """Undo `_flat`: the parameters in `vector`, float32, by their names in the state."""
    shapes = {name: p.shape for name, p in adapter.named_parameters()}
    parts = vector.float().split([shape.numel() for shape in shapes.values()])
    return {
        f"{ADAPTER}.{name}": part.reshape(shape)
        for (name, shape), part in zip(shapes.items(), parts, strict=True)
    }


def _stored(name: str, value: Tensor, bits: int) -> Tensor:
    if name == "zero":
        return value.cpu().to(torch.int8 if bits <= 8 else torch.int16)
    return value.detach().float().cpu().clone()


def make(entry: Input, shape: Sequence[int]) -> Quantizer:
    """The quantizer of `entry`, uncalibrated, for a layer with the receptive field `shape`.

    Raises:
        ValueError, TypeError: its class refuses bits or keywords.
    """
    kind = KINDS[entry.kind]
    quantizer = kind.cls(entry.bits, signed=entry.signed, shape=tuple(shape), **entry.keywords)
    if kind.keywords(quantizer) != dict(entry.keywords):
        raise ValueError(f"keywords of an input of kind {entry.kind} are not {entry.keywords}")
    return quantizer


def state(entry: Input, quantizer: Quantizer, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The whole state of `quantizer`: stored tensors, and its own buffers where none is stored.

    Raises:
        ValueError: other tensors are stored than this kind has.
    """
    names = KINDS[entry.kind].stored(quantizer)
    if set(names) != set(tensors):
        raise ValueError(f"an input of kind {entry.kind} has {', '.join(names)}")
    zero = tensors.get("zero")
    if zero is not None:
        low, high = quantizer.qmin, quantizer.qmax
        if zero.dtype not in (torch.int8, torch.int16) or zero.numel() != 1:
            raise ValueError("a zero point is one int8 or int16")
        if not low <= int(zero) <= high:
            raise ValueError(f"a zero point of {int(zero)} is outside {low} to {high}")
    stored = {n: t.float() if n == "zero" else t for n, t in tensors.items()}
    if ADAPTER in stored:
        assert isinstance(quantizer, ASQ)
        assert quantizer.adapter is not None
        if not stored[ADAPTER].is_floating_point():
            raise ValueError("an adapter is not of integers")
        stored |= _apart(quantizer.adapter, stored.pop(ADAPTER))
    own = {n: t for n, t in quantizer.state_dict().items() if n not in stored}
    # A zero point that is not stored is 0; the quantizer may have been built without storage.
    own = {n: torch.zeros(t.shape) if t.is_meta else t for n, t in own.items()}
    own["calibrated"] = torch.tensor(True)
    return {**own, **stored}
