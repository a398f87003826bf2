"""Gates: small networks that look at a unit's input and say what of the unit is computed."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.fx
from torch import Tensor, nn

from .configs import LayerGateConfig

OPEN_PROB = 0.88  # what an open gate starts at: keeps for sure, and still has a gradient
RNN_SIZE = 10  # input and hidden size of the RNNGate (SkipNet, section 3.1)
Memory = tuple[Tensor, Tensor] | None
# For each stage that is to be left yet, from a unit's own on: its place, and how many channels the features would lack
# there if that unit and all after it were skipped (in DenseNets; what dense layers do not give is zero).
Rest: TypeAlias = tuple[tuple[int, int], ...]
GATES = ("layer_gates", "channel_gates")  # a dynamic model's children that are gates
PARTS = (*GATES, "exits")  # and all that a stock model has not


def is_part(key: str) -> bool:
    """Whether a key of a state dict belongs to gates or exits."""
    return key.split(".", 1)[0] in PARTS


def gate_parts(model: Any) -> list[Any]:
    """A model's layer gates and channel gates, as far as it has them."""
    return [getattr(model, part) for part in GATES if hasattr(model, part)]


def gates_choose(model: Any) -> bool:
    """Whether anything is left to the gates of a model: channels, or units that are not settled."""
    return any(len(part.settled) < len(part) for part in gate_parts(model))


def straight_through(prob: Tensor) -> Tensor:
    """The hard decision forward, the probability's gradient backward (SkipNet, eq. 7).

    Args:
        prob: any shape, values in 0..1.

    Returns:
        Exactly 0.0 or 1.0, of the same shape; its derivative by `prob` is 1.
    """
    return (prob >= 0.5).to(prob.dtype) + (prob - prob.detach())


def pooled(x: Tensor) -> Tensor:
    """Global average pool. x: [B, C, H, W] -> [B, C]."""
    if not isinstance(x, torch.fx.Proxy) and x.requires_grad and x.is_contiguous(memory_format=torch.channels_last):
        return x.permute(0, 2, 3, 1).mean((1, 2))  # the same, and its gradient has the layout of x: adding it is quick
    return x.mean((2, 3))


def logit(prob: float) -> float:
    """The logit of a probability."""
    return math.log(prob / (1 - prob))


def open_gate(linear: nn.Linear, prob: float = OPEN_PROB) -> None:
    """Make a gate's last layer say `prob` whatever its input."""
    nn.init.zeros_(linear.weight)
    nn.init.constant_(linear.bias, logit(prob))


def thresholds(count: int) -> nn.Buffer:
    """For each gated unit the probability from which on it keeps, in eval (0.5, eq. 7, until calibrated)."""
    return nn.Buffer(torch.full((count,), 0.5))


class Exact(nn.Module):
    """A part whose `EXACT` buffer stays in float32 when the network is cast: decisions hang on its last digits."""

    EXACT = "threshold"

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        before = getattr(self, self.EXACT)
        super()._apply(fn, recurse)
        now = getattr(self, self.EXACT)
        if now.dtype != before.dtype:
            setattr(self, self.EXACT, before.to(now.device))
        return self


class GateSite(NamedTuple):
    """What a gate has to know about the unit that it stands before."""

    name: str
    channels: int  # of the unit's input
    body: float  # the unit's MACs per pixel of its input
    grows: bool  # a dense layer: every unit has an input width of its own
    widths: tuple[int, ...]  # hidden widths
    aligns: tuple[int, ...]  # channels that each hidden width can only drop together
    growth: int  # channels of the unit's output
    rest: Rest = ()  # of the network, for a classifier that is asked about the unit's input; () where it cannot be


# Layer gates ---------------------------------------------------------------------------------------------------------

# kind -> (max pool, strides of the 3x3 convolutions, share of a BasicBlock that C-to-C convolutions cost)
FEED_FORWARD: dict[str, tuple[bool, tuple[int, ...], float]] = {
    "ff1": (True, (1, 2), 0.15625),
    "ff2": (False, (2,), 0.125),
    "linear": (False, (), 0.0),
}
LARGEST_SHARE = 0.21  # up to this share an FFGate has the paper's C-to-C convolutions (20.8 % at a stage change)


def gate_width(kind: str, site: GateSite) -> int:
    """Hidden channels of an FFGate: C where that is near the paper's share of the unit, else what meets the share."""
    pool, strides, target = FEED_FORWARD[kind]
    first = 9 / (4 if pool else 1) / strides[0] ** 2  # MACs per input pixel and pair of channels
    second = first / strides[1] ** 2 if len(strides) > 1 else 0.0
    c = site.channels
    if (first + second) * c * c <= LARGEST_SHARE * site.body:
        return c
    # second * w^2 + first * c * w = target * body
    root = math.sqrt((first * c) ** 2 + 4 * second * target * site.body)
    width = (root - first * c) / (2 * second) if second else target * site.body / (first * c)
    return max(1, min(c, round(width)))


class FeedForwardGate(nn.Sequential):
    """FFGate-I, FFGate-II or the linear gate (SkipNet, section 3.1, fig. 3). [B, C, H, W] -> logit [B, 1].

    Batch norm and ReLU after each convolution are ours: the paper does not say.
    """

    def __init__(self, config: LayerGateConfig, site: GateSite) -> None:
        super().__init__()
        pool, strides, _ = FEED_FORWARD[config.kind]
        channels = site.channels
        if pool:
            self.add_module("pool", nn.MaxPool2d(2, ceil_mode=True))
        for i, stride in enumerate(strides):
            width = config.width or gate_width(config.kind, site)
            self.add_module(f"conv{i + 1}", nn.Conv2d(channels, width, 3, stride, padding=1, bias=False))
            self.add_module(f"norm{i + 1}", nn.BatchNorm2d(width))
            self.add_module(f"act{i + 1}", nn.ReLU(inplace=True))
            channels = width
        self.add_module("gap", nn.AdaptiveAvgPool2d(1))
        self.add_module("flat", nn.Flatten(1))
        last = nn.Linear(channels, 1)
        self.add_module("fc", last)
        if config.init == "open":
            open_gate(last)


class SettledGates(Exact):
    """Layer gates of a network, some of whose units may be settled: run by every image or by none, whatever is said.

    Attributes:
        gated: names of the gated units.
        settled: for each place of a settled unit, whether it runs.
        asked: places of the gates that are run.
        certain: for the places of gates that are told the classifier's certainty, what it adds to their logit.
        rest: what lies between these and the classifier.
    """

    CARRIES = False  # whether what a gate saw is handed to the next
    config: LayerGateConfig
    gated: tuple[str, ...]
    settled: dict[int, bool]
    asked: frozenset[int]
    certain: nn.ModuleDict
    rest: dict[int, Rest]

    def show_certainty(self, config: LayerGateConfig, sites: Sequence[GateSite]) -> None:
        """Make room for the classifier's certainty where a config asks for it; at first it changes nothing.

        Raises:
            ValueError: if the classifier can be asked nowhere.
        """
        self.rest = {place: site.rest for place, site in enumerate(sites) if site.rest} if config.certainty else {}
        if config.certainty and not self.rest:
            raise ValueError(
                "certainty is for dense layers, and for residual units within the last stage, whose input the "
                f"classifier can be asked about; found none among {', '.join(site.name for site in sites)}"
            )
        self.certain = nn.ModuleDict({str(place): nn.Linear(1, 1, bias=False) for place in self.rest})
        for weight in self.certain.parameters():
            nn.init.zeros_(weight)

    def looks(self, index: int) -> bool:
        """Whether the gate of unit `index` has to be told the classifier's certainty."""
        return index not in self.settled and str(index) in self.certain

    def prob(self, index: int, score: Tensor, certainty: Tensor | None) -> Tensor:
        """Probability of keeping from a gate's logit. score: [B, 1], certainty: [B, 1] or None -> [B] in float32."""
        if certainty is not None:
            gate: Any = self.certain[str(index)]
            score = torch.addmm(score, certainty.to(score.dtype), gate.weight)  # [1, 1]: a call of its own takes time
        return torch.sigmoid(score.float()).flatten()

    def settle(self, config: LayerGateConfig, gated: Sequence[str]) -> None:
        """Take over which units of a config are shut and which are open for good.

        Raises:
            ValueError: for a name that is not a gated unit's; nothing is changed.
        """
        places = {name: place for place, name in enumerate(gated)}
        for what, names in (("shut", config.shut), ("open", config.open)):
            for name in names:
                if name not in places:
                    raise ValueError(f"only gated units can be {what} for good: {', '.join(places)}; found {name!r}")
        self.settled = {places[name]: name in config.open for name in (*config.shut, *config.open)}
        self.config, self.gated = config, tuple(gated)
        free = [place for place in range(len(gated)) if place not in self.settled]
        carries = self.CARRIES and config.memory == "all"
        self.asked = frozenset(range(max(free, default=-1) + 1) if carries else free)

    def forget_names(self, count: int) -> None:
        """Forget the gated units from `count` on."""
        left = self.gated[:count]
        for place in [place for place in self.certain if int(place) >= count]:
            del self.certain[place]
        shut, opened = (tuple(name for name in names if name in left) for names in (self.config.shut, self.config.open))
        self.settle(replace(self.config, shut=shut, open=opened), left)

    def settled_prob(self, index: int, x: Tensor) -> Tensor:
        """What stands for the probability of keeping a unit whose gate is not run: 0 or 1. -> [B]."""
        return x.new_full(x.shape[:1], float(self.settled[index]), dtype=torch.float32)


class FeedForwardGates(SettledGates):
    """One gate of its own for each gated unit."""

    def __init__(self, config: LayerGateConfig, sites: Sequence[GateSite]) -> None:
        super().__init__()
        self.settle(config, [site.name for site in sites])
        self.gates = nn.ModuleList(FeedForwardGate(config, site) for site in sites)
        self.show_certainty(config, sites)
        self.threshold: Tensor = thresholds(len(sites))

    def __len__(self) -> int:
        return len(self.gates)

    def forward(self, index: int, x: Tensor, memory: Memory, certainty: Tensor | None = None) -> tuple[Tensor, Memory]:
        """x: [B, C, H, W] -> probability of keeping gated unit `index` [B] in float32, and `memory` as it was.

        certainty: of the classifier [B, 1], where the gate looks at it. The gate of a settled unit is not run.
        """
        if index not in self.asked:
            return self.settled_prob(index, x), memory
        return self.prob(index, self.gates[index](x), certainty), memory

    def cut(self, count: int) -> None:
        """Forget the gates from `count` on."""
        self.gates, self.threshold = self.gates[:count], self.threshold[:count]
        self.forget_names(count)


class RecurrentGates(SettledGates):
    """RNNGate: one LSTM cell shared by all units (SkipNet, section 3.1, fig. 3c).

    A projection to the cell's input for each input width (each unit in a DenseNet). The state starts at zero in each
    forward pass and is handed from unit to unit by the caller, past settled units too: unless `config.memory` is
    "free" their gates are run as long as the gate of a later unit needs the state.
    """

    CARRIES = True

    def __init__(self, config: LayerGateConfig, sites: Sequence[GateSite]) -> None:
        super().__init__()
        self.settle(config, [site.name for site in sites])
        self.keys = [site.name.replace(".", "_") if site.grows else str(site.channels) for site in sites]
        self.project = nn.ModuleDict(
            {key: nn.Linear(site.channels, RNN_SIZE) for key, site in zip(self.keys, sites, strict=True)}
        )
        self.cell = nn.LSTMCell(RNN_SIZE, RNN_SIZE)
        self.fc = nn.Linear(RNN_SIZE, 1)
        self.show_certainty(config, sites)
        self.threshold: Tensor = thresholds(len(sites))
        if config.init == "open":
            open_gate(self.fc)

    def __len__(self) -> int:
        return len(self.keys)

    def forward(self, index: int, x: Tensor, memory: Memory, certainty: Tensor | None = None) -> tuple[Tensor, Memory]:
        """x: [B, C, H, W] -> probability of keeping gated unit `index` [B] in float32, and the next state.

        certainty: of the classifier [B, 1], where the gate looks at it.
        """
        if index not in self.asked:
            return self.settled_prob(index, x), memory
        hidden, cell = self.cell(self.project[self.keys[index]](pooled(x)), memory)
        return self.prob(index, self.fc(hidden), certainty), (hidden, cell)

    def cut(self, count: int) -> None:
        """Forget what only the gates from `count` on use."""
        self.keys, self.threshold = self.keys[:count], self.threshold[:count]
        self.forget_names(count)
        for key in list(self.project):
            if key not in self.keys:
                del self.project[key]


LayerGates = FeedForwardGates | RecurrentGates


def make_layer_gates(config: LayerGateConfig, sites: Sequence[GateSite]) -> LayerGates:
    """The layer gates of a network, one for each site."""
    return (RecurrentGates if config.kind == "rnn" else FeedForwardGates)(config, sites)


# What is done with all kinds -----------------------------------------------------------------------------------------


def sharpened(prob: Tensor, temperature: float) -> Tensor:
    """Probabilities whose logits are divided by a temperature: below 1 they move away from 0.5. Any shape, float32."""
    if temperature == 1:
        return prob
    return torch.sigmoid(torch.logit(prob.float(), eps=1e-6) / temperature)


@torch.no_grad()
def lower_logits(gates: nn.Module, amount: Tensor) -> None:
    """Lower what all gates of a kind give by as much. amount: a scalar, added to the biases of their last layers."""
    for name, module in gates.named_modules():
        if name.split(".")[-1] == "fc":
            module.bias -= amount


def widen(keep: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Keeps of groups as keeps of channels. keep: [B, groups] -> [B, channels]."""
    if len(set(sizes)) == 1:
        return keep.repeat_interleave(sizes[0], dim=1)
    return torch.cat([keep[:, i : i + 1].expand(-1, size) for i, size in enumerate(sizes)], dim=1)
