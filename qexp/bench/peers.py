"""Other ways to run a learned step, timed beside ours (`qexp bench train peers=true`).

    aten      torch's own `_fake_quantize_learnable_per_tensor_affine`, the op under torchao's and
              MQBench's learned fake-quantizers
    composed  LSQ's equations as a chain of autograd operations with detach, as most published
              code writes it
    torchao   its LearnableFakeQuantize, where the package is installed
    brevitas  its IntQuant under a learned scale, where the package is installed

Each does the quantizing inside our layers, at the bench's widths, from LSQ's start (torchao from
its own observer). They run eagerly, so they have their turn beside `compile=off` and
`compile=kernels`, where the float network is eager too, and none beside a compiled network.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from qexp.errors import ConfigError
from qexp.quant.convert import Bits, quantize_
from qexp.quant.functional import round_ste, scale_grad
from qexp.quant.lsq import grad_scale, lsq_scale
from qexp.quant.quantizer import Quantizer
from qexp.quant.trace import Layer
from qexp.recipes.compilation import WHOLE

PACKAGES = ("torchao", "brevitas")  # of the extra `peers`


class Peer(Quantizer):
    """LSQ with one step, whose fake quantization another implementation does.

    Args:
        fake_quantize: (x, scale, qmin, qmax, g) -> x_hat, differentiable in x and scale.
        weight: whether it quantizes a weight; N of the gradient scale counts as in `LSQ`.
    """

    def __init__(
        self,
        bits: int,
        *,
        signed: bool = True,
        shape: Sequence[int] = (),
        fake_quantize: Callable[[Tensor, Tensor, int, int, float], Tensor],
        weight: bool,
    ) -> None:
        super().__init__(bits, signed=signed, shape=shape)
        self.fake_quantize = fake_quantize
        self.weight = weight
        self.scale = nn.Parameter(torch.ones(1))

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        self.scale.copy_(lsq_scale(x, self.qmax, per_row=False))
        self.calibrated.fill_(True)

    def forward(self, x: Tensor) -> Tensor:
        g = grad_scale(x, 1, self.qmax, "tensor" if self.weight else "sample", self.samples_axis)
        return self.fake_quantize(x, self.scale, self.qmin, self.qmax, g)


def _aten(x: Tensor, scale: Tensor, qmin: int, qmax: int, g: float) -> Tensor:
    zero = torch.zeros_like(scale)
    op = torch.ops.aten._fake_quantize_learnable_per_tensor_affine.default
    return op(x, scale, zero, qmin, qmax, g)


def _composed(x: Tensor, scale: Tensor, qmin: int, qmax: int, g: float) -> Tensor:
    step = scale_grad(scale, g)
    return round_ste((x / step).clamp(qmin, qmax)) * step


def _brevitas(x: Tensor, scale: Tensor, qmin: int, qmax: int, g: float) -> Tensor:
    zero, bits = _constants((qmax - qmin + 1).bit_length() - 1, x.device)
    return _int_quant(qmin < 0)(scale_grad(scale, g), zero, bits, x)


@cache  # made once, as its layers hold them: a copy to a GPU in each step would be ours, not its
def _constants(bits: int, device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.zeros((), device=device), torch.tensor(float(bits), device=device)


@cache
def _int_quant(signed: bool) -> Any:
    from brevitas.core.function_wrapper import Identity  # type: ignore[import-not-found]
    from brevitas.core.quant import IntQuant  # type: ignore[import-not-found]

    return IntQuant(narrow_range=False, signed=signed, input_view_impl=Identity())


class Torchao(Peer):
    """torchao's module, started by its own observer on the batch that calibrates."""

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        from torch.ao.quantization import MinMaxObserver
        from torchao.quantization.pt2e import (  # type: ignore[import-not-found]
            learnable_fake_quantize as theirs,
        )

        self.module = theirs.LearnableFakeQuantize(
            MinMaxObserver,
            self.qmin,
            self.qmax,
            use_grad_scaling=True,
            dtype=torch.qint8 if self.qmin < 0 else torch.quint8,
            qscheme=torch.per_tensor_symmetric if self.qmin < 0 else torch.per_tensor_affine,
        ).to(x.device)
        self.module(x)
        self.module.enable_range_learning()
        del self.scale
        self.calibrated.fill_(True)

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)


def peers() -> dict[str, dict[str, Any]]:
    """Quantizer factories by name, as keywords of `quantize_`, of every peer that is here."""
    found = {"aten": _factories(Peer, _aten), "composed": _factories(Peer, _composed)}
    if _here("torchao"):
        found["torchao"] = _factories(Torchao, _aten)
    if _here("brevitas"):
        found["brevitas"] = _factories(Peer, _brevitas)
    return found


def _here(package: str) -> bool:
    return find_spec(package) is not None


def note(mode: str) -> str:
    """The line about the peers beside `compile=mode`."""
    if mode in WHOLE:
        return f"peers: none beside compile={mode}, they run eagerly; compile=off,kernels has them"
    missing = [package for package in PACKAGES if not _here(package)]
    advice = f"; without {', '.join(missing)}: pip install 'qexp[peers]'" if missing else ""
    return f"peers: run eagerly{advice}"


def quantize_as_(
    name: str, model: nn.Module, layers: Sequence[Layer], widths: Mapping[str, Bits]
) -> None:
    """Quantize `model` in place with the peer `name`.

    Raises:
        ConfigError: nothing is quantized at these widths: it would be timed as a float network.
    """
    quantize_(model, layers, widths, **peers()[name])
    if not any(isinstance(module, Peer) for module in model.modules()):
        raise ConfigError(
            f"config: peers=true, but at these widths '{name}' quantizes nothing. "
            "Use bits from 1 to 16, or peers=false."
        )


def _factories(cls: type[Peer], fake_quantize: Callable[..., Tensor]) -> dict[str, Any]:
    return {
        "weight": partial(cls, fake_quantize=fake_quantize, weight=True),
        "act": partial(cls, fake_quantize=fake_quantize, weight=False),
    }
