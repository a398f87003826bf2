"""The recipes' command-line options: kind and help of each, and the groups that a recipe takes."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from options import Settings, one_of_two, over_config, read_config


def _flag(kind: Any, help: str, **more: Any) -> Any:
    return Annotated[kind, typer.Option(help=help, **more)]


FLAGS = {
    # What and where
    "config": _flag(Path | None, "YAML file whose values are the defaults.", callback=read_config, is_eager=True),
    "output": _flag(Path | None, "Folder of the run; default runs/RECIPE-DATASET."),
    "resume": _flag(bool, "Go on from the newest whole checkpoint in --output."),
    "model": _flag(str, "Name of the network."),
    "dataset": _flag(
        str,
        "digits, cifar10, cifar100, svhn (with its extra set), imagenet, folder, or hfds/NAME for a data set of the "
        "Hugging Face Hub, read by timm.",
    ),
    "data_dir": _flag(Path, "Where the data set is; for imagenet and folder it holds train/CLASS and val/CLASS."),
    "download": _flag(bool, "Let torchvision or timm fetch the data set."),
    "image_size": _flag(int | None, "Pixels a side; default: 32 for small networks, else the network's own."),
    "holdout": _flag(
        int, "Training images, always the same, that are held out and take the place of the validation images."
    ),
    "seed": _flag(int, "Of everything random."),
    "base": _flag(str | None, "Trained base: a saved folder, a .safetensors file, or a pretrained timm name."),
    "start": _flag(
        Path | None,
        "Folder of a finished run of --method static, or of one that left no unit to its gates (--shut, --open), or "
        "(with --base) a trained network of that kind by its name: training starts from its weights, and gates from "
        "its policy.",
    ),
    # Training
    "batch_size": _flag(int, "Images of one optimiser step, over all processes."),
    "accumulate": _flag(int, "Parts that a batch is computed in."),
    "precision": _flag(
        Literal["auto", "fp32", "bf16", "fp16"],
        "Of the forward pass in training; auto is bf16 where it is fast, fp16 needs a GPU.",
    ),
    "clip_grad": _flag(
        float | None, "Largest norm of the gradient in all stages, instead of what each has; 0 for none."
    ),
    "ema": _flag(float, "Decay of a moving average of the weights, which is measured and saved; 0 for none."),
    "compile": _flag(bool, "Compile the training step with torch.compile."),
    "cuda_graph": _flag(
        bool,
        "On one GPU: record a step once and replay it, without a call of Python for each of its kernels. follow, "
        "hindsight, hrl, rl and sdv run as without it.",
    ),
    "grad_checkpointing": _flag(bool, "Compute units again in the backward pass, to save memory."),
    "epochs_scale": _flag(float, "Factor on the length of every stage."),
    "max_steps": _flag(int | None, "Most optimiser steps of a stage, for a dry run."),
    "evaluations": _flag(int, "Evaluations, each with a checkpoint, in every stage."),
    "checkpoint_every": _flag(int, "Further checkpoints every so many steps; 0 for none."),
    "tracker": _flag(
        list[str] | None, "Log to a tracker too: tensorboard, trackio or wandb; may be given several times."
    ),
    "workers": _flag(int | None, "Processes of each data loader; default: 0 for images held in memory, else 4."),
    "threads": _flag(
        int, "CPU threads of each process; 0 for the launcher's choice, which is 1 under accelerate launch."
    ),
    "stage": _flag(
        list[str] | None,
        "Change a stage, as in iadi.epochs=20; may be given many times, and goes over what --config says.",
        callback=over_config,
    ),
    # Gates and what they cost
    "gate": _flag(Literal["ff1", "ff2", "rnn", "linear"], "Kind of layer gate."),
    "gate_init": _flag(Literal["random", "open"], "How gates start: as published, or keeping everything."),
    "certainty": _flag(
        bool, "Tell gates of dense layers, and of residual units in the last stage, how certain the classifier is yet."
    ),
    "spread": _flag(
        float, "Deviation between images that fresh layer gates' logits are scaled to; 0 leaves them as drawn."
    ),
    "group_size": _flag(int, "Hidden channels that a channel gate decides on together; 1 is the paper's form."),
    "channel_mode": _flag(
        Literal["independent", "nested", "none"], "Any groups of channels, the first few of them, or layer gates alone."
    ),
    "settle": _flag(
        float | None,
        "At the end settle the channels of the units in which at least this share of the training images would compute "
        "the same ones, group by group: their channel gates are no longer asked. From the first step on those that "
        "--start's policy keeps, if it has channels.",
    ),
    "alpha": _flag(
        float | None, "Fixed weight of the cost, which is a share of the dense network's.", callback=one_of_two
    ),
    "target": _flag(
        float | None, "Share of the dense cost that alpha is steered to, instead of --alpha.", callback=one_of_two
    ),
    "cost": _flag(
        Literal["macs", "latency_ms", "energy_mj"], "What is counted as cost; milliseconds are measured at the start."
    ),
    "energy": _flag(Path | None, "JSON file with energy constants, or with a value for every unit."),
    "distill": _flag(float, "Weight of the distance from the logits of the dense base, or of every --teacher."),
    "teacher": _flag(
        list[str] | None,
        "A trained network, by its name or its run's folder, that --distill follows in the place of the dense base; "
        "given several times, the mean of their probabilities is followed.",
    ),
    "information": _flag(float, "Weight of what layer gates tell about the image, which is to grow."),
    "shut": _flag(
        float | None,
        "Shut units for good that no more than this share of the training images run, so that hard budgets need not "
        "allow for them: at the end, and from the first step on those that --start's policy never runs.",
    ),
    "open": _flag(
        float | None,
        "Open units for good that at least this share of the training images run: their gates are no longer asked, "
        "which saves time. At the end, and for hindsight or with --free from the first step on those that are not left "
        "to the gates.",
    ),
    # Exits
    "exits_after": _flag(
        str | None, "Stages or units with an exit, as in 1,2,layer3.2; default: every stage but the last."
    ),
    "exit_hidden": _flag(
        int | None, "Channels of one more convolution in every exit's classifier, for features not made for it."
    ),
    "exits_alone": _flag(
        bool, "Train the exits alone in the last stage: all else stands still, and the head keeps its accuracy."
    ),
    "exit_weighting": _flag(Literal["uniform", "linear"], "Weights of the exits in the loss."),
    "distill_exits": _flag(float, "Weight of the distance of the earlier exits from the last one."),
    "exit_gradient": _flag(
        float | None,
        "Share of the earlier exits' gradient that the trunk gets, default 1: below it they compete less with the "
        "head.",
    ),
    "calibrate": _flag(
        float | None,
        "Afterwards let images leave early, from the confidence that costs this share of the dense MACs on the mean.",
    ),
    # SkipNet
    "method": _flag(
        Literal["sp", "soft", "sp+hrl", "hrl", "rl", "hindsight", "sdv", "static"],
        "sp: supervised, hard gates; soft: supervised, soft gates; sp+hrl: then hybrid reinforcement learning; "
        "hrl: that from scratch; rl: without supervision; hindsight: gates learn which images need the free units of "
        "--start's policy; sdv: units dropped at random; static: one --policy for all.",
    ),
    "beta": _flag(float, "Weight of the loss in what gates are paid."),
    "unit_cost": _flag(Literal["one", "macs"], "What a gate is paid for skipping: the same for all, or by the MACs."),
    "baseline": _flag(
        Literal["greedy", "average", "none"], "What is taken off: the unsampled policy's pay, a moving average."
    ),
    "entropy": _flag(float, "Weight of the entropy of sampled gates, which is to grow."),
    "temperature": _flag(float, "Of sampled gates in a trained network, at the start: below 1 they stray less."),
    "explore": _flag(
        float, "Share of a trained network's sampled decisions that stray, which the temperature follows; 0: it stays."
    ),
    "plain": _flag(bool, "The paper's plain form: no baseline, moving batch norms, no added terms, gates as fast."),
    "hindsight": _flag(
        bool, "Layer gates of the stage iadi learn by hindsight which images need the free units of --start's policy."
    ),
    "keep": _flag(float, "Share of the units that sdv runs."),
    "policy": _flag(str | None, "For static: 1 or 0 for each gated unit, as in 11010110."),
    "free": _flag(
        str | None,
        "With --start: how many of its policy's last units are left to the gates, or which, by their names, as in "
        "layer2.3,layer3.1; hindsight leaves the last 3 unless told; 0 for none, where exits alone are trained. "
        "Other methods leave all, and need --open, which opens the others from the first step on.",
    ),
    "gain": _flag(bool, "Afterwards train the best static policy for as long, and report the adaptive gain."),
}

RUN = ("config", "output", "resume", "model", "dataset", "data_dir", "download", "image_size", "holdout", "seed")
TRAINING = (
    *("batch_size", "accumulate", "precision", "clip_grad", "ema", "compile", "cuda_graph", "grad_checkpointing"),
    *("epochs_scale", "max_steps", "evaluations", "checkpoint_every", "tracker", "workers", "threads", "stage"),
)
GATES = (
    *("base", "start", "gate", "gate_init", "certainty", "spread", "alpha", "target", "cost", "energy"),
    *("distill", "teacher", "information", "shut", "open", "free", "gain"),
)
CHANNELS = ("group_size", "channel_mode", "settle", "hindsight")
EXITS = ("exits_after", "exit_hidden", "exits_alone", "exit_weighting", "distill_exits", "exit_gradient", "calibrate")
REINFORCEMENT = ("method", "beta", "unit_cost", "baseline", "entropy", "temperature", "explore", "plain")
POLICIES = ("keep", "policy", "group_size", "channel_mode")  # the last two: of a policy with channels


def takes(*groups: tuple[str, ...], **defaults: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a recipe's ``main(**values)`` the options of some groups.

    Args:
        *groups: names of options.
        **defaults: where they differ from those of `Settings`.
    """

    def parameter(name: str) -> inspect.Parameter:
        default = defaults.get(name, getattr(Settings, name, None))
        return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=FLAGS[name])

    def give(main: Callable[..., None]) -> Callable[..., None]:
        parameters = [parameter(name) for group in groups for name in group]
        main.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        main.__annotations__ = {one.name: one.annotation for one in parameters}
        return main

    return give
