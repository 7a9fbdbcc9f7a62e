"""Live tests: against closed forms and scipy, and over simulated tests that somebody looks at every day."""

import numpy as np
import pytest
from scipy.stats import chisquare

from longtrail.errors import EvaluationError
from longtrail.offpolicy.online import (
    ArmUsers,
    LiveLog,
    arm_checks,
    compare_arms,
    compare_fallbacks,
    fallback_check,
    monitor,
    sample_ratio,
)

DAY = 86_400_000_000


def people(users: int, seed: int, lift: float = 0.0, loyalty: float = 0.9) -> ArmUsers:
    """Users with a lasting click rate each, which their past shows too; `lift` is what B adds to everybody's rate."""
    rng = np.random.default_rng(seed)
    treated = rng.random(users) < 0.5
    lasting = np.clip(rng.beta(2, 8, users) * loyalty + 0.2 * (1 - loyalty), 0, 0.9)
    before, during = rng.integers(20, 60, users), rng.integers(10, 30, users)
    clicks = rng.binomial(during, np.clip(lasting + lift * treated, 0, 1)).astype(float)
    past = np.stack([rng.binomial(before, lasting), before], axis=1).astype(float)
    return ArmUsers(treated_U=treated, clicks_U=clicks, impressions_U=during.astype(float), before_UK=past)


def test_plain_comparison_by_hand() -> None:
    """A: 1 of 2, 1 of 4, 0 of 2; B: 2 of 2, 1 of 2. Rates 2/8 and 3/4; errors of ratios as sums of squares over users."""
    users = ArmUsers(
        treated_U=np.array([False, False, False, True, True]),
        clicks_U=np.array([1.0, 1, 0, 2, 1]),
        impressions_U=np.array([2.0, 4, 2, 2, 2]),
        before_UK=np.zeros((5, 0)),
    )
    found = compare_arms(users, confidence=0.95)
    assert (found.plain.a.value, found.plain.b.value, found.plain.difference.value) == (0.25, 0.75, 0.5)
    squares = (0.5**2 + 0 + 0.5**2) / 8**2 + (0.5**2 + 0.5**2) / 4**2
    assert found.plain.error == pytest.approx(np.sqrt(squares * 5 / 4)) and found.saved == 0 and found.adjusted == found.plain
    with pytest.raises(EvaluationError, match="arm B has 0"):
        compare_arms(ArmUsers(**{**vars(users), "treated_U": np.zeros(5, bool)}), confidence=0.95)


def test_the_past_takes_variance_away_and_no_truth() -> None:
    """400 tests with a lift of 2 points: both estimates are right on average, the adjusted one with a third less variance, and its interval covers
    in 92 to 98 % (left once in 300 seeds at 95 %)."""
    plain, adjusted, covered, saved = [], [], 0, []
    for seed in range(400):
        found = compare_arms(people(600, seed, lift=0.02), confidence=0.95)
        plain.append(found.plain.difference.value)
        adjusted.append(found.adjusted.difference.value)
        covered += found.adjusted.difference.low <= 0.02 <= found.adjusted.difference.high
        saved.append(found.saved)
    assert np.mean(plain) == pytest.approx(0.02, abs=0.002) and np.mean(adjusted) == pytest.approx(0.02, abs=0.002)
    assert np.var(adjusted) < 0.67 * np.var(plain) and 0.92 <= covered / 400 <= 0.98
    assert np.mean(saved) == pytest.approx(1 - np.var(adjusted) / np.var(plain), abs=0.12)


def test_sample_ratio_is_scipys() -> None:
    for counts, shares in (((500, 520), (0.5, 0.5)), ((900, 110), (0.9, 0.1)), ((50_000, 51_000), (0.5, 0.5))):
        expected = np.array(shares) * sum(counts)
        assert sample_ratio(counts, shares) == pytest.approx(chisquare(counts, expected).pvalue)


def test_a_lost_arm_or_crossing_users_are_not_trusted() -> None:
    comparison = compare_arms(people(2_000, 0), confidence=0.95).adjusted
    states = {c.name: c.state for c in arm_checks((1_000, 1_010), 0, comparison)}
    assert set(states.values()) == {"pass"}
    assert {c.name: c.state for c in arm_checks((1_000, 1_200), 0, comparison)}["sample ratio"] == "fail"
    assert {c.name: c.state for c in arm_checks((1_000, 1_010), 60, comparison)}["users in one arm"] == "fail"


def live(users: int, days: int, seed: int, lift: float = 0.0) -> LiveLog:
    """Users come and come back; half of them have a past."""
    rng = np.random.default_rng(seed)
    rate = rng.beta(2, 6, users)
    treated = rng.random(users) < 0.5
    count = rng.poisson(1.0 * days, users)
    user = np.repeat(np.arange(users), count)
    clicks = (rng.random(len(user)) < np.clip(rate + lift * treated, 0, 1)[user]).astype(float)
    past = np.repeat(np.arange(users // 2), 10)
    return LiveLog(
        users_N=user,
        times_N=rng.integers(0, days * DAY, len(user)),
        treated_N=treated[user],
        clicks_N=clicks,
        before_users_M=past,
        before_clicks_M=(rng.random(len(past)) < rate[past]).astype(float),
    )


def test_looking_every_day_at_a_live_test_is_allowed() -> None:
    """150 tests without a difference, 10 days: the any-time interval ever leaves 0 out in at most 5 % (true: about 1 %); a real lift is found."""
    ever = sum(any(d["running"]["low"] > 0 or d["running"]["high"] < 0 for d in monitor(live(400, 10, seed), confidence=0.95)) for seed in range(150))
    assert ever / 150 <= 0.05
    last = monitor(live(1_500, 10, 1, lift=0.08), confidence=0.95)[-1]
    assert last["running"]["low"] > 0 and last["until"] == "1970-01-10"


def test_a_user_belongs_to_the_arm_seen_first() -> None:
    log = LiveLog(
        users_N=np.array([5, 5, 6, 7, 7]),
        times_N=np.array([9, 3, 4, 1, 2]),
        treated_N=np.array([False, True, False, True, True]),
        clicks_N=np.array([1.0, 1, 0, 0, 1]),
        before_users_M=np.array([6, 6, 99]),
        before_clicks_M=np.array([1.0, 0, 1]),
    )
    users, crossed = log.until(10)
    assert crossed == 1 and users.treated_U.tolist() == [True, False, True] and users.clicks_U.tolist() == [2, 0, 1]
    assert users.before_UK.tolist() == [[0, 0, 0], [1, 2, 1], [0, 0, 0]] and log.until(3)[0].treated_U.tolist() == [True]


def failing(seed: int, fails: float) -> LiveLog:
    """A's lists get 30 % clicks, B's own 32 %; but B fails for a share of requests, and what is shown then gets 12 %."""
    rng = np.random.default_rng(seed)
    users, rows = 1_000, 20_000
    user, treated = rng.integers(0, users, rows), rng.random(users) < 0.5
    fallback = treated[user] & (rng.random(rows) < fails)
    rate = np.where(fallback, 0.12, np.where(treated[user], 0.32, 0.30))
    return LiveLog(
        users_N=user,
        times_N=rng.integers(0, DAY, rows),
        treated_N=treated[user],
        clicks_N=(rng.random(rows) < rate).astype(float),
        before_users_M=np.zeros(0, np.int64),
        before_clicks_M=np.zeros(0),
        fallback_N=fallback,
    )


def test_an_arm_answers_for_the_requests_that_it_fails() -> None:
    """It fails for 20 %: 0.8 · 32 + 0.2 · 12 = 28 %, which loses; its own lists alone would have won."""
    log = failing(0, 0.2)
    assert log.fallback_N is not None
    found = compare_arms(log.until(DAY)[0], confidence=0.95).plain.difference
    assert found.low <= 0.28 - 0.30 <= found.high < 0
    kept = ~log.fallback_N
    chosen = LiveLog(
        **{**vars(log), "fallback_N": None} | {name: getattr(log, name)[kept] for name in ("users_N", "times_N", "treated_N", "clicks_N")}
    )
    assert compare_arms(chosen.until(DAY)[0], confidence=0.95).plain.difference.low > 0, "what leaving them out would say"
    shares = compare_fallbacks(log, confidence=0.95)
    assert shares is not None and shares.shares.a.value == 0 and shares.shares.b.low <= 0.2 <= shares.shares.b.high
    assert shares.own_rates == pytest.approx((0.30, 0.32), abs=0.012)
    check = fallback_check(shares)
    assert check.state == "warn" and check.value == pytest.approx(0.2, abs=0.02) and "0.00% of what A's users saw" in check.explanation


def test_fallbacks_that_are_alike_or_not_logged_warn_of_nothing() -> None:
    none = failing(0, 0.0)
    assert fallback_check(compare_fallbacks(none, confidence=0.95)).state == "pass"
    rng = np.random.default_rng(5)
    alike = LiveLog(**{**vars(none), "fallback_N": rng.random(len(none.users_N)) < 0.1})
    assert fallback_check(compare_fallbacks(alike, confidence=0.95)).state == "pass"
    unsaid = fallback_check(compare_fallbacks(LiveLog(**{**vars(none), "fallback_N": None}), confidence=0.95))
    assert unsaid.state == "unknown" and not unsaid.failed and "does not say" in unsaid.explanation
    always = LiveLog(**{**vars(none), "fallback_N": none.treated_N})
    found = compare_fallbacks(always, confidence=0.95)
    assert found is not None and np.isnan(found.own_rates[1]) and fallback_check(found).state == "warn"
