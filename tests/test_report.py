"""report.html: whole, alone, and the same each time."""

import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from timm_dynamic.report import render, write_report

SUMMARY: dict[str, Any] = {
    "dense": {"accuracy": 0.985, "macs": 40_800_000},
    "dynamic": {"accuracy": 0.981, "macs": 20_400_000.0, "max_macs": 30_000_000, "keep_ratio": 0.6},
    "exits": [
        {"exit": 0, "accuracy": 0.9, "macs": 1e7, "max_macs": 1.1e7},
        {"exit": 1, "accuracy": 0.981, "macs": 2e7, "max_macs": 3e7},
    ],
    "budgets": [{"budget": 15_000_000, "accuracy": 0.93, "macs": 1.4e7, "max_macs": 15_000_000}],
    "model": "ddi_<resnet>",
    "dataset": "digits",
    "table": [
        {"name": "dense", "accuracy": 0.985, "macs": 4.08e7, "max_macs": 4.08e7, "keep_ratio": 1.0, "ms": 1.5},
        {"name": "dynamic", "accuracy": 0.981, "macs": 2.04e7, "max_macs": 3e7, "keep_ratio": 0.6, "ms": 1.1},
    ],
    "units": [
        {"name": "layer1.0", "stage": 0, "skip_ratio": None},
        {"name": "layer1.1", "stage": 0, "skip_ratio": 0.25},
        {"name": "layer2.0", "stage": 1, "skip_ratio": 0.0},
        {"name": "layer2.1", "stage": 1, "skip_ratio": 0.875},
    ],
    "decisions": {
        "images": 540,
        "policies": 17,
        "policy_entropy": 2.5,
        "keep_variance": 0.05,
        "macs_share_std": 0.07,
        "keep_ratio": 0.6,
        "channel_keep_ratio": 0.7,
        "exit_shares": [0.0, 1.0],
    },
}
ROWS = [
    {
        "stage": stage,
        "step": step,
        "accuracy": 0.5 + step / 100,
        "macs": 4e7,
        "keep_ratio": 1.0,
        "policies": 1,
        "train": {"loss": 1 / step},
    }
    for stage, step in (("base", 10), ("base", 20), ("iadi", 30))
]


def svgs(page: str) -> list[ElementTree.Element]:
    pieces = [part.split("</svg>")[0] for part in page.split("<svg")[1:]]
    return [ElementTree.fromstring("<svg" + piece + "</svg>") for piece in pieces]


def test_the_page_has_a_figure_with_alt_text_and_a_table_for_each_question() -> None:
    page = render(SUMMARY, ROWS)
    figures = svgs(page)  # parses: well-formed
    assert len(figures) == 4
    for figure in figures:
        title = figure.find("{http://www.w3.org/2000/svg}title")
        assert title is not None
        assert title.text == figure.get("aria-label")
        assert figure.get("role") == "img"
    assert page.count("<table>") == 5
    assert 'name="viewport"' in page
    assert "ddi_&lt;resnet&gt; on digits" in page
    for shown in ("98.10 %", "50.0 %", "87.5 %", "always runs", "layer2.0 (first of its stage)", "17"):
        assert shown in page, shown


def test_the_page_needs_nothing_else() -> None:
    page = render(SUMMARY, ROWS)
    assert "<script" not in page
    for mark in ('src="http', 'href="http', "url(http", "@import"):
        assert mark not in page


def test_ids_of_the_figures_do_not_meet() -> None:
    page = render(SUMMARY, ROWS)
    ids = [element.get("id") for figure in svgs(page) for element in figure.iter() if element.get("id")]
    assert len(ids) == len(set(ids))
    used = set(re.findall(r'(?:href="#|url.#)([\w-]+)', page))
    assert len(used) > 4
    assert used <= set(ids)


def test_the_same_run_gives_the_same_file(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text(json.dumps(SUMMARY))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    first = write_report(tmp_path).read_bytes()
    assert write_report(tmp_path).read_bytes() == first
    assert first == render(SUMMARY, ROWS).encode()


def test_a_stock_network_has_a_report_too() -> None:
    summary = {**SUMMARY, "exits": [], "budgets": [], "units": [{"name": "a", "stage": 0, "skip_ratio": None}]}
    page = render({**summary, "decisions": None}, [])
    assert len(svgs(page)) == 1


def test_a_folder_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no summary\.json"):
        write_report(tmp_path)
