"""Recommend, rank, take events: what the endpoints do, without BentoML.

A request becomes a history (from the online store), candidates (the retriever's, or those asked for) and one pass of the ranker. The list is drawn by
Plackett-Luce over logits / explore_temperature, so every answer's propensities are exact; temperature 0 shows the best list, with propensity 1.
"""

import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from threading import Lock
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from longtrail.history import HistoryArrays
from longtrail.offpolicy.policies import best_first, sample_plackett_luce
from longtrail.statistics import smoothed_rate
from serving.artifacts import Artifacts
from serving.errors import RequestError
from serving.log import LoggedAnswer, LoggedEvent
from serving.parity import ELSEWHERE, FILE, check_parity
from serving.schemas import Answer, Event, EventsAnswer, EventsRequest, RankRequest, RecommendRequest, ShownItem, microseconds
from serving.scoring import Scorer
from serving.state import State

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Timer = Callable[[str], AbstractContextManager[object]]

FALLBACK_ARM = "popularity_fallback"
UNKNOWN_USER = "unknown user"
_CLOCK_SKEW = 60_000_000  # µs an event may lie in the future of our clock; our choice


class Read(Protocol):
    """One read of B users."""

    @property
    def history(self) -> HistoryArrays: ...

    @property
    def totals_B(self) -> Ints: ...  # noqa: N802

    @property
    def statistics(self) -> dict[str, Ints]: ...


class Online(Protocol):
    """The online store (features.online.OnlineFeatures): thread-safe; an unknown user has no events."""

    def read(self, user_ids: Any, max_length: int, /) -> Read: ...

    def append_events(self, user_ids: Any, item_ids: Any, action_ids: Any, times: Any, /) -> None: ...


@dataclass(frozen=True, kw_only=True)
class _List:
    """A list before it has keys: dense ids in order, and what it was chosen from."""

    items: Ints
    scores: Floats
    propensities: Floats
    candidates: Ints
    fallback: str | None
    retrieved: bool


class Engine:
    """Thread-safe. One process serves a state folder; requests of many threads may run at once, events are taken one batch after another."""

    def __init__(self, artifacts: Artifacts, state: State, online: Online, *, timer: Timer | None = None, seed: int | None = None) -> None:
        """`timer(stage)` is entered around each stage of a request; `seed` makes exploration repeatable (tests)."""
        self._artifacts = artifacts
        self._state = state
        self._online = online
        self._timer = timer or (lambda stage: nullcontext())
        self._settings = artifacts.settings
        self._catalogue = artifacts.catalogue
        self._actions = {name: number for number, name in enumerate(artifacts.manifest.actions, start=1)}
        self._users = {**artifacts.users, **state.new_users()}
        self._next_user = max(self._users.values(), default=0) + 1
        self._random = np.random.default_rng(seed)
        self._events_lock, self._random_lock = Lock(), Lock()
        self.scorer = Scorer(
            retriever=artifacts.retriever,
            ranker=artifacts.ranker,
            catalogue=artifacts.catalogue,
            prior_click_rate=artifacts.manifest.prior_click_rate,
            index=artifacts.index,
        )
        counts = artifacts.catalogue
        self._popular = 1 + np.argsort(-counts.item_events[1:], kind="stable")
        self._click_rate = smoothed_rate(counts.item_clicks, counts.item_impressions, artifacts.manifest.prior_click_rate)

    def warm_up(self) -> float:
        """Repeat the offline scores, then run whole requests, unlogged. Returns the largest difference; raises ModelError beyond tolerance."""
        difference = check_parity(self.scorer, self._artifacts.folder / FILE, ELSEWHERE)
        user = np.array(list(self._users.values())[:1] or [1])
        for _ in range(3):
            self._personal(user, None, self._settings.retrieve, places=10)
        return difference

    # ------------------------------------------------------------ lists

    def recommend(self, request: RecommendRequest) -> Answer:
        """The k best of the candidates, or of the whole catalogue less what the user has seen. Raises RequestError."""
        if request.k > self._settings.max_k:
            raise RequestError("k", f"{request.k} items; expected at most {self._settings.max_k}")
        candidates = None if request.candidates is None else self._items(request.candidates)
        user = self._users.get(request.user_id)
        if user is None:
            shown = self._by_popularity(self._popular if candidates is None else candidates, request.k)
        else:
            shown = self._personal(np.array([user]), candidates, self._settings.retrieve, places=request.k)
        return self._answer(request.user_id, shown)

    def rank(self, request: RankRequest) -> Answer:
        """All the candidates, in order. Raises RequestError."""
        candidates = self._items(request.candidates)
        user = self._users.get(request.user_id)
        if user is None:
            shown = self._by_popularity(candidates, len(candidates))
        else:
            shown = self._personal(np.array([user]), candidates, 0, places=len(candidates))
        return self._answer(request.user_id, shown)

    def _personal(self, user_1: Ints, candidates: Ints | None, retrieve: int, *, places: int) -> _List:
        retrieved = candidates is None
        with self._timer("features"):
            # What was seen must not be recommended, so all that is stored is read before retrieval; a ranker needs only what it looks at.
            user = self._online.read(user_1, _ALL if retrieved else self.scorer.ranker_history)
            history = user.history
        if candidates is None:
            with self._timer("retrieve"):
                candidates, _ = self.scorer.retrieve(history, retrieve, history.items_BL[0, : history.lengths_B[0]])
        if not len(candidates):
            return _List(items=candidates, scores=_NONE, propensities=_NONE, candidates=candidates, fallback=None, retrieved=retrieved)
        with self._timer("rank"):
            items_1C = candidates[None, :]
            logits_1C = self.scorer.logits(
                history, user.totals_B, user.statistics, items_1C, self.scorer.item_statistics(items_1C), np.array([now()])
            )
        columns, propensities = self._draw(logits_1C, places)
        return _List(
            items=candidates[columns],
            scores=1 / (1 + np.exp(-logits_1C[0, columns])),
            propensities=propensities,
            candidates=candidates,
            fallback=None,
            retrieved=retrieved,
        )

    def _draw(self, logits_1C: Floats, places: int) -> tuple[Ints, Floats]:
        """Columns in the order shown, and the conditional propensity of each."""
        lengths, temperature = np.array([logits_1C.shape[1]]), self._settings.explore_temperature
        places = min(places, logits_1C.shape[1])
        if temperature == 0:
            return best_first(logits_1C, lengths, places)[0], np.ones(places)
        with self._random_lock:
            columns, propensities = sample_plackett_luce(logits_1C / temperature, lengths, places, self._random)
        # A propensity too small for a float is still positive: the item was shown.
        return columns[0], np.maximum(propensities[0], np.finfo(np.float64).tiny)

    def _by_popularity(self, candidates: Ints, places: int) -> _List:
        """Most events first, equal ones by id: the same list for everyone, so propensities are 1; the score is the item's smoothed click rate."""
        if candidates is not self._popular:
            candidates = candidates[np.lexsort((candidates, -self._catalogue.item_events[candidates]))]
        items = candidates[:places]
        return _List(
            items=items, scores=self._click_rate[items], propensities=np.ones(len(items)), candidates=items, fallback=UNKNOWN_USER, retrieved=False
        )

    def _answer(self, user_key: str, shown: _List) -> Answer:
        manifest, keys, titles = self._artifacts.manifest, self._catalogue.keys, self._catalogue.titles
        personal = shown.fallback is None
        columns = zip(shown.items.tolist(), shown.scores.tolist(), shown.propensities.tolist(), strict=True)
        answer = Answer(
            request_id=uuid.uuid4().hex,
            user_id=user_key,
            arm=manifest.arm if personal else FALLBACK_ARM,
            model=manifest.ranker if personal else None,
            retriever=manifest.retriever if shown.retrieved else None,
            fallback=shown.fallback,
            items=[ShownItem(keys[item], place, score, propensity, titles[item]) for place, (item, score, propensity) in enumerate(columns, start=1)],
        )
        with self._timer("log"):
            self._state.answers.append(
                LoggedAnswer(
                    request_id=answer.request_id,
                    user=user_key,
                    timestamp=now(),
                    policy=answer.arm,
                    model=answer.model,
                    fallback=answer.fallback,
                    items=[keys[item] for item in shown.items.tolist()],
                    propensities=shown.propensities.tolist(),
                    candidates=[keys[item] for item in shown.candidates.tolist()],
                )
            )
        return answer

    def _items(self, keys: Sequence[str]) -> Ints:
        """Dense ids of candidate keys. Raises RequestError for too many, an unknown one, or one that stands twice."""
        if len(keys) > self._settings.max_candidates:
            raise RequestError("candidates", f"{len(keys)} items; expected at most {self._settings.max_candidates}")
        ids = [self._catalogue.id_of(key) for key in keys]
        if None in ids:
            place = ids.index(None)
            raise RequestError(f"candidates[{place}]", f"unknown item {keys[place]!r}; expected an item_id of the catalogue")
        if len(set(ids)) < len(ids):
            place = next(i for i, item in enumerate(ids) if ids.index(item) < i)
            raise RequestError(f"candidates[{place}]", f"{keys[place]!r} stands here for the second time; expected each item once")
        return np.array(ids, np.int64)

    # ------------------------------------------------------------ events

    def take_events(self, request: EventsRequest) -> EventsAnswer:
        """Log (on disk) and append to the users' histories, in this order, all or, if any is wrong, none. Raises RequestError."""
        if len(request.events) > self._settings.max_events:
            raise RequestError("events", f"{len(request.events)} events; expected at most {self._settings.max_events}")
        written_at = now()
        rows = [self._event(place, event, written_at) for place, event in enumerate(request.events)]
        with self._events_lock:
            fresh: dict[object, LoggedEvent] = {}
            for place, row in enumerate(rows):
                if self._state.events.is_new(row.event_id):
                    fresh.setdefault(row.event_id if row.event_id is not None else place, row)
            events = list(fresh.values())
            new_users = [key for key in dict.fromkeys(event.user for event in events) if key not in self._users]
            if events:
                with self._timer("log"):
                    self._state.events.append(events)
                self._add_users(new_users)
                with self._timer("features"):
                    self._online.append_events(
                        np.array([self._users[event.user] for event in events]),
                        np.array([self._catalogue.id_of(event.item) for event in events]),
                        np.array([self._actions[event.action] for event in events]),
                        np.array([event.timestamp for event in events]),
                    )
        return EventsAnswer(accepted=len(events), duplicates=len(rows) - len(events), new_users=len(new_users))

    def _add_users(self, keys: Sequence[str]) -> None:
        """Ids after all known ones, for this online store alone: the next build of the features gives its own."""
        if keys:
            added = list(zip(keys, range(self._next_user, self._next_user + len(keys)), strict=True))
            self._state.add_users(added)
            self._next_user += len(added)
            self._users.update(added)

    def _event(self, place: int, event: Event, written_at: int) -> LoggedEvent:
        if self._catalogue.id_of(event.item_id) is None:
            raise RequestError(f"events[{place}].item_id", f"unknown item {event.item_id!r}; expected an item_id of the catalogue")
        if event.action not in self._actions:
            raise RequestError(f"events[{place}].action", f"unknown action {event.action!r}; expected one of {', '.join(self._actions)}")
        timestamp = written_at if event.timestamp is None else microseconds(event.timestamp)
        if not 0 <= timestamp <= written_at + _CLOCK_SKEW:
            raise RequestError(f"events[{place}].timestamp", f"{event.timestamp} is before 1970 or in the future; expected when it happened")
        return LoggedEvent(
            event_id=event.event_id,
            user=event.user_id,
            item=event.item_id,
            timestamp=timestamp,
            action=event.action,
            value=event.value,
            request=event.request_id,
            written_at=written_at,
        )


_ALL = 1 << 30
_NONE: Floats = np.zeros(0)


def now() -> int:
    """UTC microseconds since 1970."""
    return time.time_ns() // 1_000
