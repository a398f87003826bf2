"""What the networks that can be made dynamic look like: stem, stages of units, head.

The only file, with `opaque`, that names classes of timm and torchvision. Modules are looked up at each call, so that
what a user does to a model (another batch norm, another head, a pruned stage) is seen.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import BlurPool2d
from timm.models import densenet as timm_densenet
from timm.models import resnet as timm_resnet
from torch import Tensor, nn
from torchvision.models import densenet as tv_densenet
from torchvision.models import resnet as tv_resnet

from . import opaque
from .cifar import CifarDenseNet, CifarResNet

TimmResNet = timm_resnet.ResNet
TimmDenseNet = timm_densenet.DenseNet
TorchvisionResNet = tv_resnet.ResNet
TorchvisionDenseNet = tv_densenet.DenseNet

After = tuple[nn.Module | None, ...]
Steps = tuple[tuple[nn.Conv2d, After], ...]


class Block(NamedTuple):
    """How a kind of unit is built."""

    grows: bool  # its output is appended to its input (dense layer); else it replaces it (residual block)
    before: Callable[[Any], After]  # what comes before the first convolution
    steps: Callable[[Any], Steps]  # each convolution with what follows it, channel by channel but for the last
    act: Callable[[Any], nn.Module]  # the activation after the shortcut is added
    width: Callable[[Any], int]  # channels of the output of the branch
    shortcut: Callable[[Any, Tensor], Tensor] = lambda b, x: x if b.downsample is None else b.downsample(x)
    dropout: Callable[[Any], float] = lambda b: 0.0
    branch: Callable[[Any, Tensor], Tensor] | None = None  # the branch as a whole, where it has no plain hidden width


class Unit(NamedTuple):
    """One skippable piece of a network."""

    module: Any
    kind: Block
    stage: int  # from 0
    last: bool  # of its stage
    name: str


# Blocks --------------------------------------------------------------------------------------------------------------


def _timm_basic(b: Any) -> Steps:
    return (b.conv1, (b.bn1, b.drop_block, b.act1, b.aa)), (b.conv2, (b.bn2, b.se, b.drop_path))


def _timm_bottleneck(b: Any) -> Steps:
    return (
        (b.conv1, (b.bn1, b.act1)),
        (b.conv2, (b.bn2, b.drop_block, b.act2, b.aa)),
        (b.conv3, (b.bn3, b.se, b.drop_path)),
    )


def _tv_basic(b: Any) -> Steps:
    return (b.conv1, (b.bn1, b.relu)), (b.conv2, (b.bn2,))


def _tv_bottleneck(b: Any) -> Steps:
    return (b.conv1, (b.bn1, b.relu)), (b.conv2, (b.bn2, b.relu)), (b.conv3, (b.bn3,))


def _residual(steps: Callable[[Any], Steps], act: Callable[[Any], nn.Module]) -> Block:
    return Block(False, lambda b: (), steps, act, lambda b: steps(b)[-1][0].out_channels)


def _dense(before: Callable[[Any], After], after: Callable[[Any], After]) -> Block:
    return Block(
        True,
        before,
        lambda b: ((b.conv1, after(b)), (b.conv2, ())),
        lambda b: nn.Identity(),
        lambda b: b.conv2.out_channels,
        lambda b, x: x,
        lambda b: b.drop_rate,
    )


def _opaque(
    branch: Callable[[Any, Tensor], Tensor], act: Callable[[Any], nn.Module], width: Callable[[Any], int]
) -> Block:
    return Block(False, lambda b: (), lambda b: (), act, width, branch=branch)


BLOCKS: dict[type, Block] = {
    timm_resnet.BasicBlock: _residual(_timm_basic, lambda b: b.act2),
    timm_resnet.Bottleneck: _residual(_timm_bottleneck, lambda b: b.act3),
    tv_resnet.BasicBlock: _residual(_tv_basic, lambda b: b.relu),
    tv_resnet.Bottleneck: _residual(_tv_bottleneck, lambda b: b.relu),
    timm_densenet.DenseLayer: _dense(lambda b: (b.norm1,), lambda b: (b.norm2,)),
    tv_densenet._DenseLayer: _dense(lambda b: (b.norm1, b.relu1), lambda b: (b.norm2, b.relu2)),
    opaque.RES2NET: _opaque(opaque.res2net_branch, lambda b: b.relu, lambda b: b.conv3.out_channels),
    opaque.RESNEST: _opaque(opaque.resnest_branch, lambda b: b.act3, lambda b: b.conv3.out_channels)._replace(
        shortcut=opaque.resnest_shortcut
    ),
    opaque.SK_BASIC: _opaque(opaque.sk_basic_branch, lambda b: b.act, lambda b: b.conv2.conv.out_channels),
    opaque.SK_BOTTLENECK: _opaque(opaque.sk_bottleneck_branch, lambda b: b.act, lambda b: b.conv3.conv.out_channels),
}


def rests_unchanged(act: nn.Module) -> bool:
    """Whether `act(x)` is `x` for an `x` that has been through it (or is not negative, for a ReLU)."""
    return isinstance(act, (nn.ReLU, nn.Identity))


# Networks ------------------------------------------------------------------------------------------------------------


class Family(NamedTuple):
    """How a kind of network is built."""

    stem: Callable[[nn.Module, Tensor], tuple[Tensor, Tensor]]  # -> timm's first feature level, the first unit's input
    stages: Callable[[nn.Module], list[tuple[str, list[tuple[str, nn.Module]]]]]
    leave: Callable[[nn.Module, int, Tensor], Tensor]  # what comes after a stage: transition, final norm
    glance: Callable[[nn.Module, int, Tensor], Tensor]  # the same to rounding, but pooled before it is multiplied
    head: Callable[[nn.Module, Tensor], Tensor]
    classifier: str


def _resnet_stages(model: Any) -> list[tuple[str, list[tuple[str, nn.Module]]]]:
    layers = [
        (name, layer) for name, layer in model.named_children() if name.startswith("layer") and name[5:].isdigit()
    ]
    stages = [(name, [(f"{name}.{i}", block) for i, block in layer.named_children()]) for name, layer in layers]
    return [stage for stage in stages if stage[1]]


def _timm_resnet_stem(model: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    x = model.act1(model.bn1(model.conv1(x)))
    return x, model.maxpool(x)


def _tv_resnet_stem(model: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    x = model.relu(model.bn1(model.conv1(x)))
    return x, model.maxpool(x)


def _tv_resnet_head(model: Any, x: Tensor) -> Tensor:
    return model.fc(torch.flatten(model.avgpool(x), 1))


def _is_dense(name: str) -> bool:
    return name.startswith("denseblock")


def _densenet_stages(model: Any) -> list[tuple[str, list[tuple[str, nn.Module]]]]:
    blocks = [(name, child) for name, child in model.features.named_children() if _is_dense(name)]
    return [
        (f"features.{name}", [(f"features.{name}.{n}", layer) for n, layer in block.items()]) for name, block in blocks
    ]


def _densenet_stem(model: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    tap = model.feature_info[0]["module"].split(".", 1)[1] if hasattr(model, "feature_info") else "relu0"
    seen = x
    for name, child in model.features.named_children():
        if _is_dense(name):
            break
        x = child(x)
        if name == tap:
            seen = x
    return seen, x


def _between(model: Any, stage: int) -> list[nn.Module]:
    """What stands in `features` between dense block `stage` and the next, or the end."""
    block, found = -1, []
    for name, child in model.features.named_children():
        if _is_dense(name):
            block += 1
        elif block == stage:
            found.append(child)
    return found


def _densenet_leave(model: Any, stage: int, x: Tensor) -> Tensor:
    for child in _between(model, stage):
        x = child(x)
    return x


def _densenet_glance(model: Any, stage: int, x: Tensor) -> Tensor:
    for child in _between(model, stage):
        parts = list(child) if isinstance(child, nn.Sequential) else [child]
        if len(parts) > 1 and commute(*parts[-2:]):
            parts[-2:] = parts[:-3:-1]
        for part in parts:
            x = part(x)
    return x


def commute(conv: Any, pool: Any) -> bool:
    """Whether an average over places can be taken before a convolution as well as after it, to rounding."""
    return (
        isinstance(conv, nn.Conv2d)
        and (conv.kernel_size, conv.stride, conv.padding) == ((1, 1), (1, 1), (0, 0))
        and isinstance(pool, nn.AvgPool2d)
        and pool.padding in (0, (0, 0))
        and pool.divisor_override is None
    )


def _tv_densenet_head(model: Any, x: Tensor) -> Tensor:
    x = F.relu(x, inplace=True)
    return model.classifier(torch.flatten(F.adaptive_avg_pool2d(x, (1, 1)), 1))


def _same(model: Any, stage: int, x: Tensor) -> Tensor:
    return x


def _timm_head(model: Any, x: Tensor) -> Tensor:
    return model.forward_head(x)


_RESNET = Family(_timm_resnet_stem, _resnet_stages, _same, _same, _timm_head, "fc")
_TV_RESNET = Family(_tv_resnet_stem, _resnet_stages, _same, _same, _tv_resnet_head, "fc")
_DENSENET = Family(_densenet_stem, _densenet_stages, _densenet_leave, _densenet_glance, _timm_head, "classifier")
_TV_DENSENET = _DENSENET._replace(head=_tv_densenet_head)

FAMILIES: dict[type, Family] = {
    TimmResNet: _RESNET,
    CifarResNet: _RESNET,
    TimmDenseNet: _DENSENET,
    CifarDenseNet: _DENSENET,
    TorchvisionResNet: _TV_RESNET,
    TorchvisionDenseNet: _TV_DENSENET,
}


def model_name(model: nn.Module) -> str:
    """The name a model was created by, else its class's."""
    cfg = getattr(model, "pretrained_cfg", None) or {}
    return cfg.get("architecture") or type(model).__name__.lower()


def family(model: nn.Module) -> Family:
    """The family of a model, stock or dynamic.

    Raises:
        ValueError: if it has no units to gate.
    """
    for cls in type(model).__mro__[:2]:  # the stock class, or the dynamic one made from it
        if cls in FAMILIES:
            return FAMILIES[cls]
    wrapped = next(
        (name for name in ("_orig_mod", "module") if isinstance(getattr(model, name, None), nn.Module)), None
    )
    raise ValueError(
        f"no units to gate in {model_name(model)!r}: a ResNet or DenseNet from timm or torchvision is needed"
        + (f"; found {type(model).__name__} around one: give its .{wrapped}" if wrapped else "")
    )


def units(model: nn.Module) -> list[Unit]:
    """All units of a network in running order.

    Raises:
        ValueError: if there are none, or if they are of a kind that cannot be gated.
    """
    found = []
    for stage, (_, blocks) in enumerate(family(model).stages(model)):
        for i, (name, module) in enumerate(blocks):
            kind = BLOCKS.get(type(module))
            if kind is None:
                raise ValueError(
                    f"no units to gate in {model_name(model)!r}: {name} is a {type(module).__name__}; wanted one of "
                    + ", ".join(sorted({cls.__name__ for cls in BLOCKS}))
                )
            found.append(Unit(module, kind, stage, i == len(blocks) - 1, name))
    return found


def channels_in(model: nn.Module) -> int:
    """Channels of an image, as the first convolution takes them."""
    return next((m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)), 3)


def classes(model: nn.Module) -> int:
    """Outputs of a network's classifier; 0 if it has none."""
    return getattr(classifier(model), "out_features", 0)


def classifier(model: nn.Module) -> nn.Module:
    """A network's classifier: a linear layer, unless it was taken off or replaced."""
    return model.get_submodule(family(model).classifier)


def channels_after(found: Sequence[Unit], i: int) -> int:
    """Channels that come out of unit `i` of a network, as the next unit or an exit sees them."""
    unit = found[i]
    width = unit.kind.width(unit.module)
    return unit.kind.steps(unit.module)[0][0].in_channels + width if unit.kind.grows else width


# Channel by channel --------------------------------------------------------------------------------------------------


def alignment(conv: nn.Conv2d, after: After) -> int:
    """How many of a convolution's output channels can only be dropped together (groups of a conv or of a norm)."""
    per_conv = conv.out_channels // conv.groups if conv.groups > 1 else 1
    norms = [m for m in after if isinstance(m, nn.GroupNorm)]
    per_norm = max((conv.out_channels // m.num_groups for m in norms), default=1)
    return math.lcm(per_conv, per_norm)


def channelwise(module: nn.Module | None) -> bool:
    """Whether `run_slice` can run the module on some of the channels."""
    if module is None or hasattr(module, "running_mean") or isinstance(module, (nn.GroupNorm, BlurPool2d)):
        return True
    return not list(module.parameters()) and not list(module.buffers())


def run_slice(module: Any, x: Tensor, index: Tensor) -> Tensor:
    """Run a module made for all channels on those in `index`. x: [B, len(index), H, W]; in eval only."""
    if len(index) == 0:
        return _run_on_none(module, x)
    if hasattr(module, "running_mean"):
        x = _batch_norm_slice(module, x, index)
    elif isinstance(module, nn.GroupNorm):
        x = _group_norm_slice(module, x, index)
    elif isinstance(module, BlurPool2d):
        x = F.pad(x, module.padding, mode=module.pad_mode)
        return F.conv2d(x, module.filt[: len(index)], stride=module.stride, groups=len(index))
    else:
        return module(x)
    for name in ("drop", "act"):  # timm's norms may hold the activation
        if isinstance(getattr(module, name, None), nn.Module):
            x = getattr(module, name)(x)
    return x


def _run_on_none(module: Any, x: Tensor) -> Tensor:
    """No channels in, no channels out; only the resolution may change. x: [B, 0, H, W]."""
    if isinstance(module, BlurPool2d):
        left, right, top, bottom = module.padding
        height, width = x.shape[2] + top + bottom - module.filt_size, x.shape[3] + left + right - module.filt_size
        return x.new_zeros(len(x), 0, height // module.stride + 1, width // module.stride + 1)
    if list(module.parameters()) or list(module.buffers()):  # a norm
        return x
    return module(x.new_zeros(len(x), 1, *x.shape[2:]))[:, :0]


def _at(values: Tensor | None, index: Tensor) -> Tensor | None:
    return None if values is None else values[index]


def _batch_norm_slice(module: Any, x: Tensor, index: Tensor) -> Tensor:
    mean, var = module.running_mean, module.running_var
    weight, bias = _at(module.weight, index), _at(module.bias, index)
    return F.batch_norm(x, _at(mean, index), _at(var, index), weight, bias, mean is None, 0.0, module.eps)


def _group_norm_slice(module: nn.GroupNorm, x: Tensor, index: Tensor) -> Tensor:
    groups = len(index) * module.num_groups // module.num_channels
    return F.group_norm(x, groups, _at(module.weight, index), _at(module.bias, index), module.eps)
