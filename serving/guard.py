"""Around the online store: every read has a deadline, and a store that keeps failing is left alone for a while.

What cannot be read raises Unavailable, and the engine answers with a popularity list that says so.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextvars import copy_context
from typing import Any, Literal, TypeVar

from longtrail.config import StoreSettings
from serving.errors import RequestError, Unavailable

T = TypeVar("T")
State = Literal["closed", "half_open", "open"]
Outcome = Literal["ok", "slow", "down", "avoided"]

SLOW, DOWN, AVOIDED = "store slow", "store down", "store avoided"  # the reasons, as they stand in answers, logs and metrics

_SAYS = {"open": "left alone for a while: lists are the popular ones", "half_open": "tried again", "closed": "answers again: lists are personal"}

logger = logging.getLogger("longtrail.guard")


def _ignore(what: Any) -> None:
    """The default of a callback."""


class Breaker:
    """A circuit breaker. Closed: calls go through. After `failures` in a row it opens: none do. After a rest, one call is let through (half open):
    if it succeeds the breaker closes, else it opens for twice as long, `max_open_seconds` at most. Thread-safe.

    The pattern is Nygard's (Release It!, 2007); the doubling is our choice.
    """

    def __init__(
        self,
        *,
        failures: int,
        open_seconds: float,
        max_open_seconds: float,
        clock: Callable[[], float] = time.monotonic,
        on_state: Callable[[State], None] = _ignore,
    ) -> None:
        """`on_state` hears of every change, in order; it must be quick and must not call back."""
        self._limit, self._first, self._longest = failures, open_seconds, max_open_seconds
        self._clock, self._on_state = clock, on_state
        self._lock = threading.Lock()
        self._state: State = "closed"
        self._failed = 0
        self._rest = open_seconds
        self._until = 0.0

    @property
    def state(self) -> State:
        return self._state

    def admits(self) -> bool:
        """Whether a call may go through now. Whoever is told yes must report back: `succeeded` or `failed`."""
        with self._lock:
            if self._state == "closed":
                return True
            if self._state == "open" and self._clock() >= self._until:
                self._become("half_open")
                return True
            return False

    def succeeded(self) -> None:
        with self._lock:
            self._failed, self._rest = 0, self._first
            if self._state == "half_open":
                self._become("closed")

    def failed(self) -> None:
        with self._lock:
            self._failed += 1
            if self._state == "half_open":
                self._rest = min(2 * self._rest, self._longest)
                self._open()
            elif self._state == "closed" and self._failed >= self._limit:
                self._rest = min(self._first, self._longest)
                self._open()

    def _open(self) -> None:
        self._until = self._clock() + self._rest
        self._become("open")

    def _become(self, state: State) -> None:
        self._state = state
        self._on_state(state)


class StoreGuard:
    """Calls functions that read the store: in threads of its own, each within the deadline, by way of the breaker. Thread-safe."""

    def __init__(self, settings: StoreSettings, *, on_read: Callable[[Outcome], None] = _ignore, on_state: Callable[[State], None] = _ignore) -> None:
        """`on_read` hears how each call ended, `on_state` of the breaker's changes."""
        self._seconds = settings.deadline_ms / 1000
        self._on_read, self._on_state = on_read, on_state
        self.breaker = Breaker(
            failures=settings.failures, open_seconds=settings.open_seconds, max_open_seconds=settings.max_open_seconds, on_state=self._changed
        )
        self._threads = _Threads(settings.threads)
        on_state("closed")

    def call(self, function: Callable[..., T], /, *arguments: Any, **named: Any) -> T:
        """What `function` returns. Raises Unavailable where it takes longer than the deadline (SLOW), raises (DOWN), or is not tried (AVOIDED);
        a RequestError or an Unavailable of its own passes through, for neither is the store's fault."""
        if not self.breaker.admits():
            self._on_read("avoided")
            raise Unavailable(AVOIDED)
        future = self._threads.run(function, arguments, named)
        try:
            result = future.result(self._seconds)
        except TimeoutError as error:
            if future.done() and future.exception() is error:  # the store's own
                raise self._failure("down", DOWN, error) from error
            future.cancel()
            raise self._failure("slow", SLOW, None) from None
        except (RequestError, Unavailable):
            self.breaker.succeeded()
            raise
        except Exception as error:
            raise self._failure("down", DOWN, error) from error
        self.breaker.succeeded()
        self._on_read("ok")
        return result

    def _failure(self, outcome: Outcome, reason: str, error: Exception | None) -> Unavailable:
        if self.breaker.state == "closed":  # while it is open, a line for each trial would say nothing new
            logger.warning(
                "online store: %s", f"no answer within {self._seconds * 1000:g} ms" if error is None else f"{type(error).__name__}: {error}"
            )
        self.breaker.failed()
        self._on_read(outcome)
        return Unavailable(reason)

    def _changed(self, state: State) -> None:
        level = logging.INFO if state == "half_open" else logging.WARNING
        logger.log(level, "online store: %s", _SAYS[state])
        self._on_state(state)

    def close(self) -> None:
        """No more calls; those under way end by themselves."""
        self._threads.close()


class Guarded:
    """An online store whose `read` goes by way of a StoreGuard. All else is the store's own: a write must not be cut off half-way, for nobody could
    say whether it happened."""

    def __init__(self, online: Any, guard: StoreGuard) -> None:
        self._online = online
        self._guard = guard

    def read(self, user_ids: Any, max_length: int, /, *, seen: bool = False) -> Any:
        """The store's `read`. Raises Unavailable."""
        return self._guard.call(self._online.read, user_ids, max_length, seen=seen)

    def together(self, function: Callable[..., T], /, *arguments: Any) -> T:
        """What `function(store, *arguments)` returns, several reads under one deadline. Raises Unavailable."""
        return self._guard.call(function, self._online, *arguments)

    @property
    def plain(self) -> Any:
        """The store without the guard: for work in the background, which may take longer and must not open the breaker."""
        return self._online

    def __getattr__(self, name: str) -> Any:
        return getattr(self._online, name)


class _Threads:
    """A few threads that run functions. Daemons, unlike ThreadPoolExecutor's: a silent store must not keep the process from exiting."""

    def __init__(self, count: int) -> None:
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._count = count
        for number in range(count):
            threading.Thread(target=self._serve, name=f"store-{number}", daemon=True).start()

    def run(self, function: Callable[..., T], arguments: tuple[Any, ...], named: dict[str, Any]) -> "Future[T]":
        """The function's result to come. It runs with the caller's context variables."""
        future: Future[T] = Future()
        context = copy_context()

        def work() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                result = context.run(function, *arguments, **named)
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(result)

        self._work.put(work)
        return future

    def close(self) -> None:
        for _ in range(self._count):
            self._work.put(None)

    def _serve(self) -> None:
        while (work := self._work.get()) is not None:
            work()
