"""`qexp bench inference`: what a quantized forward pass costs, as a ratio to the float one.

For each model and batch, these take turns in one process, on one device:

    float        the float network in torch, eager, channels-first: what ratios are to
    again        the same a second time: how far its ratio is from 1 is the noise
    float_onnx   the float network in onnxruntime, on the CPU
    float_tf32   the float network in torch, 10 bits of the mantissa, on CUDA
    float_bf16   the float network in torch, in bfloat16, channels-last
    and for each quantizer the engines of `engines`

Networks have random weights and see one batch of noise; the time of a pass does not depend on
what is in it. Each engine's logits are compared with those of the fake-quantized network.
"""

from __future__ import annotations

import copy
import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from qexp.bench import inference_table as table
from qexp.bench.engines import (
    AGAIN,
    ENGINES,
    FLOAT,
    FLOAT_BF16,
    FLOAT_ONNX,
    FLOAT_TF32,
    Engine,
    Place,
    build,
    check_engine,
    engines_of,
    float_engine,
    pack,
)
from qexp.bench.floor import in_turn
from qexp.bench.output import say_written, unused, write_folder
from qexp.bench.settings import fields_of, no_count, no_option
from qexp.bench.table import device_name
from qexp.bench.train import composed
from qexp.errors import ConfigError
from qexp.export.compare import Difference, difference
from qexp.models.build import build_model
from qexp.models.opened import open_attention_
from qexp.quant.convert import calibrate_
from qexp.recipes.build import make_network
from qexp.runner.device import keep_memory, pick_device, seed_everything, synchronize, tf32
from qexp.runner.device import set_threads as use_threads

CLASSES = 10
CALIBRATED = 32  # images of noise
FLOATS = (FLOAT_ONNX, FLOAT_TF32, FLOAT_BF16)
COMPARED = 16  # images on which logits are compared
SLOW = 10  # times the float pass: from there on an engine runs in every fifth turn only
SELDOM = 5


@dataclass(frozen=True)
class InferenceSettings:
    """`configs/bench_inference.yaml`, checked; what may be a list is one."""

    quantizers: list[str]
    models: list[str]
    engines: list[str]
    batch: list[int]
    bits: int
    image_size: int | None
    overrides: list[str]
    repeats: int
    warmup: int
    device: str
    threads: int | None
    seed: int
    out: str

    @classmethod
    def of(cls, cfg: DictConfig) -> InferenceSettings:
        """Read the config.

        Raises:
            ConfigError: a value out of range or an unknown engine.
        """
        found = fields_of(cls, cfg)
        device = pick_device(found["device"])
        if found["engines"] == [None]:
            found["engines"] = engines_of(device)
        problems = no_option("engines", found["engines"], [*FLOATS, *ENGINES]) + no_count(found)
        if problems:
            raise ConfigError("\n".join(problems))
        for name in found["engines"]:
            check_engine(name, device)
        return cls(**found)


@dataclass
class Contender:
    """An engine in a group: what it is, what it cost.

    Attributes:
        quantizer: empty for the float network.
        apart: how its logits differ from the fake-quantized network's; None for float.
        wall_s, cpu_s: of each timed pass; CPU seconds of all threads together.
    """

    engine: Engine
    quantizer: str
    apart: Difference | None = None
    wall_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.quantizer} {self.engine.name}".strip()


def bench_inference(cfg: DictConfig) -> list[dict[str, Any]]:
    """Run the bench; prints tables, writes and returns the rows of bench.json."""
    s = InferenceSettings.of(cfg)
    at = Place(pick_device(s.device), use_threads(s.threads))
    keep_memory()
    for model in s.models:  # a wrong name is found before anything is timed
        for name in s.quantizers:
            composed(name, model, s.bits, s.overrides)
    print(f"{device_name(at.device)}, {at.threads} CPU thread(s), W{s.bits}A{s.bits}", flush=True)
    rows: list[dict[str, Any]] = []
    folder = unused(Path(s.out))
    for model in s.models:
        for batch in s.batch:
            with tf32(False):
                contenders, images = _group(s, model, batch, at)
                _take_turns(contenders, images, s)
            facts = {"model": model, "batch": batch, "bits": s.bits, "threads": at.threads}
            facts |= {"device": device_name(at.device), "on": at.device.type}
            found = table.rows(contenders, {**facts, "image_size": images.shape[-1]})
            print(table.text(found), flush=True)
            rows += found
            write_folder(folder, rows, table.draw, seed=s.seed, threads=at.threads)
    say_written(folder)
    return rows


def _group(
    s: InferenceSettings, model: str, batch: int, at: Place
) -> tuple[list[Contender], Tensor]:
    """What takes turns on a batch, and the batch. Networks are built and packed on the CPU."""
    seed_everything(s.seed)
    node: Any = OmegaConf.to_container(
        composed(s.quantizers[0], model, s.bits, s.overrides).model, resolve=True
    )
    size = s.image_size or (224 if node["_target_"].startswith("torchvision.") else 32)
    shape = (3, size, size)
    net = build_model(node, CLASSES, 3)
    open_attention_(net, shape)
    images = torch.randn(max(batch, CALIBRATED), *shape)
    _settle_norms(net, images[:CALIBRATED])
    x, compared = images[:batch].to(at.device), images[:COMPARED].to(at.device)
    placed = copy.deepcopy(net).to(at.device)
    # The first pass of a process takes memory that stays: it is nobody's.
    float_engine(FLOAT, placed, node, shape, x, at)
    found = [
        Contender(float_engine(name, placed, node, shape, x, at), "")
        for name in (FLOAT, AGAIN, *(name for name in s.engines if name in FLOATS))
    ]
    for name in s.quantizers:
        cfg = composed(name, model, s.bits, s.overrides)
        network = make_network(cfg, copy.deepcopy(net), shape).model
        calibrate_(network, images[:CALIBRATED])
        network.eval()
        packed = pack(network, node, shape)
        network.to(at.device)
        for engine in (e for e in s.engines if e not in FLOATS):
            built = build(engine, packed, x, at, images[:CALIBRATED])
            found.append(Contender(built, name, difference(network, built.run, compared)))
    return found, x


def _settle_norms(net: nn.Module, images: Tensor) -> None:
    """Give batch norms the statistics of the batch: untrained ones would let signals vanish."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the plain average
    with torch.no_grad():
        net.train()(images)
    net.eval()


# ---------------------------------------------------------------------------------------------
# Timing


def _take_turns(contenders: Sequence[Contender], x: Tensor, s: InferenceSettings) -> None:
    """Fill in what each pass costs."""
    untimed = {id(c): min(_timed(c.engine.run, x) for _ in range(s.warmup)) for c in contenders}
    base = untimed[id(contenders[0])][0]
    gc.collect()
    gc.disable()  # a collection would be charged to whoever is running
    try:
        for turn in range(s.repeats):
            for c in in_turn(contenders, turn):
                if turn % SELDOM and untimed[id(c)][0] > SLOW * base:
                    continue
                wall, cpu = _timed(c.engine.run, x)
                c.wall_s.append(wall)
                c.cpu_s.append(cpu)
    finally:
        gc.enable()


@torch.no_grad()
def _timed(run: Callable[[Tensor], Tensor], x: Tensor) -> tuple[float, float]:
    """Wall and CPU seconds of one pass."""
    synchronize(x.device)
    wall, cpu = time.perf_counter(), time.process_time()
    run(x)
    synchronize(x.device)
    return time.perf_counter() - wall, time.process_time() - cpu
