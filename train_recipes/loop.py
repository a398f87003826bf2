"""One loop that runs the stages of a recipe over accelerate, and goes on after a kill with the same numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DataLoaderConfiguration, broadcast
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn
from tqdm import tqdm

import data as datasets
import results
from options import Settings
from run_folder import Progress, RunError, RunFolder, load_weights, read_progress, read_training
from stages import Outlook, Stage, planned
from timm_dynamic import set_execution
from timm_dynamic.evaluation import costs_of

VAL_BATCH = 256


def run(stages: tuple[Stage, ...], settings: Settings) -> None:
    """Train a network through the stages and leave the run's folder complete."""
    accelerator = make_accelerator(settings)
    folder = RunFolder(settings.folder)
    stages = planned(stages, settings)
    fixed = {**settings.fixed(), "stages": [stage.described() for stage in stages]}
    folder.check(fixed, settings.resume)
    if folder.finished():
        accelerator.print(f"{folder.root} holds a finished run: nothing to do")
        return
    with accelerator.main_process_first():
        data = datasets.load(
            settings.dataset, settings.data_dir, settings.download, results.image_size(settings), settings.seed
        )
    seed_everything(settings.seed)
    model = results.base_model(settings, data)
    if accelerator.is_main_process:
        folder.create(fixed)
    accelerator.wait_for_everyone()
    trainer = Trainer(accelerator, data, settings, folder, model)
    trainer.train(stages)
    results.finish(accelerator, trainer.model, trainer.val, data, settings, folder, trainer.progress.results["dense"])
    accelerator.end_training()


def make_accelerator(settings: Settings) -> Accelerator:
    """Devices, processes, precision and accumulation, as asked for."""
    accelerator = Accelerator(
        mixed_precision="bf16" if settings.precision == "bf16" else "no",
        gradient_accumulation_steps=settings.accumulate,
        dataloader_config=DataLoaderConfiguration(split_batches=True),
    )
    if settings.batch_size % (settings.accumulate * accelerator.num_processes):
        raise RunError(
            f"--batch-size {settings.batch_size} must be a multiple of --accumulate {settings.accumulate} times "
            f"{accelerator.num_processes} processes"
        )
    if settings.threads:
        torch.set_num_threads(settings.threads)
    return accelerator


def seed_everything(*entropy: int) -> None:
    """Seed torch from several numbers, so that what follows depends on nothing that came before."""
    torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1)[0]))


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

    def to_dict(self) -> dict[str, float]:
        """The sums as numbers."""
        return {name: value.item() for name, value in self.values.items()}

    def take(self, accelerator: Accelerator) -> dict[str, float]:
        """Means over batches and processes; the sums start again at zero."""
        total = accelerator.reduce(self.values, reduction="sum")
        self.values = {}
        return {name: (value / total["count"]).item() for name, value in total.items() if name != "count"}


@dataclass
class Running:
    """A stage while it runs."""

    stage: Stage
    steps: int
    task: nn.Module
    optimizer: AcceleratedOptimizer
    scheduler: Scheduler
    sums: Sums
    bar: Any

    @property
    def raw_optimizer(self) -> torch.optim.Optimizer:
        """The optimiser inside accelerate's."""
        return self.optimizer.optimizer


class Trainer:
    """Takes a model through the stages."""

    def __init__(
        self, accelerator: Accelerator, data: datasets.Data, settings: Settings, folder: RunFolder, model: nn.Module
    ):
        self.accelerator = accelerator
        self.data = data
        self.settings = settings
        self.folder = folder
        self.model = self._placed(model)
        self.progress = Progress()
        self.previous: dict[str, Tensor] = {}
        val_batch = max(1, VAL_BATCH // accelerator.num_processes) * accelerator.num_processes
        self.val = accelerator.prepare(datasets.val_loader(data, val_batch, settings.workers))
        self.images = len(data.train)  # type: ignore[arg-type]

    def train(self, stages: tuple[Stage, ...]) -> None:
        """Run all stages, from the newest checkpoint if there is one."""
        checkpoint = self._newest_checkpoint()
        first = self.progress.stage
        for index, stage in enumerate(stages):
            if stage.surgery is not None:
                self._measure_dense()
                seed_everything(self.settings.seed, index)
                stage.surgery(self.model, self.settings)
                self._placed(self.model)
                set_execution(self.model, "masked")
            if index < first:
                continue
            self._run_stage(index, stage, checkpoint if index == first else None)
        self._measure_dense()

    def _placed(self, model: nn.Module) -> nn.Module:
        return model.to(self.accelerator.device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def _newest_checkpoint(self) -> Path | None:
        """The checkpoint to go on from; metrics later than it are dropped."""
        checkpoint = self.folder.newest()
        if checkpoint is not None:
            self.progress = read_progress(checkpoint)
            self.accelerator.print(f"going on from {checkpoint}")
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            self.folder.drop_rows_after(self.progress.total)
        return checkpoint

    def _measure_dense(self) -> None:
        """Note what the network does before it has gates."""
        if "dense" not in self.progress.results:
            found = results.measure(self.accelerator, self.model, self.val)
            self.progress.results["dense"] = {"accuracy": found.accuracy, "macs": found.macs}

    # One stage -------------------------------------------------------------------------------------------------------

    def _run_stage(self, index: int, stage: Stage, checkpoint: Path | None) -> None:
        if checkpoint is None:
            self.progress.stage, self.progress.step, self.progress.sums = index, 0, {}
        running = self._start(stage, checkpoint)
        accumulate, start = self.settings.accumulate, self.progress.step * self.settings.accumulate
        loader = self._loader(index, start, running.steps * accumulate)
        for batch, (x, y) in enumerate(loader, start):
            seed_everything(self.settings.seed, index, batch, self.accelerator.process_index)
            with self.accelerator.accumulate(running.task):
                metrics = running.task(x.contiguous(memory_format=torch.channels_last), y)
                self.accelerator.backward(metrics["loss"])
                running.optimizer.step()
                running.optimizer.zero_grad()
            running.sums.add(metrics)
            if self.accelerator.sync_gradients:
                self.progress.step += 1
                self.progress.total += 1
                self._after_step(running)
        running.bar.close()
        self.previous = dict(self._own_buffers(running.task))
        self.accelerator.free_memory()

    def _start(self, stage: Stage, checkpoint: Path | None) -> Running:
        """Task, optimiser and schedule of a stage, at its start or as a checkpoint left them."""
        steps = stage.steps(self.images // self.settings.batch_size, self.settings)
        dense = costs_of(self.model, self.data.input_size).dense
        task = stage.task(self.model, Outlook(steps * self.settings.accumulate, dense, self.settings, self.previous))
        task.to(self.accelerator.device)
        optimizer = stage.optimizer(self.model)
        if checkpoint is not None:
            load_weights(self.model, checkpoint / "model.safetensors")
            state = read_training(checkpoint)
            optimizer.load_state_dict(state["optimizer"])
            for name, value in self._own_buffers(task).items():
                value.copy_(state["task"][name])
        task.train()
        scheduler = stage.scheduler(optimizer, steps)
        scheduler.step_update(self.progress.step)
        task, prepared = self.accelerator.prepare(task, optimizer)
        bar = tqdm(
            total=steps, initial=self.progress.step, desc=stage.name, disable=not self.accelerator.is_main_process
        )
        return Running(stage, steps, task, prepared, scheduler, Sums(self.progress.sums, self.accelerator.device), bar)

    def _own_buffers(self, task: nn.Module) -> dict[str, Tensor]:
        """Buffers of a task that are not the model's."""
        task = self.accelerator.unwrap_model(task)
        return dict(task.named_buffers(recurse=False))

    def _loader(self, index: int, start: int, stop: int) -> Any:
        """Batches ``start`` to ``stop`` of a stage, each process its part."""
        size = self.settings.batch_size // self.settings.accumulate
        # Each stage has its own orders: epochs of stage s count from 100000 * s.
        batches = datasets.Batches(self.images, size, start, stop, self.settings.seed, 100_000 * index)
        return self.accelerator.prepare(datasets.train_loader(self.data, batches, self.settings.workers))

    # After a step ----------------------------------------------------------------------------------------------------

    def _after_step(self, running: Running) -> None:
        step, lr = self.progress.step, running.raw_optimizer.param_groups[-1]["lr"]
        running.scheduler.step_update(step)
        running.bar.update()
        due = evaluation_due(step, running.steps, self.settings.evaluations)
        save = self.settings.checkpoint_every and step % self.settings.checkpoint_every == 0
        if due or save or self.accelerator.device.type == "cpu" or step % 10 == 0:
            self._check_finite(running, due or bool(save))
        if due:
            self._evaluate(running, lr)
        if due or save:
            self._save(running)

    def _check_finite(self, running: Running, weights_too: bool) -> None:
        """Stop where the loss, or a weight, is no longer a number."""
        total = self.accelerator.reduce(running.sums.values["loss"].clone(), reduction="sum").item()
        fine = math.isfinite(total)
        if weights_too:
            fine = fine and all(bool(torch.isfinite(p).all()) for p in self.model.parameters())
        if not fine:
            running.bar.close()
            last = self.folder.newest()
            kept = f"the last good checkpoint is {last}" if last else "there is no checkpoint yet"
            raise RunError(
                f"the loss is not finite in stage {running.stage.name} at step {self.progress.step}; {kept}. "
                "Try a smaller learning rate, or --precision fp32"
            )

    def _evaluate(self, running: Running, lr: float) -> None:
        """Measure the network, and write a row of the metrics."""
        means = running.sums.take(self.accelerator)
        for buffer in self.model.buffers() if self.accelerator.num_processes > 1 else ():
            broadcast(buffer)  # the batch-norm statistics that are saved are the main process's
        found = results.measure(self.accelerator, self.model, self.val)
        row = {
            "stage": running.stage.name,
            "step": self.progress.total,
            "accuracy": found.accuracy,
            "macs": found.macs,
            "max_macs": found.max_macs,
            "keep_ratio": found.keep_ratio,
            "channel_keep_ratio": found.channel_keep_ratio,
            "policies": found.policies,
            "keep_variance": found.keep_variance,
            "macs_share_std": found.macs_share_std,
            "exits": results.by_exit(self.accelerator, self.model, self.val, self.data.input_size),
            "lr": lr,
            "train": means,
        }
        if self.accelerator.is_main_process:
            self.folder.add_row(row)
        running.bar.set_postfix(accuracy=f"{found.accuracy:.4f}", macs=f"{found.macs_share:.2f}")
        running.task.train()

    def _save(self, running: Running) -> None:
        """Write a checkpoint."""
        self.progress.sums = running.sums.to_dict()
        if self.accelerator.is_main_process:
            buffers = self._own_buffers(running.task)
            self.folder.save(self.model, running.raw_optimizer.state_dict(), buffers, self.progress)
        self.accelerator.wait_for_everyone()


def evaluation_due(step: int, steps: int, evaluations: int) -> bool:
    """Whether one of the evaluations, evenly spaced and the last at the end, comes after a step."""
    return step * evaluations // steps > (step - 1) * evaluations // steps
