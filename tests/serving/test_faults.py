"""A service on a real Redis that is stopped, killed and brought back while requests go on; a flood; tokens; a locked SQLite; malformed requests."""

import asyncio
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import httpx
import psutil
import pytest

from serving.guard import AVOIDED, DOWN, SLOW
from serving.tokens import TOKENS
from tests.serving.bento import free_port, make_outputs, server
from tests.serving.conftest import Running
from tests.serving.fuzz import fuzz
from tests.serving.load import Load
from tests.serving.test_swap import check_nothing_lost, workers

SETTINGS = {
    "store": {"deadline_ms": 150, "failures": 3, "open_seconds": 0.3, "max_open_seconds": 1.0},
    "gate": {"lists": 2, "waiting": 6, "max_wait_ms": 150},
    "stop": {"linger_seconds": 0.2},
}
READER, WRITER, NOBODY = "reader-0123456789abcdef", "writer-0123456789abcdef", "nobody-0123456789abcdef"
HEADERS = {"Authorization": f"Bearer {WRITER}"}


class Redis:
    """A redis-server that can be stopped, killed and started again on its port, with what it knew."""

    def __init__(self, folder: Path) -> None:
        self.port, self._folder = free_port(), folder
        self.start()

    def start(self) -> None:
        program = shutil.which("redis-server")
        assert program
        arguments = ["--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "yes", "--appendfsync", "always"]
        self.process = subprocess.Popen([program, *arguments, "--dir", str(self._folder)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for _ in range(400):
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
                return
            except OSError:
                time.sleep(0.05)
        raise AssertionError("redis-server does not answer")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(10)


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Redis]:
    if shutil.which("redis-server") is None:
        pytest.skip("redis-server is not installed (apt-get install redis-server)")
    started = Redis(tmp_path_factory.mktemp("redis"))
    yield started
    started.process.send_signal(signal.SIGCONT)
    started.kill()


@pytest.fixture(scope="module")
def service(redis: Redis, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[httpx.Client, int, Path]]:
    folder = tmp_path_factory.mktemp("faults")
    made = make_outputs(folder / "build", features={"online_store": "redis", "redis_address": f"127.0.0.1:{redis.port}"}, **SETTINGS)
    made.package()
    with ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:  # for this server alone
            patch.setenv(TOKENS, f"reader read {READER}\nwriter read,events {WRITER}\nnobody metrics {NOBODY}")
            client, process = stack.enter_context(server(made.bento, folder / "state"))
        yield client, process, folder / "state"


def test_tokens(service: tuple[httpx.Client, int, Path]) -> None:
    client, _, state = service
    event = {"events": [{"user_id": "u0001", "item_id": "i0001", "action": "click"}]}
    asked = {
        ("/recommend", READER): 200,
        ("/events", READER): 403,
        ("/events", WRITER): 200,
        ("/recommend", NOBODY): 403,
        ("/recommend", "x" * 30): 401,
    }
    for (path, token), status in asked.items():
        body = event if path == "/events" else {"user_id": "u0001"}
        response = client.post(path, json=body, headers={"Authorization": f"Bearer {token}"})
        assert response.status_code == status and token not in response.text, (path, status)
    assert client.post("/recommend", json={"user_id": "u0001"}).headers["www-authenticate"] == "Bearer"
    assert [client.get("/metrics", headers={"Authorization": f"Bearer {token}"}).status_code for token in (NOBODY, READER)] == [200, 403]
    assert client.get("/readyz").status_code == 200
    output = (state.parent / "state.out").read_text()
    assert not any(secret in output for secret in (READER, WRITER, NOBODY)), "no secret in the log"


def metric(client: httpx.Client, line: str) -> float:
    text = client.get("/metrics", headers={"Authorization": f"Bearer {NOBODY}"}).text
    return float(next((each.rpartition(" ")[2] for each in text.splitlines() if each.startswith(line)), 0))


def until(what: str, load: Load, reason: str | None, seconds: float = 40) -> None:
    """Until lists are answered with this fallback (None: personal ones), five of them."""
    wanted, end = load.fallbacks[reason] + 5, time.monotonic() + seconds
    while load.fallbacks[reason] < wanted:
        assert time.monotonic() < end, f"{what}: {load.fallbacks}, {load.failures[:2]}"
        time.sleep(0.02)


@pytest.mark.parametrize("fault", ["stopped", "killed"])
def test_redis_away_and_back(service: tuple[httpx.Client, int, Path], redis: Redis, fault: str) -> None:
    client, _, state = service
    with Load(str(client.base_url), fault, clients=2, headers=HEADERS, pause=0.02) as load:
        until("before", load, None)
        if fault == "stopped":
            redis.process.send_signal(signal.SIGSTOP)
        else:
            redis.kill()
        until("breaker open", load, AVOIDED)
        assert metric(client, 'longtrail_breaker_state{breaker="online_store",state="closed"}') == 0
        assert load.fallbacks[SLOW if fault == "stopped" else DOWN] >= 3, load.fallbacks
        if fault == "stopped":
            redis.process.send_signal(signal.SIGCONT)
        else:
            redis.start()
        until("back", load, None)
        until("still there", load, None)
    lists = [seconds for _, path, seconds in load.seconds if path == "/recommend"]
    assert not [failure for failure in load.failures if "/recommend" in failure], load.failures[:3]
    assert max(lists) < 5.0, "a deadline of 0.15 s, on a machine that may be busy"
    assert metric(client, 'longtrail_breaker_state{breaker="online_store",state="closed"}') == 1
    check_nothing_lost(load, state)


def test_a_flood_is_refused_early_and_who_is_let_in_is_served(service: tuple[httpx.Client, int, Path]) -> None:
    client, _, _ = service
    statuses: Counter[int] = Counter()
    waited: list[float] = []

    async def flood() -> None:
        limits = httpx.Limits(max_connections=60)
        async with httpx.AsyncClient(base_url=client.base_url, headers=HEADERS, timeout=30, limits=limits) as many:
            end = time.monotonic() + 3

            async def one() -> None:
                while time.monotonic() < end:
                    start = time.monotonic()
                    response = await many.post("/recommend", json={"user_id": "u0003", "k": 5})
                    statuses[response.status_code] += 1
                    waited.append(time.monotonic() - start)
                    if response.status_code == 503:
                        assert response.headers["Retry-After"] == "1" and "try again" in response.json()["error"]

            await asyncio.gather(*(one() for _ in range(60)))

    asyncio.run(flood())
    assert set(statuses) == {200, 503} and statuses[200] > 10 and statuses[503] > 10, statuses
    assert max(waited) < 10.0, "60 clients on one core, most of whose time is their own"
    assert client.post("/recommend", json={"user_id": "u0003"}, headers=HEADERS).status_code == 200


def test_malformed_requests(running: Running) -> None:
    (worker,) = workers(running.process)
    found = asyncio.run(fuzz(str(running.client.base_url), count=1_200, worker=worker.pid))
    assert not found.faults, "\n".join(found.faults[:5])
    assert found.sent == 1_200 and found.statuses["400"] > 300 and {"200", "404", "413", "415", "431"} <= set(found.statuses), found.statuses
    assert psutil.pid_exists(worker.pid) and running.client.get("/readyz").status_code == 200
    assert running.client.post("/rank", json={"user_id": "u0001", "candidates": ["i0001"]}).status_code == 200


def test_a_locked_sqlite_costs_no_list(running: Running) -> None:
    """Another program writes to the store: histories wait, lists do not, and no event is lost."""
    (database,) = (running.state / "online").rglob("*.db")
    with (
        Load(str(running.client.base_url), f"locked-{os.getpid()}", clients=2, first=46, users=4) as load,
        closing(sqlite3.connect(database, timeout=20)) as other,
    ):
        load.wait_for_answers(4)
        other.execute("BEGIN IMMEDIATE")
        load.wait_for_answers(12)
        other.rollback()
        load.wait_for_answers(6)
    assert not load.failures and set(load.fallbacks) == {None}, (load.failures[:3], load.fallbacks)
    check_nothing_lost(load, running.state)
