"""Residual blocks of timm that share its ResNet class but have no plain hidden width: layer gates only.

Each function is a block's branch, from its input to what is added to the shortcut.
"""

from typing import Any

import torch
from timm.models.res2net import Bottle2neck
from timm.models.resnest import ResNestBottleneck
from timm.models.sknet import SelectiveKernelBasic, SelectiveKernelBottleneck
from torch import Tensor


def _after(x: Tensor, *modules: Any) -> Tensor:
    for module in modules:
        x = x if module is None else module(x)
    return x


def res2net_branch(block: Any, x: Tensor) -> Tensor:
    """Bottle2neck: the middle convolution is a hierarchy over splits of the channels."""
    splits = _after(x, block.conv1, block.bn1, block.relu).split(block.width, 1)
    found: list[Tensor] = []
    for i, (conv, norm) in enumerate(zip(block.convs, block.bns, strict=True)):
        fresh = i == 0 or block.is_first
        found.append(block.relu(norm(conv(splits[i] if fresh else found[-1] + splits[i]))))
    if block.scale > 1:
        found.append(_after(splits[-1], block.pool))
    return _after(torch.cat(found, 1), block.drop_block, block.conv3, block.bn3, block.se, block.drop_path)


def resnest_branch(block: Any, x: Tensor) -> Tensor:
    """ResNeSt: the middle convolution attends over splits."""
    x = _after(x, block.conv1, block.bn1, block.act1, block.avd_first)
    x = _after(x, block.conv2, block.bn2, block.drop_block, block.act2, block.avd_last)
    return _after(x, block.conv3, block.bn3)


def resnest_shortcut(block: Any, x: Tensor) -> Tensor:
    """As timm has it, drop path acts before the downsample."""
    return x if block.downsample is None else block.downsample(_after(x, block.drop_path))


def sk_basic_branch(block: Any, x: Tensor) -> Tensor:
    """SelectiveKernelBasic: the first convolution selects among kernels."""
    return _after(x, block.conv1, block.conv2, block.se, block.drop_path)


def sk_bottleneck_branch(block: Any, x: Tensor) -> Tensor:
    """SelectiveKernelBottleneck: the middle convolution selects among kernels."""
    return _after(x, block.conv1, block.conv2, block.conv3, block.se, block.drop_path)


RES2NET, RESNEST, SK_BASIC, SK_BOTTLENECK = (
    Bottle2neck,
    ResNestBottleneck,
    SelectiveKernelBasic,
    SelectiveKernelBottleneck,
)
