"""A start for gates from which they can tell images apart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .configs import positive
from .forward import decide
from .gates import OPEN_PROB, logit
from .modes import modes_kept
from .surgery import force

FEWEST = 16  # images
TINY = 1e-6


@torch.no_grad()
def spread_gates(model: Any, images: Tensor, size: float = 1.0) -> Any:
    """Scale fresh layer gates so that what they say differs between images.

    The logits of a gate that was initialised at random differ by some thousandths between images and, where gates
    share their weights, between units: all of them pass the threshold together, and the bias, which is the same for
    all images, learns much faster than anything that looks at the image. Here each gate's hidden values are brought to
    mean 0 and deviation 1 over some images, unit by unit with all units run (as in Mishkin and Matas, "All you need is
    a good init", 2016), and then its logits to the deviation `size` around the logit that open gates start at: nearly
    all images keep, and which ones lie near the threshold depends on the image. Gates whose last layer is zero
    (``init="open"``) go on keeping for every image; only what that layer sees is scaled. The architecture is not
    changed. Channel gates are left as they are: each has weights of its own, and they learn better so.

    Args:
        model: a dynamic network with layer gates, on which nothing was trained yet but its trunk; it is changed.
        images: [B, C, H, W], at least 16 that differ, on the model's device.
        size: standard deviation of the logits.

    Returns:
        The model.

    Raises:
        ValueError: if there are no layer gates, too few images, or `size` is not above 0.
    """
    positive("size", size)
    if not hasattr(model, "layer_gates"):
        raise ValueError("spread_gates needs a model with layer gates: call add_layer_gates")
    if len(images) < FEWEST:
        raise ValueError(f"spread_gates needs at least {FEWEST} images; found {len(images)}")
    layers = list(_linear(model.layer_gates))
    for layer, seen in _outputs(model, [one for name, one in layers if name != "fc"], images).items():
        _standardise(layer, seen.mean(0), seen.std(0), 0.0, 1.0)
    for layer, seen in _outputs(model, [one for name, one in layers if name == "fc"], images).items():
        _standardise(layer, seen.mean(0), seen.std(0), logit(OPEN_PROB), size)
    return model


def _linear(part: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    for name, module in part.named_modules():
        if isinstance(module, nn.Linear) and module.bias is not None:  # not what certainty adds: it starts at zero
            yield name.split(".")[-1], module


def _outputs(model: Any, layers: Sequence[nn.Linear], images: Tensor) -> dict[nn.Linear, Tensor]:
    """What each layer gives [n, outputs], over all images and all units that use it, when every unit runs.

    Layers of gates that are not asked, because their units are settled, are left out.
    """
    seen: dict[nn.Linear, list[Tensor]] = {layer: [] for layer in layers}
    hooks = [layer.register_forward_hook(lambda layer, _, out: seen[layer].append(out.float())) for layer in layers]
    options: dict[str, Any] = {f"{part}_keep": 1.0 for part in ("layer", "channel") if hasattr(model, f"{part}_gates")}
    try:
        with _normalised_by_batch(model), force(model, **options):
            decide(model, images)
    finally:
        for hook in hooks:
            hook.remove()
    return {layer: torch.cat(values) for layer, values in seen.items() if values}


@contextmanager
def _normalised_by_batch(model: Any) -> Iterator[None]:
    """Eval mode, but for the layer gates' batch norms, which know no statistics yet; these are forgotten afterwards."""
    norms = [module for module in model.layer_gates.modules() if isinstance(module, nn.BatchNorm2d)]
    before = model.dynamic.execution, model.dynamic.budget
    model.dynamic.execution, model.dynamic.budget = "masked", None
    try:
        with modes_kept(model):
            model.eval()
            for norm in norms:
                norm.train()
            yield
    finally:
        model.dynamic.execution, model.dynamic.budget = before
        for norm in norms:
            norm.reset_running_stats()


def _standardise(layer: nn.Linear, mean: Tensor, deviation: Tensor, wanted: float, size: float) -> None:
    """Scale a layer so that outputs of a mean and a deviation get wanted ones; outputs that never vary stay."""
    varies = deviation > TINY
    scale = torch.where(varies, size / deviation.clamp_min(TINY), 1.0).to(layer.weight.dtype)
    moved = (layer.bias - mean.to(scale.dtype)) * scale + wanted
    layer.weight.mul_(scale[:, None])
    layer.bias.copy_(torch.where(varies, moved, layer.bias))
