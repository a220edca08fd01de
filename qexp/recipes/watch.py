"""What must not go wrong silently: parameters that stand still, values that are not finite."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from qexp.errors import RunError
from qexp.quant.convert import quant_layers, quantizers
from qexp.quant.plan import Method
from qexp.quant.quantizer import Quantizer


class Movement:
    """Which learned quantizer parameters an epoch did not move."""

    def __init__(self, model: nn.Module) -> None:
        self._before = {n: p.detach().clone() for n, p in _learned(model)}

    def stuck(self, model: nn.Module) -> list[str]:
        """Names of parameters that are bit for bit what they were."""
        named = [(n, p) for n, p in _learned(model) if n in self._before]
        if not named:
            return []
        same = torch.stack([(p == self._before[n]).all() for n, p in named]).tolist()
        return [n for (n, _), still in zip(named, same, strict=True) if still]


def _learned(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [
        (f"{name}.{own}", parameter)
        for name, quantizer in quantizers(model).items()
        for own, parameter in quantizer.named_parameters()
        if parameter.requires_grad and own not in quantizer.scales_output
    ]


def first_non_finite(model: nn.Module) -> str:
    """`, layer 'x' first`: the first layer, in module order, with a non-finite value; or nothing.

    Of a value outside all layers it is `, parameter 'x' first`. One host sync when all is well.
    """
    state = [(n, t) for n, t in model.state_dict().items() if t.is_floating_point()]
    free = _may_be_infinite(model)
    flags = [(~t.isnan() if n in free else t.isfinite()).all() for n, t in state]
    for (name, _), fine in zip(state, torch.stack(flags).tolist(), strict=True):
        if not fine:
            layer, _, own = name.rpartition(".")
            return f", layer '{layer}' first" if layer else f", parameter '{own}' first"
    return ""


def _may_be_infinite(model: nn.Module) -> set[str]:
    """Buffers of the network's own, such as the mask of an attention."""
    return {
        f"{name}.{own}" if name else own
        for name, module in model.named_modules()
        if not isinstance(module, (_NormBase, Quantizer))
        for own, _ in module.named_buffers(recurse=False)
    }


def check_finite(model: nn.Module, losses: Tensor, epoch: int, saved: int = 0) -> None:
    """Stop the run at a non-finite loss, or weight after the last step, naming step and layer.

    Args:
        epoch: finished epochs, each with a checkpoint.
        saved: steps of the present epoch that a checkpoint has (`recipe.save_every`).
    """
    bad = ~torch.isfinite(losses)
    where = first_non_finite(model)
    if not bool(bad.any()) and not where:
        return
    if bool(bad.any()):
        step = int(bad.nonzero()[0])
        what = f"loss is {'infinite' if bool(losses[step].isinf()) else 'NaN'} at"
    else:
        step, what = len(losses) - 1, "weights are not finite after"
    place = f"epoch {epoch + 1}, step {saved}" if saved else f"epoch {epoch}"
    kept = f"last good checkpoint is last.pt ({place})" if epoch or saved else "no checkpoint yet"
    raise RunError(
        f"run: {what} epoch {epoch + 1}, step {step + 1}{where}; {kept}. "
        "Lower recipe.lr or set recipe.grad_clip."
    )


def unlearned(model: nn.Module, method: Method, rates: Mapping[str, float]) -> list[str]:
    """What activation quantizers have that a reconstruction of borders has no rate for, by name.

    Of `adapter.0.weight` the name is `adapter`.
    """
    if method.granularity == "none" or method.borders == "fixed":
        return []
    inputs = [layer.act_quantizer for layer in quant_layers(model).values()]
    names = {path.partition(".")[0] for q in inputs for path, _ in q.named_parameters()}
    return sorted(names - set(rates))


def health(model: nn.Module) -> dict[str, dict[str, int]]:
    """Counts that are not zero, by kind and quantizer: `{"dead_levels": {"conv1...": 2}}`."""
    found: dict[str, dict[str, int]] = {}
    for name, quantizer in quantizers(model).items():
        for kind, count in quantizer.health().items():
            if int(count):
                found.setdefault(kind, {})[name] = int(count)
    return found
