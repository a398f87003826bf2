"""What every recipe runs: its stages, then the static network that they have to beat."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import timm
from accelerate import Accelerator

import data as datasets
import results
from options import Settings
from planning import planned, try_start
from processes import make_accelerator, seed_everything, start_trackers
from run_folder import BASE, SUMMARY, RunError, RunFolder
from stages import STATIC, Stage
from teachers import teachers
from timm_dynamic.evaluation import static_policy
from trainer import Trainer


def run(stages: tuple[Stage, ...], settings: Settings) -> None:
    """Train a network through the stages and leave the run's folder complete."""
    accelerator = make_accelerator(settings)
    stages = planned(stages, settings)
    if settings.gain and any(stage.surgery is not None for stage in stages) and not _adapting(stages):
        raise RunError(
            "--gain trains a static network for as long as the gated one learned, gates alone aside: it needs such a "
            f"stage; found {', '.join(stage.name for stage in stages)}"
        )
    if settings.distill and not settings.teacher and settings.base is None and stages[0].surgery is not None:
        raise RunError("--distill learns from the trained stock network, and here is none: give --base, or --teacher")
    trained = _train(accelerator, stages, settings)
    if settings.gain and any(stage.surgery is not None for stage in stages):
        _compare_with_static(accelerator, stages, settings)
    elif not trained:
        accelerator.print(f"{settings.folder} holds a finished run: nothing to do")
    accelerator.end_training()


def fixed_of(stages: tuple[Stage, ...], settings: Settings) -> dict[str, Any]:
    """What must be the same when a run of these stages, as they were planned, is resumed."""
    return {**settings.fixed(), "stages": [stage.described() for stage in stages]}


def _train(accelerator: Accelerator, stages: tuple[Stage, ...], settings: Settings) -> bool:
    """Take a network through the stages; False if that was done before."""
    folder = RunFolder(settings.folder)
    fixed = fixed_of(stages, settings)
    folder.check(fixed, settings.resume)
    if folder.finished():
        return False
    data = _load(accelerator, settings)
    seed_everything(settings.seed)
    model = results.base_model(settings, data)
    try_start(model, stages, settings, data.input_size)
    taught_by = teachers(settings, data)
    if accelerator.is_main_process:
        folder.create(fixed)
    accelerator.wait_for_everyone()
    start_trackers(accelerator, settings)
    trainer = Trainer(accelerator, data, settings, folder, model, taught_by)
    trainer.train(stages)
    found = trainer.progress.results["dense"]
    steered = replace(settings, target=None) if stages[-1].alpha is not None else settings
    results.finish(accelerator, trainer.model, trainer.val, data, steered, folder, found)
    return True


def _load(accelerator: Accelerator, settings: Settings) -> datasets.Data:
    with accelerator.main_process_first():
        size = results.image_size(settings)
        data = datasets.load(settings.dataset, settings.data_dir, settings.download, size, settings.seed)
    return datasets.hold_out(data, settings.holdout) if settings.holdout else data


def _adapting(stages: tuple[Stage, ...]) -> list[Stage]:
    """The stages in which a gated network learns: as a whole, or its exits on a trunk that has learned."""
    return [stage for stage in stages if stage.name != "base" and stage.trains != "gates"]


def _compare_with_static(accelerator: Accelerator, stages: tuple[Stage, ...], settings: Settings) -> None:
    """Train the best static policy from the same base for as many steps, and note the adaptive gain."""
    root = settings.folder
    if "adaptive_gain" in json.loads((root / SUMMARY).read_text()):
        return
    data = _load(accelerator, settings)
    model = timm.create_model(f"local-dir:{root}", pretrained=True, budget=False).to(accelerator.device)
    policy = static_policy(model, datasets.val_loader(data, results.VAL_BATCH, settings.workers))
    accelerator.print(f"now the best static policy, {policy}, for as long: its accuracy is what adapting has to beat")
    gated = _adapting(stages)
    per_epoch = len(data.train) // settings.batch_size  # type: ignore[arg-type]
    steps = sum(stage.steps(per_epoch, settings) for stage in gated)
    longest = max(gated, key=lambda stage: stage.steps(per_epoch, settings))
    stage = replace(
        STATIC,
        iterations=steps,
        lr=max(stage.lr for stage in gated),
        schedule=longest.schedule,
        milestones=longest.milestones,
        weight_decay=longest.weight_decay,
    )
    changes: dict[str, Any] = {"method": "static", "policy": str(policy), "base": str(root / BASE), "stage": ()}
    changes |= {"output": root / "static", "resume": True, "gain": False, "epochs_scale": 1.0, "max_steps": None}
    static = replace(settings, **changes)
    _train(accelerator, planned((stage,), static), static)  # from where this run started
    if accelerator.is_main_process:
        results.add_gain(root, policy, data, settings, accelerator.device)
    accelerator.wait_for_everyone()
