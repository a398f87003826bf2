"""What the commands compute: plain values, ready for a table or for JSON."""

import dataclasses
import re
from collections.abc import Iterable
from functools import cache
from typing import Any

import timm
import torch
from torch import Tensor, nn

from .. import ChannelGateConfig, CostTable, Decisions, LayerGateConfig, calibrate, cost_table, decide, set_budget
from ..budgets import default_input_size
from ..evaluation import collect, compare, summarise
from ..gates import gates_choose
from ..registry import METHODS
from ..shipped import names as shipped
from ..walk import table_for
from .errors import BadInput, bad_input
from .models import load_shapes, split_name

Row = dict[str, Any]

# list ----------------------------------------------------------------------------------------------------------------


def names(pattern: str | None, pretrained: bool) -> dict[str, list[str]]:
    """The networks of this package, each with the tags of its weights.

    Args:
        pattern: a wildcard (`ddi_resnet*`), or a part of the name; None for all.
        pretrained: only those with weights, be they the base's.

    Raises:
        BadInput: if there are none.
    """
    wanted = pattern or ""
    if not re.search(r"[*?\[]", wanted):
        wanted = f"*{wanted}*"
    found: dict[str, list[str]] = {}
    for module in ("registry", "cifar"):
        found |= {name: [] for name in timm.list_models(wanted, module=module)}
        for full in timm.list_models(module=module, pretrained=True):
            name, _, tag = full.partition(".")
            if name in found:
                found[name].append(tag)
    if pretrained:
        found = {name: tags for name, tags in found.items() if tags}
    if not found:
        which = "no network with weights" if pretrained else "no network"
        raise BadInput(f"{which} matches {pattern!r}" if pattern else "there is " + which)
    return found


def list_row(name: str, tags: list[str], count: bool) -> Row:
    """A line of the list.

    Args:
        name: of the network.
        tags: of its weights.
        count: whether to build it (without weights) to count parameters, MACs and exits, which takes time.
    """
    method, base = split_name(name)
    parts = METHODS[method] if method else None
    row: Row = {
        "name": name,
        "base": base,
        "layer_gates": LayerGateConfig().kind if parts and parts.layer_gates else None,
        "channel_gates": ChannelGateConfig().mode if parts and parts.channel_gates else None,
        "has_exits": bool(parts and parts.exits),
        "exits": None,
        "params": None,
        "macs": None,
        "input_size": None,
        "pretrained_tags": tags,
        "trained_tags": [tag for tag in tags if method is None or f"{name}.{tag}" in shipped()],
    }
    if count:
        model = load_shapes(name)
        size, macs = _dense(base)
        row |= {"params": _params(model), "macs": macs, "input_size": size, "exits": len(getattr(model, "exits", ()))}
    return row


@cache
def _dense(base: str) -> tuple[tuple[int, int, int], int]:
    """A stock network's input size and MACs; dynamic ones of the same base share them."""
    model = load_shapes(base)
    size = default_input_size(model)
    return size, cost_table(model, size).dense


def _params(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


# profile -------------------------------------------------------------------------------------------------------------


def profile(model: nn.Module, name: str, input_size: tuple[int, int, int] | None) -> Row:
    """Where a network's MACs go.

    Raises:
        BadInput: if it has no units, or cannot run an input of this size.
    """
    with bad_input():
        table = cost_table(model, input_size or default_input_size(model))
    dense = table.dense
    cheapest, dearest = min(stop.cheapest for stop in table.exits), max(stop.dearest for stop in table.exits)
    gates = {part: sum(getattr(unit, part) for unit in table.units) for part in ("layer_gate", "channel_gate")}
    kinds = {part: getattr(model, f"{part}s", None) for part in gates}
    return {
        "name": name,
        "input_size": table.input_size,
        "params": _params(model),
        "layer_gates": kinds["layer_gate"].config.kind if kinds["layer_gate"] is not None else None,
        "channel_gates": kinds["channel_gate"].config.mode if kinds["channel_gate"] is not None else None,
        "dense_macs": dense,
        "stem_macs": table.stem,
        "units": _unit_rows(table),
        "after_stage_macs": list(table.leave),
        "exits": _exit_rows(table),
        "layer_gate_macs": gates["layer_gate"],
        "layer_gate_share": gates["layer_gate"] / dense,
        "channel_gate_macs": gates["channel_gate"],
        "channel_gate_share": gates["channel_gate"] / dense,
        "cheapest": cheapest,
        "cheapest_share": cheapest / dense,
        "dearest": dearest,
        "dearest_share": dearest / dense,
        "dearest_passing": dearest + sum(stop.head for stop in table.exits[:-1]),
    }


def _unit_rows(table: CostTable) -> list[Row]:
    return [
        {
            "name": unit.name,
            "stage": unit.stage,
            "macs": unit.full,
            "shortcut_macs": unit.shortcut,
            "layer_gate_macs": unit.layer_gate,
            "layer_gate_share": unit.layer_gate / unit.full,
            "channel_gate_macs": unit.channel_gate,
            "channel_gate_share": unit.channel_gate / unit.full,
            "skippable": unit.skippable,
            "shut": unit.shut,
            "open": unit.open,
            "channel_groups": [len(sizes) for sizes in unit.sizes],
            "settled_channels": None if unit.channels is None else [sum(part) for part in unit.channels],
            "cheapest": unit.cheapest,
            "dearest": unit.dearest,
        }
        for unit in table.units
    ]


def _exit_rows(table: CostTable) -> list[Row]:
    return [
        {
            "exit": index,
            "name": stop.name,
            "head_macs": stop.head,
            "cheapest": stop.cheapest,
            "cheapest_share": stop.cheapest / table.dense,
            "dearest": stop.dearest,
            "dearest_share": stop.dearest / table.dense,
        }
        for index, stop in enumerate(table.exits)
    ]


# predict -------------------------------------------------------------------------------------------------------------


def predict(model: nn.Module, x: Tensor, labels: list[str] | None, most: int = 5) -> Row:
    """What a network says of one image, and what it ran for that.

    Args:
        model: in eval mode.
        x: [C, H, W].
        labels: names of the classes, if they are known.
        most: how many classes to tell.
    """
    size = (x.shape[0], x.shape[1], x.shape[2])
    with torch.inference_mode(), bad_input():
        if hasattr(model, "dynamic"):
            table = table_for(model, size)
            decisions = decide(model, x[None])
            logits, macs, left = decisions.logits, int(decisions.macs), int(decisions.exit_index)
            ran = _ran(table, decisions)
        else:
            table = cost_table(model, size)
            logits, macs, left = model(x[None]), table.dense, len(table.exits) - 1
            ran = [1.0] * len(table.units)
    units = [{"name": u.name, "stage": u.stage, "ran": r} for u, r in zip(table.units, ran, strict=True)]
    return {
        "top": likeliest(logits[0], labels, most),
        "macs": macs,
        "dense_macs": table.dense,
        "macs_share": macs / table.dense,
        "exit": left,
        "exits": len(table.exits),
        "left_at": table.exits[left].name,
        "units": units,
    }


def likeliest(logits: Tensor, labels: list[str] | None, most: int = 5) -> list[Row]:
    """The likeliest classes of one image. logits: [classes]."""
    prob, index = logits.float().softmax(0).topk(min(most, len(logits)))
    return [
        {"class": i, "label": labels[i] if labels else None, "probability": p}
        for p, i in zip(prob.tolist(), index.tolist(), strict=True)
    ]


def _ran(table: CostTable, decisions: Decisions) -> list[float | None]:
    """For each unit the share of its hidden channels that ran: 0 if it was skipped, None if it was not reached."""
    found: list[float | None] = []
    last = table.exits[int(decisions.exit_index)].after
    gate = column = 0
    for i, unit in enumerate(table.units):
        share = 1.0
        if unit.skippable:
            share = float(decisions.layer_keep[0, gate])
            gate += 1
        if unit.sizes:
            groups = decisions.channel_keep[column : column + len(unit.sizes)]
            column += len(unit.sizes)
            kept = sum(int(keep[0].long() @ torch.tensor(s)) for keep, s in zip(groups, unit.sizes, strict=True))
            share *= kept / sum(map(sum, unit.sizes))
        found.append(share if i <= last else None)
    return found


# evaluate ------------------------------------------------------------------------------------------------------------


def evaluate_row(model: nn.Module, loader: Iterable[tuple[Tensor, Tensor]], device: str) -> tuple[Row, Tensor]:
    """Accuracy and cost over a loader and how the images spread over the exits; and which are recognised, bool [N]."""
    with bad_input():
        seen, table = collect(model.to(device), loader, device)
    stops, found = table.exits, summarise(seen, table)
    row = found.to_dict()
    shares = row.pop("exit_shares")
    exits = [
        {"exit": i, "name": stop.name, "share": share}
        for i, (stop, share) in enumerate(zip(stops, shares, strict=True))
    ]
    return {**row, "macs_share": found.macs_share, "exits": exits}, seen["correct"]


def calibrate_row(model: nn.Module, loader: Iterable[tuple[Tensor, Tensor]], share: float) -> Row:
    """Set thresholds for a mean cost, and lift the budget: what was set, and what it gives on these images."""
    with bad_input():
        found = calibrate(model, loader, share)
        set_budget(model)
    return {**dataclasses.asdict(found), **({} if gates_choose(model) else {"threshold": None})}


def against_row(name: str, own: Row, right: Tensor, other: Row, others_right: Tensor) -> Row:
    """How a network compares with another one on the same images.

    Args:
        name: of the other one.
        own: what `evaluate_row` gave.
        right: likewise, bool [N].
        other: the same of the other one.
        others_right: likewise.
    """
    with bad_input():
        found = compare(right, others_right)
    return {
        "name": name,
        "accuracy": other["accuracy"],
        "macs": other["macs"],
        "macs_share": other["macs"] / own["dense_macs"],
        "difference": found.accuracy,
        "standard_error": found.error,
        "recognised_by_the_first_only": found.first_only,
        "recognised_by_the_second_only": found.second_only,
    }
