"""What can go wrong that the user can act on: one line each, and an exit code."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class CommandError(Exception):
    """A command cannot do what was asked; the message is one line."""

    exit_code = 1


class BadInput(CommandError):
    """What the user gave is wrong: a name, a file, an option."""

    exit_code = 2


class Failed(CommandError):
    """Something outside of the command failed: the network, the Hub, a package that is not installed."""


def one_line(error: BaseException) -> str:
    """An error's message, or its kind if it has none, without line breaks."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return " ".join(text.split()) or type(error).__name__


@contextmanager
def bad_input(*kinds: type[Exception], about: str = "") -> Iterator[None]:
    """Turn errors of some kinds inside a `with` block into `BadInput`.

    Args:
        *kinds: default: `ValueError`.
        about: what the message begins with.
    """
    caught: tuple[type[Exception], ...] = kinds or (ValueError,)
    try:
        yield
    except caught as error:
        raise BadInput(f"{about}: {one_line(error)}" if about else one_line(error)) from error


def check_place(path: Path | None) -> None:
    """Whether a file can be put there, asked before the work that it is to hold.

    Raises:
        BadInput: if there is no such folder, or the path is one.
    """
    if path is not None and not path.parent.is_dir():
        raise BadInput(f"no folder {path.parent} to write {path.name} to")
    if path is not None and path.is_dir():
        raise BadInput(f"{path} is a folder: the name of a file is needed")
