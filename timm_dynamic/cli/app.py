"""The commands: what they take, and in which order things are done."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from ..version import __version__
from . import tables
from .demo import demo
from .errors import BadInput, CommandError, check_place
from .evaluate import evaluate
from .options import (
    ChannelMode,
    Confidence,
    Device,
    Exit,
    Fraction,
    GateKind,
    InputSize,
    Json,
    Name,
    Weights,
    print_json,
    progress,
)
from .report import report

COUNTED = 40  # a list of at most this many networks counts parameters and MACs
EXIT_CODES = "Exit codes: 0 done; 1 the network, the Hub or something unexpected failed; 2 wrong input."

app = typer.Typer(
    name="timm-dynamic",
    help="ResNets and DenseNets in which each image decides what runs.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Print what the user can act on as one line on stderr, and exit with its code."""
    try:
        yield
    except CommandError as error:
        _complain(error)
        raise typer.Exit(error.exit_code) from None


def _complain(error: CommandError) -> None:
    typer.echo(f"error: {error}", err=True)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"timm-dynamic {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """What can be asked of the program itself."""


@app.command("list", epilog=EXIT_CODES)
def list_networks(
    pattern: Annotated[
        str | None, typer.Argument(help="Wildcard such as 'ddi_resnet*', or a part of the name; default: all.")
    ] = None,
    pretrained: Annotated[
        bool, typer.Option("--pretrained", help="Only networks with weights, be they the base's.")
    ] = False,
    count: Annotated[
        bool | None,
        typer.Option(
            "--count/--fast",
            help=f"Count parameters, MACs and exits, or leave them out. Default: count up to {COUNTED} networks.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """List the dynamic networks: base, gates, exits, size and weights.

    GMACs are those of the dense network at its own input size.
    """
    with one_line_errors():
        from . import rows

        found = rows.names(pattern, pretrained)
        counted = len(found) <= COUNTED if count is None else count
        names = progress(found.items(), len(found), "counting") if counted else found.items()
        lines = [rows.list_row(name, tags, counted) for name, tags in names]
        if as_json:
            print_json(lines)
            return
        tables.print_list(lines)
        if count is None and not counted:
            typer.echo(f"{len(lines)} networks; --count counts parameters and MACs of more than {COUNTED}", err=True)


@app.command(epilog=EXIT_CODES)
def profile(
    name: Name,
    input_size: InputSize = None,
    layer_gates: Annotated[
        GateKind | None, typer.Option(help="Layer gates in the place of the network's own, or new ones.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show where a network's MACs go: unit by unit, gates and exits, the cheapest and the dearest image.

    No weights are loaded: only the shapes are needed.
    """
    with one_line_errors():
        from .models import load_shapes
        from .rows import profile as compute

        kind = layer_gates.value if layer_gates else None
        row = compute(load_shapes(name, layer_gates=kind), name, input_size)
        print_json(row) if as_json else tables.print_profile(row)


@app.command(epilog=EXIT_CODES)
def predict(
    name: Name,
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Image files.", show_default=False)],
    budget_fraction: Fraction = None,
    exit: Exit = None,
    confidence: Confidence = None,
    pretrained: Weights = True,
    as_json: Json = False,
) -> None:
    """Classify images: the five likeliest classes, the units that ran, the MACs against the dense network's.

    An image that cannot be read gets a line on stderr; the others are classified, and the exit code is 2.
    """
    with one_line_errors():
        from . import rows
        from .images import Preparation, class_names
        from .models import load, restrict

        model = load(name, pretrained=pretrained)
        prepare, labels = Preparation(model), class_names(model)
        restrict(model, prepare.input_size, budget_fraction, exit, confidence)
        found, failed = [], 0
        for path in images:
            try:
                x = prepare(path)
            except BadInput as error:
                failed += 1
                _complain(error)
                continue
            found.append({"image": str(path), **rows.predict(model, x, labels)})
            if not as_json:
                tables.print_prediction(found[-1])
        if as_json:
            print_json(found)
        elif found:
            tables.print_legend()
        if failed:
            raise typer.Exit(BadInput.exit_code)


app.command(epilog=EXIT_CODES)(one_line_errors()(evaluate))


# What `benchmark` takes
Several = Annotated[
    list[int] | None, typer.Option(help="Images in a call; may be given again. Default: 1 and 8; training: 128.")
]
Keeps = Annotated[
    list[float] | None,
    typer.Option(help="Share of the gated layers that run; may be given again. Default: 1, 0.75, 0.5."),
]
Engines = Annotated[
    list[str] | None,
    typer.Option(help="dense, masked, skipping, optimised (these by default), compile or onnx (batch 1)."),
]
OtherLayers = Annotated[GateKind | None, typer.Option(help="Layer gates in the place of the network's own.")]
OtherChannels = Annotated[ChannelMode | None, typer.Option(help="Channel gates in the place of the network's own.")]
Dtype = Annotated[
    str | None, typer.Option(help="float32, bfloat16 or float16. Default: float32; training: the faster.")
]


@app.command(epilog=EXIT_CODES)
def benchmark(
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="Dynamic networks.", show_default=False)],
    batch_size: Several = None,
    keep: Keeps = None,
    channel_keep: Annotated[float, typer.Option(help="Share of the channel groups that are kept.")] = 1.0,
    exit: Annotated[int | None, typer.Option(help="All images leave at this exit; 0 is the first.")] = None,
    engine: Engines = None,
    input_size: InputSize = None,
    layer_gates: OtherLayers = None,
    channel_mode: OtherChannels = None,
    train: Annotated[bool, typer.Option("--train", help="Time training steps instead: base, SP and HRL.")] = False,
    budgets: Annotated[bool, typer.Option("--budgets", help="Time images under latency budgets instead.")] = False,
    rounds: Annotated[int | None, typer.Option(help="Timed turns of each engine; default 15, for budgets 100.")] = None,
    threads: Annotated[int | None, typer.Option(help="Of the CPU; default: torch's own choice.")] = None,
    dtype: Dtype = None,
    device: Device = None,
    as_json: Json = False,
    figure: Annotated[Path | None, typer.Option(help="SVG file to draw time over MACs into.")] = None,
) -> None:
    """Time dynamic networks beside dense ones: is skipped work skipped time?

    Decisions are drawn once and forced, the same for all engines; weights are random. Engines take turns in an order
    that changes. Exit code 1 if an engine does not give what the plain network gives.
    """
    with one_line_errors():
        from . import benchmark as bench

        kind, mode = (option.value if option else None for option in (layer_gates, channel_mode))
        sizes = batch_size or ([128] if train else None)
        given: dict[str, Any] = {
            "channel_keep": channel_keep,
            "exit": exit,
            "engines": engine,
            "input_size": input_size,
        }
        if budgets and (train or figure is not None):
            raise BadInput("--budgets goes without --train and --figure")
        check_place(figure)
        rounds = 100 if budgets and rounds is None else rounds
        given |= {"rounds": rounds, "threads": threads, "dtype": dtype, "device": device}
        config = bench.settings(batch_sizes=sizes, keeps=keep, **given)
        models = {name: bench.network(name, kind, mode) for name in names}
        if budgets:
            found = bench.run_budgets(models, config, _turns)
        elif train:
            found = bench.run_training(models, config, keep or (), dtype, _turns)
        else:
            found = bench.run(models, config, _turns)
        bench_rows = [{"name": name, **row.to_dict()} for name, own in found.items() for row in own]
        print_json(bench_rows) if as_json else bench.show(found, config)
        if figure is not None:
            bench.draw(found, figure)
        bench.check(found)


def _turns(turns: Any) -> Iterable[int]:
    """A bar over the rounds of a benchmark."""
    return progress(turns, len(turns), "timing")


@app.command(epilog=EXIT_CODES)
def export(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="A registered name, a folder of a run, or hf-hub:ORG/NAME.")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="The file to write: ends in .onnx.")],
    input_size: InputSize = None,
    dynamic_batch: Annotated[
        bool, typer.Option("--dynamic-batch", help="Any number of images at once: all is computed, nothing skipped.")
    ] = False,
    images: Annotated[int, typer.Option(min=1, help="Random images to compare the file with PyTorch on.")] = 8,
    budget_fraction: Fraction = None,
    exit: Exit = None,
    confidence: Confidence = None,
    pretrained: Weights = True,
    as_json: Json = False,
) -> None:
    """Write a network as an ONNX file in which skipped work is not done, and compare it with PyTorch.

    For one image at a time; gates and exits are If nodes. Exit code 1 if the file does not agree with PyTorch.
    """
    with one_line_errors():
        from ..budgets import default_input_size
        from . import export as onnx
        from .models import load, restrict

        model = load(onnx.source_of(name), pretrained=pretrained)
        size = input_size or default_input_size(model)
        restrict(model, size, budget_fraction, exit, confidence)
        row = onnx.export(model, name, output, size, dynamic_batch, images)
        print_json(row) if as_json else onnx.show(row)
        onnx.check(row)


app.command(epilog=EXIT_CODES)(one_line_errors()(report))


@app.command(epilog=EXIT_CODES)
def publish(
    folder: Annotated[
        Path | None, typer.Argument(metavar="DIR", help="Folder of a run, or of save_pretrained.", show_default=False)
    ] = None,
    repo_id: Annotated[
        str | None,
        typer.Argument(metavar="REPO_ID", help="org/name on the Hub; made if it does not exist.", show_default=False),
    ] = None,
    everything: Annotated[
        str | None,
        typer.Option("--all", metavar="ORG", help="Upload every model that ships with the package, each to ORG/NAME."),
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make the repository private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch, made if it does not exist; default: main.")] = None,
    as_json: Json = False,
) -> None:
    """Upload a run's model to the Hub: weights, config and card in one commit, or none if nothing has changed.

    The token is that of `hf auth login` or HF_TOKEN.
    """
    with one_line_errors():
        from . import runs

        if everything is not None and folder is None:
            uploaded = runs.publish_all(everything, private, revision)
            for row in uploaded if not as_json else ():
                typer.echo(f"{row['repo']} holds {row['name']}: {row['url']}")
            if as_json:
                print_json(uploaded)
            return
        if everything is not None or folder is None or repo_id is None:
            raise BadInput("give DIR and REPO_ID, or --all ORG for the models that ship with the package")
        done = runs.publish(folder, repo_id, private, revision)
        print_json(done) if as_json else typer.echo(f"{done['repo']} holds {folder}: {done['url']}")


@app.command(epilog=EXIT_CODES)
def card(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A registered name, such as skipnet_resnet50.a1_in1k.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File to write; default: stdout.")] = None,
) -> None:
    """Write the model card of a registered network: with the trained weights that ship with the package, or its base's.

    The model of a run gets its card with `publish`.
    """
    with one_line_errors():
        from .runs import card as write

        text = write(name, output)
        typer.echo(text if output is None else str(output), nl=output is not None)


app.command(epilog=EXIT_CODES)(one_line_errors()(demo))


def main() -> None:
    """Run the console script."""
    app(prog_name="timm-dynamic")
