"""Parts of the report that are about images: easy and hard ones, scales, classes, features, confidence."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from itertools import cycle
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .analyses import (
    SURE,
    ClassRow,
    Difference,
    Observed,
    Reliability,
    Scale,
    differences,
    easy_and_hard,
    rank_correlation,
    shown_p,
    signed_rank,
)
from .feature_change import KINDS, MAP_KEEP, Change, distance
from .report import BLUE, GREEN, GREY, INK, ORANGE, percent, svg, table
from .sections_cost import OTHERS, Section, chart, legend, paragraph

COLUMNS, LINES = 8, 2  # of a grid of images
THUMB = 48  # pixels a side of a shown image, at most
TESTED = (
    "Brightness, contrast and sharpness: mean and deviation of the luma (0..1), and deviation of its Laplacian. "
    "'Easy has more': in how many of all pairs of an easy and a hard image the easy one has more of it; 50 % is no "
    "difference. p: Mann-Whitney U test, two-sided; 'within classes' after each class's own mean is taken off."
)
Pixels = Callable[[int], Tensor]  # from an image's place to its pixels [C, H, W], 0..1


# Easy and hard images ------------------------------------------------------------------------------------------------


def looks_section(observed: Observed, pixels: Pixels) -> tuple[Section, list[Difference], bool]:
    """Images with most and with fewest skipped units, and whether they differ in looks (SkipNet, fig. 7).

    Args:
        observed: what the network did.
        pixels: gives an image's pixels.

    Returns:
        The section, the tests, and whether all images skip the same.
    """
    title, word = "Easy and hard images", observed.word
    groups = easy_and_hard(observed.skipped) if word else None
    if groups is None:
        why = f"all images skip the same number of {word}" if word else "the network has no gates"
        return Section("looks", title, [paragraph(f"There are no easy and hard images: {why}.")], None), [], True
    skipped, correct = observed.skipped.double(), observed.rows["correct"].double()
    figure = _grids({f"easy: most {word} skipped": groups[0], f"hard: fewest {word} skipped": groups[1]}, pixels)
    caption = f"Above the images with most skipped {word}, below those with fewest."
    found = differences(observed, *groups)
    shares = [correct[group].mean().item() for group in groups]
    rows = [("images", *(f"{len(group):,}" for group in groups), "", "", "", "")]
    rows.append((f"skipped {word}", *(f"{skipped[group].mean():.2f}" for group in groups), "", "", "", ""))
    rows.append(("accuracy", *map(percent, shares), "", "", "", ""))
    rows += [_difference_row(one) for one in found]
    header = ("mean of", "easy", "hard", "easy has more", "p", "within classes", "p within")
    ranks = [rank_correlation(skipped.tolist(), observed.rows["looks"][:, k].tolist()) for k in range(len(found))]
    over_all = ", ".join(
        f"{one.what} {rank:+.3f} (p = {shown_p(p)})" for one, (rank, p) in zip(found, ranks, strict=True)
    )
    turned = "The images that skip most are recognised less often than those that skip least. "
    text = f"{turned if shares[0] < shares[1] else ''}{TESTED} Rank correlation with the skipped {word} over all "
    text += f"{len(observed):,} images: {over_all}."
    parts = [svg(figure, "looks", caption), table(header, rows), paragraph(text)]
    numbers = {
        "groups": [{"images": len(g), "skipped": skipped[g].mean().item()} for g in groups],
        "accuracy": shares,
        "tests": [dataclasses.asdict(one) for one in found],
        "rank_correlations": {one.what: list(rank) for one, rank in zip(found, ranks, strict=True)},
    }
    return Section("looks", title, parts, numbers), found, False


def _difference_row(one: Difference) -> tuple[str, ...]:
    return (
        one.what,
        f"{one.easy:.3f}",
        f"{one.hard:.3f}",
        percent(one.effect),
        shown_p(one.p),
        percent(one.effect_in_class),
        shown_p(one.p_in_class),
    )


def _grids(groups: dict[str, Tensor], pixels: Pixels) -> Any:
    """Grids of images, one below the other."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 3.2), layout="constrained")
    for place, (title, group) in enumerate(groups.items()):
        axes = figure.add_subplot(len(groups), 1, place + 1)
        axes.imshow(tiles([pixels(int(k)) for k in group[: COLUMNS * LINES]]).numpy(), interpolation="none")
        axes.set_title(title, fontsize=9, loc="left")
        axes.set_axis_off()
    return figure


def tiles(images: Sequence[Tensor], gap: int = 2) -> Tensor:
    """Small images [C, H, W] in lines on white: [height, width, 3], 0..1."""
    _, height, width = images[0].shape
    scale = min(1.0, THUMB / max(height, width))
    size = round(height * scale), round(width * scale)
    small = torch.stack([F.interpolate(one[None], size, mode="area")[0].expand(3, -1, -1) for one in images])
    columns = min(COLUMNS, len(small))
    lines = -(-len(small) // columns)
    sheet = torch.ones(3, lines * (size[0] + gap) - gap, columns * (size[1] + gap) - gap)
    for k, one in enumerate(small):
        top, left = k // columns * (size[0] + gap), k % columns * (size[1] + gap)
        sheet[:, top : top + size[0], left : left + size[1]] = one
    return sheet.permute(1, 2, 0)


# Scales and classes --------------------------------------------------------------------------------------------------


def scales_section(scales: Sequence[Scale], word: str | None, choose: bool) -> Section:
    """Units run over input scale (SkipNet, fig. 8); choose: whether anything is left to the gates."""
    title = "Units run over input scale"
    if not scales:
        return Section("scales", title, [paragraph("The network has no gates: it runs the same at any scale.")], None)
    figure, axes = chart()
    low = min(int(one.more.min()) for one in scales)
    high = max(int(one.more.max()) for one in scales)
    for one, colour in zip(scales, cycle((ORANGE, GREEN, INK, BLUE, *OTHERS)), strict=False):
        shares = 100 * torch.bincount(one.more - low, minlength=high - low + 1).double() / len(one.more)
        axes.plot(range(low, high + 1), shares.tolist(), "o-", ms=3, lw=1, color=colour, label=f"scale {one.scale:g}")
    axes.set(xlabel=f"{word} run, less those run at scale 1", ylabel="images (%)", ylim=(0, None))
    legend(axes, 3)
    caption = f"How many more {word} an image runs at another scale than at scale 1."
    header = ("scale", "pixels", f"{word} run", "less scale 1", "deviation", "p", "accuracy")
    rows, numbers = [], []
    for one in scales:
        more, p = one.more.double(), signed_rank(one.more)
        row = {"scale": one.scale, "pixels": list(one.pixels), "accuracy": one.accuracy, "p": p}
        row |= {"ran": one.ran.double().mean().item(), "more": more.mean().item()}
        row["deviation"] = more.std(correction=0).item()
        numbers.append(row)
        shown = (f"{row['ran']:.2f}", f"{row['more']:+.2f}", f"{row['deviation']:.2f}", shown_p(p))
        rows.append((f"{one.scale:g}", " x ".join(map(str, one.pixels)), *shown, percent(one.accuracy, 2)))
    text = "Images are resized after they were prepared. p: Wilcoxon signed-rank test of the difference from scale 1."
    if not choose:
        text += " Nothing is left to the gates: what changes, if anything, is where images are sure enough to leave."
    return Section("scales", title, [svg(figure, "scales", caption), table(header, rows), paragraph(text)], numbers)


def classes_section(observed: Observed, rows: Sequence[ClassRow], rank: tuple[float, float]) -> Section:
    """Skipped units per class beside class accuracy (SkipNet, fig. 9)."""
    title, word = "Skipped units and accuracy of each class", observed.word
    if word is None or len(rows) < 2:
        return Section("classes", title, [paragraph("There is nothing to compare: one class, or no gates.")], None)
    figure, axes = chart()
    axes.plot([100 * row.accuracy for row in rows], [row.mean_skipped for row in rows], "o", color=BLUE, ms=6)
    for row in rows if len(rows) <= 20 else ():
        place = (100 * row.accuracy, row.mean_skipped)
        axes.annotate(row.name, place, xytext=(4, 4), textcoords="offset points", fontsize=8)
    axes.set(xlabel="accuracy of the class (%)", ylabel=f"mean {word} skipped")
    axes.margins(0.12)
    caption = f"Mean number of skipped {word} over the accuracy of each class."
    header = ("class", "accuracy", "mean skipped", "median skipped", "images")
    ordered = sorted(rows, key=lambda row: -row.accuracy)
    body = [_class_cells(row) for row in ordered]
    chance = "" if rank[1] < SURE else ": no more than chance"
    text = f"Rank correlation of the two over {len(rows)} classes: {rank[0]:+.2f}, p = {shown_p(rank[1])}{chance}."
    parts = [svg(figure, "classes", caption), table(header, body), paragraph(text)]
    parts += _two_classes(observed, ordered)
    numbers = {"classes": [dataclasses.asdict(row) for row in rows], "rank": rank[0], "p": rank[1]}
    return Section("classes", title, parts, numbers)


def _class_cells(row: ClassRow) -> tuple[str, ...]:
    return row.name, percent(row.accuracy), f"{row.mean_skipped:.2f}", f"{row.median_skipped:g}", f"{row.images:,}"


def _two_classes(observed: Observed, ordered: Sequence[ClassRow]) -> list[str]:
    """Distributions for the class that is recognised best and the one that is recognised worst."""
    figure, axes = chart(3.0)
    skipped, columns = observed.skipped, {}
    most = int(skipped.max()) + 1
    for row, colour in ((ordered[0], GREEN), (ordered[-1], ORANGE)):
        own = skipped[observed.rows["classes"] == row.place]
        columns[row.name] = (torch.bincount(own, minlength=most).double() / len(own)).tolist()
        shares = [100 * share for share in columns[row.name]]
        axes.plot(range(most), shares, "o-", ms=3, lw=1, color=colour, label=f"{row.name} ({percent(row.accuracy)})")
    axes.set(xlabel=f"{observed.word} skipped", ylabel="images of the class (%)", ylim=(0, None))
    legend(axes)
    names = list(columns)
    caption = f"How many {observed.word} images skip: {names[0]}, recognised best, and {names[-1]}, worst."
    used = [k for k in range(most) if any(column[k] for column in columns.values())]
    body = [(str(k), *(percent(column[k]) for column in columns.values())) for k in used]
    return [svg(figure, "two-classes", caption), table(("skipped", *names), body)]


# Features and confidence ---------------------------------------------------------------------------------------------


def features_section(random: Sequence[Change], own: Sequence[Change], maps: dict[str, Tensor], trunk: str) -> Section:
    """Feature change under layer and channel skipping against no skipping (DDI supplement, fig. 14).

    Args:
        random: changes by layers and channels that are left out at random.
        own: changes by the network's own decisions.
        maps: features of some images, see `feature_change.maps`.
        trunk: whose trunk the random ones were measured in.
    """
    figure, axes = chart()
    looks = {"layers": (BLUE, "o-"), "channels": (ORANGE, "s-")}
    for kind in KINDS:
        found = sorted((one for one in random if one.kind == kind), key=lambda one: one.macs_share)
        shares, far = [100 * one.macs_share for one in found], [one.mean_change for one in found]
        axes.plot(shares, far, looks[kind][1], ms=4, color=looks[kind][0], label=f"{kind} at random")
    for one, mark in zip(own, "*Pd", strict=False):
        axes.plot(
            [100 * one.macs_share], [one.mean_change], mark, ms=10, color=GREEN, label=f"own decisions, {one.kind}"
        )
    axes.set(xlabel="multiply-adds (% of the dense network's)", ylabel="|f - f0| / |f0|", ylim=(0, None))
    legend(axes)
    caption = "Relative change of the features at the ends of the stages when layers or channels are left out."
    stages = len(random[0].change)
    header = ("left out", "kept", "MACs", "accuracy", *(f"stage {k + 1}" for k in range(stages)))
    body = [_change_cells(one) for one in (*random, *own)]
    text = (
        "Under the stages: mean of |f - f0| / |f0| after the stage's last unit. At random: in the trunk of "
        f"{trunk}, which was not trained for it; each image keeps the same share of units or channel groups, drawn "
        f"anew. {random[0].images:,} images."
    )
    parts = [svg(figure, "features", caption), table(header, body), paragraph(text), *_map_parts(maps)]
    return Section("features", "Feature change by skipping", parts, [dataclasses.asdict(c) for c in (*random, *own)])


def _change_cells(one: Change) -> tuple[str, ...]:
    kept = "own decisions" if one.keep is None else percent(one.keep, 0)
    return one.kind, kept, percent(one.macs_share), percent(one.accuracy), *(f"{value:.3f}" for value in one.change)


def _map_parts(maps: dict[str, Tensor]) -> list[str]:
    """Features of some images as pictures."""
    from matplotlib.figure import Figure

    count = len(maps["nothing"])
    figure = Figure(figsize=(5.2, 0.35 + 1.25 * len(maps)), layout="constrained")
    low, high = maps["nothing"].min().item(), maps["nothing"].max().item()
    for line, (kind, features) in enumerate(maps.items()):
        for column in range(count):
            axes = figure.add_subplot(len(maps), count, line * count + column + 1)
            axes.imshow(features[column].numpy(), cmap="gray", vmin=low, vmax=high, interpolation="none")
            axes.set_xticks([])
            axes.set_yticks([])
            if column == 0:
                axes.set_ylabel("whole" if kind == "nothing" else f"{kind} out", fontsize=8)
    caption = f"Features after the first stage, mean over channels; {percent(MAP_KEEP, 0)} of the units or groups kept."
    body = []
    for kind, features in maps.items():
        far = distance(features, maps["nothing"])
        body.append(("nothing" if kind == "nothing" else kind, *(f"{value:.3f}" for value in far.tolist())))
    header = ("left out", *(f"image {k + 1}" for k in range(count)))
    return [svg(figure, "maps", caption), table(header, body)]


def confidence_section(found: Sequence[Reliability]) -> Section:
    """Reliability curves and expected calibration error of all exits."""
    figure, axes = chart()
    axes.plot([0, 100], [0, 100], color=GREY, lw=0.8, ls=":")
    for one, colour in zip(found, cycle((BLUE, ORANGE, *OTHERS)), strict=False):
        confidences, accuracies = ([100 * getattr(b, k) for b in one.bins] for k in ("confidence", "accuracy"))
        total = sum(b.images for b in one.bins)
        axes.plot(confidences, accuracies, "-", lw=1, color=colour, label=f"{one.exit} (ECE {percent(one.ece)})")
        axes.scatter(confidences, accuracies, [4 + 150 * b.images / total for b in one.bins], color=colour)
    axes.set(xlabel="confidence (%)", ylabel="accuracy (%)", xlim=(0, 101), ylim=(0, 101))
    legend(axes)
    caption = "Accuracy over confidence; on the dotted line confidence is right. Larger dots stand for more images."
    rows = [(one.exit, percent(one.accuracy, 2), percent(one.confidence, 2), percent(one.ece, 2)) for one in found]
    lines = [
        (
            one.exit,
            f"{100 * b.low:.0f} to {100 * b.high:.0f} %",
            f"{b.images:,}",
            percent(b.confidence),
            percent(b.accuracy),
        )
        for one in found
        for b in one.bins
    ]
    parts = [
        svg(figure, "confidence", caption),
        table(("exit", "accuracy", "mean confidence", "ECE"), rows),
        paragraph("Every exit is asked about every image. ECE: expected calibration error over the bins below."),
        table(("exit", "confidence", "images", "mean confidence", "accuracy"), lines),
    ]
    numbers = [dataclasses.asdict(one) for one in found]
    return Section("confidence", "Can confidence be trusted?", parts, numbers)
