"""Calibration: one trained model, any mean cost between its cheapest and its dearest."""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import families
from .configs import one_of, positive
from .exits import NEVER
from .gates import gate_parts, gates_choose
from .leaving import check_classes
from .modes import modes_kept
from .walk import Log, Walk, dynamic_of, table_for

FEWEST = 50  # images
# Probabilities from which on gates keep: even steps of the logit between "always" and "never".
LEVELS = (0.0, *(1 / (1 + math.exp(-step)) for step in (-6, -4, -3, -2, -1, -0.5, 0, 0.5, 1, 2, 3, 4, 6, 9)), 1.5)
HALVINGS = 8


@dataclass(frozen=True)
class Calibration:
    """What `calibrate` set, and what it gave on the images it was given.

    Attributes:
        threshold: the probability from which on gates keep; where they were not moved, that of the first one.
        confidence: how sure an image that leaves at an exit is at least; above 1 if none leaves early. Where exits were
            not moved, the lowest of theirs.
        fraction: mean MACs as a share of the stock model's.
        accuracy: 0..1.
    """

    threshold: float
    confidence: float
    fraction: float
    accuracy: float


class OutOfReach(ValueError):
    """No setting meets the target."""


@dataclass
class _Run:
    """What one pass over the images gave, every exit evaluated."""

    sure: Tensor  # [N, exits], the largest softmax probability
    right: Tensor  # bool [N, exits]
    reached: Tensor  # [N, exits], MACs of coming there without evaluating any exit
    heads: tuple[int, ...]  # MACs of each exit's classifier


def calibrate(model: Any, loader: Iterable[Any], fraction: float = 0.5, *, use: str = "both") -> Calibration:
    """Set gate thresholds and exit confidences so that the mean cost meets a target.

    Of all settings that meet it the one with the best accuracy is taken. The thresholds are buffers: they are saved
    with the weights. A budget that is set is not looked at; where exits are moved, lift it afterwards to let images
    leave by confidence.

    Args:
        model: a trained dynamic model; its mode is left as it was.
        loader: batches of (images [B, C, H, W], labels [B]) that the model was not trained on; they are all kept in
            memory, to be run at many thresholds.
        fraction: the wanted mean MACs as a share of the stock model's.
        use: what to move: "both", "gates" or "exits". What is not moved counts as it is: gates at their thresholds,
            exits at their confidences.

    Returns:
        What was set.

    Raises:
        ValueError: if there are too few images, a batch is of another form, the model lacks what is to be moved, or the
            target cannot be met: the message names what can. The thresholds are then what they were.
    """
    positive("fraction", fraction)
    search = _Search(model, loader, use)
    with kept(model):
        best = search.over(fraction)
    apply_calibration(model, best, use=use)
    return best


def calibrations(
    model: Any, loader: Iterable[Any], fractions: Iterable[float], *, use: str = "both"
) -> dict[float, Calibration]:
    """What `calibrate` would set for each of several targets; runs that they share are done once.

    Args:
        model: a trained dynamic model; it is left as it was.
        loader: as for `calibrate`.
        fractions: the wanted mean MACs as shares of the stock model's.
        use: what to move: "both", "gates" or "exits".

    Returns:
        For each target that can be met what is to be set: see `apply_calibration`.

    Raises:
        ValueError: if there are too few images, or the model lacks what is to be moved.
    """
    search, found = _Search(model, loader, use), {}
    with kept(model):
        for fraction in fractions:
            with suppress(OutOfReach):
                found[fraction] = search.over(fraction)
    return found


def apply_calibration(model: Any, found: Calibration, *, use: str = "both") -> None:
    """Set thresholds and confidences as `calibrate` does.

    Args:
        model: a dynamic model; its thresholds are changed.
        found: what to set.
        use: what to move: "both", "gates" or "exits".
    """
    gates, exits = _movable(model, use)
    _set(model, found.threshold if gates else None, found.confidence if exits else None)


def _movable(model: Any, use: str) -> tuple[bool, bool]:
    """Whether gates and exits are to be moved; gates that nobody asks cannot be."""
    dynamic_of(model)
    one_of("use", use, ("both", "gates", "exits"))
    gates = use != "exits" and gates_choose(model)
    exits = use != "gates" and hasattr(model, "exits")
    if not gates and not exits:
        raise ValueError(f"calibrate(use={use!r}) needs a model with such parts, not all settled; found none")
    if exits:
        check_classes(model)
        if families.classes(model) < 2:
            found = families.classes(model)
            raise ValueError(f"confidences need two classes or more, to leave by; found num_classes={found}")
    return gates, exits


@torch.no_grad()
def meet_cost(model: Any, images: Iterable[Tensor], fraction: float, agreement: float = 0.95) -> float:
    """Move one threshold for all gates until the mean cost of going to the head is as near to a target as it gets.

    Unlike `calibrate` it needs no labels: it makes good what a trained network's cost is beside the one that it was
    trained for. Gates are opened freely. They are shut as long as the network still says what it said: units that it
    was trained to run can be shut here and there, not by the dozen.

    Args:
        model: a trained dynamic model with gates, in any mode.
        images: batches [B, C, H, W].
        fraction: the wanted mean MACs as a share of the stock model's.
        agreement: share of the images whose predicted class must stay the same where gates are shut.

    Returns:
        The mean share that is met. The thresholds are left as they were if no other one is nearer to the target.

    Raises:
        ValueError: if the model has no gates, or there are no images.
    """
    parts = gate_parts(model)
    batches = list(images)
    if not parts or not batches:
        raise ValueError(f"meet_cost needs gates and images; found {len(parts)} kinds of gates, {len(batches)} batches")
    with kept(model):
        first, said = _run_to_head(model, batches)
        tried: dict[float | None, float] = {None: first}
        low, high = -12.0, 12.0  # logits: gates can be very sure, and all about as much
        for _ in range(2 * HALVINGS):
            middle = (low + high) / 2
            level = 1 / (1 + math.exp(-middle))
            _set(model, level, None)
            share, says = _run_to_head(model, batches)
            if share >= first or (says == said).double().mean() >= agreement:
                tried[level] = share
            low, high = (middle, high) if share > fraction else (low, middle)
    best = min(tried, key=lambda threshold: abs(tried[threshold] - fraction))
    if best is not None:
        _set(model, best, None)
    return tried[best]


def _run_to_head(model: Any, batches: list[Tensor]) -> tuple[float, Tensor]:
    """Mean MACs of going to the head without any exit, as a share of the stock model's, and the classes found [N]."""
    device = next(model.parameters()).device
    spent, said = 0.0, []
    for x in batches:
        walk = Walk(model, x.to(device), Log(len(x)), budgeted=False)
        assert walk.macs is not None
        last = len(walk.stops) - 1
        walk.to_exit(last)
        said.append(walk.classify(last, walk.x).argmax(-1))
        macs = torch.as_tensor(walk.macs.spent + walk.macs.exit_cost(last), dtype=torch.float64)
        spent += macs.expand(len(x)).sum().item() / walk.macs.table.dense
    found = torch.cat(said)
    return spent / len(found), found


class _Search:
    """Runs of a model at some thresholds, and what they give for a target."""

    def __init__(self, model: Any, loader: Iterable[Any], use: str) -> None:
        self.model = model
        self.move_gates, self.move_exits = _movable(model, use)
        self.images = [_pair(batch) for batch in loader]
        count = sum(len(x) for x, _ in self.images)
        if count < FEWEST:
            raise ValueError(f"calibrate needs at least {FEWEST} images; found {count}")
        self.dense = table_for(model, tuple(self.images[0][0].shape[1:])).dense
        self.tolerance = 0.005
        own = [part.threshold for part in gate_parts(model)]
        self.own = own[0][0].item() if own else 0.5
        exits = getattr(model, "exits", ())
        self.levels: Sequence[float] = exits.levels if exits and not self.move_exits else (NEVER,) * len(exits)
        self.unmoved = min(self.levels, default=NEVER)
        self.tried: dict[float, list[Calibration]] = {}  # by threshold: see `_try`

    def over(self, target: float) -> Calibration:
        """The most accurate setting that meets a target.

        Each threshold is tried; between two whose cost, exits not moved, lies on either side of the target, halve.
        """
        positive("fraction", target)
        levels = list(LEVELS) if self.move_gates else [self.own]
        shares = [self._try(level)[0].fraction for level in levels]
        steps = list(zip(itertools.pairwise(levels), itertools.pairwise(shares), strict=True))
        for (low, high), (dear, cheap) in steps:
            for _ in range(HALVINGS if dear >= target >= cheap else 0):
                middle = (low + high) / 2
                levels.append(middle)
                low, high = (middle, high) if self._try(middle)[0].fraction > target else (low, middle)
        settings = [one for level in levels for one in self._try(level)]
        found = [one for one in settings if abs(one.fraction - target) <= self.tolerance]
        if not found:
            reach = [one.fraction for one in settings]
            raise OutOfReach(
                f"a mean cost of {target:.3f} of the stock model cannot be met; wanted a fraction in "
                f"{min(reach):.3f}..{max(reach):.3f}; what comes nearest is "
                f"{min(reach, key=lambda share: abs(share - target)):.3f}"
            )
        return max(found, key=lambda one: one.accuracy)

    def _try(self, level: float) -> list[Calibration]:
        """What gates at `level` give: with the exits as they stay, or without and with images that leave early."""
        if level not in self.tried:
            if self.move_gates:
                _set(self.model, level, None)
            run = _run(self.model, self.images)
            before = len(run.heads) - 1
            found = [Calibration(level, self.unmoved, *_leave(run, self.levels, self.dense))]
            for confidence in _confidences(run) if self.move_exits else ():
                found.append(Calibration(level, confidence, *_leave(run, [confidence] * before, self.dense)))
            self.tried[level] = found
        return self.tried[level]


def _pair(batch: Any) -> tuple[Tensor, Tensor]:
    """Images and labels of a batch."""
    found = batch if isinstance(batch, (tuple, list)) else (batch,)
    fits = len(found) >= 2 and all(isinstance(part, Tensor) for part in found[:2]) and found[0].dim() == 4
    if not fits or found[1].shape != found[0].shape[:1]:
        shown = ", ".join(str(list(p.shape)) if isinstance(p, Tensor) else type(p).__name__ for p in found)
        raise ValueError(f"calibrate needs batches of (images [B, C, H, W], labels [B]); found ({shown})")
    return found[0], found[1]


def _confidences(run: _Run) -> list[float]:
    """Confidences worth trying: quantiles of those met."""
    values = run.sure[:, :-1].flatten().double()
    steps = torch.linspace(0, 1, 129, dtype=torch.float64)
    return sorted({0.0, *values.quantile(steps).tolist()})


def _leave(run: _Run, levels: Sequence[float], dense: int) -> tuple[float, float]:
    """Mean share of MACs and accuracy if images leave at the first exit where they are sure enough.

    levels: for each exit before the head; above 1, none leaves there, and the exit is not evaluated.
    """
    wanted = [*levels, 0.0]
    sure = run.sure >= torch.tensor(wanted, dtype=run.sure.dtype)
    sure[:, -1] = True  # whatever the head says, a NaN too
    exit_index = sure.int().argmax(1, keepdim=True)
    asked = [head if level <= 1 else 0 for head, level in zip(run.heads, wanted, strict=True)]
    spent = run.reached + torch.tensor(asked, dtype=run.reached.dtype).cumsum(0)
    return spent.gather(1, exit_index).mean().item() / dense, run.right.gather(1, exit_index).double().mean().item()


@torch.no_grad()
def _run(model: Any, images: list[tuple[Tensor, Tensor]]) -> _Run:
    device = next(model.parameters()).device
    rows: list[tuple[Tensor, ...]] = []
    heads: tuple[int, ...] = ()
    for x, y in images:
        walk = Walk(model, x.to(device), Log(len(x)), budgeted=False)
        account, places = walk.macs, range(len(walk.stops))
        assert account is not None
        sure, right, reached = [], [], []
        for index in places:
            walk.to_exit(index)
            logits = walk.classify(index, walk.x).float()
            reached.append(torch.as_tensor(account.spent, dtype=torch.float64, device=device).expand(len(x)))
            sure.append(logits.softmax(-1).amax(-1))
            right.append(logits.argmax(-1) == y.to(device))
        heads = tuple(account.exit_cost(index) for index in places)
        rows.append((torch.stack(sure, 1), torch.stack(right, 1), torch.stack(reached, 1)))
    sure_all, right_all, reached_all = (torch.cat(column).cpu() for column in zip(*rows, strict=True))
    return _Run(sure_all, right_all, reached_all, heads)


def _set(model: Any, threshold: float | None, confidence: float | None) -> None:
    for part in gate_parts(model) if threshold is not None else ():
        part.threshold.fill_(threshold)
    if confidence is not None:
        model.exits.set_confidence([confidence] * len(model.exits))


@contextmanager
def kept(model: Any) -> Iterator[None]:
    """Eval mode without forced decisions for a while; modes, thresholds and forcing are put back."""
    forced = model.dynamic.forced
    parts = gate_parts(model)
    before = [part.threshold.clone() for part in parts]
    model.dynamic.forced = None
    try:
        with modes_kept(model):
            yield model.eval()
    finally:
        model.dynamic.forced = forced
        for part, threshold in zip(parts, before, strict=True):
            part.threshold.copy_(threshold)
