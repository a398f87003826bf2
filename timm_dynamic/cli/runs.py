"""What is done with the folder of a run: its report, and its way to the Hub; and the cards of what is not trained."""

import json
from pathlib import Path
from typing import Any

from .errors import Failed, bad_input, one_line

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


def card(name: str, output: Path | None) -> str:
    """The model card of a registered network whose gates are not trained yet; written to `output` if there is one.

    Raises:
        BadInput: if there is no such network, its base has no trained weights, or the file cannot be written.
    """
    from ..hub import twin_card

    with bad_input(ValueError, OSError):
        text = twin_card(name) + "\n"
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
