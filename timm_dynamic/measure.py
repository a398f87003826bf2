"""Cost tables in any unit: multiply-adds, this machine's milliseconds, millijoules."""

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from . import families
from .configs import EnergyConfig, check_input_size, one_of
from .costs import CostTable, machine_name
from .counting import MacMeter, alone, build_table, count_macs, on_meta
from .modes import modes_kept
from .surgery import force
from .walk import Walk

UNITS = ("macs", "latency_ms", "energy_mj")
ROUNDS = 15  # timed runs of each part
# Timed runs of the whole, and which of them, from the longest on, is taken. In 95 of 100 measurements it is longer than
# the 95th percentile of all runs to come (Wilks, 1941): the 95th percentile of so few runs would be as often too short.
WHOLE_ROUNDS, TAKEN = 93, 2


def cost_table(
    model: nn.Module,
    input_size: tuple[int, int, int] = (3, 224, 224),
    unit: str = "macs",
    *,
    energy: EnergyConfig | dict[str, Any] | None = None,
) -> CostTable:
    """What every part of a model costs for one image.

    Args:
        model: a dynamic model or a stock one; it is not changed.
        input_size: (channels, height, width).
        unit: "macs" (counted), "latency_ms" (measured here and now at batch 1, on the model's device and with torch's
            present number of threads) or "energy_mj" (from MACs and bytes moved).
        energy: what energy is computed from, or every part's own; for "energy_mj" only.

    Returns:
        The table; `.dense`, `.units` and `.exits` are what one needs most. In milliseconds a unit that runs is paid
        in full, whatever its channel gate drops, and the parts are scaled so that they add up to what the whole
        model with all gates open takes in 95 of 100 runs at most, with a margin for how few runs tell that.

    Raises:
        ValueError: if the model has no units, an argument is wrong, or energies of parts are missing.
    """
    one_of("unit", unit, UNITS)
    size = check_input_size(input_size)
    if energy is not None and unit != "energy_mj":
        raise ValueError(f"energy= goes with unit='energy_mj'; found unit={unit!r}")
    counted = getattr(getattr(model, "dynamic", None), "origin", None) or model  # of an optimised copy
    if unit == "macs":
        return count_macs(counted, size)
    if unit == "energy_mj":
        config = EnergyConfig.make(energy)
        table = alone(lambda: build_table(on_meta(counted), size, EnergyMeter(config)), model, size)
        return table if config.parts is None else table.with_parts(config.parts)
    families.units(model)
    with modes_kept(model), torch.cuda.device_of(next(model.parameters())):
        return _measure_latency(model.eval(), size)


class EnergyMeter(MacMeter):
    """Millijoules of parts that are run on the meta device: their MACs and the bytes that they move."""

    unit = "energy_mj"

    def __init__(self, config: EnergyConfig) -> None:
        super().__init__()
        self.config, self.traffic = config, _Traffic()

    def run(self, part: Callable[..., Any], *args: Any) -> tuple[Any, float]:  # type: ignore[override]
        """What the part gives, and its millijoules."""
        self.traffic.bytes = 0
        with self.traffic:
            out, macs = super().run(part, *args)
        return out, (macs * self.config.pj_per_mac + self.traffic.bytes * self.config.pj_per_byte) * 1e-9


class _Traffic(TorchDispatchMode):
    """Bytes that convolutions and matrix products read and write."""

    COUNTED = ("convolution", "addmm", "mm", "bmm", "baddbmm")

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in self.COUNTED:
            tensors = [t for t in (*args, out) if isinstance(t, Tensor)]
            self.bytes += sum(t.numel() * t.element_size() for t in tensors)
        return out


class LatencyMeter:
    """Milliseconds of parts that are run for real: medians of repeated runs."""

    unit = "latency_ms"
    divisible = False

    def __enter__(self) -> None:
        return None

    def __exit__(self, *args: Any) -> None:
        return None

    def input(self, model: nn.Module, size: tuple[int, int, int]) -> Tensor:
        """A random image, where the model is: [1, C, H, W]."""
        like = next(model.parameters())
        return torch.randn(1, *size, dtype=like.dtype, device=like.device)

    def run(self, part: Callable[..., Any], *args: Any) -> tuple[Any, float]:
        """What the part gives, and its milliseconds."""
        out = part(*args)
        return out, statistics.median(timings(lambda: part(*args), ROUNDS))


def timings(work: Callable[[], Any], rounds: int) -> list[float]:
    """Milliseconds of each of some runs, on a CPU or on the current GPU."""
    found = []
    for _ in range(rounds):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        found.append((time.perf_counter() - start) * 1e3)
    return found


@torch.inference_mode()
def _measure_latency(model: nn.Module, size: tuple[int, int, int]) -> CostTable:
    """Medians of every part, scaled to an upper bound of the 95th percentile of the whole.

    The whole is the dearer of all channels and half of them: slicing can cost more than it saves.
    """
    meter = LatencyMeter()
    parts = build_table(model, size, meter)
    x = meter.input(model, size)
    timings(lambda: _whole(model, x, 1.0), 3)
    dearest = 1.0
    if hasattr(model, "channel_gates"):
        typical = {keep: statistics.median(timings(partial(_whole, model, x, keep), ROUNDS)) for keep in (1.0, 0.5)}
        dearest = max(typical, key=typical.__getitem__)
    slow = sorted(timings(lambda: _whole(model, x, dearest), WHOLE_ROUNDS))[-TAKEN]
    return parts.scaled(max(1.0, slow / parts.exits[-1].dearest), machine_name(model))


def _whole(model: Any, x: Tensor, channel_keep: float) -> Tensor:
    """The whole way to the head with every unit run and a share of the channels kept."""
    if not hasattr(model, "dynamic"):
        return model(x)
    options: dict[str, Any] = {"layer_keep": 1.0} if hasattr(model, "layer_gates") else {}
    if hasattr(model, "channel_gates"):
        options["channel_keep"] = channel_keep
    with force(model, **options):
        walk = Walk(model, x, budgeted=False)
    walk.to_exit(len(walk.stops) - 1)
    return walk.classify(len(walk.stops) - 1, walk.x)
