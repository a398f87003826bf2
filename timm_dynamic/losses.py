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


def cost_share(cost: Tensor, dense_cost: float) -> Tensor:
    """Mean cost of a batch as a share of the dense model's.

    Args:
        cost: [B] of each image, in MACs or another unit.
        dense_cost: of the stock model for one image, in the same unit.
    """
    return cost.float().mean() / dense_cost


def annealed_target(target: float, progress: Tensor, anneal: float = 0.5) -> Tensor | float:
    """Target share that falls linearly from 1 to ``target`` while ``progress`` [] goes from 0 to ``anneal``."""
    return (1 + (target - 1) * (progress / anneal).clamp(max=1)).float() if anneal > 0 else target


def multiplier(alpha: Tensor, distance: Tensor, stiffness: float) -> Tensor:
    """Weight of the cost term that brings the ``distance`` of the cost from its target to nothing.

    The gradient of ``alpha * distance + stiffness / 2 * distance ** 2`` with respect to the distance: an augmented
    Lagrangian, which pushes back at once and lets ``alpha`` move slowly.
    """
    return alpha + stiffness * distance


# Reinforcement (SkipNet, section 3.2) --------------------------------------------------------------------------------


def skip_returns(task_loss: Tensor, keep: Tensor, unit_costs: Tensor, alpha: Tensor | float, beta: float) -> Tensor:
    """What a policy is paid from each gate on (SkipNet, eq. 5 and 6): nothing for what was skipped before it.

    ``r_i = -(beta * L - alpha / N * sum_{j >= i} (1 - g_j) * C_j)``, without a gradient.

    Args:
        task_loss: [B] loss of each image.
        keep: [B, N] decisions g, 0 or 1.
        unit_costs: [N] costs C of the units.
        alpha: weight of the cost that is saved.
        beta: weight of the loss.

    Returns:
        [B, N].
    """
    saved = (1 - keep.detach().float()) * unit_costs
    to_come = saved.flip(1).cumsum(1).flip(1)
    return alpha / keep.shape[1] * to_come - beta * task_loss.detach().float()[:, None]


def decision_cross_entropy(prob: Tensor, wanted: Tensor) -> Tensor:
    """Cross entropy of each decision in nats, in float32 under autocast too: on a GPU it is refused there.

    Args:
        prob: probabilities of keeping.
        wanted: of the same shape, 0 to 1.
    """
    with torch.autocast(prob.device.type, enabled=False):
        return F.binary_cross_entropy(prob.float(), wanted.float(), reduction="none")


def log_likelihood(keep: Tensor, prob: Tensor) -> Tensor:
    """log p(g) of every decision. keep: [B, N] of 0 and 1, prob: [B, N] that it is 1 -> [B, N]."""
    return -decision_cross_entropy(prob, keep.detach())


def policy_gradient(keep: Tensor, prob: Tensor, advantage: Tensor) -> Tensor:
    """A loss whose gradient is that of REINFORCE: minus the mean over images of ``sum_i log p(g_i) * r_i``.

    Args:
        keep: [B, N] sampled decisions.
        prob: [B, N] probabilities that they were sampled with; the gradient goes through them.
        advantage: [B, N] what each was worth, taken as a constant.
    """
    return -(log_likelihood(keep, prob) * advantage.detach()).sum(1).mean()


def gate_entropy(prob: Tensor) -> Tensor:
    """Entropy of a gate's decision in nats, mean over images and gates. prob: [B, N]."""
    inside = prob.float().clamp(1e-6, 1 - 1e-6)  # where a gate is certain the slope is infinite
    return decision_cross_entropy(inside, inside).mean()


def unit_information(prob: Tensor) -> Tensor:
    """What a gate's decision says about which image it was, in nats, mean over gates: ``H(E[s]) - E[H(s)]``.

    Zero for gates that treat all images alike, ``log 2`` for gates that surely keep for one half of them.

    Args:
        prob: [B, N] probabilities s of a batch.
    """
    mean = prob.float().mean(0, keepdim=True)
    return gate_entropy(mean) - gate_entropy(prob)


def distillation(logits: Tensor, teacher: Tensor, temperature: float = 2.0) -> Tensor:
    """Kullback-Leibler divergence from a teacher, times the temperature's square (Hinton et al., 2015).

    Args:
        logits: [B, classes] of the student.
        teacher: [B, classes], taken as a constant.
        temperature: both are divided by it.
    """
    student = F.log_softmax(logits.float() / temperature, dim=1)
    wanted = F.log_softmax(teacher.detach().float() / temperature, dim=1)
    return temperature**2 * F.kl_div(student, wanted, reduction="batchmean", log_target=True)
