"""The parts of a network that reconstruction works on one after another.

A block is a module whose own forward adds two branches (a residual or inverted-residual block; a
parameter that is added is no branch), or another instance of such a class: MobileNetV2's blocks of
stride 2 have no shortcut and are blocks all the same. Blocks are read off the traced graph, so any
network that torch.fx can trace has them. A layer outside all blocks, or every layer with
`granularity: layer`, is a unit of its own. Its output is compared after the ReLU or ReLU6 that
reads it, when it is the only reader. Before any other activation (Hardswish, SiLU, GELU) the output
is compared as the layer gives it, so that errors count which the activation would swallow. A block
is compared after the activations that its own forward calls. A unit takes one tensor, a row an
image, and gives one (`unfit`).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from qexp.quant.fold import trace_graph
from qexp.quant.trace import evaluated

Granularity = Literal["layer", "block"]

ADDITIONS = {operator.add, operator.iadd, torch.add, "add", "add_"}
SIZES = {"shape", "ndim", "dtype", "device"}  # attributes of a tensor that hold none of its values
ACTIVATIONS: dict[Any, Callable[[Tensor], Tensor]] = {
    F.relu: F.relu,
    torch.relu: torch.relu,
    F.relu6: F.relu6,
    "relu": torch.relu,
    nn.ReLU: F.relu,
    nn.ReLU6: F.relu6,
}


@dataclass(frozen=True)
class Unit:
    """One part of the network: a module and the layers inside it.

    Attributes:
        name: path of the module; empty: the whole network.
        layers: paths of its convolutions and linear layers, in execution order.
        activation: applied to its output before outputs are compared.
    """

    name: str
    layers: tuple[str, ...]
    activation: Callable[[Tensor], Tensor] | None = None

    @property
    def title(self) -> str:
        return self.name or "network"


def find_units(model: nn.Module, layers: Sequence[str], granularity: Granularity) -> list[Unit]:
    """The units of a float network (batch norms folded), in execution order.

    Args:
        model: network that `layers` names the convolutions and linear layers of.
        layers: paths in execution order.
        granularity: `block`, or `layer` for one unit a layer.

    Raises:
        ValueError: unknown granularity, or a network that torch.fx cannot trace.
    """
    if granularity not in ("layer", "block"):
        raise ValueError(f"granularity must be 'layer' or 'block', got {granularity!r}")
    graph = trace_graph(model)
    blocks = find_blocks(model, graph) if granularity == "block" else []
    grouped: dict[str, list[str]] = {}
    for layer in layers:
        owner = next((b for b in blocks if layer.startswith(b + ".")), layer)
        grouped.setdefault(owner, []).append(layer)
    after = activations_after(model, graph)
    return [Unit(name, tuple(inside), after.get(name)) for name, inside in grouped.items()]


@torch.no_grad()
def unfit(model: nn.Module, names: Collection[str], images: Tensor) -> dict[str, str]:
    """Modules that reconstruction cannot run on their own -> what they do, `takes 2 inputs`.

    Args:
        names: paths of modules, of units and their layers.
        images: [N, C, H, W], a few of any content.
    """
    found = dict.fromkeys(names, "is not called, only what is inside it")
    handles = []
    for name in names:

        def hook(module: nn.Module, args: Any, kwargs: Any, y: Any, name: str = name) -> None:
            found[name] = _misfit(args, kwargs, y, len(images))

        handles.append(model.get_submodule(name).register_forward_hook(hook, with_kwargs=True))
    with evaluated(model, handles):
        model(images)
    return {name: what for name, what in found.items() if what}


def _misfit(args: Sequence[Any], kwargs: Mapping[str, Any], y: Any, images: int) -> str:
    if kwargs:
        return f"is called with {', '.join(kwargs)}=..."
    if len(args) != 1:
        return f"takes {len(args)} inputs"
    for verb, value in (("takes", args[0]), ("gives", y)):
        if not isinstance(value, Tensor):
            return f"{verb} a {type(value).__name__}"
    if not len(args[0]) == len(y) == images:
        return "sees patches of an image, or tokens, in place of the batch"
    return ""


def find_blocks(model: nn.Module, graph: fx.Graph) -> list[str]:
    """Paths of the outermost residual blocks, in module order."""
    modules = dict(model.named_modules())
    fed = _fed(graph)
    classes = set()
    for node in graph.nodes:
        if node.op in ("call_function", "call_method") and node.target in ADDITIONS:
            branches = [a for a in (*node.args, *node.kwargs.values()) if a in fed]
            # The innermost module around the addition that has layers: a block may have a module
            # that only adds. (The stack's keys count calls; its values start with the name.)
            stack = [entry[0] for entry in (node.meta.get("nn_module_stack") or {}).values()]
            owner = next((n for n in reversed(stack) if _has_layers(modules[n])), "")
            if len(branches) == 2 and owner:
                classes.add(type(modules[owner]))
    found: list[str] = []
    for name, module in modules.items():
        inside = any(name.startswith(b + ".") for b in found)
        if name and not inside and type(module) in classes:
            found.append(name)
    return found


def _fed(graph: fx.Graph) -> set[Any]:
    """Nodes that are computed from the image: no parameters, no sizes."""
    fed: set[Any] = set()
    for node in graph.nodes:
        size = node.target in ("size", "dim") or (node.target is getattr and node.args[1] in SIZES)
        if node.op == "placeholder" or (not size and any(n in fed for n in node.all_input_nodes)):
            fed.add(node)
    return fed


def _has_layers(module: nn.Module) -> bool:
    return any(isinstance(m, (nn.Conv2d, nn.Linear)) for m in module.modules())


def activations_after(model: nn.Module, graph: fx.Graph) -> dict[str, Callable[[Tensor], Tensor]]:
    """Layer -> the ReLU or ReLU6 that alone reads its output (folded norms are looked through)."""
    modules = dict(model.named_modules())
    found = {}
    for node in graph.nodes:
        if node.op != "call_module" or not isinstance(
            modules[str(node.target)], (nn.Conv2d, nn.Linear)
        ):
            continue
        reader = _only_reader(node)
        while reader is not None and _kind(reader, modules) is nn.Identity:
            reader = _only_reader(reader)
        if reader is not None and _kind(reader, modules) in ACTIVATIONS:
            found[str(node.target)] = ACTIVATIONS[_kind(reader, modules)]
    return found


def _only_reader(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _kind(node: fx.Node, modules: dict[str, nn.Module]) -> Any:
    return type(modules[str(node.target)]) if node.op == "call_module" else node.target
