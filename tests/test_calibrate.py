"""Ranges from data: what a search may look at."""

from __future__ import annotations

import pytest
import torch

from qexp.quant import calibrate, nearest
from qexp.quant.calibrate import mse_range, mse_scale, sample
from qexp.quant.nearest import ACT_SAMPLES, Nearest, activation_sample


def test_a_sample_sees_every_channel_and_column_in_any_order_of_memory() -> None:
    n, c, h, w = 64, 16, 32, 32
    places = torch.arange(n * c * h * w, dtype=torch.float64).reshape(n, c, h, w)
    assert places.numel() > nearest.ACT_SAMPLES
    for x in (places, places.to(memory_format=torch.channels_last)):
        seen = sample(x, nearest.ACT_SAMPLES // 4).long()
        assert seen.numel() == nearest.ACT_SAMPLES // 4
        for size, stride in ((c, h * w), (h, w), (w, 1)):
            share = (seen // stride % size).bincount(minlength=size) / seen.numel()
            assert share.min() > 0.8 / size
            assert share.max() < 1.2 / size
    channels_last = places.to(memory_format=torch.channels_last)
    assert torch.equal(activation_sample(places, "mse"), activation_sample(channels_last, "mse"))


def test_a_small_tensor_is_its_own_sample() -> None:
    x = torch.randn(3, 4, 5)
    assert torch.equal(sample(x, 60), x.flatten())


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_the_step_of_least_error_does_not_hang_on_an_image_s_columns(
    order: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(32, 16, 16, 16, generator=torch.Generator().manual_seed(0)).relu()
    x[..., ::8] *= 4  # what an even stride of 8 would see alone
    whole = mse_scale(x, 0, 3)
    monkeypatch.setattr(calibrate, "MAX_SAMPLES", x.numel() // 8)
    torch.testing.assert_close(mse_scale(x.to(memory_format=order), 0, 3), whole, rtol=0.03, atol=0)


def test_a_grid_of_weights_sees_them_all_and_absmax_both_ends() -> None:
    torch.manual_seed(0)
    w = torch.randn(64, 64, 9, 9)
    assert w.numel() > ACT_SAMPLES
    w[0, 0, 0, 0] = 100.0
    weight = Nearest(4, shape=tuple(w.shape), estimator="absmax", symmetric=True)
    weight.calibrate(w)
    assert float(weight.levels().max()) == pytest.approx(100.0)
    by_mse, of_rows = Nearest(4, shape=tuple(w.shape)), Nearest(4, shape=(1,), per_channel=True)
    by_mse.calibrate(w)
    of_rows.calibrate(w.reshape(1, -1))
    assert torch.equal(by_mse.scale.flatten(), of_rows.scale.flatten())
    act = Nearest(4, signed=False, estimator="absmax")
    act.calibrate(w.abs())
    assert float(act.levels().max()) == pytest.approx(100.0)


def test_values_that_an_unsigned_grid_cannot_hold_do_not_widen_it() -> None:
    x = torch.randn(1 << 14, generator=torch.Generator().manual_seed(0))
    assert mse_scale(x, 0, 255) < 1.2 * mse_scale(x.relu(), 0, 255)
    for estimator in ("mse", "absmax", "percentile"):
        both, positive = (Nearest(8, signed=False, estimator=estimator) for _ in range(2))
        both.calibrate(x)
        positive.calibrate(x.relu())
        assert both.scale.item() == pytest.approx(positive.scale.item(), rel=0.2), estimator


@pytest.mark.parametrize(("qmin", "qmax"), [(-4, 3), (0, 7)])
@pytest.mark.parametrize("shift", [-2.0, 0.0, 2.0])
@pytest.mark.parametrize("p", [2.0, 4.0])
def test_the_searched_step_is_the_best_of_all_candidates(
    qmin: int, qmax: int, shift: float, p: float
) -> None:
    x = torch.randn(400, generator=torch.Generator().manual_seed(0)) + shift
    widest = max(float(x.max()) / qmax, float(x.min()) / qmin if qmin else 0.0)

    def error(step: float) -> float:
        return float(((x / step).round().clamp(qmin, qmax) * step - x).abs().pow(p).sum())

    candidates = [widest * i / 80 for i in range(1, 81)]
    best = min(candidates, key=error)
    assert mse_scale(x, qmin, qmax, p=p).item() == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize("side", [1.0, -1.0])
def test_the_searched_range_has_zero_in_it(side: float) -> None:
    x = side * (5 + torch.rand(400, generator=torch.Generator().manual_seed(0)))
    scale, start = mse_range(x, 7)
    end = start + 7 * scale
    assert min(start, end) <= 1e-6
    assert max(start, end) >= -1e-6


@pytest.mark.parametrize("one_sided", [False, True])
def test_the_searched_range_is_the_best_of_both_ends(one_sided: bool) -> None:
    x = torch.randn(400, generator=torch.Generator().manual_seed(0)) + 0.5
    low, high = 0.0 if one_sided else float(x.min()), float(x.max())

    def error(ends: tuple[float, float]) -> float:
        step = (ends[1] - ends[0]) / 7
        return float(
            (((x - ends[0]) / step).round().clamp(0, 7) * step + ends[0] - x).square().sum()
        )

    ends = [(low * j / 20, high * i / 20) for i in range(1, 21) for j in range(1, 21)]
    best = min(ends, key=error)
    scale, start = mse_range(x, 7, one_sided=one_sided)
    assert start.item() == pytest.approx(best[0], rel=1e-6)
    assert scale.item() == pytest.approx((best[1] - best[0]) / 7, rel=1e-6)


@pytest.mark.parametrize("shape", [(6, 40), (6, 4, 5, 2)])
def test_a_step_per_row_is_that_of_each_row_alone(shape: tuple[int, ...]) -> None:
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    w = w * torch.arange(1, 7).view(6, *[1] * (len(shape) - 1))
    steps = mse_scale(w, -4, 3, per_row=True)
    assert steps.shape == (6, *[1] * (len(shape) - 1))
    for row, step in zip(w, steps.flatten(), strict=True):
        assert torch.equal(mse_scale(row, -4, 3), step)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_ranges_are_float32_whatever_they_are_made_of(dtype: torch.dtype) -> None:
    x = torch.randn(40, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    x.requires_grad_()
    found = [sample(x, 1000), sample(x, 10), mse_scale(x, -4, 3), *mse_range(x, 7)]
    found.append(mse_scale(x, -4, 3, per_row=True))
    for value in found:
        assert value.dtype == torch.float32
        assert not value.requires_grad
    assert torch.equal(mse_scale(x, -4, 3), mse_scale(x.detach().float(), -4, 3))


def test_the_searched_range_takes_the_power_it_is_given() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.cat([torch.randn(400, generator=g), torch.tensor([9.0])])
    steps = [mse_range(x, 7, p=p)[0].item() for p in (1.0, 2.0, 4.0)]
    assert steps == sorted(steps)  # the higher the power, the more the outlier counts
    assert steps[2] > 1.2 * steps[0]


def test_a_range_without_any_spread_has_a_step() -> None:
    for x in (torch.zeros(10), torch.zeros(3, 4)):
        assert mse_scale(x, -4, 3).item() > 0
        scale, start = mse_range(x, 7)
        assert scale.item() > 0
        assert start.item() == 0
