"""Training that starts from a network of one policy: `--start`."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from test_recipes import RunError, Stage, base, call, ddi, iadi, planned, settings, skipnet

import timm_dynamic as td
from planning import start_policy, try_start
from stages import Outlook, dynamic_task

POLICY = "01011010"
FEW = ["--image-size", 16, "--batch-size", 16, "--max-steps", 2, "--evaluations", 1, "--threads", 1]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of one policy."""
    folder = tmp_path_factory.mktemp("runs") / "static"
    assert call(skipnet, "--method", "static", "--policy", POLICY, "--output", folder, *FEW) == 0
    return folder


def names(stages: tuple[Stage, ...]) -> list[str]:
    return [stage.name for stage in stages]


def test_following_takes_the_place_of_base_and_warmup(start: Path, tmp_path: Path) -> None:
    skip = settings(tmp_path, "skipnet", start=start)
    assert names(planned(skipnet.METHODS["sp+hrl"], skip)) == ["follow", "sp", "hrl"]
    assert names(planned(skipnet.METHODS["hrl"], skip)) == ["follow", "hrl"]
    assert names(planned(skipnet.METHODS["static"], skip)) == ["static"]
    assert names(planned(iadi.STAGES, settings(tmp_path, "iadi", start=start))) == ["follow", "iadi"]
    assert names(planned(ddi.STAGES, settings(tmp_path, start=start))) == ["follow", "iadi", "ddi"]
    short = settings(tmp_path, start=start, stage=["iadi.epochs=0", "follow.epochs=1"])
    follow, last = planned(ddi.STAGES, short)
    assert (follow.epochs, follow.trains, last.name) == (1, "gates", "ddi")
    assert skip.base == str(start / "base")
    with pytest.raises(RunError, match="--start is for recipes that train gates"):
        planned(skipnet.METHODS["sdv"], skip)


@pytest.mark.parametrize("recipe", ["skipnet", "ddi"])
def test_training_goes_on_from_the_network_of_the_policy(recipe: str, start: Path, tmp_path: Path) -> None:
    stages = planned({"skipnet": skipnet.METHODS["sp"], "ddi": ddi.STAGES}[recipe], settings(tmp_path, start=start))
    model, stock = (timm.create_model("resnet20_cifar", num_classes=10) for _ in range(2))
    torch.manual_seed(1)
    assert stages[0].surgery is not None
    stages[0].surgery(model, settings(tmp_path, recipe, start=start))
    wanted = timm.create_model(f"local-dir:{start}", pretrained=True).state_dict()
    own = model.state_dict()
    assert all(torch.equal(own[name], value) for name, value in wanted.items() if "layer_gates" not in name)
    assert torch.equal(own["layer_gates.threshold"], torch.full((len(POLICY),), 0.5))
    torch.manual_seed(1)
    drawn = td.add_layer_gates(stock, td.LayerGateConfig(kind="rnn", init="random")).layer_gates.fc.weight
    assert torch.equal(own["layer_gates.fc.weight"], drawn), "what is drawn does not depend on what is loaded"
    assert hasattr(model, "channel_gates") == (recipe == "ddi")
    if recipe == "ddi":
        found = td.decide(model.eval(), torch.randn(4, 3, 16, 16))
        assert all(bool(row.all()) for keep in found.channel_keep for row in keep if row.any())


def test_a_whole_run_and_its_gain(start: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = ("--method", "sp", "--start", start, "--gain", "--output", run, *FEW)
    assert call(skipnet, *options) == 0
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["stage"] for row in rows] == ["follow", "sp"]
    base, first = (timm.create_model(f"local-dir:{at}/base", pretrained=True).state_dict() for at in (run, start))
    assert all(torch.equal(base[name], value) for name, value in first.items())
    control = json.loads((run / "static" / "settings.json").read_text())
    assert control["start"] == str(start), "the static policy goes on from where this run started"
    assert control["stages"][0]["iterations"] == 2, "for as many steps; following is none of the network's"
    assert "adaptive_gain" in json.loads((run / "summary.json").read_text())


def test_what_the_policy_never_runs_is_shut_and_images_leave_early(
    start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = ("--stage", "follow.iterations=4", "--stage", "iadi.epochs=0", "--stage", "ddi.iterations=4")
    options = ("--start", start, "--channel-mode", "none", "--shut", 0.0, *steps, *FEW[:4], *FEW[6:])
    share = 0.99  # more than going to the head costs; then what leaving at the first exit does, which is always met
    for early in (False, True):
        run = tmp_path / str(early)
        kept = ("--open", 0.5) if early else ()
        assert call(ddi, *options, *kept, "--calibrate", share, "--output", run) == 0
        model = timm.create_model(f"local-dir:{run}", pretrained=True).eval()
        places = [place for place, digit in enumerate(POLICY) if early or digit == "0"]
        assert model.layer_gates.settled == {place: POLICY[place] == "1" for place in places}
        assert model.layer_gates.config.memory == "free"
        assert not hasattr(model, "channel_gates")
        assert model.exits.calibrated == early
        shown = capsys.readouterr().out
        assert "shut for good: layer1.1" in shown
        assert ("open for good: layer1.2" in shown) == early
        assert ("calibrated to" in shown) == early
        assert ("images go to the head" in shown) != early
        summary = json.loads((run / "summary.json").read_text())
        assert (summary["dynamic"]["macs"] < summary["exits"][-1]["macs"]) == early
        share = summary["exits"][0]["macs"] / summary["dense"]["macs"]
    go_on_from_the_settled_network(tmp_path, capsys)


def go_on_from_the_settled_network(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What has no gates to ask any more is a network of one policy, exits or not; what has is none."""
    options = ("--method", "sp", "--free", 1, "--shut", 0.0, "--open", 1.0, *FEW)
    assert call(skipnet, *options, "--start", runs / "False", "--output", runs / "none") == 1
    assert "tells of no policy, and weights are of no such network" in capsys.readouterr().err
    assert not (runs / "none").exists()
    found = settings(runs, "skipnet", start=runs / "True")
    assert start_policy(found) == (POLICY, "")
    assert call(skipnet, *options, "--start", runs / "True", "--output", runs / "on") == 0
    model = timm.create_model(f"local-dir:{runs / 'on'}", pretrained=True)
    assert not hasattr(model, "exits")
    assert {place for place, digit in enumerate(POLICY) if digit == "0"} <= set(model.layer_gates.settled)


def test_what_is_opened_at_the_end_was_seen_by_later_gates(start: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    steps = ("--stage", "follow.iterations=4", "--stage", "sp.iterations=4")
    options = ("--method", "sp", "--start", start, "--open", 0.01, "--output", run, *steps, *FEW[:4], *FEW[6:])
    assert call(skipnet, *options) == 0
    gates = timm.create_model(f"local-dir:{run}", pretrained=True).layer_gates
    assert any(gates.settled.values())
    assert gates.config.memory == "all"


def test_channels_are_settled_at_the_end(start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Half of the images always agree: so all units' are, of the dynamic network, but not of the one beside it."""
    run = tmp_path / "run"
    steps = ("--stage", "follow.iterations=2", "--stage", "iadi.iterations=2")
    options = ("--start", start, "--settle", 0.5, "--shut", 0.0, "--open", 0.01, "--gain", "--output", run)
    assert call(iadi, *options, *steps, *FEW[:4], *FEW[6:]) == 0
    model = timm.create_model(f"local-dir:{run}", pretrained=True)
    runs = {name for place, name in enumerate(model.layer_gates.gated) if model.layer_gates.settled[place]}
    assert set(model.channel_gates.config.channels_of()) == runs
    assert "channels settled: layer1.2=" in capsys.readouterr().out
    table = td.cost_table(model, (3, 16, 16))
    assert all(row.channel_gate == 0 for row in table.units if row.name in runs)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["dynamic"]["macs"] == table.exits[-1].dearest, "nothing is left to decide"
    assert "adaptive_gain" in summary
    for share in (0.4, 0.0):
        assert call(iadi, "--settle", share, "--output", tmp_path / "none", *FEW) == 1
        assert f"--settle must be a share of the images in [0.5, 1]; found {share}" in capsys.readouterr().err


@pytest.fixture(scope="module")
def narrow(start: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run of one policy of layers and channels leaves: of the units that run, half of the channels do."""
    folder = tmp_path_factory.mktemp("narrow")
    for part in ("base", "model.safetensors", "config.json"):
        copy = shutil.copytree if (start / part).is_dir() else shutil.copy
        copy(start / part, folder / part)
    model = td.add_channel_gates(timm.create_model("skipnet_resnet20_cifar"), {"mode": "nested"})
    half = ["".join("1" * (n - n // 2) + "0" * (n // 2) for n in map(len, unit)) for unit in model.channel_gates.sizes]
    for place, name in enumerate(model.channel_gates.gated):
        if name in model.layer_gates.gated and POLICY[model.layer_gates.gated.index(name)] == "0":
            half[place] = "0" * len(half[place])
    (folder / "settings.json").write_text(json.dumps({"policy": f"{POLICY}:{''.join(half)}"}))
    return folder


SETTLED = ("--shut", 0.0, "--open", 0.01, "--settle", 1.0, "--channel-mode", "nested")


def kept_by(policy: str, gates: Any) -> dict[str, str]:
    """The channels that a policy of resnet20's eight gated units keeps in those that it runs."""
    layers, _, channels = policy.partition(":")
    digits = iter(channels)
    found = {
        name: "".join(next(digits) for part in sizes for _ in part)
        for name, sizes in zip(gates.gated, gates.sizes, strict=True)
    }
    return {name: found[name] for name, digit in zip(gates.gated, layers, strict=True) if digit == "1"}


def test_channels_of_the_policy_are_settled_before_the_first_step(narrow: Path, tmp_path: Path) -> None:
    more = {"shut": 0.0, "open": 1.0, "settle": 1.0, "channel_mode": "nested", "free": 1}
    found = settings(tmp_path, "iadi", start=narrow, **more)
    for settle in (1.0, None):
        found = replace(found, settle=settle, free=1 if settle else None)
        follow, _ = planned(iadi.STAGES, found)
        assert follow.surgery is not None
        model: Any = timm.create_model("resnet20_cifar", num_classes=10)
        follow.surgery(model, found)
        gates = model.channel_gates
        wanted = kept_by(json.loads((narrow / "settings.json").read_text())["policy"], gates)
        assert set("".join(wanted.values())) == {"0", "1"}
        assert gates.config.channels_of() == (wanted if settle else {})


@pytest.mark.parametrize("recipe", [iadi, ddi])
def test_hindsight_in_a_narrow_network(recipe: Any, narrow: Path, tmp_path: Path) -> None:
    """Its last unit is left to the gates; when that too is settled, there is a policy to go on from."""
    run = tmp_path / "run"
    more = ("--hindsight", "--free", 1, "--target", 0.34, "--gain", "--output", run, *FEW[:4], *FEW[6:])
    steps = [f"{stage}.iterations=2" for stage in ("follow", "iadi", "ddi") if recipe is ddi or stage != "ddi"]
    assert call(recipe, "--start", narrow, *SETTLED, *more, *[one for s in steps for one in ("--stage", s)]) == 0
    model: Any = timm.create_model(f"local-dir:{run}", pretrained=True)
    policy = json.loads((narrow / "settings.json").read_text())["policy"]
    wanted = kept_by(policy, model.channel_gates)
    assert model.channel_gates.config.channels_of() == wanted
    assert "adaptive_gain" in json.loads((run / "summary.json").read_text())
    beside = json.loads((run / "static" / "settings.json").read_text())["policy"].partition(":")[2]
    pairs = zip(policy.partition(":")[2], beside, strict=True)
    assert all(one >= other for one, other in pairs), "the static policy beside it is as narrow"
    td.open_units(td.shut_units(model, set(model.layer_gates.gated) - set(wanted)), wanted)
    td.save_pretrained(model, run)
    layers, channels = start_policy(settings(tmp_path, start=run))
    assert layers == POLICY
    assert kept_by(f"{layers}:{channels}", model.channel_gates) == wanted
    td.save_pretrained(td.settle_channels(model, dict(list(wanted.items())[1:])), run)
    with pytest.raises(RunError, match="weights are of no such network"):
        start_policy(settings(tmp_path, start=run))


def test_a_static_network_keeps_the_channels_of_its_policy(
    narrow: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nested ones, which are other groups than those of independent channel gates."""
    run, policy = tmp_path / "run", json.loads((narrow / "settings.json").read_text())["policy"]
    static = ("--method", "static", "--start", narrow, "--policy", policy, "--output", run, *FEW)
    for mode, message in ((None, "channel_gates need"), ("none", "mode")):
        assert call(skipnet, *static, *(("--channel-mode", mode) if mode else ())) == 1
        assert message in capsys.readouterr().err
        assert not run.exists()
    assert call(skipnet, *static, "--channel-mode", "nested") == 0
    model: Any = timm.create_model(f"local-dir:{run}", pretrained=True)
    keeps = td.decide(model, torch.randn(2, 3, 16, 16)).channel_keep
    found = ["".join(str(int(digit)) for digit in row) for keep in keeps for row in keep]
    assert "".join(found[::2]) == "".join(found[1::2])
    wanted = kept_by(policy, model.channel_gates)
    assert {n: k for n, k in zip(model.channel_gates.gated, found[::2], strict=True) if n in wanted} == wanted


def test_channels_that_are_not_settled_leave_nothing_to_hindsight(
    narrow: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    free = ("--start", narrow, "--free", 1, "--open", 1.0, "--output", tmp_path / "run", *FEW)
    other = shutil.copytree(narrow, tmp_path / "last")
    kept = other / "settings.json"
    kept.write_text(kept.read_text().replace("1100", "0011"))
    mode = ("--channel-mode", "nested")
    for recipe, options, message in (
        (iadi, mode, "or one whose channels are settled (iadi.py or ddi.py with --settle); found 01011010:"),
        (skipnet, (), "or one whose channels are settled (iadi.py or ddi.py with --settle); found 01011010:"),
        (iadi, ("--settle", 1.0, "--group-size", 8), "8 layer gates and of 40 channel groups; found '01011010' and"),
        (iadi, (*SETTLED, "--start", other), f"--start {other}: nested channel gates keep the first"),
    ):
        assert call(recipe, *free, *options) == 1
        assert message in capsys.readouterr().err
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("method", ["sp", "hrl", "sp+hrl"])
def test_any_method_can_leave_the_last_units_alone_to_the_gates(method: str, start: Path, tmp_path: Path) -> None:
    options = {"start": start, "method": method, "free": 2, "shut": 0.0, "open": 1.0}
    follow, *trained = planned(skipnet.METHODS[method], settings(tmp_path, "skipnet", **options))
    assert names([follow, *trained]) == ["follow", *method.split("+")]
    assert follow.surgery is not None
    model = timm.create_model("resnet20_cifar", num_classes=10)
    follow.surgery(model, settings(tmp_path, "skipnet", **options))
    free = [place for place, digit in enumerate(POLICY) if digit == "1"][-2:]
    known = {place: digit == "1" for place, digit in enumerate(POLICY) if place not in free}
    assert model.layer_gates.settled == known, "before the first step"
    assert model.layer_gates.config.memory == "free"
    all_left = td.add_layer_gates(timm.create_model("resnet20_cifar"), "rnn")
    follow.surgery(td.strip(all_left), settings(tmp_path, "skipnet", **{**options, "free": None}))
    assert all_left.layer_gates.settled == {p: False for p, digit in enumerate(POLICY) if digit == "0"}


def test_two_free_units_are_trained_by_sp_and_hrl(start: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = ("--method", "sp+hrl", "--start", start, "--free", 2, "--certainty", "--shut", 0.0, "--open", 1.0)
    assert call(skipnet, *options, "--target", 0.5, "--gain", "--output", run, *FEW) == 0
    found, before = (timm.create_model(f"local-dir:{at}", pretrained=True) for at in (run, start))
    free = [place for place, digit in enumerate(POLICY) if digit == "1"][-2:]
    assert {place for place in range(len(POLICY)) if place not in free} <= set(found.layer_gates.settled)
    skipped, opened = POLICY.index("0"), POLICY.index("1")
    assert not {skipped, opened} & set(free)

    def turned(place: int) -> float:
        """How far a unit's weights are from what they were, but for their length, which weight decay changes."""
        name = found.layer_gates.gated[place]
        new, old = (model.get_submodule(name).conv1.weight for model in (found, before))
        return (new * (old.norm() / new.norm()) - old).abs().max().item()

    assert turned(skipped) < 1e-6 < 1e-5 < turned(opened), "what is shut is not trained"
    assert "adaptive_gain" in json.loads((run / "summary.json").read_text())


@pytest.mark.parametrize(("recipe", "method"), [(skipnet, "sp"), (skipnet, "hindsight"), (iadi, "")])
def test_units_are_left_to_the_gates_by_their_names(recipe: Any, method: str, start: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    how = ("--method", method) if method else ("--hindsight", "--channel-mode", "nested")
    options = ("--start", start, "--free", "layer2.1, layer1.2", "--shut", 0.0, "--open", 1.0, *how)
    assert call(recipe, *options, "--target", 0.5, "--output", run, *FEW) == 0
    gates = timm.create_model(f"local-dir:{run}", pretrained=True).layer_gates
    free = {gates.gated.index(name) for name in ("layer1.2", "layer2.1")}
    assert set(range(len(POLICY))) - free <= set(gates.settled)
    assert call(recipe, *options, "--target", 0.5, "--output", run, *FEW, "--resume") == 0


@pytest.mark.parametrize("more", [(), ("--hindsight",)])
@pytest.mark.parametrize("recipe", [iadi, ddi])
def test_channel_gates_beside_free_units(recipe: Any, more: tuple[str, ...], start: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = ("--start", start, "--free", 2, "--shut", 0.0, "--open", 1.0, "--channel-mode", "nested", *more)
    assert call(recipe, *options, "--target", 0.5, "--output", run, *FEW) == 0
    found = timm.create_model(f"local-dir:{run}", pretrained=True)
    free = [place for place, digit in enumerate(POLICY) if digit == "1"][-2:]
    assert {place for place in range(len(POLICY)) if place not in free} <= set(found.layer_gates.settled)
    assert found.layer_gates.config.memory == "free"
    assert len(found.channel_gates) == len(POLICY)
    assert hasattr(found, "exits") == (recipe is ddi)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {row["stage"] for row in rows if "worth" in row["train"]} == ({"iadi"} if more else set())


def test_the_certainty_of_the_classifier_is_told(
    start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    options = ("--method", "hindsight", "--free", 1, "--certainty", "--start", start, "--output", run, *FEW)
    assert call(skipnet, *options) == 0
    gates = timm.create_model(f"local-dir:{run}", pretrained=True).layer_gates
    assert gates.config.certainty
    assert all(weight.item() != 0 for weight in gates.certain.parameters())
    wanted = ("--model", "iadi_resnet18", "--certainty", "--output", tmp_path / "other", *FEW)
    real = timm.create_model
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timm, "create_model", lambda name, **more: real(name, **{**more, "layers": (2, 2, 2, 1)}))
        assert call(iadi, *wanted) == 1
    assert "--model iadi_resnet18: certainty is for dense layers, and for" in capsys.readouterr().err
    assert not (tmp_path / "other").exists(), "said before anything is trained"


def test_a_trained_network_by_its_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its weights and policy, and the base that is given beside it, as teacher too."""
    few = ("--method", "sp", "--model", "skipnet_resnet38_cifar", "--output", tmp_path / "run", *FEW)
    named, stock = ("--start", "ddi_resnet38_cifar.cifar10_anytime"), "resnet38_cifar.cifar10_60epochs"
    for options, message in (
        (named, "brings weights and a policy, but no base: give --base"),
        ((*named, "--base", "resnet20_cifar.cifar10_60epochs"), "--base resnet20_cifar.cifar10_60epochs is neither"),
        (
            ("--start", "skipnet_resnet38_cifar.cifar10_hrl", "--base", stock),
            "weights are of no such",
        ),
        (("--start", stock, "--base", stock), "weights are of no such network"),
    ):
        assert call(skipnet, *options, *few) == 1
        assert message in capsys.readouterr().err
        assert not (tmp_path / "run").exists()
    steps = ("--stage", "follow.iterations=1", "--stage", "sp.iterations=1", "--stage", "sp.lr=0", "--distill", 1)
    given = (*named, "--base", "resnet38_cifar.cifar10_60epochs", "--shut", 0.0, *steps)
    assert call(skipnet, *given, "--gain", *few[:-6], *FEW[6:]) == 0
    model = timm.create_model(f"local-dir:{tmp_path / 'run'}", pretrained=True)
    assert {0, 1, 2, 3, 4, 7, 8, 9, 10} <= {place for place, run in model.layer_gates.settled.items() if not run}
    start = timm.create_model(named[1], pretrained=True)
    never = tuple(f"{name}." for name in start.layer_gates.config.shut)  # these come without weights
    own, trunk = (td.strip(net).state_dict() for net in (model, start))
    kept = [name for name in own if "conv" in name and not name.startswith(never)]
    assert len(kept) > 18
    assert all(torch.equal(own[name], trunk[name]) for name in kept)
    base = timm.create_model(f"local-dir:{tmp_path / 'run' / 'base'}", pretrained=True).state_dict()
    given_base = timm.create_model(given[3], pretrained=True).state_dict()
    assert all(torch.equal(value, given_base[name]) for name, value in base.items())
    control = json.loads((tmp_path / "run" / "static" / "settings.json").read_text())
    assert control["start"] == named[1], "what adapting has to beat goes on from there too"


def test_a_network_that_cannot_be_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What went wrong with the Hub is said; a stock network, which cannot be started from, is not fetched at all."""
    asked = []

    def unreachable(name: str, **more: Any) -> Any:
        asked.append(name)
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr("planning.timm.create_model", unreachable)
    for name, message in (
        ("skipnet_resnet50", "--start skipnet_resnet50 is not in the cache and the Hub cannot be reached"),
        ("resnet50", "weights are of no such network"),
    ):
        given = ("--start", name, "--base", "resnet50", "--method", "sp", "--model", "skipnet_resnet50")
        assert call(skipnet, *given, "--output", tmp_path / "run", *FEW) == 1
        assert message in capsys.readouterr().err
    assert asked == ["skipnet_resnet50"]
    assert not (tmp_path / "run").exists()


def test_a_base_is_trained_on_from(start: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = ("--model", "resnet20_cifar", "--base", start / "base", "--output", run, "--image-size", 16)
    assert call(base, *options, "--stage", "base.iterations=1", "--stage", "base.lr=1e-9") == 0
    found, before = (timm.create_model(f"local-dir:{at}", pretrained=True) for at in (run, start / "base"))
    moved = zip(found.parameters(), before.parameters(), strict=True)
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in moved)
    assert [row["stage"] for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())] == ["base"]


def test_wrong_starts_are_one_line(start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = ("--output", tmp_path / "run", *FEW)
    cut = shutil.copytree(start, tmp_path / "cut") / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-100])
    for options, message in (
        (("--start", tmp_path), "needs the folder of a finished run of --method static, or a network whose"),
        (("--start", start, "--base", "x"), "--start brings its own base"),
        (("--start", start, "--model", "skipnet_resnet32_cifar"), "holds another model: no layer1.3.conv1.weight"),
        (("--start", cut.parent), f"--start {cut.parent} does not fit --model skipnet_resnet20_cifar"),
    ):
        assert call(skipnet, *options, *few) == 1
        assert message in capsys.readouterr().err
        assert not (tmp_path / "run").exists()


def test_a_policy_that_does_not_fit_is_one_line(
    start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = shutil.copytree(start, tmp_path / "odd") / "settings.json"
    kept.write_text(kept.read_text().replace(POLICY, "011"))
    assert call(skipnet, "--start", kept.parent, "--output", tmp_path / "run", *FEW) == 1
    assert "8 layer gates and of 0 channel groups; found '011'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_policy_of_channels_too(tmp_path: Path) -> None:
    """What --gain leaves beside an IADI network is a start for DDI."""
    assert call(iadi, "--gain", "--output", tmp_path / "iadi", *FEW) == 0
    policy = json.loads((tmp_path / "iadi" / "static" / "settings.json").read_text())["policy"]
    assert ":" in policy
    assert call(ddi, "--start", tmp_path / "iadi" / "static", "--output", tmp_path / "ddi", *FEW) == 0
    rows = [json.loads(line) for line in (tmp_path / "ddi" / "metrics.jsonl").read_text().splitlines()]
    assert [row["stage"] for row in rows] == ["follow", "iadi", "ddi"]


def test_gates_that_learn_from_hindsight(start: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = ("--method", "hindsight", "--start", start, "--free", 1, "--target", 0.5, "--gain", "--output", run)
    assert call(skipnet, *options, *FEW) == 0
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["stage"] for row in rows] == ["follow", "hindsight"]
    assert {"worth", "alpha", "macs_share"} <= rows[-1]["train"].keys()
    assert "adaptive_gain" in json.loads((run / "summary.json").read_text())


def test_what_hindsight_needs_is_one_line(start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = ("--method", "hindsight", "--output", tmp_path / "run", "--stage", "follow.iterations=1", *FEW[:4])
    for options, message in (
        ((), "hindsight starts from a finished run of --method static: give --start"),
        (("--start", start, "--free", 5), "from 1 to 4 units of the policy 01011010"),
        (("--start", start, "--information", 0.1), "no use for --information; found 0.1"),
        (("--start", start, "--target", 0.9), "--target must lie between 0."),
    ):
        assert call(skipnet, *few, *options) == 1
        assert message in capsys.readouterr().err
        assert not (tmp_path / "run").exists(), "nothing may have been begun"


def test_what_free_units_need_is_one_line(start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = ("--free", 2, "--output", tmp_path / "run", *FEW)
    for options, message in (
        (("--open", 1.0), "give --start, and a method that trains them"),
        (("--start", start, "--method", "static", "--policy", POLICY), "give --start, and a method that trains them"),
        (("--start", start), "--free needs --open"),
        (("--start", start, "--open", 1.0, "--free", 5), "from 1 to 4 units of the policy 01011010"),
        (
            ("--start", start, "--open", 1.0, "--free", "layer9.1"),
            "names among layer1.2, layer2.1, layer2.2, layer3.1; found",
        ),
        (
            ("--start", start, "--open", 1.0, "--free", "layer1.2,layer1.1"),
            "a number, or names among layer1.2, layer2.1",
        ),
    ):
        assert call(skipnet, *few, *options) == 1
        assert message in capsys.readouterr().err
        assert not (tmp_path / "run").exists(), "nothing may have been begun"


def test_a_target_in_another_unit_is_not_judged_by_macs(start: Path, tmp_path: Path) -> None:
    found = settings(tmp_path, "skipnet", start=start, method="hindsight", free=1, target=0.9)
    found = replace(found, max_steps=None)  # a dry run goes on with any target
    stages = planned(skipnet.METHODS["hindsight"], found)
    model = timm.create_model("resnet20_cifar")
    with pytest.raises(RunError, match="--target must lie between"):
        try_start(model, stages, found, (3, 16, 16))
    try_start(model, stages, replace(found, cost="latency_ms"), (3, 16, 16))
    assert not hasattr(model, "layer_gates")


def test_exits_stand_where_they_are_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert call(ddi, "--exits-after", "1, 2,layer3.1", "--output", run, *FEW) == 0
    assert "images that come to it" not in capsys.readouterr().out
    model = timm.create_model(f"local-dir:{run}", pretrained=True)
    assert model.exits.after == (2, 5, 7)
    assert len(json.loads((run / "summary.json").read_text())["exits"]) == 4
    for wrong, message in (("layer9", "no stage or unit 'layer9'"), ("3", "no exit after 'layer3'"), ("", "''")):
        assert call(ddi, "--exits-after", wrong, "--output", tmp_path / "wrong", *FEW) == 1
        assert message in capsys.readouterr().err
        assert not (tmp_path / "wrong").exists()


def test_an_exit_that_saves_next_to_nothing_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dear = ("--exits-after", "1,layer3.1", "--exit-hidden", 1024)
    assert call(ddi, *dear, "--output", tmp_path / "run", *FEW) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if "images that come to it" in line]
    assert len(said) == 1
    assert re.match(r"the exit after layer3.1 costs \d+\.\d% of the dense network .* more than \d\d% of the", said[0])


def test_exits_alone_keep_the_head(start: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert call(skipnet, "--start", start, "--method", "hindsight", "--free", 0, "--output", run, *FEW) == 1, "not so"
    free = ("--free", "0", "--shut", "0", "--open", "0.5", "--channel-mode", "none", "--spread", "0")
    exits = ("--exits-alone", "--exits-after", "layer2,layer3.0", "--exit-hidden", "8", "--distill-exits", "0.5")
    stages = ("--stage", "iadi.epochs=0", "--alpha", "0", "--gain")
    assert call(ddi, "--start", start, *free, *exits, *stages, "--output", run, *FEW) == 0
    model: Any = timm.create_model(f"local-dir:{run}", pretrained=True)
    assert [head.fc.in_features for head in model.exits.heads] == [8, 8]
    assert model.exits.config.hidden == 8
    gates = model.layer_gates
    assert gates.settled == {place: digit == "1" for place, digit in enumerate(POLICY)}, "nothing is left to gates"
    with open(run / "metrics.jsonl") as rows:
        assert {row["keep_ratio"] for row in map(json.loads, rows)} == {0.5}, "from the first step on"
    before = td.strip(timm.create_model(f"local-dir:{start}", pretrained=True)).state_dict()
    after = td.strip(model).state_dict()
    assert all(torch.equal(value, before[name]) for name, value in after.items())
    assert "adaptive_gain" in json.loads((run / "summary.json").read_text())


@pytest.mark.parametrize(("given", "found"), [(None, 1.0), (0.25, 0.25)])
def test_a_task_gets_the_share_of_the_exits_gradient(tmp_path: Path, given: float | None, found: float) -> None:
    model: Any = td.add_exits(timm.create_model("skipnet_resnet20_cifar"))
    chosen = settings(tmp_path, exit_gradient=given)
    dynamic_task(model, Outlook(1, 1.0, (3, 32, 32), chosen, {}, None, lambda: ()))
    assert model.exits.gradient == found
