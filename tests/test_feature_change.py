"""What leaving out layers or channels does to features."""

from itertools import pairwise

import pytest
import timm
import torch
from nets import randomise
from torch import Tensor, nn

import timm_dynamic as td
from timm_dynamic.feature_change import (
    Change,
    at_equal_cost,
    distance,
    maps,
    own_changes,
    random_changes,
    twins,
)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return randomise(timm.create_model("resnet20_cifar", num_classes=3)).eval()


@pytest.fixture(scope="module")
def images() -> list[tuple[Tensor, Tensor]]:
    x = torch.randn(12, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    y = torch.arange(12) % 3
    return list(zip(x.split(8), y.split(8), strict=True))


def test_distance() -> None:
    assert distance(torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[0.0, 5.0], [1.0, 0.0]])).tolist() == [
        pytest.approx(10**0.5 / 5),
        0,
    ]


def test_nothing_left_out_changes_nothing(model: nn.Module, images: list[tuple[Tensor, Tensor]]) -> None:
    wanted = torch.cat([model(x).argmax(1) == y for x, y in images]).double().mean().item()
    for one in random_changes(model, images, keeps=(1.0,)):
        assert one.change == (0.0, 0.0, 0.0)
        assert one.accuracy == wanted
        assert one.images == 12
        assert 1 <= one.macs_share < 1.3  # gates come on top
    open_gates = td.add_channel_gates(td.add_layer_gates(timm.create_model("resnet20_cifar", num_classes=3), "rnn"))
    found = own_changes(open_gates.eval(), images)
    assert [one.kind for one in found] == ["layers", "channels", "both"]
    assert all(one.change == (0.0, 0.0, 0.0) for one in found)


def test_shut_layers_leave_the_shortcut(model: nn.Module, images: list[tuple[Tensor, Tensor]]) -> None:
    (found,) = [one for one in random_changes(model, images, keeps=(0.0,)) if one.kind == "layers"]
    far: list[list[Tensor]] = [[], [], []]
    for x, _ in images:
        whole = less = model.act1(model.bn1(model.conv1(x)))
        for stage, blocks in enumerate((model.layer1, model.layer2, model.layer3)):
            for k, block in enumerate(blocks):
                whole = block(whole)
                if stage == k == 0:
                    less = whole  # the first unit of all has no gate
                elif block.downsample is not None:
                    less = block.downsample(less).relu()
            far[stage].append(distance(less, whole))
    assert found.change == pytest.approx([torch.cat(one).mean().item() for one in far], rel=1e-4)
    assert found.change[0] > 0.01


def test_the_less_is_kept_the_cheaper_and_the_farther(model: nn.Module, images: list[tuple[Tensor, Tensor]]) -> None:
    found = random_changes(model, images, keeps=(0.9, 0.5, 0.1))
    assert [one.kind for one in found] == ["layers"] * 3 + ["channels"] * 3
    for kind in ("layers", "channels"):
        for more, less in pairwise([one for one in found if one.kind == kind]):
            assert less.macs_share < more.macs_share
            assert less.mean_change > more.mean_change
    assert random_changes(model, images, keeps=(0.9, 0.5, 0.1)) == found  # drawn by its own generator


def test_own_decisions_are_told_apart(images: list[tuple[Tensor, Tensor]]) -> None:
    model = td.add_layer_gates(randomise(timm.create_model("resnet20_cifar", num_classes=3)), "linear")
    td.add_channel_gates(model)
    with torch.no_grad():
        model.layer_gates.gates[7].fc.bias.fill_(-9)  # layer3.2 never runs
    layers, channels, both = own_changes(model.eval(), images)
    assert layers.change[:2] == (0.0, 0.0)
    assert layers.change[2] > 0
    assert channels.change == (0.0, 0.0, 0.0)
    assert both.change == layers.change
    assert layers.macs_share < channels.macs_share
    assert model.dynamic.execution == "skip"  # it is not changed


def test_maps_are_of_the_first_stage(model: nn.Module, images: list[tuple[Tensor, Tensor]]) -> None:
    found = maps(model, images[0][0][:2], keep=1.0)
    assert list(found) == ["nothing", "layers", "channels"]
    assert found["nothing"].shape == (2, 16, 16)
    assert torch.equal(found["layers"], found["nothing"])
    assert not torch.equal(maps(model, images[0][0][:2], keep=0.3)["layers"], found["nothing"])


def test_units_without_hidden_channels_have_no_channel_twin() -> None:
    assert list(twins(timm.create_model("res2net50_26w_4s", num_classes=3))) == ["layers"]


def test_curves_are_compared_at_equal_cost() -> None:
    def change(kind: str, share: float, far: float, accuracy: float) -> Change:
        return Change(kind, 0.5, share, accuracy, (far,), 0.0, 10)

    changes = [change("layers", 0.4, 0.8, 0.2), change("layers", 0.8, 0.4, 0.6)]
    changes += [change("channels", 0.5, 0.3, 0.5), change("channels", 0.9, 0.1, 0.9)]
    found = at_equal_cost(changes)
    assert [row[0] for row in found] == [0.5, 0.8]
    assert found[0][1:] == pytest.approx((0.7, 0.3, 0.3, 0.5))
    assert found[1][1:] == pytest.approx((0.4, 0.15, 0.6, 0.8))
    assert at_equal_cost(changes[:3]) == []
