"""What the parts of a network cost, and their multiply-adds, counted from shapes once for each input size.

The parts are run one by one on the meta device under torch's own flop counter, so that a cost is what the counter
would see (1 MAC = 2 FLOPs). An image's cost is then a sum over what it ran.
"""

import copy
import dataclasses
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from . import families
from .units import branch, close, join, run_dense, shortcut


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
        return self.full + self.layer_gate + self.channel_gate

    @property
    def cheapest(self) -> Any:
        """MACs of the unit at least, gates included."""
        if self.skippable:
            return self.layer_gate + self.shortcut
        none = [torch.zeros(1, len(sizes), dtype=torch.bool) for sizes in self.sizes]
        least = self._price_convs(none).item() if none and self.divisible else self.branch
        return least + self.channel_gate + self.shortcut

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
        return _number(keep) * inside + outside

    def _price_convs(self, channels: Sequence[Tensor]) -> Any:
        total: Any = 0
        for i, conv in enumerate(self.convs):
            source = channels[i - 1] if i else None
            target = channels[i] if i < len(channels) else None
            if conv.groups > 1 and source is not None and target is not None:
                total = total + self._price_grouped(conv, i, source, target)
            else:
                pair = _share(conv.cost, conv.inputs * conv.outputs)
                kept_in = conv.inputs if source is None else _count(source, self.sizes[i - 1])
                kept_out = conv.outputs if target is None else _count(target, self.sizes[i])
                total = total + pair * kept_in * kept_out
            if conv.extra:
                each = _share(conv.extra, conv.outputs) if target is not None else conv.extra
                total = total + (each * _count(target, self.sizes[i]) if target is not None else each)
        return total

    def _price_grouped(self, conv: ConvCost, i: int, source: Tensor, target: Tensor) -> Tensor:
        """A grouped convolution runs the groups whose inputs and outputs are both kept."""
        ins = _by_group(source, self.sizes[i - 1], conv.inputs // conv.groups)
        outs = _by_group(target, self.sizes[i], conv.outputs // conv.groups)
        return (_number(ins) * _number(outs)).sum(1) * _share(conv.cost, conv.groups)


def _share(cost: Any, parts: int) -> Any:
    """One of equal parts; exact for MACs."""
    return cost // parts if isinstance(cost, int) else cost / parts


def _number(keep: Tensor) -> Tensor:
    """Keeps as numbers whose sums of MACs are exact."""
    return keep.long() if keep.dtype == torch.bool else keep.double()


def _count(keep: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Channels kept. keep: [B, groups] -> [B]."""
    values = _number(keep)
    return (values * torch.tensor(sizes, device=keep.device, dtype=values.dtype)).sum(1)


def _by_group(keep: Tensor, sizes: tuple[int, ...], per_group: int) -> Tensor:
    """Keeps of channel groups as keeps of a convolution's groups. -> [B, conv groups]."""
    counts = torch.tensor([size // per_group for size in sizes], device=keep.device)
    return keep.repeat_interleave(counts, dim=1)


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
        return dataclasses.replace(self, units=tuple(dataclasses.replace(u, divisible=True) for u in self.units))

    def scaled(self, factor: float, machine: str) -> "CostTable":
        """The same table with every cost multiplied."""

        def times(row: Any) -> Any:
            names = [f.name for f in dataclasses.fields(row)]
            return dataclasses.replace(row, **{n: getattr(row, n) * factor for n in names if n in _COSTS})

        units = tuple(
            dataclasses.replace(times(unit), convs=tuple(times(conv) for conv in unit.convs)) for unit in self.units
        )
        exits = tuple(map(times, self.exits))
        leave = tuple(cost * factor for cost in self.leave)
        return dataclasses.replace(times(self), units=units, exits=exits, leave=leave, machine=machine)

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


def count_macs(model: nn.Module, input_size: tuple[int, int, int]) -> CostTable:
    """Count the multiply-adds of every part of a model, dynamic or stock, for one image; it is not changed.

    Raises:
        ValueError: if the model has no units, or cannot run an input of that size.
    """
    return alone(lambda: build_table(on_meta(model), input_size, MacMeter()), model, input_size)


def alone(work: Callable[[], CostTable], model: nn.Module, input_size: tuple[int, int, int]) -> CostTable:
    """Do the work in a thread of its own: no user's flop counter, inference mode, autocast or default device there."""
    families.units(model)
    box: list[CostTable | BaseException] = []

    def catch() -> None:
        try:
            box.append(work())
        except BaseException as error:  # handed to the caller's thread
            box.append(error)

    thread = threading.Thread(target=catch)
    thread.start()
    thread.join()
    if isinstance(box[0], BaseException):
        raise ValueError(f"{families.model_name(model)!r} cannot run an input of {input_size}: {box[0]}") from box[0]
    return box[0]


def on_meta(model: nn.Module) -> nn.Module:
    """A copy in eval mode whose tensors have shapes only, without the user's hooks."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
    for buffer in model.buffers():
        memo[id(buffer)] = buffer.detach().to("meta")
    shapes = copy.deepcopy(model, memo).eval()
    for module in shapes.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    return shapes


class Meter(Protocol):
    """Runs the parts of a model and says what each cost."""

    unit: str
    divisible: bool  # whether a convolution's cost is in proportion to its channels

    def input(self, model: nn.Module, size: tuple[int, int, int]) -> Tensor:
        """An image to run the parts on: [1, C, H, W]."""

    def run(self, part: Callable[..., Any], *args: Any) -> tuple[Any, Any]:
        """What the part gives, and what it cost."""

    def __enter__(self) -> Any: ...

    def __exit__(self, *args: Any) -> Any: ...


class MacMeter:
    """Counts multiply-adds of parts that are run on the meta device."""

    unit = "macs"
    divisible = True

    def __init__(self) -> None:
        self.counter, self.seen = FlopCounterMode(display=False), 0

    def __enter__(self) -> None:
        self.counter.__enter__()

    def __exit__(self, *args: Any) -> None:
        self.counter.__exit__(*args)

    def input(self, model: nn.Module, size: tuple[int, int, int]) -> Tensor:
        """An image that has a shape only: [1, C, H, W]."""
        return torch.empty(1, *size, device="meta", dtype=next(model.parameters()).dtype)

    def run(self, part: Callable[..., Any], *args: Any) -> tuple[Any, int]:
        """What the part gives, and its MACs."""
        out = part(*args)
        before, self.seen = self.seen, self.counter.get_total_flops()
        return out, (self.seen - before) // 2


def build_table(model: Any, size: tuple[int, int, int], meter: Meter) -> CostTable:
    """Run every part of a model once, all gates open, and note what each cost."""
    family = families.family(model)
    exits = getattr(model, "exits", None)
    places = exits.after if exits is not None else ()
    rows: list[UnitCost] = []
    leave: list[Any] = []
    stops: list[ExitCost] = []
    memory = None
    with torch.no_grad(), meter:
        (_, x), stem = meter.run(family.stem, model, meter.input(model, size))
        low = high = stem
        for i, unit in enumerate(families.units(model)):
            x, memory, row = _count_unit(meter, model, unit, i, x, memory)
            rows.append(row)
            low, high = low + row.cheapest, high + row.dearest
            if exits is not None and i in places:
                _, head = meter.run(exits, len(stops), x)
                stops.append(ExitCost(unit.name, i, head, low + head, high + head))
            if unit.last:
                x, cost = meter.run(family.leave, model, unit.stage, x)
                leave.append(cost)
                low, high = low + cost, high + cost
        _, head = meter.run(family.head, model, x)
    stops.append(ExitCost("head", len(rows) - 1, head, low + head, high + head))
    dense = stem + sum(row.full for row in rows) + sum(leave) + head
    return CostTable(size, meter.unit, dense, stem, tuple(leave), tuple(rows), tuple(stops))


def _count_unit(
    meter: Meter, model: Any, unit: families.Unit, i: int, x: Tensor, memory: Any
) -> tuple[Tensor, Any, UnitCost]:
    layer_gates, channel_gates = getattr(model, "layer_gates", None), getattr(model, "channel_gates", None)
    layer_gate: Any = 0
    channel_gate: Any = 0
    sizes: tuple[tuple[int, ...], ...] = ()
    if layer_gates is not None and i > 0:
        (_, memory), layer_gate = meter.run(layer_gates, i - 1, x, memory)
    if channel_gates is not None and i > 0:
        _, channel_gate = meter.run(channel_gates, i - 1, x)
        sizes = channel_gates.sizes[i - 1]
    added, short = meter.run(shortcut, unit, x)
    y, convs = _count_convs(meter, unit, x)
    y = close(unit, y, added)
    if not meter.divisible:  # measured: make the convolutions add up to the unit as it runs
        whole = max(meter.run(run_dense, unit, x)[1] - short, 0)
        factor = whole / sum(conv.cost + conv.extra for conv in convs)
        convs = tuple(dataclasses.replace(c, cost=c.cost * factor, extra=c.extra * factor) for c in convs)
    skippable = layer_gates is not None and i > 0
    gated = skippable or bool(sizes)
    row = UnitCost(
        unit.name, unit.stage, gated, skippable, layer_gate, short, channel_gate, convs, sizes, meter.divisible
    )
    return join(unit, x, y), memory, row


def _count_convs(meter: Meter, unit: families.Unit, x: Tensor) -> tuple[Tensor, tuple[ConvCost, ...]]:
    """The branch, convolution by convolution: what it gives, and what each cost."""

    def follow(modules: families.After, x: Tensor) -> Tensor:
        for module in modules:
            x = x if module is None else module(x)
        return x

    if unit.kind.branch is not None:  # taken as a whole
        x, cost = meter.run(branch, unit, x)
        return x, (ConvCost(cost, 0, 1, 1),)
    x = follow(unit.kind.before(unit.module), x)
    found = []
    for conv, after in unit.kind.steps(unit.module):
        x, cost = meter.run(conv, x)
        x, extra = meter.run(follow, after, x)
        found.append(ConvCost(cost, extra, conv.in_channels, conv.out_channels, conv.groups))
    return x, tuple(found)
