"""Devices, processes, random numbers, sums over processes, and trackers."""

from __future__ import annotations

import importlib.util
import resource
import sys
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from torch import Tensor

from options import Settings
from run_folder import RunError


def make_accelerator(settings: Settings) -> Accelerator:
    """Devices, processes, precision, accumulation and trackers, as asked for."""
    missing = [name for name in settings.tracker if importlib.util.find_spec(name) is None]
    if missing:
        raise RunError(f"--tracker {missing[0]} needs its package: pip install {missing[0]}")
    accelerator = Accelerator(
        mixed_precision={"bf16": "bf16", "fp16": "fp16"}.get(settings.precision, "no"),
        gradient_accumulation_steps=settings.accumulate,
        dataloader_config=DataLoaderConfiguration(split_batches=True),
        log_with=list(settings.tracker) or None,
        project_dir=str(settings.folder),
    )
    if settings.batch_size % (settings.accumulate * accelerator.num_processes):
        raise RunError(
            f"--batch-size {settings.batch_size} must be a multiple of --accumulate {settings.accumulate} times "
            f"{accelerator.num_processes} processes"
        )
    if settings.cuda_graph and accelerator.num_processes > 1:
        raise RunError(f"--cuda-graph is for one process; found {accelerator.num_processes}")
    if settings.threads:
        torch.set_num_threads(settings.threads)
    return accelerator


def start_trackers(accelerator: Accelerator, settings: Settings) -> None:
    """Tell the trackers what is run."""
    if settings.tracker:
        config = {k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in settings.fixed().items()}
        accelerator.init_trackers(settings.folder.name, config=config)


def track(accelerator: Accelerator, row: dict[str, Any]) -> None:
    """Log the numbers of a row of the metrics."""
    numbers = {key: value for key, value in row.items() if isinstance(value, (int, float))}
    numbers |= {f"train/{key}": value for key, value in row["train"].items()}
    accelerator.log(numbers, step=row["step"])


def seed_everything(*entropy: int) -> None:
    """Seed torch from several numbers, so that what follows depends on nothing that came before."""
    torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1)[0]))


def peak_memory(device: torch.device) -> int:
    """Most bytes that were held so far: on a GPU by tensors, else by the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


class Sums:
    """Sums of the metrics of batches, kept on the device."""

    def __init__(self, start: dict[str, float], device: torch.device):
        self.device = device
        self.dtype = torch.float32 if device.type == "mps" else torch.float64
        self.values = {name: torch.tensor(value, dtype=self.dtype, device=device) for name, value in start.items()}

    def add(self, metrics: dict[str, Tensor]) -> None:
        """Count one batch in."""
        for name, value in {**metrics, "count": torch.ones((), device=self.device)}.items():
            self.values[name] = self.values.get(name, 0.0) + value.detach().to(self.dtype)

    def to_dict(self, accelerator: Accelerator) -> dict[str, float]:
        """The sums as numbers, the same in all processes: their mean, of which each goes on when the run is resumed."""
        return {name: value.item() for name, value in accelerator.reduce(self.values, reduction="mean").items()}

    def take(self, accelerator: Accelerator) -> dict[str, float]:
        """Means over batches and processes; the sums start again at zero."""
        total = accelerator.reduce(self.values, reduction="sum")
        self.values = {}
        return {name: (value / total["count"]).item() for name, value in total.items() if name != "count"}
