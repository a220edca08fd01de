"""An ONNX graph under construction: constants in, names out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from qexp.export.bits import pack
from qexp.export.onnx_trace import Size

Operand = str | Tensor | float | Sequence[int]  # a value's name, or a constant

OPSET = 21  # the first with 4-bit integers in QuantizeLinear and DequantizeLinear
IR_VERSION = 10  # the file version of that opset


class Graph:
    """Nodes and initialisers; what makes one returns the name of its value."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, onnx.TensorProto] = {}
        self.shapes: dict[str, tuple[Size, ...]] = {}  # of what a node of the network gave
        self.named: dict[int, tuple[Tensor, str]] = {}  # by id: tensors, each written once

    def op(self, kind: str, *inputs: Operand, **attributes: Any) -> str:
        """A node with one output."""
        names = [self.operand(value) for value in inputs]
        name = f"{kind.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, names, [name], name=name, **attributes))
        return name

    def operand(self, value: Operand) -> str:
        """The name of a value; a constant is written when it is first asked for."""
        if isinstance(value, str):
            return value
        if not isinstance(value, Tensor):
            return self.constant(value)
        tensor, name = self.named.get(id(value), (value, ""))
        if name not in self.constants:
            name = self.constant(tensor, name)
            self.named[id(value)] = (tensor, name)
        return name

    def name(self, tensor: Tensor, name: str) -> None:
        """What a constant is to be called."""
        self.named[id(tensor)] = (tensor, name)

    def sizes(self, value: str | Tensor) -> tuple[Size, ...]:
        """The shape of an operand."""
        return tuple(value.shape) if isinstance(value, Tensor) else self.shapes[value]

    def repeated(self, value: Tensor, dim: int) -> str:
        """`value` once for each image, along `dim`."""
        count = self.op("Shape", "images", start=0, end=1)
        before, after = [1] * dim, [1] * (value.dim() - dim - 1)
        parts = [part for part in (before, count, after) if part]
        return self.op("Tile", value, self.op("Concat", *parts, axis=0))

    def constant(self, value: Tensor | float | Sequence[int], name: str = "") -> str:
        """A float32 or boolean tensor, a float32 number, or a list of int64."""
        if isinstance(value, Tensor):
            value = value.detach().cpu()
            array = (value if value.dtype == torch.bool else value.float()).contiguous().numpy()
        elif isinstance(value, (int, float)):
            array = np.array(value, dtype=np.float32)
        else:
            array = np.array(value, dtype=np.int64)
        name = name or f"constant_{len(self.constants)}"
        self.constants[name] = numpy_helper.from_array(array, name)
        return name

    def integers(self, codes: Tensor, *, bits: int, signed: bool, name: str = "") -> str:
        """Integers in the smallest standard type: 4 bits up to 4, else 8, 16 or 32."""
        name = name or f"integers_{len(self.constants)}"
        kind = integer_type(bits, signed)
        if bits <= 4:  # two's complement, the first code in the low half of a byte, as ours
            raw = pack(codes & 0xF, 4).numpy().tobytes()
        else:
            raw = codes.cpu().numpy().astype(helper.tensor_dtype_to_np_dtype(kind)).tobytes()
        self.constants[name] = helper.make_tensor(name, kind, list(codes.shape), raw, raw=True)
        return name

    def model(
        self, inputs: Sequence[int], output: str, classes: int, data: Mapping[str, Any]
    ) -> onnx.ModelProto:
        """The checked model: `images` [N, C, H, W] -> `logits` [N, classes].

        Args:
            data: what its images are (`Header.data`); becomes its metadata, values as JSON.
        """
        self.nodes.append(helper.make_node("Identity", [output], ["logits"], name="logits"))
        image = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["N", *inputs])
        logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", classes])
        graph = helper.make_graph(
            self.nodes, "qexp", [image], [logits], list(self.constants.values())
        )
        model = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", OPSET)], producer_name="qexp"
        )
        model.ir_version = IR_VERSION
        helper.set_model_props(model, {key: json.dumps(value) for key, value in data.items()})
        onnx.checker.check_model(model, full_check=True)
        return model


def integer_type(bits: int, signed: bool) -> int:
    """The narrowest ONNX integer type of at least `bits` bits."""
    if bits <= 4:
        return TensorProto.INT4 if signed else TensorProto.UINT4
    if bits <= 8:
        return TensorProto.INT8 if signed else TensorProto.UINT8
    if bits <= 16:
        return TensorProto.INT16 if signed else TensorProto.UINT16
    return TensorProto.INT32 if signed else TensorProto.UINT32
