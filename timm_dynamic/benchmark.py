"""Whether skipped work is skipped time: dense, masked, skipping and optimised networks timed side by side.

    realised ratio = (dense time - dynamic time) / (dense time * share of MACs skipped)

1 is ideal. The dense network is the best form of the stock model for the same engine.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import random
import statistics
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .budgets import default_input_size, set_budget
from .configs import check_input_size, one_of, ratio
from .forward import decide
from .inference import optimize_for_inference
from .surgery import force, set_execution, set_policy, strip
from .timing import Clock, distance, peak_bytes
from .walk import table_for

# engine -> the dense network that it is compared with
ENGINES = {
    "dense": "dense",
    "masked": "dense",
    "skipping": "dense",
    "optimised": "dense optimised",
    "compile": "dense compile",
    "onnx": "dense onnx",
}
USUAL = ("dense", "masked", "skipping", "optimised")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TOLERANCES = {"float32": 1e-4, "bfloat16": 1e-1, "float16": 2e-2}  # of logits, relative to the largest
TURN_MS = 20.0  # short calls are repeated for so long before the next engine has its turn
WARM = 2  # rounds that are not counted
Watch = Callable[[Sequence[int]], Iterable[int]]


@dataclass(frozen=True)
class Benchmark:
    """What is timed.

    Attributes:
        batch_sizes: images in a call.
        keeps: shares of the layer-gated units that run in each image; 1 = all open.
        channel_keep: share of the channel groups kept in each gated hidden width.
        exit: where all images leave (0 is the first exit); None for the head.
        engines: names in `ENGINES`.
        input_size: (channels, height, width); None for the model's own.
        rounds: timed turns of each engine.
        threads: of the CPU; None for torch's present number.
        dtype: name in `DTYPES`.
        device: where the networks run.
    """

    batch_sizes: tuple[int, ...] = (1, 8)
    keeps: tuple[float, ...] = (1.0, 0.75, 0.5)
    channel_keep: float = 1.0
    exit: int | None = None
    engines: tuple[str, ...] = USUAL
    input_size: tuple[int, int, int] | None = None
    rounds: int = 15
    threads: int | None = None
    dtype: str = "float32"
    device: str = "cpu"

    def __post_init__(self) -> None:
        for engine in self.engines:
            one_of("engine", engine, tuple(ENGINES))
        one_of("dtype", self.dtype, tuple(DTYPES))
        for keep in self.keeps:
            ratio("keep", keep)
        ratio("channel_keep", self.channel_keep)
        counts = [("batch_sizes", n) for n in self.batch_sizes] + [("rounds", self.rounds)]
        for name, count in [*counts, *([] if self.threads is None else [("threads", self.threads)])]:
            if count < 1:
                raise ValueError(f"{name} must be at least 1; found {count}")
        if self.input_size is not None:
            check_input_size(self.input_size)


@dataclass(frozen=True)
class Row:
    """What was found for one engine in one case. Times are medians, for one image.

    Attributes:
        engine: its name; "dense ..." for the stock model in an engine's best form.
        batch: images in a call.
        keep: share of layer-gated units that ran; None for a dense network.
        ms: wall clock.
        spread: between the quartiles of `ms`.
        device_ms: on a CPU its own time (of the calling thread, or of all if there are several); on a GPU by events.
        macs_share: MACs, gates included, as a share of the stock model's.
        realised: the realised ratio by wall clock; None where nothing is skipped.
        realised_device: the same by `device_ms`.
        speedup: the dense network's time over this one's, same engine, by wall clock.
        speedup_device: the same by `device_ms`.
        speedup_fastest: over the fastest dense network of all engines that ran.
        peak_mb: megabytes of weights, and of tensors at most at once in a call (what libraries use inside not
            counted); None where it cannot be seen.
        difference: of logits from the plain network's under the same decisions, relative to the largest.
        agrees: whether that is rounding.
    """

    engine: str
    batch: int
    keep: float | None
    ms: float
    spread: float
    device_ms: float
    macs_share: float
    realised: float | None
    realised_device: float | None
    speedup: float
    speedup_device: float
    speedup_fastest: float
    peak_mb: float | None
    difference: float
    agrees: bool

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values."""
        return dataclasses.asdict(self)


def realised_ratio(dense: float, dynamic: float, macs_share: float) -> float | None:
    """How much of the work that is left out is time that is left out; None if no work is."""
    return (dense - dynamic) / (dense * (1 - macs_share)) if macs_share < 1 else None


def benchmark(model: Any, config: Benchmark | None = None, watch: Watch = iter) -> list[Row]:
    """Time a dynamic network and the stock network in it.

    In each round every engine has one turn at each case, in a new order. Decisions are drawn once for each case and
    forced, so that all engines do the same work; the gates still run and are counted.

    Args:
        model: a dynamic network; it is not changed. Its weights should not be zero: see `awaken`.
        config: what to time.
        watch: is given the rounds of each batch size and gives them back: for a progress bar.

    Returns:
        For each batch size the rows of the dense networks, then of each engine and keep ratio.

    Raises:
        ValueError: if the model has no gates and no exits, or lacks what is asked for.
        ImportError: if an engine's package is missing.
    """
    config = config or Benchmark()
    _check(model, config)
    size = config.input_size or default_input_size(model)
    model = copy.deepcopy(model).eval().to(config.device, DTYPES[config.dtype])
    set_budget(model)
    before = torch.get_num_threads()
    torch.set_num_threads(config.threads or before)
    rows: list[Row] = []
    try:
        with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
            bench = _Bench(model, config, size, Path(folder))
            for batch in config.batch_sizes:
                rows += bench.race(batch, watch)
    finally:
        torch.set_num_threads(before)
    return rows


def _check(model: Any, config: Benchmark) -> None:
    """Raise for what the model lacks."""
    if not hasattr(model, "dynamic"):
        raise ValueError("a dynamic network is needed; found one without gates and exits")
    if not hasattr(model, "layer_gates") and any(keep != 1 for keep in config.keeps):
        raise ValueError(f"a keep ratio of {min(config.keeps)} needs layer gates; the network has none")
    if not hasattr(model, "channel_gates") and config.channel_keep != 1:
        raise ValueError(f"a channel keep of {config.channel_keep} needs channel gates; the network has none")
    last = len(model.exits) if hasattr(model, "exits") else 0
    if config.exit is not None and not 0 <= config.exit <= last:
        raise ValueError(f"exit must be in 0..{last}; found {config.exit}")


def awaken(model: nn.Module, scale: float = 0.3) -> nn.Module:
    """Give norms whose weights are zero another weight: a fresh block of timm is the identity, skipped or not."""
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, (nn.BatchNorm2d, nn.GroupNorm)) and weight is not None and not bool(weight.any()):
            nn.init.constant_(weight, scale)
    return model


# What is timed -------------------------------------------------------------------------------------------------------


@dataclass
class Contender:
    """An engine in a case: gives logits [B, classes]; `forced` are arguments of `force` while it runs."""

    engine: str
    keep: float | None
    model: Any
    run: Callable[[], Tensor]
    wanted: Tensor
    macs_share: float
    forced: dict[str, Any]
    calls: int = 1  # in each turn
    times: list[tuple[float, float]] = field(default_factory=list)  # wall and device ms of a call

    @contextmanager
    def within(self) -> Iterator[None]:
        """The context to run in."""
        with torch.inference_mode(), force(self.model, **self.forced) if self.forced else nullcontext():
            yield

    def turn(self, clock: Clock) -> tuple[float, float]:
        """Milliseconds of a call: by the wall clock and by the device's."""
        with self.within():
            if self.calls > 1:
                self.run()
            wall, device = clock.time(self.run, self.calls)
        return wall / self.calls, device / self.calls

    def column(self, place: int) -> list[float]:
        return sorted(pair[place] for pair in self.times)


class _Bench:
    """The networks of every engine, made once."""

    def __init__(self, model: Any, config: Benchmark, size: tuple[int, int, int], folder: Path) -> None:
        self.model, self.config, self.size, self.folder = model, config, size, folder
        self.stock = strip(copy.deepcopy(model))
        self.clock = Clock(config.device, config.threads or torch.get_num_threads())
        self.made: dict[str, Any] = {}

    def race(self, batch: int, watch: Watch) -> list[Row]:
        """The rows of one batch size."""
        contenders = self._contenders(batch)
        for one in contenders:
            with one.within():
                one.run()
            one.calls = max(1, math.ceil(TURN_MS / one.turn(self.clock)[0]))
        order = random.Random(0)
        for r in watch(range(-WARM, self.config.rounds)):
            for one in order.sample(contenders, len(contenders)):
                times = one.turn(self.clock)
                if r >= 0:
                    one.times.append(times)
        return self._rows(contenders, batch)

    def _contenders(self, batch: int) -> list[Contender]:
        """Every engine in every case of a batch size, dense networks first."""
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(batch, *self.size, generator=generator).to(self.config.device, DTYPES[self.config.dtype])
        engines = [engine for engine in self.config.engines if engine != "onnx" or batch == 1]
        plain = self.stock(x)
        denses = dict.fromkeys(ENGINES[engine] for engine in engines)
        found = [Contender(name, None, *self._dense(name, x), plain, 1.0, {}) for name in denses]
        dense_macs = table_for(self.model, self.size).dense
        for keep in self.config.keeps:
            forced = drawn(self.model, batch, keep, self.config.channel_keep, self.config.exit, generator)
            with force(self.model, **forced):
                wanted = decide(self.model, x)
            share = wanted.macs.double().mean().item() / dense_macs
            for engine in engines:
                if engine != "dense":
                    model, run = self._dynamic(engine, x, forced)
                    needed = {} if engine == "onnx" else forced
                    found.append(Contender(engine, keep, model, run, wanted.logits, share, needed))
        return found

    def _once(self, name: str, make: Callable[[], Any]) -> Any:
        """A network that is made when it is first needed."""
        if name not in self.made:
            self.made[name] = make()
        return self.made[name]

    def _dense(self, name: str, x: Tensor) -> tuple[Any, Callable[[], Tensor]]:
        """The stock network in an engine's best form, and a call of it."""
        if name == "dense onnx":
            return None, self._onnx(self.stock, x)
        model = self.stock
        if name != "dense":
            model = self._once("dense optimised", lambda: optimize_for_inference(self.stock))
        if name == "dense compile":
            model = self._once(name, lambda: torch.compile(model))
        return model, lambda: model(x)

    def _dynamic(self, engine: str, x: Tensor, forced: dict[str, Any]) -> tuple[Any, Callable[[], Tensor]]:
        """The dynamic network of an engine, and a call of it; to be used within `force`."""
        if engine == "onnx":
            return None, self._onnx(settled(self.model, forced), x)
        model = self._once(engine, lambda: made_for(engine, self.model))
        if engine == "compile":
            fast = self._once("compiled", lambda: torch.compile(model))
            return model, lambda: fast(x)
        return model, lambda: model(x)

    def _onnx(self, model: Any, x: Tensor) -> Callable[[], Tensor]:
        """A call of ONNX Runtime. x: [1, C, H, W]."""
        from .onnx import export_onnx
        from .onnx_session import onnx_runner

        path = self.folder / "model.onnx"
        runner = onnx_runner(export_onnx(model, path, self.size), threads=torch.get_num_threads())
        images = x.cpu().float().numpy()
        return lambda: torch.from_numpy(runner(images)[0])

    def _rows(self, contenders: Sequence[Contender], batch: int) -> list[Row]:
        """Medians and what follows from them."""
        denses = {one.engine: one for one in contenders if one.keep is None}
        fastest = min(statistics.median(one.column(0)) for one in denses.values())
        rows = []
        for one in contenders:
            beside = denses[one.engine if one.keep is None else ENGINES[one.engine]]
            wall, device = (statistics.median(one.column(place)) for place in (0, 1))
            dense_wall, dense_device = (statistics.median(beside.column(place)) for place in (0, 1))
            low, _, high = statistics.quantiles(one.column(0), n=4) if len(one.times) > 1 else (wall,) * 3
            with one.within():
                difference = distance(one.run(), one.wanted)
                peak = peak_bytes(one.model, one.run, self.clock.cuda)
            skipped = one.keep is not None
            rows.append(
                Row(
                    engine=one.engine,
                    batch=batch,
                    keep=one.keep,
                    ms=wall / batch,
                    spread=(high - low) / batch,
                    device_ms=device / batch,
                    macs_share=one.macs_share,
                    realised=realised_ratio(dense_wall, wall, one.macs_share) if skipped else None,
                    realised_device=realised_ratio(dense_device, device, one.macs_share) if skipped else None,
                    speedup=dense_wall / wall,
                    speedup_device=dense_device / device,
                    speedup_fastest=fastest / wall,
                    peak_mb=None if peak is None else peak / 1e6,
                    difference=difference,
                    agrees=difference <= TOLERANCES[self.config.dtype],
                )
            )
        return rows


def made_for(engine: str, model: Any) -> Any:
    """A copy of a dynamic network as an engine runs it."""
    if engine in ("optimised", "compile"):
        fast = optimize_for_inference(model)
        return set_execution(fast, "masked" if engine == "compile" else "skip")
    return set_execution(copy.deepcopy(model), "masked" if engine == "masked" else "skip")


def drawn(
    model: Any, batch: int, keep: float, channel_keep: float, exit: int | None, generator: torch.Generator
) -> dict[str, Any]:
    """Decisions for a batch as arguments of `force`: in each image the same number of units and groups, which differ.

    Args:
        model: a dynamic network.
        batch: number of images.
        keep: share of the layer-gated units.
        channel_keep: share of the groups of each gated hidden width.
        exit: where all images leave; None for the head.
        generator: of the random numbers.
    """

    def draw(columns: int, share: float) -> Tensor:
        place = torch.rand(batch, columns, generator=generator).argsort(1).argsort(1)
        return place < round(share * columns)

    device = next(model.parameters()).device
    forced: dict[str, Any] = {} if exit is None else {"exit": exit}
    if hasattr(model, "layer_gates"):
        forced["layer_keep"] = draw(len(model.layer_gates), keep).to(device)
    if hasattr(model, "channel_gates"):
        groups = [draw(len(sizes), channel_keep) for unit in model.channel_gates.sizes for sizes in unit]
        if model.channel_gates.config.mode == "nested":
            groups = [part.sort(dim=1, descending=True).values for part in groups]
        forced["channel_keep"] = [part.to(device) for part in groups]
    return forced


def settled(model: Any, forced: dict[str, Any]) -> Any:
    """A copy whose own gates and budget decide what is forced for one image."""

    def digits(keep: Tensor) -> str:
        return "".join("01"[int(value)] for value in keep[0])

    fixed = copy.deepcopy(model)
    layers = digits(forced["layer_keep"]) if "layer_keep" in forced else ""
    set_policy(fixed, layers, "".join(map(digits, forced.get("channel_keep", ()))))
    fixed.dynamic.forced = None
    return set_budget(fixed, exit=forced["exit"]) if "exit" in forced else fixed
