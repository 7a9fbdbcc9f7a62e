"""The log over time: rates and the running difference in spans of it, and whether the world stood still. S spans, U users."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.stats import chi2

from longtrail.offpolicy.anytime import time_uniform
from longtrail.offpolicy.intervals import Interval, finite, influence, standard_error
from longtrail.offpolicy.segments import rates
from longtrail.offpolicy.sums import UserSums

SPANS = 12  # our choice: what a phone's width can show
NAIVE = ("naive/n", "rows")


@dataclass(frozen=True, kw_only=True)
class Drift:
    """How much the logged rate changed between spans beyond chance. `spread` is the standard deviation of the true rates over their mean."""

    spread: float
    p_value: float
    spans: int

    def json(self) -> dict[str, Any]:
        return asdict(self)


def spans(days: Mapping[str, UserSums], most: int = SPANS) -> list[tuple[str, UserSums]]:
    """(last day, sums) of at most `most` runs of days with about equally many rows each. A day is never split."""
    names = sorted(days)
    if not names:
        return []
    rows = np.array([float(days[name]["rows"].sum()) for name in names])
    place = np.minimum((np.cumsum(rows) - rows / 2) * min(most, len(names)) // rows.sum(), most - 1).astype(int)
    if len(names) <= most:
        place = np.arange(len(names))
    out: list[tuple[str, UserSums]] = []
    for span in np.unique(place):
        inside = [names[i] for i in np.flatnonzero(place == span)]
        merged = days[inside[0]]
        for name in inside[1:]:
            merged = merged.merge(days[name])
        out.append((inside[-1], merged))
    return out


def over_time(days: Mapping[str, UserSums], estimator: str, *, confidence: float) -> dict[str, Any]:
    """What the report draws: rates of the log, A and B span by span, and B − A over all rows up to each span's end with its any-time interval."""
    result: dict[str, Any] = {"until": [], "rows": [], "logged": [], "a": [], "b": [], "running": []}
    a, b = rates(estimator)
    so_far: UserSums | None = None
    for until, sums in spans(days):
        so_far = sums if so_far is None else so_far.merge(sums)
        result["until"].append(until)
        result["rows"].append(int(sums["rows"].sum()))
        for key, (top, bottom) in (("logged", NAIVE), ("a", a), ("b", b)):
            total = float(sums[bottom].sum())
            result[key].append(finite(float(sums[top].sum()) / total) if total > 0 else None)
        result["running"].append(running(so_far, a, b, confidence=confidence).json())
    return result


def running(sums: UserSums, a: tuple[str, str], b: tuple[str, str], *, confidence: float) -> Interval:
    """The difference so far with the interval that may be looked at after every span; NaN ends where the users are too few for any."""
    if len(sums.users_U) < 2:
        return Interval(value=float("nan"), low=float("nan"), high=float("nan"))
    return time_uniform(influence(sums, a, b, confidence=confidence), rows=float(sums["rows"].sum()), confidence=confidence)


def drift(days: Mapping[str, UserSums]) -> Drift | None:
    """Of the logged rate, by the moment estimator of DerSimonian & Laird (Controlled Clinical Trials 1986) over spans. None below two spans.

    Spans with fewer than 2 users, or all or none of whose rows are clicks, carry no error and are left out.
    """
    found, errors = [], []
    for _, sums in spans(days):
        error = standard_error(sums["naive/n"], sums["rows"])
        if np.isfinite(error) and error > 0:
            found.append(float(sums["naive/n"].sum() / sums["rows"].sum()))
            errors.append(error)
    if len(found) < 2:
        return None
    rate, weight = np.array(found), 1 / np.array(errors) ** 2
    mean = float((weight * rate).sum() / weight.sum())
    q = float((weight * (rate - mean) ** 2).sum())
    excess = q - (len(rate) - 1)
    between = max(0.0, excess / float(weight.sum() - (weight**2).sum() / weight.sum()))
    return Drift(spread=float(np.sqrt(between)) / mean, p_value=float(chi2.sf(q, len(rate) - 1)), spans=len(rate))
