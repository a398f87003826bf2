"""Forward passes: both executions mean the same, exits come one by one."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nets import (
    ALL,
    CLASSES,
    FEW,
    KINDS,
    LAYER_KINDS,
    MODES,
    VERBS,
    add,
    assert_near,
    assert_same_decisions,
    decide,
    dynamic,
    images,
    masked,
    mixed,
    randomise,
    run,
    stock,
    undecided,
    units_of,
)
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import timm_dynamic as td
from timm_dynamic.forward import features

SMALL = (3, 40, 40)


# Open gates are the stock model --------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_open_gates_equal_the_stock_model_bit_for_bit(kind: str, batch: int) -> None:
    x = images(batch)
    model = stock(kind)
    wanted = model(x)
    for part in ALL:  # a part more each time
        VERBS[part](model)
        assert torch.equal(model(x), wanted)
        with masked(model):
            assert torch.equal(model(x), wanted)
    assert torch.equal(td.decide(model, x).logits, wanted)
    assert torch.equal(list(td.anytime(model, x))[-1], wanted)


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("part", ALL)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_each_part_alone_equals_the_stock_model(kind: str, part: str, batch: int) -> None:
    x = images(batch)
    model = stock(kind)
    wanted = model(x)
    VERBS[part](model)
    assert torch.equal(model(x), wanted)
    with masked(model):
        assert torch.equal(model(x), wanted)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layer", LAYER_KINDS)
@pytest.mark.parametrize("kind", FEW)
@torch.no_grad()
def test_every_kind_of_gate_is_open_at_first(kind: str, layer: str, mode: str) -> None:
    x = images(4).contiguous(memory_format=torch.channels_last)
    model = stock(kind).to(memory_format=torch.channels_last)
    wanted = model(x)
    randomise(add(model, layer=layer, channel=mode).get_submodule("layer_gates"))
    assert torch.equal(model(x), wanted)
    with masked(model):
        assert torch.equal(model(x), wanted)


@pytest.mark.parametrize("kind", FEW)
@torch.no_grad()
def test_features_and_intermediates_equal_the_stock_models(kind: str) -> None:
    x, model = images(2), stock(kind)
    wanted, levels = model.forward_intermediates(x)
    add(model)
    td.set_budget(model, exit=0)  # is not looked at
    found, maps = model.forward_intermediates(x)
    assert torch.equal(model.forward_features(x), wanted)
    assert torch.equal(found, wanted)
    assert all(torch.equal(a, b) for a, b in zip(maps, levels, strict=True))
    assert torch.equal(features(model, x), wanted)


@pytest.mark.parametrize("kind", FEW)
@torch.no_grad()
def test_features_have_the_gates_at_work(kind: str) -> None:
    model = undecided(kind)
    x = images(4)
    assert_near(model.forward_head(model.forward_features(x)), model(x))
    assert not torch.equal(model.forward_features(x), td.strip(model).forward_features(x))


# Masked equals skipping ----------------------------------------------------------------------------------------------


def check(model: nn.Module, x: Tensor) -> td.Decisions:
    """Both executions decide and give the same, and a plain call gives the same logits."""
    skipping = decide(model, x)
    with torch.no_grad():
        assert_near(model(x), skipping.logits, 1e-6)
    with masked(model):
        computing_all = decide(model, x)
        assert_same_decisions(computing_all, skipping)
        with torch.no_grad():
            assert_near(model(x), computing_all.logits, 1e-6)
    return skipping


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_masked_equals_skipping_for_forced_decisions(kind: str, batch: int, layout: torch.memory_format) -> None:
    model = dynamic(kind, channel=td.ChannelGateConfig(8)).to(memory_format=layout)
    x = images(batch).contiguous(memory_format=layout)
    plain = decide(model, x)
    forced = mixed(model, batch)
    with td.force(model, **forced):
        decisions = check(model, x)
    assert torch.equal(decisions.layer_keep, forced["layer_keep"])
    assert (decisions.logits - plain.logits).abs().max() > 1e-2 * plain.logits.abs().max()  # it matters
    leave = torch.arange(batch) % len(decisions.exit_logits)
    with td.force(model, **forced, exit=leave):
        assert torch.equal(check(model, x).exit_index, leave)


@pytest.mark.parametrize("ratio", [0.0, 1.0])
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_masked_equals_skipping_at_the_ends(kind: str, batch: int, ratio: float) -> None:
    model, x = dynamic(kind), images(batch)
    for forced in ({"layer_keep": ratio}, {"channel_keep": ratio}, {"layer_keep": ratio, "channel_keep": 1 - ratio}):
        with td.force(model, **forced):
            check(model, x)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layer", LAYER_KINDS)
@pytest.mark.parametrize("kind", FEW)
def test_masked_equals_skipping_for_the_gates_own_decisions(kind: str, layer: str, mode: str) -> None:
    model = undecided(kind, layer=layer, channel=td.ChannelGateConfig(8, mode, levels=3))
    keep = check(model, images(8)).layer_keep
    assert len({tuple(row) for row in keep.tolist()}) > 1
    check(model, images(1))


@pytest.mark.parametrize("budget", [{"fraction": 0.95}, {"exit": 1}, {"confidence": 0.3}, {"confidence": 1.0}], ids=str)
@pytest.mark.parametrize("kind", [*FEW, "grouped", "cifar", "tv_dense"])
def test_masked_equals_skipping_under_budgets(kind: str, budget: dict[str, Any]) -> None:
    model = td.set_budget(undecided(kind), **budget, input_size=SMALL)
    for batch in (1, 8):
        check(model, images(batch))
        with td.force(model, **mixed(model, batch)):
            check(model, images(batch))


@pytest.mark.parametrize("parts", [["layer"], ["channel"], ["exits"], ["channel", "exits"]])
@pytest.mark.parametrize("kind", FEW)
def test_masked_equals_skipping_with_some_parts(kind: str, parts: list[str]) -> None:
    model, x = undecided(kind, parts), images(8)
    check(model, x)
    with td.force(model, **mixed(model, 8)):
        check(model, x)


def test_images_do_not_influence_each_other() -> None:
    model, x = undecided("bottleneck"), images(8)
    together = decide(td.set_budget(model, fraction=1.0, input_size=SMALL), x)
    for i in range(8):
        alone = decide(model, x[i : i + 1])
        assert_near(alone.logits, together.logits[i : i + 1])
        assert torch.equal(alone.macs, together.macs[i : i + 1])
        assert torch.equal(alone.layer_keep, together.layer_keep[i : i + 1])


@torch.no_grad()
def test_closed_gates_equal_shortcuts_written_by_hand() -> None:
    model = dynamic("basic", ["layer"])
    x = images(4)
    y = model.layer1[0](model.maxpool(model.act1(model.bn1(model.conv1(x)))))
    for stage in (model.layer2, model.layer3, model.layer4):  # the second block of each stage gives its input
        conv, norm = stage[0].downsample
        y = F.conv2d(y, conv.weight, stride=2)
        y = F.batch_norm(y, norm.running_mean, norm.running_var, norm.weight, norm.bias).clamp(min=0)
    wanted = y.mean((2, 3)) @ model.fc.weight.T + model.fc.bias
    with td.force(model, layer_keep=0.0):
        assert_near(model(x), wanted)


@torch.no_grad()
def test_closed_dense_layers_append_zeros() -> None:
    model = dynamic("dense", ["layer"])
    x = images(4)
    f = model.features
    y = f.pool0(f.norm0(f.conv0(x)))
    y = torch.cat([y, f.denseblock1.denselayer1(y), torch.zeros(4, 12, *y.shape[2:])], 1)
    for block, transition in ((f.denseblock2, f.transition1), (f.denseblock3, f.transition2)):
        y = transition(y)
        y = torch.cat([y, torch.zeros(4, 12 * len(block), *y.shape[2:])], 1)
    y = f.transition3(y)
    y = f.norm5(torch.cat([y, torch.zeros(4, 24, *y.shape[2:])], 1))
    wanted = y.mean((2, 3)) @ model.classifier.weight.T + model.classifier.bias
    with td.force(model, layer_keep=0.0):
        assert_near(model(x), wanted)


@pytest.mark.parametrize("kind", FEW)
@pytest.mark.parametrize("budget", [{}, {"fraction": 1.0}, {"exit": 0}, {"confidence": 0.5}], ids=str)
@torch.no_grad()
def test_no_images(kind: str, budget: dict[str, Any]) -> None:
    model = td.set_budget(dynamic(kind), **budget, **({"input_size": SMALL} if budget else {}))
    assert model(images(2)[:0]).shape == (0, CLASSES)
    decisions = td.decide(model, images(2)[:0])
    assert decisions.macs.shape == (0,)
    assert decisions.layer_keep.shape == (0, units_of(model))


@pytest.mark.parametrize("kind", FEW)
def test_gradients_by_the_input_flow_in_eval(kind: str) -> None:
    """Saliency maps and adversarial examples: skipping gives the gradient that masked execution gives."""
    model = dynamic(kind)
    found = []
    for execution in ("skip", "masked"):
        x = images(4).requires_grad_()
        with td.force(td.set_execution(model, execution), **mixed(model, 4), exit=torch.tensor([0, 1, 2, 3])):
            model(x).square().sum().backward()
        found.append(x.grad)
    assert_near(*found)


# Anytime -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_anytime_gives_the_logits_of_each_exit(kind: str) -> None:
    model, x = undecided(kind), images(4)
    found = list(td.anytime(model, x))
    assert len(found) == len(model.exits) + 1
    for index, logits in enumerate(found):
        with td.force(model, exit=index):
            assert_near(logits, model(x))


@pytest.mark.parametrize("kind", FEW)
@torch.no_grad()
def test_anytime_works_only_when_asked(kind: str) -> None:
    model, x = undecided(kind), images(2)
    costs = td.cost_table(model, SMALL)
    wanted = []
    for index in range(len(costs.exits)):
        with td.force(model, exit=index):
            wanted.append(int(decide(model, x).macs.sum()))
    spent = 0
    exits = td.anytime(model, x)
    for index in range(len(costs.exits)):
        with FlopCounterMode(display=False) as counter:
            next(exits)
        spent += counter.get_total_flops() // 2
        heads = 2 * sum(row.head for row in costs.exits[:index])  # two images; exits on the way were evaluated too
        assert spent == wanted[index] + heads
    with pytest.raises(StopIteration):
        next(exits)


@torch.no_grad()
def test_anytime_does_nothing_until_the_first_exit_is_asked_for() -> None:
    model = dynamic("basic")
    with FlopCounterMode(display=False) as counter:
        td.anytime(model, images(1))
    assert counter.get_total_flops() == 0


@torch.no_grad()
def test_anytime_does_not_look_at_the_budget() -> None:
    model = td.set_budget(dynamic("basic"), exit=0)
    assert len(list(td.anytime(model, images(1)))) == 4


def test_anytime_needs_eval_mode() -> None:
    with pytest.raises(ValueError, match="eval mode"):
        td.anytime(dynamic("basic").train(), images(1))


# Forward -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_eval_gives_a_plain_tensor(kind: str) -> None:
    model = dynamic(kind)
    for budget in ({}, {"exit": 0}, {"confidence": 0.5}):
        y, _ = run(td.set_budget(model, **budget), images(2))
        assert type(y) is torch.Tensor
        assert y.shape == (2, CLASSES)


@pytest.mark.parametrize("kind", FEW)
@torch.no_grad()
def test_bfloat16_and_autocast_run(kind: str) -> None:
    model, x = undecided(kind), images(4)
    with torch.autocast("cpu", torch.bfloat16):
        assert td.decide(model, x).logits.isfinite().all()
    assert model.bfloat16()(x.bfloat16()).isfinite().all()


def test_meta_tensors_run_masked() -> None:
    model = add(stock("bottleneck")).to("meta")
    assert model(images(2).to("meta")).shape == (2, CLASSES)
