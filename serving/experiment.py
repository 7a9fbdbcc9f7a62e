"""The live experiment of a running service: which arm a user is shown, and who watches: the canary's guardrails, the shadow."""

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from serving.answer_log import SHADOW, AnswerLog
from serving.arms import Arms
from serving.artifacts import Artifacts
from serving.canary import Canary
from serving.evidence import build_name
from serving.lists import UNKNOWN_USER
from serving.shadow import Asked, Shadow, Work


class Observer(Protocol):
    """What is told of it (serving.metrics.Metrics)."""

    def changed(self, what: str, outcome: str) -> None: ...

    def canary(self, arm: str, share: float) -> None: ...


class Experiment:
    """Thread-safe. Without canary and shadow it is the arms, and costs nothing."""

    def __init__(self, arms: Arms, *, canary: Canary | None = None, shadow: Shadow | None = None, work: Work | None = None) -> None:
        self.arms = arms
        self.canary = canary
        self._shadow = shadow
        self._work = work

    def working(self) -> AbstractContextManager[object]:
        """To be entered while a list is made: the shadow waits."""
        return self._work.one() if self._work is not None else contextlib.nullcontext()

    def answered(self, asked: Asked, seconds: float, key_of: Callable[[int], str]) -> None:
        """A list for a known user was made in `seconds` and logged. Waits for nothing."""
        if self.canary is not None:
            failed = asked.shown.fallback not in (None, UNKNOWN_USER)
            items = [key_of(item) for item in asked.shown.items.tolist()]
            self.canary.answered(asked.user, asked.arm == self.arms.canary, seconds, failed, asked.request_id, items)
        if self._shadow is not None:
            self._shadow.offer(asked)

    def start(self) -> None:
        """Once, when the service is warm."""
        for part in (self.canary, self._shadow):
            if part is not None:
                part.start()

    def release(self) -> None:
        """Stop what writes to the state folder; users keep their arms."""
        for part in (self.canary, self._shadow):
            if part is not None:
                part.close()


def open_experiment(artifacts: Artifacts, arms: Arms, state: Path, online: Any, observer: Observer | None) -> Experiment:
    """The experiment of `serving.experiment`; `state` is the state folder. Raises StateError where what it holds of a canary is damaged."""
    settings = artifacts.settings.experiment
    canary = shadow = work = None
    if settings.canary is not None:

        def changed(outcome: str, arm: str, share: float) -> None:
            if observer is not None:
                observer.changed("canary", outcome)
                observer.canary(arm, share)

        fingerprint = f"{build_name(artifacts.folder)}:{settings.salt}"
        canary = Canary(settings.canary, state, fingerprint, set_share=arms.set_canary, changed=changed)
    if settings.shadow is not None and arms.shadow is not None:
        work, log = Work(), AnswerLog(state / "log", artifacts.settings.answer_log, name=SHADOW)

        def count(outcome: str) -> None:
            if observer is not None:
                observer.changed("shadow", outcome)

        shadow = Shadow(arms.shadow, online, log, work, keys=artifacts.catalogue.keys, waiting=settings.shadow.waiting, count=count)
    return Experiment(arms, canary=canary, shadow=shadow, work=work)
