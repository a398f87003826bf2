"""The names: `skipnet_*`, `iadi_*` and `ddi_*` of every ResNet and DenseNet, for timm and for torchvision.

A paper is a row in a table, not a class.
"""

import dataclasses
import inspect
import logging
import sys
from collections import deque
from collections.abc import Collection, Mapping
from functools import partial
from typing import Any, NamedTuple

import timm
import torchvision
from timm.models import build_model_with_cfg, register_model
from timm.models._features import FeatureGetterNet
from timm.models._pretrained import DefaultCfg, PretrainedCfg
from timm.models.densenet import default_cfgs as densenet_cfgs
from timm.models.res2net import default_cfgs as res2net_cfgs
from timm.models.resnest import default_cfgs as resnest_cfgs
from timm.models.resnet import default_cfgs as resnet_cfgs
from timm.models.sknet import default_cfgs as sknet_cfgs
from torch import Tensor, nn
from torchvision.models import _api as torchvision_api
from torchvision.models import densenet as tv_densenet
from torchvision.models import resnet as tv_resnet

from . import families
from .budgets import check_budget
from .cifar import default_cfgs as cifar_cfgs
from .configs import BudgetConfig, ChannelGateConfig, LayerGateConfig
from .gates import PARTS, is_part
from .idle import idle_weights
from .roots import DynamicFeatures
from .safety import check_saved_model
from .shipped import shipped, with_saved_arguments
from .surgery import add_channel_gates, add_exits, add_layer_gates
from .walk import dynamic_of

_logger = logging.getLogger(__name__)


class Method(NamedTuple):
    """The parts that a paper's networks have."""

    layer_gates: bool
    channel_gates: bool
    exits: bool


METHODS = {
    "skipnet": Method(layer_gates=True, channel_gates=False, exits=False),
    "iadi": Method(layer_gates=True, channel_gates=True, exits=False),
    "ddi": Method(layer_gates=True, channel_gates=True, exits=True),
}
# module of timm's registry -> its configs, and the methods that its units allow
BASES: dict[str, tuple[dict[str, DefaultCfg], tuple[str, ...]]] = {
    "resnet": (resnet_cfgs, tuple(METHODS)),
    "densenet": (densenet_cfgs, tuple(METHODS)),
    "cifar": (cifar_cfgs, tuple(METHODS)),
    "res2net": (res2net_cfgs, ("skipnet",)),
    "resnest": (resnest_cfgs, ("skipnet",)),
    "sknet": (sknet_cfgs, ("skipnet",)),
}

CONFIDENCE = "exits.confidence"  # key of a state dict
default_cfgs: dict[str, DefaultCfg] = {}


def add_parts(
    model: Any,
    method: Method,
    layer_gates: Any = None,
    channel_gates: Any = None,
    exits: Any = None,
    budget: Any = None,
    saved_budget: bool = False,
) -> Any:
    """Give a stock model the parts of a method.

    Args:
        model: a stock model; changed in place.
        method: which parts there are by default.
        layer_gates: a config, a dict, or False for none; None for what the method has.
        channel_gates: likewise.
        exits: likewise.
        budget: a `BudgetConfig`, a dict, or False for none; a network without classes keeps none. One of
            milliseconds is checked by timing the model here and now.
        saved_budget: whether the budget came with the weights: one that this network cannot keep is then left out,
            with a warning.
    """
    verbs = (add_layer_gates, add_channel_gates, add_exits)
    for verb, default, wanted in zip(verbs, method, (layer_gates, channel_gates, exits), strict=True):
        if wanted is not False and (default or wanted is not None):
            verb(model, None if wanted is True else wanted)
    if budget is not None and budget is not False and not families.classes(model):
        _logger.info("A network without classes keeps no budget: all images go to the head.")
    elif budget is not None and budget is not False:
        try:
            config = BudgetConfig.make(budget)
            dynamic = dynamic_of(model)
            dynamic.limit, dynamic.budget = check_budget(model, config), config
        except ValueError as error:
            if not saved_budget:
                raise
            _logger.warning(f"The budget that these weights were saved with does not suit, and is left out: {error}")
    return model


def _build_timm(base: str, method: Method, saved_budget: bool, **kwargs: Any) -> nn.Module:
    """The callable that timm's builder makes a model with, before it loads weights."""
    parts = {name: kwargs.pop(name, None) for name in (*PARTS, "budget")}
    return add_parts(timm.create_model(base, **kwargs), method, **parts, saved_budget=saved_budget)


def complete(
    base: str,
    state_dict: dict[str, Tensor],
    model: nn.Module,
    *,
    missing: Collection[str] = (),
    unused: Collection[str] = (),
    arguments: Mapping[str, Any] | None = None,
) -> dict[str, Tensor]:
    """Make weights loadable into a dynamic model: its own fresh gates and exits join those of the base.

    Weights that have any gate or exit must have them all, but for what no image could reach where they come from;
    exits of another number of classes start afresh.

    Args:
        base: name of the stock model.
        state_dict: the weights.
        model: that they are for.
        missing: parts that the weights lack, and that start afresh.
        unused: parts of the weights that the model does without.
        arguments: what the weights were saved with, if that is known.
    """
    if base in densenet_cfgs:
        state_dict = timm.models.densenet._filter_torchvision_pretrained(state_dict)
    if arguments and any(map(is_part, state_dict)):
        layers, channels = arguments.get("layer_gates"), arguments.get("channel_gates")
        of_layers = LayerGateConfig.make(layers) if layers else None
        of_channels = ChannelGateConfig.make(channels) if channels else None
        state_dict = {**idle_weights(model, of_layers, of_channels), **state_dict}
    state_dict = {key: value for key, value in state_dict.items() if key.split(".", 1)[0] not in unused}
    own = {key: value for key, value in model.state_dict().items() if is_part(key)}
    if not any(map(is_part, state_dict)):
        if own:
            _logger.info(f"These are weights of {base}: its gates are open and not trained yet.")
        return {**state_dict, **own}
    state_dict |= {key: value for key, value in own.items() if key.split(".", 1)[0] in missing}
    for key, value in own.items():
        if key.startswith("exits.") and ".fc." in key and key in state_dict and state_dict[key].shape != value.shape:
            state_dict |= {key: value, CONFIDENCE: own[CONFIDENCE]}  # how sure the old classes' exits were says nothing
    if not getattr(model, "num_classes", 1) and CONFIDENCE in own:
        state_dict[CONFIDENCE] = own[CONFIDENCE]
    return state_dict


def _cfgs_of(base: str, cfgs: DefaultCfg, trained: Mapping[str, PretrainedCfg]) -> DefaultCfg:
    """The configs of a dynamic network: those of its own trained weights first, then one for each tag of its base.

    The base's place on the Hub is written out.
    """
    own = {}
    for tag, cfg in cfgs.cfgs.items():
        full = f"timm/{base}.{tag}" if tag else f"timm/{base}"
        own[tag] = dataclasses.replace(cfg, hf_hub_id=full) if cfg.hf_hub_id == "timm/" else cfg
    tags = deque([*trained, *(tag for tag in cfgs.tags if tag not in trained and (tag or not trained))])
    return DefaultCfg(tags=tags, cfgs={**own, **trained}, is_pretrained=cfgs.is_pretrained or bool(trained))


def _publish(fn: Any, name: str, doc: str) -> Any:
    """Make a function that was made in a loop a member of this module, so that it can be found and pickled."""
    fn.__name__ = fn.__qualname__ = name
    fn.__module__, fn.__doc__ = __name__, doc
    setattr(sys.modules[__name__], name, fn)
    return fn


def _through_gates(name: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments with which features are read by the walk: timm's other ways go from module to module, past the gates.

    Raises:
        ValueError: if one of those is asked for.
    """
    asked = kwargs.get("feature_cls") if kwargs.get("features_only") else None
    if asked is None or (isinstance(asked, type) and issubclass(asked, FeatureGetterNet)):
        return kwargs
    if str(asked).lower() != "getter":
        raise ValueError(f"{name} gives features by feature_cls='getter' only: {asked!r} would go past its gates")
    return {key: value for key, value in kwargs.items() if key != "feature_cls"}


def _register_timm(prefix: str, base: str, cfgs: DefaultCfg, trained: Mapping[str, PretrainedCfg]) -> None:
    name = f"{prefix}_{base}"

    def entry(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        kwargs = _through_gates(name, check_saved_model(name, pretrained, kwargs))
        saved = with_saved_arguments(name, pretrained, kwargs)
        return build_model_with_cfg(
            partial(_build_timm, base, METHODS[prefix], saved.budget),
            name,
            pretrained,
            feature_cfg={"feature_cls": DynamicFeatures, "out_indices": tuple(range(4 if base in cifar_cfgs else 5))},
            pretrained_filter_fn=partial(
                complete,
                base,
                missing=saved.missing,
                unused=saved.unused,
                arguments=saved.kwargs.get("pretrained_model_args"),
            ),
            **saved.kwargs,
        )

    default_cfgs[name] = _cfgs_of(base, cfgs, trained)
    register_model(_publish(entry, name, f"`{base}` of timm with the parts of {prefix}; see `add_parts`."))


def _register_torchvision(prefix: str, base: str, builder: Any) -> None:
    name = f"{prefix}_{base}"

    def entry(*, weights: Any = None, progress: bool = True, **kwargs: Any) -> nn.Module:
        parts = {part: kwargs.pop(part, None) for part in (*PARTS, "budget")}
        return add_parts(builder(weights=weights, progress=progress, **kwargs), METHODS[prefix], **parts)

    entry.__signature__ = inspect.signature(builder)  # type: ignore[attr-defined]
    _publish(entry, f"torchvision_{name}", f"`{base}` of torchvision with the parts of {prefix}; see `add_parts`.")
    torchvision_api.register_model(name)(entry)


_trained = shipped()
for _module, (_base_cfgs, _prefixes) in BASES.items():
    for _base in timm.list_models(module=_module):
        if _base in _base_cfgs:
            for _prefix in _prefixes:
                _register_timm(_prefix, _base, _base_cfgs[_base], _trained.get(f"{_prefix}_{_base}", {}))
for _base in torchvision_api.list_models(module=torchvision.models):
    _builder = torchvision_api.get_model_builder(_base)
    if _builder.__module__ in (tv_resnet.__name__, tv_densenet.__name__):
        for _prefix in METHODS:
            _register_torchvision(_prefix, _base, _builder)
