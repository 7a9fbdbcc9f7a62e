"""The process that serves: BentoML's application under uvicorn, as BentoML's own worker runs it, with two things more. It goes without dropping a
request: /readyz says no, the listening socket is left to others, answers close their connections, and it ends with the last of them. And it hands the
state folder to a successor (serving.control). Started by serving.run in the Bento's `src`; `bentoml serve` does without.
"""

import argparse
import asyncio
import logging
import os
import socket
from typing import Any

import uvicorn
from starlette.applications import Starlette

from longtrail.config import GateSettings, StopSettings
from serving.control import Control
from serving.life import LIFE, Life
from serving.metrics import metrics
from serving.protocol import bounded_protocol

logger = logging.getLogger("longtrail.worker")

_TICK = 0.02  # seconds between looks at what is left; our choice


class Server(uvicorn.Server):
    """uvicorn's, which stops in steps and listens to its supervisor."""

    def __init__(self, config: uvicorn.Config, life: Life, control: Control, stop: StopSettings) -> None:
        super().__init__(config)
        self._life, self._control, self._stop = life, control, stop
        self._listening: list[socket.socket] = []
        self._tasks: set[asyncio.Task[None]] = set()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._listening = list(sockets or [])
        await super().startup(sockets)
        if self._life.fault:
            self._control.tell("failed", why=self._life.fault)
        else:
            self._control.tell("ready")
        if self._control.connection:
            self._control.connection.setblocking(False)
            asyncio.get_running_loop().add_reader(self._control.connection, self._hear)

    def _hear(self) -> None:
        assert self._control.connection
        try:
            messages = self._control.received(self._control.connection.recv(4096))
        except BlockingIOError:
            return
        except (SystemExit, OSError):
            asyncio.get_running_loop().remove_reader(self._control.connection)
            self.should_exit = True
            return
        for message in messages:
            task = asyncio.ensure_future(self._obey(message))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _obey(self, message: dict[str, Any]) -> None:
        life, what = self._life, message.get("do")
        try:
            if what == "release":
                await self._release()
            elif what == "reclaim":
                await asyncio.to_thread(life.reclaim)
                life.handed_over = False
                life.settle()
                self._control.tell("reclaimed")
            elif what == "retire":
                for server in self.servers:  # first: what is handed on must not come back to us
                    server.close()
                life.successor = message["successor"]
                life.settle()
                self.should_exit = True
        except Exception as error:
            logger.exception("could not %s", what)
            self._control.tell("failed", why=f"{type(error).__name__}: {error}")

    async def _release(self) -> None:
        """Events that are in work are finished, those that come wait (serving.gate)."""
        life = self._life
        life.handed_over = True
        while life.events_working():
            await asyncio.sleep(_TICK)
        await asyncio.to_thread(life.release)
        self._control.tell("released")

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Told to stop: say so and take what still comes for a while. Handed over: the successor has the listening socket, what comes is for it."""
        life = self._life
        if life.successor is None:
            life.stopping = True
            metrics().ready(False)
            metrics().draining(True)
            logger.info("stopping: requests are taken for %g s more", self._stop.linger_seconds)
            await self._until(lambda: self.force_exit, self._stop.linger_seconds)
        for server in self.servers:
            server.close()
        # A connection between two requests gets its answer with "Connection: close" when it comes back; one that does not is closed at the end.
        await self._until(lambda: not self.server_state.connections or self.force_exit, self._stop.drain_seconds, busy=life.successor is None)
        life.stopping = True
        await super().shutdown(sockets)
        await asyncio.to_thread(life.close)
        logger.info("stopped")

    async def _until(self, done: Any, seconds: float, *, busy: bool = False) -> None:
        """Until `done`, `seconds` at most; with `busy`, until no request is in work, too: a stop need not wait for idle connections."""
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        while not done() and loop.time() < end and not (busy and not self.server_state.tasks):
            await asyncio.sleep(_TICK)


def without_leftovers(app: Starlette) -> Starlette:
    """BentoML's application without the middlewares that cost more than they give here. The timer keeps a request and all that belongs to it (5 kB)
    until the time is up, although it was answered: the gate has a timer of its own. The metrics make series of every path that anybody makes up:
    serving.metrics counts requests by the paths there are. And spans are recorded although nobody collects them, unless tracing is configured."""
    from bentoml._internal.container import BentoMLContainer
    from bentoml._internal.server.http.instruments import RunnerTrafficMetricsMiddleware
    from bentoml._internal.server.http.traffic import TimeoutMiddleware
    from opentelemetry.instrumentation.asgi import OpenTelemetryMiddleware

    unwanted: set[Any] = {TimeoutMiddleware, RunnerTrafficMetricsMiddleware}
    if not BentoMLContainer.tracing.sample_rate.get():
        unwanted.add(OpenTelemetryMiddleware)
    app.user_middleware = [one for one in app.user_middleware if one.cls not in unwanted]
    return app


def main() -> None:
    """Serve the Bento on an inherited socket."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("bento")
    parser.add_argument("--listen", type=int, required=True, help="file descriptor of the listening socket")
    parser.add_argument("--worker-id", type=int, default=1)
    arguments = parser.parse_args()

    from _bentoml_impl.loader import load
    from bentoml._internal.container import BentoMLContainer
    from bentoml._internal.context import server_context
    from bentoml._internal.log import configure_server_logging

    configure_server_logging()
    server_context.worker_index = arguments.worker_id
    service = load(arguments.bento, standalone_load=True)
    server_context.service_type = "entry_service"
    server_context.service_name = service.name
    server_context.service_routes = [api.route for api in service.apis.values()]
    if service.bento is not None:
        server_context.bento_name, server_context.bento_version = service.bento.tag.name, service.bento.tag.version or "not available"
    BentoMLContainer.development_mode.set(False)
    gate, stop = _settings()
    config = uvicorn.Config(
        app=without_leftovers(service.to_asgi(is_main=True)),
        http=bounded_protocol(gate),
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=stop.keep_alive_seconds,
        timeout_graceful_shutdown=max(1, round(stop.drain_seconds)),
    )
    Server(config, LIFE, Control.of_process(), stop).run(sockets=[socket.socket(fileno=arguments.listen)])


def _settings() -> tuple[GateSettings, StopSettings]:
    from serving import service  # as BentoML imported it

    settings = service.settings()
    return settings.gate, settings.stop


if __name__ == "__main__":
    os.environ.setdefault("BENTOML_DO_NOT_TRACK", "True")
    main()
