"""ResNets for small images: ResNet-8, 20, 32, 56.

He et al., "Deep Residual Learning for Image Recognition", CVPR 2016 (arXiv:1512.03385), section
4.2: a 3x3 convolution, three stages of n blocks of two 3x3 convolutions with 16, 32, 64 channels
(depth = 6n + 2), global average, one linear layer. The first block of stages two and three halves
the image.

Shortcuts where the shape changes:
    pad         option A, no parameters: every second pixel, zero channels before and after
    projection  option B: 1x1 convolution and batch norm

Parameter names and initialisation are those of akamaster/pytorch_resnet_cifar10, whose published
checkpoints load strictly: 269,722 / 464,154 / 853,018 parameters for ResNet-20 / 32 / 56.
No operation is in place, so a hook may keep any tensor it sees.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qexp.errors import ConfigError


class PadShortcut(nn.Module):
    """Option A: x[:, :, ::2, ::2] with `extra` zero channels, half before and half after.

    Shape: [N, C, H, W] -> [N, C + extra, ceil(H/stride), ceil(W/stride)].
    """

    def __init__(self, extra: int, stride: int) -> None:
        super().__init__()
        self.before, self.after = extra // 2, extra - extra // 2
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            # The same pixels, as a pool of one each: in backward the compiler then stores what
            # comes back to them, which it would compute again at each of its three uses. The pool
            # keeps x for backward, which float has to and a quantized block else would not.
            x = F.avg_pool2d(x, 1, self.stride)
        else:
            x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, self.before, self.after))


def make_shortcut(kind: str, in_planes: int, planes: int, stride: int) -> nn.Module:
    """What carries x around a block: itself where the shape stays, else `pad` or `projection`."""
    if stride == 1 and in_planes == planes:
        return nn.Sequential()
    if kind == "pad":
        return PadShortcut(planes - in_planes, stride)
    return nn.Sequential(
        nn.Conv2d(in_planes, planes, 1, stride=stride, bias=False), nn.BatchNorm2d(planes)
    )


class BasicBlock(nn.Module):
    """relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x)). Shape: [N, C, H, W]."""

    def __init__(self, in_planes: int, planes: int, stride: int, shortcut: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.shortcut = make_shortcut(shortcut, in_planes, planes, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """A CIFAR ResNet.

    Shape: x [N, in_channels, H, W], H and W at least 4 -> logits [N, num_classes].

    Args:
        depth: number of weighted layers, 6n + 2: 8, 14, 20, 32, 44, 56, 110.
        num_classes: number of classes.
        in_channels: channels of the image.
        shortcut: `pad` or `projection` (module docstring).
        width: multiplies the 16, 32, 64 channels.

    Raises:
        ConfigError: depth is not 6n + 2, unknown shortcut, width not positive.
    """

    def __init__(
        self,
        depth: int,
        num_classes: int,
        in_channels: int = 3,
        shortcut: str = "pad",
        width: float = 1.0,
    ) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 2, 6)
        if rest or blocks < 1:
            raise ConfigError(f"config: model.depth={depth} is not 6n + 2. Use 8, 20, 32 or 56.")
        if shortcut not in ("pad", "projection"):
            raise ConfigError(
                f"config: model.shortcut={shortcut!r} is not an option. Use pad or projection."
            )
        if not width > 0:
            raise ConfigError(f"config: model.width={width} is not positive. Use 1.0.")
        planes = [max(1, round(c * width)) for c in (16, 32, 64)]
        self.conv1 = nn.Conv2d(in_channels, planes[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes[0])
        self.layer1 = self._stage(planes[0], planes[0], blocks, 1, shortcut)
        self.layer2 = self._stage(planes[0], planes[1], blocks, 2, shortcut)
        self.layer3 = self._stage(planes[1], planes[2], blocks, 2, shortcut)
        self.linear = nn.Linear(planes[2], num_classes)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight)

    @staticmethod
    def _stage(
        in_planes: int, planes: int, blocks: int, stride: int, shortcut: str
    ) -> nn.Sequential:
        first = BasicBlock(in_planes, planes, stride, shortcut)
        rest = [BasicBlock(planes, planes, 1, shortcut) for _ in range(blocks - 1)]
        return nn.Sequential(first, *rest)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean(dim=(2, 3)))
