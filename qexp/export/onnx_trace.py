"""The traced graph of a network, and what each of its nodes gives: sizes, constants, or images.

The graph runs on blank images, two of them and then five. What is an integer in both runs and
grows with the images is a multiple of the batch (`Batch`); what does not depend on the images'
pixels (tables of positions, masks of windows, a class token) is a constant, or one repeated for
each image. So arithmetic on sizes is Python's own, wherever the batch goes.
"""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import TraceError

from qexp.errors import ConfigError
from qexp.quant.modules import QUANT_LAYERS

UNTRACEABLE = (TraceError, TypeError, RuntimeError)  # what a proxy raises
COUNTS = (2, 5)  # images of the two runs: a half of them is no constant either
# What asks a tensor for its shape and its type alone.
QUESTIONS = {getattr, "size", "dim", "numel", "ndimension", "stride", "is_floating_point"}
BLANKS = {"new_zeros", "new_ones", "new_full", torch.zeros_like, torch.ones_like, torch.full_like}
FOLLOWED = ("qexp.", "torchvision.")
# Functions that a proxy does not reach, as `torch.zeros(x.shape[0])`.
FACTORIES = (torch.zeros, torch.ones, torch.full, torch.arange, torch.linspace, torch.eye)


@dataclass(frozen=True)
class Batch:
    """A size: `factor` times the number of images."""

    factor: int


Size = int | Batch


@dataclass(frozen=True)
class Live:
    """A tensor that depends on the images' pixels."""

    sizes: tuple[Size, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Repeated:
    """A constant for each image, one after the other along `dim`."""

    value: Tensor
    dim: int

    @property
    def sizes(self) -> tuple[Size, ...]:
        sizes: list[Size] = list(self.value.shape)
        sizes[self.dim] = Batch(self.value.shape[self.dim])
        return tuple(sizes)


class Varying:
    """What depends on the number of images, and is no multiple of it."""


class Tracer(fx.Tracer):
    """Stops at quantized layers and functions under `fx.wrap`; follows ours and torchvision's.

    Args:
        known: functions that are one node nevertheless.
        buffers: make a node of a buffer too, as of a parameter; its values can then not be asked.
    """

    def __init__(self, known: Sequence[Any], *, buffers: bool) -> None:
        super().__init__(autowrap_functions=FACTORIES)
        self.proxy_buffer_attributes = buffers
        self._autowrap_search.append(torch)  # where they are found by name
        self.known = known

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, QUANT_LAYERS) or super().is_leaf_module(m, module_qualified_name)

    def create_proxy(
        self, kind: str, target: Any, args: Any, kwargs: Any, *more: Any, **keywords: Any
    ) -> Any:
        followed = type(target) is FunctionType and target.__module__.startswith(FOLLOWED)
        if kind == "call_function" and followed and target not in self.known:
            before = len(self.graph.nodes)
            try:
                return target(*args, **kwargs)
            except UNTRACEABLE:  # it stays one node
                for node in reversed(list(self.graph.nodes)[before:]):
                    self.graph.erase_node(node)
        return super().create_proxy(kind, target, args, kwargs, *more, **keywords)


def traced(model: nn.Module, known: Sequence[Any]) -> fx.Graph:
    """The graph of `model`; functions in `known` are nodes of it.

    Raises:
        ConfigError: its forward depends on values that a trace does not have.
    """
    errors = []
    for buffers in (False, True):  # `self.table.expand(x.shape[0], -1)` is none that a tensor takes
        try:
            return Tracer(known, buffers=buffers).trace(model)
        except UNTRACEABLE as error:
            errors.append(error)
    raise ConfigError(
        f"export: format=onnx cannot trace the network ({_line(errors[0])}). Use format=packed."
    ) from errors[0]


def _line(error: Exception) -> str:
    """Where the network's own code raised it, and its first sentence."""
    inside = str(Path(torch.__file__).parent)
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith(inside)][-1]
    sentence = " ".join(str(error).split()).split(". ")[0]
    return f"{Path(own.filename).name}:{own.lineno}: {sentence[:160]}"


class _Run(fx.Interpreter):
    """One run; `found` has each node's value, of live tensors shape and type."""

    def __init__(self, model: nn.Module, graph: fx.Graph) -> None:
        super().__init__(model, graph=graph)
        self.live: set[fx.Node] = set()
        self.found: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        y = super().run_node(n)
        parents = [parent for parent in n.all_input_nodes if parent in self.live]
        if n.op == "placeholder" or (parents and not _asked(n, parents, y)):
            self.live.add(n)
            self.found[n] = _shapes(y)
        else:
            self.found[n] = y
        return y


def _asked(node: fx.Node, parents: Sequence[fx.Node], y: Any) -> bool:
    """Whether `y` holds no pixels of its parents: `x.shape` holds none, `x.mT` does."""
    if node.op not in ("call_function", "call_method") or list(parents) != [node.args[0]]:
        return False
    return node.target in BLANKS or (node.target in QUESTIONS and not isinstance(y, Tensor))


def _shapes(y: Any) -> Any:
    if isinstance(y, Tensor):
        return Live(tuple(y.shape), y.dtype)
    if isinstance(y, (tuple, list)):
        return tuple(_shapes(part) for part in y)
    # `x.max().item()` is another number for other images.
    return None if y is None else Varying()


@torch.no_grad()
def results(model: nn.Module, graph: fx.Graph, image: Sequence[int]) -> dict[fx.Node, Any]:
    """What each node gives: `Live` (or a tuple of them), `Repeated`, or a constant.

    Args:
        image: [C, H, W] of one image.
    """
    runs = []
    for n in COUNTS:
        run = _Run(model, graph)
        run.run(torch.zeros(n, *image))
        runs.append(run.found)
    return {node: _merged(runs[0][node], runs[1][node]) for node in runs[0]}


def _merged(a: Any, b: Any) -> Any:
    """What two runs have in common."""
    if isinstance(a, Live) and isinstance(b, Live):
        return Live(_merged(a.sizes, b.sizes), a.dtype)
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)) and len(a) == len(b):
        return tuple(_merged(p, q) for p, q in zip(a, b, strict=True))
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return _constant(a, b)
    if type(a) is int and type(b) is int and a != b:
        factor = a // COUNTS[0]
        return Batch(factor) if (a, b) == tuple(factor * n for n in COUNTS) else Varying()
    return a if type(a) is type(b) and (isinstance(a, Varying) or a == b) else Varying()


def _constant(a: Tensor, b: Tensor) -> Any:
    if torch.equal(a, b):
        return a.clone()
    sizes = _merged(tuple(a.shape), tuple(b.shape))
    dims = [d for d, size in enumerate(sizes) if not isinstance(size, int)]
    if len(dims) != 1 or not isinstance(sizes[dims[0]], Batch):
        return Varying()
    value = a.narrow(dims[0], 0, sizes[dims[0]].factor)
    for n, whole in zip(COUNTS, (a, b), strict=True):
        if not torch.equal(torch.cat([value] * n, dims[0]), whole):
            return Varying()
    return Repeated(value.clone(), dims[0])
