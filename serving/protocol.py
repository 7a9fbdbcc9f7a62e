"""uvicorn's HTTP protocol with an end to patience: heads of requests have a size and a time, connections a number. The parser itself sets none."""

import asyncio
import logging
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from longtrail.config import GateSettings
from serving.http import refusal

logger = logging.getLogger("longtrail.protocol")

_SPARE = 4  # times the gate's limit, below which the gate itself answers 431; our choice


def bounded_protocol(gate: GateSettings) -> type[asyncio.Protocol]:
    """The protocol class with the bounds of `gate`."""

    class Bounded(HttpToolsProtocol):
        _head_bytes = 0  # since the last whole head
        _patience: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            if len(self.connections) > gate.connections:
                logger.warning("more than %d connections (serving.gate.connections): one more is closed", gate.connections)
                transport.abort()
                return
            self._patience = self.loop.call_later(gate.body_seconds, self._lost_patience)

        def on_message_begin(self) -> None:
            super().on_message_begin()
            self._head_bytes = 0
            if self._patience is None:
                self._patience = self.loop.call_later(gate.body_seconds, self._lost_patience)

        def on_header(self, name: bytes, value: bytes) -> None:
            super().on_header(name, value)
            if len(self.headers) > _SPARE * gate.max_headers and not self.transport.is_closing():  # trailers come here, too
                self.transport.abort()

        def on_headers_complete(self) -> None:
            self._calm()
            self._head_bytes = -1
            super().on_headers_complete()

        def data_received(self, data: bytes) -> None:
            if self._head_bytes >= 0:
                self._head_bytes += len(data)
            super().data_received(data)
            if self._head_bytes > _SPARE * gate.max_header_bytes and not self.transport.is_closing():
                self.transport.abort()

        def on_message_complete(self) -> None:
            super().on_message_complete()
            self._head_bytes = 0

        def send_400_response(self, msg: str) -> None:
            """What is no HTTP, in our shape; the connection cannot be used any more."""
            content = refusal(400, [("request", msg)]).body
            head = "HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\nx-content-type-options: nosniff\r\n"
            self.transport.write(f"{head}content-length: {len(content)}\r\nconnection: close\r\n\r\n".encode() + bytes(content))
            self.transport.close()

        def connection_lost(self, exc: Exception | None) -> None:
            self._calm()
            super().connection_lost(exc)

        def _calm(self) -> None:
            if self._patience is not None:
                self._patience.cancel()
                self._patience = None

        def _lost_patience(self) -> None:
            self._patience = None
            if not self.transport.is_closing():
                self.transport.abort()

    return Bounded
