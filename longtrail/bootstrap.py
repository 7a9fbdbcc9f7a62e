"""Intervals of metrics, clustered by user: a user's rows are not independent, so whole users are resampled.

R replicates, U users, M metrics.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm, t

from longtrail.metrics import Contributions

Key = TypeVar("Key")
_BLOCK = 1 << 22  # counts held at a time (32 MB)


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A value with its confidence interval. None is undefined, and `reason` says why."""

    value: float | None
    low: float | None = None
    high: float | None = None
    reason: str | None = None

    def json(self) -> dict[str, Any]:
        plain: dict[str, Any] = {"value": self.value, "low": self.low, "high": self.high}
        return plain if self.reason is None else {**plain, "reason": self.reason}


def resample_counts(clusters: int, replicates: int, seed: int) -> Iterator[NDArray[np.float64]]:
    """Blocks [r, U] of how often each cluster is drawn in a replicate that draws U of U with replacement; r summed over blocks is R.

    A function of the arguments alone, so that two models compared with the same seed are compared on the same users.
    """
    rng = np.random.default_rng(seed)
    block = max(1, min(replicates, _BLOCK // max(clusters, 1)))
    for start in range(0, replicates, block):
        rows = min(block, replicates - start)
        drawn = rng.integers(clusters, size=(rows, clusters)) + np.arange(rows)[:, None] * clusters
        yield np.bincount(drawn.ravel(), minlength=rows * clusters).reshape(rows, clusters).astype(np.float64)


def resampled_sums(values_UM: NDArray[np.float64], *, replicates: int, seed: int) -> NDArray[np.float64]:
    """[R, M]: column sums of `values_UM` over resampled users."""
    if values_UM.shape[0] == 0 or values_UM.shape[1] == 0:
        return np.zeros((replicates, values_UM.shape[1]))
    return np.concatenate([counts_rU @ values_UM for counts_rU in resample_counts(len(values_UM), replicates, seed)])


def tail(users: int, confidence: float, freedom: float | None = None) -> float:
    """The lower percentile of an expanded-percentile interval: further out than (1 - confidence) / 2, as plain percentiles are too narrow for few
    users (Hesterberg, The American Statistician 2015). `users` at least 2; `freedom`, where the variance rests on fewer than all of them.
    """
    degrees = users - 1 if freedom is None else freedom
    return float(norm.cdf(np.sqrt(users / (users - 1)) * t.ppf((1 - confidence) / 2, degrees)))


def intervals(metrics: Mapping[Key, Contributions], *, confidence: float = 0.95, replicates: int = 1_000, seed: int = 0) -> dict[Key, Estimate]:
    """Expanded-percentile bootstrap interval of every metric, from one resampling shared by all.

    All metrics must number the same U users. A replicate that draws no user of a small slice says nothing of it and is left out.
    """
    defined = {key: metric for key, metric in metrics.items() if metric.reason is None}
    result = {key: Estimate(value=None, reason=metric.reason) for key, metric in metrics.items()}
    if not defined:
        return result
    drawn = _replicates(list(defined.values()), replicates, seed)
    return result | {key: _interval(metric.value, drawn[:, m], metric.users, confidence) for m, (key, metric) in enumerate(defined.items())}


def differences(
    before: Mapping[Key, Contributions], after: Mapping[Key, Contributions], *, confidence: float = 0.95, replicates: int = 1_000, seed: int = 0
) -> dict[Key, Estimate]:
    """`after` less `before` of every metric that both have, with the interval of the paired difference: both on the same resampled users.

    Both must number the same U users, as `intervals` must. Models err on the same users, so this is narrower than two intervals side by side.
    Raises ValueError where a metric's users are not as many in both.
    """
    both = [key for key in before if key in after]
    for key in both:
        if (one := len(before[key].numerators_U)) != (other := len(after[key].numerators_U)):
            raise ValueError(f"{key}: {one} users before, {other} after; expected the same users, numbered alike")
    result = {key: Estimate(value=None, reason=before[key].reason or after[key].reason) for key in both}
    defined = [key for key in both if result[key].reason is None]
    if not defined:
        return result
    drawn = _replicates([metrics[key] for metrics in (before, after) for key in defined], replicates, seed)
    for m, key in enumerate(defined):
        value = after[key].numerators_U.sum() / after[key].denominators_U.sum() - before[key].numerators_U.sum() / before[key].denominators_U.sum()
        result[key] = _interval(float(value), drawn[:, len(defined) + m] - drawn[:, m], min(before[key].users, after[key].users), confidence)
    return result


def _replicates(metrics: Sequence[Contributions], replicates: int, seed: int) -> NDArray[np.float64]:
    """[R, M]: each metric over resampled users; NaN where none of them has rows of it."""
    stacked_UM = np.stack([column for m in metrics for column in (m.numerators_U, m.denominators_U)], axis=1)
    sums_RM = resampled_sums(stacked_UM, replicates=replicates, seed=seed)
    numerators_RM, denominators_RM = sums_RM[:, ::2], sums_RM[:, 1::2]
    ratios_RM = np.divide(numerators_RM, denominators_RM, out=np.full_like(numerators_RM, np.nan), where=denominators_RM > 0)
    return np.clip(ratios_RM, *np.array([m.bounds for m in metrics]).T)


def _interval(value: float | None, drawn_R: NDArray[np.float64], users: int, confidence: float) -> Estimate:
    usable_R = ~np.isnan(drawn_R)
    if users < 2 or not usable_R.any():
        return Estimate(value=value, reason=f"no interval: {users} user(s)")
    outside = tail(users, confidence)
    low, high = np.quantile(drawn_R[usable_R], [outside, 1 - outside])
    return Estimate(value=value, low=float(low), high=float(high))
