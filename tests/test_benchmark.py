"""The benchmark: its columns, its checks, its command."""

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from nets import SIZE, dynamic, stock
from torch import nn
from typer.testing import CliRunner

import timm_dynamic as td
from timm_dynamic import benchmark as bench
from timm_dynamic import benchmark_budget, measure
from timm_dynamic.benchmark import Benchmark, Row, drawn, realised_ratio
from timm_dynamic.benchmark_budget import BudgetRow, benchmark_budgets
from timm_dynamic.benchmark_train import benchmark_training
from timm_dynamic.cli import app
from timm_dynamic.timing import Clock, distance, peak_bytes

QUICK: dict[str, Any] = {"input_size": (3, SIZE, SIZE), "rounds": 2, "threads": 1}
OPTIONS = ["--rounds", "2", "--threads", "1", "--input-size", "3", "32", "32"]


def invoke(*args: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the command."""
    result = CliRunner().invoke(app, ["benchmark", *map(str, args)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    """Everything of a small network at two batch sizes."""
    config = Benchmark(batch_sizes=(1, 3), keeps=(1.0, 0.5), channel_keep=0.5, **QUICK)
    return bench.benchmark(dynamic("bottleneck"), config)


def test_a_row_for_every_case(rows: list[Row]) -> None:
    wanted = [
        (engine, batch, keep)
        for batch in (1, 3)
        for engine, keep in [
            *[(dense, None) for dense in ("dense", "dense optimised")],
            *[(engine, keep) for keep in (1.0, 0.5) for engine in ("masked", "skipping", "optimised")],
        ]
    ]
    assert [(row.engine, row.batch, row.keep) for row in rows] == wanted
    assert all(row.ms > 0 and row.device_ms > 0 and row.spread >= 0 and row.peak_mb > 0 for row in rows)
    assert all(row.agrees and row.difference < 1e-4 for row in rows)


def test_ratios_follow_from_the_times(rows: list[Row]) -> None:
    for row in rows:
        own = "dense optimised" if row.engine.endswith("optimised") else "dense"
        denses = {r.engine: r for r in rows if r.batch == row.batch and r.keep is None}
        dense = denses[own]
        assert row.speedup == pytest.approx(dense.ms / row.ms)
        assert row.speedup_device == pytest.approx(dense.device_ms / row.device_ms)
        assert row.speedup_fastest == pytest.approx(min(r.ms for r in denses.values()) / row.ms)
        if row.keep is None:
            assert row.macs_share == 1
            assert row.realised is None
        else:
            assert row.realised == pytest.approx((dense.ms - row.ms) / (dense.ms * (1 - row.macs_share)))


def test_realised_ratio() -> None:
    assert realised_ratio(10.0, 5.0, 0.5) == 1.0
    assert realised_ratio(10.0, 8.0, 0.5) == pytest.approx(0.4)
    assert realised_ratio(10.0, 11.0, 0.75) == pytest.approx(-0.4)
    assert realised_ratio(10.0, 11.0, 1.01) is None


def test_the_share_of_macs_is_that_of_what_is_forced() -> None:
    model = dynamic("basic")
    config = Benchmark(batch_sizes=(3,), keeps=(0.5,), channel_keep=0.5, engines=("skipping", "masked"), **QUICK)
    found = bench.benchmark(model, config)
    generator = torch.Generator().manual_seed(0)
    torch.randn(3, 3, SIZE, SIZE, generator=generator)  # the images
    forced = drawn(model, 3, 0.5, 0.5, None, generator)
    with torch.no_grad(), td.force(model, **forced):
        macs = td.decide(model, torch.randn(3, 3, SIZE, SIZE)).macs
    share = macs.double().mean().item() / td.cost_table(model, (3, SIZE, SIZE)).dense
    assert 0.2 < share < 0.8
    assert [row.macs_share for row in found[1:]] == pytest.approx([share, share])


def test_every_image_keeps_as_much() -> None:
    model = dynamic("basic", channel=td.ChannelGateConfig(mode="nested"))
    forced = drawn(model, 6, 0.4, 0.5, 1, torch.Generator().manual_seed(0))
    count = len(model.layer_gates)
    assert forced["exit"] == 1
    assert forced["layer_keep"].sum(1).tolist() == [round(0.4 * count)] * 6
    assert len(forced["layer_keep"].unique(dim=0)) > 1
    for keep in forced["channel_keep"]:
        assert keep.sum(1).tolist() == [round(0.5 * keep.shape[1])] * 6
        assert torch.equal(keep, keep.cummin(1).values)  # nested: the first ones


def test_an_exit_makes_it_cheaper() -> None:
    config = Benchmark(batch_sizes=(2,), keeps=(1.0,), exit=0, engines=("skipping", "optimised"), **QUICK)
    found = [row for row in bench.benchmark(dynamic("bottleneck", ("exits",)), config) if row.keep is not None]
    assert all(row.agrees and row.macs_share < 1 for row in found)


def test_a_wrong_engine_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    made_for = bench.made_for

    def wrong(engine: str, model: Any) -> Any:
        made = made_for(engine, model)
        if engine == "optimised":
            made.get_classifier().bias.data += 1
        return made

    monkeypatch.setattr(bench, "made_for", wrong)
    code, out, err = invoke("skipnet_resnet20_cifar", *OPTIONS, "--batch-size", 1, "--keep", 0.5)
    assert code == 1
    assert "optimised (skipnet_resnet20_cifar)" in err
    assert "skipping" not in err
    assert "NO" in out


def test_decisions_that_are_not_forced_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks are awake: what is skipped shows in the logits."""
    monkeypatch.setattr(bench.Contender, "within", lambda self: torch.inference_mode())
    code, _, err = invoke("skipnet_resnet20_cifar", *OPTIONS, "--batch-size", 2, "--keep", 0.5, "--engine", "skipping")
    assert code == 1
    assert "skipping (skipnet_resnet20_cifar)" in err


def test_onnx_is_timed_one_image_at_a_time() -> None:
    pytest.importorskip("onnxruntime")
    config = Benchmark(batch_sizes=(1, 2), keeps=(0.5,), channel_keep=0.5, engines=("onnx", "skipping"), **QUICK)
    found = bench.benchmark(dynamic("basic", channel=td.ChannelGateConfig(mode="nested")), config)
    assert [(r.engine, r.batch) for r in found] == [
        *[("dense onnx", 1), ("dense", 1), ("onnx", 1), ("skipping", 1), ("dense", 2), ("skipping", 2)]
    ]
    assert all(row.agrees for row in found)
    assert {row.peak_mb is None for row in found if "onnx" in row.engine} == {True}


def test_the_model_is_left_alone() -> None:
    model = dynamic("basic", ("layer",)).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    threads = torch.get_num_threads()
    bench.benchmark(model, Benchmark(batch_sizes=(1,), keeps=(0.5,), engines=("optimised",), **QUICK))
    benchmark_training(model, Benchmark(batch_sizes=(2,), **QUICK), (0.5,), "float32")
    assert model.training
    assert model.dynamic.forced is None
    assert torch.get_num_threads() == threads
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_training_rows() -> None:
    config = Benchmark(batch_sizes=(4,), **QUICK)
    found = benchmark_training(dynamic("basic", ("layer",)), config, (None, 0.5), "bfloat16")
    assert [(r.task, r.keep) for r in found] == [
        *[("base", None), ("SP", None), ("HRL", None), ("SP", 0.5), ("HRL", 0.5)]
    ]
    for row in found:
        assert row.dtype == "bfloat16"
        assert row.ratio == pytest.approx(row.ms / found[0].ms)
        assert row.ratio_device == pytest.approx(row.device_ms / found[0].device_ms)


@pytest.mark.parametrize(
    ("model", "config", "message"),
    [
        (stock("basic"), {}, "a dynamic network is needed"),
        (dynamic("basic", ("channel",)), {"keeps": (0.5,)}, "keep ratio of 0.5 needs layer gates"),
        (dynamic("basic", ("layer",)), {"channel_keep": 0.5}, "needs channel gates"),
        (dynamic("basic", ("layer",)), {"engines": ("onnx",), "batch_sizes": (2,)}, "batch size 1 is needed"),
        (dynamic("basic", ("layer",)), {"exit": 1}, r"exit must be in 0\.\.0; found 1"),
    ],
)
def test_what_a_network_lacks(model: nn.Module, config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bench.benchmark(model, Benchmark(**config))


def test_training_needs_layer_gates() -> None:
    with pytest.raises(ValueError, match="need layer gates"):
        benchmark_training(dynamic("basic", ("channel",)))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--engine", "steam"], "engine must be one of 'dense', 'masked'"),
        (["--keep", "1.5"], r"keep must be a number in 0..1; found 1.5"),
        (["--channel-keep", "-1"], "channel_keep must be a number in 0..1"),
        (["--dtype", "int8"], "dtype must be one of"),
        (["--batch-size", "0"], "batch_sizes must be at least 1; found 0"),
        (["--rounds", "0"], "rounds must be at least 1"),
        (["--exit", "3"], "skipnet_resnet20_cifar: exit must be in 0..0; found 3"),
    ],
)
def test_wrong_options(args: list[str], message: str) -> None:
    code, out, err = invoke("skipnet_resnet20_cifar", *args)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1


def test_a_network_without_gates() -> None:
    code, _, err = invoke("resnet20_cifar")
    assert code == 2
    assert "resnet20_cifar: a dynamic network is needed" in err


def test_a_budget_of_milliseconds_is_kept_by_leaving_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a table made by hand and a clock that always says the same."""
    model = dynamic("basic")
    counted = td.cost_table(model, (3, SIZE, SIZE))
    table = dataclasses.replace(counted, unit="latency_ms")

    def measured(model: nn.Module, *args: Any) -> Any:
        return dataclasses.replace(table, machine=measure.machine_name(model))

    monkeypatch.setattr(benchmark_budget, "cost_table", measured)
    low, high = table.exits[0].dearest, table.exits[-1].dearest
    monkeypatch.setattr(Clock, "time", lambda self, work, calls=1: (high + 0.5, work().sum().item()))
    rows = benchmark_budgets(model, Benchmark(engines=("skipping",), **{**QUICK, "rounds": 8}), (low, high + 1))
    assert [row.budget_ms for row in rows] == [low, high + 1]
    assert rows[0].exits == (1.0, 0.0, 0.0, 0.0)
    assert rows[1].exits == (0.0, 0.0, 0.0, 1.0), "nobody leaves early"
    assert [row.images for row in rows] == [8, 8]
    assert rows[0].over == 1.0
    assert not rows[0].holds
    assert (rows[1].p95_ms, rows[1].over, rows[1].holds) == (high + 0.5, 0.0, True)
    odd = [dataclasses.replace(stop, dearest=2 * high) if k == 0 else stop for k, stop in enumerate(counted.exits)]
    table = dataclasses.replace(table, exits=tuple(odd))
    rows = benchmark_budgets(model, Benchmark(engines=("skipping",), **{**QUICK, "rounds": 2}))
    assert min(row.budget_ms for row in rows) >= 2 * high, "an exit that seems dearer than the head: a noisy machine"
    with pytest.raises(ValueError, match="a network with exits is needed"):
        benchmark_budgets(dynamic("basic", ("layer",)), Benchmark(**QUICK))


def test_budgets_by_command() -> None:
    code, out, _ = invoke("ddi_resnet20_cifar", *OPTIONS, "--budgets", "--engine", "skipping", "--json")
    assert code == 0
    found = json.loads(out)
    assert set(found[0]) == {"name", *BudgetRow.__dataclass_fields__}
    assert len(found) == 4
    assert found[0]["budget_ms"] < found[3]["budget_ms"]
    assert all(sum(row["exits"]) == pytest.approx(1) and row["images"] == 2 for row in found)
    assert found[3]["exits"] == [0, 0, 1]
    code, out, err = invoke("ddi_resnet20_cifar", *OPTIONS, "--budgets", "--engine", "skipping")
    assert code == 0, err
    assert all(word in out for word in ("budget", "95 %", "left at exits"))
    assert invoke("ddi_resnet20_cifar", "--budgets", "--train")[0] == 2
    assert invoke("skipnet_resnet20_cifar", *OPTIONS, "--budgets")[0] == 2
    code, _, err = invoke("ddi_resnet20_cifar", *OPTIONS, "--budgets", "--engine", "onnx")
    assert code == 2
    assert "timed for skipping and optimised; found ('onnx',)" in err


def test_json_and_figure(tmp_path: Path) -> None:
    figure = tmp_path / "times.svg"
    code, out, _ = invoke(
        *["skipnet_resnet20_cifar", *OPTIONS, "--batch-size", 1, "--keep", 1, "--keep", 0.5, "--engine", "skipping"],
        *["--json", "--figure", figure],
    )
    assert code == 0
    found = json.loads(out)
    assert [(row["engine"], row["keep"]) for row in found] == [("dense", None), ("skipping", 1.0), ("skipping", 0.5)]
    assert {row["name"] for row in found} == {"skipnet_resnet20_cifar"}
    assert set(found[0]) == {"name", *Row.__dataclass_fields__}
    text = figure.read_text()
    assert text.startswith("<?xml")
    assert "skipping, skipnet_resnet20_cifar, batch 1" in text


def test_tables(tmp_path: Path) -> None:
    name = "iadi_resnet20_cifar"
    code, out, _ = invoke(name, *OPTIONS, "--batch-size", 1, "--keep", 0.5, "--channel-mode", "nested")
    assert code == 0
    assert all(word in out for word in ("realised", "dense optimised", "masked", "peak MB", "yes"))
    figure = tmp_path / "training.svg"
    code, out, _ = invoke(name, *OPTIONS, "--train", "--batch-size", 2, "--dtype", "float32", "--figure", figure)
    assert code == 0
    assert all(word in out for word in ("base", "SP", "HRL", "of the base"))
    assert "HRL" in figure.read_text()


def test_fresh_blocks_are_awakened() -> None:
    model = bench.awaken(timm.create_model("resnet18"))
    weights = [m.weight for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(bool((weight != 0).all()) for weight in weights)
    assert {0.3, 1.0} == {round(weight[0].item(), 3) for weight in weights}


def test_the_clock_and_the_memory() -> None:
    wall, own = Clock("cpu", 1).time(lambda: time.sleep(0.05))
    assert wall >= 50
    assert own < 25
    layer, x = nn.Linear(1000, 1000), torch.zeros(1000, 1000)
    weights = 4 * (1000 * 1000 + 1000)
    with torch.inference_mode():
        peak = peak_bytes(layer, lambda: layer(layer(x)), False)
    assert peak == pytest.approx(weights + 2 * 4 * 1000 * 1000, rel=0.05)
    assert peak_bytes(None, lambda: None, False) is None
    assert distance(torch.tensor([1.0, 4.5]), torch.tensor([1.0, 4.0])) == 0.125
