"""Counting the multiply-adds of every part of a network from shapes, once for each input size.

The parts are run one by one on the meta device under torch's own flop counter, so that a cost is what the counter
would see (1 MAC = 2 FLOPs).
"""

import copy
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from . import families
from .certainty import ask_layer_gate
from .costs import ConvCost, CostTable, ExitCost, UnitCost
from .units import branch, close, join, run_dense, shortcut


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
        why = str(box[0]) or type(box[0]).__name__
        raise ValueError(f"{families.model_name(model)!r} cannot run an input of {input_size}: {why}") from box[0]
    return box[0]


def on_meta(model: nn.Module) -> nn.Module:
    """A copy in eval mode whose tensors have shapes only, without the user's hooks."""
    memo: dict[int, Any] = {id(hooks): OrderedDict() for hooks in _hooks(model)}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
    for buffer in model.buffers():
        memo[id(buffer)] = buffer.detach().to("meta")
    for module in model.modules():  # weights that are computed, as by torch.nn.utils.prune
        for value in vars(module).values():
            if isinstance(value, Tensor):
                memo[id(value)] = value.detach().to("meta")
    return copy.deepcopy(model, memo).eval()


def duplicate(model: nn.Module) -> nn.Module:
    """A copy, with the user's own hooks in place of copies of them and of what they have seen."""
    memo: dict[int, Any] = {id(hooks): OrderedDict(hooks) for hooks in _hooks(model)}
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and value.grad_fn is not None:
                memo[id(value)] = value.detach().clone()
    return copy.deepcopy(model, memo)


def _hooks(model: nn.Module) -> Iterator[dict[int, Any]]:
    """The hooks around the forward passes of a model's modules."""
    for module in model.modules():
        yield from (module._forward_hooks, module._forward_pre_hooks)


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
    runs: bool | None = None
    channel_gate: Any = 0
    sizes: tuple[tuple[int, ...], ...] = ()
    channels: tuple[tuple[bool, ...], ...] | None = None
    if layer_gates is not None and i > 0:
        runs = layer_gates.settled.get(i - 1)
        if i - 1 in layer_gates.asked:
            (_, memory), layer_gate = meter.run(ask_layer_gate, model, i - 1, x, memory)
    if channel_gates is not None and i > 0:
        sizes, channels = channel_gates.sizes[i - 1], channel_gates.settled.get(i - 1)
        if channels is None:
            _, channel_gate = meter.run(channel_gates, i - 1, x)
    added, short = meter.run(shortcut, unit, x)
    y, convs = _count_convs(meter, unit, x)
    y = close(unit, y, added)
    if not meter.divisible:  # measured: make the convolutions add up to the unit as it runs
        whole = max(meter.run(run_dense, unit, x)[1] - short, 0)
        factor = whole / sum(conv.cost + conv.extra for conv in convs)
        convs = tuple(replace(c, cost=c.cost * factor, extra=c.extra * factor) for c in convs)
    skippable = layer_gates is not None and i > 0
    row = UnitCost(
        name=unit.name,
        stage=unit.stage,
        gated=skippable or bool(sizes),
        skippable=skippable,
        layer_gate=layer_gate,
        shortcut=short,
        channel_gate=channel_gate,
        convs=convs,
        sizes=sizes,
        divisible=meter.divisible,
        shut=runs is False,
        open=runs is True,
        channels=channels,
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
