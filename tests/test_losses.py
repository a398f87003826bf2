"""Losses against references written out here."""

import math

import pytest
import torch

from timm_dynamic import losses


def test_exit_weights() -> None:
    assert losses.exit_weights(3) == (1.0, 1.0, 1.0)
    assert losses.exit_weights(4, "linear") == (0.25, 0.5, 0.75, 1.0)
    with pytest.raises(ValueError, match="'uniform' or 'linear', found 'cubic'"):
        losses.exit_weights(3, "cubic")  # type: ignore[arg-type]


def test_exit_cross_entropy_is_the_weighted_sum() -> None:
    torch.manual_seed(0)
    logits = [torch.randn(5, 4), torch.randn(5, 4)]
    target = torch.tensor([0, 3, 1, 1, 2])
    wanted = 0.0
    for weight, rows in zip((0.5, 1.0), logits, strict=True):
        for row, y in zip(rows.tolist(), target.tolist(), strict=True):
            wanted += weight * (math.log(sum(map(math.exp, row))) - row[y]) / 5
    assert losses.exit_cross_entropy(logits, target, (0.5, 1.0)).item() == pytest.approx(wanted, rel=1e-6)
    with pytest.raises(ValueError, match="2 exits, 3 weights"):
        losses.exit_cross_entropy(logits, target, (1.0, 1.0, 1.0))


def test_exit_cross_entropy_is_taken_in_float32() -> None:
    logits = torch.tensor([[1.0, 1.001]]).bfloat16()
    found = losses.exit_cross_entropy([logits], torch.tensor([0]), (1.0,))
    assert found.dtype == torch.float32


def test_shut_gates_are_counted_and_only_they_are_moved() -> None:
    layers = torch.tensor([[1.0, 0.0], [1.0, 1.0]], requires_grad=True)
    channels = torch.tensor([[0.0], [0.0]], requires_grad=True)
    loss = losses.shut_gates([layers, channels])
    loss.backward()
    assert loss.item() == pytest.approx(3 / 2)
    assert layers.grad is not None
    assert channels.grad is not None
    assert layers.grad.tolist() == [[0, -1], [0, 0]]
    assert channels.grad.tolist() == [[-1], [-1]]


def test_cost_share_has_the_gradient_of_the_mean() -> None:
    cost = torch.tensor([50.0, 100.0], requires_grad=True)
    share = losses.cost_share(cost, 200)
    share.backward()
    assert share.item() == pytest.approx(0.375)
    assert cost.grad is not None
    assert cost.grad.tolist() == pytest.approx([1 / 400, 1 / 400])


def test_annealed_target_falls_and_stays() -> None:
    found = [float(losses.annealed_target(0.6, torch.tensor(progress))) for progress in (0.0, 0.25, 0.5, 0.9)]
    assert found == pytest.approx([1.0, 0.8, 0.6, 0.6])
    assert losses.annealed_target(0.6, torch.tensor(0.0), anneal=0.0) == 0.6


def test_multiplier_is_the_gradient_of_the_augmented_lagrangian() -> None:
    share = torch.tensor(0.7, requires_grad=True)
    alpha = torch.tensor(0.3)
    (alpha * (share - 0.5) + 4.0 / 2 * (share - 0.5) ** 2).backward()
    assert share.grad is not None
    assert losses.multiplier(alpha, share.detach() - 0.5, 4.0).item() == pytest.approx(share.grad.item())
