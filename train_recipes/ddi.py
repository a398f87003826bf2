"""Train a dynamic network with layer gates, channel gates and exits (DDI): base, warm-up, IADI, DDI.

accelerate launch train_recipes/ddi.py
"""

from dataclasses import replace
from typing import Any

import flags
import options
from iadi import by_method
from loop import run
from stages import Stage, add_all_gates, add_exits, base_task, dynamic_task, exits_task, warmup_task

STAGES = (
    Stage("base", base_task, epochs=12, lr=0.1),
    Stage("warmup", warmup_task, surgery=add_all_gates, trains="gates", epochs=2, lr=0.1, until=0.02, clip=1.0),
    Stage("iadi", dynamic_task, epochs=15, lr=0.05, gate_lr=0.3, clip=5.0),
    Stage("ddi", dynamic_task, surgery=add_exits, epochs=12, lr=0.05, gate_lr=0.3, clip=5.0),
)
ALONE = (*STAGES[:-1], replace(STAGES[-1], task=exits_task, trains="exits"))


@flags.takes(flags.RUN, flags.TRAINING, flags.GATES, flags.CHANNELS, flags.EXITS, model="ddi_resnet20_cifar")
def main(**values: Any) -> None:
    """Train a DDI network; without options ddi_resnet20_cifar on the digits, to half of the dense MACs."""
    found = options.settings("ddi", values, prefix="ddi_", target=0.5)
    run(by_method(ALONE if found.exits_alone else STAGES, found), found)


if __name__ == "__main__":
    options.command(main)
