"""The GPU kernel: interpreted on the CPU it is the same network; compiled, 8-bit products."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import Qexp
from hypothesis import given, settings
from hypothesis import strategies as st
from test_engine import WEIGHTS, check_exact_sums, weight
from test_export import images, network, packed_of, run_folder
from torch import Tensor

from qexp.engine import engine_device, integer_network
from qexp.engine.reference import Reference
from qexp.engine.window import Window
from qexp.errors import ConfigError
from qexp.export.bits import packed_size

triton = pytest.importorskip("triton")

from qexp.engine import packed_gemm  # noqa: E402
from qexp.engine.packed_gemm import OPTIONS, TILE, PackedGemm, conv_packed  # noqa: E402

__all__ = ["run_folder"]  # a fixture


@pytest.fixture
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 6):
        pytest.skip("the interpreter of triton 3.5 makes scalars of arrays, which numpy refuses")
    monkeypatch.setenv("TRITON_INTERPRET", "1")


def tolerance(x: Tensor, w_hat: Tensor, window: Window) -> Tensor:
    """Of a sum of products: a level is within 2^-24 of its row's largest, the result float32."""
    top = w_hat.abs().flatten(1).amax(1).reshape(-1, 1, 1, 1).expand_as(w_hat)
    given = (window.stride, window.padding, window.dilation, window.groups)
    return 2**-21 * F.conv2d(x.abs().double(), top.double(), None, *given)


# Products


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("name", WEIGHTS)
def test_the_kernel_multiplies_like_the_reference(name: str, bits: int) -> None:
    stored, w_hat = weight(name, bits, (6, 5, 3, 2))
    window = Window((3, 2), (2, 1), (1, 1), (1, 2))
    step = torch.tensor([0.5, 0.01, 3.0]).reshape(3, 1, 1, 1)
    for low, high in ((-8, 7), (0, 15), (0, 255)):
        x = torch.randint(low, high + 1, (3, 5, 7, 6)).float()
        y = PackedGemm(stored, window, low, high)(x, step)
        exact = Reference(stored, window, low, high)(x, step)
        assert y.dtype == torch.float32
        assert bool(((y - exact).abs() <= tolerance(x, w_hat, window) * step).all())


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("groups", [1, 2, 12])
@pytest.mark.parametrize("name", ["lsq", "post", "adq per channel"])
def test_tiles_and_groups_cover_everything(name: str, groups: int) -> None:
    outputs = 3 * TILE["BN"] // 2  # more than a tile, and not a multiple of it
    stored, w_hat = weight(name, 3, (outputs, 12 // groups, 3, 3))
    x = torch.randint(0, 8, (2, 12, 7, 7)).float()  # 98 pixels: two tiles
    exact = F.conv2d(x.double(), w_hat.double(), padding=1, groups=groups)
    window = Window((3, 3), padding=(1, 1), groups=groups)
    y = PackedGemm(stored, window, 0, 7)(x, torch.tensor(1.0))
    assert bool(((y - exact).abs() <= tolerance(x, w_hat, window)).all())


@pytest.mark.usefixtures("interpreter")
@settings(deadline=None, max_examples=15)
@given(st.integers(1, 70), st.booleans(), st.booleans(), st.integers(0, 2**31))
def test_sums_of_integers_are_exact(k: int, wide: bool, large: bool, seed: int) -> None:
    check_exact_sums(PackedGemm, k, wide, large, seed)


@pytest.mark.usefixtures("interpreter")
def test_a_batch_beyond_32_bits_runs_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    stored, _ = weight("post", 4, (6, 4, 3, 3))
    x = torch.randint(0, 16, (5, 4, 6, 6)).float()
    layer = PackedGemm(stored, Window((3, 3), padding=(1, 1)), 0, 15)
    for step in (torch.tensor(0.5), torch.rand(5, 1, 1, 1)):
        monkeypatch.undo()
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        whole = layer(x, step)
        monkeypatch.setattr(packed_gemm, "LARGEST", 2 * 6 * 36)  # two samples of the result
        assert torch.equal(layer(x, step), whole)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("name", WEIGHTS)
def test_a_gpu_multiplies_like_the_reference(name: str) -> None:
    stored, w_hat = weight(name, 3, (40, 12, 3, 3))
    x, step = torch.randint(0, 256, (2, 12, 9, 9)).float(), torch.rand(2, 1, 1, 1)
    window = Window((3, 3), padding=(1, 1))
    exact = Reference(stored, window, 0, 255)(x, step)
    for index in range(torch.cuda.device_count()):
        layer = PackedGemm(stored, window, 0, 255).to(f"cuda:{index}")
        y = layer(x.to(f"cuda:{index}"), step.to(f"cuda:{index}"))
        assert bool(((y.cpu() - exact).abs() <= tolerance(x, w_hat, window) * step).all())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_weights_stay_packed(bits: int) -> None:
    stored, _ = weight("post", bits, (6, 4, 3, 3))
    layer: Any = PackedGemm(stored, Window((3, 3)), 0, 15)
    assert layer.packed.dtype == torch.uint8
    assert len(layer.packed) == packed_size(6 * 4 * 9, bits) + 1
    assert layer.table.shape == (len(layer.table), 1, stored.how.levels)  # shared by all outputs
    assert not any(t.numel() >= stored.codes.numel() for t in layer.buffers() if bits < 8)


# Networks


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize(
    "method",
    [
        "lsq",
        "asq+post",
        "n2uq",
        pytest.param("adq", marks=pytest.mark.slow),
        pytest.param("aquant", marks=pytest.mark.slow),
    ],
)
def test_a_network_of_packed_weights_is_the_same_network(method: str) -> None:
    model = network(method, fold=method == "aquant")
    other = integer_network(packed_of(model), "triton")
    with torch.no_grad():
        ours, theirs = model(images(1)), other(images(1))
    assert (theirs - ours).abs().amax(1).median() < 1e-4
    assert torch.equal(theirs.argmax(1), ours.argmax(1))


@pytest.mark.slow  # interpreted: 2,000 images take a minute
@pytest.mark.usefixtures("interpreter")
def test_eval_runs_the_kernel(qexp: Qexp, run_folder: Path) -> None:
    assert qexp("export", f"run={run_folder}").code == 0
    given = (f"run={run_folder}", "checkpoint=model.safetensors", "device=cpu")
    said = [qexp("eval", *given, f"engine={engine}") for engine in ("float", "triton")]
    assert all(s.code == 0 for s in said), said
    assert said[0].out.split(" | ")[0] == said[1].out.split(" | ")[0]


# Refusals


def test_the_kernel_needs_a_gpu_and_triton(
    qexp: Qexp, run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert qexp("export", f"run={run_folder}").code == 0
    given = (f"run={run_folder}", "checkpoint=model.safetensors", "device=cpu", "engine=triton")
    said = qexp("eval", *given)
    assert (said.code, said.err) == (
        2,
        "engine: engine=triton needs a CUDA device, not cpu. Use engine=integer, or set "
        "TRITON_INTERPRET=1 to try its kernel on the CPU, slowly.\n",
    )
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="needs the package triton"):
        engine_device("triton", "cpu")
    assert engine_device("integer", "cuda").type == "cpu"


def test_more_codes_than_32_bits_can_place_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    stored, _ = weight("lsq", 4, (4, 4))
    monkeypatch.setattr(packed_gemm, "LARGEST", 4 * 4 * 4)
    PackedGemm(stored, Window(), 0, 15)
    monkeypatch.setattr(packed_gemm, "LARGEST", 4 * 4 * 4 - 1)
    with pytest.raises(ConfigError, match="weight is too large for engine=triton"):
        PackedGemm(stored, Window(), 0, 15)


def test_more_than_eight_bits_are_refused() -> None:
    stored, _ = weight("lsq", 10, (4, 4))
    with pytest.raises(ConfigError, match="weights of up to 8 bits, a layer has 10"):
        PackedGemm(stored, Window(), 0, 15)
    stored, _ = weight("lsq", 4, (4, 4))
    with pytest.raises(ConfigError, match="inputs of up to 8 bits, a layer has -300 to 300"):
        PackedGemm(stored, Window(), -300, 300)


# Compiled, without a GPU


@pytest.mark.parametrize(("bits", "planes"), [(2, 1), (3, 1), (4, 2), (4, 3), (8, 1)])
@pytest.mark.parametrize("capability", [80, 90])
def test_the_compiler_makes_8_bit_products_without_spills(
    capability: int, bits: int, planes: int, tmp_path: Path
) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = dict.fromkeys(("KH", "KW"), 3) | dict.fromkeys(
        ("SH", "SW", "PH", "PW", "DH", "DW"), 1
    )
    constants |= {"BITS": bits, "PLANES": planes, "SHIFT": 128 if bits == 8 else 0, **TILE}
    pointers = {"x": "i8", "w": "u8", "table": "i8", "scale": "fp32", "added": "i32"}
    pointers |= {"step": "fp32", "y": "fp32"}
    kernel = triton.JITFunction(conv_packed)
    signature = {
        name: "constexpr"
        if name in constants
        else f"*{pointers[name[:-4]]}"
        if name.endswith("_ptr")
        else "i32"
        for name in kernel.arg_names
    }
    source = ASTSource(kernel, signature=signature, constexprs=constants)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=OPTIONS)
    assert re.search(r"mma\S*\.s32\.s8\.s8", made.asm["ptx"])
    (tmp_path / "kernel.cubin").write_bytes(made.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.is_file():
        pytest.skip("this triton has no cuobjdump")
    usage = subprocess.run(
        [tool, "--dump-resource-usage", tmp_path / "kernel.cubin"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert re.search(r"STACK:0\b.*LOCAL:0\b", usage), usage  # nothing spilled
