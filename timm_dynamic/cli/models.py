"""From a name to a model: registered with timm, in a folder (`local-dir:`) or on the Hub (`hf-hub:`)."""

import difflib
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from urllib.error import URLError

import timm
import torch
import typer
from safetensors import SafetensorError
from timm.models import parse_model_name
from torch import nn

from .. import add_channel_gates, add_layer_gates, set_budget
from ..hub import HubError, hub_errors
from ..registry import METHODS
from ..safety import CONFIG, WEIGHTS
from .errors import BadInput, Failed, bad_input, one_line

ADD = {"layer_gates": add_layer_gates, "channel_gates": add_channel_gates}
# what wrong files can lead to
DAMAGE = (OSError, RuntimeError, TypeError, ValueError, KeyError, AttributeError, SafetensorError)


def split_name(name: str) -> tuple[str | None, str]:
    """Method and base of an architecture's name: ("iadi", "resnet50"), or (None, name) for a plain network."""
    method, _, base = name.partition("_")
    return (method, base) if method in METHODS and timm.is_model(base) else (None, name)


def load(
    name: str, *, pretrained: bool, layer_gates: str | None = None, channel_gates: dict[str, Any] | None = None
) -> nn.Module:
    """A model in eval mode.

    Args:
        name: a registered name, with or without a tag, `local-dir:FOLDER` or `hf-hub:ORG/NAME`.
        pretrained: whether to load its trained weights; without, they are random.
        layer_gates: kind of layer gates that it is to have in the place of its own.
        channel_gates: config of channel gates likewise.

    Raises:
        BadInput: if there is no such model, it has no weights, or its files are damaged.
        Failed: if the Hub cannot be reached.
    """
    parts = {"layer_gates": layer_gates, "channel_gates": channel_gates}
    return _load(name, pretrained=pretrained, parts=parts, shapes_only=False)


def load_shapes(name: str, *, layer_gates: str | None = None) -> nn.Module:
    """A model without any weights, for what can be told from its shapes; as `load` else."""
    return _load(name, pretrained=False, parts={"layer_gates": layer_gates}, shapes_only=True)


def _load(name: str, *, pretrained: bool, parts: dict[str, Any], shapes_only: bool) -> nn.Module:
    wanted = {part: config for part, config in parts.items() if config is not None}
    with bad_input():
        source, place = parse_model_name(name)
    if source is None:
        _check_registered(place)
    elif source == "local-dir":
        _check_folder(Path(place), pretrained)
    meta = shapes_only and source is None  # a saved model's budget is checked while it is made, which needs values
    with torch.device("meta") if meta else nullcontext():
        model = _create(name, pretrained)
        instead = {part: config for part, config in wanted.items() if hasattr(model, part)}
        if instead:
            model = _create(name, pretrained, **instead)
        for part in wanted.keys() - instead.keys():
            with bad_input():
                ADD[part](model, wanted[part])
    return model.eval()


def _create(name: str, pretrained: bool, **parts: Any) -> nn.Module:
    """timm's `create_model`, its errors in one line."""
    try:
        with hub_errors(name.removeprefix("hf-hub:")), _notes(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return timm.create_model(name, pretrained=pretrained, **parts)
    except HubError as error:
        raise Failed(one_line(error)) from error
    except URLError as error:
        raise Failed(f"the weights of {name} cannot be downloaded: check the network ({error.reason})") from error
    except DAMAGE as error:
        text = one_line(error)
        if text.startswith("No pretrained weights exist"):
            text = "no trained weights are published: give --no-pretrained, or local-dir:FOLDER for weights of your own"
        raise BadInput(f"{name}: {text}") from error


def _check_registered(name: str) -> None:
    """Raise unless timm knows the name, its tag aside; name those that it may have been meant for."""
    plain = name.partition(".")[0]
    if timm.is_model(plain):
        return
    if Path(name).is_dir():
        raise BadInput(f"no model {name!r}: for a folder write local-dir:{name}")
    close = difflib.get_close_matches(plain, timm.list_models(), n=3)
    hint = f"did you mean {' or '.join(close)}?" if close else "`timm-dynamic list` shows the names"
    raise BadInput(f"no model {name!r}: {hint}")


def _check_folder(folder: Path, pretrained: bool) -> None:
    """Raise unless a folder holds a saved model."""
    if not folder.is_dir():
        raise BadInput(f"no folder {folder}")
    for name in (CONFIG, WEIGHTS) if pretrained else (CONFIG,):
        if not (folder / name).is_file():
            raise BadInput(f"{folder} holds no {name}: the folder of a run or of save_pretrained is needed")


class _OnStderr(logging.Handler):
    """Log lines as plain lines on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        typer.echo(f"note: {self.format(record)}", err=True)


@contextmanager
def _notes() -> Iterator[None]:
    """Show what the package logs, such as that gates are not trained yet."""
    logger, handler = logging.getLogger("timm_dynamic"), _OnStderr(logging.INFO)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def restrict(
    model: nn.Module,
    input_size: tuple[int, int, int],
    fraction: float | None,
    exit: int | None,
    confidence: float | None,
) -> None:
    """Set a budget if one is given; else the model keeps the one that it was saved with.

    Raises:
        BadInput: if more than one is given, or the model cannot keep it.
    """
    given = {"fraction": fraction, "exit": exit, "confidence": confidence}
    given = {name: value for name, value in given.items() if value is not None}
    if not given:
        return
    if len(given) > 1:
        raise BadInput("give only one of --budget-fraction, --exit and --confidence")
    with bad_input():
        set_budget(model, **given, input_size=input_size)  # type: ignore[arg-type]


def pick_device(wanted: str | None) -> str:
    """The device to run on: what is asked for, else CUDA if there is any.

    Raises:
        BadInput: if there is no such device.
    """
    if wanted is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    with bad_input(RuntimeError, AssertionError, about=f"--device {wanted}"):
        torch.zeros(1, device=wanted).sum().item()
    return wanted
