"""Reinforcement: the gradient against all gate patterns written out, and what stands still while sampling."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from nets import randomise
from torch import Tensor, nn

import timm_dynamic as td
from timm_dynamic import losses
from timm_dynamic.families import units
from timm_dynamic.reinforcement import ReinforceTask

UNITS = 4
ALPHA = 0.7
COSTS = [0.5, 1.0, 2.0, 0.5]
PATTERNS = [torch.tensor(pattern, dtype=torch.float32) for pattern in itertools.product((0.0, 1.0), repeat=UNITS)]


def network(gate: str = "rnn") -> nn.Module:
    """Five units, four of them gated by gates that are of two minds."""
    torch.manual_seed(0)
    model = randomise(timm.create_model("resnet18", layers=(2, 1, 1, 1), channels=(8, 8, 16, 16), num_classes=5))
    td.add_layer_gates(model, td.LayerGateConfig(kind=gate, init="random"))
    with torch.no_grad():
        for parameter in model.layer_gates.parameters():
            parameter.mul_(3)
    return model


def task(model: nn.Module, **options: Any) -> ReinforceTask:
    plain: dict[str, Any] = {"alpha": ALPHA, "unit_costs": COSTS, "normalise": False, "temperature": 1.0}
    return ReinforceTask(model, 10_000_000, 100, **{**plain, **options}).train()


def batch(images: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(images, 3, 32, 32, generator=generator), torch.randint(5, (images,), generator=generator)


@contextmanager
def sampled(pattern: Tensor) -> Iterator[None]:
    """Gates draw just this pattern for every image."""
    draws = iter(pattern)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "bernoulli", lambda prob: torch.full_like(prob, next(draws).item()))
        yield


def gradient(loss: Tensor, model: nn.Module) -> Tensor:
    parameters = list(model.parameters())
    found = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    return torch.cat([one.flatten() for one in found])


def still(model: nn.Module) -> nn.Module:
    """In training, batch norms in eval."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return model


def runs(model: nn.Module, x: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(pattern, its probability, loss under it) for every pattern, with gradients."""
    still(model)
    for pattern in PATTERNS:
        with td.force(model, layer_keep=pattern[None]):
            decisions = td.decide(model, x)
        prob = decisions.layer_prob[0]
        likelihood = torch.where(pattern.bool(), prob, 1 - prob).prod()
        yield pattern, likelihood, F.cross_entropy(decisions.logits, y)


def true_gradient(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Of the expected loss less what is paid for skipping, over all patterns (SkipNet, eq. 4)."""
    costs = torch.tensor(COSTS)
    terms = [
        likelihood * (loss - ALPHA / UNITS * ((1 - pattern) * costs).sum())
        for pattern, likelihood, loss in runs(model, x, y)
    ]
    return gradient(torch.stack(terms).sum(), model)


@pytest.mark.parametrize("baseline", ["none", "greedy", "average"])
@pytest.mark.parametrize("gate", ["rnn", "linear"])
def test_the_expected_gradient_is_that_of_all_patterns(gate: str, baseline: str) -> None:
    model = network(gate)
    x, y = batch()
    wanted = true_gradient(model, x, y)
    weights = [likelihood.item() for _, likelihood, _ in runs(model, x, y)]
    assert max(weights) < 0.6, "many patterns count"
    assert sum(weights) == pytest.approx(1.0, abs=1e-5)
    found = torch.zeros_like(wanted)
    for pattern, weight in zip(PATTERNS, weights, strict=True):
        learner = task(model, baseline=baseline)
        if baseline == "average":  # a baseline that was there before the batch
            learner.seen += 5
            learner.average.copy_(torch.tensor([-1.0, -1.2, -1.4, -1.6]))
        with sampled(pattern):
            found += weight * gradient(learner(x, y)["loss"], model)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4 * wanted.abs().max().item())
    assert wanted.norm() > 0.1


def test_sampled_gradients_are_unbiased() -> None:
    """The mean of many samples is within its standard error, where beta is 1; another beta is the paper's choice."""
    model = network()
    x, y = batch()
    wanted = true_gradient(model, x, y)
    direction = torch.randn(len(wanted), generator=torch.Generator().manual_seed(0))
    copies = (x.expand(64, -1, -1, -1), y.expand(64))
    torch.manual_seed(5)

    def samples(**options: Any) -> Tensor:
        learner = task(model, **options)
        return torch.stack([gradient(learner(*copies)["loss"], model) @ direction for _ in range(60)])

    found = samples()
    error = (found.mean() - wanted @ direction).abs() / (found.std() / len(found) ** 0.5)
    assert error < 3.5
    other = samples(beta=5.0)
    assert (other.mean() - wanted @ direction).abs() > 5 * other.std() / len(other) ** 0.5


def test_each_image_is_paid_for_its_own_decisions_only() -> None:
    loss = torch.tensor([1.0, 3.0])
    keep = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.0, 1.0, 0.0, 0.0]])
    found = losses.skip_returns(loss, keep, torch.tensor(COSTS), alpha=ALPHA, beta=2.0)
    for image in range(2):
        for gate in range(UNITS):
            saved = sum((1 - keep[image, j].item()) * COSTS[j] for j in range(gate, UNITS))
            wanted = -(2.0 * loss[image].item() - ALPHA / UNITS * saved)
            assert found[image, gate].item() == pytest.approx(wanted, rel=1e-6)
    prob = torch.full((2, UNITS), 0.3, requires_grad=True)
    advantage = torch.zeros(2, UNITS)
    advantage[1, 2] = 5.0
    losses.policy_gradient(keep, prob, advantage).backward()
    assert prob.grad is not None
    assert prob.grad[1, 2].item() == pytest.approx(5.0 / 0.7 / 2)
    assert prob.grad.count_nonzero() == 1


def test_batch_norms_stand_still_and_the_greedy_run_leaves_work_out() -> None:
    model = network()
    learner = task(model)
    td.set_execution(model, "masked")
    before = {name: value.clone() for name, value in model.named_buffers()}
    x, y = batch(6)
    learner(x, y)["loss"].backward()
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())
    assert (model.training, model.dynamic.execution, model.dynamic.gating) == (True, "masked", "hard")
    moving = task(model, still=False)
    moving(x, y)
    assert not torch.equal(model.bn1.running_mean, before["bn1.running_mean"])


@pytest.mark.parametrize("gate", ["ff1", "rnn"])
def test_gates_learn_while_the_trunk_is_frozen(gate: str) -> None:
    """What a gate has seen is not written over before its gradient is taken."""
    model = network(gate)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("layer_gates"))
    task(model)(*batch(6))["loss"].backward()
    gradients = [p.grad for p in model.layer_gates.parameters()]
    assert all(grad is not None and bool(grad.isfinite().all()) for grad in gradients)


def test_alone_it_trains_no_classifier() -> None:
    model = network()
    task(model, supervised=False)(*batch(4))["loss"].backward()
    assert model.fc.weight.grad is not None
    assert model.fc.weight.grad.abs().max() == 0
    assert model.layer_gates.get_parameter("fc.weight").grad.abs().max() > 0  # type: ignore[union-attr]
    assert model.layer1[0].conv1.weight.grad.abs().max() > 0, "what was paid moves the trunk through the gates"


def test_normalised_pay_has_the_same_scale_for_any_loss() -> None:
    model = network()
    x, y = batch(16)
    sizes = []
    for beta in (1.0, 100.0):
        torch.manual_seed(0)
        sizes.append(gradient(task(model, supervised=False, alpha=0.0, beta=beta, normalise=True)(x, y)["loss"], model))
    torch.testing.assert_close(sizes[0], sizes[1], rtol=1e-3, atol=1e-5)


def test_information_tells_variety_from_indecision() -> None:
    alike = torch.full((8, 3), 0.5)
    assert losses.unit_information(alike).item() == pytest.approx(0.0, abs=1e-6)
    assert losses.gate_entropy(alike).item() == pytest.approx(0.6931, abs=1e-4)
    halves = torch.tensor([[1.0], [0.0]]).repeat(4, 3)
    assert losses.unit_information(halves).item() == pytest.approx(0.6931, abs=1e-4)


def test_entropy_of_certain_gates_has_a_slope() -> None:
    prob = torch.tensor([[0.0, 1.0, 0.5]], requires_grad=True)
    entropy = losses.gate_entropy(prob)
    entropy.backward()
    assert entropy.item() == pytest.approx(0.6931 / 3, abs=1e-4)
    assert prob.grad.isfinite().all()


@pytest.mark.parametrize("scale", [0.05, 3.0])
def test_the_temperature_follows_the_share_that_strays(scale: float) -> None:
    """Whether gates lie close to the threshold or far from it."""
    model = network()
    with torch.no_grad():
        for parameter in model.layer_gates.parameters():
            parameter.mul_(scale)
    one, (x, y) = task(model, explore=0.1), batch(64)
    for _ in range(40):
        one(x, y)
    greedy = td.decide(model.eval(), x).layer_keep
    with torch.no_grad():
        strays = torch.stack([one._sampled(x).layer_keep.bool() != greedy for _ in range(20)])
    assert strays.double().mean().item() == pytest.approx(0.1, abs=0.04)


def test_the_temperature_stays_in_evaluation_and_unless_it_is_to_follow() -> None:
    x, y = batch(8)
    for one in (task(network(), explore=0.1).eval(), task(network())):
        before = one.temperature.clone()
        one(x, y)
        assert torch.equal(one.temperature, before)


def test_what_gates_learn_does_not_grow_as_the_temperature_falls() -> None:
    """Near the threshold the slope by the logits is that of temperature 1, for the same decisions and pay."""
    slopes = []
    for temperature in (1.0, 0.01):
        model = network()
        nn.init.zeros_(model.layer_gates.fc.weight)
        nn.init.zeros_(model.layer_gates.fc.bias)
        one, (x, y) = task(model, explore=0.1, temperature=temperature, baseline="none", still=True), batch(8)
        with sampled(PATTERNS[5]):
            loss = one(x, y)["loss"]
        slopes.append(torch.autograd.grad(loss, model.layer_gates.fc.bias)[0])
    assert slopes[0].abs() > 1e-3
    assert torch.allclose(slopes[1], slopes[0], rtol=1e-3)


def test_distillation_is_zero_for_the_teacher_itself() -> None:
    logits = torch.randn(4, 6)
    assert losses.distillation(logits, logits).item() == pytest.approx(0.0, abs=1e-6)
    other = torch.randn(4, 6)
    p, q = (other / 2).softmax(1), (logits / 2).softmax(1)
    wanted = 4 * (p * (p / q).log()).sum(1).mean()
    assert losses.distillation(logits, other).item() == pytest.approx(wanted.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"baseline": "best"}, "found 'best'"),
        ({"unit_costs": [1.0]}, "one value for each of 4 gated units; found 1"),
        ({"alpha": 1.0, "target": 0.5}, "not both"),
        ({"explore": 0.5}, r"a share of the decisions in \(0, 0.5\); found 0.5"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        task(network(), **options)


def test_reinforcement_needs_gates() -> None:
    with pytest.raises(ValueError, match="the model has none"):
        ReinforceTask(timm.create_model("resnet20_cifar"), 1, 1)


def test_nothing_is_learned_from_units_that_are_shut_for_good() -> None:
    """Nobody drew their decisions, though an RNN gate's weights are those of all units."""
    model = network()
    td.shut_units(model, [unit.name for unit in units(model)[1:]])
    options = {"supervised": False, "entropy": 0.1, "information": 0.1}
    found = task(model, **options)(*batch(6))
    assert gradient(found["loss"], model.layer_gates).abs().sum() == 0
    td.shut_units(model, [])
    found = task(model, **options)(*batch(6))
    assert gradient(found["loss"], model.layer_gates).abs().sum() > 0
