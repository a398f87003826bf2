"""Gates that learn from hindsight: what an image lost by the cheaper of two policies, and what the dearer one cost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import families, losses
from .configs import ratio
from .forward import Decisions, decide
from .modes import modes_kept
from .surgery import force
from .tasks import TINY, DynamicTask, following, mean_over_processes, zero_of_all

MOST_WEIGHT = 2.0  # nats; no image counts for more
LEAST = 1 / 8  # of the images of a DenseNet run either policy at random to the end


def without(layers: str, free: int | Sequence[int]) -> str:
    """A policy that shuts units which run in another: the last few, or those at some places.

    01101, 2 -> 01000; 01101, (1, 4) -> 00100.

    Raises:
        ValueError: if fewer units run, or none of them is named; if the unit at a place does not run.
    """
    runs = [place for place, digit in enumerate(layers) if digit == "1"]
    count = free if isinstance(free, int) else len(free)
    if not 1 <= count <= len(runs):
        raise ValueError(f"from 1 to {len(runs)} units of the policy {layers} can be left to the gates; found {count}")
    left = set(runs[-free:] if isinstance(free, int) else free)
    if idle := sorted(left - set(runs)):
        raise ValueError(
            f"only units that the policy {layers} runs, at {runs}, can be left to the gates; found those at {idle}"
        )
    return "".join("0" if place in left else digit for place, digit in enumerate(layers))


class HindsightTask(DynamicTask):
    """Each image runs one of two policies, and its gates learn which it should have been.

    The dearer policy is one that a network was trained under; the cheaper leaves out some of its units. What
    decides is whether these are worth their cost for the image: the gate of the first of them sees what the classifier
    would be given without them. For every batch both policies are run in the network as it is, without a gradient for
    it, and the gates learn by cross entropy to say the one with the smaller ``loss + alpha * cost``. What either brings
    counts as much as it differs, so that the gates learn the sign of the expected difference (cost-sensitive
    classification), with none of the variance of sampled decisions. This is ours; SkipNet's reward (eq. 5) is what is
    compared.

    The network itself learns from images under the policies that their gates say; during the first part of training
    a share of them, which falls from 1 to 0, runs either policy at random instead, so that both are learned.

    In a DenseNet it falls to an eighth. What a layer gives lies beside the rest there, and batch norms after layers
    that no image runs any more come to have the statistics of zeros, by which the dearer policy's loss grows without
    limit, and no image takes it again. A residual unit that no image runs leaves no trace.

    Channel gates, where there are any, choose under either policy, and learn as in `DynamicTask`: through what they
    keep, from the loss and from the cost of the units that their image runs.

    Args:
        model: a dynamic network with layer gates, trained under the dearer policy; it may have channel gates.
        dense_cost: of the stock model for one image, in the unit of `Decisions.cost`.
        steps: batches that this task will see.
        layers: the dearer policy, 1 (run) or 0 for each layer gate.
        free: how many of its last units are left to the gates, or which: their places among the layer gates.
        mixing: share of the steps in which that share of the images falls.
        floor: what it falls to; None: 0 in residual networks, 1/8 in DenseNets.
        stiffness: direct push back on the distance from the target, for which gates that learn slowly leave less room.
        **steering: `alpha` or `target` and the other options of `DynamicTask`.

    Raises:
        ValueError: if the network has exits or no layer gates, or the policy does not fit it; if nothing is left to the
            layer gates; if the floor is not in 0..1.
    """

    policies: Tensor

    def __init__(
        self,
        model: nn.Module,
        dense_cost: float,
        steps: int,
        *,
        layers: str,
        free: int | Sequence[int],
        mixing: float = 0.5,
        floor: float | None = None,
        stiffness: float = 0.5,
        **steering: Any,
    ):
        super().__init__(model, dense_cost, steps, stiffness=stiffness, **steering)
        gates = len(getattr(model, "layer_gates", ()))
        if not gates or hasattr(model, "exits"):
            raise ValueError("hindsight compares policies of layers: the model needs layer gates, and no exits yet")
        if len(layers) != gates or set(layers) - {"0", "1"}:
            raise ValueError(f"a policy has a zero or a one for each of {gates} layer gates; found {layers!r}")
        both = [[digit == "1" for digit in policy] for policy in (without(layers, free), layers)]
        self.mixing = mixing
        grows = any(unit.kind.grows for unit in families.units(model))
        self.floor = floor if floor is not None else LEAST if grows else 0.0
        ratio("floor", self.floor)
        self.register_buffer("policies", torch.tensor(both), persistent=False)
        self.free = (self.policies[0] != self.policies[1]).nonzero().flatten().tolist()

    def shares(self, input_size: tuple[int, int, int]) -> tuple[float, float]:
        """What the cheaper policy costs at least and the dearer at most, gates included, as shares of the dense cost.

        They differ by more than the units left to the gates where channel gates choose too.
        input_size: (channels, height, width) of an image.
        """
        table, policies = self._table(input_size), self.policies.cpu()
        cheap, dear = (
            table.price(policy[None], [keeps for unit in table.units for keeps in unit.extreme(every)]).item()
            for policy, every in zip(policies, (False, True), strict=True)
        )
        return cheap / self.dense_cost, dear / self.dense_cost

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """Loss and metrics of images ``x`` [B, C, H, W] with classes ``y`` [B].

        ``macs_share`` is what the gates' own decisions cost, ``worth`` what the dearer policy is better by.
        """
        cheap, dear = self._both(x)
        first = self.free[0]  # up to here both are the same
        goes_on = dear.layer_prob[:, first] >= 0.5
        share = losses.cost_share(torch.where(goes_on, dear.cost, cheap.cost).detach(), self.dense_cost)
        weight = self._cost_weight(mean_over_processes(share), self._left_to_gates(x))
        worth = self._worth(cheap, dear, y)
        price = weight * (dear.cost - cheap.cost).detach() / self.dense_cost
        loss = self._hindsight(cheap, worth - price) + self._hindsight(dear, worth - price)
        with force(self.model, layer_keep=self._drawn(cheap, dear, goes_on)):
            decisions = decide(self.model, x)
        loss = loss + self._classify(decisions, x, y) + zero_of_all(self.model)
        if self._free_channel_gates():
            loss = loss + weight * losses.cost_share(decisions.cost, self.dense_cost)
        return {"loss": loss, "worth": worth.mean(), **self._metrics(decisions, y, share, weight)}

    def _both(self, x: Tensor) -> tuple[Decisions, Decisions]:
        """What is decided and what comes out under either policy; only what layer gates say has a gradient."""
        with self._all_but_layer_gates_still():
            found = []
            for policy in self.policies:
                with force(self.model, layer_keep=policy[None]):
                    found.append(decide(self.model, x))
        return found[0], found[1]

    @contextmanager
    def _all_but_layer_gates_still(self) -> Iterator[None]:
        """Batch norms in eval mode, and no gradient for anything but the layer gates."""
        parts = [part for name, part in self.model.named_children() if name != "layer_gates"]
        learning = [p for part in parts for p in part.parameters() if p.requires_grad]
        for p in learning:
            p.requires_grad_(False)
        try:
            with modes_kept(self.model):
                for part in parts:
                    part.eval()
                yield
        finally:
            for p in learning:
                p.requires_grad_(True)

    def _pushed(self) -> Sequence[Any]:
        return self._free_channel_gates()

    def _worth(self, cheap: Decisions, dear: Decisions, y: Tensor) -> Tensor:
        """[B]: by how many nats the dearer policy's loss is smaller."""
        cheaper, dearer = (
            F.cross_entropy(found.logits.detach().float(), y, reduction="none") for found in (cheap, dear)
        )
        return cheaper - dearer

    def _hindsight(self, found: Decisions, advantage: Tensor) -> Tensor:
        """Cross entropy of what the gates say and the better policy; where both are the same, all images count alike.

        advantage: [B], of the dearer policy.
        """
        better = self.policies[(advantage > 0).long()]  # [B, gates]
        entropy = following(found.layer_prob, better)
        weight = advantage.abs().clamp(max=MOST_WEIGHT)
        weight = weight / weight.mean().clamp_min(TINY)
        fixed = self.policies[0] == self.policies[1]
        common = entropy[:, fixed].mean(1).sum() if fixed.any() else 0.0
        return (common + (weight * entropy[:, ~fixed].mean(1)).sum()) / len(advantage)

    def _drawn(self, cheap: Decisions, dear: Decisions, goes_on: Tensor) -> Tensor:
        """[B, gates]: the policy that each image is learned from.

        What gates say on the way that they choose; for some images either policy at random.
        """
        own = torch.where(goes_on[:, None], dear.layer_prob, cheap.layer_prob).detach() >= 0.5
        progress = int(self.seen) / self.steps
        at_random = max(self.floor, 1 - progress / self.mixing) if self.mixing > 0 else self.floor
        if not self.training or at_random == 0:
            return own
        chance = torch.rand(2, len(own), device=own.device)
        either = self.policies[(chance[0] < 0.5).long()]
        return torch.where((chance[1] < at_random)[:, None], either, own)
