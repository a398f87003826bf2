"""Options that several commands take, and how they all print."""

import json
import sys
from collections.abc import Iterable
from enum import StrEnum
from typing import Annotated, Any

import typer

from ..configs import CHANNEL_GATE_MODES, LAYER_GATE_KINDS

GateKind = StrEnum("GateKind", LAYER_GATE_KINDS)  # type: ignore[misc]
ChannelMode = StrEnum("ChannelMode", CHANNEL_GATE_MODES)  # type: ignore[misc]
Name = Annotated[
    str, typer.Argument(metavar="NAME", help="A registered name (timm's own too), local-dir:FOLDER or hf-hub:ORG/NAME.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, and nothing else there.")]
InputSize = Annotated[
    tuple[int, int, int] | None,
    typer.Option(metavar="C H W", help="Channels, height and width; default: the network's own."),
]
Weights = Annotated[bool, typer.Option("--pretrained/--no-pretrained", help="Trained weights, or random ones.")]
Fraction = Annotated[
    float | None, typer.Option("--budget-fraction", help="Hard budget: share of the dense network's MACs.")
]
Exit = Annotated[int | None, typer.Option("--exit", help="Leave at this exit; 0 is the first.")]
Confidence = Annotated[
    float | None, typer.Option("--confidence", help="Leave at the first exit that is so sure (0..1).")
]
Device = Annotated[str | None, typer.Option(help="Default: cuda if there is one, else cpu.")]


def print_json(value: Any) -> None:
    """JSON on stdout."""
    typer.echo(json.dumps(value, indent=2))


def progress(items: Iterable[Any], total: int, what: str) -> Iterable[Any]:
    """A progress bar on stderr, if that is a terminal."""
    if not sys.stderr.isatty():
        return items
    from rich.console import Console
    from rich.progress import track

    return track(items, what, total, console=Console(stderr=True), transient=True)
