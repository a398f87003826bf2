"""What happens to a dynamic network afterwards: cast, given other classes, optimised, saved, nested in `force`."""

import copy
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from nets import assert_near, decide, dynamic, images, randomise, units_of
from safetensors.torch import save_file
from torch import Tensor, nn

import timm_dynamic as td
from timm_dynamic.evaluation import evaluate
from timm_dynamic.exits import NEVER
from timm_dynamic.gates import is_part
from timm_dynamic.hub import save_pretrained
from timm_dynamic.surgery import set_policy

SIZE = (3, 32, 32)


def cifar(name: str = "ddi_resnet20_cifar", **kwargs: Any) -> Any:
    torch.manual_seed(0)
    return randomise(timm.create_model(name, **kwargs)).eval()


def small(count: int) -> Tensor:
    return labelled()[0][0][:count]


def labelled(count: int = 64) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(count, *SIZE, generator=generator)
    return [(x, torch.randint(0, 10, (count,), generator=generator))]


# Cast ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_thresholds_keep_their_digits_when_a_network_is_cast(dtype: torch.dtype) -> None:
    model = cifar()
    model.layer_gates.threshold.fill_(0.500824)
    model.channel_gates.threshold.fill_(0.497711)
    model.exits.set_confidence([0.9987, NEVER])
    before = {name: value.clone() for name, value in model.named_buffers() if "threshold" in name or "confid" in name}
    for cast in (copy.deepcopy(model).to(dtype), td.optimize_for_inference(model).to(dtype)):
        after = dict(cast.named_buffers())
        for name, value in before.items():
            assert after[name].dtype == torch.float32
            assert torch.equal(after[name], value)
        assert cast.conv1.weight.dtype == dtype
    assert set(before) == {"layer_gates.threshold", "channel_gates.threshold", "exits.confidence"}


def test_calibrating_in_inference_mode_leaves_a_network_that_loads() -> None:
    model = cifar(layer_gates=False, channel_gates=False)
    with torch.inference_mode():
        found = td.calibrate(model, labelled(), 0.8, use="exits")
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(state)
    assert model.exits.levels == pytest.approx([found.confidence] * 2)


# Given the weights of its base ---------------------------------------------------------------------------------------


def test_weights_of_the_stock_network_load_as_they_are(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stock = randomise(timm.create_model("resnet20_cifar"))
    save_file(stock.state_dict(), tmp_path / "base.safetensors")
    model = timm.create_model("ddi_resnet20_cifar", checkpoint_path=str(tmp_path / "base.safetensors")).eval()
    assert torch.equal(model(small(2)), stock.eval()(small(2)))
    gates = {name: value.clone() for name, value in model.state_dict().items() if is_part(name)}
    with caplog.at_level("INFO", "timm_dynamic"):
        assert not model.load_state_dict(stock.state_dict()).missing_keys
    assert "no gates and no exits: those of the model stay as they are" in caplog.text
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in gates.items())
    some = {name: value for name, value in model.state_dict().items() if not name.startswith("exits.")}
    with pytest.raises(RuntimeError, match=r"Missing key.*exits\."):
        model.load_state_dict(some)
    with pytest.raises(RuntimeError, match=r"Missing key.*conv1"):
        model.load_state_dict({name: value for name, value in stock.state_dict().items() if name != "conv1.weight"})
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict({})


# Other classes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [0, 1, 7])
def test_new_classes_start_without_old_confidences(classes: int) -> None:
    model = cifar()
    model.exits.set_confidence([0.0, NEVER])
    assert td.decide(model, small(4)).exit_index.tolist() == [0] * 4
    model.reset_classifier(classes)
    assert not model.exits.calibrated
    assert model(small(4)).shape == (4, classes or model.num_features)


@pytest.mark.parametrize("classes", [0, 1, 7])
def test_saved_confidences_are_not_taken_over_by_other_classes(classes: int, tmp_path: Path) -> None:
    model = cifar()
    model.exits.set_confidence([0.0, NEVER])
    td.set_budget(model, fraction=0.9)
    save_pretrained(model, tmp_path)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=classes).eval()
    assert not again.exits.calibrated
    assert (again.dynamic.budget is None) == (classes == 0)
    assert again(small(4)).shape == (4, classes or again.num_features)
    same = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert same.exits.levels == model.exits.levels


def test_a_budget_does_not_outlive_the_classifier_in_features() -> None:
    model = cifar()
    for budget in ({"fraction": 0.4}, {"exit": 0}, {"confidence": 0.0}, {"energy_mj": 2.0}):
        model.reset_classifier(10)
        td.set_budget(model, **budget)
        model.reset_classifier(0)
        assert_near(model(small(4)), model.forward_head(model.forward_features(small(4))))
    with pytest.raises(ValueError, match="two classes or more"):
        td.set_budget(cifar(num_classes=1), confidence=0.5)


@pytest.mark.parametrize("made", [cifar, lambda: td.add_exits(torchvision.models.resnet18())])
def test_a_head_that_was_put_in_by_hand_is_noticed(made: Any) -> None:
    model = made().eval()
    before = model.fc.out_features
    model.fc = nn.Linear(model.fc.in_features, 5)
    for budget in ({"exit": 0}, {"fraction": 0.9}, {"confidence": 0.5}):
        with pytest.raises(ValueError, match=f"must know the 5 classes of the head; found {before}"):
            td.set_budget(model, input_size=SIZE, **budget)
    assert model(small(2)).shape == (2, 5)


def test_a_table_is_of_the_network_that_it_was_made_from() -> None:
    model = cifar()
    table = td.cost_table(model, SIZE, "energy_mj")
    td.set_budget(model, energy_mj=table.dearest * 1.01, table=table)
    assert td.decide(model, small(2)).exit_index.tolist() == [2, 2]
    model.reset_classifier(1000)
    with pytest.raises(ValueError, match="changed after its budget was set: set the budget again"):
        model(small(2))
    td.set_budget(model, energy_mj=table.dearest * 1.01)
    assert td.decide(model, small(2)).exit_index.tolist() == [1, 1]
    gated = cifar("skipnet_resnet20_cifar")
    td.set_budget(gated, energy_mj=2.0)
    td.add_exits(gated)
    with pytest.raises(ValueError, match="set the budget again"):
        gated(small(2))
    td.set_budget(gated)
    assert gated(small(2)).shape == (2, 10)


def test_a_latency_table_is_of_one_precision() -> None:
    model = cifar("skipnet_resnet20_cifar")
    table = td.cost_table(model, SIZE, "latency_ms")
    td.set_budget(model, latency_ms=table.dearest * 2, table=table)
    for other in (copy.deepcopy(model).double(), td.optimize_for_inference(model)):
        with pytest.raises(ValueError, match=r"measured on another machine: .*float32; found .*"):
            td.set_budget(other, latency_ms=table.dearest * 2, table=table)


# Optimised -----------------------------------------------------------------------------------------------------------


def test_an_optimised_copy_counts_as_the_network_that_it_was_made_from() -> None:
    model = cifar()
    fast = td.optimize_for_inference(model)
    for unit in ("macs", "energy_mj"):
        assert td.cost_table(fast, SIZE, unit) == td.cost_table(model, SIZE, unit)
    twice = td.optimize_for_inference(fast)
    x = small(3)
    assert torch.equal(td.decide(twice, x).macs, td.decide(model, x).macs)
    model.reset_classifier(100)
    fast.reset_classifier(100)
    assert torch.equal(td.decide(fast, x).macs, td.decide(model, x).macs)


@pytest.mark.parametrize("verb", [td.strip, td.add_exits, td.add_channel_gates])
def test_an_optimised_copy_keeps_its_parts(verb: Any) -> None:
    fast = td.optimize_for_inference(cifar("skipnet_resnet20_cifar"))
    before = fast(small(2))
    with pytest.raises(ValueError, match="change the model that it was made from"):
        verb(fast)
    assert torch.equal(fast(small(2)), before)


# Saved ---------------------------------------------------------------------------------------------------------------


def test_a_budget_by_a_table_of_its_own_is_not_saved(tmp_path: Path) -> None:
    model = cifar()
    table = td.cost_table(model, SIZE, "energy_mj", energy={"pj_per_mac": 100.0})
    td.set_budget(model, energy_mj=table.exits[1].dearest * 1.001, table=table)
    with pytest.raises(ValueError, match=r"cannot be saved: lift it by set_budget\(model\)"):
        save_pretrained(model, tmp_path / "own")
    assert not (tmp_path / "own" / "config.json").exists()
    default = td.cost_table(model, SIZE, "energy_mj")
    td.set_budget(model, energy_mj=default.exits[1].dearest * 1.001)
    save_pretrained(model, tmp_path / "default")
    again = timm.create_model(f"local-dir:{tmp_path / 'default'}", pretrained=True).eval()
    assert torch.equal(td.decide(again, small(3)).exit_index, td.decide(model, small(3)).exit_index)


def test_who_may_read_the_config_may_read_the_weights(tmp_path: Path) -> None:
    save_pretrained(cifar(), tmp_path)
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("config.json", "model.safetensors")}
    assert len(modes) == 1


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ({"accuracy": 90}, r"metrics\['accuracy'\] must be in 0..1; found 90"),
        ({"accuracy": "high"}, "must be in 0..1; found 'high'"),
        ({"macs": "many"}, r"metrics\['macs'\] must be a number of MACs; found 'many'"),
        ({"dense": 5}, r"metrics\['dense'\] must be a mapping; found 5"),
        ({"exits": 3}, r"metrics\['exits'\] must be a list; found 3"),
        ({"budgets": [{"accuracy": -1}]}, r"metrics\['budgets'\]\[0\]\['accuracy'\] must be in 0..1; found -1"),
        (5, "metrics must be a mapping; found 5"),
    ],
)
def test_wrong_metrics_are_refused(metrics: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        save_pretrained(cifar(), tmp_path / "saved", metrics=metrics)
    assert not (tmp_path / "saved").exists()


# Forced, frozen, traced ----------------------------------------------------------------------------------------------


def test_an_inner_force_leaves_the_outer_one_what_it_does_not_name() -> None:
    model = dynamic("basic")
    with td.force(model, layer_keep=0.0), td.force(model, exit=1):
        inner = decide(model, images(3))
    assert inner.layer_keep.sum() == 0
    assert inner.exit_index.tolist() == [1] * 3
    with td.force(model, layer_keep=0.0), td.force(model, layer_keep=1.0):
        assert decide(model, images(3)).layer_keep.all()


def test_a_nested_channel_gate_has_no_gaps() -> None:
    model = cifar("iadi_resnet20_cifar", channel_gates={"mode": "nested", "group_size": 4})
    groups = [len(sizes) for unit in model.channel_gates.sizes for sizes in unit]
    layers = "1" * units_of(model)
    before = copy.deepcopy(model.state_dict())
    gap = "".join("1011"[:count] for count in groups)
    with pytest.raises(ValueError, match="keep the first groups of each width; found '1011'"):
        set_policy(model, layers, gap)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    set_policy(model, layers, "".join("1100"[:count] for count in groups))
    kept = td.decide(model, small(2)).channel_keep
    assert all(part.sum(1).tolist() == [2, 2] for part, count in zip(kept, groups, strict=True) if count > 2)


def test_frozen_norms_stay_frozen_while_others_train() -> None:
    model = cifar().train()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms[:5]:
        norm.eval()
    evaluate(model, labelled(20))
    td.calibrate(model, labelled(), 0.6)
    td.cost_table(model, SIZE, "latency_ms")
    assert [norm.training for norm in norms] == [False] * 5 + [True] * (len(norms) - 5)


def test_gates_learn_over_a_trunk_that_stands_still() -> None:
    """In eval and skipping, where nothing but the gates needs what the units were given."""
    model = cifar("skipnet_resnet20_cifar", layer_gates={"kind": "ff2", "init": "random"})
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("layer_gates"))
    for unit in range(units_of(model)):  # each gate at its own median: half of the images run each unit
        with torch.no_grad():
            prob = td.decide(model, small(6)).layer_prob[:, unit]
        model.layer_gates.threshold[unit] = prob.sort().values[2:4].mean()
    decisions = td.decide(model, small(6))
    assert decisions.layer_keep.sum(0).tolist() == [3] * units_of(model)
    decisions.layer_prob.sum().backward()
    assert all(parameter.grad is not None for parameter in model.layer_gates.parameters())


def test_a_traced_network_goes_to_the_head() -> None:
    model = cifar()
    for budget in ({}, {"fraction": 0.5}, {"macs": 30_000_000}):
        model.exits.set_confidence([0.0, NEVER])
        td.set_budget(model, **budget)
        extract = timm.models.create_feature_extractor(model, ["layer2.0.conv1"])
        assert extract(small(2))["layer2.0.conv1"].shape[:2] == (2, 32)


def test_budgets_take_numbers_of_numpy() -> None:
    model = cifar()
    for budget in (
        {"exit": np.int64(0)},
        {"fraction": np.float32(0.7)},
        {"confidence": np.float32(0.5)},
        {"macs": [np.int64(40_000_000), torch.tensor(30_000_000)]},
    ):
        td.set_budget(model, **budget)
        assert model(small(2)).shape == (2, 10)
