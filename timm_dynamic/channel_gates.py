"""Channel gates: which groups of a unit's hidden channels are computed."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .configs import ChannelGateConfig
from .gates import OPEN_PROB, Exact, GateSite, open_gate, thresholds


def group_sizes(config: ChannelGateConfig, width: int, align: int = 1) -> tuple[int, ...]:
    """Sizes of the channel groups that a hidden width is divided into.

    Args:
        config: gives `group_size`, or `levels` where the mode is nested.
        width: hidden channels.
        align: channels that can only be dropped together; divides `width`.

    Returns:
        Sizes that add up to `width`: all alike but the last, which may be smaller.
    """
    wanted = math.ceil(width / config.levels) if config.mode == "nested" else config.group_size
    size = min(width, math.ceil(wanted / align) * align)
    return (size,) * (width // size) + ((width % size,) if width % size else ())


class PooledChannelGate(nn.Sequential):
    """A light channel gate for residual blocks: pool, a small hidden layer, linear. [B, C, H, W] -> [B, groups]."""

    def __init__(self, site: GateSite, groups: int) -> None:
        super().__init__()
        hidden = max(8, site.channels // 16)
        self.add_module("gap", nn.AdaptiveAvgPool2d(1))
        self.add_module("flat", nn.Flatten(1))
        self.add_module("fc1", nn.Linear(site.channels, hidden))
        self.add_module("act", nn.ReLU(inplace=True))
        self.add_module("fc", nn.Linear(hidden, groups))


class NarrowDenseGate(nn.Sequential):
    """A narrow copy of a dense layer (DDI, supplement 7, fig. 12): the 1x1 at stride 2 and with half of the outputs.

    [B, C, H, W] -> [B, groups]. 12.5 % of the dense layer's MACs, plus the linear layer.
    """

    def __init__(self, site: GateSite, groups: int) -> None:
        super().__init__()
        hidden = max(1, site.widths[0] // 2)
        self.add_module("norm1", nn.BatchNorm2d(site.channels))
        self.add_module("act1", nn.ReLU(inplace=True))
        self.add_module("conv1", nn.Conv2d(site.channels, hidden, 1, stride=2, bias=False))
        self.add_module("norm2", nn.BatchNorm2d(hidden))
        self.add_module("act2", nn.ReLU(inplace=True))
        self.add_module("conv2", nn.Conv2d(hidden, site.growth, 3, padding=1, bias=False))
        self.add_module("gap", nn.AdaptiveAvgPool2d(1))
        self.add_module("flat", nn.Flatten(1))
        self.add_module("fc", nn.Linear(site.growth, groups))


class ChannelGates(Exact):
    """One channel gate for each gated unit, deciding for all of the unit's hidden widths at once."""

    def __init__(self, config: ChannelGateConfig, sites: Sequence[GateSite]) -> None:
        super().__init__()
        self.config = config
        self.sizes: list[tuple[tuple[int, ...], ...]] = [  # for each unit, for each hidden width, sizes of its groups
            tuple(group_sizes(config, w, a) for w, a in zip(site.widths, site.aligns, strict=True)) for site in sites
        ]
        self.gates = nn.ModuleList()
        self.threshold: Tensor = thresholds(len(sites))
        for site, sizes in zip(sites, self.sizes, strict=True):
            kind = NarrowDenseGate if site.grows else PooledChannelGate
            gate = kind(site, sum(map(len, sizes)))
            if config.init == "open":
                # a nested group's probability is a product over the groups before it
                deepest = max(map(len, sizes)) if config.mode == "nested" else 1
                open_gate(gate.get_submodule("fc"), OPEN_PROB ** (1 / deepest))  # type: ignore[arg-type]
            self.gates.append(gate)

    def __len__(self) -> int:
        return len(self.gates)

    def forward(self, index: int, x: Tensor) -> list[Tensor]:
        """x: [B, C, H, W] -> for each hidden width of unit `index`, probabilities [B, groups] in float32."""
        prob = torch.sigmoid(self.gates[index](x).float())
        parts, start = [], 0
        for sizes in self.sizes[index]:  # not `split`: fx cannot iterate over what it gives
            parts.append(prob.narrow(1, start, len(sizes)))
            start += len(sizes)
        return [part.cumprod(1) if self.config.mode == "nested" else part for part in parts]

    def cut(self, count: int) -> None:
        """Forget the gates from `count` on."""
        self.gates, self.sizes = self.gates[:count], self.sizes[:count]
        self.threshold = self.threshold[:count]
