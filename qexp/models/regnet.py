"""RegNetX-600MF, which torchvision does not have.

Radosavovic et al., "Designing Network Design Spaces", CVPR 2020 (arXiv:2003.13678). torchvision
has RegNetX-400MF and 800MF but not this one; it is built here from torchvision's blocks with the
parameters of the authors' configuration: depth 16, w_0 48, w_a 36.97, w_m 2.24, groups of 24
channels (6,196,040 parameters with 1000 classes).
"""

from __future__ import annotations

from torch import nn
from torchvision.models.regnet import BlockParams, RegNet


def regnet_x_600mf(num_classes: int) -> nn.Module:
    """RegNetX-600MF. Shape: x [N, 3, H, W] -> logits [N, num_classes]."""
    params = BlockParams.from_init_params(depth=16, w_0=48, w_a=36.97, w_m=2.24, group_width=24)
    return RegNet(params, num_classes=num_classes)
