"""An ONNX model in onnxruntime, as a function of torch tensors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor


def session(model: bytes | Path, threads: int | None = None) -> Callable[[Tensor], Tensor]:
    """A function from images [N, C, H, W] to logits [N, classes], on the CPU.

    Args:
        threads: of one operation; None: onnxruntime's choice. Idle ones do not spin.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    source = str(model) if isinstance(model, Path) else model
    found = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    name = found.get_inputs()[0].name

    def run(x: Tensor) -> Tensor:
        return torch.from_numpy(found.run(None, {name: x.contiguous().numpy()})[0])

    return run
