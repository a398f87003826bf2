"""What a network does with each of many images, and what that tells: looks, classes, scales, confidence."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .costs import CostTable
from .evaluation import Rows, at_exits, costs_of, rows_of
from .forward import decide
from .gates import gates_choose
from .walk import Log, Walk

Loader = Iterable[tuple[Tensor, Tensor]]  # can be gone through again and again
LOOKS = ("brightness", "contrast", "sharpness")
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
SCALES = (0.5, 0.75, 1.0, 1.25, 1.5)
GROUP = 0.1  # share of the images that are called easy, and hard
BINS = 15
LEAST_P = 1e-9  # smaller ones are not told apart
SURE = 0.05  # p-values below this are no chance


@dataclass(frozen=True)
class Observed:
    """What a network did with each of N images, under its own budget.

    Attributes:
        table: the network's costs.
        rows: of `rows_of`, and ``classes`` [N]; ``looks`` [N, 3], see `looks`; for each exit, the head last, whether or
            not the image left there: ``sure`` [N, exits], ``right`` [N, exits], ``spent`` [N, exits] (MACs).
    """

    table: CostTable
    rows: Rows

    def __len__(self) -> int:
        return len(self.rows["classes"])

    @property
    def word(self) -> str | None:
        """What the network skips: "units", "channel groups", or None if it has no gates."""
        counts = {"units": self.rows["layers"].shape[1], "channel groups": self.rows["channels"].shape[1]}
        return next((word for word, count in counts.items() if count), None)

    @property
    def skipped(self) -> Tensor:
        """How many gated units (channel groups without layer gates) each image skipped or never reached: [N]."""
        keep = self.rows["layers"] if self.word == "units" else self.rows["channels"]
        return (~keep).sum(1)

    def channel_skip(self) -> dict[str, float]:
        """Mean share of a unit's hidden channels that is left out where the unit runs, by the unit's name."""
        found, start, gate = {}, 0, 0
        for unit in self.table.units:
            ran = self.rows["layers"][:, gate] if unit.skippable else torch.ones(len(self), dtype=torch.bool)
            gate += unit.skippable
            kept = torch.zeros(len(self))
            for sizes in unit.sizes:
                kept += self.rows["channels"][:, start : start + len(sizes)].float() @ torch.tensor(sizes).float()
                start += len(sizes)
            if unit.sizes:
                share = 1 - kept[ran] / sum(map(sum, unit.sizes))
                found[unit.name] = share.mean().item() if len(share) else math.nan
        return found


@torch.no_grad()
def observe(model: nn.Module, loader: Loader, mean: Sequence[float], std: Sequence[float]) -> Observed:
    """Run a network over a loader and note what happened to each image.

    Args:
        model: dynamic or plain, in eval mode.
        loader: batches of images [B, C, H, W], normalised by `mean` and `std`, and classes [B].
        mean: of each channel.
        std: of each channel.

    Raises:
        ValueError: if the loader holds no images.
    """
    device = next(model.parameters()).device
    found: list[Rows] = []
    table = None
    for x, y in loader:
        seen = looks(x, mean, std)
        x, y = x.to(device), y.to(device)
        table = table or costs_of(model, (x.shape[1], x.shape[2], x.shape[3]))
        rows = rows_of(model, x, y, table)
        rows |= {"layers": rows["layers"].bool(), "channels": rows["channels"].bool(), "classes": y, "looks": seen}
        rows |= at_exits(model, x, y, table) if hasattr(model, "exits") else _at_head(rows)
        found.append({key: value.cpu() for key, value in rows.items()})
    if table is None:
        raise ValueError("there are no images to look at")
    return Observed(table, {key: torch.cat([rows[key] for rows in found]) for key in found[0]})


def _at_head(rows: Rows) -> Rows:
    """What is known of the only exit."""
    kept = {"sure": "confidence", "right": "correct", "spent": "macs"}
    return {name: rows[source][:, None] for name, source in kept.items()}


# Easy and hard images ------------------------------------------------------------------------------------------------


def looks(x: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """How images look, from their luma in 0..1: its mean, its deviation, and that of its Laplacian.

    Args:
        x: images [B, 1 or 3, H, W], normalised by `mean` and `std`.
        mean: of each channel.
        std: of each channel.

    Returns:
        [B, 3], the columns of `LOOKS`.
    """
    pixels = denormalised(x, mean, std)
    weights = torch.tensor(LUMA if pixels.shape[1] == 3 else (1.0,)).reshape(1, -1, 1, 1)
    luma = (pixels * weights).sum(1, keepdim=True)  # [B, 1, H, W]
    kernel = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]])
    edges = F.conv2d(luma, kernel[None, None])
    return torch.stack([luma.mean((1, 2, 3)), luma.std((1, 2, 3)), edges.std((1, 2, 3))], 1)


def denormalised(x: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Pixels in 0..1 of images [B, C, H, W] that were normalised by the channels' `mean` and `std`."""
    shape = (1, -1, 1, 1)
    return (x.cpu().float() * torch.tensor(std).reshape(shape) + torch.tensor(mean).reshape(shape)).clamp(0, 1)


def easy_and_hard(skipped: Tensor, share: float = GROUP, seed: int = 0) -> tuple[Tensor, Tensor] | None:
    """The images with most and with fewest skipped units.

    Among images that skip the same number it is drawn who belongs, since files come sorted by class.

    Args:
        skipped: how much each image skips, [N].
        share: of the images in each group.
        seed: of the draw.

    Returns:
        Places of the easy and of the hard images, the easiest and the hardest first; None if all skip the same.
    """
    count = max(1, round(share * len(skipped)))
    order = torch.randperm(len(skipped), generator=torch.Generator().manual_seed(seed))
    order = order[skipped[order].argsort(descending=True, stable=True)]
    easy, hard = order[:count], order[-count:].flip(0)
    low, high = skipped[hard].max(), skipped[easy].min()
    if low >= high:  # a value in both groups tells nothing
        easy, hard = easy[skipped[easy] > low], hard[skipped[hard] < high]
    return (easy, hard) if len(easy) and len(hard) else None


@dataclass(frozen=True)
class Difference:
    """A quantity in two groups of images, compared by the Mann-Whitney U test.

    Attributes:
        what: the quantity.
        easy: its mean over the easy images.
        hard: over the hard ones.
        effect: how often an easy image has more of it than a hard one; 0.5 is no difference.
        p: probability of so large a difference by chance, two-sided.
        effect_in_class: `effect` after each class's own mean is taken off.
        p_in_class: `p` likewise.
    """

    what: str
    easy: float
    hard: float
    effect: float
    p: float
    effect_in_class: float
    p_in_class: float


def differences(observed: Observed, easy: Tensor, hard: Tensor) -> list[Difference]:
    """Brightness, contrast and sharpness of easy and hard images.

    Args:
        observed: all images.
        easy: places of the easy ones.
        hard: places of the hard ones.
    """
    values, classes = observed.rows["looks"].double(), observed.rows["classes"]
    inside = values.clone()
    for one in classes.unique():
        inside[classes == one] -= values[classes == one].mean(0)
    found = []
    for k, what in enumerate(LOOKS):
        plain, within = (mann_whitney(v[easy, k], v[hard, k]) for v in (values, inside))
        means = values[easy, k].mean().item(), values[hard, k].mean().item()
        found.append(Difference(what, *means, *plain, *within))
    return found


def mann_whitney(a: Tensor, b: Tensor) -> tuple[float, float]:
    """How often a value of `a` is above one of `b` (ties count half), and the two-sided p-value."""
    from scipy.stats import mannwhitneyu

    result = mannwhitneyu(a.numpy(), b.numpy(), alternative="two-sided")
    return float(result.statistic) / (len(a) * len(b)), float(result.pvalue)


def shown_p(p: float) -> str:
    """A p-value as one reads it."""
    return f"{p:.2g}" if p >= LEAST_P else f"{LEAST_P:g} or less"


# Classes -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ClassRow:
    """One class: its number and name, how often it is recognised, and how many units its images skip."""

    place: int
    name: str
    images: int
    accuracy: float
    mean_skipped: float
    median_skipped: float


def by_class(observed: Observed, names: Sequence[str]) -> list[ClassRow]:
    """A row for each class that has images.

    Args:
        observed: what the network did.
        names: of the classes.
    """
    found, skipped = [], observed.skipped.double()
    for k, name in enumerate(names):
        own = observed.rows["classes"] == k
        if own.any():
            accuracy = observed.rows["correct"][own].double().mean().item()
            values = skipped[own]
            found.append(ClassRow(k, name, int(own.sum()), accuracy, values.mean().item(), values.quantile(0.5).item()))
    return found


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> tuple[float, float]:
    """Spearman's correlation and its two-sided p-value; 0 and 1 if there is nothing to rank."""
    from scipy.stats import spearmanr

    if len(a) < 3 or len(set(a)) == 1 or len(set(b)) == 1:
        return 0.0, 1.0
    result = spearmanr(a, b)
    return float(result.statistic), float(result.pvalue)


# Scales --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scale:
    """What a network does with images of another size.

    Attributes:
        scale: of height and width; 1 is the network's own size.
        pixels: (height, width).
        accuracy: 0..1.
        ran: how many gated units (channel groups without layer gates) each image ran, [N].
        more: that less what the same image ran at scale 1, [N].
    """

    scale: float
    pixels: tuple[int, int]
    accuracy: float
    ran: Tensor
    more: Tensor


@torch.no_grad()
def scale_sweep(model: Any, loader: Loader, scales: Sequence[float] = SCALES) -> list[Scale]:
    """Run a dynamic network, without budget, on resized images (SkipNet, section 4.2).

    Images go to the head, so that what changes is what gates decide. Where nothing is left to gates they leave where
    they are sure, if the network lets them.

    Args:
        model: with gates, in eval mode and without a budget.
        loader: batches of images [B, C, H, W] and classes [B].
        scales: of height and width; 1 is added if it is not among them.
    """
    device = next(model.parameters()).device
    through = _to_the_head if gates_choose(model) else _as_sure
    scales = sorted({*scales, 1.0})
    ran: dict[float, list[Tensor]] = {scale: [] for scale in scales}
    right: dict[float, list[Tensor]] = {scale: [] for scale in scales}
    sizes: dict[float, tuple[int, int]] = {}
    for x, y in loader:
        for scale in scales:
            sizes[scale] = (max(8, round(scale * x.shape[2])), max(8, round(scale * x.shape[3])))
            resized = F.interpolate(x.to(device), sizes[scale], mode="bilinear", antialias=True) if scale != 1 else x
            count, logits = through(model, resized.to(device))
            ran[scale].append(count.cpu())
            right[scale].append(logits.argmax(1).cpu() == y)
    whole = {scale: torch.cat(parts) for scale, parts in ran.items()}
    accuracy = {scale: torch.cat(parts).double().mean().item() for scale, parts in right.items()}
    return [Scale(s, sizes[s], accuracy[s], whole[s], whole[s] - whole[1.0]) for s in scales]


def _as_sure(model: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """How many gated units each image runs before it is sure enough to leave, and the logits it leaves with."""
    decisions = decide(model, x)
    return decisions.layer_keep.sum(1), decisions.logits


def _to_the_head(model: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """How many gated units, or channel groups, each image runs on the way to the head, and its logits."""
    log = Log(len(x))
    walk = Walk(model, x, log, budgeted=False)
    last = len(walk.stops) - 1
    walk.to_exit(last)
    keep = torch.stack(log.layer_keep, 1) if log.layer_keep else torch.cat(log.channel_keep, 1)
    return keep.sum(1), walk.classify(last, walk.x)


def signed_rank(values: Tensor) -> float:
    """Two-sided p-value of Wilcoxon's signed-rank test that paired differences [N] lie around 0."""
    from scipy.stats import wilcoxon

    return float(wilcoxon(values.double().numpy()).pvalue) if bool(values.any()) else 1.0


# Confidence ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bin:
    """Images whose confidence lies in (low, high]."""

    low: float
    high: float
    images: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class Reliability:
    """How far confidence can be trusted at one exit.

    Attributes:
        exit: its name.
        accuracy: over all images, those that left before too.
        confidence: mean over them.
        ece: expected calibration error, the mean distance of accuracy from confidence over bins of equal width,
            weighted by their images.
        bins: those that hold images.
    """

    exit: str
    accuracy: float
    confidence: float
    ece: float
    bins: tuple[Bin, ...]


def reliability(name: str, sure: Tensor, right: Tensor, bins: int = BINS) -> Reliability:
    """The reliability curve of one exit.

    Args:
        name: of the exit.
        sure: confidences [N], 0..1.
        right: whether the class is right, [N].
        bins: how many, of equal width.
    """
    sure, right = sure.double(), right.double()
    place = (sure * bins).ceil().long().sub(1).clamp(0, bins - 1)
    found = []
    for k in place.unique().tolist():
        own = place == k
        found.append(Bin(k / bins, (k + 1) / bins, int(own.sum()), sure[own].mean().item(), right[own].mean().item()))
    ece = sum(one.images * abs(one.accuracy - one.confidence) for one in found) / len(sure)
    return Reliability(name, right.mean().item(), sure.mean().item(), ece, tuple(found))


Watch = Callable[[str], None]  # is told what is done next
