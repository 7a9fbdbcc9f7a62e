import itertools

import numpy as np
import pytest

from longtrail.errors import EvaluationError
from longtrail.offpolicy.policies import (
    EpsilonGreedy,
    PlackettLuce,
    best_first,
    conditional_probabilities,
    marginal_probabilities,
    plackett_luce_propensities,
    sample_plackett_luce,
    softmax,
    standardise,
)


def slow_propensities(scores, shown):
    """One list at a time, straight from the definition."""
    left, out = list(range(len(scores))), []
    for column in shown:
        weights = np.exp(np.asarray([scores[c] for c in left], dtype=np.longdouble) - max(scores[c] for c in left))
        out.append(float(weights[left.index(column)] / weights.sum()))
        left.remove(column)
    return out


@pytest.mark.parametrize("spread", [0.0, 1.0, 30.0, 2000.0])
def test_propensities_and_conditionals_equal_the_definition(spread):
    rng = np.random.default_rng(0)
    C, K, R = 7, 5, 60
    lengths = rng.integers(0, C + 1, R)
    lengths[:4] = [0, 1, K, C]
    scores = spread * rng.normal(size=(R, C))
    scores[np.arange(C) >= lengths[:, None]] = np.nan  # padding may hold anything
    shown, propensities = sample_plackett_luce(scores, lengths, K, rng)
    conditional = conditional_probabilities(scores, lengths, shown)
    for r in range(R):
        places = min(K, lengths[r])
        assert (shown[r, places:] == -1).all() and (propensities[r, places:] == 1).all() and (conditional[r, places:] == 0).all()
        assert sorted(set(shown[r, :places])) == sorted(shown[r, :places])
        expected = slow_propensities(scores[r, : lengths[r]], shown[r, :places])
        np.testing.assert_allclose(propensities[r, :places], expected, rtol=1e-9, atol=1e-300)
        for k in range(places):
            assert conditional[r, k].sum() == pytest.approx(1.0)
            assert conditional[r, k, shown[r, k]] == pytest.approx(expected[k], rel=1e-9, abs=1e-300)
            assert (conditional[r, k, shown[r, :k]] == 0).all() and (conditional[r, k, lengths[r] :] == 0).all()
            if spread == 0.0:
                assert expected[k] == pytest.approx(1 / (lengths[r] - k))


def test_orderings_of_a_set_have_total_probability_one():
    scores = np.array([[0.3, -1.2, 2.0, 0.0]])
    orders = np.array(list(itertools.permutations(range(4), 2)))
    p = plackett_luce_propensities(np.repeat(scores, len(orders), 0), np.full(len(orders), 4), orders).prod(axis=1)
    assert p.sum() == pytest.approx(1.0)


def test_sampling_has_the_stated_probabilities():
    scores, draws = np.array([[1.0, 0.0, -0.5, 0.2]]), 40_000
    shown, _ = sample_plackett_luce(np.repeat(scores, draws, 0), np.full(draws, 4), 2, np.random.default_rng(1))
    for order in itertools.permutations(range(4), 2):
        p = plackett_luce_propensities(scores, np.array([4]), np.array([order])).prod()
        seen = (shown == order).all(axis=1).mean()
        assert abs(seen - p) < 4 * np.sqrt(p * (1 - p) / draws)  # 12 tests at 4 sigma: fails by chance once in 1,300 seeds


def test_softmax_is_the_first_place_of_a_list():
    rng = np.random.default_rng(2)
    scores, lengths = rng.normal(size=(20, 5)), rng.integers(1, 6, 20)
    shown, propensities = sample_plackett_luce(scores, lengths, 1, rng)
    np.testing.assert_allclose(np.take_along_axis(softmax(scores, lengths), shown, axis=1), propensities)
    assert (softmax(scores, np.zeros(20, int)) == 0).all()


def test_standardise_and_best_first():
    scores, lengths = np.array([[1.0, 3.0, 99.0], [2.0, 2.0, 2.0]]), np.array([2, 3])
    np.testing.assert_allclose(standardise(scores, lengths), [[-1, 1, 0], [0, 0, 0]])
    assert best_first(scores, lengths, 3).tolist() == [[1, 0, -1], [0, 1, 2]]
    with pytest.raises(EvaluationError, match="request 1"):
        standardise(np.array([[1.0, 2.0], [np.nan, 1.0]]), np.array([2, 2]))


@pytest.mark.parametrize("shown", [[[0, 0]], [[0, 2]], [[1, 3]]])
def test_impossible_lists_are_refused(shown):
    with pytest.raises(EvaluationError, match="request 0"):
        plackett_luce_propensities(np.zeros((1, 3)), np.array([2]), np.array(shown))


def slow_greedy(scores, shown, epsilon):
    """Epsilon-greedy, one list at a time, from the definition."""
    left, out = list(range(len(scores))), []
    for column in shown:
        best = max(left, key=lambda c: (scores[c], -c))
        out.append(epsilon / len(left) + (1 - epsilon) * (column == best))
        left.remove(column)
    return out


@pytest.mark.parametrize("epsilon", [0.0, 0.3, 1.0])
def test_epsilon_greedy_equals_the_definition(epsilon):
    rng = np.random.default_rng(0)
    C, K, R = 6, 4, 80
    lengths = rng.integers(0, C + 1, R)
    lengths[:3] = [0, 1, C]
    scores = np.round(rng.normal(size=(R, C)), 1)  # with ties
    scores[np.arange(C) >= lengths[:, None]] = np.nan
    policy = EpsilonGreedy(epsilon)
    shown, propensities = policy.draw(scores, lengths, K, rng)
    any_list, _ = sample_plackett_luce(np.zeros((R, C)), lengths, K, rng)  # lists that the policy would not draw by itself
    for lists in (shown, any_list):
        conditional = policy.probabilities(scores, lengths, lists)
        for r in range(R):
            places = min(K, lengths[r])
            expected = slow_greedy(scores[r, : lengths[r]], lists[r, :places], epsilon)
            np.testing.assert_allclose(conditional[r, np.arange(places), lists[r, :places]], expected, atol=1e-12)
            np.testing.assert_allclose(conditional[r, :places].sum(axis=1), 1.0)
            assert not conditional[r, places:].any() and (lists[r, places:] == -1).all()
            if lists is shown:
                np.testing.assert_allclose(propensities[r, :places], expected, atol=1e-12)
    if epsilon == 0:
        np.testing.assert_array_equal(shown, best_first(scores, lengths, K))
    assert (policy.warning is not None) == (epsilon == 0) and PlackettLuce().warning is None


def test_draws_follow_the_propensities():
    """30,000 draws of one request: each list's share is the product of its propensities, within 4 standard errors."""
    scores, lengths = np.tile([0.3, 1.0, -0.5, 0.0], (30_000, 1)), np.full(30_000, 4)
    for policy in (PlackettLuce(0.7), EpsilonGreedy(0.4)):
        shown, propensities = policy.draw(scores, lengths, 2, np.random.default_rng(1))
        code, chance = shown[:, 0] * 4 + shown[:, 1], propensities.prod(axis=1)
        for value in np.unique(code):
            p = chance[code == value][0]
            assert (chance[code == value] == p).all() and abs((code == value).mean() - p) < 4 * np.sqrt(p * (1 - p) / 30_000)


@pytest.mark.parametrize("policy", [PlackettLuce(0.8), EpsilonGreedy(0.3)])
def test_marginal_probabilities_equal_going_through_every_list(policy):
    scores = np.array([0.5, -0.2, 1.1, 0.0])
    lists = np.array(list(itertools.permutations(range(4), 3)))
    rows = np.tile(scores, (len(lists), 1))
    conditional = policy.probabilities(rows, np.full(len(lists), 4), lists)
    chance = np.take_along_axis(conditional, lists[:, :, None], axis=2)[:, :, 0].prod(axis=1)
    exact = np.stack([np.bincount(lists[:, k], weights=chance, minlength=4) for k in range(3)])
    many = 400
    drawn = marginal_probabilities(policy, np.tile(scores, (many, 1)), np.full(many, 4), 3, draws=40, rng=np.random.default_rng(0))
    np.testing.assert_allclose(drawn.mean(axis=0), exact, atol=0.012)  # 16,000 draws: the standard error is below .003
    np.testing.assert_allclose(drawn[:, 0], np.tile(exact[0], (many, 1)), atol=1e-12)
    np.testing.assert_allclose(drawn.sum(axis=2), 1.0)
