"""What a training step keeps of its activations for backward (`saved=`).

all      what autograd asks for. A convolution asks for its input, so a quantized one keeps a
         float tensor that a float network has not: its quantized input beside the float one.
inputs   the quantized input is computed again from the float one, which stays anyway: a step
         keeps what a float step keeps, plus the few numbers of the quantizers' state.
blocks   only the inputs of residual blocks are kept, and each block's forward runs again in
         backward (activation checkpointing).

Packing the quantized input as codes would keep more than `inputs` does: the gradient of a learned
step needs the float input itself (x_int - x / scale), bit for bit, so codes come on top of it.

Gradients are those of `all`, on a CPU bit for bit: what runs again sees the state it saw the first
time. With `compile=model` the compiler decides what to keep; any mode but `all` then lets it
compute every elementwise result again, convolutions never (`recipes/compilation.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qexp.errors import ConfigError
from qexp.quant.blocks import find_blocks
from qexp.quant.convert import quant_layers
from qexp.quant.fold import trace_graph
from qexp.quant.modules import KEPT


def save_less_(model: nn.Module, saved: str) -> None:
    """Let a quantized network's training steps keep what `saved` says, in place.

    Raises:
        ConfigError: `blocks` of a network that torch.fx cannot trace, or that has none.
    """
    quantize_inputs_again_(model, saved)
    if saved != "blocks":
        return
    try:
        blocks = find_blocks(model, trace_graph(model))
    except ValueError as error:
        raise ConfigError(
            f"config: saved=blocks needs residual blocks: {error}. Use saved=inputs."
        ) from error
    if not blocks:
        raise ConfigError("config: saved=blocks, but the network has none. Use saved=inputs.")
    for name in blocks:
        block = model.get_submodule(name)
        block.forward = partial(_checkpointed, block, block.forward)


def quantize_inputs_again_(model: nn.Module, saved: str) -> None:
    """The part of `save_less_` that layers need again when their quantizers are replaced."""
    for layer in quant_layers(model).values():
        layer.input_again = saved == "inputs" and layer.act_quantizer.replays


def kept_bytes(model: nn.Module, step: Callable[[], None]) -> int:
    """Bytes that `step` keeps for backward: storages counted once, parameters left out.

    What `saved=inputs` keeps of a convolution is its quantizer's input, which is counted there.
    """
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def keep(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    before = KEPT.set(keep)
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            step()
    finally:
        KEPT.reset(before)
    return sum(kept.values())


def _checkpointed(block: nn.Module, forward: Callable[..., Any], *inputs: Any, **named: Any) -> Any:
    if not (block.training and torch.is_grad_enabled()):
        return forward(*inputs, **named)
    contexts = partial(_passes, block)
    return checkpoint(forward, *inputs, use_reentrant=False, context_fn=contexts, **named)


def _passes(block: nn.Module) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Contexts of a block's first forward and of its repetition in backward.

    A forward in training changes buffers: running statistics, counters, codebooks. The repetition
    starts from those the first one found, and leaves those it finds.
    """
    found = _copy(block)
    return nullcontext(), _replayed(block, found)


@contextmanager
def _replayed(block: nn.Module, found: list[Tensor]) -> Iterator[None]:
    now = _copy(block)
    _restore(block, found)
    try:
        yield
    finally:
        _restore(block, now)


def _copy(block: nn.Module) -> list[Tensor]:
    return [b.detach().clone() for b in block.buffers()]


def _restore(block: nn.Module, state: list[Tensor]) -> None:
    for buffer, value in zip(block.buffers(), state, strict=True):
        buffer.data.copy_(value)  # of the data: batch norm has kept the buffer for backward
