"""What a part of a dynamic network is to be: small frozen dataclasses, checked when made."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar, Self

LAYER_GATE_KINDS = ("ff1", "ff2", "rnn", "linear")
MEMORIES = ("all", "free")
CHANNEL_GATE_MODES = ("independent", "nested")
INITS = ("open", "random")


def one_of(what: str, value: Any, allowed: tuple[str, ...]) -> None:
    """Raise a `ValueError` that names what was wanted unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{what} must be one of {', '.join(map(repr, allowed))}; found {value!r}")


def positive_int(what: str, value: Any) -> None:
    """Raise a `ValueError` unless `value` is an int of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{what} must be an int of at least 1; found {value!r}")


def ratio(what: str, value: Any) -> None:
    """Raise a `ValueError` unless `value` is a number in 0..1."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise ValueError(f"{what} must be a number in 0..1; found {value!r}")


def positive(what: str, value: Any) -> None:
    """Raise a `ValueError` unless `value` is a finite number above 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"{what} must be a finite number above 0; found {value!r}")


class Config:
    """Dict round trip and lenient making, shared by the configs below."""

    shorthand: ClassVar[str | None] = None  # the field that a plain string sets

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        fields = dataclasses.asdict(self)  # type: ignore[call-overload]
        return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The inverse of `to_dict`.

        Raises:
            TypeError: for a field that does not exist.
            ValueError: for a value that is not allowed.
        """
        known = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise TypeError(f"{cls.__name__} takes {', '.join(known)}; found {', '.join(map(repr, unknown))}")
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})

    @classmethod
    def make(cls, value: Any) -> Self:
        """A config from a config, a dict, a shorthand string, or `None` and `True` for the defaults."""
        if isinstance(value, cls):
            return value
        if value is None or value is True:
            return cls()
        if isinstance(value, dict):
            return cls.from_dict(value)
        if isinstance(value, str) and cls.shorthand is not None:
            return cls(**{cls.shorthand: value})
        raise TypeError(f"a {cls.__name__}, a dict, or None is needed; found {type(value).__name__} {value!r}")


@dataclass(frozen=True)
class LayerGateConfig(Config):
    """Layer gates (SkipNet, section 3.1).

    Attributes:
        kind: "ff1" (FFGate-I), "ff2" (FFGate-II), "rnn" (RNNGate) or "linear" (pool and linear only).
        init: "open": a fresh gate keeps for every input; "random": the papers' start.
        width: hidden channels of an FFGate's convolutions. None: as many as the input has where that keeps the gate
            near the paper's share of a unit, fewer elsewhere.
        shut: names of gated units that no image runs, whatever their gates say: see `shut_units`.
        open: names of gated units that every image runs which comes there: see `open_units`.
        memory: what the state of an RNN gate has seen. "all": the inputs of all gated units before, of those that are
            shut or open too, whose gates are run for it; "free": of those that are neither, whose gates alone are run.
        certainty: whether gates are also told how certain the network's own classifier is of the unit's input, as if
            this unit and all after it were skipped (ours: it is what exits decide by). Those of residual units within
            the last stage and of dense layers are; a dense layer's gate then runs the transitions that are to come.
    """

    shorthand: ClassVar[str | None] = "kind"
    kind: str = "rnn"
    init: str = "open"
    width: int | None = None
    shut: tuple[str, ...] = ()
    open: tuple[str, ...] = ()
    memory: str = "all"
    certainty: bool = False

    def __post_init__(self) -> None:
        one_of("kind of layer gate", self.kind, LAYER_GATE_KINDS)
        one_of("init", self.init, INITS)
        if self.width is not None:
            positive_int("width", self.width)
            if self.width > 4096:
                raise ValueError(f"width must be at most 4096; found {self.width}")
        one_of("memory", self.memory, MEMORIES)
        if not isinstance(self.certainty, bool):
            raise ValueError(f"certainty must be True or False; found {self.certainty!r}")
        for what, names in (("shut", self.shut), ("open", self.open)):
            if not isinstance(names, tuple) or not all(isinstance(name, str) for name in names):
                raise ValueError(f"{what} must be a tuple of names of units; found {names!r}")
        if both := set(self.shut) & set(self.open):
            raise ValueError(f"a unit is shut for good or open for good; found both: {', '.join(sorted(both))}")


@dataclass(frozen=True)
class ChannelGateConfig(Config):
    """Channel gates (DDI, section 3.1.3 and supplement 7).

    Attributes:
        group_size: hidden channels that are kept or dropped together (the paper's form is 1). A layer narrower than
            this has a single group; the last group of a layer may be smaller. Grouped convolutions and group norms
            round it up to whole groups of their own.
        mode: "independent": any set of groups; "nested": the kept groups are always the first ones.
        init: "open" or "random", as for layer gates.
        levels: how many groups a nested gate divides a layer into (it does not use `group_size`).
        settled: gated units whose channels are the same for all images, with a 1 or 0 for each group, hidden widths in
            order, as in "layer3.1=1110": see `settle_channels`.
    """

    shorthand: ClassVar[str | None] = "mode"
    group_size: int = 16
    mode: str = "independent"
    init: str = "open"
    levels: int = 4
    settled: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        positive_int("group_size", self.group_size)
        one_of("mode of channel gate", self.mode, CHANNEL_GATE_MODES)
        one_of("init", self.init, INITS)
        positive_int("levels", self.levels)
        wanted = "settled must be a tuple of strings UNIT=DIGITS, with a 1 or 0 for each group of the unit"
        if not isinstance(self.settled, tuple):
            raise ValueError(f"{wanted}; found {self.settled!r}")
        for one in self.settled:
            name, _, digits = one.partition("=") if isinstance(one, str) else ("", "", "")
            if not name or not digits or set(digits) - {"0", "1"}:
                raise ValueError(f"{wanted}; found {one!r}")
        if len(self.channels_of()) < len(self.settled):
            raise ValueError(f"settled must name each unit once; found {', '.join(self.settled)}")

    def channels_of(self) -> dict[str, str]:
        """For each unit whose channels are settled, a 1 or 0 for each group."""
        return dict(one.split("=", 1) for one in self.settled)


@dataclass(frozen=True)
class ExitConfig(Config):
    """Exits (DDI, supplement 8).

    Attributes:
        after: names of stages or units that get a branch classifier ("layer2", "layer3.1", "features.denseblock1"),
            or numbers of stages, the first being 1. None: every stage but the last.
        hidden: channels of one more convolution in each branch, after its pooling steps, of which there are none in the
            last stage (ours). A linear classifier alone needs features that are made for it; with this, exits do well
            in a network that was trained without them. 0: none.
    """

    after: tuple[str | int, ...] | None = None
    hidden: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.hidden, bool) or not isinstance(self.hidden, int) or self.hidden < 0:
            raise ValueError(f"hidden must be an int of at least 0; found {self.hidden!r}")
        if self.after is None:
            return
        if not isinstance(self.after, tuple) or not self.after:
            raise ValueError(f"after must be None or a tuple of at least one stage or unit; found {self.after!r}")
        for place in self.after:
            if isinstance(place, bool) or not isinstance(place, (str, int)):
                raise ValueError(f"after must hold names (str) or numbers of stages (int); found {place!r}")


@dataclass(frozen=True)
class BudgetConfig(Config):
    """What one image may cost; exactly one of the first six is given.

    Attributes:
        macs: multiply-adds, one value for all images or one per image of the batch. Hard: no image ever costs more.
        fraction: the same as a share of the stock model's MACs at the same input size.
        latency_ms: milliseconds, by a table measured on this machine.
        energy_mj: millijoules, by an energy table.
        exit: every image leaves at this exit (0 is the first, the last is the model's own head).
        confidence: an image leaves at the first exit whose largest softmax probability is at least this.
        input_size: (channels, height, width) that `macs` is checked for when the budget is set.
    """

    macs: int | tuple[int, ...] | None = None
    fraction: float | None = None
    latency_ms: float | None = None
    energy_mj: float | None = None
    exit: int | None = None
    confidence: float | None = None
    input_size: tuple[int, int, int] | None = None

    def __post_init__(self) -> None:
        options = ("macs", "fraction", "latency_ms", "energy_mj", "exit", "confidence")
        given = [name for name in options if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"a budget needs exactly one of {', '.join(options)}; found {', '.join(given) or 'none'}")
        if self.macs is not None:
            values = self.macs if isinstance(self.macs, tuple) else (self.macs,)
            if not values:
                raise ValueError("macs must hold at least one value; found none")
            for value in values:
                positive_int("macs", value)
        for name in ("fraction", "latency_ms", "energy_mj"):
            if getattr(self, name) is not None:
                positive(name, getattr(self, name))
        if self.exit is not None and (isinstance(self.exit, bool) or not isinstance(self.exit, int) or self.exit < 0):
            raise ValueError(f"exit must be an int of at least 0; found {self.exit!r}")
        if self.confidence is not None:
            ratio("confidence", self.confidence)
        if self.input_size is not None:
            check_input_size(self.input_size)

    @property
    def unit(self) -> str | None:
        """What a hard budget is counted in; None if no image's cost is bounded."""
        if self.macs is not None or self.fraction is not None:
            return "macs"
        return "latency_ms" if self.latency_ms is not None else "energy_mj" if self.energy_mj is not None else None


@dataclass(frozen=True)
class EnergyConfig(Config):
    """What computing and moving data costs, in picojoules.

    The defaults are those of a 45 nm chip: 3.7 pJ for a 32-bit floating-point multiplication and 0.9 pJ for an
    addition, 640 pJ for 32 bits from DRAM (M. Horowitz, "Computing's energy problem", ISSCC 2014).

    Attributes:
        pj_per_mac: of one multiply-add.
        pj_per_byte: of one byte of weights, inputs or outputs, read or written once.
        parts: measured millijoules of every part of the stock model by name ("stem", the units' names, "leave 0" and
            so on for transitions, "head") and of exits ("exit 0" and so on). What gates cost then stays what the
            constants say.
    """

    pj_per_mac: float = 4.6
    pj_per_byte: float = 160.0
    parts: dict[str, float] | None = None

    def __post_init__(self) -> None:
        positive("pj_per_mac", self.pj_per_mac)
        positive("pj_per_byte", self.pj_per_byte)
        if self.parts is not None and not isinstance(self.parts, dict):
            raise ValueError(f"parts must be a dict of millijoules by name; found {type(self.parts).__name__}")
        for name, value in (self.parts or {}).items():
            positive(f"parts[{name!r}]", value)


def check_input_size(size: Any) -> tuple[int, int, int]:
    """(channels, height, width) as a tuple of three positive ints, else a `ValueError`."""
    if not isinstance(size, (tuple, list)) or len(size) != 3:
        raise ValueError(f"input_size must be (channels, height, width); found {size!r}")
    for value in size:
        positive_int("each of input_size", value)
    return (int(size[0]), int(size[1]), int(size[2]))
