"""One unit, run three ways, against blocks written out by hand."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nets import KINDS, MODES, assert_near, dynamic, images, masked, mixed, randomise, stock
from timm.layers import BlurPool2d
from torch import Tensor, nn

import timm_dynamic as td
from timm_dynamic import families, units
from timm_dynamic.gates import pooled


def normed(x: Tensor, n: Any) -> Tensor:
    """Batch norm in eval, by hand."""
    shape = (1, -1, 1, 1)
    x = (x - n.running_mean.view(shape)) / (n.running_var.view(shape) + n.eps).sqrt()
    return x * n.weight.view(shape) + n.bias.view(shape)


def conv(x: Tensor, c: nn.Conv2d) -> Tensor:
    return F.conv2d(x, c.weight, None, c.stride, c.padding, groups=c.groups)


def masks(keeps: list[Tensor], i: int) -> Tensor:
    """Keeps of channels [B, channels] as numbers to multiply feature maps with."""
    return keeps[i].float()[:, :, None, None]


def short(b: Any, x: Tensor) -> Tensor:
    return x if b.downsample is None else normed(conv(x, b.downsample[0]), b.downsample[1])


def basic(b: Any, x: Tensor, keeps: list[Tensor]) -> Tensor:
    y = normed(conv(x, b.conv1), b.bn1).clamp(min=0) * masks(keeps, 0)
    return (normed(conv(y, b.conv2), b.bn2) + short(b, x)).clamp(min=0)


def bottleneck(b: Any, x: Tensor, keeps: list[Tensor]) -> Tensor:
    y = normed(conv(x, b.conv1), b.bn1).clamp(min=0) * masks(keeps, 0)
    y = normed(conv(y, b.conv2), b.bn2).clamp(min=0) * masks(keeps, 1)
    return (normed(conv(y, b.conv3), b.bn3) + short(b, x)).clamp(min=0)


def dense(b: Any, x: Tensor, keeps: list[Tensor]) -> Tensor:
    y = conv(normed(x, b.norm1).clamp(min=0), b.conv1)
    return conv(normed(y, b.norm2).clamp(min=0) * masks(keeps, 0), b.conv2)


BLOCKS: dict[str, Callable[[Any, Tensor, list[Tensor]], Tensor]] = {
    "basic": basic,
    "cifar": basic,
    "tv_basic": basic,
    "bottleneck": bottleneck,
    "grouped": bottleneck,
    "tv_bottleneck": bottleneck,
    "dense": dense,
    "cifar_dense": dense,
    "tv_dense": dense,
}


def some_units(kind: str) -> list[families.Unit]:
    """A unit without and, in ResNets, one with a downsample that halves the resolution."""
    found = families.units(stock(kind))
    wanted = [found[1]]
    if not found[0].kind.grows:
        wanted.append(next(u for u in found[1:] if u.module.downsample is not None and u.stage > 0))
    return wanted


def inputs(unit: families.Unit, batch: int = 4) -> Tensor:
    """What a unit may meet: not negative, as behind a ReLU. [B, C, 7, 7]."""
    return torch.rand(batch, unit.kind.steps(unit.module)[0][0].in_channels, 7, 7)


def channel_keeps(unit: families.Unit, batch: int, ratio: float = 0.5) -> list[Tensor]:
    """Random keeps of groups of channels, whole groups of grouped convolutions and norms. [B, channels] each."""
    steps = unit.kind.steps(unit.module)
    parts = max([c.groups for c, _ in steps] + [32 for _, after in steps for m in after if isinstance(m, nn.GroupNorm)])
    keeps = []
    for c, _ in steps[:-1]:
        size = c.out_channels // parts if parts > 1 else 4
        keeps.append((torch.rand(batch, c.out_channels // size) < ratio).repeat_interleave(size, 1))
    return keeps


def by_hand(kind: str, unit: families.Unit, x: Tensor, keep: Tensor, keeps: list[Tensor]) -> Tensor:
    """keep * unit(x) + (1 - keep) * rest(x) (SkipNet, eq. 1), image by image."""
    outputs = []
    for i, runs in enumerate(keep.tolist()):
        y = BLOCKS[kind](unit.module, x[i : i + 1], [k[i : i + 1] for k in keeps])
        if not runs:
            y = torch.zeros_like(y) if unit.kind.grows else short(unit.module, x[i : i + 1]).clamp(min=0)
        outputs.append(y)
    return torch.cat(outputs)


def given(keeps: list[Tensor]) -> Callable[[Tensor, Tensor | None], list[Tensor]]:
    """What asks for the channels of the images that run, as `run_skipping` wants it."""
    return lambda x, places: keeps if places is None else [k[places] for k in keeps]


def every_channel(x: Tensor, places: Tensor | None) -> None:
    """No channel gate."""


KEEPS = [[1, 0, 1, 1], [0, 0, 0, 0], [1, 1, 1, 1]]


@pytest.mark.parametrize("keep", KEEPS, ids=["mixed", "closed", "open"])
@pytest.mark.parametrize("kind", BLOCKS)
@torch.no_grad()
def test_both_executions_equal_the_unit_written_by_hand(kind: str, keep: list[int]) -> None:
    decided = torch.tensor(keep).bool()
    for unit in some_units(kind):
        x, keeps = inputs(unit), channel_keeps(unit, 4)
        wanted = by_hand(kind, unit, x, decided, keeps)
        before = x.clone()
        assert_near(units.run_masked(unit, x, decided.float(), keeps), wanted)
        assert torch.equal(x, before)  # exits and the next unit still need it
        assert_near(units.run_skipping(unit, x, decided, given(keeps)), wanted)
        assert torch.equal(x, before)


@pytest.mark.parametrize("kind", BLOCKS)
@torch.no_grad()
def test_all_open_is_the_stock_block_bit_for_bit(kind: str) -> None:
    for unit in some_units(kind):
        x, everything = inputs(unit), [torch.ones_like(k) for k in channel_keeps(unit, 4)]
        wanted = unit.module(x.clone())
        assert torch.equal(units.run_dense(unit, x), wanted)
        assert torch.equal(units.run_masked(unit, x, torch.ones(4), everything), wanted)
        assert torch.equal(units.run_skipping(unit, x, torch.ones(4).bool(), given(everything)), wanted)


@pytest.mark.parametrize("ratio", [0.0, 0.5], ids=["no channels", "some channels"])
@pytest.mark.parametrize("batch", [1, 6])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_sliced_channels_equal_masked_channels(kind: str, batch: int, ratio: float) -> None:
    for unit in some_units(kind):
        x, keeps = inputs(unit, batch), channel_keeps(unit, batch, ratio)
        if batch > 1 and ratio:
            keeps[0][0], keeps[-1][1] = False, False  # one image without the first hidden width, one without the last
        found = units.run_skipping(unit, x, None, given(keeps))
        assert_near(found, units.run_masked(unit, x, None, keeps))
        assert ratio == 0.5 or not torch.equal(found, units.run_dense(unit, x))


@pytest.mark.parametrize("kind", ["bottleneck", "grouped", "dense"])
@torch.no_grad()
def test_sliced_convolutions_keep_their_bias(kind: str) -> None:
    unit = some_units(kind)[0]
    for c, _ in unit.kind.steps(unit.module):
        c.bias = nn.Parameter(torch.randn(c.out_channels))
    for ratio in (0.0, 0.5):
        keeps = channel_keeps(unit, 4, ratio)
        x = inputs(unit)
        found = units.run_skipping(unit, x, None, given(keeps))
        assert_near(found, units.run_masked(unit, x, None, keeps))


@pytest.mark.parametrize(
    "module",
    [
        nn.BatchNorm2d(12),
        nn.BatchNorm2d(12, affine=False),
        nn.GroupNorm(3, 12),
        BlurPool2d(12, stride=2),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Identity(),
    ],
    ids=lambda m: type(m).__name__,
)
@pytest.mark.parametrize("index", [[], [0, 1, 2, 3], [4, 5, 6, 7, 8, 9, 10, 11], list(range(12))])
@torch.no_grad()
def test_modules_run_on_some_channels(module: nn.Module, index: list[int]) -> None:
    module = randomise(module).eval()
    x, places = torch.randn(2, 12, 9, 7), torch.tensor(index, dtype=torch.long)
    assert families.channelwise(module)
    assert_near(families.run_slice(module, x[:, places], places), module(x)[:, places])


def test_modules_that_mix_channels_are_not_channelwise() -> None:
    for module in (nn.Conv2d(4, 4, 1), nn.PReLU(4), nn.Sequential(nn.Conv2d(4, 4, 1))):
        assert not families.channelwise(module)


# The resting unit ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_skipped_unit_gives_its_input_where_nothing_is_downsampled() -> None:
    plain, _ = some_units("basic")
    x, closed = inputs(plain), torch.zeros(4).bool()
    assert torch.equal(units.run_masked(plain, x, closed.float(), None), x)
    assert torch.equal(units.run_skipping(plain, x, closed, every_channel), x)


@torch.no_grad()
def test_an_activation_that_is_not_idempotent_is_applied_at_rest() -> None:
    unit, _ = some_units("basic")
    unit.module.act2 = nn.SiLU()
    x = torch.randn_like(inputs(unit))
    closed = torch.zeros(4).bool()
    for found in (
        units.run_masked(unit, x, closed.float(), None),
        units.run_skipping(unit, x, closed, every_channel),
    ):
        assert_near(found, x * torch.sigmoid(x))


# What is run, and how ------------------------------------------------------------------------------------------------


def counted(module: nn.Module) -> list[Tensor]:
    """Inputs that a module is given from now on."""
    seen: list[Tensor] = []
    module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    return seen


@pytest.mark.parametrize(("keep", "batches"), [([0, 0, 0, 0], []), ([1, 0, 1, 0], [2]), ([1, 1, 1, 1], [4])])
@torch.no_grad()
def test_skipping_runs_the_branch_on_the_images_that_keep_it(keep: list[int], batches: list[int]) -> None:
    for unit in some_units("bottleneck"):
        seen = counted(unit.module.conv2)
        x = inputs(unit)
        units.run_skipping(unit, x, torch.tensor(keep).bool(), every_channel)
        assert [len(s) for s in seen] == batches


@pytest.mark.parametrize("run", ["masked", "skip"])
@torch.no_grad()
def test_the_downsample_runs_once(run: str) -> None:
    model = dynamic("bottleneck")
    seen = {name: counted(m) for name, m in model.named_modules() if name.endswith("downsample")}
    td.set_execution(model, run)
    with td.force(model, **mixed(model, 4)):
        model(images(4))
    assert {name: [len(x) for x in xs] for name, xs in seen.items()} == {name: [4] for name in seen}


@torch.no_grad()
def test_one_run_for_each_distinct_pattern_of_channels() -> None:
    unit, _ = some_units("bottleneck")
    runs = counted(unit.module.bn3)
    pattern = [(torch.arange(c.out_channels) % 16 < 8) for c, _ in unit.kind.steps(unit.module)[:-1]]
    keeps = [torch.stack([p, ~p, p, ~p]) for p in pattern]
    units.run_skipping(unit, inputs(unit), None, given(keeps))
    assert sorted(len(x) for x in runs) == [2, 2]


@pytest.mark.parametrize("kind", ["basic", "bottleneck", "dense", "tv_bottleneck"])
@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_channels_last_stays_so(kind: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gather that goes back to NCHW eats all that skipping gains."""
    model = dynamic(kind, channel=td.ChannelGateConfig(8, mode)).to(memory_format=torch.channels_last)
    x = images(6).contiguous(memory_format=torch.channels_last)
    seen: list[Tensor] = []

    def conv2d(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.append(x)
        return real(x, *args, **kwargs)

    real = F.conv2d
    with td.force(model, **mixed(model, 6)):
        with masked(model):
            wanted = model(x)
        monkeypatch.setattr(F, "conv2d", conv2d)
        assert_near(model(x), wanted)
    maps = [m for m in seen if m.shape[1] > 1 and m.shape[2] * m.shape[3] > 1]  # others are both layouts at once
    assert len(maps) > 20
    wrong = [tuple(m.shape) for m in maps if not m.is_contiguous(memory_format=torch.channels_last)]
    assert wrong == []


@pytest.mark.parametrize("gate", [[1.0, 0.0, 1.0], [1.0, 1.0, 1.0], [0.3, 1.0, 0.0]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mixing_has_the_gradient_of_its_formula(gate: list[float], dtype: torch.dtype) -> None:
    rested, y, weight = (torch.randn(3, 4, 5, 5, dtype=dtype).to(memory_format=torch.channels_last) for _ in range(3))
    leaves = [rested.requires_grad_(), y.requires_grad_(), torch.tensor(gate, dtype=dtype, requires_grad=True)]
    column = leaves[2][:, None, None, None]
    found, wanted = units._mix(rested, y, column, True), column * y + (1 - column) * rested
    torch.testing.assert_close(found, wanted)
    if set(gate) <= {0.0, 1.0}:
        assert torch.equal(found, wanted)
    given = torch.autograd.grad((found * weight).sum(), leaves, allow_unused=True)
    for one, other in zip(given, torch.autograd.grad((wanted * weight).sum(), leaves), strict=True):
        torch.testing.assert_close(torch.zeros_like(other) if one is None else one, other)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_gathered_images_keep_their_layout(layout: torch.memory_format) -> None:
    x, places = torch.randn(6, 4, 5, 5).to(memory_format=layout), torch.tensor([0, 3, 5])
    found = units.gathered(x, places)
    assert torch.equal(found, x[places])
    assert found.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_the_gradient_of_the_pool_has_the_layout_of_its_input(layout: torch.memory_format) -> None:
    x = torch.randn(2, 4, 5, 5).to(memory_format=layout).requires_grad_()
    found = pooled(x)
    assert torch.equal(found, x.mean((2, 3)))
    (grad,) = torch.autograd.grad(found.square().sum(), x)
    (wanted,) = torch.autograd.grad(x.mean((2, 3)).square().sum(), x)
    assert torch.equal(grad, wanted)
    assert grad.is_contiguous(memory_format=layout)
