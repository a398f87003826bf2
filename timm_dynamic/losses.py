"""Losses as pure functions on tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

ExitWeighting = Literal["uniform", "linear"]


def exit_weights(exits: int, weighting: ExitWeighting = "uniform") -> tuple[float, ...]:
    """Weights of the cross entropies of all exits; the head, which is the last, always weighs 1.

    Args:
        exits: number of exits, the head included.
        weighting: ``uniform`` (all 1) or ``linear`` (``k / exits`` for the k-th exit).
    """
    if weighting not in ("uniform", "linear"):
        raise ValueError(f"exit weighting must be 'uniform' or 'linear', found {weighting!r}")
    if weighting == "uniform":
        return (1.0,) * exits
    return tuple((k + 1) / exits for k in range(exits))


def exit_cross_entropy(
    exit_logits: Sequence[Tensor], target: Tensor, weights: Sequence[float], label_smoothing: float = 0.0
) -> Tensor:
    """Sum over exits of weighted cross entropies (DDI, section 3.3).

    Args:
        exit_logits: one [B, classes] per exit, the head last.
        target: [B] class indices.
        weights: one weight per exit.
        label_smoothing: as in ``F.cross_entropy``.
    """
    if len(exit_logits) != len(weights):
        raise ValueError(f"one weight per exit is needed: {len(exit_logits)} exits, {len(weights)} weights")
    terms = [
        weight * F.cross_entropy(logits.float(), target, label_smoothing=label_smoothing)
        for logits, weight in zip(exit_logits, weights, strict=True)
    ]
    return torch.stack(terms).sum()


def shut_gates(keeps: Sequence[Tensor]) -> Tensor:
    """Mean over images of the number of gates that are shut: what the warm-up drives to zero.

    The DDI supplement (section 6) wants a skip ratio of zero. ``(1 - keep) ** 2`` has the value of ``1 - keep`` where
    keep is 0 or 1, but its gradient moves only the gates that are shut: those that are open stay where they can be
    shut again, while a gradient on all of them would drive them where the sigmoid is flat.

    Args:
        keeps: straight-through keeps [B, n].
    """
    return (1 - torch.cat([keep.float() for keep in keeps], dim=1)).square().sum(1).mean()


def cost_share(cost: Tensor, dense_macs: int) -> Tensor:
    """Mean cost of a batch as a share of the dense model's MACs.

    Args:
        cost: [B] MACs per image.
        dense_macs: MACs of the stock model for one image.
    """
    return cost.float().mean() / dense_macs


def annealed_target(target: float, progress: float, anneal: float = 0.5) -> float:
    """Target share that falls linearly from 1 to ``target`` while ``progress`` goes from 0 to ``anneal``."""
    return 1 + (target - 1) * min(1.0, progress / anneal) if anneal > 0 else target


def multiplier(alpha: Tensor, share: Tensor, target: float, stiffness: float) -> Tensor:
    """Weight of the cost term that holds ``share`` at ``target``.

    The gradient of ``alpha * (share - target) + stiffness / 2 * (share - target) ** 2`` with respect to the share: an
    augmented Lagrangian, which pushes back at once and lets ``alpha`` move slowly.
    """
    return alpha + stiffness * (share - target)
