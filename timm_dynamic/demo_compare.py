"""What the demo shows, without the page: one image through a dynamic network and through a dense one."""

import copy
import math
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from PIL import Image
from timm.models import parse_model_name
from torch import Tensor, nn

from .budgets import set_budget
from .cli.errors import BadInput, bad_input
from .cli.images import Preparation, class_names
from .cli.models import load, split_name
from .cli.rows import Row, likeliest, predict
from .costs import CostTable
from .evaluation import latency
from .gates import gate_parts
from .inference import optimize_for_inference
from .safety import CONFIG, WEIGHTS
from .shipped import config_of
from .surgery import strip
from .walk import dynamic_of, table_for

DEFAULT = "ddi_resnet38_cifar.cifar10_anytime"  # the network that is shown if none is named
SAME_WEIGHTS = "the same weights with every unit run: no gates, no exits"
STOCK = "the stock network, trained without gates"
RUNS = 5  # of each network, of which the median is taken
TIMED_SECONDS, MOST_TRIES = 0.6, 20  # for how long that is tried again


class Pair(NamedTuple):
    """A dynamic network and the dense one beside it, as `demo.make_app` takes them.

    Attributes:
        dynamic: the dynamic network.
        dense: a trained stock network; None for the dynamic one's own weights without gates.
        about_dense: what the dense network is, for the visitor.
        name: of the dynamic network, for the visitor; None for a folder, whose name is nobody's business.
    """

    dynamic: nn.Module
    dense: nn.Module | None
    about_dense: str
    name: str | None


def load_pair(name: str | None = None) -> Pair:
    """A network by name, and the trained stock network that it was made from, if that lies beside it.

    Args:
        name: a registered name with a tag, `local-dir:FOLDER` or `hf-hub:ORG/NAME`; None for `DEFAULT`.

    Raises:
        BadInput: if there is no such network, or it is a dense one.
        Failed: if the Hub is needed and cannot be reached.
    """
    wanted = name or DEFAULT
    _check_dynamic(wanted)
    try:
        model = load(wanted, pretrained=True)
    except BadInput as error:
        if name is None:
            raise BadInput(
                f"the network shown by default is not here ({error}): give a NAME, such as local-dir:FOLDER of a run"
            ) from error
        raise
    with bad_input(about=wanted):
        dynamic_of(model)
    base = _base_beside(wanted)
    shown = None if parse_model_name(wanted)[0] == "local-dir" else wanted
    if base is None:
        return Pair(model, None, SAME_WEIGHTS, shown)
    return Pair(model, load(base, pretrained=True), STOCK, shown)


def _check_dynamic(name: str) -> None:
    """Raise for a registered dense network before its weights are looked for."""
    with bad_input():
        source, place = parse_model_name(name)
    plain = place.partition(".")[0]
    if source is None and timm.is_model(plain) and split_name(plain)[0] is None:
        raise BadInput(f"{name} is a dense network: a dynamic one is wanted, such as ddi_{plain}")


def _base_beside(name: str) -> str | None:
    """Name of the trained stock network of a dynamic one, if its weights are on this machine."""
    source, place = parse_model_name(name)
    if source == "local-dir":
        folder = Path(place) / "base"
        return f"local-dir:{folder}" if all((folder / part).is_file() for part in (CONFIG, WEIGHTS)) else None
    if source is not None:
        return None
    base = split_name(place.partition(".")[0])[1]
    found = [full for full in timm.list_pretrained(base + ".*") if _data(full) == _data(place) and _is_here(full)]
    return max(found, key=_accuracy, default=None)  # the strongest of them is what a user would take instead


def _data(full: str) -> str:
    """What a tag says of the data: cifar10 of resnet20_cifar.cifar10_60epochs."""
    return full.partition(".")[2].partition("_")[0]


def _is_here(full: str) -> bool:
    file = getattr(timm.get_pretrained_cfg(full), "file", None)
    return bool(file) and Path(str(file)).is_file()


def _accuracy(full: str) -> float:
    """What a shipped network recognised when it was measured; 0 if that is not known."""
    return float((config_of(full) or {}).get("metrics", {}).get("accuracy", 0))


@dataclass(frozen=True)
class Knob:
    """What the slider sets.

    Attributes:
        kind: "budget": percent of the dense MACs that no image may cost more than; "threshold": the probability from
            which on gates keep.
        low: of the slider; for a budget the smallest that is possible.
        high: of the slider.
        step: of the slider.
        start: where it stands at first; there a threshold is the network's own, whatever its further digits.
    """

    kind: str
    low: float
    high: float
    step: float
    start: float

    def within(self, value: float | None) -> float:
        """The nearest place of the slider; where it stands at first for None."""
        return self.start if value is None else min(max(value, self.low), self.high)


def knob_of(model: Any, table: CostTable) -> Knob:
    """A hard budget where there are exits to leave at; else only the gates' threshold can be moved."""
    if hasattr(model, "exits"):
        low = math.ceil(100 * table.exits[0].dearest / table.dense)
        most = math.ceil(100 * table.exits[-1].dearest / table.dense)  # less where units are shut for good
        high = max(min(100, most), low + 1)
        return Knob("budget", low, high, 1, min(high, max(low, 5 * round((low + high) / 10))))
    levels = {round(value, 6) for part in gate_parts(model) for value in part.threshold.flatten().tolist()}
    own = levels.pop() if len(levels) == 1 else 0.5
    return Knob("threshold", 0.0, 1.0, 0.01, min(max(round(own, 2), 0.0), 1.0))


@dataclass(frozen=True)
class Outcome:
    """One image through both networks.

    Attributes:
        dynamic: what `cli.rows.predict` tells of the dynamic network.
        dense: the likeliest classes by the dense network.
        ms: milliseconds of the dynamic network, one image alone: the median of `RUNS`.
        dense_ms: of the dense one, in turns with it.
        tries: how often that was measured; the quietest try counts.
        seen: the part of the image that the networks look at, in the size that they take.
    """

    dynamic: Row
    dense: list[Row]
    ms: float
    dense_ms: float
    tries: int
    seen: Image.Image


class Comparison:
    """A dynamic network beside a dense one, both optimised; images go through one at a time.

    It works on copies: the networks that it is made from are not changed. Calls from several threads wait for each
    other, so that nobody's setting or timing meets another's.
    """

    def __init__(self, model: Any, dense: Any = None) -> None:
        """Make the copies.

        Args:
            model: a dynamic model made by timm.
            dense: a stock model of the same classes and input; None for the model's own weights without gates.

        Raises:
            BadInput: if `model` is a stock one, `dense` is none, they do not match, or the input is no image.
        """
        with bad_input():
            dynamic_of(model)
        self._check_dense(model, dense)
        self.prepare, self.labels = Preparation(model), class_names(model)
        self.table = table_for(model, self.prepare.input_size)
        self.knob = knob_of(model, self.table)
        self.name = str(model.pretrained_cfg.get("architecture") or type(model).__name__)
        self.dense = optimize_for_inference(dense if dense is not None else strip(copy.deepcopy(model)))
        self._fast = optimize_for_inference(model)
        self._fast.dynamic.forced = None
        self._own = [gates.threshold.clone() for gates in gate_parts(self._fast)]
        self._lock = threading.Lock()

    @staticmethod
    def _check_dense(model: Any, dense: Any) -> None:
        if dense is None:
            return
        if hasattr(dense, "dynamic"):
            raise BadInput("a dense network is wanted beside the dynamic one; found another dynamic one")
        if dense.num_classes != model.num_classes:
            raise BadInput(f"the dense network must know {model.num_classes} classes; found {dense.num_classes}")

    def __call__(self, image: Image.Image, setting: float | None = None) -> Outcome:
        """One image through both networks.

        Args:
            image: RGB, of any size.
            setting: of the knob; None for where it stands at first. Values outside its range are moved into it.
        """
        x = self.transform(image)
        with self._lock, torch.inference_mode():
            self._set(self.knob.within(setting))
            row = predict(self._fast, x, self.labels)
            dense = likeliest(self.dense(x[None])[0], self.labels)
            ms, dense_ms, tries = self._times(x)
        return Outcome(row, dense, ms, dense_ms, tries, self._picture(x))

    def transform(self, image: Image.Image) -> Tensor:
        """The image as the networks take it: [C, H, W]."""
        return self.prepare.transform(image.convert("L" if self.prepare.input_size[0] == 1 else "RGB"))

    def _set(self, value: float) -> None:
        if self.knob.kind == "budget":
            set_budget(self._fast, fraction=value / 100, input_size=self.prepare.input_size)
            return
        with torch.inference_mode(False):
            for gates, own in zip(gate_parts(self._fast), self._own, strict=True):
                # where the slider starts it is rounded, and there can be one for each unit
                gates.threshold.copy_(own if value == self.knob.start else torch.full_like(own, value))

    def _times(self, x: Tensor) -> tuple[float, float, int]:
        """Milliseconds of both, and how many tries there were: other work on the machine spoils some of them."""
        both = {"dynamic": self._fast, "dense": self.dense}
        tries: list[dict[str, float]] = []
        end = time.perf_counter() + TIMED_SECONDS
        while not tries or (len(tries) < MOST_TRIES and time.perf_counter() < end):
            tries.append(latency(both, x[None], RUNS))
        quietest = min(tries, key=lambda found: sum(found.values()))
        return quietest["dynamic"], quietest["dense"], len(tries)

    def _picture(self, x: Tensor) -> Image.Image:
        """What was seen, normalisation undone."""
        config = self.prepare.transform.transforms[-1]
        mean, std = (torch.as_tensor(values).view(-1, 1, 1) for values in (config.mean, config.std))
        pixels = ((x * std + mean).clamp(0, 1) * 255).round().to(torch.uint8)
        pixels = pixels.permute(1, 2, 0)
        return Image.fromarray((pixels.squeeze(2) if len(x) == 1 else pixels).numpy())
