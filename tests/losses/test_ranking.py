"""Binary cross-entropy of candidates: closed forms, padding and extremes."""

import math

import pytest
import torch

from longtrail.losses.ranking import listwise_loss, ranking_loss
from tests.losses.draws import randn


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


def test_listwise_by_hand() -> None:
    """Two clicks in one set, an unlabelled candidate that counts in the softmax only, a request without clicks, NaN on padding."""
    logits_BC = torch.tensor([[1.0, 2.0, 0.5, math.nan], [3.0, 1.0, math.nan, math.nan]], dtype=torch.float64, requires_grad=True)
    clicks_BC = torch.tensor([[1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0]])  # the third label of request 0 is not read: it was not exposed
    lengths_B = torch.tensor([3, 2])
    exposed_BC = torch.tensor([[True, True, False, True], [True, True, True, False]])
    total = sum(math.exp(x) for x in (1.0, 2.0, 0.5))
    expected = -(math.log(math.exp(1) / total) + math.log(math.exp(2) / total)) / 2
    loss = listwise_loss(logits_BC, clicks_BC, lengths_B, exposed_BC=exposed_BC)
    assert loss.item() == pytest.approx(expected)
    loss.backward()
    assert logits_BC.grad is not None and torch.isfinite(logits_BC.grad).all()
    assert not logits_BC.grad[0, 3:].any() and not logits_BC.grad[1].any()
    both = ranking_loss(logits_BC, clicks_BC, lengths_B, exposed_BC=exposed_BC, listwise=0.3)
    plain = ranking_loss(logits_BC, clicks_BC, lengths_B, exposed_BC=exposed_BC)
    assert both.item() == pytest.approx(plain.item() + 0.3 * expected)


def test_without_listwise_the_loss_is_plain_cross_entropy_to_the_bit() -> None:
    random = torch.Generator().manual_seed(0)
    logits_BC, clicks_BC = torch.randn(9, 5, generator=random), torch.rand(9, 5, generator=random).round()
    lengths_B = torch.tensor([5, 0, 1, 2, 3, 4, 5, 5, 1])
    real_BC = torch.arange(5) < lengths_B.unsqueeze(1)
    plain = ranking_loss(logits_BC, clicks_BC, lengths_B)
    assert torch.equal(plain, ranking_loss(logits_BC, clicks_BC, lengths_B, exposed_BC=real_BC, listwise=0.0))
    assert listwise_loss(logits_BC, torch.zeros(9, 5), lengths_B).item() == 0
