"""Sums over the weights of one policy on one log, which merge: what the figures about overlap are made of.

R requests. A request's weight is the mean of w_{1:k} over its rows: what its clicks are multiplied by.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longtrail.offpolicy.slates import EvaluatedPolicy, LoggedSlates
from longtrail.schema import Propensity

Floats = NDArray[np.float64]

_STEPS = 8  # bins an octave: a quantile is known to within 2^(1/8), 9 %
_OCTAVES = 20  # on either side of 1
EDGES = 2.0 ** (np.arange(-_OCTAVES * _STEPS, _OCTAVES * _STEPS + 1) / _STEPS)
UNUSED = 0.01  # our choice: a request that weighs less is hardly ever shown by the policy


@dataclass(frozen=True, kw_only=True)
class WeightSums:
    """All are sums over requests but for `forced`, a count of rows. `counts` is a histogram over EDGES; the outer bins hold all beyond them."""

    requests: int
    total: float
    squares: float
    below_one: float  # Σ min(w, 1)
    unused: int
    largest: float
    forced: int  # rows logged with propensity 1 that the policy would not surely have shown
    rows: int
    counts: Floats = field(repr=False)

    @classmethod
    def of(cls, slates: LoggedSlates, policy: EvaluatedPolicy) -> "WeightSums":
        weight_R = request_weights(slates, policy)
        place = np.log2(np.clip(weight_R, EDGES[0], EDGES[-1] * (1 - 1e-12))) * _STEPS + _OCTAVES * _STEPS
        counts = np.bincount(np.clip(place.astype(np.int64), 0, len(EDGES) - 2), minlength=len(EDGES) - 1)
        forced = (slates.propensities_N >= 1 - 1e-12) & (policy.probabilities_N < 1 - 1e-6)
        return cls(
            requests=len(weight_R),
            total=float(weight_R.sum()),
            squares=float(weight_R @ weight_R),
            below_one=float(np.minimum(weight_R, 1.0).sum()),
            unused=int((weight_R < UNUSED).sum()),
            largest=float(weight_R.max()),
            forced=int(forced.sum()),
            rows=slates.rows,
            counts=counts.astype(np.float64),
        )

    def merge(self, other: "WeightSums") -> "WeightSums":
        added = {name: getattr(self, name) + getattr(other, name) for name in vars(self) if name != "largest"}
        return WeightSums(**added, largest=max(self.largest, other.largest))

    @property
    def effective(self) -> float:
        """(Σ w)² / Σ w²: how many equally weighted requests would be as precise (Kish, Survey Sampling, 1965); 0 where all weights are."""
        return self.total**2 / self.squares if self.squares > 0 else 0.0

    def quantile(self, share: float) -> float:
        """The weight below which this share of requests lies, to within 9 %; the largest at 1."""
        place = int(np.searchsorted(np.cumsum(self.counts), share * self.requests))
        return min(float(EDGES[min(place + 1, len(EDGES) - 1)]), self.largest) if self.largest > 0 else 0.0

    def histogram(self, octaves: int = 8) -> dict[str, list[float]]:
        """{"edges": powers of 2, "shares": of requests}, the outer bins hold all beyond them: for a picture."""
        middle = len(self.counts) // 2
        inner = self.counts[middle - octaves * _STEPS : middle + octaves * _STEPS].reshape(-1, _STEPS).sum(axis=1)
        inner[0] += self.counts[: middle - octaves * _STEPS].sum()
        inner[-1] += self.counts[middle + octaves * _STEPS :].sum()
        edges = 2.0 ** np.arange(-octaves, octaves + 1)
        return {"edges": edges.tolist(), "shares": (inner / max(self.requests, 1)).tolist()}


def request_weights(slates: LoggedSlates, policy: EvaluatedPolicy) -> Floats:
    """[R] the mean of `list_weights` over each request's rows."""
    return np.bincount(slates.requests_N, weights=list_weights(slates, policy)) / np.bincount(slates.requests_N)


def list_weights(slates: LoggedSlates, policy: EvaluatedPolicy) -> Floats:
    """[N] what each row's click is multiplied by: w_{1:k}, or the row's own ratio where a list's propensities are marginal. 1 on average."""
    own = slates.lists and slates.kind is Propensity.MARGINAL and not slates.independent_places
    return policy.ratios_N if own else policy.weights_N


def summary(sums: WeightSums) -> dict[str, Any]:
    """What a report shows of them, as JSON."""
    points = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p99.9": 0.999}
    return {
        "requests": sums.requests,
        "effective_requests": sums.effective,
        "overlap": sums.below_one / max(sums.requests, 1),
        "unused_share": sums.unused / max(sums.requests, 1),
        "support_violations": sums.forced / max(sums.rows, 1),
        "largest_weight": sums.largest,
        "weight_quantiles": {name: sums.quantile(point) for name, point in points.items()},
        "weight_histogram": sums.histogram(),
    }
