"""Train a network with layer gates and channel gates (IADI): base, warm-up, IADI.

accelerate launch train_recipes/iadi.py
"""

import options as opt
from loop import run
from stages import Stage, add_all_gates, base_task, dynamic_task, warmup_task

STAGES = (
    Stage("base", base_task, epochs=12, lr=0.1),
    Stage("warmup", warmup_task, surgery=add_all_gates, trains="gates", epochs=1, lr=0.1),
    Stage("iadi", dynamic_task, epochs=15, lr=0.05, gate_lr=0.1),
)


def main(
    config: opt.Config = None,
    output: opt.Output = None,
    resume: opt.Resume = False,
    model: opt.Model = "iadi_resnet20_cifar",
    dataset: opt.DatasetName = "digits",
    data_dir: opt.DataDir = opt.DATA_DIR,
    download: opt.Download = False,
    image_size: opt.ImageSize = None,
    seed: opt.Seed = 0,
    base: opt.Base = None,
    gate: opt.Gate = "rnn",
    alpha: opt.Alpha = None,
    target: opt.Target = None,
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
    """Train an IADI network; without options iadi_resnet20_cifar on the digits, to half of the dense MACs."""
    run(STAGES, opt.settings("iadi", locals(), prefix="iadi_", target=0.5))


if __name__ == "__main__":
    opt.command(main)
