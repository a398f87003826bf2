"""Decisions tell what was done; in training they carry gradients and the network trains as stock."""

import copy
from typing import Any

import pytest
import timm
import torch
import torchvision
from nets import (
    ALL,
    CLASSES,
    FEW,
    KINDS,
    LAYER_KINDS,
    MODES,
    add,
    assert_near,
    decide,
    dynamic,
    groups_of,
    images,
    mixed,
    randomise,
    stock,
    undecided,
    units_of,
)
from timm.models.densenet import DenseNet
from torch import nn

import timm_dynamic as td
from timm_dynamic import families

SMALL = (3, 40, 40)


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


def regularised(kind: str) -> nn.Module:
    """Networks that draw random numbers in training, or checkpoint there."""
    if kind == "drop path":
        return randomise(timm.create_model("resnet20_cifar", drop_path_rate=0.3, drop_rate=0.2))
    efficient = {"growth_rate": 12, "block_config": (2, 3, 2, 2), "num_classes": CLASSES, "memory_efficient": True}
    if kind == "timm":
        return randomise(DenseNet(**efficient, proj_drop_rate=0.3))
    return randomise(torchvision.models.DenseNet(**efficient, num_init_features=24, drop_rate=0.3))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", ["drop path", "timm", "torchvision"])
def test_dropping_and_saving_memory_are_as_in_the_stock_model(kind: str, training: bool) -> None:
    plain = regularised(kind).train(training)
    model = td.add_channel_gates(td.add_layer_gates(copy.deepcopy(plain)))
    found = []
    for net in (plain, model):
        torch.manual_seed(3)
        y = net(images(4))
        y.square().sum().backward()
        found.append(y)
    assert torch.equal(*found)
    assert (not training) == torch.equal(plain(images(4)), plain(images(4)))  # they do draw
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


@pytest.mark.parametrize("kind", [*FEW, "cifar_dense", "tv_dense"])
def test_checkpointing_keeps_less_for_the_gradients(kind: str) -> None:
    """Of dense layers too, which are told one by one: torchvision's by `memory_efficient`."""
    kept = []
    for saving in (False, True):
        model = dynamic(kind).train()
        if saving and kind == "tv_dense":
            for unit in families.units(model):
                unit.module.memory_efficient = True
        elif saving:
            model.set_grad_checkpointing(True)
        size = 0

        def note(x: torch.Tensor) -> torch.Tensor:
            nonlocal size
            size += x.numel()
            return x

        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            model(images(4))
        kept.append(size)
    assert kept[1] < 0.85 * kept[0]
