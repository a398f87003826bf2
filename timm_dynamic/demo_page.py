"""What the demo shows as HTML: one string for each result, readable without colours and by a screen reader."""

import base64
import html
import io
from collections.abc import Sequence

from PIL import Image

from .cli.rows import Row
from .cli.tables import macs, percent, shape
from .demo_compare import RUNS, Knob, Outcome
from .report import BLUE

WORDS = {"ran": "ran", "part": "ran in part", "off": "skipped", "far": "not reached"}
STYLE = """
.td { --td: BLUE; --edge: var(--border-color-primary, #ccc);
  --soft: color-mix(in srgb, var(--body-text-color, #222) 75%, transparent);
  font-variant-numeric: tabular-nums; line-height: 1.45; }
.dark .td { --td: #6db3f2; }
.td p { margin: 0 0 .6rem; }
.td h1 { font-size: 1.5rem; margin: 0 0 .4rem; } .td .td-card h2 { font-size: 1.05rem; margin: 0 0 .5rem; }
.td p.td-verdict { font-size: 1.15rem; } .td-verdict b { color: var(--td); }
.td .td-soft, .td .td-soft * { color: var(--soft); font-size: .875rem; }
.td-cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 17rem), 1fr)); gap: 1rem; }
.td-card { border: 1px solid var(--edge); border-radius: .6rem; padding: .9rem 1rem; min-width: 0; }
.td-row { display: grid; grid-template-columns: minmax(0, 1fr) auto; column-gap: .6rem; margin: .3rem 0; }
.td-row span { overflow-wrap: anywhere; } .td-row span:last-of-type { text-align: right; }
.td-bar { grid-column: 1 / -1; height: .4rem; border-radius: .2rem;
  background: color-mix(in srgb, var(--td) 14%, transparent); }
.td-bar i { display: block; height: 100%; border-radius: .2rem; background: var(--td); min-width: 2px; }
.td-cost .td-row { font-size: .85rem; }
.td-cost { border-top: 1px solid var(--edge); margin-top: .8rem; padding-top: .5rem; }
.td-strip { display: flex; flex-wrap: wrap; gap: .25rem .6rem; margin: .3rem 0 .2rem; }
.td-strip span { display: flex; flex-wrap: wrap; gap: 3px; }
.td-u { display: inline-block; width: 13px; height: 26px; border-radius: 2px; border: 1.5px solid var(--td);
  box-sizing: border-box; }
.td-ran { background: var(--td); }
.td-part { background: linear-gradient(to top, var(--td) var(--part, 50%), transparent 0); }
.td-far { border: 1.5px dashed var(--soft); opacity: .55; }
.td p.td-legend { display: flex; flex-wrap: wrap; gap: .2rem 1rem; margin-top: .6rem; }
.td-legend span { display: flex; align-items: center; gap: .35rem; }
.td-legend .td-u { height: 16px; width: 9px; }
.td-seen { display: flex; gap: .8rem; align-items: center; margin-top: .8rem; }
.td-seen img { width: 72px; height: auto; border-radius: .3rem; image-rendering: pixelated; margin: 0; flex: none; }
#samples .grid-wrap { height: auto; max-height: none; min-height: 0; overflow: visible; }
#samples .grid-container { grid-template-columns: repeat(var(--grid-cols), minmax(0, 1fr)); padding-top: 1.8rem; }
#samples .grid-container { grid-template-rows: none; grid-auto-rows: auto; }
#samples .gallery-item, #samples .thumbnail-lg { aspect-ratio: 1; height: auto; min-width: 0; min-height: 0; }
#samples .caption-label { font-size: .7rem; padding: 0 .3rem; max-width: 100%; }
.td-error { border-left: 4px solid #c0392b; padding: .5rem .8rem; }
""".replace("BLUE", BLUE)


def introduction(name: str, about_dense: str) -> str:
    """What the visitor looks at; above everything else."""
    return (
        f"<style>{STYLE}</style><div class='td'><h1>Each image decides what runs</h1>"
        "<p>A dynamic network skips what it thinks an image does not need. Move the slider to let it do less or more. "
        "Beside it: the same image through a dense network, in which everything runs.</p>"
        f"<p class='td-soft'>Dynamic: <code>{_text(name)}</code>. Dense: {_text(about_dense)}.</p></div>"
    )


def knob_text(knob: Knob) -> tuple[str, str]:
    """Label and explanation of the slider."""
    if knob.kind == "budget":
        return (
            "Budget: % of the dense network's multiply-adds",
            f"A hard limit for this image. {knob.low:g} % is the least this network can promise.",
        )
    return (
        "Gate threshold: to the right, more is skipped",
        "A unit runs where its gate's probability is at least this. This network has no exits and so takes no hard "
        "budget: what an image costs is up to the image.",
    )


def nothing_yet() -> str:
    """Shown while there is no image."""
    return "<div class='td'><p>Drop an image, or pick a sample.</p></div>"


def problem(message: str) -> str:
    """Shown in the place of a result."""
    return f"<div class='td'><p class='td-error' role='alert'>{_text(message[:1].upper() + message[1:])}.</p></div>"


def render(outcome: Outcome, limit: float | None = None) -> str:
    """A result.

    Args:
        outcome: of `Comparison`.
        limit: percent of the dense MACs that the image was allowed; None if there was no limit.
    """
    row = outcome.dynamic
    units = row["units"]
    all_ran = [{**unit, "ran": 1.0} for unit in units]
    most = max(row["macs"], row["dense_macs"]), max(outcome.ms, outcome.dense_ms)
    dense = {"macs": row["dense_macs"], "macs_share": 1.0}
    allowed = "" if limit is None else f"; limit {limit:g} %"
    return (
        f"<div class='td' role='status'>{verdict(outcome)}<div class='td-cards'>"
        + _card("Dynamic", row["top"], units, exit_sentence(row), _cost(row, outcome.ms, most, allowed))
        + _card("Dense", outcome.dense, all_ran, "", _cost(dense, outcome.dense_ms, most))
        + f"</div>{_legend(units)}{_seen(outcome)}</div>"
    )


def verdict(outcome: Outcome) -> str:
    """The result in a sentence or two."""
    row, ratio = outcome.dynamic, outcome.ms / outcome.dense_ms
    mine, other = (_label(top[0]) for top in (row["top"], outcome.dense))
    agree = f"Both say <b>{mine}</b>." if mine == other else f"It says <b>{mine}</b>, the dense network <b>{other}</b>."
    share = percent(row["macs_share"], 0)
    slow = ""
    if row["macs_share"] < 1 and ratio > 1.03:
        slow = (
            "<p class='td-soft'>Fewer multiply-adds, but no less time: at this size, deciding takes longer than what "
            "was skipped would have.</p>"
        )
    return (
        f"<p class='td-verdict'>{agree} The dynamic network took <b>{share}</b> of the multiply-adds "
        f"and <b>{ratio:.2f} times</b> the time.</p>{slow}"
    )


def exit_sentence(row: Row) -> str:
    """Where the image left; empty if there is one way out only."""
    if row["exits"] == 1:
        return ""
    if row["left_at"] == "head":
        return f"It went all the way, to exit {row['exits']} of {row['exits']}."
    return f"It left at exit {row['exit'] + 1} of {row['exits']}, after {_text(row['left_at'])}."


# Parts ---------------------------------------------------------------------------------------------------------------


def _text(value: object) -> str:
    return html.escape(str(value))


def _label(guess: Row) -> str:
    return _text(guess["label"] or f"class {guess['class']}")


def _chance(probability: float) -> str:
    return percent(probability) if probability >= 0.001 else "&lt; 0.1 %"


def _bar(title: str, value: str, share: float) -> str:
    return (
        f"<div class='td-row'><span>{title}</span><span>{value}</span>"
        f"<div class='td-bar'><i style='width:{100 * min(max(share, 0), 1):.1f}%'></i></div></div>"
    )


def _card(title: str, top: Sequence[Row], units: Sequence[Row], where: str, cost: str) -> str:
    """One network: classes, strip, cost."""
    guesses = "".join(_bar(_label(guess), _chance(guess["probability"]), guess["probability"]) for guess in top)
    return (
        f"<section class='td-card' aria-label='{title} network'><h2>{title}</h2>{guesses}"
        f"<div class='td-cost'>{strip_text(units)} {where}{strip(units)}</div>"
        f"<div class='td-cost'>{cost}</div></section>"
    )


def _cost(row: Row, ms: float, most: tuple[float, float], allowed: str = "") -> str:
    """MACs and milliseconds as bars; `most` is what a whole bar stands for."""
    spent = f"{macs(row['macs'])} ({percent(row['macs_share'], 0)}{allowed})"
    return _bar("<abbr title='multiply-adds'>MACs</abbr>", spent, row["macs"] / most[0]) + _bar(
        "Time", f"{ms:.{2 if ms < 10 else 1}f} ms", ms / most[1]
    )


def _kind(ran: float | None) -> str:
    return "far" if ran is None else "off" if ran == 0 else "ran" if ran >= 1 else "part"


def strip_text(units: Sequence[Row]) -> str:
    """The strip in words: how many units ran."""
    kinds = [_kind(unit["ran"]) for unit in units]
    ran = kinds.count("ran") + kinds.count("part")
    part = f", {kinds.count('part')} of them in part" if "part" in kinds else ""
    return f"<b>{ran} of {len(units)}</b> layers ran{part}."


def strip(units: Sequence[Row]) -> str:
    """A box for each unit in running order, stages apart."""
    words = ", ".join(f"{_text(unit['name'])} {_said(unit['ran'])}" for unit in units)
    stages: dict[int, list[str]] = {}
    for unit in units:
        kind = _kind(unit["ran"])
        part = f" style='--part:{100 * unit['ran']:.0f}%'" if kind == "part" else ""
        box = f"<i class='td-u td-{kind}'{part} title='{_text(unit['name'])}: {_said(unit['ran'])}'></i>"
        stages.setdefault(unit["stage"], []).append(box)
    boxes = "".join(f"<span>{''.join(stage)}</span>" for stage in stages.values())
    return f"<div class='td-strip' role='img' aria-label='{words}'>{boxes}</div>"


def _said(ran: float | None) -> str:
    """What became of a unit."""
    return f"ran with {percent(ran, 0)} of its channels" if ran is not None and 0 < ran < 1 else WORDS[_kind(ran)]


def _legend(units: Sequence[Row]) -> str:
    kinds = [kind for kind in WORDS if any(_kind(unit["ran"]) == kind for unit in units)]
    signs = "".join(f"<span><i class='td-u td-{kind}'></i>{WORDS[kind]}</span>" for kind in kinds)
    return f"<p class='td-soft td-legend' aria-hidden='true'>{signs}</p>"


def _seen(outcome: Outcome) -> str:
    file = io.BytesIO()
    outcome.seen.save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode()
    size: tuple[int, int] = outcome.seen.size
    quietest = f", at the quietest of {outcome.tries} tries" if outcome.tries > 1 else ""
    return (
        f"<div class='td-seen td-soft'><img alt='The image as the networks see it' "
        f"src='data:image/png;base64,{data}'><span>What the networks see: {shape(size)} pixels. "
        f"Time: one image alone on this machine, both networks optimised, the median of {RUNS} runs each in turns"
        f"{quietest}.</span></div>"
    )


def thumbnail(image: Image.Image, side: int) -> Image.Image:
    """A copy of an image that fits into a square."""
    small = image.copy()
    small.thumbnail((side, side))
    return small
