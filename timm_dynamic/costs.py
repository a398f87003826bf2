"""What a network costs: multiply-adds of every part, counted from shapes once for each input size.

The parts are run one by one on the meta device under torch's own flop counter, so that a cost is what the counter
would see (1 MAC = 2 FLOPs). An image's cost is then a sum over what it ran.
"""

import copy
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from . import families
from .configs import check_input_size
from .units import branch, close, join, shortcut


@dataclass(frozen=True)
class ConvCost:
    """A convolution of a unit and what follows it. MACs with all channels."""

    macs: int
    after: int  # of what follows, proportional to the convolution's outputs
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
    """

    name: str
    stage: int
    gated: bool
    skippable: bool
    layer_gate: int
    shortcut: int
    channel_gate: int
    convs: tuple[ConvCost, ...]
    sizes: tuple[tuple[int, ...], ...] = ()

    @property
    def branch(self) -> int:
        """MACs of the branch with all channels."""
        return sum(conv.macs + conv.after for conv in self.convs)

    @property
    def full(self) -> int:
        """MACs of the stock unit: branch and shortcut."""
        return self.branch + self.shortcut

    @property
    def dearest(self) -> int:
        """MACs of the unit at most, gates included."""
        return self.full + self.layer_gate + self.channel_gate

    @property
    def cheapest(self) -> int:
        """MACs of the unit at least, gates included."""
        least = self.channel_gate + int(_no_channels(self)) + self.shortcut + self.layer_gate
        return self.layer_gate + self.shortcut if self.skippable else least

    def price(self, keep: Tensor | None, channels: Sequence[Tensor] | None) -> Tensor | int:
        """MACs of each image in this unit.

        Args:
            keep: [B], 0 or 1 (bool, or float with a gradient); None if the unit is not skippable.
            channels: for each gated hidden width, keeps of its groups [B, groups]; None if not gated.

        Returns:
            [B], int64 for bool keeps, else float; a number if nothing of the unit depends on the image.
        """
        inside = self.channel_gate + (self.branch if channels is None else self._price_convs(channels))
        outside = self.layer_gate + self.shortcut
        if keep is None:
            return inside + outside
        return _number(keep) * inside + outside

    def _price_convs(self, channels: Sequence[Tensor]) -> Tensor | int:
        total: Tensor | int = 0
        for i, conv in enumerate(self.convs):
            source = channels[i - 1] if i else None
            target = channels[i] if i < len(channels) else None
            if conv.groups > 1 and source is not None and target is not None:
                total = total + self._price_grouped(conv, i, source, target)
            else:
                pair = conv.macs // (conv.inputs * conv.outputs)
                kept_in = conv.inputs if source is None else _count(source, self.sizes[i - 1])
                kept_out = conv.outputs if target is None else _count(target, self.sizes[i])
                total = total + pair * kept_in * kept_out
            if conv.after:
                each = conv.after // conv.outputs if target is not None else conv.after
                total = total + (each * _count(target, self.sizes[i]) if target is not None else each)
        return total

    def _price_grouped(self, conv: ConvCost, i: int, source: Tensor, target: Tensor) -> Tensor:
        """A grouped convolution runs the groups whose inputs and outputs are both kept."""
        ins = _by_group(source, self.sizes[i - 1], conv.inputs // conv.groups)
        outs = _by_group(target, self.sizes[i], conv.outputs // conv.groups)
        return (_number(ins) * _number(outs)).sum(1) * (conv.macs // conv.groups)


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


def _no_channels(unit: UnitCost) -> Tensor | int:
    if not unit.sizes:
        return unit.branch
    return unit._price_convs([torch.zeros(1, len(sizes), dtype=torch.bool) for sizes in unit.sizes])


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
    head: int
    cheapest: int
    dearest: int


@dataclass(frozen=True)
class CostTable:
    """MACs of every part of a network for one image.

    Attributes:
        input_size: (channels, height, width).
        unit: "macs".
        dense: MACs of the stock model.
        stem: before the first unit.
        leave: after each stage, before the next or the head (transitions of a DenseNet).
        units: every unit in running order, gated or not.
        exits: every exit in order, the model's own head last.
    """

    input_size: tuple[int, int, int]
    unit: str
    dense: int
    stem: int
    leave: tuple[int, ...]
    units: tuple[UnitCost, ...]
    exits: tuple[ExitCost, ...]

    @property
    def cheapest(self) -> int:
        """MACs of an image that takes the cheapest way to the first exit."""
        return self.exits[0].cheapest

    @property
    def dearest(self) -> int:
        """MACs of an image that takes the dearest way to the head."""
        return self.exits[-1].dearest

    def segment(self, exit_index: int) -> int:
        """MACs of the dearest way from the exit before to this one, its classifier included."""
        reached = self.exits[exit_index - 1] if exit_index else None
        return self.exits[exit_index].dearest - (reached.dearest - reached.head if reached else 0)


def cost_table(model: nn.Module, input_size: tuple[int, int, int] = (3, 224, 224), unit: str = "macs") -> CostTable:
    """Count what every part of a model costs for one image.

    Args:
        model: a dynamic model or a stock one; it is not changed.
        input_size: (channels, height, width).
        unit: "macs".

    Returns:
        The table; `.dense`, `.units` and `.exits` are what one needs most.

    Raises:
        ValueError: if the model has no units, or an argument is wrong.
    """
    if unit != "macs":
        raise ValueError(f"unit must be 'macs'; found {unit!r}")
    size = check_input_size(input_size)
    families.units(model)
    box: list[CostTable | BaseException] = []

    def work() -> None:
        try:
            box.append(_count_parts(_on_meta(model), size))
        except BaseException as error:  # handed to the caller's thread
            box.append(error)

    # A thread of its own has no user's flop counter, no inference mode, no autocast and no default device.
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    if isinstance(box[0], BaseException):
        raise ValueError(f"{families.model_name(model)!r} cannot run an input of {size}: {box[0]}") from box[0]
    return box[0]


def _on_meta(model: nn.Module) -> nn.Module:
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


@dataclass
class _Meter:
    """Runs parts and says what each cost."""

    counter: FlopCounterMode = field(default_factory=lambda: FlopCounterMode(display=False))
    seen: int = 0

    def run(self, part: Callable[..., Any], *args: Any) -> tuple[Any, int]:
        out = part(*args)
        before, self.seen = self.seen, self.counter.get_total_flops()
        return out, (self.seen - before) // 2


def _count_parts(model: Any, size: tuple[int, int, int]) -> CostTable:
    like = next(model.parameters())
    x = torch.empty(1, *size, device="meta", dtype=like.dtype)
    meter = _Meter()
    family = families.family(model)
    exits = getattr(model, "exits", None)
    places = exits.after if exits is not None else ()
    rows: list[UnitCost] = []
    leave: list[int] = []
    stops: list[ExitCost] = []
    memory = None
    with torch.no_grad(), meter.counter:
        (_, x), stem = meter.run(family.stem, model, x)
        low = high = stem
        for i, unit in enumerate(families.units(model)):
            x, memory, row = _count_unit(meter, model, unit, i, x, memory)
            rows.append(row)
            low, high = low + row.cheapest, high + row.dearest
            if exits is not None and i in places:
                _, head = meter.run(exits, len(stops), x)
                stops.append(ExitCost(unit.name, i, head, low + head, high + head))
            if unit.last:
                x, macs = meter.run(family.leave, model, unit.stage, x)
                leave.append(macs)
                low, high = low + macs, high + macs
        _, head = meter.run(family.head, model, x)
    stops.append(ExitCost("head", len(rows) - 1, head, low + head, high + head))
    dense = stem + sum(row.full for row in rows) + sum(leave) + head
    return CostTable(size, "macs", dense, stem, tuple(leave), tuple(rows), tuple(stops))


def _count_unit(
    meter: _Meter, model: Any, unit: families.Unit, i: int, x: Tensor, memory: Any
) -> tuple[Tensor, Any, UnitCost]:
    layer_gates, channel_gates = getattr(model, "layer_gates", None), getattr(model, "channel_gates", None)
    layer_gate = channel_gate = 0
    sizes: tuple[tuple[int, ...], ...] = ()
    if layer_gates is not None and i > 0:
        (_, memory), layer_gate = meter.run(layer_gates, i - 1, x, memory)
    if channel_gates is not None and i > 0:
        _, channel_gate = meter.run(channel_gates, i - 1, x)
        sizes = channel_gates.sizes[i - 1]
    short, shortcut_macs = meter.run(shortcut, unit, x)
    y, total = meter.run(branch, unit, x)
    convs = _count_convs(meter, unit, x) or (ConvCost(total, 0, 1, 1),)
    rest = total - sum(conv.macs + conv.after for conv in convs)
    assert rest == 0, f"{unit.name}: {rest} MACs unaccounted for"
    y, _ = meter.run(close, unit, y, short)
    skippable = layer_gates is not None and i > 0
    gated = skippable or bool(sizes)
    row = UnitCost(unit.name, unit.stage, gated, skippable, layer_gate, shortcut_macs, channel_gate, convs, sizes)
    return join(unit, x, y), memory, row


def _count_convs(meter: _Meter, unit: families.Unit, x: Tensor) -> tuple[ConvCost, ...]:
    """The branch again, convolution by convolution."""

    def follow(modules: families.After, x: Tensor) -> Tensor:
        for module in modules:
            x = x if module is None else module(x)
        return x

    x = follow(unit.kind.before(unit.module), x)
    found = []
    for conv, after in unit.kind.steps(unit.module):
        x, macs = meter.run(conv, x)
        x, extra = meter.run(follow, after, x)
        found.append(ConvCost(macs, extra, conv.in_channels, conv.out_channels, conv.groups))
    return tuple(found)
