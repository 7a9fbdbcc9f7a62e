"""What /events takes: durable events a second, and how long each waits, with group commit and with a sync for every request.

    python -m benchmarks.events                     # some two minutes on 2 cores
    python -m benchmarks.events --seconds 10 --folder /mnt/disk

The whole intake (checks, ids, log, sync, histories of 1,000 events in SQLite) without HTTP: clients are threads that send a batch, wait for the
answer, and send the next. The rival is the same intake with groups of one request: a sync each. The disk is that of --folder; what one sync of it
costs is measured before and after.
"""

import os
import platform
import shutil
import subprocess
import tempfile
import threading
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from features.online import OnlineFeatures
from features.repository import ONLINE_FILE, apply, write_repository
from longtrail.config import FeatureSettings
from longtrail.files import write_json
from serving.intake import Intake
from serving.schemas import EventsRequest
from serving.state import State, StateSettings
from serving.users import Users

ROOT = Path(__file__).resolve().parent.parent
USERS, LENGTH, ITEMS = 500, 1_000, 10_000
ACTIONS = ("click", "view")


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
    syncs_per_second: float


class Stages:
    """How long answers waited for the log, and then for the histories."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {"log": [], "apply": []}

    @contextmanager
    def __call__(self, name: str) -> Any:
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
    latencies: list[list[float]] = [[] for _ in range(clients)]
    start = time.perf_counter() + 0.2
    end = start + seconds

    def client(number: int) -> None:
        rng = np.random.default_rng(number)
        k = 0
        while (sent := time.perf_counter()) < end:
            k += 1
            users, items = rng.integers(1, USERS + 1, batch).tolist(), rng.integers(1, ITEMS, batch).tolist()
            events = [
                {"user_id": f"u{user}", "item_id": str(item), "action": "click", "event_id": f"{number}-{k}-{n}"}
                for n, (user, item) in enumerate(zip(users, items, strict=True))
            ]
            answer = intake.take(EventsRequest.model_validate({"events": events}))
            if answer.accepted != batch or answer.pending:
                raise RuntimeError(f"{answer}; expected all of it in the histories")
            if sent >= start:
                latencies[number].append(time.perf_counter() - sent)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    each = state.events.syncs / (seconds + 0.2)
    intake.close()
    state.close()
    all_ = 1e3 * np.concatenate([np.array(each) for each in latencies])
    p50, p99 = (float(np.quantile(all_, q)) for q in (0.5, 0.99))
    rate = len(all_) * batch / seconds
    row = Row(clients=clients, batch=batch, group_commit=group, events_per_second=rate, p50=p50, p99=p99, syncs_per_second=each)
    return row, stages


def main(
    seconds: Annotated[float, typer.Option(help="of each cell")] = 6.0,
    folder: Annotated[Path, typer.Option(help="where the log is written: whose disk is measured")] = ROOT / "build",
    out: Annotated[Path, typer.Option(help="JSON to write")] = ROOT / "build" / "benchmarks" / "events.json",
) -> None:
    """Print a table of clients x group commit, and write it as JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="events-", dir=folder) as aside:
        work = Path(aside)
        store = make_store(work / "feast")
        assert (store / ONLINE_FILE).is_file()
        before = sync_ms(work)
        rows = []
        print("| clients | events a request | group commit | events/s | p50 ms | p99 ms | syncs/s | of p50: log | histories |")
        print("|---|---|---|---|---|---|---|---|---|")
        for batch in (1, 20):
            for clients in (1, 8, 64):
                for group in (False, True):
                    row, stages = measure(store, work / "state", clients=clients, batch=batch, group=group, seconds=seconds)
                    log, histories = (1e3 * float(np.median(stages.seconds[name])) for name in ("log", "apply"))
                    rows.append({**asdict(row), "log_p50": log, "histories_p50": histories})
                    print(
                        f"| {clients} | {batch} | {'on' if group else 'off'} | {row.events_per_second:,.0f} | {row.p50:.1f} | {row.p99:.1f} | "
                        f"{row.syncs_per_second:,.0f} | {log:.1f} | {histories:.1f} |",
                        flush=True,
                    )
        after = sync_ms(work)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    print(f"one sync of this disk: p50 {before[0]:.2f}, p99 {before[1]:.2f} ms before; {after[0]:.2f}, {after[1]:.2f} ms after")
    stamp = datetime.now(UTC).isoformat(timespec="seconds")
    print(f"{stamp}, {os.cpu_count()} cores, {platform.machine()}, commit {commit}")
    write_json(out, {"rows": rows, "sync_ms": {"before": before, "after": after}, "at": stamp, "cores": os.cpu_count(), "commit": commit})


if __name__ == "__main__":
    typer.run(main)
