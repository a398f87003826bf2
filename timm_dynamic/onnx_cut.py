"""An exported network cut into pieces without `If` nodes, to be run one after the other by a plain Python loop.

A piece is a branch and what follows it up to the next decision. What a piece reads and what later pieces will want of
it is known from the file, so that nothing else is passed on.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple


@dataclass(eq=False)
class Piece:
    """A straight run of operations.

    Attributes:
        nodes: `onnx.NodeProto`s.
        aliases: (new name, name) of values that are passed on under another name.
        condition: name of the bool that decides what comes next; None at the end.
        following: the next piece if it holds, and if not.
        needs: names of values that the piece or later ones read.
        inputs: those that its operations read.
        outputs: what its operations give that is read later.
    """

    nodes: list[Any] = field(default_factory=list)
    aliases: list[tuple[str, str]] = field(default_factory=list)
    condition: str | None = None
    following: tuple["Piece", ...] = ()
    needs: frozenset[str] = frozenset()
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)

    def left(self, following: "Piece") -> list[str]:
        """Values that are not needed any more when another piece follows."""
        held = {*self.needs, *self.outputs, *(new for new, _ in self.aliases)}
        return sorted(held - following.needs)


class _Rest(NamedTuple):
    """What comes after the end of a branch."""

    outputs: Sequence[str]  # of the `If` node
    branch: Any  # onnx.GraphProto
    nodes: Sequence[Any]
    rest: "_Rest | None"


class Cutter:
    """Cuts one file."""

    def __init__(self, graph: Any) -> None:
        """Cut a graph.

        Args:
            graph: `onnx.GraphProto` of a file of `export_onnx`, in which no name is used twice.
        """
        self.weights: dict[str, Any] = {}  # onnx.TensorProto
        self.types: dict[str, Any] = {}  # onnx.ValueInfoProto
        self._collect(graph)
        self.pieces: list[Piece] = []
        self._known: dict[tuple[str, bool], Piece] = {}
        self.first = self._cut(list(graph.node), None)
        self._settle([value.name for value in graph.output])

    def _collect(self, graph: Any) -> None:
        self.weights.update({weight.name: weight for weight in graph.initializer})
        self.types.update({v.name: v for v in (*graph.input, *graph.output, *graph.value_info)})
        for node in graph.node:
            for branch in _branches(node):
                self._collect(branch)

    def _cut(self, nodes: Sequence[Any], rest: _Rest | None) -> Piece:
        """The piece that begins with `nodes`, and those that follow it."""
        piece, names = Piece(), dict[str, str]()
        while True:
            for i, node in enumerate(nodes):
                if node.op_type == "If":
                    piece.condition = names.get(node.input[0], node.input[0])
                    piece.following = tuple(self._branch(node, b, nodes[i + 1 :], rest) for b in (True, False))
                    self.pieces.append(piece)
                    return piece
                if node.op_type == "Identity" and node.input[0] not in self.weights:
                    names[node.output[0]] = names.get(node.input[0], node.input[0])
                else:
                    piece.nodes.append(_renamed(node, names))
            if rest is None:
                self.pieces.append(piece)
                return piece
            for name, value in zip(rest.outputs, rest.branch.output, strict=True):
                names[name] = names.get(value.name, value.name)
                piece.aliases.append((name, names[name]))
            nodes, rest = rest.nodes, rest.rest

    def _branch(self, node: Any, which: bool, nodes: Sequence[Any], rest: _Rest | None) -> Piece:
        """The piece that begins with a branch; several ways may lead to it."""
        key = (node.output[0], which)
        if key not in self._known:
            then, otherwise = _branches(node)
            branch = then if which else otherwise
            self._known[key] = self._cut(list(branch.node), _Rest(node.output, branch, nodes, rest))
        return self._known[key]

    def _settle(self, wanted: Sequence[str]) -> None:
        """Find out what each piece reads and gives; `pieces` holds those that follow a piece before it."""
        for piece in self.pieces:
            later = frozenset(wanted) if piece.condition is None else frozenset()
            later = later.union(*(following.needs for following in piece.following))
            piece.aliases = [(new, old) for new, old in piece.aliases if new in later]
            renamed = {new for new, _ in piece.aliases}
            reads = {name for name in later if name not in renamed} | {old for _, old in piece.aliases}
            if piece.condition is not None:
                reads.add(piece.condition)
            made = {name for node in piece.nodes for name in node.output}
            piece.outputs = sorted(reads & made)
            piece.nodes, used = _needed(piece.nodes, piece.outputs)
            piece.inputs = sorted(used - made - self.weights.keys())
            piece.needs = frozenset(piece.inputs) | (reads - made)


def _branches(node: Any) -> tuple[Any, ...]:
    """The graphs of an `If` node: then, else."""
    graphs = {a.name: a.g for a in node.attribute if a.name in ("then_branch", "else_branch")}
    return (graphs["then_branch"], graphs["else_branch"]) if graphs else ()


def _renamed(node: Any, names: dict[str, str]) -> Any:
    if names.keys().isdisjoint(node.input):
        return node
    copy = type(node)()
    copy.CopyFrom(node)
    copy.input[:] = [names.get(name, name) for name in node.input]
    return copy


def _needed(nodes: Sequence[Any], outputs: Sequence[str]) -> tuple[list[Any], set[str]]:
    """The nodes that lead to some outputs, and all names that these read."""
    used, kept = set(outputs), []
    for node in reversed(nodes):
        if not used.isdisjoint(node.output):
            kept.append(node)
            used.update(name for name in node.input if name)
    return kept[::-1], used
