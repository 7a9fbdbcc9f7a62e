"""A canary: an arm whose share steps up while its guardrails hold, and goes back to 0, for good, when one does not.

`experiment/` of the state folder:
  canary.json     CanaryRecord: where it stands and how it got there; written (whole or not at all) before the share changes
  outcomes.npz    what was counted in this period, so that a restart does not look again with fresh eyes
  roll_back       made by an operator: the reason; it rolls the canary back at the next look

Every step is a period of its own: users who move to the canary with it have no past in it, and everybody's outcomes are of the same days. The chance
of a false alarm is spread over the periods as 1/n² (the sum over all is the stated one), so that there may be any number.

`python -m serving.canary STATE` prints where it stands; `--roll-back REASON` rolls it back.
"""

import logging
import math
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal
from zipfile import BadZipFile

import numpy as np
import typer
from pydantic import BaseModel, ConfigDict
from pydantic import ValidationError as PydanticError

from longtrail.config import CanarySettings
from longtrail.errors import StateError
from longtrail.files import atomic_file
from serving.clock import now
from serving.guardrails import Broken, Outcomes, judge, pack, unpack

FOLDER, RECORD, OUTCOMES, ROLL_BACK = "experiment", "canary.json", "outcomes.npz", "roll_back"
PERIOD_REQUESTS = 100_000  # of either arm, after which a new period begins: bounds memory and the time of a look; our choice
REMEMBERED = 200_000  # newest answers whose clicks are counted
GROWTH = 1.02  # a look waits for 2 % more than at the last one: any subset of looks is as safe
DEATHS = 3  # of the process at one step that roll the canary back; our choice
SAVE_SECONDS = 30.0

logger = logging.getLogger("longtrail.canary")


class Move(BaseModel):
    """Something that happened to the canary."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    time: int  # UTC µs
    outcome: Literal["started", "stepped", "rolled_back"]
    share: float
    reason: str


class CanaryRecord(BaseModel):
    """`fingerprint` says which canary of which Bento this is: another one starts anew."""

    model_config = ConfigDict(extra="forbid")

    fingerprint: str
    arm: str
    phase: Literal["ramping", "full", "rolled_back"]
    step: int
    share: float
    since: int  # UTC µs of this step
    requests: int  # of the canary at this step, as last saved
    period: int
    running: bool  # a process is, or died while, serving it
    deaths: int  # at this step
    moves: list[Move]


class Canary:
    """Thread-safe. `answered` and `on_logged` only note what happened; a thread (`start`) counts, judges and decides every check_seconds."""

    def __init__(
        self,
        settings: CanarySettings,
        folder: Path,
        fingerprint: str,
        *,
        set_share: Callable[[float], None],
        changed: Callable[[str, str, float], None] = lambda outcome, arm, share: None,
        clock: Callable[[], int] = now,
    ) -> None:
        """`folder` is the state folder; `set_share` is called with the share at once and at every change; `changed(outcome, arm, share)` likewise.

        Raises StateError where canary.json is damaged.
        """
        self._settings = settings
        self._folder = folder / FOLDER
        self._set_share, self._changed, self._clock = set_share, changed, clock
        self._noted: deque[tuple[Any, ...]] = deque()
        self._answers: OrderedDict[str, tuple[bool, int, set[str]]] = OrderedDict()
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._thread: threading.Thread | None = None
        self._judged = self._saved = 0.0
        self._sides = {False: Outcomes(), True: Outcomes()}
        self.record = self._resume(fingerprint)
        self._write()
        set_share(self.record.share)

    @property
    def active(self) -> bool:
        return self.record.phase != "rolled_back"

    # ------------------------------------------------------------ what happens

    def answered(self, user: int, canary: bool, seconds: float, failed: bool, request_id: str, items: Sequence[str]) -> None:
        """A list for a known user: by the canary or by another arm; `failed` where it had to be a fallback. Waits for nothing."""
        if self.active:
            self._noted.append(("answer", user, canary, 1000 * seconds > self._settings.max_p99_ms, failed, request_id, items))

    def on_logged(self, events: Sequence[Any]) -> None:
        """Accepted events (serving.event_log.LoggedEvent): those that name an answer are its clicks."""
        if self.active:
            self._noted.extend(("event", event.request, event.item) for event in events if event.request is not None)

    def _count(self) -> None:
        while self._noted:
            kind, *noted = self._noted.popleft()
            if kind == "answer":
                self._count_answer(*noted)
            elif (answer := self._answers.get(noted[0])) and noted[1] in answer[2]:
                answer[2].discard(noted[1])  # a click counts once
                self._sides[answer[0]].clicked(answer[1])

    def _count_answer(self, user: int, canary: bool, slow: bool, failed: bool, request_id: str, items: Sequence[str]) -> None:
        side = self._sides[canary]
        side.request(failed=failed, slow=slow)
        self.record.requests += canary
        if not failed:
            side.shown(user, len(items))
            self._answers[request_id] = (canary, user, set(items))
            if len(self._answers) > REMEMBERED:
                self._answers.popitem(last=False)

    # ------------------------------------------------------------ what follows

    def look(self) -> None:
        """Count what was noted, judge, and step up, roll back or wait. Raises OSError where that cannot be written: the share stays."""
        with self._lock:
            if not self.active:
                return
            self._count()
            asked = self._folder / ROLL_BACK
            if asked.exists():
                self._roll_back(f"by hand: {asked.read_text(encoding='utf-8', errors='replace').strip()[:200]}")
                asked.unlink()
                return
            due = self._step_is_due()
            if due or self._grown() >= GROWTH * self._judged:
                self._judged = self._grown()
                if broken := self._broken():
                    self._roll_back(f"{broken.guardrail}: {broken.sentence}")
                    return
                if due:
                    self._step_up()
                elif max(side.requests for side in self._sides.values()) >= PERIOD_REQUESTS:
                    self._new_period()
                    self._write()
            if self._clock() - self._saved >= SAVE_SECONDS * 1e6:
                self._save()

    def _grown(self) -> float:
        return float(sum(side.requests for side in self._sides.values()) + sum(c for _, c in self._sides[True].users.values()))

    def _broken(self) -> Broken | None:
        return judge(self._sides[False], self._sides[True], self._settings, error=period_error(self.record.period, self._settings.confidence))

    def _step_is_due(self) -> bool:
        record, settings = self.record, self._settings
        waited = self._clock() - record.since >= settings.hold_minutes * 60e6
        return record.phase == "ramping" and waited and record.requests >= settings.hold_requests

    def _step_up(self) -> None:
        record, steps = self.record, self._settings.steps
        if record.step + 1 == len(steps):
            record.phase = "full"
            self._write()
            logger.warning("canary %s: every guardrail held up to a share of %g, which stays", record.arm, record.share)
            return
        record.step += 1
        self._new_period()
        self._move(
            "stepped", steps[record.step], f"{record.requests:,} requests and {self._settings.hold_minutes:g} minutes with every guardrail held"
        )

    def _roll_back(self, reason: str) -> None:
        self.record.phase = "rolled_back"
        self._new_period()
        self._move("rolled_back", 0.0, reason)
        logger.error("canary %s rolled back: %s", self.record.arm, reason)

    def _move(self, outcome: Literal["stepped", "rolled_back"], share: float, reason: str) -> None:
        record = self.record
        record.share, record.since, record.requests, record.deaths = share, self._clock(), 0, 0
        record.moves.append(Move(time=record.since, outcome=outcome, share=share, reason=reason))
        self._write()
        self._set_share(share)
        self._changed(outcome, record.arm, share)
        logger.warning("canary %s: share %g (%s)", record.arm, share, outcome)

    def _new_period(self) -> None:
        self.record.period += 1
        self._sides = {False: Outcomes(), True: Outcomes()}
        self._answers.clear()
        self._judged = 0.0

    # ------------------------------------------------------------ what stays

    def _resume(self, fingerprint: str) -> CanaryRecord:
        found = read_record(self._folder.parent)
        if found is None or found.fingerprint != fingerprint:
            first, time = self._settings.steps[0], self._clock()
            moves = [Move(time=time, outcome="started", share=first, reason="a canary that was not met before")]
            return CanaryRecord(
                fingerprint=fingerprint, arm=self._settings.arm, phase="ramping", step=0, share=first, since=time, requests=0, period=0,
                running=True, deaths=0, moves=moves,
            )  # fmt: skip
        self._load(found)
        found.deaths += found.running
        found.running = True
        if found.phase != "rolled_back" and found.deaths >= DEATHS:
            found.phase, found.share = "rolled_back", 0.0
            reason = f"the process died {found.deaths} times at this step"
            found.moves.append(Move(time=self._clock(), outcome="rolled_back", share=0.0, reason=reason))
            logger.error("canary %s rolled back: %s", found.arm, reason)
        return found

    def _load(self, found: CanaryRecord) -> None:
        """The outcomes of this period, where they were saved and are whole; else the period is a new one."""
        try:
            with np.load(self._folder / OUTCOMES, allow_pickle=False) as arrays:
                if (str(arrays["fingerprint"]), int(arrays["period"])) != (found.fingerprint, found.period):
                    raise ValueError("of another period")
                self._sides = {side: unpack({name: arrays[f"{name}_{int(side)}"] for name in ("failed", "slow", "users")}) for side in (False, True)}
        except (OSError, ValueError, KeyError, BadZipFile):
            found.period += 1

    def _save(self) -> None:
        self._saved = float(self._clock())
        arrays = {f"{name}_{int(side)}": values for side, outcomes in self._sides.items() for name, values in pack(outcomes).items()}
        with atomic_file(self._folder / OUTCOMES) as aside, aside.open("wb") as file:
            np.savez(file, fingerprint=self.record.fingerprint, period=self.record.period, **arrays)
        self._write()

    def _write(self) -> None:
        with atomic_file(self._folder / RECORD) as aside:
            aside.write_text(self.record.model_dump_json(indent=2) + "\n", encoding="utf-8")

    # ------------------------------------------------------------ the thread

    def start(self) -> None:
        self._changed("started", self.record.arm, self.record.share)
        self._thread = threading.Thread(target=self._run, name="canary", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(self._settings.check_seconds):
            try:
                self.look()
            except Exception:  # a look that fails (disk full) must not be the last
                logger.exception("canary %s: a look failed; the share stays %g", self.record.arm, self.record.share)

    def close(self) -> None:
        """What was counted is saved: the next process goes on from there."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        with self._lock:
            self._count()
            self.record.running = False
            self._save()


def period_error(period: int, confidence: float) -> float:
    """Of period 0, 1, …: they add up to 1 - confidence, however many there are."""
    return (1 - confidence) * 6 / math.pi**2 / (period + 1) ** 2


def read_record(state: Path) -> CanaryRecord | None:
    """None where no canary was ever served from this state folder. Raises StateError."""
    path = state / FOLDER / RECORD
    try:
        return CanaryRecord.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (PydanticError, UnicodeDecodeError) as error:
        raise StateError(f"{path}: not the record of a canary: {error}") from None


def main(
    state: Annotated[Path, typer.Argument(help="the service's state folder ($LONGTRAIL_STATE)")],
    roll_back: Annotated[str, typer.Option(help="roll it back at the next look; say why")] = "",
) -> None:
    """Where the canary stands; or roll it back by hand."""
    record = read_record(state)
    if record is None:
        raise SystemExit(f"error: {state / FOLDER / RECORD}: not there; no canary was served from this state folder")
    if roll_back:
        with atomic_file(state / FOLDER / ROLL_BACK) as aside:
            aside.write_text(roll_back, encoding="utf-8")
    print(record.model_dump_json(indent=2))


if __name__ == "__main__":
    typer.run(main)
