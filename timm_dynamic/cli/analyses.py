"""The analyses of networks by name: their files, their runs' folders and the images are found and read."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import typer
from huggingface_hub import try_to_load_from_cache
from timm.models import parse_model_name

from ..analyses import denormalised
from ..analysis_report import Analysis, Images, Subject, analyse
from ..claims import read_study
from ..safety import CONFIG
from ..trade_off import FRACTIONS, settings_of
from .errors import BadInput, Failed, bad_input, one_line
from .images import Batches, Folder, Preparation, class_names, find_split, open_folder, open_held_out
from .models import load, pick_device
from .runs import metrics_of

FEW = 1000  # images for what takes many passes
SUMMARY, METRICS, BASE = "summary.json", "metrics.jsonl", "base"


@dataclass(frozen=True)
class Request:
    """What the user gave that is about the images and the machine: see the command's options."""

    name: str
    data: Path
    split: str | None
    batch_size: int
    workers: int
    device: str | None
    threads: int | None

    def batches(self, folder: Folder, places: Sequence[int]) -> Batches:
        """The images at some places of a folder."""
        return Batches(folder, self.batch_size, self.workers, places)


@dataclass(frozen=True)
class Wanted:
    """What else the user gave: names, files, and numbers, None for the default."""

    beside: Sequence[str]
    studies: Sequence[Path]
    images: int | None
    held_out: int | None
    targets: Sequence[float] | None
    rounds: int


def analyse_named(request: Request, wanted: Wanted) -> Analysis:
    """Load what was named and make the analyses.

    Raises:
        BadInput: if a name, a file or a number is wrong.
        Failed: if a package is missing, or the Hub cannot be reached.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(request.threads or before)
    try:
        with bad_input(ValueError, OSError):
            read = [read_study(path) for path in wanted.studies]
        device, root = pick_device(request.device), find_split(request.data, request.split)
        subject = _subject(request.name, device)
        images, places = _images(request, subject, root, wanted)
        others = [_beside(request, name, device, root, places) for name in wanted.beside]
        subject, *others = _told_apart([subject, *others], [request.name, *wanted.beside])
        with bad_input():
            targets = tuple(wanted.targets or FRACTIONS)
            return analyse(subject, others, images, read, targets=targets, rounds=wanted.rounds, watch=_watch)
    except ImportError as error:
        raise Failed(f"{one_line(error)}: pip install 'timm-dynamic[recipes]'") from error
    finally:
        torch.set_num_threads(before)


def _watch(text: str) -> None:
    typer.echo(f"report: {text}", err=True)


def _told_apart(subjects: Sequence[Subject], given: Sequence[str]) -> list[Subject]:
    """Networks whose names are not shown twice: what was given takes the place of equal names."""
    shown = [one.name for one in subjects]
    if len(set(given)) < len(given):
        raise BadInput(f"a network is named twice: {next(name for name in given if given.count(name) > 1)}")
    return [
        replace(one, name=name) if shown.count(one.name) > 1 else one for one, name in zip(subjects, given, strict=True)
    ]


def _beside(request: Request, name: str, device: str, root: Path, places: Sequence[int]) -> Subject:
    """Another network, with the images prepared as it wants them."""
    other = _subject(name, device)
    folder = open_folder(root, other.model, Preparation(other.model))
    return replace(other, loader=request.batches(folder, places))


def _images(request: Request, subject: Subject, root: Path, wanted: Wanted) -> tuple[Images, list[int]]:
    """The images as the network wants them, and their places in the folder."""
    prepare = Preparation(subject.model)
    folder = open_folder(root, subject.model, prepare)
    places = _drawn(len(folder), wanted.images)
    training = _held_out(request, subject, prepare, request.data, wanted.held_out)
    images = Images(
        loader=request.batches(folder, places),
        few=request.batches(folder, [places[k] for k in _drawn(len(places), FEW, seed=1)]),
        classes=class_names(subject.model) or folder.classes,
        mean=prepare.mean,
        std=prepare.std,
        pixels=lambda k: denormalised(folder[places[k]][0][None], prepare.mean, prepare.std)[0],
        about=f"{len(places):,} images of {root}" + ("" if len(places) == len(folder) else ", drawn at random"),
        held_out=training,
    )
    return images, places


def _drawn(images: int, count: int | None, seed: int = 0) -> list[int]:
    """Places of all images, or of some that are drawn."""
    if count is None or count >= images:
        return list(range(images))
    return sorted(np.random.default_rng(seed).permutation(images)[:count].tolist())


def _held_out(
    request: Request, subject: Subject, prepare: Preparation, data: Path, count: int | None
) -> tuple[Batches, str] | None:
    """The training images that were held out, and what is known of that."""
    if count is None:
        return None
    folder, places = open_held_out(data, subject.model, prepare, count)
    about = f"{count:,} images of {folder.root}"
    known = _known_held_out(subject)
    if known < count:
        about += f" (its run is known to have held out {known or 'none'} of them)"
    return request.batches(folder, places), about


def _known_held_out(subject: Subject) -> int:
    """How many training images a network never saw: what its run's settings say, or else what it was shipped with.

    Fewer are the first ones of more: see `held_out_places` of the package's `evaluation`. A run that read its images
    from elsewhere than a folder had them in another order.
    """
    calibrated = subject.summary.get("calibrated") or {}
    shipped = calibrated.get("images", 0) if calibrated.get("held_out") else 0
    same_order = subject.settings.get("dataset", "folder") in ("folder", "imagenet")
    return max((subject.settings.get("holdout") or 0) if same_order else 0, shipped)


def run_folder(name: str) -> Path | None:
    """The folder of a finished run, if that is what was named."""
    folder = Path(name.removeprefix("local-dir:"))
    return folder if (folder / SUMMARY).is_file() else None


# Networks ------------------------------------------------------------------------------------------------------------


def _subject(name: str, device: str) -> Subject:
    """A network and what is known of it.

    Raises:
        BadInput: if there is none, or its folder is damaged.
    """
    source = f"local-dir:{name}" if Path(name).is_dir() else name
    model = load(source, pretrained=True).to(device)
    folder = _folder_of(source, model)
    shown = Path(source.removeprefix("local-dir:")).resolve().name if source.startswith("local-dir:") else name
    if folder is None:
        return Subject(shown, model)
    settings, base = settings_of(folder), folder / BASE
    dense = load(f"local-dir:{base}", pretrained=True).to(device) if (base / CONFIG).is_file() else None
    with bad_input(ValueError, OSError, about=f"{folder} is damaged"):
        summary = json.loads((folder / SUMMARY).read_text()) if (folder / SUMMARY).is_file() else metrics_of(folder)
        lines = folder / METRICS
        rows = [json.loads(line) for line in lines.read_text().splitlines()] if lines.is_file() else []
    if _from_scratch(settings):
        summary, dense = {key: value for key, value in (summary or {}).items() if key != "dense"}, None
    return Subject(shown, model, settings, summary or {}, rows, dense)


def _from_scratch(settings: dict[str, Any]) -> bool:
    """Whether a run trained gates from its first step on: what it calls dense is a network that nobody trained."""
    stages = settings.get("stages") or [{"name": None}]
    return settings.get("base") is None and stages[0]["name"] in ("hrl", "rl")


def _folder_of(source: str, model: Any = None) -> Path | None:
    """Where a network's config.json and what a run left beside it lie; None if that is nowhere here."""
    kind, place = parse_model_name(source)
    if kind == "local-dir":
        return Path(place)
    if kind == "hf-hub":
        cached = try_to_load_from_cache(place, CONFIG)
        return Path(cached).parent if isinstance(cached, str) else None
    file = (getattr(model, "pretrained_cfg", None) or {}).get("file")
    return Path(file).parent if file and (Path(file).parent / CONFIG).is_file() else None
