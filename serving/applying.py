"""From the event log into the histories, in the order of the log, each event exactly once.

The online store keeps, in the transaction that changes a history, how far this log is applied (features.appending). So whatever happens in between
(the process dies, the store goes away, an answer gets lost) the next try goes on from there. What is logged and not applied yet waits: the store may
be away for as long as it likes, the events are on disk.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from threading import Condition, Thread
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from features.appending import StoreWentBackError
from longtrail.catalogue import Catalogue
from longtrail.errors import LongtrailError
from serving.event_log import EventLog
from serving.event_records import LoggedEvent
from serving.users import Users

Ints = NDArray[np.int64]
Listener = Callable[[Ints, Ints, Ints, Ints, Ints], None]

_AT_ONCE = 2_000  # events of one transaction of the store: bounds its time and memory; our choice
_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 2.0  # s before the store is tried again

logger = logging.getLogger(__name__)


class Store(Protocol):
    """Where histories are kept (features.online.OnlineFeatures)."""

    def applied(self, log: str, /) -> int: ...

    def append_events(
        self,
        user_ids: Any,
        item_ids: Any,
        action_ids: Any,
        times: Any,
        /,
        *,
        log: str | None = None,
        positions: Any = None,
        since: int | None = None,
    ) -> Ints: ...


class Applier:
    """One thread that writes histories, and tells the listeners. `backlog` is how many logged events wait for it."""

    def __init__(
        self, *, log: EventLog, store: Store, users: Users, catalogue: Catalogue, actions: Mapping[str, int], listeners: Sequence[Listener] = ()
    ) -> None:
        """Applies what the log has more than the store, before it returns: `recovered` says how many events that were.

        `listeners` are called with (users, items, actions, times, places), each int64 [events] in the order of the log: dense ids, UTC µs, and the
        event's place in its user's whole history, from 1. What an exception of theirs left out they find by the places; it is logged and costs
        nobody else anything. Raises FeatureStoreError where the store cannot be written.
        """
        self._log, self._store, self._users, self._catalogue = log, store, users, catalogue
        self._actions = actions
        self._listeners = list(listeners)
        self._waiting: deque[tuple[Sequence[LoggedEvent], Future[None]]] = deque()
        self._changed = Condition()
        self._closed = False
        self.backlog = 0
        self._applied = store.applied(log.name)
        self.recovered = sum(self._apply(part) for part in self._logged())
        self._log.applied = self._applied
        if self.recovered:
            logger.info("%d logged events were not in the histories yet and are now", self.recovered)
        self._thread = Thread(target=self._run, name="event-apply", daemon=True)
        self._thread.start()

    def put(self, events: Sequence[LoggedEvent]) -> "Future[None]":
        """Events as they come out of the log, batch after batch; the future is done when they are in the histories."""
        future: Future[None] = Future()
        future.set_running_or_notify_cancel()  # several requests wait for it: none may cancel it
        if not events:
            future.set_result(None)
            return future
        with self._changed:
            self._waiting.append((events, future))
            self.backlog += len(events)
            self._changed.notify_all()
        return future

    def close(self, seconds: float = 10.0) -> int:
        """Apply what waits, for at most `seconds` (the log keeps the rest), then stop. Returns how many events are left to the next start."""
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting, seconds)
            self._closed = True
            self._changed.notify_all()
        self._thread.join(seconds)
        return self.backlog

    # ------------------------------------------------------------ inside

    def _run(self) -> None:
        while batches := self._next():
            events = [event for part, _ in batches for event in part]
            if not self._until_applied(events):
                return
            with self._changed:
                for _ in batches:
                    self._waiting.popleft()
                self.backlog -= len(events)
                self._changed.notify_all()
            for _, future in batches:
                future.set_result(None)

    def _next(self) -> list[tuple[Sequence[LoggedEvent], "Future[None]"]]:
        """What waits, some of it where it is much; nothing once closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            if self._closed:
                return []
            batches, events = [], 0
            for batch in self._waiting:
                batches.append(batch)
                events += len(batch[0])
                if events >= _AT_ONCE:
                    break
            return batches

    def _until_applied(self, events: Sequence[LoggedEvent]) -> bool:
        """Try until it works; False where the service stops first."""
        pause = _FIRST_PAUSE
        while True:
            try:
                for start in range(0, len(events), _AT_ONCE):
                    self._apply(events[start : start + _AT_ONCE])
                self._log.applied = self._applied
                return True
            except StoreWentBackError as error:
                logger.error("%s; the log has what is missing", error)
                pause = self._go_back(pause)
            except (LongtrailError, OSError) as error:
                logger.error("events wait in the log: %s", error)
            except Exception:
                logger.exception("events wait in the log")
            with self._changed:
                if self._changed.wait_for(lambda: self._closed, pause):
                    return False
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _go_back(self, pause: float) -> float:
        """Apply again what the store lost. Returns the pause before the next try: none where that worked."""
        try:
            self._applied = self._store.applied(self._log.name)
            for part in self._logged():
                self._apply(part)
            return 0.0
        except (LongtrailError, OSError) as error:
            logger.error("events wait in the log: %s", error)
            return pause

    def _logged(self) -> Iterator[list[LoggedEvent]]:
        """What the log has after the applied position, in parts."""
        for chunk in self._log.read(self._applied):
            yield from (chunk[start : start + _AT_ONCE] for start in range(0, len(chunk), _AT_ONCE))

    def _apply(self, events: Sequence[LoggedEvent]) -> int:
        """One transaction; returns how many of the events were not applied before."""
        known = [event for event in events if self._catalogue.id_of(event.item) is not None and event.action in self._actions]
        if len(known) < len(events):  # only where an older model's events are applied to a newer build of the features
            logger.warning("%d logged events are of items or actions that this model does not know; histories go without", len(events) - len(known))
        if not known:
            return 0
        self._users.add([key for key in dict.fromkeys(event.user for event in known) if key not in self._users])
        columns = tuple(
            np.array(values, np.int64)
            for values in (
                [self._users[event.user] for event in known],
                [self._catalogue.id_of(event.item) for event in known],
                [self._actions[event.action] for event in known],
                [event.timestamp for event in known],
            )
        )
        positions = np.array([event.written_at for event in known], np.int64)
        places = self._store.append_events(*columns, log=self._log.name, positions=positions, since=self._applied)
        self._applied = max(self._applied, int(positions[-1]))
        new = places > 0
        self._tell(*(values[new] for values in (*columns, places)))
        return int(new.sum())

    def _tell(self, *columns: Ints) -> None:
        if not len(columns[0]):
            return
        for listener in self._listeners:
            try:
                listener(*columns)
            except Exception:  # what follows from the histories is never worth the histories
                logger.exception("a listener failed on %d events", len(columns[0]))
