"""A packed network as an ONNX model: its graph read off by torch.fx, one node after the other.

What operations become is in `onnx_ops.py`, `onnx_shapes.py` and `onnx_attention.py`; another one is
named in a ConfigError. What does not depend on the image's pixels is computed here and becomes a
constant of the file (`onnx_trace.py`). Batch norms are a product and a sum per channel, as in the
packed file. The batch is dynamic, an image's size is the run's.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import partial
from typing import Any

import onnx
import torch
from torch import fx, nn

from qexp.errors import ConfigError
from qexp.export import onnx_attention as attention
from qexp.export import onnx_ops as ops
from qexp.export import onnx_shapes as shapes
from qexp.export.network import restore
from qexp.export.onnx_graph import Graph
from qexp.export.onnx_inputs import columns, quantized_input, window_of
from qexp.export.onnx_trace import Live, Repeated, Varying, results, traced
from qexp.export.onnx_weights import standard_bits, weight
from qexp.export.packed import Packed
from qexp.quant.modules import QUANT_LAYERS

MODULES = {**ops.MODULES, **attention.MODULES}
CALLS = {**shapes.CALLS, **ops.CALLS, **attention.CALLS}


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
        self.traced = traced(model, [*CALLS])
        self.results = results(model, self.traced, packed.header.input_shape)
        self.graph = Graph()
        self.values: dict[fx.Node, Any] = {}  # names; constants as they are

    def write(self) -> onnx.ModelProto:
        header = self.packed.header
        for node in self.traced.nodes:
            if node in self.values:
                continue  # written together with a node before it
            if node.op == "output":
                logits = node.args[0]
                if not isinstance(logits, fx.Node) or not isinstance(self.results[logits], Live):
                    break
                value = self.values[logits]
                return self.graph.model(header.input_shape, value, header.num_classes, header.data)
            if not self.live(node):
                self.values[node] = self.results[node]
                if node.op == "get_attr":
                    name = str(node.target)  # of the root it may be the graph's own
                    name = f"{name}.value" if name in ("images", "logits") else name
                    self.graph.name(self.values[node], name)
                continue
            if node.op == "placeholder":
                self.values[node] = "images"
            elif node.op == "call_module":
                self.values[node] = self.module(node)
            else:
                self.values[node] = self._call(node)
            self._keep_shape(self.values[node], self.results[node])
        raise ConfigError("export: the network has no output that format=onnx can write.")

    def live(self, node: fx.Node) -> bool:
        """Whether a node gives a tensor, or several, that depend on the image."""
        result = self.results[node]
        return isinstance(result, Live) or (
            isinstance(result, tuple) and any(isinstance(part, Live) for part in result)
        )

    def _keep_shape(self, value: Any, result: Any) -> None:
        if isinstance(result, tuple):
            for name, part in zip(value, result, strict=True):
                self._keep_shape(name, part)
        elif isinstance(result, Live):
            if result.dtype != torch.float32:
                raise shapes.unknown(f"values of {result.dtype} that depend on the image")
            if any(isinstance(n, Varying) for n in result.sizes):
                raise shapes.unknown("a size that is no multiple of the batch")
            self.graph.shapes[value] = result.sizes

    # -----------------------------------------------------------------------------------------
    # Modules

    def module(self, node: fx.Node) -> str:
        """What a module makes of its input."""
        name, module, graph = str(node.target), self.modules[str(node.target)], self.graph
        kind = type(module)
        if len(node.args) != 1 or node.kwargs:
            raise shapes.unknown(f"{kind.__name__} but of one input, by position")
        x = self._value(node.args[0])  # type: ignore[arg-type]
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            return self._layer(name, module, x)
        if kind in (nn.Conv1d, nn.ConvTranspose2d):
            return self._float_layer(name, module, x)
        if isinstance(module, (nn.Flatten, nn.Unflatten)):
            return shapes.reshape(graph, x, to=self.results[node])
        if kind in MODULES:
            return MODULES[kind](graph, module, x)
        raise shapes.unknown(kind.__name__)

    def _layer(self, name: str, module: Any, x: str) -> str:
        graph, entry, rank = self.graph, self.entries.get(name), len(self.graph.sizes(x))
        by_row = isinstance(module, QUANT_LAYERS) and module.act_quantizer.on_columns
        if isinstance(module, QUANT_LAYERS):
            x = columns(graph, module, x) if by_row else x  # type: ignore[arg-type]
            bits = 0 if entry is None else standard_bits(self.packed, entry)
            x = quantized_input(graph, module.act_quantizer, ops.anchored(graph, x), name, bits)
        if entry is not None and entry.weight is not None:
            w = weight(graph, self.packed, entry)
        else:
            w = graph.constant(module.weight, f"{name}.weight")
        if isinstance(module, nn.Linear) or module.bias is None:
            w = ops.apart(graph, w)
        if isinstance(module, nn.Linear) and rank == 2:
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

    def _float_layer(self, name: str, module: Any, x: str) -> str:
        """A convolution of a kind that is not quantized."""
        window: dict[str, Any] = window_of(module)
        kind = "Conv"
        if module.transposed:
            kind, window["output_padding"] = "ConvTranspose", list(module.output_padding)
        weight = self.graph.constant(module.weight, f"{name}.weight")
        bias = [] if module.bias is None else [self.graph.constant(module.bias, f"{name}.bias")]
        return self.graph.op(kind, x, weight, *bias, **window, group=module.groups)

    # -----------------------------------------------------------------------------------------
    # Functions and methods

    def _call(self, node: fx.Node) -> Any:
        args: Any = fx.map_arg(node.args, self._value)
        kwargs: Any = fx.map_arg(node.kwargs, self._value)
        _check_in_place(node)
        target: Any = node.target
        emit: Callable[..., Any]
        if target is operator.getitem and isinstance(args[0], tuple):
            return args[0][args[1]]  # a chunk
        if target in shapes.RESULTS:
            emit = partial(shapes.RESULTS[target], to=self.results[node])
        elif target in CALLS:
            emit = CALLS[target]
        else:
            raise shapes.unknown(str(getattr(target, "__name__", target)))
        try:
            return emit(self.graph, *args, **kwargs)
        except TypeError as error:  # an argument that the operation is written without
            raise shapes.unknown(f"{node.format_node()}") from error

    def _value(self, node: fx.Node) -> Any:
        """What a node reads of another one: the name of a value, or a constant."""
        value = self.values[node]
        if isinstance(value, Repeated):
            name = self.graph.repeated(value.value, value.dim)
            self._keep_shape(name, Live(value.sizes, value.value.dtype))
            value = self.values[node] = name
        if isinstance(value, Varying):
            raise shapes.unknown(f"what depends on the batch or the image in '{node.name}'")
        return value


def _check_in_place(node: fx.Node) -> None:
    """Refuse a function that writes over a value which is read again: ONNX has no such thing.

    `x += y` cannot be told from `x + y` here; the command compares the file with the network.
    """
    written = node.args[0] if node.args else None
    in_place = node.kwargs.get("inplace") or (len(node.args) > 1 and node.args[1] is True)
    in_place = in_place or (node.op == "call_method" and str(node.target).endswith("_"))
    if not in_place or not isinstance(written, fx.Node):
        return
    order = {other: i for i, other in enumerate(node.graph.nodes)}
    if any(order[user] > order[node] for user in written.users):
        raise ConfigError(
            f"export: '{node.name}' changes in place what '{written.name}' gave, which is read "
            "again. Write it without in-place operations, or use format=packed."
        )
