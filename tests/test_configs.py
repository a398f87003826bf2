"""Configs: checked when made, and the same after a trip through JSON."""

import dataclasses
import json
import math
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from timm_dynamic.configs import (
    BudgetConfig,
    ChannelGateConfig,
    Config,
    ExitConfig,
    LayerGateConfig,
    check_input_size,
)

CONFIGS = [LayerGateConfig, ChannelGateConfig, ExitConfig, BudgetConfig]
WIDTHS = st.integers(1, 4096)
LAYER = st.builds(
    LayerGateConfig,
    kind=st.sampled_from(["ff1", "ff2", "rnn", "linear"]),
    init=st.sampled_from(["open", "random"]),
    width=st.none() | WIDTHS,
)
CHANNEL = st.builds(
    ChannelGateConfig,
    group_size=WIDTHS,
    mode=st.sampled_from(["independent", "nested"]),
    init=st.sampled_from(["open", "random"]),
    levels=st.integers(1, 64),
)
EXIT = st.builds(
    ExitConfig,
    after=st.none() | st.lists(st.text(min_size=1) | WIDTHS, min_size=1).map(tuple),
    hidden=st.integers(0, 4096),
)
SIZES = st.none() | st.tuples(WIDTHS, WIDTHS, WIDTHS)
MACS = st.integers(1, 2**60)
BUDGET = st.one_of(
    st.builds(BudgetConfig, macs=MACS | st.lists(MACS, min_size=1).map(tuple), input_size=SIZES),
    st.builds(BudgetConfig, fraction=st.floats(1e-6, 10), input_size=SIZES),
    st.builds(BudgetConfig, exit=st.integers(0, 200)),
    st.builds(BudgetConfig, confidence=st.floats(0, 1)),
)


@given(LAYER | CHANNEL | EXIT | BUDGET)
def test_json_round_trip(config: Config) -> None:
    values = json.loads(json.dumps(config.to_dict()))
    again = type(config).from_dict(values)
    assert again == config
    assert [type(v) for v in vars(again).values()] == [type(v) for v in vars(config).values()]


@pytest.mark.parametrize("cls", CONFIGS)
def test_frozen_and_small(cls: Any) -> None:
    fields = dataclasses.fields(cls)
    assert len(fields) < 10
    config = cls(exit=0) if cls is BudgetConfig else cls()
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(config, fields[0].name, None)


@pytest.mark.parametrize("cls", CONFIGS)
def test_unknown_field_is_a_type_error_that_names_it(cls: Any) -> None:
    with pytest.raises(TypeError, match="'colour'"):
        cls.from_dict({"colour": 1})
    with pytest.raises(TypeError, match="colour"):
        cls(colour=1)


def test_made_from_what_a_user_gives() -> None:
    assert LayerGateConfig.make(None) == LayerGateConfig.make(True) == LayerGateConfig()
    assert LayerGateConfig.make("ff1") == LayerGateConfig.make({"kind": "ff1"}) == LayerGateConfig(kind="ff1")
    assert ChannelGateConfig.make("nested") == ChannelGateConfig(mode="nested")
    assert ExitConfig.make({"after": ["layer2", 3]}) == ExitConfig(after=("layer2", 3))
    config = LayerGateConfig("linear", "random")
    assert LayerGateConfig.make(config) is config


@pytest.mark.parametrize(
    ("cls", "value"), [(LayerGateConfig, 3), (LayerGateConfig, ["rnn"]), (ExitConfig, "layer1"), (ChannelGateConfig, 8)]
)
def test_made_from_the_wrong_type(cls: Any, value: Any) -> None:
    with pytest.raises(TypeError, match=f"{cls.__name__}.*found {type(value).__name__} {re.escape(repr(value))}"):
        cls.make(value)


def test_another_config_is_refused() -> None:
    with pytest.raises(TypeError, match="ChannelGateConfig"):
        LayerGateConfig.make(ChannelGateConfig())


# config, wrong fields, what was wanted, what was found
WRONG: list[tuple[Any, dict[str, Any], str, str]] = [
    (LayerGateConfig, {"kind": "mlp"}, "'ff1', 'ff2', 'rnn', 'linear'", "'mlp'"),
    (LayerGateConfig, {"kind": None}, "'ff1', 'ff2', 'rnn', 'linear'", "None"),
    (LayerGateConfig, {"init": "closed"}, "'open', 'random'", "'closed'"),
    (LayerGateConfig, {"width": 0}, "at least 1", "0"),
    (LayerGateConfig, {"width": 2.5}, "int", "2.5"),
    (LayerGateConfig, {"width": True}, "int", "True"),
    (LayerGateConfig, {"width": 10**9}, "at most", "1000000000"),
    (ChannelGateConfig, {"group_size": 0}, "at least 1", "0"),
    (ChannelGateConfig, {"group_size": "16"}, "int", "'16'"),
    (ChannelGateConfig, {"mode": "random"}, "'independent', 'nested'", "'random'"),
    (ChannelGateConfig, {"init": ""}, "'open', 'random'", "''"),
    (ChannelGateConfig, {"levels": -1}, "at least 1", "-1"),
    (ExitConfig, {"after": ()}, "at least one", "()"),
    (ExitConfig, {"after": "layer1"}, "tuple", "'layer1'"),
    (ExitConfig, {"after": (1.5,)}, "str", "1.5"),
    (ExitConfig, {"hidden": -1}, "hidden must be an int of at least 0", "-1"),
    (ExitConfig, {"hidden": 2.0}, "hidden must be an int of at least 0", "2.0"),
    (ExitConfig, {"hidden": True}, "hidden must be an int of at least 0", "True"),
    (ExitConfig, {"after": (True,)}, "str", "True"),
    (BudgetConfig, {}, "exactly one", "none"),
    (BudgetConfig, {"macs": 10, "fraction": 0.5}, "exactly one", "macs, fraction"),
    (BudgetConfig, {"exit": 0, "confidence": 0.5}, "exactly one", "exit, confidence"),
    (BudgetConfig, {"macs": 0}, "at least 1", "0"),
    (BudgetConfig, {"macs": 1.5}, "int", "1.5"),
    (BudgetConfig, {"macs": (5, -5)}, "at least 1", "-5"),
    (BudgetConfig, {"macs": ()}, "at least one", "none"),
    (BudgetConfig, {"fraction": 0}, "above 0", "0"),
    (BudgetConfig, {"fraction": -0.1}, "above 0", "-0.1"),
    (BudgetConfig, {"fraction": "half"}, "number", "'half'"),
    (BudgetConfig, {"fraction": True}, "number", "True"),
    (BudgetConfig, {"fraction": math.nan}, "number", "nan"),
    (BudgetConfig, {"fraction": math.inf}, "finite", "inf"),
    (BudgetConfig, {"exit": -1}, "at least 0", "-1"),
    (BudgetConfig, {"exit": True}, "int", "True"),
    (BudgetConfig, {"confidence": 1.01}, "0..1", "1.01"),
    (BudgetConfig, {"confidence": -0.01}, "0..1", "-0.01"),
    (BudgetConfig, {"confidence": math.nan}, "0..1", "nan"),
    (BudgetConfig, {"exit": 0, "input_size": (3, 32)}, "(channels, height, width)", "(3, 32)"),
    (BudgetConfig, {"exit": 0, "input_size": (3, 0, 32)}, "at least 1", "0"),
]


@pytest.mark.parametrize(("cls", "fields", "wanted", "found"), WRONG)
def test_wrong_values_say_what_was_wanted_and_found(cls: Any, fields: dict[str, Any], wanted: str, found: str) -> None:
    with pytest.raises(ValueError, match=f"{re.escape(wanted)}.*found {re.escape(found)}"):
        cls(**fields)


def test_input_size() -> None:
    assert check_input_size([3, 32, 48]) == (3, 32, 48)
    for wrong in (32, (3, 32), (3, 32, 32, 1), (3, 32, 1.5), "333"):
        with pytest.raises(ValueError, match="input_size"):
            check_input_size(wrong)
