"""Takes a network through stages over accelerate, and goes on after a kill with the same numbers."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import broadcast
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from tqdm import tqdm

import data as datasets
import graphs
import results
from images import DataError
from options import Settings
from planning import STARTS
from processes import Sums, peak_memory, seed_everything, track
from run_folder import BASE, Progress, RunError, RunFolder, load_weights, read_progress, read_training
from stages import LEARNING, Outlook, Stage, add_exits
from timm_dynamic import set_execution
from timm_dynamic.evaluation import costs_of
from timm_dynamic.spreading import spread_gates

SELDOM = 0.5  # share of the images that come to an exit which it may need to pay
SPREAD_IMAGES, SMALL = 256, 64  # images of up to so many pixels a side; a quarter of that many larger ones


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
    ema: ModelEmaV3 | None
    graph: graphs.StepGraph | None = None

    @property
    def raw_optimizer(self) -> torch.optim.Optimizer:
        """The optimiser inside accelerate's."""
        return self.optimizer.optimizer


class Trainer:
    """Takes a model through the stages."""

    def __init__(
        self,
        accelerator: Accelerator,
        data: datasets.Data,
        settings: Settings,
        folder: RunFolder,
        model: nn.Module,
        teachers: Sequence[nn.Module] = (),
    ):
        self.accelerator = accelerator
        self.data = data = datasets.on_device(data, accelerator.device)
        self.settings = settings
        self.folder = folder
        self.model = self._placed(model)
        self.teachers = [self._placed(teacher) for teacher in teachers]
        self.progress = Progress()
        self.previous: dict[str, Tensor] = {}
        val_batch = max(1, results.VAL_BATCH // accelerator.num_processes) * accelerator.num_processes
        self.val = accelerator.prepare(datasets.val_loader(data, val_batch, settings.workers))
        self.images = len(data.train)  # type: ignore[arg-type]
        if settings.grad_checkpointing:
            self.model.set_grad_checkpointing(True)  # type: ignore[operator]

    def train(self, stages: tuple[Stage, ...]) -> None:
        """Run all stages, from the newest checkpoint if there is one."""
        checkpoint = self._newest_checkpoint()
        first = self.progress.stage
        for index, stage in enumerate(stages):
            if stage.surgery is not None:
                self._measure_dense()
                self._keep_base()
                seed_everything(self.settings.seed, index)
                stage.surgery(self.model, self.settings)
                self._placed(self.model)
                set_execution(self.model, "masked")
                if stage.surgery is add_exits:
                    self._judge_exits()
                if stage.surgery in (*LEARNING, *STARTS.values()) and (index > first or checkpoint is None):
                    self._spread_gates()
            if index < first:
                continue
            self._run_stage(index, stage, checkpoint if index == first else None)
        self._measure_dense()

    def _judge_exits(self) -> None:
        """Say which exits stand where little is left to save."""
        table = costs_of(self.model, self.data.input_size)
        for stop, share in zip(table.exits, table.break_even(), strict=False):
            if share > SELDOM:
                self.accelerator.print(
                    f"the exit after {stop.name} costs {stop.head / table.dense:.1%} of the dense network and saves "
                    f"something only if more than {share:.0%} of the images that come to it leave there: an earlier "
                    "place, or none, may serve better (--exits-after)"
                )

    def _placed(self, model: nn.Module) -> nn.Module:
        return model.to(self.accelerator.device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def _newest_checkpoint(self) -> Path | None:
        """The checkpoint to go on from; metrics later than it are dropped."""
        checkpoint = self.folder.newest()
        if checkpoint is not None:
            self.progress = read_progress(checkpoint)
            self.previous = read_training(checkpoint).get("previous", {})
            self.accelerator.print(f"going on from {checkpoint}")
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            self.folder.drop_rows_after(self.progress.total)
        return checkpoint

    def _spread_gates(self) -> None:
        """Let fresh layer gates tell training images apart, but for the paper's plain form."""
        if not self.settings.spread or self.settings.plain:
            return
        count = SPREAD_IMAGES if max(self.data.input_size) <= SMALL else SPREAD_IMAGES // 4
        images = torch.cat(datasets.plain_images(self.data, count)).to(self.accelerator.device)
        spread_gates(self.model, images, self.settings.spread)

    def _measure_dense(self) -> None:
        """Note what the network does before it has gates."""
        if "dense" not in self.progress.results:
            found = results.measure(self.accelerator, self.model, self.val)
            self.progress.results["dense"] = {"accuracy": found.accuracy, "macs": found.macs}

    def _keep_base(self) -> None:
        """Save the stock network, before it has gates: to compare with, and to learn from."""
        if hasattr(self.model, "dynamic"):
            return
        if self.accelerator.is_main_process and not (self.folder.root / BASE).exists():
            results.save_base(self.model, self.folder.root / BASE, self.progress.results["dense"])
        self.accelerator.wait_for_everyone()

    def _teacher(self) -> Sequence[nn.Module]:
        """The teachers that were given, or else the stock network as it was trained."""
        if self.teachers:
            return self.teachers
        if not self.settings.distill or not (self.folder.root / BASE).exists():
            return ()
        return (self._placed(timm.create_model(f"local-dir:{self.folder.root / BASE}", pretrained=True)),)

    # One stage -------------------------------------------------------------------------------------------------------

    def _run_stage(self, index: int, stage: Stage, checkpoint: Path | None) -> None:
        if checkpoint is None:
            self.progress.stage, self.progress.step, self.progress.sums = index, 0, {}
            self.progress.reached = False
        running = self._start(stage, checkpoint)
        accumulate, start = self.settings.accumulate, self.progress.step * self.settings.accumulate
        loader = self._loader(index, start, start if self.progress.reached else running.steps * accumulate)
        begun = time.perf_counter(), self.progress.step
        try:
            for batch, (x, y) in enumerate(loader, start):
                seed_everything(self.settings.seed, index, batch, self.accelerator.process_index)
                self._learn(running, x.contiguous(memory_format=torch.channels_last), y)
                if self.progress.reached:
                    break
        except (OSError, RuntimeError, DataError) as error:
            raise self._explained(error, running) from error
        finally:
            running.bar.close()
        self._check_reached(running)
        self._say_what_it_took(running, *begun)
        if running.ema is not None:
            self.model.load_state_dict(running.ema.module.state_dict())
        self.previous = dict(self._own_buffers(running.task))
        self.model.zero_grad()  # lets go of gradients in a graph's memory
        self.accelerator.free_memory()

    def _say_what_it_took(self, running: Running, begun: float, first: int) -> None:
        """Print the time of a step, evaluations included, and the most memory that was held so far."""
        steps = max(1, self.progress.step - first)
        self.accelerator.print(
            f"stage {running.stage.name}: {(time.perf_counter() - begun) / steps:.3f} s a step with its evaluations, "
            f"{peak_memory(self.accelerator.device) / 1e9:.2f} GB at most so far"
        )

    def _check_reached(self, running: Running) -> None:
        """Fail where a stage had something to reach and did not; a dry run goes on."""
        stage = running.stage
        if stage.until is None or self.progress.reached or self.settings.max_steps:
            return
        raise RunError(
            f"stage {stage.name} ended after {self.progress.step} steps with a skip ratio of "
            f"{self.progress.skip_ratio:.3f}, wanted under {stage.until}: try --stage {stage.name}.epochs=, "
            f"another {stage.name}.lr, or --gate-init open"
        )

    def _learn(self, running: Running, x: Tensor, y: Tensor) -> None:
        """One batch, and what is due after the optimiser's step if it was the last part of one."""
        if running.graph is None and self.settings.cuda_graph and graphs.takes(running.task):
            running.graph = graphs.StepGraph(self.accelerator, running.task, x, y)
        with self.accelerator.accumulate(running.task):
            if running.graph is not None:
                metrics = running.graph(x, y)
            else:
                metrics = running.task(x, y)
                self.accelerator.backward(metrics["loss"])
            largest = running.stage.largest_norm(self.settings)
            if largest and self.accelerator.sync_gradients:
                self.accelerator.clip_grad_norm_(self.model.parameters(), largest)
            running.optimizer.step()
            if running.graph is None:  # a graph writes the gradients anew
                running.optimizer.zero_grad()
        running.sums.add(metrics)
        if self.accelerator.sync_gradients:
            self.progress.step += 1
            self.progress.total += 1
            if running.ema is not None:
                running.ema.update(self.model, step=self.progress.step)
            self._after_step(running)

    def _explained(self, error: Exception, running: Running) -> Exception:
        """What a full disk, a corrupt image or a dead worker is to be called."""
        if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
            return error
        text = str(error).strip().splitlines()[-1].removeprefix(f"{DataError.__module__}.{DataError.__name__}: ")
        return RunError(f"stage {running.stage.name} stopped at step {self.progress.step}: {text}; {self._kept()}")

    def _kept(self) -> str:
        last = self.folder.newest()
        return f"the last good checkpoint is {last}" if last else "there is no checkpoint yet"

    def _start(self, stage: Stage, checkpoint: Path | None) -> Running:
        """Task, optimiser and schedule of a stage, at its start or as a checkpoint left them."""
        steps = stage.steps(self.images // self.settings.batch_size, self.settings)
        task = stage.task(self.model, self._outlook(stage, steps)).to(self.accelerator.device)
        optimizer = stage.optimizer(self.model, self.settings.plain)
        ema = ModelEmaV3(self.model, self.settings.ema, use_warmup=True) if self.settings.ema else None
        scaler = self.accelerator.scaler
        if checkpoint is not None:
            load_weights(self.model, checkpoint / "model.safetensors")
            if ema is not None:
                load_weights(ema.module, checkpoint / "ema.safetensors")
            state = read_training(checkpoint)
            optimizer.load_state_dict(state["optimizer"])
            if scaler is not None:
                scaler.load_state_dict(state["scaler"])
            for name, value in self._own_buffers(task).items():
                value.copy_(state["task"][name])
        task.train()
        if self.settings.compile:
            task.compile()
        scheduler = stage.scheduler(optimizer, steps)
        scheduler.step_update(self.progress.step)
        task, prepared = self.accelerator.prepare(task, optimizer)
        quiet = not self.accelerator.is_main_process
        bar = tqdm(total=steps, initial=self.progress.step, desc=stage.name, disable=quiet)
        sums = Sums(self.progress.sums, self.accelerator.device)
        return Running(stage, steps, task, prepared, scheduler, sums, bar, ema)

    def _outlook(self, stage: Stage, steps: int) -> Outlook:
        """What a stage's task is told."""
        size, batches = self.data.input_size, steps * self.settings.accumulate
        with self.accelerator.main_process_first():  # who measures milliseconds is alone, and all take what was found
            dense = results.price(self.model, size, self.settings, self.folder)
        return Outlook(batches, dense, size, self.settings, self.previous, stage.alpha, self._teacher)

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
            raise RunError(
                f"the loss is not finite in stage {running.stage.name} at step {self.progress.step}; {self._kept()}. "
                "Try a smaller learning rate, or --precision fp32"
            )

    def _evaluate(self, running: Running, lr: float) -> None:
        """Measure the network, and write a row of the metrics."""
        means = running.sums.take(self.accelerator)
        if running.stage.until is not None:
            self.progress.skip_ratio = means["skip_ratio"]
            self.progress.reached = means["skip_ratio"] < running.stage.until
        model = self.model if running.ema is None else running.ema.module
        for buffer in model.buffers() if self.accelerator.num_processes > 1 else ():
            broadcast(buffer)  # the batch-norm statistics that are saved are the main process's
        found = results.measure(self.accelerator, model, self.val)
        row = {
            "stage": running.stage.name,
            "step": self.progress.total,
            "accuracy": found.accuracy,
            "macs": found.macs,
            "max_macs": found.max_macs,
            "keep_ratio": found.keep_ratio,
            "channel_keep_ratio": found.channel_keep_ratio,
            "policies": found.policies,
            "policy_entropy": found.policy_entropy,
            "keep_variance": found.keep_variance,
            "macs_share_std": found.macs_share_std,
            "exits": results.by_exit(self.accelerator, model, self.val, self.data.input_size),
            "lr": lr,
            "train": means,
        }
        if self.accelerator.is_main_process:
            self.folder.add_row(row)
        track(self.accelerator, row)
        shown = {"accuracy": found.accuracy, "keep": found.keep_ratio, "macs": found.macs_share}
        running.bar.set_postfix({name: f"{value:.3f}" for name, value in shown.items()})
        running.task.train()

    def _save(self, running: Running) -> None:
        """Write a checkpoint."""
        self.progress.sums = running.sums.to_dict(self.accelerator)
        if self.accelerator.is_main_process:
            buffers = self._own_buffers(running.task)
            scaler = self.accelerator.scaler
            training = {"optimizer": running.raw_optimizer.state_dict(), "task": buffers, "previous": self.previous}
            training |= {} if scaler is None else {"scaler": scaler.state_dict()}
            weights = {"model": self.model} | ({} if running.ema is None else {"ema": running.ema.module})
            self.folder.save(weights, training, self.progress)
        self.accelerator.wait_for_everyone()


def evaluation_due(step: int, steps: int, evaluations: int) -> bool:
    """Whether one of the evaluations, evenly spaced and the last at the end, comes after a step."""
    return step * evaluations // steps > (step - 1) * evaluations // steps
