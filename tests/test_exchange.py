"""What decisions are worth: images exchange them."""

from typing import Any

import nets
import pytest
import timm
import torch
from scipy import stats
from torch import Tensor

import timm_dynamic as td
from timm_dynamic.analyses import observe
from timm_dynamic.exchange import _correct, _differs, exchange
from timm_dynamic.spreading import spread_gates

MEAN, STD = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
SIZE = 16


def network(*parts: str) -> Any:
    """A network with random weights whose gates differ between images."""
    torch.manual_seed(0)
    model = nets.randomise(timm.create_model("resnet20_cifar", num_classes=4)).eval()
    if "channels" in parts:
        td.add_channel_gates(model, td.ChannelGateConfig(init="random", group_size=4))
    if "layers" in parts:
        spread_gates(td.add_layer_gates(model, td.LayerGateConfig(init="random")), torch.randn(32, 3, SIZE, SIZE), 3.0)
    return _leaving_early(td.add_exits(model)) if "exits" in parts else model


def _leaving_early(model: Any) -> Any:
    """With exits and a confidence that some of the images reach at the first."""
    for layer in model.exits.modules():
        if isinstance(layer, torch.nn.Linear):
            torch.nn.init.normal_(layer.weight)
    sure = observe(model.eval(), batches(), MEAN, STD).rows["sure"][:, 0]
    return td.set_budget(model, confidence=sure.median().item())


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(n, 3, SIZE, SIZE, generator=generator), torch.randint(4, (n,), generator=generator))
        for n in (5, 4)
    ]


def test_a_difference_that_is_the_same_for_all_images() -> None:
    assert _differs(torch.zeros(9)) == 1.0
    assert _differs(torch.ones(9)) == 0.0


@pytest.mark.parametrize("parts", [("layers",), ("channels",), ("layers", "channels", "exits")])
def test_each_image_follows_the_decisions_of_another(parts: tuple[str, ...]) -> None:
    model = network(*parts)
    seen = observe(model, batches(), MEAN, STD)
    assert len(torch.cat([seen.rows["layers"], seen.rows["channels"]], 1).unique(dim=0)) > 1
    assert "exits" not in parts or len(seen.rows["exit"].unique()) > 1
    order = torch.tensor([3, 8, 0, 1, 7, 2, 6, 5, 4])
    plain = td.set_budget(model)
    found = _correct(plain, batches(), seen, order)
    images, classes = (torch.cat(column) for column in zip(*batches(), strict=True))
    costs = []
    for place, other in enumerate(order.tolist()):
        options: dict[str, Any] = {}
        if "layers" in parts:
            options["layer_keep"] = seen.rows["layers"][other][None]
        if "channels" in parts:
            groups = [len(sizes) for unit in plain.channel_gates.sizes for sizes in unit]
            options["channel_keep"] = list(seen.rows["channels"][other][None].split(groups, dim=1))
        if "exits" in parts:
            options["exit"] = int(seen.rows["exit"][other])
        with torch.no_grad(), td.force(plain, **options):
            decisions = td.decide(plain, images[place : place + 1])
        assert found[place] == (decisions.logits.argmax() == classes[place])
        costs.append(decisions.macs.item())
    if "exits" not in parts:  # there exits that were looked at and not taken were paid for too
        assert costs == seen.rows["macs"][order].tolist()


def test_one_policy_for_all_is_worth_nothing() -> None:
    model = network("layers")
    td.surgery.set_policy(model, "01101001")
    seen = observe(model, batches(), MEAN, STD)
    found = exchange(model, batches(), seen)
    assert found is not None
    assert (found.own, found.p) == (found.others, 1.0)


def test_a_network_without_gates_has_nothing_to_exchange() -> None:
    model = network()
    assert exchange(model, batches(), observe(model, batches(), MEAN, STD)) is None


def test_the_mean_over_draws_and_the_network_as_it_was() -> None:
    model = network("layers", "exits")
    seen = observe(model, batches(), MEAN, STD)
    found = exchange(model, batches(), seen, draws=4)
    assert found is not None
    generator = torch.Generator().manual_seed(0)
    orders = [torch.randperm(9, generator=generator) for _ in range(4)]
    plain = td.set_budget(network("layers", "exits"))
    each = [_correct(plain, batches(), seen, order).double().mean().item() for order in orders]
    assert found.others == pytest.approx(sum(each) / 4)
    assert found.own == seen.rows["correct"].double().mean().item()
    assert 0 < found.p <= 1
    own = seen.rows["correct"].double()
    others = torch.stack([_correct(plain, batches(), seen, order).double() for order in orders]).mean(0)
    gap = (own - others).numpy()
    t = gap.mean() / (gap.std(ddof=1) / len(gap) ** 0.5)
    assert found.p == pytest.approx(2 * stats.t.sf(abs(t), len(gap) - 1))
    again = observe(model, batches(), MEAN, STD)
    assert torch.equal(again.rows["exit"], seen.rows["exit"])
