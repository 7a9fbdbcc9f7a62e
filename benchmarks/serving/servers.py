"""The servers that are measured, each started by itself, on the machine of the client."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path

from benchmarks.serving.bentos import Bento

ROOT = Path(__file__).resolve().parents[2]
FLOOR = """
import bentoml
from longtrail.config import ServingSettings
from serving.gate import Gate
from serving.life import Life
from serving.schemas import Answer, RankRequest

ANSWER = Answer.model_validate_json({answer!r})

@bentoml.service(name="floor", workers=1, threads=4, traffic={{"timeout": 10}}, logging={{"access": {{"enabled": False}}}})
class Floor:
    @bentoml.api(route="/rank")
    def rank(self, request: RankRequest, /) -> Answer:
        return ANSWER

Floor.add_asgi_middleware(Gate, settings=ServingSettings(), life=Life(ready=True))
"""


@contextmanager
def packaged(bento: Bento, port: int) -> Iterator[None]:
    """The Bento, as `make serve` starts it."""
    command = [sys.executable, "-m", "serving.run", "--bento", str(bento.folder), "--port", str(port), "--state", str(bento.state)]
    with started(command, ROOT, port, bento.state.with_suffix(".log")):
        yield


@contextmanager
def floor(bento: Bento, port: int, answer: bytes) -> Iterator[None]:
    """A BentoML service behind the same gate, with the same request and `answer`, made in advance: what HTTP, JSON and validation cost."""
    folder = bento.state.parent / "floor"
    folder.mkdir(exist_ok=True)
    (folder / "floor.py").write_text(FLOOR.format(answer=answer.decode()))
    command = [sys.executable, "-m", "bentoml", "serve", "floor:Floor", "--host", "127.0.0.1", "--port", str(port)]
    with started(command, folder, port, folder / "floor.log", PYTHONPATH=str(ROOT)):
        yield


@contextmanager
def bare(bento: Bento, port: int, model: str) -> Iterator[None]:
    """benchmarks.serving.bare under uvicorn."""
    application = ["--factory", "benchmarks.serving.bare:application", "--host", "127.0.0.1", "--port", str(port), "--no-access-log"]
    asked = f"{bento.folder}:{bento.state}:{model}"
    with started([sys.executable, "-m", "uvicorn", *application], ROOT, port, bento.state.with_suffix(".bare.log"), LONGTRAIL_BARE=asked):
        yield


@contextmanager
def started(command: list[str], folder: Path, port: int, log: Path, **more: str) -> Iterator[None]:
    """A server that answers /readyz; ended with all that it started. Raises SystemExit with the end of its log where it does not come up."""
    environment = {**os.environ, "BENTOML_DO_NOT_TRACK": "True", "PYTHONWARNINGS": "ignore", "OMP_WAIT_POLICY": "PASSIVE", **more}
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        end = time.monotonic() + 180
        while not _ready(port):
            if process.poll() is not None or time.monotonic() > end:
                raise SystemExit(f"the service did not become ready:\n{log.read_text()[-4000:]}")
            time.sleep(0.3)
        yield
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)


def _ready(port: int) -> bool:
    connection = HTTPConnection("127.0.0.1", port, timeout=2)
    try:
        connection.request("GET", "/readyz")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def stages(port: int) -> dict[str, float]:
    """Mean milliseconds of each stage inside the service, by its own histogram."""
    connection = HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request("GET", "/metrics")
    found: dict[str, dict[str, float]] = {}
    for line in connection.getresponse().read().decode().splitlines():
        for kind in ("sum", "count"):
            if line.startswith(f"longtrail_stage_seconds_{kind}"):
                found.setdefault(line.split('stage="')[1].split('"')[0], {})[kind] = float(line.split()[-1])
    return {stage: 1000 * values["sum"] / values["count"] for stage, values in found.items() if values.get("count")}
