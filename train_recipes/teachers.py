"""Trained networks that others learn from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from images import Data
from options import Settings
from run_folder import RunError
from timm_dynamic.cli.errors import CommandError
from timm_dynamic.cli.models import load

Statistics = tuple[Sequence[float], Sequence[float]]


def teachers(settings: Settings, data: Data) -> tuple[nn.Module, ...]:
    """The networks that --teacher names; they take images that are normalised as the data says.

    Raises:
        RunError: if one is not to be had or not for these images; the message says what was wanted and found.
    """
    return tuple(_teacher(name, settings, data) for name in settings.teacher or ())


def _teacher(name: str, settings: Settings, data: Data) -> nn.Module:
    where = f"local-dir:{name}" if Path(name).exists() else name
    try:
        with torch.random.fork_rng():  # what is drawn for it is overwritten
            model: Any = load(where, pretrained=True)
    except CommandError as error:
        raise RunError(f"--teacher {name}: {error}") from error
    if model.num_classes != len(data.classes):
        raise RunError(f"--teacher {name} knows {model.num_classes} classes; the data has {len(data.classes)}")
    labels = tuple(model.pretrained_cfg.get("label_names") or ())
    if labels != tuple(data.classes) and sorted(labels) == sorted(data.classes):
        raise RunError(f"--teacher {name} has the data's classes in another order: {', '.join(labels)}")
    if settings.cuda_graph and hasattr(model, "dynamic"):
        raise RunError(
            f"--teacher {name} decides image by image, which --cuda-graph cannot record: give stock networks, or no "
            "--cuda-graph"
        )
    own = model.pretrained_cfg["mean"], model.pretrained_cfg["std"]
    same = np.allclose(own, (data.mean, data.std))
    found = model if same else Renormalised(model, (data.mean, data.std), own)
    try:
        with torch.no_grad():
            found(torch.zeros(1, *data.input_size))
    except (AssertionError, RuntimeError, ValueError) as error:
        size = " x ".join(map(str, data.input_size))
        raise RunError(f"--teacher {name} does not take images of {size}: {error}") from error
    return found


class Renormalised(nn.Module):
    """A network that takes images normalised in another way than it was trained with.

    Args:
        model: maps [B, C, H, W] to logits.
        given: mean and standard deviation of each channel, by which the images were normalised.
        own: those by which the network wants them.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, model: nn.Module, given: Statistics, own: Statistics):
        super().__init__()
        self.model = model
        mean, std, own_mean, own_std = (torch.tensor(part).view(-1, 1, 1) for part in (*given, *own))
        self.register_buffer("scale", std / own_std)
        self.register_buffer("shift", (mean - own_mean) / own_std)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, classes] of images [B, C, H, W]."""
        logits: Tensor = self.model(x * self.scale + self.shift)
        return logits
