"""One offline A/B test: every estimate, interval and check of two policies on one log, and the verdict."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longtrail.errors import EvaluationError
from longtrail.offpolicy.anytime import Betting, betting, time_uniform
from longtrail.offpolicy.calibration import group_shares
from longtrail.offpolicy.checks import Check, difference_check, log_checks, weight_checks
from longtrail.offpolicy.columns import EVERY, Finished, finish, user_columns
from longtrail.offpolicy.diagnostics import Diagnostics, diagnostics
from longtrail.offpolicy.evidence import Evidence, LogHealth, gather
from longtrail.offpolicy.intervals import Comparison, Interval, Ratio, bootstraps, finite, influence
from longtrail.offpolicy.multiplicity import Method, shared_confidence
from longtrail.offpolicy.power import Power, power_analysis
from longtrail.offpolicy.segments import SegmentResult, compare_segments, guarded
from longtrail.offpolicy.slates import EvaluatedPolicy, LoggedSlates
from longtrail.offpolicy.sums import UserSums, user_groups
from longtrail.offpolicy.timeline import over_time
from longtrail.offpolicy.verdict import Verdict, decide, envelope

Floats = NDArray[np.float64]

QUOTED = ("dr", "snips", "item_position")  # the estimators a verdict may be about, in this order of preference


@dataclass(frozen=True, kw_only=True)
class Rules:
    """How an experiment is judged; set before looking. `components` fill it from the settings `ab_test`."""

    confidence: float = 0.95
    replicates: int = 2_000
    min_effective_sample: float = 100
    max_weight_share: float = 0.1
    margin: float = 0.01  # relative to A's rate: a smaller difference does not matter
    challengers: int = 1  # how many were tried on this log, this one included: each is judged the more strictly
    looks: bool = False  # the verdict is read again and again as the log grows
    guardrails: tuple[str, ...] = ()  # segments in which B may not be worse: "user: new"
    multiplicity: Method = "holm"
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """The result. `quoted` names the estimator that the verdict is about: dr where there is a reward model, else snips."""

    evidence: Evidence
    rules: Rules
    finished: Finished
    confidence: float  # of every interval: that of the rules, shared by the challengers
    logged: Interval  # the logging policy's own rate
    bootstrap: dict[str, Comparison]  # by estimator
    influence: dict[str, Comparison]
    interval: Interval  # of the quoted difference, and what the verdict rests on: the widest limits of two methods
    any_time: Interval  # of the quoted difference
    betting: Betting | None  # of the difference; None where it has no common denominator or too few users
    quoted: str
    power: Power
    margin: float  # absolute
    diagnostics: dict[str, Diagnostics]  # by side
    checks: list[Check]
    segments: list[SegmentResult]
    over_time: dict[str, Any]
    verdict: Verdict

    def json(self) -> dict[str, Any]:
        evidence, quoted = self.evidence, self.bootstrap[self.quoted]
        sides = {
            side: {"name": name, "estimates": {key: getattr(c, side).json() for key, c in self.bootstrap.items()}}
            for side, name in (("a", evidence.a), ("b", evidence.b))
        }
        return {
            "verdict": self.verdict.outcome,
            "sentence": self.verdict.sentence,
            "failed_checks": list(self.verdict.failed),
            "broken_guardrails": list(self.verdict.broken),
            "unjudged_guardrails": list(self.verdict.unjudged),
            "estimator": self.quoted,
            "estimators": {name: self._described(name) for name in self.bootstrap},
            "refused": evidence.refused,
            "confidence": self.confidence,
            "challengers": self.rules.challengers,
            "looks": self.rules.looks,
            **sides,
            "difference": {name: c.difference_json() for name, c in self.bootstrap.items()},
            "interval": self.interval.json(),
            "probability_b_better": quoted.difference_json()["probability_b_better"],
            "influence": {
                name: {"a": c.a.json(), "b": c.b.json(), "difference": c.difference_json()} for name, c in self.influence.items()
            },
            "any_time": self.any_time.json(),
            "betting": self.betting and {**self.betting.interval.json(), "bound": self.betting.bound, "clipped": self.betting.clipped},
            "margin": self.margin,
            "power": self.power.json(),
            "logged": self.logged.json(),
            "checks": [check.json() for check in self.checks],
            "diagnostics": {side: figures.json() for side, figures in self.diagnostics.items()},
            "calibration": [share.json() for share in group_shares(evidence.calibration)] if evidence.calibration else [],
            "segments": [segment.json() for segment in self.segments],
            "guardrails": list(self.rules.guardrails),
            "multiplicity": self.rules.multiplicity,
            "over_time": self.over_time,
            "propensities_estimated": evidence.health.estimated,
            "rows": evidence.rows,
            "requests": evidence.requests,
            "users": len(evidence.sums.users_U),
        }  # fmt: skip

    def _described(self, name: str) -> dict[str, Any]:
        """What an estimator is and assumes; a parameter that was chosen to be infinite (no clipping) is None."""
        estimator = EVERY[name]
        parameters = {side: finite(value) for side, value in self.finished.tuned.get(name, {}).items()}
        return {"title": estimator.title, "assumes": estimator.assumes, "contrast": estimator.contrast, "parameters": parameters}


def user_sums(slates: LoggedSlates, a: EvaluatedPolicy, b: EvaluatedPolicy) -> UserSums:
    """One numerator and one denominator of every estimator that the log allows, by user: "{estimator}/{side}/{n|d}"."""
    return finish(UserSums.build(slates.users_N, user_columns(slates, a, b))).sums


def run_experiment(
    slates: LoggedSlates,
    a: EvaluatedPolicy,
    b: EvaluatedPolicy,
    *,
    rules: Rules | None = None,
    context: Mapping[str, NDArray[Any]] | None = None,
    health: LogHealth | None = None,
    calibration: UserSums | None = None,
) -> Experiment:
    """Is B better than A? Of a log in memory. `context` and `health` as in `evidence.gather`. Raises EvaluationError below 2 users."""
    hours = context is not None and "time" in context and int(np.ptp(context["time"])) < 3 * 86_400_000_000
    evidence = gather(slates, a, b, columns=user_columns(slates, a, b), context=context, health=health, hours=hours)
    if calibration is not None:
        evidence = Evidence(**{**vars(evidence), "calibration": calibration})
    return judge(evidence, rules or Rules())


def judge(evidence: Evidence, rules: Rules) -> Experiment:
    """The whole judgement from sums alone. Every estimator shares the same resamples, A and B the same log."""
    wanted, absent = guarded(rules.guardrails, evidence.segments)
    finished, confidence = finish(evidence.sums), shared_confidence(rules.confidence, rules.challengers)
    sums, raw = finished.sums, evidence.sums
    pairs = _pairs(sums)
    quoted = next((name for name in QUOTED if name in pairs), None)
    if quoted is None:
        reasons = "; ".join(f"{name}: {why}" for name, why in evidence.refused.items() if name in QUOTED)
        raise EvaluationError(f"no estimator can judge this log ({reasons})")
    own = ("naive/n", "naive/d")
    every: dict[str, tuple[Ratio, Ratio]] = {**pairs, "": (own, own)}
    resampled = bootstraps(sums, every, confidence=confidence, replicates=rules.replicates, seed=rules.seed)
    linear = {name: influence(sums, *pair, confidence=confidence) for name, pair in pairs.items()}
    any_time = time_uniform(linear[quoted], rows=evidence.rows, confidence=confidence)
    figures = {side: diagnostics(evidence.weights[side], raw[f"weight/{side}"], raw["rows"]) for side in ("a", "b")}
    limits = {"min_effective_sample": rules.min_effective_sample, "max_weight_share": rules.max_weight_share}
    checks = [check for side, name in (("a", evidence.a), ("b", evidence.b)) for check in weight_checks(figures[side], policy=name, **limits)]
    checks = [difference_check(linear[quoted]), *checks, *log_checks(evidence, sums, estimator=quoted)]
    segments = compare_segments(evidence.segments, quoted, confidence=confidence, method=rules.multiplicity, always=wanted)
    guards = [segment for segment in segments if (segment.kind, segment.label) in wanted]
    compared = {(guard.kind, guard.label) for guard in guards}
    absent += [f"{kind} {label}" for kind, label in wanted if (kind, label) not in compared]  # a single user's
    rate_a = resampled[quoted].a.value
    margin = rules.margin * rate_a if np.isfinite(rate_a) and rate_a > 0 else 0.0
    power = power_analysis(
        difference=linear[quoted].difference.value,
        error=linear[quoted].error,
        rate_a=rate_a,
        users=len(sums.users_U),
        margin=margin,
        confidence=confidence,
    )
    methods = [any_time, linear[quoted].difference] if rules.looks else [resampled[quoted].difference, linear[quoted].difference]
    verdict = decide(
        methods,
        checks,
        a=evidence.a,
        b=evidence.b,
        confidence=confidence,
        margin=margin,
        guardrails=guards,
        absent=absent,
        power=power,
    )
    return Experiment(
        evidence=evidence,
        rules=rules,
        finished=finished,
        confidence=confidence,
        logged=resampled.pop("").a,
        bootstrap=resampled,
        influence=linear,
        interval=envelope(methods),
        any_time=any_time,
        betting=_betting(sums, quoted, confidence),
        quoted=quoted,
        power=power,
        margin=margin,
        diagnostics=figures,
        checks=checks,
        segments=segments,
        over_time=over_time(evidence.segments.get("day", {}), quoted, confidence=confidence),
        verdict=verdict,
    )


def _betting(sums: UserSums, quoted: str, confidence: float) -> Betting | None:
    """Of estimators that divide by the rows; users in the order of a hash of their ids, which nobody chose."""
    name = quoted if quoted != "snips" else "ips"
    if f"{name}/a/n" not in sums or len(sums.users_U) < 50:
        return None
    order = np.argsort(user_groups(sums.users_U, 1 << 30), kind="stable")
    gap = sums[f"{name}/b/n"] - sums[f"{name}/a/n"]
    return betting(gap[order], sums["naive/d"][order], confidence=confidence)


def _pairs(sums: UserSums) -> dict[str, tuple[Ratio, Ratio]]:
    """The columns of A and B of every estimator but the naive one, which is the same for both."""
    names = [column.split("/")[0] for column in sums.columns if column.endswith("/a/n")]
    return {name: ((f"{name}/a/n", f"{name}/a/d"), (f"{name}/b/n", f"{name}/b/d")) for name in names}
