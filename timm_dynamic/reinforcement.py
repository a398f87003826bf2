"""Hybrid reinforcement learning of layer gates, as a training task (SkipNet, section 3.2)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import losses
from .forward import Decisions, decide
from .gates import sharpened
from .modes import forget_casts
from .surgery import set_execution, set_gating
from .tasks import DynamicTask, mean_over_processes, of_free_units, zero_of_all

TEMPERATURES = (1e-3, 1.0)  # of sampled decisions


class ReinforceTask(DynamicTask):
    """Layer gates trained by REINFORCE, the rest by the loss of what they let run (SkipNet, section 3.2, eq. 5, 6).

    Decisions are sampled; they carry no gradient, and the likelihood of each is pushed by what was paid from it on,
    less a baseline that does not depend on it. The paper's plain form is ``baseline="none", still=False,
    normalise=False, temperature=1, explore=None, unit_costs=None`` with a fixed ``alpha``; its reinforcement learning
    alone is ``supervised=False``.

    In inference nothing is sampled. So alpha is steered by what the unsampled policy costs, where there is one; and a
    low temperature samples near it: only gates that hardly know are tried the other way. How low it has to be differs:
    after supervised training probabilities lie close to the threshold, and at a temperature of 0.25 nearly half of the
    decisions would be drawn the other way. So it follows the share that is.

    Args:
        model: a dynamic network with layer gates.
        dense_cost: of the stock model for one image, in the unit of `Decisions.cost` (MACs, or see `set_price`).
        steps: batches that this task will see.
        unit_costs: C of each gated unit; None for 1.
        beta: weight of the loss in the reward.
        supervised: whether the network is trained by the loss as well.
        baseline: ``greedy``, what the network is paid for the same image when it does not sample (self-critical);
            ``average``, the moving average for each gate; ``none``.
        still: batch norms use their running statistics, and leave them as they are.
        normalise: divide what gates are paid by its deviation over the batch.
        entropy: weight of the entropy of the gates' decisions, which is to grow.
        temperature: of the samples, at the start; see `set_gating`.
        explore: share of the decisions that are to be drawn the other way, which the temperature then follows; None
            leaves the temperature as it is.
        **steering: `alpha` or `target` and the other options of `DynamicTask`.
    """

    average: Tensor
    temperature: Tensor

    def __init__(
        self,
        model: nn.Module,
        dense_cost: float,
        steps: int,
        *,
        unit_costs: Sequence[float] | None = None,
        beta: float = 1.0,
        supervised: bool = True,
        baseline: str = "greedy",
        still: bool = True,
        normalise: bool = True,
        entropy: float = 0.0,
        temperature: float = 0.25,
        explore: float | None = None,
        **steering: Any,
    ):
        super().__init__(model, dense_cost, steps, **steering)
        gates = len(getattr(model, "layer_gates", ()))
        if not gates:
            raise ValueError("reinforcement trains layer gates and the model has none: call add_layer_gates")
        if baseline not in ("greedy", "average", "none"):
            raise ValueError(f"baseline must be 'greedy', 'average' or 'none'; found {baseline!r}")
        if unit_costs is not None and len(unit_costs) != gates:
            raise ValueError(f"unit_costs needs one value for each of {gates} gated units; found {len(unit_costs)}")
        if explore is not None and not 0 < explore < 0.5:
            raise ValueError(f"explore must be a share of the decisions in (0, 0.5); found {explore}")
        self.unit_costs = [1.0] * gates if unit_costs is None else [float(cost) for cost in unit_costs]
        self.beta = beta
        self.supervised = supervised
        self.baseline = baseline
        self.still = still
        self.normalise = normalise
        self.entropy = entropy
        self.explore = explore
        self.register_buffer("temperature", torch.tensor(float(temperature)))
        self.register_buffer("average", torch.zeros(gates))

    def train(self, mode: bool = True) -> ReinforceTask:
        """Sets the mode; batch norms that are to be still stay in eval mode."""
        super().train(mode)
        for module in self.model.modules() if self.still else ():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """Loss and metrics of images ``x`` [B, C, H, W] with classes ``y`` [B]."""
        greedy = self._greedy(x) if self.baseline == "greedy" else None
        decisions = self._sampled(x)
        counted = self.model.dynamic.priced is None  # type: ignore[union-attr]
        share = losses.cost_share((greedy if greedy and counted else decisions).cost, self.dense_cost)
        weight = self._cost_weight(mean_over_processes(share.detach()), self._left_to_gates(x))
        paid = self._paid(decisions, y, weight)
        temperature = self.temperature.item()
        prob = self._open(sharpened(decisions.layer_prob, temperature))
        advantage = self._open(self._advantage(paid, None if greedy is None else self._paid(greedy, y, weight)))
        loss = losses.policy_gradient(self._open(decisions.layer_keep), prob, advantage)
        if self.explore is not None:
            loss = loss * temperature  # its slope by the logits does not depend on the temperature
            self._follow(prob.detach())
        if self.entropy:
            loss = loss - self.entropy * losses.gate_entropy(prob)
        if self.information:
            loss = loss - self.information * losses.unit_information(self._open(decisions.layer_prob))
        if self.supervised:
            loss = loss + self._classify(decisions, x, y)
        loss = loss + zero_of_all(self.model)
        return {"loss": loss, "paid": paid.mean(), **self._metrics(decisions, y, share, weight)}

    def _open(self, values: Tensor) -> Tensor:
        return of_free_units(self.model, values)

    def _paid(self, decisions: Decisions, y: Tensor, weight: Tensor) -> Tensor:
        """[B, gates]: what follows each decision is worth."""
        cross_entropy = F.cross_entropy(decisions.logits.detach().float(), y, reduction="none")
        costs = torch.tensor(self.unit_costs, device=y.device)
        return losses.skip_returns(cross_entropy, decisions.layer_keep, costs, weight, self.beta)

    def _advantage(self, paid: Tensor, greedy: Tensor | None) -> Tensor:
        """What was paid, less the baseline. greedy: what the policy would be paid that does not sample."""
        if greedy is not None:
            paid = paid - greedy
        elif self.baseline == "average":
            mean = mean_over_processes(paid.mean(0))
            before = torch.where(self.seen > 1, self.average, mean)
            self.average.copy_(before + 0.05 / self.parts * (mean - before))
            paid = paid - before
        return paid / paid.std().clamp_min(1e-6) if self.normalise else paid

    def _follow(self, prob: Tensor) -> None:
        """Move the temperature towards the wanted share of decisions that are drawn the other way."""
        if self.training and self.explore is not None:
            strays = mean_over_processes(torch.minimum(prob, 1 - prob).mean())
            self.temperature *= (self.explore / strays.clamp_min(1e-4)) ** (0.5 / self.parts)
            self.temperature.clamp_(*TEMPERATURES)

    def _sampled(self, x: Tensor) -> Decisions:
        """What the network does when it samples.

        Where batch norms stand still, eval computes what training does, and units that are not drawn can be left out,
        in the backward pass as well.
        """
        dynamic: Any = self.model.dynamic
        parts = any(hasattr(self.model, part) for part in ("channel_gates", "exits"))
        if self.still and not parts and dynamic.priced is None:
            with self._leaving_work_out():
                dynamic.drawing, dynamic.temperature = True, self.temperature.item()
                try:
                    return decide(self.model, x)
                finally:
                    dynamic.drawing = False
        set_gating(self.model, "sample", self.temperature.item())
        try:
            return decide(self.model, x)
        finally:
            set_gating(self.model, "hard")

    @torch.no_grad()
    def _greedy(self, x: Tensor) -> Decisions:
        """What the network does when it does not sample; leaving work out, where batch norms stand still."""
        try:
            if not self.still:
                return decide(self.model, x)
            with self._leaving_work_out():
                return decide(self.model, x)
        finally:
            forget_casts()

    @contextmanager
    def _leaving_work_out(self) -> Iterator[None]:
        """Eval mode and skipping execution for a while."""
        training, before = self.training, self.model.dynamic.execution  # type: ignore[union-attr]
        self.eval()
        set_execution(self.model, "skip")
        try:
            yield
        finally:
            set_execution(self.model, before)  # type: ignore[arg-type]
            self.train(training)
