"""Stages: what a recipe is made of, and the parts that several recipes share."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from timm.scheduler import CosineLRScheduler, MultiStepLRScheduler
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn

import timm_dynamic as td
from options import Settings
from run_folder import RunError
from timm_dynamic.evaluation import costs_of
from timm_dynamic.reinforcement import ReinforceTask
from timm_dynamic.surgery import force_always, set_gating, set_policy
from timm_dynamic.tasks import GATES, BaseTask, DynamicTask, ExitsTask, WarmupTask

CHANGEABLE = (
    "epochs",
    "iterations",
    "lr",
    "schedule",
    "milestones",
    "weight_decay",
    "gate_lr",
    "channel_lr",
    "clip",
    "until",
    "alpha",
)
NOT_NEGATIVE = ("epochs", "iterations", "lr", "weight_decay", "gate_lr", "channel_lr", "clip")
# of all recipes and methods: a config may change those of other methods than the one that is run
NAMES = ("base", "warmup", "iadi", "ddi", "sp", "soft", "hrl", "rl", "hindsight", "sdv", "static", "follow")
SCHEDULES = ("cosine", "onecycle", "multistep")


@dataclass(frozen=True)
class Outlook:
    """What a task is told about its stage.

    Attributes:
        batches: how many it will see.
        dense_cost: of the stock model for one image: MACs, milliseconds or millijoules.
        input_size: of an image.
        settings: of the run.
        previous: buffers of the task of the stage before.
        alpha: fixed weight of the cost in this stage, if it has its own.
        teacher: gives the networks to learn from: the trained stock model unless others were given; none if not wanted.
    """

    batches: int
    dense_cost: float
    input_size: tuple[int, int, int]
    settings: Settings
    previous: dict[str, Tensor]
    alpha: float | None
    teacher: Callable[[], Sequence[nn.Module]]


@dataclass(frozen=True)
class Stage:
    """One stretch of training.

    Attributes:
        name: shown, and written in every row of the metrics.
        task: what is optimised: (model, outlook) -> module with ``forward(x, y) -> dict(loss=...)``.
        surgery: changes the model before the stage.
        trains: all parameters, or those of the gates or of the exits only.
        epochs: length, unless ``iterations`` is given.
        iterations: length in optimiser steps.
        lr: learning rate at the start, for SGD with momentum 0.9.
        schedule: of the learning rate: along a cosine to zero, the same after a fifth of the stage in which it rises
            from a 25th of ``lr`` (for short runs at a high rate), or divided by 10 at the milestones.
        milestones: shares of the stage.
        weight_decay: on every parameter.
        gate_lr: learning rate of the layer gates as a share of ``lr``. Slow gates stay undecided for longer, and end
            up looking at the image instead of always open or always shut.
        channel_lr: the same of the channel gates: each is small and learns from one unit alone.
        clip: largest norm of the gradient, unless --clip-grad or --plain is given. A gate's gradient is a sum over all
            that its unit computes: without a limit one odd batch can move a gate so far that it never comes back.
        until: skip ratio of all gates in training under which the stage ends, looked at when it is evaluated; if it
            never gets there, the run fails.
        alpha: weight of the cost in this stage, instead of the run's --alpha or --target.
    """

    name: str
    task: Callable[[nn.Module, Outlook], nn.Module]
    surgery: Callable[[nn.Module, Settings], Any] | None = None
    trains: Literal["all", "gates", "exits"] = "all"
    epochs: float = 1.0
    iterations: int | None = None
    lr: float = 0.1
    schedule: Literal["cosine", "onecycle", "multistep"] = "cosine"
    milestones: tuple[float, ...] = (0.5, 0.75)
    weight_decay: float = 1e-4
    gate_lr: float = 1.0
    channel_lr: float = 1.0
    clip: float | None = None
    until: float | None = None
    alpha: float | None = None

    def steps(self, per_epoch: int, settings: Settings) -> int:
        """Optimiser steps of the stage."""
        wanted = self.iterations if self.iterations is not None else self.epochs * per_epoch
        steps = max(1, round(wanted * settings.epochs_scale))
        return min(steps, settings.max_steps) if settings.max_steps else steps

    def optimizer(self, model: nn.Module, plain: bool = False) -> torch.optim.SGD:
        """SGD over what the stage trains; everything else is frozen. plain: gates learn as fast as the rest."""
        groups: dict[str, list[nn.Parameter]] = {"layer_gates": [], "channel_gates": [], "rest": []}
        for name, parameter in model.named_parameters():
            root = name.split(".")[0]
            part = root if root in GATES else "rest"
            parameter.requires_grad_(self.trains in ("all", "gates" if part in GATES else root))
            if parameter.requires_grad:
                groups[part].append(parameter)
        scales = {"layer_gates": self.gate_lr, "channel_gates": self.channel_lr} if not plain else {}
        found = [{"params": p, "lr_scale": scales.get(part, 1.0)} for part, p in groups.items() if p]
        return torch.optim.SGD(found, self.lr, momentum=0.9, weight_decay=self.weight_decay)

    def largest_norm(self, settings: Settings) -> float | None:
        """What the gradient's norm is limited to, if it is."""
        if settings.clip_grad is not None or settings.plain:
            return settings.clip_grad
        return self.clip

    def scheduler(self, optimizer: torch.optim.Optimizer, steps: int) -> Scheduler:
        """timm's scheduler for a stage of so many steps."""
        if self.schedule == "cosine":
            return CosineLRScheduler(optimizer, t_initial=steps, t_in_epochs=False)
        if self.schedule == "onecycle":
            rise = steps // 5
            more = {"warmup_t": rise, "warmup_lr_init": self.lr / 25, "warmup_prefix": True}
            return CosineLRScheduler(optimizer, t_initial=steps - rise, t_in_epochs=False, **more)
        milestones = [round(share * steps) + 1 for share in self.milestones]  # timm compares them with t + 1
        return MultiStepLRScheduler(optimizer, decay_t=milestones, decay_rate=0.1, t_in_epochs=False)

    def changed(self, key: str, value: str) -> Stage:
        """The stage with one of its fields set from a string."""
        if key not in CHANGEABLE:
            raise RunError(f"a stage's {', '.join(CHANGEABLE)} can be changed; found {self.name}.{key}")
        if key == "schedule" and value not in SCHEDULES:
            raise RunError(f"{self.name}.schedule must be one of {', '.join(SCHEDULES)}; found {value!r}")
        try:
            parsed: Any = value if key == "schedule" else _numbers(key, value)
        except ValueError as error:
            raise RunError(f"{self.name}.{key} needs a number; found {value!r}") from error
        if key == "until" and self.until is None:
            raise RunError(f"stage {self.name} has nothing to reach; found {self.name}.until={value}")
        if not all(map(math.isfinite, parsed if isinstance(parsed, tuple) else [] if key == "schedule" else [parsed])):
            raise RunError(f"{self.name}.{key} must be finite; found {value}")
        if key in NOT_NEGATIVE and parsed < 0:
            raise RunError(f"{self.name}.{key} must be 0 or above; found {value}")
        fresh: dict[str, Any] = {"iterations": None} if key == "epochs" else {}
        return replace(self, **fresh, **{key: parsed})

    def described(self) -> dict[str, Any]:
        """What the stage is, as JSON values."""
        return {"name": self.name, "trains": self.trains, **{key: getattr(self, key) for key in CHANGEABLE}}


def _numbers(key: str, value: str) -> int | float | tuple[float, ...]:
    if key == "milestones":
        return tuple(float(part) for part in value.strip("[]()").split(",") if part.strip())
    return int(value) if key == "iterations" else float(value)


# What happens to the model before a stage ----------------------------------------------------------------------------


def opens_first(settings: Settings) -> bool:
    """Whether units are opened before gates are trained: all that hindsight, or --free, does not leave to them."""
    return settings.open is not None and settings.left_free is not None


def settles_first(settings: Settings) -> bool:
    """Whether units are settled before gates are trained, by the policy that training starts from."""
    return settings.start is not None and (settings.shut is not None or opens_first(settings))


def add_layer_gates(model: nn.Module, settings: Settings) -> None:
    """Layer gates, as the SkipNet paper starts them: at random."""
    memory = "free" if settles_first(settings) else "all"
    config = {"kind": settings.gate, "init": settings.gate_init, "memory": memory, "certainty": settings.certainty}
    try:
        td.add_layer_gates(model, config)
    except ValueError as error:
        raise RunError(f"--model {settings.model}: {error}") from error


def add_soft_gates(model: nn.Module, settings: Settings) -> None:
    """Layer gates that keep in part while training (SkipNet, table 3)."""
    add_layer_gates(model, settings)
    set_gating(model, "soft")


def add_channel_gates(model: nn.Module, settings: Settings) -> None:
    """Channel gates alone."""
    config = {"group_size": settings.group_size, "mode": settings.channel_mode, "init": settings.gate_init}
    td.add_channel_gates(model, config)


def add_all_gates(model: nn.Module, settings: Settings) -> None:
    """Layer and channel gates (IADI); layer gates alone with --channel-mode none."""
    add_layer_gates(model, settings)
    if settings.channel_mode != "none":
        add_channel_gates(model, settings)


LEARNING = (add_layer_gates, add_soft_gates, add_all_gates)  # layer gates that are then trained


def add_exits(model: nn.Module, settings: Settings) -> None:
    """Branch classifiers, after every stage but the last unless others are asked for (DDI)."""
    after = None
    if settings.exits_after is not None:
        places = [part.strip() for part in settings.exits_after.split(",")]
        after = tuple(int(part) if part.isdigit() else part for part in places)
    try:
        td.add_exits(model, td.ExitConfig(after, settings.exit_hidden or 0))
    except ValueError as error:
        raise RunError(f"--exits-after {settings.exits_after}: {error}") from error


def drop_at_random(model: nn.Module, settings: Settings) -> None:
    """Units dropped at random in training and in inference (SDV): gates that nobody asks."""
    td.add_layer_gates(model, settings.gate)
    force_always(model, layer_keep=settings.keep)


def fix_policy(model: nn.Module, settings: Settings) -> None:
    """One policy for all images, held by the gates' thresholds in inference too."""
    layers, _, channels = (settings.policy or "").partition(":")
    try:
        if layers:
            td.add_layer_gates(model, settings.gate)
        if channels:
            add_channel_gates(model, settings)
        set_policy(model, layers, channels)
    except ValueError as error:
        raise RunError(f"--policy {settings.policy!r}: {error}") from error


# What a stage optimises ----------------------------------------------------------------------------------------------


def base_task(model: nn.Module, outlook: Outlook) -> nn.Module:
    """Cross entropy, and the distance from teachers where there are any."""
    return BaseTask(model, teacher=outlook.teacher(), distill=outlook.settings.distill)


def warmup_task(model: nn.Module, outlook: Outlook) -> nn.Module:
    """Gates learn to keep everything."""
    return WarmupTask(model)


def steering(outlook: Outlook) -> dict[str, Any]:
    """What a task with a cost term is told; after another of its kind, or a policy, it is at the target already."""
    settings = outlook.settings
    return {
        "alpha": settings.alpha if outlook.alpha is None else outlook.alpha,
        "target": settings.target if outlook.alpha is None else None,
        "anneal": 0.0 if "alpha" in outlook.previous or settings.start else 0.5,
        "exit_weighting": settings.exit_weighting,
        "distill_exits": settings.distill_exits,
        "exit_gradient": 1.0 if settings.exit_gradient is None else settings.exit_gradient,
        "teacher": outlook.teacher(),
        "distill": settings.distill,
        "information": 0.0 if settings.plain else settings.information,
        "parts": settings.accumulate,
    }


def dynamic_task(model: nn.Module, outlook: Outlook) -> nn.Module:
    """Cross entropy plus cost; a stage after another of this kind goes on with its alpha."""
    return _going_on(DynamicTask(model, outlook.dense_cost, outlook.batches, **steering(outlook)), outlook)


def exits_task(model: nn.Module, outlook: Outlook) -> nn.Module:
    """Exits of a network that stands still."""
    settings = outlook.settings
    return ExitsTask(model, settings.exit_weighting, settings.distill_exits)  # type: ignore[arg-type]


def _going_on(task: DynamicTask, outlook: Outlook) -> DynamicTask:
    """A task that is steered starts with the alpha that the stage before it found."""
    if task.target is not None and "alpha" in outlook.previous:
        task.alpha.copy_(outlook.previous["alpha"])
    return task


def hybrid_task(model: nn.Module, outlook: Outlook) -> nn.Module:
    """Hybrid reinforcement learning; batch norms stand still only in a network that is trained."""
    return _reinforcing(model, outlook, supervised=True)


def reinforce_task(model: nn.Module, outlook: Outlook) -> nn.Module:
    """Reinforcement learning alone."""
    return _reinforcing(model, outlook, supervised=False)


def _reinforcing(model: nn.Module, outlook: Outlook, supervised: bool) -> nn.Module:
    settings = outlook.settings
    plain, costs = settings.plain, None
    near = bool(outlook.previous) and not plain  # a trained network samples near what it would do
    if settings.unit_cost == "macs":
        units = [unit.branch for unit in costs_of(model, outlook.input_size).units if unit.skippable]
        costs = [cost * len(units) / sum(units) for cost in units]
    task = ReinforceTask(
        model,
        outlook.dense_cost,
        outlook.batches,
        unit_costs=costs,
        beta=settings.beta,
        supervised=supervised,
        baseline="none" if plain else settings.baseline,
        still=near,
        normalise=not plain,
        entropy=0.0 if plain else settings.entropy,
        temperature=settings.temperature if near else 1.0,
        explore=settings.explore or None if near else None,
        **steering(outlook),
    )
    return _going_on(task, outlook)


# The network that adapting has to beat; its length is that of what it is compared with.
STATIC = Stage("static", base_task, surgery=fix_policy, epochs=25, lr=0.1, clip=1.0)
