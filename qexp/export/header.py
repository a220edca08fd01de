"""The JSON header of a packed file, and how strictly it is read.

Every field has a type and a range; anything else is refused before a tensor is looked at. Lists of
weights and inputs hold what layers share: a layer names one of each by its index.
"""

from __future__ import annotations

import json
import math
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from qexp.export.bits import MAX_WIDTH
from qexp.export.coding import Coding
from qexp.export.inputs import KINDS, Input
from qexp.quant.accounting import width_of

FORMAT = "qexp-packed"
VERSION = 1

MAX_ITEMS = 10_000  # layers, norms, grids: far above any classifier, far below trouble
MAX_SIZE = 65_536  # of a dimension, and of the number of classes
MAX_ELEMENTS = 2**40  # of a tensor: what is in the file decides, this keeps products in int64
FORMS = ("affine", "table", "codebook")
OURS = {
    "qexp.models.resnet.ResNet",
    "qexp.models.mobilenet.mobilenet_v2_cifar",
    "qexp.models.regnet.regnet_x_600mf",
}


class FormatError(ValueError):
    """A file that is not what this module writes; the message is the end of a sentence."""


def allowed(target: str) -> bool:
    """Whether a file may name this model without the user's word for it."""
    if target in OURS:
        return True
    import torchvision

    module, _, name = target.rpartition(".")
    return module == "torchvision.models" and name in torchvision.models.list_models(
        module=torchvision.models
    )


@dataclass(frozen=True)
class LayerEntry:
    """A quantized layer: indices into `weights` and `inputs`, None for a float operand."""

    name: str
    shape: tuple[int, ...]
    weight: int | None
    input: int | None


@dataclass(frozen=True)
class Header:
    """What a packed file says beside its tensors.

    Attributes:
        target, keywords: the float network: a dotted name and its keywords.
        input_shape: [C, H, W] of one image.
        data: `name`, `mean`, `std` of the data set it was trained on; of photographs also
            `resize`, the shorter side before the central crop; `classes`, the labels' names,
            where the data set has them.
        norms: batch norms that are stored as a gain and a bias; the network has no others.
    """

    target: str
    keywords: Mapping[str, Any]
    num_classes: int
    input_shape: tuple[int, ...]
    data: Mapping[str, Any]
    weights: tuple[Coding, ...] = ()
    inputs: tuple[Input, ...] = ()
    layers: tuple[LayerEntry, ...] = ()
    norms: tuple[str, ...] = field(default=())

    def to_json(self) -> str:
        """One line, without spaces and defaults."""
        plain = {"format": FORMAT, "version": VERSION, **asdict(self)}
        plain["weights"] = [
            {k: v for k, v in asdict(c).items() if v or k == "qmin"} for c in self.weights
        ]
        return json.dumps(plain, separators=(",", ":"), allow_nan=False)


def parse(text: str) -> Header:
    """The header in `text`.

    Raises:
        FormatError: not JSON, another version, or a field of another type or range.
    """
    try:
        plain = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise FormatError("its header is not JSON") from error
    if not isinstance(plain, dict) or plain.pop("format", None) != FORMAT:
        raise FormatError("it has no qexp-packed header")
    version = plain.pop("version", None)
    if version != VERSION or isinstance(version, bool):
        raise FormatError(f"it is of version {str(version)[:20]}, this qexp reads {VERSION}")
    _keys(plain, set(Header.__dataclass_fields__), "header")
    target = _text(plain["target"], "target")
    header = Header(
        target=target,
        keywords=_model_keywords(plain["keywords"], trusted=not allowed(target)),
        num_classes=_whole(plain["num_classes"], "num_classes", 1, MAX_SIZE),
        input_shape=_sizes(plain["input_shape"], "input_shape", 3),
        data=_data(plain["data"]),
        weights=tuple(_coding(c) for c in _items(plain["weights"], "weights")),
        inputs=tuple(_input(i) for i in _items(plain["inputs"], "inputs")),
        layers=tuple(_layer(e) for e in _items(plain["layers"], "layers")),
        norms=tuple(_text(n, "norms") for n in _items(plain["norms"], "norms")),
    )
    for key in ("mean", "std"):
        if len(header.data[key]) not in (0, header.input_shape[0]):
            raise FormatError(f"its {key} is not one number for each channel of an image")
    if len(header.data.get("classes", ())) not in (0, header.num_classes):
        raise FormatError("it names another number of classes than it has")
    names = [entry.name for entry in header.layers] + list(header.norms)
    if len(set(names)) != len(names):
        raise FormatError("it names a layer twice")
    for entry in header.layers:
        for index, of in ((entry.weight, header.weights), (entry.input, header.inputs)):
            if index is not None and index >= len(of):
                raise FormatError(f"layer {entry.name!r} has an index beyond its list")
    return header


def _no_constant(name: str) -> Any:
    raise ValueError(name)  # NaN and Infinity are not JSON


def _keys(plain: Any, wanted: set[str], where: str, optional: frozenset[str] = frozenset()) -> None:
    if not isinstance(plain, dict) or not wanted - optional <= set(plain) <= wanted:
        raise FormatError(f"its {where} must have the fields {', '.join(sorted(wanted))}")


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= 200 or not value.isprintable():
        raise FormatError(f"{where} must be a name")
    return value


def _class_name(value: Any) -> str:
    """A folder's name: with spaces and joiners of any script, without control characters."""
    plain = isinstance(value, str) and 0 < len(value) <= 200
    if not plain or any(unicodedata.category(c) in ("Cc", "Cs") for c in value):
        raise FormatError("a class must be a name of at most 200 characters")
    return value


def _whole(value: Any, where: str, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise FormatError(f"{where} must be an integer from {low} to {high}")
    return value


def _items(value: Any, where: str, most: int = MAX_ITEMS) -> Sequence[Any]:
    if not isinstance(value, list) or len(value) > most:
        raise FormatError(f"{where} must be a list of at most {most} items")
    return value


def _number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise FormatError(f"{where} must be a number")
    if not abs(value) < 2**127 or not math.isfinite(value):
        raise FormatError(f"{where} is out of the range of float32")
    return float(value)


def _sizes(value: Any, where: str, *ranks: int, most: int = MAX_SIZE) -> tuple[int, ...]:
    items = _items(value, where)
    if len(items) not in ranks:
        raise FormatError(f"{where} must have {' or '.join(map(str, ranks))} dimensions")
    sizes = tuple(_whole(v, where, 1, most) for v in items)
    if math.prod(sizes) > MAX_ELEMENTS:
        raise FormatError(f"{where} must have at most {MAX_ELEMENTS} elements")
    return sizes


def _keywords(value: Any, where: str) -> dict[str, Any]:
    """Scalars, no number that would build a network of any size, no list, no object."""
    for name, item in _named(value, where):
        _scalar(item, name, MAX_SIZE)
    return dict(value)


def _model_keywords(value: Any, *, trusted: bool) -> dict[str, Any]:
    """Scalars, and lists of them in lists.

    Args:
        trusted: of a model that needs the user's word: larger numbers, longer lists.
    """
    most, count = (MAX_SIZE, 1000) if trusted else (1000, 100)
    for name, item in _named(value, "keywords"):
        scalars = list(_leaves(item))
        if len(scalars) > count:
            raise FormatError(f"{name} must have at most {count} items")
        for scalar in scalars:
            _scalar(scalar, name, most)
    return dict(value)


def _named(value: Any, where: str) -> list[tuple[str, Any]]:
    if not isinstance(value, dict) or len(value) > 50:
        raise FormatError(f"{where} must be an object")
    return [(f"{where}.{_text(key, where)}", item) for key, item in value.items()]


def _leaves(value: Any, depth: int = 3) -> Iterator[Any]:
    """What lists in lists hold; of anything else itself."""
    if isinstance(value, list) and depth:
        for part in value:
            yield from _leaves(part, depth - 1)
    else:
        yield value


def _scalar(value: Any, where: str, most: int) -> None:
    if isinstance(value, str):
        _text(value, where)
    elif isinstance(value, (int, float)):
        if not abs(value) <= most:
            raise FormatError(f"{where} must be from -{most} to {most}")
    elif value is not None:
        raise FormatError(f"{where} must be a number, a name, true, false or null")


def _data(value: Any) -> dict[str, Any]:
    optional = frozenset({"resize", "classes"})
    _keys(value, {"name", "mean", "std", *optional}, "data", optional)
    data = {k: [_number(v, k) for v in _items(value[k], k)] for k in ("mean", "std")}
    if not all(v > 0 for v in data["std"]):
        raise FormatError("std must be above 0")
    data = {"name": _text(value["name"], "data.name"), **data}
    if "resize" in value:
        data["resize"] = _whole(value["resize"], "resize", 1, MAX_SIZE)
    if "classes" in value:
        names = _items(value["classes"], "classes", MAX_SIZE)
        data["classes"] = [_class_name(name) for name in names]
    return data


def _coding(value: Any) -> Coding:
    optional = frozenset({"offset", "grid"})
    _keys(value, set(Coding.__dataclass_fields__), "weights", optional)
    width = _whole(value["width"], "width", 1, MAX_WIDTH)
    levels = _whole(value["levels"], "levels", 1, 2**width)
    if width != width_of(levels):
        raise FormatError(f"codes of {levels} levels take {width_of(levels)} bits, not {width}")
    grid = tuple(_number(v, "grid") for v in _items(value.get("grid", []), "grid"))
    form = _text(value["form"], "form")
    if form not in FORMS:
        raise FormatError("it has weights of an unknown form")
    if len(grid) != (levels if form == "table" else 0):
        raise FormatError("it has a grid of another length than its levels")
    return Coding(
        kind=_text(value["kind"], "kind"),
        form=form,  # type: ignore[arg-type]
        bits=_whole(value["bits"], "bits", 1, 16),
        width=width,
        qmin=_whole(value["qmin"], "qmin", -(2**16), 2**16),
        levels=levels,
        offset=_number(value.get("offset", 0.0), "offset"),
        grid=grid,
    )


def _input(value: Any) -> Input:
    _keys(value, set(Input.__dataclass_fields__), "inputs")
    if _text(value["kind"], "kind") not in KINDS:
        raise FormatError("it has inputs of an unknown kind")
    if not isinstance(value["signed"], bool):
        raise FormatError("signed must be true or false")
    bits = _whole(value["bits"], "bits", 1, 16)
    return Input(value["kind"], bits, value["signed"], _keywords(value["keywords"], "keywords"))


def _layer(value: Any) -> LayerEntry:
    _keys(value, set(LayerEntry.__dataclass_fields__), "layers")
    weight, source = (
        None if value[k] is None else _whole(value[k], k, 0, MAX_ITEMS) for k in ("weight", "input")
    )
    shape = _sizes(value["shape"], "shape", 2, 4, most=MAX_ELEMENTS)
    return LayerEntry(_text(value["name"], "layers"), shape, weight, source)
