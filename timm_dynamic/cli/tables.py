"""How the commands show what they computed."""

import sys
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

Row = dict[str, Any]
WIDTH = 160  # columns where there is no terminal to ask
MOST_TAGS = 3  # shown in a line of the list
BLOCKS = "█▓░·│"  # a unit that ran, ran in part, was skipped, was not reached; between stages
ASCII = "#+-.|"
SIGNS = ("ran", "ran in part", "skipped", "not reached")


def console() -> Console:
    """Where tables go; names with brackets are printed as they are."""
    width = None if sys.stdout.isatty() else WIDTH
    return Console(width=width, markup=False, emoji=False, highlight=False)


def macs(value: float) -> str:
    """MACs as one reads them."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            shown = value / size
            return f"{shown:.{2 if shown < 10 else 1 if shown < 100 else 0}f} {unit}"
    return f"{value:.0f}"


def percent(share: float, digits: int = 1) -> str:
    """A share in percent; small ones keep two digits."""
    if 0 < share < 0.001:
        return f"{100 * share:.2g} %"
    return f"{100 * share:.{digits}f} %"


def shape(size: Sequence[int]) -> str:
    """An input size as one reads it."""
    return " x ".join(map(str, size))


def _table(*columns: str, left: int = 1, title: str | None = None) -> Table:
    """A table whose first columns are text and whose others are numbers."""
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i < left else "right", overflow="fold")
    table.columns[0].no_wrap = True
    return table


# list ----------------------------------------------------------------------------------------------------------------


def print_list(rows: Sequence[Row]) -> None:
    """The networks, one in each line."""
    table = _table("name", "base", "gates", "exits", "params", "GMACs", "weights", left=3)
    table.caption = "* gates and exits are trained too; other weights are the base's, gates open"
    table.caption_justify = "left"
    table.columns[-1].justify = "left"
    for row in rows:
        counted = row["params"] is not None
        exits = row["exits"] if counted else ("yes" if row["has_exits"] else 0)
        table.add_row(
            row["name"],
            row["base"],
            gates_of(row) or "-",
            str(exits or "-"),
            f"{row['params'] / 1e6:.2f} M" if counted else "",
            f"{row['macs'] / 1e9:.3f}" if counted else "",
            _tags(row),
        )
    console().print(table)


def gates_of(row: Row) -> str:
    """The kinds of gates."""
    kinds = (("layer", row["layer_gates"]), ("channel", row["channel_gates"]))
    return ", ".join(f"{where} ({kind})" for where, kind in kinds if kind)


def _tags(row: Row) -> str:
    own = row["trained_tags"] if row["base"] != row["name"] else ()
    tags = [*(f"{tag}*" for tag in own), *(tag for tag in row["pretrained_tags"] if tag not in own)]
    more = f" and {len(tags) - MOST_TAGS} more" if len(tags) > MOST_TAGS else ""
    return ", ".join(tags[:MOST_TAGS]) + more


# profile -------------------------------------------------------------------------------------------------------------


def print_profile(row: Row) -> None:
    """Units, exits and totals."""
    out, dense = console(), row["dense_macs"]
    gates = gates_of(row)
    out.print(f"{row['name']} at {shape(row['input_size'])}, {row['params'] / 1e6:.2f} M parameters")
    out.print(f"gates: {gates or 'none'}; exits before the head: {len(row['exits']) - 1}")
    out.print(_unit_table(row))
    out.print(_exit_table(row))
    if not gates and len(row["exits"]) == 1:
        out.print(f"A dense network: no gates, no exits. Every image costs {macs(dense)} MACs.")
        return
    for part in ("layer", "channel"):
        if row[f"{part}_gates"]:
            cost, share = row[f"{part}_gate_macs"], row[f"{part}_gate_share"]
            out.print(f"{part} gates together: {macs(cost)} MACs, {percent(share, 2)} of the dense network")
    for which in ("cheapest", "dearest"):
        out.print(f"{which} image: {macs(row[which])} MACs, {percent(row[f'{which}_share'])} of the dense network")
    if len(row["exits"]) > 1:
        out.print(
            f"with --confidence an image also pays the exits it passes: up to {macs(row['dearest_passing'])} MACs"
        )


def _unit_table(row: Row) -> Table:
    """What each unit costs; stem, transitions and head are there so that the MACs add up."""
    gates = [part for part in ("layer_gate", "channel_gate") if row[f"{part}s"]]
    grouped = ["channel groups"] if row["channel_gates"] else []
    table = _table("unit", "MACs", "skippable", *(part.replace("_", " ") for part in gates), *grouped)

    def add(name: str, cost: int, *cells: str, end: bool = True) -> None:
        table.add_row(name, macs(cost), *cells, end_section=end)

    add("stem", row["stem_macs"])
    for i, unit in enumerate(row["units"]):
        last = i + 1 == len(row["units"]) or row["units"][i + 1]["stage"] != unit["stage"]
        after = row["after_stage_macs"][unit["stage"]] if last else 0
        groups = [_groups(unit)] if grouped else []
        runs = "yes" if unit["skippable"] and not unit["open"] else "always runs"
        runs = "shut for good" if unit["shut"] else runs
        add(unit["name"], unit["macs"], runs, *(_gate(unit, part) for part in gates), *groups, end=last and not after)
        if after:
            add(f"after stage {unit['stage'] + 1}", after)
    add("head", row["exits"][-1]["head_macs"])
    add("dense network", row["dense_macs"], "", *(_gate(row, part) for part in gates))
    return table


def _groups(unit: Row) -> str:
    """How many channel groups each hidden width has; where they are settled, how many of them are computed."""
    kept = unit["settled_channels"]
    counts = unit["channel_groups"] if kept is None else kept
    return " + ".join(map(str, counts)) + ("" if kept is None else " for all")


def _gate(row: Row, part: str) -> str:
    """A gate's MACs, and their share of the unit or the network that it stands in."""
    cost = row[f"{part}_macs"]
    return f"{macs(cost)} = {percent(row[f'{part}_share'], 2)}" if cost else ""


def _exit_table(row: Row) -> Table:
    table = _table("exit", "after", "its head", "cheapest", "of dense", "dearest", "of dense", left=2)
    for stop in row["exits"]:
        table.add_row(
            str(stop["exit"]),
            row["units"][-1]["name"] + " (head)" if stop["name"] == "head" else stop["name"],
            macs(stop["head_macs"]),
            macs(stop["cheapest"]),
            percent(stop["cheapest_share"]),
            macs(stop["dearest"]),
            percent(stop["dearest_share"]),
        )
    return table


# predict -------------------------------------------------------------------------------------------------------------


def print_prediction(row: Row) -> None:
    """Classes, the strip of units, and what the image cost."""
    out = console()
    signs = _signs(out)
    out.print(row["image"], style="bold")
    for guess in row["top"]:
        label = guess["label"] or f"class {guess['class']}"
        out.print(f"  {percent(guess['probability']):>7}  {label}")
    out.print(Text("  " + strip(row["units"], signs)), soft_wrap=True)
    left = "at the head" if row["left_at"] == "head" else f"at exit {row['exit']}, after {row['left_at']}"
    where = f"left {left}; " if row["exits"] > 1 else ""
    share = percent(row["macs_share"])
    out.print(f"  {where}{macs(row['macs'])} MACs, {share} of the dense network's {macs(row['dense_macs'])}\n")


def print_legend() -> None:
    """What the signs of a strip mean."""
    out = console()
    out.print("  ".join(f"{sign} {word}" for sign, word in zip(_signs(out), SIGNS, strict=False)))


def _signs(out: Console) -> str:
    return ASCII if out.options.ascii_only else BLOCKS


def strip(units: Sequence[Row], signs: str = BLOCKS) -> str:
    """A sign for each unit in running order, stages apart."""
    drawn = ""
    for i, unit in enumerate(units):
        if i and units[i - 1]["stage"] != unit["stage"]:
            drawn += signs[4]
        ran = unit["ran"]
        drawn += signs[3] if ran is None else signs[2] if ran == 0 else signs[0] if ran == 1 else signs[1]
    return drawn


# evaluate ------------------------------------------------------------------------------------------------------------


def _calibrated(found: Row) -> Iterator[tuple[str, str]]:
    """Thresholds that were set, and what they gave on the images that they were set on."""
    yield "calibrated on held-out images to", f"{percent(found['fraction'])} of dense"
    if found["threshold"] is not None:
        yield "gates keep from a probability of", f"{found['threshold']:.4g}"
    leaves = "no image" if found["confidence"] > 1 else f"{found['confidence']:.4g}"
    yield "images leave from a confidence of", leaves


def _against(other: Row) -> Iterator[tuple[str, str]]:
    """Another network on the same images, and the difference."""
    from ..evaluation import in_points

    yield f"accuracy of {other['name']}", percent(other["accuracy"], 2)
    yield "its mean MACs", f"{macs(other['macs'])} = {percent(other['macs_share'])} of dense"
    yield "difference in accuracy", in_points(other["difference"], other["standard_error"])
    yield "recognised by only the first", percent(other["recognised_by_the_first_only"], 2)
    yield "recognised by only the second", percent(other["recognised_by_the_second_only"], 2)


def print_evaluation(row: Row) -> None:
    """Accuracy and cost, and where images left."""
    table = _table("measure", "value", title=f"{row['name']} on {row['data']}")
    channels = row["channel_keep_ratio"]
    for name, value in (
        ("images", f"{row['images']:,}"),
        ("accuracy", percent(row["accuracy"], 2)),
        ("mean MACs of an image", f"{macs(row['macs'])} = {percent(row['macs_share'])} of dense"),
        ("MACs of the dearest image", f"{macs(row['max_macs'])} = {percent(row['max_macs'] / row['dense_macs'])}"),
        ("MACs of the dense network", macs(row["dense_macs"])),
        ("spread of MACs between images", f"{percent(row['macs_share_std'], 2)} of dense"),
        ("keep ratio", f"{row['keep_ratio']:.3f}"),
        ("channel groups kept", "no channel gates" if channels is None else f"{channels:.3f}"),
        ("policies", f"{row['policies']:,}"),
        ("their entropy", f"{row['policy_entropy']:.2f} bits"),
        *((f"left at exit {e['exit']} ({e['name']})", percent(e["share"])) for e in row["exits"]),
        *(_calibrated(row["calibrated"]) if "calibrated" in row else ()),
        *(_against(row["against"]) if "against" in row else ()),
    ):
        table.add_row(name, value)
    console().print(table)
