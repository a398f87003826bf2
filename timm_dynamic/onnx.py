"""Dynamic networks as ONNX files."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch

from . import families
from .budgets import default_input_size
from .configs import check_input_size
from .onnx_branches import write_branches
from .onnx_graph import OPSET, Graph, need, to_model
from .onnx_masked import write_masked
from .onnx_ops import Value
from .onnx_parts import Net, take_apart
from .version import __version__

METADATA = "timm_dynamic"  # key of the file's metadata_props
INPUT, OUTPUTS = "images", ("logits", "exit_index", "macs")
LARGEST = 2**31 - 1  # bytes in a file of protobuf


def export_onnx(
    model: Any,
    path: str | os.PathLike[str],
    input_size: tuple[int, int, int] | None = None,
    dynamic_batch: bool = False,
) -> Path:
    """Write a network as an ONNX file (opset 18) with batch norms folded and the gates' thresholds as they are now.

    The file takes `images` [1, C, H, W] (float32) and gives `logits` [1, classes], `exit_index` [1] and `macs` [1]
    (int64). Gates and exits are `If` nodes with the weights inside of the branches, so that a runtime computes only
    what is kept: units with any kind of layer gate; hidden channels with nested gates (a branch for each width) and
    with independent gates (weights gathered); everything after the exit at which the image leaves. Hidden channels of
    grouped convolutions, group norms and blur pools are computed and multiplied by their keeps; `macs` then is the
    cost of the kept ones, as `Decisions.macs` is.

    Images leave by the budget that the model holds (`macs`, `fraction`, `exit` or `confidence`), else by its
    calibrated exits, else at the head.

    Args:
        model: a dynamic or stock ResNet or DenseNet in eval mode; it is not changed. A stock one becomes a file
            without branches.
        path: ends in ".onnx"; appears when the file has been written and checked, and not before.
        input_size: (channels, height, width); default: the model's own.
        dynamic_batch: write the masked form for any number of images at once, `images` [batch, C, H, W]. Decisions
            and `macs` are the same, and everything is computed.

    Returns:
        The path.

    Raises:
        ValueError: if the model is in training mode, within `force`, of another kind or without values, has a budget
            that a file cannot keep (`latency_ms`, `energy_mj`, a value for each image), cannot run the input size,
            or uses an operation that has no form here.
        FileNotFoundError: if the folder does not exist.
        ImportError: if onnx is not installed.
    """
    place = Path(path)
    size = _check(model, place, input_size)
    onnx = need("onnx")
    net = take_apart(model, size)
    graph = Graph()
    images = Value(INPUT, torch.zeros(1, *size))
    with torch.inference_mode(False), torch.no_grad():
        found = (write_masked if dynamic_batch else write_branches)(net, graph, images)
    graph.give(*(value.given for value in found))
    batch = "batch" if dynamic_batch else 1
    outputs = {name: (batch, *value.sample.shape[1:]) for name, value in zip(OUTPUTS, found, strict=True)}
    metadata = {METADATA: json.dumps(_describe(model, net, dynamic_batch))}
    _save(onnx, to_model(graph, {INPUT: (batch, *size)}, outputs, metadata), place)
    return place


def _check(model: Any, place: Path, input_size: Any) -> tuple[int, int, int]:
    """Raise for what can be seen to be wrong beforehand; gives the input size."""
    families.units(model)
    if place.suffix != ".onnx":
        raise ValueError(f"the file's name must end in .onnx; found {place.name!r}")
    if not place.parent.is_dir():
        raise FileNotFoundError(f"no folder {place.parent}")
    if model.training:
        raise ValueError("export_onnx needs a model in eval mode; found training mode: call model.eval() first")
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        raise ValueError("export_onnx needs a model with values; found one on the meta device")
    if getattr(getattr(model, "dynamic", None), "forced", None) is not None:
        raise ValueError("export_onnx writes what the gates decide; leave the `force` block first")
    return check_input_size(default_input_size(model) if input_size is None else input_size)


def _describe(model: Any, net: Net, dynamic_batch: bool) -> dict[str, Any]:
    """What the file's metadata says: plain JSON values."""
    cfg = getattr(model, "pretrained_cfg", None) or {}
    gates = {"layer": net.layer_gates, "channel": net.channel_gates}
    return {
        "version": __version__,
        "model": families.model_name(model),
        "form": "masked" if dynamic_batch else "branches",
        "opset": OPSET,
        "input_size": list(net.table.input_size),
        "mean": list(cfg.get("mean", ())),
        "std": list(cfg.get("std", ())),
        "labels": list(cfg.get("label_names") or ()),
        "dense_macs": net.table.dense,
        "units": [
            {"name": row.name, "macs": row.full, "layer_gate": row.layer_gate, "channel_gate": row.channel_gate}
            for row in net.table.units
        ],
        "exits": [{"name": stop.name, "after": stop.after, "macs": stop.head} for stop in net.table.exits],
        "gates": {name: None if part is None else part.config.to_dict() for name, part in gates.items()},
        "thresholds": {name: [] if part is None else part.threshold.tolist() for name, part in gates.items()},
        "last_exit": net.last,
        "confidence": None if net.levels is None else list(net.levels),
        "budget_macs": net.most,
    }


def _save(onnx: Any, proto: Any, place: Path) -> None:
    """Write the file beside its place, check it, and move it there."""
    if proto.ByteSize() > LARGEST:
        raise ValueError(f"the file would hold {proto.ByteSize()} bytes; ONNX files end at {LARGEST}")
    handle, name = tempfile.mkstemp(suffix=".onnx", dir=place.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(proto.SerializeToString())
        onnx.checker.check_model(name, full_check=True)
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, place)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
