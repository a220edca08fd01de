"""`saved=`: less is kept for backward, and the training is the same, bit for bit."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qexp.errors import ConfigError
from qexp.models.resnet import ResNet
from qexp.quant.asq import ASQ
from qexp.quant.codebook import Codebook
from qexp.quant.convert import Bits, calibrate_, quant_layers, quantize_
from qexp.quant.lsq import LSQ, LSQPlus
from qexp.quant.n2uq import N2UQ
from qexp.quant.trace import trace
from qexp.recipes.saving import kept_bytes, save_less_

IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 3])


def network(act: Any = LSQ, weight: Any = LSQ) -> nn.Module:
    torch.manual_seed(0)
    model = ResNet(depth=8, num_classes=4, width=0.5)
    layers = trace(model, (3, 8, 8))
    quantize_(model, layers, {layer.name: Bits(4, 4) for layer in layers}, weight, act)
    calibrate_(model, IMAGES)
    return model.train()


def trained(model: nn.Module, saved: str, amp: bool = False) -> dict[str, Tensor]:
    """Everything that two steps change: gradients, parameters, buffers."""
    model = copy.deepcopy(model)
    save_less_(model, saved)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            loss = F.cross_entropy(model(IMAGES), LABELS)
        loss.backward()
        optimizer.step()
    grads = {f"{n}.grad": p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {**model.state_dict(), **grads}


@pytest.mark.parametrize("saved", ["inputs", "blocks"])
@pytest.mark.parametrize(
    ("act", "weight"),
    [(LSQ, LSQ), (ASQ, LSQ), (LSQPlus, LSQ), (N2UQ, Codebook)],
    ids=["lsq", "asq", "lsqplus", "adq"],
)
def test_training_is_the_same_bit_for_bit(saved: str, act: Any, weight: Any) -> None:
    model = network(act, weight)
    expected, got = trained(model, "all"), trained(model, saved)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


@pytest.mark.parametrize("saved", ["inputs", "blocks"])
def test_training_is_the_same_under_autocast_and_channels_last(saved: str) -> None:
    model = network(ASQ).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    expected, got = trained(model, "all", amp=True), trained(model, saved, amp=True)
    assert all(torch.equal(got[name], value) for name, value in expected.items())


def test_two_forwards_before_a_backward_leave_the_buffers_of_the_second() -> None:
    found = []
    for saved in ("all", "blocks"):
        model = network()
        save_less_(model, saved)
        losses = [F.cross_entropy(model(x), LABELS) for x in (IMAGES, 3 * IMAGES)]
        before = copy.deepcopy(dict(model.named_buffers()))
        losses[0].backward()
        assert all(torch.equal(b, before[name]) for name, b in model.named_buffers())
        losses[1].backward()
        found.append([*before.values(), *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_what_a_network_holds_anyway_is_not_kept_by_a_step() -> None:
    model = nn.BatchNorm1d(4, affine=True).eval()
    x = torch.randn(8, 4)
    assert kept_bytes(model, lambda: model(x).sum().backward()) == 4 * x.numel()


def test_a_factor_with_memory_keeps_its_input() -> None:
    def statistics(bits: int, **facts: Any) -> ASQ:
        return ASQ(bits, factor="statistics", **facts)

    model = network(statistics)
    expected, got = trained(model, "all"), trained(model, "inputs")
    assert all(torch.equal(got[name], value) for name, value in expected.items())
    save_less_(model, "inputs")
    assert not any(layer.input_again for layer in quant_layers(model).values())


def kept(model: nn.Module, saved: str) -> int:
    model = copy.deepcopy(model)
    save_less_(model, saved)

    def step() -> None:
        F.cross_entropy(model(IMAGES), LABELS).backward()

    return kept_bytes(model, step)


@pytest.mark.parametrize("act", [LSQ, ASQ], ids=["lsq", "asq"])
def test_inputs_keep_what_float_keeps_and_blocks_less(act: Any) -> None:
    model = network(act)
    floating = kept(ResNet(depth=8, num_classes=4, width=0.5).train(), "all")
    assert kept(model, "all") > 1.3 * floating
    weights = 4 * sum(layer.weight.numel() for layer in quant_layers(model).values())
    assert kept(model, "inputs") < 1.03 * floating + weights
    assert kept(model, "blocks") < 0.6 * floating


def test_quantized_weights_are_counted_in_every_mode() -> None:
    """Autograd asks the innermost hooks alone, and `inputs` has its own."""
    wide = nn.Sequential(*(nn.Conv2d(64, 64, 3, padding=1) for _ in range(3)))
    layers = trace(wide, (64, 2, 2))
    quantize_(wide, layers, {layer.name: Bits(4, 4) for layer in layers}, LSQ, LSQ)
    x = torch.randn(2, 64, 2, 2)
    calibrate_(wide, x)
    save_less_(wide.train(), "inputs")
    weights = sum(4 * layer.weights for layer in layers)
    assert kept_bytes(wide, lambda: wide(x).sum().backward()) >= weights


def test_evaluation_and_checkpoints_do_not_see_the_mode() -> None:
    model = network()
    keys = list(model.state_dict())
    expected = model.eval()(IMAGES)
    for saved in ("inputs", "blocks"):
        other = copy.deepcopy(model)
        save_less_(other, saved)
        with torch.no_grad():
            assert torch.equal(other(IMAGES), expected)
        assert list(other.state_dict()) == keys


class Merge(nn.Module):
    """A residual block that takes its two branches, one of them by name."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x)) + other)


class Merging(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.merge, self.fc = nn.Conv2d(3, 4, 3), Merge(), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.fc(self.merge(x, other=x * 0.5).mean((2, 3)))


def test_blocks_of_two_inputs_train_the_same_and_keep_less() -> None:
    torch.manual_seed(0)
    model = Merging()
    layers = trace(model, (3, 8, 8))
    quantize_(model, layers, {layer.name: Bits(4, 4) for layer in layers}, LSQ, LSQ)
    calibrate_(model, IMAGES)
    expected, got = trained(model.train(), "all"), trained(model, "blocks")
    assert all(torch.equal(got[name], value) for name, value in expected.items())
    assert kept(model, "blocks") < kept(model, "inputs")


def test_blocks_of_a_network_without_any_are_refused_in_one_line() -> None:
    with pytest.raises(ConfigError, match=r"the network has none\. Use saved=inputs"):
        save_less_(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), "blocks")
