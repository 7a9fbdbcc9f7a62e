"""One event as one line of the event log: CSV that `components.ingest` reads as it is, with a checksum of its own as the last field.

A line never holds a line break (keys have no control characters), so a file can be cut at any newline, and a damaged line spoils no other.
"""

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from operator import attrgetter
from pathlib import Path
from zlib import crc32

COLUMNS = ("event_id", "user", "item", "timestamp", "action", "value", "request", "written_at", "checksum")
HEADER = (",".join(COLUMNS) + "\n").encode()
SUFFIX = ".csv"
_values = attrgetter(*COLUMNS[:-1])
_CHUNK = 10_000  # events held at a time when a log is read; our choice


UNTIMED = -1  # the `timestamp` of an event that says no time: it becomes `written_at`


@dataclass(frozen=True, kw_only=True, slots=True)
class LoggedEvent:
    """One event as it is logged, times in UTC microseconds. `written_at` grows strictly along the log, so it is also the event's place in it."""

    event_id: str | None
    user: str
    item: str
    timestamp: int
    action: str
    value: float | None
    request: str | None
    written_at: int


def encode(events: Sequence[LoggedEvent]) -> bytes:
    """The lines of `events`, each ended by a newline."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([["" if value is None else value for value in _values(event)] for event in events])
    lines = text.getvalue().encode("utf-8").split(b"\n")[:-1]  # bytes: a text's splitlines knows more line breaks than a newline
    return b"".join(b"%b,%08x\n" % (line, crc32(line)) for line in lines)


def is_whole(line: bytes) -> bool:
    """Whether `line`, without its newline, is a record as it was written: its checksum is that of what stands before it."""
    body, _, checksum = line.rpartition(b",")
    return len(checksum) == 8 and checksum == b"%08x" % crc32(body)


def decode(lines: Sequence[bytes]) -> list[LoggedEvent]:
    """The events of whole lines (`is_whole`)."""
    rows = csv.reader(io.StringIO("\n".join(line.decode("utf-8") for line in lines)))
    return [
        LoggedEvent(
            event_id=event_id or None,
            user=user,
            item=item,
            timestamp=int(timestamp),
            action=action,
            value=float(value) if value else None,
            request=request or None,
            written_at=int(written_at),
        )
        for event_id, user, item, timestamp, action, value, request, written_at, _ in rows
    ]


def segments(folder: Path) -> list[Path]:
    """The files of a log, oldest first. A name is the first `written_at` that the file may hold."""
    return sorted(path for path in folder.glob(f"*{SUFFIX}") if path.stem.isdecimal())


def read_events(folder: Path, after: int = 0) -> Iterator[list[LoggedEvent]]:
    """The events of the log in `folder` written later than `after` (µs), in order, some thousands at a time. The log may be in use.

    Lines whose checksum does not fit are left out: torn by a crash and never acknowledged, or damaged since (`damaged_lines` counts them).
    """
    files = segments(folder)
    for file, following in zip(files, [*files[1:], None], strict=True):
        if following is None or int(following.stem) > after + 1:
            yield from read_segment(file, after)


def damaged_lines(folder: Path) -> int:
    """Lines of the log in `folder` that are no whole records."""
    return sum(not is_whole(line.rstrip(b"\n")) for file in segments(folder) for line in file.open("rb") if line != HEADER)


def read_segment(file: Path, after: int = 0) -> Iterator[list[LoggedEvent]]:
    """As read_events, of one file."""
    with file.open("rb") as lines:
        whole = (line[:-1] for line in lines if line.endswith(b"\n") and is_whole(line[:-1]))
        while chunk := decode(list(islice(whole, _CHUNK))):
            if kept := [event for event in chunk if event.written_at > after]:
                yield kept
