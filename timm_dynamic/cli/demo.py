"""The command `demo`: a page in the browser."""

import signal
import socket
from pathlib import Path
from typing import Annotated, Any

import typer

from .errors import BadInput, Failed, one_line


def demo(
    name: Annotated[
        str | None,
        typer.Argument(metavar="[NAME]", help="A registered name with its tag, local-dir:FOLDER or hf-hub:ORG/NAME."),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; by default only this machine reaches it.")] = (
        "127.0.0.1"
    ),
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Default: the first free one from 7860 on.")
    ] = None,
    samples: Annotated[Path | None, typer.Option(help="Folder of images to pick from.")] = None,
) -> None:
    """Serve a page that shows what a dynamic network does with an image, beside a dense network.

    Drop an image, move the budget: prediction, layers that ran, MACs and milliseconds. Nothing leaves the machine.
    """
    check_address(host, port)
    app = build(name, samples)
    serve(app, host, port)


def check_address(host: str, port: int | None) -> None:
    """Raise `BadInput` unless one can listen there."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port or 0, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise BadInput(f"--host {host}: no such address ({one_line(error)})") from error
    with socket.socket(family, kind, protocol) as place:
        place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            place.bind(address)
        except OSError as error:
            if port is not None:
                raise BadInput(
                    f"cannot listen on {host}, port {port} ({error.strerror}): try another --port"
                ) from error
            raise BadInput(f"cannot listen on {host} ({error.strerror}): check --host") from error


def build(name: str | None, samples: Path | None) -> Any:
    """The page of a network.

    Raises:
        BadInput: if there is no such network, or no samples.
        Failed: if gradio is not installed.
    """
    from ..demo import gradio, load_pair, make_app
    from ..demo_samples import from_folder

    try:
        gradio()
    except ImportError as error:
        raise Failed(f"{one_line(error)}: pip install 'timm-dynamic[demo]'") from error
    found, left_out = from_folder(samples) if samples is not None else (None, [])
    for line in left_out:
        typer.echo(f"note: {line}", err=True)
    return make_app(*load_pair(name), samples=found)


def serve(app: Any, host: str, port: int | None) -> None:
    """Serve the page until it is interrupted.

    Raises:
        Failed: if the server cannot start.
    """
    from ..demo import serve as run

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl+C: what was uploaded is removed
    try:
        run(app, host, port, lambda url: typer.echo(f"serving on {url} (Ctrl+C ends it)"))
    except OSError as error:
        raise Failed(f"the server cannot start: {one_line(error)}") from error
