"""The networks: published sizes, shortcuts, and what `build_model` accepts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from qexp.data.cifar import CIFAR10
from qexp.errors import ConfigError
from qexp.models.build import build_model
from qexp.models.load import load_state
from qexp.models.resnet import PadShortcut, ResNet
from qexp.quant.trace import trace

CONFIGS = Path(__file__).parent.parent / "configs"
DATA = Path(__file__).parent.parent / "data"

# Parameters with as many classes as the weights have that people compare with.
SIZES = {
    "resnet20": (10, 269_722),
    "resnet32": (10, 464_154),
    "resnet56": (10, 853_018),
    "resnet18": (1000, 11_689_512),
    "resnet34": (1000, 21_797_672),
    "resnet50": (1000, 25_557_032),
    "mobilenet_v2": (1000, 3_504_872),
    "mnasnet": (1000, 4_383_312),
    "regnetx_600mf": (1000, 6_196_040),
}


def model_config(name: str) -> Any:
    return OmegaConf.load(CONFIGS / "model" / f"{name}.yaml")


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", SIZES)
def test_network_has_the_published_number_of_parameters(name: str) -> None:
    classes, parameters = SIZES[name]
    assert count(build_model(model_config(name), classes, 3)) == parameters


NETWORKS = sorted({p.stem for p in (CONFIGS / "model").glob("*.yaml")} - {"custom"})


@pytest.mark.parametrize("name", NETWORKS)
def test_every_config_builds_a_network_without_inplace_operations(name: str) -> None:
    model = build_model(model_config(name), 7, 3).eval()
    assert not any(getattr(m, "inplace", False) for m in model.modules())
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 7)


@pytest.mark.parametrize("name", ["resnet8", "mobilenet_v2_cifar"])
def test_small_image_networks_take_grey_images(name: str) -> None:
    model = build_model(model_config(name), 10, 1).eval()
    assert model(torch.zeros(2, 1, 28, 28)).shape == (2, 10)


def test_pad_shortcut_keeps_every_second_pixel_between_zero_channels() -> None:
    x = torch.arange(1.0, 33.0).reshape(1, 2, 4, 4)
    y = PadShortcut(extra=2, stride=2)(x)
    assert y.shape == (1, 4, 2, 2)
    torch.testing.assert_close(y[:, 1:3], x[:, :, ::2, ::2], rtol=0, atol=0)
    assert y[:, 0].abs().max() == 0
    assert y[:, 3].abs().max() == 0


@pytest.mark.parametrize("size", [(4, 4), (5, 7)])
def test_compiled_pad_shortcut_is_the_eager_one(size: tuple[int, int]) -> None:
    shortcut = PadShortcut(extra=3, stride=2)
    compiled = torch.compile(shortcut, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 4, *size, requires_grad=True)
    y, z = shortcut(x), compiled(x)
    torch.testing.assert_close(z, y, rtol=0, atol=0)
    e = torch.randn_like(y)
    want, got = (torch.autograd.grad(out, x, e)[0] for out in (y, z))
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_projection_shortcut_adds_two_convolutions_with_batch_norm() -> None:
    pad, projection = ResNet(20, 10), ResNet(20, 10, shortcut="projection")
    extra = 16 * 32 + 2 * 32 + 32 * 64 + 2 * 64
    assert count(projection) - count(pad) == extra


def test_width_multiplies_channels() -> None:
    assert ResNet(8, 10, width=2.0).linear.in_features == 128
    assert ResNet(8, 10, width=0.5)(torch.zeros(2, 3, 8, 8)).shape == (2, 10)


def test_resnet20_has_twenty_layers_of_which_only_the_first_sees_signed_inputs() -> None:
    layers = trace(ResNet(20, 10), (3, 32, 32))
    assert len(layers) == 20
    assert sum(layer.macs for layer in layers) == 40_551_040
    assert [layer.signed for layer in layers] == [True] + [False] * 19


def test_cifar_mobilenet_reaches_the_classifier_with_four_by_four_pixels() -> None:
    layers = trace(build_model(model_config("mobilenet_v2_cifar"), 10, 3), (3, 32, 32))
    assert layers[-2].act_shape == (320, 4, 4)
    assert any(layer.kind == "depthwise" for layer in layers)


def test_resnet_compiles_into_one_graph_equal_to_eager() -> None:
    model = ResNet(8, 10).eval()
    x = torch.randn(2, 3, 16, 16)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), model(x))


def outputs(classes: int, hidden: int) -> nn.Module:
    return nn.Sequential(nn.Linear(3, hidden), nn.Linear(hidden, classes))


BAD = [
    ({"_target_": "qexp.models.resnet.ResNet", "depth": 21}, 3, r"depth=21 is not 6n \+ 2"),
    ({"_target_": "qexp.models.resnet.ResNet", "depth": 2}, 3, r"depth=2 is not 6n \+ 2"),
    ({"_target_": "qexp.models.resnet.ResNet", "depth": 8, "shortcut": "B"}, 3, "pad or projec"),
    ({"_target_": "qexp.models.resnet.ResNet", "depth": 8, "width": 0}, 3, "width=0 is not posi"),
    ({"_target_": "qexp.models.resnet.ResNet", "dept": 8}, 3, "no keyword 'dept'.*'depth'"),
    ({"_target_": "qexp.models.resnet.ResNet"}, 3, "cannot be built: .*depth"),
    ({"_target_": "qexp.models.resnet.ResNett"}, 3, "no model 'ResNett'. Did you mean 'ResNet'"),
    ({"_target_": "torchvision.models.resnet"}, 3, r"no model 'resnet'. Did you mean 'resnet\d+'"),
    ({"_target_": "nowhere.net"}, 3, "cannot be imported"),
    ({"_target_": "net"}, 3, "is not package.module.name"),
    (
        {"_target_": "torchvision.models.resnet18"},
        1,
        "takes images of 3 channels, .* has 1. Give torchvision.models.resnet18 a keyword in_chan",
    ),
    (
        {"_target_": "test_models.outputs", "hidden": 3},
        3,
        "test_models.outputs does not take num_classes, .* Give it that keyword",
    ),
    (
        {"_target_": "torchvision.models.resnet18", "weights": "IMAGENET1K_V1"},
        3,
        "Use model.checkpoint=IMAGENET1K_V1",
    ),
    ({"_target_": "torchvision.models.resnet18", "dept": 8}, 3, "cannot be built: .*dept"),
]


@pytest.mark.parametrize(("config", "channels", "message"), BAD)
def test_wrong_model_config_is_one_line(config: Any, channels: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        build_model(config, 10, channels)
    assert "\n" not in str(error.value)


@pytest.mark.slow
@pytest.mark.skipif(not (DATA / "checkpoints").is_dir(), reason="needs data/ (CIFAR-10, weights)")
@pytest.mark.parametrize(("depth", "top1"), [(20, 91.73), (32, 92.63), (56, 93.39)])
def test_published_checkpoint_reaches_its_top1_on_cifar10(depth: int, top1: float) -> None:
    node = OmegaConf.load(CONFIGS / "dataset" / "cifar10.yaml")
    dataset = CIFAR10(
        name="cifar10",
        root=str(DATA),
        mean=node.mean,
        std=node.std,
        pad=0,
        flip=False,
        batch_size=500,
    )
    model = build_model(model_config(f"resnet{depth}"), 10, 3)
    load_state(model, DATA / "checkpoints" / f"cifar10_resnet{depth}_akamaster.pt")
    model.eval()
    with torch.no_grad():
        right = sum((model(x).argmax(1) == y).sum() for x, y in dataset.eval_batches("test"))
    assert round(100 * int(right) / 10_000, 2) == top1
