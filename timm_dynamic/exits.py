"""Exits: branch classifiers after a stage, and when an image leaves there."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .configs import ExitConfig
from .gates import Exact

NEVER = 2.0  # a confidence that no softmax reaches


class ExitHead(nn.Module):
    """A branch classifier (DDI, supplement 8, fig. 13). [B, C, H, W] -> [B, classes].

    Each pooling step halves the resolution and doubles the channels up to 256: 2x2 max pool, 3x3 depthwise and 1x1
    convolution, batch norm, ReLU. Then, if wanted, the same once more to any number of channels, without the max pool.
    Then average pool and linear. The convolutions and the widening are ours: the paper gives the pooling alone.
    """

    def __init__(self, channels: int, num_classes: int, pools: int, normalise: bool, hidden: int = 0) -> None:
        """Build the classifier.

        Args:
            channels: of the input.
            num_classes: 0 for no linear layer, as in timm.
            pools: how many pooling steps: max(0, 3 - k) at stage k.
            normalise: start with batch norm and ReLU (features of a DenseNet come without).
            hidden: channels of the convolution after the pooling steps; 0 for none.
        """
        super().__init__()
        self.pre = nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(inplace=True)) if normalise else nn.Identity()
        steps: list[nn.Module] = []
        for _ in range(pools):
            width = max(channels, min(2 * channels, 256))
            steps += [nn.MaxPool2d(2, ceil_mode=True), *_separable(channels, width)]
            channels = width
        if hidden:
            steps += _separable(channels, hidden)
            channels = hidden
        self.pools = nn.Sequential(*steps)
        self.num_features = channels
        self.fc: nn.Module = nn.Identity()
        self.reset(num_classes)

    def reset(self, num_classes: int, like: Tensor | None = None) -> None:
        """A fresh linear layer for `num_classes` classes (none for 0), of the device and dtype of `like`."""
        with torch.inference_mode(False):
            fc = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
            self.fc = fc if like is None else fc.to(like.device, like.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, C, H, W] -> logits [B, classes]."""
        return self.fc(self.pools(self.pre(x)).mean((2, 3)))


def _separable(channels: int, width: int) -> list[nn.Module]:
    """3x3 depthwise and 1x1 convolution, batch norm, ReLU. [B, channels, H, W] -> [B, width, H, W]."""
    return [
        nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False),
        nn.Conv2d(channels, width, 1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
    ]


class Exits(Exact):
    """The branch classifiers of a network and the units after which they stand.

    Attributes:
        gradient: what the trunk gets of the early exits' gradient in training, as a share, so that they compete
            less with the head; the exits' own weights get all of it. 0: they learn from a trunk that does
            not know of them. Not saved: it says how a network is trained.
    """

    EXACT = "confidence"

    def __init__(self, config: ExitConfig, after: Sequence[int], heads: Sequence[ExitHead]) -> None:
        super().__init__()
        self.config = config
        self.after = tuple(after)  # places in the running order of all units, ascending
        self.heads = nn.ModuleList(heads)
        self.gradient = 1.0
        self.confidence: Tensor = nn.Buffer(torch.full((len(heads),), NEVER))  # to travel with the weights
        self._read: tuple[Tensor, int] | None = None  # what was read of it, and in which state
        self._levels = (NEVER,) * len(heads)
        self.register_load_state_dict_post_hook(_read_levels)

    def __len__(self) -> int:
        return len(self.heads)

    def forward(self, index: int, x: Tensor) -> Tensor:
        """x: [B, C, H, W] -> logits [B, classes] of exit `index`."""
        return self.heads[index](_slowed(x, self.gradient) if self.training else x)

    @property
    def levels(self) -> tuple[float, ...]:
        """How sure an image that leaves in eval is at least, for each exit: `confidence`, read when it has changed."""
        self._read_again()
        return self._levels

    def _read_again(self) -> None:
        here = self.confidence
        if torch.compiler.is_compiling() or here.device.type == "meta":
            return
        version = -1 if here.is_inference() else here._version  # raised by whatever writes into the buffer
        if self._read is None or self._read[0] is not here or self._read[1] != version or version < 0:
            self._levels, self._read = tuple(here.tolist()), (here, version)

    @property
    def calibrated(self) -> bool:
        """Whether images leave early without a budget."""
        return any(level <= 1 for level in self.levels)

    def set_confidence(self, levels: Sequence[float]) -> None:
        """Let images leave in eval at exit `i` when they are at least `levels[i]` sure; above 1 means never."""
        values = torch.tensor(levels, dtype=self.confidence.dtype)
        with torch.no_grad():
            self.confidence.copy_(values)
        self._levels = tuple(values.tolist())


def _slowed(x: Tensor, share: float) -> Tensor:
    """The same values; their gradient is `share` of what it was."""
    return x if share == 1 else torch.lerp(x.detach(), x, share)


def _read_levels(exits: nn.Module, keys: object) -> None:
    assert isinstance(exits, Exits)
    exits._read_again()  # now, for what is compiled before they are asked for


def confident(logits: Tensor, confidence: float) -> Tensor:
    """Whether the largest softmax probability is at least `confidence`. logits: [B, classes] -> bool [B]."""
    return logits.float().softmax(-1).amax(-1) >= confidence
