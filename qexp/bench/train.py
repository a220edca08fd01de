"""`qexp bench train`: what a quantized training step costs, as a ratio to the float one.

For each model, dtype and way to compile, these take turns in one process (`step`):

    fp32          the float network, compiled where the network is compiled
    fp32 again    a second float network: how far its ratio is from 1 is the noise
    quantizers    the same network quantized, as `qexp train` would build it
    peers         other implementations of a learned step, on request (`peers`)

`ratio` = median step / median float step of the same group. `compile=model` and `graphs` are
compared with float compiled alike, and `eager_ratio` with the eager float network, which takes
turns as well. Beside each stands its floor (`floor`). The networks have random weights and
one batch of noise: a step's time does not depend on what is in it.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf
from torch import nn

from qexp import messages
from qexp.bench import peers, table
from qexp.bench.floor import measure_machine
from qexp.bench.output import say_written, unused, write_folder
from qexp.bench.settings import DTYPES, Settings
from qexp.bench.step import AGAIN, EAGER, FLOAT, Contender, Group, make_step, take_turns
from qexp.config import configs_dir
from qexp.errors import ConfigError
from qexp.models.build import build_model
from qexp.models.opened import open_attention_
from qexp.quant.convert import Bits, calibrate_, quant_layers
from qexp.quant.functional import VARIANTS
from qexp.quant.trace import Layer, trace
from qexp.recipes import build
from qexp.recipes.compilation import WHOLE, refuse_graphs
from qexp.runner.device import (
    compiler_available,
    keep_memory,
    pick_device,
    seed_everything,
    tf32,
)
from qexp.runner.device import set_threads as use_threads

CLASSES = 10


def bench_train(cfg: DictConfig) -> list[dict[str, Any]]:
    """Run the bench; prints a table, writes and returns the rows of bench.json."""
    s = Settings.of(cfg)
    device = pick_device(s.device)
    for mode in s.compile:
        refuse_graphs(mode, device)
    threads = use_threads(s.threads)
    if device.type == "cpu":
        keep_memory()
    modes = _possible(s.compile, device)
    for model in s.models:  # a wrong name is found before anything is timed
        for name in s.quantizers:
            composed(name, model, s.bits, s.overrides)
    rows: list[dict[str, Any]] = []
    folder = unused(Path(s.out))
    print(f"{table.device_name(device)}, {threads} CPU threads, batch {s.batch}", flush=True)
    for dtype in s.dtype:
        with tf32(True):  # the rate of convolutions: cuDNN takes it in training
            machine = measure_machine(device, DTYPES[dtype])
        print(table.rates(machine, dtype), flush=True)
        for model in s.models:
            for mode in modes:
                facts = {"model": model, "dtype": dtype, "compile": mode, "device": str(device)}
                group = _group(s, model, DTYPES[dtype], mode, device)
                with torch._dynamo.config.patch(recompile_limit=VARIANTS):
                    take_turns(group.contenders, s.repeats, s.warmup, device)
                new = table.rows(group, machine, {**facts, **s.facts(threads)})
                print(table.text(new), flush=True)
                rows += new
                write_folder(folder, rows, table.draw, seed=s.seed, threads=threads)
    say_written(folder)
    return rows


def _possible(modes: Sequence[str], device: torch.device) -> list[str]:
    """The modes that this machine can run."""
    available, reason = compiler_available(device)
    if available or list(modes) == ["off"]:
        return list(modes)
    print(f"bench: only compile=off is possible here ({reason})")
    return ["off"]


def composed(quantizer: str, model: str, bits: int, more: Sequence[str]) -> DictConfig:
    """The training config of one quantizer and model: what `qexp train` would see."""
    overrides = [f"quantizer={quantizer}", f"model={model}", f"bits={bits}", *more]
    try:
        if GlobalHydra.instance().is_initialized():  # knows the user's --config-dir
            return compose("train", overrides)
        with initialize_config_dir(str(configs_dir()), version_base="1.3"):
            return compose("train", overrides)
    except messages.COMPOSITION as error:
        source = messages.Source(configs_dir(), "train", overrides)
        raise ConfigError(messages.explain(error, source)) from error


def _group(s: Settings, model: str, dtype: torch.dtype, mode: str, device: torch.device) -> Group:
    """The networks that take turns, calibrated, with their steps."""
    torch.compiler.reset()  # the graphs of the group before
    seed_everything(s.seed)
    node: Any = OmegaConf.to_container(
        composed(s.quantizers[0], model, s.bits, s.overrides).model, resolve=True
    )
    size = s.image_size or (224 if node["_target_"].startswith("torchvision.") else 32)
    order = torch.channels_last if s.channels_last else torch.contiguous_format
    net = build_model(node, CLASSES, 3)
    open_attention_(net, (3, size, size))
    net = net.to(device, memory_format=order)  # type: ignore[call-overload]
    images = torch.randn(s.batch, 3, size, size, device=device).to(memory_format=order)
    labels = torch.randint(CLASSES, (s.batch,), device=device)
    layers = trace(net, (3, size, size))

    def contender(name: str, network: nn.Module, how: str) -> Contender:
        saved = s.saved if quant_layers(network) else "all"
        step = make_step(network, how, images, labels, dtype, saved, layers)
        return Contender(name, network, step, replayed=how == "graphs")

    float_mode = mode if mode in WHOLE else "off"
    found = [contender(n, copy.deepcopy(net), float_mode) for n in (FLOAT, AGAIN)]
    if mode in WHOLE:
        found.append(contender(EAGER, copy.deepcopy(net), "off"))
    for name in s.quantizers:
        cfg = composed(name, model, s.bits, s.overrides)
        network = build.make_network(cfg, copy.deepcopy(net), (3, size, size))
        calibrate_(network.model, images, untrained=True)
        found.append(contender(name, network.model, mode))
    if s.peers:
        print(peers.note(mode))
    if s.peers and mode not in WHOLE:
        for name in peers.peers():
            network = copy.deepcopy(net)
            peers.quantize_as_(name, network, layers, _widths(s, model, layers))
            calibrate_(network, images, untrained=True)
            found.append(contender(name, network, "off"))
    return Group(layers, found)


def _widths(s: Settings, model: str, layers: Sequence[Layer]) -> dict[str, Bits]:
    """The peers' widths: uniform at `bits`, or as `overrides` say, whatever the methods have."""
    chosen = any(word.startswith("bitwidth=") for word in s.overrides)
    words = [] if chosen else ["bitwidth=uniform"]
    cfg = composed("lsq", model, s.bits, [*words, *s.overrides])
    with build.policy_errors(cfg):
        return dict(build.make_policy(cfg).assign(layers))
