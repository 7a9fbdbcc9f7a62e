"""The BentoML service: HTTP, threads and metrics around serving.engine. `artifacts/` stands beside the folder of this file in the Bento.

BentoML imports this file in its supervisor too, so nothing heavy is imported before the worker makes the service.
"""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Any, cast

import bentoml
from bentoml.exceptions import BentoMLException, ServiceUnavailable

from longtrail.config import ServingSettings, load_config
from longtrail.errors import LongtrailError
from serving.errors import RequestError
from serving.http import Gate, OwnFaultsOnly, docs_page
from serving.schemas import Answer, EventsAnswer, EventsRequest, RankRequest, RecommendRequest

ROOT = Path(__file__).resolve().parent.parent / "artifacts"
THREADS = 4  # requests in work at once: more only wait for the same cores
WAITING = 64  # requests taken before the next is answered 429

logger = logging.getLogger("bentoml.serve")


class BadRequest(BentoMLException):
    """A RequestError as BentoML knows it."""

    error_code = HTTPStatus.BAD_REQUEST


@bentoml.service(
    name="longtrail",
    workers=1,  # one process owns a state folder
    threads=THREADS,
    traffic={"timeout": 10, "max_concurrency": WAITING},
    logging={"access": {"enabled": False}},
    # Threads that wait for each other by spinning make a request ten times slower as soon as anything else wants the cores.
    envs=[{"name": "OMP_WAIT_POLICY", "value": "PASSIVE"}],
)
class Longtrail:
    """Recommends from each person's whole history.

    Ask /recommend for a list (or /rank for an order of your own candidates), show it, and send what people do to /events: it is in their history
    at once. Every answer is logged with the exact probability of each place, so that the log is the next training set and the next A/B test.
    """

    def __init__(self) -> None:
        from prometheus_client import Counter, Histogram  # not before the worker set PROMETHEUS_MULTIPROC_DIR

        self._answers = Counter("longtrail_answers_total", "Lists answered", ["endpoint", "arm", "fallback"])
        self._events = Counter("longtrail_events_total", "Events received", ["outcome"])
        buckets = (0.001, 0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.25, 1.0)
        self._stages = Histogram("longtrail_stage_seconds", "Time of each stage of a request", ["stage"], buckets=buckets)
        logging.getLogger("bentoml._internal.server.http_app").addFilter(OwnFaultsOnly())
        self._engine: Any = None
        try:
            self._engine = self._open()
        except LongtrailError as error:
            # Staying up without ever being ready says more than dying and being restarted over and over.
            logger.error("not ready, and will not be: %s", error)

    def _open(self) -> Any:
        """The engine, warm. Raises LongtrailError where the Bento's parts do not fit, its scores differ, or its state cannot be read."""
        import torch

        from features.online import OnlineFeatures
        from serving.artifacts import Artifacts
        from serving.engine import Engine
        from serving.state import State, StateSettings

        artifacts = Artifacts.open(ROOT)
        torch.set_num_threads(artifacts.settings.threads)
        settings = StateSettings.from_environment()
        state = State(settings, artifacts.manifest.lineage.features)
        engine = Engine(artifacts, state, OnlineFeatures(artifacts.snapshot, state=state.online), timer=self._stage)
        difference = engine.warm_up()
        logger.info("ready: arm %s, scores within %.1e of the offline ones, state in %s", artifacts.manifest.arm, difference, settings.folder)
        return engine

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self._stages.labels(name).observe(time.perf_counter() - start)

    def __is_ready__(self) -> bool:
        return self._engine is not None

    @bentoml.api(route="/recommend")
    def recommend(self, request: RecommendRequest, /) -> Answer:
        """The k best items for a user: retrieved from the whole catalogue less what they have seen (or from `candidates`), then ranked."""
        return self._answer("recommend", request)

    @bentoml.api(route="/rank")
    def rank(self, request: RankRequest, /) -> Answer:
        """The given candidates, in order for a user."""
        return self._answer("rank", request)

    @bentoml.api(route="/events")
    def events(self, request: EventsRequest, /) -> EventsAnswer:
        """Take what people did: on disk and in their histories when this answers. All or, where one is wrong, none."""
        answer = self._do("take_events", request)
        self._events.labels("accepted").inc(answer.accepted)
        self._events.labels("duplicate").inc(answer.duplicates)
        return answer

    def _answer(self, endpoint: str, request: Any) -> Any:
        answer = self._do(endpoint, request)
        self._answers.labels(endpoint, answer.arm, answer.fallback or "").inc()
        return answer

    def _do(self, method: str, request: Any) -> Any:
        if self._engine is None:
            raise ServiceUnavailable("not ready: see the service's log")
        try:
            return getattr(self._engine, method)(request)
        except RequestError as error:
            raise BadRequest(str(error)) from None


def _settings() -> ServingSettings:
    """The Bento's settings; the defaults outside a Bento, where the service can be imported and described but not made."""
    params = ROOT / "params.yaml"
    return load_config(params).serving if params.exists() else ServingSettings()


_service = cast(Any, Longtrail)  # what the decorator makes of the class
_service.add_asgi_middleware(Gate, max_body_bytes=_settings().max_body_bytes, paths=("/recommend", "/rank", "/events"))
_service.mount_asgi_app(docs_page(), path="/", name="api_docs")
