"""One Bento and one running service for all tests of a worker."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
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


@contextmanager
def started(packaged: Outputs, state: Path) -> Iterator[Running]:
    """A service of its own, for tests that need to know all that was ever sent to it."""
    moment = time.time()
    with server(packaged.bento, state) as (client, process):
        yield Running(client, process, moment, state, packaged)


@pytest.fixture(scope="session")
def running(packaged: Outputs, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A service that many files share, in any order: what others sent before may stand in its log and in any user's history."""
    with started(packaged, tmp_path_factory.mktemp("serving") / "state") as shared:
        yield shared
