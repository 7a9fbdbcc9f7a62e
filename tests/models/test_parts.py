"""Masks, tables, behaviour fields and the head's normalisation."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from longtrail.models.embedding import DECAYS, RECENT_EVENTS, BehaviourEmbedding
from longtrail.models.head import Head, MaskedBatchNorm
from longtrail.models.items.dense import DenseItems
from longtrail.models.masks import padding_mask
from longtrail.models.order import events_at
from longtrail.statistics import item_features, user_features
from tests.contracts.batches import SIZES, make_candidates, make_history, make_request, with_garbage


def test_mask() -> None:
    assert padding_mask(torch.tensor([0, 2, 3]), 3).tolist() == [[False] * 3, [True, True, False], [True] * 3]
    assert padding_mask(torch.tensor([2]), 0).shape == (1, 0)


def test_a_history_has_a_place_at_least() -> None:
    history = make_history(0, (0, 0))
    assert history.items_BL.shape == (2, 1)
    with pytest.raises(ValueError, match="histories of 2 users have no places"):
        events_at(history, torch.zeros(2, 0, dtype=torch.int64), history.lengths_B)


@pytest.mark.parametrize(
    ("part", "name", "made", "message"),
    [
        (0, "categories_BL", lambda x: x[:, 1:], r"History.categories_BL is \[5, 8\]; expected L = 9, as in items_BL"),
        (0, "lengths_B", lambda x: x[1:], r"History.lengths_B is \[4\]; expected B = 5, as in items_BL"),
        (0, "items_BL", lambda x: x[0], r"History.items_BL is \[9\]; expected \[B, L\]"),
        (0, "items_BL", lambda x: x.float(), "History.items_BL is torch.float32; expected torch.int64"),
        (0, "times_BL", lambda x: x.double(), "History.times_BL is torch.float64; expected torch.int64"),
        (1, "statistics_BCF", lambda x: x[..., 0], r"Candidates.statistics_BCF is \[5, 6\]; expected \[B, C, F\]"),
        (1, "categories_BC", lambda x: x[:, :1], r"Candidates.categories_BC is \[5, 1\]; expected C = 6, as in items_BC"),
        (2, "times_B", lambda x: x[:2], r"Context.times_B is \[2\]; expected B = 5, as in statistics_BG"),
    ],
)
def test_a_batch_whose_tensors_do_not_fit_names_the_one(part: int, name: str, made: Callable[[Tensor], Tensor], message: str) -> None:
    whole: Any = make_request()[part]
    with pytest.raises(ValueError, match=f"^{message}$"):
        replace(whole, **{name: made(getattr(whole, name))})


def test_statistics_of_another_number_are_named() -> None:
    head = Head(2, (3,), 0.0)
    with pytest.raises(ValueError, match=r"^2 statistics of an item and 3 of a user; expected 3 and 3, as longtrail\.statistics makes them$"):
        head([torch.zeros(1, 4, 2)], torch.zeros(1, 4, 2), torch.zeros(1, 3), torch.ones(1, 4, dtype=torch.bool))


def test_table() -> None:
    items = DenseItems(3, 2)
    assert items.vectors().shape == (4, 2)
    assert not items.vectors()[0].any()
    ids = torch.tensor([[0, 3], [4, 900]])
    assert torch.equal(items.embed(ids)[0, 1], items.vectors()[3])
    assert not items.embed(ids)[1].any()
    items.embed(ids).sum().backward()
    assert items.table.grad.tolist() == [[0, 0], [0, 0], [0, 0], [1, 1]]


def test_behaviours_are_item_category_and_action() -> None:
    torch.manual_seed(0)
    embedding = BehaviourEmbedding(SIZES, 3)
    history, candidates = make_history(), make_candidates()
    mask_BL = padding_mask(history.lengths_B, history.items_BL.shape[1])
    keys_BLD, query_BCD = embedding.keys(history, mask_BL), embedding.queries(candidates)
    item, category, action = (int(ids[2, 4]) for ids in (history.items_BL, history.categories_BL, history.actions_BL))
    fields = torch.cat([embedding.items.table[item], embedding.categories.table[category]])
    assert torch.equal(keys_BLD[2, 4], fields + embedding.actions[action])
    fields = torch.cat([embedding.items.table[candidates.items_BC[1, 2]], embedding.categories.table[candidates.categories_BC[1, 2]]])
    assert torch.equal(query_BCD[1, 2], fields)
    mask_BC = padding_mask(candidates.lengths_B, candidates.items_BC.shape[1])
    assert torch.equal(embedding.keys(with_garbage(history, mask_BL), mask_BL), keys_BLD)
    assert torch.equal(embedding.queries(with_garbage(candidates, mask_BC)), query_BCD)
    assert not keys_BLD[~mask_BL].any()
    assert not query_BCD[~mask_BC].any()


@pytest.mark.parametrize("lengths", [(6, 3, 1, 0), (6, 6), (2,)])
def test_normalisation_has_torchs_gradient_and_trains_on_what_serving_sees(lengths: tuple[int, ...]) -> None:
    """Over the packed real places: training's values are eval mode's; gradients those of torch.nn.BatchNorm1d, turned to the running scale."""
    torch.manual_seed(0)
    ours = MaskedBatchNorm(5).double()
    mask_BC = padding_mask(torch.tensor(lengths), 6)
    for _ in range(2):
        x_BCX = torch.randn(len(lengths), 6, 5, dtype=torch.float64) * 3 + 1
        left, right = x_BCX.clone().requires_grad_(), x_BCX[mask_BC].clone().requires_grad_()
        out = ours.train()(left, mask_BC)[mask_BC]
        torch.testing.assert_close(out, ours.eval()(x_BCX, mask_BC)[mask_BC])
        turn_X = ((right.var(0, correction=0) + 1e-3) / (ours.variance + 1e-3)).sqrt().detach()
        grad_out = torch.randn_like(out)
        out.backward(grad_out)
        nn.BatchNorm1d(5, eps=1e-3).double()(right).backward(grad_out * turn_X)
        torch.testing.assert_close(left.grad[mask_BC], right.grad)
        assert not left.grad[~mask_BC].any()


def test_running_statistics_are_those_of_all_places_however_batches_are_cut() -> None:
    """Batches of like values, as those of like lengths are: the variance between them counts, and no value is far out when serving."""
    torch.manual_seed(0)
    x_n = torch.randn(2_000, dtype=torch.float64).sort().values * 2 + 5
    batches = x_n.view(100, 20, 1, 1)
    norm, mask_BC = MaskedBatchNorm(1, momentum=0.05).double().train(), torch.ones(20, 1, dtype=torch.bool)
    weights = torch.zeros(0, dtype=torch.float64)
    seen = []
    for i in torch.randperm(100).tolist() * 2:
        norm(batches[i], mask_BC)
        weights = torch.cat([weights * 0.95, torch.tensor([0.05], dtype=torch.float64)])
        seen.append(batches[i].flatten())
    values, w = torch.stack(seen), weights / weights.sum()  # what the first values, mean 0 and variance 1, still weigh is .95 ** 200
    mean = (w * values.mean(1)).sum()
    variance = (w * (values.var(1) + (values.mean(1) - mean).square())).sum()
    assert float(norm.mean) == pytest.approx(float(mean), abs=1e-3)
    assert float(norm.variance) == pytest.approx(float(variance), rel=1e-2)
    served = norm.eval()(x_n.view(-1, 1, 1), torch.ones(2_000, 1, dtype=torch.bool)).detach()
    assert float(served.abs().max()) < 6


def test_normalisation_of_one_place_or_none_is_finite() -> None:
    norm = MaskedBatchNorm(2)
    for lengths in ((1,), (0,)):
        assert torch.isfinite(norm(torch.randn(1, 3, 2), padding_mask(torch.tensor(lengths), 3))).all()
    assert torch.isfinite(norm.variance).all()


def test_normalisation_keeps_float32_statistics_under_autocast() -> None:
    head = Head(4, (3,), 0.0).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        part = torch.randn(2, 3, 4, dtype=torch.bfloat16)
        logits = head([part], torch.randn(2, 3, 3), torch.randn(2, 3), padding_mask(torch.tensor([3, 2]), 3))
    assert torch.isfinite(logits).all()
    assert head.norm.mean.dtype == torch.float32


def test_logits_are_float32_under_autocast() -> None:
    """AUC counts ties half: of a thousand requests, logits of 8 bits would leave a few hundred values."""
    torch.manual_seed(0)
    head, mask_BC = Head(4, (3,), 0.0).eval(), torch.ones(1000, 2, dtype=torch.bool)
    inputs = [torch.randn(1000, 2, 4)], torch.randn(1000, 2, 3), torch.randn(1000, 3), mask_BC
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        logits = head(*inputs)
        exact = head.double()(*inputs)
    assert logits.dtype == torch.float32 and exact.dtype == torch.float64
    assert logits.unique().numel() > 1900
    torch.testing.assert_close(logits.double(), exact, rtol=0.02, atol=0.05)


def test_head_at_first_orders_as_the_click_rate() -> None:
    """The statistics in their real places: what longtrail.statistics makes of counts, through an untrained head whose deep part is off."""
    head = Head(2, (3,), 0.0).eval()
    with torch.no_grad():
        head.layers[-1].weight.zero_()  # type: ignore[operator]
        head.layers[-1].bias.zero_()  # type: ignore[operator]
    counts = [np.array(x) for x in ([[50, 9, 3]], [[40, 10, 0]], [[30, 1, 0]])]
    item_BCF = torch.from_numpy(item_features(*counts, 0.3))
    user_BG = torch.from_numpy(user_features(*(np.array(x) for x in ([7], [20], [15])), 0.3))
    logits_BC = head([torch.randn(1, 3, 2)], item_BCF, user_BG, torch.ones(1, 3, dtype=torch.bool))

    def over_prior(clicks: int, impressions: int) -> float:
        rate = (clicks + 3) / (impressions + 10)
        return math.log(rate / (1 - rate)) - math.log(3 / 7)

    expected = [over_prior(30, 40), over_prior(1, 10), 0.0]
    assert logits_BC[0].tolist() == pytest.approx([x + over_prior(15, 20) / 2 for x in expected], abs=1e-5)


def test_keys_by_pairs_of_category_and_action_are_those_of_two_tables() -> None:
    """Few behaviours are looked up field by field, many by pair: the same bits, and the same gradients; none in padding rows."""
    torch.manual_seed(0)
    embedding = BehaviourEmbedding(SIZES, 3).double()
    history = make_history(3, (60, 0, 7))
    mask_BL = padding_mask(history.lengths_B, 60)
    weights_BLD = torch.randn(3, 60, 6, dtype=torch.float64)
    assert mask_BL.numel() > (SIZES.categories + 1) * (SIZES.actions + 1)
    slow = embedding.things(history.items_BL, history.categories_BL, mask_BL) + embedding.done(history.actions_BL, mask_BL)
    fast = embedding.keys(history, mask_BL)
    assert torch.equal(fast, slow)
    parameters = list(embedding.parameters())
    grads = [torch.autograd.grad((keys * weights_BLD).sum(), parameters) for keys in (fast, slow)]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
        assert not one[0].any()


@torch.no_grad()
@pytest.mark.parametrize("longest", [9, 2 * RECENT_EVENTS])
def test_recent_actions_are_decayed_means_of_the_newest(longest: int) -> None:
    """Against a loop over events; nothing of an empty history, of unknown actions, of padding, and of what is older than the newest 100."""
    embedding, lengths = BehaviourEmbedding(SIZES, 3).double(), (0, 1, 4, longest)
    history = make_history(3, lengths, places=longest + 2)
    history.actions_BL[2, 1] = SIZES.actions + 1  # met after training
    found_BCX = embedding.recent(history, 2)
    for b, n in enumerate(lengths):
        expected = []
        for decay in DECAYS:
            total, weights = torch.zeros(6, dtype=torch.float64), 1.0
            for r, action in enumerate(history.actions_BL[b, :n].flip(0)[:RECENT_EVENTS].tolist()):
                weights += math.exp(-r / decay)
                total += math.exp(-r / decay) * embedding.actions[action] if action <= SIZES.actions else 0
            expected.append(total / weights)
        torch.testing.assert_close(found_BCX[b], torch.cat(expected).expand(2, -1), rtol=0, atol=1e-12)
    assert torch.equal(embedding.recent(with_garbage(history, padding_mask(history.lengths_B, longest + 2)), 2), found_BCX)
