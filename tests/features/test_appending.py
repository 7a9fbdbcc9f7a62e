"""Events of a log reach the histories exactly once, whatever is tried again and whoever dies, on SQLite and on Redis."""

import json
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from features.appending import StoreWentBackError
from features.definitions import HISTORY, HISTORY_ARRAYS
from features.online import OnlineFeatures
from features.repository import FeatureStoreError, newest_available
from tests.features.helpers import ONLINE_LENGTH
from tests.features.test_online import END, _fresh_users, rows_of

ROOT = Path(__file__).parents[2]


def feasts_own(online: OnlineFeatures, user: int, length: int = 1_000) -> tuple[list[tuple[int, int, int]], int]:
    """A user's history and its length as Feast itself reads them."""
    features = [f"{HISTORY}:{name}" for name in (*HISTORY_ARRAYS, "history_length")]
    found = online._store.get_online_features(features=features, entity_rows=[{"user_id": user}]).to_dict()
    arrays = [found[name][0] or [] for name in HISTORY_ARRAYS]
    return list(zip(*arrays, strict=True)), found["history_length"][0] or 0


def test_what_is_written_is_what_feast_would_write(built: Path, tmp_path: Path) -> None:
    ours, theirs = (OnlineFeatures(built / "feast", state=tmp_path / name) for name in ("a", "b"))
    first, rng = next(_fresh_users), np.random.default_rng(0)
    for user, count in ((first, 1), (first + 1, ONLINE_LENGTH), (first + 2, 3 * ONLINE_LENGTH)):
        columns = [rng.integers(1, 2**40, count) for _ in range(3)]
        ours.append_events(np.full(count, user), *columns)
        kept = {name: column[-ONLINE_LENGTH:] for name, column in zip(HISTORY_ARRAYS, columns, strict=True)}
        theirs._write(HISTORY, [(user + 10, kept | {"history_length": count})])
        assert feasts_own(ours, user) == feasts_own(theirs, user + 10)
        mine, other = (stored(online, number) for online, number in ((ours, user), (theirs, user + 10)))
        assert mine == other and len(mine) == 4


def stored(online: OnlineFeatures, user: int) -> dict[Any, Any]:
    """The bytes in the store, less the moment they were written."""
    if online._redis:
        found = online._client.hgetall(online._appender._key(user) + online._store.project.encode())
        return {name: value for name, value in found.items() if not name.startswith(b"_ts:")}
    with sqlite3.connect(online._appender._database) as connection:
        query = f"SELECT feature_name, value, value_text, typeof(event_ts), typeof(created_ts) FROM {online._appender._table} WHERE entity_key = ?"
        return {row[0]: row[1:] for row in connection.execute(query, (online._appender._key(user),))}


def test_places_count_each_users_events(built: Path, tmp_path: Path) -> None:
    online = OnlineFeatures(built / "feast", state=tmp_path)
    a = next(_fresh_users)
    assert online.append_events([a, a + 2, a, a + 1, a], [1, 2, 3, 4, 5], [1] * 5, [9] * 5).tolist() == [1, 1, 2, 1, 3]
    assert online.append_events([a + 1, a], [6, 7], [1, 1], [9, 9]).tolist() == [2, 4]
    assert rows_of(online.history([a, a + 1], 9)) == [[(1, 1, 9), (3, 1, 9), (5, 1, 9), (7, 1, 9)], [(4, 1, 9), (6, 1, 9)]]


def test_what_a_log_has_applied_is_left_out(built: Path, tmp_path: Path) -> None:
    online, a, log = OnlineFeatures(built / "feast", state=tmp_path), next(_fresh_users), str(next(_fresh_users))
    start = online.applied(log)
    assert start == newest_available(built / "feast") > 0, "a log that is not known yet goes on where the snapshot ended"

    def append(positions: list[int], since: int | None = None) -> list[int]:
        count = len(positions)
        at = [start + position for position in positions]
        return online.append_events([a] * count, positions, [1] * count, positions, log=log, positions=at, since=since).tolist()

    assert append([-5, 0]) == [0, 0] and online.applied(log) == start
    assert append([1, 3]) == [1, 2] and online.applied(log) == start + 3
    assert append([1, 3]) == [0, 0] and append([3, 7, 8]) == [0, 3, 4]
    assert OnlineFeatures(built / "feast", state=tmp_path).applied(log) == start + 8
    assert online.applied(log + "another") == start, "two logs do not cover each other's events"
    assert [item for item, _, _ in rows_of(online.history([a], 9))[0]] == [1, 3, 7, 8]
    with pytest.raises(StoreWentBackError):
        append([20], since=start + 9)
    online.remember_snapshot()
    assert online.applied(log) == start + 8, "a snapshot is remembered once"


def test_a_batch_that_fails_half_way_leaves_nothing(sqlite_features: Path, tmp_path: Path) -> None:
    online = OnlineFeatures(sqlite_features / "feast", state=tmp_path)
    before = rows_of(online.history([1, 2], 9))
    with pytest.raises(ValueError):
        online.append_events([1, 2], [5, 5], [1, 1], [1, 1], log="x", positions=[END, "no"])
    online._appender._histories._value = None
    with pytest.raises(TypeError):
        online.append_events([1, 2], [5, 5], [1, 1], [1, 1], log="x", positions=[END, END + 1])
    again = OnlineFeatures(sqlite_features / "feast", state=tmp_path)
    assert rows_of(again.history([1, 2], 9)) == before and again.applied("x") < END


def test_a_full_disk_leaves_the_store_as_it_was(sqlite_features: Path, tmp_path: Path) -> None:
    online = OnlineFeatures(sqlite_features / "feast", state=tmp_path)
    online.append_events([1], [5], [1], [1], log="x", positions=[END])
    database = next(tmp_path.glob("*.db"))
    connection = online._appender._open
    pages = connection.execute("PRAGMA page_count").fetchone()[0]
    connection.execute(f"PRAGMA max_page_count = {pages}")
    users = list(range(5_000, 5_400))
    with pytest.raises(FeatureStoreError, match=rf"{database.name}: database or disk is full"):
        online.append_events(users, [1] * 400, [1] * 400, [2**40] * 400, log="x", positions=range(END + 1, END + 401))
    assert online.applied("x") == END and not online.history(users, 1).lengths_B.any()
    connection.execute(f"PRAGMA max_page_count = {pages + 1_000}")
    assert online.append_events(users, [1] * 400, [1] * 400, [2**40] * 400, log="x", positions=range(END + 1, END + 401), since=END).all()


def test_a_redis_that_lost_its_newest_writes_is_noticed_and_filled_up_again(redis_features: Path) -> None:
    online, a, log = OnlineFeatures(redis_features / "feast"), next(_fresh_users), str(next(_fresh_users))
    key, position = online._appender._key(a) + online._store.project.encode(), online._appender._position(log)
    online.append_events([a], [1], [1], [1], log=log, positions=[END])
    dumped, old = online._client.dump(key), online._client.get(position)
    online.append_events([a], [2], [1], [2], log=log, positions=[END + 1])
    online._client.restore(key, 0, dumped, replace=True), online._client.set(position, old)  # Redis came back from an older file
    with pytest.raises(StoreWentBackError, match=f"up to {END}, and was up to {END + 1}"):
        online.append_events([a], [3], [1], [3], log=log, positions=[END + 2], since=END + 1)
    assert online.append_events([a, a], [2, 3], [1, 1], [2, 3], log=log, positions=[END + 1, END + 2], since=online.applied(log)).tolist() == [2, 3]
    assert feasts_own(online, a) == ([(1, 1, 1), (2, 1, 2), (3, 1, 3)], 3)


def test_events_are_applied_once_whenever_the_writer_is_killed(sqlite_features: Path, redis_features: Path, tmp_path: Path) -> None:
    """A writer that goes through a log of its own is killed at any moment, again and again; the next one goes on from the stored position."""
    users, log = [next(_fresh_users) for _ in range(3)], str(next(_fresh_users))
    rows = [(users[int(n)], k + 1) for k, n in enumerate(np.random.default_rng(5).integers(0, 3, 160))]
    stores = [str(built / "feast") for built in (sqlite_features, redis_features)]
    (tmp_path / "job.json").write_text(json.dumps({"stores": stores, "state": str(tmp_path), "log": log, "rows": rows}))
    # One process opens the stores, which takes Feast seconds, and forks a writer for each life.
    command = [sys.executable, "-c", _WRITER, str(tmp_path / "job.json")]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    lives = [line.split() for line in ended.stdout.splitlines()]
    for store in stores:
        own = [word for name, word in lives if name == store]
        assert own[-1:] == ["done"] and own.count("killed") >= 4, ended.stdout + ended.stderr
        online = OnlineFeatures(Path(store), state=tmp_path)
        for user in users:
            items = [item for owner, item in rows if owner == user]
            history, total = feasts_own(online, user)
            assert total == len(items), "an event was lost or applied twice"
            assert [item for item, _, _ in history] == items[-ONLINE_LENGTH:]


_WRITER = """
import json, os, random, signal, sys
from pathlib import Path
from features.online import OnlineFeatures
job = json.loads(Path(sys.argv[1]).read_text())

def life(online, start):
    # The kernel ends the process at that moment, wherever it is: nothing here waits for another process to be scheduled.
    signal.setitimer(signal.ITIMER_REAL, 1e-6 + random.expovariate(1 / 0.005))
    for _ in range(10):
        first = online.applied(job["log"]) - start
        part = job["rows"][first : first + 4]
        if not part:
            os._exit(0)
        users, items = zip(*part)
        for _ in range(random.choice([1, 1, 1, 2])):  # an answer may be lost: the same is tried again
            online.append_events(users, items, [1] * len(part), items, log=job["log"], positions=[start + item for item in items])
    signal.pause()  # a fast machine would be done before its time: no life writes more than a quarter of the log

def lives(store):
    online = OnlineFeatures(Path(store), state=Path(job["state"]))  # opens what it writes with at its first write: in each life
    start = online.applied("")
    while True:
        child = os.fork()
        if child == 0:
            random.seed()
            life(online, start)
        _, status = os.waitpid(child, 0)
        print(store, "done" if status == 0 else "killed" if os.WIFSIGNALED(status) else f"failed:{status}", flush=True)
        if not os.WIFSIGNALED(status):
            return

for store in job["stores"]:
    lives(store)
"""
