"""Calibration meets a mean cost, and travels with the weights."""

import copy

import pytest
import timm
import torch
from nets import randomise
from torch import Tensor, nn

import timm_dynamic as td
from timm_dynamic.calibration import meet_cost
from timm_dynamic.exits import NEVER

Batches = list[tuple[Tensor, Tensor]]


def _model() -> nn.Module:
    """Random gates whose probabilities spread over images."""
    gates = {"init": "random"}
    model = timm.create_model("ddi_resnet20_cifar", layer_gates=gates, channel_gates=gates).eval()
    randomise(model)
    with torch.no_grad():
        model.layer_gates.fc.weight.mul_(8)
        for head in model.exits.heads:
            head.fc.weight.mul_(5)
    return model


def _images(count: int, seed: int, size: int = 32) -> Batches:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 3, size, size, generator=generator) * torch.rand(count, 1, 1, 1, generator=generator) * 3
    y = torch.randint(0, 10, (count,), generator=generator)
    return list(zip(x.split(64), y.split(64), strict=True))


def _share(model: nn.Module, images: Batches) -> float:
    """Mean MACs of images as a share of the stock model's."""
    macs = torch.cat([td.decide(model, x).macs for x, _ in images]).double()
    return (macs.mean() / td.cost_table(model, tuple(images[0][0].shape[1:])).dense).item()


@pytest.mark.parametrize("fraction", [0.3, 0.6])
def test_meets_the_target_on_other_images(fraction: float) -> None:
    model = _model()
    images = _images(128, 0)
    found = td.calibrate(model, images, fraction)
    assert found.fraction == pytest.approx(_share(model, images), abs=1e-9)
    assert _share(model, _images(256, 1)) == pytest.approx(fraction, abs=0.02)


def test_moving_gates_counts_exits_as_they_are() -> None:
    model, images = _model(), _images(128, 0)
    model.layer_gates.threshold.fill_(0.3)
    model.channel_gates.threshold.fill_(0.4)
    td.calibrate(model, images, 0.4, use="exits")
    levels = model.exits.levels
    assert model.exits.calibrated
    cheapest, dearest = [], []
    for threshold, found in ((1.5, cheapest), (0.0, dearest)):
        model.layer_gates.threshold.fill_(threshold)
        model.channel_gates.threshold.fill_(threshold)
        found.append(_share(model, images))
    wanted = (cheapest[0] + dearest[0]) / 2
    found = td.calibrate(model, images, wanted, use="gates")
    assert found.fraction == pytest.approx(_share(model, images), abs=1e-9)
    assert found.fraction == pytest.approx(wanted, abs=0.006)
    assert model.exits.levels == levels
    assert found.confidence == min(levels)


def test_an_exit_that_nobody_can_leave_at_is_not_paid_for() -> None:
    model, images = _model(), _images(64, 0)
    model.exits.set_confidence([NEVER, 0.3])
    model.layer_gates.threshold.fill_(0.0)
    model.channel_gates.threshold.fill_(0.0)
    found = td.calibrate(model, images, _share(model, images), use="gates")
    assert found.fraction == pytest.approx(_share(model, images), abs=1e-9)


def test_moving_exits_leaves_gates_where_they_are() -> None:
    model, images = _model(), _images(64, 0)
    model.layer_gates.threshold.fill_(0.3)
    model.channel_gates.threshold.fill_(0.4)
    found = td.calibrate(model, images, 0.4, use="exits")
    assert model.layer_gates.threshold.eq(0.3).all()
    assert model.channel_gates.threshold.eq(0.4).all()
    assert found.threshold == pytest.approx(0.3)
    assert found.fraction == pytest.approx(_share(model, images), abs=1e-9)


def test_both_is_at_least_as_accurate_as_either_alone() -> None:
    accuracy = {}
    for use in ("both", "gates", "exits"):
        model = _model()
        model.layer_gates.threshold.fill_(0.0)  # where only exits move, gates stay open
        try:
            accuracy[use] = td.calibrate(model, _images(64, 0), 0.5, use=use).accuracy
        except ValueError:
            accuracy[use] = 0.0
    assert accuracy["both"] >= max(accuracy["gates"], accuracy["exits"]) > 0


def test_is_saved_with_the_weights() -> None:
    model = _model()
    other = copy.deepcopy(model)
    td.calibrate(model, _images(64, 0), 0.3)
    assert model.exits.calibrated
    assert not other.exits.calibrated
    x = _images(64, 2)[0][0]
    assert not torch.equal(td.decide(model, x).macs, td.decide(other, x).macs)
    other.load_state_dict(model.state_dict())
    assert torch.equal(td.decide(model, x).macs, td.decide(other, x).macs)
    assert torch.equal(model(x), other(x))


def test_a_budget_outranks_calibrated_exits() -> None:
    model = _model()
    model.exits.set_confidence([0.0, 0.0])
    x = torch.randn(4, 3, 32, 32)
    assert td.decide(model, x).exit_index.tolist() == [0] * 4
    td.set_budget(model, exit=2)
    assert td.decide(model, x).exit_index.tolist() == [2] * 4


@pytest.mark.parametrize(
    ("images", "options", "message"),
    [
        ([], {}, "at least 50 images; found 0"),
        (_images(20, 0), {}, "at least 50 images; found 20"),
        (_images(64, 0), {"fraction": 3.0}, r"wanted a fraction in 0\.\d+\.\."),
        (_images(64, 0), {"fraction": -1}, "above 0; found -1"),
        (_images(64, 0), {"use": "neither"}, "'neither'"),
    ],
)
def test_what_cannot_be_met_changes_nothing(images: Batches, options: dict, message: str) -> None:
    model = _model().train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        td.calibrate(model, images, **options)
    assert model.training
    assert model.exits.levels == (NEVER, NEVER)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_needs_the_parts_that_it_moves() -> None:
    with pytest.raises(ValueError, match="a dynamic model is needed"):
        td.calibrate(timm.create_model("resnet20_cifar"), _images(64, 0))
    with pytest.raises(ValueError, match="such parts, not all settled; found none"):
        td.calibrate(timm.create_model("skipnet_resnet20_cifar"), _images(64, 0), use="exits")


def test_a_cost_is_met_without_labels() -> None:
    """On other images of the same kind within 2 points; what cannot be met is come as near to as can be."""
    model = _model()
    del model.exits
    known, other = [x for x, _ in _images(256, 1)], _images(256, 2)
    for wanted in (0.4, 0.6, 0.8):
        met = meet_cost(model, known, wanted, agreement=0.0)
        assert abs(met - wanted) < 0.01
        with torch.no_grad():
            assert abs(_share(model, other) - wanted) < 0.02
    before = model.layer_gates.threshold.clone()
    assert meet_cost(model, known, met) == met
    assert torch.equal(model.layer_gates.threshold, before), "no other threshold was nearer"
    known = [x for x, _ in _images(256, 1, 16)]  # what follows does not depend on how large they are
    assert 0.98 < meet_cost(model, known, 5.0) < 1.02
    td.set_execution(model, "masked")
    said = torch.cat([model(x).argmax(1) for x in known])
    shut = meet_cost(model, known, 0.1, agreement=1.0)
    assert 0.1 < shut < 1.02, "no more is shut than leaves all predictions as they were"
    assert torch.equal(torch.cat([model(x).argmax(1) for x in known]), said)
    assert meet_cost(model, known, 0.1, agreement=0.0) < shut - 0.05
    with pytest.raises(ValueError, match="0 kinds of gates"):
        meet_cost(timm.create_model("ddi_resnet20_cifar", layer_gates=False, channel_gates=False), known, 0.5)
    with pytest.raises(ValueError, match="0 batches"):
        meet_cost(model, [], 0.5)
