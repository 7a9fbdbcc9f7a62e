"""The bytes of Feast's online store, without Feast's conversion: one look-up of a user's rows, and numbers made of them by numpy.

Feast makes a Python int of every number of a history, several times over: with a thousand events that costs more than some models. What stands in
the store is Feast's (its tables, keys and protobuf values), and so is all that writes it. The tests hold every answer equal to Feast's own.

B users asked for. A value is a serialised `feast.types.Value`: int64_val, or int64_list_val with its numbers packed as varints.
"""

import contextlib
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from features.repository import FeatureStoreError

Ints = NDArray[np.int64]
Row = dict[str, bytes]  # value by feature name; what is not stored is not there

_NUMBER, _LIST, _PACKED = 0x20, 0x72, 0x0A  # tags of Value.int64_val, Value.int64_list_val and Int64List.val
_LONGEST = 10  # bytes of a varint of 64 bits
_USERS = 10_000  # of one SQLite query, which takes 32,766 parameters at most
_WAIT = 5.0  # s that SQLite waits for a writer
_AGAIN = 0.01  # s between two attempts where it does not wait itself


class Reader(Protocol):
    """Rows of users from the store that Feast writes. Thread-safe."""

    def rows(self, user_ids: Sequence[int]) -> list[Row]:
        """B of them, in the order asked for; an unknown user's is empty. Raises FeatureStoreError where the store cannot be read."""
        ...


class Connections:
    """Connections to a SQLite file, opened as they are needed and used again: one thread has one at a time."""

    def __init__(self, database: Path, *pragmas: str) -> None:
        self._database = database
        self._pragmas = pragmas
        self._free: list[sqlite3.Connection] = []

    @contextlib.contextmanager
    def one(self) -> Iterator[sqlite3.Connection]:
        """Raises FeatureStoreError in place of SQLite's errors; a connection that met one is not used again."""
        connection = None
        try:
            connection = self._taken()
            yield connection
        except BaseException as error:
            if connection is not None:
                connection.close()
            if isinstance(error, sqlite3.Error):
                raise FeatureStoreError(f"{self._database}: {error}; expected the online store that build_features materialises") from error
            raise
        self._free.append(connection)

    def _taken(self) -> sqlite3.Connection:
        with contextlib.suppress(IndexError):  # another thread may take the last one
            return self._free.pop()
        connection = sqlite3.connect(self._database, timeout=_WAIT, check_same_thread=False, isolation_level=None)
        try:
            for pragma in self._pragmas:
                _patiently(connection, pragma)
        except BaseException:
            connection.close()
            raise
        return connection

    def close(self) -> None:
        while self._free:
            self._free.pop().close()


def _patiently(connection: sqlite3.Connection, pragma: str) -> None:
    """Run `pragma`, however many open the file at the same instant: SQLite does not itself wait for a journal mode that another one is changing."""
    until = time.monotonic() + _WAIT
    while True:
        try:
            connection.execute(pragma)
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > until:
                raise
        time.sleep(_AGAIN)


class SQLiteReader:
    """Connections of its own, so that readers wait neither for each other nor (in WAL mode) for a writer."""

    def __init__(self, store: Any, database: Path, views: Sequence[Any]) -> None:
        """`store` is the `feast.FeatureStore` whose online store is the file `database`."""
        from feast.infra.online_stores.sqlite import _quote_id, _table_id

        self._connections = Connections(database, "PRAGMA query_only = 1")
        self._key = key_maker()
        self._tables = [_quote_id(_table_id(store.project, view, store.config.registry.enable_online_feature_view_versioning)) for view in views]

    def rows(self, user_ids: Sequence[int]) -> list[Row]:
        keys = [self._key(user) for user in user_ids]
        found: dict[bytes, Row] = {key: {} for key in keys}
        with self._connections.one() as connection:
            for start in range(0, len(keys), _USERS):
                part = keys[start : start + _USERS]
                places = ",".join("?" * len(part))
                columns = "SELECT entity_key, feature_name, value"
                query = " UNION ALL ".join(f"{columns} FROM {table} WHERE entity_key IN ({places})" for table in self._tables)
                for key, name, value in connection.execute(query, part * len(self._tables)):
                    found[key][name] = value
        return [found[key] for key in keys]


class RedisReader:
    """One HMGET a user, all in one round trip."""

    def __init__(self, store: Any, client: Any, views: Sequence[Any]) -> None:
        """`store` is the `feast.FeatureStore` whose online store is at the other end of `client`, a `redis.Redis`."""
        from feast.infra.online_stores.helpers import _mmh3
        from feast.infra.online_stores.redis import _versioned_fv_name

        self._client = client
        self._key = key_maker()
        self._project = store.project.encode()
        fields = {field.name: _mmh3(f"{_versioned_fv_name(view, store.config)}:{field.name}") for view in views for field in view.features}
        self._names, self._fields = tuple(fields), tuple(fields.values())

    def rows(self, user_ids: Sequence[int]) -> list[Row]:
        keys = [self._key(user) + self._project for user in user_ids]
        if len(keys) == 1:
            values = [self._client.hmget(keys[0], self._fields)]
        else:
            with self._client.pipeline(transaction=False) as pipe:
                for key in keys:
                    pipe.hmget(key, self._fields)
                values = pipe.execute()
        return [{name: value for name, value in zip(self._names, row, strict=True) if value is not None} for row in values]


def number(value: bytes | None) -> int:
    """The number of an int64_val; 0 of what is not stored or unset, as Feast reads it. Raises FeatureStoreError for any other value."""
    if not value:
        return 0
    if value[0] != _NUMBER:
        raise FeatureStoreError(f"online store: {value[:12].hex()}…: no int64_val; expected what build_features materialised")
    return int(_varints(np.frombuffer(value, np.uint8, offset=1), 1)[0])


def numbers(value: bytes | None, most: int) -> Ints:
    """The last `most` numbers of an int64_list_val: O(most), whatever is stored. None of what is not stored, unset or empty.

    Raises FeatureStoreError for any other value.
    """
    if not value or most <= 0:
        return np.zeros(0, np.int64)
    start = _list_start(value)
    return _varints(np.frombuffer(value, np.uint8, offset=start), most)


def _list_start(value: bytes) -> int:
    """Where the packed numbers begin. Lengths are not read: they end where the value ends, and that is checked."""
    start = 0
    for tag in (_LIST, _PACKED):
        if start == len(value):  # an empty Int64List has no field
            return start
        if value[start] != tag:
            raise FeatureStoreError(f"online store: {value[:12].hex()}…: no int64_list_val; expected what build_features materialised")
        length, start = _length(value, start + 1)
        if start + length != len(value):
            raise FeatureStoreError(f"online store: {value[:12].hex()}…: {len(value) - start} bytes of numbers; expected {length}")
    return start


def _length(value: bytes, start: int) -> tuple[int, int]:
    length = 0
    for place, byte in enumerate(value[start : start + _LONGEST]):
        length |= (byte & 0x7F) << 7 * place
        if byte < 0x80:
            return length, start + place + 1
    raise FeatureStoreError(f"online store: {value[:12].hex()}…: cut short; expected what build_features materialised")


def _varints(packed: NDArray[np.uint8], most: int) -> Ints:
    """The last `most` of the varints that fill `packed`: 7 bits a byte, lowest first, the top bit set on all but a number's last byte."""
    packed = packed[-_LONGEST * most :]
    ends = np.flatnonzero(packed < 0x80)
    if len(ends) > most:
        packed, ends = packed[ends[-most - 1] + 1 :], ends[-most:] - (ends[-most - 1] + 1)
    if not len(ends):
        return np.zeros(0, np.int64)
    lengths = np.diff(ends, prepend=-1)
    longest = int(lengths.max())
    if longest == 1:
        return packed.astype(np.int64)
    bits = packed & np.uint8(0x7F)
    if lengths.min() == longest:  # the times of a history, as a rule
        shifts = np.arange(longest, dtype=np.uint64) * np.uint64(7)
        return (bits.reshape(-1, longest).astype(np.uint64) << shifts).sum(1, dtype=np.uint64).view(np.int64)
    starts = ends - lengths + 1
    found = bits[starts].astype(np.uint64)
    for place in range(1, longest):
        longer = np.flatnonzero(lengths > place)
        found[longer] |= bits[starts[longer] + place].astype(np.uint64) << np.uint64(7 * place)
    return found.view(np.int64)


def key_maker() -> Callable[[int], bytes]:
    """Feast's entity key of a user id (serialisation version 3), which ends with the id's eight bytes."""
    from feast.infra.key_encoding_utils import serialize_entity_key
    from feast.protos.feast.types.EntityKey_pb2 import EntityKey
    from feast.protos.feast.types.Value_pb2 import Value

    def whole(user: int) -> bytes:
        return serialize_entity_key(EntityKey(join_keys=["user_id"], entity_values=[Value(int64_val=user)]), entity_key_serialization_version=3)

    prefix = whole(0)[:-8]

    def key(user: int) -> bytes:
        return prefix + user.to_bytes(8, "little", signed=True)

    if key(0x0102030405060708) != whole(0x0102030405060708):
        raise FeatureStoreError("feast: entity keys do not end with the user id; expected the version of Feast that requirements.lock names")
    return key
