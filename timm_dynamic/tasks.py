"""What a training stage optimises: modules that map a batch to a loss and its metrics.

``forward(x, y)`` returns a dict whose ``loss`` is differentiable and whose other values are detached scalars.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from . import losses
from .costs import CostTable
from .forward import Decisions, decide
from .gates import GATES, OPEN_PROB, gate_parts, lower_logits
from .surgery import force, group_counts
from .walk import dynamic_of, table_for

TINY = 1e-6


def _accuracy(logits: Tensor, target: Tensor) -> Tensor:
    return (logits.detach().argmax(1) == target).float().mean()


def mean_over_processes(value: Tensor) -> Tensor:
    """The mean of a detached scalar over all processes."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        value = value.clone()
        dist.all_reduce(value)
        value /= dist.get_world_size()
    return value


def settled(model: nn.Module) -> bool:
    """Whether units, or their channels, are settled: then they, or their gates, take no part in training."""
    return any(part.settled for part in gate_parts(model))


def zero_of_all(model: nn.Module) -> Tensor:
    """Zero, with a gradient of zero for every trained parameter.

    The optimiser, and other processes, meet all of them, those that took no part too.
    """
    values = [_in_memory_order(p) for p in model.parameters() if p.requires_grad]
    return 0 * torch.cat(values).sum(dtype=torch.float32)


def _in_memory_order(values: Tensor) -> Tensor:
    """All values in one row, without a copy for weights that are channels-last in memory, as in training."""
    return (values.permute(0, 2, 3, 1) if values.dim() == 4 else values).reshape(-1)


def _keep_ratio(decisions: Decisions) -> Tensor:
    keep = decisions.layer_keep.detach().float()
    return keep.mean() if keep.numel() else torch.ones((), device=keep.device)


Teacher = nn.Module | Sequence[nn.Module] | None


def _hidden(teacher: Teacher) -> tuple[nn.Module, ...]:
    """Teachers in a tuple: they are not children of the task, so they are neither trained nor saved."""
    if teacher is None:
        return ()
    found = (teacher,) if isinstance(teacher, nn.Module) else tuple(teacher)
    return tuple(one.eval().requires_grad_(False) for one in found)


def _distance(teachers: tuple[nn.Module, ...], logits: Tensor, x: Tensor, weight: float) -> Tensor | float:
    """How far logits [B, classes] are from the teachers', if there are any.

    It is the mean over the teachers, whose gradient is that of the distance from the mean of their probabilities.
    """
    loss: Tensor | float = 0.0
    for teacher in teachers:
        with torch.no_grad():
            wanted = teacher(x)
        loss = loss + weight / len(teachers) * losses.distillation(logits, wanted)
    return loss


def _from_head(decisions: Decisions, weight: float) -> Tensor | float:
    """Distance of the earlier exits' logits from the head's, all exits together."""
    if not weight:
        return 0.0
    *early, head = decisions.exit_logits
    return weight * sum(losses.distillation(logits, head) for logits in early)


class BaseTask(nn.Module):
    """Cross entropy of a plain classifier.

    Args:
        model: maps [B, C, H, W] to [B, classes].
        label_smoothing: as in ``F.cross_entropy``.
        teacher: a network, or several, whose probabilities are to be followed as well; none if None.
        distill: weight of that.
    """

    def __init__(
        self,
        model: nn.Module,
        label_smoothing: float = 0.0,
        teacher: Teacher = None,
        distill: float = 1.0,
    ):
        super().__init__()
        self.model = model
        self.label_smoothing = label_smoothing
        self.teacher = _hidden(teacher)
        self.distill = distill

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """Loss and accuracy of images ``x`` [B, C, H, W] with classes ``y`` [B]."""
        logits = self.model(x).float()
        loss = F.cross_entropy(logits, y, label_smoothing=self.label_smoothing)
        loss = loss + _distance(self.teacher, logits, x, self.distill)
        if hasattr(self.model, "dynamic"):  # under a fixed policy some units take no part
            loss = loss + zero_of_all(self.model)
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
        keeps = [decisions.layer_keep, *decisions.channel_keep]
        loss = losses.shut_gates(keeps)
        if settled(self.model):
            loss = loss + zero_of_all(self.model)
        return {
            "loss": loss,
            "accuracy": _accuracy(decisions.logits, y),
            "keep_ratio": _keep_ratio(decisions),
            "skip_ratio": 1 - torch.cat([keep.detach().float() for keep in keeps], dim=1).mean(),
        }


class FollowTask(WarmupTask):
    """Gates learn to say what one policy says, while the network that was trained under it stands still.

    A network that runs the same units for every image is trained in the best of conditions. One that starts from it,
    and whose gates leave its policy only where that pays, need not be worse than it.

    Args:
        model: a dynamic network whose trunk was trained under the policy.
        layers: 1 (run) or 0 for each layer gate; empty: layer gates have no goal of their own.
        channels: 1 or 0 for each channel group of each gated hidden width; empty: channel gates have no goal.

    Raises:
        ValueError: if the model has no gates, or the policy does not fit them.
    """

    keep: Tensor

    def __init__(self, model: nn.Module, layers: str = "", channels: str = ""):
        super().__init__(model)
        self.register_buffer("keep", torch.tensor([[digit == "1" for digit in layers + channels]]), persistent=False)
        self.parts = [len(layers), *(group_counts(model) if channels else ())]
        if not self.keep.numel() or sum(self.parts) != self.keep.numel() or len(layers) not in (0, _units(model)):
            raise ValueError(
                f"a policy has a digit for each of {_units(model)} layer gates and of {sum(group_counts(model))} "
                f"channel groups; found {layers!r} and {channels!r}"
            )

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """Cross entropy of the gates' probabilities and the policy, for images ``x`` [B, C, H, W], as the loss.

        Both kinds of decisions aim at the probability that open gates start with, so that they can still change.
        ``skip_ratio`` is the share of decisions that differ from the policy.
        """
        layer_keep, *channel_keep = self.keep.split(self.parts, dim=1)
        forced: dict[str, Any] = {"layer_keep": layer_keep} if layer_keep.numel() else {}
        forced |= {"channel_keep": channel_keep} if channel_keep else {}
        said: list[Tensor] = []
        gates: Any = self.model.channel_gates if channel_keep else None
        hook = gates.register_forward_hook(lambda _, __, probs: said.extend(probs)) if gates is not None else None
        try:
            with force(self.model, **forced):
                decisions = decide(self.model, x)
        finally:
            if hook is not None:
                hook.remove()
        prob = torch.cat([*([decisions.layer_prob] if layer_keep.numel() else ()), *said], dim=1)
        loss = following(prob, self.keep.expand_as(prob)).mean()
        return {
            "loss": loss + zero_of_all(self.model),  # a policy of layers alone leaves channel gates without a gradient
            "accuracy": _accuracy(decisions.logits, y),
            "keep_ratio": _keep_ratio(decisions),
            "skip_ratio": ((prob >= 0.5) != self.keep).float().mean(),
        }


def following(prob: Tensor, keep: Tensor) -> Tensor:
    """Cross entropy of each decision and what it is to be, in nats; certain, but no more than an open gate is.

    Args:
        prob: probabilities of keeping.
        keep: bool, of the same shape.
    """
    wanted = torch.where(keep, OPEN_PROB, 1 - OPEN_PROB)
    return losses.decision_cross_entropy(prob.clamp(TINY, 1 - TINY), wanted)


def of_free_units(model: Any, values: Tensor) -> Tensor:
    """The columns [B, N'] of the gated units that are not settled: of the others nothing was decided."""
    known = model.layer_gates.settled
    return values[:, [g for g in range(values.shape[1]) if g not in known]] if known else values


def _units(model: nn.Module) -> int:
    return len(getattr(model, "layer_gates", ()))


class ExitsTask(nn.Module):
    """Exits learn to classify what a network that stands still gives them: exits without joint training.

    The trunk and the gates stay in eval mode and get no gradient: all that reaches the head keeps its accuracy.

    Args:
        model: a dynamic network with exits.
        exit_weighting: weights of the exits' cross entropies.
        distill_exits: weight of the distance of each earlier exit's logits from the head's.
    """

    def __init__(self, model: nn.Module, exit_weighting: losses.ExitWeighting = "uniform", distill_exits: float = 0.0):
        super().__init__()
        if not hasattr(model, "exits"):
            raise ValueError("this trains exits and the model has none: call add_exits")
        self.model = model
        self.exit_weighting = exit_weighting
        self.distill_exits = distill_exits

    def train(self, mode: bool = True) -> ExitsTask:
        """Sets the mode of the exits and of the root; all else stays in eval mode."""
        super().train(mode)
        for name, child in self.model.named_children():
            if name != "exits":
                child.eval()
        return self

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """Loss and metrics of images ``x`` [B, C, H, W] with classes ``y`` [B]."""
        decisions = decide(self.model, x)
        weights = losses.exit_weights(len(decisions.exit_logits), self.exit_weighting)
        loss = losses.exit_cross_entropy(decisions.exit_logits[:-1], y, weights[:-1])
        loss = loss + _from_head(decisions, self.distill_exits)
        return {"loss": loss, "accuracy": _accuracy(decisions.logits, y), "keep_ratio": _keep_ratio(decisions)}


class DynamicTask(nn.Module):
    """Cross entropies over the exits plus the cost of what ran, as a share of the dense model's cost.

    Either ``alpha`` is fixed, or the mean cost is steered to ``target``: alpha follows the distance from it, by which
    gates learn to do without what matters least. The distance is counted as a share of what is left to the gates: a
    unit of a deep network, or one of few that are not settled, is worth as much as another and costs less. Channel
    gates are small, each learns from one unit, and alpha alone is slow to move them all: where there are any, the
    biases of all gates are pushed as well, by the same amount, in proportion to the distance. The steered alpha and
    the count of batches are buffers, so that they are in checkpoints; the share they follow is the mean over all
    processes.

    Args:
        model: a dynamic network.
        dense_cost: of the stock model for one image, in the unit of `Decisions.cost` (MACs, or see `set_price`).
        steps: batches that this task will see; the target falls from 1 during the first half of them.
        alpha: fixed weight of the cost term; not together with ``target``.
        target: share of the dense cost to aim at.
        exit_weighting: weights of the exits' cross entropies.
        rate: how fast alpha follows the distance from the target, as a share of what is left to the gates.
        stiffness: direct push back on that distance.
        push: what the gates' logits are lowered by in a step, for each unit of distance, if there are channel gates.
        anneal: share of the steps during which the target falls.
        label_smoothing: as in ``F.cross_entropy``.
        teacher: a network, or several, whose probabilities the head is to follow as well; none if None.
        distill: weight of that.
        distill_exits: weight of the distance of each earlier exit's logits from the last exit's.
        exit_gradient: share of the early exits' gradient that the trunk gets (see `exits.Exits`).
        information: weight of `losses.unit_information` of the layer gates, which is to grow.
        parts: batches of one optimiser step, where gradients are accumulated: each steers by so much less.
    """

    alpha: Tensor
    seen: Tensor

    def __init__(
        self,
        model: nn.Module,
        dense_cost: float,
        steps: int,
        *,
        alpha: float | None = None,
        target: float | None = None,
        exit_weighting: losses.ExitWeighting = "uniform",
        rate: float = 0.02,
        stiffness: float = 5.0,
        push: float = 0.2,
        anneal: float = 0.5,
        label_smoothing: float = 0.0,
        teacher: Teacher = None,
        distill: float = 1.0,
        distill_exits: float = 0.0,
        exit_gradient: float = 1.0,
        information: float = 0.0,
        parts: int = 1,
    ):
        super().__init__()
        if alpha is not None and target is not None:
            raise ValueError(f"give alpha or target, not both: found alpha={alpha}, target={target}")
        if target is not None and not 0 < target <= 1:
            raise ValueError(f"target must be a share of the dense MACs in (0, 1], found {target}")
        if not 0 <= exit_gradient <= 1:
            raise ValueError(f"exit_gradient must be in [0, 1], found {exit_gradient}")
        exits: Any = getattr(model, "exits", None)
        if exits is not None:
            exits.gradient = exit_gradient
        self.model = model
        self.dense_cost = dense_cost
        self.steps = steps
        self.target = target
        self.exit_weighting = exit_weighting
        self.parts = parts
        self.rate = rate / parts
        self.stiffness = stiffness
        self.push = push / parts
        self.anneal = anneal
        self.label_smoothing = label_smoothing
        self.teacher = _hidden(teacher)
        self.distill = distill
        self.distill_exits = distill_exits
        self.information = information
        self.register_buffer("alpha", torch.tensor(alpha or 0.0))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """Loss and metrics of images ``x`` [B, C, H, W] with classes ``y`` [B]."""
        decisions = decide(self.model, x)
        share = losses.cost_share(decisions.cost - self._early_exits(x), self.dense_cost)
        weight = self._cost_weight(mean_over_processes(share.detach()), self._left_to_gates(x))
        loss = self._classify(decisions, x, y) + weight * share
        if self.information and decisions.layer_prob.shape[1]:
            loss = loss - self.information * losses.unit_information(of_free_units(self.model, decisions.layer_prob))
        if settled(self.model):
            loss = loss + zero_of_all(self.model)
        return {"loss": loss, **self._metrics(decisions, y, share, weight)}

    def _early_exits(self, x: Tensor) -> float:
        """What the exits before the head cost for an image of ``x``: evaluated in training, not without a budget."""
        return sum(one.head for one in self._table(tuple(x.shape[1:])).exits[:-1])

    def _left_to_gates(self, x: Tensor) -> float:
        """By what decisions can change the cost of an image of ``x``, as a share of the dense cost; 1 if by nothing."""
        head = self._table(tuple(x.shape[1:])).exits[-1]
        return (head.dearest - head.cheapest) / self.dense_cost or 1.0

    def _table(self, input_size: tuple[int, ...]) -> CostTable:
        """What the cost is counted by, for images of (channels, height, width)."""
        return dynamic_of(self.model).priced or table_for(self.model, input_size)

    def _metrics(self, decisions: Decisions, y: Tensor, share: Tensor, weight: Tensor) -> dict[str, Tensor]:
        return {
            "accuracy": _accuracy(decisions.logits, y),
            "keep_ratio": _keep_ratio(decisions),
            "macs_share": share.detach(),
            "alpha": weight,
        }

    def _classify(self, decisions: Decisions, x: Tensor, y: Tensor) -> Tensor:
        """Cross entropies over the exits, the head's distance from the teacher and the earlier exits' from the head."""
        loss = self._cross_entropy(decisions, y) + _distance(self.teacher, decisions.logits, x, self.distill)
        return loss + _from_head(decisions, self.distill_exits)

    def _cross_entropy(self, decisions: Decisions, y: Tensor) -> Tensor:
        weights = losses.exit_weights(len(decisions.exit_logits), self.exit_weighting)
        return losses.exit_cross_entropy(decisions.exit_logits, y, weights, self.label_smoothing)

    def _cost_weight(self, share: Tensor, left: float) -> Tensor:
        """Weight of the cost term for a batch whose mean cost is ``share``; in training it moves alpha one step.

        left: to the gates, of the dense cost.
        """
        seen = self.seen.clone()
        if self.training:
            self.seen += 1
        if self.target is None:
            return self.alpha.clone()
        # On the device, so that a GPU is not waited for, and as exact as Python's numbers.
        target = losses.annealed_target(self.target, seen.double() / self.steps, self.anneal)
        distance = (share - target) / left
        weight = losses.multiplier(self.alpha, distance, self.stiffness)
        if self.training:
            self.alpha += self.rate * distance
            for gates in self._pushed():
                lower_logits(gates, self.push * distance)
        return weight

    def _pushed(self) -> Sequence[Any]:
        """The gates whose biases are pushed towards the target: of both kinds, if there are channel gates."""
        channels = self._free_channel_gates()
        return [*channels, self.model.layer_gates] if channels and hasattr(self.model, "layer_gates") else channels

    def _free_channel_gates(self) -> list[Any]:
        gates: Any = getattr(self.model, "channel_gates", None)
        return [] if gates is None else gates.free()
