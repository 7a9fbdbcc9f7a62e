"""Events become history: checked row by row, on disk before anybody hears of them, then in their users' histories, in the order of the log.

    request -> checked -> GroupCommit (event log, on disk) -> Applier (histories, listeners) -> answer

Where the online store does not answer, events are acknowledged all the same: they are on disk, the answer says how many are `pending`, and they
follow by themselves. Only when too many wait are more refused.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass

from longtrail.catalogue import Catalogue
from longtrail.schema import EARLIEST
from serving.applying import Applier, Listener, Store
from serving.clock import now
from serving.commit import Committed, GroupCommit
from serving.errors import NotNow, RequestError
from serving.event_log import EventLog
from serving.event_records import UNTIMED, LoggedEvent
from serving.personal import Timer
from serving.schemas import BadEvent, Event, EventsAnswer, EventsRequest, Rejection, microseconds
from serving.users import Users

__all__ = ["Intake", "Listener"]

_CLOCK_SKEW = 60_000_000  # µs an event may lie in the future of our clock; our choice
_SHOWN = 100  # rejections that an answer spells out; our choice
_LONGEST = 300  # characters of a rejection's field or message; our choice

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Taken:
    """A request on its way to disk."""

    committed: "Future[Committed]"
    rejections: Sequence[Rejection]


class Intake:
    """Thread-safe, and usable from an event loop. Opening it applies what the log has more than the histories."""

    def __init__(
        self,
        *,
        log: EventLog,
        users: Users,
        catalogue: Catalogue,
        actions: Sequence[str],
        online: Store,
        timer: Timer,
        max_events: int,
        max_backlog: int = 100_000,
        apply_seconds: float = 2.0,
        group: int = 1_000,
        listeners: Sequence[Listener] = (),
        on_logged: Callable[[Sequence[LoggedEvent]], None] | None = None,
    ) -> None:
        """`listeners`: serving.applying. `on_logged` hears of accepted events once they are on disk. `apply_seconds` is how long an answer waits for
        the histories; `group` how many requests may share a sync. Raises FeatureStoreError where the online store cannot be written."""
        self._catalogue = catalogue
        self._actions = {name: number for number, name in enumerate(actions, start=1)}
        self._users = users
        self._timer = timer
        self._max_events = max_events
        self._max_backlog = max_backlog
        self._apply_seconds = apply_seconds
        self._on_logged = on_logged
        self._closed = False
        self._met: set[str] = set()  # users whose first event is logged and not applied yet
        self._applier = Applier(log=log, store=online, users=users, catalogue=catalogue, actions=self._actions, listeners=listeners)
        self._commit = GroupCommit(log, new_users=self._new_users, apply=self._logged, requests=group)
        self.recovered = self._applier.recovered  # events that were logged and not in the histories when this was opened

    @property
    def backlog(self) -> int:
        """Logged events that are not in the histories yet."""
        return self._applier.backlog

    def take(self, request: EventsRequest) -> EventsAnswer:
        """Raises RequestError where the batch is too large, NotNow where it cannot be logged (disk full, stopping) or too many events wait."""
        taken = self._start(request)
        with self._timer("log"):
            committed = taken.committed.result()
        with self._timer("apply"):
            wait([committed.applied], self._apply_seconds)
        return self._answer(committed, taken.rejections)

    async def take_soon(self, request: EventsRequest) -> EventsAnswer:
        """As `take`, without holding a thread."""
        taken = self._start(request)
        with self._timer("log"):
            committed = await asyncio.wrap_future(taken.committed)
        with self._timer("apply"):
            await asyncio.wait([asyncio.wrap_future(committed.applied)], timeout=self._apply_seconds)
        return self._answer(committed, taken.rejections)

    def close(self, seconds: float = 10.0) -> None:
        """Log and apply what was taken, then refuse more. What the store does not take within `seconds` is applied at the next start."""
        if self._closed:
            return
        self._closed = True
        self._commit.close()
        if left := self._applier.close(seconds):
            logger.warning("%d logged events are not in the histories yet; the next start applies them", left)

    # ------------------------------------------------------------ inside

    def _start(self, request: EventsRequest) -> _Taken:
        if len(request.events) > self._max_events:
            raise RequestError("events", f"{len(request.events)} events; expected at most {self._max_events}")
        if self.backlog + len(request.events) > self._max_backlog:
            raise NotNow(503, "events", f"{self.backlog} events wait for the online store; expected it to answer again soon", retry_after=5)
        moment = now()
        events, rejections = [], []
        for place, row in enumerate(request.events):
            fault = row if isinstance(row, BadEvent) else self._fault(row, moment)
            if fault is None:
                events.append(_logged(row, moment))
            else:
                rejections.append(Rejection(place=place, field=fault.field[:_LONGEST], message=fault.message[:_LONGEST]))
        return _Taken(self._commit.submit(events), rejections)

    def _fault(self, event: Event, moment: int) -> BadEvent | None:
        if self._catalogue.id_of(event.item_id) is None:
            return BadEvent("item_id", f"unknown item {event.item_id!r}; expected an item_id of the catalogue")
        if event.action not in self._actions:
            return BadEvent("action", f"unknown action {event.action!r}; expected one of {', '.join(self._actions)}")
        if event.timestamp is not None and not EARLIEST <= microseconds(event.timestamp) <= moment + _CLOCK_SKEW:
            return BadEvent("timestamp", f"{event.timestamp} is before 1990 or in the future; expected when it happened")
        return None

    def _answer(self, committed: Committed, rejections: Sequence[Rejection]) -> EventsAnswer:
        accepted = committed.events
        return EventsAnswer(
            accepted=len(accepted),
            duplicates=committed.duplicates,
            rejected=len(rejections),
            pending=0 if committed.applied.done() else len(accepted),
            new_users=committed.new_users,
            rejections=list(rejections[:_SHOWN]),
        )

    def _new_users(self, events: Sequence[LoggedEvent]) -> int:
        self._met = {key for key in self._met if key not in self._users}
        new = {event.user for event in events if event.user not in self._users} - self._met
        self._met |= new
        return len(new)

    def _logged(self, events: Sequence[LoggedEvent]) -> "Future[None]":
        if self._on_logged is not None and events:
            try:
                self._on_logged(events)
            except Exception:
                logger.exception("whoever hears of logged events failed on %d", len(events))
        return self._applier.put(events)


def _logged(event: Event, moment: int) -> LoggedEvent:
    """An event without a time gets the log's own, so that no two share it. A client's clock that is ahead must not make one available before it
    happened."""
    return LoggedEvent(
        event_id=event.event_id,
        user=event.user_id,
        item=event.item_id,
        timestamp=UNTIMED if event.timestamp is None else min(microseconds(event.timestamp), moment),
        action=event.action,
        value=event.value,
        request=event.request_id,
        written_at=0,
    )
