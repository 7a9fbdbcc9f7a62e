"""A shadow arm: a model that scores what the others were asked, after they have answered. Its lists are logged beside theirs and never shown.

It must not delay an answer: requests wait in a short queue, one thread scores them, and only while no list is being made. Without a quiet moment
the queue overflows, and the rest is counted but not scored. So under heavy load a shadow sees a sample of the requests, by load and not by user.

`log/shadow/` of the state folder holds segments like the answers' (serving.answer_log). A line bears the answer's request_id; `items` and `scores`
are the list that the shadow would have shown, as long as the answer's, and `evidence.shown_scores` its scores of the items that were shown: with
their clicks, what it needs to be judged by.
"""

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longtrail.history import HistoryArrays
from serving.answer_log import AnswerLog, LoggedAnswer
from serving.arms import Arm
from serving.lists import Shown
from serving.policies import Best
from serving.user_read import read_user

PATIENCE = 0.5  # seconds that one request waits for a quiet moment before it is left out; our choice
CLOSING = 2.0  # seconds that closing waits for the request in work

logger = logging.getLogger("longtrail.shadow")


class Work:
    """How many lists are being made; the shadow waits until there are none."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._working = 0

    @contextlib.contextmanager
    def one(self) -> Iterator[None]:
        with self._changed:
            self._working += 1
        try:
            yield
        finally:
            with self._changed:
                self._working -= 1
                if self._working == 0:
                    self._changed.notify_all()

    def quiet(self, seconds: float) -> bool:
        """Wait until nothing is in work; False where that took longer."""
        with self._changed:
            return self._changed.wait_for(lambda: self._working == 0, seconds)


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One answered request."""

    request_id: str
    user_key: str
    user: int
    arm: str
    shown: Shown


class Shadow:
    """Thread-safe. Owns its thread from `start` to `close`."""

    def __init__(
        self,
        arm: Arm,
        online: Any,
        log: AnswerLog,
        work: Work,
        *,
        keys: Sequence[str],
        waiting: int,
        count: Callable[[str], None] = lambda outcome: None,
    ) -> None:
        """`keys` are the catalogue's raw keys by dense id; `count(outcome)` hears of every request: scored, skipped, failed."""
        self._arm, self._online, self._log, self._work = arm, online, log, work
        self._keys, self._count = keys, count
        self._asked: queue.Queue[Asked | None] = queue.Queue(waiting)
        self._thread: threading.Thread | None = None

    def offer(self, asked: Asked) -> None:
        """Waits for nothing: where the queue is full the request is left out."""
        if asked.shown.evidence is None or self._thread is None:  # a fallback, or nothing to rank
            return
        try:
            self._asked.put_nowait(asked)
        except queue.Full:
            self._count("skipped")

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="shadow", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """What still waits is left out."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        with contextlib.suppress(queue.Empty):
            while True:
                self._asked.get_nowait()
        self._asked.put(None)
        thread.join(CLOSING)
        self._log.close()

    def _run(self) -> None:
        while (asked := self._asked.get()) is not None:
            if not self._work.quiet(PATIENCE):
                self._count("skipped")
                continue
            try:
                self._log.append(self.score(asked))
                self._count("scored")
            except Exception:  # a shadow may fail as it likes: nobody sees its lists
                logger.exception("shadow %s: request %s was not scored", self._arm.model, asked.request_id)
                self._count("failed")
                time.sleep(0.05)

    def score(self, asked: Asked) -> LoggedAnswer:
        """The line that is logged. Raises what reading and scoring raise."""
        shown, evidence, scorer = asked.shown, asked.shown.evidence, self._arm.scorer
        assert evidence is not None
        history, total, statistics, state = evidence.history, evidence.total, evidence.user, None
        if scorer.states is not None or not _covers(history, total, scorer.ranker_history):
            read = read_user(self._online, scorer, asked.user, retrieval=False)
            history, total, statistics, state = read.history, read.total, read.statistics, read.state
        items_1C, times = shown.candidates[None, :], np.array([evidence.time])
        logits_C = scorer.logits(history, np.array([total]), statistics, items_1C, evidence.items, times, state=state)[0]
        scores_C = 1 / (1 + np.exp(-logits_C))
        columns, propensities = Best().draw(logits_C, len(shown.items), np.random.default_rng(0))
        return LoggedAnswer(
            request_id=asked.request_id,
            user=asked.user_key,
            timestamp=evidence.time,
            arm=self._arm.name,
            assigned=asked.arm,
            policy=Best.name,
            model=self._arm.model,
            fallback=None,
            items=[self._keys[item] for item in shown.candidates[columns].tolist()],
            scores=scores_C[columns].tolist(),
            propensities=propensities.tolist(),
            candidates=[],
            evidence={"shown_scores": _of(scores_C, shown).tolist()},
        )


def _covers(history: HistoryArrays, total: int, wanted: int) -> bool:
    return int(history.lengths_B[0]) >= min(total, wanted)


def _of(scores_C: NDArray[np.float64], shown: Shown) -> NDArray[np.float64]:
    """The scores of the items shown, in their order."""
    order = np.argsort(shown.candidates)
    return scores_C[order[np.searchsorted(shown.candidates, shown.items, sorter=order)]]
