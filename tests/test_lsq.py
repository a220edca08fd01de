"""LSQ and LSQ+ against torch's own operators, an independent transcription, and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from qexp.quant.functional import fake_quantize, integer_range
from qexp.quant.lsq import LSQ, LSQPlus


def composed(x: Tensor, scale: Tensor, qmin: int, qmax: int) -> Tensor:
    """Eq. 1-2 written with detach, for autograd to differentiate."""
    z = (x / scale).clamp(qmin, qmax)
    return (z + (z.round() - z).detach()) * scale


def lsq_numpy(x: np.ndarray, e: np.ndarray, s: float, qmin: int, qmax: int, g: float):
    """LSQ eq. 1-3, 5, element by element: x_hat, dL/dx, dL/ds."""
    x_hat, dx, ds = np.zeros_like(x), np.zeros_like(x), 0.0
    for i, v in np.ndenumerate(x):
        z = v / s
        if z < qmin:
            code, inside, t = qmin, 0.0, float(qmin)
        elif z > qmax:
            code, inside, t = qmax, 0.0, float(qmax)
        else:
            code, inside, t = np.rint(z), 1.0, np.rint(z) - z
        x_hat[i], dx[i] = code * s, e[i] * inside
        ds += e[i] * t
    return x_hat, dx, g * ds


def test_codes_are_those_of_twos_complement_or_count_from_zero() -> None:
    widths = (1, 2, 3, 8)
    assert [integer_range(b, True) for b in widths] == [(-1, 0), (-2, 1), (-4, 3), (-128, 127)]
    assert [integer_range(b, False) for b in widths] == [(0, 1), (0, 3), (0, 7), (0, 255)]


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_forward_and_input_gradient_equal_torch_fake_quantize(bits: int, signed: bool) -> None:
    torch.manual_seed(0)
    qmin, qmax = integer_range(bits, signed)
    x = torch.randn(8, 50, requires_grad=True)
    # A power of two, so that torch's x * (1 / scale) is our x / scale.
    scale = torch.tensor(2.0**-3)
    expected = torch.fake_quantize_per_tensor_affine(x, float(scale), 0, qmin, qmax)
    got = fake_quantize(x, scale, qmin, qmax)
    assert torch.equal(got, expected)
    e = torch.randn_like(x)
    (ours,) = torch.autograd.grad(got, x, e)
    (theirs,) = torch.autograd.grad(expected, x, e)
    # torch passes the gradient where the *rounded* code is inside, LSQ where z itself is.
    z = x.detach() / scale
    edge = ((z < qmin) & (z.round() >= qmin)) | ((z > qmax) & (z.round() <= qmax))
    assert torch.equal(ours[~edge], theirs[~edge])
    assert (ours[edge] == 0).all()


def test_scale_gradient_equals_torch_learnable_fake_quantize_inside_the_range() -> None:
    torch.manual_seed(0)
    x = torch.rand(4, 30) * 1.8  # codes 0..14.4 of 0..15: nothing at the clipping edge
    results = []
    for fn in ("ours", "torch"):
        scale = torch.tensor([0.125], requires_grad=True)
        if fn == "ours":
            y = fake_quantize(x, scale, 0, 15, 0.1)
        else:
            zero = torch.zeros(1)
            y = torch._fake_quantize_learnable_per_tensor_affine(x, scale, zero, 0, 15, 0.1)
        (y * torch.arange(120.0).view(4, 30)).sum().backward()
        results.append((y.detach(), scale.grad))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("bits", "signed"), [(2, True), (3, False), (4, True)])
def test_module_equals_the_transcription_of_the_paper(bits: int, signed: bool) -> None:
    torch.manual_seed(1)
    w = torch.randn(4, 3, 3, 3)
    q = LSQ(bits, signed=signed, shape=w.shape)
    q.calibrate(w)
    qmin, qmax = integer_range(bits, signed)
    assert q.scale.item() == pytest.approx(2 * w.abs().mean().item() / qmax**0.5, rel=1e-6)
    e = torch.randn_like(w)
    w.requires_grad_()
    y = q(w)
    y.backward(e)
    g = 1 / (w.numel() * qmax) ** 0.5
    x_hat, dx, ds = lsq_numpy(
        w.detach().double().numpy(), e.double().numpy(), q.scale.item(), qmin, qmax, g
    )
    np.testing.assert_allclose(y.detach().numpy(), x_hat, rtol=1e-6, atol=1e-7)
    assert w.grad is not None
    assert q.scale.grad is not None
    np.testing.assert_array_equal(w.grad.double().numpy(), dx)
    assert q.scale.grad.item() == pytest.approx(ds, rel=1e-4)


def test_scale_gradient_matches_closed_form_with_clipping_and_ties() -> None:
    # scale 0.5, codes -2..1: z = -6 (below), -0.5 (tie -> 0), 0.5 (tie -> 0), 0.6, 1 (edge), 4
    x = torch.tensor([[-3.0, -0.25, 0.25, 0.3, 0.5, 2.0]], requires_grad=True)
    scale = torch.tensor(0.5, requires_grad=True)
    y = fake_quantize(x, scale, -2, 1)
    assert y.tolist() == [[-1.0, 0.0, 0.0, 0.5, 0.5, 0.5]]
    y.backward(torch.ones_like(y))
    assert x.grad is not None
    assert scale.grad is not None
    assert x.grad.tolist() == [[0.0, 1.0, 1.0, 1.0, 1.0, 0.0]]
    assert scale.grad.item() == pytest.approx(-2 + 0.5 - 0.5 + (1 - 0.6) + 0 + 1, abs=1e-6)


def test_gradients_equal_autograd_of_the_composed_form_in_float64() -> None:
    torch.manual_seed(2)
    x = torch.randn(5, 40)
    e = torch.randn(5, 40)
    for scale0 in (torch.tensor(0.3), torch.rand(5, 1) * 0.4 + 0.1):
        got, want = [], []
        for out, dtype in ((got, torch.float32), (want, torch.float64)):
            v = x.to(dtype).requires_grad_()
            scale = scale0.to(dtype).requires_grad_()
            fn = fake_quantize if dtype == torch.float32 else composed
            out.extend(torch.autograd.grad(fn(v, scale, -4, 3), (v, scale), e.to(dtype)))
        torch.testing.assert_close(got[0].double(), want[0], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(got[1].double(), want[1], rtol=1e-5, atol=1e-5)


def test_decoding_is_linear_in_the_step_by_gradcheck() -> None:
    q = LSQ(3, shape=(2, 3)).double()
    codes = torch.tensor([[-4, 1, 3], [0, 2, -1]])
    step = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)

    def decoded(scale: Tensor) -> Tensor:
        q.scale = scale
        return q.decode(codes)

    del q.scale  # a parameter, for which no other tensor can stand
    assert torch.equal(decoded(step), codes * step)
    assert torch.autograd.gradcheck(decoded, (step,))


@pytest.mark.parametrize("init", ["lsq", "mse"])
def test_per_channel_equals_a_loop_of_per_tensor(init: str) -> None:
    torch.manual_seed(3)
    w = torch.randn(6, 4, 3, 3) * torch.logspace(-2, 1, 6).view(-1, 1, 1, 1)
    e = torch.randn_like(w)
    q = LSQ(4, shape=w.shape, per_channel=True, init=init)  # type: ignore[arg-type]
    q.calibrate(w)
    q(w).backward(e)
    assert q.scale.grad is not None
    for c in range(6):
        one = LSQ(4, shape=w[c : c + 1].shape, init=init)  # type: ignore[arg-type]
        one.calibrate(w[c : c + 1])
        torch.testing.assert_close(one.scale.view(()), q.scale[c].view(()), rtol=1e-6, atol=0)
        one.scale.data = q.scale.data[c].view(())
        y = one(w[c : c + 1])
        assert torch.equal(y[0], q(w)[c])
        y.backward(e[c : c + 1])
        torch.testing.assert_close(one.scale.grad, q.scale.grad[c].view(()), rtol=1e-5, atol=1e-6)


def test_gradient_count_without_the_batch_is_larger_by_its_square_root() -> None:
    x = torch.rand(16, 3, 4, 4)
    grads = []
    for count in ("sample", "tensor"):
        q = LSQ(4, signed=False, shape=(3, 1, 1), count=count)  # type: ignore[arg-type]
        q.calibrate(x)
        q(x).square().sum().backward()
        assert q.scale.grad is not None
        grads.append(q.scale.grad.item())
    assert grads[0] == pytest.approx(4 * grads[1], rel=1e-5)  # sqrt(16)


def test_a_step_pushed_below_zero_is_clamped_counted_and_still_learns() -> None:
    q = LSQ(4, shape=(2, 3))
    q.scale.data.fill_(-1.0)
    y = q(torch.ones(2, 3))
    y.sum().backward()
    assert y.isfinite().all()
    assert q.health()["clamped_steps"].item() == 1
    assert q.scale.grad is not None
    assert q.scale.grad.item() > 0


def test_a_gradient_in_another_memory_order_meets_its_elements() -> None:
    torch.manual_seed(0)
    e = torch.randn(2, 3, 4, 5)
    found = []
    for order in (torch.contiguous_format, torch.channels_last):
        x = torch.linspace(-2, 2, 120).reshape(2, 3, 4, 5).requires_grad_()
        scale = torch.full((2, 1, 1, 1), 0.25, requires_grad=True)
        y = fake_quantize(x, scale, -4, 3)
        found.append(torch.autograd.grad(y, (x, scale), e.contiguous(memory_format=order)))
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1])


def test_lsqplus_gradients_match_the_paper() -> None:
    # scale 0.5, offset -1, codes 0..3: range [-1, 0.5]
    x = torch.tensor([[-2.0, -0.9, 0.2, 3.0]], requires_grad=True)
    q = LSQPlus(2, shape=(4,))
    q.scale.data.fill_(0.5)
    q.offset.data.fill_(-1.0)
    y = q(x)
    torch.testing.assert_close(y, torch.tensor([[-1.0, -1.0, 0.0, 0.5]]))
    e = torch.tensor([[1.0, 10.0, 100.0, 1000.0]])
    y.backward(e)
    g = 1 / (4 * 3) ** 0.5
    assert x.grad is not None
    assert q.scale.grad is not None
    assert q.offset.grad is not None
    assert x.grad.tolist() == [[0.0, 10.0, 100.0, 0.0]]
    assert q.offset.grad.item() == pytest.approx(g * (1 + 1000), rel=1e-5)  # e where clipped
    t = 0 * 1 + (0 - 0.2) * 10 + (2 - 2.4) * 100 + 3 * 1000
    assert q.scale.grad.item() == pytest.approx(g * t, rel=1e-5)


def test_lsqplus_beats_lsq_on_a_swish_input() -> None:
    x = torch.nn.functional.silu(torch.randn(8, 64, generator=torch.Generator().manual_seed(0)))
    errors = []
    for q in (LSQPlus(3, shape=(64,)), LSQ(3, shape=(64,), init="mse")):
        q.calibrate(x)
        with torch.no_grad():
            errors.append((q(x) - x).square().mean().item())
    assert errors[0] < errors[1]


def test_lsqplus_starts_below_zero_for_signed_inputs_alone() -> None:
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    for signed in (True, False):
        q = LSQPlus(3, signed=signed, shape=(64,))
        q.calibrate(x)
        assert (q.offset.item() < -0.5) == signed
        assert q.offset.item() <= 0
        assert (q.qmin, q.qmax) == (0, 7)


def test_the_levels_of_lsqplus_are_what_its_codes_stand_for() -> None:
    q = LSQPlus(3)
    q.calibrate(torch.randn(500, generator=torch.Generator().manual_seed(0)) + 0.5)
    assert q.offset < 0
    codes = torch.arange(q.qmin, q.qmax + 1)
    torch.testing.assert_close(q.levels()[0], q.decode(codes).detach())
    middle = (q.levels()[0][1:] + q.levels()[0][:-1]) / 2
    torch.testing.assert_close(q.thresholds(), middle)
