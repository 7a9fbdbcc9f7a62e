"""How a request is timed, and that the process which times it ends with the one that asked for it. Figures: tests/test_evaluation.py."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from longtrail import costs
from longtrail.config import EvaluationSettings, ServingSettings
from longtrail.costs import calmest_round, measure_cost
from longtrail.errors import ModelError

ROOT = Path(__file__).parents[1]


def test_a_fast_request_is_timed_as_often_as_asked() -> None:
    calls: list[None] = []
    times = calmest_round(lambda: calls.append(None), 20, seconds=60)
    assert len(times) == 20 and len(calls) == 10 + 3 * 20
    assert all(wall > 0 and processor >= 0 for wall, processor in times)


def test_a_slow_request_is_timed_a_few_times_and_no_more() -> None:
    calls: list[None] = []

    def slow() -> None:
        calls.append(None)
        time.sleep(0.02)

    times = calmest_round(slow, 1000, seconds=0.01)
    assert len(times) == 3 and len(calls) == 1 + 3  # a warm-up and one round
    assert all(wall >= 20 > processor for wall, processor in times)  # sleeping takes no processor


def test_time_is_shared_by_the_rounds() -> None:
    calls: list[None] = []

    def request() -> None:
        calls.append(None)
        time.sleep(0.001)

    began = time.perf_counter()
    times = calmest_round(request, 100_000, seconds=0.8)
    assert 3 < len(times) < len(calls) < 1000
    assert time.perf_counter() - began < 20


@pytest.mark.parametrize("said", [None, "ACTIVE"])
def test_threads_wait_as_in_the_service_unless_the_environment_says_otherwise(said: str | None, tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """With threads that spin, a request of IFA's took a second instead of 4 ms beside other work, and selection dropped the model for it."""
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if said is not None:
        monkeypatch.setenv("OMP_WAIT_POLICY", said)
    seen: dict[str, str] = {}

    def run(command: list[str], *, env: dict[str, str], **rest: object) -> subprocess.CompletedProcess[str]:
        seen.update(env)
        return subprocess.CompletedProcess(command, 1, stdout="", stderr="enough")

    monkeypatch.setattr(costs.subprocess, "run", run)
    for name in ("model.safetensors", "model.json"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(ModelError, match="could not be timed: enough"):
        measure_cost(tmp_path, EvaluationSettings())
    assert seen["OMP_WAIT_POLICY"] == (said or "PASSIVE") and seen["PATH"] == os.environ["PATH"]


def test_a_request_is_timed_with_as_many_threads_as_the_service_has() -> None:
    """Two that sleep and are woken for each of a small model's steps take thrice the time of one."""
    assert EvaluationSettings().latency_threads == ServingSettings().threads


# A parent that does what measure_cost does, and a child that says its name and never ends by itself.
CHILD = """
import os, sys, time
from longtrail.costs import end_with_parent
end_with_parent()
open(sys.argv[1], "w").write(str(os.getpid()))
time.sleep(600)
"""
PARENT = f"""
import subprocess, sys
from longtrail.costs import lifeline
with lifeline() as stdin:
    subprocess.run([sys.executable, "-c", {CHILD!r}, sys.argv[1]], stdin=stdin, capture_output=True, check=False)
"""


def is_running(pid: int) -> bool:
    """A process that has ended and waits to be reaped does not run."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="asks /proc what runs")
@pytest.mark.parametrize("blow", [signal.SIGTERM, signal.SIGKILL])
def test_the_process_that_times_ends_with_the_one_that_asked(blow: signal.Signals, tmp_path: Path) -> None:
    told = tmp_path / "pid"
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(told)], cwd=ROOT)
    child, deadline = 0, time.monotonic() + 120
    try:
        while not child and time.monotonic() < deadline:
            time.sleep(0.05)
            child = int(told.read_text() or 0) if told.exists() else 0
        assert child and is_running(child)
        parent.send_signal(blow)
        assert parent.wait(60) == -blow
        deadline = time.monotonic() + 60
        while is_running(child) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not is_running(child)
    finally:
        parent.kill()
        if child and is_running(child):
            os.kill(child, signal.SIGKILL)
