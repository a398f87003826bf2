"""What SkipNet (ECCV 2018) and DDI (JSTSP 2020) claim, as a table."""

from __future__ import annotations

from . import claim_numbers as numbers
from .claims import PaperClaim

TRAIN = "accelerate launch train_recipes/skipnet.py --config train_recipes/configs/skipnet_{}.yaml --model {}{}"
TRAIN_IADI = "accelerate launch train_recipes/iadi.py --config train_recipes/configs/iadi_{}.yaml --model {}"
REPORT = "timm-dynamic report local-dir:RUN --data DIR"
STUDY = "accelerate launch train_recipes/compare.py {}, its comparison.json as --study"
SP, HRL = " --method sp", " --method sp+hrl"


def _train(dataset: str, model: str, options: str = "") -> str:
    return f"{TRAIN.format(dataset, model, options)}; {REPORT}"


def _beside(dataset: str, first: str, second: str) -> str:
    return f"{TRAIN.format(dataset, first, '')}, and the same with {second}; {REPORT} --beside local-dir:SECOND"


def _imagenet(ours: str, other: str) -> str:
    return f"{TRAIN_IADI.format('imagenet', ours)}, {TRAIN.format('imagenet', other, '')}; {REPORT}"


PAPER_CLAIMS = (
    PaperClaim(
        "compute falls at equal accuracy (within 0.5 points of the dense base)",
        "SkipNet 4.1, fig. 4",
        f"{REPORT} --held-out N",
        numbers.reduction,
    ),
    PaperClaim(
        "by 50 % on CIFAR-10 (ResNet-110)",
        "SkipNet 4.1, fig. 4",
        _train("cifar10", "skipnet_resnet110_cifar"),
        numbers.published("resnet110", "cifar10", 0.50),
    ),
    PaperClaim(
        "by 37 % on CIFAR-100 (ResNet-110)",
        "SkipNet 4.1, fig. 4",
        _train("cifar100", "skipnet_resnet110_cifar"),
        numbers.published("resnet110", "cifar100", 0.37),
    ),
    PaperClaim(
        "by 86 % on SVHN (ResNet-152)",
        "SkipNet 4.1, fig. 4",
        _train("svhn", "skipnet_resnet152_cifar"),
        numbers.published("resnet152", "svhn", 0.86),
    ),
    PaperClaim(
        "by 30 % on ImageNet (ResNet-101)",
        "SkipNet 4.1, fig. 5a",
        _train("imagenet", "skipnet_resnet101"),
        numbers.published("resnet101", "imagenet", 0.30),
    ),
    PaperClaim(
        "SP alone, without any cost term, already saves",
        "SkipNet 4.1",
        _train("cifar10", "skipnet_resnet38_cifar", SP),
        numbers.sp_alone,
    ),
    PaperClaim(
        "HRL adds 10 points or more",
        "SkipNet 4.1",
        _beside("cifar10", f"skipnet_resnet38_cifar{HRL}", SP.strip()),
        numbers.hrl_adds,
    ),
    PaperClaim(
        "deeper networks save more",
        "SkipNet 4.1",
        _beside("cifar10", "skipnet_resnet38_cifar", "--model skipnet_resnet74_cifar"),
        numbers.deeper,
    ),
    PaperClaim(
        "RNN gates beat feed-forward gates",
        "SkipNet 4.1",
        _beside("cifar10", "skipnet_resnet38_cifar --gate rnn", "--gate ff1"),
        numbers.rnn_beats_ff,
    ),
    PaperClaim(
        "a small alpha saves faster than it loses",
        "SkipNet fig. 5b",
        _beside("cifar10", "skipnet_resnet38_cifar --alpha 0", "other values of --alpha, to 4"),
        numbers.over_alpha,
    ),
    PaperClaim(
        "learned skipping beats SDV at equal skip ratio",
        "SkipNet fig. 6",
        STUDY.format("skipnet"),
        numbers.between("learned skipping beats SDV", "sp+hrl", "sdv"),
    ),
    PaperClaim(
        "SP+HRL beats HRL from scratch",
        "SkipNet fig. 10b",
        STUDY.format("skipnet"),
        numbers.between("SP+HRL beats HRL from scratch", "sp+hrl", "hrl"),
    ),
    PaperClaim(
        "HRL from scratch beats RL alone, which learns nothing",
        "SkipNet fig. 10b",
        STUDY.format("skipnet"),
        numbers.between("HRL from scratch beats RL alone", "hrl", "rl"),
    ),
    PaperClaim(
        "hard gating beats soft at equal cost",
        "SkipNet table 3",
        STUDY.format("skipnet"),
        numbers.between("hard beats soft", "sp", "soft"),
    ),
    PaperClaim("easy images are brighter", "SkipNet fig. 7", REPORT, numbers.look("brightness")),
    PaperClaim("easy images have more contrast", "SkipNet fig. 7", REPORT, numbers.look("contrast")),
    PaperClaim(
        "easy images are clearer, hard ones blurry (sharpness)", "SkipNet fig. 7", REPORT, numbers.look("sharpness")
    ),
    PaperClaim("larger input scales run more units", "SkipNet fig. 8", REPORT, numbers.larger_scales),
    PaperClaim("more is skipped on easy classes", "SkipNet fig. 9", REPORT, numbers.easy_classes),
    PaperClaim(
        "HRL skips more on every class",
        "SkipNet fig. 9",
        _beside("cifar10", f"skipnet_resnet38_cifar{HRL}", SP.strip()),
        numbers.hrl_skips_more,
    ),
    PaperClaim("first and last units of a stage matter most", "SkipNet fig. 10a", REPORT, numbers.edges_matter),
    PaperClaim("the second stage is skipped least", "SkipNet fig. 10a", REPORT, numbers.second_stage),
    PaperClaim(
        "training takes 30 to 40 % longer than the base, no more",
        "SkipNet 4",
        "timm-dynamic benchmark skipnet_resnet38_cifar --train --keep 1 --keep 0.5 --json > steps.json, then --study",
        numbers.training_time,
    ),
    PaperClaim(
        "channel skipping changes features less than layer skipping",
        "DDI supp. 10, fig. 14",
        REPORT,
        numbers.gradual(accuracy=False),
    ),
    PaperClaim(
        "channel skipping costs less accuracy than layer skipping",
        "DDI supp. 10, fig. 14",
        REPORT,
        numbers.gradual(accuracy=True),
    ),
    PaperClaim(
        "layer skipping keeps the first unit of each stage", "DDI supp. fig. 15", REPORT, numbers.firsts_kept(False)
    ),
    PaperClaim(
        "channel skipping keeps the first unit of each stage",
        "DDI supp. fig. 15",
        f"{REPORT} --beside local-dir:IADI_RUN",
        numbers.firsts_kept(True),
    ),
    PaperClaim(
        "ResNet-74 keeps about 92 % at 50 % savings (CIFAR-10)",
        "DDI supp. fig. 15",
        _train("cifar10", "skipnet_resnet74_cifar", " --no-plain --target 0.5"),
        numbers.at_half("resnet74", 0.92),
    ),
    PaperClaim(
        "DenseNet-201-IADI, 73.8 % at 262 M, beats SkipNet-101, 73.0 % (ImageNet)",
        "DDI supp. table 3",
        _imagenet("iadi_densenet201", "skipnet_resnet101"),
        numbers.imagenet_pair("iadi_densenet201", "skipnet_resnet101"),
    ),
    PaperClaim(
        "DenseNet-121-IADI, 74.6 % at 217 M, beats SkipNet-34, 74.0 % at 285 M (ImageNet)",
        "DDI supp. table 3",
        _imagenet("iadi_densenet121", "skipnet_resnet34"),
        numbers.imagenet_pair("iadi_densenet121", "skipnet_resnet34"),
    ),
)
