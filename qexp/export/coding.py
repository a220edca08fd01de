"""What a quantized weight is, without its quantizer: codes, and one of three ways to read them.

    affine     w = (code - zero + offset) * scale          zero absent: 0
    table      w = (scale * grid[code - qmin]) * gain      gain absent: no last product
    codebook   w = codebook[row, code - qmin]

in float32, in this order, so that w is the fake-quantized weight bit for bit. scale, zero and
codebook have one row for the layer or one per output channel. `offset` is 1/2 for grids without
zero (DoReFa, N2UQ weights), `grid` the fixed levels in [-1, 1] of the power methods.

`CODERS` lists the quantizers that have such a form. A class that is not in it has no file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from qexp.errors import ConfigError
from qexp.quant.accounting import width_of
from qexp.quant.adaround import AdaRound
from qexp.quant.codebook import Codebook
from qexp.quant.dorefa import DoReFaWeight
from qexp.quant.functional import MIN_SCALE
from qexp.quant.lsq import LSQ
from qexp.quant.n2uq import N2UQWeight
from qexp.quant.nearest import Nearest
from qexp.quant.power import POST, POT, APoT, FixedGrid, POSTReleased
from qexp.quant.quantizer import Quantizer

Form = Literal["affine", "table", "codebook"]


@dataclass(frozen=True)
class Coding:
    """How a layer's codes are stored and read (module docstring).

    Attributes:
        kind: the quantizer it comes from, for people.
        bits: nominal bits.
        width: bits of a stored code, ceil(log2(levels)).
        qmin: the code that is stored as 0.
        levels: number of codes.
    """

    kind: str
    form: Form
    bits: int
    width: int
    qmin: int
    levels: int
    offset: float = 0.0
    grid: tuple[float, ...] = ()


def _affine(quantizer: Any) -> dict[str, Any]:
    return {"scale": quantizer.scale.clamp_min(MIN_SCALE)}


def _affine_zero(quantizer: Any) -> dict[str, Any]:
    has_zero = quantizer.signed and not quantizer.symmetric
    return _affine(quantizer) | ({"zero": quantizer.zero} if has_zero else {})


def _half(quantizer: Any) -> dict[str, Any]:
    step = quantizer.scale * (2 / (2**quantizer.bits - 1))
    return {"scale": step, "offset": 0.5}


def _table(quantizer: Any) -> dict[str, Any]:
    return _affine(quantizer) | {"grid": quantizer.grid}


def _table_gain(quantizer: Any) -> dict[str, Any]:
    return _table(quantizer) | ({"gain": quantizer.std} if quantizer.normalize else {})


def _codebook(quantizer: Any) -> dict[str, Any]:
    return {"codebook": quantizer.levels()}


CODERS: dict[type[Quantizer], tuple[str, Form, Callable[[Any], dict[str, Any]]]] = {
    LSQ: ("lsq", "affine", _affine),
    Nearest: ("nearest", "affine", _affine_zero),
    AdaRound: ("adaround", "affine", _affine_zero),
    DoReFaWeight: ("dorefa", "affine", _half),
    N2UQWeight: ("n2uq", "affine", _half),
    POT: ("pot", "table", _table),
    POST: ("post", "table", _table),
    POSTReleased: ("post_released", "table", _table),
    FixedGrid: ("fixed_grid", "table", _table),
    APoT: ("apot", "table", _table_gain),
    Codebook: ("codebook", "codebook", _codebook),
}


@torch.no_grad()
def encode(
    quantizer: Quantizer, weight: Tensor, name: str
) -> tuple[Coding, Tensor, dict[str, Tensor]]:
    """`(coding, codes, tensors)` of a calibrated layer's weight.

    Returns:
        codes int32 in [qmin, qmax], shape of `weight`; tensors by the names of the equations,
        float32 [rows] (codebook [rows, levels]; zero int8 or int16).

    Raises:
        ConfigError: the quantizer has no packed form, or does not keep to it.
    """
    if type(quantizer) not in CODERS:
        raise ConfigError(
            f"export: layer '{name}' has weights of {type(quantizer).__name__}, which has no "
            "packed form. Add it to qexp.export.coding.CODERS."
        )
    kind, form, parts_of = CODERS[type(quantizer)]
    quantizer.eval()
    w_hat = quantizer(weight)  # first: grids that follow the weight take it from here
    parts = parts_of(quantizer)
    levels = quantizer.num_levels
    coding = Coding(
        kind=kind,
        form=form,
        bits=quantizer.bits,
        width=width_of(levels),
        qmin=quantizer.qmin,
        levels=levels,
        offset=parts.pop("offset", 0.0),
        grid=tuple(parts.pop("grid").tolist()) if "grid" in parts else (),
    )
    tensors = {key: _stored(key, value, quantizer.bits) for key, value in parts.items()}
    codes = quantizer.codes(weight)
    if not torch.equal(decode(coding, codes.cpu(), tensors), w_hat.cpu()):
        raise ConfigError(
            f"export: the packed weight of layer '{name}' differs from {type(quantizer).__name__}'s"
            ". Please report this with the run's config."
        )
    return coding, codes, tensors


def _stored(key: str, value: Tensor, bits: int) -> Tensor:
    value = value.detach().cpu()
    if key == "zero":
        return value.reshape(-1).to(torch.int8 if bits <= 8 else torch.int16)
    return value.float().reshape(-1) if key != "codebook" else value.float().clone()


def decode(coding: Coding, codes: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    """The weight, float32 with the shape of `codes` [C_out, ...] (integers in [qmin, qmax])."""
    rows = codes.reshape(codes.shape[0], -1)
    row = {key: value.reshape(value.shape[0], -1) for key, value in tensors.items()}
    if coding.form == "affine":
        x_int = rows.float() - row["zero"].float() if "zero" in row else rows.float()
        w = (x_int + coding.offset) * row["scale"]
    elif coding.form == "table":
        w = row["scale"] * torch.tensor(coding.grid)[rows.long() - coding.qmin]
        w = w * row["gain"] if "gain" in row else w
    else:
        table = row["codebook"].expand(rows.shape[0], -1)
        w = table.gather(1, rows.long() - coding.qmin)
    return w.reshape(codes.shape)
