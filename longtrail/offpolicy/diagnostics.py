"""How far a log can tell about a policy: figures about the weights. What they mean for the verdict is said in `checks.py`.

U users (clusters).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longtrail.offpolicy.intervals import effective_sample, standard_error
from longtrail.offpolicy.slates import EvaluatedPolicy, LoggedSlates
from longtrail.offpolicy.weights import WeightSums, list_weights, summary

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Diagnostics:
    """Of one policy's weights on one log. A request's weight is the mean of w_{1:k} over its rows: what its clicks are multiplied by."""

    mean_weight: float  # over rows; 1 in expectation when the propensities are right and cover the policy
    mean_weight_error: float  # its standard error, clustered by user
    effective_users: float  # Kish over users' total weights
    largest_user_share: float  # of all weight
    weights: WeightSums

    @property
    def effective_requests(self) -> float:
        return self.weights.effective

    @property
    def overlap(self) -> float:
        """Mean of min(w, 1): the share of the policy's behaviour that the log also shows."""
        return self.weights.below_one / max(self.weights.requests, 1)

    @property
    def support_violations(self) -> float:
        """Share of rows where the logger had no choice and the policy would have chosen otherwise."""
        return self.weights.forced / max(self.weights.rows, 1)

    def json(self) -> dict[str, Any]:
        own = {name: value for name, value in vars(self).items() if name != "weights"}
        return {**own, **summary(self.weights)}


def diagnose(slates: LoggedSlates, policy: EvaluatedPolicy) -> Diagnostics:
    """Of a log in memory."""
    users, cluster = np.unique(slates.users_N, return_inverse=True)
    rows_U = np.bincount(cluster, minlength=len(users)).astype(np.float64)
    weight_U = np.asarray(np.bincount(cluster, weights=list_weights(slates, policy), minlength=len(users)), dtype=np.float64)
    return diagnostics(WeightSums.of(slates, policy), weight_U, rows_U)


def diagnostics(weights: WeightSums, weight_U: Floats, rows_U: Floats) -> Diagnostics:
    """From sums: `weight_U` and `rows_U` are each user's weight and rows."""
    total, error = float(weight_U.sum()), standard_error(weight_U, rows_U)
    return Diagnostics(
        mean_weight=total / float(rows_U.sum()),
        mean_weight_error=error if np.isfinite(error) else 0.0,
        effective_users=effective_sample(weight_U),
        largest_user_share=float(weight_U.max()) / total if total > 0 else 1.0,
        weights=weights,
    )
