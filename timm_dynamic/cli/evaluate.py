"""The command `evaluate`: accuracy and MACs on a folder of images, of one network or of two side by side."""

from pathlib import Path
from typing import Annotated, Any

import typer

from . import tables
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
    from . import images, rows
    from .models import load, pick_device, restrict

    place, root = pick_device(device), images.find_split(data, split)

    def ready(which: str, *limits: Any) -> tuple[Any, images.Preparation, images.Folder]:
        model = load(which, pretrained=pretrained)
        prepare = images.Preparation(model)
        folder = images.open_folder(root, model, prepare)
        restrict(model, prepare.input_size, *limits)
        return model, prepare, folder

    def measured(model: Any, prepare: images.Preparation, folder: images.Folder) -> tuple[rows.Row, Any]:
        read = images.batches(folder, batch_size, workers)
        loader = progress(read, -(-len(folder) // batch_size), "evaluating")
        return rows.evaluate_row(model, loader, prepare.input_size, place)

    own = ready(name, budget_fraction, exit, confidence)
    other = None if against is None else ready(against, None, None, None)  # fails before anything is measured
    found, right = measured(*own)
    row = {"name": name, "data": str(root), **found}
    if against is not None and other is not None:
        row["against"] = rows.against_row(against, found, right, *measured(*other))
    print_json(row) if as_json else tables.print_evaluation(row)
