"""Budgets: what one image may cost at run time, without retraining."""

from collections.abc import Iterable
from typing import Any

import torch

from . import families
from .configs import BudgetConfig
from .costs import CostTable, machine_name
from .leaving import allowance, check_classes
from .measure import cost_table
from .walk import dynamic_of, table_for


def default_input_size(model: Any) -> tuple[int, int, int]:
    """The input size that a model was made for: (channels, height, width)."""
    cfg = getattr(model, "pretrained_cfg", None) or {}
    channels = getattr(model, "in_chans", None) or families.channels_in(model)
    height, width = tuple(cfg.get("input_size", (3, 224, 224)))[1:]
    return (channels, height, width)


def set_budget(
    model: Any,
    *,
    macs: int | Iterable[int] | torch.Tensor | None = None,
    fraction: float | None = None,
    latency_ms: float | None = None,
    energy_mj: float | None = None,
    exit: int | None = None,
    confidence: float | None = None,
    input_size: tuple[int, int, int] | None = None,
    table: CostTable | None = None,
) -> Any:
    """Say what one image may cost in eval; without an option, lift the budget.

    `macs`, `fraction`, `latency_ms` and `energy_mj` are hard: before an image goes past an exit, the dearest way to
    the next one must still fit, else it leaves there. What gates save on the way is spent on going further.

    Args:
        model: a dynamic model.
        macs: multiply-adds, one value for all images or one for each image of the batch.
        fraction: a share of the stock model's MACs at the same input size.
        latency_ms: milliseconds of one image alone, by a table measured on this machine.
        energy_mj: millijoules, by an energy table.
        exit: every image leaves here (0 is the first exit, the last is the model's own head).
        confidence: an image leaves at the first exit whose largest softmax probability is at least this. A mean
            budget: no image's cost is bounded.
        input_size: (channels, height, width) to check the budget for now (default: the model's own). It is checked
            again for the size that each forward pass meets.
        table: from `cost_table`, for `latency_ms` (default: measured now) or `energy_mj` (default: the default one).

    Returns:
        The same model.

    Raises:
        ValueError: if more than one option is given, the budget is below the dearest way to the first exit, or the
            table is of another model, machine or unit. The model's budget is then what it was.
    """
    dynamic = dynamic_of(model)
    if all(option is None for option in (macs, fraction, latency_ms, energy_mj, exit, confidence)):
        if table is not None or input_size is not None:
            raise ValueError("input_size= and table= go with a budget; found none")
        dynamic.budget = dynamic.limit = None
        return model
    fraction, latency_ms, energy_mj, exit, confidence = map(
        _scalar, (fraction, latency_ms, energy_mj, exit, confidence)
    )
    budget = BudgetConfig(_plain(macs), fraction, latency_ms, energy_mj, exit, confidence, input_size)
    dynamic.limit = check_budget(model, budget, table)
    dynamic.budget = budget
    return model


def set_price(model: Any, table: CostTable | None) -> Any:
    """Say what `Decisions.cost` is counted by in training: a table of `cost_table`, or None for MACs.

    Args:
        model: a dynamic model.
        table: of this model at the input size of training. Units are paid by the channels that run.

    Raises:
        ValueError: if the table is of another model.
    """
    dynamic = dynamic_of(model)
    if table is not None:
        _check_table(model, table, table_for(model, table.input_size), table.unit)
    dynamic.priced = None if table is None else table.by_channel()
    dynamic.price_lost = False
    return model


def check_budget(model: Any, budget: BudgetConfig, table: CostTable | None = None) -> CostTable | None:
    """Raise a `ValueError` if the model cannot keep the budget at all.

    Returns:
        The table that a budget of milliseconds or millijoules is counted by.
    """
    size = budget.input_size or default_input_size(model)
    counted = table_for(model, size)
    exits = len(counted.exits)
    if getattr(model, "num_classes", None) == 0:
        raise ValueError(f"a budget needs a model that classifies; {families.model_name(model)!r} has num_classes=0")
    check_classes(model)
    if budget.confidence is not None and getattr(model, "num_classes", None) == 1:
        raise ValueError("confidence= needs two classes or more: of one every image is sure; found num_classes=1")
    if budget.confidence is not None and exits == 1:
        raise ValueError(
            f"confidence= needs an exit before the head; {families.model_name(model)!r} has none: add_exits adds them"
        )
    if budget.exit is not None and budget.exit >= exits:
        raise ValueError(f"exit must be in 0..{exits - 1} for {families.model_name(model)!r}; found {budget.exit}")
    if table is not None and budget.unit not in ("latency_ms", "energy_mj"):
        raise ValueError("table= goes with latency_ms= or energy_mj=")
    if budget.unit == "macs":
        allowance(budget, counted, None)
    if budget.unit in (None, "macs"):
        return None
    limit = table or cost_table(model, size, str(budget.unit))
    _check_table(model, limit, counted, str(budget.unit))
    limit = limit.settled_as(counted)
    allowance(budget, limit, None)
    return limit


def _check_table(model: Any, table: CostTable, counted: CostTable, unit: str) -> None:
    """Whether a table is this model's, in this unit, from this machine."""
    if table.unit != unit:
        raise ValueError(f"the table must be in {unit}; found {table.unit}")
    if table.input_size != counted.input_size:
        raise ValueError(f"the table must be for input size {counted.input_size}; found {table.input_size}")
    if [_shape(row) for row in table.units] != [_shape(row) for row in counted.units]:
        raise ValueError(f"the table is of another model than {families.model_name(model)!r}")
    if len(table.exits) != len(counted.exits):
        raise ValueError(f"the table must have {len(counted.exits)} exits; found {len(table.exits)}")
    if unit == "latency_ms" and table.machine != machine_name(model):
        raise ValueError(f"the table was measured on another machine: {table.machine}; found {machine_name(model)}")


def _shape(row: Any) -> tuple[Any, ...]:
    return row.name, row.skippable, row.sizes


def _plain(macs: Any) -> int | tuple[int, ...] | None:
    """Numbers of any kind as Python ints."""
    if macs is None:
        return None
    values = macs.tolist() if hasattr(macs, "tolist") else macs
    if isinstance(values, Iterable) and not isinstance(values, str):
        return tuple(_whole(value) for value in values)
    return _whole(values)


def _scalar(value: Any) -> Any:
    """A number of numpy or torch as Python's; anything else as it is."""
    return value.item() if hasattr(value, "item") and getattr(value, "ndim", 1) == 0 else value


def _whole(value: Any) -> int:
    value = _scalar(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value // 1:
        raise ValueError(f"macs must be whole numbers, one or one for each image; found {value!r}")
    return int(value)
