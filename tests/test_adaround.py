"""Calibrated nearest and learned weight rounding."""

from __future__ import annotations

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


def test_gradient_of_soft_rounding_matches_closed_form() -> None:
    a, _, w = pair(2)
    a.soft = True
    e = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    (a(w) * e).sum().backward()
    u = w / a.scale
    s = a.rounding.detach().sigmoid()
    h = rectified_sigmoid(a.rounding.detach())
    x_int = u.floor() + h + a.zero
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


def test_rectified_sigmoid_inverts() -> None:
    h = torch.linspace(0, 1, 101)
    torch.testing.assert_close(rectified_sigmoid(inverse_rectified_sigmoid(h)), h)


@given(bits=st.integers(2, 8), seed=st.integers(0, 999))
@settings(deadline=None, max_examples=20)
def test_latent_weights_round_to_the_learned_codes(bits: int, seed: int) -> None:
    a, n, w = pair(bits, seed=seed)
    torch.manual_seed(seed)
    nn.init.normal_(a.rounding)  # any decision
    latent = a.latent(w)
    assert torch.equal(n.codes(latent), a.codes(w))
    kept = n.codes(w) == a.codes(w)
    margin = 2e-3 * a.scale.expand(SHAPE)[kept]
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
