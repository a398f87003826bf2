"""What is done with the folder of a run: its report, and its way to the Hub; and the cards of registered models."""

import json
from pathlib import Path
from typing import Any

from ..safety import WEIGHTS
from .errors import BadInput, Failed, bad_input, check_place, one_line

RESULTS = ("dense", "dynamic", "exits", "budgets", "dataset")  # of summary.json, as `push_to_hub` takes them


def report(folder: Path) -> Path:
    """Write a run's report.html again.

    Raises:
        BadInput: if the folder holds no finished run.
        Failed: if matplotlib is not installed.
    """
    from ..report import write_report

    damage = bad_input(ValueError, KeyError, TypeError, AttributeError, about=f"{folder} holds a damaged run")
    try:
        with bad_input(FileNotFoundError, NotADirectoryError), damage:
            return write_report(folder)
    except ImportError as error:
        raise Failed(f"{one_line(error)}: pip install 'timm-dynamic[recipes]'") from error


def publish(folder: Path, repo_id: str, private: bool, revision: str | None) -> dict[str, Any]:
    """Upload the model of a run, or of `save_pretrained`, with what is known of it.

    Returns:
        The repository, its commit and their address.

    Raises:
        BadInput: if the folder holds no model, or the name is no repository's.
        Failed: if the Hub cannot be used.
    """
    from ..hub import HubError, push_to_hub
    from .models import load

    model = load(f"local-dir:{folder}", pretrained=True)
    metrics = metrics_of(folder)
    try:
        with bad_input():
            commit = push_to_hub(model, repo_id, metrics=metrics, private=private, revision=revision)
    except HubError as error:
        raise Failed(one_line(error)) from error
    return {"repo": str(commit.repo_url.repo_id), "commit": commit.oid, "url": commit.commit_url}


def publish_all(organisation: str, private: bool, revision: str | None) -> list[dict[str, Any]]:
    """Upload every model that ships with the package, each to a repository of its own.

    Args:
        organisation: or user that the repositories are to belong to.
        private: whether they are to be private.
        revision: a branch; None: main.

    Returns:
        For each model its name, its repository, its commit and their address.

    Raises:
        BadInput: if none ship with the package, or the organisation can have no repositories.
        Failed: if the Hub cannot be used; what was uploaded before stays, and is not uploaded again.
    """
    from ..hub import HubError, push_shipped
    from ..shipped import folder_of, names

    found = [name for name in names() if (folder_of(name) / WEIGHTS).is_file()]
    if not found:
        raise BadInput("no weights ship with this package: give DIR and REPO_ID for a run's")
    done: list[dict[str, Any]] = []
    for name in found:
        try:
            with bad_input():
                commit = push_shipped(name, organisation, private=private, revision=revision)
        except HubError as error:
            raise Failed(f"{name}: {one_line(error)} ({len(done)} of {len(found)} models are uploaded)") from error
        repository = str(commit.repo_url.repo_id)
        done.append({"name": name, "repo": repository, "commit": commit.oid, "url": commit.commit_url})
    return done


def card(name: str, output: Path | None) -> str:
    """The model card of a registered network, with trained weights or its base's; written to `output` if there is one.

    Raises:
        BadInput: if there is no such network, its base has no trained weights, or the file cannot be written.
    """
    from ..hub import card_of

    check_place(output)
    with bad_input(ValueError, OSError):
        text = card_of(name) + "\n"
        if output is not None:
            output.write_text(text, encoding="utf-8")
    return text


def metrics_of(folder: Path) -> dict[str, Any] | None:
    """What a run measured: from its summary, else what the model was saved with.

    Raises:
        BadInput: if the summary is damaged.
    """
    summary_file, config_file = folder / "summary.json", folder / "config.json"
    if not summary_file.is_file():
        return json.loads(config_file.read_text(encoding="utf-8")).get("metrics")
    with bad_input(about=f"{summary_file} is damaged"):
        summary = json.loads(summary_file.read_text(encoding="utf-8"))
    metrics = {key: summary[key] for key in RESULTS if key in summary}
    if "recipe" in summary:
        seed = f", seed {summary['seed']}" if "seed" in summary else ""
        metrics["training"] = f"By the recipe `train_recipes/{summary['recipe']}.py` of timm_dynamic{seed}."
    return metrics
