"""Forward passes: both executions mean the same, decisions tell what was done, exits come one by one."""

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
    groups_of,
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


# Decisions -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_and_dtypes_in_eval(kind: str) -> None:
    model = undecided(kind)
    decisions = decide(model, images(8))
    exits = len(model.exits) + 1
    assert decisions.logits.shape == (8, CLASSES)
    assert [e.shape for e in decisions.exit_logits] == [(8, CLASSES)] * exits
    assert decisions.layer_keep.shape == decisions.layer_prob.shape == (8, units_of(model))
    assert (decisions.layer_keep.dtype, decisions.layer_prob.dtype) == (torch.bool, torch.float32)
    assert [k.shape for k in decisions.channel_keep] == [(8, n) for n in groups_of(model)]
    assert all(k.dtype == torch.bool for k in decisions.channel_keep)
    assert (decisions.exit_index.shape, decisions.exit_index.dtype) == ((8,), torch.int64)
    assert (decisions.macs.shape, decisions.macs.dtype) == ((8,), torch.int64)
    assert torch.equal(decisions.cost, decisions.macs.float())
    assert torch.equal(decisions.layer_keep, decisions.layer_prob >= 0.5)


@pytest.mark.parametrize(("parts", "widths"), [(["layer"], 0), (["channel"], 14), (["exits"], 0)])
def test_shapes_with_one_part(parts: list[str], widths: int) -> None:
    decisions = decide(dynamic("bottleneck", parts), images(3))
    assert decisions.layer_keep.shape == (3, 7 if parts == ["layer"] else 0)
    assert len(decisions.channel_keep) == widths  # two in each of seven gated units
    assert len(decisions.exit_logits) == (4 if parts == ["exits"] else 1)
    assert decisions.exit_index.tolist() == [len(decisions.exit_logits) - 1] * 3


@pytest.mark.parametrize("execution", ["skip", "masked"])
def test_without_a_budget_only_the_head_is_evaluated(execution: str) -> None:
    model = td.set_execution(dynamic("basic"), execution)
    decisions = decide(model, images(4))
    assert all(e.isnan().all() for e in decisions.exit_logits[:-1])
    assert torch.equal(decisions.exit_logits[-1], decisions.logits)
    assert decisions.exit_index.tolist() == [3] * 4


@pytest.mark.parametrize("execution", ["skip", "masked"])
@pytest.mark.parametrize("kind", FEW)
def test_units_never_reached_are_zero(kind: str, execution: str) -> None:
    model = td.set_execution(undecided(kind, channel=td.ChannelGateConfig(8)), execution)
    leave = torch.tensor([0, 1, 2, 3, 0, 3])
    with td.force(model, layer_keep=1.0, channel_keep=1.0, exit=leave):
        decisions = decide(model, images(6))
    last = torch.tensor([*model.exits.after, len(model.layer_gates)])[leave]  # place of the last unit run
    reached = torch.arange(1, len(model.layer_gates) + 1) <= last[:, None]
    assert torch.equal(decisions.layer_keep, reached)
    assert torch.equal(decisions.layer_prob > 0, reached)
    by_unit = iter(decisions.channel_keep)
    for unit, sizes in enumerate(model.channel_gates.sizes):
        for _ in sizes:
            keep = next(by_unit)
            assert torch.equal(keep, reached[:, unit, None].expand_as(keep))


def test_no_image_gets_far() -> None:
    """Exits and units beyond the last one that any image reached have zeros and NaN of full shape."""
    model = dynamic("bottleneck")
    with td.force(model, exit=0):
        decisions = decide(model, images(2))
    assert decisions.layer_keep.sum(1).tolist() == [1, 1]
    assert [k.shape for k in decisions.channel_keep] == [(2, n) for n in groups_of(model)]
    assert [bool(e.isnan().all()) for e in decisions.exit_logits] == [False, True, True, True]


@pytest.mark.parametrize("kind", FEW)
def test_channels_of_a_skipped_unit_are_zero(kind: str) -> None:
    model = dynamic(kind)
    forced = mixed(model, 8)
    with td.force(model, layer_keep=forced["layer_keep"], channel_keep=forced["channel_keep"]):
        found = decide(model, images(8)).channel_keep
    widths = [len(sizes) for sizes in model.channel_gates.sizes]
    runs = forced["layer_keep"].repeat_interleave(torch.tensor(widths), dim=1)
    for i, keep in enumerate(forced["channel_keep"]):
        assert torch.equal(found[i], keep & runs[:, i, None])


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", FEW)
def test_decide_changes_no_mode_and_no_grad_state(kind: str, training: bool, context: Any) -> None:
    model = dynamic(kind).train(training)
    model.layer1[0].eval() if kind != "dense" else model.features.denseblock1.eval()  # a mix is left as it is
    modes = [m.training for m in model.modules()]
    wants = [p.requires_grad for p in model.parameters()]
    with context():
        state = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        td.decide(model, images(2))
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == state
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == wants
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("kind", FEW)
def test_decide_in_eval_changes_nothing_in_the_model(kind: str) -> None:
    model = undecided(kind)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    decide(model, images(4))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_decide_needs_a_dynamic_model() -> None:
    for call in (td.decide, td.anytime):
        with pytest.raises(ValueError, match="'resnet18' has no gates and no exits: use add_layer_gates"):
            call(stock("basic"), images(1))


# Training ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [["layer"], ["layer", "channel"], ["exits"], ALL])
@pytest.mark.parametrize("kind", FEW)
def test_training_returns_a_tensor_or_a_tuple(kind: str, parts: list[str]) -> None:
    model = dynamic(kind, parts).train()
    found = model(images(4))
    if "exits" in parts:
        assert isinstance(found, tuple)
        assert [y.shape for y in found] == [(4, CLASSES)] * (len(model.exits) + 1)
    else:
        assert found.shape == (4, CLASSES)


@pytest.mark.parametrize("kind", KINDS)
def test_training_with_open_gates_equals_stock_training(kind: str) -> None:
    plain = stock(kind).train()
    model = add(stock(kind).train())
    x = images(4)
    wanted, found = plain(x), model(x)
    assert torch.equal(found[-1], wanted)
    wanted.square().sum().backward()
    found[-1].square().sum().backward()
    state = model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in plain.state_dict().items())  # running statistics
    own = dict(model.named_parameters())
    for name, parameter in plain.named_parameters():
        assert_near(own[name].grad, parameter.grad)


@pytest.mark.parametrize("layer", LAYER_KINDS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", FEW)
def test_every_parameter_gets_a_gradient(kind: str, mode: str, layer: str) -> None:
    config = td.LayerGateConfig(layer, "random")
    model = dynamic(kind, layer=config, channel=td.ChannelGateConfig(8, mode, "random")).train()
    sum(y.square().sum() for y in model(images(4))).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


@pytest.mark.parametrize("kind", FEW)
def test_decisions_in_training_are_straight_through(kind: str) -> None:
    model = undecided(kind).train()
    decisions = td.decide(model, images(8))
    for keep in (decisions.layer_keep, *decisions.channel_keep):
        assert keep.dtype == torch.float32
        assert bool(((keep == 0) | (keep == 1)).all())
    assert not any(e.isnan().any() for e in decisions.exit_logits)
    assert torch.equal(decisions.exit_logits[-1], decisions.logits)
    assert decisions.exit_index.tolist() == [3] * 8
    (decisions.layer_keep.sum() + sum(k.sum() for k in decisions.channel_keep)).backward()
    gates = {n: p for n, p in model.named_parameters() if n.startswith(("layer_gates", "channel_gates"))}
    assert [name for name, p in gates.items() if p.grad is None] == []
    assert sum(p.grad.abs().sum() for p in gates.values()) > 0


@pytest.mark.parametrize("parts", [["layer"], ["channel"], ALL])
@pytest.mark.parametrize("kind", [*FEW, "grouped"])
def test_cost_in_training_is_the_macs_with_a_gradient(kind: str, parts: list[str]) -> None:
    model = undecided(kind, parts).train()
    decisions = td.decide(model, images(8))
    assert decisions.macs.dtype == torch.int64
    assert not decisions.macs.requires_grad
    torch.testing.assert_close(decisions.cost, decisions.macs.float())
    decisions.cost.sum().backward()
    gates = {n: p for n, p in model.named_parameters() if n.startswith(("layer_gates", "channel_gates"))}
    assert all(p.grad is not None for p in gates.values())
    assert all(p.grad is None for n, p in model.named_parameters() if n.startswith("exits."))


def test_gradient_of_cost_is_the_cost_of_running() -> None:
    """What a keep saves is all of its unit but the gate and the shortcut."""
    model = dynamic("basic", ["layer"], layer="linear").train()
    decisions = td.decide(model, images(2))
    decisions.cost.sum().backward()
    rows = td.cost_table(model, SMALL).units[1:]
    slope = (decisions.layer_prob * (1 - decisions.layer_prob)).sum(0)  # of the sigmoid, summed over images
    wanted = torch.tensor([float(row.branch) for row in rows]) * slope
    assert_near(torch.stack([gate.fc.bias.grad[0] for gate in model.layer_gates.gates]), wanted)


@pytest.mark.parametrize("kind", [*FEW, "grouped", "cifar"])
def test_macs_in_training_are_what_the_same_decisions_cost_in_eval(kind: str) -> None:
    model = dynamic(kind, channel=td.ChannelGateConfig(8))
    forced = mixed(model, 4)
    with td.force(model, **forced):
        wanted = decide(model, images(4)).macs
        heads = sum(row.head for row in td.cost_table(model, SMALL).exits[:-1])  # in training every exit is evaluated
        assert torch.equal(decide(model.train(), images(4)).macs, wanted + heads)


@pytest.mark.parametrize("execution", ["skip", "masked"])
def test_training_is_masked_whatever_was_asked_for(execution: str) -> None:
    """Batch norm must see the whole batch."""
    model = td.set_execution(dynamic("basic", ["layer"]), execution).train()
    with td.force(model, layer_keep=0.0):
        model(images(4))
    assert model.layer2[1].bn1.num_batches_tracked == 1


@pytest.mark.parametrize("kind", FEW)
def test_checkpointing_gives_the_same_gradients(kind: str) -> None:
    found = []
    for saving in (False, True):
        model = dynamic(kind).train()
        model.set_grad_checkpointing(saving)
        with td.force(model, **mixed(model, 4)):
            sum(y.square().sum() for y in model(images(4))).backward()
        found.append([p.grad for p in model.parameters()])
    for one, other in zip(*found, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert_near(one, other)


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
