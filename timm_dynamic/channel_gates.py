"""Channel gates: which groups of a unit's hidden channels are computed."""

import math
from collections.abc import Sequence
from dataclasses import replace

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
    """One channel gate for each gated unit, deciding for all of the unit's hidden widths at once.

    Attributes:
        gated: names of the gated units.
        sizes: for each unit, for each hidden width, sizes of its groups.
        settled: for each place of a unit whose channels are settled, keeps of its groups; its gate is not run.
    """

    config: ChannelGateConfig
    settled: dict[int, tuple[tuple[bool, ...], ...]]

    def __init__(self, config: ChannelGateConfig, sites: Sequence[GateSite]) -> None:
        super().__init__()
        self.gated = tuple(site.name for site in sites)
        self.sizes: list[tuple[tuple[int, ...], ...]] = [
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
        self.settle(config)

    def settle(self, config: ChannelGateConfig) -> None:
        """Take over which units' channels are settled in a config.

        Raises:
            ValueError: for a name that is not a gated unit's, or digits that do not fit its groups; nothing is changed.
        """
        found = {}
        for name, digits in config.channels_of().items():
            if name not in self.gated:
                raise ValueError(f"only gated units have channels to settle: {', '.join(self.gated)}; found {name!r}")
            place = self.gated.index(name)
            found[place] = self._keeps(name, digits, [len(sizes) for sizes in self.sizes[place]], config.mode)
        self.config, self.settled = config, found

    @staticmethod
    def _keeps(name: str, digits: str, groups: Sequence[int], mode: str) -> tuple[tuple[bool, ...], ...]:
        if len(digits) != sum(groups):
            raise ValueError(f"{name} has {sum(groups)} channel groups, and a digit is needed for each; found {digits}")
        parts, start = [], 0
        for count in groups:
            part = digits[start : start + count]
            if mode == "nested" and "01" in part:
                raise ValueError(f"nested channel gates keep the first groups of a width; found {part} for {name}")
            parts.append(tuple(digit == "1" for digit in part))
            start += count
        return tuple(parts)

    def free(self) -> list[nn.Module]:
        """The gates of units whose channels are not settled."""
        return [gate for place, gate in enumerate(self.gates) if place not in self.settled]

    def __len__(self) -> int:
        return len(self.gates)

    def forward(self, index: int, x: Tensor) -> list[Tensor]:
        """x: [B, C, H, W] -> for each hidden width of unit `index`, probabilities [B, groups] in float32.

        The gate of a unit whose channels are settled is not run: zeros and ones stand for what it would say.
        """
        if index in self.settled:
            none = x.new_zeros(x.shape[:1], dtype=torch.float32)
            every = none + 1
            return [torch.stack([every if keep else none for keep in part], 1) for part in self.settled[index]]
        prob = torch.sigmoid(self.gates[index](x).float())
        parts, start = [], 0
        for sizes in self.sizes[index]:  # not `split`: fx cannot iterate over what it gives
            parts.append(prob.narrow(1, start, len(sizes)))
            start += len(sizes)
        return [part.cumprod(1) if self.config.mode == "nested" else part for part in parts]

    def cut(self, count: int) -> None:
        """Forget the gates from `count` on."""
        self.gates, self.sizes = self.gates[:count], self.sizes[:count]
        self.threshold, self.gated = self.threshold[:count], self.gated[:count]
        left = tuple(one for one in self.config.settled if one.split("=")[0] in self.gated)
        self.settle(replace(self.config, settled=left))
