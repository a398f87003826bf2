"""Options of the recipes: one `Settings` for all, made from the command line and a YAML file."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
import yaml

from data import DataError
from run_folder import RunError

PREFIXES = ("skipnet_", "iadi_", "ddi_")
# What may differ when a run is resumed: it does not change the numbers.
FREE = ("output", "resume", "data_dir", "download", "workers", "threads", "checkpoint_every")


@dataclass(frozen=True)
class Settings:
    """What a run was asked to do; `--help` of a recipe explains each."""

    recipe: str
    model: str
    dataset: str = "digits"
    data_dir: Path = Path("data")
    download: bool = False
    image_size: int | None = None
    output: Path | None = None
    resume: bool = False
    seed: int = 0
    base: str | None = None
    method: str | None = None
    gate: str = "rnn"
    alpha: float | None = None
    target: float | None = None
    batch_size: int = 32
    accumulate: int = 1
    precision: str = "auto"
    epochs_scale: float = 1.0
    max_steps: int | None = None
    evaluations: int = 4
    checkpoint_every: int = 0
    workers: int | None = None
    threads: int = 0
    stage: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        """Where the run writes to."""
        return self.output or Path("runs") / f"{self.recipe}-{self.dataset}"

    @property
    def base_model(self) -> str:
        """Name of the stock network."""
        for prefix in PREFIXES:
            if self.model.startswith(prefix):
                return self.model.removeprefix(prefix)
        return self.model

    def fixed(self) -> dict[str, Any]:
        """What must be the same when the run is resumed, as JSON values."""
        values = {key: value for key, value in dataclasses.asdict(self).items() if key not in FREE}
        return {key: str(value) if isinstance(value, Path) else value for key, value in values.items()}


def settings(recipe: str, values: dict[str, Any], prefix: str = "", target: float | None = None) -> Settings:
    """Settings from a recipe's options, which are checked.

    Args:
        recipe: its name.
        values: the options by name.
        prefix: that a dynamic model's name must have; names of stock models are taken too.
        target: taken where neither `alpha` nor `target` is given.
    """
    values = {key: value for key, value in values.items() if key != "config"}
    values["stage"] = tuple(values.get("stage") or ())
    found = Settings(recipe=recipe, **values)
    if found.alpha is None and found.target is None:
        found = dataclasses.replace(found, target=target)
    if found.precision == "auto":
        found = dataclasses.replace(found, precision="bf16" if fast_bf16() else "fp32")
    other = [p for p in PREFIXES if found.model.startswith(p) and p != prefix]
    if other:
        wanted = f"{prefix}* or a stock model" if prefix else "a stock model"
        raise RunError(f"{recipe}.py trains {wanted}; found --model {found.model}")
    if found.alpha is not None and found.target is not None:
        raise RunError(f"give --alpha or --target, not both; found {found.alpha} and {found.target}")
    if found.target is not None and not 0 < found.target <= 1:
        raise RunError(f"--target must be a share of the dense MACs in (0, 1]; found {found.target}")
    for name in ("batch_size", "accumulate", "epochs_scale", "evaluations"):
        if getattr(found, name) <= 0:
            raise RunError(f"--{name.replace('_', '-')} must be above 0; found {getattr(found, name)}")
    if found.batch_size % found.accumulate:
        raise RunError(f"--accumulate must divide --batch-size; found {found.accumulate} and {found.batch_size}")
    return found


def fast_bf16() -> bool:
    """Whether this machine computes in bfloat16 natively."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    checks = [getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")]
    return any(check is not None and check() for check in checks)


def read_config(context: typer.Context, path: Path | None) -> Path | None:
    """Make the values of a YAML file the defaults of the command line."""
    if path is None:
        return None
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except (OSError, yaml.YAMLError) as error:
        raise typer.BadParameter(f"{path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise typer.BadParameter(f"{path} must hold one value for each option")
    stages = values.pop("stages", {})
    known = {parameter.name for parameter in context.command.params} - {"config", "resume", "help"}
    unknown = sorted(str(key) for key in values if key not in known)
    if unknown:
        raise typer.BadParameter(
            f"{path}: unknown keys {', '.join(unknown)}; known: {', '.join(sorted(known))}, stages"
        )
    flat = [f"{stage}.{key}={value}" for stage, fields in stages.items() for key, value in fields.items()]
    context.default_map = {**values, **({"stage": flat} if flat else {})}
    return path


def command(main: Callable[..., None]) -> None:
    """Run a recipe's `main` from the command line; errors that the user can act on are one line."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    try:
        app()
    except (RunError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from error


def _option(help: str, **more: Any) -> Any:
    return typer.Option(help=help, **more)


DATA_DIR = Path("data")

Config = Annotated[
    Path | None, _option("YAML file whose values are the defaults.", callback=read_config, is_eager=True)
]
Output = Annotated[Path | None, _option("Folder of the run; default runs/RECIPE-DATASET.")]
Resume = Annotated[bool, _option("Go on from the newest whole checkpoint in --output.")]
Model = Annotated[str, _option("Name of the network.")]
DatasetName = Annotated[Literal["digits", "cifar10", "cifar100", "svhn", "folder"], _option("Data set.")]
DataDir = Annotated[Path, _option("Where the data set is; for 'folder' it holds train/CLASS and val/CLASS.")]
Download = Annotated[bool, _option("Let torchvision fetch the data set.")]
ImageSize = Annotated[int | None, _option("Pixels a side; default: 32 for small networks, else the network's own.")]
Seed = Annotated[int, _option("Of everything random.")]
Base = Annotated[str | None, _option("Trained base: a saved folder, a .safetensors file, or a pretrained timm name.")]
Method = Annotated[Literal["sp"], _option("Kind of training: sp, supervised with hard gates.")]
Gate = Annotated[Literal["ff1", "ff2", "rnn", "linear"], _option("Kind of layer gate.")]
Alpha = Annotated[float | None, _option("Fixed weight of the cost, which is a share of the dense MACs.")]
Target = Annotated[float | None, _option("Share of the dense MACs that alpha is steered to, instead of --alpha.")]
BatchSize = Annotated[int, _option("Images of one optimiser step, over all processes.")]
Accumulate = Annotated[int, _option("Parts that a batch is computed in.")]
Precision = Annotated[
    Literal["auto", "fp32", "bf16"], _option("Of the forward pass in training; auto is bf16 where it is fast.")
]
EpochsScale = Annotated[float, _option("Factor on the length of every stage.")]
MaxSteps = Annotated[int | None, _option("Most optimiser steps of a stage, for a dry run.")]
Evaluations = Annotated[int, _option("Evaluations, each with a checkpoint, in every stage.")]
CheckpointEvery = Annotated[int, _option("Further checkpoints every so many steps; 0 for none.")]
Workers = Annotated[int | None, _option("Processes of each data loader; default: 0 for images held in memory, else 4.")]
Threads = Annotated[
    int, _option("CPU threads of each process; 0 for the launcher's choice, which is 1 under accelerate launch.")
]
StageOption = Annotated[list[str] | None, _option("Change a stage, as in iadi.epochs=20; may be given many times.")]
