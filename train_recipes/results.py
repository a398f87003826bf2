"""The network of a run at its beginning, and what is measured, printed and written at its end."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import timm
import torch
from accelerate import Accelerator
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import timm_dynamic as td
from data import plain_images, val_loader
from images import Data
from options import Settings
from processes import seed_everything
from run_folder import SUMMARY, RunError, RunFolder, load_weights, write_json
from stages import add_exits, add_layer_gates, fix_policy
from timm_dynamic.budgets import set_price
from timm_dynamic.calibration import meet_cost
from timm_dynamic.configs import EnergyConfig
from timm_dynamic.costs import CostTable
from timm_dynamic.evaluation import (
    Evaluation,
    Policy,
    at_exits,
    collect,
    compare,
    costs_of,
    evaluate,
    in_points,
    latency,
)
from timm_dynamic.gates import PARTS
from timm_dynamic.hub import hub_errors, save_pretrained
from timm_dynamic.report import write_report

TIMED_IMAGES = 20
COUNTED_IMAGES, SEEN_IMAGES = 512, 1024
SMALL = ("digits", "cifar10", "cifar100", "svhn")
ROUNDS = 60
VAL_BATCH = 256

# The network at the beginning ----------------------------------------------------------------------------------------


def image_size(settings: Settings) -> int:
    """Pixels a side that the images are to have."""
    if settings.image_size:
        return settings.image_size
    if settings.dataset in SMALL:
        return 32
    cfg = timm.get_pretrained_cfg(settings.base_model)
    return cfg.input_size[-1] if cfg is not None else 224


def base_model(settings: Settings, data: Data) -> nn.Module:
    """The stock network: fresh, or with the trained weights that were asked for."""
    name, base = settings.base_model, settings.base
    pretrained = base is not None and not Path(base).exists()
    if base is not None and pretrained and (not timm.is_model(base) or base.split(".")[0] != name.split(".")[0]):
        raise RunError(f"--base {base} is neither a file or folder nor a pretrained {name}")
    overlay: dict[str, Any] = {"input_size": data.input_size, "mean": data.mean, "std": data.std}
    overlay |= {"num_classes": len(data.classes), "label_names": data.classes, **data.prepared}
    try:
        with hub_errors(str(base)):
            model = timm.create_model(
                base if pretrained else name,
                pretrained=pretrained,
                num_classes=len(data.classes),
                pretrained_cfg_overlay=None if pretrained else {**overlay, "tag": None},  # no weights of any tag
            )
    except (OSError, RuntimeError) as error:
        raise RunError(f"--model {settings.model}: {error}") from error
    if pretrained:
        model.pretrained_cfg.update(overlay)
    elif base is not None:
        path = Path(base)
        load_weights(model, path / "model.safetensors" if path.is_dir() else path)
    if settings.energy is not None:
        _energy(settings)  # what is wrong there is said before training too
    try:
        td.cost_table(model, data.input_size)
    except ValueError as error:
        raise RunError(f"--model {settings.model}: {error}") from error
    policy = settings.policy is not None and settings.start is None
    for wanted, add in (
        (settings.exits_after is not None, add_exits),
        (settings.certainty, add_layer_gates),
        (policy, fix_policy),
    ):
        if wanted:
            with torch.random.fork_rng():
                add(copy.deepcopy(model), settings)  # so that what is wrong there is said before training
    return model


def save_base(model: nn.Module, folder: Path, dense: dict[str, Any]) -> None:
    """Save the trained stock network whole, or not at all."""
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    save_pretrained(model, part, metrics={"dense": dense})
    part.rename(folder)


def price(model: nn.Module, input_size: tuple[int, int, int], settings: Settings, folder: RunFolder) -> float:
    """Say what a gated network's cost is counted by in training; what the stock one costs for an image.

    Milliseconds are measured once and kept in the run's folder: a resumed run counts by the same ones.
    """
    if settings.cost == "macs" or not hasattr(model, "dynamic"):
        return costs_of(model, input_size).dense
    try:
        if settings.cost == "energy_mj":
            table = td.cost_table(model, input_size, "energy_mj", energy=_energy(settings))
        else:
            parts = "-".join(part for part in PARTS if hasattr(model, part))
            path = folder.root / f"latency-{parts}.json"
            if not path.exists():
                write_json(path, td.cost_table(model, input_size, "latency_ms").to_dict())
            table = CostTable.from_dict(json.loads(path.read_text()))
        set_price(model, table)
    except (OSError, ValueError) as error:
        raise RunError(f"--cost {settings.cost}: {error}") from error
    return table.dense


def _energy(settings: Settings) -> EnergyConfig:
    """What millijoules are computed from."""
    assert settings.energy is not None
    try:
        return EnergyConfig.make(json.loads(settings.energy.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise RunError(f"--energy {settings.energy}: {error}") from error


# Measuring -----------------------------------------------------------------------------------------------------------


def measure(accelerator: Accelerator, model: nn.Module, loader: Any) -> Evaluation:
    """Evaluate over all processes."""
    return evaluate(model, loader, accelerator.device, gather=accelerator.gather_for_metrics)


Restrictions = dict[str, dict[str, Any]]


def restrictions(model: nn.Module, input_size: tuple[int, int, int]) -> Restrictions:
    """Every exit and three hard budgets, as arguments of `set_budget` by name; none for a network without exits.

    The budgets are the smallest possible, and one and two thirds of the way from there to the dearest image.
    """
    exits = costs_of(model, input_size).exits
    if len(exits) < 2:
        return {}
    low, high = exits[0].dearest, exits[-1].dearest
    found: Restrictions = {f"exit {k}": {"exit": k} for k in range(len(exits))}
    for third in range(3):
        macs = low + (high - low) * third // 3
        found[f"budget {macs / 1e6:.2f} M"] = {"macs": macs}
    return found


def measure_restricted(
    accelerator: Accelerator, model: nn.Module, loader: Any, chosen: Restrictions
) -> dict[str, Evaluation]:
    """Evaluate under each of some restrictions, and lift them again."""
    found = {}
    for name, budget in chosen.items():
        td.set_budget(model, **budget)
        found[name] = measure(accelerator, model, loader)
        td.set_budget(model)
    return found


def by_exit(
    accelerator: Accelerator, model: nn.Module, loader: Any, input_size: tuple[int, int, int]
) -> list[dict[str, Any]]:
    """Accuracy and cost of every exit, if there are any but the head."""
    if len(costs_of(model, input_size).exits) < 2:
        return []
    rows, _ = collect(model, loader, accelerator.device, accelerator.gather_for_metrics, at_exits)
    return [
        {"exit": k, "accuracy": right.mean().item(), "macs": spent.mean().item(), "max_macs": int(spent.max())}
        for k, (right, spent) in enumerate(zip(rows["right"].double().T, rows["spent"].double().T, strict=True))
    ]


def time_all(model: nn.Module, loader: Any, chosen: Restrictions) -> dict[str, float]:
    """Milliseconds an image at batch 1 of every row of the table, side by side, each optimised for inference."""
    timed = {"dense": copy.deepcopy(model).eval()}
    if hasattr(model, "dynamic"):
        td.strip(timed["dense"])
        timed["dynamic"] = model.eval()
    for name, budget in chosen.items():
        timed[name] = td.set_budget(copy.deepcopy(model).eval(), **budget)
    timed = {name: td.optimize_for_inference(one) for name, one in timed.items()}
    x: Tensor = next(iter(loader))[0][:TIMED_IMAGES]
    return latency({**timed}, x.contiguous(memory_format=torch.channels_last), rounds=ROUNDS)


# The end of a run ----------------------------------------------------------------------------------------------------


def finish(
    accelerator: Accelerator,
    model: nn.Module,
    loader: Any,
    data: Data,
    settings: Settings,
    folder: RunFolder,
    dense: dict[str, Any],
) -> None:
    """Measure the trained network, print the table and write what the run leaves behind."""
    seed_everything(settings.seed)  # units that are dropped at random are so in the same images after a resume
    if hasattr(model, "dynamic"):
        td.set_execution(model, "skip")
        _settle(accelerator, model, data, settings)
        _meet_target(accelerator, model, data, settings)
        _leave_early(accelerator, model, data, settings)
    chosen = restrictions(model, data.input_size)
    found = {"dynamic": measure(accelerator, model, loader)}
    found |= measure_restricted(accelerator, model, loader, chosen)
    if accelerator.is_main_process:
        summary = summarise(dense, found, chosen, time_all(model, loader, chosen), settings)
        summary["units"] = _units(model, data, found["dynamic"])
        kept = ("dense", "dynamic", "exits", "budgets", "dataset")
        save_pretrained(model, folder.root, metrics={key: summary[key] for key in kept})
        write_json(folder.root / SUMMARY, summary)
        write_report(folder.root)
        print_table(summary)
        Console().print(f"{folder.root} holds model.safetensors, summary.json and report.html", soft_wrap=True)
    accelerator.wait_for_everyone()


def _settle(accelerator: Accelerator, model: nn.Module, data: Data, settings: Settings) -> None:
    """Shut what is hardly run, open what nearly all images run, settle channels; all processes find the same."""
    fixed = settings.method in ("sdv", "static") or not hasattr(model, "layer_gates")
    if fixed or settings.max_steps:
        return
    if settings.shut is None and settings.open is None and settings.settle is None:
        return
    seen = plain_images(data, SEEN_IMAGES)
    if settings.shut is not None:
        idle = td.idle_units(model, seen, settings.shut)
        td.shut_units(model, idle)
        accelerator.print(f"shut for good: {', '.join(idle) or 'no unit'}")
    if settings.open is not None:
        busy = td.busy_units(model, seen, settings.open)
        td.open_units(model, busy)
        accelerator.print(f"open for good: {', '.join(busy) or 'no unit'}")
    if settings.settle is not None and hasattr(model, "channel_gates"):
        steady = td.steady_channels(model, seen, settings.settle)
        td.settle_channels(model, steady)
        accelerator.print(f"channels settled: {', '.join(f'{n}={d}' for n, d in steady.items()) or 'of no unit'}")


def _meet_target(accelerator: Accelerator, model: nn.Module, data: Data, settings: Settings) -> None:
    """Make good, by the gates' thresholds, what the cost on training images is beside the target."""
    steered = settings.target is not None and settings.method not in ("sdv", "static") and settings.cost == "macs"
    gated = hasattr(model, "layer_gates") or hasattr(model, "channel_gates")
    if not steered or not gated or settings.max_steps:
        return
    wanted = settings.target or 1.0
    found = meet_cost(model, plain_images(data, COUNTED_IMAGES), wanted)
    missed = (
        ": missed; train longer, or with faster gates (--stage STAGE.gate_lr)" if abs(found - wanted) > 0.02 else ""
    )
    accelerator.print(f"{100 * found:.1f} % of the dense MACs on training images, wanted {100 * wanted:.1f} %{missed}")


def _leave_early(accelerator: Accelerator, model: nn.Module, data: Data, settings: Settings) -> None:
    """Set the exits' confidences for the mean cost that was asked for, on the validation images; gates stay as trained.

    Every process finds the same.
    """
    if settings.calibrate is None or not hasattr(model, "exits") or settings.max_steps:
        return
    try:
        found = td.calibrate(model, val_loader(data, VAL_BATCH, settings.workers), settings.calibrate, use="exits")
    except ValueError as error:
        accelerator.print(f"--calibrate {settings.calibrate}: {error}; images go to the head")
        return
    same = "" if settings.holdout else "; on the images that accuracy is measured on: --holdout keeps some apart"
    accelerator.print(
        f"calibrated to {100 * found.fraction:.1f} % of the dense MACs: images leave from a confidence of "
        f"{found.confidence:.4g}{same}"
    )


def summarise(
    dense: dict[str, Any],
    found: dict[str, Evaluation],
    chosen: Restrictions,
    times: dict[str, float],
    settings: Settings,
) -> dict[str, Any]:
    """What summary.json holds; ``table`` has a row for everything that was measured."""
    dynamic = found["dynamic"]
    rows = [{"name": "dense", **dense, "max_macs": dense["macs"], "keep_ratio": 1.0, "ms": times["dense"]}]
    for name, one in found.items():
        if name in times:
            row = {"name": name, "accuracy": one.accuracy, "macs": one.macs, "max_macs": one.max_macs}
            rows.append({**row, "keep_ratio": one.keep_ratio, "ms": times[name]})
    return {
        "dense": dense,
        "dynamic": {**_short({}, dynamic), "keep_ratio": dynamic.keep_ratio},
        "exits": [_short(value, found[name]) for name, value in chosen.items() if "exit" in value],
        "budgets": [
            _short({"budget": value["macs"]}, found[name]) for name, value in chosen.items() if "macs" in value
        ],
        "recipe": settings.recipe,
        "model": settings.model,
        "dataset": settings.dataset,
        "seed": settings.seed,
        "table": rows,
        "decisions": dynamic.to_dict(),
    }


def _short(first: dict[str, Any], found: Evaluation) -> dict[str, Any]:
    return {**first, "accuracy": found.accuracy, "macs": found.macs, "max_macs": found.max_macs}


def _units(model: nn.Module, data: Data, found: Evaluation) -> list[dict[str, Any]]:
    """Skip ratio of every unit, None where it has no layer gate."""
    return [
        {"name": unit.name, "stage": unit.stage, "skip_ratio": found.unit_skip.get(unit.name)}
        for unit in costs_of(model, data.input_size).units
    ]


def add_gain(root: Path, policy: Policy, data: Data, settings: Settings, device: torch.device) -> None:
    """Note in a run's summary and report what its decisions gain over the best static policy, trained in static/."""
    summary = json.loads((root / SUMMARY).read_text())
    static = json.loads((root / "static" / SUMMARY).read_text())["dynamic"]["accuracy"]
    right = [_recognised(folder, data, settings, device) for folder in (root, root / "static")]
    summary["adaptive_gain"] = summary["dynamic"]["accuracy"] - static
    summary["adaptive_gain_error"] = compare(*right).error
    summary["static"] = {"accuracy": static, "macs": policy.macs, "policy": str(policy), "share": policy.share}
    write_json(root / SUMMARY, summary)
    write_report(root)
    Console().print(
        f"adaptive gain {in_points(summary['adaptive_gain'], summary['adaptive_gain_error'])}: static "
        f"{100 * static:.2f} % at {policy.macs / 1e6:.2f} M MACs, dynamic "
        f"{100 * summary['dynamic']['accuracy']:.2f} % at {summary['dynamic']['macs'] / 1e6:.2f} M"
    )


def _recognised(folder: Path, data: Data, settings: Settings, device: torch.device) -> Tensor:
    """Whether a finished run's network recognises each of the validation images: bool [N]."""
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).to(device)
    rows, _ = collect(model, val_loader(data, VAL_BATCH, settings.workers))
    return rows["correct"]


def print_table(summary: dict[str, Any]) -> None:
    """Print the rows of a summary, and how much its decisions depend on the image."""
    table = Table(title=f"{summary['model']} on {summary['dataset']}")
    table.add_column("network", no_wrap=True)
    for name in ("acc %", "M MACs", "% dense", "max M", "keep", "ms", "% dense"):
        table.add_column(name, justify="right", no_wrap=True)
    dense = summary["table"][0]
    for row in summary["table"]:
        table.add_row(
            row["name"],
            f"{100 * row['accuracy']:.2f}",
            f"{row['macs'] / 1e6:.2f}",
            f"{100 * row['macs'] / dense['macs']:.1f}",
            f"{row['max_macs'] / 1e6:.2f}",
            f"{row['keep_ratio']:.3f}",
            f"{row['ms']:.2f}",
            f"{100 * row['ms'] / dense['ms']:.0f}",
        )
    console = Console()
    console.print(table)
    console.print("MACs: mean of an image; max: the dearest image; keep: share of layers run; ms: an image at batch 1.")
    found = summary["decisions"]
    if found["keep_ratio"] < 1 or found["channel_keep_ratio"] is not None:
        console.print(
            f"Without budget: {found['policies']} different patterns of layers ({found['policy_entropy']:.1f} bits) "
            f"over {found['images']} images; standard deviation of an image's share of the dense MACs: "
            f"{found['macs_share_std']:.3f}."
        )
