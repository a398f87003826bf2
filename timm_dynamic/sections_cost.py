"""Parts of the report that are about cost: accuracy over it, what is skipped, time, training."""

from __future__ import annotations

import dataclasses
import html
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, cycle
from typing import Any

from .analyses import shown_p
from .claim_numbers import channel_skips, layer_skips
from .evaluation import in_points
from .exchange import Exchange
from .report import BLUE, GREEN, GREY, INK, ORANGE, figure_and_axes, millions, percent, svg, table, training_section
from .trade_off import EQUAL, Network, Point, Timed, cheapest_equal

PURPLE, BROWN = "#7a4fb0", "#8a6d3b"
OTHERS = (  # none of those in which the report's own network is drawn
    *(PURPLE, BROWN, "#c2387e", "#2a9d9d", "#7f7f00"),
    *("#b00020", "#7c8ce0", "#c9930a", "#0b5345", "#e891c3"),
)
LINE, ROW = 76, 0.17  # characters of a legend side by side, and inches of a row
MARKS = {"exit": ("s", GREEN), "budget": ("^", ORANGE), "calibrated": ("v", BLUE)}
UNITS = "Skip ratio of every unit"
EXCHANGED = (
    "What the decisions are worth to the images that they were made for: accuracy when every image follows those of "
    "another one, drawn at random, at the same total cost (mean of the draws; p: t-test over the "
    "images). If that loses nothing, one could as well decide without looking."
)
WIDTH, HEIGHT = 5.2, 3.5  # inches: letters are then of a size that can be read on a phone


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        key: its anchor, and its name among the numbers.
        title: what it is about.
        parts: HTML.
        numbers: JSON values, those of its tables.
    """

    key: str
    title: str
    parts: list[str]
    numbers: Any

    def html(self) -> str:
        """Heading and parts."""
        return "\n".join([f'<h2 id="{self.key}">{html.escape(self.title)}</h2>', *self.parts])


def paragraph(text: str) -> str:
    """Plain text as a paragraph."""
    return f"<p>{html.escape(text)}</p>"


def chart(height: float = HEIGHT) -> tuple[Any, Any]:
    """An empty figure."""
    return figure_and_axes(WIDTH, height)


def legend(axes: Any, columns: int = 2) -> None:
    """A legend below the axes, where it covers nothing; none if nothing has a label.

    Labels that are too long to stand side by side stand below each other, and the figure grows by so much.
    """
    labels = axes.get_legend_handles_labels()[1]
    if not labels:
        return
    if max(map(len, labels)) * columns > LINE:
        width, height = axes.figure.get_size_inches()
        axes.figure.set_size_inches(width, height + ROW * (len(labels) - math.ceil(len(labels) / columns)))
        columns = 1
    axes.figure.legend(frameon=False, fontsize=8, ncols=columns, loc="outside lower left")


# Accuracy over cost --------------------------------------------------------------------------------------------------


def cost_section(name: str, points: Sequence[Point], dense: tuple[float, float] | None, missing: str) -> Section:
    """All networks at all costs in the same axes.

    Args:
        name: of the report's network.
        points: its own and others'.
        dense: accuracy and MACs of its dense base.
        missing: what to say of calibration if there was none.
    """
    figure, axes = chart(4.4)
    others = _looks()
    for other in dict.fromkeys(point.network for point in points):
        look = (BLUE, "o", "P") if other == name else next(others)
        _draw_network(axes, other, [point for point in points if point.network == other], name, look)
    runs = sorted((p for p in points if p.alpha is not None), key=lambda p: (p.alpha, p.macs))
    if len(runs) > 1:
        axes.plot([p.macs / 1e6 for p in runs], [100 * p.accuracy for p in runs], "--", color=GREY, label="over alpha")
    if dense is not None:
        axes.plot([dense[1] / 1e6], [100 * dense[0]], "D", color=INK, ms=8, label="dense base", zorder=5)
        axes.axhline(100 * (dense[0] - EQUAL), color=GREY, lw=0.8, ls=":")
    axes.set(xlabel="mean multiply-adds of an image (millions)", ylabel="accuracy (%)")
    axes.set_xlim(left=0)
    legend(axes)
    caption = "Accuracy over mean multiply-adds. The dotted line is half a point below the dense base."
    macs = dense[1] if dense is not None else max(point.macs for point in points)
    header = ("network", "setting", "accuracy", "mean MACs", "of dense", "largest MACs", "keep ratio")
    rows = [_cost_row(point, macs) for point in points]
    if dense is not None:
        rows.insert(0, ("dense base", "", percent(dense[0], 2), millions(dense[1]), percent(1), millions(dense[1]), ""))
    parts = [svg(figure, "cost", caption), table(header, rows), *([paragraph(missing)] if missing else [])]
    numbers = {"dense": dense, "points": [dataclasses.asdict(point) for point in points]}
    return Section("cost", "Accuracy over cost", parts, numbers)


def _looks() -> Iterator[tuple[str, str, str]]:
    """Colours, each with the marks of a dynamic and of a static network; other marks when the colours are used up."""
    for dynamic, static in cycle((("o", "P"), ("*", "X"))):
        for colour in OTHERS:
            yield colour, dynamic, static


def _draw_network(axes: Any, name: str, own: Sequence[Point], main: str, look: tuple[str, str, str]) -> None:
    """The points of one network, in its colour; the last two of its look are the marks without a budget."""
    colour, dynamic, static = look
    for kind, (mark, usual) in MARKS.items():
        found = sorted((point for point in own if point.kind == kind), key=lambda point: point.macs)
        if found:
            label = {"exit": "leaving at one exit", "budget": "hard budgets", "calibrated": "calibrated"}[kind]
            shown = usual if name == main else colour
            xs, ys = [p.macs / 1e6 for p in found], [100 * p.accuracy for p in found]
            axes.plot(xs, ys, mark + ":", color=shown, ms=5, label=label if name == main else f"{name}, {label}")
    for point in own:
        if point.kind in ("dynamic", "static"):
            mark = dynamic if point.kind == "dynamic" else static
            axes.plot([point.macs / 1e6], [100 * point.accuracy], mark, color=colour, ms=8, label=name)


def _cost_row(point: Point, dense: float) -> tuple[str, ...]:
    keep = "" if point.keep_ratio is None or point.kind == "static" else f"{point.keep_ratio:.3f}"
    what = point.what or point.kind
    shares = millions(point.macs), percent(point.macs / dense), millions(point.max_macs)
    return (point.network, what, percent(point.accuracy, 2), *shares, keep)


def reduction_section(points: Sequence[Point], dense: tuple[float, float] | None, noted: bool = False) -> Section:
    """What each dynamic network saves at equal accuracy (SkipNet, fig. 4). noted: the base was not measured here."""
    title = "Computation saved at equal accuracy"
    if dense is None:
        text = "The dense base's accuracy is not known: give the folder of a run, or the base as --beside."
        return Section("reduction", title, [paragraph(text)], None)
    accuracy, macs = dense
    rows: list[tuple[str, ...]] = []
    numbers: list[dict[str, Any]] = []
    for name in dict.fromkeys(point.network for point in points if point.kind == "dynamic"):
        best = cheapest_equal([point for point in points if point.network == name], accuracy)
        saved = None if best is None else 1 - best.macs / macs
        numbers.append({"network": name, "saved": saved, "point": best and dataclasses.asdict(best)})
        shown = ("none", "", "", "") if best is None or saved is None else _saved_row(best, saved)
        rows.append((name, *shown))
    figure, axes = chart(1.2 + 0.45 * (1 + len(rows)))
    names = ["dense base", *(row["network"] for row in numbers)]
    cost = [1.0, *(1 - row["saved"] if row["saved"] is not None else 1.0 for row in numbers)]
    found = [True, *(row["saved"] is not None for row in numbers)]
    axes.barh(range(len(names)), [100 * c for c in cost], color=[INK] + [BLUE if ok else GREY for ok in found[1:]])
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set(xlabel="multiply-adds (% of the dense base's)")
    caption = "Least cost within half a point of the dense base; grey: no setting is so accurate."
    header = ("network", "saved", "setting", "accuracy", "mean MACs")
    where = ", as noted with the weights, perhaps on other images (--beside measures it)" if noted else ""
    text = (
        f"The dense base reaches {percent(accuracy, 2)}{where}. "
        "The setting is chosen on the images that it is measured on."
    )
    return Section(
        "reduction", title, [svg(figure, "reduction", caption), table(header, rows), paragraph(text)], numbers
    )


def _saved_row(best: Point, saved: float) -> tuple[str, ...]:
    return percent(saved), best.what, percent(best.accuracy, 2), millions(best.macs)


# What is skipped -----------------------------------------------------------------------------------------------------


def units_section(network: Network, beside: Sequence[Network]) -> Section:
    """Skip ratio of every unit, layers beside channels, networks with as many units beside each other."""
    table_of = network.observed.table
    firsts = [i == 0 or table_of.units[i - 1].stage != unit.stage for i, unit in enumerate(table_of.units)]
    series = _skip_series([network, *beside], len(firsts))
    if not series:
        return Section("units", UNITS, [paragraph("No network here has gates: every unit runs.")], {})
    figure, axes = chart(3.8)
    for (label, values), colour in zip(series.items(), cycle((BLUE, ORANGE, *OTHERS)), strict=False):
        places = [i for i, value in enumerate(values) if value is not None and not math.isnan(value)]
        axes.plot(places, [100 * (values[i] or 0.0) for i in places], "o-", ms=3.5, lw=1, color=colour, label=label)
    for place in (i for i, first in enumerate(firsts) if first):
        axes.axvline(place, color=INK, lw=0.8, ls=":")
        axes.plot([place], [104], "v", color=GREEN, ms=8, clip_on=False)
    if len(firsts) <= 20:
        ticks = [unit.name.removeprefix("layer") for unit in table_of.units]
        axes.set_xticks(range(len(ticks)), ticks, rotation=60, ha="right", fontsize=7)
    axes.set(ylabel="skipped (%)", xlabel="unit, from the first to the last", ylim=(0, 105))
    legend(axes, 1)
    caption = "Share of images that skip a unit, and of its hidden channels; first units of stages have a green mark."
    body = []
    for i, unit in enumerate(table_of.units):
        cells = [_skip_cell(values[i]) for values in series.values()]
        body.append((unit.name + (" (first of its stage)" if firsts[i] else ""), *cells))
    parts = [svg(figure, "units", caption), table(("unit", *series), body)]
    names = [unit.name for unit in table_of.units]
    known = {label: [None if v is None or math.isnan(v) else v for v in values] for label, values in series.items()}
    numbers = {label: dict(zip(names, values, strict=True)) for label, values in known.items()}
    return Section("units", UNITS, parts, numbers)


def _skip_series(networks: Sequence[Network], count: int) -> dict[str, list[float | None]]:
    """By what it is, a value for each unit: None without a gate, NaN for channels of a unit that never runs."""
    found: dict[str, list[float | None]] = {}
    for one in networks:
        layers, channels = ([skip for _, skip in skips(one)] for skips in (layer_skips, channel_skips))
        for what, values in (("layers", layers), ("channels", channels)):
            if len(values) == count and any(value is not None for value in values):
                found[f"{one.name}: {what}"] = values
    return found


def _skip_cell(value: float | None) -> str:
    if value is None:
        return "no gate"
    return "the unit never runs" if math.isnan(value) else percent(value)


def decisions_section(network: Network, summary: dict[str, Any], exchanged: dict[str, Exchange]) -> Section:
    """How much depends on the image, and what that gains."""
    found = network.evaluation
    channels, static = found.channel_keep_ratio, summary.get("static")
    gain, error = summary.get("adaptive_gain"), summary.get("adaptive_gain_error")
    body = [
        ("images", f"{found.images:,}"),
        ("accuracy", percent(found.accuracy, 2)),
        ("mean MACs of an image", f"{millions(found.macs)} = {percent(found.macs_share)} of dense"),
        ("standard deviation of that share between images", f"{100 * found.macs_share_std:.2f} points"),
        ("distinct policies (patterns of layers kept)", f"{found.policies:,}"),
        ("their entropy", f"{found.policy_entropy:.2f} bits"),
        ("variance of keep between images, mean over units", f"{found.keep_variance:.4f}"),
        ("channel groups kept", "no channel gates" if channels is None else percent(channels)),
        *((f"leave at exit {k}", percent(share)) for k, share in enumerate(found.exit_shares) if found.exit_shares[1:]),
        ("adaptive gain, as the run measured it", "not measured (--gain)" if gain is None else in_points(gain, error)),
    ]
    if static:
        shown = f"{percent(static['accuracy'], 2)} at {millions(static['macs'])}"
        body.append(("best static policy, trained for as long", shown))
    numbers = {**found.to_dict(), "adaptive_gain": gain, "adaptive_gain_error": error}
    numbers["exchange"] = {name: dataclasses.asdict(one) for name, one in exchanged.items()}
    parts = [table(("measure", "value"), body)]
    if exchanged:
        parts += [paragraph(EXCHANGED), table(("network", "own", "exchanged", "difference", "p"), _worth(exchanged))]
    return Section("decisions", "How much depends on the image", parts, numbers)


def _worth(exchanged: dict[str, Exchange]) -> list[tuple[str, ...]]:
    """What decisions are worth to the images that they were made for, a row for each network."""
    return [
        (
            name,
            percent(one.own, 2),
            percent(one.others, 2),
            f"{100 * (one.others - one.own):+.2f} points",
            shown_p(one.p),
        )
        for name, one in exchanged.items()
    ]


# Time and training ---------------------------------------------------------------------------------------------------


def time_section(times: Sequence[Timed], images: int, threads: int, machine: str) -> Section:
    """Milliseconds beside MACs on some images; the first row is the dense network."""
    dense = times[0]
    figure, axes = chart()
    for one, colour in zip(times, chain((INK,), cycle((BLUE, ORANGE, *OTHERS))), strict=False):
        axes.plot([100 * one.macs_share], [one.own], "o", ms=7, color=colour, label=one.name)
    axes.axline((0, 0), (100, dense.own), color=GREY, lw=0.8, ls=":")
    axes.set(xlabel="multiply-adds (% of the dense network's)", ylabel="ms an image", xlim=(0, None), ylim=(0, None))
    legend(axes)
    caption = "Time of one image over its multiply-adds; on the dotted line all work that is left out is saved time."
    rows = [
        (
            one.name,
            percent(one.macs_share),
            f"{one.own:.2f}",
            f"{one.wall:.2f}",
            percent(one.own / dense.own),
            _realised(dense, one),
        )
        for one in times
    ]
    header = ("network", "MACs", "ms (processor)", "ms (wall clock)", "time of dense", "realised ratio")
    text = (
        f"{images} images, one at a time, {threads} thread{'s' if threads > 1 else ''}, {machine}; every network as "
        "optimize_for_inference makes it, timed in turns, medians. Realised ratio: share of the skipped multiply-adds "
        "that is saved time."
    )
    parts = [svg(figure, "time", caption), table(header, rows), paragraph(text)]
    return Section("time", "Time beside multiply-adds", parts, [dataclasses.asdict(one) for one in times])


def _realised(dense: Timed, one: Timed) -> str:
    if one.macs_share > 0.99:
        return ""
    return f"{(dense.own - one.own) / (dense.own * (1 - one.macs_share)):.2f}"


def training(rows: Sequence[dict[str, Any]], dense_macs: float) -> Section:
    """Accuracy, keep ratio and MACs while the network was trained."""
    if not rows:
        text = "There is no metrics.jsonl beside this network: the folder of a run has one."
        return Section("training", "Training", [paragraph(text)], None)
    return Section("training", "Training", training_section(rows, dense_macs, WIDTH)[1:], list(rows))
