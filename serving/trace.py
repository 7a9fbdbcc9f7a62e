"""What one request leaves behind while it is worked on: filled in by whoever knows, read once at its end for the log line and the metrics.

It travels in a context variable, which BentoML's thread pool carries into the thread that does the work.
"""

import time
from contextvars import ContextVar
from dataclasses import dataclass, field


@dataclass
class Trace:
    """One request. `arrived` and stages are seconds of `time.perf_counter`; all else is None until somebody knows it."""

    request_id: str
    endpoint: str
    arrived: float = field(default_factory=time.perf_counter)
    working: bool = False  # a thread has taken it; before that it waits
    arm: str | None = None
    fallback: str | None = None
    reason: str | None = None  # why it was refused, in a word of the code: rate_limit, queue_full, …
    answer: str | None = None  # the list's own request_id, by which its click will name it
    items: int | None = None
    events: int | None = None
    stages: dict[str, float] = field(default_factory=dict)

    def add(self, stage: str, seconds: float) -> None:
        self.stages[stage] = self.stages.get(stage, 0.0) + seconds


_CURRENT: ContextVar[Trace | None] = ContextVar("longtrail_trace", default=None)


def current() -> Trace | None:
    """The request this thread or task works on; None outside one (warm-up, background threads, tests without HTTP)."""
    return _CURRENT.get()


def begin(trace: Trace) -> None:
    """Make `trace` the current one of this task and of every thread it hands work to."""
    _CURRENT.set(trace)
