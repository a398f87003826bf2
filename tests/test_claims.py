"""The papers' claims: judged by what was measured, never without it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

import timm_dynamic as td
from timm_dynamic import claim_numbers as numbers
from timm_dynamic.analyses import ClassRow, Difference, Observed, Scale
from timm_dynamic.claims import NOT_RUN, Evidence, Study, dataset_of, judge_all, read_study, verdict
from timm_dynamic.feature_change import Change
from timm_dynamic.paper_claims import PAPER_CLAIMS
from timm_dynamic.trade_off import Network, Point

GATED = [f"layer{stage}.{k}" for stage in (1, 2, 3) for k in range(3)][1:]


def network(
    name: str = "skipnet_resnet20_cifar",
    skips: dict[str, float] | None = None,
    share: float = 0.5,
    accuracy: float = 0.5,
    **settings: Any,
) -> Network:
    """A network of which 100 images, in two classes, are known to have skipped so."""
    model = timm.create_model(name, num_classes=10)
    table = td.cost_table(model, (3, 32, 32))
    gates = sum(unit.skippable for unit in table.units)
    names = [unit.name for unit in table.units if unit.skippable]
    keep = torch.ones(100, gates, dtype=torch.bool)
    for unit, skip in (skips or {}).items():
        keep[: round(100 * skip), names.index(unit)] = False
    rows: dict[str, Tensor] = {
        "layers": keep,
        "channels": torch.zeros(100, 0, dtype=torch.bool),
        "correct": torch.arange(100) < 100 * accuracy,
        "macs": torch.full((100,), round(share * table.dense)),
        "exit": torch.zeros(100, dtype=torch.long),
        "classes": torch.arange(100) % 2,
    }
    return Network(name, model, Observed(table, rows), settings)


@pytest.fixture(scope="module")
def bare() -> Evidence:
    return Evidence(network())


def found(outcome: numbers.Outcome | None) -> str:
    assert outcome is not None
    assert outcome.number
    return outcome.found


def test_without_evidence_nothing_is_judged(bare: Evidence) -> None:
    rows = judge_all(bare, PAPER_CLAIMS)
    assert len(rows) == len(PAPER_CLAIMS) >= 25
    own = {"first and last units of a stage matter most", "the second stage is skipped least"}
    own |= {"layer skipping keeps the first unit of each stage"}  # the network's own skip ratios are there
    for row in rows:
        assert (row.found == NOT_RUN) == (row.claim not in own)
        assert (row.number == "") == (row.found == NOT_RUN)
        assert row.command.startswith(("timm-dynamic ", "accelerate launch train_recipes/"))
        assert row.source.startswith(("SkipNet", "DDI"))


def test_commands_name_files_that_are_there() -> None:
    root = Path(__file__).parent.parent
    words = {word.rstrip(";,") for claim in PAPER_CLAIMS for word in claim.command.split()}
    files = {word for word in words if word.startswith("train_recipes/")}
    assert len(files) > 5
    assert all((root / file).is_file() for file in files)
    models = {word for word in words if word.startswith(("skipnet_", "iadi_")) and "." not in word}
    assert len(models) > 5
    assert all(timm.is_model(model) for model in models)


def test_verdicts() -> None:
    assert [verdict(v, 0.1) for v in (0.2, 0.05, -0.1, -0.2)] == ["agrees", "within noise", "within noise", "disagrees"]


# Accuracy and cost ---------------------------------------------------------------------------------------------------


def test_reduction_at_equal_accuracy(bare: Evidence) -> None:
    dense = (0.9, 100.0)
    half = Point("net", "dynamic", "", 0.897, 50.0, 60.0)
    assert found(numbers.reduction(replace(bare, dense=dense, equal=half))) == "agrees"
    assert found(numbers.reduction(replace(bare, dense=dense, equal=replace(half, macs=99.9)))) == "within noise"
    assert found(numbers.reduction(replace(bare, dense=dense))) == "disagrees"
    assert numbers.reduction(replace(bare, equal=half)) is None


def test_a_published_saving_is_only_that_networks_on_that_data() -> None:
    half = Point("net", "dynamic", "", 0.9, 48.0, 60.0)
    evidence = Evidence(network("skipnet_resnet38_cifar"), "cifar10", dense=(0.9, 100.0), equal=half)
    find = numbers.published("resnet38", "cifar10", 0.5)
    assert found(find(evidence)) == "agrees"
    assert found(find(replace(evidence, equal=replace(half, macs=60.0)))) == "disagrees"
    assert numbers.published("resnet110", "cifar10", 0.5)(evidence) is None
    assert find(replace(evidence, dataset="cifar100")) is None
    assert not numbers.is_base(network("skipnet_resnet110_cifar"), "resnet11")


def test_sp_alone_needs_a_run_without_cost_term() -> None:
    free = network(share=0.8, method="sp", target=None, stages=[{"alpha": None}, {"alpha": 0}])
    assert found(numbers.sp_alone(Evidence(free))) == "agrees"
    steered = network(share=0.8, method="sp", target=0.8, stages=[{"alpha": None}])
    assert numbers.sp_alone(Evidence(steered)) is None
    assert found(numbers.sp_alone(Evidence(steered, beside=[free]))) == "agrees"
    assert found(numbers.sp_alone(Evidence(replace(free, observed=network(share=1.0).observed)))) == "within noise"


def test_hrl_adds_ten_points() -> None:
    sp, hrl = network(share=0.8, method="sp", model="m"), network(share=0.65, method="sp+hrl", model="m")
    assert found(numbers.hrl_adds(Evidence(hrl, beside=[sp]))) == "agrees"
    little = network(share=0.75, method="sp+hrl", model="m")
    assert found(numbers.hrl_adds(Evidence(little, beside=[sp]))) == "disagrees"
    assert numbers.hrl_adds(Evidence(hrl, beside=[network(share=0.8, method="sp", model="other")])) is None
    assert numbers.hrl_adds(Evidence(hrl)) is None


def test_depth_gates_and_alpha() -> None:
    alike = {"method": "sp", "gate": "rnn", "alpha": 0.1}
    shallow = network(share=0.8, **alike)
    deep = network("skipnet_resnet38_cifar", share=0.6, **alike)
    assert found(numbers.deeper(Evidence(shallow, beside=[deep]))) == "agrees"
    assert numbers.deeper(Evidence(shallow)) is None
    ff = network(share=0.9, method="sp", gate="ff1", alpha=0.1)
    assert found(numbers.rnn_beats_ff(Evidence(shallow, beside=[ff]))) == "agrees"
    assert found(numbers.rnn_beats_ff(Evidence(ff, beside=[network(share=0.95, **alike)]))) == "disagrees"
    cheaper = network(share=0.6, accuracy=0.48, method="sp", gate="rnn", alpha=0.5)
    assert found(numbers.over_alpha(Evidence(shallow, beside=[cheaper]))) == "agrees"
    worse = network(share=0.7, accuracy=0.2, method="sp", gate="rnn", alpha=0.5)
    assert found(numbers.over_alpha(Evidence(shallow, beside=[worse]))) == "disagrees"
    assert numbers.over_alpha(Evidence(shallow)) is None


# Studies -------------------------------------------------------------------------------------------------------------


def rows(**accuracies: float) -> list[dict[str, Any]]:
    return [
        {"variant": name, "seed": seed, "accuracy": accuracy + seed / 1000, "macs_share": 0.5}
        for name, accuracy in accuracies.items()
        for seed in range(3)
    ]


def test_variants_of_a_study_are_judged(bare: Evidence) -> None:
    find = numbers.between("hard beats soft", "sp", "soft")
    assert found(find(replace(bare, studies=[Study("digits", rows(sp=0.9, soft=0.5), [])]))) == "agrees"
    assert found(find(replace(bare, studies=[Study("digits", rows(sp=0.4, soft=0.5), [])]))) == "disagrees"
    assert find(replace(bare, studies=[Study("digits", rows(sp=0.4), [])])) is None


def test_training_time_from_timed_steps(bare: Evidence) -> None:
    def steps(sp: float, hrl: float) -> Evidence:
        timed = [{"task": "base", "ratio": 1.0}, {"task": "SP", "ratio": sp}, {"task": "HRL", "ratio": hrl}]
        return replace(bare, studies=[Study("steps", timed, [])])

    outcome = numbers.training_time(steps(1.1, 1.28))
    assert outcome is not None
    assert outcome.number.startswith("+30 %")
    assert outcome.found == "agrees"
    assert found(numbers.training_time(steps(1.5, 1.5))) == "disagrees"
    assert numbers.training_time(bare) is None


def test_studies_are_read(tmp_path: Path) -> None:
    path = tmp_path / "comparison.json"
    path.write_text(json.dumps({"title": "t", "rows": rows(sp=0.9), "claims": []}))
    assert read_study(path) == Study("t", rows(sp=0.9), [])
    path.write_text(json.dumps([{"task": "SP", "ratio": 1.1}]))
    assert read_study(path).rows == [{"task": "SP", "ratio": 1.1}]
    for wrong in ({"rows": []}, [], [{"engine": "dense"}], 3):
        path.write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match="is no study"):
            read_study(path)


# Images and units ----------------------------------------------------------------------------------------------------


def test_looks_need_a_small_p(bare: Evidence) -> None:
    brighter = Difference("brightness", 0.6, 0.4, 0.8, 0.001, 0.5, 0.9)
    find = numbers.look("brightness")
    assert found(find(replace(bare, looks=[brighter]))) == "agrees"
    assert found(find(replace(bare, looks=[replace(brighter, effect=0.2)]))) == "disagrees"
    assert found(find(replace(bare, looks=[replace(brighter, p=0.2)]))) == "within noise"
    assert found(find(replace(bare, alike=True))) == "within noise"
    assert numbers.look("contrast")(replace(bare, looks=[brighter])) is None


def test_scales_and_classes(bare: Evidence) -> None:
    few, many = torch.tensor([1, 2, 1, 2, 1, 2, 1, 2]), torch.tensor([4, 4, 3, 5, 6, 4, 3, 6])
    small, large = Scale(0.5, (16, 16), 0.5, few, few - few), Scale(1.5, (48, 48), 0.5, many, many - few)
    assert found(numbers.larger_scales(replace(bare, scales=[small, large]))) == "agrees"
    turned = [replace(small, ran=many), replace(large, ran=few)]
    assert found(numbers.larger_scales(replace(bare, scales=turned))) == "disagrees"
    assert found(numbers.larger_scales(replace(bare, scales=[small, replace(large, ran=few)]))) == "within noise"
    classes = [ClassRow(k, str(k), 10, 0.5, 1.0, 1.0) for k in range(4)]
    assert found(numbers.easy_classes(replace(bare, classes=classes, class_rank=(0.9, 0.01)))) == "agrees"
    assert found(numbers.easy_classes(replace(bare, classes=classes, class_rank=(-0.9, 0.01)))) == "disagrees"
    assert found(numbers.easy_classes(replace(bare, classes=classes, class_rank=(0.4, 0.3)))) == "within noise"


def test_first_and_last_units() -> None:
    edges = {"layer1.2": 0.1, "layer2.0": 0.0, "layer2.2": 0.1, "layer3.0": 0.0, "layer3.2": 0.1}
    between = {"layer1.1": 0.5, "layer2.1": 0.5, "layer3.1": 0.5}
    assert found(numbers.edges_matter(Evidence(network(skips=edges | between)))) == "agrees"
    assert found(numbers.edges_matter(Evidence(network(skips=edges)))) == "disagrees"
    assert found(numbers.edges_matter(Evidence(network()))) == "within noise"
    assert found(numbers.firsts_kept(False)(Evidence(network(skips=between)))) == "agrees"
    assert found(numbers.firsts_kept(False)(Evidence(network(skips={"layer2.0": 0.9})))) == "disagrees"
    assert numbers.firsts_kept(True)(Evidence(network(skips=between))) is None  # no channel gates


def test_the_second_stage() -> None:
    outer = {"layer1.1": 0.5, "layer3.1": 0.5}
    assert found(numbers.second_stage(Evidence(network(skips=outer)))) == "agrees"
    assert found(numbers.second_stage(Evidence(network(skips={"layer2.1": 0.9})))) == "disagrees"


def test_hrl_skips_more_on_every_class() -> None:
    sp = network(skips={"layer1.1": 0.2}, method="sp", model="m")
    hrl = network(skips={"layer1.1": 0.2, "layer2.1": 0.5}, method="sp+hrl", model="m")
    assert found(numbers.hrl_skips_more(Evidence(hrl, beside=[sp]))) == "agrees"
    same = network(skips={"layer1.1": 0.2}, method="sp+hrl", model="m")
    assert found(numbers.hrl_skips_more(Evidence(same, beside=[sp]))) == "disagrees"


def test_channels_degrade_more_gradually(bare: Evidence) -> None:
    def changes(layers: float, channels: float) -> list[Change]:
        return [
            Change(kind, keep, keep, 0.9 - far * (1 - keep), (far * (1 - keep),), 0.001, 1000)
            for kind, far in (("layers", layers), ("channels", channels))
            for keep in (0.9, 0.5)
        ]

    for accuracy in (False, True):
        find = numbers.gradual(accuracy)
        assert found(find(replace(bare, changes=changes(0.8, 0.2)))) == "agrees"
        assert found(find(replace(bare, changes=changes(0.2, 0.8)))) == "disagrees"
        assert found(find(replace(bare, changes=changes(0.3, 0.3)))) == "within noise"
        assert find(bare) is None


def test_networks_of_the_papers_tables() -> None:
    half = network("skipnet_resnet38_cifar", share=0.5, accuracy=0.92)
    assert found(numbers.at_half("resnet38", 0.92)(Evidence(half, "cifar10"))) == "agrees"
    assert found(numbers.at_half("resnet38", 0.95)(Evidence(half, "cifar10"))) == "disagrees"
    assert numbers.at_half("resnet74", 0.92)(Evidence(half, "cifar10")) is None
    ours, other = network("iadi_resnet20_cifar", accuracy=0.9, share=0.4), network(accuracy=0.5)
    find = numbers.imagenet_pair("iadi_resnet20_cifar", "skipnet_resnet20_cifar")
    assert found(find(Evidence(ours, "imagenet", beside=[other]))) == "agrees"
    assert find(Evidence(ours, "cifar10", beside=[other])) is None


def test_the_data_set_is_known_by_settings_or_classes() -> None:
    assert dataset_of({"dataset": "svhn"}, ["a"]) == "svhn"
    names = ["truck", "ship", "horse", "frog", "dog", "deer", "cat", "bird", "automobile", "airplane"]
    assert dataset_of({"dataset": "folder"}, names) == "cifar10"
    assert dataset_of({}, [str(k) for k in range(1000)]) == "imagenet"
    assert dataset_of({}, ["cat", "dog"]) is None
