"""Modes for a while: training or eval of a network's modules, and what passes without gradients leave behind."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def modes_kept(model: Any) -> Iterator[Any]:
    """Put every module's mode back afterwards: some may have been frozen in a network that trains."""
    before = [(module, module.training) for module in model.modules()]
    try:
        yield model
    finally:
        for module, training in before:
            module.training = training


def forget_casts() -> None:
    """Forget the weights that autocast has cast in a pass without gradients.

    Before torch 2.11 the passes after it would take them, and no gradient would come to the weights.
    """
    if not torch.compiler.is_compiling():
        torch.clear_autocast_cache()
