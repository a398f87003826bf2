"""Tasks: what is optimised, what stands still, and how alpha is steered."""

import copy
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import timm_dynamic as td
from timm_dynamic import losses
from timm_dynamic.forward import decide
from timm_dynamic.gates import OPEN_PROB
from timm_dynamic.surgery import group_counts
from timm_dynamic.tasks import BaseTask, DynamicTask, ExitsTask, FollowTask, WarmupTask

SIZE = (3, 32, 32)


def random_norms(model: nn.Module) -> nn.Module:
    """A fresh timm block is the identity: give its batch norms something to do."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model


def network(exits: bool = False) -> nn.Module:
    torch.manual_seed(0)
    model = random_norms(timm.create_model("resnet20_cifar", num_classes=10))
    td.add_layer_gates(model, td.LayerGateConfig(kind="rnn", init="random"))
    td.add_channel_gates(model, td.ChannelGateConfig(init="random"))
    return td.add_exits(model) if exits else model


def batch(images: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(images, *SIZE, generator=generator), torch.randint(10, (images,), generator=generator)


def trained(task: nn.Module, steps: int, **sgd: float) -> list[float]:
    """The loss before each step on one batch, of what is not frozen."""
    optimizer = torch.optim.SGD([p for p in task.parameters() if p.requires_grad], **sgd)
    x, y = batch()
    seen = []
    for _ in range(steps):
        loss = task(x, y)["loss"]
        seen.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return seen


def test_base_task_is_cross_entropy() -> None:
    model = random_norms(timm.create_model("resnet20_cifar", num_classes=10)).eval()
    x, y = batch()
    found = BaseTask(model)(x, y)
    assert torch.equal(found["loss"], F.cross_entropy(model(x), y))
    assert found["accuracy"].item() == pytest.approx((model(x).argmax(1) == y).float().mean().item())


def test_warmup_opens_the_gates_and_leaves_the_base_as_it_is() -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.split(".")[0] in ("layer_gates", "channel_gates"))
    task = WarmupTask(model).train()
    shut = trained(task, 30, lr=0.05, momentum=0.9)
    assert shut[0] > 5
    assert shut[-1] == 0
    learned = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) != (name in learned), name


def test_warmup_keeps_its_modes_however_often_train_is_called() -> None:
    task = WarmupTask(network())
    task.train().eval()
    task.train()
    assert task.model.training
    assert task.model.layer_gates.training
    assert not any(module.training for module in task.model.layer1.modules())
    assert not task.model.bn1.training


def test_warmup_needs_gates() -> None:
    with pytest.raises(ValueError, match="the model has none"):
        WarmupTask(timm.create_model("resnet20_cifar"))


@pytest.mark.parametrize("parts", ["layers", "channels", "both"])
def test_gates_learn_to_follow_a_policy(parts: str) -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())
    channels = sum(group_counts(model))
    layers = "01101001" if parts != "channels" else ""
    groups = ("011" * channels)[:channels] if parts != "layers" else ""
    task = FollowTask(model, layers, groups).train()
    optimizer = torch.optim.Adam([*model.layer_gates.parameters(), *model.channel_gates.parameters()], lr=0.03)
    x, y = batch()
    for _ in range(150):
        found = task(x, y)
        found["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert found["skip_ratio"] == 0
    entropy = losses.gate_entropy(torch.tensor(OPEN_PROB)).item()  # the least that the loss can be
    assert entropy <= found["loss"].item() < entropy + 0.05
    with torch.no_grad():
        decisions = td.decide(model.eval(), x)
    if layers:
        assert ["".join("01"[int(keep)] for keep in row) for row in decisions.layer_keep] == [layers] * len(x)
    for name, value in model.state_dict().items():
        learns = name.split(".")[0] in ("layer_gates", "channel_gates") and not name.endswith("threshold")
        assert learns or torch.equal(value, before[name]), name


@pytest.mark.parametrize(("layers", "channels"), [("", ""), ("0110", ""), ("", "01"), ("01101001", "0")])
def test_a_policy_to_follow_has_to_fit(layers: str, channels: str) -> None:
    with pytest.raises(ValueError, match=r"8 layer gates and of .* channel groups; found"):
        FollowTask(network(), layers, channels)


def test_cross_entropies_of_decisions_are_taken_outside_of_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU torch refuses them inside."""
    plain, inside = F.binary_cross_entropy, []

    def watched(*args: torch.Tensor, **options: str) -> torch.Tensor:
        inside.append(torch.is_autocast_enabled("cpu"))
        return plain(*args, **options)

    monkeypatch.setattr(F, "binary_cross_entropy", watched)
    prob, keep = torch.tensor([[0.25, 0.5]]), torch.tensor([[1.0, 0.0]])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.is_autocast_enabled("cpu")
        likely = losses.log_likelihood(keep, prob.bfloat16())
        losses.gate_entropy(prob)
    assert inside == [False, False]
    assert likely.dtype == torch.float32
    assert torch.allclose(likely, torch.tensor([[0.25, 0.5]]).log())


@pytest.mark.parametrize("exits", [False, True])
def test_dynamic_loss_is_cross_entropies_plus_cost(exits: bool) -> None:
    model = network(exits).train()
    x, y = batch()
    dense = td.cost_table(model, SIZE).dense
    task = DynamicTask(model, dense, steps=10, alpha=0.7, exit_weighting="linear").train()
    twin = copy.deepcopy(model)
    found = task(x, y)
    decisions = td.decide(twin, x)
    count = len(decisions.exit_logits)
    wanted = sum((k + 1) / count * F.cross_entropy(z, y) for k, z in enumerate(decisions.exit_logits))
    early = sum(one.head for one in td.cost_table(model, SIZE).exits[:-1])  # without a budget they are not evaluated
    assert (early > 0) == exits
    wanted = wanted + 0.7 * (decisions.cost.mean() - early) / dense
    assert count == (3 if exits else 1)
    torch.testing.assert_close(found["loss"], wanted)
    share = (decisions.macs.double().mean().item() - early) / dense
    assert found["macs_share"].item() == pytest.approx(share, rel=1e-5)
    found["loss"].backward()
    assert all(parameter.grad is not None for parameter in task.parameters())


def test_the_cost_pulls_gates_shut() -> None:
    model = network().train()
    x, y = batch()
    dense = td.cost_table(model, SIZE).dense
    gradients = []
    for alpha in (0.0, 10.0):
        model.zero_grad()
        DynamicTask(model, dense, steps=1, alpha=alpha)(x, y)["loss"].backward()
        gradients.append(model.layer_gates.fc.bias.grad.clone())
    assert gradients[1] > gradients[0]  # descent lowers the bias, which shuts gates


def test_alpha_follows_the_distance_from_a_falling_target() -> None:
    model = network().train()
    x, y = batch()
    dense = td.cost_table(model, SIZE).dense
    task = DynamicTask(model, dense, steps=4, target=0.2, rate=0.5, stiffness=2.0).train()
    table = td.cost_table(model, SIZE).units
    left = sum(unit.dearest - unit.cheapest for unit in table) / dense
    assert 0.8 < left < 1
    wanted = 0.0
    for target in (1.0, 0.6, 0.2, 0.2):  # falls during the first half
        found = task(x, y)
        share = found["macs_share"].item()
        assert found["alpha"].item() == pytest.approx(wanted + 2.0 * (share - target) / left, abs=1e-5)
        wanted += 0.5 * (share - target) / left
        assert task.alpha.item() == pytest.approx(wanted, abs=1e-5)
    assert {"alpha", "seen"} <= set(task.state_dict())
    task.eval()
    task(x, y)
    assert task.alpha.item() == pytest.approx(wanted, abs=1e-5), "evaluation must not steer"


def test_steering_counts_what_is_left_to_the_gates() -> None:
    """As far from the target, alpha moves as much more as there is less that could be skipped."""
    x, y = batch()
    found = {}
    for gated in (0, 7):
        model = timm.create_model("skipnet_resnet20_cifar", num_classes=10).train()  # gates that keep everything
        dense = td.cost_table(model, SIZE).dense
        td.open_units(model, model.layer_gates.gated[:gated])
        task = DynamicTask(model, dense, steps=4, target=0.7, anneal=0.0, rate=0.5).train()
        share = task(x, y)["macs_share"].item()
        free = td.cost_table(model, SIZE).units[1 + gated :]
        left = sum(unit.branch for unit in free) / dense
        found[gated] = task.alpha.item() * left
        assert found[gated] == pytest.approx(0.5 * (share - 0.7), rel=1e-4)
        assert left == pytest.approx((0.9, 0.12)[gated > 0], abs=0.1)
    td.open_units(model, model.layer_gates.gated)
    task = DynamicTask(model, dense, steps=4, target=0.7, anneal=0.0, rate=0.5).train()
    share = task(x, y)["macs_share"].item()  # no gate could meet it, and nothing divides by zero
    assert task.alpha.item() == pytest.approx(0.5 * (share - 0.7))


def test_where_there_are_channel_gates_all_gates_are_pushed_to_the_target() -> None:
    model = network().train()
    x, y = batch()
    dense = td.cost_table(model, SIZE).dense
    biases = {name: p.detach().clone() for name, p in model.named_parameters() if name.endswith("fc.bias")}
    task = DynamicTask(model, dense, steps=4, target=0.1, anneal=0.0, push=30.0).train()
    share = task(x, y)["macs_share"].item()
    assert share > 0.4, "some gates are open"
    after = dict(model.named_parameters())
    pushed = {name for name in biases if not torch.equal(after[name], biases[name])}
    assert pushed == {name for name in biases if name.startswith(("layer_gates", "channel_gates"))}
    for name in pushed:
        torch.testing.assert_close(after[name], biases[name] - 30 * (share - 0.1) / task._left_to_gates(x))
    found = td.decide(model.eval(), x)
    assert not any(bool(keep.any()) for keep in (found.layer_keep, *found.channel_keep)), "no gate is that sure"
    task.train()(x, y)["loss"].backward()  # the biases were moved between the passes


def test_nothing_is_pushed_without_channel_gates_or_a_target() -> None:
    model = td.add_layer_gates(timm.create_model("resnet20_cifar", num_classes=10), "rnn").train()
    x, y = batch()
    before = copy.deepcopy(dict(model.layer_gates.named_parameters()))
    DynamicTask(model, 1, steps=4, target=0.1).train()(x, y)
    assert all(torch.equal(p, before[name]) for name, p in model.layer_gates.named_parameters())
    model = network().train()
    before = copy.deepcopy(dict(model.channel_gates.named_parameters()))
    DynamicTask(model, 1, steps=4, alpha=0.5).train()(x, y)
    assert all(torch.equal(p, before[name]) for name, p in model.channel_gates.named_parameters())


def test_dynamic_task_wants_alpha_or_a_target() -> None:
    with pytest.raises(ValueError, match="not both"):
        DynamicTask(network(), 1, 1, alpha=1.0, target=0.5)
    with pytest.raises(ValueError, match=r"in \(0, 1\], found 1.5"):
        DynamicTask(network(), 1, 1, target=1.5)


def test_exits_alone_leave_the_rest_as_it_is() -> None:
    model: Any = network(exits=True)
    before = copy.deepcopy(model.state_dict())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("exits"))
    loss = trained(ExitsTask(model).train(), 20, lr=0.1)
    assert loss[-1] < 0.7 * loss[0]
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved
    assert all(name.startswith("exits") for name in moved)


def test_exits_alone_may_follow_the_head() -> None:
    model: Any = network(exits=True)
    x, y = batch()
    with torch.no_grad():
        plain, taught = (ExitsTask(model, distill_exits=weight).train()(x, y)["loss"] for weight in (0.0, 0.5))
        *early, head = decide(model, x).exit_logits
    assert torch.allclose(plain, losses.exit_cross_entropy(early, y, losses.exit_weights(3)[:-1]))
    assert torch.allclose(taught - plain, 0.5 * sum(losses.distillation(logits, head) for logits in early))
    with pytest.raises(ValueError, match="call add_exits"):
        ExitsTask(network())


def test_dynamic_task_tells_the_exits_what_the_trunk_gets_of_their_gradient() -> None:
    model: Any = network(exits=True)
    DynamicTask(model, 1, 1, alpha=1.0, exit_gradient=0.25)
    assert model.exits.gradient == 0.25
    with pytest.raises(ValueError, match=r"exit_gradient must be in \[0, 1\], found 1.5"):
        DynamicTask(model, 1, 1, alpha=1.0, exit_gradient=1.5)
    DynamicTask(model, 1, 1, alpha=1.0)
    assert model.exits.gradient == 1  # of a task before it nothing stays


def test_steering_meets_the_target() -> None:
    """A model of one knob: what steering does without the noise of a network."""
    knob = torch.nn.Parameter(torch.tensor(3.0))
    task = DynamicTask(nn.Identity(), 1, steps=400, target=0.5)
    task.train()
    optimizer = torch.optim.SGD([knob], lr=0.5)
    shares = []
    for _ in range(400):
        share = torch.sigmoid(knob)  # a cost that accuracy pulls up: its gain is 0.3 per unit of share
        weight = task._cost_weight(share.detach(), 1.0)
        (weight * share - 0.3 * share).backward()
        optimizer.step()
        optimizer.zero_grad()
        shares.append(share.item())
    assert min(shares) > 0.45, "overshoot"
    assert sum(shares[-50:]) / 50 == pytest.approx(0.5, abs=0.02)
    assert task.alpha.item() == pytest.approx(0.3, abs=0.1)


def test_following_layers_gives_every_parameter_that_learns_a_gradient() -> None:
    """Channel gates have no part in it; processes wait for the gradients of all."""
    model = network()
    task = FollowTask(model, "1" * len(model.layer_gates)).train()
    gates = [*model.layer_gates.parameters(), *model.channel_gates.parameters()]
    for p in model.parameters():
        p.requires_grad_(False)
    for p in gates:
        p.requires_grad_(True)
    task(torch.randn(4, 3, 32, 32), torch.arange(4))["loss"].backward()
    assert all(p.grad is not None for p in gates)


@pytest.mark.parametrize("channels", [False, True])
def test_parts_of_a_batch_steer_as_the_whole_would(channels: bool) -> None:
    x, y = torch.randn(8, 3, 32, 32), torch.arange(8)
    moved = []
    for parts in (1, 4):
        torch.manual_seed(0)
        model = td.add_layer_gates(timm.create_model("resnet20_cifar"), td.LayerGateConfig(init="open"))
        model = td.add_channel_gates(model) if channels else model
        dense = td.cost_table(model, SIZE).dense
        task = DynamicTask(model, dense, 100, target=0.5, anneal=0.0, rate=0.2, parts=parts).train()
        before = model.layer_gates.fc.bias.item()
        for a, b in zip(x.repeat(parts, 1, 1, 1).chunk(parts), y.repeat(parts).chunk(parts), strict=True):
            task(a, b)
        moved.append((task.alpha.item(), model.layer_gates.fc.bias.item() - before))
    assert moved[0][0] > 0.05
    assert moved[1][0] == pytest.approx(moved[0][0], rel=0.2)
    assert moved[1][1] == pytest.approx(moved[0][1], rel=0.2)
    assert bool(moved[0][1]) == channels
