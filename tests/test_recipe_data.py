"""Data sets of the recipes: order and augmentation that can be entered anywhere, folders, and what is missing."""

import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "train_recipes"))

import data as datasets


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
    images = datasets.Images(pixels, torch.arange(20), (0.5,) * 3, (0.25,) * 3)
    one, other = (datasets.Augmented(images, 2, True, seed=7) for _ in range(2))
    x, y = one.__getitems__([(3, 5), (4, 5), (3, 6)])
    assert y.tolist() == [5, 5, 6]
    assert torch.equal(other.__getitems__([(3, 6)])[0][0], x[2])
    assert not torch.equal(x[0], x[1])


def test_a_crop_is_a_window_of_the_padded_image() -> None:
    pixels = torch.arange(2 * 3 * 4 * 4, dtype=torch.uint8).reshape(2, 3, 4, 4)
    padded = torch.nn.functional.pad(pixels, (1, 1, 1, 1))
    found = datasets._crop(padded, torch.tensor([[0, 2], [1, 1]]), torch.tensor([False, True]), (4, 4))
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
