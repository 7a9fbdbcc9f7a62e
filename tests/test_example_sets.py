"""Sampled candidate sets: who may come in, and that they cannot be told from the logged ones."""

from pathlib import Path

import numpy as np
import pytest
import torch

from longtrail.examples import FeatureSet, RankingBatches
from longtrail.examples.sets import WINDOW, widened
from longtrail.history import FlatHistories
from longtrail.losses import ranking_loss


@pytest.mark.parametrize("seed", range(3))
def test_widened_by_its_definition(seed: int) -> None:
    """Rows before the request, no item twice, none of the history or of the request itself, own rows first and in order."""
    rng = np.random.default_rng(seed)
    items_E = rng.integers(1, 30, 300)
    starts_B = np.array([0, 1, 50, 299, 120])
    widths_B = np.array([2, 1, 3, 1, 4])
    rows_BC = np.where(np.arange(4) < widths_B[:, None], starts_B[:, None] + np.arange(4), -1)
    lengths_B = np.array([0, 9, 9, 2, 14])
    offsets_B1 = np.concatenate([[0], np.cumsum(lengths_B)])
    items = rng.integers(1, 30, lengths_B.sum())
    rows, own = widened(rows_BC, starts_B, items_E, FlatHistories(items=items, actions=items, times=items, offsets_B1=offsets_B1), 6, rng)
    drawn = 0
    for b in range(5):
        n = widths_B[b]
        assert rows[b, :n].tolist() == list(range(starts_B[b], starts_B[b] + n))
        assert own[b].tolist() == [True] * n + [False] * (rows.shape[1] - n)
        more = rows[b, n:][rows[b, n:] >= 0]
        assert (rows[b, n + len(more) :] == -1).all()
        assert len(more) <= 6
        assert ((more < starts_B[b]) & (more >= starts_B[b] - WINDOW)).all()
        found = items_E[more]
        assert len(set(found)) == len(found)
        assert not set(found) & (set(items[offsets_B1[b] : offsets_B1[b + 1]]) | set(items_E[starts_B[b] : starts_B[b] + n]))
        drawn += len(more)
    assert drawn > 12
    assert (rows[0] >= 0).sum() == 2  # nothing came before the first request


def test_batches_with_sampled_candidates(toy_features_folder: Path) -> None:
    features = FeatureSet.open(toy_features_folder)
    shape = {"max_history": 20, "batch_size": 32, "seed": 3}
    plain, wide = RankingBatches(features, "train", **shape), RankingBatches(features, "train", **shape, sampled=5)
    asked = np.arange(200, 260)
    logged, batch = plain.make(asked), wide.make(asked)
    assert torch.equal(logged.exposed.sum(1), batch.exposed.sum(1))
    assert torch.equal(batch.rows_BC[batch.exposed], logged.rows_BC[logged.exposed])
    assert torch.equal(batch.clicks_BC[batch.exposed], logged.clicks_BC[logged.exposed])
    assert not batch.clicks_BC[~batch.exposed].any()
    assert (batch.candidates.lengths_B > logged.candidates.lengths_B).float().mean() > 0.9
    assert batch.candidates.lengths_B.max() <= logged.candidates.lengths_B.max() + 5
    assert torch.equal(wide.make(asked).candidates.items_BC, batch.candidates.items_BC)
    wide.set_epoch(1)
    assert not torch.equal(wide.make(asked).candidates.items_BC, batch.candidates.items_BC)
    random = torch.Generator().manual_seed(0)
    logits_BC = torch.randn(batch.clicks_BC.shape, generator=random, dtype=torch.float64)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits_BC[batch.exposed], batch.clicks_BC[batch.exposed].double())
    loss = ranking_loss(logits_BC, batch.clicks_BC, batch.candidates.lengths_B, exposed_BC=batch.exposed)
    torch.testing.assert_close(loss, expected)


def test_nothing_that_was_ever_seen_is_drawn(toy_features_folder: Path) -> None:
    """However little of a history the model reads."""
    features, drawn = FeatureSet.open(toy_features_folder), 0
    batches = RankingBatches(features, "train", max_history=2, batch_size=64, seed=0, sampled=5)
    for batch in batches:
        held = features.history.flat(batch.users_B.numpy(), batches.history_length_R[batch.requests_B.numpy()])
        for b, (items_C, exposed_C) in enumerate(zip(batch.candidates.items_BC.numpy(), batch.exposed.numpy(), strict=True)):
            more = set(items_C[~exposed_C]) - {0}
            assert not more & set(held.items[held.offsets_B1[b] : held.offsets_B1[b + 1]])
            drawn += len(more)
    assert drawn > 1000


def test_drawn_candidates_look_like_logged_ones(toy_features_folder: Path) -> None:
    """No statistic of an item alone tells which candidate was logged: AUC of each is that of chance."""
    from longtrail.metrics import auc

    batches = RankingBatches(FeatureSet.open(toy_features_folder), "train", max_history=1, batch_size=512, seed=0, sampled=4)
    statistics, exposed = [], []
    for batch in batches:
        real_BC = torch.arange(batch.exposed.shape[1]) < batch.candidates.lengths_B.unsqueeze(1)
        statistics.append(batch.candidates.statistics_BCF[real_BC].numpy())
        exposed.append(batch.exposed[real_BC].numpy())
    for column in np.concatenate(statistics).T:  # events, impressions, click rate
        assert abs(auc(np.concatenate(exposed).astype(np.int64), column) - 0.5) < 0.1
