"""The command `report`: what a network does with images and what the papers claim, or a run's page once more."""

import json
from pathlib import Path
from typing import Annotated

import typer

from .errors import BadInput, bad_input, check_place
from .options import Device

PAGE = "report.html"
Several = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME", help="Another network on the same images: dense, smaller, other alphas. May be given again."
    ),
]
Targets = Annotated[
    list[float] | None,
    typer.Option(metavar="SHARE", help="To calibrate to, of the dense MACs; may be given again. Default: 0.3 to 0.9."),
]
Studies = Annotated[
    list[Path] | None,
    typer.Option(
        metavar="FILE", help="comparison.json of compare.py, or steps of benchmark --train --json. May be given again."
    ),
]


def report(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="A registered name, local-dir:FOLDER, hf-hub:ORG/NAME, or a folder.")
    ],
    data: Annotated[
        Path | None, typer.Option(help="Folder with val/ (and train/), each with a folder a class.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="Folder in --data to use. Default: as in evaluate.")] = None,
    beside: Several = None,
    held_out: Annotated[
        int | None, typer.Option(min=1, help="Calibrate on the N images of DATA/train that --holdout N holds out.")
    ] = None,
    target: Targets = None,
    study: Studies = None,
    images: Annotated[int | None, typer.Option(min=1, help="Look at so many images only, drawn at random.")] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="The page. Default: report.html, in the run's folder if any.")
    ] = None,
    figures: Annotated[Path | None, typer.Option(metavar="DIR", help="Write each figure there too, as SVG.")] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 100,
    workers: Annotated[int, typer.Option(min=0, help="Processes that read images; 0: this one.")] = 0,
    threads: Annotated[int | None, typer.Option(min=1, help="Of the CPU; default: torch's own choice.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Timed runs of each network.")] = 32,
    device: Device = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the tables' numbers as JSON on stdout.")] = False,
) -> None:
    """Write the papers' analyses of a network on a folder of images, as one page.

    Accuracy over cost, what is skipped and for which images, features, confidence, time, and the papers' claims beside
    our numbers. Without --data the report.html of a finished run is made again from its summary.json and metrics.jsonl.
    """
    if data is None:
        options = {"--beside": beside, "--held-out": held_out, "--target": target, "--study": study, "--images": images}
        _again(name, {**options, "--output": output, "--figures": figures, "--json": as_json})
        return
    if target and held_out is None:
        raise BadInput("--target needs --held-out: the training images to calibrate on")
    for share in target or ():
        if not 0 < share <= 1:
            raise BadInput(f"--target must be a share of the dense MACs in (0, 1]; found {share}")
    from .analyses import Request, Wanted, analyse_named, run_folder

    path = output or (run_folder(name) or Path()) / PAGE
    check_place(path)
    if figures is not None and figures.exists() and not figures.is_dir():
        raise BadInput(f"--figures must name a folder; found the file {figures}")
    request = Request(name, data, split, batch_size, workers, device, threads)
    wanted = Wanted(beside or (), study or (), images, held_out, target, rounds)
    found = analyse_named(request, wanted)
    with bad_input(OSError, about=f"{path} cannot be written"):
        path.write_text(found.html(), encoding="utf-8")
    if figures is not None:
        _draw(found.figures(), figures)
    typer.echo(json.dumps({"report": str(path), **found.numbers()}, indent=2) if as_json else str(path))


def _draw(figures: dict[str, str], folder: Path) -> None:
    """Write figures as files; the folder is made if need be."""
    with bad_input(OSError, about=f"the figures cannot be written to {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in figures.items():
            (folder / f"{name}.svg").write_text(text, encoding="utf-8")


def _again(name: str, options: dict[str, object]) -> None:
    """Make a run's page again, to which no option of the analyses belongs."""
    given = [option for option, value in options.items() if value]
    if given:
        raise BadInput(f"{given[0]} goes with --data: the folder of images to look at")
    from .runs import report as write

    typer.echo(write(Path(name.removeprefix("local-dir:"))))
