"""Exits: the branch classifier, where it stands, and when an image leaves."""

import math
import re
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from nets import CLASSES, assert_near, dynamic, images, randomise, stock
from torch import Tensor, nn

import timm_dynamic as td
from timm_dynamic.exits import ExitHead, confident


def by_hand(head: ExitHead, x: Tensor, normalise: bool) -> Tensor:
    """The branch classifier (DDI, fig. 13) written out with functions."""

    def norm(x: Tensor, n: Any) -> Tensor:
        return F.relu(
            (x - n.running_mean[:, None, None])
            / (n.running_var[:, None, None] + n.eps).sqrt()
            * n.weight[:, None, None]
            + n.bias[:, None, None]
        )

    if normalise:
        x = norm(x, head.pre[0])
    for i in range(0, len(head.pools), 5):
        _, depthwise, pointwise, bn, _ = head.pools[i : i + 5]
        x = F.max_pool2d(x, 2, ceil_mode=True)
        x = F.conv2d(x, depthwise.weight, padding=1, groups=x.shape[1])
        x = norm(F.conv2d(x, pointwise.weight), bn)
    return F.linear(x.flatten(2).mean(2), head.fc.weight, head.fc.bias)


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("pools", [0, 1, 2])
@torch.no_grad()
def test_head_equals_one_written_by_hand(pools: int, normalise: bool) -> None:
    head = randomise(ExitHead(6, CLASSES, pools, normalise)).eval()
    x = torch.randn(3, 6, 9, 7)
    before = x.clone()
    assert_near(head(x), by_hand(head, x, normalise))
    assert torch.equal(x, before)  # the trunk goes on with it
    assert head.fc.in_features == 6 * 2**pools


def max_pools(head: nn.Module) -> int:
    return sum(isinstance(module, nn.MaxPool2d) for module in head.modules())


@pytest.mark.parametrize(("kind", "stages"), [("basic", 4), ("dense", 4), ("tv_dense", 4), ("cifar", 3)])
def test_stage_k_has_three_minus_k_max_pools(kind: str, stages: int) -> None:
    model = dynamic(kind, ["exits"])
    assert [max_pools(head) for head in model.exits.heads] == [max(0, 3 - k) for k in range(1, stages)]


@pytest.mark.parametrize(
    ("name", "size"), [("resnet18", 224), ("resnet50", 224), ("densenet121", 224), ("densenet100_cifar", 32)]
)
def test_exits_are_small(name: str, size: int) -> None:
    table = td.cost_table(td.add_exits(timm.create_model(name, device="meta")), (3, size, size))
    assert all(exit.head < 0.08 * table.dense for exit in table.exits)


@pytest.mark.parametrize("kind", ["basic", "bottleneck", "dense", "cifar_dense"])
@torch.no_grad()
def test_logits_are_those_of_the_head_on_the_stage_output(kind: str) -> None:
    model = dynamic(kind, ["exits"])
    x = images(2)
    levels = model.forward_intermediates(x, intermediates_only=True)[-len(model.exits) - 1 :]
    for k, head in enumerate(model.exits.heads):
        with td.force(model, exit=k):
            assert_near(model(x), by_hand(head, levels[k], normalise="dense" in kind))


def test_without_classes_there_is_no_linear_layer() -> None:
    head = ExitHead(4, 0, 1, False)
    assert isinstance(head.fc, nn.Identity)
    assert head(torch.randn(2, 4, 4, 4)).shape == (2, 8)


def test_reset_gives_a_fresh_linear_layer() -> None:
    head = ExitHead(4, 5, 1, False)
    with torch.inference_mode():
        head.reset(7, like=torch.empty(0, dtype=torch.bfloat16))
    assert (head.fc.out_features, head.fc.weight.dtype) == (7, torch.bfloat16)
    assert head.bfloat16()(torch.randn(2, 4, 4, 4, dtype=torch.bfloat16)).shape == (2, 7)
    assert not head.fc.weight.is_inference()  # could never be trained


# after -> places in the running order, in a ResNet of 2, 2, 2, 2 units
PLACES: list[tuple[Any, tuple[int, ...]]] = [
    (None, (1, 3, 5)),
    (("layer1",), (1,)),
    ((1, 3), (1, 5)),
    ((3, "layer1"), (1, 5)),
    (("layer2.0", "layer2"), (2, 3)),
    (("layer1.0", "layer4.0"), (0, 6)),
    (("layer1", 1, "layer1.1"), (1,)),
]


@pytest.mark.parametrize(("after", "places"), PLACES)
def test_places(after: Any, places: tuple[int, ...]) -> None:
    model = td.add_exits(stock("basic"), td.ExitConfig(after))
    assert model.exits.after == places
    assert [e.after for e in td.cost_table(model, (3, 40, 40)).exits] == [*places, 7]
    assert [x.shape for x in td.anytime(model, images(2))] == [(2, CLASSES)] * (len(places) + 1)


def test_places_in_a_densenet() -> None:
    model = td.add_exits(stock("dense"), {"after": ["features.denseblock2", "features.denseblock1.denselayer1"]})
    assert model.exits.after == (0, 4)


@pytest.mark.parametrize(
    ("after", "message"),
    [
        (("layer9",), "'layer9'.*layer1, layer2, layer3, layer4"),
        (("layer1.7",), "'layer1.7'"),
        ((0,), "1..3; found 0"),
        ((5,), "1..3; found 5"),
        ((4,), "head"),
        (("layer4",), "'layer4'.*head"),
        (("layer4.1",), "'layer4.1'.*head"),
    ],
)
def test_places_that_do_not_exist(after: Any, message: str) -> None:
    model = stock("basic")
    with pytest.raises(ValueError, match=message):
        td.add_exits(model, td.ExitConfig(after))
    assert not hasattr(model, "exits")


def test_confident_takes_the_largest_probability() -> None:
    logits = torch.tensor([[math.log(3.0), 0.0], [0.0, 0.0], [0.0, math.log(9.0)]])  # 0.75, 0.5, 0.9
    assert confident(logits, 0.74).tolist() == [True, False, True]
    assert confident(logits, 0.76).tolist() == [False, False, True]
    assert confident(logits, 0.5).tolist() == [True, True, True]
    assert confident(torch.zeros(2, 5), 0.0).all()
    assert confident(torch.full((1, 2), 60.0).bfloat16(), 0.5).all()


def test_errors_name_the_model() -> None:
    with pytest.raises(ValueError, match=re.escape("'resnet18'")):
        td.add_exits(stock("basic"), {"after": ["stage1"]})


def test_confidences_that_are_copied_in_place_hold_at_once() -> None:
    """As an average of weights copies them, without `load_state_dict`."""
    model, other = (timm.create_model("ddi_resnet20_cifar") for _ in range(2))
    model.exits.set_confidence([0.0, 0.0])
    average = timm.utils.ModelEmaV3(other)
    assert average.module.exits.levels == (2.0, 2.0)
    average.set(model)
    assert average.module.exits.levels == (0.0, 0.0)
    assert average.module.exits.calibrated
    x = images(4, 32)
    assert (td.decide(average.module.eval(), x).exit_index == 0).all()
    with torch.inference_mode():
        model.exits.confidence.fill_(0.5)
    assert model.exits.levels == (0.5, 0.5)


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_of_an_early_exits_gradient_the_trunk_gets_a_share_and_the_exit_all(share: float) -> None:
    def gradients(share: float) -> tuple[list[Tensor], dict[str, Tensor]]:
        model = dynamic("basic", ["exits"]).train()
        model.exits.gradient = share
        logits = model(images(4))
        logits[0].square().sum().backward()
        grads = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
        return [one.detach() for one in logits], grads

    whole_logits, whole = gradients(1.0)
    logits, found = gradients(share)
    assert all(torch.equal(one, other) for one, other in zip(logits, whole_logits, strict=True))
    assert any(name.startswith("exits.") for name in whole)
    assert "conv1.weight" in whole
    for name, gradient in whole.items():
        part = 1.0 if name.startswith("exits.") else share
        assert_near(found.get(name, torch.zeros_like(gradient)), part * gradient)


def test_the_head_gives_the_trunk_all_of_its_gradient() -> None:
    def gradient(share: float) -> Tensor:
        model = dynamic("basic", ["exits"]).train()
        model.exits.gradient = share
        model(images(4))[-1].square().sum().backward()
        return model.conv1.weight.grad

    assert_near(gradient(0.0), gradient(1.0))


@torch.no_grad()
def test_a_hidden_convolution_before_the_classifier() -> None:
    model = td.add_exits(stock("basic"), td.ExitConfig(("layer1", "layer4.0"), hidden=12)).eval()
    plain = td.add_exits(stock("basic"), td.ExitConfig(("layer1", "layer4.0")))
    first, second = model.exits.heads
    assert [head.fc.in_features for head in (first, second)] == [12, 12]
    assert not any(isinstance(layer, nn.MaxPool2d) for layer in second.pools)  # as in the last stage without it
    assert len(first.pools) == len(plain.exits.heads[0].pools) + 4
    x = torch.randn(2, second.pools[0].in_channels, 3, 5)
    depthwise, pointwise, norm = second.pools[:3]
    assert_near(second(x), second.fc(norm(pointwise(depthwise(x))).relu().mean((2, 3))))
    rows = td.cost_table(model, (3, 40, 40)).exits[1].head - td.cost_table(plain, (3, 40, 40)).exits[1].head
    channels, area = pointwise.in_channels, 2 * 2
    assert rows == area * channels * (9 + 12) + CLASSES * (12 - channels)


@pytest.mark.parametrize(("name", "after"), [("resnet20_cifar", "layer2.1"), ("densenet40_cifar", 1)])
def test_how_many_images_must_leave_for_an_exit_to_pay(name: str, after: str | int) -> None:
    """So many that the mean cost is that of the network without the exit."""
    x, size = torch.randn(4, 3, 32, 32), (3, 32, 32)
    stock = timm.create_model(name, num_classes=10)
    without = td.cost_table(stock, size).dense
    model: Any = td.add_exits(stock, td.ExitConfig((after,), hidden=32)).eval()
    (share,) = td.cost_table(model, size).break_even()
    leaving, staying = (
        td.decide(model, x).macs.double().mean().item()
        for _ in (model.exits.set_confidence([confidence]) for confidence in (0.0, 1.0))
    )
    assert leaving < without < staying
    assert share * leaving + (1 - share) * staying == pytest.approx(without)
    assert 0 < share < 0.5
    assert td.cost_table(td.strip(model), size).break_even() == ()


def test_an_exit_with_nothing_behind_it_cannot_pay() -> None:
    model: Any = timm.create_model("skipnet_resnet20_cifar", num_classes=0)
    td.add_exits(td.shut_units(model, ["layer3.2"]), td.ExitConfig(("layer3.1",), hidden=8))
    assert td.cost_table(model, (3, 32, 32)).break_even() == (math.inf,)
