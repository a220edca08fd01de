"""Which parts of a step run compiled.

`off`: nothing. `kernels`: the quantizers' elementwise forward and backward. `model`: the whole
network. `auto` takes what should be fastest over the run's length: compiling costs seconds for
the kernels and up to a minute for a network, and saves a part of each step.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from qexp.quant.functional import compile_kernels
from qexp.quant.trace import Layer
from qexp.runner.device import compiler_available, keep_memory
from qexp.runner.run import Run

# Multiply-accumulates of a whole training run (forward; backward is twice that) above which
# compiling pays on two CPU cores: about 40 s and 4 minutes of float training.
KERNELS_PAY = 1e12
MODEL_PAYS = 1e13


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
) -> Callable[[Tensor], Tensor]:
    """The callable that trains `model`, compiled as `mode` says; falls back to eager, saying so."""
    chosen = choose(mode, layers, images, device)
    compile_kernels(False)
    if device.type == "cpu":
        keep_memory()
    if chosen != "off":
        available, reason = compiler_available(device)
        if not available:
            run.warn(f"compile={chosen} is not possible here ({reason}); running eagerly")
            chosen = "off"
    run.info(f"compile: {chosen}" + (" (auto)" if mode == "auto" else ""))
    # A missing CUDA runtime is no news on a CPU machine.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    if chosen != "off":
        torch.compiler.reset()  # graphs of earlier runs in this process count against a limit
    if chosen == "kernels":
        compile_kernels(True)
    if chosen == "model":
        return torch.compile(model)
    return model
