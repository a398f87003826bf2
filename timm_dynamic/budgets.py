"""Budgets: what one image may cost at run time, without retraining."""

from collections.abc import Iterable
from typing import Any

import torch

from . import families
from .configs import BudgetConfig
from .leaving import allowed_macs
from .walk import dynamic_of, table_for


def default_input_size(model: Any) -> tuple[int, int, int]:
    """The input size that a model was made for: (channels, height, width)."""
    cfg = getattr(model, "pretrained_cfg", None) or {}
    channels = getattr(model, "in_chans", 3)
    height, width = tuple(cfg.get("input_size", (3, 224, 224)))[1:]
    return (channels, height, width)


def set_budget(
    model: Any,
    *,
    macs: int | Iterable[int] | torch.Tensor | None = None,
    fraction: float | None = None,
    exit: int | None = None,
    confidence: float | None = None,
    input_size: tuple[int, int, int] | None = None,
) -> Any:
    """Say what one image may cost in eval; without an option, lift the budget.

    `macs` and `fraction` are hard: before an image goes past an exit, the dearest way to the next one must still fit,
    else it leaves there. What gates save on the way is spent on going further.

    Args:
        model: a dynamic model.
        macs: multiply-adds, one value for all images or one for each image of the batch.
        fraction: a share of the stock model's MACs at the same input size.
        exit: every image leaves here (0 is the first exit, the last is the model's own head).
        confidence: an image leaves at the first exit whose largest softmax probability is at least this. A mean
            budget: no image's cost is bounded.
        input_size: (channels, height, width) to check the budget for now (default: the model's own). It is checked
            again for the size that each forward pass meets.

    Returns:
        The same model.

    Raises:
        ValueError: if more than one option is given, or the budget is below the dearest way to the first exit.
    """
    dynamic = dynamic_of(model)
    if all(option is None for option in (macs, fraction, exit, confidence)):
        dynamic.budget = None
        return model
    budget = BudgetConfig(_plain(macs), fraction, exit, confidence, input_size)
    check_budget(model, budget)
    dynamic.budget = budget
    return model


def check_budget(model: Any, budget: BudgetConfig) -> None:
    """Raise a `ValueError` if the model cannot keep the budget at all."""
    exits = len(model.exits) + 1 if hasattr(model, "exits") else 1
    if budget.exit is not None and budget.exit >= exits:
        raise ValueError(f"exit must be in 0..{exits - 1} for {families.model_name(model)!r}; found {budget.exit}")
    if budget.macs is not None or budget.fraction is not None:
        allowed_macs(budget, table_for(model, budget.input_size or default_input_size(model)), None)


def _plain(macs: Any) -> int | tuple[int, ...] | None:
    """Numbers of any kind as Python ints."""
    if macs is None or isinstance(macs, bool):
        return macs
    if isinstance(macs, (int, float)):
        return _whole(macs)
    values = macs.tolist() if hasattr(macs, "tolist") else list(macs)
    return tuple(_whole(v) for v in values) if isinstance(values, list) else _whole(values)


def _whole(value: Any) -> int:
    if isinstance(value, float) and not value.is_integer():
        raise ValueError(f"macs must be whole numbers; found {value!r}")
    return int(value)
