"""The structured log: one JSON object a line on standard output, a line for each request, and all other lines of the worker in the same shape.

No line holds a body, a header, a user or an item: `answer` is the list's request_id, by which the answer log (serving.log) has the rest. Fields:
  time, level, logger, message     UTC, ISO 8601
  request_id                       the client's X-Request-Id where it is sane, else ours; it is in the answer's header X-Request-Id, too
  endpoint, status, ms             of a request; with them arm, fallback, reason (of a refusal), answer, items, events where there are any
  stages                           milliseconds by stage; `queue` is the wait for a thread
  error, traceback                 of a fault of our own (a client's fault leaves none)
"""

import asyncio
import json
import logging
import re
import time
import uuid
import zlib
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from longtrail.config import LogSettings
from serving.metrics import metrics
from serving.trace import Trace, begin, current

HEADER = b"x-request-id"
_SANE = re.compile(rb"[A-Za-z0-9._:-]{1,128}")  # nothing that could break a line, a header or a shell; our choice
_LOGGER = logging.getLogger("longtrail.request")
_FIELDS = "longtrail_fields"  # attribute of a record that holds more fields
_LOGGERS = ("", "bentoml", "uvicorn.error", "circus", "longtrail")


class JsonFormatter(logging.Formatter):
    """A record as one line of JSON, with the id of the request it belongs to."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        trace = current()
        if trace:
            line["request_id"] = trace.request_id
        line.update(getattr(record, _FIELDS, {}))
        if record.exc_info and record.exc_info[1] is not None:
            line["error"] = f"{type(record.exc_info[1]).__name__}: {record.exc_info[1]}"
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


class _Counting(logging.Filter):
    """Counts lines by level: a rate of errors is what an alert watches."""

    def filter(self, record: logging.LogRecord) -> bool:
        metrics().logged(record.levelname.lower())
        return True


def configure(settings: LogSettings) -> None:
    """Give every handler of this worker the JSON shape, and the service's own logger its level. Safe to call twice."""
    formatter = JsonFormatter()
    for name in _LOGGERS:
        for handler in logging.getLogger(name).handlers:
            handler.setFormatter(formatter)
            if not any(isinstance(each, _Counting) for each in handler.filters):
                handler.addFilter(_Counting())
    own = logging.getLogger("longtrail")
    own.setLevel(settings.level.upper())
    logging.getLogger("serving").setLevel(settings.level.upper())  # modules' own loggers; the root's handlers write them
    own.handlers = logging.getLogger("bentoml").handlers
    own.propagate = False


class RequestLog:
    """ASGI middleware, the outermost of ours: gives each request its id and trace, counts it, and writes its line."""

    def __init__(self, app: ASGIApp, endpoints: Mapping[str, str], settings: LogSettings, silent: frozenset[str] = frozenset()) -> None:
        """`endpoints`: path to the name metrics know it by; other paths are "other". `silent`: paths that are neither counted nor logged."""
        self._app = app
        self._endpoints = dict(endpoints)
        self._settings = settings
        self._silent = silent

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in self._silent:
            await self._app(scope, receive, send)
            return
        trace = Trace(request_id(scope), self._endpoints.get(scope["path"], "other"))
        begin(trace)
        metrics().arrived()
        status = 500

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = [(name, value) for name, value in message.get("headers", ()) if name.lower() != HEADER]
                message = {**message, "headers": [*headers, (HEADER, trace.request_id.encode("ascii"))]}
            await send(message)

        try:
            await self._app(scope, receive, sending)
        except asyncio.CancelledError:
            status, trace.reason = 504, trace.reason or "timeout"
            raise
        finally:
            self._end(trace, status)

    def _end(self, trace: Trace, status: int) -> None:
        seconds = time.perf_counter() - trace.arrived
        metrics().left(trace.endpoint, status, seconds, arm=trace.arm, reason=trace.reason, worked=trace.working)
        slow = seconds * 1000 > self._settings.slow_ms
        level = logging.ERROR if status >= 500 and status != 503 else logging.WARNING if slow or status == 503 else logging.INFO
        if _LOGGER.isEnabledFor(level) and (level > logging.INFO or _sampled(trace.request_id, self._settings.sample)):
            _LOGGER.log(level, "request", extra={_FIELDS: _fields(trace, status, seconds)})


def request_id(scope: Scope) -> str:
    """The client's X-Request-Id, where it is 1 to 128 of A-Z a-z 0-9 . _ : -, else 32 hex digits of our own."""
    given = next((value for name, value in scope["headers"] if name.lower() == HEADER), b"")
    return given.decode("ascii") if _SANE.fullmatch(given) else uuid.uuid4().hex


def _sampled(name: str, share: float) -> bool:
    """The same requests in every service that shares the id, so that a sampled request can be followed through all of them."""
    return zlib.crc32(name.encode("ascii")) < share * 2**32


def _fields(trace: Trace, status: int, seconds: float) -> dict[str, Any]:
    known = {
        "arm": trace.arm,
        "fallback": trace.fallback,
        "reason": trace.reason,
        "answer": trace.answer,
        "items": trace.items,
        "events": trace.events,
    }
    return {
        "request_id": trace.request_id,
        "endpoint": trace.endpoint,
        "status": status,
        "ms": round(1000 * seconds, 3),
        **{name: value for name, value in known.items() if value is not None},
        "stages": {name: round(1000 * value, 3) for name, value in trace.stages.items()},
    }
