"""Data sets of the recipes.

What an image looks like in training depends only on (seed, epoch, index), and the order of an epoch only on (seed,
epoch): training can start again at any step and meet the same batches.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate
from torchvision.transforms import v2

Key = tuple[int, int]  # (epoch, index)
DATASETS = ("digits", "cifar10", "cifar100", "svhn", "folder")
LARGEST_IN_MEMORY = 64  # pixels a side; a folder of images larger than that is decoded as it is read


class DataError(Exception):
    """A data set that is missing or empty."""


@dataclass(frozen=True)
class Data:
    """A data set ready for training.

    Attributes:
        train: gives a whole batch (x [B, C, H, W], y [B]) for a list of (epoch, index).
        val: the same for a list of indices.
        classes: names of the classes.
        mean: of each channel, on a scale of 0..1.
        std: of each channel.
        input_size: (channels, height, width).
    """

    train: Dataset[Any]
    val: Dataset[Any]
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    input_size: tuple[int, int, int]


class Batches(Sampler[list[Key]]):
    """Training batches ``start`` to ``stop`` of a stage, epoch after epoch, each shuffled by (seed, epoch).

    Args:
        images: size of the training set.
        batch_size: images of a batch; the incomplete batch that ends an epoch is left out.
        start: first batch.
        stop: the batch after the last.
        seed: of the order.
        first_epoch: number of the epoch that batch 0 belongs to.
    """

    drop_last = True

    def __init__(self, images: int, batch_size: int, start: int, stop: int, seed: int, first_epoch: int = 0):
        if images < batch_size:
            raise DataError(f"the training set has {images} images, too few for one batch of {batch_size}")
        self.images = images
        self.batch_size = batch_size
        self.start = start
        self.stop = stop
        self.seed = seed
        self.first_epoch = first_epoch

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[Key]]:
        per_epoch = self.images // self.batch_size
        order, order_of = np.empty(0, dtype=np.int64), -1
        for batch in range(self.start, self.stop):
            epoch, position = divmod(batch, per_epoch)
            if epoch != order_of:
                order_of = epoch
                order = np.random.default_rng([self.seed, self.first_epoch + epoch]).permutation(self.images)
            chosen = order[position * self.batch_size : (position + 1) * self.batch_size]
            yield [(self.first_epoch + epoch, int(index)) for index in chosen]


# Small images, held in memory ----------------------------------------------------------------------------------------


class Images(Dataset[Any]):
    """Images held in memory, not augmented.

    Args:
        pixels: uint8 [N, C, H, W].
        labels: int64 [N].
        mean: of each channel.
        std: of each channel.
    """

    def __init__(self, pixels: Tensor, labels: Tensor, mean: Sequence[float], std: Sequence[float]):
        self.pixels = pixels
        self.labels = labels
        self.scale = 1 / (255 * torch.tensor(std).reshape(-1, 1, 1))
        self.shift = -torch.tensor(mean).reshape(-1, 1, 1) / torch.tensor(std).reshape(-1, 1, 1)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        return self.normalise(self.pixels[indices]), self.labels[indices]

    def normalise(self, pixels: Tensor) -> Tensor:
        """uint8 [B, C, H, W] -> float, channels-last in memory."""
        return (pixels * self.scale + self.shift).contiguous(memory_format=torch.channels_last)


class Augmented(Dataset[Any]):
    """Training images from memory, shifted by up to ``shift`` pixels and mirrored at random.

    Args:
        images: the images.
        shift: largest shift; the border is filled with black (a crop from the padded image).
        flip: whether to mirror every second image.
        seed: of the random numbers.
    """

    def __init__(self, images: Images, shift: int, flip: bool, seed: int):
        self.images = images
        self.shift = shift
        self.flip = flip
        self.seed = seed
        self.drawn: tuple[int, Tensor, Tensor] = (-1, torch.empty(0), torch.empty(0))

    def __len__(self) -> int:
        return len(self.images)

    def draws(self, epoch: int) -> tuple[Tensor, Tensor]:
        """For every image of an epoch: offsets [N, 2] in 0..2 * shift, and whether it is mirrored [N]."""
        if self.drawn[0] != epoch:
            rng = np.random.default_rng([self.seed, epoch, 1])
            offsets = torch.from_numpy(rng.integers(0, 2 * self.shift + 1, size=(len(self), 2)))
            mirrored = torch.from_numpy(rng.random(len(self)) < (0.5 if self.flip else 0.0))
            self.drawn = (epoch, offsets, mirrored)
        return self.drawn[1:]

    def __getitems__(self, keys: list[Key]) -> tuple[Tensor, Tensor]:
        indices = [index for _, index in keys]
        pixels = self.images.pixels[indices]
        if self.shift or self.flip:
            epochs = {epoch: self.draws(epoch) for epoch in sorted({epoch for epoch, _ in keys})}
            offsets = torch.stack([epochs[epoch][0][index] for epoch, index in keys])
            mirrored = torch.stack([epochs[epoch][1][index] for epoch, index in keys])
            pixels = _crop(F.pad(pixels, (self.shift,) * 4), offsets, mirrored, pixels.shape[2:])
        return self.images.normalise(pixels), self.images.labels[indices]


def _crop(padded: Tensor, offsets: Tensor, mirrored: Tensor, size: Sequence[int]) -> Tensor:
    """A window of each image. padded: [B, C, H', W'], offsets: [B, 2], mirrored: [B] -> [B, C, H, W]."""
    height, width = size
    rows = offsets[:, :1] + torch.arange(height)  # [B, H]
    columns = torch.arange(width).expand(len(padded), -1)
    columns = offsets[:, 1:] + torch.where(mirrored[:, None], columns.flip(1), columns)  # [B, W]
    image = torch.arange(len(padded))[:, None, None]
    cropped = padded.permute(0, 2, 3, 1)[image, rows[:, :, None], columns[:, None, :]]  # [B, H, W, C]
    return cropped.permute(0, 3, 1, 2)


def channel_statistics(pixels: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of each channel on a scale of 0..1, to four digits. pixels: uint8 [N, C, H, W]."""
    values = torch.arange(256, dtype=torch.float64) / 255
    means, deviations = [], []
    for channel in range(pixels.shape[1]):
        counts = sum(torch.bincount(part.flatten(), minlength=256) for part in pixels[:, channel].split(10_000))
        share = torch.as_tensor(counts).double() / torch.as_tensor(counts).sum()
        mean = (share * values).sum()
        means.append(round(mean.item(), 4))
        deviations.append(round((share * (values - mean) ** 2).sum().sqrt().item(), 4))
    return tuple(means), tuple(deviations)


def _in_memory(
    train: tuple[Tensor, Tensor], val: tuple[Tensor, Tensor], classes: Sequence[str], shift: int, flip: bool, seed: int
) -> Data:
    mean, std = channel_statistics(train[0])
    images = Images(*train, mean, std)
    _, channels, height, width = train[0].shape
    augmented = Augmented(images, shift, flip, seed)
    return Data(augmented, Images(*val, mean, std), tuple(classes), mean, std, (channels, height, width))


# The data sets -------------------------------------------------------------------------------------------------------


def digits(size: int, seed: int) -> Data:
    """scikit-learn's 1,797 handwritten digits, scaled from 8 x 8; a fixed stratified 70 % of each class trains."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    pixels = torch.from_numpy(bunch.images / 16).float().unsqueeze(1)
    pixels = F.interpolate(pixels, size=(size, size), mode="bilinear", align_corners=False)
    pixels = (pixels * 255).round().to(torch.uint8).expand(-1, 3, -1, -1).contiguous()
    labels = torch.from_numpy(bunch.target).long()
    places = torch.arange(len(labels))
    train, val = (torch.as_tensor(p) for p in train_test_split(places, test_size=0.3, random_state=0, stratify=labels))
    names = [str(name) for name in bunch.target_names]
    return _in_memory((pixels[train], labels[train]), (pixels[val], labels[val]), names, 2, False, seed)


def _torchvision(make: Callable[[], Any], data_dir: Path) -> Any:
    """A torchvision data set, or an error that says where it was looked for."""
    try:
        return make()
    except RuntimeError as error:
        raise DataError(f"{data_dir.resolve()}: {error} Give --download to fetch it, or another --data-dir") from error


def cifar(name: str, data_dir: Path, download: bool, seed: int) -> Data:
    """CIFAR-10 or CIFAR-100, with pad-4 crops and mirroring."""
    kind = torchvision.datasets.CIFAR10 if name == "cifar10" else torchvision.datasets.CIFAR100
    train, val = (
        _torchvision(functools.partial(kind, str(data_dir), train=part, download=download), data_dir)
        for part in (True, False)
    )

    def tensors(part: Any) -> tuple[Tensor, Tensor]:
        return torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets)

    return _in_memory(tensors(train), tensors(val), train.classes, 4, True, seed)


def svhn(data_dir: Path, download: bool, seed: int) -> Data:
    """SVHN with its extra set, not augmented (SkipNet, section 4.1)."""

    def load(split: str) -> tuple[Tensor, Tensor]:
        make = functools.partial(torchvision.datasets.SVHN, str(data_dir), split=split, download=download)
        part = _torchvision(make, data_dir)
        return torch.from_numpy(part.data), torch.from_numpy(part.labels).long()

    parts = [load("train"), load("extra")]
    train = torch.cat([pixels for pixels, _ in parts]), torch.cat([labels for _, labels in parts])
    return _in_memory(train, load("test"), [str(digit) for digit in range(10)], 0, False, seed)


class Folder(Dataset[Any]):
    """Images read from files, the random part of their transform seeded by (seed, epoch, index).

    Args:
        files: an image folder without a transform.
        transform: from a PIL image to a tensor.
        seed: of the transform; None for one without randomness, which is asked for by index alone.
    """

    def __init__(self, files: torchvision.datasets.ImageFolder, transform: Callable[[Any], Tensor], seed: int | None):
        self.files = files
        self.transform = transform
        self.seed = seed

    def __len__(self) -> int:
        return len(self.files)

    def __getitems__(self, keys: list[Any]) -> Any:
        return default_collate([self._get(key) for key in keys])

    def _get(self, key: Any) -> tuple[Tensor, int]:
        if self.seed is None:
            image, label = self.files[key]
            return self.transform(image), label
        epoch, index = key
        image, label = self.files[index]
        state = np.random.SeedSequence([self.seed, epoch, index]).generate_state(1)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(state[0]))
            return self.transform(image), label


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
        image = files[i][0]
        image = image if image.size == (size, size) else image.resize((size, size))
        pixels[i] = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    return pixels, torch.tensor(files.targets)


def folder(data_dir: Path, size: int, seed: int) -> Data:
    """A folder of images: ``train/CLASS/*`` and ``val/CLASS/*``.

    Images for a network of up to 64 pixels a side are treated as CIFAR is, larger ones as ImageNet is.
    """
    train, val = _image_folder(data_dir / "train"), _image_folder(data_dir / "val")
    if train.classes != val.classes:
        odd = sorted(set(train.classes) ^ set(val.classes))
        raise DataError(f"{data_dir.resolve()}: train and val differ in their classes: {', '.join(odd[:5])}")
    if size <= LARGEST_IN_MEMORY:
        return _in_memory(_decoded(train, size), _decoded(val, size), train.classes, size // 8, True, seed)
    normalise = v2.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    finish = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), normalise]
    crop = v2.Compose([v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(), *finish])
    centre = v2.Compose([v2.Resize(round(size / 0.875)), v2.CenterCrop(size), *finish])
    return Data(
        Folder(train, crop, seed),
        Folder(val, centre, None),
        tuple(train.classes),
        IMAGENET_DEFAULT_MEAN,
        IMAGENET_DEFAULT_STD,
        (3, size, size),
    )


def load(name: str, data_dir: Path, download: bool, image_size: int, seed: int) -> Data:
    """A data set by name.

    Args:
        name: one of ``DATASETS``.
        data_dir: where it is; not needed for the digits.
        download: whether torchvision may fetch it.
        image_size: pixels a side that the network wants; CIFAR and SVHN come in their own.
        seed: of the augmentation.

    Raises:
        DataError: if there is nothing to train on; the message names the folder.
    """
    if name == "digits":
        return digits(image_size, seed)
    if name in ("cifar10", "cifar100"):
        return cifar(name, data_dir, download, seed)
    if name == "svhn":
        return svhn(data_dir, download, seed)
    if name == "folder":
        return folder(data_dir, image_size, seed)
    raise DataError(f"--dataset must be one of {', '.join(DATASETS)}; found {name!r}")


# Loaders -------------------------------------------------------------------------------------------------------------


def _ready(batch: Any) -> Any:
    """The data sets above give whole batches."""
    return batch


def train_loader(data: Data, batches: Batches, workers: int | None) -> DataLoader[Any]:
    """A loader of training batches."""
    return DataLoader(data.train, batch_sampler=batches, num_workers=_workers(data, workers), collate_fn=_ready)


def val_loader(data: Data, batch_size: int, workers: int | None) -> DataLoader[Any]:
    """A loader of the validation images, in order."""
    return DataLoader(data.val, batch_size=batch_size, num_workers=_workers(data, workers), collate_fn=_ready)


def _workers(data: Data, wanted: int | None) -> int:
    return wanted if wanted is not None else (4 if isinstance(data.train, Folder) else 0)
