"""Gates: what they compute, what they start as, and how channels are grouped."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from nets import LAYER_KINDS, MODES, assert_near, decide, dynamic, images, randomise, stock, undecided
from torch import Tensor, nn

import timm_dynamic as td
from timm_dynamic.channel_gates import group_sizes
from timm_dynamic.gates import (
    GateSite,
    gate_width,
    make_layer_gates,
    straight_through,
    widen,
)


def site(channels: int = 8, body: float | None = None, grows: bool = False, name: str = "layer1.1") -> GateSite:
    body = 2 * 9 * channels**2 if body is None else body
    return GateSite(name, channels, body, grows, (channels,), (1,), channels)


def normed(x: Tensor, n: Any) -> Tensor:
    """Batch norm in eval and ReLU, by hand."""
    shape = (1, -1, 1, 1)
    x = (x - n.running_mean.view(shape)) / (n.running_var.view(shape) + n.eps).sqrt()
    return (x * n.weight.view(shape) + n.bias.view(shape)).clamp(min=0)


# Straight through ----------------------------------------------------------------------------------------------------


def test_straight_through_is_hard_forward_and_soft_backward() -> None:
    prob = torch.tensor([0.0, 0.1, 0.4999999, 0.5, 0.7, 1.0, 1 / 3], requires_grad=True)
    keep = straight_through(prob)
    assert keep.tolist() == [0, 0, 0, 1, 1, 1, 0]
    weights = torch.arange(1.0, 8)
    (keep * weights).sum().backward()
    assert torch.equal(prob.grad, weights)


@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=20))
def test_straight_through_is_exactly_zero_or_one(values: list[float]) -> None:
    keep = straight_through(torch.tensor(values, requires_grad=True))
    assert keep.tolist() == [float(v >= 0.5) for v in values]


# Layer gates ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["ff1", "ff2", "linear"])
@torch.no_grad()
def test_feed_forward_gate_equals_one_written_by_hand(kind: str) -> None:
    gates = randomise(make_layer_gates(td.LayerGateConfig(kind, "random"), [site(6), site(6)])).eval()
    gate, x = gates.gates[1], torch.randn(4, 6, 11, 9)
    y = F.max_pool2d(x, 2, ceil_mode=True) if kind == "ff1" else x
    if kind != "linear":
        y = normed(F.conv2d(y, gate.conv1.weight, stride=1 if kind == "ff1" else 2, padding=1), gate.norm1)
    if kind == "ff1":
        y = normed(F.conv2d(y, gate.conv2.weight, stride=2, padding=1), gate.norm2)
    score = y.flatten(2).mean(2) @ gate.fc.weight[0] + gate.fc.bias
    prob, memory = gates(1, x, None)
    assert_near(prob, 1 / (1 + (-score).exp()))
    assert memory is None


@torch.no_grad()
def test_recurrent_gate_equals_an_lstm_over_the_units() -> None:
    channels = [6, 6, 12, 6]
    gates = make_layer_gates(td.LayerGateConfig("rnn", "random"), [site(c) for c in channels])
    assert sorted(gates.project) == ["12", "6"]  # one projection for each width
    lstm = nn.LSTM(10, 10)
    for name, value in gates.cell.named_parameters():
        getattr(lstm, f"{name}_l0").copy_(value)
    inputs = [torch.randn(3, c, 5, 5) for c in channels]
    sequence = torch.stack([gates.project[str(c)](x.mean((2, 3))) for c, x in zip(channels, inputs, strict=True)])
    wanted = torch.sigmoid(gates.fc(lstm(sequence)[0])).squeeze(2)  # the state starts at zero
    memory = None
    for i, x in enumerate(inputs):
        prob, memory = gates(i, x, memory)
        assert_near(prob, wanted[i])


def test_recurrent_gate_projects_each_dense_layer_by_itself() -> None:
    model = dynamic("dense", ["layer"])
    project = model.layer_gates.project
    assert len(project) == len(model.layer_gates) == 8
    assert [p.in_features for p in project.values()][:3] == [36, 24, 36]  # 24 and 12; the transition halves 48


def test_recurrent_state_starts_at_zero_in_each_forward() -> None:
    model = undecided("basic", ["layer"])
    first = decide(model, images(4))
    assert torch.equal(decide(model, images(4)).layer_prob, first.layer_prob)
    one = decide(model, images(4)[2:3])
    assert_near(one.layer_prob, first.layer_prob[2:3])


@pytest.mark.parametrize("kind", LAYER_KINDS)
def test_open_gates_keep_for_every_input(kind: str) -> None:
    model = dynamic("basic", ["layer", "channel"], layer=td.LayerGateConfig(kind))
    for x in (images(4), torch.zeros(2, 3, 40, 40), 1e4 * images(4), -1e4 * images(2)):
        decisions = decide(model, x)
        assert decisions.layer_keep.all()
        assert all(keep.all() for keep in decisions.channel_keep)
        assert decisions.layer_prob.max() < 0.95  # and still have a gradient


@pytest.mark.parametrize("kind", LAYER_KINDS)
def test_random_gates_decide_between_images(kind: str) -> None:
    model = undecided("basic", ["layer"], layer=td.LayerGateConfig(kind, "random"))
    keep = decide(model, images(32)).layer_keep
    assert 0.1 < keep.float().mean() < 0.9
    assert (keep != keep[:1]).any()


def test_random_start_is_torchs_own() -> None:
    model = td.add_layer_gates(stock("basic"), td.LayerGateConfig("linear", "random"))
    assert all(gate.fc.weight.abs().min() > 0 for gate in model.layer_gates.gates)
    model = td.add_channel_gates(stock("basic"), td.ChannelGateConfig(init="random"))
    assert all(gate.fc.weight.abs().min() > 0 for gate in model.channel_gates.gates)


@pytest.mark.parametrize("kind", LAYER_KINDS)
@pytest.mark.parametrize("mode", ["weights", "autocast"])
@torch.no_grad()
def test_probabilities_are_float32_in_bfloat16(kind: str, mode: str) -> None:
    model = undecided("basic", ["layer", "channel"], layer=td.LayerGateConfig(kind))
    x = images(2)
    if mode == "weights":
        decisions = td.decide(model.bfloat16(), x.bfloat16())
    else:
        with torch.autocast("cpu", torch.bfloat16):
            decisions = td.decide(model, x)
    assert decisions.layer_prob.dtype == torch.float32
    assert not torch.equal(decisions.layer_prob, decisions.layer_prob.bfloat16().float())


@pytest.mark.parametrize("kind", ["ff1", "ff2"])
def test_feed_forward_width_is_the_inputs_where_the_share_is_the_papers(kind: str) -> None:
    assert gate_width(kind, site(64)) == 64  # BasicBlock: 15.6 % and 12.5 %
    assert gate_width(kind, site(64, body=(9 * 64 * 128 + 9 * 128**2) / 4)) == 64  # a stage change: 20.8 %


@pytest.mark.parametrize(("kind", "target"), [("ff1", 0.15625), ("ff2", 0.125)])
def test_feed_forward_width_is_narrow_in_a_bottleneck(kind: str, target: float) -> None:
    body = 256 * 64 + 9 * 64**2 + 64 * 256
    width = gate_width(kind, site(256, body=body))
    first = 9 / 16 * 4 if kind == "ff2" else 9 / 4
    macs = first * 256 * width + (9 / 16 * width**2 if kind == "ff1" else 0)
    assert 0.8 * target < macs / body < 1.2 * target
    assert gate_width(kind, site(256, body=1.0)) == 1


def test_feed_forward_width_can_be_given() -> None:
    model = td.add_layer_gates(stock("bottleneck"), td.LayerGateConfig("ff1", width=5))
    assert {g.conv1.out_channels for g in model.layer_gates.gates} == {5}
    assert {g.conv2.out_channels for g in model.layer_gates.gates} == {5}


# Channel gates -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("width", "size", "align", "wanted"),
    [
        (64, 16, 1, (16, 16, 16, 16)),
        (40, 16, 1, (16, 16, 8)),
        (8, 16, 1, (8,)),
        (48, 16, 6, (18, 18, 12)),
        (3, 1, 1, (1, 1, 1)),
        (64, 16, 32, (32, 32)),
        (64, 16, 64, (64,)),
    ],
)
def test_independent_groups(width: int, size: int, align: int, wanted: tuple[int, ...]) -> None:
    assert group_sizes(td.ChannelGateConfig(size), width, align) == wanted


@pytest.mark.parametrize(
    ("width", "levels", "align", "wanted"),
    [(64, 4, 1, (16,) * 4), (10, 4, 1, (3, 3, 3, 1)), (3, 4, 1, (1, 1, 1)), (64, 4, 32, (32, 32)), (12, 1, 1, (12,))],
)
def test_nested_groups(width: int, levels: int, align: int, wanted: tuple[int, ...]) -> None:
    assert group_sizes(td.ChannelGateConfig(mode="nested", levels=levels), width, align) == wanted


@given(st.integers(1, 64), st.integers(1, 64), st.integers(1, 80), st.sampled_from(MODES), st.integers(1, 9))
def test_groups_cover_the_width(parts: int, align: int, size: int, mode: str, levels: int) -> None:
    width = parts * align
    sizes = group_sizes(td.ChannelGateConfig(size, mode, levels=levels), width, align)
    assert sum(sizes) == width
    assert all(n > 0 and n % align == 0 for n in sizes)
    assert len(set(sizes[:-1])) <= 1
    assert sizes[-1] <= sizes[0]
    assert mode == "independent" or len(sizes) <= levels


@pytest.mark.parametrize("sizes", [(2, 2, 2), (2, 2, 1), (4,)])
def test_widen_repeats_groups(sizes: tuple[int, ...]) -> None:
    keep = torch.rand(3, len(sizes)) < 0.5
    wanted = [[bool(k) for k, n in zip(row, sizes, strict=True) for _ in range(n)] for row in keep]
    assert widen(keep, sizes).tolist() == wanted


@torch.no_grad()
def test_pooled_channel_gate_equals_one_written_by_hand() -> None:
    model = undecided("bottleneck", ["channel"])
    gates, x = model.channel_gates, torch.randn(3, 64, 7, 7)
    gate = gates.gates[0]
    hidden = F.relu(F.linear(x.mean((2, 3)), gate.fc1.weight, gate.fc1.bias))
    wanted = torch.sigmoid(F.linear(hidden, gate.fc.weight, gate.fc.bias))
    found = gates(0, x)
    assert [p.shape for p in found] == [(3, 1), (3, 1)]  # 16 channels in each of the two hidden widths
    assert_near(torch.cat(found, 1), wanted)


@torch.no_grad()
def test_dense_channel_gate_is_a_narrow_copy_of_the_layer() -> None:
    model = undecided("dense", ["channel"])
    gates, x = model.channel_gates, torch.randn(3, 36, 9, 9)
    gate, layer = gates.gates[0], model.features.denseblock1.denselayer2
    assert gate.conv1.weight.shape == (layer.conv1.out_channels // 2, 36, 1, 1)
    assert gate.conv2.weight.shape == (12, 24, 3, 3)
    y = F.conv2d(normed(x, gate.norm1), gate.conv1.weight, stride=2)
    y = F.conv2d(normed(y, gate.norm2), gate.conv2.weight, padding=1)
    wanted = torch.sigmoid(F.linear(y.mean((2, 3)), gate.fc.weight, gate.fc.bias))
    assert_near(torch.cat(gates(0, x), 1), wanted)


@pytest.mark.parametrize("kind", ["basic", "bottleneck", "dense"])
def test_nested_keeps_are_always_the_first_groups(kind: str) -> None:
    model = undecided(kind, ["channel"], channel=td.ChannelGateConfig(mode="nested", levels=4))
    keeps = decide(model, images(32)).channel_keep
    assert all(torch.equal(keep, keep.sort(dim=1, descending=True).values) for keep in keeps)
    assert len({int(n) for keep in keeps for n in keep.sum(1)}) == 5  # all widths from none to all occur


@pytest.mark.parametrize("levels", [1, 4, 16])
def test_open_nested_gates_keep_their_deepest_group(levels: int) -> None:
    model = dynamic("bottleneck", ["channel"], channel=td.ChannelGateConfig(mode="nested", levels=levels))
    assert all(keep.all() for keep in decide(model, images(4)).channel_keep)
