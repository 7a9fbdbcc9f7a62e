"""What a model keeps of each user, beside the histories: a count of events and some bytes that follow from exactly those events.

A namespace belongs to one build of the features and to one version of a model. Whoever writes says which count they read before: where another
writer was faster, nothing is written (compare and set), so that no update is lost and none counts twice. What is kept can be made again, so on
SQLite a crash of the machine may lose the newest writes, but never a part of one.

  SQLite: PROJECT.states.sqlite beside the histories, a table a namespace      Redis: PROJECT:user_states:NAMESPACE, a hash with a field a user
"""

import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from features.direct import Connections
from features.repository import reachable

_HOUR = 3600
_MISSING = -1  # the count that stands for "nothing is kept"
_NAME = re.compile(r"[0-9a-z]{1,64}")
_USERS = 10_000
_WRITE = """
local stored = redis.call('HGET', KEYS[1], ARGV[1])
local count = '-1'
if stored then count = string.match(stored, '^(%d+) ') end
if count ~= ARGV[2] then return 0 end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[3])
return 1
"""


class Kept(NamedTuple):
    """`content` follows from the first `events` events of a user, in the order they arrived."""

    events: int
    content: bytes


class Write(NamedTuple):
    """What shall be kept of a user in place of what counted `before` events; None: in place of nothing."""

    user: int
    before: int | None
    kept: Kept


class KeptStore(Protocol):
    """One namespace. Thread-safe; several processes may share it. Raises FeatureStoreError where the store cannot be reached."""

    def read(self, users: Sequence[int]) -> list[Kept | None]: ...

    def write(self, rows: Sequence[Write]) -> list[bool]:
        """For each row whether it was written: not where something else was kept meanwhile."""
        ...

    def remove(self, users: Sequence[int]) -> None: ...

    def forget_others(self, keep: Sequence[str], *, hours: float) -> list[str]:
        """Remove namespaces of the same build that nobody has opened for `hours`, but not `keep`. Returns their names."""
        ...


class SQLiteKept:
    """See KeptStore."""

    def __init__(self, database: Path, name: str) -> None:
        self._name = _checked(name)
        self._table = f'"state_{name}"'
        self._connections = Connections(database, "PRAGMA journal_mode = WAL", "PRAGMA synchronous = NORMAL")
        with self._connections.one() as connection:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute(f"CREATE TABLE IF NOT EXISTS {self._table} (user INTEGER PRIMARY KEY, events INTEGER NOT NULL, content BLOB NOT NULL)")
            connection.execute("CREATE TABLE IF NOT EXISTS opened (name TEXT PRIMARY KEY, seconds REAL NOT NULL)")
            connection.execute("INSERT OR REPLACE INTO opened VALUES (?, ?)", (name, time.time()))
            connection.execute("COMMIT")

    def read(self, users: Sequence[int]) -> list[Kept | None]:
        found: dict[int, Kept] = {}
        with self._connections.one() as connection:
            for start in range(0, len(users), _USERS):
                part = list(users[start : start + _USERS])
                query = f"SELECT user, events, content FROM {self._table} WHERE user IN ({','.join('?' * len(part))})"
                found |= {user: Kept(events, content) for user, events, content in connection.execute(query, part)}
        return [found.get(user) for user in users]

    def write(self, rows: Sequence[Write]) -> list[bool]:
        query = (
            f"INSERT INTO {self._table} SELECT ?1, ?2, ?3 WHERE ?4 = coalesce((SELECT events FROM {self._table} WHERE user = ?1), {_MISSING})"
            " ON CONFLICT (user) DO UPDATE SET events = excluded.events, content = excluded.content"
        )
        with self._connections.one() as connection:
            connection.execute("BEGIN IMMEDIATE")
            written = [connection.execute(query, (row.user, *row.kept, _count(row))).rowcount == 1 for row in rows]
            connection.execute("COMMIT")
        return written

    def remove(self, users: Sequence[int]) -> None:
        with self._connections.one() as connection:
            connection.execute("BEGIN IMMEDIATE")
            connection.executemany(f"DELETE FROM {self._table} WHERE user = ?", [(user,) for user in users])
            connection.execute("COMMIT")

    def forget_others(self, keep: Sequence[str], *, hours: float) -> list[str]:
        with self._connections.one() as connection:
            rows = connection.execute("SELECT name FROM opened WHERE seconds < ?", (time.time() - hours * _HOUR,)).fetchall()
            old = [name for (name,) in rows if name not in {*keep, self._name}]
            connection.execute("BEGIN IMMEDIATE")
            for name in old:
                connection.execute(f'DROP TABLE IF EXISTS "state_{_checked(name)}"')
                connection.execute("DELETE FROM opened WHERE name = ?", (name,))
            connection.execute("COMMIT")
        return old


class RedisKept:
    """See KeptStore. A field holds the count in decimal digits, a space, and the content."""

    def __init__(self, client: Any, project: str, name: str, address: str) -> None:
        self._name = _checked(name)
        self._project = project
        self._client = client
        self._address = address
        self._write = client.register_script(_WRITE)
        with reachable(address):
            client.hset(self._opened, name, time.time())

    def read(self, users: Sequence[int]) -> list[Kept | None]:
        if not users:
            return []
        with reachable(self._address):
            stored = self._client.hmget(self._key(self._name), list(users))
        return [None if value is None else Kept(int(value[: value.index(b" ")]), value[value.index(b" ") + 1 :]) for value in stored]

    def write(self, rows: Sequence[Write]) -> list[bool]:
        if not rows:
            return []
        with reachable(self._address), self._client.pipeline(transaction=False) as pipe:
            for row in rows:
                value = b"%d " % row.kept.events + row.kept.content
                self._write(keys=[self._key(self._name)], args=[row.user, _count(row), value], client=pipe)
            return [done == 1 for done in pipe.execute()]

    def remove(self, users: Sequence[int]) -> None:
        if users:
            with reachable(self._address):
                self._client.hdel(self._key(self._name), *users)

    def forget_others(self, keep: Sequence[str], *, hours: float) -> list[str]:
        with reachable(self._address):
            opened = {name.decode(): float(seconds) for name, seconds in self._client.hgetall(self._opened).items()}
            old = [name for name, seconds in opened.items() if seconds < time.time() - hours * _HOUR and name not in {*keep, self._name}]
            for name in old:
                self._client.unlink(self._key(name))
                self._client.hdel(self._opened, name)
        return old

    @property
    def _opened(self) -> str:
        return f"{self._project}:user_states"

    def _key(self, name: str) -> str:
        return f"{self._opened}:{name}"


def _count(row: Write) -> int:
    return _MISSING if row.before is None else row.before


def _checked(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ValueError(f"namespace {name!r}; expected lower-case letters and digits")
    return name
