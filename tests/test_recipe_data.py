"""Data sets of the recipes: order and augmentation that can be entered anywhere, folders, and what is missing."""

import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "train_recipes"))

import data as datasets
import files
import images as in_memory


def test_batches_can_be_entered_anywhere() -> None:
    everything = list(datasets.Batches(50, 8, 0, 20, seed=3))
    assert list(datasets.Batches(50, 8, 11, 20, seed=3)) == everything[11:]
    epochs = [everything[i : i + 6] for i in (0, 6, 12)]
    for number, epoch in enumerate(epochs):
        keys = [key for batch in epoch for key in batch]
        assert {epoch_of for epoch_of, _ in keys} == {number}
        assert len({index for _, index in keys}) == 48, "no image twice"
    assert [k for _, k in epochs[0][0]] != [k for _, k in epochs[1][0]]
    assert list(datasets.Batches(50, 8, 0, 20, seed=4)) != everything
    with pytest.raises(datasets.DataError, match="7 images, too few for one batch of 8"):
        datasets.Batches(7, 8, 0, 1, seed=0)


def test_augmentation_depends_on_seed_epoch_and_index_only() -> None:
    pixels = torch.randint(0, 255, (20, 3, 8, 8), dtype=torch.uint8)
    images = in_memory.Images(pixels, torch.arange(20), (0.5,) * 3, (0.25,) * 3)
    one, other = (in_memory.Augmented(images, 2, True, seed=7) for _ in range(2))
    x, y = one.__getitems__([(3, 5), (4, 5), (3, 6)])
    assert y.tolist() == [5, 5, 6]
    assert torch.equal(other.__getitems__([(3, 6)])[0][0], x[2])
    assert not torch.equal(x[0], x[1])


def test_images_in_a_device_s_memory_make_the_same_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's memory holds no more than a quarter of it; the CPU stands for the GPU here."""
    data = datasets.digits(8, 0)
    assert datasets.on_device(data, torch.device("cpu")) is data
    train: Any = data.train
    keys = [(0, 5), (1, 5), (1, 6)]
    wanted = train.__getitems__(keys)
    moved = train.to(torch.device("cpu"))
    assert moved is not train
    for found, value in zip(moved.__getitems__(keys), wanted, strict=True):
        assert torch.equal(found, value)
    properties = SimpleNamespace(total_memory=4 * 1797 * 3 * 64 - 1)
    monkeypatch.setattr("data.torch.cuda.get_device_properties", lambda device: properties)
    assert datasets.on_device(data, torch.device("cuda")) is data, "too large"


def test_a_crop_is_a_window_of_the_padded_image() -> None:
    pixels = torch.arange(2 * 3 * 4 * 4, dtype=torch.uint8).reshape(2, 3, 4, 4)
    padded = torch.nn.functional.pad(pixels, (1, 1, 1, 1))
    found = in_memory._crop(padded, torch.tensor([[0, 2], [1, 1]]), torch.tensor([False, True]), (4, 4))
    assert torch.equal(found[0], padded[0, :, 0:4, 2:6])
    assert torch.equal(found[1], pixels[1].flip(2))


def test_normalised_images_have_mean_0_and_deviation_1() -> None:
    found = datasets.digits(32, 0)
    train: Any = found.train
    x = train.images.normalise(train.images.pixels)
    assert x.mean((0, 2, 3)).abs().max() < 1e-3
    assert x.std((0, 2, 3)).sub(1).abs().max() < 1e-3
    assert (len(found.train), len(found.val)) == (1257, 540)  # type: ignore[arg-type]
    counts = torch.bincount(train.images.labels)
    assert counts.max() - counts.min() <= 7, "stratified"


def make_folder(root: Path, size: int, classes: tuple[str, ...] = ("cat", "dog"), each: int = 8) -> Path:
    rng = np.random.default_rng(0)
    for part in ("train", "val"):
        for name in classes:
            (root / part / name).mkdir(parents=True)
            for i in range(each):
                pixels = rng.integers(0, 255, (size, size, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{i}.png")
    return root


def test_small_and_large_image_folders(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "images", 40)
    small = datasets.load("folder", root, False, 32, 0)
    train: Any = small.train
    assert train.__getitems__([(0, 0)])[0].shape == (1, 3, 32, 32)
    large = datasets.load("folder", root, False, 96, 0)
    train = large.train
    x, _ = train.__getitems__([(1, 3), (2, 3)])
    assert x.shape == (2, 3, 96, 96)
    assert not torch.equal(x[0], x[1])
    assert torch.equal(train.__getitems__([(1, 3)])[0][0], x[0])
    assert large.classes == ("cat", "dog")
    loader = datasets.val_loader(large, 5, 0)
    assert [len(y) for _, y in loader] == [5, 5, 5, 1]


def test_data_that_is_missing_or_empty(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    for name in ("folder", "cifar10", "cifar100", "svhn"):
        with pytest.raises(datasets.DataError, match=str(gone)):
            datasets.load(name, gone, False, 32, 0)
    (tmp_path / "empty" / "train" / "cat").mkdir(parents=True)
    (tmp_path / "empty" / "val" / "cat").mkdir(parents=True)
    with pytest.raises(datasets.DataError, match="empty/train holds no"):
        datasets.load("folder", tmp_path / "empty", False, 32, 0)
    root = make_folder(tmp_path / "images", 8)
    shutil.rmtree(root / "val" / "dog")
    with pytest.raises(datasets.DataError, match="differ in their classes: dog"):
        datasets.load("folder", root, False, 32, 0)


@pytest.mark.parametrize("size", [32, 96])
def test_a_corrupt_image_is_named(tmp_path: Path, size: int) -> None:
    root = make_folder(tmp_path / "images", 40)
    broken = root / "train" / "cat" / "0.png"
    broken.write_bytes(broken.read_bytes()[:200])

    def read() -> None:
        train: Any = datasets.load("folder", root, False, size, 0).train
        train.__getitems__([(0, 0)])

    with pytest.raises(datasets.DataError, match=r"cat/0\.png is not a whole image"):
        read()


def test_images_as_imagenet_has_them(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "images", 40)
    found = datasets.load("imagenet", root, False, 32, 0)
    assert found.mean == pytest.approx((0.485, 0.456, 0.406)), "whatever the size"
    train: Any = found.train
    assert train.__getitems__([(0, 1)])[0].shape == (1, 3, 32, 32)


def test_a_data_set_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What timm reads is used like a folder; a missing package and a wrong name are one line."""

    class Reader:
        class_to_idx: ClassVar = {"dog": 1, "cat": 0}

    class Part:
        reader = Reader()

        def __len__(self) -> int:
            return 6

        def __getitem__(self, index: int) -> tuple[Image.Image, int]:
            return Image.new("L", (50, 60), index), index % 2

    asked = []

    def create(name: str, root: str, split: str, download: bool) -> Part:
        asked.append((name, root, split, download))
        return Part()

    monkeypatch.setattr(files, "create_dataset", create)
    found = datasets.load("hfds/some/images", tmp_path, True, 32, 0)
    assert asked == [("hfds/some/images", str(tmp_path), split, True) for split in ("train", "validation")]
    assert (found.classes, found.input_size) == (("cat", "dog"), (3, 32, 32))
    train: Any = found.train
    x, y = train.__getitems__([(0, 1), (0, 4)])
    assert x.shape == (2, 3, 32, 32)
    assert y.tolist() == [1, 0]

    def missing(*args: object, **kwargs: object) -> None:
        raise ImportError("datasets")

    monkeypatch.setattr(files, "create_dataset", missing)
    with pytest.raises(datasets.DataError, match="pip install datasets"):
        datasets.load("hfds/some/images", tmp_path, True, 32, 0)


def test_training_images_without_augmentation(tmp_path: Path) -> None:
    digits = datasets.digits(16, 0)
    found = datasets.plain_images(digits, 300)
    assert [len(x) for x in found] == [128, 128, 44]
    train: Any = digits.train
    assert torch.equal(found[0][0], train.images.__getitems__([0])[0][0])
    root = make_folder(tmp_path / "images", 100)
    large = datasets.load("folder", root, False, 96, 0)
    again, once = (torch.cat(datasets.plain_images(large, 50)) for _ in range(2))
    assert again.shape == (16, 3, 96, 96)
    assert torch.equal(again, once)


def test_training_images_are_held_out_in_place_of_the_validation_images() -> None:
    whole = datasets.digits(16, 0)
    found = datasets.hold_out(whole, 200)
    train, val, source = found.train, found.val, whole.train.images  # type: ignore[attr-defined]
    assert (len(train), len(val)) == (1057, 200)  # type: ignore[arg-type]
    both = torch.cat([train.images.pixels, val.pixels]).flatten(1)  # type: ignore[attr-defined]
    assert torch.equal(both.unique(dim=0), source.pixels.flatten(1).unique(dim=0)), "every image is in one of them"
    x, y = val.__getitems__([0, 5])  # type: ignore[attr-defined]
    place = int((source.pixels == val.pixels[5]).flatten(1).all(1).nonzero()[0])  # type: ignore[attr-defined]
    assert torch.equal(x[1], source.__getitems__([place])[0][0]), "normalised alike"
    assert y[1] == source.labels[place]
    other = datasets.hold_out(datasets.digits(16, 7), 200)
    assert torch.equal(other.val.pixels, val.pixels), "the same whatever the seed"  # type: ignore[attr-defined]
    assert found.mean == whole.mean
    for count in (1257, -1):
        with pytest.raises(datasets.DataError, match=f"leave some of the 1257 training images; found {count}"):
            datasets.hold_out(whole, count)


def test_files_are_held_out_too(tmp_path: Path) -> None:
    data = datasets.load("folder", make_folder(tmp_path, 80), False, 80, 0)
    found = datasets.hold_out(data, 5)
    assert (len(found.train), len(found.val)) == (11, 5)  # type: ignore[arg-type]
    names = [str(path) for part in (found.train, found.val) for path, _ in part.files.samples]  # type: ignore[attr-defined]
    assert sorted(names) == sorted(str(path) for path, _ in data.train.files.samples)  # type: ignore[attr-defined]
    x, _ = found.val.__getitems__([0])  # type: ignore[attr-defined]
    assert torch.equal(x, found.val.__getitems__([0])[0]), "not augmented"  # type: ignore[attr-defined]
    x, _ = found.train.__getitems__([(0, 0), (1, 0)])  # type: ignore[attr-defined]
    assert not torch.equal(x[0], x[1]), "augmented"
