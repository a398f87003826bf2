"""What the parts of a network cost: an image's cost is a sum over what it ran."""

import dataclasses
import itertools
import math
import platform
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class ConvCost:
    """A convolution of a unit and what follows it, with all channels."""

    cost: Any  # int in MACs, float in another unit
    extra: Any  # of what follows, proportional to the convolution's outputs
    inputs: int
    outputs: int
    groups: int = 1


@dataclass(frozen=True)
class UnitCost:
    """MACs of one unit.

    Attributes:
        name: of the unit's module.
        stage: from 0.
        gated: whether it has a gate of any kind.
        skippable: whether it has a layer gate.
        layer_gate: MACs of the layer gate, always paid.
        shortcut: MACs of the downsample, always paid.
        channel_gate: MACs of the channel gate, paid if the unit runs.
        convs: the branch, paid by the channels that run.
        sizes: for each gated hidden width, the sizes of its channel groups.
        divisible: whether the branch costs in proportion to the channels that run; if not, it is paid in full.
        shut: whether the unit is shut for good: see `shut_units`.
        open: whether every image runs it that comes there: see `open_units`.
        channels: for each gated hidden width, keeps of its groups where they are settled: see `settle_channels`; else
            None.
    """

    name: str
    stage: int
    gated: bool
    skippable: bool
    layer_gate: Any  # numbers: int in MACs, float in another unit
    shortcut: Any
    channel_gate: Any
    convs: tuple[ConvCost, ...]
    sizes: tuple[tuple[int, ...], ...] = ()
    divisible: bool = True
    shut: bool = False
    open: bool = False
    channels: tuple[tuple[bool, ...], ...] | None = None

    @property
    def whole(self) -> bool:
        """Whether costs are whole numbers, as MACs are."""
        return all(isinstance(conv.cost, int) for conv in self.convs)

    @property
    def branch(self) -> Any:
        """Cost of the branch with all channels."""
        return sum(conv.cost + conv.extra for conv in self.convs)

    @property
    def full(self) -> Any:
        """MACs of the stock unit: branch and shortcut."""
        return self.branch + self.shortcut

    @property
    def dearest(self) -> Any:
        """MACs of the unit at most, gates included."""
        if self.shut:
            return self.cheapest
        most = self.branch if self.channels is None or not self.divisible else self._extreme_branch(True)
        return most + self.shortcut + self.layer_gate + self.channel_gate

    @property
    def cheapest(self) -> Any:
        """MACs of the unit at least, gates included."""
        if self.skippable and not self.open:
            return self.layer_gate + self.shortcut
        least = self._extreme_branch(False) if self.sizes and self.divisible else self.branch
        return least + self.channel_gate + self.layer_gate + self.shortcut

    def extreme(self, every: bool) -> list[Tensor]:
        """Keeps [1, groups] of the channel groups of each gated hidden width: all or none, but for settled ones."""
        if self.channels is not None:
            return [torch.tensor([part]) for part in self.channels]
        return [torch.full((1, len(sizes)), every) for sizes in self.sizes]

    def _extreme_branch(self, every: bool) -> Any:
        return self._price_convs(self.extreme(every)).item()

    def price(self, keep: Tensor | None, channels: Sequence[Tensor] | None) -> Any:
        """MACs of each image in this unit.

        Args:
            keep: [B], 0 or 1 (bool, or float with a gradient); None if the unit is not skippable.
            channels: for each gated hidden width, keeps of its groups [B, groups]; None if not gated.

        Returns:
            [B], int64 for bool keeps, else float; a number if nothing of the unit depends on the image.
        """
        inside = self.channel_gate + (
            self.branch if channels is None or not self.divisible else self._price_convs(channels)
        )
        outside = self.layer_gate + self.shortcut
        if keep is None:
            return inside + outside
        return _number(keep, self.whole) * inside + outside

    def price_one(self, keep: bool, channels: Sequence[Sequence[bool]] | None) -> Any:
        """`price` of one image in plain numbers, which take a tenth of the time of small tensors.

        Args:
            keep: whether the unit runs.
            channels: for each gated hidden width, keeps of its groups; None if not gated.
        """
        outside = self.layer_gate + self.shortcut
        if not keep:
            return outside
        if channels is None or not self.divisible:
            return self.channel_gate + self.branch + outside
        if any(conv.groups > 1 for conv in self.convs):
            return self._price_convs([torch.tensor([part]) for part in channels]).item() + self.channel_gate + outside
        counts = [sum(itertools.compress(sizes, part)) for sizes, part in zip(self.sizes, channels, strict=True)]
        total = self.channel_gate + outside
        for i, conv in enumerate(self.convs):
            kept_in = conv.inputs if i == 0 else counts[i - 1]
            kept_out = counts[i] if i < len(counts) else conv.outputs
            total += _share(conv.cost, conv.inputs * conv.outputs) * kept_in * kept_out
            if conv.extra:
                total += _share(conv.extra, conv.outputs) * kept_out if i < len(counts) else conv.extra
        return total

    def _price_convs(self, channels: Sequence[Tensor]) -> Any:
        total: Any = 0
        for i, conv in enumerate(self.convs):
            source = channels[i - 1] if i else None
            target = channels[i] if i < len(channels) else None
            if conv.groups > 1 and source is not None and target is not None:
                total = total + self._price_grouped(conv, i, source, target)
            else:
                pair = _share(conv.cost, conv.inputs * conv.outputs)
                kept_in = conv.inputs if source is None else _count(source, self.sizes[i - 1], self.whole)
                kept_out = conv.outputs if target is None else _count(target, self.sizes[i], self.whole)
                total = total + pair * kept_in * kept_out
            if conv.extra:
                each = _share(conv.extra, conv.outputs) if target is not None else conv.extra
                total = total + (each * _count(target, self.sizes[i], self.whole) if target is not None else each)
        return total

    def _price_grouped(self, conv: ConvCost, i: int, source: Tensor, target: Tensor) -> Tensor:
        """A grouped convolution runs the groups whose inputs and outputs are both kept."""
        ins = _by_group(source, self.sizes[i - 1], conv.inputs // conv.groups)
        outs = _by_group(target, self.sizes[i], conv.outputs // conv.groups)
        return (_number(ins, self.whole) * _number(outs, self.whole)).sum(1) * _share(conv.cost, conv.groups)


def _share(cost: Any, parts: int) -> Any:
    """One of equal parts; exact for MACs."""
    return cost // parts if isinstance(cost, int) else cost / parts


def _number(keep: Tensor, whole: bool) -> Tensor:
    """Keeps as numbers whose sums are exact for costs that are whole, and as good as Python's for others."""
    return keep.long() if whole and keep.dtype == torch.bool else keep.double()


def _count(keep: Tensor, sizes: tuple[int, ...], whole: bool) -> Tensor:
    """Channels kept. keep: [B, groups] -> [B]. Sums and products with numbers: a GPU is not waited for."""
    values = _number(keep, whole)
    total: Any = 0
    first = 0
    for size, run in itertools.groupby(sizes):
        last = first + len(list(run))
        total, first = total + values[:, first:last].sum(1) * size, last
    return total


def _by_group(keep: Tensor, sizes: tuple[int, ...], per_group: int) -> Tensor:
    """Keeps of channel groups as keeps of a convolution's groups. -> [B, conv groups]."""
    runs, first = [], 0
    for size, run in itertools.groupby(sizes):
        last = first + len(list(run))
        runs.append(keep[:, first:last].repeat_interleave(size // per_group, dim=1))
        first = last
    return torch.cat(runs, 1)


@dataclass(frozen=True)
class ExitCost:
    """MACs of leaving at one exit.

    Attributes:
        name: of the unit after which it stands, or "head".
        after: place of that unit in the running order.
        head: MACs of the branch classifier itself.
        cheapest: MACs of an image that leaves here, at least.
        dearest: at most.
    """

    name: str
    after: int
    head: Any
    cheapest: Any
    dearest: Any


_COSTS = ("cost", "extra", "layer_gate", "shortcut", "channel_gate", "head", "cheapest", "dearest", "dense", "stem")


@dataclass(frozen=True)
class CostTable:
    """MACs of every part of a network for one image.

    Attributes:
        input_size: (channels, height, width).
        unit: "macs", "latency_ms" or "energy_mj".
        dense: MACs of the stock model.
        stem: before the first unit.
        leave: after each stage, before the next or the head (transitions of a DenseNet).
        units: every unit in running order, gated or not.
        exits: every exit in order, the model's own head last.
        machine: what a measured table was measured on.
    """

    input_size: tuple[int, int, int]
    unit: str
    dense: Any  # numbers: int in MACs, float in another unit
    stem: Any
    leave: tuple[Any, ...]
    units: tuple[UnitCost, ...]
    exits: tuple[ExitCost, ...]
    machine: str = ""

    def by_channel(self) -> "CostTable":
        """The same table, units paid by the channels that run: a smooth cost to train for."""
        return replace(self, units=tuple(replace(u, divisible=True) for u in self.units))

    def scaled(self, factor: float, machine: str) -> "CostTable":
        """The same table with every cost multiplied."""

        def times(row: Any) -> Any:
            names = [f.name for f in dataclasses.fields(row)]
            return replace(row, **{n: getattr(row, n) * factor for n in names if n in _COSTS})

        units = tuple(replace(times(unit), convs=tuple(times(conv) for conv in unit.convs)) for unit in self.units)
        exits = tuple(map(times, self.exits))
        leave = tuple(cost * factor for cost in self.leave)
        return replace(times(self), units=units, exits=exits, leave=leave, machine=machine)

    def with_parts(self, values: dict[str, float]) -> "CostTable":
        """The same table with given costs of the stock model's parts and of the exits, by name.

        Raises:
            ValueError: if a part has no value, or a value no part; the message names them.
        """
        own: dict[str, Any] = {"stem": self.stem, **{unit.name: unit.full for unit in self.units}}
        own |= {f"leave {k}": cost for k, cost in enumerate(self.leave) if cost}
        own |= {f"exit {k}": stop.head for k, stop in enumerate(self.exits[:-1])} | {"head": self.exits[-1].head}
        missing, unknown = [n for n in own if n not in values], [n for n in values if n not in own]
        if missing or unknown:
            raise ValueError(
                f"the table must have a value for each of {len(own)} parts; missing: {', '.join(missing) or 'none'}; "
                f"unknown: {', '.join(unknown) or 'none'}"
            )
        units = []
        for unit in self.units:
            factor = values[unit.name] / unit.full
            convs = tuple(replace(c, cost=c.cost * factor, extra=c.extra * factor) for c in unit.convs)
            units.append(replace(unit, shortcut=unit.shortcut * factor, convs=convs))
        leave = tuple(values[f"leave {k}"] if cost else 0 for k, cost in enumerate(self.leave))
        heads = [values[f"exit {k}"] for k in range(len(self.exits) - 1)] + [values["head"]]
        return assembled(replace(self, stem=values["stem"], leave=leave, units=tuple(units)), heads)

    def settled_as(self, other: "CostTable") -> "CostTable":
        """The same table with the units settled that are so in another one, whose gates are asked where its are.

        Raises:
            ValueError: if a gate is asked there that was not when this table was made; the message names its unit.
        """
        rows = []
        for unit, wanted in zip(self.units, other.units, strict=True):
            if wanted.layer_gate and not unit.layer_gate:
                raise ValueError(
                    f"the table was made when the gate of {unit.name} was not asked, and does not tell its cost: "
                    "make it anew"
                )
            if wanted.channels is None and unit.channels is not None:
                raise ValueError(
                    f"the table was made when the channels of {unit.name} were settled, and does not tell its channel "
                    "gate's cost: make it anew"
                )
            row = replace(unit, shut=wanted.shut, open=wanted.open, channels=wanted.channels)
            layer, channel = bool(wanted.layer_gate), wanted.channels is None
            rows.append(replace(row, layer_gate=row.layer_gate * layer, channel_gate=row.channel_gate * channel))
        if tuple(rows) == self.units:
            return self
        return assembled(replace(self, units=tuple(rows)), [stop.head for stop in self.exits])

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "CostTable":
        """The inverse of `to_dict`, also after a round trip through JSON."""
        units = []
        for row in values["units"]:
            convs = tuple(ConvCost(**conv) for conv in row["convs"])
            known = row.get("channels")
            more = {"sizes": tuple(map(tuple, row["sizes"])), "channels": known and tuple(map(tuple, known))}
            units.append(UnitCost(**{**row, "convs": convs, **more}))
        rest = {"units": tuple(units), "exits": tuple(ExitCost(**row) for row in values["exits"])}
        rest |= {"leave": tuple(values["leave"]), "input_size": tuple(values["input_size"])}
        return cls(**{**values, **rest})

    def without_gates(self) -> "CostTable":
        """The same table with gates that cost nothing: what a static network of the same units pays."""
        units = tuple(replace(unit, layer_gate=0, channel_gate=0) for unit in self.units)
        return assembled(replace(self, units=units), [stop.head for stop in self.exits])

    def price(self, layers: Tensor, channels: Sequence[Tensor] = ()) -> Tensor:
        """Cost of going to the head, no other exit evaluated, under each of some patterns of decisions.

        Args:
            layers: bool [P, layer gates]; [P, 0] without layer gates.
            channels: for each gated hidden width, bool keeps of its groups [P, groups].

        Returns:
            [P].
        """
        total: Any = self.stem + sum(self.leave) + self.exits[-1].head
        keeps, widths = iter(layers.unbind(1)), iter(channels)
        for unit in self.units:
            keep = next(keeps) if unit.skippable else None
            total = total + unit.price(keep, [next(widths) for _ in unit.sizes] or None)
        return torch.as_tensor(total, device=layers.device).expand(len(layers))

    @property
    def cheapest(self) -> Any:
        """Cost of an image that takes the cheapest way out."""
        return min(stop.cheapest for stop in self.exits)

    @property
    def dearest(self) -> Any:
        """MACs of an image that takes the dearest way to the head."""
        return self.exits[-1].dearest

    def segment(self, exit_index: int) -> Any:
        """MACs of the dearest way from the exit before to this one, its classifier included."""
        reached = self.exits[exit_index - 1] if exit_index else None
        return self.exits[exit_index].dearest - (reached.dearest - reached.head if reached else 0)

    def break_even(self) -> tuple[float, ...]:
        """For each exit but the head: what share of the images that come to it must leave there for it to save cost.

        What its classifier costs, by what is left of the dearest way to the head. Later exits and skipped units leave
        less to save, and ask for more. Above 1, and infinite where nothing is left: it cannot save anything.
        """
        left = [self.exits[-1].dearest - (stop.dearest - stop.head) for stop in self.exits[:-1]]
        pairs = zip(self.exits, left, strict=False)
        return tuple(float(stop.head / saved) if saved else math.inf for stop, saved in pairs)


def assembled(table: CostTable, heads: Sequence[Any]) -> CostTable:
    """The table with its sums made anew from its parts. heads: cost of each classifier, the head last."""
    low = high = dense = table.stem
    stops = []
    for i, unit in enumerate(table.units):
        low, high, dense = low + unit.cheapest, high + unit.dearest, dense + unit.full
        for stop, head in zip(table.exits[:-1], heads[:-1], strict=True):
            if stop.after == i:
                stops.append(replace(stop, head=head, cheapest=low + head, dearest=high + head))
        if i + 1 == len(table.units) or table.units[i + 1].stage != unit.stage:
            cost = table.leave[unit.stage]
            low, high, dense = low + cost, high + cost, dense + cost
    last = replace(table.exits[-1], head=heads[-1], cheapest=low + heads[-1], dearest=high + heads[-1])
    return replace(table, dense=dense + heads[-1], exits=(*stops, last))


OPTIMISED = ", optimised"


def machine_name(model: nn.Module) -> str:
    """What a latency depends on beside the model: processor or GPU, threads, torch, precision, optimised or not."""
    like = next(model.parameters())
    optimised = getattr(getattr(model, "dynamic", None), "origin", None) is not None
    how = f"torch {torch.__version__}, {str(like.dtype).removeprefix('torch.')}" + (OPTIMISED if optimised else "")
    if like.device.type == "cuda":
        return f"{torch.cuda.get_device_name(like.device)}, {how}"
    return f"{platform.machine()} {platform.processor()}, {torch.get_num_threads()} threads, {how}"
