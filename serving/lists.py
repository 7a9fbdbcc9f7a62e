"""A list before it has keys, and the one list that needs no user: the most popular items, for whatever reason a personal list cannot be made."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from longtrail.catalogue import Catalogue
from longtrail.statistics import smoothed_rate
from serving.evidence import Evidence

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

FALLBACK_ARM = "popularity_fallback"
UNKNOWN_USER = "unknown user"


@dataclass(frozen=True, kw_only=True)
class Shown:
    """Dense ids in the order shown, each with its score, P(click), and conditional propensity; and what they were chosen from."""

    items: Ints
    scores: Floats
    propensities: Floats
    candidates: Ints
    fallback: str | None = None  # why the list is not personal
    retrieved: bool = False  # by the retriever, not given by the caller
    evidence: Evidence | None = None  # what its scores were made of

    @classmethod
    def nothing(cls, *, retrieved: bool) -> "Shown":
        """The list of who has seen everything."""
        none = np.zeros(0)
        return cls(items=np.zeros(0, np.int64), scores=none, propensities=none, candidates=np.zeros(0, np.int64), retrieved=retrieved)


class PopularLists:
    """Most events first, equal ones by id: the same list for everyone, so propensities are 1; the score is the item's smoothed click rate."""

    def __init__(self, catalogue: Catalogue, prior_click_rate: float) -> None:
        self._events = catalogue.item_events
        self._popular = 1 + np.argsort(-catalogue.item_events[1:], kind="stable")
        self._click_rate = smoothed_rate(catalogue.item_clicks, catalogue.item_impressions, prior_click_rate)

    def fallback(self, reason: str, candidates: Ints | None, places: int) -> Shown:
        """The first `places` of `candidates` (None: of the catalogue), flagged with `reason`: short, and the same for all requests it befalls."""
        ordered = self._popular if candidates is None else candidates[np.lexsort((candidates, -self._events[candidates]))]
        items = ordered[:places]
        return Shown(items=items, scores=self._click_rate[items], propensities=np.ones(len(items)), candidates=items, fallback=reason)
