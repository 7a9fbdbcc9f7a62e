"""Losses over sampled items against their equations, and what they ask the item slot for."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from longtrail.losses import bce_loss, gbce, gbce_loss, sampled_softmax_loss
from longtrail.losses.sampled import gbce_weight
from longtrail.models.items.dense import DenseItems
from longtrail.models.items.recjpq import RecJPQItems
from tests.losses.draws import randint, randn


def table(items: int = 8, width: int = 4) -> DenseItems:
    layer = DenseItems(items, width).double()
    with torch.no_grad():
        layer.table[1:] = randn(items, width, seed=2)
    return layer


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


@pytest.mark.parametrize(("k", "items"), [(1, 3416), (256, 3416), (9, 10)])
def test_the_weight_of_a_positive_goes_from_one_to_the_sampling_rate(k: int, items: int) -> None:
    assert gbce_weight(k, items, 0.0) == pytest.approx(1)
    assert gbce_weight(k, items, 1.0) == pytest.approx(k / (items - 1))


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
    states, items, targets = randn(rows, 4), table(), randint(1, 9, rows, seed=3)
    loss = gbce_loss(states, items, targets, negatives=5, t=0.75, shared_by=shared_by, generator=torch.Generator().manual_seed(4))
    drawn = torch.randint(1, 9, (-(-rows // shared_by), 5), generator=torch.Generator().manual_seed(4)).tolist()
    expected = []
    for i, (state, target) in enumerate(zip(states, targets.tolist(), strict=True)):
        negatives = [(state @ items.table[j]).item() for j in drawn[i // shared_by]]
        expected.append(slow_gbce((state @ items.table[target]).item(), negatives, 8, 0.75))
    assert loss.item() == pytest.approx(sum(expected) / rows)


@pytest.mark.parametrize("t", [0.0, 0.75, 1.0])
@pytest.mark.parametrize("negatives", [1, 3, 256])
def test_with_the_prior_nothing_pulls_all_scores_one_way_at_the_start(t: float, negatives: int) -> None:
    """At equal scores the gradients of a target and its negatives sum to zero, as a softmax's do; without the prior nearly all goes down."""
    sums = {}
    for prior in (True, False):
        items = DenseItems(400, 1).double()
        with torch.no_grad():
            items.table.fill_(0)
        gbce_loss(torch.ones(6, 1, dtype=torch.float64), items, torch.arange(1, 7), negatives=negatives, t=t, prior=prior).backward()
        assert items.table.grad is not None
        sums[prior] = float(items.table.grad.sum())
    assert sums[True] == pytest.approx(0, abs=1e-12)
    assert sums[False] > 0.1 or (negatives, t) == (1, 0.0)


def test_the_prior_is_the_same_loss_of_shifted_scores() -> None:
    """One number added to all scores, so that what orders the items is learnt as before."""
    items, states_TD, targets_T = table(), randn(5, 4), torch.tensor([1, 8, 3, 3, 5])
    found = gbce_loss(states_TD, items, targets_T, negatives=6, t=0.75, prior=True, generator=torch.Generator().manual_seed(3))
    scores_TN = states_TD @ items.vectors().detach().T + math.log(gbce_weight(6, 8, 0.75) / 6)
    negatives_6 = torch.randint(1, 9, (1, 6), generator=torch.Generator().manual_seed(3))[0]
    expected = [slow_gbce(float(s[target]), s[negatives_6].tolist(), 8, 0.75) for s, target in zip(scores_TN, targets_T, strict=True)]
    assert float(found.detach()) == pytest.approx(sum(expected) / 5)


@pytest.mark.parametrize("shared_by", [1, 3, 64])
@pytest.mark.parametrize("rows", [1, 6, 7])
def test_sampled_softmax_is_a_softmax_over_target_and_negatives_without_hits(rows: int, shared_by: int) -> None:
    """Eight items and five negatives: the target is often among them."""
    states, items, targets = randn(rows, 4), table(), randint(1, 9, rows, seed=3)
    loss = sampled_softmax_loss(states, items, targets, negatives=5, shared_by=shared_by, generator=torch.Generator().manual_seed(4))
    drawn = torch.randint(1, 9, (-(-rows // shared_by), 5), generator=torch.Generator().manual_seed(4)).tolist()
    expected = []
    for i, (state, target) in enumerate(zip(states, targets.tolist(), strict=True)):
        others = [math.exp((state @ items.table[j]).item()) for j in drawn[i // shared_by] if j != target]
        own = math.exp((state @ items.table[target]).item())
        expected.append(-math.log(own / (own + sum(others))))
    assert loss.item() == pytest.approx(sum(expected) / rows)


def test_bce_is_one_negative_of_its_own_for_each_target() -> None:
    states, items, targets = randn(7, 4), table(), randint(1, 9, 7, seed=3)
    loss = bce_loss(states, items, targets, generator=torch.Generator().manual_seed(4))
    drawn = torch.randint(1, 9, (7, 1), generator=torch.Generator().manual_seed(4)).squeeze(1)
    positive, negative = ((states * items.table[ids]).sum(1) for ids in (targets, drawn))
    binary = torch.nn.functional.binary_cross_entropy_with_logits
    expected = (binary(positive, torch.ones_like(positive)) + binary(negative, torch.zeros_like(negative))) / 2
    torch.testing.assert_close(loss, expected)


SAMPLED: dict[str, Any] = {
    "bce": bce_loss,
    "gbce": lambda *args, **more: gbce_loss(*args, negatives=4, t=0.5, **more),
    "sampled softmax": lambda *args, **more: sampled_softmax_loss(*args, negatives=4, **more),
}


@pytest.mark.parametrize("loss", SAMPLED.values(), ids=SAMPLED.keys())
def test_every_item_but_padding_is_drawn(loss: Any) -> None:
    items = table()
    loss(randn(600, 4, seed=1), items, torch.ones(600, dtype=torch.int64)).backward()
    assert items.table.grad[1:].abs().sum(1).gt(0).all()
    assert not items.table.grad[0].any()


@pytest.mark.parametrize("loss", SAMPLED.values(), ids=SAMPLED.keys())
def test_the_catalogue_is_never_made(loss: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A million items in RecJPQ: only the drawn and the named are put together."""
    items, asked = RecJPQItems(1_000_000, 8, splits=2, codes=16), []
    embed = items.embed

    def watched(ids: Tensor) -> Tensor:
        asked.append(ids.numel())
        return embed(ids)

    monkeypatch.setattr(items, "embed", watched)
    monkeypatch.setattr(items, "vectors", lambda: pytest.fail("vectors() of the whole catalogue"))
    loss(torch.randn(100, 8), items, torch.randint(1, 1_000_001, (100,))).backward()
    assert sum(asked) <= 200
    assert items.centroids.grad.abs().sum() > 0


@pytest.mark.parametrize("loss", SAMPLED.values(), ids=SAMPLED.keys())
def test_no_target_costs_nothing(loss: Any) -> None:
    states = torch.zeros(0, 4, requires_grad=True)
    value = loss(states, table(), torch.zeros(0, dtype=torch.int64))
    value.backward()
    assert value.item() == 0
