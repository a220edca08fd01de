"""How fast images come, for each CPU core, and what holds them up.

    python scripts/bench_data.py results/bench_data [--images 96] [--model resnet20] [--device cpu]

Two pipelines: small images that live on the device as uint8 (CIFAR's sizes, crop and flip), beside
a float training step of `--model`; and folders of JPEGs (made ones of ImageNet's mean size, 500 x
375 pixels, photograph-like in detail), stage by stage, beside a step of a ResNet-18 of 224 pixels.
Times are CPU seconds of one thread; with `--device cuda`, of the small images and their step, wall
seconds on the GPU. Writes data.json.
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from PIL import Image
from torch import Tensor, nn

from qexp.bench.floor import least_seconds
from qexp.config import configs_dir
from qexp.data.augment import normalise
from qexp.data.decode import collate
from qexp.data.folder import Folder
from qexp.models.build import build_model
from qexp.runner.device import keep_memory, pick_device, set_threads

PIXELS = (500, 375)  # ImageNet's mean width and height
QUALITY = 95


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--images", type=int, default=96)
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--device", default="cpu", help="of the small images and their model")
    given = parser.parse_args(argv)
    set_threads(1)
    keep_memory()
    device = pick_device(given.device)
    found = {"small": small(given.model, device), "folder": folder(given.images)}
    for name, rates in found.items():
        print(name)
        for key, value in rates.items():
            print(f"  {key:34s} {value if isinstance(value, str) else f'{value:10.1f}'}")
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "data.json").write_text(json.dumps(found, indent=2) + "\n")


def cpu_seconds(work: Callable[[], Any], tries: int = 2) -> float:
    """CPU time of `work`, the least of some tries."""
    took = []
    for _ in range(tries):
        began = time.process_time()
        work()
        took.append(time.process_time() - began)
    return min(took)


def seconds(work: Callable[[], Any], device: torch.device) -> float:
    """CPU time of `work` on a CPU; on a GPU wall time until it is done, the least of some tries."""
    return cpu_seconds(work) if device.type == "cpu" else least_seconds(work, device)


def step_of(model: nn.Module, x: Tensor) -> Callable[[], None]:
    """A training step's forward and backward."""
    y = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    return lambda: F.cross_entropy(model(x), y).backward()


def model_named(name: str, classes: int) -> nn.Module:
    """The network of configs/model."""
    with initialize_config_dir(str(configs_dir()), version_base="1.3"):
        node: Any = compose("train", [f"model={name}"]).model
    return build_model(node, classes, 3).train()


def small(model: str, device: torch.device) -> dict[str, Any]:
    """Images a second of the device-resident loader, and of the model it feeds; of one core."""
    words = ["dataset=synthetic", "dataset.train_images=4096", "dataset.pad=4", "dataset.flip=true"]
    with initialize_config_dir(str(configs_dir()), version_base="1.3"):
        node = compose("train", words).dataset
    dataset: Any = instantiate(node, _convert_="all", batch_size=128, seed=0, device=device)
    count = dataset.steps_per_epoch * 128
    loaded = count / seconds(lambda: [None for _ in dataset.train_batches(0)], device)
    x, _ = next(dataset.train_batches(0))
    net = model_named(model, 10).to(device)
    step = step_of(net, x)
    step()
    trained = len(x) / seconds(step, device)
    per = "img/s per core" if device.type == "cpu" else "img/s"
    return {
        f"loader {per}": loaded,
        f"{model} float step {per}": trained,
        "loader's share of a step (%)": 100 * trained / (loaded + trained),
    }


def photograph(seed: int) -> bytes:
    """A JPEG with detail at all scales, of about 110 kB as those of ImageNet."""
    g = torch.Generator().manual_seed(seed)
    width, height = PIXELS
    image = torch.zeros(3, height, width)
    for octave in range(9):
        coarse = torch.randn(1, 3, max(2, height >> octave), max(2, width >> octave), generator=g)
        image += F.interpolate(coarse, (height, width), mode="bilinear")[0] * 2.0 ** (0.2 * octave)
    pixels = (128 + image * (40 / image.std())).clamp(0, 255).to(torch.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=QUALITY)
    return file.getvalue()


def folder(count: int) -> dict[str, Any]:
    """Images a second and core of the ImageNet pipeline, its stages, and a ResNet-18."""
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        for part, images in (("train", count), ("val", 2)):
            for label in ("a", "b"):
                (root / part / label).mkdir(parents=True)
                for i in range(images // 2):
                    (root / part / label / f"{i}.jpg").write_bytes(photograph(i))
        dataset = Folder(name="made", root=place, workers=0, batch_size=32, seed=0)
        paths = [Path(path) for path, _ in dataset._splits["train"][0].samples]
        size = sum(p.stat().st_size for p in paths) / len(paths)
        whole = cpu_seconds(lambda: [None for _ in dataset.train_batches(0)], 1)
        stages = stages_of(dataset, paths)
    net = model_named("resnet18", 10)
    step = step_of(net, torch.randn(8, 3, 224, 224))
    step()
    trained = 8 / cpu_seconds(step, 1)
    images = dataset.steps_per_epoch * 32
    slowest = max(stages, key=lambda key: stages[key])
    return {
        "bytes a file": size,
        "pipeline img/s per core": images / whole,
        "resnet18 float step img/s per core": trained,
        **{f"{key} (ms an image)": 1e3 * s / len(paths) for key, s in stages.items()},
        "bottleneck": slowest,
    }


def stages_of(dataset: Folder, paths: Sequence[Path]) -> dict[str, float]:
    """CPU seconds of each stage for all images."""
    data: list[bytes] = []
    decoded: list[Image.Image] = []
    cut: list[Tensor] = []

    def read() -> None:
        data[:] = [p.read_bytes() for p in paths]

    def decode() -> None:
        decoded[:] = [Image.open(io.BytesIO(d)).convert("RGB") for d in data]

    def crop() -> None:
        cut[:] = [dataset._random(image) for image in decoded]

    stages = {
        "read": cpu_seconds(read),
        "decode": cpu_seconds(decode),
        "crop, resize, flip": cpu_seconds(crop),
    }
    items = [(image, 0) for image in cut]
    stages["collate"] = cpu_seconds(lambda: collate(items))  # type: ignore[arg-type]
    batch = torch.stack(cut)
    stages["normalise"] = cpu_seconds(lambda: normalise(batch, dataset._mean, dataset._std))
    return stages


if __name__ == "__main__":
    main()
