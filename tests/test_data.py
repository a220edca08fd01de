"""Small images in memory: order, augmentation, splits, and what a user hears when data is wrong."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from torch import Tensor
from torchvision import datasets, transforms
from torchvision.transforms import v2

from qexp.data.augment import crop_flip, draw_crops, normalise, pad_images
from qexp.data.cifar import CIFAR10
from qexp.data.fashion import FashionMini, FashionMNIST
from qexp.data.memory import Images, InMemory, contents
from qexp.data.sampling import derive_seed, split_train, stratified_order
from qexp.data.synthetic import Synthetic
from qexp.errors import ConfigError, DataError, QexpError

CONFIGS = Path(__file__).parent.parent / "configs"
DATA = Path(__file__).parent.parent / "data"


def synthetic(**changes: Any) -> Synthetic:
    fixed: dict[str, Any] = dict(
        name="synthetic",
        mean=[0.5] * 3,
        std=[0.25] * 3,
        pad=2,
        flip=True,
        batch_size=16,
        image_size=8,
        classes=5,
        train_images=100,
        test_images=50,
    )
    return Synthetic(**(fixed | changes))


def assert_same(a: list[tuple[Tensor, Tensor]], b: list[tuple[Tensor, Tensor]]) -> None:
    assert len(a) == len(b) > 0
    for (x1, y1), (x2, y2) in zip(a, b, strict=True):
        assert torch.equal(x1, x2)
        assert torch.equal(y1, y2)


# ---------------------------------------------------------------------------------------------
# Order


def test_epoch_is_a_function_of_seed_and_epoch_alone() -> None:
    first, second = synthetic(), synthetic()
    list(first.train_batches(0))
    torch.manual_seed(5)  # neither earlier epochs nor the global stream matter
    assert_same(list(first.train_batches(3)), list(second.train_batches(3)))
    other_epoch, other_seed = next(first.train_batches(4)), next(synthetic(seed=1).train_batches(3))
    assert not torch.equal(next(first.train_batches(3))[0], other_epoch[0])
    assert not torch.equal(next(first.train_batches(3))[0], other_seed[0])


def test_training_leaves_the_global_random_stream_alone() -> None:
    state = torch.get_rng_state()
    data = synthetic()
    list(data.train_batches(0))
    data.calibration_images(4, seed=0)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("start", [0, 1, 5])
def test_resume_at_a_step_equals_the_uninterrupted_epoch(start: int) -> None:
    whole = list(synthetic().train_batches(2))
    assert len(whole) == synthetic().steps_per_epoch == 6
    assert_same(whole[start:], list(synthetic().train_batches(2, start)))


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_partition_each_step_of_one_process(world_size: int) -> None:
    one = list(synthetic(batch_size=12).train_batches(1))
    shares = [
        list(synthetic(batch_size=12 // world_size, rank=r, world_size=world_size).train_batches(1))
        for r in range(world_size)
    ]
    merged = [
        (torch.cat([x for x, _ in step]), torch.cat([y for _, y in step]))
        for step in zip(*shares, strict=True)
    ]
    assert_same(one, merged)


def test_processes_evaluate_every_image_once() -> None:
    whole = torch.cat([x for x, _ in synthetic().eval_batches("test")])
    shares = [
        torch.cat([x for x, _ in synthetic(rank=r, world_size=3).eval_batches("test")])
        for r in range(3)
    ]
    assert [len(s) for s in shares] == [17, 17, 16]
    for rank, share in enumerate(shares):
        assert torch.equal(share, whole[rank::3])


def test_incomplete_batch_is_dropped_and_a_small_set_is_one_batch() -> None:
    assert [len(y) for _, y in synthetic().train_batches(0)] == [16] * 6
    assert [len(y) for _, y in synthetic(batch_size=512).train_batches(0)] == [100]


def test_seed_plus_epoch_do_not_collide() -> None:
    seeds = {derive_seed("order", seed, epoch) for seed in range(30) for epoch in range(30)}
    assert len(seeds) == 900
    assert derive_seed("order", 0, 0) == 6413763137694573220  # as ever: runs must repeat


# ---------------------------------------------------------------------------------------------
# Augmentation and normalisation


def test_crop_and_flip_are_exact_on_a_hand_made_image() -> None:
    image = torch.tensor([[[[1, 2], [3, 4]]]], dtype=torch.uint8)
    padded = pad_images(image, 1)
    index = torch.zeros(4, dtype=torch.int64)
    crops = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 0, 0], [2, 1, 1]])
    y = crop_flip(padded, index, crops, 2, 2)
    expected = [[[1, 2], [3, 4]], [[2, 1], [4, 3]], [[0, 0], [0, 1]], [[4, 3], [0, 0]]]
    assert y[:, 0].tolist() == expected


@given(st.integers(0, 2**31), st.integers(0, 3), st.booleans())
@settings(deadline=None, max_examples=20)
def test_crop_and_flip_equal_torchvision_image_by_image(seed: int, pad: int, flip: bool) -> None:
    images = torch.arange(6 * 2 * 5 * 7).reshape(6, 2, 5, 7).to(torch.uint8)
    index = torch.tensor([3, 0, 5])
    crops = draw_crops(3, pad, flip, seed, epoch=0)
    y = crop_flip(pad_images(images, pad), index, crops, 5, 7)
    for i, (top, left, mirrored) in enumerate(crops.tolist()):
        x = v2.functional.crop(v2.functional.pad(images[index[i]], [pad]), top, left, 5, 7)
        assert torch.equal(y[i], v2.functional.horizontal_flip(x) if mirrored else x)


def test_each_image_has_its_own_crop_and_every_offset_occurs() -> None:
    crops = draw_crops(5000, pad=2, flip=True, seed=0, epoch=0)
    assert [sorted(set(column.tolist())) for column in crops.T] == [[*range(5)]] * 2 + [[0, 1]]
    assert len(crops[:128].unique(dim=0)) > 20
    assert abs(crops[:, 2].float().mean() - 0.5) < 0.05
    assert draw_crops(100, pad=0, flip=False, seed=0, epoch=0).abs().max() == 0


def test_normalise_equals_torchvision_bit_for_bit() -> None:
    images = torch.randint(0, 256, (4, 3, 5, 5), dtype=torch.uint8)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    to_tensor = transforms.Compose([transforms.ToTensor(), transforms.Normalize(mean, std)])
    reference = torch.stack([to_tensor(i.permute(1, 2, 0).numpy()) for i in images])
    ours = normalise(images, torch.tensor(mean)[:, None, None], torch.tensor(std)[:, None, None])
    assert torch.equal(ours, reference)


def test_evaluation_and_calibration_images_are_not_augmented() -> None:
    data = synthetic()
    images = data.read()
    mean, std = torch.full((3, 1, 1), 0.5), torch.full((3, 1, 1), 0.25)
    for split, expected in (("test", images.test_images), ("train", images.train_images)):
        seen = torch.cat([x for x, _ in data.eval_batches(split)])
        assert torch.equal(seen, normalise(expected, mean, std))
    every = {tuple(x.flatten().tolist()) for x in normalise(images.train_images, mean, std)}
    chosen = data.calibration_images(20, seed=3)
    assert {tuple(x.flatten().tolist()) for x in chosen} <= every
    assert len(chosen.unique(dim=0)) == 20
    assert torch.equal(chosen, synthetic(seed=9, rank=1, world_size=2).calibration_images(20, 3))
    assert not torch.equal(chosen, data.calibration_images(20, seed=4))
    x, y = data.labelled_images(20, seed=3)
    assert torch.equal(x, chosen)
    assert y.shape == (20,)


def test_calibration_images_are_cropped_and_mirrored_when_asked() -> None:
    data = synthetic()
    plain, seen = (data.calibration_images(20, 3, augment=augment) for augment in (False, True))
    assert torch.equal(
        seen, synthetic(seed=9, rank=1, world_size=2).calibration_images(20, 3, augment=True)
    )
    black = normalise(torch.zeros(1, 3, 1, 1, dtype=torch.uint8), data._mean, data._std)
    size, pad = plain.shape[-1], data.pad
    padded = black.expand(20, 3, size + 2 * pad, size + 2 * pad).clone()
    padded[:, :, pad : pad + size, pad : pad + size] = plain
    windows = padded.unfold(2, size, 1).unfold(3, size, 1).flatten(2, 3)  # [20, 3, W, H, W]
    both = torch.cat([windows, windows.flip(-1)], 2)
    found = (both == seen[:, :, None]).all(dim=(1, 3, 4))  # [20, crops]
    assert bool(found.any(1).all())
    assert len({int(row.int().argmax()) for row in found}) > 5


# ---------------------------------------------------------------------------------------------
# Splits


@given(st.lists(st.integers(0, 4), min_size=1, max_size=200), st.integers(1, 50))
@settings(deadline=None, max_examples=30)
def test_every_prefix_of_the_stratified_order_has_classes_in_proportion(
    labels: list[int], size: int
) -> None:
    y = torch.tensor(labels)
    order = stratified_order(y)
    assert order.sort().values.tolist() == list(range(len(labels)))
    size = min(size, len(labels))
    share = torch.bincount(y[order[:size]], minlength=5) - torch.bincount(y, minlength=5) * (
        size / len(labels)
    )
    assert share.abs().max() < 2.5


def test_a_class_of_one_stands_in_the_middle_of_the_order() -> None:
    labels = torch.tensor([0] * 9 + [1])
    place = stratified_order(labels).tolist().index(9)
    assert 4 <= place <= 5


def test_the_hold_out_is_the_nearest_whole_number_of_images() -> None:
    labels = torch.zeros(99, dtype=torch.int64)
    assert [len(split_train(labels, share, None)[1]) for share in (0.1, 0.014, 0.016)] == [10, 1, 2]


def test_hold_out_is_disjoint_stratified_and_the_same_for_every_seed() -> None:
    labels = torch.arange(100) % 5
    train, val = split_train(labels, 0.2, None)
    assert sorted([*train.tolist(), *val.tolist()]) == list(range(100))
    assert torch.bincount(labels[val]).tolist() == [4] * 5
    first, second = synthetic(val_fraction=0.2), synthetic(val_fraction=0.2, seed=7)
    assert first.has_val
    assert not synthetic().has_val
    assert first.train_size == 80
    assert_same(list(first.eval_batches("val")), list(second.eval_batches("val")))


def test_subset_is_stratified_and_does_not_touch_the_hold_out() -> None:
    labels = torch.arange(100) % 5
    _, val = split_train(labels, 0.2, None)
    train, same = split_train(labels, 0.2, 30)
    assert torch.equal(val, same)
    assert not set(train.tolist()) & set(val.tolist())
    assert torch.bincount(labels[train]).tolist() == [6] * 5


# ---------------------------------------------------------------------------------------------
# The sets


def test_fashion_mini_ships_with_its_own_mean_and_std() -> None:
    node = OmegaConf.load(CONFIGS / "dataset" / "fashion_mini.yaml")
    data = instantiate(node, _convert_="all", device=torch.device("cpu"), batch_size=128, seed=0)
    assert isinstance(data, FashionMini)
    assert (data.train_size, data.num_classes, data.input_shape) == (8000, 10, (1, 28, 28))
    images = data.read()
    pixels = images.train_images.double() / 255
    assert node.mean == [round(float(pixels.mean()), 5)]
    assert node.std == [round(float(pixels.std(correction=0)), 5)]
    assert torch.bincount(images.train_labels).tolist() == [800] * 10
    assert torch.bincount(images.test_labels).tolist() == [200] * 10
    assert data.protocol()["train_images"] == 8000


def test_synthetic_is_the_same_every_time_and_learnable_by_nearest_mean() -> None:
    images, again = synthetic().read(), synthetic(seed=4).read()
    assert torch.equal(images.train_images, again.train_images)
    train, test = images.train_images.float().flatten(1), images.test_images.float().flatten(1)
    means = torch.stack([train[images.train_labels == c].mean(0) for c in range(5)])
    predicted = torch.cdist(test, means).argmin(1)
    assert (predicted == images.test_labels).float().mean() > 0.99


@pytest.mark.skipif(not (DATA / "cifar-10-batches-py").is_dir(), reason="needs data/ (CIFAR-10)")
@pytest.mark.slow
def test_cifar10_is_read_as_torchvision_reads_it() -> None:
    node: Any = OmegaConf.load(CONFIGS / "dataset" / "cifar10.yaml")
    node.root = str(DATA)
    data = instantiate(node, _convert_="all")
    assert (data.num_classes, data.input_shape, data.train_size) == CIFAR10.card
    reference = datasets.CIFAR10(str(DATA), train=False)
    image, label = reference[7]
    x, y = next(data.eval_batches("test"))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    assert torch.equal(x[7:8], normalise(pixels, data._mean, data._std))
    assert y[7] == label


def write_batches(folder: Path, classes: int) -> None:
    """A data set in the format of CIFAR's python version, with random pixels."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    key = "labels" if classes == 10 else "fine_labels"
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    for name in names if classes == 10 else ["train", "test"]:
        pixels = rng.integers(0, 256, (classes, 3072), dtype=np.uint8)
        (folder / name).write_bytes(pickle.dumps({"data": pixels, key: list(range(classes))}))
    meta, key = ("batches.meta", "label_names") if classes == 10 else ("meta", "fine_label_names")
    (folder / meta).write_bytes(pickle.dumps({key: [str(c) for c in range(classes)]}))


def accept_any_hash(monkeypatch: pytest.MonkeyPatch, kind: Any) -> None:
    monkeypatch.setattr(kind, "_check_integrity", lambda self: True)
    monkeypatch.setattr(kind, "meta", kind.meta | {"md5": None})


@pytest.mark.parametrize(("name", "classes", "size"), [("cifar10", 10, 50), ("cifar100", 100, 100)])
def test_cifar_configs_read_files_in_its_format(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, classes: int, size: int
) -> None:
    node: Any = OmegaConf.load(CONFIGS / "dataset" / f"{name}.yaml")
    kind = getattr(datasets, name.upper())
    write_batches(tmp_path / kind.base_folder, classes)
    accept_any_hash(monkeypatch, kind)
    node.root = str(tmp_path)
    data = instantiate(node, _convert_="all", batch_size=10)
    assert (data.train_size, data.num_classes, data.input_shape) == (size, classes, (3, 32, 32))
    assert next(data.train_batches(0))[0].shape == (10, 3, 32, 32)


# ---------------------------------------------------------------------------------------------
# Errors: one line each, with what to type


def cifar(root: Path | str, **changes: Any) -> CIFAR10:
    fixed: dict[str, Any] = dict(
        name="cifar10", root=str(root), mean=[0.5] * 3, std=[1] * 3, pad=4, flip=True
    )
    return CIFAR10(**(fixed | changes))


def test_missing_cifar10_says_what_to_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError) as error:
        cifar("data")
    assert str(error.value) == (
        "data: CIFAR-10 not found under 'data'. Set dataset.root=..., or dataset.download=true, "
        "or use dataset=fashion_mini."
    )


def test_truncated_cifar10_is_called_damaged(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    write_batches(folder, 10)
    with pytest.raises(DataError, match=r"CIFAR-10 under .* is incomplete or damaged"):
        cifar(tmp_path)


def test_truncated_pickle_does_not_escape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    write_batches(folder, 10)
    batch = folder / "data_batch_3"
    batch.write_bytes(batch.read_bytes()[:100])
    accept_any_hash(monkeypatch, datasets.CIFAR10)
    with pytest.raises(DataError, match=r"incomplete or damaged .*truncated") as error:
        cifar(tmp_path)
    assert "\n" not in str(error.value)


def test_failed_download_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: object) -> None:
        raise OSError("network is unreachable")

    monkeypatch.setattr(datasets.CIFAR10, "download", refuse)
    with pytest.raises(DataError, match=r"cannot be downloaded into .*network is unreachable"):
        cifar(tmp_path, download=True)


def test_missing_fashion_mnist_says_what_to_type(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"Fashion-MNIST not found under .*dataset.download=true"):
        FashionMNIST(
            name="fashion_mnist", root=str(tmp_path), mean=[0.3], std=[0.3], pad=2, flip=True
        )


@dataclass(kw_only=True)
class Own(InMemory):
    """A data set of one's own: `root` says nothing of what is in it."""

    fill: int
    dtype: torch.dtype = torch.uint8

    def read(self) -> Images:
        images = torch.full((20, 3, 4, 4), self.fill, dtype=self.dtype)
        labels = torch.arange(20) % 2
        return Images(images, labels, images, labels)


def test_a_data_set_of_ones_own_is_known_by_its_pixels() -> None:
    fixed: dict[str, Any] = dict(name="own", mean=[0.5] * 3, std=[0.25] * 3, pad=0, flip=False)
    fixed["batch_size"] = 10
    told = [Own(**fixed, fill=n).protocol()["contents"] for n in (1, 1, 2)]
    assert told[0] == told[1] != told[2]
    assert "contents" not in synthetic().protocol()  # its settings say all
    with pytest.raises(DataError, match=r"uint8 \[N, C, H, W\].*; got float32 \[20, 3, 4, 4\]"):
        Own(**fixed, fill=1, dtype=torch.float32)


def empty_split(data: InMemory) -> object:
    return next(data.eval_batches("val"))


WRONG: list[tuple[dict[str, Any], Callable[[Synthetic], object] | None, type[QexpError], str]] = [
    ({"val_fraction": 1.0}, None, ConfigError, r"val_fraction=1.0 is not in \[0, 1\)"),
    ({"val_fraction": -0.1}, None, ConfigError, "val_fraction=-0.1 is not in"),
    ({"val_fraction": 0.999}, None, ConfigError, "val_fraction=0.999 holds out all"),
    ({"subset": 0}, None, ConfigError, "subset=0 is not a positive integer"),
    ({"subset": 101}, None, ConfigError, "100 training images are left, dataset.subset=101"),
    ({"batch_size": 0}, None, ConfigError, "batch size of 0 is not a positive integer"),
    ({"batch_size": 60, "world_size": 2}, None, ConfigError, "do not fill one batch of 60"),
    ({"pad": -1}, None, ConfigError, "dataset.pad=-1 is not a whole number"),
    ({"mean": [0.5]}, None, ConfigError, "dataset.mean must have 3 values"),
    ({"std": [1, 0, 1]}, None, ConfigError, "dataset.std must be positive"),
    ({"classes": 0}, None, ConfigError, "dataset.classes=0 is not a positive integer"),
    ({"train_images": 4}, None, ConfigError, "less than one image for each of 5 classes"),
    ({}, lambda d: d.calibration_images(101, 0), ConfigError, "101 calibration images asked"),
    ({}, empty_split, ConfigError, r"no split 'val' \(has: test, train\). Use split=test, or"),
]


@pytest.mark.parametrize(("changes", "act", "kind", "message"), WRONG)
def test_wrong_value_is_one_line(
    changes: dict[str, Any],
    act: Callable[[Synthetic], object] | None,
    kind: type[QexpError],
    message: str,
) -> None:
    with pytest.raises(kind) as error:
        (act or id)(synthetic(**changes))
    assert re.search(message, str(error.value)), str(error.value)
    assert "\n" not in str(error.value)


def test_labels_are_those_of_the_images_they_come_with() -> None:
    data = synthetic()
    x, y = data.labelled_images(100, seed=3)
    own = {
        tuple(image.flatten().tolist()): int(label)
        for images, labels in data.eval_batches("train")
        for image, label in zip(images, labels, strict=True)
    }
    assert [own[tuple(image.flatten().tolist())] for image in x] == y.tolist()


def test_every_part_of_a_data_set_of_ones_own_is_in_its_digest() -> None:
    def digest(changed: int | None) -> str:
        parts = [torch.zeros(4, 3, 2, 2, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64)] * 2
        if changed is not None:
            parts[changed] = parts[changed] + 1
        return contents(Images(*parts))

    assert len({digest(part) for part in (None, 0, 1, 2, 3)}) == 5
