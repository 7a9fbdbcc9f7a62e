"""The answer log: rotated, converted, read back; killed at any moment it loses nothing and doubles nothing."""

import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from longtrail.config import AnswerLogSettings
from serving.answer_log import ANSWER_COLUMNS, AnswerLog, LoggedAnswer
from serving.segments import convert, convert_all, read_answers

ROOT = Path(__file__).parents[2]


def logged(number: int, **values: Any) -> LoggedAnswer:
    standard: dict[str, Any] = {
        "user": f"u,{number % 7}\u2028",
        "timestamp": 1_700_000_000_000_000 + number,
        "arm": "sam",
        "assigned": "sam",
        "policy": "best",
        "model": None if number % 5 == 0 else "sam",
        "fallback": "unknown user" if number % 5 == 0 else None,
        "items": [f"i{number}-{place}" for place in range(number % 4)],
        "scores": [0.1 + 0.2] * (number % 4),
        "propensities": [1 / 3] * (number % 4),
        "candidates": [f"i{number}-{place}" for place in range(6)],
        "evidence": {"time": number} if number % 3 == 0 else None,
    }
    return LoggedAnswer(request_id=f"{number:032x}", **standard | values)


def expected(*numbers: int) -> list[dict[str, Any]]:
    return [asdict(logged(number)) for number in numbers]


def nothing(folder: Path) -> None:
    """Converts nothing."""


def test_the_columns_are_the_fields() -> None:
    assert list(ANSWER_COLUMNS) == [each.name for each in fields(LoggedAnswer)]


def test_segments_are_closed_by_size_and_by_age_and_become_parquet(tmp_path: Path) -> None:
    seconds, folder = [0.0], tmp_path / "log" / "answers"
    log = AnswerLog(tmp_path / "log", AnswerLogSettings(segment_bytes=3_000, segment_minutes=10), convert=nothing, clock=lambda: seconds[0])
    for number in range(20):
        log.append(logged(number))
    lines = len(list(folder.glob("*.jsonl")))
    assert lines >= 3 and convert_all(folder) == lines - 1, "the open one stays"
    seconds[0] = 601.0
    log.append(logged(20))
    assert convert_all(folder) == 1, "the old one was closed by its age"
    segments = sorted(path.name for path in folder.iterdir())
    assert sum(name.endswith(".jsonl") for name in segments) == 1
    assert len(segments) > 3 and read_answers(tmp_path) == expected(*range(21))
    shown = pq.read_table(sorted(folder.glob("*/impressions.parquet"))[0])
    assert shown.column_names == ["user", "item", "timestamp", "request", "position", "propensity", "policy"]
    moment = datetime(2023, 11, 14, 22, 13, 20, 3, tzinfo=UTC)
    rows = [row for row in shown.to_pylist() if row["request"] == f"{3:032x}"]
    assert [tuple(row.values()) for row in rows] == [("u,3\u2028", f"i3-{place}", moment, f"{3:032x}", place + 1, 1 / 3, "sam") for place in range(3)]
    log.close()
    assert convert_all(folder) == 1 and read_answers(tmp_path) == expected(*range(21))


def test_a_closed_segment_is_converted_by_a_process_beside(tmp_path: Path) -> None:
    log = AnswerLog(tmp_path / "log", AnswerLogSettings(segment_bytes=1))
    log.append(logged(1))
    log.append(logged(2))
    end = time.monotonic() + 60
    while not list((tmp_path / "log" / "answers").glob("*/answers.parquet")) and time.monotonic() < end:
        time.sleep(0.05)
    assert list((tmp_path / "log" / "answers").glob("*/answers.parquet")) and read_answers(tmp_path) == expected(1, 2)
    log.close()


def test_what_is_being_written_is_not_converted_and_a_new_process_writes_its_own(tmp_path: Path) -> None:
    old, new = AnswerLog(tmp_path / "log", convert=nothing), AnswerLog(tmp_path / "log", convert=nothing)
    old.append(logged(1))
    new.append(logged(2))
    old.append(logged(3))
    assert convert_all(tmp_path / "log" / "answers") == 0
    old.close()
    assert convert_all(tmp_path / "log" / "answers") == 1 and read_answers(tmp_path) == expected(1, 2, 3)
    new.close()
    assert not convert(tmp_path / "log" / "answers" / "gone.jsonl")


def test_many_threads(tmp_path: Path) -> None:
    log = AnswerLog(tmp_path / "log", AnswerLogSettings(segment_bytes=2_000), convert=nothing)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: log.append(logged(number)), range(100)))
    log.close()
    assert len(list((tmp_path / "log" / "answers").glob("*.jsonl"))) > 10 and read_answers(tmp_path) == expected(*range(100))


def test_lines_that_are_no_answers_are_kept_beside(tmp_path: Path) -> None:
    log = AnswerLog(tmp_path / "log", convert=nothing)
    log.append(logged(1))
    log.append(logged(2))
    log.close()
    (segment,) = (tmp_path / "log" / "answers").glob("*.jsonl")
    wrong = [b'{"request_id": 3, "timestamp": "never"}\n', b"\xff\xfe\n", b'{"request_id": "r9", "us']
    segment.write_bytes(segment.read_bytes() + b"".join(wrong))
    assert convert(segment) and read_answers(tmp_path) == expected(1, 2)
    assert segment.with_suffix("").joinpath("unread.jsonl").read_bytes() == b"".join(wrong)


DRIVER = """
import json, os, random, shutil, signal, sys
from pathlib import Path
import duckdb
from serving.segments import convert_all, read_answers

template, work, expected = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(Path(sys.argv[3]).read_text())

def child(do):
    pid = os.fork()
    if pid == 0:
        try:
            do()
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
    return os.waitpid(pid, 0)[1]

def killed_at(moment):
    seen = 0
    def hook(event, arguments):
        nonlocal seen
        if event.startswith(("os.", "open", "shutil.", "fcntl.")):
            seen += 1
            if seen == moment:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)
    convert_all(work / "log" / "answers")

def check():
    assert read_answers(work) == expected, "answers lost, doubled or changed"

def finish():
    check()
    convert_all(work / "log" / "answers")
    check()
    left = sorted(path.name for path in (work / "log" / "answers").iterdir())
    assert left == sorted(path.stem for path in (template / "log" / "answers").glob("*.jsonl")), left

kills, moments = 0, random.Random(4).sample(range(1, 70), 9)
for moment in sorted(moments):
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(template, work)
    status = child(lambda: killed_at(moment))
    kills += os.WIFSIGNALED(status)
    assert os.WIFSIGNALED(status) or status == 0
    assert child(finish) == 0, f"a kill at {moment}"
print(kills)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="forks")
def test_a_conversion_killed_at_any_moment_loses_and_doubles_nothing(tmp_path: Path) -> None:
    log = AnswerLog(tmp_path / "template" / "log", AnswerLogSettings(segment_bytes=2_500), convert=nothing)
    for number in range(12):
        log.append(logged(number))
    log.close()
    assert len(list((tmp_path / "template" / "log" / "answers").glob("*.jsonl"))) in (2, 3)
    (tmp_path / "expected.json").write_text(json.dumps(expected(*range(12))))
    arguments = [sys.executable, "-c", DRIVER, str(tmp_path / "template"), str(tmp_path / "work"), str(tmp_path / "expected.json")]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 4, "the moments are spread over the conversion"
