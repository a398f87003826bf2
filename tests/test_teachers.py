"""Learning from trained networks that are named: `--teacher`."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from test_recipes import RunError, base, call, ddi, settings, skipnet
from torch import nn

import timm_dynamic as td
from teachers import teachers
from timm_dynamic.cifar import CIFAR10_MEAN, CIFAR10_STD
from timm_dynamic.tasks import BaseTask

FEW = ["--image-size", 16, "--batch-size", 16, "--max-steps", 2, "--evaluations", 1, "--threads", 1]
CIFAR = SimpleNamespace(classes=tuple("0123456789"), mean=CIFAR10_MEAN, std=CIFAR10_STD, input_size=(3, 32, 32))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two networks that know the digits a little."""
    root = tmp_path_factory.mktemp("trained")
    for seed in (1, 2):
        few = [*FEW[:4], "--max-steps", 12, *FEW[6:]]
        assert call(base, "--output", root / str(seed), "--seed", seed, *few) == 0
    return [root / "1", root / "2"]


def last_loss(run: Path) -> float:
    loss: float = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["train"]["loss"]
    return loss


def test_several_teachers_pull_towards_the_mean_of_their_probabilities() -> None:
    x, y = torch.randn(8, 3, 4, 4), torch.randint(0, 5, (8,))
    student, *by = (nn.Sequential(nn.Flatten(), nn.Linear(48, 5)) for _ in range(4))
    task = BaseTask(student, teacher=by, distill=0.7)
    assert {id(value) for value in task.parameters()} == {id(value) for value in student.parameters()}
    loss = task(x, y)["loss"]
    logits = student(x)
    mean = torch.stack([(teacher(x) / 2).softmax(1) for teacher in by]).mean(0)
    followed = F.cross_entropy(logits, y) + 0.7 * 4 * F.cross_entropy(logits / 2, mean)
    own, wanted = (torch.autograd.grad(value, tuple(student.parameters())) for value in (loss, followed))
    for found, expected in zip(own, wanted, strict=True):
        assert torch.allclose(found, expected, atol=1e-6)
    alone = BaseTask(student, teacher=by[0], distill=0.7)(x, y)["loss"]
    assert torch.equal(alone, BaseTask(student, teacher=by[:1], distill=0.7)(x, y)["loss"])
    assert not torch.allclose(alone, loss)


def test_a_stock_network_learns_from_the_teachers_that_are_named(trained: list[Path], tmp_path: Path) -> None:
    """At a rate of zero the loss grows by the distance from each teacher, or by the mean of the distances."""
    still = ("--base", trained[0], "--stage", "base.lr=0", *FEW)
    by = {"nobody": [], "itself": trained[:1], "another": trained[1:], "both": trained}
    losses = {}
    for name, folders in by.items():
        taught = [value for folder in folders for value in ("--teacher", folder)]
        given = (*taught, "--distill", 1) if taught else ()
        assert call(base, "--output", tmp_path / name, *given, *still) == 0
        losses[name] = last_loss(tmp_path / name)
    assert min(losses["itself"], losses["another"]) > losses["nobody"] + 1e-3
    assert abs(losses["itself"] - losses["another"]) > 1e-3
    assert losses["both"] == pytest.approx((losses["itself"] + losses["another"]) / 2, rel=1e-4)
    kept = json.loads((tmp_path / "both" / "settings.json").read_text())
    assert kept["teacher"] == [str(folder) for folder in trained]


def test_named_teachers_take_the_place_of_the_base_in_all_that_is_trained(trained: list[Path], tmp_path: Path) -> None:
    """In the gated network and in the static one beside it; and a run without teachers is noted as before."""
    few = (*("--method", "sp", "--base", trained[0], "--stage", "sp.lr=0", "--target", 1.0), *FEW)
    for name, given in (("base", ()), ("other", ("--teacher", trained[1]))):
        assert call(skipnet, "--output", tmp_path / name, "--distill", 1, *given, "--gain", *few) == 0
    for part in ("", "static"):
        assert abs(last_loss(tmp_path / "other" / part) - last_loss(tmp_path / "base" / part)) > 1e-3
    kept = [json.loads((tmp_path / name / "settings.json").read_text())["teacher"] for name in ("base", "other")]
    assert kept == [None, [str(trained[1])]]


def test_what_cannot_teach_is_said_before_a_run_is_begun(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    damaged = tmp_path / "damaged"
    td.save_pretrained(timm.create_model("resnet20_cifar"), damaged)
    (damaged / "model.safetensors").write_bytes(b"no weights")
    cifar = ("--teacher", "resnet20_cifar.cifar10_60epochs", "--distill", 1)
    cases: tuple[tuple[Any, tuple[Any, ...], str], ...] = (
        (ddi, cifar[:2], "--teacher needs the weight of what it teaches: give --distill"),
        (base, cifar[2:], "--distill needs a network to learn from: give --teacher"),
        (base, ("--teacher", "resnet21_cifar", "--distill", 1), "--teacher resnet21_cifar"),
        (base, ("--teacher", tmp_path / "empty", "--distill", 1), f"--teacher {tmp_path / 'empty'}"),
        (base, ("--teacher", damaged, "--distill", 1), f"--teacher {damaged}"),
    )
    for recipe, options, message in cases:
        assert call(recipe, *options, "--output", tmp_path / "run", *FEW) == 1, message
        assert message in " ".join(capsys.readouterr().err.split())
        assert not (tmp_path / "run").exists()


def test_a_teacher_is_shown_images_as_it_was_trained_to_see_them(tmp_path: Path) -> None:
    name = "resnet20_cifar.cifar10_60epochs"
    own = timm.create_model(name, pretrained=True).eval()
    mean, std = (torch.tensor(own.pretrained_cfg[key]).view(-1, 1, 1) for key in ("mean", "std"))
    pixels = torch.rand(4, 3, 32, 32)
    wanted = own((pixels - mean) / std)
    as_own = {key: own.pretrained_cfg[key] for key in ("mean", "std")}
    for statistics in (as_own, {"mean": (0.5, 0.4, 0.3), "std": (0.3, 0.2, 0.1)}):
        data = SimpleNamespace(**{**vars(CIFAR), **statistics})
        (found,) = teachers(settings(tmp_path, teacher=(name,), distill=1.0), data)  # type: ignore[arg-type]
        seen = (pixels - torch.tensor(data.mean).view(-1, 1, 1)) / torch.tensor(data.std).view(-1, 1, 1)
        assert torch.allclose(found.eval()(seen), wanted, atol=1e-4)


def test_a_teacher_knows_the_classes_takes_the_images_and_can_be_recorded(tmp_path: Path) -> None:
    plain, dynamic = "resnet20_cifar.cifar10_60epochs", "ddi_resnet38_cifar.cifar10_anytime"
    wanted = settings(tmp_path, teacher=(plain, dynamic), distill=1.0)
    names = timm.create_model(plain, pretrained=True).pretrained_cfg["label_names"]
    for changes, message in (
        ({"classes": ("0", "1")}, r"resnet20_cifar\.cifar10_60epochs knows 10 classes; the data has 2"),
        ({"classes": names[::-1]}, "has the data's classes in another order: airplane, automobile"),
        ({"input_size": (4, 32, 32)}, r"resnet20_cifar\.cifar10_60epochs does not take images of 4 x 32 x 32: "),
    ):
        with pytest.raises(RunError, match=message):
            teachers(wanted, SimpleNamespace(**{**vars(CIFAR), **changes}))  # type: ignore[arg-type]
    x, y = torch.randn(4, 3, 32, 32), torch.arange(4)
    task = BaseTask(timm.create_model("resnet20_cifar"), teacher=teachers(wanted, CIFAR))  # type: ignore[arg-type]
    task(x, y)["loss"].backward()  # a dynamic network teaches too
    assert all(parameter.grad is not None for parameter in task.parameters())
    object.__setattr__(wanted, "cuda_graph", True)  # a machine without a GPU refuses it earlier
    with pytest.raises(RunError, match="anytime decides image by image, which --cuda-graph cannot record"):
        teachers(wanted, CIFAR)  # type: ignore[arg-type]
