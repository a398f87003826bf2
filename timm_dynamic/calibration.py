"""Calibration: one trained model, any mean cost between its cheapest and its dearest."""

import itertools
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .configs import one_of, positive
from .exits import NEVER
from .gates import LARGEST_SHIFT
from .walk import Log, Walk, dynamic_of, table_for

FEWEST = 50  # images
# Probabilities from which on gates keep: even steps of the logit between "always" and "never".
LEVELS = (0.0, *(1 / (1 + math.exp(-step)) for step in (-6, -4, -3, -2, -1, -0.5, 0, 0.5, 1, 2, 3, 4, 6, 9)), 1.5)
HALVINGS = 8


@dataclass(frozen=True)
class Calibration:
    """What `calibrate` set, and what it gave on the images it was given.

    Attributes:
        threshold: the probability from which on gates keep.
        confidence: how sure an image that leaves at an exit is at least; above 1 if none leaves early.
        fraction: mean MACs as a share of the stock model's.
        accuracy: 0..1.
    """

    threshold: float
    confidence: float
    fraction: float
    accuracy: float


@dataclass
class _Run:
    """What one pass over the images gave, every exit evaluated."""

    sure: Tensor  # [N, exits], the largest softmax probability
    right: Tensor  # bool [N, exits]
    spent: Tensor  # [N, exits], MACs of leaving there, all exits before it evaluated
    early: Tensor  # [N], MACs of going to the head without evaluating any exit


def calibrate(model: Any, loader: Iterable[Any], fraction: float = 0.5, *, use: str = "both") -> Calibration:
    """Set gate thresholds and exit confidences so that the mean cost meets a target.

    Of all settings that meet it the one with the best accuracy is taken. The thresholds are buffers: they are saved
    with the weights. A budget that is set is not looked at; where exits are moved, lift it afterwards to let images
    leave by confidence.

    Args:
        model: a trained dynamic model; its mode is left as it was.
        loader: batches of (images [B, C, H, W], labels [B]) that the model was not trained on.
        fraction: the wanted mean MACs as a share of the stock model's.
        use: what to move: "both", "gates" or "exits".

    Returns:
        What was set.

    Raises:
        ValueError: if there are too few images, the model lacks what is to be moved, or the target cannot be met;
            the message names what can. The thresholds are then what they were.
    """
    dynamic_of(model)
    positive("fraction", fraction)
    one_of("use", use, ("both", "gates", "exits"))
    move_gates = use != "exits" and (hasattr(model, "layer_gates") or hasattr(model, "channel_gates"))
    move_exits = use != "gates" and hasattr(model, "exits")
    if not move_gates and not move_exits:
        raise ValueError(f"calibrate(use={use!r}) needs a model with such parts; found none")
    images = [(batch[0], batch[1]) for batch in loader]
    count = sum(len(x) for x, _ in images)
    if count < FEWEST:
        raise ValueError(f"calibrate needs at least {FEWEST} images; found {count}")
    with _kept(model):
        search = _Search(model, images, fraction, move_exits)
        best = search.over(LEVELS if move_gates else (0.5,), refine=move_gates)
    _set(model, best.threshold if move_gates else None, best.confidence if move_exits else None)
    return best


@torch.no_grad()
def meet_cost(model: Any, images: Iterable[Tensor], fraction: float, reach: float = 0.06) -> float:
    """Move one threshold for all gates until the mean cost of going to the head is as near to a target as it gets.

    Unlike `calibrate` it needs no labels and looks at no accuracy: it makes good what a trained network's cost is
    beside the one that it was trained for. A network that costs far more than that is left alone: units that it was
    trained to run can be shut here and there, not by the dozen.

    Args:
        model: a trained dynamic model with gates, in any mode.
        images: batches [B, C, H, W].
        fraction: the wanted mean MACs as a share of the stock model's.
        reach: how far the cost may be above that for thresholds to be moved.

    Returns:
        The mean share that is met. The thresholds are left as they were if no other one is nearer to the target.

    Raises:
        ValueError: if the model has no gates, or there are no images.
    """
    parts = [getattr(model, part) for part in ("layer_gates", "channel_gates") if hasattr(model, part)]
    batches = list(images)
    if not parts or not batches:
        raise ValueError(f"meet_cost needs gates and images; found {len(parts)} kinds of gates, {len(batches)} batches")
    before = [part.threshold.clone() for part in parts]
    with _kept(model):
        tried: dict[float | None, float] = {None: _mean_share(model, batches)}
        low, high = -LARGEST_SHIFT, LARGEST_SHIFT  # logits: gates can be very sure, all about as much
        for _ in range(2 * HALVINGS if tried[None] - fraction <= reach else 0):
            middle = (low + high) / 2
            level = 1 / (1 + math.exp(-middle))
            _set(model, level, None)
            tried[level] = _mean_share(model, batches)
            low, high = (middle, high) if tried[level] > fraction else (low, middle)
    best = min(tried, key=lambda threshold: abs(tried[threshold] - fraction))
    if best is not None:
        _set(model, best, None)
    else:
        for part, threshold in zip(parts, before, strict=True):
            part.threshold.copy_(threshold)
    return tried[best]


def _mean_share(model: Any, batches: list[Tensor]) -> float:
    """Mean MACs of going to the head without any exit, as a share of the stock model's."""
    device = next(model.parameters()).device
    spent, count = 0.0, 0
    for x in batches:
        walk = Walk(model, x.to(device), Log(len(x)), budgeted=False)
        assert walk.macs is not None
        walk.to_exit(len(walk.stops) - 1)
        macs = torch.as_tensor(walk.macs.spent + walk.macs.exit_cost(len(walk.stops) - 1), dtype=torch.float64)
        spent += macs.expand(len(x)).sum().item() / walk.macs.table.dense
        count += len(x)
    return spent / count


class _Search:
    """Settings that were tried, and the best that meets the target."""

    def __init__(self, model: Any, images: list[tuple[Tensor, Tensor]], target: float, move_exits: bool) -> None:
        self.model, self.images, self.target, self.move_exits = model, images, target, move_exits
        self.dense = table_for(model, tuple(images[0][0].shape[1:])).dense
        self.tolerance = 0.005
        self.found: list[Calibration] = []
        self.reach: list[float] = []

    def over(self, levels: Iterable[float], refine: bool) -> Calibration:
        """Try each threshold; between two whose cost without exits lies on either side of the target, halve."""
        tried = [(level, self._try(level)) for level in levels]
        crossing = [(a, b) for a, b in itertools.pairwise(tried) if a[1] >= self.target >= b[1]]
        for (low, _), (high, _) in crossing if refine else []:
            for _ in range(HALVINGS):
                middle = (low + high) / 2
                low, high = (middle, high) if self._try(middle) > self.target else (low, middle)
        if not self.found:
            raise ValueError(
                f"a mean cost of {self.target:.3f} of the stock model cannot be met; wanted a fraction in "
                f"{min(self.reach):.3f}..{max(self.reach):.3f}"
            )
        return max(self.found, key=lambda c: c.accuracy)

    def _try(self, level: float) -> float:
        """Run with gates at `level`, note what meets the target, and give the cost without exits."""
        _set(self.model, level, None)
        run = _run(self.model, self.images)
        plain = run.early.mean().item() / self.dense
        self._note(level, NEVER, plain, run.right[:, -1].double().mean().item())
        if self.move_exits:
            for confidence in _confidences(run):
                share, accuracy = _leave(run, confidence, self.dense)
                self._note(level, confidence, share, accuracy)
        return plain

    def _note(self, level: float, confidence: float, share: float, accuracy: float) -> None:
        self.reach.append(share)
        if abs(share - self.target) <= self.tolerance:
            self.found.append(Calibration(level, confidence, share, accuracy))


def _confidences(run: _Run) -> list[float]:
    """Confidences worth trying: quantiles of those met."""
    values = run.sure[:, :-1].flatten().double()
    steps = torch.linspace(0, 1, 129, dtype=torch.float64)
    return sorted({0.0, *values.quantile(steps).tolist()})


def _leave(run: _Run, confidence: float, dense: int) -> tuple[float, float]:
    """Mean share of MACs and accuracy if images leave at the first exit where they are this sure."""
    sure = run.sure >= confidence
    sure[:, -1] = True
    exit_index = sure.int().argmax(1, keepdim=True)
    share = run.spent.gather(1, exit_index).mean().item() / dense
    return share, run.right.gather(1, exit_index).double().mean().item()


@torch.no_grad()
def _run(model: Any, images: list[tuple[Tensor, Tensor]]) -> _Run:
    device = next(model.parameters()).device
    rows: list[tuple[Tensor, ...]] = []
    for x, y in images:
        walk = Walk(model, x.to(device), Log(len(x)), budgeted=False)
        account = walk.macs
        assert account is not None
        sure, right, spent = [], [], []
        heads = 0
        for index in range(len(walk.stops)):
            walk.to_exit(index)
            logits = walk.classify(index, walk.x).float()
            here = torch.as_tensor(account.spent, dtype=torch.float64, device=device).expand(len(x))
            heads += account.exit_cost(index)
            sure.append(logits.softmax(-1).amax(-1))
            right.append(logits.argmax(-1) == y.to(device))
            spent.append(here + heads)
        early = here + account.exit_cost(len(walk.stops) - 1)
        rows.append((torch.stack(sure, 1), torch.stack(right, 1), torch.stack(spent, 1), early))
    return _Run(*(torch.cat(column).cpu() for column in zip(*rows, strict=True)))


def _set(model: Any, threshold: float | None, confidence: float | None) -> None:
    for part in ("layer_gates", "channel_gates"):
        if threshold is not None and hasattr(model, part):
            getattr(model, part).threshold.fill_(threshold)
    if confidence is not None:
        model.exits.set_confidence([confidence] * len(model.exits))


@contextmanager
def _kept(model: Any) -> Iterator[None]:
    """Eval mode without forced decisions for a while; mode, thresholds and forcing are put back."""
    training, forced = model.training, model.dynamic.forced
    parts = [getattr(model, part) for part in ("layer_gates", "channel_gates") if hasattr(model, part)]
    before = [part.threshold.clone() for part in parts]
    model.dynamic.forced = None
    try:
        yield model.eval()
    finally:
        model.train(training)
        model.dynamic.forced = forced
        for part, threshold in zip(parts, before, strict=True):
            part.threshold.copy_(threshold)
