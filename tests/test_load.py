"""Loading float weights: strict, all or nothing, and readable when it fails."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor, nn

from qexp.errors import CheckpointError
from qexp.models.digest import network_sha256
from qexp.models.load import check_weights, load_state, load_weights
from qexp.models.resnet import ResNet
from qexp.recipes.optimize import WeightAverage

DATA = Path(__file__).parent.parent / "data"


def copy_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def fails(model: nn.Module, path: Path | str) -> str:
    before = copy_of(model)
    with pytest.raises(CheckpointError) as error:
        load_state(model, path)
    assert "\n" not in str(error.value)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), "a failed load must leave the model alone"
    return str(error.value)


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_state_dict_loads_bare_or_wrapped(tmp_path: Path, wrapper: str | None, prefix: str) -> None:
    source, target = ResNet(8, 10), ResNet(8, 10)
    state = {prefix + name: value for name, value in source.state_dict().items()}
    path = tmp_path / "model.pt"
    torch.save({wrapper: state, "epoch": 3} if wrapper else state, path)
    digest = load_state(target, path)
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    for name, value in source.state_dict().items():
        assert torch.equal(value, target.state_dict()[name])


def test_a_runs_checkpoint_is_known_by_its_network_and_any_other_file_by_its_bytes(
    tmp_path: Path,
) -> None:
    state = ResNet(8, 10).state_dict()
    run = {"model": state, "bits": {}, "start": {"source": None}}
    path, other = tmp_path / "last.pt", tmp_path / "best.pt"
    torch.save({**run, "train_s": 1.0, "average": None}, path)
    torch.save({**run, "train_s": 2.0, "model": dict(reversed(state.items()))}, other)
    digest = load_state(ResNet(8, 10), path)
    assert digest == network_sha256(state) == load_state(ResNet(8, 10), other)
    name = next(iter(state))
    moved = {**state, name: state[name] + 1}
    torch.save({**run, "model": moved}, path)
    assert load_state(ResNet(8, 10), path) != digest
    torch.save({**run, "average": {"state": moved}}, other)  # what is loaded of it
    assert load_state(ResNet(8, 10), other) == network_sha256(moved)
    torch.save({"state_dict": state}, path)
    assert load_state(ResNet(8, 10), path) == hashlib.sha256(path.read_bytes()).hexdigest()


def test_safetensors_load_and_are_known_by_their_tensors(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    source, target = ResNet(8, 10), ResNet(8, 10)
    path = tmp_path / "float.safetensors"
    save_file(source.state_dict(), path, metadata={"by": "somebody"})
    assert load_state(target, path) == network_sha256(source.state_dict())
    for name, value in source.state_dict().items():
        assert torch.equal(value, target.state_dict()[name])
    save_file(source.state_dict(), path, metadata={"qexp": "{}"})
    assert f"{path} is a packed network. Give the last.pt of" in fails(ResNet(8, 10), path)
    path.write_bytes(path.read_bytes()[:2000])
    said = fails(ResNet(8, 10), path)
    assert f"{path} is truncated or not a safetensors file" in said
    assert said.endswith("Write it with safetensors.torch.save_file(model.state_dict(), path).")


class Wrap(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Sequential(nn.Linear(2, 2), nn.InstanceNorm1d(2, track_running_stats=True))


def test_a_prefix_that_is_the_networks_own_stays_and_counters_may_lack(tmp_path: Path) -> None:
    state = Wrap().state_dict()
    counters = [name for name in state if name.endswith("num_batches_tracked")]
    assert counters
    for name in counters:
        del state[name]
    torch.save(state, tmp_path / "x.pt")
    target = Wrap()
    load_state(target, tmp_path / "x.pt")
    assert torch.equal(target.module[0].weight, state["module.0.weight"])


def test_densenets_published_names_load(tmp_path: Path) -> None:
    source, target = (torchvision.models.densenet121(num_classes=3) for _ in range(2))
    old = re.compile(r"(denselayer\d+\.(?:norm|conv))([12])")
    state = {old.sub(r"\1.\2", name): value for name, value in source.state_dict().items()}
    assert "features.denseblock1.denselayer1.norm.1.weight" in state
    torch.save(state, tmp_path / "x.pt")
    load_state(target, tmp_path / "x.pt")
    for name, value in source.state_dict().items():
        assert torch.equal(value, target.state_dict()[name])


def test_names_types_and_shapes_are_part_of_a_networks_hash() -> None:
    zeros = torch.zeros(2, 2)
    states = [{"a": zeros}, {"b": zeros}, {"a": zeros.view(4)}, {"a": zeros.bfloat16()},
              {"a": zeros, "b": torch.tensor(1)}]  # fmt: skip
    assert len({network_sha256(state) for state in states}) == len(states)
    x = torch.randn(2, 3, 4, 4)
    last = x.to(memory_format=torch.channels_last)
    assert network_sha256({"a": x}) == network_sha256({"a": last})


def test_batch_norm_counters_may_be_absent(tmp_path: Path) -> None:
    state = {k: v for k, v in ResNet(8, 10).state_dict().items() if "num_batches" not in k}
    torch.save(state, tmp_path / "old.pt")
    target = ResNet(8, 10)
    load_state(target, tmp_path / "old.pt")
    for name, value in state.items():
        assert torch.equal(value, target.state_dict()[name])


def test_a_module_that_insists_on_its_version_loads(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, other = (torchvision.models.mnasnet0_5(num_classes=3) for _ in range(2))
    torch.save(model.state_dict(), tmp_path / "x.pt")
    load_state(other, tmp_path / "x.pt")
    average = WeightAverage(model, 0.5)
    with average.applied(other):
        pass
    for key, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]), key


@pytest.mark.skipif(not (DATA / "checkpoints").is_dir(), reason="needs data/checkpoints")
@pytest.mark.parametrize("depth", [20, 32, 56])
def test_published_checkpoint_loads_strictly(depth: int) -> None:
    model, path = ResNet(depth, 10), DATA / "checkpoints" / f"cifar10_resnet{depth}_akamaster.pt"
    state = torch.load(path, weights_only=True)
    load_state(model, path)
    loaded = {k: v for k, v in model.state_dict().items() if "num_batches" not in k}
    assert loaded.keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in loaded.items())


def test_other_class_count_is_named(tmp_path: Path) -> None:
    torch.save(ResNet(8, 10).state_dict(), tmp_path / "ten.pt")
    assert "checkpoint has 10 classes, dataset has 100" in fails(
        ResNet(8, 100), tmp_path / "ten.pt"
    )


def test_checkpoint_of_another_depth_lists_counts_and_three_keys(tmp_path: Path) -> None:
    torch.save(ResNet(20, 10).state_dict(), tmp_path / "deep.pt")
    message = fails(ResNet(8, 10), tmp_path / "deep.pt")
    extra = len(ResNet(20, 10).state_dict()) - len(ResNet(8, 10).state_dict())
    assert f"{extra} unexpected (layer1.1.conv1.weight, " in message
    assert message.count("layer") == 3
    torch.save(ResNet(8, 10).state_dict(), tmp_path / "shallow.pt")
    assert "missing (layer1.1.conv1.weight" in fails(ResNet(20, 10), tmp_path / "shallow.pt")


def test_other_shapes_are_listed(tmp_path: Path) -> None:
    torch.save(ResNet(8, 10, in_channels=3).state_dict(), tmp_path / "rgb.pt")
    message = fails(ResNet(8, 10, in_channels=1), tmp_path / "rgb.pt")
    assert "1 of wrong shape (conv1.weight [16, 3, 3, 3] not [16, 1, 3, 3])" in message


def test_truncated_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "cut.pt"
    torch.save(ResNet(8, 10).state_dict(), path)
    path.write_bytes(path.read_bytes()[:2000])
    assert f"checkpoint: {path} is truncated or not a PyTorch state dict" in fails(
        ResNet(8, 10), path
    )


@pytest.mark.parametrize("content", [b"", b"hello", b"\x80\x04K\x01."])
def test_file_that_is_no_checkpoint_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.pt").write_bytes(content)
    assert "truncated or not" in fails(ResNet(8, 10), tmp_path / "x.pt")


@pytest.mark.parametrize("content", [[1, 2], {}, {"epoch": 3}, {"model": {"a": 1}}, {1: 2}])
def test_file_without_tensors_is_named(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "x.pt")
    assert "holds no state dict" in fails(ResNet(8, 10), tmp_path / "x.pt")


def test_pickled_objects_are_refused(tmp_path: Path) -> None:
    torch.save(ResNet(8, 10), tmp_path / "whole.pt")
    assert "torch.save(model.state_dict(), path)" in fails(ResNet(8, 10), tmp_path / "whole.pt")


def test_missing_file_suggests_a_sibling(tmp_path: Path) -> None:
    (tmp_path / "cifar10_resnet20.pt").touch()
    message = fails(ResNet(8, 10), tmp_path / "cifar10_resnet2.pt")
    assert message.endswith("not found. Did you mean 'cifar10_resnet20.pt'?")
    assert "there is no folder" in fails(ResNet(8, 10), tmp_path / "no" / "x.pt")
    assert "is a folder" in fails(ResNet(8, 10), tmp_path)


RESNET18 = "torchvision.models.resnet18"


def weights_fail(target: str, name: str) -> str:
    with pytest.raises(CheckpointError) as error:
        load_weights(nn.Linear(1, 1), target, name)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_weights_name_needs_a_torchvision_model() -> None:
    message = weights_fail("qexp.models.resnet.ResNet", "IMAGENET1K_V1")
    assert "ResNet has no torchvision weights 'IMAGENET1K_V1'" in message


def test_unknown_weights_name_lists_the_known() -> None:
    message = weights_fail(RESNET18, "IMAGENET1K_V9")
    assert "has: DEFAULT, IMAGENET1K_V1" in message
    assert "Did you mean 'IMAGENET1K_V1'?" in message


def test_weights_that_cannot_be_fetched_say_where_to_put_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("network is unreachable")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    message = weights_fail(RESNET18, "IMAGENET1K_V1")
    assert "network is unreachable" in message
    assert f"Download it to {tmp_path}/checkpoints/resnet18-f37072fd.pth" in message


@pytest.mark.parametrize("name", ["IMAGENET1K_V1", "DEFAULT", "ResNet18_Weights.IMAGENET1K_V1"])
def test_weights_in_the_hub_cache_load_without_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    source, target = nn.Linear(2, 2), nn.Linear(2, 2)
    torch.save(source.state_dict(), tmp_path / "checkpoints" / "resnet18-f37072fd.pth")
    load_weights(target, RESNET18, name)
    assert torch.equal(source.weight, target.weight)


def test_heads_that_a_network_is_built_without_are_left_in_the_file(tmp_path: Path) -> None:
    def google(aux_logits: bool) -> nn.Module:
        return torchvision.models.googlenet(
            num_classes=3, aux_logits=aux_logits, init_weights=False
        )

    whole, bare = google(True), google(False)
    torch.save(whole.state_dict(), tmp_path / "float.pt")
    load_state(bare, tmp_path / "float.pt")
    kept = copy_of(whole)
    assert all(torch.equal(value, kept[name]) for name, value in bare.state_dict().items())
    torch.save(bare.state_dict(), tmp_path / "bare.pt")
    assert "18 missing (aux1.conv.conv.weight, " in fails(whole, tmp_path / "bare.pt")
    torch.save({**bare.state_dict(), "aux3.weight": torch.ones(1)}, tmp_path / "more.pt")
    assert "1 unexpected (aux3.weight)" in fails(bare, tmp_path / "more.pt")


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_published_weights_that_scale_images_anew_need_a_network_that_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    target = f"torchvision.models.{name}"
    build = getattr(torchvision.models, name)
    with pytest.raises(CheckpointError, match=r"\+model\.transform_input=true"):
        check_weights(build(init_weights=False), target, "IMAGENET1K_V1")
    check_weights(build(init_weights=False, transform_input=True), target, "IMAGENET1K_V1")
