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


def test_the_last_line_of_a_run_says_what_came_out() -> None:
    result = {
        "top1": 87.754, "fp32_top1": 88.2, "w_bits": 4, "a_bits": 4, "wall_s": 65.2,
        "size_bytes": 49752, "fp32_bytes": 1301928,
        "bits": {"weight_by_param": 3.0001, "act_by_layer": 4.0},
    }  # fmt: skip
    tail = "3 bits a weight, 4 an input | 50 kB, float 1,302 kB | 1:05"
    assert outcome.closing(result) == f"done: top-1 87.75, float 88.20 | {tail}"
    mixed = {**result, "w_bits": None, "a_bits": None, "fp32_top1": None}
    assert outcome.closing(mixed) == f"done: top-1 87.75 | {tail}"
    plain = {**result, "w_bits": 32, "a_bits": 32, "size_bytes": 1301928}
    assert outcome.closing(plain) == "done: top-1 87.75, float 88.20 | 1,302 kB | 1:05"
    baseline = {**plain, "fp32_top1": plain["top1"]}
    assert outcome.closing(baseline) == "done: top-1 87.75 | 1,302 kB | 1:05"
    # of a recipe of one's own
    assert outcome.closing({"wall_s": 0.4}) == "done | 0:00"
    assert outcome.closing({"wall_s": 0, "bits": {"mine": 4}, "size_bytes": 1}) == "done | 0:00"


def test_quantizers_in_use_are_named_in_one_line_each(tmp_path: Path) -> None:
    cfg = tiny(tmp_path, "quantizer=asq", "model.checkpoint=null")
    dataset = build.make_dataset(cfg, torch.device("cpu"))
    model = build.make_model(cfg, dataset, torch.device("cpu"))
    build.make_network(cfg, model, dataset.input_shape)
    kinds = outcome.granularity(model)
    assert sorted(text.partition("(")[0] for text in kinds["act"]) == ["ASQ", "LSQ", "LSQ"]
    assert all("\n" not in text for texts in kinds.values() for text in texts)


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
