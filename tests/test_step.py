"""One training step of every method: nothing in it waits for the device, nothing is done twice."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from compose import tiny
from test_methods import METHODS
from torch import Tensor, nn
from waiting import Watch

from qexp.quant.convert import calibrate_, quant_layers, shared_weights, unquantize_
from qexp.recipes import build
from qexp.recipes.saving import kept_bytes


def network(tmp_path: Path, method: str) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    cfg = tiny(tmp_path, f"quantizer={method}", "bits=3")
    dataset = build.make_dataset(cfg, torch.device("cpu"))
    model = build.make_model(cfg, dataset, torch.device("cpu"))
    network = build.make_network(cfg, model, dataset.input_shape)
    x, y = next(dataset.train_batches(0))
    calibrate_(network.model, x)
    return network.model.train(), x, y


@pytest.mark.parametrize("method", METHODS)
def test_a_step_does_not_wait_for_the_device(tmp_path: Path, method: str) -> None:
    model, x, y = network(tmp_path, method)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    for _ in range(2):  # the first step makes the optimizer's state
        with Watch() as watch:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    assert watch.waits == []


def test_the_watch_sees_what_waits() -> None:
    with Watch() as watch:
        t = torch.ones(3)
        t.sum().item()
        bool(t.any())
        t[t > 0]
    assert [name.split(".")[0] for name in watch.waits] == ["_local_scalar_dense"] * 2 + ["index"]


@pytest.mark.parametrize("method", ["lsq", "post", "adq", "fp32"])
def test_micro_batches_share_one_quantized_weight(
    tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x, y = network(tmp_path, method)
    model.eval()  # batch norm must not see the size of a micro-batch
    calls: list[int] = []
    for layer in quant_layers(model).values():
        forward = layer.weight_quantizer.forward
        monkeypatch.setattr(
            layer.weight_quantizer, "forward", lambda w, f=forward: (calls.append(1), f(w))[1]
        )

    def gradients() -> dict[str, Tensor]:
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    F.cross_entropy(model(x), y).backward()
    expected, once = gradients(), len(calls)
    places = []
    for _ in range(2):
        model.zero_grad()
        calls.clear()
        with shared_weights(model):
            places.append([layer.w_hat.data_ptr() for layer in quant_layers(model).values()])
            for part, target in zip(x.chunk(4), y.chunk(4), strict=True):
                (F.cross_entropy(model(part), target) / 4).backward()
    assert places[0] == places[1]  # what CUDA graphs are recorded for
    got = gradients()
    assert len(calls) == once == len(quant_layers(model))
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-6, msg=name)
    assert all(layer.w_hat is None for layer in quant_layers(model).values())


def test_an_offset_keeps_no_more_than_a_step_does(tmp_path: Path) -> None:
    def kept(method: str) -> int:
        model, x, y = network(tmp_path, method)
        return kept_bytes(model, lambda: F.cross_entropy(model(x), y).backward())

    assert kept("lsqplus") == kept("lsq")


def test_unquantized_it_is_the_float_network_again(tmp_path: Path) -> None:
    model, x, _ = network(tmp_path, "asq")
    plain, _, _ = network(tmp_path, "fp32")
    kinds = {name: type(module) for name, module in plain.named_modules()}
    names = list(quant_layers(model))
    parameters = {name: model.get_parameter(f"{name}.weight") for name in names}
    with shared_weights(model):
        model(x)
    assert unquantize_(model) is model
    for name in names:
        assert set(vars(model.get_submodule(name))) <= set(vars(plain.get_submodule(name)))
    assert not quant_layers(model)
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    assert {name: model.get_parameter(f"{name}.weight") for name in names} == parameters
    plain.load_state_dict(model.state_dict())  # the same names, no more
    assert torch.equal(model.eval()(x), plain.eval()(x))
