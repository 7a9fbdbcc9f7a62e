"""Where in its life the service is: what the HTTP layer, the service and the worker tell each other. One object a process."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class Life:
    """Written in the event loop's thread, read anywhere."""

    ready: bool = False
    fault: str | None = None  # why it will never be ready
    stopping: bool = False  # it was told to stop: /readyz says no, connections are closed with their next answer
    handed_over: bool = False  # the state folder is not ours any more: events are not taken
    successor: str | None = None  # base URL of the process that has it, once that is ready
    _held: list["asyncio.Future[None]"] = field(default_factory=list)
    events_working: Callable[[], int] = lambda: 0  # batches of events in work
    # What the worker asks of the service, which sets them. Each may take seconds.
    release: Callable[[], None] = lambda: None
    reclaim: Callable[[], None] = lambda: None
    close: Callable[[], None] = lambda: None

    @property
    def closing(self) -> bool:
        """Whether a client should come back by a new connection."""
        return self.stopping or self.successor is not None

    async def event_taker(self, seconds: float) -> bool:
        """Waits, while the state folder changes hands, until somebody takes events again: we or the successor. False after `seconds`."""
        if not self.handed_over or self.successor is not None:
            return True
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._held.append(turn)
        await asyncio.wait((turn,), timeout=seconds)
        if turn.done():
            return True
        self._held.remove(turn)
        return False

    def settle(self) -> None:
        """The state folder has an owner again: those who waited go on."""
        held, self._held = self._held, []
        for turn in held:
            turn.set_result(None)


LIFE = Life()  # BentoML makes service and middleware by itself, from classes: they meet here
