"""A packed file: a quantized network as integers, and back. docs/format.md is its description.

Tensors of a safetensors file, by layer NAME:

    NAME.w.codes              uint8, packed codes (bits.py)
    NAME.w.scale, zero, ...   what reads them (coding.py)
    NAME.a.scale, ...         the input's quantizer (inputs.py)
    NAME.affine               a batch norm: [gain, bias], [2, C]
    any other name            a tensor of the network, under its own name

and in its metadata the JSON header (`qexp`) and the sha256 of header and tensor bytes (`sha256`).

A batch norm in eval mode is y = gain * x + bias with gain = weight / sqrt(var + eps) and
bias' = bias - mean * gain. It is stored so, two vectors instead of four: the convolution's codes
stay what was trained, and the vectors are those that torch's own kernel computes. The accounting
counts four (`qexp.quant.accounting`), so a file of data is 8 bytes a norm's channel smaller.

No code is in the file and none is run from it: see `network.py` for what a header may name.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from qexp.errors import CheckpointError, ConfigError
from qexp.export import coding, inputs
from qexp.export.bits import pack, unpack
from qexp.export.header import FormatError, Header, LayerEntry, parse
from qexp.quant.convert import quant_layers, second_names
from qexp.quant.quantizer import Identity, Quantizer
from qexp.runner.atomic import write_bytes

DTYPES = (torch.uint8, torch.int8, torch.int16, torch.float32)  # of layers and batch norms
BUFFERS = (torch.bool, torch.int32, torch.int64, torch.float64)  # of the network beside them


@dataclass(frozen=True)
class Packed:
    """A file's header and tensors, checked against each other only by what reads them."""

    header: Header
    tensors: Mapping[str, Tensor]

    def part(self, prefix: str) -> dict[str, Tensor]:
        """Tensors whose name starts with `prefix` and a dot, by the rest of it."""
        n = len(prefix) + 1
        found = {k[n:]: t for k, t in self.tensors.items() if k.startswith(f"{prefix}.")}
        for key, value in found.items():
            if value.dtype in BUFFERS:
                raise FormatError(f"tensor {prefix}.{key} is {value.dtype}")
        return found

    def codes(self, entry: LayerEntry) -> Tensor:
        """Codes of a layer's weight, int32 in [qmin, qmax], shape of the weight.

        Raises:
            FormatError: a code beyond the levels, or another number of bytes than codes.
        """
        assert entry.weight is not None
        how = self.header.weights[entry.weight]
        data = self.tensors.get(f"{entry.name}.w.codes")
        if data is None or data.dtype != torch.uint8:
            raise FormatError(f"layer {entry.name!r} has no codes")
        try:
            stored = unpack(data, how.width, math.prod(entry.shape))
        except ValueError as error:
            raise FormatError(f"layer {entry.name!r}: {error}") from error
        if int(stored.max()) >= how.levels:
            raise FormatError(f"layer {entry.name!r} has codes beyond its levels")
        return stored.reshape(entry.shape) + how.qmin

    def weight(self, entry: LayerEntry) -> Tensor:
        """The weight that a layer multiplies with, float32.

        Raises:
            FormatError: its tensors are not those of its form.
        """
        assert entry.weight is not None
        how = self.header.weights[entry.weight]
        parts = self.part(f"{entry.name}.w")
        parts.pop("codes", None)
        rows = (1, entry.shape[0])
        needed, optional = {
            "affine": ({"scale"}, {"zero"}),
            "table": ({"scale"}, {"gain"}),
            "codebook": ({"codebook"}, set()),
        }[how.form]
        if not needed <= set(parts) <= needed | optional:
            raise FormatError(f"layer {entry.name!r} has other tensors than its form")
        for key, value in parts.items():
            tail = (how.levels,) if key == "codebook" else ()
            integer = value.dtype != torch.float32
            if value.dim() == 0 or value.shape[0] not in rows or value.shape[1:] != tail:
                raise FormatError(f"tensor {entry.name}.w.{key} has shape {list(value.shape)}")
            if integer != (key == "zero") or value.dtype == torch.uint8:
                raise FormatError(f"tensor {entry.name}.w.{key} is {value.dtype}")
            if key == "scale" and bool((value < 0).any()):
                raise FormatError(f"tensor {entry.name}.w.scale is negative")
            last = how.qmin + how.levels - 1
            if key == "zero" and not bool(((value >= how.qmin) & (value <= last)).all()):
                raise FormatError(f"tensor {entry.name}.w.zero is outside {how.qmin} to {last}")
        return coding.decode(how, self.codes(entry), parts)


# ---------------------------------------------------------------------------------------------
# Network -> tensors


@torch.no_grad()
def pack_network(
    model: nn.Module,
    *,
    target: str,
    keywords: Mapping[str, Any],
    num_classes: int,
    input_shape: tuple[int, ...],
    data: Mapping[str, Any],
    adapters: torch.dtype = torch.float32,
) -> Packed:
    """A calibrated network, quantized or float, as header and tensors.

    Args:
        adapters: how ASQ's adapters are stored, float32 or float16.

    Raises:
        ConfigError: a quantizer without packed form, or state of another type than files have.
    """
    model.eval()
    tensors: dict[str, Tensor] = {}
    weights: list[coding.Coding] = []
    acts: list[inputs.Input] = []
    layers = []
    for name, layer in quant_layers(model).items():
        w_index = a_index = None
        if not isinstance(layer.weight_quantizer, Identity):
            how, codes, parts = coding.encode(layer.weight_quantizer, layer.weight, name)
            w_index = _index(weights, how)
            tensors[f"{name}.w.codes"] = pack(codes - how.qmin, how.width)
            tensors |= {f"{name}.w.{key}": value for key, value in parts.items()}
        if not isinstance(layer.act_quantizer, Identity):
            source, parts = inputs.describe(layer.act_quantizer, name, adapters)
            a_index = _index(acts, source)
            tensors |= {f"{name}.a.{key}": value for key, value in parts.items()}
        layers.append(LayerEntry(name, tuple(layer.weight.shape), w_index, a_index))
    norms = [n for n, m in model.named_modules() if isinstance(m, _BatchNorm)]
    tensors |= {f"{name}.affine": affine(model.get_submodule(name), name) for name in norms}
    tensors |= _others(model, [e for e in layers if e.weight is not None], norms)
    header = Header(
        target=target,
        keywords=dict(keywords),
        num_classes=num_classes,
        input_shape=tuple(input_shape),
        data=dict(data),
        weights=tuple(weights),
        inputs=tuple(acts),
        layers=tuple(layers),
        norms=tuple(norms),
    )
    try:
        parse(header.to_json())  # what is written can be read
    except FormatError as error:
        advice = (
            " Write a function that builds it with these values, and train that: "
            "model._target_=package.module.function"
        )
        advice = advice if str(error).startswith("keywords") else ""
        raise ConfigError(
            f"export: the model cannot be described in a file: {error}.{advice}"
        ) from error
    return Packed(header, tensors)


def _index(items: list[Any], item: Any) -> int:
    if item not in items:
        items.append(item)
    return items.index(item)


def affine(norm: nn.Module, name: str) -> Tensor:
    """Gain and bias of a batch norm in eval mode, [2, C] float32, as torch's kernel has them."""
    assert isinstance(norm, _BatchNorm)
    if norm.running_mean is None or norm.running_var is None:
        raise ConfigError(
            f"export: batch norm '{name}' has no running statistics. Train with them to export."
        )
    mean, var = norm.running_mean.cpu().float(), norm.running_var.cpu().float()
    weight, bias = (p if p is None else p.detach().cpu().float() for p in (norm.weight, norm.bias))
    zeros = torch.zeros_like(mean)
    # Asked of the kernel itself, at 1 and at 0: in which order and with which fused operations it
    # rounds is its own affair, and both vectors are then the ones that it multiplies and adds.
    gain = F.batch_norm(zeros[None] + 1, zeros, var, weight, None, eps=norm.eps)
    shift = F.batch_norm(zeros[None], mean, var, weight, bias, eps=norm.eps)
    return torch.cat((gain, shift))


def _others(model: nn.Module, packed: list[LayerEntry], norms: list[str]) -> dict[str, Tensor]:
    """State of no quantizer, no batch norm, no packed weight; of a module once."""
    owners = [n for n, m in model.named_modules() if isinstance(m, Quantizer)] + norms
    owners += second_names(model)
    prefixes = tuple(f"{name}." for name in owners)
    weights = {f"{entry.name}.weight" for entry in packed}
    kept = {}
    for name, value in model.state_dict().items():
        if name in weights or (prefixes and name.startswith(prefixes)):
            continue
        if value.dtype in (torch.float16, torch.bfloat16):
            value = value.float()
        if value.dtype not in (*DTYPES, *BUFFERS):
            raise ConfigError(f"export: '{name}' is {value.dtype}, which no file has a place for.")
        kept[name] = value.detach().cpu().contiguous().clone()
    return kept


# ---------------------------------------------------------------------------------------------
# Files


def write(packed: Packed, path: Path) -> int:
    """Replace `path` by the packed file; its size in bytes."""
    blob = to_bytes(packed)
    write_bytes(path, blob)
    return len(blob)


def to_bytes(packed: Packed) -> bytes:
    """The packed file; of the same network the same bytes."""
    from safetensors.torch import save

    text = packed.header.to_json()
    tensors = {name: value.contiguous() for name, value in packed.tensors.items()}
    blob = save(tensors)  # would write metadata in a random order
    length = int.from_bytes(blob[:8], "little")
    entries = json.loads(blob[8 : 8 + length])
    metadata = {"qexp": text, "sha256": _digest(text, _named(entries), blob)}
    plain = {"__metadata__": metadata, **entries}
    names = json.dumps(plain, separators=(",", ":")).encode()
    names += b" " * (-len(names) % 8)  # the tensors begin at a multiple of 8
    return len(names).to_bytes(8, "little") + names + blob[8 + length :]


def _digest(text: str, named: str, blob: bytes) -> str:
    """sha256 of the header's JSON, which tensors there are, and their bytes; hexadecimal."""
    length = int.from_bytes(blob[:8], "little")
    return hashlib.sha256((text + named).encode() + blob[8 + length :]).hexdigest()


def _named(entries: Mapping[str, Any]) -> str:
    """`NAME DTYPE [shape]`, a line a tensor in the order of their bytes."""
    tensors = [
        (e["data_offsets"], name, e) for name, e in entries.items() if name != "__metadata__"
    ]
    return "".join(
        f"{name} {e['dtype']} {json.dumps(e['shape'], separators=(',', ':'))}\n"
        for _, name, e in sorted(tensors, key=lambda t: t[:2])
    )


def read(path: Path) -> Packed:
    """The packed file at `path`.

    Raises:
        CheckpointError: missing, or not a packed file of this version, whatever is in it.
    """
    if not path.is_file():
        raise CheckpointError(f"export: no file '{path}'. Write one with: qexp export run=FOLDER")
    try:
        return _decoded(path.read_bytes())
    except FormatError as error:
        raise refusal(path, error) from error


def refusal(path: Path, error: FormatError) -> CheckpointError:
    """The one line that refuses a file."""
    return CheckpointError(
        f"export: '{path}' is not a packed model that can be read: {error}. Export it again."
    )


def _decoded(blob: bytes) -> Packed:
    from safetensors.torch import load

    try:
        tensors = load(blob)  # checks lengths, offsets and sizes against the file's
    except Exception as error:  # SafetensorError, or a dtype that torch does not have
        raise FormatError("it is truncated or not a safetensors file") from error
    length = int.from_bytes(blob[:8], "little")
    entries = json.loads(blob[8 : 8 + length])
    metadata = entries.get("__metadata__") or {}
    text = metadata.get("qexp")
    if not isinstance(text, str):
        raise FormatError("it has no qexp-packed header")
    header = parse(text)
    # Files of before are signed without names.
    if not any(metadata.get("sha256") == _digest(text, s, blob) for s in (_named(entries), "")):
        raise FormatError("its bytes are not those that were written (sha256)")
    for name, value in tensors.items():
        shortened = value.dtype == torch.float16 and name.endswith(f".a.{inputs.ADAPTER}")
        if value.dtype not in (*DTYPES, *BUFFERS) and not shortened:
            raise FormatError(f"tensor {name[:80]!r} is {value.dtype}")
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise FormatError(f"tensor {name[:80]!r} is not finite")
    return Packed(header, tensors)
