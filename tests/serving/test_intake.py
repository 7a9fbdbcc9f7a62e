"""Events from request to history: who is told what, and when, while disks fill, stores go away and come back with less than they had."""

import asyncio
import errno
import os
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from features.appending import StoreWentBackError
from features.repository import FeatureStoreError
from serving.errors import NotNow, RequestError
from serving.event_records import LoggedEvent
from serving.intake import Intake
from serving.schemas import EventsAnswer, EventsRequest
from serving.state import State, StateSettings
from serving.users import Users

ACTIONS = ("click", "view")


class Items:
    """A catalogue of i1 … i9."""

    def id_of(self, key: str) -> int | None:
        return int(key[1:]) if key in {f"i{n}" for n in range(1, 10)} else None


class Histories:
    """What an online store promises, in a dictionary: the oracle, and a store that can be told to fail."""

    def __init__(self) -> None:
        self.events: dict[int, list[tuple[int, int, int]]] = {}
        self.position = 0
        self.fails: Exception | None = None
        self.fails_after_writing = 0
        self.batches: list[int] = []

    def applied(self, log: str) -> int:
        if self.fails:
            raise self.fails
        return self.position

    def append_events(self, users: Any, items: Any, actions: Any, times: Any, *, log: str, positions: Any, since: int) -> Any:
        if self.fails:
            raise self.fails
        if self.position < since:
            raise StoreWentBackError("went back")
        places = []
        for user, item, action, at, position in zip(*(v.tolist() for v in (users, items, actions, times, positions)), strict=True):
            if position <= self.position:
                places.append(0)
                continue
            self.events.setdefault(user, []).append((item, action, at))
            self.position = position
            places.append(len(self.events[user]))
        self.batches.append(len(places))
        if self.fails_after_writing:
            self.fails_after_writing -= 1
            raise FeatureStoreError("the answer got lost")
        return np.array(places)


class Service:
    """An intake over a state folder, which can be opened again."""

    def __init__(self, folder: Path, histories: Histories, **values: Any) -> None:
        self.state = State(StateSettings(folder=folder), "f" * 64)
        self.told: list[tuple[int, int]] = []
        self.histories = histories
        settings: dict[str, Any] = {"apply_seconds": 5.0, "max_events": 100, "listeners": [self._listen]} | values
        self.users = Users({"u1": 1, "u2": 2}, self.state)
        timer = lambda stage: nullcontext()  # noqa: E731
        self.intake = Intake(log=self.state.events, users=self.users, catalogue=Items(), actions=ACTIONS, online=histories, timer=timer, **settings)

    def _listen(self, users: Any, items: Any, actions: Any, times: Any, places: Any) -> None:
        self.told += list(zip(users.tolist(), places.tolist(), strict=True))

    def take(self, *rows: dict[str, Any]) -> EventsAnswer:
        return self.intake.take(request(*rows))

    def logged(self) -> list[LoggedEvent]:
        return [event for chunk in self.state.events.read() for event in chunk]

    def close(self, seconds: float = 5.0) -> None:
        self.intake.close(seconds)
        self.state.close()


def request(*rows: Any) -> EventsRequest:
    return EventsRequest.model_validate({"events": list(rows)})


def row(user: str = "u1", item: str = "i1", action: str = "click", **values: Any) -> dict[str, Any]:
    return {"user_id": user, "item_id": item, "action": action, **values}


def counts(answer: EventsAnswer) -> tuple[int, int, int, int, int]:
    return answer.accepted, answer.duplicates, answer.rejected, answer.pending, answer.new_users


@pytest.fixture
def histories() -> Histories:
    return Histories()


@pytest.fixture
def service(tmp_path: Path, histories: Histories) -> Iterator[Service]:
    made = Service(tmp_path, histories)
    yield made
    made.close()


def test_rows_are_taken_one_by_one(service: Service, histories: Histories) -> None:
    answer = service.take(row(), row(item="nothing"), row("new", "i2"), row(event_id="a"), row(event_id="a"), "no row", row("new", action="stare"))
    assert counts(answer) == (3, 1, 3, 0, 1)
    assert [(r.place, r.field) for r in answer.rejections] == [(1, "item_id"), (5, "event"), (6, "action")]
    assert {user: [item for item, _, _ in events] for user, events in histories.events.items()} == {1: [1, 1], 3: [2]}
    assert service.told == [(1, 1), (3, 1), (1, 2)]
    assert counts(service.take(row("new", event_id="a"))) == (0, 1, 0, 0, 0)


def test_what_an_answer_spells_out_is_bounded(tmp_path: Path, histories: Histories) -> None:
    service = Service(tmp_path, histories, max_events=1_000)
    answer = service.take(*[row(item="x" * 512)] * 1_000)
    assert answer.rejected == 1_000 and len(answer.rejections) == 100 and all(len(r.message) <= 300 for r in answer.rejections)
    assert len(answer.model_dump_json()) < 50_000
    with pytest.raises(RequestError, match="1001 events; expected at most 1000"):
        service.take(*[row()] * 1_001)
    service.close()


def test_an_event_never_happened_after_it_was_logged(service: Service) -> None:
    ahead = datetime.now(UTC) + timedelta(seconds=50)
    service.take(row(timestamp=ahead.isoformat()), row(timestamp="2020-01-01T00:00:00Z"), row())
    early, late, now = service.logged()
    assert early.timestamp <= early.written_at < late.written_at < now.written_at and now.timestamp == now.written_at
    assert late.timestamp == 1_577_836_800_000_000


def test_late_events_stand_where_they_arrived(service: Service, histories: Histories) -> None:
    for year in (2024, 2020, 2022):
        service.take(row(timestamp=f"{year}-01-01T00:00:00Z"))
    years = [datetime.fromtimestamp(at / 1e6, UTC).year for _, _, at in histories.events[1]]
    assert years == [2024, 2020, 2022]


def test_many_clients_share_syncs_and_lose_nothing(tmp_path: Path, histories: Histories, monkeypatch: pytest.MonkeyPatch) -> None:
    syncs, sync = [0], os.fdatasync

    def slow(descriptor: int) -> None:
        syncs[0] += 1
        time.sleep(0.004)
        sync(descriptor)

    monkeypatch.setattr(os, "fdatasync", slow)
    service = Service(tmp_path, histories)

    def client(number: int) -> None:
        for k in range(20):
            sent = [row(f"c{number}", f"i{1 + k % 9}", event_id=f"{number}-{k}"), row(f"c{(number + 1) % 16}", "i9", event_id=f"{number}-{k}-")]
            assert counts(service.take(*sent))[:2] == (2, 0)
            if k % 5 == 0:
                assert counts(service.take(*sent))[:2] == (0, 2)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(client, range(16)))
    logged = service.logged()
    assert len({event.event_id for event in logged}) == len(logged) == 640
    assert syncs[0] < 16 * 20 / 2, "requests side by side should share syncs"
    for key in {event.user for event in logged}:
        own = [int(event.item[1:]) for event in logged if event.user == key]
        assert [item for item, _, _ in histories.events[service.users[key]]] == own, "the order of the log is the order of the history"
    assert Counter(user for user, _ in service.told) == {user: len(events) for user, events in histories.events.items()}
    service.close()


def test_a_duplicate_is_not_acknowledged_before_the_event_is_on_disk(tmp_path: Path, histories: Histories, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same batch twice at once, and the disk is full: neither may be told that the event is there."""
    service = Service(tmp_path, histories)
    gate, write = threading.Event(), os.write

    def full(descriptor: int, data: Any) -> int:
        gate.wait(5)
        raise OSError(errno.ENOSPC, "No space left on device")

    with ThreadPoolExecutor(3) as pool, monkeypatch.context() as patched:
        patched.setattr("serving.event_log.os.write", full)
        futures = [pool.submit(service.take, row(event_id="a")) for _ in range(3)]
        time.sleep(0.1)
        gate.set()
        for future in futures:
            with pytest.raises(NotNow) as refused:
                future.result()
            assert refused.value.status == 507 and refused.value.retry_after > 0
    assert os.write is write
    assert counts(service.take(row(event_id="a"))) == (1, 0, 0, 0, 0) and len(service.logged()) == 1
    service.close()


def test_a_store_that_is_down_costs_no_event(tmp_path: Path, histories: Histories) -> None:
    service = Service(tmp_path, histories, apply_seconds=0.05, max_backlog=6)
    histories.fails = FeatureStoreError("online store: Redis: down")
    assert counts(service.take(row("new"), row())) == (2, 0, 0, 2, 1)
    assert counts(service.take(row("new", "i2"), row())) == (2, 0, 0, 2, 0) and service.intake.backlog == 4
    with pytest.raises(NotNow, match="4 events wait for the online store") as refused:
        service.take(row(), row(), row())
    assert refused.value.status == 503 and len(service.logged()) == 4 and not histories.events
    histories.fails = None
    for _ in range(100):
        if not service.intake.backlog:
            break
        time.sleep(0.05)
    assert [item for item, _, _ in histories.events[3]] == [1, 2] and len(histories.events[1]) == 2
    assert counts(service.take(row())) == (1, 0, 0, 0, 0)
    service.close()


def test_what_was_not_applied_is_applied_at_the_next_start(tmp_path: Path, histories: Histories) -> None:
    service = Service(tmp_path, histories, apply_seconds=0.05)
    service.take(row("a", "i1"))
    histories.fails = FeatureStoreError("down")
    service.take(row("a", "i2"), row("b", "i3"))
    service.close(0.1)
    histories.fails = None
    again = Service(tmp_path, histories)
    assert again.intake.recovered == 2 and again.told == [(3, 2), (4, 1)]
    assert [item for item, _, _ in histories.events[3]] == [1, 2] and [item for item, _, _ in histories.events[4]] == [3]
    assert counts(again.take(row("b"))) == (1, 0, 0, 0, 0), "b is known already"
    again.close()
    assert Service(tmp_path, histories).intake.recovered == 0


def test_an_answer_that_got_lost_applies_nothing_twice(service: Service, histories: Histories) -> None:
    histories.fails_after_writing = 2
    assert counts(service.take(row(), row())) == (2, 0, 0, 0, 0)
    assert counts(service.take(row())) == (1, 0, 0, 0, 0)
    assert len(histories.events[1]) == 3


def test_a_store_that_went_back_gets_from_the_log_what_it_lost(service: Service, histories: Histories) -> None:
    service.take(row("u1", "i1"), row("u2", "i2"))
    kept, position = {user: list(events) for user, events in histories.events.items()}, histories.position
    for item in ("i3", "i4", "i5"):
        service.take(row("u1", item), row("u2", item))
    histories.events, histories.position = kept, position  # an older copy came back
    assert counts(service.take(row("u1", "i6"))) == (1, 0, 0, 0, 0)
    assert [item for item, _, _ in histories.events[1]] == [1, 3, 4, 5, 6] and [item for item, _, _ in histories.events[2]] == [2, 3, 4, 5]


def test_a_new_build_gets_what_came_since_it_was_made(tmp_path: Path, histories: Histories) -> None:
    """Its snapshot holds what was ingested: the log up to some event. What came later is applied before it is ready, and nothing twice."""
    service = Service(tmp_path, histories)
    service.take(*[row("u1", f"i{n}") for n in range(1, 7)], row("new", "i9"))
    third = service.logged()[2]
    service.close()
    build = Histories()
    build.events, build.position = {1: histories.events[1][:3]}, third.written_at
    again = Service(tmp_path, build)
    assert again.intake.recovered == 4 and build.events == histories.events
    assert counts(again.take(row("u1", "i7"))) == (1, 0, 0, 0, 0)
    again.close()


def test_events_of_another_model_are_left_out_of_histories(tmp_path: Path, histories: Histories) -> None:
    """A new build of the features, whose catalogue lacks an item that the log has."""
    service = Service(tmp_path, histories)
    service.take(row("u1", "i1"), row("u1", "i9"), row("u1", "i2"))
    service.close()

    class Fewer(Items):
        def id_of(self, key: str) -> int | None:
            return None if key == "i9" else super().id_of(key)

    fresh = Histories()
    state = State(StateSettings(folder=tmp_path), "e" * 64)
    timer = lambda stage: nullcontext()  # noqa: E731
    users = Users({"u1": 1}, state)
    intake = Intake(log=state.events, users=users, catalogue=Fewer(), actions=ACTIONS, online=fresh, timer=timer, max_events=9)  # type: ignore[arg-type]
    assert intake.recovered == 2 and [item for item, _, _ in fresh.events[1]] == [1, 2]
    intake.close()
    state.close()


def test_a_listener_that_fails_costs_nobody_anything(tmp_path: Path, histories: Histories) -> None:
    heard: list[int] = []

    def fails(*columns: Any) -> None:
        raise RuntimeError("listener")

    def logged(events: Sequence[LoggedEvent]) -> None:
        heard.append(len(events))
        raise RuntimeError("hears of logged events")

    service = Service(tmp_path, histories, on_logged=logged)
    service.intake._applier._listeners.insert(0, fails)
    assert counts(service.take(row(), row())) == (2, 0, 0, 0, 0)
    assert service.told == [(1, 1), (1, 2)] and heard == [2]
    service.close()


def test_closing_takes_what_was_sent_and_no_more(tmp_path: Path, histories: Histories) -> None:
    service = Service(tmp_path, histories)
    with ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(service.take, row(event_id=f"{n}")) for n in range(200)]
        time.sleep(0.02)
        service.intake.close()
        taken = sum(future.exception() is None for future in futures)
        refused = {getattr(future.exception(), "status", None) for future in futures if future.exception()}
    assert taken == len(service.logged()) == len(histories.events.get(1, [])) and refused <= {503}
    service.state.close()


def test_an_event_loop_may_wait_too(service: Service, histories: Histories) -> None:
    async def all_at_once() -> list[EventsAnswer]:
        return await asyncio.gather(*(service.intake.take_soon(request(row(event_id=f"{n % 40}"))) for n in range(80)))

    answers = asyncio.run(all_at_once())
    assert sum(a.accepted for a in answers) == 40 == len(histories.events[1]) and sum(a.duplicates for a in answers) == 40


def test_a_client_that_gives_up_takes_nobody_with_it(service: Service, histories: Histories) -> None:
    async def some_give_up() -> list[EventsAnswer]:
        tasks = [asyncio.ensure_future(service.intake.take_soon(request(row(event_id=f"{n}")))) for n in range(60)]
        for n, task in enumerate(tasks):
            if n % 3 == 0:
                await asyncio.sleep(0.001 * (n % 4))
                task.cancel()
        return [answer for answer in await asyncio.gather(*tasks, return_exceptions=True) if isinstance(answer, EventsAnswer)]

    answers = asyncio.run(some_give_up())
    assert len(answers) >= 40 and all(counts(answer) == (1, 0, 0, 0, 0) for answer in answers)
    logged = [event.event_id for event in service.logged()]
    assert len(set(logged)) == len(logged) == len(histories.events[1]) >= len(answers)
