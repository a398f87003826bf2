"""Small networks of every kind of unit, and what the core's tests measure them with."""

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import timm
import torch
import torchvision
from timm.models.densenet import DenseNet
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import resnet as tv_resnet

import timm_dynamic as td
from timm_dynamic import families

CLASSES = 10
NORMS = (nn.BatchNorm2d, nn.GroupNorm)
_NARROW = {
    "layers": (2, 2, 2, 2),
    "channels": (16, 24, 40, 64),
    "num_classes": CLASSES,
}  # widths that 16 does not divide


def _timm(name: str, **kwargs: Any) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, **{**_NARROW, **kwargs})


def _tv_resnet(block: Any, **kwargs: Any) -> Callable[[], nn.Module]:
    return lambda: tv_resnet.ResNet(block, [2, 2, 1, 1], num_classes=CLASSES, **kwargs)


def _tv_densenet() -> nn.Module:
    return torchvision.models.DenseNet(12, (2, 3, 2, 2), num_init_features=16, num_classes=CLASSES)


def _dense(**kwargs: Any) -> Callable[[], nn.Module]:
    return lambda: DenseNet(growth_rate=12, block_config=(2, 3, 2, 2), num_classes=CLASSES, **kwargs)


# kind of network -> how a stock one is made
STOCK: dict[str, Callable[[], nn.Module]] = {
    "basic": _timm("resnet18"),
    "bottleneck": _timm("resnet50"),
    "grouped": _timm("resnext50_32x4d", cardinality=4, base_width=32),
    "blur_se": _timm("resnetblur50", cardinality=4, base_width=32, block_args={"attn_layer": "se"}),
    "groupnorm": _timm("resnet50_gn", channels=(32, 64, 64, 64)),
    "dense": _dense(),
    "dense_blur": _dense(stem_type="deep", aa_layer=timm.layers.BlurPool2d, aa_stem_only=False),
    "cifar": lambda: timm.create_model("resnet20_cifar"),
    "cifar_dense": lambda: timm.create_model("densenet100_cifar", block_config=(3, 2, 2)),
    "tv_basic": _tv_resnet(tv_resnet.BasicBlock),
    "tv_bottleneck": _tv_resnet(tv_resnet.Bottleneck, groups=4, width_per_group=8),
    "tv_dense": _tv_densenet,
}
KINDS = list(STOCK)
FEW = ["basic", "bottleneck", "dense"]  # one for each structure of units
LAYER_KINDS = ["ff1", "ff2", "rnn", "linear"]
MODES = ["independent", "nested"]
SIZE = 40  # 40, 20, 10, 5, 3, 2: sizes that do not halve evenly
ALL = ("layer", "channel", "exits")
VERBS = {"layer": td.add_layer_gates, "channel": td.add_channel_gates, "exits": td.add_exits}


def randomise(model: nn.Module) -> nn.Module:
    """Random weights and statistics for the norms: a fresh timm block is the identity and skipping it shows nothing."""
    for module in model.modules():
        if isinstance(module, NORMS) and module.weight is not None:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model


def stock(kind: str) -> nn.Module:
    """A stock network with random norms, in eval."""
    return copy.deepcopy(_stock(kind))


def add(model: nn.Module, parts: Sequence[str] = ALL, **configs: Any) -> nn.Module:
    """Give a network the parts named, each with its config if there is one."""
    for part in parts:
        VERBS[part](model, configs.get(part))
    return model


def dynamic(kind: str, parts: Sequence[str] = ALL, **configs: Any) -> nn.Module:
    """A dynamic network with open gates and random norms (those of gates and exits too), in eval."""
    return copy.deepcopy(_dynamic(kind, tuple(parts), tuple(configs.items())))


def undecided(kind: str, parts: Sequence[str] = ALL, **configs: Any) -> nn.Module:
    """A dynamic network whose gates are of two minds: each score is spread around 0 over random images."""
    return copy.deepcopy(_undecided(kind, tuple(parts), tuple(configs.items())))


def _made_once(make: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Make each network once, always with the same random numbers; users get copies, cost tables included."""

    @functools.cache
    def made(*args: Any) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return make(*args)

    return made


@_made_once
def _stock(kind: str) -> nn.Module:
    return randomise(STOCK[kind]()).eval()


@_made_once
def _dynamic(kind: str, parts: tuple[str, ...], configs: tuple[tuple[str, Any], ...]) -> nn.Module:
    model = randomise(add(STOCK[kind](), parts, **dict(configs))).eval()
    decide(model, images(1))  # counts the cost table
    return model


@_made_once
def _undecided(kind: str, parts: tuple[str, ...], configs: tuple[tuple[str, Any], ...]) -> nn.Module:
    model = dynamic(kind, parts, **dict(configs))
    last = {name: m for name, m in model.named_modules() if "gates" in name.split(".")[0] and name.endswith("fc")}
    for fc in last.values():
        nn.init.normal_(fc.weight)
    scores: dict[str, list[Tensor]] = {name: [] for name in last}
    hooks = [
        fc.register_forward_hook(lambda module, x, y, name=name: scores[name].append(y)) for name, fc in last.items()
    ]
    with torch.no_grad(), masked(model):  # asks every gate about every image
        model(images(32, seed=9))
        for hook in hooks:
            hook.remove()
        for name, fc in last.items():
            seen = torch.cat(scores[name])  # [images, scores]; an RNN's gate is asked by every unit
            scale = 2 / seen.std(0).clamp_min(1e-6)
            fc.weight *= scale[:, None]
            fc.bias.copy_((fc.bias - seen.median(0).values) * scale)
    return model


def images(batch: int, size: int = SIZE, seed: int = 1) -> Tensor:
    """Random images of different brightness and contrast. [batch, 3, size, size]."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 3, size, size, generator=generator)
    contrast = 0.5 + torch.rand(batch, 1, 1, 1, generator=generator)
    return contrast * x + torch.randn(batch, 3, 1, 1, generator=generator)


def gated(model: nn.Module) -> list[str]:
    """Names of the gated units."""
    return [unit.name for unit in families.units(model)[1:]]


def units_of(model: nn.Module) -> int:
    """How many units have a layer gate."""
    return len(model.layer_gates) if hasattr(model, "layer_gates") else 0


def groups_of(model: nn.Module) -> list[int]:
    """How many channel groups each gated hidden width has."""
    return [len(s) for unit in model.channel_gates.sizes for s in unit] if hasattr(model, "channel_gates") else []


def mixed(model: nn.Module, batch: int, ratio: float = 0.5, seed: int = 2) -> dict[str, Any]:
    """Random decisions for what the model has, as arguments of `force`."""
    generator = torch.Generator().manual_seed(seed)

    def draw(columns: int) -> Tensor:
        return torch.rand(batch, columns, generator=generator) < ratio

    forced: dict[str, Any] = {}
    if units_of(model):
        forced["layer_keep"] = draw(units_of(model))
    if groups_of(model):
        forced["channel_keep"] = [draw(n) for n in groups_of(model)]
    if nested(model):
        forced["channel_keep"] = [keep.sort(dim=1, descending=True).values for keep in forced["channel_keep"]]
    return forced


def nested(model: nn.Module) -> bool:
    """Whether the model has nested channel gates."""
    return hasattr(model, "channel_gates") and model.channel_gates.config.mode == "nested"


@contextmanager
def masked(model: nn.Module) -> Iterator[nn.Module]:
    """Masked execution for a while."""
    td.set_execution(model, "masked")
    try:
        yield model
    finally:
        td.set_execution(model, "skip")


def run(model: nn.Module, x: Tensor) -> tuple[Tensor, int]:
    """Logits of a plain call, and the MACs that torch's own counter saw in it."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        y = model(x)
    flops = counter.get_total_flops()
    assert flops % 2 == 0
    return y, flops // 2


def decide(model: nn.Module, x: Tensor) -> td.Decisions:
    """`td.decide` without gradients."""
    with torch.no_grad():
        return td.decide(model, x)


def assert_near(found: Tensor, wanted: Tensor, tolerance: float = 1e-4) -> None:
    """Equal to fp32 rounding, relative to the largest value; NaN where NaN is wanted."""
    scale = wanted.nan_to_num().abs().max().item() if wanted.numel() else 0.0
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance * scale, equal_nan=True)


def assert_same_decisions(one: td.Decisions, other: td.Decisions) -> None:
    """All but logits and probabilities are equal exactly; those to rounding."""
    assert torch.equal(one.layer_keep, other.layer_keep)
    assert len(one.channel_keep) == len(other.channel_keep)
    assert all(torch.equal(a, b) for a, b in zip(one.channel_keep, other.channel_keep, strict=True))
    assert torch.equal(one.exit_index, other.exit_index)
    assert torch.equal(one.macs, other.macs)
    assert_near(one.logits, other.logits)
    assert_near(one.layer_prob, other.layer_prob)
    for a, b in zip(one.exit_logits, other.exit_logits, strict=True):
        assert_near(a, b)


def state_of(model: nn.Module) -> dict[str, Any]:
    """What must not change when a call fails or is undone: class, attributes, modules and values."""
    return {
        "class": type(model),
        "attributes": sorted(vars(model)),
        "modules": [(name, id(module)) for name, module in model.named_modules()],
        "values": {key: value.clone() for key, value in model.state_dict().items()},
        "hooks": [len(module._forward_hooks) for module in model.modules()],
        "training": [module.training for module in model.modules()],
        "dynamic": repr(vars(model.dynamic)) if hasattr(model, "dynamic") else None,
    }


def assert_same_state(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """`state_of` before and after are alike, values bit for bit."""
    assert {k: v for k, v in found.items() if k != "values"} == {k: v for k, v in wanted.items() if k != "values"}
    assert list(found["values"]) == list(wanted["values"])
    assert all(torch.equal(found["values"][key], value) for key, value in wanted["values"].items())
