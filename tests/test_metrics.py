"""Every metric against a second implementation (scikit-learn, torchmetrics) or a slow loop; intervals against a plain bootstrap."""

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss as sklearn_log_loss
from sklearn.metrics import ndcg_score, roc_auc_score
from torchmetrics.functional.classification import binary_calibration_error
from torchmetrics.functional.retrieval import retrieval_normalized_dcg, retrieval_recall, retrieval_reciprocal_rank

from longtrail import metrics
from longtrail.bootstrap import differences, intervals, resample_counts, tail


def rows(seed: int, n: int, users: int, levels: int):
    """Random rows; few `levels` of score make many ties."""
    rng = np.random.default_rng(seed)
    users_n = rng.integers(users, size=n)
    scores_n = rng.integers(-levels, levels + 1, size=n) / levels * 3
    clicks_n = (rng.random(n) < metrics.sigmoid(scores_n)).astype(np.int8)
    return users_n, clicks_n, scores_n


def slow_auc(clicks, scores):
    wins = [(a > b) + 0.5 * (a == b) for a in scores[clicks == 1] for b in scores[clicks == 0]]
    return float(np.mean(wins)) if wins else None


def slow_gauc(users, clicks, scores):
    parts = [(slow_auc(clicks[users == u], scores[users == u]), (users == u).sum()) for u in np.unique(users)]
    parts = [(a, n) for a, n in parts if a is not None]
    return sum(a * n for a, n in parts) / sum(n for _, n in parts) if parts else None


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("levels", [1, 3, 1000])
def test_ranking_metrics_equal_a_second_implementation(seed, levels):
    users, clicks, scores = rows(seed, n=5 + 13 * seed, users=1 + seed, levels=levels)
    probabilities = metrics.sigmoid(scores)
    assert metrics.gauc(users * 7 + 3, clicks, scores) == pytest.approx(slow_gauc(users, clicks, scores))
    if 0 < clicks.sum() < len(clicks):
        assert metrics.auc(clicks, scores) == pytest.approx(roc_auc_score(clicks, scores))
    assert metrics.log_loss(clicks, scores) == pytest.approx(sklearn_log_loss(clicks, probabilities, labels=[0, 1]))
    expected = binary_calibration_error(torch.tensor(probabilities), torch.tensor(clicks).long(), n_bins=15, norm="l1")
    assert metrics.ece(clicks, probabilities) == pytest.approx(float(expected), abs=1e-6)
    if clicks.any():
        assert metrics.calibration_ratio(clicks, probabilities) == pytest.approx(probabilities.sum() / clicks.sum())


@pytest.mark.parametrize("seed", range(10))
def test_request_gauc_is_gauc_within_requests(seed):
    users, clicks, scores = rows(seed, n=200, users=9, levels=5)
    requests = users * 4 + np.random.default_rng(seed).integers(4, size=len(users))
    found = intervals(metrics.ranking_contributions(users, requests, clicks, scores, 9), replicates=10)["request_gauc"]
    assert found.value == pytest.approx(slow_gauc(requests, clicks, scores))


def test_feedback_about_the_user_alone_harms_gauc_but_not_request_gauc():
    """Clicks are coin flips, the score is the user's own click rate so far: worthless, yet within a user it looks worse than a coin."""
    rng = np.random.default_rng(0)
    users = np.repeat(np.arange(400), 10)
    clicks = rng.integers(2, size=users.size)
    before = np.cumsum(clicks.reshape(400, 10), axis=1) - clicks.reshape(400, 10)
    scores = ((before + 1) / (np.arange(10) + 2)).ravel()
    found = intervals(metrics.ranking_contributions(users, np.arange(4000) // 2, clicks, np.repeat(scores[::2], 2), 400), replicates=10)
    assert metrics.gauc(users, clicks, scores) < 0.45
    assert found["request_gauc"].value == 0.5


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("k", [1, 3, 10])
def test_retrieval_metrics_equal_a_second_implementation(seed, k):
    rng = np.random.default_rng(seed)
    scores = rng.permuted(np.tile(np.arange(1.0, 13.0), (7, 1)), axis=1)  # torchmetrics takes no score <= 0 for a hit
    targets = rng.integers(12, size=7)
    truth = np.eye(12)[targets]
    ranks = 13 - scores[np.arange(7), targets].astype(np.int64)
    found = metrics.retrieval_metrics(ranks, [k])
    pairs = [(torch.tensor(s), torch.tensor(t).long()) for s, t in zip(scores, truth, strict=True)]
    assert found[f"ndcg@{k}"] == pytest.approx(ndcg_score(truth, scores, k=k))
    assert found[f"ndcg@{k}"] == pytest.approx(np.mean([retrieval_normalized_dcg(s, t, top_k=k) for s, t in pairs]))
    assert found[f"recall@{k}"] == pytest.approx(np.mean([retrieval_recall(s, t, top_k=k) for s, t in pairs]))
    assert found["mrr"] == pytest.approx(np.mean([retrieval_reciprocal_rank(s, t) for s, t in pairs]))


def test_a_target_that_can_never_be_found_is_a_miss():
    assert metrics.retrieval_metrics(np.array([1, 0]), [10]) == {"ndcg@10": 0.5, "recall@10": 0.5, "mrr": 0.5}


EMPTY = np.zeros(0, np.int64)


@pytest.mark.parametrize(
    ("users", "clicks", "name", "reason"),
    [
        (EMPTY, EMPTY, "auc", "no rows"),
        (EMPTY, EMPTY, "gauc", "no rows"),
        (EMPTY, EMPTY, "log_loss", "no rows"),
        (EMPTY, EMPTY, "ece", "no rows"),
        (np.array([0, 1]), np.array([0, 0]), "auc", "no clicks"),
        (np.array([0, 1]), np.array([0, 0]), "calibration_ratio", "no clicks"),
        (np.array([0, 1]), np.array([1, 1]), "gauc", "clicks only"),
        (np.array([0, 1]), np.array([0, 1]), "gauc", "no user has both a click and a miss"),
    ],
)
def test_the_undefined_is_none_with_a_reason(users, clicks, name, reason):
    estimate = intervals(metrics.ranking_contributions(users, users, clicks, np.zeros(len(users)), 2), replicates=10)[name]
    assert (estimate.value, estimate.low, estimate.high, estimate.reason) == (None, None, None, reason)


@pytest.mark.parametrize("clicks", [[0, 1, 0, 1], [1, 1, 1, 1]])
def test_no_metric_is_made_of_scores_that_are_no_numbers(clicks):
    """Sorted, they would come last, and have an AUC."""
    users, clicks, scores = np.array([0, 0, 1, 1]), np.array(clicks), np.array([0.1, np.nan, 0.3, np.nan])
    for name, estimate in intervals(metrics.ranking_contributions(users, users, clicks, scores, 2), replicates=10).items():
        assert (estimate.value, estimate.low, estimate.high) == (None, None, None)
        assert estimate.reason in ("2 of 4 predictions are not numbers", "clicks only" if "auc" in name else "") and estimate.reason != ""
    assert metrics.auc(clicks, scores) is metrics.gauc(users, clicks, scores) is metrics.log_loss(clicks, scores) is None
    assert metrics.calibration_contributions(users, clicks, scores, 2) == {}


def test_empty_retrieval_is_none_with_a_reason():
    estimates = intervals(metrics.retrieval_contributions(EMPTY, EMPTY, [10], 0), replicates=10)
    assert all(e.json() == {"value": None, "low": None, "high": None, "reason": "no rows"} for e in estimates.values())


ONE = np.zeros(4, np.int64)


def test_one_user_has_a_value_but_no_interval():
    found = intervals(metrics.ranking_contributions(ONE, ONE, np.array([0, 1, 0, 1]), np.array([0.1, 0.2, 0.3, 0.4]), 1), replicates=10)
    assert found["auc"].value == found["gauc"].value == 0.75
    assert found["auc"].low is None and "1 user" in str(found["auc"].reason)


def test_log_loss_is_finite_for_extreme_logits():
    assert metrics.log_loss(np.array([1, 0]), np.array([-800.0, 800.0])) == pytest.approx(800)


def test_resampling_draws_whole_users_and_is_reproducible():
    counts = np.concatenate(list(resample_counts(50, 400, seed=3)))
    assert counts.shape == (400, 50) and (counts.sum(1) == 50).all()
    assert np.array_equal(counts, np.concatenate(list(resample_counts(50, 400, seed=3))))
    assert counts.mean() == 1 and counts.var() == pytest.approx(1 - 1 / 50, abs=0.05)


def test_blocks_of_replicates_do_not_change_the_draws(monkeypatch):
    whole = np.concatenate(list(resample_counts(30, 20, seed=1)))
    monkeypatch.setattr("longtrail.bootstrap._BLOCK", 90)
    assert np.array_equal(whole, np.concatenate(list(resample_counts(30, 20, seed=1))))


@pytest.mark.parametrize("name", ["auc", "gauc", "request_gauc", "log_loss", "calibration_ratio", "ece"])
def test_intervals_agree_with_a_bootstrap_that_repeats_the_rows(name):
    """The oracle copies each drawn user's rows and computes the metric anew."""
    users, clicks, scores = rows(5, n=3000, users=60, levels=8)
    scores = scores + np.random.default_rng(0).normal(size=60)[users]  # users differ, so clustering matters
    requests = users * 5 + np.random.default_rng(1).integers(5, size=len(users))
    found = intervals(metrics.ranking_contributions(users, requests, clicks, scores, 60), replicates=600, seed=1)[name]
    again = []
    for counts in np.concatenate(list(resample_counts(60, 600, seed=1))).astype(int):
        take = np.repeat(np.arange(len(users)), counts[users])
        copies = users[take] + 60 * np.concatenate([np.arange(c) for c in counts[users]])  # a user drawn twice is two users
        again.append(
            metrics.ranking_contributions(copies, copies * 5 + requests[take] % 5, clicks[take], scores[take], 60 * counts.max())[name].value
        )
    low, high = np.quantile(again, [tail(60, 0.95), 1 - tail(60, 0.95)])
    width = high - low
    assert found.value == pytest.approx(metrics.ranking_contributions(users, requests, clicks, scores, 60)[name].value)
    assert found.low <= found.value <= found.high
    # ECE keeps its signs (see its docstring), so only its width can agree.
    tolerance = 1e-9 if name in ("gauc", "request_gauc", "log_loss", "calibration_ratio") else 0.12 * width
    if name == "ece":
        assert found.high - found.low == pytest.approx(width, rel=0.25)
    else:
        assert found.low == pytest.approx(low, abs=tolerance) and found.high == pytest.approx(high, abs=tolerance)


def test_tails_widen_for_few_users_only():
    assert tail(10**6, 0.95) == pytest.approx(0.025, abs=1e-5)
    assert tail(5, 0.95) < tail(20, 0.95) < 0.025


def test_intervals_of_a_mean_over_few_users_cover_the_truth():
    """Ten users: plain percentiles cover about 90 %."""
    hits = 0
    for seed in range(400):
        rng = np.random.default_rng(seed)
        users = np.repeat(np.arange(10), 5)
        losses = rng.normal(size=50) + rng.normal(size=10)[users]
        one = metrics.Contributions(numerators_U=np.bincount(users, losses), denominators_U=np.full(10, 5.0), users=10, bounds=(-np.inf, np.inf))
        found = intervals({"mean": one}, replicates=400, seed=seed)["mean"]
        hits += found.low <= 0 <= found.high
    assert 0.92 <= hits / 400 <= 0.98


def test_auc_intervals_cover_the_truth():
    """95 % intervals over repeated worlds hold the true AUC about 95 times in 100; an interval that ignores users would not."""
    hits = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        users = np.repeat(np.arange(40), 20)
        clicks = rng.integers(2, size=800)
        scores = 0.8 * clicks + rng.normal(size=800) + 0.7 * rng.normal(size=40)[users]
        found = intervals({"auc": metrics.auc_contributions(users, clicks, scores, 40)}, replicates=200, seed=seed)["auc"]
        truth = 0.6784  # P(N(0.8, 2 (1 + 0.49)) > 0), the chance that the pair is one user's neglected
        hits += found.low <= truth <= found.high
    assert 180 <= hits <= 199


def slow_coverage(users, lists, k, items):
    def share(keep):
        return len(set(lists[keep, :k].ravel()) - {0}) / items

    distinct = np.unique(users)
    left = np.array([share(users != u) for u in distinct])
    return share(np.ones(len(users), bool)), np.sqrt((len(distinct) - 1) / len(distinct) * ((left - left.mean()) ** 2).sum())


@pytest.mark.parametrize("seed", range(10))
def test_coverage_and_its_jackknife_error_equal_a_loop(seed):
    rng = np.random.default_rng(seed)
    users = rng.integers(2 + seed, size=30) * 5
    users[:2] = [0, 5]
    lists = rng.integers(0, 80, size=(30, 4))
    assert metrics.coverage(users, lists, 3, 80) == pytest.approx(slow_coverage(users, lists, 3, 80))


def test_coverage_edges():
    assert metrics.coverage(EMPTY, np.zeros((0, 3), np.int64), 3, 10) == (None, None)
    assert metrics.coverage(np.array([4]), np.array([[1, 2]]), 2, 10) == (0.2, None)
    assert metrics.coverage(np.array([4, 5]), np.array([[0, 0], [0, 0]]), 2, 10) == (0.0, 0.0)


def test_calibration_curve_holds_every_row_once():
    users, clicks, scores = rows(0, n=500, users=5, levels=4)
    probabilities = metrics.sigmoid(scores)
    curve = metrics.calibration_contributions(users, clicks, probabilities, 5)
    assert sum(b.denominators_U.sum() for b in curve.values()) == 500 and 1 < len(curve) <= 10
    assert sum(b.numerators_U.sum() for b in curve.values()) == clicks.sum()
    assert sum(p * b.denominators_U.sum() for p, b in curve.items()) == pytest.approx(probabilities.sum())
    assert metrics.calibration_contributions(EMPTY, EMPTY, np.zeros(0), 0) == {}


def test_hit_rate_curve():
    curve = metrics.hit_rate_contributions(np.array([0, 1, 1, 2]), np.array([1, 0, 3, 30]), 50, 3)
    assert {k: c.value for k, c in curve.items()} == {1: 0.25, 2: 0.25, 5: 0.5, 10: 0.5, 20: 0.5, 50: 0.75}


def test_a_paired_difference_is_that_of_the_same_resampled_users():
    """Against a loop that draws users and repeats their rows; both models err on the same users, which cancels."""
    rng = np.random.default_rng(3)
    users, clicks = np.repeat(np.arange(60), 8), rng.integers(0, 2, 480)
    hard_n = np.repeat(rng.normal(size=60) * 3, 8)
    before_n = hard_n + rng.normal(size=480)
    after_n = before_n + (clicks - 0.5) * 0.6
    before, after = (metrics.ranking_contributions(users, users, clicks, scores_n, 60) for scores_n in (before_n, after_n))
    found = differences(before, after, replicates=400, seed=5)
    counts_RU = np.concatenate(list(resample_counts(60, 400, 5)))
    losses = [metrics.row_log_losses(clicks, scores_n) for scores_n in (before_n, after_n)]
    drawn_R = [counts_U[users] @ (losses[1] - losses[0]) / counts_U[users].sum() for counts_U in counts_RU]
    assert found["log_loss"].value == pytest.approx(losses[1].mean() - losses[0].mean())
    outside = tail(60, 0.95)
    assert (found["log_loss"].low, found["log_loss"].high) == pytest.approx(tuple(np.quantile(drawn_R, [outside, 1 - outside])))
    assert found["auc"].value == pytest.approx(metrics.auc(clicks, after_n) - metrics.auc(clicks, before_n))
    alone = intervals(after, replicates=400, seed=5)["auc"]
    assert found["auc"].high - found["auc"].low < 0.5 * (alone.high - alone.low)
    same = differences(before, before, replicates=20)["gauc"]
    assert (same.value, same.low, same.high) == (0, 0, 0)


def test_a_difference_from_what_is_undefined_is_none_with_the_reason():
    defined, undefined = (metrics.ranking_contributions(ONE, ONE, clicks, np.arange(4.0), 1) for clicks in (np.array([0, 1, 0, 1]), np.ones(4, int)))
    found = differences(defined, undefined, replicates=10)
    assert (found["auc"].value, found["auc"].reason) == (None, "clicks only")
    assert found["log_loss"].value is not None and found["log_loss"].low is None
    with pytest.raises(ValueError, match="auc: 1 users before, 2 after; expected the same users, numbered alike"):
        differences(defined, metrics.ranking_contributions(ONE, ONE, np.array([0, 1, 0, 1]), np.arange(4.0), 2))
