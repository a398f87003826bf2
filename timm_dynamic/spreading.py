"""A start for gates from which they can tell images apart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .configs import positive
from .forward import decide
from .gates import ChannelGates, open_logit
from .surgery import force

FEWEST = 16  # images
TINY = 1e-6


@torch.no_grad()
def spread_gates(model: Any, images: Tensor, size: float = 1.0) -> Any:
    """Scale fresh gates so that what they say differs between images.

    The logits of a gate that was initialised at random differ by some thousandths between images and, where gates
    share their weights, between units: all of them pass the threshold together, and the bias, which is the same for
    all images, learns much faster than anything that looks at the image. Here each gate's hidden values are brought to
    mean 0 and deviation 1 over some images, unit by unit with all units run (as in Mishkin and Matas, "All you need is
    a good init", 2016), and then its logits to the deviation `size` around the logit that open gates start at: nearly
    all images keep, and which ones lie near the threshold depends on the image. Gates whose last layer is zero
    (``init="open"``) go on keeping for every image; only what that layer sees is scaled. The architecture is not
    changed.

    Args:
        model: a dynamic network with gates, on which nothing was trained yet but its trunk; it is changed.
        images: [B, C, H, W], at least 16 that differ, on the model's device.
        size: standard deviation of the logits.

    Returns:
        The model.

    Raises:
        ValueError: if there are no gates, too few images, or `size` is not above 0.
    """
    positive("size", size)
    parts = [getattr(model, name) for name in ("layer_gates", "channel_gates") if hasattr(model, name)]
    if not parts:
        raise ValueError("spread_gates needs a model with gates: call add_layer_gates or add_channel_gates")
    if len(images) < FEWEST:
        raise ValueError(f"spread_gates needs at least {FEWEST} images; found {len(images)}")
    seen = _outputs(model, _hidden(parts), images)
    for layer, values in seen.items():
        _standardise(layer, values, 0.0, 1.0)
    last = _last(parts)
    seen = _outputs(model, list(last), images)
    for layer, values in seen.items():
        centre, together = last[layer]
        _standardise(layer, values, centre, size, together)
    return model


def _hidden(parts: Sequence[nn.Module]) -> list[nn.Linear]:
    """Linear layers inside gates."""
    return [layer for part in parts for name, layer in _linear(part) if name != "fc"]


def _last(parts: Sequence[nn.Module]) -> dict[nn.Linear, tuple[float, bool]]:
    """The layers that give logits: where these are to lie, and whether they are scaled together.

    Each group of channels has a scale of its own.
    """
    found: dict[nn.Linear, tuple[float, bool]] = {}
    for part in parts:
        if isinstance(part, ChannelGates):
            for index, gate in enumerate(part.gates):
                found |= {layer: (open_logit(part.factors(index)), False) for layer in _fc(gate)}
        else:
            found |= {layer: (open_logit(), True) for layer in _fc(part)}
    return found


def _fc(part: nn.Module) -> list[nn.Linear]:
    return [layer for name, layer in _linear(part) if name == "fc"]


def _linear(part: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    for name, module in part.named_modules():
        if isinstance(module, nn.Linear):
            yield name.split(".")[-1], module


def _outputs(model: Any, layers: Sequence[nn.Linear], images: Tensor) -> dict[nn.Linear, Tensor]:
    """What each layer gives [n, outputs], over all images and all units that use it, when every unit runs."""
    seen: dict[nn.Linear, list[Tensor]] = {layer: [] for layer in layers}
    hooks = [layer.register_forward_hook(lambda layer, _, out: seen[layer].append(out.float())) for layer in layers]
    options: dict[str, Any] = {"layer_keep": 1.0} if hasattr(model, "layer_gates") else {}
    if hasattr(model, "channel_gates"):
        options["channel_keep"] = 1.0
    try:
        with _normalised_by_batch(model), force(model, **options):
            decide(model, images)
    finally:
        for hook in hooks:
            hook.remove()
    return {layer: torch.cat(values) for layer, values in seen.items()}


@contextmanager
def _normalised_by_batch(model: Any) -> Iterator[None]:
    """Eval mode, but for the gates' own batch norms, which know no statistics yet; these are forgotten afterwards."""
    norms = [
        module
        for part in ("layer_gates", "channel_gates")
        for module in getattr(model, part, nn.Module()).modules()
        if isinstance(module, nn.BatchNorm2d)
    ]
    modes = [(module, module.training) for module in model.modules()]
    before = model.dynamic.execution, model.dynamic.budget
    model.eval()
    model.dynamic.execution, model.dynamic.budget = "masked", None
    for norm in norms:
        norm.train()
    try:
        yield
    finally:
        model.dynamic.execution, model.dynamic.budget = before
        for module, mode in modes:
            module.training = mode
        for norm in norms:
            norm.reset_running_stats()


def _standardise(layer: nn.Linear, seen: Tensor, centre: float, deviation: float, together: bool = False) -> None:
    """Scale a layer so that what it gave would have had a mean and a deviation; outputs that never vary stay."""
    over = None if together else 0
    spread, mean = (value.expand(len(layer.bias)) for value in (seen.std(over), seen.mean(over)))
    varies = spread > TINY
    scale = torch.where(varies, deviation / spread.clamp_min(TINY), 1.0).to(layer.weight.dtype)
    shift = torch.where(varies, centre - mean * scale, layer.bias * (1 - scale)).to(layer.weight.dtype)
    layer.weight.mul_(scale[:, None])
    layer.bias.copy_(layer.bias * scale + shift)
