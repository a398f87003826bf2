"""The model card of a saved model: what the Hub shows, and what it can search by."""

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import timm
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from torch import nn

from .budgets import default_input_size
from .costs import CostTable
from .evaluation import in_points
from .measure import cost_table

TEMPLATE = Path(__file__).with_name("card_template.md")
MARK = "<!-- Written by timm_dynamic and written anew with every save: delete this line to keep your own text. -->"
DATASETS = {  # first word of a tag or the `dataset` of the metrics -> name, id on the Hub
    "cifar10": ("CIFAR-10", "uoft-cs/cifar10"),
    "cifar100": ("CIFAR-100", "uoft-cs/cifar100"),
    "svhn": ("SVHN", "ufldl-stanford/svhn"),
    "imagenet": ("ImageNet-1k", "ILSVRC/imagenet-1k"),
    "in1k": ("ImageNet-1k", "ILSVRC/imagenet-1k"),
}
COLUMNS = ("accuracy", "macs", "max_macs")
# what has a place of its own on a card, beside `dense`, `dynamic`, `exits` and `budgets`
NOT_NUMBERS = (
    *("dataset", "split", "images", "training", "command", "start", "seed", "license", "base_model"),
    *("adaptive_gain", "adaptive_gain_error"),
)


def model_card(
    model: nn.Module,
    name: str,
    base: str,
    source: str,
    metrics: Mapping[str, Any] | None = None,
    *,
    trained: bool = True,
) -> str:
    """Write the card.

    Args:
        model: a stock or dynamic timm model.
        name: under which it is saved.
        base: name of the stock model.
        source: what `timm.create_model` is to be called with to load it.
        metrics: see `timm_dynamic.hub.save_pretrained`.
        trained: whether gates and exits are; without, they are as they were made and the card says so.

    Returns:
        Markdown under a YAML header.
    """
    metrics = dict(metrics or {})
    title = source.rsplit("/", 1)[-1] if source.startswith("hf-hub:") else name
    dataset = _dataset(model, metrics)
    rows = list(_rows(metrics))
    card = ModelCard.from_template(
        _card_data(model, base, title, metrics, dataset, rows),
        template_path=str(TEMPLATE),
        title=title,
        base=base,
        source=source,
        mark=MARK,
        dynamic=hasattr(model, "dynamic"),
        **_told(metrics, source, dataset[0] if dataset else ""),
        results=[_shown(row, metrics) for row in rows],
        others=[{"name": name, "value": _plain(value)} for name, value in metrics.items() if _is_other(name, value)],
        **{**_described(model, base), **({} if trained else _as_made(model, base))},
    )
    return str(card)


def _told(metrics: Mapping[str, Any], source: str, dataset: str) -> dict[str, Any]:
    """How a model was trained, measured and calibrated, and what its decisions are like."""
    training, command = metrics.get("training"), metrics.get("command")
    if not training and not command:
        training = "How these weights were trained was not recorded."
    measured = f"Measured on {dataset}." if dataset else ""
    if metrics.get("images"):
        measured = f"Measured on {dataset}, the {metrics['images']:,} images of `{metrics['split']}`."
    return {
        "training": training or f"With seed {metrics['seed']}, by this command of the repository of timm_dynamic:",
        "command": command,
        "start": metrics.get("start"),
        "measured_on": measured,
        "split": metrics.get("split"),
        "measure_again": _evaluate_command(source, metrics),
        "measured_stops": bool(metrics.get("exits")),
        "decisions": list(_decisions(metrics)),
        "precision": _precision(metrics),
        "calibration": _calibration(metrics.get("calibrated")),
    }


def _evaluate_command(source: str, metrics: Mapping[str, Any]) -> str | None:
    """The command that measures a model again, if it is known on which images."""
    if not metrics.get("images"):
        return None
    split = "" if metrics["split"] == "val" else f" --split {metrics['split']}"
    return f"timm-dynamic evaluate {source} --data DIR{split} --device cpu"


def _decisions(metrics: Mapping[str, Any]) -> Iterator[str]:
    """What is known of a network's decisions, without a budget."""
    found = metrics["dynamic"] if isinstance(metrics.get("dynamic"), Mapping) else {}
    if found.get("policies") is not None:
        yield (
            f"{found['keep_ratio']:.1%} of the gated layers run; patterns of layers that occur: {found['policies']:,} "
            f"({found['policy_entropy']:.2f} bits)"
        )
        yield f"from image to image the MACs vary by {found['macs_share_std']:.1%} of the base's (standard deviation)"
    if found.get("channel_keep_ratio") is not None:
        yield f"{found['channel_keep_ratio']:.1%} of the channel groups are computed"
    if found.get("confidence"):
        sure = ", ".join("never" if level > 1 else f"{level:.4g}" for level in found["confidence"])
        yield f"images leave at the first exit where they are sure enough: {sure}"
    if metrics.get("adaptive_gain") is not None:
        static = metrics.get("static") or {}
        beside = f" ({static['accuracy']:.2%} at {_macs(static['macs'])})" if static else ""
        yield (
            f"adaptive gain: {in_points(metrics['adaptive_gain'], metrics.get('adaptive_gain_error'))} against the "
            f"static policy beside it, trained for as long{beside}"
        )


def _precision(metrics: Mapping[str, Any]) -> str | None:
    """In what precision weights are stored, if it is not the one of training."""
    full, dynamic = metrics.get("full_precision"), metrics.get("dynamic")
    if not full:
        return None
    stored, gates = dynamic or metrics, ", those of gates that are asked in full" if dynamic else ""
    more = 100 * (stored["accuracy"] - full["accuracy"])
    return (
        f"The weights are stored in half precision{gates}, and computed with in float32. "
        f"As they were trained they give {full['accuracy']:.2%} at {_macs(full['macs'])}: a difference of {more:+.2f} "
        "points."
    )


def _calibration(found: Any) -> dict[str, Any] | None:
    """Thresholds for other mean costs: what they were found on, and what they are."""
    if not found or not found["rows"]:
        return None
    rows = [
        {
            "target": f"{row['target']:.0%}",
            "threshold": f"{row['threshold']:.4g}" if row["threshold"] else "0: all that are not shut",
            "confidence": "none leaves" if row["confidence"] is None else f"{row['confidence']:.4g}",
        }
        for row in found["rows"]
    ]
    return {
        "images": f"{found['images']:,}",
        "count": found["images"],
        "held_out": found.get("held_out", False),
        "rows": rows,
        "gates": any(row["threshold"] is not None for row in found["rows"]),
        "exits": any(row["confidence"] is not None for row in found["rows"]),
    }


def _card_data(
    model: Any,
    base: str,
    title: str,
    metrics: Mapping[str, Any],
    dataset: tuple[str, str | None] | None,
    rows: list[dict[str, Any]],
) -> ModelCardData:
    name, hub_id = dataset or ("unknown", None)
    results = [
        EvalResult(
            "image-classification", hub_id or name, name, kind, row[kind], metric_name=f"{label} ({row['name']})"
        )
        for row in rows
        for kind, label in zip(COLUMNS, ("Accuracy", "MACs", "MACs of the dearest image"), strict=True)
        if row.get(kind) is not None
    ]
    licence = metrics.get("license") or model.pretrained_cfg.get("license")
    base_model = metrics["base_model"] if "base_model" in metrics else _base_model(model, base)
    return ModelCardData(
        license=licence,
        library_name="timm",
        pipeline_tag="image-classification",
        tags=[
            "image-classification",
            "timm",
            "timm_dynamic",
            *(["dynamic-network"] if hasattr(model, "dynamic") else []),
        ],
        datasets=[hub_id] if hub_id else None,
        base_model=base_model,
        model_name=title,
        metrics=["accuracy"] if results else None,
        eval_results=results or None,
    )


def _base_model(model: Any, base: str) -> str | None:
    """Hub id of the stock weights that a model started from, by its tag."""
    full = f"{base}.{model.pretrained_cfg.get('tag')}"
    known = full in timm.list_models(base, include_tags=True)  # a dynamic network has tags of its own
    return timm.get_pretrained_cfg(full).hf_hub_id if known else None


def _dataset(model: Any, metrics: Mapping[str, Any]) -> tuple[str, str | None] | None:
    """Name and, if it is there, Hub id of the data that a model was trained for."""
    given = metrics.get("dataset")
    if given:
        return DATASETS.get(str(given).lower(), (str(given), None))
    words = str(model.pretrained_cfg.get("tag") or "").split("_")
    return next((DATASETS[word] for word in words if word in DATASETS), None)


def _rows(metrics: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Every measured point, as rows with a name."""
    if metrics.get("accuracy") is not None:
        yield {"name": "this model", **{key: metrics.get(key) for key in COLUMNS}}
    early = isinstance(metrics.get("dynamic"), Mapping) and metrics["dynamic"].get("confidence")
    whole = "as saved: images leave when sure" if early else "without budget"
    for key, name in (("dense", "base network, dense"), ("dynamic", whole)):
        if isinstance(metrics.get(key), Mapping):
            yield {"name": name, **metrics[key]}
    for row in metrics.get("exits") or ():
        yield {**row, "name": f"all images at exit {row['exit']}"}
    for row in metrics.get("budgets") or ():
        yield {**row, "name": f"budget {_budget(row['budget'])}"}
    for row in (metrics.get("calibrated") or {}).get("rows", ()):
        yield {**row, "name": f"calibrated to {row['target']:.0%} of the base"}


def _budget(value: Any) -> str:
    """A budget in words: a share of the base or MACs."""
    return f"{value:.0%} of the base" if isinstance(value, float) and value <= 1 else _macs(value)


def _shown(row: Mapping[str, Any], metrics: Mapping[str, Any]) -> dict[str, str]:
    """A row of the table of results."""
    dense = metrics["dense"].get("macs") if isinstance(metrics.get("dense"), Mapping) else None
    accuracy, macs = row.get("accuracy"), row.get("macs")
    return {
        "name": row["name"],
        "accuracy": "" if accuracy is None else f"{accuracy:.2%}",
        "macs": _macs(macs),
        "share": f"{macs / dense:.1%}" if macs is not None and dense else "",
        "max_macs": _macs(row.get("max_macs")),
    }


def _is_other(name: str, value: Any) -> bool:
    return name not in (*COLUMNS, *NOT_NUMBERS) and isinstance(value, (int, float, str))


def _plain(value: float | str) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _macs(value: Any) -> str:
    """MACs as one reads them."""
    if value is None or isinstance(value, str):
        return value or ""
    return f"{value / 1e9:.2f} G" if value >= 1e9 else f"{value / 1e6:.2f} M"


def _as_made(model: nn.Module, base: str) -> dict[str, Any]:
    """What the card says otherwise of a network whose gates and exits nobody has trained."""
    table = cost_table(model, default_input_size(model))
    more = table.exits[-1].dearest / table.dense - 1
    status = (
        f"**Its gates are open and not trained yet.** Every image runs every unit: it computes what `{base}` computes, "
        f"and the gates cost {100 * more:.2g} % more MACs. It is where training starts."
    )
    if hasattr(model, "exits"):
        status += " Its exits have random weights: what they answer is chance until they are trained."
    summary = f"`{base}`, made ready to leave work out where an image does not need it."
    return {"summary": summary, "status": status, "exits": False}


def _table(model: nn.Module) -> CostTable | None:
    """What a model costs; None for a plain one of another family."""
    try:
        return cost_table(model, default_input_size(model))
    except ValueError:
        if hasattr(model, "dynamic"):
            raise
        return None


def _layer_gates(gates: Any) -> Iterator[str]:
    """What there is to say of a network's layer gates."""
    free = len(gates.settled) < len(gates)
    does = ": each image decides which units run" if free else ", not asked any more: all units are settled"
    yield f"layer gates of kind `{gates.config.kind}`{does}"
    told = [name for place, name in enumerate(gates.gated) if gates.looks(place)]
    for names, who in (
        (told, "whose gates are told how certain the network's classifier is of their input"),
        (gates.config.shut, "that no image runs"),
        (gates.config.open, "that every image runs that comes there"),
    ):
        if names:
            yield f"units {who}: " + ", ".join(f"`{name}`" for name in names)


def _channel_gates(gates: Any, shut: Collection[str]) -> Iterator[str]:
    """What there is to say of a network's channel gates; shut: units that no image runs."""
    free = set(gates.gated) - set(gates.config.channels_of()) - set(shut)
    does = (
        ": each image decides which hidden channels are computed" if free else ", not asked any more: all are settled"
    )
    yield f"channel gates, {gates.config.mode}{does}"
    if gates.settled:
        known = ", ".join(f"`{name}` ({digits})" for name, digits in gates.config.channels_of().items())
        yield f"units whose channel groups are the same for all images, 1 for those that are computed: {known}"


def _described(model: Any, base: str) -> dict[str, Any]:
    """What the card says of the network itself."""
    table, dynamic = _table(model), hasattr(model, "dynamic")
    layer, channel = getattr(model, "layer_gates", None), getattr(model, "channel_gates", None)
    exits = getattr(model, "exits", None)
    budget = model.dynamic.budget if dynamic else None
    parts = [] if layer is None else list(_layer_gates(layer))
    if channel is not None:
        parts += _channel_gates(channel, () if layer is None else layer.config.shut)
    if exits is not None:
        parts.append(f"early exits ({len(exits)}): images may leave before the head, by budget or confidence")
    if budget is not None:
        given = {key: value for key, value in budget.to_dict().items() if value is not None}
        parts.append("a budget that is set when it is loaded: " + ", ".join(f"{k} = {v}" for k, v in given.items()))
    stops = table.exits if table is not None and dynamic else ()
    ways = [f"MACs, {'the whole way' if stop.name == 'head' else f'leaving after `{stop.name}`'}" for stop in stops]
    return {
        "summary": f"`{base}`, made so that it leaves work out where an image does not need it."
        if parts
        else f"`{base}`, a plain network: no gates, no exits.",
        "parts": parts or ["nothing was added: its base is the whole model"],
        "exits": exits is not None,
        "confidence": budget is not None and budget.confidence is not None,
        "budget": stops[0].dearest if stops else None,
        "input_size": " x ".join(map(str, default_input_size(model))),
        "num_classes": model.num_classes,
        "parameters": f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M",
        "dense": "not counted" if table is None else _macs(table.dense),
        "costs": [
            {"name": way, "macs": f"{_macs(stop.cheapest)} to {_macs(stop.dearest)}"}
            for way, stop in zip(ways, stops, strict=True)
        ],
    }
