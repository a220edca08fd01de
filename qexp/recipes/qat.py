"""Quantization-aware training, top to bottom; without a quantizer, float training.

    data -> float network -> swap layers -> calibrate -> train -> evaluate -> result

The network is calibrated once, on training images, in float order (each layer sees its already
quantized prefix). Weights and quantizer parameters train together on cross-entropy, optionally
with distillation. Batch norm is neither folded nor frozen, except where training starts from a
post-training run (handover.py). `top1` is the last epoch's.

A run can stop anywhere and continue, bit for bit on a CPU: batches depend on (seed, epoch, step)
alone, the learning rate on the step alone, and the checkpoint holds everything else.

Under torchrun every process runs this function (runner/distributed.py); the first one decides,
calibrates and saves, and each step averages the gradients of all.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from tqdm import tqdm

from qexp.errors import ConfigError, DataError, quoted
from qexp.models.digest import weights_sha256
from qexp.models.load import load_tensors_
from qexp.models.opened import own_names
from qexp.quant.convert import Bits, calibrate_, check_calibrated, quantizers, shared_weights
from qexp.quant.quantizer import Quantizer
from qexp.recipes import build, outcome, picture, stages
from qexp.recipes.absent import sizes
from qexp.recipes.compilation import compile_for, eager_afterwards
from qexp.recipes.evaluate import Score, evaluate, save_answers
from qexp.recipes.handover import take_over_
from qexp.recipes.loss import training_loss
from qexp.recipes.observe import OBSERVED_IMAGES, log_quantizers
from qexp.recipes.optimize import (
    WeightAverage,
    carry_momentum,
    lr_factor,
    optimizer_of,
    reestimate_bn_,
    restore_,
    set_lr,
)
from qexp.recipes.same_images import check_images
from qexp.recipes.settings import Settings
from qexp.recipes.signs import resumed_state, signs, warn_clipped
from qexp.recipes.start import FloatStart, float_start
from qexp.recipes.watch import Movement, check_finite
from qexp.runner import checkpoint, distributed
from qexp.runner.answers import ANSWERS
from qexp.runner.device import pick_device, seed_everything
from qexp.runner.memory import Peak
from qexp.runner.run import Run

CHECK_EVERY = 200  # steps between looks at the loss for NaN: one host sync each


@eager_afterwards
def qat(cfg: DictConfig, run: Run) -> dict[str, Any]:
    """Run the recipe; returns the fields of result.json."""
    s = Settings.of(cfg.recipe)
    s.check()
    device, leads = pick_device(cfg.device), distributed.world().leads
    seed_everything(cfg.seed)
    last, peak = run.dir / "last.pt", Peak(device)
    saved = resumed_state(run)

    # The start: data, a float network and its top-1.
    dataset = build.make_dataset(cfg, device)
    seen = check_images(dataset, saved or {}, run)
    steps = s.epochs * dataset.steps_per_epoch
    steps = steps if cfg.max_steps is None else min(steps, cfg.max_steps)
    if run.changed and saved is not None and saved["epoch"] * dataset.steps_per_epoch >= steps:
        _refuse_finished(saved["epoch"], cfg.max_steps)
    start = float_start(cfg, s, dataset, run, device, saved)
    model = start.model

    # The quantized network.
    bits = None if saved is None else {k: Bits(*v) for k, v in saved["bits"].items()}
    if bits is None and not leads:
        bits = distributed.told(bits)
    context = build.policy_context(cfg, model, dataset, s.epochs) if bits is None else {}
    signed = (saved or start.ptq or {}).get("signed")
    shape = dataset.input_shape
    network = build.make_network(cfg, model, shape, context=context, bits=bits, signed=signed)
    if saved is None and leads:
        distributed.told(network.bits)
    count = s.calibration_images if network.bits else min(OBSERVED_IMAGES, dataset.train_size)
    images = dataset.calibration_images(count, cfg.seed)
    if cfg.get("sync_bn"):
        distributed.sync_bn_(model)
    if saved is None:
        if leads:
            take_over_(model, network.bits, start.ptq, run)
            random = start.source is None
            warn_clipped(run, calibrate_(model, images, fresh_only=True, untrained=random))
        distributed.share_(model)
        check_calibrated(model)
        outcome.log_plan(run, network)

    # What trains it.
    optimizer = optimizer_of(model, s)
    average = WeightAverage(model, s.ema) if s.ema else None
    state = _first_state(model, dataset, s, device)
    if saved is not None:
        load_tensors_(model, saved["model"])
        restore_(optimizer, saved["optimizer"])
        if average is not None:
            kept = saved["average"]
            average.load_state_dict({**kept, "state": own_names(model, kept["state"])})
        for key, value in state.items():
            state[key] = saved[key].to(device) if isinstance(value, Tensor) else saved[key]
        network.sensitivity = saved.get("sensitivity", {})
        checkpoint.set_rng_state(saved["rng"])
        if run.changed:
            stages.refuse_wider(network, state["epoch"], s.epochs)
        run.info(f"resumed after epoch {state['epoch']}, step {state['step']}")
    count, saved_as = steps * s.batch_size, cfg.get("saved", "all")
    forward = compile_for(cfg.compile, model, network.layers, count, device, run, saved_as, s.amp)

    def draw() -> None:  # where a resume draws on from, too
        step = state["epoch"] * dataset.steps_per_epoch + state["step"]
        distributed.own_random_numbers(cfg.seed, step)

    def save(best: bool = False) -> None:
        draw()
        if not leads:
            return
        content = {
            **state,
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "average": average.state_dict() if average else None,
            "bits": {k: list(v) for k, v in network.bits.items()},
            "signed": signs(network.layers),
            "sizes": sizes(dataset),
            "images": seen,
            "sensitivity": network.sensitivity,
            "start": start.record(),
            "folded": start.folded,
            "rng": checkpoint.rng_state(),
        }
        if best:  # before last.pt, which names it: a kill in between trains the epoch again
            checkpoint.save(run.dir / "best.pt", outcome.weights_only(content))
        checkpoint.save(last, content)
        run.status("running")  # with the time so far: a kill leaves nothing else

    # The loop.
    draw()
    while state["epoch"] * dataset.steps_per_epoch < steps:
        epoch = state["epoch"]
        if stages.change_bits_(cfg, network, forward, images, epoch, s.epochs, run):
            state["best"] = stages.no_best()
            distributed.share_(model)
            optimizer = carry_momentum(optimizer, optimizer_of(model, s))
        movement, begun = Movement(model), state["step"]
        _train_epoch(forward, model, dataset, optimizer, average, start, s, state, steps, save)
        if s.bn_reestimate and (epoch + 1) * dataset.steps_per_epoch >= steps:
            with nullcontext() if average is None else average.applied(model, keep=True):
                reestimate_bn_(model, dataset.train_batches(s.epochs), s.bn_reestimate)
        if distributed.world().size > 1:
            save()  # an image that another process cannot read must not lose the epoch
        began = time.perf_counter()
        try:
            test = _score(model, average, dataset, "test")
            val = _score(model, average, dataset, "val") if dataset.has_val else None
        except DataError as error:
            save()
            raise DataError(f"{error} This epoch is kept: qexp resume {quoted(run.dir)}") from error
        state["test_s"] = time.perf_counter() - began
        state["epoch"] = epoch + 1
        left = max(0.0, steps / dataset.steps_per_epoch - state["epoch"])
        stuck = state["stuck"] if begun == state["step"] else movement.stuck(model)
        best = outcome.log_epoch(run, network, state, optimizer, test, val, s.epochs, stuck, left)
        if leads:
            save_answers(run.dir / ANSWERS, test)
            log_quantizers(run, model, images[:OBSERVED_IMAGES], epoch + 1)
        state["step"] = 0
        save(best)

    # The outcome.
    if not leads:
        return {}
    if average is not None:
        load_tensors_(model, average.state)
    fields = outcome.protocol(cfg, asdict(s), dataset, start.record(), run.segments)
    measured = outcome.measured(state, dataset, s.epochs)
    measured["rise_bytes"] = peak.rise()  # of this process, above what it had when it began
    if build.is_float(cfg):  # so that runs which start from it are known
        measured["weights_sha256"] = weights_sha256(last)
    fp32_top1 = measured["top1"] if build.is_float(cfg) and s.from_scratch else start.top1
    if s.plots:
        picture.draw(run, cfg, model, state["before"], images[:OBSERVED_IMAGES], state["history"])
    return outcome.result(cfg, run, network, fields, fp32_top1=fp32_top1, **measured)


def _refuse_finished(epochs: int, limit: int | None) -> None:
    """Other settings for a run that is through would change nothing but what it is called."""
    advice = f"Add recipe.epochs={epochs + 1} or more." if limit is None else "Start a new run."
    raise ConfigError(f"resume: nothing left to train, {epochs} epochs are done. {advice}")


def _first_state(
    model: nn.Module, dataset: Any, s: Settings, device: torch.device
) -> dict[str, Any]:
    """What the loop carries from step to step; all of it is in the checkpoint."""
    return {
        "epoch": 0,  # finished epochs
        "step": 0,  # finished steps of the present epoch
        "losses": torch.zeros(dataset.steps_per_epoch, device=device),
        "hits": torch.zeros((), device=device, dtype=torch.int64),
        "seen": 0,  # training images of the present epoch
        "history": [],
        "best": stages.no_best(),
        "train_s": 0.0,  # of the last epoch, or its last part
        "trained": 0,  # images in that time
        "test_s": 0.0,
        "stuck": [],  # quantizer parameters that the last epoch did not move
        "before": picture.weights(model),
    }


def _train_epoch(
    forward: Any,
    model: nn.Module,
    dataset: Any,
    optimizer: torch.optim.Optimizer,
    average: WeightAverage | None,
    start: FloatStart,
    s: Settings,
    state: dict[str, Any],
    steps: int,
    save: Callable[[], None],
) -> None:
    """One epoch, from state["step"] on. Metrics stay on the device."""
    model.train()
    epoch, first, per_epoch = state["epoch"], state["step"], dataset.steps_per_epoch
    until = min(per_epoch, steps - epoch * per_epoch)  # max_steps may cut the last epoch
    if first == until:
        return  # all was trained before this resume, but could not be scored
    warmup = round(s.warmup_epochs * per_epoch)
    if first == 0:
        state["losses"].zero_()
        state["hits"].zero_()
        state["seen"] = 0
    seen, began = state["seen"], time.perf_counter()
    world = distributed.world()
    timed = [q for q in quantizers(model).values() if type(q).progress is not Quantizer.progress]
    off = None if world.leads else True  # None: shown on a terminal
    bar = tqdm(total=until, initial=first, desc=f"epoch {epoch + 1}", leave=False, disable=off)
    for i, (x, y) in zip(range(first, until), dataset.train_batches(epoch, first), strict=False):
        step = epoch * per_epoch + i
        factor = lr_factor(step, steps, schedule=s.schedule, warmup=warmup, milestones=s.milestones)
        set_lr(optimizer, factor)
        for quantizer in timed:
            quantizer.progress(step / steps)
        optimizer.zero_grad(set_to_none=True)
        right = torch.zeros((), device=x.device)
        with shared_weights(model) if s.accumulate > 1 else nullcontext():
            for part, target in zip(x.chunk(s.accumulate), y.chunk(s.accumulate), strict=True):
                loss, hits = training_loss(forward, start.teacher, part, target, s)
                loss = loss * (len(part) / len(x))
                loss.backward()
                state["losses"][i] += loss.detach()
                right += hits
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        distributed.average_([*gradients, state["losses"][i : i + 1], right])
        state["hits"] += (right * world.size).round().long()
        if s.grad_clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), s.grad_clip, foreach=True)
        optimizer.step()
        if average is not None:
            average.update(model)
        state["seen"] += len(x) * world.size
        bar.update()
        if (i + 1) % CHECK_EVERY == 0 or i + 1 == until:
            check_finite(model, state["losses"][: i + 1], epoch, state["step"])
        if s.save_every and (i + 1) % s.save_every == 0 and i + 1 < until:
            check_finite(model, state["losses"][: i + 1], epoch, state["step"])
            state["step"] = i + 1
            save()
    bar.close()
    state["step"] = until
    state["train_s"] = time.perf_counter() - began
    state["trained"] = state["seen"] - seen


def _score(model: nn.Module, average: WeightAverage | None, dataset: Any, split: str) -> Score:
    """Score the network, or its weight average when there is one."""
    with nullcontext() if average is None else average.applied(model):
        return evaluate(model, dataset.eval_batches(split))
