"""A packed network as an ONNX model: its graph read off by torch.fx, one node after the other.

The operations are those of the networks here and of torchvision's ResNets and MobileNets; another
one is named in a ConfigError. Batch norms are a product and a sum per channel, as in the packed
file. The batch is dynamic.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import onnx
import torch
import torch.nn.functional as F
from torch import fx, nn

from qexp.errors import ConfigError
from qexp.export.network import restore
from qexp.export.onnx_graph import Graph
from qexp.export.onnx_inputs import columns, quantized_input, window_of
from qexp.export.onnx_weights import standard_bits, weight
from qexp.export.packed import Packed
from qexp.quant.modules import QUANT_LAYERS

FAR = 2**31 - 1  # the end of a slice that has none


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
        self.traced = _Tracer().trace(model)
        self.graph = Graph()
        self.values: dict[fx.Node, str] = {}

    def write(self) -> onnx.ModelProto:
        header = self.packed.header
        for node in self.traced.nodes:
            if node in self.values:
                continue  # written together with a node before it
            if node.op == "placeholder":
                self.values[node] = "images"
            elif node.op == "call_module":
                self.values[node] = self.module(node)
            elif node.op in ("call_function", "call_method"):
                self.values[node] = self._call(node)
            elif node.op == "output":
                return self.graph.model(
                    header.input_shape, self.values[node.args[0]], header.num_classes
                )
        raise ConfigError("export: the network has no output that format=onnx can write.")

    # -----------------------------------------------------------------------------------------
    # Modules

    def module(self, node: fx.Node) -> str:
        """What a module makes of its input."""
        name, x = str(node.target), self.values[node.args[0]]  # type: ignore[index]
        module, graph = self.modules[name], self.graph
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            return self._layer(name, module, x)
        if isinstance(module, nn.BatchNorm2d):
            gain, bias = (t.reshape(-1, 1, 1) for t in (module.weight, module.bias))
            return graph.op("Add", graph.op("Mul", x, graph.constant(gain)), graph.constant(bias))
        if isinstance(module, (nn.Identity, nn.Dropout)):
            return x
        if isinstance(module, nn.ReLU6):
            # Not Clip: onnxruntime fuses that with a 4-bit QuantizeLinear, and fails.
            return graph.op("Min", graph.op("Relu", x), graph.constant(6.0))
        if isinstance(module, nn.ReLU):
            return graph.op("Relu", x)
        if isinstance(module, nn.MaxPool2d) and not module.ceil_mode and module.dilation == 1:
            kernel, stride, pad = (
                _pair(v) for v in (module.kernel_size, module.stride, module.padding)
            )
            return graph.op("MaxPool", x, kernel_shape=kernel, strides=stride, pads=pad * 2)
        if isinstance(module, nn.AdaptiveAvgPool2d) and _pair(module.output_size) == [1, 1]:
            return graph.op("GlobalAveragePool", x)
        if isinstance(module, nn.Flatten) and (module.start_dim, module.end_dim) == (1, -1):
            return graph.op("Flatten", x)
        raise _unknown(type(module).__name__)

    def _layer(self, name: str, module: Any, x: str) -> str:
        graph, entry = self.graph, self.entries.get(name)
        by_row = isinstance(module, QUANT_LAYERS) and module.act_quantizer.on_columns
        if isinstance(module, QUANT_LAYERS):
            x = columns(graph, module, x) if by_row else x  # type: ignore[arg-type]
            bits = 0 if entry is None else standard_bits(self.packed, entry)
            x = quantized_input(graph, module.act_quantizer, x, name, bits)
        if entry is not None and entry.weight is not None:
            w = weight(graph, self.packed, entry)
        else:
            w = graph.constant(module.weight, f"{name}.weight")
        if isinstance(module, nn.Linear):
            y = graph.op("Gemm", x, w, transB=1)
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
    # Functions and methods

    def _call(self, node: fx.Node) -> str:
        emit = CALLS.get(node.target)
        if emit is None:
            raise _unknown(str(getattr(node.target, "__name__", node.target)))
        inputs = [self.values.get(a, a) if isinstance(a, fx.Node) else a for a in node.args]
        _check_in_place(node)
        try:
            return emit(self.graph, *inputs, **node.kwargs)
        except TypeError as error:  # an argument that the operation is written without
            raise _unknown(f"{node.format_node()}") from error


def _unknown(what: str) -> ConfigError:
    return ConfigError(f"export: format=onnx does not know {what}. Use format=packed.")


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


def _pair(value: Any) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)


def _relu(graph: Graph, x: str, inplace: bool = False) -> str:
    return graph.op("Relu", x)


def _add(graph: Graph, x: str, y: str) -> str:
    return graph.op("Add", x, y)


def _flatten(graph: Graph, x: str, start_dim: int = 1) -> str:
    if start_dim != 1:
        raise _unknown(f"flatten from dimension {start_dim}")
    return graph.op("Flatten", x)


def _mean(graph: Graph, x: str, dim: Any, keepdim: bool = False) -> str:
    axes = graph.constant([dim] if isinstance(dim, int) else list(dim))
    return graph.op("ReduceMean", x, axes, keepdims=int(keepdim))


def _pool(graph: Graph, x: str, output_size: Any) -> str:
    if _pair(output_size) != [1, 1]:
        raise _unknown(f"adaptive_avg_pool2d to {output_size}")
    return graph.op("GlobalAveragePool", x)


def _pad(graph: Graph, x: str, pad: Any, mode: str = "constant", value: float = 0.0) -> str:
    if mode != "constant" or len(pad) != 6:
        raise _unknown(f"pad {pad} of mode {mode}")
    left, right, top, bottom, before, after = pad  # last dimension first
    sizes = [0, before, top, left, 0, after, bottom, right]
    return graph.op("Pad", x, graph.constant(sizes), graph.constant(float(value or 0.0)))


def _slice(graph: Graph, x: str, index: Any) -> str:
    parts = index if isinstance(index, tuple) else (index,)
    if not all(isinstance(p, slice) for p in parts):
        raise _unknown(f"index {index}")
    lists = (
        [p.start or 0 for p in parts],
        [FAR if p.stop is None else p.stop for p in parts],
        list(range(len(parts))),
        [p.step or 1 for p in parts],
    )
    return graph.op("Slice", x, *(graph.constant(v) for v in lists))


CALLS: dict[Any, Callable[..., str]] = {
    F.relu: _relu,
    torch.relu: _relu,
    "relu": _relu,
    operator.add: _add,
    operator.iadd: _add,
    torch.add: _add,
    "add": _add,
    torch.flatten: _flatten,
    "flatten": _flatten,
    "mean": _mean,
    torch.mean: _mean,
    F.adaptive_avg_pool2d: _pool,
    F.pad: _pad,
    operator.getitem: _slice,
}
