"""What a saved model may ask for: checked before anything of it is built or read.

A folder or a Hub repo of a stranger is data. Its `config.json` may name one of our models and arguments for it; its
weights are `model.safetensors`. Anything else is refused.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError, safe_open

from .configs import BudgetConfig, ChannelGateConfig, ExitConfig, LayerGateConfig

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
PARTS: dict[str, type[LayerGateConfig | ChannelGateConfig | ExitConfig | BudgetConfig]] = {
    "layer_gates": LayerGateConfig,
    "channel_gates": ChannelGateConfig,
    "exits": ExitConfig,
    "budget": BudgetConfig,
}
MAX_PARAMETERS = 2**30  # 4 GiB of float32; timm's largest ResNet has 0.83e9
MAX_NUMBER = 2**22  # classes, channels
MAX_ITEMS = 1024  # of a list, and units in all
DEPTHS = ("layers", "block_config")  # arguments that say how many units there are in each stage
MAX_NESTING = 4
COUNTS = ("num_classes", "in_chans")
NOT_COUNTED = (  # arguments that make no parameters, or that only the loading of weights needs
    "budget",
    "cache_dir",
    "device",
    "feature_cls",
    "features_only",
    "out_indices",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "pretrained_model_args",
)


class UnsafeModelError(ValueError):
    """A saved model asks for something that it may not have."""


def check_saved_model(name: str, pretrained: bool, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Check a model that timm is about to build from a folder or a Hub repo; an entry point's first act.

    Args:
        name: of the entry point, the architecture that the model's config names.
        pretrained: whether weights are to be loaded.
        kwargs: what timm passes to the entry point.

    Returns:
        The arguments to go on with: as given, but weights come from `model.safetensors` only.

    Raises:
        UnsafeModelError: if the model asks for what it may not have.
    """
    cfg = kwargs.get("pretrained_cfg")
    if not isinstance(cfg, dict) or cfg.get("source") not in ("local-dir", "hf-hub"):
        return dict(kwargs)
    origin = str(cfg.get("file") if cfg["source"] == "local-dir" else cfg.get("hf_hub_id"))
    _check_arguments(origin, kwargs.get("pretrained_model_args") or {})
    _check_defaults(origin, cfg)
    _check_size(origin, name, kwargs)
    if cfg["source"] == "hf-hub":
        _check_files(origin, cfg)
        return {**kwargs, "pretrained_cfg": {**cfg, "hf_hub_filename": WEIGHTS}}
    _check_files(origin, _asked_by(Path(origin)))
    if pretrained:
        check_weights(Path(origin) / WEIGHTS)
    return dict(kwargs)


def check_weights(path: Path) -> None:
    """Raise an `UnsafeModelError` unless the file is a whole safetensors file."""
    if not path.is_file():
        raise UnsafeModelError(f"{path.parent} has no {path.name}: only weights in that format are loaded")
    try:
        with safe_open(path, framework="pt") as file:
            file.keys()
    except SafetensorError as error:
        raise UnsafeModelError(f"{path} is cut off or no safetensors file ({error}): get or save it again") from error


def _check_arguments(origin: str, model_args: Mapping[str, Any]) -> None:
    """The four parts must be valid configs, everything else small plain values."""
    for key, value in model_args.items():
        if key not in PARTS:
            _check_value(origin, key, value)
        elif value is not None and value is not False:
            try:
                PARTS[key].make(value)
            except (TypeError, ValueError) as error:
                raise UnsafeModelError(f"{origin} asks for {key} that do not exist: {error}") from error


def _check_value(origin: str, key: str, value: Any, nesting: int = 0) -> None:
    """One argument: plain, of bounded size, and no path."""
    if isinstance(value, str):
        if any(mark in value for mark in ("/", "\\", "..")) or len(value) > 100:
            raise UnsafeModelError(f"{origin} asks for {key}={value[:100]!r}: a path is not an argument")
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        if not abs(value) <= MAX_NUMBER:
            raise UnsafeModelError(f"{origin} asks for {key}={value}: at most {MAX_NUMBER} is allowed")
        if key in COUNTS and (value < 0 or not isinstance(value, int)):
            raise UnsafeModelError(f"{origin} asks for {key}={value}: wanted an int of at least 0")
    elif isinstance(value, (list, tuple, dict)):
        inner = list(value.values()) if isinstance(value, dict) else list(value)
        units = sum(number for number in inner if isinstance(number, int)) if key in DEPTHS else 0
        if nesting >= MAX_NESTING or max(len(inner), units) > MAX_ITEMS:
            raise UnsafeModelError(f"{origin} asks for {key} that is too large: at most {MAX_ITEMS} in all are allowed")
        for item in inner:
            _check_value(origin, key, item, nesting + 1)


def _check_defaults(origin: str, cfg: Mapping[str, Any]) -> None:
    """What timm takes from a config where no argument says otherwise."""
    classes, size = cfg.get("num_classes"), cfg.get("input_size")
    if classes is not None and type(classes) is not int:
        raise UnsafeModelError(f"{origin} asks for num_classes={classes!r}: wanted an int of at least 0")
    _check_value(origin, "num_classes", classes)
    whole = isinstance(size, (list, tuple)) and len(size) == 3 and all(type(n) is int and n > 0 for n in size)
    if size is not None and not whole:
        raise UnsafeModelError(f"{origin} asks for input_size={size!r}: wanted channels, height and width")
    _check_value(origin, "input_size", size)


def _check_size(origin: str, name: str, kwargs: Mapping[str, Any]) -> None:
    """Count the parameters on the meta device, where nothing is allocated."""
    arguments = {key: value for key, value in kwargs.items() if key not in NOT_COUNTED}
    cfg = {**kwargs["pretrained_cfg"], "source": ""}  # timm takes classes and channels from it
    with torch.device("meta"):
        model = timm.create_model(name, pretrained_cfg=cfg, **arguments)
    count = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    if count > MAX_PARAMETERS:
        raise UnsafeModelError(f"{origin} asks for {count:,} parameters: at most {MAX_PARAMETERS:,} are allowed")


def _asked_by(folder: Path) -> Mapping[str, Any]:
    """What the config of a folder says of its weights; timm has replaced that by the folder."""
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    asked: Mapping[str, Any] = config.get("pretrained_cfg", config)
    return asked


def _check_files(origin: str, asked: Mapping[str, Any]) -> None:
    """Weights lie beside the config and nowhere else."""
    if asked.get("hf_hub_filename") not in (None, WEIGHTS):
        raise UnsafeModelError(f"{origin} asks for weights in {asked['hf_hub_filename']!r}: wanted {WEIGHTS!r}")
    for key in ("file", "url", "state_dict"):
        if asked.get(key):
            raise UnsafeModelError(f"{origin} asks for weights outside of it ({key}): wanted {WEIGHTS!r} beside it")
    if asked.get("custom_load"):
        raise UnsafeModelError(f"{origin} asks for weights in a format of its own: wanted {WEIGHTS!r}")
