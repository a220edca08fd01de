"""`qexp export`: a finished run as one file, and `qexp eval` of such a file."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from qexp import config
from qexp.errors import CheckpointError, ConfigError, RunError, quoted
from qexp.export.compare import difference
from qexp.quant.accounting import account
from qexp.quant.convert import check_calibrated
from qexp.quant.trace import trace
from qexp.recipes.absent import Absent, class_names
from qexp.runner.atomic import write_bytes
from qexp.runner.folder import run_config, run_state
from qexp.schema import Place


@dataclass
class Export:
    """`configs/export.yaml`."""

    run: str | None
    checkpoint: str
    format: Literal["packed", "onnx", "onnx_int8"]
    adapters: Literal["float32", "float16"]
    file: str | None
    dataset: Place = field(default_factory=Place)


def export(cfg: DictConfig) -> dict[str, Any]:
    """Write the network of `cfg.run` to a file and print what was written.

    Raises:
        ConfigError: an argument, a missing package, or a quantizer without packed form.
        CheckpointError: `cfg.run` is not a finished run.
    """
    from qexp.recipes.build import load_run

    config.check(cfg, Export)
    require("safetensors")
    if not cfg.run:
        raise ConfigError("export: no run given. Try: qexp export run=outputs/.../<run folder>")
    folder = Path(cfg.run)
    run_config(folder, "export")
    if (state := run_state(folder)) != "done":
        raise CheckpointError(
            f"export: {folder} is {state}, not done. Finish it with: qexp resume {quoted(folder)}"
        )
    root = OmegaConf.select(cfg, "dataset.root")
    model, dataset, trained = load_run(
        folder, cfg.checkpoint, "cpu", "export", root, imageless=True
    )
    check_calibrated(model)
    writer, suffix = FORMATS[cfg.format]
    stem = "model" if cfg.checkpoint == "last.pt" else Path(cfg.checkpoint).stem
    path = Path(cfg.file) if cfg.file else folder / f"{stem}{suffix}"
    ending = "." + suffix.rpartition(".")[2]
    if path.suffix != ending or not path.parent.is_dir() or path.is_dir():
        raise ConfigError(f"export: file must be a name in a folder that exists, like x{ending}.")
    return writer(model.eval(), dataset, trained, path, cfg)


def require(package: str) -> None:
    """Raise one line unless an optional package is there."""
    if importlib.util.find_spec(package) is None:
        raise ConfigError(
            f"export: this needs the package '{package}'. Try: pip install 'qexp[export]'"
        )


COMPARED = 256  # training images on which a form that is not exact is compared


def _packed(
    model: nn.Module, dataset: Any, trained: DictConfig, path: Path, cfg: DictConfig
) -> dict[str, Any]:
    from qexp.export.inputs import ADAPTER, ADAPTER_DTYPES
    from qexp.export.network import allowed, restore
    from qexp.export.packed import to_bytes

    packed = pack_run(model, dataset, trained, ADAPTER_DTYPES[cfg.adapters])
    rounded = cfg.adapters != "float32" and any(n.endswith(f".a.{ADAPTER}") for n in packed.tensors)
    images = _compared(dataset) if rounded else None
    blob = to_bytes(packed)
    _save(path, blob)
    size = len(blob)
    data = sum(t.numel() * t.element_size() for t in packed.tensors.values())
    fp32 = account(model, trace(model, dataset.input_shape)).fp32_bytes
    print(
        f"packed: {path} | {size:,} bytes (tensors {data:,}, header {size - data:,}) | "
        f"{size / fp32:.3f} of the float network's {fp32:,}"
    )
    if not allowed(packed.header.target):
        print(f"packed: {packed.header.target} is your own model: qexp eval needs trust=true")
    written = {"file": str(path), "bytes": size, "data_bytes": data, "fp32_bytes": fp32}
    if images is not None:
        found = difference(model, restore(packed, trust=True), images)
        print(f"packed: adapters in {cfg.adapters}: {found}")
        written |= {"adapters": cfg.adapters, **found._asdict()}
    return written


def _onnx(
    model: nn.Module, dataset: Any, trained: DictConfig, path: Path, cfg: DictConfig
) -> dict[str, Any]:
    require("onnx")
    from qexp.export.onnx_network import to_onnx

    blob = to_onnx(pack_run(model, dataset, trained)).SerializeToString()
    runs = importlib.util.find_spec("onnxruntime") is not None
    if not runs or isinstance(dataset, Absent):
        lacking = "its images" if runs else "the package onnxruntime"
        print(f"onnx: not compared with the run, for lack of {lacking}")
        return _written(model, dataset, path, blob)
    from qexp.export.runtime import session

    found = difference(model, session(blob), _compared(dataset))
    result = _written(model, dataset, path, blob)
    print(f"onnx: {found}")
    return {**result, **found._asdict()}


def _compared(dataset: Any) -> Any:
    return dataset.calibration_images(min(COMPARED, dataset.train_size), 0)


def _onnx_int8(
    model: nn.Module, dataset: Any, trained: DictConfig, path: Path, cfg: DictConfig
) -> dict[str, Any]:
    require("onnx")
    require("onnxruntime")
    from qexp.export.onnx_int8 import to_onnx_int8
    from qexp.export.runtime import session

    images = _compared(dataset)
    written, report = to_onnx_int8(pack_run(model, dataset, trained), images)
    blob = written.SerializeToString()
    found = difference(model, session(blob), images)
    result = _written(model, dataset, path, blob)
    where = f" ({report.worst_layer})" if report.level_error else ""
    print(
        f"onnx: {report.layers} of {report.quantized} quantized layers in 8-bit integers | largest "
        f"error of a level {report.level_error:.2%} of its channel's largest{where} | "
        f"{report.rounded_results} results rounded to 8 bits\nonnx: {found}"
    )
    return {**result, **asdict(report), **found._asdict()}


def _written(model: nn.Module, dataset: Any, path: Path, blob: bytes) -> dict[str, Any]:
    _save(path, blob)
    fp32 = account(model, trace(model, dataset.input_shape)).fp32_bytes
    print(
        f"onnx: {path} | {len(blob):,} bytes | {len(blob) / fp32:.3f} of the float network's "
        f"{fp32:,} | images [N, {', '.join(map(str, dataset.input_shape))}] -> logits"
    )
    return {"file": str(path), "bytes": len(blob), "fp32_bytes": fp32}


def _save(path: Path, blob: bytes) -> None:
    try:
        write_bytes(path, blob)
    except OSError as error:
        raise RunError(
            f"export: '{path}' cannot be written ({error.strerror}). Set file=... to another place."
        ) from error


def pack_run(
    model: nn.Module, dataset: Any, trained: DictConfig, adapters: torch.dtype = torch.float32
) -> Any:
    """The `Packed` of a run's network and config."""
    from qexp.export.packed import pack_network

    node: Any = OmegaConf.to_container(trained.model, resolve=True)
    keywords = {k: v for k, v in node.items() if k not in ("_target_", "name", "checkpoint")}
    return pack_network(
        model,
        target=node["_target_"],
        keywords=keywords,
        num_classes=dataset.num_classes,
        input_shape=tuple(dataset.input_shape),
        data=_data(trained, dataset),
        adapters=adapters,
    )


def _data(cfg: DictConfig, dataset: Any) -> dict[str, Any]:
    """`Header.data` of a run's data set."""
    moments = {key: [float(v) for v in cfg.dataset.get(key) or ()] for key in ("mean", "std")}
    found = {"name": str(cfg.dataset.name), **moments, "resize": cfg.dataset.get("resize")}
    found["classes"] = list(class_names(dataset))
    return {key: value for key, value in found.items() if value or key in ("mean", "std")}


FORMATS: dict[str, tuple[Callable[..., dict[str, Any]], str]] = {
    "packed": (_packed, ".safetensors"),
    "onnx": (_onnx, ".onnx"),
    "onnx_int8": (_onnx_int8, ".int8.onnx"),
}

# ---------------------------------------------------------------------------------------------
# Evaluation of a file

BATCH = 256  # images; a file has no recipe


def load_packed(
    path: Path,
    run: Path | None,
    device: torch.device,
    *,
    trust: bool = False,
    engine: str = "float",
    root: str | None = None,
) -> tuple[nn.Module, Any]:
    """`(network, data set)` of a packed file.

    Args:
        run: a run's folder, whose data set is used; without one, the data
            set that the file names, with the file's normalisation.
        engine: `float`, or one of `qexp.engine`; see `engine_device`.
        root: as `load_run`.

    Raises:
        CheckpointError: a file that is refused, or that does not fit the data set.
    """
    require("safetensors")
    from qexp.engine import integer_network
    from qexp.export.header import FormatError
    from qexp.export.network import restore
    from qexp.export.packed import read, refusal
    from qexp.recipes.build import make_dataset, moved_to

    packed = read(path)
    try:
        if engine == "float":
            model = restore(packed, trust=trust)
        else:
            model = integer_network(packed, engine, trust=trust)
    except FormatError as error:
        raise refusal(path, error) from error
    data = packed.header.data
    trained = None if run is None else run_config(run, "export")
    if trained is None:
        dataset = _named_dataset(data, device, root)
    else:
        moved_to(root, trained.dataset)
        dataset = make_dataset(trained, device)
    shape = (dataset.num_classes, tuple(dataset.input_shape))
    if shape != (packed.header.num_classes, packed.header.input_shape):
        raise CheckpointError(
            f"export: '{path}' is for {packed.header.num_classes} classes of images "
            f"{list(packed.header.input_shape)}, the data set has {shape[0]} of {list(shape[1])}. "
            "Give the run it was trained in: run=FOLDER"
        )
    names = list(class_names(dataset)) or data.get("classes")
    found = {"classes": names} if trained is None else _data(trained, dataset)
    differing = [key for key in data if key != "name" and found.get(key, data[key]) != data[key]]
    if other := ["list of classes" if key == "classes" else key for key in differing]:
        raise CheckpointError(
            f"export: '{path}' is for images of another {' and '.join(other)} than "
            f"{run or data['name']} has. Give the run it was trained in: run=FOLDER"
        )
    return model.to(device), dataset


def _named_dataset(data: Any, device: torch.device, root: str | None) -> Any:
    """One of our data sets, with the file's normalisation: a file names no code and no path."""
    from hydra.utils import get_class, instantiate

    from qexp.recipes.build import moved_to

    ours = {p.stem: p for p in sorted((config.configs_dir() / "dataset").glob("*.yaml"))}
    names = {str(OmegaConf.select(OmegaConf.load(p), "name")): p for p in ours.values()}
    if data["name"] not in names:
        raise CheckpointError(
            f"export: the file was trained on '{data['name']}', which is not one of qexp's data "
            "sets. Give the run it was trained in: run=FOLDER"
        )
    node: Any = OmegaConf.load(names[data["name"]])
    moved_to(root, node)
    if getattr(get_class(node._target_), "by_settings", False):
        print(
            f"warning: images of '{data['name']}' depend on settings that the file does not hold; "
            "these are the defaults. The run's own: run=FOLDER",
            file=sys.stderr,
        )
    for key in ("mean", "std"):
        if len(data[key]) != len(node.get(key) or ()):
            raise CheckpointError(
                f"export: the file's {key} is not that of '{data['name']}'. Give the run it was "
                "trained in: run=FOLDER"
            )
        node[key] = data[key]
    if "resize" in data and "resize" in node:
        node.resize = data["resize"]
    return instantiate(node, _convert_="all", device=device, batch_size=BATCH, seed=0)
