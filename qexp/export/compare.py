"""How far another form of a network is from the network, on images."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Difference(NamedTuple):
    """What another form of a network does to the logits.

    Attributes:
        images: how many were compared.
        median, largest: over images, of the largest |difference| of an image's logits.
        scale: largest |logit| of the network itself.
        other_top1: images whose most probable class is another one.
    """

    images: int
    median: float
    largest: float
    scale: float
    other_top1: int

    def __str__(self) -> str:
        return (
            f"on {self.images} training images logits differ by {self.median:.2g} "
            f"(median of an image's largest; worst {self.largest:.2g}; logits reach "
            f"{self.scale:.3g}), {self.other_top1} have another top-1"
        )


@torch.no_grad()
def difference(
    network: Callable[[Tensor], Tensor], other: Callable[[Tensor], Tensor], images: Tensor
) -> Difference:
    """Compare `other` with `network`. Shape: images [N, C, H, W]; both return [N, classes]."""
    batches = images.split(64)
    ours = torch.cat([network(x) for x in batches])
    theirs = torch.cat([other(x) for x in batches])
    worst = (theirs - ours).abs().amax(1)
    return Difference(
        images=len(images),
        median=worst.median().item(),
        largest=worst.max().item(),
        scale=ours.abs().max().item(),
        other_top1=int((theirs.argmax(1) != ours.argmax(1)).sum()),
    )
