"""Every answer on disk, in segments: `log/answers/` of the state folder.

NAME.jsonl                  a segment as it is written, locked by its writer: one line an answer, so that a request is logged whole or not at all
NAME/impressions.parquet    the same, converted when it is closed (serving.segments): one row an item shown, in the impressions schema (raw keys)
NAME/answers.parquet        and one row an answer, with every candidate that was scored

A process writes segments of its own, so two may log side by side while one takes over from the other.
"""

import fcntl
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from longtrail.config import AnswerLogSettings
from serving.log import AppendLog

ANSWERS, SHADOW = "answers", "shadow"  # folders below log/

# Types of LoggedAnswer's fields, as DuckDB writes them.
ANSWER_COLUMNS = {
    "request_id": "VARCHAR",
    "user": "VARCHAR",
    "timestamp": "BIGINT",
    "arm": "VARCHAR",
    "assigned": "VARCHAR",
    "policy": "VARCHAR",
    "model": "VARCHAR",
    "fallback": "VARCHAR",
    "items": "VARCHAR[]",
    "scores": "DOUBLE[]",
    "propensities": "DOUBLE[]",
    "candidates": "VARCHAR[]",
    "evidence": "JSON",
}


@dataclass(frozen=True, kw_only=True)
class LoggedAnswer:
    """One answer as it is logged. Keys are raw; `timestamp` is UTC microseconds; lists run from position 1.

    `arm` is the arm whose list was shown (the column `policy` of the impressions schema), `assigned` the user's arm, which is another only in a
    fallback, and `policy` how the list was drawn.
    """

    request_id: str
    user: str
    timestamp: int
    arm: str
    assigned: str
    policy: str
    model: str | None
    fallback: str | None
    items: Sequence[str]
    scores: Sequence[float]  # P(click); in a fallback the items' own click rates
    propensities: Sequence[float]
    candidates: Sequence[str]
    evidence: dict[str, Any] | None = None  # serving.evidence, for a sample


class AnswerLog:
    """Thread-safe. Flushed to the system, not synced: a crash of the machine may lose the last answers, a crash of the service none."""

    def __init__(
        self,
        folder: Path,
        settings: AnswerLogSettings | None = None,
        *,
        name: str = ANSWERS,
        convert: Callable[[Path], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Segments stand in `folder / name`.

        `convert(folder)` is called, in a thread, when a segment was closed and at the start where others left some; default: `convert_aside`.
        """
        self._folder = folder / name
        self._folder.mkdir(parents=True, exist_ok=True)
        self._settings = settings or AnswerLogSettings()
        self._convert = convert or convert_aside
        self._clock = clock
        self._lock = threading.Lock()
        self._segment: AppendLog | None = None
        self._opened, self._written = 0.0, 0
        if any(self._folder.glob("*.jsonl")):
            self._closed_some()

    def append(self, answer: LoggedAnswer) -> None:
        """Raises OSError (disk full)."""
        line = json.dumps(vars(answer), ensure_ascii=False, allow_nan=False, separators=(",", ":")) + "\n"
        with self._lock:
            if self._segment is not None and self._full():
                self._close_segment()
                self._closed_some()
            if self._segment is None:
                self._segment = _open_segment(self._folder)
                self._opened, self._written = self._clock(), 0
            self._segment.append(line, durable=False)
            self._written += len(line)

    def close(self) -> None:
        """The segment is left as lines: whoever opens the folder next converts it."""
        with self._lock:
            self._close_segment()

    def _full(self) -> bool:
        settings = self._settings
        return self._written >= settings.segment_bytes or self._clock() - self._opened >= 60 * settings.segment_minutes

    def _close_segment(self) -> None:
        if self._segment is not None:
            self._segment.close()
            self._segment = None

    def _closed_some(self) -> None:
        threading.Thread(target=self._convert, args=(self._folder,), name="answer segments", daemon=True).start()


def _open_segment(folder: Path) -> AppendLog:
    """A new segment, locked before it has its name: a converter takes what it can lock for abandoned."""
    path = folder / f"{datetime.now(UTC):%Y%m%dT%H%M%S%f}-{os.getpid()}.jsonl"
    log = AppendLog(path.with_suffix(".opening"))
    fcntl.flock(log.descriptor, fcntl.LOCK_SH)
    log.path.rename(path)
    return log


def convert_aside(folder: Path) -> None:
    """`python -m serving.segments FOLDER`, which is nice to the service: a conversion in its own process takes neither its lock nor its memory."""
    source = str(Path(__file__).resolve().parent.parent)
    environment = {**os.environ, "PYTHONPATH": source, "PYTHONDONTWRITEBYTECODE": "1"}
    subprocess.run([sys.executable, "-m", "serving.segments", str(folder)], env=environment, cwd=folder, check=False, stdin=subprocess.DEVNULL)
