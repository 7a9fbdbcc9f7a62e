"""Intervals that survive being looked at: every day, after every user, for as long as one likes.

A 95 % interval that is looked at daily, until it happens to leave 0 out, is wrong far more often than once in twenty. Those here hold at all looks
*together* with 95 %, so one may stop whenever one likes. They are wider: that is the price.

    time_uniform         for many users, of the paired difference of any two ratios, users that come back included: what reports use
    betting              for any number of users: no normal approximation; of totals clipped at a stated bound
    empirical_bernstein  the classical one for a sample of fixed size, for comparison

U users in order of arrival, T looks.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from longtrail.errors import EvaluationError
from longtrail.offpolicy.intervals import Comparison, Interval

Floats = NDArray[np.float64]

PLANNED_ROWS = 10_000.0  # our choice: where `time_uniform` is narrowest, 3 standard errors; at a million rows it is 3.6
MIN_USERS = 10.0  # our choice: below this many effective users a normal approximation is not even begun
PILOT = 0.1  # our choice: the share of users that only set the bound of `betting`


def time_uniform(comparison: Comparison, *, rows: float, confidence: float, planned_rows: float = PLANNED_ROWS) -> Interval:
    """The interval of B − A at one look of many, from its clustered standard error (`intervals.influence`) and the rows so far.

    Robbins' normal mixture with an estimated variance: an asymptotic confidence sequence (Waudby-Smith, Arbour, Sinha, Kennedy & Ramdas, Annals
    of Statistics 2024; the boundary: Howard, Ramdas, McAuliffe & Sekhon, Annals of Statistics 2021). Using it with users who come back is ours:
    their rows make the running sums at two looks more alike than independent rows would, so the chance of ever leaving the boundary is
    smaller (Slepian's inequality; `benchmarks/coverage.py` measures it). `planned_rows` must be fixed before looking.
    NaN ends below MIN_USERS effective users: look again later.
    """
    value, error = comparison.difference.value, comparison.error
    if not comparison.effective_users >= MIN_USERS or not np.isfinite(error):
        return Interval(value=value, low=float("nan"), high=float("nan"))
    half = error * mixture_quantile(rows, confidence, planned_rows)
    return Interval(value=value, low=value - half, high=value + half)


def mixture_quantile(rows: float, confidence: float, planned_rows: float = PLANNED_ROWS) -> float:
    """What stands in the place of 1.96: standard errors on either side, at this many rows."""
    alpha = 1 - confidence
    rho = planned_rows / (2 * np.log(1 / alpha) + np.log(1 + 2 * np.log(1 / alpha)))  # the boundary is then narrowest near planned_rows
    return float(np.sqrt((1 + rho / rows) * np.log((rows + rho) / (rho * alpha**2))))


@dataclass(frozen=True, kw_only=True)
class Betting:
    """`bound` is what a user's total is clipped at, and `clipped` how many users were: the interval is about totals so clipped."""

    interval: Interval
    bound: float
    clipped: int
    users: int


def betting(numerators_U: Floats, denominators_U: Floats, *, confidence: float, plan: int | None = None, pilot: float = PILOT) -> Betting:
    """Interval of Σ numerators / Σ denominators for users in the order given, valid at any time and for any number of users.

    For the paired difference of two estimators over the same denominators, give the differences of their numerators.
    For each value m of the ratio, M_u = N_u − m D_u has mean 0 if m is true. Bets λ_u M_u on either sign with half of the wealth each: a
    value that would have made the better fortune grow to 2 / α is out (hedged capital: Waudby-Smith & Ramdas, JRSS B 2024; for a ratio, ours).
    Bets are set by what came before (`plan`: the number of users the bets are tuned for, default all of them).

    M_u must be bounded. Weights have no useful bound, so the first `pilot` share of users only sets one: five times their root mean square
    total; later totals are clipped at it (predictable, ours). The interval is exact for the mean so clipped; `clipped` says how often that was.
    Raises EvaluationError below 20 users.
    """
    users = len(numerators_U)
    if users < 20:
        raise EvaluationError(f"betting interval: {users} users; expected at least 20")
    first = max(10, int(pilot * users))
    size = float(denominators_U[:first].mean())
    centre = float(numerators_U[:first].sum() / denominators_U[:first].sum())
    top, bottom = numerators_U[first:] / size, denominators_U[first:] / size
    spread = float(np.sqrt(np.mean((numerators_U[:first] / size - centre * denominators_U[:first] / size) ** 2)))
    bound = 5 * spread if spread > 0 else max(1.0, float(np.abs(numerators_U).max()))
    alpha, count = 1 - confidence, users - first
    around = (top - centre * bottom) / bound
    variance = ((spread / bound) ** 2 + np.concatenate([[0.0], np.cumsum(around[:-1] ** 2)])) / (1 + np.arange(count))
    bets_U = np.minimum(np.sqrt(2 * np.log(2 / alpha) / (np.maximum(variance, 1e-12) * (plan or count))), 0.5)

    def wealth(value: float, sign: float) -> float:
        stakes = np.clip((top - value * bottom) / bound, -1, 1)
        return float(np.maximum.accumulate(np.cumsum(np.log1p(sign * bets_U * stakes)))[-1])

    needed, reach = float(np.log(2 / alpha)), 40 * bound
    low, high = (
        _crossing(lambda value: wealth(value, 1.0) >= needed, centre, -reach),
        _crossing(lambda value: wealth(value, -1.0) >= needed, centre, reach),
    )
    value = float(numerators_U.sum() / denominators_U.sum())
    clipped = int((np.abs(top - centre * bottom) > bound).sum())
    return Betting(interval=Interval(value=value, low=low, high=high), bound=bound * size, clipped=clipped, users=users)


def empirical_bernstein(numerators_U: Floats, denominators_U: Floats, *, bound: float, confidence: float) -> Interval:
    """Interval of Σ numerators / Σ denominators for a fixed number of users whose |N_u − θ D_u| is at most `bound`, of whatever shape.

    Maurer & Pontil, COLT 2009, theorem 4, on N_u − θ D_u at the estimate (linearised, ours). `bound` in clicks a user: state it before looking.
    """
    users = len(numerators_U)
    value = float(numerators_U.sum() / denominators_U.sum())
    terms = numerators_U - value * denominators_U
    log = np.log(4 / (1 - confidence))  # ln(2 / δ) with δ = α / 2 on either side
    half = float(np.sqrt(2 * terms.var(ddof=1) * log / users) + 7 * 2 * bound * log / (3 * (users - 1))) / float(denominators_U.mean())
    return Interval(value=value, low=value - half, high=value + half)


def _crossing(outside: Callable[[float], bool], inner: float, outer: float) -> float:
    """By bisection, where a monotone condition turns true between `inner` and `outer`; `outer` where it never does."""
    if not outside(outer):
        return outer
    low, high = (inner, outer)
    if outside(inner):  # the pilot's centre itself is out: search on its other side
        low, high = inner - (outer - inner), inner
        if outside(low):
            return low
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if outside(middle) else (middle, high)
    return high
