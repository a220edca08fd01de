"""Bit-width policies: who gets how many bits, and what stays when they change."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from hypothesis import example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from torch import Tensor, nn

from qexp.quant.additive import APoTActivation
from qexp.quant.asq import ASQ
from qexp.quant.bitwidth import Pattern, Progressive, Uniform, _closest, format_bits, parse_bits
from qexp.quant.convert import Bits, calibrate_, check_calibrated, quant_layers, quantize_
from qexp.quant.lsq import LSQ, lsq_scale
from qexp.quant.power import APoT
from qexp.quant.quantizer import Identity
from qexp.quant.rebits import rebits_
from qexp.quant.trace import Layer, trace

CONFIGS = Path(__file__).parents[1] / "configs" / "bitwidth"


class Adapted(LSQ):
    """LSQ with a state that means the same at any width."""

    carried = ("adapter",)

    def __init__(self, bits: int, *, signed: bool = True, shape: tuple[int, ...] = ()) -> None:
        super().__init__(bits, signed=signed, shape=shape)
        self.adapter = nn.Linear(2, 2)


def network() -> nn.Module:
    """Names 0, 2, 4, 8: two inner convolutions between the first and the classifier."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 5),
    )


@pytest.fixture
def layers() -> list[Layer]:
    return trace(network(), (3, 8, 8))


@pytest.mark.parametrize(
    ("rule", "outer"), [(8, Bits(8, 8)), ("fp32", Bits(32, 32)), ("same", Bits(3, 4))]
)
def test_first_last_rule_decides_the_outer_layers_alone(
    layers: list[Layer], rule: Any, outer: Bits
) -> None:
    bits = Uniform(3, 4, first_last=rule).assign(layers)
    assert bits == {"0": outer, "2": Bits(3, 4), "4": Bits(3, 4), "8": outer}


def test_operand_in_float_everywhere_stays_float_in_the_outer_layers(layers: list[Layer]) -> None:
    assert Uniform(4, 32).assign(layers)["0"] == Bits(8, 32)


@pytest.mark.parametrize("bits", [0, 17, 33, 1.5, "four", True, None])
def test_impossible_widths_are_refused(bits: Any) -> None:
    with pytest.raises(ValueError, match="integer from 1 to 16"):
        Uniform(bits, 4)


def test_impossible_first_last_rule_is_refused() -> None:
    with pytest.raises(ValueError, match="8, fp32 or same"):
        Uniform(4, 4, first_last="float")  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------
# Pattern


def test_first_matching_pattern_wins_and_omitted_operands_keep_the_default(
    layers: list[Layer],
) -> None:
    policy = Pattern(4, 5, [{"match": "2", "weight": 2}, {"match": "*", "weight": 3, "act": 6}])
    assert policy.assign(layers) == {
        "0": Bits(8, 8),
        "2": Bits(2, 5),
        "4": Bits(3, 6),
        "8": Bits(8, 8),
    }


def test_patterns_as_a_mapping_equal_patterns_as_a_list(layers: list[Layer]) -> None:
    listed = Pattern(4, 4, [{"match": "2", "weight": 2}, {"match": "[48]", "act": 3}])
    mapped = Pattern(4, 4, {"2": {"weight": 2}, "[48]": {"act": 3}})
    assert listed.assign(layers) == mapped.assign(layers)


def test_pattern_that_matches_no_layer_is_an_error_with_the_closest_names() -> None:
    model = nn.Sequential()
    for name in ("stem", "conv_a", "conv_b", "head"):
        model.add_module(name, nn.Linear(3, 3))
    policy = Pattern(4, 4, [{"match": "cnv_a*", "weight": 2}])
    with pytest.raises(ValueError, match=r"'cnv_a\*' matches no layer; the closest: conv_a"):
        policy.assign(trace(model, (3,)))


def test_the_closest_names_are_those_that_begin_alike() -> None:
    names = ["stem", "layer3.0.conv1", "layer1.0.conv2", "layer1.0.conv1", "linear"]
    assert _closest("layr1", names, 2) == ["layer1.0.conv2", "layer1.0.conv1"]


def test_pattern_for_an_outer_layer_is_an_error_unless_the_rule_lets_it(
    layers: list[Layer],
) -> None:
    patterns = [{"match": "0", "weight": 4}]
    with pytest.raises(ValueError, match="first_last=same"):
        Pattern(4, 4, patterns).assign(layers)
    assert Pattern(4, 4, patterns, first_last="same").assign(layers)["0"] == Bits(4, 4)


def test_a_pattern_that_earlier_ones_leave_no_layer_is_an_error_but_in_a_file(
    layers: list[Layer], tmp_path: Path
) -> None:
    every, one = {"match": "*", "weight": 2}, {"match": "2", "weight": 3}
    with pytest.raises(ValueError, match=r"'2' changes nothing: '\*' before it takes '2'"):
        Pattern(4, 4, [every, one]).assign(layers)
    assert Pattern(4, 4, [one, every]).assign(layers)["2"].weight == 3
    table = tmp_path / "bits.yaml"
    table.write_text(format_bits({"2": Bits(3, 3)}))
    assert Pattern(4, 4, [every], file=str(table)).assign(layers)["2"].weight == 2


def test_misspelt_key_of_a_pattern_is_an_error() -> None:
    with pytest.raises(ValueError, match="match, weight and act"):
        Pattern(4, 4, [{"match": "*", "wieght": 3}])


@settings(deadline=None, max_examples=30)
@example({"no": Bits(4, 4), "0": Bits(2, 2)})
@given(
    st.dictionaries(
        st.from_regex(r"[a-z]{1,5}(\.[a-z0-9_]{1,4}){0,3}", fullmatch=True),
        st.builds(Bits, st.integers(1, 16) | st.just(32), st.integers(1, 16) | st.just(32)),
    )
)
def test_written_bits_read_back_equal_and_as_plain_yaml(bits: dict[str, Bits]) -> None:
    text = format_bits(bits)
    assert parse_bits(text) == bits
    plain: Any = OmegaConf.to_container(OmegaConf.create(text)) if bits else {}
    assert {n: Bits(**row) for n, row in plain.items()} == bits


@pytest.mark.parametrize("line", ["conv1: 4", "conv1: {weight: four, act: 4}", "a: {weight: 4}"])
def test_malformed_bits_file_names_the_line(line: str) -> None:
    with pytest.raises(ValueError, match="line 2"):
        parse_bits("# bits\n" + line)


def test_a_layer_that_comes_twice_in_a_file_is_refused() -> None:
    line = "a: {weight: 4, act: 4}\n"
    with pytest.raises(ValueError, match="line 2: layer 'a' comes twice"):
        parse_bits(line + line.replace("4", "8"))


def test_pattern_file_reproduces_the_assignment_it_was_written_from(
    layers: list[Layer], tmp_path: Path
) -> None:
    bits = Pattern(4, 4, {"2": {"weight": 2, "act": 3}}).assign(layers)
    path = tmp_path / "bits.yaml"
    path.write_text(format_bits(bits))
    assert Pattern(8, 8, file=str(path)).assign(layers) == bits
    assert Pattern(8, 8, {"4": {"weight": 6}}, file=str(path)).assign(layers)["4"] == Bits(6, 8)


# ---------------------------------------------------------------------------------------------
# Progressive

STAGES = [{"until": 0.25, "bits": 8}, {"until": 0.5, "bits": 4}, {"bits": 2}]


def test_stages_by_fraction_change_at_their_epochs() -> None:
    policy = Progressive(STAGES)
    assert [policy.bits_at(e, 8) for e in range(8)] == [8, 8, 4, 4, 2, 2, 2, 2]
    rounded = Progressive([{"until": 0.29, "bits": 8}, {"bits": 2}])  # 0.29 * 100 < 29 in float64
    assert [rounded.bits_at(e, 100) for e in (28, 29)] == [8, 2]


def test_stages_by_epoch_do_not_depend_on_the_length() -> None:
    policy = Progressive([{"until": 3, "bits": 8}, {"bits": 4}])
    assert [policy.bits_at(e, 5) for e in range(5)] == [8, 8, 8, 4, 4]
    assert policy.bits_at(3, 500) == 4


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 60))
def test_bits_never_rise_and_end_at_the_last_stage(epochs: int) -> None:
    policy = Progressive(STAGES)
    bits = [policy.bits_at(e, epochs) for e in range(epochs)]
    assert bits == sorted(bits, reverse=True)
    assert bits[-1] == 2


def test_stage_never_has_fewer_bits_than_the_last() -> None:
    policy = Progressive([{"until": 1, "bits": 4}, {"bits": 8}])
    assert [policy.bits_at(e, 3) for e in range(3)] == [8, 8, 8]


def test_activation_bits_follow_the_weights_or_stay_fixed(layers: list[Layer]) -> None:
    assert Progressive(STAGES).assign(layers, epoch=0, epochs=8)["2"] == Bits(8, 8)
    assert Progressive(STAGES, act=4).assign(layers, epoch=7, epochs=8)["2"] == Bits(2, 4)


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([], "stages needs at least one entry"),
        ([{"until": 3, "bits": 4}], "the last has no 'until'"),
        ([{"until": 1.5, "bits": 8}, {"bits": 4}], "'until' is an epoch .* got 1.5"),
        ([{"until": 0, "bits": 8}, {"bits": 4}], "'until' is an epoch .* got 0"),
        ([{"bits": 8}, {"bits": 4}], "'until' is an epoch .* got 0"),
        ([{"bits": 8}, {"until": None}], "bits of a stage must be an integer from 1 to 16"),
        ([{"until": 1, "bits": 8, "act": 8}, {"bits": 4}], "a stage has until and bits; got act"),
    ],
)
def test_stages_without_sense_are_refused(stages: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Progressive(stages)


def test_stages_out_of_order_are_refused_when_the_length_is_known() -> None:
    policy = Progressive([{"until": 0.5, "bits": 8}, {"until": 3, "bits": 4}, {"bits": 2}])
    assert policy.bits_at(0, 4) == 8
    with pytest.raises(ValueError, match="order of time"):
        policy.bits_at(0, 20)


# ---------------------------------------------------------------------------------------------
# States carried over a change of bits


def quantized(bits: dict[str, Bits], act: Any = LSQ) -> tuple[nn.Module, list[Layer], torch.Tensor]:
    model = network()
    layers = trace(model, (3, 8, 8))
    images = torch.randn(4, 3, 8, 8)
    quantize_(model, layers, bits, LSQ, act)
    calibrate_(model, images)
    return model, layers, images


def test_new_bits_give_what_a_fresh_calibration_gives(layers: list[Layer]) -> None:
    wide, narrow = (Uniform(w, a, first_last="same").assign(layers) for w, a in ((8, 8), (3, 4)))
    model, layers, images = quantized(wide)
    rebits_(model, layers, narrow, LSQ, LSQ, images=images)
    fresh, *_ = quantized(narrow)
    check_calibrated(model)
    assert torch.equal(model(images), fresh(images))


def test_quantizers_whose_bits_stay_are_the_same_objects_with_the_same_state(
    layers: list[Layer],
) -> None:
    model, layers, images = quantized(Uniform(8, 4).assign(layers))
    kept = {n: m.act_quantizer for n, m in quant_layers(model).items()}
    with torch.no_grad():
        for quantizer in kept.values():
            quantizer.scale.mul_(1.25)  # type: ignore[operator]
    scales = {n: q.scale.clone() for n, q in kept.items()}  # type: ignore[operator]
    new = rebits_(model, layers, Uniform(2, 4).assign(layers), LSQ, LSQ, images=images)
    assert new == ["2.weight_quantizer", "4.weight_quantizer"]
    for name, module in quant_layers(model).items():
        assert module.act_quantizer is kept[name]
        assert torch.equal(module.act_quantizer.scale, scales[name])  # type: ignore[arg-type]


def test_clips_that_would_start_at_a_constant_are_carried(layers: list[Layer]) -> None:
    model, images = network(), torch.randn(8, 3, 8, 8)
    weight = partial(APoT, normalize=True, per_channel=False, init="three_std")
    for start, carried in (("paper", True), ("mse", False)):
        model = network()
        act = partial(APoTActivation, init=start)
        quantize_(model, layers, Uniform(8, 8).assign(layers), weight, act)
        calibrate_(model, images)
        inner = quant_layers(model)["2"]
        with torch.no_grad():
            inner.weight_quantizer.scale.fill_(2.5)  # type: ignore[operator]
            inner.act_quantizer.scale.fill_(5.0)  # type: ignore[operator]
        rebits_(model, layers, Uniform(4, 4).assign(layers), weight, act, images=images)
        inner = quant_layers(model)["2"]
        assert (inner.weight_quantizer.bits, inner.act_quantizer.bits) == (4, 4)
        assert inner.weight_quantizer.scale == 2.5
        assert (inner.act_quantizer.scale == 5.0) == carried


def test_carried_state_survives_and_the_step_does_not(layers: list[Layer]) -> None:
    model, layers, images = quantized(Uniform(8, 8).assign(layers), act=Adapted)
    before = model.get_submodule("2.act_quantizer")
    rebits_(model, layers, Uniform(4, 4).assign(layers), LSQ, Adapted, images=images)
    after = model.get_submodule("2.act_quantizer")
    assert after is not before
    assert torch.equal(after.adapter.weight, before.adapter.weight)  # type: ignore[union-attr]
    assert after.scale > before.scale  # type: ignore[operator]


@pytest.mark.parametrize("factor", ["relu", "statistics", "frozen"])
def test_the_step_of_asq_is_taken_behind_its_factor(layers: list[Layer], factor: Any) -> None:
    asq = partial(ASQ, factor=factor)
    model, layers, images = quantized(Uniform(8, 8).assign(layers), act=asq)
    before: Any = model.get_submodule("2.act_quantizer")
    beta = 1.0 if factor == "frozen" else 1.5
    with torch.no_grad():
        if before.adapter is not None:  # the same factor for all
            before.adapter[-1].weight.zero_()
            before.adapter[-1].bias.fill_(beta)
        before.mean_abs.div_(beta)  # so that it is about as much for `statistics`
    rebits_(model, layers, Uniform(4, 4).assign(layers), LSQ, asq, images=images)
    after: Any = model.get_submodule("2.act_quantizer")
    seen: list[Tensor] = []
    model.get_submodule("2").register_forward_pre_hook(lambda m, x: seen.append(x[0]))
    model.eval()(images)
    (x,) = seen
    plain = lsq_scale(x, after.qmax, per_row=False)
    wide = ASQ(4, signed=False, shape=after.shape)
    wide.calibrate(x)
    assert torch.equal(wide.scale, plain)  # a start looks at x itself
    behind = lsq_scale(x / after.factors(x), after.qmax, per_row=False)
    assert torch.allclose(after.scale, behind)
    assert torch.allclose(after.scale * beta, plain, rtol=0.1 if factor == "statistics" else 1e-5)


def test_a_dead_factor_leaves_the_step_finite(layers: list[Layer]) -> None:
    model, layers, images = quantized(Uniform(8, 8).assign(layers), act=ASQ)
    before: Any = model.get_submodule("2.act_quantizer")
    with torch.no_grad():
        before.adapter[-1].bias.fill_(-5.0)
    rebits_(model, layers, Uniform(4, 4).assign(layers), LSQ, ASQ, images=images)
    after: Any = model.get_submodule("2.act_quantizer")
    assert 0 < float(after.scale.detach()) < 10


def test_layers_are_calibrated_behind_what_was_carried(layers: list[Layer]) -> None:
    act, images = partial(APoTActivation, init="paper"), torch.randn(4, 3, 8, 8)
    parts = (LSQ, act, LSQ, LSQ)

    def last_step(clip: float) -> Tensor:
        model = network()
        quantize_(model, layers, Uniform(8, 8, first_last="same").assign(layers), *parts)
        calibrate_(model, images)
        inner: Any = model.get_submodule("4.act_quantizer")
        with torch.no_grad():
            inner.scale.fill_(clip)
        narrow = Uniform(4, 4, first_last="same").assign(layers)
        rebits_(model, layers, narrow, *parts, images=images)
        last: Any = model.get_submodule("8.act_quantizer")
        return last.scale

    assert last_step(0.05) < last_step(5.0)  # it sees what the carried clip lets through


class Tabled(LSQ):
    """LSQ with a number for each bit beside what any width has."""

    carried = ("kept", "table")

    def __init__(self, bits: int, *, signed: bool = True, shape: tuple[int, ...] = ()) -> None:
        super().__init__(bits, signed=signed, shape=shape)
        self.register_buffer("kept", torch.zeros(1))
        self.register_buffer("table", torch.zeros(bits))


def test_state_of_another_shape_is_not_carried(layers: list[Layer]) -> None:
    model, layers, images = quantized(Uniform(8, 1).assign(layers), act=Tabled)
    before = model.get_submodule("2.act_quantizer")
    before.kept.fill_(7.0)  # type: ignore[operator, union-attr]
    before.table.fill_(7.0)  # type: ignore[operator, union-attr]
    rebits_(model, layers, Uniform(8, 4).assign(layers), LSQ, Tabled, images=images)
    after = model.get_submodule("2.act_quantizer")
    assert after.kept == 7.0
    assert torch.equal(after.table, torch.zeros(4))  # type: ignore[arg-type]


def test_the_adapters_of_asq_survive(layers: list[Layer]) -> None:
    model, layers, images = quantized(Uniform(8, 8).assign(layers), act=ASQ)
    before = model.get_submodule("2.act_quantizer")
    with torch.no_grad():
        for parameter in before.adapter.parameters():  # type: ignore[union-attr]
            parameter.add_(0.25)
        before.mean_abs.fill_(7.0)  # type: ignore[operator, union-attr]
    rebits_(model, layers, Uniform(4, 4).assign(layers), LSQ, ASQ, images=images)
    after = model.get_submodule("2.act_quantizer")
    assert after is not before
    assert torch.equal(after.mean_abs, before.mean_abs)  # type: ignore[arg-type]
    kept, carried = before.adapter.state_dict(), after.adapter.state_dict()  # type: ignore[union-attr]
    assert kept.keys() == carried.keys()
    assert all(torch.equal(carried[name], value) for name, value in kept.items())


def test_float_layer_gets_quantizers_when_its_bits_fall(layers: list[Layer]) -> None:
    model, layers, images = quantized(Uniform(32, 32).assign(layers))
    assert not quant_layers(model)
    new = rebits_(model, layers, {"2": Bits(4, 32)}, LSQ, LSQ, images=images)
    assert new == ["2.weight_quantizer", "2.act_quantizer"]
    module = quant_layers(model)["2"]
    assert module.weight_quantizer.bits == 4
    assert isinstance(module.act_quantizer, Identity)


def test_network_parameters_are_the_same_objects_after_a_change(layers: list[Layer]) -> None:
    model, layers, images = quantized(Uniform(8, 8).assign(layers))
    weights = {n: m.weight for n, m in quant_layers(model).items()}
    rebits_(model, layers, Uniform(2, 2).assign(layers), LSQ, LSQ, images=images)
    assert all(m.weight is weights[n] for n, m in quant_layers(model).items())


# ---------------------------------------------------------------------------------------------
# Configs


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_config_builds_its_policy_and_names_it(path: Path) -> None:
    cfg = OmegaConf.create({"bits": 4, "seed": 0, "bitwidth": OmegaConf.load(path)})
    for convert in ("none", "all"):
        policy = instantiate(cfg.bitwidth, _convert_=convert)
        assert policy.name == path.stem
        assert policy.first_last == 8
        assert policy.needs_data == (path.stem == "sensitivity")


def test_a_last_stage_that_begins_where_the_training_ends_is_refused() -> None:
    stages = Progressive([{"until": 4, "bits": 8}, {"bits": 2}])
    assert [stages.bits_at(epoch, 5) for epoch in range(5)] == [8, 8, 8, 8, 2]
    with pytest.raises(ValueError, match="begins at epoch 4 of 4: it is never reached"):
        stages.bits_at(0, 4)


def test_a_network_is_quantized_once_and_calibrated_before_it_is_used(layers: list[Layer]) -> None:
    model, bits = network(), Uniform(4, 4).assign(layers)
    quantize_(model, layers, bits, LSQ, LSQ)
    line = r"8 quantizers are not calibrated \(0\.weight_quantizer, 0\.act_quantizer, 2\.weight_qua"
    with pytest.raises(ValueError, match=line):
        check_calibrated(model)
    with pytest.raises(ValueError, match="layer '0' is already quantized; call unquantize_ first"):
        quantize_(model, layers, bits, LSQ, LSQ)
    calibrate_(model, torch.randn(4, 3, 8, 8))
    check_calibrated(model)
