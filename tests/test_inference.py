"""The optimised copy makes the same decisions."""

import copy
from typing import Any

import pytest
import timm
import torch
from nets import SIZE, assert_near, dynamic, images, randomise, run, stock
from torch import nn

import timm_dynamic as td
from timm_dynamic import units

NAMES = ["ddi_resnet20_cifar", "ddi_densenet100_cifar", "skipnet_resnet18", "iadi_resnet26d", "skipnet_resnet26t"]


def _model(name: str) -> nn.Module:
    small = {"block_config": (3, 2, 2)} if "densenet" in name else {}
    model = timm.create_model(name, num_classes=10, layer_gates={"init": "random"}, **small).eval()
    randomise(model)
    return model


@pytest.mark.parametrize("name", NAMES)
def test_same_decisions_same_logits_same_macs(name: str) -> None:
    model = _model(name)
    before = copy.deepcopy(model.state_dict())
    fast = td.optimize_for_inference(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    x = torch.randn(8, 3, 48, 48)
    for keep in (None, torch.rand(8, len(model.layer_gates)) < 0.5):
        with torch.no_grad(), td.force(model, layer_keep=keep), td.force(fast, layer_keep=keep):
            wanted, found = td.decide(model, x), td.decide(fast, x)
        assert torch.equal(wanted.layer_keep, found.layer_keep)
        assert torch.equal(wanted.macs, found.macs)
        torch.testing.assert_close(found.logits, wanted.logits, rtol=1e-4, atol=1e-4 * wanted.logits.abs().max().item())


def test_what_is_folded() -> None:
    fast = td.optimize_for_inference(_model("ddi_resnet20_cifar"))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fast.modules())
    assert not any(parameter.requires_grad for parameter in fast.parameters())
    assert fast.layer1[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("kind", ["dense", "dense_blur", "cifar_dense", "tv_dense"])
def test_transitions_pool_before_they_multiply(kind: str) -> None:
    """Those that blur cannot: their filters are as many as their channels."""
    model, x = stock(kind), images(2)
    fast = td.optimize_for_inference(model)
    assert_near(run(fast, x)[0], run(model, x)[0])
    side, saved = SIZE if kind == "cifar_dense" else SIZE // 4, 0
    for cost in td.cost_table(model, (3, SIZE, SIZE)).leave:
        saved += cost - cost // side**2 * (side // 2) ** 2
        side //= 2
    assert saved > 0
    assert run(model, x)[1] - run(fast, x)[1] == (0 if kind == "dense_blur" else 2 * saved)


def test_a_transition_with_hooks_stays_as_it_is() -> None:
    model: Any = stock("cifar_dense")
    seen: list[int] = []
    model.features.transition1.conv.register_forward_hook(lambda module, args, out: seen.append(out.shape[-1]))
    td.optimize_for_inference(model)(images(2))
    assert seen == [SIZE]


def test_budgets_and_calibration_come_along() -> None:
    model = _model("ddi_resnet20_cifar")
    model.layer_gates.threshold.fill_(0.45)
    td.set_budget(model, fraction=0.5)
    fast = td.optimize_for_inference(model)
    x = torch.randn(8, 3, 32, 32)
    assert torch.equal(td.decide(model, x).exit_index, td.decide(fast, x).exit_index)
    assert torch.equal(td.decide(model, x).layer_keep, td.decide(fast, x).layer_keep)


def test_an_optimised_gate_follows_its_weights() -> None:
    """What it has at hand is looked up again when the copy is cast, copied or given other weights."""
    fast, other, x = _optimised(0), _optimised(1), torch.randn(4, 3, 32, 32)

    def prob(model: nn.Module, images: torch.Tensor = x) -> torch.Tensor:
        with torch.no_grad():
            return td.decide(model, images).layer_prob

    before, wanted = prob(fast), prob(other)
    assert not torch.allclose(before, wanted)
    for assign in (False, True):
        copied = copy.deepcopy(fast)
        assert torch.equal(prob(copied), before)
        copied.load_state_dict({name: value.clone() for name, value in other.state_dict().items()}, assign=assign)
        assert torch.equal(prob(copied), wanted)
        assert torch.equal(prob(fast), before)
    double = copy.deepcopy(fast).double()
    torch.testing.assert_close(prob(double, x.double()), before, rtol=1e-4, atol=1e-5)


def _optimised(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return td.optimize_for_inference(_model("skipnet_resnet20_cifar"))


def test_slices_are_forgotten_when_they_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "MOST_BYTES", 3000)
    slices = units.Slices()
    for k in range(10):
        slices.keep(k, torch.zeros(200), torch.zeros(50))
        assert slices.bytes == 1000 * len(slices) <= 3000
    assert set(slices) == {9}


def test_slices_made_in_inference_mode_serve_where_gradients_are() -> None:
    model = dynamic("basic", ("channel",))
    with torch.no_grad():
        for gate in model.channel_gates.gates:
            gate.fc.bias.fill_(-1.0)
            gate.fc.bias[0] = 1.0  # some groups, not all
    fast, x = td.optimize_for_inference(model), images(1)
    with torch.inference_mode():
        before = fast(x)
    assert fast.dynamic.slices, "patterns must have been met"
    after = fast(x.requires_grad_())
    assert_near(after.detach(), before)
    after.sum().backward()
    assert x.grad is not None


def test_remembered_slices_follow_the_weights() -> None:
    """Whatever becomes of the copy, slices of its former weights are not used."""
    fast = td.optimize_for_inference(_model("ddi_resnet20_cifar"))
    x = torch.randn(2, 3, 32, 32)
    keeps = [torch.rand(2, len(sizes)) < 0.5 for unit in fast.channel_gates.sizes for sizes in unit]
    with torch.no_grad(), td.force(fast, layer_keep=1.0, channel_keep=keeps):
        before = fast(x)
        assert fast.dynamic.slices
        assert torch.equal(fast(x), before)
        other = copy.deepcopy(fast)
        other.load_state_dict({key: 2 * value for key, value in fast.state_dict().items()})
        assert torch.equal(fast(x), before)
        changed = other(x)
        other.dynamic.slices.clear()
        assert torch.equal(other(x), changed)
        assert not torch.allclose(changed, before)
        assert copy.deepcopy(fast).double()(x.double()).dtype == torch.float64


@pytest.mark.parametrize("name", ["resnet20_cifar", "resnet26d"])
def test_a_stock_model_is_folded_too(name: str) -> None:
    model = randomise(timm.create_model(name, num_classes=10)).eval()
    fast = td.optimize_for_inference(model)
    assert type(fast) is type(model)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fast.modules())
    x = torch.randn(2, 3, 48, 48)
    torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-4 * model(x).abs().max().item())


def test_another_kind_of_model_is_refused() -> None:
    with pytest.raises(ValueError, match="no units to gate in 'mobilenetv3_small_050'"):
        td.optimize_for_inference(timm.create_model("mobilenetv3_small_050"))
