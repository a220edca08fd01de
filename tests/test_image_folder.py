"""Image folders: the pixels depend on seeds only, and broken folders are named."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from compose import tiny
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from qexp.data.folder import Folder, ImageNet
from qexp.errors import ConfigError, DataError
from qexp.recipes import build
from qexp.recipes.same_images import check_images, images_of, replaced_images

CONFIGS = Path(__file__).parent.parent / "configs"

# Python 3.12 warns at every fork of a process with threads, which any import of torch makes.
pytestmark = pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")


def write_folder(root: Path, per_class: int = 6, classes: tuple[str, ...] = ("cat", "dog")) -> Path:
    g = torch.Generator().manual_seed(0)
    for part in ("train", "val"):
        for name in classes:
            (root / part / name).mkdir(parents=True)
            for i in range(per_class):
                pixels = torch.randint(0, 256, (24, 30, 3), generator=g, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(root / part / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("images"))


def folder(root: Path, **changes: Any) -> Folder:
    fixed: dict[str, Any] = dict(
        name="imagefolder", root=str(root), crop=8, resize=12, workers=0, batch_size=4
    )
    return Folder(**(fixed | changes))


def pixels(batches: Any) -> Tensor:
    return torch.cat([x for x, _ in batches])


def test_imagefolder_config_opens_a_folder(root: Path) -> None:
    node: Any = OmegaConf.load(CONFIGS / "dataset" / "imagefolder.yaml")
    node.root = str(root)
    data = instantiate(node, _convert_="all", batch_size=4)
    assert (data.num_classes, data.input_shape, data.train_size) == (2, (3, 224, 224), 12)
    assert data.steps_per_epoch == 3
    assert data.protocol()["test_images"] == 12


def test_imagenet_config_counts_a_thousand_classes(root: Path) -> None:
    node: Any = OmegaConf.load(CONFIGS / "dataset" / "imagenet.yaml")
    with pytest.raises(DataError, match=r"2 classes under .*, dataset.classes=1000"):
        ImageNet(**{k: v for k, v in node.items() if k not in ("_target_", "root")}, root=str(root))
    assert ImageNet.card.num_classes == node.classes
    assert ImageNet.card.input_shape == (3, node.crop, node.crop)


def test_number_of_workers_does_not_change_a_pixel(root: Path) -> None:
    here, there = folder(root, workers=0), folder(root, workers=2)
    assert torch.equal(pixels(here.train_batches(1)), pixels(there.train_batches(1)))
    assert torch.equal(pixels(here.eval_batches("test")), pixels(there.eval_batches("test")))


def test_decoding_leaves_the_global_random_stream_alone(root: Path) -> None:
    state = torch.get_rng_state()
    list(folder(root).train_batches(0))
    assert torch.equal(state, torch.get_rng_state())


def test_epochs_differ_and_resume_equals_the_uninterrupted_epoch(root: Path) -> None:
    data = folder(root)
    first = pixels(data.train_batches(0))
    assert first.shape == (12, 3, 8, 8)
    assert not torch.equal(first, pixels(data.train_batches(1)))
    assert torch.equal(first[4:], pixels(folder(root).train_batches(0, start=1)))


def test_processes_partition_an_epoch(root: Path) -> None:
    one = pixels(folder(root, batch_size=4).train_batches(0))
    shares = [
        pixels(folder(root, batch_size=2, rank=r, world_size=2).train_batches(0)) for r in (0, 1)
    ]
    merged = torch.stack([s.reshape(3, 2, 3, 8, 8) for s in shares], dim=1).reshape(one.shape)
    assert torch.equal(one, merged)


def test_evaluation_is_resize_and_central_crop_of_every_image(root: Path) -> None:
    data = folder(root)
    cut = v2.Compose([v2.Resize(12), v2.CenterCrop(8), v2.PILToTensor()])
    files = sorted((root / "val").glob("*/*.png"))
    mean, std = torch.tensor(data.mean), torch.tensor(data.std)
    expected = torch.stack(
        [v2.Normalize(mean, std)(cut(Image.open(f)).float() / 255) for f in files]
    )
    torch.testing.assert_close(pixels(data.eval_batches("test")), expected)


def test_calibration_images_are_training_images_cut_as_for_evaluation(root: Path) -> None:
    data = folder(root)
    every = {tuple(x.flatten().tolist()) for x in pixels(data.eval_batches("train"))}
    chosen = data.calibration_images(7, seed=0)
    assert len({tuple(x.flatten().tolist()) for x in chosen} & every) == 7
    assert torch.equal(chosen, folder(root, seed=3).calibration_images(7, seed=0))


def test_augmented_calibration_images_are_those_of_trainings_first_epoch(root: Path) -> None:
    data = folder(root)
    every = {tuple(x.flatten().tolist()) for x in pixels(data.train_batches(0))}
    plain, cut = (data.calibration_images(7, 0, augment=augment) for augment in (False, True))
    assert len({tuple(x.flatten().tolist()) for x in cut} & every) == 7
    assert not torch.equal(plain, cut)


def test_hold_out_comes_from_train_and_is_disjoint_from_it(root: Path) -> None:
    data = folder(root, val_fraction=0.5)
    val, train = pixels(data.eval_batches("val")), pixels(data.eval_batches("train"))
    assert (len(val), len(train), data.train_size) == (6, 6, 6)
    assert len(torch.cat([val, train]).unique(dim=0)) == 12


def test_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"imagefolder not found under .*: no folder 'train'"):
        folder(tmp_path)
    (tmp_path / "train").mkdir()
    with pytest.raises(DataError, match="train' is empty: it needs one folder of images per cl"):
        folder(tmp_path)


def test_class_without_images_is_named(tmp_path: Path) -> None:
    write_folder(tmp_path, per_class=1)
    (tmp_path / "train" / "emu").mkdir()
    with pytest.raises(DataError, match=r"class 'emu' has no images in '.*train'"):
        folder(tmp_path)


def test_different_class_lists_are_named(tmp_path: Path) -> None:
    write_folder(tmp_path, per_class=1)
    (tmp_path / "val" / "dog").rename(tmp_path / "val" / "dogs")
    with pytest.raises(DataError, match=r"'dog' is only in train/ \(2 differ\)"):
        folder(tmp_path)


def test_wrong_number_of_classes_is_named(root: Path) -> None:
    with pytest.raises(DataError, match=r"2 classes under .*, dataset.classes=1000"):
        folder(root, classes=1000)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("damage", ["text", "truncated"])
def test_unreadable_image_is_named_without_a_traceback(
    tmp_path: Path, workers: int, damage: str
) -> None:
    write_folder(tmp_path, per_class=2)
    victim = tmp_path / "train" / "dog" / "1.png"
    victim.write_bytes(b"not an image" if damage == "text" else victim.read_bytes()[:300])
    with pytest.raises(DataError) as error:
        list(folder(tmp_path, workers=workers).train_batches(0))
    assert str(error.value).startswith(f"data: {victim} cannot be read as an image (")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"crop": 16}, "dataset.crop=16 is not between 1 and dataset.resize=12"),
        ({"min_area": 0}, r"dataset.min_area=0 is not in \(0, 1\]"),
        ({"workers": -1}, "dataset.workers=-1 is negative"),
        ({"mean": [0.5]}, "dataset.mean must have 3 values"),
    ],
)
def test_wrong_value_is_one_line(root: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        folder(root, **changes)


def test_the_protocol_tells_folders_apart_by_what_is_in_them(root: Path, tmp_path: Path) -> None:
    def contents(place: Path) -> str:
        return folder(place).protocol()["contents"]

    assert contents(root) == contents(write_folder(tmp_path / "copy"))
    fewer, other = tmp_path / "fewer", tmp_path / "other"
    write_folder(fewer, per_class=5)
    write_folder(other, classes=("cat", "cow"))
    smaller = write_folder(tmp_path / "smaller")  # the same names, scaled
    for path in (smaller / "val").rglob("*.png"):
        Image.open(path).resize((7, 7)).save(path)
    assert len({contents(place) for place in (root, fewer, other, smaller)}) == 4


@pytest.mark.parametrize("dtype", ["uint16", "int32", "float32"])
def test_an_image_of_more_than_8_bits_is_refused_not_cut_off(tmp_path: Path, dtype: str) -> None:
    write_folder(tmp_path, per_class=2)
    deep = tmp_path / "train" / "dog" / "1.png"
    ramp = np.arange(40 * 40, dtype=dtype).reshape(40, 40)
    Image.fromarray(ramp).save(deep, format="TIFF")
    with pytest.raises(DataError, match=r"mode (I|F).*: more than 8 bits a channel"):
        list(folder(tmp_path).train_batches(0))


def test_more_processes_than_images_leave_some_without(tmp_path: Path) -> None:
    write_folder(tmp_path)
    for path in (tmp_path / "val").rglob("[1-9].png"):
        path.unlink()
    sets = [folder(tmp_path, batch_size=1, rank=r, world_size=4) for r in range(4)]
    assert [sum(len(y) for _, y in one.eval_batches("test")) for one in sets] == [1, 1, 0, 0]


def test_labels_are_those_of_the_folders_the_images_are_in(root: Path) -> None:
    data = folder(root)
    x, y = data.labelled_images(12, seed=0)
    own = {
        tuple(image.flatten().tolist()): int(label)
        for images, labels in data.eval_batches("train")
        for image, label in zip(images, labels, strict=True)
    }
    assert [own[tuple(image.flatten().tolist())] for image in x] == y.tolist()


def test_training_cuts_as_large_a_part_as_told_and_mirrors_only_if_told(root: Path) -> None:
    for flip, area in ((True, 0.5), (False, 0.25)):
        crop, mirror, _ = folder(root, flip=flip, min_area=area)._random.transforms  # type: ignore[attr-defined]
        assert tuple(crop.scale) == (area, 1.0)
        assert mirror.p == 0.5 * flip


PHOTOS = ("dataset=imagefolder", "dataset.crop=8", "dataset.resize=8", "dataset.workers=0")


def test_a_done_run_of_other_images_is_not_done(tmp_path: Path) -> None:
    write_folder(tmp_path / "photos", per_class=2)
    words = (*PHOTOS, f"dataset.root={tmp_path / 'photos'}", "recipe.batch_size=2")
    cfg = tiny(tmp_path, *words, base=())
    told = {"contents": build.make_dataset(cfg, torch.device("cpu")).protocol()["contents"]}
    assert replaced_images(cfg, told) == replaced_images(cfg, {}) == ""
    next((tmp_path / "photos" / "val").glob("*/*")).unlink()
    assert replaced_images(cfg, told) == "dataset=imagefolder"
    cfg.dataset.root = str(tmp_path / "nowhere")
    assert replaced_images(cfg, told) == ""


def test_a_run_does_not_go_on_with_more_images_or_fewer(tmp_path: Path) -> None:
    class Run:
        said: ClassVar[list[str]] = []

        def warn(self, text: str) -> None:
            self.said.append(text)

    root = write_folder(tmp_path / "photos", per_class=3)
    begun = {"images": images_of(folder(root))}
    check_images(folder(root), begun, Run())  # type: ignore[arg-type]
    check_images(folder(root), {}, Run())  # type: ignore[arg-type]  # of an earlier version
    assert Run.said == []
    next((root / "val").glob("*/*")).unlink()
    check_images(folder(root), begun, Run())  # type: ignore[arg-type]
    assert "the images have changed since the run began" in Run.said[0]
    next((root / "train").glob("*/*")).unlink()
    with pytest.raises(ConfigError, match="there are 5 training images, the run began with 6"):
        check_images(folder(root), begun, Run())  # type: ignore[arg-type]
