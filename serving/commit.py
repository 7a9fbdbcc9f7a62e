"""Group commit: requests that arrive while the disk syncs go to disk together with the next sync, so that its milliseconds are shared.

Nobody waits for a group to fill: a request that finds the disk idle is written at once.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import accumulate
from queue import Empty, SimpleQueue
from threading import Lock, Thread

from serving.errors import NotNow
from serving.event_log import EventLog, LogBroken, LogFull
from serving.event_records import LoggedEvent

_GROUP_EVENTS = 10_000  # of one sync: bounds what a group holds in memory; our choice
_SHUT = NotNow(503, "events", "the service is stopping; send the batch again", retry_after=1)


@dataclass(frozen=True, kw_only=True)
class Committed:
    """What became of the events of one request: on disk (with `written_at`), or in the log before."""

    events: Sequence[LoggedEvent]
    duplicates: int
    new_users: int
    applied: "Future[None]"  # done when they are in the histories


@dataclass(frozen=True)
class _Waiting:
    events: Sequence[LoggedEvent]
    future: "Future[Committed]" = field(default_factory=Future)


class GroupCommit:
    """The one writer of an event log: a thread that takes requests in order of arrival. Thread-safe."""

    def __init__(
        self,
        log: EventLog,
        *,
        new_users: Callable[[Sequence[LoggedEvent]], int],
        apply: Callable[[Sequence[LoggedEvent]], "Future[None]"],
        requests: int = 1_000,
    ) -> None:
        """Once events are on disk, `new_users` counts those of each request, then `apply` is handed all of a group; both are called in the order of
        the log and must not wait. At most `requests` are a group (1: every request waits for a sync of its own)."""
        self._log = log
        self._new_users = new_users
        self._apply = apply
        self._requests = requests
        self._queue: SimpleQueue[_Waiting | None] = SimpleQueue()
        self._lock = Lock()
        self._closed = False
        self._thread = Thread(target=self._run, name="event-commit", daemon=True)
        self._thread.start()

    def submit(self, events: Sequence[LoggedEvent]) -> "Future[Committed]":
        """Resolved when the events are on disk; raises (or the future does) NotNow where they cannot be."""
        waiting = _Waiting(events)
        with self._lock:
            if self._closed:
                raise _SHUT
            self._queue.put(waiting)
        return waiting.future

    def close(self) -> None:
        """Write what was submitted, then take no more."""
        with self._lock:
            self._closed = True
            self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        while True:
            waiting, last = self._group()
            # Whoever gave up before is left out; from here on nobody can.
            group = [each for each in waiting if each.future.set_running_or_notify_cancel()]
            if group:
                try:
                    self._commit(group)
                except LogFull as error:
                    _fail(group, NotNow(507, "events", f"{error}; nothing of this batch was kept", retry_after=30))
                except LogBroken as error:
                    _fail(group, NotNow(503, "events", f"{error}; the service must be started again", retry_after=30))
                except Exception as error:  # the thread must live: every later request waits for it
                    _fail(group, error)
            if last:
                return

    def _group(self) -> tuple[list[_Waiting], bool]:
        """What waits now, and whether it is the last."""
        first = self._queue.get()
        if first is None:
            return [], True
        group, events = [first], len(first.events)
        while len(group) < self._requests and events < _GROUP_EVENTS:
            try:
                following = self._queue.get_nowait()
            except Empty:
                break
            if following is None:
                return group, True
            group.append(following)
            events += len(following.events)
        return group, False

    def _commit(self, group: Sequence[_Waiting]) -> None:
        met = self._log.known([event.event_id for waiting in group for event in waiting.events if event.event_id is not None])
        fresh: list[list[LoggedEvent]] = []
        for waiting in group:
            fresh.append([])
            for event in waiting.events:
                if event.event_id is None:
                    fresh[-1].append(event)
                elif event.event_id not in met:
                    met.add(event.event_id)
                    fresh[-1].append(event)
        written = self._log.append([event for events in fresh for event in events])
        ends = list(accumulate(len(events) for events in fresh))
        own = [written[end - len(events) : end] for end, events in zip(ends, fresh, strict=True)]
        new_users = [self._new_users(events) for events in own]
        applied = self._apply(written)
        for waiting, events, new in zip(group, own, new_users, strict=True):
            waiting.future.set_result(Committed(events=events, duplicates=len(waiting.events) - len(events), new_users=new, applied=applied))


def _fail(group: Sequence[_Waiting], error: Exception) -> None:
    for waiting in group:
        if not waiting.future.done():
            waiting.future.set_exception(error)
