"""What stands between the network and BentoML: who may, how often, how much, how many at once; and one shape for every refusal."""

import asyncio
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from longtrail.config import ServingSettings
from longtrail.errors import ConfigError
from serving.admission import Lane, RateLimit
from serving.http import Reshaper, refusal
from serving.life import Life
from serving.relay import Relay
from serving.tokens import Tokens
from serving.trace import current

logger = logging.getLogger("longtrail.gate")

PROBES = frozenset({"/livez", "/readyz", "/healthz"})
RETRY = 1  # seconds after which a busy service is worth another try; our choice
HANDOVER = 30.0  # seconds an event waits while the state folder changes hands; our choice
_DEMO = 4  # requests of the demo page in work, and as many waiting; our choice
_BODIES = 256  # bodies being read at once; our choice: with 1 MiB each, 256 MiB at worst


@dataclass(frozen=True, kw_only=True)
class Route:
    """What a path needs. `lane` None: nothing is bounded and no body is read (pages, metrics)."""

    right: str | None = None
    lane: Literal["lists", "events", "demo"] | None = None


ROUTES: Mapping[str, Route] = {
    "/recommend": Route(right="read", lane="lists"),
    "/rank": Route(right="read", lane="lists"),
    "/events": Route(right="events", lane="events"),
    "/metrics": Route(right="metrics"),
}
PREFIXES: Mapping[str, Route] = {"/demo/api/": Route(right="read", lane="demo")}


class Refused(Exception):  # noqa: N818  (an answer, not an error)
    """Answer the request with this and be done."""

    def __init__(self, status: int, field: str, message: str, *, reason: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.field, self.message, self.reason, self.headers = status, field, message, reason, dict(headers or {})


@dataclass
class _Answer:
    """An answer on its way: whether it began, and whether the request was given up meanwhile, so that what comes late goes nowhere."""

    send: Send
    begun: bool = False
    given_up: bool = False

    async def __call__(self, message: Message) -> None:
        if not self.given_up:
            self.begun = True
            await self.send(message)


class Gate:
    """ASGI middleware around everything but the request log."""

    def __init__(self, app: ASGIApp, settings: ServingSettings, life: Life, tokens: Callable[[], Tokens] = Tokens.from_environment) -> None:
        gate = settings.gate
        self._app, self._life, self._gate, self._max_body = app, life, gate, settings.max_body_bytes
        wait = gate.max_wait_ms / 1000
        self._lanes = {
            "lists": Lane(slots=gate.lists, waiting=gate.waiting, max_wait=wait),
            "events": Lane(slots=gate.events, waiting=gate.waiting, max_wait=wait),
            "demo": Lane(slots=_DEMO, waiting=_DEMO, max_wait=wait),
        }
        life.events_working = lambda: self._lanes["events"].working
        self._rate = RateLimit(per_second=gate.rate_per_second, burst=gate.burst) if gate.rate_per_second else None
        self._bodies = 0
        self._relay: Relay | None = None
        self._tokens: Tokens | None = None
        try:
            self._tokens = tokens()
        except ConfigError as error:
            life.fault = str(error)
            logger.error("not ready, and will not be: %s", error)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        send = Reshaper(send, closing=lambda: self._life.closing)
        try:
            if scope["path"] in PROBES:
                await self._probe(scope, receive, send)
            else:
                await self._admit(scope, receive, send)
        except Refused as refused:
            if trace := current():
                trace.reason = refused.reason
            await refusal(refused.status, [(refused.field, refused.message)], refused.headers)(scope, receive, send)
        except Exception:
            if send.begun:
                raise
            logger.exception("a request failed")
            await refusal(500, [("service", "failed; its log says why")])(scope, receive, send)

    # ------------------------------------------------------------ one after another

    async def _probe(self, scope: Scope, receive: Receive, send: Send) -> None:
        life = self._life
        if scope["path"] != "/readyz" or (life.ready and not life.stopping and life.fault is None):
            await PlainTextResponse("\n")(scope, receive, send)
            return
        says = "stopping" if life.stopping else f"not ready, and will not be: {life.fault}" if life.fault else "not ready yet"
        raise Refused(503, "service", says, reason="not_ready")

    async def _admit(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = self._headers(scope)
        route = self._route(scope["path"])
        client = self._client(scope, headers, route.right)
        self._limit(client)
        if route.lane is None or scope["method"] not in ("POST", "GET"):
            await self._app(scope, receive, send)
            return
        if not self._life.ready:
            raise Refused(503, "service", self._life.fault or "not ready yet", reason="not_ready", headers={"Retry-After": str(RETRY)})
        body = b""
        if scope["method"] == "POST":
            self._media_type(headers)
            body = await self._body(receive, headers)
        elif scope["path"] in ROUTES:  # which BentoML answers with 405
            await self._app(scope, receive, send)
            return
        await self._work(route.lane, scope, body, receive, send)

    def _headers(self, scope: Scope) -> dict[bytes, bytes]:
        found = scope["headers"]
        size = sum(len(name) + len(value) for name, value in found) + len(scope.get("query_string", b"")) + len(scope.get("raw_path") or b"")
        if len(found) > self._gate.max_headers or size > self._gate.max_header_bytes:
            limit = f"at most {self._gate.max_headers} lines and {self._gate.max_header_bytes} bytes"
            raise Refused(431, "headers", f"{len(found)} lines, {size} bytes; expected {limit} (serving.gate)", reason="headers")
        return {name.lower(): value for name, value in found}

    def _route(self, path: str) -> Route:
        route = ROUTES.get(path)
        return route or next((route for prefix, route in PREFIXES.items() if path.startswith(prefix)), Route())

    def _client(self, scope: Scope, headers: Mapping[bytes, bytes], right: str | None) -> str:
        """Under which name the request counts. Raises Refused where a token is needed and missing, or lacks the right."""
        address = f"address {(scope.get('client') or ('unknown',))[0]}"
        if self._tokens is None:
            raise Refused(503, "service", f"not ready, and will not be: {self._life.fault}", reason="not_ready")
        if not self._tokens or right is None:
            return address
        client = self._tokens.client(headers.get(b"authorization", b""))
        if client is None:
            self._limit(address)  # nobody guesses faster than others ask
            says = "expected Authorization: Bearer TOKEN, with a token of this service"
            raise Refused(401, "Authorization", says, reason="token", headers={"WWW-Authenticate": "Bearer"})
        if right not in client.rights:
            raise Refused(403, "Authorization", f"the token of {client.name!r} has no right {right!r}", reason="right")
        return f"token {client.name}"

    def _limit(self, client: str) -> None:
        if self._rate and (wait := self._rate.wait(client)):
            after = {"Retry-After": str(math.ceil(wait))}
            says = f"more than {self._gate.rate_per_second:g} requests a second (serving.gate.rate_per_second)"
            raise Refused(429, "rate", says, reason="rate_limit", headers=after)

    def _media_type(self, headers: Mapping[bytes, bytes]) -> None:
        media_type = headers.get(b"content-type", b"application/json").split(b";")[0].strip().lower()
        if media_type != b"application/json":
            raise Refused(415, "Content-Type", f"{media_type.decode('latin-1')}; expected application/json", reason="media_type")

    async def _body(self, receive: Receive, headers: Mapping[bytes, bytes]) -> bytes:
        """The whole body. Raises Refused as soon as it is, or is declared to be, too large, and where it does not come."""
        says = f"larger than {self._max_body} bytes; expected at most that (serving.max_body_bytes)"
        too_large = Refused(413, "body", says, reason="body", headers={"Connection": "close"})
        declared = headers.get(b"content-length", b"")
        if declared.isdigit() and int(declared) > self._max_body:
            raise too_large
        if self._bodies >= _BODIES:
            raise _busy("too many requests are being read")
        self._bodies += 1
        try:
            async with asyncio.timeout(self._gate.body_seconds):
                parts, size, more = [], 0, True
                while more:
                    message = await receive()
                    part = message.get("body", b"")
                    parts.append(part)
                    size += len(part)
                    if size > self._max_body:
                        raise too_large
                    more = message["type"] == "http.request" and message.get("more_body", False)
                return b"".join(parts)
        except TimeoutError:
            says = f"not here after {self._gate.body_seconds:g} s"
            raise Refused(408, "body", says, reason="body", headers={"Connection": "close"}) from None
        finally:
            self._bodies -= 1

    # ------------------------------------------------------------ work

    async def _work(self, name: str, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        """In the lane, within the time an answer may take. A thread cannot be stopped: work that is given up holds its slot until it ends."""
        if name == "events" and self._life.handed_over:
            await self._hand_on(scope, body, send)
            return
        lane = self._lanes[name]
        if not await lane.enter():
            raise _busy(f"{lane.working} requests in work, {lane.waiting} waiting")
        if name == "events" and self._life.handed_over:  # while it waited
            lane.leave()
            await self._hand_on(scope, body, send)
            return
        answer = _Answer(send)
        task = asyncio.ensure_future(self._app(scope, replay(body, receive), answer))
        task.add_done_callback(lambda done: self._done(lane, answer, done))
        try:
            await asyncio.wait((task,), timeout=self._gate.answer_seconds)
        except asyncio.CancelledError:
            answer.given_up = True
            raise
        if task.done() or answer.begun:
            await task
        else:
            answer.given_up = True
            raise _busy(f"no answer within {self._gate.answer_seconds:g} s (serving.gate.answer_seconds)", reason="timeout")

    @staticmethod
    def _done(lane: Lane, answer: _Answer, task: "asyncio.Task[None]") -> None:
        lane.leave()
        if answer.given_up and not task.cancelled() and task.exception() is not None:
            logger.error("a request that was given up failed", exc_info=task.exception())

    async def _hand_on(self, scope: Scope, body: bytes, send: Send) -> None:
        """Events while, and after, the state folder changes hands."""
        if not await self._life.event_taker(HANDOVER):
            raise _busy("the state folder changes hands")
        if self._life.successor is None:  # it came back to us
            await self._work("events", scope, body, _nothing, send)
            return
        if self._relay is None:
            self._relay = Relay(self._life.successor, self._gate.answer_seconds)
        try:
            await self._relay(scope, body, send)
        except OSError as error:
            raise _busy(f"the new process does not answer ({error})", reason="relay") from None


def _busy(says: str, *, reason: str = "busy") -> Refused:
    return Refused(503, "service", f"{says}; try again", reason=reason, headers={"Retry-After": str(RETRY)})


async def _nothing() -> Message:
    return {"type": "http.disconnect"}


def replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the whole body at once, then what `receive` gives."""
    sent = False

    async def read() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return read
