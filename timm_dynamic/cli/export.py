"""The command `export`: an ONNX file, and a report that it gives what PyTorch gives."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import typer
from torch import nn

from .. import Decisions, decide, export_onnx, onnx_runner
from ..counting import count_macs
from ..onnx import INPUT, OUTPUTS
from ..onnx_graph import OPSET, need
from ..walk import Dynamic
from .errors import Failed, bad_input, check_place, one_line

TOLERANCE = 1e-4  # of the logits, relative to the largest if that is above 1
Row = dict[str, Any]
Run = Callable[[np.ndarray], Any]


def source_of(name: str) -> str:
    """A model's name; a folder's is `local-dir:FOLDER`."""
    return f"local-dir:{name}" if Path(name).is_dir() else name


def export(
    model: nn.Module, name: str, path: Path, size: tuple[int, int, int], dynamic_batch: bool, images: int
) -> Row:
    """Write a model and compare the file with PyTorch on random images.

    Raises:
        BadInput: if the model cannot be exported, or not to there.
        Failed: if a package is missing.
    """
    check_place(path)
    try:
        with bad_input(ValueError, OSError):
            export_onnx(model, path, size, dynamic_batch)
        runner = onnx_runner(path)
        session = need("onnxruntime").InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except ImportError as error:
        raise Failed(one_line(error)) from error
    x = torch.randn(images, *size, generator=torch.Generator().manual_seed(0))
    wanted = _pytorch(model, x)

    def run_file(x: np.ndarray) -> Any:
        parts = [x] if dynamic_batch else [x[i : i + 1] for i in range(len(x))]
        found = [session.run(list(OUTPUTS), {INPUT: part}) for part in parts]
        return [np.concatenate(rows) for rows in zip(*found, strict=True)]

    row: Row = {
        "name": name,
        "file": str(path),
        "bytes": path.stat().st_size,
        "opset": OPSET,
        "form": runner.metadata["form"],
        "input_size": list(size),
        "images": images,
        "mean_macs": float(wanted[2].mean()),
        "dense_macs": runner.metadata["dense_macs"],
        "runtime": _compare(run_file, x, wanted),
        "runner": _compare(runner, x, wanted) | {"blocked": runner.blocked},
    }
    row["agrees"] = row["runtime"]["agrees"] and row["runner"]["agrees"]
    return row


def _pytorch(model: nn.Module, x: torch.Tensor) -> list[np.ndarray]:
    """Logits, exit index and MACs as PyTorch gives them."""
    with torch.no_grad():
        if isinstance(getattr(model, "dynamic", None), Dynamic):
            found: Decisions = decide(model, x)
            return [part.numpy() for part in (found.logits, found.exit_index, found.macs)]
        dense = count_macs(model, (x.shape[1], x.shape[2], x.shape[3])).dense
        return [model(x).numpy(), np.zeros(len(x), np.int64), np.full(len(x), dense)]


def _compare(run: Run, x: torch.Tensor, wanted: list[np.ndarray]) -> Row:
    """How far what runs the file is from PyTorch."""
    logits, exits, macs = run(x.numpy())
    difference = float(np.abs(logits - wanted[0]).max())
    same_exits, same_macs = int((exits == wanted[1]).sum()), int((macs == wanted[2]).sum())
    near = difference <= TOLERANCE * max(1.0, float(np.abs(wanted[0]).max()))
    agrees = near and same_exits == same_macs == len(x)
    return {"max_difference": difference, "same_exits": same_exits, "same_macs": same_macs, "agrees": agrees}


def show(row: Row) -> None:
    """Print the report as text."""
    size = " x ".join(map(str, row["input_size"]))
    megabytes = row["bytes"] / 1e6
    typer.echo(f"{row['file']}: {row['name']}, {row['form']}, {size}, opset {row['opset']}, {megabytes:.1f} MB")
    share = 100 * row["mean_macs"] / row["dense_macs"]
    typer.echo(f"{row['images']} random images against PyTorch; their MACs are {share:.1f} % of the dense network's")
    for title, key in (("ONNX Runtime", "runtime"), ("onnx_runner", "runner")):
        found = row[key]
        counts = f"exits agree {found['same_exits']}/{row['images']}, MACs {found['same_macs']}/{row['images']}"
        typer.echo(f"  {title:12} logits differ by at most {found['max_difference']:.1e}, {counts}")


def check(row: Row) -> None:
    """Raise `Failed` unless the file agrees with PyTorch."""
    if not row["agrees"]:
        raise Failed(f"{row['file']} does not give what PyTorch gives")
