"""Frozen figures of an independent implementation: ZOZO's package obp 0.4.1 on the two logs of `obp_log.py`.

Made on 2026-11-22 (Python 3.11, numpy 2.4.6): the wheel unpacked beside the project, `seaborn` replaced by an empty module as only its plots need
it, and `estimate_policy_value` of InverseProbabilityWeighting, SelfNormalizedInverseProbabilityWeighting, DirectMethod, DoublyRobust,
SelfNormalizedDoublyRobust, SwitchDoublyRobust(tau=2), DoublyRobustWithShrinkage(lambda_=4) called with action_dist = pi[:, :, None], pscore =
p[rows, action], estimated_rewards_by_reg_model = q[:, :, None]; ReplayMethod with the most probable action of each row as action_dist. Lists:
SlateStandardIPS with the products over each list, SlateRewardInteractionIPS with those down to each place, SlateIndependentIPS with the columns
themselves; obp sums over a list, so its figures are divided by 3 places. Intervals: estimate_interval(alpha=.05, n_bootstrap_samples=20000,
random_state=1) of InverseProbabilityWeighting and DoublyRobust.
"""

import numpy as np
import pytest

from longtrail.offpolicy.columns import EVERY
from longtrail.offpolicy.intervals import bootstrap
from longtrail.offpolicy.slates import EvaluatedPolicy, LoggedSlates
from longtrail.offpolicy.sums import UserSums
from longtrail.schema import Propensity
from tests.offpolicy.obp_log import list_log, one_item_log

OBP = {
    "ips": 0.41815799407783494,
    "snips": 0.4323570486748159,
    "dm": 0.5006927091497417,
    "dr": 0.44653218933980476,
    "sndr": 0.44469310414073276,
    "replay": 0.3928571428571429,
}
OBP_AT_2 = {"switch_dr": 0.4794041140340342, "shrinkage_dr": 0.472809664993612}
OBP_LISTS = {"slate_ips": 0.36548728721257645, "ips": 0.3606746990786726, "item_position": 0.33896309871518104}
OBP_INTERVALS = {"ips": (0.3613459619985332, 0.47929079466481406), "dr": (0.37940733478360333, 0.5099206248238397)}


def one_item():
    log = one_item_log()
    rows = np.arange(len(log["reward"]))
    slates = LoggedSlates.build(
        requests=rows,
        users=rows,
        positions=np.ones(len(rows)),
        rewards=log["reward"],
        propensities=log["p"][rows, log["action"]],
        predicted=log["q"][rows, log["action"]],
    )
    policy = EvaluatedPolicy.build("pi", slates, log["pi"][rows, log["action"]], expected=(log["pi"] * log["q"]).sum(axis=1))
    greedy = EvaluatedPolicy.build("greedy", slates, (log["pi"].argmax(axis=1) == log["action"]).astype(float))
    return slates, policy, greedy


def test_single_items():
    slates, policy, greedy = one_item()
    for name in ("ips", "snips", "dm", "dr", "sndr"):
        assert EVERY[name].terms(slates, policy).value == pytest.approx(OBP[name], rel=1e-12), name
    accepted = EVERY["replay"].columns(slates, greedy)  # obp does not ask whether the log is uniform
    assert accepted["n"].sum() / accepted["d"].sum() == pytest.approx(OBP["replay"], rel=1e-12)


@pytest.mark.parametrize("name", ["switch_dr", "shrinkage_dr"])
def test_shrunken_weights(name):
    """At the same parameter; obp's lambda is our size squared."""
    slates, policy, _ = one_item()
    column = f"n{EVERY[name].sizes.index(2.0)}"
    assert EVERY[name].columns(slates, policy)[column].mean() == pytest.approx(OBP_AT_2[name], rel=1e-12)


def test_lists():
    log = list_log()
    requests, places = log["reward"].shape
    columns = {
        "requests": np.repeat(np.arange(requests), places),
        "users": np.repeat(np.arange(requests), places),
        "positions": np.tile(np.arange(1, places + 1), requests),
        "rewards": log["reward"].ravel(),
        "propensities": log["p"].ravel(),
    }
    conditional, marginal = (LoggedSlates.build(**columns, kind=kind) for kind in (Propensity.CONDITIONAL, Propensity.MARGINAL))
    for name, slates in (("slate_ips", conditional), ("ips", conditional), ("item_position", marginal)):
        policy = EvaluatedPolicy.build("pi", slates, log["pi"].ravel())
        assert EVERY[name].terms(slates, policy).value == pytest.approx(OBP_LISTS[name], rel=1e-12), name


@pytest.mark.parametrize("name", ["ips", "dr"])
def test_bootstrap(name):
    """Of estimators that divide by the rows: ends within 5 % of the interval's width. (obp resamples SNIPS with a frozen denominator: no measure.)"""
    slates, policy, _ = one_item()
    terms = EVERY[name].terms(slates, policy)
    sums = UserSums.build(slates.users_N, {"n": terms.numerators_N, "d": terms.denominators_N})
    interval = bootstrap(sums, ("n", "d"), ("n", "d"), confidence=0.95, replicates=20_000, seed=0).a
    low, high = OBP_INTERVALS[name]
    assert interval.low == pytest.approx(low, abs=0.05 * (high - low)) and interval.high == pytest.approx(high, abs=0.05 * (high - low))
