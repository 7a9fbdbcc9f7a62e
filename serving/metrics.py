"""What the service tells Prometheus. ONE object, made in the worker (BentoML sets PROMETHEUS_MULTIPROC_DIR there); nobody else makes instruments.

Names follow Prometheus' conventions: base units, `_total` for counters. No label ever holds a user or an item, and none can grow without bound: after
MAX_VALUES different values a label says "other" (our choice), so that an exception's text in a label costs one series, not a server.
"""

import functools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import TYPE_CHECKING, Any

from serving.trace import current

if TYPE_CHECKING:
    from serving.drift_window import Drift

MAX_VALUES = 40  # of one label
OTHER = "other"
SECONDS = (0.001, 0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
BUILD = ("version", "arm", "ranker", "retriever", "features", "code")
BREAKER_STATES = ("closed", "half_open", "open")


class Metrics:
    """Every instrument of the service, behind methods that say what happened. Thread-safe; none of them raises or waits for a disk."""

    def __init__(self, registry: Any = None) -> None:
        """`registry`: a prometheus_client CollectorRegistry (tests); by default the process's own, which /metrics shows."""
        import prometheus_client as client  # not before the worker set PROMETHEUS_MULTIPROC_DIR

        registry = registry or client.REGISTRY

        def histogram(name: str, says: str, *labels: str) -> Any:
            return client.Histogram(name, says, labels, registry=registry, buckets=SECONDS)

        def counter(name: str, says: str, *labels: str) -> Any:
            return client.Counter(name, says, labels, registry=registry)

        def gauge(name: str, says: str, *labels: str) -> Any:
            # One worker owns a state folder: after a crash its successor's values are the ones to believe.
            return client.Gauge(name, says, labels, registry=registry, multiprocess_mode="mostrecent")

        self._stages = histogram("longtrail_stage_seconds", "Time of each stage of a request", "stage")
        self._requests = histogram("longtrail_request_seconds", "Time from a request's arrival to the end of its answer", "endpoint", "arm")
        self._answers = counter("longtrail_answers_total", "Lists answered; fallback is empty for a personal one", "endpoint", "arm", "fallback")
        self._refusals = counter("longtrail_refusals_total", "Requests answered with a status from 400", "endpoint", "status", "reason")
        self._events = counter("longtrail_events_total", "Events received, by what became of them", "outcome")
        self._reads = counter("longtrail_store_reads_total", "Reads of the online store, by how they went", "outcome")
        self._changes = counter("longtrail_changes_total", "What happened to the service itself", "what", "outcome")
        self._log_lines = counter("longtrail_log_lines_total", "Lines of the structured log", "level")
        self._in_flight = gauge("longtrail_requests_in_flight", "Requests waiting for a thread, and in work", "state")
        self._ready = gauge("longtrail_ready", "1 where /readyz answers 200")
        self._draining = gauge("longtrail_draining", "1 while the service finishes its requests before it stops")
        self._breaker = gauge("longtrail_breaker_state", "1 for the state a circuit breaker is in, 0 for the others", "breaker", "state")
        self._canary = gauge("longtrail_canary_share", "Share of the users that a canary arm has now", "arm")
        self._backlog = gauge("longtrail_backlog", "Things taken and not yet done in the background", "what")
        self._build = gauge("longtrail_build_info", "1; the labels say what is served", *BUILD)
        self._started = gauge("longtrail_start_time_seconds", "When the worker started, seconds since 1970")
        self._memory = gauge("longtrail_resident_memory_bytes", "Resident memory of the worker")
        self._files = gauge("longtrail_open_fds", "File descriptors the worker holds")
        self._psi = gauge("longtrail_drift_psi", "Population stability index of a served feature in the window", "feature", "against")
        self._psi_limit = gauge("longtrail_drift_psi_limit", "The index against packaging from which the feature has drifted", "feature")
        self._drift = gauge("longtrail_drift", "Measures of drift that are no feature's: shares, calibration, window", "measure")
        self._values: dict[str, set[str]] = {}
        self._served: tuple[str, ...] = ()
        self._held: dict[tuple[Any, tuple[str, ...]], float] = {}
        self._lock = Lock()
        self._now = {"waiting": 0, "working": 0}
        self._set(self._started, time.time())
        # Series that are there from the start: an increase from nothing is none to Prometheus.
        for outcome in ("accepted", "duplicate", "rejected"):
            self._events.labels(outcome)
        for outcome in ("ok", "slow", "down", "avoided"):
            self._reads.labels(outcome)
        for level in ("info", "warning", "error"):
            self._log_lines.labels(level)
        self.breaker("closed")
        self.draining(False)

    # ------------------------------------------------------------ requests

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Times a stage of a request; the log line of the request gets it too."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.staged(name, time.perf_counter() - start)

    def staged(self, name: str, seconds: float) -> None:
        """A stage that was timed elsewhere."""
        self._stages.labels(self._bounded("stage", name)).observe(seconds)
        if trace := current():
            trace.add(name, seconds)

    def arrived(self) -> None:
        """A request came in; exactly one `left` must follow."""
        self._move(waiting=1)

    def taken(self) -> None:
        """A thread starts on the current request: what it waited is the stage `queue`."""
        trace = current()
        if trace and not trace.working:
            trace.working = True
            self._move(waiting=-1, working=1)
            self.staged("queue", time.perf_counter() - trace.arrived)

    def left(self, endpoint: str, status: int, seconds: float, *, arm: str | None = None, reason: str | None = None, worked: bool = False) -> None:
        """A request was answered, or given up (status 499, 504)."""
        self._move(**{"working" if worked else "waiting": -1})
        endpoint = self._bounded("endpoint", endpoint)
        self._requests.labels(endpoint, self._bounded("arm", arm or "")).observe(seconds)
        if status >= 400:
            self._refusals.labels(endpoint, str(status), self._bounded("reason", reason or "")).inc()

    def answered(self, endpoint: str, arm: str, fallback: str | None, *, answer: str | None = None, items: int | None = None) -> None:
        """A list was made. `fallback` is a reason of the code (not a message), None for a personal list."""
        self._answers.labels(self._bounded("endpoint", endpoint), self._bounded("arm", arm), self._bounded("fallback", fallback or "")).inc()
        if trace := current():
            trace.arm, trace.fallback, trace.answer, trace.items = arm, fallback, answer, items

    def events(self, outcome: str, count: int = 1) -> None:
        """`count` events were accepted, duplicate, rejected, late, recovered, …"""
        self._events.labels(self._bounded("outcome", outcome)).inc(count)
        if trace := current():
            trace.events = (trace.events or 0) + count

    # ------------------------------------------------------------ the service itself

    def changed(self, what: str, outcome: str) -> None:
        """Something rare happened: (canary, stepped | rolled_back), (swap, done | refused), (breaker, opened | closed), (user_state, rebuilt), …"""
        self._changes.labels(self._bounded("what", what), self._bounded("outcome of change", outcome)).inc()

    def refused(self, reason: str) -> None:
        """Why the current request is refused, in a word of the code; counted with its status when it ends."""
        if trace := current():
            trace.reason = reason

    def store_read(self, outcome: str) -> None:
        """One read of the online store: ok, slow, down, avoided."""
        self._reads.labels(self._bounded("store outcome", outcome)).inc()

    def breaker(self, state: str, name: str = "online_store") -> None:
        """`state` is one of BREAKER_STATES."""
        for each in BREAKER_STATES:
            self._set(self._breaker, float(each == state), self._bounded("breaker", name), each)

    def canary(self, arm: str, share: float) -> None:
        self._set(self._canary, share, self._bounded("arm", arm))

    def backlog(self, what: str, count: int) -> None:
        """`count` things wait to be done in the background (events to apply, states to rebuild, lines to write)."""
        self._set(self._backlog, count, self._bounded("what", what))

    def ready(self, ready: bool) -> None:
        self._set(self._ready, float(ready))

    def draining(self, draining: bool) -> None:
        """The service stops: what is in work is finished, nothing new is taken."""
        self._set(self._draining, float(draining))

    def serves(self, *, version: str, arm: str, ranker: str, retriever: str, features: str, code: str | None) -> None:
        """What is served from now on; what was served before is set to 0."""
        self.retire()
        self._served = (version, arm, ranker, retriever, features, code or "")
        self._set(self._build, 1.0, *self._served)

    def retire(self) -> None:
        """This process serves no longer: another does."""
        if self._served:
            self._set(self._build, 0.0, *self._served)

    def refresh(self) -> None:
        """Say again what this process last said of itself. Of several processes' gauges the newest counts, and in a swap the old one speaks last."""
        for (gauge, labels), value in list(self._held.items()):
            (gauge.labels(*labels) if labels else gauge).set(value)

    def process(self, memory: int, files: int) -> None:
        """Bytes of resident memory and open file descriptors (the client library leaves both out with several processes)."""
        self._set(self._memory, memory)
        self._set(self._files, files)

    def drift(self, measured: "Drift") -> None:
        """Figures of the newest window (serving.drift_window)."""
        for name, feature in measured.features.items():
            name = self._bounded("feature", name)
            self._set(self._psi, feature.psi_training, name, "training")
            self._set(self._psi, feature.psi, name, "packaging")
            self._set(self._psi_limit, feature.limit, name)
        for measure, value in measured.measures.items():
            self._set(self._drift, value, self._bounded("measure", measure))

    def logged(self, level: str) -> None:
        self._log_lines.labels(self._bounded("level", level)).inc()

    # ------------------------------------------------------------ inside

    def _set(self, gauge: Any, value: float, *labels: str) -> None:
        self._held[gauge, labels] = value
        (gauge.labels(*labels) if labels else gauge).set(value)

    def _move(self, **by: int) -> None:
        with self._lock:  # the gauge's own inc() is not there in this mode
            for state, change in by.items():
                self._now[state] += change
                self._set(self._in_flight, self._now[state], state)

    def _bounded(self, label: str, value: str) -> str:
        known = self._values.setdefault(label, set())
        if value in known:
            return value
        with self._lock:
            if len(known) >= MAX_VALUES:
                return OTHER
            known.add(value)
        return value


@functools.cache
def metrics() -> Metrics:
    """The worker's own, made at the first call: the HTTP layer and the service are built apart and must count on the same instruments."""
    return Metrics()
