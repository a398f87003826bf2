"""The parts of a network that every exported form shares: what is exported, gates, heads, and what they cost."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import families, units
from .certainty import certainty
from .costs import CostTable
from .counting import duplicate
from .exits import confident
from .inference import FoldedRecurrentGates, optimize_for_inference
from .measure import cost_table
from .onnx_graph import Graph
from .onnx_ops import Value, pool, translate

CERTAIN = 17.4  # a logit from which on a sigmoid in float32 is 1
Memory = tuple[str, str] | None  # names of hidden state and cell: [1, B, hidden]


@dataclass(frozen=True)
class Net:
    """A network to be exported: folded, in eval, float32, on the CPU.

    Attributes:
        model: a copy.
        table: its MACs at the input size of the file.
        last: the exit that every image leaves at, if not before.
        levels: for each exit before, how sure an image that leaves is; None if none leaves for that.
        most: hard budget of each image in MACs.
    """

    model: Any
    table: CostTable
    last: int
    levels: tuple[float, ...] | None = None
    most: int | None = None

    @property
    def units(self) -> list[families.Unit]:
        return families.units(self.model)

    @property
    def family(self) -> families.Family:
        return families.family(self.model)

    @property
    def layer_gates(self) -> Any:
        return getattr(self.model, "layer_gates", None)

    @property
    def channel_gates(self) -> Any:
        return getattr(self.model, "channel_gates", None)

    def asks(self, index: int) -> bool:
        """Whether the branch classifier of exit `index` is evaluated to find out who leaves."""
        return index < self.last and self.levels is not None and self.levels[index] <= 1

    def exit_cost(self, index: int) -> int:
        """MACs of classifying at exit `index`; the head comes with what follows the last stage."""
        end = index == len(self.table.exits) - 1
        return int(self.table.exits[index].head + (self.table.leave[-1] if end else 0))


def take_apart(model: Any, input_size: tuple[int, int, int]) -> Net:
    """The network to export, with the budget that the model holds.

    Raises:
        ValueError: if its budget cannot be kept in a file, or it cannot run an input of that size.
    """
    table = cost_table(model, input_size)
    fast = optimize_for_inference(duplicate(model).float()).cpu().to(memory_format=torch.contiguous_format)
    dynamic, exits = getattr(model, "dynamic", None), getattr(model, "exits", None)
    budget, end = (None if dynamic is None else dynamic.budget), len(table.exits) - 1
    if budget is None:
        return Net(fast, table, end, exits.levels if exits is not None and exits.calibrated else None)
    if budget.exit is not None:
        return Net(fast, table, min(budget.exit, end))
    if budget.confidence is not None:
        return Net(fast, table, end, (budget.confidence,) * end)
    return Net(fast, table, end, most=_most(budget, table))


def _most(budget: Any, table: CostTable) -> int:
    """A hard budget in MACs that a file can keep."""
    single = budget.macs if not isinstance(budget.macs, tuple) or len(budget.macs) != 1 else budget.macs[0]
    if budget.unit != "macs" or isinstance(single, tuple):
        held = budget.unit if budget.unit != "macs" else f"macs= with {len(single)} values"
        raise ValueError(
            f"a budget of {held} cannot be exported; set_budget(macs=, fraction=, exit= or confidence=) with one "
            "value for all images can"
        )
    most = int(table.dense * budget.fraction) if budget.fraction is not None else int(single)
    if most < table.exits[0].dearest:
        raise ValueError(
            f"a budget of {most} MACs is too small: at input size {table.input_size} the dearest way to the first "
            f"exit costs {table.exits[0].dearest} MACs, the smallest budget possible"
        )
    return most


# Gates ---------------------------------------------------------------------------------------------------------------


def level_of(probability: float) -> float:
    """The smallest logit whose sigmoid is at least `probability`."""
    if probability <= 0 or probability > 1:
        return -math.inf if probability <= 0 else math.inf
    return CERTAIN if probability == 1 else math.log(probability) - math.log1p(-probability)


def ask_layer(net: Net, graph: Graph, g: int, x: Value, memory: Memory) -> tuple[str | bool, Memory]:
    """Whether gated unit `g` runs: bool, one element for each image, or one for all where the unit is settled.

    Returns:
        That, and the next state of an RNN gate.
    """
    gates = net.layer_gates
    keep: str | bool = gates.settled.get(g, "")
    if g in gates.asked:
        if isinstance(gates, FoldedRecurrentGates):
            logit, memory = _recur(graph, gates, g, x, memory)
        else:
            logit = translate(graph, gates.gates[g], x)[0].name
        if gates.looks(g):
            (more,) = translate(graph, lambda x: gates.certain[str(g)](certainty(net.model, x, gates.rest[g])), x)
            logit = graph.op("Add", logit, more.name)
        if g not in gates.settled:
            level = level_of(float(gates.threshold[g]))
            keep = graph.op("GreaterOrEqual", logit, graph.constant(level - _offset(gates)))
    return keep, memory


def _offset(gates: Any) -> float:
    """What `_recur` leaves out of an RNN gate's logit: its last bias, which the threshold takes over."""
    return float(gates.fc.bias) if isinstance(gates, FoldedRecurrentGates) else 0.0


def _recur(graph: Graph, gates: FoldedRecurrentGates, g: int, x: Value, memory: Memory) -> tuple[str, Memory]:
    """One step of the RNN gate as one LSTM operation: its logit [1, B, 1] without the last bias, and the next state."""
    channels = x.sample.shape[1]
    size = gates.hidden.shape[1]
    inputs, hidden = _lstm_order(gates.matrices[g]), _lstm_order(gates.hidden)  # [4 * hidden, C or hidden]
    offset = _lstm_order(gates.offsets[g])
    bias = np.concatenate([offset, np.zeros_like(offset)])
    seen = graph.op("Reshape", pool(graph, x.name), graph.constant((1, -1, channels), "int64"))
    weights = [graph.constant(array[None]) for array in (inputs, hidden, bias)]
    state = ["", memory[0], memory[1]] if memory is not None else []
    _, h, c = graph.ops("LSTM", [seen, *weights, *state], 3, hidden_size=size)
    return graph.op("MatMul", h, graph.constant(gates.fc.weight.t().numpy())), (h, c)


def _lstm_order(rows: Tensor) -> np.ndarray:
    """PyTorch's order of an LSTM's rows (input, forget, cell, output) as ONNX's (input, output, forget, cell)."""
    i, f, g, o = rows.detach().chunk(4)
    return torch.cat([i, o, f, g]).contiguous().numpy()


def ask_channels(net: Net, graph: Graph, g: int, x: Value) -> list[Value]:
    """For each hidden width of gated unit `g`, keeps of its groups: bool [B, groups]; [1, groups] if settled."""
    known = net.channel_gates.settled.get(g)
    if known is not None:
        return [Value(graph.constant([part], "bool"), torch.tensor([part])) for part in known]
    level = float(net.channel_gates.threshold[g])
    return translate(graph, lambda x: [prob >= level for prob in net.channel_gates(g, x)], x)


def gates_pool(net: Net, i: int) -> bool:
    """Whether a gate before unit `i` begins with the global average of the unit's input."""
    if not 0 < i < len(net.units):
        return False
    layer, channel = net.layer_gates, net.channel_gates
    asked = layer is not None and i - 1 in layer.asked and layer.config.kind in ("rnn", "linear")
    pools = channel is not None and i - 1 not in channel.settled and hasattr(channel.gates[i - 1], "fc1")
    return asked or pools


# Exits ---------------------------------------------------------------------------------------------------------------


def leave_stage(net: Net, graph: Graph, stage: int, x: Value) -> Value:
    """What the unit after a stage is given: in a DenseNet a transition stands between."""
    if not net.units[-1].kind.grows:
        return x
    return translate(graph, lambda x: net.family.leave(net.model, stage, x), x)[0]


def join(net: Net, graph: Graph, i: int, x: Value, y: Value) -> Value:
    """The next unit's input, from input and output of unit `i`."""
    unit = net.units[i]
    return translate(graph, lambda x, y: units.join(unit, x, y), x, y)[0] if unit.kind.grows else y


def classify(net: Net, graph: Graph, index: int, x: Value) -> Value:
    """Logits of exit `index`; past the last one is the model's own head. x: [B, C, H, W]."""
    if index < len(net.table.exits) - 1:
        return translate(graph, lambda x: net.model.exits(index, x), x)[0]
    stage = net.units[-1].stage
    return translate(graph, lambda x: net.family.head(net.model, net.family.leave(net.model, stage, x)), x)[0]


def sure(net: Net, graph: Graph, index: int, logits: Value) -> Value:
    """Who is sure enough to leave at exit `index`: bool [B]."""
    assert net.levels is not None
    level = net.levels[index]
    return translate(graph, lambda logits: confident(logits, level), logits)[0]


def stops_of(net: Net) -> tuple[int, ...]:
    """The unit after which each exit stands, up to the last one that is exported."""
    return tuple(stop.after for stop in net.table.exits[: net.last + 1])
