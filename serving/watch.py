"""One background thread that looks after gauges: memory and file handles, what waits to be done, drift."""

import logging
import os
from collections.abc import Callable
from pathlib import Path
from threading import Event, Thread
from typing import Any

from longtrail.drift import Reference
from serving.drift_window import DriftWindow, RowMaker
from serving.metrics import Metrics

logger = logging.getLogger("longtrail.watch")
_EVERY = 5.0  # s between two looks at the process; our choice


class Watch:
    """Started when made; `stop` ends it. A look that fails is logged and tried again: watching must never stop what is watched."""

    def __init__(self, metrics: Metrics, window: DriftWindow | None, *, drift_seconds: float, backlog: Callable[[], int] = lambda: 0) -> None:
        """`backlog`: events that are logged and not yet in the histories."""
        self._metrics, self._window, self._backlog = metrics, window, backlog
        self._drift_seconds = drift_seconds
        self._stop = Event()
        self._alarms: frozenset[str] = frozenset()
        self._thread = Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(timeout=5)

    def _run(self) -> None:
        left = 0.0
        wait = min(_EVERY, self._drift_seconds)
        while True:
            try:
                self._metrics.process(*_process())
                self._metrics.refresh()
                self._metrics.backlog("events", self._backlog())
                left -= wait
                if self._window is not None and left <= 0:
                    left = self._drift_seconds
                    self._look(self._window)
            except Exception:
                logger.exception("a look at the service failed")
            if self._stop.wait(wait):
                return

    def _look(self, window: DriftWindow) -> None:
        drift = window.look()
        self._metrics.drift(drift)
        names = frozenset(alarm.partition(":")[0] for alarm in drift.alarms)
        for alarm in drift.alarms:
            if alarm.partition(":")[0] not in self._alarms:
                logger.warning("drift: %s", alarm)
        self._alarms = names


def _process() -> tuple[int, int]:
    """Resident bytes and open file descriptors of this process; 0 where the system does not say (no /proc)."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir("/proc/self/fd"))  # noqa: PTH208  (a name each, nothing more)
    except OSError:
        return 0, 0


def watch(engine: Any, artifacts: Any, metrics: Metrics) -> Watch:
    """The watch over a running engine (serving.engine.Engine): its lists and clicks are looked at from now on."""
    settings = artifacts.settings.drift
    reference = Reference.read(artifacts.folder / "reference.json")
    maker = RowMaker(reference, artifacts.catalogue, artifacts.manifest.prior_click_rate, artifacts.manifest.users)
    window = DriftWindow(maker, settings, users=engine.users.get, items=artifacts.catalogue.id_of)
    engine.on_list.append(window.listed)
    engine.on_logged.append(window.logged)
    return Watch(metrics, window, drift_seconds=settings.every_seconds, backlog=lambda: engine.intake.backlog)
