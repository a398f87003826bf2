"""Trained weights that ship with the package: how they get there, load offline, and go to the Hub.

Small networks with random weights are shipped to a folder of the test's own, by the recipe that ships the real ones.
"""

import dataclasses
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import typer
from fake_hub import FakeHub
from huggingface_hub import ModelCard
from nets import randomise
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import timm_dynamic as td
from timm_dynamic import cifar, hub, registry, shipped
from timm_dynamic.cli import app
from timm_dynamic.evaluation import in_points
from timm_dynamic.gates import PARTS

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "train_recipes"))

import ship  # noqa: E402
from run_folder import RunError  # noqa: E402

BASE = "resnet20_cifar"
PLAIN, SKIPNET, DDI = f"{BASE}.blobs", f"skipnet_{BASE}.blobs_sp", f"ddi_{BASE}.blobs"
LABELS = ("blue", "green", "red")
CFG = {"num_classes": 3, "label_names": LABELS, "input_size": (3, 16, 16), "mean": (0.5, 0.4, 0.3), "tag": None}
CHANNELS = {"group_size": 8, "mode": "nested", "levels": 2, "init": "random"}
COMMAND = "accelerate launch train_recipes/ddi.py --target 0.5"


def blobs(root: Path, count: int) -> None:
    """Noisy images of three colours, `count` of each, under train and val."""
    generator = np.random.default_rng(0)
    for part in ("train", "val"):
        for place, label in enumerate(LABELS):
            (root / part / label).mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 160, (16, 16, 3), dtype=np.uint8)
                pixels[..., 2 - place] += 60
                Image.fromarray(pixels).save(root / part / label / f"{i}.png")


def trained(name: str, **parts: Any) -> Any:
    """A network with weights that matter, and gates that keep some units and some not."""
    torch.manual_seed(1)
    model = randomise(timm.create_model(name, num_classes=3, pretrained_cfg_overlay=CFG, **parts)).eval()
    if hasattr(model, "layer_gates"):
        model.layer_gates.threshold.fill_(0.505)
    return model


def add_run(folder: Path, model: Any, base: Any) -> Path:
    """What a recipe leaves behind, as far as shipping looks at it."""
    hub.save_pretrained(model, folder)
    hub.save_pretrained(base, folder / "base")
    (folder / "settings.json").write_text(json.dumps({"seed": 5, "holdout": 55, "dataset": "folder"}))
    (folder / "summary.json").write_text("{}")
    return folder


def add_static(folder: Path, model: Any) -> None:
    """A run's best static policy, as `--gain` leaves it behind."""
    found = {"accuracy": 0.25, "macs": 9_000_000, "policy": "101", "share": 0.1}
    (folder / "summary.json").write_text(json.dumps({"adaptive_gain": 0.125, "static": found}))
    hub.save_pretrained(model, folder / "static")


class Shop:
    """Three shipped models, the runs that they come from, and images."""

    def __init__(self, root: Path) -> None:
        self.root, self.data = root / "repository", root / "data"
        self.weights, self.cards = self.root / "timm_dynamic" / "weights", self.root / "hub_cards"
        blobs(self.data, 20)
        base = trained(BASE)
        gates = td.LayerGateConfig("linear", "random")
        made = {
            PLAIN: base,
            # gated by hand, as the recipes do
            SKIPNET: trained(f"skipnet_{BASE}", layer_gates=gates),
            DDI: trained(f"ddi_{BASE}", layer_gates=gates, channel_gates=CHANNELS, exits={"after": ["layer1.1", 2]}),
        }
        self.models, self.lines = made, {}
        for full, model in made.items():
            run = add_run(root / "runs" / full, model, base)
            if full == DDI:
                add_static(run, made[SKIPNET])
            self.lines[full] = self.ship(run, full, holdout=55 if full == DDI else None)

    def order(self, run: Path, full: str, **changes: Any) -> ship.Order:
        given = {"dataset": "three colours", "targets": (0.5, 0.0001), "start": "From nothing at all.", **changes}
        return ship.Order(run, full.partition(".")[2], self.data, COMMAND, **given)

    def ship(self, run: Path, full: str, **changes: Any) -> list[str]:
        return ship.ship(self.order(run, full, **changes), self.root)

    def config(self, full: str) -> dict[str, Any]:
        return json.loads((self.weights / full / "config.json").read_text())

    def files(self) -> dict[str, bytes]:
        return {str(path.relative_to(self.root)): path.read_bytes() for path in self.root.rglob("*") if path.is_file()}


def register() -> None:
    """Register what lies in the folder of weights now."""
    cifar.default_cfgs.update(cifar.current_cfgs())
    own = shipped.shipped()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        timm.models.register_model(cifar.resnet20_cifar)
        for prefix in registry.METHODS:
            mine = own.get(f"{prefix}_{BASE}", {})
            registry._register_timm(prefix, BASE, cifar.default_cfgs[BASE], mine)


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    with pytest.MonkeyPatch.context() as patch:
        made = Shop(tmp_path_factory.mktemp("shop"))
        patch.setattr(shipped, "FOLDER", made.weights)
        register()
        yield made
    register()


def run(*args: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, list(map(str, args)))
    return result.exit_code, result.stdout, result.stderr


def evaluated(shop: Shop, full: str, *args: object) -> dict[str, Any]:
    code, out, err = run("evaluate", full, "--data", shop.data, "--device", "cpu", "--json", *args)
    assert code == 0, err
    return json.loads(out)


def few(found: dict[str, Any]) -> dict[str, Any]:
    return {key: found[key] for key in ("accuracy", "macs", "max_macs")}


def x(channels: int = 3) -> torch.Tensor:
    return torch.randn(8, channels, 16, 16, generator=torch.Generator().manual_seed(2))


# What ships is sound -------------------------------------------------------------------------------------------------


def faults(weights: Path, cards: Path) -> list[str]:
    """What is wrong with a folder of shipped models."""
    found, total = [], 0
    for folder in sorted(weights.iterdir()) if weights.is_dir() else ():
        names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
        if names == ["config.json"] and folder.name in shipped.ON_HUB:
            continue
        if names != ["config.json", "model.safetensors"]:
            found.append(f"{folder.name} holds {names}")
            continue
        total += sum(path.stat().st_size for path in folder.iterdir())
        found += [f"{folder.name}: {fault}" for fault in faults_of(folder)]
        if not (cards / f"{folder.name}.md").is_file():
            found.append(f"{folder.name} has no card")
    return found + ([f"{total} bytes"] if total > ship.MOST_BYTES else [])


def faults_of(folder: Path) -> Iterator[str]:
    config, blob = json.loads((folder / "config.json").read_text()), (folder / "model.safetensors").read_bytes()
    metrics = config["metrics"]
    if config["weights"] != {"bytes": len(blob), "sha256": hashlib.sha256(blob).hexdigest()}:
        yield "other weights than its config names"
    if config["architecture"] != folder.name.partition(".")[0]:
        yield f"weights of {config['architecture']}"
    if not {"command", "seed", "dataset", "images", "split"} <= set(metrics):
        yield "not told how it was trained and measured"
    if not {"accuracy", "macs"} <= set(metrics.get("dynamic", metrics)):
        yield "not measured"
    with safe_open(folder / "model.safetensors", "pt") as file:
        kinds = {key: file.get_tensor(key).dtype for key in file.keys()}  # noqa: SIM118
    stock = [key for key in kinds if key.endswith((".weight", ".bias")) and key.split(".")[0] not in PARTS]
    trunk = {kinds[key] for key in stock}
    if trunk != {torch.float16 if "full_precision" in metrics else torch.float32}:
        yield f"weights of {trunk}"


def test_what_ships_is_sound() -> None:
    assert faults(shipped.FOLDER, ROOT / "hub_cards") == []


def test_the_most_accurate_of_each_name_is_what_it_gives() -> None:
    for name, tags in shipped.shipped().items():
        metrics = {tag: (shipped.config_of(f"{name}.{tag}") or {})["metrics"] for tag in tags}
        accuracies = [metrics[tag].get("dynamic", metrics[tag])["accuracy"] for tag in tags]
        assert accuracies == sorted(accuracies, reverse=True)
        assert timm.get_pretrained_cfg(name).tag == next(iter(tags))


def test_what_ships_loads_offline() -> None:
    """Without a network (see conftest.py), by its name alone."""
    names = shipped.names()
    assert set(names) == set(shipped.ON_HUB) | {path.parent.name for path in shipped.FOLDER.glob("*/model.safetensors")}
    for name in sorted(set(names) - set(shipped.ON_HUB)):
        model = timm.create_model(name, pretrained=True).eval()
        size = model.pretrained_cfg["input_size"]
        with torch.no_grad():
            assert torch.isfinite(model(torch.randn(2, *size))).all(), name
        assert next(model.parameters()).dtype == torch.float32


def test_all_of_it_is_in_the_wheel(shop: Shop) -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    patterns = setuptools["package-data"]["timm_dynamic"]
    for package in (ROOT / "timm_dynamic", shop.weights.parent):
        packed = {path for pattern in patterns for path in package.glob(pattern)}
        assert {path for path in (package / "weights").rglob("*") if path.is_file()} <= packed


def cut(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-1] + b"x")


def rename(folder: Path) -> None:
    folder.rename(folder.with_name(f"iadi_{BASE}.blobs"))


def untold(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config["metrics"]["command"], config["metrics"]["dynamic"]["macs"]
    (folder / "config.json").write_text(json.dumps(config))


DAMAGE: dict[str, Callable[[Path], object]] = {
    "other weights": cut,
    "weights of ddi_": rename,
    "not measured": untold,
    "not told how": untold,
    "holds \\['config.json', 'model.bin'": lambda folder: (folder / "model.bin").touch(),
    "holds \\['config.json'\\]": lambda folder: (folder / "model.safetensors").unlink(),
    "has no card": lambda folder: (folder.parents[2] / "hub_cards" / f"{DDI}.md").unlink(),
}


@pytest.mark.parametrize("fault", DAMAGE)
def test_the_check_above_sees_faults(fault: str, shop: Shop, tmp_path: Path) -> None:
    shutil.copytree(shop.root, tmp_path, dirs_exist_ok=True)
    weights, cards = tmp_path / "timm_dynamic" / "weights", tmp_path / "hub_cards"
    assert faults(weights, cards) == []
    DAMAGE[fault](weights / DDI)
    with pytest.raises(AssertionError, match=fault):
        raise AssertionError(faults(weights, cards))


# Shipping ------------------------------------------------------------------------------------------------------------


def test_shipped_weights_are_the_trained_ones_in_half_precision(shop: Shop) -> None:
    for full, model in shop.models.items():
        assert torch.isfinite(model(x())).all()
        loaded = timm.create_model(full, pretrained=True).eval()
        theirs = loaded.state_dict()
        buffers = {key for key, _ in model.named_buffers()}
        for key, value in model.state_dict().items():
            exact = key in buffers or key.startswith(("layer_gates", "channel_gates"))
            assert torch.equal(theirs[key], value if exact else value.half().float()), key
        assert theirs.keys() == model.state_dict().keys()


def test_a_run_gated_by_hand_gets_its_methods_name(shop: Shop, tmp_path: Path) -> None:
    """As the recipes gate; shipped once more, in full precision, it takes the place of what was there."""
    model = td.add_layer_gates(trained(BASE), td.LayerGateConfig("linear", "random"))
    model.layer_gates.threshold.fill_(0.505)
    folder = add_run(tmp_path / "run", model, trained(BASE))
    assert json.loads((folder / "config.json").read_text())["architecture"] == f"ddi_{BASE}"
    weights, card = tmp_path / "timm_dynamic" / "weights", tmp_path / "hub_cards" / f"{SKIPNET}.md"
    for half in (True, False):
        lines = ship.ship(shop.order(folder, SKIPNET, half=half, seed=7), tmp_path)
        assert f"{SKIPNET} and" in lines[-1]
        assert [path.name for path in weights.iterdir()] == [SKIPNET]
        assert faults(weights, card.parent) == []
        assert ("stored in half precision" in card.read_text()) == half
        assert "With seed 7," in card.read_text()
        again = timm.create_model(f"local-dir:{weights / SKIPNET}", pretrained=True).eval()
        assert again.pretrained_cfg["architecture"] == f"skipnet_{BASE}"
        assert torch.equal(again(x()), model(x())) != half


@pytest.mark.parametrize("kind", ["ff2", "rnn"])
def test_what_no_image_reaches_is_not_stored(shop: Shop, tmp_path: Path, kind: str) -> None:
    """The rest loads as ever: with parts of it left out or its units given back, too."""
    full = f"iadi_{BASE}.blobs"
    model = td.add_channel_gates(td.add_layer_gates(trained(BASE), td.LayerGateConfig(kind, "random")))
    names = model.layer_gates.gated
    td.settle_channels(
        td.open_units(td.shut_units(model, names[:1]), names[1:]),
        {name: "1" * len(model.channel_gates.sizes[place][0]) for place, name in enumerate(names)},
    )
    ship.ship(shop.order(add_run(tmp_path / "run", model, trained(BASE)), full, half=False), tmp_path)
    folder = tmp_path / "timm_dynamic" / "weights" / full
    state = load_file(folder / "model.safetensors")
    own = ["channel_gates.gates.", *(["layer_gates.gates."] if kind == "ff2" else [])]
    gone = tuple(f"{part}{place}." for part in own for place in range(len(names)))
    assert {key for key in model.state_dict() if key not in state} == {
        key for key in model.state_dict() if key.startswith((f"{names[0]}.", *gone))
    }
    wanted = model(x())
    for parts in ({}, {"exits": True}, {"channel_gates": False}, {"layer_gates": False, "channel_gates": False}):
        again = timm.create_model(f"local-dir:{folder}", pretrained=True, **parts).eval()
        assert torch.allclose(again(x()), wanted, atol=1e-5), parts
    free = {**model.layer_gates.config.to_dict(), "shut": [], "open": names}
    assert torch.allclose(
        timm.create_model(f"local-dir:{folder}", pretrained=True, layer_gates=free).eval()(x()), wanted
    )


def test_what_images_reach_must_be_there(shop: Shop, tmp_path: Path) -> None:
    model = td.add_layer_gates(trained(BASE), td.LayerGateConfig("ff2", "random"))
    names = td.shut_units(model, model.layer_gates.gated[:1]).layer_gates.gated
    hub.save_pretrained(model, tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    for key in (f"{names[1]}.conv1.weight", "layer_gates.gates.1.fc.bias"):
        save_file({name: value for name, value in state.items() if name != key}, tmp_path / "model.safetensors")
        with pytest.raises(RuntimeError, match=re.escape(key)):
            timm.create_model(f"local-dir:{tmp_path}", pretrained=True)


def test_the_numbers_are_those_of_the_command(shop: Shop) -> None:
    metrics = shop.config(DDI)["metrics"]
    found = evaluated(shop, DDI)
    assert {key: found[key] for key in metrics["dynamic"]} == metrics["dynamic"]
    assert found["images"] == metrics["images"] == 60
    again = evaluated(shop, DDI, "--batch-size", 7)
    assert {key: again[key] for key in metrics["dynamic"]} == metrics["dynamic"]
    assert len(metrics["exits"]) == len(metrics["budgets"]) == 3
    for row in metrics["exits"][:2]:
        assert few(evaluated(shop, DDI, "--exit", row["exit"])) == few(row)
    for row in metrics["budgets"][1:2]:
        assert few(evaluated(shop, DDI, "--budget-fraction", row["budget"])) == few(row)
    plain = shop.config(PLAIN)["metrics"]
    assert few(evaluated(shop, PLAIN)) == few(plain)
    assert plain["macs"] == metrics["dense"]["macs"] == found["dense_macs"]
    assert abs(metrics["full_precision"]["accuracy"] - found["accuracy"]) <= ship.TOLERANCE


def test_targets_are_calibrated_on_held_out_images(shop: Shop) -> None:
    metrics = shop.config(DDI)["metrics"]["calibrated"]
    assert (metrics["images"], metrics["held_out"]) == (55, True)
    (row,) = metrics["rows"]
    assert row["target"] == 0.5
    assert "no row for --target 0.0001: no thresholds meet it" in shop.lines[DDI]
    model = timm.create_model(DDI, pretrained=True).eval()
    for part in (model.layer_gates, model.channel_gates):
        part.threshold.fill_(row["threshold"])
    if row["confidence"] is not None:
        model.exits.set_confidence([row["confidence"]] * len(model.exits))
    hub.save_pretrained(model, shop.root.parent / "calibrated")
    assert few(evaluated(shop, f"local-dir:{shop.root.parent / 'calibrated'}")) == few(row)
    assert "calibrated" not in shop.config(SKIPNET)["metrics"]


def test_the_gain_is_measured_on_the_same_images(shop: Shop) -> None:
    metrics = shop.config(DDI)["metrics"]
    static = evaluated(shop, f"local-dir:{shop.root.parent / 'runs' / DDI / 'static'}")
    assert metrics["static"] == {"accuracy": static["accuracy"], "macs": 9_000_000, "policy": "101", "share": 0.1}
    assert metrics["adaptive_gain"] == metrics["dynamic"]["accuracy"] - static["accuracy"]
    assert "static" not in shop.config(SKIPNET)["metrics"]
    beside = evaluated(shop, DDI, "--against", f"local-dir:{shop.root.parent / 'runs' / DDI / 'static'}")["against"]
    assert beside["difference"] == pytest.approx(metrics["adaptive_gain"])
    assert beside["standard_error"] == metrics["adaptive_gain_error"] > 0


def test_which_images_are_held_out(shop: Shop) -> None:
    folder, places = ship._held_out(shop.models[DDI], shop.order(shop.root, DDI, holdout=7))
    chosen = [folder.samples[place] for place in places]
    files = sorted((shop.data / "train").glob("*/*.png"), key=lambda path: (path.parent.name, path.name))
    assert [Path(path) for path, _ in chosen] == [
        files[i] for i in sorted(np.random.default_rng(0).permutation(60)[:7])
    ]


def test_a_card_tells_all(shop: Shop) -> None:
    card = ModelCard.load(shop.cards / f"{DDI}.md")
    text, metrics = card.content, shop.config(DDI)["metrics"]
    gain, static = metrics["adaptive_gain"], metrics["static"]
    told = {(one.metric_name, one.metric_value) for one in card.data.eval_results}
    assert ("Accuracy (without budget)", metrics["dynamic"]["accuracy"]) in told
    assert ("MACs (calibrated to 50% of the base)", metrics["calibrated"]["rows"][0]["macs"]) in told
    assert card.data.model_name == DDI
    for wanted in (
        f"```bash\n{COMMAND}\n```",
        "With seed 5,",
        "three colours, the 60 images of `val`",
        f"timm-dynamic evaluate {DDI} --data DIR --device cpu",
        "55 images of the training set, held out in training,",
        f"adaptive gain: {in_points(gain, metrics['adaptive_gain_error'])} against the static policy beside it",
        "\n```\n\nFrom nothing at all.\n",
        "--calibrate SHARE --held-out 55",
        f"({static['accuracy']:.2%} at 9.00 M)",
        f"patterns of layers that occur: {metrics['dynamic']['policies']} (",
        f'timm.create_model("{DDI}", pretrained=True)',
    ):
        assert wanted in text
    assert "not trained yet" not in text
    plain = (shop.cards / f"{PLAIN}.md").read_text()
    assert "a plain network: no gates, no exits" in plain
    assert "What it decides" not in plain


@pytest.mark.parametrize("full", [PLAIN, SKIPNET, DDI])
def test_the_command_writes_the_same_card(full: str, shop: Shop) -> None:
    assert run("card", full) == (0, (shop.cards / f"{full}.md").read_text(), "")


def test_the_card_of_a_twin_says_whose_weights_it_has(shop: Shop) -> None:
    _, out, _ = run("card", f"iadi_{PLAIN}")
    assert f"those of `{PLAIN}` as timm_dynamic ships them" in out
    assert "not trained yet" in out


def refused(message: str, shop: Shop, order: ship.Order) -> None:
    before = shop.files()
    with pytest.raises(RunError, match=message) as caught:
        ship.ship(order, shop.root)
    assert "\n" not in str(caught.value)
    assert shop.files() == before
    assert [path.name for path in shop.weights.iterdir() if path.name.startswith(".")] == []


def test_refusals_leave_everything_as_it_was(shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = shop.root.parent / "runs" / DDI
    refused("no folder", shop, shop.order(tmp_path / "none", DDI))
    refused("--tag must be words", shop, ship.Order(own, "A tag", shop.data, COMMAND, "three colours"))
    refused("no folder with classes .*test", shop, shop.order(own, DDI, split="test"))
    refused("1 to 59 can be held out; found 900", shop, shop.order(own, DDI, holdout=900))
    stock = randomise(timm.create_model("resnet18", num_classes=3)).eval()
    plain = shop.root.parent / "runs" / PLAIN
    refused("a plain network has nothing to calibrate", shop, shop.order(plain, PLAIN, holdout=10))
    refused("resnet18 is timm's", shop, shop.order(add_run(tmp_path / "stock", stock, stock), DDI))
    shutil.copytree(own, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "static")
    refused("gain is that of held-out images; static/ is needed", shop, shop.order(tmp_path / "run", DDI))
    (tmp_path / "run" / "settings.json").unlink()
    refused("does not tell its seed: give --seed", shop, shop.order(tmp_path / "run", DDI))
    monkeypatch.setattr(ship, "TOLERANCE", -1)
    refused("half precision changes the accuracy: as trained .* as shipped .*: give --full", shop, shop.order(own, DDI))
    monkeypatch.undo()
    monkeypatch.setattr(ship, "MOST_BYTES", 700_000)
    refused("all weights together may have 1 MB", shop, shop.order(own, DDI))


def test_the_recipe_takes_its_options(shop: Shop, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given = ["runs/ddi", "--tag", "cifar10", "--data", "cifar", "--dataset-name", "CIFAR-10", "--command", COMMAND]
    orders: list[Any] = []
    monkeypatch.setattr(ship, "ship", lambda *args: orders.append(args) or ["done"])
    recipe = typer.Typer()
    recipe.command()(ship.main)
    more = [
        "--holdout",
        "5000",
        "--target",
        "0.4",
        "--target",
        "0.6",
        "--seed",
        "3",
        "--full",
        "--root",
        str(tmp_path),
    ]
    for options in ([], more):
        assert CliRunner().invoke(recipe, [*given, *options]).stdout == "done\n"
    wanted = ship.Order(Path("runs/ddi"), "cifar10", Path("cifar"), COMMAND, "CIFAR-10")
    assert orders[0] == (wanted, ROOT)
    changes: dict[str, Any] = {"holdout": 5000, "targets": (0.4, 0.6), "seed": 3, "half": False}
    assert orders[1] == (dataclasses.replace(wanted, **changes), tmp_path)
    failed = CliRunner().invoke(recipe, [*given, "--target", "0.5"])
    assert isinstance(failed.exception, RunError)
    assert "give --holdout too" in str(failed.exception)


# Loading -------------------------------------------------------------------------------------------------------------


def test_tags_are_listed(shop: Shop) -> None:
    known = timm.list_models("*cifar*", pretrained=True)
    assert {PLAIN, SKIPNET, DDI, f"iadi_{PLAIN}", f"skipnet_{PLAIN}"} <= set(known)
    listed = json.loads(run("list", f"*{BASE}", "--pretrained", "--fast", "--json")[1])
    tags = {row["name"]: row["pretrained_tags"] for row in listed}
    assert tags[f"skipnet_{BASE}"] == ["blobs", "blobs_sp"]
    assert tags[BASE] == tags[f"ddi_{BASE}"] == ["blobs"]


def test_a_name_without_a_tag_has_its_own_trained_weights(shop: Shop) -> None:
    for full in (PLAIN, SKIPNET, DDI):
        model = timm.create_model(full.partition(".")[0], pretrained=True).eval()
        assert torch.equal(model(x()), timm.create_model(full, pretrained=True).eval()(x()))
    twin = timm.create_model(f"skipnet_{PLAIN}", pretrained=True).eval()
    assert torch.equal(twin(x()), timm.create_model(PLAIN, pretrained=True).eval()(x()))
    assert td.decide(twin, x()).layer_keep.all()


def test_the_most_accurate_is_what_a_name_without_a_tag_gives(shop: Shop, tmp_path: Path) -> None:
    accuracies = {"a": 0.5, "b": 0.75, "c": 0.75, "d": None, "e": 0.625}
    for full in (PLAIN, DDI):
        for tag, accuracy in accuracies.items():
            folder = tmp_path / f"{full.partition('.')[0]}.{tag}"
            shutil.copytree(shop.weights / full, folder)
            config = shop.config(full)
            metrics = config["metrics"]
            metrics.get("dynamic", metrics)["accuracy"] = accuracy
            (folder / "config.json").write_text(json.dumps(config))
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(shipped, "FOLDER", tmp_path)
            register()
            assert {tuple(tags) for tags in shipped.shipped().values()} == {("b", "c", "e", "a", "d")}
            names = (BASE, f"skipnet_{BASE}", f"ddi_{BASE}")
            assert {timm.get_pretrained_cfg(name).tag for name in names} == {"b"}
    finally:
        register()


def test_what_timm_is_told(shop: Shop) -> None:
    cfg = timm.create_model(DDI, pretrained=True).pretrained_cfg
    assert (cfg["tag"], cfg["architecture"], cfg["num_classes"]) == ("blobs", f"ddi_{BASE}", 3)
    assert (cfg["input_size"], cfg["label_names"], cfg["license"]) == ((3, 16, 16), LABELS, "mit")
    assert cfg["mean"] == (0.5, 0.4, 0.3)
    assert Path(cfg["file"]) == shop.weights / DDI / "model.safetensors"
    assert "hf_hub_id" not in cfg


def test_what_was_loaded_can_be_saved_again(shop: Shop, tmp_path: Path) -> None:
    model = timm.create_model(SKIPNET, pretrained=True, num_classes=4).eval()
    hub.save_pretrained(model, tmp_path)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(again(x()), model(x()))
    assert again.layer_gates.config == shop.models[SKIPNET].layer_gates.config


def test_predict_names_the_classes(shop: Shop) -> None:
    code, out, _ = run("predict", DDI, shop.data / "val" / "red" / "0.png", "--json")
    assert code == 0
    assert {one["label"] for one in json.loads(out)[0]["top"]} == set(LABELS)


def test_a_tag_without_its_weights_is_the_same_network(shop: Shop) -> None:
    for kwargs in ({}, {"device": "meta"}):
        model = timm.create_model(DDI, **kwargs)
        assert model.channel_gates.config == td.ChannelGateConfig(**CHANNELS)
        assert len(model.exits) == 2
    model.to_empty(device="cpu").load_state_dict(shop.models[DDI].state_dict())
    plain = timm.create_model(f"ddi_{BASE}")  # the entry point's own defaults, whatever ships
    assert plain.channel_gates.config == td.ChannelGateConfig()
    profile = json.loads(run("profile", DDI, "--json")[1])
    assert (profile["layer_gates"], profile["channel_gates"]) == ("linear", "nested")


def test_other_classes_channels_and_features(shop: Shop) -> None:
    stock = shop.models[DDI]
    model = timm.create_model(DDI, pretrained=True, num_classes=7, in_chans=1).eval()
    assert [y.shape for y in td.anytime(model, x(1))] == [(8, 7)] * 3
    assert torch.equal(model.layer1[0].conv1.weight, stock.layer1[0].conv1.weight.half().float())
    halved = stock.conv1.weight.half().float().sum(1, keepdim=True)
    torch.testing.assert_close(model.conv1.weight, halved, atol=2e-3, rtol=0)
    assert timm.create_model(DDI, pretrained=True, num_classes=0).eval()(x()).shape == (8, 64)
    features = timm.create_model(DDI, pretrained=True, features_only=True).eval()(x())
    assert [f.shape[1] for f in features] == [16, 16, 32, 64]
    half = {k: v.half().float() if v.is_floating_point() else v for k, v in stock.state_dict().items()}
    assert torch.equal(timm.create_model(DDI, pretrained_cfg="blobs", pretrained=True).fc.weight, half["fc.weight"])


def test_parts_can_be_left_out_and_added(shop: Shop) -> None:
    model = timm.create_model(DDI, pretrained=True, exits=False, channel_gates=False).eval()
    assert [hasattr(model, part) for part in PARTS] == [True, False, False]
    whole = timm.create_model(DDI, pretrained=True).eval()
    assert torch.equal(td.decide(model, x()).layer_prob[:, 0], td.decide(whole, x()).layer_prob[:, 0])
    none = timm.create_model(DDI, pretrained=True, layer_gates=False, channel_gates=False, exits=False)
    assert type(none) is cifar.CifarResNet
    more = timm.create_model(SKIPNET, pretrained=True, exits=True).eval()
    assert len(more.exits) == 2
    assert torch.equal(more(x()), timm.create_model(SKIPNET, pretrained=True).eval()(x()))
    same = timm.create_model(DDI, pretrained=True, exits=True, layer_gates="linear")
    assert same.exits.config == whole.exits.config


@pytest.mark.parametrize("name", [DDI, f"ddi_{BASE}", "local-dir"])
def test_gates_of_another_kind_are_refused(name: str, shop: Shop) -> None:
    name = f"local-dir:{shop.weights / DDI}" if name == "local-dir" else name
    message = f"the weights of ddi_{BASE} have layer_gates with kind='linear'; found layer_gates with kind='rnn': leave"
    with pytest.raises(ValueError, match=message):
        timm.create_model(name, pretrained=True, layer_gates="rnn")
    with pytest.raises(ValueError, match="have channel_gates with group_size=8, mode='nested'"):
        timm.create_model(name, pretrained=True, channel_gates={"levels": 2, "mode": "independent"})
    assert timm.create_model(f"ddi_{BASE}", layer_gates="rnn").layer_gates.config.kind == "rnn"


def test_scripts_that_resolve_the_name_first(shop: Shop) -> None:
    """As timm's own scripts do, for its configs as dicts."""
    resolved = timm.models.resolve_model_input_args(DDI, {}, num_classes=5)
    model = timm.create_model(**resolved, pretrained=True).eval()
    assert (model(x()).shape, model.channel_gates.config.levels) == ((8, 5), 2)


# In processes of their own -------------------------------------------------------------------------------------------


def copy_of_package(folder: Path, weights: Path) -> Path:
    """The package with other weights: links to its files."""
    package = folder / "timm_dynamic"
    package.mkdir(parents=True)
    for path in (ROOT / "timm_dynamic").iterdir():
        if path.name not in ("weights", "__pycache__"):
            (package / path.name).symlink_to(path)
    (package / "weights").symlink_to(weights)
    return folder


def python(script: str, package: Path, *args: object, **settings: str) -> str:
    """Run a script with a copy of the package; what it prints."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGINGFACE_"))}
    env = {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(package), **settings}
    command = [sys.executable, "-c", script, *map(str, args)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=package)
    assert done.returncode == 0, done.stderr
    return done.stdout


OFFLINE_THEN_PUBLISH = """
import json, socket, sys
kept = {name: getattr(socket, name) for name in ("getaddrinfo", "create_connection")}
connect = socket.socket.connect
def refuse(*args, **kwargs):
    raise AssertionError("the network was touched")
socket.socket.connect = socket.getaddrinfo = socket.create_connection = refuse
from typer.testing import CliRunner
from timm_dynamic.cli import app
def run(*args):
    result = CliRunner().invoke(app, args)
    assert result.exit_code == 0, result.output
    return result.stdout
name, data = sys.argv[1:]
found = [json.loads(run("evaluate", name, "--data", data, "--device", "cpu", "--json"))]
socket.socket.connect = connect
socket.getaddrinfo, socket.create_connection = kept["getaddrinfo"], kept["create_connection"]
print(json.dumps([*found, json.loads(run("publish", "--all", "org", "--json")), run("publish", "--all", "org")]))
"""
FLIPPED = """
import json, sys
import timm, torch
import timm_dynamic as td
full = sys.argv[1]
x = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(2))
names = (full, full.partition(".")[0], "hf-hub:org/" + full)
models = [timm.create_model(name, pretrained=True).eval() for name in names]
other = sys.argv[2]
overlay = {"file": None, "hf_hub_id": "org/" + other}
assert torch.equal(
    timm.create_model(other, pretrained=True, pretrained_cfg_overlay=overlay).eval()(x),
    timm.create_model(other, pretrained=True).eval()(x),
)
print(json.dumps([[m.pretrained_cfg.get("hf_hub_id"), m(x).tolist(), td.decide(m, x).macs.tolist()] for m in models]))
"""


def test_a_fresh_process_evaluates_offline_publishes_and_flips_to_the_hub(shop: Shop, tmp_path: Path) -> None:
    with FakeHub(users={"good": "org"}) as server:
        online = {"HF_ENDPOINT": server.url, "HF_TOKEN": "good", "HF_HUB_DISABLE_XET": "1"}
        package = copy_of_package(tmp_path / "one", shop.weights)
        out = python(OFFLINE_THEN_PUBLISH, package, DDI, shop.data, **online, HF_HOME=str(tmp_path / "home"))
        found, first, text = json.loads(out)
        metrics = shop.config(DDI)["metrics"]["dynamic"]
        assert {key: found[key] for key in metrics} == metrics
        assert text == "".join(f"{row['repo']} holds {row['name']}: {row['url']}\n" for row in first)
        assert [row["repo"] for row in first] == [f"org/{full}" for full in (DDI, PLAIN, SKIPNET)]
        for full in (DDI, PLAIN, SKIPNET):
            repo = server.repos[f"org/{full}"]
            assert len(repo.commits) == 2  # the repository's first, and one for two uploads
            files = repo.commits[repo.branches["main"]]
            for name in ("model.safetensors", "config.json"):
                assert files[name] == (shop.weights / full / name).read_bytes()
            assert files["README.md"] == (shop.cards / f"{full}.md").read_bytes()
        flipped = one_line_changed(copy_of_package(tmp_path / "two", tmp_path / "weights"), shop)
        answers = json.loads(python(FLIPPED, flipped, DDI, SKIPNET, **online, HF_HOME=str(tmp_path / "other")))
    model = timm.create_model(DDI, pretrained=True).eval()
    for place, logits, macs in answers:
        assert place == f"org/{DDI}"
        torch.testing.assert_close(torch.tensor(logits), model(x()))  # another process: another number of threads
        assert macs == td.decide(model, x()).macs.tolist()


def one_line_changed(package: Path, shop: Shop) -> Path:
    """Say in the package that a model's weights are on the Hub, and take them out of it."""
    shutil.copytree(shop.weights, package.parent / "weights")
    (package.parent / "weights" / DDI / "model.safetensors").unlink()
    module = package / "timm_dynamic" / "shipped.py"
    text, line = module.read_text(), "ON_HUB: dict[str, str] = {}"
    assert text.count(line) == 1
    module.unlink()
    module.write_text(text.replace(line, f'ON_HUB: dict[str, str] = {{"{DDI}": "org/{DDI}"}}'))
    return package


def test_publishing_all_refuses_in_one_line(shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(hub, "get_token", lambda: None)
    for args, message, wanted in (
        (["--all", "org"], "no token to write to org/", 1),
        (["--all", "a b"], "is no repository name", 2),
        ([], "give DIR and REPO_ID, or --all ORG", 2),
        ([tmp_path], "give DIR and REPO_ID, or --all ORG", 2),
        ([tmp_path, "org/x", "--all", "org"], "give DIR and REPO_ID, or --all ORG", 2),
    ):
        code, out, err = run("publish", *args)
        assert (code, out, err.count("\n")) == (wanted, "", 1)
        assert message in err
    monkeypatch.setattr(shipped, "FOLDER", tmp_path)
    code, _, err = run("publish", "--all", "org")
    assert (code, err) == (2, "error: no weights ship with this package: give DIR and REPO_ID for a run's\n")
