"""The deadline and the breaker around the online store's reads: every call ends in time, and a store that comes back is used again."""

import threading
import time
from contextvars import ContextVar
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longtrail.config import StoreSettings
from serving.errors import RequestError, Unavailable
from serving.guard import AVOIDED, DOWN, SLOW, Breaker, Guarded, StoreGuard


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def breaker(clock: Clock, states: list[str] | None = None) -> Breaker:
    heard = (lambda state: None) if states is None else states.append
    return Breaker(failures=3, open_seconds=1.0, max_open_seconds=4.0, clock=clock, on_state=heard)


def test_it_opens_after_failures_in_a_row_and_closes_when_a_trial_succeeds() -> None:
    clock, states = Clock(), []
    tested = breaker(clock, states)
    for outcome in (tested.failed, tested.failed, tested.succeeded, tested.failed, tested.failed):
        assert tested.admits()
        outcome()
    assert tested.state == "closed", "a success in between starts the count again"
    tested.failed()
    assert tested.state == "open" and not tested.admits()
    clock.now = 0.99
    assert not tested.admits()
    clock.now = 1.0
    assert tested.admits() and tested.state == "half_open"
    assert not tested.admits(), "one trial at a time"
    tested.succeeded()
    assert tested.admits() and tested.admits() and states == ["open", "half_open", "closed"]


def test_the_rest_doubles_while_trials_fail_and_starts_small_again_after_a_success() -> None:
    clock = Clock()
    tested = breaker(clock)
    for _ in range(3):
        tested.failed()
    for rest in (1.0, 2.0, 4.0, 4.0):
        clock.now += rest - 0.01
        assert not tested.admits()
        clock.now += 0.01
        assert tested.admits()
        tested.failed()
    clock.now += 4.0
    assert tested.admits()
    tested.succeeded()
    for _ in range(3):
        tested.failed()
    clock.now += 1.0
    assert tested.admits()


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["call ok", "call bad"]), st.floats(0, 3)), max_size=60))
def test_beside_an_oracle(calls: list[tuple[str, float]]) -> None:
    """Calls one after another: the slow, obvious account of when one may go through."""
    clock = Clock()
    tested, failed, open_until, rest = breaker(clock), 0, None, 1.0
    for outcome, pause in calls:
        clock.now += pause
        admitted = open_until is None or clock.now >= open_until
        assert tested.admits() is admitted
        if not admitted:
            continue
        if outcome == "call ok":
            tested.succeeded()
            failed, open_until, rest = 0, None, 1.0
            continue
        tested.failed()
        failed += 1
        if open_until is not None:
            rest = min(2 * rest, 4.0)
            open_until = clock.now + rest
        elif failed >= 3:
            open_until = clock.now + rest


def guard(**changed: Any) -> tuple[StoreGuard, list[str], list[str]]:
    reads: list[str] = []
    states: list[str] = []
    options = StoreSettings(**({"deadline_ms": 60, "threads": 2, "failures": 3, "open_seconds": 0.15} | changed))
    return StoreGuard(options, on_read=reads.append, on_state=states.append), reads, states


def test_a_silent_store_costs_a_deadline_then_nothing_and_is_used_again_when_it_answers() -> None:
    tested, reads, states = guard()
    silent = threading.Event()  # set: the store answers

    def read(value: int) -> int:
        silent.wait(10)
        return value

    reasons, times = [], []
    for _ in range(5):
        start = time.perf_counter()
        with pytest.raises(Unavailable) as raised:
            tested.call(read, 1)
        times.append(time.perf_counter() - start)
        reasons.append(raised.value.reason)
    assert reasons == [SLOW] * 3 + [AVOIDED] * 2
    assert all(0.055 < seconds < 0.5 for seconds in times[:3]) and max(times[3:]) < 0.05
    silent.set()  # both threads come free
    time.sleep(0.2)
    assert tested.call(read, 7) == 7
    assert reads == ["slow"] * 3 + ["avoided"] * 2 + ["ok"]
    assert states == ["closed", "open", "half_open", "closed"]
    tested.close()


def test_every_thread_held_up_is_still_no_wait_beyond_the_deadline() -> None:
    tested, reads, _ = guard(threads=1, failures=100)
    held = threading.Event()
    start = time.perf_counter()
    for _ in range(3):
        with pytest.raises(Unavailable, match=SLOW):
            tested.call(held.wait, 10)
    assert time.perf_counter() - start < 1
    held.set()
    assert tested.call(lambda: "answer") == "answer" and reads[-1] == "ok"


@pytest.mark.parametrize("error", [OSError("refused"), TimeoutError("the client's own"), RuntimeError("broken bytes")])
def test_a_store_that_fails_is_down(error: Exception) -> None:
    tested, reads, _ = guard()

    def read() -> None:
        raise error

    with pytest.raises(Unavailable) as raised:
        tested.call(read)
    assert raised.value.reason == DOWN and raised.value.__cause__ is error and reads == ["down"]


def test_what_is_no_fault_of_the_store_passes_through_and_does_not_count() -> None:
    tested, _, _ = guard(failures=1)

    def refuse() -> None:
        raise RequestError("k", "too many")

    for _ in range(3):
        with pytest.raises(RequestError):
            tested.call(refuse)
    assert tested.breaker.state == "closed"


def test_the_callers_context_is_the_readers() -> None:
    number: ContextVar[int] = ContextVar("number", default=0)
    number.set(5)
    tested, _, _ = guard()
    assert tested.call(number.get) == 5


def test_only_reads_are_guarded() -> None:
    class Store:
        length = 9

        def read(self, users: list[int], length: int) -> None:
            raise OSError

        def append_events(self, *columns: Any) -> str:
            raise OSError("as it is")

    tested, reads, _ = guard()
    store = Guarded(Store(), tested)
    with pytest.raises(Unavailable):
        store.read([1], 5)
    with pytest.raises(OSError, match="as it is"):
        store.append_events([], [], [], [])
    assert store.length == 9 and reads == ["down"]


def test_many_threads_at_once() -> None:
    """Each caller gets its own answer, also while others fail."""
    tested, _, _ = guard(threads=4, failures=10_000, deadline_ms=5_000)
    wrong: list[tuple[int, Any]] = []

    def read(value: int) -> int:
        if value % 3 == 0:
            raise OSError
        return value

    def client(start: int) -> None:
        for value in range(start, start + 200):
            try:
                got: Any = tested.call(read, value)
            except Unavailable:
                got = None
            if got != (None if value % 3 == 0 else value):
                wrong.append((value, got))

    threads = [threading.Thread(target=client, args=(1000 * number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
