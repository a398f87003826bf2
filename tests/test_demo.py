"""The demo: what it computes and shows, what it refuses, and the page in a real browser where there is one."""

import copy
import importlib.util
import os
import re
import runpy
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from nets import undecided
from PIL import Image
from torch import nn
from typer.testing import CliRunner

import timm_dynamic as td
from timm_dynamic import demo, demo_compare, demo_page, demo_samples
from timm_dynamic.cli import app as command_line
from timm_dynamic.cli.errors import BadInput
from timm_dynamic.cli.rows import predict
from timm_dynamic.demo_compare import Comparison, Outcome, Pair, load_pair

SPACE = Path(__file__).parent.parent / "hub_cards" / "space"
LABELS = ["cat", "<b>dog</b>", *(f"thing {i}" for i in range(8))]
with_gradio = pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason="needs gradio")


def network(parts: tuple[str, ...] = ("layer", "channel", "exits")) -> nn.Module:
    """A small dynamic network whose decisions differ between images."""
    model = undecided("cifar", parts)
    model.pretrained_cfg |= {"label_names": LABELS, "num_classes": 10}
    return model


def stock() -> Any:
    """A stock network that is not the one inside `network`."""
    torch.manual_seed(7)
    model = timm.create_model("resnet20_cifar").eval()
    model.pretrained_cfg |= {"label_names": LABELS, "num_classes": 10}
    return model


@pytest.fixture(autouse=True)
def _hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """One try is enough where times do not matter."""
    monkeypatch.setattr(demo_compare, "TIMED_SECONDS", 0)


@pytest.fixture(scope="module")
def compare() -> Comparison:
    return Comparison(network(), stock())


@pytest.fixture
def picture() -> Image.Image:
    return demo_samples.drawings()[1].image


def outcome(ran: list[float | None], **changes: Any) -> Outcome:
    """A result whose units ran as told; three in the first stage, the rest in the second."""
    units = [{"name": f"layer{1 + (i > 2)}.{i}", "stage": int(i > 2), "ran": r} for i, r in enumerate(ran)]
    top = [{"class": 0, "label": "cat", "probability": 0.9}, {"class": 1, "label": None, "probability": 0.00001}]
    row = {"top": top, "macs": 25, "dense_macs": 100, "macs_share": 0.25, "exit": 0, "exits": 2}
    row |= {"left_at": "layer1.2", "units": units}
    values = {"dynamic": row, "dense": top, "ms": 2.0, "dense_ms": 4.0, "tries": 3, "seen": Image.new("RGB", (32, 24))}
    return Outcome(**{**values, **changes})


# What is computed ----------------------------------------------------------------------------------------------------


def test_the_slider_starts_at_the_smallest_budget_that_is_possible(compare: Comparison) -> None:
    knob, model = compare.knob, network()
    assert (knob.kind, knob.high, knob.step) == ("budget", 100, 1)
    assert knob.low < knob.start < knob.high
    td.set_budget(model, fraction=knob.low / 100)
    with pytest.raises(ValueError, match="too small"):
        td.set_budget(model, fraction=(knob.low - 1) / 100)


def test_the_slider_ends_where_nothing_is_left_to_run() -> None:
    model = timm.create_model("ddi_resnet20_cifar", num_classes=10).eval()
    td.shut_units(model, ["layer1.1", "layer2.1", "layer3.1", "layer3.2"])
    table = td.cost_table(model, (3, 32, 32))
    knob = demo_compare.knob_of(model, table)
    assert (knob.high - 1) * table.dense / 100 < table.exits[-1].dearest <= knob.high * table.dense / 100 < table.dense
    td.set_budget(model, fraction=knob.high / 100)
    assert td.decide(model, torch.randn(2, 3, 32, 32)).exit_index.tolist() == [2, 2]


@pytest.mark.parametrize("parts", [("layer",), ("channel",), ("layer", "channel")])
def test_without_exits_the_slider_moves_the_gates(parts: tuple[str, ...], picture: Image.Image) -> None:
    found = Comparison(network(parts))
    assert (found.knob.kind, found.knob.low, found.knob.high, found.knob.start) == ("threshold", 0, 1, 0.5)
    shares = [found(picture, setting).dynamic["macs_share"] for setting in (0.0, 0.5, 1.0)]
    assert shares[0] >= 1 > shares[2]
    assert shares[0] >= shares[1] >= shares[2]
    assert "no hard budget" in demo_page.knob_text(found.knob)[1]


def test_calibrated_thresholds_are_where_the_slider_starts() -> None:
    model = network(("layer",))
    model.layer_gates.threshold.fill_(0.37)
    assert Comparison(model).knob.start == 0.37
    model.layer_gates.threshold[0] = 0.9  # no single place of the slider stands for these
    assert Comparison(model).knob.start == 0.5


def test_where_the_slider_starts_the_network_is_the_saved_one(picture: Image.Image) -> None:
    """To the last digit of its thresholds, and with one for each unit, as a static policy has."""
    model = network(("layer",))
    for levels in (torch.tensor([0.0, 2.0] * 4), torch.full((8,), 0.500824)):
        model.layer_gates.threshold.copy_(levels)
        found = Comparison(model)
        found(picture, 0.0)
        wanted = predict(model, found.transform(picture), LABELS)
        assert found(picture).dynamic["units"] == wanted["units"]
        assert torch.equal(found._fast.layer_gates.threshold, levels)


def test_the_slider_starts_on_the_slider() -> None:
    table = td.cost_table(network(), (3, 32, 32))
    for low in range(70, 100):
        stops = tuple(replace(stop, dearest=round(low * table.dense / 100)) for stop in table.exits)
        knob = demo_compare.knob_of(network(), replace(table, exits=stops))
        assert knob.low <= knob.start <= knob.high


def test_the_outcome_is_what_the_model_says_under_that_budget(compare: Comparison, picture: Image.Image) -> None:
    model, dense = network(), stock()
    x = compare.transform(picture)
    for setting in (compare.knob.low, 70, 100):
        found = compare(picture, setting)
        wanted = predict(td.set_budget(model, fraction=setting / 100), x, LABELS)
        assert {k: v for k, v in found.dynamic.items() if k != "top"} == {k: v for k, v in wanted.items() if k != "top"}
        assert found.dynamic["macs"] <= setting / 100 * found.dynamic["dense_macs"]
        assert [guess["label"] for guess in found.dynamic["top"]] == [guess["label"] for guess in wanted["top"]]
        with torch.no_grad():
            wanted_dense = dense(x[None])[0].softmax(0)
        assert found.dense[0]["class"] == int(wanted_dense.argmax())
        assert found.dense[0]["probability"] == pytest.approx(float(wanted_dense.max()), rel=1e-3)
        assert found.ms > 0
        assert found.dense_ms > 0
        assert found.tries == 1


def test_budgets_differ_in_what_they_do(compare: Comparison, picture: Image.Image) -> None:
    small, large = compare(picture, 0), compare(picture, 1000)
    assert small.dynamic["exit"] < large.dynamic["exit"]
    assert small.dynamic["macs"] < large.dynamic["macs"]


def test_without_a_base_the_dense_network_is_the_model_without_gates(picture: Image.Image) -> None:
    model = network()
    found = Comparison(model)
    x = found.transform(picture)[None]
    assert torch.allclose(found.dense(x), td.strip(copy.deepcopy(model))(x), atol=1e-4)


def test_the_model_that_was_given_stays_as_it_was(picture: Image.Image) -> None:
    model = td.set_budget(network(), exit=1)
    before, budget = copy.deepcopy(model.state_dict()), model.dynamic.budget
    found = Comparison(model)
    found(picture, 80)
    assert model.dynamic.budget is budget
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert found(picture, found.knob.high).dynamic["exit"] == len(model.exits)  # its own budget does not count here


def test_visitors_do_not_meet(compare: Comparison) -> None:
    images = [sample.image for sample in demo_samples.drawings()]
    settings = [compare.knob.low, 60, 80, 100]
    cases = [(image, setting) for image in images[:3] for setting in settings]

    def done(image: Image.Image, setting: float) -> Any:
        row = compare(image, setting).dynamic
        return {**row, "top": [guess["class"] for guess in row["top"]]}

    alone = [done(*case) for case in cases]
    together: list[Any] = [None] * len(cases)

    def ask(place: int) -> None:
        together[place] = done(*cases[place])

    threads = [threading.Thread(target=ask, args=(place,)) for place in range(len(cases))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone
    assert len({row["macs"] for row in alone}) > 2


def test_what_was_seen_is_the_image(compare: Comparison, picture: Image.Image) -> None:
    seen = compare(picture).seen
    assert seen.size == (32, 32)
    small = np.asarray(picture.resize((32, 32), Image.Resampling.BILINEAR), dtype=float)
    assert np.abs(np.asarray(seen, dtype=float) - small).mean() < 6


def test_networks_of_grey_images() -> None:
    model = td.add_exits(timm.create_model("resnet20_cifar", in_chans=1)).eval()
    model.pretrained_cfg |= {"mean": (0.5,), "std": (0.5,)}
    found = Comparison(model)(demo_samples.drawings()[0].image, 100)
    assert (found.seen.mode, found.seen.size) == ("L", (32, 32))


def test_the_quietest_try_counts(monkeypatch: pytest.MonkeyPatch, picture: Image.Image) -> None:
    tries = iter([{"dynamic": 9.0, "dense": 2.0}, {"dynamic": 3.0, "dense": 2.0}, {"dynamic": 2.5, "dense": 9.0}])
    monkeypatch.setattr(demo_compare, "latency", lambda *_: next(tries))
    monkeypatch.setattr(demo_compare, "TIMED_SECONDS", 60)
    monkeypatch.setattr(demo_compare, "MOST_TRIES", 3)
    found = Comparison(network())(picture)
    assert (found.ms, found.dense_ms, found.tries) == (3.0, 2.0, 3)


def test_what_cannot_be_compared() -> None:
    with pytest.raises(BadInput, match="a dynamic model is needed"):
        Comparison(stock())
    with pytest.raises(BadInput, match="found another dynamic one"):
        Comparison(network(), network())
    with pytest.raises(BadInput, match="must know 10 classes; found 3"):
        Comparison(network(), timm.create_model("resnet20_cifar", num_classes=3))


# Which networks ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run leaves: the dynamic network, and the stock one in base/."""
    folder = tmp_path_factory.mktemp("a run")
    td.save_pretrained(saveable(), folder)
    base = timm.create_model("resnet20_cifar")
    td.save_pretrained(base, folder / "base")
    return folder


def saveable() -> Any:
    torch.manual_seed(1)
    model = timm.create_model("ddi_resnet20_cifar", layer_gates={"kind": "linear", "init": "random"})
    model.pretrained_cfg |= {"label_names": LABELS}
    return model


def test_a_run_is_shown_beside_its_own_base(run_folder: Path) -> None:
    pair = load_pair(f"local-dir:{run_folder}")
    assert pair.name is None  # a visitor is not told the names of folders
    assert pair.dense is not None
    assert not hasattr(pair.dense, "dynamic")
    own, base = pair.dense.state_dict(), pair.dynamic.state_dict()
    assert own.keys() <= base.keys()
    assert not torch.equal(own["conv1.weight"], base["conv1.weight"])
    assert "trained without gates" in pair.about_dense


def test_a_folder_without_a_base_is_shown_beside_itself(tmp_path: Path) -> None:
    td.save_pretrained(saveable(), tmp_path)
    pair = load_pair(f"local-dir:{tmp_path}")
    assert pair[1:] == (None, demo_compare.SAME_WEIGHTS, None)


def test_shipped_weights_are_shown_beside_the_best_base_of_their_data(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "model.safetensors"
    file.touch()
    config = timm.models.PretrainedCfg(file=str(file))
    accuracies = {"cifar100": 0.9, "cifar10": 0.8, "cifar10_more": 0.85, "cifar10_other": 0.82, "svhn2": 0.95}
    known = {f"resnet20_cifar.{tag}": {"metrics": {"accuracy": value}} for tag, value in accuracies.items()}
    monkeypatch.setattr(timm, "list_pretrained", lambda _: list(known))
    monkeypatch.setattr(demo_compare, "config_of", known.get)
    monkeypatch.setattr(timm, "get_pretrained_cfg", lambda _: config)
    base_beside = demo_compare._base_beside
    assert base_beside("skipnet_resnet20_cifar.cifar10_hrl") == "resnet20_cifar.cifar10_more"
    assert base_beside("ddi_resnet20_cifar.cifar100") == "resnet20_cifar.cifar100"
    assert base_beside("ddi_resnet20_cifar.svhn") is None
    assert base_beside("hf-hub:org/ddi_resnet20_cifar.cifar10") is None
    file.unlink()
    assert base_beside("ddi_resnet20_cifar.cifar100") is None


def test_names_that_cannot_be_shown(monkeypatch: pytest.MonkeyPatch, run_folder: Path) -> None:
    with pytest.raises(BadInput, match="resnet18 is a dense network: a dynamic one is wanted, such as ddi_resnet18"):
        load_pair("resnet18")
    with pytest.raises(BadInput, match="has no gates and no exits"):
        load_pair(f"local-dir:{run_folder / 'base'}")
    monkeypatch.setattr(demo_compare, "DEFAULT", "ddi_resnet20_cifar.nothing")
    with pytest.raises(
        BadInput, match=r"network shown by default is not here \(ddi_resnet20_cifar.nothing.*give a NAME"
    ):
        load_pair()


# What is shown -------------------------------------------------------------------------------------------------------


def test_the_strip_says_in_words_what_ran() -> None:
    shown = demo_page.render(outcome([1.0, 0.0, 0.5, 1.0, None]), 40)
    assert "<b>3 of 5</b> layers ran, 1 of them in part." in shown
    assert "<b>5 of 5</b> layers ran." in shown  # the dense network
    (own, _) = re.findall(r"role='img' aria-label='([^']*)'", shown)
    assert own.split(", ") == [
        "layer1.0 ran",
        "layer1.1 skipped",
        "layer1.2 ran with 50 % of its channels",
        "layer2.3 ran",
        "layer2.4 not reached",
    ]
    strip = demo_page.strip(outcome([1.0, 0.0, 0.5, 1.0, None]).dynamic["units"])
    assert re.findall(r"td-u td-(\w+)", strip) == ["ran", "off", "part", "ran", "far"]
    assert strip.count("<span>") == 2  # stages
    assert "--part:50%" in strip


def test_the_numbers_are_shown() -> None:
    shown = demo_page.render(outcome([1.0, 0.0]), 40)
    assert "<b>25 %</b> of the multiply-adds and <b>0.50 times</b> the time" in shown
    assert "Both say <b>cat</b>" in shown
    assert "25 (25 %; limit 40 %)" in shown
    assert "100 (100 %)" in shown
    assert "2.00 ms" in shown
    assert "4.00 ms" in shown
    assert "90.0 %" in shown
    assert "&lt; 0.1 %" in shown
    assert "It left at exit 1 of 2, after layer1.2." in shown
    assert "32 x 24 pixels" in shown
    assert "the quietest of 3 tries" in shown
    assert "tries" not in demo_page.render(outcome([1.0], tries=1))
    assert "width:50.0%" in shown  # of the bar of its time
    assert "limit" not in demo_page.render(outcome([1.0, 0.0]))


def test_it_is_said_if_the_networks_disagree_or_no_time_is_saved() -> None:
    other = [{"class": 2, "label": None, "probability": 0.6}]
    assert "It says <b>cat</b>, the dense network <b>class 2</b>." in demo_page.verdict(outcome([1.0], dense=other))
    assert "no less time" in demo_page.verdict(outcome([1.0], ms=4.2))
    assert "no less time" not in demo_page.verdict(outcome([1.0], ms=4.0))


def test_exits_in_words() -> None:
    row = outcome([1.0]).dynamic
    assert demo_page.exit_sentence({**row, "exits": 1}) == ""
    assert demo_page.exit_sentence({**row, "left_at": "head"}) == "It went all the way, to exit 2 of 2."


def test_labels_are_text(compare: Comparison, picture: Image.Image) -> None:
    pages = [
        demo_page.render(compare(picture, 100)),
        demo_page.introduction("<b>dog</b>", "<b>dog</b>"),
        demo_page.problem("<b>dog</b>"),
    ]
    guess = [{"class": 1, "label": "<b>dog</b>", "probability": 0.6}]
    pages.append(demo_page.render(outcome([1.0], dense=guess)))
    assert not any("<b>dog" in shown for shown in pages)
    assert all("&lt;b&gt;dog" in shown for shown in pages[1:])


def test_nothing_on_the_page_comes_from_elsewhere(compare: Comparison, picture: Image.Image) -> None:
    everything = demo_page.introduction("name", "base") + demo_page.render(compare(picture))
    # pictures written into the page are base64, in which any two letters may follow two slashes
    text = re.sub(r"data:image/[a-z]+;base64,[A-Za-z0-9+/=]+", "", everything)
    assert len(text) < len(everything)
    assert not re.search(r"https?:|//[a-z]|@import|url\(", text, re.IGNORECASE)


def test_a_place_of_the_slider_and_a_file_give_a_page(
    compare: Comparison, picture: Image.Image, tmp_path: Path
) -> None:
    picture.save(tmp_path / "ship.png")
    file = str(tmp_path / "ship.png")
    assert "limit 60 %" in demo.show(compare, file, 60)
    assert f"limit {compare.knob.start:g} %" in demo.show(compare, file, None)
    assert f"limit {compare.knob.low:g} %" in demo.show(compare, file, 1)  # typed beside the slider
    assert "pick a sample" in demo.show(compare, None, 60)
    (tmp_path / "text.png").write_text("not an image")
    shown = demo.show(compare, str(tmp_path / "text.png"), 60)
    assert "role='alert'>The file cannot be read as an image: wanted a JPEG" in shown
    assert str(tmp_path) not in shown


# Images --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "suffix"), [("CMYK", "jpg"), ("L", "png"), ("RGBA", "png"), ("P", "gif"), ("1", "tif"), ("I;16", "png")]
)
def test_images_of_all_kinds_are_read(mode: str, suffix: str, tmp_path: Path) -> None:
    grey = Image.linear_gradient("L").rotate(90)  # dark left, or right
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    file = tmp_path / f"image.{suffix}"
    (deep if mode == "I;16" else grey.convert(mode)).save(file)
    found = demo_samples.read_image(file)
    assert (found.mode, found.size) == ("RGB", grey.size)
    assert np.abs(np.asarray(found.convert("L"), float).mean(0) - np.asarray(grey, float).mean(0)).max() < 45


def test_transparency_is_white(tmp_path: Path) -> None:
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert demo_samples.read_image(tmp_path / "clear.png").getpixel((1, 1)) == (255, 255, 255)


def test_photographs_are_turned_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6  # to be turned by 90 degrees
    Image.new("RGB", (20, 10)).save(tmp_path / "turned.jpg", exif=exif)
    assert demo_samples.read_image(tmp_path / "turned.jpg").size == (10, 20)


def test_what_is_no_image_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(name: str, message: str) -> None:
        with pytest.raises(BadInput, match=message):
            demo_samples.read_image(tmp_path / name)

    (tmp_path / "empty.png").touch()
    refused("empty.png", "cannot be read as an image: wanted a JPEG")
    Image.effect_noise((64, 64), 50).save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:900])
    refused("cut.jpg", "the image file is damaged")
    Image.new("1", (9000, 9000)).save(tmp_path / "huge.png")
    refused("huge.png", "too large: 9000 x 9000 is 81 megapixels; wanted at most 50")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # PIL refuses from twice that on
    refused("huge.png", "too large: wanted at most 50 megapixels")


def test_samples_from_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(6):
        (tmp_path / f"class {i}").mkdir()
        Image.new("RGB", (2000, 1000), (40 * i, 0, 0)).save(tmp_path / f"class {i}" / f"n{i}.PNG")
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "bad.jpg").write_text("no image")
    found, left_out = demo_samples.from_folder(tmp_path)
    assert [sample.title for sample in found] == [f"n{i}" for i in range(6)]
    assert {sample.image.size for sample in found} == {(512, 256)}
    assert len(left_out) == 1
    assert "bad.jpg: the file cannot be read" in left_out[0]
    (tmp_path / "bad.jpg").unlink()
    monkeypatch.setattr(demo_samples, "MOST_SAMPLES", 4)
    assert [sample.title for sample in demo_samples.from_folder(tmp_path)[0]] == ["n0", "n2", "n4"]


def test_folders_without_samples(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"no folder .*--samples must hold images"):
        demo_samples.from_folder(tmp_path / "none")
    with pytest.raises(BadInput, match=r"holds no images .*jpg"):
        demo_samples.from_folder(tmp_path)
    (tmp_path / "bad.jpg").touch()
    with pytest.raises(BadInput, match=r"holds no images that can be read .*bad\.jpg"):
        demo_samples.from_folder(tmp_path)


def test_drawings_are_the_same_each_time_and_the_dim_ones_darker() -> None:
    first, second = (dict(demo_samples.drawings()) for _ in range(2))
    assert list(first) == ["airplane", "ship", "car", "truck", "dim airplane", "dim ship"]
    assert all(first[title].tobytes() == second[title].tobytes() for title in first)
    assert len({image.tobytes() for image in first.values()}) == 6
    assert np.asarray(first["dim ship"]).mean() < 0.5 * np.asarray(first["ship"]).mean()


def test_networks_that_read_digits_get_digits() -> None:
    pytest.importorskip("sklearn")
    digits = [str(i) for i in range(10)]
    assert [sample.title for sample in demo_samples.samples_for(digits)] == digits
    assert demo_samples.samples_for(LABELS)[0].title == "airplane"
    assert demo_samples.samples_for(None)[0].title == "airplane"


# The command ---------------------------------------------------------------------------------------------------------


def refused(message: str, *args: object, code: int = 2) -> None:
    """The command must fail with one line that holds `message`."""
    ran = CliRunner().invoke(command_line, ["demo", *map(str, args)])
    assert ran.exit_code == code, ran.output
    assert ran.stderr.startswith("error: ")
    assert ran.stderr.count("\n") == 1
    assert message in ran.stderr


def test_a_port_that_is_taken_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        refused(f"cannot listen on 127.0.0.1, port {port}", "--port", port)


def test_an_address_that_is_not_ours_is_refused() -> None:
    refused("cannot listen on 192.0.2.1", "--host", "192.0.2.1")


def test_without_gradio_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    refused("pip install 'timm-dynamic[demo]'", "ddi_resnet20_cifar", code=1)


@with_gradio
def test_wrong_names_and_folders(tmp_path: Path) -> None:
    refused("is a dense network", "resnet18")
    refused(f"no folder {tmp_path / 'none'}", "--samples", tmp_path / "none")
    refused(f"no folder {tmp_path / 'none'}", f"local-dir:{tmp_path / 'none'}")


@with_gradio
def test_nothing_is_shared_and_only_this_machine_is_listened_to(
    monkeypatch: pytest.MonkeyPatch, run_folder: Path
) -> None:
    import gradio

    launched: dict[str, Any] = {}
    monkeypatch.setattr(gradio.Blocks, "launch", lambda self, **options: launched.update(options, app=self))
    monkeypatch.setattr(gradio.Blocks, "block_thread", lambda _: None)
    monkeypatch.setattr(gradio.Blocks, "local_url", "http://127.0.0.1:1/", raising=False)
    monkeypatch.setenv("GRADIO_SHARE", "True")
    ran = CliRunner().invoke(command_line, ["demo", f"local-dir:{run_folder}"])
    assert ran.exit_code == 0, ran.output
    assert launched["server_name"] == "127.0.0.1"
    assert launched["share"] is False
    assert launched["app"].analytics_enabled is False
    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"
    assert launched["theme"]._stylesheets == []
    assert str(run_folder) not in str(launched["app"].get_config_file())


@with_gradio
def test_the_space_shows_the_default_network(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: dict[str, Any] = {}
    monkeypatch.setattr(demo, "load_pair", lambda: Pair(network(), None, "itself", "a network"))
    monkeypatch.setattr(demo, "serve", lambda app, **options: shown.update(options, app=app))
    runpy.run_path(str(SPACE / "app.py"), run_name="__main__")
    assert (shown["host"], shown["port"]) == ("0.0.0.0", 7860)
    config = str(shown["app"].get_config_file())
    assert "a network" in config
    assert "layers ran" in config


def test_the_space_is_ready_to_upload() -> None:
    _, front, text = (SPACE / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    card = yaml.safe_load(front)
    assert card["sdk"] == "gradio"
    assert int(card["sdk_version"].split(".")[0]) >= 6
    assert (SPACE / card["app_file"]).is_file()
    assert len(card["short_description"]) <= 60
    assert (SPACE / "requirements.txt").read_text().startswith("timm-dynamic[demo]")
    assert "timm-dynamic demo" in text


# In a browser --------------------------------------------------------------------------------------------------------

SPY = """
import os, sys

def note(event, args):
    if event == "socket.connect" and isinstance(args[1], tuple) or event == "socket.getaddrinfo":
        host = args[1][0] if event == "socket.connect" else args[0]
        with open(os.environ["SEEN_HOSTS"], "a") as file:
            print(host, file=file)

sys.addaudithook(note)
"""


RIGHTMOST = "found => Math.max(...found.map(one => one.getBoundingClientRect().right))"


@contextmanager
def serving(*args: object, spy: Path) -> Iterator[str]:
    """The address of a running demo; hosts that it looks for are written to `spy`/hosts."""
    (spy / "sitecustomize.py").write_text(SPY)
    (spy / "hosts").touch()
    root = str(Path(td.__file__).parent.parent)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(spy), root]), "SEEN_HOSTS": str(spy / "hosts")}
    (spy / "temporary").mkdir()
    env["TMPDIR"] = str(spy / "temporary")
    command = [sys.executable, "-c", "from timm_dynamic.cli import main; main()", "demo", *map(str, args)]
    with (
        (spy / "errors").open("w") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=env) as server,
    ):
        try:
            assert server.stdout is not None
            line = server.stdout.readline()
            assert line.startswith("serving on "), (spy / "errors").read_text()
            yield line.split()[2]
        finally:
            server.terminate()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        port: int = found.getsockname()[1]
        return port


@with_gradio
def test_the_page_in_a_browser(run_folder: Path, tmp_path: Path) -> None:
    """Pick a sample, move the slider, drop files; at the width of a phone too. Nothing is asked of other machines."""
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("needs chromium")
    (tmp_path / "text.png").write_text("not an image")
    demo_samples.drawings()[3].image.convert("CMYK").save(tmp_path / "cmyk.jpg")
    port = free_port()
    with (
        serving(f"local-dir:{run_folder}", "--port", port, spy=tmp_path) as url,
        playwright.sync_playwright() as driver,
    ):
        assert url == f"http://127.0.0.1:{port}/"
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        asked: list[str] = []
        broken: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: broken.append(str(error)))
        page.goto(url)
        use(page, tmp_path, playwright.expect)
        page.set_viewport_size({"width": 390, "height": 844})
        assert page.eval_on_selector_all("#result *, .td *, #samples button", RIGHTMOST) <= 390
        browser.close()
    assert broken == []
    assert list((tmp_path / "temporary").glob("timm-dynamic-*")) == []  # uploaded images are gone
    assert asked
    assert [one for one in asked if not one.startswith((url, "data:", "blob:"))] == []
    hosts = set((tmp_path / "hosts").read_text().split())
    assert "127.0.0.1" in hosts
    assert hosts <= {"127.0.0.1", "localhost", "None"}


def use(page: Any, folder: Path, expect: Any) -> None:
    """What a visitor does, and must see."""
    result, slider = page.locator("#result"), page.locator("#budget input[type=range]")
    expect(result).to_contain_text("layers ran")  # there is something to see before anything is done
    expect(result.get_by_role("img", name="layer1.0 ran, layer1.1")).to_have_count(2)
    low = slider.get_attribute("min")
    slider.fill(low)
    expect(result).to_contain_text(f"limit {low} %")
    expect(result).to_contain_text("It left at exit 1 of 3")
    slider.fill("100")
    expect(result).to_contain_text("limit 100 %")
    seen = result.get_by_alt_text("The image as the networks see it")
    before = seen.get_attribute("src")
    page.get_by_label("Thumbnail 2 of 6").click()
    expect(seen).not_to_have_attribute("src", before)
    drop(page, folder / "text.png")
    expect(result.get_by_role("alert")).to_contain_text("cannot be read as an image")
    drop(page, folder / "cmyk.jpg")
    expect(result).to_contain_text("layers ran")


def drop(page: Any, file: Path) -> None:
    """Put a file where the image is."""
    page.get_by_label("Remove Image").or_(page.get_by_label("Clear")).first.click()
    page.locator("#image input[type=file]").set_input_files(file)
