"""Networks of torchvision as the timm networks that compute the same, which timm can save and build again."""

from typing import Any

import timm
import torch
import torchvision
from torch import nn

from . import families
from .gates import PARTS, is_part
from .roots import ROOTS

TAG = "tv_in1k"  # timm's name of torchvision's own weights: how their images are prepared


def is_torchvision(model: nn.Module) -> bool:
    """Whether a model is a ResNet or DenseNet of torchvision, stock or dynamic."""
    return isinstance(model, (families.TorchvisionResNet, families.TorchvisionDenseNet))


def parts_of(model: Any) -> dict[str, Any]:
    """The arguments that make a model's gates and exits: a dict each, False for those it has not."""
    return {part: getattr(model, part).config.to_dict() if hasattr(model, part) else False for part in PARTS}


def as_timm(model: Any) -> Any:
    """The timm network that computes what one of torchvision does: its weights, gates, exits and budget.

    Args:
        model: a network of torchvision; it is left as it is.

    Returns:
        A network of timm that shares its tensors, for saving.

    Raises:
        ValueError: if it is none of torchvision's named networks, or was changed since it was made.
    """
    parts = parts_of(model)
    name, more = _name_of(model), {"num_classes": families.classes(model)}
    if any(parts.values()):
        name, more = f"ddi_{name}", {**more, **parts}
    with torch.device("meta"):
        twin: Any = timm.create_model(f"{name}.{TAG}", **more)
    try:
        twin.load_state_dict(model.state_dict(), assign=True)
    except RuntimeError as error:
        raise _changed(model) from error
    if hasattr(model, "dynamic"):
        twin.dynamic.budget, twin.dynamic.limit = model.dynamic.budget, model.dynamic.limit
    return twin.train(model.training)


def _name_of(model: nn.Module) -> str:
    """The name by which torchvision makes a network of these layers."""
    classes = families.classes(model)
    if type(model) not in {*ROOTS, *ROOTS.values()} or not classes:
        raise _changed(model)
    layers, module = _layers(model), _module_of(model)
    for name in torchvision.models.list_models(module=torchvision.models):
        builder = torchvision.models.get_model_builder(name)
        if builder.__module__ != module:
            continue
        with torch.device("meta"):
            if _layers(builder(num_classes=classes)) == layers:
                return name
    raise _changed(model)


def _changed(model: nn.Module) -> ValueError:
    return ValueError(
        f"this {type(model).__name__} is not what torchvision makes by a name, or was changed after it was made, and "
        "cannot be built again from a name: save its state_dict() instead"
    )


def _module_of(model: nn.Module) -> str:
    """Where torchvision keeps the class of a network."""
    return next(cls.__module__ for cls in type(model).__mro__ if cls.__module__.startswith("torchvision."))


def _layers(model: nn.Module) -> list[tuple[str, type, str, float]]:
    """Name, class and arguments of every layer of the stock network within a model."""
    found = [(name, module) for name, module in model.named_modules() if name and not is_part(name)]
    return [(n, type(m), m.extra_repr(), float(getattr(m, "drop_rate", 0.0))) for n, m in found]
