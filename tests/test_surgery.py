"""Surgery: parts come and go without a trace, errors change nothing, decisions can be forced."""

import copy
import itertools
import pickle
from collections.abc import Callable, Sequence
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
    STOCK,
    VERBS,
    add,
    assert_near,
    assert_same_state,
    decide,
    dynamic,
    groups_of,
    images,
    masked,
    mixed,
    run,
    state_of,
    stock,
    undecided,
    units_of,
)
from torch import Tensor, nn

import timm_dynamic as td

SMALL = (3, 40, 40)
ORDERS = list(itertools.permutations(ALL))


# Adding and stripping ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_strip_gives_the_stock_model_back(kind: str) -> None:
    model, x = stock(kind), images(2)
    before, wanted = state_of(model), model(x)
    assert td.strip(add(model)) is model
    assert_same_state(state_of(model), before)
    assert torch.equal(model(x), wanted)
    assert type(model) is type(STOCK[kind]())


@pytest.mark.parametrize("part", ALL)
@pytest.mark.parametrize("kind", FEW)
def test_strip_after_a_life(kind: str, part: str) -> None:
    """Budgets, executions, forcing and training leave nothing behind either."""
    model = stock(kind)
    attributes = sorted(vars(model))
    VERBS[part](model)
    td.set_execution(td.set_budget(model, fraction=2.0), "masked")
    with td.force(model):
        model.train()(images(4))
    weights = {k: v for k, v in model.state_dict().items() if "gates" not in k and not k.startswith("exits")}
    td.strip(model)
    assert sorted(vars(model)) == attributes
    assert model.training
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
def test_stock_parameters_keep_their_names_and_places(kind: str) -> None:
    model = stock(kind)
    names = list(model.state_dict())
    owned = [id(p) for p in model.parameters()]
    for part in ALL:
        assert VERBS[part](model) is model
    assert list(model.state_dict())[: len(names)] == names
    assert [id(p) for p in model.parameters()][: len(owned)] == owned
    roots = {name.split(".")[0] for name in list(model.state_dict())[len(names) :]}
    assert roots == {"layer_gates", "channel_gates", "exits"}
    assert isinstance(model, type(stock(kind)))


@pytest.mark.parametrize("order", ORDERS, ids="-".join)
@pytest.mark.parametrize("kind", FEW)
def test_order_of_adding_does_not_matter(kind: str, order: Sequence[str]) -> None:
    wanted = dynamic(kind)
    model = add(stock(kind), order)
    assert set(model.state_dict()) == set(wanted.state_dict())
    assert type(model) is type(wanted)
    model.load_state_dict(wanted.state_dict())
    with td.force(wanted, **mixed(wanted, 4)), td.force(model, **mixed(model, 4)):
        assert torch.equal(decide(model, images(4)).logits, decide(wanted, images(4)).logits)
    assert td.cost_table(model, SMALL) == td.cost_table(wanted, SMALL)


def test_parts_are_made_as_and_where_the_model_is() -> None:
    for make in (
        lambda m: m.train(),
        lambda m: m.eval(),
        lambda m: m.bfloat16(),
        lambda m: m.to("meta"),
        lambda m: m.double(),
    ):
        model = add(make(stock("bottleneck")))
        assert len({m.training for m in model.modules()}) == 1
        assert len({p.dtype for p in model.parameters()}) == 1
        assert len({p.device for p in model.parameters()}) == 1


@pytest.mark.parametrize("kind", FEW)
def test_parts_made_in_inference_mode_can_be_trained(kind: str) -> None:
    model = stock(kind)
    with torch.inference_mode():
        add(model)
    sum(y.sum() for y in model.train()(images(4))).backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "gates" in n or n.startswith("exits"))


def test_pretrained_cfg_stays() -> None:
    model = stock("basic")
    cfg = model.pretrained_cfg
    assert add(model).pretrained_cfg is cfg
    assert td.strip(model).pretrained_cfg is cfg


def test_adding_draws_no_random_numbers_that_change_the_trunk() -> None:
    model = stock("basic")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    add(model)
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())


def test_strip_then_add_again() -> None:
    model = td.add_layer_gates(td.strip(td.add_layer_gates(stock("basic"), "ff1")), "rnn")
    assert model.layer_gates.config.kind == "rnn"


# Copies --------------------------------------------------------------------------------------------------------------


def reborn(model: nn.Module, how: str) -> nn.Module:
    return pickle.loads(pickle.dumps(model)) if how == "pickle" else copy.deepcopy(model)


@pytest.mark.parametrize("how", ["pickle", "deepcopy"])
@pytest.mark.parametrize("kind", KINDS)
def test_copies_decide_the_same(kind: str, how: str) -> None:
    model = undecided(kind)
    td.set_budget(td.set_execution(model, "masked"), fraction=1.0, input_size=SMALL)
    twin = reborn(model, how)
    one, other = decide(model, images(4)), decide(twin, images(4))
    assert torch.equal(one.logits, other.logits)
    assert torch.equal(one.macs, other.macs)
    assert (twin.dynamic.execution, twin.dynamic.budget) == ("masked", model.dynamic.budget)
    assert type(twin) is type(model)


@pytest.mark.parametrize("how", ["pickle", "deepcopy"])
def test_copies_are_independent(how: str) -> None:
    model = dynamic("basic")
    twin = reborn(model, how)
    td.set_budget(td.set_execution(twin, "masked"), exit=0)
    with td.force(twin, layer_keep=0.0):
        assert decide(model, images(2)).layer_keep.all()
    assert (model.dynamic.execution, model.dynamic.budget) == ("skip", None)
    td.strip(twin)
    assert hasattr(model, "exits")
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in model.parameters()}


@pytest.mark.parametrize("kind", FEW)
def test_state_dict_round_trip(kind: str) -> None:
    model = undecided(kind)
    twin = add(STOCK[kind]()).eval()
    assert not torch.equal(decide(model, images(4)).logits, decide(twin, images(4)).logits)
    assert str(twin.load_state_dict(model.state_dict(), strict=True)) == "<All keys matched successfully>"
    assert torch.equal(decide(model, images(4)).logits, decide(twin, images(4)).logits)


def test_classes_can_be_found_by_name() -> None:
    for kind in KINDS:
        cls = type(dynamic(kind))
        assert cls.__name__.startswith("Dynamic")
        assert getattr(__import__(cls.__module__, fromlist=["_"]), cls.__name__) is cls


@pytest.mark.parametrize("kind", ["basic", "dense", "cifar"])
@torch.no_grad()
def test_exits_follow_the_classifier(kind: str) -> None:
    model = dynamic(kind)
    decide(model, images(1))
    model.reset_classifier(7)
    assert [y.shape for y in td.anytime(model, images(2))] == [(2, 7)] * (len(model.exits) + 1)
    assert run(model, images(2))[1] == decide(model, images(2)).macs.sum()
    model.reset_classifier(0)
    assert model(images(2)).shape == (2, model.num_features)


# Nothing half-changed ------------------------------------------------------------------------------------------------


def subclass() -> nn.Module:
    class Mine(timm.models.resnet.ResNet):
        pass

    return Mine(timm.models.resnet.BasicBlock, (1, 1, 1, 1), num_classes=CLASSES)


def on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return make()


def strange_block() -> nn.Module:
    model = stock("basic")
    model.layer3[1] = nn.Conv2d(40, 40, 1)
    return model


def one_unit() -> nn.Module:
    return torchvision.models.DenseNet(4, (1,), num_init_features=8, num_classes=CLASSES)


WITHOUT_UNITS: list[tuple[Callable[[], nn.Module], str]] = [
    (lambda: timm.create_model("vgg16", device="meta"), "no units to gate in 'vgg16'.*ResNet or DenseNet"),
    (lambda: timm.create_model("vit_tiny_patch16_224", device="meta"), "no units to gate in 'vit_tiny_patch16_224'"),
    (lambda: on_meta(torchvision.models.vgg11), "no units to gate in 'vgg'"),
    (lambda: nn.Sequential(nn.Conv2d(3, 3, 1)), "no units to gate in 'sequential'"),
    (subclass, "no units to gate.*Mine"),
    (strange_block, "layer3.1 is a Conv2d.*BasicBlock"),
    (one_unit, "has 1.*2 or more"),
]


@pytest.mark.parametrize("part", ALL)
@pytest.mark.parametrize(("make", "message"), WITHOUT_UNITS)
def test_models_without_units(make: Callable[[], nn.Module], message: str, part: str) -> None:
    model = make()
    before = structure_of(model)
    with pytest.raises(ValueError, match=message):
        VERBS[part](model)
    assert structure_of(model) == before


def structure_of(model: nn.Module) -> Any:
    """`state_of` without values: those of meta tensors cannot be compared."""
    return type(model), sorted(vars(model)), [(n, id(m)) for n, m in model.named_modules()], list(model.state_dict())


@pytest.mark.parametrize("what", [None, "resnet18", 3])
def test_no_model_at_all(what: Any) -> None:
    with pytest.raises(ValueError, match=f"a model is needed; found {type(what).__name__}"):
        td.add_layer_gates(what)


# part, wrong argument, error, what it says
WRONG: list[tuple[str, Any, type[Exception], str]] = [
    ("layer", "mlp", ValueError, "'ff1', 'ff2', 'rnn', 'linear'; found 'mlp'"),
    ("layer", {"kind": "rnn", "size": 3}, TypeError, "'size'"),
    ("layer", 7, TypeError, "found int 7"),
    ("channel", "some", ValueError, "'independent', 'nested'; found 'some'"),
    ("channel", {"group_size": 0}, ValueError, "found 0"),
    ("channel", {"groups": 4}, TypeError, "'groups'"),
    ("exits", {"after": ["layer9"]}, ValueError, "'layer9'"),
    ("exits", "layer1", TypeError, "found str 'layer1'"),
]


@pytest.mark.parametrize("dynamic_already", [False, True])
@pytest.mark.parametrize(("part", "config", "error", "message"), WRONG)
def test_wrong_configs_change_nothing(
    part: str, config: Any, error: type[Exception], message: str, dynamic_already: bool
) -> None:
    others = [other for other in ALL if other != part]
    model = dynamic("basic", others) if dynamic_already else stock("basic")
    before = state_of(model)
    with pytest.raises(error, match=message):
        VERBS[part](model, config)
    assert_same_state(state_of(model), before)


@pytest.mark.parametrize("part", ALL)
def test_twice(part: str) -> None:
    model = dynamic("basic", [part])
    before = state_of(model)
    with pytest.raises(ValueError, match=r"'resnet18' has (layer_gates|channel_gates|exits) already; strip"):
        VERBS[part](model)
    assert_same_state(state_of(model), before)


def test_hidden_channels_that_cannot_run_alone() -> None:
    model = stock("basic")
    model.layer2[1].act1 = nn.PReLU(24)
    before = state_of(model)
    with pytest.raises(ValueError, match=r"no channel gate for layer2.1 of 'resnet18': PReLU.*use layer gates"):
        td.add_channel_gates(model)
    assert_same_state(state_of(model), before)
    td.add_layer_gates(model)


@pytest.mark.parametrize("part", ALL)
def test_an_error_while_building_changes_nothing(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = stock("basic")
    before = state_of(model)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(nn.Linear, "__init__", fail)
    with pytest.raises(MemoryError):
        VERBS[part](model)
    assert_same_state(state_of(model), before)


@pytest.mark.parametrize(
    "call",
    [
        lambda m: td.add_layer_gates(m, kind="rnn"),
        lambda m: td.add_channel_gates(m, None, 16),
        lambda m: td.add_exits(m, after=("layer1",)),
        lambda m: td.set_execution(m, "skip", True),
        lambda m: td.force(m, keep=0.5).__enter__(),
        lambda m: td.force(m, 0.5).__enter__(),
        lambda m: td.set_budget(m, flops=3),
        lambda m: td.set_budget(m, 1000),
        lambda m: td.strip(m, True),
        lambda m: td.decide(m, images(1), exit=0),
    ],
)
def test_unknown_arguments(call: Callable[[Any], Any]) -> None:
    model = dynamic("basic")
    before = state_of(model)
    with pytest.raises(TypeError):
        call(model)
    assert_same_state(state_of(model), before)


@pytest.mark.parametrize(
    "call", [td.strip, lambda m: td.set_execution(m, "skip"), lambda m: td.set_budget(m, exit=0), td.set_budget]
)
def test_stock_models_are_refused(call: Callable[[Any], Any]) -> None:
    model = stock("basic")
    with pytest.raises(ValueError, match="a dynamic model is needed; 'resnet18' has no gates"):
        call(model)
    with pytest.raises(ValueError, match="a dynamic model is needed"), td.force(model, layer_keep=0.5):
        pass


def test_execution() -> None:
    model = dynamic("basic")
    assert model.dynamic.execution == "skip"
    assert td.set_execution(model, "masked") is model
    for wrong in ("fast", None, True):
        with pytest.raises(ValueError, match="'skip', 'masked'; found"):
            td.set_execution(model, wrong)
    assert model.dynamic.execution == "masked"


# Forcing -------------------------------------------------------------------------------------------------------------


def test_force_gives_what_was_asked() -> None:
    model = undecided("bottleneck")
    forced = mixed(model, 6)
    leave = torch.tensor([3, 3, 3, 3, 3, 3])
    with td.force(model, **forced, exit=leave) as found:
        assert found is model
        decisions = decide(model, images(6))
    assert torch.equal(decisions.layer_keep, forced["layer_keep"])
    assert torch.equal(decisions.exit_index, leave)
    floats = {"layer_keep": forced["layer_keep"].float(), "channel_keep": [k.int() for k in forced["channel_keep"]]}
    with td.force(model, **floats):
        again = decide(model, images(6))
    assert torch.equal(again.layer_keep, forced["layer_keep"])
    assert torch.equal(again.macs, decisions.macs)


def test_what_is_not_forced_is_decided() -> None:
    model = undecided("basic")
    own = decide(model, images(8))
    with td.force(model, channel_keep=1.0):
        decisions = decide(model, images(8))
    assert torch.equal(decisions.layer_keep[:, 0], own.layer_keep[:, 0])
    with td.force(model):
        assert torch.equal(decide(model, images(8)).macs, own.macs)


@pytest.mark.parametrize("kind", FEW)
def test_ratios_are_drawn_anew_from_torchs_generator(kind: str) -> None:
    model = dynamic(kind, channel=td.ChannelGateConfig(8))
    with td.force(model, layer_keep=0.5, channel_keep=0.5):
        torch.manual_seed(5)
        first, second = decide(model, images(8)), decide(model, images(8))
        torch.manual_seed(5)
        again = decide(model, images(8))
    assert not torch.equal(first.layer_keep, second.layer_keep)
    assert torch.equal(first.layer_keep, again.layer_keep)
    assert all(torch.equal(a, b) for a, b in zip(first.channel_keep, again.channel_keep, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(first.channel_keep, second.channel_keep, strict=True))


def test_ratios_are_met_on_average() -> None:
    model = dynamic("basic", ["layer", "channel"], channel=td.ChannelGateConfig(4))
    with td.force(model, layer_keep=0.3), torch.no_grad():
        keep = decide(model, images(200, 32)).layer_keep.float()
    assert keep.mean().item() == pytest.approx(0.3, abs=0.05)  # 1400 draws: 4 standard deviations
    assert (keep.mean(0) - 0.3).abs().max() < 0.15
    with td.force(model, channel_keep=0.7):
        keeps = torch.cat(decide(model, images(32, 32)).channel_keep, 1).float()
    assert keeps.mean().item() == pytest.approx(0.7, abs=0.05)


def test_nested_ratios_keep_the_first_groups() -> None:
    model = dynamic("bottleneck", channel=td.ChannelGateConfig(mode="nested"))
    with td.force(model, channel_keep=0.5):
        keeps = decide(model, images(8)).channel_keep
    assert all(torch.equal(keep, keep.sort(dim=1, descending=True).values) for keep in keeps)
    assert len({int(n) for keep in keeps for n in keep.sum(1)}) > 2


@pytest.mark.parametrize("kind", FEW)
def test_forced_gates_are_still_run_and_counted(kind: str) -> None:
    model = undecided(kind)
    x = images(4)
    own = decide(model, x)
    with td.force(model, layer_keep=own.layer_keep, channel_keep=own.channel_keep):
        forced = decide(model, x)
        assert run(model, x)[1] == own.macs.sum()
    assert torch.equal(forced.macs, own.macs)
    assert torch.equal(forced.logits, own.logits)
    assert_near(forced.layer_prob, own.layer_prob)  # what the gates said, not what was forced


def test_force_in_training_gives_gates_a_gradient_of_zero() -> None:
    model = dynamic("basic").train()
    forced = mixed(model, 4)
    with td.force(model, **forced):
        decisions = td.decide(model, images(4))
    assert torch.equal(decisions.layer_keep, forced["layer_keep"].float())
    decisions.logits.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.layer_gates.parameters())


def test_forced_is_restored() -> None:
    model = dynamic("basic")
    with pytest.raises(ZeroDivisionError), td.force(model, layer_keep=0.0):
        raise ZeroDivisionError
    assert model.dynamic.forced is None
    with td.force(model, layer_keep=0.0):
        with td.force(model, layer_keep=1.0):
            assert decide(model, images(2)).layer_keep.all()
        assert not decide(model, images(2)).layer_keep.any()
    assert decide(model, images(2)).layer_keep.all()


def test_an_error_in_the_forward_restores_it_too() -> None:
    model = dynamic("basic")
    with pytest.raises(ValueError, match="layer_keep"), td.force(model, layer_keep=torch.ones(3, 7)):
        decide(model, images(2))
    assert model.dynamic.forced is None
    decide(model, images(2))


FORCED_WRONG: list[tuple[dict[str, Any], str]] = [
    ({"layer_keep": 1.5}, "layer_keep must be a number in 0..1; found 1.5"),
    ({"layer_keep": -0.1}, "layer_keep.*0..1; found -0.1"),
    ({"layer_keep": float("nan")}, "layer_keep.*0..1; found nan"),
    ({"layer_keep": True}, "layer_keep.*found True"),
    ({"layer_keep": "half"}, "layer_keep.*found 'half'"),
    ({"layer_keep": torch.ones(7)}, r"layer_keep must have shape \[batch, 7\]; found \[7\]"),
    ({"layer_keep": torch.ones(2, 6)}, r"\[batch, 7\]; found \[2, 6\]"),
    ({"layer_keep": torch.full((2, 7), 0.5)}, "layer_keep must hold 0 and 1 only"),
    ({"layer_keep": torch.full((2, 7), float("nan"))}, "0 and 1 only"),
    ({"channel_keep": 2.0}, "channel_keep must be a number in 0..1; found 2.0"),
    ({"channel_keep": torch.ones(2, 7)}, "a list of 7 tensors; found Tensor"),
    ({"channel_keep": [torch.ones(2, 1)]}, "a list of 7 tensors; found 1"),
    ({"channel_keep": [0.5] * 7}, r"channel_keep\[0\] must be a tensor \[batch, 1\]; found float"),
    ({"channel_keep": [torch.ones(2, 9)] * 7}, r"channel_keep\[0\] must have shape \[batch, 1\]; found \[2, 9\]"),
    ({"channel_keep": "all"}, "channel_keep.*found"),
    ({"exit": 4}, "exit must be in 0..3; found 4"),
    ({"exit": -1}, "exit must be in 0..3; found -1"),
    ({"exit": 1.0}, "exit must be an int.*found 1.0"),
    ({"exit": True}, "exit must be an int.*found True"),
    ({"exit": "head"}, "exit must be an int.*found 'head'"),
    ({"exit": torch.zeros(2, 2).long()}, "exit must be an int"),
    ({"exit": torch.tensor([0, 9])}, r"exit must be in 0..3; found \[0, 9\]"),
]


@pytest.mark.parametrize(("forced", "message"), FORCED_WRONG)
def test_forcing_wrong_values(forced: dict[str, Any], message: str) -> None:
    model = dynamic("basic")
    with pytest.raises(ValueError, match=message), td.force(model, **forced):
        raise AssertionError("entered")
    assert model.dynamic.forced is None


@pytest.mark.parametrize(
    ("parts", "forced", "lacks"),
    [
        (["channel"], {"layer_keep": 0.5}, "layer_gates"),
        (["layer"], {"channel_keep": 0.5}, "channel_gates"),
        (["layer", "channel"], {"exit": 0}, "exits"),
    ],
)
def test_forcing_what_the_model_lacks(parts: list[str], forced: dict[str, Any], lacks: str) -> None:
    with (
        pytest.raises(ValueError, match=f"needs a model with {lacks}; 'resnet18' has none"),
        td.force(dynamic("basic", parts), **forced),
    ):
        raise AssertionError("entered")


@pytest.mark.parametrize("execution", ["skip", "masked"])
@pytest.mark.parametrize("what", ["layer_keep", "channel_keep", "exit"])
def test_forcing_another_batch_than_comes(what: str, execution: str) -> None:
    model = td.set_execution(dynamic("basic"), execution)
    values: dict[str, Tensor | list[Tensor]] = {**mixed(model, 3), "exit": torch.tensor([0, 1, 2])}
    with td.force(model, **{what: values[what]}), pytest.raises(ValueError, match=f"{what}.*2.*found.*3"):
        decide(model, images(2))


def test_helpers_see_all_parts() -> None:
    """The tests above would prove little on a model without groups or units."""
    for kind in KINDS:
        model = dynamic(kind)
        assert units_of(model) >= 5
        assert len(groups_of(model)) >= 5
        with masked(model), td.force(model, **mixed(model, 2)):
            assert not decide(model, images(2)).layer_keep.all()
