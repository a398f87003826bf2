"""Budgets: hard ones are never exceeded and are spent; soft ones do what they say."""

import copy
import re
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import timm
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nets import (
    FEW,
    assert_near,
    assert_same_state,
    decide,
    dynamic,
    images,
    masked,
    run,
    state_of,
    stock,
    undecided,
)
from torch import Tensor, nn

import timm_dynamic as td
from timm_dynamic.costs import CostTable
from timm_dynamic.walk import table_for

SIZE = 40
SMALL = (3, SIZE, SIZE)


def table(model: nn.Module) -> CostTable:
    return table_for(model, SMALL)  # the one that the model keeps: `td.cost_table` counts anew


def between(model: nn.Module) -> int:
    """A budget that lets every image go to the second exit, and none at its dearest to the third."""
    exits = table(model).exits
    return (exits[1].dearest + exits[2].dearest) // 2


def assert_kept_and_spent(model: nn.Module, decisions: td.Decisions, budget: Tensor) -> None:
    """No image above its budget; going on would not have fitted in the dearest case."""
    costs = table(model)
    assert (decisions.macs <= budget).all()
    for macs, index, most in zip(decisions.macs.tolist(), decisions.exit_index.tolist(), budget.tolist(), strict=True):
        if index < len(costs.exits) - 1:
            on_the_way = macs - costs.exits[index].head
            assert on_the_way + costs.segment(index + 1) > most


# Hard budgets --------------------------------------------------------------------------------------------------------


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    """Random decisions and budgets for a batch; a budget is a place between the smallest and above the dearest."""
    batch = draw(st.integers(1, 5))
    ratio = st.sampled_from([0.0, 0.2, 0.5, 0.8, 1.0])
    return {
        "batch": batch,
        "seed": draw(st.integers(0, 10**6)),
        "layer": draw(ratio),
        "channel": draw(ratio),
        "places": draw(st.lists(st.floats(0, 1.05), min_size=batch, max_size=batch)),
        "alike": draw(st.booleans()),
        "exit": draw(st.none() | st.lists(st.integers(0, 3), min_size=batch, max_size=batch)),
    }


@pytest.mark.parametrize("kind", FEW)
@given(case=cases())
@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
def test_no_image_is_ever_above_its_budget(kind: str, case: dict[str, Any]) -> None:
    model = dynamic(kind, channel=td.ChannelGateConfig(8))
    costs = table(model)
    least, room = costs.exits[0].dearest, costs.dearest - costs.exits[0].dearest
    budget = torch.tensor([least + int(place * room) for place in case["places"]])
    if case["alike"]:
        budget = budget[:1].expand(case["batch"])
    td.set_budget(model, macs=budget[0].item() if case["alike"] else budget, input_size=SMALL)
    torch.manual_seed(case["seed"])
    forced = {"layer_keep": case["layer"], "channel_keep": case["channel"]}
    with td.force(model, **forced):
        decisions = decide(model, images(case["batch"]))
        assert_kept_and_spent(model, decisions, budget)
        torch.manual_seed(case["seed"])
        with masked(model):
            assert torch.equal(decide(model, images(case["batch"])).macs, decisions.macs)
    leave = case["exit"] if case["exit"] is None else torch.tensor(case["exit"])
    with td.force(model, **forced, exit=leave):
        assert (decide(model, images(case["batch"])).macs <= budget).all()


@pytest.mark.parametrize("kind", FEW)
@pytest.mark.parametrize("batch", [1, 8])
def test_the_gates_own_decisions_keep_budgets(kind: str, batch: int) -> None:
    model = undecided(kind)
    costs = table(model)
    for most in np.linspace(costs.exits[0].dearest, costs.dearest, 6).astype(int):
        td.set_budget(model, macs=int(most), input_size=SMALL)
        decisions = decide(model, images(batch))
        assert_kept_and_spent(model, decisions, torch.tensor([int(most)] * batch))


@pytest.mark.parametrize("make", [dynamic, undecided], ids=["open", "undecided"])
@pytest.mark.parametrize("kind", FEW)
def test_a_larger_budget_never_goes_less_far(kind: str, make: Callable[[str], nn.Module]) -> None:
    model, x = make(kind), images(8)
    exits = table(model).exits
    heads = torch.tensor([row.head for row in exits])
    budgets = [row.dearest + more for row in exits for more in (-1, 0)][1:]
    found = [decide(td.set_budget(model, macs=most, input_size=SMALL), x) for most in budgets]
    for less, more in pairwise(found):
        assert (less.exit_index <= more.exit_index).all()
        # the classifier aside: an image that skips all that is left may pay less for the head than for an exit
        assert (less.macs - heads[less.exit_index] <= more.macs - heads[more.exit_index]).all()
        assert make is undecided or (less.macs <= more.macs).all()
    patterns = {tuple(d.exit_index.tolist()) for d in found}
    assert len(patterns) > 1
    assert make is undecided or patterns == {(0,) * 8, (1,) * 8, (2,) * 8, (3,) * 8}
    assert found[-1].exit_index.tolist() == [3] * 8


@pytest.mark.parametrize("kind", FEW)
def test_what_gates_save_is_spent_on_going_further(kind: str) -> None:
    model = dynamic(kind)
    td.set_budget(model, macs=between(model), input_size=SMALL)
    assert decide(model, images(2)).exit_index.tolist() == [1, 1]
    with td.force(model, layer_keep=0.0):
        assert min(decide(model, images(2)).exit_index.tolist()) > 1


def test_budgets_at_the_edges() -> None:
    model = dynamic("basic", ["exits"])
    costs = table(model)
    for index, row in enumerate(costs.exits):
        td.set_budget(model, macs=row.dearest, input_size=SMALL)
        assert decide(model, images(1)).exit_index.tolist() == [index]
        if index:
            td.set_budget(model, macs=row.dearest - 1, input_size=SMALL)
            assert decide(model, images(1)).exit_index.tolist() == [index - 1]


def test_each_image_has_its_own_budget() -> None:
    model = dynamic("bottleneck")
    exits = table(model).exits
    td.set_budget(model, macs=[exits[i].dearest for i in (2, 0, 3, 1)], input_size=SMALL)
    for execution in ("skip", "masked"):
        assert decide(td.set_execution(model, execution), images(4)).exit_index.tolist() == [2, 0, 3, 1]


def test_fraction_is_of_the_stock_model() -> None:
    model = dynamic("basic", ["exits"])
    wanted = run(stock("basic"), images(1))[1]
    td.set_budget(model, fraction=1.0, input_size=SMALL)
    decisions = decide(model, images(1))
    assert (decisions.exit_index.tolist(), decisions.macs.tolist()) == ([3], [wanted])
    td.set_budget(model, fraction=1 - 1e-6, input_size=SMALL)
    assert decide(model, images(1)).exit_index.tolist() == [2]
    bigger = run(stock("basic"), images(1, 64))[1]  # at another size it is a share of that size's MACs
    assert decide(td.set_budget(model, fraction=1.0), images(1, 64)).macs.tolist() == [bigger]


def numbers(text: str) -> tuple[int, float]:
    """The smallest budget that an error names, in MACs and as a fraction."""
    found = re.search(r"costs (\d+) MACs \(fraction ([\d.]+)", text)
    assert found, text
    return int(found[1]), float(found[2])


@pytest.mark.parametrize("kind", FEW)
@pytest.mark.parametrize("parts", [["layer", "channel"], ["layer", "channel", "exits"]])
def test_the_error_names_the_smallest_budget(kind: str, parts: list[str]) -> None:
    model = dynamic(kind, parts)
    with pytest.raises(
        ValueError, match=re.escape(f"a budget of 1000 MACs is too small: at input size {SMALL}")
    ) as error:
        td.set_budget(model, macs=1000, input_size=SMALL)
    macs, fraction = numbers(str(error.value))
    assert macs == table(model).exits[0].dearest
    td.set_budget(model, macs=macs, input_size=SMALL)
    assert decide(model, images(1)).exit_index.tolist() == [0]
    td.set_budget(model, fraction=fraction, input_size=SMALL)
    for less in ({"macs": macs - 1}, {"fraction": fraction - 2e-4}, {"macs": [10 * macs, macs - 1]}):
        with pytest.raises(ValueError, match=f"costs {macs} MACs"):
            td.set_budget(model, **less, input_size=SMALL)
    assert decide(model, images(1)).exit_index.tolist() == [0]  # the budget before is still set


def test_budgets_are_checked_for_the_models_own_size() -> None:
    model = dynamic("basic")
    least = td.cost_table(model, (3, 224, 224)).exits[0].dearest
    with pytest.raises(ValueError, match=f"input size {re.escape('(3, 224, 224)')}.*costs {least}"):
        td.set_budget(model, macs=least - 1)
    td.set_budget(model, macs=least)
    cifar = dynamic("cifar")
    with pytest.raises(ValueError, match=re.escape("(3, 32, 32)")):
        td.set_budget(cifar, macs=1)
    grey = td.add_exits(timm.create_model("resnet18", in_chans=1, device="meta"))
    with pytest.raises(ValueError, match=re.escape("(1, 224, 224)")):
        td.set_budget(grey, macs=1)


def test_budgets_are_checked_again_for_the_size_that_comes() -> None:
    model = dynamic("basic")
    td.set_budget(model, macs=between(model), input_size=SMALL)
    for call in (model, lambda x: td.decide(model, x)):
        with pytest.raises(ValueError, match=re.escape("at input size (3, 96, 96)")):
            call(images(2, 96))
    assert decide(model, images(2)).exit_index.tolist() == [1, 1]
    assert decide(model, images(2, 32)).macs.max() <= between(model)


def test_budgets_of_another_batch() -> None:
    model = dynamic("basic")
    dearest = table(model).dearest
    td.set_budget(model, macs=[dearest] * 3, input_size=SMALL)
    with pytest.raises(ValueError, match="each of 3 images; found a batch of 2"):
        decide(model, images(2))
    assert decide(model, images(3)).exit_index.tolist() == [3, 3, 3]


def iterator(value: int) -> Iterator[int]:
    yield value
    yield value


@pytest.mark.parametrize(
    "give",
    [
        int,
        float,
        np.int64,
        torch.tensor,
        lambda v: [v, v],
        lambda v: (v, float(v)),
        iterator,
        lambda v: np.array([v, v]),
        lambda v: torch.tensor([v, v], dtype=torch.float64),
    ],
)
def test_numbers_of_any_kind(give: Any) -> None:
    model = dynamic("basic")
    most = between(model)
    td.set_budget(model, macs=give(most), input_size=SMALL)
    assert decide(model, images(2)).exit_index.tolist() == [1, 1]
    assert model.dynamic.budget.macs in (most, (most, most))


# Soft budgets --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("execution", ["skip", "masked"])
@pytest.mark.parametrize("index", range(4))
@pytest.mark.parametrize("kind", FEW)
def test_exit_is_where_every_image_leaves(kind: str, index: int, execution: str) -> None:
    model = td.set_execution(undecided(kind), execution)
    with torch.no_grad():
        wanted = list(td.anytime(model, images(4)))[index]
    decisions = decide(td.set_budget(model, exit=index), images(4))
    assert decisions.exit_index.tolist() == [index] * 4
    assert_near(decisions.logits, wanted)
    assert [bool(e.isnan().all()) for e in decisions.exit_logits] == [i != index for i in range(4)]
    assert_near(decisions.exit_logits[index], wanted)


@pytest.mark.parametrize("execution", ["skip", "masked"])
@pytest.mark.parametrize("confidence", [0.0, 0.15, 0.25, 0.4, 1.0])
@pytest.mark.parametrize("kind", FEW)
def test_confidence_is_the_first_exit_that_is_sure(kind: str, confidence: float, execution: str) -> None:
    model, x = undecided(kind), images(8)
    with torch.no_grad():
        every = torch.stack(list(td.anytime(model, x)))  # [exits, images, classes]
    sure = every.softmax(2).amax(2) >= confidence
    sure[-1] = True
    first = sure.int().argmax(0)
    decisions = decide(td.set_execution(td.set_budget(model, confidence=confidence), execution), x)
    assert torch.equal(decisions.exit_index, first)
    assert_near(decisions.logits, every[first, torch.arange(8)])
    for index, logits in enumerate(decisions.exit_logits):  # evaluated for the images that came this far
        assert torch.equal(logits.isnan().any(1), first < index)
        assert_near(logits[first >= index], every[index, first >= index])


@pytest.mark.parametrize("execution", ["skip", "masked"])
@pytest.mark.parametrize("kind", FEW)
def test_under_a_hard_budget_only_the_exit_taken_is_evaluated(kind: str, execution: str) -> None:
    model, x = dynamic(kind), images(8)
    exits = table(model).exits
    td.set_budget(model, macs=[exits[i % 4].dearest for i in range(8)], input_size=SMALL)
    decisions = decide(td.set_execution(model, execution), x)
    assert decisions.exit_index.tolist() == [0, 1, 2, 3] * 2
    for index, logits in enumerate(decisions.exit_logits):
        here = decisions.exit_index == index
        assert torch.equal(logits.isnan().any(1), ~here)
        assert torch.equal(logits[here], decisions.logits[here])


def test_confidence_pays_for_the_exits_on_the_way() -> None:
    model = dynamic("basic", ["exits"])
    costs = table(model)
    decisions = decide(td.set_budget(model, confidence=1.0), images(1))
    assert decisions.macs.tolist() == [costs.dense + sum(row.head for row in costs.exits[:-1])]


# Budgets and forcing -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("execution", ["skip", "masked"])
def test_a_hard_budget_outranks_force(execution: str) -> None:
    model = td.set_execution(dynamic("bottleneck"), execution)
    most = between(model)
    for budget in ({"macs": most, "input_size": SMALL}, {"exit": 1}):
        td.set_budget(model, **budget)
        with td.force(model, layer_keep=1.0, channel_keep=1.0, exit=3):
            decisions = decide(model, images(4))
        assert decisions.exit_index.tolist() == [1] * 4
        assert decisions.macs.max() <= most
        with td.force(model, exit=torch.tensor([0, 1, 2, 3])):
            assert decide(model, images(4)).exit_index.tolist() == [0, 1, 1, 1]


def test_force_outranks_confidence() -> None:
    model = td.set_budget(dynamic("basic"), confidence=0.0)
    with td.force(model, exit=2):
        assert decide(model, images(2)).exit_index.tolist() == [2, 2]


# Setting -------------------------------------------------------------------------------------------------------------


def test_set_and_lifted() -> None:
    model, x = undecided("bottleneck"), images(4)
    before = decide(model, x)
    assert td.set_budget(model, exit=0) is model
    assert decide(model, x).exit_index.tolist() == [0] * 4
    assert td.set_budget(model) is model
    after = decide(model, x)
    assert torch.equal(after.logits, before.logits)
    assert torch.equal(after.macs, before.macs)


def test_without_exits_the_head_is_the_first_exit() -> None:
    model = dynamic("basic", ["layer"])
    td.set_budget(model, macs=table(model).dearest, input_size=SMALL)
    td.set_budget(model, exit=0)
    assert decide(model, images(2)).exit_index.tolist() == [0, 0]
    with pytest.raises(ValueError, match=r"exit must be in 0..0 for 'resnet18'; found 1"):
        td.set_budget(model, exit=1)


def test_budgets_are_not_for_training() -> None:
    model = td.set_budget(dynamic("basic"), exit=0).train()
    assert len(model(images(4))) == 4


def test_budgets_follow_copies_and_new_parts() -> None:
    model = td.set_budget(dynamic("basic", ["exits"]), fraction=1.0, input_size=SMALL)
    twin = td.add_layer_gates(copy.deepcopy(model), "ff1")  # the dearest way is dearer now
    assert decide(model, images(1)).exit_index.tolist() == [3]
    decisions = decide(twin, images(1))
    assert decisions.exit_index.tolist() < [3]
    assert decisions.macs.tolist() <= [table(twin).dense]


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"macs": 10**9, "fraction": 0.5}, "exactly one of .*found macs, fraction"),
    ({"exit": 0, "confidence": 0.5}, "exactly one of .*found exit, confidence"),
    ({"macs": 10**9, "exit": 1}, "exactly one of .*found macs, exit"),
    ({"macs": []}, "macs must hold at least one value"),
    ({"macs": 0}, "macs.*at least 1; found 0"),
    ({"macs": -(10**9)}, "macs.*found -1000000000"),
    ({"macs": 1.5}, "macs must be whole numbers.*found 1.5"),
    ({"macs": float("inf")}, "macs must be whole numbers.*found inf"),
    ({"macs": float("nan")}, "macs must be whole numbers.*found nan"),
    ({"macs": True}, "macs must be whole numbers.*found True"),
    ({"macs": "lots"}, "macs must be whole numbers.*found 'lots'"),
    ({"macs": [10**9, None]}, "macs must be whole numbers.*found None"),
    ({"macs": torch.full((2, 2), 10**9)}, "macs must be whole numbers.*found"),
    ({"fraction": 0.0}, "fraction must be a finite number above 0; found 0.0"),
    ({"fraction": -1}, "fraction.*found -1"),
    ({"fraction": float("nan")}, "fraction.*found nan"),
    ({"fraction": float("inf")}, "fraction.*found inf"),
    ({"fraction": True}, "fraction.*found True"),
    ({"fraction": "half"}, "fraction.*found 'half'"),
    ({"exit": 4}, "exit must be in 0..3 for 'resnet18'; found 4"),
    ({"exit": -1}, "exit.*found -1"),
    ({"exit": 1.0}, "exit.*found 1.0"),
    ({"confidence": 1.1}, "confidence.*0..1; found 1.1"),
    ({"confidence": float("nan")}, "confidence.*found nan"),
    ({"fraction": 1.0, "input_size": (3, 40)}, r"input_size.*found \(3, 40\)"),
    ({"fraction": 1.0, "input_size": (4, 40, 40)}, r"cannot run an input of \(4, 40, 40\)"),
]


@pytest.mark.parametrize(("budget", "message"), WRONG)
def test_wrong_budgets_change_nothing(budget: dict[str, Any], message: str) -> None:
    model = td.set_budget(dynamic("basic"), exit=1)
    set_before = model.dynamic.budget
    before = state_of(model)
    with pytest.raises(ValueError, match=message):
        td.set_budget(model, **budget)
    assert model.dynamic.budget is set_before
    after = state_of(model)
    before["dynamic"] = after["dynamic"] = None  # tables may have been counted meanwhile
    assert_same_state(after, before)


def test_budgets_need_classes() -> None:
    model = td.add_exits(timm.create_model("resnet18", num_classes=0, device="meta"))
    with pytest.raises(ValueError, match="num_classes=0"):
        td.set_budget(model, fraction=1.0)
