"""Claims judged over seeds, and the page that shows them."""

import copy
import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "train_recipes"))

from test_recipes import ALL_DIGITS, datasets, no_report, options, prepare, results

import compare
from timm_dynamic.comparison import Claim, judge, write_comparison


def rows(variant: str, accuracies: list[float], share: float = 0.5) -> list[dict[str, Any]]:
    return [
        {"variant": variant, "seed": seed, "accuracy": accuracy, "macs_share": share}
        for seed, accuracy in enumerate(accuracies)
    ]


def test_a_claim_is_judged_seed_by_seed() -> None:
    found = [*rows("a", [0.95, 0.91, 0.99, 0.5]), *rows("b", [0.94, 0.90, 0.97], 0.4)]
    verdict = judge(Claim("a beats b", "a", "b"), found)
    assert verdict is not None
    assert (verdict.seeds, verdict.costs, verdict.found) == (3, pytest.approx((0.5, 0.4)), "agrees")
    assert verdict.difference == pytest.approx(0.04 / 3)
    assert verdict.spread == pytest.approx(math.sqrt(2 * (0.01 / 3) ** 2 + (0.02 / 3) ** 2) / math.sqrt(2))
    other = judge(Claim("b beats a", "b", "a"), found)
    assert other is not None
    assert other.found == "disagrees"
    near = judge(Claim("b is near a", "b", "a", allowed=0.05), found)
    assert near is not None
    assert near.found == "agrees"


def test_what_is_within_noise_is_called_so() -> None:
    found = [*rows("a", [0.95, 0.90]), *rows("b", [0.94, 0.92])]
    for claim in (Claim("", "a", "b"), Claim("", "b", "a")):
        verdict = judge(claim, found)
        assert verdict is not None
        assert verdict.found == "within noise"
    assert judge(Claim("", "a", "c"), found) is None


def test_the_page_has_every_variant_and_claim(tmp_path: Path) -> None:
    found = [*rows("dense & plain", [0.95, 0.96], 1.0), *rows("b", [0.94, 0.95])]
    page = write_comparison(tmp_path, "two on nothing", found, [Claim("b < dense", "dense & plain", "b")]).read_text()
    assert "<svg" in page
    assert "dense &amp; plain" in page
    assert "b &lt; dense" in page
    assert "+1.00 points" in page
    assert "95.50 ± 0.71 %" in page
    kept = json.loads((tmp_path / "comparison.json").read_text())
    assert kept["claims"][0]["found"] == "agrees"
    assert len(kept["rows"]) == 4


def test_one_network_at_many_costs_has_a_figure_of_its_own(tmp_path: Path) -> None:
    found = [
        {"variant": name, "seed": seed, "accuracy": 0.9 + target / 10, "macs_share": target + 0.011, "target": target}
        for name in ("calibrated both", "calibrated gates")
        for seed in range(2)
        for target in (0.3, 0.5)
    ]
    page = write_comparison(tmp_path, "calibrated", [*rows("ddi", [0.9, 0.9]), *found], []).read_text()
    _, _, curves = page.partition("One network, many costs")
    assert page.count("<svg") == 2
    assert "<td>30 %</td><td>31.1 %</td><td>1.1</td><td>93.00 ± 0.00 %</td>" in curves


def enough_digits(size: int, seed: int) -> datasets.Data:
    """Enough for calibration, on every second of them."""
    found = ALL_DIGITS(size, seed)
    val: Any = copy.copy(found.val)
    val.pixels, val.labels = val.pixels[:100], val.labels[:100]
    return dataclasses.replace(found, val=val)


@pytest.mark.parametrize("study", ["skipnet", "ddi", "densenet"])
def test_a_study_runs_and_does_not_run_twice(study: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps of everything: each claim has its two variants, with the same seed."""
    prepare(monkeypatch)
    monkeypatch.setattr(datasets, "digits", enough_digits)
    monkeypatch.setattr(compare, "FRACTIONS", (0.5,))
    monkeypatch.setattr(results, "write_report", no_report)
    arguments = [study, "--output", tmp_path, "--seed", 3, "--max-steps", 2, "--threads", 1, "--image-size", 16]
    monkeypatch.setattr(sys, "argv", ["compare", *map(str, arguments)])
    for _ in range(2):
        with pytest.raises(SystemExit) as ended:
            options.command(compare.main)
        assert not ended.value.code
        monkeypatch.setattr(compare, "run", lambda *args: pytest.fail("a finished run was run again"))
    if study == "densenet":
        monkeypatch.setattr(sys, "argv", ["compare", *map(str, arguments[:-1]), "24"])
        with pytest.raises(SystemExit) as ended:
            options.command(compare.main)
        assert ended.value.code == 1, "of other settings"
    kept = json.loads((tmp_path / "comparison.json").read_text())
    assert {row["seed"] for row in kept["rows"]} == {3}
    _, claims, _ = compare.STUDIES[study]
    wanted = [claim.text for claim in claims if "calibrat" not in claim.text]
    assert [claim["text"] for claim in kept["claims"] if "calibrat" not in claim["text"]] == wanted
    assert all(claim["seeds"] == 1 for claim in kept["claims"])
