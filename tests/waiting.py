"""Find operations that make the CPU wait for a GPU, without one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# Operations whose result, or its shape, must be known on the host before anything else can run.
WAITS = (
    "_local_scalar_dense", "nonzero", "masked_select", "_unique", "unique_dim", "is_nonzero",
    "equal", "index.Tensor_hacked_twin",
)  # fmt: skip


class Watch(TorchDispatchMode):
    """Collects the names of operations that wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.split(".")[0]
        boolean_index = name == "index" and any(
            isinstance(i, Tensor) and i.dtype == torch.bool for i in args[1]
        )
        if name in WAITS or boolean_index:
            self.waits.append(func.__name__)
        return func(*args, **(kwargs or {}))
