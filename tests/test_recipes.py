"""Recipes: data, stages, the loop's promises after a kill, and the errors a user meets."""

import copy
import dataclasses
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file, save_file

RECIPES = Path(__file__).parents[1] / "train_recipes"
sys.path.insert(0, str(RECIPES))

import base  # noqa: E402
import data as datasets  # noqa: E402
import ddi  # noqa: E402
import iadi  # noqa: E402
import loop  # noqa: E402
import options  # noqa: E402
import results  # noqa: E402
import skipnet  # noqa: E402
import timm_dynamic as td  # noqa: E402
import trainer  # noqa: E402
from planning import planned  # noqa: E402
from run_folder import RunError, RunFolder  # noqa: E402
from stages import Stage, base_task  # noqa: E402

TINY: dict[str, Any] = {
    "image_size": 16,
    "batch_size": 16,
    "max_steps": 4,
    "evaluations": 2,
    "precision": "fp32",
    "checkpoint_every": 3,
    "threads": 1,  # the same sums in this process and in others
}


def prepare(patch: pytest.MonkeyPatch) -> None:
    """A fresh accelerate on the CPU, and a handful of validation images, which is enough here."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    patch.setenv("ACCELERATE_USE_CPU", "true")
    patch.setenv("HF_HUB_OFFLINE", "1")
    patch.setattr(results, "ROUNDS", 2)
    patch.setattr(datasets, "digits", few_digits)


ALL_DIGITS = functools.cache(datasets.digits)


def few_digits(size: int, seed: int) -> datasets.Data:
    found = ALL_DIGITS(size, seed)
    val: Any = copy.copy(found.val)
    val.pixels, val.labels = val.pixels[:50], val.labels[:50]
    return dataclasses.replace(found, val=val)


@pytest.fixture(autouse=True)
def _prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(monkeypatch)


def settings(output: Path, recipe: str = "ddi", **changes: Any) -> options.Settings:
    values = {"model": f"{recipe}_resnet20_cifar", **TINY, "output": output, **changes}
    return options.settings(recipe, values, prefix=f"{recipe}_", target=0.5)


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


def no_report(folder: Path) -> None:
    (folder / "report.html").write_text("")


def run(
    output: Path,
    stop_after: int | None = None,
    stages: tuple[Stage, ...] = ddi.STAGES,
    report: bool = False,
    **changes: Any,
) -> None:
    """Run a recipe, killed after so many optimiser steps."""
    count, step = 0, torch.optim.SGD.step

    def counted(self: torch.optim.SGD, *args: Any, **kwargs: Any) -> Any:
        nonlocal count
        found = step(self, *args, **kwargs)
        count += 1
        if count == stop_after:
            raise Killed
        return found

    with pytest.MonkeyPatch.context() as patch:
        prepare(patch)
        patch.setattr(torch.optim.SGD, "step", counted)
        if not report:
            patch.setattr(results, "write_report", no_report)
        threads = torch.get_num_threads()
        try:
            loop.run(stages, settings(output, **changes))
        finally:
            torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of four stages of four steps."""
    output = tmp_path_factory.mktemp("runs") / "whole"
    run(output, report=True)
    return output


# The promise of --resume ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop_after", [1, 5, 8, 11, 15])
def test_a_killed_run_goes_on_to_the_same_numbers(whole: Path, tmp_path: Path, stop_after: int) -> None:
    """Killed in every stage: before the first checkpoint, after one, between two, at the end of a stage."""
    output = tmp_path / "run"
    with pytest.raises(Killed):
        run(output, stop_after)
    assert not (output / "summary.json").exists()
    run(output, resume=True)
    same_run(whole, output)


@pytest.mark.parametrize(("recipe", "stop_after"), [("skipnet", 15), ("ddi", 21)])
def test_killed_where_a_stage_goes_on_from_the_one_before(recipe: str, stop_after: int, tmp_path: Path) -> None:
    """What a stage learned from the one before it (such as alpha) outlives a kill in its middle."""
    stages = skipnet.METHODS["sp+hrl"] if recipe == "skipnet" else ddi.STAGES
    changes: dict[str, Any] = {"stages": stages, "recipe": recipe, "max_steps": 6, "evaluations": 1}
    changes |= {"checkpoint_every": 2, **({"method": "sp+hrl"} if recipe == "skipnet" else {})}
    run(tmp_path / "whole", **changes)
    with pytest.raises(Killed):
        run(tmp_path / "run", stop_after, **changes)
    newest = RunFolder(tmp_path / "run").newest()
    assert newest is not None
    assert int(newest.name) % 6, "in the middle of a stage"
    run(tmp_path / "run", resume=True, **changes)
    same_run(tmp_path / "whole", tmp_path / "run")


REINFORCED: dict[str, Any] = {"recipe": "skipnet", "method": "sp+hrl", "distill": 1.0, "ema": 0.9}


@pytest.fixture(scope="module")
def reinforced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished SkipNet run with all that has a state: a teacher, averaged weights, clipped gradients, sampling."""
    output = tmp_path_factory.mktemp("runs") / "reinforced"
    run(output, stages=skipnet.METHODS["sp+hrl"], clip_grad=1.0, **REINFORCED)
    return output


@pytest.mark.parametrize("stop_after", [3, 7, 10])
def test_a_killed_reinforced_run_goes_on_to_the_same_numbers(reinforced: Path, tmp_path: Path, stop_after: int) -> None:
    output = tmp_path / "run"
    changes = {"stages": skipnet.METHODS["sp+hrl"], "clip_grad": 1.0, **REINFORCED}
    with pytest.raises(Killed):
        run(output, stop_after=stop_after, **changes)
    run(output, resume=True, **changes)
    assert RunFolder(output).rows() == RunFolder(reinforced).rows()
    assert torch.equal(weights_of(output), weights_of(reinforced))


def test_averaged_weights_are_what_is_measured_and_saved(reinforced: Path) -> None:
    """The last checkpoint holds both; what is left for the user is the average."""
    checkpoint = RunFolder(reinforced).newest()
    assert checkpoint is not None
    raw, average = (load_file(checkpoint / f"{name}.safetensors") for name in ("model", "ema"))
    saved = load_file(reinforced / "model.safetensors")
    assert torch.equal(saved["conv1.weight"], average["conv1.weight"])
    assert not torch.equal(saved["conv1.weight"], raw["conv1.weight"])


def test_killed_twice_and_while_writing(whole: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    with pytest.raises(Killed):
        run(output, 6)
    with (output / "metrics.jsonl").open("a") as file:
        file.write(
            '{"stage": "iadi", "step": 99, "accuracy": 1.0}\n{"stage": "ia'
        )  # later than the checkpoint; cut off
    with pytest.raises(Killed):
        run(output, 4, resume=True)
    newest = RunFolder(output).newest()
    assert newest is not None
    weights = newest / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    run(output, resume=True)
    same_run(whole, output)


def test_killed_while_finishing(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "run"

    def kill(*_: Any, **__: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(results, "save_pretrained", kill)
        with pytest.raises(Killed):
            run(output)
    assert not (output / "summary.json").exists()
    run(output, resume=True)
    same_run(whole, output)


def test_a_real_kill(whole: Path, tmp_path: Path) -> None:
    """kill -9 of the process that runs the script."""
    code = (
        f"import sys, os, pathlib, signal; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import pytest, torch, test_recipes as t\n"
        "step, count = torch.optim.SGD.step, [0]\n"
        "def killing(self, *args, **more):\n"
        "    count[0] += 1\n"
        "    if count[0] == 10: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return step(self, *args, **more)\n"
        "torch.optim.SGD.step = killing\n"
        "t.run(pathlib.Path(sys.argv[1]))\n"
    )
    output = tmp_path / "run"
    found = subprocess.run([sys.executable, "-c", code, str(output)], capture_output=True, check=False)
    assert found.returncode == -signal.SIGKILL, found.stderr.decode()
    assert RunFolder(output).newest() is not None
    run(output, resume=True)
    same_run(whole, output)


def same_run(one: Path, other: Path) -> None:
    assert torch.equal(weights_of(one), weights_of(other))
    assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    assert (one / "config.json").read_bytes() == (other / "config.json").read_bytes()
    assert RunFolder(one).rows() == RunFolder(other).rows()


def weights_of(output: Path) -> torch.Tensor:
    state = load_file(output / "model.safetensors")
    return torch.cat([state[name].flatten().double() for name in sorted(state)])


def test_two_runs_write_the_same_files(whole: Path, tmp_path: Path) -> None:
    run(tmp_path / "run", checkpoint_every=0)
    same_run(whole, tmp_path / "run")


def test_a_finished_run_is_left_alone(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    run(whole, resume=True)
    assert "nothing to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == before


def test_what_a_run_leaves(whole: Path) -> None:
    summary = json.loads((whole / "summary.json").read_text())
    assert set(summary["dense"]) == {"accuracy", "macs"}
    assert set(summary["dynamic"]) == {"accuracy", "macs", "max_macs", "keep_ratio"}
    assert [set(row) for row in summary["exits"]] == [{"exit", "accuracy", "macs", "max_macs"}] * 3
    assert [set(row) for row in summary["budgets"]] == [{"budget", "accuracy", "macs", "max_macs"}] * 3
    for row in summary["budgets"]:
        assert row["max_macs"] <= row["budget"]
    assert [row["name"].split()[0] for row in summary["table"]] == ["dense", "dynamic", *["exit"] * 3, *["budget"] * 3]
    rows = RunFolder(whole).rows()
    assert [(row["stage"], row["step"]) for row in rows] == [
        (stage, 4 * i + step) for i, stage in enumerate(("base", "warmup", "iadi", "ddi")) for step in (2, 4)
    ]
    assert [row["exits"] != [] for row in rows] == [False] * 6 + [True] * 2
    text = "".join(
        (whole / name).read_text() for name in ("config.json", "metrics.jsonl", "summary.json", "report.html")
    )
    assert str(whole.parent) not in text
    ends, newest = [4, 8, 12], [15, 16]
    assert [int(path.name) for path in RunFolder(whole)._found()] == sorted([*ends, *newest], reverse=True)


def test_going_on_from_the_end_of_a_stage(whole: Path, tmp_path: Path) -> None:
    again = shutil.copytree(whole, tmp_path / "run")
    for path in (*RunFolder(again)._found()[:3], again / "summary.json", again / "report.html"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    newest = RunFolder(again).newest()
    assert newest is not None
    assert newest.name == "00000008"  # where IADI began
    run(again, resume=True)
    same_run(whole, again)


def test_the_saved_network_is_the_trained_one(whole: Path) -> None:
    model = timm.create_model(f"local-dir:{whole}", pretrained=True).eval()
    newest = RunFolder(whole).newest()
    assert newest is not None
    trained = load_file(newest / "model.safetensors")
    for name, value in model.state_dict().items():
        assert torch.equal(value, trained[name]), name
    found = few_digits(16, 0)
    assert tuple(model.pretrained_cfg["mean"]) == found.mean
    assert tuple(model.pretrained_cfg["input_size"]) == (3, 16, 16)
    assert list(model.pretrained_cfg["label_names"]) == [str(digit) for digit in range(10)]
    val: Any = found.val
    x, y = val.__getitems__(list(range(50)))
    accuracy = (model(x).argmax(1) == y).double().mean().item()
    assert accuracy == pytest.approx(json.loads((whole / "summary.json").read_text())["dynamic"]["accuracy"])


# What a user can do wrong --------------------------------------------------------------------------------------------


def test_a_folder_that_holds_a_run(whole: Path) -> None:
    with pytest.raises(RunError, match="give --resume"):
        run(whole)


def test_resuming_with_other_settings(whole: Path) -> None:
    with pytest.raises(RunError, match=r"other settings: batch_size \(16 there, 32 here\), seed \(0 there, 5 here\)"):
        run(whole, resume=True, batch_size=32, seed=5)
    with pytest.raises(RunError, match="stages"):
        run(whole, resume=True, stages=(*ddi.STAGES[:3], Stage("ddi", base_task)))


def test_a_checkpoint_of_another_model(whole: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    with pytest.raises(Killed):
        run(output, 6)
    newest = RunFolder(output).newest()
    assert newest is not None
    weights = newest / "model.safetensors"
    before = weights.stat().st_size
    save_file(timm.create_model("resnet32_cifar").state_dict(), weights)
    state = json.loads((newest / "state.json").read_text())
    state["sizes"]["model.safetensors"] = weights.stat().st_size
    assert before != weights.stat().st_size
    (newest / "state.json").write_text(json.dumps(state))
    with pytest.raises(RunError, match="holds another model"):
        run(output, resume=True)


def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RunError, match=r"--output .*file/run cannot be written to: Not a directory"):
        RunFolder(tmp_path / "file" / "run").create({})


def test_a_base_that_does_not_fit_or_is_cut_off(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="holds another model"):
        run(tmp_path / "a", base=str(whole))
    short = tmp_path / "short.safetensors"
    short.write_bytes((whole / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(RunError, match="damaged or cut off"):
        run(tmp_path / "b", base=str(short))
    with pytest.raises(RunError, match="neither a file or folder nor a pretrained resnet20_cifar"):
        run(tmp_path / "c", base="resnet18")
    assert not any((tmp_path / name).exists() for name in "abc"), "nothing is written before the start"


def test_a_loss_that_is_not_finite(tmp_path: Path) -> None:
    output = tmp_path / "run"
    stages = (ddi.STAGES[0], Stage("worse", base_task, epochs=1, lr=1e30))
    with pytest.raises(RunError, match=r"not finite in stage worse at step \d.*last good checkpoint is .*00000004"):
        run(output, stages=stages)
    newest = RunFolder(output).newest()
    assert newest is not None
    assert all(bool(value.isfinite().all()) for value in load_file(newest / "model.safetensors").values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model": "skipnet_resnet20_cifar"},
            r"ddi\.py trains ddi_\* or a stock model; found --model skipnet_resnet20",
        ),
        ({"alpha": 1.0, "target": 0.5}, "not both"),
        ({"target": 1.5}, "--target must be a share of the dense cost in .*found 1.5"),
        ({"calibrate": 0.0}, "--calibrate must be a share of the dense cost in .*found 0.0"),
        ({"shut": 1.0}, "--shut must be a share of the images in .*found 1.0"),
        ({"shut": 0.5, "open": 0.4}, "--open must be a share of the images above --shut, .*found 0.4"),
        ({"batch_size": 10, "accumulate": 4}, "--accumulate must divide --batch-size"),
        ({"epochs_scale": 0.0}, "--epochs-scale must be above 0"),
        ({"alpha": float("nan")}, "--alpha must be a finite number; found nan"),
        ({"seed": -1}, "--seed must be 0 or above; found -1"),
        ({"workers": -1}, "--workers must be 0 or above; found -1"),
        ({"max_steps": 0}, "--max-steps must be above 0; found 0"),
        ({"exit_gradient": 1.5}, "--exit-gradient must be in 0..1; found 1.5"),
        ({"exit_gradient": 0.5, "exits_alone": True}, "--exits-alone leaves the trunk as it is: not with --exit-grad"),
        ({"exit_hidden": -1}, "--exit-hidden must be 0 or above; found -1"),
        ({"distill": float("inf")}, "--distill must be a finite number; found inf"),
    ],
)
def test_options_that_contradict(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RunError, match=message):
        settings(tmp_path, **changes)


@pytest.mark.parametrize("model", ["no_such_net", "vgg16"])
def test_a_model_that_cannot_be_trained(tmp_path: Path, model: str) -> None:
    with pytest.raises(RunError, match=model):
        run(tmp_path / "run", model=model)
    assert not (tmp_path / "run").exists()


WRONG = ("iadi.epoch=3", "nope.epochs=3", "iadi.lr=fast", "iadi.schedule=linear", "iadi.clip=-1", "iadi")


@pytest.mark.parametrize(
    "change", [*WRONG, "iadi.until=0.1", "iadi.epochs=-1", "warmup.epochs=0", "iadi.iterations=-5"]
)
def test_a_stage_change_that_makes_no_sense(tmp_path: Path, change: str) -> None:
    with pytest.raises(RunError):
        planned(ddi.STAGES, settings(tmp_path, stage=[change]))


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was saved before stays whole, and the message names it."""
    output, save = tmp_path / "run", torch.save

    def full(state: Any, path: Path) -> None:
        if "00000004" in str(path):
            raise OSError(28, "No space left on device")
        save(state, path)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(RunError, match=r"stage base stopped at step 4: .*No space left.*checkpoints/00000003"):
        run(output)
    monkeypatch.undo()
    run(output, resume=True)
    assert (output / "summary.json").exists()


def test_a_dead_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def dies(self: Any, keys: Any) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(sys.modules["images"].Augmented, "__getitems__", dies)
    with pytest.raises(RunError, match=r"stage base stopped at step 0: .*there is no checkpoint yet"):
        run(tmp_path / "run", workers=1)


def test_a_tracker_gets_the_rows(tmp_path: Path) -> None:
    tensorboard = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    output = tmp_path / "run"
    run(output, stages=ddi.STAGES[:1], tracker=["tensorboard"])
    events = tensorboard.EventAccumulator(str(next(output.rglob("events.out*")).parent))
    events.Reload()
    found = [event.value for event in events.Scalars("accuracy")]
    assert found == pytest.approx([row["accuracy"] for row in RunFolder(output).rows()])


def test_a_tracker_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="found clearml"):
        settings(tmp_path, tracker=["clearml"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(options, "TRACKERS", ("no_such_package",))
        with pytest.raises(RunError, match="pip install no_such_package"):
            run(tmp_path / "run", tracker=["no_such_package"])


# Stages --------------------------------------------------------------------------------------------------------------


def test_stage_changes(tmp_path: Path) -> None:
    changes = [
        "iadi.iterations=50",
        "iadi.milestones=0.5,0.9",
        "iadi.schedule=multistep",
        "ddi.lr=0.5",
        "base.epochs=2",
    ]
    base, _, iadi, final = planned(ddi.STAGES, settings(tmp_path, stage=changes, max_steps=None))
    assert (iadi.iterations, iadi.milestones, iadi.schedule, final.lr) == (50, (0.5, 0.9), "multistep", 0.5)
    assert base.steps(10, settings(tmp_path, max_steps=None)) == 20
    assert iadi.steps(10, settings(tmp_path, max_steps=None, epochs_scale=0.5)) == 25
    assert [stage.name for stage in planned(ddi.STAGES, settings(tmp_path, base="x"))] == ["warmup", "iadi", "ddi"]


def test_a_stage_of_no_length_is_left_out(tmp_path: Path) -> None:
    for change in ("iadi.epochs=0", "iadi.iterations=0"):
        found = planned(ddi.STAGES, settings(tmp_path, stage=[change]))
        assert [stage.name for stage in found] == ["base", "warmup", "ddi"]


def test_learning_rates_of_a_stage() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)

    def rates(stage: Stage, steps: int) -> list[float]:
        scheduler, found = stage.scheduler(optimizer, steps), []
        for step in range(steps):
            scheduler.step_update(step)
            found.append(optimizer.param_groups[0]["lr"])
        return found

    stepped = rates(Stage("a", base_task, schedule="multistep", milestones=(0.5, 0.75)), 8)
    assert stepped == pytest.approx([1.0] * 4 + [0.1] * 2 + [0.01] * 2)
    smooth = rates(Stage("a", base_task), 8)
    assert smooth == pytest.approx([0.5 * (1 + np.cos(np.pi * k / 8)) for k in range(8)])
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    cycle = rates(Stage("a", base_task, lr=1.0, schedule="onecycle"), 10)
    assert cycle[:3] == pytest.approx([0.04, 0.52, 1.0])
    assert cycle[2:] == pytest.approx([0.5 * (1 + np.cos(np.pi * k / 8)) for k in range(8)])


def test_gates_learn_at_rates_of_their_own() -> None:
    model = td.add_channel_gates(td.add_layer_gates(timm.create_model("resnet20_cifar")))
    stage = Stage("a", base_task, lr=0.5, gate_lr=0.1, channel_lr=0.2)
    scales = {
        id(parameter): group.get("lr_scale", 1.0)
        for group in stage.optimizer(model).param_groups
        for parameter in group["params"]
    }
    for name, parameter in model.named_parameters():
        wanted = {"layer_gates": 0.1, "channel_gates": 0.2}.get(name.split(".")[0], 1.0)
        assert scales[id(parameter)] == wanted, name
    assert {group.get("lr_scale", 1.0) for group in stage.optimizer(model, plain=True).param_groups} == {1.0}
    optimizer = stage.optimizer(model)
    stage.scheduler(optimizer, 8).step_update(0)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.05, 0.1, 0.5])


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [({}, 1.0), ({"clip_grad": 3.0}, 3.0), ({"plain": True}, None), ({"clip_grad": 3.0, "plain": True}, 3.0)],
)
def test_what_a_gradient_is_limited_to(tmp_path: Path, changes: dict[str, Any], wanted: float | None) -> None:
    """What the stage has, or what was asked for; nothing in the paper's plain form."""
    found = settings(tmp_path, "skipnet", **changes)
    assert skipnet.SP.largest_norm(found) == wanted
    assert skipnet.BASE.largest_norm(found) == changes.get("clip_grad")


@pytest.mark.parametrize("name", ["spread", "clip_grad"])
def test_what_cannot_be_negative(tmp_path: Path, name: str) -> None:
    with pytest.raises(RunError, match="must be 0 or above; found -1"):
        settings(tmp_path, "skipnet", **{name: -1.0})


def test_gradients_are_limited_where_gates_are_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, clip = [], torch.nn.utils.clip_grad_norm_

    def counted(parameters: Any, norm: float, **more: Any) -> Any:
        asked.append(norm)
        return clip(parameters, norm, **more)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", counted)
    run(
        tmp_path / "run",
        stages=(skipnet.BASE, dataclasses.replace(skipnet.SP, clip=0.5)),
        method="sp",
        recipe="skipnet",
    )
    assert asked == [0.5] * 4


@pytest.mark.parametrize(("changes", "wanted"), [({}, True), ({"spread": 0.0}, False), ({"plain": True}, False)])
def test_layer_gates_start_spread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], wanted: bool
) -> None:
    called = []
    monkeypatch.setattr(trainer, "spread_gates", lambda model, images, size: called.append((len(images), size)))
    run(tmp_path / "run", stages=skipnet.METHODS["sp"], method="sp", recipe="skipnet", **changes)
    assert called == ([(256, 0.5)] if wanted else [])


def test_accumulated_parts_give_the_whole_batch(tmp_path: Path) -> None:
    """Two halves of a batch give the gradient of the whole one, where no batch norm sees the batch."""
    found = []
    for accumulate in (1, 2):
        run(tmp_path / str(accumulate), stages=(STILL,), accumulate=accumulate, max_steps=3)
        found.append(weights_of(tmp_path / str(accumulate)))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)


class StillTask(torch.nn.Module):
    """Cross entropy with batch norms in eval mode."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
        self.model.eval()
        return {"loss": torch.nn.functional.cross_entropy(self.model(x), y)}


STILL = Stage("still", lambda model, outlook: StillTask(model), lr=0.01)


# The command line ----------------------------------------------------------------------------------------------------


def call(recipe: Any, *arguments: object) -> int:
    """Run a recipe as its script does, in this process; its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        prepare(patch)
        patch.setattr(sys, "argv", [recipe.__name__, *map(str, arguments)])
        patch.setenv("COLUMNS", "400")
        with pytest.raises(SystemExit) as found:
            options.command(recipe.main)
    return int(found.value.code or 0)


def test_a_recipe_from_a_config_with_options_over_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "run.yaml"
    values = {"image_size": 16, "batch_size": 16, "max_steps": 9, "stages": {"sp": {"epochs": 3, "lr": 0.01}}}
    config.write_text(yaml.safe_dump(values))
    output = tmp_path / "run"
    assert call(skipnet, "--config", config, "--output", output, "--max-steps", 1, "--gate", "ff2") == 0
    kept = json.loads((output / "settings.json").read_text())
    assert (kept["batch_size"], kept["max_steps"], kept["gate"]) == (16, 1, "ff2")
    assert kept["stages"][1]["lr"] == 0.01
    summary = json.loads((output / "summary.json").read_text())
    assert (summary["exits"], summary["budgets"]) == ([], [])
    shown = capsys.readouterr().out
    assert "dense" in shown
    assert "dynamic" in shown


def test_the_base_of_one_recipe_starts_another(tmp_path: Path) -> None:
    few = ("--image-size", 16, "--batch-size", 16, "--max-steps", 2)
    assert call(base, "--output", tmp_path / "base", *few) == 0
    summary = json.loads((tmp_path / "base" / "summary.json").read_text())
    assert summary["dynamic"]["macs"] == summary["dense"]["macs"]
    assert call(iadi, "--output", tmp_path / "iadi", "--base", tmp_path / "base", *few) == 0
    rows = RunFolder(tmp_path / "iadi").rows()
    assert {row["stage"] for row in rows} == {"warmup", "iadi"}
    dense = json.loads((tmp_path / "iadi" / "summary.json").read_text())["dense"]
    assert dense == summary["dense"]


def test_a_config_with_keys_that_nobody_knows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("batchsize: 3\nlr: 1\n")
    assert call(base, "--config", config) == 2
    assert "unknown keys batchsize, lr" in capsys.readouterr().err


def test_an_error_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "run"
    assert call(iadi, "--dataset", "folder", "--data-dir", tmp_path / "gone", "--output", output) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: no folder")
    assert not output.exists()


@pytest.mark.parametrize("path", sorted((RECIPES / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_config_says_how_it_is_run_and_is_understood(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = path.read_text().splitlines()[0].split()
    assert words[:3] == ["#", "accelerate", "launch"]
    assert words[4:6] == ["--config", f"train_recipes/configs/{path.name}"]
    recipe = {f"train_recipes/{one.__name__}.py": one for one in (ddi, iadi, skipnet)}[words[3]]
    few = ("--output", tmp_path / "run", "--data-dir", tmp_path, "--max-steps", 1, "--evaluations", 1)
    if "digits" in path.stem:
        assert call(recipe, "--config", path, *few) == 0
    else:
        assert call(recipe, "--config", path, *few) == 1
        missing = ("Dataset not found", "--data-dir must hold train/CLASS")
        shown = capsys.readouterr().err
        assert any(words in shown for words in missing), "everything but the images was there"


def test_training_for_milliseconds_and_millijoules(tmp_path: Path) -> None:
    """The table of a run is measured once; what a resumed run counts by is what was written."""
    output = tmp_path / "ms"
    with pytest.raises(Killed):
        run(output, stop_after=9, cost="latency_ms")
    tables = {path.name: path.read_bytes() for path in output.glob("latency-*.json")}
    assert tables
    run(output, resume=True, cost="latency_ms")
    assert all((output / name).read_bytes() == content for name, content in tables.items())
    energy = tmp_path / "energy.json"
    energy.write_text(json.dumps({"pj_per_mac": 1.0, "pj_per_byte": 1e-9}))
    run(tmp_path / "mj", cost="energy_mj", energy=energy, stages=skipnet.METHODS["sp"], recipe="skipnet")
    run(tmp_path / "macs", stages=skipnet.METHODS["sp"], recipe="skipnet")
    shares = [RunFolder(tmp_path / name).rows()[-1]["train"]["macs_share"] for name in ("mj", "macs")]
    assert shares[0] == pytest.approx(shares[1], rel=1e-3), "where bytes cost nothing, energy is MACs"
    energy.write_text(json.dumps({"pj_per_mac": -1}))
    with pytest.raises(RunError, match=r"--energy .*energy.json: pj_per_mac must be .* above 0; found -1"):
        run(tmp_path / "negative", cost="energy_mj", energy=energy)
    assert not (tmp_path / "negative").exists()
    energy.write_text(json.dumps({"parts": {"stem": 1.0}}))
    with pytest.raises(RunError, match=r"--cost energy_mj: .*missing: "):
        run(tmp_path / "odd", cost="energy_mj", energy=energy)


def test_a_gain_that_nothing_could_be_compared_with(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"--gain .* needs such a stage; found base, warmup"):
        run(tmp_path / "run", stages=iadi.STAGES, recipe="iadi", gain=True, stage=("iadi.epochs=0",))
    assert not (tmp_path / "run").exists()


def test_two_processes(tmp_path: Path) -> None:
    """Gloo on the CPU: each its share of a batch, counts over an odd validation set, one folder."""
    output = tmp_path / "run"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    arguments = ["--output", output, "--max-steps", 1, "--batch-size", 16, "--image-size", 16]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}
    line = [*command, *map(str, [RECIPES / "ddi.py", *arguments])]
    found = subprocess.run(line, capture_output=True, text=True, check=False, env=environment)
    assert found.returncode == 0, found.stderr
    summary = json.loads((output / "summary.json").read_text())
    assert summary["decisions"]["images"] == 540
    assert [row["stage"] for row in RunFolder(output).rows()] == ["base", "warmup", "iadi", "ddi"]
    model = timm.create_model(f"local-dir:{output}", pretrained=True).eval()
    td.set_execution(model, "masked")
    val: Any = ALL_DIGITS(16, 0).val
    x, y = val.__getitems__(list(range(540)))
    assert summary["dynamic"]["accuracy"] == pytest.approx((model(x).argmax(1) == y).double().mean().item())


def test_two_processes_train_what_one_trains(tmp_path: Path) -> None:
    """The same batches, half in each process, give the same network, where no batch norm sees its part only."""
    script = tmp_path / "still.py"
    script.write_text(
        f"import sys; sys.path[:0] = [{str(RECIPES)!r}, {str(Path(__file__).parent)!r}]\n"
        "import torch, loop, options, stages, timm_dynamic as td\n"
        "def gates(model, settings):\n"
        "    td.add_layer_gates(model, td.LayerGateConfig(kind='rnn', init='random'))\n"
        "def task(model, outlook):\n"
        "    made = stages.dynamic_task(model, outlook)\n"
        "    train = made.train\n"
        "    def still(mode=True):\n"
        "        train(mode)\n"
        "        for module in model.modules():\n"
        "            if isinstance(module, torch.nn.BatchNorm2d): module.eval()\n"
        "        return made\n"
        "    made.train = still\n"
        "    return made\n"
        "plan = (stages.Stage('sp', task, surgery=gates, epochs=1, lr=0.01),)\n"
        "values = dict(model='resnet20_cifar', image_size=16, batch_size=16, max_steps=3,\n"
        "              precision='fp32', evaluations=1, threads=1, target=0.5)\n"
        "values['output'] = __import__('pathlib').Path(sys.argv[1])\n"
        "loop.run(plan, options.settings('skipnet', values, 'skipnet_'))\n"
    )
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    for name, command in (("one", [sys.executable]), ("two", launch)):
        line = [*command, str(script), str(tmp_path / name)]
        found = subprocess.run(line, capture_output=True, text=True, check=False, env=environment)
        assert found.returncode == 0, found.stderr
    torch.testing.assert_close(weights_of(tmp_path / "two"), weights_of(tmp_path / "one"), rtol=1e-4, atol=1e-5)
    one, two = (RunFolder(tmp_path / name).rows()[0] for name in ("one", "two"))
    assert two["train"]["loss"] == pytest.approx(one["train"]["loss"], rel=1e-4)
    assert two["train"]["macs_share"] == pytest.approx(one["train"]["macs_share"], rel=1e-4)
    assert two["macs"] == pytest.approx(one["macs"], rel=1e-3)
