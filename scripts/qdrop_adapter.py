"""QDrop's released code as a `Program` of compare_qdrop.py. It is imported, never copied.

The peer (github.com/wimh966/QDrop) runs unchanged and on the CPU: its `reconstruction` needs no
GPU, only its `main` does, whose steps `peer_program` goes through. Replaced while it runs: Adam's
default rate, because the peer's rounding has no setting for it. A stub stands in for `easydict`
where that is not installed; only the peer's command line uses it.

    quantizers         quantize                          residual    8 bits, rounding learned
    outputs: released  what a layer or block gives       quantized   weights of conv1 and linear
    inputs: as ours    what a convolution reads          float       the same

`closed_clamp`: in torch 2.15 the gradient of torch.clamp is 0 where the input equals a bound; from
0.4.1 (pytorch pull request 7049), so when the peer was released, until 2026 (issues 184572, 184574)
it was 1. The peer clamps integers: inputs that round to the outermost codes pass a gradient or not.

The input of the last layer has 8 bits as well: with `outputs` before the average pool, with
`inputs` after it. Images are not quantized; ours are, to 8 bits.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import logging
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qexp.models.resnet import PadShortcut, ResNet
from qexp.recipes.ptq_settings import Settings

STAGES = ("layer1", "layer2", "layer3")


@dataclass
class Program:
    """One of those that take turns.

    Attributes:
        model: calibrated; copied for every run.
        reference: its float network.
        learn: reconstructs a unit of a copy in place: (copy, unit, seed).
        alone: leaves only what a unit needs quantized: (copy, unit).
        calibration_s: CPU seconds that calibration took.
    """

    model: nn.Module
    reference: nn.Module
    learn: Callable[[nn.Module, str, int], object]
    alone: Callable[[nn.Module, str], None] = lambda model, unit: None
    calibration_s: float = 0.0


def unit_names(model: nn.Module) -> list[str]:
    """conv1, the blocks, linear: what both programs reconstruct one after another."""
    blocks = [f"{name}.{k}" for name in STAGES for k in range(len(model.get_submodule(name)))]  # type: ignore[arg-type]
    return ["conv1", *blocks, "linear"]


def load_peer(folder: Path) -> ModuleType:
    """The peer's main module, from a checkout."""
    sys.path[:0] = [str(folder), str(folder / "qdrop" / "solver")]
    if importlib.util.find_spec("easydict") is None:
        sys.modules["easydict"] = ModuleType("easydict")
        sys.modules["easydict"].EasyDict = dict  # type: ignore[attr-defined]
    peer = importlib.import_module("main_imagenet")
    for name in ("qdrop", "quantization"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return peer


class PeerNet(nn.Module):
    """Our ResNet with the peer's blocks: weights and names as ours, so its converter knows them."""

    def __init__(self, model: ResNet, block: Callable[..., Any]) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu = model.conv1, model.bn1, nn.ReLU(inplace=True)
        for name in STAGES:
            stage = getattr(model, name)
            self.add_module(name, nn.Sequential(*[self._block(b, block) for b in stage]))
        self.features_post_act_fake_quantize: nn.Module = nn.Identity()
        self.linear: nn.Module = model.linear

    @staticmethod
    def _block(ours: Any, block: Callable[..., Any]) -> nn.Module:
        conv = ours.conv1
        theirs = block(conv.in_channels, conv.out_channels, norm_layer=nn.BatchNorm2d)
        for name in ("conv1", "bn1", "conv2", "bn2"):
            setattr(theirs, name, getattr(ours, name))
        if isinstance(ours.shortcut, PadShortcut):
            theirs.downsample = nn.Sequential(ours.shortcut)
        return theirs

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        for name in STAGES:
            x = self.get_submodule(name)(x)
        return self.linear(self.features_post_act_fake_quantize(x.mean(dim=(2, 3))))


def input_quantized_block(peer: ModuleType) -> type[nn.Module]:
    """A block of the peer's parts that quantizes what its convolutions read, not what it gives."""
    make = sys.modules["qdrop.model"].Quantizer

    class InputQuantizedBlock(peer.QuantizedBlock):  # type: ignore[name-defined]
        def __init__(self, block: Any, w: Any, a: Any, qoutput: bool = True) -> None:
            super().__init__()
            self.qoutput = False
            self.conv1, self.conv2 = make(block.conv1, w), make(block.conv2, w)
            self.input1_post_act_fake_quantize = make(None, a)  # the peer goes by these names
            self.input2_post_act_fake_quantize = make(None, a)
            self.shortcut = block.downsample or nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            y = F.relu(self.conv1(self.input1_post_act_fake_quantize(x)))
            y = self.conv2(self.input2_post_act_fake_quantize(y))
            return F.relu(y + self.shortcut(x))

    return InputQuantizedBlock


def clamp(x: Tensor, low: float, high: float) -> Tensor:
    """torch.clamp with gradient 1 where x is a bound."""
    inside = (x >= low) & (x <= high)
    return torch.where(inside, x, x.detach().clamp(low, high))


def closed_clamp(program: Program) -> Program:
    """The same program with the gradient of torch.clamp that it was written for."""

    def learn(model: nn.Module, unit: str, seed: int) -> None:
        with mock.patch.object(torch, "clamp", clamp):
            program.learn(model, unit, seed)

    return replace(program, learn=learn)


def peer_program(
    peer: ModuleType, start: ResNet, images: Tensor, bits: int, s: Settings, *, inputs: bool
) -> Program:
    """The peer's network, calibrated as its main does. `inputs`: quantizers where ours are."""
    basic = sys.modules["qdrop.model"].BasicBlock
    shared = {"observer": "MSEObserver", "bit": bits, "symmetric": False}
    w = SimpleNamespace(quantizer="AdaRoundFakeQuantize", ch_axis=0, **shared)
    a = SimpleNamespace(quantizer="LSQFakeQuantize", ch_axis=-1, **shared)
    model = PeerNet(copy.deepcopy(start), basic)
    peer.search_fold_and_remove_bn(model)
    special = {basic: input_quantized_block(peer)} if inputs else {}
    with mock.patch.dict(peer.specials, special):
        peer.quantize_model(model, SimpleNamespace(w_qconfig=w, a_qconfig=a))
    if inputs:  # the peer's 8 bits went to its last activation, here an inner one
        features = sys.modules["qdrop.model"].Quantizer(None, a)
        features.set_bit(8)
        model.features_post_act_fake_quantize = features
        last: Any = model.get_submodule("layer3.2.input2_post_act_fake_quantize")
        last.set_bit(bits)
        model.conv1.qoutput = False  # type: ignore[assignment]
    model.eval()
    reference = copy.deepcopy(model)
    peer.disable_all(reference)
    began = time.process_time()
    with torch.no_grad():
        peer.enable_calibration_woquantization(model, quantizer_type="act_fake_quant")
        model(images[: s.act_images])
        peer.enable_calibration_woquantization(model, quantizer_type="weight_fake_quant")
        model(images[:2])
    took = time.process_time() - began
    peer.enable_quantization(model)
    config = SimpleNamespace(
        batch_size=s.minibatch, scale_lr=s.lr["scale"], warm_up=s.warmup, weight=s.penalty,
        iters=s.iterations, b_range=tuple(s.beta), keep_gpu=True, drop_prob=0.5,
        round_mode="learned_hard_sigmoid",
    )  # fmt: skip

    def learn(model: nn.Module, unit: str, seed: int) -> None:
        torch.manual_seed(seed)
        adam = functools.partial(torch.optim.Adam, lr=s.lr["rounding"])
        module, target = model.get_submodule(unit), reference.get_submodule(unit)
        with mock.patch.object(torch.optim, "Adam", adam):
            peer.reconstruction(model, reference, module, target, images, config)

    def alone(model: nn.Module, unit: str) -> None:
        names = unit_names(reference)
        before = names[names.index(unit) - 1]
        entry = [f"{before}.{kind}_post_act_fake_quantize" for kind in ("layer", "block")]
        modules: list[tuple[str, Any]] = list(model.named_modules())
        for name, module in modules:
            inside = name.startswith(unit + ".") or name in entry
            if isinstance(module, peer.QuantizeBase) and not inside:
                module.disable_fake_quant()

    return Program(model, reference, learn, alone, took)
