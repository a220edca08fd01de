"""ADQ's codebook: quantile start, moving average against Lloyd, dead levels, learned levels."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qexp.quant.cells import bin_members
from qexp.quant.codebook import Codebook, quantile_levels
from qexp.quant.functional import SMALL, compile_kernels


def weights(seed: int = 0, rows: int = 6) -> Tensor:
    return 0.1 * torch.randn(rows, 5, 3, 3, generator=torch.Generator().manual_seed(seed))


def made(w: Tensor, bits: int = 3, **own: object) -> Codebook:
    q = Codebook(bits, shape=w.shape, **own)  # type: ignore[arg-type]
    q.calibrate(w)
    return q


def nearest(w: np.ndarray, levels: np.ndarray) -> np.ndarray:
    return np.abs(w[:, None] - levels).argmin(1)


def lloyd(w: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """One Lloyd sweep with zero pinned."""
    cells, out = nearest(w, levels), levels.copy()
    for k in range(len(levels)):
        if (cells == k).any() and levels[k] != 0:
            out[k] = w[cells == k].mean()
    return out


@pytest.mark.parametrize("levels", ["symmetric", "full"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_start_is_the_quantiles_of_each_sign_and_zero(bits: int, levels: str) -> None:
    w = weights()
    v, m = w.double().numpy().ravel(), 2 ** (bits - 1) - 1
    below = m + 1 if levels == "full" else m  # negative levels
    at, at_low = (np.arange(1, m + 1) - 0.5) / m, (np.arange(1, below + 1) - 0.5) / below
    expected = np.concatenate([np.quantile(v[v < 0], at_low), [0], np.quantile(v[v > 0], at)])
    found = made(w, bits, levels=levels).levels()[0].numpy()
    assert len(found) == (2**bits if levels == "full" else 2**bits - 1)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_forward_is_the_nearest_level_and_passes_the_gradient_whole() -> None:
    w = weights().requires_grad_()
    q, e = made(w.detach()).eval(), weights(1)
    levels = q.levels()[0].numpy()
    y = q(w)
    v = w.detach().numpy().ravel()
    assert np.array_equal(y.detach().numpy().ravel(), levels[nearest(v, levels)])
    y.backward(e)
    assert torch.equal(w.grad, e)  # type: ignore[arg-type]  # no clip mask


@pytest.mark.parametrize("levels", ["symmetric", "full"])
@pytest.mark.parametrize("form", ["simple", "count"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_moving_average_without_memory_is_one_lloyd_sweep(
    form: str, bits: int, levels: str
) -> None:
    w = weights()
    q = made(w, bits, gamma=0.0, form=form, init="uniform", levels=levels)
    expected = lloyd(w.double().numpy().ravel(), q.levels()[0].double().numpy())
    q.train()(w)
    np.testing.assert_allclose(q.levels()[0].numpy(), expected, rtol=1e-5, atol=1e-8)


def test_simple_average_moves_each_level_by_its_part_towards_its_mean() -> None:
    w = weights()
    q = made(w, 3, gamma=0.9)
    before = q.levels()[0].double().numpy()
    mean = lloyd(w.double().numpy().ravel(), before)
    q.train()(w)
    np.testing.assert_allclose(q.levels()[0].numpy(), 0.9 * before + 0.1 * mean, rtol=1e-5)


def test_count_average_keeps_sums_and_numbers_of_earlier_weights() -> None:
    w, later = weights(), 1.3 * weights(1)
    q = made(w, 3, gamma=0.9, form="count")
    levels = q.levels()[0].double().numpy()
    count = np.bincount(nearest(w.double().numpy().ravel(), levels), minlength=7).astype(float)
    for _ in range(2):
        v = later.double().numpy().ravel()
        cells = nearest(v, levels)
        n, t = np.bincount(cells, minlength=7), np.bincount(cells, weights=v, minlength=7)
        total, count = 0.9 * levels * count + 0.1 * t, 0.9 * count + 0.1 * n
        levels = total / count
        levels[q.zero_at] = 0
        q.train()(later)
        np.testing.assert_allclose(q.levels()[0].numpy(), levels, rtol=1e-4, atol=1e-8)


def test_adaptation_lowers_the_error_of_the_start() -> None:
    w = weights(rows=60)
    q = made(w, 4, gamma=0.5)
    errors = []
    for _ in range(150):
        errors.append((q.train()(w) - w).square().mean().item())
    assert errors[-1] < 0.6 * errors[0]
    kmeans = made(w, 4, init="kmeans").eval()
    assert errors[-1] < 1.1 * (kmeans(w) - w).square().mean().item()


def test_kmeans_starts_where_another_sweep_changes_nothing() -> None:
    w = weights()
    q = made(w, 3, init="kmeans", gamma=0.0)
    start = q.levels().clone()
    q.train()(w)
    torch.testing.assert_close(q.levels(), start, rtol=1e-5, atol=0)


def test_levels_move_in_training_only_and_not_after_their_time() -> None:
    w = weights()
    q = made(w, 3, adapt_until=0.9)
    start = q.levels().clone()
    q.eval()(w)
    assert torch.equal(q.levels(), start)
    q.train()
    q.progress(0.9)
    q(w)
    assert torch.equal(q.levels(), start)
    q.progress(0.5)
    q(w)
    assert not torch.equal(q.levels(), start)
    fixed = made(w, 3, adaptation="none").train()
    fixed.progress(0.0)
    fixed(w)
    assert torch.equal(fixed.levels(), start)


@given(
    seed=st.integers(0, 2**16), gamma=st.floats(0, 0.99), form=st.sampled_from(["simple", "count"])
)
@settings(deadline=None, max_examples=20)
def test_levels_stay_sorted_around_a_pinned_zero(seed: int, gamma: float, form: str) -> None:
    w = weights(seed)
    q = made(w, 4, gamma=gamma, form=form, dead_after=2).train()
    for i in range(6):
        q(w + 0.05 * weights(seed + i + 1) + 0.02 * i)  # drifting, so that levels die
        levels = q.levels()[0]
        assert (levels.diff() >= 0).all()
        assert levels[q.zero_at] == 0
        assert levels.isfinite().all()


def test_a_dead_level_is_counted_and_moves_into_its_fuller_neighbour() -> None:
    w = torch.cat([torch.linspace(-1, -0.1, 50), torch.linspace(0.1, 0.5, 50)]).view(1, -1)
    q = made(w, 3, dead_after=3, gamma=0.99).train()
    with torch.no_grad():
        q.codebook[0, -1] = 50.0
    for _ in range(2):
        q(w)
        assert q.health()["dead_levels"] == 1
        assert q.levels()[0, -1] == 50
    q(w)
    # The one neighbour is the level below; its upper half reaches the largest weight.
    assert q.levels()[0, -2] < q.levels()[0, -1] <= 0.5
    assert q.health()["dead_levels"] == 0
    q(w)
    assert q.health()["dead_levels"] == 0


@pytest.mark.parametrize(
    ("levels", "at", "goes_to"),
    [
        ([-3, -2, -1, 0, 1, 2, 50], 6, (2.1 + 2.4) / 2),  # upper half of the cell below
        ([-50, -2, -1, 0, 1, 2, 3], 0, (-2.2 - 2.1) / 2),  # lower half of the cell above
        ([-3, -2, -1, 0, 1, 1.6, 2], 5, (1.85 + 1.9) / 2),  # of two neighbours the fuller one
    ],
)
def test_a_dead_level_goes_to_the_half_cell_that_faces_it(
    levels: list[float], at: int, goes_to: float
) -> None:
    w = torch.tensor([[-2.2, -2.1, -1.9, -1.8, -1, 0.9, 1.1, 1.2, 1.85, 1.9, 2.1, 2.4]])
    q = made(w, 3, dead_after=1, gamma=0.99).train()
    with torch.no_grad():
        q.codebook.copy_(torch.tensor([levels]))
        q.count.fill_(7)
    q(w)
    assert q.levels()[0, at].item() == pytest.approx(goes_to)
    assert q.count[0, at] == 2  # members of that half
    assert q.health()["dead_levels"] == 0  # zero has no member here, and needs none


def test_a_member_now_and_then_keeps_a_level_alive() -> None:
    w = torch.cat([torch.linspace(-1, -0.1, 50), torch.linspace(0.1, 0.5, 50)]).view(1, -1)
    seldom = w.clone()
    seldom[0, -1] = 50.0
    q = made(w, 3, dead_after=3, gamma=0.99).train()
    with torch.no_grad():
        q.codebook[0, -1] = 50.0
    for v, idle in ((w, 1), (w, 1), (seldom, 0), (w, 1), (w, 1)):
        q(v)
        assert q.health()["dead_levels"] == idle
        assert q.levels()[0, -1] == 50
    q.calibrate(w)
    assert q.health()["dead_levels"] == 0


@pytest.mark.parametrize("init", ["quantile", "uniform"])
def test_per_channel_equals_a_loop_of_single_codebooks(init: str) -> None:
    w = weights()
    q = made(w, 3, per_channel=True, gamma=0.7, init=init).train()
    y = q(w)
    for i, row in enumerate(w):
        single = made(row[None], 3, gamma=0.7, init=init).train()
        assert torch.equal(single(row[None])[0], y[i])
        torch.testing.assert_close(single.levels()[0], q.levels()[i], rtol=1e-6, atol=0)
    assert q.extra_bytes() == 4 * 7 * 6


def test_learned_levels_get_the_sum_of_their_members_gradients_and_zero_none() -> None:
    w, e = weights(), weights(1)
    q = made(w, 3, adaptation="gradient")
    q.train()(w).backward(e)
    cells = q.codes(w).flatten().long() + q.zero_at
    expected = torch.zeros(7).index_add_(0, cells, e.flatten())
    expected[q.zero_at] = 0
    expected *= (w.numel() * q.qmax) ** -0.5
    assert q.codebook.grad is not None
    torch.testing.assert_close(q.codebook.grad[0], expected, rtol=1e-5, atol=1e-6)


def test_learned_levels_that_cross_are_still_a_sorted_grid() -> None:
    w = weights()
    q = made(w, 3, adaptation="gradient").eval()
    with torch.no_grad():
        q.codebook[0, [4, 5]] = q.codebook[0, [5, 4]]
        assert (q.levels().diff() > 0).all()
        assert torch.equal(q.decode(q.codes(w)), q(w))
        assert not q.health()["clamped_levels"]
        q.codebook[0, 4] = -0.1  # a positive level beyond zero: held there, and told
        assert q.levels()[0, 4] == 0
        assert q.health()["clamped_levels"] == 1


@pytest.mark.parametrize("sign", [1, -1, 0])
def test_weights_of_one_sign_or_none_give_a_usable_codebook(sign: int) -> None:
    w = sign * weights().abs()
    q = made(w, 3)
    assert (q.levels().diff() > 0).all()
    assert q.train()(w).isfinite().all()


@pytest.mark.parametrize(("own", "word"), [({"gamma": 1.0}, "gamma"), ({"bits": 1}, "2 bits")])
def test_values_that_make_no_codebook_are_refused(own: dict, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        partial(Codebook, **{"bits": 3, **own})(shape=(4, 4))


@pytest.mark.slow
@pytest.mark.parametrize("form", ["simple", "count"])
@pytest.mark.parametrize("per_channel", [False, True])
def test_compiled_steps_move_the_codebook_as_eager_ones(form: str, per_channel: bool) -> None:
    w = weights()
    own = {"form": form, "per_channel": per_channel, "gamma": 0.6, "dead_after": 2}
    eager, graph = made(w, 4, **own).train(), made(w, 4, **own).train()
    torch._dynamo.reset()
    run = torch.compile(graph, fullgraph=True)
    for i in range(4):
        v = w + 0.03 * i
        torch.testing.assert_close(run(v), eager(v), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(graph.levels(), eager.levels(), rtol=1e-5, atol=1e-7)
    assert torch.equal(graph.idle, eager.idle)


def test_quantiles_of_more_weights_than_torch_takes_are_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    w = torch.randn(5000, generator=torch.Generator().manual_seed(0))
    levels = quantile_levels(w, 3, 3)
    monkeypatch.setattr("qexp.quant.codebook.QUANTILE_LIMIT", 100)
    torch.testing.assert_close(quantile_levels(w, 3, 3), levels, rtol=1e-5, atol=0)


# The two ways to find a cell: one fused search for one codebook, a table a row for many


@pytest.mark.parametrize("levels", ["symmetric", "full"])
def test_one_codebook_and_one_codebook_a_row_agree(levels: str) -> None:
    w = weights(rows=1)
    one, rows = (made(w, levels=levels, per_channel=p) for p in (False, True))
    assert one.codebook.shape == rows.codebook.shape
    both = made(torch.cat([w, -3 * w]), levels=levels, per_channel=True)
    for _ in range(3):
        alone = one.train()(w)
        assert torch.equal(rows.train()(w), alone)
        assert torch.equal(both.train()(torch.cat([w, -3 * w]))[:1], alone)
    assert torch.equal(one.codebook, rows.codebook)
    assert torch.equal(one.codebook, both.codebook[:1])
    assert not torch.equal(both.codebook[0], both.codebook[1])


@pytest.mark.parametrize("bits", [2, 4, 5])
def test_the_compiled_search_adapts_as_the_eager_one_does(bits: int) -> None:
    w = weights(rows=400)
    assert w.numel() >= SMALL  # smaller ones run eagerly anyway
    w[0, 0, 0] = 0.0
    w[1, 0, 0, 0] = 50.0  # far outside
    results = []
    for compiled in (False, True):
        q = made(w, bits, dead_after=2).train()
        compile_kernels(compiled)
        try:
            outputs = [q(w) for _ in range(4)]
        finally:
            compile_kernels(False)
        results.append([*outputs, q.codebook, q.count, q.idle, q.codes(w)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("bits", [2, 4])
def test_a_weight_that_is_nan_does_not_leave_the_cells(bits: int, compiled: bool) -> None:
    w = weights(rows=400)
    q = made(w, bits).train()
    expected = made(w, bits).train()(w)[1:]
    w[0, 0, 0, 0] = torch.nan
    compile_kernels(compiled)
    try:
        assert torch.equal(q(w)[1:], expected)  # the run then says that its loss is NaN
        codes = q.codes(w)
    finally:
        compile_kernels(False)
    assert q.qmin <= int(codes.min())
    assert int(codes.max()) <= q.qmax


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_members_are_counted_and_summed_in_float64(dtype: torch.dtype) -> None:
    values = torch.full((3, 1 << 20), 0.1)
    index = torch.tensor([4, 0, 4], dtype=dtype)[:, None].expand_as(values)
    found = bin_members(values, index, 6)
    n, exact = 1 << 20, float(torch.tensor(0.1))
    assert found[:, 0].tolist() == [n, 0, 0, 0, 2 * n, 0]
    assert found[:, 1].tolist() == pytest.approx([n * exact, 0, 0, 0, 2 * n * exact, 0], rel=1e-12)
