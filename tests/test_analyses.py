"""What a network does with each image: small cases counted by hand."""

from typing import Any

import nets
import pytest
import timm
import torch
from nets import undecided
from torch import Tensor

import timm_dynamic as td
from timm_dynamic.analyses import (
    Observed,
    by_class,
    denormalised,
    differences,
    easy_and_hard,
    looks,
    observe,
    rank_correlation,
    reliability,
    scale_sweep,
    shown_p,
    signed_rank,
)
from timm_dynamic.evaluation import evaluate

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.5)
SIZE = 16
PLAIN = (0.0,) * 3, (1.0,) * 3


def network(*parts: str, **configs: Any) -> Any:
    """A network whose gates are of two minds."""
    return undecided("cifar", parts or ("layer",), **configs)


def images(count: int = 12) -> list[tuple[Tensor, Tensor]]:
    x, y = nets.images(count, SIZE), torch.arange(count) % 3
    return list(zip(x.split(5), y.split(5), strict=True))


def made(skipped: list[int], classes: list[int], brightness: list[float], units: int = 9) -> Observed:
    """What an observed network would have given."""
    keep = torch.arange(units)[None] >= torch.tensor(skipped)[:, None]
    seen = torch.tensor(brightness)[:, None].expand(-1, 3)
    rows = {"layers": keep, "channels": torch.zeros(len(skipped), 0), "classes": torch.tensor(classes), "looks": seen}
    return Observed(td.cost_table(timm.create_model("resnet20_cifar"), (3, 32, 32)), rows)


# Looks ---------------------------------------------------------------------------------------------------------------


def test_brightness_and_contrast_are_those_of_the_pixels() -> None:
    pixels = torch.zeros(2, 3, 8, 8)
    pixels[0] = 0.25
    pixels[1, :, :, 4:] = 1.0  # half black, half white
    normalised = (pixels - torch.tensor(MEAN).reshape(3, 1, 1)) / torch.tensor(STD).reshape(3, 1, 1)
    flat, halves = looks(normalised, MEAN, STD)
    assert flat.tolist() == pytest.approx([0.25, 0, 0], abs=1e-6)
    assert halves[0].item() == pytest.approx(0.5)
    assert halves[1].item() == pytest.approx(torch.tensor([0.0, 1.0] * 32).std().item())
    assert halves[2] > 0
    torch.testing.assert_close(denormalised(normalised, MEAN, STD), pixels)


def test_luma_weighs_colours_and_one_channel_is_its_own() -> None:
    green = torch.zeros(1, 3, 8, 8)
    green[:, 1] = 1
    assert looks(green, *PLAIN)[0, 0].item() == pytest.approx(0.587)
    assert looks(torch.full((1, 1, 8, 8), 0.5), (0.0,), (1.0,))[0, 0].item() == pytest.approx(0.5)


def test_a_blurred_image_is_less_sharp() -> None:
    noise = torch.rand(1, 3, 16, 16)
    blurred = torch.nn.functional.avg_pool2d(noise, 3, 1, 1)
    assert looks(blurred, *PLAIN)[0, 2] < 0.5 * looks(noise, *PLAIN)[0, 2]


# Easy and hard images ------------------------------------------------------------------------------------------------


def test_groups_are_those_with_most_and_fewest_skips() -> None:
    groups = easy_and_hard(torch.tensor([3, 9, 1, 5, 7, 2, 8, 4, 6, 0]), share=0.2)
    assert groups is not None
    assert [group.tolist() for group in groups] == [[1, 6], [9, 2]]


def test_among_equals_it_is_not_the_order_of_files_that_decides() -> None:
    skipped = torch.tensor([5] * 50 + [5] * 50 + [1] * 100)  # files of class 0, then of class 1
    groups = easy_and_hard(skipped, share=0.1)
    assert groups is not None
    easy = groups[0]
    assert len(easy) == 20
    assert 0 < int((easy < 50).sum()) < 20
    assert (skipped[groups[1]] == 1).all()


def test_a_value_is_not_in_both_groups() -> None:
    assert easy_and_hard(torch.full((30,), 4)) is None
    groups = easy_and_hard(torch.tensor([7] + [4] * 40 + [2]), share=0.1)
    assert groups is not None
    assert [group.tolist() for group in groups] == [[0], [41]]


def test_groups_that_differ_are_found_and_others_are_not() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(80, generator=generator)
    skipped = [8] * 40 + [1] * 40
    bright = (noise * 0.1 + torch.tensor([0.7] * 40 + [0.3] * 40)).tolist()
    easy, hard = torch.arange(40), torch.arange(40, 80)
    found = differences(made(skipped, [0] * 80, bright), easy, hard)[0]
    assert found.effect > 0.95
    assert found.p < 1e-6
    assert found.easy == pytest.approx(torch.tensor(bright[:40]).mean().item(), abs=1e-6)
    same = differences(made(skipped, [0] * 80, noise.tolist()), easy, hard)[0]
    assert abs(same.effect - 0.5) < 0.12
    assert same.p > 0.05


def test_what_only_classes_differ_in_is_gone_within_classes() -> None:
    generator = torch.Generator().manual_seed(3)
    classes = [0] * 40 + [1] * 40
    bright = torch.randn(80, generator=generator) * 0.1 + torch.tensor([0.7] * 40 + [0.3] * 40)
    found = differences(made([8] * 40 + [1] * 40, classes, bright.tolist()), torch.arange(40), torch.arange(40, 80))[0]
    assert found.p < 1e-6
    assert found.p_in_class > 0.05


def test_p_values_are_readable() -> None:
    assert (shown_p(0.0234), shown_p(3e-5), shown_p(0.0)) == ("0.023", "3e-05", "1e-09 or less")


# What networks do ----------------------------------------------------------------------------------------------------


def test_observing_agrees_with_evaluating() -> None:
    model = network()
    found, wanted = observe(model, images(), *PLAIN), evaluate(model, images())
    assert len(found) == wanted.images == 12
    assert found.rows["correct"].double().mean().item() == wanted.accuracy
    assert found.rows["macs"].double().mean().item() == wanted.macs
    skip = 1 - found.rows["layers"].double().mean(0)
    assert dict(zip(wanted.unit_skip, skip.tolist(), strict=True)) == pytest.approx(wanted.unit_skip)
    assert wanted.policies > 1
    assert found.rows["classes"].tolist() == [k % 3 for k in range(12)]
    logits = torch.cat([model(x) for x, _ in images()])
    torch.testing.assert_close(found.rows["sure"][:, 0], logits.softmax(1).amax(1))


def test_forced_policies_give_known_skips() -> None:
    model = network("layer", "channel", channel=td.ChannelGateConfig(group_size=4))
    keep = torch.ones(1, 8)
    keep[0, [1, 4]] = 0
    groups = [torch.tensor([[1.0] + [0.0] * (len(sizes) - 1)]) for unit in model.channel_gates.sizes for sizes in unit]
    with td.force(model, layer_keep=keep, channel_keep=groups):
        found = observe(model, images(), *PLAIN)
    assert found.word == "units"
    assert found.skipped.tolist() == [2] * 12
    channels = found.channel_skip()
    assert len(channels) == 8
    assert channels["layer1.1"] == pytest.approx(1 - 4 / 16)
    assert channels["layer3.2"] == pytest.approx(1 - 4 / 64)
    assert channels["layer1.2"] != channels["layer1.2"]  # never ran: nothing is known


def test_every_exit_is_asked_about_every_image() -> None:
    model = network("layer", "exits")
    found = observe(model, images(), *PLAIN)
    assert found.rows["spent"].shape == (12, 3)
    for k in range(3):
        td.set_budget(model, exit=k)
        wanted = evaluate(model, images())
        assert found.rows["spent"][:, k].double().mean().item() == wanted.macs
        assert found.rows["right"][:, k].double().mean().item() == wanted.accuracy


def test_a_plain_network_skips_nothing() -> None:
    model = timm.create_model("resnet20_cifar", num_classes=3).eval()
    found = observe(model, images(), *PLAIN)
    assert found.word is None
    assert (found.rows["spent"][:, 0] == td.cost_table(model, (3, SIZE, SIZE)).dense).all()
    with pytest.raises(ValueError, match="no images"):
        observe(model, [], *PLAIN)


def test_scales_count_what_runs_at_each_size() -> None:
    model = network()
    small, own = scale_sweep(model, images(), scales=(0.5,))
    assert (small.scale, small.pixels, own.scale, own.pixels) == (0.5, (8, 8), 1.0, (16, 16))
    assert own.more.tolist() == [0] * 12
    assert own.accuracy == evaluate(model, images()).accuracy
    x = torch.cat([x for x, _ in images()])
    half = torch.nn.functional.interpolate(x, (8, 8), mode="bilinear", antialias=True)
    wanted = td.decide(model, half).layer_keep.sum(1)
    assert small.ran.tolist() == wanted.tolist()
    assert small.more.tolist() == (wanted - td.decide(model, x).layer_keep.sum(1)).tolist()
    assert signed_rank(own.more) == 1.0


def test_scales_of_a_network_that_only_leaves_early_count_up_to_there() -> None:
    model = network("layer", "exits")
    td.open_units(model, [unit.name for unit in td.cost_table(model, (3, SIZE, SIZE)).units if unit.skippable])
    x = torch.cat([x for x, _ in images()])
    to_head = scale_sweep(model, images(), scales=(1.0,))[0].ran
    assert to_head.unique().tolist() == [len(model.layer_gates)]  # nobody leaves

    with td.force(model, exit=0):
        sure = model(x).softmax(1).amax(1)
    model.exits.set_confidence([sure.median().item()] + [2.0] * (len(model.exits) - 1))
    found = scale_sweep(model, images(), scales=(1.0,))[0]
    wanted = td.decide(model, x).layer_keep.sum(1)
    assert found.ran.tolist() == wanted.tolist()
    assert len(found.ran.unique()) == 2  # some leave, some do not
    assert found.accuracy == evaluate(model, images()).accuracy


def test_scales_of_channel_gates_count_groups() -> None:
    model = nets.dynamic("cifar", ("channel",))
    found = scale_sweep(model, images(), scales=(1.0,))
    groups = sum(len(sizes) for unit in model.channel_gates.sizes for sizes in unit)
    assert found[0].ran.tolist() == [groups] * 12  # open gates


def test_a_shift_that_all_share_is_no_chance() -> None:
    assert signed_rank(torch.tensor([1, 2, 1, 3, 2, 1, 1, 2])) < 0.05
    assert signed_rank(torch.tensor([1, -1, 2, -2, 3, -3, 1, -1])) > 0.5


# Classes and confidence ----------------------------------------------------------------------------------------------


def test_rows_of_classes() -> None:
    observed = made([1, 2, 6, 8, 8, 8], [0, 0, 0, 2, 2, 2], [0.5] * 6)
    observed.rows["correct"] = torch.tensor([True, False, False, True, True, True])
    cat, eel = by_class(observed, ("cat", "dog", "eel"))
    assert (cat.place, cat.name, cat.images, cat.mean_skipped, cat.median_skipped) == (0, "cat", 3, 3, 2)
    assert cat.accuracy == pytest.approx(1 / 3)
    assert (eel.place, eel.name, eel.accuracy, eel.median_skipped) == (2, "eel", 1, 8)


def test_rank_correlation() -> None:
    assert rank_correlation([1, 2, 3, 4], [10, 20, 30, 45])[0] == pytest.approx(1)
    assert rank_correlation([1, 2, 3, 4], [9, 7, 5, 1])[0] == pytest.approx(-1)
    assert rank_correlation([1, 2, 3], [5, 5, 5]) == (0.0, 1.0)
    assert rank_correlation([1, 2], [1, 2]) == (0.0, 1.0)


def test_calibration_error_by_hand() -> None:
    sure = torch.tensor([0.95, 0.95, 0.95, 0.95, 0.55, 0.55])
    right = torch.tensor([True, True, True, False, True, False])
    found = reliability("head", sure, right, bins=10)
    assert [(b.images, b.accuracy) for b in found.bins] == [(2, 0.5), (4, 0.75)]
    assert found.ece == pytest.approx((2 * 0.05 + 4 * 0.2) / 6)
    assert found.accuracy == pytest.approx(4 / 6)
    assert found.confidence == pytest.approx((4 * 0.95 + 2 * 0.55) / 6)


def test_confidence_that_is_right_has_no_error() -> None:
    found = reliability("head", torch.tensor([1.0, 1.0, 0.5, 0.5]), torch.tensor([True, True, True, False]), bins=5)
    assert found.ece == 0
    assert found.bins[-1].high == 1
