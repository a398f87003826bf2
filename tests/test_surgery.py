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
    assert_same_state,
    decide,
    dynamic,
    images,
    mixed,
    run,
    state_of,
    stock,
    undecided,
)
from torch import nn

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
