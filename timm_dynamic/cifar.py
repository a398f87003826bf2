"""The plain CIFAR networks, built from timm's own classes and registered as timm models.

ResNets are 6n+2 layers deep (He et al., arXiv:1512.03385, section 4.2) with a 1x1 projection where a stage changes
width. `densenet40_cifar` and `densenet100_cifar` are DenseNet-BC with growth 12 (Huang et al., arXiv:1608.06993).
Both kinds take small images as
they are: the stem is one 3x3 convolution of stride 1 without pooling.
"""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from timm.models.densenet import DenseNet
from timm.models.resnet import BasicBlock, ResNet
from torch import nn

from .safety import check_saved_model
from .shipped import shipped, with_saved_arguments

__all__ = ["CifarDenseNet", "CifarResNet"]

CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_STD = (0.2470, 0.2435, 0.2616)
WIDTHS = (16, 32, 64)
# timm's ResNet counts strides from 4, the stride of its own stem; a CIFAR network starts at 1.
_STRIDE_SCALE = 4
_OUTPUT_STRIDES = {2: 8, 4: 16, 8: 16, 16: 16, 32: 16}


class CifarResNet(ResNet):
    """timm's ResNet with three stages of BasicBlocks behind a 3x3 stem.

    `layer4` is an empty `nn.Sequential`, so everything in timm that walks four stages keeps working. Feature levels
    are the stem and the three stages, at strides 1, 1, 2 and 4.
    """

    def __init__(
        self,
        layers: tuple[int, int, int],
        num_classes: int = 10,
        in_chans: int = 3,
        output_stride: int = 4,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        """Build the network.

        Args:
            layers: Blocks in each of the three stages.
            num_classes: Number of classes; 0 leaves the classifier out.
            in_chans: Number of input channels.
            output_stride: 4, or 2 to dilate the last stage instead of striding it; more than 4 means 4.
            device: Device of the parameters.
            dtype: Type of the parameters.
            **kwargs: Further arguments of timm's ResNet but its stem, block and widths.
        """
        if output_stride not in _OUTPUT_STRIDES:
            raise ValueError(f"output_stride must be 2 or 4 for a CIFAR ResNet, found {output_stride!r}")
        super().__init__(
            cast(Any, BasicBlock),  # timm annotates the class as an instance
            layers,
            num_classes=num_classes,
            in_chans=in_chans,
            output_stride=_OUTPUT_STRIDES[output_stride],
            # A deep stem is the one whose width is free; its convolutions are replaced below.
            stem_type="deep",
            stem_width=WIDTHS[0] // 2,
            channels=WIDTHS,
            device=device,
            dtype=dtype,
            **kwargs,
        )
        stem = _stem_conv(in_chans, WIDTHS[0], device, dtype)
        nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
        self.add_module("conv1", stem)
        self.add_module("maxpool", nn.Identity())
        self.add_module("layer4", nn.Sequential())
        self.feature_info: Any = _at_cifar_strides(self.feature_info, stem="act1")

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[torch.Tensor] | tuple[torch.Tensor, list[torch.Tensor]]:
        """As in timm, over the four feature levels of this network."""
        levels, _ = feature_take_indices(len(self.feature_info), indices)
        return super().forward_intermediates(x, levels, norm, stop_early, output_fmt, intermediates_only)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """As in timm, over the four feature levels of this network."""
        levels, last = feature_take_indices(len(self.feature_info), indices)
        if last < len(self.feature_info) - 1:
            return super().prune_intermediate_layers(levels, prune_norm, prune_head)
        if prune_head:
            self.reset_classifier(0, "")
        return levels


class CifarDenseNet(DenseNet):
    """timm's DenseNet behind a 3x3 stem that has neither norm nor pooling.

    Feature levels are the stem, every dense block but the last, and the final norm; with three blocks at strides 1,
    1, 2 and 4.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 3,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        """Build the network.

        Args:
            num_classes: Number of classes; 0 leaves the classifier out.
            in_chans: Number of input channels.
            device: Device of the parameters.
            dtype: Type of the parameters.
            **kwargs: Further arguments of timm's DenseNet but its kind of stem.
        """
        super().__init__(stem_type="", num_classes=num_classes, in_chans=in_chans, device=device, dtype=dtype, **kwargs)
        levels: Any = _at_cifar_strides(self.feature_info, stem="features.conv0")
        stem = _stem_conv(in_chans, levels[0]["num_chs"], device, dtype)
        nn.init.kaiming_normal_(stem.weight)
        self.features.conv0 = stem
        del self.features.norm0, self.features.pool0
        self.feature_info: Any = levels
        names = [f"features.{name}" for name, _ in self.features.named_children()]
        self.feature_ends = [names.index(level["module"]) for level in levels]


def _stem_conv(in_chans: int, width: int, device: Any, dtype: torch.dtype | None) -> nn.Conv2d:
    """The 3x3 stem convolution: it keeps the size of the image."""
    return nn.Conv2d(in_chans, width, 3, padding=1, bias=False, device=device, dtype=dtype)


def _at_cifar_strides(feature_info: list[dict[str, Any]], stem: str) -> list[dict[str, Any]]:
    """The feature levels with their strides counted from a stem of stride 1."""
    first = dict(feature_info[0], reduction=1, module=stem)
    return [first] + [dict(level, reduction=level["reduction"] // _STRIDE_SCALE) for level in feature_info[1:]]


def _cfg(first_conv: str, classifier: str, paper: str) -> dict[str, Any]:
    """What timm needs to know about a network without published weights."""
    return {
        "num_classes": 10,
        "input_size": (3, 32, 32),
        "pool_size": (8, 8),
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "mean": CIFAR10_MEAN,
        "std": CIFAR10_STD,
        "first_conv": first_conv,
        "classifier": classifier,
        "paper_ids": paper,
        "license": "mit",
    }


_resnet_cfg = partial(_cfg, "conv1", "fc", "arXiv:1512.03385")
_densenet_cfg = partial(_cfg, "features.conv0", "classifier", "arXiv:1608.06993")

_cfgs: dict[str, Any] = {f"resnet{depth}_cifar": _resnet_cfg() for depth in (20, 32, 38, 74, 110, 152)}
_cfgs |= {f"densenet{depth}_cifar": _densenet_cfg() for depth in (40, 100)}


def current_cfgs() -> dict[str, Any]:
    """What timm is to know of each network: the tags whose weights ship with the package, else a config without any."""
    found = shipped()
    cfgs: dict[str, Any] = {}
    for name, cfg in _cfgs.items():
        cfgs |= {f"{name}.{tag}": own for tag, own in found.get(name, {}).items()} or {name: cfg}
    made: dict[str, Any] = generate_default_cfgs(cfgs)
    return made


default_cfgs = current_cfgs()


def _build(cls: type, name: str, pretrained: bool, model_args: dict[str, Any], kwargs: dict[str, Any]) -> Any:
    """Build a network the way timm does, with its four feature levels."""
    kwargs = with_saved_arguments(name, pretrained, check_saved_model(name, pretrained, kwargs)).kwargs
    feature_cfg = {"flatten_sequential": cls is CifarDenseNet, "out_indices": (0, 1, 2, 3)}
    return build_model_with_cfg(cls, name, pretrained, feature_cfg=feature_cfg, **{**model_args, **kwargs})


def _resnet(depth: int, pretrained: bool, **kwargs: Any) -> CifarResNet:
    """Build the ResNet of `depth` = 6n+2 layers."""
    layers = ((depth - 2) // 6,) * 3
    model: CifarResNet = _build(CifarResNet, f"resnet{depth}_cifar", pretrained, {"layers": layers}, kwargs)
    return model


@register_model
def resnet20_cifar(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-20 for CIFAR: 3 blocks in each stage."""
    return _resnet(20, pretrained, **kwargs)


@register_model
def resnet32_cifar(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-32 for CIFAR: 5 blocks in each stage."""
    return _resnet(32, pretrained, **kwargs)


@register_model
def resnet38_cifar(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-38 for CIFAR: 6 blocks in each stage."""
    return _resnet(38, pretrained, **kwargs)


@register_model
def resnet74_cifar(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-74 for CIFAR: 12 blocks in each stage."""
    return _resnet(74, pretrained, **kwargs)


@register_model
def resnet110_cifar(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-110 for CIFAR: 18 blocks in each stage."""
    return _resnet(110, pretrained, **kwargs)


@register_model
def resnet152_cifar(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-152 for CIFAR: 25 blocks in each stage."""
    return _resnet(152, pretrained, **kwargs)


def _densenet(depth: int, pretrained: bool, **kwargs: Any) -> CifarDenseNet:
    """Build the DenseNet-BC of `depth` = 6n+4 layers."""
    model_args = {"growth_rate": 12, "block_config": ((depth - 4) // 6,) * 3}
    model: CifarDenseNet = _build(CifarDenseNet, f"densenet{depth}_cifar", pretrained, model_args, kwargs)
    return model


@register_model
def densenet40_cifar(pretrained: bool = False, **kwargs: Any) -> CifarDenseNet:
    """DenseNet-BC-40 for CIFAR: growth 12, 6 dense layers in each block."""
    return _densenet(40, pretrained, **kwargs)


@register_model
def densenet100_cifar(pretrained: bool = False, **kwargs: Any) -> CifarDenseNet:
    """DenseNet-BC-100 for CIFAR: growth 12, 16 dense layers in each block."""
    return _densenet(100, pretrained, **kwargs)
