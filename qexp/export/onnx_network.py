"""A packed network as an ONNX model: its graph read off by torch.fx, one node after the other.

The operations are those of the networks here and of torchvision's CNNs (`onnx_ops.py`); another one
is named in a ConfigError. Batch norms are a product and a sum per channel, as in the packed file.
The batch is dynamic, an image's size is the run's.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import onnx
import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp, TensorMetadata

from qexp.errors import ConfigError
from qexp.export import onnx_ops as ops
from qexp.export import onnx_shapes as shapes
from qexp.export.network import restore
from qexp.export.onnx_graph import Graph
from qexp.export.onnx_inputs import columns, quantized_input, window_of
from qexp.export.onnx_weights import standard_bits, weight
from qexp.export.packed import Packed
from qexp.quant.modules import QUANT_LAYERS


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, QUANT_LAYERS) or super().is_leaf_module(m, module_qualified_name)


@torch.no_grad()
def to_onnx(packed: Packed) -> onnx.ModelProto:
    """The checked ONNX model of a packed network.

    Raises:
        ConfigError: an operation or a quantizer that has no ONNX form.
    """
    model = restore(packed, trust=True)
    return Writer(packed, model).write()


class Writer:
    """Walks the traced graph; `values` are the ONNX names of its nodes."""

    def __init__(self, packed: Packed, model: nn.Module) -> None:
        self.packed = packed
        self.modules: dict[str, Any] = dict(model.named_modules())
        self.entries = {entry.name: entry for entry in packed.header.layers}
        self.model = model
        self.traced = _Tracer().trace(model)
        self.graph = Graph()
        self.values: dict[fx.Node, Any] = {}  # sizes and chunks: tuples, numbers
        self.shapes: dict[fx.Node, list[int]] = {}  # of results, without N, once one was asked for

    def write(self) -> onnx.ModelProto:
        header = self.packed.header
        for node in self.traced.nodes:
            if node in self.values:
                continue  # written together with a node before it
            if node.op == "placeholder":
                self.values[node] = "images"
            elif node.op == "get_attr":
                self.values[node] = self._attribute(str(node.target))
            elif node.op == "call_module":
                self.values[node] = self.module(node)
            elif node.op in ("call_function", "call_method"):
                self.values[node] = self._call(node)
            elif node.op == "output":
                return self.graph.model(
                    header.input_shape, self.values[node.args[0]], header.num_classes, header.data
                )
        raise ConfigError("export: the network has no output that format=onnx can write.")

    # -----------------------------------------------------------------------------------------
    # Modules

    def module(self, node: fx.Node) -> str:
        """What a module makes of its input."""
        name, x = str(node.target), self.values[node.args[0]]  # type: ignore[index]
        module, graph = self.modules[name], self.graph
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            return self._layer(name, module, x, node)
        if isinstance(module, nn.AdaptiveAvgPool2d):
            return shapes.adaptive_pool(graph, x, module.output_size, size=self.shape(node))
        if type(module) in ops.MODULES:
            return ops.MODULES[type(module)](graph, module, x)
        raise shapes.unknown(type(module).__name__)

    def _layer(self, name: str, module: Any, x: str, node: fx.Node) -> str:
        graph, entry = self.graph, self.entries.get(name)
        by_row = isinstance(module, QUANT_LAYERS) and module.act_quantizer.on_columns
        if isinstance(module, QUANT_LAYERS):
            x = columns(graph, module, x) if by_row else x  # type: ignore[arg-type]
            bits = 0 if entry is None else standard_bits(self.packed, entry)
            x = quantized_input(graph, module.act_quantizer, ops.anchored(graph, x), name, bits)
        if entry is not None and entry.weight is not None:
            w = weight(graph, self.packed, entry)
        else:
            w = graph.constant(module.weight, f"{name}.weight")
        if isinstance(module, nn.Linear) and len(self.shape(node)) == 1:
            y = graph.op("Gemm", x, w, transB=1)
        elif isinstance(module, nn.Linear):
            y = graph.op("MatMul", x, graph.op("Transpose", w, perm=[1, 0]))
        elif by_row:
            shape = [module.out_channels, -1, 1, 1]
            w = graph.op("Reshape", w, graph.constant(shape))
            y = graph.op("Conv", x, w, kernel_shape=[1, 1], group=module.groups)
        else:
            y = graph.op("Conv", x, w, **window_of(module), group=module.groups)
        if module.bias is None:
            return y
        # Apart, not as an operand: between quantized operands onnxruntime rounds that to integers.
        bias = module.bias if isinstance(module, nn.Linear) else module.bias.reshape(-1, 1, 1)
        return graph.op("Add", y, graph.constant(bias, f"{name}.bias"))

    # -----------------------------------------------------------------------------------------
    # Functions, methods, parameters

    def _attribute(self, name: str) -> str:
        value = self.model
        for part in name.split("."):
            value = getattr(value, part)
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise shapes.unknown(f"the attribute '{name}'")
        return self.graph.constant(value, name)

    def _call(self, node: fx.Node) -> Any:
        args: Any = fx.map_arg(node.args, self._value)
        kwargs: Any = fx.map_arg(node.kwargs, self._value)
        _check_in_place(node)
        target: Any = node.target
        emit: Callable[..., Any]
        if shapes.on_sizes(target, args):
            emit = partial(shapes.computed, target)
        elif target in shapes.CALLS:
            emit = partial(shapes.CALLS[target], size=self.shape(node))
        elif target in ops.CALLS:
            emit = ops.CALLS[target]
        else:
            raise shapes.unknown(str(getattr(target, "__name__", target)))
        try:
            return emit(self.graph, *args, **kwargs)
        except TypeError as error:  # an argument that the operation is written without
            raise shapes.unknown(f"{node.format_node()}") from error

    def _value(self, node: fx.Node) -> Any:
        return self.values[node]

    def shape(self, node: fx.Node) -> list[int]:
        """Shape of a node's first input without the batch, for images of the header's size."""
        if not self.shapes:
            image = torch.zeros(1, *self.packed.header.input_shape)
            ShapeProp(fx.GraphModule(self.model, self.traced)).propagate(image)
            for n in self.traced.nodes:
                if isinstance(meta := n.meta.get("tensor_meta"), TensorMetadata):
                    self.shapes[n] = list(meta.shape[1:])
        return self.shapes[node.all_input_nodes[0]]


def _check_in_place(node: fx.Node) -> None:
    """Refuse a function that writes over a value which is read again: ONNX has no such thing.

    `x += y` cannot be told from `x + y` here; the command compares the file with the network.
    """
    written = node.args[0] if node.args else None
    in_place = node.kwargs.get("inplace") or (len(node.args) > 1 and node.args[1] is True)
    if not in_place or not isinstance(written, fx.Node):
        return
    order = {other: i for i, other in enumerate(node.graph.nodes)}
    if any(order[user] > order[node] for user in written.users):
        raise ConfigError(
            f"export: '{node.name}' changes in place what '{written.name}' gave, which is read "
            "again. Write it without in-place operations, or use format=packed."
        )
