"""The BentoML service: HTTP, threads and metrics around serving.engine. `artifacts/` stands beside the folder of this file in the Bento.

BentoML imports this file in its supervisor too, so nothing heavy is imported before the worker makes the service.
"""

import logging
from http import HTTPStatus
from pathlib import Path
from typing import Any, cast

import bentoml
from bentoml.exceptions import BentoMLException, ServiceUnavailable

from longtrail.config import ServingSettings, load_config
from longtrail.errors import LongtrailError
from serving.errors import RequestError
from serving.http import Gate, OwnFaultsOnly, docs_page
from serving.logs import RequestLog, configure
from serving.metrics import metrics
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
        configure(_settings().logs)
        self._metrics = metrics()
        self._metrics.ready(False)
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
        state = State(settings, artifacts.manifest.lineage.features, artifacts.settings.answer_log)
        engine = Engine(artifacts, state, OnlineFeatures(artifacts.snapshot, state=state.online), timer=self._metrics.stage)
        difference = engine.warm_up()
        logger.info("ready: arm %s, scores within %.1e of the offline ones, state in %s", artifacts.manifest.arm, difference, settings.folder)
        lineage = artifacts.manifest.lineage
        self._metrics.serves(
            version=str(bentoml.server_context.bento_version or ""),
            arm=artifacts.manifest.arm,
            ranker=artifacts.manifest.ranker,
            retriever=artifacts.manifest.retriever,
            features=lineage.features[:12],
            code=(lineage.code or "")[:12],
        )
        self._metrics.ready(True)
        return engine

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
        self._metrics.events("accepted", answer.accepted)
        self._metrics.events("duplicate", answer.duplicates)
        return answer

    def _answer(self, endpoint: str, request: Any) -> Any:
        answer = self._do(endpoint, request)
        self._metrics.answered(endpoint, answer.arm, answer.fallback, answer=answer.request_id, items=len(answer.items))
        return answer

    def _do(self, method: str, request: Any) -> Any:
        self._metrics.taken()
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
_ENDPOINTS = {f"/{name}": name for name in ("recommend", "rank", "events")}
_service.add_asgi_middleware(
    RequestLog, endpoints=_ENDPOINTS, settings=_settings().logs, silent=frozenset({"/livez", "/readyz", "/healthz", "/metrics"})
)
_service.add_asgi_middleware(Gate, max_body_bytes=_settings().max_body_bytes, paths=("/recommend", "/rank", "/events"))
_service.mount_asgi_app(docs_page(), path="/", name="api_docs")
