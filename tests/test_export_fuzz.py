"""Damaged and hostile packed files: refused in one line, never a crash, a hang, or a huge size.

Two kinds of mutation of a good file: of any bytes, which the checksum or safetensors finds; and of
header or tensors with the checksum made anew, as someone who means harm would.
"""

from __future__ import annotations

import copy
import json
import random
import resource
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from qexp.engine import integer_network
from qexp.errors import CheckpointError, ConfigError
from qexp.export.header import FormatError
from qexp.export.network import restore
from qexp.export.packed import pack_network, read, write
from qexp.models.resnet import ResNet
from qexp.quant.aquant import AQuant
from qexp.quant.asq import ASQ
from qexp.quant.codebook import Codebook
from qexp.quant.convert import Bits, calibrate_, quantize_
from qexp.quant.n2uq import N2UQ
from qexp.quant.nearest import Nearest
from qexp.quant.power import POST
from qexp.quant.trace import trace

pytest.importorskip("safetensors")

SHAPE = (3, 4, 4)
MODEL = {"depth": 8, "width": 0.125}
# What a mutation may put in: bytes that mean something in JSON, in lengths, and in numbers.
SPICE = [b"", b"\x00", b"\xff", b"9", b"-", b"e9", b'"', b"}", b"[", b"null", b"NaN", b"1e999"]
WORDS = [10**12, -1, 0, 2**63, 1e308, True, None, "../../etc/passwd", "os.system", [], {}, [[]]]


# What a file may hold: fixed levels, adapters of both widths, codebooks, zero points, borders.
KINDS: dict[str, tuple[Any, Any, torch.dtype]] = {
    "asq": (POST, ASQ, torch.float32),
    "asq float16": (POST, ASQ, torch.float16),
    "adq": (Codebook, N2UQ, torch.float32),
    "aquant": (partial(Nearest, per_channel=True), AQuant, torch.float32),
}


@pytest.fixture(scope="module", params=KINDS)
def good(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    weight, act, adapters = KINDS[request.param]
    torch.manual_seed(0)
    model: nn.Module = ResNet(num_classes=3, **MODEL).eval()  # type: ignore[arg-type]
    layers = trace(model, SHAPE)
    quantize_(model, layers, {layer.name: Bits(4, 4) for layer in layers}, weight, act)
    calibrate_(model, torch.randn(4, *SHAPE))
    packed = pack_network(
        model,
        target="qexp.models.resnet.ResNet",
        keywords=MODEL,
        num_classes=3,
        input_shape=SHAPE,
        data={"name": "synthetic", "mean": [0.5] * 3, "std": [0.25] * 3},
        adapters=adapters,
    )
    path = tmp_path_factory.mktemp("fuzz") / "good.safetensors"
    write(packed, path)
    return path.read_bytes()


def mutate_bytes(blob: bytes, dice: random.Random) -> bytes:
    """Replace, insert, delete or cut somewhere; the header's length and text more often."""
    for _ in range(dice.choice((1, 1, 2, 8))):
        end = dice.choice((8, 200, 6000, len(blob)))
        at = dice.randrange(min(end, len(blob)) or 1)
        how = dice.randrange(4)
        spice = dice.choice(SPICE) or bytes([dice.randrange(256)])
        if how == 0:
            blob = blob[:at] + spice + blob[at + len(spice) :]
        elif how == 1:
            blob = blob[:at] + spice + blob[at:]
        elif how == 2:
            blob = blob[:at] + blob[at + dice.randrange(1, 50) :]
        elif dice.random() < 0.2:
            blob = blob[:at]
    return blob


def mutate_meaning(blob: bytes, dice: random.Random) -> bytes:
    """Change values of both headers, and tensor bytes; the checksum is right again."""
    import hashlib

    length = int.from_bytes(blob[:8], "little")
    entries, data = json.loads(blob[8 : 8 + length]), bytearray(blob[8 + length :])
    header = json.loads(entries["__metadata__"]["qexp"])
    for _ in range(dice.choice((1, 1, 3))):
        tree = dice.choice((header, header, entries))
        while True:  # walk to a random leaf or stop on the way
            keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
            if not keys:
                break
            key = dice.choice(keys)
            if key == "__metadata__":
                break
            below = tree[key]
            if not isinstance(below, (dict, list)) or not below or dice.random() < 0.15:
                tree[key] = copy.deepcopy(dice.choice([*WORDS, dice.randrange(20), key]))
                break
            tree = below
    if dice.random() < 0.3:
        for _ in range(4):
            data[dice.randrange(len(data))] = dice.randrange(256)
    text = json.dumps(header)
    digest = hashlib.sha256(text.encode() + bytes(data)).hexdigest()
    entries["__metadata__"] = {"qexp": text, "sha256": digest}
    head = json.dumps(entries).encode()
    head += b" " * (-len(head) % 8)
    return len(head).to_bytes(8, "little") + head + bytes(data)


def load(path: Path) -> str:
    """Why the file is refused, empty if it is not; any other error passes through."""
    try:
        packed = read(path)
        for model in (restore(packed), integer_network(packed)):
            with torch.no_grad():
                model(torch.zeros(1, *SHAPE))
    except (CheckpointError, FormatError) as error:
        return str(error)
    except ConfigError as error:
        if "If you trust it: trust=true" not in str(error):
            raise
        return str(error)
    return ""


def fuzz(good: bytes, folder: Path, rounds: int) -> None:
    path = folder / "x.safetensors"
    path.write_bytes(good)
    assert load(path) == ""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for seed in range(rounds):
        dice = random.Random(seed)
        meant = seed % 2
        path.write_bytes((mutate_meaning if meant else mutate_bytes)(good, dice))
        began = time.process_time()
        refused = load(path)
        assert time.process_time() - began < 5, f"seed {seed} hangs"
        assert "\n" not in refused, f"seed {seed} is refused in more than a line"
        assert meant or refused or path.read_bytes() == good, f"seed {seed} is accepted"
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 300_000, f"{grown} KiB more memory"


def test_no_mutation_crashes_the_reader(good: bytes, tmp_path: Path) -> None:
    fuzz(good, tmp_path, 150)


@pytest.mark.slow
def test_no_mutation_of_ten_thousand_crashes_the_reader(good: bytes, tmp_path: Path) -> None:
    fuzz(good, tmp_path, 10_000 // len(KINDS))
