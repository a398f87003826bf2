"""Shutting units for good: what no image runs need not be allowed for by a budget, nor computed in training."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from . import families
from .budgets import check_budget
from .calibration import kept
from .configs import ratio
from .gates import shut_places
from .walk import Log, Walk, dynamic_of


def shut_units(model: Any, names: Iterable[str]) -> Any:
    """Shut units for good: no image runs them, in eval or in training, whatever their gates or `force` say.

    A hard budget allows for the dearest way to the next exit, which becomes cheaper by these units, and training does
    not compute them. It is part of the config (`LayerGateConfig.shut`) and saved with the weights. The units keep
    their weights, which weight decay shrinks where training goes on: `shut_units(model, [])` opens them again.

    Args:
        model: a dynamic model with layer gates.
        names: all gated units that are to be shut, as in "layer1.1"; others that were are opened.

    Returns:
        The same model.

    Raises:
        ValueError: if the model has no layer gates, a name is not that of a gated unit, or the budget that is set
            does not allow for the units that are opened. Nothing is changed.
    """
    before, dynamic = _layer_gates(model).config.shut, dynamic_of(model)
    _shut(model, names)
    try:
        if dynamic.budget is not None:
            dynamic.limit = check_budget(model, dynamic.budget, dynamic.limit)
    except ValueError:
        _shut(model, before)
        raise
    return model


def _shut(model: Any, names: Iterable[str]) -> None:
    ordered = gated_units(model)
    places = shut_places(names, ordered)
    shut = tuple(ordered[place] for place in sorted(places))
    for one in (model, model.dynamic.origin):  # of an optimised copy, what it was made from counts the costs
        if one is not None:
            one.layer_gates.config, one.layer_gates.shut = replace(one.layer_gates.config, shut=shut), places
    model.dynamic.tables.clear()


@torch.no_grad()
def idle_units(model: Any, images: Iterable[Tensor], share: float = 0.0) -> tuple[str, ...]:
    """Gated units that few images run, or none, on the way to the head without a budget.

    Args:
        model: a dynamic model with layer gates, in any mode; it is not changed.
        images: batches [B, C, H, W].
        share: of the images, in 0..1; units that no more than these run are named.

    Returns:
        Their names, in running order, for `shut_units`; those that are shut already are among them.

    Raises:
        ValueError: if the model has no layer gates, there are no images, or the share is not in 0..1.
    """
    ratio("share", share)
    gates = _layer_gates(model)
    device = next(model.parameters()).device
    runs, count = torch.zeros(len(gates), dtype=torch.int64), 0
    with kept(model):
        for x in images:
            log = Log(len(x))
            walk = Walk(model, x.to(device), log, budgeted=False)
            walk.to_exit(len(walk.stops) - 1)
            runs += torch.stack(log.layer_keep, 1).sum(0).cpu()
            count += len(x)
    if not count:
        raise ValueError("idle_units needs images; found none")
    return tuple(name for name, found in zip(gated_units(model), runs.tolist(), strict=True) if found <= share * count)


def gated_units(model: Any) -> list[str]:
    """Names of the units that a layer gate can stand before, in running order: all but the first."""
    return [unit.name for unit in families.units(model)[1:]]


def _layer_gates(model: Any) -> Any:
    dynamic_of(model)
    if not hasattr(model, "layer_gates"):
        raise ValueError(f"only layer gates shut units; {families.model_name(model)!r} has none")
    return model.layer_gates
