"""`force`: what is decided instead of the gates, and what is refused."""

import copy
from typing import Any

import pytest
import timm
import torch
from nets import (
    FEW,
    KINDS,
    assert_near,
    decide,
    dynamic,
    groups_of,
    images,
    masked,
    mixed,
    run,
    undecided,
    units_of,
)
from torch import Tensor

import timm_dynamic as td
from timm_dynamic import surgery
from timm_dynamic.tasks import BaseTask


def test_force_gives_what_was_asked() -> None:
    model = undecided("bottleneck")
    forced = mixed(model, 6)
    leave = torch.tensor([3, 3, 3, 3, 3, 3])
    with td.force(model, **forced, exit=leave) as found:
        assert found is model
        decisions = decide(model, images(6))
    assert torch.equal(decisions.layer_keep, forced["layer_keep"])
    assert torch.equal(decisions.exit_index, leave)
    floats = {"layer_keep": forced["layer_keep"].float(), "channel_keep": [k.int() for k in forced["channel_keep"]]}
    with td.force(model, **floats):
        again = decide(model, images(6))
    assert torch.equal(again.layer_keep, forced["layer_keep"])
    assert torch.equal(again.macs, decisions.macs)


def test_what_is_not_forced_is_decided() -> None:
    model = undecided("basic")
    own = decide(model, images(8))
    with td.force(model, channel_keep=1.0):
        decisions = decide(model, images(8))
    assert torch.equal(decisions.layer_keep[:, 0], own.layer_keep[:, 0])
    with td.force(model):
        assert torch.equal(decide(model, images(8)).macs, own.macs)


@pytest.mark.parametrize("kind", FEW)
def test_ratios_are_drawn_anew_from_torchs_generator(kind: str) -> None:
    model = dynamic(kind, channel=td.ChannelGateConfig(8))
    with td.force(model, layer_keep=0.5, channel_keep=0.5):
        torch.manual_seed(5)
        first, second = decide(model, images(8)), decide(model, images(8))
        torch.manual_seed(5)
        again = decide(model, images(8))
    assert not torch.equal(first.layer_keep, second.layer_keep)
    assert torch.equal(first.layer_keep, again.layer_keep)
    assert all(torch.equal(a, b) for a, b in zip(first.channel_keep, again.channel_keep, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(first.channel_keep, second.channel_keep, strict=True))


def test_ratios_are_met_on_average() -> None:
    model = dynamic("basic", ["layer", "channel"], channel=td.ChannelGateConfig(4))
    with td.force(model, layer_keep=0.3), torch.no_grad():
        keep = decide(model, images(200, 32)).layer_keep.float()
    assert keep.mean().item() == pytest.approx(0.3, abs=0.05)  # 1400 draws: 4 standard deviations
    assert (keep.mean(0) - 0.3).abs().max() < 0.15
    with td.force(model, channel_keep=0.7):
        keeps = torch.cat(decide(model, images(32, 32)).channel_keep, 1).float()
    assert keeps.mean().item() == pytest.approx(0.7, abs=0.05)


def test_nested_ratios_keep_the_first_groups() -> None:
    model = dynamic("bottleneck", channel=td.ChannelGateConfig(mode="nested"))
    with td.force(model, channel_keep=0.5):
        keeps = decide(model, images(8)).channel_keep
    assert all(torch.equal(keep, keep.sort(dim=1, descending=True).values) for keep in keeps)
    assert len({int(n) for keep in keeps for n in keep.sum(1)}) > 2


@pytest.mark.parametrize("kind", FEW)
def test_forced_gates_are_still_run_and_counted(kind: str) -> None:
    model = undecided(kind)
    x = images(4)
    own = decide(model, x)
    with td.force(model, layer_keep=own.layer_keep, channel_keep=own.channel_keep):
        forced = decide(model, x)
        assert run(model, x)[1] == own.macs.sum()
    assert torch.equal(forced.macs, own.macs)
    assert torch.equal(forced.logits, own.logits)
    assert_near(forced.layer_prob, own.layer_prob)  # what the gates said, not what was forced


def test_force_in_training_gives_gates_a_gradient_of_zero() -> None:
    model = dynamic("basic").train()
    forced = mixed(model, 4)
    with td.force(model, **forced):
        decisions = td.decide(model, images(4))
    assert torch.equal(decisions.layer_keep, forced["layer_keep"].float())
    decisions.logits.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.layer_gates.parameters())


def test_forced_is_restored() -> None:
    model = dynamic("basic")
    with pytest.raises(ZeroDivisionError), td.force(model, layer_keep=0.0):
        raise ZeroDivisionError
    assert model.dynamic.forced is None
    with td.force(model, layer_keep=0.0):
        with td.force(model, layer_keep=1.0):
            assert decide(model, images(2)).layer_keep.all()
        assert not decide(model, images(2)).layer_keep.any()
    assert decide(model, images(2)).layer_keep.all()


def test_an_error_in_the_forward_restores_it_too() -> None:
    model = dynamic("basic")
    with pytest.raises(ValueError, match="layer_keep"), td.force(model, layer_keep=torch.ones(3, 7)):
        decide(model, images(2))
    assert model.dynamic.forced is None
    decide(model, images(2))


FORCED_WRONG: list[tuple[dict[str, Any], str]] = [
    ({"layer_keep": 1.5}, "layer_keep must be a number in 0..1; found 1.5"),
    ({"layer_keep": -0.1}, "layer_keep.*0..1; found -0.1"),
    ({"layer_keep": float("nan")}, "layer_keep.*0..1; found nan"),
    ({"layer_keep": True}, "layer_keep.*found True"),
    ({"layer_keep": "half"}, "layer_keep.*found 'half'"),
    ({"layer_keep": torch.ones(7)}, r"layer_keep must have shape \[batch, 7\]; found \[7\]"),
    ({"layer_keep": torch.ones(2, 6)}, r"\[batch, 7\]; found \[2, 6\]"),
    ({"layer_keep": torch.full((2, 7), 0.5)}, "layer_keep must hold 0 and 1 only"),
    ({"layer_keep": torch.full((2, 7), float("nan"))}, "0 and 1 only"),
    ({"channel_keep": 2.0}, "channel_keep must be a number in 0..1; found 2.0"),
    ({"channel_keep": torch.ones(2, 7)}, "a list of 7 tensors; found Tensor"),
    ({"channel_keep": [torch.ones(2, 1)]}, "a list of 7 tensors; found 1"),
    ({"channel_keep": [0.5] * 7}, r"channel_keep\[0\] must be a tensor \[batch, 1\]; found float"),
    ({"channel_keep": [torch.ones(2, 9)] * 7}, r"channel_keep\[0\] must have shape \[batch, 1\]; found \[2, 9\]"),
    ({"channel_keep": "all"}, "channel_keep.*found"),
    ({"exit": 4}, "exit must be in 0..3; found 4"),
    ({"exit": -1}, "exit must be in 0..3; found -1"),
    ({"exit": 1.0}, "exit must be an int.*found 1.0"),
    ({"exit": True}, "exit must be an int.*found True"),
    ({"exit": "head"}, "exit must be an int.*found 'head'"),
    ({"exit": torch.zeros(2, 2).long()}, "exit must be an int"),
    ({"exit": torch.tensor([0, 9])}, r"exit must be in 0..3; found \[0, 9\]"),
]


@pytest.mark.parametrize(("forced", "message"), FORCED_WRONG)
def test_forcing_wrong_values(forced: dict[str, Any], message: str) -> None:
    model = dynamic("basic")
    with pytest.raises(ValueError, match=message), td.force(model, **forced):
        raise AssertionError("entered")
    assert model.dynamic.forced is None


@pytest.mark.parametrize(
    ("parts", "forced", "lacks"),
    [
        (["channel"], {"layer_keep": 0.5}, "layer_gates"),
        (["layer"], {"channel_keep": 0.5}, "channel_gates"),
        (["layer", "channel"], {"exit": 0}, "exits"),
    ],
)
def test_forcing_what_the_model_lacks(parts: list[str], forced: dict[str, Any], lacks: str) -> None:
    with (
        pytest.raises(ValueError, match=f"needs a model with {lacks}; 'resnet18' has none"),
        td.force(dynamic("basic", parts), **forced),
    ):
        raise AssertionError("entered")


@pytest.mark.parametrize("execution", ["skip", "masked"])
@pytest.mark.parametrize("what", ["layer_keep", "channel_keep", "exit"])
def test_forcing_another_batch_than_comes(what: str, execution: str) -> None:
    model = td.set_execution(dynamic("basic"), execution)
    values: dict[str, Tensor | list[Tensor]] = {**mixed(model, 3), "exit": torch.tensor([0, 1, 2])}
    with td.force(model, **{what: values[what]}), pytest.raises(ValueError, match=f"{what}.*2.*found.*3"):
        decide(model, images(2))


def test_helpers_see_all_parts() -> None:
    """The tests above would prove little on a model without groups or units."""
    for kind in KINDS:
        model = dynamic(kind)
        assert units_of(model) >= 5
        assert len(groups_of(model)) >= 5
        with masked(model), td.force(model, **mixed(model, 2)):
            assert not decide(model, images(2)).layer_keep.all()


# For good ------------------------------------------------------------------------------------------------------------


def test_one_row_is_for_all_images() -> None:
    model = undecided("basic", ("layer",))
    row = torch.tensor([[1, 0, 1, 1, 0, 1, 0]])
    with td.force(model, layer_keep=row):
        assert torch.equal(decide(model, images(4)).layer_keep, row.bool().expand(4, -1))


def test_a_policy_is_held_in_training_and_saved_for_eval(tmp_path: Any) -> None:
    model = timm.create_model("iadi_resnet20_cifar", layer_gates="rnn")
    groups = sum(groups_of(model))
    layers, channels = "01101101", "".join("01"[i % 3 > 0] for i in range(groups))
    surgery.set_policy(model, layers, channels)
    x = torch.randn(3, 3, 32, 32)
    td.save_pretrained(model, tmp_path)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    for found in (td.decide(model.train(), x), td.decide(again, x)):
        assert "".join(str(int(keep)) for keep in found.layer_keep[0].tolist()) == layers
        ran = [keep[0] for keep in found.channel_keep]
        wanted = torch.tensor([digit == "1" for digit in channels]).split(groups_of(model))
        for unit, (keep, own) in enumerate(zip(ran, wanted, strict=True)):
            assert torch.equal(keep.bool(), own & (layers[unit] == "1"))
    for odd in (("0110", channels), (layers, channels[:-1]), (layers, ""), ("0110110x", channels)):
        with pytest.raises(ValueError, match="zeros and ones; found"):
            surgery.set_policy(model, *odd)


@pytest.mark.parametrize("name", ["skipnet_resnet20_cifar", "skipnet_densenet40_cifar"])
def test_units_that_a_policy_shuts_are_not_computed_in_training(name: str) -> None:
    torch.manual_seed(0)
    computed = timm.create_model(name).double().train()
    units = len(computed.layer_gates)
    row = torch.tensor([[unit % 3 != 1 for unit in range(units)]])
    left_out = copy.deepcopy(computed)
    surgery.set_policy(left_out, "".join(str(int(keep)) for keep in row[0]))
    x, y = torch.randn(4, 3, 32, 32).double(), torch.arange(4)
    ran: list[str] = []
    for part, module in left_out.named_modules():
        if part.endswith("conv2"):
            module.register_forward_hook(lambda *_, part=part: ran.append(part))
    losses = [BaseTask(left_out)(x, y)["loss"]]
    with td.force(computed, layer_keep=row):
        losses.append(BaseTask(computed)(x, y)["loss"])
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(*losses)
    assert len(ran) == 1 + int(row.sum())  # the first unit has no gate
    for (part, one), other in zip(left_out.named_parameters(), computed.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, msg=part)


def test_units_dropped_at_random_for_good() -> None:
    model = undecided("cifar", ("layer",))
    surgery.force_always(model, 0.5)
    first, second = decide(model, images(16)).layer_keep, decide(model, images(16)).layer_keep
    assert 0.3 < first.float().mean() < 0.7
    assert not torch.equal(first, second)
    with pytest.raises(ValueError, match=r"0\.\.1"):
        surgery.force_always(model, 1.5)
    with pytest.raises(ValueError, match="needs a model with layer_gates"):
        surgery.force_always(dynamic("cifar", ("exits",)), 0.5)
