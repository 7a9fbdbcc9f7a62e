"""The client: requests in sequence, or on an open loop at a rate: the time of one counts from when it was due, not from when it could be sent."""

import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from queue import Empty, SimpleQueue
from typing import Any, Self

import numpy as np

CLIENTS = 64  # connections of the open loop: requests under way at once
_FALLBACK = b'"fallback":"'  # of an answer that is a popularity list: quick, and not what is measured
ENOUGH = 1_000  # requests that a p99.9 is made of, at least


@dataclass(frozen=True, kw_only=True)
class Taken:
    """Milliseconds of requests answered with 200, how many of those were fallbacks, and others by status (0: no answer at all)."""

    milliseconds: list[float]
    fallbacks: int
    refused: dict[int, int]

    def row(self) -> dict[str, Any]:
        if not self.milliseconds:
            return {"requests": 0, "fallbacks": 0, "refused": self.refused}
        p50, p99, p999 = np.percentile(self.milliseconds, [50, 99, 99.9]).tolist()
        enough = len(self.milliseconds) >= ENOUGH
        return {
            "requests": len(self.milliseconds),
            "fallbacks": self.fallbacks,
            "refused": self.refused,
            "p50_ms": p50,
            "p99_ms": p99,
            "p999_ms": p999 if enough else None,
            "max_ms": max(self.milliseconds),
        }


class Background:
    """A client in a thread of its own: `run` until `stop` is set, at the end of the context."""

    def __init__(self) -> None:
        self.stop = threading.Event()
        self._thread = threading.Thread(target=self.run)

    def run(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop.set()
        self._thread.join()


def ask(connection: HTTPConnection, body: bytes, path: str = "/rank") -> tuple[int, bytes]:
    """Status (0: the connection broke) and answer."""
    try:
        connection.request("POST", path, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, response.read()
    except (OSError, HTTPException) as error:
        connection.close()
        return 0, str(error).encode()


def in_sequence(port: int, bodies: Sequence[bytes]) -> Taken:
    """One after the other: the service is otherwise idle. Raises SystemExit where one is not answered with 200."""
    connection, taken, fallbacks = HTTPConnection("127.0.0.1", port, timeout=30), [], 0
    for body in bodies:
        start = time.perf_counter()
        status, answer = ask(connection, body)
        taken.append(1000 * (time.perf_counter() - start))
        fallbacks += _FALLBACK in answer
        if status != 200:
            raise SystemExit(f"HTTP {status}: {answer[:500]!r}")
    return Taken(milliseconds=taken, fallbacks=fallbacks, refused={})


def at_rate(port: int, bodies: Sequence[bytes], rate: float) -> Taken:
    """`rate` a second with exponential gaps (Poisson arrivals), whether earlier ones are answered or not."""
    due = np.cumsum(np.random.default_rng(1).exponential(1 / rate, len(bodies)))
    queue: SimpleQueue[tuple[float, bytes]] = SimpleQueue()
    start = time.perf_counter() + 0.5
    for moment, body in zip(due, bodies, strict=True):
        queue.put((start + moment, body))
    taken: list[float] = []
    fallbacks: list[bool] = []
    refused: Counter[int] = Counter()

    def client() -> None:
        connection = HTTPConnection("127.0.0.1", port, timeout=30)
        while True:
            try:
                moment, body = queue.get_nowait()
            except Empty:
                return
            time.sleep(max(0.0, moment - time.perf_counter()))
            status, answer = ask(connection, body)
            if status == 200:
                taken.append(1000 * (time.perf_counter() - moment))
                fallbacks.append(_FALLBACK in answer)
            else:
                refused[status] += 1

    threads = [threading.Thread(target=client) for _ in range(min(CLIENTS, len(bodies)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return Taken(milliseconds=taken, fallbacks=sum(fallbacks), refused=dict(refused))
