"""Names: every ResNet and DenseNet under every prefix, for timm and for torchvision."""

import dataclasses
import inspect
import itertools
import logging
import pickle
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from nets import decide, images, randomise
from safetensors.torch import save_file
from timm.models.resnet import default_cfgs as resnet_cfgs
from torch import nn
from torchvision.models import _api as torchvision_api
from torchvision.models import densenet as tv_densenet
from torchvision.models import resnet as tv_resnet

import timm_dynamic as td
from timm_dynamic import registry, shipped

PREFIXES = ["skipnet", "iadi", "ddi"]
CIFAR = [f"resnet{depth}_cifar" for depth in (20, 32, 38, 74, 110, 152)] + ["densenet40_cifar", "densenet100_cifar"]
BASES = [*timm.list_models(module="resnet"), *timm.list_models(module="densenet"), *CIFAR]
LAYER_ONLY = [name for module in ("res2net", "resnest", "sknet") for name in timm.list_models(module=module)]
OTHERS = ["skipnet_resnet18", "iadi_densenet121", "ddi_resnet20_cifar"]
ISSUE_2 = [
    *("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"),
    *("densenet121", "densenet161", "densenet169", "densenet201"),
    *CIFAR,
]
TORCHVISION = [
    name
    for name in torchvision_api.list_models(module=torchvision.models)
    if torchvision_api.get_model_builder(name).__module__ in (tv_resnet.__name__, tv_densenet.__name__)
]


def parts_of(model: nn.Module) -> list[str]:
    return [part for part in ("layer_gates", "channel_gates", "exits") if hasattr(model, part)]


# timm ----------------------------------------------------------------------------------------------------------------


def test_all_of_timm_is_there() -> None:
    assert len(timm.list_models(module="resnet")) == 81
    assert len(timm.list_models(module="densenet")) == 6
    assert set(ISSUE_2) <= set(BASES)
    for prefix in PREFIXES:
        more = LAYER_ONLY if prefix == "skipnet" else []
        assert set(timm.list_models(f"{prefix}_*")) == {f"{prefix}_{base}" for base in (*BASES, *more)}


@pytest.mark.parametrize("prefix", PREFIXES)
def test_names_can_be_called_and_pickled(prefix: str) -> None:
    for base in BASES:
        name = f"{prefix}_{base}"
        entry = timm.model_entrypoint(name)
        assert entry.__name__ == name
        assert pickle.loads(pickle.dumps(entry)) is entry
        assert base in (inspect.getdoc(entry) or "")


@pytest.mark.parametrize("prefix", PREFIXES)
def test_each_tag_of_a_base_has_its_twin(prefix: str) -> None:
    for base in BASES:
        twins = set(timm.list_models(f"{prefix}_{base}", pretrained=True))
        trained = {name for name in shipped.names() if name.startswith(f"{prefix}_{base}.")}
        tags = [tag for tag in timm.list_models(base, pretrained=True) if f"{prefix}_{tag}" not in trained]
        assert twins == {f"{prefix}_{tag}" for tag in tags} | trained
        for tag in tags:
            own, stock = timm.get_pretrained_cfg(f"{prefix}_{tag}"), timm.get_pretrained_cfg(tag)
            assert own.hf_hub_id == stock.hf_hub_id  # the base's place, not one of ours
            assert own.hf_hub_id is None or own.hf_hub_id.endswith(f"/{tag}") or not own.hf_hub_id.startswith("timm/")
            assert dataclasses.replace(own, architecture=base) == stock
            assert own.architecture == f"{prefix}_{base}"


def test_timms_own_configs_are_left_alone() -> None:
    assert resnet_cfgs["resnet50"].cfgs["a1_in1k"].hf_hub_id == "timm/"
    assert timm.get_pretrained_cfg("resnet50.a1_in1k").architecture == "resnet50"


@pytest.mark.parametrize(
    ("prefix", "parts"),
    [
        ("skipnet", ["layer_gates"]),
        ("iadi", ["layer_gates", "channel_gates"]),
        ("ddi", ["layer_gates", "channel_gates", "exits"]),
    ],
)
@pytest.mark.parametrize("base", ["resnet18", "resnet50", "densenet121", "resnet20_cifar", "densenet100_cifar"])
def test_methods_have_their_parts(base: str, prefix: str, parts: list[str]) -> None:
    model = timm.create_model(f"{prefix}_{base}", device="meta")
    assert parts_of(model) == parts
    assert model.layer_gates.config == td.LayerGateConfig("rnn", "open")
    assert isinstance(model, type(timm.create_model(base, device="meta")))


@pytest.mark.parametrize("wanted", list(itertools.product([None, True, False], repeat=3)))
@pytest.mark.parametrize("prefix", PREFIXES)
def test_any_set_of_parts_can_be_asked_for(prefix: str, wanted: tuple[bool | None, ...]) -> None:
    names = ("layer_gates", "channel_gates", "exits")
    model = timm.create_model(f"{prefix}_resnet20_cifar", device="meta", **dict(zip(names, wanted, strict=True)))
    default = registry.METHODS[prefix]
    assert parts_of(model) == [n for n, w, d in zip(names, wanted, default, strict=True) if (d if w is None else w)]


@pytest.mark.parametrize("as_dict", [False, True])
def test_parts_take_configs(as_dict: bool) -> None:
    configs = {
        "layer_gates": td.LayerGateConfig("ff2", "random", width=4),
        "channel_gates": td.ChannelGateConfig(8, "nested", levels=2),
        "exits": td.ExitConfig(("layer1.1", 2)),
        "budget": td.BudgetConfig(fraction=0.9),
    }
    given: dict[str, Any] = {k: v.to_dict() for k, v in configs.items()} if as_dict else configs
    model = timm.create_model("ddi_resnet20_cifar", **given)
    assert model.layer_gates.config == configs["layer_gates"]
    assert model.channel_gates.config == configs["channel_gates"]
    assert model.exits.config == configs["exits"]
    assert model.dynamic.budget == configs["budget"]
    with torch.no_grad():
        assert model.eval()(images(2, 32)).shape == (2, 10)


def test_parts_take_words() -> None:
    model = timm.create_model("iadi_resnet20_cifar", layer_gates="linear", channel_gates="nested", device="meta")
    assert (model.layer_gates.config.kind, model.channel_gates.config.mode) == ("linear", "nested")


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"layer_gates": "mlp"}, ValueError, "'rnn'.*found 'mlp'"),
        ({"layer_gates": {"gate": "rnn"}}, TypeError, "'gate'"),
        ({"channel_gates": {"group_size": -1}}, ValueError, "found -1"),
        ({"exits": {"after": ["layer8"]}}, ValueError, "'layer8'"),
        ({"exits": 3}, TypeError, "found int 3"),
        ({"budget": {"macs": 5}}, ValueError, "a budget of 5 MACs is too small"),
        ({"budget": True}, ValueError, "exactly one"),
        ({"colour": "red"}, TypeError, "colour"),
        ({"exit": 3}, TypeError, "exit"),
        ({"layer_gates": False, "channel_gates": False, "exits": False, "budget": {"exit": 0}}, ValueError, "dynamic"),
    ],
)
@pytest.mark.parametrize("name", OTHERS)
def test_wrong_arguments(name: str, kwargs: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        timm.create_model(name, device="meta", **kwargs)


@pytest.mark.parametrize("budget", [{"fraction": 1.0}, {"exit": 1}, {"confidence": 0.5}, {"energy_mj": 1e9}], ids=str)
@torch.no_grad()
def test_budgets_of_every_unit_can_be_given(budget: dict[str, Any]) -> None:
    model = timm.create_model("ddi_resnet20_cifar", budget=budget).eval()
    assert model(images(1, 32)).shape == (1, 10)


@pytest.mark.parametrize("name", ["skipnet_res2net50_26w_4s", "skipnet_resnest14d", "skipnet_skresnet18"])
def test_blocks_without_plain_hidden_widths_have_no_channel_gates(name: str) -> None:
    assert parts_of(timm.create_model(name, device="meta")) == ["layer_gates"]
    with pytest.raises(ValueError, match=r"no channel gate for layer\d\.\d of .*use layer gates"):
        timm.create_model(name, device="meta", channel_gates=True)


# Weights of the base -------------------------------------------------------------------------------------------------


def weights_file(model: nn.Module, folder: Path) -> dict[str, Any]:
    save_file(model.state_dict(), folder / "model.safetensors")
    return {"file": str(folder / "model.safetensors")}


@pytest.mark.parametrize("base", ["resnet18", "densenet121", "resnet20_cifar"])
@pytest.mark.parametrize("prefix", PREFIXES)
@torch.no_grad()
def test_weights_of_the_base_open_the_gates(
    base: str, prefix: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stock = randomise(timm.create_model(base, num_classes=10)).eval()
    overlay = {**weights_file(stock, tmp_path), "num_classes": 10}
    with caplog.at_level(logging.INFO):
        model = timm.create_model(f"{prefix}_{base}", pretrained=True, pretrained_cfg_overlay=overlay).eval()
    assert torch.equal(model(images(2, 32)), stock(images(2, 32)))
    assert decide(model, images(2, 32)).layer_keep.all()
    assert f"weights of {base}: its gates are open and not trained yet" in caplog.text


@torch.no_grad()
def test_weights_of_the_base_for_other_classes_and_channels(tmp_path: Path) -> None:
    stock = timm.create_model("resnet18", num_classes=10)
    overlay = {**weights_file(stock, tmp_path), "num_classes": 10}
    model = timm.create_model(
        "ddi_resnet18", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=3, in_chans=1
    ).eval()
    assert [y.shape for y in td.anytime(model, torch.randn(2, 1, 32, 32))] == [(2, 3)] * 4
    assert torch.equal(model.conv1.weight, stock.conv1.weight.sum(1, keepdim=True))
    assert torch.equal(model.layer3[1].conv2.weight, stock.layer3[1].conv2.weight)


def test_weights_must_have_all_gates_or_none() -> None:
    model = timm.create_model("ddi_resnet20_cifar")
    whole = model.state_dict()
    base = {k: v for k, v in whole.items() if not registry.is_part(k)}
    assert set(registry.complete("resnet20_cifar", dict(base), model)) == set(whole)
    some = {k: v for k, v in whole.items() if not k.startswith("exits")}
    with pytest.raises(RuntimeError, match="exits"):
        model.load_state_dict(registry.complete("resnet20_cifar", some, model))


# torchvision ---------------------------------------------------------------------------------------------------------


def test_torchvision_lists_them() -> None:
    assert len(TORCHVISION) == 14
    for prefix in PREFIXES:
        assert torchvision.models.list_models(include=f"{prefix}*") == sorted(
            f"{prefix}_{name}" for name in TORCHVISION
        )
    assert set(TORCHVISION) <= set(torchvision.models.list_models())


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("base", ["resnet50", "densenet121"])
def test_torchvision_builds_them(base: str, prefix: str) -> None:
    with torch.device("meta"):
        model = torchvision.models.get_model(f"{prefix}_{base}", weights=None, num_classes=10, layer_gates="ff1")
        stock = torchvision.models.get_model(base, num_classes=10)
    assert isinstance(model, type(stock))
    assert list(model.state_dict())[: len(stock.state_dict())] == list(stock.state_dict())
    assert parts_of(model) == ["layer_gates", "channel_gates", "exits"][: PREFIXES.index(prefix) + 1]
    assert model.layer_gates.config.kind == "ff1"
    assert model.eval()(torch.empty(2, 3, 64, 64, device="meta")).shape == (2, 10)


def test_torchvision_knows_their_weights() -> None:
    own, stock = torchvision.models.get_model_weights("ddi_resnet18"), torchvision.models.get_model_weights("resnet18")
    assert own is stock
    with pytest.raises(TypeError, match="colour"):
        torchvision.models.get_model("skipnet_resnet18", colour="red")
    with pytest.raises(ValueError, match="found 'mlp'"):
        torchvision.models.get_model("skipnet_resnet18", layer_gates="mlp")
    assert pickle.loads(pickle.dumps(torchvision_api.get_model_builder("ddi_resnet18")))
