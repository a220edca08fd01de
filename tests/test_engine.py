"""Engines: integers give what the fake-quantized network gives."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import Qexp
from hypothesis import given, settings
from hypothesis import strategies as st
from test_export import METHODS, images, network, packed_of, run_folder
from torch import Tensor, nn

from qexp.engine import ENGINES, ON_CPU, gemm, integer_network
from qexp.engine.gemm import Gemm
from qexp.engine.network import IntegerLayer, weight_of
from qexp.engine.reference import Reference, by_shifts, exponents
from qexp.engine.source import SOURCES, check_known, integers, span
from qexp.engine.table import Table
from qexp.engine.weight import Weight, planes
from qexp.engine.window import Window, patches
from qexp.errors import ConfigError
from qexp.export.coding import encode
from qexp.export.inputs import KINDS
from qexp.quant.additive import APoTActivation
from qexp.quant.aquant import AQuant
from qexp.quant.asq import ASQ
from qexp.quant.codebook import Codebook
from qexp.quant.convert import Bits, calibrate_, quant_layers, quantize_
from qexp.quant.dorefa import DoReFaWeight
from qexp.quant.lsq import LSQ, LSQPlus
from qexp.quant.nearest import Nearest
from qexp.quant.power import POST, POT, APoT
from qexp.quant.quantizer import Quantizer
from qexp.quant.trace import trace

__all__ = ["run_folder"]  # a fixture

WEIGHTS: dict[str, Any] = {
    "lsq": LSQ,
    "per channel": partial(LSQ, per_channel=True),
    "zero point": partial(Nearest, per_channel=True),
    "half": DoReFaWeight,
    "post": POST,
    "post 2": partial(POST, base=2.0),
    "pot": POT,
    "apot": partial(APoT, normalize=True),
    "adq": Codebook,
    "adq per channel": partial(Codebook, per_channel=True),
}


def weight(name: str, bits: int, shape: tuple[int, ...]) -> tuple[Weight, Tensor]:
    """A calibrated weight as an engine takes it, and its fake-quantized values."""
    w = torch.randn(shape, generator=torch.Generator().manual_seed(bits))
    quantizer: Quantizer = WEIGHTS[name](bits, signed=True, shape=shape)
    quantizer.calibrate(w)
    how, codes, parts = encode(quantizer, w, name)
    return Weight(how, codes.cpu(), parts), quantizer(w).detach()


# Weights


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("name", WEIGHTS)
def test_planes_add_up_to_the_weight(name: str, bits: int) -> None:
    stored, w_hat = weight(name, bits, (6, 4, 3, 3))
    p = planes(stored)
    assert p.planes.dtype == torch.int8
    whole = sum(f * plane.double() for f, plane in zip(p.factors, p.planes, strict=True))
    again = whole * p.step.double().reshape(-1, 1, 1, 1)  # type: ignore[union-attr]
    top = w_hat.abs().flatten(1).amax(1).reshape(-1, 1, 1, 1)
    assert bool(((again - w_hat).abs() <= 2**-22 * top).all())


def test_uniform_weights_are_one_plane_and_square_roots_of_two_are_two() -> None:
    expected = {"lsq": 1, "half": 1, "zero point": 1, "post": 2, "pot": 1, "apot": 1, "adq": 3}
    assert {n: len(planes(weight(n, 4, (4, 4))[0]).planes) for n in expected} == expected


# Multiplications


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize(("low", "high"), [(0, 15), (0, 255), (-300, 300)])
def test_engines_multiply_like_the_reference(name: str, low: int, high: int) -> None:
    stored, w_hat = weight(name, 4, (6, 5, 3, 2))
    window = Window((3, 2), (2, 1), (1, 1), (1, 2))
    x = torch.randint(low, high + 1, (3, 5, 7, 6)).float()
    step = torch.tensor([0.5, 0.01, 3.0]).reshape(3, 1, 1, 1)
    exact = F.conv2d(x.double(), w_hat.double(), None, (2, 1), (1, 1), (1, 2)) * step
    scale = F.conv2d(x.abs().double(), w_hat.abs().double(), None, (2, 1), (1, 1), (1, 2)) * step
    for engine in (Reference, Gemm, Table):
        y = engine(stored, window, low, high)(x, step)
        assert y.dtype == torch.float32
        # float32 rounds the result; a digit of a level, or a sum of the table, in 2^-22
        assert bool(((y - exact).abs() <= 2**-21 * scale).all()), engine.__name__


@pytest.mark.parametrize("engine", [Table, Reference])
def test_a_table_beyond_memory_is_refused(engine: Callable[..., Any]) -> None:
    stored, _ = weight("adq", 8, (6, 4, 3, 3))
    engine(stored, Window(), 0, 255)
    with pytest.raises(ConfigError, match=r"needs a table of .* products, .* Use engine=integer"):
        engine(stored, Window(), 0, 2**21 - 1)


@pytest.mark.parametrize("name", ["lsq", "post", "adq", "adq per channel"])
def test_groups_are_multiplied_apart(name: str) -> None:
    stored, w_hat = weight(name, 4, (6, 2, 3, 3))
    x = torch.randint(0, 16, (2, 6, 5, 5)).float()
    exact = F.conv2d(x.double(), w_hat.double(), padding=1, groups=3).float()
    for engine in ON_CPU:
        y = ENGINES[engine](stored, Window((3, 3), padding=(1, 1), groups=3), 0, 15)(
            x, torch.tensor(1.0)
        )
        torch.testing.assert_close(y, exact, rtol=1e-5, atol=1e-5)


def check_exact_sums(
    engine: Callable[..., Any], k: int, wide: bool, large: bool, seed: int
) -> None:
    """Sums of k products of 8-bit weights with 7 or 8-bit inputs, the largest ones too."""
    dice = torch.Generator().manual_seed(seed)
    stored, _ = weight("lsq", 8, (4, k))
    codes = torch.randint(-128, 128, (4, k, 1, 1), generator=dice, dtype=torch.int32)
    codes = torch.full_like(codes, -128) if large else codes
    exactly = Weight(stored.how, codes, {"scale": torch.ones(1)})
    high = 255 if wide else 127
    x = torch.randint(0, high + 1, (2, k, 3, 3), generator=dice).float()
    x = torch.full_like(x, high) if large else x
    expected = torch.einsum("ok,nkp->nop", codes[:, :, 0, 0].long(), x.flatten(2).long())
    y = engine(exactly, Window(), 0, high)(x, torch.tensor(1.0))
    assert torch.equal(y.flatten(2).long(), expected)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 70), st.booleans(), st.booleans(), st.integers(0, 2**31))
def test_sums_of_integers_are_exact(k: int, wide: bool, large: bool, seed: int) -> None:
    for engine in (Gemm, Reference):
        check_exact_sums(engine, k, wide, large, seed)


def test_without_exact_int8_products_the_sums_are_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x, window = torch.randint(0, 256, (2, 40, 6, 6)).float(), Window((3, 3), padding=(1, 1))
    for name in ("lsq", "post", "adq"):
        stored, _ = weight(name, 8, (8, 40, 3, 3))
        here = Gemm(stored, window, 0, 255)(x, torch.tensor(0.1))
        monkeypatch.setattr(gemm, "int8_products_are_exact", lambda: False)
        elsewhere = Gemm(stored, window, 0, 255)(x, torch.tensor(0.1))
        monkeypatch.undo()
        torch.testing.assert_close(here, elsewhere, rtol=1e-6, atol=1e-4)


def test_patches_are_those_of_unfold() -> None:
    x = torch.randn(2, 3, 7, 8)
    window = Window((3, 2), (2, 3), (1, 0), (2, 1))
    ours = patches(x, window).flatten(1, 2)
    assert torch.equal(ours, F.unfold(x, (3, 2), (2, 1), (1, 0), (2, 3)))


def test_shifts_multiply_by_square_roots_of_two() -> None:
    grid = torch.tensor([-1.0, -(0.5**0.5), -0.25, 0.0, 0.5, 0.125**0.5, 1.0])
    e = exponents(grid)
    assert e is not None
    assert e.tolist() == [0, 1, 4, 0, 2, 3, 0]
    index = torch.arange(7)[None]
    x = torch.arange(1, 8)[:, None]
    y = by_shifts(grid.sign().long()[index], e[index], x)
    torch.testing.assert_close(y, (grid.double() @ x.double())[None], rtol=1e-7, atol=0)
    assert exponents(torch.tensor([0.3, 1.0])) is None


# Inputs


def test_every_input_that_a_file_may_hold_has_integers() -> None:
    assert {kind.cls for kind in KINDS.values()} == set(SOURCES)


@pytest.mark.parametrize("method", METHODS)
def test_inputs_are_the_integers_of_training_bit_for_bit(method: str) -> None:
    model = network(method)
    seen: list[tuple[Quantizer, Tensor]] = []
    for layer in quant_layers(model).values():
        quantizer = layer.act_quantizer
        quantizer.register_forward_pre_hook(lambda m, args: seen.append((m, args[0])))  # type: ignore[arg-type]
    with torch.no_grad():
        model(images(4))
    assert seen
    for quantizer, x in list(seen):  # calling a quantizer adds to it
        with torch.no_grad():
            x = _with_ties(quantizer, x)
            x_int, step, offset = integers(quantizer, x)
            x_hat = x_int * step + (0 if offset is None else offset)
            if isinstance(
                quantizer, APoTActivation
            ):  # step * integer and clip * level: two roundings
                torch.testing.assert_close(x_hat, quantizer(x), rtol=2.4e-7, atol=0)
                assert torch.equal(
                    x_int / quantizer.whole()[-1], quantizer.grid[quantizer.codes(x)]
                )
            else:
                assert torch.equal(x_hat, quantizer(x))
        low, high = span(quantizer)
        assert torch.equal(x_int, x_int.round())
        assert low <= int(x_int.min()) <= int(x_int.max()) <= high


def _with_ties(quantizer: Quantizer, x: Tensor) -> Tensor:
    """Some elements on a border between two codes; the sample's range stays (ASQ sees it)."""
    if isinstance(quantizer, (ASQ, AQuant)):
        return x
    borders = quantizer.thresholds()
    flat = x.flatten().clone()
    flat[: len(borders)] = borders[: len(flat)]
    return flat.reshape(x.shape)


# Networks


def _closest(model: nn.Module, other: nn.Module, x: Tensor) -> tuple[Tensor, bool]:
    with torch.no_grad():
        ours, theirs = model(x), other(x)
    return (theirs - ours).abs().amax(1), torch.equal(theirs.argmax(1), ours.argmax(1))


@pytest.mark.parametrize("method", METHODS)
def test_an_integer_network_is_the_same_network(method: str) -> None:
    model = network(method, fold=method in ("adaround", "aquant"))
    other = integer_network(packed_of(model))
    assert sum(isinstance(m, IntegerLayer) for m in other.modules()) == len(quant_layers(model))
    apart, same = _closest(model, other, images())
    # As in ONNX: a value on a border between two codes may fall to the other side.
    assert apart.median() < 1e-4
    assert same


@pytest.mark.parametrize("method", ["lsq", "asq+post", "adq_per_channel", "lsq_per_channel"])
@pytest.mark.parametrize("engine", ["table", "reference"])
def test_the_slow_engines_are_the_same_network(method: str, engine: str) -> None:
    model = network(method)
    apart, same = _closest(model, integer_network(packed_of(model), engine), images(2))
    assert apart.median() < 1e-4
    assert same


@pytest.mark.parametrize("widths", [Bits(2, 2), Bits(8, 8), Bits(3, 10), Bits(4, 32), Bits(32, 4)])
def test_all_widths_and_float_operands_run(widths: Bits) -> None:
    model = network("lsq", widths)
    apart, same = _closest(model, integer_network(packed_of(model)), images())
    assert apart.median() < 1e-4
    assert same


def check_layer(model: nn.Module, x: torch.Tensor) -> None:
    """The only layer of `model`, run from its integers, gives what it gives."""
    layer = quant_layers(model)["0"]
    layer.eval()
    how, codes, parts = encode(layer.weight_quantizer, layer.weight, "0")
    with torch.no_grad():
        y = IntegerLayer(layer, Weight(how, codes, parts), "integer")(x)
        torch.testing.assert_close(y, layer(x), rtol=1e-5, atol=1e-5)


def test_zeros_around_an_image_get_no_offset() -> None:
    conv = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1))
    layers = trace(conv, (2, 5, 5))
    quantize_(conv, layers, {"0": Bits(4, 4)}, LSQ, LSQPlus)
    x = torch.rand(2, 2, 5, 5) + 3  # far from zero: the offset is large
    calibrate_(conv, x)
    check_layer(conv, x)


def test_linear_layers_take_tokens() -> None:
    model = nn.Sequential(nn.Linear(6, 3))
    quantize_(model, trace(model, (6,)), {"0": Bits(4, 4)}, POST, ASQ)
    x = torch.randn(2, 5, 6)
    calibrate_(model, x)
    check_layer(model, x)


class Looks(nn.Module):
    """A model that reads attributes of its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.weighs, self.linear = False, nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x[..., : self.linear.in_features]
        return self.linear(x.to(self.linear.weight.dtype) if self.weighs else x)


def test_a_layer_has_its_sizes_and_says_that_it_has_no_weight() -> None:
    model = Looks()
    quantize_(model, trace(model, (7,)), {"linear": Bits(4, 4)}, LSQ, LSQ)
    x = torch.randn(4, 7)
    calibrate_(model, x)
    layer: Any = model.linear
    how, codes, parts = encode(layer.weight_quantizer, layer.weight, "linear")
    with torch.no_grad():
        expected = model(x)
    model.linear = IntegerLayer(layer, Weight(how, codes, parts), "integer")  # type: ignore[assignment]
    torch.testing.assert_close(model(x), expected)
    assert model(x[:0]).shape == (0, 3)
    model.weighs = True
    with pytest.raises(ConfigError, match="Use engine=float"):
        model(x)


def test_an_unknown_input_is_named() -> None:
    packed = packed_of(network("lsq"))
    with pytest.MonkeyPatch.context() as patch:
        patch.delitem(SOURCES, LSQ)
        with pytest.raises(ConfigError, match="engine: layer 'conv1' has inputs of LSQ, which"):
            integer_network(packed)


def test_weights_stay_codes() -> None:
    packed = packed_of(network("lsq"))
    entry = packed.header.layers[1]
    assert torch.equal(weight_of(packed, entry).codes, packed.codes(entry))
    layer: Any = integer_network(packed).get_submodule(entry.name)
    with pytest.raises(ConfigError, match="has the integers alone"):
        layer.weight  # noqa: B018


# Command


def test_a_packed_file_scores_the_same_on_every_engine(qexp: Qexp, run_folder: Path) -> None:
    assert qexp("export", f"run={run_folder}").code == 0
    given = (f"run={run_folder}", "checkpoint=model.safetensors", "device=cpu")
    said = [qexp("eval", *given, f"engine={engine}") for engine in ("float", *ON_CPU)]
    assert all(s.code == 0 for s in said), said
    assert len({s.out.split(" | ")[0] for s in said}) == 1


def test_engines_need_a_packed_file(qexp: Qexp, run_folder: Path) -> None:
    said = qexp("eval", f"run={run_folder}", "engine=integer")
    assert said.code == 2
    assert said.err == (
        "eval: engine=integer runs a packed file. Write one with qexp export run=FOLDER, then add "
        "checkpoint=model.safetensors.\n"
    )
    said = qexp("eval", f"run={run_folder}", "engine=fast")
    assert said.code == 2
    assert "engine must be" in said.err


def test_sums_beyond_32_bits_are_not_wrapped() -> None:
    k = 70_000  # 127 * 255 * 70,000 > 2**31
    stored, w_hat = weight("lsq", 8, (1, k, 1, 1))
    stored = dataclasses.replace(stored, codes=torch.full_like(stored.codes, 127))
    x = torch.full((1, k, 1, 1), 255.0)
    y = Gemm(stored, Window(), 0, 255)(x, torch.ones(1, 1, 1, 1))
    exact = Reference(stored, Window(), 0, 255)(x, torch.ones(1, 1, 1, 1))
    assert w_hat.shape == (1, k, 1, 1)
    assert y.item() > 0
    torch.testing.assert_close(y, exact)


def test_inputs_on_powers_of_two_beyond_16_bits_are_refused() -> None:
    powers = APoTActivation(5, signed=False, additive=False)
    with pytest.raises(ConfigError, match="'conv' has 5-bit inputs on powers of two"):
        check_known(powers, "conv")
    check_known(APoTActivation(8, signed=False), "conv")


def test_geometry_and_grids_that_no_engine_has_are_refused() -> None:
    stored, _ = weight("half", 4, (3, 2, 3, 3))
    odd = dataclasses.replace(stored, how=dataclasses.replace(stored.how, offset=0.25))
    with pytest.raises(ConfigError, match="a grid has an offset other than 1/2"):
        planes(odd)
    for own in ({"padding": "same"}, {"padding": 1, "padding_mode": "reflect"}):
        conv = nn.Sequential(nn.Conv2d(2, 3, 3, **own))
        quantize_(conv, trace(conv, (2, 5, 5)), {"0": Bits(4, 4)}, DoReFaWeight, LSQ)
        with pytest.raises(ConfigError, match="convolutions need zero padding given as integers"):
            IntegerLayer(quant_layers(conv)["0"], stored, "integer")
