"""What stands between the network and BentoML: bounds on the body, one shape for every refusal, and a page of API docs without outside resources."""

import json
import logging
from collections.abc import Iterable
from typing import Any

from bentoml.exceptions import BentoMLException
from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_PAGE = """<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><title>Longtrail</title><link rel="stylesheet" href="static_content/swagger-ui.css"></head>
<body><div id="docs"></div>
<script src="static_content/swagger-ui-bundle.js"></script>
<script>SwaggerUIBundle({url: "docs.json", dom_id: "#docs", deepLinking: true, validatorUrl: null});</script>
</body>
</html>
"""


def refusal(status: int, faults: Iterable[tuple[str, str]]) -> JSONResponse:
    """`faults` as (field, message). The same shape whatever was wrong: {"error": "FIELD: MESSAGE; …", "detail": [{"field", "message"}]}."""
    detail = [{"field": field, "message": message} for field, message in faults]
    return JSONResponse({"error": "; ".join(f"{d['field']}: {d['message']}" for d in detail), "detail": detail}, status_code=status)


class Gate:
    """ASGI middleware around the endpoints: refuses bodies that are too large (413) or no JSON (415), and gives BentoML's refusals our shape."""

    def __init__(self, app: ASGIApp, max_body_bytes: int, paths: tuple[str, ...]) -> None:
        self._app = app
        self._max = max_body_bytes
        self._paths = frozenset(paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or scope["path"] not in self._paths:
            await self._app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        media_type = headers.get(b"content-type", b"application/json").split(b";")[0].strip().lower()
        if media_type != b"application/json":
            await refusal(415, [("Content-Type", f"{media_type.decode('latin-1')}; expected application/json")])(scope, receive, send)
            return
        body = await self._read(receive, headers.get(b"content-length", b""))
        if body is None:
            await refusal(413, [("body", f"larger than {self._max} bytes; expected at most that (serving.max_body_bytes)")])(scope, receive, send)
            return
        await self._app(scope, _replay(body, receive), _Reshaper(send))

    async def _read(self, receive: Receive, declared: bytes) -> bytes | None:
        """The whole body; None as soon as it is, or is declared to be, too large."""
        if declared.isdigit() and int(declared) > self._max:
            return None
        parts, size, more = [], 0, True
        while more:
            message = await receive()
            part = message.get("body", b"")
            parts.append(part)
            size += len(part)
            if size > self._max:
                return None
            more = message["type"] == "http.request" and message.get("more_body", False)
        return b"".join(parts)


def _replay(body: bytes, receive: Receive) -> Receive:
    sent = False

    async def read() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return read


class _Reshaper:
    """Holds a 4xx answer back until it is whole, then sends it in the shape of `refusal`; passes everything else through."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._start: Message | None = None
        self._parts: list[bytes] = []

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start" and 400 <= message["status"] < 500:
            self._start = message
            return
        if self._start is None:
            await self._send(message)
            return
        self._parts.append(message.get("body", b""))
        if message.get("more_body", False):
            return
        response = refusal(self._start["status"], _faults(b"".join(self._parts)))
        kept = [(name, value) for name, value in self._start["headers"] if name.lower() not in (b"content-length", b"content-type")]
        await self._send({**self._start, "headers": [*kept, *response.raw_headers]})
        await self._send({"type": "http.response.body", "body": response.body})


def _faults(body: bytes) -> list[tuple[str, str]]:
    """BentoML answers {"error", "detail": pydantic errors}, [{"error": "FIELD: MESSAGE"}] or {"error": TEXT}."""
    try:
        content: Any = json.loads(body)
    except ValueError:
        return [("request", body.decode("utf-8", "replace"))]
    if isinstance(content, list):
        content = content[0] if content else {}
    if "detail" in content:
        return faults_of(content["detail"])
    field, separator, message = str(content.get("error", "refused")).partition(": ")
    return [(field, message)] if separator else [("request", field)]


def faults_of(errors: Iterable[Any]) -> list[tuple[str, str]]:
    """Pydantic's errors as `refusal` takes them."""
    return [(_path(error["loc"]), _message(error)) for error in errors]


def _path(location: list[str | int]) -> str:
    """["events", 3, "action"] -> events[3].action"""
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)
    return path.removeprefix(".") or "body"


def _message(error: dict[str, Any]) -> str:
    if error["type"] == "missing":
        return "missing; expected a value"
    if error["type"] == "extra_forbidden":
        return "unknown field"
    return str(error["msg"])


class OwnFaultsOnly(logging.Filter):
    """Keeps the traceback of a request that was the client's fault out of the log: it would let anyone fill it."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, BentoMLException):
            return error.error_code.value >= 500
        return not isinstance(error, ValidationError)


async def _docs(request: Request) -> HTMLResponse:
    return HTMLResponse(_PAGE)


def docs_page() -> Starlette:
    """The API docs at `/` and `/docs`, with the scripts BentoML ships; its own page loads a tracker."""
    return Starlette(routes=[Route("/", _docs), Route("/docs", _docs)])
