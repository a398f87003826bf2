"""What a data set is, and data sets whose images are held in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

Key = tuple[int, int]  # (epoch, index)
LARGEST_IN_MEMORY = 64  # pixels a side; a folder of images larger than that is decoded as it is read


CENTRE = 0.875  # of a side
AS_TIMM_SAYS: dict[str, Any] = {"interpolation": "bilinear", "test_input_size": None, "test_crop_pct": None}
SQUASHED = {**AS_TIMM_SAYS, "crop_pct": 1.0, "crop_mode": "squash"}
CENTRED = {**AS_TIMM_SAYS, "crop_pct": CENTRE, "crop_mode": "center"}


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
        prepared: how `val` is made of image files, as timm's pretrained config says it.
    """

    train: Dataset[Any]
    val: Dataset[Any]
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    input_size: tuple[int, int, int]
    prepared: Mapping[str, Any]


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
        self.mean, self.std = mean, std
        self.scale = 1 / (255 * torch.tensor(std).reshape(-1, 1, 1))
        self.shift = -torch.tensor(mean).reshape(-1, 1, 1) / torch.tensor(std).reshape(-1, 1, 1)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        places = self.places(indices)
        return self.normalise(self.pixels[places]), self.labels[places]

    def part(self, indices: list[int]) -> Images:
        """Some of the images."""
        return Images(self.pixels[indices], self.labels[indices], self.mean, self.std)

    def to(self, device: torch.device) -> Images:
        """The same images in a device's memory, where batches are made too."""
        found = Images(self.pixels.to(device), self.labels.to(device), self.mean, self.std)
        found.scale, found.shift = self.scale.to(device), self.shift.to(device)
        return found

    def places(self, indices: list[int]) -> Tensor:
        """Indices where the images are. The copy to a GPU does not wait for what the GPU has to do before it."""
        found, device = torch.tensor(indices), self.pixels.device
        return found.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else found.to(device)

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
            device = self.images.pixels.device
            self.drawn = (epoch, offsets.to(device), mirrored.to(device))
        return self.drawn[1:]

    def __getitems__(self, keys: list[Key]) -> tuple[Tensor, Tensor]:
        places = self.images.places([index for _, index in keys])
        pixels = self.images.pixels[places]
        if self.shift or self.flip:
            epochs = sorted({epoch for epoch, _ in keys})
            mine = self.images.places([epochs.index(epoch) for epoch, _ in keys])
            drawn = [[values[places] for values in self.draws(epoch)] for epoch in epochs]
            here = torch.arange(len(keys), device=places.device)
            offsets, mirrored = (torch.stack(values)[mine, here] for values in zip(*drawn, strict=True))
            pixels = _crop(F.pad(pixels, (self.shift,) * 4), offsets, mirrored, pixels.shape[2:])
        return self.images.normalise(pixels), self.images.labels[places]

    def to(self, device: torch.device) -> Augmented:
        """The same with its images in a device's memory."""
        return Augmented(self.images.to(device), self.shift, self.flip, self.seed)


def _crop(padded: Tensor, offsets: Tensor, mirrored: Tensor, size: Sequence[int]) -> Tensor:
    """A window of each image. padded: [B, C, H', W'], offsets: [B, 2], mirrored: [B] -> [B, C, H, W]."""
    (height, width), device = size, padded.device
    rows = offsets[:, :1] + torch.arange(height, device=device)  # [B, H]
    columns = torch.arange(width, device=device).expand(len(padded), -1)
    columns = offsets[:, 1:] + torch.where(mirrored[:, None], columns.flip(1), columns)  # [B, W]
    image = torch.arange(len(padded), device=device)[:, None, None]
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


def in_memory(
    train: tuple[Tensor, Tensor], val: tuple[Tensor, Tensor], classes: Sequence[str], shift: int, flip: bool, seed: int
) -> Data:
    """A data set from pixels uint8 [N, C, H, W] and labels [N], normalised by the training set's statistics."""
    mean, std = channel_statistics(train[0])
    images = Images(*train, mean, std)
    _, channels, height, width = train[0].shape
    augmented = Augmented(images, shift, flip, seed)
    return Data(augmented, Images(*val, mean, std), tuple(classes), mean, std, (channels, height, width), SQUASHED)
