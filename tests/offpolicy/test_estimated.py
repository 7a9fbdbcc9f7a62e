"""What is estimated where nobody logged it: propensities from shares, examination from clicks."""

import numpy as np
import pytest

from longtrail.errors import EvaluationError
from longtrail.offpolicy.estimated import PositionBias, ShareCounts


def test_shares_by_hand_and_merged():
    items, positions = np.array([1, 1, 2, 1, 3, 3]), np.array([1, 1, 1, 2, 2, 2])
    counts = ShareCounts.of(items, positions)
    np.testing.assert_allclose(counts.propensities(items, positions), [2 / 3, 2 / 3, 1 / 3, 1 / 3, 2 / 3, 2 / 3])
    assert np.isnan(counts.propensities(np.array([2]), np.array([2]))).all()
    assert np.isnan(ShareCounts().propensities(np.array([2]), np.array([2]))).all()
    merged = ShareCounts().merge(ShareCounts.of(items[:2], positions[:2])).merge(ShareCounts.of(items[2:], positions[2:]))
    assert merged.keys.tolist() == counts.keys.tolist() and merged.counts.tolist() == counts.counts.tolist()
    with pytest.raises(EvaluationError, match="positions run from 0"):
        ShareCounts.of(np.array([1]), np.array([0]))


def click_table(rng, examination, attraction, shown):
    return rng.binomial(shown.astype(int), examination * attraction[:, None]).astype(float)


def test_examination_is_found_where_items_moved():
    """40 items at 4 positions, 500 impressions each, the better ones more often on top: within .05 of the truth (about 4 standard errors)."""
    rng = np.random.default_rng(0)
    examination, attraction = np.array([1.0, 0.7, 0.45, 0.3]), rng.uniform(0.05, 0.6, 40)
    shown = np.round(500 * np.exp(np.outer(attraction - 0.3, [3, 1, -1, -3])))
    found = PositionBias.fit(shown, click_table(rng, examination, attraction, shown))
    np.testing.assert_allclose(found.examination_P, examination, atol=0.05)
    np.testing.assert_allclose(found.attraction_I, attraction, atol=0.12)
    naive = click_table(rng, examination, attraction, shown).sum(axis=0) / shown.sum(axis=0)
    assert abs(naive[3] / naive[0] - 0.3) > 0.08  # rates by position mix examination with which items stood there
    assert found.estimated and found.rounds > 1


def test_em_ends_where_the_likelihood_is_flat():
    """The EM's answer against a general optimiser of the same likelihood."""
    from scipy.optimize import minimize

    rng = np.random.default_rng(1)
    examination, attraction = np.array([1.0, 0.6, 0.4]), np.array([0.2, 0.5, 0.35, 0.1])
    shown = rng.integers(200, 400, (4, 3)).astype(float)
    clicked = click_table(rng, examination, attraction, shown)

    def loss(x):
        p = np.clip(np.exp(np.append(0.0, x[:2])) * np.exp(x[2:])[:, None], 1e-9, 1 - 1e-9)
        return -(clicked * np.log(p) + (shown - clicked) * np.log(1 - p)).sum()

    best = minimize(loss, np.log(np.array([0.5, 0.5, 0.3, 0.3, 0.3, 0.3])), method="BFGS").x
    found = PositionBias.fit(shown, clicked, rounds=20_000, tolerance=1e-12)
    np.testing.assert_allclose(found.examination_P[1:], np.exp(best[:2]), rtol=2e-3)
    np.testing.assert_allclose(found.attraction_I, np.exp(best[2:]), rtol=2e-3)


def test_positions_that_share_no_items_are_refused():
    shown = np.array([[10.0, 10, 0, 0], [0, 5, 5, 0], [0, 0, 0, 9], [0, 0, 0, 0]])
    with pytest.raises(EvaluationError, match="position 4 shares no items"):
        PositionBias.fit(shown, shown * 0)
    found = PositionBias.fit(shown[:, :3], shown[:, :3] * 0.5)
    np.testing.assert_allclose(found.examination_P, 1.0, atol=1e-3)
    assert np.isnan(found.attraction_I[2:]).all()
