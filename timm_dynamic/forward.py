"""Forward passes of a dynamic network, and what was decided in them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .leaving import leave_early
from .walk import Log, Walk, dynamic_of


@dataclass
class Decisions:
    """What a dynamic network decided for a batch; `units` are the gated units in running order.

    Attributes:
        logits: [B, classes], of the exit that each image left at.
        exit_logits: for each exit, the head last: [B, classes], NaN where the exit was not evaluated.
        layer_keep: [B, units], 1 = run. Bool in eval, straight-through floats in training; 0 where never reached.
        layer_prob: [B, units], what the gates said, in float32, in training with a gradient; 0 where never reached.
        channel_keep: for each gated hidden width [B, groups]; 0 in a skipped unit.
        exit_index: [B] int64.
        macs: [B] int64, the cost of skipping execution, whatever the execution was.
        cost: [B] float, the same; in training with a gradient to the gates, and in the unit set by `set_price`.
    """

    logits: Tensor
    exit_logits: list[Tensor]
    layer_keep: Tensor
    layer_prob: Tensor
    channel_keep: list[Tensor]
    exit_index: Tensor
    macs: Tensor
    cost: Tensor


def forward(model: Any, x: Tensor) -> Tensor | tuple[Tensor, ...]:
    """The forward pass of a dynamic model. x: [B, C, H, W].

    Returns:
        Logits [B, classes]; in training, if there are exits, a tuple of the logits of each, the head last.
    """
    walk = Walk(model, x)
    if model.training:
        logits = _all_exits(walk)
        return tuple(logits) if walk.exits is not None else logits[0]
    return leave_early(walk, x.shape[0])[0]


def features(model: Any, x: Tensor) -> Tensor:
    """What timm's `forward_features` gives: the trunk's output, gates at work, exits and budgets aside."""
    walk = Walk(model, x, budgeted=False)
    walk.to_exit(len(walk.stops) - 1)
    return walk.finish(walk.x)


def _all_exits(walk: Walk) -> list[Tensor]:
    """Logits of every exit, the head last. All come after the last unit: tools that trace look for outputs there."""
    seen = []
    for index in range(len(walk.stops)):
        walk.to_exit(index)
        seen.append(walk.x)
        walk.pay_exit(index)
    return [walk.classify(index, x) for index, x in enumerate(seen)]


def decide(model: nn.Module, x: Tensor) -> Decisions:
    """Run a dynamic model and tell what it decided.

    Changes neither mode nor grad state. In training all exits are evaluated, and keeps and `cost` carry gradients.

    Args:
        model: a dynamic model.
        x: [B, C, H, W].

    Raises:
        ValueError: if the model is a stock one, or the budget does not fit this input.
    """
    dynamic_of(model)
    batch = x.shape[0]
    log = Log(batch)
    walk = Walk(model, x, log)
    exit_logits: Sequence[Tensor | None]
    if model.training:
        exit_logits = all_logits = _all_exits(walk)
        if walk.forced is not None and log.layer_prob:  # forced or not, the optimiser meets the gates
            all_logits[-1] = all_logits[-1] + (0 * torch.stack(log.layer_prob).sum()).to(all_logits[-1].dtype)
        assert walk.macs is not None
        logits, index, spent = all_logits[-1], len(all_logits) - 1, walk.macs.spent
    else:
        logits, exit_logits, index, spent = leave_early(walk, batch, keep_all=True)
    macs = _for_all(spent, batch, x.device)
    cost = _for_all(walk.price.spent, batch, x.device) if walk.price and model.training else macs
    blank = torch.full_like(logits.detach(), float("nan"))
    layers = len(walk.layer_gates) if walk.layer_gates is not None else 0
    groups = [len(s) for unit in walk.channel_gates.sizes for s in unit] if walk.channel_gates is not None else []
    keep_dtype = torch.float32 if model.training else torch.bool
    # units after the last exit that any image reached have no entries in the log: nothing of them was kept
    missed = [torch.zeros(batch, n, dtype=keep_dtype, device=x.device) for n in groups[len(log.channel_keep) :]]
    return Decisions(
        logits=logits,
        exit_logits=[blank if values is None else values for values in exit_logits],
        layer_keep=_columns(log.layer_keep, batch, layers, keep_dtype, x.device),
        layer_prob=_columns(log.layer_prob, batch, layers, torch.float32, x.device),
        channel_keep=log.channel_keep + missed,
        exit_index=_for_all(index, batch, x.device),
        macs=macs.detach().round().long(),
        cost=cost.float(),
    )


def _for_all(value: Any, batch: int, device: torch.device) -> Tensor:
    """A value of each image [B], or one number for all of them; nothing is copied from the CPU."""
    return value.expand(batch) if isinstance(value, Tensor) else torch.full((batch,), value, device=device)


def _columns(found: list[Tensor], batch: int, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Columns as one tensor [B, count], zeros for those that were not reached."""
    out = [*found, *[torch.zeros(batch, dtype=dtype, device=device)] * (count - len(found))]
    return torch.stack(out, 1) if out else torch.zeros(batch, 0, dtype=dtype, device=device)


def anytime(model: nn.Module, x: Tensor) -> Iterator[Tensor]:
    """Logits of each exit in order, the head last; the work to the next exit is done when it is asked for.

    Args:
        model: a dynamic model in eval mode; its budget is not used.
        x: [B, C, H, W].

    Raises:
        ValueError: if the model is a stock one or in training mode.
    """
    dynamic_of(model)
    if model.training:
        raise ValueError("anytime needs a model in eval mode; found training mode: call model.eval() first")
    return _anytime(model, x)


def _anytime(model: Any, x: Tensor) -> Iterator[Tensor]:
    walk = Walk(model, x, budgeted=False)
    for index in range(len(walk.stops)):
        walk.to_exit(index)
        yield walk.classify(index, walk.x)
