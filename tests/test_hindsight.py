"""Gates that learn from hindsight: which of two policies an image should have run."""

import copy
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from test_tasks import random_norms
from torch import nn

import timm_dynamic as td
from timm_dynamic.budgets import set_price
from timm_dynamic.evaluation import costs_of
from timm_dynamic.hindsight import HindsightTask, without

POLICY, SHORT = "01101110", "01101000"  # of resnet20's eight gated units
SIZE = (3, 16, 16)


def batch(images: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(images, *SIZE, generator=generator), torch.randint(10, (images,), generator=generator)


def network() -> Any:
    torch.manual_seed(0)
    model = random_norms(timm.create_model("resnet20_cifar", num_classes=10))
    return td.add_layer_gates(model, td.LayerGateConfig(kind="rnn", init="random"))


def with_channels() -> Any:
    return td.add_channel_gates(network(), td.ChannelGateConfig(mode="nested", init="random"))


def task_of(model: nn.Module, **options: Any) -> HindsightTask:
    options = {"layers": POLICY, "free": 2, "steps": 100, **options}
    return HindsightTask(model, costs_of(model, SIZE).dense, **options).train()


def under(model: Any, policy: str, x: torch.Tensor) -> torch.Tensor:
    """Logits of a network in eval mode whose images all run one policy."""
    with torch.no_grad(), td.force(model.eval(), layer_keep=torch.tensor([[digit == "1" for digit in policy]])):
        return model(x)


@pytest.mark.parametrize(("free", "left"), [(1, "01101100"), (2, SHORT), (5, "00000000"), ((4, 1), "00100110")])
def test_the_cheaper_policy_leaves_the_free_units_out(free: int | tuple[int, ...], left: str) -> None:
    assert without(POLICY, free) == left


@pytest.mark.parametrize(("free", "count"), [(0, 0), (-1, -1), (6, 6), ((), 0)])
def test_so_many_units_cannot_be_left_out(free: int | tuple[int, ...], count: int) -> None:
    with pytest.raises(ValueError, match=f"from 1 to 5 units of the policy {POLICY} .* found {count}"):
        without(POLICY, free)


def test_units_that_do_not_run_cannot_be_left_out() -> None:
    with pytest.raises(ValueError, match=r"runs, at \[1, 2, 4, 5, 6\], can be left to the gates; found .* \[0, 8\]"):
        without(POLICY, (8, 1, 0))


def test_units_in_the_middle_can_be_left_to_the_gates() -> None:
    """What is compared is the network with and without them, whatever comes after."""
    model, (x, y) = network(), batch()
    task = task_of(model, free=(2, 4), alpha=0.0)
    cheap, dear = task._both(x)
    task._hindsight(dear, task._worth(cheap, dear, y)).backward()
    assert model.layer_gates.fc.weight.grad.abs().sum() > 0
    assert torch.allclose(cheap.logits, under(model, "01000110", x), atol=1e-5)
    assert torch.allclose(dear.logits, under(model, POLICY, x), atol=1e-5)
    assert task.shares(SIZE)[0] < task.shares(SIZE)[1]


def test_what_it_cannot_be_made_for() -> None:
    stock = timm.create_model("resnet20_cifar")
    for model, options, message in (
        (stock, {}, "the model needs layer gates, and no exits yet"),
        (td.add_channel_gates(stock), {}, "the model needs layer gates, and no exits yet"),
        (td.add_exits(network()), {}, "the model needs layer gates, and no exits yet"),
        (network(), {"layers": "011"}, "a zero or a one for each of 8 layer gates; found '011'"),
        (network(), {"layers": "0110111x"}, "a zero or a one for each of 8 layer gates; found '0110111x'"),
        (network(), {"free": 6}, "from 1 to 5 units"),
        (network(), {"alpha": 1.0, "target": 0.5}, "give alpha or target, not both"),
        (network(), {"floor": 1.5}, "floor must be a number in 0..1; found 1.5"),
    ):
        options = {"layers": POLICY, "free": 2, "steps": 100, **options}
        with pytest.raises(ValueError, match=message):
            HindsightTask(model, 1.0, **options)


def test_shares_are_what_a_forced_run_costs() -> None:
    model, (x, _) = network(), batch()
    found = task_of(model).shares(SIZE)
    dense = costs_of(model, SIZE).dense
    for share, policy in zip(found, (SHORT, POLICY), strict=True):
        with torch.no_grad(), td.force(model.eval(), layer_keep=torch.tensor([[d == "1" for d in policy]])):
            assert share == pytest.approx(td.decide(model, x).macs[0].item() / dense)


def test_shares_are_the_least_and_the_most_where_channel_gates_choose_too() -> None:
    model, (x, _) = with_channels(), batch(1)
    dense = costs_of(model, SIZE).dense
    for share, policy, keep in zip(task_of(model).shares(SIZE), (SHORT, POLICY), (0.0, 1.0), strict=True):
        layers = torch.tensor([[digit == "1" for digit in policy]])
        with torch.no_grad(), td.force(model.eval(), layer_keep=layers, channel_keep=keep):
            assert share == pytest.approx(td.decide(model, x).macs[0].item() / dense)


def test_shares_in_another_unit_than_macs() -> None:
    model, (x, _) = network(), batch()
    table = td.cost_table(model, SIZE, "energy_mj", energy={"pj_per_mac": 10.0, "pj_per_byte": 1.0})
    set_price(model, table)
    task = HindsightTask(model, table.dense, 100, layers=POLICY, free=2, target=0.9).train()
    cheap, dear = task.shares(SIZE)
    macs = task_of(network()).shares(SIZE)
    assert 0 < cheap < dear < 1
    assert cheap != pytest.approx(macs[0], abs=1e-3), "bytes are counted too"
    with td.force(model, layer_keep=torch.tensor([[digit == "1" for digit in POLICY]])):
        assert dear == pytest.approx((td.decide(model, x).cost / table.dense).mean().item(), rel=1e-5)


def test_worth_is_the_difference_of_the_losses_of_the_network_as_it_is() -> None:
    model, (x, y) = network(), batch()
    cheap, dear = (F.cross_entropy(under(model, policy, x), y) for policy in (SHORT, POLICY))
    before = copy.deepcopy(model.state_dict())
    task = task_of(model)
    with task._all_but_layer_gates_still():
        assert not any(module.training for module in model.modules() if isinstance(module, nn.BatchNorm2d))
        assert not any(p.requires_grad for name, p in model.named_parameters() if "layer_gates" not in name)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert all(p.requires_grad for p in model.parameters())
    assert task(x, y)["worth"].item() == pytest.approx((cheap - dear).item(), abs=1e-5)


def test_what_was_frozen_stays_frozen() -> None:
    model = network()
    model.conv1.weight.requires_grad_(False)
    model.bn1.eval()
    task = task_of(model)
    model.bn1.eval()
    with task._all_but_layer_gates_still():
        pass
    assert not model.conv1.weight.requires_grad
    assert not model.bn1.training
    assert model.layer1.training


def recorded(task: Any) -> list[torch.Tensor]:
    """The policies that a task draws from now on."""
    drawn: list[torch.Tensor] = []
    task._drawn = lambda *found: drawn.append(HindsightTask._drawn(task, *found)) or drawn[-1]  # type: ignore[func-returns-value]
    return drawn


def test_only_gates_learn_from_hindsight() -> None:
    """The trunk's gradient is that of the images it ran, and of nothing else."""
    model, (x, y) = network(), batch()
    task = task_of(model, alpha=0.1, mixing=0.0)
    drawn = recorded(task)
    task(x, y)["loss"].backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    with td.force(model, layer_keep=drawn[0]):
        F.cross_entropy(model(x), y).backward()
    for name, p in model.named_parameters():
        if "layer_gates" in name:
            assert found[name].abs().sum() > 0, name
        elif p.grad is not None:
            torch.testing.assert_close(found[name], p.grad, rtol=1e-4, atol=1e-6)


def test_channel_gates_learn_from_what_was_run_and_what_it_cost() -> None:
    """Their gradient is that of the images' own policies, with the cost; none comes from comparing policies."""
    model, (x, y) = with_channels(), batch()
    task = task_of(model, alpha=0.7, mixing=0.0)
    drawn = recorded(task)
    task(x, y)["loss"].backward()
    found = {name: p.grad.clone() for name, p in model.channel_gates.named_parameters()}
    model.zero_grad()
    with td.force(model, layer_keep=drawn[0]):
        decisions = td.decide(model, x)
    (F.cross_entropy(decisions.logits, y) + 0.7 * decisions.cost.mean() / task.dense_cost).backward()
    for name, p in model.channel_gates.named_parameters():
        wanted = torch.zeros_like(p) if p.grad is None else p.grad
        torch.testing.assert_close(found[name], wanted, rtol=1e-4, atol=1e-6)
    assert sum(values.abs().sum() for values in found.values()) > 0


def test_a_distance_from_the_target_pushes_channel_gates_alone() -> None:
    model, (x, y) = with_channels(), batch()
    task = task_of(model, target=0.05, anneal=0.0)
    before = copy.deepcopy(model.state_dict())
    share = task(x, y)["macs_share"].item()
    assert share > 0.06
    head = costs_of(model, SIZE).exits[-1]
    push = task.push * (share - 0.05) / ((head.dearest - head.cheapest) / task.dense_cost)
    for name, value in model.state_dict().items():
        if name.startswith("channel_gates") and name.endswith("fc.bias"):
            torch.testing.assert_close(value, before[name] - push)
        elif name.startswith("layer_gates"):
            assert torch.equal(value, before[name]), name


def test_gates_learn_which_images_need_the_units() -> None:
    """Images differ in what the last units bring them; their gates come to say so, at a price that is between."""
    model, (x, y) = network(), batch(32)
    task = task_of(model, alpha=0.0, mixing=0.0)
    for p in model.parameters():
        p.requires_grad_(False)
    gates = list(model.layer_gates.parameters())
    for p in gates:
        p.requires_grad_(True)
    losses = [F.cross_entropy(under(model, policy, x), y, reduction="none") for policy in (SHORT, POLICY)]
    worth = losses[0] - losses[1]
    shares = task.shares(SIZE)
    task.alpha.fill_(worth.median().item() / (shares[1] - shares[0]))
    optimizer = torch.optim.Adam(gates, lr=0.03)
    for _ in range(150):
        task.train()
        for module in model.modules():  # what is tested is the gates: the trunk's statistics are not to move
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 0.0
        task(x, y)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        keep = td.decide(model.eval(), x).layer_keep
    first = POLICY.index("1", SHORT.rindex("1") + 1)
    assert keep[:, :first].eq(torch.tensor([digit == "1" for digit in POLICY[:first]])).all()
    advantage = worth - worth.median()
    right = keep[:, first] == (advantage > 0)
    assert keep[:, first].unique().numel() == 2
    assert (advantage.abs() * right).sum() / advantage.abs().sum() > 0.75  # a policy for all gets half


def test_alpha_follows_the_target_and_is_kept() -> None:
    model, (x, y) = network(), batch(32)
    task = task_of(model, target=0.55, anneal=0.0)
    low, high = task.shares(SIZE)
    assert low < 0.55 < high
    for _ in range(3):
        found = task(x, y)
    assert low <= found["macs_share"] <= high
    assert (task.alpha > 0) == (found["macs_share"] > 0.55)
    assert dict(task.named_buffers(recurse=False)).keys() >= {"alpha", "seen"}
    assert "policies" not in task.state_dict()


@pytest.mark.parametrize("price", [{"alpha": 0.1}, {"target": 0.55}])
def test_batches_are_counted_whatever_sets_the_price(price: dict[str, float]) -> None:
    task, (x, y) = task_of(network(), **price), batch(8)
    for _ in range(3):
        task(x, y)
    assert task.seen == 3
    task.eval()
    task(x, y)
    assert task.seen == 3, "in training only"


def test_policies_are_drawn_at_random_at_first_only() -> None:
    model, (x, _) = network(), batch(64)
    task = task_of(model, alpha=0.0, mixing=0.5)
    with torch.no_grad():
        cheap, dear = task._both(x)
    goes_on = torch.zeros(64, dtype=torch.bool)
    own = cheap.layer_prob >= 0.5
    task.seen.fill_(50)
    assert torch.equal(task._drawn(cheap, dear, goes_on), own)
    task.seen.fill_(0)
    drawn = task._drawn(cheap, dear, goes_on)
    either = {"".join("01"[int(one)] for one in row) for row in drawn}
    assert either == {POLICY, SHORT}
    task.eval()
    assert torch.equal(task._drawn(cheap, dear, goes_on), own)


@pytest.mark.parametrize("floor", [None, 0.0])
def test_the_dearer_policy_of_a_densenet_lives_on(floor: float | None) -> None:
    """Gates run no layer; without images at random the norms forget what the layers of the dearer one give them."""
    torch.manual_seed(0)
    model: Any = random_norms(timm.create_model("densenet40_cifar", num_classes=10))
    td.add_layer_gates(model, td.LayerGateConfig(kind="rnn", init="open"))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.5
    (x, y), policy = batch(64), "1" * len(model.layer_gates)
    task = HindsightTask(model, costs_of(model, SIZE).dense, 1, layers=policy, free=8, alpha=0.0, floor=floor).train()
    assert task.floor == (0.125 if floor is None else 0.0)
    with torch.no_grad():
        model.layer_gates.fc.bias.fill_(-20.0)
        task(x, y)  # the first steps are all at random
        before = F.cross_entropy(under(model, policy, x), y)
        task.train()
        for _ in range(16):
            task(x, y)
        worse = F.cross_entropy(under(model, policy, x), y) - before
    assert (worse < 2) == (floor is None), worse


def test_units_that_no_image_runs_are_not_computed_in_training() -> None:
    model, (x, _) = network(), batch()
    called: list[str] = []
    for name, block in ((n, m) for n, m in model.named_modules() if type(m).__name__ == "BasicBlock"):
        block.conv1.register_forward_hook(lambda *_, name=name: called.append(name))
    with td.force(model.train(), layer_keep=torch.tensor([[d == "1" for d in POLICY]])):
        td.decide(model, x)
    blocks = [name for name, module in model.named_modules() if type(module).__name__ == "BasicBlock"]
    assert called == [blocks[0], *[name for name, digit in zip(blocks[1:], POLICY, strict=True) if digit == "1"]]
