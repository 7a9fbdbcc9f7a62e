"""The event log: what was acknowledged, and nothing else the next start would miss.

`log/events/`
  00001763779200000000.csv   a segment: whole records (serving.event_records), oldest first; the name is the first `written_at` it may hold
  ids.db                     which event ids stand in the segments (serving.event_ids); can be deleted, is made again
  id                         the log's name: an online store remembers by it how far this log is applied
  lock                       held by the one process that writes

Records are written and synced before `append` returns. What a crash left torn at the end was never acknowledged and is cut off at the next opening.
"""

import errno
import fcntl
import logging
import os
import sqlite3
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from threading import Lock

from longtrail.errors import LongtrailError
from longtrail.files import atomic_file
from serving.clock import now
from serving.event_ids import EventIds, hash_of
from serving.event_records import HEADER, SUFFIX, UNTIMED, LoggedEvent, decode, encode, is_whole, read_events, read_segment, segments

FOLDER = "events"  # in the folder of all logs
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_DAY = 86_400_000_000  # µs
_FORGOTTEN_AT_ONCE = 2_000  # ids of a deleted segment dropped from the index with each append, so that none waits long; our choice

logger = logging.getLogger(__name__)


class EventLogError(LongtrailError):
    """The log cannot be opened: another process writes to it, or what stands there is no log."""


class LogFull(LongtrailError):  # noqa: N818  (a state of affairs that passes)
    """The disk has no room. Nothing of the batch was kept; the log takes events again when there is room."""


class LogBroken(LongtrailError):  # noqa: N818
    """The disk failed while a batch was written or synced: what is on it is only known after the service is started again."""


class EventLog:
    """Append-only, in segments. Thread-safe; one process at a time. `last` is the newest `written_at`, 0 in an empty log."""

    def __init__(self, logs: Path, *, segment_bytes: int = 1 << 26, retention_days: int | None = None, wait: float = 30.0) -> None:
        """`logs` is the folder of all logs. A segment that reached `segment_bytes` is closed, and a closed one is deleted when all its events are
        older than `retention_days` (never by default) and applied. Waits `wait` seconds for a process that still holds the log.

        Raises EventLogError.
        """
        if (old := logs / "events.csv").exists():
            logger.warning("%s: the log of an earlier version; its events are in no history made since. Feed it to components.ingest", old)
        self.folder = logs / FOLDER
        self.folder.mkdir(parents=True, exist_ok=True)
        self._segment_bytes = segment_bytes
        self._retention = None if retention_days is None else retention_days * _DAY
        self._lock = Lock()
        self._held = _hold(self.folder / "lock", wait)
        self.name = _name(self.folder / "id")
        self.applied = 0  # segments with newer events are never deleted; moved on by whoever applies the events
        self.syncs = 0  # since it was opened
        self._broken: str | None = None
        self._forgotten: list[int] = []
        newest = max(segments(self.folder), default=self.folder / f"{now():020d}{SUFFIX}")
        try:
            self._descriptor, self._size, line = _open_segment(newest)
            self._ids = EventIds(self.folder / "ids.db")
        except (OSError, sqlite3.Error) as error:
            raise EventLogError(f"{self.folder}: {error}; expected a log that can be written to") from error
        self.last = decode([line])[0].written_at if line else int(newest.stem) - 1
        if self.last > now() + _DAY // 24:
            logger.warning("the newest logged event is %.0f s ahead of this machine's clock", (self.last - now()) / 1e6)
        if self._ids.upto > self.last:  # an older log was put back: ids it no longer holds must not count as met
            self._ids.clear()
        for chunk in self.read(self._ids.upto):
            self._ids.add([hash_of(event.event_id) for event in chunk if event.event_id is not None], chunk[-1].written_at)

    def known(self, event_ids: Sequence[str]) -> set[str]:
        """Those of `event_ids` that stand in the log, however old."""
        if not event_ids:
            return set()
        hashes = {event_id: hash_of(event_id) for event_id in event_ids}
        with self._lock:
            known = self._ids.known(list(hashes.values()))
        return {event_id for event_id, number in hashes.items() if number in known}

    def append(self, events: Sequence[LoggedEvent]) -> list[LoggedEvent]:
        """The events with their `written_at`, on disk when this returns: all of them, or none.

        Raises LogFull where there is no room, LogBroken where the disk failed now or before.
        """
        if not events:
            return []
        with self._lock:
            if self._broken is not None:
                raise LogBroken(self._broken)
            first = max(self.last + 1, now())
            stamped = [_stamped(event, first + place) for place, event in enumerate(events)]
            if self._size >= self._segment_bytes:
                self._rotate()
            self._write(encode(stamped))
            self.syncs += 1
            self.last = stamped[-1].written_at
            self._ids.add([hash_of(event.event_id) for event in stamped if event.event_id is not None], self.last)
            if self._forgotten:
                self._ids.forget(self._forgotten[-_FORGOTTEN_AT_ONCE:])
                del self._forgotten[-_FORGOTTEN_AT_ONCE:]
        return stamped

    def read(self, after: int = 0) -> Iterator[list[LoggedEvent]]:
        """The events written later than `after`, in order, some thousands at a time."""
        return read_events(self.folder, after)

    def close(self) -> None:
        with self._lock:
            self._ids.close()
            os.close(self._descriptor)
            os.close(self._held)

    # ------------------------------------------------------------ inside

    def _write(self, data: bytes) -> None:
        try:
            left = memoryview(data)
            while left:
                left = left[os.write(self._descriptor, left) :]
            os.fdatasync(self._descriptor)
        except OSError as error:
            self._undo(error)
        self._size += len(data)

    def _undo(self, error: OSError) -> None:
        """Back to what was acknowledged. Raises LogFull, or LogBroken where it cannot be known what is on disk: after a sync that failed, the
        system may have dropped what it could not write and call the next sync a success."""
        try:
            os.ftruncate(self._descriptor, self._size)
            os.fdatasync(self._descriptor)
        except OSError as again:
            self._broken = f"{self.folder}: {error}; cutting it off failed too: {again}"
            raise LogBroken(self._broken) from error
        if error.errno in _FULL:
            raise LogFull(f"{self.folder}: {error.strerror}") from error
        self._broken = f"{self.folder}: {error}"
        raise LogBroken(self._broken) from error

    def _rotate(self) -> None:
        """Go on in a new segment. Raises LogFull, LogBroken; the old one is then still the newest."""
        path = self.folder / f"{self.last + 1:020d}{SUFFIX}"
        try:
            descriptor, size, _ = _open_segment(path)
        except OSError as error:
            path.unlink(missing_ok=True)
            raise (LogFull if error.errno in _FULL else LogBroken)(f"{path}: {error.strerror}") from error
        os.close(self._descriptor)
        self._descriptor, self._size = descriptor, size
        self._expire()

    def _expire(self) -> None:
        if self._retention is None:
            return
        files = segments(self.folder)
        for file, following in pairwise(files):
            if int(following.stem) > min(now() - self._retention, self.applied):
                break
            self._forgotten += [hash_of(e.event_id) for chunk in read_segment(file) for e in chunk if e.event_id is not None]
            file.unlink()
            logger.info("%s: older than the retention, deleted", file)


def _stamped(event: LoggedEvent, moment: int) -> LoggedEvent:
    return replace(event, written_at=moment, timestamp=moment if event.timestamp == UNTIMED else event.timestamp)


def _open_segment(path: Path) -> tuple[int, int, bytes | None]:
    """The file open for appending, its size and its newest record; what follows that is cut off. All of it is on disk when this returns.

    Raises EventLogError where the file is no segment, OSError where it cannot be written.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    try:
        size, newest, damaged = _whole(path)
        if size == 0 and damaged:
            raise EventLogError(f"{path}: {damaged} lines and no whole record; expected a segment of the event log")
        if damaged:
            logger.error("%s: %d damaged lines before the newest whole record; they are left out", path, damaged)
        if (torn := os.fstat(descriptor).st_size - size) > 0:
            logger.warning("%s: %d bytes that a crash left torn at the end are cut off; they were never acknowledged", path, torn)
            os.ftruncate(descriptor, size)
        if size == 0:
            size = os.write(descriptor, HEADER)
            if size < len(HEADER):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(descriptor)
        sync_folder(path.parent)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor, size, newest


def _whole(path: Path) -> tuple[int, bytes | None, int]:
    """Where the newest whole record (or the header) ends, that record, and the lines before it that are damaged."""
    end = position = damaged = since = 0
    newest = None
    with path.open("rb") as lines:
        for line in lines:
            position += len(line)
            if line == HEADER and position == len(HEADER):
                end = position
            elif line.endswith(b"\n") and is_whole(line[:-1]):
                end, newest, damaged, since = position, line[:-1], damaged + since, 0
            else:
                since += 1
    if end == 0 and since > 1:
        return 0, None, since  # not one torn header: something else stands here
    return end, newest, damaged


def sync_folder(folder: Path) -> None:
    """New and deleted names in `folder` are on disk when this returns."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _hold(path: Path, wait: float) -> int:
    """A descriptor that locks `path` until it is closed, or its process ends however it ends."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    end = time.monotonic() + wait
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
        except BlockingIOError:
            if time.monotonic() >= end:
                os.close(descriptor)
                raise EventLogError(f"{path.parent}: another process writes to this log; one process serves a state folder") from None
            time.sleep(0.05)


def _name(path: Path) -> str:
    """The log's own name, given once."""
    if not path.exists():
        with atomic_file(path) as aside:
            aside.write_text(uuid.uuid4().hex, encoding="ascii")
    return path.read_text(encoding="ascii")
