"""One network at many costs, and networks side by side."""

import time
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import nets
import pytest
import torch
from torch import Tensor, nn

import timm_dynamic as td
from timm_dynamic.analyses import observe
from timm_dynamic.calibration import calibrations
from timm_dynamic.evaluation import evaluate, held_out_places
from timm_dynamic.sections_cost import cost_section
from timm_dynamic.trade_off import (
    Network,
    Point,
    budget_points,
    calibrated,
    calibrated_point,
    cheapest_equal,
    exit_points,
    own_point,
    settings_of,
    time_side_by_side,
)

PLAIN = (0.0,) * 3, (1.0,) * 3
SIZE = 16


def images(count: int, seed: int = 1) -> list[tuple[Tensor, Tensor]]:
    return list(zip(nets.images(count, SIZE, seed).split(32), (torch.arange(count) % 10).split(32), strict=True))


@pytest.fixture(scope="module")
def network() -> Network:
    model = nets.undecided("cifar", ("layer", "exits"))
    return Network("net", model, observe(model, images(24), *PLAIN))


def point(accuracy: float, macs: float, kind: str = "exit") -> Point:
    return Point("net", kind, "", accuracy, macs, macs)


def test_the_cheapest_that_is_as_accurate() -> None:
    points = [point(0.9, 100), point(0.896, 60), point(0.894, 40), point(0.95, 80)]
    assert cheapest_equal(points, 0.9) is points[1]
    assert cheapest_equal(points, 0.9, within=0.007) is points[2]
    assert cheapest_equal(points, 0.96) is None


def test_points_are_what_evaluating_gives(network: Network) -> None:
    found = evaluate(network.model, images(24))
    own = own_point(network)
    assert (own.kind, own.accuracy, own.macs, own.max_macs) == ("dynamic", found.accuracy, found.macs, found.max_macs)
    points = exit_points(network)
    assert [one.what for one in points] == ["exit 0", "exit 1"]
    limited = td.set_budget(network.model, exit=1)
    wanted = evaluate(limited, images(24))
    td.set_budget(network.model)
    assert (points[1].accuracy, points[1].macs, points[1].max_macs) == (wanted.accuracy, wanted.macs, wanted.max_macs)


def test_the_head_is_an_exit_where_images_leave_before_it(network: Network) -> None:
    early = deepcopy(network.model)
    early.exits.set_confidence([network.observed.rows["sure"][:, 0].median().item(), 2.0])
    seen = observe(early, images(24), *PLAIN)
    assert 0 < (seen.rows["exit"] == 0).sum() < 24, "some must leave, and some stay"
    points = exit_points(Network("early", early, seen))
    assert [one.what for one in points] == ["exit 0", "exit 1", "head"]
    whole = evaluate(network.model, images(24))
    assert (points[2].accuracy, points[2].max_macs) == (whole.accuracy, whole.max_macs)
    assert points[2].macs == pytest.approx(whole.macs)


def test_what_a_run_was_told_is_shown(network: Network) -> None:
    told = [{"target": 0.5, "alpha": None}, {"alpha": 0.1}, {"alpha": 0.1, "stages": [{"alpha": 3}, {"alpha": 0}]}, {}]
    points = [own_point(replace(network, name=str(k), settings=settings)) for k, settings in enumerate(told)]
    assert [one.what for one in points] == ["trained to 50 %", "alpha 0.1", "alpha 0", "as saved"]
    assert [one.alpha for one in points] == [None, 0.1, 0.0, None]
    assert "over alpha" in cost_section("0", points, None, "").html()
    assert "over alpha" not in cost_section("0", points[:2], None, "").html()


def test_no_two_networks_look_the_same(monkeypatch: pytest.MonkeyPatch, network: Network) -> None:
    """Fifteen beside the report's own are more than there are colours."""
    drawn: list[tuple[Any, ...]] = []
    monkeypatch.setattr("timm_dynamic.sections_cost._draw_network", lambda *given: drawn.append(given))
    points = [own_point(replace(network, name=str(k))) for k in range(16)]
    cost_section("3", points, None, "")
    for mark in (1, 2):
        looks = {(look[0], look[mark]) for *_, look in drawn}
        assert len(looks) == len(drawn) == 16


def test_budgets_are_kept(network: Network) -> None:
    found = budget_points(network, images(24), *PLAIN)
    stops = network.observed.table.exits
    wanted = [stops[0].dearest + (stops[-1].dearest - stops[0].dearest) * third // 3 for third in range(3)]
    assert [one.what for one in found] == [f"budget {macs / 1e6:.2f} M" for macs in wanted]
    assert all(one.max_macs <= macs for one, macs in zip(found, wanted, strict=True))
    assert network.model.dynamic.budget is None
    plain = nets.undecided("cifar", ("layer",))
    assert budget_points(Network("net", plain, observe(plain, images(24), *PLAIN)), images(24), *PLAIN) == []


def test_calibrated_copies_are_those_of_calibrate(network: Network) -> None:
    known, other = images(64, seed=2), images(24)
    ((fraction, copy),) = calibrated(network, known, (0.5, 3.0))  # three times the MACs are out of reach
    model = nets.undecided("cifar", ("layer", "exits"))
    td.calibrate(model, known, 0.5)
    assert fraction == 0.5
    assert torch.equal(copy.layer_gates.threshold, model.layer_gates.threshold)
    assert copy.exits.levels == model.exits.levels
    assert not torch.equal(network.model.layer_gates.threshold, model.layer_gates.threshold)
    found, wanted = calibrated_point("net", 0.5, copy, other, *PLAIN), evaluate(model, other)
    assert (found.accuracy, found.macs, found.target) == (wanted.accuracy, wanted.macs, 0.5)


def test_several_targets_are_each_met_as_alone(network: Network) -> None:
    known = images(64, seed=2)
    found = calibrations(network.model, known, (0.4, 0.6))
    for fraction, setting in found.items():
        assert td.calibrate(nets.undecided("cifar", ("layer", "exits")), known, fraction) == setting
        assert setting.fraction == pytest.approx(fraction, abs=0.005)
    assert list(found) == [0.4, 0.6]


def test_held_out_places_are_the_same_for_everybody() -> None:
    places = held_out_places(1000, 50)
    assert len(places) == len(set(places)) == 50
    assert places == sorted(places)
    assert set(places) < set(held_out_places(1000, 80))
    assert places != list(range(50))
    for wrong in (0, 1000):
        with pytest.raises(ValueError, match="1 to 999 can be held out"):
            held_out_places(1000, wrong)


class Slow(nn.Module):
    def __init__(self, seconds: float, calls: list[float]) -> None:
        super().__init__()
        self.seconds, self.calls = seconds, calls

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append(self.seconds)
        time.sleep(self.seconds)
        return x


def test_networks_take_turns() -> None:
    calls: list[float] = []
    models: dict[str, Any] = {"quick": (Slow(0.001, calls), 0.5), "slow": (Slow(0.01, calls), 1.0)}
    quick, slow = time_side_by_side(models, torch.zeros(2, 3, 4, 4), rounds=5, threads=1)
    assert (quick.name, quick.macs_share, slow.name) == ("quick", 0.5, "slow")
    assert quick.wall < slow.wall
    assert slow.wall >= 10
    assert slow.own < slow.wall  # asleep, the processor does nothing
    rounds = [calls[k : k + 4] for k in range(0, len(calls), 4)]
    assert len(rounds) == 3 + 5
    assert all(sorted(one) == [0.001, 0.001, 0.01, 0.01] for one in rounds)
    assert len({one[0] for one in rounds}) == 2  # not always the same one first


def test_settings_of_a_run(tmp_path: Path) -> None:
    assert settings_of(tmp_path) == {}
    (tmp_path / "settings.json").write_text('{"method": "sp"}')
    assert settings_of(tmp_path) == {"method": "sp"}
    (tmp_path / "settings.json").write_text("[1]")
    with pytest.raises(ValueError, match="holds no settings"):
        settings_of(tmp_path)
