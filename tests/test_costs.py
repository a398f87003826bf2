"""Costs: equal to counts by hand, and to what torch's own counter sees being run."""

import copy
from typing import Any

import pytest
import timm
import torch
from nets import (
    FEW,
    KINDS,
    LAYER_KINDS,
    MODES,
    SIZE,
    STOCK,
    add,
    assert_same_state,
    decide,
    dynamic,
    images,
    masked,
    mixed,
    run,
    state_of,
    stock,
    undecided,
)
from torch import nn
from torch.nn.utils import prune
from torch.utils.flop_counter import FlopCounterMode

import timm_dynamic as td
from timm_dynamic.costs import CostTable, UnitCost

SMALL = (3, 40, 40)


def table(name: str, parts: list[str], size: int = 224, **configs: Any) -> CostTable:
    return td.cost_table(add(timm.create_model(name, device="meta"), parts, **configs), (3, size, size))


def unit(name: str, parts: list[str], where: str, **configs: Any) -> UnitCost:
    return next(row for row in table(name, parts, **configs).units if row.name == where)


# By hand -------------------------------------------------------------------------------------------------------------


def test_basic_block() -> None:
    row = unit("resnet18", [], "layer1.1")
    assert (row.full, row.shortcut) == (2 * 9 * 64 * 64 * 56 * 56, 0)
    change = unit("resnet18", [], "layer2.0")
    assert change.branch == 9 * 64 * 128 * 28 * 28 + 9 * 128 * 128 * 28 * 28
    assert change.shortcut == 64 * 128 * 28 * 28


def test_bottleneck() -> None:
    row = unit("resnet50", [], "layer3.2")
    assert row.full == (1024 * 256 + 9 * 256 * 256 + 256 * 1024) * 14 * 14
    change = unit("resnet50", [], "layer3.0")
    assert change.branch == 512 * 256 * 28 * 28 + (9 * 256 * 256 + 256 * 1024) * 14 * 14
    assert change.shortcut == 512 * 1024 * 14 * 14


def test_grouped_bottleneck() -> None:
    row = unit("resnext50_32x4d", [], "layer1.1")
    assert row.full == (256 * 128 + 9 * 128 * 128 // 32 + 128 * 256) * 56 * 56


def test_dense_layer_and_transition() -> None:
    costs = table("densenet121", [])
    assert costs.units[2].full == (128 * 128 + 9 * 128 * 32) * 56 * 56  # 64 + 2 * 32 channels in
    assert costs.leave == (256 * 128 * 56 * 56, 512 * 256 * 28 * 28, 1024 * 512 * 14 * 14, 0)


def test_whole_resnet18() -> None:
    costs = table("resnet18", ["exits"])
    stem = 3 * 64 * 49 * 112 * 112
    stages = [(64, 56), (128, 28), (256, 14), (512, 7)]
    blocks = sum((4 * 9 * c * c - (9 * c * c // 2 if c > 64 else 0)) * s * s for c, s in stages)
    shortcuts = sum(c * c // 2 * s * s for c, s in stages[1:])
    assert costs.stem == stem
    assert costs.dense == stem + blocks + shortcuts + 512 * 1000


@pytest.mark.parametrize(("kind", "share"), [("ff1", 0.15625), ("ff2", 0.125)])
def test_feed_forward_gates_have_the_papers_share_of_a_basic_block(kind: str, share: float) -> None:
    row = unit("resnet18", ["layer"], "layer1.1", layer=kind)
    assert row.layer_gate - 64 == share * row.full  # but for the linear layer
    change = unit("resnet18", ["layer"], "layer2.0", layer=kind)
    assert (change.layer_gate - 64) / change.branch == pytest.approx({"ff1": 0.2083, "ff2": 0.1667}[kind], abs=1e-4)


@pytest.mark.parametrize("name", ["resnet50", "wide_resnet50_2", "resnext50_32x4d"])
@pytest.mark.parametrize(("kind", "share"), [("ff1", 0.15625), ("ff2", 0.125)])
def test_feed_forward_gates_stay_near_that_share_in_bottlenecks(name: str, kind: str, share: float) -> None:
    for row in table(name, ["layer"], 256, layer=kind).units[1:]:  # 224 ends in 7 x 7, which strides round up
        assert row.layer_gate / row.branch == pytest.approx(share, rel=0.1)


def test_recurrent_and_linear_gates() -> None:
    row = unit("resnet18", ["layer"], "layer2.1", layer="rnn")
    assert row.layer_gate == 128 * 10 + 4 * 10 * (10 + 10) + 10  # projection, LSTM cell, linear
    assert unit("resnet18", ["layer"], "layer2.1", layer="linear").layer_gate == 128
    cifar = table("resnet110_cifar", ["layer"], 32, layer="rnn")
    assert max(r.layer_gate / r.full for r in cifar.units) < 0.0004  # the paper's 0.04 %


def test_dense_channel_gate_is_an_eighth_of_the_layer() -> None:
    row = unit("densenet121", ["channel"], "features.denseblock1.denselayer2")
    assert row.channel_gate - 32 * 8 == 0.125 * row.full  # but for the linear layer to 128 / 16 groups


def test_residual_channel_gate_is_small() -> None:
    row = unit("resnet50", ["channel"], "layer1.1")
    assert row.channel_gate == 256 * 16 + 16 * (4 + 4)
    for name in ("resnet18", "resnet50"):
        assert all(r.channel_gate < 0.01 * r.full for r in table(name, ["channel"]).units)


def test_bottleneck_with_channel_masks() -> None:
    row = unit("resnet50", ["layer", "channel"], "layer2.0")  # 256 in, hidden 128, 128 in 8 groups of 16 each
    first = torch.tensor([[1, 1, 1, 0, 0, 0, 0, 0], [0] * 8, [1] * 8]).bool()
    second = torch.tensor([[1, 0, 0, 0, 0, 0, 0, 0], [1] * 8, [1] * 8]).bool()
    keep = torch.tensor([True, True, False])
    outside = row.layer_gate + row.shortcut
    wanted = [
        256 * 48 * 56**2 + (9 * 48 * 16 + 16 * 512) * 28**2 + row.channel_gate + outside,
        128 * 512 * 28**2 + row.channel_gate + outside,  # from no channels to all: only the last convolution
        outside,
    ]
    price = row.price(keep, [first, second])
    assert price.dtype == torch.int64
    assert price.tolist() == wanted
    assert row.price(keep.float(), [first.float(), second.float()]).tolist() == wanted


def test_grouped_convolution_runs_groups_kept_on_both_sides() -> None:
    row = unit("resnext50_32x4d", ["channel"], "layer1.1")  # 128 hidden channels in 32 groups of 4: 8 gate groups of 16
    first, second = torch.tensor([[1, 1, 0, 0, 1, 0, 0, 0]]).bool(), torch.tensor([[1, 0, 1, 0, 1, 0, 0, 0]]).bool()
    wanted = (256 * 48 + 9 * 4 * 4 * 8 + 48 * 256) * 56**2  # two gate groups, of four convolution groups each
    assert row.price(None, [first, second]).tolist() == [wanted + row.channel_gate]


# The table -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [32, 40])
def test_dense_is_what_the_counter_sees_on_the_stock_model(kind: str, size: int) -> None:
    model = stock(kind)
    wanted = run(model, images(1, size))[1]
    assert td.cost_table(model, (3, size, size)).dense == wanted
    assert td.cost_table(add(model), (3, size, size)).dense == wanted


@pytest.mark.parametrize("kind", KINDS)
def test_rows_add_up(kind: str) -> None:
    model = dynamic(kind)
    costs = td.cost_table(model, SMALL)
    names = [name for name, m in model.named_modules() if any(m is u for u in units_in(model))]
    assert [row.name for row in costs.units] == names
    assert [(row.gated, row.skippable) for row in costs.units] == [(False, False)] + [(True, True)] * (len(names) - 1)
    assert costs.units[0].layer_gate == costs.units[0].channel_gate == 0
    assert costs.dense == costs.stem + sum(r.full for r in costs.units) + sum(costs.leave) + costs.exits[-1].head
    gates = sum(r.layer_gate + r.channel_gate for r in costs.units)
    assert costs.dearest == costs.exits[-1].dearest == costs.dense + gates
    assert costs.input_size == SMALL
    assert (costs.unit, costs.exits[-1].name) == ("macs", "head")


def units_in(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if type(m).__name__ in ("BasicBlock", "Bottleneck", "DenseLayer", "_DenseLayer")]


@pytest.mark.parametrize("kind", ["basic", "bottleneck", "grouped", "dense"])
def test_one_image_is_priced_in_plain_numbers(kind: str) -> None:
    """The same as in tensors, for MACs exactly."""
    table = td.cost_table(dynamic(kind), (3, SIZE, SIZE))
    for unit in (*table.units, *table.scaled(0.37, "").units):
        for _ in range(3):
            keep, channels = torch.rand(1) < 0.7, [torch.rand(1, len(sizes)) < 0.5 for sizes in unit.sizes]
            wanted = unit.price(keep, channels or None)
            found = unit.price_one(bool(keep), [part[0].tolist() for part in channels] or None)
            assert float(wanted) == pytest.approx(found, rel=0 if isinstance(found, int) else 1e-6)


@pytest.mark.parametrize("parts", [["layer", "exits"], ["channel", "exits"], ["layer", "channel", "exits"]])
@pytest.mark.parametrize("kind", FEW)
def test_cheapest_and_dearest_are_reached(kind: str, parts: list[str]) -> None:
    model = dynamic(kind, parts)
    costs = td.cost_table(model, SMALL)
    for index, row in enumerate(costs.exits):
        for ratio, wanted in ((0.0, row.cheapest), (1.0, row.dearest)):
            forced = {"layer_keep": ratio if "layer" in parts else None}
            with td.force(model, **forced, channel_keep=ratio if "channel" in parts else None, exit=index):
                assert decide(model, images(1)).macs.tolist() == [wanted]
    assert costs.cheapest == min(row.cheapest for row in costs.exits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_table_wherever_it_is_counted(dtype: torch.dtype) -> None:
    model = dynamic("bottleneck")
    wanted = td.cost_table(model, SMALL)
    model = model.to(dtype).train()
    calls: list[Any] = []
    model.layer1.register_forward_hook(lambda *args: calls.append(args))
    before = state_of(model)
    with (
        torch.inference_mode(),
        torch.autocast("cpu", torch.bfloat16),
        torch.device("meta"),
        FlopCounterMode(display=False) as counter,
    ):
        assert td.cost_table(model, SMALL) == wanted
    assert counter.get_total_flops() == 0
    assert calls == []
    assert_same_state(state_of(model), before)


@pytest.mark.parametrize("size", [32, (3, 32), (3, 0, 32), (3, 32.0, 32), None])
def test_wrong_input_sizes(size: Any) -> None:
    with pytest.raises(ValueError, match="input_size"):
        td.cost_table(stock("basic"), size)


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match=r"macs.*found 'flops'"):
        td.cost_table(stock("basic"), SMALL, unit="flops")
    with pytest.raises(ValueError, match=r"'resnet18' cannot run.*\(5, 40, 40\)"):
        td.cost_table(stock("basic"), (5, 40, 40))
    with pytest.raises(ValueError, match="no units to gate in 'vgg16'"):
        td.cost_table(timm.create_model("vgg16", device="meta"))
    with pytest.raises(TypeError):
        td.cost_table(stock("basic"), SMALL, batch=2)  # type: ignore[call-arg]


# What is run ---------------------------------------------------------------------------------------------------------


def check(model: nn.Module, batch: int) -> td.Decisions:
    """Skipping runs exactly what it says, and masked execution says the same."""
    x = images(batch)
    decisions = decide(model, x)
    assert run(model, x)[1] == decisions.macs.sum()
    assert decisions.macs.dtype == torch.int64
    with masked(model):
        assert torch.equal(decide(model, x).macs, decisions.macs)
    return decisions


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_counter_sees_forced_decisions(kind: str, batch: int) -> None:
    model = dynamic(kind)
    forced = mixed(model, batch)
    with td.force(model, **forced):
        decisions = check(model, batch)
    dearest = td.cost_table(model, SMALL).dearest
    assert (decisions.macs < dearest).all()
    with td.force(model, **forced, exit=torch.arange(batch) % len(decisions.exit_logits)):
        check(model, batch)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layer", LAYER_KINDS)
@pytest.mark.parametrize("kind", FEW)
def test_counter_sees_the_gates_own_decisions(kind: str, layer: str, mode: str) -> None:
    model = undecided(kind, layer=layer, channel=td.ChannelGateConfig(8, mode, levels=3))
    decisions = check(model, 8)
    assert len(decisions.macs.unique()) > 1
    check(model, 1)


@pytest.mark.parametrize("parts", [["layer"], ["channel"], ["exits"], ["layer", "exits"], ["channel", "exits"]])
@pytest.mark.parametrize("kind", FEW)
def test_counter_sees_any_set_of_parts(kind: str, parts: list[str]) -> None:
    model = dynamic(kind, parts)
    with td.force(model, **mixed(model, 8)):
        check(model, 8)


@pytest.mark.parametrize("ratio", [0.0, 1.0])
@pytest.mark.parametrize("kind", ["grouped", "groupnorm", "blur_se", *FEW])
def test_counter_sees_nothing_or_everything(kind: str, ratio: float) -> None:
    model = dynamic(kind, channel=td.ChannelGateConfig(8))
    for forced in ({"channel_keep": ratio}, {"layer_keep": ratio}, {"layer_keep": ratio, "channel_keep": ratio}):
        with td.force(model, **forced):
            check(model, 8)
            check(model, 1)


BUDGETS: list[dict[str, Any]] = [
    {"fraction": 0.95},
    {"fraction": 1.5},
    {"exit": 0},
    {"exit": 1},
    {"confidence": 0.0},
    {"confidence": 1.0},
]


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
@pytest.mark.parametrize("kind", FEW)
def test_counter_sees_budgets(kind: str, budget: dict[str, Any]) -> None:
    model = undecided(kind)
    td.set_budget(model, **budget, input_size=SMALL)
    for batch in (1, 8):
        check(model, batch)
        with td.force(model, **mixed(model, batch)):
            check(model, batch)


@pytest.mark.parametrize("kind", FEW)
def test_counter_sees_a_budget_for_each_image(kind: str) -> None:
    model = undecided(kind)
    exits = td.cost_table(model, SMALL).exits
    td.set_budget(model, macs=[exits[i % 4].dearest for i in range(8)], input_size=SMALL)
    assert (check(model, 8).exit_index >= torch.arange(8) % 4).all()


@pytest.mark.parametrize(
    ("kind", "after"),
    [
        ("bottleneck", ("layer1.0", "layer2.0", "layer2")),
        ("dense", ("features.denseblock1.denselayer1", "features.denseblock2.denselayer2", 3)),
    ],
)
def test_counter_sees_exits_after_any_unit(kind: str, after: tuple[Any, ...]) -> None:
    model = undecided(kind, exits=td.ExitConfig(after))
    with td.force(model, **mixed(model, 8), exit=torch.arange(8) % 4):
        check(model, 8)
    exits = td.cost_table(model, SMALL).exits
    td.set_budget(model, macs=[exits[i % 4].dearest for i in range(8)], input_size=SMALL)
    decisions = check(model, 8)
    assert (decisions.exit_index >= torch.arange(8) % 4).all()


@pytest.mark.parametrize("kind", FEW)
def test_images_need_not_be_square(kind: str) -> None:
    model = dynamic(kind)
    x = images(4, 48)[..., :33]
    with td.force(model, **mixed(model, 4)):
        assert run(model, x)[1] == decide(model, x).macs.sum()
    assert td.cost_table(model, (3, 48, 33)).dense == run(stock(kind), x[:1])[1]


@pytest.mark.parametrize("kind", FEW)
def test_counter_sees_confidence_in_the_middle(kind: str) -> None:
    model = undecided(kind)
    x = images(8)
    with td.force(model, exit=0):
        sure = decide(model, x).logits.softmax(1).amax(1)
    td.set_budget(model, confidence=sure.median().item())
    decisions = check(model, 8)
    assert len(decisions.exit_index.unique()) > 1


def test_the_first_table_is_not_seen_by_a_users_counter() -> None:
    model = td.set_budget(dynamic("basic"), fraction=1.0, input_size=(3, 64, 64))
    model.dynamic.tables.clear()
    assert run(model, images(2))[1] == decide(model, images(2)).macs.sum()


@pytest.mark.parametrize("kind", KINDS)
def test_stock_models_are_priced_too(kind: str) -> None:
    costs = td.cost_table(STOCK[kind](), SMALL)
    assert not any(row.gated for row in costs.units)
    assert len(costs.exits) == 1
    assert costs.cheapest == costs.dearest == costs.dense


def test_networks_whose_weights_are_computed() -> None:
    """Pruned by torch, a convolution has its mask applied to a parameter of another name before every run."""
    model, x = undecided("basic"), images(4)
    before = td.cost_table(model, SMALL)
    pruned = copy.deepcopy(model)
    prune.l1_unstructured(pruned.layer1[1].conv1, "weight", 0.5)
    pruned.dynamic.tables.clear()
    assert td.cost_table(pruned, SMALL) == before
    logits, macs = run(pruned, x)
    assert macs == decide(pruned, x).macs.sum()
    model.layer1[1].conv1.weight.data = pruned.layer1[1].conv1.weight.detach()
    assert torch.equal(logits, run(model, x)[0])
    assert pruned.layer1[1].conv1.weight.device.type == "cpu"
