"""Gates that are told how certain the network's own classifier is of what their unit is given."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from nets import (
    LAYER_KINDS,
    SIZE,
    assert_near,
    assert_same_decisions,
    assert_same_state,
    decide,
    images,
    masked,
    run,
    state_of,
    stock,
    undecided,
    units_of,
)
from test_onnx import SIZE as EXPORTED
from test_onnx import assert_parity
from torch import Tensor, nn

import timm_dynamic as td
from timm_dynamic import families
from timm_dynamic.certainty import MOST, certainty
from timm_dynamic.spreading import spread_gates
from timm_dynamic.tasks import DynamicTask
from timm_dynamic.walk import Walk

TOLD = ["basic", "bottleneck", "cifar", "dense", "dense_blur", "cifar_dense", "tv_dense"]
WEIGHT = -2.0  # images that the classifier is certain of skip


def network(kind: str, parts: tuple[str, ...] = ("layer",), layer: str = "rnn", size: int = SIZE) -> Any:
    """A dynamic network whose gates, where they can, look at certainty and at the features, in eval.

    The classifier is sure of some images only, and thresholds are such that half of `images(12, size)` keep.
    """
    model = undecided(kind, parts, layer=td.LayerGateConfig(layer, certainty=True))
    x = images(12, size)
    model.get_submodule(families.family(model).classifier).weight.data *= 3 / run(model, x)[0].std()
    for place in map(int, model.layer_gates.certain):
        found = shown(model, x, place)
        gate = model.layer_gates.certain[str(place)]
        nn.init.constant_(gate.weight, WEIGHT / found.std().clamp_min(0.1).item())
        with masked(model):
            middle = decide(model, x).layer_prob[:, place].sort().values[5:7]
        assert middle[0] < middle[1]
        model.layer_gates.threshold[place] = middle.mean()
    return model


def shown(model: Any, x: Tensor, place: int) -> Tensor:
    """The certainty that a gate is told [B, 1], every unit before it run."""
    seen: list[Tensor] = []
    real = type(model.layer_gates).prob

    def spy(gates: Any, index: int, score: Tensor, told: Tensor | None) -> Tensor:
        if index == place:
            assert told is not None
            seen.append(told)
        return real(gates, index, score, told)

    with pytest.MonkeyPatch.context() as patch, td.force(model, layer_keep=1.0), torch.no_grad():
        patch.setattr(type(model.layer_gates), "prob", spy)
        with masked(model):
            model(x)
    return seen[0]


@contextmanager
def heads_run(model: Any) -> Iterator[list[int]]:
    """How often the classifier was asked: a row for each time, the number of images."""
    seen: list[int] = []
    hook = model.get_submodule(families.family(model).classifier).register_forward_hook(
        lambda module, args, out: seen.append(len(out))
    )
    try:
        yield seen
    finally:
        hook.remove()


# What gates are told -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TOLD)
@pytest.mark.parametrize("layer", LAYER_KINDS)
def test_fresh_gates_do_not_heed_it(kind: str, layer: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        plain = td.add_layer_gates(stock(kind), td.LayerGateConfig(layer, init="random")).eval()
        torch.manual_seed(0)
        model = td.add_layer_gates(stock(kind), td.LayerGateConfig(layer, init="random", certainty=True)).eval()
    names = [unit.name for unit in families.units(model)[1:]]
    last = families.units(model)[-1].stage
    within = [u.name for u, before in zip(families.units(model)[1:], families.units(model), strict=False)
              if u.kind.grows or u.stage == before.stage == last]  # fmt: skip
    assert [names[int(place)] for place in model.layer_gates.certain] == within
    added = {f"layer_gates.certain.{names.index(name)}.weight" for name in within}
    assert set(model.state_dict()) - set(plain.state_dict()) == added
    x = images(5)
    one, other = decide(plain, x), decide(model, x)
    assert torch.equal(one.layer_prob, other.layer_prob)
    assert torch.equal(one.logits, other.logits)


def test_open_gates_stay_open() -> None:
    model, x = stock("basic"), images(4)
    wanted = run(model, x)[0]
    td.add_layer_gates(model, td.LayerGateConfig(certainty=True)).eval()
    assert torch.equal(run(model, x)[0], wanted)


def test_certainty_is_the_scaled_logit_of_the_largest_probability() -> None:
    model, x = network("cifar"), images(6, 32)
    walk = Walk(model, x)
    walk.to_unit(6)
    probs = torch.softmax(model.forward_head(walk.x), 1).amax(1)
    rest = model.layer_gates.rest[6]
    found = certainty(model, walk.x, rest)
    assert found.shape == (6, 1)
    assert_near(found.flatten(), torch.logit(probs) / torch.logit(torch.tensor(MOST)))
    with torch.no_grad():
        model.fc.weight.mul_(1e4)
        assert certainty(model, walk.x, rest).flatten().tolist() == pytest.approx([1.0] * 6, abs=1e-4)
        model.fc.weight.zero_()
        model.fc.bias.zero_()
        assert certainty(model, walk.x, rest).flatten().tolist() == pytest.approx([-0.3181] * 6, abs=1e-3)  # one in ten


@pytest.mark.parametrize("kind", TOLD)
def test_it_is_asked_as_if_all_that_is_to_come_were_skipped(kind: str) -> None:
    model, x = network(kind), images(8)
    with td.force(model, layer_keep=1.0):
        model.get_submodule(families.family(model).classifier).weight.data /= decide(model, x).logits.std()
    for place in map(int, model.layer_gates.certain):
        told = shown(model, x, place).flatten()
        policy = torch.arange(units_of(model))[None] < place
        with td.force(model, layer_keep=policy):
            probs = torch.softmax(decide(model, x).logits, 1).amax(1)
        assert_near(told, torch.logit(probs.clamp(max=MOST)) / torch.logit(torch.tensor(MOST)), 1e-3)
        assert told.std() > 1e-3


@pytest.mark.parametrize("layer", ["rnn", "linear"])
def test_it_decides(layer: str) -> None:
    model, x = network("cifar", layer=layer), images(24, 32)
    place = 6
    gate = model.layer_gates.certain[str(place)]
    told = shown(model, x, place).flatten()
    nn.init.constant_(gate.weight, 0.0)
    with td.force(model, layer_keep=1.0):
        before = decide(model, x).layer_prob
        nn.init.constant_(gate.weight, -30.0)
        after = decide(model, x).layer_prob
    assert_near(torch.logit(after[:, place]), torch.logit(before[:, place]) - 30 * told, 1e-3)
    assert torch.equal(before[:, :place], after[:, :place])
    assert told.std() > 1e-3


def test_no_classes_no_certainty() -> None:
    model, x = network("basic"), images(3)
    model.reset_classifier(0)
    assert decide(model, x).logits.shape == (3, 64)
    assert shown(model, x, 6).tolist() == [[0.0]] * 3
    model.reset_classifier(4)
    assert shown(model, x, 6).abs().min() > 0


def test_no_gradient_goes_into_the_classifier() -> None:
    model, x = network("cifar").train(), images(4, 32)
    found = td.decide(model, x)
    found.layer_prob[:, 6].sum().backward()
    assert model.fc.weight.grad is None
    assert model.layer_gates.certain["6"].weight.grad.abs().item() > 0
    assert model.conv1.weight.grad.abs().sum() > 0  # by what the gate sees of the features


def test_training_learns_from_it() -> None:
    torch.manual_seed(0)
    model = undecided("cifar", ("layer",), layer=td.LayerGateConfig(certainty=True)).train()
    x, y = images(8, 32), torch.arange(8)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    task = DynamicTask(model, td.cost_table(model, (3, 32, 32)).dense, 2, alpha=1.0)
    task(x, y)["loss"].backward()
    optimizer.step()
    assert all(weight.item() != 0 for weight in model.layer_gates.certain.parameters())


# Every form of the network does the same -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TOLD)
@pytest.mark.parametrize("layer", LAYER_KINDS)
def test_executions_agree_and_costs_are_what_is_computed(kind: str, layer: str) -> None:
    model, x = network(kind, layer=layer), images(12)
    skipping = decide(model, x)
    assert 0 < skipping.layer_keep[:, int(next(iter(model.layer_gates.certain)))].sum() < 12
    logits, macs = run(model, x)
    assert macs == skipping.macs.sum()
    assert_near(logits, skipping.logits)
    with masked(model):
        assert_same_decisions(decide(model, x), skipping)
    fast = td.optimize_for_inference(model)
    assert_same_decisions(decide(fast, x), skipping)


def test_the_table_counts_the_classifier() -> None:
    model = network("cifar", layer="linear")
    plain = td.add_layer_gates(stock("cifar"), "linear")
    rows = td.cost_table(model, (3, 32, 32)).units
    for place, (row, other) in enumerate(zip(rows, td.cost_table(plain, (3, 32, 32)).units, strict=True), -1):
        asked = str(place) in model.layer_gates.certain
        assert row.layer_gate - other.layer_gate == (64 * 10 + 1 if asked else 0)


def test_a_dense_layer_pays_for_the_transitions_pooled_first() -> None:
    """[channels, places] of DenseNet 3-2-2 on 32 x 32: 24 + 3 * 12, 30 + 2 * 12, 27 + 2 * 12; 32, 16, 8 a side."""
    model, plain = network("cifar_dense", layer="linear"), td.add_layer_gates(stock("cifar_dense"), "linear")
    rows, others = (td.cost_table(net, (3, 32, 32)) for net in (model, plain))
    asked = [row.layer_gate - other.layer_gate for row, other in zip(rows.units[1:], others.units[1:], strict=True)]
    head, second, first = 51 * 10 + 1, 54 * 27 * 8 * 8, 60 * 30 * 16 * 16
    assert asked == [head + second + first] * 2 + [head + second] * 2 + [head] * 2
    assert rows.leave == others.leave
    assert rows.leave[0] == 4 * first


@pytest.mark.parametrize("layer", ["rnn", "ff1", "linear"])
@pytest.mark.parametrize("batch", [False, True])
@pytest.mark.parametrize("kind", ["basic", "dense"])
def test_exported(layer: str, batch: bool, kind: str, tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    model = network(kind, ("layer", "exits"), layer, EXPORTED)
    found = assert_parity(model, tmp_path / "x.onnx", count=12, batch=batch)
    assert 0 < found.layer_keep[:, 6].sum() < 12


@pytest.mark.parametrize("kind", ["cifar", "cifar_dense"])
def test_traced_and_exported_by_torch(kind: str) -> None:
    model, x = network(kind), images(3, 32)
    wanted = run(model, x)[0]
    with masked(model):
        program = torch.export.export(model, (x,))
        assert_near(program.module()(x), wanted)
        assert_near(torch.jit.trace(model, x)(x), wanted)
        assert_near(torch.compile(model, backend="eager", fullgraph=True)(x), wanted)


def test_hard_budgets_allow_for_it() -> None:
    model, x = network("basic", ("layer", "exits")), images(12)
    table = td.cost_table(model, (3, SIZE, SIZE))
    td.set_budget(model, macs=table.exits[-1].dearest - 1, input_size=(3, SIZE, SIZE))
    found = decide(model, x)
    assert found.macs.max() < table.exits[-1].dearest
    assert run(model, x)[1] == found.macs.sum()


# Settled, cut, saved -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", ["rnn", "linear"])
def test_settled_units_are_not_told(layer: str) -> None:
    model, x = network("cifar", layer=layer), images(4, 32)
    with heads_run(model) as seen:
        decide(model, x)
        assert seen == [4, 4, 4]  # two gates, and the end
        seen.clear()
        td.open_units(model, ["layer3.1"])
        decide(model, x)
        assert seen == [4, 4]
        seen.clear()
        td.shut_units(model, ["layer3.2"])
        decide(model, x)
        assert seen == [4]
    assert run(model, x)[1] == decide(model, x).macs.sum()


@pytest.mark.parametrize("fast", [False, True])
def test_a_pruned_network_forgets_what_it_cannot_ask(fast: bool) -> None:
    model = network("cifar", layer="rnn")
    model = td.optimize_for_inference(model) if fast else model
    model.layer_gates.cut(7)
    assert list(model.layer_gates.certain) == ["6"]
    assert units_of(model) == 7


def test_saved_and_loaded(tmp_path: Path) -> None:
    model, x = network("cifar"), images(5, 32)
    td.save_pretrained(model, tmp_path / "saved")
    again = timm.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=True).eval()
    assert again.layer_gates.config == td.LayerGateConfig(certainty=True)
    assert_same_decisions(decide(again, x), decide(model, x))


def test_the_card_says_who_is_told(tmp_path: Path) -> None:
    model = network("cifar")
    td.open_units(model, ["layer3.2"])
    td.save_pretrained(model, tmp_path / "saved")
    card = (tmp_path / "saved" / "README.md").read_text()
    assert "units whose gates are told how certain the network's classifier is of their input: `layer3.1`\n" in card
    assert "units that every image runs that comes there: `layer3.2`\n" in card


def test_a_config_from_before_has_none() -> None:
    values = td.LayerGateConfig().to_dict()
    assert values.pop("certainty") is False
    assert td.LayerGateConfig.from_dict(values) == td.LayerGateConfig()


def test_spreading_leaves_it_for_training() -> None:
    model = td.add_layer_gates(stock("cifar"), td.LayerGateConfig(init="random", certainty=True))
    spread_gates(model, images(16, 32))
    assert all(not weight.any() for weight in model.layer_gates.certain.parameters())


# Wrong use -----------------------------------------------------------------------------------------------------------


def test_where_the_classifier_can_be_asked_nowhere() -> None:
    model = stock("tv_basic")  # its last stage has one unit alone
    before = state_of(model)
    with pytest.raises(ValueError, match="certainty is for dense layers, and for residual units within the last stage"):
        td.add_layer_gates(model, td.LayerGateConfig(certainty=True))
    assert_same_state(state_of(model), before)


def test_it_is_a_yes_or_no() -> None:
    with pytest.raises(ValueError, match="certainty must be True or False; found 'yes'"):
        td.LayerGateConfig(certainty="yes")  # type: ignore[arg-type]
