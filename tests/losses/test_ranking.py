"""Binary cross-entropy of candidates: closed forms, padding and extremes."""

import math

import pytest
import torch

from longtrail.losses import ranking_loss
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
