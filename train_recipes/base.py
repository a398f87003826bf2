"""Train a stock network, such as the base that the other recipes start from.

accelerate launch train_recipes/base.py
"""

import options as opt
from loop import run
from stages import Stage, base_task

STAGES = (Stage("base", base_task, epochs=12, lr=0.1),)


def main(
    config: opt.Config = None,
    output: opt.Output = None,
    resume: opt.Resume = False,
    model: opt.Model = "resnet20_cifar",
    dataset: opt.DatasetName = "digits",
    data_dir: opt.DataDir = opt.DATA_DIR,
    download: opt.Download = False,
    image_size: opt.ImageSize = None,
    seed: opt.Seed = 0,
    batch_size: opt.BatchSize = 32,
    accumulate: opt.Accumulate = 1,
    precision: opt.Precision = "auto",
    epochs_scale: opt.EpochsScale = 1.0,
    max_steps: opt.MaxSteps = None,
    evaluations: opt.Evaluations = 4,
    checkpoint_every: opt.CheckpointEvery = 0,
    workers: opt.Workers = None,
    threads: opt.Threads = 0,
    stage: opt.StageOption = None,
) -> None:
    """Train a stock network; without options resnet20_cifar on the digits."""
    run(STAGES, opt.settings("base", locals()))


if __name__ == "__main__":
    opt.command(main)
