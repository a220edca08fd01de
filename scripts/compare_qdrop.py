"""QDrop's released code and ours, on the same block or network, from the same float ResNet-20.

    git clone https://github.com/wimh966/QDrop ../QDrop
    python scripts/compare_qdrop.py --peer ../QDrop --out FILE.json [--block layer2.1] [--whole]

One process and thread. Both get the same images, iterations, minibatch, rates and schedule
(experiment=ptq_cifar10_quick unless an option says otherwise); who takes turns:

    float         the loop without quantizers: gather, forward, error, backward, Adam on the weights
    peer          the peer's `reconstruction` and blocks, as released
    peer_inputs   the same, its quantizers where ours are: before convolutions, residual in float
    ..._closed    the same with torch.clamp's gradient of before 2026 (qdrop_adapter.py)
    qexp          experiment=ptq_cifar10_quick quantizer=qdrop
    qexp_eager    the same without compiled kernels (one block only)

One block (default): everything before it is in float, so all learn from the same input; the peer's
block reads it through the quantizer that the block before it ends in. CPU time of an iteration is
that between two forwards of the block, the first few left out; repeats take turns and draw anew.
`--whole`: all units in order, each program's own calibration and its own first and last layer.
Errors are |y_hat - y|^2 / |y|^2 of a block's output before any output quantizer, on held-out
images; `..._read` of the peer: after it.

What is replaced in the peer, and how its ResNet becomes ours: qdrop_adapter.py. Freed memory stays
with the process (`keep_memory`) for both.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import statistics
import subprocess
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig
from qdrop_adapter import Program, closed_clamp, load_peer, peer_program, unit_names
from torch import Tensor, nn

from qexp.bench.floor import in_turn
from qexp.bench.step import Contender, peak_bytes
from qexp.config import configs_dir
from qexp.models.load import load_weights
from qexp.models.resnet import ResNet
from qexp.quant.blocks import Unit, find_units
from qexp.quant.cache import Store, record
from qexp.quant.convert import calibrate_, float_operands, quant_layers
from qexp.quant.fold import fold_bn_
from qexp.quant.functional import compile_kernels
from qexp.quant.learn import output_error
from qexp.quant.plan import passes
from qexp.quant.reconstruct import Data, reconstruct_unit, relative_error
from qexp.recipes import build
from qexp.recipes.evaluate import evaluate
from qexp.recipes.ptq_settings import Settings
from qexp.runner.device import keep_memory

CPU = torch.device("cpu")
SKIP = 5  # iterations at the start of a run that are not timed
CHUNK = 64  # images a forward pass when inputs and errors are computed


# ---------------------------------------------------------------------------------------------
# Ours


def our_program(
    cfg: DictConfig, start: ResNet, shape: tuple[int, ...], data: Data, s: Settings, kernels: bool
) -> Program:
    """Our network, calibrated as recipe=ptq does."""
    model = copy.deepcopy(start)
    fold_bn_(model)
    reference = copy.deepcopy(model).requires_grad_(False)
    network = build.make_network(cfg, model, shape)
    began = time.process_time()
    with float_operands(model):
        calibrate_(model, data.images[: s.act_images])
    took = time.process_time() - began
    method = instantiate(cfg.quantizer.reconstruct)
    (sweep,) = passes(method, s)
    units = find_units(reference, [layer.name for layer in network.layers], "block")
    known: dict[str, Unit] = {unit.name: unit for unit in units}
    store = Store(CPU, 8e9, None)

    def learn(model: nn.Module, unit: str, seed: int) -> None:
        compile_kernels(kernels)
        reconstruct_unit(
            model, reference, known[unit], data, sweep, method, s, store,
            seed=seed, batch_size=CHUNK,
        )  # fmt: skip
        compile_kernels(False)

    def alone(model: nn.Module, unit: str) -> None:
        for name, layer in quant_layers(model).items():
            layer.weight_enabled = layer.act_enabled = name.startswith(unit + ".")

    return Program(model, reference, learn, alone, took)


def float_program(start: ResNet, images: Tensor, s: Settings) -> Program:
    """The same loop around a float block."""
    reference = copy.deepcopy(start)
    fold_bn_(reference)
    reference.requires_grad_(False)

    def learn(model: nn.Module, unit: str, seed: int) -> None:
        block = model.get_submodule(unit)
        target = reference.get_submodule(unit)
        x, y = record(reference, target, images, CHUNK, Store(CPU, 8e9, None), output=True)
        assert y is not None
        convs = [m.weight.requires_grad_() for m in block.modules() if isinstance(m, nn.Conv2d)]
        optimizer = torch.optim.Adam(convs, lr=1e-5, fused=True)
        draw = torch.Generator().manual_seed(seed)
        for _ in range(s.iterations):
            index = torch.randint(len(y), (s.minibatch,), generator=draw)
            target = y.index_select(0, index)
            error = output_error(block(x.index_select(0, index)), target, 2.0, y.shape[1])
            optimizer.zero_grad(set_to_none=True)
            error.backward()
            optimizer.step()

    return Program(copy.deepcopy(reference), reference, learn)


# ---------------------------------------------------------------------------------------------
# Measuring


@contextmanager
def stopwatch(block: nn.Module) -> Iterator[list[tuple[float, float]]]:
    """CPU and wall seconds at every forward of `block` that learns."""
    stamps: list[tuple[float, float]] = []

    def stamp(module: nn.Module, inputs: Any) -> None:
        if torch.is_grad_enabled():
            stamps.append((time.process_time(), time.perf_counter()))

    handle = block.register_forward_pre_hook(stamp)
    try:
        yield stamps
    finally:
        handle.remove()


def errors(program: Program, model: nn.Module, unit: str, images: Tensor, when: str) -> dict:
    """Relative errors of a block on held-out images (module docstring)."""
    block, store = model.get_submodule(unit), Store(CPU, 8e9, None)
    x_hat, _ = record(model, block, images, CHUNK, store, output=False)
    target = program.reference.get_submodule(unit)
    _, y = record(program.reference, target, images, CHUNK, store, output=True)
    assert y is not None
    found = {}
    if getattr(block, "qoutput", False):
        found[f"{when}_read"] = relative_error(block, x_hat, y, CHUNK, CPU)
    with mock.patch.object(block, "qoutput", False, create=True):
        return {when: relative_error(block, x_hat, y, CHUNK, CPU), **found}


def run_block(programs: dict[str, Program], data: Data, given: argparse.Namespace) -> dict:
    """Every program on one block, taking turns."""
    found: dict[str, dict[str, Any]] = {}
    names = list(programs)
    for k in range(given.repeats):
        for name in in_turn(names, k):
            program = programs[name]
            model = copy.deepcopy(program.model)
            program.alone(model, given.block)
            row = errors(program, model, given.block, data.held_out, "before")
            with stopwatch(model.get_submodule(given.block)) as stamps:
                program.learn(model, given.block, given.seed + k)
            row |= errors(program, model, given.block, data.held_out, "after")
            n = len(stamps) - 1 - SKIP
            row["cpu_ms"], row["wall_ms"] = (
                1e3 * (b - a) / n for a, b in zip(stamps[SKIP], stamps[-1], strict=True)
            )
            for key, value in row.items():
                found.setdefault(name, {}).setdefault(key, []).append(value)
    for name, program in programs.items():
        row, model = found[name], copy.deepcopy(program.model)
        program.alone(model, given.block)
        step: Any = functools.partial(program.learn, model, given.block, 0)
        row["peak_bytes"] = peak_bytes(Contender(name, model, step), CPU)
        floats = found["float"]["cpu_ms"]
        row["cpu_ratio"] = [a / b for a, b in zip(row["cpu_ms"], floats, strict=True)]
        row["median"] = {k: statistics.median(v) for k, v in row.items() if isinstance(v, list)}
        print(name, {k: round(v, 4) for k, v in row["median"].items()}, flush=True)
    return found


def run_whole(
    programs: dict[str, Program], data: Data, dataset: Any, given: argparse.Namespace
) -> dict:
    """The whole network by every program, one after the other."""
    found: dict[str, dict[str, Any]] = {}
    for name, program in programs.items():
        model, cpu = copy.deepcopy(program.model), 0.0
        units: dict[str, dict[str, float]] = {}
        for number, unit in enumerate(unit_names(program.reference)):
            inner = unit not in ("conv1", "linear")
            row = errors(program, model, unit, data.held_out, "before") if inner else {}
            began = time.process_time()
            program.learn(model, unit, 1_000_003 * given.seed + 2 * number)
            cpu += time.process_time() - began
            units[unit] = row | (
                errors(program, model, unit, data.held_out, "after") if inner else {}
            )
        top1 = evaluate(model, dataset.eval_batches("test")).top1
        found[name] = {"top1": top1, "cpu_s": cpu, "units": units}
        print(f"{name}: top-1 {top1:.2f}, {cpu:.0f} s CPU", flush=True)
    return found


def git(folder: Path, *words: str) -> str:
    return subprocess.check_output(["git", "-C", str(folder), *words], text=True).strip()


def main(argv: Sequence[str] | None = None) -> None:
    """Build, measure, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--peer", type=Path, required=True, help="a checkout of wimh966/QDrop")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--block", default="layer2.1", help="layer1.0 to layer3.2")
    parser.add_argument("--whole", action="store_true", help="the whole network, not one block")
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--iterations", type=int, default=300)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=16, help="images an iteration")
    parser.add_argument("--lr", type=float, nargs=2, default=(3e-2, 3e-3), help="rounding, steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=5, help="of one block")
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    keep_memory()
    warnings.filterwarnings("ignore", message="_aminmax is deprecated")
    with initialize_config_dir(str(configs_dir()), version_base="1.3"):
        cfg = compose("train", [
            "experiment=ptq_cifar10_quick", "quantizer=qdrop", "device=cpu",
            f"bits={given.bits}", f"seed={given.seed}", f"recipe.images={given.images}",
            f"recipe.iterations={given.iterations}", f"recipe.minibatch={given.batch_size}",
            f"recipe.lr.rounding={given.lr[0]}", f"recipe.lr.scale={given.lr[1]}",
        ])  # fmt: skip
    s = Settings.of(cfg.recipe)
    s.check()
    dataset = build.make_dataset(cfg, CPU)
    start: Any = build.make_model(cfg, dataset, CPU).eval()
    load_weights(start, cfg.model._target_, cfg.model.checkpoint)
    every = dataset.calibration_images(s.images + s.held_out, given.seed)
    data = Data(every[: s.images], every[s.images :])
    report = provenance(given)
    peer = load_peer(given.peer)
    programs = {}
    for name in ("peer", "peer_inputs"):
        inputs = name == "peer_inputs"
        programs[name] = peer_program(peer, start, data.images, given.bits, s, inputs=inputs)
        programs[f"{name}_closed"] = closed_clamp(programs[name])
    programs["qexp"] = our_program(cfg, start, dataset.input_shape, data, s, kernels=True)
    report["calibration_cpu_s"] = {name: p.calibration_s for name, p in programs.items()}
    with torch.no_grad():
        logits = start(data.held_out)
        report["float_difference"] = {
            name: float((p.reference(data.held_out) - logits).abs().max() / logits.abs().max())
            for name, p in programs.items()
        }
    if given.whole:
        report["whole"] = run_whole(programs, data, dataset, given)
    else:
        programs["qexp_eager"] = our_program(cfg, start, dataset.input_shape, data, s, False)
        programs = {"float": float_program(start, data.images, s), **programs}
        report["block"] = run_block(programs, data, given)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(report, indent=1) + "\n")


def provenance(given: argparse.Namespace) -> dict[str, Any]:
    """What was run, and by which code; no paths."""
    settings = {k: v for k, v in vars(given).items() if not isinstance(v, Path)}
    here = Path(__file__).parent
    return {
        "settings": settings,
        "peer_commit": git(given.peer, "rev-parse", "HEAD"),
        "peer_clean": not git(given.peer, "status", "--porcelain", "--untracked-files=no"),
        "commit": git(here, "rev-parse", "HEAD"),
        "clean": not git(here, "status", "--porcelain", "--untracked-files=no"),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


if __name__ == "__main__":
    main()
