"""Networks of torchvision, saved as the timm networks that compute the same."""

from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from nets import assert_same_decisions, assert_same_state, images, randomise, state_of
from safetensors.torch import load_file
from torch import nn

import timm_dynamic as td

BASES = [
    name
    for name in torchvision.models.list_models(module=torchvision.models)
    if name.startswith(("resne", "wide_resne", "densenet"))
]


def made(name: str, **kwargs: object) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return randomise(torchvision.models.get_model(name, num_classes=5, **kwargs)).eval()


def again(folder: Path) -> nn.Module:
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


@pytest.mark.parametrize("name", ["resnet18", "densenet121"])
def test_a_dynamic_network_comes_back_as_timms(name: str, tmp_path: Path) -> None:
    model = made(f"ddi_{name}", layer_gates={"kind": "linear", "init": "random"}, exits={"after": [2]})
    model.exits.set_confidence([0.3])
    td.shut_units(model, [model.layer_gates.gated[1]])
    before, state = td.decide(model, images(6)), state_of(model)
    td.save_pretrained(model, tmp_path, metrics={"accuracy": 0.5})
    assert_same_state(state_of(model), state)
    other = again(tmp_path)
    assert type(td.strip(again(tmp_path))).__module__.startswith("timm.")
    assert other.pretrained_cfg["architecture"] == f"ddi_{name}"
    assert 0 < before.layer_keep.float().mean() < 1
    assert_same_decisions(td.decide(other, images(6)), before)
    assert f"ddi_{name}" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("name", ["resnet18", "densenet121"])
def test_a_stock_network_comes_back_as_timms(name: str, tmp_path: Path) -> None:
    model = made(name)
    td.save_pretrained(model, tmp_path)
    other = again(tmp_path)
    assert other.pretrained_cfg["architecture"] == name
    torch.testing.assert_close(other(images(2)), model(images(2)))
    assert load_file(tmp_path / "model.safetensors").keys() == model.state_dict().keys()


@pytest.mark.parametrize("prefix", ["skipnet", "iadi", "ddi"])
def test_the_parts_are_those_that_it_has(prefix: str, tmp_path: Path) -> None:
    model = made(f"{prefix}_resnet18")
    td.save_pretrained(model, tmp_path)
    other = again(tmp_path)
    for part in ("layer_gates", "channel_gates", "exits"):
        assert hasattr(other, part) == hasattr(model, part)


def test_the_budget_travels(tmp_path: Path) -> None:
    model = td.set_budget(made("ddi_resnet18"), fraction=0.8, input_size=(3, 40, 40))
    td.save_pretrained(model, tmp_path)
    other = again(tmp_path)
    assert other.dynamic.budget == model.dynamic.budget
    assert_same_decisions(td.decide(other, images(3)), td.decide(model, images(3)))


@pytest.mark.parametrize("name", BASES)
def test_timm_builds_all_of_them_with_the_same_names_and_shapes(name: str) -> None:
    with torch.device("meta"):
        ours = torchvision.models.get_model(name).state_dict()
        theirs = timm.create_model(f"{name}.tv_in1k").state_dict()
    assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in theirs.items()}


def test_there_are_fourteen() -> None:
    assert len(BASES) == 14


def headless() -> nn.Module:
    model = torchvision.models.resnet18()
    model.fc = nn.Identity()
    return model


def frozen() -> nn.Module:
    return torchvision.models.resnet18(norm_layer=torchvision.ops.FrozenBatchNorm2d)


def dilated() -> nn.Module:
    return torchvision.models.resnet50(replace_stride_with_dilation=[False, False, True])


def short() -> nn.Module:
    return td.add_layer_gates(torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1]))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (dilated, "this ResNet is not what torchvision makes"),
        (headless, "this ResNet is not what torchvision makes"),
        (frozen, "this ResNet is not what torchvision makes"),
        (short, "this DynamicTorchvisionResNet is not what torchvision makes"),
        (lambda: torchvision.models.DenseNet(12, (2, 3)), "this DenseNet is not what torchvision makes"),
        (lambda: torchvision.models.densenet121(drop_rate=0.2), "this DenseNet is not what torchvision makes"),
        (lambda: torchvision.models.squeezenet1_0(), "only models of timm, and ResNets .* can be saved; found Squeeze"),
    ],
)
def test_what_timm_could_not_build_is_refused(build: Callable[[], nn.Module], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        td.save_pretrained(build(), tmp_path / "new")
    assert not (tmp_path / "new").exists()
