"""Leaving early: who leaves at which exit, and what they leave with."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import costs, families
from .configs import BudgetConfig
from .exits import confident
from .walk import Walk

ROUNDING = 1 + 1e-9  # sums of milliseconds or millijoules depend on their order in the last digits


class Rule:
    """Who leaves at an exit: by budget, or because it is forced."""

    def __init__(self, walk: Walk, budget: BudgetConfig | None, batch: int) -> None:
        self.walk, self.budget = walk, budget
        self.levels: Sequence[float] | None = None  # for each exit how sure an image that leaves is
        if budget is not None and budget.confidence is not None:
            self.levels = [budget.confidence] * len(walk.stops)
        elif budget is None and walk.exits is not None and walk.exits.calibrated:
            self.levels = walk.exits.levels
        if budget is not None or self.levels is not None:
            check_classes(walk.model)
        self.most: Tensor | None = None  # [B], what an image may cost
        if budget is not None and walk.limit is not None:
            self.most = allowance(budget, walk.limit.table, batch).to(walk.x.device)

    def leaving(self, index: int) -> tuple[Tensor, Tensor | None]:
        """Bool over the images in `walk.x`, and the exit's logits of all of them if it had to be evaluated."""
        walk, logits = self.walk, None
        last = index == len(walk.stops) - 1
        leave = torch.full((walk.images(),), last, dtype=torch.bool, device=walk.x.device)
        if last:
            return (leave if walk.alive is None else walk.alive), None
        forced = None if walk.forced is None else walk.forced.exit
        if forced is not None:
            leave = leave | (walk.mine(forced) <= index)
        if self.most is not None:
            assert walk.limit is not None
            leave = leave | (walk.limit.spent + walk.limit.table.segment(index + 1) > walk.mine(self.most))
        elif self.budget is not None and self.budget.exit is not None:
            leave = leave | (self.budget.exit <= index)
        elif self.levels is not None and self.levels[index] <= 1:
            logits = walk.classify(index, walk.x)
            walk.pay_exit(index)
            if forced is None:
                leave = leave | confident(logits, self.levels[index])
        return (leave if walk.alive is None else leave & walk.alive), logits


def check_classes(model: Any) -> None:
    """Whether the exits know the classes of the model's own head, which may have been put there by hand.

    Raises:
        ValueError: if they do not.
    """
    head = families.classes(model)
    for exit in model.exits.heads if hasattr(model, "exits") else ():
        if getattr(exit.fc, "out_features", 0) != head:
            raise ValueError(
                f"the exits must know the {head} classes of the head; found {getattr(exit.fc, 'out_features', 0)}: "
                "give the network its classifier before add_exits, or by reset_classifier"
            )


def allowance(budget: BudgetConfig, table: costs.CostTable, batch: int | None) -> Tensor:
    """What each image may cost, in the table's unit.

    Args:
        budget: one that bounds each image.
        table: for the input size at hand.
        batch: number of images, or None to check the values only.

    Returns:
        [B], or [values] if `batch` is None; int64 for MACs.

    Raises:
        ValueError: if it is less than the dearest way to the first exit, or of the wrong length.
    """
    given = int(table.dense * budget.fraction) if budget.fraction is not None else getattr(budget, table.unit)
    whole = table.unit == "macs"
    most = torch.as_tensor(given if whole else given * ROUNDING, dtype=torch.int64 if whole else torch.float64)
    if most.dim() and batch is not None and len(most) != batch:
        raise ValueError(f"the budget has one value for each of {len(most)} images; found a batch of {batch}")
    least = table.exits[0].dearest
    smallest = min(given) if isinstance(given, Sequence) else given
    if smallest < least:
        share = math.ceil(least / table.dense * 1e4) / 1e4
        raise ValueError(
            f"a budget of {smallest} {_NAMES[table.unit]} is too small: at input size {table.input_size} the "
            f"dearest way to the first exit costs {least} {_NAMES[table.unit]} (fraction {share:.4f} of the stock "
            "model), the smallest budget possible"
        )
    return most if batch is None else most.expand(batch)


_NAMES = {"macs": "MACs", "latency_ms": "ms", "energy_mj": "mJ"}


def leave_early(walk: Walk, batch: int, keep_all: bool = False) -> tuple[Tensor, list[Tensor | None], Any, Any]:
    """Walk until every image has left; without classes, and in a graph of torch.fx, all go to the head.

    Returns:
        Logits [B, classes]; those of each exit if `keep_all`; exit index and MACs of each image.
    """
    budget = walk.model.dynamic.budget
    calibrated = walk.exits is not None and walk.exits.calibrated
    if walk.whole or (budget is None and not calibrated and (walk.forced is None or walk.forced.exit is None)):
        last = len(walk.stops) - 1
        walk.to_exit(last)
        logits = walk.classify(last, walk.x)
        walk.pay_exit(last)
        return logits, [None] * last + [logits], last, walk.macs.spent if walk.macs else None
    rule = Rule(walk, budget, batch)
    done = Results(batch, len(walk.stops), keep_all)
    for index in range(len(walk.stops)):
        walk.to_exit(index)
        leave, evaluated = rule.leaving(index)
        if not walk.masked and not bool(leave.any()) and index < len(walk.stops) - 1:
            done.see(walk, index, evaluated)
            continue
        done.take(walk, index, leave, evaluated)
        walk.drop(leave)
        if not walk.masked and walk.images() == 0:
            break
    return done.logits, done.exit_logits, done.exit_index, done.macs  # type: ignore[return-value]


class Results:
    """Logits and costs of the images that have left."""

    def __init__(self, batch: int, exits: int, keep_all: bool) -> None:
        self.batch, self.keep_all = batch, keep_all
        self.logits: Tensor | None = None
        self.exit_logits: list[Tensor | None] = [None] * exits
        self.exit_index: Tensor | None = None
        self.macs: Tensor | None = None

    def see(self, walk: Walk, index: int, logits: Tensor | None) -> None:
        """Note the logits of an exit that was evaluated for the images still on their way."""
        if logits is not None and self.keep_all:
            here = walk.alive if walk.masked else walk.rows
            self.exit_logits[index] = self._put(self.exit_logits[index], here, logits, float("nan"))

    def take(self, walk: Walk, index: int, leave: Tensor, logits: Tensor | None) -> None:
        """Classify the images that leave here, and keep what they got and spent."""
        self.see(walk, index, logits)
        everyone = not walk.masked and bool(leave.all())
        evaluated = logits is not None
        if logits is None:
            logits = walk.classify(index, walk.x if walk.masked or everyone else walk.x[leave])
        elif not walk.masked:
            logits = logits[leave]
        here = self._places(walk, leave, everyone)
        self.logits = self._put(self.logits, here, logits, 0.0)
        if self.keep_all and not evaluated:
            self.exit_logits[index] = self._put(self.exit_logits[index], here, logits, float("nan"))
        numbers = torch.full_like(logits[:, 0], index, dtype=torch.int64)
        self.exit_index = self._put(self.exit_index, here, numbers, 0)
        if walk.macs is not None:
            spent = torch.as_tensor(walk.macs.spent, device=logits.device).expand(walk.images())
            spent = spent if walk.masked or everyone else spent[leave]
            spent = spent if evaluated else spent + walk.macs.exit_cost(index)
            self.macs = self._put(self.macs, here, spent, 0)

    def _places(self, walk: Walk, leave: Tensor, everyone: bool) -> Tensor | None:
        """Where in the batch those are who leave: bool [B] while masked, which waits for no value; None for all."""
        if walk.masked:
            return leave
        if walk.rows is None:
            return None if everyone else leave.nonzero().flatten()
        return walk.rows if everyone else walk.rows[leave]

    def _put(self, into: Tensor | None, here: Tensor | None, values: Tensor, empty: float) -> Tensor:
        """Values in their places: bool over all images, indices of some, or None for all of them."""
        if here is None and into is None:
            return values
        if here is not None and here.dtype == torch.bool:
            here = here.reshape(-1, *[1] * (values.dim() - 1))
            return torch.where(here, values, empty if into is None else into)
        if into is None:
            into = torch.full((self.batch, *values.shape[1:]), empty, dtype=values.dtype, device=values.device)
        into[slice(None) if here is None else here] = values
        return into
