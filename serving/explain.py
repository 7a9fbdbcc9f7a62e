"""Two arms' lists for one user, with the history they were made from and what of it they looked at: what the demo page draws.

Nothing here is logged, counted or drawn at random: each arm shows its best list, and no experiment ever hears of it.
"""

import base64
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from longtrail.catalogue import Catalogue
from longtrail.history import HistoryArrays
from serving.arms import Arm
from serving.clock import now
from serving.demo.schemas import ExplainRequest
from serving.errors import RequestError, Unavailable
from serving.lists import FALLBACK_ARM, UNKNOWN_USER, PopularLists, Shown
from serving.personal import Online, PersonalLists
from serving.policies import Best, Chance
from serving.scoring import newest
from serving.weights import Weights, kind_of, weights_of

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

EVENTS = 4_000  # newest events of a history that a page is told of; our choice: what a screen can still show, some 100 kB
STRONGEST = 8  # behaviours that are named for each item and pass
_ALL_PLACES = 1 << 30
_NONE_1L: Ints = np.zeros((1, 1), np.int64)
_EMPTY = HistoryArrays(items_BL=_NONE_1L, actions_BL=_NONE_1L, times_BL=_NONE_1L, lengths_B=np.zeros(1, np.int64))


class KnownUsers(Protocol):
    def get(self, key: str, /) -> int | None: ...


class Explainer:
    """Thread-safe; holds nothing of a request."""

    def __init__(
        self,
        *,
        arms: Sequence[Arm],
        users: KnownUsers,
        online: Online,
        popular: PopularLists,
        catalogue: Catalogue,
        retrieve: int,
    ) -> None:
        """The popular list stands beside the arms under its own name. `retrieve`: candidates that the retriever gives each arm."""
        self._arms = {arm.name: replace(arm, policy=Best()) for arm in arms}
        self._users, self._online, self._popular, self._catalogue = users, online, popular, catalogue
        self._lists = PersonalLists(online, lambda stage: nullcontext(), Chance(), retrieve=retrieve)

    def arms(self) -> list[dict[str, Any]]:
        """What can be compared: name, model, kind of weights (null: none)."""
        personal = [{"name": arm.name, "model": arm.model, "kind": kind_of(arm.scorer.ranker)} for arm in self._arms.values()]
        return [*personal, {"name": FALLBACK_ARM, "model": None, "kind": None}]

    def explain(self, request: ExplainRequest) -> dict[str, Any]:
        """See `docs/serving.md`, "Demo". Raises RequestError for an arm that is not there."""
        for place, name in enumerate(request.arms):
            if name not in self._arms and name != FALLBACK_ARM:
                raise RequestError(f"arms[{place}]", f"unknown arm {name!r}; expected one of {', '.join([*self._arms, FALLBACK_ARM])}")
        user = self._users.get(request.user_id)
        history, total, unavailable = self._history(user)
        lists = [self._list(name, user, request.k) for name in request.arms]
        explained_U = np.array(list(dict.fromkeys(item for shown, _ in lists for item in shown.items[: request.k].tolist())), np.int64)
        table = _Items(self._catalogue)
        arms = [
            self._arm(name, shown, milliseconds, history, explained_U, request.k, table)
            for name, (shown, milliseconds) in zip(request.arms, lists, strict=True)
        ]
        length = int(history.lengths_B[0])
        return {
            "user_id": request.user_id,
            "known": user is not None,
            "unavailable": unavailable,
            "total": total,
            "history": {
                "items": table.places(history.items_BL[0, :length]),
                "actions": history.actions_BL[0, :length].tolist(),
                "times": (history.times_BL[0, :length] // 1_000_000).tolist(),
            },
            "explained": table.places(explained_U),
            "arms": arms,
            "items": table.rows(),
        }

    def _history(self, user: int | None) -> tuple[HistoryArrays, int, str | None]:
        """The newest EVENTS events, how many there are in all, and why they cannot be read."""
        if user is None:
            return _EMPTY, 0, None
        try:
            read = self._online.read(np.array([user]), EVENTS)
        except Unavailable as error:
            return _EMPTY, 0, error.reason
        return read.history, int(read.totals_B[0]), None

    def _list(self, name: str, user: int | None, k: int) -> tuple[Shown, float]:
        """The whole order of an arm's candidates (of a popular list k places), and how many milliseconds it took."""
        start = time.perf_counter()
        if user is None:
            shown = self._popular.fallback(UNKNOWN_USER, None, k)
        elif name == FALLBACK_ARM:
            shown = replace(self._popular.fallback("", None, k), fallback=None)
        else:
            try:
                shown = self._lists.shown(self._arms[name], user, None, _ALL_PLACES)
            except Unavailable as error:
                shown = self._popular.fallback(error.reason, None, k)
        return shown, 1e3 * (time.perf_counter() - start)

    def _arm(
        self, name: str, shown: Shown, milliseconds: float, history: HistoryArrays, explained_U: Ints, k: int, table: "_Items"
    ) -> dict[str, Any]:
        personal = shown.fallback is None and name in self._arms
        weights, reads = self._weights(name, history, explained_U) if personal else (Weights(kind=None), 0)
        place_of = {item: place for place, item in enumerate(shown.items.tolist())}
        places_U = [place_of.get(item) for item in explained_U.tolist()]
        return {
            "name": name,
            "model": self._arms[name].model if personal else None,
            "fallback": shown.fallback,
            "personal": personal,
            "candidates": len(shown.candidates),
            "milliseconds": round(milliseconds, 1),
            "list": table.places(shown.items[:k]),
            "places": [None if place is None else place + 1 for place in places_U],
            "scores": [None if place is None else round(float(shown.scores[place]), 6) for place in places_U],
            "kind": weights.kind,
            "reads": reads,
            "passes": [[_told(weights_L) for weights_L in weights_UL] for weights_UL in weights.passes],
        }

    def _weights(self, name: str, history: HistoryArrays, explained_U: Ints) -> tuple[Weights, int]:
        """And how many of the newest events the arm reads: the weights' places count within those."""
        scorer = self._arms[name].scorer
        # What a ranker keeps of each user is made of the whole history, however much it reads in training.
        read = newest(history, scorer.ranker_history if scorer.states is None else EVENTS)
        weights = weights_of(scorer.ranker, read, explained_U, self._catalogue, now())
        return weights, int(read.lengths_B[0]) if weights.kind else 0


class _Items:
    """Every item that an answer mentions, once."""

    def __init__(self, catalogue: Catalogue) -> None:
        self._catalogue = catalogue
        self._places: dict[int, int] = {}

    def places(self, items: Ints) -> list[int]:
        return [self._places.setdefault(item, len(self._places)) for item in items.tolist()]

    def rows(self) -> list[list[str | None]]:
        """[key, title] of each."""
        return [[self._catalogue.keys[item], self._catalogue.titles[item]] for item in self._places]


def _told(weights_L: Floats) -> dict[str, Any]:
    """One item's weights of one pass: the strongest exactly, all as signed bytes of `largest` / 127, which is more than a screen can show."""
    size_L = np.abs(weights_L)
    largest = float(size_L.max(initial=0.0))
    coded = np.rint(weights_L / (largest or 1.0) * 127).astype(np.int8)
    strongest = np.argsort(-size_L, kind="stable")[:STRONGEST]
    return {
        "largest": largest,
        "mean": float(weights_L.mean()) if len(weights_L) else 0.0,
        "strongest": [[int(place), float(weights_L[place])] for place in strongest],
        "bytes": base64.b64encode(coded.tobytes()).decode(),
    }
