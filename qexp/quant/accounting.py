"""What a quantized network costs: levels, bits, bytes, operations.

One rule for every method, so that rows of a table can be compared:

  Bits      An operand costs its quantizer's `effective_bits`: `bits`, or log2(levels) for a grid
            that overflows them (five levels cost 2.32 bits). A float operand costs 32.
  Averages  Three of the weights, because papers print one without saying which: by parameter and
            by layer over the quantized inner layers (an operand such a layer keeps in float counts
            32), and by parameter over all layers with first, last and float ones. Activations: by
            layer, over the quantized inner layers.
  Others    Weights in no layer that `trace` lists (recurrent and one-dimensional layers, attention
            that models/opened.py leaves as it is) stay in float: 32 bits in the average over all
            layers; their work is in no count.
  Size      What a file holds. Codes take whole bits, ceil(log2(levels)) each, packed layer by
            layer into whole bytes; then every quantizer's `extra_bytes` (steps, codebooks,
            adapters, borders, of weights and of inputs), and at 4 bytes an element every other
            floating tensor of the state: float weights, biases, and batch norm as it is stored,
            four vectors (folding it would leave one bias); tensors of integers, bool and float64
            at their own size. Not counted: `num_batches_tracked`, which inference does not read,
            and tensors that are not in the state_dict.
  Ideal     bits * weights / 8, rounded up: what a size quoted in a paper often is.
  MACs      Of layers alone. The two products of attention, q k^T and weights v, multiply float
            activations and no weight; they are in no count.
  BOPs      sum over layers of macs * w_bits * a_bits, for one sample (HAWQ-V3). What quantizers
            compute themselves (thresholds, adapters, a border for each row) is in no count; what
            it costs in time is measured (`qexp bench inference`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from qexp.quant.modules import QUANT_LAYERS
from qexp.quant.quantizer import Identity, Quantizer
from qexp.quant.trace import Layer

FLOAT_BITS = 32
FLOAT_BYTES = 4


@dataclass(frozen=True)
class LayerAccount:
    """One layer's line of layers.csv; None where a column does not apply.

    Attributes:
        w_bits, a_bits: effective bits of the operands, 32 for float.
        signed: whether the layer's input has negative values.
        levels_used: distinct values in the quantized weight; with one grid per output channel, in
            the channel that has most. None for a float or not yet calibrated weight.
        macs: multiply-accumulates for one sample.
        size_bytes: packed codes (or float weights), bias, and both quantizers' extra bytes.
        sqnr_db: 10 log10(sum w^2 / sum (w - w_hat)^2), decibels.
        sensitivity: as the bit-width policy measured it, in its own unit.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    w_bits: float
    a_bits: float
    signed: bool
    levels_used: int | None
    weights: int
    macs: int
    size_bytes: int
    sqnr_db: float | None
    sensitivity: float | None
    position: str

    @property
    def quantized(self) -> bool:
        """Whether at least one operand is quantized."""
        return min(self.w_bits, self.a_bits) < FLOAT_BITS


COLUMNS = tuple(f.name for f in fields(LayerAccount) if f.name != "position")


@dataclass(frozen=True)
class Account:
    """Totals of a network, and its layers in execution order (module docstring for the rules).

    Attributes:
        other_weights: number of weights by name, of those that no layer here has.
    """

    layers: tuple[LayerAccount, ...]
    weight_by_param: float
    weight_by_layer: float
    weight_with_outer: float
    act_by_layer: float
    size_bytes: int
    ideal_bytes: int
    fp32_bytes: int
    macs: int
    bops: int
    other_weights: Mapping[str, int]

    @property
    def bits(self) -> dict[str, float]:
        """The averages, as result.json names them."""
        return {
            "weight_by_param": self.weight_by_param,
            "weight_by_layer": self.weight_by_layer,
            "weight_with_outer": self.weight_with_outer,
            "act_by_layer": self.act_by_layer,
        }

    def summary(self) -> dict[str, Any]:
        """The totals, as result.json names them."""
        totals = ("size_bytes", "ideal_bytes", "fp32_bytes", "macs", "bops")
        found = {"bits": self.bits, **{name: getattr(self, name) for name in totals}}
        return found | ({"other_weights": dict(self.other_weights)} if self.other_weights else {})

    def csv_lines(self) -> list[str]:
        """layers.csv: a header and one line a layer, empty where a column does not apply."""
        rows = [",".join(_cell(getattr(layer, c)) for c in COLUMNS) for layer in self.layers]
        return [",".join(COLUMNS), *rows]


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, tuple):
        return "x".join(map(str, value))
    return str(value)


def account(
    model: nn.Module, layers: Sequence[Layer], sensitivity: Mapping[str, float] | None = None
) -> Account:
    """What `model` costs, float or quantized, calibrated or not.

    Args:
        model: the network, after `quantize_` or before.
        layers: `trace(model, ...)` of its float form.
        sensitivity: by layer name, for the column of that name.
    """
    counted: set[int] = set()
    rows = tuple(
        _account_layer(model, layer, (sensitivity or {}).get(layer.name), counted)
        for layer in layers
    )
    inner = [r for r in rows if r.position == "inner"] or list(rows)
    quantized = [r for r in inner if r.quantized]
    everything = _state_bytes(model)
    in_layers = _float_bytes((t for r in rows for t in _tensors(model, r.name)), set())
    others = other_weights(model, [row.name for row in rows])
    return Account(
        layers=rows,
        weight_by_param=_mean(quantized, by_param=True),
        weight_by_layer=_mean(quantized, by_param=False),
        weight_with_outer=_mean(rows, by_param=True, in_float=sum(others.values())),
        act_by_layer=sum(r.a_bits for r in quantized) / len(quantized) if quantized else FLOAT_BITS,
        size_bytes=sum(r.size_bytes for r in rows) + everything - in_layers,
        ideal_bytes=math.ceil(sum(r.w_bits * r.weights for r in rows) / 8),
        fp32_bytes=everything,
        macs=sum(r.macs for r in rows),
        bops=round(sum(r.macs * r.w_bits * r.a_bits for r in rows)),
        other_weights=others,
    )


def other_weights(model: nn.Module, names: Sequence[str]) -> dict[str, int]:
    """Number of weights by name, of those that multiply in no layer of `names`: they stay in float.

    Weights of recurrent, transposed and one-dimensional layers, of attention that calls none, of
    functional calls; tables of positions too. A vector (a gain a channel) is none.
    """
    known = {id(tensor) for name in names for tensor in _tensors(model, name)}
    owned = tuple(f"{n}." for n, m in model.named_modules() if isinstance(m, Quantizer))
    return {
        name: parameter.numel()
        for name, parameter in model.named_parameters()
        if id(parameter) not in known
        and not name.startswith(owned)
        and sum(size > 1 for size in parameter.shape) > 1
    }


def _mean(rows: Sequence[LayerAccount], *, by_param: bool, in_float: int = 0) -> float:
    """Average weight bits, with `in_float` more weights of 32 bits; 32 of no layers."""
    counts = [r.weights if by_param else 1 for r in rows]
    if not sum(counts):
        return float(FLOAT_BITS)
    quantized = sum(r.w_bits * count for r, count in zip(rows, counts, strict=True))
    return (quantized + FLOAT_BITS * in_float) / (sum(counts) + in_float)


def _account_layer(
    model: nn.Module, layer: Layer, sensitivity: float | None, counted: set[int]
) -> LayerAccount:
    """A layer's line; float tensors in `counted` are stored elsewhere, and this one's join it."""
    module = model.get_submodule(layer.name)
    weight, *bias = _tensors(model, layer.name)
    w_bits = a_bits = float(FLOAT_BITS)
    size = _float_bytes(bias, counted)
    levels_used = sqnr = None
    in_float = True
    if isinstance(module, QUANT_LAYERS):
        wq, aq = module.weight_quantizer, module.act_quantizer
        w_bits, a_bits = wq.effective_bits, aq.effective_bits
        in_float = isinstance(wq, Identity)
        if not in_float:
            size += packed_bytes(weight.numel(), wq.num_levels)
            levels_used, sqnr = _weight_quality(wq, weight)
        size += wq.extra_bytes() + aq.extra_bytes()
    if in_float:
        size += _float_bytes([weight], counted)
    return LayerAccount(
        name=layer.name,
        kind=layer.kind,
        shape=layer.weight_shape,
        w_bits=w_bits,
        a_bits=a_bits,
        signed=layer.signed,
        levels_used=levels_used,
        weights=weight.numel(),
        macs=layer.macs,
        size_bytes=size,
        sqnr_db=sqnr,
        sensitivity=sensitivity,
        position=layer.position,
    )


def width_of(levels: int) -> int:
    """Bits of a code that counts `levels`; at least 1."""
    return max(1, (levels - 1).bit_length())


def packed_bytes(count: int, levels: int) -> int:
    """Bytes of `count` codes of `levels` values, whole bits a code, one padded end."""
    return math.ceil(count * width_of(levels) / 8)


@torch.no_grad()
def _weight_quality(quantizer: Quantizer, weight: Tensor) -> tuple[int | None, float | None]:
    """`(levels_used, sqnr_db)` of a calibrated quantizer."""
    if not bool(quantizer.calibrated):
        return None, None
    was_training = quantizer.training
    w_hat = quantizer.eval()(weight)  # a codebook must not adapt because it is looked at
    quantizer.train(was_training)
    levels = quantizer.levels()
    grids = levels.shape[0] if levels.dim() > 1 else 1
    rows = w_hat.reshape(grids, -1).sort(1).values
    used = 1 + int((rows[:, 1:] != rows[:, :-1]).sum(1).max())
    exact, error = weight.cpu().double(), (weight - w_hat).cpu().double()  # mps has no float64
    signal, noise = exact.square().sum(), error.square().sum()
    return used, (10 * torch.log10(signal / noise)).item()


def _tensors(model: nn.Module, name: str) -> list[Tensor]:
    """A layer's weight, and its bias if it has one."""
    module = model.get_submodule(name)
    found: tuple[Tensor | None, ...] = (module.weight, getattr(module, "bias", None))  # type: ignore[assignment]
    return [tensor for tensor in found if tensor is not None]


def _float_bytes(tensors: Iterable[Tensor], counted: set[int]) -> int:
    """Bytes in float of those that are not `counted` yet: layers that share one store it once."""
    size = 0
    for tensor in tensors:
        if id(tensor) not in counted:
            counted.add(id(tensor))
            size += FLOAT_BYTES * tensor.numel()
    return size


def _state_bytes(model: nn.Module) -> int:
    """Bytes of the state without quantizers, of a float 4 at least, shared tensors once."""
    found = [m for m in model.modules() if isinstance(m, Quantizer)]
    owned = {id(t) for q in found for t in q.state_dict(keep_vars=True).values()}
    tensors = {
        id(t): t
        for name, t in model.state_dict(keep_vars=True).items()
        if id(t) not in owned and not name.endswith("num_batches_tracked")
    }
    return sum(
        t.numel() * max(FLOAT_BYTES if t.is_floating_point() else 1, t.element_size())
        for t in tensors.values()
    )
