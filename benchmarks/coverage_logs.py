"""Thousands of logs with a known truth at once, as the sums by user that every interval is made of. M logs, U users of each, N rows of all, I items.

A user has an activity (log-normal) and two tastes: one for clicking at all, tied to the activity, and one that turns items against each other.
A request has one of CONTEXTS contexts; in each the logger and both policies have probabilities of their own. The item shown is drawn from the
logger's, the click from sigmoid(level + tastes + quality). Users are drawn anew for each log, so the truth is an expectation over users, by
quadrature.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import expit

from longtrail.offpolicy.evidence import Evidence, LogHealth
from longtrail.offpolicy.sums import UserSums
from longtrail.offpolicy.weights import EDGES, WeightSums

Floats = NDArray[np.float64]

ITEMS, CONTEXTS = 8, 4
ACTIVITY = 0.5  # standard deviation of a user's log activity
COLUMNS = ("naive/n", "naive/d", *(f"{e}/{s}/{p}" for e in ("ips", "snips", "dr") for s in "ab" for p in "nd"), "weight/a", "weight/b", "rows")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """`level` sets the click rate, `gap` how much better B is, `spread` how far both policies lie from the logger (overlap).

    With `even` B goes its own way from the logger's, and is then moved so that it is exactly as good as A: a win is false.
    """

    level: float
    gap: float = 0.4
    spread: float = 0.7
    user_sd: float = 0.8
    even: bool = False
    sharper: float = 1.0  # the logger really draws with its logged scores times this: 1 is honest
    seed: int = 7

    def policies(self) -> tuple[Floats, Floats, Floats, Floats]:
        """[CONTEXTS, I] what the logger does, what it logs, and the probabilities of A and B."""
        rng = np.random.default_rng(self.seed)
        base = 0.8 * rng.normal(size=(CONTEXTS, ITEMS))
        apart = self.spread * rng.normal(size=(CONTEXTS, ITEMS))
        a, b = softmax(base + apart), softmax(base + apart + self.gap * self.quality())
        if self.even:
            own, rates = base + self.spread * rng.normal(size=(CONTEXTS, ITEMS)), self.rates()

            def gain(shift: float) -> float:
                return float(((softmax(own + shift * self.quality()) - a) * rates).sum())

            b = softmax(own + brentq(gain, -5.0, 5.0) * self.quality())
        return softmax(self.sharper * base), softmax(base), a, b

    def quality(self) -> Floats:
        return np.random.default_rng(self.seed + 1).permuted(np.tile(np.linspace(-1, 1, ITEMS), (CONTEXTS, 1)), axis=1)

    def rates(self) -> Floats:
        """[CONTEXTS, I] the true click rate of each item, a row being drawn with its user's activity."""
        nodes, weights = np.polynomial.hermite_e.hermegauss(40)
        mass = weights / weights.sum()
        lasting = self.user_sd * (0.5 * (nodes[:, None, None, None] + ACTIVITY) + np.sqrt(0.75) * nodes[None, :, None, None])
        turn = 0.5 * self.user_sd * np.linspace(-1, 1, ITEMS)
        total = np.zeros((CONTEXTS, ITEMS))
        for node, share in zip(nodes, mass, strict=True):
            logit = self.level + lasting + self.quality() + node * turn
            total += share * np.einsum("x,y,xyci->ci", mass, mass, expit(logit))
        return total

    def truth(self) -> tuple[float, float]:
        """The click rates of A and B; contexts are equally likely."""
        _, _, a, b = self.policies()
        rates = self.rates()
        return float((a * rates).sum(axis=1).mean()), float((b * rates).sum(axis=1).mean())


def softmax(scores: Floats) -> Floats:
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)


def simulate(setting: Setting, *, logs: int, rows: int, users: int, seed: int, days: int = 1) -> Iterator[list[Evidence]]:
    """`logs` logs of about `rows` rows from `users` users: for each the evidence up to the end of each of `days` equally long days.

    A log's rows are Poisson by user, so that users differ in activity. Memory is bounded: some logs at a time.
    """
    at_once = max(1, 2_000_000 // rows)
    for start in range(0, logs, at_once):
        yield from _some(setting, min(at_once, logs - start), rows, users, np.random.default_rng([seed, start]), days)


def _some(setting: Setting, logs: int, rows: int, users: int, rng: np.random.Generator, days: int) -> Iterator[list[Evidence]]:
    really, logged, a, b = setting.policies()
    activity = rng.normal(size=(logs, users))
    share = np.exp(ACTIVITY * activity)
    count = rng.poisson(rows * share / share.sum(axis=1, keepdims=True))
    person = np.repeat(np.arange(logs * users), count.ravel())  # [N] log · users + user
    context = rng.integers(CONTEXTS, size=len(person))
    cumulative = np.cumsum(really, axis=1)[:, :-1]
    item = (rng.random(len(person))[:, None] > cumulative[context]).sum(axis=1)
    lasting = setting.user_sd * (0.5 * activity.ravel() + np.sqrt(0.75) * rng.normal(size=logs * users))
    turning = 0.5 * setting.user_sd * rng.normal(size=logs * users)
    logit = setting.level + lasting[person] + setting.quality()[context, item] + turning[person] * np.linspace(-1, 1, ITEMS)[item]
    click = (rng.random(len(person)) < expit(logit)).astype(np.float64)
    weight_a, weight_b = (policy[context, item] / logged[context, item] for policy in (a, b))
    predicted, expected_a, expected_b = _model(person, users, context, item, click, a, b)
    ones = np.ones(len(person))
    values = {"naive/n": click, "naive/d": ones}
    for side, weight, expected in (("a", weight_a, expected_a), ("b", weight_b, expected_b)):
        values |= {f"ips/{side}/n": weight * click, f"ips/{side}/d": ones, f"snips/{side}/n": weight * click, f"snips/{side}/d": weight}
        values |= {f"dr/{side}/n": weight * (click - predicted) + expected, f"dr/{side}/d": ones, f"weight/{side}": weight}
    values["rows"] = ones
    day = rng.integers(days, size=len(person))
    by_day = np.stack(
        [np.bincount(person + day * logs * users, weights=values[name], minlength=days * logs * users) for name in COLUMNS], axis=1
    ).reshape(days, logs, users, len(COLUMNS))
    running = np.cumsum(by_day, axis=0)
    summaries = {side: _weights(weight, person // users, day, logs, days) for side, weight in (("a", weight_a), ("b", weight_b))}
    for log in range(logs):
        yield [_evidence(running[until, log], {side: s[until][log] for side, s in summaries.items()}) for until in range(days)]


def _model(
    person: NDArray[np.int64], users: int, context: NDArray[np.int64], item: NDArray[np.int64], click: Floats, a: Floats, b: Floats
) -> tuple[Floats, Floats, Floats]:
    """[N] q̂ of the logged item, and its mean under A and B: smoothed means of each (context, item), fitted on the users of the other half."""
    cells = CONTEXTS * ITEMS
    half = (person // users) * 2 + person % 2
    cell = context * ITEMS + item
    shown = np.bincount(half * cells + cell, minlength=(half.max() + 1) * cells).reshape(-1, cells)
    clicked = np.bincount(half * cells + cell, weights=click, minlength=(half.max() + 1) * cells).reshape(-1, cells)
    overall = (clicked.sum(axis=1, keepdims=True) + 0.5) / (shown.sum(axis=1, keepdims=True) + 1)
    mean = ((clicked + 20 * overall) / (shown + 20)).reshape(-1, CONTEXTS, ITEMS)
    other = half ^ 1
    return mean[other, context, item], (mean[other, context] * a[context]).sum(axis=1), (mean[other, context] * b[context]).sum(axis=1)


def _weights(weight: Floats, log: NDArray[np.int64], day: NDArray[np.int64], logs: int, days: int) -> list[list[WeightSums]]:
    """By day and log, running."""
    cell = day * logs + log

    def total(values: Floats) -> Floats:
        return np.cumsum(np.bincount(cell, weights=values, minlength=days * logs).reshape(days, logs), axis=0)

    largest = np.zeros(days * logs)
    np.maximum.at(largest, cell, weight)
    largest = np.maximum.accumulate(largest.reshape(days, logs), axis=0)
    rows, sums, squares = total(np.ones(len(weight))), total(weight), total(weight**2)
    below, unused = total(np.minimum(weight, 1)), total((weight < 0.01).astype(float))
    counts = np.zeros(len(EDGES) - 1)  # no picture is drawn here
    return [
        [
            WeightSums(
                requests=int(rows[d, m]), total=sums[d, m], squares=squares[d, m], below_one=below[d, m], unused=int(unused[d, m]),
                largest=largest[d, m], forced=0, rows=int(rows[d, m]), counts=counts,
            )
            for m in range(logs)
        ]
        for d in range(days)
    ]  # fmt: skip


def _evidence(sums: Floats, weights: dict[str, WeightSums]) -> Evidence:
    there = sums[:, -1] > 0
    user_sums = UserSums(np.flatnonzero(there), COLUMNS, sums[there])
    rows = int(sums[:, -1].sum())
    return Evidence(a="A", b="B", rows=rows, requests=rows, sums=user_sums, segments={}, weights=weights, health=LogHealth())
