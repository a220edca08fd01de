"""Float weights from a file or from torchvision: strict, safe to read, with a readable difference.

A file may hold a plain state dict, or one under `state_dict` or `model`, with or without the
`module.` prefix that DataParallel leaves; pickled (.pt, .pth), read with `weights_only=True`, or
safetensors: a checkpoint cannot run code. Nothing is copied into the model unless every key and
shape fits; parts that the model is built without, and says so with None in their place, are left in
the file.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from qexp.errors import CheckpointError, did_you_mean
from qexp.models.build import resolve
from qexp.models.digest import averaged, is_packed, read_file, weights_sha256
from qexp.models.opened import own_names

# `IMAGENET1K_V1`, `DEFAULT`, or `ResNet18_Weights.IMAGENET1K_V1`; a file name has a dot or a slash.
WEIGHTS_NAME = re.compile(r"(\w+_Weights\.)?[A-Z][A-Z0-9_]*")
WRAPPERS = ("state_dict", "model")
DENSE = re.compile(r"^(.*denselayer\d+\.(?:norm|relu|conv))\.([12]\.\w+)$")


def load_weights(model: nn.Module, target: str, checkpoint: str) -> str:
    """Load a file or, for a torchvision model, published weights by their name.

    Args:
        model: receives the weights in place.
        target: the model's `_target_`, which knows its published weights.
        checkpoint: a path, or a name such as `IMAGENET1K_V1`.

    Returns:
        what identifies its weights: see `weights_sha256`.

    Raises:
        CheckpointError: missing, unreadable, of another model, or not to be fetched.
    """
    return load_state(model, weights_file(target, checkpoint))


def weights_file(target: str, checkpoint: str) -> Path:
    """`checkpoint`, or the file of the published weights of that name, downloaded if need be."""
    if WEIGHTS_NAME.fullmatch(str(checkpoint)) and not Path(checkpoint).exists():
        return fetch_weights(target, str(checkpoint))
    return Path(checkpoint)


def load_state(model: nn.Module, path: str | Path) -> str:
    """Load a checkpoint file into a model, all of it or nothing.

    Returns:
        what identifies its weights: see `weights_sha256`.

    Raises:
        CheckpointError: missing, truncated, not a checkpoint, or of another model.
    """
    path = Path(path)
    load_tensors_(model, fitting_state(model, path))
    return weights_sha256(path)


def load_tensors_(model: nn.Module, state: Mapping[str, Tensor], *, assign: bool = False) -> None:
    """`model.load_state_dict` of tensors in the layout that `model` has now, or had (`own_names`).

    A plain dict lacks torch's version marks, which a module may insist on (torchvision's MNASNet).
    They are given as the model has them; batch norms get none, and may so lack their counter.
    """
    norms = {name for name, m in model.named_modules() if isinstance(m, _NormBase)}
    marks: Any = getattr(model.state_dict(), "_metadata", {})
    marked: Any = OrderedDict(own_names(model, state))
    marked._metadata = {name: mark for name, mark in marks.items() if name not in norms}
    model.load_state_dict(marked, assign=assign)


def check_weights(model: nn.Module, target: str, checkpoint: str) -> None:
    """Refuse what `load_weights` would; published weights that are not here are not fetched.

    Raises:
        CheckpointError: as `load_weights`.
    """
    path = Path(checkpoint)
    if WEIGHTS_NAME.fullmatch(checkpoint) and not path.exists():
        weights, path = published(target, checkpoint)
        classes, head = len(weights.meta["categories"]), model.state_dict().get(_head(model))
        if head is not None and len(head) != classes:
            raise CheckpointError(
                f"checkpoint: {checkpoint} has {classes} classes, dataset has {len(head)}. Use "
                "the data set it was trained on, or model.checkpoint=auto."
            )
        if getattr(model, "transform_input", None) is False:
            raise CheckpointError(
                f"checkpoint: {checkpoint} takes images scaled in another way, which this network "
                "does itself with +model.transform_input=true. Set it."
            )
        if not path.is_file():
            return
    fitting_state(model, path)


def fitting_state(model: nn.Module, path: Path) -> dict[str, Tensor]:
    """The state dict in a file, once every key, shape and value of it can be loaded."""
    ours = model.state_dict()
    state = _without_absent_parts(model, _renamed(ours, read_state(path)))
    if difference := describe_difference(model, state):
        raise CheckpointError(f"checkpoint: {path} does not fit the model: {difference}")
    floating = {k: v for k, v in state.items() if v.is_floating_point()}
    diverged = [k for k, v in floating.items() if not v.isfinite().all() and not _same(v, ours, k)]
    if diverged:
        raise CheckpointError(
            f"checkpoint: {path} holds NaN or infinite values ({', '.join(diverged[:3])}"
            f"{', ...' if len(diverged) > 3 else ''}). Give one from before its training diverged."
        )
    return state


def _same(value: Tensor, ours: Mapping[str, Tensor], name: str) -> bool:
    """Whether it is what the network is built with: a mask may hold infinities."""
    return name in ours and torch.equal(value.cpu(), ours[name].to("cpu", value.dtype))


def _renamed(ours: Mapping[str, Tensor], state: dict[str, Tensor]) -> dict[str, Tensor]:
    """`state` without DataParallel's prefix, and with the names that DenseNet's layers have now."""
    prefixed = all(name.startswith("module.") for name in state)
    if prefixed and not all(name.startswith("module.") for name in ours):
        state = {name.removeprefix("module."): value for name, value in state.items()}
    if any(name not in ours for name in state):  # torchvision renames its published files so
        state = {DENSE.sub(r"\1\2", name): value for name, value in state.items()}
    return state


def _without_absent_parts(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """`state` without modules that `model` has as None: torchvision's heads of aux_logits=false."""
    return {
        name: tensor
        for name, tensor in state.items()
        if "." not in name or getattr(model, name.partition(".")[0], model) is not None
    }


def read_state(path: Path) -> dict[str, Tensor]:
    """The state dict in a file, on the CPU, without wrapper."""
    if not path.is_file():
        raise CheckpointError(missing_file(path))
    try:
        content = read_file(path)
    except ImportError as error:
        raise CheckpointError(
            f"checkpoint: {path} needs the package 'safetensors'. Try: pip install 'qexp[export]'"
        ) from error
    except Exception as error:  # zip, pickle, and storage readers each raise their own kinds
        kind, how = "a PyTorch state dict", "torch.save(model.state_dict(), path)"
        if path.suffix == ".safetensors":
            kind, how = (
                "a safetensors file",
                "safetensors.torch.save_file(model.state_dict(), path)",
            )
        raise CheckpointError(
            f"checkpoint: {path} is truncated or not {kind} ({first_line(error)}). "
            f"Write it with {how}."
        ) from error
    if is_packed(path):
        raise CheckpointError(
            f"checkpoint: {path} is a packed network. Give the last.pt of the run it was exported "
            "from, if that is a float or a post-training run."
        )
    content = averaged(content) or content
    for wrapper in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping) or not content or not all_tensors(content):
        raise CheckpointError(
            f"checkpoint: {path} holds no state dict (a mapping from names to tensors). "
            "Write it with torch.save(model.state_dict(), path)."
        )
    return dict(content)  # without torch's version marks: see `load_tensors_`


def all_tensors(content: Mapping[Any, Any]) -> bool:
    """Whether every key is a name and every value a tensor."""
    return all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items())


def first_line(error: Exception) -> str:
    """First sentence of an exception, or its class name."""
    text = str(error).strip().split("\n")[0].split(". ")[0].rstrip(".")
    return text[:100] or type(error).__name__


def missing_file(path: Path) -> str:
    """One line about a checkpoint file that is not there."""
    if path.is_dir():
        return f"checkpoint: {path} is a folder. Give a file in it, such as {path / 'last.pt'}."
    if not path.parent.is_dir():
        return (
            f"checkpoint: {path} not found, there is no folder '{path.parent}'. "
            "Set model.checkpoint=FILE or model.checkpoint=auto."
        )
    siblings = {p.name: p for p in sorted(path.parent.iterdir()) if p.is_file()}
    hint = did_you_mean(path.name, siblings) or " Set model.checkpoint=FILE or auto."
    return f"checkpoint: {path} not found.{hint}"


def describe_difference(model: nn.Module, state: Mapping[str, Tensor]) -> str:
    """What keeps a state dict from fitting, on one line; empty if it fits."""
    ours, state = model.state_dict(), own_names(model, state)
    missing = [k for k in ours if k not in state and not k.endswith("num_batches_tracked")]
    unexpected = [k for k in state if k not in ours]
    wrong = [k for k in ours if k in state and ours[k].shape != state[k].shape]
    head = last_linear(model)
    weight = _head(model)
    only_head = not missing and not unexpected and all(k.startswith(f"{head}.") for k in wrong)
    if only_head and weight in wrong and ours[weight].shape[1:] == state[weight].shape[1:]:
        return (
            f"checkpoint has {len(state[weight])} classes, dataset has {len(ours[weight])}. "
            "Use the data set it was trained on, or model.checkpoint=auto."
        )
    if any("_quantizer." in key for key in unexpected):
        return (
            "it is of a quantized run. A start is a float network or a post-training run, a "
            "teacher is a float network."
        )
    shapes = [f"{k} {list(state[k].shape)} not {list(ours[k].shape)}" for k in wrong]
    parts = [
        f"{len(keys)} {label} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
        for label, keys in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of wrong shape", shapes),
        )
        if keys
    ]
    if not parts:
        return ""
    return f"{'; '.join(parts)}. Set model=... to the network it was saved from."


def last_linear(model: nn.Module) -> str:
    """Name of the last linear layer in definition order: the classifier."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return names[-1] if names else ""


def _head(model: nn.Module) -> str:
    return f"{last_linear(model)}.weight"


def published(target: str, name: str) -> tuple[Any, Path]:
    """torchvision's weights of a model by their name, and where its hub cache has their file."""
    from torchvision.models import get_model_weights

    builder: Callable[..., Any] = resolve(target)
    model_name = target.rpartition(".")[2]
    try:
        known = {w.name: w for w in get_model_weights(builder)}
        known["DEFAULT"] = get_model_weights(builder)["DEFAULT"]
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"checkpoint: {model_name} has no torchvision weights '{name}'. "
            "Set model.checkpoint=FILE or model.checkpoint=auto."
        ) from error
    short = name.rpartition(".")[2]
    if short not in known:
        raise CheckpointError(
            f"checkpoint: torchvision has no weights '{short}' of {model_name} "
            f"(has: {', '.join(sorted(known))}).{did_you_mean(short, known)}"
        )
    weights = known[short]
    return weights, Path(torch.hub.get_dir()) / "checkpoints" / weights.url.rpartition("/")[2]


def fetch_weights(target: str, name: str) -> Path:
    """The file of torchvision's published weights, from its hub cache or downloaded into it."""
    weights, path = published(target, name)
    url: str = weights.url
    if not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True)
        except Exception as error:  # urllib, ssl, sockets, and the hash check raise their own
            raise CheckpointError(
                f"checkpoint: {url} cannot be fetched ({first_line(error)}). "
                f"Download it to {path}, or set model.checkpoint=FILE."
            ) from error
    return path
