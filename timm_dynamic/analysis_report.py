"""The papers' analyses of one network on a set of images, as a page that needs nothing else and as numbers."""

from __future__ import annotations

import copy
import dataclasses
import html
import platform
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from . import families
from .analyses import Loader, Watch, by_class, observe, rank_correlation, reliability, scale_sweep
from .budgets import set_budget
from .claims import NOT_RUN, Evidence, Judged, Study, dataset_of, judge_all
from .evaluation import costs_of
from .exchange import Exchange, exchange
from .feature_change import MAP_IMAGES, maps, own_changes, random_changes
from .forward import decide
from .gates import gates_choose
from .inference import optimize_for_inference
from .paper_claims import PAPER_CLAIMS
from .report import page, percent, table
from .sections_cost import (
    Section,
    cost_section,
    decisions_section,
    paragraph,
    reduction_section,
    time_section,
    training,
    units_section,
)
from .sections_images import (
    Pixels,
    classes_section,
    confidence_section,
    features_section,
    looks_section,
    scales_section,
)
from .surgery import strip
from .trade_off import (
    FRACTIONS,
    Network,
    Point,
    budget_points,
    calibrated,
    calibrated_point,
    cheapest_equal,
    exit_points,
    own_point,
    time_side_by_side,
)

TIMED_IMAGES = 16
NO_HELD_OUT = (
    "Not measured: calibrate's targets. Give --held-out N, the number of training images that the recipe held out by "
    "--holdout N: thresholds are calibrated on those and measured on the images of this report."
)


@dataclass(frozen=True)
class Images:
    """The images that networks are looked at with.

    Attributes:
        loader: all of them, batches of images [B, C, H, W] and classes [B], as often as it is asked.
        few: some of them, drawn at random, for what takes many passes.
        classes: names of the classes.
        mean: of each channel, by which images are normalised.
        std: likewise.
        pixels: an image by its place: [C, H, W], 0..1.
        about: what they are, in words.
        held_out: batches of training images that were held out, and what is known of that; None if there are none.
    """

    loader: Loader
    few: Loader
    classes: Sequence[str]
    mean: Sequence[float]
    std: Sequence[float]
    pixels: Pixels
    about: str
    held_out: tuple[Loader, str] | None = None


@dataclass(frozen=True)
class Subject:
    """A network, and what is known of the run that trained it.

    Attributes:
        name: what it is called in the report.
        model: in eval mode.
        settings: of the run.
        summary: of the run, or what its weights were saved with.
        metrics: rows of metrics.jsonl.
        base: the trained dense network that it was made from.
        loader: all images as this network wants them prepared; None: as the report's network does.
    """

    name: str
    model: nn.Module
    settings: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    metrics: Sequence[dict[str, Any]] = ()
    base: nn.Module | None = None
    loader: Loader | None = None


@dataclass(frozen=True)
class Analysis:
    """The report's content."""

    title: str
    intro: str
    sections: Sequence[Section]

    def html(self) -> str:
        """The whole page."""
        links = " ".join(f'<a href="#{one.key}">{html.escape(one.title)}</a>' for one in self.sections)
        parts = [paragraph(self.intro), f"<nav>{links}</nav>", *(one.html() for one in self.sections)]
        return page(self.title, parts)

    def figures(self) -> dict[str, str]:
        """Each figure as the text of an SVG file, by its name: "cost", "training-1", "training-2"."""
        found: dict[str, str] = {}
        for one in self.sections:
            drawings = re.findall(r"<svg.*?</svg>", one.html(), re.DOTALL)
            names = [one.key] if len(drawings) == 1 else [f"{one.key}-{k}" for k in range(1, len(drawings) + 1)]
            found |= {name: f"{text}\n" for name, text in zip(names, drawings, strict=True)}
        return found

    def numbers(self) -> dict[str, Any]:
        """JSON values: what the tables show."""
        return {"title": self.title, **{one.key: one.numbers for one in self.sections}}


def analyse(
    subject: Subject,
    beside: Sequence[Subject],
    images: Images,
    studies: Sequence[Study] = (),
    *,
    targets: Sequence[float] = FRACTIONS,
    rounds: int = 32,
    watch: Watch = lambda text: None,
) -> Analysis:
    """Make all analyses.

    Args:
        subject: the network that the report is about.
        beside: other networks on the same images.
        images: what to look at them with.
        studies: what other commands measured, for the table of claims.
        targets: shares of the dense MACs to calibrate to.
        rounds: timed runs of each network.
        watch: is told what is done next.

    Raises:
        ValueError: if there are no images, or too few are held out.
        ImportError: if matplotlib or scipy is missing.
    """
    work = Work(subject, beside, images, targets, watch)
    sections = [*work.cost(), work.units(), work.decisions(), work.looks()]
    sections += [work.scales(), work.classes(), work.features(), training(subject.metrics, work.dense_macs)]
    sections += [work.confidence(), work.time(rounds)]
    sections.append(_claims_section(judge_all(work.evidence(studies), PAPER_CLAIMS), studies))
    found = work.network.evaluation
    intro = (
        f"{images.about[0].upper()}{images.about[1:]}. {subject.name} reaches {percent(found.accuracy, 2)} at "
        f"{percent(found.macs / work.dense_macs)} of the dense network's multiply-adds"
        + (f"; its dense base reaches {percent(work.dense[0], 2)}." if work.dense else ".")
    )
    return Analysis(f"{subject.name}: what it does, and what the papers claim", intro, sections)


class Work:
    """What is measured, and what later parts need of it; `dense` are accuracy and MACs of the dense base."""

    def __init__(
        self,
        subject: Subject,
        beside: Sequence[Subject],
        images: Images,
        targets: Sequence[float] = FRACTIONS,
        watch: Watch = lambda text: None,
    ) -> None:
        """Look at all images with each network; for the arguments see `analyse`."""
        self.subject, self.images, self.targets, self.watch = subject, images, targets, watch
        self.network = self._look(subject)
        self.beside_subjects = beside
        self.beside = [self._look(one) for one in beside]
        self.dense_macs = float(self.network.evaluation.dense_macs)
        base = subject.base
        self.base = None if base is None else self._look(Subject("dense base", base))
        self.dense = self._dense()
        self.points: list[Point] = []
        self.known: dict[str, Any] = {}  # what the claims are judged by
        self.moved: list[tuple[float, nn.Module]] = []

    def _look(self, subject: Subject) -> Network:
        self.watch(f"{subject.name}: all images")
        images = self.images
        found = observe(subject.model, subject.loader or images.loader, images.mean, images.std)
        return Network(subject.name, subject.model, found, subject.settings)

    def _dense(self) -> tuple[float, float] | None:
        """Accuracy and MACs of the dense base: measured if it is there, else as noted with the weights."""
        self.noted = False
        if self.base is not None:
            return self.base.evaluation.accuracy, self.base.evaluation.macs
        wanted = _base_name(self.subject.model)
        for one in self.beside:
            if not one.dynamic and families.model_name(one.model) == wanted:
                return one.evaluation.accuracy, one.evaluation.macs
        noted, self.noted = self.subject.summary.get("dense"), True
        return (float(noted["accuracy"]), float(noted["macs"])) if noted else None

    def cost(self) -> list[Section]:
        """Accuracy over cost, and what is saved."""
        self.points = [own_point(self.network), *exit_points(self.network)]
        missing = ""
        if self.network.dynamic:
            self.watch("hard budgets")
            self.points += budget_points(self.network, self.images.loader, self.images.mean, self.images.std)
            missing = self._calibrate()
        for one in self.beside:
            self.points += [own_point(one), *exit_points(one)]
        best = None
        if self.dense is not None:
            own = [point for point in self.points if point.network == self.network.name and self.network.dynamic]
            best = cheapest_equal(own, self.dense[0])
        self.known["equal"] = best
        section = cost_section(self.network.name, self.points, self.dense, missing)
        return [section, reduction_section(self.points, self.dense, self.noted)]

    def _calibrate(self) -> str:
        """Add what calibrate's targets give; what is to be said of it."""
        if self.images.held_out is None:
            return NO_HELD_OUT
        loader, about = self.images.held_out
        self.watch(f"calibrating on {about}")
        self.moved = calibrated(self.network, loader, self.targets)
        for fraction, model in self.moved:
            self.watch(f"calibrated to {100 * fraction:.0f} %")
            images = self.images
            point = calibrated_point(self.network.name, fraction, model, images.loader, images.mean, images.std)
            self.points.append(point)
        met = ", ".join(f"{100 * fraction:.0f}" for fraction, _ in self.moved) or "none"
        return f"Calibrated on {about}, measured on the images of this report. Targets in reach: {met} % of the MACs."

    def units(self) -> Section:
        """Skip ratio of every unit."""
        return units_section(self.network, self.beside)

    def decisions(self) -> Section:
        """How much depends on the image."""
        exchanged: dict[str, Exchange] = {}
        for subject, network in zip((self.subject, *self.beside_subjects), (self.network, *self.beside), strict=True):
            self.watch(f"{network.name}: decisions exchanged between images")
            found = exchange(network.model, subject.loader or self.images.loader, network.observed)
            exchanged |= {network.name: found} if found is not None else {}
        return decisions_section(self.network, self.subject.summary, exchanged)

    def looks(self) -> Section:
        """Easy and hard images."""
        section, found, alike = looks_section(self.network.observed, self.images.pixels)
        self.known |= {"looks": found, "alike": alike and self.network.observed.word is not None}
        return section

    def scales(self) -> Section:
        """Units run over input scale."""
        word = self.network.observed.word
        if word is not None:
            self.watch("input scales")
            self.known["scales"] = scale_sweep(set_budget(copy.deepcopy(self.network.model)), self.images.loader)
        return scales_section(self.known.get("scales", ()), word, gates_choose(self.network.model))

    def classes(self) -> Section:
        """Skipped units and accuracy of each class."""
        observed = self.network.observed
        rows = by_class(observed, self.images.classes) if observed.word else []
        rank = rank_correlation([row.accuracy for row in rows], [row.mean_skipped for row in rows])
        self.known |= {"classes": rows, "class_rank": rank}
        return classes_section(observed, rows, rank)

    def features(self) -> Section:
        """Feature change."""
        self.watch("feature change")
        base = self.subject.base
        trunk = self.network.model if base is None else base
        few = self.images.few
        random = random_changes(trunk, few)
        gated = self.network.observed.word is not None
        own = own_changes(self.network.model, few) if gated else []
        self.known["changes"] = random
        x = next(iter(few))[0][:MAP_IMAGES].to(_device(trunk))
        return features_section(
            random, own, maps(trunk, x), "the dense base" if base is not None else self.network.name
        )

    def confidence(self) -> Section:
        """Reliability of every exit; of the dense base too, if it is there."""
        found = []
        for one in (self.network, *([self.base] if self.base is not None else [])):
            names = [f"exit {k}" for k in range(len(one.observed.table.exits) - 1)] + ["head"]
            for k, name in enumerate(names):
                shown = name if one is self.network else f"{one.name}, {name}"
                found.append(reliability(shown, one.observed.rows["sure"][:, k], one.observed.rows["right"][:, k]))
        return confidence_section(found)

    def time(self, rounds: int) -> Section:
        """Milliseconds beside MACs."""
        self.watch("timing")
        x = next(iter(self.images.few))[0][:TIMED_IMAGES].to(_device(self.network.model))
        x = x.contiguous(memory_format=torch.channels_last)
        chosen: dict[str, nn.Module] = {"dense": _bare(self.network.model)}
        if self.network.dynamic:
            chosen[self.network.name] = self.network.model
        for k in range(len(self.network.observed.table.exits) - 1):
            chosen[f"all leave at exit {k}"] = set_budget(copy.deepcopy(self.network.model), exit=k)
        chosen |= {f"calibrated to {100 * fraction:.0f} %": model for fraction, model in self.moved}
        chosen |= {one.name: one.model for one in self.beside}
        models = {}
        for name, model in chosen.items():
            models[name] = optimize_for_inference(model), _mean_macs(model, x) / self.dense_macs
        threads = torch.get_num_threads()
        device = x.device.type if x.device.type != "cpu" else platform.machine()
        return time_section(time_side_by_side(models, x, rounds, threads), len(x), threads, device)

    def evidence(self, studies: Sequence[Study]) -> Evidence:
        """What the claims are judged by."""
        dataset = dataset_of(self.subject.settings, self.images.classes)
        return Evidence(self.network, dataset, self.beside, self.dense, studies=studies, **self.known)


def _base_name(model: nn.Module) -> str:
    """Name of the stock network that a dynamic one is made from: "resnet20_cifar"."""
    prefix, _, base = families.model_name(model).partition("_")
    return base if prefix in ("skipnet", "iadi", "ddi") else f"{prefix}_{base}".rstrip("_")


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _bare(model: Any) -> nn.Module:
    """The stock network in a copy of a model."""
    bare = copy.deepcopy(model)
    return strip(bare) if hasattr(bare, "dynamic") else bare


@torch.no_grad()
def _mean_macs(model: Any, x: Tensor) -> float:
    """Mean MACs of some images [N, C, H, W]."""
    if not hasattr(model, "dynamic"):
        return float(costs_of(model, (x.shape[1], x.shape[2], x.shape[3])).dense)
    return decide(model, x).macs.double().mean().item()


# Claims --------------------------------------------------------------------------------------------------------------


def _claims_section(rows: Sequence[Judged], studies: Sequence[Study]) -> Section:
    """The papers' claims beside our numbers, and what studies judged themselves."""
    lines = [_line(("claim and command", "our number", "found", "source"), "th")]
    for one in rows:
        claim = f"{html.escape(one.claim)}<br><code>{html.escape(one.command)}</code>"
        found = html.escape(one.found) if one.found == NOT_RUN else f"<b>{html.escape(one.found)}</b>"
        line = _line((claim, html.escape(one.number), found, html.escape(one.source)), "td")
        lines.append(line.replace("<tr>", '<tr class="none">', 1) if one.found == NOT_RUN else line)
    parts = ['<div class="scroll"><table class="claims">', *lines, "</table></div>"]
    counts = {found: sum(one.found == found for one in rows) for found in dict.fromkeys(one.found for one in rows)}
    summary = "; ".join(f"{found}: {count}" for found, count in sorted(counts.items()))
    text = f"Of {len(rows)} claims {summary}. 'Within noise': nearer to the line than chance alone would bring it."
    parts.insert(0, paragraph(text))
    judged = [(study.title, claim) for study in studies for claim in study.claims]
    if judged:
        body = [
            (claim["text"], title, f"{100 * claim['difference']:+.2f} points", str(claim["seeds"]), claim["found"])
            for title, claim in judged
        ]
        parts += [paragraph("What the studies that were given judged themselves:")]
        parts += [table(("claim", "study", "difference", "seeds", "found"), body)]
    numbers = {"claims": [dataclasses.asdict(one) for one in rows], "studies": [{"study": t, **c} for t, c in judged]}
    return Section("claims", "The papers' claims", parts, numbers)


def _line(cells: Sequence[str], tag: str) -> str:
    """A line of a table from HTML."""
    return "<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in cells) + "</tr>"
