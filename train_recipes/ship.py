"""Ship a trained model with the package: weights in half precision, config and card, measured as users measure it.

    python train_recipes/ship.py RUN --tag cifar10_hrl --data DIR --dataset-name CIFAR-10 --command "accelerate ..."

writes timm_dynamic/weights/NAME.TAG and hub_cards/NAME.TAG.md. Nothing is written before everything is measured.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import timm
import torch
import typer
from safetensors.torch import load_file, save_file
from torch import Tensor

from options import command as run_from_command_line
from run_folder import SUMMARY, RunError
from timm_dynamic.budgets import default_input_size
from timm_dynamic.calibration import apply_calibration, calibrations
from timm_dynamic.card import model_card
from timm_dynamic.cli import images, rows
from timm_dynamic.cli.errors import CommandError, one_line
from timm_dynamic.cli.evaluate import BATCH
from timm_dynamic.cli.models import load, restrict
from timm_dynamic.evaluation import compare, costs_of
from timm_dynamic.gates import GATES, PARTS, gates_choose
from timm_dynamic.hub import CARD, PREFIXES, base_name, base_of, config_text, save_pretrained
from timm_dynamic.idle import idle_weights
from timm_dynamic.safety import CONFIG, WEIGHTS

ROOT = Path(__file__).resolve().parent.parent
MODULES = ("cifar", "registry")  # of the package, whose networks can have tags here
MOST_BYTES = 25_000_000  # of all weights together
TOLERANCE = 0.0005  # of accuracy, between half and full precision
TARGETS = (0.3, 0.5, 0.7)
SHOWN = ("accuracy", "macs", "max_macs")
DECISIONS = ("keep_ratio", "policies", "policy_entropy", "macs_share_std")
Row = dict[str, Any]
HeldOut = tuple[images.Folder, list[int]]


@dataclass(frozen=True)
class Order:
    """What is to be shipped, and what it is measured on; `--help` explains each."""

    run: Path
    tag: str
    data: Path
    command: str
    dataset: str
    split: str = "val"
    seed: int | None = None
    holdout: int | None = None
    targets: tuple[float, ...] = ()
    half: bool = True
    start: str = ""


def ship(order: Order, root: Path) -> list[str]:
    """Measure a model, and put its weights, config and card into a repository.

    Args:
        order: what and how.
        root: of the repository.

    Returns:
        What was found and written, as lines to print.

    Raises:
        RunError: if the run cannot be shipped; nothing is then written.
    """
    weights, cards = root / "timm_dynamic" / "weights", root / "hub_cards"
    for folder in (weights, cards):
        folder.mkdir(parents=True, exist_ok=True)
    with _one_line(), _staged(weights) as stage:
        full = _write_weights(order, stage)
        others = sum(path.stat().st_size for path in weights.glob("[!.]*/*") if path.parent.name != full)
        total = others + sum(path.stat().st_size for path in stage.iterdir())
        if total > MOST_BYTES:
            raise RunError(f"all weights together may have {MOST_BYTES / 1e6:.0f} MB; with {full} {total / 1e6:.2f} MB")
        metrics, lines = _measure(order, stage)
        card = _write_config(stage, full, metrics)
        _put(stage, weights / full, card, cards / f"{full}.md")
    return [*lines, f"{weights / full} and {cards / full}.md are written; all weights: {total / 1e6:.2f} MB"]


@contextmanager
def _one_line() -> Iterator[None]:
    """Errors of the package's commands as those of a recipe."""
    try:
        yield
    except (CommandError, ValueError) as error:
        raise RunError(one_line(error)) from error


@contextmanager
def _staged(weights: Path) -> Iterator[Path]:
    """A hidden folder beside the weights, gone afterwards unless it was moved."""
    stage = Path(tempfile.mkdtemp(dir=weights, prefix=".shipping-"))
    try:
        yield stage
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _put(stage: Path, folder: Path, card: str, card_file: Path) -> None:
    """Move what is ready to its place; what was there goes."""
    part, old = card_file.with_name(f".{card_file.name}.part"), folder.with_name(f".{folder.name}.old")
    part.write_text(card, encoding="utf-8")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(stage, folder)
    os.replace(part, card_file)
    shutil.rmtree(old, ignore_errors=True)


# What is shipped -----------------------------------------------------------------------------------------------------


def _write_weights(order: Order, stage: Path) -> str:
    """Put a run's model into a folder, its parameters in half precision, without those that no image can reach.

    Gives its name with the tag.
    """
    model = load(f"local-dir:{order.run}", pretrained=True)
    name = _name_of(model)
    if not re.fullmatch(r"[a-z0-9]+(_[a-z0-9]+)*", order.tag):
        raise RunError(f"--tag must be words of small letters and digits such as cifar10_hrl; found {order.tag!r}")
    save_pretrained(model, stage)
    (stage / CARD).unlink()
    config = json.loads((stage / CONFIG).read_text(encoding="utf-8"))
    (stage / CONFIG).write_text(config_text({**config, "architecture": name}), encoding="utf-8")
    layers, channels = (getattr(getattr(model, part, None), "config", None) for part in GATES)
    idle = idle_weights(model, layers, channels)
    state = {key: value for key, value in load_file(stage / WEIGHTS).items() if key not in idle}
    if order.half:
        # what decides stays as it is, small as it is; so do buffers: thresholds, batch-norm statistics
        halved = {key for key, _ in model.named_parameters() if not key.startswith(GATES)}
        state = {key: value.half() if key in halved else value for key, value in state.items()}
        if not all(torch.isfinite(value).all() for value in state.values()):
            raise RunError(f"{order.run}: some weights are too large for half precision: give --full")
    save_file(state, stage / WEIGHTS, metadata={"format": "pt"})
    stage.chmod(0o755)
    (stage / WEIGHTS).chmod(0o644)
    return f"{name}.{order.tag}"


def _name_of(model: Any) -> str:
    """The registered name of this package that makes a model with these parts."""
    base, parts = base_name(model), tuple(part for part in PARTS if hasattr(model, part))
    prefix = next((prefix for prefix, made in PREFIXES.items() if made == parts), "" if not parts else "ddi_")
    name = f"{prefix}{base}"
    if name not in timm.list_models(module=MODULES):
        raise RunError(f"only networks of this package can have tags here; {name} is timm's")
    return name


def _write_config(stage: Path, full: str, metrics: Row) -> str:
    """Complete a staged model's config by what was measured; gives its card."""
    blob = (stage / WEIGHTS).read_bytes()
    config = json.loads((stage / CONFIG).read_text(encoding="utf-8"))
    config["metrics"] = metrics
    config["weights"] = {"bytes": len(blob), "sha256": hashlib.sha256(blob).hexdigest()}
    (stage / CONFIG).write_text(config_text(config), encoding="utf-8")
    model = load(f"local-dir:{stage}", pretrained=True)
    return model_card(model, full, base_of(full.partition(".")[0]), full, metrics) + "\n"


# What is measured ----------------------------------------------------------------------------------------------------


def _measure(order: Order, stage: Path) -> tuple[Row, list[str]]:
    """All numbers of the card, and lines that say the most important ones."""
    settings, summary = _told(order.run, "settings.json"), _told(order.run, SUMMARY)
    seed = order.seed if order.seed is not None else settings.get("seed", summary.get("seed"))
    if seed is None:
        raise RunError(f"{order.run} does not tell its seed: give --seed")
    model = load(f"local-dir:{stage}", pretrained=True)
    held_out = _held_out(model, order) if order.holdout is not None else None
    trained, (stored, right) = _evaluate(order.run, order), _images(model, order)
    lines = [f"as trained {_shown(trained)}; as shipped {_shown(stored)}"]
    if abs(stored["accuracy"] - trained["accuracy"]) > TOLERANCE:
        raise RunError(f"half precision changes the accuracy: {lines[0]}: give --full")
    found: Row = {"dataset": order.dataset, "split": order.split, "images": stored["images"], "base_model": None}
    found |= {"command": order.command, "seed": seed, **({"start": order.start} if order.start else {})}
    if order.half:
        found["full_precision"] = _few(trained)
    if not hasattr(model, "dynamic"):
        return {**found, **_few(stored)}, lines
    found |= _dynamic_rows(model, stored, order)
    found |= _gain(stored, right, summary, settings, order)
    if held_out is not None:
        calibrated, more = _calibrated(stage, order, held_out)
        kept_out = (settings.get("holdout") or 0) >= (order.holdout or 0)  # the first ones of the same permutation
        kept_out &= settings.get("dataset") in ("folder", "imagenet")  # others have their images in another order
        found["calibrated"] = {"images": order.holdout, "held_out": kept_out, "rows": calibrated}
        lines += more
    return found, lines


def _told(run: Path, name: str) -> Row:
    """What a file of a run says; nothing if there is no such file."""
    told: Row = json.loads((run / name).read_text(encoding="utf-8")) if (run / name).is_file() else {}
    return told


def _dynamic_rows(model: Any, found: Row, order: Order) -> Row:
    """The rows of a dynamic network: its base, itself, every exit and three hard budgets."""
    keys = [key for key in DECISIONS if hasattr(model, "layer_gates")]
    keys += ["channel_keep_ratio"] if found["channel_keep_ratio"] is not None else []
    dense: Row = {"macs": found["dense_macs"]}
    if (order.run / "base" / CONFIG).is_file():
        dense = _few(_evaluate(order.run / "base", order))
    stops = costs_of(model, default_input_size(model)).exits
    exits, budgets = range(len(stops)) if len(stops) > 1 else (), []
    sure = {"confidence": list(model.exits.levels)} if exits and model.exits.calibrated else {}
    low, high = stops[0].dearest, stops[-1].dearest
    for third in range(3) if exits else ():
        budgets.append(math.ceil(100 * (low + (high - low) * third / 3) / found["dense_macs"]) / 100)
    return {
        "dense": dense,
        "dynamic": {**_few(found), **{key: found[key] for key in keys}, **sure},
        "exits": [{"exit": k, **_few(_row(model, order, exit=k))} for k in exits],
        "budgets": [{"budget": share, **_few(_row(model, order, fraction=share))} for share in budgets],
    }


def _gain(found: Row, right: Tensor, summary: Row, settings: Row, order: Order) -> Row:
    """The adaptive gain over the run's best static policy, where there is one, on the images measured on."""
    static = summary.get("static")
    if static is None:
        return {}
    error = {}
    if (order.run / "static" / CONFIG).is_file():
        other, others_right = _images(load(f"local-dir:{order.run / 'static'}", pretrained=True), order)
        static = {**static, "accuracy": other["accuracy"]}
        error["adaptive_gain_error"] = compare(right, others_right).error
    elif settings.get("holdout"):
        raise RunError(
            f"{order.run}: its adaptive gain is that of held-out images; static/ is needed to measure it here"
        )
    return {"adaptive_gain": found["accuracy"] - static["accuracy"], **error, "static": static}


def _evaluate(folder: Path, order: Order) -> Row:
    """What a saved model gives."""
    return _row(load(f"local-dir:{folder}", pretrained=True), order)


def _row(model: Any, order: Order, *, fraction: float | None = None, exit: int | None = None) -> Row:
    """What `timm-dynamic evaluate` measures, with its defaults, on the CPU."""
    return _images(model, order, fraction=fraction, exit=exit)[0]


def _images(model: Any, order: Order, *, fraction: float | None = None, exit: int | None = None) -> tuple[Row, Tensor]:
    """The same, and whether each image was recognised: bool [N]."""
    prepare = images.Preparation(model)
    restrict(model, prepare.input_size, fraction, exit, None)
    folder = images.open_folder(images.find_split(order.data, order.split), model, prepare)
    return rows.evaluate_row(model, images.batches(folder, BATCH, 0), "cpu")


def _few(found: Row) -> Row:
    """Accuracy and MACs of an evaluation."""
    return {key: found[key] for key in SHOWN}


def _shown(found: Row) -> str:
    return f"{found['accuracy']:.2%} at {found['macs'] / 1e6:.2f} M MACs"


def _held_out(model: Any, order: Order) -> HeldOut:
    """The training images, and the places of those to calibrate on."""
    if not hasattr(model, "dynamic"):
        raise RunError("--holdout: a plain network has nothing to calibrate")
    return images.open_held_out(order.data, model, images.Preparation(model), order.holdout or 0)


def _calibrated(stage: Path, order: Order, held_out: HeldOut) -> tuple[list[Row], list[str]]:
    """Thresholds for other mean costs, and what they give."""
    model: Any = load(f"local-dir:{stage}", pretrained=True)
    targets = order.targets or TARGETS
    folder, places = held_out
    settings = calibrations(model, images.batches(folder, BATCH, 0, places), targets)
    lines = [f"no row for --target {target}: no thresholds meet it" for target in targets if target not in settings]
    found: list[Row] = []
    for target, set_to in settings.items():
        apply_calibration(model, set_to)
        early = set_to.confidence if hasattr(model, "exits") and set_to.confidence <= 1 else None
        row = _few(_row(model, order))
        threshold = set_to.threshold if gates_choose(model) else None
        found.append({"target": target, "threshold": threshold, "confidence": early, **row})
        lines.append(f"calibrated to {target:.0%}: {_shown(row)}")
    return found, lines


# The command ---------------------------------------------------------------------------------------------------------


def main(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished run, or of save_pretrained.")],
    tag: Annotated[str, typer.Option(help="What the weights are, such as cifar10_hrl.")],
    data: Annotated[Path, typer.Option(help="Folder of images to measure on, as `timm-dynamic evaluate` takes it.")],
    command: Annotated[str, typer.Option(help="The exact command that trained it, for the card.")],
    dataset_name: Annotated[str, typer.Option(help="What the card calls the data, such as 'CIFAR-10 (JPEG)'.")],
    split: Annotated[str, typer.Option(help="Folder in --data that is measured on.")] = Order.split,
    seed: Annotated[int | None, typer.Option(help="Of the training. Default: what the run's settings say.")] = None,
    holdout: Annotated[
        int | None, typer.Option(min=1, help="Calibrate too, on that many images of --data/train held out in training.")
    ] = None,
    target: Annotated[
        list[float] | None, typer.Option(help="Mean cost to calibrate to; may be given again. Default: 0.3, 0.5, 0.7.")
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="Store the weights in full precision.")] = False,
    start: Annotated[str, typer.Option(help="A sentence for the card on what the training started from.")] = "",
    root: Annotated[Path, typer.Option(help="The repository to write to.", show_default=False)] = ROOT,
) -> None:
    """Measure a trained model, and put its weights and its card where the package finds them."""
    targets = tuple(target or ())
    if targets and holdout is None:
        raise RunError("--target calibrates on held-out images: give --holdout too")
    order = Order(run, tag, data, command, dataset_name, split, seed, holdout, targets, not full, start)
    for line in ship(order, root):
        typer.echo(line)


if __name__ == "__main__":
    run_from_command_line(main)
