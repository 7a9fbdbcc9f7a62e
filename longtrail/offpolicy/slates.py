"""A log of shown lists, and what the policies under test would have done with them: the estimators' only input.

N logged rows (an item shown), sorted by request and position. Only the *logged* item's probability under each policy is needed, so the size of
the catalogue does not matter, and everything an estimate needs is a sum over rows: logs can be read in blocks and the sums merged (`sums.py`).
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from longtrail.errors import EvaluationError
from longtrail.schema import Propensity

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class LoggedSlates:
    """Make it with `LoggedSlates.build`, which checks and sorts. All arrays are [N]; `order_N` says which input row each came from."""

    requests_N: Ints  # 0..R-1, not decreasing
    users_N: Ints
    positions_N: Ints  # 1.. down the list
    rewards_N: Floats
    propensities_N: Floats  # P(logged item at its position | the items above), under the logging policy
    places_N: Ints  # 0.. within the request
    order_N: Ints
    predicted_N: Floats | None = None  # the reward model's value of the logged item, from a model that was not fitted on its user

    @classmethod
    def build(
        cls,
        *,
        requests: ArrayLike,
        users: ArrayLike,
        positions: ArrayLike,
        rewards: ArrayLike,
        propensities: ArrayLike,
        kind: Propensity = Propensity.CONDITIONAL,
        predicted: ArrayLike | None = None,
    ) -> "LoggedSlates":
        """Check and sort a log given as equally long columns; requests may be of any type that sorts.

        A request of several rows is a list: its positions must run 1, 2, 3, … . A request of one row may stand at any position, which is then
        part of its context (the Open Bandit Dataset logs so): conditional and marginal propensities are the same thing there.

        Raises EvaluationError naming the row (from 0) when a propensity is missing, not in (0, 1] or not of the right kind, a reward is not
        finite, a list has a gap, or a request has two users.
        """
        _, request_of_row = np.unique(np.asarray(requests), return_inverse=True)
        users, positions = np.asarray(users, np.int64), np.asarray(positions, np.int64)
        rewards, propensities = np.asarray(rewards, np.float64), np.asarray(propensities, np.float64)
        for name, column in (("users", users), ("positions", positions), ("rewards", rewards), ("propensities", propensities)):
            if column.shape != request_of_row.shape:
                raise EvaluationError(f"logged slates: {name} has shape {column.shape}; expected {request_of_row.shape}, one entry a row")
        if not len(users):
            raise EvaluationError("logged slates: no rows; expected at least one impression")
        if kind is Propensity.NONE:
            raise EvaluationError("logged slates: the log has no propensities; expected conditional ones (or marginal ones of one-item requests)")
        _refuse(np.isnan(propensities), propensities, "propensity is missing; expected a number in (0, 1]")
        _refuse((propensities <= 0) | (propensities > 1), propensities, "propensity must lie in (0, 1]: what was shown had a chance to be shown")
        _refuse(~np.isfinite(rewards), rewards, "reward must be a finite number")
        order = np.lexsort((positions, request_of_row))
        request, user, position = request_of_row[order], users[order], positions[order]
        starts = np.flatnonzero(np.diff(request, prepend=-1))
        lengths = np.diff(np.append(starts, len(request)))
        places = np.arange(len(request)) - np.repeat(starts, lengths)
        in_list = np.repeat(lengths, lengths) > 1
        _refuse(in_list & (position != places + 1), position, "position leaves a gap or repeats one in its request; expected 1, 2, 3, …", order)
        _refuse(user != np.repeat(user[starts], lengths), user, "user differs from that of the same request's first row", order)
        if kind is Propensity.MARGINAL and in_list.any():
            row, longest = int(order[np.argmax(in_list)]), int(lengths.max())
            raise EvaluationError(
                f"logged slates: row {row}: the propensities are marginal but its request shows several items (up to {longest}); the product of "
                "ratios down a list needs conditional ones, P(item | the items above it)"
            )
        return cls(
            requests_N=request.astype(np.int64),
            users_N=user,
            positions_N=position,
            rewards_N=rewards[order],
            propensities_N=propensities[order],
            places_N=places,
            order_N=order,
            predicted_N=None if predicted is None else np.asarray(predicted, np.float64)[order],
        )

    @property
    def rows(self) -> int:
        return len(self.requests_N)

    @property
    def requests(self) -> int:
        return int(self.requests_N[-1]) + 1

    def with_predictions(self, predicted: ArrayLike) -> "LoggedSlates":
        """`predicted` is in the order of the input rows. Raises EvaluationError when an entry is not finite."""
        values = np.asarray(predicted, np.float64)
        _refuse(~np.isfinite(values), values, "the reward model's prediction must be a finite number")
        return replace(self, predicted_N=values[self.order_N])

    def down_the_list(self, ratios_N: Floats) -> Floats:
        """[N] the product of `ratios_N` from the top of the list down to each row. One vectorised step a place, no loop over rows."""
        product = ratios_N.astype(np.float64, copy=True)
        by_place = np.argsort(self.places_N, kind="stable")
        bounds = np.searchsorted(self.places_N[by_place], np.arange(int(self.places_N.max(initial=0)) + 2))
        for place in range(1, len(bounds) - 1):
            rows = by_place[bounds[place] : bounds[place + 1]]
            product[rows] *= product[rows - 1]
        return product


@dataclass(frozen=True, kw_only=True)
class EvaluatedPolicy:
    """What one policy under test would have done, [N] in the order of the slates' rows (`slates.order_N` sorts an input column so).

    weights_N   w_{1:k} = Π_{j<=k} π(item j | items above) / p(item j | items above): how much more often π shows this beginning of the list
    above_N     w_{1:k-1}, 1 at the top
    expected_N  E_π[reward model | the logged items above] at the row's position; needed by the doubly robust estimator only
    """

    name: str
    weights_N: Floats
    above_N: Floats
    probabilities_N: Floats
    expected_N: Floats | None = None

    @classmethod
    def build(cls, name: str, slates: LoggedSlates, probabilities: ArrayLike, *, expected: ArrayLike | None = None) -> "EvaluatedPolicy":
        """`probabilities`: the policy's conditional P(logged item), and `expected`, both in the order of the log's input rows.

        Raises EvaluationError naming policy and row when a probability is missing or not in [0, 1].
        """
        values = np.asarray(probabilities, np.float64)
        if values.shape != slates.order_N.shape:
            raise EvaluationError(f"policy {name}: probabilities have shape {values.shape}; expected {slates.order_N.shape}, one a logged row")
        _refuse(~((values >= 0) & (values <= 1 + 1e-9)), values, f"policy {name}: the probability of the logged item must lie in [0, 1]")
        values = np.minimum(values[slates.order_N], 1.0)
        weights = slates.down_the_list(values / slates.propensities_N)
        above = np.where(slates.places_N == 0, 1.0, np.roll(weights, 1))
        sorted_expected = None
        if expected is not None:
            sorted_expected = np.asarray(expected, np.float64)
            _refuse(~np.isfinite(sorted_expected), sorted_expected, f"policy {name}: the expected reward must be a finite number")
            sorted_expected = sorted_expected[slates.order_N]
        return cls(name=name, weights_N=weights, above_N=above, probabilities_N=values, expected_N=sorted_expected)


def _refuse(bad: NDArray[np.bool_], values: NDArray, why: str, order: Ints | None = None) -> None:
    """Raise EvaluationError naming the first bad row of the input (`order` maps sorted rows back to it)."""
    if bad.any():
        rows = np.flatnonzero(bad)
        row = int(rows[0] if order is None else order[rows].min())
        value = values[rows[0]] if order is None else values[rows[np.argmin(order[rows])]]
        raise EvaluationError(f"logged slates: row {row}: {why}; got {value} ({len(rows)} such row(s))")
