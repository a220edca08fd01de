"""From a packed file to a network that runs, without trusting the file.

What a header may name: the models of this package and torchvision's classifiers, unless the caller
opts in to any importable one. A network that a file may name is built without storage first
(`meta`), so that its size is compared with the tensors at hand before a byte of it is allocated;
keywords are scalars of bounded size (`header.py`). A trusted one is built as in training: it may
hold tensors of its constructor that are in no state.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from qexp.errors import CheckpointError, ConfigError
from qexp.export import inputs
from qexp.export.header import FormatError, Header, LayerEntry, allowed
from qexp.export.packed import Packed
from qexp.models.build import build_model, resolve
from qexp.models.load import load_tensors_
from qexp.models.opened import open_attention_, own_names
from qexp.quant.convert import replace_, second_names
from qexp.quant.modules import QuantConv2d, QuantLinear, leave_fast_path_
from qexp.quant.quantizer import Identity, Quantizer


class _WithoutStorage(TorchFunctionMode):
    """Parameters are made on `meta`; small computations of a constructor stay on the CPU."""

    makers = (torch.empty, torch.zeros, torch.ones, torch.full, torch.eye)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        keywords = dict(kwargs or {})
        if func in self.makers:
            keywords["device"] = "meta"
        return func(*args, **keywords)


@contextmanager
def _refusing(what: str) -> Iterator[None]:
    """Whatever a constructor raises at values that a file made up."""
    try:
        yield
    except (FormatError, CheckpointError):
        raise
    except Exception as error:
        raise FormatError(f"{what} cannot be built from it ({_short(error)})") from error


def _short(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text[:120]


@torch.no_grad()
def restore(packed: Packed, *, trust: bool = False) -> nn.Module:
    """The network of a packed file, on the CPU, in eval mode.

    Its packed weights are float tensors that equal the fake-quantized ones; inputs are quantized
    as in training.

    Args:
        trust: build a model from outside `qexp.models` and `torchvision.models` too.

    Raises:
        ConfigError: a model of somebody's own, without `trust`, or that is not installed here.
        FormatError: header and tensors do not make one network.
    """
    header = packed.header
    if not trust and not allowed(header.target):
        raise ConfigError(
            f"export: the file names the model '{header.target[:80]}', which is neither of qexp "
            "nor a classifier of torchvision.models. If you trust it: trust=true"
        )
    model = _bare(header)
    open_attention_(model, header.input_shape)
    state: dict[str, Tensor] = {}
    used: set[str] = set()
    for name in _batch_norms(model):
        if name in header.norms:
            state |= _norm(model, name, packed)
            used.add(f"{name}.affine")
        else:
            replace_(model, name, nn.Identity())
    if missing := [name for name in header.norms if f"{name}.affine" not in used]:
        raise FormatError(f"the model has no batch norm {missing[0]!r}")
    for entry in header.layers:
        own, names = _layer(model, entry, packed)
        state |= own
        used |= names
    floats = own_names(model, {n: t for n, t in packed.tensors.items() if n not in used})
    _add_biases(model, floats)
    _load(model, state | floats)
    leave_fast_path_(model)
    return model.eval().requires_grad_(False)


def _bare(header: Header) -> nn.Module:
    """The float network; without storage unless the caller's trust is needed for it."""
    node = {**header.keywords, "_target_": header.target}
    if not allowed(header.target):
        resolve(header.target)  # a package that is not here is no fault of the file
    with _refusing("the model"):
        try:
            with _WithoutStorage() if allowed(header.target) else nullcontext():
                return build_model(node, header.num_classes, header.input_shape[0])
        except ConfigError as error:
            raise FormatError(f"the model cannot be built ({_short(error)})") from error


def _batch_norms(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, _BatchNorm)]


def _norm(model: nn.Module, name: str, packed: Packed) -> dict[str, Tensor]:
    """State of a batch norm that is one gain and one bias a channel."""
    norm: Any = model.get_submodule(name)
    stored = packed.tensors.get(f"{name}.affine")
    if stored is None or stored.shape != (2, norm.num_features) or stored.dtype != torch.float32:
        raise FormatError(f"batch norm {name!r} has no gain and bias of its size")
    channels = norm.num_features
    norm.eps = 0.0
    norm.affine = True
    norm.weight = nn.Parameter(torch.empty(channels, device="meta"))
    norm.bias = nn.Parameter(torch.empty(channels, device="meta"))
    return {
        f"{name}.weight": stored[0].clone(),
        f"{name}.bias": stored[1].clone(),
        f"{name}.running_mean": torch.zeros(channels),
        f"{name}.running_var": torch.ones(channels),
        f"{name}.num_batches_tracked": torch.tensor(0),
    }


def _layer(
    model: nn.Module, entry: LayerEntry, packed: Packed
) -> tuple[dict[str, Tensor], set[str]]:
    """Swap one layer; `(its state, names of the tensors it was made from)`."""
    try:
        module = model.get_submodule(entry.name)
    except AttributeError as error:
        raise FormatError(f"the model has no layer {entry.name!r}") from error
    if not isinstance(module, (nn.Conv2d, nn.Linear)) or tuple(module.weight.shape) != entry.shape:
        raise FormatError(f"layer {entry.name!r} of the model has another shape")
    conv = isinstance(module, nn.Conv2d)
    field = (module.in_channels, *module.kernel_size) if conv else (module.in_features,)
    state: dict[str, Tensor] = {f"{entry.name}.weight_quantizer.calibrated": torch.tensor(True)}
    used: set[str] = set()
    if entry.weight is not None:
        state[f"{entry.name}.weight"] = packed.weight(entry)
        used |= {f"{entry.name}.w.{key}" for key in packed.part(f"{entry.name}.w")}
    act: Quantizer = Identity(shape=field)
    own = {"calibrated": torch.tensor(True)}
    if entry.input is not None:
        source, parts = packed.header.inputs[entry.input], packed.part(f"{entry.name}.a")
        with _refusing(f"the input of layer {entry.name!r}"):
            with _WithoutStorage():
                act = inputs.make(source, field)
            own = inputs.state(source, act, parts)
        used |= {f"{entry.name}.a.{key}" for key in parts}
    state |= {f"{entry.name}.act_quantizer.{key}": value for key, value in own.items()}
    twin = (QuantConv2d if conv else QuantLinear).from_float(module, Identity(), act)  # type: ignore[arg-type]
    replace_(model, entry.name, twin)
    return state, used


def _add_biases(model: nn.Module, floats: dict[str, Tensor]) -> None:
    """Convolutions that took a batch norm have a bias, which the bare model's may lack."""
    for name, module in model.named_modules():
        bias = floats.get(f"{name}.bias")
        if not isinstance(module, (nn.Conv2d, nn.Linear)) or bias is None:
            continue
        if module.bias is None and bias.shape == module.weight.shape[:1]:
            module.bias = nn.Parameter(torch.empty(bias.shape, device="meta"))


def _load(model: nn.Module, state: dict[str, Tensor]) -> None:
    """All of `state`, which must be all of the model's, with its shapes."""
    ours, second = model.state_dict(), second_names(model)
    for key in ours:
        owner, _, name = key.rpartition(".")
        if (known := f"{second.get(owner)}.{name}") in state:
            state[key] = state[known]
    unknown = sorted(set(state) - set(ours))
    missing = sorted(set(ours) - set(state))
    if unknown or missing:
        word, name = (
            ("no place for", unknown[0]) if unknown else ("a tensor the file lacks,", missing[0])
        )
        raise FormatError(f"the model has {word} {name[:80]!r}")
    for name, value in state.items():
        if value.shape != ours[name].shape or value.is_meta:
            raise FormatError(f"tensor {name[:80]!r} has shape {list(value.shape)}")
        # Files of before have every float of the network as float32.
        shortened = value.dtype == torch.float32 and ours[name].is_floating_point()
        if value.dtype != ours[name].dtype and not shortened:
            raise FormatError(f"tensor {name[:80]!r} is {value.dtype}")
    # The model has no storage to copy into: it takes the tensors themselves.
    load_tensors_(model, state, assign=True)
