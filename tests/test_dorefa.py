"""DoReFa and PACT against transcriptions of their equations and closed-form gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from qexp.quant.dorefa import PACT, DoReFaActivation, DoReFaWeight


def weights(seed: int = 0) -> Tensor:
    return 0.3 * torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("rescale", ["none", "max", "rms"])
def test_weights_match_the_tanh_equation(bits: int, rescale: str) -> None:
    w, n = weights(), 2**bits - 1
    t = np.tanh(w.double().numpy())
    unit = 2 * np.round((t / np.abs(t).max() / 2 + 0.5) * n) / n - 1
    ratio = np.sqrt((w.double().numpy() ** 2).mean() / (unit**2).mean())
    c = {"none": 1.0, "max": np.abs(t).max(), "rms": ratio}[rescale]
    q = DoReFaWeight(bits, shape=w.shape, rescale=rescale)  # type: ignore[arg-type]
    np.testing.assert_allclose(q(w).numpy(), c * unit, rtol=1e-5, atol=1e-6)


def test_rescaled_weights_keep_the_size_of_the_float_ones() -> None:
    w = weights()
    for bits in (1, 2, 4):
        assert DoReFaWeight(bits, shape=w.shape).extra_bytes() == 4
        rms = DoReFaWeight(bits, shape=w.shape)(w).square().mean().sqrt()
        torch.testing.assert_close(rms, w.square().mean().sqrt())


@pytest.mark.parametrize("rescale", ["none", "max", "rms"])
def test_weight_gradient_passes_tanh_with_its_maximum_constant(rescale: str) -> None:
    w = weights().requires_grad_()
    e = weights(1)
    q = DoReFaWeight(3, shape=w.shape, rescale=rescale)  # type: ignore[arg-type]
    q(w).backward(e)
    t = w.detach().tanh()
    torch.testing.assert_close(w.grad, e * q.scale * (1 - t * t) / t.abs().max())


def test_dorefa_activation_with_the_paper_clip_is_k_bit_on_zero_one() -> None:
    q = DoReFaActivation(2, signed=False, init="paper")
    q.calibrate(torch.ones(1, 1))
    assert q.extra_bytes() == 4
    x = torch.tensor([[-1.0, 0.1, 0.2, 0.6, 1.0, 3.0]], requires_grad=True)
    y = q(x)
    torch.testing.assert_close(y, torch.tensor([[0, 0, 1 / 3, 2 / 3, 1, 1]]))
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[0, 1, 1, 1, 1, 0]]


def numpy_pact(x: np.ndarray, alpha: float, bits: int) -> np.ndarray:
    y = 0.5 * (np.abs(x) - np.abs(x - alpha) + alpha)  # the paper's form of the clip
    n = 2**bits - 1
    return np.round(y * n / alpha) * alpha / n


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_pact_forward_matches_the_paper(bits: int) -> None:
    x = 3 * torch.randn(4, 50, generator=torch.Generator().manual_seed(2))
    q = PACT(bits, signed=False, init="paper")
    q.calibrate(x)
    assert q.alpha.item() == 6
    with torch.no_grad():
        q.alpha.fill_(2.3)
        expected = numpy_pact(x.double().numpy(), q.alpha.double().item(), bits)
        np.testing.assert_allclose(q(x).numpy(), expected, rtol=1e-5, atol=1e-5)


def test_pact_gradients_on_a_hand_made_tensor() -> None:
    q = PACT(2, signed=False)
    with torch.no_grad():
        q.alpha.fill_(3.0)
    x = torch.tensor([[-1.0, 0.0, 1.4, 2.9, 3.0, 5.0]], requires_grad=True)
    q(x).backward(torch.tensor([[1.0, 2.0, 4.0, 8.0, 16.0, 32.0]]))
    assert x.grad is not None
    assert q.alpha.grad is not None
    assert x.grad.tolist() == [[0, 2, 4, 8, 0, 0]]
    assert q.alpha.grad.item() == 16 + 32


def test_signed_pact_is_symmetric_and_pushes_its_clip_from_both_sides() -> None:
    q = PACT(3, signed=True)
    with torch.no_grad():
        q.alpha.fill_(3.0)
    x = torch.tensor([[-4.0, -2.1, 0.4, 2.1, 4.0]], requires_grad=True)
    y = q(x)
    assert y.tolist() == [[-3, -2, 0, 2, 3]]
    assert q.num_levels == 7
    y.backward(torch.tensor([[1.0, 2.0, 4.0, 8.0, 16.0]]))
    assert x.grad is not None
    assert q.alpha.grad is not None
    assert x.grad.tolist() == [[0, 2, 4, 8, 0]]
    assert q.alpha.grad.item() == 16 - 1
    edges = torch.tensor([[-3.0, 3.0]], requires_grad=True)
    q.alpha.grad = None
    q(edges).backward(torch.tensor([[1.0, 8.0]]))
    assert edges.grad is not None
    assert edges.grad.tolist() == [[0, 0]]
    assert q.alpha.grad.item() == 8 - 1  # type: ignore[union-attr]


@pytest.mark.parametrize("cls", [PACT, DoReFaActivation])
def test_one_signed_bit_is_refused_with_the_reason(cls: type) -> None:
    with pytest.raises(ValueError, match="at least 2 bits"):
        cls(1, signed=True)


def test_a_clip_driven_below_its_bound_is_counted_and_stays_finite() -> None:
    q = PACT(4, signed=False)
    with torch.no_grad():
        q.alpha.fill_(-1.0)
    x = torch.ones(2, 3, requires_grad=True)
    y = q(x)
    y.sum().backward()
    assert y.isfinite().all()
    assert q.health()["clamped_steps"] == 1
    with torch.no_grad():
        q.alpha.fill_(10 * 1.2e-7)  # above the bound, but a step of a fifteenth is not
    assert q.health()["clamped_steps"] == 1
    assert q.alpha.grad == 6  # both rows lie above: the gradient passes the guard


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("cls", [PACT, DoReFaActivation])
def test_the_clip_starts_where_the_squared_error_is_least(cls: type, signed: bool) -> None:
    x = torch.randn(400, generator=torch.Generator().manual_seed(0))
    x = x if signed else x.relu()
    q = cls(4, signed=signed)
    q.calibrate(x)
    with torch.no_grad():
        error = (q(x) - x).square().sum()
        learned = q.alpha if cls is PACT else q.scale
        for ratio in (0.8, 1.2):
            kept = learned.clone()
            learned.mul_(ratio)
            assert (q(x) - x).square().sum() > error
            learned.copy_(kept)
