"""N2UQ: G-STE against its definition, thresholds against a transcription, weights likewise."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qexp.quant.cells import bin_sums, gather, search
from qexp.quant.functional import compile_kernels, midpoints
from qexp.quant.lsq import LSQ
from qexp.quant.n2uq import MAX_BITS, MIN_SEGMENT, N2UQ, N2UQWeight

WIDTHS = [(bits, signed) for bits in (1, 2, 4, 8) for signed in (False, True) if bits > signed]


def uneven(bits: int, signed: bool = False, count: str | None = None) -> N2UQ:
    """A quantizer away from its initial state."""
    g = torch.Generator().manual_seed(bits)
    q = N2UQ(bits, signed=signed, count=count)  # type: ignore[arg-type]
    with torch.no_grad():
        q.start.add_(0.07)
        q.lengths.mul_(0.5 + torch.rand(q.segments, generator=g))
        q.input_scale.fill_(0.8)
        q.output_scale.fill_(1.3)
    return q


def sample(n: int = 400, signed: bool = False) -> Tensor:
    x = 1.5 * torch.randn(8, n // 8, generator=torch.Generator().manual_seed(1))
    return x if signed else x.relu()


def numpy_forward(q: N2UQ, x: np.ndarray) -> np.ndarray:
    """The paper's equations with a loop over thresholds, in float64."""
    s, beta1, beta2 = (float(p.detach()) for p in (q.start, q.input_scale, q.output_scale))
    z, code, d = beta1 * x.astype(np.float64), np.zeros_like(x, dtype=np.float64), s
    for a in np.maximum(q.lengths.detach().double().numpy(), 1e-3):
        code += z > d + a / 2
        d += a
    return (code + q.qmin) * (2 / (2**q.bits - 1)) * beta2


@pytest.mark.parametrize(("bits", "signed"), WIDTHS)
def test_forward_matches_a_loop_over_thresholds(bits: int, signed: bool) -> None:
    q, x = uneven(bits, signed), sample(signed=signed)
    with torch.no_grad():
        np.testing.assert_allclose(q(x).numpy(), numpy_forward(q, x.numpy()), rtol=1e-5, atol=1e-6)


def definition(q: N2UQ, x: Tensor, e: Tensor) -> tuple[list[Tensor], Tensor]:
    """Gradients of x, s, a, beta1 of the piecewise linear h by autograd, and of beta2, float64."""
    x, s, a, beta1, beta2 = (
        p.detach().double().requires_grad_()
        for p in (x, q.start, q.lengths, q.input_scale, q.output_scale)
    )
    z = (beta1 * x)[..., None]
    ends = s + a.cumsum(0)
    h = ((z - (ends - a)) / a).clamp(0, 1).sum(-1)  # [..., m] summed over segments
    (e.double() * h * q.delta * beta2.detach()).sum().backward()
    code = (z.detach() > (ends - a / 2)).sum(-1) + q.qmin
    return [p.grad for p in (x, s, a, beta1)], (e * code * q.delta).sum()  # type: ignore[misc]


@pytest.mark.parametrize(("bits", "signed"), WIDTHS)
def test_gste_is_the_derivative_of_the_expected_stochastic_rounding(
    bits: int, signed: bool
) -> None:
    q, x = uneven(bits, signed), sample(signed=True).requires_grad_()
    e = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    q(x).backward(e)
    got = [p.grad for p in (x, q.start, q.lengths, q.input_scale, q.output_scale)]
    smooth, beta2 = definition(q, x, e)
    for a, b in zip(got, [*smooth, beta2], strict=True):
        assert a is not None
        assert (a - b).norm() <= 1e-3 * b.norm() + 1e-6  # beta1 cancels in float32


@pytest.mark.parametrize(("count", "n"), [("sample", 50), ("tensor", 400)])
@pytest.mark.parametrize("signed", [False, True])
def test_the_gradient_scale_multiplies_the_gradient_of_every_parameter(
    signed: bool, count: str, n: int
) -> None:
    x = sample(signed=signed).requires_grad_()
    found = []
    for q in (uneven(3, signed), uneven(3, signed, count)):
        x.grad = None
        q(x).square().sum().backward()
        found.append([x.grad, *(p.grad for p in q.parameters())])
    g = 1 / (n * 7) ** 0.5  # m = 2^b - 1 segments, signed or not
    assert torch.equal(found[0][0], found[1][0])  # type: ignore[arg-type]
    for plain, scaled in zip(found[0][1:], found[1][1:], strict=True):
        assert plain is not None
        torch.testing.assert_close(scaled, g * plain)


@pytest.mark.parametrize("init", ["mse", "paper"])
def test_calibration_forgets_what_was_learned(init: str) -> None:
    x = sample()
    q, fresh = uneven(3), N2UQ(3, signed=False, init=init)  # type: ignore[arg-type]
    q.init = init  # type: ignore[assignment]
    for each in (q, fresh):
        each.calibrate(x)
    for p, expected in zip(q.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(p, expected)
    torch.testing.assert_close(q.input_scale * q.output_scale, torch.tensor(1.0))
    assert (q.input_scale == 1) == (init == "paper")


def test_equal_segments_are_lsq_forward_and_have_its_straight_through_slope() -> None:
    x = sample(signed=True)
    q, lsq = N2UQ(3, signed=True), LSQ(3, signed=True, init="mse")
    q.calibrate(x)
    lsq.calibrate(x)
    a, b = (x.clone().requires_grad_() for _ in range(2))
    y, z = q(a), lsq(b)
    torch.testing.assert_close(y, z, rtol=1e-5, atol=1e-6)
    y.sum().backward()
    z.sum().backward()
    assert a.grad is not None
    assert b.grad is not None
    slope = a.grad[a.grad != 0]
    torch.testing.assert_close(slope, torch.ones_like(slope), rtol=1e-4, atol=1e-4)
    assert torch.equal(a.grad != 0, b.grad != 0)


def test_nothing_outside_the_segments_has_a_gradient() -> None:
    q = uneven(2)
    borders = q.grid()[0].detach()
    x = torch.stack([borders[0] - 1, borders[0], borders[-1] + 1]).view(1, 3).requires_grad_()
    q(x).sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() == 0
    for p in (q.start, q.lengths, q.input_scale):
        assert p.grad is not None
        assert p.grad.abs().sum() == 0
    last = borders[-1:].view(1, 1).requires_grad_()  # a segment has its upper end
    q(last).sum().backward()
    assert last.grad is not None
    assert last.grad.item() > 0


def test_thresholds_are_where_the_output_changes() -> None:
    q = uneven(3)
    with torch.no_grad():
        t = q.thresholds()
        assert torch.equal(q.codes(t), torch.arange(7).int())
        assert torch.equal(q.codes(torch.nextafter(t, t + 1)), torch.arange(1, 8).int())
        assert torch.equal(q.levels()[0], q.decode(torch.arange(8)))


def test_a_segment_below_its_bound_is_held_there_counted_and_can_grow_again() -> None:
    q = uneven(2)
    with torch.no_grad():
        q.lengths[1] = -0.5
    borders = q.grid()[0].detach() * q.input_scale.detach()
    torch.testing.assert_close(borders.diff()[1].item(), MIN_SEGMENT, rtol=1e-3, atol=0)
    assert q.health()["clamped_segments"] == 1
    x = ((borders[1] + borders[2]) / 2 / q.input_scale.detach()).view(1, 1)
    q(x).sum().backward()
    assert q.lengths.grad is not None
    assert q.lengths.grad[1] != 0


def test_only_the_input_is_saved_for_backward() -> None:
    q, saved = uneven(4), []
    x = sample(4096).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        q(x)
    assert sum(t.numel() for t in saved if t.numel() > 100) == x.numel()


def test_a_nan_input_reaches_no_other_gradient_bin() -> None:
    q, x = uneven(2), sample(64)
    x[3, 2] = torch.nan
    x.requires_grad_()
    q(x).sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert q.lengths.grad is not None
    assert q.lengths.grad.isfinite().all()


# ---------------------------------------------------------------------------------------------
# Cells


@given(seed=st.integers(0, 2**16), k=st.integers(1, 8))
@settings(deadline=None, max_examples=20)
def test_branchless_search_counts_what_bucketize_counts(seed: int, k: int) -> None:
    g = torch.Generator().manual_seed(seed)
    table = torch.rand(2**k - 1, generator=g).sort().values
    x = torch.cat([torch.rand(64, generator=g) * 1.2 - 0.1, table])  # ties too
    expected = torch.bucketize(x, table, out_int32=True)
    assert torch.equal(search(x, table)[0], expected)
    patch = pytest.MonkeyPatch()
    with patch.context() as m:
        m.setattr(torch.compiler, "is_compiling", lambda: True)
        index, masks = search(x, table)
    assert torch.equal(index, expected)
    entries = torch.rand(2**k, generator=g)
    assert torch.equal(gather(entries, index, masks), entries[expected.long()])


def test_bin_sums_add_each_pair_to_its_bin() -> None:
    pairs = torch.tensor([[1.0, 10.0], [2.0, 20.0], [4.0, 40.0]])
    out = bin_sums(pairs, torch.tensor([2, 0, 2], dtype=torch.int32), 4)
    assert out.tolist() == [[2, 20], [0, 0], [5, 50], [0, 0]]


@pytest.mark.slow
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_kernels_equal_eager_at_every_width(
    bits: int, signed: bool, dtype: torch.dtype
) -> None:
    torch._dynamo.reset()
    q, x = uneven(bits, signed), sample(signed=True).to(dtype)
    results = []
    for compiled in (False, True):
        compile_kernels(compiled)
        try:
            q.zero_grad()
            v = x.clone().requires_grad_()
            y = q(v)
            (y * torch.linspace(-1, 1, x.numel()).view_as(x).to(dtype)).sum().backward()
        finally:
            compile_kernels(False)
        results.append([y.detach(), v.grad, *(p.grad.clone() for p in q.parameters())])  # type: ignore[union-attr]
    assert torch.equal(results[0][0], results[1][0])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3 if dtype == torch.bfloat16 else 1e-4, atol=1e-4)


# ---------------------------------------------------------------------------------------------
# Weights


def numpy_weights(w: np.ndarray, bits: int) -> np.ndarray:
    """Entropy-preserving weights, METHODS of the paper, one output channel at a time."""
    n = 2**bits - 1
    out = np.empty_like(w, dtype=np.float64)
    for c in range(w.shape[0]):
        scale = np.abs(w[c]).mean() * n / 2 ** (bits - 1)
        v = np.clip(w[c] / scale, -1, 1)
        out[c] = scale * (np.round((v + 1) * n / 2) * 2 / n - 1)
    return out


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_weights_match_the_entropy_preserving_equation(bits: int) -> None:
    w = 0.1 * torch.randn(5, 4, 3, 3, generator=torch.Generator().manual_seed(3))
    q = N2UQWeight(bits, shape=w.shape)
    expected = numpy_weights(w.numpy().astype(np.float64), bits)
    np.testing.assert_allclose(q(w).numpy(), expected, rtol=1e-5, atol=1e-7)
    assert q.num_levels == 2**bits
    assert q.extra_bytes() == 4 * 5  # a scale a row
    assert (q.levels() != 0).all()
    torch.testing.assert_close(q.thresholds(), midpoints(q.levels()[0]))


def test_two_bit_weights_use_all_levels_about_equally() -> None:
    w = torch.rand(4, 4096, generator=torch.Generator().manual_seed(4)) - 0.5
    counts = N2UQWeight(2, shape=w.shape).codes(w).add(2).flatten().bincount(minlength=4)
    assert counts.min() > 0.5 * counts.max()


def test_weight_gradient_is_the_identity_or_divided_by_the_scale() -> None:
    w = (0.1 * torch.randn(3, 50, generator=torch.Generator().manual_seed(5))).requires_grad_()
    e = torch.randn(3, 50, generator=torch.Generator().manual_seed(6))
    q = N2UQWeight(3, shape=w.shape)
    q(w).backward(e)
    assert torch.equal(w.grad, e)  # type: ignore[arg-type]
    w.grad = None
    N2UQWeight(3, shape=w.shape, gradient="released")(w).backward(e)
    torch.testing.assert_close(w.grad, e / q.scale)


@pytest.mark.parametrize("name", ["input_scale", "output_scale"])
def test_a_scale_of_zero_is_counted(name: str) -> None:
    q = N2UQ(2, signed=False)
    assert q.health()["clamped_steps"] == 0
    with torch.no_grad():
        q.get_parameter(name).zero_()
    assert q.health()["clamped_steps"] == 1


def test_an_input_on_a_threshold_has_one_code_forward_and_backward() -> None:
    from qexp.quant.gste import gste

    step = torch.tensor(1.0, requires_grad=True)
    y = gste(torch.tensor([[0.5, 1.5, 1.75]]), torch.tensor([0.0, 1.0, 2.0]), step, 0)
    assert y.tolist() == [[0.0, 1.0, 2.0]]
    y.backward(torch.tensor([[1.0, 10.0, 100.0]]))
    assert step.grad is not None
    assert step.grad.item() == 210.0  # sum e * code


def test_more_thresholds_than_can_be_learned_apart_are_refused() -> None:
    N2UQ(MAX_BITS, signed=False)
    with pytest.raises(ValueError, match=rf"at most {MAX_BITS} bits, got {MAX_BITS + 1}"):
        N2UQ(MAX_BITS + 1, signed=False)
