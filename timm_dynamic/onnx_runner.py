"""Exported networks in ONNX Runtime at its best on the machine at hand."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .onnx import INPUT, METADATA, OUTPUTS
from .onnx_cut import Cutter, Piece
from .onnx_graph import need

Found = tuple[np.ndarray, np.ndarray, np.ndarray]


def onnx_runner(path: str | os.PathLike[str], threads: int | None = None) -> "Runner":
    """Load a file of `export_onnx`, to be called as `run(images)`.

    A file with branches is cut where it decides: each branch becomes a session of its own, and a Python loop goes from
    one to the next. So every convolution is in the runtime's fast layout and nothing is copied in or out of an `If`.

    Args:
        path: of a file that `export_onnx` has written.
        threads: how many to use; default: the runtime's choice. With branches it is set once for the process: all
            runners share a pool of threads.

    Returns:
        What takes images and gives their logits, exit indices and MACs; see `Runner`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it was not written by `export_onnx`, or `threads` is not at least 1.
        ImportError: if onnx or onnxruntime is not installed.
    """
    if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or threads < 1):
        raise ValueError(f"threads must be an int of at least 1; found {threads!r}")
    if not Path(path).is_file():
        raise FileNotFoundError(f"no file {path}")
    onnx, runtime = need("onnx"), need("onnxruntime")
    try:
        model = onnx.load(path)
        metadata = json.loads({prop.key: prop.value for prop in model.metadata_props}[METADATA])
    except (KeyError, ValueError, onnx.ModelProtoLoadError if hasattr(onnx, "ModelProtoLoadError") else ValueError) as error:
        raise ValueError(f"{path} was not written by export_onnx") from error
    return Runner(onnx, runtime, model, metadata, threads)


@dataclass
class _Step:
    """A piece that is ready to run."""

    session: Any
    inputs: list[str]
    outputs: list[str]
    aliases: list[tuple[str, str]]
    condition: str | None
    following: tuple["_Step", ...] = ()  # if the condition does not hold, and if it does
    left: tuple[list[str], ...] = ()  # for each of these what is not needed any more


class Runner:
    """A network in ONNX Runtime: `run(images) -> logits, exit_index, macs`.

    Attributes:
        metadata: what the file says about itself: "model", "input_size", "units", "thresholds", "labels" and more.
        sessions: how many sessions it runs in.
    """

    def __init__(self, onnx: Any, runtime: Any, model: Any, metadata: dict[str, Any], threads: int | None) -> None:
        self.metadata = metadata
        self._value = runtime.OrtValue.ortvalue_from_numpy
        options = _options(runtime, threads, metadata["form"] == "branches")

        def open_session(proto: Any) -> Any:
            return runtime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])

        if metadata["form"] == "masked":
            self._whole, self.sessions = open_session(model), 1
            return
        self._whole = None
        self._first, self.sessions = _prepare(onnx, model, open_session)

    def __call__(self, images: np.ndarray) -> Found:
        """Run images; with branches one after the other.

        Args:
            images: float32 [B, C, H, W], B of at least 1.

        Returns:
            logits [B, classes] float32, exit index [B] int64, MACs [B] int64.

        Raises:
            ValueError: for another shape or dtype.
        """
        size = tuple(self.metadata["input_size"])
        if not isinstance(images, np.ndarray) or images.dtype != np.float32:
            found = images.dtype if isinstance(images, np.ndarray) else type(images).__name__
            raise ValueError(f"images must be a numpy array of float32; found {found}")
        if images.ndim != 4 or images.shape[1:] != size or not len(images):
            raise ValueError(f"images must have shape [B, {', '.join(map(str, size))}]; found {list(images.shape)}")
        images = np.ascontiguousarray(images)
        if self._whole is not None:
            logits, exits, macs = self._whole.run(list(OUTPUTS), {INPUT: images})
            return logits, exits, macs
        rows = [self._run(images[i : i + 1]) for i in range(len(images))]
        logits, exits, macs = (np.concatenate(parts) for parts in zip(*rows, strict=True))
        return logits, exits, macs

    def _run(self, image: np.ndarray) -> list[np.ndarray]:
        """One image: [1, C, H, W]."""
        values = {INPUT: self._value(image)}
        step = self._first
        while True:
            if step.session is not None:
                feeds = {name: values[name] for name in step.inputs}
                values.update(zip(step.outputs, step.session.run_with_ort_values(step.outputs, feeds), strict=True))
            for new, old in step.aliases:
                values[new] = values[old]
            if step.condition is None:
                return [values[name].numpy() for name in OUTPUTS]
            which = bool(values[step.condition].numpy().item())
            for name in step.left[which]:
                del values[name]
            step = step.following[which]


def _options(runtime: Any, threads: int | None, shared: bool) -> Any:
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads, options.inter_op_num_threads = threads or 0, 1
    if shared and threads != 1:  # one pool for all sessions
        runtime.set_global_thread_pool_sizes(threads or 0, 1)
        options.use_per_session_threads = False
    return options


def _prepare(onnx: Any, model: Any, open_session: Any) -> tuple[_Step, int]:
    """The first step of a file with branches, and how many sessions there are."""
    cutter = Cutter(onnx.shape_inference.infer_shapes(model).graph)
    steps: dict[Piece, _Step] = {}
    for piece in cutter.pieces:  # those that follow a piece come before it
        session = open_session(_submodel(onnx, model, cutter, piece)) if piece.outputs else None
        backwards = piece.following[::-1]
        steps[piece] = _Step(
            session,
            piece.inputs,
            piece.outputs,
            piece.aliases,
            piece.condition,
            tuple(steps[following] for following in backwards),
            tuple(piece.left(following) for following in backwards),
        )
    return steps[cutter.first], sum(step.session is not None for step in steps.values())


def _submodel(onnx: Any, model: Any, cutter: Cutter, piece: Piece) -> Any:
    """A piece as a model of its own."""
    used = {name for node in piece.nodes for name in node.input}
    graph = onnx.helper.make_graph(
        piece.nodes,
        "piece",
        [cutter.types[name] for name in piece.inputs],
        [cutter.types[name] for name in piece.outputs],
        [weight for name, weight in cutter.weights.items() if name in used],
    )
    return onnx.helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
