"""Verbs on a model: add gates and exits, take them off again, force decisions, choose the execution.

Each changes the model in place and returns it. Everything is checked before anything is changed.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from . import families
from .channel_gates import ChannelGates
from .configs import ChannelGateConfig, ExitConfig, LayerGateConfig, one_of, positive, ratio
from .exits import ExitHead, Exits
from .forcing import Forced
from .gates import PARTS, GateSite, Rest, make_layer_gates
from .roots import ROOTS
from .walk import Dynamic, dynamic_of


def add_layer_gates(model: Any, config: LayerGateConfig | str | dict[str, Any] | None = None) -> Any:
    """Give every unit but the first a layer gate (SkipNet, eq. 1).

    Args:
        model: a ResNet or DenseNet of timm or torchvision, or a dynamic one without layer gates.
        config: a kind ("ff1", "ff2", "rnn", "linear") or a `LayerGateConfig`.

    Returns:
        The same model. With `init="open"` it still computes exactly what it did.

    Raises:
        ValueError: if the model has no units, has layer gates already, or the config is wrong. Nothing is changed.
    """
    chosen = LayerGateConfig.make(config)
    sites = _sites(model, "layer_gates")
    return _attach(model, "layer_gates", lambda: make_layer_gates(chosen, sites))


def add_channel_gates(model: Any, config: ChannelGateConfig | str | dict[str, Any] | None = None) -> Any:
    """Give every unit but the first a channel gate over its hidden channels (DDI, section 3.1.3).

    Args:
        model: a ResNet or DenseNet of timm or torchvision, or a dynamic one without channel gates.
        config: a `ChannelGateConfig`; None for the defaults.

    Returns:
        The same model. With `init="open"` it still computes exactly what it did.

    Raises:
        ValueError: if the model has no units, has channel gates already, has units whose hidden channels cannot be
            computed one without the other, or the config is wrong. Nothing is changed.
    """
    chosen = ChannelGateConfig.make(config)
    sites = _sites(model, "channel_gates")
    for unit in families.units(model)[1:]:
        steps = unit.kind.steps(unit.module)
        if not steps:
            raise ValueError(
                f"no channel gate for {unit.name} of {families.model_name(model)!r}: "
                f"a {type(unit.module).__name__} has no plain hidden width; use layer gates"
            )
        for module in (m for _, after in steps[:-1] for m in after if not families.channelwise(m)):
            raise ValueError(
                f"no channel gate for {unit.name} of {families.model_name(model)!r}: "
                f"{type(module).__name__} cannot run on some of the hidden channels; use layer gates"
            )
    return _attach(model, "channel_gates", lambda: ChannelGates(chosen, sites))


def add_exits(model: Any, config: ExitConfig | dict[str, Any] | None = None) -> Any:
    """Give stages (or units) a branch classifier (DDI, supplement 8).

    Args:
        model: a ResNet or DenseNet of timm or torchvision, or a dynamic one without exits.
        config: an `ExitConfig`; None for one exit after every stage but the last.

    Returns:
        The same model. In training it then gives a tuple of logits, the head's last. Whether an exit can save anything
        where it stands is what `CostTable.break_even` tells.

    Raises:
        ValueError: if the model has no units, has exits already, a classifier that is no linear layer, or a place does
            not exist. Nothing is changed.
    """
    chosen = ExitConfig.make(config)
    _sites(model, "exits")
    all_units = families.units(model)
    after = _places(model, chosen, all_units)
    classes, head = families.classes(model), families.classifier(model)
    if not classes and not isinstance(head, nn.Identity):
        raise ValueError(
            f"exits need a classifier that is a linear layer, whose classes they take; found {type(head).__name__} in "
            f"{families.model_name(model)!r}: put it in afterwards, or give the model its num_classes"
        )

    def build() -> Exits:
        heads = []
        for i in after:
            unit, channels = all_units[i], families.channels_after(all_units, i)
            heads.append(ExitHead(channels, classes, max(0, 2 - unit.stage), unit.kind.grows, chosen.hidden))
        return Exits(chosen, after, heads)

    return _attach(model, "exits", build)


def strip(model: Any) -> Any:
    """Take all gates and exits off: the stock model again, with the weights that it has now.

    Raises:
        ValueError: if the model is a stock one, or a copy of `optimize_for_inference`.
    """
    dynamic = dynamic_of(model)
    _check_not_optimised(model)
    for part in PARTS:
        if hasattr(model, part):
            delattr(model, part)
    del model.dynamic
    model.__class__ = dynamic.base
    return model


def set_execution(model: Any, execution: str) -> Any:
    """Choose how a dynamic model runs in eval: "skip" leaves work out, "masked" computes all and multiplies.

    Training is always masked: batch norm must see the whole batch.

    Raises:
        ValueError: for another word, or a stock model.
    """
    one_of("execution", execution, ("skip", "masked"))
    dynamic_of(model).execution = execution
    return model


def set_gating(model: Any, gating: str, temperature: float = 1.0) -> Any:
    """Choose how the gates of a dynamic model decide in training.

    Args:
        model: a dynamic model.
        gating: "hard": keep where the probability is at least 0.5, with a straight-through gradient (SkipNet, eq. 7);
            "soft": keep to the extent of the probability (the paper's table 3); "sample": keep with that probability,
            without a gradient through the decision (SkipNet, section 3.2).
        temperature: for "sample", what the logits of the probabilities are divided by before drawing.

    Raises:
        ValueError: for another word, a temperature that is not above 0, or a stock model.
    """
    one_of("gating", gating, ("hard", "soft", "sample"))
    positive("temperature", temperature)
    dynamic = dynamic_of(model)
    dynamic.gating, dynamic.temperature = gating, float(temperature)
    return model


def force_always(model: Any, layer_keep: float) -> Any:
    """Drop units at random from here on, in training and in eval (the SkipNet paper's baseline SDV).

    It is not saved with the model: say it again after loading.

    Args:
        model: a dynamic model with layer gates.
        layer_keep: ratio in 0..1 of units that run, drawn as by `force`.

    Raises:
        ValueError: for a stock model, one without layer gates, or a ratio outside 0..1.
    """
    dynamic = dynamic_of(model)
    _check_has(model, "layer_gates", "layer_keep")
    _check_keep("layer_keep", layer_keep, len(model.layer_gates))
    dynamic.forced = Forced(layer_keep=layer_keep)
    return model


def set_policy(model: Any, layers: str = "", channels: str = "") -> Any:
    """Give all images one policy: forced in training, and by the gates' thresholds, which are saved, in eval.

    Units that it shuts are not computed in training either; a loss on the output gives their parameters no gradient.

    Args:
        model: a dynamic model.
        layers: 1 (run) or 0 for each gated unit; empty if the model has no layer gates.
        channels: 1 or 0 for each channel group of each gated hidden width; empty if it has no channel gates.

    Raises:
        ValueError: if a string is not of zeros and ones, or does not fit the model's gates, or a nested channel gate
            is to keep a group without those before it.
    """
    dynamic = dynamic_of(model)
    device = next(model.parameters()).device
    keeps: dict[str, Any] = {}
    for part, text, wanted in (
        ("layer_gates", layers, len(getattr(model, "layer_gates", ()))),
        ("channel_gates", channels, sum(group_counts(model))),
    ):
        if len(text) != wanted or set(text) - {"0", "1"}:
            raise ValueError(f"{part} need {wanted} zeros and ones; found {text!r}")
        keeps[part] = torch.tensor([[digit == "1" for digit in text]], device=device)
    if channels and model.channel_gates.config.mode == "nested":
        for part in keeps["channel_gates"][0].split(group_counts(model)):
            if not torch.equal(part, part.sort(descending=True).values):
                shown = "".join("01"[int(keep)] for keep in part)
                raise ValueError(f"nested channel gates keep the first groups of each width; found {shown!r}")
    layer_keep = keeps["layer_gates"] if layers else None
    channel_keep = list(keeps["channel_gates"].split(group_counts(model), dim=1)) if channels else []
    idle = frozenset(unit for unit, digit in enumerate(layers) if digit == "0")
    dynamic.forced = Forced(layer_keep=layer_keep, channel_keep=channel_keep or None, idle=idle)
    with torch.no_grad():
        if layer_keep is not None:
            model.layer_gates.threshold.copy_(torch.where(layer_keep[0], 0.0, 2.0))  # probabilities are in 0..1
        for unit, gate in enumerate(model.channel_gates.gates if channels else ()):
            first = sum(len(sizes) for sizes in model.channel_gates.sizes[:unit])
            own = torch.cat([part[0] for part in channel_keep[first : first + len(model.channel_gates.sizes[unit])]])
            gate.fc.weight.zero_()
            gate.fc.bias.copy_(torch.where(own, 20.0, -20.0))
    return model


def group_counts(model: Any) -> list[int]:
    """Channel groups of each gated hidden width."""
    return [len(sizes) for unit in getattr(getattr(model, "channel_gates", None), "sizes", ()) for sizes in unit]


@contextmanager
def force(
    model: Any,
    *,
    layer_keep: float | Tensor | None = None,
    channel_keep: float | Sequence[Tensor] | None = None,
    exit: int | Tensor | None = None,
) -> Iterator[Any]:
    """Override what the gates decide, within a `with` block. The gates still run and are still counted.

    Args:
        model: a dynamic model.
        layer_keep: a ratio in 0..1, drawn anew for each image and unit at each forward from torch's generator, or
            keeps [B, units], or [1, units] for all images.
        channel_keep: a ratio, or keeps [B, groups] (or [1, groups]) for each gated hidden width.
        exit: where images leave (0 is the first exit), one for all or one each [B]. A hard budget outranks it,
            and one of `exit=`.

    What is not given stays as an outer `force`, or `set_policy`, has it.

    Raises:
        ValueError: for a part that the model lacks, a ratio outside 0..1, or a wrong shape or value.
    """
    dynamic = dynamic_of(model)
    if layer_keep is not None:
        _check_has(model, "layer_gates", "layer_keep")
        _check_keep("layer_keep", layer_keep, len(model.layer_gates))
    if channel_keep is not None:
        _check_has(model, "channel_gates", "channel_keep")
        _check_channel_keep(model, channel_keep)
    if exit is not None:
        _check_has(model, "exits", "exit")
        _check_exit(exit, len(model.exits) + 1)
    before = dynamic.forced
    outer = before or Forced()
    dynamic.forced = Forced(
        outer.layer_keep if layer_keep is None else layer_keep,
        outer.channel_keep if channel_keep is None else channel_keep,
        outer.exit if exit is None else exit,
        idle=outer.idle if layer_keep is None else frozenset(),
    )
    try:
        yield model
    finally:
        dynamic.forced = before


# Checks and building -------------------------------------------------------------------------------------------------


def _check_has(model: Any, part: str, option: str) -> None:
    if not hasattr(model, part):
        raise ValueError(f"force({option}=) needs a model with {part}; {families.model_name(model)!r} has none")


def _check_keep(what: str, keep: Any, columns: int) -> None:
    if not isinstance(keep, Tensor):
        ratio(what, keep)
        return
    if keep.dim() != 2 or keep.shape[1] != columns:
        raise ValueError(f"{what} must have shape [batch, {columns}]; found {list(keep.shape)}")
    if not bool(((keep == 0) | (keep == 1)).all()):
        raise ValueError(f"{what} must hold 0 and 1 only")


def _check_channel_keep(model: Any, keep: Any) -> None:
    counts = group_counts(model)
    if isinstance(keep, (int, float)):
        ratio("channel_keep", keep)
        return
    if isinstance(keep, Tensor) or not isinstance(keep, Sequence) or len(keep) != len(counts):
        found = f"{len(keep)}" if isinstance(keep, (list, tuple)) else type(keep).__name__
        raise ValueError(f"channel_keep must be a ratio or a list of {len(counts)} tensors; found {found}")
    for i, (part, columns) in enumerate(zip(keep, counts, strict=True)):
        if not isinstance(part, Tensor):
            raise ValueError(f"channel_keep[{i}] must be a tensor [batch, {columns}]; found {type(part).__name__}")
        _check_keep(f"channel_keep[{i}]", part, columns)


def _check_exit(exit: Any, count: int) -> None:
    if not isinstance(exit, (int, Tensor)) or isinstance(exit, bool):
        raise ValueError(f"exit must be an int or a tensor of ints [batch]; found {exit!r}")
    values = torch.as_tensor(exit)
    if values.dim() > 1 or values.is_floating_point() or values.dtype == torch.bool:
        raise ValueError(f"exit must be an int or a tensor of ints [batch]; found {exit!r}")
    if bool(((values < 0) | (values >= count)).any()):
        raise ValueError(f"exit must be in 0..{count - 1}; found {values.tolist()}")


def _sites(model: Any, part: str) -> list[GateSite]:
    """The units to be gated, after the checks that all `add_*` share."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"no units to gate: a model is needed; found {type(model).__name__}")
    found = families.units(model)
    if type(model) not in ROOTS and not hasattr(model, "dynamic"):
        raise ValueError(f"no units to gate in {families.model_name(model)!r}: {type(model).__name__} is not known")
    _check_not_optimised(model)
    if hasattr(model, part):
        raise ValueError(f"{families.model_name(model)!r} has {part} already; strip(model) takes them off")
    if len(found) < 2:
        raise ValueError(f"no units to gate in {families.model_name(model)!r}: it has {len(found)}, wanted 2 or more")
    return [_site(found, i) for i in range(1, len(found))]


def _site(found: Sequence[families.Unit], i: int) -> GateSite:
    """What a gate has to know about unit `i`."""
    unit = found[i]
    steps = unit.kind.steps(unit.module)
    body, area = 0.0, 1.0
    for conv, _ in steps:
        area /= conv.stride[0] * conv.stride[1]
        body += area * conv.weight.numel()
    if not steps:  # taken as a whole: its convolutions, at the resolution of its output
        weights = sum(m.weight.numel() for m in unit.module.modules() if isinstance(m, nn.Conv2d))
        body = float(weights) / (4 if found[i - 1].last else 1)
    aligns = [families.alignment(conv, after) for conv, after in steps[:-1]]
    for k, (conv, _) in enumerate(steps[1:]):  # a grouped convolution's inputs belong together too
        if conv.groups > 1 and k < len(aligns):
            aligns[k] = max(aligns[k], conv.in_channels // conv.groups)
    widths = tuple(conv.out_channels for conv, _ in steps[:-1])
    channels = steps[0][0].in_channels if steps else families.channels_after(found, i - 1)
    width = unit.kind.width(unit.module)
    return GateSite(unit.name, channels, body, unit.kind.grows, widths, tuple(aligns), width, _rest(found, i))


def _rest(found: Sequence[families.Unit], i: int) -> Rest:
    """What is left of the network if unit `i` and all after it are skipped: see `GateSite.rest`.

    Nothing can be asked where a residual unit that changes the features' shape is still to come.
    """
    unit, last = found[i], found[-1].stage
    if not unit.kind.grows:
        return ((last, 0),) if unit.stage == last == found[i - 1].stage else ()
    added = [(u.stage, u.kind.width(u.module)) for u in found[i:]]
    return tuple((stage, sum(width for s, width in added if s == stage)) for stage in range(unit.stage, last + 1))


def _places(model: Any, config: ExitConfig, all_units: Sequence[families.Unit]) -> list[int]:
    """Places in the running order after which exits stand."""
    names = {unit.name: i for i, unit in enumerate(all_units)}
    stages = families.family(model).stages(model)
    ends = [i for i, unit in enumerate(all_units) if unit.last]
    names.update({name: end for (name, _), end in zip(stages, ends, strict=True)})
    if config.after is None:
        return ends[:-1]
    found = set()
    for place in config.after:
        if isinstance(place, int):
            if not 1 <= place <= len(ends):
                raise ValueError(f"exits stand after stages 1..{len(ends) - 1}; found {place}")
            place = stages[place - 1][0]
        if place not in names:
            raise ValueError(
                f"no stage or unit {place!r} in {families.model_name(model)!r}; stages are "
                + ", ".join(name for name, _ in stages)
            )
        if names[place] == len(all_units) - 1:
            raise ValueError(f"no exit after {place!r}: the model's own head stands there")
        found.add(names[place])
    return sorted(found)


def _attach(model: Any, part: str, build: Any) -> Any:
    """Build a part where the model lives, then hang it on the root."""
    like = next(model.parameters())
    with torch.inference_mode(False):  # parameters made in inference mode could never be trained
        module = build().to(like.device, like.dtype).train(model.training)
    if not hasattr(model, "dynamic"):
        model.dynamic = Dynamic(type(model))
        model.__class__ = ROOTS[type(model)]
    model.add_module(part, module)
    model.dynamic.count_anew()
    return model


def _check_not_optimised(model: Any) -> None:
    if getattr(model, "dynamic", None) is not None and model.dynamic.origin is not None:
        raise ValueError(
            "a copy of optimize_for_inference keeps the parts that it has: change the model that it was made from"
        )
