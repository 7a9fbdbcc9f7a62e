"""Which part of a split a row belongs to: by history length, item age, coldness of user and item, position. n rows."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

DAY = 86_400_000_000  # µs


@dataclass(frozen=True)
class Slice:
    """A way to cut rows: row i lies in bucket `labels[buckets_n[i]]`."""

    name: str
    labels: tuple[str, ...]
    buckets_n: Ints


def _cut(name: str, values_n: NDArray, edges: tuple[float, ...], labels: tuple[str, ...]) -> Slice:
    """Bucket b holds edges[b - 1] <= value < edges[b]."""
    assert len(labels) == len(edges) + 1
    return Slice(name, labels, np.searchsorted(np.asarray(edges), values_n, side="right"))


def by_history_length(lengths_n: Ints) -> Slice:
    """Events available at the request, all of them: not only those a model reads."""
    return _cut("history length", lengths_n, (1, 10, 50, 200, 1000), ("0", "1–9", "10–49", "50–199", "200–999", "1000+"))


def by_item_age(times_n: Ints, first_seen_n: Ints) -> Slice:
    """Time since the item first stood in the log; an item is new where that is the request itself."""
    labels = ("new", "under 1 day", "1–7 days", "7–30 days", "30–180 days", "180+ days")
    return _cut("item age", times_n - first_seen_n, (1, DAY, 7 * DAY, 30 * DAY, 180 * DAY), labels)


def by_train_events(name: str, train_events_n: Ints) -> Slice:
    """Cold: the user or item (`name`) has no event in the training period."""
    return _cut(name, train_events_n, (1,), ("cold", "warm"))


def by_position(positions_n: Ints) -> Slice:
    return _cut("position", positions_n, (2, 4, 11), ("1", "2–3", "4–10", "11+"))
