"""Weights that no image can reach, and that shipped weights therefore go without."""

from typing import Any

import torch
from torch import Tensor, nn

from . import families
from .configs import ChannelGateConfig, LayerGateConfig
from .gates import GATES


def idle_weights(
    model: Any, layer_gates: LayerGateConfig | None, channel_gates: ChannelGateConfig | None
) -> dict[str, Tensor]:
    """What of a model's state no image can reach: units shut for good, and gates that nobody asks.

    A shut unit's downsample is not among it, which runs in the unit's place; nor is an RNN gate, which units share.

    Args:
        model: a stock or dynamic model.
        layer_gates: which units are shut or open, which the model's own need not be; None if none are.
        channel_gates: likewise, whose channels are settled.

    Returns:
        For each such key of the state dict the model's tensor, or zeros for the last layer of a unit: one that runs
        after all then adds nothing.
    """
    state = model.state_dict(keep_vars=True)
    found: dict[str, Tensor] = {}
    shut = set(layer_gates.shut) if layer_gates is not None else set()
    for unit in families.units(model):
        if unit.name in shut and unit.kind.steps(unit.module):  # of others it is not known which layer is the last
            rest = _ids(unit.kind.act(unit.module), getattr(unit.module, "downsample", None))
            own = {k: v for k, v in state.items() if k.startswith(f"{unit.name}.") and id(v) not in rest}
            last = {id(parameter) for parameter in _last_layer(unit).parameters()}
            found |= {k: torch.zeros_like(v) if id(v) in last else v for k, v in own.items()}
    layers_settled = shut | set(layer_gates.open) if layer_gates is not None else set()
    channels_settled = shut | set(channel_gates.channels_of()) if channel_gates is not None else set()
    for part, settled in zip(GATES, (layers_settled, channels_settled), strict=True):
        for place, name in enumerate(getattr(getattr(model, part, None), "gated", ())):
            if name in settled:
                found |= {k: v for k, v in state.items() if k.startswith(f"{part}.gates.{place}.")}
    return {key: value.detach() for key, value in found.items()}


def _ids(*modules: nn.Module | None) -> set[int]:
    """Which parameters and buffers modules have."""
    return {id(v) for m in modules if m is not None for v in (*m.parameters(), *m.buffers())}


def _last_layer(unit: families.Unit) -> nn.Module:
    """The layer without which a unit with plain steps adds nothing: the norm after its last convolution, or that."""
    conv, after = unit.kind.steps(unit.module)[-1]
    norm = after[0] if after else None
    return norm if norm is not None and list(norm.parameters(recurse=False)) else conv
