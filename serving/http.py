"""One shape for every refusal, whoever made it."""

import json
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from bentoml.exceptions import BentoMLException
from pydantic import ValidationError
from starlette.responses import JSONResponse
from starlette.types import Message, Send

from serving.faults import faults_of


def refusal(status: int, faults: Iterable[tuple[str, str]], headers: Mapping[str, str] | None = None) -> JSONResponse:
    """`faults` as (field, message). The same shape whatever was wrong: {"error": "FIELD: MESSAGE; …", "detail": [{"field", "message"}]}."""
    detail = [{"field": field, "message": message} for field, message in faults]
    content = {"error": "; ".join(f"{d['field']}: {d['message']}" for d in detail), "detail": detail}
    return JSONResponse(content, status_code=status, headers=dict(headers or {}))


class Reshaper:
    """A `send` that gives refusals our shape, whoever made them, and every answer its safe headers. Refusals are held back until they are whole."""

    def __init__(self, send: Send, closing: Callable[[], bool] = lambda: False) -> None:
        """`closing` says whether the connection should end with this answer."""
        self._send = send
        self._closing = closing
        self._start: Message | None = None
        self._parts: list[bytes] = []
        self.begun = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.begun = True
            message = {**message, "headers": self._headers(message.get("headers", ()))}
            if message["status"] >= 400:
                self._start = message
                return
        if self._start is None:
            await self._send(message)
            return
        self._parts.append(message.get("body", b""))
        if message.get("more_body", False):
            return
        status = self._start["status"]
        response = refusal(status, _faults(b"".join(self._parts), status))
        kept = [(name, value) for name, value in self._start["headers"] if name.lower() not in (b"content-length", b"content-type")]
        await self._send({**self._start, "headers": [*kept, *response.raw_headers]})
        await self._send({"type": "http.response.body", "body": response.body})

    def _headers(self, found: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
        headers = [(name.lower(), value) for name, value in found if name.lower() != b"server"]
        names = {name for name, _ in headers}
        more = [(b"x-content-type-options", b"nosniff")]
        if any(name == b"content-type" and value.startswith(b"application/json") for name, value in headers):
            more.append((b"cache-control", b"no-store"))  # somebody's list or history
        if self._closing():
            more.append((b"connection", b"close"))
        return [*headers, *(pair for pair in more if pair[0] not in names)]


_PLAIN = {404: ("path", "not found"), 405: ("method", "not allowed for this path"), 500: ("service", "failed; its log says why")}


def _faults(body: bytes, status: int) -> list[tuple[str, str]]:
    """Ours, or BentoML's {"error", "detail": pydantic errors}, [{"error": "FIELD: MESSAGE"}] or {"error": TEXT}, or Starlette's plain text."""
    try:
        content: Any = json.loads(body)
    except ValueError:
        return [_PLAIN.get(status, ("request", body.decode("utf-8", "replace")))]
    if isinstance(content, list):
        content = content[0] if content else {}
    detail = content.get("detail") or ()
    if detail and "field" in detail[0]:
        return [(fault["field"], fault["message"]) for fault in detail]
    if status in _PLAIN:
        return [_PLAIN[status]]
    if detail:
        return faults_of(detail)
    field, separator, message = str(content.get("error", "refused")).partition(": ")
    return [(field, message)] if separator else [("request", field)]


class OwnFaultsOnly(logging.Filter):
    """Keeps the traceback of a request that was the client's fault out of the log: it would let anyone fill it."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, BentoMLException):
            return error.error_code.value >= 500
        return not isinstance(error, ValidationError)
