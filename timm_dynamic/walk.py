"""The walk through a dynamic network, unit by unit: what the gates say, what is run, what it costs."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from . import costs, families, units
from .certainty import ask_layer_gate
from .configs import BudgetConfig
from .counting import count_macs
from .forcing import Forced, resolve
from .gates import Memory, sharpened, straight_through, widen


@dataclass
class Dynamic:
    """What a dynamic model knows beside its modules: `model.dynamic`."""

    base: type  # the stock class that `strip` gives back
    execution: str = "skip"
    budget: BudgetConfig | None = None
    forced: Forced | None = None
    gating: str = "hard"  # how gates decide in training: see set_gating
    temperature: float = 1.0  # of sampled decisions
    drawing: bool = False  # whether layer gates sample in eval too: training that leaves work out
    priced: costs.CostTable | None = None  # what `Decisions.cost` is counted by in training, if not by MACs
    price_lost: bool = False  # whether `priced` was forgotten, because the network was changed
    slices: units.Slices | None = None  # of an optimised copy: sliced weights of patterns met before
    origin: Any = None  # of an optimised copy: the model it was made from, on the meta device
    limit: costs.CostTable | None = None  # what a budget of milliseconds or millijoules is counted by
    tables: dict[Any, costs.CostTable] = field(default_factory=dict)

    def count_anew(self) -> None:
        """Forget what was counted, after the network's parts have changed; budgets by a table must be set again."""
        self.tables.clear()
        self.limit = None
        self.unprice()

    def unprice(self) -> None:
        """Forget what training counts by: a price in another unit than MACs must be set again."""
        self.price_lost = self.price_lost or self.priced is not None
        self.priced = None


def spread(values: Tensor, places: Tensor | None, count: int) -> Tensor:
    """Rows of some images among zeros for the rest: [B', ...] -> [count, ...]."""
    if places is None:
        return values
    out = torch.zeros(count, *values.shape[1:], dtype=values.dtype, device=values.device)
    out[places] = values
    return out


@dataclass
class Log:
    """The decisions of a walk, a column for each gated unit; rows are images, in their places in the batch."""

    batch: int
    layer_keep: list[Tensor] = field(default_factory=list)
    layer_prob: list[Tensor] = field(default_factory=list)
    channel_keep: list[Tensor] = field(default_factory=list)


def must_be_masked(model: Any, x: Tensor) -> bool:
    """Whether everything has to be computed: asked for, in training, or where values are not there to branch on."""
    if model.training or model.dynamic.execution == "masked" or isinstance(x, torch.fx.Proxy):
        return True
    return x.device.type == "meta" or torch.compiler.is_exporting()


def dynamic_of(model: Any) -> Dynamic:
    """`model.dynamic`.

    Raises:
        ValueError: if the model is a stock one.
    """
    dynamic = getattr(model, "dynamic", None)
    if not isinstance(dynamic, Dynamic):
        raise ValueError(
            f"a dynamic model is needed; {families.model_name(model)!r} has no gates and no exits: "
            "use add_layer_gates, add_channel_gates or add_exits first"
        )
    return dynamic


def table_for(model: Any, input_size: Sequence[int]) -> costs.CostTable:
    """The model's cost table, counted once for each input size [C, H, W]."""
    channels, height, width = input_size
    key = (channels, height, width, families.classes(model))
    found = model.dynamic.tables.get(key)
    return _counted(model, key) if found is None else found


@torch.compiler.disable
def _counted(model: Any, key: tuple[int, int, int, int]) -> costs.CostTable:
    """Count a network, and remember what was found."""
    table = model.dynamic.tables[key] = count_macs(model.dynamic.origin or model, key[:3])
    return table


def _limit_table(model: Any, x: Tensor) -> costs.CostTable:
    """The table that a budget of milliseconds or millijoules was set with."""
    table = model.dynamic.limit
    if table is None or table.input_size != tuple(x.shape[1:]):
        if table is None:
            raise ValueError("the model was changed after its budget was set: set the budget again")
        raise ValueError(
            f"the budget's table is for input size {table.input_size}; found {tuple(x.shape[1:])}: "
            "set the budget again with input_size="
        )
    if table.machine and not torch.compiler.is_compiling():
        here = costs.machine_name(model)
        if table.machine.removesuffix(costs.OPTIMISED) != here.removesuffix(costs.OPTIMISED):
            raise ValueError(f"the budget's table is of another machine: {table.machine}; found {here}: set it again")
    return table


@dataclass
class Account:
    """What the images that are still on their way have spent."""

    table: costs.CostTable
    spent: Tensor | float | int

    def charge(self, cost: Tensor | float | int) -> None:
        """Add a cost, one for all or one for each image."""
        self.spent = self.spent + cost

    def exit_cost(self, index: int) -> Any:
        """Cost of classifying at exit `index`; the head comes with what follows the last stage."""
        last = index == len(self.table.exits) - 1
        return self.table.exits[index].head + (self.table.leave[-1] if last else 0)


class Walk:
    """One forward pass, exit by exit.

    While skipping, images that have left are gone from `x`, and `rows` are the places of those still there. While
    masked, all stay, and `alive` says who would still be there.
    """

    def __init__(self, model: Any, x: Tensor, log: Log | None = None, budgeted: bool = True) -> None:
        """Run the stem.

        Args:
            model: a dynamic model.
            x: images [B, C, H, W].
            log: collects decisions, if given.
            budgeted: whether the model's budget is to be kept.
        """
        if isinstance(x, Tensor) and x.dim() != 4:
            raise ValueError(f"images [batch, channels, height, width] are needed; found a shape of {list(x.shape)}")
        self.model, self.log = model, log
        self.family = families.family(model)
        self.units = families.units(model)
        self.masked = must_be_masked(model, x)
        self.layer_gates = getattr(model, "layer_gates", None)
        self.channel_gates = getattr(model, "channel_gates", None)
        self.exits = getattr(model, "exits", None)
        self.layer_levels, self.channel_levels = self._levels(self.layer_gates), self._levels(self.channel_gates)
        self.stops = (*(self.exits.after if self.exits is not None else ()), len(self.units) - 1)
        # All images go to the head in a graph of torch.fx, which has no values to branch on, and without classes.
        self.whole = isinstance(x, torch.fx.Proxy) or getattr(model, "num_classes", None) == 0
        budget = model.dynamic.budget if budgeted and not model.training and not self.whole else None
        self.accounts: list[Account] = []
        self.macs = self.limit = None
        if log is not None or (budget is not None and budget.unit == "macs"):
            self.macs = self._open_account(table_for(model, tuple(x.shape[1:])))
        priced = model.dynamic.priced if log is not None and model.training else None
        if log is not None and model.training and model.dynamic.price_lost:
            raise ValueError("the model was changed after its price was set: set the price again")
        self.price = self.macs if priced is None else self._open_account(priced)
        if budget is not None and budget.unit is not None:
            self.limit = self.macs if budget.unit == "macs" else self._open_account(_limit_table(model, x))
        self.forced = resolve(model, x) if model.dynamic.forced is not None else None
        self.shared = False  # whether the caller keeps what units give
        self.learning = not self.masked and _has_learners(self.layer_gates, self.channel_gates)
        self.rows: Tensor | None = None
        self.alive: Tensor | None = None
        self.memory: Memory = None
        self.next = 0  # the unit to come
        if model.dynamic.origin is not None:
            x = x.contiguous(memory_format=torch.channels_last)
        self.tapped: Any  # until the first unit runs
        self.tapped, self.x = self.family.stem(model, x)

    def _open_account(self, table: costs.CostTable) -> Account:
        self.accounts.append(Account(table, table.stem))
        return self.accounts[-1]

    def _levels(self, gates: Any) -> Any:
        """A gate's thresholds in eval, as numbers where values may be read."""
        if gates is None or self.model.training:
            return None
        return gates.threshold if self.masked else gates.threshold.tolist()

    def images(self) -> int:
        """How many images are still on their way."""
        return self.x.shape[0]

    def to_exit(self, index: int) -> None:
        """Run the units up to exit `index`."""
        self.to_unit(self.stops[index])

    def to_unit(self, index: int) -> None:
        """Run the units up to `index`, that one included."""
        while self.next <= index:
            self.tapped = None  # who wants it has it by now
            self._run(self.next, self.units[self.next])
            self.next += 1

    def classify(self, index: int, x: Tensor) -> Tensor:
        """Logits of exit `index`; past the last one is the model's own head. x: [B, C, H, W]."""
        if index < len(self.stops) - 1:
            assert self.exits is not None
            return self.exits(index, x)
        return self.family.head(self.model, self.finish(x))

    def pay_exit(self, index: int) -> None:
        """Charge every image that is here with exit `index`."""
        for account in self.accounts:
            account.charge(account.exit_cost(index))

    def drop(self, leaving: Tensor) -> None:
        """Let images go. leaving: bool over the images in `x`."""
        if self.masked:
            self.alive = ~leaving if self.alive is None else self.alive & ~leaving
            return
        stay = (~leaving).nonzero().flatten()
        self.rows = stay if self.rows is None else self.rows[stay]
        self.x = units.gathered(self.x, stay)
        if self.memory is not None:
            self.memory = (self.memory[0][stay], self.memory[1][stay])
        for account in self.accounts:
            if isinstance(account.spent, Tensor):
                account.spent = account.spent[stay]

    # One unit --------------------------------------------------------------------------------------------------------

    def _run(self, i: int, unit: families.Unit) -> None:
        if i > 0 and self.units[i - 1].last:
            self.x = self.family.leave(self.model, self.units[i - 1].stage, self.x)
            for account in self.accounts:
                account.charge(account.table.leave[self.units[i - 1].stage])
        keep = self._ask_layer(i - 1) if i > 0 and self.layer_gates is not None else None
        run = self._run_masked if self.masked else self._run_skipping
        run(i, unit, keep)

    def finish(self, x: Tensor) -> Tensor:
        """What the head is given, from what the last unit gave."""
        return self.family.leave(self.model, self.units[-1].stage, x) if self.units else x

    def _ask_layer(self, g: int) -> Tensor | None:
        """keep [B] of gated unit `g`: bool in eval, straight-through float in training; None where nobody looks."""
        assert self.layer_gates is not None
        if not (self.masked or self.accounts or g in self.layer_gates.asked):
            return None  # a settled unit, and neither a log nor a budget: `_known` says all
        prob, self.memory = ask_layer_gate(self.model, g, self.x, self.memory)
        runs = self.layer_gates.settled.get(g)
        if runs is not None:
            keep = torch.full_like(prob, runs, dtype=None if self.model.training else torch.bool)
        elif self.forced is None or self.forced.layer_keep is None:
            keep = self._choose(prob, self.layer_levels, g)
        else:
            # `decide` ties the logits to the gates: what runs need not carry a gradient of zero back through all units
            tied = prob if self.log is None else prob.detach()
            keep = self._instead(self.mine(self.forced.layer_keep[:, g]), tied)
        if self.log is not None:
            self.log.layer_prob.append(spread(self._living(prob), self.rows, self.log.batch))
            self.log.layer_keep.append(spread(self._living(keep), self.rows, self.log.batch))
        return keep

    def _choose(self, prob: Tensor, levels: Any, g: int) -> Tensor:
        """A decision from probabilities: bool in eval; in training a float by the model's gating."""
        if not self.model.training:
            if self.model.dynamic.drawing:
                return torch.bernoulli(sharpened(prob.detach(), self.model.dynamic.temperature)).bool()
            return prob >= levels[g]
        gating = self.model.dynamic.gating
        if gating == "soft":
            return prob
        if gating == "sample":
            return torch.bernoulli(sharpened(prob.detach(), self.model.dynamic.temperature))
        return straight_through(prob)

    def _ask_channels(self, g: int, x: Tensor, places: Tensor | None) -> list[Tensor]:
        """For each hidden width of gated unit `g`, keeps of its groups [B', groups]."""
        assert self.channel_gates is not None
        probs = self.channel_gates(g, x)
        if g in self.channel_gates.settled:
            return probs if self.model.training else [prob.bool() for prob in probs]
        sampled = self.model.training and self.model.dynamic.gating == "sample"  # sampling is for layer gates
        keeps = [straight_through(p) if sampled else self._choose(p, self.channel_levels, g) for p in probs]
        if self.forced is not None and self.forced.channel_keep is not None:
            first = self.forced.starts[g]
            for k, prob in enumerate(probs):
                wanted = self.mine(self.forced.channel_keep[first + k])
                keeps[k] = self._instead(wanted if places is None else wanted[places], prob)
        return keeps

    def _instead(self, wanted: Tensor, prob: Tensor) -> Tensor:
        """A forced decision in the place of one from ``prob``; in training a float with a gradient of zero."""
        return wanted.to(prob.dtype) + 0 * prob if self.model.training else wanted

    def mine(self, values: Tensor) -> Tensor:
        return values if self.rows is None else values[self.rows]

    def _living(self, values: Tensor) -> Tensor:
        """While masked, zero the rows of images that have left."""
        if self.alive is None:
            return values
        alive = self.alive.reshape(-1, *[1] * (values.dim() - 1))
        return values & alive if values.dtype == torch.bool else values * alive

    def _run_masked(self, i: int, unit: families.Unit, keep: Tensor | None) -> None:
        channels = self._ask_channels(i - 1, self.x, None) if i > 0 and self.channel_gates is not None else None
        wide = None if channels is None else self._widened(i - 1, channels)
        keep = None if self._known(i - 1) else keep
        for account in self.accounts:
            account.charge(account.table.units[i].price(keep, channels))
        if self.log is not None and channels is not None:
            for k in channels:
                shown = k if keep is None else (k & keep[:, None] if k.dtype == torch.bool else k * keep[:, None])
                self.log.channel_keep.append(self._living(shown))
        if self.model.training and self._nobody_runs(i - 1, keep):
            y = units.rest(unit, units.shortcut(unit, self.x))
        elif self.model.training and units.checkpointed(self.model, unit):
            y = checkpoint(units.run_masked, unit, self.x, keep, wide, use_reentrant=False)
        else:
            y = units.run_masked(unit, self.x, keep, wide)
        self.x = units.join(unit, self.x, y)

    def _nobody_runs(self, g: int, keep: Tensor | None) -> bool:
        """Whether gated unit `g` need not be computed in training: no image runs it, and no gate learns from it."""
        if self._known(g) is False:
            return True
        if self.forced is None or self.forced.layer_keep is None or keep is None:
            return False
        followed = torch.compiler.is_compiling() or torch.jit.is_tracing() or type(keep) is not Tensor
        return not followed and not keep.requires_grad and keep.device.type == "cpu" and not bool(keep.any())

    def _known(self, g: int) -> bool | None:
        """Whether all images run gated unit `g`, or none, if that is known without waiting for a value."""
        runs: bool | None = None if self.layer_gates is None else self.layer_gates.settled.get(g)
        idle = runs is None and self.forced is not None and g in self.forced.idle
        return False if idle else runs

    def _run_skipping(self, i: int, unit: families.Unit, keep: Tensor | None) -> None:
        g = i - 1
        known = self._known(g)
        keep = None if known else keep
        chosen: list[Tensor] | None = None

        def choose(x: Tensor, places: Tensor | None) -> list[Tensor] | None:
            nonlocal chosen
            if g < 0 or self.channel_gates is None:
                return None
            keeps = self._ask_channels(g, x, places)
            chosen = keeps
            if places is not None and self.accounts:
                chosen = [spread(k, places, self.images()) for k in keeps]
            return keeps

        gates = self.channel_gates if g >= 0 else None
        sizes = None if gates is None else gates.sizes[g]
        settled = None if gates is None else gates.settled.get(g)
        reuse = not (self.shared or self.x.requires_grad or self.learning)  # a gate may need x again
        if known is False:
            y = units.rest(unit, units.shortcut(unit, self.x))
        else:
            y = units.run_skipping(unit, self.x, keep, settled or choose, reuse, self.model.dynamic.slices, sizes)
        if settled is not None and known is not False and self.accounts:
            chosen = self._settled(settled, keep)
        if sizes is not None and chosen is None:  # no image ran
            chosen = [torch.zeros(self.images(), len(s), dtype=torch.bool, device=y.device) for s in sizes]
        if self.accounts:
            self._charge(i, keep, chosen)
        if self.log is not None and chosen is not None:
            self.log.channel_keep += [spread(k, self.rows, self.log.batch) for k in chosen]
        self.x = units.join(unit, self.x, y)

    def _settled(self, parts: Sequence[Sequence[bool]], keep: Tensor | None) -> list[Tensor]:
        """For each hidden width, which of its groups [B, groups] the images that keep the unit compute."""
        rows = [torch.tensor([part], device=self.x.device).expand(self.images(), -1) for part in parts]
        return rows if keep is None else [row & keep[:, None] for row in rows]

    def _charge(self, i: int, keep: Tensor | None, chosen: list[Tensor] | None) -> None:
        """Charge unit `i` to the images that are here; to a single one on a CPU in plain numbers."""
        if self.images() != 1 or self.x.device.type != "cpu":
            for account in self.accounts:
                account.charge(account.table.units[i].price(keep, chosen))
            return
        runs = keep is None or bool(keep)
        groups = None if chosen is None else [k[0].tolist() for k in chosen]
        for account in self.accounts:
            account.charge(account.table.units[i].price_one(runs, groups))

    def _widened(self, g: int, keeps: list[Tensor]) -> list[Tensor]:
        assert self.channel_gates is not None
        return [widen(keep, sizes) for keep, sizes in zip(keeps, self.channel_gates.sizes[g], strict=True)]


def _has_learners(*parts: Any) -> bool:
    """Whether gates keep what they saw for a backward pass."""
    return torch.is_grad_enabled() and any(
        p.requires_grad for part in parts if part is not None for p in part.parameters()
    )
