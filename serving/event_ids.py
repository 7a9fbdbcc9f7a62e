"""Which event ids stand in the event log: an index on disk that can always be made again from the log.

An id is held as 64 bits of its BLAKE2b hash: 8 bytes in a B-tree of SQLite, and the newest few thousand in memory, so that memory stays the same
however long the log is. Two different ids share a hash with probability 2^-64 a pair: at 10^8 ids in the log, an event that is wrongly called a
duplicate is to be expected once in 1.8 * 10^11 events.
"""

import contextlib
import json
import logging
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b
from pathlib import Path

_HELD = 4_096  # new ids kept in memory before they are written together; our choice
_SCHEMA = """
    CREATE TABLE IF NOT EXISTS ids (hash INTEGER PRIMARY KEY);
    CREATE TABLE IF NOT EXISTS indexed (one INTEGER PRIMARY KEY CHECK (one = 1), upto INTEGER);
    INSERT OR IGNORE INTO indexed VALUES (1, 0);
"""

logger = logging.getLogger(__name__)


def hash_of(event_id: str) -> int:
    """64 bits, signed as SQLite holds them."""
    return int.from_bytes(blake2b(event_id.encode("utf-8"), digest_size=8).digest(), "little", signed=True)


class EventIds:
    """The index in one file. Not thread-safe: it belongs to the one writer of the log."""

    def __init__(self, path: Path) -> None:
        """A damaged file is replaced by an empty one: `upto` is then 0, and the caller adds what the log holds."""
        self._path = path
        try:
            self._open()
        except sqlite3.DatabaseError as error:
            logger.warning("%s: damaged (%s); it is made again from the log", path, error)
            for file in (path, path.with_name(f"{path.name}-wal"), path.with_name(f"{path.name}-shm")):
                file.unlink(missing_ok=True)
            self._open()
        self._new: set[int] = set()
        self._new_upto = self.upto

    def _open(self) -> None:
        self._database = sqlite3.connect(self._path, check_same_thread=False, isolation_level=None)
        # Nothing is synced with a commit: after a power failure the file is whole and merely older, and the log fills it up again.
        self._database.execute("PRAGMA journal_mode = WAL")
        self._database.execute("PRAGMA synchronous = NORMAL")
        self._database.executescript(_SCHEMA)
        self.upto = int(self._database.execute("SELECT upto FROM indexed").fetchone()[0])  # every id written at or before (µs) is on disk

    def known(self, hashes: Sequence[int]) -> set[int]:
        """Those of `hashes` that stand in the log."""
        found = self._new.intersection(hashes)
        rows = self._database.execute("SELECT hash FROM ids WHERE hash IN (SELECT value FROM json_each(?))", (json.dumps(list(hashes)),))
        return found.union(row[0] for row in rows)

    def add(self, hashes: Iterable[int], upto: int) -> None:
        """Remember the ids of everything written up to `upto`. Never fails: where the disk is full, they stay in memory until it is not."""
        self._new.update(hashes)
        self._new_upto = upto
        if len(self._new) >= _HELD:
            with contextlib.suppress(sqlite3.OperationalError):
                self.flush()

    def flush(self) -> None:
        """Write what is only in memory. Raises sqlite3.OperationalError (disk full)."""
        with self._transaction():
            self._database.executemany("INSERT OR IGNORE INTO ids VALUES (?)", ((number,) for number in sorted(self._new)))
            self._database.execute("UPDATE indexed SET upto = ?", (self._new_upto,))
        self._new.clear()
        self.upto = self._new_upto

    def clear(self) -> None:
        """Forget all; `upto` is 0. Raises sqlite3.OperationalError (disk full)."""
        with self._transaction():
            self._database.execute("DELETE FROM ids")
            self._database.execute("UPDATE indexed SET upto = 0")
        self._new.clear()
        self.upto = self._new_upto = 0

    def forget(self, hashes: Sequence[int]) -> None:
        """Drop ids whose events left the log. One that is missed makes an event that old still a duplicate, no more."""
        self._new.difference_update(hashes)
        with contextlib.suppress(sqlite3.OperationalError), self._transaction():
            self._database.executemany("DELETE FROM ids WHERE hash = ?", ((number,) for number in hashes))

    def close(self) -> None:
        with contextlib.suppress(sqlite3.OperationalError):
            self.flush()
        self._database.close()

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        self._database.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._database.execute("COMMIT")
        except BaseException:
            if self._database.in_transaction:
                self._database.execute("ROLLBACK")
            raise
