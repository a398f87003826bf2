"""Fresh gates that can tell images apart."""

import math
from typing import Any

import pytest
import torch
from nets import (
    FEW,
    LAYER_KINDS,
    add,
    assert_same_state,
    decide,
    dynamic,
    images,
    masked,
    state_of,
    stock,
)
from torch import Tensor, nn

import timm_dynamic as td
from timm_dynamic.spreading import _normalised_by_batch, spread_gates


def fresh(kind: str, parts: tuple[str, ...], gate: str = "rnn", mode: str = "independent") -> Any:
    """A network with gates as they are drawn; its trunk is as good as trained."""
    torch.manual_seed(0)
    configs = {
        "layer": td.LayerGateConfig(gate, init="random"),
        "channel": td.ChannelGateConfig(mode=mode, init="random"),
    }
    return add(stock(kind), parts, **{part: configs[part] for part in parts})


def logits(model: Any, x: Tensor) -> dict[str, Tensor]:
    """What the last layer of every gate gives [n, outputs], over all images and the units that use it."""
    seen: dict[str, list[Tensor]] = {}
    last = {n: m for n, m in model.named_modules() if n.startswith("layer_gates") and n.endswith("fc")}
    hooks = [
        m.register_forward_hook(lambda _, __, out, name=n: seen.setdefault(name, []).append(out))
        for n, m in last.items()
    ]
    forced = td.force(model, **{f"{key}_keep": 1.0 for key in ("layer", "channel") if hasattr(model, f"{key}_gates")})
    with _normalised_by_batch(model), masked(model), forced, torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(values) for name, values in seen.items()}


@pytest.mark.parametrize("kind", FEW)
@pytest.mark.parametrize("gate", LAYER_KINDS)
@pytest.mark.parametrize("size", [1.0, 0.5])
def test_logits_have_the_wanted_deviation(kind: str, gate: str, size: float) -> None:
    model, x = fresh(kind, ("layer", "channel"), gate), images(32)
    spread_gates(model, x, size)
    for name, found in logits(model, x).items():
        assert (found.mean(0) - math.log(0.88 / 0.12)).abs().max() < 0.02, name  # what open gates start at
        assert torch.allclose(found.std(0), torch.full_like(found[0], size), atol=0.02), name


def test_gates_as_drawn_agree_on_nearly_all_images_and_spread_ones_do_not() -> None:
    model, x = fresh("basic", ("layer",)), images(64)
    assert logits(model, x)["layer_gates.fc"].std() < 0.1
    assert len(decide(model, x).layer_keep.unique(dim=0)) <= 2
    spread_gates(model, x)
    found = decide(model, x)
    assert 0.9 < found.layer_keep.double().mean() < 1
    assert len(found.layer_keep.unique(dim=0)) > 2


def test_other_images_are_told_apart_too() -> None:
    model = fresh("basic", ("layer",))
    spread_gates(model, images(64))
    other = logits(model, images(64, seed=5))["layer_gates.fc"]
    assert 0.6 < other.std() < 1.5


@pytest.mark.parametrize("kind", FEW)
def test_only_linear_layers_of_layer_gates_change(kind: str) -> None:
    model, x = fresh(kind, ("layer", "channel"), "ff1"), images(16)
    decide(model, x)  # counts the cost table
    model.train()
    model.bn1.eval() if hasattr(model, "bn1") else None
    td.set_execution(model, "masked")
    before = state_of(model)
    spread_gates(model, x)
    after = state_of(model)
    linear = {
        f"{name}.{leaf}"
        for name, module in model.named_modules()
        for leaf in ("weight", "bias")
        if isinstance(module, nn.Linear) and "layer_gates" in name
    }
    changed = {key for key, value in before["values"].items() if not torch.equal(value, after["values"][key])}
    assert changed
    assert changed <= linear
    for state in (before, after):
        state["values"] = {key: value for key, value in state["values"].items() if key not in linear}
    assert_same_state(after, before)


@pytest.mark.parametrize("kind", FEW)
def test_open_gates_stay_open(kind: str) -> None:
    """What they see is scaled all the same."""
    model, x = add(stock(kind), ("layer", "channel")), images(16)
    key = next(iter(model.layer_gates.project))
    before = model.layer_gates.project[key].weight.clone()
    spread_gates(model, x)
    assert torch.equal(decide(model, x).logits, stock(kind)(x))
    assert not torch.equal(model.layer_gates.project[key].weight, before)


def test_a_gradient_in_one_step_moves_what_looks_at_the_image() -> None:
    """Beside the bias, which is the same for all images, the weights learn faster than in gates as they are drawn."""
    ratio = []
    for spread in (False, True):
        model, x = fresh("basic", ("layer",)), images(64)
        if spread:
            spread_gates(model, x)
        td.set_execution(model, "masked").train()
        prob = td.decide(model, x).layer_prob
        (prob * torch.randn(prob.shape, generator=torch.Generator().manual_seed(1))).mean().backward()
        fc = model.layer_gates.fc
        ratio.append((fc.weight.grad.norm() / fc.bias.grad.norm()).item())
    assert ratio[1] > 1.5 * ratio[0]


def test_gates_of_settled_units_are_left_alone() -> None:
    model = td.shut_units(fresh("basic", ("layer",), "ff2"), ["layer1.1"])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    spread_gates(model, images(32), 1.0)
    moved = {name.split(".")[2] for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {str(place) for place in range(1, len(model.layer_gates))}


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="needs a model with layer gates"):
        spread_gates(dynamic("basic", ("channel", "exits")), images(16))
    model = fresh("basic", ("layer",))
    before = state_of(model)
    with pytest.raises(ValueError, match="at least 16 images; found 3"):
        spread_gates(model, images(3))
    with pytest.raises(ValueError, match="size must be"):
        spread_gates(model, images(16), 0.0)
    assert_same_state(state_of(model), before)
