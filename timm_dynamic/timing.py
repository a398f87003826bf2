"""Time and memory of a call."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Clock:
    """Measures work by the wall clock, and by the device's own."""

    def __init__(self, device: str, threads: int) -> None:
        self.device = torch.device(device)
        self.cuda = self.device.type == "cuda"
        self.own = time.thread_time if threads == 1 else time.process_time

    def time(self, work: Callable[[], Any], calls: int = 1) -> tuple[float, float]:
        """Milliseconds of some calls."""
        if self.cuda:
            with torch.cuda.device(self.device):
                return self._time_cuda(work, calls)
        wall, own = time.perf_counter(), self.own()
        for _ in range(calls):
            work()
        return (time.perf_counter() - wall) * 1e3, (self.own() - own) * 1e3

    def _time_cuda(self, work: Callable[[], Any], calls: int) -> tuple[float, float]:
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        wall = time.perf_counter()
        first.record()
        for _ in range(calls):
            work()
        last.record()
        torch.cuda.synchronize()
        return (time.perf_counter() - wall) * 1e3, first.elapsed_time(last)


def distance(found: Tensor, wanted: Tensor) -> float:
    """The largest difference of logits, relative to the largest wanted one."""
    found, wanted = found.double().cpu(), wanted.double().cpu()
    return ((found - wanted).abs().max() / wanted.abs().max().clamp_min(1e-12)).item()


def peak_bytes(model: Any, run: Callable[[], Any], cuda: bool) -> int | None:
    """Bytes of a model's tensors, and of those that live at once in a call; None if torch does not hold the model."""
    if not isinstance(model, nn.Module):
        return None
    held = {id(t): t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers())}
    slices = getattr(getattr(model, "dynamic", None), "slices", None) or {}
    held |= {id(t): t.numel() * t.element_size() for pair in slices.values() for t in pair if t is not None}
    if not cuda:
        return sum(held.values()) + _peak_cpu(run)
    with torch.cuda.device_of(next(model.parameters())):
        return sum(held.values()) + _peak_cuda(run)


def _peak_cuda(run: Callable[[], Any]) -> int:
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    return torch.cuda.max_memory_allocated() - before


def _peak_cpu(run: Callable[[], Any]) -> int:
    """Sums what torch's allocator gives and takes back."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    found: Any = profile.profiler
    moves = [(e.start_ns(), e.nbytes()) for e in found.kineto_results.events() if e.name() == "[memory]"]
    level = peak = 0
    for _, nbytes in sorted(moves, key=lambda move: move[0]):
        level += nbytes
        peak = max(peak, level)
    return peak
