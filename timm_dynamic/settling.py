"""Settling units: what all images run, or none, need not be decided for each, nor be allowed for by a budget."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from . import families
from .budgets import check_budget
from .calibration import kept
from .configs import ratio
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


def settle_channels(model: Any, keeps: Mapping[str, str]) -> Any:
    """Settle the channels of units: every image that runs them computes the same ones, whatever gates or `force` say.

    The channel gates of these units are no longer asked, which saves what they cost (DDI, supplement 7: an eighth of a
    dense layer), and a hard budget allows for the channels that are kept only, but in milliseconds, where a unit that
    runs is paid in full. It is part of the config (`ChannelGateConfig.settled`), saved by `save_pretrained` and in
    runs; a bare state dict does not hold it.
    `settle_channels(model, {})` gives all back to their gates.

    Args:
        model: a dynamic model with channel gates.
        keeps: for each unit to settle, by its name, a 1 or 0 for each of its channel groups, hidden widths in order, as
            in {"layer3.1": "1110"}; units that are not in it are given back to their gates.

    Returns:
        The same model.

    Raises:
        ValueError: if the model has no channel gates, a name is not that of a gated unit, the digits do not fit its
            groups or, in nested gates, skip some, or the budget that is set does not allow for the units that are given
            back. Nothing is changed.
    """
    gates = _gates(model, "channel_gates", "only channel gates choose channels")
    if not isinstance(keeps, Mapping) or not all(isinstance(one, str) for one in keeps.values()):
        raise ValueError(f'a dict of digits by unit is needed, such as {{"layer3.1": "1110"}}; found {keeps!r}')
    order = [name for name in gates.gated if name in keeps] + [name for name in keeps if name not in gates.gated]
    return _change(model, "channel_gates", replace(gates.config, settled=tuple(f"{n}={keeps[n]}" for n in order)))


def _settle(model: Any, what: str, names: Iterable[str]) -> Any:
    if isinstance(names, str):
        raise ValueError(f"a list of units is needed, such as [{names!r}]; found the string {names!r}")
    gates, given = _layer_gates(model), tuple(names)
    in_order = tuple(sorted(set(given), key=(*gates.gated, *given).index))
    return _change(model, "layer_gates", replace(gates.config, **{what: in_order}))


def _change(model: Any, part: str, config: Any) -> Any:
    """Give gates another config, unless the budget does not allow for what is then left to them."""
    dynamic, before = dynamic_of(model), getattr(model, part).config
    _take(model, part, config)
    try:
        if dynamic.budget is not None:
            dynamic.limit = check_budget(model, dynamic.budget, dynamic.limit)
    except ValueError:
        _take(model, part, before)
        raise
    dynamic.unprice()
    return model


def _take(model: Any, part: str, config: Any) -> None:
    for one in (model, model.dynamic.origin):  # of an optimised copy, what it was made from counts the costs
        if one is not None:
            gates = getattr(one, part)
            gates.settle(config, *((gates.gated,) if part == "layer_gates" else ()))
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


def steady_channels(model: Any, images: Iterable[Any], share: float = 1.0) -> dict[str, str]:
    """Gated units that compute the same channels for nearly all images that run them, without a budget.

    Args:
        model: a dynamic model with channel gates, in any mode; it is not changed.
        images: batches [B, C, H, W], or of (images, labels) as loaders give them.
        share: in 0.5..1, of the images that run a unit; it is named if each of its channel groups is kept by at least
            so many of them, or by at most as many as are left.

    Returns:
        For each such unit a 1 or 0 for each channel group, for `settle_channels`; units that no image runs are not
        among them, unless they are settled already.

    Raises:
        ValueError: if the model has no channel gates, there are no images, or the share is not in 0.5..1.
    """
    ratio("share", share)
    if share < 0.5:
        raise ValueError(f"share must be a number in 0.5..1; found {share}")
    gates = _gates(model, "channel_gates", "only channel gates choose channels")
    widths = [len(part) for part in gates.sizes]
    keeps: list[Any] = [0.0] * len(gates)
    runs = torch.zeros(len(gates), dtype=torch.float64)
    for log in _logs(model, images):
        columns = iter(log.channel_keep)
        for place, count in enumerate(widths):
            found = torch.cat([next(columns) for _ in range(count)], 1).sum(0)
            keeps[place] = keeps[place] + found.double().cpu()
            runs[place] += int(log.layer_keep[place].sum()) if log.layer_keep else log.batch
    steady = {}
    for place, name in enumerate(gates.gated):
        if place in gates.settled:
            steady[name] = gates.config.channels_of()[name]
        elif runs[place]:
            shares = keeps[place] / runs[place]
            if bool(((shares >= share) | (shares <= 1 - share)).all()):
                steady[name] = "".join("01"[int(one)] for one in shares >= share)
    return steady


def _runs(model: Any, images: Iterable[Any], share: float) -> dict[str, float]:
    """For each gated unit, in running order, the share of the images that run it."""
    ratio("share", share)
    gates = _layer_gates(model)
    runs, count = torch.zeros(len(gates), dtype=torch.float64), 0
    for log in _logs(model, images):
        runs += torch.stack(log.layer_keep, 1).sum(0).cpu()
        count += log.batch
    return dict(zip(gates.gated, (runs / count).tolist(), strict=True))


def _logs(model: Any, images: Iterable[Any]) -> Iterator[Log]:
    """What is decided for each batch on the way to the head, without a budget."""
    device = next(model.parameters()).device
    count = 0
    for batch in images:
        x = batch[0] if isinstance(batch, (tuple, list)) else batch
        log = Log(len(x))
        with kept(model), torch.no_grad():
            walk = Walk(model, x.to(device), log, budgeted=False)
            walk.to_exit(len(walk.stops) - 1)
        yield log
        count += len(x)
    if not count:
        raise ValueError("what images run cannot be found without images; found none")


def _layer_gates(model: Any) -> Any:
    return _gates(model, "layer_gates", "only layer gates shut or open units")


def _gates(model: Any, part: str, why: str) -> Any:
    dynamic_of(model)
    if not hasattr(model, part):
        raise ValueError(f"{why}; {families.model_name(model)!r} has none")
    return getattr(model, part)
