"""G-STE on a CPU in one pass: `gste_native.cpp`, built by the machine's own compiler at first use.

What torch.compile makes of N2UQ's backward (`n2uq`) is several passes, because sums by segment are
a scatter, which it writes as scalar code and cannot fuse. Here forward is one pass, backward
another: a search of log2(segments) steps in registers, and a masked addition for each segment.
Backward of 2 M float32 elements behind a ReLU at 2, 3 and 4 bits, one thread: 0.5, 0.9 and 1.4 ms
with AVX-512, 1.0, 1.5 and 3.2 ms with AVX2, 6, 9 and 13 ms with neither; torch's passes 9.8 ms at 4
bits (by hand, not kept; whole steps: results/bench_train).

Several threads are torch's own, by OpenMP: others would wait for a core, as torch's spin between
its loops (on two cores ten times the time, between two of torch's operators; by hand, not kept).

The operators are opaque to torch.compile: a graph keeps its one piece and goes around them. Without
a compiler, on other devices, for other dtypes or more than 15 segments, `available` is false and
`gste` computes the same in torch.
"""

from __future__ import annotations

import ctypes
import hashlib
import itertools
import os
import platform
import shutil
import subprocess
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_suffix(".cpp")
SEGMENTS = (3, 7, 15)
# Any memory order will do: the compiler need not copy to the one that was traced.
TAGS = (torch.Tag.flexible_layout,)
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
FLAGS = ("-O3", "-std=c++17", "-fPIC", "-shared", "-pthread", "-fno-math-errno",
         "-fno-trapping-math", "-ffp-contract=off")  # fmt: skip
MACHINE = ("-march=native", "-mcpu=native", "")  # what compilers call this machine; the first taken
THREADS = ("-fopenmp", "")  # torch's threads, else the library starts some


@torch.compiler.assume_constant_result
def available() -> bool:
    """Whether the operators can run here; builds them when first asked."""
    return _library() is not None


def takes(x: Tensor, segments: int) -> bool:
    """Whether the operators are for this tensor and number of segments."""
    return x.device.type == "cpu" and x.dtype in DTYPES and segments in SEGMENTS and available()


@torch.library.custom_op("qexp::gste_forward", mutates_args=(), tags=TAGS)
def gste_forward(x: Tensor, thresholds: Tensor, step: Tensor, qmin: int) -> Tensor:
    """step * (qmin + #{i: x > thresholds[i]}). Shape: x any; thresholds [m]; step []; as x."""
    dense = _dense(x)
    y = torch.empty_like(dense)
    table = thresholds.float().contiguous()
    _function("forward", x, len(table))(
        *_pointers(dense, y),
        x.numel(),
        *_pointers(table),
        step.item(),
        qmin,
        torch.get_num_threads(),
    )
    return y if dense is x else torch.empty_like(x).copy_(y)


@gste_forward.register_fake
def _(x: Tensor, thresholds: Tensor, step: Tensor, qmin: int) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("qexp::gste_backward", mutates_args=(), tags=TAGS)
def gste_backward(
    grad: Tensor, x: Tensor, borders: Tensor, step: Tensor, qmin: int
) -> tuple[Tensor, Tensor]:
    """The backward of `n2uq`'s module docstring.

    Returns:
        dL/dx, as x; sums float64 [2 m + 1]: of g by segment, of g * f by segment, of e * code.
    """
    dense = _dense(x)
    alike = grad.dtype == dense.dtype and grad.stride() == dense.stride()
    e = grad if alike else torch.empty_like(dense).copy_(grad)
    grad_x = torch.empty_like(dense)
    table = borders.float().contiguous()
    segments = len(table) - 1
    sums = torch.empty(2 * segments + 1, dtype=torch.float64)
    _function("backward", x, segments)(
        *_pointers(e, dense, grad_x),
        x.numel(),
        *_pointers(table),
        step.item(),
        qmin,
        *_pointers(sums),
        torch.get_num_threads(),
    )
    return grad_x if dense is x else torch.empty_like(x).copy_(grad_x), sums


@gste_backward.register_fake
def _(grad: Tensor, x: Tensor, borders: Tensor, step: Tensor, qmin: int) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), borders.new_empty(2 * borders.shape[0] - 1, dtype=torch.float64)


def _dense(x: Tensor) -> Tensor:
    """`x`, or a copy without gaps: elements are visited in memory order."""
    return x if torch.ops.aten.is_non_overlapping_and_dense(x) else x.contiguous()


def _pointers(*tensors: Tensor) -> list[ctypes.c_void_p]:
    return [ctypes.c_void_p(t.data_ptr()) for t in tensors]


@cache
def _signature(direction: str) -> list[type]:
    pointer, tail = ctypes.c_void_p, [ctypes.c_float, ctypes.c_float]
    if direction == "forward":
        return [pointer, pointer, ctypes.c_int64, pointer, *tail, ctypes.c_int]
    return [pointer, pointer, pointer, ctypes.c_int64, pointer, *tail, pointer, ctypes.c_int]


def _function(direction: str, x: Tensor, segments: int) -> ctypes._NamedFuncPointer:
    library = _library()
    assert library is not None
    found = getattr(library, f"gste_{direction}_{DTYPES[x.dtype]}_{segments}")
    found.argtypes, found.restype = _signature(direction), None
    return found


# ---------------------------------------------------------------------------------------------
# Build


@cache
def _library() -> ctypes.CDLL | None:
    """The library, built unless it is in the cache; None where that is not possible."""
    for compiler in _compilers():
        try:
            name = f"gste-{_fingerprint(compiler)}.so"
            with tempfile.TemporaryDirectory() as scratch:
                for folder in (_cache_folder, lambda: Path(scratch)):
                    with suppress(OSError, RuntimeError):  # no home, or not to be written
                        return _loaded(compiler, folder() / name)
        except (OSError, subprocess.SubprocessError):
            continue  # it does not take the source
    return None


def _loaded(compiler: str, path: Path) -> ctypes.CDLL:
    """The library at `path`, which is built if it is not there or cannot be loaded."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    if path.is_file():
        with suppress(OSError):
            return ctypes.CDLL(str(path))
    _build(compiler, path)
    return ctypes.CDLL(str(path))


def _compilers() -> list[str]:
    names = [os.environ.get("CXX", ""), "g++", "clang++", "c++"]
    return [found for name in names if name and (found := shutil.which(name))]


def _build(compiler: str, path: Path) -> None:
    """Compile to `path`, which appears whole or not at all."""
    handle, name = tempfile.mkstemp(suffix=".part", dir=path.parent)
    os.close(handle)
    part = Path(name)
    try:
        for machine, threads in itertools.product(MACHINE, THREADS):
            options = [*FLAGS, *machine.split(), *threads.split()]
            command = [compiler, *options, str(SOURCE), "-o", str(part)]
            if subprocess.run(command, capture_output=True, timeout=300).returncode == 0:
                part.replace(path)
                return
        raise subprocess.SubprocessError(f"{compiler} does not take {SOURCE.name}")
    finally:
        part.unlink(missing_ok=True)


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "qexp"


def _fingerprint(compiler: str) -> str:
    """Of source, compiler and processor: a library for another machine would not run here."""
    version = subprocess.run([compiler, "--version"], capture_output=True, timeout=60).stdout
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        processor = platform.node()
    flags = " ".join((*FLAGS, *MACHINE, *THREADS))
    parts = [SOURCE.read_bytes(), version, processor.encode(), flags.encode()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
