"""Integers packed at their true width.

Code i of a layer takes the bits [i * width, (i + 1) * width) of a stream; bit k of the stream is
bit k % 8 (from the least significant) of byte k // 8. The last byte is padded with zeros. So two
4-bit codes share a byte, the first in the low half, and 3-bit codes cross the bytes.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

MAX_WIDTH = 17  # a released 16-bit grid would overflow its 16 bits by one


def packed_size(count: int, width: int) -> int:
    """Bytes of `count` codes of `width` bits."""
    return -(-count * width // 8)


def pack(codes: Tensor, width: int) -> Tensor:
    """Codes in [0, 2**width) of any shape -> bytes, uint8 [packed_size]."""
    values = codes.reshape(-1).cpu().numpy().astype(np.int64)
    if values.size and not 0 <= values.min() <= values.max() < 1 << width:
        raise ValueError(f"codes from {values.min()} to {values.max()} do not fit {width} bits")
    planes = (values[:, None] >> np.arange(width) & 1).astype(np.uint8)  # [N, width]
    return torch.from_numpy(np.packbits(planes.reshape(-1), bitorder="little"))


def unpack(data: Tensor, width: int, count: int) -> Tensor:
    """Bytes -> `count` codes in [0, 2**width), int32 [count].

    Raises:
        ValueError: `data` has another length than `packed_size(count, width)`, or bits that are
            not zero behind the last code.
    """
    if data.numel() != packed_size(count, width):
        raise ValueError(f"{data.numel()} bytes cannot hold {count} codes of {width} bits")
    planes = np.unpackbits(data.numpy(), bitorder="little")
    if planes[count * width :].any():
        raise ValueError("the bits behind the last code are not zero")
    planes = planes[: count * width]
    codes = np.zeros(count, dtype=np.int32)
    for k in range(width):
        codes |= planes[k::width].astype(np.int32) << k
    return torch.from_numpy(codes)
