"""Train a network with layer gates and channel gates (IADI): base, warm-up, IADI.

accelerate launch train_recipes/iadi.py
"""

from dataclasses import replace
from typing import Any

import flags
import options
from loop import run
from planning import hindsight_task
from stages import Stage, add_all_gates, base_task, dynamic_task, warmup_task

STAGES = (
    Stage("base", base_task, epochs=12, lr=0.1),
    Stage("warmup", warmup_task, surgery=add_all_gates, trains="gates", epochs=2, lr=0.1, until=0.02, clip=1.0),
    Stage("iadi", dynamic_task, epochs=15, lr=0.05, gate_lr=0.3, clip=5.0),
)


def by_method(stages: tuple[Stage, ...], settings: options.Settings) -> tuple[Stage, ...]:
    """The stages, with hindsight in that of IADI where it was asked for."""
    if settings.method != "hindsight":
        return stages
    return tuple(replace(stage, task=hindsight_task) if stage.name == "iadi" else stage for stage in stages)


@flags.takes(flags.RUN, flags.TRAINING, flags.GATES, flags.CHANNELS, model="iadi_resnet20_cifar")
def main(**values: Any) -> None:
    """Train an IADI network; without options iadi_resnet20_cifar on the digits, to half of the dense MACs."""
    found = options.settings("iadi", values, prefix="iadi_", target=0.5)
    run(by_method(STAGES, found), found)


if __name__ == "__main__":
    options.command(main)
