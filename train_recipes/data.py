"""Data sets of the recipes.

What an image looks like in training depends only on (seed, epoch, index), and the order of an epoch only on (seed,
epoch): training can start again at any step and meet the same batches.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.transforms.v2.functional import resize

from files import Folder, Part, folder, hub
from images import Augmented, Data, DataError, Key, in_memory
from timm_dynamic.evaluation import held_out_places

DATASETS = ("digits", "cifar10", "cifar100", "svhn", "imagenet", "folder", "hfds/NAME")


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
    return in_memory((pixels[train], labels[train]), (pixels[val], labels[val]), names, 2, False, seed)


def _torchvision(make: Callable[[], Any], data_dir: Path) -> Any:
    """A torchvision data set, or an error that says where it was looked for."""
    try:
        return make()
    except RuntimeError as error:
        raise DataError(f"{data_dir.resolve()}: {error} Give --download to fetch it, or another --data-dir") from error


def _scaled(pixels: Tensor, size: int) -> Tensor:
    """uint8 [N, 3, H, W] -> [N, 3, size, size], as PIL scales them."""
    return pixels if pixels.shape[-1] == size else resize(pixels, [size, size], antialias=True)


def cifar(name: str, data_dir: Path, download: bool, size: int, seed: int) -> Data:
    """CIFAR-10 or CIFAR-100, with crops from a padding of an eighth of a side, and mirroring."""
    kind = torchvision.datasets.CIFAR10 if name == "cifar10" else torchvision.datasets.CIFAR100
    train, val = (
        _torchvision(functools.partial(kind, str(data_dir), train=part, download=download), data_dir)
        for part in (True, False)
    )

    def tensors(part: Any) -> tuple[Tensor, Tensor]:
        pixels = torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous()
        return _scaled(pixels, size), torch.tensor(part.targets)

    return in_memory(tensors(train), tensors(val), train.classes, size // 8, True, seed)


def svhn(data_dir: Path, download: bool, size: int, seed: int) -> Data:
    """SVHN with its extra set, not augmented (SkipNet, section 4.1)."""

    def load(split: str) -> tuple[Tensor, Tensor]:
        make = functools.partial(torchvision.datasets.SVHN, str(data_dir), split=split, download=download)
        part = _torchvision(make, data_dir)
        return _scaled(torch.from_numpy(part.data), size), torch.from_numpy(part.labels).long()

    parts = [load("train"), load("extra")]
    train = torch.cat([pixels for pixels, _ in parts]), torch.cat([labels for _, labels in parts])
    return in_memory(train, load("test"), [str(digit) for digit in range(10)], 0, False, seed)


def load(name: str, data_dir: Path, download: bool, image_size: int, seed: int) -> Data:
    """A data set by name.

    Args:
        name: one of ``DATASETS``.
        data_dir: where it is; not needed for the digits.
        download: whether torchvision may fetch it.
        image_size: pixels a side that the network wants.
        seed: of the augmentation.

    Raises:
        DataError: if there is nothing to train on; the message names the folder.
    """
    if name == "digits":
        return digits(image_size, seed)
    if name in ("cifar10", "cifar100"):
        return cifar(name, data_dir, download, image_size, seed)
    if name == "svhn":
        return svhn(data_dir, download, image_size, seed)
    if name in ("folder", "imagenet"):
        return folder(data_dir, image_size, seed, large=name == "imagenet")
    if name.startswith("hfds/"):
        return hub(name, data_dir, image_size, download, seed)
    raise DataError(f"--dataset must be one of {', '.join(DATASETS)}; found {name!r}")


def hold_out(data: Data, count: int) -> Data:
    """The same data with so many training images, drawn once and for all, in place of the validation images.

    Thresholds and checkpoints can be chosen on them, and the validation images be looked at once, at the end.

    Raises:
        DataError: if no image would be left to train on.
    """
    train: Any = data.train
    if not 0 < count < len(train):
        raise DataError(f"--holdout must leave some of the {len(train)} training images; found {count}")
    held = held_out_places(len(train), count)
    kept = sorted(set(range(len(train))) - set(held))
    if isinstance(train, Folder):
        val: Any = data.val
        rest: Dataset[Any] = Folder(Part(train.files, kept), train.transform, train.seed)
        return replace(data, train=rest, val=Folder(Part(train.files, held), val.transform, None))
    rest = Augmented(train.images.part(kept), train.shift, train.flip, train.seed)
    return replace(data, train=rest, val=train.images.part(held))


SHARE = 4  # of a GPU's memory that images may take: one in so many bytes


def on_device(data: Data, device: torch.device) -> Data:
    """The same data with images that are held in memory moved to a GPU's, where they fit: batches are made there."""
    train: Any = data.train
    if device.type != "cuda" or not isinstance(train, Augmented):
        return data
    val: Any = data.val
    wanted = train.images.pixels.nbytes + val.pixels.nbytes
    if wanted * SHARE > torch.cuda.get_device_properties(device).total_memory:
        return data
    return replace(data, train=train.to(device), val=val.to(device))


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


def plain_images(data: Data, count: int, batch_size: int = 128) -> list[Tensor]:
    """Batches [B, C, H, W] of up to so many training images, from all over the set, not augmented."""
    train: Any = data.train
    val: Any = data.val
    source = Folder(train.files, val.transform, None) if isinstance(train, Folder) else train.images
    places = np.linspace(0, len(train) - 1, min(count, len(train))).astype(int).tolist()
    parts = [places[start : start + batch_size] for start in range(0, len(places), batch_size)]
    return [source.__getitems__(part)[0] for part in parts]


def _workers(data: Data, wanted: int | None) -> int:
    train: Any = data.train
    if not isinstance(train, Folder) and train.images.pixels.device.type == "cuda":
        return 0  # what is in a GPU's memory has no use for other processes
    return wanted if wanted is not None else (4 if isinstance(train, Folder) else 0)
