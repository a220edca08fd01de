"""What training minimises: cross-entropy, and a teacher's logits when there is one."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qexp.recipes.settings import Settings


def training_loss(
    forward: Any, teacher: nn.Module | None, x: Tensor, y: Tensor, s: Settings
) -> tuple[Tensor, Tensor]:
    """Mean loss of a micro-batch, and how many it gets right.

    Args:
        forward: gives the logits, [N, classes].
        teacher: float network whose logits are learned too, with `s.distill`; or None.
        x: images, [N, C, H, W].
        y: classes, [N].
    """
    with torch.autocast(x.device.type, torch.bfloat16, enabled=s.amp):
        if s.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        logits = forward(x)
    logits = logits.float()
    loss = F.cross_entropy(logits, y, label_smoothing=s.label_smoothing)
    if teacher is not None:
        with torch.no_grad(), torch.autocast(x.device.type, torch.bfloat16, enabled=s.amp):
            target = teacher(x).float()
        t = s.distill.temperature
        kl = F.kl_div(
            F.log_softmax(logits / t, 1),
            F.log_softmax(target / t, 1),
            reduction="batchmean",
            log_target=True,
        )
        loss = (1 - s.distill.weight) * loss + s.distill.weight * t * t * kl
    return loss, (logits.detach().argmax(1) == y).sum()
