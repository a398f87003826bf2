"""The dynamic twin of each stock class: same modules and same contract, another forward."""

import logging
from collections.abc import Mapping
from typing import Any

from timm.models._features import FeatureGetterNet, feature_take_indices
from torch import Tensor, nn

from . import families
from .cifar import CifarDenseNet, CifarResNet
from .exits import NEVER
from .forward import features, forward
from .gates import GATES, is_part
from .walk import Walk

_logger = logging.getLogger(__name__)


class DynamicFeatures(FeatureGetterNet):
    """What `features_only=True` gives: timm's, and it can checkpoint, as that of the stock networks can."""

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """As the model's own."""
        self.model.set_grad_checkpointing(enable)


def _forward(self: Any, x: Tensor) -> Any:
    """Logits; see `timm_dynamic.forward.forward`."""
    return forward(self, x)


def _forward_features(self: Any, x: Tensor) -> Tensor:
    """The trunk's output, gates at work, exits and budgets aside."""
    return features(self, x)


def _forward_intermediates(
    self: Any,
    x: Tensor,
    indices: int | list[int] | None = None,
    norm: bool = False,
    stop_early: bool = False,
    output_fmt: str = "NCHW",
    intermediates_only: bool = False,
) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
    """The stem and each stage as timm gives them, gates at work, exits and budgets aside."""
    assert output_fmt == "NCHW", "Output shape must be NCHW."
    take, most = feature_take_indices(len(self.feature_info), indices)
    walk = Walk(self, x, budgeted=False)
    walk.shared = True
    found = [walk.tapped] if 0 in take else []
    ends = [i for i, unit in enumerate(walk.units) if unit.last]
    for level, end in enumerate(ends, start=1):
        if stop_early and level > most:
            break
        walk.to_unit(end)
        if level == len(ends):
            walk.x = walk.finish(walk.x)
        if level in take:
            found.append(walk.x)
    return found if intermediates_only else (walk.x, found)


def _load_state_dict(self: Any, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
    """As `torch.nn.Module`'s; weights of the stock model, which have no gates and no exits, leave those as they are."""
    if self.dynamic.slices is not None:
        self.dynamic.slices.clear()
    own = {key: value for key, value in self.state_dict().items() if is_part(key)}
    if own and state_dict and not any(map(is_part, state_dict)):
        _logger.info("These weights have no gates and no exits: those of the model stay as they are.")
        state_dict = {**state_dict, **own}
    return nn.Module.load_state_dict(self, state_dict, strict, assign)


def _timm_root(name: str, base: Any) -> Any:
    """The dynamic twin of a timm class."""

    def prune_intermediate_layers(
        self: Any, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """As timm's; gates of units that are no more go too, and exits go with the head."""
        before = len(families.units(self))
        taken: list[int] = base.prune_intermediate_layers(self, indices, prune_norm, prune_head)
        left = len(families.units(self))
        for part in (p for p in GATES if left < before and hasattr(self, p)):
            if left < 2:
                delattr(self, part)
            else:
                getattr(self, part).cut(left - 1)
        if hasattr(self, "exits") and (prune_head or left < before):
            del self.exits
        if self.dynamic.forced is not None:
            gated = len(getattr(self, "layer_gates", ()))
            widths = sum(map(len, getattr(getattr(self, "channel_gates", None), "sizes", ())))
            self.dynamic.forced = self.dynamic.forced.cut(gated, widths)
        self.dynamic.count_anew()
        if self.dynamic.origin is not None:
            self.dynamic.origin.prune_intermediate_layers(indices, prune_norm, prune_head)
        return taken

    def reset_classifier(self: Any, num_classes: int, global_pool: str | None = None) -> None:
        """As timm's; the exits follow, and none lets images leave by confidence before it is calibrated again."""
        if num_classes < 0:
            raise ValueError(f"num_classes must be 0 or above; found {num_classes}")
        base.reset_classifier(self, num_classes, global_pool)
        self.dynamic.count_anew()
        if hasattr(self, "exits"):
            for head in self.exits.heads:
                head.reset(num_classes, next(self.parameters()))
                head.fc.train(self.training)
            self.exits.set_confidence([NEVER] * len(self.exits))
        if num_classes == 1 and self.dynamic.budget is not None and self.dynamic.budget.confidence is not None:
            _logger.info("The budget of confidence is lifted: of one class every image is sure.")
            self.dynamic.budget = None
        if self.dynamic.origin is not None:
            self.dynamic.origin.reset_classifier(num_classes, global_pool)

    return _root(
        name,
        base,
        forward_features=_forward_features,
        forward_intermediates=_forward_intermediates,
        prune_intermediate_layers=prune_intermediate_layers,
        reset_classifier=reset_classifier,
    )


SHARED = {"forward": _forward, "load_state_dict": _load_state_dict}


def _root(name: str, base: Any, **methods: Any) -> Any:
    doc = f"{base.__name__} with gates or exits."
    return type(name, (base,), {"__module__": __name__, "__doc__": doc, **SHARED, **methods})


DynamicResNet = _timm_root("DynamicResNet", families.TimmResNet)
DynamicDenseNet = _timm_root("DynamicDenseNet", families.TimmDenseNet)
DynamicCifarResNet = _timm_root("DynamicCifarResNet", CifarResNet)
DynamicCifarDenseNet = _timm_root("DynamicCifarDenseNet", CifarDenseNet)
DynamicTorchvisionResNet = _root("DynamicTorchvisionResNet", families.TorchvisionResNet)
DynamicTorchvisionDenseNet = _root("DynamicTorchvisionDenseNet", families.TorchvisionDenseNet)

ROOTS: dict[type[nn.Module], type[nn.Module]] = {
    cls.__bases__[0]: cls
    for cls in (
        DynamicResNet,
        DynamicDenseNet,
        DynamicCifarResNet,
        DynamicCifarDenseNet,
        DynamicTorchvisionResNet,
        DynamicTorchvisionDenseNet,
    )
}
