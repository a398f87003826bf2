"""Train a network with layer gates (SkipNet): base, then supervised training with hard gates (SP).

accelerate launch train_recipes/skipnet.py
"""

import options as opt
from loop import run
from stages import Stage, add_layer_gates, base_task, dynamic_task

STAGES = (
    Stage("base", base_task, epochs=12, lr=0.1),
    Stage("sp", dynamic_task, surgery=add_layer_gates, epochs=15, lr=0.1, gate_lr=0.1),
)


def main(
    config: opt.Config = None,
    output: opt.Output = None,
    resume: opt.Resume = False,
    model: opt.Model = "skipnet_resnet20_cifar",
    dataset: opt.DatasetName = "digits",
    data_dir: opt.DataDir = opt.DATA_DIR,
    download: opt.Download = False,
    image_size: opt.ImageSize = None,
    seed: opt.Seed = 0,
    base: opt.Base = None,
    method: opt.Method = "sp",
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
    """Train a SkipNet; without options skipnet_resnet20_cifar on the digits, to 60 % of the dense MACs.

    The paper's SP has no term for the cost: --alpha 0.
    """
    run(STAGES, opt.settings("skipnet", locals(), prefix="skipnet_", target=0.6))


if __name__ == "__main__":
    opt.command(main)
