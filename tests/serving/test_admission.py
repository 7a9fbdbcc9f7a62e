"""Lanes and rates beside their definitions: never more in work than slots, never more waiting than allowed, nobody waits longer than told."""

import asyncio
import time

from hypothesis import given, settings
from hypothesis import strategies as st

from serving.admission import Lane, RateLimit


def test_first_come_first_served_and_the_one_too_many_is_refused_at_once() -> None:
    async def scenario() -> list[str]:
        lane, done = Lane(slots=1, waiting=2, max_wait=5.0), []

        async def request(name: str) -> None:
            if not await lane.enter():
                done.append(f"{name} refused")
                return
            await asyncio.sleep(0.01)
            done.append(name)
            lane.leave()

        tasks = []
        for name in "abcd":
            tasks.append(asyncio.ensure_future(request(name)))
            await asyncio.sleep(0)
        assert (lane.working, lane.waiting) == (1, 2)
        await asyncio.gather(*tasks)
        assert (lane.working, lane.waiting) == (0, 0)
        return done

    assert asyncio.run(scenario()) == ["d refused", "a", "b", "c"]


def test_nobody_waits_longer_than_told_and_a_slot_is_never_lost() -> None:
    async def scenario() -> float:
        lane = Lane(slots=1, waiting=5, max_wait=0.05)
        assert await lane.enter()
        start = time.perf_counter()
        assert await asyncio.gather(*(lane.enter() for _ in range(3))) == [False] * 3
        waited = time.perf_counter() - start
        lane.leave()
        assert await lane.enter() and not lane.waiting
        return waited

    assert 0.045 < asyncio.run(scenario()) < 0.5


def test_a_request_that_is_cancelled_while_its_turn_comes_passes_it_on() -> None:
    async def scenario() -> None:
        lane = Lane(slots=1, waiting=5, max_wait=5.0)
        assert await lane.enter()
        first, second = (asyncio.ensure_future(lane.enter()) for _ in range(2))
        await asyncio.sleep(0)
        lane.leave()  # first's turn, which it does not hear of any more
        first.cancel()
        assert await second
        third = asyncio.ensure_future(lane.enter())
        await asyncio.sleep(0)
        third.cancel()
        await asyncio.sleep(0)
        assert (lane.working, lane.waiting) == (1, 0)
        lane.leave()
        assert lane.working == 0

    asyncio.run(scenario())


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(0, 5), st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=40))
def test_never_more_than_slots_in_work(slots: int, waiting: int, requests: list[tuple[int, int]]) -> None:
    async def scenario() -> None:
        lane = Lane(slots=slots, waiting=waiting, max_wait=0.002)
        working = most = 0

        async def request(pause: int, work: int) -> None:
            nonlocal working, most
            await asyncio.sleep(pause / 1000)
            if await lane.enter():
                working += 1
                most = max(most, working)
                await asyncio.sleep(work / 1000)
                working -= 1
                lane.leave()
            assert lane.waiting <= waiting

        await asyncio.gather(*(request(*each) for each in requests))
        assert most <= slots and (lane.working, lane.waiting) == (0, 0)

    asyncio.run(scenario())


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("ab"), st.floats(0, 2)), max_size=60))
def test_a_rate_is_a_burst_and_then_so_many_a_second(asks: list[tuple[str, float]]) -> None:
    """Of any stretch of time a client gets at most burst + rate x seconds, and whoever is told to wait gets through after that wait."""
    clock = Clock()
    tested = RateLimit(per_second=2.0, burst=3, clock=clock)
    admitted: dict[str, list[float]] = {"a": [], "b": []}
    for client, pause in asks:
        clock.now += pause
        wait = tested.wait(client)
        if wait == 0:
            admitted[client].append(clock.now)
        else:
            assert 0 < wait <= 0.5
            clock.now += wait + 1e-9
            assert tested.wait(client) == 0
            admitted[client].append(clock.now)
    for times in admitted.values():
        for first in range(len(times)):
            for last in range(first, len(times)):
                assert last - first + 1 <= 3 + 2.0 * (times[last] - times[first]) + 1e-6


def test_only_so_many_clients_are_remembered() -> None:
    tested = RateLimit(per_second=0.001, burst=1, clock=Clock(), clients=2)
    assert tested.wait("a") == 0 and tested.wait("a") > 900
    assert tested.wait("b") == 0 and tested.wait("c") == 0
    assert tested.wait("a") == 0, "forgotten"
    assert len(tested._buckets) == 2
