"""Rounding borders that are functions of the activation."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from qexp.errors import ConfigError
from qexp.models.resnet import ResNet
from qexp.quant.aquant import AQuant
from qexp.quant.border import border_round
from qexp.quant.convert import Bits, calibrate_, quant_layers, quantize_
from qexp.quant.drop import Drop, mix
from qexp.quant.lsq import LSQ
from qexp.quant.modules import QuantConv2d
from qexp.quant.nearest import Nearest
from qexp.quant.quantizer import Identity
from qexp.quant.trace import trace

FIELD = (4, 3, 3)
ROWS = 36


def columns(seed: int = 0, n: int = 5, length: int = 7) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, ROWS, length, generator=g).relu()


def made(bits: int = 3, spread: float = 0.3, **own: object) -> AQuant:
    torch.manual_seed(0)
    q = AQuant(bits, signed=False, shape=FIELD, **own)  # type: ignore[arg-type]
    q.calibrate(columns())
    nn.init.normal_(q.border, 0, spread)
    if q.fusion != "none":
        q.mixing.data += 0.1 * torch.randn_like(q.mixing)
    return q


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("fusion", ["none", "window", "residual"])
@pytest.mark.parametrize("squash", ["clip", "sigmoid"])
def test_border_one_half_is_nearest_bit_for_bit(
    bits: int, signed: bool, fusion: Any, squash: Any
) -> None:
    x = columns() - 0.2 * signed
    a = AQuant(bits, signed=signed, shape=FIELD, fusion=fusion, squash=squash)
    n = Nearest(bits, signed=signed)
    a.calibrate(x)
    n.calibrate(x)
    ties = n.thresholds().detach()
    x = torch.cat([x, ties.repeat(ROWS * 7)[: ROWS * 7].view(1, ROWS, 7)])
    assert torch.equal(a(x), n(x))
    grads = []
    for q in (a, n):
        v = x.clone().requires_grad_()
        q(v).sum().backward()
        assert v.grad is not None
        grads.append(v.grad)
    assert torch.equal(grads[0], grads[1])


@given(st.lists(st.tuples(st.floats(0, 15), st.floats(0, 1)), min_size=1, max_size=50))
@settings(deadline=None, max_examples=30)
def test_offset_before_floor_is_the_comparison_with_the_border(pairs: list) -> None:
    u, border = torch.tensor(pairs, dtype=torch.float64).T
    got = border_round(u, border, torch.tensor(-100.0), torch.tensor(100.0))
    fraction = u - u.floor()
    away = (fraction - border).abs() > 1e-9  # float64 rounding of u + 1 - B
    assert torch.equal(got[away], (u.floor() + (fraction >= border))[away])


def composed(q: AQuant, x: Tensor) -> Tensor:
    """The forward of `q` in differentiable steps, straight through floor."""
    u = q._view(x) / q.scale
    shifted = u + (1 - q.borders(u))
    floor = shifted.floor().detach() + (shifted - shifted.detach())
    clipped = floor.detach().clamp(q.qmin - q.zero, q.qmax - q.zero)
    return q._unview(torch.where(clipped == floor, floor, clipped) * q.scale, x)


@pytest.mark.parametrize("border", ["constant", "linear", "quadratic"])
@pytest.mark.parametrize(
    ("per", "fusion"),
    [
        ("row", "none"),
        ("channel", "none"),
        ("tensor", "none"),
        ("row", "window"),
        ("row", "residual"),
    ],
)
@pytest.mark.parametrize("squash", ["clip", "sigmoid"])
def test_fused_border_equals_the_composed_one(
    border: str, per: str, fusion: str, squash: str
) -> None:
    q = made(border=border, per=per, fusion=fusion, squash=squash)
    x = columns() if per == "row" else columns().view(5, 4, 9, 7)
    e = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    results = []
    for fused in (True, False):
        q.zero_grad()
        v = x.clone().requires_grad_()
        y = q(v) if fused else composed(q, v)
        (y * e).sum().backward()
        results.append([y.detach(), v.grad, *(p.grad.clone() for p in q.parameters())])  # type: ignore[union-attr]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fusion", ["none", "window", "residual"])
def test_a_quantizer_that_drops_by_itself_equals_a_mix_of_both(fusion: str) -> None:
    q, e = made(fusion=fusion), torch.randn(5, ROWS, 7)
    results = []
    for own in (True, False):
        generator = torch.Generator().manual_seed(4)
        q.zero_grad()
        q.drop = Drop(0.25, generator) if own else None
        x = columns().requires_grad_()
        y = q(x) if own else mix(x, q(x), 0.25, generator)
        (y * e).sum().backward()
        results.append([y.detach(), x.grad, *(p.grad.clone() for p in q.parameters())])  # type: ignore[union-attr]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    kept = (results[0][0] == columns()) & (columns() > 0)
    assert 0.1 < kept.float().mean() < 0.15  # a quarter of the half above 0


def test_border_gradient_matches_closed_form_with_clipped_values() -> None:
    q = AQuant(2, signed=False, shape=(1,), per="tensor", border="linear")
    q.scale.data.fill_(0.5)
    q.border.data.copy_(torch.tensor([[0.1], [-0.3]]))
    x = torch.tensor([[0.0, 0.26, 0.7, 1.2, 1.49, 4.0]]).requires_grad_()
    e = torch.tensor([[1.0, -2.0, 3.0, 4.0, -5.0, 6.0]])
    (q(x) * e).sum().backward()
    u = x.detach() / 0.5
    t = u / 3
    b = 0.5 + 0.1 - 0.3 * t  # inside (0, 1) for all but the last, which is clipped anyway
    code = (u + 1 - b.clamp(0, 1)).floor()
    inside = ((code >= 0) & (code <= 3)).float()
    free = ((b > 0) & (b < 1)).float()
    slope = -0.3 / 3 * free
    down = -e * 0.5 * inside * free
    grad_scale = e * (code.clamp(0, 3) - inside * (1 - slope) * u)
    torch.testing.assert_close(x.grad, e * inside * (1 - slope))
    torch.testing.assert_close(q.border.grad, torch.stack([down.sum(), (down * t).sum()])[:, None])
    torch.testing.assert_close(q.scale.grad, grad_scale.sum())
    assert inside[0, -1] == 0


@pytest.mark.parametrize("fusion", ["none", "window"])
@pytest.mark.parametrize("squash", ["clip", "sigmoid"])
def test_border_function_passes_gradcheck(fusion: Any, squash: Any) -> None:
    q = AQuant(3, signed=False, shape=(1, 1, 3), fusion=fusion, squash=squash).double()
    torch.manual_seed(0)
    nn.init.normal_(q.border, 0, 0.1)
    u = torch.rand(2, 3, 4, dtype=torch.float64) * 7
    u.requires_grad_()
    names = [name for name, _ in q.named_parameters() if name != "scale"]
    values = [getattr(q, name) for name in names]

    def border(u: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(
            Borders(q), {f"q.{n}": p for n, p in zip(names, parameters, strict=True)}, (u,)
        )

    assert ((q.borders(u) > 0) & (q.borders(u) < 1)).all()  # no kink of the clip
    assert torch.autograd.gradcheck(border, (u, *values))


def moved(q: AQuant, x: Tensor, e: Tensor) -> Tensor:
    """The gradient of the border's coefficients, [degree + 1]."""
    q.zero_grad()
    (q(x) * e).sum().backward()
    assert q.border.grad is not None
    return q.border.grad.sum(1)


@pytest.mark.parametrize("squash", ["clip", "sigmoid"])
@pytest.mark.parametrize("fusion", ["none", "window", "residual"])
@pytest.mark.parametrize("signed", [True, False])
def test_a_narrow_tau_gives_the_true_derivative_of_a_loss(
    squash: Any, fusion: Any, signed: bool
) -> None:
    # Many inputs between and beyond the codes, and an error that depends on where they lie: what
    # moving the border does to the loss is known by moving it. Straight through sees the average.
    q = AQuant(2, signed=signed, shape=(1, 1, 2), fusion=fusion, squash=squash, tau=0.02)
    q.scale.data.fill_(0.5)
    q.border.data.copy_(torch.tensor([0.05, 0.1, -0.08])[:, None].expand(3, 2))
    x = torch.rand(200000, generator=torch.Generator().manual_seed(0)) * 4 - 2 * signed - 0.25
    x = x.view(1, 2, -1)
    e = (12 * x).sin() + 0.5 * x

    def loss(shift: float) -> float:
        with torch.no_grad():
            q.border[0] += shift
            total = float((q(x) * e).double().sum())
            q.border[0] -= shift
        return total

    wanted = (loss(0.01) - loss(-0.01)) / 0.02
    narrow = float(moved(q, x, e)[0])
    q.tau = 1.0
    straight = float(moved(q, x, e)[0])
    assert narrow == pytest.approx(wanted, rel=0.05)
    assert abs(straight - wanted) > 0.2 * abs(wanted)


def test_inputs_at_zero_move_no_border_where_tau_is_below_one() -> None:
    found = {}
    for tau in (1.0, 0.9):
        q = AQuant(2, signed=False, shape=(1,), per="tensor", border="constant", tau=tau)
        q.scale.data.fill_(0.5)
        # Code 0 has no code below, 3 none above: of these six only the third is near a border.
        x = torch.tensor([[0.0, 0.01, 0.24, 1.49, 1.76, 9.0]])
        found[tau] = moved(q, x, torch.ones_like(x)).item()
    assert found[1.0] == pytest.approx(-0.5 * 4)  # the last two are clipped
    assert found[0.9] == pytest.approx(-0.5 / 0.9)


@pytest.mark.parametrize("fusion", ["none", "window", "residual"])
def test_every_input_moves_the_border_at_the_widest_tau(fusion: Any) -> None:
    x, e = columns(), torch.randn(columns().shape, generator=torch.Generator().manual_seed(3))
    q = made(2, fusion=fusion)
    straight = moved(q, x, e)
    q.tau = 0.999999
    assert not torch.allclose(moved(q, x, e), straight, rtol=1e-2)  # zeros are half of the inputs
    above = x.clamp_min(0.6 * q.scale.item())
    below = above.clamp_max(2.4 * q.scale.item())
    with torch.no_grad():
        q.border.zero_()  # between codes 0 and 3 all of them
    near = moved(q, below, e)
    q.tau = 1.0
    torch.testing.assert_close(near, moved(q, below, e), rtol=1e-4, atol=1e-4)


class Borders(nn.Module):
    """The border function of a quantizer as a module of its own."""

    def __init__(self, q: AQuant) -> None:
        super().__init__()
        self.q = q

    def forward(self, u: Tensor) -> Tensor:
        return self.q.borders(u)


def test_closed_form_is_the_best_slope_for_a_known_product() -> None:
    torch.manual_seed(0)
    w = torch.randn(8, 4, 3, 3)
    w_hat = (w * 1.3 + 0.2 * torch.randn_like(w)).detach()
    q = AQuant(4, signed=False, shape=FIELD, border="linear")
    q.see_weights(w, w_hat)
    a, b = w.flatten(1), w_hat.flatten(1)
    rho = (a * b).sum(0) / (b * b).sum(0)
    torch.testing.assert_close(q.border[1].detach(), (1 - rho) * 15)
    # Exhaustive: of floor and ceil, the border picks the one of least product error.
    u = torch.rand(200) * 14
    q.scale.data.fill_(1.0)
    for i in (0, 17, 35):
        x = torch.zeros(200, ROWS, 1)
        x[:, i, 0] = u
        got = q(x)[:, i, 0].detach()
        error = [
            (b[:, i] * (u.floor() + k)[:, None] - a[:, i] * u[:, None]).square().sum(1)
            for k in (0, 1)
        ]
        best = u.floor() + (error[1] < error[0])
        slope_fits = (0.5 + (1 - rho[i]) * u).clamp(0, 1) == 0.5 + (1 - rho[i]) * u
        assert torch.equal(got[slope_fits], best[slope_fits])


@pytest.mark.parametrize("fusion", ["window", "residual"])
def test_borders_are_float32_under_autocast(fusion: Any) -> None:
    q = made(3, fusion=fusion)
    x = columns(n=200)
    with torch.autocast("cpu", torch.bfloat16):
        y, codes = q(x), q.codes(x)
    assert torch.equal(y, q(x))
    assert torch.equal(codes, q.codes(x))


@pytest.mark.parametrize("fusion", ["window", "residual"])
def test_borders_that_see_each_other_start_as_those_that_do_not(fusion: str) -> None:
    torch.manual_seed(0)
    w = torch.randn(8, 4, 3, 3)
    alone, seeing = (
        AQuant(3, signed=False, shape=FIELD, init=init, fusion=f)  # type: ignore[arg-type]
        for f, init in (("none", "closed_form"), (fusion, "closed_form"))
    )
    for q in (alone, seeing):
        q.calibrate(columns())
        if fusion == "window":
            q.see_weights(w, 1.1 * w)
    assert torch.equal(seeing(columns()), alone(columns()))


def test_the_residual_starts_at_half_of_what_a_neighbours_error_asks_for() -> None:
    torch.manual_seed(0)
    w = torch.randn(8, 4, 3, 3)
    w_hat = (2 * w).round() / 2
    q = AQuant(4, signed=False, shape=FIELD, fusion="residual")
    q.see_weights(w, w_hat)
    for c, mixing in enumerate(q.mixing.detach()):
        v = w_hat[:, c].flatten(1)  # [C_out, 9]
        for i in range(9):
            for j in range(9):
                half = -0.5 * (v[:, i] @ v[:, j]) / (v[:, i] @ v[:, i])
                assert mixing[i, j].item() == pytest.approx(half.item() * (i != j), abs=1e-6)


@pytest.mark.parametrize(("per", "shared"), [("channel", (0, 2)), ("tensor", (0, 1, 2))])
def test_shared_borders_start_from_all_the_weights_that_share_them(
    per: str, shared: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    w = torch.randn(8, 4, 3, 3)
    w_hat = (2 * w).round() / 2
    q = AQuant(4, signed=False, shape=FIELD, border="linear", per=per)  # type: ignore[arg-type]
    q.see_weights(w, w_hat)
    rho = (w * w_hat).flatten(2).sum(shared) / w_hat.square().flatten(2).sum(shared)
    torch.testing.assert_close(q.border[1].detach(), ((1 - rho) * 15).reshape(-1))


def test_grouped_weights_give_every_channel_its_own_outputs() -> None:
    torch.manual_seed(0)
    w = torch.randn(4, 1, 3, 3)  # depthwise
    w_hat = w.round()
    q = AQuant(4, signed=False, shape=FIELD, border="linear", per="channel")
    q.see_weights(w, w_hat)
    rho = (w * w_hat).flatten(1).sum(1) / w_hat.square().flatten(1).sum(1)
    torch.testing.assert_close(q.border[1].detach(), (1 - rho) * 15)


@pytest.mark.parametrize("fusion", ["none", "window", "residual"])
@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("squash", ["clip", "sigmoid"])
def test_decoded_codes_of_columns_equal_forward_and_fit_their_bits(
    fusion: str, bits: int, squash: str
) -> None:
    q = made(bits, fusion=fusion, squash=squash)
    x = columns(3) * 2
    with torch.no_grad():
        codes = q.codes(x)
        assert torch.equal(q.decode(codes), q(x))
    assert codes.min() >= 0
    assert codes.max() < 2**bits


@pytest.mark.parametrize("fusion", ["none", "window", "residual"])
def test_decoded_codes_of_signed_columns_equal_forward(fusion: str) -> None:
    q = AQuant(3, signed=True, shape=FIELD, fusion=fusion)  # type: ignore[arg-type]
    x = columns() - 0.2
    q.calibrate(x)
    nn.init.normal_(q.border, 0, 0.3)
    assert q.zero != 0
    with torch.no_grad():
        codes = q.codes(x)
        assert torch.equal(q.decode(codes), q(x))
    assert codes.min() >= -4
    assert codes.max() <= 3


@pytest.mark.parametrize("fusion", ["none", "window", "residual"])
def test_every_parameter_gets_a_gradient(fusion: str) -> None:
    q = made(fusion=fusion)
    e = torch.randn(columns().shape, generator=torch.Generator().manual_seed(1))
    (q(columns()) * e).sum().backward()
    for name, p in q.named_parameters():
        assert p.grad is not None, name
        assert p.grad.abs().sum() > 0, name


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_convolution_over_columns_equals_the_plain_one_for_equal_borders(groups: int) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=groups)
    x = torch.randn(2, 4, 9, 9).relu()
    outs = []
    for per in ("row", "channel"):
        q = AQuant(3, signed=False, shape=FIELD, per=per)
        q.calibrate(x)
        layer = QuantConv2d.from_float(conv, Identity(), q)
        outs.append(layer(x))
    torch.testing.assert_close(outs[0], outs[1], rtol=1e-4, atol=1e-5)


def test_a_linear_layer_has_a_row_per_input_and_needs_no_columns() -> None:
    q = AQuant(3, signed=False, shape=(10,))
    assert not q.on_columns
    assert q.border.shape == (3, 10)
    x = torch.rand(4, 10)
    q.calibrate(x)
    assert q(x).shape == x.shape


@pytest.mark.parametrize("per", ["row", "channel", "tensor"])
def test_a_linear_layer_takes_images_with_channels_last_in_any_memory_order(per: Any) -> None:
    torch.manual_seed(0)
    q = AQuant(4, signed=True, shape=(6,), per=per, init="zero")
    with torch.no_grad():
        q.border.uniform_(-0.5, 0.5)
    x = torch.randn(2, 6, 5, 7).permute(0, 2, 3, 1)
    q.calibrate(x)
    found = []
    for order in (x, x.contiguous()):
        one = order.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        y = q(one)
        (y * torch.arange(y.numel()).view(y.shape).cos()).sum().backward()
        assert one.grad is not None
        found.append((y.detach(), one.grad, q.codes(one.detach())))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("signed", [True, False])
def test_levels_and_thresholds_of_a_picture_are_those_of_the_average_row(signed: bool) -> None:
    q = AQuant(3, signed=signed, shape=FIELD, border="constant", per="channel", init="zero")
    x = torch.randn(8, *FIELD[:1], 6, 6) if signed else torch.rand(8, *FIELD[:1], 6, 6)
    q.calibrate(x)
    (levels,) = q.levels()
    assert torch.isin(q(x), levels).all()
    between = levels[:-1] + 0.5 * q.scale.detach()  # a border of 1/2
    torch.testing.assert_close(q.thresholds(), between, atol=q.scale.item() / 16, rtol=0)


def test_health_counts_the_rows_whose_border_leaves_its_range() -> None:
    q = AQuant(3, signed=False, shape=FIELD, border="constant")
    assert int(q.health()["borders_at_bound"]) == 0
    q.border.data[0, :5] = 0.6
    assert int(q.health()["borders_at_bound"]) == 5
    q = AQuant(3, signed=False, shape=FIELD, border="linear")
    q.border.data[1, :4] = 0.6  # at the upper end of the range alone
    assert int(q.health()["borders_at_bound"]) == 4
    q = AQuant(3, signed=False, shape=FIELD, border="linear", squash="sigmoid")
    q.border.data[1, :4] = 0.6
    assert int(q.health()["borders_at_bound"]) == 0  # it has none
    mixed = AQuant(3, signed=False, shape=FIELD, fusion="window")
    assert "borders_at_bound" not in mixed.health()  # each window has borders of its own


@pytest.mark.parametrize("squash", ["clip", "sigmoid"])
def test_thresholds_are_where_the_codes_change(squash: Any) -> None:
    q = AQuant(2, signed=False, shape=FIELD, per="tensor", border="linear", squash=squash)
    q.scale.data.fill_(2.0)
    q.border.data.copy_(torch.tensor([[0.1], [0.3]]))
    x = torch.linspace(0, 6, 6001)[None]
    change = x[0, 1:][q.codes(x)[0].diff() > 0]
    torch.testing.assert_close(q.thresholds(), change, rtol=0, atol=2.0 / 64 + 1e-3)


def test_size_counts_every_coefficient() -> None:
    assert made().extra_bytes() == 4 * (1 + 3 * ROWS)
    assert made(per="channel").extra_bytes() == 4 * (1 + 3 * 4)
    signed = AQuant(4, signed=True, shape=FIELD, border="constant", per="tensor")
    assert signed.extra_bytes() == 4 * 2 + 1  # a zero point
    assert made(fusion="window").extra_bytes() == 4 * (1 + 3 * ROWS + 4 * 81)


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"border": "cubic"}, "border must be one of"),
        ({"per": "pixel"}, "per must be one of"),
        ({"squash": "tanh"}, "squash must be one of clip, sigmoid, got 'tanh'"),
        ({"tau": 0.0}, "tau must be above 0 and at most 1, got 0.0"),
        ({"tau": 1.5}, "tau must be above 0 and at most 1, got 1.5"),
        ({"per": "channel", "fusion": "window"}, "fusion=window needs per=row"),
    ],
)
def test_wrong_options_are_refused_by_name(own: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AQuant(4, shape=FIELD, **own)


def test_padding_zeros_stay_zero_under_ordinary_borders() -> None:
    q = made(spread=0.05)
    x = F.unfold(torch.zeros(1, 4, 5, 5), 3, padding=1)
    assert float(q(x).detach().abs().max()) == 0.0


def test_a_network_with_a_layer_that_is_refused_stays_as_it_was() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
    )
    before = list(model.modules())
    bits = {"0": Bits(4, 4), "2": Bits(4, 4)}
    with pytest.raises(ConfigError, match="layer '2' has padding 'reflect', and AQuant of each"):
        quantize_(model, trace(model, (3, 8, 8)), bits, LSQ, partial(AQuant, per="row"))
    assert list(model.modules()) == before


@pytest.mark.parametrize("tokens", [1, 5, 6])
def test_tokens_are_quantized_one_by_one(tokens: int) -> None:
    q = AQuant(3, signed=False, shape=(6,))
    x = torch.rand(4, tokens, 6, generator=torch.Generator().manual_seed(0))
    q.calibrate(x)
    with torch.no_grad():
        q.border.copy_(
            0.2 * torch.randn(q.border.shape, generator=torch.Generator().manual_seed(1))
        )
        one_by_one = torch.stack([q(x[:, t]) for t in range(tokens)], 1)
        assert torch.equal(q(x), one_by_one)
        assert torch.equal(q.decode(q.codes(x)), one_by_one)


def test_the_closed_form_needs_no_reconstruction() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
    layers = trace(model, (3, 8, 8))
    quantize_(model, layers, {x.name: Bits(2, 4) for x in layers}, LSQ, AQuant)
    calibrate_(model, torch.randn(4, 3, 8, 8))
    for layer in quant_layers(model).values():
        assert isinstance(layer.act_quantizer, AQuant)
        assert layer.act_quantizer.border[1].abs().max() > 0


def test_a_network_on_columns_takes_an_empty_batch() -> None:
    model = ResNet(depth=8, num_classes=4, width=0.25)
    layers = trace(model, (3, 8, 8))
    quantize_(model, layers, {layer.name: Bits(4, 4) for layer in layers}, Nearest, AQuant)
    calibrate_(model, torch.randn(4, 3, 8, 8))
    assert quant_layers(model)["conv1"].act_quantizer.on_columns
    empty = torch.zeros(0, 3, 8, 8, requires_grad=True)
    logits = model.eval()(empty)
    logits.sum().backward()
    assert logits.shape == (0, 4)
    assert empty.grad is not None


def test_the_start_of_the_residual_does_not_depend_on_the_size_of_the_weights() -> None:
    torch.manual_seed(0)
    w = torch.randn(8, 4, 3, 3)
    starts = []
    for size in (1.0, 2.0**-6):
        q = AQuant(4, signed=False, shape=FIELD, fusion="residual")
        q.see_weights(size * w, size * (2 * w).round() / 2)
        starts.append(q.mixing.detach())
    assert starts[0].abs().max() > 0.1
    torch.testing.assert_close(*starts)


def test_a_row_whose_weights_are_all_zero_starts_as_nearest() -> None:
    torch.manual_seed(0)
    w = torch.randn(8, 4, 3, 3)
    w_hat = 1.1 * w
    w_hat[:, 1] = 0
    q = AQuant(4, signed=False, shape=FIELD, border="linear")
    q.see_weights(w, w_hat)
    slopes = q.border[1].detach().view(4, 9)
    assert (slopes[1] == 0).all()
    assert (slopes[[0, 2, 3]] != 0).all()
