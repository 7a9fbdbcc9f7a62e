"""A features folder that the real step built from the toy log, and a real Redis: made once a worker, for Feast takes seconds to import."""

import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.features.helpers import ONLINE_LENGTH, build


@pytest.fixture(scope="session")
def redis_address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    server = shutil.which("redis-server")
    if server is None:
        pytest.skip("redis-server is not installed (apt-get install redis-server): the online store on Redis is not tested")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tmp_path_factory.mktemp("redis")
    arguments = [server, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--dir", str(folder)]
    with subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            _wait_for(port, process)
            yield f"127.0.0.1:{port}"
        finally:
            process.terminate()


def _wait_for(port: int, process: subprocess.Popen) -> None:
    for _ in range(200):
        assert process.poll() is None, "redis-server ended at once"
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.05)
    raise AssertionError("redis-server does not answer")


@pytest.fixture(scope="session")
def sqlite_features(toy_tables_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """build_features of the toy log, SQLite. Read only."""
    return build(toy_tables_folder, tmp_path_factory.mktemp("sqlite"), online_history_length=ONLINE_LENGTH)


@pytest.fixture(scope="session")
def redis_features(toy_tables_folder: Path, redis_address: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """build_features of the toy log, Redis."""
    return build(
        toy_tables_folder,
        tmp_path_factory.mktemp("on_redis"),
        online_history_length=ONLINE_LENGTH,
        online_store="redis",
        redis_address=redis_address,
    )


@pytest.fixture(params=["sqlite", "redis"])
def built(request: pytest.FixtureRequest) -> Path:
    """A features folder, once with each online store."""
    return request.getfixturevalue(f"{request.param}_features")
