"""G-STE in one pass on a CPU equals what torch computes, whatever the layout and the size."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qexp.quant import gste_native as gste
from qexp.quant.functional import SMALL, compile_kernels, midpoints
from qexp.quant.n2uq import N2UQ

FORMATS = (torch.contiguous_format, torch.channels_last)

needs_compiler = pytest.mark.skipif(not gste.available(), reason="no C++ compiler that works")


@pytest.fixture(autouse=True)
def eager_afterwards() -> Iterator[None]:
    yield
    compile_kernels(False)


@pytest.fixture(
    scope="module", params=["", "-march=x86-64-v3", "-march=x86-64"], ids=["native", "avx2", "sse"]
)
def machine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator:
    """This machine, and older ones that it can stand for."""
    if request.param:
        has = torch.backends.cpu.get_cpu_capability()
        if has not in ("AVX2", "AVX512") or platform.machine() not in ("x86_64", "AMD64"):
            pytest.skip("not such a processor")
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
            patch.setattr(gste, "MACHINE", (request.param,))
            gste._library.cache_clear()
            if not gste.available():
                pytest.skip("the compiler does not know it")
            yield
    else:
        yield
    gste._library.cache_clear()


def borders_of(segments: int) -> Tensor:
    lengths = torch.rand(segments, generator=torch.Generator().manual_seed(segments)) + 0.2
    return torch.cat([torch.tensor([-0.3]), lengths.cumsum(0) - 0.3])


def values(n: int, borders: Tensor) -> Tensor:
    """Noise with ties at all borders and thresholds, zeros as after a ReLU, and extremes."""
    x = 2 * torch.randn(n, generator=torch.Generator().manual_seed(n))
    ties = torch.cat([borders, midpoints(borders), torch.tensor([0.0, torch.inf, -torch.inf])])
    x[: len(ties)] = ties[:n]
    x[len(ties) + 20 :: 3] = 0
    return x


def exactly(grad: Tensor, x: Tensor, borders: Tensor, step: float, qmin: int) -> list[Tensor]:
    """The backward in float64, from the equations in n2uq's docstring; scales of its sums too."""
    z, e, b = x.double(), grad.double(), borders.double()
    m = len(b) - 1
    segment = torch.bucketize(z, b[1:-1])
    length = (b[1:] - b[:-1])[segment]
    inside = (z > b[0]) & (z <= b[-1])
    zero = torch.zeros((), dtype=torch.float64)
    g = torch.where(inside, e * step / length, zero)
    gf = torch.where(inside, g * (z - b[segment]) / length, zero)
    code = torch.bucketize(z, midpoints(borders).double()) + qmin
    sums = [torch.zeros(m).double().index_add_(0, segment, t) for t in (g, gf)]
    sizes = [torch.zeros(m).double().index_add_(0, segment, t.abs()) for t in (g, gf)]
    return [
        g,
        torch.cat([*sums, (e * code).sum().view(1)]),
        torch.cat([*sizes, (e * code).abs().sum().view(1)]),
    ]


@needs_compiler
@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("dtype", gste.DTYPES)
@pytest.mark.parametrize("segments", gste.SEGMENTS)
def test_both_passes_are_the_equations(segments: int, dtype: torch.dtype) -> None:
    borders, step = borders_of(segments), torch.tensor(0.3)
    for n in (1, 15, 16, 17, 40, 3 * gste_chunk() + 5):
        x = values(n, borders).to(dtype)
        grad = torch.randn(n, generator=torch.Generator().manual_seed(n)).to(dtype)
        y = gste.gste_forward(x, midpoints(borders), step, -2)
        count = torch.bucketize(x.float(), midpoints(borders))
        assert torch.equal(y, ((count - 2.0) * step).to(dtype))
        grad_x, sums = gste.gste_backward(grad, x, borders, step, -2)
        finite = x.isfinite()
        g, expected, size = exactly(grad[finite], x[finite], borders, 0.3, -2)
        # +-inf has no slope, and its code is the last or the first
        ends = torch.where(x > 0, segments - 2.0, -2.0).double() * grad.double()
        expected[-1] += ends[~finite].sum()
        torch.testing.assert_close(grad_x[finite], g.to(dtype), rtol=2e-6, atol=0.0)
        assert bool((grad_x[~finite] == 0).all())
        assert bool(((sums - expected).abs() <= 3e-6 * (size + ends.abs().sum()) + 1e-12).all())


def gste_chunk() -> int:
    return 1 << 14  # of gste_native.cpp: more than one for each thread


@needs_compiler
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", gste.DTYPES)
def test_a_quantizer_has_the_same_values_and_gradients(
    dtype: torch.dtype, layout: torch.memory_format, bits: int
) -> None:
    dice = torch.Generator().manual_seed(bits)
    q = N2UQ(bits, signed=False)
    x = torch.randn(5, 9, 31, 33, generator=dice).relu_()
    assert x.numel() > SMALL
    q.calibrate(x)
    with torch.no_grad():
        q.lengths *= 1 + 0.3 * torch.rand(q.segments, generator=dice)
    x = x.to(dtype).to(memory_format=layout)
    e = torch.randn(x.shape, generator=dice).to(dtype)
    found = []
    for compiled in (False, True):
        compile_kernels(compiled)
        own = x.clone().requires_grad_()
        q.zero_grad()
        y = q(own)
        y.backward(e)  # of another layout than x if that is channels_last
        assert own.grad is not None
        found.append([y.detach(), own.grad, *(p.grad for p in q.parameters())])
    eager, native = found
    assert torch.equal(eager[0], native[0])
    assert native[1].stride() == x.stride()
    for a, b in zip(eager[1:], native[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=1e-6 * float(a.abs().max()))


@needs_compiler
def test_several_threads_and_gaps_in_memory() -> None:
    borders, step = borders_of(15), torch.tensor(0.1)
    whole = values(100_000, borders).view(1000, 100)
    grad = torch.randn(whole.shape, generator=torch.Generator().manual_seed(0))
    threads = torch.get_num_threads()
    try:
        for x, e in ((whole, grad), (whole[:, 10:90], grad[:, 10:90]), (whole.t(), grad.t())):
            torch.set_num_threads(1)
            y = gste.gste_forward(x, midpoints(borders), step, 0)
            one = gste.gste_backward(e, x, borders, step, 0)
            torch.set_num_threads(3)
            assert torch.equal(y, gste.gste_forward(x, midpoints(borders), step, 0))
            three = gste.gste_backward(e, x, borders, step, 0)
            assert torch.equal(one[0], three[0])
            torch.testing.assert_close(one[1], three[1], rtol=1e-6, atol=1e-4)
            assert torch.equal(y, torch.bucketize(x.contiguous(), midpoints(borders)) * step)
    finally:
        torch.set_num_threads(threads)


THREADS = """
import os, torch
from qexp.quant import gste_native as gste

torch.set_num_threads(3)
x, borders, step = torch.randn(1 << 18), torch.linspace(0, 2, 16), torch.tensor(0.1)
x.mul(2)
before = os.listdir("/proc/self/task")
gste.gste_forward(x, borders[1:], step, 0)
gste.gste_backward(x, x, borders, step, 0)
x.mul(2)
print(len(before) >= 3, os.listdir("/proc/self/task") == before, gste._library()._name)
"""


@needs_compiler
@pytest.mark.skipif(platform.system() != "Linux", reason="/proc")
def test_the_threads_are_torchs_own() -> None:
    """Others wait for a core that torch's own, which spin, do not leave: ten times the time."""
    command = [sys.executable, "-c", THREADS]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    many, same, library = printed.split()
    assert many == same == "True"
    assert b"GOMP_parallel" in Path(library).read_bytes() or not shutil.which("g++")


@needs_compiler
@pytest.mark.usefixtures("machine")
def test_a_nan_is_above_all_thresholds_and_has_no_gradient() -> None:
    for segments in gste.SEGMENTS:
        borders = borders_of(segments)
        x, step = torch.full((40,), torch.nan), torch.tensor(1.0)
        assert gste.gste_forward(x, midpoints(borders), step, 0).tolist() == [segments] * 40
        grad_x, sums = gste.gste_backward(torch.ones(40), x, borders, step, 0)
        assert not grad_x.any()
        assert not sums[:-1].any()
        assert float(sums[-1]) == 40 * segments


@needs_compiler
def test_a_gradient_of_another_dtype() -> None:
    borders, step = borders_of(7), torch.tensor(0.1)
    x, e = values(5000, borders).to(torch.bfloat16), torch.randn(5000).bfloat16()
    for _ in range(5):
        same = gste.gste_backward(e, x, borders, step, 0)
        other = gste.gste_backward(e.float(), x, borders, step, 0)
        assert all(torch.equal(a, b) for a, b in zip(same, other, strict=True))


@needs_compiler
def test_the_operators_keep_torchs_rules() -> None:
    borders, step = borders_of(7), torch.tensor(0.1)
    x, e = torch.randn(4, 50), torch.randn(4, 50)
    torch.library.opcheck(gste.gste_forward, (x, midpoints(borders), step, 0))
    torch.library.opcheck(gste.gste_backward, (e, x, borders, step, 0))


@needs_compiler
def test_the_library_is_kept_and_built_elsewhere_if_it_cannot_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    gste._library.cache_clear()
    try:
        assert gste.available()
        assert [p.suffix for p in (tmp_path / "qexp").iterdir()] == [".so"]
        (library,) = (tmp_path / "qexp").iterdir()
        damaged = tmp_path / "damaged" / "qexp" / library.name
        damaged.parent.mkdir(parents=True)
        damaged.write_bytes(b"damaged")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "damaged"))
        gste._library.cache_clear()
        assert gste.available()
        assert damaged.stat().st_size == library.stat().st_size
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
        gste._library.cache_clear()
        assert gste.available()
    finally:
        gste._library.cache_clear()


def test_without_a_compiler_torch_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gste, "_compilers", list)
    gste._library.cache_clear()
    try:
        assert not gste.available()
        assert not gste.takes(torch.zeros(1), 15)
        monkeypatch.setattr(gste, "gste_forward", None)  # it would be called
        monkeypatch.setattr(gste, "gste_backward", None)
        monkeypatch.setattr(torch, "compile", lambda fn, **_: fn)  # not what is tested, and slow
        q, x = N2UQ(2, signed=False), torch.randn(8, 10).relu_()
        q.calibrate(x)
        found = []
        for compiled in (False, True):
            compile_kernels(compiled)
            own = x.clone().requires_grad_()
            y = q(own)
            y.sum().backward()
            found.append((y.detach(), own.grad))
        torch.testing.assert_close(found[1], found[0])
    finally:
        gste._library.cache_clear()
