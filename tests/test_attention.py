"""Attention modules whose projections are layers: the same networks, and quantized throughout."""

from __future__ import annotations

import copy
import csv
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Qexp
from torch import Tensor, fx, nn
from torchvision.models import VisionTransformer
from torchvision.models.swin_transformer import (
    PatchMergingV2,
    SwinTransformer,
    SwinTransformerBlockV2,
)

from qexp.engine.network import integer_network
from qexp.errors import CheckpointError, ConfigError
from qexp.export.network import restore
from qexp.export.packed import pack_network
from qexp.models.attention import Attention
from qexp.models.load import load_state, load_tensors_
from qexp.models.opened import open_attention_
from qexp.models.window_attention import WindowAttention
from qexp.quant.accounting import account
from qexp.quant.additive import APoTActivation
from qexp.quant.asq import ASQ
from qexp.quant.blocks import find_units, unfit
from qexp.quant.convert import Bits, calibrate_, quantize_
from qexp.quant.fold import trace_graph
from qexp.quant.lsq import LSQ, LSQPlus
from qexp.quant.n2uq import N2UQ
from qexp.quant.quantizer import Quantizer
from qexp.quant.trace import trace
from qexp.recipes.build import load_run
from qexp.runner import checkpoint

CLOSE: Any = {"atol": 2e-6, "rtol": 1e-5}
N, L, S, C, HEADS = 3, 5, 7, 8, 2
GRID = (C, 2, 4)  # images whose pixels are tokens of C channels


class Attending(nn.Module):
    """Pixels attend to each other, or one of them to all (`cross`)."""

    def __init__(self, attention: nn.Module, *, cross: bool = False) -> None:
        super().__init__()
        self.attention, self.cross = attention, cross
        self.first = getattr(attention, "batch_first", True)
        nn.init.normal_(next(attention.parameters()), std=0.5)
        for name, parameter in attention.named_parameters():
            if "bias" in name:
                nn.init.normal_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2).permute(0, 2, 1) if self.first else x.flatten(2).permute(2, 0, 1)
        query = x.narrow(1 if self.first else 0, 0, 1) if self.cross else x
        return self.attention(query, x, x)[0]


def opened(model: nn.Module, shape: tuple[int, ...]) -> Any:
    copied = copy.deepcopy(model)
    assert open_attention_(copied, shape)
    return copied


# ---------------------------------------------------------------------------------------------
# nn.MultiheadAttention


def masks(length: int, size: int) -> list[tuple[Tensor | None, Tensor | None]]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.rand(N * HEADS, length, size, generator=generator) > 0.6
    hidden[..., 0] = False
    added = torch.randn(N * HEADS, length, size, generator=generator)
    padded = torch.arange(size).expand(N, size) >= size - 2
    return [
        (None, None),
        (hidden[0], None),
        (added, None),
        (None, padded),
        (hidden, padded),
        (added[0], torch.randn(N, size, generator=generator)),
    ]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("cross", [False, True])
def test_attention_gives_what_torchs_module_gives(
    cross: bool, batch_first: bool, bias: bool, need_weights: bool, training: bool
) -> None:
    torch.manual_seed(0)
    source = nn.MultiheadAttention(C, HEADS, bias=bias, batch_first=batch_first)
    model = Attending(source, cross=cross).train(training)
    ours = opened(model, GRID).attention
    assert type(ours) is Attention
    assert hasattr(ours, "in_proj") is not cross
    query = torch.randn((N, L, C) if batch_first else (L, N, C))
    key = torch.randn((N, S, C) if batch_first else (S, N, C)) if cross else query
    for attn_mask, padding in masks(L, S if cross else L):
        for average in (True, False):
            keywords: Any = {"attn_mask": attn_mask, "key_padding_mask": padding}
            keywords |= {"need_weights": need_weights, "average_attn_weights": average}
            expected = source(query, key, key, **keywords)
            got = ours(query, key, key, **keywords)
            torch.testing.assert_close(got, expected, **CLOSE)


def test_keys_and_values_of_other_sizes_have_layers_of_their_own() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(C, HEADS, kdim=4, vdim=6, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            x = x.flatten(2).transpose(1, 2)
            return self.attention(x, x[..., :4], x[..., :6], need_weights=False)[0]

    torch.manual_seed(0)
    model, x = Own(), torch.randn(N, *GRID)
    ours = opened(model, GRID)
    torch.testing.assert_close(ours(x), model(x), **CLOSE)
    for parameter in ours.parameters():
        nn.init.zeros_(parameter)
    load_tensors_(ours, model.state_dict())
    torch.testing.assert_close(ours(x), model(x), **CLOSE)


@pytest.mark.parametrize("need_weights", [False, True])
def test_a_causal_mask_and_its_hint_are_torchs(need_weights: bool) -> None:
    torch.manual_seed(0)
    model = Attending(nn.MultiheadAttention(C, HEADS, batch_first=True))
    ours, x = opened(model, GRID).attention, torch.randn(N, L, C)
    mask = nn.Transformer.generate_square_subsequent_mask(L)
    keywords: Any = {"attn_mask": mask, "is_causal": True, "need_weights": need_weights}
    expected = model.attention(x, x, x, **keywords)
    torch.testing.assert_close(ours(x, x, x, **keywords), expected, **CLOSE)
    with pytest.raises(ValueError, match="causal attn_mask"):
        ours(x, x, x, is_causal=True)


@pytest.mark.parametrize("need_weights", [False, True])
def test_attention_drops_out_in_training_alone(need_weights: bool) -> None:
    model = Attending(nn.MultiheadAttention(C, HEADS, dropout=1.0, batch_first=True))
    ours, x = opened(model, GRID).attention, torch.randn(N, L, C)
    bias = ours.out_proj.bias.expand(N, L, C)
    torch.testing.assert_close(ours.train()(x, x, x, need_weights=need_weights)[0], bias)
    assert not torch.allclose(ours.eval()(x, x, x, need_weights=need_weights)[0], bias)


class Twice(Attending):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + super().forward(2 * x)


class Unbatched(Attending):
    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x.mean((2, 3)), x.mean((2, 3)), x.mean((2, 3)))[0]


class Own(nn.MultiheadAttention):
    pass


@pytest.mark.parametrize(
    "make",
    [
        lambda: Attending(nn.MultiheadAttention(C, HEADS, batch_first=True, add_bias_kv=True)),
        lambda: Attending(nn.MultiheadAttention(C, HEADS, batch_first=True, add_zero_attn=True)),
        lambda: Attending(Own(C, HEADS, batch_first=True)),
        lambda: Twice(nn.MultiheadAttention(C, HEADS, batch_first=True)),
        lambda: Unbatched(nn.MultiheadAttention(C, HEADS, batch_first=True)),
    ],
    ids=["bias_kv", "zero_attn", "subclass", "called twice", "unbatched"],
)
def test_attention_without_such_a_form_is_left_as_it_is(make: Callable[[], nn.Module]) -> None:
    model = make()
    before, names = model.state_dict(), [*model.state_dict()]
    assert open_attention_(model, GRID) == []
    assert [*model.state_dict()] == names
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_shared_parameter_leaves_attention_as_it_is() -> None:
    model = Attending(nn.MultiheadAttention(C, HEADS, batch_first=True))
    model.again = nn.MultiheadAttention(C, HEADS, batch_first=True)
    model.again.in_proj_weight = model.attention.in_proj_weight  # type: ignore[assignment]
    assert open_attention_(model, GRID) == []


def test_a_fused_projection_refuses_tensors_that_differ() -> None:
    ours = opened(Attending(nn.MultiheadAttention(C, HEADS, batch_first=True)), GRID).attention
    x = torch.randn(N, L, C)
    with pytest.raises(ValueError, match="no longer one tensor"):
        ours(x, x.clone(), x)


def test_replacing_draws_no_random_number_and_keeps_modes_and_parameters() -> None:
    model = tiny_vit()
    model.encoder.layers[1].eval()
    modes = [m.training for m in (model, *model.encoder.layers, model.heads)]
    weight = model.encoder.layers[0].self_attention.in_proj_weight
    state = torch.get_rng_state()
    names = open_attention_(model, (3, 16, 16))
    assert names == [f"encoder.layers.encoder_layer_{i}.self_attention" for i in range(2)]
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in (model, *model.encoder.layers, model.heads)] == modes
    assert model.encoder.layers[0].self_attention.in_proj.weight is weight


class Encoder(nn.Module):
    """torch's own encoder, which has fused kernels for eval mode."""

    def __init__(self, num_classes: int = 10, padded: bool = False) -> None:
        super().__init__()
        self.patch, self.padded = nn.Conv2d(3, 16, 4, 4), padded
        layer = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.fc = nn.Linear(16, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        hidden = None
        if self.padded:
            hidden = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2]) > 1
        return self.fc(self.encoder(x, src_key_padding_mask=hidden)[:, :2].mean(1))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("padded", [False, True])
def test_torchs_encoder_calls_projections_that_alone_are_quantized(padded: bool) -> None:
    torch.manual_seed(0)
    model, x = Encoder(padded=padded).eval(), torch.randn(4, 3, 8, 8)
    ours = opened(model, (3, 8, 8))
    with torch.no_grad():
        exact = model(x)
        torch.testing.assert_close(ours(x), exact, **CLOSE)
        layers = trace(ours, (3, 8, 8))
        only = {layer.name: Bits(2, 2) for layer in layers if "in_proj" in layer.name}
        assert len(only) == 2
        quantize_(ours, layers, only, LSQ, LSQ)
        calibrate_(ours, x)
        scored = ours(x)
    assert not torch.allclose(scored, exact, atol=0.01)
    torch.testing.assert_close(scored, ours(x.requires_grad_()), **CLOSE)


# ---------------------------------------------------------------------------------------------
# Swin


def tiny_swin(version: int, **more: Any) -> SwinTransformer:
    torch.manual_seed(0)
    if version == 2:
        more |= {"block": SwinTransformerBlockV2, "downsample_layer": PatchMergingV2}
    sizes: Any = ([4, 4], 8, [2, 2], [2, 2], [4, 4])
    model = SwinTransformer(*sizes, num_classes=4, stochastic_depth_prob=0.0, **more)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 or name.endswith("qkv.bias"):
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.mark.parametrize("size", [32, 28, 36], ids=["whole windows", "padded", "one window behind"])
@pytest.mark.parametrize("version", [1, 2])
def test_window_attention_gives_what_torchvisions_gives(version: int, size: int) -> None:
    model, x = tiny_swin(version), torch.randn(3, 3, size, size)
    ours = opened(model, (3, size, size))
    assert sum(isinstance(m, WindowAttention) for m in ours.modules()) == 4
    expected, got = model(x), ours(x)
    torch.testing.assert_close(got, expected, **CLOSE)
    expected.square().sum().backward()
    got.square().sum().backward()
    gradients = {name: p.grad for name, p in ours.named_parameters()}
    for name, parameter in model.named_parameters():
        if name in gradients:
            exact = parameter.grad
            torch.testing.assert_close(gradients[name], exact, atol=1e-4, rtol=1e-3)


def test_swins_own_checkpoint_loads_and_nothing_integer_is_stored() -> None:
    for version in (1, 2):
        model, x = tiny_swin(version), torch.randn(2, 3, 32, 32)
        ours = opened(model, (3, 32, 32))
        for parameter in ours.parameters():
            nn.init.zeros_(parameter)
        load_tensors_(ours, model.state_dict())
        torch.testing.assert_close(ours(x), model(x), **CLOSE)
        assert all(value.is_floating_point() for value in ours.state_dict().values())


@pytest.mark.parametrize("version", [1, 2])
def test_a_row_of_what_swins_projections_see_is_an_image(version: int) -> None:
    ours, x = opened(tiny_swin(version), (3, 32, 32)), torch.randn(3, 3, 32, 32)
    layers = {layer.name: layer for layer in trace(ours, (3, 32, 32))}
    qkv = layers["features.1.1.attn.qkv"]
    assert qkv.act_shape == (4, 16, 8)  # windows, tokens, channels
    assert qkv.macs == 64 * 24 * 8
    assert qkv.signed
    names = [n for n in layers if n.endswith((".qkv", ".proj"))]
    assert len(names) == 8
    assert unfit(ours, names, x) == {}
    quantizer = ASQ(4, signed=True, shape=(8,))
    windows = torch.randn(3, 4, 16, 8)
    factors = quantizer.factors(windows)
    assert factors.shape == (3, 1, 1, 1)
    torch.testing.assert_close(factors[:, 0], quantizer.factors(windows.flatten(1, 2)))


def test_attention_drops_out_of_windows_in_training_alone() -> None:
    ours = opened(tiny_swin(1, dropout=1.0), (3, 32, 32)).features[1][0].attn
    x = torch.randn(2, 8, 8, 8)
    assert not ours.train()(x).any()
    assert ours.eval()(x).any()


# ---------------------------------------------------------------------------------------------
# In a network


def tiny_vit() -> Any:
    torch.manual_seed(0)
    model = VisionTransformer(16, 8, 2, 2, 16, 32, num_classes=4)
    for name, parameter in model.named_parameters():
        if "head" in name or "self_attention" in name:  # torchvision's are zero, or small
            nn.init.normal_(parameter, std=0.3)
    return model


NETWORKS = [(tiny_vit(), 16), (tiny_swin(1), 32), (tiny_swin(2), 32)]


@pytest.mark.parametrize(("model", "size"), NETWORKS)
def test_torch_fx_sees_the_projections_for_any_number_of_images(
    model: nn.Module, size: int
) -> None:
    ours = opened(model, (3, size, size)).eval()
    layers = [layer.name for layer in trace(ours, (3, size, size))]
    graph = trace_graph(ours)
    called = [str(node.target) for node in graph.nodes if node.op == "call_module"]
    assert set(layers) <= set(called)
    x = torch.randn(5, 3, size, size)
    torch.testing.assert_close(fx.GraphModule(ours, graph)(x), ours(x), **CLOSE)
    units = find_units(ours, layers, "block")
    blocks = [unit for unit in units if len(unit.layers) > 1]
    assert all(sum("attn" in n or "attention" in n for n in b.layers) >= 2 for b in blocks)
    assert len(blocks) == (2 if size == 16 else 4)
    assert unfit(ours, [unit.name for unit in units], x) == {}


class TokensFirst(nn.Module):
    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.batch_first, self.stem = batch_first, nn.Linear(6, 16)
        self.encoder = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=batch_first)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x[:, 0])  # [N, T, C]
        x = self.encoder(x) if self.batch_first else self.encoder(x.transpose(0, 1)).transpose(0, 1)
        return self.head(x.mean(1))


@pytest.mark.parametrize("tokens", [4, 5])
def test_a_factor_a_sample_wants_the_samples_first(tokens: int) -> None:
    torch.manual_seed(0)
    shape = (1, tokens, 6)
    for batch_first in (True, False):
        model = TokensFirst(batch_first).eval()
        open_attention_(model, shape)
        layers = trace(model, shape)
        bits = {layer.name: Bits(4, 4) for layer in layers}
        ahead = {layer.name for layer in layers if layer.tokens_first}
        assert ahead == (set() if batch_first else {"encoder.linear1", "encoder.linear2"})
        linear = {layer.name: layer for layer in layers}["encoder.linear1"]
        assert (linear.macs, linear.act_shape) == (tokens * 16 * 32, (tokens, 16))
        if batch_first:
            quantize_(model, layers, bits, LSQ, ASQ)
            x = torch.randn(6, *shape)
            calibrate_(model, x)
            with torch.no_grad():
                torch.testing.assert_close(torch.cat([model(a) for a in x.split(1)]), model(x))
            continue
        quantize_(copy.deepcopy(model), layers, bits, LSQ, partial(ASQ, factor="frozen"))
        with pytest.raises(ConfigError, match=r"'encoder.linear1' .* the model with batch_first"):
            quantize_(model, layers, bits, LSQ, ASQ)


@pytest.mark.parametrize("act", [LSQ, LSQPlus, N2UQ, APoTActivation])
def test_a_step_learns_alike_wherever_the_samples_stand(act: type[Quantizer]) -> None:
    grads, shape, x = [], (1, 5, 6), torch.randn(6, 1, 5, 6)
    for batch_first in (True, False):
        torch.manual_seed(0)
        model = TokensFirst(batch_first).eval()
        open_attention_(model, shape)
        layers = trace(model, shape)
        bits = {layer.name: Bits(4, 4) for layer in layers}
        quantize_(model, layers, bits, LSQ, partial(act, count="sample"))
        calibrate_(model, x)
        model(x).square().sum().backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if "act_quantizer" in n})
    assert any("linear1" in name for name in grads[0])
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-6)


def test_weights_of_a_vit_are_all_in_layers_but_its_positions() -> None:
    model = opened(tiny_vit(), (3, 16, 16))
    layers = trace(model, (3, 16, 16))
    assert [layer.position for layer in layers] == ["first", *["inner"] * 8, "last"]
    assert layers[0].name == "conv_proj"
    assert layers[-1].name == "heads.head"
    assert account(model, layers).other_weights == {"encoder.pos_embedding": 5 * 16}
    assert all(layer.signed for layer in layers if "_proj" in layer.name)


def test_work_is_counted_where_tokens_come_before_the_batch() -> None:
    class TokensFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch, self.mid = nn.Conv2d(3, C, 4, 4), nn.Linear(C, 2 * C)
            self.attention, self.fc = nn.MultiheadAttention(2 * C, HEADS), nn.Linear(2 * C, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.mid(self.patch(x).flatten(2).permute(2, 0, 1))
            return self.fc(self.attention(x, x, x)[0].mean(0))

    model = opened(TokensFirst(), (3, 12, 12))
    layers = {layer.name: layer for layer in trace(model, (3, 12, 12))}
    assert layers["mid"].act_shape == (9, C)
    assert layers["mid"].macs == 9 * layers["mid"].weights
    assert layers["attention.in_proj"].act_shape == (9, 2 * C)
    assert layers["attention.in_proj"].macs == 9 * layers["attention.in_proj"].weights
    assert layers["fc"].macs == layers["fc"].weights


def test_a_users_checkpoint_loads_by_its_own_names_and_a_wrong_one_by_its_difference(
    tmp_path: Path,
) -> None:
    model = tiny_vit()
    torch.save(model.state_dict(), tmp_path / "user.pt")
    ours = opened(model, (3, 16, 16)).eval()
    for parameter in ours.parameters():
        nn.init.zeros_(parameter)
    load_state(ours, tmp_path / "user.pt")
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(ours(x), model.eval()(x), **CLOSE)
    wrong = VisionTransformer(16, 8, 1, 2, 16, 32, num_classes=4)
    torch.save(wrong.state_dict(), tmp_path / "wrong.pt")
    with pytest.raises(CheckpointError, match=r"12 missing \(encoder.layers.encoder_layer_1"):
        load_state(ours, tmp_path / "wrong.pt")


# ---------------------------------------------------------------------------------------------
# Runs

DATA = (
    "dataset=synthetic",
    "dataset.image_size=16",
    "dataset.train_images=48",
    "dataset.test_images=32",
    "dataset.classes=4",
    "recipe.plots=false",
    "device=cpu",
    "compile=off",
)
VIT = (
    "model=custom",
    "model._target_=torchvision.models.VisionTransformer",
    "model.name=tinyvit",
    "+model.image_size=16",
    "+model.patch_size=8",
    "+model.num_layers=2",
    "+model.num_heads=2",
    "+model.hidden_dim=16",
    "+model.mlp_dim=32",
)
QAT = ("recipe.batch_size=16", "recipe.calibration_images=16")
PTQ = (
    "recipe.images=16",
    "recipe.act_images=8",
    "recipe.held_out=8",
    "recipe.batch_size=16",
    "recipe.minibatch=8",
    "recipe.iterations=4",
)
PROJECTIONS = [
    f"encoder.layers.encoder_layer_{i}.self_attention.{part}"
    for i in range(2)
    for part in ("in_proj", "out_proj")
]


def save_start(path: Path) -> str:
    """A user's float network, under torchvision's names."""
    torch.save(tiny_vit().state_dict(), path)
    return f"model.checkpoint={path}"


def rows(folder: Path) -> dict[str, dict[str, str]]:
    with (folder / "layers.csv").open(newline="") as file:
        return {row["name"]: row for row in csv.DictReader(file)}


def logits(folder: Path) -> Tensor:
    model, dataset, _ = load_run(folder, "last.pt", "cpu")
    with torch.no_grad():
        return torch.cat([model.eval()(x) for x, _ in dataset.eval_batches("test")])


def top1(folder: Path) -> float:
    return json.loads((folder / "result.json").read_text())["top1"]


@pytest.mark.parametrize("quantizer", ["lsq", "asq"])
def test_a_vit_is_trained_resumed_scored_and_packed(
    qexp: Qexp, tmp_path: Path, quantizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (*DATA, *VIT, *QAT, save_start(tmp_path / "user.pt"), f"quantizer={quantizer}")
    words += (
        "bits=3",
        "recipe.distill.weight=0.5",
        "recipe.ema=0.9",
        "recipe.epochs=2",
        "max_steps=4",
    )
    assert qexp("train", *words, "folder=whole").code == 0
    real = checkpoint.save

    def save_then_stop(path: Path, state: dict[str, Any]) -> None:
        real(path, state)
        if path.name == "last.pt":
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save", save_then_stop)
    assert qexp("train", *words, "folder=parts").code == 130
    monkeypatch.setattr(checkpoint, "save", real)
    assert qexp("resume", "parts").code == 0
    assert torch.equal(logits(Path("whole")), logits(Path("parts")))
    found = rows(Path("whole"))
    assert [found[n]["w_bits"] + found[n]["a_bits"] for n in PROJECTIONS] == ["33"] * 4
    assert all(found[n]["signed"] == "true" for n in PROJECTIONS)
    result = json.loads(Path("whole/result.json").read_text())
    assert list(result["other_weights"]) == ["encoder.pos_embedding"]
    said = qexp("eval", "run=whole", "device=cpu")
    assert said.code == 0
    assert f"{top1(Path('whole')):.2f}" in said.out
    assert qexp("export", "run=whole").code == 0
    trusted = {"torchvision.models.VisionTransformer"}  # built without storage first
    monkeypatch.setattr("qexp.export.header.OURS", trusted)
    for engine in ("float", "integer"):
        packed = qexp("eval", "run=whole", "checkpoint=model.safetensors", f"engine={engine}")
        assert packed.code == 0
        assert f"{top1(Path('whole')):.2f}" in packed.out


def test_a_vit_is_reconstructed_by_its_blocks_and_trained_on(qexp: Qexp, tmp_path: Path) -> None:
    words = (*DATA, *VIT, "bits=2")
    start = save_start(tmp_path / "user.pt")
    said = qexp("train", *words, *PTQ, start, "quantizer=qdrop", "folder=ptq")
    assert said.code == 0, said.err
    units = json.loads(Path("ptq/result.json").read_text())["reconstruction"]["units"]
    blocks = [f"encoder.layers.encoder_layer_{i}" for i in range(2)]
    assert [unit["unit"] for unit in units] == ["conv_proj", *blocks, "heads.head"]
    assert [rows(Path("ptq"))[n]["levels_used"] for n in PROJECTIONS] == ["4"] * 4
    assert qexp("eval", "run=ptq", "device=cpu").code == 0
    still = ("recipe.lr=1e-15", "recipe.weight_decay=0", *QAT, "recipe.epochs=1")
    handed = ("recipe=qat_after_ptq", "quantizer=nearest", "model.checkpoint=ptq", "folder=on")
    said = qexp("train", *words, *handed, *still, "recipe.warmup_epochs=0")
    assert said.code == 0, said.err
    assert "20 quantizers take over" in said.out + said.err
    torch.testing.assert_close(logits(Path("on")), logits(Path("ptq")), **CLOSE)


def test_layerwise_reconstruction_learns_each_projection(qexp: Qexp, tmp_path: Path) -> None:
    words = (*DATA, *VIT, *PTQ, save_start(tmp_path / "user.pt"), "bits=3")
    assert qexp("train", *words, "quantizer=adaround", "folder=ptq").code == 0
    units = json.loads(Path("ptq/result.json").read_text())["reconstruction"]["units"]
    assert set(PROJECTIONS) < {unit["unit"] for unit in units}


def test_a_run_of_before_the_projections_were_layers_is_scored_and_gone_on_with(
    qexp: Qexp, tmp_path: Path
) -> None:
    words = (*DATA, *VIT, *QAT, save_start(tmp_path / "user.pt"), "quantizer=lsq", "bits=3")
    words += ("bitwidth=pattern", "bitwidth.patterns=[{match: '*_proj', weight: 32, act: 32}]")
    words += ("recipe.epochs=2", "recipe.ema=0.5", "bitwidth.first_last=same")
    assert qexp("train", *words, "folder=run").code == 0
    scored = logits(Path("run"))
    state = checkpoint.load(Path("run/last.pt"))
    for part in (state["model"], state["average"]["state"]):
        for name in [n for n in part if ".in_proj." in n]:
            part[name.replace(".in_proj.", ".in_proj_")] = part.pop(name)
    state["bits"] = {n: b for n, b in state["bits"].items() if "self_attention" not in n}
    torch.save(state, "run/last.pt")
    assert torch.equal(logits(Path("run")), scored)
    said = qexp("resume", "run", "recipe.epochs=3")
    assert said.code == 0, said.err
    assert rows(Path("run"))[PROJECTIONS[0]]["w_bits"] == "32"


@pytest.mark.parametrize("bitwidth", ["sensitivity", "pattern"])
def test_policies_give_projections_widths(qexp: Qexp, tmp_path: Path, bitwidth: str) -> None:
    more = {
        "sensitivity": ("bitwidth.budget=3", "bitwidth.images=16"),
        "pattern": ("bitwidth.patterns=[{match: '*.in_proj', weight: 2, act: 4}]",),
    }[bitwidth]
    words = (*DATA, *VIT, *QAT, save_start(tmp_path / "user.pt"), "max_steps=2", "quantizer=lsq")
    said = qexp("train", *words, f"bitwidth={bitwidth}", *more, "bits=3", "folder=run")
    assert said.code == 0, said.err
    widths = [rows(Path("run"))[n]["w_bits"] for n in PROJECTIONS]
    if bitwidth == "pattern":
        assert widths == ["2", "3", "2", "3"]
    else:
        assert all(float(w) < 32 for w in widths)
        assert all(rows(Path("run"))[n]["sensitivity"] for n in PROJECTIONS)


@pytest.mark.parametrize("version", [1, 2])
def test_a_swin_is_packed_and_built_again_without_storage(
    version: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = opened(tiny_swin(version), (3, 32, 32))
    layers, x = trace(model, (3, 32, 32)), torch.randn(4, 3, 32, 32)
    quantize_(model, layers, {layer.name: Bits(8, 8) for layer in layers}, LSQ, LSQ)
    calibrate_(model, x)
    target = f"test_attention.swin_v{version}"
    monkeypatch.setattr("qexp.export.header.OURS", {target})
    data = {"name": "synthetic", "mean": [0.5] * 3, "std": [0.25] * 3}
    packed = pack_network(
        model, target=target, keywords={}, num_classes=4, input_shape=(3, 32, 32), data=data
    )
    for again in (restore(packed), integer_network(packed)):
        with torch.no_grad():
            torch.testing.assert_close(again(x), model(x), atol=1e-5, rtol=1e-5)


def test_a_packed_file_of_before_with_attention_in_float_is_read() -> None:
    model = opened(tiny_vit(), (3, 16, 16)).eval()
    layers, x = trace(model, (3, 16, 16)), torch.randn(4, 3, 16, 16)
    inside = [layer.name for layer in layers if ".mlp." in layer.name]
    quantize_(model, layers, {name: Bits(4, 4) for name in inside}, LSQ, LSQ)
    calibrate_(model, x)
    packed = pack_network(
        model,
        target="test_attention.vit",
        keywords={},
        num_classes=4,
        input_shape=(3, 16, 16),
        data={"name": "synthetic", "mean": [0.5] * 3, "std": [0.25] * 3},
    )
    for name in [n for n in packed.tensors if ".in_proj." in n]:
        packed.tensors[name.replace(".in_proj.", ".in_proj_")] = packed.tensors.pop(name)
    with torch.no_grad():
        assert torch.equal(restore(packed, trust=True)(x), model(x))


def vit(num_classes: int) -> VisionTransformer:
    return tiny_vit()


def swin_v1(num_classes: int) -> SwinTransformer:
    return tiny_swin(1)


def swin_v2(num_classes: int) -> SwinTransformer:
    return tiny_swin(2)
