"""The command `benchmark`: tables and a figure."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from torch import nn

from ..benchmark import Benchmark, Row, Watch, awaken, benchmark
from ..benchmark_budget import BudgetRow, benchmark_budgets
from ..benchmark_train import TrainRow, benchmark_training
from ..report import BLUE, GREEN, GREY, INK, ORANGE, drawn, figure_and_axes
from .errors import Failed, bad_input, one_line
from .models import load, pick_device
from .tables import console

COLOURS = {"masked": GREY, "skipping": BLUE, "optimised": ORANGE, "compile": INK, "onnx": GREEN}
MARKS = "osD^vP*X"
Results = dict[str, list[Any]]


def settings(**given: Any) -> Benchmark:
    """Options as a `Benchmark`; those that are None or empty keep their defaults.

    Raises:
        BadInput: for a wrong value.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # torch's profiler measures memory, and has notes of its own
    given["device"] = pick_device(given["device"])
    kept = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items() if v is not None and v != []}
    with bad_input():
        return Benchmark(**kept)  # type: ignore[arg-type]


def network(name: str, layer_gates: str | None, channel_mode: str | None) -> nn.Module:
    """A network to time; its weights are random."""
    channels = None if channel_mode is None else {"mode": channel_mode}
    return awaken(load(name, pretrained=False, layer_gates=layer_gates, channel_gates=channels))


def run(models: dict[str, nn.Module], config: Benchmark, watch: Watch) -> Results:
    """Rows of inference by the networks' names.

    Raises:
        BadInput: if a network cannot do what is asked for.
        Failed: if a package is missing.
    """
    found: Results = {}
    for name, model in models.items():
        try:
            with bad_input(about=name):
                found[name] = list(benchmark(model, config, watch))
        except ImportError as error:
            raise Failed(f"{one_line(error)}: pip install 'timm-dynamic[onnx]'") from error
    return found


def run_training(
    models: dict[str, nn.Module], config: Benchmark, keeps: Sequence[float], dtype: str | None, watch: Watch
) -> Results:
    """Rows of training by the networks' names; without keep ratios the gates decide.

    Raises:
        BadInput: if a network cannot do what is asked for.
    """
    found: Results = {}
    for name, model in models.items():
        with bad_input(about=name):
            found[name] = list(benchmark_training(model, config, keeps or (None,), dtype, watch))
    return found


def run_budgets(models: dict[str, nn.Module], config: Benchmark, watch: Watch) -> Results:
    """Rows of budgets of milliseconds by the networks' names.

    Raises:
        BadInput: if a network has no exits.
    """
    found: Results = {}
    for name, model in models.items():
        with bad_input(about=name):
            found[name] = list(benchmark_budgets(model, config, watch=watch))
    return found


def check(found: Results) -> None:
    """Raise `Failed` if an engine gave something else than the plain network."""
    rows = [(name, row) for name, rows in found.items() for row in rows]
    wrong = sorted({f"{row.engine} ({name})" for name, row in rows if isinstance(row, Row) and not row.agrees})
    if wrong:
        raise Failed(f"not what the plain network gives: {', '.join(wrong)}")


# Showing -------------------------------------------------------------------------------------------------------------


def show(found: Results, config: Benchmark) -> None:
    """Print a table for each network."""
    own = "GPU" if config.device.startswith("cuda") else "CPU"
    for name, rows in found.items():
        kinds: dict[type, Any] = {TrainRow: _train_table, BudgetRow: _budget_table, Row: _table}
        console().print(kinds[type(rows[0])](name, rows, own))


def _columns(title: str, *names: str) -> Table:
    table = Table(title=title, title_justify="left")
    for i, name in enumerate(names):
        table.add_column(name, justify="left" if i == 0 else "right", no_wrap=i == 0)
    return table


def _table(name: str, rows: Sequence[Row], own: str) -> Table:
    table = _columns(
        f"{name}: ms for an image, medians; realised ratio and times faster by wall clock ({own} time)",
        *("engine", "batch", "keep", "ms", "spread", f"{own} ms", "MACs", "realised", "faster than its dense"),
        *("than the fastest dense", "peak MB", "agrees"),
    )
    for row in rows:
        table.add_row(
            row.engine,
            str(row.batch),
            "" if row.keep is None else f"{row.keep:g}",
            _ms(row.ms),
            _ms(row.spread),
            _ms(row.device_ms),
            f"{100 * row.macs_share:.1f} %",
            "" if row.realised is None else f"{row.realised:.2f} ({row.realised_device:.2f})",
            f"{row.speedup:.2f} ({row.speedup_device:.2f})",
            f"{row.speedup_fastest:.2f}",
            "" if row.peak_mb is None else f"{row.peak_mb:.1f}",
            "yes" if row.agrees else f"NO: {row.difference:.1e}",
        )
    return table


def _train_table(name: str, rows: Sequence[TrainRow], own: str) -> Table:
    table = _columns(
        f"{name}: a training step, ms for an image, medians",
        *("task", "batch", "keep", "dtype", "ms", "spread", f"{own} ms", "of the base", f"by {own} time", "peak MB"),
    )
    for row in rows:
        cells = (_ms(row.ms), _ms(row.spread), _ms(row.device_ms), f"{row.ratio:.2f}", f"{row.ratio_device:.2f}")
        keep = "" if row.keep is None else f"{row.keep:g}"
        table.add_row(row.task, str(row.batch), keep, row.dtype, *cells, f"{row.peak_mb:.1f}")
    return table


def _budget_table(name: str, rows: Sequence[BudgetRow], own: str) -> Table:
    table = _columns(
        f"{name}: {rows[0].images} images one at a time under budgets of milliseconds",
        *("engine", "budget", "median", "95 %", f"95 %, {own}", "over", "left at exits", "holds"),
    )
    for row in rows:
        times = map(_ms, (row.budget_ms, row.median_ms, row.p95_ms, row.p95_device_ms))
        exits = " ".join(f"{100 * share:.0f} %" for share in row.exits)
        table.add_row(row.engine, *times, f"{100 * row.over:.0f} %", exits, "yes" if row.holds else "NO")
    return table


def _ms(value: float) -> str:
    return f"{value:.{3 if value < 1 else 2 if value < 10 else 1}f}"


def draw(found: Results, path: Path) -> None:
    """Write the figure: time over MACs, both as shares of the dense network's.

    Raises:
        BadInput: if the file cannot be written.
        Failed: if matplotlib is not installed.
    """
    try:
        figure, axes = figure_and_axes()
    except ImportError as error:
        raise Failed(f"{one_line(error)}: pip install 'timm-dynamic[recipes]'") from error
    rows = [(name, row) for name, rows in found.items() for row in rows]
    training = any(isinstance(row, TrainRow) for _, row in rows)
    (_draw_training if training else _draw_times)(axes, rows)
    with bad_input(OSError):
        path.write_text(drawn(figure, "benchmark"), encoding="utf-8")


def _draw_times(axes: Any, rows: Sequence[tuple[str, Row]]) -> None:
    cases = list(dict.fromkeys((name, row.batch) for name, row in rows))
    for place, (name, batch) in enumerate(cases):
        for engine in dict.fromkeys(row.engine for _, row in rows if row.keep is not None):
            points = sorted(
                (100 * row.macs_share, 100 / row.speedup)
                for of, row in rows
                if (of, row.batch, row.engine) == (name, batch, engine)
            )
            mark = MARKS[place % len(MARKS)] + "-"
            label = f"{engine}, {name}, batch {batch}"
            axes.plot(*zip(*points, strict=True), mark, color=COLOURS[engine], ms=5, lw=1, label=label)
    top = max([100.0, *(100 * row.macs_share for _, row in rows)])
    axes.plot([0, top], [0, top], "--", color=GREY, lw=0.8, label="ideal")
    axes.set(xlabel="MACs, gates included (% of dense)", ylabel="time (% of the same engine's dense network)")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=7)


def _draw_training(axes: Any, rows: Sequence[tuple[str, TrainRow]]) -> None:
    places = range(len(rows))
    axes.bar(places, [row.ratio for _, row in rows], color=[INK if row.task == "base" else BLUE for _, row in rows])
    axes.set_xticks(places, [f"{row.task}\n{name}\nbatch {row.batch}" for name, row in rows], fontsize=8)
    axes.set(ylabel="time of a training step (share of the base's)")
