"""Unit by unit: the loop of post-training quantization (ptq.py), and what it says of each unit.

`rise_bytes` is the most memory a unit took above what was in use when it began, recorded inputs
and outputs included, on disk too while they are mapped (None: the system does not tell, as macOS).
Results of earlier versions have `peak_bytes` instead: the most that the process ever had, in
earlier units and jobs too.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn
from tqdm import tqdm

from qexp.errors import ConfigError
from qexp.quant.blocks import Unit, find_units, unfit
from qexp.quant.cache import Store
from qexp.quant.convert import calibrate_, quant_layers
from qexp.quant.fold import trace_graph
from qexp.quant.plan import Method, Pass
from qexp.quant.reconstruct import Data, learns, reconstruct_unit
from qexp.quant.trace import Layer
from qexp.recipes import build
from qexp.recipes.outcome import minutes
from qexp.recipes.ptq_settings import Settings
from qexp.runner.memory import Peak, free_bytes
from qexp.runner.run import Run

# Of the free memory, what the recorded inputs and outputs of a unit may take: learning needs some.
SHARE = 0.5


def units_of(method: Method, reference: nn.Module, network: build.Network) -> list[Unit]:
    """The parts that `method` learns one by one, in execution order."""
    assert method.granularity != "none"
    return find_units(reference, [layer.name for layer in network.layers], method.granularity)


def parts_of(units: Sequence[Unit], sweep: Pass) -> Sequence[Unit]:
    """What a pass learns one by one: the units, or all of them as one."""
    if sweep.name != "network":
        return units
    return [Unit("", tuple(name for unit in units for name in unit.layers))]


def check_units(
    cfg: DictConfig, model: nn.Module, layers: Sequence[Layer], input_shape: Sequence[int]
) -> None:
    """Refuse a network that post-training quantization cannot take apart.

    Args:
        model: the float network that `layers` was traced from.
        input_shape: [C, H, W] of one image.

    Raises:
        ConfigError: torch.fx cannot trace it, or a unit cannot be learned on its own.
    """
    training = "recipe=qat with quantizer=lsq or another that trains"
    try:
        trace_graph(model)
    except ValueError as error:
        raise ConfigError(
            f"model: {error}. recipe={cfg.recipe.get('name')} folds batch norms by its graph. "
            f"Use {training}, which needs none."
        ) from error
    method = build.make_method(cfg)
    if method.granularity == "none":
        return
    names = [layer.name for layer in layers]
    units = [unit.name for unit in find_units(model, names, method.granularity)]
    images = torch.zeros(2, *input_shape).to(next(model.parameters()))
    wrong = unfit(model, {*units, *names}, images)
    if name := next((unit for unit in units if unit in wrong), None):
        kind = "layer" if name in names else "block"
        instead = f"quantizer=nearest, which learns none, or {training}"
        if not any(layer in wrong for layer in names):
            instead = "quantizer.reconstruct.granularity=layer"
        raise ConfigError(
            f"model: {kind} '{name}' {wrong[name]}, and quantizer={cfg.quantizer.name} learns it "
            f"on its own, from one tensor [N, ...] to one. Use {instead}."
        )


def cache_bytes(s: Settings, device: torch.device) -> float:
    """Bytes of a unit's recorded inputs and outputs that may stay on the device now."""
    free, limit = free_bytes(device), s.cache_gb * 1e9
    return limit if free is None else min(limit, SHARE * free)


class Clock:
    """How long the units ahead will take, from what those of this session took for their work.

    Args:
        effort: of each unit, in any measure.
        first: the unit that this session begins with.
    """

    def __init__(self, effort: Sequence[float], first: int) -> None:
        self._effort, self._number = list(effort), first
        self._spent = self._done = 0.0  # seconds and effort of finished units

    def begin(self, number: int) -> None:
        """A unit begins: its inputs and outputs are recorded."""
        self._number, self._began = number, time.perf_counter()

    def tick(self, iteration: int, iterations: int) -> float | None:
        """Seconds left of the run after an iteration; None while one alone has been seen."""
        now = time.perf_counter()
        if iteration == 0:
            self._learning = now
            return None
        rest = (now - self._learning) / iteration * (iterations - 1 - iteration)
        whole = now - self._began + rest
        own = self._effort[self._number]
        return rest + self._ahead(self._spent + whole, self._done + own)

    def end(self, *, learned: bool) -> None:
        """The unit ends; one without anything to learn says nothing about the others."""
        if learned:
            self._spent += time.perf_counter() - self._began
            self._done += self._effort[self._number]

    def left(self) -> float:
        """Seconds left of the run between two units."""
        return self._ahead(self._spent, self._done)

    def _ahead(self, seconds: float, effort: float) -> float:
        return sum(self._effort[self._number + 1 :]) * seconds / max(1, effort)


@dataclass
class Work:
    """All units of all passes, with what each of them needs."""

    cfg: DictConfig
    s: Settings
    method: Method
    reference: nn.Module
    data: Data
    sweeps: Sequence[Pass]
    units: Sequence[Unit]

    def rows(self, run: Run, network: build.Network, skip: int) -> Iterator[dict[str, Any]]:
        """Reconstruct from unit number `skip` on; yields what happened in each."""
        macs = {layer.name: layer.macs for layer in network.layers}
        parts = [parts_of(self.units, sweep) for sweep in self.sweeps]
        jobs = [(sweep, k) for sweep, units in enumerate(parts) for k in range(len(units))]
        learning = [learns(network.model, parts[sweep][k], self.sweeps[sweep]) for sweep, k in jobs]
        effort = [
            learned * self.sweeps[sweep].iterations * sum(macs[n] for n in parts[sweep][k].layers)
            for (sweep, k), learned in zip(jobs, learning, strict=True)
        ]
        store = Store(self.data.images.device, self.s.cache_gb * 1e9, run.dir)
        clock = Clock(effort, skip)
        for number, (sweep, k) in enumerate(jobs):
            if number < skip:
                continue
            if k == 0 and sweep == 1 and not self.method.quantized_inputs:
                self._calibrate_inputs(network.model)
            clock.begin(number)
            job = self.sweeps[sweep], parts[sweep], k
            row = self._one(network.model, *job, number, store, clock)
            clock.end(learned=bool(row))
            if row:  # before whoever asks saves it: a kill between may tell it twice, never not
                place = f"{sum(learning[: number + 1]):02d}/{sum(learning)}"
                _report(run, row, number, place, clock.left())
            yield row
        if len(self.sweeps) == 1 and not self.method.quantized_inputs:
            self._calibrate_inputs(network.model)

    def _one(
        self,
        model: nn.Module,
        sweep: Pass,
        units: Sequence[Unit],
        k: int,
        number: int,
        store: Store,
        clock: Clock,
    ) -> dict[str, Any]:
        unit = units[k]
        if self.cfg.max_steps is not None:
            sweep = sweep._replace(iterations=min(sweep.iterations, self.cfg.max_steps))
        bar = tqdm(total=sweep.iterations, desc=unit.title, leave=False, disable=None)

        def tick(iteration: int) -> None:
            if not bar.disable:
                left = clock.tick(iteration, sweep.iterations)
                bar.set_postfix_str(
                    "" if left is None else f"run eta {minutes(left)}", refresh=False
                )
            bar.update()

        peak = Peak(self.data.images.device)
        store.limit = cache_bytes(self.s, self.data.images.device)
        row = reconstruct_unit(
            model,
            self.reference,
            unit,
            self.data,
            sweep,
            self.method,
            self.s,
            store,
            later=[name for u in units[k + 1 :] for name in u.layers],
            seed=(1_000_003 * self.cfg.seed + 2 * number) % 2**63,
            batch_size=self.s.batch_size,
            tick=tick,
        )
        bar.close()
        return row | {"rise_bytes": peak.rise()} if row else row

    def _calibrate_inputs(self, model: nn.Module) -> None:
        """Steps of activations again, now that the weights before them are the learned ones."""
        for layer in quant_layers(model).values():
            layer.act_quantizer.calibrated.fill_(False)
        calibrate_(model, self.data.images[: self.s.act_images], fresh_only=True)


def _report(run: Run, row: Mapping[str, Any], number: int, place: str, left: float) -> None:
    """One event and one line a unit.

    Args:
        number: of the unit among all, those that learn nothing included.
        place: among those that learn, `02/08`.
    """
    run.event("unit", number=number, **row)
    for key in ("error", "error_before", "wall_s"):
        run.scalar(f"unit/{key}", row[key], number)
    rounded = "" if row["converged"] is None else f" | decided {100 * row['converged']:.1f} %"
    spilled = row["spilled_bytes"]
    on_disk = f" | {spilled / 1e9:.1f} GB on disk" if spilled else ""
    run.info(
        f"unit {place} {row['unit']} ({row['pass']}) | error "
        f"{row['error_before']:.4f} -> {row['error']:.4f}{rounded} | "
        f"{row['wall_s']:.0f} s{on_disk} | eta {minutes(left)}"
    )


def summary(
    rows: Sequence[Mapping[str, Any]], fold_error: float, shifts: Mapping[str, float]
) -> dict[str, Any]:
    """What reconstruction cost and reached, for result.json."""
    units = [{k: v for k, v in row.items() if k != "trace"} for row in rows if row]
    # Units of a run that an earlier version began have none.
    rises = [row["rise_bytes"] for row in units if row.get("rise_bytes") is not None]
    return {
        "units": units,
        "wall_s": sum(row["wall_s"] for row in units),
        "rise_bytes": max(rises, default=None),
        "worse_than_start": [row["unit"] for row in units if row["error"] > row["error_before"]],
        "fold_error": fold_error,
        "bias_shifts": dict(shifts),
    }
