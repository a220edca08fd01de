"""Ranges from data: what a search may look at."""

from __future__ import annotations

import pytest
import torch

from qexp.quant import calibrate, nearest
from qexp.quant.calibrate import mse_scale, sample
from qexp.quant.nearest import activation_sample


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
    assert torch.equal(activation_sample(places), activation_sample(channels_last))


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
