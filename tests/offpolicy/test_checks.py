"""Each trust check on a log that is sound and on one that has just that fault."""

from dataclasses import replace

import numpy as np
import pytest

from longtrail.offpolicy.calibration import GROUPS, calibration_sums, group_shares
from longtrail.offpolicy.columns import user_columns
from longtrail.offpolicy.evidence import Evidence, LogHealth, gather, repeated_requests
from longtrail.offpolicy.experiment import Rules, judge, run_experiment
from longtrail.offpolicy.policies import plackett_luce_propensities, sample_plackett_luce, softmax
from longtrail.offpolicy.slates import EvaluatedPolicy, LoggedSlates
from tests.offpolicy.worlds import OneItemWorld

RULES = Rules(replicates=100)
DAY = 86_400_000_000


def states(evidence: Evidence) -> dict[str, str]:
    """The worst state of each check."""
    order = ["pass", "unknown", "warn", "fail"]
    found: dict[str, str] = {}
    for check in judge(evidence, RULES).checks:
        found[check.name] = max(found.get(check.name, "pass"), check.state, key=order.index)
    return found


def gathered(seed: int = 0, rows: int = 3_000, **context: object) -> Evidence:
    draw = OneItemWorld().draw(rows, 300, seed)
    times = np.random.default_rng(seed).integers(0, 10 * DAY, rows)
    known = {"time": times, "item": np.arange(rows), "history_length": np.arange(rows) % 30, **context}
    columns = user_columns(draw.slates, draw.a, draw.b)
    return gather(draw.slates, draw.a, draw.b, columns=columns, context=known, health=LogHealth(repeated_rows=0, stray_clicks=0, clicks=900))


def test_a_sound_log_fails_nothing() -> None:
    for seed in range(5):
        found = states(gathered(seed))
        assert "fail" not in found.values(), found
        assert found["propensity calibration"] == "unknown"  # no candidates were given


# ---------------------------------------------------------------- calibration


def lists(real: float, logged: float, seed: int, requests: int = 4_000, places: int = 2) -> tuple[dict, float]:
    """Candidates drawn with `real` times the scores and logged as if with `logged` times; policy A is nearly the logger."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(4, 9, requests)
    scores = rng.normal(size=(requests, 8))
    shown, _ = sample_plackett_luce(real * scores, lengths, places, rng)
    written = plackett_luce_propensities(logged * scores, lengths, shown)
    a, b = 0.95 * logged * scores, rng.normal(size=(requests, 8))
    weights = softmax(a, lengths)[np.arange(requests), shown[:, 0]] / written[:, 0]
    users = rng.integers(0, 400, requests)
    return {"users_R": users, "lengths_R": lengths, "shown_RK": shown, "propensities_RK": written, "scores": {"a": a, "b": b}}, float(weights.mean())


def test_calibration_passes_honest_propensities() -> None:
    """50 honest logs, intervals that hold together with 99.9 %: at most one leaves 1 out (twice or more once in 800 seeds)."""
    out = sum(any(not s.low <= 1 <= s.high for s in group_shares(calibration_sums(**lists(1.0, 1.0, seed, 1_000)[0]))) for seed in range(50))
    assert out <= 1


def test_calibration_finds_what_the_mean_weight_hides() -> None:
    """A logger 0.6 times as sharp as it says: weights average 1 within 3 %, but what is liked weighs too little and what is not too much."""
    log, mean = lists(0.6, 1.0, 0)
    shares = group_shares(calibration_sums(**log))
    assert abs(mean - 1) < 0.03
    by_a = {share.group: share for share in shares if share.policy == "a"}
    assert by_a["less liked"].low > 1.05 and by_a["most liked"].high < 0.95 and sum(not s.low <= 1 <= s.high for s in shares) >= 3


def test_calibration_equals_a_slow_sum() -> None:
    log, _ = lists(1.0, 1.0, 3, requests=40)
    sums = calibration_sums(**log)
    for name, scores in log["scores"].items():
        observed, expected = dict.fromkeys(GROUPS, 0.0), dict.fromkeys(GROUPS, 0.0)
        for r in range(40):
            left = list(range(log["lengths_R"][r]))
            for k, column in enumerate(log["shown_RK"][r]):
                p = np.exp(scores[r, left]) / np.exp(scores[r, left]).sum()
                for c, share in zip(left, p, strict=True):
                    group = GROUPS[int(np.searchsorted([0.25, 0.5, 1.0, 2.0], share * len(left), side="right"))]
                    expected[group] += share
                    if c == column:
                        observed[group] += share / log["propensities_RK"][r, k]
                left.remove(column)
        for group in GROUPS:
            assert sums[f"{name}/{group}/n"].sum() == pytest.approx(observed[group])
            assert sums[f"{name}/{group}/d"].sum() == pytest.approx(expected[group])


def test_a_failed_calibration_means_do_not_trust() -> None:
    log, _ = lists(0.6, 1.0, 1)
    result = judge(replace(gathered(), calibration=calibration_sums(**log)), RULES)
    assert result.verdict.outcome == "do not trust" and "propensity calibration" in result.verdict.failed


# ---------------------------------------------------------------- the other faults, one at a time


def test_a_part_of_the_log_with_wrong_propensities_is_found() -> None:
    """On every third day the propensities are logged 40 % too high; over the whole log weights still average more than .8."""
    draw = OneItemWorld().draw(6_000, 600, 0)
    times = np.arange(6_000) * DAY // 200
    wrong = (times // DAY) % 3 == 0
    slates = replace(draw.slates, propensities_N=np.where(wrong, np.minimum(1.4 * draw.slates.propensities_N, 1), draw.slates.propensities_N))
    a, b = (EvaluatedPolicy.build(p.name, slates, p.probabilities_N, expected=p.expected_N) for p in (draw.a, draw.b))
    evidence = gather(slates, a, b, columns=user_columns(slates, a, b), context={"page": np.where(wrong, "odd", "even")})
    assert states(evidence)["mean weight by segment"] == "fail"


@pytest.mark.parametrize(
    ("health", "name", "state"),
    [
        (LogHealth(repeated_rows=1, stray_clicks=0, clicks=900), "duplicated requests", "warn"),
        (LogHealth(repeated_rows=40, stray_clicks=0, clicks=900), "duplicated requests", "fail"),
        (LogHealth(stray_clicks=1, clicks=900), "clicks without impressions", "warn"),
        (LogHealth(stray_clicks=40, clicks=900), "clicks without impressions", "fail"),
        (LogHealth(stray_clicks=None), "clicks without impressions", "unknown"),
        (LogHealth(estimated=True), "logged propensities", "warn"),
        (LogHealth(drawn=True), "propensity calibration", "pass"),
    ],
)
def test_what_should_not_be_in_a_log(health: LogHealth, name: str, state: str) -> None:
    evidence = replace(gathered(), health=health)
    assert states(evidence)[name] == state
    assert (judge(evidence, RULES).verdict.outcome == "do not trust") == (state == "fail")


def test_repeated_requests_by_hand() -> None:
    """Requests 0 and 2 are the same list for the same user at the same time; 1 differs in the order, 3 in the time, 4 in the user."""
    slates = LoggedSlates.build(
        requests=np.repeat(np.arange(5), 2),
        users=np.repeat([7, 7, 7, 7, 8], 2),
        positions=[1, 2] * 5,
        rewards=np.zeros(10),
        propensities=np.full(10, 0.5),
    )
    items, times = np.array([1, 2, 2, 1, 1, 2, 1, 2, 1, 2]), np.repeat([5, 5, 5, 6, 5], 2)
    assert repeated_requests(slates, times, items) == 1 == repeated_requests(slates, times, items.astype(str))


def test_a_world_that_changes_is_not_averaged() -> None:
    """The click rate falls to a quarter half-way."""
    draw = OneItemWorld(level=0.0).draw(6_000, 600, 0)
    rng = np.random.default_rng(1)
    late = np.arange(6_000) >= 3_000
    slates = replace(draw.slates, rewards_N=draw.slates.rewards_N * np.where(late, rng.random(6_000) < 0.25, True))
    evidence = gather(slates, draw.a, draw.b, columns=user_columns(slates, draw.a, draw.b), context={"time": np.arange(6_000) * DAY // 500})
    assert states(evidence)["drift over the log"] == "fail"


def test_users_are_looked_at() -> None:
    """Alike rows within users show as a design effect; a log whose every row has its own user is a reason to look, not to fail."""
    alike = OneItemWorld(user_sd=2.0).draw(3_000, 60, 0)
    evidence = gather(alike.slates, alike.a, alike.b, columns=user_columns(alike.slates, alike.a, alike.b))
    effect = next(check for check in judge(evidence, RULES).checks if check.name == "users (design effect)")
    assert effect.state == "warn" and effect.value > 5
    alone = replace(alike.slates, users_N=np.arange(3_000))
    evidence = gather(alone, alike.a, alike.b, columns=user_columns(alone, alike.a, alike.b))
    assert "does not know users" in next(check for check in judge(evidence, RULES).checks if check.name == "users (design effect)").explanation


def test_the_number_of_candidates_is_enough_to_find_a_flatter_logger() -> None:
    """Nothing but the shown item's propensity and the number of candidates: Σ 1 / (C p) must be the number of requests."""
    rng = np.random.default_rng(0)
    score, lengths = rng.normal(size=(6_000, 5)), np.full(6_000, 5)
    for sharper, state in ((1.0, "pass"), (0.5, "fail")):
        item = sample_plackett_luce(sharper * score, lengths, 1, rng)[0][:, 0]
        propensities = softmax(score, lengths)[np.arange(6_000), item]
        ones = np.ones(6_000)
        slates = LoggedSlates.build(
            requests=np.arange(6_000), users=np.arange(6_000) % 500, positions=ones, rewards=rng.random(6_000) < 0.2, propensities=propensities
        )
        a, b = (EvaluatedPolicy.build(name, slates, softmax(t * score, lengths)[np.arange(6_000), item]) for name, t in (("a", 1.0), ("b", 0.95)))
        evidence = gather(slates, a, b, columns=user_columns(slates, a, b), context={"candidates": lengths})
        assert states(evidence)["propensity calibration"] == state and "candidates" not in evidence.segments


# ---------------------------------------------------------------- evidence


def test_blocks_give_the_verdict_of_the_whole() -> None:
    draw = OneItemWorld().draw(2_000, 150, 4)
    times, pages = np.arange(2_000) * DAY // 300, np.where(np.arange(2_000) % 3, "home", "search")

    def part(rows: np.ndarray) -> Evidence:
        slates = LoggedSlates.build(
            requests=np.flatnonzero(rows), users=draw.slates.users_N[rows], positions=np.ones(rows.sum()), rewards=draw.slates.rewards_N[rows],
            propensities=draw.slates.propensities_N[rows], predicted=draw.slates.predicted_N[rows], first_request=int(np.argmax(rows)),
        )  # fmt: skip
        a, b = (EvaluatedPolicy.build(p.name, slates, p.probabilities_N[rows], expected=p.expected_N[rows]) for p in (draw.a, draw.b))
        return gather(slates, a, b, columns=user_columns(slates, a, b), context={"time": times[rows], "page": pages[rows]})

    first = np.arange(2_000) < 700
    whole, merged = part(np.ones(2_000, bool)), part(first).merge(part(~first))
    for column in whole.sums.columns:
        if not column.endswith("/odd"):  # rows unlike the first of their block: only whether there are any matters
            np.testing.assert_allclose(merged.sums[column], whole.sums[column], atol=1e-9)
    assert merged.segments.keys() == whole.segments.keys() and set(merged.segments["day"]) == set(whole.segments["day"])
    for kind, of_kind in whole.segments.items():
        for label, sums in of_kind.items():
            np.testing.assert_allclose(merged.segments[kind][label].sums_UM, sums.sums_UM)
            inside = {"page": pages == label}.get(kind)
            if inside is not None:
                assert sums["rows"].sum() == inside.sum() and sums["naive/n"].sum() == draw.slates.rewards_N[inside].sum()
    one, two = judge(whole, RULES).json(), judge(merged, RULES).json()
    assert one["sentence"] == two["sentence"] and one["diagnostics"]["a"]["effective_requests"] == pytest.approx(
        two["diagnostics"]["a"]["effective_requests"]
    )


def test_many_users_are_grouped_and_tell_the_same() -> None:
    """20,000 users: sums are kept by group; segments, weights and the interval agree with those of a log in memory by users."""
    draw = OneItemWorld(user_sd=0.0).draw(40_000, 20_000, 4, modelled=False)
    result = run_experiment(draw.slates, draw.a, draw.b, rules=RULES, context={"history_length": np.arange(40_000) % 20})
    assert result.evidence.sums.groups == 4_096 and set(result.evidence.segments["user"]) == {"new", "known"}
    rows = {s.label: s.rows for s in result.segments if s.kind == "user"}
    assert rows == {"new": 2_000, "known": 38_000}
    quoted = result.influence["snips"]
    w = draw.b.weights_N / draw.b.weights_N.mean(), draw.a.weights_N / draw.a.weights_N.mean()
    psi = w[0] * (draw.slates.rewards_N - quoted.b.value) - w[1] * (draw.slates.rewards_N - quoted.a.value)
    assert quoted.error == pytest.approx(psi.std() / np.sqrt(40_000), rel=0.1)


def test_users_matter_less_for_the_difference() -> None:
    """Both design effects against their definitions: variance by users over variance by rows; a user's taste cancels from B − A."""
    draw = OneItemWorld(user_sd=2.0).draw(4_000, 80, 0)
    columns = user_columns(draw.slates, draw.a, draw.b)
    evidence = gather(draw.slates, draw.a, draw.b, columns=columns)
    check = next(check for check in judge(evidence, RULES).checks if check.name == "users (design effect)")

    def effect(values: np.ndarray) -> float:
        users, cluster = np.unique(draw.slates.users_N, return_inverse=True)
        deviation = np.bincount(cluster, weights=values - values.mean())
        return float((deviation**2).sum() * len(users) / (len(users) - 1) / 4_000**2 / (values.var() / 4_000))

    single, gap = effect(draw.slates.rewards_N), effect(columns["dr/b/n"] - columns["dr/a/n"])
    assert check.value == pytest.approx(single, rel=0.02) and f"for B − A {gap:.1f} times" in check.explanation and gap < single / 2
