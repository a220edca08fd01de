"""Made images, for tests and speed measurements: any size, no files.

Each class has a smooth random pattern (a 4x4 grid of colours, enlarged); an image is its class's
pattern plus pixel noise. A network learns it within a few steps. Same arguments, same images.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from qexp.data.memory import Images, InMemory
from qexp.data.sampling import generator
from qexp.errors import ConfigError


@dataclass(kw_only=True)
class Synthetic(InMemory):
    """Class patterns with noise.

    Args:
        classes: number of classes.
        image_size: height and width, pixels.
        channels: 1 or 3, or any number.
        train_images, test_images: how many of each.
        noise: standard deviation of the pixel noise, grey values (0 to 255).
    """

    classes: int = 10
    image_size: int = 32
    channels: int = 3
    train_images: int = 2048
    test_images: int = 512
    noise: float = 32.0

    by_settings: ClassVar[bool] = True  # other settings, other images of the same name

    def read(self) -> Images:
        for key in ("classes", "image_size", "channels", "train_images", "test_images"):
            value = getattr(self, key)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"config: dataset.{key}={value} is not a positive integer.")
        if self.train_images < self.classes:
            raise ConfigError(
                f"config: dataset.train_images={self.train_images} is less than one image for each "
                f"of {self.classes} classes. Raise it."
            )
        size = (self.image_size, self.image_size)
        grid = torch.rand(self.classes, self.channels, 4, 4, generator=generator("patterns"))
        patterns = F.interpolate(32 + 192 * grid, size, mode="bilinear", align_corners=True)
        return Images(
            *self._make(patterns, "train", self.train_images),
            *self._make(patterns, "test", self.test_images),
        )

    def _make(self, patterns: Tensor, split: str, count: int) -> tuple[Tensor, Tensor]:
        labels = torch.arange(count) % self.classes
        images = torch.empty(count, *patterns.shape[1:], dtype=torch.uint8)
        g = generator("noise", split)
        for i in range(0, count, 256):  # 256 images at a time bounds the float copy
            part = patterns[labels[i : i + 256]]
            noise = self.noise * torch.randn(part.shape, generator=g)
            images[i : i + 256] = (part + noise).round().clamp(0, 255).to(torch.uint8)
        return images, labels
