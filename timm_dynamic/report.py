"""report.html: figures and tables of one run, in a single file that needs nothing else."""

from __future__ import annotations

import html
import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .evaluation import in_points

INK, BLUE, ORANGE, GREEN, GREY = "#222222", "#1f6fb2", "#d1620a", "#2a8a4a", "#999999"
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 46rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
figure { margin: 0; max-width: 38rem; } svg { width: 100%; height: auto; } figcaption { color: #555; font-size: .9rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .85rem; margin: .8rem 0; }
th, td { padding: .2rem .6rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
nav { font-size: .9rem; } nav a { margin-right: .8rem; white-space: nowrap; }
.claims td { white-space: normal; text-align: left; vertical-align: top; } .claims th { text-align: left; }
.claims .none td { color: #777; } .claims b { white-space: nowrap; }
.claims code { font-size: .75rem; overflow-wrap: anywhere; }
@media (max-width: 40rem) {
  .claims th { display: none; } .claims tr { display: block; border-bottom: 1px solid #ddd; padding: .5rem 0; }
  .claims td { display: block; border: 0; padding: 0; } .claims td:empty { display: none; }
  .claims td:nth-child(2)::before { content: "ours: "; color: #777; }
  .claims td:nth-child(4)::before { content: "source: "; color: #777; }
}
"""


def write_report(folder: str | Path) -> Path:
    """Write report.html for a run.

    Args:
        folder: of the run; its summary.json and metrics.jsonl are read.

    Returns:
        The file written.

    Raises:
        FileNotFoundError: if the folder holds no finished run.
    """
    folder = Path(folder)
    if not (folder / "summary.json").exists():
        raise FileNotFoundError(f"{folder} holds no summary.json: a finished run is needed")
    summary = json.loads((folder / "summary.json").read_text())
    metrics = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    path = folder / "report.html"
    path.write_text(render(summary, rows))
    return path


def render(summary: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    """The page as a string.

    Args:
        summary: what summary.json holds.
        rows: those of metrics.jsonl.
    """
    title = f"{summary.get('model', 'Network')} on {summary.get('dataset', 'its data')}"
    parts = [f"<p>{_sentence(summary)}</p>", *_cost_section(summary)]
    if any(unit["skip_ratio"] is not None for unit in summary.get("units", [])):
        parts += _unit_section(summary["units"])
    if summary.get("decisions"):
        parts += _decision_section(summary)
    if rows:
        parts += training_section(rows, summary["dense"]["macs"])
    return page(title, parts)


def page(title: str, parts: Sequence[str]) -> str:
    """A whole page from its parts."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join([f"<h1>{html.escape(title)}</h1>", *parts])
        + "\n</body>\n</html>\n"
    )


def _sentence(summary: dict[str, Any]) -> str:
    dense, dynamic = summary["dense"], summary["dynamic"]
    return (
        f"Accuracy {percent(dynamic['accuracy'])} at {percent(dynamic['macs'] / dense['macs'])} of the dense "
        f"network's multiply-adds; the dense network reaches {percent(dense['accuracy'])}."
    )


# Sections ------------------------------------------------------------------------------------------------------------


def _cost_section(summary: dict[str, Any]) -> list[str]:
    """Accuracy over cost."""
    dense, dynamic = summary["dense"], summary["dynamic"]
    figure, axes = figure_and_axes()
    for key, label, colour, mark in (("exits", "exits", GREEN, "s-"), ("budgets", "hard budgets", ORANGE, "^--")):
        found = sorted(summary.get(key, []), key=lambda row: row["macs"])
        if found:
            axes.plot(
                [row["macs"] / 1e6 for row in found],
                [100 * row["accuracy"] for row in found],
                mark,
                color=colour,
                label=label,
            )
    axes.plot([dynamic["macs"] / 1e6], [100 * dynamic["accuracy"]], "o", color=BLUE, ms=9, label="dynamic, no budget")
    axes.plot([dense["macs"] / 1e6], [100 * dense["accuracy"]], "D", color=INK, ms=8, label="dense base")
    axes.set(xlabel="mean multiply-adds of an image (millions)", ylabel="accuracy (%)")
    axes.set_xlim(left=0)
    axes.legend(frameon=False)
    caption = "Accuracy over mean multiply-adds of an image."
    header = ("network", "accuracy", "mean MACs", "of dense", "largest MACs", "keep ratio", "ms an image")
    body = [
        (
            row["name"],
            percent(row["accuracy"], 2),
            millions(row["macs"]),
            percent(row["macs"] / dense["macs"]),
            millions(row["max_macs"]),
            f"{row['keep_ratio']:.3f}",
            f"{row['ms']:.2f}",
        )
        for row in summary.get("table", [])
    ]
    return ["<h2>Accuracy and cost</h2>", svg(figure, "cost", caption), table(header, body)]


def _unit_section(units: Sequence[dict[str, Any]]) -> list[str]:
    """Skip ratio of every unit."""
    figure, axes = figure_and_axes(width=max(7.0, 0.16 * len(units)))
    places = range(len(units))
    ratios = [100 * (unit["skip_ratio"] or 0.0) for unit in units]
    first = [i == 0 or units[i - 1]["stage"] != unit["stage"] for i, unit in enumerate(units)]
    axes.bar(places, ratios, color=[ORANGE if is_first else BLUE for is_first in first])
    for place in places:
        if first[place]:
            axes.axvline(place - 0.5, color=GREY, lw=0.8, ls=":")
        if units[place]["skip_ratio"] is None:
            axes.text(place, 2, "always runs", rotation=90, ha="center", va="bottom", fontsize=8, color=GREY)
    if len(units) <= 40:
        axes.set_xticks(list(places), [unit["name"] for unit in units], rotation=60, ha="right", fontsize=8)
    axes.set(ylabel="images that skip the unit (%)", xlabel="unit; the first of each stage is orange")
    axes.set_ylim(0, 100)
    caption = "Skip ratio of every unit; the first unit of each stage is orange."
    body = [
        (
            unit["name"] + (" (first of its stage)" if is_first else ""),
            "always runs" if unit["skip_ratio"] is None else percent(unit["skip_ratio"]),
        )
        for unit, is_first in zip(units, first, strict=True)
    ]
    return ["<h2>What is skipped</h2>", svg(figure, "units", caption), table(("unit", "skip ratio"), body)]


def _decision_section(summary: dict[str, Any]) -> list[str]:
    """How much the decisions depend on the image, and what that gains."""
    found, static = summary["decisions"], summary.get("static")
    channels = found["channel_keep_ratio"]
    gain = in_points(summary.get("adaptive_gain", 0.0), summary.get("adaptive_gain_error"))
    body = [
        ("images", f"{found['images']:,}"),
        ("distinct policies (patterns of layers kept)", f"{found['policies']:,}"),
        ("their entropy", f"{found['policy_entropy']:.2f} bits"),
        ("variance of keep between images, mean over units", f"{found['keep_variance']:.4f}"),
        ("standard deviation of an image's share of the dense MACs", f"{found['macs_share_std']:.4f}"),
        ("layers kept", percent(found["keep_ratio"])),
        ("channel groups kept", "no channel gates" if channels is None else percent(channels)),
        ("adaptive gain", gain if static else "not measured: --gain"),
        *((f"leave at exit {k}", percent(share)) for k, share in enumerate(found["exit_shares"])),
    ]
    if static:
        body += [
            ("best static policy, trained for as long", static["policy"]),
            ("its accuracy and multiply-adds", f"{percent(static['accuracy'], 2)} at {millions(static['macs'])}"),
        ]
    return ["<h2>How much depends on the image</h2>", table(("without budget", "value"), body)]


def training_section(rows: Sequence[dict[str, Any]], dense_macs: float, width: float = 7.0) -> list[str]:
    """Accuracy, cost and loss while training; `width` of the figures in inches."""
    steps = [row["step"] for row in rows]
    figure, axes = figure_and_axes(width)
    axes.plot(steps, [100 * row["accuracy"] for row in rows], "-o", ms=3, color=BLUE, label="accuracy")
    axes.plot(steps, [100 * row["macs"] / dense_macs for row in rows], "-s", ms=3, color=ORANGE, label="share of MACs")
    axes.plot(steps, [100 * row["keep_ratio"] for row in rows], ":", color=GREEN, label="keep ratio")
    _mark_stages(axes, rows)
    axes.set(xlabel="step", ylabel="%")
    axes.legend(frameon=False)
    loss, loss_axes = figure_and_axes(width, 3.0)
    loss_axes.plot(steps, [row["train"]["loss"] for row in rows], "-o", ms=3, color=INK)
    _mark_stages(loss_axes, rows)
    values = [row["train"]["loss"] for row in rows]
    far = min(values) > 0 and max(values) > 10 * min(values)
    loss_axes.set(xlabel="step", ylabel="training loss", yscale="log" if far else "linear")
    body = [
        (
            row["stage"],
            f"{row['step']:,}",
            percent(row["accuracy"], 2),
            millions(row["macs"]),
            f"{row['keep_ratio']:.3f}",
            str(row["policies"]),
        )
        for row in rows
    ]
    losses = [(row["stage"], f"{row['step']:,}", f"{row['train']['loss']:.4f}") for row in rows]
    return [
        "<h2>Training</h2>",
        svg(figure, "training", "Accuracy, share of the dense multiply-adds and keep ratio at each evaluation."),
        table(("stage", "step", "accuracy", "mean MACs", "keep ratio", "policies"), body),
        svg(loss, "loss", "Training loss, mean since the evaluation before; each stage has its own loss."),
        table(("stage", "step", "training loss"), losses),
    ]


# Drawing -------------------------------------------------------------------------------------------------------------


def figure_and_axes(width: float = 7.0, height: float = 4.0) -> tuple[Any, Any]:
    """An empty figure in the report's style; sizes in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _mark_stages(axes: Any, rows: Sequence[dict[str, Any]]) -> None:
    """A line where each stage begins, and its name; names of neighbours are at different heights."""
    begins = [i for i in range(len(rows)) if i == 0 or rows[i - 1]["stage"] != rows[i]["stage"]]
    for place, i in enumerate(begins):
        start = rows[i - 1]["step"] if i else 0
        height = 1.01 + 0.06 * (place % 2)
        axes.axvline(start, color=GREY, lw=0.8, ls=":")
        axes.text(start, height, rows[i]["stage"], transform=axes.get_xaxis_transform(), fontsize=8, color=INK)


def drawn(figure: Any, name: str) -> str:
    """A figure as the text of an SVG file; the same figure always gives the same text."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def svg(figure: Any, name: str, caption: str) -> str:
    """A figure as inline SVG."""
    # Figures share a page: their ids must not meet.
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", drawn(figure, name))
    start, end = text.index("<svg"), text.index(">", text.index("<svg")) + 1
    label = html.escape(caption, quote=True)
    opening = f'{text[start : end - 1]} role="img" aria-label="{label}">\n<title>{label}</title>'
    return f"<figure>\n{opening}{text[end:].rstrip()}\n<figcaption>{label}</figcaption>\n</figure>"


def table(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A table that scrolls sideways on a narrow screen."""

    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    rows = "\n".join([line(header, "th"), *(line(cells, "td") for cells in body)])
    return f'<div class="scroll"><table>\n{rows}\n</table></div>'


def percent(value: float, digits: int = 1) -> str:
    """A share in percent."""
    return f"{100 * value:.{digits}f} %"


def millions(macs: float) -> str:
    """MACs in millions."""
    return f"{macs / 1e6:.2f} M"
