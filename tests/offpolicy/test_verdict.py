import numpy as np
import pytest

from longtrail.errors import EvaluationError
from longtrail.offpolicy.checks import Check, weight_checks
from longtrail.offpolicy.diagnostics import diagnose
from longtrail.offpolicy.experiment import Rules, run_experiment
from longtrail.offpolicy.intervals import Comparison, Interval, effective_sample
from longtrail.offpolicy.segments import SegmentResult
from longtrail.offpolicy.slates import EvaluatedPolicy, LoggedSlates
from longtrail.offpolicy.two_logs import PolicyLog, action_probabilities, cross_estimate
from longtrail.offpolicy.verdict import decide
from tests.offpolicy.worlds import OneItemWorld

LIMITS = {"policy": "p", "min_effective_sample": 100, "max_weight_share": 0.1}


def failed(slates, policy):
    return {check.name for check in weight_checks(diagnose(slates, policy), **LIMITS) if check.failed}


def one_item(users, propensities, rewards=None):
    n = len(users)
    return LoggedSlates.build(
        requests=np.arange(n), users=users, positions=np.ones(n), rewards=np.zeros(n) if rewards is None else rewards, propensities=propensities
    )


def interval(low, high):
    return Interval(value=(low + high) / 2, low=low, high=high)


def test_kish_by_hand():
    assert effective_sample(np.array([1.0, 1, 1, 1])) == 4 and effective_sample(np.array([1.0, 0, 0])) == 1
    assert effective_sample(np.array([2.0, 1.0])) == pytest.approx(9 / 5) and effective_sample(np.zeros(3)) == 0


def test_a_healthy_log_passes_every_check():
    draw = OneItemWorld().draw(2_000, 200, 0)
    assert failed(draw.slates, draw.a) == set() and failed(draw.slates, draw.b) == set()


def test_each_check_fails_where_it_should():
    users = np.repeat(np.arange(50), 20)
    slates = one_item(users, np.full(1_000, 0.5))
    concentrated = np.where(users == 0, 1.0, 0.05)  # one user carries a third of all weight
    assert "largest user" in failed(slates, EvaluatedPolicy.build("p", slates, concentrated))
    few = np.where(np.arange(1_000) < 30, 1.0, 0.0)
    assert "effective requests" in failed(slates, EvaluatedPolicy.build("p", slates, few))
    assert "mean weight" in failed(slates, EvaluatedPolicy.build("p", slates, np.full(1_000, 0.6)))  # it averages 1.2
    assert failed(slates, EvaluatedPolicy.build("p", slates, np.full(1_000, 0.5))) == set()
    forced = one_item(users, np.ones(1_000))
    assert "support" in failed(forced, EvaluatedPolicy.build("p", forced, np.full(1_000, 0.9)))
    alone = one_item(users % 5, np.full(1_000, 0.5))
    assert "effective users" in failed(alone, EvaluatedPolicy.build("p", alone, np.full(1_000, 0.5)))


def test_words_follow_the_intervals():
    said = {name: decide(intervals, [], a="A", b="B", confidence=0.95, margin=0.004) for name, intervals in {
        "win": [interval(0.01, 0.03), interval(0.005, 0.03)],
        "lose": [interval(-0.03, -0.01)],
        "equivalent": [interval(-0.003, 0.0035), interval(-0.003, 0.003)],
        "not enough data": [interval(0.001, 0.03), interval(-0.001, 0.03)],
    }.items()}  # fmt: skip
    assert {name: verdict.outcome for name, verdict in said.items()} == {name: name for name in said}
    assert said["win"].sentence == "B beats A: its click-through rate is 2.00 points higher than A's (95% interval +0.50 to +3.00 points)."
    assert "2.00 points lower" in said["lose"].sentence and "anything from -0.10 to +3.00 points" in said["not enough data"].sentence
    assert "less than 0.4 points" in said["equivalent"].sentence
    nothing = decide([interval(np.nan, np.nan)], [], a="A", b="B", confidence=0.95)
    assert nothing.outcome == "not enough data" and "hardly ever shown" in nothing.sentence
    small = decide([interval(0.001, 0.003)], [], a="A", b="B", confidence=0.95, margin=0.004)
    assert small.outcome == "win" and "less than the margin" in small.sentence


def test_checks_come_before_intervals_and_trust_before_amount():
    def check(kind, state):
        return Check(name=f"{kind} {state}", kind=kind, state=state, value=1.0, threshold="2", explanation="")

    clear = {"intervals": [interval(0.01, 0.02)], "a": "A", "b": "B", "confidence": 0.95}
    amount, trust = check("amount", "fail"), check("trust", "fail")
    assert decide(checks=[amount], **clear).outcome == "not enough data"
    both = decide(checks=[amount, trust], **clear)
    assert both.outcome == "do not trust" and both.failed == ("trust fail",) and "trust fail" in both.sentence
    harmless = [check("trust", "warn"), check("amount", "warn"), check("trust", "unknown"), check("trust", "pass")]
    assert decide(checks=harmless, **clear).outcome == "win"


def segment(low, high, adjusted, *, enough=True):
    comparison = Comparison(a=interval(0, 1), b=interval(0, 1), difference=interval(low, high), relative=interval(0, 1))
    return SegmentResult(kind="user", label="new", rows=100, users=50, comparison=comparison, adjusted=adjusted, enough=enough)


def test_a_broken_guardrail_keeps_a_whatever_the_whole_says():
    rules = {"checks": [], "a": "A", "b": "B", "confidence": 0.95, "margin": 0.004}
    bad = segment(-0.03, -0.01, 0.01)
    wholes = {"win": (0.01, 0.02), "equivalent": (-0.001, 0.001), "not enough data": (-0.05, 0.05), "lose": (-0.03, -0.01)}
    for alone, span in wholes.items():
        broken = decide([interval(*span)], guardrails=[bad], **rules)
        assert broken.outcome == "lose" and broken.broken == ("user new",), alone
        assert ("worse for user new" in broken.sentence) == (alone != "lose") and ("but worse" in broken.sentence) == (alone == "win")
        for harmless in (segment(-0.03, 0.01, 0.4), segment(-0.03, -0.01, 0.06), segment(0.01, 0.03, 0.01)):
            held = decide([interval(*span)], guardrails=[harmless], **rules)
            assert held.outcome == alone and held == decide([interval(*span)], **rules)


def test_a_guardrail_of_which_nothing_is_known_is_said():
    rules = {"checks": [], "a": "A", "b": "B", "confidence": 0.95}
    for unknown in ({"guardrails": [segment(-0.03, -0.01, 0.01, enough=False)]}, {"absent": ["user new"]}):
        verdict = decide([interval(0.01, 0.02)], **unknown, **rules)
        assert verdict.outcome == "win" and verdict.unjudged == ("user new",) and "guardrail user new: too few people" in verdict.sentence


def test_guardrails_are_found_in_the_log():
    """One whose kind the log does not have is an error, a label that nobody has is said, a rare label is judged beside 24 larger ones."""
    draw = OneItemWorld(gap=3.0).draw(6_000, 600, 0)
    rare = np.where(np.arange(6_000) % 60 == 0, 99, np.arange(6_000) % 30)
    context = {"shop": rare, "history_length": np.full(6_000, 5)}

    def judged(*guardrails):
        return run_experiment(draw.slates, draw.a, draw.b, rules=Rules(replicates=100, guardrails=guardrails), context=context)

    with pytest.raises(EvaluationError, match=r"guardrails: 'usr: new': this log has no segments of the kind 'usr'; expected .* 'shop', 'user'"):
        judged("usr: new")
    with pytest.raises(EvaluationError, match="no segments of the kind 'day'"):
        judged("day: 2026-01-01")
    plain, guarded = judged(), judged("shop: 99", "user: known", "user: new")
    assert {("shop", "99"), ("user", "known")} & {(s.kind, s.label) for s in plain.segments} == set()
    assert {("shop", "99"), ("user", "known")} <= {(s.kind, s.label) for s in guarded.segments}
    assert guarded.verdict.unjudged == ("user new",) and guarded.json()["unjudged_guardrails"] == ["user new"]


def test_a_failed_check_overrules_a_clear_interval():
    draw = OneItemWorld(gap=3.0).draw(300, 100, 0)
    result = run_experiment(draw.slates, draw.a, draw.b, rules=Rules(replicates=200, min_effective_sample=1e6))
    assert result.verdict.outcome == "not enough data" and "effective requests of a" in result.verdict.failed
    assert "Not enough data" in result.verdict.sentence and "1e+06" in result.verdict.sentence


def test_a_policy_the_log_never_shows_is_not_judged():
    slates = one_item(np.arange(400), np.full(400, 0.5), np.ones(400))
    same, other = (EvaluatedPolicy.build(name, slates, np.full(400, p)) for name, p in (("same", 0.5), ("other", 0.0)))
    result = run_experiment(slates, same, other, rules=Rules(replicates=100))
    assert result.verdict.outcome == "not enough data"
    assert result.json()["b"]["estimates"]["snips"] == {"value": None, "low": None, "high": None}


# ---------------------------------------------------------------- two logs of two policies


def two_logs(rows, seed, learning=False):
    """Uniform and a skewed policy over 5 items at 2 positions; `learning` halves the skew in the first half of the log."""
    rng = np.random.default_rng(seed)
    rate = np.array([0.05, 0.1, 0.15, 0.2, 0.3])
    skewed = np.array([0.05, 0.1, 0.15, 0.3, 0.4])
    logs = []
    for name, p in (("uniform", np.full(5, 0.2)), ("skewed", skewed)):
        late = (np.arange(rows) >= rows / 2) | (name == "uniform") | (not learning)
        p_N = np.where(late[:, None], p, (p + 0.2) / 2)
        items = (rng.random((rows, 1)) > np.cumsum(p_N, axis=1)).sum(axis=1).clip(max=4)
        clicks = (rng.random(rows) < rate[items]).astype(float)
        logs.append(
            PolicyLog(
                name=name,
                items_N=items,
                positions_N=rng.integers(0, 2, rows),
                users_N=rng.integers(0, rows // 5, rows),
                clicks_N=clicks,
                propensities_N=p_N[np.arange(rows), items],
            )
        )
    return logs


def test_probabilities_of_a_fixed_policy_are_exact_and_of_a_learning_one_are_shares():
    _, fixed = two_logs(4_000, 0)
    p, exact = action_probabilities(fixed, 5, 2)
    assert exact and np.allclose(p, [[0.05, 0.1, 0.15, 0.3, 0.4]] * 2)
    learner = two_logs(40_000, 0, learning=True)[1]
    p, exact = action_probabilities(learner, 5, 2)
    average = np.array([0.0875, 0.125, 0.1625, 0.275, 0.35])
    assert not exact and np.abs(p - average).max() < 0.012
    logged = np.bincount(learner.items_N, weights=learner.propensities_N) / np.bincount(learner.items_N)
    assert logged.sum() > 1.01  # what averaging the logged propensities would give


@pytest.mark.parametrize("learning", [False, True])
def test_each_log_tells_what_the_other_policy_got(learning):
    """100 pairs of logs: the interval of the gap leaves 0 out in at most 12 of 100 (95 % expected; more than 12 once in 300 seeds), per direction."""
    outside = {name: 0 for name in ("there", "back")}
    for seed in range(100):
        logs = two_logs(1_500, seed, learning)
        for name, pair in (("there", logs), ("back", logs[::-1])):
            gap = cross_estimate(*pair, items=5, positions=2).gap["dr"]
            outside[name] += not gap.low <= 0 <= gap.high
    assert max(outside.values()) <= 12, outside
