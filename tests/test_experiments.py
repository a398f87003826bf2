"""The SkipNet paper's experiments, by their configs, for two steps of each stage on a handful of random images."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torchvision
import yaml
from PIL import Image
from scipy.io import savemat
from test_recipes import RECIPES, RunFolder, call, no_report, options, results, skipnet

from timm_dynamic.report import write_report

IMAGES = 8


def pixels(count: int, size: int = 32) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def write_cifar(root: Path, kind: Any, classes: int) -> None:
    """The pickles that torchvision reads."""
    folder = root / kind.base_folder
    folder.mkdir(parents=True)
    labels = [i % classes for i in range(IMAGES)]
    flat = pixels(IMAGES).transpose(0, 3, 1, 2).reshape(IMAGES, -1)
    key = "labels" if classes == 10 else "fine_labels"
    for name, _ in (*kind.train_list, *kind.test_list):
        (folder / name).write_bytes(pickle.dumps({"data": flat, key: labels}))
    names = {kind.meta["key"]: [f"class {i}" for i in range(classes)]}
    (folder / kind.meta["filename"]).write_bytes(pickle.dumps(names))


def write_svhn(root: Path) -> None:
    """The three files of SVHN; a label of 10 stands for 0 there."""
    root.mkdir(parents=True)
    for split in ("train", "extra", "test"):
        labels = np.arange(1, IMAGES + 1)[:, None]
        savemat(root / f"{split}_32x32.mat", {"X": pixels(IMAGES).transpose(1, 2, 3, 0), "y": labels})


def write_folder(root: Path) -> None:
    """Two classes of JPEG files."""
    for part in ("train", "val"):
        for k, name in enumerate(("n01440764", "n01443537")):
            (root / part / name).mkdir(parents=True)
            for i, image in enumerate(pixels(IMAGES, 40 + 8 * k)):
                Image.fromarray(image).save(root / part / name / f"{i}.JPEG")


WRITERS = {
    "cifar10": lambda root: write_cifar(root, torchvision.datasets.CIFAR10, 10),
    "cifar100": lambda root: write_cifar(root, torchvision.datasets.CIFAR100, 100),
    "svhn": write_svhn,
    "imagenet": write_folder,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    for name, write in WRITERS.items():
        write(root / name)
    return root


@pytest.fixture(autouse=True)
def _any_file_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (torchvision.datasets.cifar, torchvision.datasets.svhn, torchvision.datasets.utils):
        monkeypatch.setattr(module, "check_integrity", lambda *args, **kwargs: True)
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr(results, "write_report", no_report)
    # networks of up to 170 MB: no checkpoints and no timing here
    monkeypatch.setattr(RunFolder, "save", lambda *args: None)
    monkeypatch.setattr(results, "time_all", lambda *args: {"dense": 1.0, "dynamic": 1.0})


# all of the paper's depths, those of CIFAR size with both kinds of gate; a data set does not change with the depth
EXPERIMENTS = [
    *(("cifar10", 38, gate) for gate in ("ff1", "rnn")),
    *(("cifar10", 74, gate) for gate in ("ff1", "rnn")),
    *(("cifar10", 110, gate) for gate in ("ff2", "rnn")),
    *(("cifar100", 38, gate) for gate in ("ff1", "rnn")),
    ("svhn", 38, "ff1"),
    *(("svhn", 152, gate) for gate in ("ff2", "rnn")),
    *(("imagenet", 34, gate) for gate in ("ff1", "rnn")),
    ("imagenet", 50, "ff1"),
    ("imagenet", 101, "ff2"),
]


@pytest.mark.parametrize(("dataset", "depth", "gate"), EXPERIMENTS)
def test_two_steps_of_each_stage(dataset: str, depth: int, gate: str, data: Path, tmp_path: Path) -> None:
    """With FFGate-II above 100 layers, FFGate-I below (section 3.1)."""
    model = f"skipnet_resnet{depth}" + ("" if dataset == "imagenet" else "_cifar")
    config = RECIPES / "configs" / f"skipnet_{dataset}.yaml"
    few: list[object] = ["--batch-size", 8, "--max-steps", 2, "--evaluations", 1, "--threads", 1, "--workers", 0]
    few += ["--image-size", 96] if dataset == "imagenet" else []
    arguments = ["--config", config, "--data-dir", data / dataset, "--output", tmp_path / "run", *few]
    assert call(skipnet, *arguments, "--model", model, "--gate", gate) == 0
    kept = yaml.safe_load((tmp_path / "run" / "settings.json").read_text())
    assert (kept["plain"], kept["unit_cost"], kept["batch_size"]) == (True, "one", 8)
    lengths = {stage["name"]: (stage["epochs"], stage["iterations"], stage["lr"]) for stage in kept["stages"]}
    wanted = {
        "cifar10": (64000, 10000),
        "cifar100": (64000, 10000),
        "svhn": (50, 50),
        "imagenet": (90, 40),
    }[dataset]
    found = [lengths[name][1] or lengths[name][0] for name in ("sp", "hrl")]
    assert found == list(wanted)
    assert (lengths["sp"][2], lengths["hrl"][2]) == (0.1, 0.0001)
    rows = [yaml.safe_load(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["stage"] for row in rows] == ["base", "sp", "hrl"]
    assert rows[1]["train"]["alpha"] == 0.0, "supervised training has no term for the cost"
    assert rows[2]["train"]["alpha"] == pytest.approx(kept["alpha"])


@pytest.mark.parametrize("method", ["sp", "soft", "hrl", "rl", "sdv", "static"])
def test_every_variant_runs(method: str, tmp_path: Path) -> None:
    few = ["--image-size", 16, "--batch-size", 16, "--max-steps", 2, "--evaluations", 1, "--threads", 1]
    few += ["--policy", "01011010"] if method == "static" else []
    assert call(skipnet, "--method", method, "--output", tmp_path / "run", *few) == 0
    summary = yaml.safe_load((tmp_path / "run" / "summary.json").read_text())
    assert [stage.name for stage in skipnet.METHODS[method]][-1] == method
    if method == "static":
        assert summary["dynamic"]["keep_ratio"] == 0.5
        assert summary["decisions"]["policies"] == 1
    if method == "sdv":
        assert 0.4 < summary["dynamic"]["keep_ratio"] < 0.8
        assert summary["decisions"]["policies"] > 10


def test_the_gain_over_the_best_static_policy(tmp_path: Path) -> None:
    output = tmp_path / "run"
    few: list[object] = ["--image-size", 16, "--batch-size", 16, "--evaluations", 1, "--threads", 1]
    changes = ("base.iterations=1", "sp.iterations=4", "sp.schedule=multistep", "sp.milestones=0.6", "hrl.iterations=2")
    changes += ("sp.weight_decay=0.0005",)
    few += [part for change in changes for part in ("--stage", change)]
    assert call(skipnet, "--gain", "--distill", 1.0, "--output", output, *few) == 0
    summary = yaml.safe_load((output / "summary.json").read_text())
    static = yaml.safe_load((output / "static" / "summary.json").read_text())
    assert summary["adaptive_gain"] == summary["dynamic"]["accuracy"] - static["dynamic"]["accuracy"]
    assert 0 < summary["adaptive_gain_error"] < 0.2, "of 50 images"
    kept = yaml.safe_load((output / "static" / "settings.json").read_text())
    alone = kept["stages"][0]
    assert alone["iterations"] == 6, "as long as the two stages that it is compared with"
    assert alone["weight_decay"] == 0.0005
    assert (alone["schedule"], alone["milestones"]) == ("multistep", [0.6]), "that of the longer of the two"
    assert kept["policy"] == summary["static"]["policy"]
    assert kept["distill"] == 1.0
    page = write_report(output).read_text()
    error = f"(standard error {100 * summary['adaptive_gain_error']:.2f})"
    assert f"{100 * summary['adaptive_gain']:+.2f} points {error}" in page
    assert summary["static"]["policy"] in page


def test_a_policy_that_does_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = ["--image-size", 16, "--batch-size", 16, "--max-steps", 1, "--evaluations", 1]
    assert call(skipnet, "--method", "static", "--policy", "011", "--output", tmp_path / "run", *few) == 1
    assert "layer_gates need 8 zeros and ones; found '011'" in capsys.readouterr().err
    with pytest.raises(options.RunError, match="--policy and --method static go together"):
        options.settings("skipnet", {"model": "resnet20_cifar", "policy": "01"})
