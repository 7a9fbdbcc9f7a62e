"""One engine, and one build of each image, for all files."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.images.building import COMMIT, build, copy
from tests.images.engine import FIGURES, Engine, UnavailableError, engine
from tests.images.wheels import served, settings


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Sizes and times, whatever passed or failed."""
    for line in FIGURES:
        terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def docker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    try:
        with engine(tmp_path_factory.mktemp("engine")) as found:
            yield found
    except UnavailableError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def pip(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """pip's variables for the builds."""
    with served(settings(), tmp_path_factory.mktemp("served")) as variables:
        yield variables


@pytest.fixture(scope="session")
def base(docker: Engine, pip: dict[str, str]) -> str:
    try:
        found = docker.base()
        docker.look(found, pip)
    except UnavailableError as error:
        pytest.skip(str(error))
    return found


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The context of the builds."""
    return copy(tmp_path_factory.mktemp("repository"))


@pytest.fixture(scope="session")
def repro(base: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator["Future[Path]"]:
    """What `dvc repro` writes on this machine from the same settings; it runs while images are built, which waits for disks and networks."""
    place = copy(tmp_path_factory.mktemp("dvc"))
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(_reproduce, place)


def _reproduce(place: Path) -> Path:
    started = time.monotonic()
    variables = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(place), "OMP_NUM_THREADS": "1"}
    for command in (["init", "--no-scm", "--force"], ["repro"]):
        done = subprocess.run(
            [sys.executable, "-m", "dvc", *command],
            cwd=place,
            env={**os.environ, **variables, "DVC_NO_ANALYTICS": "1", "LONGTRAIL_COMMIT": COMMIT},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-6000:]
    FIGURES.append(f"dvc repro: {time.monotonic() - started:.0f} s")
    return place / "build"


@pytest.fixture(scope="session")
def images(docker: Engine, place: Path, base: str, pip: dict[str, str], repro: "Future[Path]") -> dict[str, str]:
    return {target: build(docker, place, base, pip, target) for target in ("data", "train")}
