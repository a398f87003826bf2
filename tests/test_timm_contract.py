"""What timm asks of every model, asked of ours: on every kind of ResNet and DenseNet that the names stand for.

Every name gets few blocks, small images and batch norms that matter (a fresh timm block is the identity). `ddi_*` has
all parts, so it stands for every base; the other two stand beside it on the smallest.
"""

import copy
import functools
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models import (
    FeatureInfo,
    get_notrace_functions,
    get_notrace_modules,
    group_parameters,
    load_checkpoint,
    resume_checkpoint,
)
from timm.optim import create_optimizer_v2
from timm.task import ClassificationTask
from timm.utils import CheckpointSaver, ModelEmaV3
from torch import Tensor, nn
from torch.fx import symbolic_trace
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

import timm_dynamic as td

IMAGENET = (
    "resnet18",
    "resnet50",
    "resnet50d",
    "seresnet50",
    "resnetblur50",
    "resnet50_gn",
    "densenet121",
    "densenetblur121d",
)
SMALLEST = ("skipnet_resnet18", "iadi_resnet18", "skipnet_resnet20_cifar", "iadi_resnet20_cifar")
NAMES = (*(f"ddi_{base}" for base in (*IMAGENET, "resnet20_cifar", "densenet100_cifar")), *SMALLEST)
COMPILED = ("ddi_resnet20_cifar", "ddi_densenet121")
every_name = pytest.mark.parametrize("name", NAMES)


def make(name: str, **kwargs: Any) -> Any:
    """A model of the kind that the name stands for, with two units in the first and third stage, one in the others."""
    depth = (2, 1, 2) if name.endswith("cifar") else (2, 1, 2, 1)
    return timm.create_model(name, **{"block_config" if "densenet" in name else "layers": depth}, **kwargs)


def size_of(name: str) -> int:
    """Side of the images: 2 x 2 features or more at the end."""
    return 16 if name.endswith("cifar") else 64


def images(name: str, channels: int = 3, batch: int = 2) -> Tensor:
    size = size_of(name)
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(7))


def alive(model: nn.Module) -> nn.Module:
    """Give batch norms weights and statistics that matter."""
    generator = torch.Generator().manual_seed(3)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.bias.data, module.running_mean, module.running_var):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) * 0.5 + 0.5)
    return model


@functools.lru_cache
def shared(name: str) -> Any:
    """A model in eval mode that no test may change."""
    torch.manual_seed(0)
    return alive(make(name, num_classes=11)).eval()


def own(name: str) -> Any:
    """A model in eval mode that a test may change."""
    return copy.deepcopy(shared(name))


@functools.lru_cache
@torch.no_grad()
def logits(name: str) -> Tensor:
    return shared(name)(images(name))


def outputs_of(outputs: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def assert_all_used(model: nn.Module, outputs: Tensor | Sequence[Tensor]) -> None:
    """Every parameter has a part in the outputs."""
    sum(output.float().square().mean() for output in outputs_of(outputs)).backward()  # type: ignore[union-attr]
    assert [key for key, parameter in model.named_parameters() if parameter.grad is None] == []


# Forward and backward ------------------------------------------------------------------------------------------------


@every_name
def test_eval_gives_a_tensor(name: str) -> None:
    assert isinstance(logits(name), Tensor)
    assert logits(name).shape == (2, 11)
    assert logits(name).isfinite().all()


@every_name
def test_training_reaches_every_parameter(name: str) -> None:
    model = own(name).train()
    outputs = model(images(name))
    assert isinstance(outputs, tuple) == name.startswith("ddi_")
    assert {output.shape for output in outputs_of(outputs)} == {(2, 11)}
    assert_all_used(model, outputs)


@every_name
def test_checkpointing_changes_nothing(name: str) -> None:
    model, x = own(name), images(name)
    model.set_grad_checkpointing()
    assert torch.equal(model(x), logits(name))
    model.train()
    assert_all_used(model, model(x))
    torch.testing.assert_close(model.forward_intermediates(x)[0], own(name).train().forward_intermediates(x)[0])


@every_name
def test_unknown_arguments(name: str) -> None:
    with pytest.raises(TypeError, match="wings"):
        make(name, wings=2)


@every_name
def test_arguments_of_create_model(name: str) -> None:
    rates = {} if "densenet" in name else {"drop_path_rate": 0.1, "drop_block_rate": 0.1}
    model = make(name, num_classes=4, in_chans=1, drop_rate=0.2, global_pool="catavgmax", **rates)
    x = images(name, channels=1)
    assert all(output.shape == (2, 4) for output in outputs_of(model.train()(x)))
    assert model.eval()(x).shape == (2, 4)


@pytest.mark.parametrize("name", [name for name in NAMES if "resnet" in name and "blur" not in name])
def test_output_stride(name: str) -> None:
    stride = 2 if name.endswith("cifar") else 8
    trunk = make(name, features_only=True, output_stride=stride).eval()
    assert trunk.feature_info.reduction()[-1] == stride
    assert trunk(images(name))[-1].shape[-1] == size_of(name) // stride


# Head ----------------------------------------------------------------------------------------------------------------


@every_name
def test_the_config_names_what_is_there(name: str) -> None:
    model = shared(name)
    cfg, parameters = model.default_cfg, dict(model.named_parameters())
    convs = [cfg["first_conv"]] if isinstance(cfg["first_conv"], str) else cfg["first_conv"]
    assert all(f"{module}.weight" in parameters for module in (*convs, cfg["classifier"]))
    assert cfg["architecture"] == name
    assert model.get_classifier() is model.get_submodule(cfg["classifier"])


@every_name
@torch.no_grad()
def test_features_pooled_and_not(name: str) -> None:
    model, x = own(name), images(name)
    side = size_of(name) * model.default_cfg["pool_size"][0] // model.default_cfg["input_size"][-1]
    features = model.forward_features(x)
    assert features.shape == (2, model.num_features, side, side)
    assert torch.equal(model.forward_head(features), logits(name))
    pooled = model.forward_head(features, pre_logits=True)
    assert pooled.shape == (2, model.head_hidden_size)
    model.reset_classifier(0)
    assert model.num_classes == 0
    assert torch.equal(model(x), pooled)
    model.reset_classifier(0, "")
    assert torch.equal(model(x), features)
    bare = make(name, num_classes=0, global_pool="").eval()
    assert bare(x).shape == features.shape


@every_name
def test_reset_classifier_keeps_type_device_and_mode(name: str) -> None:
    model = own(name).to(torch.bfloat16)
    model.reset_classifier(5, "max")
    assert not any(module.training for module in model.modules())
    assert model(images(name).bfloat16()).shape == (2, 5)
    assert {output.shape for output in outputs_of(model.train()(images(name).bfloat16()))} == {(2, 5)}
    shapes = make(name, device="meta")
    shapes.reset_classifier(5)
    assert {tensor.device.type for tensor in (*shapes.parameters(), *shapes.buffers())} == {"meta"}
    assert all(module.training for module in shapes.modules())


# Features ------------------------------------------------------------------------------------------------------------


def assert_levels(info: FeatureInfo, maps: Sequence[Tensor], name: str) -> None:
    assert [level.shape[1] for level in maps] == info.channels()
    assert [level.shape[-1] for level in maps] == [size_of(name) // reduction for reduction in info.reduction()]


@every_name
@torch.no_grad()
def test_intermediates(name: str) -> None:
    model, x = shared(name), images(name)
    final, maps = model.forward_intermediates(x)
    assert torch.equal(final, model.forward_features(x))
    assert torch.equal(final, maps[-1])
    assert_levels(FeatureInfo(model.feature_info, len(maps)), maps, name)
    chosen = model.forward_intermediates(x, indices=[-2, 0], stop_early=True, intermediates_only=True)
    assert [torch.equal(a, b) for a, b in zip(chosen, (maps[0], maps[-2]), strict=True)] == [True, True]


@every_name
@pytest.mark.parametrize("kind", [None, "getter"])
def test_features_only(name: str, kind: str | None) -> None:
    chosen = {} if kind is None else {"feature_cls": kind, "out_indices": (0, 2)}
    trunk = make(name, features_only=True, **chosen)
    maps = trunk(images(name))
    assert len(maps) == (2 if chosen else len(shared(name).feature_info))
    assert_levels(trunk.feature_info, maps, name)
    assert_all_used(trunk, maps)


@every_name
def test_features_only_can_checkpoint(name: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        trunk = alive(make(name, features_only=True))
        trunk.set_grad_checkpointing(checkpointing)
        assert_all_used(trunk, trunk(images(name)))
        gradients.append({key: parameter.grad for key, parameter in trunk.named_parameters()})
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize("kind", ["list", "dict", "hook", "fx"])
def test_features_that_would_go_past_the_gates(kind: str) -> None:
    with pytest.raises(ValueError, match="past its gates"):
        make("skipnet_resnet20_cifar", features_only=True, feature_cls=kind)


@every_name
def test_pruning_leaves_what_is_used(name: str) -> None:
    whole, x = shared(name), images(name)
    levels = range(len(whole.feature_info))
    _, maps = whole.forward_intermediates(x)
    for last in levels:
        model = copy.deepcopy(whole)
        assert model.prune_intermediate_layers([last]) == [last]
        _, (kept,) = model.forward_intermediates(x, indices=[last])
        assert torch.equal(kept, maps[last])
        assert model.num_features == kept.shape[1]
        assert_all_used(model, model.train()(x))
    kept_head = copy.deepcopy(whole)
    kept_head.prune_intermediate_layers([levels[-1]], prune_head=False)
    assert torch.equal(kept_head(x), logits(name))


# Devices, types, copies ----------------------------------------------------------------------------------------------


@every_name
def test_meta_device(name: str) -> None:
    for model in (make(name, device="meta"), own(name).to("meta")):
        assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"meta"}
        assert model.eval()(images(name).to("meta")).is_meta
        assert all(output.is_meta for output in outputs_of(model.train()(images(name).to("meta"))))


@every_name
def test_bfloat16_and_autocast(name: str) -> None:
    model = make(name, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.eval()(images(name).bfloat16()).isfinite().all()
    trained = own(name).train()
    with torch.autocast("cpu", torch.bfloat16):
        outputs = trained(images(name))
    assert all(output.isfinite().all() for output in outputs_of(outputs))
    assert_all_used(trained, outputs)


@every_name
@torch.no_grad()
def test_copies_compute_the_same(name: str) -> None:
    x, fresh = images(name), make(name, num_classes=11).eval()
    fresh.load_state_dict(shared(name).state_dict())
    for copied in (own(name), pickle.loads(pickle.dumps(shared(name))), fresh):
        assert torch.equal(copied(x), logits(name))
    swapped = own(name).to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(swapped, logits(name), rtol=1e-3, atol=1e-3)


@every_name
def test_parameters_fall_into_groups(name: str) -> None:
    model = shared(name)
    for coarse in (False, True):
        groups = group_parameters(model, model.group_matcher(coarse=coarse))
        assert sorted(key for keys in groups.values() for key in keys) == sorted(dict(model.named_parameters()))
    optimizer = create_optimizer_v2(model, "sgd", lr=0.1, layer_decay=0.7)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))


# Training ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["skipnet_resnet20_cifar", "iadi_densenet100_cifar"])
def test_what_timms_training_script_does(name: str, tmp_path: Path) -> None:
    """Its task, optimizer, average of weights, checkpoints and resuming: what it learned is there again."""
    model, x, y = own(name), images(name, batch=8), torch.arange(8) % 2
    task = ClassificationTask(model, nn.CrossEntropyLoss(), device=torch.device("cpu"), verbose=False)
    optimizer = create_optimizer_v2(model, "sgd", lr=0.05, momentum=0.9)
    average = ModelEmaV3(model, decay=0.5)
    saver = CheckpointSaver(model, optimizer, model_ema=average, checkpoint_dir=str(tmp_path))
    losses = []
    for step in range(1, 6):
        task.train()
        loss = task(x, y)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average.update(model, step=step)
        losses.append(loss.item())
    saver.save_checkpoint(0, metric=1.0)
    assert losses[-1] < 0.5 * losses[0]
    again = own(name)
    assert resume_checkpoint(again, str(tmp_path / "last.pth.tar"), create_optimizer_v2(again, "sgd", lr=0.05)) == 1
    assert torch.equal(again.eval()(x), model.eval()(x))
    load_checkpoint(again, str(tmp_path / "last.pth.tar"), use_ema=True)
    assert torch.equal(again(x), average.module.eval()(x))
    assert not torch.equal(again(x), model(x))


# Graphs --------------------------------------------------------------------------------------------------------------


def traced(model: nn.Module) -> nn.Module:
    """The model as torchvision's tracer sees it, in both modes."""
    tracer = {
        "leaf_modules": get_notrace_modules(),
        "autowrap_functions": get_notrace_functions(),
        "param_shapes_constant": True,
    }
    training, evaluating = get_graph_node_names(model, tracer_kwargs=tracer)
    return create_feature_extractor(
        model, train_return_nodes=training[-1:], eval_return_nodes=evaluating[-1:], tracer_kwargs=tracer
    )


@every_name
@pytest.mark.filterwarnings("ignore:The nodes obtained by tracing")
def test_fx(name: str) -> None:
    graph = traced(own(name))
    (evaluated,) = graph.eval()(images(name)).values()
    assert torch.equal(evaluated, logits(name))
    (trained,) = graph.train()(images(name)).values()
    expected = outputs_of(own(name).train()(images(name)))[-1]
    torch.testing.assert_close(trained, expected)
    trained.sum().backward()
    trunk = [key for key, _ in graph.named_parameters() if not key.startswith("exits.")]
    assert all(graph.get_parameter(key).grad is not None for key in trunk)


def test_all_logits_come_last_in_a_trace() -> None:
    """timm and torchvision count from a graph's end to find outputs, and do not count buffers that are read."""
    nodes = list(symbolic_trace(own("ddi_resnetblur50").train()).graph.nodes)
    assert any(node.op == "get_attr" for node in nodes)
    first = min(nodes.index(node) for node in nodes[-1].all_input_nodes)
    assert not any(node.op == "get_attr" for node in nodes[first:])


@pytest.mark.parametrize("name", COMPILED)
def test_compile_and_export(name: str) -> None:
    x = images(name)
    masked = td.set_execution(own(name), "masked")
    expected = masked(x)
    whole = torch.compile(masked, backend="eager", fullgraph=True)
    torch.testing.assert_close(whole(x), expected)
    torch.testing.assert_close(torch.export.export(masked, (x,)).module()(x), expected)
    skipping = torch.compile(own(name), backend="eager")
    torch.testing.assert_close(skipping(x), logits(name))


LIMITS: list[dict[str, Any]] = [
    {"fraction": 0.5},
    {"macs": [25 * 10**6, 10**9]},
    {"energy_mj": 0.29},
    {"confidence": 0.11},
    {"exit": 1},
]


@pytest.mark.parametrize("limit", LIMITS, ids=lambda limit: next(iter(limit)))
def test_compile_and_export_under_a_budget(limit: dict[str, Any]) -> None:
    torch.manual_seed(0)
    gates = {"kind": "linear", "init": "random"}
    model = td.set_execution(timm.create_model("ddi_resnet20_cifar", layer_gates=gates).eval(), "masked")
    x = torch.randn(2, 3, 32, 32)
    td.set_budget(model, **limit)
    expected = td.decide(td.set_execution(model, "skip"), x)
    td.set_execution(model, "masked")
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), expected.logits)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), expected.logits)
    assert torch.equal(td.decide(model, x).exit_index, expected.exit_index)


# Registry ------------------------------------------------------------------------------------------------------------


@every_name
def test_every_tag_of_the_base_has_its_twin(name: str) -> None:
    base = name.partition("_")[2]
    for full in timm.list_models(base, include_tags=True):
        _, _, tag = full.partition(".")
        theirs = timm.get_pretrained_cfg(full)
        ours = timm.get_pretrained_cfg(f"{name}.{tag}" if tag else name)
        assert theirs is not None
        assert ours is not None
        assert ours.hf_hub_id == theirs.hf_hub_id
        assert bool(ours.has_weights) == bool(theirs.has_weights)
