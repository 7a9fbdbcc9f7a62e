"""The gate around an application that does as told, through ASGI: who is let in, what is refused, and how a refusal looks."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest

from longtrail.config import ServingSettings
from longtrail.errors import ConfigError
from serving.gate import Gate
from serving.life import Life
from serving.tokens import TOKENS, Tokens

READ, WRITE, WATCH = "read-token-0123456789", "write-token-0123456789", "watch-token-0123456789"
TEXT = f"reader read {READ}\nwriter events {WRITE}\nwatcher metrics {WATCH}"


class App:
    """Answers 200 after `seconds`; counts what it is asked."""

    def __init__(self, seconds: float = 0.0, answer: bytes = b'{"fine": true}', status: int = 200, error: Exception | None = None) -> None:
        self.seconds, self.answer, self.status, self.error, self.asked = seconds, answer, status, error, 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.asked += 1
        if scope["method"] == "POST":
            self.body = (await receive())["body"]
        await asyncio.sleep(self.seconds)
        if self.error:
            raise self.error
        await send({"type": "http.response.start", "status": self.status, "headers": [(b"content-type", b"application/json"), (b"server", b"x")]})
        await send({"type": "http.response.body", "body": self.answer})


class Answer:
    def __init__(self, messages: list[Any]) -> None:
        self.status = messages[0]["status"]
        self.headers = {name.decode(): value.decode() for name, value in messages[0]["headers"]}
        self.body = b"".join(message.get("body", b"") for message in messages[1:])

    @property
    def fields(self) -> list[str]:
        return [fault["field"] for fault in json.loads(self.body)["detail"]]


def gate(app: App, *, life: Life | None = None, tokens: str = "", max_body_bytes: int = 1000, **settings: Any) -> Gate:
    made = ServingSettings(max_body_bytes=max_body_bytes, store={"deadline_ms": 10}, gate=settings)
    return Gate(app, made, life or Life(ready=True), lambda: Tokens.from_environment({TOKENS: tokens}))


async def ask(
    tested: Gate, path: str = "/rank", *, method: str = "POST", headers: Any = (), parts: tuple[bytes, ...] = (b"{}",), pause: float = 0.0
) -> Answer:
    left, sent = list(parts), []

    async def receive() -> Any:
        await asyncio.sleep(pause)
        if not left:
            await asyncio.sleep(3600)
        part = left.pop(0)
        return {"type": "http.request", "body": part, "more_body": bool(left)}

    async def send(message: Any) -> None:
        sent.append(message)

    found = [(name.encode(), value.encode()) for name, value in dict(headers).items()]
    await tested({"type": "http", "method": method, "path": path, "headers": found, "client": ("10.0.0.1", 1)}, receive, send)
    return Answer(sent)


def run(scenario: Callable[[], Any]) -> Any:
    return asyncio.run(scenario())


def test_what_is_let_in_reaches_the_application_whole_and_its_answer_is_made_safe() -> None:
    app = App()
    answer = run(lambda: ask(gate(app), parts=(b'{"a"', b": 1}")))
    assert (answer.status, answer.body, app.body) == (200, b'{"fine": true}', b'{"a": 1}')
    assert answer.headers == {"content-type": "application/json", "x-content-type-options": "nosniff", "cache-control": "no-store"}


@pytest.mark.parametrize(
    ("path", "token", "status"),
    [
        ("/rank", None, 401),
        ("/rank", "not-a-token-of-this-one", 401),
        ("/rank", READ, 200),
        ("/recommend", WRITE, 403),
        ("/demo/api/explain", WRITE, 403),
        ("/demo/api/explain", READ, 200),
        ("/events", READ, 403),
        ("/events", WRITE, 200),
        ("/metrics", READ, 403),
        ("/metrics", WATCH, 200),
        ("/metrics", None, 401),
        ("/docs.json", None, 200),
        ("/demo/", None, 200),
        ("/livez", None, 200),
        ("/readyz", None, 200),
    ],
)
def test_rights(path: str, token: str | None, status: int) -> None:
    app = App()
    headers = {"authorization": f"Bearer {token}"} if token else {}
    answer = run(lambda: ask(gate(app, tokens=TEXT), path, headers=headers, method="GET" if path in ("/metrics", "/docs.json") else "POST"))
    assert answer.status == status
    if status in (401, 403):
        assert answer.fields == ["Authorization"] and app.asked == 0
        assert answer.headers.get("www-authenticate") == ("Bearer" if status == 401 else None)
        assert not any(secret.encode() in answer.body for secret in (READ, WRITE, WATCH, "not-a-token"))


def test_tokens_that_are_not_understood_let_nobody_in() -> None:
    def broken() -> Tokens:
        raise ConfigError("LONGTRAIL_TOKENS: line 1: 2 words; expected NAME RIGHTS TOKEN")

    life, app = Life(ready=True), App()
    tested = Gate(app, ServingSettings(), life, broken)
    assert [run(lambda path=path: ask(tested, path)).status for path in ("/rank", "/metrics", "/readyz", "/livez")] == [503, 503, 503, 200]
    assert app.asked == 0 and "line 1" in str(life.fault)


def test_a_client_too_fast_is_told_when_to_come_again() -> None:
    async def scenario() -> list[Answer]:
        tested = gate(App(), rate_per_second=0.5, burst=2, tokens=TEXT)
        asks = [ask(tested, headers={"authorization": f"Bearer {READ}"}) for _ in range(3)]
        return [await each for each in [*asks, ask(tested, "/events", headers={"authorization": f"Bearer {WRITE}"}), ask(tested, "/livez")]]

    answers = run(scenario)
    assert [answer.status for answer in answers] == [200, 200, 429, 200, 200], "each token has a rate of its own, probes have none"
    assert answers[2].headers["retry-after"] == "2" and answers[2].fields == ["rate"]


def test_overload_is_refused_before_it_waits_and_events_have_a_lane_of_their_own() -> None:
    async def scenario() -> tuple[list[Answer], Answer]:
        tested = gate(App(seconds=0.3), lists=2, waiting=3, max_wait_ms=50)
        many = [asyncio.ensure_future(ask(tested)) for _ in range(10)]
        await asyncio.sleep(0.01)
        return await asyncio.gather(*many), await ask(tested, "/events")

    answers, event = run(scenario)
    assert sorted(answer.status for answer in answers) == [200] * 2 + [503] * 8 and event.status == 200
    assert all(answer.headers["retry-after"] == "1" and answer.fields == ["service"] for answer in answers if answer.status == 503)


def test_work_that_takes_too_long_is_given_up_and_holds_its_slot_until_it_ends() -> None:
    async def scenario() -> list[int]:
        tested = gate(App(seconds=0.2), lists=1, answer_seconds=0.05, max_wait_ms=10)
        statuses = [(await ask(tested)).status, (await ask(tested)).status]
        tested._app.seconds = 0.0  # type: ignore[attr-defined]
        await asyncio.sleep(0.25)
        return [*statuses, (await ask(tested)).status]

    assert run(scenario) == [503, 503, 200]


@pytest.mark.parametrize(
    ("asked", "status", "field"),
    [
        ({"headers": {"content-length": "1001"}}, 413, "body"),
        ({"parts": (b"x" * 600, b"x" * 600)}, 413, "body"),
        ({"headers": {"content-type": "text/plain"}}, 415, "Content-Type"),
        ({"headers": {"x": "y" * 300}}, 431, "headers"),
        ({"headers": {f"x{number}": "" for number in range(9)}}, 431, "headers"),
        ({"path": "/nothing", "headers": {"x": "y" * 300}}, 431, "headers"),
        ({"parts": (b"{", b"}"), "pause": 0.3}, 408, "body"),
    ],
)
def test_limits_of_a_request(asked: dict[str, Any], status: int, field: str) -> None:
    app = App()
    answer = run(lambda: ask(gate(app, max_headers=8, max_header_bytes=200, body_seconds=0.1), **asked))
    assert (answer.status, answer.fields, app.asked) == (status, [field], 0)


@pytest.mark.parametrize(
    ("app", "error"),
    [
        (App(status=404, answer=b"Not Found"), "path: not found"),
        (App(status=405, answer=b"Method Not Allowed"), "method: not allowed for this path"),
        (App(status=500, answer=b"Traceback (most recent call last): secret"), "service: failed; its log says why"),
        (App(status=500, answer=b'{"error": "An unexpected error has occurred"}'), "service: failed; its log says why"),
        (App(status=400, answer=b'[{"error": "k: 9 items"}]'), "k: 9 items"),
        (App(status=404, answer=b'{"error": "demo: off", "detail": [{"field": "demo", "message": "off"}]}'), "demo: off"),
        (App(error=RuntimeError("secret")), "service: failed; its log says why"),
    ],
)
def test_every_refusal_has_one_shape_and_no_secret(app: App, error: str) -> None:
    answer = run(lambda: ask(gate(app), "/rank"))
    assert json.loads(answer.body)["error"] == error and answer.headers["content-type"] == "application/json"
    assert b"secret" not in answer.body and "server" not in answer.headers


def test_not_ready_and_stopping() -> None:
    life, app = Life(), App()
    tested = gate(app, life=life)

    def statuses() -> list[int]:
        return [run(lambda path=path: ask(tested, path, method="GET")).status for path in ("/livez", "/readyz")] + [run(lambda: ask(tested)).status]

    assert statuses() == [200, 503, 503]
    life.ready = True
    assert statuses() == [200, 200, 200]
    life.stopping = True
    assert statuses() == [200, 503, 200], "who still comes is served"
    assert run(lambda: ask(tested)).headers["connection"] == "close"
    life.fault = "ranker/model.safetensors: SHA-256 is …"
    answer = run(lambda: ask(gate(app, life=Life(fault=life.fault)), "/readyz", method="GET"))
    assert answer.status == 503 and "SHA-256" in json.loads(answer.body)["error"]


def test_events_wait_while_the_state_folder_changes_hands() -> None:
    async def scenario() -> tuple[int, int, int]:
        life, app = Life(ready=True), App()
        tested = gate(app, life=life)
        life.handed_over = True
        event = asyncio.ensure_future(ask(tested, "/events"))
        listed = await ask(tested)
        await asyncio.sleep(0.05)
        before = app.asked
        life.handed_over = False
        life.settle()
        return listed.status, before, (await event).status

    assert run(scenario) == (200, 1, 200)
