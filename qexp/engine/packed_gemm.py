"""The way on a GPU: weights stay packed in memory, a Triton kernel expands them in registers.

One launch is a layer: an implicit matrix product over im2col that never exists, int8 times int8
summed in int32 by the tensor cores. What a program reads of the weight are the file's own bytes
(`qexp.export.bits`), `width` bits a code, two neighbouring bytes where a code crosses; a code
becomes up to three 8-bit integers through a table of one entry a level (`weight.Planes`), and these
never leave the program. So uniform and non-uniform weights cost the same memory traffic.

    Every sum up to the rescale is exact; the rescale is that of `gemm`, in float32.

What was shown: Triton's interpreter runs this kernel on the CPU and gives what `reference` gives
(tests), and its compiler makes 8-bit tensor-core instructions without spills of it for NVIDIA's
sm_80 and sm_90 (tests). Its speed was not measured: no GPU was at hand.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from typing import Any, cast

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, nn

from qexp.engine.gemm import largest_sum
from qexp.engine.weight import Planes, Weight, planes
from qexp.engine.window import Window
from qexp.errors import ConfigError
from qexp.export.bits import pack

TILE = {"BM": 64, "BN": 32, "BK": 32}  # pixels, output channels, inputs; tl.dot of int8: BK >= 32
OPTIONS = {"enable_fp_fusion": False}  # the rescale rounds as torch does
MAX_WIDTH = 8  # bits of a code: it lies in two bytes
LARGEST = 2**31 - 1  # elements of a tensor, and bits of a weight, that a 32-bit offset reaches


def conv_packed(  # type: ignore[no-untyped-def]
    x_ptr,  # int8 [N, C_in, H, W], less SHIFT
    w_ptr,  # uint8, codes of [C_out, K] as a stream of bits, one byte of padding
    table_ptr,  # int8 [PLANES, R, LEVELS], R is 1 or C_out
    scale_ptr,  # float32 [PLANES, C_out]: step of the weight times factor of the plane
    added_ptr,  # int32 [PLANES, C_out]: SHIFT times the sum of the weights
    step_ptr,  # float32 [1 or N]: step of the input
    y_ptr,  # float32 [N, C_out, OH, OW]
    pixels,  # N * OH * OW
    channels,  # C_in
    outputs,  # C_out
    height,
    width,
    out_height,
    out_width,
    step_stride,  # 0 or 1
    row_stride,  # LEVELS, or 0 where all output channels share the table
    table_stride,  # R * LEVELS
    own_channels,  # C_in / groups
    own_outputs,  # C_out / groups
    KH: tl.constexpr,
    KW: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    DH: tl.constexpr,
    DW: tl.constexpr,
    BITS: tl.constexpr,
    PLANES: tl.constexpr,
    SHIFT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """One tile [BM pixels, BN outputs] of a group. Grid: tiles of pixels, of outputs; groups."""
    group = tl.program_id(2)
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    local = tl.program_id(1) * BN + tl.arange(0, BN)
    o = group * own_outputs + local
    m_ok, o_ok = m < pixels, local < own_outputs
    area = out_height * out_width
    n, p = m // area, m % area
    top, left = p // out_width * SH - PH, p % out_width * SW - PW
    first = n * channels + group * own_channels  # the group's first channel of the sample
    inputs = own_channels * KH * KW

    sums0 = tl.full((BM, BN), 0, tl.int32)  # not tl.zeros: it is no builtin, and the
    # interpreter then needs its setting before triton is imported
    sums1 = tl.full((BM, BN), 0, tl.int32)
    sums2 = tl.full((BM, BN), 0, tl.int32)
    for start in range(0, inputs, BK):
        k = start + tl.arange(0, BK)
        k_ok = k < inputs
        c, tap = k // (KH * KW), k % (KH * KW)
        row = top[:, None] + (tap // KW * DH)[None, :]
        column = left[:, None] + (tap % KW * DW)[None, :]
        inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
        at = ((first[:, None] + c[None, :]) * height + row) * width + column
        x = tl.load(x_ptr + at, mask=inside & m_ok[:, None] & k_ok[None, :], other=-SHIFT)

        ok = k_ok[:, None] & o_ok[None, :]
        bit = (o[None, :] * inputs + k[:, None]) * BITS
        code = tl.load(w_ptr + bit // 8, mask=ok, other=0).to(tl.int32)
        if 8 % BITS != 0:  # type: ignore[operator]  # a code may cross into the next byte
            code |= tl.load(w_ptr + bit // 8 + 1, mask=ok, other=0).to(tl.int32) << 8
        code = (code >> bit % 8) & ((1 << BITS) - 1)  # type: ignore[operator]
        level = table_ptr + o[None, :] * row_stride + code
        sums0 = tl.dot(x, tl.load(level, mask=ok, other=0), sums0, out_dtype=tl.int32)
        if PLANES > 1:
            w = tl.load(level + table_stride, mask=ok, other=0)
            sums1 = tl.dot(x, w, sums1, out_dtype=tl.int32)
        if PLANES > 2:
            w = tl.load(level + 2 * table_stride, mask=ok, other=0)
            sums2 = tl.dot(x, w, sums2, out_dtype=tl.int32)

    step = tl.load(step_ptr + n * step_stride, mask=m_ok, other=0.0)[:, None]
    scale = tl.load(scale_ptr + o, mask=o_ok, other=0.0)[None, :]
    sums0 += tl.load(added_ptr + o, mask=o_ok, other=0)[None, :]
    y = sums0.to(tl.float32) * (step * scale)
    if PLANES > 1:
        scale = tl.load(scale_ptr + outputs + o, mask=o_ok, other=0.0)[None, :]
        sums1 += tl.load(added_ptr + outputs + o, mask=o_ok, other=0)[None, :]
        y += sums1.to(tl.float32) * (step * scale)
    if PLANES > 2:
        scale = tl.load(scale_ptr + 2 * outputs + o, mask=o_ok, other=0.0)[None, :]
        sums2 += tl.load(added_ptr + 2 * outputs + o, mask=o_ok, other=0)[None, :]
        y += sums2.to(tl.float32) * (step * scale)
    to = (n * outputs)[:, None] * area + o[None, :] * area + p[:, None]
    tl.store(y_ptr + to, y, mask=m_ok[:, None] & o_ok[None, :])


def _levels(weight: Weight) -> Planes:
    """The table: each output channel's levels as planes, int8 [P, C_out, L]."""
    codes = weight.how.qmin + torch.arange(weight.how.levels, dtype=torch.int32)
    return planes(dataclasses.replace(weight, codes=codes.expand(len(weight.codes), -1)))


@cache
def _kernel(interpreted: bool) -> Any:
    return triton.jit(conv_packed)  # looks at the same setting


def interpreted() -> bool:
    """Whether TRITON_INTERPRET asks for Triton's interpreter, which runs kernels on the CPU."""
    return bool(triton.knobs.runtime.interpret)  # type: ignore[attr-defined]


class PackedGemm(nn.Module):
    """A layer's multiplication. Arguments and call as `Reference`; on a GPU, or interpreted.

    Raises:
        ConfigError: weights or inputs of more than 8 bits.
    """

    def __init__(self, weight: Weight, window: Window, low: int, high: int) -> None:
        super().__init__()
        self.window = window
        self.width = weight.how.width
        self.shift = 128 if high > 127 else 0
        if self.width > MAX_WIDTH:
            raise ConfigError(
                f"engine: engine=triton takes weights of up to {MAX_WIDTH} bits, a layer has "
                f"{self.width}. Use engine=integer."
            )
        if weight.codes.numel() * self.width > LARGEST:
            raise ConfigError("engine: a layer's weight is too large for engine=triton.")
        if low - self.shift < -128 or high - self.shift > 127:
            raise ConfigError(
                f"engine: engine=triton takes inputs of up to 8 bits, a layer has {low} to {high}. "
                "Use engine=integer."
            )
        self.outputs = len(weight.codes)
        found = _levels(weight)
        table = found.planes  # [P, C_out, L]
        index = weight.index.flatten(1).expand(len(table), -1, -1)
        weights = table.gather(2, index)
        sums = weights.sum(2, dtype=torch.int32)  # of the weights, [P, C_out]
        rows = int(weights.long().abs().sum(2).max())
        if largest_sum(rows, low, high, self.shift) >= 2**31:
            raise ConfigError(
                "engine: a layer's sums need more than the 32 bits of engine=triton. Use "
                "engine=integer."
            )
        if bool((table == table[:, :1]).all()):
            table = table[:, :1]
        buffers = {
            # a byte of padding: the last code may look for a second one
            "packed": F.pad(pack(weight.index, self.width), (0, 1)),
            "table": table.contiguous(),
            "scale": torch.tensor(found.factors)[:, None] * found.step,
            "added": self.shift * sums,
        }
        for name, value in buffers.items():
            self.register_buffer(name, value, persistent=False)

    def forward(self, x_int: Tensor, step: Tensor) -> Tensor:
        """[N, C_in, H, W] integers -> step * conv(x_int, w), float32 [N, C_out, H', W']."""
        size = self.window.size(*x_int.shape[2:])
        step = step.float().reshape(-1)
        largest = max(x_int[0].numel(), self.outputs * size[0] * size[1])  # of one sample
        count = max(1, LARGEST // largest)
        if len(x_int) > count:  # offsets in the kernel have 32 bits
            steps = step.split(count) if len(step) > 1 else [step] * -(-len(x_int) // count)
            parts = zip(x_int.split(count), steps, strict=True)
            return torch.cat([self(part, own.reshape(-1, 1, 1, 1)) for part, own in parts])
        x = (x_int - self.shift if self.shift else x_int).to(torch.int8).contiguous()
        y = torch.empty(len(x), self.outputs, *size, device=x.device)
        groups = self.window.groups
        tiles = triton.cdiv(y[:, 0].numel(), TILE["BM"])
        grid = (tiles, triton.cdiv(self.outputs // groups, TILE["BN"]), groups)
        step = step.contiguous()
        launch = _kernel(interpreted())[grid]
        with torch.cuda.device(x.device) if x.is_cuda else nullcontext():  # else Triton's is cuda:0
            self._run(launch, x, y, step)
        return y

    def _run(self, launch: Callable[..., Any], x: Tensor, y: Tensor, step: Tensor) -> None:
        w, buffers = self.window, cast(Any, self)
        n, channels, height, width = x.shape
        own = self.outputs // w.groups
        _, rows, levels = buffers.table.shape
        launch(
            x,
            buffers.packed,
            buffers.table,
            buffers.scale,
            buffers.added,
            step,
            y,
            n * y.shape[2] * y.shape[3],
            channels,
            self.outputs,
            height,
            width,
            *y.shape[2:],
            int(len(step) > 1),
            levels if rows > 1 else 0,
            rows * levels,
            channels // w.groups,
            own,
            *w.kernel,
            *w.stride,
            *w.padding,
            *w.dilation,
            BITS=self.width,
            PLANES=len(buffers.table),
            SHIFT=self.shift,
            **TILE,
            **OPTIONS,
        )
