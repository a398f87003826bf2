"""An ONNX graph while it is being built: nodes, weights and branches as plain values; protobuf only at the end.

Weights belong to the graph that uses them, so that what a branch needs lies inside of the branch: only then does ONNX
Runtime bring its convolutions into a fast layout, and load nothing of it into the outer graph.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

OPSET = 18
IR_VERSION = 10  # read by ONNX Runtime from 1.18 on
MANY = 64  # uniform constants of more values are written as a shape and one value
INSTALL = "pip install timm_dynamic[onnx]"


def need(name: str) -> ModuleType:
    """A package of the extra `onnx`, imported when it is needed.

    Raises:
        ImportError: that names what to install.
    """
    try:
        return __import__(name)
    except ImportError as error:
        raise ImportError(f"{name} is needed for ONNX files: {INSTALL}") from error


@dataclass(frozen=True)
class Node:
    """One operation; attributes may hold graphs."""

    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, Any]


class Graph:
    """A graph or a branch in it. A branch reads the values of the graphs around it."""

    def __init__(self, outer: "Graph | None" = None) -> None:
        self.outer = outer
        self.names: Iterator[int] = itertools.count() if outer is None else outer.names
        self.nodes: list[Node] = []
        self.weights: dict[str, np.ndarray] = {}
        self.outputs: list[tuple[str, str]] = []  # name, numpy dtype
        self.pools: dict[str, str] = {}  # value -> its global average pool [B, C, 1, 1]
        self._known: dict[Any, str] = {}

    def name(self, hint: str) -> str:
        """A name that nothing else in the file has."""
        return f"{hint}_{next(self.names)}"

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """Add an operation with one output, and give its name."""
        return self.ops(kind, inputs, 1, **attributes)[0]

    def ops(self, kind: str, inputs: Sequence[str], count: int, **attributes: Any) -> list[str]:
        """Add an operation with `count` outputs, and give their names."""
        outputs = tuple(self.name(kind.lower()) for _ in range(count))
        self.nodes.append(Node(kind, tuple(inputs), outputs, attributes))
        return list(outputs)

    def constant(self, values: Any, dtype: str = "float32") -> str:
        """A constant; the same small one is stored once in a graph."""
        array = np.ascontiguousarray(np.asarray(values, dtype=dtype))
        if array.size > MANY and (array == array.flat[0]).all():
            return self._uniform(array)
        key = (dtype, array.shape, array.tobytes()) if array.size <= MANY else None
        if key in self._known:
            return self._known[key]
        name = self.name("weight")
        self.weights[name] = array
        if key is not None:
            self._known[key] = name
        return name

    def _uniform(self, array: np.ndarray) -> str:
        shape = self.constant(array.shape, "int64")
        return self.op("ConstantOfShape", shape, value=array.reshape(-1)[:1])

    def pool_of(self, name: str) -> str | None:
        """The global average pool of a value, if one has been computed where this graph can read it."""
        if name in self.pools:
            return self.pools[name]
        return None if self.outer is None else self.outer.pool_of(name)

    def give(self, *outputs: tuple[str, str]) -> None:
        """Say what the graph gives: (name, dtype) each. What it did not compute itself is passed on by Identity."""
        made = {name for node in self.nodes for name in node.outputs}
        given: set[str] = set()
        for name, dtype in outputs:
            own = name if name in made and name not in given else self.op("Identity", name)
            given.add(own)
            self.outputs.append((own, dtype))

    def branch(self, condition: str, then: "Graph", otherwise: "Graph") -> list[str]:
        """An `If` node: what one of two branches gives. condition: bool, one element."""
        assert [d for _, d in then.outputs] == [d for _, d in otherwise.outputs]
        return self.ops("If", (condition,), len(then.outputs), then_branch=then, else_branch=otherwise)


def prune(graph: Graph) -> set[str]:
    """Drop what nothing reads, in a graph and in its branches; gives the names that it reads from around it."""
    used = {name for name, _ in graph.outputs}
    kept = []
    for node in reversed(graph.nodes):
        if used.isdisjoint(node.outputs):
            continue
        kept.append(node)
        used.update(node.inputs)
        for value in node.attributes.values():
            if isinstance(value, Graph):
                used |= prune(value)
    graph.nodes = kept[::-1]
    graph.weights = {name: array for name, array in graph.weights.items() if name in used}
    return used - graph.weights.keys() - {name for node in kept for name in node.outputs}


def to_model(
    graph: Graph, inputs: Mapping[str, Sequence[Any]], outputs: Mapping[str, Sequence[Any]], metadata: dict[str, str]
) -> Any:
    """The graph as an `onnx.ModelProto`.

    Args:
        graph: its outputs are in the order of `outputs`.
        inputs: name -> shape, an int or a word for each dimension; float32.
        outputs: name -> shape.
        metadata: kept in the file's `metadata_props`.
    """
    onnx = need("onnx")
    prune(graph)
    final = {old: new for (old, _), new in zip(graph.outputs, outputs, strict=True)}
    proto = _to_proto(onnx, graph, "network", final)
    for name, shape in inputs.items():
        proto.input.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, list(shape)))
    del proto.output[:]
    for (name, shape), (_, dtype) in zip(outputs.items(), graph.outputs, strict=True):
        kind = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        proto.output.append(onnx.helper.make_tensor_value_info(name, kind, list(shape)))
    opset = onnx.helper.make_opsetid("", OPSET)
    model = onnx.helper.make_model(proto, opset_imports=[opset], ir_version=IR_VERSION, producer_name="timm_dynamic")
    onnx.helper.set_model_props(model, metadata)
    return model


def _to_proto(onnx: Any, graph: Graph, name: str, final: dict[str, str]) -> Any:
    helper = onnx.helper
    nodes = []
    for node in graph.nodes:
        inputs = [final.get(n, n) for n in node.inputs]
        outputs = [final.get(n, n) for n in node.outputs]
        attributes = {key: _attribute(onnx, key, value, outputs[0], final) for key, value in node.attributes.items()}
        nodes.append(helper.make_node(node.kind, inputs, outputs, name=outputs[0], **attributes))
    weights = [onnx.numpy_helper.from_array(array, key) for key, array in graph.weights.items()]
    outputs = [
        helper.make_tensor_value_info(final.get(n, n), helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), None)
        for n, dtype in graph.outputs
    ]
    return helper.make_graph(nodes, name, [], outputs, weights)


def _attribute(onnx: Any, key: str, value: Any, owner: str, final: dict[str, str]) -> Any:
    if isinstance(value, Graph):
        return _to_proto(onnx, value, f"{owner}_{key.removesuffix('_branch')}", final)
    return onnx.numpy_helper.from_array(value) if isinstance(value, np.ndarray) else value
