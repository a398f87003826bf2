"""Accuracy over cost: one network at many costs, other networks beside it, and what that takes in time."""

from __future__ import annotations

import copy
import json
import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .analyses import Loader, Observed, observe
from .budgets import set_budget
from .calibration import apply_calibration, calibrations
from .evaluation import Evaluation, summarise
from .timing import Clock

FRACTIONS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
EQUAL = 0.005  # accuracies nearer than this are called equal (SkipNet, section 4)
WARM = 3  # rounds that are not counted


@dataclass(frozen=True)
class Network:
    """A network and what it did with the images.

    Attributes:
        name: as the user gave it, or what is shown.
        model: in eval mode.
        settings: of the run that trained it; empty if that is not known.
        observed: what happened to each image.
    """

    name: str
    model: nn.Module
    observed: Observed
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def evaluation(self) -> Evaluation:
        """What it did, summed up."""
        return summarise(self.observed.rows, self.observed.table)

    @property
    def dynamic(self) -> bool:
        """Whether anything in it depends on the image."""
        return hasattr(self.model, "dynamic")

    @property
    def cost_weight(self) -> float | None:
        """Alpha, the weight of the cost, in the last stage of its run; None if it was steered, or is not known."""
        last = (self.settings.get("stages") or [{}])[-1].get("alpha")
        alpha = self.settings.get("alpha") if last is None else last
        return None if alpha is None else float(alpha)


def settings_of(folder: Path) -> dict[str, Any]:
    """What a run was told: its settings.json; empty if there is none.

    Raises:
        ValueError: if the file is damaged.
    """
    path = folder / "settings.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no settings")
    return found


@dataclass(frozen=True)
class Point:
    """A network at one cost.

    Attributes:
        network: its name.
        kind: "dense", "static", "dynamic", "exit", "budget" or "calibrated".
        what: which exit, budget or target.
        accuracy: 0..1.
        macs: mean of an image.
        max_macs: of the dearest image.
        keep_ratio: of the layer gates; None where it was not measured.
        target: wanted share of the dense MACs of a calibrated network.
        alpha: fixed weight of the cost that it was trained with, where that is known.
    """

    network: str
    kind: str
    what: str
    accuracy: float
    macs: float
    max_macs: float
    keep_ratio: float | None = None
    target: float | None = None
    alpha: float | None = None


def own_point(network: Network) -> Point:
    """A network as it is."""
    if not network.dynamic:
        return _point(network.name, "static", "", network.evaluation)
    alpha, target = network.cost_weight, network.settings.get("target")
    trained = "as saved" if target is None else f"trained to {100 * target:.0f} %"
    what = trained if alpha is None else f"alpha {alpha:g}"
    return replace(_point(network.name, "dynamic", what, network.evaluation), alpha=alpha)


def _point(name: str, kind: str, what: str, found: Evaluation, target: float | None = None) -> Point:
    return Point(name, kind, what, found.accuracy, found.macs, found.max_macs, found.keep_ratio, target)


def exit_points(network: Network) -> list[Point]:
    """Every image leaves at the same exit, for each exit.

    The head is one of them only if images of the network as it is do not all go there.
    """
    rows, found = network.observed.rows, []
    head = rows["spent"].shape[1] - 1
    early = bool((rows["exit"] < head).any())
    for k in range(head + early):
        spent, right = rows["spent"][:, k], rows["right"][:, k]
        accuracy, mean = right.double().mean().item(), spent.double().mean().item()
        what = f"exit {k}" if k < head else "head"
        found.append(Point(network.name, "exit", what, accuracy, mean, int(spent.max())))
    return found


def budget_points(network: Network, loader: Loader, mean: Sequence[float], std: Sequence[float]) -> list[Point]:
    """Three hard budgets: the smallest possible, and one and two thirds of the way to the dearest image.

    Args:
        network: none of its budgets is used; without exits there is nothing to measure.
        loader: the images.
        mean: as for `observe`.
        std: as for `observe`.
    """
    stops = network.observed.table.exits
    found = []
    for third in range(3 if len(stops) > 1 else 0):
        macs = stops[0].dearest + (stops[-1].dearest - stops[0].dearest) * third // 3
        size = network.observed.table.input_size
        limited = set_budget(copy.deepcopy(network.model), macs=macs, input_size=size)
        seen = observe(limited, loader, mean, std)
        found.append(_point(network.name, "budget", f"budget {macs / 1e6:.2f} M", summarise(seen.rows, seen.table)))
    return found


def calibrated(
    network: Network, held_out: Loader, fractions: Sequence[float] = FRACTIONS
) -> list[tuple[float, nn.Module]]:
    """Copies of a network calibrated to the targets that it can meet.

    Args:
        network: dynamic, with gates or exits.
        held_out: batches of images and classes that it was not trained on.
        fractions: targets, shares of the dense MACs.
    """
    plain = set_budget(copy.deepcopy(network.model))
    found = []
    for fraction, setting in calibrations(plain, held_out, fractions).items():
        moved = copy.deepcopy(plain)
        apply_calibration(moved, setting)
        found.append((fraction, moved))
    return found


def calibrated_point(
    name: str, fraction: float, model: nn.Module, loader: Loader, mean: Sequence[float], std: Sequence[float]
) -> Point:
    """A calibrated network, measured on other images."""
    seen = observe(model, loader, mean, std)
    return _point(
        name, "calibrated", f"calibrated to {100 * fraction:.0f} %", summarise(seen.rows, seen.table), fraction
    )


def cheapest_equal(points: Sequence[Point], accuracy: float, within: float = EQUAL) -> Point | None:
    """The cheapest point whose accuracy is no more than `within` below `accuracy`; None if there is none."""
    equal = [point for point in points if point.accuracy >= accuracy - within]
    return min(equal, key=lambda point: point.macs) if equal else None


@dataclass(frozen=True)
class Timed:
    """Milliseconds of one image at batch 1: medians by the wall clock and by the processor's own time."""

    name: str
    macs_share: float
    wall: float
    own: float


def time_side_by_side(
    models: Mapping[str, tuple[nn.Module, float]], images: Tensor, rounds: int, threads: int
) -> list[Timed]:
    """Time networks in turns, in an order that changes from round to round, all on the same images.

    Args:
        models: networks as they are to run and their share of the dense MACs, by name.
        images: [N, C, H, W], taken in turn, one in each round.
        rounds: timed runs of each network.
        threads: how many torch uses: with one, the time of this thread is measured, else that of all.
    """
    clock, order = Clock(str(images.device), threads), random.Random(0)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    with torch.inference_mode():
        for r in range(-WARM, rounds):
            image = images[r % len(images)].unsqueeze(0)
            for name in order.sample(list(models), len(models)):
                model = models[name][0]
                model(image)  # what another network left in the caches is gone
                times = clock.time(partial(model, image))
                if r >= 0:
                    found[name].append(times)
    medians = {name: [statistics.median(pair[k] for pair in pairs) for k in (0, 1)] for name, pairs in found.items()}
    return [Timed(name, models[name][1], *pair) for name, pair in medians.items()]
