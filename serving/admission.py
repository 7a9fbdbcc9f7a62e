"""Who is let in, and when: lanes with a short queue, and a rate for each client. Nothing here waits longer than it was told to."""

import asyncio
import time
from collections import OrderedDict, deque
from collections.abc import Callable

CLIENTS = 10_000  # whose rate is remembered: the least recent is forgotten, which only gives it a fresh burst; our choice


class Lane:
    """At most `slots` requests in work, at most `waiting` behind them, each for `max_wait` seconds; first come, first served.

    For one event loop. More requests would only wait longer for the same cores, and the client would have gone: better to say so at once.
    """

    def __init__(self, *, slots: int, waiting: int, max_wait: float) -> None:
        self._free = self._slots = slots
        self._most = waiting
        self._max_wait = max_wait
        self._queue: deque[asyncio.Future[None]] = deque()

    @property
    def waiting(self) -> int:
        return len(self._queue)

    @property
    def working(self) -> int:
        return self._slots - self._free

    async def enter(self) -> bool:
        """Whether the request was let in; then exactly one `leave` must follow."""
        if self._free and not self._queue:
            self._free -= 1
            return True
        if len(self._queue) >= self._most:
            return False
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.append(turn)
        try:
            await asyncio.wait((turn,), timeout=self._max_wait)
        except asyncio.CancelledError:
            self._give_up(turn)
            raise
        if turn.done():
            return True
        self._give_up(turn)
        return False

    def _give_up(self, turn: "asyncio.Future[None]") -> None:
        if turn.done():  # its turn came with the cancellation: the slot goes on
            self.leave()
        else:
            self._queue.remove(turn)

    def leave(self) -> None:
        """The request is done: the slot goes to whoever waits longest."""
        if self._queue:
            self._queue.popleft().set_result(None)
        else:
            self._free += 1


class RateLimit:
    """A token bucket for each client: `burst` requests at once, `per_second` in the long run. For one thread."""

    def __init__(self, *, per_second: float, burst: int, clock: Callable[[], float] = time.monotonic, clients: int = CLIENTS) -> None:
        self._rate, self._burst, self._clock, self._most = per_second, float(burst), clock, clients
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # client: requests left, when that was so

    def wait(self, client: str) -> float:
        """0 where the request may go on (and is counted), else the seconds until the next one may."""
        now = self._clock()
        left, then = self._buckets.pop(client, (self._burst, now))
        left = min(self._burst, left + (now - then) * self._rate)
        admitted = left >= 1.0
        self._buckets[client] = (left - 1.0 if admitted else left, now)
        if len(self._buckets) > self._most:
            self._buckets.popitem(last=False)
        return 0.0 if admitted else (1.0 - left) / self._rate
