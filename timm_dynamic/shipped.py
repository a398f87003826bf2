"""The trained models that ship with the package: one folder each in `weights/`, named as timm names them with a tag.

A folder holds what a repository on the Hub would hold, `model.safetensors` and `config.json`: it can be loaded as
`local-dir:FOLDER`, and uploaded as it is. What lies there is registered; no list is kept beside it.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
from timm.models import PretrainedCfg
from timm.models._hub import load_model_config_from_path

from .safety import CONFIG, PARTS, WEIGHTS

FOLDER = Path(__file__).with_name("weights")
# Models whose weights are to come from the Hub in the place of the folder: {"NAME.TAG": "org/repository"}.
ON_HUB: dict[str, str] = {}


def shipped() -> dict[str, dict[str, PretrainedCfg]]:
    """The models in the folder: their configs for timm, by architecture and tag.

    The most accurate of an architecture stands first: timm takes that where no tag is given.
    """
    folders = [path.parent for path in sorted(FOLDER.glob(f"[!.]*/{CONFIG}"))]
    found: dict[str, dict[str, PretrainedCfg]] = {}
    for folder in sorted(folders, key=_accuracy, reverse=True):  # equal ones stay in alphabetical order
        name, _, tag = folder.name.partition(".")
        found.setdefault(name, {})[tag] = _pretrained_cfg(folder)
    return dict(sorted(found.items()))


def names() -> list[str]:
    """The models in the folder, each as "architecture.tag"."""
    return [f"{name}.{tag}" for name, tags in shipped().items() for tag in tags]


def folder_of(full: str) -> Path:
    """The folder of a shipped model, or where it would be.

    Args:
        full: "architecture.tag".
    """
    return FOLDER / full


def config_of(full: str) -> dict[str, Any] | None:
    """The content of a shipped model's `config.json`; None if there is no such model.

    Args:
        full: "architecture.tag".
    """
    path = folder_of(full) / CONFIG
    if "." not in full or not path.is_file():
        return None
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return config


def _accuracy(folder: Path) -> float:
    """The accuracy on the card of a shipped model, a dynamic one's without a budget; 0 if it has none."""
    metrics = (config_of(folder.name) or {}).get("metrics") or {}
    return float(metrics.get("dynamic", metrics).get("accuracy") or 0.0)


def _pretrained_cfg(folder: Path) -> PretrainedCfg:
    """What timm is to know of a model: how images are prepared, its classes, where its weights are."""
    values, _, _ = load_model_config_from_path(folder)
    places = ("file", "source")  # timm's way of loading a folder; here the weights are one tag among others
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k not in places}
    repository = ON_HUB.get(folder.name)
    if repository is not None:
        return PretrainedCfg(**fields, hf_hub_id=repository, hf_hub_filename=WEIGHTS)
    return PretrainedCfg(**fields, file=str(folder / WEIGHTS))


# Arguments -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Saved:
    """What weights were saved with, beside what is asked for.

    Attributes:
        kwargs: arguments to build the network with.
        missing: parts of it that the weights do not hold.
        unused: parts that they hold and it has not.
        budget: whether the budget is theirs.
    """

    kwargs: dict[str, Any]
    missing: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    budget: bool = False


def with_saved_arguments(name: str, pretrained: bool, kwargs: Mapping[str, Any]) -> Saved:
    """Build a network as its weights need it: what it was saved with holds where nothing else is asked for.

    A shipped model's arguments hold if its weights are loaded, or its tag was given. A part that is asked for as
    False is left out; one that the weights do not hold starts afresh.

    Args:
        name: of the entry point.
        pretrained: whether weights are to be loaded.
        kwargs: what timm passes to the entry point.

    Raises:
        ValueError: if the weights hold a part of another kind than is asked for.
    """
    kwargs = dict(kwargs)
    saved = kwargs.get("pretrained_model_args") or _shipped_arguments(name, pretrained, kwargs.get("pretrained_cfg"))
    if not saved:
        return Saved(kwargs)
    parts = [part for part in PARTS if part != "budget" and saved.get(part) is not None]
    if pretrained:
        for part in parts:
            _check_part(name, part, saved[part], kwargs.get(part))
    built = {**saved, **{key: value for key, value in kwargs.items() if value is not None}}
    built |= {part: saved[part] for part in parts if kwargs.get(part) is True and saved[part]}
    missing = tuple(part for part in parts if built[part] is not False and not saved[part])
    unused = tuple(part for part in parts if built[part] is False and saved[part])
    theirs = built.get("budget") is not None and built["budget"] == saved.get("budget")
    return Saved({**built, "pretrained_model_args": dict(saved)}, missing, unused, theirs)


def _shipped_arguments(name: str, pretrained: bool, cfg: Any) -> dict[str, Any]:
    """The arguments that a shipped model was saved with; none if the weights are others.

    Args:
        name: the architecture.
        pretrained: whether weights are to be loaded.
        cfg: a tag, a config, or None for the default's.
    """
    if isinstance(cfg, str):
        tag: Any = cfg
    elif not pretrained:
        return {}
    else:
        cfg = cfg or timm.get_pretrained_cfg(name)
        tag = cfg.get("tag") if isinstance(cfg, dict) else getattr(cfg, "tag", None)
        if isinstance(cfg, dict) and cfg.get("source") in ("local-dir", "hf-hub"):
            return {}
    config = config_of(f"{name}.{tag}")
    arguments = config["model_args"] if config is not None else {}
    return {key: value for key, value in arguments.items() if key != "num_classes"}  # that is in the config for timm


def _check_part(name: str, part: str, saved: Any, asked: Any) -> None:
    """Raise a `ValueError` unless weights with a part suit the part that is asked for."""
    if not saved or asked is None or asked is False or asked is True:
        return
    own, other = (PARTS[part].make(value).to_dict() for value in (saved, asked))
    odd = [key for key in own if key not in ("init", "shut", "open", "settled") and own[key] != other[key]]
    if odd:
        there, wanted = (", ".join(f"{key}={values[key]!r}" for key in odd) for values in (own, other))
        raise ValueError(
            f"the weights of {name} have {part} with {there}; found {part} with {wanted}: leave {part}= out, give "
            f"{part}=False for none, or start from the base's weights"
        )
