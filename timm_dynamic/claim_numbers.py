"""How the numbers beside the papers' claims are found in what was measured."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from . import families
from .analyses import SURE, shown_p, signed_rank
from .claims import AGREES, DISAGREES, NOISE, Evidence, Find, Outcome, verdict
from .comparison import Claim, judge
from .feature_change import at_equal_cost
from .trade_off import Network

POINT = 0.01  # skip ratios and shares nearer than this are called equal

# Accuracy and cost ---------------------------------------------------------------------------------------------------


def reduction(evidence: Evidence) -> Outcome | None:
    """Compute saved at equal accuracy."""
    if evidence.dense is None:
        return None
    accuracy, macs = evidence.dense
    if evidence.equal is None:
        return Outcome(f"none: no point within 0.5 points of the dense {100 * accuracy:.2f} %", DISAGREES)
    saved = 1 - evidence.equal.macs / macs
    number = f"{100 * saved:+.1f} % saved at {100 * evidence.equal.accuracy:.2f} %, dense {100 * accuracy:.2f} %"
    return Outcome(number, verdict(saved, POINT))


def published(base: str, dataset: str, saved: float) -> Find:
    """A published saving, which only that network on that data set can confirm."""

    def find(evidence: Evidence) -> Outcome | None:
        if evidence.dataset != dataset or not is_base(evidence.network, base) or evidence.dense is None:
            return None
        outcome = reduction(evidence)
        if outcome is None or evidence.equal is None:
            return outcome
        return Outcome(outcome.number, verdict(1 - evidence.equal.macs / evidence.dense[1] - saved, POINT))

    return find


def is_base(network: Network, base: str) -> bool:
    """Whether a network is made from `base`, such as "resnet110"."""
    name = families.model_name(network.model)
    return base in name.split(".")[0].split("_")


def method_is(network: Network, method: str) -> bool:
    """Whether a network was trained so."""
    return network.settings.get("method") == method


def sp_alone(evidence: Evidence) -> Outcome | None:
    """What supervised training saves that has no term for the cost."""
    for one in evidence.networks:
        if method_is(one, "sp") and one.cost_weight == 0:
            share = one.evaluation.macs_share
            return Outcome(f"{one.name}: {100 * share:.1f} % of the dense MACs", verdict(1 - share, POINT))
    return None


def pairs(evidence: Evidence, first: dict[str, Any], second: dict[str, Any], same: Sequence[str]) -> Any:
    """Two networks whose settings are so, and which agree in `same`; None if there are none."""
    for a in evidence.networks:
        for b in evidence.networks:
            fits = all(a.settings.get(k) == v for k, v in first.items())
            fits = fits and all(b.settings.get(k) == v for k, v in second.items())
            if fits and all(a.settings.get(k) == b.settings.get(k) for k in same):
                return a, b
    return None


def hrl_adds(evidence: Evidence) -> Outcome | None:
    """How much cheaper SP+HRL is than SP alone, trained without a target."""
    free = {"target": None}
    found = pairs(evidence, {"method": "sp", **free}, {"method": "sp+hrl", **free}, ("model",))
    if found is None:
        return None
    sp, hrl = (one.evaluation.macs_share for one in found)
    return Outcome(
        f"{100 * (sp - hrl):+.1f} points ({100 * sp:.1f} to {100 * hrl:.1f} %)", verdict(sp - hrl - 0.1, POINT)
    )


def deeper(evidence: Evidence) -> Outcome | None:
    """Shares of the dense MACs of networks of several depths, trained alike and without a target."""
    known = [one for one in evidence.networks if "method" in one.settings and one.cost_weight is not None]
    alike = [one for one in known if all(one.settings.get(k) == known[0].settings.get(k) for k in ("method", "gate"))]
    depths = sorted({(len(one.observed.table.units), one.evaluation.macs_share) for one in alike})
    if len({depth for depth, _ in depths}) < 2:
        return None
    number = ", ".join(f"{depth} units: {100 * share:.1f} %" for depth, share in depths)
    return Outcome(number, verdict(depths[0][1] - depths[-1][1], POINT))


def rnn_beats_ff(evidence: Evidence) -> Outcome | None:
    """Costs of networks that differ in their gates alone."""
    for kind in ("ff1", "ff2"):
        found = pairs(evidence, {"gate": "rnn"}, {"gate": kind}, ("model", "method", "alpha", "target"))
        if found:
            rnn, ff = (one.evaluation for one in found)
            number = f"RNN {100 * rnn.accuracy:.2f} % at {100 * rnn.macs_share:.1f} % of the MACs, "
            number += f"{kind} {100 * ff.accuracy:.2f} % at {100 * ff.macs_share:.1f} %"
            return Outcome(number, verdict(ff.macs_share - rnn.macs_share, POINT))
    return None


def over_alpha(evidence: Evidence) -> Outcome | None:
    """Whether the first step of alpha takes more of the cost than of the accuracy."""
    own = evidence.network.settings
    runs = {}
    for one in evidence.networks:
        alpha = one.cost_weight
        if alpha is not None and all(one.settings.get(k) == own.get(k) for k in ("model", "method")):
            runs[alpha] = one.evaluation
    if len(runs) < 2:
        return None
    low, high = (runs[alpha] for alpha in sorted(runs)[:2])
    cheaper, worse = 1 - high.macs / low.macs, 1 - high.accuracy / low.accuracy
    steps = " to ".join(f"{alpha:g}" for alpha in sorted(runs)[:2])
    number = f"alpha {steps}: {100 * cheaper:.1f} % of the MACs and {100 * worse:.1f} % of the accuracy less"
    return Outcome(number, verdict(cheaper - worse, POINT))


def between(text: str, better: str, worse: str) -> Find:
    """A study's variants side by side."""

    def find(evidence: Evidence) -> Outcome | None:
        for study in evidence.studies:
            rows = [row for row in study.rows if "variant" in row]
            found = judge(Claim(text, better, worse), rows)
            if found is not None:
                spread = "" if math.isnan(found.spread) else f" ± {100 * found.spread:.2f}"
                costs = " against ".join(f"{100 * cost:.0f}" for cost in found.costs)
                seeds = f"{found.seeds} seed{'s' if found.seeds > 1 else ''}"
                number = f"{100 * found.difference:+.2f}{spread} points at {costs} % of the MACs"
                return Outcome(f"{number} ({study.title}, {seeds})", found.found)
        return None

    return find


def imagenet_pair(ours: str, other: str) -> Find:
    """An IADI and a SkipNet network on ImageNet."""

    def find(evidence: Evidence) -> Outcome | None:
        named = {families.model_name(one.model).split(".")[0]: one.evaluation for one in evidence.networks}
        if evidence.dataset != "imagenet" or not {ours, other} <= named.keys():
            return None
        a, b = named[ours], named[other]
        number = f"{100 * a.accuracy:.2f} % at {a.macs / 1e6:.0f} M, {100 * b.accuracy:.2f} % at {b.macs / 1e6:.0f} M"
        noise = 2 * math.sqrt((a.accuracy * (1 - a.accuracy) + b.accuracy * (1 - b.accuracy)) / a.images)
        return Outcome(number, verdict(a.accuracy - b.accuracy, noise) if a.macs <= b.macs else DISAGREES)

    return find


# What is skipped, and for which images -------------------------------------------------------------------------------


def look(what: str) -> Find:
    """Whether easy images have more of it."""

    def find(evidence: Evidence) -> Outcome | None:
        if evidence.alike:
            return Outcome("all images skip the same number of units", NOISE)
        for one in evidence.looks:
            if one.what == what:
                number = f"{one.easy:.3f} against {one.hard:.3f}; more in {100 * one.effect:.0f} % of pairs"
                number += f", p = {shown_p(one.p)}"
                return Outcome(number, verdict(one.effect - 0.5, 0) if one.p < SURE else NOISE)
        return None

    return find


def larger_scales(evidence: Evidence) -> Outcome | None:
    """Units run at the largest scale beside the smallest."""
    if len(evidence.scales) < 2:
        return None
    low, high = evidence.scales[0], evidence.scales[-1]
    more = (high.ran - low.ran).double()
    number = f"{low.ran.double().mean():.2f} at scale {low.scale:g}, {high.ran.double().mean():.2f} at {high.scale:g}"
    p = signed_rank(more)
    return Outcome(f"{number}; p = {shown_p(p)}", verdict(more.mean().item(), 0) if p < SURE else NOISE)


def easy_classes(evidence: Evidence) -> Outcome | None:
    """Correlation of class accuracy and units skipped."""
    if len(evidence.classes) < 3:
        return None
    rank, p = evidence.class_rank
    number = f"rank correlation {rank:+.2f} over {len(evidence.classes)} classes, p = {shown_p(p)}"
    return Outcome(number, verdict(rank, 0) if p < SURE else NOISE)


def hrl_skips_more(evidence: Evidence) -> Outcome | None:
    """Share of the classes for which the HRL network skips more than the SP one."""
    found = pairs(evidence, {"method": "sp"}, {"method": "sp+hrl"}, ("model",))
    if found is None:
        return None
    sp, hrl = ([m.mean().item() for m in _class_skips(one)] for one in found)
    more = [b > a for a, b in zip(sp, hrl, strict=True)]
    return Outcome(f"in {sum(more)} of {len(more)} classes", AGREES if all(more) else DISAGREES)


def _class_skips(network: Network) -> list[Any]:
    rows, skipped = network.observed.rows, network.observed.skipped.double()
    return [skipped[rows["classes"] == k] for k in rows["classes"].unique()]


def training_time(evidence: Evidence) -> Outcome | None:
    """What the paper's schedule takes beside the base, from timed steps."""
    rows = [row for study in evidence.studies for row in study.rows if "task" in row]
    ratio = {task: [row["ratio"] for row in rows if row["task"] == task] for task in ("SP", "HRL")}
    if not all(ratio.values()):
        return None
    sp, hrl = (statistics.mean(values) for values in ratio.values())
    longer = sp + 10 / 64 * hrl - 1  # 64k iterations of SP, then 10k of HRL
    number = f"{100 * longer:+.0f} %: a step takes {sp:.2f} (SP) and {hrl:.2f} (HRL) of the base's"
    return Outcome(number, verdict(0.4 - longer, 0.02))


def gradual(accuracy: bool) -> Find:
    """Channels beside layers, left out at random at equal cost."""

    def find(evidence: Evidence) -> Outcome | None:
        rows = at_equal_cost(evidence.changes)
        if not rows:
            return None
        columns = list(zip(*rows, strict=True))
        layers, channels = (statistics.mean(columns[k]) for k in ((3, 4) if accuracy else (1, 2)))
        low, high = 100 * min(columns[0]), 100 * max(columns[0])
        where = f"at {low:.0f} to {high:.0f} % of the MACs"
        if accuracy:
            noise = 2 * math.sqrt((layers * (1 - layers) + channels * (1 - channels)) / evidence.changes[0].images)
            number = f"left out at random: accuracy {100 * channels:.1f} against {100 * layers:.1f} % {where}"
            return Outcome(number, verdict(channels - layers, noise))
        noise = 2 * max(one.error for one in evidence.changes)
        number = f"left out at random: features {channels:.3f} against {layers:.3f} off {where}"
        return Outcome(number, verdict(layers - channels, noise))

    return find


# Units ---------------------------------------------------------------------------------------------------------------


def layer_skips(network: Network) -> list[tuple[int, float | None]]:
    """Stage and skip ratio of every unit, None where it has no layer gate."""
    skip = network.evaluation.unit_skip
    return [(unit.stage, skip.get(unit.name)) for unit in network.observed.table.units]


def channel_skips(network: Network) -> list[tuple[int, float | None]]:
    """Stage of every unit and share of its hidden channels that is left out, None where it has no channel gate."""
    skip = network.observed.channel_skip()
    return [(unit.stage, skip.get(unit.name)) for unit in network.observed.table.units]


def _edges(skips: list[tuple[int, float | None]]) -> tuple[list[float], list[float], list[float]]:
    """Skip ratios of the first and the last gated units of the stages, and of all others."""
    firsts, lasts, others = [], [], []
    for i, (stage, skip) in enumerate(skips):
        if skip is None or math.isnan(skip):
            continue
        if i > 0 and skips[i - 1][0] != stage:
            firsts.append(skip)
        elif i + 1 == len(skips) or skips[i + 1][0] != stage:
            lasts.append(skip)
        else:
            others.append(skip)
    return firsts, lasts, others


def edges_matter(evidence: Evidence) -> Outcome | None:
    """First and last units of the stages beside those between (the network's first unit has no gate)."""
    firsts, lasts, others = _edges(layer_skips(evidence.network))
    if not (firsts and lasts and others):
        return None
    first, last, other = (statistics.mean(values) for values in (firsts, lasts, others))
    number = f"first {100 * first:.1f} %, last {100 * last:.1f} %, between {100 * other:.1f} % skipped"
    found = [verdict(other - first, POINT), verdict(other - last, POINT)]
    return Outcome(number, next((one for one in (DISAGREES, NOISE) if one in found), AGREES))


def second_stage(evidence: Evidence) -> Outcome | None:
    """Mean skip ratio of every stage."""
    stages: dict[int, list[float]] = {}
    for stage, skip in layer_skips(evidence.network):
        if skip is not None:
            stages.setdefault(stage, []).append(skip)
    if len(stages) < 3:
        return None
    means = {stage: statistics.mean(values) for stage, values in stages.items()}
    number = ", ".join(f"stage {stage + 1}: {100 * mean:.1f} %" for stage, mean in sorted(means.items()))
    least = min(mean for stage, mean in means.items() if stage != 1)
    return Outcome(number, verdict(least - means[1], POINT))


def firsts_kept(channels: bool) -> Find:
    """First units of the stages beside all others, in the report's network or, if it lacks such gates, another one."""

    def find(evidence: Evidence) -> Outcome | None:
        for one in evidence.networks:
            firsts, lasts, others = _edges(channel_skips(one) if channels else layer_skips(one))
            if firsts and lasts + others:
                first, other = statistics.mean(firsts), statistics.mean(lasts + others)
                number = f"{one.name}: first units {100 * first:.1f} %, others {100 * other:.1f} % skipped"
                return Outcome(number, verdict(other - first, POINT))
        return None

    return find


def at_half(base: str, accuracy: float) -> Find:
    """Accuracy of a network that runs half of the MACs."""

    def find(evidence: Evidence) -> Outcome | None:
        for one in evidence.networks:
            found = one.evaluation
            if evidence.dataset == "cifar10" and is_base(one, base) and abs(found.macs_share - 0.5) < 0.03:
                number = f"{one.name}: {100 * found.accuracy:.2f} % at {100 * found.macs_share:.1f} % of the MACs"
                return Outcome(number, verdict(found.accuracy - accuracy + 0.005, 0))
        return None

    return find
