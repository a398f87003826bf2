"""The folder that a run writes to: settings, metrics and checkpoints."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

SETTINGS, METRICS, CHECKPOINTS = "settings.json", "metrics.jsonl", "checkpoints"
SUMMARY, REPORT, BASE = "summary.json", "report.html", "base"
KEPT = 2  # checkpoints, beside the last one of every stage


class RunError(Exception):
    """A run that cannot start or go on, for a reason that the user can act on."""


@dataclass
class Progress:
    """Where a run is.

    Attributes:
        stage: place of the stage in the recipe.
        step: optimiser steps done in it.
        total: optimiser steps done in all stages.
        reached: whether the stage got where it had to get, and may end.
        skip_ratio: the last that it was judged by.
        results: what stages have found, such as the dense base's accuracy.
        sums: running sums of the metrics since the last evaluation, by name, and their ``count``.
    """

    stage: int = 0
    step: int = 0
    total: int = 0
    reached: bool = False
    skip_ratio: float = 1.0
    results: dict[str, Any] = field(default_factory=dict)
    sums: dict[str, float] = field(default_factory=dict)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file so that it is there whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(part, path)


class RunFolder:
    """Reads and writes the files of one run."""

    def __init__(self, root: Path):
        self.root = root
        self.checkpoints = root / CHECKPOINTS

    # Starting --------------------------------------------------------------------------------------------------------

    def holds_run(self) -> bool:
        """Whether there are traces of a run."""
        traces = (SETTINGS, METRICS, CHECKPOINTS, SUMMARY, REPORT, "model.safetensors")
        return any((self.root / name).exists() for name in traces)

    def finished(self) -> bool:
        """Whether the run wrote its last files."""
        return (self.root / SUMMARY).exists() and (self.root / REPORT).exists()

    def check(self, settings: dict[str, Any], resume: bool) -> None:
        """Refuse a folder that holds a run, unless it is to be resumed and has the same settings."""
        if self.root.exists() and not self.root.is_dir():
            raise RunError(f"--output {self.root} is a file; a folder is needed")
        if not self.holds_run():
            return
        if not resume:
            raise RunError(f"--output {self.root} holds a run: give --resume to go on with it, or another folder")
        if not (self.root / SETTINGS).exists():
            if self.finished() or self.newest() is not None:
                raise RunError(f"--output {self.root} holds a run without {SETTINGS}: give another folder")
            return
        before = json.loads((self.root / SETTINGS).read_text())
        now = json.loads(json.dumps(settings))
        odd = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
        if odd:
            named = ", ".join(f"{key} ({before.get(key)!r} there, {now.get(key)!r} here)" for key in odd)
            raise RunError(f"--output {self.root} holds a run with other settings: {named}")

    def create(self, settings: dict[str, Any]) -> None:
        """Make the folder and write the settings."""
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            if not (self.root / SETTINGS).exists():
                write_json(self.root / SETTINGS, settings)
        except OSError as error:
            raise RunError(f"--output {self.root} cannot be written to: {error.strerror or error}") from error

    # Metrics ---------------------------------------------------------------------------------------------------------

    def rows(self) -> list[dict[str, Any]]:
        """The rows of the metrics file; a last line cut off by a kill is left out."""
        path, found = self.root / METRICS, []
        for line in path.read_text().splitlines() if path.exists() else []:
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return found

    def add_row(self, row: dict[str, Any]) -> None:
        """Append a row to the metrics file."""
        with (self.root / METRICS).open("a") as file:
            file.write(json.dumps(row) + "\n")

    def drop_rows_after(self, total: int) -> None:
        """Forget the rows of evaluations later than step ``total`` of the run."""
        kept = [json.dumps(row) + "\n" for row in self.rows() if row["step"] <= total]
        part = self.root / (METRICS + ".part")
        part.write_text("".join(kept))
        os.replace(part, self.root / METRICS)

    # Checkpoints -----------------------------------------------------------------------------------------------------

    def save(self, weights: dict[str, nn.Module], training: dict[str, Any], progress: Progress) -> None:
        """Write a checkpoint: a temporary folder, then a rename.

        Of the older ones the last and the ends of stages are kept.

        Args:
            weights: networks whose weights to keep, by the name of their file.
            training: state of what trains them.
            progress: where the run is.
        """
        target = self.checkpoints / f"{progress.total:08d}"
        part = self.checkpoints / f".{target.name}.part"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        for name, model in weights.items():
            save_file(contiguous(model.state_dict()), part / f"{name}.safetensors")
        torch.save(training, part / "training.pt")
        sizes = {path.name: path.stat().st_size for path in sorted(part.iterdir())}
        write_json(part / "state.json", {**asdict(progress), "sizes": sizes})
        for path in part.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        shutil.rmtree(target, ignore_errors=True)
        os.replace(part, target)
        self._tidy()

    def newest(self) -> Path | None:
        """The newest checkpoint that is whole."""
        for path in self._found():
            if _whole(path):
                return path
            print(f"{path} is not whole and is skipped")
        return None

    def _tidy(self) -> None:
        """Remove checkpoints that are neither among the newest nor the last of their stage."""
        stages: set[int | None] = set()
        for place, path in enumerate(self._found()):
            stage = read_progress(path).stage if _whole(path) else None
            if place >= KEPT and (stage is None or stage in stages):
                shutil.rmtree(path)
            stages.add(stage)

    def _found(self) -> list[Path]:
        """Checkpoints, the newest first."""
        if not self.checkpoints.is_dir():
            return []
        return sorted((path for path in self.checkpoints.iterdir() if path.name.isdigit()), reverse=True)


def _whole(path: Path) -> bool:
    try:
        sizes = json.loads((path / "state.json").read_text())["sizes"]
        return all((path / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, json.JSONDecodeError, KeyError):
        return False


def read_progress(path: Path) -> Progress:
    """Where the run was at a checkpoint."""
    state = json.loads((path / "state.json").read_text())
    state.pop("sizes")
    return Progress(**state)


def read_training(path: Path) -> dict[str, Any]:
    """The state of the optimiser, of the task and of the loss scaler at a checkpoint."""
    return torch.load(path / "training.pt", map_location="cpu", weights_only=True)


def contiguous(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors laid out as safetensors wants them."""
    return {name: value.detach().cpu().contiguous() for name, value in state.items()}


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a safetensors file into a model whose tensors it must match.

    Raises:
        RunError: if the file is damaged, or holds another model.
    """
    try:
        state = load_file(path)
    except (SafetensorError, OSError) as error:
        raise RunError(f"{path} cannot be read as safetensors ({error}): it is damaged or cut off") from error
    own = model.state_dict()
    odd = [f"no {name}" for name in own if name not in state] + [f"unknown {name}" for name in state if name not in own]
    odd += [
        f"{name} is {tuple(state[name].shape)}, not {tuple(value.shape)}"
        for name, value in own.items()
        if name in state and state[name].shape != value.shape
    ]
    if odd:
        raise RunError(f"{path} holds another model: {_listed(odd)}")
    model.load_state_dict(state)


def _listed(items: Sequence[str], most: int = 3) -> str:
    more = f" and {len(items) - most} more differences" if len(items) > most else ""
    return ", ".join(items[:most]) + more
