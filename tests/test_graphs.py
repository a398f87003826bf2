"""What is recorded as a CUDA graph must neither wait for a value nor copy one from the CPU: shown on pretended GPUs."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import timm_dynamic as td
from timm_dynamic.surgery import force_always, set_policy
from timm_dynamic.tasks import BaseTask, DynamicTask, ExitsTask, FollowTask, WarmupTask
from timm_dynamic.walk import table_for

sys.path.insert(0, str(Path(__file__).parents[1] / "train_recipes"))

from graphs import RECORDED, takes

NAME, IMAGES = "resnet20_cifar", (4, 3, 32, 32)
POLICY = "11110111"


class OnGpuOnly(TorchDispatchMode):
    """Fails where a tensor on the CPU takes part."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves((args, kwargs, out)):
            assert not isinstance(value, Tensor) or value.device.type == "cuda", f"{func}: {value}"
        return out


def pretend(module: nn.Module) -> None:
    """Put empty tensors on a pretended GPU in the place of parameters and buffers."""
    for part in module.modules():
        for name, value in part.named_parameters(recurse=False):
            setattr(part, name, nn.Parameter(torch.empty(value.shape, device="cuda"), value.requires_grad))
        for name, value in part.named_buffers(recurse=False):
            part._buffers[name] = torch.empty(value.shape, dtype=value.dtype, device="cuda")


def step(task: Any, before: Callable[[], object] = lambda: None) -> dict[str, Tensor]:
    """The forward pass of a task on a pretended GPU."""
    if hasattr(task.model, "dynamic"):
        table_for(task.model, IMAGES[1:])  # counted in the passes before the recording
    task.train()
    with FakeTensorMode():
        for module in (task, *getattr(task, "teacher", ())):
            pretend(module)
        before()
        x, y = torch.empty(IMAGES, device="cuda"), torch.zeros(IMAGES[0], dtype=torch.int64, device="cuda")
        with OnGpuOnly():
            found: dict[str, Tensor] = task(x, y)
    return found


def stock() -> Any:
    return timm.create_model(NAME, pretrained=False)


def gated(**config: Any) -> Any:
    return td.set_execution(td.add_layer_gates(stock(), td.LayerGateConfig(**config)), "masked")


def dynamic(model: nn.Module, **more: Any) -> DynamicTask:
    return DynamicTask(model, 4e7, 10, target=0.5, teacher=stock(), distill_exits=0.5, **more)


def test_a_stock_network() -> None:
    assert step(BaseTask(stock(), teacher=stock()))["loss"].device.type == "cuda"


def test_a_network_of_one_policy() -> None:
    model = gated()
    step(BaseTask(model, teacher=stock()), lambda: set_policy(model, POLICY))


@pytest.mark.parametrize("config", [{"kind": "rnn"}, {"kind": "ff1"}, {"certainty": True}], ids=str)
def test_layer_gates(config: dict[str, Any]) -> None:
    step(dynamic(gated(**config), information=0.1))


@pytest.mark.parametrize("mode", ["independent", "nested"])
def test_channel_gates_and_exits(mode: str) -> None:
    model = td.add_channel_gates(gated(), {"group_size": 8, "mode": mode})
    step(dynamic(td.add_exits(model, td.ExitConfig(after=("layer2.0", "layer3.0")))))


@pytest.mark.parametrize("free", [0, 2])
def test_settled_units(free: int) -> None:
    model = gated()
    names = model.layer_gates.gated
    td.open_units(td.shut_units(model, names[:2]), names[2 : len(names) - free])
    step(dynamic(td.add_exits(model)))


def test_a_dense_network() -> None:
    model = td.set_execution(td.add_layer_gates(timm.create_model("densenet40_cifar", pretrained=False)), "masked")
    step(DynamicTask(model, 7e7, 10, alpha=0.1))


def test_gates_or_exits_alone() -> None:
    step(WarmupTask(gated()))
    step(ExitsTask(td.add_exits(gated())))


def test_what_is_recorded() -> None:
    model = gated()
    tasks = (BaseTask(stock()), WarmupTask(model), dynamic(model), ExitsTask(td.add_exits(model)))
    assert {type(task) for task in tasks} == set(RECORDED)
    assert all(map(takes, tasks))
    dropping = BaseTask(force_always(gated(), layer_keep=0.6))
    assert not takes(dropping)
    with pytest.raises(AssertionError, match="rand"):
        step(dropping)
    waiting = FollowTask(gated(), POLICY)
    assert not takes(waiting)
    with pytest.raises(DataDependentOutputException):
        step(waiting)


def test_that_waiting_would_be_seen() -> None:
    class Waits(BaseTask):
        def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
            return {"loss": super().forward(x, y)["loss"] * float(x.mean())}

    with pytest.raises(DataDependentOutputException):
        step(Waits(stock()))


def test_that_a_copy_would_be_seen() -> None:
    class Copies(BaseTask):
        def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
            return {"loss": super().forward(x, y)["loss"] * torch.tensor(2.0).to(x.device)}

    with pytest.raises(AssertionError, match="aten"):
        step(Copies(stock()))
