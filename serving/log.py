"""Append-only files that only ever grow by whole lines."""

import os
from pathlib import Path
from threading import Lock

_BLOCK = 1 << 16


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
            before = os.fstat(self._descriptor).st_size
            try:
                while left:
                    left = left[os.write(self._descriptor, left) :]
            except OSError:
                os.ftruncate(self._descriptor, before)  # half a line would spoil the next one
                raise
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
