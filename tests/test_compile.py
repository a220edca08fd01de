"""What `compile=` does: which layout kernels see, when they run compiled, what auto chooses."""

from __future__ import annotations

import copy
import os
import platform
import re
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from compose import tiny
from conftest import Qexp
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from hydra import compose, initialize_config_dir
from test_methods import METHODS
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
from torch._inductor.decomposition import select_decomp_table

from qexp.config import configs_dir
from qexp.errors import ConfigError
from qexp.models.resnet import ResNet
from qexp.quant import functional
from qexp.quant.asq import ASQ
from qexp.quant.convert import (
    Bits,
    calibrate_,
    quant_layers,
    quantize_,
    quantizers,
    shared_weights,
)
from qexp.quant.functional import as_rows, compile_kernels, fake_quantize, kernel, sum_to
from qexp.quant.lsq import LSQ
from qexp.quant.trace import Layer, trace
from qexp.ranges import unusable
from qexp.recipes import build, compilation
from qexp.recipes.ptq import ptq
from qexp.recipes.qat import qat
from qexp.runner.device import keep_memory, tf32
from qexp.runner.folder import identity


def network(per_channel: bool = False) -> tuple[nn.Module, Tensor]:
    """A narrow W4A4 ResNet-8, calibrated, and its batch of images of 8x8."""
    torch.manual_seed(0)
    model = ResNet(depth=8, num_classes=4, width=0.25)
    x = torch.randn(4, 3, 8, 8)
    layers = trace(model, (3, 8, 8))

    def weight(bits: int, **facts: Any) -> LSQ:
        return LSQ(bits, per_channel=per_channel, **facts)

    def act(bits: int, **facts: Any) -> LSQ:
        return LSQ(bits, count="sample", **facts)

    quantize_(model, layers, {layer.name: Bits(4, 4) for layer in layers}, weight, act)
    calibrate_(model, x)
    return model, x


def gradients(model: nn.Module, forward: Any, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    y = forward(x)
    (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    return [y.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


# ---------------------------------------------------------------------------------------------
# The layout of a fused call


@pytest.mark.parametrize("rows", ["tensor", "row"])
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_kernels_in_the_tensors_own_shape_equal_kernels_in_rows(
    rows: str, order: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    x0 = torch.randn(6, 4, 5, 3).to(memory_format=order)
    scale0 = torch.tensor(0.3) if rows == "tensor" else torch.rand(6, 1, 1, 1) + 0.1
    e = torch.randn(6, 4, 5, 3)
    results = []
    for own_shape in (False, True):
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda own=own_shape: own)
        x, scale = x0.clone().requires_grad_(), scale0.clone().requires_grad_()
        y = fake_quantize(x, scale, -3, 4, 0.5)
        y.backward(e)
        results.append((y.detach(), x.grad, scale.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])  # type: ignore[arg-type]
    torch.testing.assert_close(results[0][2], results[1][2], rtol=1e-5, atol=1e-5)


def test_a_compiled_network_reads_its_activations_without_a_view() -> None:
    model, x = network()
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=aot_autograd(fw_compiler=keep), fullgraph=True)
    gradients(model, compiled, x)
    assert len(graphs) == 2  # one forward, one backward: no graph break
    moved = ("view", "reshape", "permute", "clone", "_unsafe_view")
    images = [
        node.format_node()
        for graph in graphs
        for node in graph.graph.nodes
        if any(f"aten.{name}." in str(node.target) for name in moved)
        and node.meta["val"].numel() >= x[:, :1].numel() * 4  # the smallest quantized activation
    ]
    assert not images


def test_sum_to_keeps_the_rows_of_the_scale() -> None:
    t = torch.arange(24.0).view(2, 3, 4)
    assert torch.equal(sum_to(t, torch.ones(2, 1, 1)), t.sum((1, 2), keepdim=True))
    assert torch.equal(sum_to(t, torch.ones(1, 1, 1)), t.sum().view(1, 1, 1))
    rows = as_rows(t, 2)
    assert torch.equal(sum_to(rows, torch.ones(2, 1)), rows.sum(1, keepdim=True))


def kept_bytes_compiled(model: nn.Module, x: Tensor, again: dict[str, bool]) -> int:
    """Bytes that the compiler's forward graph hands to its backward, parameters left out."""
    kept: list[int] = []

    def forward(graph: torch.fx.GraphModule, _: Any) -> Any:
        (output,) = (node for node in graph.graph.nodes if node.op == "output")
        made = {n for n in output.args[0] if isinstance(n, torch.fx.Node) and n.op != "placeholder"}
        kept.append(sum(n.meta["val"].nbytes for n in made if "val" in n.meta))
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    backend = aot_autograd(
        fw_compiler=forward,
        bw_compiler=lambda graph, _: make_boxed_func(graph.forward),
        partition_fn=min_cut_rematerialization_partition,
        decompositions=select_decomp_table(),
    )
    with torch._functorch.config.patch(again):
        gradients(model, torch.compile(model, backend=backend, fullgraph=True), x)
    return kept[0]


@pytest.mark.slow
def test_a_compiled_quantized_step_keeps_what_a_float_step_keeps() -> None:
    # Two blocks keep their float input for the pool of their shortcut: of three it weighs more.
    floating = ResNet(depth=20, num_classes=4, width=0.5)
    x = torch.randn(64, 3, 16, 16)  # so many that quantized weights weigh little
    layers = trace(floating, (3, 16, 16))
    quantized = copy.deepcopy(floating)
    act = partial(ASQ, count="sample")
    quantize_(quantized, layers, {layer.name: Bits(4, 4) for layer in layers}, LSQ, act)
    calibrate_(quantized, x)
    plain = kept_bytes_compiled(floating, x, {})
    assert kept_bytes_compiled(quantized, x, {}) > 1.3 * plain
    assert kept_bytes_compiled(quantized, x, compilation.AGAIN) < 1.15 * plain
    every = compilation.AGAIN | compilation.OPERANDS
    assert kept_bytes_compiled(quantized, x, every) < 0.7 * plain


class Residual(nn.Module):
    """The least network with inner layers: one before a batch norm, one before a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv1, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.fc = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.stem(x)).relu()
        h = self.bn2(self.conv1(x)).relu()
        return self.fc((x + self.conv2(h)).relu().mean((2, 3)))


@pytest.mark.parametrize("method", METHODS)
def test_a_network_of_every_trained_method_is_one_graph_and_equals_eager(
    tmp_path: Path, method: str
) -> None:
    cfg = tiny(tmp_path, f"quantizer={method}", "bits=3")
    torch.manual_seed(0)
    model, x = Residual(), torch.randn(4, 3, 6, 6)
    build.make_network(cfg, model, (3, 6, 6))
    calibrate_(model, x)
    twin = copy.deepcopy(model)  # a training step moves buffers
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    graph = torch.compile(model, backend=counter, fullgraph=True)
    found = []
    for net, forward in ((model, graph), (twin, twin)):
        y = forward(x)
        (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
        found.append({"y": y.detach(), **{n: p.grad for n, p in net.named_parameters()}})
    assert counter.frame_count == 1
    for (name, a), b in zip(found[0].items(), found[1].values(), strict=True):
        assert a is not None, name
        assert b is not None, name
        # Before a batch norm the gradient of an output scale (N2UQ) is what rounding leaves of 0.
        assert (a - b).abs().max() <= 1e-4 * b.abs().max() + 1e-8, name
    torch.testing.assert_close(model.state_dict(), twin.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("saved", ["all", "inputs"])
def test_compiled_network_equals_eager(
    order: torch.memory_format, per_channel: bool, saved: str
) -> None:
    model, x = network(per_channel)
    model, x = model.to(memory_format=order), x.to(memory_format=order)  # type: ignore[call-overload]
    expected = gradients(model, model, x)
    torch._dynamo.reset()
    got = gradients(model, compilation.compiled(model, x.device, saved, fullgraph=True), x)
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


# ---------------------------------------------------------------------------------------------
# When a kernel runs compiled


def test_small_tensors_run_eagerly_even_with_compiled_kernels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[int] = []

    def record(fn: Any, **_: Any) -> Any:
        def compiled(x: Tensor) -> Tensor:
            calls.append(x.numel())
            return fn(x)

        return compiled

    monkeypatch.setattr(torch, "compile", record)
    monkeypatch.setattr(functional, "SMALL", 100)
    double = kernel(lambda x: x * 2)
    compile_kernels(True)
    try:
        for n in (99, 100):
            assert torch.equal(double(torch.ones(1, n)), torch.full((1, n), 2.0))
    finally:
        compile_kernels(False)
    double(torch.ones(1, 1000))
    assert calls == [100]


@pytest.mark.slow
def test_layers_of_all_sizes_share_the_compiled_kernels() -> None:
    torch._dynamo.reset()
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    compile_kernels(True)
    try:
        for bits in (2, 4, 8):
            for n in (1, 3, 8):
                x = torch.randn(n, 4, 6, 6).abs().requires_grad_()
                y = fake_quantize(x, torch.tensor(0.1, requires_grad=True), 0, 2**bits - 1)
                y.sum().backward()
    finally:
        compile_kernels(False)
    made = torch._dynamo.utils.counters["stats"]["unique_graphs"] - before
    assert made == 2  # forward and backward, whatever the width and the size


# ---------------------------------------------------------------------------------------------
# What a run compiles


class Said:
    """Stands in for a run: keeps what it was told."""

    def __init__(self) -> None:
        self.infos: list[str] = []
        self.warnings: list[str] = []

    def info(self, line: str) -> None:
        self.infos.append(line)

    def warn(self, line: str) -> None:
        self.warnings.append(line)


@pytest.fixture
def said() -> Any:
    yield Said()
    compile_kernels(False)


def layers_of(macs: int) -> list[Layer]:
    return [Layer("a", "conv", (1, 1, 1, 1), (1, 1, 1), macs, (1, 1, 1), False, "first")]


@pytest.mark.parametrize(("macs", "expected"), [(10, "off"), (10**7, "kernels"), (10**9, "model")])
def test_auto_compiles_more_the_longer_the_run(macs: int, expected: str) -> None:
    device = torch.device("cpu")
    assert compilation.choose("auto", layers_of(macs), 10**6, device) == expected
    assert compilation.choose("off", layers_of(macs), 10**6, device) == "off"


def test_auto_compiles_no_network_around_a_quantizer_that_breaks_the_fusion(said: Said) -> None:
    model, _ = network()
    device, work = torch.device("cpu"), layers_of(10**9)
    forward = compilation.compile_for("auto", model, work, 10**6, device, said)  # type: ignore[arg-type]
    assert forward is not model
    next(iter(quantizers(model).values())).fuses = False
    forward = compilation.compile_for("auto", model, work, 10**6, device, said)  # type: ignore[arg-type]
    assert forward is model
    assert functional.kernels_compiled()
    assert said.infos[-1] == "compile: kernels (auto)"


# ---------------------------------------------------------------------------------------------
# CUDA graphs


@pytest.fixture
def patches(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The options of each graph that goes to the compiler, which runs it eagerly instead."""
    seen: list[dict[str, Any]] = []

    def compile_fx(graph: torch.fx.GraphModule, _: Any, config_patches: dict[str, Any]) -> Any:
        seen.append(config_patches)
        return graph

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)
    torch._dynamo.reset()
    yield seen
    torch._dynamo.reset()


@pytest.mark.parametrize(("how", "asked"), [("model", None), ("graphs", True)])
def test_graphs_are_asked_of_the_compiler(
    how: str, asked: bool | None, said: Said, patches: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compilation, "compiler_available", lambda device: (True, ""))
    model, x = network()
    cuda = torch.device("cuda")
    forward = compilation.compile_for(how, model, [], 0, cuda, said)  # type: ignore[arg-type]
    expected = gradients(model, model, x)
    for a, b in zip(gradients(model, forward, x), expected, strict=True):
        torch.testing.assert_close(a, b)
    assert [p.get("triton.cudagraphs") for p in patches] == [asked]
    assert said.infos == [f"compile: {how}"]
    assert not functional.kernels_compiled()


@pytest.mark.parametrize(
    ("width", "amp", "bits"), [(1.0, True, 256), (1.0, False, 512), (2.0, True, 512)]
)
def test_a_thin_network_in_bfloat16_has_vectors_of_half_the_width(
    width: float, amp: bool, bits: int, said: Said, patches: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compilation, "compiler_available", lambda device: (True, ""))
    monkeypatch.setattr(compilation, "vector_width", lambda: {"cpp.simdlen": 512})
    net = ResNet(8, 10, width=width)
    layers = trace(net, (3, 16, 16))
    assert compilation.thin(layers) == (width == 1)
    forward = compilation.compile_for(
        "model",
        net,
        layers,
        0,
        torch.device("cpu"),
        said,
        amp=amp,  # type: ignore[arg-type]
    )
    forward(torch.randn(2, 3, 16, 16))
    assert {p["cpp.simdlen"] for p in patches} == {bits}


@pytest.mark.parametrize("shared", [False, True])
def test_gradients_of_earlier_micro_batches_outlive_a_replay(
    shared: bool, patches: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = network()
    parts = x.chunk(2)
    forward = compilation.compiled(model, torch.device("cuda"), graphs=True)
    memory: list[Tensor] = []  # of gradients that a graph has written: the next replay writes it

    replays: list[int] = []

    def replay() -> None:
        replays.append(len(memory))
        for grad in memory:
            grad.fill_(float("nan"))
        memory.clear()

    def accumulated(run: Any) -> list[Tensor]:
        model.zero_grad()
        with shared_weights(model) if shared else nullcontext():
            for part in parts:
                run(part).square().sum().backward()
                held = [p.grad for p in model.parameters()]
                held += [m.w_hat.grad for m in quant_layers(model).values() if shared]
                memory[:] = [grad for grad in held if grad is not None]
        return [p.grad for p in model.parameters() if p.grad is not None]

    expected = accumulated(model)
    memory.clear()
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", replay)
    got = accumulated(forward)
    assert len(replays) == len(parts)
    assert replays[0] == 0 < replays[1]
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_the_compilers_word_on_tf32_fails_no_test() -> None:
    """Up to torch 2.11 at least it is a warning, and warnings are errors here: on a GPU each test
    that compiles would fail."""
    warnings.warn(
        "TensorFloat32 tensor cores for float32 matrix multiplication available but not enabled. "
        "Consider setting `torch.set_float32_matmul_precision('high')` for better performance.",
        UserWarning,
        stacklevel=1,
    )


def test_scoring_does_not_have_what_is_compiled_compiled_again() -> None:
    counter = CompileCounter()
    double = torch.compile(lambda x: 2 * x, backend=counter)
    x = torch.ones(3)
    double(x)
    for allowed in (False, True):  # scoring; the bench
        with tf32(allowed):
            pass
        double(x)
    assert counter.frame_count == 1


def test_a_kernel_has_room_for_all_its_variants(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functional, "SMALL", 0)
    torch.compiler.reset()

    @kernel
    def scaled(x: Tensor, way: str) -> Tensor:
        return x * len(way)

    compile_kernels(True)
    try:
        for n in range(1, 13):  # a string is a constant: each is compiled by itself
            assert scaled(torch.ones(2, 3), "x" * n)[0, 0] == n
        with ThreadPoolExecutor(1) as thread:  # where autograd does a GPU's backward
            for n in range(13, 25):
                assert thread.submit(scaled, torch.ones(2, 3), "x" * n).result()[0, 0] == n
    finally:
        compile_kernels(False)


def test_a_recipe_leaves_the_kernels_eager() -> None:
    @compilation.eager_afterwards
    def recipe(ends: bool) -> int:
        compile_kernels(True)
        if not ends:
            raise KeyboardInterrupt
        return 7

    assert recipe(True) == 7
    assert not functional.kernels_compiled()
    with pytest.raises(KeyboardInterrupt):
        recipe(False)
    assert not functional.kernels_compiled()
    for trained in (qat, ptq):  # each is decorated
        assert trained.__wrapped__.__name__ == trained.__name__


def test_graphs_are_refused_at_once_without_cuda(qexp: Qexp) -> None:
    done = qexp("train", "compile=graphs", "device=cpu", "out=out")
    assert done.code == 2
    assert done.err == (
        "config: compile=graphs replays CUDA graphs, and the device here is cpu. "
        "Use compile=model, or device=cuda.\n"
    )
    assert not Path("out").exists()


def test_graphs_are_refused_where_the_network_is_learned_in_parts() -> None:
    cuda = torch.device("cuda")
    compilation.refuse_graphs("graphs", cuda)
    compilation.refuse_graphs("model", cuda, "ptq")
    with pytest.raises(ConfigError, match="recipe=ptq learns it part by part"):
        compilation.refuse_graphs("graphs", cuda, "ptq")


def test_graphs_are_refused_for_every_post_training_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qexp.runner.device.pick_device", lambda name: torch.device("cuda"))
    base = {"device": "cuda", "compile": "graphs"}
    quick = "config: compile=graphs records the whole network, and recipe=ptq_quick learns it "
    assert [*unusable({**base, "recipe": {"name": "ptq_quick", "iterations": 3}})] == [
        quick + "part by part. Use compile=kernels."
    ]
    assert not [*unusable({**base, "recipe": {"name": "qat", "epochs": 3}})]


def test_graphs_do_not_make_another_run() -> None:
    with initialize_config_dir(str(configs_dir()), version_base="1.3"):
        plain, replayed = (
            compose("train", ["folder=x", f"compile={how}"]) for how in ("off", "graphs")
        )
    assert identity(plain) == identity(replayed)


def test_without_a_compiler_the_run_is_eager_and_says_so(
    said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compilation, "compiler_available", lambda device: (False, "no C++"))
    model, _ = network()
    for mode in ("kernels", "model"):
        forward = compilation.compile_for(mode, model, [], 0, torch.device("cpu"), said)  # type: ignore[arg-type]
        assert forward is model
        assert not functional.kernels_compiled()
    assert len(said.warnings) == 2
    assert "no C++" in said.warnings[0]


def test_each_run_sets_what_is_compiled_anew(said: Said) -> None:
    model, _ = network()
    device = torch.device("cpu")
    for mode, kernels in (("kernels", True), ("off", False), ("model", False)):
        forward = compilation.compile_for(mode, model, [], 0, device, said)  # type: ignore[arg-type]
        assert functional.kernels_compiled() is kernels
        assert (forward is model) is (mode != "model")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_freed_memory_can_be_kept_on_glibc() -> None:
    assert keep_memory()


@pytest.mark.parametrize("whole", [False, True], ids=["kernels", "model"])
def test_what_was_compiled_for_other_vectors_is_not_taken(whole: bool, tmp_path: Path) -> None:
    """One cache on disk, a process with AVX2's vectors and then one with this processor's."""
    program = (
        "import torch; from qexp.quant import functional as f; f.SMALL = 0\n"
        "from qexp.recipes.compilation import compiled\n"
        "@f.kernel\n"
        "def plus(x): return 3 * x.exp() + 1\n"
        f"run = compiled(plus.__wrapped__, torch.device('cpu')) if {whole} else plus\n"
        "f.compile_kernels(True); x = torch.randn(2, 1001)\n"
        "assert torch.allclose(run(x), plus.__wrapped__(x), atol=1e-5)\n"
    )
    for capability in ({"ATEN_CPU_CAPABILITY": "avx2"}, {}):
        there = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), **capability}
        subprocess.run([sys.executable, "-c", program], env=there, check=True, capture_output=True)
    steps = {
        step
        for source in tmp_path.rglob("*.cpp")
        for step in re.findall(r"x\d\+=static_cast<int64_t>\((\d+)L", source.read_text())
    }
    assert len(steps) == (2 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 1)
