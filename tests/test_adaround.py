"""Calibrated nearest and learned weight rounding."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from qexp.quant.adaround import AdaRound, inverse_rectified_sigmoid, rectified_sigmoid
from qexp.quant.nearest import Nearest

SHAPE = (6, 4, 3, 3)


def weights(seed: int = 0) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)) * 0.1 + 0.02


def pair(bits: int, symmetric: bool = False, seed: int = 0) -> tuple[AdaRound, Nearest, Tensor]:
    w = weights(seed)
    a = AdaRound(bits, shape=SHAPE, symmetric=symmetric)
    n = Nearest(bits, shape=SHAPE, per_channel=True, symmetric=symmetric)
    a.calibrate(w)
    n.calibrate(w)
    return a, n, w


@given(bits=st.integers(2, 8), symmetric=st.booleans(), seed=st.integers(0, 999))
@settings(deadline=None, max_examples=20)
def test_hard_rounding_starts_as_nearest_bit_for_bit(bits: int, symmetric: bool, seed: int) -> None:
    a, n, w = pair(bits, symmetric, seed)
    assert torch.equal(a(w), n(w))
    assert torch.equal(a.codes(w), n.codes(w))


def test_ties_and_their_neighbours_start_as_nearest() -> None:
    tie = torch.arange(8) + 0.5
    near = torch.arange(-60, 61)
    w = torch.cat([(tie[:, None] + near * 2.0**-21).flatten(), 0.5 + near * 2.0**-25]).view(1, -1)
    a, n = AdaRound(4, shape=w.shape), Nearest(4, shape=w.shape, per_channel=True)
    a.round_nearest(w)  # both with step 1
    assert torch.equal(a.codes(w), n.codes(w))
    assert torch.equal(a(w), n(w))


def test_soft_rounding_starts_as_the_clipped_float_weight() -> None:
    a, n, w = pair(3)
    a.soft = True
    levels = n.levels()
    low = levels[:, :1, None, None].amin(1, keepdim=True)
    high = levels[:, -1:, None, None]
    torch.testing.assert_close(a(w), w.clamp(low, high), rtol=1e-4, atol=1e-6)


def test_ties_round_up_as_in_floor_of_u_plus_one_half() -> None:
    q = Nearest(4, signed=True)
    q.scale.data.fill_(1.0)
    x = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5])
    assert q(x).tolist() == [-2.0, -1.0, 0.0, 1.0, 2.0, 3.0]


def test_penalty_and_its_gradient_match_numpy() -> None:
    a, _, _ = pair(3)
    a.rounding.data.copy_(torch.linspace(-4, 4, a.rounding.numel()).view(SHAPE))
    a.penalty(5.0).backward()
    v = a.rounding.detach().double().numpy()

    def f(v: np.ndarray) -> np.ndarray:
        h = np.clip(1.2 / (1 + np.exp(-v)) - 0.1, 0, 1)
        return 1 - np.abs(2 * h - 1) ** 5

    assert a.penalty(5.0).item() == pytest.approx(f(v).sum(), rel=1e-5)
    slope = (f(v + 1e-6) - f(v - 1e-6)) / 2e-6
    assert a.rounding.grad is not None
    np.testing.assert_allclose(a.rounding.grad.numpy(), slope, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("soft", [True, False])
def test_gradient_of_the_rounding_matches_closed_form(soft: bool) -> None:
    a, _, w = pair(2)
    a.soft = soft
    with torch.no_grad():
        a.rounding[0] = torch.linspace(-6, 6, 36).view(SHAPE[1:])  # beyond 2.4 decided
    e = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    (a(w) * e).sum().backward()
    u = w / a.scale
    s = a.rounding.detach().sigmoid()
    h = rectified_sigmoid(a.rounding.detach())
    up = h if soft else (a.rounding.detach() >= 0).float()
    x_int = u.floor() + up + a.zero
    inside = (x_int >= a.qmin) & (x_int <= a.qmax)
    free = (h > 0) & (h < 1)
    expected = e * a.scale * inside * free * 1.2 * s * (1 - s)
    torch.testing.assert_close(a.rounding.grad, expected, rtol=1e-4, atol=1e-7)


def test_hard_rounding_passes_gradient_at_the_outermost_codes() -> None:
    a, _, w = pair(2)
    w.requires_grad_()
    e = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    (a(w) * e).sum().backward()
    x_int = (w.detach() / a.scale).floor() + (a.rounding.detach() >= 0) + a.zero
    inside = (x_int >= a.qmin) & (x_int <= a.qmax)
    assert bool((inside & ((x_int == a.qmin) | (x_int == a.qmax))).any())
    torch.testing.assert_close(w.grad, e * inside)


@pytest.mark.parametrize("beta", [2.0, 5.0, 20.0])
def test_soft_rounding_and_penalty_pass_gradcheck(beta: float) -> None:
    a = AdaRound(3, shape=(41,), per_channel=False).double()
    v = torch.linspace(-3, 3, 41, dtype=torch.float64, requires_grad=True)  # beyond 2.4 decided
    del a.rounding  # a parameter, for which no other tensor can stand

    def penalty(v: Tensor) -> Tensor:
        a.rounding = v  # type: ignore[assignment]
        return a.penalty(beta)

    h = rectified_sigmoid(v)
    assert ((h == 0).any(), (h == 1).any()) == (True, True)
    assert torch.autograd.gradcheck(rectified_sigmoid, (v,))
    assert torch.autograd.gradcheck(penalty, (v,))


def test_rectified_sigmoid_inverts() -> None:
    h = torch.linspace(0, 1, 101)
    torch.testing.assert_close(rectified_sigmoid(inverse_rectified_sigmoid(h)), h)


@pytest.mark.parametrize("estimator", ["mse", "percentile", "absmax"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("cls", [Nearest, AdaRound])
def test_per_channel_equals_a_loop_of_per_tensor(
    cls: type[Nearest | AdaRound], symmetric: bool, estimator: Any
) -> None:
    w = weights() * torch.logspace(-2, 0, 6).view(-1, 1, 1, 1)
    e = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    own = {"symmetric": symmetric, "estimator": estimator}
    q = cls(3, shape=SHAPE, per_channel=True, **own)
    loop = [cls(3, shape=(1, *SHAPE[1:]), per_channel=False, **own) for _ in range(6)]
    q.calibrate(w)
    w.requires_grad_()
    (q(w) * e).sum().backward()
    assert q.scale.unique().numel() == 6
    for c, one in enumerate(loop):
        v = w.detach()[c : c + 1].requires_grad_()
        one.calibrate(v)
        (one(v) * e[c]).sum().backward()
        assert torch.equal(one.scale, q.scale[c].view(()))
        assert torch.equal(one.zero, q.zero[c].view(()))
        assert torch.equal(one(v)[0], q(w)[c])
        assert torch.equal(one.codes(v)[0], q.codes(w)[c])
        assert torch.equal(one.levels()[0], q.levels()[c])
        assert torch.equal(v.grad[0], w.grad[c])  # type: ignore[index]
        for name, parameter in one.named_parameters():
            whole = q.get_parameter(name)
            assert parameter.grad is not None
            assert whole.grad is not None
            torch.testing.assert_close(parameter.grad.flatten(), whole.grad[c].flatten())


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("per_channel", [True, False])
def test_nearest_equals_torchs_own_fake_quantize(
    per_channel: bool, symmetric: bool, bits: int
) -> None:
    w = weights() * torch.logspace(-2, 0, 6).view(-1, 1, 1, 1)
    q = Nearest(bits, shape=SHAPE, per_channel=per_channel, symmetric=symmetric)
    q.calibrate(w)
    w = 1.5 * w  # some of it clipped
    u = w / q.scale.detach()
    tie = (u - u.floor() - 0.5).abs() < 1e-3  # torch rounds those to even
    w = torch.where(tie, 0.9 * w, w)
    e = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    grid = (q.scale.detach().flatten(), q.zero.flatten().int())
    found = []
    for torchs in (True, False):
        v = w.clone().requires_grad_()
        if not torchs:
            y = q(v)
        elif per_channel:
            y = torch.fake_quantize_per_channel_affine(v, *grid, 0, q.qmin, q.qmax)
        else:
            y = torch.fake_quantize_per_tensor_affine(v, *grid, q.qmin, q.qmax)
        (y * e).sum().backward()
        found.append((y.detach(), v.grad))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    assert not torch.equal(found[0][1], e)


@given(bits=st.integers(2, 16), seed=st.integers(0, 999))
@settings(deadline=None, max_examples=40)
def test_latent_weights_round_to_the_learned_codes(bits: int, seed: int) -> None:
    a, n, w = pair(bits, seed=seed)
    torch.manual_seed(seed)
    nn.init.normal_(a.rounding)  # any decision
    latent = a.latent(w)
    assert torch.equal(n.codes(latent), a.codes(w))
    kept = n.codes(w) == a.codes(w)
    margin = (0.02 if bits > 11 else 2e-3) * a.scale.expand(SHAPE)[kept]
    assert ((latent - w)[kept].abs() <= margin).all()  # no further than it must


def test_undecided_counts_what_is_between() -> None:
    a, _, _ = pair(3)
    nn.init.constant_(a.rounding, 5.0)
    a.rounding.data.view(-1)[:7] = 0.0
    assert int(a.undecided()) == 7


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_searched_grid_is_no_worse_than_absmax_in_its_own_norm(bits: int, symmetric: bool) -> None:
    w = weights(3)
    errors = {}
    for estimator in ("mse", "absmax"):
        q = Nearest(bits, shape=SHAPE, per_channel=True, symmetric=symmetric, estimator=estimator)
        q.calibrate(w)
        errors[estimator] = (q(w) - w).abs().pow(2.4).flatten(1).sum(1)
    assert (errors["mse"] <= errors["absmax"] * (1 + 1e-5)).all()


def test_zero_point_lowers_the_error_of_skewed_inputs_and_represents_zero() -> None:
    x = torch.randn(4, 100, generator=torch.Generator().manual_seed(0)) + 1.0
    errors = []
    for symmetric in (True, False):
        q = Nearest(3, signed=True, symmetric=symmetric)
        q.calibrate(x)
        errors.append(float((q(x) - x).detach().square().mean()))
        assert float(q(torch.zeros(1)).detach()) == 0.0
    assert errors[1] < errors[0]


def test_percentile_leaves_out_the_tail() -> None:
    x = torch.cat([torch.linspace(0, 1, 999), torch.tensor([100.0])])[None]
    q = Nearest(8, signed=False, estimator="percentile", percent=99.0)
    q.calibrate(x)
    assert float(q.scale.detach()) * 255 == pytest.approx(1.0, rel=0.02)


def test_unknown_estimator_is_refused_by_name() -> None:
    q = Nearest(4, estimator="median")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="median"):
        q.calibrate(weights())


@pytest.mark.parametrize("cls", [AdaRound, Nearest])
def test_a_zero_point_costs_a_byte_a_row_and_two_above_8_bits(cls: type) -> None:
    for bits, symmetric, signed, each in (
        (4, False, True, 4 + 1),
        (8, False, True, 4 + 1),
        (10, False, True, 4 + 2),
        (4, True, True, 4),
        (4, False, False, 4),
    ):
        q = cls(bits, shape=SHAPE, per_channel=True, symmetric=symmetric, signed=signed)
        assert q.extra_bytes() == 6 * each
        q.calibrate(weights())
        assert (q.zero != 0).any() == (each > 4)


def test_nearest_gradients_match_closed_form_with_a_zero_point_and_clipping() -> None:
    # step 0.5, codes -2..1, zero point -1: levels -0.5, 0, 0.5, 1
    q = Nearest(2, signed=True)
    q.scale.data.fill_(0.5)
    q.zero.fill_(-1.0)
    x = torch.tensor([[-3.0, -0.7, 0.2, 0.75, 1.2, 4.0]], requires_grad=True)
    y = q(x)
    assert y.tolist() == [[-0.5, -0.5, 0.0, 1.0, 1.0, 1.0]]
    e = torch.tensor([[1.0, 10.0, 100.0, 1000.0, 10000.0, 100000.0]])
    y.backward(e)
    inside = torch.tensor([[0.0, 1.0, 1.0, 1.0, 1.0, 0.0]])
    t = y.detach() / 0.5 - inside * x.detach() / 0.5
    g = 1 / (6 * 3) ** 0.5
    torch.testing.assert_close(x.grad, e * inside)
    torch.testing.assert_close(q.scale.grad, g * (e * t).sum())


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize(("p", "shift"), [(2.4, 0.1), (2.4, -0.1), (1.0, 0.1)])
def test_searched_grid_is_the_best_of_all_widths_and_zero_points(
    bits: int, p: float, shift: float
) -> None:
    w = 0.1 * torch.randn(300, generator=torch.Generator().manual_seed(bits)) + shift
    q = Nearest(bits, shape=tuple(w.shape), p=p)
    q.calibrate(w)
    low, high, steps = float(w.min()), float(w.max()), q.qmax - q.qmin
    widest = (high - low) / steps
    natural = round(q.qmin - low / widest)

    def error(step: float, zero: int) -> float:
        code = ((w / step + 0.5).floor() + zero).clamp(q.qmin, q.qmax)
        return float(((code - zero) * step - w).abs().pow(p).sum())

    zeros = [max(q.qmin, min(q.qmax, natural + k)) for k in range(-2, 3)]
    least = min(error(widest * i / 80, zero) for i in range(1, 81) for zero in zeros)
    assert error(q.scale.item(), int(q.zero)) == pytest.approx(least, rel=1e-4)


def test_percentile_leaves_the_same_number_out_at_either_end() -> None:
    x = torch.randperm(1000, generator=torch.Generator().manual_seed(0)) - 399.0  # -399 .. 600
    q = Nearest(8, signed=True, estimator="percentile", percent=90.0, shape=(1000,))
    q.calibrate(x)
    # 50 on either side: -349 .. 550
    assert q.scale.item() == pytest.approx((550 + 349) / 255)
    assert int(q.zero) == round(-128 + 349 / q.scale.item())


@pytest.mark.parametrize("estimator", ["mse", "absmax", "percentile"])
def test_a_grid_of_values_above_zero_still_contains_zero(estimator: str) -> None:
    x = torch.linspace(2.0, 3.0, 100)
    q = Nearest(4, signed=True, shape=(100,), estimator=estimator)  # type: ignore[arg-type]
    q.calibrate(x)
    assert (q.levels() == 0).any()
    assert q.levels().max() == pytest.approx(3.0, rel=0.1)
