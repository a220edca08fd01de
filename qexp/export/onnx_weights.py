"""Quantized weights as ONNX: float32, computed from their codes by nodes.

affine             DequantizeLinear of int4 or int8 codes
affine + 1/2       the same with step 1, then (code + offset) * scale
table, codebook    uint4 or uint8 codes, Gather from the levels
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qexp.export.header import LayerEntry
from qexp.export.onnx_graph import Graph
from qexp.export.packed import Packed


def weight(graph: Graph, packed: Packed, entry: LayerEntry) -> str:
    """The weight of a layer, float32, computed from its codes."""
    assert entry.weight is not None
    how = packed.header.weights[entry.weight]
    codes = packed.codes(entry)
    parts = {k: v for k, v in packed.part(f"{entry.name}.w").items() if k != "codes"}
    name = f"{entry.name}.codes"
    if how.form == "affine":
        return _affine(graph, codes, parts, how, name)
    stored = graph.integers(codes - how.qmin, bits=how.width, signed=False, name=name)
    index = graph.op("Cast", stored, to=6)  # int32
    if how.form == "codebook" and parts["codebook"].shape[0] > 1:
        rows = graph.op("Reshape", index, graph.constant([codes.shape[0], -1]))
        levels = graph.op("GatherElements", graph.constant(parts["codebook"]), rows, axis=1)
        return graph.op("Reshape", levels, graph.constant(list(codes.shape)))
    if how.form == "codebook":
        return graph.op("Gather", graph.constant(parts["codebook"][0]), index)
    levels = graph.op("Gather", graph.constant(torch.tensor(how.grid)), index)
    w = graph.op("Mul", levels, graph.constant(_by_row(parts["scale"], codes)))
    return graph.op("Mul", w, graph.constant(parts["gain"][0])) if "gain" in parts else w


def _by_row(value: Tensor, codes: Tensor) -> Tensor:
    return value.reshape(-1, *[1] * (codes.dim() - 1))


def _affine(graph: Graph, codes: Tensor, parts: dict[str, Tensor], how: Any, name: str) -> str:
    scale = parts["scale"]
    stored = graph.integers(codes, bits=how.width, signed=True, name=name)
    if how.offset:
        x_int = graph.op("DequantizeLinear", stored, graph.constant(1.0))
        shifted = graph.op("Add", x_int, graph.constant(how.offset))
        return graph.op("Mul", shifted, graph.constant(_by_row(scale, codes)))
    zero = parts.get("zero")
    per_row = max(len(scale), 1 if zero is None else len(zero)) > 1
    count = codes.shape[0]
    inputs = [stored, graph.constant(scale.expand(count) if per_row else scale[0])]
    if zero is not None:
        zeros = zero.expand(count) if per_row else zero[0]
        inputs.append(graph.integers(zeros.int(), bits=how.width, signed=True))
    return graph.op("DequantizeLinear", *inputs, **({"axis": 0} if per_row else {}))


def standard_bits(packed: Packed, entry: LayerEntry) -> int:
    """Width of the integers that DequantizeLinear makes a layer's weight of; 0 if it does not."""
    if entry.weight is None:
        return 0
    how = packed.header.weights[entry.weight]
    return how.width if how.form == "affine" and not how.offset else 0
