"""Events become history: checked, logged on disk, appended to their users' histories, told to whoever keeps something that follows from them."""

from collections.abc import Callable, Sequence
from threading import Lock

import numpy as np
from numpy.typing import NDArray

from longtrail.catalogue import Catalogue
from serving.clock import now
from serving.errors import RequestError
from serving.log import LoggedEvent
from serving.personal import Online, Timer
from serving.schemas import Event, EventsAnswer, EventsRequest, microseconds
from serving.state import State
from serving.users import Users

Ints = NDArray[np.int64]
Listener = Callable[[Ints, Ints, Ints, Ints], None]

_CLOCK_SKEW = 60_000_000  # µs an event may lie in the future of our clock; our choice


class Intake:
    """Thread-safe: requests of many threads are taken one batch after another."""

    def __init__(
        self,
        *,
        users: Users,
        catalogue: Catalogue,
        actions: Sequence[str],
        state: State,
        online: Online,
        timer: Timer,
        max_events: int,
        listeners: Sequence[Listener] = (),
    ) -> None:
        """`listeners` are called with (users, items, actions, times), each int64 [events], dense ids and UTC µs, after the histories are written."""
        self._users = users
        self._catalogue = catalogue
        self._actions = {name: number for number, name in enumerate(actions, start=1)}
        self._state = state
        self._online = online
        self._timer = timer
        self._max_events = max_events
        self._listeners = list(listeners)
        self._lock = Lock()

    def take(self, request: EventsRequest) -> EventsAnswer:
        """Log (on disk) and append to the users' histories, in this order, all or, if any is wrong, none. Raises RequestError."""
        if len(request.events) > self._max_events:
            raise RequestError("events", f"{len(request.events)} events; expected at most {self._max_events}")
        written_at = now()
        rows = [self._event(place, event, written_at) for place, event in enumerate(request.events)]
        with self._lock:
            fresh: dict[object, LoggedEvent] = {}
            for place, row in enumerate(rows):
                if self._state.events.is_new(row.event_id):
                    fresh.setdefault(row.event_id if row.event_id is not None else place, row)
            events = list(fresh.values())
            new_users = [key for key in dict.fromkeys(event.user for event in events) if key not in self._users]
            if events:
                with self._timer("log"):
                    self._state.events.append(events)
                self._users.add(new_users)
                self._apply(events)
        return EventsAnswer(accepted=len(events), duplicates=len(rows) - len(events), new_users=len(new_users))

    def _apply(self, events: Sequence[LoggedEvent]) -> None:
        columns = (
            np.array([self._users[event.user] for event in events]),
            np.array([self._catalogue.id_of(event.item) for event in events]),
            np.array([self._actions[event.action] for event in events]),
            np.array([event.timestamp for event in events]),
        )
        with self._timer("features"):
            self._online.append_events(*columns)
        for on_events in self._listeners:
            on_events(*columns)

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
