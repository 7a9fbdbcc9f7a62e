"""Losses against closed forms and slow twins; padding, blocks and extremes."""

import math

import pytest
import torch
from torch import Tensor

from longtrail.losses import gbce, gbce_loss, ranking_loss, softmax_loss


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_ranking_loss_by_hand() -> None:
    """Mean over the three real candidates, not over requests."""
    logits_BC = torch.tensor([[0.0, 2.0, 9.0], [-1.0, 7.0, 7.0]], dtype=torch.float64)
    clicks_BC = torch.tensor([[1.0, 0.0, 1.0], [1.0, 0.0, 0.0]])
    expected = (math.log(2) + math.log(1 + math.exp(2)) + math.log(1 + math.exp(1))) / 3
    assert ranking_loss(logits_BC, clicks_BC, torch.tensor([2, 1])).item() == pytest.approx(expected)


@pytest.mark.parametrize("lengths", [(0, 0, 0), (4, 0, 1), (4, 4, 4)])
def test_ranking_loss_has_no_gradient_from_padding(lengths: tuple[int, ...]) -> None:
    """Not even from NaN and infinity; no real candidate at all costs 0."""
    lengths_B = torch.tensor(lengths)
    real_BC = torch.arange(4) < lengths_B[:, None]
    clean = randn(3, 4).requires_grad_()
    dirty = torch.where(real_BC, clean.detach(), torch.tensor([math.nan, math.inf, -math.inf, 1e30], dtype=torch.float64)).requires_grad_()
    clicks_BC = (randn(3, 4, seed=1) > 0).float()
    losses = [ranking_loss(x, torch.where(real_BC, clicks_BC, math.nan) if x is dirty else clicks_BC, lengths_B) for x in (clean, dirty)]
    for loss in losses:
        loss.backward()
    assert losses[0].item() == losses[1].item()
    assert torch.equal(clean.grad, dirty.grad)
    assert not clean.grad[~real_BC].any()
    assert losses[0].item() == 0 or sum(lengths) > 0


def test_ranking_loss_is_exact_at_extreme_logits_and_in_half_precision() -> None:
    logits = torch.tensor([[-200.0, 200.0]])
    assert ranking_loss(logits, torch.tensor([[1.0, 0.0]]), torch.tensor([2])).item() == pytest.approx(200)
    assert ranking_loss(logits, torch.tensor([[0.0, 1.0]]), torch.tensor([2])).item() == 0
    assert ranking_loss(logits.bfloat16(), torch.tensor([[1.0, 0.0]]), torch.tensor([2])).dtype == torch.float32


def slow_softmax_loss(states: Tensor, items: Tensor, targets: Tensor) -> Tensor:
    losses = []
    for state, target in zip(states, targets.tolist(), strict=True):
        exps = [torch.exp(state @ item) for item in items[1:]]
        losses.append(-torch.log(exps[target - 1] / sum(exps)))
    return torch.stack(losses).mean()


@pytest.mark.parametrize(("rows", "limit"), [(1, 1 << 25), (7, 1 << 25), (7, 1), (7, 20), (8, 18)])
def test_softmax_loss_equals_the_slow_twin_in_blocks_too(rows: int, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longtrail.losses.MAX_LOGITS", limit)
    targets = torch.randint(1, 10, (rows,), generator=torch.Generator().manual_seed(1))
    values, gradients = [], []
    for loss in (softmax_loss, slow_softmax_loss):
        states, items = randn(rows, 4).requires_grad_(), randn(10, 4, seed=2).requires_grad_()
        value = loss(states, items, targets)
        value.backward()
        values.append(value.detach())
        gradients.append((states.grad, items.grad))
    torch.testing.assert_close(values[0], values[1])
    for ours, slow in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, slow)
    assert not gradients[0][1][0].any(), "padding is no choice"


def slow_gbce(positive: float, negatives: list[float], items: int, t: float) -> float:
    """Equation (4) as it is written, with probabilities."""
    k = len(negatives)
    alpha = k / (items - 1)
    beta = alpha * (t * (1 - 1 / alpha) + 1 / alpha)
    sigma = lambda s: 1 / (1 + math.exp(-s))  # noqa: E731
    return -(beta * math.log(sigma(positive)) + sum(math.log(1 - sigma(s)) for s in negatives)) / (k + 1)


@pytest.mark.parametrize("t", [0.0, 0.3, 0.75, 1.0])
@pytest.mark.parametrize("k", [1, 5, 99])
def test_gbce_equals_its_equation(t: float, k: int) -> None:
    positive_T, negative_TK = randn(6), randn(6, k, seed=1)
    expected = [slow_gbce(p, n, 100, t) for p, n in zip(positive_T.tolist(), negative_TK.tolist(), strict=True)]
    assert gbce(positive_T, negative_TK, items=100, t=t).tolist() == pytest.approx(expected)


def test_gbce_without_calibration_is_binary_cross_entropy() -> None:
    positive_T, negative_TK = randn(6), randn(6, 3, seed=1)
    logits = torch.cat([positive_T[:, None], negative_TK], dim=1)
    labels = torch.zeros_like(logits)
    labels[:, 0] = 1
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(1)
    torch.testing.assert_close(gbce(positive_T, negative_TK, items=50, t=0.0), expected)


@pytest.mark.parametrize("p", [0.003, 0.03, 0.6])
def test_gbce_with_full_calibration_finds_the_softmax_probability(p: float) -> None:
    """t = 1: for an item that is the target with probability p the expected loss is least at sigma(s) = p, though only K negatives are sampled."""
    items, k = 1001, 10
    never = torch.full((1, k), -1e9, dtype=torch.float64)
    for shift, sign in ((0.0, 0), (0.5, 1), (-0.5, -1)):
        score = torch.tensor(math.log(p / (1 - p)) + shift, dtype=torch.float64, requires_grad=True)
        as_target = gbce(score.view(1), never, items=items, t=1.0)
        as_negative = gbce(torch.tensor([1e9], dtype=torch.float64), torch.cat([score.view(1, 1), never[:, 1:]], dim=1), items=items, t=1.0)
        (p * as_target + (1 - p) * k / (items - 1) * as_negative).sum().backward()
        slope = score.grad.item() / (p * k / items / (k + 1))
        assert (abs(slope) < 1e-9) if sign == 0 else (sign * slope > 0.1)


def test_gbce_is_exact_in_float32_where_probabilities_are_not() -> None:
    """The written form has log(0) here; gradients stay alive."""
    positive = torch.tensor([-150.0, 0.0, 150.0], requires_grad=True)
    negative = torch.tensor([[150.0], [0.0], [-150.0]], requires_grad=True)
    loss = gbce(positive, negative, items=1000, t=0.75)
    exact = gbce(positive.detach().double(), negative.detach().double(), items=1000, t=0.75)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=1e-30)
    loss.sum().backward()
    assert torch.isfinite(positive.grad).all()
    assert positive.grad[0] < 0 < negative.grad[0, 0]


@pytest.mark.parametrize("shared_by", [1, 3, 64])
@pytest.mark.parametrize("rows", [1, 6, 7])
def test_gbce_loss_scores_uniform_negatives_shared_by_blocks(rows: int, shared_by: int) -> None:
    states, items = randn(rows, 4), randn(9, 4, seed=2)
    targets = torch.randint(1, 9, (rows,), generator=torch.Generator().manual_seed(3))
    loss = gbce_loss(states, items, targets, negatives=5, t=0.75, shared_by=shared_by, generator=torch.Generator().manual_seed(4))
    drawn = torch.randint(1, 9, (-(-rows // shared_by), 5), generator=torch.Generator().manual_seed(4)).tolist()
    expected = []
    for i, (state, target) in enumerate(zip(states, targets.tolist(), strict=True)):
        negatives = [(state @ items[j]).item() for j in drawn[i // shared_by]]
        expected.append(slow_gbce((state @ items[target]).item(), negatives, 8, 0.75))
    assert loss.item() == pytest.approx(sum(expected) / rows)


def test_gbce_loss_draws_every_item_but_padding() -> None:
    """Alone with one item drawn often, each item of the catalogue gets a gradient and the padding row none."""
    items = randn(9, 4).requires_grad_()
    gbce_loss(randn(300, 4, seed=1), items, torch.ones(300, dtype=torch.int64), negatives=4, t=0.5, shared_by=1).backward()
    assert items.grad[1:].abs().sum(1).gt(0).all()
    assert not items.grad[0].any()


@pytest.mark.parametrize("kind", ["softmax", "gbce"])
def test_no_target_costs_nothing(kind: str) -> None:
    states, items, targets = torch.zeros(0, 4, requires_grad=True), torch.zeros(9, 4), torch.zeros(0, dtype=torch.int64)
    loss = softmax_loss(states, items, targets) if kind == "softmax" else gbce_loss(states, items, targets, negatives=3, t=0.5)
    loss.backward()
    assert loss.item() == 0
