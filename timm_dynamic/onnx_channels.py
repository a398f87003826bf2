"""A unit with channel gates in a graph for one image: only the kept hidden channels are computed.

For each hidden width there are a few ways to go on, tried in order by `If` nodes: all channels; the first k of them
(nested gates, a branch for each k, weights sliced when the file is loaded) or those that the gate names (independent
gates, weights gathered for each image); none. A Bottleneck has two hidden widths and so a tree of branches for each of
its convolutions. Units whose hidden channels are not plain (grouped convolutions, group norm, blur pool) compute all
channels and multiply by the keeps; what they report is still the cost of the kept ones.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import families, units
from .gates import widen
from .onnx_graph import Graph
from .onnx_ops import Value, translate
from .onnx_parts import Net, ask_channels


@dataclass(frozen=True)
class _Way:
    """Which channels of a hidden width are computed.

    Attributes:
        condition: name of a bool; None for what is left when no other way was taken.
        count: how many of the first channels; None for those in `index`.
        index: name of the places of the kept channels.
    """

    condition: str | None
    count: int | None
    index: str | None = None


_Chosen = tuple[_Way | None, ...]  # for each hidden width, None before it is known


def run_chosen(net: Net, graph: Graph, i: int, x: Value) -> tuple[Value, Value]:
    """Run unit `i` with the channels that its gate keeps.

    Returns:
        The unit's output, and its MACs without shortcut and layer gate: int64 [1].
    """
    unit, row = net.units[i], net.table.units[i]
    keeps = ask_channels(net, graph, i - 1, x)
    outside = row.layer_gate + row.shortcut
    (cost,) = translate(graph, lambda *keeps: row.price(None, keeps) - outside, *keeps)
    if not _plain(unit):
        return _run_masked(unit, row.sizes, graph, x, keeps), cost
    nested = net.channel_gates.config.mode == "nested"
    if row.channels is not None:
        ways = [[_settled_way(graph, part, sizes)] for part, sizes in zip(row.channels, row.sizes, strict=True)]
    else:
        find = _nested_ways if nested else _independent_ways
        ways = [find(graph, keep, sizes) for keep, sizes in zip(keeps, row.sizes, strict=True)]
    (y,) = translate(graph, lambda x: _follow(unit.kind.before(unit.module), x), x)
    y = _run_steps(_Stores(graph, unit, row.sizes, nested), graph, y, ways)
    (out,) = translate(graph, lambda y, x: units.close(unit, y, units.shortcut(unit, x)), y, x)
    return out, cost


def _follow(modules: Sequence[nn.Module | None], x: Tensor) -> Tensor:
    for module in modules:
        x = x if module is None else module(x)
    return x


def _plain(unit: families.Unit) -> bool:
    """Whether some of the hidden channels can be computed by convolutions with fewer weights and nothing else."""
    steps = unit.kind.steps(unit.module)
    hidden = [module for _, after in steps[:-1] for module in after if module is not None]
    learned = any(list(module.parameters()) or list(module.buffers()) for module in hidden)
    return all(conv.groups == 1 for conv, _ in steps) and not learned


def _run_masked(
    unit: families.Unit, sizes: Sequence[tuple[int, ...]], graph: Graph, x: Value, keeps: list[Value]
) -> Value:
    def run(x: Tensor, *keeps: Tensor) -> Tensor:
        return units.run_dense(unit, x, [widen(k, s) for k, s in zip(keeps, sizes, strict=True)])

    return translate(graph, run, x, *keeps)[0]


# Ways to go on -------------------------------------------------------------------------------------------------------


def _nested_ways(graph: Graph, keep: Value, sizes: tuple[int, ...]) -> list[_Way]:
    """All groups, all but the last, and so on down to none."""
    names = [keep.name]
    if len(sizes) > 1:
        ones = graph.constant([1] * len(sizes), "int64")
        names = graph.ops("Split", (keep.name, ones), len(sizes), axis=1)
    found = [_Way(name, sum(sizes[: k + 1])) for k, name in enumerate(names)]
    return [*reversed(found), _Way(None, 0)]


def _independent_ways(graph: Graph, keep: Value, sizes: tuple[int, ...]) -> list[_Way]:
    """All groups, some groups, none."""
    numbers = graph.op("Cast", keep.name, to=7)
    count = graph.op("ReduceSum", numbers, keepdims=0)
    every = graph.op("Equal", count, graph.constant(len(sizes), "int64"))
    found = [_Way(every, sum(sizes))]
    if len(sizes) > 1:
        some = graph.op("Greater", count, graph.constant(0, "int64"))
        flat = graph.op("Reshape", keep.name, graph.constant([-1], "int64"))
        group = graph.constant(np.repeat(np.arange(len(sizes)), sizes), "int64")
        places = graph.op("NonZero", graph.op("Gather", flat, group, axis=0))
        index = graph.op("Reshape", places, graph.constant([-1], "int64"))
        found.append(_Way(some, None, index))
    return [*found, _Way(None, 0)]


def _settled_way(graph: Graph, part: tuple[bool, ...], sizes: tuple[int, ...]) -> _Way:
    """The groups that every image keeps."""
    kept = np.repeat(part, sizes)
    count = int(kept.sum())
    if kept[:count].all():
        return _Way(None, count)
    return _Way(None, None, graph.constant(kept.nonzero()[0], "int64"))


def _try(graph: Graph, ways: Sequence[_Way], build: Callable[[Graph, _Way], str]) -> str:
    """What the first way whose condition holds gives."""
    first, *others = ways
    if first.condition is None:
        return build(graph, first)
    then, otherwise = Graph(graph), Graph(graph)
    then.give((build(then, first), "float32"))
    otherwise.give((_try(otherwise, others, build), "float32"))
    return graph.branch(first.condition, then, otherwise)[0]


# Convolutions --------------------------------------------------------------------------------------------------------


class _Stores:
    """The weights of a unit's convolutions that several branches take slices of: once in the unit's graph."""

    def __init__(self, graph: Graph, unit: families.Unit, sizes: Sequence[tuple[int, ...]], nested: bool) -> None:
        self.graph = graph
        self.steps = unit.kind.steps(unit.module)
        self.widths = [sum(s) for s in sizes]
        # with nested gates a slice never holds the last group
        self.most = [sum(s[:-1]) if nested else sum(s) for s in sizes]
        self.stored: dict[int, tuple[str, str]] = {}

    def of(self, step: int) -> tuple[str, str]:
        """Names of weight and bias of a convolution, as far as slices need them."""
        if step not in self.stored:
            weight, bias = self.arrays(step)
            ins = self.most[step - 1] if step else None
            outs = self.most[step] if step < len(self.most) else None
            if step and step < len(self.most):  # either may be whole while the other is not
                ins = outs = None
            self.stored[step] = self.graph.constant(weight[:outs, :ins]), self.graph.constant(bias[:outs])
        return self.stored[step]

    def arrays(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        conv = self.steps[step][0]
        bias = np.zeros(conv.out_channels, np.float32) if conv.bias is None else conv.bias.detach().numpy()
        return conv.weight.detach().numpy(), bias


def _run_steps(stores: _Stores, graph: Graph, x: Value, ways: list[list[_Way]]) -> Value:
    """The branch's convolutions: one tree of branches for all if there is one hidden width, else one for each."""
    if len(ways) == 1:
        middle = _after(stores, 0, x.sample)

        def both(leaf: Graph, way: _Way) -> str:
            y = _step(stores, leaf, 0, x, (None, way))
            return _step(stores, leaf, 1, Value(y, middle), (way, None))

        return Value(_try(graph, ways[0], both), _after(stores, 1, middle))
    for step in range(len(ways) + 1):
        x = Value(_branch_step(stores, graph, step, x, ways), _after(stores, step, x.sample))
    return x


def _branch_step(stores: _Stores, graph: Graph, step: int, x: Value, ways: list[list[_Way]]) -> str:
    """One convolution by the ways of its inputs and of its outputs."""

    def outputs(leaf: Graph, source: _Way | None) -> str:
        if step == len(ways):
            return _step(stores, leaf, step, x, (source, None))
        return _try(leaf, ways[step], lambda inner, way: _step(stores, inner, step, x, (source, way)))

    return outputs(graph, None) if step == 0 else _try(graph, ways[step - 1], outputs)


def _after(stores: _Stores, step: int, x: Tensor) -> Tensor:
    """The shape of what a step gives with all channels."""
    conv = stores.steps[step][0]
    options: Any = (conv.stride, conv.padding, conv.dilation)
    shape = nn.functional.conv2d(x.to("meta"), conv.weight.to("meta"), None, *options).shape
    return torch.zeros(shape)


def _step(stores: _Stores, graph: Graph, step: int, x: Value, chosen: tuple[_Way | None, _Way | None]) -> str:
    """A convolution of the chosen inputs to the chosen outputs, and what follows it; None chooses all."""
    source, target = chosen
    if target is not None and target.count == 0:
        return graph.constant(np.zeros((1, 1, 1, 1)))  # nothing reads it
    conv, after = stores.steps[step]
    y = _after(stores, step, x.sample)
    weight, bias = _weights(stores, graph, step, chosen)
    if source is not None and source.count == 0:
        column = graph.op("Reshape", bias, graph.constant([1, -1, 1, 1], "int64"))
        name = graph.op("Expand", column, graph.constant([1, 1, *y.shape[2:]], "int64"))
    else:
        name = graph.op(
            "Conv", x.name, weight, bias, kernel_shape=list(conv.kernel_size), strides=list(conv.stride),
            pads=[int(p) for p in conv.padding] * 2, dilations=list(conv.dilation),
        )  # fmt: skip
    return _written(graph, after, Value(name, y))


def _written(graph: Graph, modules: Sequence[nn.Module | None], x: Value) -> str:
    """What modules give; a lone ReLU, as most are, needs no tracing."""
    acting = [module for module in modules if module is not None and not isinstance(module, nn.Identity)]
    if not acting:
        return x.name
    if len(acting) == 1 and type(acting[0]) is nn.ReLU:
        return graph.op("Relu", x.name)
    return translate(graph, lambda x: _follow(acting, x), x)[0].name


def _weights(stores: _Stores, graph: Graph, step: int, chosen: tuple[_Way | None, _Way | None]) -> tuple[str, str]:
    """Weight and bias of a convolution between chosen channels; whole ones belong to the leaf itself."""
    source, target = chosen
    ins = source is not None and source.count != 0 and not _is_whole(source, stores.widths[step - 1])
    outs = target is not None and not _is_whole(target, stores.widths[step])
    if not ins and not outs:
        whole, bias = stores.arrays(step)
        constant = source is not None and source.count == 0
        return "" if constant else graph.constant(whole), graph.constant(bias)
    weight, bias_name = stores.of(step)
    if outs:
        assert target is not None
        weight, bias_name = _pick(graph, weight, target, 0), _pick(graph, bias_name, target, 0)
    if ins:
        assert source is not None
        weight = _pick(graph, weight, source, 1)
    return weight, bias_name


def _is_whole(way: _Way, width: int) -> bool:
    return way.count == width


def _pick(graph: Graph, name: str, way: _Way, axis: int) -> str:
    """The chosen channels of a weight."""
    if way.index is not None:
        return graph.op("Gather", name, way.index, axis=axis)
    start, end, axes = ([0], [way.count], [axis])
    return graph.op("Slice", name, *(graph.constant(v, "int64") for v in (start, end, axes)))
