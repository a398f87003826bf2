"""The command `evaluate`: accuracy and MACs on a folder of images, of one network or of two side by side."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from . import tables
from .errors import BadInput
from .options import Confidence, Device, Exit, Fraction, Json, Name, Weights, print_json, progress

BATCH = 64  # images evaluated at once, where nothing else is asked for


def evaluate(
    name: Name,
    data: Annotated[Path, typer.Option(help="Folder with a folder of images for each class, or with val/ that has.")],
    split: Annotated[
        str | None, typer.Option(help="Folder in --data to use. Default: val if there is one, else --data itself.")
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Another network, as it was saved, on the same images: which is better?"),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = BATCH,
    workers: Annotated[int, typer.Option(min=0, help="Processes that read images; 0: this one.")] = 0,
    device: Device = None,
    calibrate: Annotated[
        float | None,
        typer.Option(metavar="SHARE", help="First set thresholds to spend this share of the dense MACs on the mean."),
    ] = None,
    held_out: Annotated[
        int | None, typer.Option(min=1, help="For --calibrate: the N images of DATA/train that --holdout N holds out.")
    ] = None,
    budget_fraction: Fraction = None,
    exit: Exit = None,
    confidence: Confidence = None,
    pretrained: Weights = True,
    as_json: Json = False,
) -> None:
    """Measure accuracy and MACs on a folder of images.

    The classes are the sorted names of the folders; images are prepared as the model's config says. The difference to
    the network of --against has the standard error of differences image by image.
    """
    from . import rows
    from .images import find_split
    from .models import pick_device

    place, root = pick_device(device), find_split(data, split)
    limits = (budget_fraction, exit, confidence)
    if (calibrate is None) != (held_out is None):
        raise BadInput("--calibrate SHARE and --held-out N go together")
    if calibrate is not None and limits != (None, None, None):
        raise BadInput("--calibrate lets images leave by confidence: it goes without a budget")
    reading = (batch_size, workers)
    own = _ready(name, root, pretrained, limits)
    other = None if against is None else _ready(against, root, pretrained)  # fails before anything is measured
    row: rows.Row = {"name": name, "data": str(root)}
    if calibrate is not None and held_out is not None:
        row["calibrated"] = _set_thresholds(own, data, place, reading, calibrate, held_out)
    found, right = _measured(own, place, reading)
    row |= found
    if against is not None and other is not None:
        row["against"] = rows.against_row(against, found, right, *_measured(other, place, reading))
    print_json(row) if as_json else tables.print_evaluation(row)


Ready = tuple[Any, Any, Any]  # a network, how it wants images prepared, and the folder of images


def _ready(name: str, root: Path, pretrained: bool, limits: Sequence[Any] = (None, None, None)) -> Ready:
    """A network under its budget, and the images as it wants them."""
    from .images import Preparation, open_folder
    from .models import load, restrict

    model = load(name, pretrained=pretrained)
    prepare = Preparation(model)
    folder = open_folder(root, model, prepare)
    restrict(model, prepare.input_size, *limits)
    return model, prepare, folder


def _set_thresholds(
    own: Ready, data: Path, place: str, reading: tuple[int, int], share: float, count: int
) -> dict[str, Any]:
    """Calibrate a network on the images that were held out of its training."""
    from .images import Batches, open_held_out
    from .rows import calibrate_row

    model, prepare, _ = own
    folder, places = open_held_out(data, model, prepare, count)
    return calibrate_row(model.to(place), Batches(folder, *reading, places), share)


def _measured(ready: Ready, place: str, reading: tuple[int, int]) -> tuple[dict[str, Any], Any]:
    """Accuracy and cost, and which images were recognised."""
    from .images import batches
    from .rows import evaluate_row

    model, _, folder = ready
    loader = progress(batches(folder, *reading), -(-len(folder) // reading[0]), "evaluating")
    return evaluate_row(model, loader, place)
