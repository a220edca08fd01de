"""Sensitivity against closed forms, allocation against brute force."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.optimize
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from qexp.errors import RunError
from qexp.models.resnet import ResNet
from qexp.quant import sensitivity
from qexp.quant.accounting import account
from qexp.quant.allocate import allocate, operand_cost, tied
from qexp.quant.bitwidth import Pattern
from qexp.quant.convert import Bits, quantize_
from qexp.quant.lsq import LSQ
from qexp.quant.mixed_precision import Sensitivity
from qexp.quant.sensitivity import fisher, hutchinson_trace, loss_increase, perturbation
from qexp.quant.trace import Layer, trace

CANDIDATES = (2, 3, 4)


def network() -> nn.Module:
    """conv0 and head are the outer layers; the inner three differ in size and place."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 8, 3, padding=1, stride=2),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.ReLU(),
        nn.Conv2d(8, 12, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 5),
    )


def data(n: int = 24) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 3, 8, 8, generator=generator), torch.arange(n) % 5


def assign(model: nn.Module, **own: Any) -> tuple[Sensitivity, dict[str, Bits], list[Layer]]:
    layers = trace(model, (3, 8, 8))
    policy = Sensitivity(**{"budget": 3, "probes": 4, "images": 16, **own})
    images, labels = data()
    bits = policy.assign(layers, model=model, weight_factory=LSQ, images=images, labels=labels)
    return policy, bits, layers


# ---------------------------------------------------------------------------------------------
# Metrics


@pytest.mark.parametrize("metric", ["hutchinson", "fisher", "loss"])
def test_a_sensitivity_that_is_no_number_is_refused_not_called_small(metric: str) -> None:
    model = network()
    with torch.no_grad():
        model[3].weight[0, 0, 0, 0] = float("nan")  # type: ignore[index]
    with pytest.raises(RunError, match="run: the sensitivity of layer '3' is not finite"):
        assign(model, metric=metric)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"probes": 0}, "probes and images must be at least 1; got 0 and 512"),
        ({"images": 0}, "probes and images must be at least 1; got 50 and 0"),
        ({"candidates": ()}, r"candidates must be widths from 1 to 16; got \[\]"),
        ({"candidates": (2, 32)}, r"candidates must be widths from 1 to 16; got \[2, 32\]"),
        ({"metric": "hessian"}, "metric must be hutchinson, fisher, loss or size; got 'hessian'"),
        ({"budget_kind": "kb"}, "budget_kind must be average_bits, bytes or bops; got 'kb'"),
    ],
)
def test_a_policy_without_sense_is_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sensitivity(budget=3, **wrong)


def test_a_table_of_bits_is_not_written_over_a_folder(tmp_path: Path) -> None:
    layers = trace(network(), (3, 8, 8))
    with pytest.raises(ValueError, match=r"save=.* is a folder; give the name of a file"):
        Sensitivity(3, metric="size", save=str(tmp_path)).check(layers, LSQ)


def softmax_model() -> tuple[nn.Module, list[Layer], Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3))
    return model, trace(model, (4,)), torch.randn(40, 4), torch.arange(40) % 3


@pytest.mark.parametrize("chunk", [40, 7])
def test_hutchinson_approaches_the_exact_trace_of_a_softmax_regression(chunk: int) -> None:
    model, layers, x, y = softmax_model()
    # H = mean over images of (diag(p) - p p') kron x x', so tr H = mean (1 - |p|^2) |x|^2.
    p = model(x).softmax(1)
    exact = ((1 - p.square().sum(1)) * x.square().sum(1)).mean().item() / 12
    got = hutchinson_trace(model, layers, x, y, probes=2000, chunk=chunk)["0"]
    assert got == pytest.approx(exact, rel=0.05)


def test_hutchinson_with_one_probe_is_the_quadratic_form_of_the_hessian() -> None:
    model, layers, x, y = softmax_model()
    weight: Tensor = model[0].weight.detach()  # type: ignore[index]
    bias: Tensor = model[0].bias  # type: ignore[index]
    hessian: Tensor = torch.autograd.functional.hessian(
        lambda w: F.cross_entropy(F.linear(x, w, bias), y), weight
    )  # type: ignore[assignment]
    v = torch.randint(0, 2, weight.shape, generator=torch.Generator().manual_seed(3)) * 2.0 - 1
    exact = torch.einsum("ij,ijkl,kl->", v, hessian, v).item() / 12
    got = hutchinson_trace(model, layers, x, y, probes=1, seed=3)["0"]
    assert got == pytest.approx(exact, rel=1e-4)


def test_hutchinson_repeats_for_a_seed_and_leaves_the_network_as_it_was() -> None:
    model = network().train()
    model[3].weight.requires_grad_(False)  # type: ignore[index,union-attr]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    layers = trace(model, (3, 8, 8))
    x, y = data()
    first, again, other = (
        hutchinson_trace(model, layers, x, y, probes=2, chunk=7, seed=s) for s in (0, 0, 1)
    )
    assert first == again != other
    assert model.training
    assert not model[3].weight.requires_grad  # type: ignore[index,union-attr]
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


class Attention(nn.Module):
    """Tokens of an image, one head."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.qkv = nn.Conv2d(3, 4, 4, stride=4), nn.Linear(4, 12)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.patch(x).flatten(2).transpose(1, 2)).chunk(3, 2)
        return self.head(F.scaled_dot_product_attention(q, k, v).mean(1))


def test_hutchinson_measures_attention_and_leaves_it_its_kernels() -> None:
    torch.manual_seed(0)
    model = Attention()
    policy, _, layers = assign(model, metric="hutchinson")
    assert policy.omega["qkv"][2] > 0
    policy.check_metric(layers, model, torch.randn(1, 3, 8, 8))
    q = torch.randn(1, 1, 4, 4, requires_grad=True)
    name = F.scaled_dot_product_attention(q, q, q).grad_fn.name()  # type: ignore[union-attr]
    assert "Flash" in name


def test_an_operation_without_second_derivative_is_named_before_any_data() -> None:
    model = nn.Sequential(*network(), nn.Hardsigmoid())
    layers = trace(model, (3, 8, 8))
    image = torch.randn(1, 3, 8, 8)
    message = r"second derivatives .*hardsigmoid.*; use bitwidth\.metric=fisher"
    with pytest.raises(ValueError, match=message):
        Sensitivity(budget=3).check_metric(layers, model, image)
    with pytest.raises(ValueError, match=message):
        assign(model)
    for fine in ({"metric": "fisher"}, {"allocation": "uniform"}):
        Sensitivity(budget=3, **fine).check_metric(layers, model, image)  # type: ignore[arg-type]


def test_a_network_without_inner_layers_has_no_bits_to_choose() -> None:
    layers = trace(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)), (4,))
    with pytest.raises(ValueError, match="no layer lies between the first and the last"):
        Sensitivity(budget=3, metric="size").check(layers, LSQ)
    Sensitivity(budget=3, metric="size", first_last="same").check(layers, LSQ)


def test_hutchinson_traces_each_layers_own_block_of_the_hessian() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
    layers = trace(model, (3,))
    x, y = torch.randn(20, 3), torch.arange(20) % 3
    got = hutchinson_trace(model, layers, x, y, probes=1500)
    for layer in layers:
        params = dict(model.named_parameters())

        def loss(w: Tensor, name: str = f"{layer.name}.weight", params: Any = params) -> Tensor:
            return F.cross_entropy(torch.func.functional_call(model, {**params, name: w}, x), y)

        weight = params[f"{layer.name}.weight"].detach()
        hessian: Tensor = torch.autograd.functional.hessian(loss, weight)  # type: ignore[assignment]
        exact = torch.einsum("ijij->", hessian).item() / layer.weights
        assert got[layer.name] == pytest.approx(exact, rel=0.1, abs=1e-3)


def test_probes_are_shared_out_over_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    real = torch.randint
    monkeypatch.setattr(torch, "randint", lambda *a, **k: (drawn.append(a), real(*a, **k))[1])
    model, layers, x, y = softmax_model()
    hutchinson_trace(model, layers, x[:20], y[:20], probes=5, chunk=16)
    assert len(drawn) == 2 * 3  # two chunks, three probes each


@pytest.mark.parametrize(("trace_of", "counts"), [(2.0, 2.0), (-1.0, 0.0)])
def test_hutchinson_multiplies_the_squared_perturbation_by_a_trace_above_zero(
    monkeypatch: pytest.MonkeyPatch, trace_of: float, counts: float
) -> None:
    model, layers, x, y = softmax_model()
    monkeypatch.setattr(sensitivity, "hutchinson_trace", lambda *a, **k: {"0": trace_of})
    got = sensitivity.hutchinson(model, layers, LSQ, CANDIDATES, x, y)["0"]
    for bits in CANDIDATES:
        dw = perturbation(model, layers[0], LSQ, bits)
        assert got[bits] == pytest.approx(counts * dw.square().sum().item())


def test_a_perturbation_is_what_the_quantizer_adds_to_the_weight() -> None:
    model, layers, _, _ = softmax_model()
    weight: Tensor = model[0].weight.detach()  # type: ignore[index]
    q = LSQ(3, shape=weight.shape)
    q.calibrate(weight)
    assert torch.equal(weight + perturbation(model, layers[0], LSQ, 3), q(weight))


def test_without_data_every_bit_divides_the_harm_by_four() -> None:
    policy, *_ = assign(network(), metric="size")
    assert policy.omega["3"] == {2: 1 / 16, 3: 1 / 64, 4: 1 / 256}
    assert policy.omega["3"] == policy.omega["7"]
    assert policy.sensitivity_by_layer == dict.fromkeys(("3", "5", "7"), 1 / 16)


def test_fisher_is_the_mean_squared_gradient_times_the_squared_perturbation() -> None:
    model, layers, x, y = softmax_model()
    # dL/dW of one image: (p - onehot) x'.
    g = (model(x).softmax(1) - F.one_hot(y, 3))[:, :, None] * x[:, None, :]
    for bits in CANDIDATES:
        dw = perturbation(model, layers[0], LSQ, bits)
        exact = (g.square().mean(0) * dw.square()).sum().item()
        got = fisher(model, layers, LSQ, CANDIDATES, x, y)["0"][bits]
        assert got == pytest.approx(exact, rel=1e-4)


def test_loss_increase_is_the_difference_it_says_and_restores_the_weights() -> None:
    model = network().eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    layers = trace(model, (3, 8, 8))
    x, y = data()
    got = loss_increase(model, layers, LSQ, (2,), x, y)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with torch.no_grad():
        base = F.cross_entropy(model(x), y)
        model[3].weight.add_(perturbation(model, layers[1], LSQ, 2))  # type: ignore[index]
        moved = F.cross_entropy(model(x), y)
    assert got["3"][2] == pytest.approx((moved - base).item(), abs=1e-6)


def test_a_loss_is_the_mean_over_all_chunks_of_images() -> None:
    model, layers, _, _ = softmax_model()
    x, y = torch.randn(600, 4), torch.arange(600) % 3
    got = loss_increase(model, layers, LSQ, (2,), x, y)["0"][2]
    with torch.no_grad():
        base = F.cross_entropy(model(x), y)
        model[0].weight.add_(perturbation(model, layers[0], LSQ, 2))  # type: ignore[index]
        assert got == pytest.approx((F.cross_entropy(model(x), y) - base).item(), rel=1e-3)


@pytest.mark.parametrize("metric", ["hutchinson", "fisher", "loss", "size"])
def test_every_metric_gives_a_number_for_each_inner_layer_and_candidate(metric: str) -> None:
    policy, bits, layers = assign(network(), metric=metric)
    assert set(policy.omega) == {"3", "5", "7"}
    assert all(set(row) == set(CANDIDATES) for row in policy.omega.values())
    assert set(bits) == {layer.name for layer in layers}
    assert set(policy.sensitivity_by_layer) == set(policy.omega)
    if metric in ("fisher", "size"):  # a sum of squares falls with every bit
        assert all(row[2] > row[3] > row[4] for row in policy.omega.values())


def test_metric_that_needs_data_says_so() -> None:
    layers = trace(network(), (3, 8, 8))
    with pytest.raises(ValueError, match="needs the float model"):
        Sensitivity(3).assign(layers)
    assert not Sensitivity(3, metric="size").needs_data
    assert not Sensitivity(3, allocation="random").needs_data


# ---------------------------------------------------------------------------------------------
# Allocation

PROBLEMS = st.lists(
    st.tuples(
        st.integers(1, 60),  # weights
        st.lists(st.floats(0, 1e3), min_size=3, max_size=3),  # Omega at 2, 3, 4 bits
    ),
    min_size=1,
    max_size=6,
)


def as_tables(problem: Any) -> tuple[dict[str, dict[int, int]], dict[str, dict[int, float]]]:
    cost = {f"l{i}": {b: n * b for b in CANDIDATES} for i, (n, _) in enumerate(problem)}
    omega = {f"l{i}": dict(zip(CANDIDATES, w, strict=True)) for i, (_, w) in enumerate(problem)}
    return cost, omega


def total(table: Any, bits: dict[str, int]) -> float:
    return sum(table[n][b] for n, b in bits.items())


@settings(deadline=None, max_examples=30)
@given(PROBLEMS, st.floats(2, 4))
def test_ilp_is_optimal_and_no_method_beats_it_or_its_budget(problem: Any, average: float) -> None:
    cost, omega = as_tables(problem)
    budget = average * sum(n for n, _ in problem)
    bits = {m: allocate(cost, budget, omega=omega, method=m) for m in ("ilp", "greedy", "random")}
    bits["uniform"] = allocate(cost, budget, method="uniform")
    feasible = (
        dict(zip(cost, choice, strict=True))
        for choice in itertools.product(CANDIDATES, repeat=len(cost))
    )
    best = min(total(omega, b) for b in feasible if total(cost, b) <= budget)
    assert total(omega, bits["ilp"]) == pytest.approx(best, rel=1e-6, abs=1e-6)
    for chosen in bits.values():
        assert total(cost, chosen) <= budget
        assert total(omega, bits["ilp"]) <= total(omega, chosen) + 1e-6


@settings(deadline=None, max_examples=30)
@given(PROBLEMS, st.integers(0, 9))
def test_random_spends_the_budget_until_nothing_fits(problem: Any, seed: int) -> None:
    cost, _ = as_tables(problem)
    budget = 3 * sum(n for n, _ in problem)
    bits = allocate(cost, budget, method="random", seed=seed)
    left = budget - total(cost, bits)
    assert all(b == 4 or cost[n][b + 1] - cost[n][b] > left for n, b in bits.items())


def test_random_depends_on_its_seed_alone() -> None:
    cost = {f"l{i}": {b: 10 * b for b in CANDIDATES} for i in range(12)}
    draws = [allocate(cost, 360, method="random", seed=s) for s in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]


def test_ilp_beats_random_at_equal_budget_on_the_objective() -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = (10 ** (2 + 2 * torch.rand(20, generator=generator))).int().tolist()
    scale = (10 ** (-3 * torch.rand(20, generator=generator))).tolist()
    problem = [(n, [s * 4.0**-b for b in CANDIDATES]) for n, s in zip(sizes, scale, strict=True)]
    cost, omega = as_tables(problem)
    budget = 3 * sum(sizes)
    best = total(omega, allocate(cost, budget, omega=omega))
    for seed in range(5):
        assert best < 0.9 * total(omega, allocate(cost, budget, method="random", seed=seed))
    assert best < total(omega, allocate(cost, budget, method="uniform"))


def test_a_solver_that_slips_over_the_budget_is_asked_for_less(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    solve, calls = scipy.optimize.milp, []

    def slips(*given: Any, **more: Any) -> Any:
        calls.append(given)
        if len(calls) == 1:
            return SimpleNamespace(x=np.array([0, 0, 1] * 2), message="")  # 4 bits everywhere
        return solve(*given, **more)

    monkeypatch.setattr(scipy.optimize, "milp", slips)
    cost = {n: {b: 10 * b for b in CANDIDATES} for n in "ab"}
    omega = {n: {b: 4.0**-b for b in CANDIDATES} for n in "ab"}
    assert total(cost, allocate(cost, 60, omega=omega)) <= 60
    assert len(calls) == 2


def test_what_cannot_be_allocated_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    cost, omega = {"a": {2: 20, 3: 30}}, {"a": {2: 1.0, 3: 0.5}}
    method: Any = "best"
    with pytest.raises(ValueError, match="allocation must be ilp, greedy, random or uniform; got"):
        allocate(cost, 30, omega=omega, method=method)
    none = SimpleNamespace(x=None, message="out of time")
    monkeypatch.setattr(scipy.optimize, "milp", lambda *given, **more: none)
    with pytest.raises(RuntimeError, match="the integer programme was not solved: out of time"):
        allocate(cost, 30, omega=omega)


def test_greedy_takes_the_most_harm_removed_a_unit_that_still_fits() -> None:
    cost = {"small": {2: 2, 3: 3}, "large": {2: 20, 3: 30}}
    omega = {"small": {2: 1.0, 3: 0.0}, "large": {2: 5.0, 3: 0.0}}
    for budget, bits in ((22, (2, 2)), (23, (3, 2)), (32, (3, 2)), (33, (3, 3))):
        got = allocate(cost, budget, omega=omega, method="greedy")
        assert (got["small"], got["large"]) == bits


def test_uniform_takes_the_most_bits_that_all_can_have() -> None:
    cost = {"a": {2: 20, 3: 30, 4: 40}, "b": {2: 2, 3: 3, 4: 4}}
    for budget, bits in ((22, 2), (32.9, 2), (33, 3), (43, 3), (44, 4), (99, 4)):
        assert allocate(cost, budget, method="uniform") == {"a": bits, "b": bits}


@pytest.mark.parametrize("method", ["ilp", "greedy"])
def test_a_group_costs_and_harms_as_all_its_layers(method: Any) -> None:
    cost = {n: {2: 2, 3: 3} for n in "ab"} | {"c": {2: 4, 3: 6}}
    omega = {"a": {2: 1.0, 3: 0.0}, "b": {2: 9.0, 3: 0.0}, "c": {2: 6.0, 3: 0.0}}
    groups = [("a", "b"), ("c",)]
    for budget, bits in ((9, (2, 2, 2)), (10, (3, 3, 2)), (12, (3, 3, 3))):
        got = allocate(cost, budget, omega=omega, groups=groups, method=method)
        assert tuple(got.values()) == bits


def test_what_a_layer_takes_of_each_budget() -> None:
    odd = Layer("odd", "conv", (3, 1, 1, 1), (1, 1, 1), 7, (1, 1, 1), False, "inner")
    assert operand_cost(odd, 3, 5, "average_bits") == 3 * odd.weights
    assert operand_cost(odd, 3, 5, "bytes") == -(-3 * odd.weights // 8)
    assert operand_cost(odd, 3, 5, "bops") == odd.macs * 15


def test_ilp_resolves_tiny_sensitivities_beside_large_ones() -> None:
    cost = {n: {2: 2, 3: 3} for n in "abc"}
    omega = {"a": {2: 1.0, 3: 0.0}, "b": {2: 2e-8, 3: 0.0}, "c": {2: 1e-8, 3: 0.0}}
    assert allocate(cost, 8, omega=omega) == {"a": 3, "b": 3, "c": 2}


@settings(deadline=None, max_examples=30)
@given(PROBLEMS)
def test_layers_of_a_group_agree(problem: Any) -> None:
    assume(len(problem) >= 2)
    cost, omega = as_tables(problem)
    names = list(cost)
    groups = [(names[0], names[-1]), *((n,) for n in names[1:-1])]
    for method in ("ilp", "greedy", "random"):
        budget = 3 * sum(n for n, _ in problem)
        bits = allocate(cost, budget, omega=omega, groups=groups, method=method)  # type: ignore[arg-type]
        assert bits[names[0]] == bits[names[-1]]
        assert set(bits) == set(cost)


def test_budget_below_the_fewest_bits_is_an_error() -> None:
    with pytest.raises(ValueError, match="more than the budget"):
        allocate({"a": {2: 20, 3: 30}}, 19, omega={"a": {2: 1.0, 3: 0.5}})


def layer(name: str) -> Layer:
    return Layer(name, "conv", (2, 2, 1, 1), (2, 1, 1), 4, (2, 1, 1), False, "inner")


def test_a_budget_is_the_decimal_that_was_given() -> None:
    """2.3 * 100 is a float below 230."""
    shapes = {"first": 40, "a": 70, "b": 30, "last": 40}
    layers = [
        Layer(name, "conv", (n, 1, 1, 1), (1, 1, 1), 4, (n, 1, 1), False, place)
        for (name, n), place in zip(
            shapes.items(), ("first", "inner", "inner", "last"), strict=True
        )
    ]
    bits = Sensitivity(2.3, metric="size", candidates=(2, 3)).assign(layers)
    assert (bits["a"].weight, bits["b"].weight) == (2, 3)  # 2.3 bits a weight


@pytest.mark.parametrize(
    ("names", "groups"),
    [
        (
            ["layer2.0.conv1", "layer2.0.conv2", "layer2.0.downsample.0", "layer2.1.conv1"],
            {("layer2.0.conv1", "layer2.0.downsample.0"), ("layer2.0.conv2",), ("layer2.1.conv1",)},
        ),
        (
            ["stage2.0.conv1", "stage2.0.shortcut", "stage2.0.conv2"],
            {("stage2.0.conv1", "stage2.0.shortcut"), ("stage2.0.conv2",)},
        ),
        (
            ["b.block1-0.proj.0", "b.block1-0.f.a.0", "b.block1-0.f.b.0"],
            {("b.block1-0.f.a.0", "b.block1-0.proj.0"), ("b.block1-0.f.b.0",)},
        ),
        (["downsample.0", "attn.proj"], {("downsample.0",), ("attn.proj",)}),
    ],
)
def test_shortcut_is_tied_to_the_first_convolution_of_its_block(names: Any, groups: Any) -> None:
    assert set(tied([layer(n) for n in names])) == groups


# ---------------------------------------------------------------------------------------------
# The policy


def test_average_bits_budget_holds_in_the_accounting() -> None:
    for allocation in ("ilp", "greedy", "random", "uniform"):
        model = network()
        _, bits, layers = assign(model, budget=2.6, allocation=allocation)
        quantize_(model, layers, bits, LSQ, LSQ)
        assert account(model, layers).weight_by_param <= 2.6


@pytest.mark.parametrize("metric", ["fisher", "size"])
def test_the_policy_is_the_least_harm_within_its_budget(metric: str) -> None:
    policy, bits, layers = assign(network(), budget=2.7, metric=metric)
    inner = [x for x in layers if x.position == "inner"]
    cost = {x.name: {b: x.weights * b for b in CANDIDATES} for x in inner}
    choices = (
        dict(zip(cost, choice, strict=True)) for choice in itertools.product(CANDIDATES, repeat=3)
    )
    budget = 2.7 * sum(x.weights for x in inner)
    best = min(total(policy.omega, c) for c in choices if total(cost, c) <= budget)
    assert total(policy.omega, {n: bits[n].weight for n in cost}) == pytest.approx(best)


def test_the_policy_looks_at_its_images_with_its_probes_and_its_seed() -> None:
    model = network().eval()
    layers = trace(model, (3, 8, 8))[1:-1]
    x, y = data()
    for seed, probes, images in ((0, 1, 16), (3, 4, 16), (0, 1, 99)):
        own = {"metric": "hutchinson", "seed": seed, "probes": probes, "images": images}
        policy, *_ = assign(network(), **own)
        given = (LSQ, CANDIDATES, x[:images], y[:images])
        expected = sensitivity.hutchinson(model, layers, *given, probes=probes, seed=seed)
        assert policy.omega == expected


def test_a_random_policy_depends_on_its_seed() -> None:
    draws = {
        tuple(assign(network(), budget=2.6, allocation="random", seed=s)[1].values())
        for s in range(6)
    }
    assert len(draws) > 1


def test_a_policy_ties_shortcuts_if_asked() -> None:
    layers = trace(ResNet(depth=8, num_classes=4, width=0.25, shortcut="projection"), (3, 8, 8))
    names = ("layer2.0.conv1", "layer2.0.shortcut.0")
    agree = []
    for tie in (True, False):
        own: Any = {"metric": "size", "allocation": "random", "tie": tie}
        drawn = [Sensitivity(2.6, seed=s, **own).assign(layers) for s in range(8)]
        agree.append(all(len({bits[n] for n in names}) == 1 for bits in drawn))
    assert agree == [True, False]


def test_activations_follow_the_weights_or_stay_at_a_width() -> None:
    for act in ("same", 5):
        _, bits, _ = assign(network(), metric="size", act=act)
        inner = [bits[n] for n in ("3", "5", "7")]
        assert [b.act for b in inner] == [b.weight if act == "same" else act for b in inner]


def test_bops_budget_is_of_the_whole_network() -> None:
    model = network()
    layers = trace(model, (3, 8, 8))
    outer = sum(x.macs * 64 for x in layers if x.position != "inner")
    inner = sum(x.macs for x in layers if x.position == "inner")
    for act, least in (("same", 4), (3, 6)):
        model = network()
        budget = outer + 1.5 * least * inner
        _, bits, _ = assign(model, budget=budget, budget_kind="bops", metric="size", act=act)
        quantize_(model, layers, bits, LSQ, LSQ)
        assert account(model, layers).bops <= budget
        assert max(bits[n].weight for n in ("3", "5", "7")) > 2


def test_bytes_budget_counts_float_outer_layers_at_four_bytes_a_weight() -> None:
    model = network()
    layers = trace(model, (3, 8, 8))
    outer = sum(4 * x.weights for x in layers if x.position != "inner")
    least = sum(-(-x.weights * 2 // 8) for x in layers if x.position == "inner")
    own: Any = {"budget_kind": "bytes", "first_last": "fp32", "metric": "size"}
    _, bits, _ = assign(model, budget=outer + least, **own)
    assert {bits[n] for n in ("3", "5", "7")} == {Bits(2, 2)}
    said = (
        f"the fewest bits cost {outer + least} bytes of codes.* the budget of {outer + least - 1};"
    )
    with pytest.raises(ValueError, match=said):
        assign(model, budget=outer + least - 1, **own)


def test_saved_bits_load_through_a_pattern_file(tmp_path: Path) -> None:
    path = tmp_path / "bits.yaml"
    model = network()
    _, bits, layers = assign(model, budget=2.6, metric="size", act=4, save=str(path))
    assert {b.weight for b in bits.values()} > {8}
    assert Pattern(8, 8, file=str(path)).assign(layers) == bits


def test_first_last_same_allocates_all_layers() -> None:
    policy, bits, layers = assign(network(), first_last="same", metric="size")
    assert set(policy.omega) == {x.name for x in layers}
    assert all(b.weight in CANDIDATES for b in bits.values())
