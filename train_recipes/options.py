"""Options of the recipes: one `Settings` for all, made from the command line and a YAML file."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import typer
import yaml

from images import DataError
from run_folder import RunError

STAGES = "train_recipes.stages"  # where a click context keeps a config's changes
WHERE_IT_IS = "?"  # before a change of a stage: that the method at hand may lack it
PREFIXES = ("skipnet_", "iadi_", "ddi_")
TRACKERS = ("tensorboard", "trackio", "wandb")
FREE = 3  # units that hindsight leaves to the gates
# What may differ when a run is resumed: it does not change the numbers.
MAY_DIFFER = (
    *("output", "resume", "data_dir", "download", "workers", "threads", "checkpoint_every", "tracker", "gain"),
    "cuda_graph",
)
POSITIVE = (
    *("batch_size", "accumulate", "epochs_scale", "evaluations", "group_size", "max_steps", "image_size"),
    "temperature",
)
NOT_NEGATIVE = (
    *("holdout", "spread", "distill", "information", "distill_exits", "beta", "entropy", "seed", "workers", "threads"),
    *("checkpoint_every", "clip_grad", "exit_hidden"),
)
SHARES = ("keep", "exit_gradient")


@dataclass(frozen=True)
class Settings:
    """What a run was asked to do; `--help` of a recipe explains each."""

    recipe: str
    model: str
    dataset: str = "digits"
    data_dir: Path = Path("data")
    download: bool = False
    image_size: int | None = None
    holdout: int = 0
    output: Path | None = None
    resume: bool = False
    seed: int = 0
    base: str | None = None
    start: Path | None = None
    batch_size: int = 32
    accumulate: int = 1
    precision: str = "auto"
    clip_grad: float | None = None
    ema: float = 0.0
    compile: bool = False
    cuda_graph: bool = False
    grad_checkpointing: bool = False
    epochs_scale: float = 1.0
    max_steps: int | None = None
    evaluations: int = 4
    checkpoint_every: int = 0
    tracker: tuple[str, ...] = ()
    workers: int | None = None
    threads: int = 0
    stage: tuple[str, ...] = ()
    gate: str = "rnn"
    gate_init: str = "random"
    certainty: bool = False
    spread: float = 0.5
    group_size: int = 16
    channel_mode: str = "independent"
    settle: float | None = None
    alpha: float | None = None
    target: float | None = None
    cost: str = "macs"
    energy: Path | None = None
    distill: float = 0.0
    teacher: tuple[str, ...] | None = None
    information: float = 0.0
    shut: float | None = None
    open: float | None = None
    exits_after: str | None = None
    exit_hidden: int | None = None  # as 0
    exits_alone: bool | None = None  # as False
    exit_weighting: str = "uniform"
    distill_exits: float = 0.0
    exit_gradient: float | None = None  # as 1, and as in runs from before it
    calibrate: float | None = None
    method: str | None = None
    beta: float = 1.0
    unit_cost: str = "macs"
    baseline: str = "greedy"
    entropy: float = 0.0
    temperature: float = 0.25
    explore: float = 0.02
    plain: bool = False
    keep: float = 0.6
    policy: str | None = None
    free: int | str | None = None
    gain: bool = False

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

    @property
    def left_free(self) -> int | tuple[str, ...] | None:
        """Which units of --start's policy are left to the gates; None for all gates of the network.

        So many of the last, or those of these names.
        """
        if isinstance(self.free, str):
            return tuple(name.strip() for name in self.free.split(","))
        return FREE if self.free is None and self.method == "hindsight" else self.free

    def fixed(self) -> dict[str, Any]:
        """What must be the same when the run is resumed, as JSON values."""
        values = {key: value for key, value in dataclasses.asdict(self).items() if key not in MAY_DIFFER}
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
    if values.pop("hindsight", None):
        values["method"] = "hindsight"
    for name in ("stage", "tracker"):
        values[name] = tuple(values.get(name) or ())
    values["teacher"] = tuple(values.get("teacher") or ())
    for name in ("teacher", "exit_hidden", "exits_alone"):
        values[name] = values.get(name) or None  # runs from before it have None of it
    found = Settings(recipe=recipe, **values)
    found = dataclasses.replace(found, free=_number_or_names(found.free))
    if found.alpha is None and found.target is None:
        found = dataclasses.replace(found, target=target)
    if found.start is not None:
        found = dataclasses.replace(found, base=_base_of_start(found.start, found.base))
    if found.precision == "auto":
        found = dataclasses.replace(found, precision="bf16" if fast_bf16() else "fp32")
    _check(found, prefix)
    return found


def _number_or_names(free: int | str | None) -> int | str | None:
    """What --free is given: a number of units, or names."""
    try:
        return None if free is None else int(free)
    except ValueError:
        return free


def is_name(start: Path) -> bool:
    """Whether --start names a trained network, not a run's folder."""
    return not start.exists() and timm.is_model(str(start))


def _base_of_start(start: Path, base: str | None) -> str:
    """The trained base: a run keeps its own, to a network that is named it has to be given."""
    if is_name(start):
        if base is None:
            raise RunError(f"--start {start} brings weights and a policy, but no base: give --base")
        return base
    if base is not None:
        raise RunError(f"--start brings its own base: give one of the two; found --base {base}")
    return str(start / "base")


def _check(found: Settings, prefix: str) -> None:
    """Refuse options that make no sense.

    Raises:
        RunError: which says what was wanted and found.
    """
    other = [p for p in PREFIXES if found.model.startswith(p) and p != prefix]
    if other:
        wanted = f"{prefix}* or a stock model" if prefix else "a stock model"
        raise RunError(f"{found.recipe}.py trains {wanted}; found --model {found.model}")
    _check_ranges(found)
    if found.alpha is not None and found.target is not None:
        raise RunError(f"give --alpha or --target, not both; found {found.alpha} and {found.target}")
    if found.batch_size % found.accumulate:
        raise RunError(f"--accumulate must divide --batch-size; found {found.accumulate} and {found.batch_size}")
    _check_machine(found)
    _check_teaching(found)
    if found.exits_alone and found.exit_gradient is not None:
        raise RunError("--exits-alone leaves the trunk as it is: not with --exit-gradient, its share of their gradient")
    unknown = sorted(set(found.tracker) - set(TRACKERS))
    if unknown:
        raise RunError(f"--tracker must be one of {', '.join(TRACKERS)}; found {unknown[0]}")
    if (found.energy is not None) != (found.cost == "energy_mj"):
        raise RunError("--energy FILE and --cost energy_mj go together; found one without the other")
    _check_method(found)


def _check_ranges(found: Settings) -> None:
    """Refuse numbers that are none, or out of their range."""
    for name, value in dataclasses.asdict(found).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise RunError(f"--{name.replace('_', '-')} must be a finite number; found {value}")
    for name in ("target", "calibrate"):
        share = getattr(found, name)
        if share is not None and not 0 < share <= 1:
            raise RunError(f"--{name} must be a share of the dense cost in (0, 1]; found {share}")
    for name in POSITIVE:
        if getattr(found, name) is not None and getattr(found, name) <= 0:
            raise RunError(f"--{name.replace('_', '-')} must be above 0; found {getattr(found, name)}")
    for name in NOT_NEGATIVE:
        if getattr(found, name) is not None and getattr(found, name) < 0:
            raise RunError(f"--{name.replace('_', '-')} must be 0 or above; found {getattr(found, name)}")
    if found.shut is not None and not 0 <= found.shut < 1:
        raise RunError(f"--shut must be a share of the images in [0, 1); found {found.shut}")
    if found.open is not None and not (found.shut or 0) < found.open <= 1:
        raise RunError(f"--open must be a share of the images above --shut, at most 1; found {found.open}")
    if found.settle is not None and not 0.5 <= found.settle <= 1:
        raise RunError(f"--settle must be a share of the images in [0.5, 1]; found {found.settle}")
    if not 0 <= found.explore < 0.5:
        raise RunError(f"--explore must be a share in [0, 0.5); found {found.explore}")
    for name in SHARES:
        if getattr(found, name) is not None and not 0 <= getattr(found, name) <= 1:
            raise RunError(f"--{name.replace('_', '-')} must be in 0..1; found {getattr(found, name)}")
    if not 0 <= found.ema < 1:
        raise RunError(f"--ema must be at least 0 and below 1; found {found.ema}")


def _check_method(found: Settings) -> None:
    """Refuse what a method, or --free, has no use for or cannot do without."""
    if (found.policy is not None) != (found.method == "static"):
        raise RunError("--policy and --method static go together; found one without the other")
    if found.method == "hindsight" and found.start is None:
        raise RunError("hindsight starts from a finished run of --method static: give --start")
    if found.free is not None and (found.start is None or found.method == "static"):
        raise RunError(
            "--free leaves some units of --start's policy to the gates: give --start, and a method that trains them"
        )
    if found.free is not None and found.method != "hindsight" and found.open is None:
        raise RunError("--free needs --open: the units that it does not leave to the gates are opened")
    if found.method == "hindsight" and found.information:
        raise RunError(f"hindsight has no use for --information; found {found.information}")


def _check_teaching(found: Settings) -> None:
    """Refuse teachers without a weight, and a weight without what could teach."""
    if found.teacher and not found.distill:
        raise RunError("--teacher needs the weight of what it teaches: give --distill")
    if found.recipe == "base" and found.distill and not found.teacher:
        raise RunError("--distill needs a network to learn from: give --teacher")


def _check_machine(found: Settings) -> None:
    """Refuse what this machine has not."""
    if found.precision == "fp16" and not torch.cuda.is_available():
        raise RunError("--precision fp16 needs a GPU, whose losses it scales; use bf16 or fp32 here")
    if found.cuda_graph and (found.precision == "fp16" or found.accumulate > 1 or found.compile):
        raise RunError("--cuda-graph records a plain step: not with --precision fp16, --accumulate or --compile")
    if found.cuda_graph and not torch.cuda.is_available():
        raise RunError("--cuda-graph needs a GPU with CUDA; found none")


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
    if not isinstance(stages, dict) or not all(isinstance(fields, dict) for fields in stages.values()):
        raise typer.BadParameter(
            f"{path}: stages must hold the fields of each, as in sp: {{epochs: 3}}; found {stages}"
        )
    flat = [f"{WHERE_IT_IS}{name}.{key}={value}" for name, fields in stages.items() for key, value in fields.items()]
    context.meta[STAGES] = [*flat, *(values.pop("stage", None) or [])]
    context.default_map = values
    return path


def over_config(context: typer.Context, value: list[str] | None) -> list[str]:
    """The stages' changes of a config, then those of the command line, which hold where both say something."""
    return [*context.meta.get(STAGES, ()), *(value or [])]


def one_of_two(context: typer.Context, parameter: typer.CallbackParam, value: float | None) -> float | None:
    """--alpha on the command line goes over a config's target, and the other way round."""
    other = "target" if parameter.name == "alpha" else "alpha"
    mine, theirs = (getattr(context.get_parameter_source(name), "name", "") for name in (str(parameter.name), other))
    return None if mine == "DEFAULT_MAP" and theirs == "COMMANDLINE" else value


def command(main: Callable[..., None]) -> None:
    """Run a recipe's `main` from the command line; errors that the user can act on are one line."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    try:
        app()
    except (RunError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from error
