"""What every quantizer keeps, whatever its method: one table of cases, one test per invariant.

To add a method, append a `Case` to CASES. A flag is turned off only where the method's own
definition contradicts the property, with the reason beside it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from qexp.quant.adaround import AdaRound
from qexp.quant.additive import APoTActivation
from qexp.quant.aquant import AQuant
from qexp.quant.asq import ASQ
from qexp.quant.codebook import Codebook
from qexp.quant.columns import columns
from qexp.quant.dorefa import PACT, DoReFaActivation, DoReFaWeight
from qexp.quant.functional import compile_kernels
from qexp.quant.lsq import LSQ, LSQPlus
from qexp.quant.modules import QuantConv2d
from qexp.quant.n2uq import N2UQ, N2UQWeight
from qexp.quant.nearest import Nearest
from qexp.quant.power import POST, POT, APoT, POSTReleased
from qexp.quant.quantizer import Identity, Quantizer

FIELD = (8, 3, 3)  # C_in, kh, kw
WEIGHT = (6, 8, 3, 3)
INPUT = (4, 8, 5, 5)
WINDOW = ((3, 3), (1, 1), (1, 1), (1, 1))  # kernel, dilation, padding, stride of its columns
COLUMNS = (4, 8 * 3 * 3, 5 * 5)


@dataclass(frozen=True)
class Case:
    """A quantizer to hold to the contract.

    role: `weight`, `relu` (unsigned input) or `signed` (signed input).
    columns: takes the im2col columns of an input, [N, C_in * kh * kw, L].
    overflows: has more than 2**bits levels, and says so by name.
    idempotent: Q(Q(x)) = Q(x) in eval mode.
    equivariant: calibrated on 8x, Q(8x) = 8 Q(x).
    """

    name: str
    make: Callable[..., Quantizer]
    role: str
    widths: tuple[int, ...] = (2, 3, 4, 8)
    columns: bool = False
    overflows: bool = False
    idempotent: bool = True
    monotone: bool = True
    equivariant: bool = True

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor it quantizes."""
        return WEIGHT if self.role == "weight" else COLUMNS if self.columns else INPUT

    def build(self, bits: int) -> Quantizer:
        shape = WEIGHT if self.role == "weight" else FIELD
        return self.make(bits, signed=self.role != "relu", shape=shape)

    def sample(self, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        if self.role == "weight":
            return torch.randn(WEIGHT, generator=generator) * 0.05
        x = torch.randn(INPUT, generator=generator)
        x = x.relu() if self.role == "relu" else x
        return columns(x, *WINDOW) if self.columns else x

    def calibrated(self, bits: int, seed: int = 0, factor: float = 1.0) -> tuple[Quantizer, Tensor]:
        """A quantizer in eval mode, alive, and `factor` times the sample it was calibrated on."""
        torch.manual_seed(seed)
        q, x = self.build(bits), factor * self.sample(seed)
        q.calibrate(x)
        alive_(q, seed)
        return q.eval(), x


@torch.no_grad()
def alive_(q: Quantizer, seed: int = 0) -> None:
    """Away from a start that is another method: else nothing of this one would be seen."""
    generator = torch.Generator().manual_seed(seed)
    if isinstance(q, ASQ) and q.adapter:  # a dead hidden layer has factor 1 for all: LSQ
        q.adapter[0].bias.fill_(0.5)
    if isinstance(q, AQuant):  # borders of 1/2 are Nearest; these differ, few reach a bound
        nn.init.normal_(q.border, 0, 0.2, generator)
        if q.fusion != "none":
            q.mixing += 0.1 * torch.randn(q.mixing.shape, generator=generator)


CASES = [
    Case("lsq-weight", LSQ, "weight"),
    Case("lsq-weight-channel", partial(LSQ, per_channel=True), "weight"),
    Case("lsq-weight-mse", partial(LSQ, init="mse"), "weight"),
    Case("lsq-act", partial(LSQ, count="sample"), "relu"),
    Case("lsq-act-signed", partial(LSQ, count="sample"), "signed"),
    Case("lsqplus-act", LSQPlus, "relu"),
    Case("lsqplus-act-signed", LSQPlus, "signed"),
    Case("post", POST, "weight"),
    Case("post-mse", partial(POST, init="mse"), "weight"),
    Case("post-layer-symmetric", partial(POST, per_channel=False, levels="symmetric"), "weight"),
    Case("post-nozero", partial(POST, levels="no_zero", base=2.0), "weight"),
    Case("post-released", POSTReleased, "weight", overflows=True),
    Case("pot", partial(POT, init="mse"), "weight"),
    Case("apot", APoT, "weight"),
    Case("apot-mse", partial(APoT, init="mse"), "weight"),
    Case("apot-act", APoTActivation, "relu"),
    Case("apot-act-signed", partial(APoTActivation, count=None), "signed"),
    Case("pot-act", partial(APoTActivation, additive=False), "relu", widths=(2, 3, 4, 7)),
    # The mean comes out and is not put back: a second pass sees another one.
    Case(
        "apot-normalized",
        partial(APoT, normalize=True, init="three_std", grad_scale="one"),
        "weight",
        idempotent=False,
    ),
    # ASQ's factor depends on the input: another input, another grid.
    *(
        Case(f"asq-{f}", partial(ASQ, factor=f), "relu", idempotent=False, equivariant=False)
        for f in ("relu", "softplus", "exp")
    ),
    Case("asq-statistics", partial(ASQ, factor="statistics"), "relu", idempotent=False),
    Case("asq-frozen", partial(ASQ, factor="frozen"), "relu"),
    Case("asq-signed", ASQ, "signed", idempotent=False, equivariant=False),
    Case(
        "asq-plain",
        partial(ASQ, dequantize="plain", scale_factor_grad=True),
        "relu",
        idempotent=False,
        equivariant=False,
    ),
    Case("n2uq-act", N2UQ, "relu"),
    Case("n2uq-act-signed", N2UQ, "signed"),
    # The scale is that of the weights: quantized ones have another.
    Case("n2uq-weight", N2UQWeight, "weight", idempotent=False),
    Case("codebook", Codebook, "weight"),
    Case("codebook-full", partial(Codebook, levels="full"), "weight"),
    Case("codebook-kmeans-channel", partial(Codebook, init="kmeans", per_channel=True), "weight"),
    Case("codebook-uniform-count", partial(Codebook, init="uniform", form="count"), "weight"),
    Case("codebook-gradient", partial(Codebook, adaptation="gradient"), "weight"),
    # tanh bends: neither its fixed points nor its scale are the input's.
    *(
        Case(
            f"dorefa-weight-{r}",
            partial(DoReFaWeight, rescale=r),
            "weight",
            idempotent=False,
            equivariant=False,
        )
        for r in ("rms", "max", "none")
    ),
    Case("dorefa-act", DoReFaActivation, "relu"),
    Case("dorefa-act-signed", DoReFaActivation, "signed"),
    Case("nearest-weight", partial(Nearest, per_channel=True), "weight"),
    Case("nearest-weight-symmetric", partial(Nearest, symmetric=True), "weight"),
    Case("nearest-act", partial(Nearest, estimator="percentile"), "relu"),
    Case("nearest-act-signed", Nearest, "signed"),
    # The rounding was chosen for the weights it was calibrated on: other values, other errors.
    Case("adaround", AdaRound, "weight", idempotent=False, monotone=False),
    # A level lies on a border at 0 and, but for float32, at 1: up it goes, or (k s) / s < k down.
    Case("aquant-channel", partial(AQuant, per="channel"), "relu", idempotent=False),
    Case("aquant-signed", partial(AQuant, per="channel"), "signed", idempotent=False),
    Case("aquant-row", AQuant, "relu", columns=True, idempotent=False),
    Case("aquant-row-signed", AQuant, "signed", columns=True, idempotent=False),
    Case("aquant-window", partial(AQuant, fusion="window"), "relu", columns=True, idempotent=False),
    # Besides, the nearest errors of a window are no monotone functions of its inputs.
    Case(
        "aquant-residual",
        partial(AQuant, fusion="residual"),
        "relu",
        columns=True,
        idempotent=False,
        monotone=False,
    ),
    # The one border stays within the bounds; a sigmoid never reaches them.
    Case("aquant-tensor", partial(AQuant, per="tensor", border="linear"), "relu"),
    Case("aquant-sigmoid", partial(AQuant, per="channel", squash="sigmoid"), "relu"),
    Case("pact", PACT, "relu"),
    Case("pact-signed", PACT, "signed"),
]

each = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
# Columns have one order in memory and are made anew for every input: no channels_last, no part.
planes = pytest.mark.parametrize("case", [c for c in CASES if not c.columns], ids=lambda c: c.name)


def widths(flag: str = "name") -> pytest.MarkDecorator:
    """Every case that has `flag`, at each of its widths."""
    pairs = [(c, b) for c in CASES if getattr(c, flag) for b in c.widths]
    return pytest.mark.parametrize(
        ("case", "bits"), pairs, ids=[f"{c.name}-{b}bit" for c, b in pairs]
    )


def rows(x: Tensor) -> Tensor:
    """The parts that own a grid each: channels of a weight, samples of an input, [R, M]."""
    return x.flatten(1)


def ordered(x: Tensor, q: Quantizer) -> Tensor:
    """The parts in which a larger input has no smaller output: rows, or what shares a border."""
    return x.flatten(2).flatten(0, 1) if isinstance(q, AQuant) and q.per != "tensor" else rows(x)


@widths()
def test_decoded_codes_equal_forward_bit_for_bit(case: Case, bits: int) -> None:
    q, x = case.calibrated(bits)
    with torch.no_grad():
        codes = q.codes(x)
        assert codes.dtype == torch.int32
        assert codes.shape == x.shape
        assert torch.equal(q.decode(codes, q.context(x)), q(x))


@widths()
def test_no_tensor_holds_more_levels_than_its_bits_number(case: Case, bits: int) -> None:
    q, _ = case.calibrated(bits)
    torch.manual_seed(1)
    x = torch.randn(case.shape) * (0.1 if case.role == "weight" else 3)
    with torch.no_grad():
        codes, x_hat = q.codes(x), q(x)
    assert (q.num_levels > 2**bits) == case.overflows
    assert q.effective_bits == pytest.approx(
        max(bits, torch.tensor(float(q.num_levels)).log2().item())
    )
    assert codes.min() >= q.qmin
    assert codes.max() <= q.qmax
    for row in rows(x_hat):
        assert row.unique().numel() <= q.num_levels


@each
def test_weight_levels_are_sorted_distinct_and_contain_the_output(case: Case) -> None:
    if case.role != "weight":
        pytest.skip("levels() is for weights")
    for bits in case.widths:
        q, w = case.calibrated(bits)
        levels = q.levels()
        assert levels.shape[-1] == q.num_levels
        assert (levels.diff(dim=-1) > 0).all()
        with torch.no_grad():
            w_hat = rows(q(w))
        for i, row in enumerate(w_hat):
            assert torch.isin(row, levels[i if levels.shape[0] > 1 else 0]).all()


@each
def test_calibration_keeps_the_shape_of_the_state(case: Case) -> None:
    q = case.build(case.widths[0])
    before = {k: (v.shape, v.dtype) for k, v in q.state_dict().items()}
    assert not q.calibrated
    q.calibrate(case.sample())
    assert q.calibrated
    assert before == {k: (v.shape, v.dtype) for k, v in q.state_dict().items()}
    assert all(v.dtype == torch.float32 for v in q.parameters())


@each
def test_state_dict_and_deepcopy_reproduce_the_output(case: Case) -> None:
    q, x = case.calibrated(case.widths[-1])
    q.train()(x)  # a training step may move buffers
    q.eval()
    torch.manual_seed(7)
    other = case.build(case.widths[-1]).eval()
    other.load_state_dict(q.state_dict(), strict=True)
    with torch.no_grad():
        expected = q(x)
        assert torch.equal(other(x), expected)
        assert torch.equal(copy.deepcopy(q)(x), expected)


@widths()
def test_gradients_reach_the_input_and_every_parameter(case: Case, bits: int) -> None:
    q, x = case.calibrated(bits)
    x = (1.5 * x).requires_grad_()  # some of it clipped: an offset learns from that alone
    (q.train()(x) * torch.linspace(0.5, 1.5, x.numel()).view_as(x)).sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
    assert x.grad.isfinite().all()
    for name, parameter in q.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("case", [c for c in CASES if c.role != "weight"], ids=lambda c: c.name)
def test_an_empty_batch_gives_an_empty_result_and_changes_nothing(case: Case) -> None:
    q, x = case.calibrated(case.widths[0])
    before = copy.deepcopy(q.state_dict())
    for training in (False, True):
        empty = x[:0].clone().requires_grad_()
        y = q.train(training)(empty)
        y.sum().backward()
        assert y.shape == empty.shape
        assert all(p.grad is None or not p.grad.any() for p in q.parameters())
    assert q.codes(x[:0]).shape == x[:0].shape
    for name, value in q.state_dict().items():
        assert torch.equal(value, before[name]), name


@widths("idempotent")
def test_quantizing_twice_changes_nothing(case: Case, bits: int) -> None:
    q, x = case.calibrated(bits)
    with torch.no_grad():
        once = q(x)
        assert torch.equal(q(once), once)


@widths("monotone")
def test_output_is_monotone_in_the_input(case: Case, bits: int) -> None:
    q, x = case.calibrated(bits)
    ascending = ordered(x, q).sort(dim=1).values.view_as(x)
    with torch.no_grad():
        assert (ordered(q(ascending), q).diff(dim=1) >= 0).all()


@each
@given(exponent=st.integers(-6, 6), seed=st.integers(0, 2**16))
@settings(deadline=None, max_examples=5)
def test_scaling_the_input_scales_the_output(case: Case, exponent: int, seed: int) -> None:
    if not case.equivariant:
        return
    c = 2.0**exponent  # exact in float32
    for bits in case.widths[:3]:
        q, x = case.calibrated(bits, seed)
        scaled, cx = case.calibrated(bits, seed, c)
        with torch.no_grad():
            torch.testing.assert_close(scaled(cx), c * q(x), rtol=1e-6, atol=0)


@each
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_more_bits_never_mean_more_error(case: Case, seed: int) -> None:
    errors = []
    for bits in case.widths:
        q, x = case.calibrated(bits, seed)
        with torch.no_grad():
            errors.append((q(x) - x).square().mean().item())
    for narrow, wide in pairwise(errors):
        assert wide <= narrow * (1 + 1e-3)  # POT stops gaining: its end gap is fixed


@widths()
@pytest.mark.parametrize("value", [0.0, 0.25], ids=["zeros", "constant"])
def test_constant_tensors_stay_finite(case: Case, bits: int, value: float) -> None:
    q = case.build(bits)
    x = torch.full_like(case.sample(), value)
    q.calibrate(x)
    alive_(q)
    x.requires_grad_()
    y = q.train()(x)
    y.sum().backward()
    assert y.isfinite().all()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in q.parameters())


@each
def test_in_float64_it_is_the_same_function(case: Case) -> None:
    q, x = case.calibrated(4)
    with torch.no_grad():
        here, exact = q(x), copy.deepcopy(q).double()(x.double())
    assert exact.dtype == torch.float64
    levels = here.unique()
    step = levels.diff().max() if len(levels) > 1 else torch.ones(())
    apart = (exact - here).abs()
    assert apart.max() <= 1.01 * step  # a value on a border may go to the next level
    assert (apart > 1e-5).float().mean() < 0.01


@each
def test_bfloat16_in_gives_bfloat16_out_and_float32_state(case: Case) -> None:
    for bits in case.widths:
        q, x = case.calibrated(bits)
        x16 = x.bfloat16().requires_grad_()
        y = q.train()(x16)
        y.float().sum().backward()
        assert y.dtype == torch.bfloat16
        assert x16.grad is not None
        assert x16.grad.dtype == torch.bfloat16
        q.eval()
        with torch.no_grad():
            decoded = q.decode(q.codes(x16), q.context(x16))
            assert torch.equal(decoded.bfloat16(), q(x16))
        assert all(p.dtype == torch.float32 for p in q.parameters())


@planes
def test_channels_last_changes_no_value_and_no_gradient(case: Case) -> None:
    q, x = case.calibrated(case.widths[1])
    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    results = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        v = x.clone(memory_format=memory_format).requires_grad_()
        q.zero_grad()
        y = q(v)
        assert y.is_contiguous(memory_format=memory_format)
        (y * weight).sum().backward()
        results.append((y.detach(), v.grad, [p.grad.clone() for p in q.parameters()]))
        assert torch.equal(q.codes(v.detach()), q.codes(x))
    (y0, g0, p0), (y1, g1, p1) = results
    torch.testing.assert_close(y1, y0, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(g1, g0, rtol=1e-4, atol=1e-6)
    for a, b in zip(p1, p0, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


CUTS = {
    "half of the channels": lambda x: x.chunk(2, 1)[1],
    "every second pixel": lambda x: x[:, :, ::2, ::2],
    "transposed": lambda x: x.transpose(2, 3),
}


@planes
@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS.keys())
def test_a_part_of_a_tensor_gets_its_own_gradient(case: Case, cut: Callable) -> None:
    if case.role == "weight":
        return
    q, x = case.calibrated(case.widths[1])
    wide = torch.cat([x, x], 1).repeat(1, 1, 2, 2)
    part = cut(wide)
    if part.shape[1] != x.shape[1]:
        part, wide = part[:, : x.shape[1]], wide[:, : x.shape[1]]
    e = torch.randn(part.shape, generator=torch.Generator().manual_seed(3))
    results = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        v = wide.clone(memory_format=memory_format).requires_grad_()
        y = q(cut(v) if cut(v).shape == part.shape else cut(v)[:, : x.shape[1]])
        (y * e).sum().backward()
        results.append((y.detach(), v.grad))
    own = part.clone(memory_format=torch.contiguous_format).requires_grad_()
    (q(own) * e).sum().backward()
    assert own.grad is not None
    for y, grad in results:
        torch.testing.assert_close(y, q(own).detach(), rtol=1e-5, atol=1e-6)
        assert grad is not None
        found = cut(grad)[:, : x.shape[1]]
        torch.testing.assert_close(found, own.grad, rtol=1e-4, atol=1e-6)


@each
def test_a_training_step_never_waits_for_the_device(case: Case) -> None:
    with FakeTensorMode():  # a fake tensor has no value: .item() and bool() raise
        q = case.build(case.widths[1]).train()
        x = torch.randn(case.shape, requires_grad=True)
        q(x).sum().backward()
        assert x.grad is not None
        q.health()


@pytest.mark.skipif(
    not torch.cuda.is_available() and torch.__version__ < "2.15", reason="torch would want a driver"
)
@each
def test_on_a_gpu_it_mixes_in_nothing_of_the_cpu(case: Case) -> None:
    """By shape and device alone: no machine with a GPU is needed."""
    with FakeTensorMode():
        q = case.build(case.widths[1]).train()
        for module in q.modules():
            for tensors in (module._parameters, module._buffers):
                for name, t in tensors.items():
                    assert t is not None
                    there = torch.empty(t.shape, dtype=t.dtype, device="cuda")
                    learned = isinstance(t, torch.nn.Parameter)
                    tensors[name] = torch.nn.Parameter(there) if learned else there
        x = torch.randn(case.shape, device="cuda")
        assert q(x).device.type == "cuda"
        assert q.codes(x).device.type == "cuda"
        assert all(count.device.type == "cuda" for count in q.health().values())


@pytest.mark.parametrize("bits", [0, 17, 2.5, True])
@each
def test_a_width_outside_the_contract_is_refused(case: Case, bits: object) -> None:
    with pytest.raises(ValueError, match="bits"):
        case.build(bits)  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------
# Compiled against eager


def step(q: Quantizer, fn: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    """Output and all gradients of one training step."""
    q.zero_grad()
    v = x.clone().requires_grad_()
    y = fn(v)
    (y * torch.linspace(0.5, 1.5, x.numel()).view_as(x)).sum().backward()
    assert v.grad is not None
    return [y.detach(), v.grad, *(p.grad.clone() for p in q.parameters() if p.grad is not None)]


def first_of_each_class() -> list[Case]:
    """Tracing costs a second: one case a class by default, all of them under `slow`."""
    found: dict[object, Case] = {}
    for case in CASES:
        found.setdefault((getattr(case.make, "func", case.make), case.columns), case)
    return list(found.values())


@pytest.mark.parametrize("case", first_of_each_class(), ids=lambda c: c.name)
def test_a_training_step_traces_as_one_graph(case: Case) -> None:
    q, x = case.calibrated(case.widths[0])
    twin = copy.deepcopy(q.train())  # a training step may move buffers
    torch._dynamo.reset()
    graph = torch.compile(q, fullgraph=True, backend="aot_eager")
    got = step(q, graph, x)  # type: ignore[arg-type]
    for a, b in zip(got, step(twin, twin, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


class Block(nn.Module):
    """A layer around a quantizer in a residual block: its gradient comes from a mean as well."""

    def __init__(self, quantizer: Quantizer, role: str) -> None:
        super().__init__()
        self.signed = role == "signed"
        self.first, self.norm = nn.Conv2d(3, FIELD[0], 3), nn.BatchNorm2d(FIELD[0])
        second = nn.Conv2d(FIELD[0], WEIGHT[0], 3, padding=1)
        operands = (quantizer, Identity()) if role == "weight" else (Identity(), quantizer)
        self.second = QuantConv2d.from_float(second, *operands)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.first(x))
        h = h if self.signed else h.relu()
        return (h[:, : WEIGHT[0]] + self.second(h).relu()).mean((2, 3))


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("case", first_of_each_class(), ids=lambda c: c.name)
def test_in_a_traced_network_gradients_meet_their_elements_in_any_memory_order(
    case: Case, order: torch.memory_format
) -> None:
    q, _ = case.calibrated(3)
    model = Block(q, case.role).to(memory_format=order).train()  # type: ignore[call-overload]
    twin = copy.deepcopy(model)
    x = torch.randn(4, 3, 7, 7, generator=torch.Generator().manual_seed(0)).to(memory_format=order)
    torch._dynamo.reset()
    found = []
    for net, fn in ((model, torch.compile(model, backend="aot_eager")), (twin, twin)):
        y = fn(x)
        (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
        found.append([y.detach(), *(p.grad for p in net.parameters() if p.grad is not None)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@each
def test_whole_graph_compiles_and_equals_eager(case: Case) -> None:
    q, x = case.calibrated(4 if 4 in case.widths else case.widths[0])
    torch._dynamo.reset()
    expected = step(q, q, x)
    for a, b in zip(step(q, torch.compile(q, fullgraph=True), x), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@each
def test_compiled_kernels_equal_eager(case: Case) -> None:
    q, x = case.calibrated(4 if 4 in case.widths else case.widths[0])
    expected = step(q, q, x)
    compile_kernels(True)
    try:
        got = step(q, q, x)
    finally:
        compile_kernels(False)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
