"""Weights that no image can reach: whatever they are, nothing changes."""

import copy
from typing import Any

import pytest
import torch
from nets import FEW, KINDS, LAYER_KINDS, assert_near, assert_same_decisions, decide, gated, images, masked, undecided
from torch import nn

import timm_dynamic as td
from timm_dynamic.idle import idle_weights


def settled(kind: str, layer: str = "linear") -> Any:
    """A network with its first and last gated unit shut, its second open and the channels of its third settled."""
    model: Any = undecided(kind, layer=layer)
    names = gated(model)
    td.shut_units(model, (names[0], names[-1]))
    td.open_units(model, names[1:2])
    keeps = "".join("1" * len(sizes) for sizes in model.channel_gates.sizes[2])
    return td.settle_channels(model, {names[2]: keeps})


def idle(model: Any) -> dict[str, torch.Tensor]:
    return idle_weights(model, model.layer_gates.config, model.channel_gates.config)


def spoil(model: nn.Module, keys: Any) -> None:
    """Other values, all above 0 as variances have to be."""
    state = model.state_dict()
    for key in keys:
        if state[key].is_floating_point():
            state[key].copy_(1 + torch.rand_like(state[key]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layer", LAYER_KINDS)
def test_nothing_changes_with_them(kind: str, layer: str) -> None:
    model, x = settled(kind, layer), images(6)
    before = decide(model, x)
    with masked(model):
        masked_before = decide(model, x)
    train_before = td.decide(copy.deepcopy(model).train(), x)
    spoil(model, idle(model))
    assert_same_decisions(decide(model, x), before)
    with masked(model):
        assert_same_decisions(decide(model, x), masked_before)
    train = td.decide(model.train(), x)
    assert torch.equal(train.logits, train_before.logits)
    assert torch.equal(train.macs, train_before.macs)


@pytest.mark.parametrize("kind", FEW)
def test_all_of_a_shut_unit_is_among_them(kind: str) -> None:
    """But for what runs in its place; with the gates that are not asked."""
    model = settled(kind, "ff2")
    names, found = gated(model), idle(model)
    own = [k for k in model.state_dict() if k.startswith((f"{names[0]}.", f"{names[-1]}.")) and "downsample" not in k]
    gates = [f"layer_gates.gates.{i}." for i in (0, 1, len(names) - 1)]
    gates += [f"channel_gates.gates.{i}." for i in (0, 2, len(names) - 1)]
    assert found.keys() == {*own, *(key for key in model.state_dict() if key.startswith(tuple(gates)))}


@pytest.mark.parametrize("kind", KINDS)
def test_a_unit_that_gets_them_adds_nothing(kind: str) -> None:
    model, x = settled(kind), images(6)
    with td.force(model, layer_keep=1.0, channel_keep=1.0):
        wanted = decide(model, x)
        model.load_state_dict({**model.state_dict(), **idle(model)})
        td.shut_units(model, [])
        found = decide(model, x)
    assert found.layer_keep.all()
    assert_near(found.logits, wanted.logits)


def test_no_other_weights_are() -> None:
    model: Any = undecided("basic")
    assert idle(model) == {}
    assert idle_weights(model, None, None) == {}
