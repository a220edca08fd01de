"""Batch norms folded into convolutions."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from qexp.models.resnet import ResNet
from qexp.quant.blocks import find_units, unfit
from qexp.quant.fold import Fold, fold_bn_
from qexp.quant.trace import trace

MODELS = {
    "resnet20": (partial(ResNet, depth=20, num_classes=10), 32, 19, 11),
    "resnet8_projection": (
        partial(ResNet, depth=8, num_classes=10, shortcut="projection"),
        32,
        9,
        5,
    ),
    "resnet18": (torchvision.models.resnet18, 64, 20, 10),
    "mobilenet_v2": (torchvision.models.mobilenet_v2, 64, 52, 20),
    "mnasnet0_5": (torchvision.models.mnasnet0_5, 64, 52, 21),
    "regnet_x_400mf": (torchvision.models.regnet_x_400mf, 64, 71, 24),
}


def with_statistics(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    model = make().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.1)
    return model


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_folded_network_equals_the_unfolded_one(name: str) -> None:
    make, size, norms, units = MODELS[name]
    model = with_statistics(make)
    names = [n for n, _ in model.named_modules()]
    x = torch.randn(2, 3, size, size)
    before = model(x)
    report = fold_bn_(model)
    assert len(report) == norms
    assert all(fold.conv is not None for fold in report)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    assert [n for n, _ in model.named_modules()] == names
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5 * float(before.abs().max()))
    layers = [layer.name for layer in trace(model, (3, size, size))]
    found = find_units(model, layers, "block")
    assert len(found) == units
    assert sorted(n for u in found for n in u.layers) == sorted(layers)


class Shared(nn.Module):
    """One norm that folds, one whose convolution has a second reader, one after an activation."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
        self.norm_a, self.norm_b, self.norm_c = (nn.BatchNorm2d(4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm_a(self.a(x)).relu()
        z = self.b(y)
        return self.norm_c((self.norm_b(z) + z).relu())


@torch.no_grad()
def test_a_norm_that_cannot_be_folded_stays_and_is_reported() -> None:
    model = with_statistics(Shared)
    x = torch.randn(2, 3, 5, 5)
    before = model(x)
    report = {fold.norm: fold for fold in fold_bn_(model)}
    assert report["norm_a"].conv == "a"
    assert report["norm_b"].conv is None
    assert "read elsewhere" in report["norm_b"].note
    assert report["norm_c"].note == "its input is not a convolution"
    torch.testing.assert_close(model(x), before)


class Tied(nn.Module):
    """Two convolutions with one weight, each with a norm of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.b.weight = self.a.weight
        self.norm_a, self.norm_b = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm_b(self.b(self.norm_a(self.a(x))))


@torch.no_grad()
def test_convolutions_that_share_a_weight_are_not_folded() -> None:
    model = with_statistics(Tied)
    x = torch.randn(2, 3, 5, 5)
    before = model(x)
    assert [fold.note for fold in fold_bn_(model)] == ["a shares its weight", "b shares its weight"]
    assert torch.equal(model(x), before)


class Pointwise(nn.Conv2d):
    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 1)


class LooseNorm(nn.BatchNorm2d):
    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-3)


class NormAct(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).relu()


@torch.no_grad()
def test_subclasses_fold_where_they_compute_what_torchs_own_do() -> None:
    parts = (Pointwise(3), nn.BatchNorm2d(3), Pointwise(3), LooseNorm(3), Pointwise(3), NormAct(3))
    model = with_statistics(lambda: nn.Sequential(*parts))
    x = torch.randn(2, 3, 5, 5)
    before = model(x)
    assert fold_bn_(model) == [
        Fold("1", "0", "folded"),
        Fold("3", "2", "folded"),
        Fold("5", None, "it has a forward of its own"),
    ]
    torch.testing.assert_close(model(x), before)


class Standardised(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.weight - self.weight.mean(), self.bias)


class ReadTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) + F.conv2d(x, self.conv.weight)


class Centred(nn.Conv2d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, weight - weight.mean(), bias)


class BiasTwice(ReadTwice):
    def forward(self, x: Tensor) -> Tensor:
        assert self.conv.bias is not None
        return self.norm(self.conv(x)) + self.conv.bias.reshape(-1, 1, 1)


@torch.no_grad()
@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: nn.Sequential(Standardised(3, 4, 3), nn.BatchNorm2d(4)), "a forward of its own"),
        (lambda: nn.Sequential(Centred(3, 4, 3), nn.BatchNorm2d(4)), "a forward of its own"),
        (ReadTwice, "the weight of conv is read elsewhere too"),
        (BiasTwice, "the weight of conv is read elsewhere too"),
    ],
)
def test_a_weight_that_is_not_just_multiplied_keeps_its_norm(
    make: Callable[[], nn.Module], why: str
) -> None:
    model = with_statistics(make)
    x = torch.randn(2, 3, 5, 5)
    before = model(x)
    (fold,) = fold_bn_(model)
    assert fold.conv is None
    assert why in fold.note
    torch.testing.assert_close(model(x), before)


class TwoHeads(nn.Module):
    """In training mode it gives two outputs and looks at values."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Any:
        y = self.norm(self.conv(x))
        return (y, y) if self.training and y.sum() > 0 else y


def test_the_graph_is_that_of_eval_mode() -> None:
    model = TwoHeads()
    assert [fold.note for fold in fold_bn_(model)] == ["folded"]
    assert model.training


class TwoNames(nn.Module):
    """Layers that are attributes and parts of a Sequential; a norm that is called by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.features = nn.Sequential(self.conv, self.norm)
        self.last, self.last_norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last_norm(input=self.last(self.features(x)))


@torch.no_grad()
def test_a_norm_of_two_names_or_called_by_keyword_is_folded() -> None:
    model = with_statistics(TwoNames)
    x = torch.randn(2, 3, 5, 5)
    before = model(x)
    assert [fold.note for fold in fold_bn_(model)] == ["folded", "folded"]
    assert model.norm is model.features[1]
    torch.testing.assert_close(model(x), before)


class Add(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.add = nn.Conv2d(3, 3, 1), Add()

    def forward(self, x: Tensor) -> Tensor:
        return self.add(self.add(self.conv(x), x), x)


def test_a_block_whose_addition_is_a_module_of_its_own_is_a_block() -> None:
    model = nn.Sequential(Residual(), Residual())
    units = find_units(model, ["0.conv", "1.conv"], "block")
    assert [(unit.name, unit.layers) for unit in units] == [("0", ("0.conv",)), ("1", ("1.conv",))]


class Wrapped(nn.Module):
    """A backbone that adds positions to its tokens, before two residual blocks."""

    def __init__(self, *, sliced: bool) -> None:
        super().__init__()
        self.patch, self.sliced = nn.Linear(3, 3), sliced
        self.position = nn.Parameter(torch.zeros(1, 4, 3))
        self.blocks = nn.Sequential(Tokens(), Tokens())

    def forward(self, x: Tensor) -> Tensor:
        position = self.position[:, : x.shape[1]] if self.sliced else self.position
        return self.blocks(self.patch(x) + position)


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(3, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.add(x, other=self.down(self.up(x)))


@pytest.mark.parametrize("sliced", [False, True])
def test_a_parameter_that_is_added_makes_no_block(sliced: bool) -> None:
    model = nn.Sequential(Wrapped(sliced=sliced), nn.Linear(3, 2))
    layers = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    units = find_units(model, layers, "block")
    assert [u.name for u in units] == ["0.patch", "0.blocks.0", "0.blocks.1", "1"]


class Halves(nn.Module):
    """A block that is called, and the parts of one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = Tokens(), Tokens()

    def forward(self, x: Tensor) -> Tensor:
        return self.b.down(self.b.up(self.a(x)))


def test_a_block_that_is_never_called_is_no_unit() -> None:
    model, images = Halves(), torch.zeros(2, 4, 3)
    assert unfit(model, ["a", "b.up", "b.down"], images) == {}
    assert unfit(model, ["a", "b"], images) == {"b": "is not called, only what is inside it"}


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


def test_a_network_that_fx_cannot_trace_is_refused_in_one_line() -> None:
    with pytest.raises(ValueError, match=r"^Branching cannot be traced by torch\.fx") as error:
        fold_bn_(Branching())
    assert "\n" not in str(error.value)


def test_layer_granularity_compares_after_the_activation_that_follows() -> None:
    model = with_statistics(torchvision.models.mobilenet_v2)
    fold_bn_(model)
    layers = [layer.name for layer in trace(model, (3, 64, 64))]
    units = {u.name: u for u in find_units(model, layers, "layer")}
    assert list(units) == layers
    relu6 = units["features.2.conv.0.0"].activation
    assert relu6 is not None
    assert relu6(torch.tensor([-1.0, 9.0])).tolist() == [0.0, 6.0]
    assert units["features.2.conv.2"].activation is None  # the linear bottleneck


class Readers(nn.Module):
    """A convolution whose ReLU is behind what does nothing, and one that a sum reads too."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(3, 3, 1) for _ in range(3))
        self.nothing = nn.Sequential(nn.Identity(), nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.nothing(self.a(x)).relu())
        return self.c(y.relu() * y)


def test_an_activation_counts_where_it_alone_reads_the_layer_through_whatever_does_nothing() -> (
    None
):
    units = {u.name: u for u in find_units(Readers(), ["a", "b", "c"], "layer")}
    assert [units[name].activation is not None for name in "abc"] == [True, False, False]


class Merged(nn.Module):
    """Two windows of an image in the batch, which `merge` puts together again."""

    def __init__(self) -> None:
        super().__init__()
        self.merge = nn.Sequential(nn.Unflatten(0, (-1, 2)), nn.Flatten(1), nn.Linear(6, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.merge(x.reshape(-1, 3))


def test_a_unit_that_puts_windows_together_is_unfit() -> None:
    found = unfit(Merged(), ["merge", "merge.2"], torch.zeros(5, 2, 3))
    assert found == {"merge": "sees patches of an image, or tokens, in place of the batch"}


class Awkward(nn.Module):
    """A norm that runs twice, a convolution that does, and a norm without running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Conv2d(3, 3, 1) for _ in range(4))
        self.twice, self.norm_c, self.norm_d = (nn.BatchNorm2d(3) for _ in range(3))
        self.batch = nn.BatchNorm2d(3, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(self.b(self.twice(self.a(x))))
        x = self.norm_d(self.c(self.norm_c(self.c(x))))
        return self.batch(self.d(x))


@torch.no_grad()
def test_norms_that_run_twice_or_measure_the_batch_stay() -> None:
    model = Awkward().eval()
    for norm in (model.twice, model.norm_c, model.norm_d):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.running_mean)  # type: ignore[arg-type]
    x = torch.randn(2, 3, 5, 5)
    before = model(x)
    assert [fold.note for fold in fold_bn_(model)] == [
        *4 * ["called more than once"],
        "no running statistics",
    ]
    assert torch.equal(model(x), before)


@torch.no_grad()
def test_a_norm_without_parameters_folds_with_its_epsilon() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, affine=False, eps=0.5)).eval()
    model[1].running_var.uniform_(0.1, 0.5)  # type: ignore[union-attr, operator]
    model[1].running_mean.normal_()  # type: ignore[union-attr, operator]
    x = torch.randn(2, 3, 5, 5)
    before = model(x)
    assert [fold.conv for fold in fold_bn_(model)] == ["0"]
    torch.testing.assert_close(model(x), before)


def test_a_norm_after_a_computed_weight_is_left_alone() -> None:
    conv = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3))
    model = nn.Sequential(conv, nn.BatchNorm2d(4)).eval()
    model[1].running_var.fill_(4.0)  # type: ignore[union-attr,operator]
    x = torch.randn(2, 3, 8, 8)
    before = model(x)
    (fold,) = fold_bn_(model)
    assert (fold.conv, fold.note) == (None, "0 computes its weight in each pass")
    assert torch.equal(model(x), before)
