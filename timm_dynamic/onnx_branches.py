"""The form of an exported network for one image, with `If` nodes: what is skipped or left out is not computed."""

from dataclasses import dataclass, field, replace

import torch

from . import families, units
from .onnx_channels import run_chosen
from .onnx_graph import Graph
from .onnx_ops import Value, pool, translate
from .onnx_parts import Memory, Net, ask_layer, classify, gates_pool, join, leave_stage, stops_of, sure


@dataclass(frozen=True)
class _Way:
    """How far an image has come, and what it has spent on the way."""

    x: Value
    memory: Memory = None
    fixed: int = 0  # MACs that every image pays
    kept: tuple[tuple[str, int], ...] = ()  # keep of a unit, and MACs of its branch
    chosen: tuple[str, ...] = field(default=())  # MACs that depend on channels: int64 [1] each

    def pay(self, macs: int) -> "_Way":
        return replace(self, fixed=self.fixed + macs)


def write_branches(net: Net, graph: Graph, image: Value) -> list[Value]:
    """Write the network for one image.

    Returns:
        logits [1, classes], exit index [1], MACs [1].
    """
    (x,) = translate(graph, lambda x: net.family.stem(net.model, x)[1], image)
    return _go_on(net, graph, _Way(x).pay(net.table.stem), 0, 0)


def _go_on(net: Net, graph: Graph, way: _Way, unit: int, exit: int) -> list[Value]:
    """The rest of the network from a unit and an exit on: what `write_branches` gives."""
    stops = stops_of(net)
    while True:
        for i in range(unit, stops[exit] + 1):
            way = _run_unit(net, graph, way, i)
        unit = stops[exit] + 1
        if exit == net.last:
            return _leave(net, graph, way, exit, None)
        if net.asks(exit) or net.most is not None:
            return _part(net, graph, way, unit, exit)
        exit += 1


def _part(net: Net, graph: Graph, way: _Way, unit: int, exit: int) -> list[Value]:
    """An exit at which some images leave: an `If` whose other branch holds the rest of the network."""
    logits = None
    if net.most is not None:
        limit = graph.constant([net.most - int(net.table.segment(exit + 1))], "int64")
        leave = graph.op("Greater", _spent(graph, way), limit)
    else:
        logits = classify(net, graph, exit, way.x)
        leave = sure(net, graph, exit, logits).name
    here, further = Graph(graph), Graph(graph)
    found = _leave(net, here, way, exit, logits)
    here.give(*(value.given for value in found))
    onward = way if logits is None else way.pay(net.exit_cost(exit))
    further.give(*(value.given for value in _go_on(net, further, onward, unit, exit + 1)))
    names = graph.branch(leave, here, further)
    return [Value(name, value.sample) for name, value in zip(names, found, strict=True)]


def _leave(net: Net, graph: Graph, way: _Way, exit: int, logits: Value | None) -> list[Value]:
    """Leave at an exit, with its logits if they are known."""
    logits = logits or classify(net, graph, exit, way.x)
    way = way.pay(net.exit_cost(exit))
    number = torch.zeros(1, dtype=torch.int64)
    index = graph.constant([exit], "int64")
    return [logits, Value(index, number), Value(_spent(graph, way), number)]


def _spent(graph: Graph, way: _Way) -> str:
    """MACs so far: int64 [1]."""
    shape = graph.constant([1], "int64")
    parts = [graph.constant([way.fixed], "int64"), *way.chosen]
    if way.kept:
        keeps = graph.op("Concat", *(name for name, _ in way.kept), axis=0)
        flat = graph.op("Reshape", keeps, graph.constant([-1], "int64"))
        costs = graph.constant([cost for _, cost in way.kept], "int64")
        paid = graph.op("Where", flat, costs, graph.constant([0], "int64"))
        parts.append(graph.op("Reshape", graph.op("ReduceSum", paid), shape))
    if len(parts) == 1:
        return parts[0]
    return graph.op("Reshape", graph.op("ReduceSum", graph.op("Concat", *parts, axis=0)), shape)


# One unit ------------------------------------------------------------------------------------------------------------


def _run_unit(net: Net, graph: Graph, way: _Way, i: int) -> _Way:
    unit, row = net.units[i], net.table.units[i]
    if i > 0 and net.units[i - 1].last:
        stage = net.units[i - 1].stage
        way = replace(way, x=leave_stage(net, graph, stage, way.x)).pay(net.table.leave[stage])
    way = way.pay(row.shortcut + row.layer_gate)
    pools = gates_pool(net, i + 1) and not (unit.kind.grows and unit.last)
    keep: str | bool = True
    if i > 0 and net.layer_gates is not None:
        keep, memory = ask_layer(net, graph, i - 1, way.x, way.memory)
        way = replace(way, memory=memory)
    if isinstance(keep, str):
        found = _choose(net, graph, i, way.x, keep, pools)
        way = way if row.sizes else replace(way, kept=(*way.kept, (keep, row.branch)))
    elif keep:
        found = _compute(net, graph, i, way.x, pools)
        way = way if row.sizes else way.pay(row.branch)
    else:
        found = _rest(net, graph, i, way.x, pools)
    if row.sizes:
        way = replace(way, chosen=(*way.chosen, found[-1].name))
    return replace(way, x=_join(net, graph, i, way.x, found[0]))


def _compute(net: Net, graph: Graph, i: int, x: Value, pools: bool) -> list[Value]:
    """Run a unit: its output, the output's global average if `pools`, and MACs that depend on channels, if any do."""
    unit = net.units[i]
    spent: list[Value] = []
    if net.table.units[i].sizes:
        y, cost = run_chosen(net, graph, i, x)
        spent = [cost]
    else:
        (y,) = translate(graph, lambda x: units.run_dense(unit, x), x)
    return [y, *_pooled(graph, y, pools), *spent]


def _rest(net: Net, graph: Graph, i: int, x: Value, pools: bool) -> list[Value]:
    """Skip a unit: as `_compute`."""
    unit, row, y = net.units[i], net.table.units[i], x
    if (
        unit.kind.grows
        or unit.module.downsample is not None
        or not families.rests_unchanged(unit.kind.act(unit.module))
    ):
        (y,) = translate(graph, lambda x: units.rest(unit, units.shortcut(unit, x)), x)
    if unit.kind.grows:  # zeros have a known average
        width = y.sample.shape[1]
        graph.pools[y.name] = graph.constant([[[[0.0]]] * width])
    zero = [Value(graph.constant([0], "int64"), torch.zeros(1, dtype=torch.int64))] if row.sizes else []
    return [y, *_pooled(graph, y, pools), *zero]


def _pooled(graph: Graph, y: Value, pools: bool) -> list[Value]:
    return [Value(pool(graph, y.name), torch.zeros(1, y.sample.shape[1], 1, 1))] if pools else []


def _choose(net: Net, graph: Graph, i: int, x: Value, keep: str, pools: bool) -> list[Value]:
    """The unit's `If` node; gives what `_compute` gives."""
    then, otherwise = Graph(graph), Graph(graph)
    found = _compute(net, then, i, x, pools)
    then.give(*(value.given for value in found))
    otherwise.give(*(value.given for value in _rest(net, otherwise, i, x, pools)))
    names = graph.branch(keep, then, otherwise)
    if pools:
        graph.pools[names[0]] = names[1]
    return [Value(name, value.sample) for name, value in zip(names, found, strict=True)]


def _join(net: Net, graph: Graph, i: int, x: Value, y: Value) -> Value:
    """The next unit's input. The average of what is put side by side is the averages put side by side."""
    unit = net.units[i]
    out = join(net, graph, i, x, y)
    if unit.kind.grows and graph.pool_of(y.name) is not None:
        graph.pools[out.name] = graph.op("Concat", pool(graph, x.name), pool(graph, y.name), axis=1)
    return out
