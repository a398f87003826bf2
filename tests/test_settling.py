"""Units that are shut or open for good: their gates are not asked, and what nobody runs costs nothing."""

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from nets import (
    FEW,
    LAYER_KINDS,
    assert_near,
    assert_same_decisions,
    decide,
    dynamic,
    gated,
    images,
    masked,
    mixed,
    run,
    stock,
    undecided,
    units_of,
)
from torch import nn

import timm_dynamic as td
from timm_dynamic import families, units
from timm_dynamic.tasks import DynamicTask, FollowTask, WarmupTask
from timm_dynamic.walk import Walk

SIZE = (3, 40, 40)


def some(model: nn.Module) -> list[int]:
    """Places of two gated units, the first and the last."""
    return [0, units_of(model) - 1]


def shut(model: nn.Module) -> list[str]:
    """Shut two units; their names."""
    names = [gated(model)[place] for place in some(model)]
    assert td.shut_units(model, names) is model
    return names


# What is run ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FEW)
@pytest.mark.parametrize("layer", LAYER_KINDS)
def test_shut_units_are_those_that_nobody_keeps(kind: str, layer: str) -> None:
    model, x = undecided(kind, layer=layer), images(6)
    before = decide(model, x)
    forced = torch.ones(6, units_of(model), dtype=torch.bool)
    forced[:, some(model)] = False
    with td.force(model, layer_keep=forced):
        wanted = decide(model, x)
    shut(model)
    with td.force(model, layer_keep=1.0):
        found = decide(model, x)
        with masked(model):
            assert_same_decisions(decide(model, x), found)
    assert torch.equal(found.layer_keep, wanted.layer_keep)
    assert_near(found.logits, wanted.logits)
    own = decide(model, x)
    assert not own.layer_keep[:, some(model)].any()
    logits, macs = run(model, x)
    assert macs == own.macs.sum()
    assert_near(logits, own.logits)
    td.shut_units(model, [])
    assert_same_decisions(decide(model, x), before)


def test_nothing_is_asked_of_shut_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, reading who keeps a unit means waiting for it."""
    model, asked = undecided("basic"), []
    names, skipping = shut(model), units.run_skipping
    monkeypatch.setattr(units, "run_skipping", lambda unit, *rest: asked.append(unit.name) or skipping(unit, *rest))
    decide(model, images(4))
    assert asked == [unit.name for unit in families.units(model) if unit.name not in names]


def test_a_feed_forward_gate_of_a_shut_unit_is_not_run() -> None:
    model = undecided("basic", ("layer",), layer="ff2")
    before = td.cost_table(model, SIZE).units
    shut(model)
    after = td.cost_table(model, SIZE).units
    for place, (old, new) in enumerate(zip(before, after, strict=True)):
        expected = 0 if place - 1 in some(model) else old.layer_gate
        assert new.layer_gate == expected
    assert td.cost_table(model, SIZE).dense == td.cost_table(stock("basic"), SIZE).dense


def test_thresholds_do_not_open_them() -> None:
    model = undecided("basic", ("layer",))
    shut(model)
    model.layer_gates.threshold.zero_()
    keep = decide(model, images(4)).layer_keep
    assert keep.sum(0).tolist() == [0 if place in some(model) else 4 for place in range(units_of(model))]


def test_calibration_does_not_open_them() -> None:
    model = undecided("basic", ("layer", "exits"))
    shut(model)
    loader = [(images(64, 32), torch.randint(10, (64,)))]
    td.calibrate(model, loader, decide(model, images(64, 32)).macs.double().mean().item() / _dense(model, 32))
    assert not decide(model, images(8)).layer_keep[:, some(model)].any()


def _dense(model: nn.Module, size: int) -> int:
    return int(td.cost_table(model, (3, size, size)).dense)


def test_optimised_copies() -> None:
    model, x = undecided("basic"), images(4)
    fast = td.optimize_for_inference(model)
    shut(model)
    assert_same_decisions(decide(td.optimize_for_inference(model), x), decide(model, x))
    td.shut_units(fast, model.layer_gates.config.shut)
    assert_same_decisions(decide(fast, x), decide(model, x))
    least = td.cost_table(model, SIZE).exits[0].dearest
    td.set_budget(fast, macs=least, input_size=SIZE)
    assert decide(fast, x).macs.max() <= least


@pytest.mark.parametrize("layer", ["rnn", "ff2"])
@pytest.mark.parametrize("batch", [False, True])
def test_exported_networks(layer: str, batch: bool, tmp_path: Path) -> None:
    model, x = undecided("basic", ("layer", "exits"), layer=layer), images(4, 32)
    shut(model)
    td.export_onnx(model, tmp_path / "model.onnx", (3, 32, 32), dynamic_batch=batch)
    logits, _, macs = td.onnx_runner(tmp_path / "model.onnx", threads=1)(x.numpy())
    wanted = decide(model, x)
    assert_near(torch.from_numpy(logits), wanted.logits)
    assert macs.tolist() == wanted.macs.tolist()


# Units that are open for good ----------------------------------------------------------------------------------------


def opened(model: nn.Module) -> list[int]:
    """Open two gated units for good, the second and the last; their places."""
    places = [1, units_of(model) - 1]
    assert td.open_units(model, [gated(model)[place] for place in reversed(places)]) is model
    return places


def gates_run(model: nn.Module, x: torch.Tensor) -> list[int]:
    """Places of the layer gates that a forward pass runs."""
    found: list[int] = []
    gates: Any = model.layer_gates
    watched = list(gates.gates) if hasattr(gates, "gates") else [gates.cell]
    handles = [module.register_forward_hook(lambda *_, k=k: found.append(k)) for k, module in enumerate(watched)]
    decide(model, x)
    for handle in handles:
        handle.remove()
    return found if hasattr(gates, "gates") else list(range(len(found)))


@pytest.mark.parametrize("kind", FEW)
@pytest.mark.parametrize("layer", LAYER_KINDS)
def test_open_units_are_those_that_everybody_keeps(kind: str, layer: str) -> None:
    model, x = undecided(kind, layer=layer), images(6)
    before, first = decide(model, x), td.cost_table(model, SIZE)
    other = copy.deepcopy(model)
    places = opened(model)
    other.layer_gates.threshold[places] = 0.0
    wanted, found = decide(other, x), decide(model, x)
    assert not torch.equal(before.layer_keep, found.layer_keep)
    assert torch.equal(found.layer_keep, wanted.layer_keep)
    assert_near(found.logits, wanted.logits)
    with masked(model):
        assert_same_decisions(decide(model, x), found)
    gates = [row.layer_gate for row in first.units]
    spared = sum(gates) - sum(row.layer_gate for row in td.cost_table(model, SIZE).units)
    assert spared > 0
    assert torch.equal(found.macs, wanted.macs - spared)
    logits, macs = run(model, x)
    assert macs == found.macs.sum()
    assert_near(logits, found.logits)
    with td.force(model, layer_keep=0.0):
        kept = decide(model, x).layer_keep
    assert kept.sum(0).tolist() == [6 if place in places else 0 for place in range(units_of(model))]
    td.open_units(model, [])
    assert_same_decisions(decide(model, x), before)


@pytest.mark.parametrize("layer", ["rnn", "ff2"])
def test_gates_of_settled_units_are_not_asked(layer: str) -> None:
    model, x = undecided("basic", ("layer",), layer=layer), images(3)
    count = units_of(model)
    assert gates_run(model, x) == list(range(count))
    places = opened(model)
    td.shut_units(model, [gated(model)[0]])
    # what an RNN gate sees is wanted by the gates behind it, whatever becomes of its own unit
    last = list(range(count - 1))
    assert gates_run(model, x) == (last if layer == "rnn" else [p for p in last if p not in (0, *places)])
    td.open_units(model, gated(model)[1:])
    assert gates_run(model, x) == []
    table = td.cost_table(model, SIZE)
    assert not any(row.layer_gate for row in table.units)
    assert table.cheapest == table.dearest == int(decide(model, images(1)).macs)
    prob = decide(model, x).layer_prob
    assert prob.tolist() == [[0.0] + [1.0] * (count - 1)] * 3


def test_a_memory_of_free_units_alone() -> None:
    model, x = undecided("basic", ("layer",)), images(3)
    names, count = gated(model), units_of(model)
    other = td.add_layer_gates(stock("basic"), td.LayerGateConfig(shut=(names[0],), open=(names[1],), memory="free"))
    other.load_state_dict(model.state_dict())
    assert gates_run(other.eval(), x) == list(range(count - 2))
    td.open_units(td.shut_units(model, names[:1]), names[1:2])
    assert gates_run(model, x) == list(range(count))
    walk = Walk(other, x)
    walk.to_unit(2)  # gated unit 2 comes next: for its gate there was none before
    assert torch.equal(decide(other, x).layer_prob[:, 2], other.layer_gates(2, walk.x, None)[0])
    fast = td.optimize_for_inference(other)
    assert_same_decisions(decide(fast, x), decide(other, x))
    with masked(other):
        assert_same_decisions(decide(other, x), decide(fast, x))


def test_nobody_waits_to_see_who_keeps_an_open_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = undecided("basic"), []
    names, skipping = [gated(model)[place] for place in opened(model)], units.run_skipping
    monkeypatch.setattr(units, "run_skipping", lambda u, x, k, *r: asked.append((u.name, k)) or skipping(u, x, k, *r))
    decide(model, images(4))
    first = families.units(model)[0].name
    assert [name for name, keep in asked if keep is None] == [first, *names]


@pytest.mark.parametrize("parts", [("layer", "channel", "exits"), ("layer", "exits")])
@pytest.mark.parametrize("layer", ["rnn", "ff2"])
@pytest.mark.parametrize("batch", [False, True])
def test_exported_with_open_units(parts: tuple[str, ...], layer: str, batch: bool, tmp_path: Path) -> None:
    model, x = undecided("basic", parts, layer=layer), images(4, 32)
    opened(model)
    td.shut_units(model, [gated(model)[0]])
    td.export_onnx(model, tmp_path / "model.onnx", (3, 32, 32), dynamic_batch=batch)
    logits, _, macs = td.onnx_runner(tmp_path / "model.onnx", threads=1)(x.numpy())
    wanted = decide(model, x)
    assert_near(torch.from_numpy(logits), wanted.logits)
    assert macs.tolist() == wanted.macs.tolist()


def test_optimised_copies_with_open_units() -> None:
    model, x = undecided("basic"), images(4)
    fast = td.optimize_for_inference(model)
    opened(model)
    assert_same_decisions(decide(td.optimize_for_inference(model), x), decide(model, x))
    td.open_units(fast, model.layer_gates.config.open)
    assert_same_decisions(decide(fast, x), decide(model, x))


@pytest.mark.parametrize("layer", ["rnn", "ff1"])
def test_training_with_open_units(layer: str) -> None:
    model, x, y = undecided("basic", ("layer", "exits"), layer=layer).train(), images(4), torch.arange(4)
    td.shut_units(model, gated(model)[:1])
    td.open_units(model, gated(model)[1:])
    found = decide(model, x)
    assert found.layer_keep[:, 1:].eq(1).all()
    assert not found.layer_keep[:, 0].any()
    assert not found.layer_prob.requires_grad
    DynamicTask(model, _dense(model, 40), 10, target=0.5)(x, y)["loss"].backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    assert all(grad is not None for grad in grads.values()), "other processes meet every parameter"
    assert not any(bool(grad.any()) for name, grad in grads.items() if name.startswith("layer_gates."))
    assert all(bool(grads[f"{name}.conv1.weight"].any()) for name in gated(model)[1:])


@pytest.mark.parametrize("task", [WarmupTask, lambda model: FollowTask(model, "0" + "1" * (units_of(model) - 1))])
def test_gates_of_settled_units_have_nothing_to_learn(task: Any) -> None:
    model = undecided("basic", ("layer",)).train()
    td.shut_units(model, gated(model)[:1])
    td.open_units(model, gated(model)[1:])
    task(model)(images(4), torch.arange(4))["loss"].backward()
    assert not any(bool(p.grad.any()) for p in model.layer_gates.parameters() if p.grad is not None)


def test_busy_units() -> None:
    model, x = undecided("basic"), images(20)
    share = decide(model, x).layer_keep.double().mean(0).tolist()
    for limit in (0.0, min(share), sorted(share)[len(share) // 2], 1.0):
        wanted = tuple(name for name, one in zip(gated(model), share, strict=True) if one >= limit)
        assert td.busy_units(model, x.split(7), limit) == wanted
    td.open_units(model, td.busy_units(model, [x], 0.5))
    keep = decide(model, x).layer_keep
    assert all(keep[:, place].all() for place in model.layer_gates.settled)
    assert set(model.layer_gates.config.open) <= set(td.busy_units(model, [x]))


def test_open_units_are_saved(tmp_path: Path) -> None:
    model = timm.create_model("ddi_resnet20_cifar")
    td.shut_units(td.open_units(model, ["layer3.1"]), ["layer1.1"])
    td.save_pretrained(model, tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "each image decides which units run" in text
    assert "units that every image runs that comes there: `layer3.1`" in text
    found = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert found.layer_gates.settled == model.layer_gates.settled == {0: False, 6: True}
    td.open_units(model, gated(model)[1:])
    row = {"target": 0.3, "threshold": None, "confidence": 0.8, "accuracy": 0.5, "macs": 1e6, "max_macs": 2e6}
    metrics = {"dataset": "digits", "calibrated": {"images": 60, "held_out": True, "rows": [row]}}
    td.save_pretrained(model, tmp_path, metrics=metrics)
    text = (tmp_path / "README.md").read_text()
    assert "not asked any more: all units are settled" in text
    assert "\n| target | images leave from a confidence of |\n|---|---|\n| 30% of the base | 0.8 |\n" in text
    assert "gates keep from" not in text
    row["threshold"] = 0.25
    td.save_pretrained(model, tmp_path, metrics=metrics)
    wanted = "\n| target | gates keep from a probability of | images leave from a confidence of |\n|---|---|---|\n"
    assert f"{wanted}| 30% of the base | 0.25 | 0.8 |\n" in (tmp_path / "README.md").read_text()


def test_calibration_without_a_free_gate_moves_exits_alone() -> None:
    model = undecided("basic", ("layer", "exits"))
    td.open_units(model, gated(model))
    loader = [(images(64, 32), torch.randint(10, (64,)))]
    before = model.layer_gates.threshold.clone()
    found = td.calibrate(model, loader, td.cost_table(model, (3, 32, 32)).exits[0].dearest / _dense(model, 32))
    assert torch.equal(model.layer_gates.threshold, before)
    assert found.threshold == before[0].item()
    with pytest.raises(ValueError, match="not all settled; found none"):
        td.calibrate(model, loader, 0.5, use="gates")


def test_no_unit_is_shut_and_open() -> None:
    model = td.shut_units(undecided("basic"), ["layer1.1"])
    before = model.layer_gates.config
    with pytest.raises(ValueError, match=r"shut for good or open for good; found both: layer1\.1"):
        td.open_units(model, ["layer1.1"])
    with pytest.raises(ValueError, match=r"be open for good: layer1\.1, .*found 'layer9\.9'"):
        td.open_units(model, ["layer9.9"])
    assert model.layer_gates.settled == {0: False}
    assert model.layer_gates.config == before


def test_a_table_without_a_gate_does_not_tell_its_cost() -> None:
    model = undecided("basic", layer="ff2")
    places = opened(model)
    table = td.cost_table(model, SIZE, "energy_mj")
    td.set_budget(model, energy_mj=table.exits[-1].dearest, table=table, input_size=SIZE)
    with pytest.raises(ValueError, match=r"gate of layer2\.0 was not asked.*make it anew"):
        td.open_units(model, [])
    assert sorted(model.layer_gates.settled) == places


@pytest.mark.parametrize("fast", [False, True])
def test_stages_that_are_cut_off_take_their_open_units_along(fast: bool) -> None:
    model, x = undecided("basic", ("layer",)), images(2)
    td.open_units(model, [gated(model)[0], gated(model)[-1]])
    model = td.optimize_for_inference(model) if fast else model
    before = decide(model, x).layer_keep
    model.prune_intermediate_layers([1])
    assert model.layer_gates.settled == {0: True}
    found = decide(model, x).layer_keep
    assert torch.equal(found, before[:, : found.shape[1]])


# Budgets -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FEW)
def test_budgets_need_not_allow_for_them(kind: str) -> None:
    model, x = undecided(kind), images(8)
    open_table = td.cost_table(model, SIZE)
    shut(model)
    table = td.cost_table(model, SIZE)
    saved = sum(open_table.units[place + 1].dearest - table.units[place + 1].cheapest for place in some(model))
    assert table.exits[-1].dearest == open_table.exits[-1].dearest - saved
    assert table.exits[0].dearest < open_table.exits[0].dearest
    assert table.dense == open_table.dense
    for macs in (table.exits[0].dearest, (table.exits[0].dearest + table.exits[-1].dearest) // 2):
        td.set_budget(model, macs=macs, input_size=SIZE)
        found = decide(model, x)
        assert found.macs.max() <= macs
    td.set_budget(model, macs=table.exits[-1].dearest, input_size=SIZE)
    assert (decide(model, x).exit_index == len(table.exits) - 1).all(), "the whole way fits"


def test_opening_what_a_budget_does_not_allow_for() -> None:
    model = undecided("basic")
    names = shut(model)
    table = td.cost_table(model, SIZE)
    td.set_budget(model, macs=table.exits[0].dearest, input_size=SIZE)
    with pytest.raises(ValueError, match="too small"):
        td.shut_units(model, [])
    assert model.layer_gates.config.shut == tuple(names)
    assert td.cost_table(model, SIZE).exits == table.exits
    assert decide(model, images(4)).macs.max() <= table.exits[0].dearest


def test_budgets_of_another_unit_follow() -> None:
    model = undecided("basic")
    table = td.cost_table(model, SIZE, "energy_mj")
    td.set_budget(model, energy_mj=table.exits[-1].dearest, table=table, input_size=SIZE)
    shut(model)
    least = td.cost_table(model, SIZE, "energy_mj").exits[0].dearest
    assert model.dynamic.limit.exits[0].dearest == pytest.approx(least)
    assert least < table.exits[0].dearest
    td.set_budget(model, energy_mj=1.001 * least, table=table, input_size=SIZE)  # a table from before
    td.set_budget(model)
    td.shut_units(model, [])
    with pytest.raises(ValueError, match="too small"):
        td.set_budget(model, energy_mj=1.001 * least, input_size=SIZE)


# Training ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", ["rnn", "ff1"])
def test_training_leaves_them_out(layer: str) -> None:
    model, x, y = dynamic("basic", layer=layer).train(), images(4), torch.arange(4)
    names = shut(model)
    ran: list[str] = []
    for name in gated(model):
        model.get_submodule(name).conv1.register_forward_hook(lambda *_, name=name: ran.append(name))
    task = DynamicTask(model, _dense(model, 40), 10, target=0.5)
    task(x, y)["loss"].backward()
    assert set(ran) == set(gated(model)) - set(names)
    grads = {name: p.grad for name, p in model.named_parameters()}
    assert all(grad is not None for grad in grads.values()), "other processes meet every parameter"
    for name in gated(model):
        moved = any(bool(grad.any()) for key, grad in grads.items() if key.startswith(f"{name}.conv"))
        assert moved == (name not in names)


def test_gates_that_follow_a_policy_with_shut_units() -> None:
    model = undecided("basic", ("layer",), layer="ff2").train()
    shut(model)
    policy = "".join("0" if place in some(model) else "1" for place in range(units_of(model)))
    found = FollowTask(model, policy)(images(4), torch.arange(4))
    found["loss"].backward()
    assert all(p.grad is not None for p in model.layer_gates.parameters())


# Finding them --------------------------------------------------------------------------------------------------------


def test_idle_units() -> None:
    model, x = undecided("basic").train(), images(20)
    keep = copy.deepcopy(model).eval()
    share = decide(keep, x).layer_keep.double().mean(0).tolist()
    assert 0 < min(share) < max(share)
    before = copy.deepcopy(model.state_dict())
    for limit in (0.0, min(share), sorted(share)[len(share) // 2], 1.0):
        wanted = tuple(name for name, one in zip(gated(model), share, strict=True) if one <= limit)
        assert td.idle_units(model, x.split(7), limit) == wanted
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    names = shut(model)
    assert set(names) <= set(td.idle_units(model, [x]))


def test_idle_units_are_those_of_the_whole_way() -> None:
    model, x = undecided("basic"), images(8)
    wanted = td.idle_units(model, [x], 0.5)
    td.set_budget(model, exit=0)
    assert td.idle_units(model, [x], 0.5) == wanted
    with td.force(model, layer_keep=1.0):
        assert td.idle_units(model, [x], 0.5) == wanted


# Saving, and what makes no sense -------------------------------------------------------------------------------------


def test_saved_and_made_by_name(tmp_path: Path) -> None:
    model = timm.create_model("ddi_resnet20_cifar")
    td.shut_units(model, ["layer3.1", "layer1.1"])
    assert model.layer_gates.config.shut == ("layer1.1", "layer3.1")
    td.save_pretrained(model, tmp_path)
    assert "units that no image runs: `layer1.1`, `layer3.1`" in (tmp_path / "README.md").read_text()
    found = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert found.layer_gates.config == model.layer_gates.config
    assert found.layer_gates.settled == model.layer_gates.settled == {0: False, 6: False}
    opened = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, layer_gates="rnn")
    assert opened.layer_gates.settled == {}
    other = timm.create_model("ddi_resnet20_cifar", layer_gates={"kind": "ff1", "shut": ["layer1.2"]})
    assert other.layer_gates.settled == {1: False}


@pytest.mark.parametrize(
    ("make", "names", "message"),
    [
        (
            lambda: dynamic("basic"),
            ["layer1.1", "layer9.9"],
            "be shut for good: layer1.1, .*found 'layer9",
        ),
        (lambda: dynamic("basic"), ["layer1.0"], "found 'layer1.0'"),
        (lambda: dynamic("basic", ("channel",)), ["layer1.1"], "only layer gates shut or open units"),
        (lambda: stock("basic"), ["layer1.1"], "a dynamic model is needed"),
    ],
)
def test_what_cannot_be_shut(make: Any, names: list[str], message: str) -> None:
    model = make()
    with pytest.raises(ValueError, match=message):
        td.shut_units(model, names)
    assert not getattr(getattr(model, "layer_gates", None), "settled", {})


def test_bad_arguments() -> None:
    model = dynamic("basic")
    with pytest.raises(ValueError, match="without images; found none"):
        td.idle_units(model, [])
    with pytest.raises(ValueError, match="share must be a number in"):
        td.idle_units(model, [images(2)], 1.5)
    with pytest.raises(ValueError, match="found 'layer7'"):
        td.add_layer_gates(stock("basic"), {"shut": ["layer7"]})
    with pytest.raises(ValueError, match="shut must be a tuple of names"):
        td.LayerGateConfig(shut="layer1.1")  # type: ignore[arg-type]
    forced = mixed(td.shut_units(model, ["layer1.1"]), 2)
    with td.force(model, **forced):
        assert not decide(model, images(2)).layer_keep[:, 0].any()
