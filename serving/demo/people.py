"""Whom to look at: users by the beginning of their key, and a few to start with."""

from bisect import bisect_left
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

FOUND = 8  # users that a search gives


class People:
    """The users of a Bento (its users.parquet), read and sorted when somebody first asks."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def suggestions(self) -> list[dict[str, Any]]:
        """The two longest histories, one of the longest tenth's edge, the median, the shortest: key, events, and which of these it is."""
        keys, events = self._sorted
        if not len(keys):
            return []
        by_length = np.argsort(-events, kind="stable")
        last = len(by_length) - 1
        wanted = [(0, "longest"), (1, "longest"), (last // 10, "long"), (last // 2, "typical"), (last, "shortest")]
        places = {int(by_length[min(rank, last)]): why for rank, why in reversed(wanted)}
        return [{"user_id": str(keys[place]), "events": int(events[place]), "why": why} for place, why in reversed(places.items())]

    def starting_with(self, text: str) -> list[dict[str, Any]]:
        """The first FOUND users, by key, whose key begins with `text`. O(log users) once the keys are sorted."""
        keys, events = self._sorted
        start = bisect_left(keys, text)
        places = range(start, min(start + FOUND, len(keys)))
        return [{"user_id": str(keys[place]), "events": int(events[place])} for place in places if str(keys[place]).startswith(text)]

    @cached_property
    def _sorted(self) -> tuple[Any, Any]:
        """Keys in order, and the events of each when the features were built."""
        table = pq.read_table(self._path, columns=["user_key", "events"]).sort_by("user_key")
        return table["user_key"].to_numpy(), table["events"].to_numpy()
