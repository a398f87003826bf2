"""Options of the recipes: configs, what goes over them, and commands as they are printed."""

import re
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from test_recipes import RECIPES, base, call, datasets, ddi, iadi, planned, skipnet, trainer

from timm_dynamic.cli.images import Preparation
from timm_dynamic.paper_claims import PAPER_CLAIMS

MODULES = {"base": base, "ddi": ddi, "iadi": iadi, "skipnet": skipnet}
Seen = list[tuple[Any, Any]]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """The stages and the settings of every run that is asked for; none is begun."""
    found: Seen = []
    for module in MODULES.values():
        monkeypatch.setattr(
            module, "run", lambda stages, settings: found.append((planned(stages, settings), settings)), raising=True
        )
    return found


def written(folder: Path, **values: Any) -> Path:
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_a_stage_on_the_command_line_goes_over_its_own_field_only(tmp_path: Path, seen: Seen) -> None:
    config = written(tmp_path, stages={"sp": {"epochs": 3, "lr": 0.02}, "hrl": {"lr": 0.003}})
    assert call(skipnet, "--config", config, "--stage", "hrl.epochs=5", "--stage", "sp.lr=0.04") == 0
    stages = {stage.name: stage for stage in seen[0][0]}
    assert (stages["sp"].epochs, stages["sp"].lr) == (3, 0.04)
    assert (stages["hrl"].epochs, stages["hrl"].lr) == (5, 0.003)


def test_a_config_may_change_stages_of_other_methods(
    tmp_path: Path, seen: Seen, capsys: pytest.CaptureFixture[str]
) -> None:
    config = written(tmp_path, stages={"hrl": {"lr": 0.003}, "base": {"epochs": 2}})
    assert call(skipnet, "--config", config, "--method", "sp") == 0
    assert [stage.name for stage in seen[0][0]] == ["base", "sp"]
    assert call(skipnet, "--config", config, "--method", "hrl") == 0
    assert [(stage.name, stage.lr) for stage in seen[1][0]] == [("hrl", 0.003)]
    assert call(skipnet, "--method", "sp", "--stage", "hrl.lr=1") == 1, "what is asked for has to be there"
    assert call(skipnet, "--config", written(tmp_path, stages={"ps": {"lr": 1}})) == 1
    assert "found 'ps.lr=1'" in capsys.readouterr().err


@pytest.mark.parametrize("stages", [["sp"], {"sp": None}, "sp"])
def test_stages_of_a_config_hold_fields(stages: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(skipnet, "--config", written(tmp_path, stages=stages)) == 2
    assert "stages must hold the fields of each" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(("config", "given", "wanted"), [("alpha", "target", 0.6), ("target", "alpha", 0.3)])
def test_alpha_and_target_take_each_other_s_place(
    config: str, given: str, wanted: float, tmp_path: Path, seen: Seen
) -> None:
    path = written(tmp_path, **{config: 0.1})
    assert call(skipnet, "--config", path, f"--{given}", wanted) == 0
    assert (getattr(seen[0][1], given), getattr(seen[0][1], config)) == (wanted, None)
    assert call(skipnet, f"--{given}", wanted, "--config", path) == 0
    assert call(skipnet, "--config", path) == 0
    assert (getattr(seen[2][1], given), getattr(seen[2][1], config)) == (None, 0.1)
    assert call(skipnet, "--alpha", 0.1, "--target", 0.5) == 1


def printed() -> list[str]:
    """The recipes' commands in the table of claims and in the first lines of the configs, with what goes over them."""
    words = "accelerate launch train_recipes/"
    claims = {part for claim in PAPER_CLAIMS for part in re.split(r"[;,] ", claim.command) if part.startswith(words)}
    configs = {path.read_text().splitlines()[0].removeprefix("# ") for path in (RECIPES / "configs").glob("*.yaml")}
    assert len(configs) > 8
    paper = f"{words}skipnet.py --config train_recipes/configs/skipnet_cifar10.yaml"
    more = {f"{paper} --no-plain --target 0.6 --unit-cost macs", f"{paper} --method sp", f"{paper} --method hrl"}
    return sorted(one for one in claims | configs | more if "compare.py" not in one)


@pytest.mark.parametrize("command", printed())
def test_a_printed_command_can_be_given(command: str, seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(RECIPES.parent)
    script, *arguments = shlex.split(command.removeprefix("accelerate launch train_recipes/"))
    assert call(MODULES[script.removesuffix(".py")], *arguments) == 0
    assert len(seen) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_cuda_graph_needs_a_gpu(seen: Seen, capsys: pytest.CaptureFixture[str]) -> None:
    for more, message in (
        ((), "--cuda-graph needs a GPU with CUDA; found none"),
        (("--compile",), "--cuda-graph records a plain step: not with"),
        (("--accumulate", 2), "--cuda-graph records a plain step: not with"),
    ):
        assert call(ddi, "--cuda-graph", *more) == 1
        assert message in capsys.readouterr().err
    assert not seen


@pytest.mark.parametrize("field", ["lr", "gate_lr", "channel_lr", "weight_decay", "clip", "epochs"])
def test_a_stage_has_no_negative_numbers(field: str, seen: Seen, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(skipnet, "--stage", f"sp.{field}=-1") == 1
    assert f"sp.{field} must be 0 or above; found -1" in capsys.readouterr().err


def test_no_limit_on_the_gradient_is_one_too(seen: Seen) -> None:
    assert call(ddi, "--clip-grad", 0) == 0
    assert call(ddi) == 0
    (stages, settings), (_, own) = seen
    assert {stage.largest_norm(settings) for stage in stages} == {0}
    assert {stage.largest_norm(own) for stage in stages} - {None}


def test_there_is_nothing_to_distil_from_without_a_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(skipnet, "--method", "hrl", "--distill", 1, "--output", tmp_path / "run") == 1
    assert "--distill learns from the trained stock network, and here is none" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_gates_trained_without_a_price_are_left_as_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = ["--image-size", 16, "--batch-size", 16, "--evaluations", 1, "--method", "sp", "--threads", 1]
    few += ["--stage", "base.iterations=1", "--stage", "sp.iterations=1"]
    assert call(skipnet, *few, "--stage", "sp.alpha=0", "--output", tmp_path / "free") == 0
    model = timm.create_model(f"local-dir:{tmp_path / 'free'}", pretrained=True)
    assert (model.layer_gates.threshold == 0.5).all()
    assert "wanted 50.0 %" not in capsys.readouterr().out


# Images as they are in training and afterwards -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "found", "network"),
    [(32, (48, 48), "resnet20_cifar"), (32, (64, 40), "resnet20_cifar"), (96, (130, 110), "resnet18.a1_in1k")],
)
def test_a_saved_network_prepares_images_as_its_run_did(
    size: int, found: tuple[int, int], network: str, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    for part in ("train", "val"):
        for name in ("a", "b"):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(2):
                image = Image.fromarray(rng.integers(0, 255, (*found[::-1], 3), dtype=np.uint8))
                image.resize((found[0] // 2, found[1] // 2)).resize(found).save(tmp_path / part / name / f"{i}.png")
    data = datasets.load("folder", tmp_path, False, size, 0)
    overlay = {"input_size": data.input_size, "mean": data.mean, "std": data.std, **data.prepared}
    model = timm.create_model(network, pretrained_cfg_overlay=overlay)
    wanted = next(iter(datasets.val_loader(data, 4, 0)))[0]
    files = sorted((tmp_path / "val").rglob("*.png"))
    torch.testing.assert_close(torch.stack([Preparation(model)(file) for file in files]), wanted, rtol=0, atol=1e-5)


def test_what_a_corrupt_image_in_a_worker_is_called() -> None:
    stub: Any = SimpleNamespace(progress=SimpleNamespace(step=7), _kept=lambda: "the last good checkpoint is X")
    running: Any = SimpleNamespace(stage=SimpleNamespace(name="sp"))
    text = (
        "Caught DataError in DataLoader worker process 1.\nTraceback ...\nimages.DataError: a.png is not a whole image"
    )
    for message in (text, "a.png is not a whole image"):
        error = trainer.Trainer._explained(stub, datasets.DataError(message), running)
        assert str(error) == "stage sp stopped at step 7: a.png is not a whole image; the last good checkpoint is X"
