"""Batched augmentation of small uint8 images on their device; random per image.

No Python loop and no float image until the batch is cut out: a crop is one gather from a strided
view of the padded images, which moves H*W bytes per image.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from qexp.data.sampling import generator
from qexp.errors import ConfigError


def pad_images(images: Tensor, pad: int) -> Tensor:
    """Black border of `pad` pixels, as RandomCrop(size, padding=pad) has. Shape: [N, C, H, W]."""
    return F.pad(images, (pad, pad, pad, pad)) if pad else images


def draw_crops(size: int, pad: int, flip: bool, seed: int, epoch: int) -> Tensor:
    """Random (top, left, flipped) of every image place in an epoch's order.

    Shape: [size, 3] int64; top and left in [0, 2 * pad], flipped in {0, 1}.
    """
    g = generator("augment", seed, epoch)
    corners = torch.randint(0, 2 * pad + 1, (size, 2), generator=g)
    flipped = torch.randint(0, 2, (size, 1), generator=g) * int(flip)
    return torch.cat([corners, flipped], dim=1)


def crop_flip(padded: Tensor, index: Tensor, crops: Tensor, height: int, width: int) -> Tensor:
    """Cut one window out of each chosen image and mirror some.

    Shape: padded [N, C, H + 2p, W + 2p], index [B], crops [B, 3] -> [B, C, H, W].
    """
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # [N, C, 2p+1, 2p+1, H, W], a view
    x = windows[index, :, crops[:, 0], crops[:, 1]]  # [B, C, H, W]
    return torch.where(crops[:, 2].bool()[:, None, None, None], x.flip(3), x)


def normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(images / 255 - mean) / std in float32, bit for bit as torchvision's ToTensor, Normalize.

    Shape: images uint8 [B, C, H, W], mean and std [C, 1, 1] -> float32 [B, C, H, W].
    """
    # By a tensor: CUDA takes a number's reciprocal and multiplies, another last bit.
    return images.float().div_(mean.new_full((), 255)).sub_(mean).div_(std)


def per_channel(key: str, values: Sequence[float], channels: int, name: str) -> Tensor:
    """Mean or std of a config as a tensor. Shape: [C, 1, 1].

    Raises:
        ConfigError: not one value per channel, or a std that is not positive.
    """
    if len(values) != channels:
        raise ConfigError(
            f"config: dataset.{key} must have {channels} values, one per channel of {name}, "
            f"got {len(values)}."
        )
    tensor = torch.tensor([float(v) for v in values])
    if key == "std" and not bool((tensor > 0).all()):
        raise ConfigError(f"config: dataset.std must be positive, got {list(values)}.")
    return tensor[:, None, None]
