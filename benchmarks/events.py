"""What /events takes: durable events a second, and how long each waits, with group commit and with a sync for every request.

    python -m benchmarks.events                     # some two minutes on 2 cores
    python -m benchmarks.events --bento build/bento # and the packaged service, through HTTP
    python -m benchmarks.events --seconds 10 --folder /mnt/disk

The whole intake (checks, ids, log, sync, histories of 1,000 events in SQLite) without HTTP: clients are threads that send a batch, wait for the
answer, and send the next. The rival is the same intake with groups of one request: a sync each. The disk is that of --folder; what one sync of it
costs is measured before and after. Through HTTP there is no such rival, for the service always groups.
"""

import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from http.client import HTTPConnection
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow.parquet as pq
import typer
from numpy.typing import NDArray

from benchmarks.serving.servers import started
from features.online import OnlineFeatures
from features.repository import apply, write_repository
from longtrail.config import FeatureSettings
from longtrail.files import read_json, write_json
from serving.intake import Intake
from serving.schemas import EventsRequest
from serving.state import State, StateSettings
from serving.users import Users

ROOT = Path(__file__).resolve().parent.parent
USERS, LENGTH, ITEMS = 500, 1_000, 10_000
ACTIONS = ("click", "view")
CLIENTS, BATCHES = (1, 8, 64), (1, 20)
WARM_UP = 0.3  # s before a cell counts


class Items:
    """A catalogue whose keys are its ids."""

    def id_of(self, key: str) -> int | None:
        return int(key)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One cell of the table. Milliseconds, of an event from the call to the answer; `syncs` of the disk a second."""

    clients: int
    batch: int
    group_commit: bool
    events_per_second: float
    p50: float
    p99: float
    syncs_per_second: float | None


class Stages:
    """How long answers waited for the log, and then for the histories."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {"log": [], "apply": []}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name].append(time.perf_counter() - start)


def make_store(folder: Path) -> Path:
    """A Feast repository with a SQLite store that holds USERS histories of LENGTH events."""
    write_repository(folder, "benchmark", FeatureSettings(online_history_length=LENGTH))
    apply(folder, LENGTH)
    online, rng = OnlineFeatures(folder), np.random.default_rng(0)
    for user in range(1, USERS + 1):
        times = 1_700_000_000_000_000 + np.arange(LENGTH) * 10**9
        online.append_events(np.full(LENGTH, user), rng.integers(1, ITEMS, LENGTH), rng.integers(1, 3, LENGTH), times)
    return folder


def sync_ms(folder: Path, times: int = 200) -> tuple[float, float]:
    """p50 and p99 of appending a record and syncing, milliseconds."""
    taken, path = [], folder / "probe"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for _ in range(times):
        os.write(descriptor, b"x" * 120)
        start = time.perf_counter()
        os.fdatasync(descriptor)
        taken.append(1e3 * (time.perf_counter() - start))
    os.close(descriptor)
    path.unlink()
    return float(np.quantile(taken, 0.5)), float(np.quantile(taken, 0.99))


def measure(store: Path, folder: Path, *, clients: int, batch: int, group: bool, seconds: float) -> tuple[Row, Stages]:
    """Closed loop: each client sends the next batch when the last is answered."""
    shutil.rmtree(folder, ignore_errors=True)
    state, stages = State(StateSettings(folder=folder), "0" * 64), Stages()
    intake = Intake(
        log=state.events,
        users=Users({f"u{n}": n for n in range(1, USERS + 1)}, state),
        catalogue=Items(),  # type: ignore[arg-type]
        actions=ACTIONS,
        online=OnlineFeatures(store, state=state.online),
        timer=stages,
        max_events=1_000,
        group=1_000 if group else 1,
    )

    def send(events: list[dict[str, str]]) -> dict[str, Any]:
        return intake.take(EventsRequest.model_validate({"events": events})).model_dump()

    latencies = closed_loop([send] * clients, batch, seconds, users=[f"u{n}" for n in range(1, USERS + 1)], items=[str(n) for n in range(1, ITEMS)])
    each = state.events.syncs / (seconds + WARM_UP)
    intake.close()
    state.close()
    return _row(latencies, clients=clients, batch=batch, seconds=seconds, group_commit=group, syncs_per_second=each), stages


def measure_http(port: int, *, clients: int, batch: int, seconds: float, users: list[str], items: list[str], action: str) -> Row:
    """As `measure`, each client with a connection of its own to a service."""

    def sender() -> Callable[[list[dict[str, str]]], dict[str, Any]]:
        connection = HTTPConnection("127.0.0.1", port, timeout=30)

        def send(events: list[dict[str, str]]) -> dict[str, Any]:
            body = json.dumps({"events": [event | {"action": action} for event in events]})
            connection.request("POST", "/events", body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            content = answer.read()
            if answer.status != 200:
                raise RuntimeError(f"{answer.status} {content.decode()}")
            return dict(json.loads(content))

        return send

    latencies = closed_loop([sender() for _ in range(clients)], batch, seconds, users=users, items=items)
    return _row(latencies, clients=clients, batch=batch, seconds=seconds, group_commit=True, syncs_per_second=None)


def closed_loop(
    senders: Sequence[Callable[[list[dict[str, str]]], dict[str, Any]]], batch: int, seconds: float, *, users: list[str], items: list[str]
) -> NDArray[np.float64]:
    """Milliseconds of each request of clients that send the next batch when the last is answered. Raises RuntimeError where one is not taken."""
    latencies: list[list[float]] = [[] for _ in senders]
    start = time.perf_counter() + WARM_UP
    end, run = start + seconds, time.time_ns()

    def client(number: int) -> None:
        rng, k = np.random.default_rng(number), 0
        while (sent := time.perf_counter()) < end:
            k += 1
            picked = zip(rng.integers(len(users), size=batch).tolist(), rng.integers(len(items), size=batch).tolist(), strict=True)
            events = [
                {"user_id": users[user], "item_id": items[item], "action": ACTIONS[0], "event_id": f"{run}-{number}-{k}-{n}"}
                for n, (user, item) in enumerate(picked)
            ]
            answer = senders[number](events)
            if answer["accepted"] != batch or answer["pending"]:
                raise RuntimeError(f"{answer}; expected all of it in the histories")
            if sent >= start:
                latencies[number].append(1e3 * (time.perf_counter() - sent))

    with ThreadPoolExecutor(len(senders)) as pool:
        list(pool.map(client, range(len(senders))))
    return np.concatenate([np.array(each) for each in latencies])


def _row(latencies: NDArray[np.float64], *, seconds: float, batch: int, **values: Any) -> Row:
    p50, p99 = (float(np.quantile(latencies, q)) for q in (0.5, 0.99))
    return Row(batch=batch, events_per_second=len(latencies) * batch / seconds, p50=p50, p99=p99, **values)


def through_http(bento: Path, work: Path, seconds: float) -> list[Row]:
    """The packaged service at `bento`, over a state folder in `work`."""
    artifacts = bento / "src" / "artifacts"
    users = pq.read_table(artifacts / "users.parquet")["user_key"].to_pylist()
    items = [key for key in pq.read_table(artifacts / "catalogue.parquet")["item_key"].to_pylist() if key]
    action = str(read_json(artifacts / "manifest.json")["actions"][0])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    command = [sys.executable, "-m", "serving.run", "--bento", str(bento), "--port", str(port), "--state", str(work / "served")]
    rows = []
    with started(command, ROOT, port, work / "service.log"):
        for batch in BATCHES:
            for clients in CLIENTS:
                rows.append(measure_http(port, clients=clients, batch=batch, seconds=seconds, users=users, items=items, action=action))
                _print(rows[-1], "http", None)
    return rows


def _print(row: Row, how: str, stages: Stages | None) -> None:
    log, histories = ("–", "–") if stages is None else (f"{1e3 * float(np.median(stages.seconds[name])):.1f}" for name in ("log", "apply"))
    syncs = "–" if row.syncs_per_second is None else f"{row.syncs_per_second:,.0f}"
    group = "on" if row.group_commit else "off"
    cells = [how, str(row.clients), str(row.batch), group, f"{row.events_per_second:,.0f}", f"{row.p50:.1f}", f"{row.p99:.1f}", syncs, log, histories]
    print(f"| {' | '.join(cells)} |", flush=True)


def main(
    seconds: Annotated[float, typer.Option(help="of each cell")] = 6.0,
    bento: Annotated[Path | None, typer.Option(help="also measure this packaged service")] = None,
    folder: Annotated[Path, typer.Option(help="where the log is written: whose disk is measured")] = ROOT / "build",
    out: Annotated[Path, typer.Option(help="JSON to write")] = ROOT / "build" / "benchmarks" / "events.json",
) -> None:
    """Print a table of clients x group commit, and write it as JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    with tempfile.TemporaryDirectory(prefix="events-", dir=folder) as aside:
        work = Path(aside)
        store = make_store(work / "feast")
        before = sync_ms(work)
        print("| through | clients | events a request | group commit | events/s | p50 ms | p99 ms | syncs/s | waits for: log | histories |")
        print("|---|---|---|---|---|---|---|---|---|---|")
        for batch in BATCHES:
            for clients in CLIENTS:
                for group in (False, True):
                    row, stages = measure(store, work / "state", clients=clients, batch=batch, group=group, seconds=seconds)
                    rows.append(row)
                    _print(row, "intake", stages)
        if bento is not None:
            rows += through_http(bento.absolute(), work, seconds)
        after = sync_ms(work)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    print(f"one sync of this disk: p50 {before[0]:.2f}, p99 {before[1]:.2f} ms before; {after[0]:.2f}, {after[1]:.2f} ms after")
    stamp = datetime.now(UTC).isoformat(timespec="seconds")
    print(f"{stamp}, {os.cpu_count()} cores, {platform.machine()}, commit {commit}")
    made = {"at": stamp, "cores": os.cpu_count(), "commit": commit, "sync_ms": {"before": before, "after": after}}
    write_json(out, {"rows": [asdict(row) for row in rows], **made})


if __name__ == "__main__":
    typer.run(main)
