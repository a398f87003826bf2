"""The stages of a run: a recipe's, with the changes asked for, and where a static policy is what it starts from."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

import timm_dynamic as td
from options import PREFIXES, WHERE_IT_IS, Settings, is_name
from run_folder import SETTINGS, RunError
from stages import (
    NAMES,
    Outlook,
    Stage,
    add_all_gates,
    add_layer_gates,
    add_soft_gates,
    fix_policy,
    opens_first,
    steering,
)
from timm_dynamic.evaluation import costs_of
from timm_dynamic.hindsight import HindsightTask, without
from timm_dynamic.hub import HubError, hub_errors
from timm_dynamic.tasks import FollowTask

Surgery = Callable[[nn.Module, Settings], Any]


def planned(stages: tuple[Stage, ...], settings: Settings) -> tuple[Stage, ...]:
    """The stages with the changes that were asked for; without the base stage where gates have a trained base.

    Stages of no epochs are left out. A start from a static policy takes the place of the base stage and of a warm-up.
    """
    found = {stage.name: stage for stage in (_from_policy(stages, settings) if settings.start else stages)}
    for change in settings.stage:
        said = change.removeprefix(WHERE_IT_IS)
        where, _, value = said.partition("=")
        name, _, key = where.partition(".")
        if said != change and name in NAMES and name not in found:
            continue
        if name not in found or not key or not value:
            raise RunError(f"--stage needs STAGE.FIELD=VALUE with a stage of {', '.join(found)}; found {said!r}")
        found[name] = found[name].changed(key, value)
    if settings.base and settings.recipe != "base":  # base.py trains on from it
        found.pop("base", None)
    empty = [stage for stage in found.values() if not (stage.epochs if stage.iterations is None else stage.iterations)]
    for stage in empty:
        if stage.surgery is not None:
            raise RunError(f"stage {stage.name} adds what the next ones train: it needs a length above 0")
    return tuple(stage for stage in found.values() if stage not in empty)


def _from_policy(stages: tuple[Stage, ...], settings: Settings) -> tuple[Stage, ...]:
    """The stages of a run that starts from a network of one policy: its gates follow that before they leave it."""
    layers, channels = start_policy(settings)  # fails where there is none
    if settings.left_free is not None:
        _check_free(layers, "" if settings.settle is not None else channels, settings)
    for place, stage in enumerate(stages):
        if stage.surgery in STARTS:
            short = 1 if settings.left_free == 0 else None  # gates that are not asked learn nothing
            follow = replace(FOLLOW, surgery=STARTS[stage.surgery], iterations=short)
            trained = () if stage.trains == "gates" else (replace(stage, surgery=None),)  # a warm-up has no place
            return (*stages[:place], follow, *trained, *stages[place + 1 :])
        if stage.surgery is fix_policy:
            return (*stages[:place], replace(stage, surgery=FIXED), *stages[place + 1 :])
    raise RunError("--start is for recipes that train gates, and for --method static")


# Starting from a network of one policy ------------------------------------------------------------------------------


def start_policy(settings: Settings) -> tuple[str, str]:
    """The policy of what --start names: digits for layers, digits for channel groups.

    A static run tells it; in a network whose units are all settled it is what they are settled to.
    """
    start = Path(settings.start or "")
    try:
        named = is_name(start)
        told = None if named else json.loads((start / SETTINGS).read_text())["policy"]
        stock = named and not str(start).startswith(PREFIXES)  # is not fetched first
        policy = told if isinstance(told, str) or stock else _settled_policy(settings)
    except (OSError, RuntimeError, ValueError, KeyError, TypeError):
        policy = None
    if policy is None:
        raise RunError(
            "--start needs the folder of a finished run of --method static, or a network whose units are all open or "
            f"shut for good; found {settings.start}, where {SETTINGS} tells of no policy, and weights are of no such "
            "network"
        )
    layers, _, channels = policy.partition(":")
    return layers, channels


def _start_network(settings: Settings) -> Any:
    """The trained network that --start names."""
    start = Path(settings.start or "")
    name = str(start) if is_name(start) else f"local-dir:{start}"
    try:
        with hub_errors(name), torch.random.fork_rng():  # what is drawn for it is overwritten
            return timm.create_model(name, pretrained=True)
    except HubError as error:
        raise RunError(f"--start {error}") from error


def _settled_policy(settings: Settings) -> str | None:
    """The one policy that the network has, up to where images leave; None if it decides."""
    model = _start_network(settings)
    gates = getattr(model, "layer_gates", ())
    if not gates or len(gates.settled) < len(gates):
        return None
    layers = "".join(str(int(gates.settled[place])) for place in range(len(gates)))
    if not hasattr(model, "channel_gates"):
        return layers
    known, shut = model.channel_gates.config.channels_of(), set(gates.config.shut)
    found = [known.get(name, "1" * count if name in shut else None) for name, count in _groups(model)]
    return None if None in found else f"{layers}:{''.join(map(str, found))}"


def _groups(model: Any) -> list[tuple[str, int]]:
    """Name and number of channel groups of each unit with a channel gate."""
    gates = model.channel_gates
    return [(name, sum(map(len, sizes))) for name, sizes in zip(gates.gated, gates.sizes, strict=True)]


def take_trunk(model: nn.Module, settings: Settings) -> None:
    """The weights of the network that --start names, without its gates."""
    try:
        model.load_state_dict(td.strip(_start_network(settings)).state_dict())
    except (OSError, RuntimeError, ValueError) as error:
        raise RunError(f"--start {settings.start} does not fit --model {settings.model}: {error}") from error


def try_start(
    model: nn.Module, stages: tuple[Stage, ...], settings: Settings, input_size: tuple[int, int, int]
) -> None:
    """Begin the first stage on a copy where --start is given, so that what does not fit is said before a run is begun.

    Raises:
        RunError: which says what was wanted and found.
    """
    if settings.start is None:
        return
    stage, other = stages[0], copy.deepcopy(model)
    with torch.random.fork_rng():
        if stage.surgery is not None:
            stage.surgery(other, settings)
        if settings.cost != "macs":  # a target in another unit can be judged once that is measured
            settings = replace(settings, alpha=settings.alpha or 0.0, target=None)
        dense = costs_of(other, input_size).dense
        stage.task(other, Outlook(1, dense, input_size, settings, {}, None, tuple))


def _from_trunk(surgery: Surgery) -> Surgery:
    """The same surgery on a network that was trained under one policy, by which units are settled."""

    def both(model: nn.Module, settings: Settings) -> None:
        take_trunk(model, settings)
        surgery(model, settings)
        if surgery is not fix_policy:
            _settle_by_policy(model, settings)

    return both


def _settle_by_policy(model: Any, settings: Settings) -> None:
    """With --shut, shut what the policy never runs; with --open, open what is not left to the gates.

    With --settle, the channels of what the policy runs are those that it keeps.
    """
    layers, channels = start_policy(settings)
    names = model.layer_gates.gated
    if settings.shut is not None:  # a policy that does not fit is refused by `follow`
        td.shut_units(model, [name for name, digit in zip(names, layers, strict=False) if digit == "0"])
    if opens_first(settings):
        places = _places(names, layers, settings)
        stay = without(layers, places) if places else layers
        td.open_units(model, [name for name, digit in zip(names, stay, strict=False) if digit == "1"])
    groups = _groups(model) if settings.settle is not None and hasattr(model, "channel_gates") else []
    if groups and len(channels) == sum(count for _, count in groups):  # one that does not fit is refused by `follow`
        digits = iter(channels)
        keeps = {name: "".join(islice(digits, count)) for name, count in groups}
        never = {name for name, digit in zip(names, layers, strict=False) if digit == "0"}
        try:
            td.settle_channels(model, {name: found for name, found in keeps.items() if name not in never})
        except ValueError as error:
            raise RunError(f"--start {settings.start}: {error}") from error


def _add_open_channel_gates(model: nn.Module, settings: Settings) -> None:
    """Layer gates that learn the policy, and channel gates, which keep everything unless it says otherwise."""
    add_layer_gates(model, settings)
    if settings.channel_mode != "none":
        config = {"group_size": settings.group_size, "mode": settings.channel_mode, "init": "open"}
        td.add_channel_gates(model, config)


STARTS: dict[Surgery | None, Surgery] = {
    add_layer_gates: _from_trunk(add_layer_gates),
    add_soft_gates: _from_trunk(add_soft_gates),
    add_all_gates: _from_trunk(_add_open_channel_gates),
}
FIXED = _from_trunk(fix_policy)


def follow_task(model: nn.Module, outlook: Outlook) -> nn.Module:
    """Gates learn to say what the policy says that training starts from."""
    if outlook.settings.method == "hindsight":
        hindsight_task(model, outlook)  # what it cannot be told is said before anything is trained
    try:
        return FollowTask(model, *start_policy(outlook.settings))
    except ValueError as error:
        raise RunError(f"--start {outlook.settings.start}: {error}") from error


FOLLOW = Stage("follow", follow_task, trains="gates", epochs=2, lr=0.1, clip=1.0)


def _places(names: Sequence[str], layers: str, settings: Settings) -> int | tuple[int, ...]:
    """What --free leaves to the gates: so many of the last units, or the places of those that it names."""
    free = settings.left_free or 0
    if isinstance(free, int):
        return free
    runs = [name for name, digit in zip(names, layers, strict=False) if digit == "1"]
    if unknown := [name for name in free if name not in runs]:
        raise RunError(f"--free needs a number, or names among {', '.join(runs)}; found {unknown[0]!r}")
    return tuple(names.index(name) for name in free)


def _check_free(layers: str, channels: str, settings: Settings) -> None:
    """Whether the gates can be left so many of the last units of the policy; channels: those that are not settled.

    Names are looked for in the network, later.
    """
    if channels:
        raise RunError(
            "hindsight and --free start from a policy of layers, or one whose channels are settled (iadi.py or ddi.py "
            f"with --settle); found {layers}:{channels}"
        )
    free = settings.left_free or 0
    if free == 0 and settings.method != "hindsight":
        return
    try:
        without(layers, free if isinstance(free, int) else len(free))
    except ValueError as error:
        raise RunError(f"--free {settings.free or free}: {error}") from error


def hindsight_task(model: nn.Module, outlook: Outlook) -> nn.Module:
    """Gates learn when the free units of the policy that training started from are worth their cost."""
    settings, more = outlook.settings, steering(outlook)
    layers, _ = start_policy(settings)
    gated: Any = getattr(model, "layer_gates", None)
    free = _places(() if gated is None else gated.gated, layers, settings)
    try:
        task = HindsightTask(model, outlook.dense_cost, outlook.batches, layers=layers, free=free, **more)
    except ValueError as error:
        raise RunError(f"--start {settings.start}: {error}") from error
    cheap, dear = task.shares(outlook.input_size)
    if task.target is not None and not cheap < task.target < dear and not settings.max_steps:  # a dry run goes on
        raise RunError(
            f"--target must lie between {cheap:.3f} and {dear:.3f}, the least and the largest share of the dense cost "
            f"with {len(task.free)} units left to the gates; found {task.target}"
        )
    return task
