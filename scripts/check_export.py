"""Compare every exported form of finished runs with the runs themselves, on test images.

    python scripts/check_export.py results/export/check.json outputs/.../lsq-w4a4/... [...]
    python scripts/check_export.py ... --images 1000        # the first so many; default: all
    python scripts/check_export.py ... --slow 1             # images of the slow engines

A line for each run and form, and a row of the JSON file: largest difference of an image's logits
(median and worst over images), images with another top-1, top-1, bytes. `itself` is the control:
the fake-quantized network in channels-last memory, which only changes the order of sums. A value
that lies on a border between two codes may fall to either side of it then. `float64` is the same
network computed in float64; every form is held against it too, for the run's own float32 logits are
no more exact than another form's.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qexp.engine import integer_network
from qexp.errors import QexpError, one_line, origin
from qexp.export.command import pack_run
from qexp.export.network import restore
from qexp.export.onnx_int8 import to_onnx_int8
from qexp.export.onnx_network import to_onnx
from qexp.export.packed import Packed, to_bytes
from qexp.export.runtime import session
from qexp.quant.accounting import account
from qexp.quant.convert import frozen_weights, quant_layers
from qexp.quant.trace import trace
from qexp.recipes.build import load_run
from qexp.runner.atomic import write_json

BATCH = 100
SLOW = 4  # images of the slow engines
CALIBRATION = 256


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 1 when a weight is not equal bit for bit, 2 without a comparison."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--images", type=int, default=None)
    parser.add_argument("--slow", type=int, default=SLOW, choices=range(1, 101), metavar="N")
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    try:
        rows = [row for run in given.runs for row in check(run, given.images, given.slow)]
    except Exception as error:
        if not isinstance(origin(error), (QexpError, OSError)):
            raise
        print(f"check_export: {one_line(error)}", file=sys.stderr)
        return 2
    given.file.parent.mkdir(parents=True, exist_ok=True)
    write_json(given.file, rows)
    return int(not all(row["weights_equal"] for row in rows))


@torch.no_grad()
def check(run: Path, count: int | None, slow: int = SLOW) -> list[dict[str, Any]]:
    """One row a form of one run."""
    model, dataset, trained = load_run(run, "last.pt", "cpu")
    model.eval()
    packed = pack_run(model, dataset, trained)
    fp32 = account(model, trace(model, dataset.input_shape)).fp32_bytes
    x, y = _images(dataset, count)
    restored = restore(packed, trust=True)
    equal = all(
        torch.equal(quant_layers(restored)[name].weight, layer.quantized_weight())
        for name, layer in quant_layers(model).items()
    )
    with frozen_weights(model):
        ours = _logits(model, x)
    exact_network = copy.deepcopy(model).double()
    with frozen_weights(exact_network):
        exact = _logits(lambda part: exact_network(part.double()), x)
    facts = {
        "run": f"{run.parent.name}/{run.name}",
        "dataset": dataset.name,
        "model": str(trained.model.name),
        "weights_equal": equal,
        "network_top1": _top1(ours, y),
        "float64_top1": _top1(exact, y),
        "network_other_top1_float64": _other_top1(ours, exact),
    }
    print(
        f"{facts['run']:<40} float64    top-1 {facts['float64_top1']:.2f} of {len(x)} "
        f"(other top-1: {facts['network_other_top1_float64']})",
        flush=True,
    )
    rows = []
    for form, (network, size, images) in _forms(model, restored, packed, dataset, slow).items():
        n = len(x) if images is None else min(images, len(x))
        theirs = _logits(network, x[:n])
        apart = (theirs - ours[:n]).abs().amax(1)
        rows.append(
            {
                **facts,
                "form": form,
                "images": n,
                "top1": _top1(theirs, y[:n]),
                "other_top1": _other_top1(theirs, ours[:n]),
                "other_top1_float64": _other_top1(theirs, exact[:n]),
                "median": apart.median().item(),
                "worst": apart.max().item(),
                "beyond_rounding": _beyond(theirs, ours[:n]),
                "beyond_rounding_float64": _beyond(theirs, exact[:n]),
                "scale": ours.abs().max().item(),
                "bytes": size,
                "of_float": size / fp32,
            }
        )
        row = rows[-1]
        print(
            f"{facts['run']:<40} {form:<10} top-1 {row['top1']:.2f} of {n} (other top-1: "
            f"{row['other_top1']}; float64: {row['other_top1_float64']}) | apart "
            f"{row['median']:.1e}, worst {row['worst']:.1e}, beyond rounding "
            f"{row['beyond_rounding']} (float64: {row['beyond_rounding_float64']}) | "
            f"{size:,} bytes, {row['of_float']:.3f}",
            flush=True,
        )
    return rows


Form = tuple[Callable[[Tensor], Tensor], int, int | None]  # network, bytes, images or all


def _forms(
    model: nn.Module, restored: nn.Module, packed: Packed, dataset: Any, slow: int
) -> dict[str, Form]:
    size = len(to_bytes(packed))
    exact = to_onnx(packed).SerializeToString()
    calibration = dataset.calibration_images(min(CALIBRATION, dataset.train_size), 0)
    integers = to_onnx_int8(packed, calibration)[0].SerializeToString()
    return {
        "itself": (lambda x: model(x.to(memory_format=torch.channels_last)), size, None),
        "packed": (restored, size, None),
        "integer": (integer_network(packed, trust=True), size, None),
        "table": (integer_network(packed, "table", trust=True), size, slow),
        "reference": (integer_network(packed, "reference", trust=True), size, slow),
        "onnx": (session(exact, 1), len(exact), None),
        "onnx_int8": (session(integers, 1), len(integers), None),
    }


def _images(dataset: Any, count: int | None) -> tuple[Tensor, Tensor]:
    found: list[tuple[Tensor, Tensor]] = []
    for batch in dataset.eval_batches("test"):
        found.append(batch)
        if count is not None and sum(len(y) for _, y in found) >= count:
            break
    x, y = (torch.cat(parts)[:count] for parts in zip(*found, strict=True))
    return x, y


def _logits(network: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return torch.cat([network(part) for part in x.split(BATCH)])


def _other_top1(a: Tensor, b: Tensor) -> int:
    return int((a.argmax(1) != b.argmax(1)).sum())


def _beyond(a: Tensor, b: Tensor) -> int:
    """Images with a logit further apart than rounding: a code has flipped somewhere."""
    return int(((a - b).abs().amax(1) > 1e-4 * b.abs().max()).sum())


def _top1(logits: Tensor, y: Tensor) -> float:
    return 100 * (logits.argmax(1) == y).float().mean().item()


if __name__ == "__main__":
    sys.exit(main())
