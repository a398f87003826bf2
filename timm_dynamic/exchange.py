"""What decisions are worth to the images that they were made for: images exchange them, at the same total cost."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .analyses import Loader, Observed
from .budgets import set_budget
from .surgery import force, group_counts

DRAWS = 3


@dataclass(frozen=True)
class Exchange:
    """Accuracy of a network whose images follow their own decisions, and each other's.

    Attributes:
        own: accuracy by an image's own decisions.
        others: mean accuracy where each image follows those of another one, drawn at random.
        draws: how often was drawn.
        p: of a t-test over the images that the two do not differ on the mean. A test of ranks would not do: where
            images are mostly recognised, losses come in small parts and wins in whole.
    """

    own: float
    others: float
    draws: int
    p: float


def exchange(model: Any, loader: Loader, observed: Observed, draws: int = DRAWS, seed: int = 0) -> Exchange | None:
    """Give every image the layers, channels and exit of another, and measure what that costs.

    The mean cost stays what it was to the last digit, and so does the set of policies; all that is lost is who gets
    which. If accuracy stays as well, the decisions need not have looked at the image.

    Args:
        model: with gates, in eval mode; it is not changed.
        loader: batches of images [B, C, H, W] and classes [B].
        observed: what the network did with them.
        draws: permutations of the images.
        seed: of the draws.

    Returns:
        None if the network has no gates.
    """
    if observed.word is None:
        return None
    model = set_budget(copy.deepcopy(model))  # every image leaves where the one did whose decisions it follows
    generator = torch.Generator().manual_seed(seed)
    found = [
        _correct(model, loader, observed, torch.randperm(len(observed), generator=generator)) for _ in range(draws)
    ]
    own, others = observed.rows["correct"].double(), torch.stack(found).double().mean(0)
    return Exchange(own.mean().item(), others.mean().item(), draws, _differs(own - others))


def _differs(values: Tensor) -> float:
    """Two-sided p-value of the t-test that differences [N] are 0 on the mean."""
    from scipy.stats import ttest_1samp

    if not bool((values != values[0]).any()):
        return float(values[0] == 0)
    return float(ttest_1samp(values.numpy(), 0.0).pvalue)


@torch.no_grad()
def _correct(model: Any, loader: Loader, observed: Observed, order: Tensor) -> Tensor:
    """Whether each image is recognised [N] when image k follows the decisions of image `order[k]`."""
    found: list[Tensor] = []
    start = 0
    for x, y in loader:
        device = next(model.parameters()).device
        options = _decisions_of(model, observed, order[start : start + len(y)], device)
        with force(model, **options):
            found.append(model(x.to(device)).argmax(1).cpu() == y.cpu())
        start += len(y)
    return torch.cat(found)


def _decisions_of(model: nn.Module, observed: Observed, places: Tensor, device: torch.device) -> dict[str, Any]:
    """Arguments of `force` for the decisions of some images."""
    options: dict[str, Any] = {}
    if hasattr(model, "layer_gates"):
        options["layer_keep"] = observed.rows["layers"][places].to(device)
    if hasattr(model, "channel_gates"):
        groups = observed.rows["channels"][places].to(device)
        options["channel_keep"] = list(groups.split(group_counts(model), dim=1))
    if hasattr(model, "exits"):
        options["exit"] = observed.rows["exit"][places].to(device)
    return options
