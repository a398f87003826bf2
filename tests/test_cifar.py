"""The plain CIFAR networks: sizes by hand, shapes, and what timm expects of a model."""

import copy
import pickle

import pytest
import timm
import torch
from timm.models import get_graph_node_names, group_parameters
from torch import nn
from torch.fx import symbolic_trace
from torch.utils.flop_counter import FlopCounterMode

import timm_dynamic.cifar  # noqa: F401  (registers the names)
from timm_dynamic import shipped

RESNETS = {20: 3, 32: 5, 38: 6, 74: 12, 110: 18, 152: 25}
NAMES = [f"resnet{depth}_cifar" for depth in RESNETS] + ["densenet40_cifar", "densenet100_cifar"]
SMALL = ["resnet20_cifar", "densenet100_cifar"]


def resnet_convs(n: int, in_chans: int = 3) -> list[tuple[int, int, int, int]]:
    """(in, out, kernel, size of the output) of every convolution of the 6n+2 ResNet at 32 x 32."""
    convs = [(in_chans, 16, 3, 32)]
    width = 16
    for planes, size in ((16, 32), (32, 16), (64, 8)):
        if planes != width:
            convs.append((width, planes, 1, size))
        convs.append((width, planes, 3, size))
        convs += [(planes, planes, 3, size)] * (2 * n - 1)
        width = planes
    return convs


def densenet_convs(growth: int = 12, layers: int = 16) -> tuple[list[tuple[int, int, int, int]], list[int]]:
    """The convolutions of DenseNet-BC at 32 x 32, and the widths of all its batch norms."""
    convs, norms, width = [(3, 2 * growth, 3, 32)], [], 2 * growth
    for block, size in enumerate((32, 16, 8)):
        for _ in range(layers):
            convs += [(width, 4 * growth, 1, size), (4 * growth, growth, 3, size)]
            norms += [width, 4 * growth]
            width += growth
        norms.append(width)
        if block < 2:
            convs.append((width, width // 2, 1, size))
            width //= 2
    return convs, norms


def weights_of(convs: list[tuple[int, int, int, int]]) -> int:
    return sum(cin * cout * k * k for cin, cout, k, _ in convs)


def macs_of(convs: list[tuple[int, int, int, int]]) -> int:
    return sum(cin * cout * k * k * size * size for cin, cout, k, size in convs)


def measured(name: str) -> tuple[int, int]:
    """Parameters and MACs of one image, both on the meta device."""
    model = timm.create_model(name, device="meta").eval()
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, 32, 32, device="meta"))
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2


@pytest.mark.parametrize("depth", RESNETS)
def test_resnet_size_equals_hand_count(depth: int) -> None:
    convs = resnet_convs(RESNETS[depth])
    assert len([c for c in convs if c[2] == 3]) + 1 == depth  # the 3x3 convolutions and the classifier
    norms = 2 * sum(cout for _, cout, _, _ in convs)  # one batch norm behind every convolution
    assert measured(f"resnet{depth}_cifar") == (weights_of(convs) + norms + 65 * 10, macs_of(convs) + 640)


def test_densenet_size_equals_hand_count() -> None:
    convs, norms = densenet_convs()
    assert len(convs) + 1 == 100
    expected = weights_of(convs) + 2 * sum(norms) + 343 * 10, macs_of(convs) + 3420
    assert measured("densenet100_cifar") == expected


def test_sizes_agree_with_the_papers() -> None:
    sizes = {name: measured(name) for name in ("resnet20_cifar", "resnet110_cifar", "densenet100_cifar")}
    assert sizes["resnet20_cifar"] == (272_474, 40_813_184)
    assert round(sizes["resnet110_cifar"][0] / 1e6, 1) == 1.7
    assert round(sizes["resnet110_cifar"][1] / 1e6) == 253
    assert sizes["densenet100_cifar"][0] == 769_162


@pytest.mark.parametrize("name", NAMES)
def test_registered_with_cifar_defaults(name: str) -> None:
    cfg = timm.get_pretrained_cfg(name)
    assert cfg.num_classes == 10
    assert cfg.input_size == (3, 32, 32)
    assert cfg.pool_size == (8, 8)
    assert cfg.crop_pct == 1.0
    assert bool(cfg.has_weights) == any(full.partition(".")[0] == name for full in shipped.names())
    assert timm.is_model(name)
    assert name in timm.list_models(module="cifar")
    model = timm.create_model(name, device="meta")
    parameters = dict(model.named_parameters())
    assert f"{cfg.first_conv}.weight" in parameters
    assert f"{cfg.classifier}.weight" in parameters
    assert model.num_classes == 10


@pytest.mark.parametrize("name", NAMES)
def test_feature_levels(name: str) -> None:
    trunk = timm.create_model(name, features_only=True, device="meta")
    maps = trunk(torch.empty(2, 3, 32, 32, device="meta"))
    assert trunk.feature_info.reduction() == [1, 1, 2, 4]
    assert [m.shape[1] for m in maps] == trunk.feature_info.channels()
    assert [m.shape[-1] for m in maps] == [32, 32, 16, 8]


def random_norms(model: nn.Module) -> nn.Module:
    """Give every batch norm weights and statistics that are not the identity."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                nn.init.uniform_(tensor, 0.5, 1.5)
    return model


@pytest.fixture(params=SMALL)
def model(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    return random_norms(timm.create_model(request.param)).eval()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def test_every_parameter_gets_a_gradient(model: nn.Module, images: torch.Tensor) -> None:
    model.train()
    model(images).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_checkpointing_gives_the_same_gradients(model: nn.Module, images: torch.Tensor) -> None:
    plain, saving = model, copy.deepcopy(model)
    saving.set_grad_checkpointing(True)
    for net in (plain, saving):
        net(images).square().mean().backward()
    for one, other in zip(plain.parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_forward_intermediates_are_the_feature_levels(model: nn.Module, images: torch.Tensor) -> None:
    final, maps = model.forward_intermediates(images)
    assert torch.equal(final, model.forward_features(images))
    assert [m.shape[1] for m in maps] == [level["num_chs"] for level in model.feature_info]
    (last,) = model.forward_intermediates(images, indices=1, stop_early=True, intermediates_only=True)
    assert torch.equal(last, maps[-1])
    early = model.forward_intermediates(images, indices=[0, 1], stop_early=True, intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(early, maps, strict=False))


@pytest.mark.parametrize("last", range(4))
def test_prune_leaves_what_the_levels_need(model: nn.Module, images: torch.Tensor, last: int) -> None:
    expected = model.forward_intermediates(images, indices=[last], intermediates_only=True)
    assert model.prune_intermediate_layers([last]) == [last]
    kept = model.forward_intermediates(images, indices=[last], intermediates_only=True)
    assert torch.equal(kept[0], expected[0])
    assert model.num_features == model.feature_info[last]["num_chs"]
    final = model(images)
    assert torch.equal(final, kept[0])
    final.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_prune_keeps_the_head_when_asked(model: nn.Module, images: torch.Tensor) -> None:
    expected = model(images)
    model.prune_intermediate_layers([3], prune_head=False)
    assert torch.equal(model(images), expected)


def test_reset_classifier(model: nn.Module, images: torch.Tensor) -> None:
    model.reset_classifier(7)
    assert model(images).shape == (2, 7)
    assert model.num_classes == 7
    model.reset_classifier(0, "")
    assert model(images).shape == (2, model.num_features, 8, 8)


def test_copies_and_pickles_compute_the_same(model: nn.Module, images: torch.Tensor) -> None:
    expected = model(images)
    assert torch.equal(copy.deepcopy(model)(images), expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(images), expected)


def test_fx_traces_the_network(model: nn.Module, images: torch.Tensor) -> None:
    torch.testing.assert_close(symbolic_trace(model)(images), model(images))
    names = get_graph_node_names(model)[1]
    stages = [level["module"] for level in model.feature_info]
    assert all(any(name.startswith(stage) for name in names) for stage in stages)


@pytest.mark.parametrize("coarse", [False, True])
def test_groups_cover_every_parameter(model: nn.Module, coarse: bool) -> None:
    groups = group_parameters(model, model.group_matcher(coarse=coarse))
    assert sum(map(len, groups.values())) == len(list(model.parameters()))
    assert any("conv" in name for name in groups[0])


@pytest.mark.parametrize("name", SMALL)
def test_bfloat16(name: str, images: torch.Tensor) -> None:
    model = timm.create_model(name, dtype=torch.bfloat16).eval()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model(images.bfloat16()).isfinite().all()


@pytest.mark.parametrize("name", SMALL)
def test_arguments_of_create_model(name: str) -> None:
    model = timm.create_model(name, num_classes=5, in_chans=1, drop_rate=0.1, global_pool="catavgmax").eval()
    assert model(torch.zeros(1, 1, 32, 32)).shape == (1, 5)
    with pytest.raises(TypeError):
        timm.create_model(name, depth=3)


def test_drop_path_rate_grows_to_the_last_block() -> None:
    model = timm.create_model("resnet20_cifar", drop_path_rate=0.2)
    rates = [
        getattr(block.drop_path, "drop_prob", 0.0)
        for stage in range(1, 4)
        for block in model.get_submodule(f"layer{stage}")
    ]
    assert rates[0] == 0.0
    assert rates[-1] == pytest.approx(0.2)
    assert rates == sorted(rates)


def test_output_stride() -> None:
    model = timm.create_model("resnet20_cifar", output_stride=2).eval()
    assert model.forward_features(torch.zeros(1, 3, 32, 32)).shape == (1, 64, 16, 16)
    assert [level["reduction"] for level in model.feature_info] == [1, 1, 2, 2]
    with pytest.raises(ValueError, match="output_stride must be 2 or 4"):
        timm.create_model("resnet20_cifar", output_stride=1)
