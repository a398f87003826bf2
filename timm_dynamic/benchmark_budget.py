"""Whether budgets of milliseconds hold: images one at a time, each with decisions of its own."""

from __future__ import annotations

import copy
import dataclasses
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .benchmark import DTYPES, WARM, Benchmark, Watch, drawn, made_for
from .budgets import default_input_size, set_budget
from .forward import decide
from .measure import cost_table
from .surgery import force
from .timing import Clock

KEEPING = ("skipping", "optimised")  # engines
STEPS = (0.25, 0.5, 0.75, 1.0)  # budgets: so far from the dearest way to the first exit to the dearest way to the head


@dataclass(frozen=True)
class BudgetRow:
    """Images one at a time under a budget of milliseconds.

    Attributes:
        engine: how the network runs, a name in `benchmark.ENGINES`.
        budget_ms: what an image may cost.
        images: how many were timed.
        median_ms: wall clock of one.
        p95_ms: the 95th percentile.
        p95_device_ms: the same by the device's own time; see `benchmark.Row`.
        over: share of the images that took longer than the budget.
        exits: share of the images that left at each exit, the head last.
        holds: whether the 95th percentile is within the budget.
    """

    engine: str
    budget_ms: float
    images: int
    median_ms: float
    p95_ms: float
    p95_device_ms: float
    over: float
    exits: tuple[float, ...]
    holds: bool

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values."""
        return dataclasses.asdict(self)


@dataclass
class _Case:
    """An engine under a budget."""

    engine: str
    model: Any
    budget: float
    times: list[tuple[float, float]] = field(default_factory=list)
    left: list[int] = field(default_factory=list)


def benchmark_budgets(
    model: Any, config: Benchmark | None = None, budgets: Sequence[float] = (), watch: Watch = iter
) -> list[BudgetRow]:
    """Time images one at a time under budgets of milliseconds.

    Every image has decisions of its own, drawn with a keep ratio out of ``config.keeps``. Each engine has its own table
    of latencies, measured first; cases take turns in an order that changes.

    Args:
        model: a dynamic network with exits; it is not changed. Its weights should not be zero: see `awaken`.
        config: its engines "skipping" and "optimised", keeps, input size, rounds (images of each case, default 100),
            threads, dtype and device are used.
        budgets: in ms; without any, four between what the network needs for its first exit and for its head.
        watch: is given the rounds and gives them back: for a progress bar.

    Raises:
        ValueError: if the network has no exits, no engine is left, or a budget is less than its first exit needs.
    """
    config = config or Benchmark(rounds=100)
    if not hasattr(model, "exits"):
        raise ValueError("a budget of milliseconds is kept by leaving early: a network with exits is needed")
    engines = [engine for engine in config.engines if engine in KEEPING]
    if not engines:
        raise ValueError(f"budgets of milliseconds are timed for {' and '.join(KEEPING)}; found {config.engines}")
    size = config.input_size or default_input_size(model)
    before = torch.get_num_threads()
    torch.set_num_threads(config.threads or before)
    try:
        plain = set_budget(copy.deepcopy(model).eval().to(config.device, DTYPES[config.dtype]))
        cases = _cases(plain, engines, size, budgets)
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(1, *size, generator=generator).to(config.device, DTYPES[config.dtype])
        clock, order = Clock(config.device, config.threads or before), random.Random(0)
        for r in watch(range(-WARM, config.rounds)):
            forced = drawn(plain, 1, order.choice(config.keeps), config.channel_keep, None, generator)
            for case in order.sample(cases, len(cases)):
                _time(case, x, forced, clock, counted=r >= 0)
    finally:
        torch.set_num_threads(before)
    return [_row(case, len(model.exits) + 1) for case in cases]


def _cases(plain: Any, engines: Sequence[str], size: tuple[int, int, int], budgets: Sequence[float]) -> list[_Case]:
    """Every engine under every budget."""
    found = []
    for engine in engines:
        model = made_for(engine, plain)
        table = cost_table(model, size, "latency_ms")
        low, high = table.exits[0].dearest, max(stop.dearest for stop in table.exits)  # a part may be mismeasured
        for budget in budgets or [low + step * (high - low) for step in STEPS]:
            own = copy.deepcopy(model)
            set_budget(own, latency_ms=budget, input_size=size, table=table)
            found.append(_Case(engine, own, budget))
    return found


def _time(case: _Case, x: Tensor, forced: dict[str, Any], clock: Clock, counted: bool) -> None:
    """Run one image; the exit that it took is looked up after the clock has stopped."""
    with torch.inference_mode(), force(case.model, **forced):
        times = clock.time(lambda: case.model(x))
        if counted:
            case.times.append(times)
            case.left.append(int(decide(case.model, x).exit_index))


def _row(case: _Case, exits: int) -> BudgetRow:
    wall, own = (sorted(pair[place] for pair in case.times) for place in (0, 1))
    place = min(len(wall) - 1, int(0.95 * len(wall)))
    return BudgetRow(
        engine=case.engine,
        budget_ms=case.budget,
        images=len(wall),
        median_ms=statistics.median(wall),
        p95_ms=wall[place],
        p95_device_ms=own[place],
        over=sum(ms > case.budget for ms in wall) / len(wall),
        exits=tuple(case.left.count(k) / len(case.left) for k in range(exits)),
        holds=wall[place] <= case.budget,
    )
