"""From files to batches: images, folders of images, and the names of classes."""

import math
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data import ImageNetInfo, create_transform, infer_imagenet_subset, resolve_data_config
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from ..budgets import default_input_size
from ..evaluation import held_out_places
from .errors import BadInput, bad_input, one_line

KEPT_BYTES = 2**28  # of images that are kept in memory where they are needed many times
MODES = {1: "L", 3: "RGB"}  # input channels of a network -> mode of PIL
UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)  # what PIL raises for damaged files


class Preparation:
    """What a network wants done to an image file.

    Attributes:
        input_size: (channels, height, width) of what it gives.
        mean: of each channel, by which it normalises.
        std: likewise.
    """

    def __init__(self, model: Any) -> None:
        """Read the model's config.

        Args:
            model: made by timm.

        Raises:
            BadInput: if its input has neither one nor three channels.
        """
        config = resolve_data_config(pretrained_cfg=model.pretrained_cfg, model=model)
        self.input_size = default_input_size(model)
        if self.input_size[0] not in MODES:
            raise BadInput(f"images have 1 or 3 channels; the model wants {self.input_size[0]}")
        self._open = partial(open_image, mode=MODES[self.input_size[0]])
        self.mean, self.std = tuple(config["mean"]), tuple(config["std"])
        self.transform = create_transform(**{**config, "input_size": self.input_size})

    def open(self, path: str | Path) -> Image.Image:
        """The image in the model's mode.

        Raises:
            BadInput: if it cannot be read.
        """
        return self._open(path)

    def __call__(self, path: str | Path) -> Tensor:
        """The image as the model takes it: [C, H, W]."""
        return self.transform(self.open(path))


def open_image(path: str | Path, mode: str) -> Image.Image:
    """An image file, decoded.

    Raises:
        BadInput: if there is none, or it is damaged.
    """
    if not Path(path).is_file():
        raise BadInput(f"{path}: no such file" if not Path(path).exists() else f"{path}: not a file")
    try:
        with Image.open(path) as image:
            return image.convert(mode)
    except UNREADABLE as error:
        reason = "not an image" if "cannot identify" in str(error) else one_line(error)
        raise BadInput(f"{path}: cannot be read as an image ({reason})") from error


def class_names(model: Any) -> list[str] | None:
    """Names of a model's classes, from its config or ImageNet's; None if they are not known."""
    given = model.pretrained_cfg.get("label_names")
    if isinstance(given, dict):  # class, as JSON writes it -> name
        given = [given.get(str(i), given.get(i, f"class {i}")) for i in range(model.num_classes)]
    if given and len(given) == model.num_classes:
        described = model.pretrained_cfg.get("label_descriptions") or {}
        return [str(described.get(name, name)) for name in given]
    subset = infer_imagenet_subset(model)
    return ImageNetInfo(subset).label_descriptions() if subset else None


# Folders -------------------------------------------------------------------------------------------------------------


class Folder(ImageFolder):
    """An image folder whose unreadable images have the class -1 - (their place), so that workers can tell of them."""

    def __init__(self, root: Path, prepare: Preparation) -> None:
        self.prepare = prepare
        with bad_input(FileNotFoundError):
            super().__init__(str(root))

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, target = self.samples[index]
        try:
            return self.prepare(path), target
        except BadInput:
            return torch.zeros(self.prepare.input_size), -1 - index


def find_split(data: Path, split: str | None) -> Path:
    """The folder that holds a folder for each class: `data/split`, or `data` itself.

    Args:
        data: what the user gave.
        split: its part; None: "val" if there is one, else `data` itself.

    Raises:
        BadInput: if there is no such folder.
    """
    if not data.is_dir():
        raise BadInput(f"no folder {data}: --data must hold a folder for each class, or {split or 'val'}/ that does")
    inside = data / (split or "val")
    if inside.is_dir() and any(path.is_dir() for path in inside.iterdir()):
        return inside
    if split is not None:
        raise BadInput(f"no folder with classes {inside}: check --split")
    if not any(path.is_dir() for path in data.iterdir()):
        raise BadInput(f"{data} holds no folders: one for each class is needed, or val/ with one for each class")
    return data


def open_folder(root: Path, model: nn.Module, prepare: Preparation) -> Folder:
    """The images under a folder.

    Raises:
        BadInput: if a class has no images, or the number of classes is not the model's.
    """
    folder = Folder(root, prepare)
    wanted = getattr(model, "num_classes", 0)
    if len(folder.classes) != wanted:
        raise BadInput(f"{root} has {len(folder.classes)} classes; the model knows {wanted}")
    return folder


def open_held_out(data: Path, model: nn.Module, prepare: Preparation, count: int) -> tuple[Folder, list[int]]:
    """The images under `data/train`, and the places of those that a recipe's --holdout keeps out of training.

    Raises:
        BadInput: if there are no such images, or not more than `count`.
    """
    root = data / "train"
    if not root.is_dir():
        raise BadInput(f"no folder {root}: the images that are held out are some of DATA/train")
    folder = open_folder(root, model, prepare)
    with bad_input():
        return folder, held_out_places(len(folder), count)


def batches(
    folder: Folder, batch_size: int, workers: int, places: Sequence[int] | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Images [B, C, H, W] and classes [B], in the order of the files, or those at some places in their order.

    Raises:
        BadInput: at an image that cannot be read.
    """
    for x, y in DataLoader(folder, batch_size, sampler=places, num_workers=workers):
        if bool((y < 0).any()):
            folder.prepare.open(folder.samples[-1 - int(y.min())][0])
        yield x, y


class Batches:
    """`batches` that can be gone through again and again; few enough images are kept in memory."""

    def __init__(self, folder: Folder, batch_size: int, workers: int, places: Sequence[int]) -> None:
        self.read = partial(batches, folder, batch_size, workers, places)
        self.small = len(places) * 4 * math.prod(folder.prepare.input_size) <= KEPT_BYTES
        self.kept: list[tuple[Tensor, Tensor]] = []

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self.small and not self.kept:
            self.kept = list(self.read())
        return iter(self.kept) if self.small else self.read()
