"""Estimators that shrink large weights, and choose how much from the data: clipped IPS, switch-DR, DR with optimistic shrinkage.

ŵ is the shrunken weight. For lists the doubly robust ones read (ours; for one-item requests it is the papers' form, since w_{1:k−1} = 1 there and
both model values are the same):

    Σ [q̂_π + ŵ_{1:k} (r − q̂) + ŵ_{1:k−1} (E_π[q̂ | items above] − q̂_π)] / N

without shrinkage it is unbiased, with ŵ = 0 it is the direct method.

**The choice** (Su et al., ICML 2020, sec. on model selection, "direct bias estimation"): the parameter with the least estimated mean squared error,
variance + bias². Both are estimated from sums by user, as a user's rows are not independent (ours; the papers have independent rows): the variance of
the estimate, and the bias as Σ (ŵ − w)(r − q̂) / N. No shrinkage at all is among the candidates. The paper also offers an upper bound in place of the
estimated bias; on simulated logs with rare heavy weights it nearly always chose no shrinkage, so it is left out (ours). The intervals hold the chosen
parameter fixed, and so know nothing of the bias that was accepted.
"""

from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from longtrail.offpolicy.estimators import DIRECT, ROWS, Columns, Estimator, Terms, needs_model
from longtrail.offpolicy.slates import EvaluatedPolicy, LoggedSlates
from longtrail.offpolicy.sums import UserSums

Floats = NDArray[np.float64]

SIZES = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, np.inf)  # our choice: weights at which shrinking sets in


class _Tuned(Estimator):
    """Columns n0..nJ (numerators) and b0..bJ (what the shrinking took away) for the J + 1 candidates of SIZES; their denominators are the rows."""

    sizes: ClassVar[tuple[float, ...]] = SIZES

    def shrunk(self, weights_N: Floats, size: float) -> Floats:
        """[N] ŵ"""
        raise NotImplementedError

    def finish(self, sums_U: Columns) -> Terms:
        chosen = self.choose(sums_U)
        return Terms(sums_U[f"n{chosen}"], sums_U[ROWS], self.sizes[chosen])

    def choose(self, sums_U: Columns) -> int:
        """Index of the candidate with the least estimated mean squared error; of equals the one that shrinks least."""
        rows_U, errors = sums_U[ROWS], []
        for index in range(len(self.sizes)):
            _, error = _mean_and_error(sums_U[f"n{index}"], rows_U)
            bias, _ = _mean_and_error(sums_U[f"b{index}"], rows_U)
            errors.append(error**2 + bias**2)
        return len(errors) - 1 - int(np.argmin(errors[::-1]))

    def terms(self, slates: LoggedSlates, policy: EvaluatedPolicy) -> Terms:
        """As of every estimator; the parameter is chosen from sums by user, as `finish` does after a stream."""
        self.check(slates, policy)
        columns = {ROWS: np.ones(slates.rows), **self.columns(slates, policy)}
        sums = UserSums.build(slates.users_N, columns)
        chosen = self.choose({name: sums[name] for name in columns})
        return Terms(columns[f"n{chosen}"], columns[ROWS], self.sizes[chosen])


class ClippedIPS(_Tuned):
    """Σ min(w, τ) r / N (Ionides, JCGS 2008: truncated importance sampling; Bottou et al., JMLR 2013). τ is chosen as above, with q̂ = 0.

    Biased downwards, since clicks are never negative: weight is only taken away.
    """

    name, title = "clipped_ips", "clipped inverse propensity"
    assumes = "As inverse propensity; trades a downward bias for less variance, by a choice made from this log."

    def shrunk(self, weights_N: Floats, size: float) -> Floats:
        return np.minimum(weights_N, size)

    def columns(self, slates: LoggedSlates, policy: EvaluatedPolicy) -> dict[str, Floats]:
        columns, full = {}, policy.weights_N * slates.rewards_N
        for index, size in enumerate(self.sizes):
            columns[f"n{index}"] = full if np.isinf(size) else self.shrunk(policy.weights_N, size) * slates.rewards_N
            columns[f"b{index}"] = columns[f"n{index}"] - full
        return columns


class _ShrunkDR(_Tuned):
    sizes = (0.0, *SIZES)

    def refuses(self, slates: LoggedSlates, policy: EvaluatedPolicy) -> str | None:
        if policy.direct_N is None:
            return DIRECT
        return needs_model(slates, policy)

    def columns(self, slates: LoggedSlates, policy: EvaluatedPolicy) -> dict[str, Floats]:
        assert slates.predicted_N is not None and policy.expected_N is not None and policy.direct_N is not None
        residual = slates.rewards_N - slates.predicted_N
        ahead = policy.expected_N - policy.direct_N if slates.lists else None  # 0 in one-item requests
        full = self._numerators(policy, residual, ahead, np.inf)
        columns = {}
        for index, size in enumerate(self.sizes):
            columns[f"n{index}"] = full if np.isinf(size) else self._numerators(policy, residual, ahead, size)
            columns[f"b{index}"] = columns[f"n{index}"] - full
        return columns

    def _numerators(self, policy: EvaluatedPolicy, residual_N: Floats, ahead_N: Floats | None, size: float) -> Floats:
        assert policy.direct_N is not None
        if size == 0:
            return policy.direct_N
        numerators = policy.direct_N + self.shrunk(policy.weights_N, size) * residual_N
        return numerators if ahead_N is None else numerators + self.shrunk(policy.above_N, size) * ahead_N


class SwitchDR(_ShrunkDR):
    """ŵ = w where w <= τ, else 0: there the reward model alone is trusted (Wang et al., ICML 2017)."""

    name, title = "switch_dr", "switch doubly robust"
    assumes = "As doubly robust; trusts the reward model alone where weights are large, by a choice made from this log."

    def shrunk(self, weights_N: Floats, size: float) -> Floats:
        return weights_N if np.isinf(size) else np.where(weights_N <= size, weights_N, 0.0)


class ShrinkageDR(_ShrunkDR):
    """ŵ = λ w / (w² + λ), λ = size²: optimistic shrinkage, DRos (Su et al., ICML 2020). ŵ is w / 2 at w = size, and falls beyond."""

    name, title = "shrinkage_dr", "shrinkage doubly robust"
    assumes = "As doubly robust; leans on the reward model the more the larger the weight, by a choice made from this log."

    def shrunk(self, weights_N: Floats, size: float) -> Floats:
        return weights_N if np.isinf(size) else weights_N / (1.0 + (weights_N / size) ** 2)


def _mean_and_error(values_U: Floats, rows_U: Floats) -> tuple[float, float]:
    """Σ values / Σ rows and its standard error over users (0 where there is one user)."""
    rows, users = float(rows_U.sum()), len(rows_U)
    mean = float(values_U.sum()) / rows
    if users < 2:
        return mean, 0.0
    rest_U = values_U - mean * rows_U
    return mean, float(np.sqrt(rest_U @ rest_U * users / (users - 1))) / rows
