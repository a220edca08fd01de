"""The int8 variant of an ONNX model: quantized layers on onnxruntime's integer kernels.

onnxruntime multiplies integers in two patterns alone: a convolution between DequantizeLinear of
8-bit operands and QuantizeLinear of its result (it becomes QLinearConv), and Gemm of such operands,
the weights' zero point written, whose result may be float (QGemm). So

    input    its codes, at the quantizer's own step: 8 bits hold them all, nothing is lost
    weight   8-bit integers times one step a channel: exact where the levels are integers of that
             size; others are rounded to the n / 127 or less that fits them best (`eight_bits`)
    norm     gain into the weight's steps, bias into a 32-bit bias
    result   if one quantizer with a fixed step is all that reads it, the codes of that; else
             8 bits at the step of least squared error on calibration images

The last two roundings, of levels and of results that are read as floats (residual sums, inputs of
an adapter), are the variant's error. Linear layers end in float; tokens are rows of their product.
ASQ's factor divides the input and multiplies the result.

Layers with a float operand, more than 8 bits, an offset (LSQ+) or inputs of unequal steps (APoT)
stay as in `onnx_network`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import onnx
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from qexp.engine.network import weight_of
from qexp.export.network import restore
from qexp.export.onnx_grid import (
    Chain,
    Grid,
    dequantized,
    eight_bits,
    fold,
    grid_of,
    norm_of,
    product,
    quantized,
)
from qexp.export.onnx_inputs import check_input, columns, factor, quantized_input
from qexp.export.onnx_network import Writer
from qexp.export.onnx_shapes import reshape
from qexp.export.packed import Packed
from qexp.quant.additive import APoTActivation
from qexp.quant.asq import ASQ
from qexp.quant.calibrate import mse_scale
from qexp.quant.dorefa import PACT, DoReFaActivation
from qexp.quant.lsq import LSQ
from qexp.quant.modules import QUANT_LAYERS, QuantConv2d
from qexp.quant.nearest import Nearest

ROUND = (LSQ, PACT, DoReFaActivation)  # round(x / step), as QuantizeLinear
SAMPLES = 1 << 16  # elements of a result that its step is found from
RELU6 = 6.0


@dataclass(frozen=True)
class Report:
    """What the variant did.

    Attributes:
        layers, quantized: quantized layers on integer kernels, and all of them.
        level_error: largest |level - its 8-bit integer| in units of the channel's largest level.
        worst_layer: where that is.
        rounded_results: convolutions whose result is rounded to 8 bits of its own.
    """

    layers: int
    quantized: int
    level_error: float
    worst_layer: str
    rounded_results: int


@torch.no_grad()
def to_onnx_int8(packed: Packed, images: Tensor) -> tuple[onnx.ModelProto, Report]:
    """The checked model, and what it does to the network.

    Args:
        images: training images [N, C, H, W] that the results' steps are found from.

    Raises:
        ConfigError: as `to_onnx`.
    """
    writer = _Writer(packed, restore(packed, trust=True), images)
    return writer.write(), writer.report()


class _Writer(Writer):
    """`Writer`, with chains of layers in integers."""

    def __init__(self, packed: Packed, model: nn.Module, images: Tensor) -> None:
        super().__init__(packed, model)
        self.chains = {
            node: self._chain(node) for node in self.traced.nodes if self._eligible(node)
        }
        self.fixed = {node: self._reader(chain) for node, chain in self.chains.items()}
        self.steps = self._result_steps(model, images)
        self.codes: dict[fx.Node, str] = {}  # of a chain's end, for the quantizer that reads it
        self.errors: dict[str, float] = {}

    def report(self) -> Report:
        """Call after `write`."""
        worst = max(self.errors, key=self.errors.__getitem__, default="")
        quantized = sum(isinstance(m, QUANT_LAYERS) for m in self.modules.values())
        error = self.errors.get(worst, 0.0)
        return Report(len(self.chains), quantized, error, worst, len(self.steps))

    # -----------------------------------------------------------------------------------------
    # What belongs together

    def _eligible(self, node: fx.Node) -> bool:
        module = self.modules.get(str(node.target)) if node.op == "call_module" else None
        entry = self.entries.get(str(node.target))
        if not isinstance(module, QUANT_LAYERS) or entry is None or not self.live(node):
            return False
        known = entry.weight is not None and entry.input is not None
        quantizer = module.act_quantizer
        uniform = not (isinstance(quantizer, APoTActivation) or hasattr(quantizer, "offset"))
        return known and uniform and quantizer.bits <= 8

    def _chain(self, node: fx.Node) -> Chain:
        norm, relu, members = None, None, [node]
        if not isinstance(self.modules[str(node.target)], QuantConv2d):
            return Chain(None, None, False, (node,))
        while (following := self._only_user(members[-1])) is not None:
            if self._is(following, nn.BatchNorm2d) and norm is None and relu is None:
                norm = following
            elif self._is_relu(following) and relu is None:
                relu = following
            elif not self._is(following, nn.Identity):  # one is left of a norm that was folded
                break
            members.append(following)
        six = relu is not None and self._is(relu, nn.ReLU6)
        return Chain(norm, relu, six, tuple(members))

    def _only_user(self, node: fx.Node) -> fx.Node | None:
        return next(iter(node.users)) if len(node.users) == 1 else None

    def _is(self, node: fx.Node, kind: type[nn.Module]) -> bool:
        return node.op == "call_module" and isinstance(self.modules[str(node.target)], kind)

    def _is_relu(self, node: fx.Node) -> bool:
        if self._is(node, nn.ReLU) or self._is(node, nn.ReLU6):
            return True
        called = node.op in ("call_function", "call_method")
        return called and node.target in (F.relu, torch.relu, "relu")

    def _reader(self, chain: Chain) -> fx.Node | None:
        """The layer that alone reads a chain's end, if its quantizer's step is fixed."""
        user = self._only_user(chain.end)
        if user is None or user not in self.chains:
            return None
        quantizer = self.modules[str(user.target)].act_quantizer
        if type(quantizer) not in (*ROUND, Nearest):  # Nearest rounds ties up: a tie is rare
            return None
        return user if quantizer.signed or chain.relu is not None else None

    # -----------------------------------------------------------------------------------------
    # Calibration

    def _result_steps(self, model: nn.Module, images: Tensor) -> dict[fx.Node, Tensor]:
        """Steps of the results that no quantizer fixes, by node of the layer."""
        needed = {
            node: chain
            for node, chain in self.chains.items()
            if self._is(node, QuantConv2d) and (self._per_sample(node) or not self.fixed[node])
        }
        seen: dict[fx.Node, list[Tensor]] = {node: [] for node in needed}
        ends = {chain.end: node for node, chain in needed.items()}
        modules, per_sample = self.modules, self._per_sample

        class Record(fx.Interpreter):
            def run_node(self, n: fx.Node) -> Any:
                y = super().run_node(n)
                if n in needed and per_sample(n):  # before the factor
                    x = self.env[n.all_input_nodes[0]]
                    beta = modules[str(n.target)].act_quantizer.factors(x)
                    gain = norm_of(modules, needed[n])[0].reshape(-1, 1, 1)
                    keep(n, y / beta * gain)
                elif n in ends and not per_sample(ends[n]):
                    keep(ends[n], y)
                return y

        def keep(node: fx.Node, y: Tensor) -> None:
            flat = y.flatten()
            seen[node].append(flat[:: max(1, flat.numel() * batches // SAMPLES)].clone())

        parts = images.split(32)
        batches = len(parts)
        interpreter = Record(model, graph=self.traced)
        for part in parts:
            interpreter.run(part)
        found = {}
        for node, values in seen.items():
            signed = needed[node].relu is None or per_sample(node)
            step = mse_scale(torch.cat(values), *((-128, 127) if signed else (0, 255)))
            found[node] = step.clamp_max(RELU6 / 255) if needed[node].six else step
        return found

    def _per_sample(self, node: fx.Node) -> bool:
        q = self.modules[str(node.target)].act_quantizer
        return isinstance(q, ASQ) and q.factor != "frozen" and q.dequantize == "scaled"

    # -----------------------------------------------------------------------------------------
    # Writing

    def module(self, node: fx.Node) -> str:
        """What a module makes of its input; a chain is written at its layer."""
        if node not in self.chains:
            return super().module(node)
        chain, name = self.chains[node], str(node.target)
        layer, entry = self.modules[name], self.entries[name]
        source: fx.Node = node.args[0]  # type: ignore[assignment]
        x, step, beta = self._input(source, layer, name)
        whole, w_step, level_error = eight_bits(weight_of(self.packed, entry))
        gain, bias = norm_of(self.modules, chain)
        bias = bias if layer.bias is None else bias + layer.bias * gain
        inside = bias if beta is None else torch.zeros(1)  # beta multiplies before the bias
        whole, w_step, fold_error = fold(whole, w_step, gain, inside, step)
        self.errors[name] = level_error + fold_error
        y = product(self.graph, layer, x, whole, w_step, inside, step)
        for part in chain.members:
            self.values[part] = ""  # nobody but the chain reads it
        y = self._result(node, y, beta, bias)
        self.values[chain.end] = y
        return y

    def _input(self, source: fx.Node, layer: Any, name: str) -> tuple[str, Tensor, str | None]:
        """`(dequantized codes, step, factor of each sample or None)`."""
        graph, q = self.graph, layer.act_quantizer
        check_input(q, name)
        grid = grid_of(q)
        if source in self.codes:
            codes = self._rows(self.codes[source], source, layer)
            return dequantized(graph, codes, grid), grid.step, None
        x, beta = self._value(source), None
        if layer.act_quantizer.on_columns:
            x = columns(graph, layer, x)
        if isinstance(q, ASQ):
            beta = factor(graph, q, x)
            x = x if beta is None else graph.op("Div", x, beta)
            beta = None if q.dequantize == "plain" else beta
        elif type(q) not in ROUND:
            x = quantized_input(graph, q, x, name)  # x_hat, of which QuantizeLinear takes the code
        codes = self._rows(quantized(graph, x, grid), source, layer)
        return dequantized(graph, codes, grid), grid.step, beta

    def _rows(self, codes: str, source: fx.Node, layer: Any) -> str:
        if isinstance(layer, QuantConv2d) or len(self.results[source].sizes) == 2:
            return codes
        return self.graph.op("Reshape", codes, [-1, layer.in_features])  # Gemm takes rows alone

    def _result(self, node: fx.Node, y: str, beta: str | None, bias: Tensor) -> str:
        """Codes for the quantizer that reads the result, or its value rounded to 8 bits."""
        graph, chain, reader = self.graph, self.chains[node], self.fixed[node]
        if not self._is(node, QuantConv2d):
            if len((to := self.results[node]).sizes) > 2:
                y = reshape(graph, y, to=to)
            return y if beta is None else self._after(y, beta, bias)
        if beta is None and reader is not None:
            grid = grid_of(self.modules[str(reader.target)].act_quantizer)
            if chain.six:
                top = grid.zero + int((RELU6 / grid.step).round())
                grid = grid._replace(high=min(grid.high, top))
            if chain.relu is not None:
                grid = grid._replace(low=max(grid.low, grid.zero))
            self.codes[chain.end] = quantized(graph, y, grid)
            return ""  # the reader takes the codes
        signed = chain.relu is None or beta is not None
        grid = Grid.of(self.steps[node], *((-128, 127) if signed else (0, 255)))
        y = dequantized(graph, quantized(graph, y, grid), grid)
        if beta is None:
            return y
        y = self._after(y, beta, bias.reshape(-1, 1, 1))
        y = graph.op("Relu", y) if chain.relu is not None else y
        return graph.op("Min", y, graph.constant(RELU6)) if chain.six else y

    def _after(self, y: str, beta: str, bias: Tensor) -> str:
        y = self.graph.op("Mul", y, beta)
        return self.graph.op("Add", y, self.graph.constant(bias)) if bool(bias.any()) else y
