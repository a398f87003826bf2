"""Train a network with layer gates (SkipNet): base, supervised (SP), hybrid reinforcement learning (HRL).

accelerate launch train_recipes/skipnet.py
"""

import flags
import options
from loop import run
from planning import hindsight_task
from stages import (
    STATIC,
    Stage,
    add_layer_gates,
    add_soft_gates,
    base_task,
    drop_at_random,
    dynamic_task,
    hybrid_task,
    reinforce_task,
)

BASE = Stage("base", base_task, epochs=12, lr=0.1)
SP = Stage("sp", dynamic_task, surgery=add_layer_gates, epochs=15, lr=0.1, gate_lr=0.3, clip=1.0)
SOFT = Stage("soft", dynamic_task, surgery=add_soft_gates, epochs=15, lr=0.1, gate_lr=0.3, clip=1.0)
HRL = Stage("hrl", hybrid_task, epochs=10, lr=0.01, gate_lr=0.1, clip=1.0)
# As long as the stages of sp+hrl together:
SCRATCH = Stage("hrl", hybrid_task, surgery=add_layer_gates, epochs=37, lr=0.1, gate_lr=0.1)
ALONE = Stage("rl", reinforce_task, surgery=add_layer_gates, epochs=37, lr=0.1, gate_lr=0.1)
HINDSIGHT = Stage("hindsight", hindsight_task, surgery=add_layer_gates, epochs=25, lr=0.1, clip=5.0)
SDV = Stage("sdv", base_task, surgery=drop_at_random, epochs=25, lr=0.1)

SPREAD = 1.0  # more than beside channel gates: these then take over what layer gates are slow to close

METHODS = {
    "sp": (BASE, SP),
    "soft": (BASE, SOFT),
    "sp+hrl": (BASE, SP, HRL),
    "hrl": (SCRATCH,),
    "rl": (ALONE,),
    "hindsight": (HINDSIGHT,),
    "sdv": (BASE, SDV),
    "static": (BASE, STATIC),
}


@flags.takes(
    *(flags.RUN, flags.TRAINING, flags.GATES, flags.REINFORCEMENT, flags.POLICIES),
    model="skipnet_resnet20_cifar",
    method="sp+hrl",
    spread=SPREAD,
)
def main(**values: object) -> None:
    """Train a SkipNet; without options skipnet_resnet20_cifar on the digits, to half of the dense MACs.

    The paper's SP has no term for the cost: --stage sp.alpha=0.
    """
    found = options.settings("skipnet", values, prefix="skipnet_", target=0.5)
    run(METHODS[found.method or "sp+hrl"], found)


if __name__ == "__main__":
    options.command(main)
