"""Train the papers' variants side by side, over several seeds, and say which of their claims hold.

accelerate launch train_recipes/compare.py skipnet
accelerate launch train_recipes/compare.py ddi
accelerate launch train_recipes/compare.py densenet
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import timm
import typer
from torch.utils.data import DataLoader, Subset

import data as datasets
import options
import results
import skipnet
from base import STAGES as BASE_STAGES
from ddi import STAGES as DDI_STAGES
from iadi import STAGES as IADI_STAGES
from loop import fixed_of, run
from planning import planned
from run_folder import SUMMARY, RunError, RunFolder, write_json
from stages import Stage, add_all_gates, add_channel_gates, add_exits, add_layer_gates, exits_task
from timm_dynamic.calibration import apply_calibration, calibrations
from timm_dynamic.comparison import Claim, write_comparison
from timm_dynamic.evaluation import evaluate

_WARMUP, _IADI, _DDI = IADI_STAGES[1], IADI_STAGES[2], DDI_STAGES[3]
LAYERS = (replace(_WARMUP, surgery=add_layer_gates), replace(_IADI, name="layers", clip=skipnet.SP.clip))
CHANNELS = (replace(_WARMUP, surgery=add_channel_gates), replace(_IADI, name="channels", clip=skipnet.SP.clip))
CUT = (*IADI_STAGES, Stage("cut", exits_task, surgery=add_exits, trains="exits", epochs=_DDI.epochs, lr=_DDI.lr))
OPEN = (replace(_IADI, name="open", surgery=add_all_gates),)
STARTED, HINDSIGHT = "sp+hrl from a policy", "hindsight from a policy"
FREE, LESS = 2, 0.4  # units that hindsight leaves to the gates, and the share that it is to cost
FRACTIONS = (0.3, 0.4, 0.5, 0.65)
KEPT = ("keep_ratio", "policies", "policy_entropy", "macs_share_std", "target")
PREFIX = {"base": "", "skipnet": "skipnet_", "iadi": "iadi_", "ddi": "ddi_"}


@dataclass
class Bench:
    """Runs of one seed, each in a folder of its own; what is finished is not run again."""

    root: Path
    seed: int
    common: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)

    def train(
        self, name: str, recipe: str, stages: tuple[Stage, ...], model: str = "resnet20_cifar", **values: Any
    ) -> dict[str, Any]:
        """Run a recipe; its summary."""
        folder = self.root / f"seed{self.seed}" / name.replace(" ", "_")
        wanted = "adaptive_gain" if values.get("gain") else "dynamic"
        given = {**self.common, "model": PREFIX[recipe] + model, "seed": self.seed, **values}
        given |= {"output": folder, "resume": True} | ({"spread": skipnet.SPREAD} if recipe == "skipnet" else {})
        settings = options.settings(recipe, given, PREFIX[recipe])
        if (folder / SUMMARY).exists() and wanted in json.loads((folder / SUMMARY).read_text()):
            RunFolder(folder).check(fixed_of(planned(stages, settings), settings), resume=True)
        else:
            run(stages, settings)
        return json.loads((folder / SUMMARY).read_text())

    def add(self, name: str, found: dict[str, Any], dense: float, **more: Any) -> None:
        """Note one point: accuracy, share of the dense MACs and how much it adapts."""
        self.rows.append(
            {"variant": name, "seed": self.seed, "accuracy": found["accuracy"], "macs_share": found["macs"] / dense}
            | {key: more.get(key) for key in KEPT}
        )

    def measure(self, name: str, recipe: str, stages: tuple[Stage, ...], **values: Any) -> dict[str, Any]:
        """Run a recipe and note its network, and the best static policy beside it."""
        summary = self.train(name, recipe, stages, **values)
        dense = summary["dense"]["macs"]
        self.add(name, summary["dynamic"], dense, **summary["decisions"])
        if "static" in summary:
            self.add(f"{name}, static", summary["static"], dense)
        return summary


def skipnet_study(bench: Bench, target: float) -> None:
    """The SkipNet paper's variants, all but those from scratch from one base (section 4, fig. 6, 10b, table 3)."""
    base = bench.train("base", "base", BASE_STAGES)
    bench.add("dense", base["dynamic"], base["dense"]["macs"])
    folder = str(bench.root / f"seed{bench.seed}" / "base")
    ours = {"base": folder, "target": target}
    both = bench.measure("sp+hrl", "skipnet", skipnet.METHODS["sp+hrl"], method="sp+hrl", gain=True, **ours)
    bench.measure("sp", "skipnet", skipnet.METHODS["sp"], method="sp", **ours)
    bench.measure("soft", "skipnet", skipnet.METHODS["soft"], method="soft", **ours)
    bench.measure("hrl", "skipnet", skipnet.METHODS["hrl"], method="hrl", target=target)
    bench.measure("rl", "skipnet", skipnet.METHODS["rl"], method="rl", target=target)
    keep = round(both["dynamic"]["keep_ratio"], 3)
    bench.measure("sdv", "skipnet", skipnet.METHODS["sdv"], method="sdv", base=folder, keep=keep)
    start = bench.root / f"seed{bench.seed}" / "sp+hrl" / "static"
    again: dict[str, Any] = {"method": "sp+hrl", "start": start, "target": target, "gain": True}
    bench.measure(STARTED, "skipnet", skipnet.METHODS["sp+hrl"], **again)
    again |= {"method": "hindsight", "free": FREE, "target": LESS}
    bench.measure(HINDSIGHT, "skipnet", skipnet.METHODS["hindsight"], **again)


def halves(bench: Bench) -> list[DataLoader[Any]]:
    """Every second image of the validation set, to calibrate on, and the others."""
    settings = options.settings("base", {**bench.common, "model": "resnet20_cifar"})
    data = datasets.load(settings.dataset, settings.data_dir, False, results.image_size(settings), bench.seed)
    places = range(len(data.val))  # type: ignore[arg-type]
    return [DataLoader(Subset(data.val, places[k::2]), 256, collate_fn=lambda batch: batch) for k in (0, 1)]


def trained(bench: Bench, name: str) -> Any:
    """The network of a finished run."""
    return timm.create_model(f"local-dir:{bench.root / f'seed{bench.seed}' / name}", pretrained=True).eval()


def calibrate_rows(bench: Bench) -> None:
    """Calibrate a DDI network on every second image of the validation set, and measure it on the others."""
    known, other = halves(bench)
    found: dict[tuple[str, float], dict[str, Any]] = {}
    for use in ("both", "gates", "exits"):
        model = trained(bench, "ddi")
        for fraction, set_to in calibrations(model, known, FRACTIONS, use=use).items():  # those within reach
            apply_calibration(model, set_to, use=use)
            one = evaluate(model, other)
            found[use, fraction] = {"accuracy": one.accuracy, "macs": one.macs}
            bench.add(f"calibrated {use}", found[use, fraction], one.dense_macs, target=fraction)
    shared = [f for f in FRACTIONS if all((use, f) in found for use in ("both", "gates", "exits"))]
    for use in ("both", "gates", "exits") if shared else ():
        mean = {key: statistics.mean(found[use, f][key] for f in shared) for key in ("accuracy", "macs")}
        bench.add(f"calibrated {use}, mean", mean, one.dense_macs)


def ddi_study(bench: Bench, target: float) -> None:
    """What layers, channels and exits give, alone and together (DDI, sections 3 and 4)."""
    base = bench.train("base", "base", BASE_STAGES)
    bench.add("dense", base["dynamic"], base["dense"]["macs"])
    ours = {"base": str(bench.root / f"seed{bench.seed}" / "base"), "target": target}
    bench.measure("layers", "skipnet", LAYERS, gain=True, **ours)
    bench.measure("channels", "iadi", CHANNELS, gain=True, **ours)
    bench.measure("iadi", "iadi", IADI_STAGES, gain=True, **ours)
    bench.measure("open", "iadi", OPEN, gate_init="open", **ours)
    for name, stages in (("ddi", DDI_STAGES), ("cut", CUT)):
        restricted(bench, name, bench.measure(name, "ddi", stages, **ours))
    calibrate_rows(bench)


def restricted(bench: Bench, name: str, summary: dict[str, Any]) -> None:
    """Note what a network does at each exit and under each hard budget."""
    for row in summary["exits"]:
        bench.add(f"{name}, exit {row['exit']}", row, summary["dense"]["macs"])
    for k, row in enumerate(summary["budgets"]):
        bench.add(f"{name}, budget {k + 1}", row, summary["dense"]["macs"])


def densenet_study(bench: Bench, target: float) -> None:
    """The whole schedule on a DenseNet."""
    summary = bench.measure("ddi", "ddi", DDI_STAGES, model="densenet40_cifar", target=target)
    bench.add("dense", summary["dense"], summary["dense"]["macs"])
    restricted(bench, "ddi", summary)


SKIPNET_CLAIMS = (
    Claim("SP+HRL is within 1 point of the dense base", "sp+hrl", "dense", allowed=0.01),
    Claim("hard gates beat soft ones at equal cost (table 3)", "sp", "soft"),
    Claim("SP+HRL beats HRL from scratch (fig. 10b)", "sp+hrl", "hrl"),
    Claim("HRL from scratch beats RL alone (fig. 10b)", "hrl", "rl"),
    Claim("learned skipping beats SDV at equal skip ratio (fig. 6)", "sp+hrl", "sdv"),
    Claim("adapting beats the best static policy (the adaptive gain)", "sp+hrl", "sp+hrl, static"),
    Claim("adapting beats going on with the policy that both start from", STARTED, f"{STARTED}, static"),
    Claim("adapting by hindsight beats the best static policy at its cost", HINDSIGHT, f"{HINDSIGHT}, static"),
)
MONOTONE = tuple(
    Claim(f"{more} is not worse than {less}, but for half a point", f"ddi, {more}", f"ddi, {less}", 0.005)
    for less, more in (("budget 1", "budget 2"), ("budget 2", "budget 3"))
)
DENSENET_CLAIMS = (Claim("DDI is within 1 point of the dense base", "ddi", "dense", 0.01), *MONOTONE)
DDI_CLAIMS = (
    Claim("IADI beats layer skipping alone at equal MACs", "iadi", "layers"),
    Claim("IADI beats channel skipping alone at equal MACs", "iadi", "channels"),
    Claim("adaptive gain of layer gates", "layers", "layers, static"),
    Claim("adaptive gain of channel gates", "channels", "channels, static"),
    Claim("adaptive gain of both", "iadi", "iadi, static"),
    *(
        Claim(f"DDI beats IADI cut without joint training: {where}", f"ddi, {where}", f"cut, {where}")
        for where in ("exit 0", "exit 1", "budget 1", "budget 2", "budget 3")
    ),
    Claim("the warm-up beats an open start", "iadi", "open"),
    Claim("calibrating both beats moving the gates alone", "calibrated both, mean", "calibrated gates, mean"),
    Claim("calibrating both beats moving the exits alone", "calibrated both, mean", "calibrated exits, mean"),
    *MONOTONE,
)
STUDIES: dict[str, tuple[Callable[[Bench, float], None], tuple[Claim, ...], float]] = {
    "skipnet": (skipnet_study, SKIPNET_CLAIMS, 0.5),
    "ddi": (ddi_study, DDI_CLAIMS, 0.5),
    "densenet": (densenet_study, DENSENET_CLAIMS, 0.5),
}


def main(
    study: Annotated[Literal["skipnet", "ddi", "densenet"], typer.Argument(help="Which paper's variants.")],
    output: Annotated[Path | None, typer.Option(help="Folder; default runs/compare-STUDY-DATASET.")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Seeds, one option each; default 0 to 4.")] = None,
    target: Annotated[float | None, typer.Option(help="Share of the dense MACs; default 0.5.")] = None,
    dataset: Annotated[str, typer.Option(help="As in the recipes.")] = "digits",
    data_dir: Annotated[Path, typer.Option(help="As in the recipes.")] = Path("data"),
    image_size: Annotated[int | None, typer.Option(help="Pixels a side; default 16 for the digits.")] = None,
    epochs_scale: Annotated[float, typer.Option(help="Factor on the length of every stage.")] = 1.0,
    max_steps: Annotated[int | None, typer.Option(help="Most optimiser steps of a stage, for a dry run.")] = None,
    threads: Annotated[int, typer.Option(help="As in the recipes.")] = 0,
) -> None:
    """Train the variants of a study over several seeds; runs that are finished are not run again.

    Several of these commands may share an output folder, each with its own seeds: the last one's report has them all.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RunError("compare.py runs in one process: its seeds can be run side by side instead")
    root = output or Path("runs") / f"compare-{study}-{dataset}"
    common = {"dataset": dataset, "data_dir": data_dir, "epochs_scale": epochs_scale, "max_steps": max_steps}
    size = image_size or (16 if dataset == "digits" else None)  # the digits have 8 x 8 pixels
    common |= {"threads": threads, "evaluations": 2, "image_size": size}
    train, claims, usual = STUDIES[study]
    for one in seed or range(5):
        bench = Bench(root, one, common)
        train(bench, target or usual)
        write_json(root / f"seed{one}" / "rows.json", bench.rows)
    found = [json.loads(path.read_text()) for path in sorted(root.glob("seed*/rows.json"))]
    write_comparison(root, f"{study} on {dataset}", [row for rows in found for row in rows], claims)


if __name__ == "__main__":
    options.command(main)
