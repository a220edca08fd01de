"""What a run says about itself: nominal widths, logged operands, the last good checkpoint."""

from __future__ import annotations

import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from compose import tiny
from torch import Tensor, nn

from qexp.errors import RunError
from qexp.export.coding import CODERS
from qexp.export.inputs import KINDS
from qexp.quant.bitwidth import Progressive
from qexp.quant.codebook import Codebook
from qexp.quant.convert import calibrate_, quant_layers
from qexp.quant.power import POST
from qexp.quant.quantizer import Quantizer
from qexp.recipes import build, outcome
from qexp.recipes.evaluate import Score
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


class Run:
    """Keeps the events of a run and nothing else."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []

    def event(self, kind: str, **fields: Any) -> None:
        self.events.append({"event": kind, **fields})

    def scalar(self, *given: Any) -> None: ...

    warn = scalar

    def info(self, line: str) -> None:
        self.line = line


def closed(run: Run, state: dict[str, Any], test: float, val: float | None, **made: Any) -> bool:
    """Close an epoch of this score, of two steps, 6 of 8 images right, half of them just now."""
    state |= {"losses": torch.tensor([1.0, 3.0, 90.0]), "step": 2, "hits": torch.tensor(6)}
    state |= {"seen": 8, "trained": 4, "train_s": 2.0, "test_s": 1.0, "stuck": []}
    network = SimpleNamespace(**{"model": nn.Linear(1, 1), "policy": None, **made})
    scores = (Score(test, 0.5, 1.0), None if val is None else Score(val, 0.5, 1.0))
    rates = torch.optim.SGD(network.model.parameters(), lr=0.1)
    return outcome.log_epoch(run, network, state, rates, *scores, 3, [], 1.5)  # type: ignore[arg-type]


def test_the_time_left_is_that_of_the_epochs_left() -> None:
    run = Run()
    state: dict[str, Any] = {"history": [], "best": {"selected": -1.0, "top1": -1.0, "epoch": -1}}
    closed(run, state | {"epoch": 1}, 50.0, None)
    assert run.line.endswith("| eta 0:04")  # 1.5 epochs of 2 s and 1 s of scoring


@pytest.mark.parametrize("held_out", [False, True])
def test_the_best_epoch_is_chosen_on_the_hold_out_and_the_last_one_reported(held_out: bool) -> None:
    state: dict[str, Any] = {"history": [], "best": {"selected": -1.0, "top1": -1.0, "epoch": -1}}
    best = []
    for epoch, (test, val) in enumerate([(50.0, 40.0), (80.0, 30.0), (80.0, 60.0), (60.0, 60.0)]):
        state["epoch"] = epoch + 1
        best.append(closed(Run(), state, test, val if held_out else None))
    assert best == ([True, False, True, False] if held_out else [True, True, False, False])
    for row, speed in zip(state["history"], (9.0, 1.0, 2.0, 3.0), strict=True):
        row["images_per_s"] = speed
    found = outcome.measured(state, SimpleNamespace(has_val=held_out), 4)
    assert found == {
        "top1": 60.0,
        "val_top1": 60.0 if held_out else None,
        "top1_best": 80.0,
        "best_epoch": 3 if held_out else 2,
        "best_selected_on": "val" if held_out else "test",
        "epochs": 4,
        "images_per_s": 3.0,  # the median
    }


def test_an_epochs_row_is_of_its_own_steps_and_images() -> None:
    state: dict[str, Any] = {"history": [], "best": {"selected": -1.0, "top1": -1.0, "epoch": -1}}
    run, stages = Run(), Progressive([{"until": 1, "bits": 8}, {"bits": 2}])
    for epoch in (1, 2):
        state["epoch"] = epoch
        closed(run, state, 50.0, None, policy=stages)
    rows = [row for row in run.events if row["event"] == "epoch"]
    assert [row["bits"] for row in rows] == [8, 2]  # of the epoch that was trained
    for row in rows:
        assert (row["loss"], row["train_top1"], row["images_per_s"]) == (2.0, 75.0, 2.0)


def test_minutes_are_of_the_rounded_seconds() -> None:
    assert [outcome.minutes(s) for s in (0.4, 59.4, 59.6, 3600)] == [
        "0:00",
        "0:59",
        "1:00",
        "60:00",
    ]


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
    assert {text.partition("(")[0] for text in kinds["weight"]} == {"POST", "LSQ"}
    assert all("\n" not in text for texts in kinds.values() for text in texts)


KNOWN = {cls.__name__: cls for cls in (*CODERS, *(kind.cls for kind in KINDS.values()))}
del KNOWN["FixedGrid"]  # takes its levels as a tensor


@pytest.mark.parametrize("cls", KNOWN.values(), ids=KNOWN)
def test_every_option_of_a_quantizer_is_recorded(cls: type[Quantizer]) -> None:
    made = cls(3, shape=(4, 3, 3, 3))
    options = set(inspect.signature(cls.__init__).parameters)  # type: ignore[misc]
    options -= {"self", "bits", "signed", "shape", "border"}  # a border is named by its degree
    told = {part.partition("=")[0].strip() for part in made.extra_repr().split(",")}
    nothing = {name for name in options - told if getattr(made, name, 0) is None}
    assert options - nothing <= told


def test_grids_of_other_levels_are_recorded_apart() -> None:
    made = [
        POST(4, shape=(4, 3), base=base, levels=levels)
        for base in ("auto", 2.0)
        for levels in ("full", "symmetric", "no_zero")
    ]
    made += [Codebook(4, shape=(4, 3), levels=levels) for levels in ("full", "symmetric")]
    assert len({repr(q) for q in made}) == 8
    assert "base=1.41421" in repr(made[0])  # what `auto` came to


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
