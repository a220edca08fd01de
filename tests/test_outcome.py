"""What a run says about itself: nominal widths, logged operands, the last good checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from compose import tiny
from torch import Tensor, nn

from qexp.errors import RunError
from qexp.quant.convert import calibrate_, quant_layers
from qexp.recipes import build, outcome
from qexp.recipes.observe import log_quantizers
from qexp.recipes.watch import check_finite

CPU = torch.device("cpu")


def network(cfg: Any) -> tuple[build.Network, Tensor]:
    """The quantized network of a config, calibrated, and the images that did it."""
    torch.manual_seed(0)
    dataset = build.make_dataset(cfg, CPU)
    made = build.make_network(cfg, build.make_model(cfg, dataset, CPU), dataset.input_shape)
    images = dataset.calibration_images(16, 0)
    calibrate_(made.model, images)
    return made, images


@pytest.mark.parametrize(
    ("words", "widths"),
    [
        (("quantizer/weight=none", "bits=3"), (32, 3)),
        (("quantizer/act=none", "bits=3"), (3, 32)),
        (("bits=3",), (3, 3)),
        (("bitwidth.weight=2", "bits=4", "bitwidth.first_last=fp32"), (2, 4)),
    ],
)
def test_an_operand_in_float_is_called_32_bits(
    tmp_path: Path, words: tuple[str, ...], widths: tuple[int, int]
) -> None:
    cfg = tiny(tmp_path, "quantizer=lsq", *words)
    made, _ = network(cfg)
    assert tuple(outcome._nominal(cfg, side, made) for side in ("weight", "act")) == widths


class Log:
    """Keeps what a run would log."""

    def __init__(self) -> None:
        self.points: dict[str, float] = {}
        self.samples: dict[str, Tensor] = {}

    def scalar(self, tag: str, value: float, step: int) -> None:
        self.points[tag] = value

    def histogram(self, tag: str, values: Tensor, step: int) -> None:
        self.samples[tag] = values.clone()


def test_logged_clip_rates_are_those_of_the_operands(tmp_path: Path) -> None:
    made, images = network(tiny(tmp_path, "quantizer=asq", "bits=2"))
    inputs: dict[str, Tensor] = {}
    handles = [
        layer.register_forward_pre_hook(lambda m, given, name=name: inputs.update({name: given[0]}))
        for name, layer in quant_layers(made.model).items()
    ]
    with torch.no_grad():
        made.model.eval()(images)
    for handle in handles:
        handle.remove()
    log = Log()
    log_quantizers(log, made.model.train(), images, 1)  # type: ignore[arg-type]
    assert made.model.training
    for name, layer in quant_layers(made.model).items():
        for kind, x in (("weight", layer.weight), ("act", inputs[name])):
            q = getattr(layer, f"{kind}_quantizer")
            codes = q.codes(x)
            expected = ((codes == q.qmin) | (codes == q.qmax)).float().mean().item()
            assert log.points[f"at_bound/{name}.{kind}"] == expected
            stride = max(1, x.numel() // 20000)
            assert torch.equal(log.samples[f"{kind}/{name}"], x.detach().flatten()[::stride])
            assert log.points[f"scale/{name}.{kind}"] == q.scale.float().mean().item()


def test_the_last_good_checkpoint_is_named_within_an_epoch_too() -> None:
    model, losses = nn.Linear(1, 1), torch.tensor([1.0, float("nan")])
    for epoch, saved, kept in (
        (0, 0, "no checkpoint yet"),
        (0, 7, r"last good checkpoint is last\.pt \(epoch 1, step 7\)"),
        (2, 0, r"last good checkpoint is last\.pt \(epoch 2\)"),
        (2, 7, r"last good checkpoint is last\.pt \(epoch 3, step 7\)"),
    ):
        with pytest.raises(RunError, match=kept):
            check_finite(model, losses, epoch, saved)
