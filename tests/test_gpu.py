"""What only a GPU can show: every recipe trains, resumes and is scored there, as on the CPU.

pytest -m gpu                             on a machine with CUDA
QEXP_TEST_DEVICE=cpu pytest -m gpu        the tests themselves, without one
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from compose import TINY, TINY_PTQ
from conftest import Qexp

DEVICE = os.environ.get("QEXP_TEST_DEVICE", "cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs CUDA"),
    pytest.mark.timeout(1200),
]
HERE = ("out=out", f"device={DEVICE}", "model.checkpoint=none")
TRAINED = ("lsq", "lsqplus", "lsq_per_channel", "pact", "dorefa", "pot", "apot", "post", "asq_lsq",
           "asq", "n2uq", "adq")  # fmt: skip


def words(base: tuple[str, ...]) -> list[str]:
    own = ("device=", "model.checkpoint=", "compile=")
    return ["train", *(w for w in base if not w.startswith(own)), *HERE]


def result() -> dict:
    (path,) = Path("out").glob("**/result.json")
    return json.loads(path.read_text())


@pytest.mark.parametrize("method", TRAINED)
@pytest.mark.parametrize("how", ["compile=off", "compile=kernels", "compile=model"])
def test_every_method_trains(qexp: Qexp, method: str, how: str) -> None:
    done = qexp(*words(TINY), f"quantizer={method}", "bits=3", "recipe.epochs=2", how)
    assert done.code == 0, done.err
    assert 0 <= result()["top1"] <= 100


@pytest.mark.skipif(DEVICE == "cpu", reason="needs CUDA graphs")
@pytest.mark.parametrize("method", TRAINED)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_run_of_cuda_graphs_ends_as_a_compiled_one(
    qexp: Qexp, method: str, accumulate: int
) -> None:
    """Not run on a GPU yet: written without one at hand."""
    more = (f"quantizer={method}", "bits=3", "recipe.epochs=2", f"recipe.accumulate={accumulate}")
    losses = []
    for how in ("model", "graphs"):
        own = [w for w in words(TINY) if not w.startswith("out=")]
        done = qexp(*own, *more, f"compile={how}", f"out={how}")
        assert done.code == 0, done.err
        (path,) = Path(how).glob("**/last.pt")
        losses.append(torch.load(path, map_location="cpu", weights_only=True)["losses"])
    torch.testing.assert_close(losses[1], losses[0], rtol=2e-2, atol=1e-3)


def test_training_in_bfloat16_and_channels_last(qexp: Qexp) -> None:
    more = ("recipe.amp=true", "recipe.channels_last=true", "saved=inputs", "recipe.accumulate=2")
    done = qexp(*words(TINY), "quantizer=asq", "recipe.epochs=1", "compile=kernels", *more)
    assert done.code == 0, done.err


@pytest.mark.parametrize("method", ["nearest", "adaround", "brecq", "qdrop", "aquant"])
def test_every_post_training_method_runs(qexp: Qexp, method: str) -> None:
    done = qexp(*words(TINY_PTQ), f"quantizer={method}", "bits=3", "compile=kernels")
    assert done.code == 0, done.err


@pytest.mark.parametrize("method", ["lsq", "asq", "n2uq", "adq"])
def test_the_first_loss_is_the_cpus(qexp: Qexp, method: str) -> None:
    losses = []
    for number, device in enumerate((DEVICE, "cpu")):
        own = [w for w in words(TINY) if not w.startswith(("out=", "device="))]
        more = (f"quantizer={method}", "bits=4", "recipe.epochs=1", "compile=off", "max_steps=1")
        done = qexp(*own, *more, f"device={device}", f"out=run{number}")
        assert done.code == 0, done.err
        (path,) = Path(f"run{number}").glob("**/last.pt")
        losses.append(torch.load(path, map_location="cpu", weights_only=True)["losses"][0])
    torch.testing.assert_close(losses[0], losses[1], rtol=2e-2, atol=0)


def test_an_export_is_scored_by_every_engine_as_the_run(qexp: Qexp) -> None:
    assert qexp(*words(TINY), "quantizer=lsq", "bits=4", "recipe.epochs=2").code == 0
    (folder,) = (path.parent for path in Path("out").glob("**/result.json"))
    assert qexp("export", f"run={folder}").code == 0
    top1 = result()["top1"]
    engines = ("packed", "triton") if DEVICE == "cuda" else ("packed", "integer")
    for engine in engines:
        options = () if engine == "packed" else (f"engine={engine}",)
        done = qexp("eval", f"checkpoint={folder}/model.safetensors", f"run={folder}",
                    f"device={DEVICE}", *options)  # fmt: skip
        assert done.code == 0, done.err
        assert f"{top1:.2f}" in done.out
