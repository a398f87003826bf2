"""An exported network rewritten in the blocked layout that ONNX Runtime's convolutions use on the machine at hand.

Left alone, the runtime brings the convolutions of each branch into that layout, and reorders what goes into the branch
and what comes out. Here every graph of the file (the outer one, and each branch) is optimised by the runtime on its
own, with its inputs made to look as if a convolution had just given them; then the reorderings at the seams are taken
off, so that blocked values go from branch to branch. Sums and activations after a shortcut are fused on the way.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

DOMAIN = "com.microsoft.nchwc"
WIDTH = 16  # channels in a block are at most this many; blocks of 8 divide it
SMALL = 4096  # bytes
AS_THEY_ARE = ("If", "Identity")  # nodes that are no matter of layout


class NotBlocked(Exception):
    """The runtime has no blocked layout here, or not for this network."""


def blocked(onnx: Any, model: Any, optimise: Callable[[Any], Any]) -> Any:
    """The same network in the blocked layout.

    Args:
        onnx: the package.
        model: `onnx.ModelProto` of a file of `export_onnx`, in which no name is used twice.
        optimise: gives the runtime's optimised form of a model.

    Raises:
        NotBlocked: if there is none.
    """
    writer = _Writer(onnx, model, optimise)
    graph = writer.rewrite(model.graph)
    if not writer.changed:
        raise NotBlocked("no convolution in the blocked layout")
    opsets = [*model.opset_import, onnx.helper.make_opsetid(DOMAIN, 1), onnx.helper.make_opsetid("com.microsoft", 1)]
    return onnx.helper.make_model(graph, opset_imports=opsets, ir_version=model.ir_version)


class _Writer:
    """Rewrites the graphs of one file."""

    def __init__(self, onnx: Any, model: Any, optimise: Callable[[Any], Any]) -> None:
        self.onnx, self.model, self.optimise = onnx, model, optimise
        self.types: dict[str, Any] = {}  # value -> onnx.ValueInfoProto
        self.weights: dict[str, Any] = {}  # name -> onnx.TensorProto, of all graphs
        self.seams: dict[str, int] = {}  # value that goes from graph to graph in the blocked layout -> its channels
        self.numbers = itertools.count()
        self.changed = False
        self._collect_weights(model.graph)
        skeleton = type(model)()
        skeleton.CopyFrom(model)
        self._hollow(skeleton.graph)
        self._collect_types(onnx.shape_inference.infer_shapes(skeleton).graph)
        self._find_seams(model.graph)

    def _collect_weights(self, graph: Any) -> None:
        self.weights.update({weight.name: weight for weight in graph.initializer})
        for branch in (branch for node in graph.node for branch in branches(node)):
            self._collect_weights(branch)

    def _hollow(self, graph: Any) -> None:
        """Take the values of large weights away: shapes can be inferred without."""
        for weight in graph.initializer:
            if len(weight.raw_data) > SMALL:
                weight.ClearField("raw_data")
                weight.data_location = self.onnx.TensorProto.EXTERNAL
        for branch in (branch for node in graph.node for branch in branches(node)):
            self._hollow(branch)

    def _collect_types(self, graph: Any) -> None:
        self.types.update({v.name: v for v in (*graph.input, *graph.output, *graph.value_info)})
        for branch in (branch for node in graph.node for branch in branches(node)):
            self._collect_types(branch)

    def _find_seams(self, graph: Any) -> None:
        """Values that branches read from outside, and what `If` nodes give, where blocks fit."""
        for node in graph.node:
            for branch in branches(node):
                self._find_seams(branch)
                for name in outside(branch):
                    self._seam([name])
            if node.op_type == "If":
                for names in zip(node.output, *([v.name for v in b.output] for b in branches(node)), strict=True):
                    self._seam(names)

    def _seam(self, names: Iterable[str]) -> None:
        """Pass values in the blocked layout, if all of them fit."""
        names = list(names)
        widths = [self._channels(name) for name in names]
        if all(widths):
            self.seams.update(zip(names, widths, strict=True))

    def _channels(self, name: str) -> int:
        """Channels of a value, or 0 if it does not fit into blocks."""
        if name in self.weights or name not in self.types or name in {v.name for v in self.model.graph.input}:
            return 0
        kind = self.types[name].type.tensor_type
        sizes = [dim.dim_value for dim in kind.shape.dim]
        fits = kind.elem_type == self.onnx.TensorProto.FLOAT and len(sizes) == 4 and all(sizes)
        return sizes[1] if fits and sizes[1] % WIDTH == 0 else 0

    def _is_point(self, name: str) -> bool:
        """Whether a value has one pixel: then its blocked form is its plain one, [B, C, 1, 1]."""
        return all(dim.dim_value == 1 for dim in self.types[name].type.tensor_type.shape.dim[2:])

    def rewrite(self, graph: Any) -> Any:
        """A graph and its branches in the blocked layout."""
        helper = self.onnx.helper
        kept: list[Any] = []
        computed: list[Any] = []
        for node in graph.node:
            (kept if node.op_type in AS_THEY_ARE else computed).append(node)
        asked = {name for node in kept for name in reads(node)} | {value.name for value in graph.output}
        nodes, weights = self._optimised(computed, sorted(asked)) if computed else ([], [])
        nodes += [self._with_branches(node) for node in kept]
        held = {name for node in kept if node.op_type != "If" for name in node.input} & self.weights.keys()
        weights += [self.weights[name] for name in sorted(held)]
        outputs = [
            helper.make_tensor_value_info(v.name, self.types[v.name].type.tensor_type.elem_type, None)
            for v in graph.output
        ]
        inputs = {value.name for value in graph.input}
        return helper.make_graph(in_order(nodes), graph.name, [self.types[n] for n in inputs], outputs, weights)

    def _with_branches(self, node: Any) -> Any:
        copy = self.onnx.NodeProto()
        copy.CopyFrom(node)
        for attribute in copy.attribute:
            if attribute.HasField("g"):
                attribute.g.CopyFrom(self.rewrite(attribute.g))
        return copy

    def _optimised(self, nodes: Sequence[Any], asked: Sequence[str]) -> tuple[list[Any], list[Any]]:
        """Nodes as the runtime would run them, blocked values at the seams; and their weights."""
        if all(node.op_type == "ConstantOfShape" for node in nodes):  # zeros are zeros in any layout
            return list(nodes), [self.weights[name] for node in nodes for name in node.input]
        made = {name for node in nodes for name in node.output}
        used = {name for node in nodes for name in node.input if name}
        inputs, outputs = sorted(used - made - self.weights.keys()), [name for name in asked if name in made]
        fast = self.optimise(self._model_of(nodes, inputs, outputs, used)).graph
        seams = [*self._dressed(inputs), *(name for name in outputs if name in self.seams)]
        fixed = {*inputs, *outputs}
        names, extra = self._unseam(fast, seams, set(inputs))
        for constant in {weight.name for weight in fast.initializer} & set(outputs) - names.keys():
            names[constant] = f"{constant}_plain{next(self.numbers)}"
            extra[f"{constant}_given"] = self.onnx.helper.make_node("Identity", [names[constant]], [constant])
        prefix = f"g{next(self.numbers)}_"

        def name(old: str) -> str:
            return names.get(old, old if old in fixed or not old else prefix + old)

        found = []
        for node in fast.node:
            if node.output[0] not in extra:
                node.input[:], node.output[:] = map(name, node.input), map(name, node.output)
                found.append(node)
        found += [node for node in extra.values() if node is not None]
        found = needed(found, outputs)
        used = {n for node in found for n in node.input}
        weights = []
        for weight in fast.initializer:
            weight.name = name(weight.name)
            if weight.name in used:
                weights.append(weight)
        return found, weights

    def _model_of(self, nodes: Sequence[Any], inputs: Sequence[str], outputs: Sequence[str], used: set[str]) -> Any:
        """Nodes as a model whose blocked inputs come from a convolution that changes nothing."""
        helper, first, given = self.onnx.helper, [], []
        weights = [weight for name, weight in self.weights.items() if name in used]
        for name in inputs:
            value = self.onnx.ValueInfoProto()
            value.CopyFrom(self.types[name])
            if name in self._dressed([name]):
                value.name, channels = f"{name}_raw", self.seams[name]
                ones = self.onnx.numpy_helper.from_array(np.ones((channels, 1, 1, 1), np.float32), f"{name}_ones")
                weights.append(ones)
                first.append(helper.make_node("Conv", [value.name, ones.name], [name], group=channels))
            given.append(value)
        # as an output too, the convolution is fused with nothing
        wanted = [self.types[name] for name in (*outputs, *self._dressed(inputs))]
        graph = helper.make_graph([*first, *nodes], "part", given, wanted, weights)
        return helper.make_model(graph, opset_imports=self.model.opset_import, ir_version=self.model.ir_version)

    def _dressed(self, inputs: Sequence[str]) -> list[str]:
        """The inputs that look as if a convolution had given them."""
        return [name for name in inputs if name in self.seams and not self._is_point(name)]

    def _unseam(self, fast: Any, seams: Sequence[str], inputs: set[str]) -> tuple[dict[str, str], dict[str, Any]]:
        """Names to change so that a seam's name stands for its blocked value.

        Returns:
            Old name -> new name; and by their first output nodes to drop (None), or to add.
        """
        makers = {name: node for node in fast.node for name in node.output}
        names: dict[str, str] = {}
        changes: dict[str, Any] = {}
        for seam in seams:
            maker, plain = makers.get(seam), f"{seam}_plain{next(self.numbers)}"
            names[seam] = plain
            if maker is not None and maker.op_type == "ReorderOutput":
                self.changed = True
                names[maker.input[0]] = seam
                if seam in inputs:
                    changes[maker.input[0]] = None  # the convolution that changes nothing
            elif seam in inputs:
                raise NotBlocked(f"{seam} is not blocked")
            elif self._is_point(seam):
                del names[seam]
            else:
                changes[f"{seam}_blocked"] = self.onnx.helper.make_node("ReorderInput", [plain], [seam], domain=DOMAIN)
        return names, changes


# Graphs --------------------------------------------------------------------------------------------------------------


def branches(node: Any) -> list[Any]:
    """The graphs in a node's attributes."""
    return [attribute.g for attribute in node.attribute if attribute.HasField("g")]


def reads(node: Any) -> set[str]:
    """All names that a node reads, those that its branches read from outside too."""
    return {name for name in node.input if name}.union(*(outside(branch) for branch in branches(node)))


def outside(graph: Any) -> set[str]:
    """Names that a graph reads and does not hold."""
    held = {weight.name for weight in graph.initializer} | {name for node in graph.node for name in node.output}
    return set().union(*(reads(node) for node in graph.node)) - held


def needed(nodes: Sequence[Any], outputs: Iterable[str]) -> list[Any]:
    """The nodes that lead to some outputs."""
    ordered, used, kept = in_order(nodes), set(outputs), []
    for node in reversed(ordered):
        if not used.isdisjoint(node.output):
            kept.append(node)
            used |= reads(node)
    return kept[::-1]


def in_order(nodes: Sequence[Any]) -> list[Any]:
    """Nodes so that each comes after those whose outputs it reads."""
    makers = {name: i for i, node in enumerate(nodes) for name in node.output}
    done: set[int] = set()
    ordered: list[Any] = []
    for start in range(len(nodes)):
        stack = [start]
        while stack:
            here = stack[-1]
            before = [makers[name] for name in sorted(reads(nodes[here])) if name in makers]
            waiting = [i for i in before if i not in done and i != here]
            if here in done or not waiting:
                stack.pop()
                if here not in done:
                    done.add(here)
                    ordered.append(nodes[here])
            else:
                stack += waiting
    return ordered
