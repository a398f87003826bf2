"""Saving a model to a folder and to the Hub, in the form that timm and the Hub expect.

`timm.create_model("local-dir:FOLDER", pretrained=True)` and `timm.create_model("hf-hub:ORG/NAME", pretrained=True)`
give the same model back: gates, exits, budget and calibrated thresholds included.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import timm
import torch
from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, constants, get_token
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from safetensors.torch import save_file
from timm.models._hub import save_config_for_hf
from torch import Tensor, nn

from .card import MARK, model_card
from .families import model_name
from .gates import PARTS
from .measure import cost_table
from .safety import CONFIG, WEIGHTS
from .shipped import config_of, folder_of
from .twins import as_timm, is_torchvision, parts_of
from .version import __version__

CARD = "README.md"
FILES = (WEIGHTS, CARD, CONFIG)  # in the order in which they are put in place
PREFIXES = {"skipnet_": PARTS[:1], "iadi_": PARTS[:2], "ddi_": PARTS}  # what each makes
TOKENS = "https://huggingface.co/settings/tokens"


class HubError(RuntimeError):
    """The Hub could not be used; the message says why and what to do, in one line."""


# Saving --------------------------------------------------------------------------------------------------------------


def save_pretrained(model: nn.Module, directory: str | Path, *, metrics: Mapping[str, Any] | None = None) -> None:
    """Save a stock or dynamic model so that timm can load it again.

    Writes `model.safetensors`, `config.json` and a model card, `README.md`. The same model and metrics give the same
    bytes; a card whose last line was deleted is kept as it is. Files appear whole or not at all.

    Args:
        model: a model made by `timm.create_model` or torchvision, or by `add_*` from such a model. One of torchvision
            is saved as the timm network of that name, which computes the same.
        directory: where to; it is made if it does not exist.
        metrics: what is known of the weights, kept in `config.json` and shown in the card: `accuracy`, `macs` and
            other numbers, or `dense`, `dynamic`, `exits` and `budgets` as in a recipe's `summary.json`; `dataset`,
            `training` (how it was trained), `license` and `base_model` as text.

    Raises:
        ValueError: if timm could not build the model again, or `metrics` are not plain values.
    """
    _save(model, Path(directory), metrics, source="local-dir:FOLDER")


def base_name(model: nn.Module) -> str:
    """The name of the stock model that a model was made from."""
    return base_of(model_name(model))


def base_of(name: str) -> str:
    """The stock network's name in a dynamic one's: "resnet50" for "iadi_resnet50"."""
    return next((name.removeprefix(prefix) for prefix in PREFIXES if name.startswith(prefix)), name)


def card_of(name: str) -> str:
    """The model card of a registered name: of trained weights that ship with the package, else of a base's twin.

    Args:
        name: such as "skipnet_resnet50.a1_in1k"; without a tag the one that `pretrained=True` takes.

    Raises:
        ValueError: if there is no such network, or neither it nor its base has trained weights.
    """
    known = timm.is_model(name.partition(".")[0]) and (name in timm.list_models(include_tags=True) or "." not in name)
    cfg = timm.get_pretrained_cfg(name) if known else None
    full = f"{cfg.architecture}.{cfg.tag}" if cfg is not None else ""
    config = config_of(full)
    if cfg is not None and config is not None:
        with torch.device("meta"):
            model = timm.create_model(full).eval()
        return model_card(model, full, base_of(cfg.architecture), full, config.get("metrics"))
    if cfg is None or not cfg.architecture.startswith(tuple(PREFIXES)):
        raise ValueError(f"no dynamic network {name!r}: wanted a registered name such as 'skipnet_resnet50.a1_in1k'")
    if not cfg.has_weights:
        raise ValueError(f"no trained weights of {base_of(cfg.architecture)} are published: {name} has no card")
    return _twin_card(cfg.architecture, cfg.tag)


def _twin_card(architecture: str, tag: str) -> str:
    """The card of a dynamic network with its base's weights, gates and exits as they are made."""
    full, base = f"{architecture}.{tag}", base_of(architecture)
    with torch.device("meta"):
        model = timm.create_model(full).eval()
    publisher = "timm_dynamic ships them" if config_of(f"{base}.{tag}") is not None else "timm publishes them"
    training = (
        f"The weights are those of `{base}.{tag}` as {publisher}, unchanged. "
        "Gates and exits are not trained: the recipes of timm_dynamic do that."
    )
    return model_card(model, full, base, full, {"training": training}, trained=False)


def _save(model: nn.Module, folder: Path, metrics: Mapping[str, Any] | None, source: str) -> None:
    if is_torchvision(model):
        model = as_timm(model)
    if not isinstance(getattr(model, "pretrained_cfg", None), dict) or not timm.is_model(base_name(model)):
        raise ValueError(
            f"only models of timm, and ResNets and DenseNets of torchvision, can be saved; found {type(model).__name__}"
        )
    if getattr(getattr(model, "dynamic", None), "slices", None) is not None:
        raise ValueError("a copy of optimize_for_inference cannot be saved: save the network that it was made from")
    _check_metrics(metrics)
    tensors = _tensors(model)
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder, prefix=".saving-") as temporary:
        inside = Path(temporary)
        config = _config(model, inside / CONFIG, metrics)
        _check_rebuilds(model, config, tensors)
        (inside / CONFIG).write_text(config_text(config), encoding="utf-8")
        card = model_card(model, config["architecture"], base_name(model), source, metrics)
        (inside / CARD).write_text(card, encoding="utf-8")
        save_file(tensors, inside / WEIGHTS, metadata={"format": "pt"})
        (inside / WEIGHTS).chmod((inside / CONFIG).stat().st_mode)  # safetensors lets the owner alone read it
        for name in FILES:
            if name != CARD or is_ours(folder / CARD):
                os.replace(inside / name, folder / name)


def _check_metrics(metrics: Any, where: str = "metrics") -> None:
    """Raise unless metrics, and the rows in them, are what a card can show.

    Raises:
        ValueError: which names the value, what was wanted and what was found.
    """
    if metrics is None:
        return
    if not isinstance(metrics, Mapping):
        raise ValueError(f"{where} must be a mapping; found {metrics!r}")
    config_text(dict(metrics))
    for name, value in metrics.items():
        place = f"{where}[{name!r}]"
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if name == "accuracy" and not (number and 0 <= value <= 1):
            raise ValueError(f"{place} must be in 0..1; found {value!r}")
        if name in ("macs", "max_macs") and not (number and value >= 0):
            raise ValueError(f"{place} must be a number of MACs; found {value!r}")
        if name in ("dense", "dynamic"):
            _check_metrics(value, place)
        if name in ("exits", "budgets"):
            if not isinstance(value, (list, tuple)):
                raise ValueError(f"{place} must be a list; found {value!r}")
            for k, row in enumerate(value):
                _check_metrics(row, f"{place}[{k}]")


def config_text(config: Mapping[str, Any]) -> str:
    """A config as it is written: always the same text for the same content."""
    try:
        return json.dumps(config, indent=2, sort_keys=True, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise ValueError(f"metrics must be plain values that JSON can hold: {error}") from error


def is_ours(card: Path) -> bool:
    """Whether a card may be written anew: there is none, or it is one of ours that nobody has taken over."""
    return not card.exists() or MARK in card.read_text(encoding="utf-8")


def _architecture(model: nn.Module) -> str:
    """The registered name that makes a model with these parts."""
    name, parts = model_name(model), tuple(part for part in PARTS if hasattr(model, part))
    if not parts:
        return base_name(model)
    own = next((made for prefix, made in PREFIXES.items() if name.startswith(prefix)), None)
    return name if own == parts else f"ddi_{base_name(model)}"


def _parts(model: Any) -> dict[str, Any]:
    """The arguments that make a model's parts and budget: a dict each, False for those it has not."""
    budget = model.dynamic.budget if hasattr(model, "dynamic") else None
    if budget is not None and budget.energy_mj is not None:
        limit = model.dynamic.limit
        if limit is None or limit != cost_table(model, limit.input_size, "energy_mj"):
            raise ValueError(
                "a budget in millijoules by another table than the default one cannot be saved: lift it by "
                "set_budget(model), and set it again after loading"
            )
    return {**parts_of(model), "budget": budget.to_dict() if budget is not None else False}


def _config(model: Any, path: Path, metrics: Mapping[str, Any] | None) -> dict[str, Any]:
    """The content of `config.json`: timm's, with the parts as arguments."""
    architecture, parts = _architecture(model), _parts(model)
    extra: dict[str, Any] = {"pretrained_cfg": {"architecture": architecture}}
    if metrics:
        extra["metrics"] = dict(metrics)
    save_config_for_hf(model, path, model_config=extra, model_args=parts)
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if not any(parts.values()):
        for part in parts:
            del config["model_args"][part]
    return config


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """A model's state, each tensor with memory of its own."""
    state = model.state_dict()
    if any(tensor.is_meta for tensor in state.values()):
        raise ValueError("the model is on the meta device: it has no weights to save")
    return {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in state.items()}


def _check_rebuilds(model: nn.Module, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Raise unless timm, given the config, builds a model of this class for these tensors."""
    arguments = {key: value for key, value in config["model_args"].items() if key != "budget"}
    with torch.device("meta"):
        twin = timm.create_model(config["architecture"], **arguments)
    if type(twin) is not type(model):
        raise ValueError(
            f"timm builds {config['architecture']!r} as a {type(twin).__name__}; found the class "
            f"{type(model).__qualname__} of {type(model).__module__}: save its state_dict() instead"
        )
    again = twin.state_dict()
    changed = sorted({k for k in (*again, *tensors) if k not in again or k not in tensors})
    changed = changed or [name for name, tensor in tensors.items() if tensor.shape != again[name].shape]
    if changed:
        raise ValueError(
            f"{config['architecture']!r} was changed after it was made and cannot be built again from its name and "
            f"arguments ({changed[0]} and {len(changed) - 1} more differ): save its state_dict() instead"
        )


# The Hub -------------------------------------------------------------------------------------------------------------


def push_to_hub(
    model: nn.Module,
    repo_id: str,
    *,
    metrics: Mapping[str, Any] | None = None,
    private: bool = False,
    token: str | None = None,
    revision: str | None = None,
) -> CommitInfo:
    """Upload a model to the Hub: one commit with all its files, or none if they are there already.

    The repository is made if it does not exist; a card in it that was written by hand is kept. Until the commit,
    which comes last, nothing of the upload can be seen.

    Args:
        model: as for `save_pretrained`.
        repo_id: "org/name", or "name" for the token's owner.
        metrics: as for `save_pretrained`.
        private: whether the repository is to be private.
        token: default: the one of `hf auth login` or HF_TOKEN.
        revision: a branch, made if it does not exist; default: main.

    Returns:
        The commit, of the files as they now are on the Hub.

    Raises:
        ValueError: if the model cannot be saved, or the name is no repository name.
        HubError: if the Hub cannot be used: no token, a wrong one, no rights, no network.
    """
    with _uploading(repo_id, token) as folder, hub_errors(repo_id):
        _save(model, folder, metrics, source=f"hf-hub:{repo_id}")
        return _push(_api(token), repo_id, folder, private, revision)


def push_shipped(
    full: str, organisation: str, *, private: bool = False, token: str | None = None, revision: str | None = None
) -> CommitInfo:
    """Upload a model that ships with the package, file by file as it is there, with its card.

    Args:
        full: "architecture.tag"; the repository is "organisation/architecture.tag".
        organisation: or user that the repository is to belong to.
        private: as for `push_to_hub`.
        token: as for `push_to_hub`.
        revision: as for `push_to_hub`.

    Returns:
        The commit, of the files as they now are on the Hub.

    Raises:
        ValueError: if there is no such model with weights, or the name is no repository's.
        HubError: if the Hub cannot be used.
    """
    repo_id, source = f"{organisation}/{full}", folder_of(full)
    if not (source / WEIGHTS).is_file():
        raise ValueError(f"no weights of {full!r} ship with the package: nothing to upload")
    with _uploading(repo_id, token) as folder, hub_errors(repo_id):
        for name in (WEIGHTS, CONFIG):
            shutil.copyfile(source / name, folder / name)
        (folder / CARD).write_text(card_of(full) + "\n", encoding="utf-8")
        return _push(_api(token), repo_id, folder, private, revision)


@contextmanager
def _uploading(repo_id: str, token: str | None) -> Iterator[Path]:
    """A folder for what is to be uploaded, once it is clear that it can be."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"{repo_id!r} is no repository name: wanted 'org/name' ({error})") from error
    if token is None and get_token() is None:
        raise HubError(f"no token to write to {repo_id}: run `hf auth login`, set HF_TOKEN or pass token= ({TOKENS})")
    with TemporaryDirectory() as folder:
        yield Path(folder)


def _api(token: str | None) -> HfApi:
    return HfApi(token=token, library_name="timm_dynamic", library_version=__version__)


def _push(api: HfApi, repo_id: str, folder: Path, private: bool, revision: str | None) -> CommitInfo:
    """Create what has to be there and commit the files of a folder."""
    repo_id = api.create_repo(repo_id, private=private or None, exist_ok=True).repo_id
    if private and not api.model_info(repo_id).private:
        raise HubError(f"{repo_id} exists and is public: make it private on the Hub first, or leave out private=True")
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    names = [name for name in FILES if name != CARD or _may_write_card(api, repo_id, revision)]
    files = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=folder / name) for name in names]
    return api.create_commit(repo_id, files, commit_message="Upload a timm_dynamic model", revision=revision)


def _may_write_card(api: HfApi, repo_id: str, revision: str | None) -> bool:
    try:
        return is_ours(Path(api.hf_hub_download(repo_id, CARD, revision=revision)))
    except LocalEntryNotFoundError:  # it could not be asked for, which does not mean that it is not there
        raise
    except EntryNotFoundError:
        return True


@contextmanager
def hub_errors(repo_id: str) -> Iterator[None]:
    """Turn what goes wrong with the Hub inside a `with` block into a `HubError` of one line."""
    try:
        yield
    except HubError:
        raise
    except (HTTPError, OSError, RuntimeError) as error:
        cause = error.__cause__ if type(error) is RuntimeError and error.__cause__ is not None else error
        message = _explain(cause, repo_id)
        if message is None:
            raise
        raise HubError(message) from error


def _explain(error: BaseException, repo_id: str) -> str | None:
    """One line with the remedy, or None if the error has nothing to do with the Hub."""
    if isinstance(error, OfflineModeIsEnabled):
        return f"{repo_id}: offline mode is on: unset HF_HUB_OFFLINE to reach the Hub"
    if isinstance(error, LocalEntryNotFoundError):
        return f"{repo_id} is not in the cache and the Hub cannot be reached: check the network and HF_HUB_OFFLINE"
    if isinstance(error, RevisionNotFoundError):
        return f"{repo_id} has no such revision: check the branch, tag or commit"
    if isinstance(error, EntryNotFoundError):
        return f"{repo_id} holds no timm model: {CONFIG} or {WEIGHTS} is missing"
    if isinstance(error, HfHubHTTPError):
        return _explain_status(error, repo_id)
    if isinstance(error, HTTPError) or type(error).__module__.partition(".")[0] in ("requests", "urllib3"):
        return f"cannot reach the Hub at {constants.ENDPOINT}: check the network ({type(error).__name__})"
    return None


def _explain_status(error: HfHubHTTPError, repo_id: str) -> str:
    status = error.response.status_code if error.response is not None else None
    if isinstance(error, RepositoryNotFoundError) and (status != 401 or get_token() is None):
        return f"{repo_id} does not exist or is private: check the name, and log in with a token that may read it"
    if status == 401:
        return f"the Hub does not accept the token for {repo_id}: make one with write access at {TOKENS}"
    if status == 403:
        return f"the token may not write to {repo_id}: it needs write access, and you a role in its organisation"
    reason = (error.server_message or str(error).splitlines()[0]).strip()
    return f"the Hub answered {status} for {repo_id}: {reason}"
