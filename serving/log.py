"""The service's memory on disk: append-only files that only ever grow by whole lines.

`events.csv`     one line an event, in a layout that `components.ingest` reads as it is (EVENT_COLUMNS); on disk (fsync) before it is acknowledged.
"""

import csv
import io
import os
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

EVENT_COLUMNS = ("event_id", "user", "item", "timestamp", "action", "value", "request", "written_at")
_BLOCK = 1 << 16
REMEMBERED_EVENTS = 100_000  # newest event ids held against duplicates; our choice


class AppendLog:
    """A file that is only appended to, by one process. A line that a crash left torn was never acknowledged: it is cut off at the next opening."""

    def __init__(self, path: Path, *, header: str = "") -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._lock = Lock()
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        whole = _whole_lines(self._descriptor)
        os.ftruncate(self._descriptor, whole)
        if whole == 0 and header:
            self.append(header, durable=True)

    def append(self, lines: str, *, durable: bool) -> None:
        """Hand `lines` (each ended by a newline) to the system in one piece; `durable` waits until they are on disk. Raises OSError (disk full)."""
        left = memoryview(lines.encode("utf-8"))
        with self._lock:
            while left:
                left = left[os.write(self._descriptor, left) :]
        if durable:
            os.fsync(self._descriptor)

    @property
    def descriptor(self) -> int:
        """Of the open file: for locks."""
        return self._descriptor

    def close(self) -> None:
        os.close(self._descriptor)


def _whole_lines(descriptor: int) -> int:
    """Where the last newline ends, 0 without any."""
    end = os.fstat(descriptor).st_size
    while end > 0:
        start = max(0, end - _BLOCK)
        newline = os.pread(descriptor, end - start, start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0


@dataclass(frozen=True, kw_only=True)
class LoggedEvent:
    """One event as it is logged: a row of EVENT_COLUMNS, times in UTC microseconds."""

    event_id: str | None
    user: str
    item: str
    timestamp: int
    action: str
    value: float | None
    request: str | None
    written_at: int


class EventLog:
    """`events.csv`, synced before `append` returns, and the newest event ids in it."""

    def __init__(self, folder: Path) -> None:
        self._log = AppendLog(folder / "events.csv", header=",".join(EVENT_COLUMNS) + "\n")
        self._ids: OrderedDict[str, None] = OrderedDict()
        with self._log.path.open(encoding="utf-8", errors="replace", newline="") as lines:
            self._remember(row["event_id"] for row in csv.DictReader(lines) if row["event_id"] and row["written_at"])

    def is_new(self, event_id: str | None) -> bool:
        return event_id is None or event_id not in self._ids

    def append(self, events: Sequence[LoggedEvent]) -> None:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([_row(event) for event in events])
        self._log.append(text.getvalue(), durable=True)
        self._remember(event.event_id for event in events if event.event_id is not None)

    def _remember(self, ids: Iterable[str]) -> None:
        for event_id in ids:
            self._ids[event_id] = None
            if len(self._ids) > REMEMBERED_EVENTS:
                self._ids.popitem(last=False)

    def close(self) -> None:
        self._log.close()


def _row(event: LoggedEvent) -> list[str | int | float]:
    return ["" if value is None else value for value in (getattr(event, name) for name in EVENT_COLUMNS)]
