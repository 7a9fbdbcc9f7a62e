"""Keeps one worker serving on a listening socket that outlives it: starts it again when it dies, and swaps it for another without dropping a request.

A swap, step by step (serving.control has the words): the new worker loads its models beside the old one; the old one finishes the events in work
and gives up the state folder, still answering lists; the new one opens it and takes connections; the old one takes no more, hands events on, and ends
with its last connection. Until the new one serves, the old one can take everything back: a Bento that does not become ready changes nothing.
"""

import asyncio
import contextlib
import json
import logging
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from serving.control import CONTROL_VARIABLE

logger = logging.getLogger("longtrail.supervisor")

LOADING = 600.0  # seconds that models may take to load; our choice
RELEASING = 30.0  # seconds for the old process to give the state folder up
OPENING = 120.0  # seconds for the new process to open it
ENDING = 60.0  # seconds for a worker to end by itself, then it is killed
BACKOFF = (0.5, 30.0)  # seconds before a dead worker is started again: first, longest; doubles while it dies young
YOUNG = 60.0  # seconds
_TICK = 0.1  # seconds between looks at the worker


class SwapError(Exception):
    """The swap was given up; the old worker serves on. The message says why."""


@dataclass(eq=False)
class Worker:
    """A running worker and the line to it."""

    bento: Path
    process: subprocess.Popen[bytes]
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    started: float = field(default_factory=time.monotonic)

    async def hear(self, seconds: float) -> dict[str, Any]:
        """Its next message. Raises SwapError where it ends, or says nothing for that long."""
        try:
            line = await asyncio.wait_for(self.reader.readline(), seconds)
        except TimeoutError:
            raise SwapError(f"the worker of {self.bento} said nothing for {seconds:g} s") from None
        if not line:
            raise SwapError(f"the worker of {self.bento} ended; its output says why")
        message: dict[str, Any] = json.loads(line)
        if message["is"] == "failed":
            raise SwapError(message["why"])
        return message

    async def expect(self, what: str, seconds: float) -> None:
        message = await self.hear(seconds)
        if message["is"] != what:
            raise SwapError(f"the worker of {self.bento} said {message['is']!r}; expected {what!r}")

    def tell(self, what: str, **more: Any) -> None:
        self.writer.write(json.dumps({"do": what, **more}).encode() + b"\n")

    async def ended(self, seconds: float) -> None:
        """Wait for its end; kill it after `seconds`."""
        end = time.monotonic() + seconds
        while self.process.poll() is None and time.monotonic() < end:
            await asyncio.sleep(0.05)
        if self.process.poll() is None:
            logger.error("worker %d does not end: killed", self.process.pid)
            self.process.kill()
            await asyncio.to_thread(self.process.wait)
        self.writer.close()


class Supervisor:
    """For one event loop. `environment` is the workers'; `url` is where a worker reaches the listening socket."""

    def __init__(self, listening: socket.socket, environment: Mapping[str, str], url: str) -> None:
        self._listening, self._environment, self._url = listening, dict(environment), url
        self._worker: Worker | None = None  # whose turn it is
        self._all: set[Worker] = set()
        self._number = 0
        self._changing = asyncio.Lock()  # a worker is starting or being swapped
        self._stopping = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self, bento: Path) -> None:
        """Serve until SIGTERM or SIGINT."""
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._stopping.set)
        self._worker = worker = await self._begin(bento)
        pause = BACKOFF[0]
        while not await self._stopped(_TICK):
            if self._worker.process.poll() is None or self._changing.locked():
                continue
            worker = self._worker
            self._all.discard(worker)
            pause = BACKOFF[0] if time.monotonic() - worker.started > YOUNG else min(2 * pause, BACKOFF[1])
            logger.error("worker %d ended with %s; started again in %g s", worker.process.pid, worker.process.returncode, pause)
            if not await self._stopped(pause):
                self._worker = await self._begin(worker.bento)
        self._listening.close()  # the worker's own copy goes on for as long as it takes requests
        for worker in self._all:
            worker.process.terminate()
        await asyncio.gather(*(worker.ended(ENDING) for worker in self._all))

    async def _stopped(self, seconds: float) -> bool:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._stopping.wait(), seconds)
        return self._stopping.is_set()

    async def _begin(self, bento: Path) -> Worker:
        """A worker that has no predecessor. One that cannot serve stays: its /readyz says why."""
        worker = await self._start(bento)

        async def bring_up() -> None:
            async with self._changing:
                try:
                    await worker.expect("loaded", LOADING)
                    worker.tell("take")
                    await worker.expect("ready", OPENING)
                except SwapError as error:
                    logger.error("not ready: %s", error)

        self._background(bring_up())
        return worker

    async def _start(self, bento: Path) -> Worker:
        ours, theirs = socket.socketpair()
        self._number += 1
        descriptors = (self._listening.fileno(), theirs.fileno())
        command = [sys.executable, "-m", "serving.worker", str(bento), "--listen", str(descriptors[0]), "--worker-id", str(self._number)]
        process = subprocess.Popen(
            command,
            cwd=bento / "src",  # the Bento's own code, not that of whoever starts it
            env={**self._environment, CONTROL_VARIABLE: str(descriptors[1])},
            pass_fds=descriptors,
            stdin=subprocess.DEVNULL,
        )
        theirs.close()
        reader, writer = await asyncio.open_connection(sock=ours)
        worker = Worker(bento, process, reader, writer)
        self._all.add(worker)
        return worker

    async def swap(self, bento: Path) -> None:
        """Serve `bento` instead. Raises SwapError where the old worker serves on."""
        if self._changing.locked():
            raise SwapError("a worker is starting or being swapped; try again when it is ready")
        async with self._changing:
            old = self._worker
            if old is None:
                raise SwapError("no worker is running yet")
            new = await self._start(bento)
            try:
                await new.expect("loaded", LOADING)
                loaded = time.monotonic()
                if old.process.poll() is None:
                    old.tell("release")
                    await old.expect("released", RELEASING)
            except BaseException:
                await self._drop(new)
                raise
            try:
                new.tell("take")
                await new.expect("ready", OPENING)
            except BaseException:
                await self._drop(new)
                if old.process.poll() is None:
                    old.tell("reclaim")
                    await old.expect("reclaimed", OPENING)
                raise
            self._worker = new
            took = (loaded - new.started, time.monotonic() - loaded)
            logger.info("%s serves instead of %s: loaded in %.1f s, the state folder changed hands in %.2f s", new.bento, old.bento, *took)
            if old.process.poll() is None:
                old.tell("retire", successor=self._url)
            self._background(self._retire(old))

    async def _retire(self, old: Worker) -> None:
        await old.ended(ENDING)
        self._all.discard(old)

    async def _drop(self, worker: Worker) -> None:
        """End a worker that serves nobody."""
        worker.process.kill()
        await asyncio.to_thread(worker.process.wait)
        worker.writer.close()
        self._all.discard(worker)

    def _background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
