"""Decisions that are forced, in the place of those that gates and exits make."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Forced:
    """What `force` puts in the place of decisions; see there. `idle`: gated units that no image will ever run."""

    layer_keep: float | Tensor | None = None
    channel_keep: float | Sequence[Tensor] | None = None
    exit: int | Tensor | None = None
    idle: frozenset[int] = frozenset()

    def cut(self, units: int, widths: int) -> "Forced":
        """What is left of it in a network of so many gated units and gated hidden widths, without exits."""
        layer, channel = self.layer_keep, self.channel_keep
        if isinstance(layer, Tensor):
            layer = layer[:, :units]
        if isinstance(channel, Sequence):
            channel = channel[:widths]
        idle = frozenset(unit for unit in self.idle if unit < units)
        return Forced(layer if units else None, channel if widths else None, None, idle)


@dataclass
class Resolved:
    """What is forced, decision by decision."""

    layer_keep: Tensor | None  # bool [B, units]
    channel_keep: list[Tensor] | None  # bool [B, groups] for each gated hidden width
    exit: Tensor | None  # [B]
    starts: list[int]  # for each unit, how many gated hidden widths come before it
    idle: frozenset[int]  # gated units that no image will ever run


def resolve(model: Any, x: Tensor) -> Resolved:
    """What is forced in a dynamic model, for a batch of images x [B, C, H, W]: ratios drawn, shapes checked."""
    forced, batch = model.dynamic.forced, x.shape[0]
    layer_gates, channel_gates = getattr(model, "layer_gates", None), getattr(model, "channel_gates", None)
    layer = channel = leave = None
    if forced.layer_keep is not None:
        assert layer_gates is not None
        layer = _keeps("layer_keep", forced.layer_keep, batch, len(layer_gates), x.device)
    if forced.channel_keep is not None:
        assert channel_gates is not None
        counts = [len(sizes) for unit in channel_gates.sizes for sizes in unit]
        given = forced.channel_keep
        parts = [given] * len(counts) if isinstance(given, (int, float)) else list(given)
        channel = [_keeps("channel_keep", p, batch, n, x.device) for p, n in zip(parts, counts, strict=True)]
        if isinstance(given, (int, float)) and channel_gates.config.mode == "nested":
            channel = [keep.sort(dim=1, descending=True).values for keep in channel]
    if forced.exit is not None:
        leave = torch.as_tensor(forced.exit, device=x.device)
        if leave.dim() and len(leave) != batch:
            raise ValueError(f"force(exit=) needs one value or one for each of {batch} images; found {len(leave)}")
        leave = leave.expand(batch)
    sizes = channel_gates.sizes if channel_gates is not None else ()
    return Resolved(layer, channel, leave, [0, *itertools.accumulate(map(len, sizes))], forced.idle)


def _keeps(what: str, given: float | Tensor, batch: int, columns: int, device: torch.device) -> Tensor:
    if not isinstance(given, Tensor):
        return torch.rand(batch, columns).to(device) < given
    if given.shape not in ((batch, columns), (1, columns)):
        raise ValueError(f"force({what}=) needs a tensor of shape {(batch, columns)}; found {tuple(given.shape)}")
    return given.to(device).bool().expand(batch, columns)
