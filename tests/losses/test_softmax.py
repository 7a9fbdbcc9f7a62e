"""The full softmax with its own gradient, against a slow twin, torch's cross-entropy, finite differences and extremes."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from longtrail.losses import softmax_loss
from tests.losses.draws import randint, randn


def slow_softmax_loss(states: Tensor, items: Tensor, targets: Tensor) -> Tensor:
    losses = []
    for state, target in zip(states, targets.tolist(), strict=True):
        exps = [torch.exp(state @ item) for item in items[1:]]
        losses.append(-torch.log(exps[target - 1] / sum(exps)))
    return torch.stack(losses).mean()


def torch_softmax_loss(states: Tensor, items: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(states @ items[1:].T, targets - 1)


@pytest.mark.parametrize(("rows", "limit", "block"), [(1, 1 << 25, 256), (7, 1 << 25, 256), (7, 1, 256), (7, 20, 256), (8, 18, 256), (9, 1 << 25, 4)])
def test_it_equals_the_slow_twin_in_blocks_too(rows: int, limit: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longtrail.losses.softmax.MAX_LOGITS", limit)
    monkeypatch.setattr("longtrail.losses.softmax.BLOCK_ROWS", block)
    targets = randint(1, 10, rows, seed=1)
    values, gradients = [], []
    for loss in (softmax_loss, slow_softmax_loss, torch_softmax_loss):
        states, items = randn(rows, 4).requires_grad_(), randn(10, 4, seed=2).requires_grad_()
        value = 3 * loss(states, items, targets)
        value.backward()
        values.append(value.detach())
        gradients.append((states.grad, items.grad))
    for value, gradient in zip(values[1:], gradients[1:], strict=True):
        torch.testing.assert_close(values[0], value)
        torch.testing.assert_close(gradients[0], gradient)
    assert not gradients[0][1][0].any(), "padding is no choice"


def test_its_gradient_is_that_of_finite_differences() -> None:
    states, items = randn(5, 3).requires_grad_(), randn(7, 3, seed=1).requires_grad_()
    targets = randint(1, 7, 5, seed=2)
    assert torch.autograd.gradcheck(lambda s, i: softmax_loss(s, i, targets), (states, items))


@pytest.mark.parametrize(("states_learn", "items_learn"), [(True, False), (False, True), (False, False)])
def test_only_what_learns_has_a_gradient(states_learn: bool, items_learn: bool) -> None:
    states, items = randn(5, 3).requires_grad_(states_learn), randn(7, 3, seed=1).requires_grad_(items_learn)
    loss = softmax_loss(states, items, randint(1, 7, 5))
    assert loss.requires_grad == (states_learn or items_learn)
    if loss.requires_grad:
        loss.backward()
    assert (states.grad is not None, items.grad is not None) == (states_learn, items_learn)


def test_one_item_is_certain() -> None:
    items = randn(2, 3).requires_grad_()
    loss = softmax_loss(randn(4, 3, seed=1), items, torch.ones(4, dtype=torch.int64))
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-12)
    torch.testing.assert_close(items.grad, torch.zeros_like(items))


def test_float32_is_as_exact_as_torchs_own() -> None:
    states, items, targets = randn(300, 16) * 3, randn(500, 16, seed=1), randint(1, 500, 300, seed=2)
    exact = torch_softmax_loss(states, items, targets)
    assert softmax_loss(states.float(), items.float(), targets).item() == pytest.approx(exact.item(), rel=2e-6)


def test_a_target_without_any_probability_left_costs_what_it_should() -> None:
    """e^-300 is 0 in float32; the loss is 300 + log 1 all the same, and the gradient pulls with its full weight."""
    states = torch.tensor([[1.0, 0.0]], requires_grad=True)
    items = torch.tensor([[0.0, 0.0], [300.0, 0.0], [0.0, 1.0]], requires_grad=True)
    loss = softmax_loss(states, items, torch.tensor([2]))
    loss.backward()
    assert loss.item() == pytest.approx(300)
    torch.testing.assert_close(items.grad, torch.tensor([[0.0, 0.0], [1.0, 0.0], [-1.0, 0.0]]))


def test_under_autocast_the_products_are_half_and_the_loss_is_not() -> None:
    states, items = randn(40, 16).float().requires_grad_(), (randn(50, 16, seed=1) * 0.3).float().requires_grad_()
    targets = randint(1, 50, 40, seed=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = softmax_loss(states, items, targets)
    loss.backward()
    exact = torch.autograd.grad(torch_softmax_loss(states, items, targets), (states, items))
    assert loss.dtype == states.grad.dtype == items.grad.dtype == torch.float32
    assert loss.item() != torch_softmax_loss(states, items, targets).item()
    assert loss.item() == pytest.approx(torch_softmax_loss(states, items, targets).item(), rel=0.01)
    for ours, theirs in zip((states.grad, items.grad), exact, strict=True):
        assert (ours - theirs).norm() < 0.02 * theirs.norm()


def test_no_target_costs_nothing() -> None:
    states = torch.zeros(0, 4, requires_grad=True)
    loss = softmax_loss(states, torch.zeros(9, 4), torch.zeros(0, dtype=torch.int64))
    loss.backward()
    assert loss.item() == 0


def test_equal_scores_cost_the_logarithm_of_the_catalogue() -> None:
    assert softmax_loss(torch.zeros(3, 2), torch.zeros(101, 2), torch.tensor([1, 50, 100])).item() == pytest.approx(math.log(100))
