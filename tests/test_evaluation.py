"""Evaluation against sums made by hand, and interleaved timing."""

import json
import math
import time
from collections import Counter
from collections.abc import Callable

import pytest
import timm
import torch
from nets import groups_of, undecided, units_of
from torch import nn

import timm_dynamic as td
from timm_dynamic import surgery
from timm_dynamic.evaluation import Evaluation, at_exits, collect, compare, evaluate, in_points, latency, static_policy

SIZE = (3, 32, 32)
IMAGES = 40


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """A network whose gates disagree between images."""
    torch.manual_seed(0)
    model = timm.create_model("resnet20_cifar", num_classes=10)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.running_mean, std=0.2)
    td.add_layer_gates(model, td.LayerGateConfig(kind="linear", init="random"))
    td.add_channel_gates(model, td.ChannelGateConfig(init="random"))
    td.add_exits(model)
    x, _ = images()
    with torch.no_grad():
        probs = td.decide(model.eval(), x).layer_prob
        for gate, prob in zip(model.layer_gates.gates, probs.median(0).values, strict=True):
            gate.fc.bias -= torch.logit(prob)  # each gate near its own median
    return model


def images() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    scale = torch.rand(IMAGES, 1, 1, 1, generator=generator) * 2
    return torch.randn(IMAGES, *SIZE, generator=generator) * scale, torch.arange(IMAGES) % 10


def loader(batch_size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return list(zip(*(part.split(batch_size) for part in images()), strict=True))


def test_evaluation_equals_a_count_by_hand(model: nn.Module) -> None:
    found = evaluate(model, loader(16))
    x, y = images()
    singles = [td.decide(model, image[None]) for image in x]
    correct = [int(one.logits.argmax()) == int(label) for one, label in zip(singles, y, strict=True)]
    macs = [int(one.macs) for one in singles]
    keeps = [tuple(one.layer_keep[0].tolist()) for one in singles]
    dense = td.cost_table(model, SIZE).dense
    policies = Counter(keeps)
    assert len(policies) > 3, "the fixture must decide differently"
    assert found.images == IMAGES
    assert found.accuracy == pytest.approx(sum(correct) / IMAGES)
    assert found.macs == pytest.approx(sum(macs) / IMAGES)
    assert found.max_macs == max(macs)
    assert found.dense_macs == dense
    assert found.keep_ratio == pytest.approx(sum(map(sum, keeps)) / (IMAGES * len(keeps[0])))
    assert found.policies == len(policies)
    entropy = -sum(n / IMAGES * math.log2(n / IMAGES) for n in policies.values())
    assert found.policy_entropy == pytest.approx(entropy)
    rates = [sum(unit) / IMAGES for unit in zip(*keeps, strict=True)]
    assert found.keep_variance == pytest.approx(sum(p * (1 - p) for p in rates) / len(rates))
    assert list(found.unit_skip.values()) == pytest.approx([1 - p for p in rates])
    assert list(found.unit_skip) == [unit.name for unit in td.cost_table(model, SIZE).units[1:]]
    mean = sum(macs) / IMAGES
    assert found.macs_share_std == pytest.approx(math.sqrt(sum((m - mean) ** 2 for m in macs) / IMAGES) / dense)
    assert found.exit_shares == (0.0, 0.0, 1.0)


def test_batches_do_not_matter(model: nn.Module) -> None:
    assert evaluate(model, loader(7)) == evaluate(model, loader(IMAGES))


def test_a_budget_shows_in_the_exits(model: nn.Module) -> None:
    exits = td.cost_table(model, SIZE).exits
    budget = (exits[0].dearest + exits[1].dearest) // 2
    td.set_budget(model, macs=budget)
    try:
        found = evaluate(model, loader(16))
    finally:
        td.set_budget(model)
    assert found.max_macs <= budget
    assert sum(found.exit_shares) == pytest.approx(1.0)
    assert found.exit_shares[-1] < 1


def test_mode_is_given_back(model: nn.Module) -> None:
    model.train()
    try:
        evaluate(model, loader(16))
        assert model.training
    finally:
        model.eval()


def test_all_exits_in_one_walk(model: nn.Module) -> None:
    found, table = collect(model, loader(16), look=at_exits)
    for k in range(len(table.exits)):
        td.set_budget(model, exit=k)
        try:
            wanted = evaluate(model, loader(16))
        finally:
            td.set_budget(model)
        assert found["right"][:, k].double().mean().item() == wanted.accuracy
        assert found["spent"][:, k].double().mean().item() == wanted.macs
        assert int(found["spent"][:, k].max()) == wanted.max_macs


def test_a_plain_model() -> None:
    torch.manual_seed(0)
    plain = timm.create_model("resnet20_cifar", num_classes=10).eval()
    found = evaluate(plain, loader(16))
    x, y = images()
    assert found.accuracy == pytest.approx((plain(x).argmax(1) == y).double().mean().item())
    assert found.macs == found.max_macs == found.dense_macs == td.cost_table(plain, SIZE).dense
    assert (found.keep_ratio, found.channel_keep_ratio, found.policies) == (1.0, None, 1)
    assert (found.policy_entropy, found.keep_variance, found.macs_share_std) == (0.0, 0.0, 0.0)


def test_gather_is_applied_to_rows(model: nn.Module) -> None:
    def gather(rows: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: torch.cat([value, value]) for name, value in rows.items()}

    assert evaluate(model, loader(16), gather=gather).images == 2 * IMAGES


def test_to_dict_is_json(model: nn.Module) -> None:
    found = evaluate(model, loader(16))
    again = json.loads(json.dumps(found.to_dict()))
    assert Evaluation(**{**again, "exit_shares": tuple(again["exit_shares"])}) == found


def test_two_networks_image_by_image() -> None:
    first = torch.tensor([1, 1, 1, 0, 0, 1, 1, 1], dtype=torch.bool)
    second = torch.tensor([1, 0, 1, 1, 0, 0, 1, 0], dtype=torch.bool)
    found = compare(first, second)
    more = [0, 1, 0, -1, 0, 1, 0, 1]
    mean = sum(more) / 8
    spread = sum((one - mean) ** 2 for one in more) / 7
    assert found.accuracy == pytest.approx(mean)
    assert found.error == pytest.approx(math.sqrt(spread / 8))
    assert (found.first_only, found.second_only) == (3 / 8, 1 / 8)
    assert compare(second, first).accuracy == -found.accuracy
    assert compare(first, first).error == 0.0
    assert in_points(found.accuracy, 0.00351) == "+25.00 points (standard error 0.35)"
    assert in_points(-0.0342) == "-3.42 points"


def test_the_error_is_how_far_draws_stray() -> None:
    """Against many draws of images from a population in which two networks differ."""
    generator = torch.Generator().manual_seed(3)
    both = torch.rand(400, 600, generator=generator) < 0.7
    first = both | (torch.rand(400, 600, generator=generator) < 0.3)
    second = both | (torch.rand(400, 600, generator=generator) < 0.2)
    found = [compare(*pair) for pair in zip(first, second, strict=True)]
    strays = torch.tensor([one.accuracy for one in found]).std().item()
    assert sum(one.error for one in found) / len(found) == pytest.approx(strays, rel=0.1)


def test_only_the_same_images_are_compared() -> None:
    with pytest.raises(ValueError, match="the same two or more images are needed; found 3 and 2"):
        compare(torch.ones(3, dtype=torch.bool), torch.ones(2, dtype=torch.bool))
    with pytest.raises(ValueError, match="found 1 and 1"):
        compare(torch.ones(1, dtype=torch.bool), torch.ones(1, dtype=torch.bool))


def test_what_is_collected_is_summed_up(model: nn.Module) -> None:
    rows, table = collect(model, loader(16))
    assert rows["correct"].dtype == torch.bool
    assert rows["correct"].double().mean().item() == evaluate(model, loader(16)).accuracy
    assert table.dense == td.cost_table(model, SIZE).dense


def test_an_empty_loader(model: nn.Module) -> None:
    with pytest.raises(ValueError, match="no images"):
        evaluate(model, [])


def test_latency_interleaves_and_takes_medians() -> None:
    calls: list[tuple[str, float]] = []

    def model_called(name: str, seconds: float) -> Callable[[torch.Tensor], None]:
        def run(x: torch.Tensor) -> None:
            assert x.shape == (1, 3, 4, 4)
            calls.append((name, x.sum().item()))
            time.sleep(seconds)

        return run

    x = torch.arange(3.0)[:, None, None, None].expand(3, 3, 4, 4)
    found = latency({"slow": model_called("slow", 0.01), "fast": model_called("fast", 0.001)}, x, rounds=6)
    assert found["slow"] > 5
    assert found["fast"] < found["slow"] / 2
    rounds = [calls[i : i + 2] for i in range(0, len(calls), 2)]
    assert len(rounds) == 6 + 2
    for first, second in rounds:
        assert {first[0], second[0]} == {"slow", "fast"}, "both in every round"
        assert first[1] == second[1], "on the same image"
    assert len({image for _, image in calls}) == 3
    assert len({first[0] for first, _ in rounds}) == 2, "neither is always first"


def test_the_static_policy_is_the_most_common_one_at_the_same_cost() -> None:
    """Three of five images run units 1 and 2 of four; the fill goes by what is kept most often for its cost."""
    model = timm.create_model("skipnet_resnet20_cifar", layer_gates="linear").eval()
    units = 8
    keeps = torch.zeros(5, units, dtype=torch.bool)
    keeps[:3, :2] = True
    keeps[3:, 2:] = True
    table = td.cost_table(model, (3, 32, 32))
    with td.force(model, layer_keep=keeps):
        found = static_policy(model, [(torch.randn(5, 3, 32, 32), torch.zeros(5, dtype=torch.long))])
        mean = td.decide(model, torch.randn(5, 3, 32, 32)).macs.double().mean().item()
    assert found.share == 0.0, "no image was given just the pattern that was filled up"
    assert found.layers.startswith("111"), "what was kept most often is there, then what is as often kept and cheapest"
    assert found.channels == ""
    gated = [unit for unit in table.units if unit.skippable]
    own = sum(unit.branch for unit, digit in zip(gated, found.layers, strict=True) if digit == "1")
    always = table.stem + table.units[0].full + sum(unit.shortcut for unit in gated) + table.exits[-1].head
    assert found.macs == own + always
    assert abs(found.macs - mean) <= max(unit.branch for unit in gated) / 2 + 1


def test_a_static_policy_is_filled_up_with_what_is_cheap_first() -> None:
    """Four of ten images of a DenseNet go on: the six cheap layers of the last block are worth more than a dear one."""
    model = timm.create_model("skipnet_densenet40_cifar", layer_gates="linear").eval()
    keeps = torch.zeros(10, 17, dtype=torch.bool)
    keeps[:, :9] = True
    keeps[6:] = True
    with td.force(model, layer_keep=keeps):
        found = static_policy(model, [(torch.randn(10, 3, 32, 32), torch.zeros(10, dtype=torch.long))])
    assert found.layers == "1" * 9 + "00" + "1" * 6


def test_a_static_policy_is_filled_up_with_channels_in_their_order() -> None:
    """4.8 groups on the mean: to the two that most often run come those that most who go on keep, and nothing else."""
    model = timm.create_model("iadi_resnet20_cifar", layer_gates="linear", channel_gates={"mode": "nested"}).eval()
    layers = torch.zeros(5, 8, dtype=torch.bool)
    layers[:, 0] = True
    layers[2:, 1] = True
    channels = [torch.zeros(5, 4, dtype=torch.bool) for _ in range(8)]
    channels[0][:, :2] = True
    channels[0][3:] = True
    channels[1][2:, :3] = True
    channels[1][4] = True
    with td.force(model, layer_keep=layers, channel_keep=channels):
        found = static_policy(model, [(torch.randn(5, 3, 32, 32), torch.zeros(5, dtype=torch.long))])
    assert str(found) == "11000000:" + "11001110" + "0" * 24
    assert found.share == 0.2


def test_a_static_policy_with_channels() -> None:
    model = timm.create_model("iadi_resnet20_cifar", layer_gates="linear").eval()
    loader = [(torch.randn(4, 3, 32, 32), torch.zeros(4, dtype=torch.long))]
    found = static_policy(model, loader)
    assert set(found.layers + found.channels) == {"1"}
    assert found.macs == td.cost_table(model, (3, 32, 32)).dense, "gates are not counted"
    surgery.set_policy(model, *str(found).split(":"))
    model.dynamic.forced = None
    assert bool(td.decide(model, loader[0][0]).layer_keep.all())
    with pytest.raises(ValueError, match="no images"):
        static_policy(model, [])
    with pytest.raises(ValueError, match="with gates; found none"):
        static_policy(timm.create_model("resnet20_cifar"), loader)


def test_a_static_policy_runs_no_unit_without_channels() -> None:
    """What is filled up with layers that nobody gives channels stays without them; so does what an image ran so."""
    model = timm.create_model("iadi_resnet20_cifar", layer_gates="linear", channel_gates={"mode": "nested"}).eval()
    images = torch.randn(4, 3, 32, 32)
    layers = torch.zeros(4, 8, dtype=torch.bool)
    layers[:, :3] = True
    layers[0] = True
    channels = [torch.zeros(4, 4, dtype=torch.bool) for _ in range(8)]
    for place in (0, 1):
        channels[place][:] = True
    with td.force(model, layer_keep=layers, channel_keep=channels):
        found = static_policy(model, [(images, torch.zeros(4, dtype=torch.long))])
    assert str(found) == "11000000:" + "1" * 8 + "0" * 24
    assert found.share == 1.0


def test_a_static_policy_runs_no_unit_with_channels_in_one_width_alone() -> None:
    """A group of a Bottleneck's first hidden width comes with what is kept beside it in the second."""
    model = undecided("bottleneck", ("layer", "channel"), channel=td.ChannelGateConfig(group_size=8))
    x = torch.randn(10, 3, 40, 40)
    layers = torch.zeros(10, units_of(model), dtype=torch.bool)
    channels = [torch.zeros(10, count, dtype=torch.bool) for count in groups_of(model)]
    layers[:, 0] = layers[:2, -1] = layers[:, 1] = True
    for keep in channels[:2]:
        keep[:] = True
    channels[2][:] = True  # of the second unit the first width alone: it does not run
    channels[-2][:2] = True
    channels[-1][:2, :3] = True
    with td.force(model, layer_keep=layers, channel_keep=channels):
        found = static_policy(model, [(x, torch.zeros(10, dtype=torch.long))])
    widths = [part.tolist() for part in torch.tensor([int(digit) for digit in found.channels]).split(groups_of(model))]
    assert found.layers[:2] == "10"
    assert "1" in found.layers[2:]
    for unit, digit in enumerate(found.layers):
        assert all(any(width) == (digit == "1") for width in widths[2 * unit : 2 * unit + 2]), unit
