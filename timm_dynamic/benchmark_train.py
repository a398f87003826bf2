"""What a training step costs: the stock network's, with gates (SP), and by reinforcement (HRL), side by side."""

from __future__ import annotations

import copy
import dataclasses
import random
import statistics
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .benchmark import WARM, Benchmark, Watch, drawn
from .budgets import default_input_size, set_budget
from .forcing import Forced
from .reinforcement import ReinforceTask
from .surgery import strip
from .tasks import BaseTask, DynamicTask
from .timing import Clock, peak_bytes
from .walk import table_for


@dataclass(frozen=True)
class TrainRow:
    """A training step: forward, backward and a step of SGD. Times are medians, for one image.

    Attributes:
        task: "base", the stock network; "SP", supervised with gates; "HRL", reinforcement with a greedy baseline and
            still batch norms.
        batch: images in a step.
        keep: share of the gated units that runs, forced; None where the gates decide.
        dtype: of autocast; float32 for none.
        ms: wall clock.
        spread: between the quartiles of `ms`.
        device_ms: as in `benchmark.Row`.
        ratio: to the base's step, by wall clock.
        ratio_device: the same by `device_ms`.
        peak_mb: megabytes of weights, and of tensors at most at once in a step.
    """

    task: str
    batch: int
    keep: float | None
    dtype: str
    ms: float
    spread: float
    device_ms: float
    ratio: float
    ratio_device: float
    peak_mb: float

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values."""
        return dataclasses.asdict(self)


class _Step:
    """A step of one task, again and again with the same images."""

    def __init__(self, task: nn.Module, x: Tensor, y: Tensor, keep: float | None) -> None:
        self.task, self.x, self.y, self.keep = task.train(), x, y, keep
        self.dtype: torch.dtype | None = None
        self.optimizer = torch.optim.SGD(task.parameters(), lr=1e-4, momentum=0.9, weight_decay=1e-4)
        self.times: list[tuple[float, float]] = []

    def __call__(self) -> None:
        low = self.dtype not in (None, torch.float32)
        with torch.autocast(self.x.device.type, self.dtype) if low else nullcontext():
            loss = self.task(self.x, self.y)["loss"]
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def median(self, place: int) -> float:
        return statistics.median(pair[place] for pair in self.times)


def benchmark_training(
    model: Any,
    config: Benchmark | None = None,
    keeps: Sequence[float | None] = (None,),
    dtype: str | None = None,
    watch: Watch = iter,
) -> list[TrainRow]:
    """Time training steps on random images, channels-last, in interleaved rounds.

    Args:
        model: a dynamic network with layer gates; it is not changed.
        config: its batch sizes, input size, rounds, threads and device are used.
        keeps: shares of the gated units that run, drawn once and forced; None lets the gates decide, which run all in
            a fresh network.
        dtype: of autocast, "float32" for none; None for bfloat16 where that is faster.
        watch: as for `benchmark.benchmark`.

    Returns:
        For each batch size a row of the base, and one of SP and HRL for each keep ratio.

    Raises:
        ValueError: if the model has no layer gates.
    """
    config = config or Benchmark(batch_sizes=(128,))
    if not hasattr(model, "layer_gates"):
        raise ValueError("training steps of SP and HRL need layer gates; the network has none")
    model = copy.deepcopy(model).to(config.device, memory_format=torch.channels_last)
    set_budget(model)
    before = torch.get_num_threads()
    torch.set_num_threads(config.threads or before)
    try:
        return [row for batch in config.batch_sizes for row in _race(model, batch, config, keeps, dtype, watch)]
    finally:
        torch.set_num_threads(before)


def _race(
    model: Any, batch: int, config: Benchmark, keeps: Sequence[float | None], dtype: str | None, watch: Watch
) -> list[TrainRow]:
    """The rows of one batch size."""
    clock = Clock(config.device, config.threads or torch.get_num_threads())
    steps = _steps(model, batch, config, keeps)
    base = steps[0][1]
    chosen = getattr(torch, dtype) if dtype is not None else _faster(base, clock)
    for _, step in steps:
        step.dtype = chosen
    order = random.Random(0)
    for r in watch(range(-WARM, config.rounds)):
        for _, step in order.sample(steps, len(steps)):
            times = clock.time(step)
            if r >= 0:
                step.times.append(times)
    return [_row(name, step, base, batch, clock) for name, step in steps]


def _steps(
    model: Any, batch: int, config: Benchmark, keeps: Sequence[float | None] = (None,)
) -> list[tuple[str, _Step]]:
    """The base's step, then those of each other task at each keep ratio."""
    size = config.input_size or default_input_size(model)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, *size, generator=generator).to(config.device, memory_format=torch.channels_last)
    y = torch.arange(batch, device=config.device) % model.num_classes
    dense, many = float(table_for(model, size).dense), 10**9
    found = [("base", _Step(BaseTask(strip(copy.deepcopy(model))), x, y, None))]
    for keep in keeps:
        tasks = {
            "SP": DynamicTask(copy.deepcopy(model), dense, many, alpha=0.1),
            "HRL": ReinforceTask(copy.deepcopy(model), dense, many, alpha=0.1),
        }
        for name, task in tasks.items():
            if keep is not None:
                layers = drawn(model, batch, keep, 1.0, None, generator)["layer_keep"]
                task.model.dynamic.forced = Forced(layer_keep=layers)  # type: ignore[union-attr]
            found.append((name, _Step(task, x, y, keep)))
    return found


def _faster(step: _Step, clock: Clock) -> torch.dtype:
    """bfloat16 where a step is faster in it."""
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        step.dtype = dtype
        found[dtype] = min(clock.time(step)[0] for _ in range(3))
    return min(found, key=lambda dtype: found[dtype])


def _row(name: str, step: _Step, base: _Step, batch: int, clock: Clock) -> TrainRow:
    wall, device = step.median(0), step.median(1)
    quartiles = statistics.quantiles([pair[0] for pair in step.times], n=4) if len(step.times) > 1 else [wall] * 3
    return TrainRow(
        task=name,
        batch=batch,
        keep=step.keep,
        dtype=str(step.dtype).removeprefix("torch."),
        ms=wall / batch,
        spread=(quartiles[2] - quartiles[0]) / batch,
        device_ms=device / batch,
        ratio=wall / base.median(0),
        ratio_device=device / base.median(1),
        peak_mb=(peak_bytes(step.task, step, clock.cuda) or 0) / 1e6,
    )
