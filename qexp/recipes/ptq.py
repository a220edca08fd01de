"""Post-training quantization, top to bottom: a few images, no labels, no training.

    data -> float network -> fold batch norms -> swap layers -> calibrate
         -> reconstruct unit by unit -> correct biases -> evaluate -> result

What is reconstructed, and from what, belongs to the method (`quantizer.reconstruct`, plan.py);
how long, to this recipe. A method without reconstruction ends after calibration.

A run can stop anywhere and continue bit for bit: `last.pt` is written after every unit, and each
unit draws from its own seed. The finished `last.pt` also holds `float`, the folded float network
with every weight moved to where round-to-nearest gives its learned code: the start of QAT.
"""

from __future__ import annotations

import copy
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from tqdm import tqdm

from qexp import plot_ptq
from qexp.errors import ConfigError, RunError
from qexp.quant.adaround import AdaRound
from qexp.quant.bias import correct_bias_
from qexp.quant.blocks import Unit, find_units
from qexp.quant.cache import Store
from qexp.quant.convert import (
    Bits,
    calibrate_,
    check_calibrated,
    float_operands,
    quant_layers,
    quantizers,
)
from qexp.quant.fold import fold_bn_
from qexp.quant.plan import Method, Pass, passes
from qexp.quant.reconstruct import Data, reconstruct_unit
from qexp.recipes import build, outcome, settings
from qexp.recipes.compilation import choose, compile_for
from qexp.recipes.evaluate import evaluate
from qexp.recipes.ptq_settings import Settings
from qexp.recipes.start import float_start
from qexp.recipes.watch import unlearned
from qexp.runner import checkpoint
from qexp.runner.device import pick_device, seed_everything
from qexp.runner.run import Run

# Change of the logits, to their largest, above which a folded network is another one; seen: 1e-6.
FOLD_ERROR = 1e-3


def ptq(cfg: DictConfig, run: Run) -> dict[str, Any]:
    """Run the recipe; returns the fields of result.json."""
    s = Settings.of(cfg.recipe)
    s.check()
    method = build.make_method(cfg)
    device = pick_device(cfg.device)
    seed_everything(cfg.seed)
    last = run.dir / "last.pt"
    saved = checkpoint.load(last) if run.resumed and last.exists() else None

    # The start: data, a float network, its batch norms folded.
    dataset = build.make_dataset(cfg, device)
    start = float_start(cfg, settings.Settings(), dataset, run, device, None)
    if start.ptq is not None:
        raise ConfigError(
            f"config: model.checkpoint={start.source} is itself a post-training run. "
            "Give the float network it started from, or train on with recipe=qat."
        )
    model = start.model.eval()
    every = dataset.calibration_images(s.images + s.held_out, cfg.seed)
    data = Data(every[: s.images], every[s.images :])
    fold_error = _fold(model, data.held_out[:8], run)
    reference = copy.deepcopy(model).requires_grad_(False)

    # The quantized network, calibrated.
    bits = None if saved is None else {k: Bits(*v) for k, v in saved["bits"].items()}
    context = build.policy_context(cfg, model, dataset, 1) if saved is None else {}
    network = build.make_network(cfg, model, dataset.input_shape, context=context, bits=bits)
    if saved is None:
        outcome.log_plan(run, network)
        with float_operands(model, weight=s.calibrate_on == "float", act=s.calibrate_on == "float"):
            calibrate_(model, data.images[: s.act_images])
        check_calibrated(model)
    else:
        model.load_state_dict(saved["model"])
        network.sensitivity = saved.get("sensitivity", {})

    # Unit by unit.
    done: list[dict[str, Any]] = [] if saved is None else saved["units"]

    def save(**more: Any) -> None:
        state = {
            "model": model.state_dict(),
            "bits": {k: list(v) for k, v in network.bits.items()},
            "sensitivity": network.sensitivity,
            "folded": True,
            "kinds": {n: type(q).__name__ for n, q in quantizers(model).items()},
            "start": start.record(),
            "units": done,
        }
        checkpoint.save(last, state | more)
        run.status("running")  # with the time so far: a kill leaves nothing else

    sweeps = passes(method, s)
    for name in unlearned(model, method, s.lr):
        run.warn(
            f"'{name}' of the inputs' quantizers stays as calibrated: recipe.lr has no rate for "
            f"it. Add +recipe.lr.{name}=0.001 to learn it."
        )
    if sweeps:
        # Units change, so only kernels are worth compiling.
        mode = choose(cfg.compile, network.layers, 3 * s.iterations * s.minibatch, device)
        compile_for("kernels" if mode == "model" else mode, model, [], 0, device, run)
        work = _Work(cfg, s, method, reference, data, sweeps, _units(method, reference, network))
        for row in work.rows(run, network, len(done)):
            done.append(row)
            save()
    shifts = {}
    if method.bias_correction:
        shifts = correct_bias_(model, reference, data.images[: s.act_images])

    # The outcome.
    if s.plots:
        plot_ptq.draw([row for row in done if row], run.dir, cfg.quantizer.name)
    test = evaluate(model, dataset.eval_batches("test"))
    save(float=float_state(model), top1=test.top1)
    protocol = outcome.protocol(cfg, asdict(s), dataset, start.record(), run.segments)
    run.info(f"top-1 {test.top1:.2f}" + (f", float {start.top1:.2f}" if start.top1 else ""))
    return outcome.result(
        cfg,
        run,
        network,
        protocol,
        top1=test.top1,
        fp32_top1=start.top1,
        top1_best=test.top1,
        best_epoch=0,
        best_selected_on="none",
        epochs=0,
        images_per_s=test.images_per_s,
        reconstruction={"method": asdict(method), **_summary(done, fold_error, shifts)},
    )


def _fold(model: nn.Module, images: Tensor, run: Run) -> float:
    """Fold batch norms in place; returns the relative change of the logits."""
    with torch.no_grad():
        before = model(images)
        folds = fold_bn_(model)
        error = float((model(images) - before).abs().max() / before.abs().max().clamp_min(1e-12))
    if not error < FOLD_ERROR:
        raise RunError(
            f"run: folding batch norms changed the logits by {error:.0e} of the largest. "
            "Please report the model; recipe=qat trains it without folding."
        )
    kept = [f for f in folds if f.conv is None]
    run.info(f"folded {len(folds) - len(kept)} of {len(folds)} batch norms (error {error:.1e})")
    for fold in kept:
        run.warn(f"batch norm '{fold.norm}' is not folded: {fold.note}")
    return error


def _units(method: Method, reference: nn.Module, network: build.Network) -> list[Unit]:
    assert method.granularity != "none"
    return find_units(reference, [layer.name for layer in network.layers], method.granularity)


@dataclass
class _Work:
    """All units of all passes, with what each of them needs."""

    cfg: DictConfig
    s: Settings
    method: Method
    reference: nn.Module
    data: Data
    sweeps: Sequence[Pass]
    units: Sequence[Unit]

    def rows(self, run: Run, network: build.Network, skip: int) -> Any:
        """Reconstruct from unit number `skip` on; yields what happened in each."""
        macs = {layer.name: layer.macs for layer in network.layers}
        jobs = [(sweep, k) for sweep in range(len(self.sweeps)) for k in range(len(self.units))]
        effort = [
            self.sweeps[sweep].iterations * sum(macs[n] for n in self.units[k].layers)
            for sweep, k in jobs
        ]
        store = Store(self.data.images.device, self.s.cache_gb * 1e9, run.dir)
        began = time.perf_counter()
        for number, (sweep, k) in enumerate(jobs):
            if number < skip:
                continue
            if k == 0 and sweep == 1 and not self.method.quantized_inputs:
                self._calibrate_inputs(network.model)
            row = self._one(network.model, self.sweeps[sweep], k, number, store)
            yield row
            spent = time.perf_counter() - began
            ahead = sum(effort[number + 1 :]) / max(1, sum(effort[skip : number + 1]))
            _report(run, row, number, len(jobs), spent * ahead)
        if len(self.sweeps) == 1 and not self.method.quantized_inputs:
            self._calibrate_inputs(network.model)

    def _one(
        self, model: nn.Module, sweep: Pass, k: int, number: int, store: Store
    ) -> dict[str, Any]:
        unit = self.units[k]
        if self.cfg.max_steps is not None:
            sweep = sweep._replace(iterations=min(sweep.iterations, self.cfg.max_steps))
        bar = tqdm(total=sweep.iterations, desc=unit.name, leave=False, disable=None)
        row = reconstruct_unit(
            model,
            self.reference,
            unit,
            self.data,
            sweep,
            self.method,
            self.s,
            store,
            later=[name for u in self.units[k + 1 :] for name in u.layers],
            seed=1_000_003 * self.cfg.seed + 2 * number,
            batch_size=self.s.batch_size,
            tick=lambda iteration: bar.update(),
        )
        bar.close()
        return row | {"peak_bytes": _peak_bytes(self.data.images.device)} if row else row

    def _calibrate_inputs(self, model: nn.Module) -> None:
        """Steps of activations again, now that the weights before them are the learned ones."""
        for layer in quant_layers(model).values():
            layer.act_quantizer.calibrated.fill_(False)
        calibrate_(model, self.data.images[: self.s.act_images], fresh_only=True)


def _report(run: Run, row: Mapping[str, Any], number: int, jobs: int, left: float) -> None:
    """One event and one line a unit."""
    if not row:
        return
    run.event("unit", number=number, **row)
    for key in ("error", "error_before", "wall_s"):
        run.scalar(f"unit/{key}", row[key], number)
    rounded = "" if row["converged"] is None else f" | decided {100 * row['converged']:.1f} %"
    run.info(
        f"unit {number + 1:02d}/{jobs} {row['unit']} ({row['pass']}) | error "
        f"{row['error_before']:.4f} -> {row['error']:.4f}{rounded} | "
        f"{row['wall_s']:.0f} s | eta {round(left) // 60}:{round(left) % 60:02d}"
    )


def _peak_bytes(device: torch.device) -> int:
    """Most memory this process ever had, on the device or (CPU) resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # Linux counts kilobytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _summary(
    rows: Sequence[Mapping[str, Any]], fold_error: float, shifts: Mapping[str, float]
) -> dict[str, Any]:
    """What reconstruction cost and reached, for result.json."""
    units = [{k: v for k, v in row.items() if k != "trace"} for row in rows if row]
    return {
        "units": units,
        "wall_s": sum(row["wall_s"] for row in units),
        "peak_bytes": max((row["peak_bytes"] for row in units), default=0),
        "worse_than_start": [row["unit"] for row in units if row["error"] > row["error_before"]],
        "fold_error": fold_error,
        "bias_shifts": dict(shifts),
    }


@torch.no_grad()
def float_state(model: nn.Module) -> dict[str, Tensor]:
    """The float network inside a quantized one, ready for QAT: names as in the folded network.

    Each weight with learned rounding is the one nearest to the original that round-to-nearest
    maps to the learned code; everything else is as it is.
    """
    layers = quant_layers(model)
    state = {
        name: value
        for name, value in model.state_dict().items()
        if ".weight_quantizer." not in name and ".act_quantizer." not in name
    }
    for name, layer in layers.items():
        if isinstance(layer.weight_quantizer, AdaRound):
            state[f"{name}.weight"] = layer.weight_quantizer.latent(layer.weight)
    return state
