"""POST, POT and APoT: their level sets, their gradients, and how they agree with each other."""

from __future__ import annotations

import math
import re
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from qexp.quant import grids
from qexp.quant.additive import APoTActivation
from qexp.quant.power import POST, POT, APoT, FixedGrid, POSTReleased
from qexp.quant.project import mse_clip, project, quantile_clip

SQRT2 = math.sqrt(2)
SHAPE = (6, 8, 3, 3)


def weights(seed: int = 0) -> Tensor:
    w = torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))
    return w * torch.logspace(-2, 0, 6).view(-1, 1, 1, 1)


def post_numpy(w: np.ndarray, e: np.ndarray, alpha: float, levels: list[float], g: float):
    """v = clip(w/alpha), nearest level by search; STE and RCF gradients."""
    w_hat, dw, da = np.zeros_like(w), np.zeros_like(w), 0.0
    for i, value in np.ndenumerate(w):
        v = value / alpha
        q = min(levels, key=lambda level: abs(level - min(max(v, -1), 1)))
        inside = abs(v) <= 1
        w_hat[i], dw[i] = alpha * q, e[i] * inside
        da += e[i] * (q - v if inside else math.copysign(1, v))
    return w_hat, dw, g * da


# ---------------------------------------------------------------------------------------------
# Level sets


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("base", [2.0, SQRT2])
def test_power_grids_are_sorted_distinct_and_of_the_stated_size(bits: int, base: float) -> None:
    sizes = {
        grids.symmetric: 2**bits - 1,
        grids.full: 2**bits,
        grids.no_zero: 2**bits,
        grids.released: 2**bits + 1,
    }
    for make, size in sizes.items():
        grid = make(bits, base)
        assert grid.numel() == size
        assert (grid.diff() > 0).all()
        assert grid[0] == -1
        assert grid[-1] == 1
        assert (0 in grid) == (make is not grids.no_zero)


@pytest.mark.parametrize("bits", range(2, 9))
def test_additive_grid_is_sorted_distinct_and_of_the_stated_size(bits: int) -> None:
    grid = grids.additive(bits)
    assert grid.numel() == 2**bits - 1
    assert (grid.diff() > 0).all()
    assert torch.equal(grid, -grid.flip(0))
    assert grid[-1] == 1


@pytest.mark.parametrize(
    ("bits", "terms"),
    [
        (2, [[0, 1]]),
        (3, [[0, 2**-1, 2**-2, 2**-3]]),
        (4, [[0, 2**-1, 2**-2, 2**-4], [0, 2**-3]]),
        (5, [[0, 2**-1, 2**-3, 2**-5], [0, 2**-2, 2**-4, 2**-6]]),
    ],
)
def test_additive_grid_is_the_set_the_authors_list(bits: int, terms: list[list[float]]) -> None:
    sums = sorted(sum(c) for c in product(*terms))
    expected = torch.tensor(sums) / max(sums)
    assert torch.equal(grids.additive(bits)[-len(sums) :], expected)


@pytest.mark.parametrize(
    ("bits", "terms"),
    [
        (2, [[0, 2**-1, 2**-2, 2**-3]]),
        (3, [[0, 2**-1, 2**-2, 2**-4], [0, 2**-3]]),
        (4, [[0, 2**-1, 2**-3, 2**-5], [0, 2**-2, 2**-4, 2**-6]]),
    ],
)
def test_inputs_have_the_sums_the_authors_list_with_all_bits_for_magnitude(
    bits: int, terms: list[list[float]]
) -> None:
    sums = sorted(sum(c) for c in product(*terms))
    assert torch.equal(grids.sums(bits), torch.tensor(sums) / max(sums))


@pytest.mark.parametrize("bits", range(2, 9))
def test_grids_of_inputs_run_from_0_to_1_and_use_every_code(bits: int) -> None:
    for make in (grids.sums, grids.powers) if bits < 8 else (grids.sums,):
        grid = make(bits)
        assert grid.numel() == 2**bits
        assert (grid[0], grid[-1]) == (0, 1)
        assert (grid.diff() > 0).all()
    if bits < 8:
        assert torch.equal(grids.powers(bits)[1:], grids.symmetric(bits + 1, 2.0)[-(2**bits) + 1 :])
    else:
        with pytest.raises(ValueError, match="up to 7"):
            grids.powers(bits)


def test_two_bit_grids_read_as_documented() -> None:
    assert grids.symmetric(2, 2.0).tolist() == [-1, 0, 1]
    assert grids.full(2, 2.0).tolist() == [-1, -0.5, 0, 1]
    assert grids.no_zero(2, 2.0).tolist() == [-1, -0.5, 0.5, 1]
    assert grids.released(2, 2.0).tolist() == [-1, -0.5, 0, 0.5, 1]


def least_error(grid: Tensor) -> float:
    """E (x_hat - x)^2 of N(0, 1) at the best clip, from its quantiles."""
    x = torch.special.ndtri((torch.arange(4001.0) + 0.5) / 4001)
    x = (x / x.square().mean().sqrt()).view(1, -1)
    clip = mse_clip(x, grid, per_row=True)
    return (project(x, clip.view(1, 1), grid) - x).square().mean().item()


DOCUMENTED = re.findall(r"^    (\w+)( 2| sqrt2|) +((?:\.\d{4} *){9})$", str(grids.__doc__), re.M)


@pytest.mark.parametrize(("name", "base", "errors"), DOCUMENTED)
def test_errors_in_the_docstring_are_the_measured_ones(name: str, base: str, errors: str) -> None:
    for bits, error in zip((2, 3, 4), errors.split()[:3], strict=True):
        own = () if name == "additive" else (SQRT2 if base == " sqrt2" else 2.0,)
        assert least_error(getattr(grids, name)(bits, *own)) == pytest.approx(
            float(error), rel=0.02
        )


def test_the_docstring_has_every_grid_of_weights() -> None:
    both = {"symmetric", "full", "no_zero", "released"}
    assert [(name, base) for name, base, _ in DOCUMENTED] == [
        *((name, " 2") for name in ("symmetric", "full", "no_zero")),
        *((name, " sqrt2") for name in ("symmetric", "full", "no_zero")),
        ("released", " 2"),
        ("released", " sqrt2"),
        ("additive", ""),
    ]
    assert all(callable(getattr(grids, name)) for name in both)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_default_post_grid_has_the_least_error_of_the_legal_power_grids(bits: int) -> None:
    default = least_error(POST(bits, shape=SHAPE).grid)
    for make in (grids.symmetric, grids.full, grids.no_zero):
        for base in (2.0, SQRT2):
            assert default <= least_error(make(bits, base)) + 1e-5


# ---------------------------------------------------------------------------------------------
# Agreement


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_post_of_base_two_symmetric_equals_pot(bits: int) -> None:
    w = weights()
    post, pot = POST(bits, shape=SHAPE, base=2.0, levels="symmetric"), POT(bits, shape=SHAPE)
    post.calibrate(w)
    pot.calibrate(w)
    assert torch.equal(post(w), pot(w))
    assert torch.equal(post.codes(w), pot.codes(w))


@pytest.mark.parametrize("bits", [3, 4, 5])
def test_pot_grid_equals_apots_non_additive_grid(bits: int) -> None:
    # The authors' non-additive set: {0} u {2^-1 .. 2^-(2^B - 1)}, divided by its largest.
    values = [0.0] + [2.0 ** -(i + 1) for i in range(2 ** (bits - 1) - 1)]
    expected = torch.tensor(sorted(values)) / max(values)
    assert torch.equal(POT(bits, shape=SHAPE).grid[-len(values) :], expected)


@pytest.mark.parametrize("bits", [2, 3])
def test_apot_equals_pot_where_sums_have_one_term(bits: int) -> None:
    assert torch.equal(grids.additive(bits), grids.symmetric(bits, 2.0))


@pytest.mark.parametrize("init", ["quantile", "mse"])
@pytest.mark.parametrize("cls", [POST, POSTReleased, POT, APoT])
def test_per_channel_equals_a_loop_of_per_tensor(cls: type[FixedGrid], init: str) -> None:
    w, e = weights(), torch.randn(SHAPE)
    q = cls(4, shape=SHAPE, init=init)  # type: ignore[call-arg]
    q.calibrate(w)
    q(w).backward(e)
    assert q.scale.grad is not None
    for c in range(SHAPE[0]):
        one = cls(4, shape=(1, *SHAPE[1:]), init=init, per_channel=False)  # type: ignore[call-arg]
        one.calibrate(w[c : c + 1])
        assert torch.equal(one.scale.view(()), q.scale[c].view(()))
        y = one(w[c : c + 1])
        assert torch.equal(y[0], q(w)[c])
        y.backward(e[c : c + 1])
        torch.testing.assert_close(one.scale.grad, q.scale.grad[c].view(()), rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------------
# Gradients


@pytest.mark.parametrize("levels", ["full", "symmetric", "no_zero"])
@pytest.mark.parametrize("bits", [2, 4])
def test_post_equals_the_transcription_of_its_equations(bits: int, levels: str) -> None:
    w, e = weights(3), torch.randn(SHAPE)
    q = POST(bits, shape=SHAPE, levels=levels)  # type: ignore[arg-type]
    q.calibrate(w)
    v = w.clone().requires_grad_()
    y = q(v)
    y.backward(e)
    assert v.grad is not None
    assert q.scale.grad is not None
    for c in range(SHAPE[0]):
        w_hat, dw, da = post_numpy(
            w[c].double().numpy(),
            e[c].double().numpy(),
            q.scale[c].item(),
            q.grid.tolist(),
            1 / math.sqrt(w[c].numel()),
        )
        np.testing.assert_allclose(y[c].detach().numpy(), w_hat, rtol=1e-6)
        np.testing.assert_array_equal(v.grad[c].double().numpy(), dw)
        assert q.scale.grad[c].item() == pytest.approx(da, rel=1e-4, abs=1e-5)


def test_clip_gradient_matches_closed_form_with_clipping_and_ties() -> None:
    # clip 2, grid {-1, -.5, 0, 1}: v = -1.5 (below), -.75 (tie -> -1), -.25 (tie -> -.5),
    # .5 (tie -> 0), .6 -> 1, 1 (edge), 2 (above)
    w = torch.tensor([[-3.0, -1.5, -0.5, 1.0, 1.2, 2.0, 4.0]], requires_grad=True)
    scale = torch.tensor([[2.0]], requires_grad=True)
    y = project(w, scale, grids.full(2, 2.0), 0.5)
    assert y.tolist() == [[-2.0, -2.0, -1.0, 0.0, 2.0, 2.0, 2.0]]
    y.sum().backward()
    assert w.grad is not None
    assert scale.grad is not None
    assert w.grad.tolist() == [[0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0]]
    t = -1 + (-1 + 0.75) + (-0.5 + 0.25) + (0 - 0.5) + (1 - 0.6) + 0 + 1
    assert scale.grad.item() == pytest.approx(0.5 * t, abs=1e-6)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_apot_gradients_equal_autograd_of_the_composed_form_in_float64(
    bits: int, normalize: bool
) -> None:
    w, e = weights(4), torch.randn(SHAPE)
    q = APoT(bits, shape=SHAPE, normalize=normalize, init="mse", grad_scale="one")
    q.calibrate(w)
    v, v64 = w.clone().requires_grad_(), w.double().requires_grad_()
    q(v).backward(e)
    scale = q.scale.detach().double().requires_grad_()
    std, mean = torch.std_mean(w.double()) if normalize else (1.0, 0.0)
    z = (v64 - mean) / std / scale
    outside = z.abs() > 1
    # Above 2 bits clipped weights get no gradient; at 2 bits they do, but not through the clip.
    clipped = torch.where(outside, z.sign().detach(), z)
    grid = q.grid.double()
    nearest = grid[(clipped.unsqueeze(-1) - grid).abs().argmin(-1)]
    w_hat = (clipped + (nearest - clipped).detach()) * scale * std
    if bits == 2:
        passed = torch.where(outside, v64, v64.detach())
        w_hat = w_hat + passed - passed.detach()
    w_hat.backward(e.double())
    assert v.grad is not None
    assert v64.grad is not None
    assert q.scale.grad is not None
    torch.testing.assert_close(v.grad.double(), v64.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(q.scale.grad.double(), scale.grad, rtol=1e-4, atol=1e-4)


def test_decoding_is_linear_in_the_clip_by_gradcheck() -> None:
    q = POST(4, shape=(2, 4)).double()
    codes = torch.tensor([[-8, -1, 0, 7], [3, -4, 2, 1]])
    clip = torch.tensor([[0.3], [0.7]], dtype=torch.float64, requires_grad=True)

    def decoded(scale: Tensor) -> Tensor:
        q.scale = scale
        return q.decode(codes)

    del q.scale  # a parameter, for which no other tensor can stand
    assert torch.equal(decoded(clip), clip * q.grid[codes + 8])
    assert torch.autograd.gradcheck(decoded, (clip,))


# ---------------------------------------------------------------------------------------------
# State and options


def test_initial_clip_is_the_quantile_of_the_magnitudes() -> None:
    w = weights(5)
    expected = torch.quantile(w.abs().flatten(1), 0.99, dim=1)
    torch.testing.assert_close(quantile_clip(w, per_row=True), expected)
    whole = torch.quantile(w.abs().flatten(), 0.99)
    torch.testing.assert_close(quantile_clip(w, per_row=False)[0], whole)


def test_released_grid_is_charged_for_the_levels_it_has() -> None:
    for bits in (2, 3, 4, 8):
        q = POSTReleased(bits, shape=SHAPE)
        assert q.num_levels == 2**bits + 1
        assert q.effective_bits == pytest.approx(math.log2(2**bits + 1))
        assert POST(bits, shape=SHAPE).effective_bits == bits


def test_automatic_base_follows_the_width_and_a_typed_one_is_taken() -> None:
    ratio = {b: (POST(b, shape=SHAPE).grid[-1] / POST(b, shape=SHAPE).grid[-2]) for b in (3, 4, 8)}
    assert ratio[3] == pytest.approx(2)
    assert ratio[4] == pytest.approx(SQRT2)
    assert ratio[8] == pytest.approx(SQRT2)
    typed = POST(3, shape=SHAPE, base=1.41421356)
    assert torch.equal(typed.grid, grids.full(3, SQRT2))


@pytest.mark.parametrize("cls", [POST, POSTReleased, POT, APoT])
@pytest.mark.parametrize("bits", [1, 9])
def test_widths_without_a_grid_are_refused_with_the_ones_that_have_it(
    cls: type[FixedGrid], bits: int
) -> None:
    with pytest.raises(ValueError, match="bits from 2 to 8"):
        cls(bits, shape=SHAPE)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"base": "sqrt2"}, "base must be 'auto' or a finite number above 1, got 'sqrt2'"),
        ({"base": 1.0}, "base must be 'auto' or a finite number above 1, got 1.0"),
        ({"base": math.inf}, "base must be 'auto' or a finite number above 1, got inf"),
        ({"levels": "all"}, "levels must be one of full, symmetric, no_zero, got 'all'"),
        ({"signed": False}, "POST quantizes weights, which are signed"),
        ({"init": "max"}, "init must be quantile or mse .* got 'max'"),
    ],
)
def test_wrong_options_are_named(own: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        POST(4, shape=SHAPE, **own)  # type: ignore[arg-type]


@pytest.mark.parametrize("levels", ["full", "symmetric", "no_zero"])
@pytest.mark.parametrize("bits", [2, 4])
def test_code_0_is_zero_or_the_level_next_above_it(bits: int, levels: str) -> None:
    q = POST(bits, shape=SHAPE, levels=levels)  # type: ignore[arg-type]
    q.calibrate(weights())
    least = 0 if levels != "no_zero" else q.grid[q.grid > 0].min()
    assert torch.equal(
        q.decode(torch.zeros(SHAPE, dtype=torch.int32)), q.scale * least + 0 * weights()
    )
    assert (q.qmin, q.qmax) == (
        -(2**bits - (levels == "symmetric")) // 2 + (levels == "symmetric"),
        2 ** (bits - 1) - 1,
    )


def test_normalised_weights_are_charged_for_their_deviation_and_clip_at_three() -> None:
    q = APoT(4, shape=SHAPE, normalize=True, init="three_std")
    q.calibrate(weights())
    assert (q.scale == 3).all()
    assert q.extra_bytes() == 4 * 6 + 4
    assert APoT(4, shape=SHAPE).extra_bytes() == 4 * 6


@pytest.mark.parametrize(("bits", "default"), [(2, False), (3, True)])
def test_clipped_weights_get_a_gradient_where_asked_for(bits: int, default: bool) -> None:
    w, e = weights(), torch.ones(SHAPE)
    for given, clips in ((None, default), (True, True), (False, False)):
        q = APoT(bits, shape=SHAPE, init="mse", clip_gradient=given)
        q.calibrate(w)
        outside = w.abs() > q.scale.detach()
        assert outside.any()
        x = w.clone().requires_grad_()
        q(x).backward(e)
        assert x.grad is not None
        torch.testing.assert_close(x.grad, torch.where(outside & torch.tensor(clips), 0.0, e))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_apot_of_single_powers_is_pot(bits: int) -> None:
    single, pot = APoT(bits, shape=SHAPE, additive=False), POT(bits, shape=SHAPE)
    w = weights()
    single.calibrate(w)
    pot.calibrate(w)
    torch.testing.assert_close(single.eval()(w), pot(w))


@pytest.mark.parametrize("additive", [True, False])
@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize("count", ["sample", "tensor", None])
def test_gradients_of_apot_inputs_are_those_of_the_equations(
    bits: int, count: str | None, additive: bool
) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 5, 5).relu().requires_grad_()
    e = torch.randn_like(x)
    q = APoTActivation(
        bits,
        signed=False,
        shape=(3, 3, 3),
        additive=additive,
        count=count,  # type: ignore[arg-type]
    )
    with torch.no_grad():
        q.scale.fill_(0.7)
    y = q(x)
    y.backward(e)
    g = {"sample": 75**-0.5, "tensor": 300**-0.5, None: 1.0}[count]
    levels = (grids.sums if additive else grids.powers)(bits).tolist()
    w_hat, dx, da = np.zeros(x.shape), np.zeros(x.shape), 0.0
    for i, value in np.ndenumerate(x.detach().numpy()):
        v = value / 0.7
        level = min(levels, key=lambda level: abs(level - min(v, 1)))
        w_hat[i], dx[i] = 0.7 * level, e[i] * (v <= 1)
        da += float(e[i]) * (level - v if v <= 1 else 1)
    torch.testing.assert_close(y.detach(), torch.tensor(w_hat).float())
    torch.testing.assert_close(x.grad, torch.tensor(dx).float())
    torch.testing.assert_close(q.scale.grad, torch.tensor(g * da).float())


def test_apot_inputs_start_at_the_authors_clip_or_at_the_least_error() -> None:
    x = torch.randn(8, 3, 5, 5, generator=torch.Generator().manual_seed(0)).relu()
    paper = APoTActivation(2, signed=False, shape=(3, 3, 3), init="paper")
    mse = APoTActivation(2, signed=False, shape=(3, 3, 3))
    for q in (paper, mse):
        q.calibrate(x)
    assert paper.scale == 8
    assert (mse(x) - x).square().mean() < 0.3 * (paper(x) - x).square().mean()


def test_weight_grids_refuse_unsigned_inputs() -> None:
    with pytest.raises(ValueError, match="quantizes weights"):
        APoT(4, signed=False, shape=SHAPE)


def test_three_std_needs_normalised_weights() -> None:
    with pytest.raises(ValueError, match="normalize=true"):
        APoT(4, shape=SHAPE, init="three_std")


def test_apot_statistics_follow_training_and_stand_still_in_evaluation() -> None:
    w = weights(6)
    q = APoT(4, shape=SHAPE, normalize=True)
    q.calibrate(w)
    std = q.std.clone()
    q.eval()(2 * w)
    assert torch.equal(q.std, std)
    q.train()(2 * w)
    torch.testing.assert_close(q.std, 2 * std)
    torch.testing.assert_close(q.mean, 2 * w.mean())


@pytest.mark.parametrize("normalize", [True, False])
def test_apot_levels_are_those_of_its_output(normalize: bool) -> None:
    w = weights(6)
    q = APoT(3, shape=SHAPE, normalize=normalize).eval()
    q.calibrate(w)
    for row, levels in zip(q(w).detach(), q.levels(), strict=True):
        assert torch.isin(row, levels).all()


def test_apot_allows_two_forwards_before_one_backward() -> None:
    w, e = weights(7), torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    q = APoT(4, shape=SHAPE, normalize=True).train()
    q.calibrate(w)
    factors = (1.0, 2.0)  # between the forwards the buffers move
    found = []
    for together in (True, False):
        q.zero_grad()
        v = w.clone().requires_grad_()
        if together:
            a, b = ((q(f * v) * own).sum() for f, own in zip(factors, e, strict=True))
            (a + b).backward()
        else:
            for f, own in zip(factors, e, strict=True):
                (q(f * v) * own).sum().backward()
        assert v.grad is not None
        assert q.scale.grad is not None
        found.append((v.grad, q.scale.grad.clone()))
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("normalize", [True, False])
def test_apot_keeps_the_magnitude_of_the_weights(normalize: bool) -> None:
    w = torch.randn(SHAPE, generator=torch.Generator().manual_seed(8)) * 0.05
    q = APoT(5, shape=SHAPE, normalize=normalize)
    q.calibrate(w)
    with torch.no_grad():
        w_hat = q(w)
    assert (w_hat - w).square().sum() < 0.05 * w.square().sum()


def test_one_clip_a_layer_divides_by_the_root_of_all_its_weights() -> None:
    w = weights()
    e = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    q = POT(3, shape=SHAPE, per_channel=False)
    q.calibrate(w)
    q(w).backward(e)
    clip = q.scale.detach().clone().requires_grad_()
    project(w, clip, q.grid).backward(e)
    assert clip.grad is not None
    torch.testing.assert_close(q.scale.grad, clip.grad / w.numel() ** 0.5)
