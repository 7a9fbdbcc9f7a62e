"""Error rates over many simulated logs; each bound states the chance of failing with another seed if all is right."""

from dataclasses import replace

import numpy as np
import pytest

from longtrail.errors import EvaluationError
from longtrail.offpolicy.experiment import Rules, run_experiment, user_sums
from longtrail.offpolicy.intervals import bootstrap, influence
from longtrail.offpolicy.sums import UserSums
from tests.offpolicy.worlds import OneItemWorld

N, D = ("n", "d"), ("n", "d")


def pairs(name):
    return (f"{name}/a/n", f"{name}/a/d"), (f"{name}/b/n", f"{name}/b/d")


def sums_of(numerators, denominators):
    return UserSums.build(np.arange(len(numerators)), {"n": np.asarray(numerators, float), "d": np.asarray(denominators, float)})


def test_influence_interval_by_hand():
    sums = sums_of([1, 2, 3], [2, 4, 4])  # θ = .6, ψ = (N − .6 D) / (10/3) = (−.06, −.12, .18)
    interval = influence(sums, N, D, confidence=0.95).a
    half = 4.302653 * np.sqrt((0.06**2 + 0.12**2 + 0.18**2) / 6)
    assert (interval.value, interval.low, interval.high) == (pytest.approx(0.6), pytest.approx(0.6 - half), pytest.approx(0.6 + half))


def test_bootstrap_equals_a_slow_one():
    """Against a loop that resamples users one replicate at a time with another generator: ends agree within Monte Carlo error."""
    rng = np.random.default_rng(0)
    bottom = rng.integers(1, 9, 150).astype(float)
    top = rng.binomial(bottom.astype(int), 0.3).astype(float)
    interval = bootstrap(sums_of(top, bottom), N, D, confidence=0.95, replicates=6_000, seed=1).a
    rates = []
    for _ in range(6_000):
        drawn = rng.integers(150, size=150)
        rates.append(top[drawn].sum() / bottom[drawn].sum())
    low, high = np.quantile(rates, [0.025, 0.975])
    assert interval.low == pytest.approx(low, abs=0.002) and interval.high == pytest.approx(high, abs=0.002)
    assert interval.value == top.sum() / bottom.sum()


def test_policies_compared_with_themselves_differ_by_exactly_nothing():
    draw = OneItemWorld().draw(500, 50, 0)
    sums = user_sums(draw.slates, draw.a, draw.a)
    for comparison in (bootstrap(sums, *pairs("dr"), confidence=0.95, replicates=200, seed=0), influence(sums, *pairs("dr"), confidence=0.95)):
        assert (comparison.difference.low, comparison.difference.value, comparison.difference.high) == (0, 0, 0)
    verdict = run_experiment(draw.slates, draw.a, replace(draw.a, name="again"), rules=Rules(replicates=200)).verdict
    assert verdict.outcome == "equivalent" and not verdict.failed and "nothing to decide" in verdict.sentence


def test_merged_blocks_equal_the_whole_and_groups_keep_totals():
    draw = OneItemWorld().draw(900, 60, 3)
    whole = user_sums(draw.slates, draw.a, draw.b)
    columns = {name: whole[name] for name in whole.columns}
    odd = whole.users_U % 2 == 1
    parts = [UserSums.build(whole.users_U[keep], {n: v[keep] for n, v in columns.items()}) for keep in (odd, ~odd, np.ones_like(odd))]
    twice = parts[0].merge(parts[1]).merge(parts[2])
    np.testing.assert_allclose(twice.sums_UM, 2 * whole.sums_UM)
    grouped = whole.grouped(16)
    assert len(grouped.users_U) <= 16
    np.testing.assert_allclose(grouped.sums_UM.sum(axis=0), whole.sums_UM.sum(axis=0))
    with pytest.raises(EvaluationError, match="columns"):
        whole.merge(sums_of([1], [1]))


def test_groups_of_users_give_the_interval_of_users():
    """The mean width over 20 logs of 3,000 users in 512 groups is within 5 % of that over users themselves."""
    rng, ratios = np.random.default_rng(5), []
    for _ in range(20):
        sums = sums_of(rng.poisson(2.0, 3_000), rng.integers(3, 9, 3_000))
        fine, coarse = influence(sums, N, D, confidence=0.95).a, influence(sums.grouped(512), N, D, confidence=0.95).a
        ratios.append((coarse.high - coarse.low) / (fine.high - fine.low))
    assert abs(np.mean(ratios) - 1) < 0.05


def test_one_user_is_refused():
    with pytest.raises(EvaluationError, match="at least 2"):
        bootstrap(sums_of([1], [2]), N, D, confidence=0.95, replicates=10, seed=0)


def test_snips_bootstrap_is_as_wide_as_its_true_spread():
    """The published trap: at a reward mean of 0.9 a frozen denominator is over 2 times too wide; ours is within 5 % of the spread over 4,000 logs."""
    rng = np.random.default_rng(11)
    logs, rows = 4_000, 1_000
    ratio = np.array([0.25, 1.75])  # π / p of two equally likely items

    def sample(count):
        weights = ratio[rng.integers(2, size=(count, rows))]
        return weights, (rng.random((count, rows)) < 0.9).astype(float)

    weights, rewards = sample(logs)
    ideal = np.std((weights * rewards).sum(axis=1) / weights.sum(axis=1))
    widths, frozen = [], []
    for w, r in zip(*sample(40), strict=True):
        interval = bootstrap(sums_of(w * r, w), N, D, confidence=0.95, replicates=2_000, seed=0).a
        widths.append((interval.high - interval.low) / (2 * 1.96))
        frozen.append(np.std(w * r) / np.sqrt(rows))  # what resampling Σ w r over the log's own Σ w measures
    assert abs(np.mean(widths) / ideal - 1) < 0.05
    assert np.mean(frozen) / ideal > 2


def test_ignoring_users_would_be_wrong():
    """Rows of a user are alike: intervals over rows cover single rates far less often than intervals over users (150 logs)."""
    world, inside = OneItemWorld(user_sd=1.5), {"users": 0, "rows": 0}
    for seed in range(150):
        draw = world.draw(1_500, 60, seed, modelled=False)
        by_user = user_sums(draw.slates, draw.a, draw.b)
        rows = replace(draw.slates, users_N=np.arange(1_500))
        for unit, sums in (("users", by_user), ("rows", user_sums(rows, draw.a, draw.b))):
            interval = influence(sums, *pairs("snips"), confidence=0.95).a
            inside[unit] += interval.low <= world.truth["a"] <= interval.high
    assert inside["users"] / 150 > 0.9 and inside["rows"] / 150 < 0.75, inside
