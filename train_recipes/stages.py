"""Stages: what a recipe is made of, and the parts that several recipes share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from timm.scheduler import CosineLRScheduler, MultiStepLRScheduler
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn

import timm_dynamic as td
from options import Settings
from run_folder import RunError
from timm_dynamic.tasks import GATES, BaseTask, DynamicTask, WarmupTask

CHANGEABLE = ("epochs", "iterations", "lr", "schedule", "milestones", "weight_decay", "gate_lr")


@dataclass(frozen=True)
class Outlook:
    """What a task is told about its stage.

    Attributes:
        batches: how many it will see.
        dense_macs: MACs of the stock model for one image.
        settings: of the run.
        previous: buffers of the task of the stage before.
    """

    batches: int
    dense_macs: int
    settings: Settings
    previous: dict[str, Tensor]


@dataclass(frozen=True)
class Stage:
    """One stretch of training.

    Attributes:
        name: shown, and written in every row of the metrics.
        task: what is optimised: (model, outlook) -> module with ``forward(x, y) -> dict(loss=...)``.
        surgery: changes the model before the stage.
        trains: all parameters, or those of the gates only.
        epochs: length, unless ``iterations`` is given.
        iterations: length in optimiser steps.
        lr: learning rate at the start, for SGD with momentum 0.9.
        schedule: of the learning rate: along a cosine to zero, or divided by 10 at the milestones.
        milestones: shares of the stage.
        weight_decay: on every parameter.
        gate_lr: learning rate of the gates as a share of ``lr``. Slow gates stay undecided for longer, and end up
            looking at the image instead of always open or always shut.
    """

    name: str
    task: Callable[[nn.Module, Outlook], nn.Module]
    surgery: Callable[[nn.Module, Settings], Any] | None = None
    trains: Literal["all", "gates"] = "all"
    epochs: float = 1.0
    iterations: int | None = None
    lr: float = 0.1
    schedule: Literal["cosine", "multistep"] = "cosine"
    milestones: tuple[float, ...] = (0.5, 0.75)
    weight_decay: float = 1e-4
    gate_lr: float = 1.0

    def steps(self, per_epoch: int, settings: Settings) -> int:
        """Optimiser steps of the stage."""
        wanted = self.iterations if self.iterations is not None else self.epochs * per_epoch
        steps = max(1, round(wanted * settings.epochs_scale))
        return min(steps, settings.max_steps) if settings.max_steps else steps

    def optimizer(self, model: nn.Module) -> torch.optim.SGD:
        """SGD over what the stage trains; everything else is frozen."""
        gates: list[nn.Parameter] = []
        rest: list[nn.Parameter] = []
        for name, parameter in model.named_parameters():
            is_gate = name.split(".")[0] in GATES
            parameter.requires_grad_(is_gate or self.trains == "all")
            (gates if is_gate else rest).append(parameter)
        groups = [{"params": gates, "lr_scale": self.gate_lr}] if gates else []
        groups += [{"params": rest}] if self.trains == "all" else []
        return torch.optim.SGD(groups, self.lr, momentum=0.9, weight_decay=self.weight_decay)

    def scheduler(self, optimizer: torch.optim.Optimizer, steps: int) -> Scheduler:
        """timm's scheduler for a stage of so many steps."""
        if self.schedule == "cosine":
            return CosineLRScheduler(optimizer, t_initial=steps, t_in_epochs=False)
        milestones = [round(share * steps) + 1 for share in self.milestones]  # timm compares them with t + 1
        return MultiStepLRScheduler(optimizer, decay_t=milestones, decay_rate=0.1, t_in_epochs=False)

    def changed(self, key: str, value: str) -> Stage:
        """The stage with one of its fields set from a string."""
        if key not in CHANGEABLE:
            raise RunError(f"a stage's {', '.join(CHANGEABLE)} can be changed; found {self.name}.{key}")
        if key == "schedule" and value not in ("cosine", "multistep"):
            raise RunError(f"{self.name}.schedule must be cosine or multistep; found {value!r}")
        try:
            parsed: Any = value if key == "schedule" else _numbers(key, value)
        except ValueError as error:
            raise RunError(f"{self.name}.{key} needs a number; found {value!r}") from error
        fresh: dict[str, Any] = {"iterations": None} if key == "epochs" else {}
        return dataclasses.replace(self, **fresh, **{key: parsed})

    def described(self) -> dict[str, Any]:
        """What the stage is, as JSON values."""
        return {"name": self.name, "trains": self.trains, **{key: getattr(self, key) for key in CHANGEABLE}}


def _numbers(key: str, value: str) -> int | float | tuple[float, ...]:
    if key == "milestones":
        return tuple(float(part) for part in value.strip("[]()").split(","))
    return int(value) if key == "iterations" else float(value)


def planned(stages: tuple[Stage, ...], settings: Settings) -> tuple[Stage, ...]:
    """The stages with the changes that were asked for; without the base stage where a trained base is given."""
    found = {stage.name: stage for stage in stages}
    for change in settings.stage:
        where, _, value = change.partition("=")
        name, _, key = where.partition(".")
        if name not in found or not key or not value:
            raise RunError(f"--stage needs STAGE.FIELD=VALUE with a stage of {', '.join(found)}; found {change!r}")
        found[name] = found[name].changed(key, value)
    if settings.base:
        found.pop("base", None)
    return tuple(found.values())


# What happens to the model before a stage ----------------------------------------------------------------------------


def add_layer_gates(model: nn.Module, settings: Settings) -> None:
    """Layer gates as the SkipNet paper starts them: at random."""
    td.add_layer_gates(model, td.LayerGateConfig(kind=settings.gate, init="random"))


def add_all_gates(model: nn.Module, settings: Settings) -> None:
    """Layer and channel gates (IADI)."""
    add_layer_gates(model, settings)
    td.add_channel_gates(model, td.ChannelGateConfig(init="random"))


def add_exits(model: nn.Module, settings: Settings) -> None:
    """A branch classifier after every stage but the last (DDI)."""
    td.add_exits(model)


# What a stage optimises ----------------------------------------------------------------------------------------------


def base_task(model: nn.Module, outlook: Outlook) -> nn.Module:
    """Cross entropy."""
    return BaseTask(model)


def warmup_task(model: nn.Module, outlook: Outlook) -> nn.Module:
    """Gates learn to keep everything."""
    return WarmupTask(model)


def dynamic_task(model: nn.Module, outlook: Outlook) -> nn.Module:
    """Cross entropy plus cost; a stage after another of this kind goes on with its alpha, at the target already."""
    settings = outlook.settings
    going_on = "alpha" in outlook.previous
    task = DynamicTask(
        model,
        outlook.dense_macs,
        outlook.batches,
        alpha=settings.alpha,
        target=settings.target,
        anneal=0.0 if going_on else 0.5,
    )
    if going_on:
        task.alpha.copy_(outlook.previous["alpha"])
    return task
