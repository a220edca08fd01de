"""Several processes train one network: `torchrun --nproc-per-node=N -m qexp train ...`.

torchrun starts the processes, watches them and starts them again when one dies; here is what
they say to each other. Process 0 leads: it owns the run's folder, decides the bit-widths,
calibrates and saves; the others take its state and write nothing. Each step all of them together
take the next `batch_size * size` images of the epoch's order, and the mean of their gradients is
that of one process with the larger batch. Batch norm sees only its own process's images unless
`sync_bn=true`; its running statistics are then, and always, those of process 0.

Gradients are averaged in one message after backward, not bucket by bucket during it: the same
code serves eager, compiled and changing networks (`bitwidth=progressive`), and for the networks
compared here the message is small beside the step (a ResNet-18 has 47 MB of gradients).

Without torchrun every function below does nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from qexp.errors import ConfigError

T = TypeVar("T")

# Longer than process 0 may train a float baseline while the others wait. A process that dies is
# noticed by torchrun, not by this.
PATIENCE = timedelta(days=7)


class World(NamedTuple):
    """Which of how many processes this one is; `local` counts on this machine."""

    rank: int = 0
    size: int = 1
    local: int = 0

    @property
    def leads(self) -> bool:
        """Whether this process owns the run's folder."""
        return self.rank == 0


_world = World()


def launched() -> World:
    """What torchrun said in the environment; one process without it."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 or "RANK" not in os.environ:
        return World()
    return World(int(os.environ["RANK"]), size, int(os.environ.get("LOCAL_RANK", "0")))


def restarts() -> int:
    """How often torchrun has started these processes again after one died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) if launched().size > 1 else 0


def world() -> World:
    """The processes that train together now: one, outside `together` and inside `alone`."""
    return _world


@contextmanager
def together(device: str) -> Iterator[World]:
    """Join the other processes for the block: over nccl on GPUs, else gloo."""
    global _world
    here = launched()
    if here.size == 1:
        yield here
        return
    on_gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    if on_gpu:
        if ":" in device:
            raise ConfigError(
                f"config: device={device} puts every process on one GPU. Use device=cuda: "
                "torchrun gives each process its own."
            )
        if here.local >= torch.cuda.device_count():
            raise ConfigError(
                f"run: process {here.local} of this machine wants a GPU of its own, and there are "
                f"{torch.cuda.device_count()}. Use --nproc-per-node={torch.cuda.device_count()}."
            )
        torch.cuda.set_device(here.local)
    # torchrun's store outlives a restart: without a prefix the processes would look for the dead.
    store, rank, size = next(iter(rendezvous("env://", timeout=PATIENCE)))
    store = PrefixStore(f"attempt_{restarts()}", store)
    backend = "nccl" if on_gpu else "gloo"
    dist.init_process_group(backend, timeout=PATIENCE, store=store, rank=rank, world_size=size)
    _world = here
    try:
        yield here
    except BaseException:
        # The others may wait inside a collective. nccl's orderly end would wait for them, forever;
        # torchrun ends them once this process is gone.
        _world = World()
        if on_gpu:
            dist.distributed_c10d._abort_process_group()
        else:
            dist.destroy_process_group()
        raise
    _world = World()
    dist.destroy_process_group()


@contextmanager
def alone() -> Iterator[None]:
    """This process works for itself inside the block."""
    global _world
    before, _world = _world, World()
    try:
        yield
    finally:
        _world = before


# ---------------------------------------------------------------------------------------------
# What is said


def told(value: T) -> T:
    """What process 0 passes, in every process. Plain data."""
    if _world.size == 1:
        return value
    said: list[Any] = [value]
    dist.broadcast_object_list(said, src=0)
    return said[0]


def led(work: Callable[[], T]) -> T:
    """What `work` returns in process 0, which does it alone while the others wait."""
    if _world.size == 1:
        return work()
    if not _world.leads:
        return told(None)  # type: ignore[return-value]
    with alone():
        value = work()
    return told(value)


def own_random_numbers(seed: int, step: int) -> None:
    """Give each process but 0 a stream of its own from `step` on: dropout masks must differ.

    Called where a run begins, resumes or saves, so that it goes on alike after each checkpoint.
    """
    if not _world.leads:
        torch.manual_seed(((seed * _world.size + _world.rank) * 1_000_003 + step) % 2**63)


@torch.no_grad()
def share_(model: nn.Module, *, buffers_only: bool = False) -> None:
    """Give every process the parameters and buffers of process 0."""
    if _world.size == 1:
        return
    state = [*model.buffers()] if buffers_only else [*model.parameters(), *model.buffers()]
    for tensor in state:
        same = tensor.contiguous()  # a channels_last weight travels in logical order
        dist.broadcast(same, src=0)
        tensor.copy_(same)


@torch.no_grad()
def average_(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by its mean over the processes; one message."""
    if _world.size == 1 or not tensors:
        return
    flat = torch.cat([t.reshape(-1).float() for t in tensors])
    dist.all_reduce(flat)
    flat /= _world.size
    for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view(tensor.shape))


def total(values: Tensor) -> Tensor:
    """The sum of `values` over the processes."""
    if _world.size == 1:
        return values
    device = "cuda" if dist.get_backend() == "nccl" else values.device
    on_wire = values.to(device, copy=True, memory_format=torch.contiguous_format)
    dist.all_reduce(on_wire)
    return on_wire.to(values.device)


# ---------------------------------------------------------------------------------------------
# Batch norm over all processes


class _Sum(torch.autograd.Function):
    """The sum of a tensor over the processes, whose gradient is the sum of theirs.

    Not `torch.distributed.nn.functional.all_reduce`: a default argument of it holds the first
    group that it met, for good, so that its threads outlive `together` and now and then abort
    the interpreter at its exit.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return total(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return _summed(grads[0])


def _summed(x: Tensor) -> Tensor:
    out = _Sum.apply(x)
    assert isinstance(out, Tensor)
    return out


class SyncBatchNorm2d(nn.BatchNorm2d):
    """Batch norm whose batch is that of all processes together, on any device.

    torch's own needs a GPU. Mean and variance are means over equally large batches, taken one
    after the other: E[(x - mean)^2] keeps the digits that E[x^2] - mean^2 loses.
    Shape: x [N, C, H, W] -> the same.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or _world.size == 1:
            return super().forward(input)
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        x = input.float()
        mean = _summed(x.mean((0, 2, 3))) / _world.size  # [C]
        centred = x - mean[:, None, None]
        var = _summed(centred.square().mean((0, 2, 3))) / _world.size
        with torch.no_grad():
            self.num_batches_tracked += 1
            momentum = self.momentum
            if momentum is None:  # cumulative average
                momentum = 1 / float(self.num_batches_tracked)
            count = x.numel() // x.shape[1] * _world.size
            self.running_mean.lerp_(mean, momentum)
            self.running_var.lerp_(var * (count / (count - 1)), momentum)
        y = centred * torch.rsqrt(var + self.eps)[:, None, None]
        if self.weight is not None:
            y = y * self.weight[:, None, None] + self.bias[:, None, None]
        return y.to(input.dtype)


def sync_bn_(model: nn.Module) -> int:
    """Turn every `nn.BatchNorm2d` into its synchronised twin, in place; returns how many.

    Parameters, buffers and their names stay.
    """
    norms = [m for m in model.modules() if type(m) is nn.BatchNorm2d]
    for norm in norms:
        norm.__class__ = SyncBatchNorm2d
    return len(norms)
