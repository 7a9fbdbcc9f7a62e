"""Multiplicity, power, any-time intervals, segments and time: each against a closed form, scipy or a slow loop."""

from itertools import pairwise

import numpy as np
import pytest
from scipy.stats import false_discovery_control, norm

from longtrail.errors import EvaluationError
from longtrail.offpolicy.anytime import betting, empirical_bernstein, mixture_quantile
from longtrail.offpolicy.intervals import freedom
from longtrail.offpolicy.multiplicity import adjust, shared_confidence
from longtrail.offpolicy.power import power_analysis
from longtrail.offpolicy.segments import compare_segments, cuts
from longtrail.offpolicy.sums import UserSums
from longtrail.offpolicy.timeline import drift, over_time, spans

# ---------------------------------------------------------------- multiplicity


def test_holm_by_hand() -> None:
    np.testing.assert_allclose(adjust(np.array([0.01, 0.04, 0.03, 0.005])), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(adjust(np.array([0.6, np.nan, 0.7])), [1.0, np.nan, 1.0])
    assert adjust(np.zeros(0)).size == 0


@pytest.mark.parametrize(("method", "theirs"), [("bh", "bh"), ("by", "by")])
def test_false_discovery_rates_are_scipys(method: str, theirs: str) -> None:
    rng = np.random.default_rng(0)
    for count in (1, 2, 7, 40):
        p = rng.random(count) ** 3
        np.testing.assert_allclose(adjust(p, method), false_discovery_control(p, method=theirs))  # type: ignore[arg-type]


def test_holm_keeps_the_chance_of_any_false_finding() -> None:
    """2,000 times 20 true null hypotheses, all positively dependent: any rejected in at most 5 % (6.5 % is passed once in 1,000 seeds)."""
    rng = np.random.default_rng(1)
    z = np.sqrt(0.5) * rng.normal(size=(2_000, 20)) + np.sqrt(0.5) * rng.normal(size=(2_000, 1))
    p = 2 * norm.sf(np.abs(z))
    assert np.mean([adjust(row).min() < 0.05 for row in p]) < 0.065 < np.mean((p < 0.05).any(axis=1))
    assert shared_confidence(0.95, 10) == pytest.approx(0.995)


# ---------------------------------------------------------------- power


def test_power_is_what_it_says() -> None:
    """At the detectable difference, a two-sided test at 95 % finds it in 80 %; with factor times as many users the margin is found so too."""
    found = power_analysis(difference=0.01, error=0.02, rate_a=0.1, users=400, margin=0.005, confidence=0.95)
    assert norm.sf(1.959964 - found.detectable / 0.02) == pytest.approx(0.8, abs=1e-4)
    assert found.detectable_relative == pytest.approx(found.detectable / 0.1)
    shrunk = 0.02 / np.sqrt(found.factor_for_margin)
    both = norm.cdf(0.005 / shrunk - 1.959964) - norm.cdf(-0.005 / shrunk + 1.959964)  # both limits within the margin, were there no difference
    assert both == pytest.approx(0.8, abs=1e-4) and norm.sf(1.959964 - 0.005 / shrunk) >= 0.8
    assert found.users_for_margin == int(np.ceil(found.factor_for_margin * 400)) and found.factor_for_observed == pytest.approx(31.4, abs=0.1)
    nothing = power_analysis(difference=0.0, error=0.0, rate_a=0.1, users=10, margin=0.01, confidence=0.95)
    assert nothing.detectable is None and nothing.factor_for_margin is None


def test_freedom_of_equal_and_of_lonely_users() -> None:
    assert freedom(np.ones(50)) == 49
    lonely = np.zeros(1_000)
    lonely[:3] = 1
    assert freedom(lonely) == pytest.approx(2 * 1_000 / (1_000 / 3 - 1))
    normal = np.random.default_rng(0).normal(size=2_000)
    assert freedom(normal) > 1_500


# ---------------------------------------------------------------- any-time


def test_the_mixture_boundary_is_robbins() -> None:
    """At every sum of variance t the boundary solves: mixed likelihood ratio = 1 / α, for a normal mixture of variance 1 / ρ over the mean."""
    for rows in (500.0, 10_000.0, 1e6):
        z, rho = mixture_quantile(rows, 0.95), 10_000 / (2 * np.log(20) + np.log(1 + 2 * np.log(20)))
        total = z * np.sqrt(rows)
        assert np.sqrt(rho / (rows + rho)) * np.exp(total**2 / (2 * (rows + rho))) == pytest.approx(20)
    quantiles = [mixture_quantile(rows, 0.95) for rows in (1e3, 1e4, 1e5, 1e7)]
    assert 2.9 < quantiles[1] < 3.1 and all(later > 1.96 for later in quantiles)


def test_betting_and_bernstein_hold_where_the_normal_interval_does_not() -> None:
    """400 samples of 60 users with rare, heavy totals: betting holds the true ratio of the clipped totals in at least 95 % less chance (92 %)."""
    rng, inside, normal_inside, bernstein_inside = np.random.default_rng(3), 0, 0, 0
    for _ in range(400):
        rows = rng.integers(1, 6, 300).astype(float)
        clicks = rng.binomial(rows.astype(int), 0.03).astype(float)
        found = betting(clicks, rows, confidence=0.95)
        inside += found.interval.low <= 0.03 <= found.interval.high
        bernstein = empirical_bernstein(clicks, rows, bound=5.0, confidence=0.95)
        bernstein_inside += bernstein.low <= 0.03 <= bernstein.high
        rate = clicks.sum() / rows.sum()
        half = 1.96 * np.sqrt(((clicks - rate * rows) ** 2).sum()) / rows.sum()
        normal_inside += rate - half <= 0.03 <= rate + half
    assert inside >= 0.95 * 400 and bernstein_inside >= 0.97 * 400 and normal_inside < 0.945 * 400, (inside, bernstein_inside, normal_inside)


def test_betting_narrows_with_users_and_finds_a_difference() -> None:
    rng = np.random.default_rng(4)
    widths = []
    for users in (200, 2_000, 20_000):
        gap = rng.normal(0.2, 1.0, users)
        found = betting(gap, np.ones(users), confidence=0.95)
        assert found.interval.low < found.interval.value < found.interval.high
        widths.append(found.interval.high - found.interval.low)
    assert found.interval.low > 0.1 and all(later < 0.6 * earlier for earlier, later in pairwise(widths))
    nothing = betting(np.zeros(100), np.ones(100), confidence=0.95)
    assert nothing.interval.low < 0 < nothing.interval.high
    with pytest.raises(EvaluationError, match="at least 20"):
        betting(np.ones(5), np.ones(5), confidence=0.95)


# ---------------------------------------------------------------- segments and time


def test_cuts_by_hand() -> None:
    found = {kind: [labels[place] for place in places] for kind, labels, places in cuts("history_length", np.array([0, 1, 9, 10, 5_000]))}
    assert found == {"history length": ["0", "1–9", "1–9", "10–49", "1000+"], "user": ["new", "known", "known", "known", "known"]}
    day = 86_400_000_000
    [(kind, labels, places)] = cuts("time", np.array([3 * day, day, 3 * day + 5]))
    assert (kind, labels, places.tolist()) == ("day", ["1970-01-02", "1970-01-04"], [1, 0, 1])
    [(_, labels, places)] = cuts("time", np.array([0, 3_600_000_000]), hours=True)
    assert labels == ["1970-01-01T00", "1970-01-01T01"] and places.tolist() == [0, 1]
    [(kind, labels, places)] = cuts("page_kind", np.array(["x", None, "x"], dtype=object))
    assert (kind, [labels[p] for p in places]) == ("page kind", ["x", "unknown", "x"])
    with pytest.raises(EvaluationError, match="at most"):
        list(cuts("page", np.arange(2_000)))


def sums(users: int, rate: float, seed: int, gap: float = 0.0) -> UserSums:
    """A's numerators in "snips/a/n", B's in "snips/b/n", weights 1."""
    rng = np.random.default_rng(seed)
    rows = rng.integers(1, 9, users).astype(float)
    a, b = (rng.binomial(rows.astype(int), share).astype(float) for share in (rate, rate + gap))
    columns = {"naive/n": a, "snips/a/n": a, "snips/b/n": b, "weight/a": rows, "weight/b": rows, "rows": rows}
    return UserSums.build(np.arange(users), columns)


def test_segments_find_the_one_that_differs_and_no_other() -> None:
    segments = {"page": {f"{i}": sums(400, 0.2, i, gap=0.1 if i == 3 else 0.0) for i in range(8)}, "day": {"d": sums(50, 0.2, 9)}}
    segments["page"]["tiny"] = sums(4, 0.2, 10)
    found = compare_segments(segments, "snips", confidence=0.95)
    assert [s.label for s in found if s.finding == "better"] == ["3"] and not [s for s in found if s.finding == "worse"]
    assert {s.label: s.finding for s in found}["tiny"] == "too little data" and "d" not in {s.label for s in found}
    plain = sums(400, 0.2, 3, gap=0.1)
    expected = plain["snips/b/n"].sum() / plain["rows"].sum() - plain["snips/a/n"].sum() / plain["rows"].sum()
    assert {s.label: s.comparison.difference.value for s in found}["3"] == pytest.approx(expected)


def test_spans_hold_about_equally_many_rows_and_lose_none() -> None:
    days = {f"2024-01-{day:02d}": sums(20 + 5 * day, 0.2, day) for day in range(1, 31)}
    made = spans(days)
    total = sum(float(of_day["rows"].sum()) for of_day in days.values())
    rows = [float(of_span["rows"].sum()) for _, of_span in made]
    assert len(made) <= 12 and sum(rows) == total and max(rows) < 2 * total / len(made) and made[-1][0] == "2024-01-30"
    assert spans({}) == [] and len(spans(dict(list(days.items())[:3]))) == 3


def test_over_time_ends_where_the_whole_is() -> None:
    days = {f"2024-01-{day:02d}": sums(100, 0.2, day, gap=0.05) for day in range(1, 8)}
    series = over_time(days, "snips", confidence=0.95)
    merged = [of_day for of_day in days.values()]
    gap = sum(float((m["snips/b/n"] - m["snips/a/n"]).sum()) for m in merged) / sum(float(m["rows"].sum()) for m in merged)
    assert series["running"][-1]["value"] == pytest.approx(gap) and series["running"][-1]["low"] < gap < series["running"][-1]["high"]
    first = days["2024-01-01"]
    assert series["a"][0] == pytest.approx(first["snips/a/n"].sum() / first["rows"].sum()) and len(series["until"]) == 7


def test_drift_is_found_and_its_size_is_right() -> None:
    """Rates that swing with a standard deviation of a fifth of their mean; and ones that do not."""
    rng = np.random.default_rng(0)
    swing = rng.normal(size=30)
    swing = 0.04 * swing / swing.std()
    moving = drift({f"2024-01-{day + 1:02d}": sums(400, 0.2 + swing[day], day) for day in range(12)})
    still = drift({f"2024-01-{day + 1:02d}": sums(400, 0.2, day) for day in range(12)})
    assert moving is not None and still is not None
    assert moving.p_value < 1e-6 and moving.spread == pytest.approx(swing[:12].std(ddof=1) / 0.2, rel=0.35)
    assert still.p_value > 0.001 and still.spread < 0.06
    assert drift({"2024-01-01": sums(100, 0.2, 0)}) is None and drift({}) is None
