"""What was once silent or unclear: each is refused, or comes out right."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from nets import assert_near, decide, dynamic, images, randomise
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor
from typer.testing import CliRunner

import timm_dynamic as td
from timm_dynamic.budgets import set_price
from timm_dynamic.cli.app import app
from timm_dynamic.surgery import set_policy
from timm_dynamic.tasks import DynamicTask

SIZE = (3, 32, 32)
X = torch.randn(4, *SIZE, generator=torch.Generator().manual_seed(0))


def cifar(name: str = "ddi_resnet20_cifar", **kwargs: Any) -> Any:
    torch.manual_seed(0)
    return randomise(timm.create_model(name, **kwargs)).eval()


# Budgets and prices --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [False, {"init": "random"}, {"mode": "nested", "init": "random"}])
def test_an_image_costs_the_same_energy_alone_in_a_batch_and_masked(channels: Any) -> None:
    """Each exit's dearest way is the budget."""
    model = cifar(channel_gates=channels, layer_gates={"kind": "linear", "init": "random"})
    table = td.cost_table(model, SIZE, "energy_mj")
    for stop in table.exits:
        td.set_budget(model, energy_mj=stop.dearest)
        together = td.decide(model, X).exit_index
        alone = torch.cat([td.decide(model, x[None]).exit_index for x in X])
        td.set_execution(model, "masked")
        assert torch.equal(td.decide(model, X).exit_index, together)
        td.set_execution(model, "skip")
        assert torch.equal(alone, together)


def test_the_last_digit_of_an_images_energy_does_not_decide() -> None:
    """Each budget is just what one of the images needs to go past the first exit: it goes, in any company."""
    model = cifar(channel_gates=False, layer_gates={"kind": "linear", "init": "random"})
    gate = model.layer_gates
    with torch.no_grad():
        gate.threshold.copy_(td.decide(model, X).layer_prob.median(0).values)  # images differ
    table, keeps = td.cost_table(model, SIZE, "energy_mj"), td.decide(model, X).layer_keep.tolist()
    assert len(set(map(tuple, keeps))) > 1
    stop = table.exits[0].after
    for i, keep in enumerate(keeps):
        spent = table.stem
        for unit, runs in zip(table.units[: stop + 1], [True, *keep], strict=False):
            spent += unit.price_one(runs, None)
        td.set_budget(model, energy_mj=spent + table.segment(1))
        together, alone = td.decide(model, X).exit_index, td.decide(model, X[i : i + 1]).exit_index
        masked = td.decide(td.set_execution(model, "masked"), X).exit_index
        td.set_execution(model, "skip")
        assert min(together[i], alone[0], masked[i]) >= 1
        assert torch.equal(together, masked)


def test_a_budget_of_the_dearest_way_lets_images_go_it() -> None:
    model = cifar(channel_gates=False)
    table = td.cost_table(model, SIZE, "energy_mj")
    td.set_budget(model, energy_mj=table.exits[1].dearest)
    assert td.decide(model, X).exit_index.tolist() == [1] * 4


def settle(model: Any) -> None:
    td.shut_units(model, model.layer_gates.gated[:2])


@pytest.mark.parametrize("change", [td.add_exits, settle], ids=["exits", "settled"])
def test_a_price_is_of_the_network_that_it_was_set_for(change: Any) -> None:
    model = td.add_layer_gates(timm.create_model("resnet20_cifar"), "ff1")
    set_price(model, td.cost_table(model, SIZE, "energy_mj"))
    change(model)
    with pytest.raises(ValueError, match="set the price again"):
        td.decide(model.train(), X)
    td.decide(model.eval(), X)
    set_price(model, td.cost_table(model, SIZE, "energy_mj"))
    assert td.decide(model.train(), X).cost.isfinite().all()


# Graphs --------------------------------------------------------------------------------------------------------------


def by_exit(model: Any) -> None:
    td.set_budget(model, exit=1)


def by_macs(model: Any) -> None:
    td.set_budget(model, fraction=0.6)


def by_confidence(model: Any) -> None:
    model.exits.set_confidence([0.3, 0.3])


def settled(model: Any) -> None:
    td.open_units(model, model.layer_gates.gated[-1:])


@pytest.mark.parametrize("change", [by_exit, by_macs, by_confidence, settled])
def test_export_with_batches_of_any_size(change: Any) -> None:
    model = td.set_execution(cifar(channel_gates=False), "masked")
    change(model)
    sizes = {"x": {0: torch.export.Dim("batch", min=2, max=64)}}
    whole = torch.export.export(model, (X,), dynamic_shapes=sizes).module()
    assert_near(whole(X[:3]), model(X[:3]))


def test_settled_networks_are_traced() -> None:
    model = cifar(layer_gates={"certainty": True})
    td.open_units(td.shut_units(model, ["layer1.1"]), ["layer2.0"])
    with torch.no_grad():
        assert_near(torch.fx.symbolic_trace(model)(X), model(X))
    assert create_feature_extractor(model, {"layer2": "found"})(X)["found"].shape == (4, 32, 16, 16)


def test_masked_and_skipping_are_finite_where_a_skipped_unit_is_not() -> None:
    model = cifar("skipnet_resnet20_cifar")
    with torch.no_grad():
        model.layer2[1].bn2.bias.fill_(6e4)
        model.layer2[1].bn2.weight.fill_(3e4)
    model.half()
    keep = torch.ones(4, 8)
    keep[:, 3] = 0
    with td.force(model, layer_keep=keep):
        skipping = model(X.half())
        assert skipping.isfinite().all()
        assert_near(td.set_execution(model, "masked")(X.half()).float(), skipping.float(), 1e-2)


@pytest.mark.parametrize("kind", ["basic", "dense"])
def test_masked_gradients_in_eval_are_those_of_what_ran(kind: str) -> None:
    model = dynamic(kind, parts=("layer",))
    found = []
    for execution in ("skip", "masked"):
        x = images(2).requires_grad_()
        with td.force(td.set_execution(model, execution), layer_keep=0.5):
            torch.manual_seed(1)
            model(x).sum().backward()
        assert x.grad is not None
        found.append(x.grad)
    assert found[0].abs().sum() > 0
    assert_near(found[1], found[0], 1e-3)


def test_no_gradient_is_lost_under_autocast() -> None:
    """A pass without gradients, as certainty needs one, leaves casts of the weights that must not be taken."""
    model = cifar("skipnet_resnet20_cifar", layer_gates={"init": "random", "certainty": True})
    for parameter in model.layer_gates.certain.parameters():
        nn.init.normal_(parameter)
    task = DynamicTask(model, 41e6, 10, alpha=0.5).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = task(X, torch.arange(4))["loss"]
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in (model.fc.weight, model.conv1.weight))


# Changes to a network ------------------------------------------------------------------------------------------------


def test_an_optimised_copy_forgets_slices_of_weights_that_are_replaced() -> None:
    one, other = cifar("iadi_resnet20_cifar"), cifar("iadi_resnet20_cifar")
    with torch.no_grad():
        for parameter in other.layer1.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    fast, wanted = (td.optimize_for_inference(model) for model in (one, other))
    generator = torch.Generator().manual_seed(3)
    widths = [len(sizes) for unit in one.channel_gates.sizes for sizes in unit]
    keep = [torch.rand(1, width, generator=generator) < 0.6 for width in widths]
    with td.force(fast, channel_keep=keep), td.force(wanted, channel_keep=keep), torch.no_grad():
        before = fast(X)
        fast.load_state_dict(wanted.state_dict(), assign=True)
        assert_near(fast(X), wanted(X))
        assert not torch.allclose(fast(X), before, atol=1e-3)


def test_a_policy_is_cut_with_the_network() -> None:
    model = set_policy(cifar("skipnet_resnet20_cifar"), "01110101")
    model.prune_intermediate_layers([1], prune_head=False)
    assert model(X).shape[0] == 4
    assert decide(model, X).layer_keep.tolist() == [[False, True]] * 4


@pytest.mark.parametrize("head", [nn.Sequential(nn.Dropout(), nn.Linear(64, 5)), nn.Conv2d(64, 5, 1)])
def test_exits_need_to_know_the_classes(head: nn.Module) -> None:
    model = timm.create_model("resnet20_cifar")
    model.fc = head
    with pytest.raises(ValueError, match=f"a linear layer, .*found {type(head).__name__} in 'resnet20_cifar'"):
        td.add_exits(model)
    assert not hasattr(model, "exits")
    assert not hasattr(model, "dynamic")


def test_classes_are_counted_from_zero() -> None:
    model = cifar()
    with pytest.raises(ValueError, match="num_classes must be 0 or above; found -1"):
        model.reset_classifier(-1)
    assert model(X).shape == (4, 10)


@pytest.mark.parametrize("verb", [td.shut_units, td.open_units])
def test_units_come_in_a_list(verb: Any) -> None:
    with pytest.raises(ValueError, match=r"\['layer1.1'\]; found the string 'layer1.1'"):
        verb(cifar(), "layer1.1")


def test_images_have_four_dimensions() -> None:
    with pytest.raises(
        ValueError, match=r"\[batch, channels, height, width\] are needed; found a shape of \[3, 32, 32\]"
    ):
        td.decide(cifar(), X[0])


def test_a_networks_own_channels_are_taken_for_budgets() -> None:
    import torchvision

    model = torchvision.models.resnet18(num_classes=10)
    model.conv1 = nn.Conv2d(1, 64, 7, 2, 3, bias=False)
    td.set_budget(td.add_exits(model).eval(), fraction=0.8)
    assert model(torch.randn(2, 1, 64, 64)).shape == (2, 10)


# Loaders -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "found"),
    [
        (X, r"\(\[4, 3, 32, 32\]\)"),
        ([X], r"\(\[4, 3, 32, 32\]\)"),
        ((X, [1, 2, 3, 4]), r"\(\[4, 3, 32, 32\], list\)"),
        ((X, torch.arange(3)), r"\(\[4, 3, 32, 32\], \[3\]\)"),
        ({"image": X}, r"\(dict\)"),
    ],
)
def test_calibrate_says_what_a_batch_is(batch: Any, found: str) -> None:
    with pytest.raises(ValueError, match=r"batches of \(images \[B, C, H, W\], labels \[B\]\); found " + found):
        td.calibrate(cifar(), [batch])


def test_a_target_between_all_and_nothing_is_out_of_reach() -> None:
    labels = torch.zeros(64, dtype=torch.int64)
    same = torch.zeros(64, *SIZE)
    with pytest.raises(ValueError, match=r"wanted a fraction in .*; what comes nearest is \d\.\d+"):
        td.calibrate(cifar("skipnet_resnet20_cifar"), [(same, labels)], fraction=0.5)


def test_units_are_found_by_the_loader_that_calibrates() -> None:
    model = cifar("skipnet_resnet20_cifar", layer_gates={"kind": "linear", "init": "random"})
    pairs: list[tuple[Tensor, Tensor]] = [(X, torch.arange(4))]
    assert td.idle_units(model, pairs) == td.idle_units(model, [X])
    assert td.busy_units(model, [list(pairs[0])]) == td.busy_units(model, [X])


@pytest.mark.parametrize("name", ["skipnet_resnet20_cifar", "iadi_densenet40_cifar"])
def test_confidence_needs_exits(name: str) -> None:
    model = td.set_budget(cifar(name), exit=0)  # the head: the only place where images leave
    before = model.dynamic.budget
    with pytest.raises(ValueError, match=f"confidence= needs an exit before the head; '{name}' has none"):
        td.set_budget(model, confidence=0.9)
    assert model.dynamic.budget == before


class OwnForward(timm.models.ResNet):
    """Someone's own network, under a name of timm."""

    def forward(self, x: Tensor) -> Tensor:
        return -super().forward(x)


def test_a_network_with_a_forward_of_its_own_is_not_saved_as_timms(tmp_path: Path) -> None:
    model = timm.create_model("resnet10t")
    td.save_pretrained(model, tmp_path / "timms")
    model.__class__ = OwnForward
    with pytest.raises(ValueError, match="timm builds 'resnet10t' as a ResNet; found the class OwnForward of"):
        td.save_pretrained(model, tmp_path / "own")
    assert not list((tmp_path / "own").glob("*"))


def test_an_optimised_copy_is_not_saved(tmp_path: Path) -> None:
    for part in (False, "linear"):  # with and without gates whose weights are folded
        fast = td.optimize_for_inference(cifar("ddi_resnet20_cifar", layer_gates=part))
        with pytest.raises(ValueError, match="copy of optimize_for_inference cannot be saved"):
            td.save_pretrained(fast, tmp_path)
    assert not list(tmp_path.iterdir())


# Command line --------------------------------------------------------------------------------------------------------


def test_profile_says_which_units_are_settled(tmp_path: Path) -> None:
    model = cifar("skipnet_resnet20_cifar")
    td.open_units(td.shut_units(model, ["layer1.1"]), ["layer2.0"])
    td.save_pretrained(model, tmp_path)
    shown = CliRunner().invoke(app, ["profile", f"local-dir:{tmp_path}"])
    assert shown.output.count("shut for good") == 1
    answer = CliRunner().invoke(app, ["profile", f"local-dir:{tmp_path}", "--json"])
    rows = json.loads(answer.output)
    rows = rows if isinstance(rows, dict) else rows[0]
    assert [unit["name"] for unit in rows["units"] if unit["shut"]] == ["layer1.1"]
    assert [unit["name"] for unit in rows["units"] if unit["open"]] == ["layer2.0"]


@pytest.mark.parametrize("more", [["--target", "0.3"], ["--target", "7", "--held-out", "60"]])
def test_a_reports_targets_are_not_ignored(more: list[str], tmp_path: Path) -> None:
    answer = CliRunner().invoke(app, ["report", "skipnet_resnet20_cifar", "--data", str(tmp_path), *more])
    assert answer.exit_code == 2
    assert "--target" in answer.output


@pytest.mark.parametrize(
    "line",
    [
        ["card", "skipnet_resnet38_cifar.cifar10_hrl", "-o"],
        ["benchmark", "skipnet_resnet20_cifar", "--figure"],
        ["export", "skipnet_resnet20_cifar", "--no-pretrained", "-o"],
    ],
)
@pytest.mark.parametrize("place", ["none/file.onnx", "folder.onnx"])
def test_where_a_file_cannot_go_is_said_before_the_work(
    line: list[str], place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(*args: object, **kwargs: object) -> None:
        raise AssertionError("work was begun")

    for name in ("benchmark.benchmark", "export.export_onnx"):
        monkeypatch.setattr(f"timm_dynamic.cli.{name}", work)
    monkeypatch.setattr("timm_dynamic.hub.card_of", work)
    (tmp_path / "folder.onnx").mkdir()
    answer = CliRunner().invoke(app, [*line, str(tmp_path / place)])
    assert answer.exit_code == 2
    wanted = f"no folder {tmp_path / 'none'}" if "none" in place else f"{tmp_path / place} is a folder"
    assert wanted in " ".join(answer.output.split())


def test_list_tells_trained_gates_from_a_bases_weights() -> None:
    (row,) = json.loads(CliRunner().invoke(app, ["list", "iadi_resnet74_cifar", "--json"]).output)
    bases = [full.partition(".")[2] for full in timm.list_pretrained("resnet74_cifar")]
    assert "cifar10_90epochs" in bases
    assert (row["pretrained_tags"], row["trained_tags"]) == (sorted([*bases, "cifar10_iadi"]), ["cifar10_iadi"])
    shown = CliRunner().invoke(app, ["list", "iadi_resnet74_cifar"]).output
    assert "cifar10_iadi*, cifar10_90epochs" in shown
    assert shown.count("*") == 2  # that of the tag, and of what explains it
    assert "gates and exits are trained too" in shown


# Budgets that came with weights, and classes -------------------------------------------------------------------------


def saved_with(folder: Path, **budget: Any) -> str:
    td.save_pretrained(td.set_budget(cifar(), **budget), folder)
    return f"local-dir:{folder}"


def test_a_saved_budget_that_does_not_suit_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sure = saved_with(tmp_path / "sure", confidence=0.8)
    tight = saved_with(tmp_path / "tight", macs=td.cost_table(cifar(), SIZE).exits[0].dearest)
    slow = saved_with(tmp_path / "slow", energy_mj=1e9)
    config = json.loads((tmp_path / "slow" / "config.json").read_text())
    config["model_args"]["budget"] |= {"energy_mj": None, "latency_ms": 1e-6}
    (tmp_path / "slow" / "config.json").write_text(json.dumps(config))
    cases: list[tuple[str, dict[str, Any]]] = [
        (sure, {"exits": False}),
        (sure, {"num_classes": 1}),
        (sure, {"layer_gates": False, "channel_gates": False, "exits": False}),
        (tight, {"num_classes": 1000}),
        (slow, {}),
    ]
    for name, changes in cases:
        caplog.clear()
        model = timm.create_model(name, pretrained=True, **changes)
        assert "is left out" in caplog.text
        assert getattr(getattr(model, "dynamic", None), "budget", None) is None
    assert timm.create_model(sure, pretrained=True).dynamic.budget.confidence == 0.8
    with pytest.raises(ValueError, match="too small"):
        timm.create_model(sure, pretrained=True, budget={"macs": 1})


def test_milliseconds_are_of_the_machine_and_precision_that_they_were_measured_on() -> None:
    model = td.set_budget(cifar(), latency_ms=1e6)
    model(X)
    td.optimize_for_inference(model)(X)
    model.to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"of another machine: .*float32.*; found .*bfloat16"):
        model(X.bfloat16())


def test_a_torchvision_name_takes_a_budget() -> None:
    model = torchvision.models.get_model("ddi_resnet18", budget={"fraction": 0.9}, num_classes=10)
    assert model.dynamic.budget.fraction == 0.9


def test_a_classifier_put_there_by_hand_is_refused_where_images_leave_early() -> None:
    model = cifar()
    batches = [(torch.cat([X] * 16), torch.zeros(64, dtype=torch.int64))]
    model.fc = nn.Linear(model.fc.in_features, 5)
    with pytest.raises(ValueError, match="the exits must know the 5 classes of the head; found 10"):
        td.calibrate(model, batches, 0.5)
    model.exits.set_confidence([0.1, 0.1])
    with pytest.raises(ValueError, match="the exits must know the 5 classes"):
        model(X)


@pytest.mark.parametrize("classes", [0, 1])
def test_nobody_leaves_by_confidence_without_classes_to_choose_from(classes: int) -> None:
    model = cifar(num_classes=classes)
    batches = [(torch.cat([X] * 16), torch.zeros(64, dtype=torch.int64))]
    with pytest.raises(ValueError, match=f"two classes or more.*found num_classes={classes}"):
        td.calibrate(model, batches, 0.5)
    other = td.set_budget(cifar(), confidence=0.9)
    other.reset_classifier(classes)
    assert (td.decide(other, X).exit_index == len(other.exits)).all()


def test_a_compiled_model_is_not_taken_for_another_kind() -> None:
    model = cifar()
    with pytest.raises(ValueError, match=r"found OptimizedModule around one: give its \._orig_mod"):
        td.decide(torch.compile(model), X)
    with pytest.raises(ValueError, match=r"found DataParallel around one: give its \.module"):
        td.cost_table(nn.DataParallel(model), SIZE)
