"""What leaving out layers or channels does to features (DDI supplement, section 10, fig. 14)."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from . import families
from .analyses import Loader
from .benchmark import drawn
from .budgets import set_budget
from .configs import ChannelGateConfig
from .surgery import add_channel_gates, add_layer_gates, force, set_execution, strip
from .walk import Log, Walk, table_for

KINDS = ("layers", "channels")
KEEPS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
MAP_KEEP = 0.6
MAP_IMAGES = 4


@dataclass(frozen=True)
class Change:
    """How far features are from those of the same network with nothing left out.

    Attributes:
        kind: what is left out: "layers", "channels" or "both".
        keep: share of the gated units, or of the channel groups, that run, drawn at random; None for the network's own
            decisions.
        macs_share: mean MACs as a share of the stock model's, gates included.
        accuracy: 0..1.
        change: after the last unit of each stage, the mean over images of |f - f0| / |f0|.
        error: standard error of the mean of those of all stages.
        images: how many there were.
    """

    kind: str
    keep: float | None
    macs_share: float
    accuracy: float
    change: tuple[float, ...]
    error: float
    images: int

    @property
    def mean_change(self) -> float:
        """Mean of `change` over the stages."""
        return sum(self.change) / len(self.change)


def own_changes(model: Any, loader: Loader) -> list[Change]:
    """What a network's own decisions change: those on layers alone, on channels alone, and both.

    Args:
        model: with gates, in eval mode; it is not changed.
        loader: batches of images [B, C, H, W] and classes [B].
    """
    model = _plainly(model)
    parts = {"layers": hasattr(model, "layer_gates"), "channels": hasattr(model, "channel_gates")}
    options = {"layers": "layer_keep", "channels": "channel_keep"}
    present = [kind for kind, there in parts.items() if there]
    cases: list[Case] = []
    for kind in (*present, *(["both"] if len(present) == 2 else [])):
        silent = [other for other in present if kind not in (other, "both")]
        cases.append((kind, None, _always({options[other]: 1.0 for other in silent})))
    return _compare(model, loader, cases, {options[kind]: 1.0 for kind in present})


def random_changes(model: Any, loader: Loader, keeps: Sequence[float] = KEEPS, seed: int = 0) -> list[Change]:
    """What leaving out layers or channel groups at random changes, in the same trained trunk.

    Args:
        model: a stock or dynamic network; its own gates are not used, and it is not changed.
        loader: batches of images [B, C, H, W] and classes [B].
        keeps: shares of the gated units, and of the channel groups, that run.
        seed: of the draws.
    """
    found = []
    for kind, gated in twins(model).items():
        generator = torch.Generator().manual_seed(seed)
        cases: list[Case] = [(kind, keep, _draws(gated, kind, keep, generator)) for keep in keeps]
        found += _compare(gated, loader, cases, {"layer_keep" if kind == "layers" else "channel_keep": 1.0})
    return found


def twins(model: Any) -> dict[str, Any]:
    """Two copies of a network's trunk, with layer gates ("layers") and with channel gates ("channels").

    Channels are left out one image at a time here, so groups may be small: an eighth of the narrowest hidden
    width, and 16 channels at most. There is no copy for channels if the units have no plain hidden width.
    """
    found: dict[str, Any] = {}
    for kind in KINDS:
        bare = copy.deepcopy(model)
        bare = strip(bare) if hasattr(bare, "dynamic") else bare
        if kind == "layers":
            found[kind] = add_layer_gates(bare, "linear")
        else:
            steps = [unit.kind.steps(unit.module) for unit in families.units(bare)[1:]]
            if not all(steps):
                continue
            narrowest = min(conv.out_channels for one in steps for conv, _ in one[:-1])
            found[kind] = add_channel_gates(bare, ChannelGateConfig(group_size=max(1, min(16, narrowest // 8))))
        set_execution(found[kind].eval(), "masked")
    return found


def _plainly(model: Any) -> Any:
    """A copy that computes everything and has no budget."""
    return set_execution(set_budget(copy.deepcopy(model).eval()), "masked")


Forcing = Callable[[int], dict[str, Any]]  # from the images of a batch to arguments of `force`
Case = tuple[str, float | None, Forcing]  # what is left out, share that is kept, how


def _always(options: dict[str, Any]) -> Forcing:
    return lambda batch: options


def _draws(model: Any, kind: str, keep: float, generator: torch.Generator) -> Forcing:
    shares = (keep, 1.0) if kind == "layers" else (1.0, keep)
    return lambda batch: drawn(model, batch, *shares, None, generator)


@torch.no_grad()
def _compare(model: Any, loader: Loader, cases: Sequence[Case], whole_options: dict[str, Any]) -> list[Change]:
    """Features with something left out beside those with nothing left out, for each case."""
    device = next(model.parameters()).device
    seen: list[list[tuple[Tensor, Tensor, Tensor]]] = [[] for _ in cases]
    for x, y in loader:
        x = x.to(device)
        dense = table_for(model, (x.shape[1], x.shape[2], x.shape[3])).dense
        with force(model, **whole_options):
            whole, _, _ = _stages(model, x)
        for (_, _, forcing), found in zip(cases, seen, strict=True):
            with force(model, **forcing(len(x))):
                less, logits, macs = _stages(model, x)
            far = torch.stack([distance(a, b) for a, b in zip(less, whole, strict=True)], 1)
            found.append((far.double().cpu(), logits.argmax(1).cpu() == y, macs.cpu() / dense))
    return [_summed(kind, keep, found) for (kind, keep, _), found in zip(cases, seen, strict=True)]


def distance(features: Tensor, whole: Tensor) -> Tensor:
    """|f - f0| / |f0| of each image: [B, ...] -> [B]."""
    return (features - whole).flatten(1).norm(dim=1) / whole.flatten(1).norm(dim=1).clamp_min(1e-12)


def _summed(kind: str, keep: float | None, found: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Change:
    """Means over all batches."""
    changes, right, shares = (torch.cat(column).double() for column in zip(*found, strict=True))
    error = changes.mean(1).std(correction=0).item() / math.sqrt(len(changes))
    means = tuple(changes.mean(0).tolist())  # changes: [N, stages]
    return Change(kind, keep, shares.mean().item(), right.mean().item(), means, error, len(changes))


def _stages(model: Any, x: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
    """Features [B, C, H, W] after each stage's last unit, logits [B, classes] and MACs [B]."""
    walk = Walk(model, x, Log(len(x)), budgeted=False)
    assert walk.macs is not None
    seen = []
    for i, unit in enumerate(walk.units):
        if unit.last:
            walk.to_unit(i)
            seen.append(walk.x)
    last = len(walk.stops) - 1
    macs = torch.as_tensor(walk.macs.spent + walk.macs.exit_cost(last), dtype=torch.float64).expand(len(x))
    return seen, walk.classify(last, walk.x), macs


@torch.no_grad()
def maps(model: Any, x: Tensor, keep: float = MAP_KEEP, seed: int = 0) -> dict[str, Tensor]:
    """Features after the first stage, averaged over channels, with nothing left out and with layers or channels.

    Args:
        model: as for `random_changes`.
        x: a few images [B, C, H, W].
        keep: share of the units, and of the channel groups, that run.
        seed: of the draw.

    Returns:
        [B, H', W'] for "nothing" and each kind of `twins`.
    """
    found = {}
    for kind, gated in twins(model).items():
        whole: dict[str, Any] = {"layer_keep" if kind == "layers" else "channel_keep": 1.0}
        with force(gated, **whole):
            found["nothing"] = _stages(gated, x)[0][0].mean(1).cpu()
        with force(gated, **_draws(gated, kind, keep, torch.Generator().manual_seed(seed))(len(x))):
            found[kind] = _stages(gated, x)[0][0].mean(1).cpu()
    return found


def at_equal_cost(changes: Sequence[Change]) -> list[tuple[float, float, float, float, float]]:
    """Channels beside layers where their costs overlap.

    Args:
        changes: of `random_changes`.

    Returns:
        For each measured point of either kind within the other's range: share of the MACs, change by layers and by
        channels, accuracy by layers and by channels, interpolated between the measured points.
    """
    curves = {kind: sorted((c for c in changes if c.kind == kind), key=lambda c: c.macs_share) for kind in KINDS}
    if any(len(curve) < 2 for curve in curves.values()):
        return []
    low = max(curve[0].macs_share for curve in curves.values())
    high = min(curve[-1].macs_share for curve in curves.values())
    shares = sorted(c.macs_share for curve in curves.values() for c in curve if low <= c.macs_share <= high)
    found = []
    for share in shares:
        (a, right_a), (b, right_b) = (_at(curves[kind], share) for kind in KINDS)
        found.append((share, a, b, right_a, right_b))
    return found


def _at(curve: Sequence[Change], share: float) -> tuple[float, float]:
    """Mean change and accuracy of a curve at a cost within its range."""
    for low, high in pairwise(curve):
        if low.macs_share <= share <= high.macs_share:
            width = high.macs_share - low.macs_share
            t = (share - low.macs_share) / width if width else 0.0
            change = low.mean_change + t * (high.mean_change - low.mean_change)
            return change, low.accuracy + t * (high.accuracy - low.accuracy)
    raise ValueError(f"a share in {curve[0].macs_share:.3f}..{curve[-1].macs_share:.3f} is needed; found {share:.3f}")
