"""What a worker and its supervisor (serving.run) say to each other: one JSON object a line, over a socket that the worker inherits.

supervisor to worker   {"do": "take"}      the state folder is yours: open it and serve
                       {"do": "release"}   finish the events in work and give the state folder up; lists are still answered
                       {"do": "reclaim"}   take it back: the other one failed
                       {"do": "retire", "successor": URL}  take no new connection, hand events on, end with the last connection
worker to supervisor   {"is": "loaded"}, {"is": "ready"}, {"is": "released"}, {"is": "reclaimed"}, {"is": "failed", "why": TEXT}

Where the supervisor ends, the socket does, and the worker stops as if it had been told to.
"""

import functools
import json
import os
import socket
from typing import Any

CONTROL_VARIABLE = "LONGTRAIL_CONTROL"  # the worker's file descriptor of the socket


class Control:
    """The worker's end. Without a supervisor of ours (`bentoml serve`) it is mute, and its turn is at once."""

    def __init__(self, connection: socket.socket | None) -> None:
        self.connection = connection
        self._left = b""

    @classmethod
    @functools.cache
    def of_process(cls) -> "Control":
        """That of this process, by CONTROL_VARIABLE."""
        descriptor = os.environ.get(CONTROL_VARIABLE)
        return cls(socket.socket(fileno=int(descriptor)) if descriptor else None)

    def tell(self, what: str, **more: Any) -> None:
        if self.connection:
            self.connection.sendall(json.dumps({"is": what, **more}).encode() + b"\n")

    def await_turn(self) -> None:
        """Say that all is loaded, and wait for "take". Raises SystemExit where the supervisor ends."""
        if not self.connection:
            return
        self.tell("loaded")
        while True:
            for message in self.received(self.connection.recv(4096)):
                if message.get("do") == "take":
                    return

    def received(self, data: bytes) -> list[dict[str, Any]]:
        """The messages that `data` completes. Raises SystemExit for none: the other end is closed."""
        if not data:
            raise SystemExit("the supervisor is gone")
        *lines, self._left = (self._left + data).split(b"\n")
        return [json.loads(line) for line in lines]
