"""The demo's own routes over answers made by hand: hostile titles, thousands of events, faults in any order. No model, no Bento."""

import base64
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from serving.demo.app import Demo
from serving.demo.schemas import ExplainRequest
from serving.http import refusal
from tests.serving.bento import free_port

HOSTILE = '<img src=x onerror="window.harmed=1"><script>window.harmed=1</script>\'\u202e'
EVENTS = 4_000
ITEMS = 30


@dataclass
class Canned:
    """Stands for Explainer and People. `events` of a pick are counted into the history; `faults`: status codes that the next requests get."""

    url: str = ""
    picked: list[dict[str, Any]] = field(default_factory=list)
    faults: list[int] = field(default_factory=list)
    token: str | None = None
    told: list[str] = field(default_factory=list)  # Authorization headers

    def arms(self) -> list[dict[str, Any]]:
        return [{"name": name, "model": name, "kind": "attention"} for name in (f"one{HOSTILE}", "two")]

    def suggestions(self) -> list[dict[str, Any]]:
        return [{"user_id": f"user{HOSTILE}", "events": EVENTS, "why": "longest"}]

    def starting_with(self, text: str) -> list[dict[str, Any]]:
        return [{"user_id": f"{text}{HOSTILE}", "events": 3}]

    def explain(self, request: ExplainRequest) -> dict[str, Any]:
        length = EVENTS + len(self.picked)
        items = [[f"key{number}{HOSTILE}", None if number % 2 else f"{number} {HOSTILE}"] for number in range(ITEMS)]
        weights = bytes((place * 7) % 128 for place in range(length))
        told = {"largest": 0.5, "mean": 0.2, "strongest": [[17, 0.5], [EVENTS // 2, 0.4]], "bytes": base64.b64encode(weights).decode()}
        turned = list(range(request.k))[:: -1 if self.picked else 1]
        one = {"model": "one", "fallback": None, "personal": True, "candidates": 200, "milliseconds": 3.0, "kind": "attention", "reads": length}
        places, scores = list(range(1, request.k + 1)), [0.9 - place / 50 for place in range(request.k)]
        passes = [[told] * request.k]
        return {
            "user_id": request.user_id,
            "known": True,
            "unavailable": None,
            "total": length + 1_000,
            "history": {
                "items": [place % ITEMS for place in range(length)],
                "actions": [1 + place % 2 for place in range(length)],
                "times": [1_500_000_000 + place * 40_000 for place in range(length)],
            },
            "explained": list(range(request.k)),
            "arms": [{**one, "name": name, "list": turned, "places": places, "scores": scores, "passes": passes} for name in request.arms],
            "items": items,
        }

    async def take(self, request: Request) -> JSONResponse:
        events = (await request.json())["events"]
        known = {event["event_id"] for event in self.picked}
        self.picked += [event for event in events if event["event_id"] not in known]
        return JSONResponse({"accepted": 1, "duplicates": 0, "rejected": 0, "rejections": []})


class _Faults:
    """Middleware that refuses as Canned says."""

    def __init__(self, app: ASGIApp, canned: Canned) -> None:
        self._app, self._canned = app, canned

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].startswith(("/demo/api/", "/events")):
            given = dict(scope["headers"]).get(b"authorization", b"").decode()
            self._canned.told.append(given)
            if self._canned.token and given != f"Bearer {self._canned.token}":
                return await refusal(401, [("Authorization", "expected a token")])(scope, receive, send)
            if self._canned.faults:
                status = self._canned.faults.pop(0)
                return await refusal(status, [("service", "as asked")], {"Retry-After": "1"} if status == 503 else {})(scope, receive, send)
        await self._app(scope, receive, send)


@contextmanager
def canned() -> Iterator[Canned]:
    answers, demo = Canned(), Demo(enabled=True)
    demo.open(answers, answers, (f"look{HOSTILE}", "buy"))  # type: ignore[arg-type]
    app = demo.app()
    app.router.routes.append(Route("/events", answers.take, methods=["POST"]))
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(_Faults(app, answers), host="127.0.0.1", port=port, log_level="warning", lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    answers.url = f"http://127.0.0.1:{port}/demo"
    try:
        yield answers
    finally:
        server.should_exit = True
        thread.join(20)
