"""Claims: what is said, where, how our number is found, and whether it agrees."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .analyses import ClassRow, Difference, Scale
from .feature_change import Change
from .trade_off import Network, Point

AGREES, DISAGREES, NOISE, NOT_RUN = "agrees", "disagrees", "within noise", "recipe only, not run"
CIFAR10 = {"airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"}


@dataclass(frozen=True)
class Study:
    """What another command measured: `compare.py`'s comparison.json, or `timm-dynamic benchmark --train --json`.

    Attributes:
        title: what it is called.
        rows: a variant's accuracy and cost for each seed, or training steps that were timed.
        claims: that it judged itself.
    """

    title: str
    rows: list[dict[str, Any]]
    claims: list[dict[str, Any]]


def read_study(path: Path) -> Study:
    """Read a study's file.

    Raises:
        ValueError: if it holds neither a comparison nor timed training steps.
        OSError: if it cannot be read.
    """
    found = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(found, dict) and {"rows", "claims"} <= found.keys():
        return Study(str(found.get("title", path.stem)), found["rows"], found["claims"])
    if isinstance(found, list) and found and all(isinstance(row, dict) and "task" in row for row in found):
        return Study(path.stem, found, [])
    raise ValueError(
        f"{path} is no study: the comparison.json of train_recipes/compare.py, or what "
        "`timm-dynamic benchmark NAME --train --json` prints, is needed"
    )


@dataclass(frozen=True)
class Evidence:
    """What was measured; what is empty or None was not.

    Attributes:
        network: the one that the report is about.
        dataset: "cifar10" and so on, None if it is not known.
        beside: other networks on the same images.
        dense: accuracy and MACs of the dense base.
        equal: the cheapest point that is as accurate as that; None if there is none.
        looks: easy against hard images.
        alike: whether all images skip the same number of units.
        classes: rows of the classes.
        class_rank: Spearman's correlation of class accuracy with units skipped, and its p-value.
        scales: other input sizes.
        changes: what leaving out at random does to features.
        studies: of other commands.
    """

    network: Network
    dataset: str | None = None
    beside: Sequence[Network] = ()
    dense: tuple[float, float] | None = None
    equal: Point | None = None
    looks: Sequence[Difference] = ()
    alike: bool = False
    classes: Sequence[ClassRow] = ()
    class_rank: tuple[float, float] = (0.0, 1.0)
    scales: Sequence[Scale] = ()
    changes: Sequence[Change] = ()
    studies: Sequence[Study] = ()

    @property
    def networks(self) -> list[Network]:
        """All that are dynamic."""
        return [one for one in (self.network, *self.beside) if one.dynamic]


@dataclass(frozen=True)
class Outcome:
    """Our number, as it is shown, and whether it agrees."""

    number: str
    found: str


Find = Callable[[Evidence], Outcome | None]


@dataclass(frozen=True)
class PaperClaim:
    """A claim, where it stands, the command that gives our number, and how the number is found (None: not there)."""

    text: str
    source: str
    command: str
    find: Find = field(repr=False)


@dataclass(frozen=True)
class Judged:
    """A row of the table of claims."""

    claim: str
    source: str
    command: str
    number: str
    found: str


def judge_all(evidence: Evidence, claims: Sequence[PaperClaim]) -> list[Judged]:
    """Every claim with our number, or 'recipe only, not run' where nothing that was given says anything of it."""
    rows = []
    for claim in claims:
        outcome = claim.find(evidence) or Outcome("", NOT_RUN)
        rows.append(Judged(claim.text, claim.source, claim.command, outcome.number, outcome.found))
    return rows


def verdict(value: float, noise: float) -> str:
    """Whether something that is said to be above 0 is."""
    if not abs(value) > noise:
        return NOISE
    return AGREES if value > 0 else DISAGREES


def dataset_of(settings: dict[str, Any], names: Sequence[str]) -> str | None:
    """The data set as recipes call it: from a run's settings, else from the classes' names; None if unknown."""
    given = str(settings.get("dataset", "folder"))
    if given in ("cifar10", "cifar100", "svhn", "imagenet"):
        return given
    if set(names) == CIFAR10:
        return "cifar10"
    return "imagenet" if len(names) == 1000 else None
