"""Train a stock network, the base of a dynamic one.

accelerate launch train_recipes/base.py
"""

import flags
import options
from loop import run
from stages import Stage, base_task

STAGES = (Stage("base", base_task, epochs=12, lr=0.1),)


@flags.takes(flags.RUN, ("base", "distill", "teacher"), flags.TRAINING, model="resnet20_cifar")
def main(**values: object) -> None:
    """Train a stock network; without options resnet20_cifar on the digits. With --base its weights are trained on."""
    run(STAGES, options.settings("base", values))


if __name__ == "__main__":
    options.command(main)
