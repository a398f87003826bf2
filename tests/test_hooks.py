"""Networks whose layers carry more than weights: hooks, pruned and parametrized weights, forwards of their own."""

import copy
from typing import Any

import pytest
import timm
import torch
from nets import randomise
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import timm_dynamic as td

SIZE = (3, 32, 32)
X = torch.randn(4, *SIZE, generator=torch.Generator().manual_seed(0))


def network(name: str = "iadi_resnet20_cifar") -> Any:
    """All layers and some channels of each image run."""
    torch.manual_seed(0)
    return randomise(timm.create_model(name, channel_gates={"init": "random"})).eval()


class Shifted(nn.Conv2d):
    """A convolution that does more than convolving."""

    def forward(self, x: Tensor) -> Tensor:
        """The convolution, and one."""
        return super().forward(x) + 1


def pruned(model: Any) -> None:
    for conv in (model.layer2[1].conv1, model.layer3[1].conv2):
        prune.random_unstructured(conv, "weight", 0.5)


def normalised(model: Any) -> None:
    for conv in (model.layer2[1].conv1, model.layer3[1].conv2):
        parametrizations.weight_norm(conv)
        with torch.no_grad():
            conv.parametrizations.weight.original0.mul_(1.5)


def shifted(model: Any) -> None:
    model.layer2[1].conv2.__class__ = model.layer3[1].conv1.__class__ = Shifted


def hooked(model: Any) -> None:
    model.layer2[1].conv1.register_forward_hook(lambda module, args, out: out + 1)
    model.layer3[1].conv2.register_forward_pre_hook(lambda module, args: (args[0] * 2,))


@pytest.mark.parametrize("change", [pruned, normalised, shifted, hooked])
def test_all_executions_give_what_the_layers_give(change: Any) -> None:
    model = network()
    plain = model(X)
    change(model)
    with torch.no_grad():
        skipped = td.decide(model, X)
        again = model(X)
        fast = td.decide(td.optimize_for_inference(model), X)
        alone = model(X)
        masked = td.set_execution(copy.deepcopy(model) if change is not pruned else model, "masked")(X)
    assert (plain - masked).abs().max() > 1e-2
    assert skipped.layer_keep.all()
    assert 0.2 < torch.cat(skipped.channel_keep, 1).float().mean() < 0.8
    for found in (skipped.logits, again, fast.logits, alone):
        torch.testing.assert_close(found, masked, rtol=1e-4, atol=1e-4)
    assert torch.equal(fast.macs, skipped.macs)


def test_pruned_weights_that_change_are_seen() -> None:
    model, other = network(), network()
    for one in (model, other):
        pruned(one)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.9)
        model(X)
        model.load_state_dict(other.state_dict())
        torch.testing.assert_close(model(X), td.set_execution(model, "masked")(X), rtol=1e-4, atol=1e-4)


def test_what_computes_weights_stays_with_the_original() -> None:
    model = network()
    pruned(model)
    other = network()
    normalised(other)
    before = other(X)
    td.optimize_for_inference(model), td.optimize_for_inference(other)
    assert prune.is_pruned(model.layer2[1].conv1)
    assert torch.equal(other(X), before)
    assert "parametrizations.weight.original0" in dict(other.layer2[1].conv1.named_parameters())


class Recorder:
    """Keeps what a layer gives, as many do."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def hook(self, module: nn.Module, args: Any, out: Tensor) -> None:
        self.seen.append(out)


def test_a_recorder_of_features_is_no_hindrance() -> None:
    """It is not copied, with all that it has seen, and sees what the optimised copy does too."""
    model, recorder = network("ddi_resnet20_cifar"), Recorder()
    model.layer1[0].conv1.register_forward_hook(recorder.hook)
    model(X)
    assert recorder.seen[0].requires_grad
    table = td.cost_table(model, SIZE)
    td.set_budget(model, fraction=0.9)
    assert td.decide(model, X).macs.max() <= 0.9 * table.dense
    count = len(recorder.seen)
    td.optimize_for_inference(model)(X)
    assert len(recorder.seen) == count + 1
