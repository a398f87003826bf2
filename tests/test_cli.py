"""The command line: what it prints, what it refuses, and its exit codes."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from fake_hub import FakeHub
from PIL import Image
from safetensors.torch import save_file
from timm.data import create_transform, resolve_data_config
from torch import nn
from torchvision.datasets import ImageFolder
from typer.testing import CliRunner

import timm_dynamic as td
from timm_dynamic import cifar, registry
from timm_dynamic.cli import app, images, models, rows, tables
from timm_dynamic.evaluation import evaluate, held_out_places
from timm_dynamic.hub import save_pretrained

CLASSES = ("cat", "dog", "eel")
SHUT = (1, 4)  # gated units of the network below whose layer gates are shut: layer1.2 and layer2.2
STRIP = "██░│██░│███"
SUMMARY = {
    "dense": {"accuracy": 0.9, "macs": 40_000_000},
    "dynamic": {"accuracy": 0.89, "macs": 2.2e7, "max_macs": 31_000_000, "keep_ratio": 0.5},
    "exits": [],
    "budgets": [],
    "dataset": "cifar10",
    "recipe": "ddi",
    "seed": 3,
}
SCRIPT = """
import json, sys
from timm_dynamic.cli import main
for sys.argv[1:] in json.loads(sys.argv[1]):
    try:
        main()
    except SystemExit as done:
        code = done.code
sys.exit(code)
"""


class Ran:
    """What a command did."""

    def __init__(self, *args: object) -> None:
        result = CliRunner().invoke(app, [str(arg) for arg in args])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        self.code, self.out, self.err = result.exit_code, result.stdout, result.stderr

    @property
    def json(self) -> Any:
        assert self.code == 0, self.err
        return json.loads(self.out)


def refused(message: str, *args: object, code: int = 2) -> None:
    """A command must fail with one line on stderr that holds `message`, and print nothing."""
    ran = Ran(*args)
    assert (ran.code, ran.out) == (code, "")
    assert ran.err.startswith("error: ")
    assert ran.err.count("\n") == 1
    assert message in ran.err


def network() -> nn.Module:
    """A network that keeps all units but those in `SHUT`, whatever the image."""
    torch.manual_seed(0)
    model = timm.create_model("ddi_resnet20_cifar", num_classes=3, layer_gates="linear", channel_gates=False)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.5, 0.5)
        for index in SHUT:
            model.layer_gates.gates[index].fc.bias.fill_(-3)
    model.pretrained_cfg |= {"num_classes": 3, "label_names": list(CLASSES)}
    return model.eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    save_pretrained(network(), folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DATA/val/CLASS/*.png, in sizes of their own."""
    root, random = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for name in CLASSES:
        (root / "val" / name).mkdir(parents=True)
        for i in range(3):
            pixels = random.integers(0, 255, (36 + i, 44, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "val" / name / f"{i}.png")
    return root


def prepared(model: Any, data: Path) -> ImageFolder:
    """The images as timm prepares them."""
    config = resolve_data_config(pretrained_cfg=model.pretrained_cfg, model=model)
    return ImageFolder(str(data / "val"), create_transform(**config))


# list ----------------------------------------------------------------------------------------------------------------


def test_list_counts_what_the_models_have() -> None:
    (row,) = Ran("list", "ddi_resnet20_cifar", "--json").json
    model = timm.create_model("ddi_resnet20_cifar")
    assert row["params"] == sum(p.numel() for p in model.parameters())
    assert row["macs"] == td.cost_table(model, (3, 32, 32)).dense
    assert (row["base"], row["exits"], row["input_size"]) == ("resnet20_cifar", 2, [3, 32, 32])
    assert (row["layer_gates"], row["channel_gates"]) == ("rnn", "independent")


def test_list_without_counting_has_every_name_and_every_tag() -> None:
    found = {row["name"]: row for row in Ran("list", "--json").json}
    assert set(found) == {*registry.default_cfgs, *cifar.default_cfgs}
    assert all(row["params"] is None for row in found.values())
    tags = {full.partition(".")[2] for full in timm.list_models("iadi_resnet50", pretrained=True)}
    assert tags == set(found["iadi_resnet50"]["pretrained_tags"])
    assert found["iadi_resnet50"]["base"] == "resnet50"
    only = {row["name"] for row in Ran("list", "--json", "--pretrained", "--fast").json}
    assert only == {name for name, row in found.items() if row["pretrained_tags"]}


def test_list_takes_wildcards_and_parts_of_names() -> None:
    assert [row["name"] for row in Ran("list", "skipnet_densenet12*", "--json", "--fast").json] == [
        "skipnet_densenet121"
    ]
    part = {row["name"] for row in Ran("list", "densenet201", "--json", "--fast").json}
    assert part == {"skipnet_densenet201", "iadi_densenet201", "ddi_densenet201"}
    refused("no network matches 'vgg'", "list", "vgg")
    refused("no network with weights matches", "list", "nothing", "--pretrained")


def test_list_as_a_table() -> None:
    ran = Ran("list", "iadi_resnet50*", "--fast")
    assert "iadi_resnet50_gn" in ran.out
    assert "layer (rnn), channel (independent)" in ran.out
    assert ran.err == ""
    assert "--count counts" in Ran("list").err


# profile -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ddi_resnet18", "iadi_densenet100_cifar", "skipnet_resnet50"])
def test_profile_adds_up(name: str) -> None:
    row = Ran("profile", name, "--json").json
    parts = [row["stem_macs"], *(unit["macs"] for unit in row["units"]), *row["after_stage_macs"]]
    assert sum(parts) + row["exits"][-1]["head_macs"] == row["dense_macs"]
    with torch.device("meta"):
        model = timm.create_model(name)
    table = td.cost_table(model, tuple(row["input_size"]))
    assert row["dense_macs"] == table.dense
    assert row["dearest"] == table.dearest == max(stop["dearest"] for stop in row["exits"])
    assert row["layer_gate_macs"] == sum(unit.layer_gate for unit in table.units)
    assert [unit["skippable"] for unit in row["units"]] == [False] + [True] * (len(table.units) - 1)
    assert row["params"] == sum(p.numel() for p in model.parameters())


def test_profile_of_a_plain_network_says_that_all_is_dense() -> None:
    ran = Ran("profile", "resnet18")
    assert "A dense network: no gates, no exits." in ran.out
    row = Ran("profile", "resnet18", "--json").json
    assert row["cheapest"] == row["dearest"] == row["dense_macs"]
    assert row["layer_gates"] is None


def test_profile_takes_a_size_and_a_kind_of_gate() -> None:
    small = Ran("profile", "skipnet_resnet18", "--input-size", 3, 64, 64, "--layer-gates", "ff1", "--json").json
    assert small["input_size"] == [3, 64, 64]
    assert small["layer_gates"] == "ff1"
    assert small["units"][1]["layer_gate_share"] == pytest.approx(0.15625, abs=0.01)  # 9/4 (1 + 1/4) of 18 C^2
    added = Ran("profile", "resnet18", "--input-size", 3, 64, 64, "--layer-gates", "ff1", "--json").json
    assert added["units"] == small["units"]


def test_profile_as_a_table(saved: Path) -> None:
    out = Ran("profile", f"local-dir:{saved}").out
    for text in ("layer3.2 (head)", "always runs", "cheapest image:", "layer gates together:", "up to"):
        assert text in out
    assert "after stage 1" in Ran("profile", "skipnet_densenet100_cifar").out


def test_profile_refuses_in_one_line(tmp_path: Path) -> None:
    refused("did you mean", "profile", "ddi_resnet19")
    refused("no units to gate in 'vgg16'", "profile", "vgg16")
    refused("Invalid pretrained tag (bogus)", "profile", "skipnet_resnet18.bogus")
    refused("cannot run an input of (1, 224, 224)", "profile", "ddi_resnet18", "--input-size", 1, 224, 224)
    refused("at least 1; found 0", "profile", "ddi_resnet18", "--input-size", 3, 0, 224)
    refused(f"no folder {tmp_path}/x", "profile", f"local-dir:{tmp_path}/x")
    refused("holds no config.json", "profile", f"local-dir:{tmp_path}")
    refused("local-dir:org/name", "profile", "org/name")
    refused("the Hub cannot be reached", "profile", "hf-hub:org/name", code=1)
    assert Ran("profile", "resnet18", "--layer-gates", "big").code == 2
    assert Ran("profile").code == 2


# predict -------------------------------------------------------------------------------------------------------------


def test_predict_tells_what_the_model_decides(saved: Path, data: Path) -> None:
    paths = sorted((data / "val").rglob("*.png"))
    found = Ran("predict", f"local-dir:{saved}", *paths, "--json").json
    model = network()
    wanted = td.decide(model, torch.stack([x for x, _ in prepared(model, data)]))
    assert [row["image"] for row in found] == list(map(str, paths))
    assert [row["macs"] for row in found] == wanted.macs.tolist()
    for row, prob in zip(found, wanted.logits.softmax(1), strict=True):
        for guess in row["top"]:
            assert guess["label"] == CLASSES[guess["class"]]
            assert guess["probability"] == pytest.approx(prob[guess["class"]].item(), abs=1e-5)
        assert sum(guess["probability"] for guess in row["top"]) == pytest.approx(1)
        assert [unit["ran"] for unit in row["units"]] == [float(i - 1 not in SHUT) for i in range(9)]
        assert (row["exit"], row["left_at"]) == (2, "head")


def test_predict_draws_the_units_that_ran(saved: Path, data: Path) -> None:
    image = data / "val" / "cat" / "0.png"
    out = Ran("predict", f"local-dir:{saved}", image).out
    assert STRIP in out
    assert "left at the head" in out
    early = Ran("predict", f"local-dir:{saved}", image, "--exit", 1).out
    assert "██░│██░│···" in early
    assert "left at exit 1, after layer2.2" in early
    assert any(name in out for name in CLASSES)


def test_predict_keeps_a_hard_budget(saved: Path, data: Path) -> None:
    image = data / "val" / "dog" / "1.png"
    for fraction in (0.4, 0.7):
        (row,) = Ran("predict", f"local-dir:{saved}", image, "--budget-fraction", fraction, "--json").json
        assert row["macs"] <= fraction * row["dense_macs"]
        assert row["exit"] < 2
    (sure,) = Ran("predict", f"local-dir:{saved}", image, "--confidence", 0, "--json").json
    assert sure["exit"] == 0


def test_predict_partly_run_units() -> None:
    model = td.add_channel_gates(network())
    model.channel_gates.gates[2].fc.bias.data[1:] = -3  # layer2.0: two groups; the second never runs
    row = rows.predict(model, torch.randn(3, 32, 32), None)
    assert [unit["ran"] for unit in row["units"]] == [1, 1, 0, 0.5, 1, 0, 1, 1, 1]
    assert tables.strip(row["units"]) == "██░│▓█░│███"
    assert tables.strip(row["units"], tables.ASCII) == "##-|+#-|###"


def test_predict_goes_on_after_a_broken_image(saved: Path, data: Path, tmp_path: Path) -> None:
    broken, good = tmp_path / "broken.png", data / "val" / "eel" / "0.png"
    broken.write_bytes(good.read_bytes()[:300])
    (tmp_path / "text.png").write_text("no image")
    wrong = [broken, tmp_path / "text.png", tmp_path / "none.png", tmp_path]
    ran = Ran("predict", f"local-dir:{saved}", *wrong, good, "--json")
    assert ran.code == 2
    assert [row["image"] for row in json.loads(ran.out)] == [str(good)]
    lines = ran.err.splitlines()
    assert [line.startswith(f"error: {path}:") for line, path in zip(lines, wrong, strict=True)] == [True] * 4
    for line, words in zip(lines, ("cannot be read", "not an image", "no such file", "not a file"), strict=True):
        assert words in line


def test_predict_of_a_plain_network_and_imagenet_names(data: Path) -> None:
    image = data / "val" / "cat" / "0.png"
    (row,) = Ran("predict", "resnet18", image, "--no-pretrained", "--json").json
    assert row["macs"] == row["dense_macs"]
    assert len(row["top"]) == 5
    assert all(guess["label"] for guess in row["top"])
    refused("a dynamic model is needed", "predict", "resnet18", image, "--no-pretrained", "--exit", 0)


def test_predict_of_a_network_with_one_input_channel(data: Path, tmp_path: Path) -> None:
    save_pretrained(timm.create_model("skipnet_densenet100_cifar", in_chans=1), tmp_path)
    (row,) = Ran("predict", f"local-dir:{tmp_path}", data / "val" / "cat" / "0.png", "--json").json
    assert [guess["label"] for guess in row["top"]] == [None] * 5


def test_predict_refuses_in_one_line(saved: Path, data: Path) -> None:
    image, name = data / "val" / "cat" / "0.png", f"local-dir:{saved}"
    refused("give only one of", "predict", name, image, "--exit", 0, "--confidence", 0.5)
    refused("exit must be in 0..2", "predict", name, image, "--exit", 3)
    refused("the smallest budget possible", "predict", name, image, "--budget-fraction", 0.01)
    refused("confidence must be a number in 0..1", "predict", name, image, "--confidence", 2)
    refused("give --no-pretrained", "predict", "skipnet_densenet100_cifar", image)
    refused("the Hub cannot be reached", "predict", "skipnet_resnet18.a1_in1k", image, code=1)
    assert Ran("predict", name).code == 2


def test_damaged_weights_are_refused_in_one_line(saved: Path, data: Path, tmp_path: Path) -> None:
    image = data / "val" / "cat" / "0.png"
    (tmp_path / "config.json").write_bytes((saved / "config.json").read_bytes())
    refused("holds no model.safetensors", "predict", f"local-dir:{tmp_path}", image)
    (tmp_path / "model.safetensors").write_bytes((saved / "model.safetensors").read_bytes()[:500])
    refused(f"local-dir:{tmp_path}: ", "predict", f"local-dir:{tmp_path}", image)
    (tmp_path / "config.json").write_text("{")
    refused(f"local-dir:{tmp_path}: ", "predict", f"local-dir:{tmp_path}", image)


def test_untrained_gates_are_noted_on_stderr(saved: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((saved / "config.json").read_bytes())
    save_file(timm.create_model("resnet20_cifar", num_classes=3).state_dict(), tmp_path / "model.safetensors")
    ran = Ran("predict", f"local-dir:{tmp_path}", data / "val" / "cat" / "0.png", "--json")
    assert len(ran.json) == 1
    assert "not trained yet" in ran.err


# evaluate ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["", "val"])
def test_evaluate_is_what_decide_says(folder: str, saved: Path, data: Path) -> None:
    args = ("--batch-size", 4, "--json", "--device", "cpu")
    row = Ran("evaluate", f"local-dir:{saved}", "--data", data / folder, *args).json
    model = network()
    dataset = prepared(model, data)
    wanted = td.decide(model, torch.stack([x for x, _ in dataset]))
    right = wanted.logits.argmax(1) == torch.tensor(dataset.targets)
    assert row["images"] == 9
    assert row["accuracy"] == pytest.approx(right.float().mean().item())
    assert row["macs"] == wanted.macs.double().mean().item()
    assert row["max_macs"] == wanted.macs.max().item()
    assert row["keep_ratio"] == pytest.approx(6 / 8)
    assert row["policies"] == 1
    assert [stop["share"] for stop in row["exits"]] == [0, 0, 1]


def test_evaluate_under_a_budget_and_with_workers(saved: Path, data: Path) -> None:
    args = ("--workers", 1, "--split", "val", "--exit", 1, "--json")
    row = Ran("evaluate", f"local-dir:{saved}", "--data", data, *args).json
    assert [stop["share"] for stop in row["exits"]] == [0, 1, 0]
    assert [stop["name"] for stop in row["exits"]] == ["layer1.2", "layer2.2", "head"]


def test_evaluate_as_a_table(saved: Path, data: Path) -> None:
    out = Ran("evaluate", f"local-dir:{saved}", "--data", data).out
    for text in ("accuracy", "left at exit 2 (head)", "100.0 %", "policies", "no channel gates"):
        assert text in out
    plain = Ran("evaluate", "resnet20_cifar", "--no-pretrained", "--data", data)
    assert "has 3 classes; the model knows 10" in plain.err


def test_evaluate_against_another_network(saved: Path, data: Path, tmp_path: Path) -> None:
    """Of the difference the standard error too, image by image; the other network keeps no budget that is asked for."""
    torch.manual_seed(4)
    save_pretrained(timm.create_model("resnet20_cifar", num_classes=3), tmp_path / "other")
    name, other = f"local-dir:{saved}", f"local-dir:{tmp_path / 'other'}"
    args = ("--data", data, "--against", other, "--exit", 0)
    found = Ran("evaluate", name, *args, "--json").json
    alone = Ran("evaluate", other, "--data", data, "--json").json
    beside = found["against"]
    assert (beside["name"], beside["accuracy"], beside["macs"]) == (other, alone["accuracy"], alone["macs"])
    assert beside["macs_share"] == alone["macs"] / found["dense_macs"] == 1.0
    assert beside["difference"] == pytest.approx(found["accuracy"] - alone["accuracy"])
    only = beside["recognised_by_the_first_only"], beside["recognised_by_the_second_only"]
    assert beside["difference"] == pytest.approx(only[0] - only[1])
    assert beside["standard_error"] == pytest.approx(math.sqrt((sum(only) - beside["difference"] ** 2) / (9 - 1)))
    assert beside["standard_error"] > 0, "the networks must differ"
    table = Ran("evaluate", name, *args).out
    assert f"{100 * beside['difference']:+.2f} points (standard error {100 * beside['standard_error']:.2f})" in table
    refused("no folder", "evaluate", name, "--data", data, "--against", f"local-dir:{tmp_path / 'none'}")


def test_evaluate_calibrates_first(saved: Path, data: Path, tmp_path: Path) -> None:
    """On the images of train/ that are held out; the thresholds are those that `td.calibrate` sets on them."""
    generator = np.random.default_rng(5)
    for name in CLASSES:
        (tmp_path / "train" / name).mkdir(parents=True)
        (tmp_path / "val" / name).mkdir(parents=True)
        for i in range(30):
            pixels = generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / ("train" if i < 25 else "val") / name / f"{i}.png")
    model = network()
    folder, places = images.open_held_out(tmp_path, model, images.Preparation(model), 60)
    assert len(places) == 60
    assert places == held_out_places(75, 60)
    found = td.calibrate(model, list(images.batches(folder, 64, 0, places)), 0.5)
    args = ("evaluate", f"local-dir:{saved}", "--data", tmp_path, "--calibrate", 0.5, "--held-out", 60, "--json")
    row = Ran(*args).json
    assert row["calibrated"] == dataclasses.asdict(found)
    assert row["macs"] == evaluate(model, images.batches(folder_of(tmp_path / "val", model), 64, 0)).macs
    for more in ((), ("--held-out", 60, "--exit", 0)):
        wanted = "without a budget" if more else "--calibrate SHARE and --held-out N go together"
        refused(wanted, "evaluate", f"local-dir:{saved}", "--data", tmp_path, "--calibrate", 0.5, *more)
    refused("1 to 74 can be held out; found 75", *args[:-2], 75)
    refused("no folder", *args[:3], data, *args[4:])


def folder_of(root: Path, model: nn.Module) -> images.Folder:
    return images.open_folder(root, model, images.Preparation(model))


def test_evaluate_refuses_in_one_line(saved: Path, data: Path, tmp_path: Path) -> None:
    name = f"local-dir:{saved}"
    refused("3 classes; the model knows 10", "evaluate", "resnet20_cifar", "--no-pretrained", "--data", data)
    refused("check --split", "evaluate", name, "--data", data, "--split", "test")
    refused("no folder", "evaluate", name, "--data", tmp_path / "x")
    refused("holds no folders", "evaluate", name, "--data", tmp_path)
    refused("--device nonsense", "evaluate", name, "--data", data, "--device", "nonsense")
    (tmp_path / "empty").mkdir()
    refused("empty", "evaluate", name, "--data", tmp_path)


@pytest.mark.parametrize("workers", [0, 1])
def test_evaluate_names_an_unreadable_image(workers: int, saved: Path, data: Path, tmp_path: Path) -> None:
    for name in CLASSES:
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.png").write_bytes((data / "val" / name / "0.png").read_bytes())
    (tmp_path / "dog" / "1.png").write_text("no image")
    refused(
        f"{tmp_path}/dog/1.png: cannot be read",
        "evaluate",
        f"local-dir:{saved}",
        "--data",
        tmp_path,
        "--workers",
        workers,
    )


def test_class_names_need_the_right_number() -> None:
    model = network()
    assert images.class_names(model) == list(CLASSES)
    model.pretrained_cfg["label_names"] = {"0": "n1", "1": "n2", "2": "n3"}
    model.pretrained_cfg["label_descriptions"] = {"n2": "a dog"}
    assert images.class_names(model) == ["n1", "a dog", "n3"]
    model.pretrained_cfg["label_names"] = ["too", "few"]
    assert images.class_names(model) is None


# Runs ----------------------------------------------------------------------------------------------------------------


def run_folder(saved: Path, folder: Path) -> Path:
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes((saved / name).read_bytes())
    (folder / "summary.json").write_text(json.dumps(SUMMARY))
    return folder


def test_report_is_made_again(saved: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    ran = Ran("report", run_folder(saved, tmp_path))
    assert (ran.code, ran.out) == (0, f"{tmp_path / 'report.html'}\n")
    first = (tmp_path / "report.html").read_bytes()
    (tmp_path / "report.html").unlink()
    Ran("report", tmp_path)
    assert (tmp_path / "report.html").read_bytes() == first


def test_report_refuses_in_one_line(tmp_path: Path) -> None:
    refused("holds no summary.json", "report", tmp_path)
    (tmp_path / "summary.json").write_text("{}")
    refused("holds a damaged run", "report", tmp_path)
    (tmp_path / "summary.json").write_text('{"dense":')
    refused("holds a damaged run", "report", tmp_path)


def environment(**settings: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGINGFACE_"))}
    return {**kept, "OMP_NUM_THREADS": "1", **settings}


def test_publish_refuses_in_one_line(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("timm_dynamic.hub.get_token", lambda: None)
    refused("holds no config.json", "publish", tmp_path, "org/name")
    refused("is no repository name", "publish", saved, "a b")
    refused("no token to write to org/name", "publish", saved, "org/name", code=1)
    run_folder(saved, tmp_path)
    (tmp_path / "summary.json").write_text("{")
    refused("summary.json is damaged", "publish", tmp_path, "org/name")


# The program itself --------------------------------------------------------------------------------------------------


def test_a_process_of_its_own_publishes_twice_and_draws_in_ascii(saved: Path, data: Path, tmp_path: Path) -> None:
    run, cat = run_folder(saved, tmp_path), data / "val" / "cat" / "0.png"
    calls = [["publish", run, "org/net", "--json"]] * 2 + [["profile", "hf-hub:org/net", "--json"]]
    calls.append(["predict", f"local-dir:{saved}", cat, "/no/such.png"])
    with FakeHub(users={"good": "org"}) as hub:
        settings = {"HF_ENDPOINT": hub.url, "HF_TOKEN": "good", "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1"}
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, json.dumps(calls, default=str)],
            env=environment(**settings, PYTHONIOENCODING="ascii"),
            capture_output=True,
            text=True,
        )
        repo = hub.repos["org/net"]
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1] == "error: /no/such.png: no such file"
    (one, two, profile), rest = documents(done.stdout, 3)
    assert "##-|##-|###" in rest
    assert one == two
    assert (one["repo"], one["commit"]) == ("org/net", repo.branches["main"])
    assert profile["layer_gates"] == "linear"
    files = repo.commits[repo.branches["main"]]
    assert json.loads(files["config.json"])["metrics"]["dynamic"] == SUMMARY["dynamic"]
    assert b"train_recipes/ddi.py" in files["README.md"]


def documents(text: str, count: int) -> tuple[list[Any], str]:
    """The JSON documents that a text begins with, and what follows them."""
    found = []
    for _ in range(count):
        value, end = json.JSONDecoder().raw_decode(text.lstrip())
        found.append(value)
        text = text.lstrip()[end:]
    return found, text


@pytest.mark.parametrize(
    "command", [(), ("list",), ("profile",), ("predict",), ("evaluate",), ("report",), ("publish",), ("card",)]
)
def test_help_is_everywhere(command: tuple[str, ...]) -> None:
    ran = Ran(*command, "--help")
    assert ran.code == 0
    assert "Usage: " in ran.out
    assert "Exit codes" in ran.out


def test_version() -> None:
    assert Ran("--version").out == f"timm-dynamic {td.__version__}\n"


def test_unexpected_errors_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(rows, "profile", fail)
    result = CliRunner().invoke(app, ["profile", "resnet18"])
    assert result.exit_code == 1
    assert isinstance(result.exception, ZeroDivisionError)


def test_names_are_split_into_method_and_base() -> None:
    assert models.split_name("iadi_resnet50") == ("iadi", "resnet50")
    assert models.split_name("resnet50") == (None, "resnet50")
    assert models.split_name("ddi_nothing") == (None, "ddi_nothing")


@pytest.mark.parametrize(
    ("value", "shown"), [(512, "512"), (5120, "5.12 k"), (26_300_000, "26.3 M"), (1_814_000_000, "1.81 G")]
)
def test_macs_are_shown_short(value: int, shown: str) -> None:
    assert tables.macs(value) == shown
