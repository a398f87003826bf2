"""The whole matrix: every ResNet and DenseNet of timm, torchvision and ours, every prefix, at a small input size."""

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import timm
import torch
import torchvision
from nets import assert_near, decide, images, masked, mixed, randomise, run
from torch import Tensor, nn
from torchvision.models import _api as torchvision_api
from torchvision.models import densenet as tv_densenet
from torchvision.models import resnet as tv_resnet

import timm_dynamic as td

RESNETS = timm.list_models(module="resnet")
DENSENETS = timm.list_models(module="densenet")
CIFAR = timm.list_models(module="cifar")
LAYER_ONLY = [name for module in ("res2net", "resnest", "sknet") for name in timm.list_models(module=module)]
TORCHVISION = [
    name
    for name in torchvision_api.list_models(module=torchvision.models)
    if torchvision_api.get_model_builder(name).__module__ in (tv_resnet.__name__, tv_densenet.__name__)
]
METHODS: dict[str, Callable[[Any], Any]] = {
    "skipnet": td.add_layer_gates,
    "iadi": td.add_channel_gates,
    "ddi": td.add_exits,
}  # each has the parts of those before and one more
DEEP = 20  # networks of more units run at 32 x 32, and with all parts on alone if shallower ones have their blocks
ALONE = {*DENSENETS, "senet154", "seresnextaa101d_32x8d"}  # deep ones whose blocks no shallow one has


# A network in a few milliseconds -------------------------------------------------------------------------------------


@functools.cache
def numbers(exponent: int) -> Tensor:
    """Random numbers of variance 2 ** -exponent, as many as the largest weight needs; alike but for the scale."""
    if exponent == 0:
        return torch.randn(20_000_000, generator=torch.Generator().manual_seed(0))
    return numbers(0) * 2 ** (-exponent / 2)


@contextmanager
def uninitialised() -> Iterator[None]:
    """Leave out the initialisation of weights: a third of the time of all tests here."""

    def as_it_is(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return tensor

    names = ("kaiming_uniform_", "kaiming_normal_", "uniform_", "normal_", "trunc_normal_")
    with mock.patch.multiple("torch.nn.init", **dict.fromkeys(names, as_it_is)):
        yield


def make(name: str) -> nn.Module:
    """A stock network in eval whose weights are views into shared random numbers, each at a place of its own."""
    with uninitialised():
        model = timm.create_model(name, num_classes=10)
    place = 0
    for parameter in model.parameters():
        if parameter.dim() > 1:
            count, fan = parameter.numel(), parameter[0].numel()
            values = numbers(2 * round(math.log2(fan) / 2))
            place = (place + 7919) % (len(values) - count)
            parameter.data = values[place : place + count].view_as(parameter)
        else:
            nn.init.normal_(parameter, std=0.2)
    return randomise(model).eval()


# Checks --------------------------------------------------------------------------------------------------------------


def shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {key: value.shape for key, value in model.state_dict().items()}


def check_name(model: nn.Module, name: str) -> None:
    """The name gives the same network as the parts added by hand."""
    named = timm.create_model(name, num_classes=10, device="meta")
    assert type(named) is type(model)
    assert shapes(named) == shapes(model)


def check_decisions(model: nn.Module, x: Tensor, stock: Tensor) -> None:
    """For mixed decisions masked equals skipping, what runs is what is counted, and it matters."""
    leave = torch.tensor([1, len(model.exits)]) if hasattr(model, "exits") else None
    with td.force(model, **mixed(model, len(x)), exit=leave), torch.no_grad():
        y, macs = run(model, x)
        with masked(model):
            decisions = decide(model, x)
        assert macs == decisions.macs.sum()
        assert_near(decisions.logits, y)
    assert y.isfinite().all()
    assert (y - stock).abs().max() > 1e-3 * stock.abs().max()


def check_open(model: nn.Module, x: Tensor, stock: Tensor) -> None:
    with torch.no_grad():
        assert torch.equal(model(x), stock)


def check(name: str, methods: list[str], size: int = 64) -> nn.Module:
    """The row of the matrix that belongs to a base; gives the stripped model back."""
    model = make(name)
    deep = sum(type(m).__name__ in ("BasicBlock", "Bottleneck", "DenseLayer") for m in model.modules()) > DEEP
    x = images(2, 32 if deep else size)
    with torch.no_grad():
        stock = model(x)
    base, before = type(model), shapes(model)
    for method in methods:
        METHODS[method](model)
        check_name(model, f"{method}_{name}")
        if not deep or name in ALONE or method == methods[-1]:
            check_open(model, x, stock)
            check_decisions(model, x, stock)
    with masked(model):
        check_open(model, x, stock)
    td.strip(model)
    assert type(model) is base
    assert shapes(model) == before
    check_open(model, x, stock)
    return model


# The matrix ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RESNETS)
def test_resnets(name: str) -> None:
    check(name, ["skipnet", "iadi", "ddi"])


@pytest.mark.parametrize("name", DENSENETS)
def test_densenets(name: str) -> None:
    check(name, ["skipnet", "iadi", "ddi"])


@pytest.mark.parametrize("name", CIFAR)
def test_cifar_networks(name: str) -> None:
    check(name, ["skipnet", "iadi", "ddi"], size=32)


@pytest.mark.parametrize("name", LAYER_ONLY)
def test_blocks_without_plain_hidden_widths(name: str) -> None:
    model = check(name, ["skipnet"])
    before = shapes(model)
    with pytest.raises(ValueError, match=rf"no channel gate for layer\d\.\d of '{name}'.*use layer gates"):
        td.add_channel_gates(model)
    assert shapes(model) == before
    assert not hasattr(model, "dynamic")
    td.add_exits(model)


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision(name: str) -> None:
    """On the meta device: small networks of each kind are run in the other tests."""
    with torch.device("meta"):
        stock = torchvision.models.get_model(name, num_classes=10).eval()
        model = torchvision.models.get_model(f"ddi_{name}", num_classes=10).eval()
    wanted = shapes(stock)
    x = torch.empty(1, 3, 64, 64, device="meta")
    assert model(x).shape == (1, 10)
    assert td.cost_table(model, (3, 64, 64)).dense == run(stock, x)[1]
    assert list(shapes(model))[: len(wanted)] == list(wanted)
    td.strip(model)
    assert type(model) is type(stock)
    assert shapes(model) == wanted


def test_the_matrix_is_whole() -> None:
    assert (len(RESNETS), len(DENSENETS), len(CIFAR), len(TORCHVISION)) == (81, 6, 8, 14)
    assert len(LAYER_ONLY) > 20
