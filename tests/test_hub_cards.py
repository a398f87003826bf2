"""The cards of `hub_cards/`: sound, true of the networks that they describe, and not stale."""

import re
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import ModelCard
from typer.testing import CliRunner

import timm_dynamic as td
from timm_dynamic import hub, shipped
from timm_dynamic.cli import app

FOLDER = Path(__file__).parent.parent / "hub_cards"
CARDS = sorted(path.name.removesuffix(".md") for path in FOLDER.glob("*.md"))
TWINS = sorted(set(CARDS) - set(shipped.names()))  # with their base's weights; cards of trained ones: test_shipped.py
every_card = pytest.mark.parametrize("name", CARDS)
every_twin = pytest.mark.parametrize("name", TWINS)


def run(*args: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["card", *map(str, args)])
    return result.exit_code, result.stdout, result.stderr


def test_there_are_cards_of_every_method_and_family() -> None:
    assert {name.split("_")[0] for name in TWINS} == {"skipnet", "iadi", "ddi"}
    assert {"densenet" in name for name in TWINS} == {True, False}


@every_card
def test_a_card_is_what_the_command_writes_now(name: str) -> None:
    written = (FOLDER / f"{name}.md").read_text(encoding="utf-8")
    assert run(name) == (0, written, ""), f"stale: timm-dynamic card {name} -o hub_cards/{name}.md"


def test_a_card_is_written_to_a_file(tmp_path: Path) -> None:
    file = tmp_path / "card.md"
    assert run("skipnet_resnet18", "-o", file) == (0, f"{file}\n", "")
    assert (0, file.read_text(encoding="utf-8"), "") == run("skipnet_resnet18")


@every_twin
def test_a_card_parses(name: str) -> None:
    base, tag = hub.base_of(name).split(".")
    data = ModelCard.load(FOLDER / f"{name}.md").data
    assert data.base_model == f"timm/{base}.{tag}"
    assert data.license == timm.get_pretrained_cfg(f"{base}.{tag}").license
    assert (data.library_name, data.pipeline_tag) == ("timm", "image-classification")
    assert data.datasets == ["ILSVRC/imagenet-1k"]
    assert data.model_name == name
    assert data.eval_results is None  # nothing was measured


@every_twin
def test_a_card_is_honest(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name).eval()
    text = (FOLDER / f"{name}.md").read_text(encoding="utf-8")
    table = td.cost_table(model, (3, 224, 224))
    more = float(re.findall(r"([0-9.e-]+) % more MACs", text)[0])
    assert more == pytest.approx(100 * (table.exits[-1].dearest / table.dense - 1), rel=0.06)
    assert f"| MACs of the base network | {table.dense / 1e9:.2f} G |" in text
    assert "gates are open and not trained yet" in text
    assert ("exits have random weights" in text) == hasattr(model, "exits")
    assert "set_budget" not in text
    assert f'timm.create_model("{name}", pretrained=True)' in text


def test_a_name_without_a_tag_gets_the_default() -> None:
    assert hub.card_of("skipnet_resnet18") == hub.card_of("skipnet_resnet18.a1_in1k")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["resnet50"], "no dynamic network 'resnet50'"),
        (["skipnet_resnet5"], "no dynamic network"),
        (["skipnet_resnet50.none"], "no dynamic network"),
        (["hf-hub:org/name"], "no dynamic network"),
        (["ddi_densenet100_cifar"], "no trained weights of densenet100_cifar"),
        (["skipnet_resnet18", "-o", "/nowhere/card.md"], "no folder /nowhere to write card.md to"),
    ],
)
def test_what_has_no_card_is_refused_in_one_line(args: list[str], message: str) -> None:
    code, out, err = run(*args)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: ")
    assert message in err
