"""One offline A/B test: every estimate, interval and check of two policies on one log, and the verdict."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longtrail.offpolicy.diagnostics import Check, Diagnostics, checks, diagnose
from longtrail.offpolicy.estimators import ESTIMATORS, Naive
from longtrail.offpolicy.intervals import Comparison, Interval, bootstrap, influence
from longtrail.offpolicy.slates import EvaluatedPolicy, LoggedSlates
from longtrail.offpolicy.sums import UserSums
from longtrail.offpolicy.verdict import Verdict, decide

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """The result. `quoted` names the estimator that the verdict is about: dr where there is a reward model, else snips."""

    a: str
    b: str
    rows: int
    requests: int
    users: int
    logged: Interval  # the logging policy's own rate
    bootstrap: dict[str, Comparison]  # by estimator
    influence: dict[str, Comparison]
    quoted: str
    diagnostics: dict[str, Diagnostics]  # by policy
    checks: dict[str, list[Check]]
    verdict: Verdict

    def json(self) -> dict[str, Any]:
        return {
            "verdict": self.verdict.outcome,
            "sentence": self.verdict.sentence,
            "failed_checks": list(self.verdict.failed),
            "estimator": self.quoted,
            "a": {"name": self.a, "estimates": {name: c.a.json() for name, c in self.bootstrap.items()}},
            "b": {"name": self.b, "estimates": {name: c.b.json() for name, c in self.bootstrap.items()}},
            "difference": {name: c.difference_json() for name, c in self.bootstrap.items()},
            "influence": {
                name: {"a": c.a.json(), "b": c.b.json(), "difference": c.difference_json()} for name, c in self.influence.items()
            },
            "logged": self.logged.json(),
            "diagnostics": {
                name: {**figures.json(), "checks": [check.json() for check in self.checks[name]]} for name, figures in self.diagnostics.items()
            },
            "rows": self.rows,
            "requests": self.requests,
            "users": self.users,
        }  # fmt: skip


def user_sums(slates: LoggedSlates, a: EvaluatedPolicy, b: EvaluatedPolicy) -> UserSums:
    """Numerators and denominators of every estimator that the log allows, by user. Sums of blocks of a log can be merged."""
    columns: dict[str, Floats] = {}
    naive = Naive().terms(slates, a)
    columns["naive/n"], columns["naive/d"] = naive.numerators_N, naive.denominators_N
    modelled = slates.predicted_N is not None and a.expected_N is not None and b.expected_N is not None
    for name, estimator in ESTIMATORS.items():
        if name == "dr" and not modelled:
            continue
        for side, policy in (("a", a), ("b", b)):
            terms = estimator.terms(slates, policy)
            columns[f"{name}/{side}/n"], columns[f"{name}/{side}/d"] = terms.numerators_N, terms.denominators_N
    return UserSums.build(slates.users_N, columns)


def run_experiment(
    slates: LoggedSlates,
    a: EvaluatedPolicy,
    b: EvaluatedPolicy,
    *,
    confidence: float = 0.95,
    replicates: int = 2_000,
    min_effective_sample: float = 100,
    max_weight_share: float = 0.1,
    seed: int = 0,
) -> Experiment:
    """Is B better than A? Every estimator shares the same resamples (same seed), A and B the same log. Raises EvaluationError below 2 users."""
    sums = user_sums(slates, a, b)
    names = [name for name in ESTIMATORS if f"{name}/a/n" in sums.columns]
    pairs = {name: ((f"{name}/a/n", f"{name}/a/d"), (f"{name}/b/n", f"{name}/b/d")) for name in names}
    resampled = {name: bootstrap(sums, *pair, confidence=confidence, replicates=replicates, seed=seed) for name, pair in pairs.items()}
    linear = {name: influence(sums, *pair, confidence=confidence) for name, pair in pairs.items()}
    own = ("naive/n", "naive/d")
    figures = {side: diagnose(slates, policy) for side, policy in (("a", a), ("b", b))}
    limits = {"min_effective_sample": min_effective_sample, "max_weight_share": max_weight_share}
    lists = {side: checks(figures[side], policy=policy.name, **limits) for side, policy in (("a", a), ("b", b))}
    quoted = "dr" if "dr" in names else "snips"
    verdict = decide([resampled[quoted], linear[quoted]], {a.name: lists["a"], b.name: lists["b"]}, a=a.name, b=b.name, confidence=confidence)
    return Experiment(
        a=a.name,
        b=b.name,
        rows=slates.rows,
        requests=slates.requests,
        users=len(sums.users_U),
        logged=bootstrap(sums, own, own, confidence=confidence, replicates=replicates, seed=seed).a,
        bootstrap=resampled,
        influence=linear,
        quoted=quoted,
        diagnostics=figures,
        checks=lists,
        verdict=verdict,
    )


def over_time(
    slates: LoggedSlates, policies: dict[str, EvaluatedPolicy], times_N: NDArray[np.int64], *, estimator: str, bins: int = 12
) -> dict[str, Any]:
    """The estimate of each policy within `bins` equally large spans of the log: {"until": [µs], "logged": […], name: […]}.

    `times_N` is in the order of the slates' rows.
    """
    bins = max(1, min(bins, slates.requests))
    order = np.argsort(times_N, kind="stable")
    bin_N = np.empty(slates.rows, np.int64)
    bin_N[order] = np.arange(slates.rows) * bins // slates.rows
    result: dict[str, Any] = {"until": [int(times_N[order][min(slates.rows, (i + 1) * slates.rows // bins) - 1]) for i in range(bins)]}
    result["logged"] = _by_bin(bin_N, bins, slates.rewards_N, np.ones(slates.rows))
    for name, policy in policies.items():
        terms = ESTIMATORS[estimator].terms(slates, policy)
        result[name] = _by_bin(bin_N, bins, terms.numerators_N, terms.denominators_N)
    return result


def _by_bin(bin_N: NDArray[np.int64], bins: int, numerators_N: Floats, denominators_N: Floats) -> list[float | None]:
    top, bottom = (np.bincount(bin_N, weights=values, minlength=bins) for values in (numerators_N, denominators_N))
    return [float(n / d) if d > 0 else None for n, d in zip(top, bottom, strict=True)]
