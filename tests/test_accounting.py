"""The accounting against sums done by hand on a small network."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from qexp.errors import ConfigError
from qexp.quant.accounting import COLUMNS, account, packed_bytes
from qexp.quant.bitwidth import Uniform
from qexp.quant.convert import Bits, calibrate_, quantize_
from qexp.quant.lsq import LSQ
from qexp.quant.trace import Layer, trace


class FiveLevels(LSQ):
    """A 2-bit quantizer whose grid overflows to five levels."""

    def __init__(self, bits: int, *, signed: bool = True, shape: tuple[int, ...] = ()) -> None:
        super().__init__(bits, signed=signed, shape=shape)
        self.qmin, self.qmax = -2, 2


def small() -> nn.Module:
    """8x8 images -> conv 3->4 -> BN -> ReLU -> conv 4->6 -> BN -> ReLU -> linear 6->5."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, bias=False),  # 108 weights, 64 positions
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3, padding=1, stride=2, bias=False),  # 216 weights, 16 positions
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 5),  # 30 weights, 5 biases
    )


def quantized(bits: Bits, first_last: str = "8", **own: bool) -> tuple[nn.Module, list[Layer]]:
    model = small()
    layers = trace(model, (3, 8, 8))
    policy = Uniform(*bits, first_last=first_last)  # type: ignore[arg-type]

    def weight(bits: int, *, signed: bool, shape: tuple[int, ...]) -> LSQ:
        return LSQ(bits, signed=signed, shape=shape, **own)

    quantize_(model, layers, policy.assign(layers), weight, LSQ)
    calibrate_(model, torch.randn(4, 3, 8, 8))
    return model, layers


BN_BYTES = 4 * 4 * (4 + 6)
MACS = (108 * 64, 216 * 16, 30)


class Latents(nn.Module):
    """A projection of k learned vectors, beside one of each image."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.first, self.latents = nn.Linear(12, 16), nn.Parameter(torch.randn(k, 16))
        self.table, self.last = nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x.flatten(1)) @ self.table(self.latents).t() @ self.latents)


@pytest.mark.parametrize("k", [3, 4, 8])
def test_a_layer_over_a_table_works_on_all_its_rows_for_every_image(k: int) -> None:
    layers = {layer.name: layer for layer in trace(Latents(k), (3, 2, 2))}
    assert layers["table"].macs == k * 16 * 16
    assert layers["first"].macs == 12 * 16


def test_float_network_costs_four_bytes_an_element_and_32_bits_an_operand() -> None:
    model = small()
    got = account(model, trace(model, (3, 8, 8)))
    assert got.size_bytes == got.fp32_bytes == 4 * (108 + 216 + 30 + 5) + BN_BYTES
    assert set(got.bits.values()) == {32.0}
    assert got.macs == sum(MACS)
    assert got.bops == 32 * 32 * sum(MACS)
    assert got.ideal_bytes == 4 * (108 + 216 + 30)


def test_w3a4_with_outer_8_matches_the_sum_by_hand() -> None:
    model, layers = quantized(Bits(3, 4))
    got = account(model, layers)
    assert got.bits == {
        "weight_by_param": 3.0,
        "weight_by_layer": 3.0,
        "weight_with_outer": pytest.approx((8 * 108 + 3 * 216 + 8 * 30) / 354),
        "act_by_layer": 4.0,
    }
    # Codes, then one step for each of six quantizers, then bias and batch norm.
    assert got.size_bytes == 108 + 81 + 30 + 6 * 4 + 5 * 4 + BN_BYTES
    assert got.ideal_bytes == 108 + 81 + 30
    assert got.fp32_bytes == 4 * 359 + BN_BYTES
    assert got.bops == 64 * MACS[0] + 12 * MACS[1] + 64 * MACS[2]


def test_float_outer_layers_count_32_in_the_average_and_in_bytes() -> None:
    model, layers = quantized(Bits(2, 2), first_last="fp32")
    got = account(model, layers)
    assert got.weight_by_param == got.weight_by_layer == got.act_by_layer == 2
    assert got.weight_with_outer == pytest.approx((32 * 138 + 2 * 216) / 354)
    assert got.size_bytes == 4 * 138 + 54 + 2 * 4 + 5 * 4 + BN_BYTES
    assert got.bops == 1024 * (MACS[0] + MACS[2]) + 4 * MACS[1]


def test_float_operand_of_a_quantized_layer_counts_32() -> None:
    model, layers = quantized(Bits(4, 32))
    got = account(model, layers)
    assert (got.weight_by_layer, got.act_by_layer) == (4.0, 32.0)
    assert got.bops == 8 * 32 * (MACS[0] + MACS[2]) + 4 * 32 * MACS[1]


def test_five_levels_are_charged_log2_of_5_bits_and_pack_into_3() -> None:
    model = small()
    layers = trace(model, (3, 8, 8))
    quantize_(model, layers, {"3": Bits(2, 2)}, FiveLevels, LSQ)
    calibrate_(model, torch.randn(4, 3, 8, 8))
    got = account(model, layers)
    assert got.weight_by_param == pytest.approx(math.log2(5))
    row = got.layers[1]
    assert row.levels_used == 5
    assert row.size_bytes == 216 * 3 // 8 + 2 * 4


def test_each_layers_bytes_and_the_rest_add_up_to_the_size() -> None:
    model, layers = quantized(Bits(2, 4), per_channel=True)
    got = account(model, layers)
    assert sum(r.size_bytes for r in got.layers) + BN_BYTES == got.size_bytes
    assert got.layers[1].size_bytes == 54 + 4 * 6 + 4  # codes, six steps, the input's step


def test_per_channel_levels_are_counted_in_the_fullest_channel() -> None:
    model, layers = quantized(Bits(2, 4), per_channel=True)
    conv = model.get_submodule("3")
    with torch.no_grad():
        conv.weight[0].zero_()  # type: ignore[operator, union-attr]  # one level
    w_hat: Tensor = conv.weight_quantizer(conv.weight)  # type: ignore[operator]
    used = account(model, layers).layers[1].levels_used
    assert torch.unique(w_hat).numel() > 4
    assert used == max(torch.unique(row).numel() for row in w_hat)


def test_sqnr_is_the_ratio_of_weight_power_to_error_power() -> None:
    model, layers = quantized(Bits(4, 4))
    conv = model.get_submodule("3")
    w: Tensor = conv.weight  # type: ignore[assignment]
    error = w - conv.weight_quantizer(w)  # type: ignore[operator]
    expected = 10 * math.log10((w.square().sum() / error.square().sum()).item())
    assert account(model, layers).layers[1].sqnr_db == pytest.approx(expected, rel=1e-5)


def test_uncalibrated_network_has_bits_and_bytes_but_no_levels() -> None:
    model = small()
    layers = trace(model, (3, 8, 8))
    quantize_(model, layers, Uniform(4, 4).assign(layers), LSQ, LSQ)
    got = account(model, layers)
    calibrate_(model, torch.randn(4, 3, 8, 8))
    assert got.summary() == account(model, layers).summary()
    assert all(r.levels_used is None and r.sqnr_db is None for r in got.layers)


def test_csv_has_the_columns_and_leaves_blanks_where_nothing_applies() -> None:
    model, layers = quantized(Bits(4, 4), first_last="fp32")
    head, first, inner, _ = account(model, layers, {"3": 0.5}).csv_lines()
    assert head.split(",") == list(COLUMNS)
    cells = dict(zip(COLUMNS, first.split(","), strict=True))
    assert cells["shape"] == "4x3x3x3"
    assert (cells["w_bits"], cells["levels_used"], cells["sqnr_db"]) == ("32", "", "")
    cells = dict(zip(COLUMNS, inner.split(","), strict=True))
    assert (cells["w_bits"], cells["signed"], cells["sensitivity"]) == ("4", "false", "0.5")


@pytest.mark.parametrize(
    ("count", "levels", "expected"),
    [(8, 4, 2), (9, 4, 3), (8, 5, 3), (1, 2, 1), (3, 256, 3), (8, 1, 1)],
)
def test_packed_bytes_rounds_a_layer_up_to_whole_bytes(
    count: int, levels: int, expected: int
) -> None:
    assert packed_bytes(count, levels) == expected


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.conv(x).relu())


def test_a_layer_that_runs_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match="layer 'conv' runs more than once"):
        trace(Twice(), (3, 8, 8))


def mixed() -> tuple[nn.Module, list[Layer]]:
    """W2A3, W5A8 and a float layer between 8-bit ends; 36 + 72 + 48 + 12 + 90 weights."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3),  # 36 weights, 36 positions
        nn.Conv2d(4, 2, 3),  # 72 weights, 16 positions
        nn.Conv2d(2, 6, 2),  # 48 weights, 9 positions
        nn.Conv2d(6, 2, 1),  # 12 weights, 9 positions
        nn.Flatten(),
        nn.Linear(18, 5, bias=False),  # 90 weights
    )
    layers = trace(model, (1, 8, 8))
    bits = {"0": Bits(8, 8), "1": Bits(2, 3), "2": Bits(5, 8), "5": Bits(8, 8)}
    quantize_(model, layers, bits, LSQ, LSQ)
    calibrate_(model, torch.randn(4, 1, 8, 8))
    return model, layers


def test_averages_are_over_the_quantized_inner_layers_by_weight_or_by_layer() -> None:
    got = account(*mixed())
    assert got.bits == {
        "weight_by_param": (2 * 72 + 5 * 48) / 120,
        "weight_by_layer": (2 + 5) / 2,
        "weight_with_outer": (8 * 36 + 2 * 72 + 5 * 48 + 32 * 12 + 8 * 90) / 258,
        "act_by_layer": (3 + 8) / 2,
    }
    assert got.ideal_bytes == math.ceil((8 * 36 + 2 * 72 + 5 * 48 + 32 * 12 + 8 * 90) / 8)
    macs = (36 * 36, 72 * 16, 48 * 9, 12 * 9, 90)
    assert got.bops == sum(
        n * w * a for n, w, a in zip(macs, (8, 2, 5, 32, 8), (8, 3, 8, 32, 8), strict=True)
    )


def test_a_network_of_outer_layers_alone_has_their_average() -> None:
    model = nn.Sequential(nn.Linear(6, 4, bias=False), nn.ReLU(), nn.Linear(4, 5, bias=False))
    layers = trace(model, (6,))
    quantize_(model, layers, {"0": Bits(8, 8), "2": Bits(4, 6)}, LSQ, LSQ)
    got = account(model, layers)
    assert got.weight_by_param == pytest.approx((8 * 24 + 4 * 20) / 44)
    assert got.act_by_layer == 7


def test_state_is_counted_once_and_integers_at_their_own_size() -> None:
    model = small()
    model.register_buffer("table", torch.zeros(10, dtype=torch.int16))
    model.register_buffer("mean_again", model[1].running_mean)  # type: ignore[arg-type, union-attr]
    got = account(model, trace(model, (3, 8, 8)))
    assert got.size_bytes == got.fp32_bytes == 4 * (108 + 216 + 30 + 5) + BN_BYTES + 2 * 10


def test_a_layer_of_two_names_is_stored_once() -> None:
    model, layers = quantized(Bits(4, 4))
    once = account(model, layers).size_bytes
    model.add_module("alias", nn.Identity())
    model.alias = model[3]  # with its quantizers
    assert account(model, layers).size_bytes == once


def test_looking_at_a_network_leaves_its_mode() -> None:
    model, layers = quantized(Bits(4, 4))
    for training in (True, False):
        model.train(training)
        account(model, layers)
        assert all(m.training is training for m in model.modules())


class Tied(nn.Module):
    """Two layers with one weight and one bias between two others."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)
        self.b.weight, self.b.bias = self.a.weight, self.a.bias
        self.fc = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.b(self.a(self.stem(x)).relu()).relu().mean((2, 3)))


def test_a_shared_weight_is_stored_once() -> None:
    model = Tied()
    layers = trace(model, (3, 8, 8))
    got = account(model, layers)
    assert got.size_bytes == got.fp32_bytes == 4 * (12 + 4 + 144 + 4 + 20 + 5)
    assert sum(row.size_bytes for row in got.layers) == got.size_bytes
    quantize_(model, layers, {"a": Bits(2, 2)}, LSQ, LSQ)
    calibrate_(model, torch.randn(2, 3, 8, 8))
    # The codes and two steps of `a`, beside the float weight that `b` has.
    assert account(model, layers).size_bytes == got.size_bytes + 144 * 2 // 8 + 2 * 4


def test_layers_that_share_a_weight_are_not_quantized_each_for_itself() -> None:
    model = Tied()
    layers = trace(model, (3, 8, 8))
    with pytest.raises(ConfigError, match="layers 'a' and 'b' share one weight"):
        quantize_(model, layers, Uniform(4, 4).assign(layers), LSQ, LSQ)


class Windows(nn.Module):
    """Four windows of an image side by side in the batch, and a table that is not of any image."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.table = nn.Conv2d(3, 6, 2, 2), nn.Linear(2, 6)
        self.mix, self.fc = nn.Linear(6, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x)  # [N, 6, 4, 4]
        n = len(x)
        x = x.view(n, 6, 2, 2, 2, 2).permute(0, 2, 4, 3, 5, 1).reshape(4 * n, 4, 6)
        x = self.mix(x) + self.table(torch.ones(1, 4, 2))
        return self.fc(x.reshape(n, 16, 6).mean(1))


def test_windows_in_the_batch_are_counted_with_their_image() -> None:
    patch, mix, table, fc = trace(Windows(), (3, 8, 8))
    assert (patch.macs, fc.macs) == (16 * 12 * 6, 6 * 5)
    assert mix.macs == 16 * 6 * 6
    assert mix.act_shape == (4, 4, 6)
    assert table.macs == 4 * 2 * 6
    assert table.act_shape == (4, 2)


class Attention(nn.Module):
    """Weights in a one-dimensional convolution, in attention and in no module, and a gain."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mid = nn.Conv2d(3, 4, 2, 2), nn.Linear(4, 4)
        self.mix = nn.Conv1d(4, 4, 1, bias=False)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.own = nn.Parameter(torch.randn(4, 4))
        self.gain = nn.Parameter(torch.ones(1, 1, 4))
        self.fc = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(self.mix(self.stem(x).flatten(2)).transpose(1, 2)) * self.gain
        return self.fc(nn.functional.linear(self.attention(x, x, x)[0], self.own).mean(1))


def test_weights_outside_the_layers_are_named_and_count_as_float() -> None:
    model = Attention()
    layers = trace(model, (3, 8, 8))
    assert [layer.name for layer in layers] == ["stem", "mid", "fc"]
    others = {
        "own": 16,
        "mix.weight": 16,
        "attention.in_proj_weight": 48,
        "attention.out_proj.weight": 16,
    }
    assert account(model, layers).other_weights == others
    per_channel = partial(LSQ, per_channel=True)  # its steps are no weights
    quantize_(model, layers, Uniform(2, 2).assign(layers), per_channel, LSQ)
    calibrate_(model, torch.randn(2, 3, 8, 8))
    got = account(model, layers)
    assert got.other_weights == got.summary()["other_weights"] == others
    quantized = 8 * 48 + 2 * 16 + 8 * 20
    assert got.weight_with_outer == pytest.approx((quantized + 32 * 96) / (48 + 16 + 20 + 96))
    assert got.weight_by_param == 2
    assert "other_weights" not in account(small(), trace(small(), (3, 8, 8))).summary()
