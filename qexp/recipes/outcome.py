"""What a run writes about itself: the plan, an epoch's line, result.json, layers.csv, plots."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn

from qexp import plot
from qexp.quant.accounting import account, other_weights
from qexp.quant.bitwidth import Progressive, Uniform, format_bits
from qexp.quant.convert import quant_layers, quantizers
from qexp.quant.quantizer import Identity
from qexp.recipes import picture
from qexp.recipes.build import Network, is_float
from qexp.recipes.evaluate import Score
from qexp.recipes.watch import health
from qexp.runner.atomic import write_bytes
from qexp.runner.distributed import world
from qexp.runner.folder import table_sha256
from qexp.runner.run import Run

# The protocol is what two rows must share to be compared; the method is what they may differ in.
NOT_PROTOCOL = ("name", "plots", "save_every", "cache_gb")


def _is_mixed(network: Network) -> bool:
    """Whether the layers between first and last have different widths."""
    inner = {network.bits.get(x.name) for x in network.layers if x.position == "inner"}
    return len(inner) > 1


def log_plan(run: Run, network: Network) -> None:
    """Say what was swapped and what was left alone; bits.yaml has inner widths that differ, as
    `bitwidth=pattern bitwidth.file=` reads them."""
    if not network.swaps:
        return
    if _is_mixed(network):
        write_bytes(run.dir / "bits.yaml", format_bits(network.bits).encode())
    done = [swap for swap in network.swaps if swap.bits is not None]
    run.info(f"quantized {len(done)} of {len(network.swaps)} layers")
    for swap in network.swaps:
        width = "float" if swap.bits is None else f"W{swap.bits.weight}A{swap.bits.act}"
        signed = "signed" if swap.layer.signed else "unsigned"
        run.log(f"  {swap.layer.name:32s} {width:8s} {signed:8s} {swap.note}")
    others = other_weights(network.model, [layer.name for layer in network.layers])
    if others:
        run.warn(stay_in_float(network.model, others))


def stay_in_float(model: nn.Module, others: Mapping[str, int]) -> str:
    """One line about the weights (number by name) of `model` that quantization does not reach."""
    names = ", ".join([*others][:4]) + (", ..." if len(others) > 4 else "")
    line = (
        f"{sum(others.values()):,} weights are in no convolution (2-D) or linear layer that "
        f"evaluation calls: they stay in float, and MACs and BOPs leave them out: {names}"
    )
    if getattr(model, "aux_logits", False):  # torchvision's GoogLeNet and Inception
        line += ". Bytes and bits count the auxiliary heads; +model.aux_logits=false has none"
    return line


def log_epoch(
    run: Run,
    network: Network,
    state: dict[str, Any],
    optimizer: torch.optim.Optimizer,
    test: Score,
    val: Score | None,
    epochs: int,
    stuck: list[str],
    left: float,
) -> bool:
    """Close an epoch: history, metrics.jsonl, TensorBoard, one line, warnings.

    Args:
        epochs: of the schedule.
        stuck: quantizer parameters that the epoch did not move.
        left: epochs still to train; fewer than the schedule has where `max_steps` ends it.

    Returns whether it is the best epoch so far: on the validation split, else on test.
    """
    epoch, policy = state["epoch"], network.policy
    row = {
        "epoch": epoch,
        "loss": state["losses"][: state["step"]].mean().item(),
        "train_top1": 100 * state["hits"].item() / max(1, state["seen"]),
        "top1": test.top1,
        "test_loss": test.loss,
        "val_top1": val.top1 if val else None,
        "lr": optimizer.param_groups[0]["lr"],
        "images_per_s": state["trained"] / max(state["train_s"], 1e-9),
        "bits": policy.bits_at(epoch - 1, epochs) if isinstance(policy, Progressive) else None,
        "codebooks": picture.codebooks(network.model),
    }
    state["history"].append(row)
    selected = val.top1 if val else test.top1
    best = selected > state["best"]["selected"]
    if best:
        state["best"] = {"selected": selected, "top1": test.top1, "epoch": epoch}
    run.event("epoch", **row)
    for key, value in row.items():
        if isinstance(value, float):
            run.scalar(key, value, epoch)
    eta = minutes(left * (state["train_s"] + state["test_s"]))
    run.info(
        f"epoch {epoch:03d}/{epochs} | loss {row['loss']:.4f} | top-1 {test.top1:.2f} "
        f"(best {state['best']['top1']:.2f} @ {state['best']['epoch']:03d}) | "
        f"lr {row['lr']:.4f} | {row['images_per_s']:.0f} img/s | eta {eta}"
    )
    if stuck:
        run.event("stuck", epoch=epoch, parameters=stuck)
    if stuck and stuck != state["stuck"]:  # said once, not every epoch
        run.warn(f"{len(stuck)} quantizer parameters did not move in this epoch: {stuck[0]}, ...")
    state["stuck"] = stuck
    for kind, counts in health(network.model).items():
        run.event("health", what=kind, epoch=epoch, layers=counts)
        first = next(iter(counts)) + (", ..." if len(counts) > 1 else "")
        run.warn(f"{kind.replace('_', ' ')}: {sum(counts.values())} in {first}")
    return best


def measured(state: Mapping[str, Any], dataset: Any, epochs: int) -> dict[str, Any]:
    """What training measured: top-1 of the last epoch, the best one and how it was chosen."""
    history = state["history"]
    return {
        "top1": history[-1]["top1"],
        "val_top1": history[-1]["val_top1"],
        "top1_best": state["best"]["top1"],
        "best_epoch": state["best"]["epoch"],
        "best_selected_on": "val" if dataset.has_val else "test",
        "epochs": len(history),
        "images_per_s": sorted(row["images_per_s"] for row in history)[len(history) // 2],
    }


def weights_only(content: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a checkpoint that evaluation needs: no optimizer, no counters."""
    names = ("model", "bits", "signed", "sizes", "average", "epoch", "start", "folded")
    return {k: content[k] for k in names}


def protocol(
    cfg: DictConfig,
    recipe: Mapping[str, Any],
    dataset: Any,
    start: Mapping[str, Any],
    segments: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """What a comparison must hold fixed. `batch_size` is a process's; several are counted.

    Args:
        segments: of a run that was resumed with other settings.
    """
    known = {k: v for k, v in recipe.items() if k not in NOT_PROTOCOL}
    if not known.get("augment"):  # as in runs from before there was the option
        known.pop("augment", None)
    distill = known.get("distill") or {}
    if distill and not distill.get("model"):  # as in runs from before there was the option
        known["distill"] = {k: v for k, v in distill.items() if k != "model"}
    elif distill:  # the file that is loaded is `teacher`
        section = {k: v for k, v in distill["model"].items() if k != "checkpoint"}
        known["distill"] = {**distill, "model": section}
    teacher = distill.get("teacher", "float")
    if teacher != "float" and start["teacher_sha256"]:  # what it is, not where it lies
        known["distill"] = {**known["distill"], "teacher": start["teacher_sha256"]}
    if (size := world().size) > 1:
        known["processes"] = size
        if cfg.get("sync_bn"):
            known["sync_bn"] = True
    if not is_float(cfg):
        # Earlier runs took calibration samples at an even stride, and so saw parts of the images.
        known["act_sample"] = "random"
    if start.get("folded"):  # from a float network there is no word, as there never was
        known["start"] = "post-training run"
    if start.get("val_seen"):  # the float start, perhaps
        known["val_seen"] = True
    if segments:
        known["segments"] = [dict(segment) for segment in segments]
    return {
        "dataset": cfg.dataset.name,
        "model": cfg.model.name,
        **dataset.protocol(),
        **known,
        "first_last": "float" if is_float(cfg) else str(cfg.bitwidth.get("first_last")),
        "float_sha256": start["sha256"],
        "max_steps": cfg.max_steps,
    }


def protocol_hash(fields: Mapping[str, Any]) -> str:
    """Eight hex digits that two comparable runs share."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode()).hexdigest()[:8]


def result(
    cfg: DictConfig,
    run: Run,
    network: Network,
    fields: Mapping[str, Any],
    *,
    top1: float,
    fp32_top1: float | None,
    **more: Any,
) -> dict[str, Any]:
    """The fields of result.json that every recipe shares, and layers.csv beside it."""
    omega = network.sensitivity
    cost = account(network.model, network.layers, omega)
    write_bytes(run.dir / "layers.csv", ("\n".join(cost.csv_lines()) + "\n").encode())
    if (omega or _is_mixed(network)) and cfg.recipe.get("plots", True):
        rows = [asdict(layer) for layer in cost.layers]
        how = " ".join(str(cfg.bitwidth.get(k)) for k in ("metric", "allocation") if omega)
        named = "sensitivity.png" if omega else "bits.png"
        plot.sensitivity(
            rows, run.dir / named, picture.title(cfg) + (f": metric {how}" if how else "")
        )
    return {
        "method": (None if is_float(cfg) else run.label) or cfg.get("method") or cfg.quantizer.name,
        "dataset": cfg.dataset.name,
        "model": cfg.model.name,
        "recipe": cfg.recipe.name,
        "policy": "float" if is_float(cfg) else cfg.bitwidth.get("name"),
        "w_bits": 32 if is_float(cfg) else _nominal(cfg, "weight", network),
        "a_bits": 32 if is_float(cfg) else _nominal(cfg, "act", network),
        "top1": top1,
        **({"bits_table": table} if (table := table_sha256(cfg.bitwidth.get("file"))) else {}),
        "fp32_top1": fp32_top1,
        "drop": None if fp32_top1 is None else fp32_top1 - top1,
        **more,
        **cost.summary(),
        "seed": cfg.seed,
        "protocol": dict(fields),
        "protocol_hash": protocol_hash(fields),
        "granularity": granularity(network.model),
        "health": health(network.model),
    }


def closing(result: Mapping[str, Any]) -> str:
    """The last line of a run: what came out, what it weighs, how long it took.

    A recipe of a user's own may leave out anything: then less is said.
    """
    top1, start, bits = result.get("top1"), result.get("fp32_top1"), result.get("bits")
    quantized = (result.get("w_bits"), result.get("a_bits")) != (32, 32)
    parts = ["done"] if top1 is None else [f"done: top-1 {top1:.2f}"]
    if start is not None and (quantized or start != top1):  # a baseline is its own start
        parts[0] += f", float {start:.2f}"
    if quantized and bits and {"weight_by_param", "act_by_layer"} <= set(bits):
        weight, act = bits["weight_by_param"], bits["act_by_layer"]
        parts.append(f"{weight:.3g} bits a weight, {act:.3g} an input")
    if {"size_bytes", "fp32_bytes"} <= set(result):
        size, whole = result["size_bytes"] / 1e3, result["fp32_bytes"] / 1e3
        parts.append(f"{size:,.0f} kB" + (f", float {whole:,.0f} kB" if quantized else ""))
    return " | ".join([*parts, minutes(result["wall_s"])])


def minutes(seconds: float) -> str:
    """`1:05`: minutes and seconds."""
    return f"{round(seconds) // 60}:{round(seconds) % 60:02d}"


def _nominal(cfg: DictConfig, operand: str, network: Network) -> int | None:
    """The width a policy is asked for; None where it gives each layer its own.

    32 where the method leaves this operand of every inner layer in float.
    """
    layers = quant_layers(network.model)
    inner = [layers[x.name] for x in network.layers if x.position == "inner" and x.name in layers]
    if inner and all(isinstance(getattr(x, f"{operand}_quantizer"), Identity) for x in inner):
        return 32
    if isinstance(network.policy, Progressive):  # the stage that was reached
        names = [x.name for x in network.layers if x.position == "inner"] or list(network.bits)
        found = Counter(getattr(network.bits[name], operand) for name in names)
        return found.most_common(1)[0][0]
    asked = cfg.bitwidth.get(operand)
    if isinstance(asked, int):
        return asked
    return cfg.bits if isinstance(network.policy, Uniform) else None


def granularity(model: nn.Module) -> dict[str, list[str]]:
    """The quantizer classes in use, with their options, for W and for A."""
    found: dict[str, set[str]] = {"weight": set(), "act": set()}
    for name, quantizer in quantizers(model).items():
        side = "weight" if name.endswith("weight_quantizer") else "act"
        found[side].add(f"{type(quantizer).__name__}({quantizer.extra_repr()})")
    return {side: sorted(names) for side, names in found.items()}
