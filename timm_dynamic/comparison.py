"""Variants side by side over several seeds: which claims hold, as a table and a page with a figure."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .report import figure_and_axes, page, svg, table

Row = dict[str, Any]  # variant, seed, accuracy and macs_share, and how much the decisions adapt


@dataclass(frozen=True)
class Claim:
    """One variant is said to be more accurate than another.

    Attributes:
        text: what is claimed.
        better: a variant.
        worse: the other one.
        allowed: accuracy that the first may be short of the second.
    """

    text: str
    better: str
    worse: str
    allowed: float = 0.0


@dataclass(frozen=True)
class Verdict:
    """What became of a claim.

    Attributes:
        text: what is claimed.
        difference: in accuracy between the two variants, mean over the seeds that have both.
        spread: its standard deviation between seeds; nan for one seed.
        seeds: how many there were.
        costs: mean shares of the dense MACs of the two.
        found: "agrees", "disagrees", or "within noise": nearer to the line than twice the mean's standard error.
    """

    text: str
    difference: float
    spread: float
    seeds: int
    costs: tuple[float, float]
    found: str


def judge(claim: Claim, rows: Sequence[Row]) -> Verdict | None:
    """What the rows say of a claim; None if no seed has both variants."""
    by_seed: dict[str, dict[int, Row]] = {name: {} for name in (claim.better, claim.worse)}
    for row in rows:
        if row["variant"] in by_seed:
            by_seed[row["variant"]][row["seed"]] = row
    better, worse = by_seed[claim.better], by_seed[claim.worse]
    seeds = sorted(set(better) & set(worse))
    if not seeds:
        return None
    differences = [better[seed]["accuracy"] - worse[seed]["accuracy"] for seed in seeds]
    mean = statistics.mean(differences)
    spread = statistics.stdev(differences) if len(seeds) > 1 else math.nan
    over = mean + claim.allowed
    noise = 2 * spread / math.sqrt(len(seeds))
    found = "within noise" if not abs(over) > noise else "agrees" if over > 0 else "disagrees"
    costs = tuple(statistics.mean(one[seed]["macs_share"] for seed in seeds) for one in (better, worse))
    return Verdict(claim.text, mean, spread, len(seeds), (costs[0], costs[1]), found)


def write_comparison(folder: str | Path, title: str, rows: Sequence[Row], claims: Sequence[Claim]) -> Path:
    """Write comparison.json and report.html.

    Args:
        folder: where to.
        title: of the page.
        rows: one for each variant and seed.
        claims: to be judged.

    Returns:
        The page.
    """
    folder = Path(folder)
    verdicts = [verdict for claim in claims if (verdict := judge(claim, rows)) is not None]
    found = {"title": title, "rows": list(rows), "claims": [asdict(verdict) for verdict in verdicts]}
    (folder / "comparison.json").write_text(json.dumps(found, indent=2) + "\n")
    path = folder / "report.html"
    seeds = len({row["seed"] for row in rows})
    intro = f"<p>{len(rows)} networks, {seeds} seeds. Accuracy and cost are means over seeds, ± their deviation.</p>"
    curves, points = [row for row in rows if row.get("target")], [row for row in rows if not row.get("target")]
    sections = [*_claims_section(verdicts), *_variants_section(points), *(_curves_section(curves) if curves else [])]
    path.write_text(page(title, [intro, *sections]))
    return path


def _claims_section(verdicts: Sequence[Verdict]) -> list[str]:
    header = ("claim", "difference", "deviation", "seeds", "MACs", "against", "found")
    body = [
        (
            verdict.text,
            f"{100 * verdict.difference:+.2f} points",
            f"{100 * verdict.spread:.2f}",
            str(verdict.seeds),
            *(f"{100 * cost:.1f} %" for cost in verdict.costs),
            verdict.found,
        )
        for verdict in verdicts
    ]
    return ["<h2>Claims</h2>", table(header, body)]


def _variants_section(rows: Sequence[Row]) -> list[str]:
    """Accuracy over cost: small marks are seeds, large ones means."""
    figure, axes = figure_and_axes(height=5.0)
    body = []
    for name in dict.fromkeys(row["variant"] for row in rows):
        own = [row for row in rows if row["variant"] == name]
        shares, accuracies = ([100 * row[key] for row in own] for key in ("macs_share", "accuracy"))
        (line,) = axes.plot([statistics.mean(shares)], [statistics.mean(accuracies)], "o", ms=8, label=name)
        axes.plot(shares, accuracies, ".", ms=4, alpha=0.6, color=line.get_color())
        policies = [row["policies"] for row in own if row.get("policies") is not None]
        stds = [row["macs_share_std"] for row in own if row.get("macs_share_std") is not None]
        body.append(
            (
                name,
                _mean(accuracies, "%"),
                _mean(shares, "%"),
                f"{statistics.mean(policies):.1f}" if policies else "",
                f"{statistics.mean(stds):.3f}" if stds else "",
            )
        )
    axes.set(xlabel="mean multiply-adds of an image (% of the dense network's)", ylabel="accuracy (%)")
    axes.set_xlim(left=0)
    axes.legend(frameon=False, fontsize=8, ncols=2)
    caption = "Accuracy over cost of every variant; small marks are seeds, large ones their means."
    header = ("variant", "accuracy", "share of the dense MACs", "policies", "deviation of the share between images")
    return ["<h2>Variants</h2>", svg(figure, "variants", caption), table(header, body)]


def _curves_section(rows: Sequence[Row]) -> list[str]:
    """Accuracy over the cost that was aimed at, and how near the cost came."""
    figure, axes = figure_and_axes()
    body = []
    for name in dict.fromkeys(row["variant"] for row in rows):
        points = []
        for target in sorted({row["target"] for row in rows if row["variant"] == name}):
            own = [row for row in rows if row["variant"] == name and row["target"] == target]
            share = statistics.mean(100 * row["macs_share"] for row in own)
            accuracies = [100 * row["accuracy"] for row in own]
            worst = max(abs(100 * (row["macs_share"] - target)) for row in own)
            points.append((share, statistics.mean(accuracies)))
            body.append((name, f"{100 * target:.0f} %", f"{share:.1f} %", f"{worst:.1f}", _mean(accuracies, "%")))
        axes.plot(*zip(*points, strict=True), "o-", label=name)
    axes.set(xlabel="mean multiply-adds of an image (% of the dense network's)", ylabel="accuracy (%)")
    axes.legend(frameon=False)
    caption = "One trained network at many mean costs, on images that it was not calibrated on."
    header = ("what was moved", "target", "cost met", "farthest from it (points)", "accuracy")
    return ["<h2>One network, many costs</h2>", svg(figure, "curves", caption), table(header, body)]


def _mean(values: Sequence[float], unit: str) -> str:
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread} {unit}"
