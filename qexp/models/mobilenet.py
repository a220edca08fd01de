"""MobileNetV2 for 32x32 images.

Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", CVPR 2018
(arXiv:1801.04381), table 2, with strides adapted: the stem and the second stage keep the image's
size, so 32x32 pixels end as 4x4 instead of 1x1. Everything else, the parameter names included, is
torchvision's MobileNetV2. Two linear bottlenecks in a row make signed inputs, unlike a ResNet.
"""

from __future__ import annotations

from torch import nn
from torchvision.models import MobileNetV2

from qexp.errors import ConfigError

# expansion, channels, repeats, stride; the paper has strides 1 2 2 2 1 2 1 after a stem of 2
STAGES = [
    [1, 16, 1, 1],
    [6, 24, 2, 1],
    [6, 32, 3, 2],
    [6, 64, 4, 2],
    [6, 96, 3, 1],
    [6, 160, 3, 2],
    [6, 320, 1, 1],
]


def mobilenet_v2_cifar(
    num_classes: int, in_channels: int = 3, width: float = 1.0, dropout: float = 0.0
) -> nn.Module:
    """MobileNetV2 with a stem of stride 1.

    Shape: x [N, in_channels, 32, 32] -> logits [N, num_classes].

    Args:
        num_classes: number of classes.
        in_channels: channels of the image.
        width: multiplies all channels.
        dropout: probability before the classifier.

    Raises:
        ConfigError: width not positive.
    """
    if not width > 0:
        raise ConfigError(f"config: model.width={width} is not positive. Use 1.0.")
    model = MobileNetV2(
        num_classes=num_classes,
        width_mult=width,
        inverted_residual_setting=STAGES,
        dropout=dropout,
    )
    stem = model.get_submodule("features.0")
    assert isinstance(stem, nn.Sequential)
    channels = model.get_parameter("features.0.0.weight").shape[0]
    conv = nn.Conv2d(in_channels, channels, 3, stride=1, padding=1, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out")  # as torchvision does
    stem[0] = conv
    return model
