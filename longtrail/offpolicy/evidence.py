"""What a log says about two policies, as sums that merge: gathered block by block, judged once (`experiment.judge`).

N rows of one block (whole requests). Nothing here grows with the rows: logs of any length are one pass.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longtrail.errors import EvaluationError
from longtrail.offpolicy.calibration import uniform_sums
from longtrail.offpolicy.columns import refusals
from longtrail.offpolicy.segments import cuts
from longtrail.offpolicy.slates import EvaluatedPolicy, LoggedSlates
from longtrail.offpolicy.sums import EXACT_USERS, MAX_CLUSTERS, UserSums, user_groups
from longtrail.offpolicy.weights import WeightSums, list_weights

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

IN_SEGMENTS = ("naive/n", *(f"{name}/{side}/n" for name in ("snips", "dr", "item_position") for side in "ab"))  # all that rates in segments need


@dataclass(frozen=True, kw_only=True)
class LogHealth:
    """Counts of what should not be in a log. None: nobody could look."""

    repeated_rows: int | None = None  # rows that repeat an earlier one's request and position; left out
    repeated_requests: int | None = None  # requests with the user, the time and the items of another one
    stray_clicks: int | None = None  # clicks on what no row says was shown
    clicks: int | None = None  # all of them, the stray ones too
    drawn: bool = False  # the log was drawn by this very program, with the propensities that it holds
    estimated: bool = False  # the propensities were not logged but estimated

    def merge(self, other: "LogHealth") -> "LogHealth":
        counts = {name: _add(getattr(self, name), getattr(other, name)) for name in vars(self) if name not in ("drawn", "estimated")}
        return LogHealth(**counts, drawn=self.drawn or other.drawn, estimated=self.estimated or other.estimated)


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """`sums` holds the raw columns of the estimators (`columns.py`) and "weight/a", "weight/b", "rows", "gap", "gap2".

    `segments` holds IN_SEGMENTS, weights and rows by kind and label.
    """

    a: str
    b: str
    rows: int
    requests: int
    sums: UserSums
    segments: dict[str, dict[str, UserSums]]
    weights: dict[str, WeightSums]
    health: LogHealth = field(default_factory=LogHealth)
    calibration: UserSums | None = None  # see calibration.py
    refused: dict[str, str] = field(default_factory=dict)  # estimator → why this log cannot be judged with it

    def merge(self, other: "Evidence") -> "Evidence":
        """Of both logs together. Raises EvaluationError when they are about different policies."""
        if (self.a, self.b) != (other.a, other.b):
            raise EvaluationError(f"evidence: {other.b} against {other.a} cannot be added to {self.b} against {self.a}")
        segments = {kind: dict(of_kind) for kind, of_kind in self.segments.items()}
        for kind, of_kind in other.segments.items():
            mine = segments.setdefault(kind, {})
            for label, sums in of_kind.items():
                mine[label] = mine[label].merge(sums) if label in mine else sums
        return Evidence(
            a=self.a,
            b=self.b,
            rows=self.rows + other.rows,
            requests=self.requests + other.requests,
            sums=self.sums.merge(other.sums),
            segments=segments,
            weights={side: self.weights[side].merge(other.weights[side]) for side in self.weights},
            health=self.health.merge(other.health),
            refused=self.refused | other.refused,
            calibration=other.calibration if self.calibration is None else _both(self.calibration, other.calibration),
        )


def gather(
    slates: LoggedSlates,
    a: EvaluatedPolicy,
    b: EvaluatedPolicy,
    *,
    columns: Mapping[str, Floats],
    context: Mapping[str, NDArray[Any]] | None = None,
    health: LogHealth | None = None,
    hours: bool = False,
) -> Evidence:
    """The evidence of one block. `columns` are the estimators' numerators and denominators, [N] each, and `context` what is known of each row:

    time (UTC µs), history_length, item (to find repeated requests), candidates (how many there
    were), or any column to cut the log by; all in the order of the slates' rows.
    `hours` cuts time into hours: for a log of a day or two.
    """
    weights = {"weight/a": list_weights(slates, a), "weight/b": list_weights(slates, b), "rows": np.ones(slates.rows)}
    shown = {name: columns[name] for name in IN_SEGMENTS if name in columns} | weights
    users, cluster = np.unique(slates.users_N, return_inverse=True)
    groups = MAX_CLUSTERS if len(users) > EXACT_USERS else None
    if groups:
        users, cluster = np.arange(groups), user_groups(slates.users_N, groups)
    known = {"position": slates.positions_N, **(context or {})}
    segments: dict[str, dict[str, UserSums]] = {}
    for column, values in known.items():
        if column not in ("item", "candidates"):
            for kind, labels, label_N in cuts(column, values, hours=hours):
                segments[kind] = _by_label(labels, label_N, users, cluster, shown, groups)
    health = health or LogHealth()
    if "time" in known and "item" in known and not health.drawn:
        health = health.merge(LogHealth(repeated_requests=repeated_requests(slates, known["time"], known["item"])))
    return Evidence(
        a=a.name,
        b=b.name,
        rows=slates.rows,
        requests=slates.requests,
        sums=UserSums.build(slates.users_N, {**columns, **weights, **_gap(columns)}),
        segments=segments,
        weights={"a": WeightSums.of(slates, a), "b": WeightSums.of(slates, b)},
        health=health,
        refused=refusals(slates, a, b),
        calibration=uniform_sums(slates, known["candidates"]) if "candidates" in known else None,
    )


def _gap(columns: Mapping[str, Floats]) -> dict[str, Floats]:
    """Each row's part of the difference B − A and its square: what a test that knows no users would take its error from."""
    for name in ("dr", "ips"):
        if f"{name}/a/n" in columns:
            gap = columns[f"{name}/b/n"] - columns[f"{name}/a/n"]
            return {"gap": gap, "gap2": gap**2}
    return {}


def repeated_requests(slates: LoggedSlates, times_N: NDArray[Any], items_N: NDArray[Any]) -> int:
    """Requests that another one of this block equals in user, time and list of items: a client that sent twice, a log that was written twice."""
    items = np.asarray(items_N)
    codes = items if np.issubdtype(items.dtype, np.integer) else np.unique(items.astype(str), return_inverse=True)[1]
    starts = np.flatnonzero(np.diff(slates.requests_N, prepend=-1))
    word = np.add.reduceat(_mix(codes.astype(np.uint64) + _mix(slates.places_N.astype(np.uint64))), starts)
    word = _mix(word + _mix(slates.users_N[starts].astype(np.uint64) + _mix(np.asarray(times_N, np.int64)[starts].astype(np.uint64))))
    return int(len(word) - len(np.unique(word)))


def _mix(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finaliser (Steele et al., OOPSLA 2014)."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def _by_label(
    labels: list[str], label_N: Ints, users: Ints, cluster_N: Ints, columns: Mapping[str, Floats], groups: int | None
) -> dict[str, UserSums]:
    """Sums by user within each label that has a row; no loop over rows."""
    keys, place_N = np.unique(label_N * len(users) + cluster_N, return_inverse=True)
    sums = np.stack([np.bincount(place_N, weights=values, minlength=len(keys)) for values in columns.values()], axis=1).astype(np.float64)
    bounds = np.searchsorted(keys, np.arange(len(labels) + 1) * len(users))
    found = {}
    for place, label in enumerate(labels):
        part = slice(bounds[place], bounds[place + 1])
        if bounds[place + 1] > bounds[place]:
            inside = UserSums(users[keys[part] % len(users)], tuple(columns), sums[part], groups)
            found[label] = inside if groups is None else _whole(inside, groups)
    return found


def _whole(sums: UserSums, groups: int) -> UserSums:
    """With a row for every group, as grouped sums have that are to be merged."""
    filled = np.zeros((groups, len(sums.columns)))
    filled[sums.users_U] = sums.sums_UM
    return UserSums(np.arange(groups), sums.columns, filled, groups)


def _add(one: int | None, other: int | None) -> int | None:
    return other if one is None else one if other is None else one + other


def _both(one: UserSums, other: UserSums | None) -> UserSums:
    return one if other is None else one.merge(other)
