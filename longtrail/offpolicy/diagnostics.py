"""May the estimate be believed? Figures about the weights, each with a threshold and a sentence for someone new to them."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longtrail.offpolicy.intervals import standard_error
from longtrail.offpolicy.slates import EvaluatedPolicy, LoggedSlates

Floats = NDArray[np.float64]

MEAN_WEIGHT_SLACK = 0.02  # our choice: a mean weight this near 1 is never a failure
MEAN_WEIGHT_ERRORS = 3.3  # our choice: standard errors from 1 beyond which the propensities are doubted (p < .001)
MIN_EFFECTIVE_USERS = 20.0  # our choice: fewer independent users than this carry no clustered interval
MAX_SUPPORT_VIOLATIONS = 0.01  # our choice: share of rows where the logger had no choice but the policy would have chosen otherwise


@dataclass(frozen=True, kw_only=True)
class Diagnostics:
    """Of one policy's weights on one log. A request's weight is the mean of w_{1:k} over its rows: what its clicks are multiplied by."""

    mean_weight: float  # over rows; 1 in expectation when the propensities are right and cover the policy
    mean_weight_error: float  # its standard error, clustered by user
    effective_requests: float  # Kish: (Σ w)² / Σ w²
    effective_users: float  # the same over users' total weights
    largest_user_share: float  # of all weight
    overlap: float  # mean of min(w, 1): the share of the policy's behaviour that the log also shows
    unused_share: float  # requests whose weight is below 0.01: shown by the logger, hardly ever by the policy
    support_violations: float  # share of rows logged with propensity 1 that the policy would not surely have shown
    largest_weight: float
    weight_quantiles: dict[str, float]
    weight_histogram: dict[str, list[float]]  # {"edges": [B + 1], "shares": [B]} of requests; the outer bins hold all beyond them

    def json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Check:
    """One line of the traffic-light list."""

    name: str
    passed: bool
    value: float
    threshold: str
    explanation: str

    def json(self) -> dict[str, Any]:
        return asdict(self)


def diagnose(slates: LoggedSlates, policy: EvaluatedPolicy) -> Diagnostics:
    users, cluster = np.unique(slates.users_N, return_inverse=True)
    rows_U = np.asarray(np.bincount(cluster, minlength=len(users)), dtype=np.float64)
    weight_U = np.asarray(np.bincount(cluster, weights=policy.weights_N, minlength=len(users)), dtype=np.float64)
    request_R = request_weights(slates, policy)
    total = float(weight_U.sum())
    forced = (slates.propensities_N >= 1 - 1e-12) & (policy.probabilities_N < 1 - 1e-6)
    points = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p99.9": 0.999}
    return Diagnostics(
        mean_weight=total / slates.rows,
        mean_weight_error=_finite(standard_error(weight_U, rows_U)),
        effective_requests=effective_sample(request_R),
        effective_users=effective_sample(weight_U),
        largest_user_share=float(weight_U.max()) / total if total > 0 else 1.0,
        overlap=float(np.minimum(request_R, 1.0).mean()),
        unused_share=float((request_R < 0.01).mean()),
        support_violations=float(forced.mean()),
        largest_weight=float(request_R.max()),
        weight_quantiles={name: float(np.quantile(request_R, point)) for name, point in points.items()},
        weight_histogram=_histogram(request_R),
    )


def request_weights(slates: LoggedSlates, policy: EvaluatedPolicy) -> Floats:
    """[R] the mean of w_{1:k} over each request's rows."""
    return np.bincount(slates.requests_N, weights=policy.weights_N) / np.bincount(slates.requests_N)


def effective_sample(weights: Floats) -> float:
    """(Σ w)² / Σ w²: how many equally weighted ones would be as precise (Kish, Survey Sampling, 1965); 0 where all weights are."""
    squares = float(weights @ weights)
    return float(weights.sum()) ** 2 / squares if squares > 0 else 0.0


def checks(figures: Diagnostics, *, policy: str, min_effective_sample: float, max_weight_share: float) -> list[Check]:
    """The list of checks of one policy; any that fails makes the verdict "not enough data"."""
    slack = max(MEAN_WEIGHT_SLACK, MEAN_WEIGHT_ERRORS * figures.mean_weight_error)
    return [
        Check(
            name="effective requests",
            passed=figures.effective_requests >= min_effective_sample,
            value=figures.effective_requests,
            threshold=f"at least {min_effective_sample:g}",
            explanation=f"The log says as much about {policy} as this many requests answered by {policy} itself would.",
        ),
        Check(
            name="effective users",
            passed=figures.effective_users >= MIN_EFFECTIVE_USERS,
            value=figures.effective_users,
            threshold=f"at least {MIN_EFFECTIVE_USERS:g}",
            explanation="One user's clicks resemble each other, so users, not rows, are what the interval counts.",
        ),
        Check(
            name="largest user",
            passed=figures.largest_user_share <= max_weight_share,
            value=figures.largest_user_share,
            threshold=f"at most {max_weight_share:g}",
            explanation="The share of all weight that the heaviest user carries: a large one means the result is about one person.",
        ),
        Check(
            name="mean weight",
            passed=abs(figures.mean_weight - 1) <= slack,
            value=figures.mean_weight,
            threshold=f"within {slack:.3f} of 1",
            explanation="Weights average 1 when the logged propensities are right and the log shows all that the policy would show. "
            "Far from 1, the propensities or the candidate sets are wrong; near 1 does not prove them right.",
        ),
        Check(
            name="support",
            passed=figures.support_violations <= MAX_SUPPORT_VIOLATIONS,
            value=figures.support_violations,
            threshold=f"at most {MAX_SUPPORT_VIOLATIONS:g}",
            explanation="The share of rows where the logger had no choice and the policy would have chosen otherwise: no weighting can tell what "
            "would have been clicked there.",
        ),
    ]


def _histogram(weights: Floats) -> dict[str, list[float]]:
    edges = 2.0 ** np.arange(-8, 9)
    counts, _ = np.histogram(np.clip(weights, edges[0], edges[-1]), bins=edges)
    return {"edges": edges.tolist(), "shares": (counts / max(len(weights), 1)).tolist()}


def _finite(value: float) -> float:
    return value if np.isfinite(value) else 0.0
