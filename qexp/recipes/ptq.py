"""Post-training quantization, top to bottom: a few images, no labels, no training.

    data -> float network -> fold batch norms -> swap layers -> calibrate
         -> reconstruct unit by unit -> correct biases -> evaluate -> result

What is reconstructed, and from what, belongs to the method (`quantizer.reconstruct`, plan.py);
how long, to this recipe. A method without reconstruction ends after calibration.

A run can stop anywhere and continue, bit for bit on a CPU: `last.pt` is written after every unit,
and each unit draws from its own seed. The finished `last.pt` also holds `float`, the folded float
network with every weight moved to where round-to-nearest gives its learned code: the start of QAT.
It is the mark that all is learned and corrected: a run that has it goes straight to the result.
"""

from __future__ import annotations

import copy
from dataclasses import asdict
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from qexp import plot_ptq
from qexp.errors import RunError
from qexp.models.load import load_tensors_
from qexp.quant.adaround import AdaRound
from qexp.quant.bias import correct_bias_
from qexp.quant.convert import (
    Bits,
    calibrate_,
    check_calibrated,
    float_operands,
    quantizers,
)
from qexp.quant.fold import fold_bn_
from qexp.quant.modules import QUANT_LAYERS
from qexp.quant.plan import passes
from qexp.quant.reconstruct import Data, learns
from qexp.recipes import build, outcome, settings
from qexp.recipes.absent import sizes
from qexp.recipes.compilation import choose, compile_for, eager_afterwards
from qexp.recipes.evaluate import evaluate, save_answers
from qexp.recipes.observe import OBSERVED_IMAGES
from qexp.recipes.picture import draw_operands
from qexp.recipes.ptq_settings import Settings
from qexp.recipes.same_images import check_images
from qexp.recipes.signs import resumed_state, signs, warn_clipped
from qexp.recipes.start import float_start
from qexp.recipes.units import Work, parts_of, summary, units_of
from qexp.recipes.watch import unlearned
from qexp.runner import checkpoint
from qexp.runner.answers import ANSWERS
from qexp.runner.device import pick_device, seed_everything, tf32
from qexp.runner.run import Run

# Change of the logits, to their largest, above which a folded network is another one; seen: 1e-6.
FOLD_ERROR = 1e-3


@eager_afterwards
def ptq(cfg: DictConfig, run: Run) -> dict[str, Any]:
    """Run the recipe; returns the fields of result.json."""
    s = Settings.of(cfg.recipe)
    s.check()
    method = build.make_method(cfg)
    device = pick_device(cfg.device)
    seed_everything(cfg.seed)
    last = run.dir / "last.pt"
    saved = resumed_state(run)
    over = saved is not None and "float" in saved  # learned and corrected; the result is missing

    # The start: data, a float network, its batch norms folded.
    dataset = build.make_dataset(cfg, device)
    seen = check_images(dataset, saved or {}, run)
    begun = None if saved is None else saved["start"]
    start = float_start(cfg, settings.Settings(), dataset, run, device, None, begun=begun)
    model = start.model.eval()
    every = dataset.calibration_images(s.images + s.held_out, cfg.seed)
    data = Data(every[: s.images], every[s.images :])
    if s.augment:
        augmented = dataset.calibration_images(s.images, cfg.seed, augment=True)
        data = data._replace(images=augmented)
    fold_error = _fold(model, data.held_out[:8], run)
    reference = copy.deepcopy(model).requires_grad_(False)

    # The quantized network, calibrated.
    bits = None if saved is None else {k: Bits(*v) for k, v in saved["bits"].items()}
    context = build.policy_context(cfg, model, dataset, 1) if saved is None else {}
    shape, signed = dataset.input_shape, (saved or {}).get("signed")
    network = build.make_network(cfg, model, shape, context=context, bits=bits, signed=signed)
    if saved is None:
        outcome.log_plan(run, network)
        with float_operands(model, weight=s.calibrate_on == "float", act=s.calibrate_on == "float"):
            warn_clipped(run, calibrate_(model, data.images[: s.act_images]))
        check_calibrated(model)
    else:
        load_tensors_(model, saved["model"])
        network.sensitivity = saved.get("sensitivity", {})

    # Unit by unit.
    done: list[dict[str, Any]] = [] if saved is None else saved["units"]

    def save(**more: Any) -> None:
        state = {
            "model": model.state_dict(),
            "bits": {k: list(v) for k, v in network.bits.items()},
            "signed": signs(network.layers),
            "sizes": sizes(dataset),
            "images": seen,
            "sensitivity": network.sensitivity,
            "folded": True,
            "kinds": {n: q.kind for n, q in quantizers(model).items()},
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
    units = units_of(method, reference, network) if sweeps else []
    for sweep in sweeps:
        if not any(learns(model, unit, sweep) for unit in parts_of(units, sweep)):
            run.warn(
                f"nothing is learned in the pass '{sweep.name}': no unit has any of "
                f"{', '.join(sorted(sweep.learned))}"
            )
    if sweeps:
        # Units change, so only kernels are worth compiling.
        mode = choose(cfg.compile, network.layers, 3 * s.iterations * s.minibatch, device)
        compile_for("kernels" if mode == "model" else mode, model, [], 0, device, run)
    if sweeps and not over:
        work = Work(cfg, s, method, reference, data, sweeps, units)
        for row in work.rows(run, network, len(done)):
            done.append(row)
            save()
    shifts: dict[str, float] = saved.get("bias_shifts", {}) if saved is not None else {}
    if method.bias_correction and not over:
        with float_operands(model, weight=False, act=method.correction_inputs == "float"):
            shifts = correct_bias_(model, reference, data.images[: s.act_images])

    # The outcome.
    if s.plots:
        plot_ptq.draw([row for row in done if row], run.dir, cfg.quantizer.name)
        draw_operands(run, cfg, model, data.held_out[:OBSERVED_IMAGES])
    test = evaluate(model, dataset.eval_batches("test"))
    save_answers(run.dir / ANSWERS, test)
    if not over:
        save(float=float_state(model), top1=test.top1, bias_shifts=shifts)
    protocol = outcome.protocol(cfg, asdict(s), dataset, start.record(), run.segments)
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
        reconstruction={"method": asdict(method), **summary(done, fold_error, shifts)},
    )


def _fold(model: nn.Module, images: Tensor, run: Run) -> float:
    """Fold batch norms in place; returns the relative change of the logits."""
    with torch.no_grad(), tf32(False):  # 10 bits of mantissa differ by more than the folding
        before = model(images)
        folds = fold_bn_(model)
        error = float((model(images) - before).abs().max() / before.abs().max().clamp_min(1e-12))
    if not error < FOLD_ERROR:
        raise RunError(
            f"run: folding batch norms changed the logits by {error:.0e} of the largest. "
            "Please report the model; recipe=qat trains it without folding."
        )
    done = sum(fold.conv is not None for fold in folds)
    run.info(f"folded {done} of {len(folds)} batch norms (error {error:.1e})")
    kept: dict[str, list[str]] = {}
    for fold in folds:
        if fold.conv is None:
            kept.setdefault(fold.note, []).append(fold.norm)
    for note, norms in kept.items():
        names = ", ".join(norms[:4]) + (", ..." if len(norms) > 4 else "")
        run.warn(f"{len(norms)} of {len(folds)} batch norms not folded ({note}): {names}")
    return error


@torch.no_grad()
def float_state(model: nn.Module) -> dict[str, Tensor]:
    """The float network inside a quantized one, ready for QAT: names as in the folded network.

    Each weight with learned rounding is the one nearest to the original that round-to-nearest
    maps to the learned code; everything else is as it is.
    """
    state = {
        name: value
        for name, value in model.state_dict().items()
        if ".weight_quantizer." not in name and ".act_quantizer." not in name
    }
    for name, layer in model.named_modules(remove_duplicate=False):
        if isinstance(layer, QUANT_LAYERS) and isinstance(layer.weight_quantizer, AdaRound):
            state[f"{name}.weight"] = layer.weight_quantizer.latent(layer.weight)
    return state
