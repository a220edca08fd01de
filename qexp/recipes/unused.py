"""What a config sets without effect or sense: a line each, said when the run begins."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import fields

from hydra.utils import get_object
from omegaconf import DictConfig

from qexp.quant.plan import Method, Schedule, passes
from qexp.recipes.build import is_float, is_untrained, make_method, needs_data, trains
from qexp.recipes.settings import Distill, Settings
from qexp.runner.distributed import world
from qexp.runner.overrides import task_overrides

# What a method that learns nothing may say of learning: quantizer=nearest's words for none.
NOTHING_LEARNED = Method(
    granularity="none", quantized_inputs=False, steps="fixed", borders="fixed", drop=0.0, mix=0.0
)
# Of the recipe, what the passes of a reconstruction read.
FIRST_PASS = ("recipe.iterations", "recipe.minibatch", "recipe.penalty", "recipe.beta",
              "recipe.warmup", "recipe.lr")  # fmt: skip
FURTHER_PASSES = ("recipe.step_iterations", "recipe.step_lr", "recipe.step_p")
CORRECTION = ("bias_correction", "correction_inputs")  # what it may do all the same


def unused(cfg: DictConfig) -> Iterator[str]:
    """`recipe.milestones is not used: recipe.schedule is cosine`, ..."""
    recipe, own = cfg.recipe, Settings()
    distill = recipe.get("distill") or {}
    if distill.get("weight", 0) == 0:
        for key in ("teacher", "temperature", "model"):
            if distill.get(key, getattr(Distill, key)) != getattr(Distill, key):
                yield f"recipe.distill.{key} is not used: recipe.distill.weight is 0"
    milestones = list(recipe.get("milestones", own.milestones))
    schedule = recipe.get("schedule", "step")
    if milestones != list(own.milestones) and schedule != "step":
        yield f"recipe.milestones is not used: recipe.schedule is {schedule}"
    momentum = recipe.get("momentum", own.momentum)
    if recipe.get("optimizer") == "adamw" and momentum != own.momentum:
        yield "recipe.momentum is not used: recipe.optimizer is adamw"
    given = cfg.model.get("checkpoint")
    if recipe.get("from_scratch") and not is_float(cfg) and given not in (None, "auto", "none"):
        yield f"model.checkpoint={given} is not used: recipe.from_scratch is true"
    yield from _mixed_precision(cfg.bitwidth)
    if "patterns" in cfg.bitwidth and not (cfg.bitwidth.patterns or cfg.bitwidth.get("file")):
        yield "bitwidth.patterns is empty: every layer has the same widths"
    if is_untrained(cfg) and not is_float(cfg) and needs_data(cfg):
        yield "bitwidth.metric looks at random weights; it is defined around a trained network"
    if cfg.quantizer.get("weight"):
        yield from _codebook(cfg.quantizer.weight)
    if cfg.get("sync_bn") and world().size == 1:
        yield "sync_bn is not used: there is one process"
    if (rule := str(cfg.bitwidth.get("first_last"))) in ("same", "fp32"):
        yield from _typed(("quantizer/outer",), f"bitwidth.first_last is {rule}")
    if not trains(recipe):
        yield from _reconstruction(make_method(cfg))
    elif cfg.quantizer.get("reconstruct"):
        yield f"quantizer.reconstruct is not used: recipe {recipe.name} trains"
    if cfg.get("saved", "all") != "all" and not trains(recipe):
        yield f"saved={cfg.saved} is not used: recipe {recipe.name} keeps nothing for a backward"


def _reconstruction(method: Method) -> Iterator[str]:
    """Of post-training quantization: what no pass of the method reads."""
    if method.granularity == "none":
        idle = [f.name for f in fields(method) if f.name not in ("granularity", *CORRECTION)]
        idle = [name for name in idle if getattr(method, name) != getattr(NOTHING_LEARNED, name)]
        if idle:
            yield (
                f"quantizer.reconstruct.{', '.join(idle)}: not used, as "
                "quantizer.reconstruct.granularity is none"
            )
        yield from _typed((*FIRST_PASS, *FURTHER_PASSES), "nothing is reconstructed")
    else:
        yield from _passes(method)
    if method.correction_inputs != "quantized" and not method.bias_correction:
        yield (
            "quantizer.reconstruct.correction_inputs is not used: "
            "quantizer.reconstruct.bias_correction is false"
        )


def _passes(method: Method) -> Iterator[str]:
    """Of a reconstruction."""
    names = {p.name for p in passes(method, Schedule())}
    if names == {"rounding"}:
        yield from _typed(FURTHER_PASSES, "there is one pass")
    if method.step_inputs != "prefix" and "steps" not in names:
        yield "quantizer.reconstruct.step_inputs is not used: there is no second pass"
    if method.drop > 0 and not method.quantized_inputs:
        yield (
            "quantizer.reconstruct.drop is not used: "
            "quantizer.reconstruct.quantized_inputs is false"
        )
    if method.biases != "joint" and method.bias_lr == 0:
        yield "quantizer.reconstruct.biases is not used: quantizer.reconstruct.bias_lr is 0"
    if method.network and "network" not in names:
        yield "quantizer.reconstruct.network is not used: there is nothing to learn there"


def _mixed_precision(policy: DictConfig) -> Iterator[str]:
    """Of a policy that measures: what its control or its metric does not look at."""
    if "allocation" not in policy:
        return
    if policy.allocation in ("random", "uniform"):
        idle, because = ("metric", "probes", "images"), f"allocation is {policy.allocation}"
    elif policy.metric == "size":
        idle, because = ("probes", "images"), "metric is size"
    elif policy.metric != "hutchinson":
        idle, because = ("probes",), f"metric is {policy.metric}"
    else:
        return
    yield from _idle(policy, "bitwidth", idle, because)


def _codebook(weight: DictConfig) -> Iterator[str]:
    """Of levels that do not follow the weights: the moving average."""
    if weight.get("adaptation", "ema") != "ema":
        idle = ("form", "gamma", "adapt_until", "dead_after")
        yield from _idle(weight, "quantizer.weight", idle, f"adaptation is {weight.adaptation}")


def _typed(keys: Sequence[str], because: str) -> Iterator[str]:
    """A line for each of `keys` on the command line; a preset may set what a method has not."""
    for override in task_overrides():
        key, _, value = override.lstrip("+").partition("=")
        if any(key == own or key.startswith(f"{own}.") for own in keys):
            yield f"{key}={value} is not used: {because}"


def _idle(section: DictConfig, name: str, keys: tuple[str, ...], because: str) -> Iterator[str]:
    """A line for each key that is not at the default of what the section builds."""
    known = inspect.signature(get_object(section._target_)).parameters
    for key in keys:
        if key in section and key in known and section[key] != known[key].default:
            yield f"{name}.{key} is not used: {name}.{because}"
