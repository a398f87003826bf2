"""Measuring a network: accuracy, what an image costs, how much the decisions depend on the image, and time."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .costs import CostTable, UnitCost
from .forward import decide
from .measure import cost_table
from .modes import modes_kept
from .walk import Log, Walk, table_for

NEAR = 0.02  # by how much a static policy may be dearer than the network that it is compared with
Rows = dict[str, Tensor]  # per image: every value has the images of a batch as its first dimension


@dataclass(frozen=True)
class Evaluation:
    """What a network did on a set of images.

    Attributes:
        images: how many there were.
        accuracy: share of them that was classified correctly, 0..1.
        macs: mean MACs of an image.
        max_macs: MACs of the dearest image.
        dense_macs: MACs of the stock model for one image.
        keep_ratio: mean of ``keep`` over images and layer gates; over channel groups where there are no layer gates.
        channel_keep_ratio: mean of ``keep`` over images and channel groups; None without channel gates.
        unit_skip: skip ratio of every layer-gated unit, by name in running order.
        exit_shares: share of the images that left at each exit, the head last.
        policies: number of distinct patterns of layer keeps.
        policy_entropy: entropy of the patterns' frequencies in bits.
        keep_variance: variance of ``keep`` between images, mean over layer gates.
        macs_share_std: standard deviation between images of MACs as a share of the dense MACs.
    """

    images: int
    accuracy: float
    macs: float
    max_macs: int
    dense_macs: int
    keep_ratio: float
    channel_keep_ratio: float | None
    unit_skip: dict[str, float]
    exit_shares: tuple[float, ...]
    policies: int
    policy_entropy: float
    keep_variance: float
    macs_share_std: float

    @property
    def macs_share(self) -> float:
        """Mean MACs as a share of the dense MACs."""
        return self.macs / self.dense_macs

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values."""
        return {**dataclasses.asdict(self), "exit_shares": list(self.exit_shares)}


def evaluate(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    device: torch.device | str | None = None,
    gather: Callable[[Rows], Rows] | None = None,
) -> Evaluation:
    """Run a network over a loader and sum up what it did.

    The model runs in eval mode, under its own execution and budget, and gets its mode back.

    Args:
        model: a dynamic network or a plain one that ``cost_table`` can count.
        loader: batches of images [B, C, H, W] and classes [B].
        device: where the model is; default: that of its parameters.
        gather: collects the rows of all processes, such as ``accelerator.gather_for_metrics``.

    Raises:
        ValueError: if the loader holds no images.
    """
    return summarise(*collect(model, loader, device, gather))


def collect(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    device: torch.device | str | None = None,
    gather: Callable[[Rows], Rows] | None = None,
    look: Callable[[nn.Module, Tensor, Tensor, CostTable], Rows] | None = None,
) -> tuple[Rows, CostTable]:
    """What happened to each image of a loader, and the network's costs.

    Arguments and errors are those of `evaluate`; `look` gives the rows of a batch, by default `rows_of`.
    """
    look = look or rows_of
    device = torch.device(device) if device is not None else next(model.parameters()).device
    found: list[Rows] = []
    table: CostTable | None = None
    with modes_kept(model), torch.no_grad():
        model.eval()
        for x, y in loader:
            x, y = x.to(device), y.to(device)
            table = table or costs_of(model, (x.shape[1], x.shape[2], x.shape[3]))
            rows = look(model, x, y, table)
            found.append({k: v.cpu() for k, v in (gather(rows) if gather else rows).items()})
    if table is None:
        raise ValueError("the loader holds no images to evaluate on")
    return {key: torch.cat([rows[key] for rows in found]) for key in found[0]}, table


def held_out_places(images: int, count: int) -> list[int]:
    """Which training images are held out, to calibrate on: the same ones for everybody.

    Args:
        images: how many training images there are, in the order of their classes' folders and of their names.
        count: how many are to be held out.

    Returns:
        Their places, ascending: the first `count` of the permutation that numpy's generator gives for seed 0.

    Raises:
        ValueError: if there are not more images than that.
    """
    if not 0 < count < images:
        raise ValueError(f"of {images} training images 1 to {images - 1} can be held out; found {count}")
    return sorted(np.random.default_rng(0).permutation(images)[:count].tolist())


def costs_of(model: nn.Module, input_size: tuple[int, int, int]) -> CostTable:
    """The cost table of a dynamic or plain network; a dynamic one remembers it."""
    return table_for(model, input_size) if _is_dynamic(model) else cost_table(model, input_size)


def _is_dynamic(model: nn.Module) -> bool:
    return hasattr(model, "dynamic")


def rows_of(model: nn.Module, x: Tensor, y: Tensor, table: CostTable) -> Rows:
    """What happened to each image of a batch.

    Args:
        model: a dynamic or plain network in eval mode.
        x: images [B, C, H, W].
        y: classes [B].
        table: the network's costs at this input size.

    Returns:
        ``correct`` [B], ``confidence`` [B] (the largest softmax probability), ``macs`` [B], ``layers`` [B, gates],
        ``channels`` [B, groups of all gated hidden widths] and ``exit`` [B], the exit's number.
    """
    batch = len(y)
    if not _is_dynamic(model):
        logits = model(x)
        nothing = torch.zeros(batch, 0, device=x.device)
        last = torch.full((batch,), len(table.exits) - 1, device=x.device)
        macs = torch.full((batch,), table.dense, device=x.device)
        return {**_judged(logits, y), "macs": macs, "layers": nothing, "channels": nothing, "exit": last}
    decisions = decide(model, x)
    channels = torch.cat(decisions.channel_keep, dim=1) if decisions.channel_keep else x.new_zeros(batch, 0)
    return {
        **_judged(decisions.logits, y),
        "macs": decisions.macs,
        "layers": decisions.layer_keep.float(),
        "channels": channels.float(),
        "exit": decisions.exit_index.contiguous(),
    }


def at_exits(model: nn.Module, x: Tensor, y: Tensor, table: CostTable) -> Rows:
    """What every exit says to every image, whether or not it would have left before: one walk for all.

    Arguments are those of `rows_of`.

    Returns:
        ``sure`` [B, exits] (the largest softmax probability), ``right`` [B, exits], and ``spent`` [B, exits], the MACs
        of leaving there, no other exit evaluated. The head is the last exit.
    """
    walk = Walk(model, x, Log(len(x)), budgeted=False)
    account = walk.macs
    assert account is not None
    sure, right, spent = [], [], []
    for index in range(len(table.exits)):
        walk.to_exit(index)
        logits = walk.classify(index, walk.x)
        sure.append(logits.float().softmax(1).amax(1))
        right.append(logits.argmax(1) == y)
        here = account.spent + account.exit_cost(index)
        spent.append(torch.as_tensor(here, device=x.device).long().expand(len(x)))
    return {name: torch.stack(rows, 1) for name, rows in (("sure", sure), ("right", right), ("spent", spent))}


def _judged(logits: Tensor, y: Tensor) -> Rows:
    """Whether logits [B, classes] are right, and how sure they are."""
    return {"correct": logits.argmax(1) == y, "confidence": logits.float().softmax(1).amax(1)}


def summarise(rows: Rows, table: CostTable) -> Evaluation:
    """Sum up rows of `rows_of`, of one batch or of many put together."""
    layers, channels, macs = rows["layers"].double(), rows["channels"].double(), rows["macs"]
    names = [unit.name for unit in table.units if unit.skippable]
    counts = torch.tensor([len(macs)])
    if layers.shape[1]:
        _, counts = torch.unique(layers, dim=0, return_counts=True)
    frequency = counts.double() / counts.sum()
    keep = layers if layers.shape[1] else channels
    leaving = torch.bincount(rows["exit"], minlength=len(table.exits)).double() / len(macs)
    return Evaluation(
        images=len(macs),
        accuracy=rows["correct"].double().mean().item(),
        macs=macs.double().mean().item(),
        max_macs=int(macs.max()),
        dense_macs=table.dense,
        keep_ratio=keep.mean().item() if keep.shape[1] else 1.0,
        channel_keep_ratio=channels.mean().item() if channels.shape[1] else None,
        unit_skip=dict(zip(names, (1 - layers.mean(0)).tolist(), strict=True)),
        exit_shares=tuple(leaving.tolist()),
        policies=len(counts),
        policy_entropy=abs(-(frequency * frequency.log2()).sum().item()),
        keep_variance=layers.var(0, correction=0).mean().item() if layers.shape[1] else 0.0,
        macs_share_std=(macs.double() / table.dense).std(correction=0).item(),
    )


@dataclass(frozen=True)
class PairedDifference:
    """Two networks on the same images, compared image by image.

    Attributes:
        accuracy: that of the first less that of the second, -1..1.
        error: standard error of `accuracy`: by how much it would stray from one draw of so many images to the next.
        first_only: share of the images that the first recognises and the second does not.
        second_only: the other way round.
    """

    accuracy: float
    error: float
    first_only: float
    second_only: float


def compare(first: Tensor, second: Tensor) -> PairedDifference:
    """Compare two networks by whether they recognised each of the same images, `correct` of `rows_of`: bool [N] each.

    Raises:
        ValueError: if they are not of the same length, or of fewer than two images.
    """
    if first.shape != second.shape or len(first) < 2:
        raise ValueError(f"the same two or more images are needed; found {len(first)} and {len(second)}")
    more = first.double() - second.double()
    error = more.std(correction=1).item() / len(more) ** 0.5
    return PairedDifference(
        more.mean().item(), error, (more > 0).double().mean().item(), (more < 0).double().mean().item()
    )


def in_points(difference: float, error: float | None = None) -> str:
    """A difference of accuracies to show, with its standard error where known: +0.90 points (standard error 0.35)."""
    return f"{100 * difference:+.2f} points" + ("" if error is None else f" (standard error {100 * error:.2f})")


@dataclass(frozen=True)
class Policy:
    """One pattern of decisions for all images.

    Attributes:
        layers: 1 (run) or 0 for each layer gate; empty without layer gates.
        channels: 1 or 0 for each channel group of each gated hidden width; empty without channel gates.
        macs: what an image costs under it, without any gate.
        share: share of the images that the network itself gave just this pattern.
    """

    layers: str
    channels: str
    macs: int
    share: float

    def __str__(self) -> str:
        return f"{self.layers}:{self.channels}" if self.channels else self.layers


def static_policy(
    model: nn.Module, loader: Iterable[tuple[Tensor, Tensor]], device: torch.device | str | None = None
) -> Policy:
    """The static network that a dynamic one has to beat: the pattern that it gives most often, at its mean cost.

    Of the patterns that cost, without gates, at most 2 % more than the dynamic network on the mean, gates included, the
    most common one is taken (if all are dearer, the empty one). Of what brings it nearer to the mean, what is kept
    most often for what it costs is added to it, one after the other: a channel group, or a unit with the channels that
    most of the images which run it keep. A unit none of whose channels are kept does not run.

    Args:
        model: a dynamic network with gates, without a budget.
        loader: batches of images [B, C, H, W] and classes [B].
        device: where the model is; default: that of its parameters.

    Raises:
        ValueError: if the network has no gates, or the loader no images.
    """
    if not hasattr(model, "layer_gates") and not hasattr(model, "channel_gates"):
        raise ValueError("a static policy is made from a network with gates; found none")
    rows, table = collect(model, loader, device)
    return _most_common(rows, table, rows["macs"].double().mean().item())


def _most_common(rows: Rows, table: CostTable, wanted: float) -> Policy:
    """The most common pattern, filled up until it costs what is wanted."""
    keeps = _of_use(torch.cat([rows["layers"], rows["channels"]], dim=1).bool(), table)
    patterns, counts = torch.unique(keeps, dim=0, return_counts=True)
    layers, free = rows["layers"].shape[1], table.without_gates()
    groups = [len(sizes) for unit in table.units for sizes in unit.sizes]

    def cost(some: Tensor) -> Tensor:
        return free.price(some[:, :layers], some[:, layers:].split(groups, dim=1) if groups else ())

    cheap = cost(patterns) <= (1 + NEAR) * wanted
    pattern = patterns[int(torch.where(cheap, counts, 0).argmax())] if cheap.any() else torch.zeros_like(patterns[0])
    often, additions = keeps.double().mean(0), _additions(keeps, table)
    while True:
        left, added = wanted - cost(pattern[None]), cost(pattern | additions) - cost(pattern[None])
        nearer = (often > 0) & (added > 0) & (added <= 2 * left)
        if not nearer.any():
            break
        pattern = pattern | additions[int(torch.where(nearer, often / added.clamp_min(1), 0.0).argmax())]
    pattern = _of_use(pattern[None], table)[0]
    digits = "".join("01"[int(keep)] for keep in pattern)
    same = (keeps == pattern).all(1).double().mean().item()
    return Policy(digits[:layers], digits[layers:], int(cost(pattern[None])), same)


def _additions(keeps: Tensor, table: CostTable) -> Tensor:
    """[layers and groups, layers and groups]: what a pattern is given together with each of its digits.

    A layer comes with the channels that most of the images which run it keep, a group with its layer, with those
    before it that no image keeps it without, which in a nested gate are all, and with those that are kept most often
    beside it in the unit's other width.
    """
    found, layer = torch.eye(keeps.shape[1], dtype=torch.bool, device=keeps.device), 0
    for unit, widths in _columns(table):
        for groups in widths:
            if unit.skippable:
                runs = keeps[keeps[:, layer], groups].double()
                found[layer, groups] = runs.mean(0) >= 0.5  # none if no image runs it
                found[groups, layer] = True
            for place in range(groups.start, groups.stop):
                found[place, groups.start : place] = keeps[keeps[:, place], groups.start : place].all(0)
                for other in (other for other in widths if other != groups):
                    beside = keeps[keeps[:, place], other].sum(0)
                    found[place, other] = (beside == beside.max()) & (beside > 0)
        layer += unit.skippable
    return found


def _of_use(patterns: Tensor, table: CostTable) -> Tensor:
    """Patterns [P, layers and groups] in which no unit runs without channels, in any of its hidden widths."""
    found, layer = patterns.clone(), 0
    for unit, widths in _columns(table):
        if unit.skippable:
            for groups in widths:
                found[:, layer] &= found[:, groups].any(1)
            for groups in widths:
                found[:, groups] &= found[:, layer, None]
            layer += 1
    return found


def _columns(table: CostTable) -> Iterator[tuple[UnitCost, list[slice]]]:
    """Each unit with the columns, in a pattern of layers and groups, of the groups of each of its hidden widths."""
    start = sum(unit.skippable for unit in table.units)
    for unit in table.units:
        ends = [start + end for end in accumulate(map(len, unit.sizes))]
        yield unit, [slice(first, end) for first, end in zip([start, *ends], ends, strict=False)]
        start = ends[-1] if ends else start


def latency(models: dict[str, Callable[[Tensor], Any]], x: Tensor, rounds: int = 30) -> dict[str, float]:
    """Median milliseconds of one image at batch 1, all models side by side.

    In every round each model runs once on the same image, the images of ``x`` taking turns and the models changing
    places, so that what disturbs the machine disturbs all of them.

    Args:
        models: what to time, by name.
        x: images [N, C, H, W].
        rounds: timed runs of each model; two more come first and are not counted.
    """
    times: dict[str, list[float]] = {name: [] for name in models}
    names = list(models)
    with torch.inference_mode():
        for r in range(-2, rounds):
            image = x[r % len(x)].unsqueeze(0)
            shift = r % len(names)
            for name in names[shift:] + names[:shift]:
                elapsed = _time(models[name], image)
                if r >= 0:
                    times[name].append(elapsed)
    return {name: statistics.median(values) * 1000 for name, values in times.items()}


def _time(run: Callable[[Tensor], Any], image: Tensor) -> float:
    if image.is_cuda:
        torch.cuda.synchronize(image.device)
    start = time.perf_counter()
    run(image)
    if image.is_cuda:
        torch.cuda.synchronize(image.device)
    return time.perf_counter() - start
