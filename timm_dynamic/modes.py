"""Training or eval: the modes of a network's modules, for a while."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def modes_kept(model: Any) -> Iterator[Any]:
    """Put every module's mode back afterwards: some may have been frozen in a network that trains."""
    before = [(module, module.training) for module in model.modules()]
    try:
        yield model
    finally:
        for module, training in before:
            module.training = training
