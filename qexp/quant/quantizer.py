"""The contract every quantizer keeps, and `Identity`, which keeps a tensor in float.

A quantizer maps a real tensor onto at most 2**bits levels. It is built from `bits` and its own
keywords; the layer swap (`convert.py`) adds the two facts it cannot know:

    signed   whether the tensor has negative values (weights always; activations as traced)
    shape    for a weight, the weight's shape [C_out, C_in/groups, kh, kw] or [C_out, C_in];
             for an activation, the receptive field of the layer it feeds: [C_in, kh, kw] or [C_in]

Invariants, each held by a test:

 1. `decode(codes(x), context(x)) == forward(x)` bit for bit in eval mode.
 2. `codes` are integers in [qmin, qmax], at most `num_levels` different ones.
 3. `num_levels <= 2**bits`, unless the class says otherwise by name; `effective_bits` is what the
    accounting uses, so a grid with more levels is charged for them.
 4. All state is in the state_dict, with its final shape since construction. `calibrate` fills it
    once; loading a checkpoint never calibrates. `calibrated` is a buffer.
 5. State is float32 whatever the dtype of x; forward returns the shape and dtype of x.
 6. `extra_bytes` counts all that decoding needs besides the codes.
 7. No implementation is inherited from another method: a method is one file.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from qexp.quant.functional import integer_range


def refuse_one_signed_bit(name: str, bits: int, signed: bool) -> None:
    """Refuse a grid of two's complement at 1 bit: its levels are -step and 0.

    Raises:
        ValueError: `bits` is 1 and values are signed.
    """
    if signed and bits == 1:
        raise ValueError(
            f"{name} needs at least 2 bits for signed values, got 1: its levels would be -step and "
            "0 (quantizer/weight=dorefa has one of either sign)"
        )


class Quantizer(nn.Module):
    """Base of all quantizers: the contract, no numerics.

    Args:
        bits: width of a code, 1 to 16.
        signed: whether codes may be negative.
        shape: of the weight, or of the receptive field (module docstring).
    """

    calibrated: Tensor

    # Set True by activation quantizers that work on im2col columns [N, C_in*kh*kw, L].
    on_columns = False

    # Whether compiling the whole network around it is faster than its compiled kernels alone;
    # `compile=auto` asks.
    fuses = True

    # Whether an input is quantized by what it is itself: its first axis must be the samples.
    by_sample = False

    # The axis of an input that counts the samples: 1 where tokens come before the batch.
    samples_axis = 0

    # Whether forward in eval mode repeats, bit for bit, the last forward in training: backward may
    # then quantize an input again instead of keeping the result.
    replays = True

    # Parameters that only scale the layer's result. A batch norm behind it takes that out again,
    # so their gradient is zero but for rounding, and it is no fault if they stand still.
    scales_output: tuple[str, ...] = ()

    # How its parameters are trained: the rate, as a multiple of the recipe's, and the weight decay
    # (None: the recipe's). Set by `train_with`.
    lr_scale: float = 1.0
    decay: float | None = None

    # Prefixes of state names that mean the same at any width; `rebits_` carries them over.
    carried: tuple[str, ...] = ()
    continues = False  # whether they were, from a trained quantizer of other bits

    def __init__(self, bits: int, *, signed: bool = True, shape: Sequence[int] = ()) -> None:
        super().__init__()
        if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= 16:
            raise ValueError(f"bits must be an integer from 1 to 16, got {bits!r}")
        self.bits = bits
        self.signed = signed
        self.shape = tuple(shape)
        self.qmin, self.qmax = integer_range(bits, signed)
        self.register_buffer("calibrated", torch.tensor(False))

    @property
    def kind(self) -> str:
        """The class, with those of its options that its state does not show and depends on."""
        return type(self).__name__

    @property
    def num_levels(self) -> int:
        """How many different codes there are."""
        return self.qmax - self.qmin + 1

    @property
    def effective_bits(self) -> float:
        """Bits the accounting charges: `bits`, or log2(levels) for a grid that overflows them."""
        return max(float(self.bits), math.log2(self.num_levels))

    def train_with(self, lr_scale: float = 1.0, decay: float | None = None) -> None:
        """Set how the parameters are trained, where the method says so itself.

        Args:
            lr_scale: multiplies the recipe's learning rate of quantizers.
            decay: their weight decay; None: the recipe's.
        """
        if not 0 <= lr_scale < math.inf:
            raise ValueError(f"lr_scale must be at least 0 and finite, got {lr_scale!r}")
        if decay is not None and not 0 <= decay < math.inf:
            raise ValueError(f"decay must be null, or at least 0 and finite, got {decay!r}")
        self.lr_scale, self.decay = lr_scale, decay

    def calibrate(self, x: Tensor) -> None:
        """Set the state from data, once. Shape: x as in forward."""
        raise NotImplementedError

    def codes(self, x: Tensor) -> Tensor:
        """Integer codes of x, int32, same shape."""
        raise NotImplementedError

    def context(self, x: Tensor) -> Tensor | None:
        """What `decode` needs beside the codes when the grid depends on the sample (ASQ)."""
        return None

    def decode(self, codes: Tensor, context: Tensor | None = None) -> Tensor:
        """The reals that codes stand for, float32, same shape."""
        raise NotImplementedError

    def levels(self) -> Tensor:
        """Sorted levels, [L] or per output channel [C_out, L]; of an activation quantizer, which
        may leave them out, for plots alone."""
        raise NotImplementedError

    def thresholds(self) -> Tensor:
        """Sorted decision borders between codes, [L-1]: of activation quantizers, for plots alone;
        a class that leaves them out has no panel in activations.png."""
        raise NotImplementedError

    def progress(self, fraction: float) -> None:
        """Told before each step which fraction of the training's steps is done, [0, 1)."""

    def extra_bytes(self) -> int:
        """Bytes stored besides the codes: float32 steps, codebooks, adapters, borders.

        Parameters are counted here. A buffer may be needed in training alone: a class whose codes
        cannot be decoded without one adds it.
        """
        return 4 * sum(p.numel() for p in self.parameters())

    def health(self) -> dict[str, Tensor]:
        """Counts of what must not go wrong silently, as device tensors (no host sync)."""
        return {}

    def extra_repr(self) -> str:
        """Bits, sign, and the options of the class that are plain values."""
        own = inspect.signature(type(self).__init__).parameters
        values = {k: getattr(self, k, None) for k in own if k not in ("self", "bits", "signed")}
        kept = (f"{k}={v}" for k, v in values.items() if isinstance(v, (str, bool, int, float)))
        return ", ".join([f"bits={self.bits}", "signed" if self.signed else "unsigned", *kept])


class Identity(Quantizer):
    """No quantization: float in, the same float out; 32 bits in the accounting."""

    def __init__(self, bits: int = 32, *, signed: bool = True, shape: Sequence[int] = ()) -> None:
        super().__init__(16, signed=signed, shape=shape)
        self.bits = 32
        self.calibrated.fill_(True)

    @property
    def num_levels(self) -> int:
        return 2**32

    def calibrate(self, x: Tensor) -> None:
        """Nothing to set."""

    def forward(self, x: Tensor) -> Tensor:
        return x

    def extra_bytes(self) -> int:
        return 0
