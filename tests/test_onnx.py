"""Exported networks give what PyTorch gives, and leave out what is skipped."""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from nets import ALL, FEW, LAYER_KINDS, MODES, decide, dynamic, images, randomise, stock, undecided
from torch import nn

import timm_dynamic as td
import timm_dynamic.onnx_session as onnx_session
from timm_dynamic.onnx_blocked import NotBlocked
from timm_dynamic.onnx_graph import OPSET

SIZE = 32
INPUT = (3, SIZE, SIZE)
NAMES = ["logits", "exit_index", "macs"]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "model.onnx"


def run_file(path: Path, x: np.ndarray, batch: bool = False) -> list[np.ndarray]:
    """Logits, exit index and MACs by a plain session."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    parts = [x] if batch else [x[i : i + 1] for i in range(len(x))]
    rows = [session.run(NAMES, {"images": part}) for part in parts]
    return [np.concatenate(columns) for columns in zip(*rows, strict=True)]


def assert_parity(model: nn.Module, path: Path, count: int = 8, batch: bool = False) -> td.Decisions:
    """File and runner give PyTorch's logits to 1e-4, and exactly its exits and MACs."""
    x = images(count, SIZE)
    wanted = decide(model, x)
    td.export_onnx(model, path, INPUT, dynamic_batch=batch)
    scale = max(1.0, wanted.logits.abs().max().item())
    run = td.onnx_runner(path, threads=1)
    for logits, exits, macs in (run_file(path, x.numpy(), batch), run(x.numpy())):
        np.testing.assert_allclose(logits, wanted.logits.detach().numpy(), rtol=0, atol=1e-4 * scale)
        np.testing.assert_array_equal(exits, wanted.exit_index.numpy())
        np.testing.assert_array_equal(macs, wanted.macs.numpy())
        assert (logits.dtype, exits.dtype, macs.dtype) == (np.float32, np.int64, np.int64)
    return wanted


def levels(model: nn.Module, share: float) -> list[float]:
    """How sure the surest `share` of images is at each exit."""
    with torch.no_grad():
        found = [logits.softmax(-1).amax(-1) for logits in td.anytime(model, images(8, SIZE))]
    return [sure.quantile(1 - share).item() for sure in found[:-1]]


def nodes_of(graph: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every node, with the branches that it is in."""
    for node in graph.node:
        yield path, node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from nodes_of(attribute.g, (*path, attribute.name))


# The same as PyTorch -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "gate"),
    [
        *(("basic", gate) for gate in LAYER_KINDS),
        *(("bottleneck", gate) for gate in ("rnn", "ff1")),
        *(("dense", gate) for gate in ("rnn", "linear")),
        ("cifar", "rnn"),
        ("cifar_dense", "ff2"),
    ],
)
def test_layer_gates(kind: str, gate: str, file: Path) -> None:
    found = assert_parity(undecided(kind, ("layer",), layer=gate), file)
    assert 0 < found.layer_keep.float().mean() < 1


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        *((kind, mode) for kind in FEW for mode in MODES),
        ("grouped", "independent"),
        ("blur_se", "nested"),
        ("groupnorm", "independent"),
        ("tv_dense", "nested"),
    ],
)
def test_channel_gates(kind: str, mode: str, file: Path) -> None:
    config = td.ChannelGateConfig(mode=mode, group_size=8)
    found = assert_parity(undecided(kind, ("layer", "channel"), channel=config), file)
    assert len(found.macs.unique()) > 2


def test_channel_gates_alone(file: Path) -> None:
    assert_parity(undecided("basic", ("channel",), channel="nested"), file)


@pytest.mark.parametrize("mode", MODES)
def test_no_channels_and_all_channels(mode: str, file: Path) -> None:
    """The ends of the range: thresholds that nothing and everything reaches."""
    model = undecided("bottleneck", ("layer", "channel"), channel=td.ChannelGateConfig(mode=mode))
    model.layer_gates.threshold.fill_(0.0)
    model.channel_gates.threshold[::2], model.channel_gates.threshold[1::2] = 0.0, 2.0
    found = assert_parity(model, file, count=2)
    for unit in range(len(model.channel_gates)):
        keeps = found.channel_keep[2 * unit : 2 * unit + 2]
        assert all(keep.all() if unit % 2 == 0 else not keep.any() for keep in keeps)


@pytest.mark.parametrize(
    ("way", "batch"),
    [
        ("calibrated", False),
        ("calibrated", True),
        ("confidence", False),
        ("exit", False),
        ("exit", True),
        ("macs", False),
        ("macs", True),
    ],
)
def test_exits(way: str, batch: bool, file: Path) -> None:
    model = undecided("basic", ALL if way == "macs" else ("layer", "exits"))
    some = levels(model, 0.5)
    if way == "calibrated":
        model.exits.set_confidence([2.0, *some[1:]])  # nobody leaves at the first exit
    elif way == "confidence":
        td.set_budget(model, confidence=some[1])
    elif way == "exit":
        td.set_budget(model, exit=1)
    else:
        stops = td.cost_table(model, INPUT).exits
        td.set_budget(model, macs=(stops[0].dearest + stops[1].dearest) // 2, input_size=INPUT)
    found = assert_parity(model, file, batch=batch)
    assert found.exit_index.unique().tolist() == [1] if way == "exit" else len(found.exit_index.unique()) > 1


def test_a_fraction_is_of_the_dense_macs_at_the_file_s_size(file: Path) -> None:
    model = undecided("cifar")
    td.set_budget(model, fraction=0.9, input_size=INPUT)
    found = assert_parity(model, file)
    assert (found.macs <= int(0.9 * td.cost_table(model, INPUT).dense)).all()


@pytest.mark.parametrize("kind", ["bottleneck", "dense"])
def test_dynamic_batch(kind: str, file: Path) -> None:
    model = undecided(kind)
    wanted = assert_parity(model, file, batch=True)
    assert "If" not in {node.op_type for _, node in nodes_of(onnx.load(file).graph)}
    one = td.onnx_runner(file)(images(8, SIZE)[:1].numpy())
    np.testing.assert_array_equal(one[2], wanted.macs[:1].numpy())


@pytest.mark.parametrize("name", ["res2net50_26w_4s", "skresnet18", "resnest14d", "ecaresnet26t"])
def test_other_blocks(name: str, file: Path) -> None:
    model = randomise(timm.create_model(name, num_classes=10, layers=(1, 1, 1, 1))).eval()
    assert_parity(td.add_layer_gates(model, td.LayerGateConfig("linear", init="random")), file, count=4)


def test_stock_network(file: Path) -> None:
    model, x = stock("basic"), images(3, SIZE)
    td.export_onnx(model, file, INPUT)
    logits, exits, macs = td.onnx_runner(file)(x.numpy())
    with torch.no_grad():
        np.testing.assert_allclose(logits, model(x).numpy(), rtol=0, atol=1e-4)
    assert exits.tolist() == [0, 0, 0]
    assert set(macs.tolist()) == {td.cost_table(model, INPUT).dense}


def test_extreme_thresholds(file: Path) -> None:
    """Below 0 everything is kept, above 1 nothing."""
    model = undecided("cifar", ("layer",))
    model.layer_gates.threshold[::2], model.layer_gates.threshold[1::2] = 0.0, 2.0
    found = assert_parity(model, file, count=3)
    assert found.layer_keep[:, ::2].all()
    assert not found.layer_keep[:, 1::2].any()


def test_the_model_is_not_changed(file: Path) -> None:
    model = undecided("basic")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    td.export_onnx(model, file, INPUT)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


# Skipped work is left out --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gate", LAYER_KINDS)
def test_convolutions_of_gated_units_are_in_branches(gate: str, file: Path) -> None:
    model = dynamic("bottleneck", ("layer",), layer=gate)
    td.export_onnx(model, file, INPUT)
    graph = onnx.load(file).graph
    places = [path for path, node in nodes_of(graph) if node.op_type == "Conv"]
    gates = sum(isinstance(module, nn.Conv2d) for module in model.layer_gates.modules())
    first = [m for name in ("conv1", "layer1.0") for m in model.get_submodule(name).modules()]
    outside = sum(isinstance(m, nn.Conv2d) for m in first) + gates
    assert places.count(()) == outside
    units = len(model.layer_gates)
    assert sum(node.op_type == "If" for path, node in nodes_of(graph) if not path) == units
    stages = (model.layer2, model.layer3, model.layer4)
    downsamples = sum(block.downsample is not None for stage in stages for block in stage)
    assert places.count(("then_branch",)) == 3 * units + downsamples
    assert places.count(("else_branch",)) == downsamples


def test_weights_are_in_the_branches_that_use_them(file: Path) -> None:
    td.export_onnx(dynamic("basic"), file, INPUT)
    graph = onnx.load(file).graph
    owned = {weight.name for weight in graph.initializer}
    convs = [node for path, node in nodes_of(graph) if path and node.op_type == "Conv"]
    assert convs
    assert not any(node.input[1] in owned for node in convs)


def test_what_follows_an_exit_is_in_its_branch(file: Path) -> None:
    model = undecided("basic", ("exits",))
    model.exits.set_confidence(levels(model, 0.5))
    td.export_onnx(model, file, INPUT)
    depths = [len(path) for path, node in nodes_of(onnx.load(file).graph) if node.op_type == "If"]
    assert depths == [0, 1, 2]


def test_nested_gates_have_a_branch_for_each_width(file: Path) -> None:
    td.export_onnx(dynamic("basic", ("layer", "channel"), channel="nested"), file, INPUT)
    graph = onnx.load(file).graph
    outer = next(node for path, node in nodes_of(graph) if node.op_type == "If")
    then = next(a.g for a in outer.attribute if a.name == "then_branch")
    assert sum(node.op_type == "If" for _, node in nodes_of(then)) == td.ChannelGateConfig().levels


def test_the_checker_finds_nothing(file: Path) -> None:
    td.export_onnx(undecided("dense"), file, INPUT)
    model = onnx.load(file)
    onnx.checker.check_model(model, full_check=True)
    assert model.opset_import[0].version == OPSET
    assert [value.name for value in model.graph.output] == NAMES


# The runner ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["skipnet_resnet20_cifar", "iadi_resnetrs50"])
def test_the_runner_uses_the_machine_s_layout(name: str, file: Path) -> None:
    """On machines whose ONNX Runtime has one: there it fits these networks."""
    small = {"layers": (1, 1, 1, 1)} if "rs50" in name else {}
    model = randomise(timm.create_model(name, num_classes=10, layer_gates={"init": "random"}, **small)).eval()
    td.export_onnx(model, file, INPUT)
    run = td.onnx_runner(file)
    x = images(2, SIZE).numpy()
    wanted = run_file(file, x)
    np.testing.assert_allclose(run(x)[0], wanted[0], rtol=0, atol=1e-4 * np.abs(wanted[0]).max())
    if not run.blocked:
        pytest.skip("no blocked layout here")


@pytest.mark.parametrize("trouble", ["none", "wrong"])
def test_the_runner_falls_back_on_the_file(trouble: str, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = undecided("cifar", ("layer",))
    td.export_onnx(model, file, INPUT)
    other = file.with_name("other.onnx")
    shut = undecided("cifar", ("layer",))
    shut.layer_gates.threshold.fill_(2.0)
    td.export_onnx(shut, other, INPUT)

    def rewrite(*args: object) -> Any:
        if trouble == "none":
            raise NotBlocked("no such layout")
        return onnx.load(other)

    monkeypatch.setattr(onnx_session, "blocked", rewrite)
    run = td.onnx_runner(file)
    assert not run.blocked
    x = images(4, SIZE).numpy()
    np.testing.assert_array_equal(run(x)[2], run_file(file, x)[2])


def test_metadata(file: Path) -> None:
    model = dynamic("cifar", ("layer", "exits"))
    model.layer_gates.threshold[0] = 0.25
    td.set_budget(model, confidence=0.75)
    td.export_onnx(model, file, INPUT)
    found = td.onnx_runner(file).metadata
    table = td.cost_table(model, INPUT)
    assert found["model"] == "resnet20_cifar"
    assert found["input_size"] == list(INPUT)
    assert found["dense_macs"] == table.dense
    assert [unit["macs"] for unit in found["units"]] == [row.full for row in table.units]
    assert found["thresholds"]["layer"][0] == 0.25
    assert found["confidence"] == [0.75, 0.75]
    assert found["opset"] == OPSET
    assert json.loads(onnx.load(file).metadata_props[0].value) == found


# What is refused -----------------------------------------------------------------------------------------------------


def test_wrong_use_of_export(file: Path) -> None:
    model = dynamic("cifar")
    with pytest.raises(ValueError, match=r"must end in \.onnx; found 'model.pt'"):
        td.export_onnx(model, file.with_suffix(".pt"))
    with pytest.raises(FileNotFoundError, match="no folder"):
        td.export_onnx(model, file.parent / "nowhere" / "model.onnx")
    with pytest.raises(ValueError, match="training mode"):
        td.export_onnx(dynamic("cifar").train(), file)
    with pytest.raises(ValueError, match="force"), td.force(model, layer_keep=0.5):
        td.export_onnx(model, file)
    with pytest.raises(ValueError, match="input_size must be"):
        td.export_onnx(model, file, (32, 32))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="cannot run an input"):
        td.export_onnx(model, file, (4, 32, 32))
    with pytest.raises(ValueError, match="meta device"):
        td.export_onnx(dynamic("cifar").to("meta"), file)
    with pytest.raises(ValueError, match="no units"):
        td.export_onnx(nn.Linear(2, 2), file)
    assert list(file.parent.iterdir()) == []


def test_budgets_that_a_file_cannot_keep(file: Path) -> None:
    model = dynamic("cifar")
    dearest = td.cost_table(model, INPUT).exits[-1].dearest
    td.set_budget(model, macs=[dearest, dearest], input_size=INPUT)
    with pytest.raises(ValueError, match="macs= with 2 values cannot be exported"):
        td.export_onnx(model, file, INPUT)
    td.set_budget(model, energy_mj=1e6, input_size=INPUT)
    with pytest.raises(ValueError, match="energy_mj cannot be exported; set_budget"):
        td.export_onnx(model, file, INPUT)
    td.set_budget(model, macs=dearest, input_size=INPUT)
    with pytest.raises(ValueError, match="too small: at input size"):
        td.export_onnx(model, file, (3, 128, 128))


def test_an_operation_without_a_form_is_named(file: Path) -> None:
    model = dynamic("cifar", ("layer",))
    model.act1 = nn.RReLU()
    with pytest.raises(ValueError, match="no ONNX form of aten"):
        td.export_onnx(model, file, INPUT)
    assert list(file.parent.iterdir()) == []


def test_a_file_that_fails_its_check_does_not_appear(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_text("before")

    def refuse(*args: object, **options: object) -> None:
        raise onnx.checker.ValidationError("wrong")

    monkeypatch.setattr(onnx.checker, "check_model", refuse)
    with pytest.raises(onnx.checker.ValidationError):
        td.export_onnx(dynamic("cifar"), file, INPUT)
    assert [path.read_text() for path in file.parent.iterdir()] == ["before"]


def test_a_missing_package_is_named(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnx", None)
    with pytest.raises(ImportError, match=r"pip install timm_dynamic\[onnx\]"):
        td.export_onnx(dynamic("cifar"), file, INPUT)


def test_wrong_use_of_the_runner(file: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no file"):
        td.onnx_runner(file)
    file.write_text("something else")
    with pytest.raises(ValueError, match="was not written by export_onnx"):
        td.onnx_runner(file)
    td.export_onnx(dynamic("cifar"), file, INPUT)
    with pytest.raises(ValueError, match="threads must be"):
        td.onnx_runner(file, threads=0)
    run = td.onnx_runner(file)
    with pytest.raises(ValueError, match="float32; found float64"):
        run(np.zeros((1, *INPUT)))
    with pytest.raises(ValueError, match=r"shape \[B, 3, 32, 32\]; found \[1, 3, 32, 31\]"):
        run(np.zeros((1, 3, 32, 31), np.float32))
    with pytest.raises(ValueError, match="shape"):
        run(np.zeros((0, *INPUT), np.float32))


def test_a_network_in_half_precision_is_folded_in_full(file: Path) -> None:
    """The file gives what the same weights give in float32."""
    model = dynamic("basic").to(torch.bfloat16)
    td.export_onnx(model, file, INPUT)
    full = decide(copy.deepcopy(model).float(), images(2, SIZE)).logits
    found = run_file(file, images(2, SIZE).numpy())[0]
    np.testing.assert_allclose(found, full.detach().numpy(), rtol=0, atol=1e-4 * max(1.0, full.abs().max().item()))
