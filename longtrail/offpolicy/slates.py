"""A log of shown lists, and what the policies under test would have done with them: the estimators' only input.

N logged rows (an item shown), sorted by request and position. Only the *logged* item's probability under each policy is needed, so the size of
the catalogue does not matter, and everything an estimate needs is a sum over rows: logs can be read in blocks and the sums merged (`sums.py`).
"""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

from longtrail.errors import EvaluationError
from longtrail.schema import Propensity

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class LoggedSlates:
    """Make it with `LoggedSlates.build`, which checks and sorts. All arrays are [N]; `order_N` says which input row each came from.

    kind                what `propensities_N` means in a list; estimators refuse the kind that they would be wrong with
    estimated           no propensity was logged and these were estimated from the log: whatever is made of them says so
    independent_places  declared: logger and policies choose every place regardless of the others (separate pools, or items may repeat), so that
                        conditional and marginal propensities are one thing
    lists               some request of the log (perhaps in another block of it) shows several items
    first_request       number of requests in the blocks of the log before this one
    """

    requests_N: Ints  # 0..R-1, not decreasing
    users_N: Ints
    positions_N: Ints  # 1.. down the list
    rewards_N: Floats
    propensities_N: Floats  # P(logged item at its position [| the items above, where conditional]), under the logging policy
    places_N: Ints  # 0.. within the request
    order_N: Ints
    predicted_N: Floats | None = None  # the reward model's value of the logged item, from a model that was not fitted on its user
    kind: Propensity = Propensity.CONDITIONAL
    estimated: bool = False
    independent_places: bool = False
    lists: bool = True
    first_request: int = 0

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
        estimated: bool = False,
        independent_places: bool = False,
        lists: bool | None = None,
        first_request: int = 0,
    ) -> "LoggedSlates":
        """Check and sort a log given as equally long columns; requests may be of any type that sorts.

        A request of several rows is a list: its positions must run 1, 2, 3, … . A request of one row may stand at any position, which is then
        part of its context (the Open Bandit Dataset logs so): conditional and marginal propensities are the same thing there.
        `lists` None: as this log has it; a block of a longer log says what the whole log has.

        Raises EvaluationError naming the row (from 0) when a propensity is missing or not in (0, 1], a reward is not finite, a list has a gap, or
        a request has two users.
        """
        request_of_row = _numbered(np.asarray(requests))
        users, positions = np.asarray(users, np.int64), np.asarray(positions, np.int64)
        rewards, propensities = np.asarray(rewards, np.float64), np.asarray(propensities, np.float64)
        for name, column in (("users", users), ("positions", positions), ("rewards", rewards), ("propensities", propensities)):
            if column.shape != request_of_row.shape:
                raise EvaluationError(f"logged slates: {name} has shape {column.shape}; expected {request_of_row.shape}, one entry a row")
        if not len(users):
            raise EvaluationError("logged slates: no rows; expected at least one impression")
        if kind is Propensity.NONE:
            raise EvaluationError(
                "logged slates: the log has no propensities; expected conditional or marginal ones (or estimated ones, declared so)"
            )
        _refuse(np.isnan(propensities), propensities, "propensity is missing; expected a number in (0, 1]")
        _refuse((propensities <= 0) | (propensities > 1), propensities, "propensity must lie in (0, 1]: what was shown had a chance to be shown")
        _refuse(~np.isfinite(rewards), rewards, "reward must be a finite number")
        order = _order(request_of_row, positions)
        request, user, position = request_of_row[order], users[order], positions[order]
        starts = np.flatnonzero(np.diff(request, prepend=-1))
        lengths = np.diff(np.append(starts, len(request)))
        places = np.arange(len(request)) - np.repeat(starts, lengths)
        in_list = np.repeat(lengths, lengths) > 1
        _refuse(in_list & (position != places + 1), position, "position leaves a gap or repeats one in its request; expected 1, 2, 3, …", order)
        _refuse(user != np.repeat(user[starts], lengths), user, "user differs from that of the same request's first row", order)
        return cls(
            requests_N=request.astype(np.int64),
            users_N=user,
            positions_N=position,
            rewards_N=rewards[order],
            propensities_N=propensities[order],
            places_N=places,
            order_N=order,
            predicted_N=None if predicted is None else np.asarray(predicted, np.float64)[order],
            kind=kind,
            estimated=estimated,
            independent_places=independent_places,
            lists=bool(in_list.any()) if lists is None else lists,
            first_request=first_request,
        )

    @property
    def rows(self) -> int:
        return len(self.requests_N)

    @property
    def requests(self) -> int:
        return int(self.requests_N[-1]) + 1

    @cached_property
    def _rows_by_place(self) -> list[Ints]:
        """The rows of each place below the top, in order."""
        if not len(self.places_N) or not self.places_N.any():
            return []
        by_place = np.argsort(self.places_N, kind="stable")
        bounds = np.searchsorted(self.places_N[by_place], np.arange(int(self.places_N.max()) + 2))
        return [by_place[bounds[place] : bounds[place + 1]] for place in range(1, len(bounds) - 1)]

    @cached_property
    def bottom_N(self) -> Ints:  # noqa: N802 (a column)
        """[N] the row at the bottom of each row's list."""
        last_R = np.flatnonzero(np.diff(self.requests_N, append=-1))
        return last_R[self.requests_N]

    def with_predictions(self, predicted: ArrayLike) -> "LoggedSlates":
        """`predicted` is in the order of the input rows. Raises EvaluationError when an entry is not finite."""
        values = np.asarray(predicted, np.float64)
        _refuse(~np.isfinite(values), values, "the reward model's prediction must be a finite number")
        return replace(self, predicted_N=values[self.order_N])

    def down_the_list(self, ratios_N: Floats) -> Floats:
        """[N] the product of `ratios_N` from the top of the list down to each row. One vectorised step a place, no loop over rows."""
        product = ratios_N.astype(np.float64, copy=True)
        for rows in self._rows_by_place:
            product[rows] *= product[rows - 1]
        return product


@dataclass(frozen=True, kw_only=True)
class EvaluatedPolicy:
    """What one policy under test would have done, [N] in the order of the slates' rows (`slates.order_N` sorts an input column so).

    ratios_N    v_k = π / p of the row alone; both of the log's kind (conditional or marginal)
    weights_N   w_{1:k} = Π_{j<=k} v_j: with conditional probabilities, how much more often π shows this beginning of the list
    above_N     w_{1:k-1}, 1 at the top
    expected_N  E_π[reward model | the logged items above] at the row's position; needed by the doubly robust estimators
    direct_N    E_π[reward model] at the row's position with the items above drawn from π as well; in one-item requests it is expected_N
    list_weights_N  the pseudo-inverse weight of the row's list, where it is known (`pseudo_inverse.py`)
    """

    name: str
    weights_N: Floats
    above_N: Floats
    probabilities_N: Floats
    ratios_N: Floats
    expected_N: Floats | None = None
    direct_N: Floats | None = None
    list_weights_N: Floats | None = None

    @classmethod
    def build(
        cls,
        name: str,
        slates: LoggedSlates,
        probabilities: ArrayLike,
        *,
        expected: ArrayLike | None = None,
        direct: ArrayLike | None = None,
        list_weights: ArrayLike | None = None,
    ) -> "EvaluatedPolicy":
        """`probabilities`: the policy's P(logged item), of the same kind as the log's propensities; all in the order of the log's input rows.

        Raises EvaluationError naming policy and row when a probability is missing or not in [0, 1].
        """
        values = np.asarray(probabilities, np.float64)
        if values.shape != slates.order_N.shape:
            raise EvaluationError(f"policy {name}: probabilities have shape {values.shape}; expected {slates.order_N.shape}, one a logged row")
        _refuse(~((values >= 0) & (values <= 1 + 1e-9)), values, f"policy {name}: the probability of the logged item must lie in [0, 1]")
        values = np.minimum(values[slates.order_N], 1.0)
        ratios = values / slates.propensities_N
        weights = slates.down_the_list(ratios)
        above = np.where(slates.places_N == 0, 1.0, np.roll(weights, 1))
        expected_N = _sorted(name, "expected reward", slates, expected)
        direct_N = _sorted(name, "direct reward", slates, direct)
        if direct_N is None and not slates.lists:
            direct_N = expected_N
        return cls(
            name=name,
            weights_N=weights,
            above_N=above,
            probabilities_N=values,
            ratios_N=ratios,
            expected_N=expected_N,
            direct_N=direct_N,
            list_weights_N=_sorted(name, "pseudo-inverse weight", slates, list_weights),
        )


def _sorted(name: str, what: str, slates: LoggedSlates, given: ArrayLike | None) -> Floats | None:
    if given is None:
        return None
    values = np.asarray(given, np.float64)
    if values.shape != slates.order_N.shape:
        raise EvaluationError(f"policy {name}: the {what} has shape {values.shape}; expected {slates.order_N.shape}, one a logged row")
    _refuse(~np.isfinite(values), values, f"policy {name}: the {what} must be a finite number")
    return values[slates.order_N]


def _numbered(requests_N: NDArray) -> Ints:
    """[N] requests numbered from 0 in sorted order; a numeric column that never decreases needs no sorting."""
    if requests_N.ndim == 1 and requests_N.dtype.kind in "iu" and len(requests_N) and (requests_N[1:] >= requests_N[:-1]).all():
        return np.cumsum(np.diff(requests_N, prepend=requests_N[:1]) > 0)
    _, number = np.unique(requests_N, return_inverse=True)
    return number


def _order(request_N: Ints, positions_N: Ints) -> Ints:
    """[N] rows by request, then position; rows that stand so are left alone."""
    step, down = np.diff(request_N), np.diff(positions_N)
    if ((step > 0) | ((step == 0) & (down >= 0))).all():
        return np.arange(len(request_N))
    return np.lexsort((positions_N, request_N))


def _refuse(bad: NDArray[np.bool_], values: NDArray, why: str, order: Ints | None = None) -> None:
    """Raise EvaluationError naming the first bad row of the input (`order` maps sorted rows back to it)."""
    if bad.any():
        rows = np.flatnonzero(bad)
        row = int(rows[0] if order is None else order[rows].min())
        value = values[rows[0]] if order is None else values[rows[np.argmin(order[rows])]]
        raise EvaluationError(f"logged slates: row {row}: {why}; got {value} ({len(rows)} such row(s))")
