"""Costs in milliseconds and millijoules, and budgets in them."""

import dataclasses
import json
import re
from typing import Any

import pytest
import timm
import torch
from torch import nn

import timm_dynamic as td
from timm_dynamic.budgets import set_price
from timm_dynamic.measure import machine_name

SIZE = (3, 32, 32)


def _model(name: str = "ddi_resnet20_cifar", **kwargs: Any) -> nn.Module:
    return timm.create_model(name, **kwargs).eval()


def test_energy_of_a_stock_network_by_hand() -> None:
    """A BasicBlock of 16 channels at 32 x 32: two 3x3 convolutions, each reads and writes 16 maps and its weights."""
    table = td.cost_table(_model("resnet20_cifar"), SIZE, "energy_mj", energy={"pj_per_mac": 2.0, "pj_per_byte": 10.0})
    macs = 2 * 9 * 16 * 16 * 32 * 32
    moved = 2 * 4 * (2 * 16 * 32 * 32 + 9 * 16 * 16)
    assert table.units[0].full == pytest.approx((macs * 2.0 + moved * 10.0) * 1e-9, rel=1e-9)
    head = (640 * 2.0 + 4 * (64 + 640 + 10 + 10) * 10.0) * 1e-9  # input, weights, bias, output
    assert table.exits[-1].head == pytest.approx(head, rel=1e-9)


def test_energy_is_the_sum_of_its_parts() -> None:
    table = td.cost_table(_model(), SIZE, "energy_mj")
    assert table.dense == pytest.approx(
        table.stem + sum(unit.full for unit in table.units) + sum(table.leave) + table.exits[-1].head
    )


def test_latency_is_measured_and_leaves_the_model_as_it_was() -> None:
    model = _model().train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    table = td.cost_table(model, SIZE, "latency_ms")
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert table.machine == machine_name(model)
    assert 0 < table.exits[0].dearest < table.exits[1].dearest < table.exits[2].dearest
    assert table.units[1].layer_gate > 0


@pytest.mark.parametrize("unit", ["latency_ms", "energy_mj"])
def test_no_image_goes_past_its_budget(unit: str) -> None:
    model = _model()
    table = td.cost_table(model, SIZE, unit)
    x = torch.randn(16, 3, 32, 32)
    for stop in range(3):
        td.set_budget(model, **{unit: table.exits[stop].dearest * 1.001}, table=table)
        with td.force(model, layer_keep=1.0, channel_keep=1.0):
            assert td.decide(model, x).exit_index.tolist() == [stop] * 16
    td.set_budget(model, **{unit: table.exits[1].dearest * 1.001}, table=table)
    with td.force(model, layer_keep=0.0):  # what five skipped units leave is spent on the last three
        reached = td.decide(model, x).exit_index
    assert reached.min() >= 1
    if unit == "energy_mj":  # counted, not measured
        assert reached.tolist() == [2] * 16


def test_wrong_tables_are_refused() -> None:
    model = _model()
    energy, latency = td.cost_table(model, SIZE, "energy_mj"), td.cost_table(model, SIZE, "latency_ms")
    other = td.cost_table(_model("ddi_resnet32_cifar"), SIZE, "energy_mj")
    elsewhere = dataclasses.replace(latency, machine="another")
    td.set_budget(model, exit=1)
    before = model.dynamic.budget
    for options, message in (
        ({"latency_ms": 1e3, "table": energy}, "must be in latency_ms; found energy_mj"),
        ({"energy_mj": 1e3, "table": other}, "of another model than 'ddi_resnet20_cifar'"),
        ({"latency_ms": 1e3, "table": elsewhere}, "measured on another machine: another"),
        ({"macs": 10**9, "table": energy}, "goes with latency_ms= or energy_mj="),
        ({"energy_mj": 1e-6, "table": energy}, "the smallest budget possible"),
        ({"energy_mj": 1e3, "table": energy, "input_size": (3, 64, 64)}, "must be for input size"),
    ):
        with pytest.raises(ValueError, match=message):
            td.set_budget(model, **options)
        assert model.dynamic.budget is before
    td.set_budget(model, energy_mj=1e3, table=energy)
    with pytest.raises(ValueError, match=r"is for input size \(3, 32, 32\); found \(3, 64, 64\)"):
        model(torch.randn(1, 3, 64, 64))


def test_wrong_units_and_energies_are_refused() -> None:
    model = _model()
    with pytest.raises(ValueError, match="'macs', 'latency_ms', 'energy_mj'; found 'flops'"):
        td.cost_table(model, SIZE, "flops")
    with pytest.raises(ValueError, match="goes with unit='energy_mj'"):
        td.cost_table(model, SIZE, energy={})
    with pytest.raises(ValueError, match="pj_per_byte must be a finite number above 0"):
        td.EnergyConfig(pj_per_byte=0)


@pytest.mark.parametrize("unit", ["latency_ms", "energy_mj"])
def test_training_can_be_priced_in_any_unit(unit: str) -> None:
    model = _model().train()
    table = td.cost_table(model, SIZE, unit)
    set_price(model, table)
    x = torch.randn(4, 3, 32, 32)
    decisions = td.decide(model, x)
    expected = table.exits[-1].dearest + sum(stop.head for stop in table.exits[:-1])
    assert decisions.cost.tolist() == pytest.approx([expected] * 4)
    decisions.cost.sum().backward()
    assert all(gate.fc.bias.grad.abs().sum() > 0 for gate in model.channel_gates.gates)
    set_price(model, None)
    assert torch.equal(td.decide(model, x).cost, td.decide(model, x).macs.float())


def test_energy_of_every_part_from_a_table_of_the_users() -> None:
    model = _model("ddi_densenet100_cifar", block_config=(3, 2, 2))
    names = [unit.name for unit in td.cost_table(model, SIZE).units]
    parts = {"stem": 1.0, "leave 0": 0.5, "leave 1": 0.25, "exit 0": 0.1, "exit 1": 0.2, "head": 0.3}
    parts |= {name: 2.0 + i for i, name in enumerate(names)}
    table = td.cost_table(model, SIZE, "energy_mj", energy={"parts": parts})
    plain = td.cost_table(model, SIZE, "energy_mj")
    assert [unit.full for unit in table.units] == pytest.approx([2.0 + i for i in range(len(names))])
    assert table.dense == pytest.approx(sum(parts.values()) - 0.3)
    assert [stop.head for stop in table.exits] == pytest.approx([0.1, 0.2, 0.3])
    gates = sum(unit.layer_gate + unit.channel_gate for unit in plain.units)
    assert table.dearest == pytest.approx(table.dense + gates)
    first = sum(unit.dearest for unit in table.units[:3])
    assert table.exits[0].dearest == pytest.approx(1.0 + first + 0.1)
    td.set_budget(model, energy_mj=table.dense * 0.9, input_size=SIZE, table=table)
    for name in ("stem", names[2], "exit 1"):
        with pytest.raises(ValueError, match=f"missing: {re.escape(name)}; unknown: none"):
            td.cost_table(model, SIZE, "energy_mj", energy={"parts": {k: v for k, v in parts.items() if k != name}})
    with pytest.raises(ValueError, match="missing: none; unknown: heads"):
        td.cost_table(model, SIZE, "energy_mj", energy={"parts": {**parts, "heads": 1.0}})
    with pytest.raises(ValueError, match=r"parts\['stem'\] must be a finite number above 0"):
        td.cost_table(model, SIZE, "energy_mj", energy={"parts": {**parts, "stem": 0}})


@pytest.mark.parametrize("unit", ["macs", "energy_mj"])
def test_a_table_goes_through_json(unit: str) -> None:
    table = td.cost_table(_model(), SIZE, unit)
    assert td.CostTable.from_dict(json.loads(json.dumps(table.to_dict()))) == table
