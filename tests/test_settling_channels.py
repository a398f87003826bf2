"""Channels that are settled: their gates are not asked, and what is left out costs nothing."""

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from nets import (
    FEW,
    MODES,
    assert_near,
    assert_same_decisions,
    assert_same_state,
    decide,
    dynamic,
    gated,
    images,
    masked,
    run,
    state_of,
    stock,
    undecided,
)
from torch import nn

import timm_dynamic as td
from timm_dynamic.hindsight import HindsightTask
from timm_dynamic.tasks import DynamicTask, WarmupTask

SIZE = (3, 40, 40)


def some(model: Any) -> dict[str, str]:
    """Channels for the first gated unit and the last: the first groups of each width, all of them, or none."""
    names = gated(model)
    first, last = (model.channel_gates.sizes[place] for place in (0, -1))
    return {
        names[0]: "".join("1" * (len(part) // 2) + "0" * (len(part) - len(part) // 2) for part in first),
        names[-1]: "".join("1" * len(part) for part in last),
    }


def settled(model: nn.Module) -> dict[str, str]:
    keeps = some(model)
    assert td.settle_channels(model, dict(reversed(keeps.items()))) is model
    return keeps


def digits_of(keeps: list[torch.Tensor]) -> torch.Tensor:
    """Decisions on channels as [B, groups]."""
    return torch.cat(keeps, 1)


def forced_as(model: Any, keeps: dict[str, str], found: td.Decisions) -> list[torch.Tensor]:
    """What was decided, with the channels of some units changed."""
    parts, width = [one.clone() for one in found.channel_keep], 0
    for name, sizes in zip(gated(model), model.channel_gates.sizes, strict=True):
        digits = keeps.get(name, "")
        for groups in map(len, sizes):
            if digits:
                parts[width][:] = torch.tensor([digit == "1" for digit in digits[:groups]])
                digits = digits[groups:]
            width += 1
    return parts


# What is run ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", [*FEW, "grouped", "cifar_dense"])
def test_settled_channels_are_those_that_everybody_computes(kind: str, mode: str) -> None:
    model, x = undecided(kind, channel=td.ChannelGateConfig(4, mode)), images(6)
    before, first = decide(model, x), td.cost_table(model, SIZE)
    keeps = settled(model)
    with td.force(model, layer_keep=1.0, channel_keep=0.0):
        found = decide(model, x)
        with masked(model):
            assert_same_decisions(decide(model, x), found)
    assert torch.equal(digits_of(found.channel_keep), digits_of(forced_as(model, keeps, found)))
    rows = td.cost_table(model, SIZE).units
    spared = [old.channel_gate - new.channel_gate for old, new in zip(first.units, rows, strict=True)]
    assert [row.name for row, less in zip(rows, spared, strict=True) if less] == list(keeps)
    assert all(not row.channel_gate for row in rows if row.name in keeps)
    logits, macs = run(model, x)
    own = decide(model, x)
    assert macs == own.macs.sum()
    assert_near(logits, own.logits)
    with masked(model):
        assert_same_decisions(decide(model, x), own)
    td.settle_channels(model, {})
    assert_same_decisions(decide(model, x), before)
    assert td.cost_table(model, SIZE) == first


@pytest.mark.parametrize("mode", MODES)
def test_they_cost_what_the_same_channels_cost_when_forced(mode: str) -> None:
    model, x = undecided("basic", ("channel",), channel=td.ChannelGateConfig(4, mode)), images(6)
    other, keeps = copy.deepcopy(model), some(model)
    gates = sum(row.channel_gate for row in td.cost_table(other, SIZE).units if row.name in keeps)
    settled(model)
    found = decide(model, x)
    with td.force(other, channel_keep=found.channel_keep):
        wanted = decide(other, x)
    assert gates > 0
    assert torch.equal(found.macs, wanted.macs - gates)
    assert_near(found.logits, wanted.logits)


def test_their_gates_are_not_run_whatever_thresholds_say() -> None:
    model, asked = undecided("dense", ("channel",)), []
    keeps = settled(model)
    model.channel_gates.threshold.fill_(2.0)
    for name, gate in zip(gated(model), model.channel_gates.gates, strict=True):
        gate.register_forward_hook(lambda *_, name=name: asked.append(name))
    model.channel_gates.register_forward_pre_hook(lambda _, args: asked.append(gated(model)[args[0]]))
    found = digits_of(decide(model, images(3)).channel_keep)
    others = [name for name in gated(model) if name not in keeps]
    assert asked == [name for name in others for _ in range(2)], "nor is anything made of what they would say"
    assert found.sum() == 3 * sum(digits.count("1") for digits in keeps.values())


@pytest.mark.parametrize("kind", FEW)
def test_the_dearest_way_and_the_cheapest_are_those_of_what_is_kept(kind: str) -> None:
    model, x = undecided(kind), images(1)
    free = td.cost_table(model, SIZE)
    settled(model)
    table = td.cost_table(model, SIZE)
    for every, wanted in ((1.0, table.exits[-1].dearest), (0.0, table.exits[-1].cheapest)):
        with td.force(model, layer_keep=every, channel_keep=every):
            assert decide(model, x).macs.item() == wanted
    assert table.dense == free.dense
    assert table.exits[-1].dearest < free.exits[-1].dearest


def test_budgets_need_not_allow_for_what_is_left_out() -> None:
    model, x = undecided("basic"), images(8)
    before = td.cost_table(model, SIZE).exits[0].dearest
    settled(model)
    least = td.cost_table(model, SIZE).exits[0].dearest
    assert least < before
    td.set_budget(model, macs=least, input_size=SIZE)
    assert decide(model, x).macs.max() <= least
    config = model.channel_gates.config
    with pytest.raises(ValueError, match="too small"):
        td.settle_channels(model, {})
    assert model.channel_gates.config == config
    assert td.cost_table(model, SIZE).exits[0].dearest == least
    assert decide(model, x).macs.max() <= least


def test_a_table_from_before_serves_a_budget_and_one_from_after_does_not() -> None:
    model = undecided("basic")
    table = td.cost_table(model, SIZE, "energy_mj")
    settled(model)
    small = td.cost_table(model, SIZE, "energy_mj")
    td.set_budget(model, energy_mj=1.001 * small.exits[0].dearest, table=table, input_size=SIZE)
    assert model.dynamic.limit.exits[0].dearest == pytest.approx(small.exits[0].dearest)
    td.set_budget(model)
    td.settle_channels(model, {})
    with pytest.raises(ValueError, match=r"channels of layer1\.1 were settled, .* make it anew"):
        td.set_budget(model, energy_mj=table.exits[-1].dearest, table=small, input_size=SIZE)
    assert td.CostTable.from_dict(small.to_dict()) == small


def test_milliseconds_are_measured_with_settled_channels() -> None:
    model = undecided("cifar", ("layer", "channel", "exits"))
    settled(model)
    table = td.cost_table(model, (3, 16, 16), "latency_ms")
    assert [row.channels is not None for row in table.units[1:]] == [n in some(model) for n in gated(model)]
    assert all(row.channel_gate == 0 for row in table.units if row.channels is not None)
    td.set_budget(model, latency_ms=table.exits[0].dearest * 1.01, table=table, input_size=(3, 16, 16))
    assert decide(model, images(2, 16)).logits.shape == (2, 10)


# Copies and files ----------------------------------------------------------------------------------------------------


def test_optimised_copies() -> None:
    model, x = undecided("basic"), images(4)
    fast = td.optimize_for_inference(model)
    keeps = settled(model)
    assert_same_decisions(decide(td.optimize_for_inference(model), x), decide(model, x))
    td.settle_channels(fast, keeps)
    assert_same_decisions(decide(fast, x), decide(model, x))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["basic", "dense", "blur_se"])
@pytest.mark.parametrize("batch", [False, True])
def test_exported_networks(kind: str, mode: str, batch: bool, tmp_path: Path) -> None:
    model, x = undecided(kind, ("layer", "channel"), channel=td.ChannelGateConfig(8, mode)), images(4, 32)
    keeps = some(model)
    if mode == "independent":  # not the first ones
        name = next(iter(keeps))
        keeps[name] = keeps[name][::-1]
    td.settle_channels(model, keeps)
    td.export_onnx(model, tmp_path / "model.onnx", (3, 32, 32), dynamic_batch=batch)
    logits, _, macs = td.onnx_runner(tmp_path / "model.onnx", threads=1)(x.numpy())
    wanted = decide(model, x)
    assert_near(torch.from_numpy(logits), wanted.logits)
    assert macs.tolist() == wanted.macs.tolist()


def test_they_are_saved_and_shown(tmp_path: Path) -> None:
    model = timm.create_model("iadi_resnet20_cifar", channel_gates={"mode": "nested"})
    td.settle_channels(model, {"layer3.1": "1100", "layer1.1": "0000"})
    td.save_pretrained(model, tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "channel gates, nested: each image decides which hidden channels are computed" in text
    assert "1 for those that are computed: `layer1.1` (0000), `layer3.1` (1100)" in text
    found = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert found.channel_gates.config == model.channel_gates.config
    assert found.channel_gates.settled == {0: ((False,) * 4,), 6: ((True, True, False, False),)}
    assert_same_decisions(decide(found.eval(), images(2, 32)), decide(model.eval(), images(2, 32)))
    known = dict.fromkeys(gated(model), "1111")
    td.settle_channels(model, known)
    td.save_pretrained(model, tmp_path)
    assert "channel gates, nested, not asked any more: all are settled" in (tmp_path / "README.md").read_text()
    for shut, chosen in (((), True), (("layer2.1",), False)):  # of a unit that no image runs no gate is asked
        td.settle_channels(model, {name: digits for name, digits in known.items() if name != "layer2.1"})
        td.save_pretrained(td.shut_units(model, shut), tmp_path)
        assert ("each image decides which hidden channels" in (tmp_path / "README.md").read_text()) == chosen


def test_a_network_that_is_cut_forgets_them() -> None:
    model = timm.create_model("iadi_resnet20_cifar")
    names = gated(model)
    td.settle_channels(model, {names[0]: "0", names[-1]: "1111"[: len(model.channel_gates.sizes[-1][0])]})
    model.channel_gates.cut(3)
    assert list(model.channel_gates.settled) == [0]
    assert model.channel_gates.config.settled == (f"{names[0]}=0",)


# Training ------------------------------------------------------------------------------------------------------------


def test_training_leaves_their_gates_alone() -> None:
    model, x, y = undecided("basic").train(), images(4), torch.arange(4)
    settled(model)
    places = list(model.channel_gates.settled)
    before = copy.deepcopy(model.channel_gates.state_dict())
    task = DynamicTask(model, td.cost_table(model, SIZE).dense, 10, target=0.3, anneal=0.0)
    task(x, y)["loss"].backward()
    moved = {}
    for name, p in model.named_parameters():
        assert p.grad is not None, "other processes meet every parameter"
        if name.startswith("channel_gates.gates."):
            place = int(name.split(".")[2])
            moved[place] = moved.get(place, False) or bool(p.grad.any())
    assert any(moved.values())
    assert not any(moved[place] for place in places)
    for name, value in model.channel_gates.state_dict().items():
        if name.endswith("fc.bias"):
            assert torch.equal(value, before[name]) == (int(name.split(".")[1]) in places), "pushed, if not settled"


def test_channels_that_are_all_settled_leave_nothing_to_learn() -> None:
    model = undecided("basic", ("channel",)).train()
    every = {n: "1" * sum(map(len, s)) for n, s in zip(gated(model), model.channel_gates.sizes, strict=True)}
    td.settle_channels(model, every)
    WarmupTask(model)(images(4), torch.arange(4))["loss"].backward()
    assert not any(bool(p.grad.any()) for p in model.channel_gates.parameters())
    loader = [(images(8, 32), torch.randint(10, (8,)))]
    with pytest.raises(ValueError, match="not all settled; found none"):
        td.calibrate(model, loader, 0.5)


def test_hindsight_knows_what_is_settled() -> None:
    model = undecided("cifar", ("layer", "channel"))
    policy = "1" * len(gated(model))
    free = HindsightTask(model, td.cost_table(model, SIZE).dense, 10, layers=policy, free=2).shares(SIZE)
    keeps = settled(model)
    found = HindsightTask(model, td.cost_table(model, SIZE).dense, 10, layers=policy, free=2).shares(SIZE)
    assert found[1] < free[1], f"the first unit keeps {next(iter(keeps.values()))} at most"


# Finding them --------------------------------------------------------------------------------------------------------


def test_steady_channels() -> None:
    model, x = undecided("basic").train(), images(24)
    own = decide(copy.deepcopy(model).eval(), x)
    before = copy.deepcopy(model.state_dict())
    shares, width = {}, 0
    for place, (name, sizes) in enumerate(zip(gated(model), model.channel_gates.sizes, strict=True)):
        runs = own.layer_keep[:, place]
        shares[name] = digits_of(own.channel_keep[width : width + len(sizes)])[runs].double().mean(0)
        width += len(sizes)
    for share in (0.5, 0.7, 0.9, 1.0):
        wanted = {
            name: "".join("01"[bool(v)] for v in one >= share)
            for name, one in shares.items()
            if bool(((one >= share) | (one <= 1 - share)).all())
        }
        assert td.steady_channels(model, x.split(7), share) == wanted
    assert len(td.steady_channels(model, [x], 0.5)) == len(gated(model))
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    keeps = settled(model)
    assert keeps.items() <= td.steady_channels(model, [x]).items()
    td.shut_units(model, gated(model)[1:2])
    assert gated(model)[1] not in td.steady_channels(model, [x], 0.5), "nobody runs it"
    with pytest.raises(ValueError, match="without images"):
        td.steady_channels(model, [])
    with pytest.raises(ValueError, match=r"share must be a number in 0\.5\.\.1; found 0\.4"):
        td.steady_channels(model, [x], 0.4)


def test_nested_channels_that_are_steady_can_be_settled() -> None:
    model, x = undecided("dense", channel=td.ChannelGateConfig(mode="nested")), images(24)
    keeps = td.steady_channels(model, [x], 0.5)
    td.settle_channels(model, keeps)
    assert len(keeps) > 0
    assert keeps.items() <= td.steady_channels(model, [x]).items(), "all images agree now"


# What cannot be settled ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "keeps", "message"),
    [
        (lambda: stock("basic"), {}, "a dynamic model is needed"),
        (lambda: dynamic("basic", ("layer",)), {}, "only channel gates choose channels; .* has none"),
        (lambda: dynamic("basic"), {"layer9.1": "1"}, "only gated units have channels to settle: .*found 'layer9.1'"),
        (lambda: dynamic("basic"), {"layer1.1": "111"}, "layer1.1 has 1 channel groups, .* found 111"),
        (lambda: dynamic("basic"), {"layer1.1": "x"}, "UNIT=DIGITS, .*found 'layer1.1=x'"),
        (lambda: dynamic("basic"), {"layer1.1": 1}, "a dict of digits by unit is needed"),
        (lambda: dynamic("basic"), ["layer1.1"], "a dict of digits by unit is needed"),
        (
            lambda: dynamic("basic", channel=td.ChannelGateConfig(mode="nested")),
            {"layer1.1": "1010"},
            "nested channel gates keep the first groups of a width; found 1010 for layer1.1",
        ),
    ],
)
def test_what_cannot_be_settled(make: Any, keeps: Any, message: str) -> None:
    model = make()
    before = state_of(model)
    with pytest.raises(ValueError, match=message):
        td.settle_channels(model, keeps)
    assert_same_state(state_of(model), before)


def test_configs_that_make_no_sense() -> None:
    for given, message in (
        ("layer1.1=1", "must be a tuple of strings UNIT=DIGITS"),
        (("layer1.1",), "UNIT=DIGITS, .*found 'layer1.1'"),
        ((1,), "UNIT=DIGITS, .*found 1"),
        (("a=1", "a=0"), "must name each unit once"),
    ):
        with pytest.raises(ValueError, match=message):
            td.ChannelGateConfig(settled=given)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="only gated units have channels to settle"):
        td.add_channel_gates(stock("basic"), {"settled": ["layer9=1"]})
