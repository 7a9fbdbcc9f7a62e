"""What the process that serves takes out of BentoML's application, and that nothing of an answered request stays."""

import asyncio
import gc
import weakref
from contextvars import Context, ContextVar, copy_context
from typing import Any

import bentoml
import httpx
from bentoml._internal.server.http.instruments import RunnerTrafficMetricsMiddleware
from bentoml._internal.server.http.traffic import TimeoutMiddleware
from opentelemetry.instrumentation.asgi import OpenTelemetryMiddleware
from starlette.applications import Starlette

from serving.worker import without_leftovers
from tests.serving.conftest import Running

mark: ContextVar[object] = ContextVar("mark")


class Request:
    """Stands for all that belongs to a request."""


def application() -> Starlette:
    @bentoml.service(name="remembering", traffic={"timeout": 60})
    class Remembering:
        @bentoml.api
        def same(self, number: int) -> int:
            return number

    service: Any = Remembering
    return service.to_asgi(is_main=True)


def asked(app: Starlette, times: int) -> list["weakref.ref[Request]"]:
    """References to what belonged to `times` answered requests, taken while the event loop still runs."""

    def marked() -> tuple[Context, "weakref.ref[Request]"]:
        context, request = copy_context(), Request()
        context.run(mark.set, request)
        return context, weakref.ref(request)

    async def all_of_them() -> list["weakref.ref[Request]"]:
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://here") as client,
        ):
            references = []
            for number in range(times):
                context, reference = marked()
                answer = await asyncio.create_task(client.post("/same", json={"number": number}), context=context)
                assert answer.json() == number
                references.append(reference)
                del context, answer
            await asyncio.sleep(0)
            gc.collect()
            return [weakref.ref(alive) for reference in references if (alive := reference()) is not None]

    return asyncio.run(all_of_them())


def test_an_answered_request_leaves_memory() -> None:
    kept = application()
    lean = without_leftovers(application())
    assert {TimeoutMiddleware, RunnerTrafficMetricsMiddleware, OpenTelemetryMiddleware} & {one.cls for one in lean.user_middleware} == set()
    kept.user_middleware = [one for one in kept.user_middleware if one.cls is not RunnerTrafficMetricsMiddleware]  # registered once in a process
    assert len(asked(kept, 20)) > 10, "BentoML's timer keeps them: otherwise this test proves nothing"
    assert len(asked(lean, 20)) <= 1


def test_made_up_paths_make_no_series(running: Running) -> None:
    def series() -> int:
        return sum(not line.startswith("#") for line in running.client.get("/metrics").text.splitlines())

    running.client.get("/nothing/here")
    before = series()
    for number in range(50):
        assert running.client.get(f"/nothing/{number}").status_code == 404
    assert series() <= before + 5
