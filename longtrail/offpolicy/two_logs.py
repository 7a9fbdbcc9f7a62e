"""Two logs of two policies that ran side by side without contexts: what would each have got, judged from the other's log?

N rows of one item each at one of P positions (context), I items. This is how the Open Bandit Dataset was made, so the answer is known.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student

from longtrail.errors import EvaluationError
from longtrail.offpolicy.columns import finish, refusals, user_columns
from longtrail.offpolicy.diagnostics import diagnose
from longtrail.offpolicy.intervals import Interval, standard_error
from longtrail.offpolicy.list_estimators import ONE_ITEM
from longtrail.offpolicy.reward import cell_means
from longtrail.offpolicy.slates import EvaluatedPolicy, LoggedSlates
from longtrail.offpolicy.sums import UserSums
from longtrail.schema import Propensity

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class PolicyLog:
    """One policy's log. Items run from 0 to I - 1 and positions from 0 to P - 1, the same in both logs."""

    name: str
    items_N: Ints
    positions_N: Ints
    users_N: Ints
    clicks_N: Floats
    propensities_N: Floats


@dataclass(frozen=True, kw_only=True)
class CrossEstimate:
    """`target`'s rate from `log`'s rows, by estimator; `real` is what it got in its own log; `gap` = estimate − real.

    `refused` says which estimators this log does not allow, and why.
    """

    log: str
    target: str
    propensities: str  # how the target's probabilities were known
    estimates: dict[str, Interval]
    real: Interval
    gap: dict[str, Interval]
    effective_rows: float
    mean_weight: float
    rows: int
    clicks: int
    tuned: dict[str, float]  # estimator → the parameter that was chosen from the data
    refused: dict[str, str]
    replay_rows: int  # rows that replay kept: with a handful of clicks among them its interval means nothing

    def json(self) -> dict[str, Any]:
        plain = {key: value for key, value in vars(self).items() if key not in ("estimates", "gap", "real", "tuned")}
        plain["tuned"] = {name: value if np.isfinite(value) else None for name, value in self.tuned.items()}  # None: no shrinkage at all
        named = {"estimates": self.estimates, "gap": self.gap}
        return {**plain, "real": self.real.json()} | {key: {name: i.json() for name, i in group.items()} for key, group in named.items()}


def action_probabilities(log: PolicyLog, items: int, positions: int) -> tuple[Floats, bool]:
    """[P, I] P(item | position) of the policy that made `log`, and whether it is exact.

    Exact where each (item, position) was always logged with one propensity and these add up to 1. A policy that learns while it runs has none
    such; its average is then estimated by the share of each item among the rows at a position. The mean *logged* propensity would be wrong: an item
    is logged most often while its propensity is high, so the means add up to more than 1 (1.7 to 3.7 in the Open Bandit Dataset's bts logs).
    """
    cell_N = log.positions_N * items + log.items_N
    shown = np.bincount(cell_N, minlength=items * positions).astype(np.float64)
    lowest, highest = np.full(items * positions, np.inf), np.full(items * positions, -np.inf)
    np.minimum.at(lowest, cell_N, log.propensities_N)
    np.maximum.at(highest, cell_N, log.propensities_N)
    seen = shown > 0
    constant = bool((highest[seen] <= lowest[seen] * (1 + 1e-6)).all())
    fixed = np.where(seen, highest, 0.0).reshape(positions, items)
    if constant and np.allclose(fixed.sum(axis=1), 1.0, atol=1e-3):
        return fixed / fixed.sum(axis=1, keepdims=True), True
    at_position = shown.reshape(positions, items).sum(axis=1, keepdims=True)
    if (at_position == 0).any():
        raise EvaluationError(f"log of {log.name}: position {int(np.argmin(at_position)) + 1} was never shown; expected rows at every position")
    return shown.reshape(positions, items) / at_position, False


def cross_estimate(log: PolicyLog, target: PolicyLog, *, items: int, positions: int, confidence: float = 0.95) -> CrossEstimate:
    """The rate of `target`'s policy from the rows of `log`, beside the rate it really got.

    Assumes that what is clicked does not depend on the other items of the page, that rates did not drift together with a learning policy's
    choices, and that positions are given, not chosen. Influence-function intervals over users; where the target's probabilities were estimated from
    its own log, that log's sampling error is added (two-sample delta method: Σ π̂ q moves with the target's rows as their mean q̂ does).
    """
    pi_PI, exact = action_probabilities(target, items, positions)
    cell_N = log.positions_N * items + log.items_N
    model = cell_means(cell_N, log.clicks_N, log.users_N, items * positions)
    distinct, user_N = np.unique(log.users_N, return_inverse=True)
    model_UPI = model(distinct).reshape(len(distinct), positions, items)
    expected_UP = np.einsum("upi,pi->up", model_UPI, pi_PI)
    slates = LoggedSlates.build(
        requests=np.arange(len(cell_N)),
        users=log.users_N,
        positions=log.positions_N + 1,
        rewards=log.clicks_N,
        propensities=log.propensities_N,
        kind=Propensity.MARGINAL,
        predicted=model_UPI[user_N, log.positions_N, log.items_N],
    )
    policy = EvaluatedPolicy.build(target.name, slates, pi_PI[log.positions_N, log.items_N], expected=expected_UP[user_N, log.positions_N])
    extra = 0.0 if exact else _target_error(target, cell_N, log.clicks_N, items, positions)
    real, real_error = _rate(target.users_N, target.clicks_N, np.ones(len(target.clicks_N)), confidence)
    columns = {name: values for name, values in user_columns(slates, policy, policy).items() if "/b/" not in name}
    finished = finish(UserSums.build(slates.users_N, columns))
    estimates, gaps = {}, {}
    quantile = float(student.ppf(0.5 + confidence / 2, len(distinct) - 1))
    for name in finished.estimators:
        value = finished.value(name, "a")
        error = standard_error(finished.sums[f"{name}/a/n"], finished.sums[f"{name}/a/d"])
        estimates[name] = _around(value, quantile * float(np.hypot(error, extra)))
        gaps[name] = _around(value - real.value, quantile * float(np.sqrt(error**2 + extra**2 + real_error**2)))
    figures = diagnose(slates, policy)
    return CrossEstimate(
        log=log.name,
        target=target.name,
        propensities="exact: constant in its log" if exact else "estimated: shares of its log, as it learned while it ran",
        estimates=estimates,
        real=real,
        gap=gaps,
        effective_rows=figures.effective_requests,
        mean_weight=figures.mean_weight,
        rows=slates.rows,
        clicks=int(log.clicks_N.sum()),
        tuned={name: sides["a"] for name, sides in finished.tuned.items()},
        refused={name: why for name, why in {**refusals(slates, policy), **finished.refused}.items() if why != ONE_ITEM},
        replay_rows=int(finished.sums["replay/a/d"].sum()) if "replay" in estimates else 0,
    )


def _target_error(target: PolicyLog, cell_N: Ints, clicks_N: Floats, items: int, positions: int) -> float:
    """Standard error that the estimated probabilities bring: that of the mean click rate of the cells the target's rows fell in."""
    shown = np.bincount(cell_N, minlength=items * positions)
    clicked = np.bincount(cell_N, weights=clicks_N, minlength=items * positions)
    rate = np.divide(clicked, shown, out=np.zeros(items * positions), where=shown > 0)
    values = rate[target.positions_N * items + target.items_N]
    sums = UserSums.build(target.users_N, {"n": values, "d": np.ones(len(values))})
    return standard_error(sums["n"], sums["d"])


def _rate(users_N: Ints, numerators_N: Floats, denominators_N: Floats, confidence: float) -> tuple[Interval, float]:
    sums = UserSums.build(users_N, {"n": numerators_N, "d": denominators_N})
    error = standard_error(sums["n"], sums["d"])
    value = float(numerators_N.sum() / denominators_N.sum()) if denominators_N.sum() > 0 else float("nan")
    return _around(value, float(student.ppf(0.5 + confidence / 2, max(1, len(sums.users_U) - 1))) * error), error


def _around(value: float, half: float) -> Interval:
    return Interval(value=value, low=value - half, high=value + half)
