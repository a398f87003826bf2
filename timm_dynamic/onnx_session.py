"""Exported networks in ONNX Runtime at its best on the machine at hand."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from .onnx import INPUT, LARGEST, METADATA, OUTPUTS
from .onnx_blocked import NotBlocked, blocked
from .onnx_graph import need

Found = tuple[np.ndarray, np.ndarray, np.ndarray]
TOLERANCE = 1e-3


def onnx_runner(path: str | os.PathLike[str], threads: int | None = None) -> "Runner":
    """Load a file of `export_onnx`, to be called as `run(images)`.

    A file with branches is rewritten in memory in the layout that ONNX Runtime's convolutions use on this machine, so
    that nothing is reordered on the way into an `If` or out of it. Where the runtime has no such layout, or the
    rewritten network does not give what the file gives for a random image, the file is run as it is.

    Args:
        path: of a file that `export_onnx` has written.
        threads: how many to use; default: the runtime's choice.

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
        model = onnx.load_model_from_string(Path(path).read_bytes())
        metadata = json.loads({prop.key: prop.value for prop in model.metadata_props}[METADATA])
    except Exception as error:  # protobuf's errors have no common kind
        raise ValueError(f"{path} was not written by export_onnx") from error
    return Runner(onnx, runtime, model, metadata, threads)


class Runner:
    """A network in ONNX Runtime: `run(images) -> logits, exit_index, macs`.

    Attributes:
        metadata: what the file says about itself: "model", "input_size", "units", "thresholds", "labels" and more.
        blocked: whether it runs in the machine's own layout.
    """

    def __init__(self, onnx: Any, runtime: Any, model: Any, metadata: dict[str, Any], threads: int | None) -> None:
        self.metadata = metadata
        self._session = _open(runtime, model, threads)
        self.blocked = False
        if metadata["form"] == "branches":
            self._try_blocked(onnx, runtime, model, threads)

    def _try_blocked(self, onnx: Any, runtime: Any, model: Any, threads: int | None) -> None:
        """Rewrite the network, and keep that if it gives the same."""
        image = np.random.default_rng(0).standard_normal((1, *self.metadata["input_size"]), dtype=np.float32)
        wanted, plain = self(image), self._session
        try:
            fast = _rewritten(onnx, runtime, model)
            if fast.ByteSize() > LARGEST:
                return
            self._session = _open(runtime, fast, threads, optimise=False)
            found = self(image)
        except _errors(runtime):
            self._session = plain
            return
        scale = TOLERANCE * max(1.0, float(np.abs(wanted[0]).max(initial=0.0)))
        self.blocked = bool(np.abs(found[0] - wanted[0]).max(initial=0.0) <= scale) and all(
            np.array_equal(a, b) for a, b in zip(found[1:], wanted[1:], strict=True)
        )
        if not self.blocked:
            self._session = plain

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
        names = list(OUTPUTS)
        if self.metadata["form"] == "masked" or len(images) == 1:
            logits, exits, macs = self._session.run(names, {INPUT: images})
            return logits, exits, macs
        rows = [self._session.run(names, {INPUT: images[i : i + 1]}) for i in range(len(images))]
        logits, exits, macs = (np.concatenate(parts) for parts in zip(*rows, strict=True))
        return logits, exits, macs


def _errors(runtime: Any) -> tuple[type[Exception], ...]:
    """What a graph that cannot be rewritten, loaded or run ends in."""
    state = runtime.capi.onnxruntime_pybind11_state
    kinds = ("Fail", "InvalidArgument", "InvalidGraph", "NotImplemented", "RuntimeException")
    return (NotBlocked, RuntimeError, *(getattr(state, kind) for kind in kinds))


def _options(runtime: Any, threads: int | None) -> Any:
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads, options.inter_op_num_threads = threads or 0, 1
    return options


def _open(runtime: Any, model: Any, threads: int | None, optimise: bool = True) -> Any:
    """A session."""
    options = _options(runtime, threads)
    if not optimise:
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
        # many small branches: freed memory is used again while it is in the cache
        options.enable_cpu_mem_arena = options.enable_mem_pattern = False
    return runtime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _rewritten(onnx: Any, runtime: Any, model: Any) -> Any:
    """A file's network in the blocked layout."""
    options = _options(runtime, 1)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "part.onnx"
        options.optimized_model_filepath = str(place)

        def optimise(part: Any) -> Any:
            runtime.InferenceSession(part.SerializeToString(), options, providers=["CPUExecutionProvider"])
            return onnx.load_model_from_string(place.read_bytes())

        return blocked(onnx, model, optimise)
