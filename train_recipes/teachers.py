"""Trained networks that others learn from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from images import Data
from options import Settings
from run_folder import RunError
from timm_dynamic.hub import HubError, hub_errors


def teachers(settings: Settings, data: Data) -> tuple[nn.Module, ...]:
    """The networks that --teacher names, which see images as the student does.

    Raises:
        RunError: if one is not to be had or not for these images; the message says what was wanted and found.
    """
    return tuple(_teacher(name, settings, data) for name in settings.teacher or ())


def _teacher(name: str, settings: Settings, data: Data) -> nn.Module:
    where = f"local-dir:{name}" if Path(name).exists() else name
    try:
        with hub_errors(where), torch.random.fork_rng():  # what is drawn for it is overwritten
            model: Any = timm.create_model(where, pretrained=True)
    except HubError as error:
        raise RunError(f"--teacher {error}") from error
    except (OSError, RuntimeError, ValueError) as error:
        raise RunError(f"--teacher {name}: {error}") from error
    given = {"classes": len(data.classes), "mean": _rounded(data.mean), "std": _rounded(data.std)}
    config = model.pretrained_cfg
    found = {"classes": model.num_classes, "mean": _rounded(config["mean"]), "std": _rounded(config["std"])}
    odd = [key for key in given if found[key] != given[key]]
    if odd:
        wanted, had = (", ".join(f"{key} {values[key]}" for key in odd) for values in (given, found))
        raise RunError(f"--teacher {name} is for other images: the data has {wanted}, it {had}")
    if settings.cuda_graph and hasattr(model, "dynamic"):
        raise RunError(
            f"--teacher {name} decides image by image, which --cuda-graph cannot record: give stock networks, or no "
            "--cuda-graph"
        )
    return model


def _rounded(values: Any) -> list[float]:
    return [round(float(value), 3) for value in values]
