"""A network's attention modules, replaced by ones whose projections are layers.

This belongs to building a network, before anything is loaded, trained or quantized: baseline,
teacher, reference and quantized network have one structure. Names that checkpoints had before (a
user's, torchvision's) are translated when they are loaded (`own_names`).

Whether a module's query, key and value are one tensor, and the size of Swin's grid, shows in one
pass on zeros. Left as they are: `nn.MultiheadAttention` with `bias_k` or `add_zero_attn`, of inputs
without a batch dimension, subclasses, what shares a parameter, and what evaluation does not call
exactly once.
"""

from __future__ import annotations

import copy
import inspect
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qexp.models.attention import Attention
from qexp.models.window_attention import WindowAttention

SWIN = "torchvision.models.swin_transformer"
WINDOWED = {(SWIN, "ShiftedWindowAttention"), (SWIN, "ShiftedWindowAttentionV2")}


def open_attention_(model: nn.Module, input_shape: Sequence[int]) -> list[str]:
    """Replace the attention modules of a float network, in place; see the module docstring.

    Random numbers stay as they are, and a network without such modules is not run. One that fails
    on images of this shape is left alone: whoever runs it next says why.

    Args:
        model: newly built, with or without storage (`meta`).
        input_shape: [C, H, W] of one image.

    Returns:
        names of the replaced modules, in execution order.
    """
    owners = Counter(id(p) for m in model.modules() for p in m._parameters.values())
    known = {name: module for name, module in model.named_modules() if _known(module)}
    known = {n: m for n, m in known.items() if all(owners[id(p)] == 1 for p in m.parameters())}
    opened = []
    for name, inputs in _called_once(model, known, input_shape).items() if known else ():
        twin = _twin(known[name], *inputs)
        if twin is not None:
            _put(model, known[name], twin)
            opened.append(name)
    for module in model.modules():
        inside = any(isinstance(m, Attention) for m in module.modules())
        if isinstance(module, nn.TransformerEncoder) and inside:
            module.use_nested_tensor = False  # in eval mode it would pack padded tokens
    return opened


def own_names(model: nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
    """`state` in the names of `model`: it may have those of the modules that were replaced."""
    renamed = dict(state)
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, (Attention, WindowAttention)):
            module.own_names(renamed, f"{name}." if name else "")
    return renamed


def _known(module: nn.Module) -> bool:
    if "forward" in module.__dict__:
        return False
    if type(module) is nn.MultiheadAttention:
        bare = {"in_proj_weight", "q_proj_weight"} <= set(module._parameters)
        return bare and module.bias_k is None and not module.add_zero_attn
    return (type(module).__module__, type(module).__name__) in WINDOWED


def _twin(module: Any, *inputs: Tensor) -> nn.Module | None:
    if not isinstance(module, nn.MultiheadAttention):
        return WindowAttention(module, (inputs[0].shape[1], inputs[0].shape[2]))
    query, key, value = inputs
    if any(x.dim() != 3 or x.is_nested for x in inputs):
        return None
    one = query is key and key is value
    return Attention(module, fused=one and module.in_proj_weight is not None)


@torch.no_grad()
def _called_once(
    model: nn.Module, names: Mapping[str, Any], input_shape: Sequence[int]
) -> dict[str, tuple[Tensor, ...]]:
    """The inputs of those modules that evaluation calls once, in execution order."""
    parameter = next(model.parameters())
    if parameter.is_meta:  # some buffers have storage
        model = copy.deepcopy(model).to("meta")
    seen: dict[str, list[tuple[Tensor, ...]]] = {}

    def keep(name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        given = inspect.signature(module.forward).bind(*args, **kwargs).arguments
        wanted = ("query", "key", "value") if "query" in given else tuple(given)
        seen.setdefault(name, []).append(tuple(given[key] for key in wanted))

    handles = [
        model.get_submodule(name).register_forward_pre_hook(partial(keep, name), with_kwargs=True)
        for name in names
    ]
    try:
        with _evaluated_by_modules(model):
            model(parameter.new_zeros(2, *input_shape))
    except Exception:  # a network may be anyone's
        return {}
    finally:
        for handle in handles:
            handle.remove()
    return {name: calls[0] for name, calls in seen.items() if len(calls) == 1}


@contextmanager
def _evaluated_by_modules(model: nn.Module) -> Iterator[None]:
    """Eval mode inside the block, without torch's fused kernels, which call no attention module."""
    modes = {module: module.training for module in model.modules()}
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    model.eval()
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, training in modes.items():
            module.training = training


def _put(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` in the place of `old`, under every name that it has."""
    for parent in list(model.modules()):
        for child, found in list(parent._modules.items()):
            if found is old:
                setattr(parent, child, new)
