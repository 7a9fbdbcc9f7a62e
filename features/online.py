"""What the service knows of users: read from Feast's online store, and written to it as events arrive.

B users asked for, L history.
"""

import contextlib
import fcntl
import os
import shutil
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from features.appending import Appender, Batch, RedisAppender, SQLiteAppender
from features.definitions import HISTORY, HISTORY_ARRAYS, SERVING, USER_VIEW
from features.direct import Reader, RedisReader, Row, SQLiteReader, number, numbers
from features.kept import KeptStore, RedisKept, SQLiteKept
from features.repository import ONLINE_FILE, FeatureStoreError, newest_available, online_history_length, open_repository, quiet_feast, reachable
from longtrail.files import atomic_file
from longtrail.history import HistoryArrays
from longtrail.schema import USER_STATISTICS

Ints = NDArray[np.int64]
_ALL = 1 << 30  # events: more than any history has
_LOCK_SECONDS = 10  # a writer that died with Redis's lock holds up the others this long


@dataclass(frozen=True, kw_only=True)
class OnlineUsers:
    """One read of B users. `totals_B` counts all events of each, also those that the store no longer keeps."""

    history: HistoryArrays
    totals_B: Ints
    statistics: dict[str, Ints]  # USER_STATISTICS, each [B]
    seen: list[Ints]  # items of all stored events of each, oldest first; empty where they were not asked for


class OnlineFeatures:
    """Histories and statistics of users from the online store of a Feast repository. Safe to share between threads.

    Unknown users have no events and zero counts. Writers of several processes wait for each other.
    """

    def __init__(self, feast: Path, *, state: Path | None = None, redis_address: str | None = None) -> None:
        """`feast` is the folder that build_features writes.

        SQLite: `state` is a folder for a copy of the online store, made once for each build of the features; without it `feast` itself is
        read, and written to by `append_events`. Redis: `redis_address` replaces the one that was built with.
        Raises FeatureStoreError where `feast` is no repository or its online store cannot be reached.
        """
        feast = Path(feast)
        opened = open_repository(feast)
        self._redis = opened.config.online_store.type == "redis"
        self._address = (redis_address or opened.config.online_store.connection_string) if self._redis else ""
        if self._redis:
            # skip_dedup: the events of a user may arrive out of order, and Feast would leave out what is not newer than the stored row.
            self._store = open_repository(feast, online={"skip_dedup": True, "connection_string": _impatient(self._address)})
            self._client = self._store.provider.online_store._get_client(self._store.config.online_store)
            self._client.set_retry(_retry())
        else:
            database = feast / ONLINE_FILE if state is None else _copied(feast / ONLINE_FILE, Path(state) / f"{opened.project}.db")
            if not database.is_file():
                raise FeatureStoreError(f"{database}: no such file; expected the online store that build_features materialises")
            self._lock_file, self._database = database.with_suffix(".lock"), database
            self._store = open_repository(feast, online={"path": str(database.absolute())})
        self._lock = threading.RLock()
        with quiet_feast():
            self._service = self._store.get_feature_service(SERVING)
            self._views = {name: self._store.get_feature_view(name) for name in (HISTORY, USER_VIEW)}
            views = tuple(self._views.values())
            self._reader: Reader = RedisReader(self._store, self._client, views) if self._redis else SQLiteReader(self._store, database, views)
        self.length = online_history_length(self._store)
        appender = partial(RedisAppender, self._store, self._client) if self._redis else partial(SQLiteAppender, self._store, database)
        self._appender: Appender = appender(self._views[HISTORY], self.length)
        self.read([0], 1)  # connect now, not at the first request

    def read(self, user_ids: Sequence[int] | Ints, max_length: int, *, seen: bool = False) -> OnlineUsers:
        """The newest `max_length` events of each user, oldest first, and their counts, in one look-up. `seen` gives all stored items too."""
        with reachable(self._address):
            rows = self._reader.rows(np.asarray(user_ids, dtype=np.int64).tolist())
        items, actions, times = ([numbers(row.get(name), max_length) for row in rows] for name in HISTORY_ARRAYS)
        return OnlineUsers(
            history=_padded(items, actions, times),
            totals_B=_counts("history_length", rows),
            statistics={name: _counts(name, rows) for name in USER_STATISTICS},
            seen=[numbers(row.get("items"), _ALL) for row in rows] if seen else [],
        )

    def history(self, user_ids: Sequence[int] | Ints, max_length: int) -> HistoryArrays:
        """The newest `max_length` events of each user, oldest first: [B, L], L at most `max_length` and what the store keeps."""
        return self.read(user_ids, max_length).history

    def user_statistics(self, user_ids: Sequence[int] | Ints) -> dict[str, Ints]:
        """USER_STATISTICS and history_length (all events of the user), each int64 [B]."""
        read = self.read(user_ids, 0)
        return {"history_length": read.totals_B, **read.statistics}

    def kept(self, name: str) -> KeptStore:
        """Room for what a model keeps of each user, beside the histories of this build. `name` is the model's version: letters and digits."""
        if self._redis:
            return RedisKept(self._client, self._store.project, name, self._address)
        return SQLiteKept(self._database.with_suffix(".states.sqlite"), name)

    def append_events(
        self,
        user_ids: Sequence[int] | Ints,
        item_ids: Sequence[int] | Ints,
        action_ids: Sequence[int] | Ints,
        times: Sequence[int] | Ints,
        *,
        log: str | None = None,
        positions: Sequence[int] | Ints | None = None,
        since: int | None = None,
    ) -> Ints:
        """Put events (times in UTC µs) at the end of their users' histories, in the order given, which is the order they became available.

        The newest `length` of each user are kept; history_length counts all. What is appended can be read when this returns, all of it or none.
        Events of a log carry its name and their `positions` in it, which grow strictly: what the store has of that log already is left out, so that
        a writer may try again. `since` is where the writer believes the store to be. Returns [n] the history_length of each event's user right
        after it, 0 for an event that is left out. Raises FeatureStoreError, StoreWentBackError where the store has less of the log than `since`.
        """
        users_n, items_n, actions_n, times_n = (np.asarray(values, dtype=np.int64) for values in (user_ids, item_ids, action_ids, times))
        lengths = [len(values) for values in (items_n, actions_n, times_n)]
        if lengths != [len(users_n)] * 3:
            raise ValueError(f"append_events: {len(users_n)} users, {lengths} items, actions, times; expected as many of each")
        if len(users_n) == 0:
            return users_n
        positions_n = None if positions is None else np.asarray(positions, dtype=np.int64)
        batch = Batch(users_n=users_n, items_n=items_n, actions_n=actions_n, times_n=times_n, log=log, positions_n=positions_n, since=since)
        with reachable(self._address):
            return self._appender.append(batch)

    def applied(self, log: str) -> int:
        """The position in `log` up to which its events are in the histories; that of the newest event materialised where it is not known."""
        with reachable(self._address):
            return self._appender.applied(log)

    def remember_snapshot(self) -> None:
        """Note how far the log reached that the store was materialised from: the newest event's available_at. A second time changes nothing.

        A service over this store then applies what its own log has since, for there an event's place is when it became available.
        """
        with reachable(self._address):
            self._appender.seed(newest_available(Path(self._store.repo_path)))

    def record_impressions(self, user_ids: Sequence[int]) -> None:
        """Count one impression for each id given (repeat an id to count several)."""
        self._count("user_impressions", user_ids)

    def record_clicks(self, user_ids: Sequence[int]) -> None:
        """Count one click on an impression for each id given."""
        self._count("user_clicks", user_ids)

    def _count(self, statistic: str, user_ids: Sequence[int]) -> None:
        users_B, counts_B = np.unique(np.asarray(user_ids, dtype=np.int64), return_counts=True)
        if len(users_B) == 0:
            return
        with self._writing():
            values, _ = self._values(users_B)
            rows = []
            for b, (user, count) in enumerate(zip(users_B, counts_B, strict=True)):
                stored = {name: values[name][b].int64_val for name in USER_STATISTICS}
                rows.append((int(user), stored | {statistic: stored[statistic] + int(count)}))
            self._write(USER_VIEW, rows)

    def _values(self, user_ids: Sequence[int] | Ints) -> tuple[dict[str, Any], int]:
        """Feast's values by feature name, B of each. One of an unknown user is unset and reads as 0 or as an empty list."""
        users = np.asarray(user_ids, dtype=np.int64).tolist()
        if not users:
            return {name: [] for name in (*HISTORY_ARRAYS, "history_length", *USER_STATISTICS)}, 0
        with self._lock if not self._redis else contextlib.nullcontext(), reachable(self._address):
            response = self._store.get_online_features(features=self._service, entity_rows={"user_id": users}).proto
        return {name: result.values for name, result in zip(response.metadata.feature_names.val, response.results, strict=True)}, len(users)

    def _write(self, view: str, rows: list[tuple[int, dict[str, Any]]]) -> None:
        from feast.protos.feast.types.EntityKey_pb2 import EntityKey
        from feast.protos.feast.types.Value_pb2 import Int64List, Value

        def value(number: int | Ints) -> Any:
            return Value(int64_val=number) if isinstance(number, int) else Value(int64_list_val=Int64List(val=number.tolist()))

        now = datetime.now(UTC)
        data = [
            (EntityKey(join_keys=["user_id"], entity_values=[Value(int64_val=user)]), {name: value(v) for name, v in fields.items()}, now, now)
            for user, fields in rows
        ]
        self._store.provider.online_write_batch(self._store.config, self._views[view], data, None)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """One writer at a time, in this process and in all others: a write is a read, a change and a write."""
        with self._lock, reachable(self._address), contextlib.ExitStack() as stack:
            if self._redis:
                stack.enter_context(self._client.lock(f"{self._store.project}:writing", timeout=_LOCK_SECONDS, sleep=0.005))
            else:
                stack.enter_context(_locked(self._lock_file))
            yield


def check_redis(address: str) -> None:
    """Raises FeatureStoreError, within seconds, if no Redis answers at `address`."""
    with quiet_feast():
        from feast.infra.online_stores.redis import RedisOnlineStore, RedisOnlineStoreConfig

        client = RedisOnlineStore()._get_client(RedisOnlineStoreConfig(connection_string=_impatient(os.path.expandvars(address))))
    client.set_retry(_retry())
    with contextlib.closing(client), reachable(address):
        client.ping()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _impatient(address: str) -> str:
    """A service would rather hear of a silent Redis soon; a limit that `address` sets itself stands."""
    limits = {"socket_timeout": 5, "socket_connect_timeout": 2}
    return ",".join([address, *(f"{name}={seconds}" for name, seconds in limits.items() if f"{name}=" not in address)])


def _retry() -> Any:
    from redis.backoff import ConstantBackoff
    from redis.retry import Retry

    return Retry(ConstantBackoff(0.05), 2)  # redis-py's own default takes ten seconds to give up


def _copied(source: Path, target: Path) -> Path:
    """`target`, a writable copy of the SQLite file `source`, made where it is not there yet."""
    if not source.is_file():
        raise FeatureStoreError(f"{source}: no such file; expected the online store that build_features materialises")
    target.parent.mkdir(parents=True, exist_ok=True)
    with _locked(target.with_suffix(".lock")):
        if not target.exists():
            with atomic_file(target) as aside:
                shutil.copyfile(source, aside)
                with contextlib.closing(sqlite3.connect(aside)) as connection:
                    connection.execute("PRAGMA journal_mode = WAL")  # readers do not wait for a writer
    return target


def _array(value: Any, max_length: int) -> Ints:
    values = value.int64_list_val.val
    return np.array(values[-max_length:] if len(values) > max_length else values, dtype=np.int64)


def _counts(name: str, rows: list[Row]) -> Ints:
    return np.fromiter((number(row.get(name)) for row in rows), dtype=np.int64, count=len(rows))


def _padded(items: list[Ints], actions: list[Ints], times: list[Ints]) -> HistoryArrays:
    lengths_B = np.array([len(row) for row in items], dtype=np.int64)
    real_BL = np.arange(max(lengths_B.max(initial=0), 1)) < lengths_B[:, None]

    def pad(rows: list[Ints]) -> Ints:
        padded_BL = np.zeros(real_BL.shape, dtype=np.int64)
        if rows:
            padded_BL[real_BL] = np.concatenate(rows)
        return padded_BL

    return HistoryArrays(items_BL=pad(items), actions_BL=pad(actions), times_BL=pad(times), lengths_B=lengths_B)
