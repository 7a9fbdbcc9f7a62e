"""Lists in a simulated world: the product of ratios is right in independent and in cascade worlds, and what the reward model may know."""

import numpy as np
import pytest

from longtrail.config import WorldDataset
from longtrail.datasets.world import World, simulate_requests, true_rate
from longtrail.errors import EvaluationError
from longtrail.offpolicy.bandit import bandit_requests, draw_bandit
from longtrail.offpolicy.estimators import ESTIMATORS
from longtrail.offpolicy.lists import LoggedLists, evaluate_policies
from longtrail.offpolicy.policies import conditional_probabilities, softmax
from longtrail.offpolicy.reward import CrossFittedReward, user_folds


def logged(stop, seed, users=150):
    world = World(
        WorldDataset(users=users, items=80, categories=5, requests_per_user=12, candidates=6, slate=3, click_logit=-0.5, stop_after_click=stop)
    )
    requests = simulate_requests(world, np.arange(1, users + 1), np.random.default_rng(seed))
    quality = world.quality[requests.candidates_RC]
    target = requests.scores_RC + 0.8 * quality
    lists = LoggedLists(
        users_R=requests.users_R,
        lengths_R=requests.lengths_R,
        shown_RK=requests.shown_RK,
        positions_RK=np.tile(np.arange(1, 4), (len(requests.users_R), 1)),
        rewards_RK=requests.clicks_RK.astype(float),
        propensities_RK=requests.propensities_RK,
        features_RCF=np.stack([quality, requests.scores_RC], axis=2),
    )
    slates, policies = evaluate_policies(lists, {"same": requests.scores_RC, "better": target})
    return world, requests, target, slates, policies


@pytest.mark.parametrize("stop", [0.0, 1.0])
def test_lists_are_judged_rightly_with_and_without_cascades(stop):
    """The mean over 30 logs is within 4 of its standard errors of the truth (three estimators, two worlds: once in 2,500 seeds)."""
    errors = {name: [] for name in ESTIMATORS}
    for seed in range(30):
        world, requests, target, slates, policies = logged(stop, seed)
        places = (requests.shown_RK >= 0).sum(axis=1)
        truth = true_rate(world, requests.users_R, requests.candidates_RC, requests.times_R, target, requests.lengths_R, places, draws=40, seed=seed)
        for name, estimator in ESTIMATORS.items():
            errors[name].append(estimator.terms(slates, policies["better"]).value - truth)
    for name, values in errors.items():
        assert abs(np.mean(values)) < 4 * np.std(values) / np.sqrt(len(values)) + 1e-3, name
    assert np.std(errors["dr"]) < np.std(errors["ips"])


def test_expectations_equal_a_loop_over_requests():
    _, requests, target, _slates, policies = logged(0.0, 0, users=12)
    np.testing.assert_allclose(policies["same"].weights_N, 1.0)
    pi = conditional_probabilities(target, requests.lengths_R, requests.shown_RK)
    model_sum = policies["better"].expected_N.reshape(-1, 3)
    assert ((model_sum > 0) & (model_sum < 1)).all()
    weights, row = policies["better"].weights_N, 0
    for r in range(len(requests.users_R)):
        product = 1.0
        for k in range(3):
            product *= pi[r, k, requests.shown_RK[r, k]] / requests.propensities_RK[r, k]
            assert weights[row] == pytest.approx(product)
            row += 1


def test_reward_model_never_sees_the_users_it_scores():
    """A feature that tells each user's clicks apart only by user: a model fitted on the scored users would predict them perfectly."""
    rng = np.random.default_rng(0)
    users = np.repeat(np.arange(1, 201), 5)
    clicks = rng.integers(0, 2, 200)[users - 1].astype(float)
    features = rng.normal(size=(200, 20))[users - 1]
    model = CrossFittedReward.fit(features, clicks, users)
    for fold in range(5):  # changing the labels of a fold's users leaves their own predictions alone
        inside = user_folds(users) == fold
        changed = CrossFittedReward.fit(features, np.where(inside, 1 - clicks, clicks), users)
        np.testing.assert_array_equal(changed.predict(features[inside], users[inside]), model.predict(features[inside], users[inside]))
        assert not np.allclose(changed.predict(features[~inside], users[~inside]), model.predict(features[~inside], users[~inside]))
    assert CrossFittedReward.fit(features, np.zeros(len(users)), users).predict(features, users).max() < 0.01


def test_bandit_requests_by_hand():
    users = np.array([7, 7, 8, 7, 7, 7, 9, 9])
    times = np.array([3, 1, 5, 2, 9, 4, 2, 1])
    made = bandit_requests(users, times, 2)
    assert made.rows_RC.tolist() == [[1, 3], [0, 5], [7, 6]] and made.lengths_R.tolist() == [2, 2, 2]  # one row each of 7 and 8 left over
    made = bandit_requests(users, times, 4)
    assert made.rows_RC.tolist() == [[1, 3, 0, 5], [7, 6, -1, -1]] and made.lengths_R.tolist() == [4, 2]
    with pytest.raises(EvaluationError, match="2 rated items"):
        bandit_requests(np.array([1, 2, 3]), np.array([1, 1, 1]), 5)


def test_a_user_counts_so_many_requests_and_they_are_the_first():
    rng = np.random.default_rng(0)
    users, times = rng.integers(1, 6, 200), rng.permutation(200)
    every, some = bandit_requests(users, times, 7), bandit_requests(users, times, 7, max_requests=2)
    for user in np.unique(users):
        whole = [row[row >= 0].tolist() for row in every.rows_RC if users[row[0]] == user]
        assert [row[row >= 0].tolist() for row in some.rows_RC if users[row[0]] == user] == whole[:2]


def test_bandit_estimates_are_unbiased_for_the_stated_truth():
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, 6, 60)
    real = np.arange(5) < lengths[:, None]
    labels = np.where(real, rng.integers(0, 2, (60, 5)), 0).astype(float)
    scores = {"a": rng.normal(size=(60, 5)), "b": rng.normal(size=(60, 5)) + labels}
    common = {"users_R": np.arange(60) // 3, "times_R": np.arange(60), "lengths_R": lengths, "labels_RC": labels, "logger_RC": scores["a"] / 2}
    drawn = draw_bandit(**common, features_RCF=np.stack(list(scores.values()), axis=2), scores=scores, rounds=400, seed=1)
    for name in scores:
        by_hand = np.mean([(softmax(scores[name][[r]], lengths[[r]])[0] * labels[r]).sum() for r in range(60)])
        assert drawn.truth[name] == pytest.approx(by_hand)
        for estimator in ESTIMATORS.values():  # 24,000 rows: the standard error is about .006
            assert estimator.terms(drawn.slates, drawn.policies[name]).value == pytest.approx(by_hand, abs=0.03)
