"""Events put at the end of their users' histories in Feast's online store, in ONE transaction with how far the log they come from is applied.

So an event is in a history exactly once, whenever the writer dies and however often it tries: what a log's position covers is left out. Tables, keys
and protobuf values are Feast's; the tests hold what is written equal to what Feast itself writes. The transaction is why Feast does not: its own
write commits on its own.

B users, n events.
"""

import contextlib
import sqlite3
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from features.definitions import HISTORY_ARRAYS
from features.direct import Row, key_maker, number
from features.repository import FeatureStoreError

Ints = NDArray[np.int64]
SEED = ""  # the log that the store was materialised from: how far it reached
_TABLE = "longtrail_applied"
_WAIT = 10.0  # s that SQLite waits for another writer
_TRIES = 200  # of a Redis transaction that others get in the way of


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Events in the order they became available, each array int64 [n]. `positions_n` grows strictly: the events' places in the log called `log`."""

    users_n: Ints
    items_n: Ints
    actions_n: Ints
    times_n: Ints
    log: str | None = None
    positions_n: Ints | None = None
    since: int | None = None  # up to where the writer believes the log is applied

    def fresh(self, applied: int) -> NDArray[np.bool_]:
        """[n] which of them are not applied yet, where the log is up to `applied`. Raises StoreWentBackError."""
        if self.positions_n is None:
            return np.ones(len(self.users_n), bool)
        if self.since is not None and applied < self.since:
            raise StoreWentBackError(f"online store: the log is applied up to {applied}, and was up to {self.since} before")
        return self.positions_n > applied


class StoreWentBackError(FeatureStoreError):
    """The store lost what it had: it was restored from a backup, or Redis started again from an older file. The log has what is missing."""


class Appender(Protocol):
    """Thread-safe; writers of several processes wait for each other."""

    def applied(self, log: str) -> int:
        """The place in `log` up to which its events are applied, or were when the store was materialised; 0 where nothing is known of it."""
        ...

    def seed(self, position: int) -> None:
        """Remember how far the log reached that the store was materialised from. What is remembered already stays."""
        ...

    def append(self, batch: Batch) -> Ints:
        """[n] the history_length of each event's user right after it; 0 for an event that was applied before."""
        ...


class _Histories:
    """How rows change, whatever the store."""

    def __init__(self, length: int) -> None:
        from feast.protos.feast.types.Value_pb2 import Value

        self._value = Value
        self._length = length

    def grown(self, row: Row, events: Sequence[Sequence[int]]) -> tuple[dict[str, bytes], int]:
        """The values of a user's row after more events, columns in the order of HISTORY_ARRAYS, and its history_length."""
        grown = {}
        for name, added in zip(HISTORY_ARRAYS, events, strict=True):
            value = self._value()
            value.ParseFromString(row.get(name, b""))
            numbers = value.int64_list_val.val
            numbers.extend(added)
            if len(numbers) > self._length:
                del numbers[: len(numbers) - self._length]
            grown[name] = value.SerializeToString()
        total = number(row.get("history_length")) + len(events[0])
        grown["history_length"] = self._value(int64_val=total).SerializeToString()
        return grown, total

    def apply(self, batch: Batch, fresh_n: NDArray[np.bool_], users: Sequence[int], rows: Sequence[Row]) -> tuple[list[dict[str, bytes]], Ints]:
        """New values for each of `users` (sorted, whose `rows` are given), and [n] the place of each event, 0 where it is not `fresh_n`."""
        order = np.flatnonzero(fresh_n)[np.argsort(batch.users_n[fresh_n], kind="stable")]
        starts, ends = (np.searchsorted(batch.users_n[order], users, side) for side in ("left", "right"))
        columns = [values[order].tolist() for values in (batch.items_n, batch.actions_n, batch.times_n)]
        places_n, changed = np.zeros(len(batch.users_n), np.int64), []
        for row, start, end in zip(rows, starts, ends, strict=True):
            values, total = self.grown(row, [column[start:end] for column in columns])
            changed.append(values)
            places_n[order[start:end]] = np.arange(total - (end - start) + 1, total + 1)
        return changed, places_n


class SQLiteAppender:
    """A connection of its own; nothing is synced with a commit (in WAL mode). After a power failure the file is whole and merely older, its position
    with it, and the log has the rest."""

    def __init__(self, store: Any, database: Path, view: Any, length: int) -> None:
        """`store` is the `feast.FeatureStore` whose online store is the file `database`, `view` the view of the histories, `length` what it keeps."""
        from feast.infra.online_stores.sqlite import _quote_id, _table_id

        self._database = database
        self._table = _quote_id(_table_id(store.project, view, store.config.registry.enable_online_feature_view_versioning))
        self._key = key_maker()
        self._histories = _Histories(length)
        self._lock = threading.Lock()
        self._open: sqlite3.Connection | None = None

    def applied(self, log: str) -> int:
        with self._transaction() as connection:
            return self._applied(connection, log)

    def _applied(self, connection: sqlite3.Connection, log: str) -> int:
        query = f"SELECT position FROM {_TABLE} WHERE log IN (?, ?) ORDER BY log = ? LIMIT 1"
        found = connection.execute(query, (log, SEED, SEED)).fetchone()
        return int(found[0]) if found else 0

    def seed(self, position: int) -> None:
        with self._transaction() as connection:
            connection.execute(f"INSERT OR IGNORE INTO {_TABLE} VALUES (?, ?)", (SEED, position))

    def append(self, batch: Batch) -> Ints:
        with self._transaction() as connection:
            fresh_n = batch.fresh(0 if batch.log is None else self._applied(connection, batch.log))
            users = np.unique(batch.users_n[fresh_n]).tolist()
            keys = [self._key(user) for user in users]
            changed, places_n = self._histories.apply(batch, fresh_n, users, [self._row(connection, key) for key in keys])
            moment = datetime.now(UTC).replace(tzinfo=None)
            connection.executemany(
                f"INSERT INTO {self._table} (entity_key, feature_name, value, value_text, event_ts, created_ts) VALUES (?, ?, ?, ?, ?, ?) "
                "ON CONFLICT(entity_key, feature_name) DO UPDATE SET value = excluded.value, value_text = excluded.value_text, "
                "event_ts = excluded.event_ts, created_ts = excluded.created_ts",
                [
                    (key, name, value, str(number(value)) if name == "history_length" else None, moment, moment)
                    for key, values in zip(keys, changed, strict=True)
                    for name, value in values.items()
                ],
            )
            if batch.log is not None and batch.positions_n is not None and fresh_n.any():
                connection.execute(f"INSERT OR REPLACE INTO {_TABLE} VALUES (?, ?)", (batch.log, int(batch.positions_n[-1])))
        return places_n

    def _row(self, connection: sqlite3.Connection, key: bytes) -> Row:
        return dict(connection.execute(f"SELECT feature_name, value FROM {self._table} WHERE entity_key = ?", (key,)))

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._connection() as connection:
            connection.execute("BEGIN IMMEDIATE")
            try:
                connection.execute(f"CREATE TABLE IF NOT EXISTS {_TABLE} (log TEXT PRIMARY KEY, position INTEGER NOT NULL)")
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise

    @contextlib.contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            try:
                if self._open is None:
                    self._open = sqlite3.connect(self._database, timeout=_WAIT, check_same_thread=False, isolation_level=None)
                    self._open.execute("PRAGMA synchronous = NORMAL")
                yield self._open
            except sqlite3.Error as error:
                raise FeatureStoreError(f"{self._database}: {error}") from error


class RedisAppender:
    """An optimistic transaction: whatever else writes to one of the keys in between, it starts again from what stands there then."""

    def __init__(self, store: Any, client: Any, view: Any, length: int) -> None:
        """`store` is the `feast.FeatureStore` whose online store is at the other end of `client`, a `redis.Redis`."""
        from feast.infra.online_stores.helpers import _mmh3
        from feast.infra.online_stores.redis import _versioned_fv_name

        self._client = client
        self._project = store.project
        self._key = key_maker()
        self._histories = _Histories(length)
        name = _versioned_fv_name(view, store.config)
        self._fields = {field.name: _mmh3(f"{name}:{field.name}") for field in view.features}
        self._stamp = f"_ts:{name}"

    def applied(self, log: str) -> int:
        own, seed = self._client.mget(self._position(log), self._position(SEED))
        return int(own or seed or 0)

    def seed(self, position: int) -> None:
        self._client.set(self._position(SEED), position, nx=True)

    def append(self, batch: Batch) -> Ints:
        from redis.exceptions import WatchError

        for _ in range(_TRIES):
            try:
                return self._append(batch)
            except WatchError as error:
                if "changed" not in str(error):  # the connection broke: it may be done or not, and the caller's next try will see
                    raise
        raise FeatureStoreError(f"online store: other writers got in the way {_TRIES} times; expected few writers a store")

    def _append(self, batch: Batch) -> Ints:
        with self._client.pipeline(transaction=True) as transaction:
            applied = 0
            if batch.log is not None:
                transaction.watch(self._position(batch.log))
                applied = self.applied(batch.log)
            fresh_n = batch.fresh(applied)
            users = np.unique(batch.users_n[fresh_n]).tolist()
            if not users:
                return np.zeros(len(batch.users_n), np.int64)
            keys = [self._key(user) + self._project.encode() for user in users]
            transaction.watch(*keys)
            changed, places_n = self._histories.apply(batch, fresh_n, users, self._rows(keys))
            transaction.multi()
            stamp = _now().SerializeToString()
            for key, values in zip(keys, changed, strict=True):
                fields: Mapping[Any, Any] = {self._stamp: stamp} | {self._fields[name]: value for name, value in values.items()}
                transaction.hset(key, mapping=fields)
            if batch.log is not None and batch.positions_n is not None:
                transaction.set(self._position(batch.log), int(batch.positions_n[-1]))
            transaction.execute()
        return places_n

    def _rows(self, keys: Sequence[bytes]) -> list[Row]:
        with self._client.pipeline(transaction=False) as reads:
            for key in keys:
                reads.hmget(key, list(self._fields.values()))
            found = reads.execute()
        return [{name: value for name, value in zip(self._fields, row, strict=True) if value is not None} for row in found]

    def _position(self, log: str) -> str:
        return f"{self._project}:applied:{log}"


def _now() -> Any:
    from google.protobuf.timestamp_pb2 import Timestamp

    stamp = Timestamp()
    stamp.GetCurrentTime()
    return stamp
