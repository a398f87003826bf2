"""The masked form of an exported network: everything is computed, for any number of images at once."""

import torch
from torch import Tensor

from . import units
from .gates import widen
from .onnx_graph import Graph
from .onnx_ops import Value, translate
from .onnx_parts import Memory, Net, ask_channels, ask_layer, classify, leave_stage, stops_of, sure


def write_masked(net: Net, graph: Graph, images: Value) -> list[Value]:
    """Write the network for a batch.

    Returns:
        logits [B, classes], exit index [B], MACs [B]: the cost of skipping execution.
    """
    x, spent = translate(graph, lambda x: (_stem(net, x), _whole(x, net.table.stem)), images)
    done: list[Value] = []  # of images that have left: whether, logits, exit index, MACs
    memory: Memory = None
    next_unit = 0
    for index, stop in enumerate(stops_of(net)):
        for i in range(next_unit, stop + 1):
            x, spent, memory = _run_unit(net, graph, i, x, spent, memory)
        next_unit = stop + 1
        done, spent = _leave(net, graph, index, x, spent, done)
    return done[1:]


def _stem(net: Net, x: Tensor) -> Tensor:
    return net.family.stem(net.model, x)[1]


def _whole(x: Tensor, value: int) -> Tensor:
    """One number for each image: int64 [B]."""
    return (x.sum((1, 2, 3)) * 0).long() + value


def _run_unit(net: Net, graph: Graph, i: int, x: Value, spent: Value, memory: Memory) -> tuple[Value, Value, Memory]:
    unit, row, g = net.units[i], net.table.units[i], i - 1
    if i > 0 and net.units[g].last:
        x = leave_stage(net, graph, net.units[g].stage, x)
        (spent,) = translate(graph, lambda spent: spent + net.table.leave[net.units[g].stage], spent)
    chosen: list[Value] = []
    keep: str | bool = True
    if i > 0 and net.layer_gates is not None:
        keep, memory = ask_layer(net, graph, g, x, memory)
    asked = isinstance(keep, str)
    if isinstance(keep, str):
        flat = graph.op("Reshape", keep, graph.constant([-1], "int64"))
        chosen.append(Value(flat, torch.ones(len(x.sample), dtype=torch.bool)))
    if i > 0 and net.channel_gates is not None and keep is not False:
        chosen += ask_channels(net, graph, g, x)

    def run(x: Tensor, spent: Tensor, *chosen: Tensor) -> tuple[Tensor, Tensor]:
        if keep is False:
            y = units.rest(unit, units.shortcut(unit, x))
            return units.join(unit, x, y), spent + row.cheapest
        keep_each, channels = (chosen[0], chosen[1:]) if asked else (None, chosen)
        wide = [widen(k, sizes) for k, sizes in zip(channels, row.sizes, strict=True)] or None
        y = units.run_masked(unit, x, keep_each, wide)
        return units.join(unit, x, y), spent + row.price(keep_each, channels or None)

    x, spent = translate(graph, run, x, spent, *chosen)
    return x, spent, memory


def _leave(net: Net, graph: Graph, index: int, x: Value, spent: Value, done: list[Value]) -> tuple[list[Value], Value]:
    """Let the images that leave at exit `index` do so; gives what is known of those that have left, and the costs."""
    end = index == net.last
    if not end and not net.asks(index) and net.most is None:
        return done, spent
    logits = classify(net, graph, index, x)
    cost = net.exit_cost(index)
    (paid,) = translate(graph, lambda spent: spent + cost, spent)
    if end:
        leaving: list[Value] = []
    elif net.most is not None:
        limit = net.most - int(net.table.segment(index + 1))
        leaving = translate(graph, lambda spent: spent > limit, spent)
    else:
        leaving = [sure(net, graph, index, logits)]

    def settle(logits: Tensor, paid: Tensor, *known: Tensor) -> list[Tensor]:
        here = paid * 0 + index
        leave = known[0] if leaving else here >= 0
        if not done:
            return [leave, logits, here, paid]
        before, *kept = known[len(leaving) :]
        new = [torch.where(before[:, None], kept[0], logits)]
        new += [torch.where(before, old, value) for old, value in zip(kept[1:], (here, paid), strict=True)]
        return [before | leave, *new]

    found = translate(graph, settle, logits, paid, *leaving, *done)
    return found, paid if net.asks(index) else spent
