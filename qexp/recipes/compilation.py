"""Which parts of a step run compiled.

`off`: nothing. `kernels`: the quantizers' elementwise forward and backward. `model`: the whole
network. `graphs`: the whole network, replayed as CUDA graphs. `auto` takes what should be fastest
over the run's length: compiling costs seconds for the kernels and up to a minute for a network,
and saves a part of each step.

A whole network on a CPU is compiled to keep and write as little as it can: a step there is bound
by memory, not arithmetic. Two defaults of the compiler stand against that (`compiled`):

 1. It writes an elementwise result that is read twice, if more than four tensors go into it. A
    batch norm with its ReLU reads five, and ASQ reads its input twice: for the means and to
    quantize it. Computed twice instead, the input need not exist at all.
 2. It keeps for backward what is used far from where it was made, such as x / scale, though the
    convolution's output, which is kept for batch norm, gives it again for a few operations.

ResNet-8, batch 128, float32, one thread, CPU time of a step against compiled float: ASQ 1.43
before, 1.11 after, LSQ 1.10 and 1.08; kept for backward 1.54 and 1.08 of float (LSQ 1.19, 1.08;
two of its three blocks have kept a float input since, for `PadShortcut`).
On a GPU the compiler's own choices stand: none of this has been measured there.

A third default hurts thin networks in bfloat16: with AVX-512 the compiler's loops take 32 channels
at a time, and where a tensor has 16, they move them one by one. Vectors of 256 bits hold 16
(`thin`). ResNet-20, batch 128, channels_last, one thread, CPU time of a step against eager float:
float 1.08 with 512 bits and 0.95 with 256, LSQ 1.20 and 1.09, ASQ 1.25 and 1.18
(results/bench_train/bf16_full_width and bf16). On a ResNet-18, which has 64 channels and more, 256
bits take float from 1.03 to 1.17 (by hand, not kept).

`graphs` is `torch.compile(mode="reduce-overhead")`: one call starts all kernels of a forward or a
backward, which pays where they are so short that starting them takes longest. `auto` never takes
it: it has not been measured, nor run on a GPU yet. It asks for three things:

 1. Results lie in memory that the next replay writes again. So each forward begins a new step, and
    the gradients of earlier micro-batches are copied out first (`_replayed`).
 2. What a forward changes must stay where it is: parameters and buffers do (running statistics,
    counters, codebooks). A graph that changes another of its inputs, or has one on the CPU, is run
    compiled without replay; TORCH_LOGS=cudagraphs says so, and why.
 3. Shapes stay the same: each new one is recorded anew. Evaluation runs the network eagerly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, wraps
from typing import Any, TypeVar, cast

import torch
import torch._functorch.config
from torch import Tensor, nn

from qexp.errors import ConfigError
from qexp.quant.convert import quant_layers, quantizers
from qexp.quant.functional import VARIANTS, compile_kernels, vector_width
from qexp.quant.trace import Layer
from qexp.recipes.saving import save_less_
from qexp.runner.device import compiler_available, keep_memory
from qexp.runner.run import Run

Recipe = TypeVar("Recipe", bound=Callable[..., Any])

# Multiply-accumulates of a whole training run (forward; backward is twice that) above which
# compiling pays on two CPU cores: about 40 s and 4 minutes of float training.
KERNELS_PAY = 1e12
MODEL_PAYS = 1e13

WHOLE = ("model", "graphs")  # modes that compile the whole network

# Tensors that may be read to compute an elementwise result again instead of writing it.
READS = 16
# What the compiler would not compute again in backward.
AGAIN = {"ban_recompute_used_far_apart": False, "ban_recompute_long_fusible_chains": False}
# `saved` other than `all`: operands of convolutions are computed again too.
OPERANDS = {"ban_recompute_materialized_backward": False}
# Channels of bfloat16 in the widest vector, and the bits of one with half as many.
CHANNELS, HALF_WIDTH = 32, 256
# What torch.compile's mode="reduce-overhead" stands for; a mode and a backend exclude each other.
REPLAY = {"triton.cudagraphs": True}


def refuse_graphs(mode: str | None, device: torch.device, in_parts: str | None = None) -> None:
    """Raise a ConfigError where `graphs` is asked for and cannot be had.

    Args:
        in_parts: the name of the recipe, if it learns the network part by part.
    """
    if mode == "graphs" and device.type != "cuda":
        raise ConfigError(
            f"config: compile=graphs replays CUDA graphs, and the device here is {device}. "
            "Use compile=model, or device=cuda."
        )
    if mode == "graphs" and in_parts:
        raise ConfigError(
            f"config: compile=graphs records the whole network, and recipe={in_parts} learns it "
            "part by part. Use compile=kernels."
        )


def compiled(
    model: nn.Module,
    device: torch.device,
    saved: str = "all",
    *,
    graphs: bool = False,
    half_width: bool = False,
    **options: Any,
) -> Callable[[Tensor], Tensor]:
    """`model` through `torch.compile` for training; on a CPU, with little memory traffic.

    Args:
        saved: `all`, or another mode of `recipes/saving.py`: convolutions' operands are computed
            again in backward, so that less is kept than in float.
        graphs: replay forward and backward as CUDA graphs.
        half_width: vectors of 256 bits where a CPU has wider ones (`thin`).
    """
    limit = torch._dynamo.config.recompile_limit  # a graph for each stage of widths
    torch._dynamo.config.recompile_limit = max(limit, VARIANTS)
    backend = _backend(device.type == "cpu", saved != "all", graphs, half_width)
    forward = torch.compile(model, backend=backend, **options)
    return _replayed(model, forward) if graphs else forward


def _replayed(model: nn.Module, forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """`forward`, each call of which begins a step of its own, after the last one's backward.

    With several micro-batches a step, the gradients so far lie where the next replay writes.
    """

    def begin(x: Tensor) -> Tensor:
        shared = [m.w_hat for m in quant_layers(model).values() if m.w_hat is not None]
        for leaf in (*model.parameters(), *shared):
            if leaf.grad is not None:
                leaf.grad = leaf.grad.clone()
        torch.compiler.cudagraph_mark_step_begin()
        return forward(x)

    return begin


def eager_afterwards(recipe: Recipe) -> Recipe:
    """Decorate a recipe: when it ends kernels run eagerly again, and no graph is kept.

    What follows in the same process, a sweep's next job or the run that had its float network
    trained, calibrates before it compiles.
    """

    @wraps(recipe)
    def run(*args: Any, **options: Any) -> Any:
        try:
            return recipe(*args, **options)
        finally:
            compile_kernels(False)
            torch.compiler.reset()  # what CUDA graphs hold

    return cast(Recipe, run)


def thin(layers: Sequence[Layer]) -> bool:
    """Whether most of what the convolutions write has fewer channels than a loop takes in bfloat16.

    Their outputs stand for all activations: batch norm, ReLU and quantizers go over the same.
    """
    written = [
        (layer.macs * layer.weight_shape[0] // layer.weights, layer.weight_shape[0] < CHANNELS)
        for layer in layers
        if layer.kind != "linear"
    ]
    return 2 * sum(n for n, below in written if below) > sum(n for n, _ in written)


@cache  # one backend is one set of compiled graphs, shared by equal networks
def _backend(
    on_cpu: bool, operands_again: bool, graphs: bool, half_width: bool
) -> Callable[..., Any]:
    again = (AGAIN if on_cpu else {}) | (OPERANDS if operands_again else {})
    patches = ({"realize_reads_threshold": READS} if on_cpu else {}) | (REPLAY if graphs else {})

    def backend(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Any:
        from torch._inductor.compile_fx import compile_fx

        width = vector_width()
        if half_width:
            width = {key: min(bits, HALF_WIDTH) for key, bits in width.items()}
        with torch._functorch.config.patch(again):
            return compile_fx(graph, inputs, config_patches=patches | width)

    if graphs:
        # torch.compiler.reset() asks each backend to forget: recorded graphs hold memory till then.
        from torch._inductor.cudagraph_trees import reset_cudagraph_trees

        backend.reset = reset_cudagraph_trees  # type: ignore[attr-defined]
    return backend


def choose(mode: str, layers: Sequence[Layer], images: int, device: torch.device) -> str:
    """Resolve `auto` from the work of the whole run."""
    if mode != "auto":
        return mode
    macs = sum(layer.macs for layer in layers) * images
    if device.type == "cuda":
        macs /= 100  # a GPU does the work two orders faster; compiling takes as long
    return "model" if macs > MODEL_PAYS else "kernels" if macs > KERNELS_PAY else "off"


def compile_for(
    mode: str,
    model: nn.Module,
    layers: Sequence[Layer],
    images: int,
    device: torch.device,
    run: Run,
    saved: str = "all",
    amp: bool = False,
) -> Callable[[Tensor], Tensor]:
    """The callable that trains `model`, compiled as `mode` says; falls back to eager, saying so.

    Args:
        amp: it trains under bfloat16 autocast.
    """
    chosen = choose(mode, layers, images, device)
    if mode == "auto" and not all(q.fuses for q in quantizers(model).values()):
        chosen = "kernels" if chosen == "model" else chosen
    compile_kernels(False)
    if device.type == "cpu":
        keep_memory()
    if chosen != "off":
        available, reason = compiler_available(device)
        if not available:
            run.warn(f"compile={chosen} is not possible here ({reason}); running eagerly")
            chosen = "off"
    run.info(f"compile: {chosen}" + (" (auto)" if mode == "auto" else ""))
    if chosen != "off":
        torch.compiler.reset()  # graphs of earlier runs in this process count against a limit
    if chosen in WHOLE:
        half = amp and thin(layers)
        return compiled(model, device, saved, graphs=chosen == "graphs", half_width=half)
    compile_kernels(chosen == "kernels")
    save_less_(model, saved)
    return model
