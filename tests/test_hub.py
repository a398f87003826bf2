"""Saving to a folder and to the Hub, and what is refused when loading.

What needs a Hub runs in processes of their own against the server of `fake_hub.py`: the real client reads its
settings when it is imported.
"""

import io
import json
import logging
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from fake_hub import FakeHub, Repo
from huggingface_hub import HfApi, ModelCard, constants
from torch import Tensor, nn

import timm_dynamic as td
from timm_dynamic import card, hub, registry, safety

SUMMARY = {
    "dense": {"accuracy": 0.91, "macs": 40_000_000},
    "dynamic": {"accuracy": 0.9, "macs": 22_000_000.5, "max_macs": 31_000_000, "keep_ratio": 0.5},
    "exits": [{"exit": 0, "accuracy": 0.7, "macs": 9_000_000, "max_macs": 9_000_000}],
    "budgets": [{"budget": 20_000_000, "accuracy": 0.86, "macs": 15_000_000, "max_macs": 19_000_000}],
    "dataset": "cifar10",
    "training": "By hand, in a test.",
}
RANDOM_GATES: dict[str, Any] = {"layer_gates": {"kind": "linear", "init": "random"}}


def alive(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give batch norms weights and statistics that matter."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.bias.data, module.running_mean, module.running_var):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return model.eval()


def made(name: str, seed: int = 0, **kwargs: Any) -> nn.Module:
    torch.manual_seed(seed)
    return alive(timm.create_model(name, **kwargs), seed)


def images(channels: int = 3, size: int = 32) -> Tensor:
    return torch.randn(4, channels, size, size, generator=torch.Generator().manual_seed(1))


def loaded(folder: Path, **kwargs: Any) -> nn.Module:
    return timm.create_model(f"local-dir:{folder}", pretrained=True, **kwargs).eval()


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def hand_built() -> nn.Module:
    model = made("resnet18", num_classes=3, in_chans=1, global_pool="max")
    return td.add_exits(td.add_layer_gates(model, "ff2"), td.ExitConfig(after=("layer2",)))


MODELS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "plain": (lambda: made("resnet20_cifar", num_classes=5), "resnet20_cifar"),
    "skipnet": (lambda: made("skipnet_resnet20_cifar", in_chans=1, **RANDOM_GATES), "skipnet_resnet20_cifar"),
    "iadi": (
        lambda: made("iadi_resnet20_cifar", channel_gates={"mode": "nested", "init": "random"}),
        "iadi_resnet20_cifar",
    ),
    "ddi": (lambda: td.set_budget(made("ddi_resnet20_cifar", **RANDOM_GATES), fraction=0.8), "ddi_resnet20_cifar"),
    "ddi without gates": (lambda: made("ddi_densenet100_cifar", layer_gates=False), "ddi_densenet100_cifar"),
    "hand-built": (hand_built, "ddi_resnet18"),
    "stripped": (lambda: td.strip(made("skipnet_resnet20_cifar", **RANDOM_GATES)), "resnet20_cifar"),
}


# Folders -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MODELS)
def test_round_trip_is_exact(kind: str, tmp_path: Path) -> None:
    model, name = MODELS[kind][0](), MODELS[kind][1]
    hub.save_pretrained(model, tmp_path / "one", metrics={"accuracy": 0.5})
    assert sorted(files_of(tmp_path / "one")) == ["README.md", "config.json", "model.safetensors"]
    again = loaded(tmp_path / "one")
    assert again.pretrained_cfg["architecture"] == name
    assert type(again) is type(model)
    x = images(model.in_chans, 64 if "18" in name else 32)
    assert torch.equal(again(x), model(x))
    mine, theirs = model.state_dict(), again.state_dict()
    assert list(mine) == list(theirs)
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    for part in ("layer_gates", "channel_gates", "exits"):
        assert hasattr(again, part) == hasattr(model, part)
        if hasattr(model, part):
            assert getattr(again, part).config == getattr(model, part).config
    if hasattr(model, "dynamic"):
        assert again.dynamic.budget == model.dynamic.budget
        assert torch.equal(td.decide(again, x).macs, td.decide(model, x).macs)
    hub.save_pretrained(again, tmp_path / "two", metrics={"accuracy": 0.5})
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")


def test_saved_arguments_can_be_overridden(tmp_path: Path) -> None:
    hub.save_pretrained(MODELS["ddi"][0](), tmp_path)
    assert loaded(tmp_path, budget=False).dynamic.budget is None
    smaller = loaded(tmp_path, num_classes=4)
    assert [logits.shape[1] for logits in smaller.train()(images())] == [4, 4, 4]


def test_saving_leaves_the_model_and_the_generator_alone(tmp_path: Path) -> None:
    model = MODELS["ddi"][0]().train()
    before, state = model.state_dict(), torch.get_rng_state()
    hub.save_pretrained(model, tmp_path)
    assert model.training
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_no_path_is_written(tmp_path: Path) -> None:
    hub.save_pretrained(MODELS["ddi"][0](), tmp_path / "one", metrics=SUMMARY)
    hub.save_pretrained(loaded(tmp_path / "one"), tmp_path / "two", metrics=SUMMARY)
    assert not any(str(tmp_path).encode() in content for content in files_of(tmp_path / "two").values())


def test_channels_last_and_shared_weights_are_saved(tmp_path: Path) -> None:
    model = made("resnet20_cifar").to(memory_format=torch.channels_last)
    model.layer1[1].conv1.weight = model.layer1[0].conv1.weight
    hub.save_pretrained(model, tmp_path)
    assert torch.equal(loaded(tmp_path).layer1[1].conv1.weight, model.layer1[0].conv1.weight)


def test_the_prefixes_are_those_of_the_registry() -> None:
    parts = {
        f"{name}_": tuple(part for part, there in method._asdict().items() if there)
        for name, method in registry.METHODS.items()
    }
    assert parts == hub.PREFIXES


def pruned() -> nn.Module:
    model = made("resnet20_cifar")
    model.prune_intermediate_layers([1])
    return model


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: nn.Linear(2, 2), "only models of timm, and ResNets .* can be saved; found Linear"),
        (lambda: timm.create_model("skipnet_resnet20_cifar", device="meta"), "meta device"),
        (pruned, "changed after it was made"),
    ],
)
def test_models_that_cannot_be_saved(build: Callable[[], nn.Module], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        hub.save_pretrained(build(), tmp_path)
    assert not files_of(tmp_path)


@pytest.mark.parametrize("metrics", [{"accuracy": float("nan")}, {"accuracy": torch.tensor(1)}])
def test_metrics_must_be_plain(metrics: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="metrics must be plain values"):
        hub.save_pretrained(made("resnet20_cifar"), tmp_path, metrics=metrics)
    assert not files_of(tmp_path)


def test_a_failed_save_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.save_pretrained(made("resnet20_cifar"), tmp_path)
    before = files_of(tmp_path)

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(hub, "save_file", full)
    with pytest.raises(OSError, match="no space"):
        hub.save_pretrained(made("skipnet_resnet20_cifar", seed=1), tmp_path)
    assert files_of(tmp_path) == before


# The card ------------------------------------------------------------------------------------------------------------


def test_the_card_says_what_was_measured(tmp_path: Path) -> None:
    hub.save_pretrained(MODELS["ddi"][0](), tmp_path, metrics=SUMMARY)
    written = ModelCard.load(tmp_path / "README.md")
    data = written.data.to_dict()
    assert data["license"] == "mit"
    assert data["library_name"] == "timm"
    assert data["pipeline_tag"] == "image-classification"
    assert data["datasets"] == ["uoft-cs/cifar10"]
    found = {(result.metric_name, result.metric_value) for result in written.data.eval_results}
    assert ("Accuracy (without budget)", 0.9) in found
    assert ("MACs (budget 20.00 M)", 15_000_000) in found
    assert "| budget 20.00 M | 86.00% | 15.00 M | 37.5% | 19.00 M |" in written.text
    assert "By hand, in a test." in written.text
    assert json.loads((tmp_path / "config.json").read_text())["metrics"] == SUMMARY


def test_the_card_of_a_plain_network() -> None:
    text = card.model_card(made("resnet20_cifar"), "resnet20_cifar", "resnet20_cifar", "local-dir:FOLDER")
    assert "| MACs of the base network | 40.81 M |" in text
    assert "td.decide" not in text
    other = timm.create_model("vit_tiny_patch16_224", device="meta")
    assert "not counted" in card.model_card(other, "vit_tiny_patch16_224", "vit_tiny_patch16_224", "local-dir:FOLDER")


def test_the_card_names_the_base_weights() -> None:
    model = timm.create_model("skipnet_resnet18.a1_in1k", device="meta")
    text = card.model_card(model, "skipnet_resnet18", "resnet18", "hf-hub:org/name")
    data = ModelCard(text).data
    assert data.base_model == "timm/resnet18.a1_in1k"
    assert data.datasets == ["ILSVRC/imagenet-1k"]
    assert 'timm.create_model("hf-hub:org/name", pretrained=True)' in text
    assert "No results were recorded" in text


def test_the_budget_in_the_card_can_be_set(tmp_path: Path) -> None:
    model = MODELS["ddi"][0]()
    hub.save_pretrained(model, tmp_path)
    line = next(line for line in (tmp_path / "README.md").read_text().splitlines() if "set_budget" in line)
    td.set_budget(model, macs=int(line.split("macs=")[1].split(")")[0]))


def test_the_card_says_how_sure_an_image_is_that_leaves() -> None:
    model, row = MODELS["ddi"][0](), {"accuracy": 0.5, "macs": 1, "policies": None}
    for metrics, said in (({"dynamic": row}, False), ({"dynamic": {**row, "confidence": [0.9, 2.0]}}, True)):
        text = card.model_card(model, "a", "resnet20_cifar", "local-dir:a", metrics)
        assert ("images leave at the first exit where they are sure enough: 0.9, never" in text) == said


def test_a_card_that_was_taken_over_is_kept(tmp_path: Path) -> None:
    model = made("resnet20_cifar")
    hub.save_pretrained(model, tmp_path)
    hub.save_pretrained(model, tmp_path, metrics={"accuracy": 0.25})
    written = (tmp_path / "README.md").read_text()
    assert "25.00%" in written
    (tmp_path / "README.md").write_text(written.replace(card.MARK, "My words."))
    hub.save_pretrained(model, tmp_path, metrics={"accuracy": 0.75})
    assert (tmp_path / "README.md").read_text().rstrip().endswith("My words.")
    assert json.loads((tmp_path / "config.json").read_text())["metrics"] == {"accuracy": 0.75}


# What is refused -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    hub.save_pretrained(MODELS["ddi"][0](), folder)
    return folder


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    for name, content in files_of(sound).items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


EVIL: list[tuple[dict[str, Any], str]] = [
    ({"layer_gates": {"kind": "exec"}}, "kind of layer gate must be one of"),
    ({"layer_gates": {"kind": "ff1", "code": "x"}}, "'code'"),
    ({"layer_gates": {"kind": "ff1", "width": 10**9}}, "width"),
    ({"channel_gates": {"mode": "os.system"}}, "mode of channel gate"),
    ({"exits": {"after": "../../etc/passwd"}}, "after must be"),
    ({"budget": {"macs": -1}}, "macs must be"),
    ({"num_classes": 10**12}, "num_classes=1000000000000"),
    ({"num_classes": -5}, "num_classes=-5"),
    ({"num_classes": 2**22, "global_pool": "catavgmax", "in_chans": 2**22}, "parameters: at most"),
    ({"layers": [10**6, 1, 1]}, "layers that is too large"),
    ({"block_args": {"attn_layer": {"a": {"b": {"c": {"d": 1}}}}}}, "block_args that is too large"),
    ({"act_layer": "../relu"}, "a path is not an argument"),
    ({"checkpoint_path": "/etc/passwd"}, "a path is not an argument"),
    ({"norm_layer": float("inf")}, "norm_layer=inf"),
]


@pytest.mark.parametrize("pretrained", [False, True])
@pytest.mark.parametrize(("arguments", "message"), EVIL, ids=[message for _, message in EVIL])
def test_arguments_that_are_refused(arguments: dict[str, Any], message: str, pretrained: bool, folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["model_args"].update(arguments)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(safety.UnsafeModelError, match=message):
        timm.create_model(f"local-dir:{folder}", pretrained=pretrained)


@pytest.mark.parametrize("pretrained", [False, True])
@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"num_classes": 2 * 10**9}, "num_classes=2000000000"),
        ({"num_classes": 2**22}, "parameters: at most"),
        ({"num_classes": -3}, "num_classes=-3"),
        ({"num_classes": "ten"}, "num_classes='ten'"),
        ({"input_size": [10**9, 32, 32]}, "input_size=1000000000"),
        ({"input_size": [2**22, 32, 32], "num_classes": 2**21}, "parameters: at most"),
        ({"input_size": "x"}, "input_size='x'"),
    ],
)
def test_sizes_that_only_the_config_names_are_refused(
    asked: dict[str, Any], message: str, pretrained: bool, folder: Path
) -> None:
    config = json.loads((folder / "config.json").read_text())
    for name in ("num_classes", "in_chans"):
        del config["model_args"][name]
    config["model_args"]["global_pool"] = "catavgmax"
    config["pretrained_cfg"].update(asked)
    config["num_classes"] = config["pretrained_cfg"]["num_classes"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(safety.UnsafeModelError, match=message):
        timm.create_model(f"local-dir:{folder}", pretrained=pretrained)


def test_plain_cifar_networks_are_checked_too(tmp_path: Path) -> None:
    hub.save_pretrained(made("resnet20_cifar"), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["model_args"]["layers"] = [10**6, 1, 1]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(safety.UnsafeModelError, match="layers that is too large"):
        loaded(tmp_path)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"file": "/etc/passwd"}, "outside of it"),
        ({"url": "http://127.0.0.1/evil.pth"}, "outside of it"),
        ({"hf_hub_filename": "../other.safetensors"}, "wanted 'model.safetensors'"),
        ({"hf_hub_filename": "pytorch_model.bin"}, "wanted 'model.safetensors'"),
        ({"custom_load": True}, "a format of its own"),
    ],
)
def test_weights_from_elsewhere_are_refused(asked: dict[str, Any], message: str, folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["pretrained_cfg"].update(asked)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(safety.UnsafeModelError, match=message):
        loaded(folder)


def test_a_file_that_was_cut_off_is_refused(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(safety.UnsafeModelError, match="cut off"):
        loaded(folder)


def test_only_safetensors_are_loaded(folder: Path) -> None:
    torch.save(MODELS["ddi"][0]().state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(safety.UnsafeModelError, match=r"has no model\.safetensors"):
        loaded(folder)


# The Hub -------------------------------------------------------------------------------------------------------------

Client = Callable[..., Any]


@pytest.fixture(scope="module")
def server() -> Iterator[FakeHub]:
    with FakeHub({"good": "org", "other": "someone"}) as running:
        yield running


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


def start(endpoint: str, home: Path, offline: bool) -> tuple[ProcessPoolExecutor, Client]:
    """A process whose client of the Hub has these settings, and a way to call functions there."""
    settings = {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_TOKEN": "good",
        "HF_HUB_OFFLINE": str(int(offline)),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(("HF_", "HUGGINGFACE_"))]:
            patch.delenv(name)
        for name, value in settings.items():
            patch.setenv(name, value)
        pool.submit(os.getpid).result(timeout=60)
    return pool, lambda function, *args, **kwargs: pool.submit(function, *args, **kwargs).result(timeout=60)


@pytest.fixture(scope="module")
def online(server: FakeHub, home: Path) -> Iterator[Client]:
    pool, client = start(server.url, home, offline=False)
    yield client
    pool.shutdown()


def push(repo: str, seed: int = 0, fraction: float = 0.8, **kwargs: Any) -> tuple[str, Tensor]:
    """In a client's process: push a model; its commit and what it computes."""
    model = td.set_budget(made("ddi_resnet20_cifar", seed, **RANDOM_GATES), fraction=fraction)
    return hub.push_to_hub(model, repo, **kwargs).oid, model(images()).detach()


def pull(repo: str, **kwargs: Any) -> tuple[Tensor, float]:
    """In a client's process: load a model; what it computes, and its budget."""
    with hub.hub_errors(repo):
        model = timm.create_model(f"hf-hub:{repo}", pretrained=True, **kwargs).eval()
    return model(images()).detach(), model.dynamic.budget.fraction


def with_token(token: str | None, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """In a client's process: call a function as someone else."""
    before = os.environ.pop("HF_TOKEN")
    try:
        if token is not None:
            os.environ["HF_TOKEN"] = token
        return function(*args, **kwargs)
    finally:
        os.environ["HF_TOKEN"] = before


def without_network(function: Callable[..., Any], *args: Any) -> Any:
    """In a client's process: call a function while nothing answers."""
    before, constants.ENDPOINT = constants.ENDPOINT, "http://127.0.0.1:9"
    try:
        return function(*args)
    finally:
        constants.ENDPOINT = before


def listed(author: str) -> list[tuple[str, str | None, bool]]:
    return [(model.id, model.library_name, model.private) for model in HfApi().list_models(author=author)]


def tag(repo: str, name: str) -> None:
    HfApi().create_tag(repo, tag=name)


def branch_of(server: FakeHub, repo: str, branch: str = "main") -> dict[str, bytes]:
    found = server.repos[repo]
    return found.commits[found.branches[branch]]


def test_push_list_and_load(server: FakeHub, online: Client) -> None:
    oid, expected = online(push, "org/first", metrics=SUMMARY)
    assert server.repos["org/first"].branches["main"] == oid
    assert len(server.repos["org/first"].commits) == 2  # the empty repository, and one commit with everything
    assert set(branch_of(server, "org/first")) == {".gitattributes", "README.md", "config.json", "model.safetensors"}
    assert ("org/first", "timm", False) in online(listed, "org")
    logits, fraction = online(pull, "org/first")
    assert torch.equal(logits, expected)
    assert fraction == 0.8
    assert b'timm.create_model("hf-hub:org/first", pretrained=True)' in branch_of(server, "org/first")["README.md"]


def test_the_same_content_makes_no_commit(server: FakeHub, online: Client) -> None:
    first, _ = online(push, "org/same")
    again, _ = online(push, "org/same")
    assert again == first
    assert len(server.repos["org/same"].commits) == 2
    online(push, "org/same", seed=1)
    assert len(server.repos["org/same"].commits) == 3


def test_tags_commits_and_branches(server: FakeHub, online: Client) -> None:
    first, old = online(push, "org/history")
    online(tag, "org/history", "v1")
    _, new = online(push, "org/history", seed=1)
    _, beside = online(push, "org/history", seed=2, revision="dev")
    assert not torch.equal(old, new)
    for revision, expected in (("v1", old), (first, old), ("main", new), ("dev", beside)):
        assert torch.equal(online(pull, f"org/history@{revision}")[0], expected)
    assert sorted(server.repos["org/history"].branches) == ["dev", "main"]
    with pytest.raises(hub.HubError, match="no such revision"):
        online(pull, "org/history@v2")


def test_a_private_repository(server: FakeHub, online: Client, tmp_path: Path) -> None:
    _, expected = online(push, "org/secret", private=True)
    assert server.repos["org/secret"].private
    assert torch.equal(online(pull, "org/secret")[0], expected)
    for token in ("other", None):
        with pytest.raises(hub.HubError, match=r"^org/secret does not exist or is private: .*$"):
            online(with_token, token, pull, "org/secret", cache_dir=tmp_path)
    with pytest.raises(hub.HubError, match="does not accept the token"):
        online(with_token, "bad", pull, "org/secret", cache_dir=tmp_path)
    online(push, "org/open")
    with pytest.raises(hub.HubError, match="exists and is public"):
        online(push, "org/open", private=True)


@pytest.mark.parametrize("step", ["/lfs/", "/api/models/org/broken/commit"])
def test_an_interrupted_upload_shows_nothing(step: str, server: FakeHub, online: Client) -> None:
    server.repos.pop("org/broken", None)
    server.objects.clear()
    server.broken = step
    try:
        with pytest.raises(hub.HubError, match="the connection broke"):
            online(push, "org/broken")
    finally:
        server.broken = ""
    assert set(branch_of(server, "org/broken")) == {".gitattributes"}
    _, expected = online(push, "org/broken")
    assert torch.equal(online(pull, "org/broken")[0], expected)


def test_a_card_written_by_hand_is_kept(server: FakeHub, online: Client) -> None:
    online(push, "org/card")
    mine = {**branch_of(server, "org/card"), "README.md": b"---\nlicense: mit\n---\n\n# Mine\n"}
    server.repos["org/card"].commit(mine, "main")
    online(push, "org/card", seed=1)
    assert branch_of(server, "org/card")["README.md"] == mine["README.md"]
    assert branch_of(server, "org/card")["model.safetensors"] != mine["model.safetensors"]


def test_a_card_that_could_not_be_asked_for_is_kept(server: FakeHub, online: Client) -> None:
    """A Hub that does not answer has not said that there is no card."""
    online(push, "org/unheard")
    mine = {**branch_of(server, "org/unheard"), "README.md": b"# Mine\n"}
    server.repos["org/unheard"].commit(mine, "main")
    server.broken = "/org/unheard/resolve/"
    try:
        with pytest.raises(hub.HubError):
            online(push, "org/unheard", seed=1)
    finally:
        server.broken = ""
    assert branch_of(server, "org/unheard") == mine


@pytest.mark.parametrize(
    ("token", "repo", "message"),
    [
        (None, "org/x", "no token to write to org/x: run `hf auth login`, set HF_TOKEN or pass token="),
        ("bad", "org/x", "the Hub does not accept the token for org/x"),
        ("other", "org/x", "the token may not write to org/x"),
    ],
)
def test_push_errors_are_one_line(token: str | None, repo: str, message: str, online: Client) -> None:
    with pytest.raises(hub.HubError, match=message) as caught:
        online(with_token, token, push, repo)
    assert "\n" not in str(caught.value)


def test_a_name_that_is_none() -> None:
    with pytest.raises(ValueError, match="is no repository name: wanted 'org/name'"):
        hub.push_to_hub(made("resnet20_cifar"), "a/b/c", token="good")


def test_strangers_get_no_code_and_no_pickles(server: FakeHub, online: Client) -> None:
    online(push, "org/stranger")
    files = branch_of(server, "org/stranger")
    config = json.loads(files["config.json"])
    without = {name: blob for name, blob in files.items() if name != "model.safetensors"}
    server.repos["org/stranger"].commit({**without, "pytorch_model.bin": b"pickle"}, "pickles")
    with pytest.raises(hub.HubError, match=r"model\.safetensors is missing"):
        online(pull, "org/stranger@pickles")
    config["model_args"]["layer_gates"]["kind"] = "exec"
    server.repos["org/stranger"].commit({**files, "config.json": json.dumps(config).encode()}, "gates")
    with pytest.raises(safety.UnsafeModelError, match="kind of layer gate must be one of"):
        online(pull, "org/stranger@gates")


def pull_twin(name: str, *args: Any, **kwargs: Any) -> tuple[Tensor, str, Tensor]:
    """In a client's process: load a twin; what it computes, what it logs, and the weights of its first convolution."""
    log = io.StringIO()
    handler, logger = logging.StreamHandler(log), logging.getLogger("timm_dynamic")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        with hub.hub_errors(name):
            model = timm.create_model(name, *args, pretrained=True, **kwargs).eval()
    finally:
        logger.removeHandler(handler)
    x = torch.randn(2, model.in_chans, 32, 32, generator=torch.Generator().manual_seed(0))
    return model(x).detach(), log.getvalue(), model.conv1[0].weight.detach()


def test_a_twin_has_the_weights_of_its_base(server: FakeHub, online: Client, home: Path, tmp_path: Path) -> None:
    """`pretrained=True` takes the base's own files from where timm has them, and opens the gates."""
    stock = made("resnet10t")
    hub.save_pretrained(stock, tmp_path / "base")
    server.repos["timm/resnet10t.c3_in1k"] = Repo(private=False)
    server.repos["timm/resnet10t.c3_in1k"].commit(files_of(tmp_path / "base"), "main")
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for name in ("skipnet_resnet10t", "iadi_resnet10t.c3_in1k", "ddi_resnet10t"):
        logits, log, weight = online(pull_twin, name)
        assert torch.equal(weight, stock.conv1[0].weight)
        torch.testing.assert_close(logits, stock(x))  # another process may have another number of threads
        assert "weights of resnet10t: its gates are open and not trained yet" in log
    cache = tmp_path / "cache"
    logits, _, weight = online(pull_twin, "ddi_resnet10t", num_classes=10, in_chans=1, cache_dir=cache)
    assert logits.shape == (2, 10)
    assert torch.equal(weight, stock.conv1[0].weight.sum(1, keepdim=True))
    assert list(cache.glob("models--timm--resnet10t.c3_in1k/snapshots/*/model.safetensors"))
    pool, offline = start("http://127.0.0.1:9", home, offline=True)
    with pool:
        torch.testing.assert_close(offline(pull_twin, "iadi_resnet10t")[0], stock(x))
        with pytest.raises(hub.HubError, match="is not in the cache"):
            offline(pull_twin, "iadi_resnet10t", cache_dir=tmp_path / "empty")


def test_offline_from_the_cache(online: Client, home: Path) -> None:
    _, expected = online(push, "org/cached")
    online(pull, "org/cached")
    pool, offline = start("http://127.0.0.1:9", home, offline=True)
    with pool:
        assert torch.equal(offline(pull, "org/cached")[0], expected)
        with pytest.raises(hub.HubError, match=r"org/never is not in the cache .*HF_HUB_OFFLINE"):
            offline(pull, "org/never")
        with pytest.raises(hub.HubError, match="offline mode is on: unset HF_HUB_OFFLINE"):
            offline(push, "org/cached")


def test_no_network(online: Client) -> None:
    with pytest.raises(hub.HubError, match=r"^cannot reach the Hub at http://127\.0\.0\.1:9: check the network"):
        online(without_network, push, "org/away")
