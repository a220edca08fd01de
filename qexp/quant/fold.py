"""Batch norm folded into the convolution before it.

In eval mode a batch norm is an affine map per channel, so conv followed by norm is one convolution:

    k = gamma / sqrt(var + eps)        [C_out]
    weight' = weight * k[:, None, ...],   bias' = (bias - mean) * k + beta

The pairs are read off the traced graph (torch.fx), not guessed from names or from the order of
children: a norm is folded only where its input is the output of a convolution that nothing else
reads, where both modules run exactly once, and where the norm computes what torch's own does. The
module tree and every name stay; a folded norm becomes `nn.Identity`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import fx, nn

from qexp.quant.convert import replace_
from qexp.quant.trace import evaluated

LEAVES = (nn.Conv2d, nn.Linear, nn.modules.batchnorm._BatchNorm)


class Fold(NamedTuple):
    """What happened to one batch norm: the convolution that took it, or why none did."""

    norm: str
    conv: str | None
    note: str


class _Tracer(fx.Tracer):
    """Sees through everything but torch's own modules and subclasses of `LEAVES`."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, LEAVES) or super().is_leaf_module(m, module_qualified_name)


def trace_graph(model: nn.Module) -> fx.Graph:
    """The graph of `model` in eval mode in torch.fx.

    Raises:
        ValueError: its forward cannot be traced.
    """
    try:
        with evaluated(model):
            return _Tracer().trace(model)
    except Exception as error:  # fx raises whatever the forward does with a proxy
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{type(model).__name__} cannot be traced by torch.fx: {reason}"
        ) from error


def calls(graph: fx.Graph) -> dict[str, int]:
    """How often the graph calls each module, by name."""
    count: dict[str, int] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            count[str(node.target)] = count.get(str(node.target), 0) + 1
    return count


@torch.no_grad()
def fold_bn_(model: nn.Module) -> list[Fold]:
    """Fold every batch norm that follows a convolution into it, in place.

    The network must be meant for eval mode: running statistics are what is folded.

    Returns:
        One `Fold` a batch norm, in execution order.
    """
    graph = trace_graph(model)
    modules: dict[str, Any] = dict(model.named_modules())
    count = calls(graph)
    read = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
    report = []
    for node in graph.nodes:
        if node.op != "call_module" or not isinstance(modules[str(node.target)], nn.BatchNorm2d):
            continue
        name = str(node.target)
        (source,) = node.all_input_nodes
        conv = modules.get(str(source.target)) if source.op == "call_module" else None
        if not isinstance(conv, nn.Conv2d):
            report.append(Fold(name, None, "its input is not a convolution"))
        elif len(source.users) > 1:
            report.append(Fold(name, None, f"the output of {source.target} is read elsewhere too"))
        elif count[name] > 1 or count[str(source.target)] > 1:
            report.append(Fold(name, None, "called more than once"))
        elif sum(m._parameters.get("weight") is conv.weight for m in modules.values()) > 1:
            report.append(Fold(name, None, f"{source.target} shares its weight"))
        elif "weight" not in conv._parameters:  # weight_norm and the like: what is scaled is lost
            report.append(Fold(name, None, f"{source.target} computes its weight in each pass"))
        elif _own_forward(conv):
            report.append(Fold(name, None, f"{source.target} has a forward of its own"))
        elif {f"{source.target}.weight", f"{source.target}.bias"} & read:
            report.append(Fold(name, None, f"the weight of {source.target} is read elsewhere too"))
        elif type(modules[name]).forward is not nn.BatchNorm2d.forward:
            report.append(Fold(name, None, "it has a forward of its own"))
        elif modules[name].running_var is None:
            report.append(Fold(name, None, "no running statistics"))
        else:
            _fold(conv, modules[name])
            replace_(model, name, nn.Identity())
            report.append(Fold(name, str(source.target), "folded"))
    return report


def _own_forward(conv: nn.Conv2d) -> bool:
    own, plain = type(conv), nn.Conv2d
    return own.forward is not plain.forward or own._conv_forward is not plain._conv_forward


def _fold(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    mean, var = norm.running_mean, norm.running_var
    assert mean is not None  # comes with running_var, which the caller checked
    assert var is not None
    gamma = norm.weight if norm.affine else torch.ones_like(mean)
    beta = norm.bias if norm.affine else torch.zeros_like(mean)
    k = gamma / (var + norm.eps).sqrt()  # [C_out]
    bias = torch.zeros_like(mean) if conv.bias is None else conv.bias
    conv.weight.mul_(k.reshape(-1, 1, 1, 1))
    conv.bias = nn.Parameter((bias - mean) * k + beta)
