"""The BentoML service: HTTP, threads and metrics around serving.engine. `artifacts/` stands beside the folder of this file in the Bento.

BentoML imports this file in its supervisor too, so nothing heavy is imported before the worker makes the service.
"""

import functools
import logging
import os
from http import HTTPStatus
from pathlib import Path
from typing import Any, cast

import bentoml
from bentoml.exceptions import BentoMLException, ServiceUnavailable

from longtrail.commits import short_commit
from longtrail.config import ServingSettings, load_config
from longtrail.errors import LongtrailError
from serving.control import Control
from serving.demo.app import Demo
from serving.demo.switch import shown
from serving.errors import NotNow, RequestError
from serving.gate import Gate
from serving.guard import Guarded, StoreGuard
from serving.http import OwnFaultsOnly, refusal
from serving.life import LIFE
from serving.logs import RequestLog, configure
from serving.metrics import metrics
from serving.pages import docs_page
from serving.schemas import Answer, EventsAnswer, EventsRequest, RankRequest, RecommendRequest
from serving.tokens import configured

ROOT = Path(__file__).resolve().parent.parent / "artifacts"

logger = logging.getLogger("bentoml.serve")


class BadRequest(BentoMLException):
    """A RequestError as BentoML knows it."""

    error_code = HTTPStatus.BAD_REQUEST


@functools.cache
def settings() -> ServingSettings:
    """The Bento's settings; the defaults outside a Bento, where the service can be imported and described but not made."""
    params = ROOT / "params.yaml"
    return load_config(params).serving if params.exists() else ServingSettings()


def give_up() -> float:
    """Seconds after which BentoML drops a request: later than the gate does. No longer than it must be: under `bentoml serve` BentoML's timer keeps
    every request in memory that long, answered or not (serving.worker does without)."""
    return 30 + settings().gate.body_seconds + settings().gate.answer_seconds


@bentoml.service(
    name="longtrail",
    workers=1,  # one process owns a state folder
    threads=settings().gate.lists + settings().gate.events,  # whoever the gate lets in finds a thread
    traffic={"timeout": give_up()},  # serving.gate bounds how many and how long: its refusals are counted, shaped, and say when to come again
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
        configure(settings().logs)
        self._metrics = metrics()
        self._metrics.ready(False)
        logging.getLogger("bentoml._internal.server.http_app").addFilter(OwnFaultsOnly())
        self._engine: Any = None
        try:
            loaded = self._load()
            Control.of_process().await_turn()  # in a swap: until the old process has given up the state folder
            self._engine = self._open(loaded)
        except LongtrailError as error:
            # Staying up without ever being ready says more than dying and being restarted over and over.
            logger.error("not ready, and will not be: %s", error)
            LIFE.fault = str(error)
            return
        LIFE.release, LIFE.close = self._release, self._close
        LIFE.reclaim = lambda: self._reclaim(loaded)
        LIFE.ready = True

    def _load(self) -> Any:
        """All that needs no state folder. Raises LongtrailError where a file is not the one packaged, or the Bento's parts do not fit."""
        import torch

        import features.online  # noqa: F401  (imports take seconds: not while the state folder changes hands)
        import serving.engine  # noqa: F401
        from features.repository import open_repository
        from serving.arms import load_arms
        from serving.artifacts import Artifacts
        from serving.parity import ELSEWHERE, check_parity

        artifacts = Artifacts.open(ROOT)
        torch.set_num_threads(artifacts.settings.threads)
        arms, files = load_arms(artifacts), artifacts.parity_files()
        for arm in arms.all:  # what scores otherwise than offline is found before the old process gives anything up
            check_parity(arm.scorer, files[arm.model], ELSEWHERE)
        open_repository(artifacts.snapshot)  # imports Feast, too
        return artifacts, arms

    def _open(self, loaded: Any) -> Any:
        """The engine, warm. Raises LongtrailError where its scores differ from the offline ones, or its state cannot be read."""
        from features.online import OnlineFeatures
        from serving.engine import Engine
        from serving.state import State, StateSettings
        from serving.watch import watch

        artifacts, arms = loaded
        settings = StateSettings.from_environment()
        self._state = state = State(settings, artifacts.manifest.lineage.features, artifacts.settings.answer_log, artifacts.settings.event_log)
        count = self._metrics
        guard = StoreGuard(artifacts.settings.store, on_read=count.store_read, on_state=count.breaker)
        online = Guarded(OnlineFeatures(artifacts.snapshot, state=state.online), guard)
        engine = Engine(artifacts, state, online, timer=self._metrics.stage, arms=arms, observer=self._metrics)
        for states in engine.states:
            states.note = functools.partial(self._metrics.changed, "user_state")
        difference = engine.warm_up()
        logger.info("ready: arm %s, scores within %.1e of the offline ones, state in %s", artifacts.manifest.arm, difference, settings.folder)
        lineage = artifacts.manifest.lineage
        self._metrics.serves(
            version=str(bentoml.server_context.bento_version or ""),
            arm=artifacts.manifest.arm,
            ranker=artifacts.manifest.ranker,
            retriever=artifacts.manifest.retriever,
            features=lineage.features[:12],
            code=short_commit(lineage.code or ""),
        )
        self._metrics.ready(True)
        self._show(engine, artifacts, online)
        self._watch = watch(engine, artifacts, self._metrics)
        return engine

    def _show(self, engine: Any, artifacts: Any, online: Any) -> None:
        """Let the demo page look at what is served."""
        from serving.demo.people import People
        from serving.explain import Explainer

        parts = {"users": engine.users, "online": online, "popular": engine.popular, "catalogue": artifacts.catalogue}
        explainer = Explainer(arms=engine.arms, retrieve=artifacts.settings.retrieve, **parts)
        _demo.open(explainer, People(artifacts.folder / "users.parquet"), artifacts.manifest.actions)

    def _release(self) -> None:
        """Give up the state folder; lists are still answered, and logged."""
        self._watch.stop()
        self._metrics.retire()
        self._engine.release()
        self._state.release()

    def _close(self) -> None:
        self._release()
        self._engine.close()

    def _reclaim(self, loaded: Any) -> None:
        """Take the state folder back: the process that was to have it failed."""
        released, self._engine = self._engine, self._open(loaded)
        released.close()

    def __is_ready__(self) -> bool:
        return self._engine is not None

    @bentoml.api(route="/recommend")
    def recommend(self, request: RecommendRequest, /) -> Answer:
        """The k best items for a user: retrieved from the catalogue (less what they have seen, if so set) or `candidates`, then ranked."""
        return self._answer("recommend", request)

    @bentoml.api(route="/rank")
    def rank(self, request: RankRequest, /) -> Answer:
        """The given candidates, in order for a user."""
        return self._answer("rank", request)

    @bentoml.api(route="/events")
    async def events(self, request: EventsRequest, /) -> EventsAnswer:
        """Take what people did, row by row: what is accepted is on disk when this answers, and in the histories unless `pending` says otherwise."""
        self._metrics.taken()
        if self._engine is None:
            raise ServiceUnavailable("not ready: see the service's log")
        try:
            answer: EventsAnswer = await self._engine.intake.take_soon(request)  # waits for a disk, not for a core: no thread is held
        except RequestError as error:
            raise BadRequest(str(error)) from None
        except NotNow as error:
            return _not_now(error)
        for outcome, count in (("accepted", answer.accepted), ("duplicate", answer.duplicates), ("rejected", answer.rejected)):
            self._metrics.events(outcome, count)
        return answer

    def _answer(self, endpoint: str, request: Any) -> Any:
        answer = self._do(endpoint, request)
        if isinstance(answer, Answer):
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
        except NotNow as error:
            return _not_now(error)


def _not_now(error: NotNow) -> Any:
    """As a response: BentoML would hide what it says."""
    metrics().refused("disk_full" if error.status == HTTPStatus.INSUFFICIENT_STORAGE else "not_now")
    return refusal(error.status, [(error.field, error.message)], {"Retry-After": str(error.retry_after)})


_demo = Demo(enabled=shown(settings().demo, os.environ, tokens=configured()))
_service = cast(Any, Longtrail)  # what the decorator makes of the class
_ENDPOINTS = {f"/{name}": name for name in ("recommend", "rank", "events", "demo/api/explain")}
_service.add_asgi_middleware(
    RequestLog, endpoints=_ENDPOINTS, settings=settings().logs, silent=frozenset({"/livez", "/readyz", "/healthz", "/metrics"})
)
_service.add_asgi_middleware(Gate, settings=settings(), life=LIFE)
_service.mount_asgi_app(_demo.app(), path="/", name="demo")
_service.mount_asgi_app(docs_page(lambda: _service.openapi_spec.asdict()), path="/", name="api_docs")
