"""`timm-dynamic report NAME --data DIR`: the whole page of a tiny network on tiny images."""

import json
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import nets
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from typer.testing import CliRunner

import timm_dynamic as td
from timm_dynamic.analysis_report import Images, Subject, Work, analyse
from timm_dynamic.cli import app
from timm_dynamic.cli.analyses import _known_held_out, _subject
from timm_dynamic.hub import save_pretrained
from timm_dynamic.paper_claims import PAPER_CLAIMS
from timm_dynamic.sections_images import tiles

CLASSES = ("cat", "dog", "eel")
SIZE = 16
SECTIONS = ["cost", "reduction", "units", "decisions", "looks", "scales", "classes", "features", "training"]
SECTIONS += ["confidence", "time", "claims"]
VOID = {"meta", "br", "link", "img", "hr"}
ROWS = [
    {"stage": stage, "step": step, "accuracy": 0.4, "macs": 9e6, "keep_ratio": 0.9, "policies": 3, "train": {"loss": 2}}
    for stage, step in (("base", 10), ("sp", 20))
]


class Checked(HTMLParser):
    """A page whose tags must close in the order in which they open."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.outline: list[str] = []  # figures, tables and headings in order
        self.ids: list[str] = []
        self.links: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.ids += [str(values["id"])] if "id" in values else []
        self.links += [str(values[key]) for key in ("href", "src", "xlink:href") if key in values]
        if tag in ("figure", "table", "h2"):
            self.outline.append(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def named(model: Any) -> Any:
    model.pretrained_cfg |= {"num_classes": 3, "label_names": list(CLASSES), "input_size": (3, SIZE, SIZE)}
    return model.eval()


def network(*parts: str) -> Any:
    """A network of two minds for the three classes."""
    model = nets.undecided("cifar", parts)
    model.reset_classifier(3)
    return named(model)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DATA/train and DATA/val, a folder for each class."""
    root, random = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for part, count in (("train", 20), ("val", 8)):
        for k, name in enumerate(CLASSES):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(0, 120 + 40 * k + 6 * (i % 10), (SIZE, SIZE, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run."""
    folder = tmp_path_factory.mktemp("runs") / "sp-run"
    model = network("layer", "exits")
    save_pretrained(model, folder)
    save_pretrained(named(td.strip(model)), folder / "base")
    (folder / "summary.json").write_text(json.dumps({"adaptive_gain": -0.01}))
    (folder / "settings.json").write_text(json.dumps({"method": "sp", "model": "ddi_resnet20_cifar", "holdout": 50}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return folder


@pytest.fixture(scope="module")
def beside(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with another network: channel gates alone."""
    folder = tmp_path_factory.mktemp("runs") / "channels"
    save_pretrained(network("channel"), folder)
    return folder


def command(*args: object) -> Any:
    return CliRunner().invoke(app, ["report", *map(str, args)])


@pytest.fixture(scope="module")
def made(data: Path, run: Path, beside: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """The page and its numbers."""
    study = tmp_path_factory.mktemp("study") / "comparison.json"
    variants = (("sp", 0.9), ("soft", 0.2))
    rows = [{"variant": v, "seed": s, "accuracy": a, "macs_share": 0.5} for v, a in variants for s in (0, 1)]
    claim = {"text": "a study's own claim", "difference": 0.7, "seeds": 2, "found": "agrees"}
    study.write_text(json.dumps({"title": "study", "rows": rows, "claims": [claim]}))
    options = ("--held-out", 50, "--target", 0.5, "--rounds", 2, "--threads", 1, "--json", "--study", study)
    options = (*options, "--figures", run / "drawn" / "figures")
    done = command(f"local-dir:{run}", "--data", data, "--beside", f"local-dir:{beside}", *options)
    assert done.exit_code == 0, done.output
    numbers = json.loads(done.stdout)
    assert numbers["report"] == str(run / "report.html")
    return (run / "report.html").read_text(encoding="utf-8"), numbers


def test_the_page_is_whole_and_alone(made: tuple[str, dict[str, Any]]) -> None:
    page = Checked(made[0])
    assert page.outline.count("h2") == len(SECTIONS)
    assert [one for one in page.ids if one in SECTIONS] == SECTIONS
    assert len(page.ids) == len(set(page.ids))
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in page.links)
    assert any(link.startswith("data:image/png") for link in page.links)
    assert {link[1:] for link in page.links if link.startswith("#")} <= set(page.ids)
    for mark in ("<script", "url(http", "@import", "<link"):
        assert mark not in made[0]
    assert 'name="viewport"' in made[0]


def test_every_figure_has_alt_text_and_a_table_below(made: tuple[str, dict[str, Any]]) -> None:
    outline = Checked(made[0]).outline
    assert outline.count("figure") >= 11
    for place, what in enumerate(outline):
        assert what != "figure" or outline[place + 1] == "table"
    pieces = ["<svg" + part.split("</svg>")[0] + "</svg>" for part in made[0].split("<svg")[1:]]
    for figure in map(ElementTree.fromstring, pieces):
        assert figure.get("role") == "img"
        assert len(figure.get("aria-label") or "") > 20


def test_every_figure_is_a_file_too(made: tuple[str, dict[str, Any]], run: Path) -> None:
    files = {file.name: file.read_text(encoding="utf-8") for file in (run / "drawn" / "figures").iterdir()}
    assert len(files) == made[0].count("<svg")
    assert {"cost.svg", "training-1.svg", "training-2.svg"} <= set(files)
    for text in files.values():
        assert ElementTree.fromstring(text).tag == "{http://www.w3.org/2000/svg}svg"
        assert text.strip() in made[0]


def test_numbers_agree_with_each_other(made: tuple[str, dict[str, Any]]) -> None:
    numbers = made[1]
    assert list(numbers) == ["report", "title", *SECTIONS]
    points = {(one["network"], one["what"]): one for one in numbers["cost"]["points"]}
    own = points["sp-run", "as saved"]
    assert own["accuracy"] == numbers["decisions"]["accuracy"]
    assert own["macs"] == numbers["decisions"]["macs"]
    assert {what for name, what in points if name == "sp-run"} >= {"exit 0", "exit 1", "calibrated to 50 %"}
    assert ("channels", "as saved") in points
    skips = numbers["units"]["sp-run: layers"]
    assert skips["layer1.0"] is None
    assert {name: skip for name, skip in skips.items() if skip is not None} == numbers["decisions"]["unit_skip"]
    assert set(numbers["units"]) == {"sp-run: layers", "channels: channels"}
    assert sum(row["images"] for row in numbers["classes"]["classes"]) == 24
    assert [row["scale"] for row in numbers["scales"]] == [0.5, 0.75, 1.0, 1.25, 1.5]
    assert [row["exit"] for row in numbers["confidence"]] == ["exit 0", "exit 1", "head", "dense base, head"]
    assert numbers["confidence"][2]["accuracy"] == pytest.approx(own["accuracy"])
    assert numbers["training"] == ROWS
    assert set(numbers["decisions"]["exchange"]) == {"sp-run", "channels"}
    assert numbers["decisions"]["exchange"]["sp-run"]["own"] == pytest.approx(own["accuracy"])
    assert "What the decisions are worth to the images" in made[0]
    assert [one["name"] for one in numbers["time"]][:2] == ["dense", "sp-run"]
    assert f"{100 * own['accuracy']:.2f} %" in made[0]
    assert "Calibrated on 50 images of" in made[0]
    assert "is known to have held out" not in made[0]  # the run held out as many


def test_claims_are_judged_from_what_was_given(made: tuple[str, dict[str, Any]]) -> None:
    claims = {one["claim"]: one for one in made[1]["claims"]["claims"]}
    assert len(claims) == len(PAPER_CLAIMS)
    assert claims["hard gating beats soft at equal cost"]["found"] == "agrees"
    assert claims["learned skipping beats SDV at equal skip ratio"]["found"] == "recipe only, not run"
    assert claims["larger input scales run more units"]["number"]
    assert claims["channel skipping keeps the first unit of each stage"]["number"].startswith("channels: ")
    assert made[1]["claims"]["studies"][0]["text"] == "a study's own claim"
    assert "recipe only, not run" in made[0]


def test_some_images_of_a_plain_network(data: Path, tmp_path: Path) -> None:
    folder, other = tmp_path / "a" / "net", tmp_path / "b" / "net"
    for place in (folder, other):
        save_pretrained(named(timm.create_model("resnet20_cifar", num_classes=3)), place)
    page, few = tmp_path / "plain.html", ("--images", 10, "--rounds", 1)
    done = command(folder, "--data", data, "--beside", other, *few, "-o", page, "--json")
    assert done.exit_code == 0, done.output
    numbers = json.loads(done.stdout)
    assert numbers["decisions"]["images"] == 10
    assert [point["network"] for point in numbers["cost"]["points"]] == [str(folder), str(other)]  # not both "net"
    assert (numbers["looks"], numbers["scales"], numbers["training"]) == (None, None, None)
    text = page.read_text(encoding="utf-8")
    Checked(text)
    assert "10 images of" in text
    assert "drawn at random" in text
    assert "the network has no gates" in text


@pytest.mark.parametrize(
    ("settings", "summary", "known"),
    [
        ({"holdout": 50}, {}, 50),
        ({}, {"calibrated": {"images": 40, "held_out": True}}, 40),  # as weights are shipped
        ({}, {"calibrated": {"images": 40, "held_out": False}}, 0),
        ({"holdout": None}, {}, 0),
        ({"holdout": 50, "dataset": "folder"}, {}, 50),
        ({"holdout": 50, "dataset": "cifar10"}, {}, 0),  # whose images are in another order
    ],
)
def test_what_a_network_never_saw(settings: dict[str, Any], summary: dict[str, Any], known: int) -> None:
    assert _known_held_out(Subject("net", network("layer"), settings, summary)) == known


@pytest.mark.parametrize(
    ("settings", "scratch"),
    [
        ({}, False),
        ({"base": None, "stages": [{"name": "hrl"}]}, True),
        ({"base": None, "stages": [{"name": "base"}, {"name": "sp"}, {"name": "hrl"}]}, False),
        ({"base": "runs/base", "stages": [{"name": "hrl"}]}, False),
    ],
)
def test_what_nobody_trained_is_no_dense_base(settings: dict[str, Any], scratch: bool, tmp_path: Path) -> None:
    """A run from scratch notes its first, random network as the dense one."""
    metrics = {"dense": {"accuracy": 0.1, "macs": 1.0}}
    td.save_pretrained(network("layer"), tmp_path, metrics=metrics)
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    assert ("dense" not in _subject(str(tmp_path), "cpu").summary) == scratch


def test_the_base_is_taken_from_beside_or_from_what_was_noted() -> None:
    x, y = torch.randn(60, 3, SIZE, SIZE), torch.arange(60) % 3
    loader = [(x, y)]
    images = Images(loader, loader, CLASSES, (0.0,) * 3, (1.0,) * 3, lambda k: x[k].sigmoid(), "60 images")
    model = network("layer")
    plain = named(timm.create_model("resnet20_cifar", num_classes=3))
    noted = Subject("net", model, summary={"dense": {"accuracy": 0.75, "macs": 1e7}})
    assert Work(noted, [], images).dense == (0.75, 1e7)
    assert Work(Subject("net", model), [], images).dense is None
    wanted = (plain(x).argmax(1) == y).double().mean().item()
    for subject, others in ((noted, [Subject("small", plain)]), (replace(noted, base=plain), [])):
        assert Work(subject, others, images).dense == (wanted, td.cost_table(plain, (3, SIZE, SIZE)).dense)
    smaller = named(timm.create_model("resnet32_cifar", num_classes=3))
    assert Work(noted, [Subject("other", smaller)], images).dense == (0.75, 1e7)
    assert "--held-out" in analyse(Subject("net", model), [], images, rounds=1).html()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("RUN", "--data", "DATA", "--beside", "RUN"), "is named twice"),
        (("RUN", "--data", "DATA", "--figures", "DATA/val/cat/0.png"), "--figures must name a folder; found the file"),
        (("RUN", "--figures", "x"), "--figures goes with --data"),
        (("RUN", "--data", "DATA", "-o", "/no/such/page.html"), "no folder /no/such to write page.html to"),
        (("local-dir:x", "--beside", "y"), "--beside goes with --data"),
        (("local-dir:x", "--json"), "--json goes with --data"),
        (("no-such-net", "--data", "DATA"), "no model 'no-such-net'"),
        (("RUN", "--data", "/no/such"), "no folder /no/such"),
        (("RUN", "--data", "DATA", "--split", "nope"), "check --split"),
        (("RUN", "--data", "DATA", "--held-out", "60"), "1 to 59 can be held out"),
        (("RUN", "--data", "DATA", "--held-out", "20"), "at least 50 images"),
        (("RUN", "--data", "DATA/val", "--held-out", "20"), "the images that are held out are some of DATA/train"),
        (("RUN", "--data", "DATA", "--study", "DATA/val/cat/0.png"), "codec"),
        (("RUN", "--data", "DATA", "--study", "/no/such.json"), "No such file"),
    ],
)
def test_wrong_input_is_one_line(args: tuple[str, ...], message: str, data: Path, run: Path) -> None:
    given = [arg.replace("DATA", str(data)).replace("RUN", str(run)) for arg in args]
    done = command(*given)
    lines = [line for line in done.stderr.splitlines() if not line.startswith("report: ")]
    assert done.exit_code == 2, done.output
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert message in lines[0]


def test_tiles() -> None:
    sheet = tiles([torch.full((3, 4, 6), k / 10) for k in range(10)], gap=1)
    assert sheet.shape == (2 * 5 - 1, 8 * 7 - 1, 3)
    assert sheet[0, 0].tolist() == [0, 0, 0]
    assert sheet[5, 7].tolist() == pytest.approx([0.9] * 3)
    assert sheet[4].min() == 1  # the gap
    assert tiles([torch.zeros(1, 480, 240)]).shape == (48, 24, 3)


def test_dangerous_names_are_shown_as_they_are(data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "<b>&"
    save_pretrained(named(timm.create_model("resnet20_cifar", num_classes=3)), folder)
    done = command(folder, "--data", data, "--images", 6, "--rounds", 1, "-o", tmp_path / "x.html")
    assert done.exit_code == 0, done.output
    text = (tmp_path / "x.html").read_text(encoding="utf-8")
    Checked(text)
    assert "&lt;b&gt;&amp;" in text
    assert not re.search(r"<b>&amp;|<b>&(?!amp)", text)
