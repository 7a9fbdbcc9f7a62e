"""Closed segments of the answer log as Parquet: `python -m serving.segments STATE/log/answers`. And the log read back, whatever form a segment is in.

A segment is converted aside, synced, renamed, and only then are its lines removed; so whenever this is killed, each answer is on disk in one whole
form, and the next run goes on. Lines that are no answers (torn by a crash of the machine) are kept beside, in unread.jsonl.
"""

import contextlib
import fcntl
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from longtrail.files import atomic_directory
from serving.answer_log import ANSWER_COLUMNS, ANSWERS

IMPRESSIONS_FILE, ANSWERS_FILE, UNREAD_FILE = "impressions.parquet", "answers.parquet", "unread.jsonl"
SHOWN = (
    'SELECT "user", unnest(items) AS item, make_timestamptz("timestamp") AS "timestamp", request_id AS request, '
    "generate_subscripts(items, 1)::INTEGER AS position, unnest(propensities) AS propensity, arm AS policy"
)
_NEEDED = ("request_id", "user", "timestamp", "arm", "items", "propensities")  # a line without them is no answer
_NICENESS = 10


def convert_all(folder: Path) -> int:
    """Every segment that nobody writes, oldest first; returns how many."""
    return sum(convert(segment) for segment in sorted(folder.glob("*.jsonl")))


def convert(segment: Path) -> bool:
    """False where it is written, or converted, by another process."""
    import duckdb

    target = segment.with_suffix("")
    try:
        lines = segment.open("rb")
    except FileNotFoundError:
        return False
    with lines:
        try:
            fcntl.flock(lines, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        if not segment.exists():  # another converter was faster
            return False
        if not target.is_dir():
            with atomic_directory(target) as aside, duckdb.connect() as connection:
                connection.execute("SET TimeZone = 'UTC'; SET threads = 1")
                answers = read_lines(connection, [segment])
                connection.execute(f"CREATE TABLE answers AS SELECT * FROM {answers}")
                _copy(connection, "FROM answers ORDER BY timestamp", aside / ANSWERS_FILE)
                _copy(connection, f"{SHOWN} FROM answers ORDER BY timestamp, request, position", aside / IMPRESSIONS_FILE)
                unread = _unread(lines, connection)
                if unread:
                    (aside / UNREAD_FILE).write_bytes(b"".join(unread))
                for file in aside.iterdir():
                    _sync(file)
                _sync(aside)
            _sync(target.parent)
        segment.unlink()
    return True


def load_answers(connection: Any, state: Path, name: str = ANSWERS) -> int:
    """Table `answers` (ANSWER_COLUMNS) of the whole log of a state folder that may be in use; returns how many lines were no answers.

    Lines are read before Parquet is looked for: what is converted in between is met twice, never missed, and the Parquet counts.
    """
    folder = state / "log" / name
    with tempfile.TemporaryDirectory(prefix="longtrail-answers-") as copies:
        for segment in sorted(folder.glob("*.jsonl")):
            with contextlib.suppress(FileNotFoundError):
                shutil.copyfile(segment, Path(copies) / segment.name)
        converted = sorted(path.parent for path in folder.glob(f"*/{ANSWERS_FILE}") if not path.parent.name.startswith("."))
        names = {path.name for path in converted}
        lines = [path for path in sorted(Path(copies).iterdir()) if path.stem not in names]
        columns = ", ".join(f'"{name}" {kind}' for name, kind in ANSWER_COLUMNS.items())
        connection.execute(f"CREATE TABLE answers ({columns})")
        if converted:
            files = ", ".join(quoted(path / ANSWERS_FILE) for path in converted)
            connection.execute(f"INSERT INTO answers BY NAME SELECT * FROM read_parquet([{files}], union_by_name = true)")
        torn = sum(_lines(path / UNREAD_FILE) for path in converted if (path / UNREAD_FILE).exists())
        if lines:
            before = _count(connection)
            connection.execute(f"INSERT INTO answers BY NAME SELECT * FROM {read_lines(connection, lines)}")
            torn += sum(map(_lines, lines)) - (_count(connection) - before)
    return torn


def read_answers(state: Path, name: str = ANSWERS) -> list[dict[str, Any]]:
    """Every logged answer, or line of `name` (SHADOW), in order of time, as LoggedAnswer's fields. All in memory: a large log is for export_log."""
    import duckdb

    with duckdb.connect() as connection:
        load_answers(connection, state, name)
        found = connection.execute("FROM answers ORDER BY timestamp, request_id")
        names = [column[0] for column in found.description]
        answers = [dict(zip(names, row, strict=True)) for row in found.fetchall()]
    return [answer | {"evidence": answer["evidence"] and json.loads(answer["evidence"])} for answer in answers]


def read_lines(connection: Any, files: list[Path]) -> str:
    """The SQL that reads answers from lines, leaving out what is none."""
    columns = ", ".join(f"{name}: '{kind}'" for name, kind in ANSWER_COLUMNS.items())
    names = ", ".join(map(quoted, files))
    whole = " AND ".join(f'"{name}" IS NOT NULL' for name in _NEEDED)
    return (
        f"(SELECT * FROM read_json([{names}], format = 'newline_delimited', ignore_errors = true, maximum_object_size = 67108864, "
        f"columns = {{{columns}}}) WHERE {whole})"
    )


def quoted(path: Path) -> str:
    """A path as an SQL string."""
    return "'" + str(path).replace("'", "''") + "'"


def _copy(connection: Any, query: str, path: Path) -> None:
    connection.execute(f"COPY ({query}) TO {quoted(path)} (FORMAT parquet, COMPRESSION zstd)")


def _unread(lines: Any, connection: Any) -> list[bytes]:
    """The lines that hold something, but no answer of the table `answers`."""
    lines.seek(0)
    if sum(1 for line in lines if line.strip()) == _count(connection):
        return []
    known = {row[0] for row in connection.execute("SELECT request_id FROM answers").fetchall()}

    def is_answer(line: bytes) -> bool:
        try:
            return json.loads(line)["request_id"] in known
        except (ValueError, TypeError, KeyError):
            return False

    lines.seek(0)
    return [line for line in lines if line.strip() and not is_answer(line)]


def _lines(path: Path) -> int:
    with path.open("rb") as lines:
        return sum(1 for line in lines if line.strip())


def _count(connection: Any) -> int:
    return int(connection.execute("SELECT count(*) FROM answers").fetchall()[0][0])


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


if __name__ == "__main__":
    os.nice(_NICENESS)
    convert_all(Path(sys.argv[1]))
