"""How certain a network's own classifier is of features before the end: what layer gates may be shown."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import families
from .gates import Memory, Rest, logit
from .modes import forget_casts

MOST = 0.999  # a probability from which on certainty is 1


def certainty(model: Any, x: Tensor, rest: Rest) -> Tensor:
    """How certain the classifier is of what a unit is given, as if it and all units after it were skipped.

    A residual unit that is skipped hands its input on, a dense layer adds zeros to it, so that the classifier can be
    asked there already; on its way to it lie the transitions of a DenseNet, and their MACs are the gate's. What it says
    is the logit of its largest probability, scaled so that 1 stands for 0.999 and more, and 0 for an even chance.
    No gradient goes from here into the network: gates cannot make the classifier sure of itself. In training the head's
    dropout is at work here too.

    Args:
        model: a dynamic network.
        x: features [B, C, H, W], a unit's input.
        rest: what is still to come, see `gates.GateSite`.

    Returns:
        [B, 1] in float32, in -1..1; zeros where the network has fewer than two classes.
    """
    if families.classes(model) < 2:
        return x.new_zeros(x.shape[0], 1, dtype=torch.float32)
    with torch.no_grad():
        probs = torch.softmax(_skip(model, x, rest).float(), 1)
    if torch.is_grad_enabled():
        forget_casts()
    return torch.logit(probs.amax(1, keepdim=True), 1 - MOST) / logit(MOST)


def _skip(model: Any, x: Tensor, rest: Rest) -> Tensor:
    """Logits of features x [B, C, H, W], as if no unit were still to come."""
    family = families.family(model)
    for stage, missing in rest:
        x = family.glance(model, stage, F.pad(x, (0, 0, 0, 0, 0, missing)) if missing else x)
    return family.head(model, x)


def ask_layer_gate(model: Any, index: int, x: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
    """Run the gate of gated unit `index` on its unit's input [B, C, H, W]: probability [B], and the next state."""
    gates = model.layer_gates
    return gates(index, x, memory, certainty(model, x, gates.rest[index]) if gates.looks(index) else None)
