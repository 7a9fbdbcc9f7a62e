"""One Bento and one running service for all tests of a worker."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tests.features.conftest import redis_address as redis_address
from tests.serving.bento import Outputs, outputs, server


@dataclass(frozen=True)
class Running:
    client: httpx.Client
    process: int
    started: float  # seconds since 1970
    state: Path
    made: Outputs


@pytest.fixture(scope="session")
def packaged() -> Outputs:
    return outputs()


@pytest.fixture(scope="session")
def running(packaged: Outputs, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    state = tmp_path_factory.mktemp("serving") / "state"
    started = time.time()
    with server(packaged.bento, state) as (client, process):
        yield Running(client, process, started, state, packaged)
