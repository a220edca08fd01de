"""Reconstruction of units: what it learns, that it helps, that it repeats."""

from __future__ import annotations

import copy
import errno
import math
import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qexp.errors import RunError
from qexp.models.resnet import ResNet
from qexp.quant import reconstruct as reconstruct_module
from qexp.quant.adaround import AdaRound
from qexp.quant.aquant import AQuant
from qexp.quant.bias import channel_mean, correct_bias_
from qexp.quant.blocks import Unit, find_units
from qexp.quant.cache import Store, record
from qexp.quant.convert import Bits, calibrate_, float_operands, quant_layers, quantize_
from qexp.quant.drop import dropping, last_byte, mix
from qexp.quant.fisher import output_weights
from qexp.quant.fold import fold_bn_
from qexp.quant.learn import beta_at, channels_of, output_error
from qexp.quant.nearest import Nearest
from qexp.quant.plan import Method, Schedule, passes
from qexp.quant.reconstruct import Data, reconstruct_unit
from qexp.quant.trace import Layer, trace

FAST = Schedule(
    iterations=80,
    step_iterations=30,
    minibatch=16,
    penalty=0.1,
    lr={"rounding": 0.1, "scale": 1e-3, "border": 1e-2, "mixing": 1e-2},
)
ADAROUND = Method("layer", quantized_inputs=False, steps="fixed", borders="fixed", drop=0, mix=0)
BRECQ = Method("block", quantized_inputs=False, steps="after", borders="after", drop=0, mix=0)
QDROP = Method("block")


class Case:
    """A folded ResNet-8 of width 4 with 2-bit weights and 3-bit inputs, and 8x8 images."""

    def __init__(self, act: Any = Nearest) -> None:
        torch.manual_seed(0)
        model = ResNet(depth=8, num_classes=4, width=0.25).eval()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.8, 1.2)
                nn.init.normal_(module.bias, 0, 0.2)
        fold_bn_(model)
        self.reference = copy.deepcopy(model)
        self.layers: list[Layer] = trace(model, (3, 8, 8))
        quantize_(model, self.layers, dict.fromkeys(self.names, Bits(2, 3)), AdaRound, act)
        self.model = model
        self.data = Data(torch.randn(48, 3, 8, 8), torch.randn(32, 3, 8, 8))
        with float_operands(model):
            calibrate_(model, self.data.images)

    @property
    def names(self) -> list[str]:
        return [layer.name for layer in self.layers]

    def run(self, unit: str, method: Method, schedule: Schedule = FAST, **more: Any) -> dict:
        granularity = "layer" if method.granularity == "none" else method.granularity
        units = {u.name: u for u in find_units(self.reference, self.names, granularity)}
        store = more.pop("store", Store(torch.device("cpu"), math.inf, None))
        sweep = passes(method, schedule)[more.pop("sweep", 0)]
        return reconstruct_unit(
            self.model, self.reference, units[unit], self.data, sweep, method, schedule, store,
            batch_size=32, **more,
        )  # fmt: skip

    def state(self) -> dict[str, Tensor]:
        return {k: v.clone() for k, v in self.model.state_dict().items()}


@pytest.mark.parametrize(
    ("method", "unit"),
    [(ADAROUND, "layer1.0.conv1"), (BRECQ, "layer1.0"), (QDROP, "layer1.0"), (QDROP, "layer2.0")],
    ids=["adaround", "brecq", "qdrop", "qdrop-shortcut"],
)
def test_a_unit_gets_closer_to_float_than_nearest_on_held_out_images(
    method: Method, unit: str
) -> None:
    case = Case()
    before = case.state()
    row = case.run(unit, method)
    assert row["error"] < row["error_before"]
    changed = {k for k, v in case.state().items() if not torch.equal(v, before[k])}
    assert changed
    assert all(k.startswith(unit) and k.endswith((".rounding", ".scale")) for k in changed)
    assert any(k.endswith("act_quantizer.scale") for k in changed) == method.quantized_inputs


def test_rounding_variables_converge_to_decisions() -> None:
    shares = []
    for penalty in (0.0, 0.1):
        long = replace(FAST, iterations=250, penalty=penalty)
        shares.append(Case().run("layer1.0.conv1", ADAROUND, long)["converged"])
    assert shares[0] < 0.7
    assert shares[1] > 0.95


@pytest.mark.parametrize("own", [{"per": "row"}, {"per": "channel"}, {"fusion": "residual"}])
def test_borders_are_learned_with_the_rounding(own: dict[str, Any]) -> None:
    case = Case(partial(AQuant, **own))
    before = case.state()
    row = case.run("layer1.0", QDROP)
    assert row["error"] < row["error_before"]
    moved = [k for k, v in case.state().items() if not torch.equal(v, before[k])]
    assert sum(k.endswith(".border") for k in moved) == 2


def test_the_second_pass_learns_steps_alone() -> None:
    case = Case()
    case.run("layer1.0", BRECQ)
    before = case.state()
    row = case.run("layer1.0", BRECQ, sweep=1)
    moved = [k for k, v in case.state().items() if not torch.equal(v, before[k])]
    assert sorted(moved) == [f"layer1.0.conv{i}.act_quantizer.scale" for i in (1, 2)]
    assert row["pass"] == "steps"


def test_a_last_pass_learns_all_layers_from_the_networks_output() -> None:
    method = replace(QDROP, network=True)
    case = Case(partial(AQuant, per="channel"))
    case.run("layer1.0", method)
    before = case.state()
    unit = Unit("", tuple(case.names))
    sweep = passes(method, replace(FAST, step_iterations=100, minibatch=48))[1]
    store = Store(torch.device("cpu"), math.inf, None)
    row = reconstruct_unit(
        case.model, case.reference, unit, case.data, sweep, method, FAST, store, batch_size=32
    )
    assert (row["unit"], row["pass"], row["iterations"]) == ("network", "network", 100)
    assert row["error"] < 0.9 * row["error_before"]
    moved = {k for k, v in case.state().items() if not torch.equal(v, before[k])}
    own = {f"{name}.act_quantizer.{p}" for name in case.names for p in ("scale", "border")}
    assert moved == own
    with torch.no_grad():
        y, target = case.model(case.data.held_out), case.reference(case.data.held_out)
    error = float((y - target).square().sum() / target.square().sum())
    assert row["error"] == pytest.approx(error, rel=1e-4)


def test_weights_that_are_not_learned_are_quantized_once_to_the_same_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ends = []
    for context in (None, lambda model: nullcontext()):
        case = Case()
        case.run("layer1.0", BRECQ)
        if context:
            monkeypatch.setattr(reconstruct_module, "frozen_weights", context)
        case.run("layer1.0", BRECQ, sweep=1)
        ends.append(case.state())
    assert all(torch.equal(ends[0][k], ends[1][k]) for k in ends[0])


@pytest.mark.parametrize("step_inputs", ["prefix", "float"])
def test_the_second_pass_learns_from_the_inputs_it_is_told(step_inputs: Any) -> None:
    steps = []
    for stretched in (1.0, 2.0):
        case = Case()
        with torch.no_grad():  # the prefix alone
            case.model.get_parameter("conv1.act_quantizer.scale").mul_(stretched)
        case.run("layer1.0", replace(BRECQ, step_inputs=step_inputs), sweep=1)
        steps.append(case.state()["layer1.0.conv1.act_quantizer.scale"])
    assert torch.equal(*steps) == (step_inputs == "float")


def test_equal_seeds_give_equal_bits_and_other_seeds_do_not() -> None:
    states = []
    for seed in (3, 3, 4):
        case = Case()
        case.run("layer1.0", QDROP, seed=seed)
        states.append(case.state()["layer1.0.conv1.weight_quantizer.rounding"])
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


def test_a_cache_on_disk_changes_nothing_and_leaves_no_file(tmp_path: Path) -> None:
    results = []
    for store in (
        Store(torch.device("cpu"), math.inf, None),
        Store(torch.device("cpu"), 200_000, tmp_path),
    ):
        case = Case()
        row = case.run("layer1.0", QDROP, store=store)
        results.append((case.state()["layer1.0.conv2.weight_quantizer.rounding"], row))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1]["spilled_bytes"] == 0
    assert results[1][1]["spilled_bytes"] > 0
    assert not list(tmp_path.iterdir())


def test_an_array_on_disk_has_its_blocks_before_it_is_mapped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []
    real = torch.from_file

    def spy(path: str, **more: Any) -> Tensor:
        taken.append(512 * Path(path).stat().st_blocks)
        return real(path, **more)

    monkeypatch.setattr(torch, "from_file", spy)
    array = Store(torch.device("cpu"), 0, tmp_path).array((100, 1000))
    assert taken[0] >= array.nbytes == 400_000  # a sparse file has none
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("code", [None, errno.ENOSPC, errno.EDQUOT])
def test_a_disk_without_room_for_an_array_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int | None
) -> None:
    def full(*given: int) -> None:
        raise OSError(code, "full")

    size = 2**50  # more than any disk has
    if code is not None:
        monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
        size = 1000
    line = r"no space left for [\d.]+ GB of a unit's inputs and outputs. Free some"
    with pytest.raises(RunError, match=line):
        Store(torch.device("cpu"), 0, tmp_path).array((size,))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("code", [None, errno.EOPNOTSUPP])
def test_an_array_goes_to_a_disk_that_cannot_reserve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int | None
) -> None:
    def refuse(*given: int) -> None:
        raise OSError(code, "not supported")

    if code is None:
        monkeypatch.delattr(os, "posix_fallocate")
    else:
        monkeypatch.setattr(os, "posix_fallocate", refuse)
    array = Store(torch.device("cpu"), 0, tmp_path).array((1000,))
    assert float(array.fill_(2).sum()) == 2000


def test_a_unit_with_nothing_to_learn_is_left_alone() -> None:
    case = Case()
    for layer in quant_layers(case.model).values():
        layer.weight_quantizer = Nearest(8, shape=tuple(layer.weight.shape))
    assert case.run("conv1", BRECQ) == {}


def test_reconstruction_leaves_gradient_flags_and_modes_as_they_were() -> None:
    case = Case()
    frozen = case.model.get_parameter("conv1.weight").requires_grad_(False)
    case.run("layer1.0", QDROP)
    assert not frozen.requires_grad
    assert case.model.get_parameter("linear.weight").requires_grad
    assert all(p.grad is None for p in case.model.parameters())
    rounding = [m for m in case.model.modules() if isinstance(m, AdaRound)]
    assert not any(q.soft for q in rounding)


# ---------------------------------------------------------------------------------------------
# Parts


def test_passes_of_the_published_methods() -> None:
    names = {"rounding", "scale", "border", "mixing"}
    assert passes(Method("none"), FAST) == []
    assert [(p.learned, p.inputs) for p in passes(ADAROUND, FAST)] == [({"rounding"}, False)]
    assert [(p.learned, p.inputs, p.p) for p in passes(BRECQ, FAST)] == [
        ({"rounding"}, False, 2.0),
        (names - {"rounding"}, True, 2.4),
    ]
    assert [(p.learned, p.inputs) for p in passes(QDROP, FAST)] == [(names, True)]
    fixed = Method("block", steps="fixed", borders="joint")
    assert [p.learned for p in passes(fixed, FAST)] == [names - {"scale"}]
    weights_first = Method("block", steps="joint", borders="after")
    assert [p.learned for p in passes(weights_first, FAST)] == [
        {"rounding", "scale"},
        {"border", "mixing"},
    ]
    twice = Method("block", steps="both", borders="joint")
    assert [p.learned for p in passes(twice, FAST)] == [names, {"scale"}]
    biased = Method("block", biases="both", bias_lr=0.01)
    assert [p.learned for p in passes(biased, FAST)] == [names | {"bias"}, {"bias"}]
    assert [p.lr["bias"] for p in passes(biased, FAST)] == [0.01, 0.01]
    late = Method("block", quantized_inputs=False, steps="fixed", borders="fixed", bias_lr=0.01)
    assert [p.learned for p in passes(late, FAST)] == [{"rounding", "bias"}]
    assert [p.learned for p in passes(replace(late, biases="after"), FAST)] == [
        {"rounding"},
        {"bias"},
    ]
    assert len(passes(replace(late, biases="after", bias_lr=0.0), FAST)) == 1
    whole = replace(biased, network=True)
    assert [(p.name, p.learned, p.p) for p in passes(whole, FAST)][2:] == [
        ("network", names - {"rounding"} | {"bias"}, 2.0)
    ]
    assert len(passes(replace(late, bias_lr=0.0, network=True), FAST)) == 1  # nothing to learn
    unquantized = Method("block", quantized_inputs=False, steps="both", borders="fixed")
    assert [p.learned for p in passes(unquantized, FAST)] == [{"rounding"}, {"scale"}]


def test_beta_is_silent_in_the_warm_up_then_falls_linearly() -> None:
    assert beta_at(0.19, (20, 2), 0.2) is None
    assert beta_at(0.2, (20, 2), 0.2) == pytest.approx(20)
    assert beta_at(0.6, (20, 2), 0.2) == pytest.approx(11)
    assert beta_at(1.0, (20, 2), 0.2) == pytest.approx(2)


def test_output_error_is_summed_over_channels_and_averaged_over_the_rest() -> None:
    a, b = torch.randn(2, 5, 3, 4), torch.randn(2, 5, 3, 4)
    for p in (2.0, 2.4):
        expected = (a - b).abs().pow(p).sum(1).mean()
        torch.testing.assert_close(output_error(a, b, p, 5), expected)
    w = torch.rand(2, 5, 3, 4)
    expected = ((a - b).square() * w).sum(1).mean()
    torch.testing.assert_close(output_error(a, b, 2.0, 5, w), expected)


@pytest.mark.parametrize("probability", [0.0, 0.25, 0.5, 1.0])
def test_mix_takes_the_share_it_says_and_routes_the_gradient(probability: float) -> None:
    x = torch.zeros(100, 101, requires_grad=True)
    x_hat = torch.ones(100, 101, requires_grad=True)
    y = mix(x, x_hat, probability, torch.Generator().manual_seed(0))
    assert float((y == 0).float().mean().detach()) == pytest.approx(probability, abs=0.02)
    y.sum().backward()
    for source, chosen in ((x, y == 0), (x_hat, y == 1)):
        grad = torch.zeros_like(source) if source.grad is None else source.grad
        assert torch.equal(grad, chosen.float())


def test_a_probability_is_a_number_of_256_bytes() -> None:
    assert [last_byte(p) for p in (0.0, 1 / 256, 0.25, 0.5, 1.0)] == [-1, 0, 63, 127, 255]


def test_dropping_ends_with_its_block() -> None:
    q = Nearest(2, signed=False)
    x = torch.rand(50, 50)
    q.calibrate(x)
    with dropping([q], 0.5, torch.Generator().manual_seed(0)):
        share = float((q(x) == x).float().mean())
    assert share == pytest.approx(0.5, abs=0.05)
    assert float((q(x) == x).float().mean()) < 0.05


def test_record_gives_what_the_unit_sees_and_refuses_what_does_not_run() -> None:
    case = Case()
    store = Store(torch.device("cpu"), math.inf, None)
    unit = case.reference.get_submodule("layer1.0")
    x, y = record(case.reference, unit, case.data.images, 24, store, output=True)
    assert y is not None
    with torch.no_grad():
        torch.testing.assert_close(unit(x), y)
    assert store.used == x.nbytes + y.nbytes
    with pytest.raises(ValueError, match="not part of"):
        record(case.reference, nn.Conv2d(3, 3, 1), case.data.images, 24, store, output=True)


class InPlace(nn.Module):
    """A block between convolutions that activates its input, in place or not."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.in_place = in_place
        self.first, self.last = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(x, inplace=self.in_place)
        return x + self.last(F.relu(self.first(x[:, :3])))


def test_a_unit_that_changes_its_input_in_place_learns_from_what_it_was() -> None:
    rows = []
    for in_place in (False, True):
        torch.manual_seed(0)
        reference = nn.Sequential(nn.Conv2d(3, 4, 3), InPlace(in_place), nn.Flatten()).eval()
        model = copy.deepcopy(reference)
        layers = trace(model, (3, 8, 8))
        quantize_(model, layers, {n.name: Bits(2, 3) for n in layers}, AdaRound, Nearest)
        data = Data(torch.randn(48, 3, 8, 8), torch.randn(32, 3, 8, 8))
        with float_operands(model):
            calibrate_(model, data.images)
        store = Store(torch.device("cpu"), math.inf, None)
        unit = Unit("1", ("1.first", "1.last"))
        row = reconstruct_unit(
            model, reference, unit, data, passes(QDROP, FAST)[0], QDROP, FAST, store, batch_size=32
        )
        rows.append({k: row[k] for k in ("error_before", "error")})
    assert rows[0] == rows[1]
    assert rows[0]["error"] < rows[0]["error_before"]


def test_fisher_weights_are_the_damped_gradient_of_the_logits() -> None:
    case = Case()
    unit = Unit("layer1.0", ("layer1.0.conv1", "layer1.0.conv2"))
    later = [n for n in case.names if n.startswith(("layer2", "layer3", "linear"))]
    store = Store(torch.device("cpu"), math.inf, None)
    images = case.data.images[:16]
    weights = output_weights(case.model, case.reference, unit, later, images, 16, store)
    assert weights.shape == (16, 4, 8, 8)
    assert weights.min() >= 1
    assert weights.max() > 1
    assert all(m.weight_enabled and m.act_enabled for m in quant_layers(case.model).values())
    # The rest is float: with the unit in float too, both networks agree and no element matters.
    with float_operands(case.model):
        alike = output_weights(case.model, case.reference, unit, later, images, 16, store)
    torch.testing.assert_close(alike, torch.ones_like(alike), rtol=0, atol=1e-5)
    row = case.run("layer1.0", Method("block", fisher=True), later=later)
    assert row["error"] < row["error_before"]


def test_fisher_weights_do_not_depend_on_the_batch() -> None:
    case = Case()
    unit = Unit("layer1.0", ("layer1.0.conv1", "layer1.0.conv2"))
    store = Store(torch.device("cpu"), math.inf, None)
    args = (case.model, case.reference, unit, (), case.data.images[:20])
    one, other = (output_weights(*args, size, store) for size in (20, 8))  # 8, 8 and 4
    assert one.max() > 1.001
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("activation", [F.relu, F.relu6])
def test_fisher_weights_are_of_the_activation_that_follows_also_where_it_is_0(
    activation: Callable[[Tensor], Tensor],
) -> None:
    torch.manual_seed(0)
    weight = torch.randn(4, 6)

    class Scaled(nn.Module):
        """One unit and what reads its activation; some of it lies above 6."""

        def __init__(self, scale: float) -> None:
            super().__init__()
            self.first = nn.Linear(5, 6)
            with torch.no_grad():
                self.first.weight.mul_(scale)

        def forward(self, x: Tensor) -> Tensor:
            return activation(self.first(x)) @ weight.T

    model, reference = Scaled(12.0), Scaled(11.0)
    x = torch.randn(32, 5)
    store = Store(torch.device("cpu"), math.inf, None)
    found = output_weights(model, reference, Unit("first", (), activation), (), x, 32, store)
    a = activation(model.first(x)).detach().requires_grad_()
    target = F.log_softmax(reference(x), 1).detach()
    kl = F.kl_div(F.log_softmax(a @ weight.T, 1), target, reduction="batchmean", log_target=True)
    (grad,) = torch.autograd.grad(kl, a)
    assert (grad[a == 0] != 0).any()
    torch.testing.assert_close(found, (1 + grad.abs()).square(), rtol=1e-4, atol=1e-6)


def test_fisher_weights_before_an_activation_are_so_where_it_works_in_place() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Hardswish(), nn.Linear(6, 4))
    reference = copy.deepcopy(model)
    with torch.no_grad():
        model[0].weight.mul_(30)
    x, store = torch.randn(32, 5), Store(torch.device("cpu"), math.inf, None)
    args = (model, reference, Unit("0", ("0",)), (), x, 32, store)
    apart = output_weights(*args)
    model[1].inplace = reference[1].inplace = True
    assert (apart == 1).any()  # where the activation is flat
    torch.testing.assert_close(output_weights(*args), apart, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("method", "schedule", "sweep", "keys"),
    [
        (QDROP, {"lr": {"rounding": 0.1, "scale": 1e38}}, 0, "recipe.lr.scale, recipe.lr.rounding"),
        (replace(QDROP, steps="both"), {"step_lr": 1e38}, 1, "recipe.step_lr"),
        (
            replace(QDROP, bias_lr=1e38, biases="after"), {}, 1, "quantizer.reconstruct.bias_lr"
        ),
    ],
)  # fmt: skip
def test_a_unit_that_diverges_stops_with_its_name_and_the_rates(
    method: Method, schedule: dict[str, Any], sweep: int, keys: str
) -> None:
    case = Case()
    with pytest.raises(RunError, match=r"unit .layer1.0. diverged: ") as told:
        case.run("layer1.0", method, replace(FAST, **schedule), sweep=sweep)
    named = str(told.value).partition(". Lower ")[2].removesuffix(".")
    assert set(named.split(", ")) == set(keys.split(", "))


def test_bias_correction_gives_every_layer_the_mean_of_the_float_one() -> None:
    case = Case()
    images = case.data.images
    shifts = correct_bias_(case.model, case.reference, images)
    assert set(shifts) == set(case.names)
    assert max(shifts.values()) > 0
    means: dict[str, list[Tensor]] = {n: [] for n in case.names}
    for net in (case.reference, case.model):
        handles = [
            net.get_submodule(n).register_forward_hook(
                lambda m, i, y, n=n: means[n].append(channel_mean(y, m)) and None
            )
            for n in case.names
        ]
        with torch.no_grad():
            net(images)
        for handle in handles:
            handle.remove()
    for ours, theirs in means.values():
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_the_mean_of_a_channel_is_over_positions_of_images_and_tokens() -> None:
    images, tokens = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 3)  # as many tokens as channels
    conv, linear = nn.Conv2d(3, 3, 1), nn.Linear(3, 3)
    torch.testing.assert_close(channel_mean(images, conv), images.mean((0, 2, 3)))
    torch.testing.assert_close(channel_mean(images, linear), images.mean((0, 1, 2)))
    torch.testing.assert_close(channel_mean(tokens, linear), tokens.mean((0, 1)))
    torch.testing.assert_close(channel_mean(tokens[:, 0], linear), tokens[:, 0].mean(0))


class ChannelsLast(nn.Module):
    """A convolution, and linear layers over [N, H, W, C]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.up, self.down = nn.Conv2d(3, 5, 3), nn.Linear(5, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(self.conv(x).permute(0, 2, 3, 1))).mean((1, 2))


def test_biases_of_linear_layers_over_channels_last_images_are_corrected() -> None:
    torch.manual_seed(0)
    reference = ChannelsLast()
    model = copy.deepcopy(reference)
    layers = trace(model, (3, 8, 8))
    quantize_(model, layers, {n: Bits(2, 4) for n in ("conv", "up", "down")}, Nearest, Nearest)
    images = torch.randn(16, 3, 8, 8)
    calibrate_(model, images)
    assert set(correct_bias_(model, reference, images)) == {"conv", "up", "down"}
    with torch.no_grad():
        torch.testing.assert_close(model(images).mean(0), reference(images).mean(0))


def test_the_channels_of_a_units_output_are_found_first_and_last() -> None:
    conv, linear, gate = nn.Conv2d(2, 5, 1), nn.Linear(2, 5), nn.Conv2d(2, 1, 1)
    assert channels_of(torch.empty(2, 5, 3, 4), conv) == 5
    assert channels_of(torch.empty(2, 3, 4, 5), linear) == 5
    assert channels_of(torch.empty(2, 5, 3, 4), linear) == 5  # a block that moves them back
    assert channels_of(torch.empty(2, 7, 5), linear) == channels_of(torch.empty(2, 5), linear) == 5
    assert channels_of(torch.empty(2, 5, 3, 4), gate) == 5


def test_rates_of_steps_fall_as_a_cosine_and_that_of_the_rounding_stays(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[dict[str, float]] = []
    real = torch.optim.Adam.step

    def spy(optimizer: torch.optim.Adam, *given: object) -> object:
        seen.append({group["name"]: group["lr"] for group in optimizer.param_groups})
        return real(optimizer, *given)

    monkeypatch.setattr(torch.optim.Adam, "step", spy)
    Case().run("layer1.0", QDROP)
    assert [rates["rounding"] for rates in seen] == [0.1] * 80
    cosine = [1e-3 * (1 + math.cos(math.pi * i / 80)) / 2 for i in range(80)]
    assert [rates["scale"] for rates in seen] == pytest.approx(cosine)


@pytest.mark.parametrize(("share", "sweep"), [(1.0, 0), (0.0, 0), (1.0, 1)])
def test_mixed_inputs_are_the_float_networks_with_their_probability_and_in_the_first_pass_alone(
    share: float, sweep: int
) -> None:
    found = []
    for stretched in (1.0, 2.0):
        case = Case()
        with torch.no_grad():  # the prefix alone
            case.model.get_parameter("conv1.act_quantizer.scale").mul_(stretched)
        method = replace(BRECQ if sweep else QDROP, drop=0.0, mix=share)
        case.run("layer1.0", method, sweep=sweep)
        learned = "act_quantizer.scale" if sweep else "weight_quantizer.rounding"
        found.append(case.state()[f"layer1.0.conv1.{learned}"])
    assert torch.equal(*found) == (share == 1.0 and sweep == 0)


def test_dropping_is_of_every_layer_and_of_the_first_pass_alone() -> None:
    case = Case()
    before = case.state()
    case.run("layer1.0", replace(QDROP, drop=1.0, mix=0.0))  # no step has a gradient
    moved = [k for k, v in case.state().items() if not torch.equal(v, before[k])]
    assert moved
    assert all(k.endswith(".rounding") for k in moved)
    steps = []
    for drop in (0.0, 1.0):
        case = Case()
        case.run("layer1.0", replace(BRECQ, drop=drop), sweep=1)
        steps.append(case.state()["layer1.0.conv2.act_quantizer.scale"])
    assert torch.equal(*steps)


ONE = replace(FAST, iterations=1, step_iterations=1, warmup=0.0)  # an iteration: its loss


def test_the_fisher_weights_multiply_the_error_that_is_learned_from(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    losses = []
    for factor in (1.0, 4.0):
        weights = torch.full((48, 4, 8, 8), factor)
        monkeypatch.setattr(reconstruct_module, "output_weights", lambda *given, w=weights: w)
        losses.append(Case().run("layer1.0", Method("block", fisher=True), ONE)["loss"])
    assert losses[1] == pytest.approx(4 * losses[0]) != 0


def test_the_loss_that_is_told_is_the_error_without_the_regulariser() -> None:
    told = [Case().run("layer1.0", QDROP, replace(ONE, penalty=p))["loss"] for p in (0.0, 1e3)]
    assert told[0] == told[1]


def test_the_second_pass_has_an_exponent_of_its_own() -> None:
    told = [Case().run("layer1.0", BRECQ, replace(ONE, step_p=p), sweep=1)["loss"] for p in (2, 4)]
    assert told[0] != pytest.approx(told[1], rel=0.01)


def test_the_decided_share_is_of_all_weights_of_the_unit() -> None:
    case = Case()
    row = case.run("layer1.0", QDROP)
    inside = [m for n, m in case.model.named_modules() if n.startswith("layer1.0.")]
    rounding = [m for m in inside if isinstance(m, AdaRound)]
    assert len(rounding) == 2
    undecided = sum(int(q.undecided()) for q in rounding)
    assert row["converged"] == pytest.approx(1 - undecided / (2 * 4 * 4 * 9))


def test_errors_are_of_held_out_images_behind_the_activation_that_follows() -> None:
    case, name = Case(), "layer1.0.conv1"
    store = Store(torch.device("cpu"), math.inf, None)
    target = case.reference.get_submodule(name)
    _, y = record(case.reference, target, case.data.held_out, 32, store, output=True)
    assert y is not None
    unit = case.model.get_submodule(name)
    with torch.no_grad(), float_operands(case.model, weight=False):
        x, _ = record(case.model, unit, case.data.held_out, 32, store, output=False)
        out, y = F.relu(unit(x)), F.relu(y)
    expected = float((out - y).square().sum() / y.square().sum())
    row = case.run(name, ADAROUND, replace(ONE, lr=dict.fromkeys(FAST.lr, 0.0)))
    assert row["error_before"] == pytest.approx(expected)
    assert row["error"] == pytest.approx(expected)


def test_arrays_stay_on_the_device_up_to_the_limit_and_each_unit_counts_its_own(
    tmp_path: Path,
) -> None:
    store = Store(torch.device("cpu"), 4000, tmp_path)
    for _ in range(2):
        store.array((1000,))
        assert (store.used, store.spilled) == (4000, 0)
        store.array((500,))
        assert (store.used, store.spilled) == (4000, 2000)
        store.clear()
    assert (store.used, store.spilled) == (0, 0)


def test_the_largest_shift_of_a_bias_is_told_whatever_its_sign() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    reference = copy.deepcopy(model)
    with torch.no_grad():
        reference[1].bias.add_(torch.tensor([-3.0, 1.0]))
    quantize_(model, trace(model, (3, 2, 2)), {"1": Bits(8, 8)}, Nearest, Nearest)
    images = torch.randn(32, 3, 2, 2)
    calibrate_(model, images)
    assert correct_bias_(model, reference, images)["1"] == pytest.approx(3, abs=0.1)
