"""Settling units: what all images run, or none, need not be decided for each, nor be allowed for by a budget."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch

from . import families
from .budgets import check_budget
from .calibration import kept
from .configs import LayerGateConfig, ratio
from .walk import Log, Walk, dynamic_of


def shut_units(model: Any, names: Iterable[str]) -> Any:
    """Shut units for good: no image runs them, in eval or in training, whatever their gates or `force` say.

    A hard budget allows for the dearest way to the next exit, which becomes cheaper by these units, and training does
    not compute them. Their gates are no longer asked, but for RNN gates before a unit that is not settled, which hand
    it what they saw; with `LayerGateConfig.memory` "free" they do not, and what later gates say may change. It is part
    of the config (`LayerGateConfig.shut`), saved by `save_pretrained` and in runs; a bare state dict does not hold it.
    The units keep their weights, which weight decay shrinks where training goes on: `shut_units(model, [])` gives all
    back to their gates.

    Args:
        model: a dynamic model with layer gates.
        names: all gated units that are to be shut, as in "layer1.1"; others that were are given back to their gates.

    Returns:
        The same model.

    Raises:
        ValueError: if the model has no layer gates, a name is not that of a gated unit or that of one that is open for
            good, or the budget that is set does not allow for the units that are given back. Nothing is changed.
    """
    return _settle(model, "shut", names)


def open_units(model: Any, names: Iterable[str]) -> Any:
    """Open units for good: every image that comes there runs them, whatever their gates or `force` say.

    Their gates are no longer asked, as with `shut_units`: a network all of whose units are settled spends no time on
    layer gates. It is part of the config (`LayerGateConfig.open`), saved by `save_pretrained` and in runs; a bare state
    dict does not hold it.

    Args:
        model: a dynamic model with layer gates.
        names: all gated units that are to be open; others that were are given back to their gates.

    Returns:
        The same model.

    Raises:
        ValueError: as `shut_units`.
    """
    return _settle(model, "open", names)


def _settle(model: Any, what: str, names: Iterable[str]) -> Any:
    if isinstance(names, str):
        raise ValueError(f"a list of units is needed, such as [{names!r}]; found the string {names!r}")
    gates, dynamic, given = _layer_gates(model), dynamic_of(model), tuple(names)
    before, in_order = gates.config, tuple(sorted(set(given), key=(*gates.gated, *given).index))
    _take(model, replace(before, **{what: in_order}))
    try:
        if dynamic.budget is not None:
            dynamic.limit = check_budget(model, dynamic.budget, dynamic.limit)
    except ValueError:
        _take(model, before)
        raise
    dynamic.unprice()
    return model


def _take(model: Any, config: LayerGateConfig) -> None:
    for one in (model, model.dynamic.origin):  # of an optimised copy, what it was made from counts the costs
        if one is not None:
            one.layer_gates.settle(config, one.layer_gates.gated)
    model.dynamic.tables.clear()


def idle_units(model: Any, images: Iterable[Any], share: float = 0.0) -> tuple[str, ...]:
    """Gated units that few images run, or none, on the way to the head without a budget.

    Args:
        model: a dynamic model with layer gates, in any mode; it is not changed.
        images: batches [B, C, H, W], or of (images, labels) as loaders give them.
        share: of the images, in 0..1; units that no more than these run are named.

    Returns:
        Their names, in running order, for `shut_units`; those that are shut already are among them.

    Raises:
        ValueError: if the model has no layer gates, there are no images, or the share is not in 0..1.
    """
    found = _runs(model, images, share)
    return tuple(name for name, one in found.items() if one <= share)


def busy_units(model: Any, images: Iterable[Any], share: float = 1.0) -> tuple[str, ...]:
    """Gated units that most images run, or all, on the way to the head without a budget.

    Args:
        model: a dynamic model with layer gates, in any mode; it is not changed.
        images: batches [B, C, H, W], or of (images, labels) as loaders give them.
        share: of the images, in 0..1; units that at least these run are named.

    Returns:
        Their names, in running order, for `open_units`; those that are open already are among them.

    Raises:
        ValueError: if the model has no layer gates, there are no images, or the share is not in 0..1.
    """
    found = _runs(model, images, share)
    return tuple(name for name, one in found.items() if one >= share)


@torch.no_grad()
def _runs(model: Any, images: Iterable[Any], share: float) -> dict[str, float]:
    """For each gated unit, in running order, the share of the images that run it."""
    ratio("share", share)
    gates = _layer_gates(model)
    device = next(model.parameters()).device
    runs, count = torch.zeros(len(gates), dtype=torch.float64), 0
    with kept(model):
        for batch in images:
            x = batch[0] if isinstance(batch, (tuple, list)) else batch
            log = Log(len(x))
            walk = Walk(model, x.to(device), log, budgeted=False)
            walk.to_exit(len(walk.stops) - 1)
            runs += torch.stack(log.layer_keep, 1).sum(0).cpu()
            count += len(x)
    if not count:
        raise ValueError("the units that images run cannot be found without images; found none")
    return dict(zip(gates.gated, (runs / count).tolist(), strict=True))


def _layer_gates(model: Any) -> Any:
    dynamic_of(model)
    if not hasattr(model, "layer_gates"):
        raise ValueError(f"only layer gates shut or open units; {families.model_name(model)!r} has none")
    return model.layer_gates
