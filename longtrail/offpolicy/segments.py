"""Which part of a log a row belongs to, and how B compares with A there: by day, position, history length, user, category.

N rows. Many parts are many questions: p-values are adjusted (`multiplicity.py`), so that one segment in twenty does not "win" by chance.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from longtrail.errors import EvaluationError
from longtrail.offpolicy.intervals import Comparison, influence
from longtrail.offpolicy.multiplicity import Method, adjust
from longtrail.offpolicy.sums import UserSums
from longtrail.slices import by_history_length, by_position

Ints = NDArray[np.int64]

TIME = "day"  # the segment that the report draws as a line, not as a row of the forest
MAX_LABELS = 24  # our choice: of one kind; the smaller ones are left out of the report
MAX_VALUES = 1_000  # our choice: a column with more distinct values is no segment
CHOSEN = ("category",)  # kinds that say which item was shown, not who asked: rates there are per impression of such items
MIN_USERS = 10.0  # our choice: fewer users that count than this carry no interval
HOUR, DAY = 3_600_000_000, 86_400_000_000  # µs


@dataclass(frozen=True, kw_only=True)
class SegmentResult:
    """B against A among the rows of one segment; `adjusted` is its p-value among all segments of the report."""

    kind: str
    label: str
    rows: int
    users: int
    comparison: Comparison
    adjusted: float
    enough: bool

    @property
    def finding(self) -> str:
        """better, worse, no difference shown, or too little data."""
        if not self.enough:
            return "too little data"
        if not self.adjusted < 0.05:
            return "no difference shown"
        return "better" if self.comparison.difference.value > 0 else "worse"

    def json(self) -> dict[str, Any]:
        gap = self.comparison.difference_json()
        gap.pop("probability_b_better")
        return {
            "kind": self.kind,
            "label": self.label,
            "rows": self.rows,
            "users": self.users,
            "a": self.comparison.a.json(),
            "b": self.comparison.b.json(),
            "difference": gap,
            "p_value": _finite(self.comparison.p_value),
            "adjusted_p_value": _finite(self.adjusted),
            "finding": self.finding,
        }


def cuts(kind: str, values_N: NDArray[Any], *, hours: bool = False) -> Iterator[tuple[str, list[str], Ints]]:
    """(kind, labels, [N] index of each row's label) of one column of a log's context: every way to cut the log by it.

    `time` (UTC µs) gives days (or hours); `history_length` gives its length and whether the user is new; any other column its distinct values.
    Raises EvaluationError where these are more than MAX_VALUES.
    """
    if kind == "time":
        step = HOUR if hours else DAY
        bucket_N = np.asarray(values_N, np.int64) // step
        first = int(bucket_N.min())
        used = np.flatnonzero(np.bincount(bucket_N - first))
        place = np.zeros(int(used[-1]) + 1, np.int64)
        place[used] = np.arange(len(used))
        unit = "datetime64[h]" if hours else "datetime64[D]"
        yield TIME, [str(np.datetime64(int((first + bucket) * step), "us").astype(unit)) for bucket in used], place[bucket_N - first]
    elif kind == "history_length":
        cut = by_history_length(values_N)
        yield cut.name, list(cut.labels), cut.buckets_n
        yield "user", ["new", "known"], (np.asarray(values_N) > 0).astype(np.int64)
    elif kind == "position":
        cut = by_position(values_N)
        yield cut.name, list(cut.labels), cut.buckets_n
    else:
        column = pa.array(values_N).cast(pa.string()).fill_null("unknown").dictionary_encode()
        if len(column.dictionary) > MAX_VALUES:
            raise EvaluationError(f"segments: column {kind} has {len(column.dictionary)} distinct values; expected at most {MAX_VALUES}")
        yield kind.replace("_", " "), column.dictionary.to_pylist(), column.indices.to_numpy().astype(np.int64)


def compare_segments(
    segments: Mapping[str, Mapping[str, UserSums]],
    estimator: str,
    *,
    confidence: float,
    method: Method = "holm",
    always: Collection[tuple[str, str]] = (),
) -> list[SegmentResult]:
    """Every segment but those of time, the largest MAX_LABELS of a kind, with p-values adjusted over all that have enough data.

    A kind of one label says nothing new and is left out. `always`: (kind, label) that are compared whatever their size.
    """
    found: list[tuple[str, str, UserSums, Comparison, bool]] = []
    for kind, of_kind in segments.items():
        if kind == TIME:
            continue
        largest = sorted(of_kind, key=lambda label: -float(of_kind[label]["rows"].sum()))[: MAX_LABELS if len(of_kind) > 1 else 0]
        for label in (label for label in of_kind if label in largest or (kind, label) in always):
            sums = of_kind[label]
            if len(sums.users_U) < 2:
                continue
            a, b = rates(estimator if kind not in CHOSEN else "snips")
            if a[0] not in sums:
                continue
            comparison = influence(sums, a, b, confidence=confidence)
            found.append((kind, label, sums, comparison, bool(comparison.effective_users >= MIN_USERS)))
    judged = [index for index, (*_, enough) in enumerate(found) if enough]
    adjusted = dict(zip(judged, adjust(np.array([found[index][3].p_value for index in judged]), method), strict=True))
    return [
        SegmentResult(
            kind=kind, label=label, rows=int(sums["rows"].sum()), users=len(sums.users_U), comparison=comparison,
            adjusted=float(adjusted.get(index, np.nan)), enough=enough,
        )
        for index, (kind, label, sums, comparison, enough) in enumerate(found)
    ]  # fmt: skip


def guarded(names: Sequence[str], segments: Mapping[str, Mapping[str, Any]]) -> tuple[list[tuple[str, str]], list[str]]:
    """(kind, label) of the guardrails named "kind: label" that the log has, and "kind label" of those it has not (no new user came, say).

    Raises EvaluationError where the log is not cut by that kind at all: a misspelt guardrail would guard nothing.
    """
    present, absent = [], []
    for name in names:
        kind, _, label = (part.strip() for part in name.partition(":"))
        if kind == TIME or kind not in segments:
            known = ", ".join(sorted(repr(each) for each in segments if each != TIME)) or "none"
            raise EvaluationError(f"ab_test.guardrails: {name!r}: this log has no segments of the kind {kind!r}; expected 'KIND: LABEL' of {known}")
        if label in segments[kind]:
            present.append((kind, label))
        else:
            absent.append(f"{kind} {label}")
    return present, absent


def rates(estimator: str) -> tuple[tuple[str, str], tuple[str, str]]:
    """The columns of A's and B's rate within a segment."""
    if estimator == "snips":
        return ("snips/a/n", "weight/a"), ("snips/b/n", "weight/b")
    return (f"{estimator}/a/n", "rows"), (f"{estimator}/b/n", "rows")


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
