"""What a training stage optimises: modules that map a batch to a loss and its metrics.

``forward(x, y)`` returns a dict whose ``loss`` is differentiable and whose other values are detached scalars.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from . import losses
from .forward import Decisions, decide

GATES = ("layer_gates", "channel_gates")


def _accuracy(logits: Tensor, target: Tensor) -> Tensor:
    return (logits.detach().argmax(1) == target).float().mean()


def _mean_over_processes(value: Tensor) -> Tensor:
    """The mean of a detached scalar over all processes."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        value = value.clone()
        dist.all_reduce(value)
        value /= dist.get_world_size()
    return value


def _keep_ratio(decisions: Decisions) -> Tensor:
    keep = decisions.layer_keep.detach().float()
    return keep.mean() if keep.numel() else torch.ones((), device=keep.device)


class BaseTask(nn.Module):
    """Cross entropy of a plain classifier.

    Args:
        model: maps [B, C, H, W] to [B, classes].
        label_smoothing: as in ``F.cross_entropy``.
    """

    def __init__(self, model: nn.Module, label_smoothing: float = 0.0):
        super().__init__()
        self.model = model
        self.label_smoothing = label_smoothing

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """Loss and accuracy of images ``x`` [B, C, H, W] with classes ``y`` [B]."""
        logits = self.model(x).float()
        loss = F.cross_entropy(logits, y, label_smoothing=self.label_smoothing)
        return {"loss": loss, "accuracy": _accuracy(logits, y)}


class WarmupTask(nn.Module):
    """Gates learn to keep everything while the trained base stands still (DDI supplement, section 6).

    The trunk's parameters get no gradient, and its batch norms stay in eval mode so that their statistics do not move.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        if not any(hasattr(model, name) for name in GATES):
            raise ValueError("warm-up trains gates and the model has none: call add_layer_gates or add_channel_gates")
        self.model = model

    def train(self, mode: bool = True) -> WarmupTask:
        """Sets the mode of the gates and of the root; the trunk stays in eval mode."""
        super().train(mode)
        for name, child in self.model.named_children():
            if name not in GATES:
                child.eval()
        return self

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """Mean number of gates that are shut for images ``x`` [B, C, H, W] as the loss."""
        decisions = decide(self.model, x)
        loss = losses.shut_gates([decisions.layer_keep, *decisions.channel_keep])
        return {
            "loss": loss,
            "accuracy": _accuracy(decisions.logits, y),
            "keep_ratio": _keep_ratio(decisions),
        }


class DynamicTask(nn.Module):
    """Cross entropies over the exits plus the cost of what ran, as a share of the dense model's MACs.

    Either ``alpha`` is fixed, or it is steered so that the mean cost meets ``target``. The steered alpha and the count
    of batches are buffers, so that they are in checkpoints; the share they follow is the mean over all processes.

    Args:
        model: a dynamic network.
        dense_macs: MACs of the stock model for one image.
        steps: batches that this task will see; the target falls from 1 during the first half of them.
        alpha: fixed weight of the cost term; not together with ``target``.
        target: share of the dense MACs to aim at.
        exit_weighting: weights of the exits' cross entropies.
        rate: how fast alpha follows the distance from the target.
        stiffness: direct push back on the distance from the target.
        anneal: share of the steps during which the target falls.
        label_smoothing: as in ``F.cross_entropy``.
    """

    alpha: Tensor
    seen: Tensor

    def __init__(
        self,
        model: nn.Module,
        dense_macs: int,
        steps: int,
        *,
        alpha: float | None = None,
        target: float | None = None,
        exit_weighting: losses.ExitWeighting = "uniform",
        rate: float = 0.02,
        stiffness: float = 5.0,
        anneal: float = 0.5,
        label_smoothing: float = 0.0,
    ):
        super().__init__()
        if alpha is not None and target is not None:
            raise ValueError(f"give alpha or target, not both: found alpha={alpha}, target={target}")
        if target is not None and not 0 < target <= 1:
            raise ValueError(f"target must be a share of the dense MACs in (0, 1], found {target}")
        self.model = model
        self.dense_macs = dense_macs
        self.steps = steps
        self.target = target
        self.exit_weighting = exit_weighting
        self.rate = rate
        self.stiffness = stiffness
        self.anneal = anneal
        self.label_smoothing = label_smoothing
        self.register_buffer("alpha", torch.tensor(alpha or 0.0))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """Loss and metrics of images ``x`` [B, C, H, W] with classes ``y`` [B]."""
        decisions = decide(self.model, x)
        share = losses.cost_share(decisions.cost, self.dense_macs)
        weight = self._cost_weight(_mean_over_processes(share.detach()))
        loss = self._cross_entropy(decisions, y) + weight * share
        return {
            "loss": loss,
            "accuracy": _accuracy(decisions.logits, y),
            "keep_ratio": _keep_ratio(decisions),
            "macs_share": share.detach(),
            "alpha": weight,
        }

    def _cross_entropy(self, decisions: Decisions, y: Tensor) -> Tensor:
        weights = losses.exit_weights(len(decisions.exit_logits), self.exit_weighting)
        return losses.exit_cross_entropy(decisions.exit_logits, y, weights, self.label_smoothing)

    def _cost_weight(self, share: Tensor) -> Tensor:
        """Weight of the cost term for a batch whose mean cost is ``share``; in training it moves alpha one step."""
        if self.target is None:
            return self.alpha.clone()
        target = losses.annealed_target(self.target, int(self.seen) / self.steps, self.anneal)
        weight = losses.multiplier(self.alpha, share, target, self.stiffness)
        if self.training:
            self.alpha += self.rate * (share - target)
            self.seen += 1
        return weight
