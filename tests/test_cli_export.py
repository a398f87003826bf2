"""`timm-dynamic export`: the file and its parity report."""

import json
from pathlib import Path
from typing import Any

import pytest
from nets import undecided
from typer.testing import CliRunner

from timm_dynamic.cli import app
from timm_dynamic.hub import save_pretrained
from timm_dynamic.onnx_graph import OPSET


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "model.onnx"


def command(*args: str) -> Any:
    return CliRunner().invoke(app, ["export", *args])


def test_command(file: Path) -> None:
    done = command("ddi_resnet20_cifar", "--no-pretrained", "-o", str(file), "--exit", "1", "--json")
    assert done.exit_code == 0, done.output
    row = json.loads(done.stdout)
    assert row["agrees"]
    assert row["bytes"] == file.stat().st_size
    assert row["opset"] == OPSET
    assert max(row[key]["max_difference"] for key in ("runtime", "runner")) <= 1e-4
    assert row["runtime"]["same_exits"] == row["runner"]["same_macs"] == row["images"]
    done = command("resnet20_cifar", "--no-pretrained", "-o", str(file), "--dynamic-batch", "--images", "3")
    assert done.exit_code == 0, done.output
    assert "opset 18" in done.stdout
    assert "3/3" in done.stdout


def test_command_on_a_folder(file: Path) -> None:
    folder = file.parent / "run"
    save_pretrained(undecided("cifar", ("layer", "exits")), folder)
    done = command(str(folder), "-o", str(file), "--confidence", "0.5", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["agrees"]


def test_command_says_what_is_wrong(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = command("ddi_resnet20_cifar", "--no-pretrained", "-o", str(file.with_suffix(".txt")))
    assert done.exit_code == 2
    assert "must end in .onnx" in done.stderr
    done = command("ddi_resnet20_cifar", "--no-pretrained", "-o", str(file.parent / "nowhere" / "x.onnx"))
    assert done.exit_code == 2
    monkeypatch.setattr("timm_dynamic.cli.export.TOLERANCE", -1.0)
    done = command("ddi_resnet20_cifar", "--no-pretrained", "-o", str(file))
    assert done.exit_code == 1
    assert "does not give what PyTorch gives" in done.stderr
