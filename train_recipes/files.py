"""Data sets read from files, or by timm: what an image looks like depends only on (seed, epoch, index)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from PIL import Image
from timm.data import create_dataset
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torch.utils.data import Dataset, default_collate
from torchvision.transforms import v2

from images import CENTRE, CENTRED, LARGEST_IN_MEMORY, Data, DataError, in_memory


class Folder(Dataset[Any]):
    """Images read from files, the random part of their transform seeded by (seed, epoch, index).

    Args:
        files: gives a PIL image and a class for an index.
        transform: from a PIL image to a tensor.
        seed: of the transform; None for one without randomness, which is asked for by index alone.
    """

    def __init__(self, files: Any, transform: Callable[[Any], Tensor], seed: int | None):
        self.files = files
        self.transform = transform
        self.seed = seed

    def __len__(self) -> int:
        return len(self.files)

    def __getitems__(self, keys: list[Any]) -> Any:
        return default_collate([self._get(key) for key in keys])

    def _get(self, key: Any) -> tuple[Tensor, int]:
        epoch, index = (0, key) if self.seed is None else key
        try:
            image, label = self.files[index]
        except (OSError, SyntaxError) as error:
            raise DataError(f"{self._name(index)} is not a whole image: {error}") from error
        if self.seed is None:
            return self.transform(image), label
        state = np.random.SeedSequence([self.seed, epoch, index]).generate_state(1)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(state[0]))
            return self.transform(image), label

    def _name(self, index: int) -> str:
        """What to call an image in an error."""
        samples = getattr(self.files, "samples", None)
        return str(samples[index][0]) if samples is not None else f"image {index}"


class Part:
    """Some of the images of a data set: gives a PIL image and a class for an index."""

    def __init__(self, files: Any, places: Sequence[int]):
        self.files = files
        self.places = places
        if hasattr(files, "samples"):
            self.samples = [files.samples[place] for place in places]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Any:
        return self.files[self.places[index]]


def _image_folder(root: Path) -> torchvision.datasets.ImageFolder:
    if not root.is_dir():
        raise DataError(f"no folder {root.resolve()}: --data-dir must hold train/CLASS/*.jpg and val/CLASS/*.jpg")
    try:
        return torchvision.datasets.ImageFolder(str(root))
    except FileNotFoundError as error:
        raise DataError(f"{root.resolve()} holds no classes with images: {error}") from error


def _decoded(files: torchvision.datasets.ImageFolder, size: int) -> tuple[Tensor, Tensor]:
    """All images of a folder as uint8 [N, 3, size, size], and their classes."""
    pixels = torch.empty(len(files), 3, size, size, dtype=torch.uint8)
    for i in range(len(files)):
        try:
            image = files[i][0]
        except (OSError, SyntaxError) as error:
            raise DataError(f"{files.samples[i][0]} is not a whole image: {error}") from error
        image = image if image.size == (size, size) else image.resize((size, size), Image.Resampling.BILINEAR)
        pixels[i] = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    return pixels, torch.tensor(files.targets)


def folder(data_dir: Path, size: int, seed: int, large: bool = False) -> Data:
    """A folder of images: ``train/CLASS/*`` and ``val/CLASS/*``.

    Images for a network of up to 64 pixels a side are treated as CIFAR is, larger ones as ImageNet is.

    Args:
        data_dir: holds train and val.
        size: pixels a side.
        seed: of the augmentation.
        large: treat images as ImageNet's whatever their size.
    """
    train, val = _image_folder(data_dir / "train"), _image_folder(data_dir / "val")
    if train.classes != val.classes:
        odd = sorted(set(train.classes) ^ set(val.classes))
        raise DataError(f"{data_dir.resolve()}: train and val differ in their classes: {', '.join(odd[:5])}")
    if size <= LARGEST_IN_MEMORY and not large:
        return in_memory(_decoded(train, size), _decoded(val, size), train.classes, size // 8, True, seed)
    return _as_imagenet(train, val, train.classes, size, seed)


def hub(name: str, data_dir: Path, size: int, download: bool, seed: int) -> Data:
    """A data set of the Hugging Face Hub, read by timm; images are treated as ImageNet's.

    Args:
        name: as timm wants it, such as ``hfds/ILSVRC/imagenet-1k``.
        data_dir: where it is cached.
        size: pixels a side.
        download: whether it may be fetched.
        seed: of the augmentation.
    """
    try:
        parts = [create_dataset(name, str(data_dir), split=s, download=download) for s in ("train", "validation")]
    except ImportError as error:
        raise DataError(f"--dataset {name} is read by the package 'datasets': pip install datasets") from error
    except (OSError, RuntimeError, ValueError, AssertionError) as error:
        raise DataError(f"--dataset {name} cannot be read from {data_dir.resolve()}: {error}") from error
    found = parts[0].reader.class_to_idx
    if not found:
        raise DataError(f"--dataset {name} has no names of classes")
    classes = [str(key) for key, _ in sorted(found.items(), key=lambda item: item[1])]
    return _as_imagenet(parts[0], parts[1], classes, size, seed)


def _as_imagenet(train: Any, val: Any, classes: Sequence[str], size: int, seed: int) -> Data:
    """Random resized crops, mirrored at random; the centre of what is a little larger for validation."""
    normalise = v2.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    finish = [v2.RGB(), v2.ToImage(), v2.ToDtype(torch.float32, scale=True), normalise]
    crop = v2.Compose([v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(), *finish])
    centre = v2.Compose([v2.Resize(int(size / CENTRE)), v2.CenterCrop(size), *finish])
    return Data(
        Folder(train, crop, seed),
        Folder(val, centre, None),
        tuple(classes),
        IMAGENET_DEFAULT_MEAN,
        IMAGENET_DEFAULT_STD,
        (3, size, size),
        CENTRED,
    )
